"""A run between its first step and its last: steps, evaluations, checkpoints, what came of it.

Knows a folder, and picks up what an interrupted run left there. What users see is `finetune.py`.
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
from keras_gemma.training.chat_dataset import ChatDataset
from keras_gemma.training.checkpoint import read_facts, read_variables, write_checkpoint
from keras_gemma.training.documents import prompt_ids
from keras_gemma.training.log import Log
from keras_gemma.training.settings import FinetuneSettings

LAST, BEST = "last.safetensors", "best.safetensors"
LOG, CURVES, ADAPTER, MODEL = "log.csv", "curves.png", "adapter", "model"


class Run:
    """A run between its first step and its last."""

    def __init__(
        self,
        lm: GemmaCausalLM,
        data: Any,
        output: Path,
        validation_data: Any,
        settings: FinetuneSettings,
        verbose: bool,
    ) -> None:
        self.lm, self.data, self.output = lm, data, output
        self.validation_data, self.settings = validation_data, settings
        if lm.preprocessor is None:
            raise ValueError("`lm` must have a preprocessor: without one it cannot read or write.")
        lm.adapters.check_trainable()
        if not lm.trainable_variables:
            raise ValueError(
                "`lm` has nothing to train. Call `lm.enable_lora(...)` first, or, for all of its "
                "weights, load it without quantization and set `lm.trainable = True`."
            )
        epoch = getattr(data, "num_batches", None)
        if epoch is None and settings.steps is None:
            raise ValueError("`steps` must be given for data whose length is not known.")
        self.per_epoch = epoch
        self.total = settings.steps or settings.epochs * epoch
        self.interval = settings.interval(self.total, epoch)
        self.best, self.waited, self.done, self.loss = None, 0, 0, math.nan
        self.schedule = self._schedule()
        self._compile()
        self._restore()
        self.log = Log(output / LOG, self.done)
        figures = ["loss", "accuracy"]  # those of the step, not their mean so far
        self.verbose, self.drawn = verbose, verbose and draws_bars()
        self.bar = keras.utils.Progbar(
            self.total, verbose=int(self.drawn), stateful_metrics=figures
        )
        if verbose and self.done:
            print(f"{output}: going on after step {self.done} of {self.total}")

    def _schedule(self) -> Any:
        rising = round(self.settings.warmup * self.total)
        peak, falling = self.settings.learning_rate, max(1, self.total - rising)
        return keras.optimizers.schedules.CosineDecay(
            0.0 if rising else peak,
            falling,
            warmup_target=peak if rising else None,
            warmup_steps=rising,
        )

    def _compile(self) -> None:
        lm, settings = self.lm, self.settings
        lm.backbone.rematerialize = settings.rematerialize
        generation = vars(lm.generation_settings)
        lm.compile(
            optimizer=keras.optimizers.AdamW(
                self.schedule,
                weight_decay=settings.weight_decay,
                global_clipnorm=settings.clip_norm,
                gradient_accumulation_steps=settings.accumulate
                if settings.accumulate > 1
                else None,
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(
                from_logits=True, reduction="mean_with_sample_weight"
            ),
            run_eagerly=lm.run_eagerly,
            **{**generation, "sampler": lm.sampler},
        )
        lm.optimizer.build(lm.trainable_variables)
        lm.stop_training = False

    def variables(self) -> dict[str, Any]:
        """What a checkpoint holds: trained variables, the optimizer's, and the state of chance."""
        groups = {
            "trained": self.lm.trainable_variables,
            "optimizer": self.lm.optimizer.variables,
            "chance": [v for v in self.lm.non_trainable_variables if "seed" in v.path],
        }
        return {
            f"{name}.{i}": variable
            for name, group in groups.items()
            for i, variable in enumerate(group)
        }

    def trained(self) -> dict[str, Any]:
        """The trained variables alone."""
        return {k: v for k, v in self.variables().items() if k.startswith("trained")}

    def facts(self) -> dict[str, Any]:
        """What must be the same when a run goes on."""
        shape = getattr(self.data, "shape", None)
        held_out = self.validation_data
        settings = dataclasses.asdict(self.settings)
        del settings["sample_tokens"]  # changes nothing but what is printed
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
            "batches of validation": held_out and held_out.num_batches,
            "first batch of validation": held_out and fingerprint(held_out[0]),
            "trained shapes": [list(v.shape) for v in self.lm.trainable_variables],
        }

    def _restore(self) -> None:
        path = self.output / LAST
        if isinstance(self.data, ChatDataset):
            self.data.epoch = 0
        self.expected = self.facts()
        if not path.exists():
            self.output.mkdir(parents=True, exist_ok=True)
            return
        known = read_facts(path)
        before = known["facts"]
        differing = [name for name in self.expected if before.get(name) != self.expected[name]]
        if differing:
            changes = ", ".join(
                f"{name}: {before.get(name)!r} then, {self.expected[name]!r} now"
                for name in differing
            )
            raise ValueError(
                f"{self.output} holds a run with other settings ({changes}). Go on with the same "
                "ones, name another `output`, or delete the folder."
            )
        read_variables(path, self.variables())
        self.done, self.best, self.waited = known["step"], known["best"], known["waited"]
        self.loss = known["loss"]

    def batches(self) -> Iterator[Any]:
        """Those that were not learned from yet."""
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

    def steps_left(self) -> Iterator[int]:
        """The numbers of the steps to come, from 1; their batches are laid ready."""
        if self.patience_is_over():
            return
        for step, batch in enumerate(self.batches(), start=self.done + 1):
            self.batch = batch
            yield step

    def place(self, step: int) -> str:
        """Which batch a step reads."""
        if self.per_epoch is None:
            return f"step {step}, batch {step - 1} of the stream"
        epoch, index = divmod(step - 1, self.per_epoch)
        return f"step {step}, batch {index} of epoch {epoch}"

    def take(self, step: int) -> dict[str, Any]:
        """A step; returns its figures."""
        logs = self.lm.train_on_batch(*self.batch, return_dict=True)
        self.loss, accuracy = float(logs["loss"]), float(logs["sparse_categorical_accuracy"])
        if not math.isfinite(self.loss):
            self.diverged(step, f"the loss is {self.loss}")
        self.done = step
        self.row = {
            "step": step,
            "epoch": (step - 1) // self.per_epoch if self.per_epoch else 0,
            "loss": self.loss,
            "accuracy": accuracy,
            "learning_rate": float(self.schedule(step - 1)),
        }
        last = step % self.interval == 0 or step == self.total
        if not last:
            self.log.add(**self.row)
        self.bar.update(step, [("loss", self.loss), ("accuracy", accuracy)], finalize=False)
        return {name: self.row[name] for name in ("loss", "accuracy", "learning_rate")}

    def diverged(self, step: int, what: str) -> None:
        """Stop the run."""
        path = self.output / LAST
        kept = "There is no checkpoint yet"
        if path.exists():
            kept = f"{path}, of step {read_facts(path)['step']}, is whole"
        raise FloatingPointError(
            f"At {self.place(step)}, {what}. {kept}. Look at that batch's samples, or begin anew "
            "in another folder with a smaller `learning_rate` or a longer `warmup`."
        )

    def checkpoint(self, step: int) -> dict[str, Any]:
        """Evaluate, and write where the run stands."""
        for variable in self.lm.trainable_variables:
            if not np.isfinite(ops.convert_to_numpy(ops.sum(ops.abs(variable.value)))):
                self.diverged(step, "weights have become infinite or no numbers")
        logs = {}
        told = f"step {step} of {self.total}: loss {self.loss:.4f}"
        if self.validation_data is not None:
            loss = self.evaluate()
            if not math.isfinite(loss):
                self.diverged(step, f"the validation loss is {loss}")
            logs["val_loss"] = loss
            if self.best is None or loss < self.best:
                self.best, self.waited = loss, 0
                write_checkpoint(self.output / BEST, self.trained(), {"step": step})
            else:
                self.waited += 1
            told += f", validation loss {loss:.4f}, the lowest {self.best:.4f}"
        if self.verbose:
            print(*[""] * self.drawn, told, sep="\n")
        self.log.add(**self.row, validation_loss=logs.get("val_loss"))
        standing = {"step": step, "best": self.best, "waited": self.waited, "loss": self.loss}
        standing["facts"] = self.expected
        write_checkpoint(self.output / LAST, self.variables(), standing)
        return logs

    def evaluate(self) -> float:
        """Nats a token of the validation data, every learned token counted once."""
        total = weight = 0.0
        for i in range(self.validation_data.num_batches):
            x, y, weights = self.validation_data[i]
            logs = self.lm.test_on_batch(x, y, weights, return_dict=True)
            total += float(logs["loss"]) * float(weights.sum())
            weight += float(weights.sum())
        return total / weight

    def show(self, samples: Sequence[str]) -> None:
        """Print what the model answers."""
        tokenizer = self.lm.preprocessor.tokenizer
        for text in samples:
            ids = prompt_ids(tokenizer, text)
            (row,) = self.lm.generate([ids], max_new_tokens=self.settings.sample_tokens)
            print(f"\n> {text}\n{tokenizer.detokenize(row[len(ids) :], skip_special_tokens=True)}")

    def patience_is_over(self) -> bool:
        """Whether the validation loss has not fallen for long enough."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def finish(self) -> Path:
        """Write what was trained, and the picture of the curves; returns where the former is."""
        if (self.output / BEST).exists() and self.best is not None:
            read_variables(self.output / BEST, self.trained())
        if self.lm.active_adapter is not None:
            path = self.output / ADAPTER
            self.lm.save_lora(path)
        else:
            path = self.output / MODEL
            self.lm.save_to_preset(path)
        if self.log.rows and importlib.util.find_spec("matplotlib"):
            self.log.figure().savefig(self.output / CURVES, dpi=150)
        return path


def draws_bars() -> bool:
    """Whether what is printed can be printed over: in a terminal or a notebook."""
    return sys.stdout.isatty() or "ipykernel" in sys.modules


def fingerprint(arrays: Any) -> int:
    """A number that other arrays hardly have."""
    parts = (np.asarray(ops.convert_to_numpy(array)) for array in keras.tree.flatten(arrays))
    return zlib.crc32(b"".join(part.tobytes() for part in parts))
