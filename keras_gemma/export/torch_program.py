"""Export to PyTorch: `program.pt2`, written by `torch.export` and read by `torch.export.load`.

    program = torch.export.load("program.pt2").module()
    logits, cache = program(token_ids, start, last, cache)

The same program runs prefill and decode steps, so the weights are stored once, in their dtype. It
updates the cache in place. `forward.py` describes what it computes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.export.folder import write_metadata
from keras_gemma.export.forward import forward, named_arrays
from keras_gemma.export.subprocess_export import check, make

PROGRAM = "program.pt2"

EXAMPLE_BATCH, EXAMPLE_TOKENS, EXAMPLE_LENGTH = 2, 5, 16
"""Sizes of the inputs for tracing; the graph is valid for others. A size of 1 would be constant."""


def write(lm: Any, directory: Path) -> None:
    """Writes the export, in a subprocess if the backend is not PyTorch."""
    check(lm, "torch")
    make(build, lm, directory, "torch")


def build(lm: Any, directory: Path, report: Callable[[str], None]) -> None:
    """Writes the export, on the PyTorch backend."""
    import torch

    report("Tracing")
    program = trace(lm.backbone)
    report("Writing")
    torch.export.save(program, directory / PROGRAM)
    device = lm.backbone.layer_norm.tensor.device.type
    write_metadata(lm, directory, lm.backbone.compute_dtype, program=PROGRAM, device=device)


def trace(backbone: Any, use_float32: bool = False) -> Any:
    """Returns the `ExportedProgram` of `forward`, with free batch, tokens and length.

    The weights are not copied. `use_float32` computes in float32 for any dtype of the weights.
    """
    import torch
    from torch.export import Dim

    config = backbone.config
    arrays = named_arrays(backbone)

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, array in arrays.items():
                self.register_buffer(name.replace(".", "_"), array.detach())

        def forward(self, token_ids: Any, start: Any, last: Any, cache: list[Any]) -> Any:
            buffers = {name: getattr(self, name.replace(".", "_")) for name in arrays}
            if use_float32:
                buffers = {name: buffer.float() for name, buffer in buffers.items()}
            return forward(buffers, config, token_ids, start, last, cache)

    dtype = "float32" if use_float32 else backbone.compute_dtype
    batch, tokens, length = Dim("batch", min=1), Dim("tokens", min=1), Dim("length", min=1)
    cache_shapes = [{0: batch, 1: length}] * (2 * config.num_layers)
    with torch.no_grad():
        return torch.export.export(
            Forward().eval(),
            example_inputs(backbone, dtype),
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch}, {0: batch}, cache_shapes),
        )


def example_inputs(backbone: Any, dtype: str) -> tuple[Any, ...]:
    """Returns example inputs of `forward` for tracing, with the cache in `dtype`."""
    import torch

    config, device = backbone.config, backbone.layer_norm.tensor.device
    cache_shape = (EXAMPLE_BATCH, EXAMPLE_LENGTH, config.num_key_value_heads, config.head_dim)

    def zeros(*shape: int, dtype: str = "int32") -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    cache = [zeros(*cache_shape, dtype=dtype) for _ in range(2 * config.num_layers)]
    return zeros(EXAMPLE_BATCH, EXAMPLE_TOKENS), zeros(EXAMPLE_BATCH), zeros(EXAMPLE_BATCH), cache
