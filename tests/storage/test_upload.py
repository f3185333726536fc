"""Uploads: files passed to the hubs' clients, checks and errors."""

import fnmatch
import importlib
import inspect
import json
import shutil

import h5py
import huggingface_hub
import kagglehub
import numpy as np
import pytest
import requests
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from kagglehub import exceptions
from kagglehub.gcs_upload import filtered_walk, normalize_patterns

import keras_gemma
from keras_gemma import upload_preset
from keras_gemma.storage.hub.upload import files_of, model_card
from tests.configurations import GEMMA1, GEMMA2
from tests.parity.pairs import make_theirs
from tests.storage.conftest import Task, make_backbone, make_task

httpx = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])
"""HTTP library of the installed release of huggingface_hub."""

KAGGLE = "kaggle://me/gemma/keras/my_gemma"
HF = "hf://me/my_gemma"

WHOLE = [
    "assets/tokenizer/vocabulary.spm",
    "config.json",
    "metadata.json",
    "model.weights.h5",
    "preprocessor.json",
    "task.json",
    "tokenizer.json",
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_proto):
    folder = tmp_path_factory.mktemp("saved") / "preset"
    make_task(GEMMA2, tiny_proto).save_to_preset(folder)
    return folder


@pytest.fixture
def preset(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "preset")


@pytest.fixture
def sent(monkeypatch):
    """Uploads passed to the clients, filtered by their rules. Nothing is sent."""
    calls = []

    def model_upload(handle, folder, ignore_patterns):
        patterns = normalize_patterns(default=[".git/"], additional=ignore_patterns)
        files = [
            f"{root}/{name}".removeprefix(f"{folder}/")
            for root, _, names in filtered_walk(base_dir=folder, ignore_patterns=patterns)
            for name in names
        ]
        calls.append((handle, sorted(files)))

    def create_repo(repo_id, exist_ok):
        assert exist_ok
        owner = "" if "/" in repo_id else "me/"
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{owner}{repo_id}")

    def upload_folder(repo_id, folder_path, ignore_patterns):
        files = [p.relative_to(folder_path) for p in folder_path.rglob("*") if p.is_file()]
        kept = filter_repo_objects([f.as_posix() for f in files], ignore_patterns=ignore_patterns)
        calls.append((repo_id, sorted(kept)))

    def file_exists(repo_id, filename):
        assert calls[-1][0] == repo_id
        return filename in calls[-1][1]

    def upload_file(path_or_fileobj, path_in_repo, repo_id):
        calls.append((repo_id, path_in_repo, path_or_fileobj.decode()))

    monkeypatch.setattr(kagglehub, "model_upload", model_upload)
    for function in (create_repo, upload_folder, file_exists, upload_file):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return calls


def test_to_kaggle(sent, preset):
    upload_preset(KAGGLE, preset)
    assert sent == [("me/gemma/keras/my_gemma", WHOLE)]


def test_to_hugging_face(sent, preset):
    before = files_of(preset)
    upload_preset(HF, str(preset))
    assert sent[0] == ("me/my_gemma", WHOLE)
    repository, name, card = sent[1]
    assert (repository, name) == ("me/my_gemma", "README.md")
    assert card.startswith("---\nlibrary_name: keras-hub\npipeline_tag: text-generation\n---\n")
    assert 'from_preset("hf://me/my_gemma")' in card
    assert "| `num_layers` | 4 |" in card
    assert files_of(preset) == before


def test_upload_of_hugging_face_checkpoint(sent, tmp_path, tiny_proto):
    make_theirs(GEMMA2).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(tiny_proto)
    upload_preset(HF, tmp_path)
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(sent[0][1])
    assert sent[1][2].startswith("---\nlibrary_name: transformers\n")
    upload_preset("kaggle://me/gemma/transformers/my_gemma", tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="holds no vocabulary"):
        upload_preset(HF, tmp_path)


def test_name_without_owner_and_existing_card(sent, preset):
    (preset / "README.md").write_text("mine")
    upload_preset("hf://my_gemma", preset)
    assert sent == [("me/my_gemma", ["README.md", *WHOLE])]


def test_excluded_files(sent, preset):
    left = [
        ".env",
        ".git/config",
        ".cache/huggingface/x",
        "assets/.DS_Store",
        "assets/tokenizer/x.tmp",
        "[1]*.PKL",
        "pytorch_model.bin",
        "model.pt",
        "notes.txt~",
        "model.weights.h5.incomplete",
        "__pycache__/x.pyc",
    ]
    for name in left:
        (preset / name).parent.mkdir(parents=True, exist_ok=True)
        (preset / name).write_text("secret")
    kept = ["LICENSE", "1.txt", "chat_template.jinja", "examples/prompt.txt"]
    for name in kept:
        (preset / name).parent.mkdir(parents=True, exist_ok=True)
        (preset / name).write_text("free")
    expected = sorted([*WHOLE, *kept])
    assert files_of(preset) == expected
    upload_preset(KAGGLE, preset)
    upload_preset(HF, preset)
    assert sent[0][1] == expected
    assert sent[1][1] == expected


def test_shards(sent, preset, tiny_proto):
    shutil.rmtree(preset)
    make_task(GEMMA2, tiny_proto).save_to_preset(preset, max_shard_size="70KB")
    upload_preset(KAGGLE, preset)
    assert len(fnmatch.filter(sent[0][1], "model_*.weights.h5")) > 2
    (preset / "model_00001.weights.h5").unlink()
    for incomplete in (False, True):
        with pytest.raises(FileNotFoundError, match=r"missing: model_00001\.weights\.h5"):
            upload_preset(KAGGLE, preset, allow_incomplete=incomplete)
    assert len(sent) == 1


def test_incomplete_presets(sent, preset, tmp_path):
    (preset / "model.weights.h5").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no weights: looked for model\.weights"):
        upload_preset(HF, preset)
    upload_preset(HF, preset, allow_incomplete=True)
    model = tmp_path / "model"
    Task(make_backbone(GEMMA1)).save_to_preset(model)
    with pytest.raises(ValueError, match="holds no vocabulary"):
        upload_preset(KAGGLE, model)
    assert [call[1] for call in sent] == [
        [name for name in WHOLE if name != "model.weights.h5"],
        "README.md",
    ]
    upload_preset(KAGGLE, model, allow_incomplete=True)
    assert sent[-1][1] == ["config.json", "metadata.json", "model.weights.h5", "task.json"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("me/my_gemma", r"begin with kaggle:// or hf://"),
        ("s3://me/my_gemma", r"begin with kaggle:// or hf://"),
        ("kaggle://me/gemma", "kaggle://owner/model/framework/variation"),
        ("kaggle://me/gemma/keras/my_gemma/2", "without a version"),
        ("kaggle://me/gemma/keras/", "kaggle://owner/model"),
        ("kaggle://me/../keras/x", "kaggle://owner/model"),
        ("kaggle://me/gemma/keros/my_gemma", "framework that Kaggle knows: 'keras'"),
        ("hf://", "hf://owner/model"),
        ("hf://me/my/gemma", "hf://owner/model"),
        ("hf://me/my_gemma@main", "hf://owner/model"),
        ("hf://me/my gemma", "hf://owner/model"),
    ],
)
def test_addresses(uri, message, sent, preset):
    with pytest.raises(ValueError, match=f"{message}.*Received: uri='{uri}'"):
        upload_preset(uri, preset)
    assert sent == []


def test_arguments_of_wrong_type(preset):
    with pytest.raises(TypeError, match="`uri` must be a string"):
        upload_preset(preset, HF)
    with pytest.raises(TypeError, match="`preset` must be a string or a path"):
        upload_preset(HF, None)


def edit(path, **values):
    content = json.loads(path.read_text())
    content["config"].update(values)
    path.write_text(json.dumps(content))


def test_folders_that_from_preset_cannot_load(sent, preset, tmp_path, tiny_proto):
    def refused(kind, message):
        for uri in (KAGGLE, HF):
            with pytest.raises(kind, match=message):
                upload_preset(uri, preset, allow_incomplete=True)

    original = shutil.copytree(preset, tmp_path / "original")

    def restore():
        shutil.rmtree(preset)
        shutil.copytree(original, preset)

    (preset / "config.json").write_text("{}")
    refused(ValueError, "is not a preset")
    restore()
    edit(preset / "config.json", num_layers=5)
    refused(ValueError, "missing: layers/gemma_decoder_block_4/attention")
    restore()
    with h5py.File(preset / "model.weights.h5", "a") as file:
        del file["layers/rms_normalization/vars/0"]
        file["layers/rms_normalization/vars/0"] = np.zeros(3, "float32")
    refused(ValueError, r"rms_normalization/vars/0 is \(3,\), expected \(32,\)")
    restore()
    (preset / "assets/tokenizer/vocabulary.spm").write_bytes(b"no model")
    refused(ValueError, "SentencePiece")
    restore()
    (tmp_path / "secret").write_text("secret")
    (preset / "notes.txt").symlink_to(tmp_path / "secret")
    refused(ValueError, r"notes\.txt is a link to .* outside its folder")
    restore()
    (preset / "config.json").unlink()
    refused(ValueError, r"has no config\.json")
    shutil.rmtree(preset)
    refused(
        FileNotFoundError, "an existing folder, as written by `save_to_preset`. Received: preset="
    )
    make_task(GEMMA1 | {"vocabulary_size": 400}, tiny_proto).save_to_preset(preset)
    refused(ValueError, "has 512 ids, but the backbone's vocabulary_size is 400")
    assert sent == []


def test_tensors_are_not_read(sent, preset, monkeypatch):
    from keras_gemma.storage import tensor_streaming as checkpoint

    def never(self):
        raise AssertionError("a tensor was read")

    original = checkpoint.StoredTensor.__init__
    monkeypatch.setattr(
        checkpoint.StoredTensor,
        "__init__",
        lambda self, shape, dtype, read: original(self, shape, dtype, never),
    )
    upload_preset(HF, preset)
    assert len(sent) == 2


def answer(status):
    response = requests.Response()
    response.status_code = status
    return response


def hub_answer(kind, status):
    request = httpx.Request("POST", "https://huggingface.co/api/repos/create")
    return kind("You don't have\nthe rights", response=httpx.Response(status, request=request))


NO_TOKEN = r".*kaggle\.com/settings.*KAGGLE_API_TOKEN.*kagglehub\.login\(\)"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.UnauthenticatedError(), f"you are not logged in: {NO_TOKEN}"),
        (exceptions.CredentialError("none"), f"you are not logged in: {NO_TOKEN}"),
        (
            exceptions.KaggleApiHTTPError("no", answer(401)),
            f"requires a login \\(401\\): {NO_TOKEN}",
        ),
        (requests.HTTPError("no", response=answer(401)), f"requires a login \\(401\\): {NO_TOKEN}"),
        (exceptions.KaggleApiHTTPError("no", answer(403)), r"\(403\): the account must be 'me'"),
        (exceptions.BackendError("quota used up", 429), "answered 429: quota used up. Try again"),
        (exceptions.BackendError("quota used up"), "BackendError: quota used up. Call again"),
        (requests.ConnectionError("no route"), "no network: Kaggle cannot be reached"),
        (requests.Timeout("slow"), "no network: Kaggle cannot be reached"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_kaggle(error, message, preset, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(kagglehub, "model_upload", fail)
    with pytest.raises(ValueError, match=f"Could not upload to {KAGGLE}: .*{message}") as raised:
        upload_preset(KAGGLE, preset)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


WRITE_TOKEN = r".*may write at https://huggingface\.co/settings/tokens.*HF_TOKEN.*hf auth login"


@pytest.mark.parametrize("step", ["create_repo", "upload_folder", "file_exists", "upload_file"])
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalTokenNotFoundError("none"), f"you are not logged in: {WRITE_TOKEN}"),
        (hub_answer(errors.HfHubHTTPError, 401), rf"requires a login \(401\): {WRITE_TOKEN}"),
        (
            hub_answer(errors.HfHubHTTPError, 403),
            rf"\(403\): the account must be 'me'{WRITE_TOKEN}",
        ),
        (hub_answer(errors.RepositoryNotFoundError, 404), rf"\(404\): .*'me'{WRITE_TOKEN}"),
        (hub_answer(errors.HfHubHTTPError, 500), "answered 500: You don't have the rights"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set: unset it"),
        (httpx.ConnectError("no route"), "no network: Hugging Face cannot be reached"),
        (httpx.ReadTimeout("slow"), "no network: Hugging Face cannot be reached"),
        (OSError("disk"), "OSError: disk. Call again"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_hugging_face_upload(step, error, message, preset, sent, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, step, fail)
    with pytest.raises(ValueError, match=f"Could not upload to {HF}: .*{message}") as raised:
        upload_preset(HF, preset)
    assert raised.value.__cause__ is error
    assert "\n" not in str(raised.value)


def test_fakes_have_signatures_of_clients():
    """The fakes above have the same signatures as the clients' functions."""

    def named(function, *args, **kwargs):
        return inspect.signature(function).bind(*args, **kwargs).arguments  # or a TypeError

    upload = named(kagglehub.model_upload, "h", "f", ignore_patterns=[])
    assert upload == {"handle": "h", "local_model_dir": "f", "ignore_patterns": []}
    assert named(huggingface_hub.create_repo, "r", exist_ok=True) == {
        "repo_id": "r",
        "exist_ok": True,
    }
    for function, arguments in (
        (huggingface_hub.upload_folder, {"repo_id": 1, "folder_path": 2, "ignore_patterns": 3}),
        (huggingface_hub.file_exists, {"repo_id": 1, "filename": 2}),
        (huggingface_hub.upload_file, {"path_or_fileobj": 1, "path_in_repo": 2, "repo_id": 3}),
    ):
        assert named(function, **arguments) == arguments


def test_model_card_is_valid():
    config = make_backbone(GEMMA1).config
    card = huggingface_hub.ModelCard(model_card("me/my_gemma", "transformers", config))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"


def test_public_name():
    assert keras_gemma.upload_preset is upload_preset
