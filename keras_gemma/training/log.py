"""The figures of a run, a line a step, in a CSV file; and their picture."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

COLUMNS = ("step", "epoch", "loss", "accuracy", "learning_rate", "validation_loss")


class Log:
    """The lines of `path` up to a step, and those that are added.

    Args:
        path: the file.
        steps: how many steps of an earlier run to keep; later ones are taken anew.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if steps and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [_read(row) for row in itertools.islice(csv.DictReader(file), steps)]
        self._write(self.rows, "w")

    def add(self, **row: Any) -> None:
        """A step's figures, by the names in `COLUMNS`."""
        self.rows.append({name: row.get(name) for name in COLUMNS})
        self._write(self.rows[-1:], "a")

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        try:
            with self.path.open(mode, newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if mode == "w":
                    writer.writeheader()
                writer.writerows(rows)
        except OSError as problem:
            raise OSError(
                f"{self.path} could not be written: {problem}. Make room, and run the same again: "
                "it goes on from the last checkpoint."
            ) from problem

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """The steps at which a figure was taken, and the figures."""
        rows = [row for row in self.rows if row[name] is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def figure(self) -> Any:
        """A picture of losses and learning rate over the steps; needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        steps, values = self.column("loss")
        losses.plot(steps, values, color="0.75", linewidth=0.8, label="training, each step")
        losses.plot(steps, smooth(values), color="tab:blue", label="training, smoothed")
        steps, values = self.column("validation_loss")
        if steps:
            losses.plot(steps, values, color="tab:orange", marker="o", label="validation")
        losses.set_ylabel("nats a token")
        losses.legend()
        rates.plot(*self.column("learning_rate"), color="0.4")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("step")
        return figure


def _read(row: dict[str, str]) -> dict[str, Any]:
    whole = {"step", "epoch"}
    return {
        name: None if not row[name] else int(row[name]) if name in whole else float(row[name])
        for name in COLUMNS
    }


def smooth(values: list[float]) -> list[float]:
    """Means over neighbours, as many before as after; fewer at the ends."""
    most, last = round(math.sqrt(len(values)) / 2), len(values) - 1
    smoothed = []
    for i in range(len(values)):
        reach = min(most, i, last - i)
        near = values[i - reach : i + reach + 1]
        smoothed.append(sum(near) / len(near))
    return smoothed
