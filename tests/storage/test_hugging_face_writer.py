"""Writing of Hugging Face folders, compared with transformers."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_gemma.config import GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone, NamedWeight
from keras_gemma.storage.hugging_face.config_json import model_type_of, to_values
from keras_gemma.storage.hugging_face.writer import write_safetensors
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.vocabulary import train_vocabulary
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2
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
from tests.storage.texts import TEXTS

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "data" / "gemma-2b-it"

VARIANTS = CONFIGURATIONS | {
    # What transformers can say and no published model is.
    "gemma2_no_window": GEMMA2 | {"use_sliding_window_attention": False},
    "gemma2_no_caps": GEMMA2 | {"attention_logit_soft_cap": None, "final_logit_soft_cap": None},
    "vaultgemma_capped": GEMMA1 | {"attention_logit_soft_cap": 2.0, "final_logit_soft_cap": 3.0},
    "vaultgemma_27b_scale": GEMMA1 | {"hidden_dim": 48, "query_head_dim_normalize": False},
}
MODEL_TYPES = dict.fromkeys(VARIANTS, "gemma2") | {
    "gemma1_multi_query": "gemma",
    "gemma1_multi_head": "gemma",
    "gemma1_wide_heads": "gemma",
    "vaultgemma": "vaultgemma",
    "vaultgemma_capped": "vaultgemma",
    "vaultgemma_27b_scale": "vaultgemma",
    "gemma3": "gemma3_text",
    "gemma3_27b_scale": "gemma3_text",
}


def transformers_logits(folder):
    import torch
    import transformers

    model, notes = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(notes.values()), notes  # missing, unexpected or mismatched tensors
    with torch.no_grad():
        return model, model.eval()(torch.tensor(IDS)).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_computes_the_same(name, tmp_path):
    task = Task(make_backbone(VARIANTS[name]))
    save_to_hugging_face(task, tmp_path / "model")
    model, logits = transformers_logits(tmp_path / "model")
    expected = outputs(task.backbone)[1]
    assert model.config.model_type == MODEL_TYPES[name]
    assert_close([logits], [expected])
    backbone = GemmaBackbone.from_preset(tmp_path / "model")
    assert backbone.config.query_scale == task.backbone.config.query_scale
    assert_same_weights(backbone, task.backbone)
    assert_close(outputs(backbone), outputs(task.backbone))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_config_round_trip(name, tmp_path):
    save_to_hugging_face(Task(make_backbone(CONFIGURATIONS[name])), tmp_path / "model")
    backbone = GemmaBackbone.from_preset(tmp_path / "model", load_weights=False)
    assert backbone.config == GemmaConfig(**CONFIGURATIONS[name])


@pytest.mark.parametrize("name", ["gemma1_multi_head", "gemma2_grouped", "vaultgemma"])
def test_context_length_in_config(name, tiny_proto, tmp_path):
    import transformers

    task = make_task(CONFIGURATIONS[name] | {"context_length": 48}, tiny_proto)
    save_to_hugging_face(task, tmp_path / "model")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "model")
    assert config.max_position_embeddings == 48
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").model_max_length == 48
    assert GemmaBackbone.from_preset(tmp_path / "model").config == task.backbone.config
    path = tmp_path / "model" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"max_position_embeddings": -1}))
    with pytest.raises(ValueError, match="context_length=-1"):
        GemmaBackbone.from_preset(tmp_path / "model")
    del values["max_position_embeddings"]
    path.write_text(json.dumps(values))
    assert GemmaBackbone.from_preset(tmp_path / "model").context_length == 8192


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("limit", ["70KB", "5GB"])
def test_dtypes_and_shards(dtype, limit, tmp_path):
    from safetensors.numpy import load_file

    task = Task(make_backbone(CONFIGURATIONS["gemma2_grouped"], dtype))
    save_to_hugging_face(task, tmp_path / "model", max_shard_size=limit)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    if limit == "5GB":
        assert files == ["model.safetensors"]
    else:
        assert files == [
            f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
        ]
        assert len(files) > 1
        index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files
    stored = {"mixed_bfloat16": "float32"}.get(dtype, dtype)
    tensors = {}
    for name in files:
        part = load_file(tmp_path / "model" / name)
        assert sum(array.nbytes for array in part.values()) <= (70000 if limit == "70KB" else 5e9)
        tensors |= part
    if limit == "70KB":
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    assert {array.dtype.name for array in tensors.values()} == {stored}
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["torch_dtype"] == stored
    assert_same_weights(GemmaBackbone.from_preset(tmp_path / "model", dtype=dtype), task.backbone)
    model, _ = transformers_logits(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            np.testing.assert_array_equal(tensor.numpy(), tensors[name].astype("float32"), name)


def test_bytes_equal_safetensors_library(tmp_path):
    from safetensors import safe_open

    weights = make_backbone(CONFIGURATIONS["gemma1_multi_head"]).named_weights()
    write_safetensors(tmp_path / "ours.safetensors", weights)
    with safe_open(tmp_path / "ours.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert list(file.offset_keys()) == list(weights)
        for name, weight in weights.items():
            np.testing.assert_array_equal(file.get_tensor(name), weight.numpy(), name)
    length = int.from_bytes((tmp_path / "ours.safetensors").read_bytes()[:8], "little")
    assert length % 8 == 0


@pytest.fixture
def saved(tiny_proto, tmp_path):
    task = make_task(CONFIGURATIONS["gemma1_multi_query"], tiny_proto)
    save_to_hugging_face(task, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("files", ["all", "tokenizer.json", "tokenizer.model"])
def test_transformers_tokenizes_the_same(files, saved, tiny_proto):
    import transformers

    if files == "tokenizer.json":
        (saved / "tokenizer.model").unlink()
    if files == "tokenizer.model":
        (saved / "tokenizer.json").unlink()
    ours = GemmaTokenizer.from_preset(saved)
    if files == "tokenizer.model":
        assert ours.proto == tiny_proto
        return
    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    assert type(theirs).__name__ == "GemmaTokenizer"
    for text in TEXTS:
        ids = theirs(text)["input_ids"]
        assert ids == [2, *ours.encode([text])[0]], text
        assert theirs.decode(ids[1:]) == ours.detokenize(ids[1:]) == text
    named = "<bos>to be<eos><pad><unk>"
    assert theirs(named)["input_ids"] == [2, *ours.encode([named])[0]]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (2, 1)
    assert (theirs.pad_token_id, theirs.unk_token_id) == (0, 3)
    assert theirs.decode([2, 106, 300, 107, 1], skip_special_tokens=True) == ours.detokenize([300])
    assert theirs.model_max_length == 8192


CHATS = [
    [{"role": "user", "content": "To be?"}],
    [
        {"role": "user", "content": "  To be?\n"},
        {"role": "assistant", "content": "\nNot to be. "},
        {"role": "user", "content": "To die,\n\nto sleep"},
    ],
    [{"role": "user", "content": ""}, {"role": "assistant", "content": "a {{ b }} 'c' \\n"}],
]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_chat_template_renders_as_published(chat, prompt, saved):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    text = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    roles = {"user": "user", "assistant": "model"}
    turns = (
        f"<start_of_turn>{roles[turn['role']]}\n{turn['content'].strip()}<end_of_turn>\n"
        for turn in chat
    )
    assert text == "<bos>" + "".join(turns) + ("<start_of_turn>model\n" if prompt else "")
    ids = theirs.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]
    assert ids == [2, *GemmaTokenizer.from_preset(saved).encode([text.removeprefix("<bos>")])[0]]
    if not PUBLISHED.is_dir():
        pytest.skip(f"the published template is not there: {PUBLISHED}")
    theirs.chat_template = json.loads((PUBLISHED / "tokenizer_config.json").read_text())[
        "chat_template"
    ]
    published = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
    assert text == published


def test_system_messages_and_invalid_chats(saved):
    import jinja2
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(saved)
    system = [{"role": "system", "content": " Be brief.\n"}, *CHATS[0]]
    text = theirs.apply_chat_template(system, tokenize=False)
    assert text == "<bos><start_of_turn>user\n Be brief.\n\n\nTo be?<end_of_turn>\n"
    for wrong in (CHATS[1][1:], CHATS[0] * 2):
        with pytest.raises(jinja2.exceptions.TemplateError, match="must alternate"):
            theirs.apply_chat_template(wrong, tokenize=False)


def test_generation_config(saved):
    import transformers

    settings = transformers.GenerationConfig.from_pretrained(saved)
    assert settings.eos_token_id == [1, 107]
    assert (settings.bos_token_id, settings.pad_token_id) == (2, 0)
    model, _ = transformers_logits(saved)
    assert model.generation_config.eos_token_id == [1, 107]
    assert model.config.pad_token_id == 0


def test_without_turns_and_start_token(tiny_proto, tmp_path):
    import transformers
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tiny_proto)
    for id, name in ((106, "<one>"), (107, "<other>")):
        model.pieces[id].piece = name
    task = make_task(CONFIGURATIONS["gemma1_multi_head"], model.SerializeToString())
    task.preprocessor.add_start_token = False
    save_to_hugging_face(task, tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert theirs.chat_template is None
    assert theirs("<one>to")["input_ids"] == task.preprocessor.tokenizer.encode(["<one>to"])[0]
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "model")
    assert settings.eos_token_id == 1


def test_save_without_preprocessor_removes_tokenizer(saved):
    (saved / "README.md").write_text("mine")
    (saved / "chat_template.jinja").write_text("of another model")
    (saved / "model-00001-of-00002.safetensors").touch()
    backbone = make_backbone(CONFIGURATIONS["gemma1_multi_head"])
    save_to_hugging_face(Task(backbone), saved, overwrite=True)
    names = sorted(path.name for path in saved.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_interrupted_save_keeps_earlier_folder(saved, tiny_proto, monkeypatch):
    before = content(saved)
    read, calls = NamedWeight.numpy, []

    def fail(weight):
        calls.append(weight)
        if len(calls) == 9:
            raise OSError("no space left on device")
        return read(weight)

    monkeypatch.setattr(NamedWeight, "numpy", fail)
    task = make_task(CONFIGURATIONS["gemma2_grouped"], tiny_proto)
    with pytest.raises(OSError, match="no space left"):
        save_to_hugging_face(task, saved, overwrite=True)
    assert content(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_post_ffw_norm": False}, "use_post_attention_norm=True, use_post_ffw_norm=False"),
        ({"hidden_dim": 34}, "hidden_dim=34, num_query_heads=4"),
    ],
)
def test_models_without_an_architecture(changes, message, tmp_path):
    task = Task(GemmaBackbone(**GEMMA2 | changes))
    with pytest.raises(ValueError, match=message):
        save_to_hugging_face(task, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tiny_proto, tmp_path):
    task = make_task(GEMMA1, tiny_proto)
    with pytest.raises(ValueError, match=r"smaller than the largest tensor \(token_embedding"):
        save_to_hugging_face(task, tmp_path / "model", max_shard_size=1000)
    with pytest.raises(ValueError, match="max_shard_size='big'"):
        save_to_hugging_face(task, tmp_path / "model", max_shard_size="big")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_to_hugging_face(task, tmp_path / "file")
    task = make_task(GEMMA1 | {"vocabulary_size": 500}, tiny_proto)
    with pytest.raises(ValueError, match="has 512 ids, but the backbone's vocabulary_size is 500"):
        save_to_hugging_face(task, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_more_rows_than_tokens(tmp_path):
    proto = train_vocabulary(["to be or not to be"], 390)
    task = make_task(GEMMA1, proto)
    save_to_hugging_face(task, tmp_path / "model")
    task = Task.from_preset(tmp_path / "model")
    assert task.preprocessor.tokenizer.vocabulary_size() == 390
    assert task.backbone.config.vocabulary_size == 512


def test_published_shapes():
    sizes = dict(vocabulary_size=256000, num_layers=46, num_query_heads=32, num_key_value_heads=16)
    sizes |= dict(hidden_dim=4608, intermediate_dim=73728, head_dim=128)
    config = GemmaConfig(**GEMMA2 | sizes | {"query_head_dim_normalize": False})
    values = to_values(config)
    assert values["query_pre_attn_scalar"] == 144
    assert values["intermediate_size"] == 36864
    assert values["layer_types"][:2] == ["sliding_attention", "full_attention"]
    assert values["tie_word_embeddings"] is True
    vault = GemmaConfig(**GEMMA1 | {"use_sliding_window_attention": True})
    assert model_type_of(vault) == "vaultgemma"


def test_mixed_policy_is_not_saved(tmp_path):
    keras.config.set_dtype_policy("bfloat16")
    save_to_hugging_face(Task(make_backbone(GEMMA1, "float32")), tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["torch_dtype"] == "float32"
