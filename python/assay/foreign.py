"""What a profile keeps of other programs' measurements: tables of kernels, packed, and whole runs of models."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from assay.checks import Json, check_finite, check_int, check_list, check_number, check_object, check_text, fail
from assay.errors import ProfileError

if TYPE_CHECKING:
    from assay.tables import FloatArray, KernelTable

MAX_POINTS = 2_000_000  # of a table


@dataclass(frozen=True)
class WholeRun:
    """One test of llama-bench: a model processing ``prompt`` tokens or generating ``generated``.

    ``seconds`` per repetition, with its standard deviation; ``depth`` tokens were in the cache before. ``params`` weights in
    ``size_bytes``, None where the file does not say.
    """

    model: str
    backend: str
    device: str
    threads: int
    prompt: int
    generated: int
    depth: int
    seconds: float
    deviation_s: float
    tokens_per_s: float
    params: float | None = None
    size_bytes: float | None = None

    def to_json(self) -> dict[str, Json]:
        """The fields, by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Json, path: str) -> "WholeRun":
        """Checks strictly; ProfileError names the place."""
        data = check_object(value, path, tuple(cls.__dataclass_fields__))
        run = cls(
            model=check_text(data["model"], f"{path}.model"),
            backend=check_text(data["backend"], f"{path}.backend"),
            device=check_text(data["device"], f"{path}.device"),
            threads=check_int(data["threads"], f"{path}.threads", 1),
            prompt=check_int(data["prompt"], f"{path}.prompt", 0),
            generated=check_int(data["generated"], f"{path}.generated", 0),
            depth=check_int(data["depth"], f"{path}.depth", 0),
            seconds=check_number(data["seconds"], f"{path}.seconds", positive=True),
            deviation_s=check_number(data["deviation_s"], f"{path}.deviation_s", positive=False),
            tokens_per_s=check_number(data["tokens_per_s"], f"{path}.tokens_per_s", positive=True),
            params=_known(data["params"], f"{path}.params"),
            size_bytes=_known(data["size_bytes"], f"{path}.size_bytes"),
        )
        if not run.prompt + run.generated:
            raise fail(f"{path}.prompt", "prompt or generated above 0", 0)
        return run


def _known(value: Json, path: str) -> float | None:
    return None if value is None else check_number(value, path, positive=True)


@dataclass(frozen=True)
class StoredTable:
    """Points of one kernel class as a profile keeps them, with the law fitted to them.

    ``columns`` are sizes, ``time_s`` and perhaps ``power_w``, each packed: base64 of the deflated little-endian float64. They are
    unpacked and checked when first asked for: a prediction asks for the few tables that its model needs.
    ``fit`` is what `assay.cost.tabled.fit_to_json` wrote, None where the points are too few; ``accuracy`` that of held-out
    points, as in a profile's ``accuracy``.
    """

    op: str
    dtype: str
    system: str
    source: str
    variant: str
    points: int
    columns: Mapping[str, str]
    notes: tuple[str, ...]
    fit: Mapping[str, Json] | None
    accuracy: Mapping[str, Json] | None
    path: str = field(default="$.tables", compare=False)  # of the profile, for messages

    @classmethod
    def of(
        cls, table: "KernelTable", fit: Mapping[str, Json] | None = None, accuracy: Mapping[str, Json] | None = None
    ) -> "StoredTable":
        """Packs a table."""
        columns = dict(table.sizes) | {"time_s": table.time_s}
        if table.power_w is not None:
            columns["power_w"] = table.power_w
        return cls(
            table.op, table.dtype, table.system, table.source, table.variant, len(table),
            {name: _packed(values) for name, values in columns.items()}, table.notes, fit, accuracy,
        )  # fmt: skip

    @cached_property
    def table(self) -> "KernelTable":
        """The points.

        Raises
        ------
        ProfileError
            A column that does not unpack to ``points`` numbers, or numbers that cannot be.
        """
        from assay.tables import KernelTable

        columns = {
            name: _unpacked(text, self.points, f"{self.path}.columns.{name}") for name, text in self.columns.items()
        }
        time_s, power_w = columns.pop("time_s"), columns.pop("power_w", None)
        try:
            return KernelTable(
                self.op, self.dtype, self.system, self.source, self.variant, columns, time_s, power_w, self.notes
            )
        except ValueError as error:
            raise ProfileError(f"{self.path}.{error}") from error

    def to_json(self) -> dict[str, Json]:
        """The fields, by name."""
        return {
            "op": self.op, "dtype": self.dtype, "system": self.system, "source": self.source, "variant": self.variant,
            "points": self.points, "columns": dict(self.columns), "notes": list(self.notes),
            "fit": None if self.fit is None else dict(self.fit),
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Json, path: str) -> "StoredTable":
        """Checks all but the packed numbers strictly; ProfileError names the place."""
        texts = ("op", "dtype", "system", "source", "variant")
        data = check_object(value, path, (*texts, "points", "columns", "notes", "fit", "accuracy"))
        columns = check_object(data["columns"], f"{path}.columns", ("time_s",), optional=None)
        notes = check_list(data["notes"], f"{path}.notes")
        for part in ("fit", "accuracy"):
            if data[part] is not None:
                check_object(data[part], f"{path}.{part}", ("n",) if part == "accuracy" else ("law",), optional=None)
                check_finite(data[part], f"{path}.{part}")
        return cls(
            **{k: check_text(data[k], f"{path}.{k}") for k in texts},
            points=check_int(data["points"], f"{path}.points", 1, MAX_POINTS),
            columns={k: check_text(v, f"{path}.columns.{k}") for k, v in columns.items()},
            notes=tuple(check_text(v, f"{path}.notes[{i}]") for i, v in enumerate(notes)),
            fit=data["fit"],
            accuracy=data["accuracy"],
            path=path,
        )


def _packed(values: "FloatArray") -> str:
    return base64.b64encode(zlib.compress(values.astype("<f8").tobytes(), 9)).decode("ascii")


def _unpacked(text: str, points: int, path: str) -> "FloatArray":
    """The numbers; never more than ``points`` of them, whatever the text would inflate to."""
    import numpy as np

    try:
        inflater = zlib.decompressobj()
        raw = inflater.decompress(base64.b64decode(text, validate=True), 8 * points + 1)
    except (ValueError, zlib.error) as error:
        raise ProfileError(f"{path}: expected base64 of deflated numbers, got something else ({error})") from error
    if len(raw) != 8 * points:
        got = f"more than {8 * points}" if len(raw) > 8 * points else str(len(raw))
        raise ProfileError(f"{path}: expected {8 * points} bytes ({points} numbers), got {got}")
    return np.frombuffer(raw, dtype="<f8").astype(np.float64)
