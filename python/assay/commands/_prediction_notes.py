"""What is said of predictions: the verdict, where their numbers come from, and whole runs that were measured."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from assay.cost.calls import StepEstimate
    from assay.cost.kernel_model import CostModel
    from assay.cost.transformer import Prediction
    from assay.model import ModelSpec
    from assay.profile import Profile

RUN_PARAMS = 0.005  # a whole run's weights may differ from the model's by this
RUN_BITS = 0.1  # and its bytes from a row's by this


def best_of(predictions: "list[Prediction]") -> "Prediction | None":
    """The fastest row that fits, or may fit where the machine's memory is unknown."""
    fitting = [p for p in predictions if p.fits is not False]
    return max(fitting, key=lambda p: p.tokens_per_s[0], default=None)


def verdict(predictions: "list[Prediction]", best: "Prediction | None", profile: "Profile") -> str:
    """The best row in a sentence, or what keeps all rows from fitting."""
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


def notes_on(predictions: "list[Prediction]", profile: "Profile", cost: "CostModel", model: "ModelSpec") -> list[str]:
    """What a reader must know of the rows: their error, what was not measured, what is not priced."""
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


def whole_runs(
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


def run_note(run: dict[str, Any]) -> str:
    """A whole run in a sentence."""
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


def _used(op: str, steps: "list[StepEstimate]") -> bool:
    return any(call.op == op for step in steps for call in step.calls)


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
