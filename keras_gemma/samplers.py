"""`keras_hub.samplers`: the choice of the next token."""

from keras_gemma.generation.samplers import (
    GreedySampler,
    RandomSampler,
    Sampler,
    TopKSampler,
    TopPSampler,
    get,
)

__all__ = ["GreedySampler", "RandomSampler", "Sampler", "TopKSampler", "TopPSampler", "get"]
