"""Log-probabilities of the tokens of a prompt, and the most likely tokens at each position."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_gemma import backend
from keras_gemma.buckets import bucket
from keras_gemma.model.head import soft_cap
from keras_gemma.scoring.continuations import ContinuationScorer
from keras_gemma.scoring.token_tree import token_tree


class PromptScores(NamedTuple):
    """Scores of some tokens in a row."""

    logprobs: np.ndarray  # float32 [n]
    top_ids: np.ndarray  # int32 [n, count]
    top_logprobs: np.ndarray  # float32 [n, count]


class PromptScorer(ContinuationScorer):
    """Scoring of every token of a prompt but the first."""

    def score_prompt(self, ids: np.ndarray, count: int) -> Iterator[PromptScores]:
        """Yields the scores of the tokens from the second on, a few at a time.

        Args:
            ids: Token ids, int32 `[T]`.
            count: Number of top log-probabilities.
        """
        tree, weights = token_tree([ids], [len(ids) - 1]), self.backbone.tensors()
        for chunk, x in self._read(tree, weights):
            x, targets = x[: len(chunk.token_ids)], tree.targets[chunk.pairs]
            for start in range(0, len(x), self.max_rows):
                rows = slice(start, start + self.max_rows)
                yield self._top_head(weights, x[rows], targets[rows], count)

    def _top_head(
        self, weights: Any, x: np.ndarray, targets: np.ndarray, count: int
    ) -> PromptScores:
        missing = bucket(len(x)) - len(x)
        run = self.program(f"top {count}", lambda *arrays: self._top_program(*arrays, count))
        results = run(
            weights["head"],
            ops.convert_to_tensor(np.pad(x, ((0, missing), (0, 0))), self.backbone.compute_dtype),
            backend.to_tensor(np.pad(targets, (0, missing))),
        )
        logprobs, top_ids, top = (backend.to_numpy(array)[: len(x)] for array in results)
        return PromptScores(
            logprobs.astype("float32"), top_ids.astype("int32"), top.astype("float32")
        )

    def _top_program(self, head: Any, x: Any, targets: Any, count: int) -> tuple[Any, Any, Any]:
        """Returns `logprobs [n]`, `top_ids [n, count]` and `top_logprobs [n, count]`."""
        cap = self.config.final_logit_soft_cap
        products = backend.matmul(x, head["token_embedding"])
        totals, largest = backend.log_sum_and_max(products, cap)

        def to_logprobs(values: Any) -> Any:
            return soft_cap(ops.cast(values, "float32"), cap) - totals[:, None]

        chosen = to_logprobs(ops.take_along_axis(products, targets[:, None], axis=1))[:, 0]
        if count == 1:  # lm-evaluation-harness asks for one. A sort of the vocabulary is slow.
            top_ids, top = ops.argmax(products, axis=1)[:, None], (largest - totals)[:, None]
        elif count:
            top, top_ids = ops.top_k(products, min(count, products.shape[-1]))
            top = to_logprobs(top)
        else:
            top_ids, top = targets[:, None][:, :0], chosen[:, None][:, :0]
        return chosen, ops.cast(top_ids, "int32"), top
