"""Models and workloads by the names that commands accept."""

from ovis_jax import presets
from ovis_jax.checkpoint.resolve import BUNDLED, find_folder_or_bundled_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.model.kv_cache import KVCacheDtype
from ovis_jax.plan.topologies import parse_mesh_sizes, parse_topology
from ovis_jax.plan.workload import Workload, default_mesh_sizes
from ovis_jax.quantization import QuantizationFormat

PUBLISHED_CONFIGS = {
    "9b": presets.ovis1_6_gemma2_9b,
    "27b": presets.ovis1_6_gemma2_27b,
    "3b": presets.ovis1_6_llama3_2_3b,
}
"""The configs of the published models, by short name."""


def load_config(name_or_folder: str) -> OvisConfig:
    """Load the config of a published model, a bundled checkpoint or a checkpoint folder.

    Args:
      name_or_folder: A key of `PUBLISHED_CONFIGS` or `BUNDLED`, or a folder with config.json.

    Raises:
      OvisError: The name is unknown, or the config in the folder is not valid.
    """
    if name_or_folder in PUBLISHED_CONFIGS:
        return PUBLISHED_CONFIGS[name_or_folder]()
    advice = f"give {', '.join([*PUBLISHED_CONFIGS, *BUNDLED])}, or a folder with config.json"
    return OvisConfig.from_folder(find_folder_or_bundled_checkpoint(name_or_folder, advice).folder)


def make_workload(
    config: OvisConfig,
    topology: str,
    batch_size: int,
    max_length: int,
    *,
    mesh: str | None = None,
    images_per_row: int = 0,
    max_partition: int = 9,
    dtype: str = "bfloat16",
    quantization: QuantizationFormat | None = None,
    kv_cache_dtype: KVCacheDtype = "auto",
) -> Workload:
    """Build a workload from the names of a topology and a mesh.

    Raises:
      OvisError: The topology or the mesh is unknown or malformed.
    """
    parsed = parse_topology(topology)
    if mesh is None:
        mesh_sizes = default_mesh_sizes(config, parsed.num_devices)
    else:
        mesh_sizes = parse_mesh_sizes(mesh)
    return Workload(
        config,
        parsed,
        mesh_sizes,
        batch_size,
        max_length,
        images_per_row,
        max_partition,
        dtype,
        quantization,
        kv_cache_dtype,
    )
