"""Arguments of `enable_lora` and the other LoRA methods: targets and invalid input."""

import inspect

import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaConfig, QuantizationConfig
from keras_gemma.lora.config import target_names
from tests.configurations import GEMMA1, GEMMA2
from tests.parity.pairs import make_ours

CONFIG = GemmaConfig(**GEMMA2)
FOUR = QuantizationConfig("int4", 16, embedding="int4")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("query", ["layers.0.query", "layers.1.query", "layers.2.query", "layers.3.query"]),
        (["down_proj", "layers.3.*_"], None),
        (("layers.3.[gu]*",), ["layers.3.gate", "layers.3.up"]),
        (["v_proj", "layers.0.query"], [f"layers.{i}.value" for i in range(4)]),
        (["u?"], [f"layers.{i}.up" for i in range(4)]),
    ],
)
def test_targets(targets, expected):
    if expected is None:
        with pytest.raises(ValueError, match=r"matches no matrix.*'layers.3.\*_'"):
            target_names(CONFIG, targets)
        return
    names = target_names(CONFIG, targets)
    assert [name for name in names if name != "layers.0.query"] == [
        name for name in expected if name != "layers.0.query"
    ]
    assert len(names) == len(set(names)) and names == target_names(CONFIG, names[::-1])


def test_all_linear():
    assert len(target_names(CONFIG, "all-linear")) == 28 == len(target_names(CONFIG, ["*"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"`rank` must be a positive integer.*rank=0"),
        ({"rank": 2.0}, r"`rank` .*rank=2.0"),
        ({"rank": True}, r"`rank` .*rank=True"),
        ({"alpha": 0}, r"`alpha` must be a finite number greater than 0.*alpha=0"),
        ({"alpha": float("nan")}, r"`alpha` .*alpha=nan"),
        ({"alpha": "16"}, r"`alpha` .*alpha='16'"),
        ({"dropout": 1.0}, r"`dropout` must be in .*dropout=1.0"),
        ({"dropout": -0.1}, r"`dropout` .*dropout=-0.1"),
        ({"targets": ()}, r"`targets` must be names of matrices"),
        ({"targets": 16}, r"`alpha` sets the scale\..*targets=16"),
        ({"targets": ["querry"]}, r"Did you mean 'query'.*Received: 'querry'"),
        ({"targets": "embed_tokens"}, r"output head shares its matrix.*'embed_tokens'"),
        ({"targets": [3]}, r"matches no matrix.*Received: 3"),
        ({"targets": ["pre_ffw_norm"]}, r"matches no matrix"),
        ({"dtype": "int8"}, r"`dtype` must be one of 'float32'.*dtype='int8'"),
        ({"name": "a/b"}, r"`name` must be one word.*name='a/b'"),
        ({"name": "taken"}, r"already has an adapter 'taken' \(rank 2 on 4 matrices\)"),
    ],
)
def test_invalid_arguments(settings, message, taken):
    settings = {"rank": 4, **settings}
    with pytest.raises(ValueError, match=message):
        taken.enable_lora(**settings)
    assert taken.lora_adapters == ["taken"]


@pytest.fixture(scope="module")
def taken():
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2, name="taken")
    return backbone


def test_one_signature():
    ours = inspect.signature(GemmaCausalLM.enable_lora)
    assert ours == inspect.signature(GemmaBackbone.enable_lora)


def test_arguments_of_keras_hub():
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(4, target_layer_names=["query"])
    config = backbone.adapters.configs["default"]
    assert set(config.sizes) == {f"layers.{i}.query" for i in range(len(config.sizes))}
    assert config.scale("layers.0.query") == 1.0  # KerasHub's alpha is the rank.


def test_unknown_adapters(taken):
    for method in (taken.set_adapter, taken.delete_adapter):
        with pytest.raises(ValueError, match=r"The model has 'taken'.*Received: 'other'"):
            method("other")
    with pytest.raises(ValueError, match="No adapter is merged"):
        taken.unmerge_lora()
    with pytest.raises(ValueError, match=r"No adapter is active. Add one with `enable_lora`"):
        GemmaBackbone(**GEMMA1).merge_lora()
