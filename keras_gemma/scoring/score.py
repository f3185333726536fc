"""Logits or losses at every position of texts: compiled, or eager if there are hooks."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.losses import cross_entropy, token_losses
from keras_gemma.model.transformer import hidden_states
from keras_gemma.scoring.forward import CompiledScorer, constant_weights, logits_of
from keras_gemma.scoring.inputs import Inputs

MAX_BUCKET_STEP = 256
"""Largest step between two length buckets, in tokens."""


class Scorer(CompiledScorer):
    """Scoring at every position of texts."""

    def score(
        self, inputs: Inputs, hooks: dict[str, Callable[[Any], Any]], scoring_mode: str
    ) -> Any:
        """Implements `GemmaCausalLM.score`, for inputs and hooks that have been checked."""
        if scoring_mode not in ("logits", "loss"):
            raise ValueError(
                "`scoring_mode` must be 'logits' or 'loss'. "
                f"Received: scoring_mode={scoring_mode!r}"
            )
        if scoring_mode == "loss" and inputs.target_ids is None:
            raise ValueError(
                "scoring_mode='loss' needs `target_ids`: the id that each position should predict, "
                "such as `keras.ops.roll(token_ids, -1, axis=1)`. Received: target_ids=None"
            )
        if scoring_mode == "logits":
            inputs = inputs._replace(target_ids=None)
        scores = self.run_hooked(inputs, hooks) if hooks else self.run_compiled(inputs)
        if inputs.counted is None or scoring_mode == "logits":
            return scores
        return ops.where(backend.to_tensor(inputs.counted), scores, 0.0)

    def run_hooked(self, inputs: Inputs, hooks: dict[str, Callable[[Any], Any]]) -> Any:
        """Returns logits `[B, T, V]`, or losses `[B, T]` if there are targets, computed eagerly."""
        config, weights = self.config, constant_weights(self.backbone)
        hook = hooks.get("embeddings", lambda x: x)
        hooks = {**hooks, "embeddings": lambda x: hook(backend.requires_grad(x))}
        x = hidden_states(weights, *_tensors(inputs), config, self.backbone.compute_dtype, hooks)
        if inputs.target_ids is None:
            return logits_of(x, weights, config, hooks)
        target_ids = backend.to_tensor(inputs.target_ids)
        if "logits" in hooks:
            return cross_entropy(logits_of(x, weights, config, hooks), target_ids)
        return token_losses(x, target_ids, weights["head"]["token_embedding"], config)

    def run_compiled(self, inputs: Inputs) -> Any:
        """Same as `run_hooked` without hooks, with compiled programs."""
        weights, length = constant_weights(self.backbone), inputs.token_ids.shape[1]
        padding = ((0, 0), (0, bucket(length, max_step=MAX_BUCKET_STEP) - length))
        inputs = inputs._replace(
            token_ids=np.pad(inputs.token_ids, padding), mask=np.pad(inputs.mask, padding)
        )
        x = self.program("hidden", self._hidden)(weights, *_tensors(inputs))
        if inputs.target_ids is None:
            scores = self.program("logits", self._logits)(weights["head"], x[:, :length])
        else:
            target_ids = backend.to_tensor(np.pad(inputs.target_ids, padding))
            scores = self.program("losses", self._losses)(weights["head"], x, target_ids)
        # Copied, because PyTorch refuses inference tensors in later gradient computations.
        return ops.copy(scores[:, :length])

    def _hidden(self, weights: Any, token_ids: Any, mask: Any) -> Any:
        return hidden_states(weights, token_ids, mask, self.config, self.backbone.compute_dtype)

    def _logits(self, head: Any, x: Any) -> Any:
        return logits_of(x, {"head": head}, self.config)

    def _losses(self, head: Any, x: Any, target_ids: Any) -> Any:
        return token_losses(x, target_ids, head["token_embedding"], self.config)


def _tensors(inputs: Inputs) -> tuple[Any, Any]:
    return backend.to_tensor(inputs.token_ids), backend.to_tensor(inputs.mask)
