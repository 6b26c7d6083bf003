"""The tiny model with fewer blocks, whose compilation takes most of the tests' time."""

import json
import re
from dataclasses import replace
from pathlib import Path

from golden_copies import copy_golden, read_tensors, rewrite_shard

from ovis_jax import presets
from ovis_jax.config import OvisConfig

VISION_DEPTH, DECODER_DEPTH = 1, 2
"""The first decoder block is local, the second global."""


def shallow_config() -> OvisConfig:
    """The preset `tiny` with these depths."""
    c = presets.tiny()
    vision = replace(c.visual_tokenizer.vision, depth=VISION_DEPTH)
    return replace(
        c,
        visual_tokenizer=replace(c.visual_tokenizer, vision=vision),
        decoder=replace(c.decoder, depth=DECODER_DEPTH),
    )


def copy_shallow(destination: Path) -> Path:
    """Copy the first blocks of the golden float32 checkpoint."""
    folder = copy_golden("tiny-f32", destination)
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"]["num_hidden_layers"] = DECODER_DEPTH
    config["visual_tokenizer_config"]["backbone_config"]["num_hidden_layers"] = VISION_DEPTH
    (folder / "config.json").write_text(json.dumps(config))
    depths = {"llm": DECODER_DEPTH, "encoder": VISION_DEPTH}

    def is_kept(key: str) -> bool:
        block = re.search(r"(llm|encoder).*\.layers\.(\d+)\.", key)
        return block is None or int(block[2]) < depths[block[1]]

    gone = {key: None for key in read_tensors(folder) if not is_kept(key)}
    rewrite_shard(folder / "model.safetensors", gone)
    return folder
