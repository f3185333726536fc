"""Tracing of a model with `torch.export`: one graph for prefill and decode steps of any size.

Imports PyTorch, and runs only on the PyTorch backend. Knows nothing about files.
"""

from typing import Any

import keras
import torch
from torch.export import Dim, ExportedProgram

from keras_gemma.export.forward import named_arrays, read

EXAMPLE = {"batch": 2, "tokens": 5, "length": 16}
"""Sizes of the inputs for tracing; the graph is valid for others. A size of 1 would be constant."""


class Reading(torch.nn.Module):
    """Module that computes `read` with the weights of a model, without copying them.

    Args:
        backbone: A `GemmaBackbone`.
        widen: If True, computes in float32 for any dtype of the weights.
    """

    def __init__(self, backbone: Any, widen: bool) -> None:
        super().__init__()
        self.config = backbone.config
        self.widen = widen
        self.names = {}
        for name, array in named_arrays(backbone).items():
            self.names[name] = name.replace(".", "_")
            self.register_buffer(self.names[name], array.detach())

    def forward(
        self,
        token_ids: torch.Tensor,
        start: torch.Tensor,
        last: torch.Tensor,
        cache: list[torch.Tensor],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        arrays = {name: getattr(self, buffer) for name, buffer in self.names.items()}
        if self.widen:
            arrays = {name: array.float() for name, array in arrays.items()}
        return read(arrays, self.config, token_ids, start, last, cache)


def inputs(backbone: Any, dtype: str) -> tuple[Any, ...]:
    """Returns example arguments of `read` for tracing, with the cache in `dtype`."""
    config, device = backbone.config, backbone.layer_norm.tensor.device
    batch, tokens, length = EXAMPLE.values()
    shape = (batch, length, config.num_key_value_heads, config.head_dim)

    def zeros(*shape: int, dtype: str = "int32") -> torch.Tensor:
        return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)

    cache = [zeros(*shape, dtype=dtype) for _ in range(2 * config.num_layers)]
    return zeros(batch, tokens), zeros(batch), zeros(batch), cache


def trace(backbone: Any, widen: bool = False) -> ExportedProgram:
    """Returns the traced `read`, with free batch, tokens and length.

    Args:
        backbone: A `GemmaBackbone`.
        widen: Same as in `Reading`.
    """
    dtype = "float32" if widen else keras.backend.standardize_dtype(backbone.compute_dtype)
    batch, tokens, length = Dim("batch", min=1), Dim("tokens", min=1), Dim("length", min=1)
    cache_shapes = [{0: batch, 1: length}] * (2 * backbone.config.num_layers)
    with torch.no_grad():
        return torch.export.export(
            Reading(backbone, widen).eval(),
            inputs(backbone, dtype),
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch}, {0: batch}, cache_shapes),
        )
