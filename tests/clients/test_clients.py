"""The server as OpenAI's client, LangChain, LiteLLM and instructor see it, in their own order."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pydantic
import pytest
from PIL import Image
from serving_setup import image_part, read_metrics

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise the import downloads a table

pytestmark = [
    pytest.mark.clients,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::PendingDeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

EXAMPLES = Path(__file__).parents[2] / "examples"
SHAPES, DIGIT = (image_part(Image.open(EXAMPLES / f"{name}.png")) for name in ("shapes", "digit"))
COLOUR = {"type": "text", "text": "What colour is the diamond?"}
DESCRIBE = {"type": "text", "text": "Describe the picture."}
COMPARE = {"type": "text", "text": "Which of the two pictures has more shapes?"}


class OpenAIClient:
    def __init__(self, url: str):
        from openai import OpenAI

        self._client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def ask(self, messages: list[Any]) -> tuple[str, Any]:
        """The answer, and the message to append to the conversation."""
        answer = self._client.chat.completions.create(
            model="ovis-tiny", temperature=0, messages=messages
        )
        return answer.choices[0].message.content, answer.choices[0].message

    def stream(self, messages: list[Any]) -> Iterator[str]:
        chunks = self._client.chat.completions.create(
            model="ovis-tiny", temperature=0, messages=messages, stream=True
        )
        return (chunk.choices[0].delta.content or "" for chunk in chunks)


class LangChainClient:
    def __init__(self, url: str):
        from langchain_openai import ChatOpenAI

        self._client = ChatOpenAI(
            model="ovis-tiny", base_url=f"{url}/v1", api_key="none", temperature=0, max_retries=0
        )

    def ask(self, messages: list[Any]) -> tuple[str, Any]:
        message = self._client.invoke(messages)
        return message.content, message

    def stream(self, messages: list[Any]) -> Iterator[str]:
        return (chunk.content for chunk in self._client.stream(messages))


class LiteLLMClient:
    def __init__(self, url: str):
        self._options = {
            "model": "openai/ovis-tiny",
            "api_base": f"{url}/v1",
            "api_key": "none",
            "temperature": 0,
            "num_retries": 0,
        }

    def ask(self, messages: list[Any]) -> tuple[str, Any]:
        import litellm

        answer = litellm.completion(messages=messages, **self._options)
        return answer.choices[0].message.content, answer.choices[0].message

    def stream(self, messages: list[Any]) -> Iterator[str]:
        import litellm

        chunks = litellm.completion(messages=messages, stream=True, **self._options)
        return (chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.fixture(params=[OpenAIClient, LangChainClient, LiteLLMClient])
def library(request, url):
    return request.param(url)


@pytest.fixture
def expected(url):
    """The answer to a body that has its images first, without a client's library."""

    def expected(*messages: dict) -> str:
        body = {"model": "ovis-tiny", "temperature": 0, "messages": list(messages)}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
        return answer.json()["choices"][0]["message"]["content"]

    return expected


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def test_plain_and_streamed_text(library, expected):
    asked = {"role": "user", "content": "Who are you?"}
    text, _ = library.ask([asked])
    assert text == expected(asked) == "".join(library.stream([asked]))
    assert text


def test_an_image_after_the_text(library, expected):
    text, _ = library.ask([user(COLOUR, SHAPES)])
    assert text == expected(user(SHAPES, COLOUR)) and "orange" in text
    pieces = list(library.stream([user(DESCRIBE, SHAPES)]))
    assert "".join(pieces) == expected(user(SHAPES, DESCRIBE)) and len(pieces) > 5
    assert "yellow circle" in "".join(pieces)


def test_two_images_after_the_text_and_a_system_message(library, expected):
    text, _ = library.ask([user(COMPARE, SHAPES, DIGIT)])
    assert text == expected(user(SHAPES, DIGIT, COMPARE)) and "first" in text
    system = {"role": "system", "content": "You are a helpful assistant."}
    text, _ = library.ask([system, user(COLOUR, SHAPES)])
    assert text == expected(system, user(SHAPES, COLOUR))


def test_history_is_sent_back(library, expected):
    """As the library returned it, and with an answer whose content is null."""
    first, second = user(DESCRIBE, SHAPES), {"role": "user", **user(COLOUR)}
    answer, message = library.ask([first])
    text, _ = library.ask([first, message, second])
    replayed = {"role": "assistant", "content": answer}
    assert text == expected(user(SHAPES, DESCRIBE), replayed, second)
    empty = {"role": "assistant", "content": None}
    text, _ = library.ask([first, empty, second])
    assert text == expected(user(SHAPES, DESCRIBE), empty | {"content": ""}, second)


def test_no_request_fails_or_is_repeated(library, url):
    before = read_metrics(url)
    library.ask([user(COLOUR, SHAPES)])
    after = read_metrics(url)
    changed = {name for name in after if after[name] != before.get(name, 0) and "requests" in name}
    assert changed == {'ovis_requests_total{status="200"}'}
    name = 'ovis_requests_total{status="200"}'
    assert after[name] == before.get(name, 0) + 1


def test_an_error_names_the_field(library):
    with pytest.raises(Exception, match=r"messages\[0\].content\[0\].image_url.url") as caught:
        library.ask([user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}})])
    assert caught.value.status_code == 400


class ShortShape(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    shape: Literal["circle", "square", "star"]
    colour: str = pydantic.Field(max_length=12)


class Shape(ShortShape):
    """What LangChain and OpenAI's client are asked to return."""

    others: list[int] = pydantic.Field(max_length=2)


def test_an_answer_in_the_shape_of_a_model(url):
    from langchain_openai import ChatOpenAI
    from openai import OpenAI

    options = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
    asked = [user(SHAPES, DESCRIBE)]
    answer = OpenAI(**options).chat.completions.parse(
        model="ovis-tiny", messages=asked, response_format=Shape, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Shape)
    chat = ChatOpenAI(model="ovis-tiny", seed=1, **options)
    assert isinstance(chat.with_structured_output(Shape).invoke(asked), Shape)
    found = chat.with_structured_output(Shape, method="json_schema", include_raw=True).invoke(asked)
    assert found["parsed"] == answer.choices[0].message.parsed and not found["parsing_error"]


class Empty(pydantic.BaseModel):
    pass  # no docstring, which would be part of the prompt


def test_instructor(url):
    """In its JSON mode, the schema is only a part of the prompt, which the model does not know."""
    import instructor
    from openai import OpenAI

    tokens = httpx.post(f"{url}/tokenize", json={"model": "ovis-tiny", "prompt": "}"}).json()
    options = {
        "model": "ovis-tiny",
        "messages": [user(DESCRIBE)],
        "max_retries": 0,
        "temperature": 0,
    }
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        strict = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
        found = strict.chat.completions.create(response_model=ShortShape, **options)
        assert isinstance(found, ShortShape)
        loose = instructor.from_openai(client, mode=instructor.Mode.JSON)
        options["logit_bias"] = {str(tokens["tokens"][-1]): 100}
        assert isinstance(loose.chat.completions.create(response_model=Empty, **options), Empty)
