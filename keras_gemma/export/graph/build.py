"""Builds a SavedModel, on the TensorFlow backend."""

from collections.abc import Callable
from pathlib import Path

import tensorflow as tf

from keras_gemma.export.graph.model import Graphs, ServedModel, add_functions
from keras_gemma.export.serving_options import ServingOptions
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor


def build(
    backbone: GemmaBackbone,
    preprocessor: GemmaCausalLMPreprocessor,
    options: ServingOptions,
    directory: Path,
    say: Callable[[str], None],
) -> None:
    """Write a SavedModel into `directory`.

    Args:
        say: told what is being done.
    """
    served = ServedModel(backbone, preprocessor)
    signatures = add_functions(served, Graphs(served, backbone, preprocessor, options), say)
    # This traces them too: what is traced before, it traces again.
    tf.saved_model.save(served, str(directory), signatures=signatures)
