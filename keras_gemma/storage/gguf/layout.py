"""Names of llama.cpp: tensors, and the depth of the models that it treats differently."""

NUM_LAYERS_27B = {"gemma2": 46, "gemma3": 62}
"""Depth at which llama.cpp scales queries by 1/sqrt(D/N) instead of 1/sqrt(H)."""

WINDOW_GEMMA2 = 4096
"""Sliding window of Gemma 2 if the file has none."""

EMBEDDING = "token_embd.weight"

_MODEL_TENSORS = {"token_embedding": "token_embd", "final_norm": "output_norm"}
_LAYER_TENSORS = {
    "pre_attention_norm": "attn_norm",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "query_norm": "attn_q_norm",
    "key_norm": "attn_k_norm",
    "output": "attn_output",
    "post_attention_norm": "post_attention_norm",
    "pre_ffw_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "post_ffw_norm": "post_ffw_norm",
}


def tensor_name(name: str) -> str:
    """Returns llama.cpp's name of the weight `name` of `GemmaConfig.weight_shapes`."""
    if name in _MODEL_TENSORS:
        return f"{_MODEL_TENSORS[name]}.weight"
    _, layer, part = name.split(".")
    return f"blk.{layer}.{_LAYER_TENSORS[part]}.weight"
