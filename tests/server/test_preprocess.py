"""A body becomes a request to the engine: its cost before it is known whether the prompt fits."""

import asyncio
import threading
from dataclasses import replace

import pytest
from PIL import Image
from serving_setup import LIMITS, MAX_MODEL_LEN, image_part, make_image, png_data_url

from ovis_jax.inputs.open_image import decode_data_url
from ovis_jax.server import images
from ovis_jax.server.errors import ApiError
from ovis_jax.server.preprocess import MAX_THREADS, Preprocessor
from ovis_jax.server.request_schema import ChatRequest


def chat_request(*parts) -> ChatRequest:
    messages = [{"role": "user", "content": list(parts)}]
    return ChatRequest.model_validate({"model": "ovis-tiny", "messages": messages})


def text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def rejected(preprocessor: Preprocessor, body: ChatRequest) -> ApiError:
    with pytest.raises(ApiError) as caught:
        asyncio.run(preprocessor.preprocess(body, print))
    assert caught.value.status_code == 400
    return caught.value


def test_a_prompt_longer_than_the_model_allows(ovis):
    """The model's own limit applies where the server's limit is higher."""
    limit = ovis.config.multimodal_max_length
    preprocessor = Preprocessor(ovis.processor, LIMITS, 4 * limit, 1)
    error = rejected(preprocessor, chat_request(text_part("word " * limit)))
    assert error.code == "context_length_exceeded" and str(limit) in error.detail


def test_images_that_do_not_fit_are_not_decoded(ovis, monkeypatch):
    body = chat_request(*[image_part(make_image(0, (252, 252)))] * 3)
    too_many_pixels = chat_request(*[image_part(make_image(0, (300, 300)))] * 3)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    positions = ovis.processor.count_image_tokens([Image.new("RGB", (252, 252))] * 3)
    preprocessor = Preprocessor(ovis.processor, LIMITS, positions, 1)
    error = rejected(preprocessor, body)
    assert (error.param, error.code) == ("messages", "context_length_exceeded")
    assert f"at most {positions} positions" in error.detail
    assert "max_partition=" in error.detail
    assert rejected(preprocessor, too_many_pixels).code == "image_too_large"


def test_a_damaged_image_is_an_error_about_its_own_field(ovis):
    part = image_part(make_image(1))
    url = part["image_url"]["url"]
    damaged = {"type": "image_url", "image_url": {"url": url[: len(url) // 8 * 4]}}
    preprocessor = Preprocessor(ovis.processor, LIMITS, MAX_MODEL_LEN, 1)
    error = rejected(preprocessor, chat_request(image_part(make_image(0)), damaged))
    assert error.param == "messages[0].content[1].image_url.url"
    assert error.code == "invalid_image"


def test_fetched_images_share_a_limit(ovis, monkeypatch):
    data, allowed = decode_data_url(png_data_url(make_image(0))), []

    async def fetch(url, max_bytes):
        allowed.append(max_bytes)
        return data

    monkeypatch.setattr(images, "_fetch", fetch)
    limits = replace(LIMITS, allow_remote_images=True)
    body = chat_request(*[{"type": "image_url", "image_url": {"url": "http://a/b"}}] * 3)
    preprocessor = Preprocessor(ovis.processor, limits, MAX_MODEL_LEN, 1)
    asyncio.run(preprocessor.preprocess(body, print))
    assert allowed == [limits.max_body_bytes - n * len(data) for n in range(3)]


def test_few_requests_are_encoded_at_a_time_outside_of_the_event_loop(ovis, monkeypatch):
    threads, running, most = set(), [], []
    barrier, encode = threading.Barrier(MAX_THREADS), Preprocessor._encode

    def noted(*arguments):
        threads.add(threading.current_thread())
        running.append(1)
        most.append(len(running))
        barrier.wait(60)  # as many as may run at a time do
        result = encode(*arguments)
        running.pop()
        return result

    monkeypatch.setattr(Preprocessor, "_encode", noted)
    preprocessor = Preprocessor(ovis.processor, LIMITS, MAX_MODEL_LEN, 1)

    async def preprocess_all():
        bodies = [
            chat_request(image_part(make_image(n)), text_part("Who?"))
            for n in range(4 * MAX_THREADS)
        ]
        return await asyncio.gather(*[preprocessor.preprocess(body, print) for body in bodies])

    requests = asyncio.run(preprocess_all())
    assert [len(request.pixels) for request in requests] == [1] * 4 * MAX_THREADS
    assert max(most) == len(threads) == MAX_THREADS
    assert threading.main_thread() not in threads
