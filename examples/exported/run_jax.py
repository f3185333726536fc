"""Greedy text from an export to JAX, with only jax, safetensors and sentencepiece.

lm.export("my_export", format="jax")
python examples/exported/run_jax.py my_export "ROMEO:" --max-new-tokens 40
"""

from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from greedy import main
from safetensors.flax import load_file


def load(folder: Path, about: dict[str, Any]) -> Any:
    """The two programs as `greedy.complete` calls them."""
    weights = load_file(folder / about["weights"])
    programs = {}
    for name, file in about["programs"].items():
        exported = jax.export.deserialize((folder / file).read_bytes())
        programs[name] = jax.jit(exported.call, donate_argnums=4)

    def read(token_ids: Any, start: Any, last: Any, cache: Any) -> Any:
        if about["batch_size"] not in (None, len(token_ids)):
            raise ValueError(
                f"The export reads {about['batch_size']} prompts at a time: make one with "
                f"batch_size={len(token_ids)}, or None."
            )
        program = programs["step" if token_ids.shape[1] == 1 else "prefill"]
        logits, cache = program(weights, token_ids, start, last, cache)
        return np.asarray(logits), cache

    return read, jnp.zeros


if __name__ == "__main__":
    main(load)
