"""A sampler as a dictionary, and back."""

from typing import Any

import keras

from keras_gemma.generation.samplers import get
from keras_gemma.generation.samplers.sampler import Sampler


def serialize(sampler: Any) -> dict[str, Any]:
    """The sampler as a dictionary that JSON can hold.

    Args:
        sampler: one of the samplers here, or of KerasHub.

    Example:

    ```python
    import keras_gemma

    config = keras_gemma.samplers.serialize(keras_gemma.samplers.TopKSampler(k=3))
    keras_gemma.samplers.deserialize(config).k  # 3
    ```
    """
    return keras.saving.serialize_keras_object(get(sampler))


def deserialize(
    config: str | dict[str, Any], custom_objects: dict[str, Any] | None = None
) -> Sampler:
    """The sampler that `serialize` wrote down, or that a name stands for.

    Args:
        config: a dictionary, also KerasHub's while KerasHub is imported; or a name.
        custom_objects: classes of your own that are not registered with Keras, by name.

    Raises:
        ValueError: no such name.
        TypeError: a class that Keras does not know, or no sampler.
    """
    if isinstance(config, dict):
        return get(keras.saving.deserialize_keras_object(config, custom_objects=custom_objects))
    return get(config)
