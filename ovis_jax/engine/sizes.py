"""How many sequences, and of which length, fit the memory of the devices."""

import os
from typing import Any

import jax

from ovis_jax.engine.prefix_cache import MAX_VISUAL_CACHE_BYTES
from ovis_jax.engine.runner import CACHE_LENGTH_STEP, abstract_state
from ovis_jax.errors import OvisError
from ovis_jax.loading import LoadedOvis
from ovis_jax.plan.hlo_analysis import bytes_per_device

MEMORY_SHARE = 0.9
"""Share of a device's memory for the parameters, the state of the sequences and the visual
embeddings that are kept. The rest is for intermediate results."""

MAX_SEQS_ON_CPU, MAX_SEQS = 8, 64
"""Maximum number of concurrent sequences that is chosen. On accelerators, a step of more sequences
takes hardly longer."""


def choose_sizes(
    ovis: LoadedOvis, max_num_seqs: int | None, max_model_len: int | None
) -> tuple[int, int]:
    """Choose the sizes of an engine that are not given, so that it fits beside the parameters.

    Args:
      ovis: The model.
      max_num_seqs: Maximum number of concurrent sequences; None for as many as fit.
      max_model_len: Maximum total length of a prompt and its answer, in positions; None for the
        model's own maximum, or the longest that fits.

    Returns:
      Both sizes.

    Raises:
      OvisError: No sequence fits, or not as many or not as long as asked for.
    """
    device = next(iter(jax.tree.leaves(ovis.params)[0].sharding.addressable_devices))
    free = int(MEMORY_SHARE * _memory_bytes(device))
    free -= bytes_per_device(ovis.params) + MAX_VISUAL_CACHE_BYTES

    def size(num_seqs: int, length: int) -> int:
        return bytes_per_device(abstract_state(ovis.model, ovis.params, num_seqs, length))

    def longest(num_seqs: int, length: int) -> int:
        shorter = range(length // CACHE_LENGTH_STEP * CACHE_LENGTH_STEP, 0, -CACHE_LENGTH_STEP)
        return next((x for x in (length, *shorter) if size(num_seqs, x) <= free), 0)

    length = max_model_len or ovis.config.multimodal_max_length
    if max_model_len is None:
        length = longest(max_num_seqs or 1, length) or length
    num_fitting = max(free // size(1, length), 0)
    most = MAX_SEQS_ON_CPU if device.platform == "cpu" else MAX_SEQS
    num_seqs = max_num_seqs or min(most, max(num_fitting, 1))
    if num_seqs > num_fitting:
        fitting = [f"--max-num-seqs {num_fitting}"] if num_fitting else []
        fitting += [f"--max-model-len {x}" for x in [longest(num_seqs, length)] if x]
        gib = [f"{max(x, 0) / 2**30:.2f} GiB" for x in (size(num_seqs, length), free)]
        raise OvisError(
            f"the cache for {num_seqs} sequences of {length} positions takes {gib[0]} per device,"
            f" but {gib[1]} are left beside the model; "
            + (f"{' or '.join(fitting)} would fit" if fitting else "use more devices, or quantize")
        )
    return num_seqs, length


def _memory_bytes(device: Any) -> int:
    """Return the memory of a device that JAX may use."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return limit
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return memory // jax.local_device_count(device.platform)
