"""The best draft length and the best tree at each batch: what verification costs against what acceptance gives."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace

from assay.cost.cases import Case, price
from assay.cost.drafting import Speculation
from assay.cost.draws import Draws, interval


def grow_tree(rates: Sequence[Sequence[float]], nodes: int) -> tuple[int, ...]:
    """Parents of the tree of at most ``nodes`` drafts with the most expected accepted tokens.

    Parameters
    ----------
    rates
        ``rates[d][r]``: P(the r-th candidate at depth d + 1 is accepted | its parent is). Its length is the depth.

    Notes
    -----
    A tree is worth the sum over its nodes of the product of rates on their paths (Medusa, arXiv 2401.10774; Sequoia, arXiv
    2402.12374). A node is worth no more than its parent, so the ``nodes`` worthiest nodes of the full tree are a tree, and
    no tree of that size is worth more: what Sequoia's dynamic programme finds.
    """
    if nodes < 0:
        raise ValueError(f"nodes: expected at least 0, got {nodes}")
    for d, row in enumerate(rates):
        if any(not 0 <= r <= 1 for r in row) or sum(row) > 1 + 1e-9:
            raise ValueError(f"rates[{d}]: expected probabilities that sum to at most 1, got {list(row)}")
    parents: list[int] = []
    # (-worth, depth, rank, parent): the next candidate at each open place.
    ready: list[tuple[float, int, int, int, float]] = []

    def offer(depth: int, rank: int, parent: int, reach: float) -> None:
        if depth < len(rates) and rank < len(rates[depth]) and rates[depth][rank] > 0:
            heapq.heappush(ready, (-reach * rates[depth][rank], depth, rank, parent, reach))

    offer(0, 0, -1, 1.0)
    # Better ranks come first only if rates fall with rank: take them in that order.
    if any(list(row) != sorted(row, reverse=True) for row in rates):
        raise ValueError("rates: expected each row to fall, the likeliest candidate first")
    while ready and len(parents) < nodes:
        worth, depth, rank, parent, reach = heapq.heappop(ready)
        here = len(parents)
        parents.append(parent)
        offer(depth, rank + 1, parent, reach)
        offer(depth + 1, 0, here, -worth)
    return tuple(parents)


@dataclass(frozen=True)
class Choice:
    """The best speculation of a case: None where none pays. ``speedup`` over no speculation, (estimate, low, high)."""

    batch: int
    speculation: Speculation | None
    tokens_per_step: float
    speedup: tuple[float, float, float]


def candidates(
    base: Speculation,
    *,
    longest: int = 8,
    sizes: Sequence[int] = (4, 8, 16, 32, 64),
    depths: Sequence[int] = (2, 3, 4, 6),
) -> list[Speculation]:
    """Chains of 1 to ``longest`` drafts, and for each size and depth the best tree, with the acceptance of ``base``.

    Siblings take ``a (1 - a)^r``, or the shares of ``base.ranks``.
    """
    rates = base.rates + base.rates[-1:] * max(longest, *depths)
    chains = [
        replace(base, branches=(1,) * k, parents=(), length=None, passes=_passes(base, k))
        for k in range(1, longest + 1)
    ]
    trees: dict[tuple[int, ...], Speculation] = {}
    for depth in depths:
        table = []
        for _, a, _ in rates[:depth]:
            row = [a * s for s in base.ranks] if base.ranks else [a * (1.0 - a) ** r for r in range(8)]
            table.append([r for r in row if r > 1e-6])
        for size in sizes:
            parents = grow_tree(table, size)
            if parents:
                tree = replace(base, branches=(1,), parents=parents, length=None, passes=None, block=False)
                trees[parents] = replace(tree, passes=_passes(base, tree.depth))
    return chains + [t for t in trees.values() if not t.chain]


def _passes(base: Speculation, depth: int) -> int | None:
    return None if base.passes is None else min(base.passes, depth)


def best_speculation(case: Case, base: Speculation, draws: Draws | None = None, **sizes: object) -> Choice:
    """Of `candidates`, what gives the case the most tokens a second; no speculation where all are slower."""
    draws = draws or Draws()
    plain = price(replace(case, speculation=None), Draws(0)).answers_per_s[0]
    best: Speculation | None = None
    most = float(plain)
    for spec in candidates(base, **sizes):  # type: ignore[arg-type]
        rate = float(price(replace(case, speculation=spec), Draws(0)).answers_per_s[0])
        if rate > most:
            best, most = spec, rate
    if best is None:
        return Choice(case.running, None, 1.0, (1.0, 1.0, 1.0))
    with_it = price(replace(case, speculation=best), draws)
    gain = with_it.answers_per_s / price(replace(case, speculation=None), draws).answers_per_s
    return Choice(case.running, best, float(with_it.tokens_per_step[0]), interval(gain))
