"""What would fit where a case does not: the smallest change, by arithmetic."""

from collections.abc import Callable
from dataclasses import replace

from ovis_jax.errors import OvisError
from ovis_jax.plan.arguments import Case, default_mesh
from ovis_jax.plan.estimate import needs, usable_bytes

LENGTH_STEP = 128
"""Positions by which a shorter max-length is looked for."""


def fits(case: Case, more: int = 0) -> bool:
    """Whether a case is possible and stays within the memory that a plan may fill.

    `more` bytes are added to what it needs by arithmetic.
    """
    try:
        case.check()
    except OvisError:
        return False
    return needs(case).peak + more <= usable_bytes(case)


def smallest_change(case: Case, more: int = 0) -> tuple[str, Case] | None:
    """The first of these that fits: more of "model", fewer rows, shorter rows, more devices.

    Args:
      case: what does not fit.
      more: bytes by which a compiler found more than arithmetic did; taken to stay as they are.

    Returns:
      The options that say the change, such as "--batch 4", and the changed case. None where no
      topology of that kind fits.
    """
    for model in range(case.model + 1, case.data * case.model + 1):
        data, rest = divmod(case.data * case.model, model)
        changed = replace(case, data=data, model=model)
        if not rest and fits(changed, more):
            return f"--mesh data={data},model={model}", changed

    def still(**changed: int) -> bool:
        return fits(replace(case, **changed), more)

    batch = _largest(0, case.batch - 1, case.data, lambda n: still(batch=n))
    if batch:
        return f"--batch {batch}", replace(case, batch=batch)
    least, most = max(case.visual_positions, 1), case.max_length - 1
    length = _largest(least - 1, most, LENGTH_STEP, lambda n: still(max_length=n))
    if length:
        return f"--max-length {length}", replace(case, max_length=length)
    for topology in case.topology.larger():
        data, model = default_mesh(case.config, topology.num_devices)
        changed = replace(case, topology=topology, data=data, model=model)
        if fits(changed, more):
            return f"--topology {topology.name}", changed
    return None


def _largest(low: int, high: int, step: int, good: Callable[[int], bool]) -> int:
    """The largest multiple of `step` above `low`, up to `high`, that is good; 0 if there is none.

    Of those above `low` that are smaller than a good one, each is good.
    """
    none, high = low // step, high // step
    low = none
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if good(middle * step) else (low, middle - 1)
    return 0 if low == none else low * step
