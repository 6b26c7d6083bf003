"""Continuous batching: answers do not depend on company, nobody waits for whole prompts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from compilations import compilations
from served import PIECE, QUEUE, SLOTS, compile_steps, idle, picture, until

import ovis_jax
from ovis_jax import Sampling, load
from ovis_jax.errors import RequestError
from ovis_jax.mesh_axes import tensor_parallel
from ovis_jax.serving.answer import Failed, Piece
from ovis_jax.serving.engine import BROKEN, Closed, Engine, QueueFull
from ovis_jax.serving.steps import Steps


def questions(scenes, number: int):
    """Prompts of many lengths, with and without pictures, some cut into many crops."""
    made = []
    for n in range(number):
        turns, images, _ = scenes[n % len(scenes)]
        text = [dict(turn) for turn in turns]
        if n % 4 == 1:
            text, images = [{"role": "user", "content": f"What is {n} and so on?"}], []
        elif n % 4 == 2:
            text = [{"role": "user", "content": "Describe the picture. " * (1 + n % 9)}]
            images = [picture(n, (84 * (1 + n % 3), 84))]
        made.append((text, images))
    return made


def test_32_together_equal_each_alone_and_compile_nothing(engine, ask, scenes):
    asked = questions(scenes, 32)
    with compilations() as found:
        alone = [ask(engine, *pair).text() for pair in asked]
        with ThreadPoolExecutor(32) as pool:  # so that the order is any
            together = list(pool.map(lambda pair: ask(engine, *pair), asked))
        assert [answered.text() for answered in together] == alone
    # Preparing a prompt is numpy; what an engine runs was compiled before.
    assert found == []
    assert len(set(alone)) > 16 and idle(engine)


def test_answers_are_those_of_generate(engine, ask, ovis, scenes):
    """The same tokens for the same key, read in pieces and written among others, or alone."""
    turns, images, _ = scenes[0]
    inputs = ovis.processor([list(turns)], [images])
    assert np.sum(inputs.positions >= 0) > PIECE
    for temperature, top_k, top_p in ((0.0, 9, 0.9), (1.3, 1024, 1.0), (1.5, 9, 0.95)):
        sampling = Sampling(temperature, top_k, top_p)
        out = ovis_jax.generate(
            ovis.model, ovis.params, inputs, jax.random.key(5), max_new_tokens=12, sampling=sampling
        )
        if top_p == 1.0:  # by a step that leaves out what does nothing
            sampling = Sampling(temperature)
        expected = ovis.processor.decode(np.asarray(out.tokens))[0]
        options = dict(sampling=sampling, seed=5, max_new_tokens=12)
        others = [ask(engine, f"Who is {n}?", sampling=Sampling(2.0), seed=n) for n in range(3)]
        assert ask(engine, list(turns), images, **options).text() == expected
        assert all(other.text() is not None for other in others)


def test_a_seed_gives_one_answer_whatever_runs_beside_it(engine, ask):
    hot = dict(sampling=Sampling(2.0, top_p=0.999, repetition_penalty=1.2), max_new_tokens=20)
    alone = ask(engine, "Tell me a story.", seed=2**40 + 3, choices=3, **hot)
    texts = [alone.text(n) for n in range(3)]
    assert len(set(texts)) == 3
    others = [ask(engine, f"Now {n}!", seed=n, **hot) for n in range(6)]
    again = ask(engine, "Tell me a story.", seed=2**40 + 3, choices=3, **hot)
    assert [again.text(n) for n in range(3)] == texts
    assert ask(engine, "Tell me a story.", seed=3, **hot).text() != texts[0]
    assert len({other.text() for other in others}) == 6


def test_more_answers_than_slots_of_one_prompt(engine, ask):
    many = ask(engine, "Say it.", choices=SLOTS, max_new_tokens=9)
    assert len({many.text(n) for n in range(SLOTS)}) == 1  # greedy: all alike
    assert many.job.unfinished == 0 and idle(engine)


def test_reading_a_long_prompt_does_not_stop_those_who_write(ovis, steps, ask, slowly, monkeypatch):
    """Between two steps at most one piece is read for each idle slot."""
    happened = []
    for name in ("see", "read", "write"):
        method = getattr(Steps, name)

        def noted(self, *arguments, name=name, method=method):
            happened.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(Steps, name, noted)
    engine = Engine(ovis, steps, queue=9)
    # None of these may end early: a penalty below 1 makes them repeat themselves.
    long = dict(sampling=Sampling(repetition_penalty=0.01), max_new_tokens=60)
    first = [ask(engine, "Go on.", **long) for _ in range(SLOTS - 1)]
    until(lambda: engine.running == SLOTS - 1)
    before = len(happened)
    second = ask(engine, "What is there?", [picture(1, (252, 252))], max_new_tokens=2)
    for answered in (*first, second):
        answered.text()
    work = "".join({"see": "s", "read": "r", "write": "w"}[name] for name in happened[before:])
    assert work.count("s") == 10  # the whole picture and nine cells
    pieces = work[: work.rindex("r")].replace("s", "r")
    assert "rr" not in pieces and pieces.count("w") >= 11, work
    engine.close(30)


def test_who_goes_away_frees_the_slot(engine, ask, slowly):
    long = dict(sampling=Sampling(repetition_penalty=0.01), max_new_tokens=200)
    many = [ask(engine, f"Number {n}", **long) for n in range(2 * SLOTS)]
    until(lambda: engine.running == SLOTS)
    for answered in many:
        engine.cancel(answered.job)
    assert idle(engine)
    assert not any(answered.over.is_set() for answered in many)
    assert ask(engine, "Still there?").text() is not None


def test_a_deadline_ends_answers_that_run_and_that_wait(engine, ask, slowly):
    long = dict(sampling=Sampling(repetition_penalty=0.01), max_new_tokens=200)
    end = time.monotonic() + 0.3
    many = [ask(engine, f"Number {n}", deadline=end, **long) for n in range(2 * SLOTS)]
    for answered in many:
        last = answered.wait().events[-1]
        assert isinstance(last, Failed) and last.code == "deadline_exceeded"
        assert sum(isinstance(event, Failed) for event in answered.events) == 1
    assert idle(engine)


def test_a_full_queue_refuses(ovis, steps, ask, monkeypatch):
    """The engine is held at a step, so that it cannot take anything from the queue."""
    held, go_on = threading.Event(), threading.Event()
    write = Steps.write

    def waits(*arguments):
        held.set()
        assert go_on.wait(60)
        return write(*arguments)

    monkeypatch.setattr(Steps, "write", waits)
    engine = Engine(ovis, steps, queue=1)
    taken = [ask(engine, "Number 0")]
    assert held.wait(60)
    taken.append(ask(engine, "Number 1"))
    for n in range(2, 5):
        with pytest.raises(QueueFull, match="1 requests are waiting"):
            ask(engine, f"Number {n}")
    go_on.set()
    assert all(answered.text() for answered in taken)
    assert ask(engine, "Number 2").text()
    engine.close(30)


def test_closing_finishes_what_runs_and_takes_no_more(ovis, steps, ask):
    engine = Engine(ovis, steps, queue=40)
    many = [ask(engine, f"Number {n}", max_new_tokens=15) for n in range(12)]
    closing = threading.Thread(target=engine.close, args=(60,))
    closing.start()
    until(lambda: engine.closed)
    with pytest.raises(Closed, match="shutting down"):
        ask(engine, "Too late?")
    closing.join()
    assert all(answered.text() is not None for answered in many)


def test_closing_in_a_hurry_says_so(ovis, steps, ask, slowly):
    engine = Engine(ovis, steps, queue=9)
    long = dict(sampling=Sampling(repetition_penalty=0.01), max_new_tokens=250)
    many = [ask(engine, f"Number {n}", **long) for n in range(6)]
    engine.close(0.05)
    ends = [answered.wait().events[-1] for answered in many]
    assert all(isinstance(e, Failed) and e.code == "shutting_down" for e in ends)


def test_a_step_that_fails_fails_its_jobs_and_nothing_else(ovis, steps, ask, monkeypatch, caplog):
    engine = Engine(ovis, steps, queue=9)
    broken = threading.Event()
    write = Steps.write

    def sometimes(self, *arguments):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("the device is on fire")
        return write(self, *arguments)

    monkeypatch.setattr(Steps, "write", sometimes)
    answered = ask(engine, "Hello?").wait()
    assert isinstance(answered.events[-1], Failed)
    assert answered.events[-1].code == "engine_failed" and "on fire" in caplog.text
    assert isinstance(ask(engine, "Hello?").wait().events[-1], Piece)
    engine.close(30)


def test_an_engine_that_cannot_go_on_says_so(ovis, steps, ask, monkeypatch):
    engine = Engine(ovis, steps, queue=9)

    def fails(*arguments):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(Steps, "write", fails)
    monkeypatch.setattr(steps, "empty_slots", fails)
    assert ask(engine, "Hello?").wait().events[-1] == BROKEN
    until(lambda: engine.closed)
    assert engine.over == BROKEN
    with pytest.raises(Closed, match="the model failed"):
        ask(engine, "Hello?")
    engine.close(30)
    assert engine.over == BROKEN


@pytest.mark.parametrize("name", ["num_slots", "max_length", "piece"])
def test_sizes_are_checked(ovis, name):
    sizes = {"num_slots": 1, "max_length": 9, "piece": 9} | {name: 0}
    with pytest.raises(RequestError, match="is 0, expected at least 1"):
        Steps(ovis.model, ovis.params, **sizes)


def test_a_model_cut_over_devices_answers_as_one(engine, ask, scenes):
    cut = load("ovis-tiny", mesh=tensor_parallel(2))
    steps = compile_steps(cut)
    keys, _ = steps.empty_slots().cache.blocks[0]
    assert keys.addressable_shards[0].data.shape[1] == keys.shape[1] / 2
    spread = Engine(cut, steps, queue=QUEUE)
    # Of pictures that it knows: on noise two orders of summing may well answer otherwise.
    asked = [(list(turns), images) for turns, images, _ in scenes[:8]]
    with compilations() as found:
        answered = [ask(spread, *pair) for pair in asked]
        texts = [one.text() for one in answered]
    assert found == []
    assert texts == [ask(engine, *pair).text() for pair in asked]
    spread.close(30)
