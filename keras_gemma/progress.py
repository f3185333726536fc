"""Progress bar for tasks that take longer than a second.

Only shown in terminals and notebooks. Knows nothing about the tasks.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

PATIENCE = 1.0
"""Delay before the bar is shown, in seconds."""

_is_hidden = ContextVar("is_hidden", default=False)


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Hides the progress bars that begin in this block."""
    token = _is_hidden.set(True)
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
                shown = stack.enter_context(_rich_bar())
                shown.add_task(what, total=total)
            if shown is not None:
                shown.update(shown.task_ids[0], completed=done, description=what)

        yield advance


def _rich_bar() -> "rich.progress.Progress":  # noqa: F821
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    is_visible = console.is_terminal or console.is_jupyter
    return rich.progress.Progress(console=console, transient=True, disable=not is_visible)
