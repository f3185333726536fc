"""Export to JAX: two programs of `jax.export`, and the weights that they share.

    prefill.jax_export, step.jax_export    (weights, token_ids, start, last, cache)
    weights.safetensors                    their first argument, a dict of arrays in their dtype

`jax.export.deserialize` reads a program; `jax.jit(program.call, donate_argnums=4)` runs it.
The programs run on the kind of device that exported them, because the weights have its layout.
The batch size is fixed or free; all other sizes are free. `forward.py` describes what the programs
compute.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from keras_gemma.checks import check_integer
from keras_gemma.export.folder import write_metadata
from keras_gemma.export.forward import forward, named_arrays
from keras_gemma.export.subprocess_export import check, make
from keras_gemma.storage.hugging_face.safetensors import save_file

PROGRAMS = {"prefill": "prefill.jax_export", "step": "step.jax_export"}
WEIGHTS = "weights.safetensors"


def write(lm: Any, directory: Path, batch_size: int | None = 1) -> None:
    """Writes the export, in a subprocess unless on JAX. `batch_size=None` is slower on CPU."""
    if batch_size is not None:
        check_integer("batch_size", batch_size, advice="None allows any batch size.")
        batch_size = int(batch_size)
    check(lm, "jax")
    make(build, lm, directory, "jax", batch_size=batch_size)


def build(lm: Any, directory: Path, report: Callable[[str], None], batch_size: int | None) -> None:
    """Writes the export, on the JAX backend."""
    import jax

    config = lm.backbone.config
    arrays = named_arrays(lm.backbone)
    dtype = lm.backbone.compute_dtype

    def program(weights: Any, token_ids: Any, start: Any, last: Any, cache: Any) -> Any:
        return forward(weights, config, token_ids, start, last, cache)

    def spec(*shape: Any, dtype: Any = "int32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    batch, tokens, length = jax.export.symbolic_shape("batch, tokens, length")
    batch = batch if batch_size is None else batch_size
    weights = {name: spec(*array.shape, dtype=array.dtype) for name, array in arrays.items()}
    cache_array = spec(batch, length, config.num_key_value_heads, config.head_dim, dtype=dtype)
    cache = [cache_array] * (2 * config.num_layers)
    for name, file in PROGRAMS.items():
        report(f"Tracing {name}")
        ids = spec(batch, tokens if name == "prefill" else 1)
        exported = jax.export.export(jax.jit(program))(
            weights, ids, spec(batch), spec(batch), cache
        )
        (directory / file).write_bytes(exported.serialize())
    report("Writing")
    save_file({name: np.asarray(array) for name, array in arrays.items()}, directory / WEIGHTS)
    write_metadata(
        lm,
        directory,
        dtype,
        programs=PROGRAMS,
        weights=WEIGHTS,
        batch_size=batch_size,
        platforms=list(exported.platforms),
    )
