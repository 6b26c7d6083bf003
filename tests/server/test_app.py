"""The server as OpenAI's official client sees it."""

import json
import math
import threading

import httpx
import openai
import pytest
from compilations import compilations
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image
from serving_setup import (
    ENDLESS_FIELDS,
    FIELDS,
    LIMITS,
    MAX_MODEL_LEN,
    MAX_NUM_SEQS,
    image_part,
    is_idle,
    make_image,
    read_metrics,
    running_server,
    user_message,
)

import ovis_jax
from ovis_jax.evaluation.evaluate import evaluate_questions
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.server.app import create_app
from ovis_jax.server.request_schema import MAX_MESSAGES, MAX_PARTS


def conversation(turns, images):
    """Turns as a client writes them, with the images at the beginning of the first."""
    made = [dict(turn) for turn in turns]
    content = made[0]["content"].replace("<image>", "").strip()
    made[0]["content"] = [*map(image_part, images), {"type": "text", "text": content}]
    return made


@pytest.fixture
def complete(client):
    def complete(text, *images, **options):
        return client.chat.completions.create(
            messages=user_message(text, *images), **(FIELDS | options)
        )

    return complete


@pytest.fixture
def rejected(complete):
    """The error response to a request, which must be in OpenAI's format."""

    def rejected(kind, *arguments, **options):
        with pytest.raises(kind) as caught:
            complete(*arguments, **options)
        error = caught.value
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.body["message"] and "Traceback" not in error.body["message"]
        return error

    return rejected


@pytest.mark.slow
def test_answers_are_correct_and_equal_those_of_eval(client, ovis, scenes, scene_file):
    right, said = 0, []
    with compilations() as found:
        for turns, images, expected in scenes:
            answer = client.chat.completions.create(messages=conversation(turns, images), **FIELDS)
            said.append(answer.choices[0].message.content)
            right += said[-1] == expected
            assert answer.choices[0].finish_reason == "stop"
            usage = answer.usage
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            assert usage.completion_tokens > 3
    assert len(scenes) == 26 and right >= 0.9 * len(scenes)
    assert found == []
    asked = read_questions(scene_file)
    results = {
        x["id"]: x
        for x in evaluate_questions(
            ovis, asked, batch_size=13, max_new_tokens=64, max_partition=9, choose_by="letter"
        )
    }
    assert said == [results[question.id]["answer"] for question in asked]


@pytest.mark.slow
def test_a_stream_equals_the_complete_answer(client, scenes):
    turns, images, _ = max(scenes, key=lambda scene: len(scene[2]))
    request = {"messages": conversation(turns, images)} | FIELDS
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            stream=True, stream_options={"include_usage": True}, **request
        )
    )
    *texts, last = chunks
    assert texts[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in texts)
    assert text == whole.choices[0].message.content
    assert [
        chunk.choices[0].finish_reason for chunk in texts if chunk.choices[0].finish_reason
    ] == ["stop"]
    assert len(texts) > 8 and len({chunk.id for chunk in chunks}) == 1
    assert last.choices == [] and last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.prompt_tokens_details.cached_tokens == whole.usage.prompt_tokens - 1
    assert all(chunk.usage is None for chunk in texts)


def test_stop_strings(complete):
    whole = complete("What is this?", image_part(make_image(0))).choices[0].message.content
    word = whole.split()[2]
    for stream in (False, True):
        answer = complete(
            "What is this?", image_part(make_image(0)), stop=[word, "#"], stream=stream
        )
        if stream:
            chunks = [chunk.choices[0] for chunk in answer]
            text, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(word)] and reason == "stop"


def test_lengths(complete):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = complete("What is this?", image_part(make_image(0)), **{name: 3})
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 3


def test_many_answers_and_seeds(complete):
    hot = {"temperature": 2, "seed": -7, "max_tokens": 15}
    answer = complete("Tell me.", n=3, **hot)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    chunks = list(complete("Tell me.", n=3, stream=True, **hot))
    for n, text in enumerate(texts):
        mine = [c.choices[0] for c in chunks[1:] if c.choices[0].index == n]
        assert "".join(c.delta.content or "" for c in mine) == text
        assert mine[-1].finish_reason is not None
    assert complete("Tell me.", **hot).choices[0].message.content == texts[0]
    unseeded = {**hot, "seed": None}
    assert len({complete("Tell me.", **unseeded).choices[0].message.content for _ in "12"}) == 2


def test_log_probs(complete):
    answer = complete("What is this?", image_part(make_image(0)), logprobs=True, top_logprobs=5)
    content = answer.choices[0].logprobs.content
    assert "".join(t.token for t in content) == answer.choices[0].message.content
    assert len(content) == answer.usage.completion_tokens - 1  # the stop id has no text
    for token in content:
        probabilities = [math.exp(t.logprob) for t in token.top_logprobs]
        assert len(probabilities) == 5 and sum(probabilities) <= 1 + 1e-5
        assert probabilities == sorted(probabilities, reverse=True)
        assert token.top_logprobs[0].token == token.token  # greedy
        assert token.logprob == pytest.approx(token.top_logprobs[0].logprob)
        assert bytes(token.bytes).decode() == token.token
    plain = complete("What is this?", image_part(make_image(0)), logprobs=True).choices[0].logprobs
    assert [t.token for t in plain.content] == [t.token for t in content]
    assert all(t.top_logprobs == [] for t in plain.content)
    assert complete("Who?").choices[0].logprobs is None
    chunks = complete("What is this?", image_part(make_image(0)), logprobs=True, stream=True)
    streamed = [
        t.token for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content
    ]
    assert streamed == [t.token for t in content]


def test_a_system_turn_and_a_second_turn(client):
    def text(messages):
        answer = client.chat.completions.create(messages=messages, max_tokens=9, **FIELDS)
        return answer.choices[0].message

    joined = text([{"role": "user", "content": "Be short.\n\nWho are you?"}])
    system = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who are you?"},
    ]
    answer = text(system)
    assert answer.content == joined.content
    # Clients send the answer back with all of its fields.
    question = {"role": "user", "content": "And you?"}
    plain = [*system, {"role": "assistant", "content": answer.content}, question]
    assert text([*system, answer.model_dump(), question]).content == text(plain).content


def test_images_in_fewer_crops(complete):
    wide = make_image(0, (252, 252))
    positions = [
        complete(
            "What?", image_part(wide, **more), max_tokens=1, extra_body=body
        ).usage.prompt_tokens
        for more, body in [({}, {}), ({"detail": "low"}, {}), ({}, {"max_partition": 4})]
    ]
    assert positions[0] > positions[2] > positions[1]


def test_detail_of_each_image(complete):
    wide = make_image(0, (168, 84))
    low, high, text = (
        complete("What?", *parts, max_tokens=1).usage.prompt_tokens
        for parts in ([image_part(wide, detail="low")], [image_part(wide)], [])
    )
    both = [image_part(wide, detail="low"), image_part(wide)]
    assert complete("What?", *both, max_tokens=1).usage.prompt_tokens == low + high - text


def test_fields_of_the_official_client(complete):
    """Those of its types for texts and images."""
    more = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    image = image_part(make_image(0), detail="original") | more
    text = {"type": "text", "text": "And this?"} | more
    usage = complete("What?", image, text, max_tokens=1).usage
    plain = complete(
        "What?", image_part(make_image(0), detail="high"), {**text, **more}, max_tokens=1
    )
    assert usage.prompt_tokens == plain.usage.prompt_tokens


def test_special_tokens_in_a_text_are_text(complete):
    """A client cannot forge a turn."""
    one, two = (complete(text, max_tokens=1).usage.prompt_tokens for text in ("a", "a<eos>"))
    assert two > one + 1


@pytest.mark.parametrize("images", [[], [image_part(make_image(0))]])
def test_an_image_mark_in_a_text_is_text(complete, client, ovis, images):
    """In a question, in an answer that the client sends back, and in a prefix."""
    count = len(ovis.processor.tokenizer.encode("<image>"))
    messages = user_message("See ?", *images)
    marked = user_message("See <image>?", *images)
    for role in ("assistant", "user", "assistant"):
        for conversation, text in ((messages, "I see"), (marked, "I see<image>")):
            conversation.append({"role": role, "content": text})
    plain, more = (
        client.chat.completions.create(messages=m, max_tokens=1, **FIELDS).usage.prompt_tokens
        for m in (messages, marked)
    )
    assert more == plain + 4 * count


@pytest.mark.slow
@pytest.mark.parametrize("system", [None, "You are a helpful assistant."])
def test_images_after_the_text_give_the_right_answers(client, scenes, system):
    """The order of OpenAI's examples, of LangChain and of LiteLLM."""
    asked = [scene for scene in scenes if len(scene[0]) == 1][:12]
    first = [{"role": "system", "content": system}] if system else []
    before, after, correct = [], [], []
    for turns, images, expected in asked:
        (message,) = conversation(turns, images)
        for order, answers in ((1, before), (-1, after)):
            content = message["content"][::order]
            content = content if order == 1 else [content[0], *content[:0:-1]]
            answer = client.chat.completions.create(
                messages=[*first, message | {"content": content}], **FIELDS
            )
            answers.append(answer.choices[0].message.content)
        correct.append(after[-1] == expected)
    assert after == before
    assert system or sum(correct) >= 0.9 * len(asked)


def test_null_content_of_an_assistant_is_empty(client):
    def answer(*fields):
        between = [{"role": "assistant", **x} for x in fields]
        messages = [*user_message("Who?"), *between, *user_message("And you?")]
        usage = client.chat.completions.create(messages=messages, max_tokens=4, **FIELDS)
        return usage.choices[0].message.content, usage.usage.prompt_tokens

    empty = answer({"content": ""})
    assert answer({"content": None}) == answer({}) == answer({"content": []}) == empty
    assert answer({"content": None, "tool_calls": None, "refusal": None}) == empty


@pytest.mark.slow
def test_a_last_assistant_message_is_continued(client, scenes):
    turns, images, _ = max(scenes, key=lambda scene: len(scene[2]))
    messages = conversation(turns, images)
    whole = client.chat.completions.create(messages=messages, **FIELDS).choices[0].message.content
    words = whole.split(" ")
    assert len(words) > 6
    for prefix in (" ".join(words[:4]), "", None):
        asked = [*messages, {"role": "assistant", "content": prefix}]
        for more in ({}, {"continue_final_message": True, "add_generation_prompt": False}):
            answer = client.chat.completions.create(messages=asked, extra_body=more, **FIELDS)
            assert (prefix or "") + answer.choices[0].message.content == whole


@pytest.mark.parametrize(
    "param, last, fields",
    [
        ("continue_final_message", "assistant", {"continue_final_message": False}),
        ("continue_final_message", "user", {"continue_final_message": True}),
        ("add_generation_prompt", "assistant", {"add_generation_prompt": True}),
        ("add_generation_prompt", "user", {"add_generation_prompt": False}),
        ("messages", "system", {}),
    ],
)
def test_the_last_message(client, param, last, fields):
    messages = [*user_message("Who?"), {"role": last, "content": "It is"}]
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=messages, extra_body=fields, **FIELDS)
    assert caught.value.param == param


def test_unknown_fields_are_ignored_with_a_warning(url):
    message = user_message("Who?", image_part(make_image(0), format="png"))[0]
    message |= {"reasoning": "Hm", "name": "me"}
    message["content"][1]["cache_control"] = {"type": "ephemeral"}
    body = {"messages": [message], **FIELDS, "max_tokens": 3, "user": "me", "seed": 1}
    path = f"{url}/v1/chat/completions"
    plain = httpx.post(path, json=body)
    assert plain.headers["warning"] == (
        '299 ovis-jax "ignored fields: messages[0].content[0].image_url.format, '
        'messages[0].content[1].cache_control, messages[0].reasoning"'
    )
    more = {"mirostat": 0, "best_of": 1, "no such\r\nfield": 1, "other": None}
    answer = httpx.post(path, json=body | more | {"messages": user_message("Who?")})
    assert answer.status_code == 200
    assert answer.headers["warning"] == '299 ovis-jax "ignored fields: no?such??field"'
    answer = httpx.post(path, json=body | {"messages": user_message("Who?"), "stream": True})
    assert "warning" not in answer.headers and answer.text.endswith("[DONE]\n\n")
    body |= {f"f{n}" * 30: 1 for n in range(99)} | {"stream": True}
    assert len(httpx.post(path, json=body).headers["warning"]) < 1100


def test_fields_that_change_the_sampled_tokens(complete, ovis, rejected):
    encode = ovis.processor.tokenizer.encode
    (red,) = encode(" red")
    with compilations() as found:
        answer = complete("Who?", logit_bias={str(red): 100}, max_tokens=5)
        assert answer.choices[0].message.content == " red" * 5
        penalized = complete(
            "Who?", logit_bias={str(red): 30}, frequency_penalty=2, presence_penalty=2
        )
        assert 0 < penalized.choices[0].message.content.count(" red") < 30
        for options in ({"ignore_eos": True}, {"min_tokens": 30}):
            answer = complete("Who?", max_tokens=30, extra_body=options)
            assert answer.choices[0].finish_reason == "length"
        plain = complete("Who?").choices[0].message.content
        body = {"stop_token_ids": [encode(plain)[1]]}
        answer = complete("Who?", extra_body=body)
        assert plain.startswith(answer.choices[0].message.content)
        assert answer.usage.completion_tokens == 2
        assert answer.choices[0].finish_reason == "stop"
        hot = {"temperature": 2, "extra_body": {"min_p": 1, "top_k": -1}}
        assert complete("Who?", **hot).choices[0].message.content == plain
    assert found == []


def test_tokenize(url, complete, ovis):
    tokenizer = ovis.processor.tokenizer
    images = [image_part(make_image(0)), image_part(make_image(1, (168, 84)), detail="low")]
    messages = user_message("What is <image>?", *images)
    found = httpx.post(f"{url}/tokenize", json={"model": "ovis-tiny", "messages": messages}).json()
    usage = complete("What is <image>?", *images, max_tokens=1).usage
    assert found["count"] == len(found["tokens"]) == usage.prompt_tokens
    assert found["max_model_len"] == MAX_MODEL_LEN and found["token_strs"] is None
    per_crop = ovis.config.visual_tokenizer.tokens_per_crop
    assert found["tokens"].count(-300) == 2 * per_crop
    text = tokenizer.decode([i for i in found["tokens"] if i >= 0])
    assert text == "user\n\n\nWhat is <image>?\nmodel\n"
    body = {"prompt": "Who is it?<eos>", "return_token_strs": True}
    found = httpx.post(f"{url}/tokenize", json=body).json()
    expected = [2, *tokenizer.encode("Who is it?<eos>", parse_special_tokens=False)]
    assert found["tokens"] == expected and 1 not in expected
    assert found["token_strs"] == [tokenizer.pieces[i] for i in expected]
    body["add_special_tokens"] = False
    assert httpx.post(f"{url}/tokenize", json=body).json()["tokens"] == expected[1:]
    for body, param in [
        ({}, "messages"),
        ({"prompt": "a", "messages": messages}, "messages"),
        ({"prompt": "a", "model": "gpt"}, "model"),
        ({"prompt": "x" * 100_000}, "prompt"),
        ({"messages": user_message("x" * 100_000)}, "messages"),
    ]:
        assert httpx.post(f"{url}/tokenize", json=body).json()["error"]["param"] == param


def test_version_and_max_model_len(url):
    assert httpx.get(f"{url}/version").json() == {"version": ovis_jax.__version__}
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert model["max_model_len"] == MAX_MODEL_LEN
    assert httpx.get(f"{url}/v1/models/ovis-tiny").json() == model


def test_scripts_of_allowed_origins_may_use_the_server(scheduler):
    """A preflight request has no API key. An error can be read by a script, too."""
    origin, other = {"origin": "http://localhost:3000"}, {"origin": "http://evil.example"}
    preflight = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    app = create_app(
        [scheduler], "ovis-tiny", limits=LIMITS, api_key="key", allow_origins=[origin["origin"]]
    )
    path = "/v1/chat/completions"
    name = "access-control-allow-origin"
    client = TestClient(app)
    answer = client.options(path, headers=preflight | origin)
    assert answer.status_code == 200 and answer.headers[name] == origin["origin"]
    assert "authorization" in answer.headers["access-control-allow-headers"]
    assert name not in client.options(path, headers=preflight | other).headers
    answer = client.get("/v1/models", headers=origin)
    assert answer.status_code == 401 and answer.headers[name] == origin["origin"]
    answer = client.get("/v1/models", headers=origin | {"authorization": "Bearer key"})
    assert answer.status_code == 200 and answer.headers[name] == origin["origin"]
    assert "Warning" in answer.headers["access-control-expose-headers"]
    closed = TestClient(create_app([scheduler], "ovis-tiny", limits=LIMITS))
    assert name not in closed.get("/v1/models", headers=origin).headers
    assert closed.options(path, headers=preflight | origin).status_code == 405


def test_models(client, rejected):
    assert [model.id for model in client.models.list()] == ["ovis-tiny"]
    assert client.models.retrieve("ovis-tiny").owned_by == "ovis-jax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    error = rejected(openai.NotFoundError, "Who?", model="gpt")
    assert (error.param, error.code) == ("model", "model_not_found")


TEXT = {"type": "text", "text": "a"}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def url_of(text):
    return {"type": "image_url", "image_url": {"url": text}}


@pytest.mark.parametrize(
    "param, options",
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("guided_json", {"extra_body": {"guided_json": {}}}),
        ("best_of", {"extra_body": {"best_of": 2}}),
        ("chat_template", {"extra_body": {"chat_template": "{{ messages }}"}}),
        ("max_new_tokens", {"extra_body": {"max_new_tokens": 5}}),
        ("system", {"extra_body": {"system": "Be short."}}),
        ("use_beam_search", {"extra_body": {"use_beam_search": True}}),
        ("logit_bias", {"logit_bias": {"99999999": 1}}),
        ("logit_bias", {"logit_bias": {"red": 1}}),
        ("logit_bias", {"logit_bias": {str(n): 1 for n in range(1025)}}),
        ("stop_token_ids", {"extra_body": {"stop_token_ids": [-1]}}),
        ("stop_token_ids", {"extra_body": {"stop_token_ids": [5] * 65}}),
        ("min_tokens", {"max_tokens": 5, "extra_body": {"min_tokens": 6}}),
        ("min_tokens", {"extra_body": {"min_tokens": 1000}}),
        ("n", {"n": MAX_NUM_SEQS + 1}),
        ("stop", {"stop": list("abcde")}),
        ("stop", {"stop": ["", "a"]}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("max_tokens", {"max_tokens": LIMITS.max_tokens + 1}),
        ("max_tokens", {"max_tokens": 2, "max_completion_tokens": 3}),
        ("max_partition", {"extra_body": {"max_partition": 99}}),
    ],
)
def test_unsupported_and_contradictory_fields(rejected, param, options):
    error = rejected(openai.BadRequestError, "Who?", **options)
    assert error.param == param and error.body["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    "image, message",
    [
        (PICTURE, "not a complete image"),
        (url_of("data:image/png;base64,%%%"), "base64"),
        (url_of("data:nothing"), "comma"),
        (url_of("data:text/plain,hello"), "not a complete image"),
        (url_of("https://example.org/a.png"), "does not fetch images"),
        (url_of("file:///etc/passwd"), "data: URL"),
        (url_of(""), "data: URL"),
        (image_part(Image.new("RGB", (1000, 1000))), "1000 x 1000"),
        (image_part(Image.new("RGB", (499, 500))), "499 x 500, with the images before it"),
    ],
)
def test_invalid_images(rejected, image, message):
    error = rejected(openai.BadRequestError, "What?", image_part(make_image(0)), image)
    assert error.param == "messages[0].content[1].image_url.url"
    assert message in error.body["message"]


def test_images_that_do_not_fit(rejected):
    error = rejected(openai.BadRequestError, "What?", *[image_part(make_image(0))] * 4)
    assert (error.param, error.code) == ("messages", "too_many_images")
    thin = image_part(make_image(0, (300, 2)), detail="low")
    error = rejected(openai.BadRequestError, "What?", thin)
    assert error.param == "messages" and "300 x 2" in error.body["message"]


def test_prompts_that_do_not_fit(rejected):
    for text in ("word " * MAX_MODEL_LEN, "x" * 100_000):
        error = rejected(openai.BadRequestError, text)
        assert error.code == "context_length_exceeded" and error.param == "messages"
    error = rejected(openai.BadRequestError, "word " * 220, max_tokens=110)
    assert error.code == "context_length_exceeded" and error.param == "max_tokens"


@pytest.mark.parametrize(
    "param, change",
    [
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": 2.5}),
        ("top_p", {"top_p": -1}),
        ("seed", {"seed": 2**63}),
        ("max_tokens", {"max_tokens": 0}),
        ("n", {"n": 1.5}),
        ("stop", {"stop": 3}),
        ("frequency_penalty", {"frequency_penalty": 2.5}),
        ("presence_penalty", {"presence_penalty": -2.5}),
        ("logit_bias.5", {"logit_bias": {"5": 101}}),
        ("min_p", {"min_p": 2}),
        ("top_k", {"top_k": -2}),
        ("stop_token_ids[0]", {"stop_token_ids": ["a"]}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)}),
        (
            "messages[0].content",
            {"messages": [{"role": "user", "content": [TEXT] * (MAX_PARTS + 1)}]},
        ),
        ("messages", {"messages": None}),
        ("messages[0].role", {"messages": [{"role": "king", "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        (
            "messages[0].content[0]",
            {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {}}]}]},
        ),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        (
            "messages[0].content[0].text",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
        ),
        (
            "messages[0].content[0].image_url.url",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        ),
    ],
)
def test_bodies_that_do_not_match_the_schema(url, param, change):
    body = {"messages": [{"role": "user", "content": "a"}], **FIELDS, **change}
    answer = httpx.post(
        f"{url}/v1/chat/completions", content=json.dumps(body).encode(), headers=JSON
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert error["message"].startswith(param) and error["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"", 400, "the body is not valid JSON: it is empty"),
        (
            b"{'a': 1}",
            400,
            "the body is not valid JSON: expecting property name enclosed in double",
        ),
        (b'{"a": 1', 400, "the body is not valid JSON: expecting ',' delimiter at character 7"),
        (b"\xff\xfe", 400, "the body is not valid JSON: expecting value at character 0"),
        (b"\x80", 400, "the body is not valid JSON: it is not UTF-8"),
        (b"[" * 30_000, 400, "the body is not valid JSON: "),
        (b"[]", 400, "the body is not a JSON object"),
        (b'"a"', 400, "the body is not a JSON object"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "the body is not valid JSON: "),
        (b'{"temperature": NaN}', 400, "model: field required (and 2 more)"),
        (b'{"a": [' + b"1," * 40_000 + b"1]}", 400, "the body has about 40002 list items"),
        (b" " * (LIMITS.max_body_bytes + 1), 413, "the body is longer than 1048576 bytes"),
    ],
)
def test_invalid_bodies(url, body, status, message):
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"].startswith(message), answer.text


@pytest.mark.parametrize("content_type", [None, "application/x-www-form-urlencoded"])
def test_a_body_without_its_content_type(url, content_type):
    """`curl -d` sends the second."""
    headers = {"content-type": content_type} if content_type else {}
    answer = httpx.post(f"{url}/v1/chat/completions", content=b"{}", headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "invalid_content_type")
    expected = f"the Content-Type is {content_type!r}, expected 'application/json'"
    assert error["message"] == expected


def test_a_body_without_a_length_is_measured(url):
    parts = (b" " * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 2))
    answer = httpx.post(f"{url}/v1/chat/completions", content=parts, headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_unpaired_surrogates(url):
    """JSON may hold them, UTF-8 cannot."""
    for change, status in [({}, 400), ({"model": "\ud800"}, 404), ({"\ud800": 1}, 400)]:
        body = {"messages": user_message("\ud800"), **FIELDS, **change}
        content = json.dumps(body).encode()
        answer = httpx.post(f"{url}/v1/chat/completions", content=content, headers=JSON)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_other_paths_and_methods(url):
    for method, path, status in [("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)]:
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and answer.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slots(url, scheduler, decode_gate, monkeypatch, stream):
    body = {"messages": user_message("Go on."), **FIELDS, "max_tokens": LIMITS.max_tokens}
    body |= ENDLESS_FIELDS["extra_body"] | {"n": MAX_NUM_SEQS, "stream": stream}
    aborted, abort = threading.Event(), scheduler.abort

    def noted(request):
        abort(request)
        aborted.set()

    monkeypatch.setattr(scheduler, "abort", noted)
    before = read_metrics(url)
    if stream:
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()  # the connection closes with this iterator
            assert next(lines).startswith("data: ")
            decode_gate.run(1)
    else:
        with httpx.Client(timeout=0.2) as client, pytest.raises(httpx.ReadTimeout):
            client.post(f"{url}/v1/chat/completions", json=body)
    assert aborted.wait(60)
    decode_gate.open()
    assert is_idle(scheduler)
    after = read_metrics(url)
    name = "ovis_e2e_request_latency_seconds_count"  # of complete answers
    assert after.get(name, 0) == before.get(name, 0)
    name = "ovis_generation_tokens_total"
    assert after.get(name, 0) - before.get(name, 0) < MAX_NUM_SEQS * LIMITS.max_tokens


def test_health_and_metrics(url, complete, scheduler):
    before = read_metrics(url)
    usage = complete("Who?", max_tokens=5).usage
    assert is_idle(scheduler)
    after = read_metrics(url)
    for name, added in {
        'ovis_requests_total{status="200"}': 1,
        "ovis_prompt_tokens_total": usage.prompt_tokens,
        "ovis_cached_prompt_tokens_total": usage.prompt_tokens_details.cached_tokens,
        "ovis_generation_tokens_total": usage.completion_tokens,
        "ovis_time_to_first_token_seconds_count": 1,
        "ovis_e2e_request_latency_seconds_count": 1,
    }.items():
        assert after[name] - before.get(name, 0) == added, name
    for name, value in {
        "ovis_max_num_seqs": MAX_NUM_SEQS,
        "ovis_num_seqs_running": 0,
        "ovis_num_requests_waiting": 0,
        "ovis_engine_accepting": 1,
    }.items():
        assert after[f'{name}{{engine="0"}}'] == value, name
    load = {"status": "ok", "max_num_seqs": MAX_NUM_SEQS, "running": 0, "waiting": 0}
    assert httpx.get(f"{url}/health").json() == load | {"engines": [load]}


def test_api_key(scheduler):
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS, api_key="sésame")
    with running_server(app) as (_, url):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic sesame"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        key = {"authorization": "Bearer sésame".encode()}
        assert httpx.get(f"{url}/v1/models", headers=key).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        with OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.chat.completions.create(messages=user_message("Who?"), **FIELDS)
