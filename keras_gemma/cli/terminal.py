"""Conversation in a terminal: its commands, and the streamed replies.

Knows a `Chat`, but no model. `keyboard.py` reads what is typed.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from keras_gemma import progress
from keras_gemma.checks import check_argument_names
from keras_gemma.cli.keyboard import interrupts, make_reader
from keras_gemma.cli.messages import in_options
from keras_gemma.cli.options import SEARCHES, SamplingOptions, combine, drop_none, full_name
from keras_gemma.cli.printing import printable, show
from keras_gemma.cli.speed import Watch

HELP = """\
!new session     forget the conversation          (also !new)
!undo            remove the last message and its reply
!retry           replace the last reply
!set NAME VALUE  change a setting, as in !set temperature 0.9; without VALUE, the default;
                 without NAME, show the settings
!model NAME      continue with another model; without NAME, show the model
!system TEXT     set the system message; without TEXT, remove it
!history         show the conversation
!save FILE       write the conversation to a file
!load FILE       continue the conversation in a file
!help            show this help
!exit            leave                            (also exit, quit, Ctrl-D)
Enter sends. Alt-Enter, or a backslash and Enter, starts a new line. The arrow keys recall earlier
messages. Ctrl-C stops a reply. A slash works like the exclamation mark, as in /save. Tab completes
a command."""

EXITS = ("exit", "quit")
"""Words that leave the conversation, with or without a mark."""

FORMAT = "keras-gemma chat"
"""Format name in saved conversations."""


class Terminal:
    """Interactive loop of a `Chat`, whose commands are its methods.

    `model` is a name for saved conversations, `benchmark` prints the speed of each reply, `silent`
    prints only the replies, and `open_chat` returns an empty `Chat` with another model.
    """

    def __init__(
        self,
        chat: Any,
        model: str,
        benchmark: bool = False,
        silent: bool = False,
        open_chat: Callable[[str], Any] | None = None,
    ) -> None:
        self.chat, self.open_chat = chat, open_chat
        self.defaults = dict(chat.settings)
        self.model = model
        self.benchmark = benchmark
        self.silent = silent
        colors = "auto" if sys.stdout.isatty() else None
        self.console = Console(color_system=colors, highlight=False, markup=False)
        self.commands: dict[str, Callable[[str], None]] = {
            "new": self.new,
            "undo": self.undo,
            "retry": self.retry,
            "set": self.set,
            "model": self.switch,
            "system": self.system,
            "history": self.history,
            "save": self.save,
            "load": self.load,
            "help": lambda _: self.note(HELP),
        }

    def talk(self, about: str = "") -> None:
        """Runs the conversation until `!exit` or the end of input."""
        if not self.silent:
            self.note(about)
            self.note("!help shows the commands, !exit leaves.")
        read = make_reader([*self.commands, *EXITS[:1]], self.note)
        while True:
            try:
                text = read()
            except KeyboardInterrupt:
                self.note("(!exit or Ctrl-D leaves)")
                continue
            except EOFError:
                return
            name, _, rest = text.strip().partition(" ")
            if not rest and name.lower().lstrip("!/") in EXITS:
                return
            try:
                self.handle(text, name, rest.strip())
            except (ValueError, TypeError, OSError, ImportError) as error:
                # `!set` has the names of Python's arguments.
                self.note(f"error: {in_options(str(error), {'preset': '!model'})}")
            except KeyboardInterrupt:
                self.note("(stopped, and the reply was discarded)")

    def handle(self, text: str, name: str, rest: str) -> None:
        """Runs the command `name` with the argument `rest`, or sends `text` to the model."""
        if name[:1] in ("!", "/") and name[1:] in self.commands:
            self.commands[name[1:]](rest)
        elif name[:1] in ("!", "/") and name[1:].isalpha() and not rest:
            self.note(f"Unknown command {name}. !help shows the commands.")
        elif text.strip():
            self.reply(text)

    def reply(self, text: str) -> None:
        """Sends `text` and prints the reply until its end or Ctrl-C."""
        watch, before = Watch(), len(self.chat.dropped)
        stream = self.chat.stream(text)
        has_begun = False
        with interrupts(lambda note: has_begun or self.note(note)) as interrupted:
            for piece in progress.status_until_first("Thinking ...", stream):
                has_begun = True  # Ctrl-C needs no note any more.
                watch.piece()
                show(piece, end="")
                if interrupted():
                    stream.close()
                    show(" ...", end="")
                    break
        show()
        if dropped := len(self.chat.dropped) - before:
            self.note(f"(the context was full: the oldest {dropped} messages were dropped)")
        if self.chat.finish_reason == "length" and not self.silent:
            self.note("(the reply reached its maximum length)")
        if self.benchmark:
            chat = self.chat
            watch.report(chat.prefilled_tokens, chat.cached_tokens, chat.new_tokens)

    def new(self, _: str) -> None:
        self.chat.clear()
        kept = " The system message is kept; !system removes it." if self.chat.system else ""
        self.note(f"A new session.{kept}")

    def undo(self, _: str) -> None:
        undone = self.chat.undo()
        self.note(f"Removed: {undone[0]['content']}" if undone else "There is nothing to undo.")

    def retry(self, _: str) -> None:
        """Replaces the last reply. Random sampling without a seed gives another text."""
        from keras_gemma.text.chat import message_text

        undone = self.chat.undo()
        if not undone:
            self.note("There is nothing to retry.")
            return
        history = list(self.chat.history)
        try:
            self.reply(message_text(undone[0]))
        except BaseException:
            self.chat.history[:] = history + undone
            raise

    def set(self, text: str) -> None:
        """Changes, resets or shows settings of the following replies."""
        from keras_gemma.causal_lm.settings import GenerationSettings

        name, _, value = text.partition(" ")
        name = name.strip("-").replace("-", "_")
        if name:
            names = [name for name in vars(SamplingOptions()) if name != "mode"]
            check_argument_names("!set", [name], names, ValueError)
            settings = {key: old for key, old in self.chat.settings.items() if key != name}
            if not value and name in self.defaults:
                settings[name] = self.defaults[name]
            if value.strip() in SEARCHES:
                raise ValueError(f"{value.strip()} search cannot be streamed in a conversation")
            if value:
                settings = combine(settings, {name: _parse(value.strip())})
            GenerationSettings(**settings)  # checks them
            self.chat.settings = settings
        shown = drop_none(**self.chat.settings)
        self.note(", ".join(f"{name} {value}" for name, value in shown.items()) or "No settings.")

    def switch(self, name: str) -> None:
        """Continues with the model `name`, and keeps the messages and the changed settings."""
        if name:
            old, new = self.chat, self.open_chat(full_name(name))
            defaults = dict(new.settings)
            changed = {k: v for k, v in old.settings.items() if self.defaults.get(k) != v}
            new.settings, new.system = combine(defaults, changed), old.system
            new.history[:] = old.history
            self.chat, self.defaults, self.model = new, defaults, full_name(name)
        self.note(f"The model is {self.model}.")

    def system(self, text: str) -> None:
        self.chat.system = text or None
        self.note(f"System: {text}" if text else "No system message.")

    def history(self, _: str) -> None:
        for message in self.chat.messages:
            self.note(f"{message['role']}: {message['content']}")

    def save(self, file: str) -> None:
        """Writes the conversation to `file` atomically."""
        path = self._path(file, "save")
        if path.exists() and not _is_conversation(path):
            raise ValueError(f"{path} exists and is not a saved conversation: choose another name")
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"format": FORMAT, "model": self.model, "messages": self.chat.messages}
        text = json.dumps(content, ensure_ascii=False, indent=2)
        try:
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        self.note(f"Saved {len(self.chat.history)} messages to {path}.")

    def load(self, file: str) -> None:
        """Continues the conversation in `file`: one written by `save`, or a list of messages."""
        from keras_gemma.text.chat import read_turns

        path = self._path(file, "load")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a saved conversation: {error}") from error
        messages = content.get("messages") if isinstance(content, dict) else content
        if not isinstance(messages, list):
            raise ValueError(f"{path} is not a saved conversation: it has no list of messages")
        if messages:
            last = messages[-1]
            is_complete = isinstance(last, dict) and last.get("role") != "user"
            next_turn = [{"role": "user", "content": ""}] if is_complete else []
            read_turns(messages + next_turn)  # Raises if the messages are invalid.
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else None
        self.chat.clear()
        self.chat.system = system
        self.chat.history[:] = messages[system is not None :]
        self.note(f"Loaded {len(self.chat.history)} messages from {path}.")

    def _path(self, file: str, command: str) -> Path:
        if not file:
            raise ValueError(f"!{command} needs a file name, as in !{command} chat.json")
        return Path(file).expanduser()

    def note(self, text: str) -> None:
        """Prints a remark, which is not part of the conversation."""
        if text:
            self.console.print(printable(text), style="dim")


def _parse(value: str) -> Any:
    """Returns a number or a string."""
    try:
        return json.loads(value)
    except ValueError:
        return value


def _is_conversation(path: Path) -> bool:
    """Returns True if `!save` wrote the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT
