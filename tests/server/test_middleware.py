"""Checks before a body is parsed: here, the time that it may take."""

import asyncio
import json

import pytest

from ovis_jax.server.middleware import AuthAndLimitsMiddleware


def test_a_body_that_does_not_arrive_in_time():
    sent, counted = [], []

    async def app(*_):
        pytest.fail("called")

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    middleware = AuthAndLimitsMiddleware(app, None, 100, 0.0, counted.append)
    scope = {"type": "http", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(middleware(scope, receive, send))
    assert sent[0]["status"] == 408 and counted == [408]
    assert json.loads(sent[1]["body"])["error"]["code"] == "request_timeout"
