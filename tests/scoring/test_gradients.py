"""Gradients through `score` with each framework's API, compared with transformers."""

import keras
import numpy as np
import pytest
import torch

from keras_gemma import losses
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.model import attention
from tests.configurations import CONFIGURATIONS
from tests.models import make_lm
from tests.parity.pairs import make_ours, make_theirs
from tests.scoring.texts import IDS, MASK, TARGETS, numpy

LOSS = {"padding_mask": MASK, "scoring_mode": "loss", "target_ids": TARGETS}


def by_jax(lm):
    import jax

    def loss(embeddings):
        def replace(x, layer):
            return embeddings if layer == -1 else x

        return lm.score(IDS, layer_intercept_fn=replace, **LOSS).sum()

    return jax.grad(loss)(lm.backbone.token_embedding(IDS))


def by_torch(lm):
    seen = {}
    losses = lm.score(IDS, layer_intercept_fn=lambda x, i: seen.setdefault(i, x), **LOSS)
    return torch.autograd.grad(losses.sum(), seen[-1])[0]


def by_tensorflow(lm):
    """Same as the example in KerasHub's documentation of `score`."""
    import tensorflow as tf

    embeddings = None
    with tf.GradientTape(watch_accessed_variables=True) as tape:

        def layer_intercept_fn(x, i):
            if i == -1:
                nonlocal embeddings, tape
                embeddings = x
                tape.watch(embeddings)
            return x

        losses = lm.score(IDS, layer_intercept_fn=layer_intercept_fn, **LOSS)
    return tape.gradient(losses, embeddings)


def embedding_gradient(lm):
    functions = {"jax": by_jax, "torch": by_torch, "tensorflow": by_tensorflow}
    return numpy(functions[keras.config.backend()](lm))


@pytest.mark.parametrize("chunk", [1 << 25, 2048], ids=["whole", "chunks"])
@pytest.mark.parametrize("name", ["gemma1_multi_query", "gemma2_grouped"])
def test_gradients_match_transformers(name, chunk, monkeypatch):
    """Transformers runs on PyTorch for every backend, so the backends agree as well."""
    monkeypatch.setattr(losses, "MAX_SCORED_LOGITS", chunk)
    configuration = CONFIGURATIONS[name]
    actual = embedding_gradient(GemmaCausalLM(make_ours(configuration)))
    theirs = make_theirs(configuration)
    scaled = theirs.get_input_embeddings()(torch.from_numpy(IDS)).detach().requires_grad_()
    logits = theirs(inputs_embeds=scaled, attention_mask=torch.from_numpy(MASK)).logits
    targets = torch.from_numpy(TARGETS).long()
    loss = torch.nn.functional.cross_entropy(logits.mT, targets, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), scaled)
    expected = expected.numpy() * np.float32(configuration["hidden_dim"] ** 0.5)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_chunked_attention_gives_the_same_gradient(monkeypatch):
    """Attention in chunks of queries recomputes its logits in the gradient."""
    lm = make_lm("gemma2_grouped")
    expected = embedding_gradient(lm)
    monkeypatch.setattr(attention, "MAX_CHUNK_QUERIES", 3)
    actual = embedding_gradient(lm)
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()
