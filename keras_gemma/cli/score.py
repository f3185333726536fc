"""`keras-gemma score`: how likely a model holds texts that are there already."""

import json
import sys
from typing import Annotated, Any

import typer

from keras_gemma.cli.options import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FileOption,
    Fit,
    FitOption,
    JsonOption,
    LoraOption,
    ModelOption,
    full_name,
    read_prompts,
    start,
)
from keras_gemma.cli.printing import show


def score(
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TEXT",
            help='Each is scored alone. "-", or none and a pipe: standard input.',
            show_default=False,
        ),
    ] = None,
    file: FileOption = None,
    model: ModelOption = "gemma_tiny_en",
    lora: LoraOption = None,
    preset: FitOption = Fit.AUTO,
    tokens: Annotated[bool, typer.Option("--tokens", help="A line for each token.")] = False,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the perplexity of each TEXT, and with --tokens the loss of each token, in nats."""
    texts = read_prompts(texts or [], sys.stdin, file)
    start(backend, device, debug)

    # Imports Keras, on the chosen backend.
    from keras_gemma.cli.loading import choose, load
    from keras_gemma.cli.options import check_device

    check_device(device)
    model = full_name(model)
    choice = choose(model, preset, dtype)
    if not choice.plain:
        print(f"{model}: {choice.reason}", file=sys.stderr)
    lm = load(choice, model, lora=lora)
    for text in texts:
        found = {"model": model, "text": text, **measure(lm, text)}
        if as_json:
            show(json.dumps(found, ensure_ascii=False))
            continue
        show(
            f"perplexity {found['perplexity']:.4g}, {found['nats_per_token']:.4g} nats a token, "
            f"{found['tokens']} tokens: {json.dumps(text, ensure_ascii=False)[:60]}"
        )
        if tokens:
            for piece, loss in zip(found["pieces"], found["losses"], strict=True):
                show(f"{loss:8.3f}  {json.dumps(piece, ensure_ascii=False)}")


def measure(lm: Any, text: str) -> dict[str, Any]:
    """The losses of the tokens of `text`, in nats, and what they come to.

    The first token, `<bos>`, is given and has none.

    Raises:
        ValueError: a text without a token to predict, or longer than the context.
    """
    import math

    import numpy as np

    (ids,) = lm.preprocessor.tokenize_prompts([text])
    if len(ids) < 2:
        raise ValueError(f"A text needs a token at least to be scored. Received: {text!r}")
    losses = lm.score(ids[None, :-1], scoring_mode="loss", target_ids=ids[None, 1:])
    losses = np.asarray(to_numpy(losses), "float64")[0]
    pieces = [lm.preprocessor.tokenizer.id_to_token(int(id)) for id in ids[1:]]
    mean = float(losses.mean())
    return {
        "tokens": len(losses),
        "nats_per_token": mean,
        "perplexity": math.exp(mean),
        "pieces": pieces,
        "losses": losses.tolist(),
    }


def to_numpy(tensor: Any) -> Any:
    """A tensor of any backend, as an array."""
    from keras import ops

    return ops.convert_to_numpy(tensor)
