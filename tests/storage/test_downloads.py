"""Presets from the hubs: cached files without a network, and errors of downloads."""

import io
import json
import shutil
from pathlib import Path

import httpx2
import huggingface_hub
import kagglehub
import pytest
import requests
from huggingface_hub import errors
from kagglehub import exceptions

from keras_gemma.catalogue import presets
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage import resolve
from keras_gemma.storage.hub import downloads
from keras_gemma.storage.hub.downloads import RequiredFiles
from keras_gemma.text.tokenizer import GemmaTokenizer
from tests.configurations import GEMMA2
from tests.storage.conftest import Task, assert_same_weights, make_task
from tests.storage.hubs import COMMIT, lay_out_hugging_face, lay_out_kaggle

KAGGLE = "keras/gemma2/keras/gemma2_2b_en/2"
TWIN = "google/gemma-2-2b"
VOCABULARY = "assets/tokenizer/vocabulary.spm"
TEXT_FILES = ["config.json", "tokenizer.model"]
"""Fetched files. `generation_config.json` is not needed."""


@pytest.fixture(scope="module")
def keras_folder(tmp_path_factory, tiny_proto):
    folder = tmp_path_factory.mktemp("sources") / "keras"
    make_task(GEMMA2, tiny_proto).save_to_preset(folder, max_shard_size="100KB")
    assert (folder / "model_00001.weights.h5").is_file()
    return folder


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory, tiny_proto):
    from tests.parity.pairs import make_theirs

    folder = tmp_path_factory.mktemp("sources") / "hugging_face"
    make_theirs(GEMMA2).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(tiny_proto)
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def set_caches(folder, monkeypatch):
    """Sets the caches of this package and of the clients to subfolders of `folder`."""
    monkeypatch.setenv("KAGGLEHUB_CACHE", str(folder / "kagglehub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder / "hub"))
    return folder


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """Empty caches of both hubs, no credentials, and no network."""
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(kagglehub.config, "get_kaggle_credentials", lambda: None)
    monkeypatch.setattr(kagglehub.clients, "get_kaggle_credentials", lambda: None)
    # For every request, it searches the call stack and all imported modules for Keras.
    monkeypatch.setattr(kagglehub.clients, "get_user_agent", lambda: "kagglehub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def no_route(self, request, **kwargs):
        raise requests.ConnectionError("no route to host", request=request)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", no_route)
    return set_caches(tmp_path, monkeypatch)


def answer(status, monkeypatch):
    """Answers all requests of Kaggle's client with `status`."""

    def send(self, request, **kwargs):
        response = requests.Response()
        response.status_code, response.request, response.url = status, request, request.url
        response._content = b"{}"
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)


# From a cache, without a network.


@pytest.mark.parametrize("tree", [True, False])
def test_hugging_face_cache(tree, caches, hugging_face_folder):
    snapshot = lay_out_hugging_face(caches / "hub", TWIN, hugging_face_folder, tree=tree)
    assert resolve(f"hf://{TWIN}") == snapshot
    task = Task.from_preset(f"hf://{TWIN}")
    assert_same_weights(task.backbone, GemmaBackbone.from_preset(hugging_face_folder))
    assert resolve("hf://gemma2_2b_en") == snapshot


@pytest.mark.parametrize("revision", ["v2", COMMIT])
def test_hugging_face_revisions(revision, caches, hugging_face_folder):
    lay_out_hugging_face(caches / "hub", TWIN, hugging_face_folder, reference="v2")
    for name in (TWIN, "gemma2_2b_en"):
        backbone = GemmaBackbone.from_preset(f"hf://{name}@{revision}")
        assert_same_weights(backbone, GemmaBackbone.from_preset(hugging_face_folder))
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            resolve(f"hf://{name}")


@pytest.mark.parametrize("whole", [True, False])
def test_kaggle_cache(whole, caches, keras_folder):
    folder = lay_out_kaggle(caches / "kagglehub", KAGGLE, keras_folder, whole=whole)
    # The client itself takes this for its own cache.
    client = kagglehub.model_download(KAGGLE, **({} if whole else {"path": "config.json"}))
    assert Path(client) == (folder if whole else folder / "config.json")
    assert resolve(f"kaggle://{KAGGLE}") == folder
    task = Task.from_preset(f"kaggle://{KAGGLE}")
    assert_same_weights(task.backbone, GemmaBackbone.from_preset(keras_folder))
    assert task.preprocessor.sequence_length == 24


@pytest.mark.parametrize("place", [f"models/{KAGGLE}", KAGGLE.partition("/")[2]])
def test_attached_to_a_kaggle_notebook(place, caches, keras_folder, monkeypatch):
    """Found without a network, before the cache, by name, by handle and by path."""
    monkeypatch.setenv("KAGGLE_CACHE_MOUNT_FOLDER", str(caches / "input"))
    lay_out_kaggle(caches / "kagglehub", KAGGLE, keras_folder, names=["config.json"])
    attached = shutil.copytree(keras_folder, caches / "input" / place)
    for name in ("gemma2_2b_en", f"kaggle://{KAGGLE}", str(attached)):
        assert resolve(name) == attached
    assert presets()["gemma2_2b_en"].is_cached()
    task = Task.from_preset("gemma2_2b_en", dtype="float32")
    assert_same_weights(task.backbone, GemmaBackbone.from_preset(keras_folder))
    with pytest.raises(ValueError, match="no network"):
        resolve(f"kaggle://{KAGGLE[:-1]}3")


def test_file_without_marker_is_incomplete(caches, keras_folder):
    folder = lay_out_kaggle(caches / "kagglehub", KAGGLE, keras_folder)
    (folder.parent / ".complete" / "2" / "model_00001.weights.h5.complete").unlink()
    with pytest.raises(ValueError, match="no network: Kaggle cannot be reached"):
        resolve(f"kaggle://{KAGGLE}")
    assert resolve(f"kaggle://{KAGGLE}", weights=False) == folder


@pytest.mark.parametrize("hubs", [("kaggle",), ("hf",), ("kaggle", "hf")])
def test_built_in_name_uses_cached_files(hubs, caches, keras_folder, hugging_face_folder):
    folders = []
    if "kaggle" in hubs:
        folders.append(lay_out_kaggle(caches / "kagglehub", KAGGLE, keras_folder))
    if "hf" in hubs:
        folders.append(lay_out_hugging_face(caches / "hub", TWIN, hugging_face_folder))
    assert resolve("gemma2_2b_en") == folders[0]
    task = Task.from_preset("gemma2_2b_en")
    expected = Task.from_preset(folders[0], dtype="bfloat16")
    assert_same_weights(task.backbone, expected.backbone)
    # What it is loaded in does not depend on where it came from.
    assert task.backbone.dtype_policy.name == "bfloat16"


def test_built_in_config_needs_no_download(caches):
    folder = resolve("gemma2_27b_en", text=False, weights=False)
    assert (folder.name, (folder / "config.json").is_file()) == ("gemma2_27b_en", True)


def test_tokenizer_needs_no_weights(caches, hugging_face_folder, tiny_proto):
    lay_out_hugging_face(caches / "hub", TWIN, hugging_face_folder, names=TEXT_FILES)
    for name in (f"hf://{TWIN}", "gemma2_2b_en"):
        assert GemmaTokenizer.from_preset(name).proto == tiny_proto
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
            GemmaBackbone.from_preset(name)


def test_links_out_of_the_cache_are_refused(caches, hugging_face_folder):
    snapshot = lay_out_hugging_face(caches / "hub", TWIN, hugging_face_folder)
    secret = caches / "secret.model"
    secret.write_bytes(b"")
    (snapshot / "tokenizer.model").unlink()
    (snapshot / "tokenizer.model").symlink_to(secret)
    with pytest.raises(ValueError, match="is outside its folder"):
        GemmaTokenizer.from_preset(f"hf://{TWIN}")


# Downloads: the clients are the true ones, what answers them is not.


class Kaggle:
    """Answers kagglehub's requests with files of a folder, and records their names."""

    def __init__(self, folder):
        self.folder = folder
        self.asked = []
        self.versions = set()
        self.other_content = {}

    def send(self, request, **kwargs):
        wanted = json.loads(request.body)
        if request.url.endswith("GetModelInstance"):
            return self.answer(request, b'{"versionNumber": 2}')
        self.asked.append(wanted["path"])
        self.versions.add(wanted["versionNumber"])
        path = self.folder / wanted["path"]
        if not path.is_file():
            return self.answer(request, b"{}", status=404)
        return self.answer(request, self.other_content.get(wanted["path"]) or path.read_bytes())

    def answer(self, request, content, status=200):
        response = requests.Response()
        response.request, response.url, response.status_code = request, request.url, status
        response.headers["Content-Length"] = str(len(content))
        response.raw = io.BytesIO(content)
        return response


@pytest.fixture
def kaggle(caches, keras_folder, monkeypatch):
    server = Kaggle(keras_folder)

    def send(self, request, **kwargs):
        return server.send(request)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    return server


@pytest.mark.parametrize("name", ["gemma2_2b_en", f"kaggle://{KAGGLE}", f"kaggle://{KAGGLE[:-2]}"])
def test_required_files_from_kaggle(name, kaggle, keras_folder):
    assert Task.from_preset(name).preprocessor.sequence_length == 24
    shards = sorted(path.name for path in keras_folder.glob("model_*.h5"))
    settings = ["tokenizer.json", "preprocessor.json", "task.json"]
    files = ["metadata.json", "model.weights.json", *shards]
    needed = ["config.json", *settings, VOCABULARY, *files]
    assert kaggle.asked == needed
    assert kaggle.versions == {2}
    # What was fetched is kept, and known without asking.
    assert resolve("gemma2_2b_en") == resolve(f"kaggle://{KAGGLE}")
    assert kaggle.asked == needed


@pytest.mark.parametrize(
    ("cls", "load_weights", "asked", "left"),
    [
        (GemmaTokenizer, True, VOCABULARY, "model.weights.json"),
        (Task, False, VOCABULARY, "model.weights.json"),
        (GemmaBackbone, True, "model.weights.json", VOCABULARY),
        (GemmaBackbone, False, "config.json", "tokenizer.json"),
    ],
)
def test_files_required_by_each_class(cls, load_weights, asked, left, kaggle):
    cls.from_preset(f"kaggle://{KAGGLE}", load_weights=load_weights)
    assert asked in kaggle.asked and left not in kaggle.asked


def test_required_files_from_hugging_face(hugging_face_folder, caches, monkeypatch):
    asked = []

    def download(repository, revision, allow_patterns, ignore_patterns):
        names = ["config.json", "tokenizer.model", "tokenizer.json", "pytorch_model.bin"]
        names += ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
        names += ["original/model.safetensors", "gemma.gguf", "training_args.pt"]
        chosen = huggingface_hub.utils.filter_repo_objects(
            names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        )
        asked.append((repository, revision, set(chosen)))
        return str(hugging_face_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    index = "model.safetensors.index.json"
    text = {"config.json", "tokenizer.json", "tokenizer.model", index}
    weights = {"config.json", "tokenizer.json", "model-00001-of-00002.safetensors", index}
    resolve(f"hf://{TWIN}@v2")
    resolve("hf://gemma2_2b_en", weights=False)
    resolve("hf://gemma2_2b_en@v3", text=False)
    resolve(f"hf://{TWIN}", text=False, weights=False)
    assert asked == [
        (TWIN, "v2", text | weights),
        (TWIN, "main", text),
        (TWIN, "v3", weights),
        (TWIN, "main", {"config.json"}),
    ]


def test_hugging_face_is_used_if_kaggle_fails(caches, hugging_face_folder, monkeypatch):
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(hugging_face_folder)
    )
    assert resolve("gemma2_2b_en") == hugging_face_folder


def test_index_cannot_name_files_elsewhere(kaggle):
    content = b'{"weight_map": {"/layers/x": "../../stolen.h5"}}'
    kaggle.other_content["model.weights.json"] = content
    with pytest.raises(ValueError, match=r"names the file '\.\./\.\./stolen\.h5'"):
        resolve(f"kaggle://{KAGGLE}")
    assert kaggle.asked[-1] == "model.weights.json"


# What went wrong, and the step that helps.

LICENSE = "accept the license at https://www.kaggle.com/models/keras/gemma2"


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, f"requires a login: set KAGGLE_API_TOKEN, .*kagglehub.login.*{LICENSE}"),
        (403, f"requires a login: set KAGGLE_API_TOKEN, .*kagglehub.login.*{LICENSE}"),
        (404, "has no config.json there. Look for the model .*/models/keras/gemma2"),
        (500, "client failed with KaggleApiHTTPError: 500 .*Try again"),
    ],
)
def test_http_errors_of_kaggle(status, message, caches, monkeypatch):
    answer(status, monkeypatch)
    with pytest.raises(ValueError, match=f"`preset='kaggle://{KAGGLE}'`: Kaggle.*{message}") as e:
        resolve(f"kaggle://{KAGGLE}")
    assert "\n" not in str(e.value)


def test_account_refused_by_kaggle(caches, monkeypatch):
    answer(403, monkeypatch)
    monkeypatch.setattr(kagglehub.config, "get_kaggle_credentials", lambda: "somebody's")
    with pytest.raises(ValueError, match=rf"refuses this account \(403\): {LICENSE}"):
        resolve(f"kaggle://{KAGGLE}")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (exceptions.UnauthenticatedError(), "set KAGGLE_API_TOKEN"),
        (exceptions.CredentialError("no token"), "set KAGGLE_API_TOKEN"),
        (exceptions.DataCorruptionError("wrong sum\nof it"), "DataCorruptionError: wrong sum"),
        (exceptions.BackendError("down"), "BackendError: down"),
        (requests.Timeout("slow"), "no network"),
    ],
)
def test_errors_of_kagglehub(error, message, caches, monkeypatch):
    def fail(handle, path):
        raise error

    monkeypatch.setattr(kagglehub, "model_download", fail)
    with pytest.raises(ValueError, match=message) as raised:
        resolve(f"kaggle://{KAGGLE}")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__.__cause__ is error


def test_no_network(caches, monkeypatch):
    with pytest.raises(ValueError, match=r"no network: Kaggle.*other means and pass its path\.$"):
        resolve(f"kaggle://{KAGGLE}")
    with pytest.raises(ValueError, match="a handle that ends in a version needs no network"):
        resolve(f"kaggle://{KAGGLE[:-2]}")
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, .* unset it, or download the"):
        resolve(f"hf://{TWIN}")
    with pytest.raises(ValueError, match="from either hub") as error:
        resolve("gemma2_2b_en")
    assert f"kaggle://{KAGGLE}: no network" in str(error.value)
    assert f"hf://{TWIN}: HF_HUB_OFFLINE is set" in str(error.value)
    assert "\n" not in str(error.value)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def no_route(*args, **kwargs):
        raise httpx2.ConnectError("no route to host")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", no_route)
    with pytest.raises(ValueError, match="no network: Hugging Face cannot be reached"):
        resolve(f"hf://{TWIN}")


def http_error(cls, status):
    request = httpx2.Request("GET", "https://huggingface.co/api")
    return cls(f"{status} said\nat length", response=httpx2.Response(status, request=request))


def not_found_because(cause):
    error = errors.LocalEntryNotFoundError("not in the cache")
    error.__cause__ = cause
    return error


PAGE = "https://huggingface.co/google/gemma-2-2b"
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(errors.GatedRepoError, 403),
            f"gated: accept the license at {PAGE}, .*{LOG_IN}",
        ),
        (http_error(errors.RepositoryNotFoundError, 404), f"no such model.*{PAGE}"),
        (http_error(errors.RevisionNotFoundError, 404), f"no revision 'v9'.*{PAGE}/tree/main"),
        (http_error(errors.HfHubHTTPError, 401), f"refuses this account: {LOG_IN}"),
        (http_error(errors.HfHubHTTPError, 503), "answered 503: 503 said. Try again later"),
        (not_found_because(http_error(errors.HfHubHTTPError, 403)), f"account: {LOG_IN}"),
        (not_found_because(None), "cannot be reached"),
        (errors.LocalTokenNotFoundError("no token"), LOG_IN),
        (errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
        (httpx2.ReadTimeout("slow"), "cannot be reached"),
    ],
)
def test_errors_of_hugging_face(error, message, caches, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=message) as raised:
        resolve(f"hf://{TWIN}@v9")
    assert str(raised.value).startswith(f"Could not download `preset='hf://{TWIN}@v9'`: ")
    assert "\n" not in str(raised.value)
    assert raised.value.__cause__.__cause__ is error


@pytest.fixture
def hugging_face(caches, monkeypatch):
    """Function that answers all requests of huggingface_hub with one status and code."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    before = huggingface_hub.utils._http._GLOBAL_CLIENT_FACTORY

    def answer_with(status, code):
        def answer(request):
            return httpx2.Response(status, headers={"X-Error-Code": code}, request=request)

        transport = httpx2.MockTransport(answer)
        huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=transport))

    yield answer_with
    huggingface_hub.set_client_factory(before)


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", f"gated: accept the license at {PAGE}, then {LOG_IN}"),
        (401, "", "no such model, or it is private"),
        (404, "RepoNotFound", "no such model, or it is private"),
        (404, "RevisionNotFound", "no revision 'v9'"),
        (403, "", f"refuses this account: {LOG_IN}"),
    ],
)
def test_http_errors_of_hugging_face(status, code, message, hugging_face):
    hugging_face(status, code)
    with pytest.raises(ValueError, match=message):
        resolve(f"hf://{TWIN}@v9")


@pytest.mark.parametrize(
    ("handle", "message"),
    [
        ("hf://gemma", "hf://owner/model"),
        ("hf://a/b/c", "hf://owner/model"),
        ("hf://../model", "hf://owner/model"),
        ("hf://google/gemma-2b@", "hf://owner/model"),
        ("hf://google/gemma-2b@../main", "hf://owner/model"),
        ("hf://gemma_tiny_en", "comes with the package"),
        ("kaggle://x", "kaggle://owner/model/framework/variation"),
        ("kaggle://keras/gemma/keras/gemma_2b_en/latest", "kaggle://owner/model"),
        ("kaggle://keras/gemma/keras/../2", "kaggle://owner/model"),
        ("gs://bucket/gemma", "begin with kaggle:// or hf://"),
    ],
)
def test_malformed_handles(handle, message, monkeypatch):
    for name in ("from_kaggle", "from_hugging_face"):
        monkeypatch.setattr(downloads, name, None)
    with pytest.raises(ValueError, match=f"{message}.*preset='{handle}'"):
        resolve(handle)


def test_pickles_are_never_fetched():
    patterns = RequiredFiles().patterns()
    names = ["pytorch_model.bin", "model.pt", "model.pkl", "model.ckpt", "x.py", "model.gguf"]
    assert list(huggingface_hub.utils.filter_repo_objects(names, allow_patterns=patterns)) == []
