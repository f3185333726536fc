"""Activations of one text, by the names of their hook points."""

from collections.abc import Iterable
from typing import Any

from keras import ops

from keras_gemma.scoring.hooks import match
from keras_gemma.scoring.inputs import encode_short


def trace(lm: Any, text: Any, names: str | Iterable[str]) -> dict[str, Any]:
    """Records the activations at some hook points while `lm` reads a text.

    Args:
        lm: A `GemmaCausalLM`.
        text: A string, or a list of token ids.
        names: Name or pattern of hook points, or a list of them. The names are listed in
            `keras_gemma.scoring.hooks`.

    Returns:
        Dict from names to backend tensors, in the order of the forward pass. The batch size is 1.
        No gradient passes through the tensors.

    Raises:
        ValueError: If a pattern matches no hook point, or the text is longer than the context.
        TypeError: If `names` are not strings.

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
    activations = {}

    def record(x: Any, name: str) -> Any:
        activations[name] = ops.stop_gradient(x)
        return x

    lm.score(ids[None], hooks=dict.fromkeys(patterns, record))
    return activations
