"""What every answer of a command keeps to."""

import math


def finite(value):
    """Whether no number in parsed JSON is infinite or not a number."""
    if isinstance(value, dict):
        return all(finite(v) for v in value.values())
    if isinstance(value, list):
        return all(finite(v) for v in value)
    return not isinstance(value, float) or math.isfinite(value)
