"""Adapters: outputs, trainable variables, merging and errors."""

import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaConfig, QuantizationConfig
from keras_gemma.lora.config import target_names
from tests.configurations import GEMMA1, GEMMA2
from tests.lora_values import fill, largest, run
from tests.models import without_cache
from tests.parity.pairs import FULL, IDS, make_ours, random_weights

CONFIG = GemmaConfig(**GEMMA2)
FOUR = QuantizationConfig("int4", 16, embedding="int4")


def with_added(configuration, added, dtype="float32"):
    """Returns a model without adapters whose matrices include the updates `added`."""
    backbone = GemmaBackbone(**configuration, dtype=dtype)
    arrays = random_weights(backbone.config)
    for name, weight in backbone.named_weights().items():
        weight.assign((arrays[name] + added.get(name, 0)).astype("float32"))
    return backbone


@pytest.mark.parametrize("configuration", [GEMMA1 | {"num_key_value_heads": 1}, GEMMA2])
def test_output_equals_that_of_updated_matrices(configuration):
    backbone = make_ours(configuration)
    before = run(backbone)
    backbone.enable_lora(3, "all-linear", alpha=6, use_rslora=True)
    np.testing.assert_array_equal(run(backbone), before)
    added = fill(backbone)
    assert len(added) == 7 * configuration["num_layers"]
    low_rank = backbone.adapters.linears("default")["layers.0.down"].low_ranks["default"]
    assert low_rank.scale == pytest.approx(6 / np.sqrt(3))
    expected = run(with_added(configuration, added))
    assert largest(run(backbone), expected) < 1e-5 < largest(before, expected)
    weight = backbone.named_weights()["layers.1.gate"]
    expected = random_weights(backbone.config)["layers.1.gate"] + added["layers.1.gate"]
    np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_initial_values_equal_those_of_peft():
    runs = []
    for _ in range(2):
        backbone = make_ours(GEMMA1)
        backbone.enable_lora(8, seed=3)
        runs.append(backbone.adapters.arrays("default"))
    assert list(runs[0]) == [
        "layers.0.query",
        "layers.0.value",
        "layers.1.query",
        "layers.1.value",
    ]
    for (a, b), (again, _) in zip(runs[0].values(), runs[1].values(), strict=True):
        assert a.shape == (8, 32) and b.shape == (32, 8)
        np.testing.assert_array_equal(a, again)
        assert 0.8 / np.sqrt(32) < np.abs(a).max() <= 1 / np.sqrt(32) and not b.any()
    assert backbone.adapters.configs["default"].scale("layers.0.query") == 1  # KerasHub's


def test_trainable_variables():
    backbone = make_ours(GEMMA2)
    backbone.layer_norm.trainable = False
    before = [v.path for v in backbone.trainable_variables]
    backbone.enable_lora(2, dtype="bfloat16", name="first")
    backbone.enable_lora(3, ["o_proj", "layers.[12].gate"], name="second")
    assert backbone.lora_adapters == ["first", "second"] and backbone.active_adapter == "second"
    shapes = sorted(tuple(v.shape) for v in backbone.trainable_variables)
    assert shapes == sorted([(3, 32), (32, 3)] * 4 + [(3, 32), (48, 3)] * 2)
    backbone.set_adapter("first")
    assert {v.dtype for v in backbone.trainable_variables} == {"bfloat16"}
    assert len(backbone.trainable_variables) == 16
    backbone.set_adapter(None)
    assert backbone.trainable_variables == []
    backbone.delete_adapter("first")
    backbone.delete_adapter("second")
    assert [v.path for v in backbone.trainable_variables] == before
    assert backbone.count_params() == CONFIG.parameter_count


def test_frozen_base_stays_frozen():
    backbone = make_ours(GEMMA1)
    backbone.trainable = False
    backbone.enable_lora(2)
    assert len(backbone.trainable_variables) == 8
    backbone.delete_adapter("default")
    assert backbone.trainable_variables == []


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_merge_and_unmerge(dtype, tolerance):
    backbone = make_ours(GEMMA2, dtype)
    backbone.enable_lora(4, "all-linear", alpha=8)
    added = fill(backbone)
    unmerged = run(backbone)
    base = {name: linear.numpy() for name, linear in backbone.adapters.linears("default").items()}
    backbone.merge_lora()
    assert backbone.active_adapter == "default"
    assert np.sqrt(np.mean((run(backbone) - unmerged) ** 2)) < tolerance * np.std(unmerged)
    merged = backbone.named_weights()["layers.0.query"].numpy().astype("float32")
    expected = random_weights(backbone.config)["layers.0.query"] + added["layers.0.query"]
    np.testing.assert_allclose(merged, expected, rtol=0.005 if dtype == "bfloat16" else 1e-5)
    for method in (
        backbone.merge_lora,
        lambda: backbone.set_adapter(None),
        lambda: backbone.enable_lora(2, name="other"),
        lambda: backbone.delete_adapter("default"),
        lambda: backbone.quantize("int8"),
    ):
        with pytest.raises(ValueError, match=r"'default' is merged. Call `unmerge_lora"):
            method()
    backbone.unmerge_lora()
    np.testing.assert_array_equal(run(backbone), unmerged)
    for name, linear in backbone.adapters.linears("default").items():
        np.testing.assert_array_equal(linear.numpy(), base[name])


def test_permanent_merge():
    backbone = make_ours(GEMMA2)
    backbone.enable_lora(4)
    unmerged = (fill(backbone), run(backbone))[1]
    backbone.enable_lora(4, name="other")
    backbone.set_adapter("default")
    backbone.merge_lora(keep_base=False)
    assert backbone.lora_adapters == [] and backbone.active_adapter is None
    assert largest(run(backbone), unmerged) < 1e-5
    assert len(backbone.trainable_variables) == len(CONFIG.weight_shapes())


def test_merging_nan_is_an_error():
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2)
    fill(backbone)
    low_rank = backbone.adapters.linears("default")["layers.1.value"].low_ranks["default"]
    a, b = low_rank.numpy()
    low_rank.assign(np.full_like(a, np.nan), b)
    with pytest.raises(ValueError, match=r"NaN or infinity in layers.1.value A\. Train"):
        backbone.merge_lora()
    assert np.isfinite(backbone.named_weights()["layers.0.query"].numpy()).all()


@pytest.mark.parametrize("mode", ["int8", FOUR], ids=["int8", "int4"])
def test_quantized_bases(mode, tmp_path):
    backbone = make_ours(GEMMA2)
    backbone.quantize(mode)
    twin = with_added(GEMMA2, {})
    for name, weight in backbone.named_weights().items():
        twin.named_weights()[name].assign(weight.numpy())
    for model in (backbone, twin):
        model.enable_lora(4, "all-linear")
        fill(model)
    assert largest(run(backbone), run(twin)) < 1e-4
    assert len(backbone.trainable_variables) == 56
    merged = backbone.named_weights()["layers.0.down"].numpy()
    np.testing.assert_allclose(merged, twin.named_weights()["layers.0.down"].numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"would lose precision.*save_to_hugging_face"):
        backbone.merge_lora()
    with pytest.raises(ValueError, match=r"cannot hold an adapter.*`save_lora`"):
        backbone.save_to_preset(tmp_path / "preset")
    assert not (tmp_path / "preset").exists()
    backbone.set_adapter(None)
    backbone.save_to_preset(tmp_path / "preset")


def test_quantizing_a_base_with_an_adapter():
    backbone = make_ours(GEMMA2)
    backbone.enable_lora(4)
    fill(backbone)
    plain = run(backbone)
    backbone.quantize("int8")
    assert 0 < largest(run(backbone), plain) < 0.2
    assert len(backbone.trainable_variables) == 16
    backbone.delete_adapter("default")
    assert backbone.trainable_variables == []


def test_dropout():
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(4, "all-linear", dropout=0.5)
    fill(backbone)
    plain = run(backbone)
    np.testing.assert_array_equal(run(backbone, training=False), plain)
    dropped = [run(backbone, training=True) for _ in range(2)]
    assert largest(dropped[0], plain) > 1e-3 and largest(dropped[0], dropped[1]) > 1e-3
    backbone.enable_lora(4, name="none")
    np.testing.assert_array_equal(run(backbone, training=True), run(backbone))
    backbone.set_adapter("default")
    assert largest(run(backbone, training=True), plain) > 1e-3


def test_programs_follow_the_adapter():
    backbone = make_ours(GEMMA1)
    inputs = {"token_ids": IDS, "padding_mask": FULL}
    outputs = {None: backbone.predict(inputs, verbose=0)}
    for seed, name in enumerate(("first", "second")):
        backbone.enable_lora(2, name=name)
        fill(backbone, name, seed, size=1.0)
        outputs[name] = backbone.predict(inputs, verbose=0)
    for name, expected in outputs.items():
        backbone.set_adapter(name)
        np.testing.assert_array_equal(backbone.predict(inputs, verbose=0), expected)
    assert largest(outputs["first"], outputs["second"]) > 0.01


def test_calibration_and_summary():
    backbone = make_ours(GEMMA2)
    backbone.enable_lora(4, "all-linear")
    fill(backbone)
    hidden = without_cache(backbone, IDS)
    assert largest(hidden, run(backbone)) < 1e-5
    lines = []
    backbone.summary(print_fn=lines.append)
    count = sum(4 * sum(CONFIG.weight_shapes()[n]) for n in target_names(CONFIG, "all-linear"))
    assert f"'default', rank 4 on 28 matrices (active); {count:,} trainable" in lines[-1]
