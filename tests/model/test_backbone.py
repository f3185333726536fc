"""GemmaBackbone as a Keras model: construction, summary, files, and weights by name."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.backend import uninitialized
from keras_gemma.model.backbone import GemmaBackbone
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2

IDS = np.array([[2, 7, 9, 30, 4, 8], [2, 5, 5, 1, 0, 0]])
INPUTS = {"token_ids": IDS, "padding_mask": (IDS > 0).astype("int32")}


def randomize(backbone):
    """Assigns random numbers to every weight, because initial norms are zero."""
    random = np.random.default_rng(0)
    for weight in backbone.named_weights().values():
        weight.assign(random.normal(0, 0.3, weight.shape).astype("float32"))
    return backbone


def run(backbone):
    return ops.convert_to_numpy(ops.cast(backbone(INPUTS), "float32"))


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_counts_and_shapes(variant):
    backbone = GemmaBackbone(**CONFIGURATIONS[variant])
    assert backbone.count_params() == backbone.config.parameter_count
    assert backbone.output_shape == (None, None, backbone.config.hidden_dim)
    assert len(backbone.transformer_layers) == backbone.num_layers


@pytest.mark.parametrize("variant", CONFIGURATIONS)
def test_from_config_restores_the_model(variant):
    settings = CONFIGURATIONS[variant] | {"context_length": 48, "name": "mine"}
    backbone = GemmaBackbone(**settings, dtype="mixed_bfloat16")
    backbone.trainable = False
    again = GemmaBackbone.from_config(backbone.get_config())
    assert again.config == backbone.config
    assert again.context_length == 48
    assert again.dtype_policy.name == "mixed_bfloat16"
    assert again.name == "mine" and not again.trainable


def test_inconsistent_sizes_are_an_error():
    with pytest.raises(ValueError, match="num_key_value_heads=3"):
        GemmaBackbone(**GEMMA1 | {"num_key_value_heads": 3})


@pytest.mark.parametrize("dtype", ["float16", "mixed_float16"])
def test_float16_is_refused_where_activations_exceed_it(dtype):
    with pytest.raises(ValueError, match=rf"'bfloat16' or 'float32'.*T4.*dtype='{dtype}'"):
        GemmaBackbone(**CONFIGURATIONS["gemma3"], dtype=dtype)
    assert GemmaBackbone(**GEMMA2, dtype=dtype).compute_dtype == "float16"


def test_arguments_are_attributes():
    backbone = GemmaBackbone(**GEMMA2)
    for name, value in GEMMA2.items():
        assert getattr(backbone, name) == value
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = backbone.no_such_thing


def test_summary():
    lines = []
    GemmaBackbone(**GEMMA1).summary(print_fn=lines.append)
    text = "\n".join(lines)
    assert "token_embedding" in text and "decoder_block_1" in text and "final_normal" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_keras_file(tmp_path, dtype):
    backbone = randomize(GemmaBackbone(**GEMMA2, dtype=dtype))
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert isinstance(again, GemmaBackbone) and again.config == backbone.config
    assert again.dtype_policy.name == dtype
    np.testing.assert_array_equal(run(again), run(backbone))


def test_weights_file(tmp_path):
    backbone = randomize(GemmaBackbone(**GEMMA2))
    backbone.save_weights(tmp_path / "model.weights.h5")
    again = GemmaBackbone(**GEMMA2)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(run(again), run(backbone))


@pytest.mark.parametrize(
    "change", [{"intermediate_dim": 64}, {"intermediate_dim": 128}, {"num_key_value_heads": 2}]
)
def test_weights_file_of_another_size(tmp_path, change):
    GemmaBackbone(**GEMMA1).save_weights(tmp_path / "model.weights.h5")
    other = GemmaBackbone(**GEMMA1 | change)
    with pytest.raises(ValueError, match="shape"):
        other.load_weights(tmp_path / "model.weights.h5")


def test_named_weights():
    backbone = GemmaBackbone(**GEMMA2)
    weights = backbone.named_weights()
    shapes = backbone.config.weight_shapes()
    assert {name: weight.shape for name, weight in weights.items()} == shapes
    assert len({id(weight.variable) for weight in weights.values()}) == len(backbone.variables)
    for i, weight in enumerate(weights.values()):
        array = (np.arange(np.prod(weight.shape)).reshape(weight.shape) + i).astype("float32")
        weight.assign(array)
        np.testing.assert_array_equal(weight.numpy(), array)
        assert weight.dtype == "float32"


def test_long_matrix_has_its_logical_shape():
    """Files and the layer use `[out, in]`, although a backend stores blocks."""
    backbone = GemmaBackbone(**GEMMA1 | {"intermediate_dim": 2 * 4608})
    down = backbone.named_weights()["layers.0.down"]
    array = np.random.default_rng(0).normal(size=(32, 4608)).astype("float32")
    down.assign(array)
    np.testing.assert_array_equal(down.numpy(), array)
    layer = backbone.transformer_layers[0].ffw_linear
    x = np.random.default_rng(1).normal(size=(2, 4608)).astype("float32")
    np.testing.assert_allclose(ops.convert_to_numpy(layer(x)), x @ array.T, atol=1e-3)


def test_long_matrix_in_a_keras_file(tmp_path):
    backbone = randomize(GemmaBackbone(**GEMMA1 | {"intermediate_dim": 2 * 4608}))
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    name = "layers.1.down"
    np.testing.assert_array_equal(
        again.named_weights()[name].numpy(), backbone.named_weights()[name].numpy()
    )


@pytest.mark.parametrize("shape", [(32,), (32, 31), (1, 32, 32)])
def test_array_of_the_wrong_shape_is_an_error(shape):
    weight = GemmaBackbone(**GEMMA1).named_weights()["layers.0.query"]
    with pytest.raises(ValueError, match=r"/kernel requires an array of shape \(32, 32\).*Rec"):
        weight.assign(np.zeros(shape, "float32"))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_uninitialized(dropout):
    with uninitialized():
        backbone = GemmaBackbone(**GEMMA2 | {"dropout": dropout})
    weights = backbone.named_weights().values()
    assert all(weight.variable._value is None for weight in weights)
    expected = randomize(GemmaBackbone(**GEMMA2))
    GemmaBackbone(**GEMMA1)  # another model must not initialize this one
    assert all(weight.variable._value is None for weight in weights)
    np.testing.assert_array_equal(run(randomize(backbone)), run(expected))
    assert ops.convert_to_numpy(backbone(INPUTS, training=True)).shape == (2, 6, 32)


def test_initial_weights():
    weights = GemmaBackbone(**GEMMA1).named_weights()
    assert weights["layers.0.query"].numpy().std() == pytest.approx(0.02, rel=0.1)
    assert not weights["final_norm"].numpy().any()


def test_uninitialized_ends_after_an_error():
    with pytest.raises(ValueError, match="num_layers"), uninitialized():
        GemmaBackbone(**GEMMA1 | {"num_layers": 0})
    assert GemmaBackbone(**GEMMA1).named_weights()["layers.0.query"].numpy().any()


@pytest.mark.parametrize(
    ("policy", "stored"), [("bfloat16", "bfloat16"), ("mixed_bfloat16", "float32")]
)
def test_policies(policy, stored):
    backbone = GemmaBackbone(**GEMMA2, dtype=policy)
    assert {variable.dtype for variable in backbone.variables} == {stored}
    hidden = backbone(INPUTS)
    assert keras.backend.standardize_dtype(hidden.dtype) == "bfloat16"
    logits = backbone.token_embedding(hidden, reverse=True)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    for weight in backbone.tensors()["layers"][0].values():
        expected = "bfloat16" if len(weight.shape) > 1 else stored
        assert keras.backend.standardize_dtype(weight.dtype) == expected


def test_a_policy_object():
    policy = keras.DTypePolicy("mixed_bfloat16")
    assert GemmaBackbone(**GEMMA1, dtype=policy).compute_dtype == "bfloat16"


def test_stateless_call():
    backbone = randomize(GemmaBackbone(**GEMMA2))
    doubled = [2 * variable.value for variable in backbone.trainable_variables]
    frozen = [variable.value for variable in backbone.non_trainable_variables]
    if keras.config.backend() == "jax":
        import jax

        hidden, _ = jax.jit(backbone.stateless_call)(doubled, frozen, INPUTS)
    else:
        hidden, _ = backbone.stateless_call(doubled, frozen, INPUTS)
    actual = ops.convert_to_numpy(hidden)
    assert np.abs(actual - run(backbone)).max() > 0.1
    for variable in backbone.trainable_variables:
        variable.assign(2 * variable.value)
    np.testing.assert_allclose(actual, run(backbone), atol=1e-4)


@pytest.mark.skipif(keras.config.backend() != "torch", reason="a PyTorch module")
def test_is_a_torch_module():
    import torch

    backbone = GemmaBackbone(**GEMMA2)
    assert isinstance(backbone, torch.nn.Module)
    parameters = list(backbone.parameters())
    assert sum(parameter.numel() for parameter in parameters) == backbone.count_params()
    backbone(INPUTS).square().sum().backward()
    assert all(parameter.grad is not None for parameter in parameters)
