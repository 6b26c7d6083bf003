"""The real server: a process that listens, and what it does with a polite end."""

import re
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest
from openai import OpenAI


@pytest.fixture
def served():
    """A server with one short slot; gives its process and its address."""
    sizes = ["--slots=1", "--max-length=192", "--piece=64", "--max-tokens=64"]
    command = [sys.executable, "-m", "ovis_jax", "serve", "--port=0", *sizes]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    notes, found = "", None
    while not found:  # to the end of its notes, if it ends
        line = process.stderr.readline()
        notes += line
        assert line, notes
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
    url = found.group()
    for _ in range(1200):
        assert process.poll() is None, process.stderr.read()
        try:
            if httpx.get(f"{url}/health").json()["status"] == "ok":
                break
        except httpx.TransportError:
            time.sleep(0.1)
    yield process, url
    process.kill()
    process.wait()
    process.stderr.close()


def test_an_answer_that_has_begun_is_finished_after_sigterm(served):
    process, url = served
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        question = [{"role": "user", "content": "Which day comes after Sunday?"}]
        asked: Any = {"model": "ovis-tiny", "messages": question, "temperature": 0}
        whole = client.chat.completions.create(**asked)
        stream = client.chat.completions.create(**asked, stream=True)
        pieces, ends = [], []
        for chunk in stream:
            if not pieces:
                process.send_signal(signal.SIGTERM)
            (choice,) = chunk.choices
            pieces.append(choice.delta.content or "")
            ends.append(choice.finish_reason)
    assert "".join(pieces) == whole.choices[0].message.content
    assert ends[-1] == "stop"
    assert process.wait(30) in (0, -signal.SIGTERM)  # uvicorn raises the signal again behind it
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
