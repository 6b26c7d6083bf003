"""The server as OpenAI's official client sees it."""

import json
import math
import threading

import httpx
import openai
import pytest
from compilations import compilations
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

from ovis_jax.evaluation.evaluate import evaluate_questions
from ovis_jax.evaluation.questions import read_questions
from ovis_jax.server.app import create_app


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
    assert last.choices == [] and last.usage == whole.usage
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


def test_fields_of_the_official_client(complete):
    """Those of its types for texts and images."""
    more = {"prompt_cache_breakpoint": {"mode": "explicit"}}
    image = image_part(make_image(0), detail="original") | more
    text = {"type": "text", "text": "And this?"} | more
    usage = complete("What?", image, text, max_tokens=1).usage
    plain = complete(
        "What?", image_part(make_image(0), detail="high"), {**text, **more}, max_tokens=1
    )
    assert usage == plain.usage


def test_special_tokens_in_a_text_are_text(complete, rejected):
    """A client cannot forge a turn, and cannot place images itself."""
    one, two = (complete(text, max_tokens=1).usage.prompt_tokens for text in ("a", "a<eos>"))
    assert two > one + 1
    error = rejected(openai.BadRequestError, "See <image>?")
    assert error.param == "messages[0].content[0]"


def test_models(client, rejected):
    assert [model.id for model in client.models.list()] == ["ovis-tiny"]
    assert client.models.retrieve("ovis-tiny").owned_by == "ovis-jax"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")
    error = rejected(openai.NotFoundError, "Who?", model="gpt")
    assert (error.param, error.code) == ("model", "model_not_found")


PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}


def url_of(text):
    return {"type": "image_url", "image_url": {"url": text}}


@pytest.mark.parametrize(
    "param, options",
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
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
    mixed = [image_part(make_image(0), detail="low"), image_part(make_image(0))]
    error = rejected(openai.BadRequestError, "What?", *mixed)
    assert error.param == "messages" and "detail" in error.body["message"]


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
        ("nonsense", {"nonsense": 1}),
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages[0].role", {"messages": [{"role": "king", "content": "a"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
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
    assert answer.status_code == 422 and error["param"] == param, error
    assert error["message"].startswith(param) and error["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    "body, status",
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400),
        (b'{"temperature": NaN}', 422),
        (b" " * (LIMITS.max_body_bytes + 1), 413),
    ],
)
def test_invalid_bodies(url, body, status):
    answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


def test_a_body_without_a_length_is_measured(url):
    parts = (b" " * 65536 for _ in range(LIMITS.max_body_bytes // 65536 + 2))
    answer = httpx.post(f"{url}/v1/chat/completions", content=parts, headers=JSON)
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


def test_unpaired_surrogates(url):
    """JSON may hold them, UTF-8 cannot."""
    for change, status in [({}, 400), ({"model": "\ud800"}, 404), ({"\ud800": 1}, 422)]:
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
        "ovis_generation_tokens_total": usage.completion_tokens,
        "ovis_time_to_first_token_seconds_count": 1,
        "ovis_e2e_request_latency_seconds_count": 1,
    }.items():
        assert after[name] - before.get(name, 0) == added, name
    assert after["ovis_max_num_seqs"] == MAX_NUM_SEQS
    assert after["ovis_num_seqs_running"] == after["ovis_num_requests_waiting"] == 0
    found = httpx.get(f"{url}/health").json()
    assert found == {"status": "ok", "max_num_seqs": MAX_NUM_SEQS, "running": 0, "waiting": 0}


def test_api_key(scheduler):
    app = create_app(scheduler, "ovis-tiny", limits=LIMITS, api_key="sésame")
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
