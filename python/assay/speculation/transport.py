"""How much any rule could accept: the optimal-transport bound, and what each rule reaches at one node."""

import math
from typing import Any

import numpy as np


def transport_bound(p: Any, q: Any, drafts: int, *, replacement: bool = True) -> float:
    """The most that any lossless rule can accept of `drafts` sampled candidates for one token.

    ``alpha* = 1 + min_H (p(H) - Q(H))`` over sets H of tokens, Q(H) the probability that all candidates lie in H
    (SpecTr, arXiv:2310.15141, section 4, and arXiv:2502.18779).

    Parameters
    ----------
    p, q : float [V]
        Target and draft probabilities of the token.
    drafts : int
        Candidates, at least 1; without replacement at most as many as q has tokens.
    replacement : bool
        Drawn independently, or one after the other from what is left of q.

    Notes
    -----
    The minimum is at a set of the smallest ratios p / q: V + 1 sets to look at, not 2^V. With replacement
    ``p(H) - q(H)^K`` is a concave function of the point (p(H), q(H)), so that it is least at a vertex of the points'
    convex hull, and the vertices are those sets. Without replacement the same order is used (2502.18779).
    """
    p, q = _pair(p, q)
    if drafts < 1:
        raise ValueError(f"drafts: expected at least 1, got {drafts}")
    support = int((q > 0).sum())
    if not replacement and drafts > support:
        raise ValueError(f"drafts: expected at most {support}, the tokens that q can give, got {drafts}")
    drawn = np.flatnonzero(q > 0)
    order = drawn[np.argsort(p[drawn] / q[drawn], kind="stable")]
    sums = np.cumsum(p[order])
    if replacement:
        inside = np.minimum(np.cumsum(q[order]), 1.0) ** drafts
    else:
        inside = np.array([all_inside(q, order[: n + 1], drafts) for n in range(len(order))])
    return float(1 + min(0.0, (sums - inside).min()))


def all_inside(q: np.ndarray, inside: Any, drafts: int) -> float:
    """P(all of so many tokens, drawn from q without replacement, lie in a set).

    Drawing without replacement is a race of exponential clocks of rates q, so this is the probability that `drafts`
    clocks of the set ring before any other does: an integral over the moment that the first other rings.
    """
    q = np.asarray(q, np.float64)
    members = np.zeros(len(q), bool)
    members[np.asarray(inside, np.int64)] = True
    rates, rest = q[members & (q > 0)], float(q[~members].sum())
    if len(rates) < drafts:
        return 0.0
    if rest <= 0:
        return 1.0
    # With w = exp(-rest t) uniform in (0, 1), a clock of rate r has rung with probability 1 - w^(r / rest).
    w, weights = _tanh_sinh()
    rung = -np.expm1(np.log(w)[:, None] * (rates / rest))
    fewer = np.zeros((drafts, len(w)))  # P(so many have rung), below `drafts`
    fewer[0] = 1.0
    for j in range(rung.shape[1]):
        fewer[1:] = fewer[1:] * (1 - rung[:, j]) + fewer[:-1] * rung[:, j]
        fewer[0] *= 1 - rung[:, j]
    return float(np.clip(1.0 - weights @ fewer.sum(axis=0), 0.0, 1.0))


def _tanh_sinh(step: float = 1 / 32, reach: float = 3.9) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of the double-exponential rule on (0, 1), which powers at the ends do not spoil."""
    t = np.arange(-reach, reach + step / 2, step)
    s = np.pi / 2 * np.sinh(t)
    points = 1 / (1 + np.exp(-2 * s))
    weights = step * np.pi / 2 * np.cosh(t) / (2 * np.cosh(s) ** 2)
    return points, weights / weights.sum()


def kseq_rho(p: Any, q: Any, drafts: int) -> float:
    """K-SEQ's best rho: the root of ``1 - (1 - beta)^K = rho beta``, beta(rho) = sum min(q, p / rho), in 1..K.

    The least rho for which the rule is lossless: below it the residual would be negative.
    """
    p, q = _pair(p, q)
    if drafts < 1:
        raise ValueError(f"drafts: expected at least 1, got {drafts}")
    low, high = 1.0, float(drafts)
    for _ in range(100):
        rho = (low + high) / 2
        beta = float(np.minimum(q, p / rho).sum())
        low, high = (rho, high) if 1 - (1 - beta) ** drafts > rho * beta else (low, rho)
    return high


def acceptance(rule: str, p: Any, q: Any, drafts: int = 1) -> float:
    """P(one of the candidates for a token is accepted), of each rule: what :mod:`assay.cost.speculation` asks for.

    Parameters
    ----------
    rule : {"rejection", "sampled", "gumbel", "specinfer", "specinfer_without_replacement", "kseq", "target_only",
            "bound", "bound_without_replacement"}
        "sampled": the drafts are independent of the target's own token. "gumbel": one draft, which shares the target's
        noise. "target_only": the `drafts` likeliest tokens of q. "bound": what no rule exceeds.
    p, q : float [V]
    drafts : int
        Candidates; "rejection", "sampled" and "gumbel" take one.
    """
    p, q = _pair(p, q)
    single = {"rejection": lambda: np.minimum(p, q).sum(), "sampled": lambda: p @ q, "gumbel": lambda: _coupled(p, q)}
    if rule in single:
        if drafts != 1:
            raise ValueError(f"drafts: expected 1 with rule={rule!r}, got {drafts}")
        return float(single[rule]())
    if drafts < 1:
        raise ValueError(f"drafts: expected at least 1, got {drafts}")
    if rule == "specinfer":
        refused = 1.0
        for _ in range(drafts):
            refused *= 1 - np.minimum(p, q).sum()
            left = np.maximum(p - q, 0)
            if refused <= 0 or left.sum() <= 0:
                return float(1 - max(refused, 0.0)) if left.sum() > 0 else 1.0
            p = left / left.sum()
        return float(1 - refused)
    if rule == "specinfer_without_replacement":
        if math.perm(int((q > 0).sum()), drafts) > 1_000_000:
            raise ValueError(f"drafts: expected at most 10^6 ways to draw {drafts} of {len(q)} tokens, got more")
        return 1 - _refused_without_replacement(p, q, drafts)
    if rule == "kseq":
        beta = float(np.minimum(q, p / kseq_rho(p, q, drafts)).sum())
        return 1 - (1 - beta) ** drafts
    if rule == "target_only":
        return float(p[np.argsort(-q, kind="stable")[:drafts]].sum())
    if rule in ("bound", "bound_without_replacement"):
        return transport_bound(p, q, drafts, replacement=rule == "bound")
    raise ValueError(
        "rule: expected one of rejection, sampled, gumbel, specinfer, specinfer_without_replacement, kseq, target_only, "
        f"bound, bound_without_replacement, got {rule!r}"
    )


def _refused_without_replacement(p: np.ndarray, q: np.ndarray, drafts: int) -> float:
    if drafts == 0 or q.sum() <= 0:
        return 1.0
    left = np.maximum(p - q, 0)
    if left.sum() <= 0:
        return 0.0
    after = left / left.sum()
    total = 0.0
    for x in np.flatnonzero(np.maximum(q - p, 0)):
        others = q.copy()
        others[x] = 0
        rest = others / others.sum() if others.sum() > 0 else others
        total += (q[x] - p[x]) * _refused_without_replacement(after, rest, drafts - 1)
    return float(total)


def _coupled(p: np.ndarray, q: np.ndarray) -> float:
    """P(both Gumbel-max draws with one noise agree): sum over v of 1 / sum_w max(p_w / p_v, q_w / q_v)."""
    both = np.flatnonzero((p > 0) & (q > 0))
    return float(sum(1 / np.maximum(p / p[v], q / q[v]).sum() for v in both))


def _pair(p: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for name, value in (("p", p), ("q", q)):
        array = np.asarray([float(x) for x in value])
        if not (array >= 0).all() or abs(array.sum() - 1) > 1e-4:
            raise ValueError(f"{name}: expected probabilities that sum to 1, got a sum of {array.sum()}")
        arrays.append(array / array.sum())
    if len(arrays[0]) != len(arrays[1]):
        raise ValueError(f"q: expected {len(arrays[0])} probabilities, as p, got {len(arrays[1])}")
    return arrays[0], arrays[1]
