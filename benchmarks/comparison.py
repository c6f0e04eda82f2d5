"""Times contenders in turns, cell by cell, and makes rows of what they took.

In every pass the roofs are read and each contender is timed for a moment, so that a slow minute of the machine falls on
all of them; a peer of long calls that is far behind the best one is timed until that is seen. A contender's time is its median over the passes; the ratio is the best peer's time over ours; a cell is a tie
when the ratios of the single passes lie on both sides of 1.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peers.contender import Cell
from peers.worker import Failed

#: "module:Class" of a contender and what it is made with; titles of classes of rows and who belongs to them.
Target = tuple[str, tuple[Any, ...]]
Classes = Mapping[str, Callable[[Mapping[str, Any]], bool]]

OURS = "assay"
VISIT_S = 0.02
#: A call is long from so many seconds. A peer of such calls that took so many times the best one's time is not visited again,
#: and where every call is long so many passes are enough.
LONG_S, BEHIND, FEW_PASSES = 0.1, 1.5, 3


class Asked(Protocol):
    """What a worker answers; see :class:`peers.worker.Worker`."""

    def start(self, method: str, *arguments: Any) -> None: ...

    def finish(self) -> Any: ...

    def ask(self, method: str, *arguments: Any) -> Any: ...


@dataclass
class Measured:
    """What the passes over one cell gave.

    Attributes
    ----------
    times
        Contender to seconds, one entry a pass.
    roofs
        One reading a pass; a row is held against the highest, for what disturbs a probe only lowers it.
    absent
        Contender to why it was not timed, where it does not take such cells or failed.
    wrong
        Contender to (relative error, most allowed) of an answer that disqualified it.
    """

    times: dict[str, list[float]] = field(default_factory=dict)
    roofs: list[dict[str, float]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, tuple[float, float]] = field(default_factory=dict)


def measure(workers: Mapping[str, Asked], reader: Asked, cell: Cell, passes: int) -> Measured:
    """Prepares a cell everywhere, checks the answers, and times it in turns. `reader` reads the roofs."""
    found = Measured()
    together = cell.op != "moe"  # all the forms of a whole layer's weights at once are more than the memory
    for worker in workers.values() if together else ():
        worker.start("prepare", cell)
    for name, worker in workers.items():
        if not together:
            worker.start("prepare", cell)
        try:
            reason, error, allowed = worker.finish()
        except Failed as exc:
            found.absent[name] = str(exc)
            continue
        if reason:
            found.absent[name] = reason
        elif not error <= allowed:
            found.wrong[name] = (error, allowed)
        else:
            found.times[name] = []
    names = list(found.times)
    for turn in range(passes):
        if turn >= FEW_PASSES and all(min(taken, default=0.0) > LONG_S for taken in found.times.values()):
            break
        found.roofs.append(reader.ask("roofs", cell.threads))
        for name in names[turn % len(names) :] + names[: turn % len(names)] if names else ():
            if name not in found.absent and not is_out(name, found.times):
                try:
                    found.times[name].append(workers[name].ask("visit", VISIT_S))
                except Failed as exc:
                    found.absent[name] = str(exc)
    for name in found.absent:
        found.times.pop(name, None)
    return found


def is_out(name: str, times: Mapping[str, list[float]]) -> bool:
    """Whether a peer is not visited again: it is far behind another, and its time is what makes a run long."""
    best = min((min(taken) for peer, taken in times.items() if peer != OURS and taken), default=math.inf)
    return name != OURS and min(times[name], default=0.0) > max(LONG_S, BEHIND * best)


#: Roofs, and what is said of a cell that one of them binds.
BOUNDS = {"dram_read": "memory", "llc_read": "cache", "int8_peak": "compute", "exp_rate": "exp"}


def row_of(cell: Cell, found: Measured, work: Callable[[Cell], dict[str, float]]) -> dict[str, Any]:
    """A row of the comparison.

    Parameters
    ----------
    work
        What the cell must do at the least, by roof: bytes to move, operations (a multiply-add counts two).
    """
    took = {name: statistics.median(values) for name, values in found.times.items()}
    peers = {name: 1e6 * t for name, t in took.items() if name != OURS}
    row: dict[str, Any] = {"op": cell.op, **dict(cell.params), "threads": cell.threads,
                           "ours_us": 1e6 * took[OURS] if OURS in took else None, "peers": peers,
                           "best_peer": min(peers, key=peers.__getitem__, default=None),
                           "absent": found.absent, "wrong": found.wrong}  # fmt: skip
    row.update(dict.fromkeys(("best_us", "ratio", "ratio_low", "ratio_high", "verdict", "roof_pct", "bound")))
    if row["best_peer"]:
        row["best_us"] = peers[row["best_peer"]]
    if OURS in took and peers:
        best = found.times[row["best_peer"]]
        ratios = [b / a for a, b in zip(found.times[OURS], best, strict=False)]  # it may have sat out the last passes
        row.update(ratio=row["best_us"] / row["ours_us"], ratio_low=min(ratios), ratio_high=max(ratios))
        row["verdict"] = verdict(row)
    if OURS in took:
        least = {roof: amount / max(now[roof] for now in found.roofs) for roof, amount in work(cell).items()}
        binding = max(least, key=least.__getitem__)
        row.update(bound=BOUNDS[binding], roof_pct=100 * least[binding] / took[OURS])
        if "exp_rate" in least:
            row["exp_pct"] = 100 * least["exp_rate"] / took[OURS]
    return row


def verdict(row: Mapping[str, Any]) -> str:
    """ "win", "loss", or "tie" where the passes disagree about who is faster."""
    if row["ratio_low"] <= 1 <= row["ratio_high"]:
        return "tie"
    return "win" if row["ratio"] > 1 else "loss"


def geometric_mean(values: Iterable[float]) -> float | None:
    """None of nothing."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summary(rows: Sequence[Mapping[str, Any]], classes: Mapping[str, Callable[[Mapping[str, Any]], bool]]) -> list[Any]:
    """One line a class of rows: cells, wins, ties, losses, ratios, share of the roof."""
    lines = []
    for title, belongs in classes.items():
        members = [r for r in rows if r["ratio"] is not None and belongs(r)]
        if not members:
            continue
        ratios = [r["ratio"] for r in members]
        count = {v: sum(r["verdict"] == v for r in members) for v in ("win", "tie", "loss")}
        lines.append({"class": title, "cells": len(members), **count, "geometric_mean": geometric_mean(ratios),
                      "median": statistics.median(ratios), "least": min(ratios),
                      "roof_pct": statistics.median(r["roof_pct"] for r in members)})  # fmt: skip
    return lines


class Results:
    """Rows in a file that is replaced whole after every cell, so that a run can go on where it stopped.

    Parameters
    ----------
    path
        None keeps them in memory only.

    Raises
    ------
    ValueError
        The file holds something else, or rows of another comparison.
    """

    def __init__(self, path: Path | None, header: dict[str, Any]) -> None:
        self._path, self.header = path, header
        self.rows: list[dict[str, Any]] = []
        if path is None or not path.exists():
            return
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            self.rows, kept = stored["rows"], stored["header"]
        except (ValueError, KeyError, TypeError) as exc:
            raise ValueError(f"{path}: expected results of an earlier comparison, got {exc}") from exc
        if kept["command"] != header["command"] or kept["versions"] != header["versions"]:
            raise ValueError(
                f"{path}: expected results of {header['command']} with {header['versions']},"
                f" got {kept['command']} with {kept['versions']}"
            )

    def has(self, cell: Cell) -> bool:
        """Whether the cell was measured."""
        wanted = {"op": cell.op, "threads": cell.threads, **dict(cell.params)}
        return any(all(row.get(key) == value for key, value in wanted.items()) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row, in the file too."""
        self.rows.append(row)
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".part")
            partial.write_text(json.dumps({"header": self.header, "rows": self.rows}, indent=1), encoding="utf-8")
            partial.replace(self._path)


def losses_first(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """By ratio, the rows without one last."""
    yield from sorted(rows, key=lambda r: (r["ratio"] is None, r["ratio"] or 0.0))
