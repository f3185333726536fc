"""ONNX: `model.onnx`, its weights in `model.onnx.data`, run by onnxruntime.

PyTorch's exporter makes it, so other backends leave it to a process that runs on PyTorch. The
graph computes in float32, for runtimes lack most of bfloat16 on CPU; weights stay bfloat16 in the
file where the model has them so. One graph reads prompts and steps, so they are there once.

    token_ids, start, last, key_0, value_0, key_1, ... -> logits, new_key_0, new_value_0, ...

`reading.py` says what it computes.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.export import program_folder
from keras_gemma.export.subprocess_export import check, make

MODEL = "model.onnx"


def write(lm: Any, directory: Path) -> None:
    """Fill `directory`.

    Raises:
        ValueError: no preprocessor, or a model in 8 or 4 bits.
        ImportError: packages are not installed.
        OSError: no room on the disk.
        RuntimeError: the other process failed.
    """
    packages = ("torch", "onnx", "onnxscript")
    check(lm, "onnx", packages, "torch,onnx")
    quantization = lm.backbone.quantization
    if quantization is not None:
        raise ValueError(
            "format='onnx' takes a model in floating point: export that one, and quantize the file "
            "with `onnxruntime.quantization`. 'tf_saved_model', 'torch' and 'jax' keep the bits. "
            f"Received: a model in {quantization.mode}"
        )
    make(build, lm, directory, "torch")


def build(lm: Any, directory: Path, say: Callable[[str], None]) -> None:
    """The same on PyTorch."""
    import torch

    from keras_gemma.export.torch_tracing import inputs, trace

    layers = range(lm.backbone.config.num_layers)
    kept = [f"{part}_{layer}" for layer in layers for part in ("key", "value")]
    say("Tracing")
    with warnings.catch_warnings():
        # PyTorch's exporter calls what PyTorch itself has deprecated.
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.", FutureWarning)
        program = torch.onnx.export(
            trace(lm.backbone, widen=True),
            inputs(lm.backbone, "float32"),
            dynamo=True,
            input_names=["token_ids", "start", "last", *kept],
            output_names=["logits", *(f"new_{name}" for name in kept)],
            verbose=False,
        )
    say("Writing")
    program.save(directory / MODEL, external_data=True)
    program_folder.describe(lm, directory, "float32", program=MODEL)
