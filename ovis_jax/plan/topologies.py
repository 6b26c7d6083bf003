"""Known accelerators with their memory, bandwidth and speed, and their topologies."""

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal, NamedTuple

from ovis_jax.errors import OvisError

GIB = 2**30


@dataclass(frozen=True)
class DeviceSpec:
    """Data sheet of one JAX device: a chip, or part of a chip if `devices_per_chip` is above 1."""

    platform: Literal["tpu", "cuda"]
    memory_bytes: int
    """Device memory available to programs, in bytes."""
    memory_bandwidth: float
    """Bandwidth of the device memory, in bytes per second."""
    peak_flops: float
    """Peak rate of dense bfloat16 floating point operations, per second."""
    link_bandwidth: float
    """Total bandwidth to all neighboring devices, in bytes per second in one direction."""
    shapes: tuple[str, ...]
    """The shapes of the known topologies, smallest first."""
    devices_per_chip: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
_COUNTS = tuple(str(n) for n in range(1, 9))

# TPU memory is the capacity that libtpu 0.0.42 reports when a program exceeds it. All other TPU
# figures are from docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x. Those pages list
# figures per chip, and links in both directions; the figures below are per JAX device and for one
# direction. GPU memory and bandwidth are from OpenXLA's target specs h100_sxm and a100_sxm_80. GPU
# FLOPS and links (NVLink, 900 and 600 GB/s in both directions) are from NVIDIA's H100 and A100 data
# sheets (SXM, 80 GB).
DEVICES = {
    "v4": DeviceSpec("tpu", int(30.75 * GIB), 1.2e12, 275e12, 150e9, _CUBES),
    "v5e": DeviceSpec("tpu", int(15.75 * GIB), 0.819e12, 197e12, 200e9, _FLAT),
    "v5p": DeviceSpec("tpu", int(95.74 * GIB), 2.765e12, 459e12, 600e9, _CUBES),
    "v6e": DeviceSpec("tpu", int(31.25 * GIB), 1.638e12, 918e12, 400e9, _FLAT),
    "tpu7x": DeviceSpec("tpu", int(94.75 * GIB), 3.69e12, 1153.5e12, 300e9, _CUBES, 2),
    "h100": DeviceSpec("cuda", 84942979072, 3.352e12, 989e12, 450e9, _COUNTS),
    "a100": DeviceSpec("cuda", 85100068864, 2.039e12, 312e12, 300e9, _COUNTS),
}


@dataclass(frozen=True)
class Topology:
    """A number of connected devices of the same kind, such as v5e:2x4."""

    kind: str
    """The kind of device, which is a key of `DEVICES`."""
    shape: str
    """The number of chips along each dimension, such as 2x4; for GPUs, the number of GPUs."""

    @property
    def name(self) -> str:
        """The kind and the shape, such as v5e:2x4 or h100:8."""
        return f"{self.kind}:{self.shape}"

    @property
    def device(self) -> DeviceSpec:
        """The data sheet of each device."""
        return DEVICES[self.kind]

    @property
    def num_devices(self) -> int:
        """The number of JAX devices."""
        return self.device.devices_per_chip * math.prod(map(int, self.shape.split("x")))

    def larger(self) -> list["Topology"]:
        """Return the topologies of the same kind that have more devices, smallest first."""
        shapes = self.device.shapes
        return [Topology(self.kind, shape) for shape in shapes[shapes.index(self.shape) + 1 :]]


def parse_topology(name: str) -> Topology:
    """Parse a topology name such as v5e:2x4 or h100:8.

    Raises:
      OvisError: The name is unknown. The message suggests the closest topology and lists all
        topologies.
    """
    kind, _, shape = name.strip().lower().partition(":")
    if kind not in DEVICES or shape not in DEVICES[kind].shapes:
        raise OvisError(
            f"topology {name!r} is unknown; the closest known one is {_closest_topology(name)}."
            f" Known topologies: {known_topologies()}"
        )
    return Topology(kind, shape)


def known_topologies() -> str:
    """Return a line that lists all topologies, such as "v5e:1x1, 2x2, 2x4; h100:1, 2"."""
    return "; ".join(f"{kind}:{', '.join(one.shapes)}" for kind, one in DEVICES.items())


def _closest_topology(name: str) -> str:
    """Return the topology with the most similar kind and the next larger number of devices."""
    kind, *shape = re.split("[:-]", name.strip().lower(), maxsplit=1)
    kinds = get_close_matches(kind, DEVICES, n=1, cutoff=0.4) or list(DEVICES)
    topologies = [Topology(kind, shape) for kind in kinds for shape in DEVICES[kind].shapes]
    wanted = math.prod(map(int, re.findall(r"\d+", "".join(shape))))
    large_enough = [topology for topology in topologies if topology.num_devices >= wanted]
    if large_enough:
        return min(large_enough, key=lambda topology: topology.num_devices).name
    return max(topologies, key=lambda topology: topology.num_devices).name


class MeshSizes(NamedTuple):
    """The sizes of the two mesh axes."""

    data: int
    model: int


def parse_mesh_sizes(text: str) -> MeshSizes:
    """Parse mesh sizes such as "data=1,model=8"; an omitted axis has size 1.

    Raises:
      OvisError: An axis is unknown or repeated, or a size is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(data|model)\s*=\s*([1-9]\d*)\s*", part)
        if match is None:
            raise OvisError(
                f"mesh {text!r}: cannot read {part.strip()!r}; expected sizes of at least 1 for the"
                " axes data and model, such as data=1,model=8"
            )
        if match[1] in sizes:
            raise OvisError(f"mesh {text!r}: axis {match[1]!r} is given twice; give each axis once")
        sizes[match[1]] = int(match[2])
    return MeshSizes(sizes.get("data", 1), sizes.get("model", 1))
