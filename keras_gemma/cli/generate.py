"""`keras-gemma generate`: continues prompts from the command line, a file or a pipe."""

import json
import sys
from typing import Any, Literal

from typer import Argument, BadParameter, Option

from keras_gemma import catalogue
from keras_gemma.cli.options import (
    DEFAULT_MODEL,
    MODES,
    BenchmarkOption,
    LoadedQuantization,
    Mode,
    ModelOptions,
    SeedOption,
    SilentOption,
    drop_none,
    full_name,
    read_prompts,
    start,
    with_model_options,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch

DEFAULT_MAX_NEW_TOKENS = 128
"""Default number of new tokens, if the context has room for them."""


SamplerName = Literal["greedy", "random", "top_k", "top_p", "min_p", "beam", "contrastive"]
"""Method that chooses the next token."""

SEARCHES = ("beam", "contrastive")
"""Samplers that cannot stream, because they know their text only at its end."""


@with_model_options
def generate(
    prompts: list[str] = Argument(
        [],
        metavar="PROMPT",
        help='Texts to continue, each by itself. "-", or a pipe and no PROMPT: standard input.',
        show_default=False,
    ),
    *,
    options: ModelOptions,
    mode: Mode | None = Option(None, help="Sampling settings, which the options below override."),
    max_new_tokens: int | None = Option(
        None,
        min=1,
        help="Maximum number of new tokens.",
        show_default=f"{DEFAULT_MAX_NEW_TOKENS}, or the rest of the context",
    ),
    sampler: SamplerName | None = Option(
        None, help="Sampling method.", show_default="greedy, or random if another option needs it"
    ),
    temperature: float | None = Option(
        None, min=0, help="Divisor of the logits. 0 means greedy decoding."
    ),
    top_k: int | None = Option(None, min=1, help="Sample from the K most likely tokens."),
    top_p: float | None = Option(
        None, help="Sample from the most likely tokens with total probability P."
    ),
    min_p: float | None = Option(
        None, help="Minimum probability of a token, relative to the most likely one."
    ),
    repetition_penalty: float | None = Option(
        None, help="Above 1, tokens in the text become less likely."
    ),
    stop: list[str] = Option([], help="Stop string. Can be repeated."),
    seed: SeedOption = None,
    strip_prompt: bool = Option(False, "--strip-prompt", help="Print only the continuation."),
    quantization: LoadedQuantization | None = Option(
        None, help="Precision of the matrices, instead of --fit."
    ),
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Continue each PROMPT and print it with its continuation."""
    if quantization is not None and options.fit != "auto":
        raise BadParameter("pass --fit or --quantization, not both")
    texts = read_prompts(prompts, sys.stdin, options.file)
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.causal_lm.settings import GenerationSettings
    from keras_gemma.cli.loading import load_model

    settings = dict(MODES[mode]) if mode else {}
    settings |= drop_none(sampler=sampler, temperature=temperature, top_k=top_k, top_p=top_p)
    settings |= drop_none(min_p=min_p, repetition_penalty=repetition_penalty, seed=seed)
    settings |= {"stop": stop} if stop else {}
    samples = {"sampler", "temperature", "top_k", "top_p", "min_p"} & settings.keys()
    if "seed" in settings and not samples:
        settings["sampler"] = "random"  # A seed has no effect on a greedy sampler.
    try:  # before the weights are read
        GenerationSettings(**settings)
    except ValueError as error:
        raise BadParameter(str(error)) from error
    model = full_name(options.model or DEFAULT_MODEL)
    if benchmark:
        print(summary(model), file=sys.stderr)
    lm = load_model(options, model, quantization, silent)
    settings["max_new_tokens"] = max_new_tokens or default_new_tokens(lm, texts)
    watch = Watch()
    if options.as_json or len(texts) > 1 or sampler in SEARCHES:
        continuations = []
        outputs = lm.generate(texts, strip_prompt=strip_prompt, **settings)
        for prompt, text in zip(texts, outputs, strict=True):
            entry = {"model": model, "prompt": prompt, "text": text}
            show(json.dumps(entry, ensure_ascii=False) if options.as_json else text)
            continuations.append(text if strip_prompt else text[len(prompt) :])
    else:
        continuations = [stream(lm, texts[0], settings, strip_prompt, watch)]
    if benchmark:
        encode = lm.preprocessor.tokenizer.encode
        watch.report(sum(map(len, encode(texts))), 0, sum(map(len, encode(continuations))))


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


def stream(lm: Any, text: str, settings: dict[str, Any], strip_prompt: bool, watch: Watch) -> str:
    """Prints `text` and its continuation while it is generated. Returns the continuation."""
    pieces = []
    stream = lm.stream(text, **settings)
    show("" if strip_prompt else text, end="")
    for piece in stream:
        watch.piece()
        show(piece, end="")
        pieces.append(piece)
    show()
    return "".join(pieces)
