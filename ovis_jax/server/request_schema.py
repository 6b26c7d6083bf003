"""The request bodies of the API.

Unknown fields are ignored, so that clients can send fields for other servers; a response header
lists the ignored fields. Known fields of other servers that would change the answer are rejected.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from ovis_jax.engine.constraints import Constraint, ConstraintKind
from ovis_jax.server.errors import bad_request

FIELDS = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

MAX_MESSAGES = 4096
"""Maximum number of messages."""
MAX_PARTS = 4096
"""Maximum number of content parts per message. `middleware.MAX_JSON_VALUES` limits the total number
in all messages."""

Ignored = Annotated[Any, Field(description="Accepted, without effect on the answer.")]

UNSUPPORTED_EXTENSIONS: dict[str, tuple[Any, ...]] = {
    # vLLM
    "add_special_tokens": (False,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "guided_choice": (),
    "guided_decoding": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "mm_processor_kwargs": ({},),
    "prompt_logprobs": (),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    # SGLang, TGI, llama.cpp, Ollama and hosted models
    "dry_multiplier": (0,),
    "ebnf": (),
    "enable_thinking": (False,),
    "format": (),
    "grammar": (),
    "images": ([],),
    "json_schema": (),
    "lora_path": (),
    "max_length": (),
    "max_new_tokens": (),
    "max_output_tokens": (),
    "mirostat": (0,),
    "n_predict": (),
    "num_predict": (),
    "options": ({},),
    "plugins": ([],),
    "random_seed": (),
    "reasoning": (),
    "regex": (),
    "repeat_penalty": (1,),
    "stop_regex": (),
    "stop_sequences": ([],),
    "system": ("",),
    "thinking": ({"type": "disabled"},),
    "top_a": (0,),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
"""Fields of other servers that would change the answer, each with the values that would not change
it."""


def unsupported(*harmless: Any) -> Any:
    """Declare an unsupported field, for which only null and the `harmless` values are accepted."""
    return Field(
        None,
        description="Not supported: only values without effect on the answer are accepted.",
        json_schema_extra={"enum": [None, *harmless]},
    )


class TextPart(BaseModel):
    """Text within a message."""

    model_config = FIELDS
    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Ignored = None


class ImageUrl(BaseModel):
    """The URL of an image."""

    model_config = FIELDS
    url: str = Field(description="data:image/png;base64,... or, if allowed, http(s)://...")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="low encodes the image as one crop; other values cut it into crops."
    )


def _as_image_url(value: Any) -> Any:
    """Accept the URL of an image as a plain string, as Mistral's API and Ollama do."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(BaseModel):
    """An image within a message."""

    model_config = FIELDS
    type: Literal["image_url"]
    image_url: Annotated[ImageUrl, BeforeValidator(_as_image_url, ImageUrl | str)]
    prompt_cache_breakpoint: Ignored = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[
    Annotated[str, Tag("as_text")]
    | Annotated[list[Part], Field(max_length=MAX_PARTS), Tag("as_parts")],
    Discriminator(lambda value: "as_parts" if isinstance(value, list) else "as_text"),
]


class ChatMessage(BaseModel):
    """One message.

    System and developer messages are prepended to the text of the next user message. If the last
    message is from the assistant, the answer continues this message.
    """

    model_config = FIELDS
    role: Literal["system", "developer", "user", "assistant"]
    content: Content | None = Field(
        None, description="Only an assistant's content may be null or missing; it is then empty."
    )
    name: Ignored = None
    annotations: Ignored = None
    audio: Any = unsupported()
    function_call: Any = unsupported()
    images: Any = unsupported([])  # Ollama's field
    refusal: Any = unsupported()
    tool_calls: Any = unsupported([])

    @property
    def texts(self) -> list[str]:
        """All texts of the message."""
        if isinstance(self.content, str):
            return [self.content]
        return [part.text for part in self.content or () if isinstance(part, TextPart)]


class StreamOptions(BaseModel):
    """Options for a streamed response."""

    model_config = FIELDS
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class JsonSchema(BaseModel):
    """A JSON schema for the answer."""

    model_config = FIELDS
    schema_: dict[str, Any] = Field(alias="schema")
    name: Ignored = None
    description: Ignored = None
    strict: Ignored = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = FIELDS
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(
        None, alias="schema", description="A JSON schema for json_object, as in llama.cpp."
    )

    def constraint(self) -> Constraint | None:
        """Return the constraint; None for text.

        Raises:
          ApiError: A JSON schema is missing, or is given for a type without a schema (status 400).
        """
        for name, value, expected in (
            ("json_schema", self.json_schema, self.type == "json_schema"),
            ("schema", self.schema_, self.type == "json_object" and self.schema_ is not None),
        ):
            if (value is not None) != expected:
                message = f"expected {'an object' if expected else 'null'} for type {self.type}"
                raise bad_request(f"response_format.{name}", message)
        if self.json_schema is not None:
            schema = self.json_schema.schema_
            return Constraint("response_format.json_schema.schema", "json", json.dumps(schema))
        if self.schema_ is not None:
            return Constraint("response_format.schema", "json", json.dumps(self.schema_))
        if self.type == "json_object":
            return Constraint("response_format", "json", json.dumps({"type": "object"}))
        return None


class StructuredOutputs(BaseModel):
    """A constraint on the answer, as in vLLM. Exactly one of the first five fields must be set."""

    model_config = FIELDS
    json_: dict[str, Any] | str | None = Field(
        None, alias="json", description="A JSON schema, which may be a string."
    )
    json_object: Literal[True] | None = None
    regex: str | None = Field(None, description="Regular expression for the whole answer.")
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="Grammar in the Lark or GBNF format.")
    disable_any_whitespace: Ignored = None
    disable_fallback: Ignored = None
    disable_additional_properties: Any = unsupported(False)
    structural_tag: Any = unsupported()
    whitespace_pattern: Any = unsupported()

    def constraint(self) -> Constraint:
        """Return the constraint.

        Raises:
          ApiError: The number of constraints is not one (status 400).
        """
        json_object = {"type": "object"} if self.json_object else None
        given: list[tuple[str, ConstraintKind, Any]] = [
            ("json", "json", self.json_),
            ("json_object", "json", json_object),
            ("regex", "regex", self.regex),
            ("choice", "choice", self.choice),
            ("grammar", "grammar", self.grammar),
        ]
        given = [constraint for constraint in given if constraint[2] is not None]
        if len(given) != 1:
            message = "expected one of json, json_object, regex, choice and grammar"
            raise bad_request("structured_outputs", f"{message}, found {len(given)}")
        name, kind, value = given[0]
        text = value if isinstance(value, str) else json.dumps(value)
        return Constraint(f"structured_outputs.{name}", kind, text)


class PromptOptions(BaseModel):
    """Extensions of OpenAI's API that determine how messages become a prompt."""

    model_config = FIELDS
    max_partition: int | None = Field(
        None, ge=1, description="Maximum number of cells that each image is cut into."
    )
    interleave: bool | None = Field(
        None,
        description="Keep images after their message's only text. By default, all images of such a"
        " message come before its text, as in the model's training data.",
    )
    continue_final_message: bool | None = Field(
        None, description="Must be true or null if the last message is the assistant's."
    )
    add_generation_prompt: bool | None = Field(
        None, description="Must be false or null if the last message is the assistant's."
    )

    def ignored_fields(self) -> list[str]:
        """Return the paths of the fields that are unknown and therefore ignored."""
        return [path for path, _, harmless in _unimplemented_fields(self) if harmless is None]

    def check_messages(self, messages: list[ChatMessage]) -> None:
        """Check for fields that are not supported, or that contradict the messages.

        Raises:
          ApiError: A field is not supported, or it contradicts another field (status 400).
        """
        for path, value, harmless in _unimplemented_fields(self):
            if harmless is not None and value not in harmless:
                raise bad_request(path, "not supported by this server", "unsupported")
        for number, message in enumerate(messages):
            if message.content is None and message.role != "assistant":
                param = f"messages[{number}].content"
                raise bad_request(param, "missing; only an assistant's content may be empty")
        continues = messages[-1].role == "assistant"
        for name, expected in (
            ("continue_final_message", continues),
            ("add_generation_prompt", not continues),
        ):
            if getattr(self, name) not in (None, expected):
                role = messages[-1].role
                message = f"expected {str(expected).lower()}, because the last role is {role}"
                raise bad_request(name, message)


class TokenizeRequest(PromptOptions):
    """The body of a request to /tokenize, with either `messages` or `prompt`, as in vLLM."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    prompt: str | None = None
    add_special_tokens: bool | None = Field(
        None, description="Whether a prompt begins with <bos>; true by default."
    )
    return_token_strs: bool | None = None


class ChatRequest(PromptOptions):
    """The body of a request to /v1/chat/completions."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
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

    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="Numbers that are added to logits, by token id."
    )

    response_format: ResponseFormat | None = None

    # Extensions of OpenAI's API.
    structured_outputs: StructuredOutputs | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31, description="-1 and 0 keep all tokens.")
    min_p: float | None = Field(
        None, ge=0, le=1, description="Minimum probability, as a fraction of the highest one."
    )
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(
        None, ge=0, description="Minimum number of tokens before a stop token or stop string."
    )
    ignore_eos: bool | None = Field(
        None, description="Whether to generate up to the maximum number of tokens."
    )
    stop_token_ids: list[int] | None = None

    audio: Any = unsupported()
    function_call: Any = unsupported("none", "auto")
    functions: Any = unsupported([])
    modalities: Any = unsupported(["text"])
    moderation: Any = unsupported()
    prediction: Any = unsupported()
    reasoning_effort: Any = unsupported("none")
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

    def constraint(self) -> Constraint | None:
        """Return the constraint on the answer; None if there is none.

        Raises:
          ApiError: A field of the constraint contradicts another field (status 400).
        """
        constraint = self.response_format and self.response_format.constraint()
        if self.structured_outputs is None:
            return constraint
        if constraint is not None:
            raise bad_request("structured_outputs", "response_format is also a constraint")
        return self.structured_outputs.constraint()

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

        both, stop = (self.max_tokens, self.max_completion_tokens), self.stop_strings
        check(None in both or both[0] == both[1], "max_tokens", "max_completion_tokens differs")
        check((self.n or 1) <= max_choices, "n", f"{self.n}, but the maximum is {max_choices}")
        check(len(stop) <= 4, "stop", f"{len(stop)} stop strings, but the maximum is 4")
        check(all(stop), "stop", "an empty string would stop every answer at once")
        log_probs = self.top_logprobs is None or self.logprobs is True
        check(log_probs, "top_logprobs", "this field needs logprobs: true")
        streams = self.stream_options is None or self.stream is True
        check(streams, "stream_options", "this field needs stream: true")


def _unimplemented_fields(
    model: BaseModel, prefix: str = ""
) -> Iterator[tuple[str, Any, Sequence[Any] | None]]:
    """Yield the path and the value of each field that is set but not implemented.

    The third element is the list of values that would not change the answer, or None if the field
    is unknown, so that every value is ignored.
    """
    known = {} if prefix else UNSUPPORTED_EXTENSIONS
    found = [(name, value, known.get(name)) for name, value in (model.model_extra or {}).items()]
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(info.json_schema_extra, dict):  # see `unsupported`
            found.append((name, value, cast(Any, info.json_schema_extra["enum"])))
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(item, BaseModel):
                index = f"[{number}]" if isinstance(value, list) else ""
                yield from _unimplemented_fields(item, f"{prefix}{name}{index}.")
    yield from ((f"{prefix}{x}", value, ok) for x, value, ok in found if value is not None)
