"""Hundreds of random requests at once: each is answered or rejected, and no state is left."""

import asyncio

import pytest
from compilations import compilations
from serving_setup import is_idle

from benchmarks.support.server_load import send_random_requests

NUM_REQUESTS = 200


@pytest.mark.exhaustive
def test_every_request_gets_a_response_and_no_state_is_left(url, scheduler):
    with compilations() as found:
        results = asyncio.run(send_random_requests(url, NUM_REQUESTS, concurrency=32))
    assert results.total() == NUM_REQUESTS
    assert not [result for result in results if result.startswith("wrong")], results
    assert results["200"] > NUM_REQUESTS / 3 and results["left"] > 5
    assert results["400"] > 5
    assert found == []
    assert is_idle(scheduler)
    assert not any(slot.sequence for slot in scheduler._slots)
    assert not scheduler._prefills and not scheduler._waiting
