"""Several engines behind one server: which one answers, failures, shutdown."""

from concurrent.futures import ThreadPoolExecutor
from copy import copy
from functools import partial

import httpx
import openai
import pytest
from openai import OpenAI
from serving_setup import (
    ENDLESS_FIELDS,
    FIELDS,
    LIMITS,
    MAX_NUM_SEQS,
    image_part,
    is_idle,
    make_image,
    read_metrics,
    running_server,
    user_message,
    wait_until,
)

from ovis_jax.engine.scheduler import Scheduler
from ovis_jax.server.app import create_app
from ovis_jax.server.load_balancing import EngineLoad, choose_engine


@pytest.mark.parametrize(
    "engines, expected",
    [
        ([(0, 0), (0, 0)], 0),
        ([(1, 0), (0, 0)], 1),
        ([(0, 0), (4, 50)], 1),  # it has half of the prompt
        ([(0, 0), (4, 49)], 0),
        ([(0, 0), (5, 99)], 0),  # it is much busier
        ([(9, 50), (8, 90), (6, 0)], 1),
        ([(2, 90), (1, 90), (0, 0)], 1),
    ],
)
def test_the_choice(engines, expected):
    loads = [EngineLoad(*engine) for engine in engines]
    assert choose_engine(loads, prompt_length=100, max_num_seqs=8) == expected


def asked(url: str, *messages, **fields) -> dict:
    body = {"messages": list(messages), **FIELDS, **fields}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def num_started(schedulers: list[Scheduler]) -> list[int]:
    return [scheduler._num_taken for scheduler in schedulers]


@pytest.fixture
def schedulers(make_scheduler):
    return [make_scheduler() for _ in range(3)]


def test_a_conversation_stays_with_its_engine(schedulers):
    with running_server(create_app(schedulers, "ovis-tiny", limits=LIMITS)) as (_, url):
        histories = [
            user_message(text, image_part(make_image(n)))
            for n, text in enumerate(("Which colour is it?", "Who are you?", "How many?"))
        ]
        for turn in range(3):
            for history in histories:  # the engines are idle, so they take turns
                answer = asked(url, *history)
                assert all(map(is_idle, schedulers))
                if turn:
                    cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
                    assert 2 * cached > answer["usage"]["prompt_tokens"]
                history += [answer["choices"][0]["message"], *user_message("And now?")]
            assert num_started(schedulers) == [turn + 1] * 3


def test_requests_are_spread_and_the_load_is_reported(schedulers, decode_gate):
    app = create_app(schedulers, "ovis-tiny", limits=LIMITS)
    with running_server(app) as (_, url), ThreadPoolExecutor() as pool:
        ask = partial(asked, url, *user_message("Go on."), **{"max_tokens": 8})
        answers = []
        for n in range(6):
            answers.append(pool.submit(ask))
            scheduler = schedulers[n % 3]
            wait_until(scheduler, lambda s=scheduler, k=n // 3: s.num_running + s.num_waiting > k)
        decode_gate.run(0, num_engines=3)
        health = httpx.get(f"{url}/health").json()
        assert health["max_num_seqs"] == 3 * MAX_NUM_SEQS
        assert health["running"] + health["waiting"] == 6
        for engine in health["engines"]:
            assert engine["running"] + engine["waiting"] == 2
        metrics = read_metrics(url)
        for n in range(3):
            assert metrics[f'ovis_max_num_seqs{{engine="{n}"}}'] == MAX_NUM_SEQS
            assert metrics[f'ovis_num_seqs_running{{engine="{n}"}}'] >= 1
        decode_gate.open()
        assert len({answer.result()["choices"][0]["message"]["content"] for answer in answers}) == 1
        assert all(map(is_idle, schedulers)) and num_started(schedulers) == [2, 2, 2]
        assert read_metrics(url)['ovis_requests_total{status="200"}'] == 6


def test_the_queue_is_full_when_all_queues_are(make_scheduler, decode_gate):
    schedulers = [make_scheduler(max_queued_requests=1) for _ in range(2)]
    app = create_app(schedulers, "ovis-tiny", limits=LIMITS)
    with (
        running_server(app, schedulers, shutdown_timeout=60.0) as (server, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        request = {"messages": user_message("Go on."), **FIELDS, **ENDLESS_FIELDS}
        create = partial(client.chat.completions.create, **request | {"max_tokens": 20})
        streams = [create(stream=True) for _ in schedulers]
        decode_gate.run(0, num_engines=2)  # each has started one, so the next ones wait
        streams += [create(stream=True) for _ in schedulers]
        assert [scheduler.num_waiting for scheduler in schedulers] == [1, 1]
        with pytest.raises(openai.RateLimitError) as caught:
            create()
        assert caught.value.code == "queue_full"
        server.should_exit = True  # which finishes the requests of all engines
        for scheduler in schedulers:
            wait_until(scheduler, lambda s=scheduler: s.failure)
        decode_gate.open()
        ends = [list(stream)[-1].choices[0].finish_reason for stream in streams]
        assert ends == ["length"] * 4


def test_an_engine_that_fails_leaves_the_others(schedulers, runner, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("the device is gone")

    broken, broken_runner = schedulers[0], copy(runner)
    broken_runner.run_prefill = broken_runner.init_decode_state = fails
    app = create_app(schedulers, "ovis-tiny", limits=LIMITS)
    with (
        running_server(app) as (_, url),
        OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as client,
    ):
        create = partial(client.chat.completions.create, messages=user_message("Who?"), **FIELDS)
        for _ in schedulers:
            expected = create().choices[0].message.content
        assert all(map(is_idle, schedulers))
        monkeypatch.setattr(broken, "_runner", broken_runner)
        for _ in schedulers:
            assert create().choices[0].message.content == expected
        wait_until(broken, lambda: broken.failure)
        answer = httpx.get(f"{url}/health")
        assert answer.status_code == 200 and answer.json()["status"] == "ok"
        found = [engine["status"] for engine in answer.json()["engines"]]
        assert found == ["engine_failed", "ok", "ok"]
        metrics = read_metrics(url)
        assert [metrics[f'ovis_engine_accepting{{engine="{n}"}}'] for n in range(3)] == [0, 1, 1]
        assert metrics['ovis_requests_total{status="503"}'] == 1  # it was retried
        for scheduler in schedulers[1:]:
            scheduler.close(30.0)
        assert httpx.get(f"{url}/health").status_code == 503
