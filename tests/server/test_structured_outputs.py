"""Answers in a shape over HTTP: OpenAI's `response_format` and vLLM's `structured_outputs`."""

import json
import re
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from serving_setup import FIELDS, user_message

WHO = user_message("Who are you?")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
    "required": ["name", "ok"],
    "additionalProperties": False,
}


def json_schema(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}


class Reply(pydantic.BaseModel):
    colour: Literal["red", "green"]
    numbers: list[pydantic.conint(ge=0, le=9)] = pydantic.Field(max_length=3)
    inner: "Inner | None"


class Inner(pydantic.BaseModel):
    note: str = pydantic.Field(max_length=5)


def test_parse(client):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model="ovis-tiny", messages=WHO, seed=seed, response_format=Reply
        )
        message, reply = answer.choices[0].message, answer.choices[0].message.parsed
        assert answer.choices[0].finish_reason == "stop"
        assert isinstance(reply, Reply) and json.loads(message.content) == reply.model_dump()


@pytest.mark.parametrize(
    "fields, pattern",
    [
        ({"response_format": {"type": "text"}}, "I am Ovis, .*"),
        ({"response_format": {"type": "json_object"}, "max_tokens": 5}, r"\{.*"),
        ({"response_format": json_schema(SCHEMA)}, r'\{"name":".{0,8}","ok":(true|false)\}'),
        ({"response_format": {"type": "json_object", "schema": {"const": {}}}}, r"\{\}"),
        ({"structured_outputs": {"json": SCHEMA}}, r'\{"name":".{0,8}","ok":(true|false)\}'),
        ({"structured_outputs": {"json": '{"const": [1]}'}}, r"\[1\]"),
        ({"structured_outputs": {"json_object": True}, "max_tokens": 5}, r"\{.*"),
        ({"structured_outputs": {"regex": r"\d{3}-[a-c]{2}"}}, "[0-9]{3}-[a-c]{2}"),
        ({"structured_outputs": {"choice": ["yes .", "no ."]}}, r"(yes|no) \."),
        ({"structured_outputs": {"grammar": 'start: "<" /[a-z]/ ">"'}}, "<[a-z]>"),
        ({"structured_outputs": {"grammar": 'root ::= "<" [a-z] ">"'}}, "<[a-z]>"),
    ],
)
def test_fields(url, fields, pattern):
    body = {"messages": WHO} | FIELDS | fields
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    choice = answer.raise_for_status().json()["choices"][0]
    assert re.fullmatch(pattern, choice["message"]["content"])
    assert choice["finish_reason"] == ("length" if "max_tokens" in fields else "stop")
    assert "Warning" not in answer.headers


def test_a_stream_equals_the_complete_answer(client):
    request = {"messages": WHO, "response_format": json_schema(SCHEMA)} | FIELDS
    whole = client.chat.completions.create(**request, logprobs=True).choices[0]
    chunks = [c.choices[0] for c in client.chat.completions.create(stream=True, **request)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].finish_reason == "stop" and len(chunks) > 5
    assert "".join(token.token for token in whole.logprobs.content) == whole.message.content
    assert whole.logprobs.content[0].logprob == 0  # only { is allowed


@pytest.mark.parametrize(
    "param, code, fields",
    [
        ("response_format.type", "literal_error", {"response_format": {"type": "xml"}}),
        (
            "response_format.json_schema",
            "invalid_value",
            {"response_format": {"type": "json_schema"}},
        ),
        (
            "response_format.json_schema.schema",
            "missing",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        ),
        (
            "response_format.json_schema.schema",
            "invalid_constraint",
            {"response_format": json_schema({"type": "objekt"})},
        ),
        (
            "response_format.schema",
            "invalid_value",
            {"response_format": {"type": "text", "schema": {}}},
        ),
        ("structured_outputs", "invalid_value", {"structured_outputs": {}}),
        (
            "structured_outputs",
            "invalid_value",
            {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        ),
        (
            "structured_outputs",
            "invalid_value",
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        ),
        ("structured_outputs.json", "invalid_constraint", {"structured_outputs": {"json": "{"}}),
        ("structured_outputs.json", "dict_type", {"structured_outputs": {"json": 5}}),
        ("structured_outputs.regex", "invalid_constraint", {"structured_outputs": {"regex": "(a"}}),
        (
            "structured_outputs.regex",
            "invalid_constraint",
            {"structured_outputs": {"regex": "a" * 2**18}},
        ),
        (
            "structured_outputs.regex",
            "constraint_too_complex",
            {"structured_outputs": {"regex": "((a{1000}){1000}){1000}"}},
        ),
        ("structured_outputs.choice", "too_short", {"structured_outputs": {"choice": []}}),
        (
            "structured_outputs.grammar",
            "invalid_constraint",
            {"structured_outputs": {"grammar": "start: ("}},
        ),
        ("ignore_eos", "invalid_value", {"structured_outputs": {"regex": "a"}, "ignore_eos": True}),
    ],
)
def test_errors_name_the_field(client, param, code, fields):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=WHO, extra_body=fields, **FIELDS)
    error = caught.value
    assert (error.param, error.code) == (param, code)
    assert error.body["message"].startswith(f"{param}: ") and "\n" not in error.body["message"]


def test_text_that_is_not_utf_8_is_not_a_constraint(url):
    for field in ({"regex": "\ud800"}, {"choice": ["\ud800"]}, {"grammar": 'start: "\ud800"'}):
        body = json.dumps({"messages": WHO, "structured_outputs": field} | FIELDS)
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == f"structured_outputs.{next(iter(field))}"
