"""A point as calls to time: data of the right shape that comes from DRAM, and the answer checked first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any

import numpy as np

from .. import reference
from ..errors import AssayError
from ..ops import info, int4, int8, moe, moe_experts, speculative
from .arena import Arena
from .clock import Call
from .points import Point, expert_matrices, packed_bytes

#: Columns of a GEMM that are computed by the reference too, before anything is timed.
CHECKED_COLUMNS = 64
#: What float32 sums leave open in a draw by inverting the cumulative distribution: the bound that the law of these kernels is
#: proved to (docs/verification.md). A uniform number this near to a boundary may give the token on either side.
SAMPLED_MASS = 1e-6
#: Sets of chosen experts that the calls of an expert layer rotate through.
ROUTES = 8
KERNELS = {
    "w4a8_gemm": "int4_gemm",
    "w4a16_gemm": "int4_gemm",
    "w8a8_gemm": "int8_gemm",
    "moe_route": "moe_route",
    "moe_experts": "int4_gemm",
    "chain_verify": "spec_verify",
}


def missed_mass(logits: np.ndarray, token: int, uniform: float) -> float:
    """How far `uniform` is from the interval of the cumulative distribution, in float64, that is `token`'s; 0: inside."""
    weights = np.exp(logits.astype(np.float64) - float(logits.max()))
    ends = np.cumsum(weights) / weights.sum()
    begin = ends[token - 1] if token else 0.0
    return float(max(begin - uniform, uniform - ends[token], 0.0))


@dataclass(frozen=True)
class Workload:
    """The calls of one point, and the kernel variant that they run.

    Attributes
    ----------
    variant : str
    rotation : iterator
        Endless: the same computation on the next piece of the arena.
    """

    variant: str
    rotation: Iterator[Call]


class Workloads:
    """Makes workloads on one arena.

    Parameters
    ----------
    arena
        What weights and logits are pieces of.
    seed
        Of activations and choices.
    """

    def __init__(self, arena: Arena, seed: int) -> None:
        self._arena, self._seed = arena, seed
        self._variants = info.kernel_versions()
        self._drafts: dict[tuple[int, int, int], np.ndarray] = {}

    def _rng(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, *key])

    def make(self, point: Point) -> Workload:
        """The calls of a point, after one of them was checked against the reference.

        Raises
        ------
        AssayError
            The kernel's answer is not the reference's: naming op, variant and shape.
        """
        makers: dict[str, Callable[[Point], Iterator[Call]]] = {
            "w4a8_gemm": self._gemm,
            "w4a16_gemm": self._gemm,
            "w8a8_gemm": self._gemm,
            "moe_route": self._route,
            "moe_experts": self._experts,
            "chain_verify": self._verify,
        }
        variant = self._variants[KERNELS[point.op]]
        try:
            return Workload(variant, makers[point.op](point))
        except AssertionError as exc:
            raise AssayError(f"{point.op} ({variant}) gave a wrong answer at {point.label}: {exc}") from exc

    # ---- matrix products ----

    def _gemm(self, point: Point) -> Iterator[Call]:
        p, threads = point.params, point.threads
        m, n, k, group_size, symmetric = (p[name] for name in ("m", "n", "k", "group_size", "symmetric"))
        products: dict[str, Callable[..., Any]] = {
            "w4a8_gemm": int4.w4a8_gemm, "w4a16_gemm": int4.w4a16_gemm, "w8a8_gemm": int8.w8a8_gemm,
        }  # fmt: skip
        gemm = products[point.op]
        bits = 8 if point.op == "w8a8_gemm" else 4
        nbytes = int(packed_bytes(n, k, group_size, symmetric, bits))

        def matrix(data: np.ndarray, columns: int) -> Any:
            if bits == 8:
                return int8.PackedInt8(columns, k, group_size, data)
            return int4.PackedInt4(columns, k, group_size, symmetric, data)

        a = self._rng(m, k).standard_normal((m, k), dtype=np.float32)
        out = np.zeros((m, n), np.float32)
        data = self._arena.take(nbytes)
        gemm(a, matrix(data, n), out, num_threads=threads)
        # Tiles of columns lie one behind the other: the first two are a matrix of their own. Two rows stand for all, since a
        # row's bits do not depend on the others.
        columns = min(n, CHECKED_COLUMNS)
        head = data[: int(packed_bytes(columns, k, group_size, symmetric, bits))]
        want = getattr(reference, point.op)(a[:2], *matrix(head, columns).unpack(), group_size)
        np.testing.assert_allclose(out[:2, :columns], want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))
        weights = (matrix(self._arena.take(nbytes), n) for _ in count())
        return (partial(gemm, a, w, out, num_threads=threads) for w in weights)

    # ---- experts ----

    def _route(self, point: Point) -> Iterator[Call]:
        """The same logits each time: in a model they have just been written, and lie in the cache."""
        p = point.params
        logits = self._rng(p["tokens"], p["num_experts"]).standard_normal(
            (p["tokens"], p["num_experts"]), dtype=np.float32
        )
        got = moe.moe_route(logits, p["top_k"], num_threads=point.threads)
        want = reference.moe_route(logits, p["top_k"], True)
        np.testing.assert_array_equal(got.topk_ids, want[1])
        np.testing.assert_allclose(got.topk_weights, want[0], rtol=1e-5)
        return cycle([partial(moe.moe_route, logits, p["top_k"], num_threads=point.threads)])

    def _experts(self, point: Point) -> Iterator[Call]:
        """Tokens spread as evenly as can be over the experts that the call touches; others it has none, since they cost nothing."""
        p = point.params
        hidden, width, touched = p["hidden_size"], p["intermediate_size"], p["distinct_experts"]
        shape = moe_experts.ExpertsShape(touched, hidden, width)
        known = (p["group_size"], p["symmetric"])
        up, down = (int(packed_bytes(*nk, *known)) for nk in expert_matrices(hidden, width))
        rng = self._rng(p["tokens"], touched, hidden)
        # Small, so that gates stay in the range that an activation is made for.
        x = 1e-3 * rng.standard_normal((p["tokens"], hidden), dtype=np.float32)
        weights = np.full((p["tokens"], p["top_k"]), 1.0 / p["top_k"], np.float32)
        slots = np.arange(weights.size).reshape(weights.shape) % touched
        out = np.zeros_like(x)

        def layer() -> moe_experts.PackedExperts:
            data = self._arena.take(touched * (up + down))
            gate_up, rest = data[: touched * up].reshape(touched, up), data[touched * up :].reshape(touched, down)
            return moe_experts.PackedExperts(shape, gate_up, known, None, rest, known, None)

        def ids() -> np.ndarray:
            return rng.permutation(touched).astype(np.int32)[slots]

        self._check_experts(layer(), x[:1], ids()[:1], weights[:1], point.threads)
        routes = cycle([ids() for _ in range(ROUTES)])
        layers = (layer() for _ in count())
        return (
            partial(moe_experts.moe_experts, x, next(routes), weights, w, out, num_threads=point.threads)
            for w in layers
        )

    def _check_experts(self, layer: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, threads: int) -> None:
        """One token, by the package's own products and a plain activation: those are checked against the reference."""
        got = moe_experts.moe_experts(x, ids, weights, layer, num_threads=threads)
        want = np.zeros_like(got)
        for expert, weight in zip(ids[0], weights[0], strict=True):
            up, down = layer.expert(int(expert))
            tiles = int4.w4a8_gemm(x, up).reshape(-1, 2, 16)
            gate, value = tiles[:, 0].ravel(), tiles[:, 1].ravel()
            hidden = (gate / (1.0 + np.exp(-gate)) * value)[None, : down.k].astype(np.float32)
            want += weight * int4.w4a8_gemm(hidden, down)
        # The activation's last bit may round another way, and with it a code of an int8 activation: 1/127 of a group's range.
        np.testing.assert_allclose(got, want, rtol=0.02, atol=0.02 * float(np.abs(want).max()))

    # ---- chain verification ----

    def _greedy(self, rows: int, vocab: int) -> np.ndarray:
        """The largest logit of every row of every slot of the arena's period, int32 [slots, rows]."""
        slots = self._arena.slots(4 * rows * vocab)
        key = (slots, rows, vocab)
        if key not in self._drafts:
            noise = self._arena.period[: slots * rows * vocab]
            self._drafts[key] = noise.reshape(slots, rows, vocab).argmax(-1).astype(np.int32)
        return self._drafts[key]

    def _verify(self, point: Point) -> Iterator[Call]:
        """Every draft is accepted, so that each of the K + 1 rows is read."""
        p = point.params
        batch, draft, vocab = p["batch"], p["num_draft"], p["vocab"]
        best = self._greedy(batch * (draft + 1), vocab)
        cu = np.arange(0, batch * draft + 1, draft, dtype=np.int32) if draft else np.zeros(batch + 1, np.int32)
        uniforms = np.full(batch * (draft + 2), 0.5)
        uniforms.reshape(batch, draft + 2)[:, :draft] = 1e-12
        options: dict[str, Any] = {
            "temperature": 0.0 if p["rule"] == "greedy" else 1.0, "rule": p["rule"], "uniforms": uniforms,
        }  # fmt: skip

        def arguments() -> tuple[np.ndarray, np.ndarray]:
            slot, piece = self._arena.take_slot(4 * batch * (draft + 1) * vocab)
            ids = np.ascontiguousarray(best[slot].reshape(batch, draft + 1)[:, :draft]).ravel()
            return piece.view(np.float32).reshape(batch * (draft + 1), vocab), ids

        rows, ids = arguments()
        got = speculative.verify_chain(rows, ids, cu, **options, num_threads=point.threads)
        assert (np.asarray(got.num_accepted) == draft).all(), f"accepted {got.num_accepted} of {draft}"
        want = np.asarray(speculative.verify_chain(rows, ids, cu, **options, backend="reference").output_token_ids)
        tokens = np.asarray(got.output_token_ids)
        np.testing.assert_array_equal(tokens[:, :draft], want[:, :draft])
        if p["rule"] == "greedy":
            np.testing.assert_array_equal(tokens, want)
        else:
            for row, token in zip(rows[draft :: draft + 1], tokens[:, draft], strict=True):
                miss = missed_mass(row, int(token), uniforms[-1])
                assert miss <= SAMPLED_MASS, f"token {token} is {miss:.1g} of the mass away from its uniform number"
        return (
            partial(speculative.verify_chain, *given, cu, **options, num_threads=point.threads)
            for given in (arguments() for _ in count())
        )
