"""Bytes and operations that generation cannot do without, from a model's sizes alone.

Knows no framework and no clock.
"""

import math

from keras_gemma.config import GemmaConfig


def decode_bytes(
    config: GemmaConfig,
    weight_bytes: int,
    *,
    batch: int,
    prompt: int,
    new: int,
    cache_dtype: str = "bfloat16",
) -> float:
    """Bytes that a decoding step reads: every weight once, and the filled part of the cache.

    The tied embedding counts once, as the output head; the row that is looked up does not. The
    cache grows by a token a step, so this is the mean over the steps.

    Args:
        config: the model's sizes.
        weight_bytes: of all weights, each in its own dtype.
        batch: B, rows that are generated together.
        prompt: tokens of each prompt.
        new: tokens that follow, at least 2. The first comes from the prompt; the others take a
            step each.
        cache_dtype: of keys and values.

    Example:

    ```python
    from keras_gemma.benchmark.arithmetic import decode_bytes
    from keras_gemma.catalogue import presets

    config = presets()["gemma2_2b_en"].config
    decode_bytes(config, config.weight_bytes(), batch=1, prompt=32, new=32)  # 5233796096.0
    ```
    """
    lengths = range(prompt + 1, prompt + new)
    cache = sum(config.cache_bytes(batch, length, cache_dtype) for length in lengths)
    return weight_bytes + cache / len(lengths)


def prefill_flops(config: GemmaConfig, *, batch: int, prompt: int) -> int:
    """Floating-point operations of reading the prompts: two for each multiplication and addition.

    The matrices of the blocks count once a token, the head once a row, as only the last token is
    continued. The lookup in the embedding and the products within attention do not count.

    Example:

    ```python
    from keras_gemma.benchmark.arithmetic import prefill_flops
    from keras_gemma.catalogue import presets

    prefill_flops(presets()["gemma2_2b_en"].config, batch=1, prompt=32)  # 130747990016
    ```
    """
    shapes = config.weight_shapes()
    head = math.prod(shapes.pop("token_embedding"))
    blocks = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    return 2 * batch * (prompt * blocks + head)


def bandwidth_utilization(steps_per_second: float, step_bytes: float, bandwidth: float) -> float:
    """MBU: the share of `bandwidth`, in bytes/s, that steps of `step_bytes` use."""
    return steps_per_second * step_bytes / bandwidth
