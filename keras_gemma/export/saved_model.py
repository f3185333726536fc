"""TensorFlow's SavedModel: checked here, and built by a TensorFlow of this process or of another.

On JAX or PyTorch, and where the weights have to be quantized first, a second process loads the
model from a folder beside the new one. Imports no TensorFlow.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from keras_gemma.export.serving_options import ServingOptions, options_of
from keras_gemma.export.subprocess_export import check, make
from keras_gemma.quantization import to_config


def write(
    lm: Any,
    directory: Path,
    *,
    max_new_tokens: int | None = None,
    max_batch_size: int | None = None,
    quantization: Any = None,
) -> None:
    """Fill `directory`; see `GemmaCausalLM.export` for the arguments."""
    check(lm, "tf_saved_model", ("tensorflow", "tensorflow_text"), "tensorflow")
    options = options_of(lm, max_new_tokens, max_batch_size)
    quantization = to_config(quantization)
    if quantization is not None:
        if lm.backbone.quantization is not None:
            raise ValueError(
                f"The model is quantized already ({lm.backbone.quantization.describe()}): leave "
                f"out `quantization`. Received: quantization={quantization.mode!r}"
            )
        quantization.check_shapes(lm.backbone.config.weight_shapes())
    make(build, lm, directory, "tensorflow", quantization, **dataclasses.asdict(options))


def build(lm: Any, directory: Path, say: Callable[[str], None], **options: Any) -> None:
    """Fill `directory`, on TensorFlow; `options` are those of `ServingOptions`."""
    from keras_gemma.export.graph import build as graph

    options = ServingOptions(**options)
    graph.build(lm.backbone, lm.preprocessor, options, directory, say)
