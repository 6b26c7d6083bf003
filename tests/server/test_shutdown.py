"""Requests that do not get an answer: full queue, deadline, failed model, shutdown."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import httpx
import openai
import pytest
from openai import OpenAI
from serving_setup import (
    ENDLESS_FIELDS,
    FIELDS,
    LIMITS,
    read_metrics,
    running_server,
    user_message,
    wait_until,
)
from sse_starlette.sse import AppStatus

from ovis_jax.engine import scheduler as scheduler_module
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.server.app import create_app
from ovis_jax.server.responses import ResponseFormatter


def test_a_full_queue_and_a_shutdown(make_scheduler, decode_gate):
    """A full queue rejects requests, and streams end normally although the server shuts down."""
    scheduler = make_scheduler(max_queued_requests=1)
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS)
    with (
        running_server(app, [scheduler], shutdown_timeout=60.0) as (server, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        request = {"messages": user_message("Go on."), **FIELDS, **ENDLESS_FIELDS}
        create = partial(client.chat.completions.create, **request | {"max_tokens": 20})
        streams = [create(stream=True)]
        decode_gate.run(0)  # the first request is running, so the second one waits
        streams.append(create(stream=True))
        with pytest.raises(openai.RateLimitError) as caught:
            create()
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        server.should_exit = True
        wait_until(scheduler, lambda: scheduler.failure)
        decode_gate.open()
        ends = [list(stream)[-1].choices[0].finish_reason for stream in streams]
        assert ends == ["length", "length"]


def test_a_server_that_shuts_down_sends_503(make_scheduler, decode_gate, monkeypatch):
    """To new requests, and to those that are not complete after the shutdown timeout."""
    scheduler = make_scheduler()
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS)
    body = {"messages": user_message("Go on."), **FIELDS, "max_tokens": LIMITS.max_tokens}
    body |= ENDLESS_FIELDS["extra_body"]
    with (
        running_server(app, [scheduler], shutdown_timeout=0.0) as (server, url),
        ThreadPoolExecutor() as pool,
        httpx.Client(base_url=url, timeout=120) as client,
    ):
        post = partial(client.post, "/v1/chat/completions")
        complete = pool.submit(post, json=body)
        decode_gate.run(0)
        stream = pool.submit(post, json=body | {"stream": True})
        wait_until(scheduler, lambda: scheduler.num_waiting)
        decode_gate.run(4)  # both are running
        server.should_exit = True
        monkeypatch.setattr(AppStatus, "should_exit", True)  # set by a signal in a real server
        wait_until(scheduler, lambda: scheduler._abort)
        assert client.get("/health").status_code == 503
        rejected = post(json=body)
        decode_gate.open()
        for answer in (rejected, complete.result()):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "shutting_down"
        *chunks, last = stream.result().text.strip().split("\n\n")
        assert stream.result().status_code == 200 and len(chunks) > 2
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"


def test_a_second_ctrl_c_stops_the_server_at_once(make_scheduler, monkeypatch):
    scheduler = make_scheduler()
    may_close, closed, close = threading.Event(), threading.Event(), scheduler.close

    def blocked(timeout):
        assert may_close.wait(60)
        close(timeout)
        closed.set()

    monkeypatch.setattr(scheduler, "close", blocked)
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS)
    with running_server(app, [scheduler], shutdown_timeout=60.0) as (server, _):
        server.should_exit = server.force_exit = True
    assert not may_close.is_set() and not closed.is_set()
    may_close.set()
    assert closed.wait(60)


def test_failures_of_the_server_and_of_the_model(make_scheduler, runner, monkeypatch):
    scheduler = make_scheduler()
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS)

    def fails(*arguments):
        raise RuntimeError("nobody expects this")

    with running_server(app) as (_, url):
        body = {"messages": user_message("Who?"), **FIELDS}
        with monkeypatch.context() as patch:
            patch.setattr(ResponseFormatter, "completion", fails)
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 500 and "log" in answer.json()["error"]["message"]
        assert read_metrics(url)['ovis_requests_total{status="500"}'] == 1
        monkeypatch.setattr(ModelRunner, "run_decode", fails)
        monkeypatch.setattr(runner, "init_decode_state", fails)
        for _ in range(2):  # the request that fails, and a later one
            answer = httpx.post(f"{url}/v1/chat/completions", json=body)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_failed"
            wait_until(scheduler, lambda: scheduler.failure)
        assert httpx.get(f"{url}/health").status_code == 503


def test_a_deadline_and_a_closed_engine_are_503(make_scheduler, monkeypatch):
    scheduler = make_scheduler()
    app = create_app([scheduler], "ovis-tiny", limits=LIMITS)
    with (
        running_server(app) as (_, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as client,
    ):
        request = {"messages": user_message("Go on."), **FIELDS}
        with monkeypatch.context() as patch:  # every deadline has passed
            patch.setattr(scheduler_module, "time", SimpleNamespace(monotonic=lambda: math.inf))
            with pytest.raises(openai.InternalServerError) as caught:
                client.chat.completions.create(**request)
            assert caught.value.status_code == 503 and caught.value.code == "deadline_exceeded"
            assert read_metrics(url)['ovis_requests_total{status="503"}'] == 1  # no retry
            with pytest.raises(openai.APIError, match="longer than this server allows"):
                list(client.chat.completions.create(stream=True, **request))
        scheduler.close(30.0)
        assert httpx.get(f"{url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(max_retries=0).chat.completions.create(**request)
        assert caught.value.code == "shutting_down"
