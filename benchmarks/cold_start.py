"""A process that answers one question about one picture: print the first token and end.

`python -m benchmarks.cold_start FOLDER DTYPE THREADS PROMPT PICTURE`: what a benchmark starts to
learn how long that takes from the start of the process.
"""

import sys

from PIL import Image

import ovis_jax


def main(folder: str, dtype: str, threads: str, prompt: str, picture: str) -> None:
    """Threads are those of the cores that the process was given."""
    del threads
    ovis = ovis_jax.load(folder, dtype=dtype)
    inputs = ovis.processor([prompt], [[Image.open(picture)]])
    pieces = ovis_jax.stream(ovis.model, ovis.params, inputs, max_new_tokens=32, eos_ids=())
    print(next(pieces).tokens[0, 0], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
