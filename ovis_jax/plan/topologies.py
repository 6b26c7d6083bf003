"""Known accelerators with their memory, bandwidth and speed, and their topologies."""

import math
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
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
    """Peak rate of dense 16-bit floating point operations, per second."""
    link_bandwidth: float
    """Total bandwidth to all neighboring devices, in bytes per second in one direction."""
    shapes: tuple[str, ...]
    """The shapes of the known topologies, smallest first."""
    devices_per_chip: int = 1
    gpu_target: Literal["h100", "a100"] | None = None
    """The GPU whose architecture programs are compiled for; None for TPUs, and for GPUs that are
    too different."""
    emulated_bfloat16_flops: float | None = None
    """Peak rate of bfloat16 operations that are computed in float32; None if they are not."""

    @property
    def jax_platform(self) -> Literal["tpu", "gpu"]:
        """The name of the platform in JAX."""
        return "tpu" if self.platform == "tpu" else "gpu"

    @property
    def has_bfloat16(self) -> bool:
        """Whether the device has units for bfloat16, as GPUs have since Ampere."""
        return self.emulated_bfloat16_flops is None


_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8")
_CUBES = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")
_COUNTS = tuple(str(n) for n in range(1, 9))

_PCIE3, _PCIE4, _PCIE5 = 16e9, 32e9, 64e9
"""Bandwidth of 16 PCIe lanes, in bytes per second in one direction."""

# TPU memory is the capacity that libtpu 0.0.42 reports when a program exceeds it. All other TPU
# figures are from docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x. Those pages list
# figures per chip, and links in both directions; the figures below are per JAX device and for one
# direction.
#
# GPU memory is what CUDA reports, which is less than advertised. For h100, b200, a100 and a6000,
# memory and bandwidth are from OpenXLA's target specs h100_sxm, b200, a100_sxm_80 and a6000. For
# other GPUs, memory is from PyTorch's out-of-memory messages and from deviceQuery (rtx3090). Other
# figures are from NVIDIA's data sheets (SXM modules, HGX B200, and the A10G of AWS) and its white
# papers on GA102, Ada and RTX Blackwell (rtx3090, rtx4090, rtx5090). FLOPS are without sparsity and
# with float32 accumulation. Links are NVLink or PCIe; NVLink bridges between pairs of rtx3090 or
# a6000 are not counted.
_COMPILED_AS_H100 = partial(DeviceSpec, "cuda", shapes=_COUNTS, gpu_target="h100")
_COMPILED_AS_A100 = partial(DeviceSpec, "cuda", shapes=_COUNTS, gpu_target="a100")

DEVICES = {
    "v4": DeviceSpec("tpu", int(30.75 * GIB), 1.2e12, 275e12, 150e9, _CUBES),
    "v5e": DeviceSpec("tpu", int(15.75 * GIB), 0.819e12, 197e12, 200e9, _FLAT),
    "v5p": DeviceSpec("tpu", int(95.74 * GIB), 2.765e12, 459e12, 600e9, _CUBES),
    "v6e": DeviceSpec("tpu", int(31.25 * GIB), 1.638e12, 918e12, 400e9, _FLAT),
    "tpu7x": DeviceSpec("tpu", int(94.75 * GIB), 3.69e12, 1153.5e12, 300e9, _CUBES, 2),
    "h100": _COMPILED_AS_H100(84942979072, 3.352e12, 989e12, 450e9),
    "h200": _COMPILED_AS_H100(int(139.8 * GIB), 4.8e12, 989e12, 450e9),
    "b200": _COMPILED_AS_H100(191514411008, 7.672e12, 2250e12, 900e9),
    "a100": _COMPILED_AS_A100(85100068864, 2.039e12, 312e12, 300e9),
    "rtx3090": _COMPILED_AS_A100(25447170048, 936e9, 71e12, _PCIE4),
    "rtx4090": _COMPILED_AS_A100(int(23.64 * GIB), 1008e9, 165.2e12, _PCIE4),
    "rtx5090": _COMPILED_AS_A100(int(31.36 * GIB), 1792e9, 209.5e12, _PCIE5),
    "l4": _COMPILED_AS_A100(int(22.03 * GIB), 300e9, 121e12, _PCIE4),
    "a10g": _COMPILED_AS_A100(int(22.03 * GIB), 600e9, 70e12, _PCIE4),
    "l40s": _COMPILED_AS_A100(int(44.39 * GIB), 864e9, 362e12, _PCIE4),
    "a6000": _COMPILED_AS_A100(51041271808, 768e9, 154.8e12, _PCIE4),
    "t4": DeviceSpec(
        "cuda", int(14.56 * GIB), 320e9, 65e12, _PCIE3, _COUNTS, emulated_bfloat16_flops=8.1e12
    ),
}

_DEVICE_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
    "NVIDIA A100-SXM4-40GB": "a100",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA A100-PCIE-40GB": "a100",
    "NVIDIA A100 80GB PCIe": "a100",
    "NVIDIA GeForce RTX 3090": "rtx3090",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA GeForce RTX 5090": "rtx5090",
    "NVIDIA L4": "l4",
    "NVIDIA A10G": "a10g",
    "NVIDIA L40S": "l40s",
    "NVIDIA RTX A6000": "a6000",
    "Tesla T4": "t4",
}
"""Keys of `DEVICES` with the same peak, by JAX's `device_kind`. Names must match completely,
because MIG slices, laptop GPUs and the PCIe version of H100 have similar names and other peaks."""


def find_peak_flops(device_kind: str) -> float | None:
    """Return the peak rate of dense bfloat16 operations of a device, per second.

    Args:
      device_kind: The kind of the device, as in `jax.Device.device_kind`.

    Returns:
      The peak, or None if the device is unknown.
    """
    if device_kind not in _DEVICE_KINDS:
        return None
    device = DEVICES[_DEVICE_KINDS[device_kind]]
    return device.emulated_bfloat16_flops or device.peak_flops


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


_CLOUD_VERSIONS = {
    "v5litepod": ("v5e", 1),
    "v5e": ("v5e", 1),
    "v6e": ("v6e", 1),
    "v5p": ("v5p", 2),
    "v4": ("v4", 2),
}
"""The kind of device and the number that Google Cloud counts per chip (2 if it counts TensorCores),
by the version in a name."""

CLOUD_TOPOLOGIES = {
    f"{version}-{topology.num_devices * per_chip}": topology
    for version, (kind, per_chip) in _CLOUD_VERSIONS.items()
    for topology in (Topology(kind, shape) for shape in DEVICES[kind].shapes)
    if per_chip == 1 or topology.num_devices >= 4
}
"""Topologies by accelerator type of Google Cloud, such as v5p-8."""


def parse_topology(name: str) -> Topology:
    """Parse a topology such as v5e:2x4 or h100:8, or a Google Cloud name such as v5litepod-8.

    Raises:
      OvisError: The name is unknown. The message suggests the closest topology and lists all
        topologies; for a Google Cloud name, it lists the known names of that version.
    """
    normalized = name.strip().lower()
    if normalized in CLOUD_TOPOLOGIES:
        return CLOUD_TOPOLOGIES[normalized]
    version, dash, _ = normalized.partition("-")
    if dash and version in _CLOUD_VERSIONS:
        known = [one for one in CLOUD_TOPOLOGIES if one.startswith(f"{version}-")]
        counted = "chips" if _CLOUD_VERSIONS[version][1] == 1 else "TensorCores, two per chip"
        raise OvisError(
            f"topology {name!r} is unknown; known names of {version}, whose number counts"
            f" {counted}: {', '.join(known)}"
        )
    kind, _, shape = normalized.partition(":")
    if kind not in DEVICES or shape not in DEVICES[kind].shapes:
        raise OvisError(
            f"topology {name!r} is unknown; the closest known one is {_closest_topology(name)}."
            f" Known topologies: {known_topologies()}"
        )
    return Topology(kind, shape)


def known_topologies() -> str:
    """Return a line that lists all topologies, such as "v5e:1x1, 2x2, 2x4; h100:1 to 8"."""
    texts = []
    for kind, device in DEVICES.items():
        counts = device.platform == "cuda"
        shapes = f"1 to {device.shapes[-1]}" if counts else ", ".join(device.shapes)
        texts.append(f"{kind}:{shapes}")
    return f"{'; '.join(texts)}; names of Google Cloud, such as v5litepod-8 or v5p-8"


def _closest_topology(name: str) -> str:
    """Return the topology with the most similar kind and the next larger number of devices."""
    kind, _, shape = name.strip().lower().partition(":")
    kinds = get_close_matches(kind, DEVICES, n=1, cutoff=0.4) or list(DEVICES)
    topologies = [Topology(kind, shape) for kind in kinds for shape in DEVICES[kind].shapes]
    wanted = math.prod(map(int, re.findall(r"\d+", shape)))
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
