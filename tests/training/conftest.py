"""A small data set about the golden images."""

import json
from pathlib import Path

import pytest

NAMES = ("square", "tiny", "exact", "wide", "tall")


@pytest.fixture
def write_rows(golden, tmp_path):
    """Write a data set of `count` conversations, some without an image; gives its path."""

    def write(name: str, count: int, *more: dict) -> Path:
        rows = []
        for number in range(count):
            image = NAMES[number % len(NAMES)]
            asked = {"from": "human", "value": f"<image>\nQuestion {number}?"}
            told = {"from": "gpt", "value": f"It is {image}."}
            path = str(golden / f"images/{image}.png")
            rows.append({"image": path, "kind": image, "conversations": [asked, told]})
        hi = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
        rows.append({"conversations": hi})
        rows += more
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return tmp_path / name

    return write
