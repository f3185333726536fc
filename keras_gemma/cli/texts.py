"""Texts that a command reads: from the command line, files and a pipe."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from typer import BadParameter

BINARY = re.compile("[\0\ud800-\udfff]")
"""Characters that no text has: the null, and the surrogates of bytes that are not UTF-8."""


def read_prompts(prompts: list[str], stdin: TextIO, files: Sequence[Path] = ()) -> list[str]:
    """Returns the prompts of the command line and of `files`. "-" means the content of `stdin`.

    Without any prompt or file, `stdin` is read if it is a pipe. A missing prompt, an empty pipe
    and an empty file are wrong usage.
    """
    if not prompts and not files:
        if stdin.isatty():
            raise BadParameter("pass a prompt, or pipe a text in", param_hint="PROMPT")
        prompts = ["-"]
    piped = _nonempty(read_pipe(stdin), "standard input") if "-" in prompts else ""
    texts = [piped if prompt == "-" else prompt for prompt in prompts]
    return texts + [_nonempty(read_file(path), str(path)) for path in files]


def read_message(prompt: list[str], files: Sequence[Path], stdin: TextIO) -> str | None:
    """Returns the message to reply to: command line, files and pipe, each on its own lines.

    Without any of these, returns `None`, which starts a conversation.
    """
    parts = [" ".join(prompt)] if prompt else []
    parts += [read_file(path).strip() for path in files]
    if not stdin.isatty():
        parts.append(read_pipe(stdin).strip())
    if not parts:
        return None
    message = "\n".join(part for part in parts if part.strip())
    is_only_pipe = not prompt and not files
    return _nonempty(message, "standard input" if is_only_pipe else "the message")


def read_file(path: Path) -> str:
    """Returns the text of a file, without the newline at its end."""
    return _check_text(path.read_text(encoding="utf-8", errors="surrogateescape"), str(path))


def read_pipe(stdin: TextIO) -> str:
    """Returns the text of a pipe, without the newline at its end."""
    if isinstance(stdin, io.TextIOWrapper):
        stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    return _check_text(stdin.read(), "standard input")


def _check_text(text: str, name: str) -> str:
    if BINARY.search(text):
        raise BadParameter(f"{name} is not a text in UTF-8", param_hint="PROMPT")
    return text.removesuffix("\n")


def _nonempty(text: str, name: str) -> str:
    if not text:
        raise BadParameter(f"{name} is empty", param_hint="PROMPT")
    return text
