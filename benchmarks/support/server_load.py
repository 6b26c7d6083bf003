"""An HTTP client that puts load on a server of ovis-tiny.

It asks given questions at a given concurrency, or sends random requests of all kinds. Some random
requests are malformed, and some are given up before the answer arrives.
"""

import asyncio
import base64
import io
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import httpx
import numpy as np
from PIL import Image

WORDS = ("what", "is", "this", "red", "7")
INVALID_FIELDS: tuple[dict[str, Any], ...] = (
    {"n": 99},
    {"temperature": "a"},
    {"tools": [1]},
    {"messages": 3},
)
IMAGE_SIZES = ((84, 84), (40, 90), (170, 84))


def png_data_url(image: Image.Image) -> str:
    """Return an image as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def noise_image(seed: int, size: tuple[int, int]) -> Image.Image:
    """Return an image of random pixels; `size` is width and height."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def chat_body(text: str, *image_urls: str, **fields: Any) -> dict[str, Any]:
    """Return the body of a request about images, greedy unless `fields` says otherwise."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in image_urls
    ]
    content = [*parts, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": "ovis-tiny", "messages": messages, "temperature": 0, **fields}


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Return the kind of a random request (complete, stream, leave or invalid) and its body."""
    kind = rng.choice(["complete"] * 4 + ["stream"] * 3 + ["leave"] * 2 + ["invalid"])
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    size = rng.choice(IMAGE_SIZES)
    body = chat_body(
        text,
        *(png_data_url(noise_image(rng.randrange(9), size)) for _ in range(rng.choice([0, 0, 1]))),
        max_tokens=rng.randint(1, 12),
        temperature=rng.choice([0, 0.7, 1.5]),
        top_p=rng.choice([None, 0.9]),
        n=rng.choice([1, 1, 1, 2]),
        stop=rng.choice([None, ["."], "e"]),
        stream=kind == "stream" or (kind == "leave" and rng.random() < 0.5),
    )
    return kind, body | (rng.choice(INVALID_FIELDS) if kind == "invalid" else {})


async def send_random_request(client: httpx.AsyncClient, seed: int) -> str:
    """Send a random request.

    Returns:
      The status, "left" if the client gave up, or "wrong: " and what was wrong.
    """
    rng = random.Random(seed)
    kind, body = random_request(rng)
    try:
        async with asyncio.timeout(rng.random() * 0.3 if kind == "leave" else 600):
            response = await client.post("/v1/chat/completions", json=body)
    except TimeoutError:
        return "left" if kind == "leave" else "wrong: no answer"
    status = response.status_code
    if status not in ((400, 429) if kind == "invalid" else (200, 429)):
        return f"wrong: {status} {response.text[:200]}"
    if status != 200:
        complete = bool(response.json()["error"]["message"])
    elif body["stream"]:
        complete = response.text.rstrip().endswith("[DONE]")
    else:
        choices = response.json()["choices"]
        complete = len(choices) == body["n"] and all(c["finish_reason"] for c in choices)
    return str(status) if complete else f"wrong: {response.text[:200]}"


async def send_random_requests(url: str, num_requests: int, concurrency: int) -> Counter[str]:
    """Send random requests, and count the results of `send_random_request`."""
    return Counter(await _map(url, send_random_request, range(num_requests), concurrency))


def time_requests(url: str, bodies: list[dict[str, Any]], concurrency: int) -> tuple[int, float]:
    """Send all bodies; return the number of generated tokens and the time in seconds."""

    async def send(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
        response = await client.post("/v1/chat/completions", json=body)
        response.raise_for_status()
        return response.json()["usage"]["completion_tokens"]

    start = time.perf_counter()
    tokens = sum(asyncio.run(_map(url, send, bodies, concurrency)))
    return tokens, time.perf_counter() - start


async def _map(
    url: str,
    send: Callable[[httpx.AsyncClient, Any], Awaitable[Any]],
    items: Iterable[Any],
    concurrency: int,
) -> list[Any]:
    """Return `send(client, item)` for each item."""
    limits = httpx.Limits(max_connections=concurrency)
    free = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def send_when_free(item: Any) -> Any:
            async with free:
                return await send(client, item)

        return await asyncio.gather(*map(send_when_free, items))
