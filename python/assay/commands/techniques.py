"""``assay techniques``: what techniques gain on a model, alone and together. See docs/cost-model.md."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING, Any

from . import _case

if TYPE_CHECKING:
    from assay.cost.cases import Case
    from assay.cost.machines import Machine
    from assay.cost.techniques import Combination, Technique
    from assay.model import ModelSpec

SCHEMA_VERSION = 2
DEFAULT_MODEL = "mixtral-8x7b"
DEFAULT_STUDENT = "phi-3-mini"
DEFAULT_CHIP = "groq-lpu"
SYNTAX = """\
techniques, separated by commas; options after colons:
  int4 w4a8 w4a16 fp8 int8 mxfp4 nvfp4   weights (int4: w4a8 on a profile, w4a16 on a data sheet) [:loss=0.02..0.03]
  kv=fp8 kv=int8                         KV cache
  moe[:experts=8:k=2][:equal=total]      a mixture against the dense model of equal total or active parameters
  spec[:k=4][:accept=0.8/0.7/0.6][:draft=0.05]   drafts, acceptance by depth (0.6..0.8 is an interval), cost of a pass
      [:length=2.5][:tree=4-2-1][:fixed=0][:passes=1][:ranks=1/0.3/0.1][:block=yes]
  batching                               continuous and paged against static and reserved
  silicon[:to=groq-lpu]                  so many chips as hold the model; gains are then a watt of nameplate power
  distil[:model=phi-3-mini][:loss=0.05]  a smaller model
  adaptive[:spread=0.6..1.4][:covered=0.95]   tokens as needed against a budget that covers most questions
  io                                     attention that keeps its scores on the chip against one that writes them
  prefix[:hit=0.5]                       share of the prompt found in a prefix cache
  hardware:to=NAME[:devices=1]           another device
default: all of moe (of a mixture), spec, int4, batching, silicon, distil, adaptive and io that the machine has
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.epilog = SYNTAX
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", default=DEFAULT_MODEL,
        help=f"catalog name, Hugging Face config.json, or GGUF file ({DEFAULT_MODEL})",
    )  # fmt: skip
    parser.add_argument("--with", dest="techniques", metavar="T,...", help="techniques (default: see below)")
    _case.add_machine(parser)
    parser.add_argument("--weights", choices=_case.WEIGHTS, default="bf16", help="weights of the base case (bf16)")
    parser.add_argument("--batch", type=int, default=16, metavar="B", help="most requests at once (16)")
    parser.add_argument("--isl", type=int, default=512, help="input tokens a request (512)")
    parser.add_argument("--osl", type=int, default=128, help="output tokens a request (128)")
    parser.add_argument("--largest", type=int, choices=(1, 2, 3), default=3, help="techniques in a set (3)")
    parser.add_argument(
        "--most-loss", type=float, default=1.0, metavar="L", help="leave out sets that may lose more quality (1)"
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show the terms, and what moves the largest gain and the lowest index most",
    )
    parser.add_argument("--measured", metavar="FILE", help="JSON with rows of techniques and their measured speed-up")
    parser.add_argument(
        "-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format (table)"
    )


def run(args: argparse.Namespace) -> int:
    """Prices every technique and every set of two and three; exit status 0."""
    from assay.catalog import resolve_model
    from assay.cost.draws import Draws
    from assay.cost.techniques import exclusive, speedups
    from assay.report.table import render, to_json

    if not 0 <= args.most_loss <= 1:
        raise ValueError(f"--most-loss: expected a share, got {args.most_loss}")
    model = resolve_model(args.model)
    machine = _case.machine(args)
    words = _default(model, machine) if args.techniques is None else args.techniques.split(",")
    base, techniques = _base(args, model, machine, [word.strip() for word in words])
    draws = Draws(seed=args.seed)
    start, found = speedups(base, techniques, largest_set=args.largest, draws=draws, most_loss=args.most_loss)
    if not found:
        raise ValueError(f"--most-loss: expected one that some technique keeps, got {args.most_loss}")
    measured = _measured(args.measured)
    rows = [_row(c, measured) for c in (start, *found)]
    verdict = _verdict(found)
    explained = _explain(base, techniques, found) if args.explain else []
    notes = [
        "[low, high] are 90% intervals; shared errors cancel in speed-ups and indices.",
        "Speed-up: in answers a second" + (", a watt of nameplate power" if any(t.changes == "chip" for t in techniques) else "")
        + ". I: of the set over the product of its members' own; below 1 they get in each other's way.",
        "theory, practice: what the claims of `assay claims` say of each, products for sets.",
        *(f"{a} and {b} change the same thing: no set holds both." for a, b in exclusive(techniques)),
        "Utilisations of a data sheet's device are judgements, not measurements." if not args.profile else
        "Formats without a calibrated kernel are priced on the measured roofs.",
        *draws.notes,
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
            "explain": explained,
            "rows": rows,
        }
        print(to_json(answer))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        heading = f"{base.model.name} on {machine.name}, batch {args.batch}, {args.isl} tokens in, {args.osl} out"
        print(heading, verdict, "", sep="\n")
        print(render(rows, _columns(), args.output), end="\n\n")
        if args.explain:
            asked = [(), *(tuple(line["techniques"]) for line in explained)]
            for row in (row for row in rows if tuple(row["techniques"]) in asked):
                print(_terms(row), end="\n\n")
        for line in explained:
            print(_explained(line), end="\n\n")
        for note in notes:
            print(f"- {note}")
        print(f"\nNext: {_next(args)}")
    return 0


def _explain(base: "Case", techniques: "list[Technique]", found: "list[Combination]") -> list[dict[str, Any]]:
    """The three uncertain inputs that move the largest speed-up, and the lowest index, most."""
    from assay.cost.techniques import moved

    best = max(found, key=lambda c: c.speedup[0])
    together = [c for c in found if c.interaction is not None]
    asked = [("speedup", best)]
    if together:
        asked.append(("interaction", min(together, key=lambda c: c.interaction[0] if c.interaction else 1.0)))
    return [
        {
            "of": what, "techniques": list(c.names),
            "inputs": [{"input": i.cause, "at_low": i.at_low, "at_high": i.at_high} for i in moved(base, techniques, c.names, what)[:3]],
        }
        for what, c in asked
    ]  # fmt: skip


def _explained(line: dict[str, Any]) -> str:
    from assay.report import table

    inputs = [f"{i['input']} ({table.number(i['at_low'])} to {table.number(i['at_high'])})" for i in line["inputs"]]
    what = "speed-up" if line["of"] == "speedup" else "index"
    return f"What moves the {what} of {' + '.join(line['techniques'])} most: {', '.join(inputs)}."


def _terms(row: dict[str, Any]) -> str:
    """Where the machine's time for an answer goes, in a sentence."""
    from assay.report import table

    parts = ", ".join(f"{name} {table.seconds(row[f'{name}_s'])}" for name in ("memory", "compute", "overhead"))
    name = " + ".join(row["techniques"]) or "none"
    return f"An answer with {name} takes {table.seconds(1.0 / row['answers_per_s'])} of the machine: {parts}."


# ---- techniques from text -----------------------------------------------------------------------------------


def _default(model: "ModelSpec", machine: "Machine") -> list[str]:
    """Every technique that the machine and the model have; speculation in the middle of published acceptance."""
    words = (["moe"] if model.experts else []) + ["spec", "int4", "batching"]
    if machine.watts is not None:
        words.append("silicon")
    student = ["distil"] if model.num_params > 8e9 else []
    return words + student + ["adaptive", "io"]


def _base(
    args: argparse.Namespace, model: "ModelSpec", machine: "Machine", words: list[str]
) -> "tuple[Case, list[Technique]]":
    """The base case and the techniques: of each that is asked for, the base goes without."""
    from assay.cost.cases import Case
    from assay.cost.techniques import Technique, dense_twin

    base, continuous, io_aware, techniques = model, True, True, []
    for word in words:
        kind, options = _case.split(word)
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
        elif kind == "io":
            io_aware = False
            techniques.append(Technique("io", "io_aware", io_aware=True))
        else:
            techniques.append(_technique(kind, options, args.profile is not None))
        if options:
            raise ValueError(f"{kind}: expected none of {', '.join(options)}; see assay techniques --help")
    case = Case(
        base,
        machine,
        args.weights,
        batch=args.batch,
        isl=args.isl,
        osl=args.osl,
        continuous=continuous,
        io_aware=io_aware,
    )
    return case, techniques


def _mixture(model: "ModelSpec", options: dict[str, str], equal: str) -> "ModelSpec":
    from assay.cost.techniques import sparse

    experts = _case.whole(options.pop("experts", "8"), "experts")
    return sparse(model, experts, _case.whole(options.pop("k", "2"), "k"), equal)


def _technique(kind: str, options: dict[str, str], calibrated: bool) -> "Technique":
    from dataclasses import replace

    from assay.catalog import resolve_model
    from assay.cost.machines import Datasheet
    from assay.cost.techniques import Technique, adaptive, quantised_kv, quantised_weights, speculative

    loss = _case.triple(options.pop("loss"), "loss") if "loss" in options else (0.0, 0.0, 0.0)
    if kind == "int4":
        found = quantised_weights("w4a8" if calibrated else "w4a16")
    elif kind in _case.WEIGHTS:
        found = quantised_weights(kind)
    elif kind.startswith("kv="):
        found = quantised_kv(kind[3:])
    elif kind == "spec":
        found = speculative(_case.speculation(options))
    elif kind == "prefix":
        found = Technique("prefix", "prefix_hit", prefix_hit=_case.number(options.pop("hit", "0.5"), "hit"))
    elif kind == "distil":
        found = Technique("distil", "model", model=resolve_model(options.pop("model", DEFAULT_STUDENT)))
    elif kind == "adaptive":
        found = adaptive(
            _case.triple(options.pop("spread", "0.6..1.4"), "spread"),
            _case.number(options.pop("covered", "0.95"), "covered"),
        )
    elif kind == "silicon":
        chip = _case.device(options.pop("to", DEFAULT_CHIP))
        assert isinstance(chip, Datasheet)
        found = Technique("silicon", "chip", chip=chip)
    elif kind == "hardware" and "to" in options:
        count = _case.whole(options.pop("devices", "1"), "devices")
        found = Technique("hardware", "machine", machine=_case.device(options.pop("to"), count))
    else:
        raise ValueError(f"--with: expected techniques as in assay techniques --help, got {kind!r}")
    return replace(found, loss=loss)


def _claims() -> dict[str, dict[str, Any]]:
    """What the ledger's rows say of a technique, by its kind."""
    from assay.catalog import list_claims

    return {row["technique"]: row for row in list_claims() if "technique" in row}


def _kind(name: str) -> str:
    """The kind of a technique's name, as the ledger has it."""
    if name in _case.WEIGHTS:
        return "int4" if name in ("w4a16", "w4a8") else name
    return name.partition(":")[0].partition("=")[0]


def _measured(path: str | None) -> dict[frozenset[str], float]:
    """Measured speed-ups by set, from a file of ``{"rows": [{"techniques": [...], "speedup": x}]}``."""
    import json
    import math
    from pathlib import Path

    from assay.errors import FormatError

    if path is None:
        return {}
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["rows"]
        found = {frozenset(str(t) for t in row["techniques"]): float(row["speedup"]) for row in rows}
    except (ValueError, KeyError, TypeError) as exc:
        raise FormatError(f"{path}: expected JSON rows of techniques and speedup: {exc}") from exc
    bad = [v for v in found.values() if not math.isfinite(v) or v <= 0]
    if bad:
        raise FormatError(f"{path}: speedup: expected finite numbers above 0, got {bad[0]}")
    return found


# ---- output ------------------------------------------------------------------------------------------------


def _row(c: "Combination", measured: dict[frozenset[str], float]) -> dict[str, Any]:
    import math

    index = c.interaction or (None, None, None)
    claims = _claims()
    said = [claims.get(_kind(name), {}) for name in c.names]

    def together(key: str) -> list[float] | None:
        ranges = [row.get(key) for row in said]
        if not ranges or None in ranges:
            return None
        return [math.prod(r[i] for r in ranges if r is not None) for i in (0, 1)]

    return {
        "claims": [str(row["id"]) for row in said if row],
        "theoretical": together("theoretical"),
        "practical": together("practical"),
        "measured": measured.get(frozenset(c.names)),
        "answers_per_s": c.answers_per_s[0],
        "answers_per_s_low": c.answers_per_s[1],
        "answers_per_s_high": c.answers_per_s[2],
        "loss": c.loss[1],
        "loss_low": c.loss[0],
        "loss_high": c.loss[2],
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
        "memory_s": c.parts_s[0],
        "compute_s": c.parts_s[1],
        "overhead_s": c.parts_s[2],
        "why": c.why,
    }


def _columns() -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    def three(stem: str) -> tuple[str, str, str]:
        return stem, f"{stem}_low", f"{stem}_high"

    return [
        Column("techniques", "techniques", lambda names: " + ".join(names) or "none"),
        Column("theoretical", "theory", _range),
        Column("practical", "practice", _range),
        Column(three("tokens_per_s"), "tokens/s", table.number),
        Column(three("speedup"), "speed-up", table.number),
        Column("product", "product", table.number, align="right"),
        Column(three("interaction"), "I", table.number),
        Column("measured", "measured", table.number),
        Column(("bound_before", "bound_after"), "bound by", lambda a, b: a if a == b else f"{a} -> {b}"),
        Column("fits", "fits", table.yes_no),
        Column("why", "because"),
    ]


def _range(ends: list[float]) -> str:
    low, high = ends
    return f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}"


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
