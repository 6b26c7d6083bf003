"""How answers and servers end otherwise: too many, too late, a model that fails, a shut-down."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import httpx
import openai
import pytest
from openai import OpenAI
from served import ASK, ENDLESS, LIMITS, SLOTS, counted, listening, say, slow_down, until
from sse_starlette.sse import AppStatus

from ovis_jax.serving.app import make_app
from ovis_jax.serving.engine import Engine
from ovis_jax.serving.replies import Reply
from ovis_jax.serving.steps import Steps


def test_a_full_queue_and_a_shut_down(ovis, steps, slowly):
    """429, 503, and streams that end as they would have, though the server is told to stop."""
    engine = Engine(ovis, steps, queue=1)
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS, drain=60)
    with (
        listening(app, engine, drain=60) as (server, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        request = {"messages": say("Go on."), **ASK, **ENDLESS, "stream": True, "max_tokens": 120}
        streams = []
        with pytest.raises(openai.RateLimitError) as caught:
            for _ in range(SLOTS + 4):
                streams.append(client.chat.completions.create(**request))
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        firsts = [next(stream) for stream in streams]
        server.should_exit = True
        ends = [list(stream)[-1].choices[0].finish_reason for stream in streams]
        assert firsts and ends == ["length"] * len(streams)
    assert engine.closed


def test_a_server_that_shuts_down_says_so(ovis, steps, monkeypatch):
    """While it does, and to those whose answers it cuts off."""
    slow_down(monkeypatch, 0.05)  # so that an answer takes much longer than the drain
    engine = Engine(ovis, steps, queue=9)
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS, drain=3)
    body = {"messages": say("Go on."), **ASK, "max_tokens": LIMITS.max_tokens}
    body |= ENDLESS["extra_body"]
    with (
        listening(app, engine, drain=3) as (server, url),
        ThreadPoolExecutor() as pool,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        post = partial(client.post, "/v1/chat/completions")
        cut_off = pool.submit(post, json=body)
        stream = pool.submit(post, json=body | {"stream": True})
        until(lambda: engine.running == 2)
        # What a signal sets, had this server a process of its own.
        server.should_exit = True
        monkeypatch.setattr(AppStatus, "should_exit", True)
        until(lambda: engine.closed)
        assert client.get("/health").status_code == 503
        refused = post(json=body)
        for answer in (refused, cut_off.result()):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
        *pieces, last = stream.result().text.strip().split("\n\n")
        assert stream.result().status_code == 200 and len(pieces) > 2
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_second_ctrl_c_ends_the_wait(ovis, steps, monkeypatch):
    engine = Engine(ovis, steps, queue=9)
    go_on, closed, close = threading.Event(), threading.Event(), engine.close

    def held(timeout):
        assert go_on.wait(60)
        close(timeout)
        closed.set()

    monkeypatch.setattr(engine, "close", held)
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS)
    with listening(app, engine, drain=60) as (server, _):
        server.should_exit = server.force_exit = True
    assert not go_on.is_set() and not closed.is_set()
    go_on.set()
    assert closed.wait(60)


def test_failures_are_counted_and_a_broken_model_is_not_a_shut_down(ovis, steps, monkeypatch):
    engine = Engine(ovis, steps, queue=9)
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=LIMITS)

    def fails(*arguments):
        raise RuntimeError("nobody expects this")

    with listening(app) as (_, url):
        body = {"messages": say("Who?"), **ASK}
        with monkeypatch.context() as patch:
            patch.setattr(Reply, "whole", fails)
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 500 and "log" in answer.json()["error"]["message"]
        assert counted(url)['ovis_requests_total{status="500"}'] == 1
        monkeypatch.setattr(Steps, "write", fails)
        monkeypatch.setattr(steps, "empty_slots", fails)
        for _ in range(2):  # the one that fails, and one behind it
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_failed"
            until(lambda: engine.closed)
        assert httpx.get(f"{url}/health").status_code == 503


def test_a_closed_engine_and_a_deadline_are_503(ovis, steps, slowly):
    engine = Engine(ovis, steps, queue=9)
    limits = replace(LIMITS, seconds=1)  # less than `slowly` lets the answer take
    app = make_app(engine, ovis.processor, "ovis-tiny", limits=limits)
    with (
        listening(app) as (_, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as client,
    ):
        request = {"messages": say("Go on."), **ASK, **ENDLESS}
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(**request)
        assert caught.value.status_code == 503 and caught.value.code == "deadline_exceeded"
        with pytest.raises(openai.APIError, match="longer than this server allows"):
            list(client.chat.completions.create(stream=True, **request))
        threading.Thread(target=engine.close, args=(30,)).start()
        until(lambda: engine.closed)
        assert httpx.get(f"{url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(max_retries=0).chat.completions.create(**request)
        assert caught.value.code == "shutting_down"
