"""What `enable_lora` and its kin are told: targets, and bad input."""

import pytest

from keras_gemma import GemmaBackbone, GemmaConfig, QuantizationConfig
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
        with pytest.raises(ValueError, match=r"what no block has.*'layers.3.\*_'"):
            target_names(CONFIG, targets)
        return
    found = target_names(CONFIG, targets)
    assert [name for name in found if name != "layers.0.query"] == [
        name for name in expected if name != "layers.0.query"
    ]
    assert len(found) == len(set(found)) and found == target_names(CONFIG, found[::-1])


def test_all_linear():
    assert len(target_names(CONFIG, "all-linear")) == 28 == len(target_names(CONFIG, ["*"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, r"`rank` must be a whole number from 1 on.*rank=0"),
        ({"rank": 2.0}, r"`rank` .*rank=2.0"),
        ({"rank": True}, r"`rank` .*rank=True"),
        ({"alpha": 0}, r"`alpha` must be a number above 0.*alpha=0"),
        ({"alpha": float("nan")}, r"`alpha` .*alpha=nan"),
        ({"alpha": "16"}, r"`alpha` .*alpha='16'"),
        ({"dropout": 1.0}, r"`dropout` must be a share from 0 on and below 1.*dropout=1.0"),
        ({"dropout": -0.1}, r"`dropout` .*dropout=-0.1"),
        ({"targets": ()}, r"`targets` must name a matrix"),
        ({"targets": ["querry"]}, r"Did you mean 'query'.*Received: 'querry'"),
        ({"targets": "embed_tokens"}, r"also the head's matrix.*'embed_tokens'"),
        ({"targets": [3]}, r"what no block has.*Received: 3"),
        ({"targets": ["pre_ffw_norm"]}, r"what no block has"),
        ({"dtype": "int8"}, r"`dtype` must be one of float32.*dtype='int8'"),
        ({"name": "a/b"}, r"`name` must be one word.*name='a/b'"),
        ({"name": "taken"}, r"an adapter 'taken' already \(rank 2 on 4 matrices\)"),
    ],
)
def test_bad_input(settings, message, taken):
    settings = {"rank": 4, **settings}
    settings["target_layer_names"] = settings.pop("targets", None)
    with pytest.raises(ValueError, match=message):
        taken.enable_lora(**settings)
    assert taken.lora_adapters == ["taken"]


@pytest.fixture(scope="module")
def taken():
    backbone = make_ours(GEMMA1)
    backbone.enable_lora(2, name="taken")
    return backbone


def test_unknown_adapters(taken):
    for verb in (taken.set_adapter, taken.delete_adapter):
        with pytest.raises(ValueError, match=r"no adapter 'other'; it has 'taken'"):
            verb("other")
    with pytest.raises(ValueError, match="No adapter is merged"):
        taken.unmerge_lora()
    with pytest.raises(ValueError, match=r"No adapter is on: `enable_lora` makes one"):
        GemmaBackbone(**GEMMA1).merge_lora()
