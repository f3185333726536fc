"""Models of transformers with random weights."""

from keras_gemma.config import GemmaConfig
from tests.parity.pairs import transformers_sizes


def make_transformers_model(configuration, model_type=None):
    """Returns a model with random weights and the sizes of `configuration`.

    Args:
        configuration: Arguments of `GemmaConfig`.
        model_type: Architecture. Defaults to the simplest one that computes the configuration.
            `"gemma3"` adds a tiny vision tower.
    """
    import transformers

    config = GemmaConfig(**configuration)
    sizes = transformers_sizes(config)
    layers = range(config.num_layers)
    kinds = ["sliding_attention" if config.is_local(i) else "full_attention" for i in layers]
    attention = {
        "query_pre_attn_scalar": round(config.query_scale**-2),
        "attn_logit_softcapping": config.attention_logit_soft_cap,
        "final_logit_softcapping": config.final_logit_soft_cap,
        "sliding_window": config.sliding_window_size,
        "layer_types": kinds,
    }
    if model_type is None and config.use_query_key_norm:
        model_type = "gemma3_text"
    elif model_type is None and config.use_post_attention_norm:
        model_type = "gemma2"
    elif model_type is None and config.use_sliding_window_attention:
        model_type = "vaultgemma"
    if model_type in ("gemma3_text", "gemma3"):
        attention["rope_parameters"] = rope_parameters(config)
        text = transformers.Gemma3TextConfig(**sizes, **attention)
        model = (
            with_vision(text) if model_type == "gemma3" else transformers.Gemma3ForCausalLM(text)
        )
    elif model_type == "gemma2":
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **attention))
    elif model_type == "vaultgemma":
        model = transformers.VaultGemmaForCausalLM(
            transformers.VaultGemmaConfig(**sizes, **attention)
        )
    else:
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes))
    randomize(model)
    return model.eval()


def rope_parameters(config):
    scaling = {"rope_type": "default"}
    if config.global_rope_scaling_factor != 1.0:
        scaling = {"rope_type": "linear", "factor": config.global_rope_scaling_factor}
    return {
        "full_attention": {"rope_theta": config.global_rope_wavelength, **scaling},
        "sliding_attention": {"rope_theta": config.local_rope_wavelength, "rope_type": "default"},
    }


def with_vision(text):
    """Returns a multimodal model with the text tower of the config `text`."""
    import transformers

    vision = transformers.SiglipVisionConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=0,
        attn_implementation="eager",
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def randomize(model):
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(value.bfloat16())  # exact in every dtype
