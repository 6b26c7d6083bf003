"""A client of a server of ovis-tiny: questions so many at a time, or a storm of all kinds.

Of a storm's requests a part is malformed, and a part is given up before the answer is there.
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
FLAWS: tuple[dict[str, Any], ...] = (
    {"n": 99},
    {"temperature": "a"},
    {"tools": [1]},
    {"messages": 3},
)
SIZES = ((84, 84), (40, 90), (170, 84))


def data_url(image: Image.Image) -> str:
    """A picture as requests carry it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def noise(seed: int, size: tuple[int, int]) -> Image.Image:
    """A picture of nothing."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8))


def ask(text: str, *urls: str, **options: Any) -> dict[str, Any]:
    """The body of a request."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    content = [*parts, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return {"model": "ovis-tiny", "messages": messages, "temperature": 0, **options}


def draw(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """What a client does, and its body."""
    kind = rng.choice(["whole"] * 4 + ["stream"] * 3 + ["leave"] * 2 + ["bad"])
    text = " ".join(rng.choices(WORDS, k=rng.randint(1, 20)))
    size = rng.choice(SIZES)
    body = ask(
        text,
        *(data_url(noise(rng.randrange(9), size)) for _ in range(rng.choice([0, 0, 1]))),
        max_tokens=rng.randint(1, 12),
        temperature=rng.choice([0, 0.7, 1.5]),
        top_p=rng.choice([None, 0.9]),
        n=rng.choice([1, 1, 1, 2]),
        stop=rng.choice([None, ["."], "e"]),
        stream=kind == "stream" or (kind == "leave" and rng.random() < 0.5),
    )
    return kind, body | (rng.choice(FLAWS) if kind == "bad" else {})


async def send(client: httpx.AsyncClient, seed: int) -> str:
    """Send one request; what became of it: a status, "left", or "wrong" and why."""
    rng = random.Random(seed)
    kind, body = draw(rng)
    try:
        async with asyncio.timeout(rng.random() * 0.3 if kind == "leave" else 600):
            answer = await client.post("/v1/chat/completions", json=body)
    except TimeoutError:
        return "left" if kind == "leave" else "wrong: no answer"
    status = answer.status_code
    if status not in ((400, 422, 429) if kind == "bad" else (200, 429)):
        return f"wrong: {status} {answer.text[:200]}"
    if status != 200:
        whole = bool(answer.json()["error"]["message"])
    elif body["stream"]:
        whole = answer.text.rstrip().endswith("[DONE]")
    else:
        choices = answer.json()["choices"]
        whole = len(choices) == body["n"] and all(c["finish_reason"] for c in choices)
    return str(status) if whole else f"wrong: {answer.text[:200]}"


async def storm(url: str, requests: int, at_once: int) -> Counter[str]:
    """Send so many requests, so many at a time; counts what became of them."""
    return Counter(await _crowd(url, send, range(requests), at_once))


def ask_all(url: str, bodies: list[dict[str, Any]], at_once: int) -> tuple[int, float]:
    """Ask all, so many at a time; the tokens that were written, and the seconds it took."""

    async def one(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
        answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        return answer.json()["usage"]["completion_tokens"]

    start = time.perf_counter()
    tokens = sum(asyncio.run(_crowd(url, one, bodies, at_once)))
    return tokens, time.perf_counter() - start


async def _crowd(
    url: str,
    ask: Callable[[httpx.AsyncClient, Any], Awaitable[Any]],
    items: Iterable[Any],
    at_once: int,
) -> list[Any]:
    """Ask for each item, so many at a time; what came of each."""
    limits = httpx.Limits(max_connections=at_once)
    free = asyncio.Semaphore(at_once)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=None) as client:

        async def one(item: Any) -> Any:
            async with free:
                return await ask(client, item)

        return await asyncio.gather(*map(one, items))
