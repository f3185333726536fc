"""LoRA files of KerasHub, read and written."""

import numpy as np
import pytest
from keras import ops

from keras_gemma import from_keras_hub, to_keras_hub
from tests.configurations import GEMMA1, GEMMA2, GEMMA3
from tests.lora_values import fill
from tests.storage.conftest import assert_close, make_backbone, make_keras_hub_backbone, outputs

CONFIGURATIONS = [GEMMA1 | {"num_key_value_heads": 1}, GEMMA2, GEMMA3]
TARGETS = ["query", "value", "attention_output", "ffw_gating_2", "ffw_linear"]


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_reads_file_of_keras_hub(configuration, tmp_path):
    path = tmp_path / "adapter.lora.h5"
    theirs = make_keras_hub_backbone(configuration)
    ours = from_keras_hub(theirs)
    theirs.enable_lora(3, TARGETS)
    random = np.random.default_rng(0)
    for variable in theirs.trainable_variables:
        variable.assign(random.normal(0, 0.3, tuple(variable.shape)))
    theirs.save_lora_weights(str(path))
    before = outputs(ours)
    ours.enable_lora(3)  # as a notebook does first; its place is taken
    ours.load_lora_weights(path)
    assert ours.lora_adapters == ["default"]
    assert_close(outputs(ours), outputs(theirs))
    assert np.abs(before[0] - outputs(ours)[0]).max() > 0.01


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_keras_hub_reads_file(configuration, tmp_path):
    path = tmp_path / "adapter.lora.h5"
    ours = make_backbone(configuration)
    ours.enable_lora(2, alpha=5)
    fill(ours, size=0.3)
    ours.save_lora_weights(path)
    ours.set_adapter(None)
    theirs, again = to_keras_hub(ours), make_backbone(configuration)
    ours.set_adapter("default")
    theirs.load_lora_weights(str(path))
    assert_close(outputs(ours), outputs(theirs))
    again.load_lora_weights(path)
    assert {rank for rank, _ in again.adapters.configs["default"].sizes.values()} == {2}
    assert_close(outputs(again), outputs(ours))


def test_bad_files(tmp_path):
    backbone = make_backbone(GEMMA1)
    with pytest.raises(ValueError, match=r"No adapter is active"):
        backbone.save_lora_weights(tmp_path / "a.lora.h5")
    backbone.enable_lora(2)
    for verb in (backbone.save_lora_weights, backbone.load_lora_weights):
        with pytest.raises(ValueError, match=r"must end in '\.lora\.h5'.*a\.h5'"):
            verb(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        backbone.load_lora_weights(tmp_path / "a.lora.h5")
    (tmp_path / "a.lora.h5").write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as a file of KerasHub's"):
        backbone.load_lora_weights(tmp_path / "a.lora.h5")
    (tmp_path / "a.lora.h5").unlink()
    backbone.save_lora_weights(tmp_path / "a.lora.h5")
    other = make_backbone(GEMMA2)
    with pytest.raises(ValueError, match=r"does not fit this model \(\d problems\)"):
        other.load_lora_weights(tmp_path / "a.lora.h5")
    assert other.lora_adapters == [] and ops.shape(other.layer_norm.scale) == (32,)
