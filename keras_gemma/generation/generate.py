"""Entry points of generation: prompts in, new tokens out.

Picks the strategy that the sampler declares. Knows no text.
"""

import weakref

import numpy as np

from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Prefix, Request, Row, mark_of
from keras_gemma.generation.samplers import GreedySampler
from keras_gemma.generation.session import Run
from keras_gemma.generation.strategies import beam, contrastive
from keras_gemma.generation.strategies.speculative import SpeculativeRun

SEARCHES = {"beam": beam.search, "contrastive": contrastive.search}
"""Function of each strategy that cannot stream, by the sampler's `strategy`."""


def generate(programs: Programs, request: Request) -> list[Row]:
    """Generates until every row has ended.

    Raises:
        ValueError: If a prompt is empty or too long, if the sampler's strategy does not support
            the request, or if there is not enough memory.
    """
    search = SEARCHES.get(request.sampler.strategy)
    if search is not None:
        return search(programs, request)
    session = start(programs, request)
    session.go_on()
    return session.rows()


def start(programs: Programs, request: Request) -> Run | SpeculativeRun:
    """Prefills the prompts and chooses the first tokens.

    Raises:
        ValueError: Same as `check`.
    """
    check(programs, request)
    session = Run(programs, request)
    return session if request.draft is None else SpeculativeRun(session)


def check(programs: Programs, request: Request) -> None:
    """Raises a ValueError if the model cannot decode `request` token by token, or lacks memory."""
    if request.sampler.strategy in SEARCHES:
        name = type(request.sampler).__name__
        raise ValueError(
            f"{name} knows its text only at the end: `stream` and `stop` need a sampler that "
            "goes token by token. Pass another `sampler`, such as 'greedy', or call "
            "`generate` without `stop`; `stop_token_ids` work with both."
        )
    request.check(programs.config)
    check_memory(request, programs.config, programs.backbone.compute_dtype)


def prefill(programs: Programs, ids: np.ndarray) -> Prefix:
    """Returns the prefix cache of a text.

    Args:
        programs: the programs of the model.
        ids: int32 `[n]`.

    Raises:
        ValueError: If the text is empty or leaves no room in the context.
    """
    check(programs, Request([ids], [1], GreedySampler()))
    _, cache = programs.read([ids], None, programs.backbone.tensors())
    return Prefix(ids, cache, weakref.ref(programs.backbone), mark_of(programs.backbone))
