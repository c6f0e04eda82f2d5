"""The rules for the twin of verification, as csrc/spec_rules.c has them: every sum and comparison in the same order."""

import numpy as np

from ._verify_rows import EMPTY_RESIDUALS, ZERO_DRAFTS, Request, Row
from ._vexp import vexp

_ACCEPT, _RESIDUAL, _BONUS = 1, 2, 3
_KSEQ_STEPS = 16
_LEAF_FIRST = ("block", "traversal", "traversal_without_replacement")

Decision = tuple[int, int]  # the child to descend to or 0, and the token


def _accept_uniform(r: Request, node: int) -> float:
    n = r.node(node)
    key = node - 1 if r.arguments.rule.startswith("traversal") else n.rank
    return r.uniform(_ACCEPT, node, n.depth - 1, key)


def _residual_uniform(r: Request, node: int) -> float:
    return r.uniform(_RESIDUAL, 0, r.node(node).depth)


def _bonus_uniform(r: Request, node: int) -> float:
    return r.uniform(_BONUS, 0, r.node(node).depth)


def _drafted(r: Request, token: int) -> float:
    q = r.q(token)
    r.counters[ZERO_DRAFTS] += int(q == 0 and token < r.arguments.vocab)
    return q


def _draw_empty(r: Request, row: Row, node: int) -> Decision:
    r.counters[EMPTY_RESIDUALS] += 1
    return 0, r.draw(row, _residual_uniform(r, node))


def _match(r: Request, node: int, token: int) -> Decision:
    return next((child for child in r.node(node).children if r.token(child) == token), 0), token


def _draw_rest(r: Request, row: Row, node: int) -> Decision:
    """A token of p without the excluded ones."""
    token = r.draw_without(row, _residual_uniform(r, node))
    return _draw_empty(r, row, node) if token < 0 else (0, token)


def _one_hot_siblings(r: Request, row: Row, node: int) -> Decision:
    share = 1.0
    r.excluded = []
    children = r.node(node).children
    for child in children:
        token = r.token(child)
        p = 0.0 if token in r.excluded else r.probability(row, token)
        if _accept_uniform(r, child) * share < p:
            return child, token
        if token < r.arguments.vocab:
            r.excluded.append(token)
        if child != children[-1]:
            share = r.mass_without(row) / row.total
        if not share > 0:
            break
    return _draw_rest(r, row, node)


def _repeats(r: Request, child: int) -> bool:
    """Whether an older sibling has the same id: passed over where drafts were drawn without replacement."""
    older = r.node(r.node(child).parent).children
    return any(r.token(other) == r.token(child) for other in older[: older.index(child)])


def _siblings(r: Request, row: Row, node: int, *, replaced: bool) -> Decision:
    if not r.has_q():
        return _one_hot_siblings(r, row, node)
    a, c, step, drawn, total = 1.0, 0.0, 1.0, 0.0, 0.0
    r.take_q(node)
    for child in r.node(node).children:
        if not replaced and _repeats(r, child):
            continue
        token = r.token(child)
        q = _drafted(r, token)
        if _accept_uniform(r, child) * (step * q) < a * r.probability(row, token) - c * q:
            return child, token
        c += step
        total = r.residual(row, a, c)
        if not total > 0:
            return _draw_empty(r, row, node)
        if not replaced:
            drawn += q
            if not drawn < 1:
                break
            step = 1 / (1 - drawn)
        a /= total
        c /= total
    return 0, r.draw_residual(row, _residual_uniform(r, node) * total)


def _target_only(r: Request, row: Row, node: int) -> Decision:
    children = r.node(node).children
    u, reached = _accept_uniform(r, children[0]), 0.0
    r.excluded = []
    for child in children:
        token = r.token(child)
        if token >= r.arguments.vocab or token in r.excluded:
            continue
        p = r.probability(row, token)
        reached += p
        if p > 0 and (u < reached / r.arguments.threshold_acc or p >= r.arguments.threshold_single):
            return child, token
        r.excluded.append(token)
    return _draw_rest(r, row, node)


def _any_of(beta: float, count: int) -> float:
    none = 1.0
    for _ in range(count):
        none *= 1 - beta
    return 1 - none


def _kseq(r: Request, row: Row, node: int) -> Decision:
    children = r.node(node).children
    count = len(children)
    r.take_q(node)
    low, rho = 1.0, float(count)
    for _ in range(_KSEQ_STEPS if count > 1 else 0):
        middle = (low + rho) / 2
        beta = 1 / middle - r.residual(row, 1 / middle, 1.0)
        low, rho = (middle, rho) if _any_of(beta, count) > middle * beta else (low, middle)
    for child in children:
        token = r.token(child)
        q = _drafted(r, token)
        if _accept_uniform(r, child) * (rho * q) < r.probability(row, token):
            return child, token
    rest = r.residual(row, 1 / rho, 1.0)
    beta = 1 / rho - rest
    gamma = _any_of(beta, count) / beta if beta > 0 else float(count)
    of_p = 1 - gamma / rho if gamma < rho else 0.0
    total = of_p + gamma * rest
    if not total > 0:
        return _draw_empty(r, row, node)
    u = _residual_uniform(r, node) * total
    if u < of_p or not rest > 0:
        return 0, r.draw(row, u / of_p if u < of_p else 1 - 2.0**-53)
    return 0, r.draw_residual(row, (u - of_p) / gamma)


def _decide(r: Request, row: Row, node: int) -> Decision:
    rule = r.arguments.rule
    if r.greedy:
        return _match(r, node, r.argmax(row))
    if rule == "gumbel":
        return _match(r, node, r.race(row, node, r.node(node).depth))
    if rule == "sampled":
        return _match(r, node, r.draw(row, _bonus_uniform(r, node)))
    if not r.node(node).children:
        return 0, r.draw(row, _bonus_uniform(r, node))
    if rule == "target_only":
        return _target_only(r, row, node)
    if rule == "kseq":
        return _kseq(r, row, node)
    return _siblings(r, row, node, replaced=not rule.endswith("without_replacement"))


def _typical(r: Request) -> Decision:
    """The last node of the best path, and the token behind it."""
    best, stands = 0, {0}
    for at, node in enumerate(r.nodes):
        if node is None or at not in stands:
            continue
        leader = r.node(best)
        if node.depth > leader.depth or (node.depth == leader.depth and node.score > leader.score):
            best = at
        if not node.children:
            continue
        row = r.row(at)
        mean, total = r.mean_exponent(row)
        bound = r.arguments.posterior_alpha * float(vexp(np.float32(mean))) / total
        threshold = min(bound, r.arguments.posterior_threshold)
        for child in node.children:
            token = r.token(child)
            if r.probability(row, token) > threshold:
                stands.add(child)
                r.node(child).score = np.float32(node.score) + np.float32(r.log_probability(row, token))
    return best, r.draw(r.row(best), _bonus_uniform(r, best))


def _removed(r: Request, row: Row, parent: int, child: int, *, replaced: bool) -> None:
    n = r.node(parent)
    n.c += 1.0 if replaced else 1 / (1 - n.drawn)
    rest = r.residual(row, n.a, n.c)
    below = rest + 1 - n.p
    n.p = rest / below if below > 0 else 1.0
    if below > 0:
        n.a /= below
        n.c /= below
    n.drawn += r.q(r.token(child))
    n.remaining.pop(0)
    if not replaced and not n.drawn < 1:
        n.remaining = []


def _traverse(r: Request, *, replaced: bool) -> Decision:
    """The accepted node, and the token behind it."""
    at = 0
    r.node(0).remaining = list(r.node(0).children)
    while True:
        n = r.node(at)
        if n.remaining:
            child = n.remaining[0]
            if not replaced and _repeats(r, child):
                n.remaining.pop(0)
                continue
            row = r.row(at)
            r.take_q(at)
            token, m = r.token(child), r.node(child)
            q = _drafted(r, token)
            above = n.a * r.probability(row, token) - n.c * q
            below = q if replaced else q / (1 - n.drawn)
            m.p = 0.0 if not above > 0 else above / below if above < below else 1.0
            m.a, m.remaining = m.p, list(m.children)
            if m.p > 0:
                at = child
            else:
                _removed(r, row, at, child, replaced=replaced)
            continue
        if not at or _accept_uniform(r, at) < n.p:
            break
        row = r.row(n.parent)
        r.take_q(n.parent)
        _removed(r, row, n.parent, at, replaced=replaced)
        at = n.parent
    row = r.row(at)
    if not n.children:
        return at, r.draw(row, _bonus_uniform(r, at))
    r.take_q(at)
    rest = r.residual(row, n.a, n.c)
    if rest > 0:
        return at, r.draw_residual(row, _residual_uniform(r, at) * rest)
    return at, _draw_empty(r, row, at)[1]


def walk(r: Request) -> tuple[list[int], int]:
    """The accepted nodes, root to leaf, and the token behind them."""
    rule = r.arguments.rule
    path: list[int] = []
    if not r.greedy and (rule == "typical" or (rule in _LEAF_FIRST and r.has_q())):
        if rule == "typical":
            node, token = _typical(r)
        else:
            node, token = _traverse(r, replaced=not rule.endswith("without_replacement"))
        while node:
            path.insert(0, node)
            node = r.node(node).parent
        return path, token
    node = 0
    while True:
        child, token = _decide(r, r.row(node), node)
        if not child:
            return path, token
        path.append(child)
        node = child
