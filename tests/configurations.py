"""Tiny models with the structure of each published one, for `GemmaConfig` and `GemmaBackbone`.

Soft caps, windows, scales and epsilons are exaggerated so that they matter at this size. A test
fails if one of them is omitted.
"""

from typing import Any

VOCABULARY_SIZE = 512
"""Vocabulary size, also of the fixture `tiny_proto`."""

GEMMA1 = {
    "vocabulary_size": VOCABULARY_SIZE,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 4,
    "hidden_dim": 32,
    "intermediate_dim": 96,
    "head_dim": 8,
}

GEMMA2 = GEMMA1 | {
    "num_layers": 4,
    "num_key_value_heads": 2,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "attention_logit_soft_cap": 2.0,
    "final_logit_soft_cap": 3.0,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
}

GEMMA3 = GEMMA1 | {
    "num_layers": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 48,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_size": 4,
    "use_query_key_norm": True,
    "sliding_window_pattern": 6,
    "global_rope_wavelength": 1_000_000.0,
}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    # Gemma 2B: one key/value head for all query heads.
    "gemma1_multi_query": GEMMA1 | {"num_key_value_heads": 1},
    # Gemma 7B: a key/value head for each query head.
    "gemma1_multi_head": GEMMA1,
    # Gemma 7B with N * H different from D.
    "gemma1_wide_heads": GEMMA1 | {"hidden_dim": 48, "head_dim": 16},
    # Gemma 2 2B and 9B: grouped heads, both caps, four norms, a window shorter than the text.
    "gemma2_grouped": GEMMA2,
    # Gemma 2 27B: queries are scaled by 1/sqrt(D/N), and D/N is not H.
    "gemma2_27b_scale": GEMMA2 | {"hidden_dim": 48, "query_head_dim_normalize": False},
    # A large epsilon in every norm.
    "gemma2_epsilon": GEMMA2 | {"layer_norm_epsilon": 0.1},
    # VaultGemma: a window, without caps and post norms.
    "vaultgemma": GEMMA1
    | {"num_layers": 4, "use_sliding_window_attention": True, "sliding_window_size": 4},
    # Gemma 3 270M and 1B: norms of queries and keys, five local layers for each global one, two
    # rotary bases. The last two layers are local, and N * H differs from D.
    "gemma3": GEMMA3,
    # Gemma 3 27B: positions of global layers are divided by 8, and queries scaled by 1/sqrt(D/N).
    "gemma3_27b_scale": GEMMA3
    | {
        "num_key_value_heads": 2,
        "query_head_dim_normalize": False,
        "global_rope_scaling_factor": 8.0,
    },
}
