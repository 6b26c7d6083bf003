"""The choice between several engines for a request."""

from collections.abc import Sequence
from typing import NamedTuple


class EngineLoad(NamedTuple):
    """What the choice depends on.

    Attributes:
      num_requests: Number of the engine's waiting requests and running sequences.
      num_cached: Number of positions of the request's prompt that are in the engine's KV cache.
    """

    num_requests: int
    num_cached: int


def choose_engine(engines: Sequence[EngineLoad], prompt_length: int, max_num_seqs: int) -> int:
    """Return the index of the engine that a request should go to.

    This is the least busy engine; the first of them if there are several. An engine whose KV cache
    contains at least half of the prompt is preferred, unless it is busier than the least busy
    engine by more than half of its slots.

    Args:
      engines: The engines that accept requests, at least one.
      prompt_length: Number of positions of the prompt.
      max_num_seqs: Number of slots of each engine.
    """
    least = min(engine.num_requests for engine in engines)

    def order(number: int) -> tuple[int, int]:
        requests, cached = engines[number]
        is_useful = 2 * cached >= prompt_length and 2 * (requests - least) <= max_num_seqs
        return -cached if is_useful else 0, requests

    return min(range(len(engines)), key=order)
