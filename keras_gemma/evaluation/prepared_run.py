"""Task of a run: its selected items, their requests, and the result of lm-eval's evaluation."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import lm_eval.evaluator
import numpy as np
from lm_eval.api.instance import Instance

from keras_gemma.evaluation.answers import ResumableLM
from keras_gemma.evaluation.lm_eval_tasks import PreparedTask, fingerprints, group
from keras_gemma.evaluation.results import TaskResult
from keras_gemma.evaluation.tasks import BenchmarkTask, spaced


@dataclasses.dataclass
class PreparedRun:
    """Task that is ready to run."""

    task: BenchmarkTask
    built: list[PreparedTask]
    protocol: dict[str, Any]
    """Same as in `TaskResult`."""
    too_long: list[list[Any]] = dataclasses.field(default_factory=list)
    """Task of lm-eval and number of each item that is longer than the context."""
    of_items: int = dataclasses.field(init=False)
    """Number of items of the whole task."""

    def __post_init__(self) -> None:
        self.of_items = sum(len(one.eval_docs) for one in self.built)

    @property
    def num_items(self) -> int:
        """Number of selected items."""
        return sum(len(one.item_ids or one.eval_docs) for one in self.built)

    def choose_items(self, count: int | None) -> None:
        """Selects evenly spaced items of a task or a group. `None` selects all."""
        if count is None:
            return
        ids, start = spaced(count, self.of_items), 0
        for one in self.built:
            end = start + len(one.eval_docs)
            one.item_ids = [i - start for i in ids if start <= i < end]
            start = end
        self.built = [one for one in self.built if one.item_ids]

    def prepare(self, chat_template: Callable[..., str] | None) -> list[Instance]:
        """Makes the requests of all selected items."""
        return [request for one in self.built for request in one.prepare(chat_template)]

    def find_too_long(self, lm: ResumableLM) -> None:
        """Sets `too_long`."""
        requests = [request for one in self.built for request in one.instances]
        places = lm.find_truncated(requests)
        ids = {one.config.task: one.item_ids for one in self.built}
        self.too_long = [
            [name, i if ids[name] is None else ids[name][i]] for name, i in sorted(places)
        ]

    def evaluate(self, lm: ResumableLM, chat: bool) -> dict[str, Any]:
        """Returns lm-eval's results of a task."""
        tasks = {one.config.task: one for one in self.built}
        groups = {self.task.name: group(self.task, self.built)} if self.task.is_group else {}
        chosen = {name: one.item_ids for name, one in tasks.items() if one.item_ids is not None}
        return lm_eval.evaluator.evaluate(
            lm,
            {"tasks": tasks, "groups": groups},
            samples=chosen or None,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=True,
        )

    def result(
        self,
        content: Mapping[str, Any],
        card_score: float | None,
        seconds: float,
        tokens: int | None,
    ) -> TaskResult:
        """Returns the result of a task from lm-eval's results."""
        task = self.task
        name = task.name if task.is_group else self.built[0].config.task
        metrics = {**content["results"], **content.get("groups", {})}[name]
        metrics = {
            key: float(value)
            for key, value in metrics.items()
            if isinstance(value, int | float) and math.isfinite(value) and key != "sample_len"
        }
        has_score = task.chance is not None
        return TaskResult(
            task=task.name,
            title=task.title,
            metric=task.metric,
            score=metrics[f"{task.metric},{task.filter}"] if has_score else None,
            stderr=_stderr(task, metrics, content["samples"]) if has_score else None,
            chance=task.chance,
            published=card_score,
            shots=self.protocol["shots"],
            items=self.num_items,
            of_items=self.of_items,
            seconds=round(seconds, 3),
            tokens=tokens,
            metrics=metrics,
            too_long=self.too_long,
            protocol=self.protocol,
            fingerprints=fingerprints(self.built),
        )


def _stderr(
    task: BenchmarkTask, metrics: Mapping[str, float], logs: Mapping[str, Any]
) -> float | None:
    """Returns the standard error of a score. lm-eval has none if a group's task has one item."""
    error = metrics.get(f"{task.metric}_stderr,{task.filter}")
    if error is None and task.is_group:
        items = [item for log in logs.values() for item in log if item["filter"] == task.filter]
        if len(items) > 1:
            error = float(np.std([item[task.metric] for item in items], ddof=1)) / len(items) ** 0.5
    return error
