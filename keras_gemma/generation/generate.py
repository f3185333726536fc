"""Entry points of generation: prompts in, new tokens out.

Picks the strategy that the sampler declares. Knows no text.
"""

import weakref

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
    """Generates until every sequence has ended.

    Raises:
        ValueError: If a prompt is empty or too long, if the sampler's strategy does not support
            the request, or if there is not enough memory.
    """
    search = SEARCHES.get(request.sampler.strategy)
    if search is not None:
        return search(programs, request)
    session = start(programs, request)
    session.decode()
    return session.outputs()


def start(programs: Programs, request: Request) -> DecodingSession | SpeculativeSession:
    """Prefills the prompts and chooses the first tokens.

    Raises:
        ValueError: Same as `check`.
    """
    check(programs, request)
    session = DecodingSession(programs, request)
    return session if request.draft is None else SpeculativeSession(session)


def check(programs: Programs, request: Request) -> None:
    """Checks a request that is decoded token by token.

    Raises:
        ValueError: If the sampler or the model does not support it, or if there is not enough
            memory.
    """
    if request.sampler.strategy in SEARCHES:
        raise ValueError(
            "`stream` and `stop` need a sampler that decodes token by token. Pass another "
            "`sampler`, such as 'greedy', or call `generate` without `stop` (`stop_token_ids` "
            f"works with every sampler). Received: {type(request.sampler).__name__}"
        )
    request.check(programs.config)
    check_memory(request, programs.config, programs.backbone.compute_dtype)


def prefill(programs: Programs, ids: np.ndarray) -> PrefixCache:
    """Returns the prefix cache of a text.

    Args:
        programs: Programs of the model.
        ids: int32 `[n]`.

    Raises:
        ValueError: If the text is empty or leaves no room in the context.
    """
    check(programs, Request([ids], [1], GreedySampler()))
    _, cache = programs.prefill([ids], None, programs.backbone.tensors())
    backbone = programs.backbone
    return PrefixCache(ids, cache, weakref.ref(backbone), weights_fingerprint(backbone))
