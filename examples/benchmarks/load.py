"""Time and memory of loading a model of a billion parameters, by format, backend and dtype.

    python examples/benchmarks/load.py /tmp/load --backends jax torch tensorflow
    python examples/benchmarks/load.py /tmp/load --quantizations int8 int4 int4_all \
        --dtypes bfloat16 --libraries keras_gemma

Writes the checkpoints to the folder once: VaultGemma's sizes with Gemma 2's norms, and random
bfloat16 weights, as Keras presets and as Hugging Face's safetensors, each in one file and in
shards. Each line is measured in its own process, with the files in the page cache:

    floor_seconds    reading and copying the bytes of the files, the fastest of three
    seconds          `GemmaBackbone.from_preset`, the fastest of three
    peak_over_limit  additional peak memory of the first load, divided by the size of the largest
                     tensor in the file + 1.15 * the weights (1.2 * the weights if quantized)
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
from child import memory, reset_peak

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


def write_checkpoints(folder: Path) -> None:
    """Writes the checkpoints that are not in the folder yet."""
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
    """Returns the seconds to read the files of weights and copy them into new memory."""
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.h5")])
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        copies = [np.fromfile(file, "uint8").copy() for file in files]
        best = min(best, time.perf_counter() - start)
        del copies
    return best


def measure(library: str, folder: Path, dtype: str, quantization: str) -> dict:
    """Returns the measurements of a library, in this process."""
    import keras

    if library == "keras_gemma":
        from keras_gemma import GemmaBackbone
    else:
        from keras_hub.models import GemmaBackbone
    floor = measure_floor(folder)
    tiny = SHAPE | {"vocabulary_size": 512, "num_layers": 2, "hidden_dim": 64}
    GemmaBackbone(**tiny, dtype=dtype)  # Imports that the first model needs are not measured.
    keras.backend.clear_session()
    arguments = {"dtype": dtype}
    if quantization != "none":
        arguments["quantization"] = QUANTIZATIONS[quantization]
    seconds, peaks = [], []
    for _ in range(3):
        gc.collect()
        before = memory("VmRSS")
        reset_peak()
        start = time.perf_counter()
        backbone = GemmaBackbone.from_preset(str(folder), **arguments)
        seconds.append(time.perf_counter() - start)
        peaks.append(memory("VmHWM") - before)
        size = sum(
            math.prod(variable.shape) * np.dtype(variable.dtype).itemsize
            for variable in backbone.variables
        )
        del backbone
    # The file is in bfloat16. Weights that are not quantized are converted while they are read.
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
        library, name, dtype, quantization = options.one
        print(json.dumps(measure(library, options.folder / name, dtype, quantization)))
        return
    write_checkpoints(options.folder)
    lines = itertools.product(
        options.backends, options.formats, options.dtypes, options.quantizations, options.libraries
    )
    for backend, name, dtype, quantization, library in lines:
        if library == "keras_hub" and quantization != "none":
            continue  # KerasHub cannot quantize while it loads.
        command = [sys.executable, __file__, str(options.folder)]
        command += ["--one", library, name, dtype, quantization]
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        printed = result.stdout.strip().splitlines() or [str(result)]
        print(printed[-1], flush=True)


if __name__ == "__main__":
    main()
