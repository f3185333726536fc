"""Speculative decoding: a draft proposes tokens, and the target model verifies them in one pass.

When memory bandwidth is the limit, a pass over five tokens takes about as long as a pass over one.
Accepted draft tokens become part of the text, followed by one token of the target model:

    text          to be or not
    draft                      to  be  the  end
    target                     to  be  ,
    text          to be or not to  be  ,

The output follows the target model's distribution, whatever the draft (Leviathan et al., 2023,
arXiv:2211.17192). Greedy text is identical, up to rounding that may depend on the number of tokens
per pass.

Deals only in ids. `DecodingSession` prefills.
"""

import dataclasses
import math
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.generation.decode import DecodeState, any_unfinished
from keras_gemma.generation.programs import Programs
from keras_gemma.generation.request import Request, SequenceOutput
from keras_gemma.generation.session import DecodingSession
from keras_gemma.generation.strategies.draft import ModelProposer, PromptLookupProposer
from keras_gemma.generation.strategies.verify import DraftTokens, verify
from keras_gemma.model.cache import Cache
from keras_gemma.model.transformer import forward_with_cache


class SpeculativeSession(DecodingSession):
    """A session that decodes with the draft of its request."""

    def __init__(self, programs: Programs, request: Request) -> None:
        super().__init__(programs, request)
        self.proposer = (
            PromptLookupProposer(self.slack)
            if request.draft.programs is None
            else ModelProposer(self)
        )
        self.num_accepted = np.zeros(len(self.prompt_lengths), int)
        self.num_verified = np.zeros(len(self.prompt_lengths), int)

    def decode(self, n: int | None = None) -> bool:
        """Chooses about `n` more tokens in each row; `None` decodes until all rows have ended.

        Returns True if any row is unfinished.
        """
        rounds = math.inf if n is None else math.ceil(n / (self.slack + 1))
        while rounds > 0 and bool(any_unfinished(self.state)):
            self._decode_round()
            rounds -= 1
        return bool(any_unfinished(self.state))

    def outputs(self) -> list[SequenceOutput]:
        """Returns the output of each row so far, with its acceptance rate."""
        outputs = []
        counts = zip(self.num_accepted, self.num_verified, strict=True)
        for output, (accepted, verified) in zip(super().outputs(), counts, strict=True):
            rate = float(accepted / verified) if verified else None
            outputs.append(dataclasses.replace(output, acceptance_rate=rate))
        return outputs

    def _decode_round(self) -> None:
        """Proposes and verifies draft tokens: at least one more token in each row."""
        longest = int(ops.convert_to_numpy(self.state.length).max())
        self.ensure_capacity(longest + self.slack + 1)
        drafts = self.proposer.propose(self.state)
        cache, state = self.state.cache, self.state._replace(cache=None)
        program = self._verify_program()
        cache, state, accepted, verified = program(self.weights, cache, state, drafts)
        self.state = state._replace(cache=cache)
        self.num_accepted += ops.convert_to_numpy(accepted)
        self.num_verified += ops.convert_to_numpy(verified)

    def _verify_program(self) -> Any:
        config, functions = self.programs.config, self.programs.functions
        greedy = self.request.sampler.is_greedy
        processors = self.request.logits_processors

        def verify_drafts(
            weights: Any, cache: Cache, state: DecodeState, drafts: DraftTokens
        ) -> tuple[Cache, DecodeState, Any, Any]:
            last = ops.take_along_axis(state.text, (state.length - 1)[:, None], axis=1)
            drafted = [ops.where(ids < 0, 0, ids)[:, None] for ids in drafts.ids]
            token_ids = ops.concatenate([last, *drafted], axis=1)
            offsets = ops.arange(token_ids.shape[1], dtype="int32")[None]
            positions = (state.length - 1)[:, None] + offsets
            x, cache = forward_with_cache(weights, token_ids, positions, cache, config, functions)
            logits = functions.head(x, weights["head"], config)
            state, accepted, verified = verify(state, logits, drafts, greedy, processors)
            return cache, state, accepted, verified

        key = "verify", *self.static_key()
        return self.programs.program(key, lambda: backend.compile(verify_drafts, donate=1))
