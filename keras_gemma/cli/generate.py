"""`keras-gemma generate`: continues prompts from the command line, a file or a pipe."""

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

from typer import Argument, BadParameter, Option

from keras_gemma import catalogue, progress
from keras_gemma.cli.options import (
    DEFAULT_MODEL,
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
from keras_gemma.cli.texts import read_prompts

DEFAULT_BATCH_SIZE = 8
"""Default of --max-batch-size, as in `Engine`."""

DEFAULT_MAX_NEW_TOKENS = 128
"""Default number of new tokens, if the context has room for them."""


@with_shared_options
def generate(
    prompts: list[str] = Argument(
        [],
        metavar="PROMPT",
        help='Texts to continue, each by itself. "-", or a pipe and no PROMPT: standard input. '
        "Each --file is one prompt.",
        show_default=False,
    ),
    *,
    options: ModelOptions,
    sampling: SamplingOptions,
    strip_prompt: bool = Option(False, "--strip-prompt", help="Print only the continuation."),
    input: Path | None = Option(
        None,
        "--input",
        metavar="FILE",
        help='JSON-lines file of prompts: strings, or objects with "prompt" or "messages" and '
        "settings of their own. Needs --output.",
        exists=True,
        dir_okay=False,
        show_default=False,
    ),
    output: Path | None = Option(
        None,
        "--output",
        metavar="FILE",
        help="JSON-lines file for the texts of --input, in the order in which they finish.",
        show_default=False,
    ),
    resume: bool = Option(False, "--resume", help="Add the missing texts to --output."),
    overwrite: bool = Option(False, "--overwrite", help="Replace --output."),
    max_batch_size: int = Option(
        DEFAULT_BATCH_SIZE, "--max-batch-size", min=1, help="Texts of --input at a time."
    ),
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Continue each PROMPT and print it with its continuation, or a file of prompts."""
    check_files(input, output, prompts, options)
    texts = [] if input else read_prompts(prompts, sys.stdin, options.file)
    settings = sampling.settings()
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    with progress.hidden() if silent else progress.status("Starting ..."):
        from keras_gemma.causal_lm.settings import GenerationSettings
        from keras_gemma.cli.loading import find_name, load_model

        try:  # before the weights are read
            GenerationSettings(**settings)
        except ValueError as error:
            raise BadParameter(str(error)) from error
        model = find_name(options, DEFAULT_MODEL)
        lm = load_model(options, model, silent)
    if benchmark:
        print(summary(model), file=sys.stderr)
    watch = Watch()
    if input is not None:
        with progress.hidden(silent):
            tokens = write_file(
                lm, input, output, settings, resume, overwrite, max_batch_size, watch
            )
        if benchmark:
            watch.report(*tokens)
        return
    settings.setdefault("max_new_tokens", default_new_tokens(lm, texts))
    with progress.hidden(silent):
        if options.as_json:
            tokens = print_json(lm, model, texts, settings, strip_prompt)
        else:
            tokens, reasons = print_texts(lm, texts, settings, strip_prompt, watch)
            if sys.stderr.isatty() and not silent and (note := length_note(reasons)):
                print(note, file=sys.stderr)
    if benchmark:
        watch.report(sum(map(len, lm.preprocessor.tokenizer.encode(texts))), 0, tokens)


def check_files(
    input: Path | None, output: Path | None, prompts: list[str], options: ModelOptions
) -> None:
    """Raises an error if the options for files of prompts are incomplete."""
    if (input is None) != (output is None):
        missing = "--output" if output is None else "--input"
        raise BadParameter(f"pass {missing} too", param_hint=missing)
    if input is not None and (prompts or options.file):
        raise BadParameter("pass either prompts or a file of prompts", param_hint="--input")


def write_file(
    lm: Any,
    input: Path,
    output: Path,
    settings: dict[str, Any],
    resume: bool,
    overwrite: bool,
    max_batch_size: int,
    watch: Watch,
) -> tuple[int, int, int]:
    """Generates the texts of a file.

    Returns the number of prompt tokens, of cached ones, and of new tokens.
    """
    from keras_gemma.batch.request_file import generate_file, read_prompt_lines

    counts = [0, 0, 0]
    total = len(read_prompt_lines(input))
    if "max_length" not in settings:
        settings.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    with progress.bar("Generating", total) as advance:

        def add(result: Any) -> None:
            watch.piece()
            counts[0] += result.prompt_tokens
            counts[2] += sum(result.new_tokens)
            advance(1)

        generate_file(
            lm,
            input,
            output,
            resume=resume,
            overwrite=overwrite,
            max_batch_size=max_batch_size,
            on_output=add,
            **settings,
        )
    return tuple(counts)


def summary(model: str) -> str:
    """Returns the name of a model, and the parameters and the license of a preset."""
    preset = catalogue.find(model)
    if preset is None:
        return model
    return (
        f"{model}: {preset.description} {preset.config.parameter_count:,} parameters. "
        f"License: {preset.license}, {preset.license_url}"
    )


def default_new_tokens(lm: Any, texts: list[str]) -> int | list[int]:
    """Returns the default number of new tokens: a number for one text, else a list.

    A text that fills the context gets 1, so that `generate` raises the error.
    """
    context = lm.backbone.config.context_length
    lengths = [len(ids) for ids in lm.preprocessor.tokenize_prompts(texts)]
    counts = [max(1, min(DEFAULT_MAX_NEW_TOKENS, context - length)) for length in lengths]
    return counts[0] if len(counts) == 1 else counts


def print_json(
    lm: Any, model: str, texts: list[str], settings: dict[str, Any], strip_prompt: bool
) -> int:
    """Prints a line per text. Returns the number of new tokens."""
    with progress.status("Generating ..."):
        completions = lm.generate(
            texts, strip_prompt=strip_prompt, return_logprobs=True, **settings
        )
    prompts = lm.preprocessor.tokenize_prompts(texts)
    for prompt, ids, completion in zip(texts, prompts, completions, strict=True):
        entry = {
            "model": model,
            "prompt": prompt,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "prompt_tokens": len(ids),
            "new_tokens": len(completion.token_ids),
        }
        show(json.dumps(entry, ensure_ascii=False))
    return sum(len(completion.token_ids) for completion in completions)


def print_texts(
    lm: Any, texts: list[str], settings: dict[str, Any], strip_prompt: bool, watch: Watch
) -> tuple[int, list[str]]:
    """Prints the texts, the first while it is generated.

    Returns the number of new tokens, and the finish reason of each text.
    """
    if settings.get("sampler") in SEARCHES:
        pieces = search(lm, texts, settings)
    else:
        stream = lm.stream(texts, **settings)
        pieces = progress.status_until_first("Generating ...", stream)
    beginnings = [heading(text) if len(texts) > 1 else "" for text in texts]
    if not strip_prompt:
        beginnings = [start + text for start, text in zip(beginnings, texts, strict=True)]
    continuations, reasons = [""] * len(texts), None
    while reasons is None:
        try:
            new = next(pieces)
        except StopIteration as end:
            new, reasons = [""] * len(texts), end.value or []
        else:
            watch.piece()
        show(beginnings[0] + new[0], end="")
        beginnings[0] = ""
        continuations = [old + text for old, text in zip(continuations, new, strict=True)]
    show()
    for beginning, continuation in zip(beginnings[1:], continuations[1:], strict=True):
        show(f"\n{beginning}{continuation}")
    return sum(map(len, lm.preprocessor.tokenizer.encode(continuations))), reasons


def search(
    lm: Any, texts: list[str], settings: dict[str, Any]
) -> Generator[list[str], None, list[str]]:
    """Yields the texts of a search once, and returns their finish reasons, as `lm.stream` does."""
    with progress.status("Searching ..."):
        completions = lm.generate(texts, strip_prompt=True, return_logprobs=True, **settings)
    yield [completion.text for completion in completions]
    return [completion.finish_reason for completion in completions]


def length_note(reasons: list[str]) -> str:
    """Returns a note for texts that ended at their maximum length, or an empty string."""
    cut = reasons.count("length")
    if not cut:
        return ""
    subject = "the text" if len(reasons) == 1 else f"{cut} of {len(reasons)} texts"
    return f"({subject} reached the maximum length: --max-new-tokens, or the model's context)"


def heading(text: str) -> str:
    """Returns the line above one of several texts."""
    return f"==> {json.dumps(text, ensure_ascii=False)[:60]} <==\n"
