"""Checks of arguments, with one wording for each kind of error. Knows nothing about Gemma."""

import math
import numbers
from collections.abc import Collection
from typing import Any


def is_integer(value: Any) -> bool:
    """Returns True if `value` is a Python or NumPy integer. A bool is not an integer here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns True if `value` is a finite Python or NumPy number. A bool is not a number here."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)


def check_integer(
    name: str, value: Any, minimum: int = 1, maximum: int | None = None, advice: str = ""
) -> None:
    """Checks an integer argument.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value of the argument.
        minimum: Smallest valid value.
        maximum: Largest valid value. `None` sets no limit.
        advice: Sentence that the message adds, such as what to do instead.

    Raises:
        ValueError: If `value` is not an integer in this range.
    """
    if is_integer(value) and minimum <= value and (maximum is None or value <= maximum):
        return
    if maximum is not None:
        expected = f"an integer from {minimum} to {maximum}"
    else:
        expected = {0: "a non-negative integer", 1: "a positive integer"}.get(
            minimum, f"an integer of at least {minimum}"
        )
    raise ValueError(_message(name, value, expected, advice))


def check_number(name: str, value: Any, range: str = "(-inf, inf)", advice: str = "") -> None:
    """Checks a number against an interval, such as `"[0, 1)"`.

    Args:
        name: Name of the argument, as the user wrote it.
        value: Value of the argument.
        range: Valid interval. A bracket includes its limit, a parenthesis excludes it.
        advice: Sentence that the message adds, such as what to do instead.

    Raises:
        ValueError: If `value` is not a finite number in this interval.
    """
    low, high = (float(limit) for limit in range[1:-1].split(","))
    if is_number(value):
        above = value >= low if range[0] == "[" else value > low
        below = value <= high if range[-1] == "]" else value < high
        if above and below:
            return
    expected = "a finite number"
    if high < math.inf:
        expected = f"in {range}"
    elif low > -math.inf:
        sign = "at least" if range[0] == "[" else "greater than"
        expected = f"a finite number {sign} {low:g}"
    raise ValueError(_message(name, value, expected, advice))


def check_bool(name: str, value: Any, advice: str = "") -> None:
    """Checks a bool argument.

    Raises:
        ValueError: If `value` is not True or False.
    """
    if not isinstance(value, bool):
        raise ValueError(_message(name, value, "True or False", advice))


def check_one_of(name: str, value: Any, choices: Collection[Any], advice: str = "") -> None:
    """Checks an argument that takes one of a few values.

    Raises:
        ValueError: If `value` is not one of `choices`.
    """
    if not any(value is choice or value == choice for choice in choices):
        expected = f"one of {', '.join(map(repr, choices))}"
        raise ValueError(_message(name, value, expected, advice))


def _message(name: str, value: Any, expected: str, advice: str) -> str:
    sentences = [f"`{name}` must be {expected}."]
    if advice:
        sentences.append(advice)
    return " ".join([*sentences, f"Received: {name}={value!r}"])
