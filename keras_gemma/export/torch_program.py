"""Export to PyTorch: `program.pt2`, written by `torch.export` and read by `torch.export.load`.

    program = torch.export.load("program.pt2").module()
    logits, cache = program(token_ids, start, last, cache)

The same program runs prefill and decode steps, so the weights are stored once. It updates the
cache in place. `forward.py` describes what it computes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from keras_gemma.export import program_folder
from keras_gemma.export.subprocess_export import check, make

PROGRAM = "program.pt2"


def write(lm: Any, directory: Path) -> None:
    """Writes the export, in a subprocess if the backend is not PyTorch.

    Weights keep their dtype, including int8 and int4.

    Args:
        lm: A `GemmaCausalLM`.
        directory: The empty folder.

    Raises:
        ValueError: If the model has no preprocessor.
        ImportError: If PyTorch is not installed.
        OSError: If the disk is too small.
        RuntimeError: If the subprocess failed.
    """
    check(lm, "torch", ("torch",), "torch")
    make(build, lm, directory, "torch")


def build(lm: Any, directory: Path, report: Callable[[str], None]) -> None:
    """Writes the export, on the PyTorch backend."""
    import torch

    from keras_gemma.export.torch_tracing import trace

    report("Tracing")
    program = trace(lm.backbone)
    report("Writing")
    torch.export.save(program, directory / PROGRAM)
    dtype = keras.backend.standardize_dtype(lm.backbone.compute_dtype)
    device = lm.backbone.layer_norm.tensor.device.type
    program_folder.describe(lm, directory, dtype, program=PROGRAM, device=device)
