"""Names of the places where a hook may look and replace, and patterns of such names.

    embeddings                      [B, T, D], not yet scaled
    block.<layer>.<place>           the places of `keras_gemma.model.hooks.BLOCK_PLACES`
    final_norm                      [B, T, D], what the head reads
    logits                          float32 [B, T, V], capped

A hook is a function of what stands there and of the place's name; what it returns goes on.
"""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_gemma.model.hooks import BLOCK_PLACES

Hook = Callable[[Any, str], Any]
Intercept = Callable[[Any, int], Any]


def place_names(num_layers: int) -> list[str]:
    """Every name, in the order of the data."""
    blocks = [f"block.{i}.{place}" for i in range(num_layers) for place in BLOCK_PLACES]
    return ["embeddings", *blocks, "final_norm", "logits"]


def match(patterns: Iterable[str], num_layers: int, argument: str) -> dict[str, list[str]]:
    """The names that each pattern means, as file names are matched: `*`, `?`, `[0-3]`.

    Raises:
        TypeError: a pattern that is no string; `argument` is where it was given.
        ValueError: one that matches nothing.
    """
    names = place_names(num_layers)
    found = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{argument}` must name places by strings such as 'block.0.attention.weights'. "
                f"Received: {pattern!r:.200}"
            )
        found[pattern] = [name for name in names if fnmatchcase(name, pattern)]
        if not found[pattern]:
            near = difflib.get_close_matches(pattern, names, n=4, cutoff=0.0)
            raise ValueError(
                f"`{argument}` names a place that this model of {num_layers} blocks does not "
                f"have. Near it are {', '.join(near)}; `*` stands for anything. "
                f"Received: {pattern!r}"
            )
    return found


def read_hooks(
    hooks: Mapping[str, Hook] | None, intercept: Intercept | None, num_layers: int
) -> dict[str, Callable[[Any], Any]]:
    """The arguments `hooks` and `layer_intercept_fn` of `score` as one function for each place.

    Where several look at one place, each is given what the one before it returned, and
    `layer_intercept_fn` comes last.

    Raises:
        TypeError: hooks that are no dict from names to functions of two arguments.
        ValueError: a pattern that matches nothing, an intercept that is no such function.
    """
    if intercept is not None and not _takes_two(intercept):
        raise ValueError(
            "`layer_intercept_fn` must be a function of two arguments, the activations and the "
            f"layer's index. Received: layer_intercept_fn={intercept!r:.200}"
        )
    if not isinstance(hooks, Mapping | None):
        raise TypeError(
            "`hooks` must be a dict from names such as 'block.0.attention.weights' to functions. "
            f"Received: {hooks!r:.200}"
        )
    chains: dict[str, list[Callable[[Any], Any]]] = {}
    for pattern, names in match(hooks or (), num_layers, "hooks").items():
        hook = hooks[pattern]
        if not _takes_two(hook):
            raise TypeError(
                "A hook must be a function of two arguments, what stands at a place and the "
                f"place's name. Received: hooks[{pattern!r}]={hook!r:.200}"
            )
        for name in names:
            check = partial(_checked, hook, name, f"The hook at {name!r}")
            chains.setdefault(name, []).append(check)
    if intercept is not None:
        places = ["embeddings", *(f"block.{i}.residual.after" for i in range(num_layers))]
        for layer, name in enumerate(places, start=-1):
            who = f"`layer_intercept_fn`, at layer {layer},"
            chains.setdefault(name, []).append(partial(_checked, intercept, layer, who))
    return {name: partial(_in_turn, chain) for name, chain in chains.items()}


def _takes_two(function: Any) -> bool:
    """Whether `function` can be called with two arguments, as far as Python can tell."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:  # some of those written in C have none
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _in_turn(chain: list[Callable[[Any], Any]], x: Any) -> Any:
    for function in chain:
        x = function(x)
    return x


def _checked(function: Callable[..., Any], place: Any, who: str, x: Any) -> Any:
    """`function(x, place)`, where it is like `x`; `who` is the function in an error."""
    y = function(x, place)
    is_array = isinstance(y, np.ndarray | keras.Variable)
    if (is_array or ops.is_tensor(y)) and _describe(y) == _describe(x):
        return ops.convert_to_tensor(y) if is_array else y
    if y is None:
        remedy = "Return what it was given, to look only"
    elif is_array or ops.is_tensor(y):
        remedy = "Cast or reshape it"
    else:
        remedy = f"Make it one of {keras.backend.backend()}, by `keras.ops.convert_to_tensor`"
    raise ValueError(
        f"{who} must return a tensor of the shape and dtype that it was given. {remedy}. "
        f"It was given {_describe(x)} and returned {_describe(y)}"
    )


def _describe(x: Any) -> str:
    if isinstance(x, np.ndarray | keras.Variable) or ops.is_tensor(x):
        return f"{keras.backend.standardize_dtype(x.dtype)} {tuple(x.shape)}"
    return f"{x!r:.60} of type {type(x).__name__}"
