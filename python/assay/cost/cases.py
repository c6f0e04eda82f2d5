"""A model served in one way on one machine, priced with its uncertainty: what techniques are applied to."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from assay.cost import experts
from assay.cost.drafting import Speculation, Triple
from assay.cost.draws import Draws, Part
from assay.cost.formats import KV_BYTES, WEIGHTS, Formats, check_kv
from assay.cost.machines import Machine
from assay.cost.roofline import FloatArray, largest
from assay.model import ModelSpec

USABLE_MEMORY = 0.9  # of the device: the rest is workspace, fragmentation and the runtime
PAGE = 16  # tokens of a KV page: half of one is lost a request
#: Output lengths of a static batch are taken as exponential, cut at this many times the mean, and memory is reserved for
#: the longest: without pages it cannot be known how long an answer will be.
LONGEST_OUTPUT = 4.0
MAX_TOKENS = 1 << 24


@dataclass(frozen=True)
class Case:
    """A model served in one way on one machine.

    Attributes
    ----------
    weights, by_role
        Weight format (`formats.WEIGHTS`) of all matrices, and of roles that differ: ``(("lm_head", "bf16"),)``.
        Routers and input embeddings stay in bf16 unless named.
    kv
        Format of the cache, of `formats.KV_BYTES`.
    batch
        The most requests at once; memory may allow fewer.
    isl, osl
        Tokens in and out of each request.
    continuous
        Batching that refills a slot as soon as it is free, with a paged cache; a static batch reserves memory for the
        longest answer and runs until it is done.
    prefix_hit
        Share of the prompt that is found in a prefix cache.
    skew
        Popularity of experts over requests, as ``rank^-skew``: 0 is uniform, the dear end.
    io_aware
        Attention that keeps its scores on the chip (FlashAttention); without, they are written and read twice.
    spent
        Output tokens spent on average, as a share of ``osl`` (low, middle, high): below 1 where the model decides.
    """

    model: ModelSpec
    machine: Machine
    weights: str = "bf16"
    kv: str = "bf16"
    batch: int = 1
    isl: int = 512
    osl: int = 128
    continuous: bool = True
    prefix_hit: float = 0.0
    speculation: Speculation | None = None
    by_role: tuple[tuple[str, str], ...] = ()
    skew: float = 0.0
    io_aware: bool = True
    spent: Triple = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        """Refuses impossible cases, the model's own included."""
        self.model.validate()
        if self.weights not in WEIGHTS:  # a file says nothing here
            raise ValueError(f"weights: expected one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        Formats(self.weights, self.by_role)
        check_kv(self.kv)
        for name, top in (("batch", 65536), ("isl", MAX_TOKENS), ("osl", MAX_TOKENS)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= top:
                raise ValueError(f"{name}: expected an integer in 1..{top}, got {value!r}")
        if not 0 <= self.prefix_hit < 1:
            raise ValueError(f"prefix_hit: expected a share from 0 to below 1, got {self.prefix_hit}")
        if not 0 <= self.skew <= 10:
            raise ValueError(f"skew: expected an exponent from 0 to 10, got {self.skew}")
        low, middle, high = self.spent
        if not 0 < low <= middle <= high <= 1:
            raise ValueError(f"spent: expected shares 0 < low <= middle <= high <= 1, got {self.spent}")

    def format(self, role: str) -> str:
        """Weight format of this role."""
        return Formats(self.weights, self.by_role).of(role)

    def bits(self, role: str) -> float:
        """Bits of a weight of this role, scales in."""
        return WEIGHTS[self.format(role)][0]

    @property
    def weights_bytes(self) -> float:
        """Bytes of all weights."""
        model = self.model
        vectors = model.vector_params + model.expert_vector_params * (model.experts.num_experts if model.experts else 0)
        return sum(self.bits(m.role) / 8.0 * m.n * m.k * model.copies(m) for m in model.matrices) + 2.0 * vectors

    @property
    def mean_osl(self) -> float:
        """Output tokens spent on average."""
        return self.osl * self.spent[1]

    @property
    def kv_bytes_per_request(self) -> float:
        """Memory that the cache of one request takes: pages of its mean length, or a reservation for the longest."""
        length = (
            self.isl + self.mean_osl / 2.0 + PAGE / 2.0 if self.continuous else self.isl + LONGEST_OUTPUT * self.osl
        )
        return KV_BYTES[self.kv] * self.model.kv_elements(math.ceil(length))

    @property
    def room(self) -> int | None:
        """Requests that fit beside the weights; 0 when not even one does, None when memory is unknown."""
        if self.machine.memory_bytes is None:
            return None
        free = USABLE_MEMORY * self.machine.memory_bytes - self.weights_bytes
        return max(0, math.floor(free / self.kv_bytes_per_request))

    @property
    def running(self) -> int:
        """Requests at once: the batch, or what fits; 1 where not even that does (``room`` says so)."""
        return self.batch if self.room is None else max(1, min(self.batch, self.room))

    @property
    def memory_needed(self) -> float:
        """Bytes that a machine must have for the whole batch."""
        return (self.weights_bytes + self.batch * self.kv_bytes_per_request) / USABLE_MEMORY


@dataclass(frozen=True)
class Group:
    """Requests that do alike in a pass: ``width`` new tokens each over ``past`` cached ones; ``logits`` in all."""

    requests: float | FloatArray
    width: int
    past: float
    logits: float | FloatArray

    @property
    def tokens(self) -> float | FloatArray:
        """New tokens of the group."""
        return self.requests * self.width


@dataclass(frozen=True)
class Priced:
    """A case with its price. Arrays are by draw, element 0 the estimate.

    ``prompt_share`` is the share of the machine's time that prompts take; ``step_s`` a decode step without them.
    """

    case: Case
    answers_per_s: FloatArray
    tokens_per_s: FloatArray
    step_s: FloatArray
    prefill_s: FloatArray
    prompt_share: FloatArray
    tokens_per_step: FloatArray
    touched_experts: float | None
    watts: FloatArray | None
    parts: Part = field(repr=False)

    @property
    def fits(self) -> bool | None:
        """None where the machine's memory is unknown."""
        return None if self.case.room is None else self.case.room >= 1

    @property
    def bound(self) -> str:
        """Where most of the time goes: "memory", "compute" or "overhead"."""
        return largest(*(float(p[0]) for p in (self.parts.memory_s, self.parts.compute_s, self.parts.overhead_s)))

    @property
    def joules_per_token(self) -> FloatArray | None:
        """Of the devices, an output token, prompts included."""
        return None if self.watts is None else self.watts / self.tokens_per_s


def touched(case: Case, requests: float | FloatArray, width: int, draws: Draws) -> FloatArray:
    """Distinct experts that ``requests`` times ``width`` consecutive tokens touch in a layer, by draw."""
    return touched_by(case, [Group(requests, width, 0.0, 0.0)], draws)


def touched_by(case: Case, groups: Sequence[Group], draws: Draws) -> FloatArray:
    """Distinct experts a layer of a pass, by draw.

    Requests are independent, the tokens of one alike: ``w`` of them touch what ``w^beta`` independent ones would, beta
    0.73 [0.69, 0.77]. ``sum_e (1 - prod_groups (1 - min(1, p_e u_w / k))^B)``, p the popularity.
    """
    e = case.model.experts
    if e is None:
        return np.zeros(draws.count + 1)
    beta = draws.between("beta", 0.69, experts.WITHIN_REQUEST_EXPONENT, 0.77)
    popularity = experts.power_law_popularity(e.num_experts, e.experts_per_token, case.skew)
    # Equally popular experts are one term, times their number.
    values, counts = (
        (popularity[:1], np.array([e.num_experts])) if case.skew == 0 else (popularity, np.ones(e.num_experts))
    )
    missed = np.ones((draws.count + 1, values.size))
    pairs = np.zeros(draws.count + 1)
    for group in groups:
        if group.width < 1:
            continue
        one = experts.uniform(e.num_experts, e.experts_per_token, np.maximum(1.0, group.width**beta))
        reach = np.minimum(1.0, values * (one[:, None] / e.experts_per_token))
        many = np.broadcast_to(np.asarray(group.requests, dtype=np.float64), one.shape)
        missed = missed * (1.0 - reach) ** many[:, None]
        pairs = pairs + many * group.width * e.experts_per_token
    found = ((1.0 - missed) * counts).sum(axis=1)
    least = np.minimum(float(e.experts_per_token), pairs)
    return np.clip(found, least, np.minimum(float(e.num_experts), pairs))


def run_pass(case: Case, groups: Sequence[Group], draws: Draws) -> Part:
    """Time of one pass over groups of requests: products of all their tokens together, attention of each group."""
    model, one = case.model, np.ones(draws.count + 1)
    tokens = one * np.sum([g.tokens * one for g in groups], axis=0)
    logits = one * np.sum([g.logits * one for g in groups], axis=0)
    found: list[Part] = []
    for matrix in model.matrices:
        if matrix.role == "embedding" or (matrix.role == "lm_head" and not np.any(logits)):
            continue
        rows, copies = (logits if matrix.role == "lm_head" else tokens), one
        if matrix.role == "expert" and model.experts is not None:
            copies = touched_by(case, groups, draws)
            rows = experts.tokens_per_expert(model.experts.experts_per_token, tokens, copies)
        found.append(
            case.machine.product(case.format(matrix.role), rows, matrix.n, matrix.k, copies, matrix.count, draws)
        )
    for group in groups:
        found += _attention(case, group, draws)
    found.append(case.machine.communication(tokens, model.hidden_size, model.num_layers, draws))
    found.append(case.machine.glue(model.num_layers, model.experts.num_layers if model.experts else 0, draws))
    return total(found).times(case.machine.unmodelled(draws))


def _attention(case: Case, group: Group, draws: Draws) -> list[Part]:
    found = []
    for kind in case.model.attention:
        length, seen = group.past + group.width, group.past + (group.width + 1) / 2.0
        if kind.window is not None:
            length, seen = min(length, kind.window + group.width - 1.0), min(seen, float(kind.window))
        moved = KV_BYTES[case.kv] * group.requests * length * kind.kv_elements_per_token
        heads = 2 * kind.kv_elements_per_token if kind.kind == "mla" else kind.head_dim + kind.v_head_dim
        pairs = group.tokens * seen * kind.num_heads
        if not case.io_aware:
            moved = moved + 2.0 * 4.0 * pairs  # bf16 scores and weights, each written and read
        found.append(case.machine.attention(moved, 2.0 * pairs * heads, kind.num_layers, draws))
    return found


def total(parts: Sequence[Part]) -> Part:
    """All of them, one after another."""
    found = parts[0]
    for part in parts[1:]:
        found = found + part
    return found


def prefill(case: Case, draws: Draws) -> Part:
    """One prompt, less what the prefix cache holds (at least its last token runs), in chunks."""
    new = max(1, round(case.isl * (1.0 - case.prefix_hit)))
    cached = case.isl - new
    chunk = case.machine.chunk(case.weights, new)
    full, rest = divmod(new, chunk)
    parts = [run_pass(case, [Group(1, chunk, cached + (full - 1) * chunk / 2.0, 0)], draws).times(float(full))]
    if rest:
        parts.append(run_pass(case, [Group(1, rest, cached + full * chunk, 0)], draws))
    head = next(m for m in case.model.matrices if m.role == "lm_head")
    one = np.ones(draws.count + 1)
    parts.append(case.machine.product(case.format("lm_head"), one, head.n, head.k, one, 1, draws))
    return total(parts)


def decode_step(case: Case, requests: float | FloatArray, draws: Draws) -> tuple[Part, FloatArray]:
    """A step of so many requests at their mean context, drafts and verification in; and the tokens it yields a request."""
    spec, past = case.speculation, case.isl + case.mean_osl / 2.0
    plain = run_pass(case, [Group(requests, 1, past, requests)], draws)
    if spec is None:
        return plain, np.ones(draws.count + 1)
    verify = run_pass(case, [Group(requests, spec.width, past, requests * spec.width)], draws)
    return verify + plain.times(spec.draft_passes * spec.draft + spec.fixed), spec.tokens_per_step(draws)


def longest_over_mean(requests: int, cut: float = LONGEST_OUTPUT) -> float:
    """E[longest] / E[mean] of so many exponential output lengths, each cut at ``cut`` times the mean before cutting."""
    x = np.linspace(0.0, cut, 2001)
    unfinished = 1.0 - (-np.expm1(-x)) ** requests
    longest = float(np.sum((unfinished[1:] + unfinished[:-1]) / 2.0) * (x[1] - x[0]))
    return max(1.0, longest / -math.expm1(-cut))


def price(case: Case, draws: Draws | None = None) -> Priced:
    """Answers and output tokens a second of a case, prompts included.

    ``X = B o / (B t_prefill + o' t_step / tau)``: o' is o with continuous batching and the longest output of the batch
    without; ``t_step = t_verify(B, w) + (passes c_draft + c_fixed) t_plain``.
    """
    draws = draws or Draws()
    requests, spec = case.running, case.speculation
    step, tokens = decode_step(case, requests, draws)
    spent = case.osl * draws.between("spent", *case.spent) if case.spent[2] > case.spent[0] else case.mean_osl
    steps = np.maximum(1.0, spent / tokens * (1.0 if case.continuous else longest_over_mean(requests)))
    one = prefill(case, draws)
    prompts = one.times(float(requests))
    whole = prompts + step.times(steps)
    experts_touched = None
    if case.model.experts is not None:
        experts_touched = float(touched(case, requests, spec.width if spec else 1, draws)[0])
    answers = requests / whole.time_s
    return Priced(
        case=case,
        answers_per_s=answers,
        tokens_per_s=answers * spent,
        step_s=step.time_s,
        prefill_s=one.time_s,
        prompt_share=prompts.time_s / whole.time_s,
        tokens_per_step=tokens,
        touched_experts=experts_touched,
        watts=case.machine.power(whole, draws),
        parts=whole,
    )
