"""The same greedy generation by this package, KerasHub, transformers and llama.cpp, in one run.

    python examples/benchmarks/compare.py --backends jax torch tensorflow
    python examples/benchmarks/compare.py --tiny --libraries keras_gemma transformers

Random weights in the sizes of a preset, cut to a few layers, are written to a folder once and read
by all. Every line is a process of its own, one after the other. The third call counts, or with
`--calls`, where others use the machine too, the fastest from the third on:

    tokens/s     all rows' new tokens over that call, prompt included
    loading,     peaks over the process's size before the model was loaded, in multiples of the
    generating   weights (Linux)
    same ids     how many of the first row's new tokens are those of the first line; in 16 bits
                 random weights soon lead apart
    x BACKEND    this package's speed on that backend over the line's
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

NEEDS = {
    "keras_gemma": "keras_gemma",
    "keras_hub": "keras_hub",
    "transformers": "transformers",
    "transformers_compiled": "transformers",
    "llama_cpp": "llama_cpp",
}
"""Each library, and the module that must be installed."""
ON_KERAS = ("keras_gemma", "keras_hub")
KERAS, HUGGING_FACE, GGUF = "keras", "hugging_face", "model.gguf"

Generate = Callable[[list[list[int]], int], list[int]]
"""Prompts and the number of new tokens -> the first row's new ids."""


def memory(what: str) -> float:
    """Bytes of this process (Linux): `"VmRSS"` now, `"VmHWM"` at most since `forget_peak`."""
    path = Path("/proc/self/status")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    return float("nan")


def forget_peak() -> None:
    path = Path("/proc/self/clear_refs")
    if path.exists():
        path.write_text("5")


def write_checkpoints(folder: Path, options: argparse.Namespace) -> None:
    """The formats that the libraries read, those that are not in `folder` yet, and `sizes.json`.

    Raises:
        ValueError: the folder holds other weights.
    """
    from keras_gemma import GemmaCausalLMPreprocessor
    from keras_gemma.benchmark.random_model import random_model
    from keras_gemma.catalogue import presets

    config = dataclasses.replace(presets()[options.shape].config, num_layers=options.layers)
    sizes = {
        "config": config.to_dict(),
        "dtype": options.dtype,
        "weight_bytes": config.weight_bytes(options.dtype),
    }
    described = folder / "sizes.json"
    if described.exists() and json.loads(described.read_text()) != sizes:
        raise ValueError(f"{folder} holds other weights: name another --folder, or delete it")
    # Nobody reads a text here, but llama.cpp wants a vocabulary.
    preprocessor = GemmaCausalLMPreprocessor.from_preset("gemma_tiny_en")
    lm = random_model(config, options.dtype, preprocessor)
    names = " ".join(options.libraries)
    if "keras_" in names and not (folder / KERAS).exists():
        lm.save_to_preset(folder / KERAS)
    if "transformers" in names and not (folder / HUGGING_FACE).exists():
        lm.save_to_hugging_face(folder / HUGGING_FACE)
    if "llama_cpp" in names and not (folder / GGUF).exists():
        lm.save_to_gguf(folder / GGUF, dtype="bf16")
    described.write_text(json.dumps(sizes))


def load_keras_gemma(folder: Path, options: argparse.Namespace) -> Generate:
    from keras_gemma import GemmaCausalLM

    lm = GemmaCausalLM.from_preset(folder / KERAS, dtype=options.dtype, preprocessor=None)

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        return lm.generate(prompts, max_new_tokens=new, stop_token_ids=None)[0][-new:]

    return generate


def load_keras_hub(folder: Path, options: argparse.Namespace) -> Generate:
    import keras_hub

    backbone = keras_hub.models.GemmaBackbone.from_preset(str(folder / KERAS), dtype=options.dtype)
    lm = keras_hub.models.GemmaCausalLM(backbone, None)
    lm.compile(sampler="greedy")

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        ids = np.pad(np.array(prompts, "int32"), ((0, 0), (0, new)))
        mask = np.zeros_like(ids)
        mask[:, :-new] = 1
        inputs = {"token_ids": ids, "padding_mask": mask}
        return np.array(lm.generate(inputs, stop_token_ids=None)["token_ids"])[0, -new:].tolist()

    return generate


def load_transformers(
    folder: Path, options: argparse.Namespace, compiled: bool = False
) -> Generate:
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

    return generate


def check_compiled(cache: Any) -> None:
    """Raise a RuntimeError where transformers did not do what it was asked to."""
    import torch._dynamo
    from transformers import StaticCache

    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if not graphs or not isinstance(cache, StaticCache):
        raise RuntimeError(f"{graphs} compiled graphs and a {type(cache).__name__}")


def load_llama_cpp(folder: Path, options: argparse.Namespace) -> Generate:
    import llama_cpp

    if options.batch > 1:
        raise NotImplementedError("llama-cpp-python's generate takes one prompt at a time")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    model = llama_cpp.Llama(
        str(folder / GGUF),
        n_ctx=options.prompt + options.new,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )

    def generate(prompts: list[list[int]], new: int) -> list[int]:
        model.reset()  # or it would keep what it knows of the same prompt
        tokens = model.generate(prompts[0], temp=0.0)
        return [token for _, token in zip(range(new), tokens, strict=False)]

    return generate


def load(library: str, folder: Path, options: argparse.Namespace) -> Generate:
    loaders = {
        "keras_gemma": load_keras_gemma,
        "keras_hub": load_keras_hub,
        "transformers": load_transformers,
        "transformers_compiled": lambda *args: load_transformers(*args, compiled=True),
        "llama_cpp": load_llama_cpp,
    }
    return loaders[library](folder, options)


def measure(library: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One process's figures."""
    importlib.import_module(NEEDS[library])
    before = memory("VmRSS")
    forget_peak()
    start = time.perf_counter()
    generate = load(library, folder, options)
    load_seconds, load_peak = time.perf_counter() - start, memory("VmHWM") - before
    forget_peak()
    sizes = json.loads((folder / "sizes.json").read_text())
    weights, vocabulary = sizes["weight_bytes"], sizes["config"]["vocabulary_size"]
    prompts = np.random.default_rng(0).integers(200, vocabulary, (options.batch, options.prompt))
    seconds = []
    for _ in range(options.calls):
        start = time.perf_counter()
        ids = generate(prompts.tolist(), options.new)
        seconds.append(time.perf_counter() - start)
    generate_peak = memory("VmHWM") - before
    bandwidth = None
    if library == "keras_gemma":
        from keras_gemma.backend import memory_bandwidth

        bandwidth = memory_bandwidth() / 1e9
    return {
        "tokens_per_second": round(options.batch * options.new / min(seconds[2:]), 2),
        "load_seconds": round(load_seconds, 2),
        "first_call_seconds": round(seconds[0], 2),
        "peak_loading_over_weights": round(load_peak / weights, 2),
        "peak_generating_over_weights": round(generate_peak / weights, 2),
        "bandwidth_gb_per_second": bandwidth,
        "ids": ids,
    }


def command_of(work: str, folder: Path) -> list[str]:
    return [sys.executable, __file__, *sys.argv[1:], "--one", work, "--folder", str(folder)]


def run(library: str, backend: str | None, folder: Path, options: argparse.Namespace) -> dict:
    """`measure` in a process of its own; `"error"` instead of figures where it failed."""
    line = {"library": library, "backend": backend}
    command = command_of(library, folder)
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "TOKENIZERS_PARALLELISM": "false"}
    if backend:
        environment["KERAS_BACKEND"] = backend
    try:
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=options.limit
        )
    except subprocess.TimeoutExpired:
        return {**line, "error": f"no answer in {options.limit} s"}
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        return {**line, "error": last}
    return {**line, **json.loads(result.stdout.strip().splitlines()[-1])}


def print_table(lines: list[dict[str, Any]]) -> None:
    """Every line, and this package's speed over it."""
    ours = {
        line["backend"]: line["tokens_per_second"]
        for line in lines
        if line["library"] == "keras_gemma" and "error" not in line
    }
    bandwidths = [line["bandwidth_gb_per_second"] for line in lines if "error" not in line]
    fastest = max((rate for rate in bandwidths if rate), default=None)
    if fastest:
        print(f"memory bandwidth {fastest:.1f} GB/s\n")
    columns = ["", "tokens/s", "first call", "load", "loading", "generating", "same ids"]
    columns += [f"x {backend}" for backend in ours]
    print(f"{columns[0]:<26}", *(f"{column:>12}" for column in columns[1:]))
    first = next((line["ids"] for line in lines if "error" not in line), [])
    for line in lines:
        name = " ".join(filter(None, (line["library"], line["backend"])))
        if "error" in line:
            print(f"{name:<26}   {line['error']}")
            continue
        same = [a == b for a, b in zip(first, line["ids"], strict=True)]
        cells = [
            f"{line['tokens_per_second']:.2f}",
            f"{line['first_call_seconds']:.1f} s",
            f"{line['load_seconds']:.1f} s",
            f"{line['peak_loading_over_weights']:.2f}",
            f"{line['peak_generating_over_weights']:.2f}",
            f"{(*same, False).index(False)} of {len(same)}",
            *(f"{speed / line['tokens_per_second']:.2f}" for speed in ours.values()),
        ]
        print(f"{name:<26}", *(f"{cell:>12}" for cell in cells))
    print()


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="gemma2_2b_en")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tiny", action="store_true", help="the shape of gemma_tiny_en")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--libraries", nargs="+", default=list(NEEDS), choices=list(NEEDS))
    parser.add_argument("--backends", nargs="+", default=["jax", "torch", "tensorflow"])
    parser.add_argument("--folder", type=Path, help="for the weights; kept. Else a temporary one")
    parser.add_argument("--limit", type=int, default=600, help="seconds of a line")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.calls < 3:
        parser.error(f"--calls must be at least 3. Received: {options.calls}")
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
        subprocess.run(command_of("checkpoints", folder), check=True)
        lines = []
        for library in options.libraries:
            if importlib.util.find_spec(NEEDS[library]) is None:
                print(f"{library} is not installed")
                continue
            for backend in options.backends if library in ON_KERAS else [None]:
                lines.append(run(library, backend, folder, options))
                print(json.dumps(lines[-1]), flush=True)
    print()
    print_table(lines)


if __name__ == "__main__":
    main()
