"""Prompts in, new tokens out: prompts are read, and programs compiled once and kept.

How a text goes on from its prompt is the work of a `Run`.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation import buckets
from keras_gemma.generation.feed import AS_THEY_ARE, Parts
from keras_gemma.generation.memory import check_memory
from keras_gemma.generation.prefill import read_chunk
from keras_gemma.generation.request import Prefix, Request, Row, mark_of
from keras_gemma.generation.samplers import GreedySampler
from keras_gemma.generation.session import Run
from keras_gemma.generation.strategies.speculative import SpeculativeRun
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache, make_cache, repeat_rows, resize

MOST_PROGRAMS = 32
"""That a generator keeps: what is compiled for a function or a sampler of a call's own, which no
other call will have again, must not pile up."""


class Generator:
    """The compiled programs of one backbone.

    Args:
        backbone: its weights are read anew at each call, so training in between is seen.
        eager: leave the block uncompiled where it would be compiled apart (PyTorch): slow, but
            it starts at once.
    """

    def __init__(self, backbone: GemmaBackbone, eager: bool = False) -> None:
        self.backbone = backbone
        self.eager = eager
        self.config: GemmaConfig = backbone.config
        self.parts = AS_THEY_ARE if eager else Parts(*map(backend.jit_part, AS_THEY_ARE))
        self.programs: OrderedDict[Any, Any] = OrderedDict()  # the latest used is last
        self.lock = threading.Lock()

    def generate(self, request: Request) -> list[Row]:
        """Continue each prompt to its end.

        Raises:
            ValueError: an empty or too long prompt, no room.
        """
        search = getattr(request.sampler, "search", None)
        if search is not None:
            return search(self, request)
        run = self.start(request)
        run.go_on()
        return run.rows()

    def start(self, request: Request) -> Run | SpeculativeRun:
        """Read the prompts and choose the first tokens; the run goes on from there."""
        self.check(request)
        run = Run(self, request)
        return run if request.draft is None else SpeculativeRun(run)

    def check(self, request: Request) -> None:
        """Raise a ValueError where the model or the memory cannot do what is asked."""
        if hasattr(request.sampler, "search"):
            kind = type(request.sampler).__name__
            raise ValueError(
                f"{kind} knows its text only at the end: `stream` and `stop` need a sampler that "
                "goes token by token. Pass another `sampler`, such as 'greedy', or call "
                "`generate` without `stop`; `stop_token_ids` work with both."
            )
        request.check(self.config)
        check_memory(request, self.config, self.backbone.compute_dtype)

    def prefill(self, ids: np.ndarray) -> Prefix:
        """Read the beginning of a text, to go on from it later.

        Raises:
            ValueError: it is empty, or leaves no room in the context.
        """
        self.check(Request([ids], [1], GreedySampler()))
        _, cache = self.read([ids], None, self.backbone.tensors())
        return Prefix(ids, cache, weakref.ref(self.backbone), mark_of(self.backbone))

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """The program of `key`, made when it is first asked for; those least in use are let go.

        The compilers tell apart the shapes of arguments; what a program closes over is our part.
        """
        with self.lock:
            if key not in self.programs:
                self.programs[key] = make()
            self.programs.move_to_end(key)
            while len(self.programs) > MOST_PROGRAMS:
                self.programs.popitem(last=False)
            return self.programs[key]

    def read(
        self,
        prompts: list[np.ndarray],
        prefix: Prefix | None,
        weights: Any,
        every: bool = False,
    ) -> tuple[Any, Cache]:
        """Read prompts, but for what they share with `prefix`.

        Returns:
            What the last block says of each prompt's last token, `[B, D]`, and the cache by
            position, with a slot free in each row. With `every`, which allows no prefix, what it
            says of every token, `[B, S, D]`, with as many places as the cache has slots.
        """
        config, batch = self.config, len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        start = 0 if prefix is None else prefix.shared_with(prompts)
        cuts = buckets.chunks(start, int(lengths.max()), batch)
        end = sum(cuts[-1])
        slots = buckets.bucket(max(end, int(lengths.max()) + 1), buckets.SMALLEST_CACHE)
        token_ids = np.zeros((batch, end), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        dtype = self.backbone.compute_dtype
        if start:
            cache = [tuple(resize(array, slots) for array in kept) for kept in prefix.cache]
            if batch > 1:
                cache = [tuple(repeat_rows(array, batch) for array in kept) for kept in cache]
        else:
            cache = make_cache(config, batch, slots, dtype)
        places = (slots,) if every else ()
        hidden = ops.zeros((batch, *places, config.hidden_dim), dtype=dtype)

        def program(weights: Any, cache: Cache, hidden: Any, *args: Any) -> tuple[Any, Cache]:
            token_ids, start, lengths = args
            return read_chunk(weights, token_ids, start, lengths, hidden, cache, config)

        run = self.program("chunk", lambda: backend.compile(program, donate=1))
        for start, size in cuts:
            hidden, cache = run(
                weights,
                cache,
                hidden,
                ops.convert_to_tensor(token_ids[:, start : start + size]),
                ops.convert_to_tensor(np.int32(start)),
                ops.convert_to_tensor(lengths),
            )
        return hidden, cache
