"""The request body of the chat-completions API."""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ovis_jax.server.errors import bad_request

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

Ignored = Annotated[Any, Field(description="Accepted, without effect on the answer.")]


def unsupported(*harmless: Any) -> Any:
    """Declare an unsupported field, for which only null and the `harmless` values are accepted."""
    return Field(
        None,
        description="Not supported: only values without effect on the answer are accepted.",
        json_schema_extra={"enum": [None, *harmless]},
    )


class TextPart(BaseModel):
    """Text within a message."""

    model_config = STRICT
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class ImageUrl(BaseModel):
    """The URL of an image."""

    model_config = STRICT
    url: str = Field(description="data:image/png;base64,... or, if allowed, http(s)://...")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low encodes the image as one crop; must be the same for all images."
    )


class ImagePart(BaseModel):
    """An image within a message."""

    model_config = STRICT
    type: Literal["image_url"]
    image_url: ImageUrl
    prompt_cache_breakpoint: Ignored = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("as_text")] | Annotated[list[Part], Tag("as_parts")],
    Discriminator(lambda value: "as_parts" if isinstance(value, list) else "as_text"),
]


class ChatMessage(BaseModel):
    """One message. System and developer messages are prepended to the next user message."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored = None
    annotations: Ignored = None
    audio: Any = unsupported()
    function_call: Any = unsupported()
    refusal: Any = unsupported()
    tool_calls: Any = unsupported([])


class StreamOptions(BaseModel):
    """Options for a streamed response."""

    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class ChatRequest(BaseModel):
    """The body of a request to /v1/chat/completions."""

    model_config = STRICT
    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(
        None, ge=1, description="The older name of max_completion_tokens."
    )
    temperature: float | None = Field(None, ge=0, le=2, description="1 by default.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    top_k: int | None = Field(None, ge=1, lt=2**31, description="An extension of OpenAI's API.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="An extension of OpenAI's API."
    )
    max_partition: int | None = Field(
        None,
        ge=1,
        description="Maximum number of cells per image, an extension of OpenAI's API.",
    )

    audio: Any = unsupported()
    frequency_penalty: Any = unsupported(0)
    function_call: Any = unsupported("none", "auto")
    functions: Any = unsupported([])
    logit_bias: Any = unsupported({})
    modalities: Any = unsupported(["text"])
    moderation: Any = unsupported()
    prediction: Any = unsupported()
    presence_penalty: Any = unsupported(0)
    reasoning_effort: Any = unsupported("none")
    response_format: Any = unsupported({"type": "text"})
    tool_choice: Any = unsupported("none", "auto")
    tools: Any = unsupported([])
    verbosity: Any = unsupported("medium")
    web_search_options: Any = unsupported()

    metadata: Ignored = None
    parallel_tool_calls: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings as a tuple, which may be empty."""
        stop = self.stop if self.stop is not None else []
        return (stop,) if isinstance(stop, str) else tuple(stop)

    def check_supported(self, max_choices: int) -> None:
        """Check for unsupported or contradictory fields.

        Args:
          max_choices: Maximum value of the field `n`.

        Raises:
          ApiError: A field is not supported, or it contradicts another field (status 400).
        """

        def check(holds: bool, param: str, message: str) -> None:
            if not holds:
                raise bad_request(param, message)

        _check_fields(self)
        for number, message in enumerate(self.messages):
            _check_fields(message, f"messages[{number}].")
        both, stop = (self.max_tokens, self.max_completion_tokens), self.stop_strings
        check(None in both or both[0] == both[1], "max_tokens", "max_completion_tokens differs")
        check((self.n or 1) <= max_choices, "n", f"{self.n}, but the maximum is {max_choices}")
        check(len(stop) <= 4, "stop", f"{len(stop)} stop strings, but the maximum is 4")
        check(all(stop), "stop", "an empty string would stop every answer at once")
        log_probs = self.top_logprobs is None or self.logprobs is True
        check(log_probs, "top_logprobs", "this field needs logprobs: true")
        streams = self.stream_options is None or self.stream is True
        check(streams, "stream_options", "this field needs stream: true")


def _check_fields(model: BaseModel, prefix: str = "") -> None:
    for name, info in type(model).model_fields.items():
        if isinstance(info.json_schema_extra, dict):  # see `unsupported`
            if getattr(model, name) not in cast(list[Any], info.json_schema_extra["enum"]):
                raise bad_request(f"{prefix}{name}", "not supported by this server", "unsupported")
