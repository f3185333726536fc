"""Model of any size with random weights, for measurements.

Knows no files. Making the model is as fast as loading one.
"""

from typing import Any

import numpy as np

from keras_gemma import backend
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone

PERIOD = 1_000_003
"""Period of the random numbers. A prime, so that the rows of a matrix differ."""


def random_model(
    config: GemmaConfig, dtype: str, preprocessor: Any = None, quantization: Any = None
) -> GemmaCausalLM:
    """Returns a model with random weights, which are the same each time.

    Needs only a few megabytes in addition to the weights.

    Example:

    ```python
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.catalogue import presets

    lm = random_model(presets()["gemma_tiny_en"].config, "bfloat16")
    lm.generate([[2, 7, 9]], max_new_tokens=4, stop_token_ids=None)
    ```
    """
    with backend.uninitialized():
        backbone = GemmaBackbone(**config.to_dict(), dtype=dtype, quantization=quantization)
    plain_dtype = backbone.variable_dtype
    for seed, weight in enumerate(backbone.named_weights().values()):
        weight.take(weight.pack(random_array(weight.shape, plain_dtype, seed)))
    return GemmaCausalLM(backbone, preprocessor)


def random_array(shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Returns normal numbers of variance `1 / shape[-1]`, in memory that the backend can adopt.

    This variance keeps the magnitude of activations, whatever the size of the matrix.
    """
    array = backend.empty(shape, dtype)
    flat = array.reshape(-1)
    noise = np.random.default_rng(seed).standard_normal(min(PERIOD, flat.size), "float32")
    noise = (noise * shape[-1] ** -0.5).astype(dtype)
    for start in range(0, flat.size, PERIOD):
        part = flat[start : start + PERIOD]
        part[:] = noise[: part.size]
    return array
