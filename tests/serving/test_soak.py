"""Hundreds of requests of all kinds at once: each is answered or refused, and nothing stays."""

import asyncio

from compilations import compilations
from served import idle

from benchmarks.storm import storm

REQUESTS = 200


def test_nothing_is_lost_and_nothing_stays(url, engine):
    with compilations() as found:
        ends = asyncio.run(storm(url, REQUESTS, at_once=32))
    assert ends.total() == REQUESTS
    assert not [end for end in ends if end.startswith("wrong")], ends
    assert ends["200"] > REQUESTS / 3 and ends["left"] > 5 and ends["400"] + ends["422"] > 5
    assert found == []
    assert idle(engine)
    assert not any(engine._answers) and engine._reader is None and not engine._waiting
