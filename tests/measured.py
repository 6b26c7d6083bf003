"""Differences that tests measure, printed as a table at the end of the run."""

import re

_found: list[tuple[str, float, float]] = []


def record(name: str, difference: float, allowed: float) -> None:
    """Note a difference that the running test has found and what it may be."""
    # Numbers of numpy's own kind cannot pass from a worker to the table.
    _found.append((name, float(difference), float(allowed)))


def take() -> list[tuple[str, float, float]]:
    """What was noted since the last call."""
    found = _found.copy()
    _found.clear()
    return found


def table(found: list[tuple[str, float, float]]) -> list[str]:
    """The largest difference of each name, as lines of text."""
    largest: dict[str, tuple[float, float]] = {}
    for name, difference, allowed in found:
        name = re.sub(r"(row|block|position) \d+", r"\1s", name)
        before = largest.get(name, (0.0, allowed))
        largest[name] = (max(before[0], difference), max(before[1], allowed))
    width = max(map(len, largest), default=0)
    return [
        f"{name:{width}}  {difference:9.2g}  allowed {allowed:g}"
        for name, (difference, allowed) in sorted(largest.items())
    ]
