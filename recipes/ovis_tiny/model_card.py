"""Write the model card: `python -m recipes.ovis_tiny.model_card MODEL ACCURACY.json TEST.jsonl`."""

import argparse
import json
import math
from pathlib import Path

from ovis_jax.checkpoint.params import match_checkpoint
from ovis_jax.config import OvisConfig
from ovis_jax.inputs.dataset import read_rows_or_errors
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

ovis-tiny is a small Ovis1.6-Gemma2 model that answers questions about drawn scenes. It is the
default checkpoint of ovis_jax. It has {parameters:,} parameters and is stored in the Hub's layout.
It was trained from scratch with ovis_jax, on a CPU.

The model knows {shapes} shapes in {colours} colours, and their sizes, positions and counts. It also
knows the digits, {words} words, and some small talk. It answers questions about square pictures,
wide pictures and pairs of pictures, in English and German. It knows nothing else, because it is
meant for demonstrations and tests.

## Training

`make ovis-tiny` reproduces the checkpoint with the code in `recipes/ovis_tiny/`. All runs of
`ovis-jax train` use AdamW and keep the weights in float32.

1. `generate_dataset` draws scenes and writes questions about them. Each scene is assigned to
   training, validation or test by a hash of its content, so no test scene was used for training.
   `train_tokenizer` trains a SentencePiece tokenizer on the text. The tokenizer has Gemma's
   structure and {vocabulary:,} pieces.
2. `pretrain_vision` trains the visual path alone, with a linear probe on the visual embeddings. The
   probe is discarded afterwards.
3. {stage1}
   The model learns to describe everything in a picture.
4. {stage2}
   The model learns to answer questions of all kinds, with one to four questions per picture.
5. `pretrain_vision --align-words` moves each visual embedding towards the text embeddings of the
   English and German words that name what the patches show. Only after this step does the model
   learn to say where an object is and whether it exists.
6. {stage3}
   The training data has more questions of the hard kinds.
7. `pretrain_vision --align-words` runs again, to improve answers about places. Then
   {stage4}
8. {stage5}
   The training data has more questions about places.

## Accuracy

The table shows the accuracy of greedy answers from `ovis_jax.generate`
to {test:,} questions about test scenes. An answer is correct only if it equals the expected answer
exactly. The column "new phrasing" is for questions whose wording does not occur in training.

{table}
"""


def describe_stage(name: str) -> str:
    """Describe a training run by its config file."""
    config = read_train_config(FOLDER / f"{name}.toml")
    data, training = config.data, config.training
    rows = data.micro_batch_size * data.gradient_accumulation_steps
    *first, last = config.trainable
    parts = f"{', '.join(f'`{part}`' for part in first)} and `{last}`" if first else f"`{last}`"
    return (
        f"`ovis-jax train` trains {parts} for {training.max_steps:,} steps of {rows} rows.\n"
        f"   The learning rate is {training.learning_rate:g}, and the computation is in"
        f" {training.compute_dtype}."
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
        test=len(read_rows_or_errors(test_file)),
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
