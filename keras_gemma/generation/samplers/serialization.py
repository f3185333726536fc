"""Serialization of samplers."""

from typing import Any

import keras

from keras_gemma.generation.samplers import get
from keras_gemma.generation.samplers.sampler import Sampler


def serialize(sampler: Any) -> dict[str, Any]:
    """Returns a sampler as a JSON-serializable dictionary.

    Args:
        sampler: A sampler or its name. KerasHub samplers are accepted.

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
    """Returns the sampler of a dictionary or a name. Inverse of `serialize`.

    Args:
        config: A dictionary from `serialize`, or a name. KerasHub's dictionaries are accepted
            if KerasHub is imported.
        custom_objects: Custom classes, by name, that are not registered with Keras.

    Raises:
        ValueError: If the name is unknown.
        TypeError: If Keras does not know the class, or the object is not a sampler.
    """
    if isinstance(config, dict):
        return get(keras.saving.deserialize_keras_object(config, custom_objects=custom_objects))
    return get(config)
