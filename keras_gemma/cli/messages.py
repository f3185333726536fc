"""Messages of errors, in the words of the command line.

The package's errors name Python arguments, and typer's are those of its validation library. Both
are translated here: `max_new_tokens=0` becomes --max-new-tokens 0.
"""

import re
from typing import Any

from keras_gemma.checks import FOR_EACH_ROW

MAX_LINE = 600
"""Maximum length of a printed line, in characters."""

PYTHON_NAMES = {
    "preset": ("model", "source"),
    "preset_dir": ("target",),
    "path": ("output", "target"),
    "directory": ("lora", "output", "target"),
    "text": ("texts",),
    "mode": ("bits",),
}
"""Parameters of commands that are passed to the package under another name."""

PYTHON_VALUES = {"run_programs='unsafe'": "--unsafe-programs"}
"""Values of arguments that are options of their own."""


def option_names(command: Any) -> dict[str, str]:
    """Returns the option, or the name in the usage, of each Python argument of a command."""
    names = {}
    for parameter in command.params:
        if getattr(parameter, "hidden", False):  # an earlier name
            continue
        is_option = parameter.param_type_name == "option"
        usage_name = parameter.metavar or parameter.name.upper()
        names[parameter.name] = max(parameter.opts, key=len) if is_option else usage_name
    for argument, parameters in PYTHON_NAMES.items():
        found = [names[name] for name in parameters if name in names]
        if found:
            names.setdefault(argument, found[0])
    return names


def in_options(message: str, names: dict[str, str]) -> str:
    """Returns `message` with the options of `names` instead of Python arguments.

    Prompts are counted from 1, and not from 0 as in Python. An option has one value for all.
    """
    message = message.replace(FOR_EACH_ROW, "")
    for value, option in PYTHON_VALUES.items():
        message = message.replace(value, option)
    message = re.sub(r"\bPrompt (\d+)\b", lambda match: f"Prompt {int(match[1]) + 1}", message)
    any_name = "|".join(map(re.escape, names))
    if not any_name:
        return message

    def assignment(match: re.Match) -> str:
        name, value = names[match[1]], match[2]
        if re.fullmatch(r"'[\w./:-]+'", value):
            value = value[1:-1]
        return name if value == "True" else f"{name} {value}"

    value = r"'[^']*'|\"[^\"]*\"|[^\s,;)`]*[^\s,;)`.]"
    message = re.sub(rf"`?\b({any_name})=({value})`?", assignment, message)
    return re.sub(rf"`({any_name})`", lambda match: names[match[1]], message)


def usage_message(error: Any) -> str:
    """Returns the message of a usage error, without the tone of pydantic, which typer calls."""
    details = getattr(error.__cause__, "errors", None)
    if details is not None:
        problem = details()[0]
        text = problem["msg"].removeprefix("Value error, ").partition(", unable")[0]
        if text.startswith("Input should be"):
            option = max(error.param.opts, key=len)
            expected = text.removeprefix("Input should be")
            return f"{option} must be{expected}. Received: {problem['input']}"
        error.message = text
    return error.format_message()


def error_lines(kind: type[BaseException], error: BaseException, readable: tuple) -> list[str]:
    """Returns an exception in at most two lines. Types that are not `readable` are named."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if not issubclass(kind, readable):
        lines[0] = f"{kind.__name__}: {lines[0]}"
    is_cut = len(lines) > 2 or any(len(line) > MAX_LINE for line in lines)
    lines = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ..." for line in lines[:2]]
    if is_cut:
        lines[-1] += " (--debug shows more)"
    return lines
