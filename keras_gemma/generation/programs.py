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

    def __init__(
        self,
        backbone: GemmaBackbone,
        eager: bool = False,
        max_programs: int | None = MAX_PROGRAMS,
    ) -> None:
        self.backbone = backbone
        self.eager = eager
        self.max_programs = max_programs
        self.config: GemmaConfig = backbone.config
        self.functions = EAGER if eager else BlockFunctions(*map(backend.jit_part, EAGER))
        self.programs: OrderedDict[Any, Any] = OrderedDict()  # most recently used last
        self.lock = threading.Lock()

    def without_limit(self) -> "Programs":
        """Returns programs of the same backbone that are never evicted, for callers that use all
        of their programs again. Blocks that are compiled separately are shared."""
        programs = Programs(self.backbone, self.eager, max_programs=None)
        programs.functions = self.functions
        return programs

    def program(self, key: Any, make: Callable[[], Any]) -> Any:
        """Returns the program of `key`; calls `make` on first use.

        The compiler distinguishes the shapes of arguments. `key` must distinguish everything that
        the program closes over.
        """
        with self.lock:
            if key not in self.programs:
                self.programs[key] = make()
            self.programs.move_to_end(key)
            while self.max_programs is not None and len(self.programs) > self.max_programs:
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
        start = 0 if prefix is None else prefix.num_shared_tokens(prompts)
        cache = prefix.cache if start else None
        prefill = ChunkedPrefill(self, prompts, weights, start, cache, all_tokens)
        while prefill.num_remaining_tokens:
            prefill.read_chunk()
        return prefill.hidden, prefill.cache

    def logits(self, hidden: Any, weights: Any) -> Any:
        """Returns the logits, float32 `[B, V]`, of the output of the last block `[B, D]`."""
        head, config = self.functions.head, self.config
        run = self.program(
            "next token",
            lambda: backend.compile(lambda weights, hidden: head(hidden, weights, config)),
        )
        return run(weights["head"], hidden)


class ChunkedPrefill:
    """Prefill of a batch of prompts, one chunk at a time.

    Args:
        programs: Programs of the model.
        prompts: Token ids of each prompt, int32 `[n]`.
        weights: Tensors of the backbone.
        start: Number of tokens that all prompts share with `cache`.
        cache: Keys and values `[1, S, K, H]` of the first `start` tokens, by position.
        all_tokens: If True, keeps the output of the last block for all tokens.
    """

    def __init__(
        self,
        programs: Programs,
        prompts: list[np.ndarray],
        weights: Any,
        start: int = 0,
        cache: Cache | None = None,
        all_tokens: bool = False,
    ) -> None:
        self.programs, self.weights = programs, weights
        config, batch = programs.config, len(prompts)
        self.lengths = np.array([len(prompt) for prompt in prompts], "int32")
        longest = int(self.lengths.max())
        self._spans = chunks(start, longest, batch)
        end = sum(self._spans[-1])
        slots = capacity_for(max(end, longest + 1))
        self._token_ids = np.zeros((batch, end), "int32")
        for row, prompt in zip(self._token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        dtype = programs.backbone.compute_dtype
        if start:
            cache = [tuple(resize(array, slots) for array in arrays) for arrays in cache]
            self.cache = repeat_cache(cache, batch)
        else:
            self.cache = make_cache(config, batch, slots, dtype)
        positions = (slots,) if all_tokens else ()
        self.hidden = ops.zeros((batch, *positions, config.hidden_dim), dtype=dtype)

    @property
    def num_remaining_tokens(self) -> int:
        """Number of positions that are still to read, including padding; 0 at the end."""
        return sum(size for _, size in self._spans)

    def read_chunk(self) -> None:
        """Reads the next chunk into `cache` and `hidden`."""
        config = self.programs.config

        def program(weights: Any, cache: Cache, hidden: Any, *args: Any) -> tuple[Any, Cache]:
            token_ids, start, lengths = args
            return read_chunk(weights, token_ids, start, lengths, hidden, cache, config)

        run = self.programs.program("chunk", lambda: backend.compile(program, donate=1))
        start, size = self._spans.pop(0)
        self.hidden, self.cache = run(
            self.weights,
            self.cache,
            self.hidden,
            backend.to_tensor(self._token_ids[:, start : start + size]),
            backend.to_tensor(np.int32(start)),
            backend.to_tensor(self.lengths),
        )


def repeat_cache(cache: Cache, times: int) -> Cache:
    """Returns a copy of the cache with each row repeated `times` times.

    Returns the cache itself if `times` is 1.
    """
    if times == 1:
        return cache
    return [tuple(repeat_rows(array, times) for array in arrays) for arrays in cache]
