"""Layouts of matrices on several devices, for `keras.distribution.ModelParallel`.

A `LayoutMap` has KerasHub's axes, so that published ones apply here. The matrices of this package
are `[out, in]`, and the axis of heads is a part of one of these:

    token_embedding            [V, D]       (v, d)    -> (v, d)
    query, key, value          [N, D, H]    (n, d, h) -> (n or h, d)
    attention_output           [N, H, D]    (n, h, d) -> (d, n or h)
    ffw_gating, ffw_gating_2   [D, F]       (d, f)    -> (f, d)
    ffw_linear                 [F, D]       (f, d)    -> (d, f)

Keras distributes variables on JAX.
"""

from collections.abc import Sequence
from typing import Any

import keras


def fold_axes(name: str, axes: Sequence[str | None], rank: int) -> tuple[str | None, ...]:
    """Returns the mesh axes of a stored matrix from those of KerasHub's matrix.

    `name` is the layer's name. A matrix of rank 3 is stored in blocks `[blocks, out, in / blocks]`.
    """
    axes = tuple(axes)
    if len(axes) == 3:
        if name == "attention_output":
            out, length = axes[2], axes[0] or axes[1]
        else:
            out, length = axes[0] or axes[2], axes[1]
    elif name.startswith("ffw_"):
        length, out = axes
    else:
        out, length = axes
    return (None,) * (rank - 2) + (out, length)


def gemma_layout_map(device_mesh: Any, model_axis: str, data_axis: str) -> Any:
    """Implements `GemmaBackbone.get_layout_map`."""
    if not isinstance(device_mesh, keras.distribution.DeviceMesh):
        raise TypeError(
            "`device_mesh` must be a `keras.distribution.DeviceMesh`. "
            f"Received: device_mesh={device_mesh!r}"
        )
    for argument, axis in (
        ("model_parallel_dim_name", model_axis),
        ("data_parallel_dim_name", data_axis),
    ):
        if axis not in device_mesh.axis_names:
            raise ValueError(
                f"`{argument}` must be an axis of `device_mesh`: {device_mesh.axis_names}. "
                f"Received: {argument}={axis!r}"
            )
    layout_map = keras.distribution.LayoutMap(device_mesh)
    block = "decoder_block.*"
    layout_map["token_embedding/embeddings"] = (model_axis, data_axis)
    layout_map[f"{block}attention.*(query|key|value).kernel"] = (model_axis, data_axis, None)
    layout_map[f"{block}attention_output.kernel"] = (model_axis, None, data_axis)
    layout_map[f"{block}ffw_gating(_2)?.kernel"] = (data_axis, model_axis)
    layout_map[f"{block}ffw_linear.kernel"] = (model_axis, data_axis)
    return layout_map
