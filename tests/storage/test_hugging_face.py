"""Reading of Hugging Face folders, as written by transformers and as published."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import tensor_streaming as checkpoint
from keras_gemma.storage.hugging_face import reader as hugging_face
from keras_gemma.storage.hugging_face.tokenizer_json import write_tokenizer_json
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import CONFIGURATIONS
from tests.storage.conftest import IDS, Task, assert_close, outputs
from tests.storage.transformers_models import make_transformers_model

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "gemma-2b-it"


def transformers_outputs(model):
    import torch

    with torch.no_grad():
        ids = torch.tensor(IDS)
        hidden = model.model(ids).last_hidden_state
        return [hidden.numpy(), model(ids).logits.numpy()]


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_reads_folder_of_transformers(name, tmp_path):
    model = make_transformers_model(CONFIGURATIONS[name])
    model.save_pretrained(tmp_path)
    backbone = GemmaBackbone.from_preset(tmp_path)
    assert backbone.config == GemmaConfig(**CONFIGURATIONS[name])
    assert_close(outputs(backbone), transformers_outputs(model))


def test_global_attention_in_all_layers(tmp_path):
    configuration = CONFIGURATIONS["gemma2_grouped"] | {"use_sliding_window_attention": False}
    model = make_transformers_model(configuration, "gemma2")
    model.save_pretrained(tmp_path)
    backbone = GemmaBackbone.from_preset(tmp_path)
    assert not backbone.config.use_sliding_window_attention
    assert_close(outputs(backbone), transformers_outputs(model))


def test_vaultgemma_as_published(tmp_path):
    """Without caps and windows it computes the same as Gemma 1, with other tensor names."""
    configuration = CONFIGURATIONS["gemma1_multi_head"]
    model = make_transformers_model(configuration, "vaultgemma")
    model.save_pretrained(tmp_path)
    config = GemmaConfig.from_dict(hugging_face.read_backbone(tmp_path))
    assert config == GemmaConfig(**configuration)
    places = hugging_face.tensor_specs(config, tmp_path)
    with hugging_face.open_weights(tmp_path) as stored:
        checkpoint.check(stored, places, tmp_path)
        backbone = GemmaBackbone(**configuration)
        checkpoint.stream(stored, places, backbone.named_weights())
    assert_close(outputs(backbone), transformers_outputs(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("sharded", [False, True])
def test_any_float_dtype_in_one_file_or_shards(dtype, sharded, tmp_path):
    import torch

    model = make_transformers_model(CONFIGURATIONS["gemma2_grouped"])
    expected = {k: v.numpy() for k, v in model.state_dict().items()}
    model.to(getattr(torch, dtype)).save_pretrained(
        tmp_path, max_shard_size="70KB" if sharded else "1GB"
    )
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    backbone = GemmaBackbone.from_preset(tmp_path)
    assert backbone.dtype_policy.name == "float32"  # Keras's own, not the file's
    places = hugging_face.tensor_specs(backbone.config)
    for name, weight in backbone.named_weights().items():
        tolerance = 1e-7 if dtype == "float16" else 0  # subnormal numbers
        np.testing.assert_allclose(
            weight.numpy(), expected[places[name].name], rtol=0, atol=tolerance, err_msg=name
        )


def test_dtype_and_load_weights(tmp_path):
    make_transformers_model(CONFIGURATIONS["gemma1_multi_query"]).save_pretrained(tmp_path)
    assert GemmaBackbone.from_preset(tmp_path, dtype="bfloat16").dtype_policy.name == "bfloat16"
    keras.config.set_dtype_policy("bfloat16")
    assert GemmaBackbone.from_preset(tmp_path).dtype_policy.name == "bfloat16"
    (tmp_path / "model.safetensors").unlink()
    fresh = GemmaBackbone.from_preset(tmp_path, load_weights=False)
    assert np.ptp(ops.convert_to_numpy(fresh.token_embedding.embeddings).astype("float32")) > 0
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors and model\.safetensors\.ind"):
        GemmaBackbone.from_preset(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pickles, which can run code and are never read"):
        GemmaBackbone.from_preset(tmp_path)


def test_published_configuration():
    if not DATA.is_dir():
        pytest.skip(f"the published gemma-2b-it description is not at {DATA}")
    config = GemmaConfig.from_dict(hugging_face.read_backbone(DATA))
    assert config.parameter_count == 2_506_172_416
    index = json.loads((DATA / "model.safetensors.index.json").read_text())
    names = {place.name for place in hugging_face.tensor_specs(config).values()}
    assert names == set(index["weight_map"])
    with pytest.raises(FileNotFoundError, match="are missing: model-00001-of-00002"):
        GemmaBackbone.from_preset(DATA)


def test_task_with_vocabulary(tiny_proto, tmp_path):
    make_transformers_model(CONFIGURATIONS["gemma2_grouped"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"looked for tokenizer\.model and tokenizer\.json.*preprocessor=None"
    ):
        Task.from_preset(tmp_path)
    assert Task.from_preset(tmp_path, preprocessor=None).preprocessor is None
    content = write_tokenizer_json(tiny_proto)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours, expected = GemmaTokenizer.from_preset(tmp_path), GemmaTokenizer(tiny_proto)
    assert ours.get_vocabulary() == expected.get_vocabulary()
    assert ours.encode(["to be\n\n  or"]) == expected.encode(["to be\n\n  or"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content)[:-99])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        GemmaTokenizer.from_preset(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny_proto)  # which is the one to be read, then
    assert GemmaTokenizer.from_preset(tmp_path).proto == tiny_proto
    assert GemmaCausalLMPreprocessor.from_preset(tmp_path).sequence_length == 1024
    task = Task.from_preset(tmp_path, sequence_length=7, load_weights=False)
    assert task.preprocessor.sequence_length == 7


GEMMA = {
    "model_type": "gemma",
    "vocab_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 16,
    "intermediate_size": 48,
}
GEMMA2 = GEMMA | {"model_type": "gemma2", "query_pre_attn_scalar": 16}
ALTERNATING = ["sliding_attention", "full_attention"] * 2


def read(tmp_path, **values):
    content = {key: value for key, value in values.items() if value != "absent"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    return GemmaConfig.from_dict(hugging_face.read_backbone(tmp_path))


def test_settings_become_arguments(tmp_path):
    config = read(tmp_path, **GEMMA, rms_norm_eps=0.5)
    assert config.feed_forward_dim == 48
    assert config.layer_norm_epsilon == 0.5
    assert not config.use_sliding_window_attention
    assert config.final_logit_soft_cap is None

    config = read(tmp_path, **GEMMA2, sliding_window=8, attn_logit_softcapping=None)
    assert config.use_post_ffw_norm and config.use_post_attention_norm
    assert config.use_sliding_window_attention and config.sliding_window_size == 8
    assert config.attention_logit_soft_cap is None
    assert config.final_logit_soft_cap == 30.0
    assert not read(tmp_path, **GEMMA2, sliding_window=None).use_sliding_window_attention
    local = read(tmp_path, **GEMMA2, layer_types=["sliding_attention"] * 4)
    assert all(map(local.is_local, range(4)))
    everything = ["full_attention"] * 4
    assert not read(tmp_path, **GEMMA2, layer_types=everything).use_sliding_window_attention

    vault = GEMMA2 | {"model_type": "vaultgemma"}
    config = read(tmp_path, **vault, sliding_window=512, layer_types=ALTERNATING)
    assert not config.use_post_ffw_norm and not config.use_post_attention_norm
    assert config.use_sliding_window_attention and config.sliding_window_size == 512
    assert (config.attention_logit_soft_cap, config.final_logit_soft_cap) == (50.0, 30.0)
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = read(tmp_path, **vault, **caps, layer_types=everything)
    assert config == read(tmp_path, **GEMMA)


def test_query_scalars(tmp_path):
    assert read(tmp_path, **GEMMA2).query_scale == 16**-0.5
    assert read(tmp_path, **GEMMA2 | {"query_pre_attn_scalar": 8}).query_scale == 8**-0.5
    nine = GEMMA2 | {"hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256}
    assert read(tmp_path, **nine | {"query_pre_attn_scalar": 224}).query_scale == 1 / 16
    with pytest.raises(ValueError, match="query_pre_attn_scalar 99"):
        read(tmp_path, **GEMMA2 | {"query_pre_attn_scalar": 99})


@pytest.mark.parametrize(
    "harmless",
    [
        {"hidden_act": "gelu"},
        {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_activation": None},
        {"rope_scaling": None, "rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"layer_types": ALTERNATING},
        {"tie_word_embeddings": True, "attention_bias": False},
    ],
)
def test_settings_with_default_values(harmless, tmp_path):
    assert read(tmp_path, **GEMMA2, **harmless) == read(tmp_path, **GEMMA2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type 'llama'.*'vaultgemma', 'gemma3_text', 'gemma3'",
        ),
        ({"model_type": None}, "model_type None"),
        ({"head_dim": "absent", "vocab_size": None}, "lacks vocab_size, head_dim"),
        (
            {"head_dim": "16", "hidden_size": 3.5},
            "not positive integers: hidden_size=3.5, head_dim='16'",
        ),
        ({"head_dim": 15, "query_pre_attn_scalar": 15}, "head_dim=15"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"hidden_activation": "gelu"}, "hidden_activation='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"rope_theta": 1e6}, "rope_theta=1000000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 8}}, "rope_scaling=.*linear"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters="),
        ({"layer_types": ALTERNATING[::-1]}, "layer_types=.*sliding_attention and a last"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types="),
        ({"layer_types": "full_attention"}, "layer_types='full_attention', not list"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"query_pre_attn_scalar": "16"}, "query_pre_attn_scalar '16'"),
    ],
)
def test_unsupported_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, **GEMMA2 | settings)


def test_all_unsupported_settings_are_listed(tmp_path):
    with pytest.raises(ValueError, match=r"attention_bias=True\n.*rope_theta=5"):
        read(tmp_path, **GEMMA | {"attention_bias": True, "rope_theta": 5})


@pytest.fixture
def sharded(tmp_path):
    model = make_transformers_model(CONFIGURATIONS["gemma1_multi_head"])
    model.save_pretrained(tmp_path, max_shard_size="70KB")
    return tmp_path


def edit_index(folder, **entries):
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"].update(entries)
    path.write_text(json.dumps(content))
    return content["weight_map"]


def test_missing_shards(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[0].unlink()
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"{shards[0].name}, {shards[1].name}"):
        GemmaBackbone.from_preset(sharded)


def test_index_names_absent_tensors(sharded):
    shard = next(sharded.glob("*.safetensors")).name
    edit_index(sharded, **{"model.a": shard, "model.b": shard})
    message = rf"\(2 problems\).*\n.*not held: model\.a in {shard}\n.*not held: model\.b in {shard}"
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "..", "a\\b", ""])
def test_index_names_files_elsewhere(name, sharded):
    edit_index(sharded, **{"model.norm.weight": name})
    with pytest.raises(ValueError, match="is not directly in its folder"):
        GemmaBackbone.from_preset(sharded)


def test_truncated_file(sharded):
    shard = next(sharded.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{shard.name} cannot be read as safetensors"):
        GemmaBackbone.from_preset(sharded)


def test_wrong_tensors(tmp_path):
    from safetensors.numpy import load_file, save_file

    make_transformers_model(CONFIGURATIONS["gemma1_multi_head"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    GemmaBackbone.from_preset(tmp_path)

    tensors["model.norm.bias"] = np.zeros(32, "float32")
    tensors["model.norm.weight"] = np.zeros(32, "int8")
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((32, 48), "float32")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        GemmaBackbone.from_preset(tmp_path)
    for text in (
        "unexpected: model.norm.bias (32,)",
        "dtype: model.norm.weight is I8",
        "shape: model.layers.0.mlp.up_proj.weight is (32, 48), expected (48, 32)",
        "missing: model.layers.1.self_attn.k_proj.weight (32, 32)",
    ):
        assert text in str(error.value)
