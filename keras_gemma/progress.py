"""Progress bar and status line for tasks that take longer than a second.

Only shown in terminals and notebooks. Knows nothing about the tasks.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

PATIENCE = 1.0
"""Delay before the bar is shown, in seconds."""

REFRESHES_PER_SECOND = 4
"""Refreshes of a status line. Each takes the interpreter from the task for a moment."""

_is_hidden = ContextVar("is_hidden", default=False)
_statuses: list[Any] = []  # those of all threads, because they share the terminal


@contextlib.contextmanager
def hidden(is_hidden: bool = True) -> Iterator[None]:
    """Hides the progress bars and status lines that begin in this block, if `is_hidden`."""
    token = _is_hidden.set(is_hidden or _is_hidden.get())
    try:
        yield
    finally:
        _is_hidden.reset(token)


@contextlib.contextmanager
def bar(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Yields a function that adds to the completed amount of work, of which there is `total`.

    The optional second argument of the function replaces the title.
    """
    start, done, shown = time.monotonic(), 0.0, None
    is_hidden = _is_hidden.get()
    with contextlib.ExitStack() as stack:

        def advance(amount: float, what: str = title) -> None:
            nonlocal done, shown
            done += amount
            if shown is None and not is_hidden and time.monotonic() - start > PATIENCE:
                end_status()  # A terminal shows one of them.
                shown = stack.enter_context(_rich_bar())
                shown.add_task(what, total=total)
            if shown is not None:
                shown.update(shown.task_ids[0], completed=done, description=what)

        yield advance


@contextlib.contextmanager
def status(title: str) -> Iterator[None]:
    """Shows `title` in a terminal, until the block or the status ends or another one begins."""
    if _is_hidden.get() or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    end_status()
    live = Live(
        Spinner("dots", title, style="dim"),
        console=Console(stderr=True, highlight=False),
        refresh_per_second=REFRESHES_PER_SECOND,
        transient=True,
        redirect_stdout=False,  # A command replaces `sys.stderr` while the status is shown.
        redirect_stderr=False,
    )
    _statuses.append(live)
    try:
        with live:
            yield
    finally:
        _statuses.remove(live)


def end_status() -> None:
    """Removes the status line, so that something else can be printed."""
    for live in _statuses:
        live.stop()


def status_until_first(title: str, items: Iterable[Any]) -> Generator[Any, None, Any]:
    """Yields `items`, and shows `title` until the first one. Returns what `items` returns."""
    iterator = iter(items)
    with status(title):
        try:
            first = next(iterator)
        except StopIteration as end:
            return end.value
    yield first
    return (yield from iterator)


def _rich_bar() -> "rich.progress.Progress":  # noqa: F821
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    is_visible = console.is_terminal or console.is_jupyter
    return rich.progress.Progress(console=console, transient=True, disable=not is_visible)
