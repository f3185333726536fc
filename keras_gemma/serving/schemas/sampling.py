"""Fields of requests that several APIs share."""

import hashlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

MAX_STOPS = 64
"""Maximum number of stop strings."""

MAX_STOP_LENGTH = 1000
"""Maximum length of a stop string, in characters."""

MIN_TEMPERATURE = 1e-5
"""Temperatures below it are greedy, because logits divided by them are infinite."""

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
"""Stop string."""


class Body(BaseModel):
    """Body of a request. Unknown fields are accepted, because clients send them."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=())


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None


class SamplingBody(Body):
    """Sampling settings with OpenAI's names, and the usual additions."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=128)
    stop: StopString | list[StopString] | None = None
    seed: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    top_k: int | None = Field(None, ge=-1, description="-1 and 0 disable the filter.")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = Field(None, max_length=16)
    cache_salt: str | None = Field(None, max_length=256)

    @field_validator("stop")
    @classmethod
    def check_stop(cls, value: Any) -> Any:
        if isinstance(value, list) and len(value) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings are supported")
        return value

    @property
    def stops(self) -> list[str]:
        """Stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def includes_usage(self) -> bool:
        """True if a stream ends with the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def engine_settings(self, stop_token_ids: tuple[int, ...], salt: str) -> dict[str, Any]:
        """Returns the arguments of `EngineRequest` that this body sets.

        Args:
            stop_token_ids: Stop tokens of the model.
            salt: Salt of the API key in the prefix cache.
        """
        stop_ids = () if self.ignore_eos else stop_token_ids
        return {
            **random_settings(self.temperature, self.top_k, self.top_p, self.min_p, self.seed),
            "repetition_penalty": self.repetition_penalty or 1.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "logit_bias": self.logit_bias or {},
            "stop_token_ids": tuple(dict.fromkeys((*stop_ids, *(self.stop_token_ids or ())))),
            "cache_salt": salt_of(salt, self.cache_salt) if self.cache_salt else salt,
        }


def salt_of(salt: str, more: str) -> str:
    """Returns a salt of the prefix cache that depends on both."""
    # A request may contain half of a surrogate pair.
    return hashlib.sha256(f"{salt}/{more}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def random_settings(
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Returns sampling arguments of `EngineRequest`, without filters that keep all tokens."""
    # The most likely token always remains, so top_p = 0 is greedy.
    is_greedy = top_p == 0 or (temperature is not None and temperature < MIN_TEMPERATURE)
    return {
        "temperature": 0.0 if is_greedy else 1.0 if temperature is None else temperature,
        "top_k": top_k if top_k is not None and top_k > 0 else None,
        "top_p": top_p if top_p is not None and 0 < top_p < 1 else None,
        "min_p": min_p or None,
        "seed": None if seed is None else seed % 2**32,
    }
