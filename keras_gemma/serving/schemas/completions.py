"""Body of `/v1/completions`."""

from typing import Annotated

from pydantic import Field, model_validator

from keras_gemma.serving.schemas.chat import ResponseFormat
from keras_gemma.serving.schemas.sampling import SamplingBody

DEFAULT_MAX_TOKENS = 16
"""Maximum number of new tokens in OpenAI's API, if the request does not have one."""

Ids = Annotated[list[int], Field(min_length=1)]
"""Token ids of one prompt."""


class CompletionBody(SamplingBody):
    """Body of `/v1/completions`."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1)]
        | Annotated[list[Ids], Field(min_length=1)]
    )
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: int | None = Field(None, ge=1, le=128)
    suffix: str | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` may be 0 only if `echo` is true")
        if self.best_of is not None and self.best_of < (self.n or 1):
            raise ValueError("`best_of` must be at least `n`")
        if self.stream and self.best_of is not None and self.best_of > (self.n or 1):
            raise ValueError("`best_of` above `n` cannot be streamed, because all must end first")
        if self.suffix:
            raise ValueError("`suffix` is not supported")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """Prompts, as strings or as ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def max_new_tokens(self) -> int:
        """Maximum number of new tokens."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
