"""GGUF files that are loaded: round trips, the numbers of the package gguf, and damaged files."""

import struct

import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaTokenizer
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.gguf.header import read_header
from keras_gemma.storage.gguf.writer import save_to_gguf
from tests.configurations import CONFIGURATIONS
from tests.storage.conftest import IDS, make_task, outputs

gguf = pytest.importorskip("gguf", reason="the package gguf writes these files")

NAMES = ["gemma1_wide_heads", "gemma2_grouped", "gemma3"]


@pytest.fixture
def path(tmp_path, tiny_proto):
    path = tmp_path / "model.gguf"
    save_to_gguf(make_task(CONFIGURATIONS["gemma3"], tiny_proto), path, "bf16")
    return path


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, tmp_path, tiny_proto):
    task = make_task(CONFIGURATIONS[name], tiny_proto)
    save_to_gguf(task, tmp_path / "model.gguf", "f16")
    for weight in task.backbone.named_weights().values():  # what float16 keeps
        if len(weight.shape) == 2:
            weight.assign(weight.numpy().astype("float16").astype("float32"))
    loaded = GemmaCausalLM.from_preset(tmp_path / "model.gguf")
    config = {**loaded.backbone.config.to_dict(), "dropout": task.backbone.config.dropout}
    assert GemmaConfig(**config) == task.backbone.config
    for ours, theirs in zip(outputs(loaded.backbone), outputs(task.backbone), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    texts = ["ROMEO:  x\n\n\n\ty", "<start_of_turn>user\n", "日本語 😀"]
    ours, theirs = loaded.preprocessor.tokenizer, task.preprocessor.tokenizer
    assert ours.encode(texts) == theirs.encode(texts)
    assert ours.get_vocabulary() == theirs.get_vocabulary()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0", "BF16", "F32"])
def test_numbers_are_those_of_the_package(kind, tmp_path, tiny_proto):
    """Matrices in each type are equal bit for bit to what the package dequantizes."""
    task = make_task(CONFIGURATIONS["gemma3"] | {"hidden_dim": 64}, tiny_proto)
    path = tmp_path / "model.gguf"
    save_to_gguf(task, path, "bf16")
    reader = gguf.GGUFReader(path)
    kind = gguf.GGMLQuantizationType[kind]
    rewritten = tmp_path / "rewritten.gguf"
    writer = gguf.GGUFWriter(rewritten, "gemma3")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            value, types = field.contents(), field.types
            sub_type = types[1] if len(types) > 1 else None
            writer.add_key_value(field.name, value, types[0], sub_type)
    expected = {}
    for tensor in reader.tensors:
        numbers = gguf.dequantize(tensor.data, tensor.tensor_type)
        if numbers.ndim == 2 and numbers.shape[1] % 32 == 0:
            data = gguf.quants.quantize(numbers, kind)
            writer.add_tensor(tensor.name, data, raw_dtype=kind)
            expected[tensor.name] = gguf.dequantize(data, kind)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    weights = GemmaBackbone.from_preset(rewritten, dtype="float32").named_weights()
    np.testing.assert_array_equal(
        weights["layers.1.gate"].numpy(), expected["blk.1.ffn_gate.weight"]
    )
    np.testing.assert_array_equal(weights["token_embedding"].numpy(), expected["token_embd.weight"])


def test_dtype_and_quantization(path):
    backbone = GemmaBackbone.from_preset(path, dtype="bfloat16")
    assert backbone.named_weights()["layers.0.query"].dtype == "bfloat16"
    assert GemmaBackbone.from_preset(path, quantization="int8").quantization.mode == "int8"
    assert GemmaTokenizer.from_preset(path).vocabulary_size() == 512


def test_other_files_are_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\x03\x04 and more than 24 bytes of another kind")
    with pytest.raises(ValueError, match=r"must be a folder or a GGUF file.*model\.gguf"):
        GemmaBackbone.from_preset(tmp_path / "model.gguf")


def test_truncated_files(path):
    """A file that is cut at any place is refused."""
    content = path.read_bytes()
    for length in [*range(24, 2000, 97), len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut short|claims|damaged|lacks"):
            GemmaBackbone.from_preset(path)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (4, struct.pack("<I", 1), "version 1"),
        (4, struct.pack(">I", 3), "version 50331648"),
        (8, struct.pack("<Q", 1 << 60), "claims"),
        (16, struct.pack("<Q", 1 << 60), "claims"),
        (24, struct.pack("<Q", 1 << 62), "cut short"),
    ],
)
def test_lying_headers(path, offset, value, message):
    content = bytearray(path.read_bytes())
    content[offset : offset + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"general.architecture\x08\0\0\0\x06\0\0\0\0\0\0\0gemma3", b"llama3", "'llama3'"),
        (b"gemma3.block_count", b"gemma3.block_cownt", "lacks block_count"),
        (b"blk.0.attn_q.weight", b"blk.0.attn_z.weight", r"missing: blk\.0\.attn_q\.weight"),
        (b"tokenizer.ggml.scores", b"tokenizer.ggml.scorez", "lacks tokenizer.ggml.scores"),
    ],
)
def test_other_content(path, old, new, message):
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, old[: len(old) - len(new)] + new))
    with pytest.raises(ValueError, match=message):
        GemmaCausalLM.from_preset(path)


def test_header_equals_that_of_the_package(path):
    header, reader = read_header(path), gguf.GGUFReader(path)
    for tensor in reader.tensors:
        info = header.tensors[tensor.name]
        assert info.shape == tuple(int(n) for n in tensor.shape[::-1])
        assert (info.offset, info.type) == (tensor.data_offset, tensor.tensor_type)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            ours = header.metadata[name]
            ours = ours.tolist() if isinstance(ours, np.ndarray) else ours
            assert ours == field.contents()


def test_scores_are_computed(path):
    lm = GemmaCausalLM.from_preset(path)
    assert np.isfinite(ops.convert_to_numpy(lm.score(IDS))).all()
