"""Accelerators by name: memory, bandwidth, speed, and how many of them a topology has."""

import re
from dataclasses import dataclass
from typing import Literal

from ovis_jax.errors import OvisError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One device as JAX shows it: a chip, or half of a chip where `devices_a_chip` is 2."""

    platform: Literal["tpu", "cuda"]
    hbm_bytes: int
    """Memory that programs can have, in bytes."""
    hbm_bandwidth: float
    """Bytes a second."""
    flops: float
    """Peak bfloat16 floating point operations a second, without sparsity."""
    link_bandwidth: float
    """Bytes a second to all its neighbours together, in one direction."""
    shapes: tuple[str, ...]
    """What may stand behind the colon in a topology's name, smallest first."""
    devices_a_chip: int = 1


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
_COUNTS = tuple(str(n) for n in range(1, 9))

# TPU memory: what the compiler of libtpu 0.0.42 says it has when a program takes more. Other TPU
# figures: docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x, which give those of a chip
# and links in both directions; halved here for a direction, and for half a chip. GPU memory and
# bandwidth: the h100_sxm and a100_sxm_80 target specs of OpenXLA; flops and links (NVLink, 900 and
# 600 GB/s in both directions): NVIDIA's H100 and A100 data sheets, SXM, 80 GB.
DEVICES = {
    "v4": Device("tpu", int(30.75 * GIB), 1.2e12, 275e12, 150e9, _CUBES),
    "v5e": Device("tpu", int(15.75 * GIB), 0.819e12, 197e12, 200e9, _FLAT),
    "v5p": Device("tpu", int(95.74 * GIB), 2.765e12, 459e12, 600e9, _CUBES),
    "v6e": Device("tpu", int(31.25 * GIB), 1.638e12, 918e12, 400e9, _FLAT),
    "tpu7x": Device("tpu", int(94.75 * GIB), 3.69e12, 1153.5e12, 300e9, _CUBES, 2),
    "h100": Device("cuda", 84942979072, 3.352e12, 989e12, 450e9, _COUNTS),
    "a100": Device("cuda", 85100068864, 2.039e12, 312e12, 300e9, _COUNTS),
}


@dataclass(frozen=True)
class Topology:
    """Devices of one kind that are connected."""

    kind: str
    shape: str

    @property
    def name(self) -> str:
        """Such as v5e:2x4 or h100:8."""
        return f"{self.kind}:{self.shape}"

    @property
    def device(self) -> Device:
        """One of its devices."""
        return DEVICES[self.kind]

    @property
    def num_devices(self) -> int:
        """How many there are, as JAX counts them."""
        count = self.device.devices_a_chip
        for size in self.shape.split("x"):
            count *= int(size)
        return count

    def larger(self) -> list["Topology"]:
        """Those of its kind with more devices, smallest first."""
        shapes = self.device.shapes
        return [Topology(self.kind, shape) for shape in shapes[shapes.index(self.shape) + 1 :]]


def find_topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
      OvisError: there is none of that name; the message lists those that there are.
    """
    kind, _, shape = name.strip().lower().partition(":")
    if kind not in DEVICES or shape not in DEVICES[kind].shapes:
        raise OvisError(f"topology {name!r} is not known; use one of {known_topologies()}")
    return Topology(kind, shape)


def known_topologies() -> str:
    """All names, such as "v5e:1x1, 2x2, 2x4; h100:1, 2"."""
    return "; ".join(f"{kind}:{', '.join(one.shapes)}" for kind, one in DEVICES.items())


def parse_mesh(text: str) -> dict[str, int]:
    """Axis sizes from "data=1,model=8"; an axis that is left out has size 1.

    Raises:
      OvisError: the text is not of that form.
    """
    sizes = {"data": 1, "model": 1}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d*)\s*", part)
        if match is None or match[1] not in sizes:
            raise OvisError(f"mesh {text!r}: expected sizes of both axes, such as data=1,model=8")
        sizes[match[1]] = int(match[2])
    return sizes
