"""`keras-gemma finetune`: train an adapter, or all weights, on conversations or texts."""

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from typer import BadParameter, Option

from keras_gemma.cli.convert import check_target
from keras_gemma.cli.evaluate import DATA_HELP, print_results
from keras_gemma.cli.options import (
    DEFAULT_CHAT_MODEL,
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    LoadedQuantization,
    ModelOption,
    OverwriteOption,
    full_name,
    start,
)
from keras_gemma.evaluation.tasks import select
from keras_gemma.extras import check_evaluation

if TYPE_CHECKING:
    from keras_gemma.evaluation.results import Results


def finetune(
    data: Path = Option(help="JSON Lines: messages; prompt, completion; instruction; or text."),
    output: Path = Option(
        ...,
        "--output",
        "-o",
        help="Folder to write. An interrupted run in it is resumed.",
        file_okay=False,
    ),
    model: ModelOption = DEFAULT_CHAT_MODEL,
    validation: Path | None = Option(
        None, help="JSON Lines to evaluate on. The best weights are kept."
    ),
    full: bool = Option(
        False,
        "--full",
        help="Train all weights instead of a LoRA adapter. A bfloat16 model is trained in "
        "mixed precision: float32 weights, bfloat16 computations.",
    ),
    rank: int = Option(8, min=1, help="Rank of the adapter."),
    alpha: float = Option(16, help="The adapter is scaled by alpha / rank."),
    target: list[str] = Option(
        [], help="Matrix to adapt, such as query. Can be repeated.", show_default="all-linear"
    ),
    dropout: float = Option(0.0, min=0, max=0.99, help="Dropout of the adapter."),
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the frozen matrices (QLoRA)."
    ),
    dtype: DtypeOption = None,
    sequence_length: int | None = Option(
        None,
        min=1,
        help="Tokens per row.",
        show_default="the longest sample; more for large data, up to 1024 or the context",
    ),
    batch_size: int = Option(1, min=1, help="Rows per step."),
    packing: bool = Option(
        True, help="Pack several samples into a row. Each attends only to itself."
    ),
    loss_on: Literal["assistant", "all"] = Option(
        "assistant", help="Tokens that count in the loss."
    ),
    truncate: bool = Option(
        False, "--truncate", help="Truncate samples that are too long, and report their number."
    ),
    skip_bad: bool = Option(False, "--skip-bad", help="Skip invalid lines, and count them."),
    epochs: int | None = Option(
        None, min=1, help="Passes over the data.", show_default="enough for 200 updates"
    ),
    steps: int | None = Option(None, min=1, help="Number of steps, instead of --epochs."),
    learning_rate: float | None = Option(
        None,
        min=0,
        help="Peak learning rate.",
        show_default="2e-4 for Gemma 1 2B, more for smaller models; a tenth with --full",
    ),
    warmup: float = Option(0.05, min=0, max=0.99, help="Share of the steps with a rising rate."),
    weight_decay: float = Option(0.0, min=0, max=0.99, help="Weight decay of AdamW."),
    accumulate: int = Option(1, min=1, help="Steps per weight update."),
    evaluate_every: int | None = Option(
        None,
        min=1,
        help="Steps between evaluations, which also write checkpoints.",
        show_default="an epoch, at most a tenth of the steps",
    ),
    patience: int | None = Option(
        None, min=1, help="Evaluations without progress before training stops."
    ),
    rematerialize: bool = Option(
        False, "--rematerialize", help="Use less memory and a third more time."
    ),
    evaluate: str | None = Option(
        None,
        metavar="TASKS",
        help="Benchmarks to run before and after, such as arc_easy:200. See `evaluate`.",
    ),
    evaluate_data: Path | None = Option(
        None,
        help=f"Data of --evaluate. {DATA_HELP}",
        exists=True,
        file_okay=False,
        show_default="Hugging Face's data sets",
    ),
    sample: list[str] = Option([], help="Question to answer at each checkpoint. Can be repeated."),
    tensorboard: Path | None = Option(None, help="Folder of TensorBoard logs. Needs TensorFlow."),
    seed: int = Option(0, help="Random seed of the adapter and the order of samples."),
    overwrite: OverwriteOption = False,
    backend: BackendOption = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Train a model on DATA. Write adapter, log and curves to OUTPUT. Run again to resume."""
    if full and quantization:
        raise BadParameter("quantized weights cannot be trained", param_hint="--full")
    if evaluate_data and not evaluate:
        raise BadParameter("needs --evaluate", param_hint="--evaluate-data")
    if evaluate:
        check_evaluation()
        select(evaluate)  # A wrong name is found before training.
    if patience and not validation:
        raise BadParameter("needs --validation", param_hint="--patience")
    for path in filter(None, (data, validation)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, or is not a file.")
    if tensorboard and not all(map(importlib.util.find_spec, ("tensorflow", "tensorboard"))):
        raise ImportError("--tensorboard needs two packages: pip install tensorflow tensorboard")
    start(backend, device, debug)

    # These imports load Keras on the chosen backend.
    import keras

    from keras_gemma import training
    from keras_gemma.causal_lm.model import GemmaCausalLM
    from keras_gemma.cli.loading import read_config, stored_dtype
    from keras_gemma.text.tokenizer import GemmaTokenizer
    from keras_gemma.training.training_run import LAST, RUNS

    settings = {
        "epochs": epochs,
        "steps": steps,
        "learning_rate": learning_rate,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "accumulate": accumulate,
        "evaluate_every": evaluate_every,
        "patience": patience,
        "rematerialize": rematerialize,
    }
    training.FinetuneSettings(**settings)  # checks them
    check_target(output, RUNS, True, "output", in_place=True)  # An earlier run is continued.
    model = full_name(model)
    context = read_config(model).context_length
    if sequence_length is not None and sequence_length > context:
        raise BadParameter(
            f"{sequence_length} tokens do not fit into the context of {model}, which has {context}",
            param_hint="--sequence-length",
        )
    tokenizer = GemmaTokenizer.from_preset(model)
    rows = {"sequence_length": sequence_length, "max_sequence_length": min(1024, context)}
    rows |= {"packing": packing, "loss_on": loss_on}
    rows |= {"batch_size": batch_size, "truncate": truncate, "skip_bad": skip_bad, "seed": seed}
    train = training.chat_dataset(data, tokenizer, **rows)  # before the weights are read
    print(f"{data}: {train.describe()}")
    for reason in train.counts.reasons:
        print(f"skipped: {reason}")
    held_out = validation and training.chat_dataset(validation, tokenizer, **rows, shuffle=False)
    if held_out:
        print(f"{validation}: {held_out.describe()}")

    keras.utils.set_random_seed(seed)
    policy = dtype
    if full and policy is None and stored_dtype(model) == "bfloat16":
        policy = "mixed_bfloat16"  # Pure bfloat16 would round small updates to zero.
    arguments = {"quantization": quantization} if quantization else {}
    lm = GemmaCausalLM.from_preset(model, dtype=policy, **arguments)
    if not full:
        lm.enable_lora(rank, target or "all-linear", alpha, dropout, seed=seed)
    scores = [measure(lm, evaluate, evaluate_data)] if evaluate else []
    try:
        result = training.finetune(
            lm,
            train,
            output,
            validation_data=held_out,
            samples=sample,
            callbacks=[keras.callbacks.TensorBoard(str(tensorboard))] if tensorboard else (),
            overwrite=overwrite,
            **settings,
        )
    except KeyboardInterrupt:
        place = "from the last checkpoint" if (output / LAST).exists() else "from the beginning"
        print(f"\nstopped: the same command continues {place}", file=sys.stderr)
        raise
    print(f"\n{result.steps} step{'s' * (result.steps != 1)}, loss {result.loss:.4f}", end="")
    if result.validation_loss is not None:
        print(f", validation loss {result.validation_loss:.4f}", end="")
    print(f"{', stopped early' if result.stopped_early else ''}: {result.path}")
    if evaluate:
        scores.append(measure(lm, evaluate, evaluate_data))
        print_results(*scores)
    has_turns = tokenizer.token_to_id("<start_of_turn>") in train.rows[0][0].inputs
    command = ["keras-gemma", "chat" if has_turns else "generate", "--model"]
    command += [str(result.path)] if full else [model, "--lora", str(result.path)]
    print(f"Try it: {shlex.join(command)}")


def measure(lm: Any, tasks: str, data: Path | None) -> "Results":
    """Returns the scores of a model on benchmarks."""
    from keras_gemma.evaluation.run import evaluate

    results = evaluate(lm, tasks, data)
    for reason in results.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    return results
