"""A decoder-only transformer on a calibrated machine: what one decode step and one prefill take, need and cost.

Not priced: norms, rotary embedding, activation functions, residual additions.
"""

from dataclasses import dataclass, replace

from assay.cost import economics
from assay.cost.calls import Call, StepEstimate
from assay.cost.formats import ALIASES, FILE, KERNEL, KV_BYTES, WEIGHTS, Formats, check_kv, parse
from assay.cost.kernel_model import CostModel
from assay.cost.laws import GemmClass
from assay.cost.passes import (
    STORED_AS,
    attention,
    between,
    matrix_bits,
    price_products,
    products,
    routing,
    selection,
    weights,
)
from assay.model import ModelSpec

#: All precisions by name; formats of roles may follow, as in "w4a16,lm_head=bf16".
PRECISIONS = (FILE, *ALIASES, *WEIGHTS)
PREFILL_CHUNK_MAX = 512  # tokens
MAX_TOKENS = 1 << 24


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


def weight_bytes(model: ModelSpec, precision: str) -> float:
    """Bytes of all weights at a precision; a tied embedding counts once, and is quantised with the head."""
    formats = check_precision(model, precision)
    matrices = sum(matrix_bits(model, m, formats) / 8.0 * m.n * m.k * model.copies(m) for m in model.matrices)
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
    kept = sum(
        matrix_bits(model, m, formats) / 8.0 * m.n * m.k * model.copies(m)
        for m in model.matrices
        if m.role != "embedding"
    )
    cost_model = cost_model.reading(kept + KV_BYTES[kv] * batch * model.kv_elements(context_len))
    calls = weights(model, formats, cost_model, threads, batch, batch)
    calls += attention(model, cost_model, threads, kv, batch=batch, new=1, past=context_len)
    calls += routing(model, cost_model, threads, batch)
    calls += selection(model, cost_model, threads, batch)
    return StepEstimate.of(calls + between(calls, cost_model, threads))


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
        layers = weights(model, formats, cost_model, threads, tokens, 0)
        layers += attention(model, cost_model, threads, kv, batch=1, new=tokens, past=round(past))
        layers += routing(model, cost_model, threads, tokens)
        calls += [c.repeated(count) for c in layers]
    head = replace(model, matrices=tuple(m for m in model.matrices if m.role == "lm_head"))
    calls += price_products(products(head, formats, 1, 1), cost_model, threads)
    calls += selection(model, cost_model, threads, 1)
    return StepEstimate.of(calls + between(calls, cost_model, threads))


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
