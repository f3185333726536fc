"""Export to ONNX: `model.onnx`, with weights in `model.onnx.data`, for onnxruntime.

PyTorch's exporter writes it, in a subprocess if the backend is not PyTorch. The graph computes in
float32, because runtimes lack most bfloat16 operations on CPU. Weights of a bfloat16 model are
stored as bfloat16. The same graph runs prefill and decode steps, so the weights are stored once.

    token_ids, start, last, key_0, value_0, key_1, ... -> logits, new_key_0, new_value_0, ...

`forward.py` describes what it computes.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.export.folder import write_metadata
from keras_gemma.export.subprocess_export import check, make
from keras_gemma.export.torch_program import example_inputs, trace

MODEL = "model.onnx"


def write(lm: Any, directory: Path) -> None:
    """Writes the export, in a subprocess if the backend is not PyTorch."""
    check(lm, "onnx")
    quantization = lm.backbone.quantization
    if quantization is not None:
        raise ValueError(
            "format='onnx' needs a floating-point model: export it unquantized, and quantize "
            "the file with `onnxruntime.quantization`. 'tf_saved_model', 'torch' and 'jax' support "
            f"quantized models. Received: a model in {quantization.mode}"
        )
    make(build, lm, directory, "torch")


def build(lm: Any, directory: Path, report: Callable[[str], None]) -> None:
    """Writes the export, on the PyTorch backend."""
    import torch

    layers = range(lm.backbone.config.num_layers)
    cache_names = [f"{part}_{layer}" for layer in layers for part in ("key", "value")]
    report("Tracing")
    with warnings.catch_warnings():
        # PyTorch's exporter calls a deprecated function of PyTorch.
        warnings.filterwarnings("ignore", "`isinstance.treespec, LeafSpec.", FutureWarning)
        program = torch.onnx.export(
            trace(lm.backbone, use_float32=True),
            example_inputs(lm.backbone, "float32"),
            dynamo=True,
            input_names=["token_ids", "start", "last", *cache_names],
            output_names=["logits", *(f"new_{name}" for name in cache_names)],
            verbose=False,
        )
    report("Writing")
    program.save(directory / MODEL, external_data=True)
    write_metadata(lm, directory, "float32", program=MODEL)
