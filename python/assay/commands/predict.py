"""``assay predict``: what a model costs on a calibrated machine. Its JSON is described in docs/predict-output.md."""

import argparse
import math
import shlex
import sys
from typing import TYPE_CHECKING, Any

from . import _case

if TYPE_CHECKING:
    from assay.cost.kernel_model import CostModel
    from assay.cost.transformer import Prediction, StepEstimate
    from assay.model import ModelSpec
    from assay.profile import Profile

SCHEMA_VERSION = 1
MAX_BATCH = 65536
MAX_TOKENS = 1 << 24
MAX_USD_PER_HOUR = 1e6
FORMATS = ("table", "md", "csv", "json")
RUN_PARAMS = 0.005  # a whole run's weights may differ from the model's by this
RUN_BITS = 0.1  # and its bytes from a row's by this


def _integer(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected an integer from {low} to {high}, got {text!r}")
        return value

    return parse


def _batches(text: str) -> list[int]:
    parse = _integer(1, MAX_BATCH)
    return list(dict.fromkeys(parse(part.strip()) for part in text.split(",")))


def _precisions(text: str) -> list[str]:
    """ "int4,lm_head=bf16,bf16" as its rows: formats of roles stand after the format that they belong to."""
    from assay.cost.formats import parse

    rows: list[str] = []
    for part in (part.strip().lower() for part in text.split(",")):
        if "=" not in part:
            rows.append(part)
        elif rows:
            rows[-1] += f",{part}"
        else:
            raise argparse.ArgumentTypeError(f"expected a format before those of roles, got {part!r}")
    for row in rows:
        try:
            parse(row)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from None
    return list(dict.fromkeys(rows))


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_USD_PER_HOUR:  # false for NaN too
        raise argparse.ArgumentTypeError(f"expected US dollars an hour from 0 to {MAX_USD_PER_HOUR:.0f}, got {text!r}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("model", metavar="MODEL", help="catalog name, Hugging Face config.json, or GGUF file")
    parser.add_argument(
        "--precision",
        type=_precisions,
        metavar="P[,ROLE=P],...",
        help=f"some of file,int4,{','.join(_case.WEIGHTS)}, those of roles after each, as int4,lm_head=bf16 "
        "(default: bf16,int8,int4, and file first for a GGUF)",
    )
    parser.add_argument("--kv", choices=_case.KV, default="bf16", help="format of the cache (bf16)")
    parser.add_argument("--batch", type=_batches, default=[1, 8, 64], metavar="B,...", help="batch sizes (1,8,64)")
    parser.add_argument("--isl", type=_integer(1, MAX_TOKENS), default=512, help="input tokens a request (512)")
    parser.add_argument("--osl", type=_integer(1, MAX_TOKENS), default=128, help="output tokens a request (128)")
    parser.add_argument("--threads", type=_integer(1, 4096), help="threads (default: the most that were calibrated)")
    parser.add_argument(
        "--profile", metavar="FILE", help="profile (default: $ASSAY_PROFILE, else that of this machine)"
    )
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        help="a GPU that nobody calibrated, by ceilings that others published: h100-sxm, b200",
    )
    parser.add_argument(
        "--usd-per-hour", type=_price, metavar="X", help="price of the machine: adds $ per million tokens"
    )
    parser.add_argument("-o", "--output", choices=FORMATS, default="table", help="format (table)")
    parser.add_argument("--explain", action="store_true", help="show the kernel calls behind each row")


def run(args: argparse.Namespace) -> int:
    """Prices the model and prints the rows; exit status 0."""
    from assay.catalog import resolve_model
    from assay.cost.stored import load_model
    from assay.cost.transformer import check_precision, predict
    from assay.report.table import render, to_json

    profile, path = _profile(args.profile) if args.hardware is None else _published(args.hardware, args.profile)
    model = resolve_model(args.model)
    cost = load_model(profile)
    threads = args.threads or max(cost.threads(), default=1)
    for name in args.precision or ():
        check_precision(model, name)
    predictions = [
        predict(
            model,
            precision,
            batch,
            args.isl,
            args.osl,
            cost,
            threads,
            kv=args.kv,
            memory_bytes=profile.machine.memory_bytes,
            usd_per_hour=args.usd_per_hour,
        )
        for precision in args.precision or _default_precisions(model, cost)
        for batch in args.batch
    ]
    rows = [_row(p) for p in predictions]
    best = _best(predictions)
    notes = _notes(predictions, profile, cost, model)
    runs = _runs(model, predictions, profile, cost)
    notes[1:1] = [_run_note(run) for run in runs]
    if args.output == "json":
        answer = {
            "schema": "assay-prediction",
            "schema_version": SCHEMA_VERSION,
            "model": {
                "name": model.name,
                "source": model.source,
                "num_params": model.num_params,
                "active_params_per_token": model.active_params_per_token,
            },
            "profile": {
                "path": path,
                "created_utc": profile.created_utc,
                "mode": profile.settings["mode"],
                "complete": profile.complete,
                "machine": {"fingerprint": profile.machine.fingerprint, "cpu": profile.machine.cpu},
                "accuracy": dict(cost.accuracy),
            },
            "usd_per_hour": args.usd_per_hour,
            "verdict": _verdict(predictions, best, profile),
            "notes": notes,
            "runs": runs,
            "rows": [
                row | ({"calls": _calls(p), "inputs": _inputs(p)} if args.explain else {})
                for row, p in zip(rows, predictions, strict=True)
            ],
        }
        print(to_json(answer))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _columns(), "csv"))
    else:
        with_threads = "" if profile.machine.extra.get("kind") == "gpu" else f" {threads} threads,"
        heading = f"{model.name} on {profile.machine.cpu},{with_threads} {args.isl} tokens in, {args.osl} out"
        heading += "" if args.kv == "bf16" else f", cache in {args.kv}"
        print(heading, _verdict(predictions, best, profile), "", sep="\n")
        print(render(rows, _columns(priced=args.usd_per_hour is not None), args.output), end="\n\n")
        if args.explain:
            for prediction in predictions:
                print(_explained(prediction, args.output), end="\n\n")
        for note in notes:
            print(f"- {note}")
        print(f"\nNext: {_next(args, best, profile)}")
    return 0


def _profile(given: str | None) -> "tuple[Profile, str]":
    """The profile and where it was found."""
    from assay.errors import ProfileError
    from assay.profile import default_profile_path, load

    path = given if given is not None else str(default_profile_path())
    from pathlib import Path

    if not Path(path).exists():
        raise ProfileError(
            f"profile: expected a calibration profile at {path}, got no such file; "
            f"make one with `assay calibrate --quick{'' if given is None else ' -o ' + shlex.quote(path)}`"
        )
    return load(path), path


def _published(name: str, given: str | None) -> "tuple[Profile, str]":
    """The profile of published ceilings, and what it is called."""
    from assay.catalog import published_profile
    from assay.profile import Profile

    if given is not None:
        raise ValueError("--hardware: expected no --profile beside it, got both")
    return Profile.from_json(published_profile(name)), f"published:{name}"


def _default_precisions(model: "ModelSpec", cost: "CostModel") -> list[str]:
    """Those of our kernels, or of imported tables where they are all that was measured; of a file its own first."""
    from_file = all(m.stored_bytes is not None for m in model.matrices)
    imported = [] if cost.ops or cost.tables is None else list(cost.tables.precisions())
    return (["file"] if from_file else []) + (imported or ["bf16", "int8", "int4"])


def _row(p: "Prediction") -> dict[str, Any]:
    """A prediction as the flat record of docs/predict-output.md."""
    usd = p.usd_per_million or (None, None, None)
    usd_decode = p.usd_per_million_decode or (None, None, None)
    return {
        "precision": p.precision,
        "kv": p.kv,
        "batch": p.batch,
        "isl": p.isl,
        "osl": p.osl,
        "threads": p.threads,
        "tpot_s": p.decode.time_s,
        "tpot_low_s": p.decode.low_s,
        "tpot_high_s": p.decode.high_s,
        "tokens_per_s": p.tokens_per_s[0],
        "tokens_per_s_low": p.tokens_per_s[1],
        "tokens_per_s_high": p.tokens_per_s[2],
        "ttft_s": p.prefill.time_s,
        "ttft_low_s": p.prefill.low_s,
        "ttft_high_s": p.prefill.high_s,
        "served_tokens_per_s": p.served_tokens_per_s[0],
        "served_tokens_per_s_low": p.served_tokens_per_s[1],
        "served_tokens_per_s_high": p.served_tokens_per_s[2],
        "bound": p.decode.bound,
        "memory_share": p.decode.memory_s / p.decode.time_s,
        "compute_share": p.decode.compute_s / p.decode.time_s,
        "overhead_share": p.decode.overhead_s / p.decode.time_s,
        "basis": p.decode.basis,
        "measured_share": p.decode.measured_share,
        "extrapolated": list(p.decode.extrapolated),
        "ttft_extrapolated": list(p.prefill.extrapolated),
        "memory_bytes": p.memory.total_bytes,
        "weights_bytes": p.memory.weights_bytes,
        "kv_bytes": p.memory.kv_bytes,
        "workspace_bytes": p.memory.workspace_bytes,
        "fits": p.fits,
        "usd_per_million": usd[0],
        "usd_per_million_low": usd[1],
        "usd_per_million_high": usd[2],
        "usd_per_million_decode": usd_decode[0],
        "usd_per_million_decode_low": usd_decode[1],
        "usd_per_million_decode_high": usd_decode[2],
    }


def _columns(priced: bool = True) -> list[Any]:
    from assay.report import table
    from assay.report.table import Column

    def three(stem: str, suffix: str = "") -> tuple[str, str, str]:
        return f"{stem}{suffix}", f"{stem}_low{suffix}", f"{stem}_high{suffix}"

    def basis(name: str, extrapolated: list[str], ttft_extrapolated: list[str]) -> str:
        return name + ("*" if extrapolated or ttft_extrapolated else "")

    prices = (
        Column(three("usd_per_million"), "$/M tokens", table.usd),
        Column(three("usd_per_million_decode"), "$/M decode only", table.usd),
    )
    return [
        Column("precision", "precision"),
        Column("batch", "batch", align="right"),
        Column(three("tpot", "_s"), "time per token", table.seconds),
        Column(three("tokens_per_s"), "tokens/s", table.number),
        Column("bound", "bound by"),
        Column(three("ttft", "_s"), "first token", table.seconds),
        Column("memory_bytes", "memory", table.size, align="right"),
        Column("fits", "fits", table.yes_no),
        *(prices if priced else ()),
        Column(("basis", "extrapolated", "ttft_extrapolated"), "basis", basis),
    ]


def _best(predictions: "list[Prediction]") -> "Prediction | None":
    """The fastest row that fits, or may fit where the machine's memory is unknown."""
    fitting = [p for p in predictions if p.fits is not False]
    return max(fitting, key=lambda p: p.tokens_per_s[0], default=None)


def _verdict(predictions: "list[Prediction]", best: "Prediction | None", profile: "Profile") -> str:
    from assay.report import table

    if best is None:
        least = min(predictions, key=lambda p: p.memory.total_bytes)
        return (
            f"Nothing fits the machine's {table.size(profile.machine.memory_bytes or 0)}: the smallest row, "
            f"{least.precision} at batch {least.batch}, needs {table.size(least.memory.total_bytes)}. "
            "Rows say what it would be with enough memory."
        )
    published = "published" in profile.machine.extra
    basis = {
        "measured": "from measured kernels",
        "mixed": f"partly from measured kernels, partly from {'published ceilings' if published else 'measured roofs'}",
        "roof": "from published ceilings only"
        if published
        else "from measured roofs only, no kernel of this precision being calibrated",
    }[best.decode.basis]
    speed = table.number(*best.tokens_per_s)
    bound = best.decode.bound
    return f"Fastest that fits: {best.precision} at batch {best.batch}: {speed} tokens/s, bound by {bound}; {basis}."


def _notes(predictions: "list[Prediction]", profile: "Profile", cost: "CostModel", model: "ModelSpec") -> list[str]:
    from assay.profile import compatible

    notes = ["[low, high] are 90% intervals."]
    steps: list[StepEstimate] = [step for p in predictions for step in (p.decode, p.prefill)]
    notes += [_accuracy_note(op, row) for op, row in cost.accuracy.items() if _used(op, steps) and row["n"]]
    roofs = dict.fromkeys(call.op for step in steps for call in step.calls if call.basis == "roof")
    if roofs:
        ceilings = "published ceilings" if "published" in profile.machine.extra else "measured roofs"
        notes.append(
            f"No calibrated kernel for {', '.join(roofs)}: priced on the {ceilings}, the interval from the roof itself "
            "to twice the estimate."
        )
    outside = dict.fromkeys(note for step in steps for note in step.extrapolated)
    notes += [f"* extrapolated: {note}." for note in outside]
    gpu = profile.machine.extra.get("kind") == "gpu"
    notes += [
        f"{op}: {t.points} points that {t.source} measured on {t.system} ({t.variant}), imported."
        for op, t in (cost.tables.labels() if cost.tables is not None else {}).items()
        if _used(op, steps)
    ]
    if "published" in profile.machine.extra:
        start = "Nothing was measured here: ceilings" if profile.settings["mode"] == "published" else "Ceilings"
        notes.append(
            f"{start} as published ("
            + "; ".join(f"{r['roof']} {r['how']}, {r['source']}" for r in profile.machine.extra["published"])
            + "). `assay calibrate --device cuda:0` measures yours."
        )
    elif gpu:
        notes.append(
            "A GPU's kernels in a graph: what the host, attention's own kernels and norms take is not measured."
        )
    here = None if gpu else _fingerprint()
    warning = compatible(profile, here) if here is not None else None
    if warning:
        notes.append(warning[0].upper() + warning[1:] + ".")
    if not profile.complete:
        notes.append("The calibration was interrupted: its profile holds the points measured until then.")
    context = predictions[0].isl + predictions[0].osl
    if model.max_context is not None and context > model.max_context:
        notes.append(f"{context} tokens in and out are more than the model's context of {model.max_context}.")
    notes.append(
        "Prompts are prefilled one at a time; $/M tokens includes that. "
        "Norms, rotary embedding and activations are not priced."
    )
    return notes


def _used(op: str, steps: "list[StepEstimate]") -> bool:
    return any(call.op == op for step in steps for call in step.calls)


def _runs(
    model: "ModelSpec", predictions: "list[Prediction]", profile: "Profile", cost: "CostModel"
) -> list[dict[str, Any]]:
    """Whole runs of this model that the profile holds, each with what is predicted for it where a row is like it.

    A run is of the model when their weights are as many, to half a percent, and of a row when a weight has as many bits, to
    a tenth: the name that llama-bench gives says neither.
    """
    from assay.catalog import find_device
    from assay.cost.transformer import prefill_cost, step_cost, weight_bytes

    rows = {p.precision: p for p in predictions}
    found = []
    for run in profile.runs:
        here = run.device == profile.machine.cpu or (
            (row := find_device(run.device)) is not None and row == find_device(profile.machine.cpu)
        )
        if not here or run.params is None or abs(run.params / model.num_params - 1.0) > RUN_PARAMS:
            continue
        predicted = None
        near = min(rows, key=lambda name: abs(math.log(weight_bytes(model, name) / (run.size_bytes or 1.0))))
        like = abs(weight_bytes(model, near) / (run.size_bytes or 1.0) - 1.0) <= RUN_BITS
        if like and not (run.prompt and run.depth):  # a prompt behind others is not what a first token waits for
            threads, kv = rows[near].threads, rows[near].kv
            seconds = 0.0
            if run.prompt:
                seconds = prefill_cost(model, near, run.prompt, cost, threads, kv).time_s
            if run.generated:
                past = run.depth + run.prompt + run.generated // 2
                seconds += run.generated * step_cost(model, near, 1, past, cost, threads, kv).time_s
            predicted = (run.prompt + run.generated) / seconds
        found.append(run.to_json() | {"precision": near if like else None, "predicted_tokens_per_s": predicted})
    return found


def _run_note(run: dict[str, Any]) -> str:
    from assay.report import table

    what = " and ".join(
        f"{run[key]} {word}" for key, word in (("prompt", "tokens in"), ("generated", "tokens out")) if run[key]
    )
    text = f"A whole run of {run['model']} ({run['backend']}), {what}"
    text += f" after {run['depth']}" if run["depth"] else ""
    text += f": measured {table.number(run['tokens_per_s'])} tokens/s"
    if run["predicted_tokens_per_s"] is None:
        return f"{text}; no row here is like it."
    off = table.signed_percent(run["predicted_tokens_per_s"] / run["tokens_per_s"] - 1.0)
    return f"{text}, predicted {table.number(run['predicted_tokens_per_s'])} as {run['precision']} ({off})."


def _accuracy_note(op: str, row: dict[str, Any]) -> str:
    from assay.report import table

    coverage = "" if row["coverage"] is None else f", intervals held {table.percent(row['coverage'])}"
    return (
        f"Error of {op} on {row['n']} points outside the fit ({row.get('source', 'held-out')}): median "
        f"{table.percent(row['median_ape'])}, 90th percentile {table.percent(row['p90_ape'])}, "
        f"bias {table.signed_percent(row['bias'])}{coverage}."
    )


def _fingerprint() -> str | None:
    """This machine's fingerprint; None where the compiled module, which knows the ISA tiers, does not load."""
    try:
        from assay import machine
        from assay.ops import info

        isa = tuple(tier["isa"] for tier in info.isa_tiers() if tier["supported"])
        return machine.describe(isa).fingerprint()
    except (ImportError, OSError):
        return None


def _calls(p: "Prediction") -> list[dict[str, Any]]:
    return [
        {
            "phase": phase,
            "name": c.name,
            "op": c.op,
            "count": c.count,
            "shape": c.shape,
            "time_s": c.time_s,
            "low_s": c.low_s,
            "high_s": c.high_s,
            "share": c.time_s / step.time_s,
            "bound": c.bound,
            "basis": c.basis,
            "notes": list(c.notes),
        }
        for phase, step in (("decode", p.decode), ("prefill", p.prefill))
        for c in step.calls
    ]


def _inputs(p: "Prediction") -> list[dict[str, Any]]:
    """The three uncertain inputs that move the decode step most."""
    from assay.cost.explain import step_influences

    return [{"input": f"error of {i.cause}", "tpot_at_low_s": i.at_low, "tpot_at_high_s": i.at_high}
            for i in step_influences(p.decode)[:3]]  # fmt: skip


def _explained(p: "Prediction", fmt: str) -> str:
    from assay.report import table
    from assay.report.table import Column

    columns = [
        Column("name", "call"),
        Column("shape", "shape"),
        Column("count", "times", table.number, align="right"),
        Column(("time_s", "low_s", "high_s"), "time", table.seconds),
        Column("share", "share", table.percent, align="right"),
        Column("bound", "bound by"),
        Column("basis", "basis"),
    ]
    parts = []
    for phase, step in (("decode", p.decode), ("prefill", p.prefill)):
        rows = [row for row in _calls(p) if row["phase"] == phase]
        title = f"{p.precision}, batch {p.batch}, {phase}: {table.seconds(step.time_s, step.low_s, step.high_s)}"
        parts.append(f"{title}\n\n{table.render(rows, columns, fmt)}")
    moved = [
        f"{i['input']} ({table.seconds(i['tpot_at_low_s'])} to {table.seconds(i['tpot_at_high_s'])})"
        for i in _inputs(p)
    ]
    parts.append(f"What moves the time per token most: {'; '.join(moved)}.")
    return "\n\n".join(parts)


def _next(args: argparse.Namespace, best: "Prediction | None", profile: "Profile") -> str:
    """The command that a reader of this table most likely wants now."""
    command = ["assay", "predict", args.model]
    if args.profile:
        command += ["--profile", args.profile]
    if args.hardware:
        command += ["--hardware", args.hardware]
    if not args.explain:
        if best is not None:
            command += ["--precision", best.precision, "--batch", str(best.batch)]
        if args.isl != 512 or args.osl != 128:
            command += ["--isl", str(args.isl), "--osl", str(args.osl)]
        return shlex.join([*command, "--explain"])
    if profile.settings["mode"] == "quick":
        device = profile.machine.extra.get("device")
        return shlex.join(["assay", "calibrate", "--full", *(["--device", device] if device else [])])
    return shlex.join([*command, "--usd-per-hour", "1.0"])
