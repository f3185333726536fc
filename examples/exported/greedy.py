"""The loop around an exported program: text to ids, greedy choice, ids to text.

Shared by run_torch.py, run_jax.py and run_onnx.py, which know how their runtime loads a program.
Needs numpy and sentencepiece; neither Keras nor keras_gemma.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece


def rounded(length: int) -> int:
    """The next power of two, 16 at least: runtimes that compile for each size compile for few."""
    return max(16, 1 << (length - 1).bit_length())


def complete(
    folder: Path, prompts: list[str], max_new_tokens: int, load: Callable[..., Any]
) -> list[str]:
    """Each prompt and its greedy continuation.

    Args:
        folder: of the export.
        prompts: of any lengths.
        max_new_tokens: the most tokens that are added.
        load: `(folder, metadata)` -> `read` and `zeros`: `read(token_ids [B, T], start [B],
            last [B], cache)` gives logits `[B, V]` and the cache, `zeros(shape, dtype)` an array.
    """
    about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / about["vocabulary"]))
    begin = [] if about["start_token_id"] is None else [about["start_token_id"]]
    texts = [begin + pieces.encode(prompt) for prompt in prompts]
    lengths = np.array([len(text) for text in texts], "int32")
    longest = int(lengths.max()) + max_new_tokens
    if longest > about["context_length"]:
        raise ValueError(f"{longest} tokens do not fit a context of {about['context_length']}.")
    read, zeros = load(folder, about)

    dtype, (_, _, *heads) = about["inputs"]["cache"]
    shape = (len(texts), rounded(longest), *heads)
    cache = [zeros(shape, dtype) for _ in range(about["cache_arrays"])]
    token_ids = np.full((len(texts), rounded(int(lengths.max()))), about["pad_token_id"], "int32")
    for row, text in zip(token_ids, texts, strict=True):
        row[: len(text)] = text

    none = np.zeros_like(lengths)
    logits, cache = read(token_ids, none, lengths - 1, cache)
    done = np.zeros(len(texts), "bool")
    for i in range(max_new_tokens):
        chosen = np.argmax(logits, axis=-1).astype("int32")
        done |= np.isin(chosen, about["stop_token_ids"])
        for text, token, over in zip(texts, chosen.tolist(), done, strict=True):
            if not over:
                text.append(token)
        if done.all() or i + 1 == max_new_tokens:
            break
        logits, cache = read(chosen[:, None], lengths + i, none, cache)
    return [pieces.decode(text) for text in texts]


def main(load: Callable[..., Any]) -> None:
    """The command of a `run_*.py`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    options = parser.parse_args()
    for text in complete(options.folder, options.prompts, options.max_new_tokens, load):
        print(text)
