"""Distinct experts a step touches, measured on routings, beside the closed forms of the cost model.

    python benchmarks/distinct_experts.py [LAYER ...] [--batch 1,2,4,...] [--width 1,2,4,8] [--time] [-o table|md|csv|json]

For B requests of w consecutive tokens each: what `moe_route` chose on drawn logits (mean of several draws) and what
assay.cost.experts says: `uniform` for even independent tokens, `skewed` for popularities (measured here, on tokens of their own),
`batch_of_verifies` for tokens alike within a request, with the exponent fitted to one request of these draws. --time runs the
layer too, and says which share of the read bandwidth its touched experts went at.
"""

import argparse
import statistics
import time

import numpy as np

import assay
from assay.cost import experts as closed
from assay.ops import probe
from assay.report.table import Column, percent, render, seconds, signed_percent
from moe_cases import LAYERS, ROUTINGS, random_experts, router_logits

COLUMNS = [
    Column("layer", "layer"),
    Column("routing", "routing"),
    Column("batch", "batch"),
    Column("width", "width"),
    Column("measured", "distinct", lambda v: f"{v:.1f}"),
    Column("form", "closed form"),
    Column("predicted", "says", lambda v: f"{v:.1f}"),
    Column("error", "error", signed_percent),
]
TIMED = [Column("time_s", "time", seconds), Column("of_read", "of read roof", percent)]


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def mean_distinct(logits: list[np.ndarray], top_k: int) -> float:
    return statistics.fmean(
        assay.moe_load(assay.moe_route(x, top_k).topk_ids, x.shape[1]).distinct_experts for x in logits
    )


def popularity_of(experts: int, top_k: int, seed: int) -> np.ndarray:
    """P(token uses e) under the power law, over many tokens."""
    logits = router_logits(experts, top_k, 20000, 1, "power-law", np.random.default_rng(seed))
    counts = assay.moe_load(assay.moe_route(logits, top_k).topk_ids, experts).counts
    return counts * (top_k / counts.sum())


def fitted_exponent(experts: int, top_k: int, widths: list[int], draws: int, rng: np.random.Generator) -> float:
    """The beta of u_w = U(w^beta) for one request of correlated tokens, least squares over the widths."""
    grid = np.linspace(0.3, 1, 141)
    error = np.zeros_like(grid)
    for width in (w for w in widths if w > 1):
        logits = [router_logits(experts, top_k, 1, width, "correlated", rng) for _ in range(4 * draws)]
        got = mean_distinct(logits, top_k)
        error += [(float(closed.within_request(experts, top_k, width, beta)) / got - 1) ** 2 for beta in grid]
    return float(grid[error.argmin()])


def timed(layer: str, packed: assay.PackedExperts, logits: list[np.ndarray]) -> dict[str, float]:
    """Median time of the layer over the draws, and its bytes against the read roof."""
    top_k, times, sizes = LAYERS[layer][1], [], []
    x = np.random.default_rng(0).standard_normal((len(logits[0]), packed.shape.hidden)).astype(np.float32)
    for draw in [logits[0], *logits]:
        route = assay.moe_route(draw, top_k)
        start = time.perf_counter()
        _, cost = assay.moe_experts(x, route.topk_ids, route.topk_weights, packed, return_cost=True)
        times.append(time.perf_counter() - start)
        sizes.append(cost.weight_bytes)
    rate = statistics.median(size / t for size, t in zip(sizes[1:], times[1:], strict=True))
    return {"time_s": statistics.median(times[1:]), "of_read": rate / probe.read_bandwidth(packed.gate_up.reshape(-1))}


def rows_of(layer: str, args: argparse.Namespace) -> list[dict[str, object]]:
    experts, top_k, _, _ = LAYERS[layer]
    rng = np.random.default_rng(args.seed)
    packed = random_experts(layer, rng) if args.time else None
    beta = fitted_exponent(experts, top_k, [2, 4, 8], args.draws, rng)
    # The order of popularities is drawn with each set of logits: a closed form takes them in any order.
    popularity = np.sort(popularity_of(experts, top_k, args.seed))
    rows = []
    for routing in ROUTINGS:
        for batch in args.batch:
            for width in args.width:
                logits = [router_logits(experts, top_k, batch, width, routing, rng) for _ in range(args.draws)]
                measured = mean_distinct(logits, top_k)
                form, says = {
                    "uniform": ("uniform(B w)", lambda t=batch * width: closed.uniform(experts, top_k, t)),
                    "power-law": ("skewed(p, B w)", lambda t=batch * width: closed.skewed(popularity, t)),
                    "correlated": (
                        f"batch_of_verifies, w^{beta:.2f}",
                        lambda b=batch, w=width: closed.batch_of_verifies(experts, top_k, b, w, exponent=beta),
                    ),
                }[routing]
                predicted = float(says())
                row: dict[str, object] = {
                    "layer": layer, "routing": routing, "batch": batch, "width": width, "measured": measured,
                    "form": form, "predicted": predicted, "error": predicted / measured - 1,
                }  # fmt: skip
                if packed is not None:
                    row.update(timed(layer, packed, logits))
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layer", nargs="*", default=["qwen3-30b-a3b"], help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--batch", type=numbers, default=[1, 4, 16])
    parser.add_argument("--width", type=numbers, default=[1, 2, 4, 8])
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--time", action="store_true", help="run the layer too")
    parser.add_argument("-o", "--output", default="table", choices=["table", "md", "csv", "json"])
    args = parser.parse_args()
    unknown = set(args.layer) - set(LAYERS)
    if unknown:
        parser.error(f"layer: expected one of {', '.join(LAYERS)}, got {', '.join(sorted(unknown))}")
    rows = [row for layer in args.layer for row in rows_of(layer, args)]
    print(render(rows, COLUMNS + (TIMED if args.time else []), args.output))


if __name__ == "__main__":
    main()
