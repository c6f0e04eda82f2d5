"""Scores of the device model on points that its fit never saw, by op, dtype and regime.

Whole groups are held out: the points of a (N, K) or of a head or expert configuration ("shapes"), of a model
("models"), of a device ("systems"); "points" holds out single points, which flatters every interpolation.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.cost.device import FEWEST, TRANSFER_LOG, Device, DeviceModel, fit_device, transferred
from assay.cost.energy import Energy, fit_power
from assay.cost.roofline import FloatArray
from assay.cost.workload import work_of
from assay.cost.yardstick import regressor, roofline
from assay.tables import KernelTable, joined

HOLD_OUTS = ("shapes", "models", "systems", "points")
FRACTION = 0.2  # of the groups is held out
SCORED = 2500  # points at most, of each kernel class
FEW_GROUPS = 40  # with fewer, three disjoint parts are held out in turn, for one would be a matter of luck
SMALL = 40  # points below which a kernel variant is fitted together with the other small ones

Row = dict[str, Any]
Datasheet = Callable[[str], Device]


@dataclass(frozen=True)
class Scored:
    """Held-out points of one kernel class: measured and predicted seconds, [n] each."""

    table: KernelTable
    regime: npt.NDArray[np.str_]
    time_s: FloatArray
    low_s: FloatArray
    high_s: FloatArray
    roofline_s: FloatArray
    regressor_s: FloatArray | None
    energy: Energy | None = None


def kernel_classes(tables: Sequence[KernelTable]) -> list[KernelTable]:
    """Tables as they are fitted: one a (system, software, op, dtype, variant), small variants together."""
    found: dict[tuple[str, ...], list[KernelTable]] = {}
    for t in tables:
        found.setdefault((t.system, t.source, t.op, t.dtype, t.variant), []).append(t)
    whole = [joined(parts, parts[0].variant) for parts in found.values()]
    small: dict[tuple[str, ...], list[KernelTable]] = {}
    for t in whole:
        if len(t) < SMALL:
            small.setdefault((t.system, t.source, t.op, t.dtype), []).append(t)
    classes = [t for t in whole if len(t) >= SMALL]
    return classes + [joined(parts, " + ".join(t.variant for t in parts)) for parts in small.values()]


def plans(tables: Sequence[KernelTable], hold_out: str) -> list[tuple[str, list[KernelTable]]]:
    """What is held out of which classes; "all" is what each op is judged by.

    That is new shapes for every op but experts; for those, new points of a known model, and new models; and new
    systems for every op. A class that has no other system to be predicted from has no part in the last.
    """
    if hold_out != "all":
        return [(hold_out, list(tables))]
    experts = [t for t in tables if t.op == "moe"]
    others = [t for t in tables if t.op != "moe"]
    moved = [t for t in tables if any((t.op, t.dtype) == (o.op, o.dtype) and t.system != o.system for o in tables)]
    found = [("shapes", others), ("points", experts), ("models", experts), ("systems", moved)]
    return [(what, classes) for what, classes in found if classes]


def score(
    tables: Sequence[KernelTable],
    datasheet: Datasheet,
    *,
    hold_out: str = "shapes",
    yardstick: bool = True,
    seed: int = 0,
    workers: int = 1,
) -> Iterator[tuple[KernelTable, list[Scored], str]]:
    """For each kernel class in turn: the class, its scored held-out points, and why there are none.

    Parameters
    ----------
    tables
        As `kernel_classes` returns them.
    datasheet
        Gives the device of a system's name.
    hold_out
        One of `HOLD_OUTS`.
    yardstick
        Whether the regressor runs as well: half of the time goes into it.
    workers
        Threads, a kernel class each; the results do not depend on it.
    """
    if hold_out not in HOLD_OUTS:
        raise ValueError(f"hold_out: expected one of {', '.join(HOLD_OUTS)}, got {hold_out!r}")

    def one(table: KernelTable) -> tuple[KernelTable, list[Scored], str]:
        if hold_out == "systems":
            return _transfer(table, tables, datasheet, seed)
        return _class(table, datasheet(table.system), hold_out, yardstick, seed)

    if workers <= 1:
        yield from map(one, tables)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(one, tables)


def _class(
    table: KernelTable, device: Device, hold_out: str, yardstick: bool, seed: int
) -> tuple[KernelTable, list[Scored], str]:
    hide = hold_out[:-1]
    group = np.arange(len(table)) if hide == "point" else getattr(work_of(table, 1), hide)
    groups = np.unique(group)
    if groups.size < 3 or len(table) < 3 * FEWEST:
        return table, [], f"{groups.size} {hold_out}, {len(table)} points: too few to hold any out"
    rng = np.random.default_rng(seed)
    rng.shuffle(groups)
    size = max(1, round(FRACTION * groups.size))
    folds = 3 if groups.size < FEW_GROUPS else 1
    scored = []
    for fold in range(folds):
        out = np.isin(group, groups[fold * size : (fold + 1) * size])
        if out.any() and (~out).sum() >= FEWEST:
            picked = np.flatnonzero(out)
            picked = rng.choice(picked, min(SCORED // folds, picked.size), replace=False)
            scored.append(_fold(table.take(~out), table.take(np.sort(picked)), device, hide, yardstick, seed))
    return table, scored, "" if scored else "nothing left to fit on"


def _fold(train: KernelTable, test: KernelTable, device: Device, hide: str, yardstick: bool, seed: int) -> Scored:
    model = fit_device(train, device, hide=hide, seed=seed)
    prediction = model.predict(test)
    energy = fit_power(train, model, seed, hide=hide).predict(test) if train.power_w is not None else None
    return Scored(
        test,
        prediction.regime,
        prediction.time_s,
        prediction.low_s,
        prediction.high_s,
        roofline(train, test, device),
        regressor(train, test, seed) if yardstick else None,
        energy,
    )


def _transfer(
    table: KernelTable, tables: Sequence[KernelTable], datasheet: Datasheet, seed: int
) -> tuple[KernelTable, list[Scored], str]:
    device = datasheet(table.system)
    if not device.known:
        return table, [], f"no datasheet of {table.system}"
    others = [
        t
        for t in tables
        if (t.op, t.dtype) == (table.op, table.dtype) and t.system != table.system and datasheet(t.system).known
    ]
    others = [t for t in others if len(t) >= 3 * FEWEST]
    if not others:
        return table, [], f"no other system has {table.op} {table.dtype}"

    def balance(t: KernelTable) -> tuple[bool, float, int]:
        d = datasheet(t.system)
        ratio = (d.ops_per_s / d.memory_bytes_per_s) / (device.ops_per_s / device.memory_bytes_per_s)
        return t.variant != table.variant, abs(float(np.log(ratio))), -len(t)

    rng = np.random.default_rng(seed)
    test = table.take(np.sort(rng.choice(len(table), min(SCORED, len(table)), replace=False)))
    train = min(others, key=balance)
    fitted = fit_device(train, datasheet(train.system), hide="shape", seed=seed)
    half = _transfer_error(fitted, train, [t for t in others if t.system != train.system], datasheet, rng)
    prediction = transferred(fitted, device, test.format.activation_bytes, half).predict(test)
    scored = Scored(
        test,
        prediction.regime,
        prediction.time_s,
        prediction.low_s,
        prediction.high_s,
        _scaled_roofline(train, test, datasheet),
        None,
    )
    return table, [scored], ""


def _transfer_error(
    fitted: DeviceModel,
    train: KernelTable,
    thirds: Sequence[KernelTable],
    datasheet: Datasheet,
    rng: np.random.Generator,
) -> float:
    """90th percentile of |log error| on systems that are neither fitted nor asked for; a judgement where none is."""
    errors = []
    for t in thirds:
        part = t.take(rng.choice(len(t), min(400, len(t)), replace=False))
        moved = transferred(fitted, datasheet(t.system), train.format.activation_bytes)
        errors.append(np.abs(np.log(moved.predict(part).time_s / part.time_s)))
    return float(np.quantile(np.concatenate(errors), 0.9)) if errors else TRANSFER_LOG


def _scaled_roofline(train: KernelTable, test: KernelTable, datasheet: Datasheet) -> FloatArray:
    """The one-efficiency roofline of the fitted system, on the other's datasheet."""
    source, target = datasheet(train.system), datasheet(test.system)
    work, here = work_of(train, 1), work_of(test, 1)
    wide = train.format.activation_bytes
    ideal = np.maximum(work.bytes / source.memory_bytes_per_s, work.ops / source.ops_at(wide))
    asked = np.maximum(here.bytes / target.memory_bytes_per_s, here.ops / target.ops_at(wide))
    return asked * float(np.median(train.time_s / ideal))


def summary(scored: Sequence[Scored]) -> list[Row]:
    """Rows of errors: by system, software, op, dtype and regime, with "all" regimes first; times, then energies."""
    found: dict[tuple[str, ...], list[Scored]] = {}
    for s in scored:
        found.setdefault((s.table.system, s.table.source, s.table.op, s.table.dtype), []).append(s)
    rows = []
    for key, parts in found.items():
        head = dict(zip(("system", "source", "op", "dtype"), key, strict=True))
        regime = np.concatenate([p.regime for p in parts])
        columns = _columns(parts)
        for name in ("all", "memory", "compute", "overhead"):
            here = np.ones(regime.size, dtype=bool) if name == "all" else regime == name
            if here.any():
                rows.append(head | {"quantity": "time", "regime": name} | _errors(columns, here))
        joules = [p for p in parts if p.energy is not None and p.table.power_w is not None]
        if joules:
            energy = _energy_columns(joules)
            rows.append(
                head
                | {"quantity": "energy", "regime": "all"}
                | _errors(energy, np.ones(energy["measured"].size, dtype=bool))
            )
    return rows


def _columns(parts: Sequence[Scored]) -> Mapping[str, FloatArray]:
    columns = {
        "measured": np.concatenate([p.table.time_s for p in parts]),
        "predicted": np.concatenate([p.time_s for p in parts]),
        "low": np.concatenate([p.low_s for p in parts]),
        "high": np.concatenate([p.high_s for p in parts]),
        "roofline": np.concatenate([p.roofline_s for p in parts]),
    }
    boosted = [p.regressor_s for p in parts if p.regressor_s is not None]
    if len(boosted) == len(parts):
        columns["regressor"] = np.concatenate(boosted)
    return columns


def _energy_columns(parts: Sequence[Scored]) -> Mapping[str, FloatArray]:
    return {
        "measured": np.concatenate([p.table.power_w * p.table.time_s for p in parts if p.table.power_w is not None]),
        "predicted": np.concatenate([p.energy.joules for p in parts if p.energy is not None]),
        "low": np.concatenate([p.energy.low_j for p in parts if p.energy is not None]),
        "high": np.concatenate([p.energy.high_j for p in parts if p.energy is not None]),
    }


def _errors(columns: Mapping[str, FloatArray], here: npt.NDArray[np.bool_]) -> Row:
    measured = columns["measured"][here]

    def error(name: str) -> FloatArray:
        return columns[name][here] / measured - 1.0

    ape = np.abs(error("predicted"))
    row: Row = {
        "n": int(here.sum()),
        "median_ape": float(np.median(ape)),
        "p90_ape": float(np.quantile(ape, 0.9)),
        "bias": float(np.median(error("predicted"))),
        "coverage": None,
        "baseline_median_ape": None,
        "regressor_median_ape": None,
    }
    if "low" in columns:
        row["coverage"] = float(np.mean((columns["low"][here] <= measured) & (measured <= columns["high"][here])))
    if "roofline" in columns:
        row["baseline_median_ape"] = float(np.median(np.abs(error("roofline"))))
    if "regressor" in columns:
        row["regressor_median_ape"] = float(np.median(np.abs(error("regressor"))))
    return row
