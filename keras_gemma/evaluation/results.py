"""Scores of a model with their errors: tables, a plot and files.

Knows no lm-eval, so that results are read without it. A score is between 0 and 1 in Python and in
`summary.json`, and in percent in tables and plots.
"""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_gemma.evaluation.estimates import NORMAL_95
from keras_gemma.extras import install_hint, is_installed

SUMMARY = "summary.json"
"""File with everything but the answers."""

COLUMNS = (
    "task",
    "metric",
    "shots",
    "items",
    "score",
    "stderr",
    "chance",
    "published",
    "seconds",
    "tokens",
)
"""Columns of the CSV file."""


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """Score of one task."""

    task: str
    title: str
    metric: str
    score: float | None
    """Score from 0 to 1. `None` if the task needs a judge."""
    stderr: float | None
    """Standard error of the score."""
    chance: float | None
    """Score of random answers."""
    published: float | None
    """Score on the model's card."""
    shots: int
    items: int
    of_items: int
    """Number of items of the whole task."""
    seconds: float
    """Time of the model, without answers from an earlier run."""
    tokens: int | None
    """Tokens that the model read for new answers. `None` if it counts none."""
    metrics: dict[str, float]
    """All metrics of lm-eval, by names such as `"acc_norm,none"`."""
    too_long: list[list[Any]]
    """Items that are longer than the context: lm-eval's task, and the number of the item."""
    protocol: dict[str, Any]
    """Everything that must be equal, so that a resumed run keeps this result."""
    fingerprints: dict[str, str] = dataclasses.field(default_factory=dict)
    """Fingerprint of each data set of Hugging Face, by its name."""

    def percent(self, field: str = "score") -> str:
        """Returns a score in percent, with its standard error, or `"-"`."""
        score = getattr(self, field)
        if score is None:
            return "-"
        error = self.stderr if field == "score" else None
        return f"{100 * score:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")

    def line(self) -> str:
        """Returns the result in one line of text."""
        parts = [f"{self.task}: {self.percent()}"]
        parts.append(f"{self.metric}, {self.shots} shots, {self.items:,} items")
        if self.published is not None:
            parts.append(f"card {self.percent('published')}{self._difference()}")
        if self.chance is not None:
            parts.append(f"chance {self.percent('chance')}")
        if self.too_long:
            parts.append(f"{len(self.too_long):,} longer than the context")
        parts.append(f"{self.seconds:,.0f} s")
        return "; ".join(parts)

    def _difference(self) -> str:
        if not self.stderr or self.score is None:
            return ""
        return f" ({(self.score - self.published) / self.stderr:+.1f} standard errors)"


class Results(dict[str, TaskResult]):
    """Results by task.

    Args:
        model: Description of the model: its name, the digest of its weights, precision, backend.
        versions: Versions of the packages.
        skipped: Reason for each task that did not run.
        results: Results by task.
    """

    def __init__(
        self,
        model: dict[str, Any],
        versions: dict[str, str],
        skipped: dict[str, str] | None = None,
        results: dict[str, TaskResult] | None = None,
    ) -> None:
        super().__init__(results or {})
        self.model = model
        self.versions = versions
        self.skipped = {} if skipped is None else skipped

    def sort(self, names: Iterable[str]) -> None:
        """Puts the tasks `names` at the end, in their order."""
        for name in names:
            if name in self:
                self[name] = self.pop(name)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `summary.json`."""
        return {
            "model": self.model,
            "versions": self.versions,
            "tasks": {name: dataclasses.asdict(result) for name, result in self.items()},
            "skipped": self.skipped,
        }

    def markdown(self) -> str:
        """Returns a table in Markdown, in percent."""
        titles = ("task", "shots", "items", "metric", "score", "card", "chance")
        rows = []
        for result in self.values():
            items = f"{result.items:,}"
            if result.items < result.of_items:
                items += f" of {result.of_items:,}"
            cells = (
                result.title,
                str(result.shots),
                items,
                result.metric,
                result.percent(),
                result.percent("published"),
                result.percent("chance"),
            )
            rows.append(cells)
        return markdown_table(titles, rows, {*titles} - {"task", "metric"}) + "\n"

    def csv(self) -> str:
        """Returns a table in CSV. Scores are between 0 and 1."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for result in self.values():
            writer.writerow([getattr(result, name) for name in COLUMNS])
        return file.getvalue()

    def figure(self) -> Any:
        """Plots the scores as bars with ± 1.96 standard errors, chance, and the card's scores.

        Returns:
            A matplotlib figure.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(f"Plots need matplotlib. {install_hint('plots')}") from error

        shown = [result for result in self.values() if result.score is not None]
        places = range(len(shown))
        figure = Figure(figsize=(7, 1.5 + 0.35 * len(shown)), layout="constrained")
        axes = figure.subplots()
        errors = [100 * NORMAL_95 * (result.stderr or 0) for result in shown]
        scores = [100 * result.score for result in shown]
        axes.barh(places, scores, xerr=errors, color="#56B4E9", capsize=3, label="measured")
        chance = [(i, 100 * r.chance) for i, r in enumerate(shown) if r.chance]
        cards = [(i, 100 * r.published) for i, r in enumerate(shown) if r.published is not None]
        for marks, style in (
            (chance, {"marker": "|", "s": 250, "color": "0.3", "label": "chance"}),
            (cards, {"marker": "D", "s": 30, "color": "#D55E00", "label": "model card"}),
        ):
            if marks:
                axes.scatter([x for _, x in marks], [y for y, _ in marks], zorder=3, **style)
        axes.set_yticks(places, [result.title for result in shown])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("score in percent, with ± 1.96 standard errors")
        axes.set_title(str(self.model.get("name", "")))
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        return figure

    def save(self, folder: Path) -> None:
        """Writes summary, tables and, if matplotlib is installed, the plot. Each file is replaced
        when the new one is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / "results.md", self.markdown())
        write_file(folder / "results.csv", self.csv())
        if is_installed("matplotlib"):
            image = io.BytesIO()
            self.figure().savefig(image, format="png", dpi=150)
            write_file(folder / "results.png", image.getvalue())
        write_file(folder / SUMMARY, json.dumps(self.to_dict(), indent=2, ensure_ascii=False))

    @classmethod
    def load(cls, folder: str | Path) -> "Results":
        """Returns the results that `save` wrote into a folder.

        Raises:
            ValueError: If the file is damaged.
        """
        path = Path(folder).expanduser() / SUMMARY
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tasks = {name: TaskResult(**fields) for name, fields in content["tasks"].items()}
            return cls(content["model"], content["versions"], content["skipped"], tasks)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged: {error!r}. Delete it; answers are kept in another file."
            ) from error


def markdown_table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[str] = ()
) -> str:
    """Returns a table in Markdown. The columns with the titles `numbers` are aligned right."""

    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = "".join("--:|" if title in numbers else "---|" for title in titles)
    return "\n".join([line(titles), f"|{rule}", *map(line, rows)])


def write_file(path: Path, content: str | bytes) -> None:
    """Writes a file that replaces an earlier one when it is complete."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    os.replace(scratch, path)
