"""Perplexity of a text with this package, transformers and llama.cpp, on the same GGUF file.

    python examples/benchmarks/perplexity.py test.txt --backends jax torch tensorflow
    python examples/benchmarks/perplexity.py test.txt --windows 16 --precisions bfloat16 as_stored

The text is cut into windows that do not overlap. Each begins with `<bos>`, which is not counted.
All libraries score the same tokens, which should not include the end of the text (`--windows`),
because `int4_calibrated` is calibrated with it. Each line is measured in its own process:

    perplexity   e to the mean loss of a token
    of the first perplexity, relative to the first line
    weights      bytes of the weights, as stored in memory; for llama.cpp, of the file
    tokens/s     speed of scoring, after one window that is not counted
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from child import gguf_path, run_command

FLOATS = ("float32", "bfloat16")
CALIBRATED = "int4_calibrated"
"""int4 with zero points, calibrated with the end of the text."""
PRECISIONS = ["bfloat16", "int8", "int4", CALIBRATED, "as_stored"]
CALIBRATION_CHARACTERS = 40_000
HEAD_ROWS = 256
"""Number of tokens whose logits are computed together: 0.3 GB for a vocabulary of 262,144."""


class Scorer(NamedTuple):
    """A loaded model."""

    losses: Callable[[np.ndarray], np.ndarray]
    """Function from the ids of a window, `[T]`, to the losses of all but the first, `[T - 1]`."""
    weight_bytes: int


def read_windows(options: argparse.Namespace) -> np.ndarray:
    """Returns the tokens of all whole windows, int32 `[W, T]`."""
    from keras_gemma import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset(options.model)
    ids = tokenizer.encode([options.text.read_text(encoding="utf-8")])[0]
    length = options.window - 1
    rows = np.array(ids[: len(ids) // length * length], "int32").reshape(-1, length)
    rows = np.pad(rows, ((0, 0), (1, 0)), constant_values=tokenizer.start_token_id)
    return rows[: options.windows]


def load_keras_gemma(precision: str, options: argparse.Namespace) -> Scorer:
    from keras_gemma import GemmaCausalLM

    arguments = {"dtype": "bfloat16", "quantization": precision}
    if precision in FLOATS:
        arguments = {"dtype": precision}
    elif precision == CALIBRATED:
        arguments = {"dtype": "bfloat16"}
    lm = GemmaCausalLM.from_preset(options.model, **arguments)
    if precision == CALIBRATED:
        end = options.text.read_text(encoding="utf-8")[-CALIBRATION_CHARACTERS:]
        samples = [end[i : i + 4000] for i in range(0, len(end), 4000)]
        lm.quantize("int4", zero_points=True, calibration=samples)

    def losses(ids: np.ndarray) -> np.ndarray:
        targets = np.roll(ids, -1)[None]
        values = lm.score(ids[None], scoring_mode="loss", target_ids=targets)
        return np.array(values)[0, :-1]

    sizes = (np.prod(weight.shape) * np.dtype(weight.dtype).itemsize for weight in lm.weights)
    return Scorer(losses, int(sum(sizes)))


def load_transformers(precision: str, options: argparse.Namespace) -> Scorer:
    import torch
    from transformers import AutoModelForCausalLM

    path = gguf_path(options)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=precision)

    @torch.no_grad()
    def losses(ids: np.ndarray) -> np.ndarray:
        tokens = torch.tensor(ids, dtype=torch.int64)
        hidden = model.model(tokens[None]).last_hidden_state[0]
        parts = [
            torch.nn.functional.cross_entropy(
                model.lm_head(hidden[start:-1][:HEAD_ROWS]).float(),
                tokens[start + 1 :][:HEAD_ROWS],
                reduction="none",
            )
            for start in range(0, len(ids) - 1, HEAD_ROWS)
        ]
        return torch.cat(parts).numpy()

    return Scorer(losses, sum(weight.nbytes for weight in model.parameters()))


def load_llama_cpp(precision: str, options: argparse.Namespace) -> Scorer:
    import llama_cpp

    path = gguf_path(options)
    model = llama_cpp.Llama(str(path), n_ctx=options.window, logits_all=True, verbose=False)

    def losses(ids: np.ndarray) -> np.ndarray:
        model.reset()
        model.eval(ids.tolist())
        logits = model.scores[: len(ids) - 1]
        largest = logits.max(-1)
        totals = [np.exp(row - top).sum() for row, top in zip(logits, largest, strict=True)]
        return largest + np.log(totals) - logits[np.arange(len(ids) - 1), ids[1:]]

    return Scorer(losses, path.stat().st_size)


LOADERS = {
    "keras_gemma": load_keras_gemma,
    "transformers": load_transformers,
    "llama_cpp": load_llama_cpp,
}


def measure(library: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of a line, measured in this process."""
    windows = read_windows(options)
    scorer = LOADERS[library](precision, options)
    scorer.losses(windows[0])
    start = time.perf_counter()
    losses = np.array([scorer.losses(ids) for ids in windows])
    seconds = time.perf_counter() - start
    return {
        "perplexity": float(np.exp(losses.mean(dtype="float64"))),
        "tokens": losses.size,
        "weight_bytes": scorer.weight_bytes,
        "tokens_per_second": losses.size / seconds,
    }


def make_lines(options: argparse.Namespace) -> list[tuple[str, str, str | None]]:
    """Returns library, precision and backend of each line."""
    lines: list[tuple[str, str, str | None]] = []
    for library in options.libraries:
        if library == "keras_gemma":
            lines += [
                (library, precision, backend)
                for backend in options.backends
                for precision in options.precisions
            ]
        elif library == "transformers":
            lines += [(library, name, None) for name in options.precisions if name in FLOATS]
        else:
            lines.append((library, "as stored", None))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("text", type=Path)
    parser.add_argument("--model", default="gemma3_270m_q4_k_m", help="preset name or GGUF file")
    parser.add_argument("--window", type=int, default=2048, help="tokens per window")
    parser.add_argument("--windows", type=int, help="number of windows, default: all")
    parser.add_argument("--libraries", nargs="+", choices=LOADERS, default=list(LOADERS))
    parser.add_argument("--backends", nargs="+", default=["jax"])
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--limit", type=float, default=7200, help="seconds per line")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    first = None
    print(f"{'':<34}{'perplexity':>12}{'of the first':>14}{'weights':>10}{'tokens/s':>10}")
    for library, precision, backend in make_lines(options):
        command = [sys.executable, __file__, *sys.argv[1:], "--one", library, precision]
        figures = run_command(command, backend, options.limit)
        name = " ".join(filter(None, (library, backend, precision)))
        if "error" in figures:
            print(f"{name:<34}   {figures['error']}")
            continue
        first = first or figures["perplexity"]
        change = figures["perplexity"] / first - 1
        print(
            f"{name:<34}{figures['perplexity']:>12.4f}{change:>+13.2%} "
            f"{figures['weight_bytes'] / 1e9:>7.3f} GB{figures['tokens_per_second']:>10.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
