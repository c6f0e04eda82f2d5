"""A point as calls to time: data of the right shape that comes from DRAM, and the answer checked first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from typing import Any, Protocol

import numpy as np

from .. import reference
from ..errors import AssayError
from ..ops import info, int4, int8, moe, moe_experts, speculative
from ..profile import GEMM_OPS
from .arena import Ring
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


class Data(Protocol):
    """Where the data of calls lie, and how ops are called on data there."""

    @property
    def arena(self) -> Ring:
        """What weights and logits are pieces of."""
        ...

    #: Of a product with 16-bit activations: the largest error, as a share of the largest value.
    float_error: float

    def variant(self, op: str) -> str:
        """The kernel that an op runs."""
        ...

    def put(self, array: np.ndarray) -> Any:
        """The array, there."""
        ...

    def get(self, array: Any) -> np.ndarray:
        """An array from there, once it is written."""
        ...

    def activations(self, op: str, array: np.ndarray) -> Any:
        """float32 activations as the op takes them there."""
        ...

    def matrix_bytes(self, op: str, n: int, k: int, group_size: int, symmetric: bool) -> int:
        """Bytes of packed weights."""
        ...

    def matrix(self, op: str, n: int, k: int, group_size: int, symmetric: bool, data: Any) -> Any:
        """A piece of the arena as weights of an op."""
        ...

    def head(self, w: Any, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """The first columns of such weights, as the reference takes them."""
        ...

    def experts(
        self, shape: moe_experts.ExpertsShape, known: tuple[int, bool], data: Any, gate_up: int, down: int
    ) -> Any:
        """A piece of the arena as an expert layer; bytes of an expert's two matrices."""
        ...

    def logits(self, piece: Any, rows: int, vocab: int) -> Any:
        """A piece of the arena as float32 [rows, vocab]."""
        ...

    def options(self, point: Point) -> dict[str, Any]:
        """What a point's calls are told besides; outputs that they write, if they need them."""
        ...


class HostData:
    """On the host: numpy arrays."""

    float_error = 1e-4

    def __init__(self, arena: Ring) -> None:
        self.arena = arena
        self._variants = info.kernel_versions()

    def variant(self, op: str) -> str:
        return self._variants[KERNELS[op]]

    def put(self, array: np.ndarray) -> np.ndarray:
        return array

    def get(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def activations(self, op: str, array: np.ndarray) -> np.ndarray:
        return array

    def matrix_bytes(self, op: str, n: int, k: int, group_size: int, symmetric: bool) -> int:
        return int(packed_bytes(n, k, group_size, symmetric, 8 if op == "w8a8_gemm" else 4))

    def matrix(self, op: str, n: int, k: int, group_size: int, symmetric: bool, data: Any) -> Any:
        if op == "w8a8_gemm":
            return int8.PackedInt8(n, k, group_size, data)
        return int4.PackedInt4(n, k, group_size, symmetric, data)

    def head(self, w: Any, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        # Tiles of columns lie one behind the other: the first ones are a matrix of their own.
        op = "w8a8_gemm" if isinstance(w, int8.PackedInt8) else ""
        shape = (columns, w.k, w.group_size, getattr(w, "symmetric", True))
        found: tuple[np.ndarray, np.ndarray, np.ndarray | None]
        found = self.matrix(op, *shape, w.data[: self.matrix_bytes(op, *shape)]).unpack()
        return found

    def experts(
        self, shape: moe_experts.ExpertsShape, known: tuple[int, bool], data: Any, gate_up: int, down: int
    ) -> moe_experts.PackedExperts:
        touched = shape.num_experts
        first, rest = data[: touched * gate_up].reshape(touched, gate_up), data[touched * gate_up :]
        return moe_experts.PackedExperts(shape, first, known, None, rest.reshape(touched, down), known, None)

    def logits(self, piece: Any, rows: int, vocab: int) -> np.ndarray:
        found: np.ndarray = piece.view(np.float32).reshape(rows, vocab)
        return found

    def options(self, point: Point) -> dict[str, Any]:
        return {"num_threads": point.threads}


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
    data
        Where they are; an arena is one of the host's.
    seed
        Of activations and choices.
    """

    def __init__(self, data: Data | Ring, seed: int) -> None:
        self._data: Data = HostData(data) if isinstance(data, Ring) else data
        self._arena, self._seed = self._data.arena, seed
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
            **dict.fromkeys(GEMM_OPS, self._gemm),
            "moe_route": self._route,
            "moe_experts": self._experts,
            "chain_verify": self._verify,
        }
        variant = self._data.variant(point.op)
        try:
            return Workload(variant, makers[point.op](point))
        except AssertionError as exc:
            raise AssayError(f"{point.op} ({variant}) gave a wrong answer at {point.label}: {exc}") from exc

    def stack(self, point: Point) -> tuple[str, list[Iterator[Call]]]:
        """The variant of a stack's products, and the rotation of each of its calls in order; one call of each shape was checked.

        Raises
        ------
        AssayError
            As `make`.
        """
        query, keys, wide, down = (self.make(part).rotation for part, _ in point.parts)
        layer = [query, keys, keys, query, wide, wide, down]
        return self._data.variant(point.params["of"]), layer * point.params["layers"]

    # ---- matrix products ----

    def _gemm(self, point: Point) -> Iterator[Call]:
        p, op, at = point.params, point.op, self._data
        m, n, k, group_size, symmetric = (p[name] for name in ("m", "n", "k", "group_size", "symmetric"))
        products: dict[str, Callable[..., Any]] = {
            "w4a8_gemm": int4.w4a8_gemm, "w4a16_gemm": int4.w4a16_gemm, "w8a8_gemm": int8.w8a8_gemm,
            "w4a16_gemv": partial(int4.w4a16_gemm, isa="gemv"),
        }  # fmt: skip
        references = {"w4a16_gemv": reference.w4a16_gemm}
        gemm = products[op]
        nbytes = at.matrix_bytes(op, n, k, group_size, symmetric)
        options = at.options(point)

        def weights() -> Any:
            return at.matrix(op, n, k, group_size, symmetric, self._arena.take(nbytes))

        a = at.activations(op, self._rng(m, k).standard_normal((m, k), dtype=np.float32))
        out = at.put(np.zeros((m, n), np.float32))
        first = weights()
        gemm(a, first, out, **options)
        # Two rows stand for all, since a row's bits do not depend on the others.
        columns = min(n, CHECKED_COLUMNS)
        rows = at.get(a)[:2].astype(np.float32)
        want = (references.get(op) or getattr(reference, op))(rows, *at.head(first, columns), group_size)
        error = at.float_error if op.startswith("w4a16") else 1e-4
        np.testing.assert_allclose(at.get(out)[:2, :columns], want, rtol=error, atol=error * float(np.abs(want).max()))
        if p.get("resident") == "llc":
            return cycle([partial(gemm, a, first, out, **options)])
        return (partial(gemm, a, weights(), out, **options) for _ in count())

    # ---- experts ----

    def _route(self, point: Point) -> Iterator[Call]:
        """The same logits each time: in a model they have just been written, and lie in the cache."""
        p, at = point.params, self._data
        logits = self._rng(p["tokens"], p["num_experts"]).standard_normal(
            (p["tokens"], p["num_experts"]), dtype=np.float32
        )
        call = partial(moe.moe_route, at.put(logits), p["top_k"], **at.options(point))
        got = call()
        want = reference.moe_route(logits, p["top_k"], True)
        np.testing.assert_array_equal(at.get(got.topk_ids), want[1])
        np.testing.assert_allclose(at.get(got.topk_weights), want[0], rtol=1e-5)
        return cycle([call])

    def _experts(self, point: Point) -> Iterator[Call]:
        """Tokens spread as evenly as can be over the experts that the call touches; others it has none, since they cost nothing."""
        p, at = point.params, self._data
        hidden, width, touched = p["hidden_size"], p["intermediate_size"], p["distinct_experts"]
        shape = moe_experts.ExpertsShape(touched, hidden, width)
        known = (p["group_size"], p["symmetric"])
        up, down = (at.matrix_bytes(point.op, *nk, *known) for nk in expert_matrices(hidden, width))
        rng = self._rng(p["tokens"], touched, hidden)
        # Small, so that gates stay in the range that an activation is made for.
        x = 1e-3 * rng.standard_normal((p["tokens"], hidden), dtype=np.float32)
        weights = np.full((p["tokens"], p["top_k"]), 1.0 / p["top_k"], np.float32)
        slots = np.arange(weights.size).reshape(weights.shape) % touched
        options = at.options(point)

        def layer() -> Any:
            return at.experts(shape, known, self._arena.take(touched * (up + down)), up, down)

        def ids() -> np.ndarray:
            return rng.permutation(touched).astype(np.int32)[slots]

        self._check_experts(layer(), x[:1], ids()[:1], weights[:1], options)
        x, weights, out = at.put(x), at.put(weights), at.put(np.zeros_like(x))
        routes = cycle([at.put(ids()) for _ in range(ROUTES)])
        return (partial(moe_experts.moe_experts, x, next(routes), weights, layer(), out, **options) for _ in count())

    def _check_experts(
        self, layer: Any, x: np.ndarray, ids: np.ndarray, weights: np.ndarray, options: dict[str, Any]
    ) -> None:
        """One token, by the package's own products and a plain activation: those are checked against the reference."""
        at = self._data
        there = at.put(x)
        got = at.get(moe_experts.moe_experts(there, at.put(ids), at.put(weights), layer, **options))
        want = np.zeros_like(got)
        for expert, weight in zip(ids[0], weights[0], strict=True):
            up, down = layer.expert(int(expert))
            tiles = at.get(int4.w4a8_gemm(there, up)).reshape(-1, 2, 16)
            gate, value = tiles[:, 0].ravel(), tiles[:, 1].ravel()
            hidden = (gate / (1.0 + np.exp(-gate)) * value)[None, : down.k].astype(np.float32)
            want += weight * at.get(int4.w4a8_gemm(at.put(hidden), down))
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
        p, at = point.params, self._data
        batch, draft, vocab = p["batch"], p["num_draft"], p["vocab"]
        best = self._greedy(batch * (draft + 1), vocab)
        cu = np.arange(0, batch * draft + 1, draft, dtype=np.int32) if draft else np.zeros(batch + 1, np.int32)
        uniforms = np.full(batch * (draft + 2), 0.5)
        uniforms.reshape(batch, draft + 2)[:, :draft] = 1e-12
        rule: dict[str, Any] = {"temperature": 0.0 if p["rule"] == "greedy" else 1.0, "rule": p["rule"]}
        options = {**rule, **at.options(point), "uniforms": at.put(uniforms)}
        offsets = at.put(cu)
        drafts: dict[int, tuple[np.ndarray, Any]] = {}

        def arguments() -> tuple[Any, np.ndarray, Any]:
            slot, piece = self._arena.take_slot(4 * batch * (draft + 1) * vocab)
            if slot not in drafts:
                ids = np.ascontiguousarray(best[slot].reshape(batch, draft + 1)[:, :draft]).ravel()
                drafts[slot] = ids, at.put(ids)
            return at.logits(piece, batch * (draft + 1), vocab), *drafts[slot]

        there, ids, ids_there = arguments()
        got = speculative.verify_chain(there, ids_there, offsets, **options)
        accepted = at.get(got.num_accepted)
        assert (accepted == draft).all(), f"accepted {accepted} of {draft}"
        rows = at.get(there)
        want = np.asarray(
            speculative.verify_chain(rows, ids, cu, **rule, uniforms=uniforms, backend="reference").output_token_ids
        )
        tokens = at.get(got.output_token_ids)
        np.testing.assert_array_equal(tokens[:, :draft], want[:, :draft])
        if p["rule"] == "greedy":
            np.testing.assert_array_equal(tokens, want)
        else:
            for row, token in zip(rows[draft :: draft + 1], tokens[:, draft], strict=True):
                miss = missed_mass(row, int(token), uniforms[-1])
                assert miss <= SAMPLED_MASS, f"token {token} is {miss:.1g} of the mass away from its uniform number"
        return (
            partial(speculative.verify_chain, logits, ids_of, offsets, **options)
            for logits, _, ids_of in (arguments() for _ in count())
        )
