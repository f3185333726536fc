"""`score` and `perplexity` of a model with a `backbone` and a `preprocessor`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_gemma.scoring.hooks import Hook, Intercept
from keras_gemma.scoring.perplexity import perplexity
from keras_gemma.scoring.score import Scorer


class Scorable:
    """Mixin with the scoring methods of a language model."""

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
        """Returns the logits or losses of existing texts at every position.

        Without hooks the forward pass is compiled; on PyTorch no gradient passes through it. With
        hooks it runs eagerly, and gradients with respect to activations pass, from the embeddings
        on, also in a quantized model. Weights are constants here; train them with `fit`.

        Args:
            token_ids: Token ids, int `[B, T]`: a NumPy array, a tensor or nested lists. Or a
                string, or a list of strings, which are padded on the right.
            padding_mask: `[B, T]`, False or 0 at padding, which may be on the left or right.
                `None` means no padding.
            scoring_mode: `"logits"` or `"loss"`. Losses never hold the logits of all positions in
                memory, not even when computing a gradient.
            layer_intercept_fn: Function `(activations [B, T, D], layer) -> activations`. Called
                with the embeddings before scaling (layer -1) and the output of each block (layers
                from 0). Its result replaces the activations.
            target_ids: Ids to predict, int `[B, T]`; required for `"loss"`. For strings these are
                the next tokens, and positions without a next token have a loss of 0.
            hooks: Dict from names or patterns of hook points to functions `(activations, name) ->
                activations`, such as `{"block.*.attention.weights": look}`. The result of a
                function replaces the activations. The names are listed in
                `keras_gemma.scoring.hooks`.

        Returns:
            Logits after the final soft cap, float32 `[B, T, V]`; or losses in nats, `[B, T]`.

        Raises:
            ValueError: If the mode is unknown, targets are missing, ids are out of range, a text
                is longer than the context, a pattern matches no hook point, or a hook changes the
                shape or dtype.
            TypeError: If `hooks` is not a dict from names to functions of two arguments.

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
        """Returns the perplexity of texts: e to the mean loss of a token.

        Texts longer than `window` are read in windows that start `stride` tokens apart. Every
        token counts once, given all tokens before it in its window.

        Args:
            texts: A string, or a list of strings or of lists of token ids.
            stride: Distance between the starts of two windows, in tokens. Half a window by
                default.
            window: Window length, in tokens. The model's context length by default.

        Returns:
            A float for one string, a float64 array `[B]` for a list.

        Raises:
            ValueError: If a text has fewer than two tokens, `window` exceeds the context length,
                or `stride` is not smaller than `window`.

        Example:

        ```python
        import keras_gemma

        lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
        lm.perplexity(["To be, or not to be", "be be not To or, to"], stride=64, window=128)
        ```
        """
        return perplexity(self, texts, stride, window)
