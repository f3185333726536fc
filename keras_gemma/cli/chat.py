"""`keras-gemma chat`: a conversation in the terminal, or one answer to a prompt or a pipe."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from keras_gemma.cli.options import (
    MODES,
    BackendOption,
    BenchmarkOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FileOption,
    Fit,
    FitOption,
    JsonOption,
    LoraOption,
    Mode,
    SeedOption,
    SilentOption,
    full_name,
    start,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch

BUILT_IN = "gemma_tiny_instruct_en"
"""What is talked to where no model is named. Too small to be bold: it says what is likeliest."""


def chat(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(help="Answer this and be done; also what is piped in.", show_default=False),
    ] = None,
    file: FileOption = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Name, 2b, 9b or 27b, kaggle:// or hf:// handle, or directory; by default the "
            "one that comes with the package."
        ),
    ] = None,
    lora: LoraOption = None,
    preset: FitOption = Fit.AUTO,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="How bold the words are; by default chat, of the built-in model factual."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What stands before the conversation.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of a reply; by default what the context holds.")
    ] = None,
    seed: SeedOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Talk with a model; !help in the conversation shows what else can be done there."""
    text = read_message(prompt or [], file, sys.stdin)
    if text is None and as_json:
        raise typer.BadParameter("--json needs a prompt, or a pipe", param_hint="PROMPT")
    start(backend, device, debug)

    # Imports Keras, on the chosen backend.
    from keras_gemma import catalogue, storage  # noqa: F401
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.cli.options import check_device

    check_device(device)
    listed = catalogue.presets()
    name = full_name(model or BUILT_IN)
    mode = mode or (Mode.FACTUAL if name == BUILT_IN else Mode.CHAT)
    choice = choose(name, preset, dtype)
    if not silent and (text is None or not choice.plain):
        print(f"{name}: {choice.reason}", file=sys.stderr)
    settings: dict[str, Any] = {**MODES[mode], "seed": seed, "max_new_tokens": max_new_tokens}
    settings = {name: value for name, value in settings.items() if value is not None}
    lm = load(choice, name, silent, lora)
    conversation = lm.chat(system, context_full="drop_oldest", **settings)
    if text is not None:
        answer(conversation, text, name, as_json, benchmark)
        return
    from keras_gemma.cli.terminal import Terminal

    about = listed[name].description if name in listed else ""
    Terminal(conversation, name, benchmark, silent).talk(about)


def read_message(prompt: list[str], file: Path | None, stdin: TextIO) -> str | None:
    """What is to be answered: the words of the command line, a file, and a pipe, in this order.

    Returns:
        The message, its parts on lines of their own; None for a conversation.

    Raises:
        typer.BadParameter: no terminal, and nothing in the pipe.
    """
    parts = [" ".join(prompt)] if prompt else []
    if file is not None:
        parts.append(file.read_text(encoding="utf-8").strip())
    if not stdin.isatty():
        parts.append(stdin.read().strip())
    if not parts:
        return None
    if not any(parts):
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return "\n".join(part for part in parts if part)


def answer(conversation: Any, text: str, model: str, as_json: bool, benchmark: bool) -> None:
    """Print the one reply to `text`."""
    watch = Watch()
    if as_json:
        reply = conversation.send(text)
        entry = {
            "model": model,
            "messages": conversation.messages,
            "reply": reply,
            "finish_reason": conversation.finish_reason,
            "prefilled_tokens": conversation.prefilled_tokens,
            "new_tokens": conversation.new_tokens,
        }
        show(json.dumps(entry, ensure_ascii=False))
    else:
        for piece in conversation.stream(text):
            watch.first()
            show(piece, end="")
        show()
    if benchmark:
        watch.report(conversation.prefilled_tokens, 0, conversation.new_tokens)
