"""A body becomes a request to the engine: its cost before it is known whether the prompt fits."""

import asyncio
import base64
import threading
from dataclasses import replace

import numpy as np
import pytest
from image_files import add_exif_at_the_end, encode, exif_orientation
from PIL import Image
from serving_setup import LIMITS, MAX_MODEL_LEN, image_part, make_image, png_data_url

from ovis_jax.inputs.open_image import decode_data_url
from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.server import images
from ovis_jax.server.errors import ApiError
from ovis_jax.server.preprocess import MAX_THREADS, Preprocessor, convert_messages
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


IMAGE = {"type": "image"}


def converted(*messages: dict, **options):
    body = ChatRequest.model_validate({"model": "ovis-tiny", "messages": list(messages)})
    turns, images, prefix = convert_messages(body.messages, **options)
    return turns, [image.url for image, _ in images], prefix


def image_url(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    "content, expected, images",
    [
        ("T", "T", ""),
        ("Ta", "aT", "a"),
        ("aT", "aT", "a"),
        ("Tab", "abT", "ab"),
        ("aTb", "abT", "ab"),
        (" Ta", "a T", "a"),
        ("TaU", "TaU", "a"),
        ("TUa", "TUa", "a"),
        ("aTbU", "aTbU", "ab"),
        ("ab", "ab", "ab"),
    ],
)
def test_images_come_before_the_only_text_of_a_message(content, expected, images):
    """Capital letters are texts, lower-case letters are images."""

    def parts(letters, image):
        return [image(x) if x.islower() else text_part(x) for x in letters]

    message = {"role": "user", "content": parts(content, image_url)}
    turns, urls, _ = converted(message)
    assert turns == [{"role": "user", "content": parts(expected, lambda _: IMAGE)}]
    assert urls == list(images)
    turns, _, _ = converted(message, interleave=True)
    assert turns == [{"role": "user", "content": parts(content, lambda _: IMAGE)}]


def test_system_texts_come_before_the_text_and_after_the_images():
    system = {"role": "system", "content": "Be short."}
    user = {"role": "user", "content": [text_part("What?"), image_url("a")]}
    joined = text_part("Be short.\n\nWhat?")
    assert converted(system, user)[0] == [{"role": "user", "content": [IMAGE, joined]}]
    found = converted(system, user, interleave=True)[0]
    assert found == [{"role": "user", "content": [joined, IMAGE]}]
    user = {"role": "user", "content": [image_url("a")]}
    found = converted(system, user, interleave=True)[0]
    assert found == [{"role": "user", "content": [text_part("Be short.\n"), IMAGE]}]
    assert converted(system, user)[0][0]["content"] == [IMAGE, text_part("Be short.\n")]
    two = converted(system, {"role": "developer", "content": "And kind."}, user)[0]
    assert two[0]["content"][1] == text_part("Be short.\n\nAnd kind.\n")


def test_system_messages_are_turns_of_a_model_that_has_them():
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Who?"},
        {"role": "developer", "content": [text_part("And"), text_part("kind.")]},
        {"role": "user", "content": "Why?"},
    ]
    turns, _, _ = converted(*messages, system_turns=True)
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be short."),
        ("user", [text_part("Who?")]),
        ("system", "And\nkind."),
        ("user", [text_part("Why?")]),
    ]


def test_an_empty_system_message_changes_nothing():
    user = {"role": "user", "content": [image_url("a"), text_part("What?")]}
    for empty in ("", " \n", []):
        assert converted({"role": "system", "content": empty}, user) == converted(user)


def test_a_last_assistant_message_is_a_prefix():
    user, answer = {"role": "user", "content": "Who?"}, {"role": "assistant"}
    turn = {"role": "user", "content": [text_part("Who?")]}
    assert converted(user, answer | {"content": "It is"}) == ([turn], [], "It is")
    assert converted(user, answer) == ([turn], [], "")
    found = converted(user, answer, user)
    assert found == ([turn, {"role": "assistant", "content": ""}, turn], [], "")
    for messages in ([answer], [user, answer, answer]):
        with pytest.raises(ApiError, match="the last message must be the user's, or an assistant"):
            converted(*messages)


def test_images_in_ollama_s_field_are_rejected(ovis):
    message = {"role": "user", "content": "What?", "images": ["aGk="]}
    body = ChatRequest.model_validate({"model": "ovis-tiny", "messages": [message]})
    error = rejected(Preprocessor(ovis.processor, LIMITS, MAX_MODEL_LEN, 1), body)
    assert (error.param, error.code) == ("messages[0].images", "unsupported")


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


def test_images_are_turned_upright_after_the_check(ovis):
    """The size in the header of a photo from a turned camera gives another grid."""
    wide = make_image(0, (252, 84))
    stored = wide.transpose(Image.Transpose.ROTATE_90)
    transparent = Image.new("RGBA", (84, 84))
    files = {
        encode(wide): [encode(stored, exif=exif_orientation(6))],
        encode(Image.new("RGB", (84, 84), "white")): [encode(transparent)],
    }
    files[encode(wide)].append(add_exif_at_the_end(encode(stored), 6))
    preprocessor = Preprocessor(ovis.processor, LIMITS, MAX_MODEL_LEN, 1)

    def preprocess(data: bytes):
        url = f"data:image/png; base64,\n{base64.encodebytes(data).decode()}"
        body = chat_request({"type": "image_url", "image_url": url}, text_part("Who?"))
        return asyncio.run(preprocessor.preprocess(body, print))

    for plain, copies in files.items():
        expected = preprocess(plain)
        for copy in copies:
            found = preprocess(copy)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_array_equal(found.pixels, expected.pixels)


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


def test_a_text_is_tokenized_outside_of_the_event_loop(ovis, monkeypatch):
    threads, encode = [], Tokenizer.encode

    def noted(*arguments, **options):
        threads.append(threading.current_thread())
        return encode(*arguments, **options)

    preprocessor = Preprocessor(ovis.processor, LIMITS, MAX_MODEL_LEN, 1)
    monkeypatch.setattr(Tokenizer, "encode", noted)
    assert asyncio.run(preprocessor.encode_text("Who?"))
    assert len(threads) == 1 and threading.main_thread() not in threads


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
