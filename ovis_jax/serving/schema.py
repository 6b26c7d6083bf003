"""What a request of the chat-completions API may say, and what of it this server does not do."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from ovis_jax.serving.refusals import ApiError

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""Fields that would change the answer and are not supported, with what may stand there anyway."""

NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": (),
    "refusal": (),
    "tool_calls": ([],),
}
"""The same in a message, where clients send back what they were answered."""

Ignored = Annotated[Any, Field(description="Accepted, and without effect on the answer.")]
Refused = Annotated[Any, Field(description="Not supported: only what has no effect is accepted.")]


class TextPart(BaseModel):
    """Text within a message."""

    model_config = STRICT
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class ImageUrl(BaseModel):
    """Where an image is."""

    model_config = STRICT
    url: str = Field(description="data:image/png;base64,... or, where allowed, http(s)://...")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low reads the whole image as one crop; the same for all images"
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


class Message(BaseModel):
    """One turn. What system and developer say is put before the next turn of the user."""

    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Ignored = None
    annotations: Ignored = None
    audio: Refused = None
    function_call: Refused = None
    refusal: Refused = None
    tool_calls: Refused = None


class StreamOptions(BaseModel):
    """What a stream tells besides the answer."""

    model_config = STRICT
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class ChatRequest(BaseModel):
    """The body of /v1/chat/completions."""

    model_config = STRICT
    model: str
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1, description="The older name of the same.")
    temperature: float | None = Field(None, ge=0, le=2, description="1 where it is not given.")
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    top_k: int | None = Field(None, ge=1, lt=2**31, description="Not of OpenAI's API.")
    repetition_penalty: float | None = Field(
        None, ge=0.01, le=100, description="Not of OpenAI's API."
    )
    max_partition: int | None = Field(
        None, ge=1, description="Not of OpenAI's API: the most cells an image is cut into."
    )

    audio: Refused = None
    frequency_penalty: Refused = None
    function_call: Refused = None
    functions: Refused = None
    logit_bias: Refused = None
    modalities: Refused = None
    moderation: Refused = None
    prediction: Refused = None
    presence_penalty: Refused = None
    reasoning_effort: Refused = None
    response_format: Refused = None
    tool_choice: Refused = None
    tools: Refused = None
    verbosity: Refused = None
    web_search_options: Refused = None

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
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        given = self.stop if self.stop is not None else []
        return (given,) if isinstance(given, str) else tuple(given)

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, by either name."""
        return self.max_completion_tokens or self.max_tokens

    def check(self, choices: int) -> None:
        """Refuse what is not supported, or contradicts itself; `choices` is the most of `n`.

        Raises:
          ApiError: names the field.
        """

        def refuse(holds: bool, name: str, message: str) -> None:
            if not holds:
                raise ApiError(400, f"{name}: {message}", param=name, code="invalid_value")

        _refuse_unsupported(self, NEUTRAL, "")
        for number, message in enumerate(self.messages):
            _refuse_unsupported(message, NEUTRAL_IN_MESSAGES, f"messages[{number}].")
        both = self.max_tokens, self.max_completion_tokens
        refuse(None in both or both[0] == both[1], "max_tokens", "max_completion_tokens differs")
        refuse((self.n or 1) <= choices, "n", f"{self.n} answers, but at most {choices} at once")
        refuse(len(self.stops) <= 4, "stop", f"{len(self.stops)} stop strings, at most 4 are taken")
        refuse(all(self.stops), "stop", "an empty string would stop at once")
        asks = self.top_logprobs is None or self.logprobs is True
        refuse(asks, "top_logprobs", "it needs logprobs: true")
        streams = self.stream_options is None or self.stream is True
        refuse(streams, "stream_options", "it needs stream: true")


def _refuse_unsupported(given: BaseModel, neutral: dict[str, tuple[Any, ...]], prefix: str) -> None:
    for name, harmless in neutral.items():
        value = getattr(given, name)
        if value is not None and value not in harmless:
            name = prefix + name
            raise ApiError(
                400, f"{name}: not supported by this server", param=name, code="unsupported"
            )
