"""Claims about the cost of inference, recomputed: a case of arithmetic or of the cost model for each, then a verdict.

A claim may say several things (``also``): each is recomputed and judged, and the row is "inconsistent" when one of them
is, "consistent" when all are, else "depends".
"""

from collections.abc import Callable, Mapping
from typing import Any

from assay.cost import claim_cases as arithmetic
from assay.cost import claim_prices as priced
from assay.cost.verdicts import VERDICTS, Recomputed, Value, World, exact, verdict

__all__ = ["CASES", "VERDICTS", "Recomputed", "Value", "World", "exact", "recompute", "verdict"]

CASES: Mapping[str, Callable[[Mapping[str, Any], World], Recomputed]] = {
    name: getattr(room, name)
    for room, names in (
        (
            arithmetic,
            ("none", "ratio", "product_range", "agent_calls", "agent_month", "total", "growth", "image_tokens",
             "video_tokens", "flops", "sustained", "active", "power", "attention_growth", "attention_io",
             "list_price", "list_ratio", "own_table"),
        ),
        (
            priced,
            ("technique", "flops_cut", "mixture_limit", "silicon", "distillation", "adaptive_tokens", "query", "sharing", "video_work",
             "video_ratio", "video_cut"),
        ),
    )
    for name in names
}  # fmt: skip


def recompute(claim: Mapping[str, Any], world: World) -> dict[str, Any]:
    """The ledger's row of one claim: id, claim, recomputed, arithmetic, verdict, depends_on, and the values.

    Raises
    ------
    ValueError
        A case that does not exist.
    """
    parts = [_judged(claim["id"], part, world) for part in (claim, *claim.get("also", ()))]
    found = parts[0][0]
    verdicts = {kind for _, kind, _ in parts if kind != "not testable"}
    whole = next(iter(verdicts)) if len(verdicts) == 1 else "inconsistent" if "inconsistent" in verdicts else "depends"
    if not verdicts:
        whole = "not testable"
    texts = [found.arithmetic]
    for part, (more, kind, _) in zip(claim.get("also", ()), parts[1:], strict=True):
        numbers = ", ".join(f"{v.middle:.4g}" + (f" ({v.setting})" if v.setting else "") for v in more.values)
        texts.append(f"{part['says']}: {numbers} {more.unit}, {more.arithmetic}: {kind}")
    numbers = claim["numbers"]
    reasons = [reason for _, kind, reason in parts if kind == "depends" and reason]
    return {
        "id": claim["id"],
        "claim": claim["claim"],
        "values": [{"value": v.middle, "low": v.low, "high": v.high, "setting": v.setting} for v in found.values],
        "unit": found.unit,
        "claimed": list(numbers.get("claimed", (None, None))),
        "arithmetic": "; ".join(texts) + (f" ({numbers['source']})" if "source" in numbers else ""),
        "verdict": whole,
        "depends_on": ("; ".join(reasons) or "the interval of the estimate") if whole == "depends" else "",
    }


def _judged(name: str, part: Mapping[str, Any], world: World) -> tuple[Recomputed, str, str]:
    case = CASES.get(part["case"])
    if case is None:
        raise ValueError(f"{name}: case: expected one of {', '.join(CASES)}, got {part['case']!r}")
    found = case(part["numbers"], world)
    return found, verdict(found.values, part["numbers"].get("claimed", (None, None)), span=found.span), found.depends_on
