"""Responses in the format of the chat-completions API: complete responses or streamed chunks."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ovis_jax.engine.request import Delta, Logprob, Request, TokenLogprobs
from ovis_jax.inputs.tokenizer import BYTES, Tokenizer

MIN_LOGPROB = -9999.0
"""OpenAI's value for log-probabilities that are too small, because JSON has no infinity."""


@dataclass(frozen=True)
class ResponseFormatter:
    """Formats the response to one request.

    Attributes:
      model: Name of the model.
      request: The request.
      tokenizer: Tokenizer of the model.
      include_usage: Whether a stream ends with a chunk of token counts.
    """

    model: str
    request: Request
    tokenizer: Tokenizer
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        """Return the complete response, given one delta per choice."""
        choices = [
            {
                "index": delta.choice,
                "message": {"role": "assistant", "content": delta.text, "refusal": None},
                "logprobs": self._logprobs(delta.logprobs),
                "finish_reason": delta.finish_reason,
            }
            for delta in sorted(deltas, key=lambda delta: delta.choice)
        ]
        return self._object("chat.completion", choices) | {"usage": self._usage()}

    def first_chunk(self) -> str:
        """Return the first chunk of a stream, in which every choice begins."""
        delta = {"role": "assistant", "content": "", "refusal": None}
        return self._chunk([_choice(n, delta) for n in range(self.request.num_choices)])

    def delta_chunks(self, delta: Delta) -> list[str]:
        """Return the chunks for a delta, with its text and its finish reason."""
        chunks = []
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(delta.logprobs)
            choice = _choice(delta.choice, {"content": delta.text}, logprobs=logprobs)
            chunks.append(self._chunk([choice]))
        if delta.finish_reason:
            choice = _choice(delta.choice, {}, finish_reason=delta.finish_reason)
            chunks.append(self._chunk([choice]))
        return chunks

    def last_chunks(self) -> list[str]:
        """Return the last chunks of a stream: the token counts if requested, and the end marker."""
        if not self.include_usage:
            return ["[DONE]"]
        usage = self._object("chat.completion.chunk", []) | {"usage": self._usage()}
        return [json.dumps(usage), "[DONE]"]

    def _usage(self) -> dict[str, Any]:
        prompt, completion = len(self.request.tokens), self.request.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.request.cached_tokens},
        }

    def _chunk(self, choices: list[dict[str, Any]]) -> str:
        # In a stream with token counts, every chunk has the field, which is null until the last
        # chunk.
        usage = {"usage": None} if self.include_usage else {}
        return json.dumps(self._object("chat.completion.chunk", choices) | usage)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self.request.top_logprobs is None:
            return None
        content = [
            self._token(token.token) | {"top_logprobs": [self._token(top) for top in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: Logprob) -> dict[str, Any]:
        text, data = token_text(self.tokenizer, token.token_id)
        return {"token": text, "logprob": max(token.logprob, MIN_LOGPROB), "bytes": list(data)}


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    r"""Return the text of a token in the form of OpenAI's API, and its bytes.

    A token that is only part of a character has no text, so it is written as bytes:\xNN.
    """
    data = tokenizer.token_bytes(token_id)
    try:
        if tokenizer.pieces[token_id] not in BYTES:
            return data.decode(), data
    except UnicodeDecodeError:  # a byte-level piece
        pass
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def _choice(index: int, delta: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | fields
