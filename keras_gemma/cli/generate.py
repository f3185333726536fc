"""`keras-gemma generate`: text for a prompt from the command line, a file or a pipe."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

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
    ModelOption,
    Quantization,
    SeedOption,
    SilentOption,
    full_name,
    read_prompts,
    start,
)
from keras_gemma.cli.printing import show
from keras_gemma.cli.speed import Watch

MOST_NEW_TOKENS = 128
"""Where nothing is said; fewer where the context holds no more."""


class SamplerName(StrEnum):
    """How the next token is chosen."""

    GREEDY = "greedy"
    RANDOM = "random"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"
    BEAM = "beam"
    CONTRASTIVE = "contrastive"


SEARCHES = (SamplerName.BEAM, SamplerName.CONTRASTIVE)
"""They know their text only at its end."""


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help='Texts to continue, each on its own. "-", or none and a pipe: standard input.',
            show_default=False,
        ),
    ] = None,
    file: FileOption = None,
    model: ModelOption = "gemma_tiny_en",
    lora: LoraOption = None,
    preset: FitOption = Fit.AUTO,
    mode: Annotated[
        Mode | None, typer.Option(help="How bold; options below change what it sets.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Tokens after the prompt; by default {MOST_NEW_TOKENS}, or what the context "
            "holds.",
        ),
    ] = None,
    sampler: Annotated[
        SamplerName | None,
        typer.Option(help="By default greedy, or what the other options call for."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="Below 1 bolder choices are rarer.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Choose among the K likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Choose among the likeliest that reach probability P.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Leave out what is P times less likely than the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1: tokens that were there get less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")
    ] = None,
    seed: SeedOption = None,
    strip_prompt: Annotated[
        bool, typer.Option("--strip-prompt", help="Print what follows the prompt alone.")
    ] = False,
    dtype: DtypeOption = None,
    quantization: Annotated[
        Quantization | None, typer.Option(help="Bits of the matrices, instead of --preset.")
    ] = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    silent: SilentOption = False,
    benchmark: BenchmarkOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue each PROMPT and print it with its continuation."""
    if quantization is not None and preset is not Fit.AUTO:
        raise typer.BadParameter("give --preset or --quantization, not both")
    texts = read_prompts(prompts or [], sys.stdin, file)
    start(backend, device, debug)

    # Imports Keras, on the chosen backend.
    from keras_gemma.causal_lm.settings import GenerationSettings
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.cli.options import check_device

    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop or None,
        "seed": seed,
        "sampler": sampler and sampler.value,
    }
    given = {name: value for name, value in given.items() if value is not None}
    drawing = {"sampler", "temperature", "top_k", "top_p", "min_p"}
    if mode is not None:
        given = {**MODES[mode], **given}
    if "seed" in given and not drawing & given.keys():
        given["sampler"] = "random"  # a seed is no use to a greedy sampler
    try:  # before the weights are read
        GenerationSettings(**given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    check_device(device)
    model = full_name(model)
    choice = choose(model, preset, dtype, quantization)
    if not choice.plain and not silent:
        print(f"{model}: {choice.reason}", file=sys.stderr)
    lm = load(choice, model, silent, lora)
    given["max_new_tokens"] = max_new_tokens or room(lm, texts)
    watch = Watch()
    if as_json or len(texts) > 1 or sampler in SEARCHES:
        outputs = lm.generate(texts, strip_prompt=strip_prompt, **given)
        for prompt, text in zip(texts, outputs, strict=True):
            entry = {"model": model, "prompt": prompt, "text": text}
            show(json.dumps(entry, ensure_ascii=False) if as_json else text)
        new = [
            text if strip_prompt else text[len(prompt) :]
            for prompt, text in zip(texts, outputs, strict=True)
        ]
    else:
        new = [stream(lm, texts[0], given, strip_prompt, watch)]
    if benchmark:
        count = lm.preprocessor.tokenizer.encode
        watch.report(sum(map(len, count(texts))), 0, sum(map(len, count(new))))


def room(lm: Any, texts: list[str]) -> int | list[int]:
    """How many tokens each text gets where nothing is said; 1 at least, where none would fit.

    A number for one text.
    """
    context = lm.backbone.config.context_length
    lengths = [len(ids) for ids in lm.preprocessor.tokenize_prompts(texts)]
    rooms = [max(1, min(MOST_NEW_TOKENS, context - length)) for length in lengths]
    return rooms[0] if len(rooms) == 1 else rooms


def stream(lm: Any, text: str, settings: dict[str, Any], strip_prompt: bool, watch: Watch) -> str:
    """Print `text` and what follows as it is made; returns what follows."""
    pieces = []
    stream = lm.stream(text, **settings)
    show("" if strip_prompt else text, end="")
    for piece in stream:
        watch.first()
        show(piece, end="")
        pieces.append(piece)
    show()
    return "".join(pieces)
