"""GGUF files whose quantized numbers are kept: equal bit for bit to the package gguf's."""

import json

import keras
import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, QuantizationConfig
from keras_gemma.catalogue import presets
from keras_gemma.cli import main
from keras_gemma.quantization import STORED_TYPES, dequantize_array, report
from keras_gemma.storage.gguf.layout import tensor_name
from keras_gemma.storage.gguf.writer import save_to_gguf
from keras_gemma.storage.hub.locate import resolve
from tests.configurations import GEMMA3
from tests.models import on_torch
from tests.storage.conftest import IDS, make_task, outputs

gguf = pytest.importorskip("gguf", reason="the package gguf writes and dequantizes these files")

# PyTorch's own, when it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

REAL_PRESET = "gemma3_270m_q4_k_m"

SIZES = GEMMA3 | {
    "num_layers": 2,
    "hidden_dim": 256,
    "intermediate_dim": 512,
    "head_dim": 64,
}
"""Rows of 256 numbers, which K types need."""

MIXED = (*STORED_TYPES, "BF16", "F16", "F32")


def random_blocks(shape, type, random):
    """Returns random bytes of a quantized tensor, with scales of reasonable size.

    The package quantizes to no K type, and random bytes have all values, such as -128.
    """
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]
    data = random.integers(0, 256, (shape[0], shape[1] // block, block_bytes), dtype="uint8")
    size = {"Q8_0": 100, "Q4_0": 8, "Q4_1": 15, "Q5_0": 16, "Q6_K": 4000}.get(type, 1000)
    starts = {"Q4_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}.get(type, (0,))
    for start in starts:
        scales = random.normal(0, 0.2 / size, data.shape[:2]).astype("<f2")
        data[..., start : start + 2] = scales[..., None].view("uint8")
    return data.reshape(shape[0], -1)


def write_file(path, proto, types):
    """Writes a model whose matrices have `types` in turn; returns the numbers of each tensor."""
    save_to_gguf(make_task(SIZES, proto), path, "bf16")
    reader, random = gguf.GGUFReader(path), np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".rewritten"), "gemma3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type)
    expected, count = {}, 0
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim == 1:
            writer.add_tensor(tensor.name, numbers)
            continue
        type = types[count % len(types)]
        count += 1
        kind = gguf.GGMLQuantizationType[type]
        if type in STORED_TYPES:
            data = random_blocks(numbers.shape, type, random)
        else:
            data = gguf.quants.quantize(numbers, kind)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
        expected[tensor.name] = gguf.dequantize(data, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".rewritten").replace(path)
    return expected


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, tiny_proto):
    """Returns a file with all types, and the numbers of each matrix."""
    path = tmp_path_factory.mktemp("gguf") / "mixed.gguf"
    return path, write_file(path, tiny_proto, MIXED)


def assert_same_numbers(backbone, expected):
    """Asserts that all matrices are equal bit for bit to the numbers of tensors by name."""
    matrices = {n: w for n, w in backbone.named_weights().items() if w.kind != "norm"}
    assert {tensor_name(name) for name in matrices} == set(expected)
    for name, weight in matrices.items():
        numbers = expected[tensor_name(name)]
        if hasattr(weight, "plain_form"):
            actual = dequantize_array(weight.plain_form(), np.dtype("float32"))
        else:
            numbers, actual = (a.astype(weight.plain_dtype) for a in (numbers, weight.numpy()))
        assert actual.tobytes() == numbers.tobytes(), name


@pytest.mark.parametrize("type", STORED_TYPES)
def test_numbers_are_those_of_the_package(type, tmp_path, tiny_proto):
    path = tmp_path / "model.gguf"
    expected = write_file(path, tiny_proto, (type,))
    backbone = GemmaBackbone.from_preset(path, dtype="float32", quantization="as_stored")
    assert_same_numbers(backbone, expected)
    layout, weight = STORED_TYPES[type], backbone.named_weights()["layers.1.down"]
    numbers = np.prod(weight.shape)
    wide = not on_torch() and layout.bits == 8  # XLA's layout stores float32
    dtype = "float32" if wide else layout.scale_dtype
    groups = numbers / layout.group_size * np.dtype(dtype).itemsize
    assert weight.bytes == numbers * layout.bits / 8 + groups * (1 + layout.minimums)
    assert weight.numpy().tobytes() == expected["blk.1.ffn_down.weight"].tobytes()
    floats = GemmaBackbone.from_preset(path, dtype="float32")
    for ours, theirs in zip(outputs(backbone), outputs(floats), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_differ_by_weight(dtype, mixed):
    path, expected = mixed
    backbone = GemmaBackbone.from_preset(path, dtype=dtype, quantization="as_stored")
    assert_same_numbers(backbone, expected)
    assert set(backbone.quantization.types.values()) == set(STORED_TYPES)
    assert not backbone.trainable_variables
    dtypes = [weight.dtype for weight in report(backbone).weights]
    assert dtypes.count("int8") + dtypes.count("int4") == len(backbone.quantization.types)
    floats = GemmaBackbone.from_preset(path, dtype="float32")
    tolerance = {"float32": 1e-5, "bfloat16": 0.05}[dtype]
    for ours, theirs in zip(outputs(backbone), outputs(floats), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def test_generate(mixed):
    def continuation(**arguments):
        lm = GemmaCausalLM.from_preset(mixed[0], dtype="float32", **arguments)
        lm.compile(sampler="greedy", run_eagerly=on_torch())
        return lm.generate(IDS[:, :5].tolist(), max_new_tokens=8, stop_token_ids=None)

    assert continuation(quantization="as_stored") == continuation()


def test_saved_preset_has_the_same_numbers(mixed, tmp_path):
    path, expected = mixed
    backbone = GemmaBackbone.from_preset(path, dtype="bfloat16", quantization="as_stored")
    backbone.save_to_preset(tmp_path / "preset")
    for quantization in (None, "as_stored"):
        again = GemmaBackbone.from_preset(tmp_path / "preset", quantization=quantization)
        assert_same_numbers(again, expected)
        assert again.quantization == backbone.quantization
    for ours, theirs in zip(outputs(again), outputs(backbone), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"quantized already \(as stored in .*int8"):
        GemmaBackbone.from_preset(tmp_path / "preset", quantization="int8")


def test_keras_file(mixed, tmp_path):
    backbone = GemmaBackbone.from_preset(mixed[0], dtype="bfloat16", quantization="as_stored")
    backbone.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_numbers(again, mixed[1])
    assert again.quantization == backbone.quantization


def test_hostile_types_in_a_preset(mixed, tmp_path):
    GemmaBackbone.from_preset(mixed[0], quantization="as_stored").save_to_preset(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    for types, says in [
        ({"layers.0.query": "Q9_0"}, "Received: 'layers.0.query': 'Q9_0'"),
        ({"layers.7.query": "Q8_0"}, "'layers.7.query', of shape unknown"),
        ({"final_norm": "Q8_0"}, "'final_norm', of shape"),
        ({"layers.0.query": "Q8_0"}, "missing: "),
        (["Q8_0"], "must be a dictionary"),
        ({}, "needs one"),
    ]:
        content["config"]["quantization"]["types"] = types
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=says):
            GemmaBackbone.from_preset(tmp_path)


def test_without_weights(mixed):
    backbone = GemmaBackbone.from_preset(mixed[0], load_weights=False, quantization="as_stored")
    assert set(backbone.quantization.types.values()) == set(STORED_TYPES)


def test_a_file_of_floats_is_not_quantized(tmp_path, tiny_proto):
    expected = write_file(tmp_path / "model.gguf", tiny_proto, ("BF16",))
    backbone = GemmaBackbone.from_preset(tmp_path / "model.gguf", quantization="as_stored")
    assert backbone.quantization is None
    assert_same_numbers(backbone, expected)


def test_damaged_files(mixed, tmp_path):
    content = mixed[0].read_bytes()
    name = b"blk.0.attn_q.weight"
    info = content.index(name) + len(name)  # dimensions, two lengths, type, offset
    for i, (edited, says) in enumerate(
        [
            (content[: len(content) // 2], "cut short"),
            (content[:-1], "cut short"),
            (content[: info + 20] + b"\x63\0\0\0" + content[info + 24 :], "unknown type 99"),
            (content[: info + 24] + b"\xff" * 8 + content[info + 32 :], "cut short|damaged"),
            (content[: info + 20] + b"\x09\0\0\0" + content[info + 24 :], "does not dequantize"),
        ]
    ):
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(edited)
        with pytest.raises(ValueError, match=says):
            GemmaBackbone.from_preset(path, quantization="as_stored")


def test_other_models_are_refused(tmp_path):
    says = r"`quantization='as_stored'`.*GGUF file.*Keras preset.*quantization='int8' or 'int4'"
    with pytest.raises(ValueError, match=says):
        GemmaCausalLM.from_preset("gemma_tiny_en", quantization="as_stored")
    with pytest.raises(ValueError, match="needs one"):
        GemmaBackbone(**SIZES, quantization="as_stored")
    backbone = GemmaBackbone(**SIZES)
    for mode in ("as_stored", {"mode": "as_stored", "types": {}}):
        with pytest.raises(ValueError, match=r"`mode` must be 'int8' or 'int4'.*from_preset"):
            backbone.quantize(mode)
    assert backbone.quantization is None


def test_other_numbers_are_refused(mixed):
    backbone = GemmaBackbone.from_preset(mixed[0], quantization="as_stored")
    weight = next(w for w in backbone.named_weights().values() if hasattr(w, "plain_form"))
    with pytest.raises(ValueError, match=r"keeps the numbers of a GGUF file.*assign weights"):
        weight.assign(np.zeros(weight.shape, "float32"))
    with pytest.raises(ValueError, match="quantized already"):
        backbone.quantize("int8")


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "int8", "types": {}},
        {"mode": "as_stored", "group_size": 16},
        {"mode": "as_stored", "embedding": "int4"},
    ],
)
def test_invalid_settings(arguments):
    with pytest.raises(ValueError, match=r"mode='?(int8|as_stored)"):
        QuantizationConfig(**arguments)


@pytest.mark.once
def test_command_line(mixed, tmp_path, capsys):
    path, target = str(mixed[0]), tmp_path / "preset"
    options = ["--quantization", "as_stored", "--dtype", "float32"]
    assert main(["convert", path, str(target), *options]) == 0
    assert_same_numbers(GemmaBackbone.from_preset(target), mixed[1])
    capsys.readouterr()
    command = ["generate", "ROMEO:", "--max-new-tokens", "3", "--json", "--model"]
    assert main([*command, path, *options]) == 0
    assert main([*command, str(target)]) == 0
    one, other = (json.loads(line)["text"] for line in capsys.readouterr().out.splitlines())
    assert one == other


@pytest.mark.skipif(
    presets()[REAL_PRESET].package.find_parts() is None, reason="the extra is not installed"
)
def test_real_file():
    """The real 270M, which has four types: exact numbers, and the known logits."""
    path = resolve(REAL_PRESET)
    backbone = GemmaBackbone.from_preset(path, dtype="float32", quantization="as_stored")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    weights, types = backbone.named_weights(), backbone.quantization.types
    assert set(types.values()) == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    for name in (name for name in types if name.startswith(("layers.0.", "layers.17."))):
        tensor = tensors[tensor_name(name)]
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        assert weights[name].numpy().tobytes() == expected.tobytes(), name
    ids = np.array([[2, 818, 5279, 529, 7001, 563]])  # "The capital of France is"
    logits = keras.ops.convert_to_numpy(GemmaCausalLM(backbone).score(ids))[0, -1]
    best = np.sort(logits)[:-6:-1]
    np.testing.assert_allclose(best, [19.09, 18.55, 18.27, 18.11, 17.78], rtol=0, atol=0.01)
