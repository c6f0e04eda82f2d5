"""Verdicts on claims: values recomputed, held against the range that is claimed.

"consistent" when every value recomputed lies in the claimed range (5% either way), "inconsistent" when none does, "depends"
when some do; "not testable" where no value follows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay.cost.draws import Draws
from assay.model import ModelSpec

VERDICTS = ("consistent", "inconsistent", "depends", "not testable")
TOLERANCE = 0.05


@dataclass(frozen=True)
class World:
    """What cases look up: models, devices, list prices of tokens and models of video by name, and other claims' numbers."""

    model: Callable[[str], ModelSpec]
    device: Callable[[str], Mapping[str, Any]]
    draws: Draws
    tokens: Callable[[str], Mapping[str, Any]]
    videos: tuple[Mapping[str, Any], ...]
    numbers: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Value:
    """One value recomputed, with its 90% interval and the setting that it holds in ("" where there is but one)."""

    middle: float
    low: float
    high: float
    setting: str = ""


@dataclass(frozen=True)
class Recomputed:
    """Values, their unit, the arithmetic in words, and what they depend on; no values where none follow.

    ``span``: the values are ends of something continuous, so that everything between them is possible too.
    """

    values: tuple[Value, ...]
    unit: str
    arithmetic: str
    depends_on: str = ""
    span: bool = False


def exact(value: float, setting: str = "") -> Value:
    """A value without an error of its own."""
    return Value(value, value, value, setting)


def verdict(values: Sequence[Value], claimed: Sequence[float | None], *, span: bool = False) -> str:
    """One of `VERDICTS`. An end of the claimed range that is None is open and is not met by its other end's value."""
    if not values:
        return "not testable"
    low, high = claimed
    bottom = -math.inf if low is None else low * (1.0 - TOLERANCE) if high is not None else low * (1.0 + TOLERANCE)
    top = math.inf if high is None else high * (1.0 + TOLERANCE) if low is not None else high * (1.0 - TOLERANCE)
    inside = [bottom <= v.low and v.high <= top for v in values]
    if span:
        values = (Value(values[0].middle, min(v.low for v in values), max(v.high for v in values)),)
    touching = [v.low <= top and bottom <= v.high for v in values]
    return "consistent" if all(inside) else "depends" if any(touching) else "inconsistent"


def met(values: Sequence[Value], claimed: Sequence[float | None]) -> str:
    """Which settings meet a claim, wholly or in part of their interval."""
    groups = {"met at": "consistent", "within the interval at": "depends", "not at": "inconsistent"}
    said = []
    for words, kind in groups.items():
        of = [v.setting for v in values if verdict([v], claimed) == kind]
        if of:
            said.append(f"{words} {', '.join(of)}")
    return "; ".join(said)


def ends(low: float, high: float, name: str = "") -> tuple[Value, ...]:
    """Both ends of a range, or the one value that they are."""
    return (exact(low),) if low == high else (exact(low, f"{name}lowest"), exact(high, f"{name}highest"))
