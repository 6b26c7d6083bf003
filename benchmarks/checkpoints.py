"""Random weights written once in the Hub's layout, which both sides of a benchmark then read."""

import json
import shutil
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.source import TOKENIZER_FILES
from ovis_jax.checkpoint.writer import write_json
from ovis_jax.config import OvisConfig

TESTS = Path(__file__).parents[1] / "tests"
GOLDEN = TESTS / "golden" / "tiny-f32"


def make(config: OvisConfig, folder: Path, dtypes: Collection[str]) -> dict[str, Path]:
    """Write one checkpoint a dtype below `folder`, all of the same weights; gives their folders.

    The weights are those of tests/reference; tokenizer and normalisation are those of a golden
    checkpoint, whose ids every preset has.
    """
    sys.path.insert(0, str(TESTS))
    # Neither is installed where the package is only used.
    torch: Any = import_module("torch")
    save_file: Any = import_module("safetensors.torch").save_file
    reference = import_module("reference.ovis_torch").OvisTorch.random(config, seed=0)
    folders = {dtype: folder / dtype for dtype in dtypes}
    for dtype, target in folders.items():
        target.mkdir(parents=True)
        write_small_files(target, config, dtype)
        state = reference.model.state_dict()
        if reference.tied:
            del state["llm.lm_head.weight"]
        tensors = {key: x.to(getattr(torch, dtype)).contiguous() for key, x in state.items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return folders


def write_small_files(folder: Path, config: OvisConfig, dtype: str) -> None:
    """Write all but the weights: the configs, and the tokenizer of a golden checkpoint."""
    ovis, generation = config.to_hf()
    preprocessor = json.loads((GOLDEN / "preprocessor_config.json").read_text())
    side = config.vision.image_size
    write_json(folder / "config.json", ovis | {"torch_dtype": dtype})
    write_json(folder / "generation_config.json", generation)
    size = {"height": side, "width": side}
    write_json(folder / "preprocessor_config.json", preprocessor | {"size": size})
    for name in TOKENIZER_FILES:
        shutil.copyfile(GOLDEN / name, folder / name)
