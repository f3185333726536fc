"""GGUF files that are loaded: round trips, the numbers of the package gguf, and damaged files."""

import struct

import ml_dtypes  # noqa: F401  # teaches NumPy the name "bfloat16"
import numpy as np
import pytest
from keras import ops

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaTokenizer
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.gguf import tensor_reader
from keras_gemma.storage.gguf.header import read_header
from keras_gemma.storage.gguf.reader import read_backbone
from keras_gemma.storage.gguf.writer import save_to_gguf
from tests.configurations import CONFIGURATIONS
from tests.storage.conftest import IDS, assert_same_weights, make_task, outputs

gguf = pytest.importorskip("gguf", reason="the package gguf writes these files")

TYPES = [kind for kind in gguf.GGMLQuantizationType if tensor_reader.is_dequantized(kind)]
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


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """Returns a file with a tensor of random bytes in each type, and the bytes."""
    path, random = tmp_path_factory.mktemp("gguf") / "every_type.gguf", np.random.default_rng(0)
    writer, data = gguf.GGUFWriter(path, "gemma3"), {}
    for kind in TYPES:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        size = (6, 512 // block * block_bytes)
        data[kind] = random.integers(0, 256, size, dtype="uint8")
        writer.add_tensor(kind.name, data[kind], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, data


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("kind", TYPES)
def test_every_type(kind, every_type, monkeypatch):
    """All numbers, read in chunks of two rows, are equal bit for bit to the package's."""
    monkeypatch.setattr(tensor_reader, "CHUNK_ELEMENTS", 1024)
    path, data = every_type
    expected = gguf.dequantize(data[kind], kind)
    with tensor_reader.open_weights(path) as tensors:
        tensor = tensors[kind.name]
        assert tensor.read().tobytes() == expected.tobytes()
        assert tensor.float_rows(slice(1, 4)).tobytes() == expected[1:4].tobytes()


def test_other_types_are_refused(every_type, tmp_path):
    content = every_type[0].read_bytes()
    info = content.index(b"Q8_0") + 4 + 20  # after dimensions and two lengths
    others = [kind for kind in gguf.GGMLQuantizationType if kind not in TYPES]
    assert {"Q8_1", "I8", "F64"} <= {kind.name for kind in others}
    for kind in others:
        path = tmp_path / f"{kind.name}.gguf"
        path.write_bytes(content[:info] + struct.pack("<I", kind) + content[info + 4 :])
        says = rf"{kind.name}, which the package gguf does not"
        with pytest.raises(ValueError, match=says), tensor_reader.open_weights(path):
            pass


def test_file_that_shrinks_while_reading(every_type, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(every_type[0].read_bytes())
    with tensor_reader.open_weights(path) as tensors:
        path.write_bytes(b"")
        with pytest.raises(ValueError, match="is cut short"):
            tensors["Q8_0"].read()


def test_bfloat16_norms_are_rounded_once(path, tiny_proto):
    task = make_task(CONFIGURATIONS["gemma3"], tiny_proto)
    random = np.random.default_rng(1)
    norms = {n: w for n, w in task.backbone.named_weights().items() if w.kind == "norm"}
    expected = {}
    for name, weight in norms.items():
        weight.assign(random.normal(0, 0.01, weight.shape).astype("float32"))
        expected[name] = ((1 + weight.numpy()) - 1).astype("bfloat16")
    save_to_gguf(task, path, "bf16", overwrite=True)
    weights = GemmaBackbone.from_preset(path, dtype="bfloat16").named_weights()
    for name, numbers in expected.items():
        assert weights[name].numpy().tobytes() == numbers.tobytes(), name


def test_quantizing_in_chunks_equals_quantizing_the_model(path):
    loaded = GemmaBackbone.from_preset(path, dtype="float32", quantization="int8")
    quantized = GemmaBackbone.from_preset(path, dtype="float32")
    quantized.quantize("int8")
    assert_same_weights(loaded, quantized)


def edit(path, tensors=None, **changes):
    """Writes a copy of a file with other metadata, in which `None` removes a key.

    Two underscores are a period. `tensors` are added.
    """
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    reader, target = gguf.GGUFReader(path), path.with_suffix(".edited.gguf")
    target.unlink(missing_ok=True)
    architecture = changes.pop("general.architecture", "gemma3")
    writer = gguf.GGUFWriter(target, architecture if isinstance(architecture, str) else "x")
    if not isinstance(architecture, str):
        writer.kv_data[0].clear()
        changes["general.architecture"] = architecture
    for field in reader.fields.values():
        name = field.name
        if architecture in ("gemma", "gemma2"):
            name = name.replace("gemma3.", f"{architecture}.")
        if not name.startswith("GGUF.") and name not in changes and name != "general.architecture":
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for name, value in changes.items():
        if value is not None:
            type = gguf.GGUFValueType.get_type(value)
            sub_type = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, type, sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in (tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_metadata_of_other_types(path):
    for name, value, says in [
        ("general__architecture", 3, "must have text as general.architecture"),
        ("general__architecture", [1, 2], "must have text as general.architecture"),
        ("split__count", [1, 2], "must have an integer as split.count"),
        ("gemma3__block_count", "2", "must have an integer as block_count"),
        ("gemma3__block_count", True, "must have an integer as block_count"),
        ("gemma3__embedding_length", 32.0, "must have an integer as embedding_length"),
        ("gemma3__feed_forward_length", [96, 96], "an integer as feed_forward_length"),
        ("gemma3__context_length", ["a"] * 99, "an integer as context_length"),
        ("gemma3__rope__freq_base", "fast", "a finite number as rope.freq_base"),
        ("gemma3__rope__freq_base", -1.0, r"edited\.gguf describes an invalid model.*wavelength"),
        ("gemma3__rope__freq_base_swa", [1.0], "a finite number as rope.freq_base_swa"),
        ("gemma3__rope__scaling__type", 1, "must have text as rope.scaling.type"),
        ("gemma3__rope__scaling__type", "yarn", "'linear' and 'none'"),
        ("gemma3__rope__scaling__factor", "8", "a finite number as rope.scaling.factor"),
        ("gemma3__attention__layer_norm_rms_epsilon", float("nan"), "a finite number as"),
        ("gemma3__attention__head_count", 0, "describes an invalid model"),
        ("gemma3__attention__sliding_window", 4.0, "an integer as attention.sliding_window"),
        ("gemma3__attention__sliding_window_pattern", True, "an integer as"),
        ("gemma3__attention__sliding_window_pattern", [True, False], "an integer as"),
        ("gemma3__final_logit_softcapping", "30", "a finite number as final_logit"),
    ]:
        with pytest.raises(ValueError, match=says) as info:
            read_backbone(edit(path, **{name: value}))
        assert len(str(info.value)) < 500


def test_defaults_of_llama_cpp(path):
    def read(architecture, **changes):
        changes = {f"{architecture}__{name}": value for name, value in changes.items()}
        return read_backbone(edit(path, general__architecture=architecture, **changes))

    assert read("gemma2", attention__sliding_window=None)["sliding_window_size"] == 4096
    assert "sliding_window_size" not in read("gemma3", attention__sliding_window=None)
    assert read("gemma3", rope__scaling__factor=8.0)["global_rope_scaling_factor"] == 8
    none = read("gemma3", rope__scaling__factor=8.0, rope__scaling__type="none")
    assert none["global_rope_scaling_factor"] == 1
    for architecture in ("gemma", "gemma2"):
        with pytest.raises(ValueError, match=rf"rope.scaling.factor 8, .*'{architecture}'"):
            read(architecture, rope__scaling__factor=8.0)


def test_damaged_vocabularies(path):
    fields = gguf.GGUFReader(path).fields
    keys = ("tokens", "scores", "token_type")
    tokens, scores, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in keys)
    for name, value, says in [
        ("tokens", "a", "tokens must be a list of text"),
        ("tokens", list(range(len(tokens))), "tokens must be a list of text"),
        ("tokens", tokens[:-1], "tokens, 512 scores"),
        ("scores", 1.0, "scores must be a list of numbers"),
        ("scores", tokens, "scores must be a list of numbers"),
        ("scores", [float("nan"), *scores[1:]], "a score is not"),
        ("token_type", 1, "types must be a list of integers"),
        ("token_type", scores, "types must be a list of integers"),
        ("token_type", [7, *types[1:]], "types must be 1 to 6"),
        ("token_type", [0, *types[1:]], "types must be 1 to 6"),
        ("bos_token_id", 512, "the id of bos is 512"),
        ("eos_token_id", -1, "the id of eos is -1"),
        ("padding_token_id", True, "the id of pad is True"),
        ("unknown_token_id", "3", "the id of unk is '3'"),
        ("add_space_prefix", [1, 2], "add_space_prefix is"),
    ]:
        with pytest.raises(ValueError, match=f"has a damaged vocabulary: .*{says}"):
            GemmaTokenizer.from_preset(edit(path, **{f"tokenizer__ggml__{name}": value}))
    with pytest.raises(ValueError, match="vocabulary of kind"):
        GemmaTokenizer.from_preset(edit(path, tokenizer__ggml__model=[1, 2]))


def test_more_tokens_than_rows(path):
    fields = gguf.GGUFReader(path).fields
    longer = {}
    for key, item in (("tokens", "<more>"), ("scores", 0.0), ("token_type", 4)):
        items = fields[f"tokenizer.ggml.{key}"].contents()
        longer[f"tokenizer__ggml__{key}"] = [*items, item]
    with pytest.raises(ValueError, match=r"has 513 tokens, but token_embd\.weight has 512 rows"):
        GemmaCausalLM.from_preset(edit(path, **longer))


def test_head(path):
    """A copy of the embedding is accepted, and nothing else that the model does not need."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    embedding = np.array(tensors["token_embd.weight"].data)
    float16 = gguf.dequantize(embedding, tensors["token_embd.weight"].tensor_type)
    save_to_gguf(GemmaCausalLM.from_preset(path), path, "f16", overwrite=True)
    float16 = float16.astype("float16")
    GemmaBackbone.from_preset(edit(path, {"output.weight": float16}))
    other = float16.copy()
    other[-1, -1] += 1
    for head in (other, float16[:-1], float16.astype("float32")):
        with pytest.raises(ValueError, match="has a head that differs from the embedding"):
            GemmaBackbone.from_preset(edit(path, {"output.weight": head}))
    with pytest.raises(ValueError, match=r"unexpected: rope_freqs\.weight"):
        GemmaBackbone.from_preset(edit(path, {"rope_freqs.weight": other[0]}))


@pytest.mark.parametrize("template", ["{{ '<|im_start|>' }}", 3])
def test_other_chat_templates(path, template):
    edited = edit(path, tokenizer__chat_template=template)
    with pytest.warns(UserWarning, match="has another chat template, which is not used") as record:
        GemmaCausalLM.from_preset(edited)
    assert [warning.filename for warning in record] == [__file__]
    GemmaBackbone.from_preset(edited)  # has no chats


def test_header_is_parsed_once(path):
    header = read_header(path)
    assert read_header(path) is header
    path.write_bytes(path.read_bytes() + b"more")
    assert read_header(path) is not header


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


def test_numbers_beyond_float16_are_refused(tmp_path, tiny_proto):
    task = make_task(CONFIGURATIONS["gemma2_grouped"], tiny_proto)
    weight = task.backbone.named_weights()["layers.0.query"]
    weight.assign(np.full(weight.shape, 1e5, "float32"))
    save_to_gguf(task, tmp_path / "model.gguf", "bf16")
    with pytest.raises(ValueError, match=r"attn_q.*beyond float16.*dtype='bfloat16'"):
        GemmaBackbone.from_preset(tmp_path / "model.gguf", dtype="float16")
