"""Means with standard errors, and paired differences between two models.

Differences are paired: both models answer the same items, so most of an item's difficulty cancels.
Standard errors are those of a mean of n differences, `sd / sqrt(n)`, and tasks are independent.
"""

import dataclasses
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

NORMAL_95 = 1.96
"""Half of the 95 % interval of a normal distribution, in standard errors."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean with its standard error, and the number of items or tasks in it.

    The standard error is NaN if it is unknown.
    """

    mean: float
    stderr: float
    count: int

    def as_dict(self) -> dict[str, float | int | None]:
        stderr = None if math.isnan(self.stderr) else self.stderr
        return {"mean": self.mean, "stderr": stderr, "count": self.count}

    def in_percent(self, sign: str = "") -> str:
        error = "" if math.isnan(self.stderr) else f" ± {100 * self.stderr:.1f}"
        return f"{100 * self.mean:{sign}.1f}{error}"


def average(estimates: Iterable[Estimate]) -> Estimate:
    """Returns the mean of independent estimates. Its count is the sum of theirs."""
    estimates = list(estimates)
    return Estimate(
        math.fsum(e.mean for e in estimates) / len(estimates),
        math.sqrt(math.fsum(e.stderr**2 for e in estimates)) / len(estimates),
        sum(e.count for e in estimates),
    )


def paired_difference(
    base: Mapping[Hashable, tuple[float, Any]],
    other: Mapping[Hashable, tuple[float, Any]],
    places: str,
) -> Estimate:
    """Returns the mean of `other - base` over the items that both have, with its standard error.

    Args:
        base, other: Value and hash of the document, by item.
        places: Task and folders, for messages.

    Raises:
        ValueError: If they share no item, or an item has another document in `other`.
    """
    shared = [key for key in base if key in other]
    if not shared or any(base[key][1] != other[key][1] for key in shared):
        raise ValueError(
            f"Paired differences need the same items. Evaluate with the same data and number of "
            f"samples. Received: different items for {places}"
        )
    differences = [other[key][0] - base[key][0] for key in shared]
    count = len(differences)
    mean = math.fsum(differences) / count
    squares = math.fsum((difference - mean) ** 2 for difference in differences)
    stderr = math.sqrt(squares / (count - 1) / count) if count > 1 else math.nan
    return Estimate(mean, stderr, count)
