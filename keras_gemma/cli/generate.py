"""`keras-gemma generate`: continues prompts from the command line, a file or a pipe."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from keras_gemma.cli.options import (
    DEFAULT_MODEL,
    MODES,
    BenchmarkOption,
    Fit,
    Mode,
    ModelOptions,
    Quantization,
    SeedOption,
    SilentOption,
    full_name,
    read_prompts,
    start,
    with_model_options,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch

DEFAULT_MAX_NEW_TOKENS = 128
"""Default number of new tokens, if the context has room for them."""


class SamplerName(StrEnum):
    """Method that chooses the next token."""

    GREEDY = "greedy"
    RANDOM = "random"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"
    BEAM = "beam"
    CONTRASTIVE = "contrastive"


SEARCHES = (SamplerName.BEAM, SamplerName.CONTRASTIVE)
"""Samplers that cannot stream, because they know their text only at its end."""


@with_model_options
def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help='Texts to continue, each by itself. "-", or a pipe and no PROMPT: standard input.',
            show_default=False,
        ),
    ] = None,
    *,
    options: ModelOptions,
    mode: Annotated[
        Mode | None, typer.Option(help="Sampling settings, which the options below override.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of new tokens.",
            show_default=f"{DEFAULT_MAX_NEW_TOKENS}, or the rest of the context",
        ),
    ] = None,
    sampler: Annotated[
        SamplerName | None,
        typer.Option(
            help="Sampling method.", show_default="greedy, or random if another option needs it"
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Divisor of the logits. 0 means greedy decoding.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Sample from the K most likely tokens.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from the most likely tokens with total probability P."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Minimum probability of a token, relative to the most likely one."),
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, tokens in the text become less likely.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop string. Can be repeated.")] = None,
    seed: SeedOption = None,
    strip_prompt: Annotated[
        bool, typer.Option("--strip-prompt", help="Print only the continuation.")
    ] = False,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Precision of the matrices, instead of --fit.")
    ] = None,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
) -> None:
    """Continue each PROMPT and print it with its continuation."""
    if quantization is not None and options.fit is not Fit.AUTO:
        raise typer.BadParameter("pass --fit or --quantization, not both")
    texts = read_prompts(prompts or [], sys.stdin, options.file)
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    from keras_gemma.causal_lm.settings import GenerationSettings
    from keras_gemma.cli.loading import load_model
    from keras_gemma.cli.options import check_device

    settings = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
        "sampler": sampler and sampler.value,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if mode is not None:
        settings = {**MODES[mode], **settings}
    samples = {"sampler", "temperature", "top_k", "top_p", "min_p"} & settings.keys()
    if "seed" in settings and not samples:
        settings["sampler"] = "random"  # A seed has no effect on a greedy sampler.
    try:  # before the weights are read
        GenerationSettings(**settings)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_device(options.device)
    model = full_name(options.model or DEFAULT_MODEL)
    lm = load_model(options, model, quantization, silent)
    settings["max_new_tokens"] = max_new_tokens or default_new_tokens(lm, texts)
    watch = Watch()
    if options.as_json or len(texts) > 1 or sampler in SEARCHES:
        outputs = lm.generate(texts, strip_prompt=strip_prompt, **settings)
        for prompt, text in zip(texts, outputs, strict=True):
            entry = {"model": model, "prompt": prompt, "text": text}
            show(json.dumps(entry, ensure_ascii=False) if options.as_json else text)
        continuations = [
            text if strip_prompt else text[len(prompt) :]
            for prompt, text in zip(texts, outputs, strict=True)
        ]
    else:
        continuations = [stream(lm, texts[0], settings, strip_prompt, watch)]
    if benchmark:
        encode = lm.preprocessor.tokenizer.encode
        watch.report(sum(map(len, encode(texts))), 0, sum(map(len, encode(continuations))))


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
        watch.first()
        show(piece, end="")
        pieces.append(piece)
    show()
    return "".join(pieces)
