"""PEFT's adapters, read and written, compared with transformers."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from keras_gemma import GemmaCausalLM
from keras_gemma.storage.adapters.peft import base_model
from tests.configurations import GEMMA1, GEMMA2, VOCABULARY_SIZE
from tests.lora_values import fill
from tests.parity.pairs import FULL, IDS, TOLERANCE, make_ours, make_theirs, run_ours, run_theirs
from tests.storage.conftest import default_policy as default_policy

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"  # raised inside PEFT
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def logits(lm):
    return run_ours(lm.backbone, FULL)["logits"]


def assert_same(found, expected):
    assert np.abs(found - expected).max() < TOLERANCE * np.abs(expected).max()


def make_lm(configuration=GEMMA2):
    return GemmaCausalLM(make_ours(configuration))


def make_adapter(folder, configuration=GEMMA2, **settings):
    """Saves a random adapter of PEFT. Returns the logits with it."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(make_theirs(configuration), peft.LoraConfig(**settings)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(IDS)).logits.float().numpy()


ADAPTERS = {
    "defaults": {},
    "all-linear": {"target_modules": "all-linear", "lora_alpha": 16, "lora_dropout": 0.1},
    "rslora": {"use_rslora": True, "lora_alpha": 3, "target_modules": ["down_proj", "k_proj"]},
    "patterns": {
        "target_modules": ["q_proj", "o_proj", "up_proj"],
        "rank_pattern": {"o_proj": 2, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"up_proj": 32},
    },
    "some layers": {"layers_to_transform": [1, 3], "target_modules": ["gate_proj"]},
    "an expression": {"target_modules": r".*layers\.[02]\.mlp\.(up|down)_proj"},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_reads_adapter_of_peft(name, tmp_path):
    expected = make_adapter(tmp_path, **ADAPTERS[name])
    lm = make_lm()
    base = logits(lm)
    lm.load_lora(tmp_path)
    assert_same(logits(lm), expected)
    assert np.abs(base - expected).max() > 100 * TOLERANCE * np.abs(expected).max()
    settings = ADAPTERS[name]
    assert lm.adapters.configs["default"].dropout == settings.get("lora_dropout", 0.0)
    # PEFT reads a file written here like its own.
    lm.save_lora(tmp_path / "again")
    model = peft.PeftModel.from_pretrained(make_theirs(GEMMA2), tmp_path / "again").eval()
    assert_same(run_theirs(model.base_model.model, FULL)["logits"], expected)


@pytest.mark.parametrize("configuration", [GEMMA1 | {"num_key_value_heads": 1}, GEMMA2])
def test_peft_reads_adapter(configuration, tmp_path):
    """Base model and adapter are both saved by this package."""
    lm = make_lm(configuration)
    lm.enable_lora(3, ["query", "layers.1.*"], 5, name="mine", use_rslora=True)
    fill(lm.backbone, "mine", size=0.3)
    expected = logits(lm)
    lm.save_lora(tmp_path / "adapter", base_model="me/base")
    lm.save_to_hugging_face(tmp_path / "merged")
    lm.set_adapter(None)
    lm.save_to_hugging_face(tmp_path / "base")

    def load(folder):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype="float32"
        ).eval()

    assert_same(run_theirs(load(tmp_path / "merged"), FULL)["logits"], expected)
    model = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter").eval()
    assert_same(run_theirs(model.base_model.model, FULL)["logits"], expected)
    found = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert found["base_model_name_or_path"] == "me/base"
    assert len(load_file(tmp_path / "adapter" / WEIGHTS)) == 2 * len(
        lm.adapters.configs["mine"].sizes
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("preset", "name", "loaded"),
    [
        ("gemma_tiny_en", "gemma_tiny_en", "gemma_tiny_en"),
        ("gemma2_2b_en", "google/gemma-2-2b", "gemma2_2b_en"),
        ("hf://me/base", "me/base", "hf://me/base"),
        ("/models/base", "/models/base", "/models/base"),
        (None, None, None),
    ],
)
def test_adapter_names_its_base(preset, name, loaded, tmp_path):
    """PEFT gets a name that it can load, and this package its own."""
    lm = make_lm()
    lm.backbone.preset = preset
    lm.enable_lora(2)
    lm.save_lora(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == name
    assert base_model(tmp_path) == loaded


def test_several_adapters(tmp_path):
    lm = make_lm()
    found = {}
    for seed, name in enumerate(("first", "second")):
        lm.enable_lora(2 + seed, name=name, seed=seed)
        fill(lm.backbone, name, seed, 0.3)
        found[name] = logits(lm)
        lm.save_lora(tmp_path / name)
    other = make_lm()
    for name in found:
        other.load_lora(tmp_path / name, name=name)
    for name, expected in found.items():
        other.set_adapter(name)
        np.testing.assert_array_equal(logits(other), expected)
    other.save_lora(tmp_path / "again", name="first")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == (
        load_file(tmp_path / "first" / WEIGHTS).keys()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    lm = make_lm()
    lm.enable_lora(2)
    fill(lm.backbone)
    lm.save_lora(folder)
    return folder


@pytest.fixture
def changed(saved, tmp_path):
    """Function that copies an adapter with changed configuration and tensors."""

    def change(config=None, tensors=None):
        values = json.loads((saved / CONFIG).read_text()) | (config or {})
        arrays = load_file(saved / WEIGHTS)
        for name, array in (tensors or {}).items():
            arrays.pop(name, None)
            if array is not None:
                arrays[name] = np.asarray(array, "float32")
        (tmp_path / CONFIG).write_text(json.dumps(values))
        save_file(arrays, tmp_path / WEIGHTS)
        return tmp_path

    return change


@pytest.fixture(scope="module")
def plain():
    return make_lm()


A = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, r"more than plain LoRA.*use_dora=True \(DoRA"),
        ({"bias": "all"}, r"bias='all' \(biases"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] \(whole"),
        ({"novelty": 3}, r"novelty=3"),
        ({"peft_type": "IA3"}, r"of type 'IA3'"),
        ({"init_lora_weights": "pissa_niter_4"}, r"changes the base model's matrices"),
        ({"lora_alpha": 0}, r"adapter_config.json: `alpha` must be a finite number greater than 0"),
        ({"r": "8"}, r"r='8', not int"),
        ({"lora_dropout": 1.5}, r"`dropout` must be"),
        ({"alpha_pattern": {"(": 1}}, r"invalid regular expression: '\('"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"8 problems.*\n  missing: .*k_proj"),
        ({"r": 3}, r"16 problems(?s:.*)q_proj.lora_A.weight is \(2, 32\), expected \(3, 32\)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_unsupported_adapters(config, message, changed, plain):
    with pytest.raises(ValueError, match=message):
        plain.load_lora(changed(config))
    assert plain.lora_adapters == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {A.format(0, "q"): None, A.format(2, "v"): np.ones((2, 31)), "x.lora_A": np.ones(3)},
            r"3 problems.*\n  missing: .*layers.0.self_attn.q_proj.lora_A.weight \(2, 32\)"
            r"\n  shape: .*layers.2.*\(2, 31\), expected \(2, 32\)\n  unexpected: .*x.lora_A",
        ),
        ({A.format(9, "q"): np.ones((2, 32))}, r"unexpected: .*layers.9"),
        ({A.format(1, "v"): np.full((2, 32), np.nan)}, r"NaN or infinity in layers.1.value A"),
    ],
    ids=["several", "more layers", "nan"],
)
def test_tensors_that_do_not_fit(tensors, message, changed, plain):
    with pytest.raises(ValueError, match=message):
        plain.load_lora(changed(tensors=tensors))
    assert plain.lora_adapters == []


def test_another_model(saved):
    lm = make_lm(GEMMA1)
    with pytest.raises(ValueError, match=r"does not fit this model \(\d+ problems\).*trained on"):
        lm.load_lora(saved)


def test_missing_files(plain, saved, tmp_path):
    with pytest.raises(ValueError, match=r"fetch it first.*'hf://owner/name'"):
        plain.load_lora("hf://owner/name")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        plain.load_lora(tmp_path / "nowhere")
    (tmp_path / CONFIG).write_text((saved / CONFIG).read_text())
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors\. Name"):
        plain.load_lora(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="is a pickle, which is never read"):
        plain.load_lora(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"x")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        plain.load_lora(tmp_path)


def test_adapters_that_cannot_be_saved(saved, tmp_path):
    lm = make_lm()
    with pytest.raises(ValueError, match=r"No adapter is active. Add one with `enable_lora`"):
        lm.save_lora(tmp_path)
    lm.load_lora(saved)
    with pytest.raises(ValueError, match=r"already has an adapter 'default'.*another `name`"):
        lm.load_lora(saved)
    with pytest.raises(ValueError, match=r"The model has 'default'.*Received: 'other'"):
        lm.save_lora(tmp_path, name="other")
    low_rank = lm.adapters.linears("default")["layers.0.query"].low_ranks["default"]
    a, b = low_rank.numpy()
    low_rank.assign(a, b + np.inf)
    with pytest.raises(ValueError, match=r"'default' contains NaN or infinity"):
        lm.save_lora(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert lm.backbone.config.vocabulary_size == VOCABULARY_SIZE
