"""Which points are measured: real models' shapes, and which of them the fit never sees.

Held out are whole weight shapes, and numbers of rows between those that were fitted on the fitted shapes: the questions
that a user asks of the model. Bytes are what must move from DRAM (or, for routing, from cache) at the least; a
multiply-add counts two operations.
"""

from dataclasses import dataclass, field
from typing import Any

from ..cost.laws import sequence_products
from ..profile import GEMM_OPS

#: Products that this machine's CPU has kernels for.
HOST_GEMM_OPS = ("w4a8_gemm", "w4a16_gemm", "w8a8_gemm")

#: (N, K) with where they occur. Named so that benchmarks and documents speak of the same things.
GEMM_SHAPES = {
    "llama-8b-attn": (4096, 4096),
    "llama-8b-up": (14336, 4096),
    "llama-8b-down": (4096, 14336),
    "llama-8b-kv": (1024, 4096),
    "gemma-270m-ffn": (2048, 640),
    "gemma-270m-kv": (256, 640),
    "gemma-270m-head": (262144, 640),
    "qwen3-expert-up": (768, 2048),
    "qwen3-expert-down": (2048, 768),
    "olmoe-attn": (2048, 2048),
    "phi3-qkv": (9216, 3072),
}


#: Expert layers: (experts, top_k, hidden_size, intermediate_size).
EXPERT_LAYERS = {
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "mixtral": (8, 2, 4096, 14336),
}


#: Stacks of dense layers: (hidden_size, width of keys, intermediate_size, how many layers). No model of benchmarks/closure.py.
STACKS = {
    "smollm2-135m": (576, 192, 1536, 6),
    "qwen2.5-0.5b": (896, 128, 4864, 3),
}


@dataclass(frozen=True)
class Point:
    """One thing to time: an op, its shape, how many threads."""

    op: str
    threads: int
    params: dict[str, Any] = field(hash=False)
    held_out: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two points the same."""
        return (self.op, self.threads, *sorted(self.params.items()))

    @property
    def label(self) -> str:
        """Short name for a table or a benchmark's id."""
        p = self.params
        if self.op in GEMM_OPS:
            kind = ("" if p["symmetric"] else "-asym") + ("-cached" if p.get("resident") == "llc" else "")
            return f"{p['n']}x{p['k']}-g{p['group_size']}{kind}-m{p['m']}-t{self.threads}"
        if self.op == "moe_route":
            return f"t{p['tokens']}-e{p['num_experts']}-k{p['top_k']}-t{self.threads}"
        if self.op == "moe_experts":
            layer = f"{p['hidden_size']}x{p['intermediate_size']}-g{p['group_size']}"
            return f"{layer}-t{p['tokens']}-k{p['top_k']}-d{p['distinct_experts']}-t{self.threads}"
        if self.op == "sequence":
            return f"{p['of']}-{p['layers']}x{p['hidden_size']}x{p['intermediate_size']}-m{p['m']}-t{self.threads}"
        return f"{p['rule']}-b{p['batch']}-k{p['num_draft']}-v{p['vocab']}-t{self.threads}"

    @property
    def bytes(self) -> float:
        """Bytes that the op must at least move: packed weights, activations in, outputs; logits for the other ops."""
        p = self.params
        if self.op in GEMM_OPS:
            return packed_bytes(
                p["n"], p["k"], p["group_size"], p["symmetric"], 8 if self.op == "w8a8_gemm" else 4
            ) + 4.0 * p["m"] * (p["k"] + p["n"])
        if self.op == "moe_route":
            return 4.0 * p["tokens"] * (p["num_experts"] + 2 * p["top_k"])
        if self.op == "moe_experts":
            matrices = expert_matrices(p["hidden_size"], p["intermediate_size"])
            weights = sum(packed_bytes(*nk, p["group_size"], p["symmetric"]) for nk in matrices)
            return p["distinct_experts"] * weights + 8.0 * p["tokens"] * p["hidden_size"]
        if self.op == "sequence":
            return sum(count * part.bytes for part, count in self.parts)
        return 4.0 * p["batch"] * (p["num_draft"] + 1) * p["vocab"]

    @property
    def ops(self) -> float:
        """Operations: multiply-adds of a GEMM; one comparison a logit for routing and greedy, one exp for rejection."""
        p = self.params
        if self.op in GEMM_OPS:
            return 2.0 * p["m"] * p["n"] * p["k"]
        if self.op == "moe_route":
            return float(p["tokens"] * p["num_experts"])
        if self.op == "moe_experts":
            return 6.0 * p["tokens"] * p["top_k"] * p["hidden_size"] * p["intermediate_size"]
        if self.op == "sequence":
            return sum(count * part.ops for part, count in self.parts)
        return float(p["batch"] * (p["num_draft"] + 1) * p["vocab"])

    @property
    def parts(self) -> list[tuple["Point", int]]:
        """The products of a stack, each with how often it occurs."""
        p = self.params
        shared = {"m": p["m"], "group_size": 32, "symmetric": True}
        return [
            (Point(p["of"], self.threads, {**shared, "n": n, "k": k}), round(count))
            for n, k, count in sequence_products(p)
        ]


def expert_matrices(hidden: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(N, K) of an expert's two packed matrices: gates and ups by turns of 16 columns, and the way down."""
    return (32 * -(-width // 16), hidden), (hidden, width)


def packed_bytes(n: int, k: int, group_size: int, symmetric: bool, bits: int = 4) -> float:
    """Bytes of a packed matrix: 4 or 8 bits a weight, 2 bytes a scale, half a byte a zero point (rounded up as packed)."""
    groups = k // group_size
    tile = groups * (64 + -(-group_size // 32) * 128 * bits) + (0 if symmetric else -(-groups // 4) * 64)
    return float(-(-n // 32) * tile)


def gemm_point(
    op: str, shape: str, m: int, threads: int, held_out: bool, group_size: int = 32, symmetric: bool = True
) -> Point:
    """A product with the weights of `GEMM_SHAPES`."""
    n, k = GEMM_SHAPES[shape]
    params = {"m": m, "n": n, "k": k, "group_size": group_size, "symmetric": symmetric}
    return Point(op, threads, params, held_out)


def route_point(tokens: int, num_experts: int, top_k: int, threads: int, held_out: bool) -> Point:
    """Routing."""
    return Point("moe_route", threads, {"tokens": tokens, "num_experts": num_experts, "top_k": top_k}, held_out)


def experts_point(layer: str, tokens: int, threads: int, held_out: bool) -> Point:
    """A layer that a batch of independent tokens goes through: as many experts as uniform routing touches."""
    experts, top_k, hidden, width = EXPERT_LAYERS[layer]
    touched = round(experts * (1.0 - (1.0 - top_k / experts) ** tokens))
    params = {
        "tokens": tokens, "top_k": top_k, "distinct_experts": touched, "hidden_size": hidden, "intermediate_size": width,
        "group_size": 32, "symmetric": True,
    }  # fmt: skip
    return Point("moe_experts", threads, params, held_out)


def stack_point(op: str, model: str, m: int, threads: int) -> Point:
    """The products of some layers of a small model, in order."""
    hidden, kv, width, layers = STACKS[model]
    params = {
        "of": op, "m": m, "hidden_size": hidden, "kv_size": kv, "intermediate_size": width, "layers": layers,
    }  # fmt: skip
    return Point("sequence", threads, params)


def verify_point(batch: int, num_draft: int, vocab: int, rule: str, threads: int, held_out: bool) -> Point:
    """Verification of chains of equal length."""
    params = {"batch": batch, "num_draft": num_draft, "vocab": vocab, "rule": rule}
    return Point("chain_verify", threads, params, held_out)


def grid(mode: str, threads: list[int]) -> list[Point]:
    """The points of a calibration.

    Parameters
    ----------
    mode : {"quick", "full"}
    threads
        Thread counts to measure at, as [1, 2].
    """
    if mode not in ("quick", "full"):
        raise ValueError(f"mode: expected quick or full, got {mode!r}")
    full = mode == "full"
    points: list[Point] = []
    for t in threads:
        points += _gemm_points(t, full)
        points += _route_points(t, full)
        points += _expert_points(t, full)
        points += _verify_points(t, full)
        points += [
            stack_point(op, model, m, t)
            for op in (HOST_GEMM_OPS if full else ("w4a8_gemm", "w8a8_gemm"))
            for model in STACKS
            for m in ((1, 4, 16) if full else (1, 8))
        ]
    unique: dict[tuple[Any, ...], Point] = {}
    for point in points:
        unique.setdefault(point.key, point)
    return list(unique.values())


def candidates(threads: list[int]) -> list[Point]:
    """What a full calibration may measure besides its grid, where its model is least sure; never a shape that is held out."""
    widths = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 512)
    shapes = ("llama-8b-attn", "gemma-270m-ffn", "olmoe-attn", "gemma-270m-kv", "llama-8b-down")
    batches = ((1, 0), (1, 1), (1, 4), (1, 8), (2, 2), (4, 0), (4, 4), (8, 1), (16, 1), (32, 0))
    found = []
    for t in threads:
        found += [gemm_point(op, shape, m, t, False) for op in HOST_GEMM_OPS for shape in shapes for m in widths]
        found += [route_point(n, e, k, t, False) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
                  for e, k in ((8, 2), (64, 8), (128, 8))]  # fmt: skip
        found += [
            experts_point(layer, n, t, False)
            for layer in ("olmoe", "mixtral")
            for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
        ]
        found += [experts_point("olmoe", n, t, False) for n in (48, 64, 96, 128, 192, 256)]
        found += [verify_point(b, d, v, rule, t, False) for rule in ("greedy", "rejection") for v in (32000, 128256, 262144)
                  for b, d in batches]  # fmt: skip
    return found


def _gemm_points(t: int, full: bool) -> list[Point]:
    widths = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32, 64)
    fitted = ("llama-8b-attn", "gemma-270m-ffn", "olmoe-attn")
    points = [gemm_point("w4a8_gemm", shape, m, t, False) for shape in fitted for m in widths]
    # Kernels take rows in blocks, and so the time has steps: every width that a verification has is measured on one shape.
    points += [gemm_point("w4a8_gemm", "llama-8b-attn", m, t, False) for m in (*range(1, 17), 24, 48)]
    points += [gemm_point("w4a8_gemm", "llama-8b-down", m, t, False) for m in (1, 4, 16)]
    points += [gemm_point("w4a8_gemm", "gemma-270m-head", m, t, False) for m in (1, 4)]
    points += [gemm_point("w4a8_gemm", "gemma-270m-kv", m, t, False) for m in (1, 8)]
    # Held out: shapes never fitted, and widths between the fitted ones.
    points += [gemm_point("w4a8_gemm", "llama-8b-kv", m, t, True) for m in (1, 3, 8, 32)]
    points += [gemm_point("w4a8_gemm", "phi3-qkv", m, t, True) for m in (1, 2, 4, 6, 16)]
    points += [gemm_point("w4a8_gemm", "llama-8b-up", m, t, True) for m in (1, 4, 8)]
    points += [gemm_point("w4a8_gemm", "olmoe-attn", m, t, True) for m in (7, 10, 24, 40)]
    points += [gemm_point("w4a8_gemm", "qwen3-expert-up", m, t, True) for m in (1, 4)]
    narrow = ("llama-8b-attn", "gemma-270m-ffn")
    points += [gemm_point("w8a8_gemm", shape, m, t, False) for shape in narrow for m in (1, 2, 4, 8, 16, 64)]
    points += [gemm_point("w8a8_gemm", "gemma-270m-head", m, t, False) for m in (1, 4)]
    points += [gemm_point("w8a8_gemm", "gemma-270m-kv", m, t, False) for m in (1, 8)]
    points += [gemm_point("w8a8_gemm", "olmoe-attn", m, t, True) for m in (1, 3, 6, 32)]
    points += [gemm_point("w8a8_gemm", "llama-8b-kv", m, t, True) for m in (1, 12)]
    points += [gemm_point("w8a8_gemm", "phi3-qkv", m, t, True) for m in (1, 4)]
    wide = ("llama-8b-attn", "olmoe-attn")
    points += [gemm_point("w4a16_gemm", shape, m, t, False) for shape in wide for m in (1, 2, 4, 8, 16)]
    points += [gemm_point("w4a16_gemm", "phi3-qkv", m, t, True) for m in (1, 4)]
    points += [gemm_point("w4a16_gemm", "llama-8b-kv", m, t, True) for m in (1, 4, 12)]
    if full:
        points += [gemm_point("w4a8_gemm", shape, m, t, False) for shape in fitted for m in (128, 256, 512)]
        points += [gemm_point("w4a8_gemm", "gemma-270m-head", m, t, True) for m in (2, 3)]
        points += [gemm_point("w4a8_gemm", "qwen3-expert-up", m, t, True) for m in (1, 4, 16, 64)]
        points += [gemm_point("w4a8_gemm", "qwen3-expert-down", m, t, True) for m in (1, 4, 16, 64)]
        points += [gemm_point("w4a8_gemm", "phi3-qkv", m, t, True) for m in (64, 192, 512)]
        for group_size, symmetric in ((128, True), (32, False), (128, False)):
            kind: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric}
            points += [gemm_point("w4a8_gemm", shape, m, t, False, **kind) for shape in fitted for m in widths]
            points += [gemm_point("w4a8_gemm", "phi3-qkv", m, t, True, **kind) for m in (1, 3, 8, 24)]
            points += [gemm_point("w4a8_gemm", "llama-8b-up", m, t, True, **kind) for m in (1, 4)]
        points += [gemm_point("w8a8_gemm", shape, m, t, False) for shape in narrow for m in (3, 5, 6, 12, 32, 128, 512)]
        points += [gemm_point("w8a8_gemm", "llama-8b-up", m, t, True) for m in (1, 4, 24)]
        points += [gemm_point("w4a16_gemm", shape, m, t, False) for shape in wide for m in (32, 64, 128)]
        points += [gemm_point("w4a16_gemm", "phi3-qkv", m, t, True) for m in (24, 64)]
    return points


def _route_points(t: int, full: bool) -> list[Point]:
    tokens = (1, 8, 64, 256, 1024) if not full else (1, 4, 16, 64, 256, 512, 1024, 2048)
    points = [route_point(n, e, k, t, False) for n in tokens for e, k in ((8, 2), (64, 8), (128, 8))]
    points += [route_point(n, 32, 4, t, True) for n in (1, 16, 128, 512)]
    points += [route_point(n, 256, 8, t, True) for n in (2, 32)]
    return points


def _expert_points(t: int, full: bool) -> list[Point]:
    tokens = (1, 2, 4, 8, 16, 32, 64, 128, 256) if full else (1, 2, 4, 8, 32, 256)
    points = [experts_point("olmoe", n, t, False) for n in tokens]
    points += [experts_point("mixtral", n, t, False) for n in ((1, 4, 16) if full else (1,))]
    points += [experts_point("qwen3-30b-a3b", n, t, True) for n in ((1, 3, 8, 24, 96, 256) if full else (1, 4, 16, 64))]
    return points + [experts_point("gpt-oss-20b", n, t, True) for n in ((1, 4, 16, 64) if full else (1, 8))]


def _verify_points(t: int, full: bool) -> list[Point]:
    points: list[Point] = []
    for rule in ("greedy", "rejection"):
        points += [verify_point(b, d, v, rule, t, False) for v in (32000, 128256) for b, d in ((1, 0), (1, 4), (4, 3))]
        points += [verify_point(64, 0, 32000, rule, t, False), verify_point(1, 0, 262144, rule, t, False)]
        points += [verify_point(1, 2, 152064, rule, t, True), verify_point(2, 5, 50304, rule, t, True)]
        points += [verify_point(1, 8, 32000, rule, t, True), verify_point(16, 0, 100352, rule, t, True)]
        if full:
            points += [verify_point(b, d, 128256, rule, t, False) for b, d in ((1, 8), (1, 16), (8, 4), (8, 1))]
            points += [verify_point(8, 4, 32000, rule, t, False), verify_point(1, 4, 262144, rule, t, True)]
    return points
