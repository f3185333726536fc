"""Scoring: what the model thinks of a text that is there already, and why.

In the order of the data:

    inputs.py       texts and ids, checked
    hooks.py        the names of places inside, and functions that look and replace there
    forward.py      ids to what the head reads, by way of the hooks
    losses.py       cross entropy in chunks of positions
    score.py        logits and losses, compiled where no hook looks on
    perplexity.py   the log-probability of each token, over windows that slide
    scorable.py     both, as methods of a model
    tracing.py      activations by their names
    lens.py         the next token by each block; where heads look
    patching.py     which activation makes the difference between two prompts
    answer.py       the next token that patching and attribution ask for
    attribution.py  how much each token speaks for an answer
    gradient.py     of any function, on every backend
    plots.py        pictures of all of it, by matplotlib
    coloring.py     texts with a color for each token, in HTML
"""

from keras_gemma.scoring import plots
from keras_gemma.scoring.attribution import (
    Attribution,
    gradient_times_input,
    integrated_gradients,
)
from keras_gemma.scoring.coloring import ColoredTokens
from keras_gemma.scoring.lens import AttentionMaps, LogitLens, attention_maps, logit_lens
from keras_gemma.scoring.patching import Patching, activation_patching
from keras_gemma.scoring.perplexity import TokenScores, score_tokens
from keras_gemma.scoring.tracing import trace

__all__ = [
    "AttentionMaps",
    "Attribution",
    "ColoredTokens",
    "LogitLens",
    "Patching",
    "TokenScores",
    "activation_patching",
    "attention_maps",
    "gradient_times_input",
    "integrated_gradients",
    "logit_lens",
    "plots",
    "score_tokens",
    "trace",
]
