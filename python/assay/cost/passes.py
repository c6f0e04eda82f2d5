"""The kernel calls of one pass of tokens through a decoder-only transformer: products, experts, attention, routing, choice."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay.cost import experts
from assay.cost.calls import Call
from assay.cost.formats import FILE, GROUP, KERNEL, KV_BYTES, WEIGHTS, Formats
from assay.cost.kernel_model import CostModel
from assay.cost.roofline import Estimates
from assay.model import Matrix, ModelSpec

#: How a file stores a matrix, where that is exactly what a calibrated kernel reads (or plain 16 bits).
STORED_AS = {"Q4_0": "w4a8", "Q8_0": "int8", "F16": "bf16", "BF16": "bf16"}


def matrix_bits(model: ModelSpec, matrix: Matrix, formats: Formats) -> float:
    """Bits that a weight of a matrix is stored in."""
    if formats.weights == FILE and matrix.stored_bytes is not None:
        return 8.0 * matrix.stored_bytes / (matrix.n * matrix.k * model.copies(matrix))
    return WEIGHTS[formats.of(matrix.role)][0]


@dataclass(frozen=True)
class Product:
    """A matrix product to be priced: ``count`` times C[m, n] with k inner, at so many bits a weight."""

    name: str
    m: float
    n: int
    k: int
    count: float
    bits: float
    precision: str
    grouped: bool = False  # of experts: several of them run in one call

    @property
    def shape(self) -> str:
        return f"M={self.m:.4g} N={self.n} K={self.k}"


def _kernel_format(matrix: Matrix, formats: Formats) -> str:
    """The format whose kernel multiplies a matrix: for a file, by how all of the matrix is stored."""
    if formats.weights != FILE:
        return formats.of(matrix.role)
    stored = list(matrix.stored or ())
    return STORED_AS.get(stored[0], FILE) if len(stored) == 1 else FILE


def products(model: ModelSpec, formats: Formats, tokens: int, logits: int) -> list[Product]:
    """Every product of one pass of ``tokens`` tokens, of which ``logits`` need the head."""
    found = []
    for matrix in model.matrices:
        bits = matrix_bits(model, matrix, formats)
        kept = _kernel_format(matrix, formats)
        if matrix.role == "embedding":  # a look-up of one row a token: nothing beside the head's product
            continue
        if matrix.role == "lm_head" and not logits:
            continue
        if matrix.role == "expert" and model.experts is not None:
            e = model.experts
            touched = float(experts.uniform(e.num_experts, e.experts_per_token, tokens))
            rows = float(experts.tokens_per_expert(e.experts_per_token, tokens, touched))
            found.append(Product(matrix.name, rows, matrix.n, matrix.k, matrix.count * touched, bits, kept, True))
            continue
        rows = float(logits if matrix.role == "lm_head" else tokens)
        found.append(Product(matrix.name, rows, matrix.n, matrix.k, float(matrix.count), bits, kept))
    return found


def price_products(asked: Sequence[Product], cost: CostModel, threads: int) -> list[Call]:
    """Products as calls, in their order: by the calibrated kernel, the imported table of the format, or the roofs."""
    calls: list[Call | None] = [None] * len(asked)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, product in enumerate(asked):
        kinds.setdefault((product.precision, product.grouped), []).append(i)
    for (precision, grouped), members in kinds.items():
        m, n, k, bits = (np.array([getattr(asked[i], key) for i in members], dtype=np.float64) for key in
                         ("m", "n", "k", "bits"))  # fmt: skip
        op = KERNEL.get(precision, "")
        table = None if grouped else cost.table("gemm", precision)
        if cost.calibrated(op):
            priced: Estimates = cost.kernel_times(
                op, {"m": m, "n": n, "k": k, "group_size": GROUP, "symmetric": True}, threads
            )
        elif table is not None and cost.tables is not None:
            priced, op = cost.tables.price(table, m=m, n=n, k=k), f"gemm {table.dtype}"
        else:
            integer = precision == FILE or WEIGHTS[precision][1] == "int8"
            priced = cost.roof_times(
                bits / 8.0 * n * k + 2.0 * m * (n + k),
                2.0 * m * n * k,
                threads,
                compute="int8_peak" if integer else "fp32_peak",
                note=f"no calibrated kernel for {precision} products: priced on the measured roofs",
            )
            op = "products of other stored types" if precision == FILE else f"{precision} products"
        for j, i in enumerate(members):
            calls[i] = Call.of(asked[i].name, op, asked[i].count, asked[i].shape, priced.at(j))
    return [c for c in calls if c is not None]


def weights(model: ModelSpec, formats: Formats, cost: CostModel, threads: int, tokens: int, logits: int) -> list[Call]:
    """Every product with weights of one pass of ``tokens`` tokens: the experts in one kernel where there is one."""
    layers = _experts(model, formats, cost, threads, tokens)
    left = replace(model, matrices=tuple(m for m in model.matrices if m.role != "expert")) if layers else model
    return price_products(products(left, formats, tokens, logits), cost, threads) + layers


def _experts(model: ModelSpec, formats: Formats, cost: CostModel, threads: int, tokens: int) -> list[Call]:
    """The expert layers as a fused kernel computes them; none where none was measured.

    That is the calibrated kernel for INT4, else an imported table of the format.
    """
    layer = _expert_layer(model, formats)
    if model.experts is None or layer is None:
        return []
    width, kept = layer
    e = model.experts
    if kept == "w4a8" and cost.calibrated("moe_experts"):
        touched = float(experts.uniform(e.num_experts, e.experts_per_token, tokens))
        params = {
            "tokens": tokens, "top_k": e.experts_per_token, "distinct_experts": touched,
            "hidden_size": model.hidden_size, "intermediate_size": width, "group_size": GROUP, "symmetric": True,
        }  # fmt: skip
        shape = f"T={tokens} k={e.experts_per_token} distinct={touched:.4g} H={model.hidden_size} I={width}"
        return [
            Call.of("experts", "moe_experts", e.num_layers, shape, cost.kernel_time("moe_experts", params, threads))
        ]
    table = cost.table("moe", kept)
    if table is None or cost.tables is None:
        return []
    priced = cost.tables.experts(
        table,
        tokens=tokens,
        hidden=model.hidden_size,
        inter=width,
        top_k=e.experts_per_token,
        num_experts=e.num_experts,
    )
    shape = f"T={tokens} k={e.experts_per_token} E={e.num_experts} H={model.hidden_size} I={width}"
    return [Call.of("experts", f"moe {table.dtype}", e.num_layers, shape, priced.at(0))]


def _expert_layer(model: ModelSpec, formats: Formats) -> tuple[int, str] | None:
    """Intermediate size and format of experts that are a gate, up and down projection of one format; else None."""
    found = [m for m in model.matrices if m.role == "expert"]
    down = next((m for m in found if m.n == model.hidden_size), None)
    kept = {_kernel_format(m, formats) for m in found}
    whole = (
        down is not None
        and sum(m.n * m.k for m in found) == 3 * down.n * down.k
        and len({m.count for m in found}) == 1
        and len(kept) == 1
    )
    return (down.k, kept.pop()) if down is not None and whole else None


def attention(
    model: ModelSpec, cost: CostModel, threads: int, kv: str, *, batch: int, new: int, past: int
) -> list[Call]:
    """Attention of ``new`` tokens a request over ``past`` cached ones and themselves (causally), windows capped.

    Bytes: the cache, read once a request. Operations: two products of each query with each position that it sees; an
    MLA layer works in the latent space of its cache (absorbed projections).
    """
    calls = []
    for kind in model.attention:
        seen = past + (new + 1) / 2.0  # positions that a query sees, on average
        length = float(past + new)
        if kind.window is not None:
            seen, length = min(seen, kind.window), min(length, kind.window + new - 1)
        moved = KV_BYTES[kv] * batch * length * kind.kv_elements_per_token
        width = 2 * kind.kv_elements_per_token if kind.kind == "mla" else kind.head_dim + kind.v_head_dim
        work = 2.0 * batch * new * seen * kind.num_heads * width
        op = "generation_attention" if new == 1 else "context_attention"
        plain = kind.kind == "gqa" and kind.head_dim == kind.v_head_dim
        table = cost.table(op, kv) if plain else None
        if table is not None and cost.tables is not None:
            heads = {"heads": kind.num_heads, "kv_heads": kind.num_kv_heads, "head_dim": kind.head_dim}
            asked = {"kv_len": past + 1} if new == 1 else {"isl": new, "past": past}
            priced = cost.tables.price(table, batch=batch, window=kind.window or 0, **asked, **heads)
            op = f"{op} {table.dtype}"
        else:
            op = "attention"
            priced = cost.roof_times(
                moved,
                work,
                threads,
                compute="fp32_peak",
                note="no calibrated attention kernel: priced on the measured roofs",
            )
        window = "" if kind.window is None else f" window={kind.window}"
        shape = f"B={batch} Q={new} KV={length:.0f}{window}"
        calls.append(Call.of("attention", op, kind.num_layers, shape, priced.at(0)))
    return calls


def routing(model: ModelSpec, cost: CostModel, threads: int, tokens: int) -> list[Call]:
    """The choice of experts in every layer that has them; nothing where its kernel is not calibrated."""
    if model.experts is None or not cost.calibrated("moe_route"):
        return []
    e = model.experts
    params = {"tokens": tokens, "num_experts": e.num_experts, "top_k": e.experts_per_token}
    shape = f"T={tokens} E={e.num_experts} k={e.experts_per_token}"
    return [Call.of("moe_route", "moe_route", e.num_layers, shape, cost.kernel_time("moe_route", params, threads))]


def selection(model: ModelSpec, cost: CostModel, threads: int, batch: int) -> list[Call]:
    """Greedy choice of the next token: a verification without drafts."""
    if not cost.calibrated("chain_verify"):
        return []
    params = {"batch": batch, "num_draft": 0, "vocab": model.vocab_size, "rule": "greedy"}
    estimate = cost.kernel_time("chain_verify", params, threads)
    return [Call.of("next_token", "chain_verify", 1.0, f"B={batch} V={model.vocab_size}", estimate)]


def between(calls: Sequence[Call], cost: CostModel, threads: int) -> list[Call]:
    """What the calls of calibrated kernels cost each other; nothing where that was not measured."""
    estimate = cost.between_calls(threads)
    count = sum(c.count for c in calls if cost.calibrated(c.op))
    if estimate is None or not count or estimate.high_s == 0.0:
        return []
    return [Call.of("between_calls", "sequence", count, f"{count:.4g} calls", estimate)]
