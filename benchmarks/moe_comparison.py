"""What `compare.py moe` compares: layers, tokens, routings; who with; and the least that a cell must do."""

import argparse
import math
from itertools import product

from assay.report.table import Column
from comparison import Classes, Target
from moe_cases import LAYERS
from peers import experts
from peers.contender import Cell

TOKENS = [1, 2, 4, 8, 16, 32, 64, 256, 1024]
MOE_OURS = "peers.experts:Assay"
MOE: dict[str, Target] = {
    **{
        f"{'ik_llama' if form == 'ik' else 'ggml'} {kind} {form}": ("peers.ggml:GgmlExperts", (kind, form))
        for kind, form in product(("Q4_0", "Q4_K"), ("repack", "plain", "ik"))
    },
    "onnxruntime QMoE": ("peers.onnx:QMoE", ()),
    "kt-kernel RAWINT4": ("peers.kt:Kt", ()),
    "torch int4pack loop": ("peers.experts:Torch", ()),
}


def moe_cells(args: argparse.Namespace) -> list[Cell]:
    """Cells, layer by layer."""
    layers = args.layers or (["olmoe"] if args.quick else list(LAYERS))
    tokens = args.tokens or ([1, 16, 256] if args.quick else TOKENS)
    routing = args.routing or (["uniform"] if args.quick else experts.TRAFFIC)
    cells = []
    for layer, threads, way, count in product(layers, args.threads, routing, tokens):
        e, k, hidden, inner = LAYERS[layer]
        cells.append(Cell.of("moe", threads, layer=layer, num_experts=e, top_k=k, hidden=hidden, intermediate=inner,
                             tokens=count, routing=way))  # fmt: skip
    return cells


def moe_work(cell: Cell) -> dict[str, float]:
    """The distinct experts' weights read once; every slot's products."""
    each = experts.layer_bytes(cell) / cell.num_experts
    ops = 2.0 * cell.tokens * cell.top_k * 3 * cell.hidden * cell.intermediate
    return {"dram_read": experts.distinct_experts(cell) * each, "int8_peak": ops}


MOE_COLUMNS = [
    Column("layer", "layer"),
    Column("threads", "threads", align="right"),
    Column("routing", "routing"),
    Column("tokens", "tokens", align="right"),
]
MOE_CLASSES: Classes = {
    f"tokens {low}..{high}" if high < math.inf else f"tokens >= {low}": (
        lambda r, low=low, high=high: low <= r["tokens"] <= high
    )
    for low, high in ((1, 16), (32, 64), (256, math.inf))
} | {layer: (lambda r, layer=layer: r["layer"] == layer) for layer in LAYERS}
