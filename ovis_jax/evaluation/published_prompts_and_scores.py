"""Published prompts, settings and benchmark scores of Ovis1.6-Gemma2 (assets/published.toml)."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The labels of multiple-choice options, in order."""


@dataclass(frozen=True)
class PublishedBenchmarks:
    """The content of assets/published.toml.

    Attributes:
      settings: max_new_tokens and max_partition.
      prompts: prompt templates by purpose.
      scores: percentages by model, then by benchmark.
      average_scores: percentages averaged over all benchmarks, by model.
      aliases: other names of benchmarks, in lower-case letters and digits.
      metric_notes: how a benchmark is scored where that is not by exact match.
    """

    settings: Mapping[str, int]
    prompts: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]
    average_scores: Mapping[str, float]
    aliases: Mapping[str, Sequence[str]]
    metric_notes: Mapping[str, str]

    def find_benchmark(self, name: str) -> str | None:
        """Return the benchmark with this name or alias, ignoring case and punctuation, or None."""
        wanted = _letters_and_digits(name)
        for benchmark in next(iter(self.scores.values())):
            if wanted in (_letters_and_digits(benchmark), *self.aliases.get(benchmark, ())):
                return benchmark
        return None

    def multiple_choice_prompt(
        self, question: str, options: Mapping[str, str], hint: str = ""
    ) -> str:
        """Return the prompt for a question with options, which are given by letter."""
        return self._prompt(question, options, hint) + self.prompts["multiple_choice"]

    def yes_no_prompt(self, question: str, hint: str = "") -> str:
        """Return the prompt for a question whose answer is yes or no."""
        return self._prompt(question, {}, hint) + self.prompts["yes_no"]

    def open_prompt(self, question: str, hint: str = "") -> str:
        """Return the prompt for any other question: the question itself."""
        return self._prompt(question, {}, hint)

    def _prompt(self, question: str, options: Mapping[str, str], hint: str) -> str:
        if hint:
            question = self.prompts["hint"].format(hint=hint, question=question)
        template = self.prompts["option"]
        return question + "".join(
            template.format(letter=letter, text=text) for letter, text in options.items()
        )


@cache
def load_published_benchmarks() -> PublishedBenchmarks:
    """Read assets/published.toml."""
    text = resources.files("ovis_jax").joinpath("assets/published.toml").read_text("utf-8")
    return PublishedBenchmarks(**tomllib.loads(text))


def _letters_and_digits(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
