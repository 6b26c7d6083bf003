"""The server as a process, and its end after SIGTERM."""

import re
import signal
import subprocess
import sys
from typing import Any

import httpx
import pytest
from openai import OpenAI


@pytest.fixture
def process_and_url():
    """A server with one short slot: its process and its address."""
    options = [
        "--max-num-seqs=1",
        "--max-model-len=192",
        "--prefill-chunk=64",
        "--max-new-tokens=64",
    ]
    command = [sys.executable, "-m", "ovis_jax", "serve", "--port=0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    notes, found = "", None
    while not found:
        line = process.stderr.readline()
        notes += line
        assert line, notes  # the process ended
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
    yield process, found.group()
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.slow
def test_a_running_answer_is_finished_after_sigterm(process_and_url):
    process, url = process_and_url
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        question = [{"role": "user", "content": "Which day comes after Sunday?"}]
        request: Any = {"model": "ovis-tiny", "messages": question, "temperature": 0}
        complete = client.chat.completions.create(**request)
        texts, reasons = [], []
        for chunk in client.chat.completions.create(**request, stream=True):
            if not texts:
                process.send_signal(signal.SIGTERM)
            (choice,) = chunk.choices
            texts.append(choice.delta.content or "")
            reasons.append(choice.finish_reason)
    assert "".join(texts) == complete.choices[0].message.content
    assert reasons[-1] == "stop"
    # uvicorn raises the signal again after the shutdown.
    assert process.wait(60) in (0, -signal.SIGTERM)
    assert "Traceback" not in process.stderr.read()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")
