"""Checkpoints with random weights in the Hub's layout, which both sides of a benchmark read."""

import json
import shutil
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.file_io import write_json
from ovis_jax.checkpoint.resolve import TOKENIZER_FILES
from ovis_jax.config import OvisConfig

TESTS = Path(__file__).parents[2] / "tests"
GOLDEN = TESTS / "golden" / "tiny-f32"


def write_random_checkpoints(
    config: OvisConfig, folder: Path, dtypes: Collection[str]
) -> dict[str, Path]:
    """Write one checkpoint per dtype, all with the same weights.

    Weights come from the PyTorch reference in tests/reference. Tokenizer and normalization come
    from a golden checkpoint, whose token ids fit every preset.

    Args:
      config: config of the model.
      folder: folder to write below.
      dtypes: dtypes such as "float32".

    Returns:
      The checkpoint folder of each dtype.
    """
    sys.path.insert(0, str(TESTS))
    # Imported here because only this benchmark needs them.
    torch: Any = import_module("torch")
    save_file: Any = import_module("safetensors.torch").save_file
    reference = import_module("reference.ovis_torch").OvisTorch.random(config, seed=0)
    folders = {dtype: folder / dtype for dtype in dtypes}
    for dtype, target in folders.items():
        target.mkdir(parents=True)
        write_configs_and_tokenizer(target, config, dtype)
        state = reference.model.state_dict()
        if reference.tied:
            del state["llm.lm_head.weight"]
        tensors = {key: x.to(getattr(torch, dtype)).contiguous() for key, x in state.items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return folders


def write_configs_and_tokenizer(folder: Path, config: OvisConfig, dtype: str) -> None:
    """Write all files of a checkpoint but the weights."""
    ovis, generation = config.to_hf()
    preprocessor = json.loads((GOLDEN / "preprocessor_config.json").read_text())
    side = config.vision.image_size
    write_json(folder / "config.json", ovis | {"torch_dtype": dtype})
    write_json(folder / "generation_config.json", generation)
    size = {"height": side, "width": side}
    write_json(folder / "preprocessor_config.json", preprocessor | {"size": size})
    for name in TOKENIZER_FILES:
        shutil.copyfile(GOLDEN / name, folder / name)
