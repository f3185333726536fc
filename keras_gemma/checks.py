"""Checks of arguments, with one wording for each kind of error. Knows nothing about Gemma."""

import difflib
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any

FOR_EACH_ROW = ", or a list with one for each row"
"""Part of the messages of `check_numbers`, which the command line leaves out."""


def is_integer(value: Any) -> bool:
    """Returns True if `value` is a Python or NumPy integer. A bool is not an integer here."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Returns True if `value` is a finite Python or NumPy number. A bool is not a number here.

    Integers beyond the range of a float are not finite here, such as `10**400`.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


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
    if not (is_number(value) and _is_in(value, range)):
        raise ValueError(_message(name, value, _description(range), advice))


def check_numbers(name: str, value: Any, range: str = "(-inf, inf)", whole: bool = False) -> None:
    """Checks a number, or a list or array with one number for each row, against an interval.

    Args:
        name, value, range: Same as in `check_number`.
        whole: If True, the numbers must be integers.

    Raises:
        ValueError: If a number is not in this interval, or the list is empty.
    """
    has_type = is_integer if whole else is_number
    rank = getattr(value, "ndim", 1 if isinstance(value, list | tuple) else None)
    values = value if rank else [value if rank is None else value[()]]
    if not len(values) or not all(has_type(number) and _is_in(number, range) for number in values):
        expected = _description(range, "an integer" if whole else "a finite number")
        expected += FOR_EACH_ROW
        raise ValueError(_message(name, value, expected, ""))


def check_argument_names(
    caller: str, names: Iterable[str], valid: Collection[str], error: type[Exception] = TypeError
) -> None:
    """Checks the names of keyword arguments.

    Args:
        caller: Name of the called function, for the message.
        names: Names that the user wrote.
        valid: Names that the function accepts.
        error: Type of the exception.

    Raises:
        TypeError: If a name is not in `valid`. The message suggests the closest name.
    """
    for name in names:
        if name not in valid:
            matches = difflib.get_close_matches(name, valid, 1)
            advice = f"Did you mean `{matches[0]}`?" if matches else f"Valid: {', '.join(valid)}."
            raise error(f"`{caller}` has no argument `{name}`. {advice}")


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


def _limits(range: str) -> tuple[float, float]:
    low, high = (float(limit) for limit in range[1:-1].split(","))
    return low, high


def _is_in(value: Any, range: str) -> bool:
    low, high = _limits(range)
    above = value >= low if range[0] == "[" else value > low
    return above and (value <= high if range[-1] == "]" else value < high)


def _description(range: str, kind: str = "a finite number") -> str:
    """Returns the description of a number in an interval, for a message."""
    low, high = _limits(range)
    if high < math.inf:
        return f"in {range}" if kind == "a finite number" else f"{kind} in {range}"
    if low > -math.inf:
        return f"{kind} {'at least' if range[0] == '[' else 'greater than'} {low:g}"
    return kind


def _message(name: str, value: Any, expected: str, advice: str) -> str:
    sentences = [f"`{name}` must be {expected}."]
    if advice:
        sentences.append(advice)
    return " ".join([*sentences, f"Received: {name}={value!r}"])


def is_deeper(value: Any, levels: int) -> bool:
    """Returns True if a JSON value has more than `levels` dicts and lists inside each other."""
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return levels == 0 or any(is_deeper(item, levels - 1) for item in value)
