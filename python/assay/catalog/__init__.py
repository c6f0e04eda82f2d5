"""Models by name, from ``models.json``: each row with its source and date; and from files, by what is in them."""

import json
import re
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..model import ModelSpec, lookup, slug

__all__ = [
    "datasheet_profile",
    "device_price",
    "find_device",
    "list_claims",
    "list_devices",
    "list_models",
    "list_prices",
    "list_published",
    "list_videos",
    "load_model",
    "published_profile",
    "resolve_model",
    "token_price",
]


@cache
def _rows() -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath("models.json").read_text(encoding="utf-8")
    return {row["name"]: row for row in json.loads(text)["models"]}


@cache
def _names() -> dict[str, str]:
    """Slugs of names, titles and aliases to names."""
    found: dict[str, str] = {}
    for name, row in _rows().items():
        for alias in (name, row["title"], *row["aliases"]):
            key = slug(alias)
            if found.setdefault(key, name) != name:
                raise FormatError(f"models.json: alias {alias!r}: expected one model, got {found[key]} and {name}")
    return found


def list_models() -> list[str]:
    """Names of the catalog's models, in its order."""
    return list(_rows())


def load_model(name: str) -> ModelSpec:
    """A model of the catalog by name or alias; case, owner ("mistralai/") and separators do not matter.

    Raises
    ------
    UnknownModelError
        With the nearest names and the list of all.
    """
    from ..formats.hf import spec_from_config

    row = _rows()[lookup(name, _names())]
    return spec_from_config(row["config"], row["title"], f"{row['source']} ({row['date']})")


def resolve_model(text: str | Path) -> ModelSpec:
    """The model that `text` names: a catalog name, or else a file, told apart by its content.

    Parameters
    ----------
    text
        A name or alias, a GGUF file, a Hugging Face ``config.json``, or a folder that has one. A plain name is looked
        up in the catalog first; one with a "/" is a path when there is something at it.

    Raises
    ------
    UnknownModelError
        Neither in the catalog nor a file.
    FormatError
        A file that is neither, or malformed.
    """
    text = str(text)
    named = slug(text) in _names()
    if named and "/" not in text:
        return load_model(text)
    try:
        path = Path(text).expanduser()
        exists = bool(text) and path.exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown ~user
        exists = False
    if named and not exists:  # "mistralai/Mixtral-8x7B-v0.1", unless a folder of that name is here
        return load_model(text)
    if not exists:
        lookup(text, _names(), note=", and there is no such file")
    if path.is_dir():
        if (path / "config.json").is_file():
            path = path / "config.json"
        else:
            raise FormatError(f"{path}: expected a folder with a config.json, or a file, got a folder without one")
    if not path.is_file():
        raise FormatError(f"{path}: expected a regular file")
    try:
        with path.open("rb") as handle:
            head = handle.read(4096)
    except OSError as exc:
        raise FormatError(f"{path}: cannot be read: {exc.strerror}") from exc
    if head[:4] == b"GGUF":
        from ..formats.gguf import model_spec, open_gguf

        with open_gguf(path) as file:
            return model_spec(file)
    if head.lstrip()[:1] == b"{":
        from ..formats.hf import load_config

        return load_config(path)
    raise FormatError(f"{path}: expected a GGUF file or a config.json, got a file that starts with {head[:8]!r}")


@cache
def _device_rows() -> tuple[dict[str, Any], ...]:
    text = files(__package__).joinpath("hardware.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["devices"])


def list_devices() -> list[dict[str, Any]]:
    """Rows of ``hardware.json``: dense peaks, each with its source and date."""
    return [dict(row) for row in _device_rows()]


def find_device(name: str) -> dict[str, Any] | None:
    """The datasheet row of a device by the name that its driver gives, or None.

    A row is named by the whole words of one of its patterns, so that "NVIDIA GB200" is not a B200, and by the longest
    one, so that an "Apple M4 Pro" is no M4. Where none is, the first words of one row's name will do: "h100", "groq".
    """
    text = " ".join(name.lower().split())
    found: dict[str, Any] | None = None
    longest = 0
    for row in _device_rows():
        for pattern in (row["name"], *row["match"]):
            if len(pattern) > longest and re.search(rf"(?<![a-z0-9]){re.escape(pattern)}(?![a-z0-9])", text):
                found, longest = dict(row), len(pattern)
    begun = [row for row in _device_rows() if row["name"].startswith(f"{text}-")]
    return dict(begun[0]) if found is None and len(begun) == 1 else found


@cache
def _published_rows() -> tuple[dict[str, Any], ...]:
    text = files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["profiles"])


def list_published() -> list[dict[str, Any]]:
    """Rows of ``published.json``: ceilings of GPUs, as others published them, each with its source."""
    return [dict(row) for row in _published_rows()]


def published_profile(name: str) -> dict[str, Any]:
    """A profile (docs/profile-format.md) of a device that nobody calibrated: published ceilings and no kernels.

    Raises
    ------
    ValueError
        Nothing is published here of a device of this name.
    """
    row = find_device(name)
    found = next((r for r in _published_rows() if row is not None and r["device"] == row["name"]), None)
    if row is None or found is None:
        known = ", ".join(r["device"] for r in _published_rows())
        raise ValueError(f"hardware: expected one of {known}, got {name!r}")
    return _ceilings_as_profile(row, found["roofs"])


def datasheet_profile(row: dict[str, Any]) -> dict[str, Any]:
    """As `published_profile` for any row of `find_device`: on its datasheet's peaks where no better ceilings are published."""
    found = next((r["roofs"] for r in _published_rows() if r["device"] == row["name"]), None)
    about = {"how": "datasheet", "source": row["source"], "date": row["date"]}
    peaks = {"dram_read": row["memory_bytes_per_s"], "fp16_peak": row["ops_per_s"],
             "int8_peak": row.get("int8_ops_per_s") or row["ops_per_s"]}  # fmt: skip
    return _ceilings_as_profile(
        row, found or [{"roof": k, "value": float(v), "also": []} | about for k, v in peaks.items()]
    )


def _ceilings_as_profile(row: dict[str, Any], ceilings: list[dict[str, Any]]) -> dict[str, Any]:
    roofs = [
        {"name": r["roof"], "threads": 1, "unit": "bytes_per_s" if r["roof"] == "dram_read" else "ops_per_s",
         "samples": [r["value"]], "median": r["value"], "spread": 0.0}
        for r in ceilings
    ]  # fmt: skip
    return {
        "schema": "assay-profile", "schema_version": 1, "created_utc": "2026-11", "command": [], "seed": 0,
        "package": {"assay": "", "kernels": {}, "compiler": ""},
        "machine": {
            "fingerprint": f"published-{row['name']}", "cpu": row["title"], "isa": [], "cores": row["multiprocessors"],
            "memory_bytes": int(row["memory_bytes"]),
            "caches": {"l1d_bytes": None, "l2_bytes": None, "l3_bytes": None}, "os": "", "numpy": "", "python": "",
            "kind": "gpu", "published": ceilings,
        },
        "settings": {"mode": "published", "threads": [1], "source": "published"},
        "roofs": roofs, "samples": [], "fits": {}, "accuracy": {}, "complete": True,
    }  # fmt: skip


@cache
def _price_rows() -> dict[str, list[dict[str, Any]]]:
    text = files(__package__).joinpath("prices.json").read_text(encoding="utf-8")
    rows: dict[str, list[dict[str, Any]]] = json.loads(text)
    return {kind: rows[kind] for kind in ("hours", "purchases", "tokens")}


def list_prices(kind: str) -> list[dict[str, Any]]:
    """Rows of ``prices.json``: "hours" and "purchases" of devices as ranges, "tokens" as list prices; all dated."""
    return [dict(row) for row in _price_rows()[kind]]


def device_price(name: str) -> dict[str, Any] | None:
    """The range of an hour's rent of a device of the catalog, or None where it is not let by the hour."""
    return next((row for row in list_prices("hours") if row["device"] == name), None)


def token_price(name: str) -> dict[str, Any]:
    """List prices of a model's tokens.

    Raises
    ------
    ValueError
        Not in the catalog.
    """
    rows = {row["name"]: row for row in list_prices("tokens")}
    if name not in rows:
        raise ValueError(f"price: expected one of {', '.join(rows)}, got {name!r}")
    return rows[name]


def list_videos() -> list[dict[str, Any]]:
    """Rows of ``videos.json``: diffusion transformers of video, with what their makers measured."""
    text = files(__package__).joinpath("videos.json").read_text(encoding="utf-8")
    return list(json.loads(text)["models"])


@cache
def _claim_rows() -> tuple[dict[str, Any], ...]:
    text = files(__package__).joinpath("claims.json").read_text(encoding="utf-8")
    return tuple(json.loads(text)["claims"])


def list_claims() -> list[dict[str, Any]]:
    """Rows of ``claims.json``: id, the claim in words, the case of `assay.cost.claims` that prices it, its numbers."""
    return [dict(row) for row in _claim_rows()]
