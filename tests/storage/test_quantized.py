"""Quantizing while loading, and presets of quantized models."""

import json
import subprocess
import sys

import h5py
import keras
import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, QuantizationConfig, to_keras_hub
from keras_gemma.backend_choice import BACKENDS
from keras_gemma.quantization import report
from tests.configurations import GEMMA2
from tests.quantizations import MODES
from tests.storage.conftest import Task, make_backbone, make_task, outputs, save_to_hugging_face

MODE = pytest.mark.parametrize("mode", MODES)


def quantized(mode, dtype="float32", configuration=GEMMA2):
    backbone = make_backbone(configuration, dtype)
    backbone.quantize(MODES[mode])
    return backbone


def assert_same_bits(actual, expected):
    """Asserts that all arrays of two quantized backbones are equal."""
    actual, expected = actual.named_weights(), expected.named_weights()
    for name, weight in expected.items():
        if weight.kind == "norm":
            np.testing.assert_array_equal(actual[name].numpy(), weight.numpy())
            continue
        for one, other in zip(actual[name].plain_form(), weight.plain_form(), strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert one.dtype == other.dtype
                np.testing.assert_array_equal(one, other, err_msg=name)


@MODE
@pytest.mark.parametrize("form", ["keras", "hugging_face"])
def test_loading_quantizes(form, mode, tmp_path):
    backbone = make_backbone(GEMMA2, "bfloat16")
    if form == "keras":
        backbone.save_to_preset(tmp_path)
    else:
        save_to_hugging_face(Task(backbone), tmp_path)
    found = GemmaBackbone.from_preset(tmp_path, dtype="bfloat16", quantization=MODES[mode])
    backbone.quantize(MODES[mode])
    assert_same_bits(found, backbone)
    for one, other in zip(report(found).weights, report(backbone).weights, strict=True):
        assert one.relative_error == pytest.approx(other.relative_error, rel=1e-4)


@MODE
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_preset_has_the_same_bits(dtype, mode, tmp_path):
    backbone = quantized(mode, dtype)
    backbone.save_to_preset(tmp_path)
    again = GemmaBackbone.from_preset(tmp_path)
    assert again.quantization == MODES[mode] and again.dtype == dtype
    assert_same_bits(again, backbone)
    assert report(again) == report(backbone)
    for one, other in zip(outputs(again), outputs(backbone), strict=True):
        np.testing.assert_array_equal(one, other)


def test_shards(tmp_path):
    backbone = quantized("int4_zeros")
    backbone.save_to_preset(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model_*.weights.h5"))) > 1
    assert_same_bits(GemmaBackbone.from_preset(tmp_path), backbone)


def test_content_of_quantized_file(tmp_path):
    """Equals `quantized_specs`, read without this package."""
    backbone = quantized("int4_zeros")
    backbone.save_to_preset(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert config["quantization"] == MODES["int4_zeros"].to_dict()
    with h5py.File(tmp_path / "model.weights.h5") as file:
        group = file["layers/gemma_decoder_block_1/ffw_linear/vars"]
        values, scales, zeros = (group[name][...] for name in ("values", "scales", "zeros"))
        assert group["scales"].attrs["dtype"] == "bfloat16"
        embedding = file["layers/reversible_embedding/vars"]
        rows = embedding["values"][...] * embedding["scales"][...][:, None]
    scales, zeros = (
        (bits.view("uint16").astype("uint32") << 16).view("float32") for bits in (scales, zeros)
    )
    values = np.concatenate([values & 15, values >> 4], axis=1).reshape(32, 3, 16)
    numbers = (scales[..., None] * (values - zeros[..., None])).reshape(32, 48)
    weights = backbone.named_weights()
    np.testing.assert_allclose(weights["layers.1.down"].numpy(), numbers, rtol=1e-6)
    np.testing.assert_allclose(weights["token_embedding"].numpy(), rows, rtol=1e-6)


READ = """
import sys
import numpy as np
from keras_gemma import GemmaBackbone

backbone = GemmaBackbone.from_preset(sys.argv[1])
parts = {
    f"{name}/{i}": np.asarray(part, "float32")
    for name, weight in backbone.named_weights().items() if weight.kind != "norm"
    for i, part in enumerate(weight.plain_form()) if part is not None
}
np.savez(sys.argv[2], **parts)
"""


def test_same_bits_on_another_backend(tmp_path, command_environment):
    backbone = quantized("int4_zeros")
    backbone.save_to_preset(tmp_path / "preset")
    other = BACKENDS[BACKENDS.index(keras.config.backend()) - 1]
    result = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "preset"), str(tmp_path / "parts.npz")],
        env=command_environment | {"KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    parts = np.load(tmp_path / "parts.npz")
    assert len(parts) == 3 * 4 * 7 + 2
    weights = backbone.named_weights()
    for key in parts:
        name, i = key.split("/")
        expected = weights[name].plain_form()[int(i)].astype("float32")
        np.testing.assert_array_equal(parts[key], expected, err_msg=key)


@pytest.mark.parametrize("kind", ["backbone", "task"])
def test_keras_hub_refuses(kind, tmp_path, tiny_proto):
    import keras_hub

    task = make_task(GEMMA2, tiny_proto)
    task.backbone.quantize(MODES["int4"])
    lm = GemmaCausalLM(task.backbone, task.preprocessor)
    (lm if kind == "task" else lm.backbone).save_to_preset(tmp_path)
    theirs = {
        "backbone": keras_hub.models.GemmaBackbone,
        "task": keras_hub.models.GemmaCausalLM,
    }[kind]
    with pytest.raises((ValueError, TypeError), match="QuantizedGemmaBackbone"):
        theirs.from_preset(str(tmp_path))


def test_keras_hub_objects_are_refused():
    with pytest.raises(ValueError, match=r"KerasHub cannot hold.*save_to_hugging_face.*int8"):
        to_keras_hub(quantized("int8"))


@MODE
def test_hugging_face_folder_is_dequantized(mode, tmp_path):
    backbone = quantized(mode)
    save_to_hugging_face(Task(backbone), tmp_path)
    again = GemmaBackbone.from_preset(tmp_path, dtype="float32")
    for name, weight in backbone.named_weights().items():
        np.testing.assert_array_equal(again.named_weights()[name].numpy(), weight.numpy())


@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0"])
def test_gguf(dtype, tmp_path, tiny_proto):
    gguf = pytest.importorskip("gguf")
    sizes = GEMMA2 | {"hidden_dim": 64, "intermediate_dim": 192, "head_dim": 16}
    backbone = quantized("int8", configuration=sizes)
    preprocessor = make_task(GEMMA2, tiny_proto).preprocessor
    GemmaCausalLM(backbone, preprocessor).save_to_gguf(tmp_path / "model.gguf", dtype=dtype)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    tensor = tensors["blk.0.ffn_gate.weight"]
    found = gguf.dequantize(tensor.data, tensor.tensor_type)
    expected = backbone.named_weights()["layers.0.gate"].numpy()
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < {"f16": 1e-3, "q8_0": 0.01, "q4_0": 0.15}[dtype]


def test_quantized_preset_is_not_quantized_again(tmp_path):
    backbone = quantized("int4")
    backbone.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"quantized already \(int4 in groups of 16.*int8"):
        GemmaBackbone.from_preset(tmp_path, quantization="int8")
    for same in (None, MODES["int4"], MODES["int4"].to_dict()):
        assert_same_bits(GemmaBackbone.from_preset(tmp_path, quantization=same), backbone)


@pytest.mark.parametrize(
    ("quantization", "says"),
    [
        ("int4", "config.json has values of a wrong type: quantization='int4'"),
        ({"mode": "int3"}, "config.json: `mode` must be .*int3"),
        ({"mode": "int4", "group_size": 5}, "config.json: `group_size` must divide"),
        ({"mode": "int4", "group_size": 8}, r"shape: .*vars/scales is \(\d+, \d+\), expected"),
        ({"mode": "int8"}, "dtype|shape"),
        ({"mode": "int4", "group_size": 16, "zeros": True}, "missing: .*vars/zeros"),
        (None, "missing: .*query_dense/vars/0"),
    ],
)
def test_invalid_quantization_in_config(quantization, says, tmp_path):
    quantized("int4").save_to_preset(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["config"]["quantization"] = quantization
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=says):
        GemmaBackbone.from_preset(tmp_path)


def test_numbers_that_are_not_finite_name_their_weight(tmp_path):
    backbone = make_backbone(GEMMA2)
    array = backbone.named_weights()["layers.1.up"].numpy().copy()
    array[3, 4] = np.nan
    backbone.named_weights()["layers.1.up"].assign(array)
    backbone.save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"layers.1.up: .*NaN, infinity"):
        GemmaBackbone.from_preset(tmp_path, quantization="int8")


def test_invalid_mode_is_refused_first():
    says = r"`quantization` must be one of .* Received: quantization='int5'"
    with pytest.raises(ValueError, match=says):
        GemmaBackbone.from_preset("no such preset", quantization="int5")
    with pytest.raises(TypeError, match="`quantization`"):
        GemmaCausalLM.from_preset("no such preset", quantization=8)


def test_without_weights():
    backbone = GemmaBackbone.from_preset(
        "gemma_tiny_en", load_weights=False, quantization=QuantizationConfig("int4")
    )
    assert backbone.quantization.mode == "int4"


def test_quantized_dtype_policies_of_keras():
    says = "floating-point dtype. For 8 and 4 bits, pass dtype='bfloat16', quantization='int8'"
    with pytest.raises(ValueError, match=says):
        GemmaCausalLM.from_preset("no such preset", dtype="int8_from_bfloat16")
    with pytest.raises(ValueError, match=says):
        make_backbone(GEMMA2, "int8_from_bfloat16")
