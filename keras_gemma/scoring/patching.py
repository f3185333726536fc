"""Which activation makes the difference between two prompts.

The model reads the corrupted prompt, with one activation at a time taken from the clean one
(Meng et al., 2022, arXiv:2202.05262, "causal tracing"): where that brings the answer back, what
the answer needs passes through there.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.model.taps import BLOCK_PLACES
from keras_gemma.scoring.forward import forward, logits_of
from keras_gemma.scoring.inputs import encode_short, tokens_of, whole_number
from keras_gemma.scoring.losses import cross_entropy
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
            or another place of `keras_gemma.model.taps.BLOCK_PLACES` that has positions.

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
    config, weights = lm.backbone.config, lm.backbone.tensors()
    length = len(ids)

    def ask(row: np.ndarray, count: int, taps: Any = None) -> np.ndarray:
        """The answer's log-probability after `count` copies of a text: `[count]`."""
        texts = ops.convert_to_tensor(np.repeat(row[None], count, axis=0))
        mask = ops.ones((count, length), dtype="bool")
        x = forward(weights, texts, mask, config, lm.backbone.compute_dtype, taps)
        logits = logits_of(x[:, -1], weights, config)
        answers = ops.full((count,), answer_id, dtype="int32")
        return ops.convert_to_numpy(ops.stop_gradient(-cross_entropy(logits, answers)))

    wanted = trace(lm, ids, f"block.*.{place}")
    scores = np.zeros((config.num_layers, length), "float32")
    for layer in range(config.num_layers):
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


def read_answer(lm: Any, answer: Any) -> int:
    """The id of one token, given as a text of one piece or as an id.

    Raises:
        ValueError: several pieces, or no id of the vocabulary.
    """
    if not isinstance(answer, str):
        last = lm.backbone.config.vocabulary_size - 1
        return whole_number("answer", answer, 0, last, ", or a text of one token")
    if lm.preprocessor is None:
        raise ValueError(
            f"This model has no preprocessor: give `answer` as an id. Received: answer={answer!r}"
        )
    ids = lm.preprocessor.tokenizer.tokenize(answer, parse_special=False)
    if len(ids) != 1:
        raise ValueError(
            "`answer` must be one token; a space before a word belongs to it, and any token may "
            "be given by its id, as those of control must. "
            f"Received: answer={answer!r}, which is {tokens_of(lm, ids)}"
        )
    return int(ids[0])
