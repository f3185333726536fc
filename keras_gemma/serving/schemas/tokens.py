"""Bodies of `/tokenize` and `/detokenize`, in three dialects that their fields tell apart."""

from typing import Annotated

from pydantic import Field, model_validator

from keras_gemma.serving.schemas.chat import Message, Tool
from keras_gemma.serving.schemas.sampling import Body


class TokenizeBody(Body):
    """Body of `/tokenize`: TGI has `inputs`, vLLM `prompt` or `messages`, llama.cpp `content`."""

    model: str | None = None
    inputs: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False
    return_token_strs: bool = False

    @model_validator(mode="after")
    def check_fields(self) -> "TokenizeBody":
        names = ("inputs", "prompt", "messages", "content")
        if sum(getattr(self, name) is not None for name in names) != 1:
            raise ValueError("Pass one of `inputs`, `prompt`, `messages` and `content`")
        return self


class DetokenizeBody(Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=1_000_000)]
