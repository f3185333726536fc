"""Tool formats by name."""

from collections.abc import Sequence
from typing import Any, Protocol

from keras_gemma.checks import check_one_of
from keras_gemma.text.chat import Message
from keras_gemma.text.function_gemma import START_CALL, FunctionGemmaToolFormat
from keras_gemma.text.gemma3_tools import Gemma3ToolFormat
from keras_gemma.text.tokenizer import GemmaTokenizer
from keras_gemma.text.tool_calls import Tool, ToolParser


class ToolFormat(Protocol):
    """Format in which a model reads and writes tools. `Gemma3ToolFormat` describes the methods."""

    name: str

    def encode(
        self, tokenizer: GemmaTokenizer, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> list[int]: ...

    def response_format(
        self, tools: Sequence[Tool], tool_choice: Any, parallel: bool = True
    ) -> dict[str, Any] | None: ...

    def parser(self, tools: Sequence[Tool]) -> ToolParser: ...


TOOL_FORMATS: dict[str, ToolFormat] = {
    format.name: format for format in (Gemma3ToolFormat(), FunctionGemmaToolFormat())
}


def tool_format_of(tokenizer: GemmaTokenizer, name: str | None = None) -> ToolFormat:
    """Returns the tool format of a model.

    Args:
        tokenizer: Tokenizer of the model.
        name: One of `TOOL_FORMATS`. `None` chooses by the control tokens of the vocabulary.

    Raises:
        ValueError: If the name is unknown.
    """
    if name is None:
        has_tokens = START_CALL in tokenizer.pieces.control_tokens
        name = "functiongemma" if has_tokens else "gemma3"
    check_one_of("tool_format", name, TOOL_FORMATS)
    return TOOL_FORMATS[name]
