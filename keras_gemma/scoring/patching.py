"""Which activation makes the difference between two prompts.

The model reads the corrupted prompt, with one activation at a time taken from the clean one
(Meng et al., 2022, arXiv:2202.05262, "causal tracing"): where that brings the answer back, what
the answer needs passes through there.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.model.hooks import BLOCK_PLACES
from keras_gemma.scoring.answer import log_probability, read_answer
from keras_gemma.scoring.inputs import encode_short, tokens_of
from keras_gemma.scoring.tracing import trace

LARGEST_BATCH = 32
"""Positions that are patched at once, each in a row of its own."""

PLACES = [place for place, shape in BLOCK_PLACES.items() if shape.startswith("[B, T,")]


@dataclasses.dataclass(frozen=True)
class Patching:
    """The log-probability of an answer by layer and position of a patch."""

    tokens: list[str]
    """The T tokens of the clean prompt."""
    corrupted_tokens: list[str]
    """Those of the other."""
    answer: str
    """The token whose log-probability was taken, after the prompt's end."""
    place: str
    """What was patched in each block."""
    scores: np.ndarray
    """float32 `[L, T]`, in nats."""
    clean: float
    """The log-probability after the clean prompt."""
    corrupted: float
    """After the corrupted one."""

    @property
    def recovered(self) -> np.ndarray:
        """`[L, T]`: 0 where a patch does nothing, 1 where it brings the answer back."""
        return (self.scores - self.corrupted) / (self.clean - self.corrupted)


def activation_patching(
    lm: Any, clean: Any, corrupted: Any, answer: str | int, place: str = "residual.after"
) -> Patching:
    """Patch each position of each block in turn.

    Args:
        lm: a `GemmaCausalLM`.
        clean: a prompt after which `answer` is likely; a string, or its ids.
        corrupted: one of as many tokens after which it is less so.
        answer: the next token, as one piece or as an id.
        place: what to patch: `"residual.after"`, `"attention.output"`, `"feed_forward.output"`,
            or another place of `keras_gemma.model.hooks.BLOCK_PLACES` that has positions.

    Raises:
        ValueError: prompts of different lengths, or of the same tokens; an answer of several
            tokens; an unknown place.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    clean, corrupted = "To be, or not to", "To be, or not so"
    grid = keras_gemma.scoring.activation_patching(lm, clean, corrupted, " be")
    print(grid.recovered.round(2))
    ```
    """
    if place not in PLACES:
        raise ValueError(
            f"`place` must be one of {', '.join(PLACES)}: a block's activations that have a "
            f"position each. Received: place={place!r}"
        )
    ids, other = encode_short(lm, clean, "clean"), encode_short(lm, corrupted, "corrupted")
    if len(ids) != len(other):
        raise ValueError(
            "`clean` and `corrupted` must have as many tokens, so that positions mean the same. "
            f"Received: {len(ids)} and {len(other)} tokens: {tokens_of(lm, ids)} and "
            f"{tokens_of(lm, other)}"
        )
    answer_id = read_answer(lm, answer)
    if np.array_equal(ids, other):
        raise ValueError(
            "`clean` and `corrupted` must differ in a token, or no patch changes anything. "
            f"Received: {tokens_of(lm, ids)} twice"
        )
    length, layers = len(ids), lm.backbone.config.num_layers

    def ask(row: np.ndarray, count: int, taps: Any = None) -> np.ndarray:
        """The answer's log-probability after `count` copies of a text: `[count]`."""
        found = log_probability(lm, np.repeat(row[None], count, axis=0), answer_id, taps)
        return ops.convert_to_numpy(ops.stop_gradient(found))

    wanted = trace(lm, ids, f"block.*.{place}")
    scores = np.zeros((layers, length), "float32")
    for layer in range(layers):
        name = f"block.{layer}.{place}"
        for start in range(0, length, LARGEST_BATCH):
            positions = np.arange(start, min(start + LARGEST_BATCH, length))
            here = positions[:, None] == np.arange(length)  # row by row, its own position

            def patch(x: Any, here: np.ndarray = here, name: str = name) -> Any:
                here = here.reshape(here.shape + (1,) * (len(x.shape) - 2))
                return ops.where(ops.convert_to_tensor(here), wanted[name], x)

            scores[layer, positions] = ask(other, len(positions), {name: patch})
    return Patching(
        tokens_of(lm, ids),
        tokens_of(lm, other),
        tokens_of(lm, np.array([answer_id]))[0],
        place,
        scores,
        float(ask(ids, 1)[0]),
        float(ask(other, 1)[0]),
    )
