"""Tiny models whose greedy text is varied, with the same weights on every backend."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma import samplers
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.transformer import hidden_states
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS


def on_torch():
    return keras.config.backend() == "torch"


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Compiles with few optimizations: for tiny programs, the best compilation costs most.

    TensorFlow compiles plain graphs, without XLA. PyTorch computes in one thread, because small
    products are slower in several.
    """
    with pytest.MonkeyPatch.context() as patch:
        if on_torch():
            import torch

            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            yield
            torch.set_num_threads(threads)
        elif keras.config.backend() == "jax":
            import jax

            before = jax.config.read("jax_disable_most_optimizations")
            jax.config.update("jax_disable_most_optimizations", True)
            yield
            jax.config.update("jax_disable_most_optimizations", before)
        else:
            _without_xla(patch)
            yield


def _without_xla(patch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from keras_gemma.backend import tensorflow as backend

    original = tf.function

    def function(*args: Any, jit_compile: bool | None = None, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    patch.setattr(tf, "function", function)
    for module in (backend, backend.cpu):
        for name, value in list(vars(module).items()):
            if isinstance(value, tf.types.experimental.PolymorphicFunction):
                patch.setattr(module, name, original(value.python_function, autograph=False))
    never = types.SimpleNamespace(get=lambda: False, set=bool, reset=bool)
    patch.setattr(backend, "_in_xla", never)


def make_backbone(name="gemma1_multi_query", dtype="float32", seed=0, num_layers=2, **changes):
    """Makes a random model of two layers: in models with a window, a local and a global one.

    Embeddings are small and matrices large. Otherwise a model repeats the token that it reads.
    """
    sizes = CONFIGURATIONS[name] | {"num_layers": num_layers} | changes
    backbone = GemmaBackbone(**sizes, dtype=dtype)
    random = np.random.default_rng(seed)
    for weight in backbone.named_weights().values():
        value = random.normal(0.0, 1.0, weight.shape).astype("float32")
        scale, mean = {"embedding": (0.1, 0), "matrix": (0.3, 0), "norm": (0.3, 1)}[weight.kind]
        weight.assign(mean + scale * value)
    return backbone


def make_lm(
    name="gemma1_multi_query",
    proto=None,
    dtype="float32",
    sequence_length=32,
    num_layers=2,
    **compiled,
):
    """Makes a model that generates eagerly on PyTorch, where compiling takes seconds per shape."""
    preprocessor = None
    if proto is not None:
        preprocessor = GemmaCausalLMPreprocessor(GemmaTokenizer(proto), sequence_length)
    lm = GemmaCausalLM(make_backbone(name, dtype, num_layers=num_layers), preprocessor)
    compile_lm(lm, **compiled)
    return lm


def compile_lm(lm, **arguments):
    lm.compile(**{"run_eagerly": on_torch(), **arguments})


def logits_of(lm, ids, length=32):
    """The forward pass without a cache: float32 `[T, V]` for ids `[T]`, padded to one shape."""
    padded = np.zeros((1, length), "int32")
    padded[0, : len(ids)] = ids
    return keras.ops.convert_to_numpy(lm.score(padded))[0, : len(ids)]


class Script(samplers.Sampler):
    """Writes down the same ids in every row, whatever the model thinks."""

    def __init__(self, ids):
        super().__init__()
        self.ids = ids

    def choose(self, logits, state):
        ids = ops.convert_to_tensor(np.array(self.ids, "int32"))
        return ops.take(ids, ops.minimum(state["step"], len(self.ids) - 1))


def without_cache(backbone, ids):
    """Returns the output of the forward pass that scores and calibration use, `[B, T, D]`."""
    ids, attended = ops.convert_to_tensor(ids), ops.ones(ids.shape, dtype="bool")
    weights, config = backbone.tensors(), backbone.config
    return ops.convert_to_numpy(hidden_states(weights, ids, attended, config, "float32"))
