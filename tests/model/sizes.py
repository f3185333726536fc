"""Sizes and parameter counts of the published models."""

GEMMA = {"vocabulary_size": 256_000, "head_dim": 256}
CAPS_AND_WINDOW = {
    "attention_logit_soft_cap": 50.0,
    "final_logit_soft_cap": 30.0,
    "use_sliding_window_attention": True,
}
GEMMA2 = GEMMA | CAPS_AND_WINDOW | {"use_post_ffw_norm": True, "use_post_attention_norm": True}

GEMMA3 = {
    "vocabulary_size": 262_144,
    "head_dim": 256,
    "use_query_key_norm": True,
    "use_post_ffw_norm": True,
    "use_post_attention_norm": True,
    "use_sliding_window_attention": True,
    "sliding_window_pattern": 6,
    "global_rope_wavelength": 1_000_000.0,
}
GEMMA3_SMALL = GEMMA3 | {"sliding_window_size": 512, "context_length": 32_768}
GEMMA3_LARGE = GEMMA3 | {
    "sliding_window_size": 1024,
    "context_length": 131_072,
    "global_rope_scaling_factor": 8.0,
}


def sizes(layers: int, heads: int, kv_heads: int, hidden: int, feed_forward: int) -> dict[str, int]:
    return {
        "num_layers": layers,
        "num_query_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_dim": hidden,
        "intermediate_dim": 2 * feed_forward,
    }


PUBLISHED = {
    "gemma_2b": (GEMMA | sizes(18, 8, 1, 2048, 16384), 2_506_172_416),
    "gemma_7b": (GEMMA | sizes(28, 16, 16, 3072, 24576), 8_537_680_896),
    "gemma2_2b": (GEMMA2 | sizes(26, 8, 4, 2304, 9216), 2_614_341_888),
    "gemma2_9b": (GEMMA2 | sizes(42, 16, 8, 3584, 14336), 9_241_705_984),
    "gemma2_27b": (
        GEMMA2
        | sizes(46, 32, 16, 4608, 36864)
        | {"head_dim": 128, "query_head_dim_normalize": False},
        27_227_128_320,
    ),
    "gemma3_270m": (GEMMA3_SMALL | sizes(18, 4, 1, 640, 2048), 268_098_176),
    "gemma3_1b": (GEMMA3_SMALL | sizes(26, 4, 1, 1152, 6912), 999_885_952),
    "gemma3_4b": (GEMMA3_LARGE | sizes(34, 8, 4, 2560, 10240), 3_880_099_328),
    "gemma3_12b": (GEMMA3_LARGE | sizes(48, 16, 8, 3840, 15360), 11_765_788_416),
    "gemma3_27b": (
        GEMMA3_LARGE
        | sizes(62, 32, 16, 5376, 21504)
        | {"head_dim": 128, "query_head_dim_normalize": False},
        27_009_002_240,
    ),
    "vaultgemma_1b": (
        GEMMA | sizes(26, 4, 4, 1152, 6912) | {"context_length": 1024},
        1_038_741_120,
    ),
}
