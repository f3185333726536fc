"""Verification of draft tokens: accepts or rejects them.

The output follows the target model's distribution. Knows neither where draft tokens come from
(`draft.py`) nor how the target model computes their logits (`speculative.py`).
"""

from typing import Any, NamedTuple

from keras import ops

from keras_gemma.backend.reference import LOWEST
from keras_gemma.generation.decode import DecodeState, apply_logits_processors, write_tokens
from keras_gemma.generation.samplers.noise import gumbel
from keras_gemma.generation.samplers.random import limit
from keras_gemma.generation.samplers.sampler import LogitsProcessor, draw, first_argmax

DRAFT_STREAM, VERIFY_STREAM = 1 << 28, 1 << 29
"""Offsets of the step in the random numbers, far above any step.

They keep three choices at the same position independent: drawing a draft token, accepting it, and
drawing a token of the target model."""


class DraftTokens(NamedTuple):
    """Proposed next tokens of each row."""

    ids: tuple[Any, ...] = ()
    """int32 `[B]` per position; -1 for rows without a draft token."""
    logits: tuple[Any, ...] = ()
    """float32 `[B, V]` per position: the logits the ids were drawn from. Empty if the proposals are
    deterministic."""


def verify(
    state: DecodeState,
    logits: Any,
    drafts: DraftTokens,
    greedy: bool,
    processors: tuple[LogitsProcessor, ...] = (),
) -> tuple[DecodeState, Any, Any]:
    """Appends the accepted draft tokens and one token of the target model to each row.

    Works position by position, like decoding, so stop tokens and logits processors see each token.
    `logits [B, T, V]` are the target model's after the text and after each of the T - 1 draft
    tokens. If `greedy`, accepts only the most likely token.

    Returns the new state, and the number of accepted and of verified draft tokens in each row, both
    int32 `[B]`.
    """
    no_draft = ops.zeros_like(state.length) - 1
    # A row is active until it ends or a draft token is rejected.
    done, active = state.done, ops.logical_not(state.done)
    num_accepted = num_verified = ops.zeros_like(state.length)
    for i in range(logits.shape[1]):
        draft = drafts.ids[i] if i < len(drafts.ids) else no_draft
        draft_logits = drafts.logits[i] if i < len(drafts.logits) else None
        state = state._replace(done=ops.logical_not(active))
        state, accepted = _verify_one(state, logits[:, i], draft, draft_logits, greedy, processors)
        num_verified = num_verified + ops.cast(ops.logical_and(active, draft >= 0), "int32")
        num_accepted = num_accepted + ops.cast(accepted, "int32")
        done = ops.where(active, state.done, done)
        active = ops.logical_and(accepted, ops.logical_not(state.done))
    return state._replace(done=done), num_accepted, num_verified


def _verify_one(
    state: DecodeState,
    logits: Any,
    draft: Any,
    draft_logits: Any,
    greedy: bool,
    processors: tuple[LogitsProcessor, ...],
) -> tuple[DecodeState, Any]:
    """Appends one token to each row that is not done. Returns the new state, and True for each row
    whose draft token was accepted, bool `[B]`."""
    settings = state.sampler
    processed = apply_logits_processors(logits, state, processors)
    if greedy:
        ids = first_argmax(processed)
        accepted = ids == draft
    else:
        limited = limit(processed, settings)
        ids, accepted = rejection_sample(limited, settings, draft, draft_logits)
    active = ops.logical_not(state.done)
    # Inactive rows repeat their last token, so that `seen` does not gain another one.
    last = ops.take_along_axis(state.text, (state.length - 1)[:, None], axis=1)[:, 0]
    step = settings["step"] + ops.cast(active, "int32")
    state = state._replace(sampler={**settings, "step": step})
    state = write_tokens(state, logits, ops.where(active, ids, last))
    return state, ops.logical_and(accepted, active)


def rejection_sample(
    limited: Any, settings: dict[str, Any], draft: Any, draft_logits: Any
) -> tuple[Any, Any]:
    """Draws a token from p, given a draft token x drawn from q (Leviathan et al., 2.3).

    Accepts x with probability min(1, p(x) / q(x)), and otherwise draws from max(0, p - q),
    normalized. `limited` and `draft_logits` are the logits of p and q, `[B, V]`; without the
    latter, q(x) is 1. Without a draft token, q is 0, so the token is drawn from p.

    Returns the ids, int32 `[B]`, and True for each accepted draft token, bool `[B]`.
    """
    p = probabilities(limited, settings)
    is_draft = ops.arange(p.shape[-1], dtype="int32")[None] == draft[:, None]
    if draft_logits is None:
        q = ops.cast(is_draft, "float32")
    else:
        q = ops.where(draft[:, None] >= 0, probabilities(draft_logits, settings), 0.0)
    step = settings["step"] + VERIFY_STREAM
    noise = gumbel(settings["seed"], settings["rows"], step, ops.zeros((1, 1), "int32"))[:, 0]
    uniform = ops.exp(-ops.exp(-noise))
    q_of_draft = ops.sum(ops.where(is_draft, q, 0.0), axis=-1)
    p_of_draft = ops.sum(ops.where(is_draft, p, 0.0), axis=-1)
    accepted = ops.logical_and(draft >= 0, uniform * q_of_draft <= p_of_draft)
    rest = ops.maximum(p - q, 0.0)
    rest = ops.where(rest > 0, ops.log(rest), LOWEST)
    return ops.where(accepted, draft, ops.cast(draw(rest, settings), "int32")), accepted


def probabilities(limited: Any, settings: dict[str, Any]) -> Any:
    """Returns the probabilities of logits `[B, V]`; one-hot for rows at temperature 0."""
    tokens = ops.arange(limited.shape[-1], dtype="int32")[None]
    one_hot = ops.cast(tokens == first_argmax(limited)[:, None], "float32")
    return ops.where(settings["temperature"][:, None] > 0, ops.softmax(limited, axis=-1), one_hot)
