"""Requests that repeat earlier ones: what is computed again, and that answers stay the same."""

import random

import jax.numpy as jnp
import numpy as np
import pytest
from serving_setup import CHUNK_SIZE, MAX_NUM_SEQS, is_idle, make_image

from ovis_jax.engine import scheduler as engine_scheduler
from ovis_jax.engine.prefix_cache import CachedTokens, VisualEmbeddingCache, crop_digests
from ovis_jax.engine.runner import ModelRunner
from ovis_jax.inputs.image_processing import IMAGE_SLOT

TEXT = [5, 6, 7, 8]
CROPS = [1, IMAGE_SLOT, IMAGE_SLOT, 2, IMAGE_SLOT, IMAGE_SLOT, 3]
"""Two crops of two visual tokens."""


@pytest.mark.parametrize(
    "cached, digests, prompt, expected",
    [
        (TEXT, (), [5, 6, 7, 8, 9], 4),
        (TEXT, (), [5, 6, 9, 8, 9], 2),
        (TEXT, (), TEXT, 3),  # the last position gives the logits
        (TEXT, (), [5], 0),
        (CROPS, (b"a", b"b"), [*CROPS, 4], 7),
        (CROPS, (b"a", b"c"), [*CROPS, 4], 4),
        (CROPS, (b"c", b"a"), [*CROPS, 4], 1),
    ],
)
def test_the_common_prefix(cached, digests, prompt, expected):
    row = CachedTokens(np.array(cached, np.int32), (b"a", b"b"), 20)
    common = row.common_prefix(np.array(prompt, np.int32), digests, 2, ring_slots=8)
    assert common == expected


def test_a_ring_buffer_that_has_wrapped_is_continued_from_its_end():
    row = CachedTokens(np.array(TEXT, np.int32), (), 6)
    row.append(9)  # sampled, but not read yet
    longer = np.array([*TEXT, 9, 1, 1], np.int32)
    assert row.common_prefix(longer, (), 2, ring_slots=5) == 4
    assert row.common_prefix(longer, (), 2, ring_slots=4) == 4
    row.num_cached += 1
    assert row.common_prefix(longer, (), 2, ring_slots=4) == 5
    assert row.common_prefix(np.array([*TEXT, 7, 1], np.int32), (), 2, ring_slots=5) == 0
    assert row.common_prefix(np.array([*TEXT, 7, 1], np.int32), (), 2, ring_slots=6) == 4
    row.num_cached += 1  # a token that is not known yet
    assert row.common_prefix(longer, (), 2, ring_slots=4) == 0


def test_positions_that_a_shorter_cache_does_not_have_are_forgotten():
    row, prompt = CachedTokens(np.array(TEXT, np.int32), (), 6), np.array([*TEXT, 9], np.int32)
    row.truncate(4, ring_slots=5)
    assert row.common_prefix(prompt, (), 2, ring_slots=5) == 4
    row.truncate(2, ring_slots=5)
    assert row.common_prefix(prompt, (), 2, ring_slots=5) == 2
    wrapped = CachedTokens(np.array(TEXT, np.int32), (), 6)
    wrapped.truncate(2, ring_slots=4)
    assert wrapped.common_prefix(prompt, (), 2, ring_slots=4) == 0


def test_the_least_recently_used_embeddings_are_dropped():
    cache, embeddings = VisualEmbeddingCache(8), jnp.zeros((1, 1))
    for name in (b"a", b"b"):
        cache.put(name, embeddings)
    assert cache.get(b"a") is embeddings
    cache.put(b"c", embeddings)
    assert [cache.get(name) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.num_bytes == 8
    cache.clear()
    assert cache.get(b"a") is None and cache.num_bytes == 0


def test_digests_depend_on_the_content():
    crops = np.zeros((3, 2, 2, 3), np.float32)
    crops[1, 1, 1, 2] = 1
    first, second, third = crop_digests(crops)
    assert first == third != second


@pytest.fixture
def calls(monkeypatch):
    """Count the calls to each program."""
    found = dict.fromkeys(("run_encoder", "run_prefill"), 0)
    for name in found:
        method = getattr(ModelRunner, name)

        def counted(self, *arguments, name=name, method=method):
            found[name] += 1
            return method(self, *arguments)

        monkeypatch.setattr(ModelRunner, name, counted)
    return found


def converse(scheduler, submit, images):
    """Ask about one picture, then another; return the submitted requests."""
    turns, submitted = [], []
    for question in ("<image>\nWhat is it?", "Where is it?", "<image>\nAnd here?", "Why?"):
        turns.append({"role": "user", "content": question})
        shown = images[: sum(turn["content"].count("<image>") for turn in turns)]
        submitted.append(submit(scheduler, list(turns), shown, max_new_tokens=8))
        turns.append({"role": "assistant", "content": submitted[-1].text()})
    return submitted


def test_a_conversation_reads_only_its_new_turn(make_scheduler, submit, calls):
    images = [make_image(1, (84, 84)), make_image(2, (84, 84))]
    plain = converse(make_scheduler(enable_prefix_caching=False), submit, images)
    assert calls["run_encoder"] == 1 + 1 + 2 + 2
    assert [one.request.cached_tokens for one in plain] == [0] * 4
    scheduler = make_scheduler()
    calls.update(run_encoder=0)
    found = converse(scheduler, submit, images)
    assert calls["run_encoder"] == 2
    assert [one.text() for one in found] == [one.text() for one in plain]
    for before, after in zip(found, found[1:], strict=False):
        kept = len(before.request.tokens) + before.request.completion_tokens
        assert kept - 1 <= after.request.cached_tokens <= kept
    # The same picture in a new conversation is not encoded again, and it ends the common prefix.
    text = "Let us look at a new picture together. " * 2
    for image, prefix in ((images[0], 0), (images[1], 1)):
        again = submit(scheduler, text + "<image>\nWhat is it?", [image], max_new_tokens=8)
        assert again.text() and calls["run_encoder"] == 2
        slot = list(again.request.tokens).index(IMAGE_SLOT)
        assert slot > 16 and again.request.cached_tokens == prefix * slot
    assert [one.request.cached_crops for one in (*found, again)] == [0, 1, 1, 2, 1]


def test_a_repeated_prompt_reads_one_position(make_scheduler, submit, calls):
    scheduler = make_scheduler()
    prompt = "Tell me. " * 20
    first = submit(scheduler, prompt, num_choices=MAX_NUM_SEQS, max_new_tokens=3)
    texts = {first.text(n) for n in range(MAX_NUM_SEQS)}
    assert len(first.request.tokens) > 2 * CHUNK_SIZE and calls["run_prefill"] > 2
    calls.update(run_prefill=0)
    again = submit(scheduler, prompt, num_choices=MAX_NUM_SEQS, max_new_tokens=3)
    assert {again.text(n) for n in range(MAX_NUM_SEQS)} == texts
    assert calls["run_prefill"] == 1
    assert again.request.cached_tokens == len(again.request.tokens) - 1


@pytest.mark.slow
def test_answers_of_random_conversations_stay_the_same(make_scheduler, submit, scenes, monkeypatch):
    """Conversations continue, branch and begin, up to two at a time and past the window of 128.

    Meanwhile, the cache grows and shrinks.
    """
    resized, resize_cache = [], ModelRunner.resize_cache

    def record(runner, state, *lengths):
        resized.append(lengths)
        return resize_cache(runner, state, *lengths)

    monkeypatch.setattr(ModelRunner, "resize_cache", record)
    monkeypatch.setattr(engine_scheduler, "SHRINK_AFTER", 3)
    rng = random.Random(0)
    cached, plain = make_scheduler(), make_scheduler(enable_prefix_caching=False)
    conversations = [([], [])]
    reused = 0
    for _ in range(20):
        asked = []
        for _ in range(rng.randint(1, 2)):
            turns, images = rng.choice(conversations[-6:])
            scene_turns, scene_images, _ = rng.choice(scenes)
            turns, images = [*turns, *scene_turns], [*images, *scene_images]
            try:
                submitted = submit(cached, turns, images, max_new_tokens=rng.choice([2, 12, 24]))
            except ValueError:
                continue
            asked.append((turns, images, submitted))
        for turns, images, submitted in asked:
            new = submitted.request.max_new_tokens
            text = submitted.text()
            assert text == submit(plain, turns, images, max_new_tokens=new).text()
            reused += submitted.request.cached_tokens > 128
            if len(submitted.request.tokens) < 200:
                conversations.append(([*turns, {"role": "assistant", "content": text}], images))
    assert reused > 3 and is_idle(cached)
    assert {(128, 256), (256, 128)} <= {*resized}
