"""Published prompts, settings and benchmark scores of Ovis1.6-Gemma2 (assets/published.toml)."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

OPTION_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""The letters that label multiple-choice options, in order."""


@dataclass(frozen=True)
class PublishedBenchmarks:
    """The content of assets/published.toml.

    Attributes:
      settings: The published values of max_new_tokens and max_partition.
      prompts: Prompt templates by purpose.
      scores: Percentages by model, then by benchmark.
      average_scores: Percentages averaged over all benchmarks, by model.
      aliases: Benchmark names by alias; an alias consists of lower-case letters and digits.
      metric_notes: Scoring method of each benchmark that is not scored by exact match.
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

    def format_prompt(
        self, question: str, hint: str, options: Mapping[str, str], *, is_yes_no: bool
    ) -> str:
        """Return the published prompt for a question.

        Args:
          question: The question.
          hint: Text before the question; it may be empty.
          options: The options of a multiple-choice question by letter; empty for other questions.
          is_yes_no: Whether the answer is yes or no.
        """
        if hint:
            question = self.prompts["hint"].format(hint=hint, question=question)
        for letter, text in options.items():
            question += self.prompts["option"].format(letter=letter, text=text)
        ending = "multiple_choice" if options else "yes_no" if is_yes_no else ""
        return question + self.prompts.get(ending, "")


@cache
def load_published_benchmarks() -> PublishedBenchmarks:
    """Read the published prompts, settings and scores from assets/published.toml."""
    text = resources.files("ovis_jax").joinpath("assets/published.toml").read_text("utf-8")
    return PublishedBenchmarks(**tomllib.loads(text))


def _letters_and_digits(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
