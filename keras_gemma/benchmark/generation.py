"""Speed and memory of a model: loading, first call, prefill and decoding.

Knows only `generate` of a model. The caller chooses the model and prints the result.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_gemma import backend, progress
from keras_gemma.benchmark import memory
from keras_gemma.benchmark.arithmetic import bandwidth_utilization, decode_bytes, prefill_flops
from keras_gemma.benchmark.machine import best_product
from keras_gemma.checks import check_integer
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.memory import Workload, bytes_needed

BYTES_PER_PROMPT_ID = 48
"""Bytes of a token id in the prompts, which are Python lists."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Sizes of a measurement: greedy generation without stop tokens."""

    prompt: int = 32
    """Tokens per prompt."""
    new: int = 32
    """New tokens per prompt, at least 2, because the first one is part of the prefill."""
    batch: int = 1
    """Batch size."""
    repeat: int = 3
    """Number of calls after the first one. The fastest counts."""

    def __post_init__(self) -> None:
        for name, minimum in (("prompt", 1), ("new", 2), ("batch", 1), ("repeat", 1)):
            check_integer(name, getattr(self, name), minimum)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Durations of calls of `generate`."""

    first_call: float
    """Duration of the first call, including compilation."""
    first_token: float
    """Duration of the fastest call with one new token."""
    whole: float
    """Duration of the fastest call with all new tokens."""

    def steps_per_second(self, new: int) -> float | None:
        """Returns the decode steps per second, or `None` if the work is too short to measure."""
        decoding = self.whole - self.first_token
        return (new - 1) / decoding if decoding > 0 else None


def measure(make: Callable[[], Any], work: Work) -> dict[str, Any]:
    """Measures a model and the limits of the machine, in this process.

    Args:
        make: Function that returns the `GemmaCausalLM`. Its duration is the time of loading.
        work: Sizes of the measurement.

    Returns:
        Results by name. The names end in the units. Memory is in addition to that of the process
        before. Values that cannot be measured are `None`.

    Example:

    ```python
    from keras_gemma import GemmaCausalLM
    from keras_gemma.benchmark.generation import Work, measure

    figures = measure(lambda: GemmaCausalLM.from_preset("gemma_tiny_en"), Work(new=8))
    figures["decode_tokens_per_second"], figures["mbu"]
    ```
    """
    before = memory.resident()
    memory.reset_peak()
    start = time.perf_counter()
    with progress.status("Loading the model ..."):
        lm = make()
    load = time.perf_counter() - start
    load_peak = memory.peak()
    config, dtype = lm.backbone.config, lm.compute_dtype
    check_context(config, work)

    memory.reset_peak()
    with progress.status(f"Compiling, and generating {work.repeat + 1} times ..."):
        seconds = time_calls(lm, work)
    generate_peak = memory.peak()
    device_peak = backend.peak_device_memory()

    # Measured twice, because other programs may use the machine at times.
    with progress.status("Measuring the machine ..."):
        bandwidth = backend.memory_bandwidth()
        product, product_dtype = best_product(dtype)
        bandwidth = max(bandwidth, backend.memory_bandwidth())
    weights = sum(_bytes(variable) for variable in lm.backbone.weights)
    read = decode_bytes(
        config,
        weights,
        batch=work.batch,
        prompt=work.prompt,
        new=work.new,
        cache_dtype=dtype,
    )
    flops = prefill_flops(config, batch=work.batch, prompt=work.prompt)
    steps = seconds.steps_per_second(work.new)
    return {
        "backend": keras.config.backend(),
        "parameters": config.parameter_count,
        "layers": config.num_layers,
        "dtype": dtype,
        "quantization": lm.backbone.quantization and lm.backbone.quantization.mode,
        **dataclasses.asdict(work),
        "bandwidth_gb_per_second": _round(bandwidth / 1e9),
        "best_product_gflop_per_second": _round(product / 1e9),
        "best_product_dtype": product_dtype,
        "weights_gb": _round(weights / 1e9),
        "read_per_step_gb": _round(read / 1e9),
        "load_seconds": _round(load),
        "first_call_seconds": _round(seconds.first_call),
        "time_to_first_token_seconds": _round(seconds.first_token),
        "prefill_tokens_per_second": _round(work.batch * work.prompt / seconds.first_token),
        "prefill_fraction_of_best_product": _round(flops / seconds.first_token / product),
        "decode_tokens_per_second": steps and _round(work.batch * steps),
        "mbu": steps and _round(bandwidth_utilization(steps, read, bandwidth)),
        "tokens_per_second": _round(work.batch * work.new / seconds.whole),
        "peak_loading_gb": _over(before, load_peak),
        "peak_generating_gb": _over(before, generate_peak),
        "peak_device_gb": device_peak and _round(device_peak / 1e9),
    }


def check_context(config: Any, work: Work) -> None:
    """Raises a ValueError if prompt and new tokens exceed the context length."""
    if work.prompt + work.new > config.context_length:
        raise ValueError(
            f"`prompt` and `new` exceed the context length of {config.context_length} tokens. Make "
            f"one of them smaller. Received: prompt={work.prompt}, new={work.new}"
        )


def check_memory(
    config: GemmaConfig, work: Work, dtype: str | None, quantization: str | None = None
) -> None:
    """Raises a ValueError if weights and work do not fit. The default of `dtype` is bfloat16."""
    free, dtype = backend.free_memory(), dtype or "bfloat16"
    text = work.prompt + work.new
    needed = bytes_needed(Workload(work.batch, 1, work.prompt, text), config, dtype)
    needed += work.batch * (work.prompt * BYTES_PER_PROMPT_ID + text * 4)
    is_quantized = quantization in ("int8", "int4")  # as stored: at most those in `dtype`
    weights = config.weight_bytes(quantization if is_quantized else dtype)
    if free is not None and weights + needed > free:
        raise ValueError(
            f"The weights need {weights / 1e9:.1f} GB and the work about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free. Make `batch`, `prompt` or `new` smaller, or use a "
            f"smaller model. Received: batch={work.batch}, prompt={work.prompt}, new={work.new}"
        )


def time_calls(lm: Any, work: Work) -> Seconds:
    """Times `lm.generate` with all new tokens and with one, in turn."""
    size = lm.backbone.config.vocabulary_size
    ids = np.random.default_rng(0).integers(size // 8, size, (work.batch, work.prompt)).tolist()

    def call(new: int) -> float:
        start = time.perf_counter()
        lm.generate(ids, max_new_tokens=new, stop_token_ids=None)
        return time.perf_counter() - start

    lm.compile(sampler="greedy")
    first = call(work.new)
    call(1)  # may compile another program
    pairs = [(call(1), call(work.new)) for _ in range(work.repeat)]
    first_token, whole = map(min, zip(*pairs, strict=True))
    return Seconds(first, first_token, whole)


def _bytes(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * np.dtype(variable.dtype).itemsize


def _over(before: int | None, peak: int | None) -> float | None:
    return None if before is None or peak is None else _round((peak - before) / 1e9)


def _round(value: float) -> float:
    """Returns `value` rounded to four significant digits."""
    return float(f"{value:.4g}")
