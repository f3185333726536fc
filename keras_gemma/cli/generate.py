"""`keras-gemma generate`: text for a prompt from the command line or from a pipe."""

import json
import logging
import os
import sys
import warnings
from enum import StrEnum
from typing import Annotated, TextIO

import typer

from keras_gemma.backend_choice import BACKENDS, use_backend

Backend = StrEnum("Backend", [(name, name) for name in BACKENDS])


class SamplerName(StrEnum):
    """How the next token is chosen."""

    GREEDY = "greedy"
    RANDOM = "random"
    TOP_K = "top_k"
    TOP_P = "top_p"
    MIN_P = "min_p"
    BEAM = "beam"
    CONTRASTIVE = "contrastive"


class Quantization(StrEnum):
    """Bits of the matrices."""

    INT8 = "int8"
    INT4 = "int4"


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help='Texts to continue, each on its own. "-", or none and a pipe: standard input.',
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Preset name, kaggle:// or hf:// handle, or directory.")
    ] = "gemma_tiny_en",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the prompt.")] = 128,
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
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    strip_prompt: Annotated[
        bool, typer.Option("--strip-prompt", help="Print what follows the prompt alone.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="Of weights and activations, e.g. bfloat16.")
    ] = None,
    quantization: Annotated[
        Quantization | None,
        typer.Option(help="Bits of the matrices; by default as the model is stored."),
    ] = None,
    backend: Annotated[
        Backend | None, typer.Option(help="By default KERAS_BACKEND, or the first installed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON a prompt.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks and what the frameworks log.")
    ] = False,
) -> None:
    """Continue each PROMPT and print it with its continuation."""
    texts = read_prompts(prompts or [], sys.stdin)
    if debug:
        sys.excepthook = sys.__excepthook__
    else:
        silence_frameworks()
    use_backend(backend and backend.value)

    # Keras is imported here, on the backend chosen; `storage` gives the model its from_preset.
    from keras_gemma import storage  # noqa: F401
    from keras_gemma.causal_lm import GemmaCausalLM
    from keras_gemma.completion.settings import GenerationSettings

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
    if "seed" in given and not drawing & given.keys():
        given["sampler"] = "random"  # a seed is no use to a greedy sampler
    try:  # before the weights are read
        GenerationSettings(**given)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    bits = {"quantization": quantization.value} if quantization else {}
    lm = GemmaCausalLM.from_preset(model, dtype=dtype, **bits)
    settings = {"max_new_tokens": max_new_tokens, "strip_prompt": strip_prompt, **given}
    outputs = lm.generate(texts, **settings)
    for prompt, text in zip(texts, outputs, strict=True):
        if as_json:
            text = json.dumps({"model": model, "prompt": prompt, "text": text}, ensure_ascii=False)
        print(text)


def read_prompts(prompts: list[str], stdin: TextIO) -> list[str]:
    """The prompts, with standard input in the place of "-", or alone where there is none.

    Raises:
        typer.BadParameter: no prompt and no pipe, or nothing in the pipe.
    """
    if not prompts and not stdin.isatty():
        prompts = ["-"]
    if not prompts:
        raise typer.BadParameter("write one, or pipe a text in", param_hint="PROMPT")
    if "-" not in prompts:
        return prompts
    piped = stdin.read().removesuffix("\n")
    if not piped:
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return [piped if prompt == "-" else prompt for prompt in prompts]


def silence_frameworks() -> None:
    """Keep logs, warnings and, in a pipe, progress bars off stderr; before Keras is imported.

    TensorFlow's native code writes to file descriptor 2 whatever it is told: from here on that
    leads nowhere, and `sys.stderr` to where it led before.
    """
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("KAGGLEHUB_VERBOSITY", "error")  # it reports to stdout
    for logger in ("absl", "jax", "tensorflow"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
