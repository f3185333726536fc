"""Speed of benchmarks with this package, lm-eval's model for transformers, and llama.cpp.

    python examples/benchmarks/evaluation.py --data benchmarks --tasks hellaswag:200 arc_easy:500
    python examples/benchmarks/evaluation.py --data benchmarks --precision int8 \\
        --libraries keras_gemma llama_cpp

All libraries answer the same requests of lm-eval, with the weights of the same GGUF file, in
bfloat16, float32 or 8 bits (Q8_0 in llama.cpp). Each library runs in its own process, after a
warm-up of `WARM_UP` items per task:

    items/s    of the whole task, with prompts and metrics
    x          speed relative to the first line of the table
    score      by the metric of the model cards
    nats       largest difference of a request's log-probability per character of its
               continuation, from the first line
    greedy     number of requests that differ from the first line in whether greedy search
               writes the continuation
    peak       peak memory of the process after loading
"""

import argparse
import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from child import gguf_path, memory, reset_peak, run_command

WARM_UP = 2
"""Items per task before the measurement, for which programs are compiled."""

LIBRARIES = ["transformers", "keras_gemma", "llama_cpp"]


def load_keras_gemma(options: argparse.Namespace) -> Any:
    from keras_gemma import GemmaCausalLM

    if options.precision == "int8":
        return GemmaCausalLM.from_preset(options.model, dtype="bfloat16", quantization="int8")
    return GemmaCausalLM.from_preset(options.model, dtype=options.precision)


def load_transformers(options: argparse.Namespace) -> Any:
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = gguf_path(options)
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=options.precision)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=options.batch_size,
        device="cpu",
        add_bos_token=True,
    )


def load_llama_cpp(options: argparse.Namespace) -> Any:
    """Returns an LM of lm-eval that reads a context once for its choices, many in a batch."""
    import llama_cpp
    from lm_eval.api.model import TemplateLM

    from keras_gemma import GemmaTokenizer

    class LlamaCpp(TemplateLM):
        tokenizer_of_preset = GemmaTokenizer.from_preset(options.model)
        eot_token_id = tokenizer_of_preset.end_token_id
        prefix_token_id = tokenizer_of_preset.start_token_id
        batch_tokens, sequences = 4096, 64

        def __init__(self) -> None:
            super().__init__()
            model = llama_cpp.llama_model_load_from_file(
                str(options.q8_0 or gguf_path(options)).encode(),
                llama_cpp.llama_model_default_params(),
            )
            settings = llama_cpp.llama_context_default_params()
            settings.n_ctx = settings.n_batch = self.batch_tokens
            settings.n_ubatch, settings.n_seq_max, settings.kv_unified = 512, self.sequences, True
            settings.n_threads = settings.n_threads_batch = 2
            self.context = llama_cpp.llama_init_from_model(model, settings)
            self.batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, self.sequences)
            vocabulary = llama_cpp.llama_model_get_vocab(model)
            self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

        def tok_encode(self, string: str, add_special_tokens: Any = None, **_: Any) -> list[int]:
            start = [] if add_special_tokens is False else [self.prefix_token_id]
            return start + self.tokenizer_of_preset.encode([string], parse_special=False)[0]

        def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[Any]:
            items: dict[tuple[int, ...], list[int]] = {}
            for i, (_, context, _) in enumerate(requests):
                items.setdefault(tuple(context), []).append(i)
            answers: list[Any] = [None] * len(requests)
            for group in self._batches(list(items.items()), requests):
                self._read(group, requests, answers)
            return answers

        def _batches(self, items: list[Any], requests: list[Any]) -> Iterator[list[Any]]:
            group: list[Any] = []
            tokens = sequences = 0
            for context, own in items:
                size = len(context) + sum(len(requests[i][2]) - 1 for i in own)
                full = tokens + size > self.batch_tokens or sequences + len(own) > self.sequences
                if group and full:
                    yield group
                    group, tokens, sequences = [], 0, 0
                group.append((context, own))
                tokens, sequences = tokens + size, sequences + len(own)
            if group:
                yield group

        def _add(self, token: int, position: int, sequences: list[int], scored: bool) -> int:
            batch, i = self.batch, self.batch.n_tokens
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, scored
            batch.n_seq_id[i] = len(sequences)
            for place, sequence in enumerate(sequences):
                batch.seq_id[i][place] = sequence
            batch.n_tokens += 1
            return i

        def _read(self, group: list[Any], requests: list[Any], answers: list[Any]) -> None:
            memory_of_context = llama_cpp.llama_get_memory(self.context)
            llama_cpp.llama_memory_clear(memory_of_context, True)
            self.batch.n_tokens = first = 0
            places = {}
            for context, own in group:
                sequences = list(range(first, first + len(own)))
                first += len(own)
                for position, token in enumerate(context):
                    last = position == len(context) - 1
                    place = self._add(token, position, sequences, last)
                for sequence, i in zip(sequences, own, strict=True):
                    places[i] = [place]
                    for offset, token in enumerate(requests[i][2][:-1]):
                        added = self._add(token, len(context) + offset, [sequence], True)
                        places[i].append(added)
            if llama_cpp.llama_decode(self.context, self.batch) != 0:
                raise RuntimeError("llama.cpp could not read a batch")
            for i, own_places in places.items():
                continuation, total, greedy = requests[i][2], 0.0, True
                for place, token in zip(own_places, continuation, strict=True):
                    pointer = llama_cpp.llama_get_logits_ith(self.context, place)
                    address = ctypes.cast(
                        pointer, ctypes.POINTER(ctypes.c_float * self.vocabulary_size)
                    )
                    logits = np.frombuffer(address.contents, "float32")
                    largest = logits.max()
                    total += logits[token] - largest - np.log(np.exp(logits - largest).sum())
                    greedy &= bool(logits[token] >= largest)
                answers[i] = float(total), greedy

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

    return LlamaCpp()


LOADERS = {
    "keras_gemma": load_keras_gemma,
    "transformers": load_transformers,
    "llama_cpp": load_llama_cpp,
}


def measure(library: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the results of a library, by task, and its peak memory, in this process."""
    from keras_gemma.evaluation import evaluate

    model = LOADERS[library](options)
    names = [task.partition(":")[0] for task in options.tasks]
    evaluate(model, names, data=options.data, samples=WARM_UP)
    reset_peak()
    tasks = {}
    with tempfile.TemporaryDirectory() as folder:
        results = evaluate(
            model, options.tasks, data=options.data, output=Path(folder), name=library
        )
        for name, result in results.items():
            answers = [
                [float(log_probability), greedy == "True", len(arguments["arg_1"])]
                for path in sorted(Path(folder, name).glob("samples_*.jsonl"))
                for line in path.read_text(encoding="utf-8").split("\n")
                if line
                for entry in [json.loads(line)]
                for ((log_probability, greedy),), arguments in zip(
                    entry["resps"], entry["arguments"].values(), strict=True
                )
            ]
            tasks[name] = {
                "items": result.items,
                "seconds": result.seconds,
                "score": result.score,
                "answers": answers,
            }
    return {"tasks": tasks, "peak": memory("VmHWM")}


def save_q8_0(options: argparse.Namespace, folder: str) -> Path:
    """Writes the model as a GGUF file in Q8_0."""
    from keras_gemma import GemmaCausalLM

    path = Path(folder, "q8_0.gguf")
    lm = GemmaCausalLM.from_preset(options.model, dtype="bfloat16", quantization="int8")
    lm.save_to_gguf(path)
    return path


def print_task(task: str, lines: dict[str, dict[str, Any]]) -> None:
    print(f"\n{task:<24}{'items/s':>9}{'x':>7}{'score':>8}{'nats':>10}{'greedy':>8}{'peak':>9}")
    first: Any = None
    for name, figures in lines.items():
        if "error" in figures:
            print(f"{name:<24}   {figures['error']}")
            continue
        own = figures["tasks"][task]
        first = first or own
        pairs = list(zip(own["answers"], first["answers"], strict=True))
        nats = max(abs(a[0] - b[0]) / a[2] for a, b in pairs)
        greedy = sum(a[1] != b[1] for a, b in pairs)
        speed = own["items"] / own["seconds"]
        ratio = speed * first["seconds"] / first["items"]
        print(
            f"{name:<24}{speed:>9.2f}{ratio:>7.2f}{own['score']:>8.1%}{nats:>10.1e}{greedy:>8}"
            f"{figures['peak'] / 1e9:>6.1f} GB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of local data")
    parser.add_argument("--tasks", nargs="+", default=["hellaswag:200", "arc_easy:500"])
    parser.add_argument("--model", default="gemma3_270m_q4_k_m", help="preset name or GGUF file")
    parser.add_argument("--precision", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=LIBRARIES[:2])
    parser.add_argument("--backends", nargs="+", default=["torch", "jax"])
    parser.add_argument("--batch-size", type=int, default=8, help="of transformers")
    parser.add_argument("--limit", type=float, default=7200, help="seconds per library")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--q8-0", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        arguments = [sys.executable, __file__, *sys.argv[1:]]
        if "llama_cpp" in options.libraries and options.precision == "int8":
            arguments += ["--q8-0", str(save_q8_0(options, folder))]
        lines = {}
        for library in options.libraries:
            for backend in options.backends if library == "keras_gemma" else [None]:
                name = " ".join(filter(None, (library, backend)))
                lines[name] = run_command([*arguments, "--one", library], backend, options.limit)
    for task in options.tasks:
        print_task(task.partition(":")[0], lines)


if __name__ == "__main__":
    main()
