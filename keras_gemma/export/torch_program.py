"""PyTorch's format: `program.pt2`, made by `torch.export`, run by `torch.export.load`.

    program = torch.export.load("program.pt2").module()
    logits, cache = program(token_ids, start, last, cache)

One program reads prompts and steps, so the weights are there once. It writes into the cache that
it is given. `reading.py` says what it computes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_gemma.export import program_folder
from keras_gemma.export.subprocess_export import check, make

PROGRAM = "program.pt2"


def write(lm: Any, directory: Path) -> None:
    """Fill `directory`; on another backend than PyTorch by a process that runs on it.

    Weights keep their dtype, those in 8 and 4 bits too.

    Raises:
        ValueError: no preprocessor.
        ImportError: PyTorch is not installed.
        OSError: no room on the disk.
        RuntimeError: the other process failed.
    """
    check(lm, "torch", ("torch",), "torch")
    make(build, lm, directory, "torch")


def build(lm: Any, directory: Path, say: Callable[[str], None]) -> None:
    """The same on PyTorch."""
    import torch

    from keras_gemma.export.torch_tracing import trace

    say("Tracing")
    program = trace(lm.backbone)
    say("Writing")
    torch.export.save(program, directory / PROGRAM)
    dtype = keras.backend.standardize_dtype(lm.backbone.compute_dtype)
    device = lm.backbone.layer_norm.tensor.device.type
    program_folder.describe(lm, directory, dtype, program=PROGRAM, device=device)
