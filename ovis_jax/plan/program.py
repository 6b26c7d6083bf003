"""What can be trusted of a compiled program: its memory, and what stands in its text."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import jax

ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

_COLLECTIVE = re.compile(
    r" = (?P<result>\(.*?\)|\S+)"
    r" (?P<kind>all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
    r"(?P<start>-start)?\("
)
_COPY = re.compile(r" = (\w+)\[([\d,]+)\]\S* (copy|transpose)\(")
_KERNEL = re.compile(
    r"%?(?P<name>[\w.-]+) = [^\n]*"
    r'custom_call_target="(?P<target>[^"]*(?:tpu_custom_call|mosaic|triton|cu[a-z]+\$)[^"]*)"'
)
"""Calls of Pallas kernels on TPU and GPU and of NVIDIA's libraries, without XLA's own marks."""


def bytes_a_device(tree: Any) -> int:
    """Bytes of placed shapes on one device, without the padding of its memory's tiles."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes on one device, as the compiler counts them."""
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "output": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
    }


def collectives(hlo: str) -> dict[str, dict[str, int]]:
    """Collectives of a compiled program by kind: how many, and the bytes of their results.

    Those in the body of a loop count once, as they stand in the program.
    """
    counts, sizes = Counter(), Counter()
    for kind, arrays in _collective_results(hlo):
        counts[kind] += 1
        for dtype, shape in arrays:
            sizes[kind] += ITEM_BYTES[dtype] * math.prod(shape)
    return {kind: {"count": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)}


def _collective_results(hlo: str) -> Iterable[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    for match in _COLLECTIVE.finditer(hlo):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
        if match["start"] and match["kind"] != "all-reduce":
            # What an asynchronous start gives: operands, results and, of a permute, two flags.
            arrays = [array for array in arrays if array != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        yield match["kind"], [(dtype, _sizes(axes)) for dtype, axes in arrays]


def _sizes(axes: str) -> tuple[int, ...]:
    return tuple(map(int, axes.split(","))) if axes else ()


def of_weights(hlo: str, shapes: Iterable[tuple[int, ...]]) -> dict[str, int]:
    """How often a program makes or sends again what is as large as a weight.

    Args:
      hlo: the text of a compiled program.
      shapes: of the matrices, whole and as one device holds them.

    Returns:
      "copies" (copies and transposes), "all-gathers" and "all-reduces" whose result has the sizes
      of one of the shapes, in any order, axes of size 1 left out.
    """
    known = {_plain(shape) for shape in shapes}
    found = Counter({"copies": 0, "all-gathers": 0, "all-reduces": 0})
    for match in _COPY.finditer(hlo):
        found["copies"] += _plain(_sizes(match[2])) in known
    for kind, arrays in _collective_results(hlo):
        if kind in ("all-gather", "all-reduce"):
            found[f"{kind}s"] += any(_plain(shape) in known for _, shape in arrays)
    return dict(found)


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def all_reduces_a_block(hlo: str) -> int:
    """The most all-reduces that one decoder block has, by the name of what they came from."""
    counts = Counter()
    for line in hlo.splitlines():
        if re.search(r" all-reduce(-start)?\(", line):
            block = re.search(r"Decoder/(block_\d+)/", line)
            if block:
                counts[block[1]] += 1
    return max(counts.values(), default=0)


def kernels(hlo: str) -> dict[str, int]:
    """Kernels and library calls of a program, with how often they stand in it.

    A Pallas kernel has its own name before that of the call, such as "splash_mha_fwd
    tpu_custom_call". XLA makes kernels, too, and names them after the product that they began as.
    """
    found = (
        f"{re.sub(r'[.][0-9.]+$', '', match['name'])} {match['target']}"
        for match in _KERNEL.finditer(hlo)
    )
    return dict(Counter(found).most_common())


def refused_bytes(message: str) -> int | None:
    """What a program would take of a device's memory, where the compiler says that it is too much.

    None where it says no such thing, as of memory other than the large one.
    """
    sizes = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT])\b", message)
    if "hbm" not in message.lower() or not sizes:
        return None
    number, unit = sizes[0]
    return int(float(number) * 1024 ** ("KMGT".index(unit) + 1))
