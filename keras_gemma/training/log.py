"""Metrics of a training run, one CSV line per step, and their plot."""

import csv
import itertools
import math
from pathlib import Path
from typing import Any

from keras_gemma.extras import install_hint

COLUMNS = ("step", "epoch", "loss", "accuracy", "learning_rate", "validation_loss")


class Log:
    """Metrics of a run, which are written to a CSV file at every step.

    Args:
        path: Path of the file.
        steps: Number of steps of an interrupted run to keep. Later steps are dropped.
    """

    def __init__(self, path: Path, steps: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if steps and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [_read(row) for row in itertools.islice(csv.DictReader(file), steps)]
        self._write(self.rows, "w")

    def add(self, **row: Any) -> None:
        """Adds the metrics of a step, by the names in `COLUMNS`."""
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
                f"{self.path} could not be written: {problem}. Free disk space, and run the same "
                "call again to continue from the last checkpoint."
            ) from problem

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """Returns the steps that have a metric, and its values."""
        rows = [row for row in self.rows if row[name] is not None]
        return [row["step"] for row in rows], [row[name] for row in rows]

    def figure(self) -> Any:
        """Plots losses and learning rate over the steps; requires matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                f"Plots need matplotlib. {install_hint('plots')} The file {self.path} has the "
                "numbers."
            ) from error

        figure = Figure(figsize=(8, 5), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        steps, values = self.column("loss")
        losses.plot(steps, values, color="0.75", linewidth=0.8, label="training, every step")
        losses.plot(steps, smooth(values), color="tab:blue", label="training, smoothed")
        steps, values = self.column("validation_loss")
        if steps:
            losses.plot(steps, values, color="tab:orange", marker="o", label="validation")
        losses.set_ylabel("nats per token")
        losses.legend()
        rates.plot(*self.column("learning_rate"), color="0.4")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("step")
        return figure


def is_log(path: Path) -> bool:
    """Returns True if `path` is a file that `Log` wrote."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.readline().strip() == ",".join(COLUMNS)


def _read(row: dict[str, str]) -> dict[str, Any]:
    types = {"step": int, "epoch": int}
    return {n: types.get(n, float)(row[n]) if row[n] else None for n in COLUMNS}


def smooth(values: list[float]) -> list[float]:
    """Returns moving averages over centered windows, which are shorter at the ends."""
    max_radius, last = round(math.sqrt(len(values)) / 2), len(values) - 1
    smoothed = []
    for i in range(len(values)):
        radius = min(max_radius, i, last - i)
        window = values[i - radius : i + radius + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed
