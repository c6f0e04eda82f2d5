"""Verification of speculative drafts: the rules as they are stated, in float64."""

import numpy as np

from .distribution import filtered, process
from .philox import DOMAIN_ACCEPT, DOMAIN_BONUS, DOMAIN_RESIDUAL, noise, uniform
from .rows import ROW_BAD_ID, ROW_BAD_TREE, ROW_NAN, ROW_OK, softmax
from .verify_arguments import VerifyArguments, VerifyOutputs

ROWS_READ, ROWS_RESAMPLED, ZERO_DRAFTS, EMPTY_RESIDUALS = range(4)
KSEQ_STEPS = 16
LEAF_FIRST = ("block", "traversal", "traversal_without_replacement")


def sample(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulated weight exceeds u times the total; never one of weight 0."""
    cumulated = np.cumsum(weights)
    above = np.flatnonzero(cumulated > u * cumulated[-1])
    return int(above[0]) if len(above) else int(np.flatnonzero(weights)[-1])


def resample(p: np.ndarray, q: np.ndarray, u: float) -> int:
    """A token of (p - q)+, after a draft token was rejected; of p where that is all zero."""
    residual = np.maximum(p - q, 0)
    return sample(residual if residual.sum() > 0 else p, u)


def accepts(p: float, q: float, u: float) -> bool:
    """Strictly, so that p = 0 is never accepted and q = 0 < p always is."""
    return u * q < p


class BadRowError(Exception):
    """Ends a request with a status."""

    def __init__(self, status: int) -> None:
        self.status = status


class Request:
    """One request: its tree, and its rows, which are read when a rule asks for them. Node -1 is the root."""

    def __init__(self, logits: np.ndarray, a: VerifyArguments, b: int, counters: list[int]) -> None:
        self.a, self.b, self.counters = a, b, counters
        self.first, last = int(a.cu[b]), int(a.cu[b + 1])
        self.k = last - self.first
        self.logits = logits[self.first + b : last + b + 1]
        self.ids = a.ids[self.first : last].tolist()
        parents = range(-1, self.k - 1) if a.parents is None else a.parents[self.first : last].tolist()
        self.parents = list(parents)
        self.children: dict[int, list[int]] = {-1: []}
        for j, (token, parent) in enumerate(zip(self.ids, self.parents, strict=True)):
            if not -1 <= parent < j:
                raise BadRowError(ROW_BAD_TREE)
            if token == -1 or parent not in self.children:
                continue  # absent, and so is what follows it
            if token < -1:
                raise BadRowError(ROW_BAD_ID)
            self.children[parent].append(j)
            self.children[j] = []
        self.temperature = 0.0 if a.rule == "greedy" else float(a.temperature[b])
        self.rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        own = slice(self.first + 2 * b, last + 2 * b + 2)
        self.uniforms = None if a.uniforms is None or a.rule == "gumbel" else a.uniforms[own]

    def path(self, node: int) -> list[int]:
        """Nodes from the root's child down to this one."""
        return [] if node < 0 else [*self.path(self.parents[node]), node]

    def row(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Processed logits and distribution behind a node."""
        if node not in self.rows:
            self.counters[ROWS_READ] += 1
            path = [self.ids[j] for j in self.path(node)]
            row = self.first + self.b + node + 1
            logits, status = process(self.logits[node + 1], self.a, self.b, row, path)
            if status:
                raise BadRowError(status)
            p = filtered(logits, self.temperature, self.a, self.b) if self.temperature else softmax(logits)
            self.rows[node] = logits, p
        return self.rows[node]

    def p(self, node: int) -> np.ndarray:
        return self.row(node)[1]

    def q(self, node: int, child: int) -> np.ndarray:
        """What a node's children were drawn from: the first child's row; a one-hot draft's own."""
        a, vocab = self.a, self.a.vocab
        row = self.first + self.children[node][0]
        if a.draft_probs is not None:
            return a.draft_probs[row].astype(np.float64)
        q = np.zeros(vocab + 1)
        if a.sparse_ids is not None and a.sparse_probs is not None:
            ids = a.sparse_ids[row]
            inside = (ids >= 0) & (ids < vocab)
            np.add.at(q, ids[inside], a.sparse_probs[row][inside])
        else:
            q[min(self.ids[child], vocab)] = 1
        return q[:vocab]

    def drafted(self, p: np.ndarray, q: np.ndarray, child: int) -> tuple[float, float]:
        """p and q of a draft, 0 outside the vocabulary."""
        x = self.ids[child]
        if x >= self.a.vocab:
            return 0.0, 0.0
        if not 0 <= q[x] < np.inf:
            raise BadRowError(ROW_NAN)
        self.counters[ZERO_DRAFTS] += int(q[x] == 0)
        return float(p[x]), float(q[x])

    def has_q(self) -> bool:
        return self.a.draft_probs is not None or self.a.sparse_ids is not None

    def uniform(self, domain: int, node: int, depth: int, key: int = 0) -> float:
        a = self.a
        if self.uniforms is not None:
            if a.rule == "sampled":
                return float(self.uniforms[depth])
            slot = {DOMAIN_ACCEPT: node, DOMAIN_RESIDUAL: self.k, DOMAIN_BONUS: self.k + 1}[domain]
            return float(self.uniforms[slot])
        assert a.seed is not None
        assert a.position is not None
        return uniform(int(a.seed[self.b]), int(a.position[self.b]) + depth, domain, key)

    def accept_uniform(self, child: int) -> float:
        rank = self.children[self.parents[child]].index(child)
        key = child if self.a.rule.startswith("traversal") else rank
        return self.uniform(DOMAIN_ACCEPT, child, len(self.path(child)) - 1, key)

    def draw(self, weights: np.ndarray, node: int, *, residual: bool = False) -> int:
        """A token behind a node; of its distribution where a residual is empty."""
        if residual and not weights.sum() > 0:
            self.counters[EMPTY_RESIDUALS] += 1
            weights = self.p(node)
        domain = DOMAIN_RESIDUAL if residual else DOMAIN_BONUS
        return sample(weights, self.uniform(domain, -1, len(self.path(node))))


def check_draft(q: np.ndarray) -> None:
    """Refuses a draft distribution with a NaN, an infinity or a negative share: BadRowError."""
    if not ((q >= 0) & (q < np.inf)).all():
        raise BadRowError(ROW_NAN)


def match(r: Request, node: int, token: int) -> int | None:
    """The first child of ``node`` that drafts ``token``, None where none does."""
    return next((child for child in r.children[node] if r.ids[child] == token), None)


def repeats(r: Request, child: int) -> bool:
    """Whether an older sibling has the same id: passed over where drafts were drawn without replacement."""
    return any(r.ids[c] == r.ids[child] for c in r.children[r.parents[child]] if c < child)


def siblings(r: Request, node: int, *, replaced: bool) -> tuple[int | None, int]:
    """Multi-step sampling: the target becomes what is left of it after each rejected sibling."""
    p = r.p(node)
    gone = np.zeros(r.a.vocab, bool)
    for child in r.children[node]:
        if r.has_q() and not replaced and repeats(r, child):
            continue
        q = r.q(node, child)
        if r.has_q() and not replaced and gone.any():
            rest = 1 - q[gone].sum()
            if not rest > 0:
                break  # nothing was left to draw another from
            q = np.where(gone, 0, q) / rest
        px, qx = r.drafted(p, q, child)
        if not r.has_q():
            qx = 1.0
        if accepts(px, qx, r.accept_uniform(child)):
            return child, r.ids[child]
        check_draft(q)
        r.counters[ROWS_RESAMPLED] += int(r.has_q())
        left = np.maximum(p - q, 0)
        if not left.sum() > 0:
            p = left
            break
        if len(r.children[node]) == 1:
            return None, resample(p, q, r.uniform(DOMAIN_RESIDUAL, -1, len(r.path(node))))
        p = left / left.sum()
        if r.ids[child] < r.a.vocab:
            gone[r.ids[child]] = True
    return None, r.draw(p, node, residual=True)


def target_only(r: Request, node: int) -> tuple[int | None, int]:
    """EAGLE trees: children are accepted by the target's mass alone, against one uniform number; the accepted child and its token."""
    p = r.p(node)
    left = p.copy()
    u = r.accept_uniform(r.children[node][0])
    reached = 0.0
    for child in r.children[node]:
        x = r.ids[child]
        if x >= r.a.vocab or repeats(r, child):
            continue
        reached += p[x]
        if p[x] > 0 and (u < reached / r.a.threshold_acc or p[x] >= r.a.threshold_single):
            return child, x
        left[x] = 0
    return None, r.draw(left, node, residual=True)


def kseq_rho(p: np.ndarray, q: np.ndarray, count: int) -> float:
    """The least rho, but for the last of so many bisections, with 1 - (1 - beta)^K <= rho beta."""
    low, rho = 1.0, float(count)
    for _ in range(KSEQ_STEPS if count > 1 else 0):
        middle = (low + rho) / 2
        beta = np.minimum(q, p / middle).sum()
        low, rho = (middle, rho) if 1 - (1 - beta) ** count > middle * beta else (low, middle)
    return rho


def kseq_residual(p: np.ndarray, q: np.ndarray, count: int) -> tuple[float, np.ndarray, float]:
    """p - gamma min(q, p / rho) as the mixture it is drawn from: the share of p, then gamma times a rest; the rest; gamma."""
    rho = kseq_rho(p, q, count)
    beta = np.minimum(q, p / rho).sum()
    gamma = (1 - (1 - beta) ** count) / beta if beta > 0 else float(count)
    return max(1 - gamma / rho, 0.0), np.maximum(p / rho - q, 0), gamma


def kseq(r: Request, node: int) -> tuple[int | None, int]:
    """K-SEQ (SpecTr): each child against p / (rho q), then the residual; the accepted child and its token."""
    p, children = r.p(node), r.children[node]
    q = r.q(node, children[0])
    if len(children) > 1:
        check_draft(q)
    rho = kseq_rho(p, q, len(children))
    for child in children:
        px, qx = r.drafted(p, q, child)
        if accepts(px, rho * qx, r.accept_uniform(child)):
            return child, r.ids[child]
    check_draft(q)
    of_p, rest, gamma = kseq_residual(p, q, len(children))
    total = of_p + gamma * rest.sum()
    if not total > 0:
        return None, r.draw(rest, node, residual=True)
    u = r.uniform(DOMAIN_RESIDUAL, -1, len(r.path(node))) * total
    if u < of_p or not rest.sum() > 0:
        return None, sample(p, u / of_p if u < of_p else 1 - 2.0**-53)
    return None, sample(rest, (u - of_p) / (gamma * rest.sum()))


def race(r: Request, node: int) -> int:
    """The Gumbel-max trick as an exponential race."""
    p = r.p(node)
    if r.a.uniforms is not None:
        u = r.a.uniforms[r.first + r.b + node + 1]
    else:
        assert r.a.seed is not None
        assert r.a.position is not None
        seed, position = int(r.a.seed[r.b]), int(r.a.position[r.b]) + len(r.path(node))
        u = [noise(seed, position, v) for v in range(len(p))]
    times = [-np.log1p(-u[v]) / p[v] if p[v] > 0 else np.inf for v in range(len(p))]
    return int(np.argmin(times))


def typical(r: Request) -> tuple[int, int]:
    """The last node of the longest typical path (ties: the most probable, then the first), and the token behind it."""
    stands, best = {-1: (0, 0.0)}, -1
    for node in [-1, *range(r.k)]:
        if node not in stands:
            continue
        if stands[node] > stands[best]:
            best = node
        if not r.children.get(node):
            continue
        p = r.p(node)
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        threshold = min(r.a.posterior_threshold, r.a.posterior_alpha * np.exp(-entropy))
        for child in r.children[node]:
            x = r.ids[child]
            if x < len(p) and p[x] > threshold:
                stands[child] = stands[node][0] + 1, stands[node][1] + float(np.log(p[x]))
    return best, r.draw(r.p(best), best)


def traverse(r: Request, *, replaced: bool) -> tuple[int, int]:
    """Leaf to root: the accepted node, and the token behind it.

    Every node holds the chance that it is accepted, and what is left of its target times that chance: `left`.
    """
    left = {-1: r.p(-1)}
    chance = {-1: 1.0}
    remaining = {-1: list(r.children[-1])}
    gone = {-1: np.zeros(r.a.vocab, bool)}
    node = -1
    while True:
        if remaining[node]:
            child = remaining[node][0]
            if not replaced and repeats(r, child):
                remaining[node].pop(0)
                continue
            q = r.q(node, child)
            rest = 1 - q[gone[node]].sum()
            if not replaced:
                q = q / rest
            _, qx = r.drafted(left[node], q, child)
            px = float(left[node][r.ids[child]]) if r.ids[child] < r.a.vocab else 0.0
            chance[child] = 0.0 if px <= 0 else px / qx if px < qx else 1.0
            if chance[child] > 0:
                remaining[child], gone[child] = list(r.children[child]), np.zeros(r.a.vocab, bool)
                left[child] = np.empty(0)
                node = child
                if remaining[node]:
                    left[node] = chance[node] * r.p(node)
                continue
        else:
            if node < 0 or r.accept_uniform(node) < chance[node]:
                break
            child, node = node, r.parents[node]
        _remove(r, node, child, left, chance, remaining[node], gone[node], replaced=replaced)
    if not r.children[node]:
        return node, r.draw(r.p(node), node)
    return node, r.draw(left[node], node, residual=True)


def _remove(r: Request, node: int, child: int, left: dict[int, np.ndarray], chance: dict[int, float],
            remaining: list[int], gone: np.ndarray, *, replaced: bool) -> None:  # fmt: skip
    """Takes a rejected child from its parent."""
    q = r.q(node, child)
    check_draft(q)
    r.counters[ROWS_RESAMPLED] += 1
    rest = 1.0 if replaced else 1 - q[gone].sum()
    after = np.maximum(left[node] - np.where(gone & (not replaced), 0, q / rest), 0)
    below = after.sum() + 1 - chance[node]
    left[node] = after / below if below > 0 else after
    chance[node] = float(after.sum() / below) if below > 0 else 1.0
    remaining.pop(0)
    if r.ids[child] < r.a.vocab:
        gone[r.ids[child]] = True
    if not replaced and not 1 - q[gone].sum() > 0:
        remaining.clear()  # nothing was left to draw another from


def walk(r: Request) -> tuple[int, int]:
    """The last accepted node and the token behind it."""
    rule = r.a.rule
    if r.temperature and rule == "typical":
        return typical(r)
    if r.temperature and rule in LEAF_FIRST and r.has_q():
        return traverse(r, replaced=not rule.endswith("without_replacement"))
    node = -1
    while True:
        child: int | None = None
        p = r.p(node)
        if not r.temperature:
            token = int(r.row(node)[0].argmax())
            child = match(r, node, token)
        elif rule in ("sampled", "gumbel"):
            token = r.draw(p, node) if rule == "sampled" else race(r, node)
            child = match(r, node, token)
        elif not r.children[node]:
            token = r.draw(p, node)
        elif rule == "target_only":
            child, token = target_only(r, node)
        elif rule == "kseq":
            child, token = kseq(r, node)
        else:
            child, token = siblings(r, node, replaced=not rule.endswith("without_replacement"))
        if child is None:
            return node, token
        node = child


def verify(logits: np.ndarray, a: VerifyArguments, out: VerifyOutputs) -> None:
    """Fills `out` for every request: logits float32 [sum(K_b + 1), V]."""
    out.output_token_ids[...] = -1
    out.accept_index[...] = -1
    if out.logprobs is not None:
        out.logprobs[...] = np.nan
    for b in range(a.batch):
        out.num_accepted[b] = out.num_emitted[b] = 0
        out.status[b] = ROW_OK
        out.counters[b] = counters = [0, 0, 0, 0]
        try:
            r = Request(logits, a, b, counters)
            if a.max_emit is not None and a.max_emit[b] == 0:
                continue
            node, token = walk(r)
        except BadRowError as bad:
            out.status[b] = bad.status
            continue
        finally:
            out.counters[b] = counters
        path = r.path(node)
        tokens = [*(r.ids[j] for j in path), token]
        emitted = len(tokens) if a.max_emit is None else min(len(tokens), int(a.max_emit[b]))
        if a.stop_ids is not None:
            own = a.stop_ids if a.cu_stop is None else a.stop_ids[a.cu_stop[b] : a.cu_stop[b + 1]]
            stops = np.flatnonzero(np.isin(tokens[:emitted], own))
            emitted = int(stops[0]) + 1 if len(stops) else emitted
        out.output_token_ids[b, :emitted] = tokens[:emitted]
        out.accept_index[b, : len(path)] = path
        out.num_accepted[b], out.num_emitted[b] = len(path), emitted
        if out.logprobs is not None:
            with np.errstate(divide="ignore"):
                found = [np.log(r.p(at)[x]) for at, x in zip([-1, *path], tokens, strict=True)]
            out.logprobs[b, :emitted] = found[:emitted]
