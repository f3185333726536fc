"""Quantized backbones, compared with unquantized ones that hold the dequantized weights."""

import re
import warnings
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import keras_gemma
from keras_gemma import GemmaBackbone, QuantizationConfig
from keras_gemma.backend import uninitialized
from keras_gemma.quantization import report
from keras_gemma.quantization.calibration import mean_squares
from tests.configurations import GEMMA1, GEMMA2
from tests.models import without_cache
from tests.quantizations import MODES
from tests.storage.conftest import IDS, make_backbone

MODE = pytest.mark.parametrize("mode", MODES)
INPUTS = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


def run(backbone):
    return ops.convert_to_numpy(backbone(INPUTS))


def plain_twin(backbone):
    """Returns an unquantized backbone with the dequantized weights of `backbone`."""
    twin = GemmaBackbone(**backbone.config.to_dict(), dtype="float32")
    for name, weight in backbone.named_weights().items():
        twin.named_weights()[name].assign(weight.numpy())
    return twin


@MODE
def test_output_is_that_of_dequantized_weights(mode):
    backbone = make_backbone(GEMMA2)
    original = run(backbone)
    backbone.quantize(MODES[mode])
    actual, expected = run(backbone), run(plain_twin(backbone))
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    error = np.linalg.norm(actual - original) / np.linalg.norm(original)
    assert 1e-4 < error < (0.05 if mode == "int8" else 0.5)


@MODE
def test_quantized_construction_and_assignment(mode):
    """Constructs and assigns as storage does, without allocating unquantized weights."""
    expected = make_backbone(GEMMA2)
    numbers = {name: weight.numpy() for name, weight in expected.named_weights().items()}
    expected.quantize(MODES[mode])
    with uninitialized():
        backbone = GemmaBackbone(**GEMMA2, quantization=MODES[mode])
    assert all(variable._value is None for variable in backbone.variables)
    for name, weight in backbone.named_weights().items():
        weight.assign(numbers[name])
    np.testing.assert_array_equal(run(backbone), run(expected))
    assert report(backbone).to_dict() == report(expected).to_dict()


def test_names_shapes_and_bytes():
    sizes = GEMMA2 | {"hidden_dim": 64, "intermediate_dim": 192}
    backbone = make_backbone(sizes, dtype="bfloat16")
    for mode in ("int8", "int4"):
        backbone = make_backbone(sizes, dtype="bfloat16")
        backbone.quantize(mode)
        weights = backbone.named_weights()
        shapes = {name: weight.shape for name, weight in weights.items()}
        assert shapes == backbone.config.weight_shapes()
        assert weights["layers.0.gate"].dtype == mode
        assert weights["token_embedding"].dtype == "int8"
        assert weights["final_norm"].dtype == weights["layers.0.gate"].plain_dtype == "bfloat16"
        sizes_report = report(backbone)
        assert sizes_report.bytes_before == backbone.config.weight_bytes("bfloat16")
        if keras.config.backend() == "torch":  # other backends may pad stored weights
            assert sizes_report.bytes_after == backbone.config.weight_bytes(mode)


def test_report():
    backbone = make_backbone(GEMMA2)
    numbers = {name: weight.numpy() for name, weight in backbone.named_weights().items()}
    plain = report(backbone)
    assert plain.bytes_before == plain.bytes_after and "not quantized" in str(plain)
    backbone.quantize(MODES["int4"])
    quantized = report(backbone)
    weights = backbone.named_weights()
    for entry in quantized.weights:
        if entry.name.endswith("norm"):
            assert "norm" in entry.kept and entry.relative_error == 0
            continue
        difference = weights[entry.name].numpy() - numbers[entry.name]
        expected = np.linalg.norm(difference) / np.linalg.norm(numbers[entry.name])
        assert entry.relative_error == pytest.approx(expected, rel=1e-2)
        assert entry.kept is None and entry.bytes_after < entry.bytes_before / 2
    lines = str(quantized).splitlines()
    assert "int4 in groups of 16" in lines[0] and "MB after" in lines[0]
    assert len(lines) == 2 + len(weights)
    assert quantized.to_dict()["bytes_after"] == quantized.bytes_after


def test_unquantized_weights_are_freed():
    backbone = make_backbone(GEMMA1)
    plain = [w.variable for w in backbone.named_weights().values() if w.kind != "norm"]
    alive = [weakref.ref(variable) for variable in plain]
    backbone.quantize("int8")
    variable_ids = {id(variable) for variable in backbone.variables}
    assert not variable_ids & set(map(id, plain))
    if keras.config.backend() == "torch":
        assert sum(p.numel() for p in backbone.parameters()) == backbone.count_params()
    assert backbone.trainable_variables == []
    del plain
    assert not any(variable() for variable in alive)


@pytest.mark.parametrize(
    ("group_size", "number"), [(16, np.nan), (16, -np.inf), (16, 3e38), (1, 0.0)]
)
def test_failed_quantization_changes_nothing(group_size, number):
    backbone = make_backbone(GEMMA2)
    weight = backbone.named_weights()["layers.1.down"]
    array = weight.numpy().copy()
    array[3, 4] = number
    weight.assign(array)
    with pytest.raises(ValueError, match="layers.1.down: .*NaN" if number else "group_size"):
        backbone.quantize("int4", group_size)
    assert all(weight.dtype == "float32" for weight in backbone.named_weights().values())
    array[3, 4] = 0
    weight.assign(array)
    backbone.quantize("int4", 16)


@pytest.mark.parametrize("extra", [{"group_size": 16}, {"zeros": True}, {"embedding": "int4"}])
def test_settings_together_with_a_config_are_an_error(extra):
    for mode in (QuantizationConfig("int4"), {"mode": "int4"}):
        with pytest.raises(ValueError, match=r"`mode` is a config.* set .*in it"):
            make_backbone(GEMMA1).quantize(mode, **extra)


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, r"`calibration` must not be empty.*Received: calibration=\[\]"),
        ([[5]], ValueError, r"at least two tokens.*Received: \[5\]"),
        (5, TypeError, "Received: calibration=5"),
    ],
)
def test_invalid_calibration(calibration, error, message):
    with pytest.raises(error, match=message):
        make_backbone(GEMMA1).quantize("int8", calibration=calibration)


@pytest.mark.parametrize("model", [None, 5, "gemma_tiny_en"])
def test_report_of_another_type_is_an_error(model):
    with pytest.raises(TypeError, match="`model` must be a GemmaCausalLM or a GemmaBackbone"):
        report(model)


def test_weights_of_other_settings_are_an_error(tmp_path):
    """Values with zero points would be wrong in a model without zero points, and vice versa."""
    modes = [None, "int8", QuantizationConfig("int4", 16), QuantizationConfig("int4", 16, True)]
    models = [make_backbone(GEMMA2) for _ in modes]
    for i, mode in enumerate(modes):
        if mode is not None:
            models[i].quantize(mode)
        models[i].save_weights(tmp_path / f"{i}.weights.h5")
    for i, model in enumerate(models):
        (other,) = (j for j in range(4) if j == (i ^ 1))
        with (
            warnings.catch_warnings(),
            pytest.raises(ValueError, match="from a model with the same quantization"),
        ):
            warnings.simplefilter("ignore")  # Keras warns about skipped layers
            model.load_weights(tmp_path / f"{other}.weights.h5")
        model.load_weights(tmp_path / f"{i}.weights.h5")


@pytest.mark.parametrize("mode", ["float8", "gptq", "int2", None, 8])
def test_unknown_modes(mode):
    message = f"`mode` must be one of 'int8', 'int4'. Received: mode={mode!r}"
    with pytest.raises(ValueError, match=message):
        GemmaBackbone(**GEMMA1).quantize(mode)


def test_quantizing_twice():
    backbone = make_backbone(GEMMA1)
    backbone.quantize("int8")
    with pytest.raises(ValueError, match=r"quantized already \(int8.*mode='int4'"):
        backbone.quantize("int4", group_size=16)


def test_group_size_must_divide_rows():
    backbone = make_backbone(GEMMA1)
    with pytest.raises(ValueError, match=r"group_size=32, and rows of 48 \(layers.0.down\)"):
        backbone.quantize("int4")
    assert backbone.quantization is None
    with pytest.raises(ValueError, match=r"rows of 48 \(layers.0.down\)"):
        GemmaBackbone(**GEMMA1, quantization="int4")


@MODE
def test_keras_files(mode, tmp_path):
    backbone = make_backbone(GEMMA2)
    backbone.quantize(MODES[mode])
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.quantization == MODES[mode]
    assert again.trainable_variables == []
    np.testing.assert_array_equal(run(again), run(backbone))


def test_layer_configs_hold_the_quantization():
    backbone = make_backbone(GEMMA2)
    block = backbone.transformer_layers[1]
    assert "quantization" not in block.get_config()
    backbone.quantize(MODES["int4"])
    again = type(block).from_config(block.get_config())
    assert again.ffw_linear.quantization == MODES["int4"]


def test_mean_squares():
    backbone = make_backbone(GEMMA2)
    means = mean_squares(backbone, [IDS[:1], IDS[1:]])
    shapes = backbone.config.weight_shapes()
    matrices = {n for n, shape in shapes.items() if len(shape) == 2 and n != "token_embedding"}
    assert means.keys() == matrices
    assert all(means[name].shape == shapes[name][1:] for name in matrices)
    x = backbone.token_embedding(IDS) * np.sqrt(np.float32(32))
    x = ops.convert_to_numpy(backbone.transformer_layers[0].pre_attention_norm(x))
    expected = np.mean(x.astype("float64") ** 2, axis=(0, 1))
    np.testing.assert_allclose(means["layers.0.query"], expected, rtol=1e-4)
    hidden = without_cache(backbone, IDS)
    np.testing.assert_allclose(hidden, run(backbone), atol=1e-4)


def test_summary(capsys):
    backbone = make_backbone(GEMMA1, dtype="bfloat16")
    backbone.quantize("int8")
    lines = []
    backbone.summary(print_fn=lines.append)
    assert "bfloat16" in lines[-1] and "int8" in lines[-1]
    size = sum(weight.bytes for weight in backbone.named_weights().values())
    (total,) = re.findall(r"Total params: .* \((.*)\)", "\n".join(lines))
    assert total == f"{size / 2**10:.2f} KB"
    assert keras_gemma.quantization.report is report
