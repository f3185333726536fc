"""One decode step of the engine, in two programs: `forward`, and `choose_tokens`.

`forward` does not depend on the settings of the requests, so a row has the same logits whatever the
other rows ask for. `choose_tokens` is small and has a variant for each `StepKind`.
"""

from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma.backend import to_tensor
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.engine_request import MAX_TOP_LOGPROBS, EngineRequest
from keras_gemma.generation.penalties import penalize
from keras_gemma.generation.samplers.noise import hash_ids
from keras_gemma.generation.samplers.random import FILTERS, draw_limited
from keras_gemma.generation.samplers.sampler import first_argmax
from keras_gemma.generation.stopping import is_stop_token, stop_array
from keras_gemma.generation.token_mask import apply_token_mask
from keras_gemma.model.cache import Cache
from keras_gemma.model.transformer import BlockFunctions, forward_with_cache


class Penalties(NamedTuple):
    """Changes of the logits of single tokens."""

    seen: Any  # bool [B, V]: tokens in the prompt or the new text
    counts: Any  # int32 [B, V]: of tokens in the new text
    bias: Any  # float32 [B, V]
    repetition: Any  # float32 [B]
    frequency: Any  # float32 [B]
    presence: Any  # float32 [B]


class Rows(NamedTuple):
    """State of the slots, without their keys and values."""

    token: Any  # int32 [B]: last token, not in the cache yet
    length: Any  # int32 [B]: tokens of each row, including `token`
    end: Any  # int32 [B]: maximum length of each row
    stop_token_ids: Any  # int32 [B, 8]
    done: Any  # bool [B]: True for finished rows and free slots
    sampler: dict[str, Any]  # settings and random state of the sampler, [B] each
    penalties: Penalties | None = None  # None if no row needs them


class StepKind(NamedTuple):
    """Parts of `choose_tokens` that are compiled in: the fewest that the rows need."""

    sampling: str = "greedy"  # or "draw", or "filter" with top-k, top-p and min-p
    penalties: bool = False
    logprobs: bool = False
    mask: bool = False

    def __or__(self, other: "StepKind") -> "StepKind":  # type: ignore[override]
        """Returns the kind of a step for the rows of both kinds."""
        order = ("greedy", "draw", "filter")
        sampling = max(self.sampling, other.sampling, key=order.index)
        return StepKind(sampling, *(a or b for a, b in zip(self[1:], other[1:], strict=True)))


class ChosenTokens(NamedTuple):
    """Results of one step."""

    ids: Any  # int32 [B]: -1 in rows that were done before
    logprobs: Any = None  # float32 [B]
    top_ids: Any = None  # int32 [B, MAX_TOP_LOGPROBS]
    top_logprobs: Any = None  # float32 [B, MAX_TOP_LOGPROBS]


def kind_of(request: EngineRequest) -> StepKind:
    """Returns the kind of step that a request needs."""
    sampling = "greedy"
    if request.temperature > 0:
        filters = (request.top_k, request.top_p, request.min_p)
        sampling = "draw" if filters == (None, None, None) else "filter"
    return StepKind(
        sampling,
        penalties=bool(request.logit_bias)
        or request.repetition_penalty != 1
        or request.frequency_penalty != 0
        or request.presence_penalty != 0,
        logprobs=request.top_logprobs is not None,
        mask=request.constraint is not None,
    )


def free_rows(batch: int) -> Rows:
    """Returns the state of `batch` free slots, without penalties."""

    def numbers(value: float, dtype: str) -> Any:
        return to_tensor(np.full(batch, value, dtype))

    return Rows(
        token=numbers(0, "int32"),
        length=numbers(1, "int32"),
        end=numbers(1, "int32"),
        stop_token_ids=to_tensor(np.stack([stop_array(())] * batch)),
        done=to_tensor(np.ones(batch, "bool")),
        sampler={
            "temperature": numbers(0, "float32"),
            "top_k": numbers(1, "int32"),
            "top_p": numbers(1, "float32"),
            "min_p": numbers(0, "float32"),
            "seed": numbers(0, "int32"),
            "rows": numbers(0, "int32"),
            "step": numbers(0, "int32"),
        },
    )


def free_penalties(batch: int, vocabulary_size: int) -> Penalties:
    """Returns penalties that change nothing."""
    shape = (batch, vocabulary_size)
    return Penalties(
        seen=ops.zeros(shape, "bool"),
        counts=ops.zeros(shape, "int32"),
        bias=ops.zeros(shape, "float32"),
        repetition=ops.ones((batch,), "float32"),
        frequency=ops.zeros((batch,), "float32"),
        presence=ops.zeros((batch,), "float32"),
    )


def row_of(request: EngineRequest, index: int, seed: int, config: GemmaConfig) -> Rows:
    """Returns the state of the sequence number `index` of a request, after its prompt."""
    size = config.vocabulary_size
    key = hash_ids(request.prompt) + index  # as in `Request.row_keys`, for one prompt

    def number(value: float, dtype: str) -> Any:
        return to_tensor(np.array([value], dtype))

    def word(value: int) -> Any:
        return to_tensor(np.array([value % 2**32], "uint32").view("int32"))

    return Rows(
        token=number(request.prompt[-1], "int32"),
        length=number(len(request.prompt), "int32"),
        end=number(len(request.prompt) + request.max_new_tokens, "int32"),
        stop_token_ids=to_tensor(stop_array(request.stop_token_ids)[None]),
        done=to_tensor(np.zeros(1, "bool")),
        sampler={
            "temperature": number(request.temperature, "float32"),
            "top_k": number(size if request.top_k is None else request.top_k, "int32"),
            "top_p": number(1 if request.top_p is None else request.top_p, "float32"),
            "min_p": number(request.min_p or 0, "float32"),
            "seed": word(seed),
            "rows": word(key),
            "step": number(0, "int32"),
        },
        penalties=_penalties_of(request, size) if kind_of(request).penalties else None,
    )


def _penalties_of(request: EngineRequest, size: int) -> Penalties:
    seen, bias = np.zeros((1, size), "bool"), np.zeros((1, size), "float32")
    seen[0, request.prompt] = True
    for token_id, value in request.logit_bias.items():
        bias[0, token_id] = value
    settings = (
        request.repetition_penalty,
        request.frequency_penalty,
        request.presence_penalty,
    )
    return Penalties(
        to_tensor(seen),
        to_tensor(np.zeros((1, size), "int32")),
        to_tensor(bias),
        *(to_tensor(np.array([value], "float32")) for value in settings),
    )


def forward(
    weights: dict[str, Any],
    token: Any,
    length: Any,
    cache: Cache,
    config: GemmaConfig,
    functions: BlockFunctions,
) -> tuple[Any, Cache]:
    """Feeds the last token of each row, `token` and `length` int32 `[B]`.

    Returns the logits of the next one, float32 `[B, V]`, and the updated cache.
    """
    x, cache = forward_with_cache(
        weights, token[:, None], (length - 1)[:, None], cache, config, functions
    )
    return functions.head(x[:, 0], weights["head"], config), cache


def choose_tokens(
    logits: Any, rows: Rows, allowed: Any, kind: StepKind
) -> tuple[Rows, ChosenTokens]:
    """Chooses the next token of each row by `logits [B, V]`.

    `allowed` are the masks of the rows, int32 `[B, ceil(V / 32)]`; `None` if no row has one.
    """
    changed = logits
    if kind.penalties:
        penalties = rows.penalties
        changed = penalize(
            changed,
            penalties.seen,
            penalties.repetition,
            penalties.counts,
            penalties.frequency,
            penalties.presence,
        )
        changed = changed + penalties.bias
    if kind.mask:
        changed = apply_token_mask(changed, allowed)
    ids = _sample(changed, rows.sampler, kind.sampling)
    unfinished = ops.logical_not(rows.done)
    length = rows.length + ops.cast(unfinished, "int32")
    ended = ops.logical_or(is_stop_token(ids, rows.stop_token_ids), length >= rows.end)
    after = rows._replace(
        token=ops.where(unfinished, ids, rows.token),
        length=length,
        done=ops.logical_or(rows.done, ended),
        sampler={**rows.sampler, "step": rows.sampler["step"] + 1},
    )
    if kind.penalties:
        tokens = ops.arange(logits.shape[-1], dtype="int32")[None]
        is_chosen = ops.logical_and(tokens == ids[:, None], unfinished[:, None])
        after = after._replace(
            penalties=penalties._replace(
                seen=ops.logical_or(penalties.seen, is_chosen),
                counts=penalties.counts + ops.cast(is_chosen, "int32"),
            )
        )
    chosen = ChosenTokens(ops.where(unfinished, ids, -1))
    if kind.logprobs:
        logits = logits - ops.logsumexp(logits, axis=-1, keepdims=True)
        top, top_ids = ops.top_k(logits, min(MAX_TOP_LOGPROBS, logits.shape[-1]))
        logprobs = ops.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
        chosen = ChosenTokens(chosen.ids, logprobs, ops.cast(top_ids, "int32"), top)
    return after, chosen


def _sample(logits: Any, sampler: dict[str, Any], sampling: str) -> Any:
    if sampling == "greedy":
        return first_argmax(logits)
    if sampling == "draw":
        sampler = {name: value for name, value in sampler.items() if name not in FILTERS}
    return draw_limited(logits, sampler)
