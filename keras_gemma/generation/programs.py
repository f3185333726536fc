"""Compiled programs of one backbone: each is compiled once and kept.

Knows no sampler and no strategy.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.prefill import capacity_for, chunks, read_chunk
from keras_gemma.generation.request import PrefixCache
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.cache import Cache, make_cache, repeat_rows, resize
from keras_gemma.model.transformer import EAGER, BlockFunctions

MAX_PROGRAMS = 32
"""Maximum number of cached programs. Programs for per-call samplers or logits processors can never
be reused, so the least recently used are evicted."""


class Programs:
    """Compiled programs of one backbone.

    Its weights are read at each call, so training between calls takes effect. If `eager`, the block
    is not compiled separately (PyTorch): slower, but without compilation time.
    """

    def __init__(self, backbone: GemmaBackbone, eager: bool = False) -> None:
        self.backbone = backbone
        self.eager = eager
        self.config: GemmaConfig = backbone.config
        self.functions = EAGER if eager else BlockFunctions(*map(backend.jit_part, EAGER))
        self.programs: OrderedDict[Any, Any] = OrderedDict()  # most recently used last
        self.lock = threading.Lock()

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the program of `key`; calls `make` on first use.

        The compiler distinguishes the shapes of arguments. `key` must distinguish everything that
        the program closes over.
        """
        with self.lock:
            if key not in self.programs:
                self.programs[key] = make()
            self.programs.move_to_end(key)
            while len(self.programs) > MAX_PROGRAMS:
                self.programs.popitem(last=False)
            return self.programs[key]

    def prefill(
        self,
        prompts: list[np.ndarray],
        prefix: PrefixCache | None,
        weights: Any,
        all_tokens: bool = False,
    ) -> tuple[Any, Cache]:
        """Prefills prompts, int32 `[n]` each, skipping the tokens that they share with `prefix`.

        Returns the output of the last block for the last token of each prompt, `[B, D]`, and the
        cache by position, with S slots, at least one of them free in each row. If `all_tokens`,
        which excludes `prefix`, returns the output for all tokens, `[B, S, D]`.
        """
        config, batch = self.config, len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        start = 0 if prefix is None else prefix.num_shared_tokens(prompts)
        spans = chunks(start, int(lengths.max()), batch)
        end = sum(spans[-1])
        slots = capacity_for(max(end, int(lengths.max()) + 1))
        token_ids = np.zeros((batch, end), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        dtype = self.backbone.compute_dtype
        if start:
            cache = [tuple(resize(array, slots) for array in arrays) for arrays in prefix.cache]
            cache = repeat_cache(cache, batch)
        else:
            cache = make_cache(config, batch, slots, dtype)
        positions = (slots,) if all_tokens else ()
        hidden = ops.zeros((batch, *positions, config.hidden_dim), dtype=dtype)

        def program(weights: Any, cache: Cache, hidden: Any, *args: Any) -> tuple[Any, Cache]:
            token_ids, start, lengths = args
            return read_chunk(weights, token_ids, start, lengths, hidden, cache, config)

        run = self.program("chunk", lambda: backend.compile(program, donate=1))
        for start, size in spans:
            hidden, cache = run(
                weights,
                cache,
                hidden,
                backend.to_tensor(token_ids[:, start : start + size]),
                backend.to_tensor(np.int32(start)),
                backend.to_tensor(lengths),
            )
        return hidden, cache


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Returns a copy of the cache with each row repeated `times` times.

    Returns the cache itself if `times` is 1.
    """
    if times == 1:
        return cache
    return [tuple(repeat_rows(array, times) for array in arrays) for arrays in cache]
