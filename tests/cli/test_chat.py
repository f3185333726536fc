"""`keras-gemma chat`: its input, its commands, and a conversation in a terminal."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import typer

from keras_gemma.backend.host import program_cache
from keras_gemma.cli import main
from keras_gemma.cli.keyboard import interrupts, make_history
from keras_gemma.cli.terminal import Terminal
from keras_gemma.cli.texts import read_message
from tests.cli.process import COMMAND, ROOT
from tests.cli.process import Terminal as Keyboard
from tests.models import make_lm


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=64)


@pytest.fixture
def talk(lm, monkeypatch, capsys):
    """Function that types lines into a terminal, and returns the terminal and the output."""

    def type_lines(*lines, **arguments):
        typed = iter(lines)

        def read():
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("keras_gemma.cli.terminal.make_reader", lambda *_: read)
        terminal = Terminal(lm.chat(max_new_tokens=4), "tiny", **arguments)
        terminal.talk("A model.")
        return terminal, capsys.readouterr()

    return type_lines


@pytest.mark.once
def test_read_message(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("of a file\n")
    pipe = "from\na pipe\n"
    assert read_message(["say", "it"], [], Keyboard()) == "say it"
    assert read_message([], [], Keyboard()) is None
    assert read_message([], [], io.StringIO(pipe)) == "from\na pipe"
    assert read_message(["say"], [file], io.StringIO(pipe)) == "say\nof a file\nfrom\na pipe"
    assert read_message([], [file, file], Keyboard()) == "of a file\nof a file"
    assert read_message(["say"], [], io.StringIO()) == "say"
    with pytest.raises(typer.BadParameter, match="standard input is empty"):
        read_message([], [], io.StringIO("\n"))
    with pytest.raises(typer.BadParameter, match="the message is empty"):
        read_message([" "], [], Keyboard())


def test_conversation(talk):
    terminal, printed = talk("to be", "or not", benchmark=True)
    first, second = (m["content"] for m in terminal.chat.history[1::2])
    assert printed.out.index("A model.") < printed.out.index(first)
    assert f"{first}\n" in printed.out and f"{second}\n" in printed.out
    speeds = printed.err.splitlines()
    assert "the cache" not in speeds[0] and "reused from the cache" in speeds[1]
    assert "\x1b" not in printed.out


def test_commands(talk, tmp_path):
    file = tmp_path / "talk.json"
    terminal, printed = talk(
        *("to be", f"/save {file}", "!new session", "!undo", f"!load {file}", "!system Be brief."),
        *(
            "!history",
            "/undo",
            "!help",
            "!nonsense",
            KeyboardInterrupt,
            "  ",
            "!exit",
            "never read",
        ),
    )
    saved = json.loads(file.read_text())
    assert saved["model"] == "tiny"
    assert saved["messages"][0] == {"role": "user", "content": "to be"}
    assert terminal.chat.history == []
    assert terminal.chat.system == "Be brief."
    for remark in (
        "Saved 2 messages",
        "A new session.",
        "nothing to undo",
        "Loaded 2 messages",
        "system: Be brief.",
        "user: to be",
        "Removed: to be",
        "!load FILE",
        "Unknown command !nonsense",
        "Ctrl-D leaves",
    ):
        assert remark in printed.out
    assert list(tmp_path.iterdir()) == [file]


def test_save_replaces_conversations_only(talk, tmp_path):
    thesis, saved = tmp_path / "thesis.txt", tmp_path / "chat.json"
    thesis.write_text("mine")
    _, printed = talk("to be", f"!save {saved}", f"!save {thesis}", "or not", f"!save {saved}")
    assert "exists and is not a saved conversation" in printed.out.replace("\n", " ")
    assert thesis.read_text() == "mine"
    assert len(json.loads(saved.read_text())["messages"]) == 4


@pytest.mark.once
def test_searches_are_refused_before_the_model_is_read(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("keras_gemma.cli.loading.load", None)
    assert main(["chat", "hi", "--sampler", "beam"]) == 2
    assert "--sampler: beam search cannot be streamed" in " ".join(capsys.readouterr().err.split())


def test_errors_do_not_end_the_conversation(talk, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    terminal, printed = talk(
        *("to be " * 9000, "!load", f"!load {wrong}", f"!load {tmp_path / 'none.json'}"),
        *(f"!load {__file__}", f"!save {tmp_path / 'none' / 'chat.json'}", "to be"),
    )
    errors = [line for line in printed.out.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    assert "none/chat.json cannot be written: No such file" in printed.out.replace("\n", "")
    assert len(terminal.chat.history) == 2


@pytest.mark.once
def test_second_interrupt_raises():
    before = signal.getsignal(signal.SIGINT)
    with interrupts(lambda text: None) as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


BUSY = """
import ctypes, sys
sys.argv[0] = "keras-gemma"  # imports no Keras
from keras_gemma.cli.keyboard import interrupts, make_history
with interrupts(lambda text: print(text, flush=True)):
    print("busy", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):  # The second lock waits forever, in C, as a compiler may.
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.once
def test_interrupt_is_acknowledged_at_once(command_environment):
    """The note appears although this program never returns to the interpreter."""
    command = [sys.executable, "-c", BUSY]
    environment = command_environment | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "(stopping)\n"
        process.kill()


@pytest.mark.once
def test_messages_are_kept_for_the_next_conversation(tmp_path):
    file, notes = tmp_path / "new" / "history", []
    make_history(file, notes.append).append_string("to be\nor not")
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(make_history(file, notes.append).load_history_strings()) == ["to be\nor not"]
    assert notes == []
    history = make_history(file / "in a file", notes.append)
    for _ in range(2):
        history.append_string("to be")
    assert history.get_strings() == ["to be", "to be"]
    (note,) = notes
    assert "not kept for the next time" in note and str(file) in note


def test_retry_and_set(talk):
    terminal, printed = talk(
        *("!retry", "to be", "!set temperature 1.5", "!set seed 1", "!retry", "!set", "/retyr"),
        *("!set max-new-tokens 2", "!retry", "!set temperature", "!set temprature 1"),
        *("!set top_p 7", "!set", "quit", "never read"),
    )
    assert [message["role"] for message in terminal.chat.history] == ["user", "assistant"]
    assert terminal.chat.history[0]["content"] == "to be"
    assert terminal.chat.new_tokens == 2
    assert terminal.chat.settings == {"max_new_tokens": 2, "seed": 1}
    for remark in (
        "There is nothing to retry.",
        "max_new_tokens 4, temperature 1.5, seed 1\n",
        "Unknown command /retyr.",
        "error: `!set` has no argument `temprature`. Did you mean `temperature`?",
        "error: `top_p` must be in (0, 1]. Received",
    ):
        assert remark in printed.out


def test_another_model(talk, lm, monkeypatch):
    other = make_lm(proto=lm.preprocessor.tokenizer.proto, sequence_length=64)

    def open_chat(name):
        if name != "gemma2_instruct_2b_en":
            raise ValueError(f"Unknown. Received: preset={name!r}")
        return other.chat(max_new_tokens=3, temperature=0.5)

    terminal, printed = talk(
        *(
            "!system Be brief.",
            "to be",
            "!set temperature 2",
            "!model",
            "!model nonsense",
            "!model 2b",
        ),
        *("or not", "!model", "!set temperature"),
        open_chat=open_chat,
    )
    notes = [line for line in printed.out.splitlines() if "model" in line]
    old, new = "The model is tiny.", "The model is gemma2_instruct_2b_en."
    assert notes == ["A model.", old, "error: Unknown. Received: !model nonsense", new, new]
    chat = terminal.chat
    assert chat._lm is other and chat.new_tokens == 3
    assert [message["role"] for message in chat.messages] == ["system", *["user", "assistant"] * 2]
    assert chat.settings == {"max_new_tokens": 3, "temperature": 0.5}
    assert "max_new_tokens 3, temperature 0.5\n" in printed.out  # of the new model


@pytest.mark.parametrize("silent", [True, False])
def test_silence_has_no_status(silent, monkeypatch, capsys):
    """In a terminal, a status is shown until the first word, unless the command is silent."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stdin", Keyboard())
    monkeypatch.setattr("sys.stderr", Keyboard())
    options = ["--silent"] if silent else []
    for more in ([], ["--json"]):
        assert main(["chat", "What is 1 + 2?", "-n", "1", *options, *more]) == 0
    shown = sys.stderr.getvalue()
    assert shown == "" if silent else shown.count("Thinking ...") >= 2


def test_retry_keeps_the_turn_if_it_fails(talk, monkeypatch):
    def fail(terminal, text):
        raise KeyboardInterrupt

    terminal, _ = talk("to be")
    history = list(terminal.chat.history)
    monkeypatch.setattr(Terminal, "reply", fail)
    with pytest.raises(KeyboardInterrupt):
        terminal.retry("")
    assert terminal.chat.history == history


def test_interrupt_stops_the_reply(talk, lm, monkeypatch):
    pieces = []

    def interrupt(self):
        pieces.append(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("keras_gemma.cli.speed.Watch.piece", interrupt)
    terminal, printed = talk("to be")
    assert len(pieces) == 1
    assert terminal.chat.finish_reason == "closed"
    assert terminal.chat.history[1]["content"] + " ...\n" in printed.out


def test_one_reply_as_json(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("who's there\n"))
    options = ["--json", "--max-new-tokens", "3", "--mode", "factual", "--system", "Be brief."]
    assert main(["chat", "Say", *options]) == 0
    printed = capsys.readouterr()
    answer = json.loads(printed.out)
    assert answer["messages"][:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say\nwho's there"},
    ]
    assert answer["messages"][2] == {"role": "assistant", "content": answer["reply"]}
    assert answer["new_tokens"] == 3
    assert printed.err == ""


@pytest.mark.once
def test_json_needs_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Keyboard())
    assert main(["chat", "--json"]) == 2
    assert "--json needs a prompt" in capsys.readouterr().err


@pytest.mark.once
def test_in_a_terminal(command_environment, tmp_path):
    """Types a message of two lines, recalls it, presses Ctrl-C, and leaves."""
    pytest.importorskip("pexpect")
    from pexpect import EOF, fdpexpect

    environment = {**command_environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(program_cache("jax")))
    options = ["chat", "--max-new-tokens", "5", "--seed", "1"]
    ours, theirs = os.openpty()
    process = subprocess.Popen(  # `pexpect.spawn` would fork, which JAX's threads do not survive.
        [*COMMAND, *options],
        **{"env": environment, "cwd": ROOT, "start_new_session": True},
        **dict.fromkeys(("stdin", "stdout", "stderr"), theirs),
    )
    os.close(theirs)
    child = fdpexpect.fdspawn(ours, timeout=240, encoding="utf-8")
    ready = r"\x1b\[\?2004h"  # sent when the editor waits for input
    child.expect("!help shows the commands")
    for typed, printed in (
        ("who's\x1b\rthere\r", "maximum length"),
        ("\x1b[A\r", "maximum length"),  # recalls and sends the earlier message
        ("!history\r", r"(?s)user: who's.{1,20}there.*user: who's.{1,20}there"),
        ("\x03", "Ctrl-D leaves"),
        ("!exit\r", EOF),
    ):
        child.expect(ready)
        child.send(typed)
        child.expect(printed)
    assert process.wait(timeout=240) == 0
    child.close()
    history = (tmp_path / "cache" / "keras_gemma" / "chat_history").read_text()
    assert "+who's\n+there\n" in history
