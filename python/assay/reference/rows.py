"""What routing and verification share: a row of logits."""

import numpy as np

#: Statuses of a row, as in assay.h.
ROW_OK, ROW_NAN, ROW_EMPTY, ROW_INF, ROW_BAD_ID, ROW_BAD_TREE = range(6)


def row_status(logits: np.ndarray) -> int:
    """Whether a row of logits is a distribution, and if not, why."""
    if np.isnan(logits).any():
        return ROW_NAN
    if (logits == np.inf).any():
        return ROW_INF
    return ROW_EMPTY if (logits == -np.inf).all() else ROW_OK


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of one row, in float64."""
    e = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return e / e.sum()
