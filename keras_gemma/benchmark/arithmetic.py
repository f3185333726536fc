"""Minimum bytes and operations of generation, computed from the sizes of a model.

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
    """Returns the bytes that a decode step reads: each weight once, and the filled KV cache.

    The tied embedding counts once, as the output head. The cache grows by a token per step, so
    the result is the mean over the steps. The first of at least 2 new tokens per prompt is part of
    the prefill.
    """
    lengths = range(prompt + 1, prompt + new)
    cache = sum(config.cache_bytes(batch, length, cache_dtype) for length in lengths)
    return weight_bytes + cache / len(lengths)


def prefill_flops(config: GemmaConfig, *, batch: int, prompt: int) -> int:
    """Returns the floating-point operations of the prefill, two per multiplication and addition.

    Counts the matrices of the blocks once per token, and the output head once per prompt. The
    embedding lookup and the products within attention are not counted.
    """
    shapes = config.weight_shapes()
    head = math.prod(shapes.pop("token_embedding"))
    blocks = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
    return 2 * batch * (prompt * blocks + head)


def bandwidth_utilization(steps_per_second: float, step_bytes: float, bandwidth: float) -> float:
    """Returns the MBU: the share of `bandwidth`, in bytes/s, that steps of `step_bytes` use."""
    return steps_per_second * step_bytes / bandwidth
