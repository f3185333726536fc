"""Logits, losses and `layer_intercept_fn`, compared with the forward pass and NumPy."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.causal_lm.model import GemmaCausalLM
from tests.configurations import CONFIGURATIONS
from tests.models import make_backbone, make_lm
from tests.parity.pairs import make_ours, make_theirs
from tests.scoring.texts import IDS, MASK, TARGETS, close, numpy


@pytest.fixture(scope="module", params=["gemma1_multi_query", "gemma2_grouped"])
def lm(request):
    return make_lm(request.param)


def test_logits_are_those_of_predict(lm):
    expected = lm.predict({"token_ids": IDS, "padding_mask": MASK}, verbose=0)
    logits = numpy(lm.score(IDS, MASK))
    assert logits.dtype == "float32" and logits.shape == (2, 7, 512)
    close(logits, expected)
    # Causality hides padding on the right, so results do not depend on the mask.
    close(numpy(lm.score(IDS))[:, :5], expected[:, :5])
    close(numpy(lm.score(IDS.tolist(), MASK.astype("bool"))), expected)


def test_logits_include_the_final_soft_cap(lm):
    cap = lm.backbone.config.final_logit_soft_cap
    largest = np.abs(numpy(lm.score(IDS))).max()
    assert largest > 3 if cap is None else 2 < largest <= cap


def test_loss(lm):
    targets = np.roll(IDS, -1, axis=1)
    logits = numpy(lm.score(IDS, MASK)).astype("float64")
    likelihoods = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(likelihoods, targets[..., None], axis=-1)[..., 0]
    loss = lm.score(IDS, MASK, scoring_mode="loss", target_ids=targets)
    np.testing.assert_allclose(numpy(loss), expected, rtol=1e-4, atol=1e-4)


def test_layer_intercept_fn_is_called_for_every_layer_in_order(lm):
    seen = []

    def watch(x, layer):
        seen.append((layer, tuple(x.shape)))
        return x

    close(numpy(lm.score(IDS, MASK, layer_intercept_fn=watch)), numpy(lm.score(IDS, MASK)))
    layers = range(-1, lm.backbone.config.num_layers)
    assert seen == [(layer, (2, 7, 32)) for layer in layers]


def test_embeddings_can_be_replaced(lm):
    other = (IDS + 100) % 512
    vectors = lm.backbone.token_embedding(ops.convert_to_tensor(other))
    patched = lm.score(IDS, MASK, layer_intercept_fn=lambda x, i: vectors if i == -1 else x)
    close(numpy(patched), numpy(lm.score(other, MASK)))


def test_output_of_every_block_can_be_replaced(lm):
    """With a block output of another text, the scores equal those of the other text."""
    other = (IDS + 100) % 512
    outputs = {}

    def record(x, layer):
        outputs[layer] = x
        return x

    expected = numpy(lm.score(other, MASK, layer_intercept_fn=record))
    for layer in outputs:
        patched = lm.score(
            IDS, MASK, layer_intercept_fn=lambda x, i, at=layer: outputs[at] if i == at else x
        )
        close(numpy(patched), expected)


def test_layer_intercept_fn_receives_unscaled_embeddings(lm):
    def check(x, layer):
        if layer == -1:
            table = lm.backbone.named_weights()["token_embedding"].numpy()
            np.testing.assert_allclose(numpy(x), table[IDS], rtol=1e-6)
        return x

    lm.score(IDS, layer_intercept_fn=check)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scoring_mode": "probabilities"}, "scoring_mode='probabilities'"),
        ({"scoring_mode": "loss"}, "needs `target_ids`"),
        ({"scoring_mode": "loss", "target_ids": IDS[:, 1:]}, r"\(2, 6\).*\(2, 7\)"),
        ({"scoring_mode": "loss", "target_ids": IDS + 500}, r"`target_ids` must be in \[0, 511\]"),
        ({"token_ids": IDS + 500}, r"`token_ids` must be in \[0, 511\].*ids from 500 to 900"),
        ({"token_ids": IDS - 1}, "ids from -1 to 399"),
        ({"padding_mask": MASK[:, 1:]}, r"`padding_mask` must have the shape.*\(2, 6\)"),
        ({"padding_mask": [[1], [1, 0]]}, "`padding_mask` must have rows of equal length"),
        ({"padding_mask": 1 - 2 * MASK}, "1 or True at tokens and 0 or False at padding"),
        ({"padding_mask": MASK * np.nan}, "1 or True"),
        ({"token_ids": [[2, 3], [2]]}, "rows of one length.*padding mask"),
        ({"layer_intercept_fn": lambda x: x}, "two arguments.*layer_intercept_fn=<function"),
        ({"token_ids": IDS[0]}, r"\[batch, tokens\]. Received: shape \(7,\)"),
        ({"token_ids": np.zeros((2, 0), "int32"), "padding_mask": None}, "at least one token"),
        ({"token_ids": "To be", "padding_mask": None}, "no preprocessor"),
        ({"layer_intercept_fn": lambda x, i: ops.cast(x, "float16")}, "float16 .* as result"),
        ({"layer_intercept_fn": lambda x, i: None}, "at layer -1, .* and None of .* as result"),
        (
            {"layer_intercept_fn": lambda x, i: x[:, 1:]},
            r"float32 \(2, 7, 32\) as input and float32 \(2, 6, 32\) as result",
        ),
        ({"layer_intercept_fn": lambda x, i: 0.0}, r"and 0.0 of .* as result"),
    ],
)
def test_errors(lm, arguments, says):
    with pytest.raises(ValueError, match=says):
        lm.score(**{"token_ids": IDS, "padding_mask": MASK, **arguments})


def test_ragged_tensors(lm):
    """Ragged tensors of equal lengths are accepted; others are rejected, having no mask."""
    ragged = pytest.importorskip("tensorflow").ragged.constant
    close(numpy(lm.score(ragged(IDS.tolist()))), numpy(lm.score(IDS)))
    with pytest.raises(ValueError, match="`token_ids` must have rows of one length"):
        lm.score(ragged([[2, 3], [2, 3, 4]]))


def test_text_longer_than_the_context_raises():
    lm = GemmaCausalLM(make_backbone())
    object.__setattr__(lm.backbone.config, "context_length", 6)
    with pytest.raises(ValueError, match=r"context of 6 tokens.*a text of 7"):
        lm.score(IDS)
    lm.score(IDS[1:], MASK[1:])


def test_padding_at_the_start(lm):
    """Padding on the left or right does not change the scores."""
    ids, plain = IDS[:1], numpy(lm.score(IDS[:1]))
    for before, after in ((3, 0), (0, 3), (2, 2)):
        pads = ((0, 0), (before, after))
        padded, mask = np.pad(ids, pads, constant_values=9), np.pad(np.ones_like(ids), pads)
        scores = numpy(lm.score(padded, mask))
        assert np.isfinite(scores).all()
        close(scores[:, before : before + 7], plain)
        loss = {"scoring_mode": "loss", "target_ids": np.pad(TARGETS[:1], pads)}
        expected = numpy(lm.score(ids, scoring_mode="loss", target_ids=TARGETS[:1]))
        close(numpy(lm.score(padded, mask, **loss))[:, before : before + 7], expected)


def test_accepted_array_types(lm):
    expected = numpy(lm.score(IDS, MASK, "loss", None, TARGETS))
    for convert in (np.ndarray.tolist, ops.convert_to_tensor, lambda x: x.astype("int64")):
        scores = lm.score(*map(convert, (IDS, MASK)), "loss", None, convert(TARGETS))
        close(numpy(scores), expected)


def test_strings(tiny_proto):
    lm = make_lm("gemma2_grouped", tiny_proto)
    texts = ["To be, or not", "To die"]
    rows = lm.preprocessor.tokenize_prompts(texts)
    logits = numpy(lm.score(texts))
    assert logits.shape == (2, len(rows[0]), 512)
    losses = numpy(lm.score(texts, scoring_mode="loss"))
    for i, ids in enumerate(rows):
        alone = numpy(lm.score(ids[None]))[0]
        close(logits[i, : len(ids)], alone)
        shifted = alone - np.log(np.exp(alone).sum(-1, keepdims=True))
        expected = -shifted[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(losses[i, : len(ids) - 1], expected, rtol=1e-4, atol=1e-4)
        assert not losses[i, len(ids) - 1 :].any()
    close(numpy(lm.score(texts[0])), logits[:1])
    with pytest.raises(ValueError, match="are derived from strings"):
        lm.score(texts, padding_mask=MASK)


@pytest.mark.parametrize("name", ["gemma1_multi_query", "gemma2_grouped"])
def test_losses_in_chunks(name, monkeypatch):
    from keras_gemma import losses
    from keras_gemma.model import attention

    whole = numpy(make_lm(name).score(IDS, MASK, "loss", None, TARGETS))
    monkeypatch.setattr(losses, "MAX_SCORED_LOGITS", 2048)  # four positions
    monkeypatch.setattr(attention, "MAX_CHUNK_QUERIES", 3)
    close(numpy(make_lm(name).score(IDS, MASK, "loss", None, TARGETS)), whole)


def test_loss_never_holds_all_logits(monkeypatch):
    """No array as large as `[B, T, V]` is ever computed."""
    from keras_gemma import losses

    sizes = []
    original = losses.cross_entropy
    monkeypatch.setattr(losses, "MAX_SCORED_LOGITS", 2048)
    monkeypatch.setattr(
        losses, "cross_entropy", lambda x, ids: sizes.append(x.shape) or original(x, ids)
    )
    make_lm().score(IDS, MASK, "loss", lambda x, i: x, TARGETS)
    assert {tuple(size) for size in sizes} == {(1, 4, 512)}


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_hidden_states_of_transformers(variant):
    """Compares the embeddings and every block's output, with padding on the left."""
    import torch

    configuration = CONFIGURATIONS[variant]
    lm, theirs = GemmaCausalLM(make_ours(configuration)), make_theirs(configuration)
    mask = np.ones_like(IDS)
    mask[1, :3] = 0
    seen = []
    lm.score(IDS, mask, layer_intercept_fn=lambda x, i: seen.append(numpy(x)) or x)
    seen[0] = seen[0] * np.float32(lm.backbone.config.embedding_scale)
    ids, mask_ = torch.from_numpy(IDS), torch.from_numpy(mask)
    with torch.no_grad():
        states = theirs(ids, attention_mask=mask_, output_hidden_states=True).hidden_states
    # Their last hidden state is the output of the final norm.
    for ours, expected in zip(seen[:-1], states[:-1], strict=True):
        real = mask.astype("bool")
        close(ours[real], expected.numpy()[real])


def test_unused_hook_points_cost_nothing(monkeypatch):
    """The program equals that of a model without hook points; identity hooks add no operations."""
    from importlib import import_module

    from keras_gemma.model.transformer import hidden_states
    from keras_gemma.scoring.forward import logits_of
    from keras_gemma.scoring.hooks import hook_point_names, read_hooks
    from keras_gemma.scoring.score import Scorer

    lm = make_lm("gemma2_grouped")
    config, weights = lm.backbone.config, lm.backbone.tensors()
    inputs = ops.convert_to_tensor(IDS), ops.convert_to_tensor(MASK.astype("bool"))
    # Fused attention has no weights to read, so a hook on them changes the program.
    names = [
        name for name in hook_point_names(config.num_layers) if "attention.weights" not in name
    ]
    hooks = read_hooks(dict.fromkeys(names, lambda x, name: x), lambda x, i: x, config.num_layers)

    def program(hooks):
        def run(weights, token_ids, mask):
            x = hidden_states(weights, token_ids, mask, config, "float32", hooks)
            return logits_of(x, weights, config, hooks)

        return listing(run, weights, *inputs)

    bare = program(None)
    assert len(bare) > 1000
    assert bare == program({}) == program(hooks)

    scorer = Scorer(lm.backbone)

    def compiled(weights, token_ids, mask):
        return scorer._logits(weights["head"], scorer._hidden(weights, token_ids, mask))

    assert bare == listing(compiled, weights, *inputs)
    for module in ("attention", "block", "feed_forward", "transformer"):
        module = import_module(f"keras_gemma.model.{module}")
        monkeypatch.setattr(module, "apply_hook", lambda hooks, name, x: x)
    monkeypatch.setattr("keras_gemma.scoring.forward.apply_hook", lambda hooks, name, x: x)
    assert bare == program(None)


def test_without_hooks_the_compiled_programs_run(monkeypatch):
    lm = make_lm()
    expected = numpy(lm.score(IDS))
    close(numpy(lm.score(IDS, hooks={"*": lambda x, name: x})), expected)
    monkeypatch.setattr(lm._scorer, "run_hooked", None)
    np.testing.assert_array_equal(numpy(lm.score(IDS)), expected)
    np.testing.assert_array_equal(numpy(lm.score(IDS, hooks={})), expected)


def listing(function, *args):
    """Returns the program of a function as text, in its framework's format."""
    if keras.config.backend() == "jax":
        import jax

        return str(jax.make_jaxpr(function)(*args))
    if keras.config.backend() == "torch":
        from torch.fx.experimental.proxy_tensor import make_fx

        return make_fx(function)(*args).code
    import tensorflow as tf

    graph = tf.function(function).get_concrete_function(*args).graph
    return "\n".join(f"{op.type} {[i.name for i in op.inputs]}" for op in graph.get_operations())


def test_programs_are_cached():
    lm = make_lm()
    lm.score(IDS)
    programs = dict(lm._scorer.programs)
    lm.score(IDS, MASK, "loss", None, TARGETS)
    lm.score(IDS)
    assert programs.items() <= lm._scorer.programs.items() and set(programs) == {"hidden", "logits"}
