"""Options that commands share which price a model on a machine: the machine, formats, speculation, ranges."""

import argparse
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from assay.cost.drafting import Speculation
    from assay.cost.machines import Machine

WEIGHTS = ("bf16", "fp8", "int8", "w4a16", "w4a8", "mxfp4", "nvfp4")
KV = ("bf16", "fp8", "int8")
DEFAULT_HARDWARE = "h200-sxm"


def add_machine(parser: argparse.ArgumentParser) -> None:
    """``--hardware``, ``--devices``, ``--profile``, ``--seed``."""
    parser.add_argument("--hardware", metavar="NAME", help=f"device of the catalog ({DEFAULT_HARDWARE})")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="so many of them share every layer (1)")
    parser.add_argument("--profile", metavar="FILE", help="a calibrated machine instead of a catalog device")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the intervals (0)")


def machine(args: argparse.Namespace, watts: float | None = None) -> "Machine":
    """The machine of the options."""
    from assay.cost.machines import Calibrated

    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    if args.profile is None:
        return device(args.hardware or DEFAULT_HARDWARE, args.devices)
    if args.hardware is not None or args.devices != 1:
        raise ValueError("--profile: expected no --hardware and --devices beside it, got both")
    from assay.cost.stored import load_model
    from assay.profile import load

    profile = load(args.profile)
    cost = load_model(profile)
    memory = profile.machine.memory_bytes
    return Calibrated(
        profile.machine.cpu, cost, max(cost.threads(), default=1), None if memory is None else float(memory), watts
    )


def device(name: str, count: int = 1) -> "Machine":
    """So many devices of the catalog."""
    from assay.cost.machines import datasheet

    return datasheet(device_row(name), count)


def device_row(name: str) -> dict[str, object]:
    """The row of a device of the catalog; ValueError with the list of all."""
    from assay.catalog import find_device, list_devices

    row = find_device(name)
    if row is None:
        known = ", ".join(row["name"] for row in list_devices())
        raise ValueError(f"hardware: expected one of {known}, got {name!r}")
    return row


def span(text: str, name: str) -> tuple[float, float]:
    """ "2.5", or "2..3": both ends."""
    low, dots, high = text.partition("..")
    ends = (number(low, name), number(high if dots else low, name))
    if ends[0] > ends[1]:
        raise ValueError(f"{name}: expected low..high, got {text!r}")
    return ends


def triple(text: str, name: str) -> tuple[float, float, float]:
    """ "0.7", or "0.6..0.8" with its middle."""
    low, high = span(text, name)
    return low, (low + high) / 2.0, high


def number(text: str, name: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a number, got {text!r}")
    return value


def whole(text: str, name: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}: expected an integer, got {text!r}") from None


def split(word: str) -> tuple[str, dict[str, str]]:
    """ "spec:k=4" as its kind and options."""
    kind, *rest = word.split(":")
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not value or key in options:
            raise ValueError(f"{kind}: expected options like k=4, each once, got {part!r}")
        options[key] = value
    return kind, options


def speculation(options: dict[str, str]) -> "Speculation":
    """The speculation of "k=4", "tree=4-2-1", "accept=0.8/0.7/0.6", "length=2.5", ...; takes what it uses out."""
    from assay.cost.drafting import Speculation

    if "tree" in options and "k" in options:
        raise ValueError("spec: expected k or tree, got both")
    if "tree" in options:
        branches = tuple(whole(part, "tree") for part in options.pop("tree").split("-"))
    else:
        drafts = whole(options.pop("k", "4"), "k")
        if not 1 <= drafts <= 64:
            raise ValueError(f"spec:k: expected 1 to 64 drafts, got {drafts}")
        branches = (1,) * drafts
    rates = tuple(triple(part, "accept") for part in options.pop("accept", "0.6..0.8").split("/"))
    return Speculation(
        branches,
        rates,
        triple(options.pop("length"), "length") if "length" in options else None,
        number(options.pop("draft", "0.05"), "draft"),
        number(options.pop("fixed", "0"), "fixed"),
        ranks=tuple(number(part, "ranks") for part in options.pop("ranks").split("/")) if "ranks" in options else (),
        passes=whole(options.pop("passes"), "passes") if "passes" in options else None,
        block=options.pop("block", "no") == "yes",
    )
