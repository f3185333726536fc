"""Orbax checkpoints of DeepMind's package `gemma`, which the package orbax-checkpoint judges."""

import json
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from keras_gemma import GemmaBackbone, GemmaCausalLM, GemmaTokenizer
from keras_gemma.config import GemmaConfig
from keras_gemma.storage import save
from keras_gemma.storage.formats import open_checked
from keras_gemma.storage.hub.upload import check_preset
from keras_gemma.storage.orbax import FORMAT, layout
from tests.configurations import CONFIGURATIONS, GEMMA1, GEMMA2, GEMMA3
from tests.storage.conftest import (
    IDS,
    Task,
    assert_close,
    assert_same_weights,
    make_backbone,
    make_task,
    outputs,
    save_as,
    save_to_hugging_face,
)

pytest.importorskip("tensorstore", reason="the extra `orbax` reads and writes these files")
ocp = pytest.importorskip("orbax.checkpoint", reason="orbax-checkpoint judges these files")

NAMES = [name for name in CONFIGURATIONS if name != "gemma2_epsilon"]
SIZES = ("vocabulary_size", "num_layers", "num_query_heads", "num_key_value_heads")
SIZES += ("hidden_dim", "intermediate_dim", "head_dim")

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")


def deepmind_tree(backbone, transposed):
    """Returns the parameters of DeepMind's Transformer, as nested dictionaries."""
    config = backbone.config
    weights = {name: weight.numpy() for name, weight in backbone.named_weights().items()}
    n, k, h = config.num_query_heads, config.num_key_value_heads, config.head_dim
    tree = {
        "embedder": {"input_embedding": weights["token_embedding"]},
        "final_norm": {"scale": weights["final_norm"]},
    }
    for i in range(config.num_layers):
        layer = {
            name.split(".")[2]: array
            for name, array in weights.items()
            if name.startswith(f"layers.{i}.")
        }
        q, key, value = (
            np.stack([np.transpose(head) for head in np.split(layer[kind], heads)])
            for kind, heads in (("query", n), ("key", k), ("value", k))
        )
        output = np.stack([np.transpose(head) for head in np.split(layer["output"], n, axis=1)])
        attention = {"attn_vec_einsum": {"w": output}}
        if n == k:
            attention["qkv_einsum"] = {"w": np.stack([q, key, value])}
        else:
            attention |= {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([key, value])}}
        if config.use_query_key_norm:
            attention["_query_norm"] = {"scale": layer["query_norm"]}
            attention["_key_norm"] = {"scale": layer["key_norm"]}
        gating = np.stack([layer["gate"], layer["up"]])
        tree[f"layer_{i}"] = {
            "attn": attention,
            "mlp": {
                "gating_einsum": gating if transposed else gating.swapaxes(1, 2),
                "linear": layer["down"].T,
            },
            **{
                name: {"scale": layer[name]}
                for name in layer
                if name.endswith("_norm") and name not in ("query_norm", "key_norm")
            },
        }
        assert output.shape == (n, h, config.hidden_dim)
    return tree


def flat_tree(tree):
    """Returns the published form of a tree: one level of paths, with `w` in all matrices."""
    flat = {}

    def visit(path, value):
        if path[-1] in ("gating_einsum", "linear"):
            value = {"w": value}
        if all(isinstance(entry, np.ndarray) for entry in value.values()):
            flat["/".join(path)] = value
            return
        for key, entry in value.items():
            visit([*path, key], entry)

    visit(["transformer"], tree)
    return flat


def stacked_tree(tree, pattern):
    """Returns the flat form with one array for all layers at the same place in the pattern."""
    stacked = {}
    for path, arrays in flat_tree(tree).items():
        prefix, *rest = path.removeprefix("transformer/").split("/")
        if prefix.startswith("layer_"):
            kind = int(prefix.removeprefix("layer_")) % pattern
            path = "/".join(["transformer/stacked_layers", f"attention_type_{kind}", *rest])
        for name, array in arrays.items():
            stacked.setdefault(path, {}).setdefault(name, []).append(array)
    return {
        path: {
            name: np.stack(parts) if "stacked" in path else parts[0]
            for name, parts in arrays.items()
        }
        for path, arrays in stacked.items()
    }


def settings(configuration):
    """Returns the arguments that the arrays of a tiny model do not hold."""
    config = GemmaConfig(**configuration)
    required = {name: getattr(config, name) for name in layout.REQUIRED_ARGUMENTS}
    return required | {name: v for name, v in configuration.items() if name not in SIZES}


def save_with_orbax(path, tree):
    checkpointer = ocp.StandardCheckpointer()
    checkpointer.save(path, tree)
    checkpointer.wait_until_finished()


def restore_with_orbax(path):
    return ocp.StandardCheckpointer().restore(path)


def save_to_orbax(task, path, **options):
    save_as(task, "orbax", path, **options)


def flatten(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {k: v for key in tree for k, v in flatten(tree[key], f"{prefix}/{key}").items()}


def assert_same_trees(actual, expected):
    actual, expected = flatten(actual), flatten(expected)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_reads_what_orbax_writes(name, tmp_path):
    expected = make_backbone(CONFIGURATIONS[name])
    transposed = expected.config.use_query_key_norm
    save_with_orbax(tmp_path / "model", deepmind_tree(expected, transposed))
    loaded = GemmaBackbone.from_preset(tmp_path / "model", **settings(CONFIGURATIONS[name]))
    assert loaded.config == expected.config
    assert_same_weights(loaded, expected)
    for ours, theirs in zip(outputs(loaded), outputs(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_orbax_reads_what_is_written(name, tmp_path):
    backbone = make_backbone(CONFIGURATIONS[name], "bfloat16")
    save_to_orbax(Task(backbone), tmp_path / "model")
    transposed = backbone.config.use_query_key_norm
    expected = deepmind_tree(backbone, transposed)
    assert flatten(expected)["/final_norm/scale"].dtype == ml_dtypes.bfloat16
    assert_same_trees(restore_with_orbax(tmp_path / "model"), expected)
    loaded = GemmaBackbone.from_preset(tmp_path / "model", dtype="bfloat16")
    assert loaded.config == backbone.config
    assert_same_weights(loaded, backbone)


@pytest.mark.parametrize("form", ["flat", "stacked", "transposed", "training", "vision"])
def test_forms_of_a_checkpoint(form, tmp_path):
    expected = make_backbone(GEMMA2 | {"num_layers": 5}, "bfloat16")
    tree = deepmind_tree(expected, transposed=form == "transposed")
    path = tmp_path / "model"
    if form == "training":
        path /= "default"
        tree = {"params": tree, "step": np.ones(()), "opt_state": tree, "collections": {}}
    elif form == "vision":
        tree["vision_encoder"] = {"layer": np.ones((2, 3))}
        tree["embedder"]["mm_input_projection"] = {"w": np.ones((2, 3))}
        tree["embedder"]["mm_soft_embedding_norm"] = {"scale": np.ones(2)}
    else:
        tree = {"flat": flat_tree, "stacked": lambda tree: stacked_tree(tree, 2)}.get(
            form, lambda tree: tree
        )(tree)
    save_with_orbax(path, tree)
    loaded = GemmaBackbone.from_preset(
        tmp_path / "model", query_head_dim_normalize=True, dtype="bfloat16"
    )
    assert_same_weights(loaded, expected)


@pytest.mark.parametrize("options", [(True, True), (False, False), (False, True)])
def test_stores_of_orbax(options, tmp_path):
    """Arrays in a database or in folders, in both releases of Zarr."""
    use_ocdbt, use_zarr3 = options
    expected = make_backbone(GEMMA1)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    ocp.Checkpointer(handler).save(tmp_path / "model", flat_tree(deepmind_tree(expected, False)))
    assert_same_weights(GemmaBackbone.from_preset(tmp_path / "model"), expected)


@pytest.mark.parametrize("chunk", [200, 2000])
def test_small_files(chunk, tmp_path):
    backbone = make_backbone(GEMMA3)
    save_to_orbax(Task(backbone), tmp_path / "model", max_shard_size=chunk)
    assert_same_weights(GemmaBackbone.from_preset(tmp_path / "model"), backbone)
    assert_same_trees(restore_with_orbax(tmp_path / "model"), deepmind_tree(backbone, True))


def test_unused_rows_of_the_embedding(tmp_path, monkeypatch):
    """Gemma 1 and 2 have 256,000 tokens and 256,128 rows. Unused rows are equal to <pad>."""
    monkeypatch.setattr(layout, "PADDED_VOCABULARIES", {512: 640})
    backbone = make_backbone(GEMMA1)
    save_to_orbax(Task(backbone), tmp_path / "model")
    stored = restore_with_orbax(tmp_path / "model")["embedder"]["input_embedding"]
    embedding = backbone.named_weights()["token_embedding"].numpy()
    np.testing.assert_array_equal(stored, embedding[[*range(512), *[0] * 128]])
    (tmp_path / "model/config.json").unlink()
    loaded = GemmaBackbone.from_preset(tmp_path / "model")
    assert loaded.config.vocabulary_size == 512
    assert_same_weights(loaded, backbone)


def test_quantized_weights_are_dequantized(tmp_path):
    backbone = make_backbone(GEMMA3)
    backbone.quantize("int8")
    save_to_orbax(Task(backbone), tmp_path / "model")
    loaded = GemmaBackbone.from_preset(tmp_path / "model")
    assert loaded.quantization is None
    assert_same_weights(loaded, backbone)
    again = GemmaBackbone.from_preset(tmp_path / "model", quantization="int8")
    assert again.quantization.mode == "int8"


PUBLISHED = {
    # Number of parameters, window, query scale, rotary factor, context length.
    "gemma_2b": ((18, 2048, 16384, 8, 1, 256), 2_506_172_416, None, 256, 1.0, 8192),
    "gemma_7b": ((28, 3072, 24576, 16, 16, 256), 8_537_680_896, None, 256, 1.0, 8192),
    "gemma2_2b": ((26, 2304, 9216, 8, 4, 256), 2_614_341_888, 4096, 256, 1.0, 8192),
    "gemma2_9b": ((42, 3584, 14336, 16, 8, 256), 9_241_705_984, 4096, 256, 1.0, 8192),
    "gemma2_27b": ((46, 4608, 36864, 32, 16, 128), 27_227_128_320, 4096, 144, 1.0, 8192),
    "gemma3_270m": ((18, 640, 2048, 4, 1, 256), 268_098_176, 512, 256, 1.0, 32768),
    "gemma3_1b": ((26, 1152, 6912, 4, 1, 256), 999_885_952, 512, 256, 1.0, 32768),
    "gemma3_4b": ((34, 2560, 10240, 8, 4, 256), 3_880_099_328, 1024, 256, 8.0, 131072),
    "gemma3_12b": ((48, 3840, 15360, 16, 8, 256), 11_765_788_416, 1024, 256, 8.0, 131072),
    "gemma3_27b": ((62, 5376, 21504, 32, 16, 128), 27_009_002_240, 1024, 168, 8.0, 131072),
}


@pytest.mark.once
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name, tmp_path):
    """Shapes of a published model, without a number, tell its configuration."""
    import tensorstore

    (layers, d, f, n, k, h), count, window, scalar, factor, context = PUBLISHED[name]
    gemma3, gemma2 = name.startswith("gemma3"), name.startswith("gemma2")
    shapes = {"embedder.input_embedding": (262_144 if gemma3 else 256_128, d)}
    shapes["final_norm.scale"] = (d,)
    names = ["pre_attention_norm", "pre_ffw_norm"]
    names += ["post_attention_norm", "post_ffw_norm"] * (gemma2 or gemma3)
    for i in range(layers):
        shapes |= {f"layer_{i}.{norm}.scale": (d,) for norm in names}
        shapes[f"layer_{i}.attn.attn_vec_einsum.w"] = (n, h, d)
        if n == k:
            shapes[f"layer_{i}.attn.qkv_einsum.w"] = (3, n, d, h)
        else:
            shapes[f"layer_{i}.attn.q_einsum.w"] = (n, d, h)
            shapes[f"layer_{i}.attn.kv_einsum.w"] = (2, k, d, h)
        if gemma3:
            shapes |= {f"layer_{i}.attn._{kind}_norm.scale": (h,) for kind in ("query", "key")}
        transposed = gemma3 or name in ("gemma2_9b", "gemma2_27b")
        shapes[f"layer_{i}.mlp.gating_einsum"] = (2, f, d) if transposed else (2, d, f)
        shapes[f"layer_{i}.mlp.linear"] = (f, d)
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{tmp_path}/"}}
    description = {"zarr_format": 2, "dtype": "bfloat16", "compressor": None, "filters": None}
    description |= {"order": "C", "fill_value": None}
    entries = tensorstore.KvStore.open(store).result()
    futures = [
        entries.write(
            f"{key}/.zarray".encode(),
            json.dumps({**description, "shape": shape, "chunks": shape}).encode(),
        )
        for key, shape in shapes.items()
    ]
    for future in futures:
        future.result()
    config = GemmaConfig(**FORMAT.read_backbone(tmp_path))
    assert config.parameter_count == count
    assert config.query_scale == scalar**-0.5
    assert config.layer_kind(0).window == window
    assert config.layer_kind(5 if gemma3 else 1)[1:] == (1e6 if gemma3 else 1e4, factor)
    assert config.attention_logit_soft_cap == (50.0 if gemma2 else None)
    assert config.final_logit_soft_cap == (30.0 if gemma2 else None)
    assert config.context_length == context
    assert layout.transposes_gating(config) == transposed
    with open_checked(FORMAT, tmp_path, config, None):
        pass


def save_tiny(path, configuration=GEMMA3):
    """Saves a model as DeepMind would: arrays without a description."""
    backbone = make_backbone(configuration)
    save_with_orbax(path, deepmind_tree(backbone, backbone.config.use_query_key_norm))
    return backbone


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_proto):
    """A complete checkpoint, written by this package."""
    path = tmp_path_factory.mktemp("whole") / "model"
    save_to_orbax(make_task(GEMMA3, tiny_proto), path)
    return path


@pytest.fixture
def model(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def test_settings_that_arrays_do_not_hold(tmp_path):
    path = tmp_path / "model"
    expected = save_tiny(path)
    with pytest.raises(
        ValueError, match=r"does not specify query_head_dim_normalize, sliding_window"
    ):
        GemmaBackbone.from_preset(path)
    arguments = settings(GEMMA3)
    del arguments["context_length"]
    with pytest.raises(
        ValueError, match=r"specify context_length, .*context_length=\.\.\.,.*config"
    ):
        GemmaBackbone.from_preset(path, **arguments)
    assert_same_weights(GemmaBackbone.from_preset(path, **settings(GEMMA3)), expected)
    lm = GemmaCausalLM.from_preset(path, preprocessor=None, **settings(GEMMA3))
    assert lm.backbone.config == expected.config


def test_config_next_to_the_arrays(tmp_path):
    expected = save_tiny(tmp_path / "model", GEMMA2)
    for name, writer in (("keras", save), ("hugging_face", save_to_hugging_face)):
        writer(Task(expected), tmp_path / name)
        shutil.copy(tmp_path / name / "config.json", tmp_path / "model")
        loaded = GemmaBackbone.from_preset(tmp_path / "model")
        assert loaded.config == expected.config
        assert loaded.dtype_policy.name == "float32"
        assert_same_weights(loaded, expected)
    content = json.loads((tmp_path / "keras/config.json").read_text())
    content["config"]["hidden_dim"] = 16
    (tmp_path / "model/config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"do not fit the sizes of the model"):
        GemmaBackbone.from_preset(tmp_path / "model")


def test_vocabulary(tmp_path, tiny_proto):
    path = tmp_path / "kaggle/2b"
    save_tiny(path, GEMMA1)
    with pytest.raises(
        ValueError, match=r"no vocabulary: .*2b/tokenizer\.model, or pass `preprocessor=None`"
    ):
        GemmaCausalLM.from_preset(path)
    assert GemmaCausalLM.from_preset(path, preprocessor=None).preprocessor is None
    (tmp_path / "kaggle/gemma.spm").write_bytes(tiny_proto)
    for preset in (path, path.parent):  # Kaggle's download has the checkpoint in a folder
        lm = GemmaCausalLM.from_preset(preset)
        assert lm.preprocessor.tokenizer.proto == tiny_proto
    (tmp_path / "kaggle/other.model").write_bytes(tiny_proto)
    with pytest.raises(ValueError, match=r"several vocabularies: gemma\.spm, other\.model"):
        GemmaTokenizer.from_preset(path)
    (path / "tokenizer.model").write_bytes(tiny_proto)
    assert GemmaTokenizer.from_preset(path).proto == tiny_proto


def test_task(tiny_proto, tmp_path, model):
    lm = GemmaCausalLM.from_preset(model, dtype="bfloat16")
    assert lm.preprocessor.tokenizer.proto == tiny_proto
    lm.save_to_orbax(tmp_path / "again")
    again = GemmaCausalLM.from_preset(tmp_path / "again", dtype="bfloat16")
    assert_same_weights(again.backbone, lm.backbone)
    fresh = GemmaBackbone.from_preset(model, load_weights=False)
    assert fresh.config == lm.backbone.config


def test_saves_replace_each_other(model, tiny_proto):
    (model / "notes.txt").write_text("kept")
    (model / "d/notes.txt").write_text("kept")
    task = make_task(GEMMA1, tiny_proto)
    save(task, model, overwrite=True)
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert {"notes.txt", "d/notes.txt", "model.weights.h5"} <= names
    assert not [name for name in names if "ocdbt" in name or "METADATA" in name]
    assert_same_weights(GemmaBackbone.from_preset(model), task.backbone)
    save_to_orbax(make_task(GEMMA2, tiny_proto), model, overwrite=True)
    assert not (model / "model.weights.h5").exists()
    assert GemmaBackbone.from_preset(model).config == GemmaConfig(**GEMMA2)
    with pytest.raises(ValueError, match="`preset_dir` holds an Orbax checkpoint"):
        make_backbone(GEMMA1).save_to_preset(model)


def test_uploads_are_refused(model):
    with pytest.raises(ValueError, match="an Orbax checkpoint, which `from_preset` does not downl"):
        check_preset(model)


def test_models_that_deepminds_package_does_not_compute(tmp_path):
    for change, message in (
        ({"layer_norm_epsilon": 0.1}, "epsilon of 1e-06"),
        ({"query_head_dim_normalize": False, "hidden_dim": 50}, "whole `hidden_dim`"),
    ):
        with pytest.raises(ValueError, match=message):
            save_to_orbax(Task(make_backbone(GEMMA2 | change)), tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_missing_package(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    line = r'`pip install "\.\[orbax\]"`'
    with pytest.raises(ImportError, match=f"Reading Orbax checkpoints needs .*{line}"):
        GemmaBackbone.from_preset(model)
    with pytest.raises(ImportError, match=f"Writing Orbax checkpoints needs .*{line}"):
        save_to_orbax(Task(make_backbone(GEMMA1)), tmp_path / "other")


def test_truncated_files(model):
    """A file that is cut or missing gives one error, unless the model does not need the rest."""
    expected = GemmaBackbone.from_preset(model)
    paths = sorted((model / "d").iterdir(), key=lambda path: path.stat().st_size, reverse=True)
    refused = []
    for path in [model / "manifest.ocdbt", *paths[:6]]:
        content = path.read_bytes()
        for length in (0, 10, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            try:
                assert_same_weights(GemmaBackbone.from_preset(model), expected)
            except ValueError as error:
                assert "cannot be read as an Orbax checkpoint: " in str(error)
                refused.append((path.name, length))
        path.write_bytes(content)
    assert ("manifest.ocdbt", 0) in refused
    assert len(refused) > 6
    assert_same_weights(GemmaBackbone.from_preset(model), expected)
    paths[0].unlink()
    with pytest.raises(ValueError, match="cannot be read as an Orbax checkpoint: "):
        GemmaBackbone.from_preset(model)


def edit(model, key, content):
    """Replaces an entry of the key-value store."""
    import tensorstore

    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{model}/"}}
    tensorstore.KvStore.open(store).result()[key] = content


def describe(shape, dtype="bfloat16", chunks=None):
    description = {"zarr_format": 2, "dtype": dtype, "compressor": None, "filters": None}
    description |= {"order": "C", "fill_value": None, "shape": shape, "chunks": chunks or shape}
    return json.dumps(description)


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("layer_0.attn.q_einsum.w/.zarray", b"{", "cannot be read as an Orbax checkpoint"),
        ("layer_0.attn.q_einsum.w/.zarray", None, r"missing: layer_0/attn/q_einsum/w \(4, 48, 8\)"),
        ("layer_3.mlp.linear/0.0", None, "cannot be read as an Orbax checkpoint: .*missing"),
        ("final_norm.scale/.zarray", describe([48], "<i4"), "final_norm/scale is int32"),
        ("final_norm.scale/.zarray", describe([4, 12]), r"final_norm/scale is \(4, 12\)"),
        ("layer_0.attn.kv_einsum.w/.zarray", describe([9]), "missing: layer_0/attn/kv_einsum/w.0"),
        ("layer_0.altup.w/.zarray", describe([9]), "arrays such as layer_0/altup/w, which is not"),
        ("transformer/final_norm.scale/.zarray", describe([48]), "final_norm/scale is stored twi"),
        ("layer_9999.mlp.linear/.zarray", describe([48, 48]), "unexpected: layer_9999/mlp/linear"),
    ],
)
def test_damaged_content(key, content, message, model):
    edit(model, key, content)
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(model)


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("layer_9999.mlp.linear/.zarray", describe([48, 48]), "asks for 10000 layers"),
        ("layer_0.mlp.linear/.zarray", describe([1 << 60, 48], chunks=[1, 48]), "has no sizes"),
        ("layer_0.mlp.linear/.zarray", describe([0, 48], chunks=[1, 48]), "has no sizes|positive"),
        ("layer_0.attn.attn_vec_einsum.w/.zarray", None, r"attn_vec_einsum/w \(missing\)"),
        (
            "stacked_layers/attention_type_7.mlp.linear/.zarray",
            describe([1 << 40, 1], chunks=[1, 1]),
            "stacks 1099511627776 layers",
        ),
        (
            "stacked_layers/attention_type_99999999999.mlp.linear/.zarray",
            describe([1, 1]),
            "layers",
        ),
    ],
)
def test_lying_shapes(key, content, message, model):
    (model / "config.json").unlink()
    edit(model, key, content)
    with pytest.raises(ValueError, match=message):
        GemmaBackbone.from_preset(model, **settings(GEMMA3))


def test_links_out_of_the_folder(model, tmp_path):
    path = max((model / "d").iterdir())
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="outside its folder"):
        GemmaBackbone.from_preset(model)


def deepminds_model(config, transposed):
    """Returns DeepMind's Transformer, and its module of checkpoints."""
    checkpoints = pytest.importorskip("kauldron.checkpoints", reason="needed by PyPI's gemma")
    # Its name in the releases before the current one, which gemma 3.3 still uses.
    checkpoints.AbstractPartialLoader = checkpoints.InitTransform
    gm = pytest.importorskip("gemma.gm", reason="PyPI's gemma is the judge of this test")
    from gemma.gm.nn import _config, _modules, _transformer
    from jax import numpy as jnp

    scale = _config.QueryPreAttentionNormalisation
    kinds = _modules.AttentionType
    layers = range(config.num_layers)
    model = _transformer.Transformer(
        config=_config.TransformerConfig(
            num_embed=config.vocabulary_size,
            embed_dim=config.hidden_dim,
            hidden_dim=config.feed_forward_dim,
            num_heads=config.num_query_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            final_logit_softcap=config.final_logit_soft_cap,
            attn_logits_soft_cap=config.attention_logit_soft_cap,
            use_post_attn_norm=config.use_post_attention_norm,
            use_post_ffw_norm=config.use_post_ffw_norm,
            attention_types=[
                kinds.LOCAL_SLIDING if config.is_local(i) else kinds.GLOBAL for i in layers
            ],
            query_pre_attn_norm=scale.BY_ONE_OVER_SQRT_HEAD_DIM
            if config.query_head_dim_normalize
            else scale.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
            use_qk_norm=config.use_query_key_norm,
            sliding_window_size=config.sliding_window_size,
            transpose_gating_einsum=transposed,
            local_base_frequency=int(config.local_rope_wavelength),
            global_base_frequency=int(config.global_rope_wavelength),
            local_scale_factor=config.local_rope_scaling_factor,
            global_scale_factor=config.global_rope_scaling_factor,
        ),
        dtype=jnp.float32,
        tokens="batch.tokens",
    )
    return model, gm.ckpts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_deepminds_model(name, tmp_path):
    config = GemmaConfig(**CONFIGURATIONS[name])
    model, checkpoints = deepminds_model(config, config.use_query_key_norm)
    backbone = make_backbone(CONFIGURATIONS[name])
    save_to_orbax(Task(backbone), tmp_path / "ours")
    parameters = checkpoints.load_params(tmp_path / "ours")
    expected = np.asarray(model.apply({"params": parameters}, IDS).logits)
    checkpoints.save_params(parameters, tmp_path / "theirs", wait_until_finished=True)
    loaded = GemmaBackbone.from_preset(tmp_path / "theirs", **settings(CONFIGURATIONS[name]))
    assert_close([outputs(backbone)[1], outputs(loaded)[1]], [expected, expected])
