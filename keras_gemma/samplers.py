"""Public samplers, with the names of `keras_hub.samplers`."""

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
