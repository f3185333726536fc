"""`keras-gemma chat`: a conversation in the terminal, or one reply to a prompt or a pipe."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from keras_gemma.cli.options import (
    MODES,
    BenchmarkOption,
    Mode,
    ModelOptions,
    SeedOption,
    SilentOption,
    full_name,
    start,
    with_model_options,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch

DEFAULT_MODEL = "gemma_tiny_instruct_en"
"""Built-in chat model, used if no model is named. It is too small for random sampling."""


@with_model_options
def chat(
    prompt: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Message to reply to, instead of a conversation. A pipe is appended to it.",
            show_default=False,
        ),
    ] = None,
    *,
    options: ModelOptions,
    mode: Annotated[
        Mode | None,
        typer.Option(
            help="Sampling settings.", show_default="chat; factual with the built-in model"
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum tokens per reply.", show_default="the rest of the context"
        ),
    ] = None,
    seed: SeedOption = None,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Talk with a model. Type !help in the conversation to see its commands."""
    text = read_message(prompt or [], options.file, sys.stdin)
    if text is None and options.as_json:
        raise typer.BadParameter("--json needs a prompt, or a pipe", param_hint="PROMPT")
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma import catalogue
    from keras_gemma.cli.loading import load_model
    from keras_gemma.cli.options import check_device

    check_device(options.device)
    name = full_name(options.model or DEFAULT_MODEL)
    mode = mode or (Mode.FACTUAL if name == DEFAULT_MODEL else Mode.CHAT)
    settings = {**MODES[mode], "seed": seed, "max_new_tokens": max_new_tokens}
    settings = {key: value for key, value in settings.items() if value is not None}
    lm = load_model(options, name, silent=silent, explain=text is None)
    conversation = lm.chat(system, context_full="drop_oldest", **settings)
    if text is not None:
        answer(conversation, text, name, options.as_json, benchmark)
        return
    from keras_gemma.cli.terminal import Terminal

    listed = catalogue.presets().get(name)
    Terminal(conversation, name, benchmark, silent).talk(listed.description if listed else "")


def read_message(prompt: list[str], file: Path | None, stdin: TextIO) -> str | None:
    """Returns the message to reply to: command line, file and pipe, each on its own lines.

    Without any of these, returns `None`, which starts a conversation.

    Raises:
        typer.BadParameter: If `stdin` is not a terminal, and everything is empty.
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
    """Prints the reply to `text`."""
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
