"""One request and its rows for the twin of verification, as csrc/spec_rows.c has them. The passes are Numba's; what joins
them is scalar arithmetic, in Python with the same bits."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..reference.verify_arguments import VerifyArguments
from . import _philox
from . import _verify_passes as passes
from ._verify_passes import BLOCK
from ._vexp import vexp

OK, NAN, EMPTY, INF, BAD_ID, BAD_TREE = range(6)
ROWS_READ, ROWS_RESAMPLED, ZERO_DRAFTS, EMPTY_RESIDUALS = range(4)
_LARGEST = float(np.finfo(np.float32).max)
_F = np.float32


@dataclass
class Row:
    """A row that was read: float32 [V] after processors and filters, and its normaliser."""

    x: np.ndarray
    shift: Any
    scale: Any
    total: float
    log_total: float
    largest: np.ndarray
    sums: np.ndarray


@dataclass
class Node:
    """Of the tree; node 0 is the root, node j + 1 draft j, and 0 stands for none."""

    parent: int = 0
    children: list[int] = field(default_factory=list)
    depth: int = 0
    rank: int = 0
    remaining: list[int] = field(default_factory=list)
    a: float = 1.0
    c: float = 0.0
    p: float = 1.0
    drawn: float = 0.0
    score: Any = 0.0  # float32 once it is one


class BadRowError(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Request:
    """One request: its tree, its rows, and the draws from them."""

    def __init__(self, logits: np.ndarray, a: VerifyArguments, b: int) -> None:
        self.arguments, self.b, self.logits = a, b, logits
        self.first, self.drafts = int(a.cu[b]), int(a.cu[b + 1] - a.cu[b])
        self.counters = [0, 0, 0, 0]
        t = a.temperature[b]
        self.greedy = a.rule == "greedy" or t == 0
        smallest = np.finfo(_F).tiny
        with np.errstate(over="ignore"):
            self.inverse_t = _F(1) if self.greedy else min(max(_F(1) / _F(t), smallest), _F(_LARGEST))
        self.summed = a.logprobs or (not self.greedy and (a.rule != "gumbel" or self._has_filters()))
        self.rows: dict[int, Row] = {}
        self.mass = np.empty(-(-a.vocab // BLOCK))
        self.weights = np.empty(BLOCK, _F)
        self.excluded: list[int] = []
        self.q_row: np.ndarray | None = None
        self.nodes = self._tree()

    def _tree(self) -> list[Node | None]:
        a = self.arguments
        nodes: list[Node | None] = [Node()]
        for j in range(self.drafts):
            parent = j - 1 if a.parents is None else int(a.parents[self.first + j])
            if not -1 <= parent < j:
                raise BadRowError(BAD_TREE)
            above, token = nodes[parent + 1], int(a.ids[self.first + j])
            if token == -1 or above is None:
                nodes.append(None)
                continue
            if token < -1:
                raise BadRowError(BAD_ID)
            nodes.append(Node(parent + 1, [], above.depth + 1, len(above.children)))
            above.children.append(j + 1)
        return nodes

    def node(self, at: int) -> Node:
        found = self.nodes[at]
        assert found is not None
        return found

    def token(self, node: int) -> int:
        return int(self.arguments.ids[self.first + node - 1])

    def uniform(self, domain: int, node: int, depth: int, key: int = 0) -> float:
        a = self.arguments
        if a.uniforms is not None:
            start = self.first + 2 * self.b
            slot = depth if a.rule == "sampled" else (node - 1 if domain == 1 else self.drafts + domain - 2)
            return float(a.uniforms[start + slot])
        assert a.seed is not None
        position = (int(self._position()) + depth) & (2**64 - 1)
        words = (np.uint64(x) for x in (int(a.seed[self.b]), position, domain, key))
        return float(_philox.uniform(*words))

    def _position(self) -> int:
        assert self.arguments.position is not None
        return int(self.arguments.position[self.b])

    # ---- processors and filters

    def _has_filters(self) -> bool:
        a, b = self.arguments, self.b
        return bool(
            (a.top_k is not None and 0 < a.top_k[b] < a.vocab) or (a.top_p is not None and a.top_p[b] < 1)
            or (a.min_p is not None and a.min_p[b] > 0) or (a.typical_p is not None and a.typical_p[b] < 1)
        )  # fmt: skip

    def _process(self, node: int, row: int) -> np.ndarray:
        a, b = self.arguments, self.b
        x = self.logits[row].astype(_F, copy=True)
        if a.edits is not None:
            own = slice(a.edits.cu[b], a.edits.cu[b + 1])
            touched = {int(t): [int(p or n), int(n), v] for t, p, n, v in zip(
                a.edits.ids[own], a.edits.in_prompt[own], a.edits.count[own], a.edits.bias[own], strict=True)}  # fmt: skip
            while a.repetition_penalty is not None and node > 0:
                entry = touched.setdefault(self.token(node), [1, 0, _F(0)])
                entry[0], entry[1] = 1, entry[1] + 1
                node = self.node(node).parent
            for token, (seen, count, bias) in touched.items():
                if token < a.vocab:
                    x[token] = self._edited(x[token], seen, count) + bias
        if a.bitmask is not None:
            words = a.bitmask[row if a.bitmask_per_row else b]
            ids = np.arange(a.vocab)
            x[(words[ids >> 5] >> (ids & 31).astype(np.uint32) & np.uint32(1)) == 0] = -np.inf
        return x

    def _edited(self, logit: Any, seen: int, count: int) -> Any:
        a, b = self.arguments, self.b
        if a.repetition_penalty is None or a.frequency_penalty is None or a.presence_penalty is None:
            return logit
        penalty = a.repetition_penalty[b]
        if seen and penalty != 1:
            logit = logit / penalty if logit > 0 else logit * penalty
        if count:
            logit = logit - a.frequency_penalty[b] * _F(count)
            logit = logit - a.presence_penalty[b]
        return logit

    def _filter(self, x: np.ndarray, top: Any, total: float) -> None:
        a, b, t = self.arguments, self.b, self.inverse_t
        keys, weights = np.empty(a.vocab, np.uint32), np.empty(a.vocab, _F)
        passes.logit_keys(x, keys)
        passes.weights_of(x, top, t, weights)
        elements = 0 if a.top_k is None else int(a.top_k[b])
        if 0 < elements < a.vocab and self._cut(x, keys, passes.select_first(x, keys, weights, elements, 0.0)):
            total = passes.total_mass(x, weights)
        if a.top_p is not None and a.top_p[b] < 1:
            self._cut(x, keys, passes.select_first(x, keys, weights, 0, float(a.top_p[b]) * total))
        if a.min_p is not None and a.min_p[b] > 0:
            x[~(weights >= a.min_p[b])] = -np.inf
        if a.typical_p is not None and a.typical_p[b] < 1:
            mass, total = passes.exponent_sums(x, top, t)
            passes.distance_keys(x, top, t, _F(mass / total), keys)
            self._cut(x, keys, passes.select_first(x, keys, weights, 0, float(a.typical_p[b]) * total))

    @staticmethod
    def _cut(x: np.ndarray, keys: np.ndarray, found: tuple[int, int]) -> bool:
        if found[0] >= 0:
            passes.cut(x, keys, *found)
        return found[0] >= 0

    # ---- reading

    def row(self, node: int) -> Row:
        if node not in self.rows:
            self.counters[ROWS_READ] += 1
            at = self.first + self.b + node
            if not (self.logits[at] < np.inf).all():
                raise BadRowError(NAN if np.isnan(self.logits[at]).any() else INF)
            found = self._scan(self._process(node, at))
            if not self.greedy and self._has_filters():
                self._filter(found.x, found.shift, found.total)
                found = self._scan(found.x)
            self.rows[node] = found
        return self.rows[node]

    def _scan(self, x: np.ndarray) -> Row:
        blocks = len(self.mass)
        largest, sums = np.empty(blocks, _F), np.empty(blocks, _F)
        if np.isnan(x).any():
            raise BadRowError(NAN)
        passes.scan(x, self.inverse_t, self.summed, largest, sums)
        shift = largest.max()
        if not np.isfinite(shift):
            raise BadRowError(INF if shift > 0 else EMPTY)
        row = Row(x, shift, _F(0), 0.0, 0.0, largest, sums)
        if self.summed:
            for b in range(blocks):
                row.total += self._weight(row, b)
            row.scale = _F(1.0 / row.total)
            row.log_total = float(_philox.log(row.total))
        return row

    def _factor(self, row: Row, b: int) -> float:
        return float(vexp((row.largest[b] - row.shift) * self.inverse_t))

    def _weight(self, row: Row, b: int) -> float:
        return float(row.sums[b]) * self._factor(row, b) if row.sums[b] > 0 else 0.0

    def argmax(self, row: Row) -> int:
        return int((row.x == row.shift).argmax())

    def probability(self, row: Row, token: int) -> float:
        if not 0 <= token < self.arguments.vocab:
            return 0.0
        return float(vexp((row.x[token] - row.shift) * self.inverse_t) * row.scale)

    def log_probability(self, row: Row, token: int) -> float:
        return float((row.x[token] - row.shift) * self.inverse_t) - row.log_total

    # ---- q and residuals

    def has_q(self) -> bool:
        return self.arguments.draft_probs is not None or self.arguments.sparse_ids is not None

    def take_q(self, node: int) -> None:
        """Makes q what the node's children were drawn from."""
        a, row = self.arguments, self.first + self.node(node).children[0] - 1
        if a.draft_probs is not None:
            self.q_row = a.draft_probs[row]
        elif a.sparse_ids is not None and a.sparse_probs is not None:
            self.q_row = np.zeros(a.vocab, _F)
            for token, q in zip(a.sparse_ids[row].tolist(), a.sparse_probs[row], strict=True):
                if 0 <= token < a.vocab:
                    self.q_row[token] += q

    def q(self, token: int) -> float:
        """Of a draft, checked."""
        assert self.q_row is not None
        if not 0 <= token < self.arguments.vocab:
            return 0.0
        q = float(self.q_row[token])
        if not 0 <= q <= _LARGEST:
            raise BadRowError(NAN)
        return q

    def residual(self, row: Row, a: float, c: float) -> float:
        self.counters[ROWS_RESAMPLED] += 1
        self.scales = _F(float(row.scale) * a), _F(c)
        passes.residual(row.x, row.shift, self.inverse_t, self.scales[0], self.q_row, self.scales[1], self.mass)
        total = 0.0
        for mass in self.mass:
            total += float(mass)
        if np.isnan(total):
            raise BadRowError(NAN)
        return total

    # ---- draws

    def _place(self, target: float) -> tuple[int, float, float]:
        block, before, at = 0, 0.0, 0.0
        for b, mass in enumerate(self.mass.tolist()):
            if at + mass > target:
                return b, at, target
            if mass > 0:
                block, before = b, at
            at += mass
        return block, before, np.inf

    def draw_residual(self, row: Row, target: float) -> int:
        assert self.q_row is not None
        b, before, target = self._place(target)
        own = slice(b * BLOCK, (b + 1) * BLOCK)
        passes.residual_block(row.x[own], row.shift, self.inverse_t, self.scales[0], self.q_row[own], self.scales[1],
                              self.weights)  # fmt: skip
        return b * BLOCK + int(passes.pick(self.weights, len(row.x[own]), 1.0, before, target))

    def _weights_without(self, row: Row, b: int) -> int:
        block = row.x[b * BLOCK : (b + 1) * BLOCK]
        passes.exponentials(block, row.largest[b], self.inverse_t, self.weights)
        for token in self.excluded:
            if token // BLOCK == b:
                self.weights[token % BLOCK] = 0
        return len(block)

    def mass_without(self, row: Row) -> float:
        """Weight of the row without the excluded tokens."""
        touched = {token // BLOCK for token in self.excluded}
        total = 0.0
        for b in range(len(self.mass)):
            self.mass[b] = self._weight(row, b)
            if b in touched and row.sums[b] > 0:
                self._weights_without(row, b)
                self.mass[b] = float(passes.fold(self.weights)) * self._factor(row, b)
            total += float(self.mass[b])
        return total

    def draw_without(self, row: Row, u: float) -> int:
        """A token of p without the excluded ones; -1 when nothing is left."""
        total = self.mass_without(row)
        if not total > 0:
            return -1
        b, before, target = self._place(u * total)
        n = self._weights_without(row, b)
        return b * BLOCK + int(passes.pick(self.weights, n, self._factor(row, b), before, target))

    def draw(self, row: Row, u: float) -> int:
        self.excluded = []
        return self.draw_without(row, u)

    def race(self, row: Row, node: int, depth: int) -> int:
        self.counters[ROWS_RESAMPLED] += 1
        if self.arguments.uniforms is not None:
            given = self.arguments.uniforms[self.first + self.b + node]
            return int(passes.race_of(row.x, row.shift, self.inverse_t, given))
        assert self.arguments.seed is not None
        position = np.uint64((self._position() + depth) & (2**64 - 1))
        return int(passes.race(row.x, row.shift, self.inverse_t, self.arguments.seed[self.b], position))

    def mean_exponent(self, row: Row) -> tuple[float, float]:
        """The mean under p of z = (l - shift) / T, and the sum of exp(z)."""
        mass, total = passes.exponent_sums(row.x, row.shift, self.inverse_t)
        return float(mass / total), float(total)
