"""Keyboard of a conversation: an editor for messages, and Ctrl-C in a reply.

Enter sends; Alt-Enter, or a backslash and Enter, starts a new line; the arrow keys recall earlier
messages, Tab completes commands. Messages are kept in the user's cache for the next conversation.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from keras_gemma import progress
from keras_gemma.hub_caches import own_cache

HISTORY = "chat_history"
"""File of typed messages, in the package's cache."""


@contextmanager
def interrupts(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True after the first Ctrl-C. The second one raises.

    `note` acknowledges the first one in a thread, because a compiler may keep this one busy. In the
    meantime, the terminal does not print what is typed.
    """
    interrupted = False

    def on_signal(signum: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    def acknowledge() -> None:
        if os.read(wake, 1):  # Empty if the block ends without a signal.
            progress.end_status()
            note("(stopping)")

    wake, signaled = os.pipe()
    os.set_blocking(signaled, False)
    thread = threading.Thread(target=acknowledge)
    thread.start()
    previous = signal.signal(signal.SIGINT, on_signal)
    previous_descriptor = signal.set_wakeup_fd(signaled, warn_on_full_buffer=False)
    try:
        with no_echo():
            yield lambda: interrupted
    finally:
        signal.set_wakeup_fd(previous_descriptor)
        signal.signal(signal.SIGINT, previous)
        os.close(signaled)
        thread.join()
        os.close(wake)


@contextmanager
def no_echo() -> Iterator[None]:
    """Keeps a terminal from printing what is typed."""
    if not sys.stdin.isatty() or os.name != "posix":
        yield
        return
    import termios

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)


def make_reader(commands: Sequence[str], note: Callable[[str], None]) -> Callable[[], str]:
    """Returns a function that reads a message: with an editor in a terminal, else `input`.

    `note` prints a remark if messages cannot be kept for the next conversation.
    """
    if not sys.stdout.isatty():
        return input
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: Any) -> None:
        buffer = event.current_buffer
        if buffer.document.char_before_cursor == "\\":
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    words = [mark + command for mark in "!/" for command in commands]
    session = PromptSession(
        [("bold ansicyan", "> ")],
        multiline=True,
        key_bindings=keys,
        prompt_continuation="  ",
        completer=WordCompleter(words, sentence=True),
        complete_while_typing=False,
        history=make_history(own_cache() / HISTORY, note),
    )
    return session.prompt


def make_history(path: Path, note: Callable[[str], None]) -> Any:
    """Returns the messages of earlier conversations, which only the user may read."""
    from prompt_toolkit.history import FileHistory

    class History(FileHistory):
        is_kept = True

        def store_string(self, string: str) -> None:
            try:
                super().store_string(string)
            except OSError as error:
                if self.is_kept:
                    note(f"(messages are not kept for the next time: {error})")
                self.is_kept = False

    with contextlib.suppress(OSError):  # `store_string` fails too, and says so.
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    return History(path)
