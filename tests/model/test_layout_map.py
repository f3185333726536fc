"""Models on several devices, with KerasHub's layout maps."""

import json

import keras
import pytest

from keras_gemma import GemmaBackbone
from keras_gemma.model.layout_map import fold_axes

PROGRAM = """
import json, sys
import keras_gemma, keras

def run(layout_of):
    distribution = keras.distribution
    keras.utils.set_random_seed(0)
    if layout_of:
        mesh = distribution.DeviceMesh((1, 2), ("batch", "model"), distribution.list_devices())
        parallel = distribution.ModelParallel(layout_map=layout_of(mesh), batch_dim_name="batch")
        distribution.set_distribution(parallel)
    lm = keras_gemma.GemmaCausalLM.from_preset("gemma_tiny_en")
    text = lm.generate("ROMEO:", max_new_tokens=6)
    parts = {
        v.path: [list(v.value.addressable_shards[0].data.shape), list(v.shape)]
        for v in lm.backbone.transformer_layers[1].weights
    }
    logits = keras.ops.convert_to_numpy(lm(lm.preprocessor(["To be"])[0]))
    distribution.set_distribution(None)
    return text, parts, logits

def published(mesh):
    layout_map = keras.distribution.LayoutMap(mesh)
    block = "decoder_block.*"
    layout_map["token_embedding/embeddings"] = (None, "model")
    layout_map[block + "attention.*(query|key|value).*kernel"] = ("model", None, None)
    layout_map[block + "attention_output.*kernel"] = ("model", None, None)
    layout_map[block + "ffw_gating.*kernel"] = (None, "model")
    layout_map[block + "ffw_linear.*kernel"] = ("model", None)
    return layout_map

plain, _, expected = run(None)
for layout_of in (published, keras_gemma.GemmaBackbone.get_layout_map):
    text, parts, logits = run(layout_of)
    assert abs(logits - expected).max() < 1e-3 * abs(expected).max()
    print(json.dumps([plain == text, parts]))
"""


@pytest.mark.once
def test_sharded_model(run_on_devices):
    """Two devices compute the same, and each holds a half of every matrix, by heads or by F."""
    lines = run_on_devices(PROGRAM, 2).splitlines()
    assert len(lines) == 2
    for line in lines:
        is_same, parts = json.loads(line)
        assert is_same
        for path, (held, (out, *rest)) in parts.items():
            name = path.split("/")[-2]
            if name in ("query", "key", "value", "ffw_gating", "ffw_gating_2"):
                assert held == [out // 2, *rest], path
            elif name in ("attention_output", "ffw_linear"):
                assert held == [out, rest[0] // 2], path
            else:
                assert held == [out], path


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "axes", "rank", "expected"),
    [
        ("query", ("n", "d", None), 2, ("n", "d")),
        ("value", (None, "d", "h"), 2, ("h", "d")),
        ("attention_output", ("n", None, "d"), 2, ("d", "n")),
        ("attention_output", (None, "h", None), 3, (None, None, "h")),
        ("ffw_gating_2", ("d", "f"), 3, (None, "f", "d")),
        ("ffw_linear", ("f", "d"), 2, ("d", "f")),
        ("token_embedding", ("v", None), 2, ("v", None)),
    ],
)
def test_folded_axes(name, axes, rank, expected):
    assert fold_axes(name, axes, rank) == expected


@pytest.mark.once
def test_invalid_arguments():
    with pytest.raises(TypeError, match="`device_mesh` must be a"):
        GemmaBackbone.get_layout_map([1, 2])
    mesh = keras.distribution.DeviceMesh((1, 1), ("batch", "model"), ["cpu:0"])
    with pytest.raises(ValueError, match=r"`model_parallel_dim_name` must be .*='heads'"):
        GemmaBackbone.get_layout_map(mesh, "heads")
