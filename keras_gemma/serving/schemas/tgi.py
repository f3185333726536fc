"""Bodies of the routes of Text Generation Inference."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from keras_gemma.serving.schemas.sampling import Body, StopString, random_settings

DEFAULT_MAX_NEW_TOKENS = 100
"""Maximum number of new tokens in TGI, if the request does not have one."""

MAX_BEST_OF = 16
"""Maximum number of sequences per request."""

MAX_STOP_SEQUENCES = 64
"""Maximum number of stop strings per request."""


class Grammar(Body):
    """Constraint of the text."""

    type: Literal["json", "regex", "json_schema"]
    value: Any

    def response_format(self) -> dict[str, Any]:
        """Returns the constraint as a response format of OpenAI."""
        if self.type == "regex":
            return {"type": "regex", "regex": self.value}
        value = self.value
        schema = value.get("schema", value) if self.type == "json_schema" else value
        return {"type": "json_schema", "json_schema": {"name": "grammar", "schema": schema}}

    @model_validator(mode="after")
    def check_value(self) -> "Grammar":
        expected = str if self.type == "regex" else dict
        if not isinstance(self.value, expected):
            kind = "a string" if expected is str else "an object"
            raise ValueError(f"`value` of a grammar of type {self.type!r} must be {kind}")
        return self


class Parameters(Body):
    """Settings of a request."""

    best_of: int | None = Field(None, ge=1, le=MAX_BEST_OF)
    temperature: float | None = Field(None, gt=0, le=100)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    do_sample: bool = False
    max_new_tokens: int | None = Field(DEFAULT_MAX_NEW_TOKENS, ge=1)
    return_full_text: bool | None = None
    stop: Annotated[list[StopString], Field(max_length=MAX_STOP_SEQUENCES)] | None = None
    truncate: int | None = Field(None, ge=1)
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: int | None = None
    top_n_tokens: int | None = Field(None, ge=0, le=20)
    grammar: Grammar | None = None
    adapter_id: str | None = None

    @model_validator(mode="after")
    def check_fields(self) -> "Parameters":
        if self.watermark:
            raise ValueError("`watermark` is not supported")
        if self.adapter_id is not None:
            raise ValueError("`adapter_id` is not supported: load the adapter when you start")
        if self.typical_p is not None and self.typical_p < 1:
            raise ValueError("`typical_p` below 1 is not supported. Use `top_p`")
        if self.is_greedy and (self.best_of or 1) > 1:
            raise ValueError("`best_of` above 1 needs `do_sample`")
        return self

    @property
    def is_greedy(self) -> bool:
        """True if the most likely tokens are chosen."""
        filters = (self.temperature, self.top_k, self.top_p, self.typical_p)
        return not self.do_sample and all(value is None for value in filters)

    def engine_settings(self) -> dict[str, Any]:
        """Returns the arguments of `EngineRequest` that these parameters set."""
        temperature = 0.0 if self.is_greedy else self.temperature
        return {
            **random_settings(temperature, self.top_k, self.top_p, None, self.seed),
            "repetition_penalty": self.repetition_penalty or 1.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "top_logprobs": self.top_n_tokens or 0,
        }


class GenerateBody(Body):
    """Body of `/generate` and `/generate_stream`."""

    inputs: str
    parameters: Parameters = Field(default_factory=Parameters)


class CompatBody(GenerateBody):
    """Body of `/`."""

    stream: bool = False
