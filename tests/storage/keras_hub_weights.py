"""Comparison of models with KerasHub's, weight by weight."""

import numpy as np
import pytest
from keras import ops

# KerasHub leaves the vocabulary's file to the garbage collector.
leaves_a_file_open = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

# KerasHub ignores the 27B models' query scale and the blocks' epsilon.
KERAS_HUB_IS_WRONG = ("gemma2_27b_scale", "gemma2_epsilon", "gemma3_27b_scale")


def assert_same_as_keras_hub(ours, theirs):
    """Compares all weights by KerasHub's attributes, not by the table under test."""
    weights = {name: weight.numpy() for name, weight in ours.named_weights().items()}

    def same(name, value, change):
        expected = change(ops.convert_to_numpy(value).astype("float32"))
        np.testing.assert_array_equal(weights[name].astype("float32"), expected, err_msg=name)

    d = ours.config.hidden_dim
    same("token_embedding", theirs.token_embedding.embeddings, lambda w: w)
    same("final_norm", theirs.layer_norm.scale, lambda w: w)
    for i, block in enumerate(theirs.transformer_layers):
        attention = block.attention
        for name, dense in (
            ("query", attention.query_dense),
            ("key", attention.key_dense),
            ("value", attention.value_dense),
        ):
            rows = lambda w: np.concatenate([head.T for head in w])  # noqa: E731
            same(f"layers.{i}.{name}", dense.kernel, rows)
        same(f"layers.{i}.output", attention.output_dense.kernel, lambda w: w.reshape(-1, d).T)
        same(f"layers.{i}.gate", block.gating_ffw.kernel, np.transpose)
        same(f"layers.{i}.up", block.gating_ffw_2.kernel, np.transpose)
        same(f"layers.{i}.down", block.ffw_linear.kernel, np.transpose)
        same(f"layers.{i}.pre_attention_norm", block.pre_attention_norm.scale, lambda w: w)
        same(f"layers.{i}.pre_ffw_norm", block.pre_ffw_norm.scale, lambda w: w)
        if ours.config.use_query_key_norm:
            same(f"layers.{i}.query_norm", attention.query_norm.scale, lambda w: w)
            same(f"layers.{i}.key_norm", attention.key_norm.scale, lambda w: w)
        if ours.config.use_post_attention_norm:
            same(f"layers.{i}.post_attention_norm", block.post_attention_norm.scale, lambda w: w)
        if ours.config.use_post_ffw_norm:
            same(f"layers.{i}.post_ffw_norm", block.post_ffw_norm.scale, lambda w: w)
