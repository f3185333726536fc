"""`keras-gemma chat`: a conversation in the terminal, or one reply to a prompt or a pipe."""

import json
import sys
from pathlib import Path
from typing import Any, TextIO

from typer import Argument, BadParameter, Option

from keras_gemma.cli.options import (
    MODES,
    BenchmarkOption,
    Mode,
    ModelOptions,
    SeedOption,
    SilentOption,
    drop_none,
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
    prompt: list[str] = Argument(
        [],
        metavar="PROMPT",
        help="Message to reply to, instead of a conversation. A pipe is appended to it.",
        show_default=False,
    ),
    *,
    options: ModelOptions,
    mode: Mode | None = Option(
        None, help="Sampling settings.", show_default="chat; factual with the built-in model"
    ),
    system: str | None = Option(None, help="System message."),
    max_new_tokens: int | None = Option(
        None, min=1, help="Maximum tokens per reply.", show_default="the rest of the context"
    ),
    seed: SeedOption = None,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Talk with a model. Type !help in the conversation to see its commands."""
    text = read_message(prompt, options.file, sys.stdin)
    if text is None and options.as_json:
        raise BadParameter("--json needs a prompt, or a pipe", param_hint="PROMPT")
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma import catalogue
    from keras_gemma.cli.loading import load_model

    name = full_name(options.model or DEFAULT_MODEL)
    mode = mode or ("factual" if name == DEFAULT_MODEL else "chat")
    settings = MODES[mode] | drop_none(seed=seed, max_new_tokens=max_new_tokens)
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
    """
    parts = [" ".join(prompt)] if prompt else []
    if file is not None:
        parts.append(file.read_text(encoding="utf-8").strip())
    if not stdin.isatty():
        parts.append(stdin.read().strip())
    if not parts:
        return None
    if not any(parts):
        raise BadParameter("standard input is empty", param_hint="PROMPT")
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
            watch.piece()
            show(piece, end="")
        show()
    if benchmark:
        watch.report(conversation.prefilled_tokens, 0, conversation.new_tokens)
