"""Gemma 3 in Hugging Face's folders: spellings of config.json, and multimodal checkpoints.

The tests of all architectures are in `test_hugging_face.py` and `test_hugging_face_writer.py`.
"""

import json

import numpy as np
import pytest

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage.hugging_face import reader as hugging_face
from keras_gemma.storage.hugging_face.config_json import to_values
from keras_gemma.storage.hugging_face.tokenizer_json import write_tokenizer_json
from keras_gemma.text.pieces import Pieces
from tests.configurations import CONFIGURATIONS, GEMMA3
from tests.storage.conftest import (
    IDS,
    Task,
    assert_close,
    assert_same_weights,
    make_backbone,
    make_task,
    outputs,
    save_to_hugging_face,
)
from tests.storage.transformers_models import make_transformers_model

SIZES_270M = {
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
SIZES_1B = SIZES_270M | {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
FLAT = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "cache_implementation": "hybrid",
    "final_logit_softcapping": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "vocab_size": 262144,
}
KINDS_270M = (["sliding_attention"] * 5 + ["full_attention"]) * 3
LINEAR = {"factor": 8.0, "rope_type": "linear"}
TEXT_4B = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "sliding_window": 1024,
    "rope_scaling": LINEAR,
}
TEXT_12B = TEXT_4B | {
    "hidden_size": 3840,
    "intermediate_size": 15360,
    "num_hidden_layers": 48,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}
TEXT_27B = TEXT_12B | {
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
}
TEXT_NEWER = {key: value for key, value in TEXT_4B.items() if key != "rope_scaling"} | {
    "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}},
}


def nested(text):
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "boi_token_index": 255999,
        "eos_token_id": [1, 106],
        "image_token_index": 262144,
        "text_config": {"model_type": "gemma3_text", **text},
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
    }


SPELLINGS = {
    "270m": (
        FLAT | SIZES_270M | {"_sliding_window_pattern": 6, "layer_types": KINDS_270M},
        268_098_176,
    ),
    "1b": (FLAT | SIZES_1B | {"sliding_window_pattern": 6}, 999_885_952),
    "4b": (nested(TEXT_4B), 3_880_099_328),
    "12b": (nested(TEXT_12B), 11_765_788_416),
    "27b": (nested(TEXT_27B), 27_009_002_240),
    "translategemma": (nested(TEXT_NEWER), 3_880_099_328),
}
"""Content of config.json as published, and the number of parameters of the text model."""


def read(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return GemmaConfig.from_dict(hugging_face.read_backbone(folder))


@pytest.mark.once
@pytest.mark.parametrize("name", SPELLINGS)
def test_published_spellings(name, tmp_path):
    import transformers

    values, count = SPELLINGS[name]
    config = read(tmp_path, values)
    assert config.parameter_count == count
    assert config.vocabulary_size == 262144
    assert config.use_query_key_norm and config.use_post_ffw_norm and config.use_post_attention_norm
    assert config.attention_logit_soft_cap is None and config.final_logit_soft_cap is None
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert_same_config(config, theirs)
    written = to_values(config)
    assert_same_config(config, transformers.Gemma3TextConfig(**written))
    assert read(tmp_path, written) == config


def assert_same_config(config, theirs):
    """Asserts that `config` says the same as the config of transformers."""
    kinds = [config.layer_kind(i) for i in range(config.num_layers)]
    types = ["full_attention" if kind.window is None else "sliding_attention" for kind in kinds]
    assert types == theirs.layer_types
    assert {kind.window for kind in kinds} - {None} == {theirs.sliding_window}
    for kind, name in zip(kinds, types, strict=True):
        rope = theirs.rope_parameters[name]
        assert kind.rope_theta == rope["rope_theta"]
        assert kind.rope_scaling == (rope["factor"] if rope["rope_type"] == "linear" else 1)
    assert config.query_scale == theirs.query_pre_attn_scalar**-0.5
    assert config.context_length == theirs.max_position_embeddings
    assert config.layer_norm_epsilon == theirs.rms_norm_eps


@pytest.mark.once
def test_patterns_and_rotary_embeddings(tmp_path):
    text = FLAT | SIZES_270M
    usual = read(tmp_path, text)
    assert usual.sliding_window_pattern == 6
    assert read(tmp_path, text | {"sliding_window_pattern": 3}).sliding_window_pattern == 3
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 6
    assert read(tmp_path, text | {"layer_types": kinds}).sliding_window_pattern == 3
    assert read(tmp_path, text | {"layer_types": KINDS_270M}) == usual
    all_local = read(tmp_path, text | {"layer_types": ["sliding_attention"] * 18})
    assert all(map(all_local.is_local, range(18)))
    all_global = read(tmp_path, text | {"layer_types": ["full_attention"] * 18})
    assert not any(map(all_global.is_local, range(18)))
    assert all_global.layer_kind(0).rope_theta == 1_000_000
    for old in ({"type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4}):
        config = read(tmp_path, text | {"rope_scaling": old})
        assert (config.global_rope_scaling_factor, config.local_rope_scaling_factor) == (4.0, 1.0)
    both = {
        "full_attention": {"rope_type": "default", "rope_theta": 5.0},
        "sliding_attention": {"rope_type": "linear", "factor": 2, "rope_theta": 7},
    }
    config = read(tmp_path, text | {"rope_parameters": both})
    assert config.layer_kind(0)[1:] == (7.0, 2.0)
    assert config.layer_kind(5)[1:] == (5.0, 1.0)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}, "full_attention: .*yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "full_attention: .*linear"),
        ({"rope_scaling": LINEAR | {"factor": "8"}}, "full_attention: .*'8'"),
        ({"rope_scaling": LINEAR | {"beta": 1}}, "full_attention: .*beta"),
        ({"rope_scaling": "linear"}, "full_attention: .*linear"),
        ({"rope_theta": None}, "full_attention: .*None"),
        ({"rope_local_base_freq": True}, "sliding_attention: .*True"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters={'rope_type'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": ["dynamic"]}}},
            "sliding_attention: .*dynamic",
        ),
        ({"layer_types": KINDS_270M[::-1]}, "layer_types=.*must repeat"),
        ({"layer_types": KINDS_270M[:-1]}, "layer_types=.*must repeat"),
        ({"layer_types": [*KINDS_270M[:-1], "sliding_attention"]}, "layer_types=.*must repeat"),
        ({"layer_types": "full_attention"}, "layer_types='full_attention', not list"),
        ({"layer_types": [["full_attention"]] * 18}, "layer_types=.*must repeat"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern=0"),
        ({"sliding_window_pattern": "6"}, "sliding_window_pattern='6', not int"),
        ({"sliding_window": None}, "sliding_window=None"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"query_pre_attn_scalar": 168}, "query_pre_attn_scalar 168.*256.*160"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"num_hidden_layers": 10**12}, "asks for 1000000000000 layers, and at most 1000"),
    ],
)
def test_unsupported_settings(changes, message, tmp_path):
    flat = FLAT | SIZES_270M | changes
    for values in (flat, nested(flat)):
        with pytest.raises(ValueError, match=message):
            read(tmp_path, values)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": [1]}, r"no `text_config` with the sizes.*text_config=\[1\]"),
        ({"text_config": {"model_type": "llama"}}, "text_config with model_type 'llama'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_bad_multimodal_configurations(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, nested(TEXT_4B) | changes)
    values = nested(TEXT_4B)
    del values["text_config"]
    with pytest.raises(ValueError, match=r"no `text_config` with the sizes.*text_config=None"):
        read(tmp_path, values)


@pytest.mark.once
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_post_ffw_norm": False, "use_post_attention_norm": False},
            "use_query_key_norm=True, use_post_attention_norm=False",
        ),
        ({"local_rope_scaling_factor": 2.0}, "local_rope_scaling_factor=2"),
        ({"use_query_key_norm": False}, "in layer 5: wavelength=1e.06"),
    ],
)
def test_models_without_an_architecture(changes, message):
    with pytest.raises(ValueError, match=message):
        to_values(GemmaConfig(**GEMMA3 | changes))


@pytest.fixture
def multimodal(tmp_path):
    """Folder of a multimodal model as saved by transformers, and the model."""
    model = make_transformers_model(CONFIGURATIONS["gemma3_27b_scale"], "gemma3")
    model.save_pretrained(tmp_path)
    return tmp_path, model


def logits_of(model):
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor(IDS)).logits.numpy()


def test_multimodal_checkpoint_of_transformers(multimodal, tmp_path):
    folder, model = multimodal
    backbone = GemmaBackbone.from_preset(folder)
    assert backbone.config == GemmaConfig(**CONFIGURATIONS["gemma3_27b_scale"])
    assert_close(outputs(backbone)[1:], [logits_of(model)])
    save_to_hugging_face(Task(backbone), tmp_path / "text")
    values = json.loads((tmp_path / "text" / "config.json").read_text())
    assert values["architectures"] == ["Gemma3ForCausalLM"]
    assert_same_weights(GemmaBackbone.from_preset(tmp_path / "text"), backbone)


def renamed(name, prefix):
    """Returns a tensor's name in a file with another prefix of the text tower."""
    old = next(p for p in ("model.language_model.", "language_model.model.") if p in name)
    return name.replace(old, prefix)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model.", "model.", ""])
def test_prefixes_and_skipped_tensors(prefix, multimodal):
    from safetensors.numpy import load_file, save_file

    folder, model = multimodal
    path = folder / "model.safetensors"
    stored = load_file(path)
    text = {name: array for name, array in stored.items() if "vision" not in name}
    text = {name: array for name, array in text.items() if "language_model" in name}
    assert 0 < len(text) < len(stored)
    tensors = {renamed(name, prefix): array for name, array in text.items()}
    # The values of these tensors would be an error if they were read.
    skipped = ("lm_head.weight", "language_model.lm_head.weight", "vision_tower.vision_model.x")
    skipped += ("multi_modal_projector.mm_input_projection_weight", "model.vision_tower.y")
    skipped += ("model.multi_modal_projector.mm_soft_emb_norm.weight",)
    tensors |= dict.fromkeys(skipped, np.zeros(3, "int8"))
    save_file(tensors, path)
    assert_close(outputs(GemmaBackbone.from_preset(folder))[1:], [logits_of(model)])

    save_file(tensors | {"model.audio_tower.x": np.zeros(3, "float32")}, path)
    with pytest.raises(ValueError, match=r"unexpected: model\.audio_tower\.x"):
        GemmaBackbone.from_preset(folder)
    other = "language_model.model." if prefix != "language_model.model." else "model."
    save_file(tensors | {f"{other}norm.weight": np.zeros(48, "float32")}, path)
    with pytest.raises(ValueError, match=r"several prefixes.*\n.*held 2 times: model\.norm\.wei"):
        GemmaBackbone.from_preset(folder)


def test_multimodal_shards(tmp_path):
    model = make_transformers_model(CONFIGURATIONS["gemma3"], "gemma3")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert_close(outputs(GemmaBackbone.from_preset(tmp_path))[1:], [logits_of(model)])


def test_text_model_without_head(tmp_path):
    """Same layout as EmbeddingGemma, with causal attention."""
    model = make_transformers_model(CONFIGURATIONS["gemma3"])
    model.model.save_pretrained(tmp_path)
    assert_close(outputs(GemmaBackbone.from_preset(tmp_path))[1:], [logits_of(model)])


def test_spare_embedding_rows_are_cut(tmp_path):
    small = {"hidden_dim": 8, "intermediate_dim": 16, "num_layers": 1, "num_query_heads": 1}
    configuration = GEMMA3 | small | {"vocabulary_size": 262208}
    model = make_transformers_model(configuration, "gemma3")
    model.save_pretrained(tmp_path)
    backbone = GemmaBackbone.from_preset(tmp_path)
    assert backbone.config.vocabulary_size == 262144
    assert_close(outputs(backbone)[1:], [logits_of(model)[..., :262144]])


def test_added_tokens_without_a_row_are_dropped(tiny_proto, tmp_path):
    task = make_task(CONFIGURATIONS["gemma3"], tiny_proto)
    save_to_hugging_face(task, tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    content = write_tokenizer_json(tiny_proto)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    image = {"id": 512, "content": "<image_soft_token>", "special": True, **flags}
    content["added_tokens"].append(image)
    content["model"]["vocab"]["<image_soft_token>"] = 512
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Task.from_preset(tmp_path).preprocessor.tokenizer
    assert tokenizer.vocabulary_size() == 512
    assert tokenizer.encode(["to be"]) == task.preprocessor.tokenizer.encode(["to be"])
    # Without a model, all tokens are kept.
    (tmp_path / "config.json").unlink()
    pieces = Pieces(hugging_face.read_tokenizer(tmp_path)["proto"])
    assert pieces.size == 513
    assert pieces.id_or_none("<image_soft_token>") == 512


def test_vocabulary_of_another_model_is_not_cut(tiny_proto, tmp_path):
    backbone = make_backbone(GEMMA3 | {"vocabulary_size": 500})
    save_to_hugging_face(Task(backbone), tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(write_tokenizer_json(tiny_proto)))
    assert Pieces(hugging_face.read_tokenizer(tmp_path)["proto"]).size == 512
