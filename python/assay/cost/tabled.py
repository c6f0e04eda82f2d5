"""Prices from the tables of kernels that a profile has imported: the fitted device model of each, kept in the file.

What is kept of a fit is its few numbers; the points are beside it, so restoring is arithmetic and no search
(docs/profile-format.md). A call is priced by the table with the most points of its op in its number format.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from assay.cost.device import FEWEST, Device, DeviceModel, Law, fit_device, timer_noise, unknown_device
from assay.cost.kriging import Kriging
from assay.cost.roofline import Estimates, FloatArray, shares, smooth_max
from assay.cost.validation import kernel_classes, score, summary
from assay.cost.workload import work_of
from assay.errors import ProfileError
from assay.foreign import StoredTable
from assay.tables import SIZES, KernelTable

LAW = 1  # raised when the meaning of the stored numbers changes
#: Formats of tables that are a precision's own, by `assay.cost.formats.WEIGHTS`: the same weights and arithmetic.
DTYPES: Mapping[str, tuple[str, ...]] = {
    "bf16": ("bfloat16", "float16", "half"),
    "fp8": ("fp8", "fp8_block", "fp8_ootb"),
    "int8": ("int8", "sq", "int8_wo"),
    "w4a16": ("int4_wo",),
    "w4a8": ("w4a8", "w4afp8"),
    "mxfp4": ("mxfp4", "w4a16_mxfp4", "w4a8_mxfp4_mxfp8"),
    "nvfp4": ("nvfp4",),
}
#: Future calls differ from an expert table's in the model, from the others' in the shape.
HELD_OUT = {"moe": "models"}


def fit_tables(tables: Sequence[KernelTable], device: Device) -> Iterable[StoredTable]:
    """The kernel classes of ``tables``, each with its fit and its error on held-out shapes (experts: models) in turn."""
    classes = kernel_classes(tables)
    for table in classes:
        fit, accuracy = None, None
        if len(table) >= FEWEST:
            held_out = HELD_OUT.get(table.op, "shapes")
            fit = fit_to_json(fit_device(table, device, hide=held_out[:-1]))
            (found,) = score([table], lambda _: device, hold_out=held_out, yardstick=False)
            rows = [r for r in summary(found[1]) if r["regime"] == "all" and r["quantity"] == "time"]
            accuracy = {k: rows[0][k] for k in ("n", "median_ape", "p90_ape", "bias", "coverage")} if rows else {"n": 0}
            accuracy |= {"source": f"held-out {held_out}" if rows else found[2]}
        yield StoredTable.of(table, fit, accuracy)


def fit_to_json(model: DeviceModel) -> dict[str, Any]:
    """The numbers that a fit found; with the points it was made of, all that there is to it."""
    law, residual = model.law, model.residual
    return {
        "law": LAW,
        "multiprocessors": model.device.multiprocessors,
        "overhead_s": law.overhead_s,
        "bytes_per_s": law.bytes_per_s,
        "ops_per_s": law.ops_per_s,
        "p": law.p,
        "seconds_per": list(law.seconds_per),
        "scale": residual.scale.tolist(),
        "nugget": residual.nugget,
        "sigma": residual.sigma,
        "caution": residual.caution if residual.caution < math.inf else None,
        "score": model.score if model.score < math.inf else None,
    }


def fit_from_json(fit: Mapping[str, Any], table: KernelTable, path: str) -> DeviceModel:
    """The model that `fit_to_json` wrote, on the points that it was fitted to.

    Raises
    ------
    ProfileError
        A fit that `fit_to_json` would not have written, or one to another kind of table.
    """
    try:
        if fit["law"] != LAW:
            raise ValueError(f"law: expected {LAW}, got {fit['law']!r}; import the tables again")
        multiprocessors = int(_above_zero(fit, "multiprocessors"))
        work = work_of(table, multiprocessors)
        law = Law(
            overhead_s=_above_zero(fit, "overhead_s"),
            bytes_per_s=_above_zero(fit, "bytes_per_s"),
            ops_per_s=_above_zero(fit, "ops_per_s"),
            p=_above_zero(fit, "p"),
            seconds_per=_each(fit, "seconds_per", work.fixed.shape[1]),
        )
        scale = np.array(_each(fit, "scale", work.features.shape[1]))
        caution = math.inf if fit["caution"] is None else _above_zero(fit, "caution")
        score = math.inf if fit["score"] is None else float(fit["score"])
        nugget, sigma = _above_zero(fit, "nugget"), _above_zero(fit, "sigma")
        if math.isnan(score) or score < 0:
            raise ValueError(f"score: expected a number of at least 0, got {score}")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ProfileError(f"{path}.fit: expected a fit as assay writes it, got a broken one ({error!r})") from error
    residual = np.log(table.time_s) - law.log_time(work)
    kriging = Kriging(
        work.features, residual, timer_noise(table.time_s, residual), scale, nugget, sigma=sigma, caution=caution
    )
    device = replace(unknown_device(table.system), multiprocessors=multiprocessors)
    return DeviceModel(device, law, kriging, score, work.features.min(axis=0), work.features.max(axis=0))


def _above_zero(fit: Mapping[str, Any], key: str) -> float:
    number = float(fit[key])
    if not 0 < number < math.inf:
        raise ValueError(f"{key}: expected a finite number above 0, got {fit[key]!r}")
    return number


def _each(fit: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    numbers = tuple(float(v) for v in fit[key])
    if len(numbers) != count or not all(0 <= v < math.inf for v in numbers):
        raise ValueError(f"{key}: expected {count} finite numbers of at least 0, got {fit[key]!r}")
    return numbers


class Tables:
    """The tables of a profile as prices; each is unpacked and restored when a call first asks for it."""

    def __init__(self, stored: Sequence[StoredTable]) -> None:
        self.stored = [t for t in stored if t.fit is not None]
        self._models: dict[int, DeviceModel] = {}

    def find(self, op: str, precision: str) -> StoredTable | None:
        """The fitted table with the most points of an op in a precision's formats, or None."""
        found = [t for t in self.stored if t.op == op and t.dtype in DTYPES.get(precision, ())]
        return max(found, key=lambda t: t.points, default=None)

    def precisions(self) -> tuple[str, ...]:
        """Precisions of which some product is priced here."""
        return tuple(p for p in DTYPES if self.find("gemm", p) or self.find("moe", p))

    def accuracy(self) -> dict[str, dict[str, Any]]:
        """Errors on held-out points by the name that calls of a table have, where any were held out."""
        return {name: dict(t.accuracy) for name, t in self.labels().items() if t.accuracy and t.accuracy["n"]}

    def labels(self) -> dict[str, StoredTable]:
        """The tables that price something, by the name that their calls have."""
        chosen = [self.find(op, precision) for op in SIZES for precision in DTYPES]
        return {label(t): t for t in chosen if t is not None}

    def price(self, stored: StoredTable, **sizes: Any) -> Estimates:
        """Seconds of calls of these sizes (`assay.tables.SIZES`; numbers or arrays, which broadcast)."""
        model = self._model(stored)
        values = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in sizes.values()))
        asked = dict(zip(sizes, (v.copy() for v in values), strict=True))
        table = KernelTable(
            stored.op, stored.dtype, stored.system, stored.source, stored.variant, asked, np.ones(values[0].shape)
        )
        predicted = model.predict(table, few=True)
        memory, compute, fixed = model.law.parts(work_of(table, model.device.multiprocessors))
        law = fixed + smooth_max(memory, compute, model.law.p)
        by_memory, by_compute = shares(memory, compute, law, fixed, model.law.p)
        stretch: FloatArray = predicted.time_s / law
        return Estimates(
            predicted.time_s,
            predicted.low_s,
            predicted.high_s,
            by_memory * stretch,
            by_compute * stretch,
            fixed * stretch,
            basis="measured",
            in_range=~predicted.outside,
            notes=((f"outside the imported points of {label(stored)}", predicted.outside),),
        )

    def experts(self, stored: StoredTable, **sizes: Any) -> Estimates:
        """`price` of a whole expert layer, under the load nearest to a balanced one that was measured."""
        return self.price(stored, tp=1, ep=1, matrices=3, alpha=float(stored.table.sizes["alpha"].min()), **sizes)

    def _model(self, stored: StoredTable) -> DeviceModel:
        found = self._models.get(id(stored))
        if found is None:
            if stored.fit is None:
                raise ProfileError(f"{stored.path}.fit: expected a fit, got null")
            found = fit_from_json(stored.fit, stored.table, stored.path)
            self._models[id(stored)] = found
        return found


def label(stored: StoredTable) -> str:
    """What calls priced by a table are called: "gemm bfloat16"."""
    return f"{stored.op} {stored.dtype}"
