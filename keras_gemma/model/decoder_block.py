"""Layer with the weights of one decoder block."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import keras
from keras import ops

from keras_gemma.backend import keras_internals
from keras_gemma.config import GemmaConfig
from keras_gemma.lora.low_rank import LoraWeight
from keras_gemma.model.attention import GemmaAttention, causal_mask
from keras_gemma.model.block import decoder_block
from keras_gemma.model.linear import Linear
from keras_gemma.model.normalization import RMSNormalization
from keras_gemma.model.transformer import run_blocks
from keras_gemma.quantization import join, to_config


def rematerialized(compute: Callable[[Any, Any], Any], x: Any, weights: dict[str, Any]) -> Any:
    """Returns `compute(x, weights)`, without keeping activations for the gradient."""
    leaves = keras.tree.flatten(weights)
    # TensorFlow requires tensors with a gradient as arguments. The others are closed over.
    floats = [
        i
        for i, leaf in enumerate(leaves)
        if ops.is_tensor(leaf) and "float" in keras.backend.standardize_dtype(leaf.dtype)
    ]

    def from_leaves(x: Any, *float_leaves: Any) -> Any:
        all_leaves = list(leaves)
        for i, leaf in zip(floats, float_leaves, strict=True):
            all_leaves[i] = leaf
        return compute(x, keras.tree.pack_sequence_as(weights, all_leaves))

    return keras.remat(from_leaves)(x, *(leaves[i] for i in floats))


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaDecoderBlock(keras.layers.Layer):
    """Layer with the weights of one block. `layer` is its 0-based index, which sets its window."""

    def __init__(
        self, config: GemmaConfig, layer: int, quantization: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.layer = layer
        policy = self.dtype_policy
        quantization = to_config(quantization)

        def linear(kind: str, out_dim: int, name: str) -> Linear:
            return Linear(
                out_dim, quantization and quantization.within(kind), dtype=policy, name=name
            )

        def norm(name: str) -> RMSNormalization:
            return RMSNormalization(config.layer_norm_epsilon, dtype=policy, name=name)

        self.pre_attention_norm = norm("pre_attention_norm")
        self.attention = GemmaAttention(config, quantization, dtype=policy, name="attention")
        if config.use_post_attention_norm:
            self.post_attention_norm = norm("post_attention_norm")
        self.pre_ffw_norm = norm("pre_ffw_norm")
        self.gating_ffw = linear("gate", config.feed_forward_dim, "ffw_gating")
        self.gating_ffw_2 = linear("up", config.feed_forward_dim, "ffw_gating_2")
        self.ffw_linear = linear("down", config.hidden_dim, "ffw_linear")
        if config.use_post_ffw_norm:
            self.post_ffw_norm = norm("post_ffw_norm")
        self.dropout = keras.layers.Dropout(config.dropout, dtype=policy, name="dropout")
        self.rematerialize = False  # True if the gradient recomputes the block
        self.lora_dropout = 0.0  # dropout rate of the active adapter
        self.lora_seed: keras.random.SeedGenerator | None = None

    @property
    def use_sliding_window_attention(self) -> bool:
        """True if this block attends to a sliding window, as in KerasHub."""
        return self.config.is_local(self.layer)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        inner_shape = (*input_shape[:-1], self.config.feed_forward_dim)
        for layer in keras_internals.sublayers(self):
            layer.build(inner_shape if layer is self.ffw_linear else input_shape)
        self.built = True

    def weight_layers(self) -> dict[str, RMSNormalization | Linear]:
        """Returns the layer of each weight, by the weight's name in `weight_shapes`."""
        layers = {
            "pre_attention_norm": self.pre_attention_norm,
            "query": self.attention.query_dense,
            "key": self.attention.key_dense,
            "value": self.attention.value_dense,
            "query_norm": getattr(self.attention, "query_norm", None),
            "key_norm": getattr(self.attention, "key_norm", None),
            "output": self.attention.output_dense,
            "post_attention_norm": getattr(self, "post_attention_norm", None),
            "pre_ffw_norm": self.pre_ffw_norm,
            "gate": self.gating_ffw,
            "up": self.gating_ffw_2,
            "down": self.ffw_linear,
            "post_ffw_norm": getattr(self, "post_ffw_norm", None),
        }
        return {name: layer for name, layer in layers.items() if layer is not None}

    def tensors(self) -> dict[str, Any]:
        """Returns the packed weights in the compute dtype, as arguments of `decoder_block`."""
        return {name: layer.tensor for name, layer in self.weight_layers().items()}

    def add_lora_seed(self) -> None:
        """Creates the seed generator for the dropout of adapters."""
        if self.lora_seed is None:
            with keras_internals.adding_weights(self):
                # With an explicit seed, because PyTorch otherwise draws from a global generator.
                self.lora_seed = keras.random.SeedGenerator(random.randrange(1 << 30))

    def training_tensors(self) -> dict[str, Any]:
        """Same as `tensors`, with dropout for the input of adapters."""
        if not self.lora_dropout:
            return self.tensors()
        drop = partial(keras.random.dropout, rate=self.lora_dropout, seed=self.lora_seed)
        return {
            name: tensor._replace(drop=drop) if isinstance(tensor, LoraWeight) else tensor
            for name, tensor in self.tensors().items()
        }

    def call(self, x: Any, padding_mask: Any, training: bool | None = None) -> Any:
        """Computes the block for `x [B, T, D]`. `padding_mask` is `attended` of `causal_mask`."""
        positions = ops.arange(ops.shape(x)[1], dtype="int32")[None]
        drop = partial(self.dropout, training=training)

        def compute(x: Any, weights: dict[str, Any]) -> Any:
            return run_blocks(
                x,
                [weights],
                self.config,
                positions,
                lambda kind, slots: causal_mask(padding_mask, kind.window),
                first=self.layer,
                block=partial(decoder_block, dropout=drop),
            )[0]

        weights = self.training_tensors() if training else self.tensors()
        if training and self.rematerialize:
            return rematerialized(compute, x, weights)
        return compute(x, weights)

    def compute_output_spec(self, x: Any, **options: Any) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        config = {**super().get_config(), "config": self.config.to_dict(), "layer": self.layer}
        layers = self.weight_layers().items()
        quantization = join({n: one.quantization for n, one in layers if isinstance(one, Linear)})
        if quantization is not None:
            config["quantization"] = quantization.to_dict()
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaDecoderBlock":
        return cls(**{**config, "config": GemmaConfig.from_dict(config["config"])})
