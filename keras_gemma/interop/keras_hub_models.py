"""Converts models to KerasHub's and back, without files.

Weights move one at a time, with the shapes of `storage/keras_preset/layout.py`. Knows KerasHub's
attributes.
"""

import operator
import warnings
from typing import Any

import numpy as np
from keras import ops

from keras_gemma.backend import assign, uninitialized
from keras_gemma.causal_lm.model import GemmaCausalLM
from keras_gemma.config import GemmaConfig
from keras_gemma.gemma3 import Gemma3CausalLM
from keras_gemma.interop.keras_hub_samplers import convert_sampler, keras_hub, set_sampler
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.storage.keras_preset.layout import h5_specs, layer_path
from keras_gemma.text.preprocessor import GemmaCausalLMPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer


def to_keras_hub(item: Any) -> Any:
    """Converts a model to KerasHub's, with the same weights, dtype policy and settings.

    Emits a `UserWarning` about anything that KerasHub computes differently.

    Args:
        item: A `GemmaCausalLM`, `GemmaBackbone`, `GemmaCausalLMPreprocessor` or `GemmaTokenizer`,
            or their Gemma 3 counterpart.

    Returns:
        An object of the class with that name in `keras_hub.models`. A `GemmaCausalLM` is compiled
        with the same sampler if KerasHub has it. Optimizers and `context_length` are not converted.

    Raises:
        ImportError: If KerasHub is not installed.
        TypeError: If `item` is of another class.
        ValueError: If the model is quantized, or KerasHub cannot express it.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    theirs = keras_gemma.to_keras_hub(lm)
    theirs.generate("ROMEO:", max_length=32)
    ```
    """
    keras_hub()  # raises if it is not installed
    if isinstance(item, GemmaCausalLM):
        _warn_where_keras_hub_differs(item.backbone.config)
        family = item.backbone.config.family
        preprocessor = item.preprocessor
        if preprocessor is not None:
            preprocessor = _convert_preprocessor(
                preprocessor, _theirs(family, "CausalLMPreprocessor")
            )
            preprocessor.build(None)  # otherwise Keras warns about unbuilt state
        backbone = _backbone_to(item.backbone)
        theirs = _theirs(family, "CausalLM")(
            backbone=backbone, preprocessor=preprocessor, name=item.name
        )
        theirs.compile(sampler=convert_sampler(item.sampler))
        return theirs
    if isinstance(item, GemmaBackbone):
        _warn_where_keras_hub_differs(item.config)
        return _backbone_to(item)
    if isinstance(item, GemmaCausalLMPreprocessor):
        family = item.tokenizer_cls.family
        return _convert_preprocessor(item, _theirs(family, "CausalLMPreprocessor"))
    if isinstance(item, GemmaTokenizer):
        return _convert_tokenizer(item, _theirs(item.family, "Tokenizer"))
    raise TypeError(
        "`item` must be a GemmaCausalLM, GemmaBackbone, GemmaCausalLMPreprocessor or "
        f"GemmaTokenizer of keras_gemma. Received: {_class_of(item)}"
    )


def from_keras_hub(item: Any) -> Any:
    """Converts KerasHub's model to ours, with the same weights, dtype policy and settings.

    Our model follows `query_head_dim_normalize=False` and applies `layer_norm_epsilon` in every
    block, which KerasHub does not.

    Args:
        item: A `GemmaCausalLM`, `GemmaBackbone`, `GemmaCausalLMPreprocessor` or `GemmaTokenizer`
            of `keras_hub.models`, their Gemma 3 counterpart, or an object of a subclass.

    Returns:
        An object of the class with that name in `keras_gemma.models`. A `GemmaCausalLM` is compiled
        with the same sampler. Optimizers are not converted.

    Raises:
        ImportError: If KerasHub is not installed.
        TypeError: If `item` is of another class.
        ValueError: If the model has LoRA, is quantized, has several dtypes or reads images.

    Example:

    ```python
    import keras_gemma

    lm = keras_gemma.models.GemmaCausalLM.from_preset("gemma_tiny_en")
    again = keras_gemma.from_keras_hub(keras_gemma.to_keras_hub(lm))
    again.generate("ROMEO:", max_length=32)
    ```
    """
    for family, classes in _OURS.items():
        task, backbone, preprocessor, tokenizer = (
            _theirs(family, name) for name in ("CausalLM", "Backbone", *_TEXT)
        )
        if isinstance(item, task):
            text = item.preprocessor
            if text is not None:
                if not isinstance(text, preprocessor):
                    raise TypeError(
                        f"The model's `preprocessor` must be a `keras_hub.models."
                        f"{family}CausalLMPreprocessor`: set it to None for the conversion, and "
                        f"set your own afterwards. Received: {_class_of(text)}"
                    )
                text = _convert_preprocessor(text, classes.preprocessor_cls)
            lm = classes(_backbone_from(item.backbone, family), text, name=item.name)
            set_sampler(lm, getattr(item, "sampler", None))
            return lm
        if isinstance(item, backbone):
            return _backbone_from(item, family)
        if isinstance(item, preprocessor):
            return _convert_preprocessor(item, classes.preprocessor_cls)
        if isinstance(item, tokenizer):
            return _convert_tokenizer(item, classes.preprocessor_cls.tokenizer_cls)
    raise TypeError(
        "`item` must be a CausalLM, Backbone, CausalLMPreprocessor or Tokenizer of Gemma or "
        f"Gemma 3, of keras_hub.models. Received: {_class_of(item)}"
    )


_OURS = {"Gemma": GemmaCausalLM, "Gemma3": Gemma3CausalLM}
"""Our task of each family of KerasHub's classes. It names the classes of its parts."""
_TEXT = ("CausalLMPreprocessor", "Tokenizer")


def _theirs(family: str, name: str) -> type:
    """Returns KerasHub's class, such as `Gemma3Tokenizer`."""
    return getattr(keras_hub().models, family + name)


# Backbones.


def _backbone_to(ours: GemmaBackbone) -> Any:
    if ours.quantization is not None:
        raise ValueError(
            "KerasHub cannot hold weights in this quantization: convert the unquantized model, "
            "or call `lm.save_to_hugging_face(folder)`, which writes floating-point "
            f"numbers. Received: {ours.name!r} in {ours.quantization.describe()}"
        )
    with uninitialized():
        theirs = _theirs(ours.config.family, "Backbone")(
            **ours.config.to_keras_hub(), dtype=ours.dtype_policy.name, name=ours.name
        )
    specs, layers = h5_specs(ours.config), _weight_layers(theirs, ours.config)
    for name, weight in ours.named_weights().items():
        # `numpy` made a copy, so the variable may share its memory.
        array = np.ascontiguousarray(specs[name].to_stored(weight.numpy()))
        assign(layers[name].weights[0], array)
    theirs.trainable = ours.trainable
    return theirs


def _backbone_from(theirs: Any, family: str) -> GemmaBackbone:
    values = theirs.get_config()
    if values.get("vision_encoder") is not None:
        raise ValueError(
            "The model reads images, and only text models can be converted. Save it with "
            "`save_to_preset(folder)`; `keras_gemma.models.Gemma3CausalLM.from_preset(folder)` "
            f"reads its text part. Received: {theirs.name!r} with a vision encoder"
        )
    config = GemmaConfig.from_keras_hub(family, values)
    specs, layers = h5_specs(config), _weight_layers(theirs, config)
    dtype = _dtype_name(theirs.name, list(layers.values()))
    with uninitialized():
        cls = _OURS[family].backbone_cls
        ours = cls(**cls.arguments_of(config.to_dict()), dtype=dtype, name=theirs.name)
    for name, weight in ours.named_weights().items():
        array = ops.convert_to_numpy(layers[name].weights[0].value)
        weight.assign(specs[name].to_logical(array))
    ours.trainable = theirs.trainable
    return ours


def _weight_layers(theirs: Any, config: GemmaConfig) -> dict[str, Any]:
    """Returns the layer of KerasHub's backbone that holds each weight, by the weight's name."""
    layers = {"token_embedding": theirs.token_embedding, "final_norm": theirs.layer_norm}
    for name in config.weight_shapes().keys() - layers.keys():
        _, layer, kind = name.split(".")
        block = theirs.transformer_layers[int(layer)]
        path = layer_path(kind).replace("/", ".")
        layers[name] = operator.attrgetter(path)(block)
    return layers


def _dtype_name(name: str, layers: list[Any]) -> str:
    """Returns the name of the dtype policy that all layers share. Refuses LoRA and quantization."""
    modes = {layer.quantization_mode for layer in layers} - {None}
    if modes:
        raise ValueError(
            "The model is quantized, but only floating-point weights can be converted: load it "
            "again without `quantize` or a quantized `dtype`. "
            f"Received: {name!r} in {', '.join(sorted(modes))}"
        )
    if any(getattr(layer, "lora_enabled", False) for layer in layers):
        raise ValueError(
            "The model has LoRA adapters. Merge them: `save_to_preset(folder)` of KerasHub writes "
            "the merged weights, and `keras_gemma.models.GemmaCausalLM.from_preset(folder)` reads "
            f"them. Received: {name!r} with `enable_lora`"
        )
    dtypes = {(layer.variable_dtype, layer.compute_dtype) for layer in layers}
    if len(dtypes) > 1:
        raise ValueError(
            "All layers must have one dtype policy: load the model with `dtype='bfloat16'` or "
            f"'float32'. Received: {name!r} with {sorted(dtypes)}"
        )
    variable, compute = dtypes.pop()
    return variable if variable == compute else f"mixed_{compute}"


def _warn_where_keras_hub_differs(config: GemmaConfig) -> None:
    differences = []
    if not config.query_head_dim_normalize and config.query_scale != config.head_dim**-0.5:
        differences.append(
            "`query_head_dim_normalize=False` is ignored, so attention is scaled by "
            f"1/sqrt({config.head_dim}) instead of 1/sqrt({config.hidden_dim} / "
            f"{config.num_query_heads})"
        )
    if config.layer_norm_epsilon != 1e-6:
        differences.append(
            f"`layer_norm_epsilon={config.layer_norm_epsilon}` is used only by the last norm, and "
            "the blocks use 1e-06"
        )
    if differences:
        warnings.warn(
            "Weights and configuration are the same, but KerasHub computes differently: "
            + "; ".join(differences),
            UserWarning,
            stacklevel=3,
        )


# Text.


def _convert_preprocessor(item: Any, cls: type) -> Any:
    """Converts `item` and its tokenizer to `cls`, the class of the other library."""
    names = ("name", "sequence_length", "add_start_token", "add_end_token")
    tokenizer = _convert_tokenizer(item.tokenizer, cls.tokenizer_cls)
    return cls(tokenizer, **{name: getattr(item, name) for name in names})


def _convert_tokenizer(item: Any, cls: type) -> Any:
    names = ("proto", "name", "sequence_length", "add_bos", "add_eos")
    values = {name: getattr(item, name) for name in names}
    if cls.__name__ == "Gemma3Tokenizer":  # a vocabulary need not have tokens for images
        values["has_vision_tokens"] = False
    return cls(dtype=item.compute_dtype, **values)


def _class_of(item: Any) -> str:
    return f"{type(item).__module__}.{type(item).__qualname__}"
