"""Prompts in, new tokens out: shapes chosen, programs compiled once and kept.

Shapes are rounded up to powers of two, so that a prompt one token longer compiles nothing.
"""

import threading
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.config import GemmaConfig
from keras_gemma.generation.decode import AS_THEY_ARE, DecodeState, Parts, advance, feed, proceed
from keras_gemma.generation.prefill import prefill
from keras_gemma.generation.samplers import Sampler
from keras_gemma.model.backbone import GemmaBackbone

SMALLEST_BUCKET = 16
MOST_STOP_IDS = 8


def bucket(length: int) -> int:
    """`length` rounded up to a power of two, 16 at least."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


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
        self.parts = AS_THEY_ARE if eager else Parts(*map(backend.fuse, AS_THEY_ARE))
        self.programs: dict[Any, Any] = {}
        self.lock = threading.Lock()

    def generate(
        self,
        prompts: list[np.ndarray],
        room: list[int],
        sampler: Sampler,
        stop_ids: tuple[int, ...] = (),
        seed: int | None = None,
    ) -> list[np.ndarray]:
        """Continue each prompt.

        Args:
            prompts: int32 `[T]` each, of any length from 1 on, ids of the vocabulary.
            room: the most tokens that each row may get, at least 1.
            sampler: chooses them.
            stop_ids: ids that end a row; the one that does is its last.
            seed: instead of the sampler's own.

        Returns:
            The new ids of each row.

        Raises:
            ValueError: an empty or too long prompt, no room.
        """
        self._check(prompts, room, stop_ids)
        lengths = np.array([len(prompt) for prompt in prompts], "int32")
        token_ids = np.zeros((len(prompts), bucket(int(lengths.max()))), "int32")
        for row, prompt in zip(token_ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        capacity = bucket(int((lengths + np.array(room)).max()))
        start, run = self._programs(sampler, capacity)
        weights = self.backbone.tensors()
        stops = np.full(MOST_STOP_IDS, -1, "int32")
        stops[: len(stop_ids)] = stop_ids
        state = start(
            weights,
            ops.convert_to_tensor(token_ids),
            ops.convert_to_tensor(lengths),
            ops.convert_to_tensor(np.array(room, "int32")),
            ops.convert_to_tensor(stops),
            sampler.init(len(prompts), seed),
        )
        state = run(weights, state, max(room) - 1)
        output = ops.convert_to_numpy(state.output)
        counts = ops.convert_to_numpy(state.count)
        return [row[:count] for row, count in zip(output, counts, strict=True)]

    def _programs(self, sampler: Sampler, capacity: int) -> tuple[Any, Any]:
        """What reads the prompt and chooses the first token, and what chooses the others."""
        config, parts = self.config, self.parts

        def start(
            weights: Any, token_ids: Any, lengths: Any, room: Any, stop_ids: Any, sampling: Any
        ) -> DecodeState:
            x, cache = prefill(weights, token_ids, lengths, config=config, capacity=capacity)
            logits = parts.head(x, weights["head"], config)
            state = DecodeState(
                token=ops.zeros_like(lengths),
                length=lengths,
                output=ops.zeros((token_ids.shape[0], capacity), dtype="int32"),
                count=ops.zeros_like(lengths),
                room=room,
                stop_ids=stop_ids,
                done=ops.zeros_like(lengths, dtype="bool"),
                cache=cache,
                sampler=sampling,
            )
            return advance(state, logits, sampler)

        def step(weights: Any, state: DecodeState) -> DecodeState:
            logits, cache = feed(weights, state, config, parts)
            return advance(state._replace(cache=cache), logits, sampler)

        # The compilers tell apart the shapes of arguments; what a program closes over is our part.
        rule = sampler.structure()
        with self.lock:
            if ("start", rule, capacity) not in self.programs:
                self.programs["start", rule, capacity] = backend.compile(start)
            if ("step", rule) not in self.programs:
                self.programs["step", rule] = backend.loop(proceed, step)
            return self.programs["start", rule, capacity], self.programs["step", rule]

    def _check(self, prompts: list[np.ndarray], room: list[int], stop_ids: Any) -> None:
        context = self.config.context_length
        if not prompts:
            raise ValueError("There must be a prompt to continue. Received: an empty list")
        if len(stop_ids) > MOST_STOP_IDS:
            raise ValueError(
                f"`stop_token_ids` takes up to {MOST_STOP_IDS} ids. Received: {tuple(stop_ids)}"
            )
        for i, (prompt, most) in enumerate(zip(prompts, room, strict=True)):
            if not len(prompt):
                raise ValueError(
                    f"Prompt {i} has no tokens. Give it at least one, such as the start token."
                )
            if len(prompt) >= context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens, and the model's context holds "
                    f"{context}, one to generate among them. Shorten the prompt."
                )
            if most < 1 or len(prompt) + most > context:
                raise ValueError(
                    f"Prompt {i} has {len(prompt)} tokens and {most} are to follow; there must be "
                    f"at least one, and together no more than the context's {context}. Change "
                    "`max_length` or `max_new_tokens`."
                )
