"""Where the published presets live: KerasHub's preset names and their Kaggle handles.

Data, and nothing else. A new version of a preset is a new number at the end of its handle.
"""

_FAMILIES = {
    "keras/gemma/keras": (
        "gemma_2b_en/3",
        "gemma_instruct_2b_en/3",
        "gemma_1.1_instruct_2b_en/4",
        "gemma_7b_en/4",
        "gemma_instruct_7b_en/4",
        "gemma_1.1_instruct_7b_en/5",
    ),
    "keras/codegemma/keras": (
        "code_gemma_2b_en/2",
        "code_gemma_1.1_2b_en/2",
        "code_gemma_7b_en/3",
        "code_gemma_instruct_7b_en/3",
        "code_gemma_1.1_instruct_7b_en/3",
    ),
    "keras/gemma2/keras": (
        "gemma2_2b_en/2",
        "gemma2_instruct_2b_en/2",
        "gemma2_9b_en/4",
        "gemma2_instruct_9b_en/4",
        "gemma2_27b_en/3",
        "gemma2_instruct_27b_en/3",
    ),
    "google/shieldgemma/keras": (
        "shieldgemma_2b_en/2",
        "shieldgemma_9b_en/2",
        "shieldgemma_27b_en/2",
    ),
    "keras/vaultgemma/keras": ("vault_gemma_1b_en/2",),
    "keras/cell2sentence/keras": ("c2s_scale_gemma_2_2b_en/1", "c2s_scale_gemma_2_27b_en/1"),
}

KAGGLE_HANDLES = {
    variation.split("/")[0]: f"{family}/{variation}"
    for family, variations in _FAMILIES.items()
    for variation in variations
}
"""Preset name to `owner/model/framework/variation/version`."""
