"""A progress bar for work that takes longer than a second, where somebody can see it.

Knows nothing of the work. Pipes and quick work see nothing.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

PATIENCE = 1.0
"""Seconds without a bar."""


@contextlib.contextmanager
def bar(title: str, total: float) -> Iterator[Callable[..., None]]:
    """Within it, call the function it gives with each amount of work that is done.

    A second argument is what is being done from then on, in the place of the title.

    Args:
        title: what is being done, such as `"Loading"`.
        total: all of the work, in any unit.
    """
    start, done, shown = time.monotonic(), 0.0, None
    with contextlib.ExitStack() as stack:

        def advance(amount: float, what: str = title) -> None:
            nonlocal done, shown
            done += amount
            if shown is None and time.monotonic() - start > PATIENCE:
                shown = stack.enter_context(_rich_bar())
                shown.add_task(what, total=total)
            if shown is not None:
                shown.update(shown.task_ids[0], completed=done, description=what)

        yield advance


def _rich_bar() -> "rich.progress.Progress":  # noqa: F821
    import rich.console
    import rich.progress

    console = rich.console.Console(stderr=True)
    seen = console.is_terminal or console.is_jupyter
    return rich.progress.Progress(console=console, transient=True, disable=not seen)
