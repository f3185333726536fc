"""KerasHub's classes of Gemma 3: arguments, presets in both directions, and what is refused."""

import keras
import numpy as np
import pytest

from keras_gemma import from_keras_hub, models, to_keras_hub
from keras_gemma.config import GemmaConfig
from keras_gemma.storage.keras_preset import layout
from tests.configurations import CONFIGURATIONS, GEMMA3
from tests.storage.conftest import assert_same_weights, make_backbone, make_task
from tests.storage.keras_hub_weights import assert_same_as_keras_hub, leaves_a_file_open

SIZES = GemmaConfig(**GEMMA3).to_keras_hub()


def test_arguments_are_those_of_keras_hub():
    import keras_hub

    theirs = keras_hub.models.Gemma3Backbone(**SIZES)
    ours = models.Gemma3Backbone(**SIZES)
    assert ours.config == GemmaConfig(**GEMMA3, context_length=32768)
    assert ours.intermediate_dim == theirs.intermediate_dim == GEMMA3["intermediate_dim"] // 2
    assert ours.count_params() == theirs.count_params()
    config = theirs.get_config()
    names = set(ours.get_config()) - {"context_length", "quantization"}
    names -= {"sliding_window_pattern", "local_rope_wavelength", "global_rope_wavelength"}
    assert {name: ours.get_config()[name] for name in names - {"dtype", "name"}} == {
        name: config[name] for name in names - {"dtype", "name"}
    }


def test_round_trip_of_the_config():
    ours = models.Gemma3Backbone(**SIZES, name="mine", dtype="bfloat16")
    again = models.Gemma3Backbone.from_config(ours.get_config())
    assert again.config == ours.config
    assert (again.name, again.dtype_policy.name) == ("mine", "bfloat16")


@leaves_a_file_open
@pytest.mark.filterwarnings(r"ignore:`build\(\)` was called on layer 'task':UserWarning")
@pytest.mark.parametrize("name", ["gemma3", "gemma3_27b_scale"])
def test_task_round_trip_with_keras_hub(name, tiny_proto, tmp_path):
    import keras_hub

    task = make_task(CONFIGURATIONS[name], tiny_proto)
    task.save_to_preset(tmp_path / "ours")
    theirs = keras_hub.models.CausalLM.from_preset(str(tmp_path / "ours"))
    assert type(theirs) is keras_hub.models.Gemma3CausalLM
    assert type(theirs.preprocessor.tokenizer) is keras_hub.models.Gemma3Tokenizer
    assert_same_as_keras_hub(task.backbone, theirs.backbone)
    theirs.save_to_preset(str(tmp_path / "theirs"))
    for cls in (models.Gemma3CausalLM, models.CausalLM):
        back = cls.from_preset(tmp_path / "theirs")
        assert type(back) is cls
        assert type(back.backbone) is cls.backbone_cls
        assert isinstance(back.preprocessor, cls.preprocessor_cls)
        assert_same_weights(back.backbone, task.backbone)
        np.testing.assert_array_equal(
            back.preprocessor.tokenizer("ROMEO: x"), task.preprocessor.tokenizer("ROMEO: x")
        )


def test_keras_file(tiny_proto, tmp_path):
    make_task(GEMMA3, tiny_proto).save_to_preset(tmp_path / "preset")
    lm = models.Gemma3CausalLM.from_preset(tmp_path / "preset")
    lm.save(tmp_path / "lm.keras")
    again = keras.saving.load_model(tmp_path / "lm.keras")
    assert type(again) is models.Gemma3CausalLM
    assert_same_weights(again.backbone, lm.backbone)
    assert again.generate("ROMEO:", max_length=12) == lm.generate("ROMEO:", max_length=12)


def test_generates_the_ids_of_keras_hub(tiny_proto):
    lm = models.Gemma3CausalLM(
        make_backbone(GEMMA3),
        models.Gemma3CausalLMPreprocessor(models.Gemma3Tokenizer(tiny_proto), sequence_length=40),
    )
    theirs = to_keras_hub(lm)
    back = from_keras_hub(theirs)
    assert type(back) is models.Gemma3CausalLM
    assert type(back.preprocessor.tokenizer) is models.Gemma3Tokenizer
    ids, mask = np.zeros((2, 1, 24), "int32")
    ids[0, :9], mask[0, :9] = [2, 10, 20, 30, 40, 50, 60, 70, 80], 1
    prompt = {"token_ids": ids, "padding_mask": mask}
    theirs.preprocessor = lm.preprocessor = None
    expected = theirs.make_generate_function()(prompt, None)["token_ids"]
    ours = lm.generate(prompt, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(ours, keras.ops.convert_to_numpy(expected))


@pytest.mark.parametrize("shard_bytes", [10**9, 120_000])
def test_text_part_of_a_model_with_images(shard_bytes, tmp_path):
    import keras_hub

    vision = keras_hub.models.Gemma3VisionEncoder(
        image_size=16, patch_size=4, num_heads=2, hidden_dim=8, num_layers=1,
        intermediate_dim=16, output_dim=SIZES["hidden_dim"], pool_size=2,
    )  # fmt: skip
    theirs = keras_hub.models.Gemma3Backbone(**SIZES | {"image_size": 16, "vision_encoder": vision})
    theirs.save_to_preset(str(tmp_path / "preset"), max_shard_size=shard_bytes / 2**30)
    assert (tmp_path / "preset/model_00001.weights.h5").is_file() == (shard_bytes < 10**9)
    ours = models.Gemma3Backbone.from_preset(tmp_path / "preset")
    assert_same_as_keras_hub(ours, theirs)
    with pytest.raises(ValueError, match=r"reads images.*from_preset"):
        from_keras_hub(theirs)


def test_other_patterns_are_refused_by_keras_hub(tmp_path):
    import keras_hub

    backbone = make_backbone(GEMMA3 | {"sliding_window_pattern": 3})
    with pytest.raises(ValueError, match=r"cannot express.*sliding_window_pattern=3"):
        to_keras_hub(backbone)
    backbone.save_to_preset(tmp_path / "preset")
    assert layout.CUSTOM_BACKBONE in (tmp_path / "preset/config.json").read_text()
    assert models.GemmaBackbone.from_preset(tmp_path / "preset").config == backbone.config
    with pytest.raises((ValueError, TypeError), match=layout.CUSTOM_BACKBONE):
        keras_hub.models.Backbone.from_preset(str(tmp_path / "preset"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_encoder": "an encoder"}, "`vision_encoder` must be None"),
        ({"is_embedding_model": True}, "Embedding models.*is_embedding_model=True"),
        ({"use_bidirectional_attention": True}, "Embedding models"),
        ({"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ({"global_rope_wavelength": -1.0}, "global_rope_wavelength"),
        ({"global_rope_scaling_factor": 0}, "global_rope_scaling_factor"),
    ],
)
def test_unsupported_arguments(changes, message):
    with pytest.raises(ValueError, match=message):
        models.Gemma3Backbone(**SIZES | changes)


def test_images_are_refused(tiny_proto):
    tokenizer = models.Gemma3Tokenizer(tiny_proto)
    with pytest.raises(ValueError, match="`image_converter` must be None"):
        models.Gemma3CausalLMPreprocessor(tokenizer, image_converter="a converter")
    lm = models.Gemma3CausalLM(make_backbone(GEMMA3), models.Gemma3CausalLMPreprocessor(tokenizer))
    with pytest.raises((ValueError, TypeError), match="images"):
        lm.generate({"prompts": "a <start_of_image>", "images": np.zeros((16, 16, 3))})
