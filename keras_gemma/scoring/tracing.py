"""Activations of one text by the names of their places."""

from collections.abc import Iterable
from typing import Any

from keras import ops

from keras_gemma.scoring.hooks import match
from keras_gemma.scoring.inputs import encode_short


def trace(lm: Any, text: Any, names: str | Iterable[str]) -> dict[str, Any]:
    """What stands at some places while `lm` reads a text.

    Args:
        lm: a `GemmaCausalLM`.
        text: a string, or its ids.
        names: names or patterns as of `hooks.py`, or one of them.

    Returns:
        Tensors of the backend by their names, in the order of the data, each with a batch of 1.
        No gradient passes through them.

    Raises:
        ValueError: a name or pattern of no place; a text longer than the context.
        TypeError: `names` that are no strings.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    seen = keras_gemma.scoring.trace(lm, "To be", ["embeddings", "block.*.attention.weights"])
    print({name: tuple(x.shape) for name, x in seen.items()})
    ```
    """
    if not isinstance(names, Iterable):
        raise TypeError(
            "`names` must be a list of names such as 'block.0.attention.weights'. "
            f"Received: names={names!r}"
        )
    patterns = [names] if isinstance(names, str) else list(names)
    match(patterns, lm.backbone.config.num_layers, "names")
    ids = encode_short(lm, text)
    seen = {}

    def keep(x: Any, name: str) -> Any:
        seen[name] = ops.stop_gradient(x)
        return x

    lm.score(ids[None], hooks=dict.fromkeys(patterns, keep))
    return seen
