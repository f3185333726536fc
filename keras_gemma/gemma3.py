"""Gemma 3 under the names and with the arguments of KerasHub.

The model is `GemmaBackbone`'s. These classes differ only in their arguments: KerasHub counts
`intermediate_dim` of Gemma 3 as F, fixes the pattern of the layers and the rotary bases, and has
arguments for images.
"""

from pathlib import Path
from typing import Any

import keras

from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.config import FIXED_BY_KERAS_HUB, GemmaConfig
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer

_FIXED = FIXED_BY_KERAS_HUB["Gemma3"]


@keras.saving.register_keras_serializable(package="keras_gemma")
class Gemma3Backbone(GemmaBackbone):
    """Gemma 3 without its head. `GemmaBackbone` with KerasHub's arguments of Gemma 3.

    Args:
        vocabulary_size, num_layers, num_query_heads, num_key_value_heads, hidden_dim, head_dim,
            query_head_dim_normalize, use_post_ffw_norm, use_post_attention_norm,
            attention_logit_soft_cap, final_logit_soft_cap, use_sliding_window_attention,
            sliding_window_size, local_rope_scaling_factor, global_rope_scaling_factor,
            layer_norm_epsilon, dropout, dtype, context_length, quantization: Same as in
            `GemmaBackbone`.
        intermediate_dim: F, the width of the gate projection. `GemmaBackbone` counts 2F.
        use_query_key_norm: If True, each head of queries and keys is normalized.
        sliding_window_pattern, local_rope_wavelength, global_rope_wavelength: Same as in
            `GemmaBackbone`. KerasHub has no such arguments.
        image_size: Ignored, as in KerasHub without a `vision_encoder`.
        vision_encoder, use_bidirectional_attention, is_embedding_model,
            pooling_intermediate_dim, embedding_dim: Must keep their defaults: images and
            embedding models are not supported. Pass them by name: KerasHub's positional order
            begins with `vocabulary_size, image_size`.

    Raises:
        ValueError: If the sizes are inconsistent, or the model reads images or is an embedding
            model.

    Example:

    ```python
    import numpy as np
    from keras_gemma.models import Gemma3Backbone

    backbone = Gemma3Backbone(
        vocabulary_size=512, num_layers=6, num_query_heads=4, num_key_value_heads=1,
        hidden_dim=64, intermediate_dim=128, head_dim=16, use_sliding_window_attention=True,
    )
    ids = np.array([[2, 7, 9]])
    backbone({"token_ids": ids, "padding_mask": np.ones_like(ids)}).shape  # (1, 3, 64)
    ```
    """

    def __init__(
        self,
        vocabulary_size: int,
        num_layers: int,
        num_query_heads: int,
        num_key_value_heads: int,
        hidden_dim: int,
        intermediate_dim: int,
        head_dim: int,
        query_head_dim_normalize: bool = True,
        use_query_key_norm: bool = True,
        use_post_ffw_norm: bool = False,
        use_post_attention_norm: bool = False,
        attention_logit_soft_cap: float | None = None,
        final_logit_soft_cap: float | None = None,
        use_sliding_window_attention: bool = False,
        sliding_window_size: int = 1024,
        local_rope_scaling_factor: float = 1.0,
        global_rope_scaling_factor: float = 1.0,
        image_size: int | None = None,
        vision_encoder: Any = None,
        layer_norm_epsilon: float = 1e-6,
        use_bidirectional_attention: bool = False,
        dropout: float = 0.0,
        is_embedding_model: bool = False,
        pooling_intermediate_dim: int | None = None,
        embedding_dim: int | None = None,
        dtype: Any = None,
        context_length: int = 32768,
        quantization: Any = None,
        sliding_window_pattern: int = _FIXED["sliding_window_pattern"],
        local_rope_wavelength: float = _FIXED["local_rope_wavelength"],
        global_rope_wavelength: float = _FIXED["global_rope_wavelength"],
        **kwargs: Any,
    ) -> None:
        _check_text_only("vision_encoder", vision_encoder)
        _check_text_only("pooling_intermediate_dim", pooling_intermediate_dim)
        _check_text_only("embedding_dim", embedding_dim)
        config = self.config_of(locals())
        super().__init__(**config.to_dict(), dtype=dtype, quantization=quantization, **kwargs)

    @classmethod
    def arguments_of(cls, values: dict[str, Any]) -> dict[str, Any]:
        if "intermediate_dim" not in values:
            return values
        return {**values, "intermediate_dim": values["intermediate_dim"] // 2}

    @classmethod
    def config_of(cls, arguments: dict[str, Any]) -> GemmaConfig:
        return GemmaConfig.from_keras_hub("Gemma3", arguments)

    @property
    def intermediate_dim(self) -> int:
        """F, the width of the gate projection."""
        return self.config.feed_forward_dim


@keras.saving.register_keras_serializable(package="keras_gemma")
class Gemma3Tokenizer(GemmaTokenizer):
    """Gemma 3's tokenizer. Same as `GemmaTokenizer`, with another vocabulary.

    Args:
        proto: Same as in `GemmaTokenizer`.
        has_vision_tokens: Ignored: names of control tokens become tokens in any case.
        **kwargs: Arguments of `GemmaTokenizer`.
    """

    family = "Gemma3"

    def __init__(
        self,
        proto: str | Path | bytes | None = None,
        has_vision_tokens: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(proto, **kwargs)


@keras.saving.register_keras_serializable(package="keras_gemma")
class Gemma3CausalLMPreprocessor(GemmaCausalLMPreprocessor):
    """Converts texts to the inputs of `Gemma3CausalLM`. Same as `GemmaCausalLMPreprocessor`.

    Args:
        tokenizer: A `GemmaTokenizer` or `Gemma3Tokenizer`.
        image_converter: Must be `None`: images are not supported.
        sequence_length, add_start_token, add_end_token: Same as in `GemmaCausalLMPreprocessor`.
        max_images_per_prompt, num_vision_tokens_per_image: Ignored: they only matter for images.
        **kwargs: Keras layer arguments `name`, `dtype` and `trainable`.

    Raises:
        ValueError: If `image_converter` is not `None`.
    """

    tokenizer_cls = Gemma3Tokenizer

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        image_converter: Any = None,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        max_images_per_prompt: int = 2,
        num_vision_tokens_per_image: int = 256,
        **kwargs: Any,
    ) -> None:
        _check_text_only("image_converter", image_converter)
        super().__init__(tokenizer, sequence_length, add_start_token, add_end_token, **kwargs)


@keras.saving.register_keras_serializable(package="keras_gemma")
class Gemma3CausalLM(GemmaCausalLM):
    """Gemma 3 with a language-model head. Same as `GemmaCausalLM`, with KerasHub's arguments.

    Args:
        backbone: A `Gemma3Backbone`, or a `GemmaBackbone` of Gemma 3.
        preprocessor: A `Gemma3CausalLMPreprocessor` or `GemmaCausalLMPreprocessor`. `None`
            restricts the model to token ids. KerasHub's positional order is the reverse, so pass
            both by name.

    Example:

    ```python
    import keras_gemma

    tokenizer = keras_gemma.GemmaTokenizer.from_preset("gemma_tiny_en")
    lm = keras_gemma.models.Gemma3CausalLM(
        backbone=keras_gemma.models.Gemma3Backbone(
            vocabulary_size=tokenizer.vocabulary_size(), num_layers=6, num_query_heads=4,
            num_key_value_heads=1, hidden_dim=64, intermediate_dim=128, head_dim=16,
        ),
        preprocessor=keras_gemma.models.Gemma3CausalLMPreprocessor(tokenizer),
    )
    lm.generate("ROMEO:", max_new_tokens=4)
    ```
    """

    backbone_cls = Gemma3Backbone
    preprocessor_cls = Gemma3CausalLMPreprocessor


def _check_text_only(name: str, value: Any) -> None:
    if value is not None:
        raise ValueError(
            f"`{name}` must be None: this package computes the text part of Gemma 3, without "
            f"images. Received: {name}={value!r}"
        )
