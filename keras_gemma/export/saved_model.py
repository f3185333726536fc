"""Export to TensorFlow's SavedModel: checks, and the build on the TensorFlow backend.

On JAX or PyTorch, or if the weights have to be quantized first, a subprocess loads the model from
a temporary folder. Imports TensorFlow only for an export.
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
    """Writes the export. Arguments are the same as in `GemmaCausalLM.export`."""
    check(lm, "tf_saved_model")
    options = options_of(lm, max_new_tokens, max_batch_size)
    quantization = to_config(quantization)
    if quantization is not None:
        if lm.backbone.quantization is not None:
            raise ValueError(
                f"The model is already quantized ({lm.backbone.quantization.describe()}): leave "
                f"out `quantization`. Received: quantization={quantization.mode!r}"
            )
        quantization.check_shapes(lm.backbone.config.weight_shapes())
    make(build, lm, directory, "tensorflow", quantization, **dataclasses.asdict(options))


def build(lm: Any, directory: Path, report: Callable[[str], None], **options: Any) -> None:
    """Writes the export on the TensorFlow backend; `options` are fields of `ServingOptions`."""
    import tensorflow as tf

    from keras_gemma.export.graph.model import ServedModel, ServingFunctions, add_functions

    served = ServedModel(lm.backbone, lm.preprocessor)
    functions = ServingFunctions(served, lm, ServingOptions(**options))
    signatures = add_functions(served, functions, report)
    tf.saved_model.save(served, str(directory), signatures=signatures)  # traces the functions
