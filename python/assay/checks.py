"""Checks of parsed JSON: every error names the place, what was got and what was wanted."""

import math
from collections.abc import Sequence
from typing import Any

from assay.errors import ProfileError

Json = Any


def shown(value: Json) -> str:
    """A value as an error quotes it: its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fail(path: str, wanted: str, got: Json) -> ProfileError:
    """The error to raise: the place, what was wanted, what came."""
    return ProfileError(f"{path}: expected {wanted}, got {shown(got)}")


def check_object(
    value: Json, path: str, required: Sequence[str], optional: Sequence[str] | None = ()
) -> dict[str, Json]:
    """A JSON object with these keys; ``optional=None`` lets any further key pass."""
    if not isinstance(value, dict):
        raise fail(path, "an object", value)
    for key in required:
        if key not in value:
            raise ProfileError(f"{path}.{key}: expected a value, got nothing (the key is missing)")
    if optional is not None:
        for key in value:
            if key not in required and key not in optional:
                raise ProfileError(f"{path}.{key}: expected only {', '.join((*required, *optional))}; got this key too")
    return value


def check_list(value: Json, path: str) -> list[Json]:
    """A JSON list."""
    if not isinstance(value, list):
        raise fail(path, "a list", value)
    return value


def check_text(value: Json, path: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise fail(path, "a string", value)
    return value


def check_bool(value: Json, path: str) -> bool:
    """true or false; no number stands for one."""
    if not isinstance(value, bool):
        raise fail(path, "true or false", value)
    return value


def check_int(value: Json, path: str, low: int, high: int = 2**63 - 1) -> int:
    """An integer from ``low`` to ``high``; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise fail(path, f"an integer of at least {low}", value)
    return value


def check_number(value: Json, path: str, *, positive: bool) -> float:
    """A finite number above 0, or from 0 on where not ``positive``."""
    wanted = "a finite number above 0" if positive else "a finite number of at least 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise fail(path, wanted, value)
    try:
        number = float(value)
    except OverflowError:
        raise fail(path, wanted, "an integer too large for a float") from None
    if not math.isfinite(number) or number < 0 or (positive and number == 0):
        raise fail(path, wanted, value)
    return number


def check_numbers(value: Json, path: str) -> tuple[float, ...]:
    """At least one finite number, all above 0."""
    values = tuple(check_number(v, f"{path}[{i}]", positive=True) for i, v in enumerate(check_list(value, path)))
    if not values:
        raise fail(path, "at least one number", value)
    return values


def check_middle(value: Json, path: str, values: Sequence[float]) -> float:
    """A median that lies between the extremes of its samples."""
    median = check_number(value, path, positive=True)
    if not min(values) <= median <= max(values):
        raise fail(path, f"a median between {min(values)!r} and {max(values)!r}, the extremes of its samples", value)
    return median


def check_finite(value: Json, path: str) -> None:
    """Refuse infinities that hide in parts of the file with a free form (1e999 parses to infinity)."""
    if isinstance(value, float) and not math.isfinite(value):
        raise fail(path, "a finite number", value)
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{path}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            check_finite(item, f"{path}[{i}]")
