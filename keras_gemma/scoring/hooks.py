"""Names of the hook points, and name patterns.

    embeddings                      [B, T, D], before scaling
    block.<layer>.<hook point>      hook points of `keras_gemma.model.hooks.BLOCK_HOOK_POINTS`
    final_norm                      [B, T, D], the input of the head
    logits                          float32 [B, T, V], after the soft cap

A hook is a function of the activations and the hook point's name. Its result replaces the
activations.
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

from keras_gemma import backend
from keras_gemma.model.hooks import BLOCK_HOOK_POINTS

Hook = Callable[[Any, str], Any]
Intercept = Callable[[Any, int], Any]


def hook_point_names(num_layers: int) -> list[str]:
    """Returns the names of all hook points, in the order of the forward pass."""
    blocks = [f"block.{i}.{name}" for i in range(num_layers) for name in BLOCK_HOOK_POINTS]
    return ["embeddings", *blocks, "final_norm", "logits"]


def match(patterns: Iterable[str], num_layers: int, argument: str) -> dict[str, list[str]]:
    """Returns the names that match each pattern, with the wildcards `*`, `?` and `[0-3]`.

    Args:
        patterns: Names or patterns.
        num_layers: Number of blocks.
        argument: Name of the argument, for error messages.

    Raises:
        TypeError: If a pattern is not a string.
        ValueError: If a pattern matches no hook point.
    """
    names = hook_point_names(num_layers)
    matches = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"`{argument}` must name hook points by strings such as "
                f"'block.0.attention.weights'. Received: {pattern!r:.200}"
            )
        matches[pattern] = [name for name in names if fnmatchcase(name, pattern)]
        if not matches[pattern]:
            similar = difflib.get_close_matches(pattern, names, n=4, cutoff=0.0)
            raise ValueError(
                f"`{argument}` names a hook point that this model of {num_layers} blocks does not "
                f"have. Similar names are {', '.join(similar)}; `*` matches any characters. "
                f"Received: {pattern!r}"
            )
    return matches


def read_hooks(
    hooks: Mapping[str, Hook] | None, intercept: Intercept | None, num_layers: int
) -> dict[str, Callable[[Any], Any]]:
    """Combines `hooks` and `layer_intercept_fn` of `score` to one function for each hook point.

    Several hooks at one hook point are chained in the order of `hooks`, with `layer_intercept_fn`
    last.

    Raises:
        TypeError: If `hooks` is not a dict from names to functions of two arguments.
        ValueError: If a pattern matches no hook point, or `layer_intercept_fn` is not a function
            of two arguments.
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
                "A hook must be a function of two arguments, the activations and the hook point's "
                f"name. Received: hooks[{pattern!r}]={hook!r:.200}"
            )
        for name in names:
            checked = partial(_checked, hook, name, f"The hook at {name!r}")
            chains.setdefault(name, []).append(checked)
    if intercept is not None:
        hook_points = ["embeddings", *(f"block.{i}.residual.after" for i in range(num_layers))]
        for layer, name in enumerate(hook_points, start=-1):
            who = f"`layer_intercept_fn`, at layer {layer},"
            chains.setdefault(name, []).append(partial(_checked, intercept, layer, who))
    return {name: partial(_call_chain, chain) for name, chain in chains.items()}


def _takes_two(function: Any) -> bool:
    """Returns True if `function` accepts two arguments, or its signature is unknown."""
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except ValueError:  # some functions written in C have no signature
        return True
    try:
        signature.bind(None, None)
    except TypeError:
        return False
    return True


def _call_chain(chain: list[Callable[[Any], Any]], x: Any) -> Any:
    for function in chain:
        x = function(x)
    return x


def _checked(function: Callable[..., Any], argument: Any, who: str, x: Any) -> Any:
    """Returns `function(x, argument)`, or raises a ValueError if its shape or dtype is not `x`'s.

    `who` names the function in the error message.
    """
    y = function(x, argument)
    is_array = isinstance(y, np.ndarray | keras.Variable)
    if (is_array or ops.is_tensor(y)) and _describe(y) == _describe(x):
        return backend.to_tensor(y) if is_array else y
    if y is None:
        remedy = "Return the activations unchanged if the hook only reads them"
    elif is_array or ops.is_tensor(y):
        remedy = "Cast or reshape the result"
    else:
        remedy = (
            f"Convert the result to a {keras.backend.backend()} tensor with "
            "`keras.ops.convert_to_tensor`"
        )
    raise ValueError(
        f"{who} must return a tensor of the same shape and dtype as its input. {remedy}. "
        f"Received: {_describe(x)} as input and {_describe(y)} as result"
    )


def _describe(x: Any) -> str:
    if isinstance(x, np.ndarray | keras.Variable) or ops.is_tensor(x):
        return f"{keras.backend.standardize_dtype(x.dtype)} {tuple(x.shape)}"
    return f"{x!r:.60} of type {type(x).__name__}"
