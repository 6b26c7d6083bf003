"""Continuous batching: answers do not depend on other requests, none waits for a whole prompt."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import numpy as np
import pytest
from compilations import compilations
from serving_setup import (
    CHUNK_SIZE,
    MAX_NUM_SEQS,
    SIZES,
    is_idle,
    make_image,
    wait_until,
)

import ovis_jax
from ovis_jax import Sampling, load
from ovis_jax.engine.request import Delta, EngineError, Failure
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.engine.scheduler import (
    DEADLINE_EXCEEDED,
    ENGINE_FAILED,
    REQUEST_FAILED,
    SHUTTING_DOWN,
    QueueFullError,
    run_engine,
)
from ovis_jax.inputs.tokenizer import IncrementalDetokenizer
from ovis_jax.mesh import tensor_parallel_mesh
from ovis_jax.model.quantized_kv import QuantizedKV

ENDLESS = {"sampling": Sampling(repetition_penalty=0.01), "max_new_tokens": 200}
"""A penalty below 1 makes a model repeat itself up to the maximum length."""


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
            images = [make_image(n, (84 * (1 + n % 3), 84))]
        made.append((text, images))
    return made


@pytest.mark.exhaustive
def test_32_concurrent_requests_equal_each_alone_and_compile_nothing(scheduler, submit, scenes):
    asked = questions(scenes, 32)
    with compilations() as found:
        alone = [submit(scheduler, *pair).text() for pair in asked]
        with ThreadPoolExecutor(32) as pool:  # in any order
            together = list(pool.map(lambda pair: submit(scheduler, *pair), asked))
        assert [submitted.text() for submitted in together] == alone
    assert found == []
    assert len(set(alone)) > 16 and is_idle(scheduler)


def test_answers_equal_those_of_generate(scheduler, submit, ovis, scenes):
    """The same tokens for the same key, although prefilled in chunks next to other requests."""
    turns, images, _ = scenes[0]
    inputs = ovis.processor([list(turns)], [images])
    assert np.sum(inputs.positions >= 0) > CHUNK_SIZE
    for temperature, top_k, top_p in ((0.0, 9, 0.9), (1.3, 1024, 1.0), (1.5, 9, 0.95)):
        sampling = Sampling(temperature, top_k, top_p)
        out = ovis_jax.generate(
            ovis.model, ovis.params, inputs, jax.random.key(5), max_new_tokens=12, sampling=sampling
        )
        if top_p == 1.0:  # the mode "temperature" leaves out options without effect
            sampling = Sampling(temperature)
        expected = ovis.processor.decode(np.asarray(out.tokens))[0]
        options = dict(sampling=sampling, seed=5, max_new_tokens=12)
        others = [
            submit(scheduler, f"Who is {n}?", sampling=Sampling(2.0), seed=n) for n in range(3)
        ]
        assert submit(scheduler, list(turns), images, **options).text() == expected
        assert all(isinstance(other.last_event(), Delta) for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(
    "penalties",
    [
        {"frequency_penalty": 4.0},
        {"presence_penalty": 6.0, "repetition_penalty": 1.3},
        {"frequency_penalty": -3.0, "temperature": 1.4, "min_p": 0.2, "top_p": 0.9},
    ],
)
def test_penalties_equal_those_of_generate(scheduler, submit, ovis, penalties):
    prompt = "Describe the picture."
    options = dict(max_new_tokens=20, sampling=Sampling(**penalties))
    inputs, image = ovis.processor(prompt, make_image(3)), [make_image(3)]
    out = ovis_jax.generate(ovis.model, ovis.params, inputs, jax.random.key(5), **options)
    expected = ovis.processor.decode(np.asarray(out.tokens))[0]
    plain = submit(scheduler, prompt, image, max_new_tokens=20, seed=5)
    penalized = submit(scheduler, prompt, image, seed=5, **options)  # in the same batch
    assert penalized.text() == expected != plain.text()
    assert submit(scheduler, prompt, image, max_new_tokens=20, seed=5).text() == plain.text()


@pytest.mark.slow
def test_fields_of_a_request_that_change_its_tokens(scheduler, submit, ovis):
    """Each in a batch with other requests, without compilation."""
    encode = ovis.processor.tokenizer.encode
    with compilations() as found:
        plain = submit(scheduler, "Who?", max_new_tokens=60)
        ids = encode(plain.text())
        (red,) = encode(" red")
        biased = submit(scheduler, "Who?", logit_bias=((red, 100.0),), max_new_tokens=12)
        banned = submit(scheduler, "Who?", logit_bias=((ids[0], -100.0),), max_new_tokens=60)
        stopped = submit(scheduler, "Who?", stop_token_ids=(ids[2],), max_new_tokens=12)
        endless = submit(scheduler, "Who?", ignore_eos=True, max_new_tokens=80)
        long = submit(scheduler, "Who?", min_tokens=70, max_new_tokens=80)
        again = submit(scheduler, "Who?", max_new_tokens=60)
        assert biased.text() == " red" * 12
        assert encode(banned.text())[0] != ids[0]
        assert stopped.text() == ovis.processor.tokenizer.decode(ids[:2])
        assert stopped.request.completion_tokens == 3
        assert endless.last_event().finish_reason == "length"
        assert endless.request.completion_tokens == 80
        assert endless.text().startswith(plain.text()) and long.text().startswith(plain.text())
        assert 70 < long.wait().request.completion_tokens
        assert again.text() == plain.text() and plain.request.completion_tokens < 60
    assert found == []


def test_a_seed_gives_one_answer_whatever_else_runs(scheduler, submit):
    hot = dict(sampling=Sampling(2.0, top_p=0.999, repetition_penalty=1.2), max_new_tokens=20)
    alone = submit(scheduler, "Tell me a story.", seed=2**40 + 3, num_choices=3, **hot)
    texts = [alone.text(n) for n in range(3)]
    assert len(set(texts)) == 3
    others = [submit(scheduler, f"Now {n}!", seed=n, **hot) for n in range(6)]
    again = submit(scheduler, "Tell me a story.", seed=2**40 + 3, num_choices=3, **hot)
    assert [again.text(n) for n in range(3)] == texts
    assert submit(scheduler, "Tell me a story.", seed=3, **hot).text() != texts[0]
    assert len({other.text() for other in others}) == 6


def test_greedy_choices_of_one_prompt_are_equal(scheduler, submit):
    submitted = submit(scheduler, "Say it.", num_choices=MAX_NUM_SEQS, max_new_tokens=9)
    assert len({submitted.text(n) for n in range(MAX_NUM_SEQS)}) == 1
    assert submitted.request.num_unfinished == 0 and is_idle(scheduler)


@pytest.mark.slow
def test_a_long_prompt_does_not_stall_running_sequences(
    make_scheduler, submit, decode_gate, monkeypatch
):
    """With a small budget, one step of prefill runs between two decode steps."""
    steps = []
    for name in ("run_encoder", "run_prefill", "run_start", "run_decode"):
        method = getattr(ModelRunner, name)

        def noted(self, *arguments, name=name, method=method):
            steps.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(ModelRunner, name, noted)
    scheduler = make_scheduler(max_num_batched_tokens=1)
    running = [submit(scheduler, "Go on.", **ENDLESS)]
    decode_gate.run(0)  # the other requests wait until all are in the queue
    running += [submit(scheduler, "Go on.", **ENDLESS) for _ in range(MAX_NUM_SEQS - 2)]
    long = submit(scheduler, "What is there?", [make_image(1, (252, 252))], max_new_tokens=2)
    decode_gate.open()
    for submitted in (*running, long):
        submitted.text()
    letters = {"run_encoder": "e", "run_prefill": "p", "run_start": "s", "run_decode": "d"}
    work = "".join(letters[name] for name in steps)
    third, fourth = [n for n, letter in enumerate(work) if letter == "s"][2:]
    work = work[third + 1 : fourth]  # while all other slots are taken
    assert work.count("e") == 10  # the whole picture and nine cells
    assert work.count("p") == -(-len(long.request.tokens) // CHUNK_SIZE)
    prefill = work.replace("e", "p")
    assert "pp" not in prefill and prefill.count("d") >= prefill.count("p") - 1, work


def test_aborted_requests_free_their_slots(scheduler, submit, decode_gate):
    many = [submit(scheduler, f"Number {n}", **ENDLESS) for n in range(2 * MAX_NUM_SEQS)]
    decode_gate.run(2 * MAX_NUM_SEQS)
    assert scheduler.num_running == MAX_NUM_SEQS and scheduler.num_waiting == MAX_NUM_SEQS
    for submitted in many:
        scheduler.abort(submitted.request)
    decode_gate.open()
    assert is_idle(scheduler)
    assert not any(submitted.complete.is_set() for submitted in many)
    assert isinstance(submit(scheduler, "Still there?").last_event(), Delta)


def test_a_deadline_ends_running_and_waiting_requests(scheduler, submit, decode_gate):
    many = [submit(scheduler, f"Number {n}", **ENDLESS) for n in range(2 * MAX_NUM_SEQS)]
    decode_gate.run(2 * MAX_NUM_SEQS)
    assert scheduler.num_running == MAX_NUM_SEQS and scheduler.num_waiting == MAX_NUM_SEQS
    for submitted in many:
        submitted.request.deadline = 0.0
    decode_gate.open()
    for submitted in many:
        assert submitted.last_event() == DEADLINE_EXCEEDED
        assert sum(isinstance(event, Failure) for event in submitted.events) == 1
    assert is_idle(scheduler)


def test_a_full_queue_rejects_requests(make_scheduler, submit, decode_gate):
    scheduler = make_scheduler(max_queued_requests=1)
    accepted = [submit(scheduler, "Number 0")]
    decode_gate.run(0)
    accepted.append(submit(scheduler, "Number 1"))
    for n in range(2, 5):
        with pytest.raises(QueueFullError, match="1 requests are waiting"):
            submit(scheduler, f"Number {n}")
    decode_gate.open()
    assert all(submitted.text() for submitted in accepted)
    assert submit(scheduler, "Number 2").text()


def test_closing_finishes_running_requests_and_rejects_new_ones(make_scheduler, submit):
    scheduler = make_scheduler(max_queued_requests=40)
    many = [submit(scheduler, f"Number {n}", max_new_tokens=15) for n in range(12)]
    closing = threading.Thread(target=scheduler.close, args=(60.0,))
    closing.start()
    wait_until(scheduler, lambda: scheduler.failure)
    with pytest.raises(EngineError, match="shutting down") as caught:
        submit(scheduler, "Too late?")
    assert caught.value.failure == SHUTTING_DOWN
    closing.join()
    assert all(isinstance(submitted.last_event(), Delta) for submitted in many)


def test_requests_fail_after_the_shutdown_timeout(make_scheduler, submit, decode_gate):
    scheduler = make_scheduler()
    many = [submit(scheduler, f"Number {n}", **ENDLESS) for n in range(6)]
    decode_gate.run(2)
    closing = threading.Thread(target=scheduler.close, args=(0.0,))
    closing.start()
    wait_until(scheduler, lambda: scheduler._abort)
    decode_gate.open()
    assert [submitted.last_event() for submitted in many] == [SHUTTING_DOWN] * 6
    closing.join()


def test_a_step_that_fails_fails_its_requests_only(make_scheduler, submit, monkeypatch, caplog):
    scheduler = make_scheduler()
    failed = threading.Event()
    run_decode = ModelRunner.run_decode

    def fails_once(self, *arguments):
        if not failed.is_set():
            failed.set()
            raise RuntimeError("the device is on fire")
        return run_decode(self, *arguments)

    monkeypatch.setattr(ModelRunner, "run_decode", fails_once)
    assert submit(scheduler, "Hello?").last_event() == ENGINE_FAILED
    assert "on fire" in caplog.text
    assert isinstance(submit(scheduler, "Hello?").last_event(), Delta)


@pytest.mark.parametrize("where", ["logit_bias", "stop_token_ids", "sampled"])
def test_an_invalid_token_id_fails_its_request_only(
    make_scheduler, submit, monkeypatch, caplog, where
):
    """A vocabulary may be larger than the tokenizer's, so that such an id can also be sampled."""
    scheduler, push = make_scheduler(), IncrementalDetokenizer.push
    text = submit(scheduler, "Who is it?", max_new_tokens=9).text()

    def checked(detokenizer, token):
        return push(detokenizer, 10**6 if token == 77 else token)

    monkeypatch.setattr(IncrementalDetokenizer, "push", checked)
    invalid = {
        "logit_bias": {"logit_bias": ((2**40, 1.0),)},
        "stop_token_ids": {"stop_token_ids": (2**40,)},
        "sampled": {"logit_bias": ((77, 100.0),), "num_choices": 2},
    }
    other = submit(scheduler, "Who is it?", max_new_tokens=9)
    failing = submit(scheduler, "Who?", **invalid[where])
    assert other.text() == text and failing.wait().events == [REQUEST_FAILED]
    assert is_idle(scheduler) and "the others continue" in caplog.text


def test_an_engine_that_cannot_recover_closes(make_scheduler, runner, submit, monkeypatch):
    scheduler = make_scheduler()

    def fails(*arguments):
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(ModelRunner, "run_decode", fails)
    monkeypatch.setattr(runner, "init_decode_state", fails)
    assert submit(scheduler, "Hello?").last_event() == ENGINE_FAILED
    wait_until(scheduler, lambda: scheduler.failure)
    with pytest.raises(EngineError, match="the model failed"):
        submit(scheduler, "Hello?")
    scheduler.close(30.0)
    assert scheduler.failure == ENGINE_FAILED


@pytest.mark.exhaustive
def test_a_sharded_model_gives_the_same_answers(scheduler, submit, scenes):
    # Pictures that the model knows: on noise, another order of summation may tip a token.
    asked = [(list(turns), images) for turns, images, _ in scenes[:8]]
    with run_engine(load("ovis-tiny", mesh=tensor_parallel_mesh(2)), **SIZES) as other:
        keys, _ = other._state.cache.blocks[0]
        assert keys.addressable_shards[0].data.shape[1] == keys.shape[1] / 2
        with compilations() as found:
            submitted = [submit(other, *pair) for pair in asked]
            texts = [one.text() for one in submitted]
    assert found == []
    assert texts == [submit(scheduler, *pair).text() for pair in asked]


@pytest.mark.exhaustive
def test_an_int8_cache_gives_the_same_answers(ovis, scheduler, submit, scenes):
    """The engine reads prompts in chunks, `ask` reads them whole."""
    int8 = replace(ovis, model=replace(ovis.model, kv_cache_dtype="int8"))
    asked = [(list(turns), images) for turns, images, _ in scenes[:8]]
    with run_engine(int8, **SIZES) as other:
        keys, _ = other._state.cache.blocks[0]
        assert isinstance(keys, QuantizedKV) and keys.q.dtype == np.int8
        with compilations() as found:
            submitted = [submit(other, *pair) for pair in asked]
            texts = [one.text() for one in submitted]
    assert found == []
    assert texts == [submit(scheduler, *pair).text() for pair in asked]
    assert texts[:3] == [int8.ask(*pair) for pair in asked[:3]]


@pytest.mark.slow
def test_several_prompts_are_prefilled_together(ovis, submit, request, monkeypatch):
    """A prompt waits for the one before it if both begin alike."""
    sizes = []

    def note(name):
        method = getattr(ModelRunner, name)

        def noted(self, *arguments):
            sizes.append((name, len(arguments[-1])))
            return method(self, *arguments)

        monkeypatch.setattr(ModelRunner, name, noted)

    options = {"max_num_partial_prefills": 3, "max_num_batched_tokens": 1000}
    with run_engine(ovis, **SIZES, **options) as scheduler:
        note("run_encoder")
        note("run_prefill")
        gate = request.getfixturevalue("decode_gate")
        running = submit(scheduler, "Go on.", **ENDLESS)
        gate.run(0)  # the other requests wait until all are in the queue
        sizes.clear()
        asked = [
            (f"<image>\n{n} <image>\nHere?", [make_image(n), make_image(7)]) for n in (1, 2, 3)
        ]
        asked.append(asked[2])
        together = [submit(scheduler, *pair, max_new_tokens=4) for pair in asked]
        gate.open()
        texts = [one.text() for one in (*together, running)]
        assert all(texts) and texts[2] == texts[3]
        # Four different pictures; the common one is encoded once.
        assert sum(n for name, n in sizes if name == "run_encoder") == 4
        assert [one.request.cached_crops for one in together] == [0, 1, 1, 2]
        assert ("run_encoder", 3) in sizes and ("run_prefill", 2) in sizes
        tokens = together[3].request.tokens
        assert together[3].request.cached_tokens == len(tokens) - 1
