"""Hugging Face folders with weights of Flax, written by the package msgpack as Flax does."""

import json

import numpy as np
import pytest

from keras_gemma import GemmaBackbone
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.hugging_face import config_json
from tests.configurations import CONFIGURATIONS
from tests.storage.conftest import (
    Task,
    assert_same_weights,
    make_backbone,
    outputs,
    save_to_hugging_face,
)

msgpack = pytest.importorskip("msgpack", reason="the package msgpack writes these files")

NAMES = ["gemma1_multi_query", "gemma1_wide_heads"]
WEIGHTS = "flax_model.msgpack"


def flax_tree(backbone):
    """Returns the parameters of transformers' FlaxGemmaForCausalLM."""
    weights = {name: weight.numpy() for name, weight in backbone.named_weights().items()}
    layers = {}
    for i in range(backbone.config.num_layers):
        attention = zip("qkvo", ("query", "key", "value", "output"), strict=True)
        layers[str(i)] = {
            "input_layernorm": {"weight": weights[f"layers.{i}.pre_attention_norm"]},
            "post_attention_layernorm": {"weight": weights[f"layers.{i}.pre_ffw_norm"]},
            "self_attn": {
                f"{letter}_proj": {"kernel": weights[f"layers.{i}.{kind}"].T}
                for letter, kind in attention
            },
            "mlp": {
                f"{kind}_proj": {"kernel": weights[f"layers.{i}.{kind}"].T}
                for kind in ("gate", "up", "down")
            },
        }
    return {
        "model": {
            "embed_tokens": {"embedding": weights["token_embedding"]},
            "layers": layers,
            "norm": {"weight": weights["final_norm"]},
        }
    }


def encode(value, chunk_bytes=1 << 30):
    """Encodes a tree as `flax.serialization.msgpack_serialize` does."""

    def in_parts(value):
        if isinstance(value, dict):
            return {key: in_parts(entry) for key, entry in value.items()}
        if not isinstance(value, np.ndarray) or value.nbytes <= chunk_bytes:
            return value
        flat, step = value.reshape(-1), chunk_bytes // value.itemsize
        chunks = [flat[i : i + step] for i in range(0, flat.size, step)]
        return {
            "__msgpack_chunked_array__": True,
            "shape": {str(i): size for i, size in enumerate(value.shape)},
            "chunks": {str(i): chunk for i, chunk in enumerate(chunks)},
        }

    def extension(value):
        content = (value.shape, value.dtype.name, value.tobytes("C"))
        return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))

    return msgpack.packb(in_parts(value), default=extension, strict_types=True)


def write_config(folder, configuration):
    folder.mkdir(exist_ok=True)
    values = config_json.to_values(GemmaConfig(**configuration))
    (folder / "config.json").write_text(json.dumps(values))


@pytest.fixture
def backbone():
    return make_backbone(CONFIGURATIONS["gemma1_multi_query"])


@pytest.fixture
def folder(tmp_path, backbone):
    write_config(tmp_path / "model", CONFIGURATIONS["gemma1_multi_query"])
    (tmp_path / "model" / WEIGHTS).write_bytes(encode(flax_tree(backbone)))
    return tmp_path / "model"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_reads_weights(name, dtype, tmp_path):
    expected = make_backbone(CONFIGURATIONS[name], dtype)
    write_config(tmp_path, CONFIGURATIONS[name])
    (tmp_path / WEIGHTS).write_bytes(encode(flax_tree(expected)))
    loaded = GemmaBackbone.from_preset(tmp_path, dtype=dtype)
    assert_same_weights(loaded, expected)
    for ours, theirs in zip(outputs(loaded), outputs(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_reads_arrays_in_parts(folder, backbone):
    (folder / WEIGHTS).write_bytes(encode(flax_tree(backbone), chunk_bytes=1000))
    assert_same_weights(GemmaBackbone.from_preset(folder), backbone)


def test_reads_shards(folder, backbone):
    tree = flax_tree(backbone)["model"]
    (folder / WEIGHTS).unlink()
    shards = [{"model": {"embed_tokens": tree.pop("embed_tokens")}}, {"model": tree}]
    names = [f"flax_model-0000{i}-of-00002.msgpack" for i in (1, 2)]
    weight_map = {}

    def add(value, path, name):
        if isinstance(value, dict):
            for key, entry in value.items():
                add(entry, [*path, key], name)
        else:
            weight_map["/".join(path)] = name

    for name, shard in zip(names, shards, strict=True):
        (folder / name).write_bytes(encode(shard))
        add(shard, [], name)
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_weights(GemmaBackbone.from_preset(folder), backbone)
    weight_map["model/norm/weight"] = names[0]
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"not held: model\.norm\.weight"):
        GemmaBackbone.from_preset(folder)


def test_safetensors_have_precedence(folder):
    other = make_backbone(CONFIGURATIONS["gemma1_multi_query"])
    other.named_weights()["final_norm"].assign(np.full(32, 0.5, "float32"))
    save_to_hugging_face(Task(other), folder, overwrite=True)
    assert not (folder / WEIGHTS).exists()  # a save replaces the whole model
    (folder / WEIGHTS).write_bytes(b"not read")
    assert_same_weights(GemmaBackbone.from_preset(folder), other)


def test_truncated_files(folder):
    """A file that is cut at any place is refused before a tensor is read."""
    content = (folder / WEIGHTS).read_bytes()
    for length in [*range(0, 300, 7), len(content) // 2, len(content) - 1]:
        (folder / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"flax_model\.msgpack cannot be read.*cut short"):
            GemmaBackbone.from_preset(folder)


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


def array(shape, dtype="float32", data=b"", code=1):
    return msgpack.ExtType(code, msgpack.packb((shape, dtype, data)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut short"),
        (b"\xdf\xff\xff\xff\xff", "cut short"),
        (b"\xdb\xff\xff\xff\xff", "in place of map"),
        (msgpack.packb([1]), "in place of map"),
        (msgpack.packb({}) + b"\0", "more than a map"),
        (msgpack.packb({1: 2}), "in place of string"),
        (msgpack.packb({"x" * 2000: 1}), "name of 2000 bytes"),
        (b"\x82\xa1a\x01\xa1a\x01", "twice"),
        (msgpack.packb({"a": None}), "'a' is a value of the kind 0xc0"),
        (msgpack.packb({"a": 1.5}), "kind 0xcb"),
        (msgpack.packb({"a": 7}), "a is not an array"),
        (msgpack.packb(nested(40)), "more than 16 deep"),
        (msgpack.packb({"a": array((1 << 40,))}), "damaged"),
        (msgpack.packb({"a": array((2,), data=b"1234")}), "damaged"),
        (msgpack.packb({"a": array((1,), "object", b"12345678")}), "unexpected|damaged|missing"),
        (msgpack.packb({"a": array((1,), "secret")}), "unknown dtype 'secret'"),
        (msgpack.packb({"a": array((), code=3)}), "extension 3"),
        (msgpack.packb({"a": {"__msgpack_chunked_array__": True}}), "no shape or no parts"),
        (
            msgpack.packb(
                {
                    "a": {
                        "__msgpack_chunked_array__": True,
                        "shape": {"0": 5},
                        "chunks": {"0": array((1,), data=b"1234")},
                    }
                }
            ),
            "another size",
        ),
    ],
)
def test_damaged_files(folder, content, message):
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(folder)


def test_other_parameters(folder, backbone):
    tree = flax_tree(backbone)
    tree["model"]["norm"] = {"weight": np.zeros(3, "int8")}
    (folder / WEIGHTS).write_bytes(encode(tree))
    with pytest.raises(ValueError, match=r"shape: model\.norm\.weight is \(3,\), expected \(32,\)"):
        GemmaBackbone.from_preset(folder)


def test_links_out_of_the_folder(folder, tmp_path):
    (folder / WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside its folder"):
        GemmaBackbone.from_preset(folder)
