"""A decoder block: attention and feed forward, each normalised and added to the residual."""

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


def rematerialized(compute: Callable[[Any, Any], Any], x: Any, weights: dict[str, Any]) -> Any:
    """`compute(x, weights)`, of which nothing is kept for the gradient: it is computed anew."""
    leaves = keras.tree.flatten(weights)
    # What has a gradient are arguments, as TensorFlow wants it; the rest is closed over.
    floats = [
        i
        for i, leaf in enumerate(leaves)
        if ops.is_tensor(leaf) and "float" in keras.backend.standardize_dtype(leaf.dtype)
    ]

    def from_leaves(x: Any, *given: Any) -> Any:
        whole = list(leaves)
        for i, leaf in zip(floats, given, strict=True):
            whole[i] = leaf
        return compute(x, keras.tree.pack_sequence_as(weights, whole))

    return keras.remat(from_leaves)(x, *(leaves[i] for i in floats))


@keras.saving.register_keras_serializable(package="keras_gemma")
class GemmaDecoderBlock(keras.layers.Layer):
    """Holds the weights of one block; `layer` is its 0-based place, which decides its window."""

    def __init__(
        self, config: GemmaConfig, layer: int, quantization: Any = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.layer = layer
        policy = self.dtype_policy
        how = {"quantization": quantization, "dtype": policy}

        def norm(name: str) -> RMSNormalization:
            return RMSNormalization(config.layer_norm_epsilon, dtype=policy, name=name)

        self.pre_attention_norm = norm("pre_attention_norm")
        self.attention = GemmaAttention(config, **how, name="attention")
        if config.use_post_attention_norm:
            self.post_attention_norm = norm("post_attention_norm")
        self.pre_ffw_norm = norm("pre_ffw_norm")
        self.gating_ffw = Linear(config.feed_forward_dim, **how, name="ffw_gating")
        self.gating_ffw_2 = Linear(config.feed_forward_dim, **how, name="ffw_gating_2")
        self.ffw_linear = Linear(config.hidden_dim, **how, name="ffw_linear")
        if config.use_post_ffw_norm:
            self.post_ffw_norm = norm("post_ffw_norm")
        self.dropout = keras.layers.Dropout(config.dropout, dtype=policy, name="dropout")
        self.rematerialize = False  # whether training computes the block anew for its gradient
        self.lora_dropout = 0.0  # of the adapter that is on
        self.lora_seed: keras.random.SeedGenerator | None = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        inner_shape = (*input_shape[:-1], self.config.feed_forward_dim)
        for layer in keras_internals.sublayers(self):
            layer.build(inner_shape if layer is self.ffw_linear else input_shape)
        self.built = True

    def holders(self) -> dict[str, RMSNormalization | Linear]:
        """The layer that holds each weight, by the weight's name in `weight_shapes`."""
        holders = {
            "pre_attention_norm": self.pre_attention_norm,
            "query": self.attention.query_dense,
            "key": self.attention.key_dense,
            "value": self.attention.value_dense,
            "output": self.attention.output_dense,
            "post_attention_norm": getattr(self, "post_attention_norm", None),
            "pre_ffw_norm": self.pre_ffw_norm,
            "gate": self.gating_ffw,
            "up": self.gating_ffw_2,
            "down": self.ffw_linear,
            "post_ffw_norm": getattr(self, "post_ffw_norm", None),
        }
        return {name: holder for name, holder in holders.items() if holder is not None}

    def tensors(self) -> dict[str, Any]:
        """The packed weights in the compute dtype: what `decoder_block` takes."""
        return {name: holder.tensor for name, holder in self.holders().items()}

    def add_lora_seed(self) -> None:
        """Make what the dropout of adapters draws from."""
        if self.lora_seed is None:
            with keras_internals.adding_weights(self):
                # With an explicit seed, because PyTorch otherwise draws from a global generator.
                self.lora_seed = keras.random.SeedGenerator(random.randrange(1 << 30))

    def training_tensors(self) -> dict[str, Any]:
        """`tensors`, where adapters do not see all of what they are multiplied with."""
        if not self.lora_dropout:
            return self.tensors()
        drop = partial(keras.random.dropout, rate=self.lora_dropout, seed=self.lora_seed)
        return {
            name: tensor._replace(drop=drop) if isinstance(tensor, LoraWeight) else tensor
            for name, tensor in self.tensors().items()
        }

    def call(self, x: Any, padding_mask: Any = None, training: bool | None = None) -> Any:
        """`[B, T, D]` -> `[B, T, D]`; `padding_mask [B, T]` is as of `causal_mask`."""
        b, t = ops.shape(x)[0], ops.shape(x)[1]
        if padding_mask is None:
            padding_mask = ops.ones((b, t), dtype="bool")
        positions = ops.arange(t, dtype="int32")[None]

        def drop(half: Any) -> Any:
            return self.dropout(half, training=training)

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

    def compute_output_spec(
        self, x: Any, padding_mask: Any = None, training: bool | None = None
    ) -> keras.KerasTensor:
        return keras.KerasTensor(x.shape, dtype=self.compute_dtype)

    def get_config(self) -> dict[str, Any]:
        own = {"config": self.config.to_dict(), "layer": self.layer}
        quantization = self.ffw_linear.quantization
        if quantization is not None:
            own["quantization"] = quantization.to_dict()
        return {**super().get_config(), **own}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GemmaDecoderBlock":
        return cls(**{**config, "config": GemmaConfig.from_dict(config["config"])})
