"""An answer as it comes, token by token: what the terminal and the page both show."""

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from PIL import Image

from ovis_jax.inference.generate import stream
from ovis_jax.inference.sampling import Sampling
from ovis_jax.inputs.conversation import IMAGE_TEXT, Prompt
from ovis_jax.loading import LoadedOvis


@dataclass(frozen=True)
class Answer:
    """An answer so far."""

    added: str
    """What this step added to the text."""
    text: str
    tokens: tuple[int, ...]
    """The stop id among them."""
    finish_reason: Literal["stop", "length"] | None
    """None until the last step."""
    prompt_positions: int
    seconds_to_first_token: float
    seconds: float


@dataclass(frozen=True)
class Answerer:
    """A loaded model, and how it is to answer."""

    ovis: LoadedOvis
    sampling: Sampling
    seed: int
    max_new_tokens: int
    max_partition: int
    control: bool = True  # whether control marks in a text count, as in `Processor`

    def __call__(
        self, prompt: Prompt, images: Sequence[Image.Image], preface: str = ""
    ) -> Generator[Answer]:
        """Answer one prompt, one step a token; closing it ends the generation.

        Raises:
          OvisError: at the first step, if the prompt, an image or an option is refused.
        """
        ovis, start = self.ovis, time.perf_counter()
        inputs = ovis.processor(
            [prompt],
            [images],
            max_partition=self.max_partition,
            preface=preface,
            control=self.control,
        )
        pieces = stream(
            ovis.model,
            ovis.params,
            inputs,
            None if self.sampling.temperature is None else jax.random.key(self.seed),
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
        )
        prompt_positions = int(np.count_nonzero(inputs.positions >= 0))
        decoder, tokens, text, first = ovis.processor.stream_text(), (), "", 0.0
        for piece in pieces:
            token = int(piece.tokens[0, 0])
            first = first or time.perf_counter() - start
            tokens = (*tokens, token)
            stopped = token in ovis.config.eos_ids
            finished = stopped or len(tokens) == self.max_new_tokens
            added = "" if stopped else decoder.push(token)
            added += decoder.finish() if finished else ""
            text += added
            yield Answer(
                added,
                text,
                tokens,
                ("stop" if stopped else "length") if finished else None,
                prompt_positions,
                round(first, 3),
                round(time.perf_counter() - start, 3),
            )


def mark_images(text: str, count: int) -> str:
    """Put `count` marks for images before a text, unless it says itself where they stand."""
    return text if IMAGE_TEXT in text else f"{IMAGE_TEXT}\n" * count + text
