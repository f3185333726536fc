"""Checks the arguments of `from_preset` for a class and the parts that its constructor takes.

Knows constructors and their arguments, but no files and no presets. All checks of arguments run
before a preset is looked for.
"""

import inspect
from typing import Any

import keras

from keras_gemma.checks import check_argument_names
from keras_gemma.model.backbone import GemmaBackbone
from keras_gemma.model.quantize import check_policy
from keras_gemma.quantization import to_config
from keras_gemma.text.preprocessor import GemmaPreprocessor
from keras_gemma.text.tokenizer import GemmaTokenizer


def check_arguments(cls: type, load_weights: bool, dtype: Any, kwargs: dict[str, Any]) -> None:
    """Refuses unknown or conflicting arguments of `from_preset`, and invalid dtypes."""
    if not isinstance(load_weights, bool):
        raise TypeError(
            f"`load_weights` must be True or False. Received: load_weights={load_weights!r}"
        )
    _check_dtype(cls, dtype)
    accepted = set().union(*map(_arguments, _parts(cls)))
    check_argument_names(f"{cls.__name__}.from_preset", kwargs, sorted(accepted), ValueError)
    if "quantization" in kwargs and "quantization" in accepted:
        to_config(kwargs["quantization"])
    _check_parts(cls, dtype, kwargs)


def kind_of(cls: type) -> str:
    """Returns the kind of preset part that `cls` is: `"backbone"`, `"tokenizer"`, and so on."""
    if issubclass(cls, GemmaBackbone):
        return "backbone"
    if issubclass(cls, GemmaTokenizer):
        return "tokenizer"
    if issubclass(cls, GemmaPreprocessor):
        return "preprocessor"
    if hasattr(cls, "backbone_cls") and hasattr(cls, "preprocessor_cls"):
        return "task"
    raise TypeError(
        "A preset holds a backbone, a tokenizer, a preprocessor or a task. "
        f"Received: {cls.__module__}.{cls.__qualname__}"
    )


def pop_arguments(cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Removes the arguments of `cls` from `kwargs` and returns them."""
    return {name: kwargs.pop(name) for name in _arguments(cls) & set(kwargs)}


def _check_parts(cls: type, dtype: Any, kwargs: dict[str, Any]) -> None:
    """Refuses a part together with arguments of that part."""
    rest = dict(kwargs)
    own_arguments = pop_arguments(cls, rest)
    if kind_of(cls) == "task":
        for_backbone = pop_arguments(cls.backbone_cls, rest)
        if dtype is not None:
            for_backbone["dtype"] = dtype
        if "backbone" in own_arguments:
            _refuse("backbone", for_backbone)
        if "preprocessor" in own_arguments:
            _refuse("preprocessor", rest)
        else:
            _check_parts(cls.preprocessor_cls, None, rest)
    elif "tokenizer" in own_arguments:
        _refuse("tokenizer", rest)


def _refuse(part: str, arguments: dict[str, Any]) -> None:
    if arguments:
        raise ValueError(
            f"`{part}=` was passed, so {', '.join(sorted(arguments))} cannot apply. "
            f"Set them on the {part} itself."
        )


def _check_dtype(cls: type, dtype: Any) -> None:
    remedy = f"Pass one such as 'bfloat16' or 'float32', or None. Received: dtype={dtype!r}"
    if dtype is None:
        return
    try:
        policy = keras.dtype_policies.get(dtype)
    except (ValueError, TypeError) as error:
        raise ValueError(f"`dtype` must be a dtype or a dtype policy. {remedy}") from error
    if kind_of(cls) in ("backbone", "task"):
        check_policy(policy)
        if "float" not in str(policy.compute_dtype):
            raise ValueError(f"`dtype` of a model must be floating point. {remedy}")


def _parts(cls: type) -> list[type]:
    """Returns `cls` and the classes of its constructor's components, outermost first."""
    parts = [cls]
    for attribute in ("backbone_cls", "preprocessor_cls", "tokenizer_cls"):
        part = getattr(cls, attribute, None)
        if part is not None and kind_of(cls) in ("task", "preprocessor"):
            parts += _parts(part)
    return parts


def _arguments(cls: type) -> set[str]:
    """Returns the names of the constructor arguments of `cls`, down to Keras's own."""
    names = {"name", "trainable"}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] == "keras":
            break
        if "__init__" in vars(base):
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    return names
