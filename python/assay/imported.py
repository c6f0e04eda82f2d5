"""One profile of several files: calibrations, pytest-benchmark's, tables of kernels and llama-bench's runs, of one device."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from assay.catalog import datasheet_profile, find_device, list_devices
from assay.cost.device import Device, unknown_device
from assay.cost.stored import summarise
from assay.cost.tabled import fit_tables
from assay.errors import FormatError, ProfileError
from assay.foreign import StoredTable, WholeRun
from assay.importers import read_tables
from assay.importers.text import kind_of, read_runs
from assay.profile import Profile, from_pytest_benchmark, load
from assay.report.progress import Progress
from assay.tables import KernelTable


def profile_of(paths: Sequence[Path], device: str | None = None) -> Profile:
    """What all of the files say of their one device, with the tables fitted: some seconds for each ten thousand points.

    Parameters
    ----------
    paths
        In any mixture of the formats; at most one calibration or pytest-benchmark file.
    device
        Name of the device in the catalog, for files that do not say it so that the catalog knows it.

    Raises
    ------
    FormatError
        A file in no known format, broken, or of another device than the others; a device that the catalog does not know.
    ProfileError
        A profile or pytest-benchmark file that does not validate.
    """
    own: Profile | None = None
    tables: list[KernelTable] = []
    runs: list[WholeRun] = []
    places: list[tuple[str, str]] = []  # of device names: where, which
    for path in paths:
        kind = "kernels" if _is_parquet(path) else kind_of(path)
        if kind == "profile":
            if own is not None:
                raise FormatError(f"{path}: expected one calibration or pytest-benchmark file, got a second")
            own = _profile(path)
        elif kind == "runs":
            some = read_runs(path)
            runs += some
            places += [(str(path), r.device) for r in some if r.device != "unknown"]
        else:
            found = read_tables(path)
            tables += found
            places += [(str(path), name) for name in dict.fromkeys(t.system for t in found)]
    row = _device_row(own, dict.fromkeys(places), device)
    profile = own if own is not None else _datasheet(row)
    tables += [t.table for t in profile.tables]
    profile.fits, profile.accuracy = (profile.fits, profile.accuracy) if profile.fits else summarise(profile)
    profile.tables = list(_fitted(tables, profile.machine.cpu))
    profile.runs += [replace(r, device=profile.machine.cpu) if r.device == "unknown" else r for r in runs]
    return profile


def datasheet_of(system: str) -> Device:
    """What the catalog says of the device that a table names, or an unknown device."""
    row = find_device(system)
    if row is None:
        return unknown_device(system)
    return Device(row["name"], row["memory_bytes_per_s"], row["ops_per_s"], row["multiprocessors"])


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as handle:
            return handle.read(4) == b"PAR1"
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read: {exc.strerror}") from exc


def _profile(path: Path) -> Profile:
    try:
        return load(path)
    except ProfileError as error:
        if "$.schema: " not in str(error):
            raise
    return from_pytest_benchmark(path)


def _device_row(own: Profile | None, places: dict[tuple[str, str], None], device: str | None) -> dict[str, Any] | None:
    """The catalog's row of the device that all files are about; None where only ``own`` is there, or it is not in there."""
    wanted = None
    known = ", ".join(row["name"] for row in list_devices())
    if device is not None:
        wanted = find_device(device)
        if wanted is None:
            raise FormatError(f"--device: expected one of {known}, got {device!r}")
    machine = None if own is None else own.machine.cpu
    if machine is not None:
        here = find_device(machine)
        if wanted is not None and here != wanted:
            raise FormatError(f"--device: expected the profile's {machine}, got {device!r}")
        wanted = here
    for where, name in places:
        row = find_device(name)
        if row is None and (name == machine or device is not None):
            continue
        if row is None and machine is None:
            raise FormatError(
                f"{where}: device: expected one of {known}, got {name!r}; `--device NAME` says which it is"
            )
        if (machine is not None or wanted is not None) and row != wanted:
            got = machine or (wanted or {}).get("title")
            raise FormatError(f"{where}: device: expected {got}, which the other files are of, got {name!r}")
        wanted = row
    if wanted is None and machine is None:
        raise FormatError(f"--device: expected one of {known}, for no file names the device; got nothing")
    return wanted


def _datasheet(row: dict[str, Any] | None) -> Profile:
    if row is None:
        raise ValueError("row: expected a device of the catalog, got None")
    made = Profile.from_json(datasheet_profile(row))
    made.created_utc = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    made.settings = made.settings | {"mode": "imported"}
    return made


def _fitted(tables: Sequence[KernelTable], name: str) -> list[StoredTable]:
    found = []
    with Progress(float(sum(len(t) for t in tables)), "fitting") as progress:
        for stored in fit_tables(tables, datasheet_of(name)):
            progress.advance(float(stored.points), f"{stored.op} {stored.dtype}")
            found.append(stored)
    return found
