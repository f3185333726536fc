"""Greedy generation with this package, KerasHub, transformers and llama.cpp, on the same weights.

    python examples/benchmarks/compare.py --backends jax torch tensorflow
    python examples/benchmarks/compare.py --tiny --libraries keras_gemma transformers
    python examples/benchmarks/compare.py --quantization int4
    python examples/benchmarks/compare.py --model gemma3_270m_q4_k_m --prompt 32 --new 128

Writes random weights in the sizes of a preset, cut to a few layers, or the weights of `--model`, to
a folder that all libraries read. Each line of the table is measured in its own process. The third
call counts or, with more `--calls`, the fastest from the third on:

    tokens/s     new tokens of the whole batch per second, including the prefill
    loading,     peak memory in addition to that before loading, as a multiple of the weights
    generating   (Linux)
    same ids     number of new tokens that agree with the first line, up to the first difference;
                 with random weights, rounding in 16 bits soon causes one
    GB/s         memory bandwidth, measured after the calls because it varies on some machines
    MBU          share of the bandwidth that decoding uses to read weights and cache
    x BACKEND    speed of this package on that backend, relative to the line

With `--quantization`, each library quantizes the same weights in its own format: KerasHub to int8,
llama.cpp to Q8_0 or Q4_0, with an embedding of 6 bits. KerasHub on PyTorch then takes minutes. With
`--quantization as_stored`, this package and llama.cpp compute with the numbers of `--model`'s GGUF
file.
"""

import argparse
import ctypes
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from child import add_common_arguments, memory, reset_peak, run_command

NEEDS = {
    "keras_gemma": "keras_gemma",
    "keras_hub": "keras_hub",
    "transformers": "transformers",
    "transformers_compiled": "transformers",
    "llama_cpp": "llama_cpp",
}
"""Library to the module that it needs."""
ON_KERAS = ("keras_gemma", "keras_hub")
KERAS, HUGGING_FACE, GGUF = "keras", "hugging_face", "model.gguf"
GGML_KINDS = {"int8": "q8_0", "int4": "q4_0"}
QUANTIZED = {
    "keras_gemma": ("int8", "int4", "as_stored"),
    "keras_hub": ("int8",),
    "llama_cpp": ("int8", "int4", "as_stored"),
}
"""Library to its quantization modes that are fast enough on a CPU."""

Generate = Callable[[list[list[int]], int], list[int]]
"""Function `(prompts, number of new tokens) -> new ids of the first prompt`."""


class Loaded(NamedTuple):
    """A loaded model."""

    generate: Generate
    weight_bytes: int


def write_checkpoints(folder: Path, options: argparse.Namespace) -> None:
    """Writes the formats that are not in `folder` yet, and `sizes.json`.

    Raises:
        ValueError: If the folder has other weights.
    """
    from keras_gemma import GemmaCausalLM, GemmaCausalLMPreprocessor
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.catalogue import presets

    if options.model:
        config = GemmaCausalLM.from_preset(options.model, load_weights=False).backbone.config
    else:
        config = dataclasses.replace(presets()[options.shape].config, num_layers=options.layers)
    sizes = {
        "model": options.model,
        "config": config.to_dict(),
        "dtype": options.dtype,
        "weight_bytes": config.weight_bytes(options.dtype),
    }
    gguf = gguf_name(options)
    sizes_path = folder / "sizes.json"
    if sizes_path.exists() and json.loads(sizes_path.read_text()) != sizes:
        raise ValueError(f"{folder} has other weights: pass another --folder, or delete it")

    @cache
    def lm() -> Any:
        if options.model:
            return GemmaCausalLM.from_preset(options.model, dtype=options.dtype)
        # The prompts are ids, but llama.cpp needs a vocabulary.
        preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en")
        return random_model(config, options.dtype, preprocessor)

    names = " ".join(options.libraries)
    if "keras_" in names and not (folder / KERAS).exists():
        lm().save_to_preset(folder / KERAS)
    if "transformers" in names and not (folder / HUGGING_FACE).exists():
        lm().save_to_hugging_face(folder / HUGGING_FACE)
    if options.quantization == "as_stored":
        sizes_path.write_text(json.dumps(sizes))
        return
    if "llama_cpp" in names and not (folder / GGUF).exists():
        lm().save_to_gguf(folder / GGUF, dtype="bf16")
    if "llama_cpp" in names and not (folder / gguf).exists():
        quantize_gguf(folder / GGUF, folder / gguf, options.quantization)
    sizes_path.write_text(json.dumps(sizes))


def gguf_name(options: argparse.Namespace) -> str:
    kind = GGML_KINDS.get(options.quantization)
    return f"{kind}.gguf" if kind else GGUF


def quantize_gguf(source: Path, target: Path, quantization: str) -> None:
    """Quantizes a GGUF file as llama.cpp's tool `llama-quantize` does."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{GGML_KINDS[quantization].upper()}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), settings):
        raise RuntimeError(f"llama.cpp could not quantize {source}")


def load_keras_gemma(folder: Path, options: argparse.Namespace) -> Loaded:
    from keras_gemma import GemmaCausalLM
    from keras_gemma.quantization import QuantizationConfig

    quantization = options.quantization
    if quantization == "int4":
        quantization = QuantizationConfig("int4", embedding=options.embedding)
    source = options.model if quantization == "as_stored" else folder / KERAS
    lm = GemmaCausalLM.from_preset(
        source, dtype=options.dtype, preprocessor=None, quantization=quantization
    )

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        return lm.generate(prompts, max_new_tokens=new, stop_token_ids=None)[0][-new:]

    return Loaded(generate, keras_bytes(lm))


def load_keras_hub(folder: Path, options: argparse.Namespace) -> Loaded:
    import keras_hub

    lm = keras_hub.models.CausalLM.from_preset(
        str(folder / KERAS), dtype=options.dtype, preprocessor=None
    )
    backbone = lm.backbone
    if options.quantization:
        backbone.quantize(options.quantization)
    lm.compile(sampler="greedy")

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        ids = np.pad(np.array(prompts, "int32"), ((0, 0), (0, new)))
        mask = np.zeros_like(ids)
        mask[:, :-new] = 1
        inputs = {"token_ids": ids, "padding_mask": mask}
        outputs = lm.make_generate_function()(inputs, None)
        return np.array(outputs["token_ids"])[0, -new:].tolist()

    return Loaded(generate, keras_bytes(backbone))


def keras_bytes(model: Any) -> int:
    """Returns the bytes of all weights as stored. int4 weights are packed in int8 arrays."""
    sizes = (np.prod(weight.shape) * np.dtype(weight.dtype).itemsize for weight in model.weights)
    return int(sum(sizes))


def load_transformers(folder: Path, options: argparse.Namespace, compiled: bool = False) -> Loaded:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / HUGGING_FACE, dtype=getattr(torch, options.dtype)
    )
    model.eval()
    settings = {}
    if compiled:
        settings = {"cache_implementation": "static"}
        model.forward = torch.compile(model.forward)

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        ids = torch.tensor(prompts)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=new,
            max_new_tokens=new,
            return_dict_in_generate=True,
            **settings,
        )
        if compiled:
            check_compiled(output.past_key_values)
        return output.sequences[0, -new:].tolist()

    return Loaded(generate, sum(weight.nbytes for weight in model.parameters()))


def check_compiled(cache: Any) -> None:
    """Raises a RuntimeError if transformers fell back to eager execution."""
    import torch._dynamo
    from transformers import StaticCache

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if not graphs or not isinstance(cache, StaticCache):
        raise RuntimeError(f"not compiled: {graphs} graphs and a {type(cache).__name__}")


def load_llama_cpp(folder: Path, options: argparse.Namespace) -> Loaded:
    import llama_cpp

    if options.batch > 1:
        raise NotImplementedError("llama-cpp-python's generate takes one prompt at a time")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    path = folder / gguf_name(options)
    if options.quantization == "as_stored":
        from keras_gemma.storage.hub.locate import resolve

        path = resolve(options.model)
    model = llama_cpp.Llama(
        str(path),
        n_ctx=options.prompt + options.new,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        model.reset()  # removes the cached prompt
        tokens = model.generate(prompts[0], temp=0.0)
        return [token for _, token in zip(range(new), tokens, strict=False)]

    return Loaded(generate, path.stat().st_size)


def load(library: str, folder: Path, options: argparse.Namespace) -> Loaded:
    loaders = {
        "keras_gemma": load_keras_gemma,
        "keras_hub": load_keras_hub,
        "transformers": load_transformers,
        "transformers_compiled": lambda *args: load_transformers(*args, compiled=True),
        "llama_cpp": load_llama_cpp,
    }
    return loaders[library](folder, options)


def measure(library: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the measurements of a library, in this process."""
    importlib.import_module(NEEDS[library])
    before = memory("VmRSS")
    reset_peak()
    start = time.perf_counter()
    generate, weights = load(library, folder, options)
    load_seconds, load_peak = time.perf_counter() - start, memory("VmHWM") - before
    reset_peak()
    sizes = json.loads((folder / "sizes.json").read_text())
    shape, vocabulary = (options.batch, options.prompt), sizes["config"]["vocabulary_size"]
    prompts = np.random.default_rng(0).integers(200, vocabulary, shape).tolist()

    def call(new: int) -> tuple[float, list[int]]:
        start = time.perf_counter()
        ids = generate(prompts, new)
        return time.perf_counter() - start, ids

    seconds, rows = zip(*(call(options.new) for _ in range(options.calls)), strict=True)
    whole = min(seconds[2:])
    generate_peak = memory("VmHWM") - before
    decoding = None
    if library == "keras_gemma":
        decoding = whole - min(call(1)[0] for _ in range(3))
    bandwidth, utilization = measure_machine(weights, decoding, sizes, options)
    return {
        "quantization": options.quantization,
        "tokens_per_second": round(options.batch * options.new / whole, 2),
        "load_seconds": round(load_seconds, 2),
        "first_call_seconds": round(seconds[0], 2),
        "weights_gb": round(weights / 1e9, 3),
        "peak_loading_over_weights": round(load_peak / weights, 2),
        "peak_generating_over_weights": round(generate_peak / weights, 2),
        "bandwidth_gb_per_second": bandwidth,
        "mbu": utilization,
        "ids": rows[-1],
    }


def measure_machine(
    weights: int, decoding: float | None, sizes: dict[str, Any], options: argparse.Namespace
) -> tuple[float, float | None]:
    """Returns the bandwidth in GB/s, and the share used during `decoding` seconds of decoding."""
    # Imported late, so that the imports do not count as memory of another library.
    from keras_gemma.backend import memory_bandwidth
    from keras_gemma.benchmark.arithmetic import bandwidth_utilization, decode_bytes
    from keras_gemma.config import GemmaConfig

    bandwidth = memory_bandwidth()
    utilization = None
    if decoding:
        work = {"batch": options.batch, "prompt": options.prompt, "new": options.new}
        read = decode_bytes(GemmaConfig(**sizes["config"]), weights, **work)
        utilization = round(bandwidth_utilization((options.new - 1) / decoding, read, bandwidth), 3)
    return round(bandwidth / 1e9, 1), utilization


def make_command(task: str, folder: Path) -> list[str]:
    return [sys.executable, __file__, *sys.argv[1:], "--one", task, "--folder", str(folder)]


def run(library: str, backend: str | None, folder: Path, options: argparse.Namespace) -> dict:
    """Runs `measure` in a subprocess. The result has the key `"error"` if it failed."""
    figures = run_command(make_command(library, folder), backend, options.limit)
    return {"library": library, "backend": backend, **figures}


def print_table(lines: list[dict[str, Any]]) -> None:
    """Prints the table."""
    ours = {
        line["backend"]: line["tokens_per_second"]
        for line in lines
        if line["library"] == "keras_gemma" and "error" not in line
    }
    columns = ["", "tokens/s", "GB/s", "MBU", "weights", "first call", "load"]
    columns += ["loading", "generating", "same ids"]
    columns += [f"x {backend}" for backend in ours]
    print(f"{columns[0]:<26}", *(f"{column:>10}" for column in columns[1:]))
    first = next((line["ids"] for line in lines if "error" not in line), [])
    for line in lines:
        name = " ".join(filter(None, (line["library"], line["backend"])))
        if "error" in line:
            print(f"{name:<26}   {line['error']}")
            continue
        same = [a == b for a, b in zip(first, line["ids"], strict=True)]
        cells = [
            f"{line['tokens_per_second']:.2f}",
            f"{line['bandwidth_gb_per_second']:.1f}",
            f"{line['mbu']:.0%}" if line["mbu"] else "",
            f"{line['weights_gb']:.2f} GB",
            f"{line['first_call_seconds']:.1f} s",
            f"{line['load_seconds']:.1f} s",
            f"{line['peak_loading_over_weights']:.2f}",
            f"{line['peak_generating_over_weights']:.2f}",
            f"{(*same, False).index(False)} of {len(same)}",
            *(f"{speed / line['tokens_per_second']:.2f}" for speed in ours.values()),
        ]
        print(f"{name:<26}", *(f"{cell:>10}" for cell in cells))
    print()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_arguments(parser, 6, list(NEEDS))
    parser.add_argument("--model", help="preset or GGUF file with real weights, instead of --shape")
    parser.add_argument("--tiny", action="store_true", help="use --shape gemma_tiny_en")
    parser.add_argument("--quantization", choices=[*GGML_KINDS, "as_stored"])
    parser.add_argument(
        "--embedding",
        default="int8",
        choices=list(GGML_KINDS),
        help="precision of the embedding with int4",
    )
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="folder of the weights, which is kept  [default: temporary]"
    )
    options = parser.parse_args()
    if options.calls < 3:
        parser.error(f"--calls must be at least 3. Received: {options.calls}")
    if options.quantization == "as_stored" and not options.model:
        parser.error("--quantization as_stored needs --model with a GGUF file")
    if options.tiny:
        options.shape = "gemma_tiny_en"
    return options


def main() -> None:
    options = read_options()
    if options.one == "checkpoints":
        write_checkpoints(options.folder, options)
        return
    if options.one:
        print(json.dumps(measure(options.one, options.folder, options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(make_command("checkpoints", folder), check=True)
        lines = []
        for library in options.libraries:
            if importlib.util.find_spec(NEEDS[library]) is None:
                print(f"{library} is not installed")
                continue
            if options.quantization not in (None, *QUANTIZED.get(library, ())):
                print(f"{library} is not measured in {options.quantization}")
                continue
            for backend in options.backends if library in ON_KERAS else [None]:
                lines.append(run(library, backend, folder, options))
                print(json.dumps(lines[-1]), flush=True)
    print()
    print_table(lines)


if __name__ == "__main__":
    main()
