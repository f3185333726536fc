"""Evaluation of a model on tasks, one after another.

Everything that can be wrong is found before the model runs. All requests are made first, so that
the progress bar knows its end. Then each task is one run of lm-eval, whose result is written at
once.

    OUTPUT/summary.json              scores, protocol and versions
    OUTPUT/results.md, .csv, .png    tables and plot
    OUTPUT/<task>/results_*.json     lm-eval's own results
    OUTPUT/<task>/samples_*.jsonl    lm-eval's log: each item with its prompt and answers
    OUTPUT/answers-<digest>.sqlite   answers of the model, to resume
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from keras_gemma import progress
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.checks import check_bool, check_integer, check_one_of
from keras_gemma.evaluation import programs
from keras_gemma.evaluation.answers import AnswerFile, ResumableLM
from keras_gemma.evaluation.harness import KerasGemmaLM
from keras_gemma.evaluation.lm_eval_tasks import (
    LocalData,
    MissingData,
    RunPrograms,
    build,
    explain_columns,
)
from keras_gemma.evaluation.model_description import describe_model, versions
from keras_gemma.evaluation.prepared_run import PreparedRun
from keras_gemma.evaluation.results import SUMMARY, Results, TaskResult
from keras_gemma.evaluation.task_logs import write_logs
from keras_gemma.evaluation.tasks import (
    GROUPS,
    BenchmarkTask,
    card_shots,
    find_card,
    published,
    select,
)

UNSAFE = "unsafe"
"""Value of `run_programs` that runs programs even where fences are missing."""


def evaluate(
    lm: GemmaCausalLM | LM,
    tasks: str | Iterable[str] = "card",
    data: str | Path | None = None,
    samples: int | None = None,
    shots: int | Literal["card"] = "card",
    output: str | Path | None = None,
    resume: bool = False,
    chat: bool = False,
    run_programs: bool | Literal["unsafe"] = False,
    name: str | None = None,
    on_result: Callable[[TaskResult], None] | None = None,
) -> Results:
    """Measures a model on benchmarks, with lm-eval's prompts and metrics.

    Args:
        lm: A `GemmaCausalLM`, or an LM of lm-eval.
        tasks: Names of tasks, as a list or separated by commas. `"card"` selects those of the
            model's card, `"safety"` those on bias and toxicity, and `"arc_easy:200"` 200 items.
        data: Folder with `<task>/<split>.jsonl`, also compressed as `.gz` or `.xz`. `None`
            downloads the data sets from Hugging Face.
        samples: Number of items per task, evenly spaced. `None` evaluates all. A group such as
            `mmlu` counts as one task.
        shots: Number of few-shot examples. `"card"` is that of the model's card.
        output: Folder for results, and for answers with which a run resumes. `None` writes nothing.
        resume: If True, continues in `output`: finished tasks are kept, and answers used again.
        chat: If True, prompts are written as a conversation, with the model's chat template.
        run_programs: If True, tasks such as HumanEval run programs that the model writes, apart
            from this process. `"unsafe"` also runs them on a system without all fences.
        name: Name of the model for the results and to find its card. `None` finds the card by the
            sizes of the model. An LM of lm-eval with `output` needs a name, which tells its answers
            from those of another model.
        on_result: Called with each result as soon as it is known, also with those that are kept.

    Returns:
        A `Results`, which is a dictionary of a `TaskResult` per task. Its `skipped` has the reason
        for each task without data.

    Raises:
        ValueError: If a task is unknown or runs programs, a column of the data is missing, or
            `output` holds other results.
        FileNotFoundError: If no task has data.

    Example:

    ```python
    from keras_gemma.evaluation import evaluate

    # results = evaluate(lm, "arc_easy,piqa", data="benchmarks", samples=200)
    # print(results.markdown())
    ```
    """
    _check_arguments(lm, samples, shots, resume, chat, run_programs)
    gemma = lm.lm if isinstance(lm, KerasGemmaLM) else lm
    is_gemma = isinstance(gemma, GemmaCausalLM)
    if output is not None and name is None and not is_gemma:
        raise ValueError(
            "`name` must be given with `output` if `lm` is an LM of lm-eval, because other models "
            "of its class have other answers. Received: name=None"
        )
    card = find_card(name, gemma.backbone.config if is_gemma else None)
    selected = select(tasks, card)
    skipped = _without_programs(selected, tasks, run_programs)
    local = LocalData(_check_data(data))
    folder = _check_output(output, resume)
    results = Results(describe_model(gemma, name), versions(), skipped)
    if folder is not None:
        results.update(_read_earlier(folder, results.model))
    answers = AnswerFile(folder and folder / f"answers-{results.model['digest'][:12]}.sqlite")
    meter = Meter()
    with contextlib.closing(answers), meter.watch(lm, answers) as model:
        runs, kept, total = [], [], 0
        with progress.status("Making prompts ..."):
            for task, count in selected.items():
                if task.name in skipped:
                    continue
                task_shots = card_shots(task, card) if shots == "card" else shots
                protocol = {
                    "shots": task.shots if task.has_fixed_shots else task_shots,
                    "samples": count or samples,
                    "chat": chat,
                    "data": local.digests(task),
                    "lm_eval": version("lm_eval"),
                }
                if task.name in results and results[task.name].protocol == protocol:
                    kept.append(results[task.name])
                    continue
                results.pop(task.name, None)
                try:
                    with explain_columns(task, local):
                        runner = _program_runner(task, run_programs)
                        run = PreparedRun(task, build(task, local, task_shots, runner), protocol)
                        run.choose_items(count or samples)
                        requests = run.prepare(model.apply_chat_template if chat else None)
                except (MissingData, ImportError) as error:
                    skipped[task.name] = str(error)
                    continue
                try:
                    total += meter.count(model.missing(requests))
                except ValueError as error:  # New tokens do not fit into the context.
                    skipped[task.name] = str(error)
                    continue
                runs.append(run)
            if not runs and not results:
                raise MissingData("\n".join(skipped.values()))
            local.forget()
        for run in runs:
            run.find_too_long(model)
            if run.too_long:
                items = f"{len(run.too_long):,} of {run.num_items:,} items"
                print(f"{run.task.name}: {items} exceed the context and are cut", file=sys.stderr)
        if on_result is not None:
            for result in kept:
                on_result(result)
        with progress.bar("Evaluating", total) as meter.advance:
            while runs:
                run = runs.pop(0)  # Its requests are freed after its run.
                meter.advance(0, f"Evaluating {run.task.title}")
                start, before = time.monotonic(), meter.read
                content = run.evaluate(model, chat)
                tokens = meter.read - before if meter.counts_tokens else None
                score = published(run.task, card)
                result = run.result(content, score, time.monotonic() - start, tokens)
                results[run.task.name] = result
                if folder is not None:
                    write_logs(folder / run.task.name, content, results.model)
                    results.save(folder)
                if on_result is not None:
                    on_result(result)
    results.sort(task.name for task in selected)
    if folder is not None:
        results.save(folder)
    return results


class Meter:
    """Counter of the tokens that a model reads, or of its answers if it counts no tokens."""

    def __init__(self) -> None:
        self.read = 0
        self.advance: Callable[..., None] | None = None
        """Function of a progress bar."""
        self.count: Callable[[list[Instance]], int] = len
        """Returns the tokens of requests."""
        self.counts_tokens = False

    @contextlib.contextmanager
    def watch(self, lm: GemmaCausalLM | LM, answers: AnswerFile) -> Iterator[ResumableLM]:
        """Yields an LM with `answers` that reports to this meter. `lm` is restored at the end."""
        if isinstance(lm, GemmaCausalLM):
            lm = KerasGemmaLM(lm)
        self.counts_tokens = hasattr(lm, "count_tokens")
        names = ("cache_hook", "report") if self.counts_tokens else ("cache_hook",)
        before = {name: getattr(lm, name) for name in names}
        try:
            if self.counts_tokens:
                self.count, lm.report = lm.count_tokens, self.report
                lm.truncated.clear()
            yield ResumableLM(lm, answers, None if self.counts_tokens else self.report)
        finally:
            for name, value in before.items():
                setattr(lm, name, value)

    def report(self, amount: int) -> None:
        """Adds to what was read."""
        self.read += amount
        if self.advance is not None:
            self.advance(amount)


def _check_arguments(
    lm: Any, samples: Any, shots: Any, resume: Any, chat: Any, run_programs: Any
) -> None:
    if not isinstance(lm, GemmaCausalLM | LM):
        raise TypeError(f"`lm` must be a GemmaCausalLM, or an LM of lm-eval. Received: {lm!r}")
    if isinstance(lm, GemmaCausalLM) and lm.preprocessor is None:
        raise ValueError("`lm` must have a preprocessor, because tasks are texts.")
    if samples is not None:
        check_integer("samples", samples)
    if shots != "card":
        check_integer("shots", shots, 0, advice='Or pass "card".')
    check_bool("resume", resume)
    check_bool("chat", chat)
    check_one_of("run_programs", run_programs, (True, False, UNSAFE))


def _without_programs(
    selected: Mapping[BenchmarkTask, Any], tasks: str | Iterable[str], run_programs: bool | str
) -> dict[str, str]:
    """Returns the reason for each task that is skipped because it runs programs."""
    risky = [task.name for task in selected if task.runs_programs]
    if not risky:
        return {}
    if run_programs:
        programs.check_fences(run_programs == UNSAFE)
        return {}
    names = tasks.split(",") if isinstance(tasks, str) else tasks
    named = {entry.strip().partition(":")[0] for entry in names} - set(GROUPS)
    for name in risky:
        if name in named:
            raise ValueError(
                f"`tasks` has {name}, which runs programs that the model writes. Pass "
                "`run_programs=True` to run them apart from this process."
            )
    reason = "runs programs that the model writes, which needs `run_programs=True`"
    return {name: f"{name} {reason}." for name in risky}


def _program_runner(task: BenchmarkTask, run_programs: bool | str) -> RunPrograms | None:
    """Returns a function that runs the programs of a task."""
    if not task.runs_programs:
        return None
    check = programs.check_humaneval if task.name == "humaneval" else programs.check_mbpp
    is_unsafe = run_programs == UNSAFE

    def run(documents: Sequence[Any], completions: Sequence[str]) -> list[bool]:
        verdicts = programs.run_all(
            lambda document, text: check(document, text, unsafe=is_unsafe), documents, completions
        )
        return [verdict.passed for verdict in verdicts]

    return run


def _check_data(data: str | Path | None) -> Path | None:
    if data is None:
        return None
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`data` must be a folder with one folder per task. Received: data={str(data)!r}"
        )
    return folder


def _check_output(output: str | Path | None, resume: bool) -> Path | None:
    if output is None:
        if resume:
            raise ValueError("`resume=True` needs `output`, the folder of the earlier run.")
        return None
    folder = Path(output).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output` must be a folder. Received: output={str(output)!r}")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            "`output` has files: pass `resume=True` to continue an earlier run, or another folder. "
            f"Received: output={str(output)!r}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read_earlier(folder: Path, model: dict[str, Any]) -> Results | dict[str, TaskResult]:
    """Returns the results of an earlier run of this model in `folder`."""
    if not (folder / SUMMARY).exists():
        return {}
    earlier = Results.load(folder)
    if earlier.model["digest"] != model["digest"]:
        raise ValueError(
            f"`output` holds results of another model or precision ({earlier.model['name']}), or "
            f"of another version of this package. Pass another folder. "
            f"Received: output={str(folder)!r}"
        )
    return earlier
