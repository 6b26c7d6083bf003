"""Rows of logits with many ties, for tests of top-p."""

import numpy as np

ROWS, VOCAB_SIZE = 1000, 600


def tied_logits() -> tuple[np.ndarray, np.ndarray]:
    """Return logits, float32 [ROWS, VOCAB_SIZE], and one top_p per row, float64.

    A row has between 1 and about 600 different values.
    """
    rng = np.random.default_rng(13)
    spread = rng.choice([0.0, 1.0, 3.0, 8.0], (ROWS, 1))
    step = rng.choice([0.001, 0.25, 1.0, 4.0], (ROWS, 1))
    logits = np.round(rng.normal(size=(ROWS, VOCAB_SIZE)) * spread / step) * step
    top_p = np.where(
        rng.random(ROWS) < 0.2,
        rng.choice([0.001, 0.99, 0.999, 0.9999, 0.99999], ROWS),
        np.round(rng.uniform(0.01, 0.99, ROWS), 2),
    )
    return logits.astype(np.float32), top_p


def count_kept(logits: np.ndarray, p: float) -> int:
    """Count the tokens of a row that top-p keeps, as TopPLogitsWarper in transformers.

    The logits are sorted in ascending order, and the first ones, whose probabilities sum to at most
    1 - p, are removed. As in PyTorch on a CPU, the sum is exact and rounded to float32.
    """
    weights = np.exp(np.sort(logits).astype(np.float64) - logits.max())
    probabilities = (weights / weights.sum()).astype(np.float32)
    cumulative = np.cumsum(probabilities, dtype=np.float64).astype(np.float32)
    return max(int(np.sum(cumulative > np.float32(1 - p))), 1)
