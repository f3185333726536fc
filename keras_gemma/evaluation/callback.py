"""Evaluation of a model while it is trained."""

from collections.abc import Mapping
from typing import Any

import keras

from keras_gemma.checks import check_integer
from keras_gemma.evaluation.results import Results
from keras_gemma.evaluation.run import evaluate


class EvaluateCallback(keras.callbacks.Callback):
    """Callback of `fit` that measures the model on benchmarks before, during and after training.

    Args:
        tasks: Same as in `evaluate`.
        every: Number of epochs between evaluations. `None` evaluates only before and after.
        **arguments: More arguments of `evaluate`, such as `data` and `samples`.

    Example:

    ```python
    from keras_gemma.evaluation import EvaluateCallback

    # callback = EvaluateCallback("arc_easy:200", data="benchmarks")
    # lm.fit(texts, callbacks=[callback])
    # [results["arc_easy"].score for results in callback.results.values()]
    ```
    """

    def __init__(self, tasks: Any, every: int | None = None, **arguments: Any) -> None:
        super().__init__()
        if every is not None:
            check_integer("every", every)
        for name in ("output", "resume"):
            if name in arguments:
                raise ValueError(
                    f"`{name}` does not apply, because each evaluation is of other weights. "
                    f"Received: {name}={arguments[name]!r}"
                )
        self.tasks = tasks
        self.every = every
        self.arguments = arguments
        self.results: dict[int, Results] = {}
        """Results by the number of completed epochs. 0 is before training."""
        self._epochs = 0

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        self.results, self._epochs = {}, 0
        self._evaluate()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self._epochs = epoch + 1
        if self.every is not None and self._epochs % self.every == 0:
            results = self._evaluate()
            if logs is not None:
                logs |= {name: one.score for name, one in results.items() if one.score is not None}

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        if self._epochs not in self.results:
            self._evaluate()

    def _evaluate(self) -> Results:
        self.results[self._epochs] = evaluate(self.model, self.tasks, **self.arguments)
        return self.results[self._epochs]
