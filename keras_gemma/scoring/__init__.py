"""Scoring and interpretability of existing texts.

In the order of the data:

    inputs.py       texts and ids, checked
    hooks.py        hook points, and user-defined functions that read or replace activations there
    forward.py      forward pass from ids to the final norm, with hooks
    score.py        logits and losses, compiled if there are no hooks
    token_tree.py   texts as one tree of tokens, read in chunks
    continuations.py  log-probabilities of continuations and choices
    perplexity.py   log-probability of each token, over sliding windows
    tracing.py      activations by the names of their hook points
    lens.py         logit lens and attention maps
    patching.py     activation patching between two prompts
    answer.py       the answer token of patching and attribution
    attribution.py  attribution of an answer to the tokens of a prompt
    gradient.py     gradient of a function, on every backend
    plots.py        plots of all results, with matplotlib
    coloring.py     texts with colored tokens, in HTML
"""

from keras_gemma.scoring import plots
from keras_gemma.scoring.attribution import (
    Attribution,
    gradient_times_input,
    integrated_gradients,
)
from keras_gemma.scoring.coloring import ColoredTokens
from keras_gemma.scoring.continuations import ContinuationScore
from keras_gemma.scoring.lens import AttentionMaps, LogitLens, attention_maps, logit_lens
from keras_gemma.scoring.patching import Patching, activation_patching
from keras_gemma.scoring.perplexity import TokenScores, score_tokens
from keras_gemma.scoring.tracing import trace

__all__ = [
    "AttentionMaps",
    "Attribution",
    "ColoredTokens",
    "ContinuationScore",
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
