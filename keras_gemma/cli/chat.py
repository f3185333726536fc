"""`keras-gemma chat`: a conversation in the terminal, or one reply to a prompt or a pipe."""

import dataclasses
import json
import sys
from typing import Any

from typer import Argument, BadParameter, Option

from keras_gemma import catalogue, progress
from keras_gemma.cli.options import (
    DEFAULT_CHAT_MODEL,
    SEARCHES,
    BenchmarkOption,
    ModelOptions,
    SamplingOptions,
    SilentOption,
    start,
    with_shared_options,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch
from keras_gemma.cli.texts import read_message


@with_shared_options
def chat(
    prompt: list[str] = Argument(
        [],
        metavar="PROMPT",
        help="Message to reply to, instead of a conversation. Files and a pipe are appended to it.",
        show_default=False,
    ),
    *,
    options: ModelOptions,
    system: str | None = Option(None, help="System message."),
    sampling: SamplingOptions,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Talk with a model. Type !help in the conversation to see its commands."""

    def settings_of(model: str) -> dict[str, Any]:
        return sampling.settings("factual" if model == DEFAULT_CHAT_MODEL else "chat")

    text = read_message(prompt, options.file, sys.stdin)
    if text is None and options.as_json:
        raise BadParameter("--json needs a prompt, or a pipe", param_hint="PROMPT")
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    with progress.hidden() if silent else progress.status("Starting ..."):
        from keras_gemma.causal_lm.settings import GenerationSettings
        from keras_gemma.cli.loading import find_name, load_model

        name = find_name(options, DEFAULT_CHAT_MODEL)
        settings = settings_of(name)
        if settings.get("sampler") in SEARCHES:
            raise BadParameter(
                f"{settings['sampler']} search cannot be streamed in a conversation: use generate",
                param_hint="--sampler",
            )
        try:  # before the weights are read
            GenerationSettings(**settings)
        except ValueError as error:
            raise BadParameter(str(error)) from error
        lm = load_model(options, name, silent=silent, explain=text is None)

    def open_chat(model: str) -> Any:
        """Returns an empty conversation with another model."""
        lm = load_model(dataclasses.replace(options, lora=None), model, silent, explain=True)
        return lm.chat(context_full="drop_oldest", **settings_of(model))

    conversation = lm.chat(system, context_full="drop_oldest", **settings)
    with progress.hidden(silent):
        if text is not None:
            answer(conversation, text, name, options.as_json, benchmark)
            return
        from keras_gemma.cli.terminal import Terminal

        listed = catalogue.presets().get(name)
        terminal = Terminal(conversation, name, benchmark, silent, open_chat)
        terminal.talk(listed.description if listed else "")


def answer(conversation: Any, text: str, model: str, as_json: bool, benchmark: bool) -> None:
    """Prints the reply to `text`."""
    watch = Watch()
    if as_json:
        with progress.status("Thinking ..."):
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
        for piece in progress.status_until_first("Thinking ...", conversation.stream(text)):
            watch.piece()
            show(piece, end="")
        show()
    if benchmark:
        watch.report(conversation.prefilled_tokens, 0, conversation.new_tokens)
