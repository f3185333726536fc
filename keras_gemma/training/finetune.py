"""The recipe: from a model and data to a tuned model, through interruptions.

What is trained is what the model says is trainable: an adapter after `enable_lora`, else all of
it. Knows nothing of the forms of data (`chat_dataset.py`) or the state of a run
(`training_run.py`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.training.chat_dataset import ChatDataset, ChatStream
from keras_gemma.training.log import Log
from keras_gemma.training.settings import read_settings
from keras_gemma.training.training_run import Run


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """What came of a run."""

    path: Path
    """The adapter or the preset that was written."""
    steps: int
    """Batches that were learned from."""
    loss: float
    """Of the last one, in nats a token."""
    validation_loss: float | None
    """The lowest; the weights are those that had it."""
    stopped_early: bool
    log: Log


def finetune(
    lm: GemmaCausalLM,
    data: ChatDataset | ChatStream,
    output: str | Path,
    *,
    validation_data: ChatDataset | None = None,
    samples: Sequence[str] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: bool = True,
    **settings: Any,
) -> Finetuned:
    """Train `lm` on `data`, and write what came of it to the folder `output`.

    The folder gets `log.csv`, a line a step; `curves.png`, where matplotlib is installed;
    checkpoints; and at the end `adapter/`, of `save_lora`, where an adapter was trained, else
    `model/`, of `save_to_preset`. Called again after an interruption, with the same arguments and
    the model as it was at the start, it goes on from the last checkpoint, and the losses are those
    of a run without interruption.

    Args:
        lm: the model; it is compiled anew, and changed.
        data: of `chat_dataset`.
        output: the folder; it is made.
        validation_data: of `chat_dataset`; its loss is taken at each checkpoint, and the weights
            with the lowest are kept.
        samples: questions; the model's answers are printed at each checkpoint.
        callbacks: of Keras, as `keras.callbacks.TensorBoard`. Batches are steps, and epochs are
            checkpoints.
        verbose: show a progress bar.
        **settings: those of `FinetuneSettings`.

    Raises:
        ValueError: settings out of range, a run in `output` with other settings or data, a model
            without trainable variables or without a tokenizer.
        FloatingPointError: the loss is no number any more. The last checkpoint is a good one.
        OSError: a checkpoint could not be written.

    Example:

    ```python
    import keras_gemma
    from keras_gemma import training

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    lm.enable_lora(rank=4)
    tokenizer = lm.preprocessor.tokenizer
    pairs = [{"prompt": f"What is {i}?", "completion": f"{i} it is."} for i in range(8)]
    data = training.chat_dataset(pairs, tokenizer, sequence_length=64, batch_size=2)
    result = training.finetune(lm, data, "tuned", epochs=2, learning_rate=1e-3)
    print(result.path, result.loss)
    ```
    """
    chosen = read_settings(settings)
    run = Run(lm, data, Path(output), validation_data, chosen, verbose)
    watchers = keras.callbacks.CallbackList(list(callbacks), add_history=False, model=lm)
    watchers.on_train_begin()
    for step in run.steps_left():
        watchers.on_train_batch_begin(step - 1)
        logs = run.take(step)
        watchers.on_train_batch_end(step - 1, logs)
        if step % run.interval == 0 or step == run.total:
            logs |= run.checkpoint(step)
            watchers.on_epoch_end((step - 1) // run.interval, logs)
            run.show(samples)
        if run.patience_is_over() or lm.stop_training:
            break
    watchers.on_train_end()
    path, early = run.finish(), run.done < run.total
    return Finetuned(path, run.done, run.loss, run.best, early, run.log)
