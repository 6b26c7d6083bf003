"""Reuse of results of earlier requests: visual embeddings of crops, and rows of the KV cache."""

from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int32

from ovis_jax.inputs.image_processing import IMAGE_SLOT

MAX_VISUAL_CACHE_BYTES = 2**28
"""Maximum size of the visual embeddings that are kept, about 190 crops of the 9B model."""


def crop_digests(pixels: Float32[np.ndarray, "I h w C"]) -> tuple[bytes, ...]:
    """Return a cryptographic hash of each crop's content. Collisions cannot be constructed."""
    return tuple(blake2b(crop.tobytes(), digest_size=20).digest() for crop in pixels)


class VisualEmbeddingCache:
    """The visual embeddings of crops, by digest. The least recently used embeddings are dropped.

    Args:
      max_bytes: Maximum total size, in bytes.

    Attributes:
      num_bytes: Total size of the embeddings in the cache, in bytes.
    """

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._embeddings: OrderedDict[bytes, Float[Array, "M D"]] = OrderedDict()
        self.num_bytes = 0

    def get(self, digest: bytes) -> Float[Array, "M D"] | None:
        """Return the embeddings of a crop, or None if they are not in the cache."""
        found = self._embeddings.get(digest)
        if found is not None:
            self._embeddings.move_to_end(digest)
        return found

    def put(self, digest: bytes, embeddings: Float[Array, "M D"]) -> None:
        """Add the embeddings of a crop, which must not be in the cache yet."""
        self._embeddings[digest] = embeddings
        self.num_bytes += embeddings.nbytes
        while self.num_bytes > self._max_bytes:
            self.num_bytes -= self._embeddings.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Drop all embeddings."""
        self._embeddings.clear()
        self.num_bytes = 0


class CachedTokens:
    """The tokens whose keys and values are in a row of the KV cache.

    Args:
      prompt: Token ids of the prompt.
      digests: Digests of the prompt's crops.
      max_length: Maximum length of the row, in positions.

    Attributes:
      num_prompt: Number of tokens of the prompt.
      num_cached: Number of positions in the row after the device has run all dispatched steps. The
        tokens at the last of these positions may not have been appended yet.
    """

    def __init__(self, prompt: Int32[np.ndarray, "T"], digests: Sequence[bytes], max_length: int):
        self._tokens = np.empty(max_length, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._num_tokens = self.num_prompt = self.num_cached = len(prompt)
        self._digests = digests

    def append(self, token: int) -> None:
        """Append a sampled token. Its key and value are cached once a later step has read it."""
        if self._num_tokens < len(self._tokens):  # the last token at the maximum length is not read
            self._tokens[self._num_tokens] = token
            self._num_tokens += 1

    def truncate(self, length: int, ring_slots: int) -> None:
        """Forget the positions from `length` on, which are no longer in the row.

        If a ring buffer of `ring_slots` slots has wrapped around, no position is left.
        """
        if self.num_cached > length:
            self.num_cached = length if self.num_cached < ring_slots else 0
            self._num_tokens = min(self._num_tokens, self.num_cached)

    def common_prefix(
        self,
        tokens: Int32[np.ndarray, "T"],
        digests: Sequence[bytes],
        tokens_per_crop: int,
        ring_slots: int,
    ) -> int:
        """Return how many cached positions a prompt can reuse; its last position is always read.

        A ring buffer that has wrapped around has lost its first positions, so the row can only be
        continued from its end. The same holds for a ring buffer that is just full, because the slot
        after the end of a row is undefined.

        Args:
          tokens: Token ids of the prompt.
          digests: Digests of the prompt's crops.
          tokens_per_crop: M, the number of visual tokens per crop.
          ring_slots: Number of slots per row in the block with the smallest cache.
        """
        length = min(self._num_tokens, self.num_cached, len(tokens) - 1)
        differences = np.flatnonzero(self._tokens[:length] != tokens[:length])
        length = int(differences[0]) if len(differences) else length
        visual = np.flatnonzero(tokens[:length] == IMAGE_SLOT)[::tokens_per_crop]
        for first, old, new in zip(visual.tolist(), self._digests, digests, strict=False):
            if old != new:
                length = first
                break
        return length if self.num_cached < ring_slots or length == self.num_cached else 0
