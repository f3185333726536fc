"""Entry points of generation: prompts in, new tokens out.

Picks the strategy that the sampler declares. Knows no text.
"""

import weakref
from typing import Any

import numpy as np

from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import (
    PrefixCache,
    Request,
    SequenceOutput,
    weights_fingerprint,
)
from keras_gemma.generation.samplers import GreedySampler
from keras_gemma.generation.session import DecodingSession
from keras_gemma.generation.strategies import beam, contrastive
from keras_gemma.generation.strategies.speculative import SpeculativeSession

SEARCHES = {"beam": beam.search, "contrastive": contrastive.search}
"""Function of each strategy that cannot stream, by the sampler's `strategy`."""


def generate(programs: Programs, request: Request) -> list[SequenceOutput]:
    """Generates until every sequence has ended."""
    search = SEARCHES.get(request.sampler.strategy)
    if search is not None:
        return search(programs, request)
    session = start(programs, request)
    session.decode()
    return session.outputs()


def start(programs: Programs, request: Request) -> DecodingSession:
    """Prefills the prompts and chooses the first tokens."""
    check(programs, request)
    session = DecodingSession if request.draft is None else SpeculativeSession
    return session(programs, request)


def check(programs: Programs, request: Request) -> None:
    """Raises a ValueError if a request cannot be decoded token by token with this model, or if
    there is not enough memory."""
    if request.sampler.strategy in SEARCHES:
        raise ValueError(
            "`stream` and `stop` need a sampler that decodes token by token. Pass another "
            "`sampler`, such as 'greedy', or call `generate` without `stop` (`stop_token_ids` "
            f"works with every sampler). Received: {type(request.sampler).__name__}"
        )
    request.check(programs.config)
    check_memory(request, programs.backbone)


def prefill(programs: Programs, ids: np.ndarray) -> PrefixCache:
    """Returns the prefix cache of a text, int32 `[n]`."""
    check(programs, Request([ids], [1], GreedySampler()))
    backbone = programs.backbone
    _, cache = programs.prefill([ids], None, backbone.tensors())
    return PrefixCache(ids, cache, weakref.ref(backbone), weights_fingerprint(backbone))


def next_token_logits(
    programs: Programs, prompts: list[np.ndarray], prefix: PrefixCache | None = None
) -> Any:
    """Returns the logits of the token after each prompt, float32 `[B, V]`.

    Args:
        programs: Programs of the model.
        prompts: Token ids of each prompt, int32 `[n]`.
        prefix: Prefix cache of the model with its current weights.
    """
    check(programs, Request(prompts, [1] * len(prompts), GreedySampler(), prefix=prefix))
    weights = programs.backbone.tensors()
    hidden, _ = programs.prefill(prompts, prefix, weights)
    return programs.logits(hidden, weights)
