"""All formats implement the interface `Format`."""

import inspect

import pytest

from keras_gemma.cli import convert
from keras_gemma.storage.formats import FORMATS, Format
from keras_gemma.storage.hub.upload import check_preset
from tests.configurations import GEMMA1
from tests.storage.conftest import make_backbone

FUNCTIONS = [name for name, value in vars(Format).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("name", FORMATS)
def test_members(name):
    for attribute in Format.__annotations__:
        assert hasattr(FORMATS[name], attribute)
    for function in FUNCTIONS:
        if not function.startswith("_"):
            parameters = list(inspect.signature(getattr(Format, function)).parameters)[1:]
            implementation = getattr(FORMATS[name], function)
            assert list(inspect.signature(implementation).parameters) == parameters


def test_formats_of_convert():
    assert {format.value for format in convert.Format} == {*FORMATS, "gguf"}


def test_check_of_quantized_preset(tmp_path):
    backbone = make_backbone(GEMMA1)
    backbone.quantize("int8")
    backbone.save_to_preset(tmp_path / "model")
    format, config = check_preset(tmp_path / "model", allow_incomplete=True)
    assert format is FORMATS["keras"]
    assert config == backbone.config
