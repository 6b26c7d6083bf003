"""A request becomes a job: what it may cost before it is known whether it fits."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from PIL import Image
from served import LIMITS, data_url, picture, shown

from ovis_jax.serving import images
from ovis_jax.serving.prepare import AT_ONCE, Preparation
from ovis_jax.serving.refusals import ApiError
from ovis_jax.serving.schema import ChatRequest


def request(*parts) -> ChatRequest:
    messages = [{"role": "user", "content": list(parts)}]
    return ChatRequest.model_validate({"model": "ovis-tiny", "messages": messages})


def text(said: str) -> dict:
    return {"type": "text", "text": said}


def refused(preparation: Preparation, body: ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(preparation(body, print))
    assert caught.value.status_code == 400
    return caught.value


def test_a_prompt_longer_than_the_model_reads(ovis):
    """Where the server's own limit, which leaves room for answers, is wider."""
    longest = ovis.config.multimodal_max_length
    preparation = Preparation(ovis.processor, LIMITS, 4 * longest, 1)
    error = refused(preparation, request(text("word " * longest)))
    assert error.code == "context_length_exceeded" and str(longest) in error.detail
    assert "prompts[0]" not in error.detail


def test_images_that_do_not_fit_are_not_decoded(ovis, monkeypatch):
    body = request(*[shown(picture(0, (252, 252)))] * 3)
    many = request(*[shown(picture(0, (300, 300)))] * 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    positions = ovis.processor.image_length([Image.new("RGB", (252, 252))] * 3, 9)
    preparation = Preparation(ovis.processor, LIMITS, positions, 1)
    error = refused(preparation, body)
    assert error.code == "context_length_exceeded"
    assert error.detail.startswith(f"messages: the images take {positions} positions")
    assert refused(preparation, many).code == "image_too_large"


def test_fetched_images_share_a_bound(ovis, monkeypatch):
    data, allowed = images.read_data_url(data_url(picture(0)), ""), []

    async def fetch(url, max_bytes):
        allowed.append(max_bytes)
        return data

    monkeypatch.setattr(images, "_fetch", fetch)
    limits = replace(LIMITS, remote_images=True)
    body = request(*[{"type": "image_url", "image_url": {"url": "http://a/b"}}] * 3)
    asyncio.run(Preparation(ovis.processor, limits, 320, 1)(body, print))
    assert allowed == [limits.max_body - n * len(data) for n in range(3)]


def test_few_requests_are_read_at_a_time_and_none_by_the_event_loop(ovis, monkeypatch):
    threads, now, most = set(), [], []
    read = images.read_data_url

    def noted(*arguments):
        threads.add(threading.current_thread())
        now.append(1)
        most.append(len(now))
        time.sleep(0.05)
        now.pop()
        return read(*arguments)

    monkeypatch.setattr(images, "read_data_url", noted)
    preparation = Preparation(ovis.processor, LIMITS, 320, 1)

    async def all_at_once():
        bodies = [request(shown(picture(n)), text("Who?")) for n in range(8)]
        return await asyncio.gather(*[preparation(body, print) for body in bodies])

    jobs = asyncio.run(all_at_once())
    assert [len(job.pixels) for job in jobs] == [1] * 8
    assert max(most) <= AT_ONCE and threading.main_thread() not in threads
