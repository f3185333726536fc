"""Named hooks: activations at each hook point, replacement, and errors."""

import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.model.hooks import BLOCK_HOOK_POINTS
from keras_gemma.scoring import trace
from keras_gemma.scoring.hooks import hook_point_names
from tests.models import make_lm
from tests.scoring.texts import IDS, MASK, close, numpy


@pytest.fixture(scope="module", params=["gemma1_multi_query", "gemma2_27b_scale"])
def lm(request):
    return make_lm(request.param)


def run(lm, hooks, **arguments):
    return numpy(lm.score(IDS, MASK, hooks=hooks, **arguments))


def test_hooks_are_called_once_at_every_hook_point_in_order(lm):
    seen = []

    def look(x, name):
        seen.append(name)
        return x

    close(run(lm, {"*": look}), numpy(lm.score(IDS, MASK)))
    assert seen == hook_point_names(lm.backbone.config.num_layers)


def test_shapes_and_dtypes(lm):
    c = lm.backbone.config
    sizes = {"B": 1, "T": 7, "S": 7, "D": c.hidden_dim, "F": c.feed_forward_dim}
    sizes |= {"N": c.num_query_heads, "K": c.num_key_value_heads, "H": c.head_dim}
    seen = trace(lm, IDS[0], "block.1.*")
    assert list(seen) == [f"block.1.{hook_point}" for hook_point in BLOCK_HOOK_POINTS]
    for hook_point, description in BLOCK_HOOK_POINTS.items():
        letters = re.search(r"\[(.*?)\]", description)[1].split(", ")
        x = seen[f"block.1.{hook_point}"]
        assert tuple(x.shape) == tuple(sizes[letter] for letter in letters), hook_point
        assert keras.backend.standardize_dtype(x.dtype) == "float32"


def test_residual_stream_is_a_sum(lm):
    seen = {name: numpy(x) for name, x in trace(lm, IDS[0], "*").items()}
    for i in range(lm.backbone.config.num_layers):
        before, middle, after = (
            seen[f"block.{i}.residual.{at}"] for at in ("before", "middle", "after")
        )
        close(before + seen[f"block.{i}.attention.output"], middle)
        close(middle + seen[f"block.{i}.feed_forward.output"], after)
        if i:
            np.testing.assert_array_equal(before, seen[f"block.{i - 1}.residual.after"])
    scale = np.float32(lm.backbone.config.embedding_scale)
    close(seen["embeddings"] * scale, seen["block.0.residual.before"])


def test_attention_weights_match_float64(lm):
    """Computes them from queries and keys in float64, one head and position at a time."""
    c = lm.backbone.config
    for layer in (0, 1):  # layer 0 of Gemma 2 has a sliding window, layer 1 does not
        seen = {name: numpy(x)[0] for name, x in trace(lm, IDS[0], f"block.{layer}.*").items()}
        at = f"block.{layer}.attention."
        weights = seen[at + "weights"]
        window = c.layer_kind(layer).window or 100
        group = c.num_query_heads // c.num_key_value_heads
        for n in range(c.num_query_heads):
            for t in range(7):
                keys = range(max(0, t - window + 1), t + 1)
                query = seen[at + "queries"][t, n].astype("float64") * c.query_scale
                logits = np.array([query @ seen[at + "keys"][s, n // group] for s in keys])
                if c.attention_logit_soft_cap is not None:
                    cap = c.attention_logit_soft_cap
                    logits = cap * np.tanh(logits / cap)
                expected = np.zeros(7)
                expected[keys] = np.exp(logits) / np.exp(logits).sum()
                np.testing.assert_allclose(weights[n, t], expected, atol=1e-5)
                head = expected @ seen[at + "values"][:, n // group]
                np.testing.assert_allclose(seen[at + "heads"][t, n], head, atol=1e-4)


@pytest.mark.parametrize(
    "hook_point", [*(f"block.1.{p}" for p in BLOCK_HOOK_POINTS), "final_norm", "logits"]
)
def test_every_hook_point_can_be_replaced(lm, hook_point):
    """Replaces activations by those of another text.

    If no path bypasses the hook point, the scores equal those of the other text.
    """
    other = (IDS[:1] + 100) % 512
    (replacement,) = trace(lm, other[0], hook_point).values()
    changed = numpy(lm.score(IDS[:1], hooks={hook_point: lambda x, name: replacement}))
    bottlenecks = ("residual.before", "residual.middle", "residual.after", "final_norm", "logits")
    if hook_point.removeprefix("block.1.") in bottlenecks:
        close(changed, numpy(lm.score(other)))
    else:
        assert np.abs(changed - numpy(lm.score(IDS[:1]))).max() > 1e-3


def test_zero_attention_weights_give_zero_heads(lm):
    hooks = {"block.0.attention.weights": lambda x, name: 0.0 * x}
    seen = {}
    hooks["block.0.attention.heads"] = lambda x, name: seen.setdefault(name, x)
    run(lm, hooks)
    assert not numpy(seen["block.0.attention.heads"]).any()


def test_several_hooks_at_one_hook_point_are_chained(lm):
    order = []

    def note(who):
        return lambda x, hook_point: order.append(who) or x

    hooks = {"embeddings": note("first"), "embed*": note("second")}
    lm.score(IDS, MASK, layer_intercept_fn=note("last"), hooks=hooks)
    assert order[:3] == ["first", "second", "last"]


def test_hooks_may_return_numpy_arrays_and_variables(lm):
    close(run(lm, {"embeddings": lambda x, name: numpy(x)}), numpy(lm.score(IDS, MASK)))
    zeros = keras.Variable(np.zeros((2, 7, lm.backbone.config.hidden_dim), "float32"))
    close(run(lm, {"*.output": lambda x, name: zeros}), run(lm, {"*.output": lambda x, n: 0 * x}))


def test_loss_uses_hooked_logits(lm):
    hooks = {"logits": lambda x, name: 0.0 * x}
    loss = run(lm, hooks, scoring_mode="loss", target_ids=IDS)
    np.testing.assert_allclose(loss, np.log(512), rtol=1e-5)


@pytest.mark.parametrize(
    ("hooks", "error", "says"),
    [
        ({"block.0.attention.weight": None}, ValueError, "block.0.attention.weights"),
        ({"block.9.residual.after": None}, ValueError, r"block\.1\.residual\.after"),
        ({"block.0.attention.output": 3}, TypeError, r"hooks\['block.0.attention.output'\]=3"),
        ({"logits": lambda x: x}, TypeError, r"two arguments.*hooks\['logits'\]=<function"),
        ({"logits": lambda x, name, more: x}, TypeError, "two arguments"),
        ({("logits",): lambda x, name: x}, TypeError, r"by strings.*\('logits',\)"),
        ([("logits", None)], TypeError, "`hooks` must be a dict"),
        ({"logits": lambda x, n: numpy(x).tolist()}, ValueError, "convert_to_tensor.*type list"),
        ({"logits": lambda x, n: numpy(x).astype("float64")}, ValueError, "float64 .* as result"),
        (
            {"*.middle": lambda x, n: None},
            ValueError,
            "'block.0.residual.middle'.*and None of",
        ),
        ({"logits": lambda x, n: x[:1]}, ValueError, r"'logits'.*\(2, 7, 512\).*\(1, 7, 512\)"),
        (
            {"final_norm": lambda x, n: ops.cast(x, "bfloat16")},
            ValueError,
            "'final_norm'.*float32.*and bfloat16 .* as result",
        ),
    ],
)
def test_errors(lm, hooks, error, says):
    with pytest.raises(error, match=says):
        run(lm, hooks)


def test_hook_returning_a_tensor_of_another_framework_raises(lm):
    if keras.config.backend() == "torch":
        import tensorflow as other
    else:
        import torch as other
    backend = keras.config.backend()
    with pytest.raises(
        ValueError, match=rf"to a {backend} tensor(?s:.*) of type \w*Tensor as result"
    ):
        run(lm, {"logits": lambda x, name: other.zeros(tuple(x.shape))})


def test_exceptions_of_hooks_are_not_caught(lm):
    def broken(x, name):
        raise KeyError(name)

    with pytest.raises(KeyError, match="final_norm"):
        run(lm, {"final_norm": broken})


def test_trace_errors(lm):
    with pytest.raises(TypeError, match="names=None"):
        trace(lm, IDS[0], None)
    with pytest.raises(TypeError, match=r"`names` must name hook points by strings.*3"):
        trace(lm, IDS[0], [3])
    with pytest.raises(ValueError, match="`names` names a hook point"):
        trace(lm, IDS[0], "residual")
    with pytest.raises(ValueError, match="no preprocessor"):
        trace(lm, "text", "logits")
