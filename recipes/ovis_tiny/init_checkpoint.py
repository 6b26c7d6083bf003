"""Write the untrained ovis-tiny: `python -m recipes.ovis_tiny.init_checkpoint TOKENIZER DST`."""

import argparse
import math
from pathlib import Path

import jax

from ovis_jax.checkpoint.params import save_params
from ovis_jax.checkpoint.resolve import find_processor_files
from ovis_jax.config import DecoderConfig, OvisConfig, VisionConfig, VisualTokenizerConfig
from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.model.ovis import Ovis, Params

SEED = 0


def ovis_tiny_config(vocab_size: int) -> OvisConfig:
    """Make the config of ovis-tiny: nine visual tokens per crop of 84 x 84 pixels."""
    vision = VisionConfig(
        width=128,
        depth=4,
        num_heads=4,
        mlp_width=384,
        image_size=84,
        patch_size=14,
        num_channels=3,
        norm_eps=1e-6,
    )
    decoder = DecoderConfig(
        vocab_size=vocab_size,
        width=128,
        depth=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        mlp_width=384,
        sliding_window=128,
        query_pre_attn_scalar=32,
        attn_softcap=50.0,
        final_softcap=30.0,
        rope_theta=10000.0,
        norm_eps=1e-6,
    )
    return OvisConfig(
        VisualTokenizerConfig(vision, 256, 2, "softmax"),
        decoder,
        multimodal_max_length=1024,
        eos_ids=(1, 107),
        bos_id=2,
        pad_id=0,
    )


def init_params(model: Ovis, seed: int) -> Params:
    """Initialize parameters so that the visual path learns early.

    A visual embedding is the mean of many words and therefore small at first. The table is scaled
    up until visual embeddings are as large as text embeddings. Position embeddings are scaled to
    the size of patch embeddings.
    """
    params = jax.jit(model.init)(jax.random.key(seed))
    words = model.config.visual_tokenizer.num_words
    # The logits after LayerNorm are close to N(0, 1), so the softmax spreads over words / e words.
    params["visual_embedding"] *= math.sqrt(words / math.e)
    params["vision"]["position"] *= 15
    return params


def main() -> None:
    """Parse the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="tokenizer folder")
    parser.add_argument("destination", type=Path, metavar="DST", help="folder to write to")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the weights")
    args = parser.parse_args()
    model = Ovis(ovis_tiny_config(len(Tokenizer.from_folder(args.tokenizer).pieces)))
    files = {name: path.read_bytes() for name, path in find_processor_files(args.tokenizer).items()}
    params = init_params(model, args.seed)
    save_params(args.destination, params, model.config, files=files)


if __name__ == "__main__":
    main()
