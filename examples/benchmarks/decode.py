"""Decoding speed and memory, beside KerasHub's, on the shape of Gemma 2 2B cut to a few layers.

    python examples/benchmarks/decode.py --backends jax torch tensorflow

Weights are random, in bfloat16. Every line is a process of its own. The speed is that of the last
of three calls, prompt included. Peaks are given over the process's size before the model was
made, in multiples of the weights, and in GB with the frameworks included.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

SHAPE = {
    "vocabulary_size": 256000,
    "num_query_heads": 8,
    "num_key_value_heads": 4,
    "hidden_dim": 2304,
    "intermediate_dim": 18432,
    "head_dim": 256,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
}


def memory(what: str) -> int:
    """Bytes of this process (Linux): `"VmRSS"` now, `"VmHWM"` at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {what} in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def make_ours(layers: int):
    from keras_gemma import GemmaBackbone, GemmaCausalLM
    from keras_gemma.backend import uninitialized

    with uninitialized():
        backbone = GemmaBackbone(num_layers=layers, **SHAPE, dtype="bfloat16")
    values = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(ml_dtypes.bfloat16)
    for weight in backbone.named_weights().values():
        weight.assign(np.resize(values, weight.shape))
    return GemmaCausalLM(backbone)


def make_keras_hub(layers: int):
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone(num_layers=layers, **SHAPE, dtype="bfloat16")
    lm = keras_hub.models.GemmaCausalLM(backbone, None)
    lm.compile(sampler="greedy")
    return lm


def measure(library: str, options: argparse.Namespace) -> dict:
    """One process's figures."""
    if library == "keras_gemma":
        import keras

        import keras_gemma  # noqa: F401
        from keras_gemma import backend
    else:
        import keras
        import keras_hub  # noqa: F401
    before = memory("VmRSS")
    forget_peak()
    start = time.perf_counter()
    lm = (make_ours if library == "keras_gemma" else make_keras_hub)(options.layers)
    load, load_peak = time.perf_counter() - start, memory("VmHWM") - before
    forget_peak()
    length = options.prompt + options.new
    token_ids = np.zeros((options.batch, length), "int32")
    token_ids[:, : options.prompt] = np.random.default_rng(0).integers(
        200, 250000, (options.batch, options.prompt)
    )
    mask = np.zeros_like(token_ids)
    mask[:, : options.prompt] = 1
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        lm.generate({"token_ids": token_ids, "padding_mask": mask}, stop_token_ids=None)
        seconds.append(time.perf_counter() - start)
    weights = 2 * lm.count_params()
    generate_peak = memory("VmHWM")
    bandwidth = backend.memory_bandwidth() if library == "keras_gemma" else None
    return {
        "library": library,
        "backend": keras.config.backend(),
        "tokens_per_second": round(options.batch * options.new / seconds[-1], 2),
        "first_call_seconds": round(seconds[0], 1),
        "load_seconds": round(load, 1),
        "weights_gb": round(weights / 1e9, 3),
        "peak_loading_over_weights": round(load_peak / weights, 2),
        "peak_generating_over_weights": round((generate_peak - before) / weights, 2),
        "peak_memory_gb": round(generate_peak / 1e9, 2),
        "bandwidth_gb_per_second": bandwidth and round(bandwidth / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--libraries", nargs="+", default=["keras_gemma", "keras_hub"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    for backend in options.backends:
        for library in options.libraries:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", library]
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
            print(result.stdout.strip().splitlines()[-1] if result.stdout else result, flush=True)


if __name__ == "__main__":
    main()
