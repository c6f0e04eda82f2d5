"""``assay predict``: what a model costs on a calibrated machine. Its JSON is described in docs/predict-output.md."""

import argparse
import math
import shlex
import sys
from typing import TYPE_CHECKING, Any

from . import _case, _prediction, _prediction_notes

if TYPE_CHECKING:
    from assay.cost.kernel_model import CostModel
    from assay.cost.transformer import Prediction
    from assay.model import ModelSpec
    from assay.profile import Profile

SCHEMA_VERSION = 1
MAX_BATCH = 65536
MAX_TOKENS = 1 << 24
MAX_USD_PER_HOUR = 1e6
FORMATS = ("table", "md", "csv", "json")


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
    rows = [_prediction.row(p) for p in predictions]
    best = _prediction_notes.best_of(predictions)
    notes = _prediction_notes.notes_on(predictions, profile, cost, model)
    runs = _prediction_notes.whole_runs(model, predictions, profile, cost)
    notes[1:1] = [_prediction_notes.run_note(run) for run in runs]
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
            "verdict": _prediction_notes.verdict(predictions, best, profile),
            "notes": notes,
            "runs": runs,
            "rows": [
                row | ({"calls": _prediction.calls(p), "inputs": _prediction.inputs(p)} if args.explain else {})
                for row, p in zip(rows, predictions, strict=True)
            ],
        }
        print(to_json(answer))
    elif args.output == "csv":
        sys.stdout.write(render(rows, _prediction.columns(), "csv"))
    else:
        with_threads = "" if profile.machine.extra.get("kind") == "gpu" else f" {threads} threads,"
        heading = f"{model.name} on {profile.machine.cpu},{with_threads} {args.isl} tokens in, {args.osl} out"
        heading += "" if args.kv == "bf16" else f", cache in {args.kv}"
        print(heading, _prediction_notes.verdict(predictions, best, profile), "", sep="\n")
        print(render(rows, _prediction.columns(priced=args.usd_per_hour is not None), args.output), end="\n\n")
        if args.explain:
            for prediction in predictions:
                print(_prediction.explained(prediction, args.output), end="\n\n")
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
