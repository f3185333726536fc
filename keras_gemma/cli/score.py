"""`keras-gemma score`: perplexity of existing texts, and the loss of each token."""

import json
import sys
from typing import Any

from typer import Argument, Option

from keras_gemma import progress
from keras_gemma.cli.options import DEFAULT_MODEL, ModelOptions, start, with_shared_options
from keras_gemma.cli.printing import plural, show
from keras_gemma.cli.texts import read_prompts


@with_shared_options
def score(
    texts: list[str] = Argument(
        [],
        metavar="TEXT",
        help='Texts to score, each by itself. "-", or a pipe and no TEXT: standard input.',
        show_default=False,
    ),
    *,
    options: ModelOptions,
    tokens: bool = Option(False, "--tokens", help="Print a line per token."),
) -> None:
    """Show the perplexity of each TEXT, and with --tokens the loss of each token, in nats."""
    texts = read_prompts(texts, sys.stdin, options.file)
    start(options.backend, options.device, options.debug)

    # These imports load Keras on the chosen backend.
    with progress.status("Starting ..."):
        from keras_gemma.cli.loading import find_name, load_model

        model = find_name(options, DEFAULT_MODEL)
        lm = load_model(options, model)
    for text in texts:
        with progress.status("Scoring ..."):
            entry = {"model": model, "text": text, **measure(lm, text)}
        if options.as_json:
            show(json.dumps(entry, ensure_ascii=False))
            continue
        show(
            f"perplexity {entry['perplexity']:.4g}, {entry['nats_per_token']:.4g} nats per token, "
            f"{plural(entry['tokens'], 'token')}: {json.dumps(text, ensure_ascii=False)[:60]}"
        )
        if tokens:
            for piece, loss in zip(entry["pieces"], entry["losses"], strict=True):
                show(f"{loss:8.3f}  {json.dumps(piece, ensure_ascii=False)}")


def measure(lm: Any, text: str) -> dict[str, Any]:
    """Returns the loss of each token of `text` but the first, `<bos>`, in nats, and their mean."""
    from keras_gemma.scoring import score_tokens

    scores = score_tokens(lm, text)
    losses = -scores.log_probabilities[1:]
    return {
        "tokens": len(losses),
        "nats_per_token": float(losses.mean()),
        "perplexity": scores.perplexity,
        "pieces": scores.tokens[1:],
        "losses": losses.tolist(),
    }
