"""A process that loads a checkpoint, answers a question about an image, and prints the first token.

`python -m benchmarks.support.first_token_process FOLDER DTYPE THREADS PROMPT IMAGE`. The caller
measures the time from the start of the process.
"""

import sys

from PIL import Image

import ovis_jax


def main(folder: str, dtype: str, threads: str, prompt: str, image_path: str) -> None:
    """Print the id of the first token of an answer."""
    del threads  # determined by the cores of the process
    ovis = ovis_jax.load(folder, dtype=dtype)
    inputs = ovis.processor([prompt], [[Image.open(image_path)]])
    chunks = ovis_jax.stream(ovis.model, ovis.params, inputs, max_new_tokens=32, eos_ids=())
    print(next(chunks).tokens[0, 0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
