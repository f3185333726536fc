"""`keras-gemma chat`: what it reads, its commands, and one conversation in a terminal."""

import io
import json
import os
import signal
import subprocess
import sys

import pytest
import typer

from keras_gemma.cli import main
from keras_gemma.cli.chat import read_message
from keras_gemma.cli.terminal import Terminal, interrupts
from tests.cli.test_app import AS_INSTALLED, ROOT, run
from tests.models import make_lm


class Keyboard(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def lm(tiny_proto):
    return make_lm(proto=tiny_proto, sequence_length=64)


@pytest.fixture
def talk(lm, monkeypatch, capsys):
    """Types lines into a terminal; returns it, and what was printed."""

    def types(*lines, **arguments):
        typed = iter(lines)

        def read():
            line = next(typed, None)
            if line is None:
                raise EOFError
            if line is KeyboardInterrupt:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("keras_gemma.cli.terminal.reader", lambda: read)
        terminal = Terminal(lm.chat(max_new_tokens=4), "tiny", **arguments)
        terminal.talk("A model.")
        return terminal, capsys.readouterr()

    return types


@pytest.mark.once
def test_messages(tmp_path):
    file = tmp_path / "file.txt"
    file.write_text("of a file\n")
    pipe = "from\na pipe\n"
    assert read_message(["say", "it"], None, Keyboard()) == "say it"
    assert read_message([], None, Keyboard()) is None
    assert read_message([], None, io.StringIO(pipe)) == "from\na pipe"
    assert read_message(["say"], file, io.StringIO(pipe)) == "say\nof a file\nfrom\na pipe"
    assert read_message(["say"], None, io.StringIO()) == "say"
    with pytest.raises(typer.BadParameter, match="standard input is empty"):
        read_message([], None, io.StringIO("\n"))


def test_a_conversation(talk):
    terminal, printed = talk("to be", "or not", benchmark=True)
    first, second = (m["content"] for m in terminal.chat.history[1::2])
    assert printed.out.index("A model.") < printed.out.index(first)
    assert f"{first}\n" in printed.out and f"{second}\n" in printed.out
    speeds = printed.err.splitlines()
    assert "in the cache" not in speeds[0] and "more were in the cache" in speeds[1]
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
    for said in (
        "Saved 2 messages",
        "A new session.",
        "nothing to undo",
        "Loaded 2 messages",
        "system: Be brief.",
        "user: to be",
        "Taken back: to be",
        "!load FILE",
        "!nonsense is no command",
        "Ctrl-D leaves",
    ):
        assert said in printed.out
    assert list(tmp_path.iterdir()) == [file]


def test_what_goes_wrong_is_said_and_the_conversation_goes_on(talk, tmp_path):
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"messages": [{"role": "assistant", "content": "x"}]}')
    terminal, printed = talk(
        *("to be " * 9000, "!load", f"!load {wrong}", f"!load {tmp_path / 'none.json'}"),
        *(f"!load {__file__}", "to be"),
    )
    said = [line for line in printed.out.splitlines() if line.startswith("error: ")]
    assert len(said) == 5
    assert len(terminal.chat.history) == 2


@pytest.mark.once
def test_the_first_interrupt_is_noted_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as interrupted:
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_an_interrupt_stops_the_reply(talk, lm, monkeypatch):
    pieces = []

    def interrupt(self):
        pieces.append(self)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("keras_gemma.cli.speed.Watch.first", interrupt)
    terminal, printed = talk("to be")
    assert len(pieces) == 1
    assert terminal.chat.finish_reason == "closed"
    assert terminal.chat.history[1]["content"] + " ...\n" in printed.out


def test_one_answer(command_environment, tmp_path):
    """From a pipe, as JSON, by the command itself."""
    options = ["--json", "--max-new-tokens", "3", "--mode", "factual", "--system", "Be brief."]
    result = run(["chat", "Say", *options], command_environment, stdin="who's there\n")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["messages"][:2] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say\nwho's there"},
    ]
    assert answer["messages"][2] == {"role": "assistant", "content": answer["reply"]}
    assert answer["new_tokens"] == 3
    assert result.stderr == ""


@pytest.mark.once
def test_json_needs_a_prompt(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", Keyboard())
    assert main(["chat", "--json"]) == 2
    assert "--json needs a prompt" in capsys.readouterr().err


@pytest.mark.once
def test_in_a_terminal(command_environment, tmp_path):
    """Keys: a message of two lines, the one before, Ctrl-C, leaving."""
    pytest.importorskip("pexpect")
    from pexpect import EOF, fdpexpect

    environment = {**command_environment, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    options = ["chat", "--max-new-tokens", "5", "--seed", "1"]
    here, there = os.openpty()
    process = subprocess.Popen(  # `pexpect.spawn` forks, which JAX's threads do not survive
        [sys.executable, "-c", f"{AS_INSTALLED}sys.exit(main())", *options],
        **{"env": environment, "cwd": ROOT, "start_new_session": True},
        **dict.fromkeys(("stdin", "stdout", "stderr"), there),
    )
    os.close(there)
    child = fdpexpect.fdspawn(here, timeout=240, encoding="utf-8")
    ready = r"\x1b\[\?2004h"  # what an editor of lines says to a terminal
    child.expect("!help shows the commands")
    for typed, printed in (
        ("who's\x1b\rthere\r", "no more room"),
        ("\x1b[A\r", "no more room"),  # the message before, again
        ("!history\r", r"(?s)user: who's.{1,20}there.*user: who's.{1,20}there"),
        ("\x03", "Ctrl-D leaves"),
        ("!exit\r", EOF),
    ):
        child.expect(ready)
        child.send(typed)
        child.expect(printed)
    assert process.wait(timeout=240) == 0
    child.close()
