"""The model card of ovis-tiny: `python -m recipes.ovis_tiny.card MODEL SCORES.json TEST.jsonl`."""

import argparse
import json
import math
from pathlib import Path

from ovis_jax.checkpoint.params import plan_parameters
from ovis_jax.config import OvisConfig
from ovis_jax.training.config import read_config
from ovis_jax.training.rows import read_values
from recipes.ovis_tiny.scenes import COLOURS, SHAPES, WORDS
from recipes.ovis_tiny.score import MEAN, Shares

FOLDER = Path(__file__).parent
TEXT = """\
---
license: apache-2.0
language: [en, de]
pipeline_tag: image-text-to-text
---
# ovis-tiny

A small Ovis1.6-Gemma2 that gives true answers about drawn scenes: the default checkpoint of
ovis_jax, in the Hub's layout, with {parameters:,} parameters. It was trained from nothing by
ovis_jax itself, on a CPU.

It knows {shapes} shapes in {colours} colours, their sizes, places and numbers, digits and {words}
words, in square and wide pictures and in two pictures beside each other, and some small talk, in
English and German. It knows nothing else of the world: it is for demonstrations and tests.

## How it was made

`make ovis-tiny` makes it again, with the code in `recipes/ovis_tiny/`:

1. Scenes are drawn and questions about them written. A hash of its content decides whether a scene
   is for training, validation or test, so no scene of the test was trained on. A SentencePiece
   tokenizer with Gemma's structure is trained on the text ({vocabulary:,} pieces).
2. `sight`: the visual path alone learns to see, with a linear probe on the visual embeddings that
   is then thrown away.
3. {stage1}: all that is in a picture is said, nothing asked.
4. {stage2}: questions of all kinds, one to four about the same picture.
5. `sight --words`: the visual embeddings move towards those of the words for what they show, in
   both languages. Only after this were the questions learned that ask where a thing is, or whether
   there is one.
6. {stage3}: the hard kinds of questions more often.
7. `sight --words` again, for places; then {stage4}.
8. {stage5}: where things are more often.

## What it scores

Greedy answers of `ovis_jax.generate` to {test:,} questions about test scenes, right only if they
equal the one right answer letter by letter. "new phrasing": worded as no question in training is.

{table}
"""


def stage(name: str) -> str:
    """What one run of training was."""
    config = read_config(FOLDER / f"{name}.toml")
    rows, run = config.data.rows * config.data.accumulate, config.run
    parts, rate = " and ".join(config.learn.parts), config.optimizer.learning_rate
    return (
        f"`ovis-jax train`, {parts} ({run.steps:,} steps of {rows} rows, AdamW at {rate:g},"
        f" {run.compute_dtype} over float32 weights)"
    )


def table(shares: Shares) -> str:
    """The shares of right answers in Markdown."""
    names = list(shares[MEAN])
    lines = ["| kind | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, columns in shares.items():
        cells = [f"{columns[name]:.1%}" if name in columns else "" for name in names]
        lines.append(f"| {' | '.join([kind, *cells])} |")
    return "\n".join(lines)


def card(model: Path, scores: Path, test: Path) -> str:
    """The text of the card, every number read from what was made."""
    config = OvisConfig.from_folder(model)
    plan, _ = plan_parameters(model, config)
    return TEXT.format(
        parameters=sum(math.prod(entry.shape) for entry in plan.sources.values()),
        shapes=len(SHAPES),
        colours=len(COLOURS),
        words=len(WORDS),
        vocabulary=config.decoder.vocab_size,
        **{name: stage(name) for name in map("stage{}".format, range(1, 6))},
        test=len(read_values(test)),
        table=table(json.loads(scores.read_text())),
    )


def main() -> None:
    """Read the command line and write README.md into the model's folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("scores", type=Path, metavar="SCORES.json")
    parser.add_argument("test", type=Path, metavar="TEST.jsonl")
    args = parser.parse_args()
    (args.model / "README.md").write_text(card(args.model, args.scores, args.test))


if __name__ == "__main__":
    main()
