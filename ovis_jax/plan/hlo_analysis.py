"""Analysis of compiled programs: their memory, and the operations in their HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax
from jax.dtypes import itemsize_bits

HLO_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

_COLLECTIVE = re.compile(
    r" = (?P<result>\(.*?\)|\S+)"
    r" (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_COPY = re.compile(r" = (\w+)\[([\d,]+)\]\S* (copy|transpose)\(")
# This matches Pallas kernels on TPU and GPU and NVIDIA's libraries, but not XLA's own annotations.
_KERNEL = re.compile(
    r"%?(?P<name>[\w.-]+) = [^\n]*"
    r'custom_call_target="(?P<target>[^"]*(?:tpu_custom_call|mosaic|triton|cu[a-z]+\$)[^"]*)"'
)


def bytes_per_device(tree: Any) -> int:
    """Sum the bytes that sharded arrays or shapes take on one device, without tile padding."""
    leaves = jax.tree.leaves(tree)
    sizes = (math.prod(x.sharding.shard_shape(x.shape)) * itemsize_bits(x.dtype) for x in leaves)
    return sum(bits // 8 for bits in sizes)


def compiled_memory(compiled: Any) -> dict[str, int]:
    """Return the compiler's memory analysis, in bytes on one device."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }


def collective_counts_and_bytes(hlo: str) -> dict[str, dict[str, int]]:
    """Count the collectives in HLO text and the bytes of their results, by kind of collective.

    A collective in the body of a loop is counted once.
    """
    counts, sizes = Counter(), Counter()
    for kind, arrays in _collective_results(hlo):
        counts[kind] += 1
        for dtype, shape in arrays:
            sizes[kind] += HLO_ITEM_BYTES[dtype] * math.prod(shape)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)}


def _collective_results(hlo: str) -> Iterable[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    for match in _COLLECTIVE.finditer(hlo):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        if match["start"] and match["kind"] != "all-reduce":
            # An asynchronous start operation lists its operands, its results and, for a permute,
            # two flags.
            arrays = [array for array in arrays if array != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        yield match["kind"], [(dtype, _parse_shape(axes)) for dtype, axes in arrays]


def _parse_shape(axes: str) -> tuple[int, ...]:
    return tuple(map(int, axes.split(","))) if axes else ()


def count_weight_sized_operations(
    hlo: str, weight_shapes: Iterable[tuple[int, ...]]
) -> dict[str, int]:
    """Count the operations whose result has the shape of a weight matrix.

    Args:
      hlo: HLO text of a compiled program.
      weight_shapes: Full and per-device shapes of the weight matrices.

    Returns:
      The numbers of "copies" (including transposes), "all-gathers" and "all-reduces" whose result
      has the dimensions of a weight matrix in any order. Dimensions of size 1 are ignored.
    """
    known = {_dimensions(shape) for shape in weight_shapes}
    found = Counter({"copies": 0, "all-gathers": 0, "all-reduces": 0})
    for match in _COPY.finditer(hlo):
        found["copies"] += _dimensions(_parse_shape(match[2])) in known
    for kind, arrays in _collective_results(hlo):
        if kind in ("all-gather", "all-reduce"):
            found[f"{kind}s"] += any(_dimensions(shape) in known for _, shape in arrays)
    return dict(found)


def _dimensions(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def max_all_reduces_per_block(hlo: str) -> int:
    """Return the maximum number of all-reduces in a decoder block, according to operation names."""
    counts = Counter()
    for line in hlo.splitlines():
        if re.search(r" all-reduce(-start)?\(", line):
            block = re.search(r"Decoder/(block_\d+)/", line)
            if block:
                counts[block[1]] += 1
    return max(counts.values(), default=0)


def count_kernel_calls(hlo: str) -> dict[str, int]:
    """Count the calls to custom kernels and libraries, by name.

    A name consists of the kernel's name and the call target, such as "splash_mha_fwd
    tpu_custom_call". XLA's own kernels have the name of the operation that they were generated
    from.
    """
    found = (
        f"{re.sub(r'[.][0-9.]+$', '', match['name'])} {match['target']}"
        for match in _KERNEL.finditer(hlo)
    )
    return dict(Counter(found).most_common())


def parse_out_of_memory_bytes(message: str) -> int | None:
    """Parse the number of requested bytes from a compiler's out-of-memory message.

    Returns:
      The number of bytes, or None if the message has no size or is about memory other than HBM.
    """
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)
    if "hbm" not in message.lower() or not sizes:
        return None
    number, unit = sizes[0]
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
