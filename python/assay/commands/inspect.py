"""``assay inspect``: what a model file holds and runs as, and with ``--error`` what INT4 would cost a GGUF's matrices."""

import argparse
import shlex
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.formats.checkpoint import Checkpoint
    from assay.formats.gguf import GGUFFile, GGUFTensor
    from assay.model import ModelSpec

SCHEMA_VERSION = 1
GROUP_SIZE = 32
TOKENS = 8
SEED = 0
DEFAULT_ROWS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("file", metavar="FILE", help="a GGUF or .safetensors file, an index of shards, or a folder")
    parser.add_argument(
        "--error",
        action="store_true",
        help=f"repack each matrix to symmetric INT4, group {GROUP_SIZE}, and report the error of weights and products",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=DEFAULT_ROWS,
        metavar="N",
        help=f"with --error: rows taken of each matrix, evenly spaced (default {DEFAULT_ROWS})",
    )
    parser.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table", help="format")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    from assay.formats.checkpoint import open_checkpoint
    from assay.formats.gguf import GGUFFile

    if args.rows < 1:
        raise ValueError(f"--rows: expected 1 or more, got {args.rows}")
    with open_checkpoint(args.file) as checkpoint:
        report = collect(checkpoint)
        if args.error:
            if not isinstance(checkpoint.file, GGUFFile):
                raise ValueError(f"--error: expected a GGUF file, got {checkpoint.kind}")
            report["error"] = error_report(checkpoint.file, args.rows, show_progress=None)
    print(_text(report, args.output), end="" if args.output == "csv" else "\n")
    return 0


# ---- what the file holds -------------------------------------------------------------------------------------------


def collect(checkpoint: "Checkpoint") -> dict[str, Any]:
    """The file, its model (or why it describes none), and its tensors by type, most bytes first."""
    from assay.errors import FormatError
    from assay.formats.checkpoint import PLAIN, RUN_BITS
    from assay.formats.gguf import GGUFFile, model_spec
    from assay.formats.hf import spec_from_config

    file = checkpoint.file
    tensors = checkpoint.tensors.values()
    report: dict[str, Any] = {
        "schema": "assay-inspect",
        "schema_version": SCHEMA_VERSION,
        "file": str(checkpoint.path),
        "kind": checkpoint.kind,
        "size_bytes": file.size_bytes if isinstance(file, GGUFFile) else sum(t.nbytes for t in tensors),
        "gguf_version": file.version if isinstance(file, GGUFFile) else None,
        "model": None,
        "model_problem": None,
        "types": [],
    }
    try:
        if isinstance(file, GGUFFile):
            report["model"] = _model(model_spec(file))
        elif checkpoint.config.get("model_type"):
            report["model"] = _model(spec_from_config(checkpoint.config, checkpoint.path.name, str(checkpoint.path)))
        else:
            report["model_problem"] = f"{checkpoint.path}: expected a config.json with model_type beside it"
    except FormatError as exc:  # a tokenizer, an adapter or a vision tower can be inspected all the same
        report["model_problem"] = str(exc)
    by_type: dict[tuple[str, str | None], dict[str, Any]] = {}
    for t in tensors:
        form = t.form or (t.stored if t.stored in PLAIN else None)
        row = by_type.setdefault(
            (t.stored, form), {"type": t.stored, "runs_as": form, "tensors": 0, "params": 0, "bytes": 0}
        )
        row["tensors"] += 1
        row["params"] += t.num_params
        row["bytes"] += t.nbytes
    whole = sum(row["bytes"] for row in by_type.values())
    for row in by_type.values():
        row["bits_per_weight"] = 8 * row["bytes"] / max(row["params"], 1)
        row["run_bits_per_weight"] = RUN_BITS.get(row["type"])
        row["share"] = row["bytes"] / max(whole, 1)
    report["types"] = sorted(by_type.values(), key=lambda row: -row["bytes"])
    return report


def _model(spec: "ModelSpec") -> dict[str, Any]:
    experts = spec.experts
    return {
        "name": spec.name,
        "num_params": spec.num_params,
        "active_params_per_token": spec.active_params_per_token,
        "num_layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "num_experts": experts.num_experts if experts else 0,
        "experts_per_token": experts.experts_per_token if experts else 0,
        "tied_embedding": spec.tied_embedding,
        "max_context": spec.max_context,
        "kv_elements_per_token": spec.kv_elements_per_token,
        "weight_bytes": spec.stored_weight_bytes,
        "matrices": [
            {"name": m.name, "role": m.role, "n": m.n, "k": m.k, "count": spec.copies(m),
             "stored": dict(m.stored or {}), "bytes": m.stored_bytes}
            for m in spec.matrices
        ],
    }  # fmt: skip


# ---- what INT4 would cost ------------------------------------------------------------------------------------------


def error_report(
    file: "GGUFFile", max_rows: int = DEFAULT_ROWS, show_progress: bool | None = False, seed: int = SEED
) -> dict[str, Any]:
    """Error of our INT4 (symmetric, group 32) against the file's own values, by role of matrix.

    Every matrix is dequantised, requantised and multiplied; the squares of all matrices of a role are summed. At most
    `max_rows` evenly spaced rows of each are taken, which bounds memory and time. The reference is a float64 product of
    the file's dequantised weights with seeded standard Gaussian activations [8, K]; real activations have outliers that
    these lack. All errors are relative root mean squares.

    Parameters
    ----------
    show_progress
        None: a bar when stderr is a terminal.

    Returns
    -------
    dict
        "settings", "roles" (one row each: name, matrices, k, stored, rows, params, weight_error, w4a8_error,
        w4a16_error) and "skipped" (tensor, reason).
    """
    from assay.report.progress import Progress

    work: list[tuple[str, GGUFTensor]] = []
    skipped: list[dict[str, str]] = []
    for t in file.tensors.values():
        reason = _unfit(t)
        if reason:
            skipped.append({"tensor": t.name, "reason": reason})
        elif reason is None:
            work.append((_role_name(file, t), t))
    sums: dict[tuple[str, int], dict[str, Any]] = {}
    sizes = [min(t.num_rows, max_rows) * t.shape[-1] for _, t in work]
    with Progress(float(sum(sizes)), "inspect --error", show_progress) as bar:
        for index, ((name, t), elements) in enumerate(zip(work, sizes, strict=True)):
            try:
                part = _tensor_error(file, t, max_rows, (seed, index))
            except ValueError as exc:
                skipped.append({"tensor": t.name, "reason": str(exc)})
            else:
                _add(sums.setdefault((name, t.shape[-1]), {}), t, part)
            bar.advance(float(elements), t.name)
    return {
        "settings": {"group_size": GROUP_SIZE, "symmetric": True, "tokens": TOKENS, "seed": seed, "max_rows": max_rows},
        "roles": [_role_row(name, k, total) for (name, k), total in sums.items()],
        "skipped": skipped,
    }


def _unfit(t: "GGUFTensor") -> str | None:
    """Why the tensor cannot be repacked; "" when it is no matrix of weights, None when it can."""
    from assay.formats.dequant import SUPPORTED

    if len(t.shape) < 2 or not t.name.endswith(".weight"):
        return ""
    if t.type_name not in SUPPORTED:
        return f"no dequantiser for {t.type_name}"
    if t.shape[-1] % GROUP_SIZE:
        return f"K = {t.shape[-1]} is no multiple of {GROUP_SIZE}"
    return None


def _role_name(file: "GGUFFile", t: "GGUFTensor") -> str:
    from assay.formats.gguf import tensor_role

    name = tensor_role(t.name).name
    tied = name == "token_embd" and "output.weight" not in file.tensors
    return "token_embd (lm_head)" if tied else name


def _tensor_error(file: "GGUFFile", t: "GGUFTensor", max_rows: int, seed: tuple[int, int]) -> dict[str, float]:
    """Sums of squares of one tensor: values and errors, of weights and products."""
    import numpy as np

    import assay

    stride = -(-t.num_rows // max_rows)
    weights = file.dequantize(t.name, slice(0, None, stride))
    packed = assay.pack(*assay.quantize_int4(weights, group_size=GROUP_SIZE, symmetric=True))
    a = np.random.default_rng(seed).standard_normal((TOKENS, t.shape[-1])).astype(np.float32)
    exact = a.astype(np.float64) @ weights.astype(np.float64).T

    def squares(x: np.ndarray) -> float:
        return float(np.square(x, dtype=np.float64).sum())

    return {
        "rows": float(len(weights)),
        "weight": squares(weights),
        "weight_off": squares(packed.dequantize() - weights),
        "out": squares(exact),
        "w4a8_off": squares(assay.w4a8_gemm(a, packed) - exact),
        "w4a16_off": squares(assay.w4a16_gemm(a, packed) - exact),
    }


def _add(total: dict[str, Any], t: "GGUFTensor", part: dict[str, float]) -> None:
    matrices = t.num_rows // t.shape[-2]
    total["matrices"] = total.get("matrices", 0) + matrices
    total["params"] = total.get("params", 0) + t.num_params
    total["all_rows"] = total.get("all_rows", 0) + t.num_rows
    stored = total.setdefault("stored", {})
    stored[t.type_name] = stored.get(t.type_name, 0) + matrices
    for key, value in part.items():
        total[key] = total.get(key, 0.0) + value


def _role_row(name: str, k: int, total: dict[str, Any]) -> dict[str, Any]:
    def relative(off: float, whole: float) -> float:
        return float((off / whole) ** 0.5) if whole > 0 else 0.0

    return {
        "name": name,
        "matrices": total["matrices"],
        "k": k,
        "stored": total["stored"],
        "params": total["params"],
        "rows": int(total["rows"]),
        "rows_share": total["rows"] / total["all_rows"],
        "weight_error": relative(total["weight_off"], total["weight"]),
        "w4a8_error": relative(total["w4a8_off"], total["out"]),
        "w4a16_error": relative(total["w4a16_off"], total["out"]),
    }


# ---- shown ---------------------------------------------------------------------------------------------------------


def _text(report: dict[str, Any], fmt: str) -> str:
    """The report; CSV holds one table, of the roles when errors were asked for, else of the types."""
    from assay.report import table

    if fmt == "json":
        return table.to_json(report)
    column = table.Column

    def count(value: int) -> str:
        return f"{value:,}"

    types = [
        column("type", "type"),
        column("tensors", "tensors", align="right"),
        column("params", "parameters", count, "right"),
        column("bytes", "bytes", count, "right"),
        column("bits_per_weight", "bits/weight", "{:.2f}".format, "right"),
        column("runs_as", "runs as"),
        column("run_bits_per_weight", "bits as run", "{:.2f}".format, "right"),
        column("share", "of bytes", table.percent, "right"),
    ]
    roles = [
        column("name", "matrix"),
        column("stored", "stored as", lambda s: ", ".join(f"{n} {t}" for t, n in s.items())),
        column("k", "K", align="right"),
        column(("rows", "rows_share"), "rows taken", lambda n, s: f"{n:,} ({100 * s:.0f}%)", "right"),
        column("weight_error", "weight error", table.percent, "right"),
        column("w4a8_error", "w4a8 error", table.percent, "right"),
        column("w4a16_error", "w4a16 error", table.percent, "right"),
    ]
    error = report.get("error")
    if fmt == "csv":
        if error is None:
            return table.render(report["types"], types, fmt)
        return table.render([{**r, "stored": [f"{n} {t}" for t, n in r["stored"].items()]} for r in error["roles"]],
                            roles, fmt)  # fmt: skip
    parts = [_headline(report), table.render(report["types"], types, fmt)]
    if error is not None:
        s = error["settings"]
        parts += [
            f"Repacked to INT4 (group {s['group_size']}, symmetric): relative RMS error against the file's own weights."
            f"\nAt most {s['max_rows']:,} evenly spaced rows of each matrix; products of {s['tokens']} Gaussian rows"
            f" (seed {s['seed']}) against float64.",
            table.render(error["roles"], roles, fmt),
        ]
        if error["skipped"]:
            parts.append(
                "\n".join(
                    f"left out: {table.printable(x['tensor'])}: {table.printable(x['reason'])}"
                    for x in error["skipped"]
                )
            )
    path, model = report["file"], report["kind"] == "GGUF" and report["model"] is not None
    after = ["assay", "predict", path] if model else ["assay", "convert", path, "-o", "packed.safetensors"]
    if report["kind"] != "assay":
        parts.append(f"Next: {table.printable(shlex.join(after))}")
    return "\n\n".join(parts)


def _headline(report: dict[str, Any]) -> str:
    """What the file is, and the model in it."""
    from assay.report.table import printable, size

    kind = f"GGUF v{report['gguf_version']}" if report["gguf_version"] else report["kind"]
    lines = [f"{printable(report['file'])}: {kind}, {size(report['size_bytes'])}"]
    m = report["model"]
    if m is None:
        return "\n".join([*lines, f"no model: {printable(report['model_problem'])}"])
    experts = f", {m['num_experts']} experts of which {m['experts_per_token']} a token" if m["num_experts"] else ""
    active = f" ({m['active_params_per_token']:,} active)" if m["num_experts"] else ""
    lines.append(
        f"{m['name']}: {m['num_params']:,} parameters{active}, {m['num_layers']} layers, width {m['hidden_size']},"
        f" vocabulary {m['vocab_size']:,}{' (tied)' if m['tied_embedding'] else ''}{experts},"
        f" {m['kv_elements_per_token']:,} KV elements a token"
    )
    return "\n".join(lines)
