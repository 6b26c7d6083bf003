"""Answers as the chat-completions API writes them, whole or as the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ovis_jax.inputs.tokenizer import Tokenizer
from ovis_jax.serving.answer import Job, Piece, TokenText, Written, piece_text


@dataclass(frozen=True)
class Reply:
    """What all parts of one answer have in common."""

    model: str
    job: Job
    tokenizer: Tokenizer
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer that is no stream, from all its pieces."""
        choices = []
        for index in range(self.job.choices):
            mine = [piece for piece in pieces if piece.choice == index]
            written = [written for piece in mine for written in piece.tokens]
            content = "".join(piece.text for piece in mine)
            choices.append(
                {
                    "index": index,
                    "message": {"role": "assistant", "content": content, "refusal": None},
                    "logprobs": self._log_probs(written),
                    "finish_reason": mine[-1].reason,
                }
            )
        return self._object("chat.completion", choices) | {"usage": self.usage()}

    def first(self, usage: bool) -> str:
        """The chunk that opens each choice."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([self._choice(n, delta) for n in range(self.job.choices)], usage)

    def piece(self, piece: Piece, usage: bool) -> list[str]:
        """The chunks of one piece: its text, and that its choice ends there."""
        chunks = []
        if piece.text or piece.tokens:
            choice = self._choice(piece.choice, {"content": piece.text})
            choice["logprobs"] = self._log_probs(piece.tokens)
            chunks.append(self._chunk([choice], usage))
        if piece.reason:
            choice = self._choice(piece.choice, {}) | {"finish_reason": piece.reason}
            chunks.append(self._chunk([choice], usage))
        return chunks

    def last(self) -> str:
        """The chunk that tells what the answer took."""
        return json.dumps(self._object("chat.completion.chunk", []) | {"usage": self.usage()})

    def usage(self) -> dict[str, int]:
        """Positions of the prompt, those of images among them, and tokens of all answers."""
        prompt, completion = len(self.job.tokens), self.job.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: bool) -> str:
        # A stream that tells of its usage says so in every chunk, with null until the last.
        more = {"usage": None} if usage else {}
        return json.dumps(self._object("chat.completion.chunk", choices) | more)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _log_probs(self, tokens: Sequence[Written]) -> dict[str, Any] | None:
        if self.job.top is None:
            return None
        content = [
            self._token(written.token) | {"top_logprobs": [self._token(t) for t in written.top]}
            for written in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: TokenText) -> dict[str, Any]:
        text, data = piece_text(self.tokenizer, token.id)
        # JSON has no infinity; the API itself writes this number for what is too small to tell.
        return {"token": text, "logprob": max(token.log_prob, -9999.0), "bytes": list(data)}
