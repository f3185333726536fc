"""A Hugging Face folder, read: config.json, tokenizer.model and safetensors.

Knows the `gemma` and `gemma2` architectures, and refuses what GemmaBackbone cannot express.
Pickled weights (.bin, .pt) are never read: they can run code. Offers the same functions as
`keras_preset.py`. Reads tensors without PyTorch.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy, and so safetensors, the name "bfloat16"
from safetensors import SafetensorError, safe_open

from keras_gemma.config import GemmaConfig
from keras_gemma.storage.checkpoint import Place, StoredTensor
from keras_gemma.storage.files import read_json, shards

MODEL_TYPES = ("gemma", "gemma2")
CONFIG = "config.json"
VOCABULARY = "tokenizer.model"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"

IGNORED_TENSORS = ("lm_head.weight",)
"""A copy of the embedding, which the model uses as its output head."""

ROPE_THETA = 10000.0

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_SIZES = {
    "vocab_size": "vocabulary_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_query_heads",
    "num_key_value_heads": "num_key_value_heads",
    "hidden_size": "hidden_dim",
    "head_dim": "head_dim",
}

_ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
_FEED_FORWARD = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def read_backbone(folder: Path) -> dict[str, Any]:
    """`GemmaBackbone`'s arguments.

    No `dtype` among them: a checkpoint's `torch_dtype` says how its files are stored, and the
    model takes Keras's own policy unless the caller asks for another, as in KerasHub.

    Raises:
        ValueError: another architecture, missing sizes, or settings the model cannot express.
    """
    path = folder / CONFIG
    values = read_json(path)
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{path} has model_type {model_type!r}, and this package reads "
            f"{' and '.join(map(repr, MODEL_TYPES))}. Choose a checkpoint of Gemma or Gemma 2."
        )
    missing = [key for key in (*_SIZES, "intermediate_size") if values.get(key) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Fetch the checkpoint again.")
    problems = _inexpressible(values)
    if problems:
        raise ValueError(
            f"{path} asks for what GemmaBackbone cannot do:\n  " + "\n  ".join(problems)
        )
    arguments = {ours: values[theirs] for theirs, ours in _SIZES.items()}
    arguments["intermediate_dim"] = 2 * values["intermediate_size"]
    arguments["layer_norm_epsilon"] = values.get("rms_norm_eps", 1e-6)
    if model_type == "gemma2":
        window = values.get("sliding_window", 4096)
        arguments |= {
            "query_head_dim_normalize": _scales_by_head_dim(values),
            "use_post_ffw_norm": True,
            "use_post_attention_norm": True,
            "attention_logit_soft_cap": values.get("attn_logit_softcapping", 50.0),
            "final_logit_soft_cap": values.get("final_logit_softcapping", 30.0),
            "use_sliding_window_attention": window is not None,
        }
        if window is not None:
            arguments["sliding_window_size"] = window
    GemmaConfig(**arguments)
    return arguments


def read_tokenizer(folder: Path) -> dict[str, Any]:
    """`GemmaTokenizer`'s arguments: the SentencePiece vocabulary as `proto` in bytes.

    Raises:
        ValueError: the folder holds no SentencePiece vocabulary.
    """
    vocabulary = folder / VOCABULARY
    if not vocabulary.is_file():
        raise ValueError(
            f"{folder} holds no SentencePiece vocabulary: looked for {VOCABULARY} "
            "(tokenizer.json is not read). Fetch it from the checkpoint's repository, or pass "
            "`preprocessor=None` to load the model alone."
        )
    return {"proto": vocabulary.read_bytes()}


def read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """The preprocessor's arguments: none are stored, so its defaults hold."""
    return {}


@contextlib.contextmanager
def open_weights(folder: Path) -> Iterator[dict[str, StoredTensor]]:
    """The tensors in the folder's safetensors, by name, readable within the block.

    Raises:
        ValueError: a file is cut short, or the index names tensors that no file holds.
        FileNotFoundError: no safetensors, or shards are missing.
    """
    index: dict[str, str] = {}
    if (folder / WEIGHTS).is_file():
        paths = [folder / WEIGHTS]
    elif (folder / WEIGHTS_INDEX).is_file():
        index = _weight_map(folder / WEIGHTS_INDEX)
        paths = shards(folder, set(index.values()), WEIGHTS_INDEX)
    else:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise FileNotFoundError(
            f"{folder} holds no weights: looked for {WEIGHTS} and {WEIGHTS_INDEX}. "
            + (
                "Its .bin or .pt files are pickles, which can run code and are never read: "
                "save the model as safetensors."
                if pickles
                else "Pass `load_weights=False` for a model with random weights."
            )
        )
    with contextlib.ExitStack() as stack:
        stored: dict[str, StoredTensor] = {}
        for path in paths:
            file = stack.enter_context(_open(path))
            stored |= {name: _tensor(file, name) for name in file.keys()}  # noqa: SIM118
        absent = sorted(set(index) - set(stored))
        if absent:
            raise ValueError(
                f"{folder / WEIGHTS_INDEX} names {len(absent)} tensors that its files do not "
                f"hold: {', '.join(absent)}. Fetch the checkpoint again."
            )
        yield stored


def weight_places(config: GemmaConfig) -> dict[str, Place]:
    """For each weight's logical name, its tensor; shapes and layouts are the same."""
    return {
        name: Place(_tensor_name(name, config), shape)
        for name, shape in config.weight_shapes().items()
    }


def _tensor_name(name: str, config: GemmaConfig) -> str:
    if name == "token_embedding":
        return "model.embed_tokens.weight"
    if name == "final_norm":
        return "model.norm.weight"
    _, index, kind = name.split(".")
    if kind in _ATTENTION:
        module = f"self_attn.{_ATTENTION[kind]}"
    elif kind in _FEED_FORWARD:
        module = f"mlp.{_FEED_FORWARD[kind]}"
    else:
        module = {
            "pre_attention_norm": "input_layernorm",
            # Gemma 1 has two norms, and its second one is named after what it follows.
            "pre_ffw_norm": "pre_feedforward_layernorm"
            if config.use_post_attention_norm
            else "post_attention_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }[kind]
    return f"model.layers.{index}.{module}.weight"


def _scales_by_head_dim(values: dict[str, Any]) -> bool:
    """Whether queries are scaled by 1/sqrt(H), rather than by 1/sqrt(D/N)."""
    scalar = values.get("query_pre_attn_scalar", 256)
    hidden, heads, head_dim = (
        values[key] for key in ("hidden_size", "num_attention_heads", "head_dim")
    )
    if scalar == head_dim or (scalar, hidden, heads, head_dim) == (224, 3584, 16, 256):
        return True  # 224 was published for the 9B models by mistake; they were trained with 256
    if scalar * heads == hidden:
        return False
    raise ValueError(
        f"config.json has query_pre_attn_scalar {scalar!r}, and GemmaBackbone scales queries by "
        f"head_dim ({head_dim}) or hidden_size / num_attention_heads ({hidden / heads:g})."
    )


def _inexpressible(values: dict[str, Any]) -> list[str]:
    """The settings in a config.json that change the mathematics in ways the model has not."""
    problems = []
    for key, accepted in (
        ("hidden_act", (None, "gelu", "gelu_pytorch_tanh")),
        ("hidden_activation", (None, "gelu", "gelu_pytorch_tanh")),
        ("attention_bias", (None, False)),
        ("tie_word_embeddings", (None, True)),
        ("use_bidirectional_attention", (None, False)),
        ("quantization_config", (None,)),
    ):
        if values.get(key) not in accepted:
            problems.append(f"{key}={values[key]!r}")
    # transformers 5 writes rope_parameters; earlier releases rope_theta and rope_scaling.
    plain = {"rope_type": "default", "rope_theta": ROPE_THETA}
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        if any(plain.get(name) != value for name, value in rope.items()):
            problems.append(f"{key}={rope!r}")
    if values.get("rope_theta", ROPE_THETA) != ROPE_THETA:
        problems.append(f"rope_theta={values['rope_theta']!r}")
    kinds = values.get("layer_types")
    if values["model_type"] == "gemma2" and kinds is not None:
        pair = ("sliding_attention", "full_attention")
        if kinds != [pair[i % 2] for i in range(values["num_hidden_layers"])]:
            problems.append(f"layer_types={kinds!r}: must alternate, {pair[0]} first")
    return problems


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} lacks its `weight_map`. Fetch the checkpoint again.")
    return weight_map


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors: {error}. Fetch the checkpoint again."
        ) from error


def _tensor(file: Any, name: str) -> StoredTensor:
    description = file.get_slice(name)
    dtype = description.get_dtype()
    return StoredTensor(
        tuple(description.get_shape()),
        _DTYPES.get(dtype, dtype),
        lambda: file.get_tensor(name),
    )
