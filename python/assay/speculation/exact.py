"""Models on which the float32 arithmetic of verification loses nothing, so that its kernels can be held against 1e-12.

A kernel's weights exp(l - max) are powers of two where p is a vector of powers of two: with logits that are multiples of
log 2 rounded to float32, its exp gives them without an error. What a rule then multiplies and divides by stays a short
binary fraction where every mass that it divides by (|R(A, C)|, and D of traversal, in csrc/assay.h's words) is a power of two
too. Rows for which that holds, at whatever a rule can come to on a tree, are drawn here; all checks are in fractions.
"""

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

from .policies import Model

#: Probabilities of drawn rows are multiples of one over this.
_PARTS = 8
_BITS = 24
_LEAF_FIRST = ("block", "traversal", "traversal_without_replacement")
_NO_DRAFT_LAW = ("greedy", "sampled", "gumbel", "target_only", "typical")
#: K-SEQ's rho is the upper end of 16 bisections of [1, K]: of the numbers of siblings up to 8, these have powers of two
#: among those ends.
_KSEQ_WIDTHS = (1, 3, 5)
_Row = tuple[Fraction, ...]
#: A node as a rule comes to it: which of its children have children, and the chance that it stands.
_Visit = tuple[tuple[bool, ...], Fraction]


def exact_models(rule: str, vocab: int, parents: Sequence[int], seed: Sequence[int]) -> tuple[Model, Model]:
    """A target and a draft model, whose probabilities depend on the whole prefix.

    Parameters
    ----------
    rule : str
        Of :func:`assay.verify`.
    vocab : int
    parents : sequence of int
        Of the tree; a chain's are -1, 0, 1 and so on.
    seed : sequence of int

    Raises
    ------
    ValueError
        No rows are exact for this rule and tree: K-SEQ of other than 1, 3 or 5 siblings, for one.
    """
    rng = np.random.default_rng(list(seed))
    below = [[j for j, parent in enumerate(parents) if parent == node] for node in range(-1, len(parents))]
    rows: dict[tuple[int, ...], tuple[_Row, _Row]] = {}
    waiting: dict[tuple[int, ...], set[tuple[int, Fraction]]] = {(): {(0, Fraction(1))}}  # row of the tree, chance
    while waiting:
        prefix, visits = next(iter(waiting.items()))
        del waiting[prefix]
        shapes = {(tuple(bool(below[c + 1]) for c in below[row]), chance) for row, chance in visits}
        rows[prefix] = p, q = _drawn(rule, vocab, frozenset(shapes), rng)
        for row, chance in visits:
            shape = tuple(bool(below[c + 1]) for c in below[row])
            found = _outcomes(rule, p, q, shape, chance)
            assert found is not None
            for at, token, stands in found:
                waiting.setdefault((*prefix, token), set()).add((below[row][at] + 1, stands))

    leaf = _binary_rows(vocab)

    def table(which: int) -> Model:
        def model(prefix: tuple[int, ...]) -> Sequence[Fraction]:
            if prefix not in rows:  # where no draft is verified
                own = np.random.default_rng([*seed, 1 + len(prefix), *prefix])
                rows[prefix] = leaf[own.integers(len(leaf))], leaf[own.integers(len(leaf))]
            return rows[prefix][which]

        return model

    return table(0), table(1)


def _drawn(rule: str, vocab: int, visits: frozenset[_Visit], rng: np.random.Generator) -> tuple[_Row, _Row]:
    widths = sorted({len(shape) for shape, _ in visits if shape})
    if rule == "kseq" and widths and widths != [1]:
        if len(widths) > 1 or widths[0] not in _KSEQ_WIDTHS:
            raise ValueError(f"parents: expected all nodes to have one of {_KSEQ_WIDTHS} children with rule='kseq'")
        return _kseq_rows(vocab, widths[0], rng)
    pairs = _pairs(rule, vocab, visits)
    if not pairs:
        raise ValueError(f"vocab, parents: expected rows that are exact for rule={rule!r}, got none with vocab={vocab}")
    return pairs[rng.integers(len(pairs))]


@cache
def _pairs(rule: str, vocab: int, visits: frozenset[_Visit]) -> list[tuple[_Row, _Row]]:
    """All pairs of rows that are exact on these visits; those of equal rows, where there is nothing to reject, left out."""
    every = [tuple(Fraction(n, _PARTS) for n in parts) for parts in _compositions(_PARTS, vocab)]
    return [
        (p, q)
        for p, q in itertools.product(_binary_rows(vocab), every)
        if p != q and all(_outcomes(rule, p, q, shape, chance) is not None for shape, chance in visits)
    ]


@cache
def _binary_rows(vocab: int) -> list[_Row]:
    """Rows of powers of two and zeros."""
    return [
        tuple(Fraction(n, _PARTS) for n in parts)
        for parts in _compositions(_PARTS, vocab)
        if all(n & (n - 1) == 0 for n in parts)
    ]


def _compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    if parts == 1:
        return [(total,)]
    return [(n, *rest) for n in range(total + 1) for rest in _compositions(total - n, parts - 1)]


def _is_power(x: Fraction) -> bool:
    return x > 0 and x.numerator & (x.numerator - 1) == 0 and x.denominator & (x.denominator - 1) == 0


def _is_short(x: Fraction) -> bool:
    """float32 holds it, with room for sums of a row."""
    odd = x.numerator // (x.numerator & -x.numerator) if x else 0
    return x.denominator & (x.denominator - 1) == 0 and abs(odd).bit_length() < _BITS - _PARTS


def _outcomes(
    rule: str, p: _Row, q: _Row, shape: tuple[bool, ...], chance: Fraction
) -> list[tuple[int, int, Fraction]] | None:
    """The children with children that a rule can come to: (which, token, chance); None when float32 would round on the way."""
    if rule in _NO_DRAFT_LAW or rule == "kseq":
        return [(i, x, Fraction(1)) for i, more in enumerate(shape) if more for x in range(len(p))]
    found: list[tuple[int, int, Fraction]] = []
    leaf_first, replaced = rule in _LEAF_FIRST, not rule.endswith("without_replacement")
    seen = set()

    def visit(i: int, a: Fraction, c: Fraction, stands: Fraction, gone: frozenset[int]) -> bool:
        if i == len(shape) or (i, a, c, stands, gone) in seen:
            return True
        seen.add((i, a, c, stands, gone))
        step = Fraction(1) if replaced else 1 / (1 - sum((q[x] for x in gone), Fraction(0)))
        if not _is_power(step):
            return False
        for x in range(len(p)):
            if not q[x] or x in gone:
                continue
            reach = min(max(a * p[x] - c * q[x], Fraction(0)) / (step * q[x]), Fraction(1))
            if shape[i] and reach:
                if leaf_first and not _is_short(reach):
                    return False
                found.append((i, x, reach if leaf_first else Fraction(1)))
            if (reach < 1 or (leaf_first and shape[i])) and not rejected(i, a, c + step, stands, gone | {x}):
                return False
        return True

    def rejected(i: int, a: Fraction, c: Fraction, stands: Fraction, gone: frozenset[int]) -> bool:
        left = [max(a * v - c * w, Fraction(0)) for v, w in zip(p, q, strict=True)]
        if not all(_is_short(z) for z in (a, c, *left, *(c * w for w in q))):
            return False
        mass = sum(left, Fraction(0))
        divisor = mass + 1 - stands if leaf_first else mass
        if i + 1 == len(shape) and not leaf_first:
            return True
        if divisor and not _is_power(divisor):
            return False
        if not replaced and sum(q[x] for x in gone) == 1:
            return True
        if not divisor:
            return not leaf_first or visit(i + 1, a, c, Fraction(1), gone)
        return visit(i + 1, a / divisor, c / divisor, mass / divisor, frozenset() if replaced else gone)

    return found if visit(0, chance, Fraction(0), chance, frozenset()) else None


def _kseq_rows(vocab: int, drafts: int, rng: np.random.Generator) -> tuple[_Row, _Row]:
    """Rows whose rho is 2: beta(2) is the root of 1 - (1 - beta)^K = 2 beta, rounded up to a multiple of 2^-20."""
    from ..reference.verification import kseq_rho

    low, high = 0.1, 0.9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 - (1 - middle) ** drafts > 2 * middle else (low, middle)
    unit = Fraction(1, 1 << 20)
    beta = math.ceil(high / float(unit)) * unit
    rows = [p for p in _binary_rows(vocab) if sum(x > 0 for x in p) > 1]
    while True:
        p = rows[rng.integers(len(rows))]
        q = [Fraction(int(n), 64) for n in rng.multinomial(64, rng.dirichlet(np.ones(vocab)))]
        short, rest = rng.permutation(vocab)[:2]
        q[short] = Fraction(0)
        q[short] = beta - sum((min(w, v / 2) for v, w in zip(p, q, strict=True)), Fraction(0))
        q[rest] += 1 - sum(q)
        if not (0 <= q[short] < p[short] / 2 and all(0 <= w <= 1 for w in q)):
            continue
        if sum(min(w, v / 2) for v, w in zip(p, q, strict=True)) == beta and kseq_rho(
            np.array(p, float), np.array(q, float), drafts
        ) == 2.0:  # fmt: skip
            return p, tuple(q)
