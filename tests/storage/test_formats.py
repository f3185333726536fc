"""All formats implement the interface `Format` alike."""

import dataclasses
import inspect
from typing import get_args

import pytest

from keras_gemma.cli import convert
from keras_gemma.storage.format_interface import Format
from keras_gemma.storage.formats import FORMATS
from keras_gemma.storage.hub.upload import check_preset
from tests.configurations import GEMMA1
from tests.storage.conftest import make_backbone

FUNCTIONS = [
    field.name
    for field in dataclasses.fields(Format)
    if "Callable" in str(field.type) and field.default is not None
]
"""Functions that every format has."""


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_have_the_same_parameters(function):
    first, *others = (
        list(inspect.signature(getattr(format, function)).parameters) for format in FORMATS.values()
    )
    assert all(other == first for other in others)


def test_formats_of_convert():
    assert set(get_args(convert.Format)) == {*FORMATS, "gguf"}


def test_check_of_quantized_preset(tmp_path):
    backbone = make_backbone(GEMMA1)
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path / "model")
    format, config = check_preset(tmp_path / "model", allow_incomplete=True)
    assert format is FORMATS["keras"]
    assert config == backbone.config
