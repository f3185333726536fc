"""A conversation in a terminal: lines in, replies out as they are made, and commands.

Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line; the arrow keys bring back
what was written before. Ctrl-C stops the reply, and Ctrl-D the program. Knows a chat, and no model.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from keras_gemma.cli.printing import printable, show
from keras_gemma.cli.speed import Watch

HELP = """\
!new session     forget the conversation          (also !new)
!undo            take the last message and its reply back
!system TEXT     what stands before the conversation; without TEXT, nothing
!history         what has been said
!save FILE       write the conversation to a file
!load FILE       go on from such a file
!help            this
!exit            leave                            (also Ctrl-D)
Enter sends. Alt-Enter, or Enter behind a backslash, begins a new line. The arrow keys bring back
earlier messages. Ctrl-C stops a reply. /save and the like mean the same as !save."""

FORMAT = "keras-gemma chat"


class Terminal:
    """Reads from the keyboard and prints to the terminal, until somebody leaves.

    Args:
        chat: a `Chat`.
        model: its model's name, to be shown and saved.
        benchmark: whether to say how fast each reply was.
        silent: whether to print replies alone.
    """

    def __init__(
        self, chat: Any, model: str, benchmark: bool = False, silent: bool = False
    ) -> None:
        self.chat = chat
        self.model = model
        self.benchmark = benchmark
        self.silent = silent
        colors = "auto" if sys.stdout.isatty() else None
        self.console = Console(color_system=colors, highlight=False, markup=False)
        self.commands: dict[str, Callable[[str], None]] = {
            "new": self.new,
            "undo": self.undo,
            "system": self.system,
            "history": self.history,
            "save": self.save,
            "load": self.load,
            "help": lambda _: self.note(HELP),
        }

    def talk(self, about: str = "") -> None:
        """Until `!exit` or the end of input."""
        if not self.silent:
            self.note(about)
            self.note("!help shows the commands, !exit leaves.")
        read = reader()
        while True:
            try:
                text = read()
            except KeyboardInterrupt:
                self.note("(!exit or Ctrl-D leaves)")
                continue
            except EOFError:
                return
            name, _, rest = text.strip().partition(" ")
            if name in ("!exit", "/exit", "!quit", "/quit"):
                return
            try:
                self.obey_or_send(text, name, rest.strip())
            except (ValueError, TypeError, OSError) as error:
                self.note(f"error: {error}")
            except KeyboardInterrupt:
                self.note("(stopped, and nothing of it is kept)")

    def obey_or_send(self, text: str, name: str, rest: str) -> None:
        """Do what a line says: a command, or a message to the model."""
        if name[:1] in ("!", "/") and name[1:] in self.commands:
            self.commands[name[1:]](rest)
        elif name[:1] == "!" and name[1:].isalpha() and not rest:
            self.note(f"{name} is no command; !help shows them.")
        elif text.strip():
            self.reply(text)

    def reply(self, text: str) -> None:
        """Send `text`, and print what comes, until its end or Ctrl-C."""
        watch, before = Watch(), len(self.chat.dropped)
        stream = self.chat.stream(text)
        with interrupts() as interrupted:
            for piece in stream:
                watch.first()
                show(piece, end="")
                if interrupted():
                    stream.close()
                    show(" ...", end="")
                    break
        show()
        dropped = len(self.chat.dropped) - before
        if dropped:
            self.note(f"(the context was full: the oldest {dropped} messages were forgotten)")
        if self.chat.finish_reason == "length" and not self.silent:
            self.note("(the reply had no more room)")
        if self.benchmark:
            chat = self.chat
            watch.report(chat.prefilled_tokens, chat.cached_tokens, chat.new_tokens)

    def new(self, _: str) -> None:
        """Forget what was said."""
        self.chat.clear()
        self.note("A new session.")

    def undo(self, _: str) -> None:
        """Take a turn back."""
        undone = self.chat.undo()
        self.note(f"Taken back: {undone[0]['content']}" if undone else "There is nothing to undo.")

    def system(self, text: str) -> None:
        """Change the system message."""
        self.chat.system = text or None
        self.note(f"System: {text}" if text else "No system message.")

    def history(self, _: str) -> None:
        """Print what was said."""
        for message in self.chat.messages:
            self.note(f"{message['role']}: {message['content']}")

    def save(self, file: str) -> None:
        """Write the conversation to `file`, whole or not at all."""
        path = self._path(file, "save")
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"format": FORMAT, "model": self.model, "messages": self.chat.messages}
        text = json.dumps(content, ensure_ascii=False, indent=2)
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, path)
        self.note(f"Saved {len(self.chat.history)} messages to {path}.")

    def load(self, file: str) -> None:
        """Go on from the conversation in `file`: what `save` wrote, or a list of messages."""
        from keras_gemma.text.chat import read_turns

        path = self._path(file, "load")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} holds no conversation: {error}") from error
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list):
            raise ValueError(f"{path} holds no conversation: no list of messages")
        if messages:
            read_turns([*messages, {"role": "user", "content": ""}] if ends(messages) else messages)
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.chat.clear()
        self.chat.system = system
        self.chat.history[:] = messages[system is not None :]
        self.note(f"Loaded {len(self.chat.history)} messages from {path}.")

    def _path(self, file: str, command: str) -> Path:
        if not file:
            raise ValueError(f"!{command} needs the name of a file, as in !{command} chat.json")
        return Path(file).expanduser()

    def note(self, text: str) -> None:
        """Print what is no reply."""
        if text:
            self.console.print(printable(text), style="dim")


def ends(messages: list[Any]) -> bool:
    """Whether a conversation is such that the user speaks next."""
    last = messages[-1]
    return isinstance(last, dict) and last.get("role") != "user"


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C is noted, for the function that it gives; the second raises."""
    came = False

    def note(signum: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, before)


def reader() -> Callable[[], str]:
    """What reads a message: an editor of lines in a terminal, and plain lines elsewhere."""
    if not sys.stdout.isatty():
        return input
    from prompt_toolkit import PromptSession
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

    session = PromptSession("> ", multiline=True, key_bindings=keys, prompt_continuation="  ")
    return session.prompt
