"""The exact law of a race of clocks, as rule ``gumbel`` runs it, from the winner alone and without sampling.

Token v's clock rings at -log(1 - u_v) / w_v, each u_v uniform and independent of the others; the first wins. With u_v held, another
token a comes later when u_a is above a threshold, which is found by bisection; so

    P(v wins) = integral over u_v of the product over a of (1 - threshold of a at u_v),

an integral over one uniform of a smooth function. In t = -log(1 - u_v) it decays like an exponential, and Gauss's rule on panels
that double is exact to rounding. It rests on the winner of all being the winner of every pair, which random points check.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

#: Ends of the panels of t: of one weight in 2^10 the first panel is four units of its decay; e^-37 is below 2^-53.
_PANELS = (0.0, *(2.0**k for k in range(-8, 6)), 37.0)
_NODES = 10
_LATE = 1 - 2.0**-53
_BISECTIONS = 56
_NEAR = 2.0**-44
_CHECKS = 16

#: (row int64 [n], uniforms float64 [n, V]) to the tokens that win.
Winner = Callable[[np.ndarray, np.ndarray], np.ndarray]


@cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Uniforms and the weights of an integral over (0, 1)."""
    x, w = np.polynomial.legendre.leggauss(_NODES)
    ends = np.array(_PANELS)
    half = np.diff(ends)[:, None] / 2
    t = (ends[:-1, None] + half * (x + 1)).ravel()
    return -np.expm1(-t), (half * w).ravel() * np.exp(-t)


def race_law(winner: Winner, rows: int, vocab: int) -> np.ndarray:
    """The law of the winner of each of so many races between `vocab` tokens: float64 [rows, vocab].

    Raises
    ------
    ValueError
        A winner of all that is not the winner of a pair.
    """
    u, weight = _quadrature()
    row, v, a = (x.ravel() for x in np.indices((rows, vocab, vocab)))
    pairs = v != a
    row, v, a = row[pairs], v[pairs], a[pairs]

    def beaten(pair: np.ndarray, of_v: np.ndarray, of_a: np.ndarray) -> np.ndarray:
        """Whether v loses at these uniforms of the two, all others being late."""
        at, points = np.arange(len(pair)), np.full((len(pair), vocab), _LATE)
        points[at, v[pair]], points[at, a[pair]] = of_v, np.clip(of_a, 2.0**-60, _LATE)
        lost: np.ndarray = winner(row[pair], points) != v[pair]
        return lost

    def threshold(pair: np.ndarray, of_v: np.ndarray) -> np.ndarray:
        """The uniform of a up to which v loses."""
        low, high = np.zeros(len(pair)), np.ones(len(pair))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            lost = beaten(pair, of_v, middle)
            low, high = np.where(lost, middle, low), np.where(lost, high, middle)
        return np.where(high > _LATE, 1.0, (low + high) / 2)

    # In t a threshold is likely to be a straight line: its slope at two nodes foretells all others, each of which is then tried
    # on either side, and bisected where it was not so.
    every = np.arange(len(row))
    slope = np.full(len(row), np.inf)
    for near in (0.002, 1.0):
        own = -np.expm1(-near)
        found = threshold(every, np.full(len(row), own))
        slope = np.where(found < 1 - 1e-5, np.log1p(-np.minimum(found, _LATE)) / np.log1p(-own), slope)
    pair, node = (x.ravel() for x in np.indices((len(row), len(u))))
    with np.errstate(invalid="ignore"):
        later = np.exp(slope[pair] * np.log1p(-u[node]))
    at = 1 - later
    wrong = ~(beaten(pair, u[node], at - _NEAR) & (~beaten(pair, u[node], at + _NEAR) | (at + _NEAR > _LATE)))
    wrong &= at > _NEAR  # v loses to nobody who is that early
    wrong |= (at <= _NEAR) & beaten(pair, u[node], at + _NEAR)
    later[wrong] = 1 - threshold(pair[wrong], u[node[wrong]])
    _check(winner, rows, vocab)
    law: np.ndarray = later.reshape(rows, vocab, vocab - 1, len(u)).prod(axis=2) @ weight
    return law


def _check(winner: Winner, rows: int, vocab: int) -> None:
    """At random points, that the winner stays when only one other is there in time."""
    rng = np.random.default_rng(vocab)
    row = np.repeat(np.arange(rows), _CHECKS)
    # Not beyond the last clocks' time, where those that are late would matter.
    points = rng.random((len(row), vocab)) * 0.9
    first = winner(row, points)
    at = np.arange(len(row))
    for a in range(vocab):
        alone = np.full_like(points, _LATE)
        alone[at, a], alone[at, first] = points[at, a], points[at, first]
        if (winner(row, alone) != first).any():
            raise ValueError("winner: expected a race, in which the first of all is the first of every pair")


def race_emissions(
    run: Callable[[np.ndarray, np.ndarray], np.ndarray], drafts: list[tuple[int, ...]], parents: list[int], vocab: int
) -> tuple[list[dict[tuple[int, ...], float]], int]:
    """The law of what a kernel emits for each draft whose rows are races.

    Every row's law is found behind winners that lead to it; each way to win is then run once, to see what is emitted.

    Parameters
    ----------
    run : callable
        (draft int64 [n], uniforms float64 [n, K + 1, V]) to outcomes int [n, 1 + W]: drafts accepted, tokens emitted.
    drafts : list of tuple of int
        K tokens each.
    parents : list of int
        Of the K nodes.

    Returns
    -------
    (list of dict, int)
        Of each draft: outcome to probability; and the number of outcomes.
    """
    places = [(j, node) for j in range(len(drafts)) for node in range(len(parents) + 1)]
    paths = [_path(parents, node) for _, node in places]
    owner = np.array([j for j, _ in places])
    forced = np.full((len(places), len(parents) + 1, vocab), _LATE)
    for i, ((j, _), path) in enumerate(zip(places, paths, strict=True)):
        for node in path:
            forced[i, parents[node - 1] + 1, drafts[j][node - 1]] = 2.0**-60
    own, depth = np.array([node for _, node in places]), np.array([len(path) for path in paths])

    def winner(row: np.ndarray, points: np.ndarray) -> np.ndarray:
        uniforms = forced[row]
        uniforms[np.arange(len(row)), own[row]] = points
        found: np.ndarray = run(owner[row], uniforms)[np.arange(len(row)), 1 + depth[row]]
        return found

    # A node that no winners lead to, because its token has no probability or an older sibling has it too, is not asked.
    first = {(j, node): _is_first(parents, drafts[j], node) for j, node in places}
    reached = [i for i, (j, _) in enumerate(places) if all(first[j, node] for node in paths[i])]
    leads = run(owner[reached], forced[reached])
    reached = [i for i, out in zip(reached, leads, strict=True) if out[0] >= depth[i]]
    laws = dict(
        zip(reached, race_law(lambda row, u: winner(np.array(reached)[row], u), len(reached), vocab), strict=True)
    )
    index = {place: i for i, place in enumerate(places)}
    ways: list[tuple[int, float, np.ndarray]] = []

    def walk(j: int, node: int, weight: float, uniforms: np.ndarray) -> None:
        for token, share in enumerate(laws[index[j, node]]):
            if not share > 0:
                continue
            chosen = uniforms.copy()
            chosen[node, token] = 2.0**-60
            child = next((c + 1 for c, up in enumerate(parents) if up == node - 1 and drafts[j][c] == token), None)
            if child is not None and index[j, child] in laws:
                walk(j, child, weight * share, chosen)
            else:
                ways.append((j, weight * share, chosen))

    for j in range(len(drafts)):
        walk(j, 0, 1.0, np.full((len(parents) + 1, vocab), _LATE))
    emitted = run(np.array([j for j, _, _ in ways]), np.array([u for _, _, u in ways]))
    found: list[dict[tuple[int, ...], float]] = [{} for _ in drafts]
    for (j, weight, _), out in zip(ways, emitted.tolist(), strict=True):
        found[j][tuple(out)] = found[j].get(tuple(out), 0.0) + weight
    return found, len(ways)


def _path(parents: list[int], node: int) -> list[int]:
    """Nodes, counted from 1, from the root's child down to this one."""
    return [*_path(parents, parents[node - 1] + 1), node] if node else []


def _is_first(parents: list[int], tokens: tuple[int, ...], node: int) -> bool:
    return not node or all((parents[c], tokens[c]) != (parents[node - 1], tokens[node - 1]) for c in range(node - 1))
