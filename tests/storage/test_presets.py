"""Names and folders, and which object comes out of them."""

import huggingface_hub
import kagglehub
import numpy as np
import pytest

from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import builtin_names, resolve
from keras_gemma.storage.published import KAGGLE_HANDLES
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor, GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA1
from tests.storage.conftest import Task, assert_same_weights, make_backbone, make_task


@pytest.fixture(scope="module")
def preset(tmp_path_factory, tiny_proto):
    folder = tmp_path_factory.mktemp("presets") / "preset"
    make_task(GEMMA1, tiny_proto).save_to_preset(folder)
    return folder


class MyBackbone(GemmaBackbone):
    """A user's own: one more argument."""

    def __init__(self, *args, flavour="plain", **kwargs):
        super().__init__(*args, **kwargs)
        self.flavour = flavour


class MyTask(Task):
    backbone_cls = MyBackbone

    def __init__(self, backbone, preprocessor=None, size=1, **kwargs):
        super().__init__(backbone, preprocessor, **kwargs)
        self.size = size


@pytest.mark.parametrize("path", [str, lambda folder: folder])
def test_each_class_takes_its_part(path, preset, tiny_proto):
    source = path(preset)
    assert isinstance(GemmaBackbone.from_preset(source), GemmaBackbone)
    assert GemmaTokenizer.from_preset(source).proto == tiny_proto
    assert GemmaCausalLMPreprocessor.from_preset(source).sequence_length == 24
    assert type(GemmaPreprocessor.from_preset(source)) is GemmaPreprocessor
    task = Task.from_preset(source)
    assert task.backbone.config.hidden_dim == 32
    assert task.preprocessor.sequence_length == 24


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


def test_parts_that_are_passed_are_used(preset):
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


def test_a_preset_without_a_vocabulary(tmp_path):
    make_backbone(GEMMA1).save_to_preset(tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary\.spm.*preprocessor=None"):
        Task.from_preset(tmp_path)
    assert Task.from_preset(tmp_path, preprocessor=None).preprocessor is None


def test_parts_can_be_saved_one_by_one(preset, tmp_path, tiny_proto):
    GemmaTokenizer.from_preset(preset).save_to_preset(tmp_path)
    assert GemmaTokenizer.from_preset(tmp_path).proto == tiny_proto
    make_backbone(GEMMA1).save_to_preset(tmp_path)
    preprocessor = GemmaCausalLMPreprocessor.from_preset(preset, add_start_token=False)
    preprocessor.save_to_preset(tmp_path)
    task = Task.from_preset(tmp_path)
    assert task.preprocessor.add_start_token is False
    assert_same_weights(task.backbone, make_backbone(GEMMA1))


@pytest.mark.parametrize("cls", [GemmaBackbone, GemmaTokenizer, GemmaCausalLMPreprocessor, Task])
def test_unknown_arguments(cls, preset):
    with pytest.raises(ValueError, match=r"does not have: nonsense, rubbish\. It has"):
        cls.from_preset(preset, rubbish=1, nonsense=2)


def test_classes_without_a_part():
    from keras_gemma.storage import load, save

    with pytest.raises(TypeError, match=r"builtins\.dict"):
        load(dict, "gemma_2b_en")
    with pytest.raises(TypeError, match=r"builtins\.dict"):
        save({}, "anywhere")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gemma_2b_e", ValueError, "'gemma_2b_e'. The nearest names are 'gemma_2b_en'"),
        ("gemma3_1b", ValueError, "The nearest names are"),
        ("completely else", ValueError, "The nearest names are"),
        ("./nowhere", FileNotFoundError, "does not exist. Received: preset='./nowhere'"),
        ("no/where", FileNotFoundError, "does not exist"),
        ("gs://bucket/gemma", ValueError, "kaggle:// or hf://"),
        (3, TypeError, "preset=3"),
        (None, TypeError, "preset=None"),
    ],
)
def test_names_that_are_none(name, error, message):
    with pytest.raises(error, match=message):
        GemmaBackbone.from_preset(name)


def test_folders_that_are_no_preset(tmp_path):
    with pytest.raises(ValueError, match=r"no preset: looked for config\.json"):
        GemmaBackbone.from_preset(tmp_path)
    (tmp_path / "config.json").write_text('{"size": 3}')
    with pytest.raises(ValueError, match=r"`registered_name`.*`model_type`.*keys size"):
        GemmaBackbone.from_preset(tmp_path)
    with pytest.raises(ValueError, match="must be a folder, not a file"):
        GemmaBackbone.from_preset(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        GemmaBackbone.from_preset(tmp_path / "missing")


def test_published_names_are_fetched_from_kaggle(preset, monkeypatch):
    fetched = []
    monkeypatch.setattr(kagglehub, "model_download", lambda h: fetched.append(h) or str(preset))
    assert resolve("gemma2_instruct_27b_en") == preset
    assert resolve("kaggle://me/gemma/keras/mine/2") == preset
    assert fetched == ["keras/gemma2/keras/gemma2_instruct_27b_en/3", "me/gemma/keras/mine/2"]
    assert len(KAGGLE_HANDLES) == 23


def test_hugging_face_handles(preset, monkeypatch):
    fetched = []

    def download(repository, revision, allow_patterns):
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        fetched.append((repository, revision))
        return str(preset)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert np.isclose(GemmaBackbone.from_preset("hf://google/gemma-2b").config.head_dim, 8)
    resolve("hf://google/gemma-2b@abc")
    assert fetched == [("google/gemma-2b", None), ("google/gemma-2b", "abc")]


@pytest.mark.parametrize(
    ("module", "function", "preset_name"),
    [
        (kagglehub, "model_download", "kaggle://keras/gemma/keras/gemma_2b_en"),
        (huggingface_hub, "snapshot_download", "hf://google/gemma-2b"),
    ],
)
def test_downloads_that_fail(module, function, preset_name, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(module, function, fail)
    message = f"Could not download `preset='{preset_name}'`: no route to host.*licence"
    with pytest.raises(ValueError, match=message):
        resolve(preset_name)


def test_built_in_names_resolve():
    for name in builtin_names():
        assert (resolve(name) / "config.json").is_file()
