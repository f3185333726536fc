"""Evaluated models next to each other: means, paired differences, tables and a plot.

Reads the folders that `evaluate(output=...)` writes, and knows neither models nor lm-eval.
"""

import dataclasses
import json
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keras_gemma.evaluation.estimates import NORMAL_95, Estimate, average, paired_difference
from keras_gemma.evaluation.results import SUMMARY, Results, TaskResult, markdown_table
from keras_gemma.evaluation.tasks import TASKS
from keras_gemma.extras import install_hint

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colors of models, from Okabe and Ito's palette for color blindness."""

UNRANKED_METRICS = ("pct_stereotype",)
"""Metrics without a better direction. They are in tables, but not in means."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One evaluated model: its name, its folder, and its results by task, without unscored ones."""

    name: str
    folder: Path
    model: Mapping[str, Any]
    tasks: Mapping[str, TaskResult]

    @property
    def precision(self) -> str:
        """Data type, and quantization if the model has one."""
        parts = (self.model.get("dtype"), self.model.get("quantization"))
        return ", ".join(str(part) for part in parts if part)

    def score(self, task: str) -> Estimate:
        result = self.tasks[task]
        stderr = math.nan if result.stderr is None else result.stderr
        return Estimate(result.score, stderr, result.items)

    def above_chance(self, task: str) -> Estimate:
        """Returns the score on a scale where chance is 0 and a perfect model is 1."""
        score, chance = self.score(task), self.tasks[task].chance or 0.0
        rest = 1 - chance
        return Estimate((score.mean - chance) / rest, score.stderr / rest, score.count)

    def values(self, task: str) -> dict[Hashable, tuple[float, Any]]:
        """Returns the value of the metric, and the hash of the document, for each item.

        An item is a document of one of lm-eval's tasks, whose name is in the file's name.
        """
        values = {}
        paths = sorted((self.folder / task).glob("samples_*.jsonl"))
        if not paths:
            raise FileNotFoundError(
                f"{self.folder / task} has no log of items, samples_*.jsonl. Evaluate the task "
                "again, with `output`."
            )
        for path in paths:
            name = path.stem.removeprefix("samples_").rpartition("_")[0]
            for document, value in _read_log(path, self.tasks[task].metric, _filter(task)):
                values.setdefault((name, document), value)
        return values


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of a leaderboard, with means over the common tasks that have a better direction.

    `differences` has the paired difference from the reference for each task, and `difference`
    their mean, whose `count` is the number of shared items. Both are empty for the reference.
    """

    entry: Entry
    mean: Estimate
    above_chance: Estimate
    difference: Estimate | None
    differences: Mapping[str, Estimate]


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """Several models on the tasks that all have, in the order of their folders."""

    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    reference: Entry

    def as_dicts(self) -> list[dict[str, Any]]:
        """Returns one JSON object per model."""
        return [
            {
                "name": row.entry.name,
                "folder": str(row.entry.folder),
                "reference": self.reference.name,
                "mean": row.mean.as_dict(),
                "above_chance": row.above_chance.as_dict(),
                "difference": row.difference and row.difference.as_dict(),
                "tasks": {
                    task: {
                        "metric": row.entry.tasks[task].metric,
                        "score": row.entry.score(task).as_dict(),
                        "difference": row.differences[task].as_dict() if row.differences else None,
                    }
                    for task in self.tasks
                },
            }
            for row in self.rows
        ]

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Returns titles and cells of two tables: one row per model, and one row per task.

        Scores are in percent, with one standard error.
        """
        titles = ["model", "precision", "backend", "mean", "above chance", "difference", "items"]
        models = [
            [
                row.entry.name,
                row.entry.precision,
                str(row.entry.model.get("backend", "")),
                row.mean.in_percent(),
                row.above_chance.in_percent(),
                row.difference.in_percent("+") if row.difference else "reference",
                f"{row.difference.count:,}" if row.difference else "",
            ]
            for row in self.rows
        ]
        scores = [[task, *self._task_cells(task)] for task in self.tasks]
        names = [row.entry.name for row in self.rows]
        return [
            (titles, models),
            (["task", "metric", "shots", "chance", "published", *names], scores),
        ]

    def _task_cells(self, task: str) -> list[str]:
        tasks = [row.entry.tasks[task] for row in self.rows]
        first = tasks[0]
        shots = dict.fromkeys(str(score.shots) for score in tasks)
        published = dict.fromkeys(
            f"{100 * score.published:.1f}" for score in tasks if score.published is not None
        )
        chance = "" if first.chance is None else f"{100 * first.chance:.1f}"
        cells = [first.metric, "/".join(shots), chance, "/".join(published)]
        for row in self.rows:
            text = row.entry.score(task).in_percent()
            if row.differences:
                text += f" ({row.differences[task].in_percent('+')})"
            cells.append(text)
        return cells

    def to_markdown(self) -> str:
        """Returns both tables in Markdown."""
        return "\n\n".join(markdown_table(*table) for table in self.tables())

    def figure(self) -> Any:
        """Plots the scores with 95 % intervals, chance, and the published scores.

        Returns:
            A matplotlib figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"Plots need matplotlib. {install_hint('plots')} The tables work without it."
            ) from error
        width = 0.8 / len(self.rows)
        figure = Figure((max(6.0, 1.5 + 1.1 * len(self.tasks)), 4.5), layout="constrained")
        axes = figure.add_subplot()
        marks: list[tuple[float, float]] = []
        for i, row in enumerate(self.rows):
            results = [row.entry.tasks[task] for task in self.tasks]
            scores = [row.entry.score(task) for task in self.tasks]
            places = [j - 0.4 + width * (i + 0.5) for j in range(len(scores))]
            axes.bar(
                places,
                [100 * score.mean for score in scores],
                width * 0.9,
                yerr=[100 * NORMAL_95 * score.stderr for score in scores],
                color=COLORS[i % len(COLORS)],
                ecolor="#555555",
                capsize=2,
                label=row.entry.name.replace("$", r"\$"),
            )
            marks += [
                (place, 100 * result.published)
                for place, result in zip(places, results, strict=True)
                if result.published is not None
            ]
        if marks:
            style = {"marker": "D", "s": 18, "c": "white", "edgecolors": "black", "zorder": 3}
            axes.scatter(*zip(*marks, strict=True), label="published", **style)
        first = self.rows[0].entry
        chances = [100 * (first.tasks[task].chance or 0) for task in self.tasks]
        edges = [[j + side for j in range(len(chances))] for side in (-0.45, 0.45)]
        axes.hlines(chances, *edges, colors="black", linestyles="dashed", lw=1, label="chance")
        labels = [f"{task} ({first.tasks[task].metric})" for task in self.tasks]
        axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=9)
        axes.set_ylabel("score, percent")
        figure.legend(fontsize=8, loc="outside upper center", ncols=2, frameon=False)
        return figure


def compare(folders: Iterable[str | Path], reference: str = "first") -> Leaderboard:
    """Returns the leaderboard of evaluated models.

    Args:
        folders: Folders that `evaluate` wrote, at least one.
        reference: Model that the others are compared with: `"first"`, or `"best"` by its mean above
            chance.

    Raises:
        FileNotFoundError: If a folder has no `summary.json`, or the file of a task is missing.
        ValueError: If a file is damaged, the models have no common task, or they answered a task
            with another metric or protocol (shots, chat, data), or on different items.
    """
    entries = _distinct([read_entry(Path(folder)) for folder in folders])
    if not entries:
        raise ValueError("`folders` must have at least one folder. Received: []")
    if reference not in ("first", "best"):
        raise ValueError(f"`reference` must be 'first' or 'best'. Received: {reference!r}")
    tasks = tuple(t for t in entries[0].tasks if all(t in entry.tasks for entry in entries))
    if not tasks:
        lists = "; ".join(f"{entry.folder}: {', '.join(entry.tasks)}" for entry in entries)
        raise ValueError(f"`folders` must have at least one common task. Received: {lists}")
    for task in tasks:
        for entry in entries[1:]:
            _check_protocol(task, entries[0], entry)
        metrics = {entry.tasks[task].metric for entry in entries}
        if len(metrics) > 1:
            raise ValueError(
                f"The folders must have the same metric for {task}. Evaluate it again. "
                f"Received: {', '.join(sorted(metrics))}"
            )

    ranked = [t for t in tasks if entries[0].tasks[t].metric not in UNRANKED_METRICS] or tasks
    above_chance = {
        entry.folder: average(entry.above_chance(task) for task in ranked) for entry in entries
    }
    base = entries[0]
    if reference == "best":
        base = max(entries, key=lambda entry: above_chance[entry.folder].mean)
    base_values = {task: base.values(task) for task in tasks} if entries[1:] else {}
    rows = []
    for entry in entries:
        mean = average(entry.score(task) for task in ranked)
        differences = {}
        if entry is not base:
            for task in tasks:
                places = f"{task} in {base.folder} and {entry.folder}"
                values = entry.values(task)
                differences[task] = paired_difference(base_values[task], values, places)
        difference = average(differences[task] for task in ranked) if differences else None
        rows.append(Row(entry, mean, above_chance[entry.folder], difference, differences))
    return Leaderboard(tasks, tuple(rows), base)


def read_entry(folder: Path) -> Entry:
    """Returns the evaluated model in a folder.

    Raises:
        FileNotFoundError: If the folder has no summary.
        ValueError: If the summary is damaged.
    """
    if not (folder / SUMMARY).is_file():
        raise FileNotFoundError(
            f"`folders` must be folders that `evaluate` wrote. Received: {folder}, which has no "
            f"{SUMMARY}"
        )
    results = Results.load(folder)
    tasks = {name: result for name, result in results.items() if result.score is not None}
    return Entry(str(results.model.get("name", folder.name)), folder, results.model, tasks)


def _check_protocol(task: str, first: Entry, other: Entry) -> None:
    """Checks that two models answered the same prompts. Their numbers of items may differ."""
    a, b = first.tasks[task].protocol, other.tasks[task].protocol
    names = sorted(n for n in {*a, *b} - {"samples"} if a.get(n) != b.get(n))
    if names:
        values = "; ".join(f"{name}={a.get(name)!r:.80} and {b.get(name)!r:.80}" for name in names)
        raise ValueError(
            f"The folders must have the same {', '.join(names)} for {task}. Evaluate it again with "
            f"the same options. Received: {first.folder} and {other.folder} with {values}"
        )


def _filter(task: str) -> str:
    """Returns the filter of the answers whose metric is the score."""
    return TASKS[task].filter if task in TASKS else "none"


def _read_log(path: Path, metric: str, chosen: str) -> Iterable[tuple[Any, tuple[float, Any]]]:
    """Yields document, value of the metric and hash of the document, for each item of a log."""
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            item = json.loads(line)
            if item["filter"] == chosen:
                yield item["doc_id"], (float(item[metric]), item.get("doc_hash"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with `doc_id`, `filter` and a number "
                f"`{metric}`. Evaluate the task again. Received: {line!r:.80}"
            ) from error


def _distinct(entries: Sequence[Entry]) -> list[Entry]:
    """Returns the entries, with the folder in the name of those that have the same name."""
    names = [entry.name for entry in entries]
    is_short = len({entry.folder.name for entry in entries}) == len(entries)
    return [
        dataclasses.replace(
            entry, name=f"{entry.name} ({entry.folder.name if is_short else entry.folder})"
        )
        if names.count(entry.name) > 1
        else entry
        for entry in entries
    ]
