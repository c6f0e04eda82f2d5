"""``assay techniques``: what techniques gain on a model, alone and together. See docs/cost-model.md."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.cost.cases import Case, Machine, Speculation
    from assay.cost.techniques import Combination, Technique
    from assay.model import ModelSpec

SCHEMA_VERSION = 1
DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_HARDWARE = "h200-sxm"
WEIGHTS = ("bf16", "fp8", "int8", "w4a16", "w4a8", "mxfp4", "nvfp4")
SYNTAX = """\
techniques, separated by commas; options after colons:
  int4 w4a8 w4a16 fp8 int8 mxfp4 nvfp4   weights (int4: w4a8 on a profile, w4a16 on a data sheet)
  kv=fp8 kv=int8                         KV cache
  moe[:experts=8:k=2][:equal=total]      a mixture against the dense model of equal total or active parameters
  spec[:k=4][:accept=0.7][:draft=0.05]   speculation: drafts, acceptance (0.6..0.8 is an interval), cost of a draft step
      [:length=2.5][:tree=4-2-1][:fixed=0]   measured accepted length; children by depth; bookkeeping, in plain steps
  batching                               continuous and paged against static and reserved
  prefix[:hit=0.5]                       share of the prompt found in a prefix cache
  distil:model=NAME                      a smaller model
  hardware:to=NAME[:devices=1]           another device
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = SYNTAX
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL,
        help=f"catalog name, Hugging Face config.json, or GGUF file ({DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument(
        "--with", dest="techniques", metavar="T,...", help="techniques (default: moe if it is one,int4,spec)"
    )
    parser.add_argument("--hardware", metavar="NAME", help=f"device of the catalog ({DEFAULT_HARDWARE})")
    parser.add_argument(
        "--devices", type=int, default=1, metavar="N", help="so many of them, communication not priced (1)"
    )
    parser.add_argument("--profile", metavar="FILE", help="a calibrated machine instead of a catalog device")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16", help="weights of the base case (bf16)")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="most requests at once (1)")
    parser.add_argument("--isl", type=int, default=512, help="input tokens a request (512)")
    parser.add_argument("--osl", type=int, default=128, help="output tokens a request (128)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws behind the intervals (0)")
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Prices every technique and every set of two and three; exit status 0."""
    from assay.catalog import resolve_model
    from assay.cost.cases import Draws
    from assay.cost.techniques import speedups
    from assay.report.table import render, to_json

    if args.seed < 0:
        raise ValueError(f"--seed: expected at least 0, got {args.seed}")
    model = resolve_model(args.model)
    machine = _machine(args)
    text = ("moe,int4,spec" if model.experts else "int4,spec") if args.techniques is None else args.techniques
    base, techniques = _case(args, model, machine, text)
    start, found = speedups(base, techniques, draws=Draws(seed=args.seed))
    rows = [_row(c) for c in (start, *found)]
    verdict = _verdict(found)
    notes = [
        "[low, high] are 90% intervals; shared errors cancel in speed-ups and indices.",
        "I: speed-up of the set over the product of its members' own; below 1 they get in each other's way.",
        "Output tokens a second, prompts included. "
        + ("Utilisations of a data sheet's device are judgements, not measurements." if not args.profile else
           "Formats without a calibrated kernel are priced on the measured roofs."),
    ]  # fmt: skip
    if args.output == "json":
        answer = {
            "schema": "assay-techniques",
            "schema_version": SCHEMA_VERSION,
            "model": {"name": base.model.name, "source": base.model.source},
            "machine": machine.name,
            "batch": args.batch,
            "isl": args.isl,
            "osl": args.osl,
            "seed": args.seed,
            "verdict": verdict,
            "notes": notes,
            "rows": rows,
        }
        print(to_json(answer))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        heading = f"{base.model.name} on {machine.name}, batch {args.batch}, {args.isl} tokens in, {args.osl} out"
        print(heading, verdict, "", sep="\n")
        print(render(rows, _columns(), args.output), end="\n\n")
        for note in notes:
            print(f"- {note}")
        print(f"\nNext: {_next(args)}")
    return 0


def _machine(args: argparse.Namespace) -> "Machine":
    from assay.cost.cases import Calibrated

    if args.profile is None:
        return _device(args.hardware or DEFAULT_HARDWARE, args.devices)
    if args.hardware is not None or args.devices != 1:
        raise ValueError("--profile: expected no --hardware and --devices beside it, got both")
    from assay.cost.stored import load_model
    from assay.profile import load

    profile = load(args.profile)
    cost = load_model(profile)
    memory = profile.machine.memory_bytes
    return Calibrated(
        profile.machine.cpu, cost, max(cost.threads(), default=1), None if memory is None else float(memory)
    )


def _device(name: str, count: int) -> "Machine":
    from assay.catalog import find_device, list_devices
    from assay.cost.cases import datasheet

    row = find_device(name)
    if row is None:
        known = ", ".join(device["name"] for device in list_devices())
        raise ValueError(f"hardware: expected one of {known}, got {name!r}")
    return datasheet(row, count)


# ---- techniques from text -----------------------------------------------------------------------------------


def _case(
    args: argparse.Namespace, model: "ModelSpec", machine: "Machine", text: str
) -> "tuple[Case, list[Technique]]":
    """The base case and the techniques; a mixture's base is its dense twin, batching's is a static batch."""
    from assay.cost.cases import Case
    from assay.cost.techniques import Technique, dense_twin

    base, continuous, techniques = model, True, []
    for word in (part.strip() for part in text.split(",")):
        kind, options = _split(word)
        if kind == "moe":
            equal = options.pop("equal", "total")
            if model.experts is not None:
                base, target = dense_twin(model, equal), model
            else:
                target = _mixture(model, options, equal)
            techniques.append(Technique("moe", "model", model=target))
        elif kind == "batching":
            continuous = False
            techniques.append(Technique("batching", "continuous", continuous=True))
        else:
            techniques.append(_technique(kind, options, args.profile is not None))
        if options:
            raise ValueError(f"{kind}: expected none of {', '.join(options)}; see assay techniques --help")
    return (
        Case(base, machine, args.weights, batch=args.batch, isl=args.isl, osl=args.osl, continuous=continuous),
        techniques,
    )


def _split(word: str) -> tuple[str, dict[str, str]]:
    """ "spec:k=4" as its kind and options."""
    kind, *rest = word.split(":")
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not value or key in options:
            raise ValueError(f"{kind}: expected options like k=4, each once, got {part!r}")
        options[key] = value
    return kind, options


def _mixture(model: "ModelSpec", options: dict[str, str], equal: str) -> "ModelSpec":
    from assay.cost.techniques import sparse

    return sparse(model, _whole(options, "experts", "8"), _whole(options, "k", "2"), equal)


def _technique(kind: str, options: dict[str, str], calibrated: bool) -> "Technique":
    from assay.catalog import resolve_model
    from assay.cost.techniques import Technique, quantised_kv, quantised_weights, speculative

    if kind == "int4":
        return quantised_weights("w4a8" if calibrated else "w4a16")
    if kind in WEIGHTS:
        return quantised_weights(kind)
    if kind.startswith("kv="):
        return quantised_kv(kind[3:])
    if kind == "spec":
        return speculative(_speculation(options))
    if kind == "prefix":
        return Technique("prefix", "prefix_hit", prefix_hit=_number(options, "hit", "0.5"))
    if kind == "distil" and "model" in options:
        return Technique("distil", "model", model=resolve_model(options.pop("model")))
    if kind == "hardware" and "to" in options:
        return Technique("hardware", "machine", machine=_device(options.pop("to"), _whole(options, "devices", "1")))
    raise ValueError(f"--with: expected techniques as in assay techniques --help, got {kind!r}")


def _speculation(options: dict[str, str]) -> "Speculation":
    from assay.cost.cases import Speculation

    if "tree" in options and "k" in options:
        raise ValueError("spec: expected k or tree, got both")
    if "tree" in options:
        parts = options.pop("tree").split("-")
        branches = tuple(_whole({"tree": part}, "tree", "") for part in parts)
    else:
        drafts = _whole(options, "k", "4")
        if not 1 <= drafts <= 64:
            raise ValueError(f"spec:k: expected 1 to 64 drafts, got {drafts}")
        branches = (1,) * drafts
    length = _triple(options.pop("length"), "length") if "length" in options else None
    return Speculation(
        branches,
        _triple(options.pop("accept", "0.6..0.8"), "accept"),
        length,
        _number(options, "draft", "0.05"),
        _number(options, "fixed", "0"),
    )


def _whole(options: dict[str, str], key: str, default: str) -> int:
    text = options.pop(key, default)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{key}: expected an integer, got {text!r}") from None


def _number(options: dict[str, str], key: str, default: str) -> float:
    text = options.pop(key, default)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{key}: expected a number, got {text!r}") from None


def _triple(text: str, key: str) -> tuple[float, float, float]:
    """ "0.7", or "0.6..0.8" with its middle."""
    low, dots, high = text.partition("..")
    ends = [_number({key: end}, key, "") for end in ((low, high) if dots else (low, low))]
    return ends[0], (ends[0] + ends[1]) / 2.0, ends[1]


# ---- output ------------------------------------------------------------------------------------------------


def _row(c: "Combination") -> dict[str, Any]:
    index = c.interaction or (None, None, None)
    return {
        "techniques": list(c.names),
        "tokens_per_s": c.tokens_per_s[0],
        "tokens_per_s_low": c.tokens_per_s[1],
        "tokens_per_s_high": c.tokens_per_s[2],
        "speedup": c.speedup[0],
        "speedup_low": c.speedup[1],
        "speedup_high": c.speedup[2],
        "product": c.product if len(c.names) > 1 else None,
        "interaction": index[0],
        "interaction_low": index[1],
        "interaction_high": index[2],
        "bound_before": c.bound_before,
        "bound_after": c.bound_after,
        "fits": c.fits,
        "batch": c.batch,
        "why": c.why,
    }


def _columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    def three(stem: str) -> tuple[str, str, str]:
        return stem, f"{stem}_low", f"{stem}_high"

    return [
        Column("techniques", "techniques", lambda names: " + ".join(names) or "none"),
        Column(three("tokens_per_s"), "tokens/s", table.number),
        Column(three("speedup"), "speed-up", table.number),
        Column("product", "product", table.number, align="right"),
        Column(three("interaction"), "I", table.number),
        Column(("bound_before", "bound_after"), "bound by", lambda a, b: a if a == b else f"{a} -> {b}"),
        Column("fits", "fits", table.yes_no),
        Column("why", "because"),
    ]


def _verdict(found: "list[Combination]") -> str:
    from assay.report import table

    best = max(found, key=lambda c: c.speedup[0])
    text = f"Most: {' + '.join(best.names)}, {table.number(*best.speedup)} times"
    together = [c for c in found if c.interaction is not None]
    if not together:
        return f"{text}."
    worst = min(together, key=lambda c: c.interaction[0] if c.interaction else 1.0)
    assert worst.interaction is not None
    return f"{text}. Lowest index: {' + '.join(worst.names)}, I = {table.number(*worst.interaction)}."


def _next(args: argparse.Namespace) -> str:
    command = ["assay", "techniques", args.model]
    for option in ("hardware", "profile"):
        if getattr(args, option):
            command += [f"--{option}", getattr(args, option)]
    if args.devices != 1:
        command += ["--devices", str(args.devices)]
    if args.techniques:
        command += ["--with", args.techniques]
    return shlex.join([*command, "--batch", "64" if args.batch < 64 else "1"])
