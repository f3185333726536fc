"""Models of transformers with random weights."""

from keras_gemma.config import GemmaConfig
from tests.parity.pairs import transformers_sizes


def make_transformers_model(configuration, model_type=None):
    """Returns a model with random weights and the sizes of `configuration`.

    Args:
        configuration: Arguments of `GemmaConfig`.
        model_type: Architecture. Defaults to the simplest one that computes the configuration.
    """
    import torch
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
    if model_type is None and config.use_post_attention_norm:
        model_type = "gemma2"
    elif model_type is None and config.use_sliding_window_attention:
        model_type = "vaultgemma"
    if model_type == "gemma2":
        model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, **attention))
    elif model_type == "vaultgemma":
        model = transformers.VaultGemmaForCausalLM(
            transformers.VaultGemmaConfig(**sizes, **attention)
        )
    else:
        model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**sizes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(value.bfloat16())  # exact in every dtype
    return model.eval()
