"""Learning from pairs of a preferred and a rejected answer (DPO: Rafailov et al., 2023,
arXiv:2305.18290, equation 7).

Knows log probabilities of whole answers, and neither text nor how a model is stepped.
"""

from typing import Any

import keras
from keras import ops


def answer_log_probabilities(losses: Any, weights: Any) -> Any:
    """The log probability of each row's answer: losses and weights `[B, T]` -> `[B]`.

    Args:
        losses: nats of each label, as of `lm.score(..., scoring_mode="loss")`.
        weights: 1 at labels of the answer, else 0, as `chat_dataset` gives them.
    """
    return -ops.sum(losses * ops.cast(weights, losses.dtype), axis=-1)


def dpo_loss(
    chosen: Any,
    rejected: Any,
    reference_chosen: Any,
    reference_rejected: Any,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Any:
    """The loss of each pair of answers, `[B]`: lower, the more the model has come to prefer one.

        -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))

    Args:
        chosen, rejected: log probabilities `[B]` of both answers by the model that is trained.
        reference_chosen, reference_rejected: those by the model as it was; with an adapter, that
            is the same model with `set_adapter(None)`. No gradient is taken of them.
        beta: how dear it is to leave the model as it was.
        label_smoothing: the share of pairs whose preference is thought to be the wrong way round.

    Raises:
        ValueError: `beta` is not positive, or the smoothing not in [0, 0.5).

    Example:

    ```python
    import numpy as np
    from keras_gemma import training

    chosen, rejected = np.array([-3.0, -5.0]), np.array([-4.0, -4.0])
    training.dpo_loss(chosen, rejected, np.array([-3.5, -5.0]), np.array([-3.5, -4.5]))
    ```
    """
    check_settings(beta, label_smoothing)
    reference = ops.stop_gradient(
        ops.convert_to_tensor(reference_chosen) - ops.convert_to_tensor(reference_rejected)
    )
    margin = beta * (ops.convert_to_tensor(chosen) - ops.convert_to_tensor(rejected) - reference)
    agree, disagree = ops.softplus(-margin), ops.softplus(margin)
    return (1 - label_smoothing) * agree + label_smoothing * disagree


def check_settings(beta: float, label_smoothing: float) -> None:
    """Raise a ValueError for settings that are out of range."""
    if not beta > 0:
        raise ValueError(f"`beta` must be positive. Received: beta={beta!r}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"`label_smoothing` must be in [0, 0.5). Received: label_smoothing={label_smoothing!r}"
        )


@keras.saving.register_keras_serializable(package="keras_gemma")
class PreferenceLoss(keras.losses.Loss):
    """`dpo_loss` for `compile` and `fit`, on the batches of `preference_dataset`.

    It reads the logits of whole batches, float32 `[2B, S, V]`: keep B and S small.

    Args:
        beta, label_smoothing: as of `dpo_loss`.

    Example: see `preference_dataset`.
    """

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, name: str = "preference_loss"
    ) -> None:
        check_settings(beta, label_smoothing)
        super().__init__(name=name, reduction="sum")  # `call` takes the mean
        self.beta, self.label_smoothing = beta, label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Labels `[2B, S + 1]` and logits `[2B, S, V]` -> the mean over pairs; padding has none."""
        labels, reference = y_true[:, :-1], y_true[:, -1]
        learned = ops.cast(labels >= 0, "float32")
        losses = keras.losses.sparse_categorical_crossentropy(
            ops.maximum(ops.cast(labels, "int32"), 0), y_pred, from_logits=True
        )
        found = answer_log_probabilities(losses, learned)
        pairs = dpo_loss(
            found[::2], found[1::2], reference[::2], reference[1::2], self.beta,
            self.label_smoothing,
        )  # fmt: skip
        real = ops.max(learned, axis=-1)[::2]
        return ops.divide_no_nan(ops.sum(pairs * real), ops.sum(real))

    def get_config(self) -> dict[str, Any]:
        """For `.keras` files."""
        return {"beta": self.beta, "label_smoothing": self.label_smoothing, "name": self.name}
