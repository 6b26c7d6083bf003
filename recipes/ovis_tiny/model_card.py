"""Write the model card: `python -m recipes.ovis_tiny.model_card MODEL ACCURACY.json TEST.jsonl`."""

import argparse
import json
import math
from pathlib import Path

from ovis_jax.checkpoint.params import match_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.dataset import read_json_rows
from ovis_jax.training.config import read_train_config
from recipes.ovis_tiny.measure_accuracy import MEAN, AccuracySummary
from recipes.ovis_tiny.scenes import COLOURS, SHAPES, WORDS

FOLDER = Path(__file__).parent
TEMPLATE = """\
---
license: apache-2.0
language: [en, de]
pipeline_tag: image-text-to-text
---
# ovis-tiny

A small Ovis1.6-Gemma2 that correctly answers questions about drawn scenes: the default checkpoint
of ovis_jax, in the Hub's layout, with {parameters:,} parameters. ovis_jax itself trained it from
scratch, on a CPU.

The model knows {shapes} shapes in {colours} colours with their sizes, positions and counts; digits;
{words} words; and some small talk. It answers about square pictures, wide pictures and pairs of
pictures, in English and German. It knows nothing else: it is meant for demonstrations and tests.

## Training

`make ovis-tiny` reproduces the checkpoint with the code in `recipes/ovis_tiny/`:

1. `generate_dataset` draws scenes and writes questions about them. A hash of its content assigns
   each scene to training, validation or test, so no test scene was used for training.
   `train_tokenizer` trains a SentencePiece tokenizer with Gemma's structure on the text
   ({vocabulary:,} pieces).
2. `pretrain_vision` trains the visual path alone, with a linear probe on the visual embeddings that
   is discarded afterwards.
3. {stage1}: the model learns to describe everything in a picture.
4. {stage2}: it learns questions of all kinds, one to four per picture.
5. `pretrain_vision --align-words` moves each visual embedding towards the text embeddings of the
   words, in both languages, that name what the patches show. Only after this step does the
   model learn to say where a thing is, and whether it exists.
6. {stage3}: more questions of the hard kinds.
7. `pretrain_vision --align-words` runs again, to improve answers about places. Then {stage4}.
8. {stage5}: more questions about places.

## Accuracy

Greedy answers of `ovis_jax.generate` to {test:,} questions about test scenes. An answer is correct
only if it equals the single expected answer exactly. "new phrasing" means that training has no
question with the same wording.

{table}
"""


def describe_stage(name: str) -> str:
    """Describe a training run by its config file."""
    config = read_train_config(FOLDER / f"{name}.toml")
    data, training = config.data, config.training
    rows = data.micro_batch_size * data.gradient_accumulation_steps
    *first, last = config.trainable
    parts = f"{', '.join(first)} and {last}" if first else last
    return (
        f"`ovis-jax train` trains {parts} ({training.max_steps:,} steps of {rows} rows, AdamW with"
        f" a learning rate of {training.learning_rate:g}, {training.compute_dtype} compute with"
        " float32 weights)"
    )


def accuracy_markdown(summary: AccuracySummary) -> str:
    """Format accuracies as a Markdown table."""
    names = list(summary[MEAN])
    lines = ["| kind | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for kind, columns in summary.items():
        cells = [f"{columns[name]:.1%}" if name in columns else "" for name in names]
        lines.append(f"| {' | '.join([kind, *cells])} |")
    return "\n".join(lines)


def format_model_card(model_folder: Path, accuracy_file: Path, test_file: Path) -> str:
    """Fill in the template with figures of the checkpoint, its accuracy and the test set."""
    config = OvisConfig.from_folder(model_folder)
    plan, _ = match_checkpoint(model_folder, config)
    return TEMPLATE.format(
        parameters=sum(math.prod(entry.shape) for entry in plan.sources.values()),
        shapes=len(SHAPES),
        colours=len(COLOURS),
        words=len(WORDS),
        vocabulary=config.decoder.vocab_size,
        **{name: describe_stage(name) for name in map("stage{}".format, range(1, 6))},
        test=len(read_json_rows(test_file)),
        table=accuracy_markdown(json.loads(accuracy_file.read_text())),
    )


def main() -> None:
    """Parse the command line and write README.md to the checkpoint folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder")
    parser.add_argument("accuracy", type=Path, metavar="ACCURACY.json", help="measured accuracy")
    parser.add_argument("test", type=Path, metavar="TEST.jsonl", help="test questions")
    args = parser.parse_args()
    card = format_model_card(args.model, args.accuracy, args.test)
    (args.model / "README.md").write_text(card)


if __name__ == "__main__":
    main()
