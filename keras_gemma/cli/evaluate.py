"""`keras-gemma evaluate`: scores of a model on the benchmarks of the model cards."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from typer import BadParameter, Option

from keras_gemma import progress
from keras_gemma.cli.options import (
    DEFAULT_MODEL,
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    Fit,
    JsonOption,
    LoadedQuantization,
    LoraOption,
    ModelOption,
    ModelOptions,
    start,
)
from keras_gemma.cli.printing import make_console, make_table
from keras_gemma.evaluation.tasks import select
from keras_gemma.extras import check_evaluation

if TYPE_CHECKING:
    from keras_gemma.evaluation.results import Results, TaskResult

DATA_HELP = "Folder with TASK/SPLIT.jsonl, also .gz or .xz."


def evaluate(
    tasks: str = Option(
        "card",
        help="Tasks, separated by commas: names, card for the model's card, safety, or arc_easy:200"
        " for 200 items.",
    ),
    model: ModelOption = None,
    lora: LoraOption = None,
    shots: str = Option("card", metavar="card|N", help="Number of few-shot examples."),
    samples: int | None = Option(
        None, min=1, help="Items per task, evenly spaced.", show_default="all"
    ),
    data: Path | None = Option(
        None, help=DATA_HELP, exists=True, file_okay=False, show_default="Hugging Face's data sets"
    ),
    output: Path | None = Option(
        None, "--output", "-o", help="Folder for results, and answers to resume.", file_okay=False
    ),
    resume: bool = Option(False, "--resume", help="Continue the run in OUTPUT."),
    chat: bool = Option(False, "--chat", help="Write prompts with the model's chat template."),
    run_programs: bool = Option(
        False, "--run-programs", help="Run programs that the model writes (humaneval, mbpp)."
    ),
    unsafe_programs: bool = Option(
        False, "--unsafe-programs", help="Run them even if this system cannot fence them all in."
    ),
    fit: Fit = Option("auto", help="Same as in `generate`."),
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices, instead of --fit."
    ),
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a model on benchmarks, with the prompts of lm-evaluation-harness."""
    check_evaluation()
    select(tasks)  # A wrong name is found before the model is loaded.
    if shots != "card" and not shots.isdecimal():
        raise BadParameter("must be card or a number", param_hint="--shots")
    precision = {"fit": fit, "quantization": quantization, "dtype": dtype}
    options = ModelOptions(model=model, lora=lora, device=device, backend=backend, **precision)
    start(backend, device, debug)

    # These imports load Keras on the chosen backend.
    with progress.status("Starting ..."):
        from keras_gemma.cli.loading import find_name, load_model
        from keras_gemma.evaluation.run import evaluate as run

    name = find_name(options, DEFAULT_MODEL)
    lm = load_model(options, name)
    stdout = sys.stdout

    def show_result(result: "TaskResult") -> None:
        line = json.dumps(dataclasses.asdict(result)) if as_json else result.line()
        # The progress bar would send it to the terminal.
        print(line, file=None if stdout.isatty() else stdout, flush=True)

    try:
        results = run(
            lm,
            tasks,
            data,
            samples,
            shots if shots == "card" else int(shots),
            output,
            resume,
            chat,
            "unsafe" if unsafe_programs else run_programs,
            name,
            show_result,
        )
    except KeyboardInterrupt:
        if output is not None:
            print("\nstopped: the same command with --resume continues", file=sys.stderr)
        raise
    for reason in results.skipped.values():
        print(f"skipped: {reason}", file=sys.stderr)
    if not as_json:
        print_results(results)
        if output is not None:
            print(f"results: {output}")


def print_results(*results: "Results") -> None:
    """Prints results as a table. The second of two is compared with the first."""
    last = results[-1]
    titles = ["score"] if len(results) == 1 else ["before", "after"]
    columns = [("", False), ("metric", False), ("shots", True), ("items", True)]
    columns += [(title, True) for title in (*titles, "card", "chance")]
    rows = []
    for name, result in last.items():
        scores = [one[name].percent() for one in results if name in one]
        rows.append(
            (
                result.title,
                result.metric,
                str(result.shots),
                f"{result.items:,}",
                *scores,
                result.percent("published"),
                result.percent("chance"),
            )
        )
    make_console().print(make_table(columns, rows))
