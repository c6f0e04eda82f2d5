"""Predictions as the records of docs/predict-output.md, as a table, and as the kernel calls behind them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.cost.transformer import Prediction


def row(p: "Prediction") -> dict[str, Any]:
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


def columns(priced: bool = True) -> list[Any]:
    """Of the table; dollars only where the machine has a price."""
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


def calls(p: "Prediction") -> list[dict[str, Any]]:
    """The kernel calls of the decode step and of the prefill."""
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


def inputs(p: "Prediction") -> list[dict[str, Any]]:
    """The three uncertain inputs that move the decode step most."""
    from assay.cost.explain import step_influences

    return [{"input": f"error of {i.cause}", "tpot_at_low_s": i.at_low, "tpot_at_high_s": i.at_high}
            for i in step_influences(p.decode)[:3]]  # fmt: skip


def explained(p: "Prediction", fmt: str) -> str:
    """The calls of both steps as tables, and what moves the time per token most."""
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
        rows = [row for row in calls(p) if row["phase"] == phase]
        title = f"{p.precision}, batch {p.batch}, {phase}: {table.seconds(step.time_s, step.low_s, step.high_s)}"
        parts.append(f"{title}\n\n{table.render(rows, columns, fmt)}")
    moved = [
        f"{i['input']} ({table.seconds(i['tpot_at_low_s'])} to {table.seconds(i['tpot_at_high_s'])})" for i in inputs(p)
    ]
    parts.append(f"What moves the time per token most: {'; '.join(moved)}.")
    return "\n\n".join(parts)
