"""Activation patching: finds the activations that cause the difference between two prompts.

The model reads the corrupted prompt with one activation at a time replaced by that of the clean
prompt (Meng et al., 2022, arXiv:2202.05262, "causal tracing"). If a patch recovers the answer,
the information that the answer needs passes through the patched activation.
"""

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend, progress
from keras_gemma.model.hooks import BLOCK_HOOK_POINTS
from keras_gemma.scoring.answer import log_probability, read_answer
from keras_gemma.scoring.inputs import encode_short, tokens_of
from keras_gemma.scoring.tracing import trace

MAX_BATCH_SIZE = 32
"""Maximum number of positions patched in one batch, one position per row."""

HOOK_POINTS = [name for name, shape in BLOCK_HOOK_POINTS.items() if shape.startswith("[B, T,")]


@dataclasses.dataclass(frozen=True)
class Patching:
    """Log-probability of an answer, by layer and position of the patch."""

    tokens: list[str]
    """The T tokens of the clean prompt."""
    corrupted_tokens: list[str]
    """The T tokens of the corrupted prompt."""
    answer: str
    """Token whose log-probability after the prompt was measured."""
    hook_point: str
    """Hook point that was patched in each block."""
    scores: np.ndarray
    """Log-probabilities of the answer with each patch, float32 `[L, T]`, in nats."""
    clean: float
    """Log-probability of the answer after the clean prompt, in nats."""
    corrupted: float
    """Log-probability of the answer after the corrupted prompt, in nats."""

    @property
    def place(self) -> str:
        """Earlier name of `hook_point`."""
        return self.hook_point

    @property
    def recovered(self) -> np.ndarray:
        """Recovered fraction `[L, T]`: 0 if the patch has no effect, 1 if it is complete."""
        return (self.scores - self.corrupted) / (self.clean - self.corrupted)


def activation_patching(
    lm: Any,
    clean: Any,
    corrupted: Any,
    answer: str | int,
    hook_point: str = "residual.after",
    *,
    place: str | None = None,
) -> Patching:
    """Patches each position of each block in turn.

    Args:
        lm: A `GemmaCausalLM`.
        clean: Prompt after which `answer` is likely: a string, or a list of token ids.
        corrupted: Prompt of the same number of tokens, after which `answer` is less likely.
        answer: The next token, as a string of one token or as an id.
        hook_point: Hook point to patch: `"residual.after"`, `"attention.output"`,
            `"feed_forward.output"`, or any other hook point of a block that has a position axis.
        place: Earlier name of `hook_point`.

    Returns:
        A `Patching` with one log-probability for each block and position.

    Raises:
        ValueError: If the prompts differ in length or are equal, the answer has several tokens,
            or `hook_point` is unknown.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    clean, corrupted = "To be, or not to", "To be, or not so"
    grid = keras_gemma.scoring.activation_patching(lm, clean, corrupted, " be")
    print(grid.recovered.round(2))
    ```
    """
    hook_point = hook_point if place is None else place
    if hook_point not in HOOK_POINTS:
        raise ValueError(
            f"`hook_point` must be one of {', '.join(HOOK_POINTS)}: the hook points of a block "
            f"that have a position axis. Received: hook_point={hook_point!r}"
        )
    ids, other = encode_short(lm, clean, "clean"), encode_short(lm, corrupted, "corrupted")
    if len(ids) != len(other):
        raise ValueError(
            "`clean` and `corrupted` must have the same number of tokens, because positions are "
            f"compared. Received: {len(ids)} and {len(other)} tokens: {tokens_of(lm, ids)} and "
            f"{tokens_of(lm, other)}"
        )
    answer_id = read_answer(lm, answer)
    if np.array_equal(ids, other):
        raise ValueError(
            "`clean` and `corrupted` must differ in at least one token, otherwise no patch has an "
            f"effect. Received: {tokens_of(lm, ids)} twice"
        )
    length, layers = len(ids), lm.backbone.config.num_layers

    def ask(row: np.ndarray, count: int, hooks: Any = None) -> np.ndarray:
        """Returns the answer's log-probability after `count` copies of a text: `[count]`."""
        scores = log_probability(lm, np.repeat(row[None], count, axis=0), answer_id, hooks)
        return ops.convert_to_numpy(ops.stop_gradient(scores))

    clean_activations = trace(lm, ids, f"block.*.{hook_point}")
    scores = np.zeros((layers, length), "float32")
    with progress.bar("Patching", layers) as advance:
        for layer in range(layers):
            name = f"block.{layer}.{hook_point}"
            for start in range(0, length, MAX_BATCH_SIZE):
                positions = np.arange(start, min(start + MAX_BATCH_SIZE, length))
                mask = positions[:, None] == np.arange(length)  # each row patches one position

                def patch(x: Any, mask: np.ndarray = mask, name: str = name) -> Any:
                    mask = mask.reshape(mask.shape + (1,) * (len(x.shape) - 2))
                    return ops.where(backend.to_tensor(mask), clean_activations[name], x)

                scores[layer, positions] = ask(other, len(positions), {name: patch})
            advance(1)
    return Patching(
        tokens_of(lm, ids),
        tokens_of(lm, other),
        tokens_of(lm, np.array([answer_id]))[0],
        hook_point,
        scores,
        float(ask(ids, 1)[0]),
        float(ask(other, 1)[0]),
    )
