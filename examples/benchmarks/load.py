"""Time and memory of loading a model of a billion parameters, by format, backend and dtype.

    python examples/benchmarks/load.py /tmp/load --backends jax torch tensorflow
    python examples/benchmarks/load.py /tmp/load --quantizations int8 int4 int4_all \
        --dtypes bfloat16 --libraries keras_gemma

Writes the checkpoints to the folder once: VaultGemma's sizes with Gemma 2's norms, random
weights in bfloat16, as Keras presets and as Hugging Face's safetensors, each whole and in shards.
Then every line is a process of its own, the files in the page cache:

    floor_seconds    reading the files' bytes and copying them once
    seconds          `GemmaBackbone.from_preset`, the fastest of three, as the floor is
    peak_over_limit  the first load's peak above the process's size before it, divided by
                     1.15 * the final weights (1.2 * quantized ones) + the largest tensor of the
                     file
"""

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPE = {
    "vocabulary_size": 256000,
    "num_layers": 26,
    "num_query_heads": 4,
    "num_key_value_heads": 4,
    "hidden_dim": 1152,
    "intermediate_dim": 13824,
    "head_dim": 256,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
}
QUANTIZATIONS = {
    "none": None,
    "int8": "int8",
    "int4": "int4",
    "int4_all": {"mode": "int4", "embedding": "int4"},
}
FORMATS = ("h5", "h5_shards", "safetensors", "safetensors_shards")


def memory(what: str) -> int:
    """Bytes of this process (Linux): `"VmRSS"` now, `"VmHWM"` at most since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise ValueError(f"no {what} in /proc/self/status")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def write_checkpoints(folder: Path) -> None:
    """The four checkpoints, those that are not there yet."""
    missing = [name for name in FORMATS if not (folder / name).is_dir()]
    if not missing:
        return
    import ml_dtypes

    from keras_gemma import GemmaBackbone, GemmaCausalLM
    from keras_gemma.backend import uninitialized

    with uninitialized():
        backbone = GemmaBackbone(**SHAPE, dtype="bfloat16")
    values = np.random.default_rng(0).normal(0, 0.02, 1_000_003).astype(ml_dtypes.bfloat16)
    for weight in backbone.named_weights().values():
        weight.assign(np.resize(values, weight.shape))
    lm = GemmaCausalLM(backbone)
    for name in missing:
        size = "700MB" if name.endswith("shards") else "10GB"
        if name.startswith("h5"):
            backbone.save_to_preset(folder / name, max_shard_size=size)
        else:
            lm.save_to_hugging_face(folder / name, max_shard_size=size)


def measure_floor(folder: Path) -> float:
    """Seconds to read the weights' bytes, file by file, and to copy them into new memory."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.h5")])
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        copies = [np.fromfile(file, "uint8").copy() for file in files]
        best = min(best, time.perf_counter() - start)
        del copies
    return best


def measure(library: str, folder: Path, dtype: str, quantization: str) -> dict:
    """One process's figures."""
    import keras

    if library == "keras_gemma":
        from keras_gemma import GemmaBackbone
    else:
        from keras_hub.models import GemmaBackbone
    floor = measure_floor(folder)
    tiny = SHAPE | {"vocabulary_size": 512, "num_layers": 2, "hidden_dim": 64}
    GemmaBackbone(**tiny, dtype=dtype)  # so that what every first model imports is not counted
    keras.backend.clear_session()
    arguments = {"dtype": dtype}
    if quantization != "none":
        arguments["quantization"] = QUANTIZATIONS[quantization]
    seconds, peaks = [], []
    for _ in range(3):
        gc.collect()
        before = memory("VmRSS")
        forget_peak()
        start = time.perf_counter()
        backbone = GemmaBackbone.from_preset(str(folder), **arguments)
        seconds.append(time.perf_counter() - start)
        peaks.append(memory("VmHWM") - before)
        size = sum(
            math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
            for variable in backbone.variables
        )
        del backbone
    # Of the file, which is in bfloat16; plain weights are read in the dtype that they get.
    itemsize = 4 if dtype == "float32" and quantization == "none" else 2
    largest = itemsize * SHAPE["vocabulary_size"] * SHAPE["hidden_dim"]
    share = 1.15 if quantization == "none" else 1.2
    return {
        "library": library,
        "backend": keras.config.backend(),
        "format": folder.name,
        "dtype": dtype,
        "quantization": quantization,
        "floor_seconds": round(floor, 2),
        "seconds": round(min(seconds), 2),
        "seconds_over_floor": round(min(seconds) / floor, 2),
        "weights_gb": round(size / 1e9, 2),
        "peak_gb": round(peaks[0] / 1e9, 2),
        "peak_over_weights": round(peaks[0] / size, 2),
        "peak_over_limit": round(peaks[0] / (share * size + largest), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--quantizations", nargs="+", default=["none"], choices=list(QUANTIZATIONS))
    parser.add_argument("--libraries", nargs="+", default=["keras_gemma", "keras_hub"])
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        library, name, *how = options.one
        print(json.dumps(measure(library, options.folder / name, *how)))
        return
    write_checkpoints(options.folder)
    lines = itertools.product(
        options.backends, options.formats, options.dtypes, options.quantizations, options.libraries
    )
    for backend, name, dtype, quantization, library in lines:
        if library == "keras_hub" and quantization != "none":
            continue  # it quantizes no model while it loads
        command = [sys.executable, __file__, str(options.folder)]
        command += ["--one", library, name, dtype, quantization]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        printed = result.stdout.strip().splitlines() or [str(result)]
        print(printed[-1], flush=True)


if __name__ == "__main__":
    main()
