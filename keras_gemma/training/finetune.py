"""Fine-tuning of a model on a dataset, with resumption after interruptions.

Trains the trainable variables of the model: an adapter after `enable_lora`, otherwise all weights.
Knows nothing about data formats (`chat_dataset.py`) and the state of a run (`training_run.py`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.storage.files import local_path
from keras_gemma.training.chat_dataset import ChatDataset, ChatStream
from keras_gemma.training.log import Log
from keras_gemma.training.settings import read_settings
from keras_gemma.training.training_run import TrainingRun


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """Result of `finetune`."""

    path: Path
    """Path of the saved adapter or preset."""
    steps: int
    """Number of batches trained on."""
    loss: float
    """Loss of the last batch, in nats per token."""
    validation_loss: float | None
    """Lowest validation loss, in nats per token. The saved weights are those that had it."""
    stopped_early: bool
    """True if training stopped before the last step."""
    log: Log
    """Metrics of every step."""


def finetune(
    lm: GemmaCausalLM,
    data: ChatDataset | ChatStream,
    output: str | Path,
    *,
    validation_data: ChatDataset | None = None,
    samples: Sequence[str] = (),
    callbacks: Sequence[keras.callbacks.Callback] = (),
    verbose: bool = True,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneResult:
    """Trains `lm` on `data` and saves the result in the folder `output`.

    By default, small datasets are repeated until there are 200 updates of the weights. The folder
    gets `log.csv` with one line per step, `curves.png` if matplotlib is installed, and checkpoints.
    At the end it gets `adapter/` from `save_lora` if an adapter was trained, otherwise
    `model/` from `save_to_preset`.

    To resume an interrupted run, call the function again with the same arguments and the original
    model. Training continues from the last checkpoint, with the losses of an uninterrupted run.

    Args:
        lm: The model. It is compiled again and trained in place.
        data: Result of `chat_dataset`.
        output: Folder to write to. It is created, or has an earlier run.
        validation_data: Result of `chat_dataset`. Its loss is computed at each checkpoint, and the
            weights with the lowest loss are saved.
        samples: Questions whose answers by the model are printed at each checkpoint.
        callbacks: Keras callbacks, such as `keras.callbacks.TensorBoard`. Their batches are steps,
            and their epochs are checkpoints.
        verbose: If True, prints progress.
        overwrite: If True, starts again and replaces an earlier run in `output`.
        **settings: `FinetuneSettings`.

    Returns:
        A `FinetuneResult` with the path of the trained weights and the log.

    Raises:
        ValueError: If a setting is out of range, `output` has a run with other settings or data,
            or anything but a run, rows are longer than the model's context, or the model has no
            trainable variables or no preprocessor.
        TypeError: If a setting is unknown.
        FloatingPointError: If the loss is no longer finite. The last checkpoint is intact.
        OSError: If a checkpoint cannot be written.

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
    settings = read_settings(settings)
    run = TrainingRun(
        lm, data, local_path(output, "output"), validation_data, settings, verbose, overwrite
    )
    callback_list = keras.callbacks.CallbackList(list(callbacks), add_history=False, model=lm)
    callback_list.on_train_begin()
    for step in run.remaining_steps():
        callback_list.on_train_batch_begin(step - 1)
        logs = run.train_step(step)
        callback_list.on_train_batch_end(step - 1, logs)
        if step % run.interval == 0 or step == run.total:
            logs |= run.checkpoint(step)
            callback_list.on_epoch_end((step - 1) // run.interval, logs)
            run.print_samples(samples)
        if run.is_patience_exhausted() or lm.stop_training:
            break
    callback_list.on_train_end()
    path, stopped_early = run.finish(), run.done < run.total
    return FinetuneResult(path, run.done, run.loss, run.best, stopped_early, run.log)
