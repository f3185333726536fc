"""Layout of Hugging Face's folder: names of files and tensors.

Reads and writes nothing; `reader.py` and `writer.py` follow these tables.
"""

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
VOCABULARY = "tokenizer.model"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SHARD = "model-{:05}-of-{:05}.safetensors"
SHARD_PATTERN = "model-*-of-*.safetensors"
FLAX_WEIGHTS = "flax_model.msgpack"
FLAX_WEIGHTS_INDEX = "flax_model.msgpack.index.json"
FLAX_SHARD_PATTERN = "flax_model-*-of-*.msgpack"

FILES = (
    *(CONFIG, GENERATION_CONFIG, VOCABULARY, TOKENIZER, TOKENIZER_CONFIG, SPECIAL_TOKENS),
    *(CHAT_TEMPLATE, WEIGHTS, WEIGHTS_INDEX, SHARD_PATTERN),
    *(FLAX_WEIGHTS, FLAX_WEIGHTS_INDEX, FLAX_SHARD_PATTERN),
)

_TENSORS = {
    "pre_attention_norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
    "output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_TEXT_PREFIXES = ("model.language_model.", "language_model.model.")
_MODULES = ("embed_tokens.", "layers.", "norm.")
_OTHER_MODULES = ("vision_tower.", "multi_modal_projector.", "lm_head.", "language_model.lm_head.")


def text_tensor_name(name: str) -> str | None:
    """Returns the name of a stored tensor in a text model, or `None` if no weight is read from it.

    The prefix of a text tower depends on the release of transformers that saved it. A model without
    a head has no prefix. The head is a copy of the embedding.
    """
    if name.removeprefix("model.").startswith(_OTHER_MODULES):
        return None
    for prefix in _TEXT_PREFIXES:
        if name.startswith(prefix):
            return f"model.{name.removeprefix(prefix)}"
    return f"model.{name}" if name.startswith(_MODULES) else name


def tensor_name(name: str, model_type: str) -> str:
    """Returns the name of the tensor of the weight `name` of `GemmaConfig.weight_shapes`."""
    if name == "token_embedding":
        return "model.embed_tokens.weight"
    if name == "final_norm":
        return "model.norm.weight"
    _, index, kind = name.split(".")
    module = _TENSORS[kind]
    if kind == "pre_ffw_norm" and model_type == "gemma":
        module = "post_attention_layernorm"  # Gemma 1 names the norm after the layer before it
    return f"model.layers.{index}.{module}.weight"
