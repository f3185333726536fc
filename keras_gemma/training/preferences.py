"""Direct preference optimization: a loss on pairs of a preferred and a rejected answer.

Equation 7 of Rafailov et al. (2023), arXiv:2305.18290. Computes with log-probabilities of whole
answers. Knows nothing about text and optimizers.
"""

from typing import Any

import keras
from keras import ops

from keras_gemma import backend
from keras_gemma.checks import check_number


def answer_log_probabilities(losses: Any, weights: Any) -> Any:
    """Returns the log-probability of each row's answer, `[B]`, in nats.

    Args:
        losses: Loss of each label, `[B, T]`, such as from `lm.score(..., scoring_mode="loss")`.
        weights: 1 at labels of the answer, otherwise 0, `[B, T]`, such as from `chat_dataset`.
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
    """Returns the DPO loss of each pair of answers, `[B]`.

        -log sigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))

    Args:
        chosen: Log-probability of each preferred answer by the trained model, `[B]`.
        rejected: Log-probability of each rejected answer by the trained model, `[B]`.
        reference_chosen: Same as `chosen`, by the reference model. With an adapter, the reference
            is the same model after `set_adapter(None)`. No gradient is computed for it.
        reference_rejected: Same as `rejected`, by the reference model.
        beta: Strength of the penalty for deviating from the reference model.
        label_smoothing: Assumed fraction of pairs whose preference is wrong.

    Returns:
        The losses, `[B]`. They decrease as the model prefers the chosen answer more strongly.

    Raises:
        ValueError: If `beta` is not positive, or `label_smoothing` is not in [0, 0.5).

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
        backend.to_tensor(reference_chosen) - backend.to_tensor(reference_rejected)
    )
    margin = beta * (backend.to_tensor(chosen) - backend.to_tensor(rejected) - reference)
    agree, disagree = ops.softplus(-margin), ops.softplus(margin)
    return (1 - label_smoothing) * agree + label_smoothing * disagree


def check_settings(beta: float, label_smoothing: float) -> None:
    """Raises a ValueError if a setting of `dpo_loss` is out of range."""
    check_number("beta", beta, "(0, inf)")
    check_number("label_smoothing", label_smoothing, "[0, 0.5)")


@keras.saving.register_keras_serializable(package="keras_gemma")
class PreferenceLoss(keras.losses.Loss):
    """`dpo_loss` for `compile` and `fit`, on batches of `preference_dataset`.

    Requires the logits of whole batches, float32 `[2B, S, V]`, so B and S should be small. See
    `preference_dataset` for an example.

    Args:
        beta: Same as in `dpo_loss`.
        label_smoothing: Same as in `dpo_loss`.
        name: Name of the loss.
    """

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, name: str = "preference_loss"
    ) -> None:
        check_settings(beta, label_smoothing)
        super().__init__(name=name, reduction="sum", dtype="float32")  # `call` returns the mean
        self.beta, self.label_smoothing = beta, label_smoothing

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Returns the mean loss over pairs, without padding.

        Args:
            y_true: Labels and reference log-probability, `[2B, S + 1]`.
            y_pred: Logits, `[2B, S, V]`.
        """
        labels, reference = y_true[:, :-1], y_true[:, -1]
        learned = ops.cast(labels >= 0, "float32")
        losses = keras.losses.sparse_categorical_crossentropy(
            ops.cast(ops.maximum(labels, 0.0), "int32"), y_pred, from_logits=True
        )
        answers = answer_log_probabilities(losses, learned)
        pairs = dpo_loss(
            answers[::2], answers[1::2], reference[::2], reference[1::2], self.beta,
            self.label_smoothing,
        )  # fmt: skip
        is_pair = ops.max(learned, axis=-1)[::2]
        return ops.divide_no_nan(ops.sum(pairs * is_pair), ops.sum(is_pair))

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"beta": self.beta, "label_smoothing": self.label_smoothing, "name": self.name}
