"""Which points are measured on a GPU: shapes as on the CPU, wider products, and weights that stay in L2."""

from ..profile import GEMM_OPS
from .points import Point, experts_point, gemm_point, route_point, verify_point

#: Products that a GPU has kernels for, and the most rows of each.
ROWS = {"w4a16_gemm": 512, "w4a8_gemm": 512, "w4a16_gemv": 8}
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
FITTED = ("llama-8b-attn", "olmoe-attn", "llama-8b-down", "gemma-270m-ffn")
HELD_OUT = {
    "llama-8b-kv": (1, 4, 16, 48),
    "phi3-qkv": (1, 3, 8, 24, 96),
    "llama-8b-up": (1, 6, 64),
    "qwen3-expert-up": (1, 12),
}
#: Weights that a GPU of 32 MB of L2 keeps there.
CACHED, CACHED_HELD_OUT = ("olmoe-attn", "gemma-270m-ffn", "gemma-270m-kv"), ("llama-8b-kv", "qwen3-expert-up")
T = 1  # threads: the host's one, which launches


def gpu_grid(mode: str, l2_bytes: int) -> list[Point]:
    """The points of a calibration of a GPU.

    Parameters
    ----------
    mode : {"quick", "full"}
    l2_bytes
        Weights of no more than half of it are also measured where they stay in L2.
    """
    if mode not in ("quick", "full"):
        raise ValueError(f"mode: expected quick or full, got {mode!r}")
    full = mode == "full"
    points: list[Point] = []
    kinds = ((32, True), (128, True), (128, False)) if full else ((32, True), (128, True))
    for op, most in ROWS.items():
        for group, symmetric in kinds if full or op != "w4a16_gemv" else kinds[:1]:
            points += [
                gemm_point(op, shape, m, T, False, group, symmetric) for shape in FITTED for m in WIDTHS if m <= most
            ]
            points += [
                gemm_point(op, shape, m, T, True, group, symmetric)
                for shape, widths in HELD_OUT.items() for m in widths if m <= most
            ]  # fmt: skip
        # As many weights as a head has.
        points += [gemm_point(op, "gemma-270m-head", m, T, False) for m in (1, 4, 16, 64) if m <= most]
        cached = [(shape, m, False) for shape in CACHED for m in (1, 4, 16, 64)]
        cached += [(shape, m, True) for shape in CACHED_HELD_OUT for m in (1, 8, 32)]
        for shape, m, held_out in cached:
            point = gemm_point(op, shape, m, T, held_out)
            if m <= most and point.bytes <= l2_bytes / 2:
                points.append(Point(op, T, {**point.params, "resident": "llc"}, held_out))
    tokens = (1, 8, 64, 256, 1024, 4096) if full else (1, 16, 256, 2048)
    points += [route_point(n, e, k, T, False) for n in tokens for e, k in ((8, 2), (64, 8), (128, 8))]
    points += [route_point(n, e, k, T, True) for n in (1, 32, 512) for e, k in ((32, 4), (256, 8))]
    batches = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if full else (1, 4, 16, 64, 256)
    points += [experts_point("olmoe", n, T, False) for n in batches]
    points += [experts_point("mixtral", n, T, False) for n in batches[:4]]
    points += [experts_point("qwen3-30b-a3b", n, T, True) for n in (1, 3, 8, 24, 96, 256)]
    points += [experts_point("gpt-oss-20b", n, T, True) for n in (1, 4, 16, 64)]
    for rule in ("greedy", "rejection"):
        sizes = ((1, 0), (1, 4), (4, 3), (16, 1), (16, 3))
        points += [verify_point(b, d, v, rule, T, False) for v in (32000, 128256) for b, d in sizes]
        points += [verify_point(64, 0, 32000, rule, T, False), verify_point(1, 0, 262144, rule, T, False)]
        points += [verify_point(b, d, v, rule, T, True) for b, d, v in
                   ((1, 2, 152064), (2, 5, 50304), (1, 8, 32000), (16, 0, 100352), (24, 3, 64000))]  # fmt: skip
    unique: dict[tuple[object, ...], Point] = {}
    for point in points:
        unique.setdefault(point.key, point)
    return list(unique.values())


def gpu_candidates() -> list[Point]:
    """What a full calibration may measure besides, where its model is least sure; never a shape that is held out."""
    found = [
        gemm_point(op, shape, m, T, False)
        for op in GEMM_OPS if op in ROWS for shape in FITTED
        for m in (3, 5, 6, 7, 10, 12, 20, 24, 40, 48, 80, 96, 160, 192, 320, 384) if m <= ROWS[op]
    ]  # fmt: skip
    found += [route_point(n, e, k, T, False) for n in (2, 4, 32, 128, 512) for e, k in ((8, 2), (64, 8), (128, 8))]
    found += [experts_point(layer, n, T, False) for layer in ("olmoe", "mixtral") for n in (3, 6, 12, 24, 48)]
    found += [verify_point(b, d, v, rule, T, False) for rule in ("greedy", "rejection") for v in (32000, 128256)
              for b, d in ((2, 2), (8, 1), (8, 4), (8, 8))]  # fmt: skip
    return found
