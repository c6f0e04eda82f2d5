"""A decoder-only transformer as kernel calls: what one decode step and one prefill cost on a calibrated machine.

A step is a sum of calls, since kernels run one after another, and of what they cost each other where that was measured. Its interval takes the errors of calls of one op as fully
correlated (they share a fit: their interval ends add up) and of different ops as independent (their half widths add in
quadrature). Not priced: norms, rotary embedding, activation functions, residual additions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from assay.cost import economics, experts
from assay.cost.formats import ALIASES, FILE, GROUP, KERNEL, KV_BYTES, WEIGHTS, Formats, check_kv, parse
from assay.cost.kernel_model import CostModel
from assay.cost.laws import GemmClass
from assay.cost.roofline import Estimate, Estimates, largest
from assay.model import Matrix, ModelSpec

#: How a file stores a matrix, where that is exactly what a calibrated kernel reads (or plain 16 bits).
STORED_AS = {"Q4_0": "w4a8", "Q8_0": "int8", "F16": "bf16", "BF16": "bf16"}
#: All precisions by name; formats of roles may follow, as in "w4a16,lm_head=bf16".
PRECISIONS = (FILE, *ALIASES, *WEIGHTS)
PREFILL_CHUNK_MAX = 512  # tokens
MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class Call:
    """All calls of one kernel with one shape in a step: ``count`` times the same; seconds are of all together."""

    name: str
    op: str
    count: float
    shape: str
    time_s: float
    low_s: float
    high_s: float
    memory_s: float
    compute_s: float
    overhead_s: float
    basis: str
    notes: tuple[str, ...]

    @property
    def bound(self) -> str:
        """What the largest part of the time goes to: "memory", "compute" or "overhead"."""
        return largest(self.memory_s, self.compute_s, self.overhead_s)


@dataclass(frozen=True)
class StepEstimate:
    """A sum of calls, with its 90% interval.

    ``basis`` is "measured" when calls with a calibrated kernel make at least 80% of the time, "roof" when they make
    less than 20%, else "mixed". ``extrapolated`` says in what the calls leave the calibrated range.
    """

    calls: tuple[Call, ...]
    time_s: float
    low_s: float
    high_s: float
    memory_s: float
    compute_s: float
    overhead_s: float
    measured_share: float
    extrapolated: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def bound(self) -> str:
        """What the largest part of the time goes to: "memory", "compute" or "overhead"."""
        return largest(self.memory_s, self.compute_s, self.overhead_s)

    @property
    def basis(self) -> str:
        """Where the time comes from: "measured", "mixed" or "roof"."""
        return "measured" if self.measured_share >= 0.8 else "roof" if self.measured_share < 0.2 else "mixed"


@dataclass(frozen=True)
class Memory:
    """Bytes that a batch needs: weights, KV cache of every request at its full length, and workspace."""

    weights_bytes: float
    kv_bytes: float
    workspace_bytes: float

    @property
    def total_bytes(self) -> float:
        """All three."""
        return self.weights_bytes + self.kv_bytes + self.workspace_bytes


@dataclass(frozen=True)
class Prediction:
    """One row: a model at a precision and batch. Seconds, bytes and dollars; None where there is nothing to say.

    ``tokens_per_s`` counts decode alone; ``served_tokens_per_s`` and ``usd_per_million`` include prefill.
    """

    precision: str
    kv: str
    batch: int
    isl: int
    osl: int
    threads: int
    decode: StepEstimate
    prefill: StepEstimate
    memory: Memory
    fits: bool | None
    tokens_per_s: tuple[float, float, float]
    served_tokens_per_s: tuple[float, float, float]
    usd_per_million: tuple[float, float, float] | None
    usd_per_million_decode: tuple[float, float, float] | None


def check_precision(model: ModelSpec, precision: str) -> Formats:
    """The formats of ``precision``; ValueError unless ``model`` can be priced at them."""
    if precision.partition(",")[0].strip() not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    found = parse(precision)
    if found.weights == FILE and any(m.stored_bytes is None for m in model.matrices):
        raise ValueError(
            f"precision: expected one of {', '.join(PRECISIONS[1:])} for {model.name}, got 'file', which needs a model "
            "file (GGUF) that says how each matrix is stored"
        )
    return found


def _bits(model: ModelSpec, matrix: Matrix, formats: Formats) -> float:
    if formats.weights == FILE and matrix.stored_bytes is not None:
        return 8.0 * matrix.stored_bytes / (matrix.n * matrix.k * model.copies(matrix))
    return WEIGHTS[formats.of(matrix.role)][0]


def weight_bytes(model: ModelSpec, precision: str) -> float:
    """Bytes of all weights at a precision; a tied embedding counts once, and is quantised with the head."""
    formats = check_precision(model, precision)
    matrices = sum(_bits(model, m, formats) / 8.0 * m.n * m.k * model.copies(m) for m in model.matrices)
    if formats.weights == FILE and model.vector_bytes is not None:
        return matrices + model.vector_bytes
    num_experts = model.experts.num_experts if model.experts else 0
    return matrices + WEIGHTS["bf16"][0] / 8.0 * (model.vector_params + model.expert_vector_params * num_experts)


def memory_needed(
    model: ModelSpec, precision: str, batch: int, context_len: int, chunk: int, kv: str = "bf16"
) -> Memory:
    """Memory of ``batch`` requests of ``context_len`` tokens, prefilled in chunks of ``chunk``.

    Workspace: float32, four hidden vectors and three of the widest inner layer a token in flight, and the logits.
    """
    check_kv(kv)
    tokens = max(batch, chunk)
    widest = max((m.n for m in model.matrices if m.role not in ("lm_head", "embedding")), default=model.hidden_size)
    return Memory(
        weights_bytes=weight_bytes(model, precision),
        kv_bytes=KV_BYTES[kv] * batch * model.kv_elements(context_len),
        workspace_bytes=4.0 * (tokens * (4 * model.hidden_size + 3 * widest) + batch * model.vocab_size),
    )


# ---- calls ------------------------------------------------------------------------------------------------


def _call(name: str, op: str, count: float, shape: str, estimate: Estimate) -> Call:
    return Call(
        name=name,
        op=op,
        count=count,
        shape=shape,
        time_s=count * estimate.time_s,
        low_s=count * estimate.low_s,
        high_s=count * estimate.high_s,
        memory_s=count * estimate.memory_s,
        compute_s=count * estimate.compute_s,
        overhead_s=count * estimate.overhead_s,
        basis=estimate.basis,
        notes=estimate.notes,
    )


@dataclass(frozen=True)
class _Product:
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


def _products(model: ModelSpec, formats: Formats, tokens: int, logits: int) -> list[_Product]:
    """Every product of one pass of ``tokens`` tokens, of which ``logits`` need the head."""
    found = []
    for matrix in model.matrices:
        bits = _bits(model, matrix, formats)
        kept = _kernel_format(matrix, formats)
        if matrix.role == "embedding":  # a look-up of one row a token: nothing beside the head's product
            continue
        if matrix.role == "lm_head" and not logits:
            continue
        if matrix.role == "expert" and model.experts is not None:
            e = model.experts
            touched = float(experts.uniform(e.num_experts, e.experts_per_token, tokens))
            rows = float(experts.tokens_per_expert(e.experts_per_token, tokens, touched))
            found.append(_Product(matrix.name, rows, matrix.n, matrix.k, matrix.count * touched, bits, kept, True))
            continue
        rows = float(logits if matrix.role == "lm_head" else tokens)
        found.append(_Product(matrix.name, rows, matrix.n, matrix.k, float(matrix.count), bits, kept))
    return found


def _price_products(products: Sequence[_Product], cost: CostModel, threads: int) -> list[Call]:
    calls: list[Call | None] = [None] * len(products)
    kinds: dict[tuple[str, bool], list[int]] = {}
    for i, product in enumerate(products):
        kinds.setdefault((product.precision, product.grouped), []).append(i)
    for (precision, grouped), members in kinds.items():
        m, n, k, bits = (np.array([getattr(products[i], key) for i in members], dtype=np.float64) for key in
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
            calls[i] = _call(products[i].name, op, products[i].count, products[i].shape, priced.at(j))
    return [c for c in calls if c is not None]


def _attention(
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
        calls.append(_call("attention", op, kind.num_layers, shape, priced.at(0)))
    return calls


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
        return [_call("experts", "moe_experts", e.num_layers, shape, cost.kernel_time("moe_experts", params, threads))]
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
    return [_call("experts", f"moe {table.dtype}", e.num_layers, shape, priced.at(0))]


def _weights(model: ModelSpec, formats: Formats, cost: CostModel, threads: int, tokens: int, logits: int) -> list[Call]:
    """Every product with weights of one pass of ``tokens`` tokens: the experts in one kernel where there is one."""
    layers = _experts(model, formats, cost, threads, tokens)
    left = replace(model, matrices=tuple(m for m in model.matrices if m.role != "expert")) if layers else model
    return _price_products(_products(left, formats, tokens, logits), cost, threads) + layers


def _routing(model: ModelSpec, cost: CostModel, threads: int, tokens: int) -> list[Call]:
    if model.experts is None or not cost.calibrated("moe_route"):
        return []
    e = model.experts
    params = {"tokens": tokens, "num_experts": e.num_experts, "top_k": e.experts_per_token}
    shape = f"T={tokens} E={e.num_experts} k={e.experts_per_token}"
    return [_call("moe_route", "moe_route", e.num_layers, shape, cost.kernel_time("moe_route", params, threads))]


def _selection(model: ModelSpec, cost: CostModel, threads: int, batch: int) -> list[Call]:
    """Greedy choice of the next token: a verification without drafts."""
    if not cost.calibrated("chain_verify"):
        return []
    params = {"batch": batch, "num_draft": 0, "vocab": model.vocab_size, "rule": "greedy"}
    estimate = cost.kernel_time("chain_verify", params, threads)
    return [_call("next_token", "chain_verify", 1.0, f"B={batch} V={model.vocab_size}", estimate)]


def _between(calls: Sequence[Call], cost: CostModel, threads: int) -> list[Call]:
    """What the calls of calibrated kernels cost each other."""
    estimate = cost.between_calls(threads)
    count = sum(c.count for c in calls if cost.calibrated(c.op))
    if estimate is None or not count or estimate.high_s == 0.0:
        return []
    return [_call("between_calls", "sequence", count, f"{count:.4g} calls", estimate)]


def _sum(calls: Sequence[Call]) -> StepEstimate:
    by_op: dict[str, list[float]] = {}
    for c in calls:
        ends = by_op.setdefault(c.op, [0.0, 0.0])
        ends[0] += c.time_s - c.low_s
        ends[1] += c.high_s - c.time_s
    time = sum(c.time_s for c in calls)
    measured = [c for c in calls if c.basis == "measured"]
    return StepEstimate(
        calls=tuple(calls),
        time_s=time,
        low_s=time - math.hypot(*(low for low, _ in by_op.values())),
        high_s=time + math.hypot(*(high for _, high in by_op.values())),
        memory_s=sum(c.memory_s for c in calls),
        compute_s=sum(c.compute_s for c in calls),
        overhead_s=sum(c.overhead_s for c in calls),
        measured_share=sum(c.time_s for c in measured) / time,
        extrapolated=_gathered(measured),
        notes=_gathered([c for c in calls if c.basis != "measured"]),
    )


def _gathered(calls: Sequence[Call]) -> tuple[str, ...]:
    """Each note once, with the calls that it is about."""
    names: dict[str, dict[str, None]] = {}
    for call in calls:
        for note in call.notes:
            names.setdefault(note, {})[call.name] = None
    return tuple(f"{note} ({', '.join(about)})" for note, about in names.items())


# ---- steps ------------------------------------------------------------------------------------------------


def step_cost(
    model: ModelSpec,
    precision: str,
    batch: int,
    context_len: int,
    cost_model: CostModel,
    threads: int,
    kv: str = "bf16",
) -> StepEstimate:
    """Time of one decode step: one token more for each of ``batch`` requests.

    Parameters
    ----------
    precision
        One of `PRECISIONS`, with formats of roles after it ("w4a16,lm_head=bf16"). "int4" is "w4a8" (experts in their
        fused layer); it, "w4a16" and "int8" are priced with their calibrated products, and so are the matrices of a
        file that are stored just so (Q4_0, Q8_0); products, experts and attention without such a kernel by the imported
        table of their format; the others on the measured roofs at the utilisation that the INT4 kernel reaches, with a
        wide interval.
    context_len
        Tokens already in the cache of each request.
    cost_model
        From `assay.cost.stored.load_model`.
    threads
        Threads of every kernel.
    kv
        Format of the cache, of `assay.cost.formats.KV_BYTES`.

    Notes
    -----
    Experts: a step touches ``U(batch)`` distinct ones a layer (independent tokens, equally popular experts), each with
    ``batch k / U`` rows. Skewed popularity touches fewer, so this is the dear end.
    """
    formats = check_precision(model, precision)
    check_kv(kv)
    _at_least("batch", batch, 1)
    _at_least("context_len", context_len, 0)
    # Each step reads all of this again. Experts: all of them, for each step touches others.
    weights = sum(
        _bits(model, m, formats) / 8.0 * m.n * m.k * model.copies(m) for m in model.matrices if m.role != "embedding"
    )
    cost_model = cost_model.reading(weights + KV_BYTES[kv] * batch * model.kv_elements(context_len))
    calls = _weights(model, formats, cost_model, threads, batch, batch)
    calls += _attention(model, cost_model, threads, kv, batch=batch, new=1, past=context_len)
    calls += _routing(model, cost_model, threads, batch)
    calls += _selection(model, cost_model, threads, batch)
    return _sum(calls + _between(calls, cost_model, threads))


def prefill_chunk(cost_model: CostModel, precision: str, isl: int) -> int:
    """Tokens of a prefill chunk: at most 512, and no more than the prompt.

    With a calibrated product it stays at the widest calibrated one (but at least 32), so that prefill is priced within
    the range.
    """
    weights = parse(precision).weights
    kinds = STORED_AS.values() if weights == FILE else (weights,)
    fits = [cost_model.ops.get(KERNEL[kind]) for kind in kinds if kind in KERNEL]
    widest = [max(int(c.m[-1]) for c in fit.classes if isinstance(c, GemmClass)) for fit in fits if fit]
    return min(isl, max(32, min([*widest, PREFILL_CHUNK_MAX])))


def prefill_cost(
    model: ModelSpec, precision: str, isl: int, cost_model: CostModel, threads: int, kv: str = "bf16"
) -> StepEstimate:
    """Time from a prompt of ``isl`` tokens to its first output token, alone on the machine, in chunks.

    Full chunks differ only in how much of the cache they look back on, which is linear: they are priced as so many
    chunks with the mean past. The head runs once, for the last token.
    """
    formats = check_precision(model, precision)
    check_kv(kv)
    _at_least("isl", isl, 1)
    chunk = prefill_chunk(cost_model, precision, isl)
    full, rest = divmod(isl, chunk)
    calls: list[Call] = []
    for count, tokens, past in ((full, chunk, (full - 1) * chunk / 2.0), (1 if rest else 0, rest, float(full * chunk))):
        if not count:
            continue
        layers = _weights(model, formats, cost_model, threads, tokens, 0)
        layers += _attention(model, cost_model, threads, kv, batch=1, new=tokens, past=round(past))
        layers += _routing(model, cost_model, threads, tokens)
        calls += [_times(c, count) for c in layers]
    head = replace(model, matrices=tuple(m for m in model.matrices if m.role == "lm_head"))
    calls += _price_products(_products(head, formats, 1, 1), cost_model, threads)
    calls += _selection(model, cost_model, threads, 1)
    return _sum(calls + _between(calls, cost_model, threads))


def _times(call: Call, count: int) -> Call:
    return replace(
        call,
        count=call.count * count,
        time_s=call.time_s * count,
        low_s=call.low_s * count,
        high_s=call.high_s * count,
        memory_s=call.memory_s * count,
        compute_s=call.compute_s * count,
        overhead_s=call.overhead_s * count,
    )


def _at_least(name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= MAX_TOKENS:
        raise ValueError(f"{name}: expected an integer in {low}..{MAX_TOKENS}, got {value!r}")


def predict(
    model: ModelSpec,
    precision: str,
    batch: int,
    isl: int,
    osl: int,
    cost_model: CostModel,
    threads: int,
    *,
    kv: str = "bf16",
    memory_bytes: int | None = None,
    usd_per_hour: float | None = None,
) -> Prediction:
    """Price a model: decode at the mean context ``isl + osl / 2``, prefill, memory, throughput, dollars.

    Parameters
    ----------
    isl, osl
        Input and output tokens of each request, at least 1.
    precision, kv
        As in `step_cost`.
    memory_bytes
        Memory of the machine; None when unknown, and then ``fits`` is None.
    usd_per_hour
        Price of the machine; None leaves the dollars out.
    """
    for name, value in (("batch", batch), ("isl", isl), ("osl", osl)):
        _at_least(name, value, 1)
    _at_least("threads", threads, 1)
    decode = step_cost(model, precision, batch, isl + osl // 2, cost_model, threads, kv)
    prefill = prefill_cost(model, precision, isl, cost_model, threads, kv)
    memory = memory_needed(model, precision, batch, isl + osl, prefill_chunk(cost_model, precision, isl), kv)
    # The slow end of the time is the low end of the speed.
    speed = (batch / decode.time_s, batch / decode.high_s, batch / decode.low_s)
    served = (
        economics.served_tokens_per_s(batch, osl, prefill.time_s, decode.time_s),
        economics.served_tokens_per_s(batch, osl, prefill.high_s, decode.high_s),
        economics.served_tokens_per_s(batch, osl, prefill.low_s, decode.low_s),
    )
    return Prediction(
        precision=precision,
        kv=kv,
        batch=batch,
        isl=isl,
        osl=osl,
        threads=threads,
        decode=decode,
        prefill=prefill,
        memory=memory,
        fits=None if memory_bytes is None else memory.total_bytes <= memory_bytes,
        tokens_per_s=speed,
        served_tokens_per_s=served,
        usd_per_million=None if usd_per_hour is None else _usd(usd_per_hour, served),
        usd_per_million_decode=None if usd_per_hour is None else _usd(usd_per_hour, speed),
    )


def _usd(usd_per_hour: float, speed: tuple[float, float, float]) -> tuple[float, float, float]:
    middle, slow, fast = (economics.usd_per_million_tokens(usd_per_hour, s) for s in speed)
    return middle, fast, slow
