"""The published prompts, settings and figures, read from assets/published.toml."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""How options are called, in order."""


@dataclass(frozen=True)
class Published:
    """What published.toml says.

    Attributes:
      settings: max_new_tokens and max_partition.
      prompts: templates, by what they are for.
      figures: per cent, by model, then by benchmark.
      averages: per cent over all benchmarks, by model.
      names: other names of benchmarks.
      otherwise: how a benchmark's figure is not accuracy by exact match.
    """

    settings: Mapping[str, int]
    prompts: Mapping[str, str]
    figures: Mapping[str, Mapping[str, float]]
    averages: Mapping[str, float]
    names: Mapping[str, Sequence[str]]
    otherwise: Mapping[str, str]

    def benchmark(self, name: str) -> str | None:
        """The benchmark of a name, which may be written otherwise; None where it is not known."""
        wanted = _plain(name)
        for known in next(iter(self.figures.values())):
            if wanted in (_plain(known), *self.names.get(known, ())):
                return known
        return None

    def ask_choice(self, question: str, choices: Mapping[str, str], hint: str = "") -> str:
        """The prompt of a question with options, by their letters."""
        return self._asked(question, choices, hint) + self.prompts["ask_choice"]

    def ask_yes_no(self, question: str, hint: str = "") -> str:
        """The prompt of a question whose answer is yes or no."""
        return self._asked(question, {}, hint) + self.prompts["ask_yes_no"]

    def ask_open(self, question: str, hint: str = "") -> str:
        """The prompt of any other question, which is asked as it is."""
        return self._asked(question, {}, hint)

    def _asked(self, question: str, choices: Mapping[str, str], hint: str) -> str:
        if hint:
            question = self.prompts["hint"].format(hint=hint, question=question)
        template = self.prompts["choice"]
        return question + "".join(
            template.format(letter=letter, text=text) for letter, text in choices.items()
        )


@cache
def published() -> Published:
    """What published.toml says."""
    text = resources.files("ovis_jax").joinpath("assets/published.toml").read_text("utf-8")
    return Published(**tomllib.loads(text))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
