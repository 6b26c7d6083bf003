"""Constraints on answers: JSON schemas, regular expressions, lists of choices and grammars.

llguidance compiles a constraint, and a `Matcher` determines which tokens may follow at each
position of an answer. All work of llguidance runs in threads of this module, because a complex
constraint can take much longer for one token than a decode step.
"""

import json
import re
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt32

from ovis_jax.errors import OvisError, require_extra
from ovis_jax.inputs.tokenizer import Tokenizer

ConstraintKind = Literal["json", "regex", "choice", "grammar"]

MAX_CHARACTERS: dict[ConstraintKind, int] = {
    "json": 2**17,
    "regex": 2**17,
    "choice": 2**17,
    "grammar": 2**14,
}
"""Maximum number of characters in a constraint. The maximum for grammars is lower, because
compiling a grammar in the GBNF format takes quadratic time."""

STACK_BYTES = 2**29
"""Stack size of the threads, in bytes. The compiler's recursion is as deep as the nesting of
references in a constraint. The deepest nesting that `MAX_CHARACTERS` allows needs about a quarter
of this size. A stack takes no memory until it is used."""

PARSER_LIMITS = {"max_lexer_states": 50_000, "verbose_errors": False}
"""Limits that differ from llguidance's defaults. Each lexer state takes 1 to 2 kB of memory."""


class Constraint(NamedTuple):
    """A constraint on an answer.

    The value is a JSON schema, a regular expression that the whole answer must match, a JSON list
    of strings, or a grammar in the Lark or GBNF format.
    """

    name: str
    """Name of the constraint in errors, such as the path of a request's field."""
    kind: ConstraintKind
    value: str


class ConstraintError(OvisError):
    """A constraint cannot be compiled, or becomes too complex while an answer is generated.

    Args:
      name: Name of the constraint.
      reason: What is wrong with the constraint.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name


class Matcher:
    """The progress of one answer through its constraint.

    `advance` returns at once. `is_complete` and `mask` are valid after `wait`.

    Args:
      name: Name of the constraint.
      matcher: llguidance's matcher.
      mask: Array to write masks into; the constructor writes the first mask.

    Attributes:
      mask: The tokens that may follow, as one bit per token id, starting with the lowest bit.
      is_complete: Whether nothing can follow, so that the answer ends.

    Raises:
      ConstraintError: The constraint allows no answer, or it is too complex.
    """

    def __init__(self, name: str, matcher: Any, mask: UInt32[np.ndarray, "n"]):
        self.mask, self.is_complete = mask, False
        self._name, self._matcher = name, matcher
        self._pending: Future[None] | None = None
        self._update()

    def wait_until(self, deadline: float) -> bool:
        """Wait for the last `advance`, until `time.monotonic()` is at `deadline` at most.

        Returns:
          Whether it is done.
        """
        if self._pending is None or self._pending.done():
            return True
        seconds = max(deadline - time.monotonic(), 0.0)
        return bool(wait_for_futures([self._pending], seconds).done)

    def wait(self) -> None:
        """Wait until the last `advance` is done.

        Raises:
          ConstraintError: The constraint became too complex.
        """
        if self._pending is not None:
            self._pending.result()

    def advance(self, token: int) -> None:
        """Append a token, which `mask` must allow, to the answer; another thread does the work."""
        self._pending = _thread_pool("masks").submit(self._advance, token)

    def _advance(self, token: int) -> None:
        try:
            self._matcher.consume_token(token)
            self._update()
        except ConstraintError:
            raise
        except BaseException as error:  # a panic in Rust, which must not end the engine's thread
            raise ConstraintError(self._name, _one_line(str(error))) from error

    def _update(self) -> None:
        self.is_complete = self._matcher.is_stopped()
        if not self.is_complete:
            self._matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        if self._matcher.is_error():
            raise ConstraintError(self._name, _one_line(self._matcher.get_error()))


class ConstraintCompiler:
    """Compiles constraints for the vocabulary of one model.

    Args:
      tokenizer: Tokenizer of the model.
      vocab_size: V, the number of logits, which may be larger than the number of pieces.
      eos_ids: Ids that end an answer.

    Raises:
      OvisError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]):
        with require_extra("serve"):
            import llguidance
        self._num_words = -(-vocab_size // 32)
        vocabulary = llguidance.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, eos_ids))
        self._tokenizer = llguidance.LLTokenizer(vocabulary, eos_token=list(eos_ids))

    def compile(self, constraint: Constraint, num_choices: int = 1) -> Future[tuple[Matcher, ...]]:
        """Compile a constraint in another thread.

        Args:
          constraint: The constraint.
          num_choices: Number of matchers to return.

        Returns:
          A future whose result is one matcher per choice, or whose exception is a
          `ConstraintError`.
        """
        return _thread_pool("constraints").submit(self._compile, constraint, num_choices)

    def _compile(self, constraint: Constraint, num_choices: int) -> tuple[Matcher, ...]:
        from llguidance import LLMatcher, LLParserLimits, grammar_from, regex_to_lark

        name, kind, value = constraint
        if len(value) > MAX_CHARACTERS[kind]:
            reason = f"{len(value)} characters, but the maximum is {MAX_CHARACTERS[kind]}"
            raise ConstraintError(name, reason)
        try:
            if kind == "json":  # JSON without white space, which a model may repeat endlessly
                options: Any = {"whitespace_flexible": False}
                grammar = LLMatcher.grammar_from_json_schema(value, defaults=options)
            elif kind == "choice":
                grammar = LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(value))))
            elif kind == "regex":  # \d matches ASCII digits only, as users expect of numbers
                grammar = LLMatcher.grammar_from_regex(regex_to_lark(value, "d"))
            else:
                grammar = grammar_from("grammar", value)
            first = LLMatcher(
                self._tokenizer, grammar, log_level=0, limits=LLParserLimits(**PARSER_LIMITS)
            )
        except ValueError as error:
            raise ConstraintError(name, _one_line(str(error))) from None
        copies = [first, *(first.deep_copy() for _ in range(num_choices - 1))]
        masks = np.zeros((num_choices, self._num_words), np.uint32)
        return tuple(Matcher(name, *pair) for pair in zip(copies, masks, strict=True))


class _Vocabulary:
    """A tokenizer in the form that `llguidance.TokenizerWrapper` expects."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]):
        self.eos_token_id, self.bos_token_id = min(eos_ids), None
        self.tokens = [tokenizer.token_bytes(i) for i in range(len(tokenizer.pieces))]
        self.tokens += [b""] * (vocab_size - len(self.tokens))  # ids without a piece
        # No part of an answer's text may be a token that ends the answer.
        self.special_token_ids = sorted({*tokenizer.special_ids, *eos_ids})
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        """Encode a text that a constraint requires."""
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, parse_special_tokens=False)


@cache
def _thread_pool(name: str) -> ThreadPoolExecutor:
    """Return the thread pool called `name`, which has two threads with large stacks."""
    pool, started = ThreadPoolExecutor(2, f"ovis-{name}"), threading.Barrier(2)
    previous = threading.stack_size(STACK_BYTES)
    try:
        for _ in range(2):
            pool.submit(started.wait)
    finally:
        threading.stack_size(previous)
    return pool


def _one_line(message: str) -> str:
    """Return the part of llguidance's error message that is meant for users, as one line."""
    message = " ".join(message.split("\n<")[0].split())
    message = message.replace("NoExtensionBias", "no answer can satisfy it")
    return message if len(message) <= 300 else f"{message[:300]}..."
