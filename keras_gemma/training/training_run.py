"""State of a training run: steps, evaluations, checkpoints, and the saved result.

Resumes the interrupted run in its folder, if there is one. The public function is in `finetune.py`.
"""

import dataclasses
import importlib.util
import math
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.storage.adapters.peft import ADAPTERS
from keras_gemma.storage.files import Kind, check_target
from keras_gemma.storage.formats import MODELS
from keras_gemma.text.preprocessor import require_preprocessor
from keras_gemma.training.chat_dataset import ChatDataset
from keras_gemma.training.checkpoint import read_metadata, read_variables, write_checkpoint
from keras_gemma.training.log import Log, is_log
from keras_gemma.training.settings import FEW_UPDATES, FinetuneSettings

LAST, BEST = "last.safetensors", "best.safetensors"
LOG, CURVES, ADAPTER, MODEL = "log.csv", "curves.png", "adapter", "model"

RUNS = Kind("training runs", lambda folder: (folder / LAST).is_file() or is_log(folder / LOG))
"""Folders that a run may write to: an interrupted run may have no checkpoint yet."""


class TrainingRun:
    """A training run in the folder `output`.

    Attributes:
        total: Number of steps of the whole run.
        interval: Number of steps between checkpoints.
        done: Number of completed steps.
        loss: Loss of the last step, in nats per token.
        best: Lowest validation loss, or `None` if there was no evaluation.
        waited: Number of evaluations since the lowest validation loss.
        log: Metrics of all steps.
    """

    def __init__(
        self,
        lm: GemmaCausalLM,
        data: Any,
        output: Path,
        validation_data: Any,
        settings: FinetuneSettings,
        verbose: bool,
        overwrite: bool = False,
    ) -> None:
        self.lm, self.data, self.output = lm, data, output
        self.validation_data = validation_data
        check_target(output, RUNS, True, "output")  # without `overwrite`, the run is continued
        check_target(output / ADAPTER, ADAPTERS, True, "output")
        check_target(output / MODEL, MODELS, True, "output")
        require_preprocessor(lm.preprocessor, "training", None)
        lm.adapters.check_trainable()
        if not lm.trainable_variables:
            raise ValueError(
                "`lm` has no trainable variables. Call `lm.enable_lora(...)` first. To train all "
                "weights, load it without quantization and set `lm.trainable = True`."
            )
        epoch = getattr(data, "num_batches", None)
        if epoch is None and settings.steps is None:
            raise ValueError("`steps` must be set for data of unknown length.")
        for name, dataset in (("data", data), ("validation_data", validation_data)):
            check_length(name, dataset, lm.backbone.config.context_length)
        has_adapter = lm.active_adapter is not None
        settings = settings.resolve(epoch, lm.backbone.config.hidden_dim, has_adapter)
        self.settings, self.per_epoch = settings, epoch
        self.total = settings.steps or settings.epochs * epoch
        self.interval = settings.interval(self.total, epoch)
        self.best, self.waited, self.done, self.loss = None, 0, 0, math.nan
        self.schedule = self._schedule()
        self._compile()
        if overwrite:
            for name in (LAST, BEST, LOG):
                (output / name).unlink(missing_ok=True)
        self._restore()
        self.log = Log(output / LOG, self.done)
        self.verbose, self.has_bar = verbose, verbose and is_interactive()
        self.bar = keras.utils.Progbar(
            self.total,
            verbose=int(self.has_bar),
            stateful_metrics=["loss", "accuracy"],  # metrics of the step, not running means
        )
        if verbose and self.done:
            print(f"{output}: continuing after step {self.done} of {self.total}")
        updates = self.total // settings.accumulate
        if verbose and updates < FEW_UPDATES:
            print(
                f"note: the weights are updated only {updates} time{'s' * (updates != 1)}, which "
                "may teach little. Train for more epochs or steps, or on more samples."
            )

    def _schedule(self) -> Any:
        warmup_steps = round(self.settings.warmup * self.total)
        peak = self.settings.learning_rate
        return keras.optimizers.schedules.CosineDecay(
            0.0 if warmup_steps else peak,
            decay_steps=max(1, self.total - warmup_steps),
            warmup_target=peak if warmup_steps else None,
            warmup_steps=warmup_steps,
        )

    def _compile(self) -> None:
        lm, settings = self.lm, self.settings
        lm.backbone.rematerialize = settings.rematerialize
        accumulate = settings.accumulate if settings.accumulate > 1 else None
        generation = vars(lm.generation_settings)
        lm.compile(
            optimizer=keras.optimizers.AdamW(
                self.schedule,
                weight_decay=settings.weight_decay,
                global_clipnorm=settings.clip_norm,
                gradient_accumulation_steps=accumulate,
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight", dtype="float32"
            ),
            run_eagerly=lm.run_eagerly,
            **{**generation, "sampler": lm.sampler},
        )
        lm.optimizer.build(lm.trainable_variables)
        lm.stop_training = False

    def variables(self) -> dict[str, Any]:
        """Returns the variables of a checkpoint, by name."""
        groups = {
            "trained": self.lm.trainable_variables,
            "optimizer": self.lm.optimizer.variables,
            "rng": [v for v in self.lm.non_trainable_variables if "seed" in v.path],
        }
        return {
            f"{name}.{i}": variable
            for name, group in groups.items()
            for i, variable in enumerate(group)
        }

    def trained(self) -> dict[str, Any]:
        """Returns only the trained variables, by name."""
        return {k: v for k, v in self.variables().items() if k.startswith("trained")}

    def run_config(self) -> dict[str, Any]:
        """Returns the settings and fingerprints that must be equal when a run is resumed."""
        shape = getattr(self.data, "shape", None)
        validation = self.validation_data
        settings = dataclasses.asdict(self.settings)
        del settings["sample_tokens"]  # only affects printed samples
        backbone = self.lm.backbone
        adapter = backbone.adapters.configs.get(backbone.adapters.active)
        return {
            **settings,
            "backend": keras.config.backend(),
            "dtype": self.lm.dtype_policy.name,
            "quantization": backbone.quantization and backbone.quantization.describe(),
            "adapter": adapter and adapter.describe_all(),
            "base": fingerprint([backbone.layer_norm.variables[0].value]),
            "data": shape and dataclasses.asdict(shape),
            "batches an epoch": self.per_epoch,
            "first batch": fingerprint(self.data[0]) if self.per_epoch else None,
            "batches of validation": validation and validation.num_batches,
            "first batch of validation": validation and fingerprint(validation[0]),
            "trained shapes": [list(v.shape) for v in self.lm.trainable_variables],
        }

    def _restore(self) -> None:
        path = self.output / LAST
        if isinstance(self.data, ChatDataset):
            self.data.epoch = 0
        self.config = self.run_config()
        if not path.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            return
        state = read_metadata(path)
        stored = state.get("run_config") or state["facts"]  # "facts" in older checkpoints
        changes = [
            f"{name}: {stored.get(name)!r} before, {value!r} now"
            for name, value in self.config.items()
            if stored.get(name) != value
        ]
        if changes:
            raise ValueError(
                f"{self.output} has a run with other settings ({', '.join(changes)}). Continue "
                "with the same settings, choose another `output`, or pass overwrite=True to "
                "start again."
            )
        read_variables(path, self.variables())
        self.done, self.best, self.waited = state["step"], state["best"], state["waited"]
        self.loss = state["loss"]

    def batches(self) -> Iterator[Any]:
        """Yields the batches of the remaining steps."""
        if self.per_epoch is None:
            for step in range(self.total):
                batch = self.data[step]
                if step >= self.done:
                    yield batch
            return
        for step in range(self.done, self.total):
            epoch, index = divmod(step, self.per_epoch)
            if isinstance(self.data, ChatDataset):
                self.data.epoch = epoch
            yield self.data[index]

    def remaining_steps(self) -> Iterator[int]:
        """Yields the numbers of the remaining steps, from 1, after loading each step's batch."""
        if self.is_patience_exhausted():
            return
        for step, batch in enumerate(self.batches(), start=self.done + 1):
            self.batch = batch
            yield step

    def describe_step(self, step: int) -> str:
        """Returns the step and its batch, for error messages."""
        if self.per_epoch is None:
            return f"step {step}, batch {step - 1} of the stream"
        epoch, index = divmod(step - 1, self.per_epoch)
        return f"step {step}, batch {index} of epoch {epoch}"

    def train_step(self, step: int) -> dict[str, Any]:
        """Trains on one batch and returns the metrics."""
        logs = self.lm.train_on_batch(*self.batch, return_dict=True)
        self.loss, accuracy = float(logs["loss"]), float(logs["sparse_categorical_accuracy"])
        if not math.isfinite(self.loss):
            self._stop_diverged(step, f"the loss is {self.loss}")
        self.done = step
        self.row = {
            "step": step,
            "epoch": (step - 1) // self.per_epoch if self.per_epoch else 0,
            "loss": self.loss,
            "accuracy": accuracy,
            "learning_rate": float(self.schedule(step - 1)),
        }
        has_checkpoint = step % self.interval == 0 or step == self.total
        if not has_checkpoint:  # otherwise `checkpoint` adds the row
            self.log.add(**self.row)
        self.bar.update(step, [("loss", self.loss), ("accuracy", accuracy)], finalize=False)
        return {name: self.row[name] for name in ("loss", "accuracy", "learning_rate")}

    def _stop_diverged(self, step: int, reason: str) -> None:
        path = self.output / LAST
        state = "No checkpoint has been written yet"
        if path.exists():
            state = f"The checkpoint {path} of step {read_metadata(path)['step']} is intact"
        raise FloatingPointError(
            f"Training diverged at {self.describe_step(step)}: {reason}. {state}. Check the "
            "samples of this batch, or start again in another folder with a smaller "
            "`learning_rate` or a longer `warmup`."
        )

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Evaluates the model, writes a checkpoint, and returns the validation metrics."""
        for variable in self.lm.trainable_variables:
            if not np.isfinite(ops.convert_to_numpy(ops.sum(ops.abs(variable.value)))):
                self._stop_diverged(step, "a weight is infinite or NaN")
        logs = {}
        summary = f"step {step} of {self.total}: loss {self.loss:.4f}"
        if self.validation_data is not None:
            loss = self.evaluate()
            if not math.isfinite(loss):
                self._stop_diverged(step, f"the validation loss is {loss}")
            logs["val_loss"] = loss
            if self.best is None or loss < self.best:
                self.best, self.waited = loss, 0
                write_checkpoint(self.output / BEST, self.trained(), {"step": step})
            else:
                self.waited += 1
            summary += f", validation loss {loss:.4f}, lowest {self.best:.4f}"
        if self.verbose:
            print(*[""] * self.has_bar, summary, sep="\n")
        self.log.add(**self.row, validation_loss=logs.get("val_loss"))
        state = {"step": step, "best": self.best, "waited": self.waited, "loss": self.loss}
        state["run_config"] = self.config
        write_checkpoint(self.output / LAST, self.variables(), state)
        return logs

    def evaluate(self) -> float:
        """Returns the mean loss of all learned tokens of the validation data, in nats."""
        total = weight = 0.0
        for i in range(self.validation_data.num_batches):
            x, y, weights = self.validation_data[i]
            logs = self.lm.test_on_batch(x, y, weights, return_dict=True)
            total += float(logs["loss"]) * float(weights.sum())
            weight += float(weights.sum())
        return total / weight

    def print_samples(self, samples: Sequence[str]) -> None:
        """Prints questions and the model's answers."""
        tokenizer = self.lm.preprocessor.tokenizer
        for text in samples:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": text}])
            (row,) = self.lm.generate([ids], max_new_tokens=self.settings.sample_tokens)
            print(f"\n> {text}\n{tokenizer.detokenize(row[len(ids) :], skip_special_tokens=True)}")

    def is_patience_exhausted(self) -> bool:
        """Returns True if the validation loss has not improved for `patience` evaluations."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def finish(self) -> Path:
        """Saves the best weights and the plot of the losses, and returns the weights' path."""
        if (self.output / BEST).exists() and self.best is not None:
            read_variables(self.output / BEST, self.trained())
        if self.lm.active_adapter is not None:
            path = self.output / ADAPTER
            self.lm.save_lora(path, overwrite=True)
        else:
            path = self.output / MODEL
            self.lm.save_to_preset(path, overwrite=True)
        if self.log.rows and importlib.util.find_spec("matplotlib"):
            self.log.figure().savefig(self.output / CURVES, dpi=150)
        elif self.verbose and self.log.rows:
            print(f"no {CURVES}: it needs matplotlib, the extra `plots`")
        return path


def check_length(name: str, dataset: Any, context_length: int) -> None:
    """Raises a ValueError if the rows of a dataset are longer than the model's context."""
    shape = getattr(dataset, "shape", None)
    if shape is not None and shape.length > context_length:
        raise ValueError(
            f"`{name}` has rows of {shape.length} tokens, but the model's context length is "
            f"{context_length}. Pass sequence_length={context_length} or less to `chat_dataset`; "
            f"`truncate=True` truncates longer samples. Received: sequence_length={shape.length}"
        )


def is_interactive() -> bool:
    """Returns True if output goes to a terminal or a notebook, which can redraw a line."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def fingerprint(arrays: Any) -> int:
    """Returns a checksum of arrays."""
    parts = (np.asarray(ops.convert_to_numpy(array)) for array in keras.tree.flatten(arrays))
    return zlib.crc32(b"".join(part.tobytes() for part in parts))
