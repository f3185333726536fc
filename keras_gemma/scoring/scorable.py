"""`score` and `perplexity`, for a model with a `backbone` and a `preprocessor`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_gemma.scoring.hooks import Hook, Intercept
from keras_gemma.scoring.perplexity import perplexity
from keras_gemma.scoring.score import Scorer


class Scorable:
    """A model that says what it thinks of texts that are there already."""

    _scorer: Scorer | None = None

    def score(
        self,
        token_ids: Any,
        padding_mask: Any = None,
        scoring_mode: str = "logits",
        layer_intercept_fn: Intercept | None = None,
        target_ids: Any = None,
        *,
        hooks: Mapping[str, Hook] | None = None,
    ) -> Any:
        """What the model predicts at every position of texts that are there already.

        Without hooks this runs compiled; on PyTorch no gradient passes through it then. With
        hooks it runs step by step, and gradients with respect to activations pass, from the
        embeddings on, also in a quantized model. Weights are constants: `fit` has their gradients.

        Args:
            token_ids: int `[B, T]`, NumPy, lists or a tensor; or a string, or a list of strings,
                which are padded at their ends.
            padding_mask: `[B, T]`, false or 0 at padding, which may stand at either end; by
                default there is none.
            scoring_mode: `"logits"` or `"loss"`. Losses take the memory of a few positions'
                logits at a time, in a gradient too.
            layer_intercept_fn: `(activations [B, T, D], layer) -> activations`, called with the
                embeddings, not yet scaled, at layer -1 and with the output of each block from 0
                on; what it returns goes on.
            target_ids: int `[B, T]`, the ids to be predicted; needed for `"loss"`. Those of
                strings are the tokens that follow, and where none does the loss is 0.
            hooks: functions `(activations, name) -> activations` by the names or patterns of
                places, as `{"block.*.attention.weights": look}`; what they return goes on. The
                names are in `keras_gemma.scoring.hooks`.

        Returns:
            Logits, float32 `[B, T, V]`, final soft cap included; or losses in nats, `[B, T]`.

        Raises:
            ValueError: an unknown mode, no targets for a loss, ids out of range, a text longer
                than the context, a pattern without a place, a hook that returns another shape or
                dtype, or None.
            TypeError: `hooks` that are no dict from names to functions of two arguments.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        losses = lm.score("To be, or not to be", scoring_mode="loss")
        without = lm.score(
            "To be, or not to be",
            scoring_mode="loss",
            hooks={"block.[01].attention.output": lambda x, name: 0 * x},
        )
        ```
        """
        if self._scorer is None:
            self._scorer = Scorer(self.backbone)
        return self._scorer.score(
            token_ids,
            padding_mask,
            scoring_mode,
            layer_intercept_fn,
            target_ids,
            hooks,
            self.preprocessor,
        )

    def perplexity(
        self, texts: Any, stride: int | None = None, window: int | None = None
    ) -> float | np.ndarray:
        """How surprised the model is by texts: e to the mean loss of a token.

        Texts longer than `window` are read in windows, `stride` tokens apart; every token counts
        once, with all that its window holds before it.

        Args:
            texts: a string, or a list of strings or of lists of ids.
            stride: tokens from the start of one window to the next; half a window by default.
            window: tokens that are read at once, at most the model's context, which is the default.

        Returns:
            A number for one string, a float64 array `[B]` for a list.

        Raises:
            ValueError: a text of fewer than two tokens; a window beyond the context, or a stride
                that is not below the window.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.perplexity(["To be, or not to be", "be be not To or, to"], stride=64, window=128)
        ```
        """
        return perplexity(self, texts, stride, window)
