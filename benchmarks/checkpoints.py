"""Random weights written once in the Hub's layout, which both sides of a benchmark then read."""

import json
import shutil
import sys
from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from ovis_jax.checkpoint.source import TOKENIZER_FILES
from ovis_jax.config import OvisConfig

TESTS = Path(__file__).parents[1] / "tests"


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
    tiny, side = TESTS / "golden" / "tiny-f32", config.vision.image_size
    preprocessor = json.loads((tiny / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"height": side, "width": side}
    folders = {dtype: folder / dtype for dtype in dtypes}
    for dtype, target in folders.items():
        target.mkdir(parents=True)
        ovis, generation = config.to_hf()
        for name, content in [
            ("config.json", ovis | {"torch_dtype": dtype}),
            ("generation_config.json", generation),
            ("preprocessor_config.json", preprocessor),
        ]:
            (target / name).write_text(json.dumps(content))
        for name in TOKENIZER_FILES:
            if (tiny / name).exists():
                shutil.copy(tiny / name, target)
        state = reference.model.state_dict()
        if reference.tied:
            del state["llm.lm_head.weight"]
        tensors = {key: x.to(getattr(torch, dtype)).contiguous() for key, x in state.items()}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return folders
