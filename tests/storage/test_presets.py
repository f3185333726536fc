"""Names and folders of presets, and the objects built from them."""

import types

import keras
import numpy as np
import pytest

from keras_gemma import catalogue
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import resolve
from keras_gemma.storage.hub import downloads
from keras_gemma.storage.hub.downloads import DownloadError, RequiredFiles
from keras_gemma.storage.presets import PresetParts
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA1
from tests.storage.conftest import Task, assert_same_weights, make_backbone
from tests.storage.hubs import lay_out_kaggle


class MyBackbone(GemmaBackbone):
    """Custom class with an additional argument."""

    def __init__(self, *args, flavour="plain", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour


class MyTask(Task):
    backbone_cls = MyBackbone

    def __init__(self, backbone, preprocessor=None, size=1, **kwargs):
        super().__init__(backbone, preprocessor, **kwargs)
        self.size = size


@pytest.mark.parametrize("path", [str, lambda folder: folder])
def test_each_class_loads_its_part(path, preset, tiny_proto):
    source = path(preset)
    assert isinstance(GemmaBackbone.from_preset(source), GemmaBackbone)
    assert GemmaTokenizer.from_preset(source).proto == tiny_proto
    assert GemmaCausalLMPreprocessor.from_preset(source).sequence_length == 24
    assert type(GemmaPreprocessor.from_preset(source)) is GemmaPreprocessor
    task = Task.from_preset(source)
    assert task.backbone.config.hidden_dim == 32
    assert task.preprocessor.sequence_length == 24


def test_published_names_set_context_length(preset, tmp_path, monkeypatch):
    """KerasHub's files do not contain the context length."""
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(tmp_path))
    handle = "keras/vaultgemma/keras/vault_gemma_1b_en/2"
    folder = lay_out_kaggle(tmp_path, handle, preset)
    (folder / "metadata.json").unlink()
    for name in ("vault_gemma_1b_en", f"kaggle://{handle}"):
        assert GemmaBackbone.from_preset(name).context_length == 1024
        assert Task.from_preset(name, context_length=64).backbone.context_length == 64
    assert GemmaBackbone.from_preset(folder).context_length == 8192
    assert GemmaBackbone.from_preset("gemma_tiny_en").context_length == 256
    small = {"num_layers": 1, "vocabulary_size": 512}
    vault = GemmaBackbone.from_preset("vault_gemma_1b_en", load_weights=False, **small)
    assert vault.context_length == 1024


def test_subclasses_and_their_arguments(preset):
    backbone = MyBackbone.from_preset(preset, flavour="sweet", dropout=0.5)
    assert type(backbone) is MyBackbone
    assert backbone.flavour == "sweet"
    assert backbone.config.dropout == 0.5
    assert_same_weights(backbone, make_backbone(GEMMA1))
    task = MyTask.from_preset(preset, size=3, flavour="sour", sequence_length=9, name="mine")
    assert type(task.backbone) is MyBackbone
    assert (task.size, task.backbone.flavour, task.name) == (3, "sour", "mine")
    assert task.preprocessor.sequence_length == 9


def test_passed_parts_are_used(preset):
    backbone = make_backbone(GEMMA1)
    tokenizer = GemmaTokenizer.from_preset(preset)
    task = Task.from_preset(preset, backbone=backbone, tokenizer=tokenizer)
    assert task.backbone is backbone
    assert task.preprocessor.tokenizer is tokenizer
    assert Task.from_preset(preset, preprocessor=None).preprocessor is None
    with pytest.raises(ValueError, match="`preprocessor=` was passed, so sequence_length cannot"):
        Task.from_preset(preset, preprocessor=None, sequence_length=3)
    with pytest.raises(ValueError, match="`backbone=` was passed, so dropout cannot"):
        Task.from_preset(preset, backbone=backbone, dropout=0.1)


def test_preset_without_vocabulary(tmp_path):
    make_backbone(GEMMA1).save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary\.spm.*preprocessor=None"):
        Task.from_preset(tmp_path)
    assert Task.from_preset(tmp_path, preprocessor=None).preprocessor is None


def test_parts_can_be_saved_one_by_one(preset, tmp_path, tiny_proto):
    folder = tmp_path / "parts"
    GemmaTokenizer.from_preset(preset).save_to_preset(folder)
    assert GemmaTokenizer.from_preset(folder).proto == tiny_proto
    make_backbone(GEMMA1).save_to_preset(folder)
    preprocessor = GemmaCausalLMPreprocessor.from_preset(preset, add_start_token=False)
    preprocessor.save_to_preset(folder, overwrite=True)  # also writes the tokenizer
    task = Task.from_preset(folder)
    assert task.preprocessor.add_start_token is False
    assert_same_weights(task.backbone, make_backbone(GEMMA1))


@pytest.mark.parametrize("cls", [GemmaBackbone, GemmaTokenizer, GemmaCausalLMPreprocessor, Task])
def test_unknown_arguments(cls, preset):
    with pytest.raises(ValueError, match=r"has no argument `rubbish`\. Valid: "):
        cls.from_preset(preset, rubbish=1, nonsense=2)


def test_other_classes_are_refused():
    from keras_gemma.storage import load, save

    with pytest.raises(TypeError, match=r"builtins\.dict"):
        load(dict, "gemma_2b_en")
    with pytest.raises(TypeError, match=r"builtins\.dict"):
        save({}, "anywhere")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gemma_2b_e", ValueError, "Unknown preset 'gemma_2b_e'. Similar names are 'gemma_2b_en'"),
        ("gemma4_1b", ValueError, "Similar names are"),
        ("gemma-2-2b-it", ValueError, "Similar names are 'gemma2_instruct_2b_en'"),
        ("google/gemma-2-2b", FileNotFoundError, "pass 'hf://google/gemma-2-2b'"),
        ("completely else", ValueError, "'completely else'. `keras-gemma presets` lists all"),
        ("./nowhere", FileNotFoundError, "does not exist. Received: preset='./nowhere'"),
        ("no/where", FileNotFoundError, "does not exist"),
        ("gs://bucket/gemma", ValueError, "kaggle:// or hf://"),
        (3, TypeError, "preset=3"),
        (None, TypeError, "preset=None"),
    ],
)
def test_invalid_names(name, error, message):
    with pytest.raises(error, match=message):
        GemmaBackbone.from_preset(name)


def test_folders_of_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"not a preset: looked for .*in config\.json"):
        GemmaBackbone.from_preset(tmp_path)
    (tmp_path / "config.json").write_text('{"size": 3}')
    with pytest.raises(ValueError, match=r"`registered_name`.*`model_type`.*keys size\."):
        GemmaBackbone.from_preset(tmp_path)
    with pytest.raises(ValueError, match="must be a folder or a GGUF file"):
        GemmaBackbone.from_preset(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GemmaBackbone.from_preset(tmp_path / "missing")


def test_built_in_weights_need_no_hub():
    for name, preset in catalogue.presets().items():
        if preset.has_weights:
            assert resolve(name) == preset.folder


@pytest.mark.parametrize(
    ("cls", "arguments", "error", "message"),
    [
        (GemmaBackbone, {"dtype": "nonsense"}, ValueError, "such as 'bfloat16'.*dtype='nonsense'"),
        (Task, {"dtype": 3}, ValueError, "dtype=3"),
        (Task, {"dtype": "int32"}, ValueError, "floating point.*dtype='int32'"),
        (GemmaTokenizer, {"dtype": "nonsense"}, ValueError, "dtype='nonsense'"),
        (GemmaBackbone, {"load_weights": "no"}, TypeError, "load_weights='no'"),
        (Task, {"load_weights": 0}, TypeError, "True or False. Received: load_weights=0"),
        (Task, {"preprocessor": None, "sequence_length": 3}, ValueError, "sequence_length cannot"),
        (Task, {"backbone": None, "dropout": 0.1}, ValueError, "so dropout cannot apply"),
        (Task, {"backbone": None, "dtype": "float32"}, ValueError, "so dtype cannot apply"),
        (Task, {"nonsense": 1}, ValueError, "Task.from_preset` has no argument `nonsense`"),
    ],
)
def test_arguments_are_checked_first(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls.from_preset("no/such/folder", **arguments)


def test_dtypes(preset):
    for dtype in ("bfloat16", keras.DTypePolicy("mixed_bfloat16")):
        backbone = Task.from_preset(preset, dtype=dtype).backbone
        assert backbone.dtype_policy == keras.dtype_policies.get(dtype)


@pytest.mark.parametrize("name", ["config.json", "assets/tokenizer/vocabulary.spm", "assets"])
def test_links_out_of_the_folder_are_refused(name, preset, tmp_path):
    """Refused even if the link's target is a valid file."""
    (preset / name).rename(tmp_path / "elsewhere")
    (preset / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere.* is outside its folder"):
        Task.from_preset(preset)


def test_links_within_the_folder_and_to_it_are_followed(preset, tmp_path):
    (preset / "model.weights.h5").rename(preset / "same.h5")
    (preset / "model.weights.h5").symlink_to("same.h5")
    (tmp_path / "link").symlink_to(preset)
    backbone = GemmaBackbone.from_preset(tmp_path / "link")
    assert_same_weights(backbone, make_backbone(GEMMA1))


@pytest.mark.once
def test_models_know_their_preset(tmp_path, monkeypatch):
    backbone = GemmaBackbone.from_preset("gemma_tiny_en", load_weights=False, num_layers=1)
    assert backbone.preset == "gemma_tiny_en" and make_backbone(GEMMA1).preset is None
    monkeypatch.chdir(tmp_path)
    backbone.save_to_preset("mine")
    assert GemmaBackbone.from_preset("mine").preset == str(tmp_path / "mine")


def test_random_weights(preset):
    """Initial weights have the deviation of the layers, and the seed decides them."""

    def draw(seed, **options):
        keras.utils.set_random_seed(seed)
        return GemmaBackbone.from_preset(preset, load_weights=False, **options)

    first = draw(1)
    keras.utils.set_random_seed(2)
    built = GemmaBackbone(**first.config.to_dict())
    for name, weight in built.named_weights().items():
        numbers = first.named_weights()[name].numpy()
        assert abs(numbers.std() - weight.numpy().std()) < 0.002, name
        assert abs(numbers.mean()) < 0.002, name
    assert_same_weights(draw(1), first)
    other = draw(2).named_weights()["token_embedding"].numpy()
    assert not np.array_equal(other, first.named_weights()["token_embedding"].numpy())
    quantized = draw(1, quantization="int8").named_weights()["layers.0.gate"].numpy()
    assert abs(quantized.std() - 0.02) < 0.002


def refuse(*arguments):
    raise DownloadError("no network")


@pytest.mark.once
def test_random_weights_need_no_download(monkeypatch):
    """A published model without its tokenizer; with one, the message says so."""
    monkeypatch.setattr(downloads, "from_kaggle", refuse)
    monkeypatch.setattr(downloads, "from_hugging_face", refuse)
    monkeypatch.setattr(RequiredFiles, "are_cached", lambda files, find: False)
    folders = []

    def task(parts, *rest):
        folders.append(parts.folder)
        return types.SimpleNamespace(backbone=types.SimpleNamespace())

    with monkeypatch.context() as patch:
        patch.setattr(PresetParts, "task", task)
        for name in catalogue.presets():
            Task.from_preset(name, load_weights=False, preprocessor=None)
    assert len(folders) == len(catalogue.presets()) > 30
    assert all((folder / "config.json").is_file() for folder in folders)
    with pytest.raises(ValueError, match=r"no network.*pass `preprocessor=None`"):
        Task.from_preset("gemma_2b_en", load_weights=False)
