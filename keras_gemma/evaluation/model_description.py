"""Description of a model in results, and the digest that ties answers to it."""

import hashlib
import json
from importlib.metadata import version
from typing import Any

import keras
import numpy as np
from lm_eval.api.model import LM

from keras_gemma import backend
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.version import __version__

DIGEST_ROWS = 1 << 14
"""Rows of a weight that are hashed at a time."""


def describe_model(lm: GemmaCausalLM | LM, name: str | None) -> dict[str, Any]:
    """Returns name, precision and digest of a model."""
    if not isinstance(lm, GemmaCausalLM):
        name = name or type(lm).__name__
        return {"name": name, "digest": hashlib.sha256(name.encode()).hexdigest()}
    quantization = lm.backbone.quantization
    return {
        "name": name or lm.name,
        "digest": digest_of_weights(lm),
        "parameters": lm.backbone.config.parameter_count,
        "dtype": str(lm.backbone.compute_dtype),
        "quantization": quantization and quantization.describe(),
        "adapter": lm.adapters.active,
        "backend": keras.config.backend(),
    }


def digest_of_weights(lm: GemmaCausalLM) -> str:
    """Returns a sha256 of all that answers depend on: weights, precision, vocabulary, version."""
    quantization = lm.backbone.quantization
    settings = {
        "config": lm.backbone.config.to_dict(),
        "dtype": str(lm.backbone.dtype_policy.name),
        "quantization": quantization and quantization.to_dict(),
        "adapter": lm.adapters.active,
        "backend": keras.config.backend(),
        "vocabulary": hashlib.sha256(lm.preprocessor.tokenizer.proto).hexdigest(),
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for variable in lm.backbone.weights:
        digest.update(f"{variable.path} {variable.dtype} {variable.shape}".encode())
        # In parts, because a copy of the embedding in float32 is larger than the model.
        for start in range(0, variable.shape[0], DIGEST_ROWS):
            part = backend.to_numpy(variable.value[start : start + DIGEST_ROWS])
            digest.update(np.ascontiguousarray(part).reshape(-1).view("uint8"))
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make scores."""
    packages = ("lm_eval", "keras", keras.config.backend())
    return {"keras_gemma": __version__} | {name: version(name) for name in packages}
