"""How well measured kernel tables agree with themselves: what no model of sizes alone can be better than.

    python benchmarks/floors.py TABLE...

Three kinds of near repeats in tables that `assay validate` reads; each gives the median size of one measurement's error, in
percent (of Gaussian errors: a difference of two over sqrt 2, a second difference over sqrt 1.5):

- same call: attention whose window is longer than the cache does what no window does; time and watts.
- neighbours in M: GEMM of one (N, K) at M = 2..16, and at M = 1024..4352 in steps of 256 where ten waves of 128 x 128 tiles
  and more run (time over M): second differences, between calls that the same kernel serves but for a rare change.
- one wave: GEMM whose 64 x 64 tiles fill half of the multiprocessors at most: how far times of one (M, K) are from their
  median over N, though every tile does the same. Where a library picks kernels by N, that choice is in it too.
"""

import argparse

import numpy as np
import numpy.typing as npt

from assay.catalog import find_device
from assay.cost.device import DEFAULT_MULTIPROCESSORS
from assay.cost.validation import kernel_classes
from assay.importers import read_tables
from assay.report.table import Column, percent, render
from assay.tables import KernelTable

FEWEST = 30  # near repeats below which no median is printed
FloatArray = npt.NDArray[np.float64]


def of_pairs(values: FloatArray, group: npt.NDArray[np.int64]) -> FloatArray:
    """Errors from neighbours of one group in log values."""
    order = np.argsort(group, kind="stable")
    same = np.diff(group[order]) == 0
    return np.asarray(np.abs(np.diff(np.log(values[order]))[same]) / np.sqrt(2.0))


def attention(table: KernelTable) -> dict[str, FloatArray]:
    """Time and watts of calls that do the same."""
    s = table.sizes
    span = s["isl"] + s["past"] if "isl" in s else s["kv_len"]
    open_ = (s["window"] == 0) | (s["window"] >= span)
    keys = np.stack([v[open_] for name, v in s.items() if name != "window"], axis=1)
    group = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
    found = {"same call: time": of_pairs(table.time_s[open_], group)}
    if table.power_w is not None:
        found["same call: watts"] = of_pairs(table.power_w[open_], group)
    return found


def gemm(table: KernelTable) -> dict[str, FloatArray]:
    """Second differences along M, and one wave's times along N."""
    axes = [np.unique(table.sizes[name], return_inverse=True) for name in ("m", "n", "k")]
    (m, _), (n, _), (k, _) = axes
    log = np.full((m.size, n.size, k.size), np.nan)
    log[tuple(where.reshape(-1) for _, where in axes)] = np.log(table.time_s)
    device = find_device(table.system)
    processors = device["multiprocessors"] if device else DEFAULT_MULTIPROCESSORS

    def along_m(wanted: FloatArray, shapes: npt.NDArray[np.bool_]) -> FloatArray:
        part = log[np.isin(m, wanted)]
        if len(part) < wanted.size:  # steps that are wider are no near repeats
            return np.zeros(0)
        part = np.where(shapes, part - np.log(m[np.isin(m, wanted)])[:, None, None], np.nan)
        error = np.abs(part[1:-1] - (part[2:] + part[:-2]) / 2.0) / np.sqrt(1.5)
        return np.asarray(error[np.isfinite(error)])

    busy = (8 * np.ceil(n / 128)[:, None] >= 10 * processors) & (k >= 1024)
    found = {
        "M 2..16": along_m(np.arange(2.0, 17.0), np.ones(busy.shape, dtype=bool)),
        "M 1024..4352": along_m(np.arange(1024.0, 4353.0, 256.0), busy),
    }
    alone = []
    for plane, rows in zip(log, m, strict=True):
        few = plane[np.ceil(rows / 64) * np.ceil(n / 64) <= processors / 2]
        few = few[:, np.isfinite(few).sum(axis=0) >= 4]
        if few.size:
            alone.append(np.abs(few - np.nanmedian(few, axis=0)).ravel())
    error = np.concatenate(alone) if alone else np.zeros(0)
    return found | {"one wave": error[np.isfinite(error)]}


def main() -> None:
    """Prints one row a kernel class and kind of near repeat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", metavar="TABLE", nargs="+")
    parser.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table")
    args = parser.parse_args()
    rows = []
    for table in kernel_classes([t for path in args.tables for t in read_tables(path)]):
        kinds = gemm(table) if table.op == "gemm" else attention(table) if "window" in table.sizes else {}
        for kind, errors in kinds.items():
            if errors.size >= FEWEST:
                head = {"system": table.system, "software": table.source, "op": table.op, "dtype": table.dtype}
                rows.append(head | {"of": kind, "n": errors.size, "floor": float(np.median(errors))})
    columns = [Column(name, name) for name in ("system", "software", "op", "dtype", "of")]
    print(
        render(rows, [*columns, Column("n", "n", align="right"), Column("floor", "median error", percent)], args.output)
    )


if __name__ == "__main__":
    main()
