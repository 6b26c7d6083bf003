"""Analysis of compiled programs: their memory, and the operations in their HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.dtypes import itemsize_bits

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"(ENTRY )?%(?P<name>[\w.-]+) .*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<opcode>[\w-]+)"
    r"\((?P<operands>[^()]*)\)(.*? calls=%(?P<calls>[\w.-]+))?"
)
_ARRAY = re.compile(r"(?P<dtype>\w+)\[(?P<axes>[\d,]*)\](?P<layout>\{[^}]*\})?")
_SAME_VALUES = {
    *("bitcast", "copy", "copy-start", "copy-done", "transpose", "slice-start", "slice-done"),
    *("get-tuple-element", "custom-call", "opt-barrier"),
}
"""Opcodes whose result has the same values as the first operand. On a TPU, the custom call
ConcatBitcast reassembles an array from its slices."""

# This matches Pallas kernels on TPU and GPU and NVIDIA's libraries, but not XLA's own annotations.
_KERNEL = re.compile(
    r"%?(?P<name>[\w.-]+) = [^\n]*"
    r'custom_call_target="(?P<target>[^"]*(?:tpu_custom_call|mosaic|triton|cu[a-z]+\$)[^"]*)"'
)


def bytes_per_device(tree: Any) -> int:
    """Sum the bytes that arrays or shapes take on one device, without tile padding.

    A shape without a sharding is on one device.
    """

    def bits(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        return math.prod(shape) * itemsize_bits(x.dtype)

    return sum(bits(x) // 8 for x in jax.tree.leaves(tree))


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
    for kind, arrays in _collective_results(_parse_instructions(hlo)):
        counts[kind] += 1
        sizes[kind] += sum(_item_bits(x.dtype) * math.prod(x.shape) for x in arrays)
    return {kind: {"count": counts[kind], "bytes": sizes[kind] // 8} for kind in sorted(counts)}


def _item_bits(dtype: str) -> int:
    """Return the number of bits of a dtype, which its name in HLO states: bf16, s4 or f8e4m3fn."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 8  # pred


def _collective_results(
    instructions: Iterable["_Instruction"],
) -> Iterator[tuple[str, list["_Array"]]]:
    for x in instructions:
        kind = x.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            continue
        arrays = x.results
        if kind != x.opcode and kind != "all-reduce":
            # An asynchronous start operation lists its operands, its results and, for a permute,
            # two flags.
            arrays = [array for array in arrays if (array.dtype, array.shape) != ("u32", ())]
            arrays = arrays[len(arrays) // 2 :]
        yield kind, arrays


def _parse_shape(axes: str) -> tuple[int, ...]:
    return tuple(map(int, axes.split(","))) if axes else ()


class _Array(NamedTuple):
    """An array that an instruction computes."""

    dtype: str
    shape: tuple[int, ...]
    in_fast_memory: bool
    """Whether the array is in VMEM, the fast memory of a TPU core."""


class _Instruction(NamedTuple):
    """An instruction in HLO text."""

    computation: str
    """Name of the computation that contains the instruction."""
    is_root: bool
    """Whether the instruction's result is the result of the computation."""
    name: str
    results: list[_Array]
    opcode: str
    operands: list[str]
    """Names of the instructions whose results this instruction reads."""
    calls: str | None
    """Name of the computation that a fusion calls; None for other instructions."""


def _parse_instructions(hlo: str) -> Iterator[_Instruction]:
    computation = ""
    for line in hlo.splitlines():
        header, match = _COMPUTATION.match(line), _INSTRUCTION.match(line)
        if header:
            computation = header["name"]
        elif match:
            results = [
                _Array(x["dtype"], _parse_shape(x["axes"]), "S(1)" in (x["layout"] or ""))
                for x in _ARRAY.finditer(match["result"])
            ]
            operands = re.findall(r"%([\w.-]+)", match["operands"])
            is_root, name, opcode = bool(match["root"]), match["name"], match["opcode"]
            yield _Instruction(
                computation, is_root, name, results, opcode, operands, match["calls"]
            )


def count_weight_sized_operations(
    hlo: str, weight_shapes: Iterable[tuple[int, ...]]
) -> dict[str, int]:
    """Count the operations that write an array with the shape of a weight matrix into memory.

    Operations inside a fusion are not counted, because their results stay in registers or in fast
    memory. The results of the fusion itself are counted. Moving a result from fast memory to device
    memory is not counted as a copy.

    Args:
      hlo: HLO text of a compiled program.
      weight_shapes: Full and per-device shapes of the weight matrices, or of the blocks of a cache.

    Returns:
      The numbers of operations whose result has the dimensions of a weight matrix in any order:
      "copies" (including transposes), "dequantized" (float arrays computed from a stored int8 or
      int4 array of the same size), "all-gathers" and "all-reduces". The result of a kernel is not
      counted as dequantized, because it is a product. Dimensions of size 1 are ignored.
    """
    known = {_dimensions(shape) for shape in weight_shapes}
    instructions = list(_parse_instructions(hlo))
    by_name = {x.name: x for x in instructions}
    roots = {x.computation: x for x in instructions if x.is_root}
    fused = {x.calls for x in instructions if x.opcode == "fusion"}

    def last_operations(x: _Instruction) -> list[str]:
        """Return the opcode that computes each result; for a fusion, the opcode inside it."""
        if x.opcode == "fusion" and x.calls in roots:
            return last_operations(roots[x.calls])
        if x.opcode == "tuple":
            return [y for name in x.operands for y in last_operations(by_name[name])]
        if x.opcode == "bitcast" and x.operands[0] in by_name:
            return last_operations(by_name[x.operands[0]])
        return [x.opcode]

    def is_stored(name: str) -> bool:
        """Return whether an array is all or part of an argument of the program or the loop."""
        x = by_name.get(name)
        return x is not None and (
            x.opcode == "parameter" or (x.opcode in _SAME_VALUES and is_stored(x.operands[0]))
        )

    found = Counter({"copies": 0, "dequantized": 0, "all-gathers": 0, "all-reduces": 0})
    for x in instructions:
        if x.computation in fused or x.opcode in ("tuple", "bitcast", "copy-start"):
            continue
        sources = [
            (name, y) for name in x.operands if name in by_name for y in by_name[name].results
        ]
        integers = {
            math.prod(y.shape) for name, y in sources if y.dtype in ("s8", "s4") and is_stored(name)
        }
        from_fast_memory = len(sources) == 1 and sources[0][1].in_fast_memory
        for array, opcode in zip(x.results, last_operations(x), strict=False):
            if _dimensions(array.shape) in known and not array.in_fast_memory:
                found["copies"] += opcode in ("copy", "transpose") and not from_fast_memory
                is_computed = array.dtype in ("bf16", "f16", "f32") and opcode != "custom-call"
                found["dequantized"] += is_computed and math.prod(array.shape) in integers
    for kind, arrays in _collective_results(instructions):
        if kind in ("all-gather", "all-reduce"):
            found[f"{kind}s"] += any(_dimensions(array.shape) in known for array in arrays)
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
