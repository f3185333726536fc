"""`keras_hub.samplers`: the choice of the next token."""

from keras_gemma.generation.samplers import (
    BeamSampler,
    ContrastiveSampler,
    GreedySampler,
    MinPSampler,
    RandomSampler,
    Sampler,
    TopKSampler,
    TopPSampler,
    get,
)
from keras_gemma.generation.samplers.serialization import deserialize, serialize

__all__ = [
    "BeamSampler",
    "ContrastiveSampler",
    "GreedySampler",
    "MinPSampler",
    "RandomSampler",
    "Sampler",
    "TopKSampler",
    "TopPSampler",
    "deserialize",
    "get",
    "serialize",
]
