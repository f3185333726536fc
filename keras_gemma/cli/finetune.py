"""`keras-gemma finetune`: tune a model on conversations or texts, by an adapter or as a whole."""

import importlib.util
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from keras_gemma.cli.options import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    Quantization,
    full_name,
    start,
)


class LossOn(StrEnum):
    """Which tokens of a conversation are learned."""

    ASSISTANT = "assistant"
    ALL = "all"


def finetune(
    data: Annotated[
        Path, typer.Option(help="JSON lines: messages; prompt, completion; instruction; or text.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            help="A folder; with a run in it that was interrupted, to go on.", file_okay=False
        ),
    ],
    model: ModelOption = "gemma_tiny_en",
    validation: Annotated[
        Path | None, typer.Option(help="JSON lines to evaluate on; the best weights are kept.")
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Train all weights instead of an adapter (LoRA); where they are bfloat16, in "
            "float32, and compute in bfloat16.",
        ),
    ] = False,
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter.")] = 8,
    alpha: Annotated[float, typer.Option(help="Of the adapter: it counts alpha / rank.")] = 16,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A matrix with an adapter, or all-linear; repeat.  [query, value]"),
    ] = None,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="Of the adapter.")] = 0.0,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Bits of the frozen matrices (QLoRA).")
    ] = None,
    dtype: DtypeOption = None,
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a row.")] = 1024,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 1,
    packing: Annotated[
        bool, typer.Option(help="Several samples in a row; none sees another.")
    ] = True,
    loss_on: Annotated[LossOn, typer.Option(help="What is learned.")] = LossOn.ASSISTANT,
    truncate: Annotated[
        bool, typer.Option("--truncate", help="Cut samples that are too long, and count them.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out lines that are bad, and count them.")
    ] = False,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of --epochs.")] = None,
    learning_rate: Annotated[float, typer.Option(help="The highest.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps in which it rises.")] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    accumulate: Annotated[int, typer.Option(min=1, help="Steps that make one update.")] = 1,
    evaluate_every: Annotated[
        int | None, typer.Option(min=1, help="Steps; and of checkpoints.  [an epoch, or a tenth]")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="Evaluations without progress before it stops.")
    ] = None,
    rematerialize: Annotated[
        bool, typer.Option("--rematerialize", help="Less memory, a third more time.")
    ] = False,
    sample: Annotated[
        list[str] | None, typer.Option(help="A question to answer at each checkpoint; repeat.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="A folder for TensorBoard; needs TensorFlow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the adapter and of the order.")] = 0,
    backend: BackendOption = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Tune a model on DATA; write adapter, log and curves to OUTPUT. Run again to go on."""
    if full and quantization:
        raise typer.BadParameter("quantized weights are not trained", param_hint="--full")
    if patience and not validation:
        raise typer.BadParameter("needs --validation", param_hint="--patience")
    for path in filter(None, (data, validation)):
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {path}.")
    if tensorboard and not all(map(importlib.util.find_spec, ("tensorflow", "tensorboard"))):
        raise ImportError("--tensorboard needs both: pip install tensorflow tensorboard")
    start(backend, device, debug)

    # Imports Keras, on the chosen backend.
    import keras

    from keras_gemma import training
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.cli.loading import stored_dtype
    from keras_gemma.text.tokenizer import GemmaTokenizer
    from keras_gemma.training.training_run import LAST

    model = full_name(model)
    tokenizer = GemmaTokenizer.from_preset(model)
    rows = {"sequence_length": sequence_length, "packing": packing, "loss_on": loss_on.value}
    rows |= {"batch_size": batch_size, "truncate": truncate, "skip_bad": skip_bad, "seed": seed}
    train = training.chat_dataset(data, tokenizer, **rows)  # before the weights are read
    print(f"{data}: {train.describe()}")
    for reason in train.counts.reasons:
        print(f"left out: {reason}")
    held_out = validation and training.chat_dataset(validation, tokenizer, **rows, shuffle=False)
    if held_out:
        print(f"{validation}: {held_out.describe()}")

    keras.utils.set_random_seed(seed)
    bits = {"quantization": quantization.value} if quantization else {}
    policy = dtype and dtype.value
    if full and policy is None and stored_dtype(model) == "bfloat16":
        policy = "mixed_bfloat16"  # in bfloat16 alone, small updates would be rounded away
    lm = GemmaCausalLM.from_preset(model, dtype=policy, **bits)
    if not full:
        lm.enable_lora(rank, target or None, alpha, dropout, seed=seed)
    try:
        result = training.finetune(
            lm,
            train,
            output,
            validation_data=held_out,
            samples=sample or (),
            callbacks=[keras.callbacks.TensorBoard(str(tensorboard))] if tensorboard else (),
            epochs=epochs,
            steps=steps,
            learning_rate=learning_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            accumulate=accumulate,
            evaluate_every=evaluate_every,
            patience=patience,
            rematerialize=rematerialize,
        )
    except KeyboardInterrupt:
        kept = "goes on from the last checkpoint" if (output / LAST).exists() else "begins anew"
        print(f"\nstopped: the same command {kept}", file=sys.stderr)
        raise
    print(f"\n{result.steps} steps, loss {result.loss:.4f}", end="")
    if result.validation_loss is not None:
        print(f", validation loss {result.validation_loss:.4f}", end="")
    print(f"{', stopped early' if result.stopped_early else ''}: {result.path}")
