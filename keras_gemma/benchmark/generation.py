"""A model's speed and memory: load, first call, reading the prompt, token after token.

Knows a model by `generate` on ids. Which model, and what is printed, is the caller's choice.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_gemma import backend
from keras_gemma.benchmark import memory
from keras_gemma.benchmark.arithmetic import bandwidth_utilization, decode_bytes, prefill_flops
from keras_gemma.benchmark.machine import best_product
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.memory import Workload, bytes_needed

BYTES_OF_AN_ID = 48
"""In the prompts, which are lists of Python's."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What is generated: greedy, to the end, whatever the tokens.

    Raises:
        ValueError: nothing to time.
    """

    prompt: int = 32
    """Tokens of each prompt."""
    new: int = 32
    """Tokens that follow; 2 at least, as the first one is the prompt's."""
    batch: int = 1
    """Rows that are generated together."""
    repeat: int = 3
    """Calls of each kind after the first one, of which the fastest counts."""

    def __post_init__(self) -> None:
        for name, least in (("prompt", 1), ("new", 2), ("batch", 1), ("repeat", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"`{name}` must be at least {least}. Received: {name}={value}")


@dataclasses.dataclass(frozen=True)
class Seconds:
    """What the calls took."""

    first_call: float
    """The first one, compiling included."""
    first_token: float
    """The fastest that ends with the first new token."""
    whole: float
    """The fastest with all new tokens."""

    def steps_per_second(self, new: int) -> float | None:
        """Decoding steps; None where the work is too short for this clock to tell."""
        decoding = self.whole - self.first_token
        return (new - 1) / decoding if decoding > 0 else None


def measure(make: Callable[[], Any], work: Work) -> dict[str, Any]:
    """Make a model, let it work, and measure the machine beside it, in this process.

    Args:
        make: gives the `GemmaCausalLM`; its time is that of loading.
        work: what is generated.

    Returns:
        Figures by name; units stand in the names, memory is over what the process held before,
        and what cannot be known is None.

    Raises:
        ValueError: the work does not fit the model's context.

    Example:

    ```python
    from keras_gemma import GemmaCausalLM
    from keras_gemma.benchmark.generation import Work, measure

    figures = measure(lambda: GemmaCausalLM.from_preset("gemma_tiny_en"), Work(new=8))
    figures["decode_tokens_per_second"], figures["mbu"]
    ```
    """
    before = memory.resident()
    memory.forget_peak()
    start = time.perf_counter()
    lm = make()
    load = time.perf_counter() - start
    load_peak = memory.peak()
    config, dtype = lm.backbone.config, lm.compute_dtype
    check_context(config, work)

    memory.forget_peak()
    seconds = time_calls(lm, work)
    generate_peak = memory.peak()
    device_peak = backend.peak_device_memory()

    # Others may be using the machine: the better of two moments is nearer to what it can do.
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
    """Raise a ValueError where prompt and new tokens exceed the model's context."""
    if work.prompt + work.new > config.context_length:
        raise ValueError(
            f"The model's context holds {config.context_length} tokens. Make `prompt` or `new` "
            f"smaller. Received: prompt={work.prompt}, new={work.new}"
        )


def check_memory(
    config: GemmaConfig, work: Work, dtype: str | None, quantization: str | None = None
) -> None:
    """Raise a ValueError where weights and work cannot fit into the memory that is free.

    Args:
        dtype: of weights and activations; the least of them where it is None.
        quantization: of weights, `"int8"` or `"int4"`; None for none.
    """
    free, dtype = backend.free_memory(), dtype or "bfloat16"
    text = work.prompt + work.new
    needed = bytes_needed(Workload(work.batch, 1, work.prompt, text), config, dtype)
    needed += work.batch * (work.prompt * BYTES_OF_AN_ID + text * 4)
    weights = config.weight_bytes(quantization or dtype)
    if free is not None and weights + needed > free:
        raise ValueError(
            f"The weights need {weights / 1e9:.1f} GB and the work about {needed / 1e9:.1f} GB, "
            f"and {free / 1e9:.1f} GB are free. Make `batch`, `prompt` or `new` smaller, or take a "
            f"smaller model. Received: batch={work.batch}, prompt={work.prompt}, new={work.new}"
        )


def time_calls(lm: Any, work: Work) -> Seconds:
    """Time `lm.generate`: the whole work, and its first token alone, in turn."""
    size = lm.backbone.config.vocabulary_size
    ids = np.random.default_rng(0).integers(size // 8, size, (work.batch, work.prompt)).tolist()

    def call(new: int) -> float:
        start = time.perf_counter()
        lm.generate(ids, max_new_tokens=new, stop_token_ids=None)
        return time.perf_counter() - start

    lm.compile(sampler="greedy")
    first = call(work.new)
    call(1)  # compiles, where that is another program
    turns = [(call(1), call(work.new)) for _ in range(work.repeat)]
    first_token, whole = map(min, zip(*turns, strict=True))
    return Seconds(first, first_token, whole)


def _bytes(variable: keras.Variable) -> int:
    return math.prod(variable.shape) * np.dtype(variable.dtype).itemsize


def _over(before: int | None, peak: int | None) -> float | None:
    return None if before is None or peak is None else _round((peak - before) / 1e9)


def _round(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
