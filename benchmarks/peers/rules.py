"""Rules that no library has on CPUs, as one writes them with numpy or PyTorch: vectorised over the vocabulary and the requests.

All rows are softmaxed at once, as serving code does; of K-SEQ only the two that are used. The walk over a tree goes by lists of
the probabilities of its drafts.
"""

from typing import Any, Protocol

import numpy as np

#: Uniform numbers of acceptance, small enough for every draft; and of the last draw.
ACCEPT, LAST = 1e-12, 0.5
#: Thresholds of typical acceptance that an argmax of normal logits passes, and hardly another token.
EPSILON, DELTA = 0.09, 10.0
KSEQ_STEPS = 16


class Library(Protocol):
    """The operations that the rules need beyond arithmetic, sums and indexing."""

    def softmax(self, x: Any) -> Any: ...

    def positive(self, x: Any) -> Any: ...

    def least(self, x: Any, y: Any) -> Any: ...

    def entropy(self, p: Any) -> Any: ...

    def draw(self, weights: Any) -> np.ndarray:
        """A token of every row [n, V]."""
        ...


class Numpy:
    """numpy"""

    def softmax(self, x: Any) -> Any:
        p = np.exp(x - x.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return p

    def positive(self, x: Any) -> Any:
        return np.maximum(x, 0, out=x)

    def least(self, x: Any, y: Any) -> Any:
        return np.minimum(x, y)

    def entropy(self, p: Any) -> Any:
        return -(p * np.log(np.maximum(p, np.float32(1e-30)))).sum(-1)

    def draw(self, weights: Any) -> np.ndarray:
        sums = weights.cumsum(-1)
        return np.array([np.searchsorted(s, LAST * s[-1], side="right") for s in sums])


class Torch:
    """PyTorch"""

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def softmax(self, x: Any) -> Any:
        return x.softmax(-1)

    def positive(self, x: Any) -> Any:
        return x.clamp_(min=0)

    def least(self, x: Any, y: Any) -> Any:
        return self._torch.minimum(x, y)

    def entropy(self, p: Any) -> Any:
        return self._torch.special.entr(p).sum(-1)

    def draw(self, weights: Any) -> np.ndarray:
        return weights.multinomial(1)[:, 0].numpy()


def verify(lib: Library, rule: str, rows: Any, drafts: Any, q: Any, parents: np.ndarray | None) -> np.ndarray:
    """Tokens [B, path + 1] of logits [B, K + 1, V], drafts [B, K] and their law [B, K, V]; -1 after the end."""
    batch, k = drafts.shape
    out = np.full((batch, k + 1), -1)
    if rule == "sampled":
        drawn = lib.draw(lib.softmax(rows).reshape(-1, rows.shape[-1])).reshape(batch, k + 1)
        accepted = np.cumprod(drawn[:, :k] == np.asarray(drafts), 1).sum(1)
        for b, n in enumerate(accepted):
            out[b, : n + 1] = drawn[b, : n + 1]
        return out
    if rule == "kseq":
        return _kseq(lib, rows, drafts, q, out)
    p = lib.softmax(rows)
    if rule == "block":
        return _block(lib, p, drafts, q, out)
    assert parents is not None
    return _tree(lib, rule, p, drafts, q, parents, out)


def _block(lib: Library, p: Any, drafts: Any, q: Any, out: np.ndarray) -> np.ndarray:
    batch, k = drafts.shape
    each, at = np.arange(batch)[:, None], np.arange(k)[None]
    ratio = np.asarray(p[each, at, drafts]) / np.asarray(q[each, at, drafts])
    reach = np.ones((batch, k + 1))
    for i in range(k):
        reach[:, i + 1] = np.minimum(reach[:, i] * ratio[:, i], 1)
    stands = np.zeros(batch, int)
    for i in range(1, k + 1):
        if i == k:
            h = reach[:, k]
        else:
            left = lib.positive(p[:, i] * _like(p, reach[:, i, None]) - q[:, i])
            z = np.asarray(left.sum(-1))
            whole = z + 1 - reach[:, i]
            h = np.where(whole > 0, z / np.where(whole > 0, whole, 1), 1)
        stands = np.where(h > ACCEPT, i, stands)
    for b, n in enumerate(stands):
        weights = p[b, n] if n == k else lib.positive(p[b, n] * float(reach[b, n]) - q[b, n])
        out[b, :n] = np.asarray(drafts)[b, :n]
        out[b, n] = lib.draw(weights[None])[0]
    return out


def _like(p: Any, x: np.ndarray) -> Any:
    """x in the library of p, as float32."""
    single = x.astype(np.float32)
    return single if isinstance(p, np.ndarray) else p.new_tensor(single)


def _kseq(lib: Library, rows: Any, drafts: Any, q: Any, out: np.ndarray) -> np.ndarray:
    batch, k = drafts.shape
    p, law = lib.softmax(rows[:, 0]), q[:, 0]
    low, rho = np.ones(batch), np.full(batch, float(k))
    for _ in range(KSEQ_STEPS if k > 1 else 0):
        middle = (low + rho) / 2
        beta = np.asarray(lib.least(law, p / _like(p, middle[:, None])).sum(-1))
        more = 1 - (1 - beta) ** k > middle * beta
        low, rho = np.where(more, middle, low), np.where(more, rho, middle)
    ids = np.asarray(drafts)
    for b in range(batch):
        for j in range(k):
            if ACCEPT * rho[b] * float(law[b, ids[b, j]]) < float(p[b, ids[b, j]]):
                out[b, 0] = ids[b, j]
                out[b, 1] = lib.draw(lib.softmax(rows[b, j + 1])[None])[0]
                break
        else:
            taken = lib.least(law[b], p[b] / float(rho[b]))
            beta = float(taken.sum())
            out[b, 0] = lib.draw(lib.positive(p[b] - taken * ((1 - (1 - beta) ** k) / beta))[None])[0]
    return out


def _tree(lib: Library, rule: str, p: Any, drafts: Any, q: Any, parents: np.ndarray, out: np.ndarray) -> np.ndarray:
    batch, k = drafts.shape
    each = np.arange(batch)[:, None]
    mine = np.asarray(p[each, parents[None] + 1, drafts]).tolist()
    ids = np.asarray(drafts).tolist()
    below: list[list[int]] = [[] for _ in range(k + 1)]
    for node, parent in enumerate(parents.tolist()):
        below[parent + 1].append(node)
    inner = [row for row in range(k + 1) if below[row]]
    theirs: list[list[float]] = []
    bounds = np.empty(0)
    if rule == "typical":
        bounds = np.minimum(EPSILON, DELTA * np.exp(-np.asarray(lib.entropy(p[:, inner]))))
    elif rule != "target_only":
        theirs = np.asarray(q[each, np.arange(k)[None], drafts]).tolist()
    for b in range(batch):
        weights = None
        if rule == "typical":
            path = _typical(mine[b], dict(zip(inner, bounds[b].tolist(), strict=True)), below)
        elif rule == "traversal":
            path, weights = _traversal(lib, p[b], mine[b], theirs[b], q[b], ids[b], below)
        else:
            path, weights = _walk(lib, rule, p[b], mine[b], theirs[b] if theirs else [], q, b, ids[b], below)
        row = path[-1] + 1 if path else 0
        out[b, : len(path)] = [ids[b][node] for node in path]
        out[b, len(path)] = lib.draw((p[b, row] if weights is None else weights)[None])[0]
    return out


def _typical(mine: list[float], bounds: dict[int, float], below: list[list[int]]) -> list[int]:
    best: tuple[int, float, list[int]] = (0, 0.0, [])
    waiting: list[tuple[int, float, list[int]]] = [(0, 0.0, [])]
    while waiting:
        row, score, path = waiting.pop()
        if (len(path), score) > best[:2]:
            best = len(path), score, path
        for node in below[row]:
            if mine[node] > bounds[row]:
                waiting.append((node + 1, score + float(np.log(mine[node])), [*path, node]))
    return best[2]


def _walk(lib: Library, rule: str, p: Any, mine: list[float], theirs: list[float], q: Any, b: int, ids: list[int],
          below: list[list[int]]) -> tuple[list[int], Any]:  # fmt: skip
    """Target-only and multi-step sampling: the path, and what the last token is drawn from (None: the row's p)."""
    row, path = 0, []
    while below[row]:
        reached, left, found = 0.0, p[row], None
        for node in below[row]:
            if rule == "target_only":
                reached += mine[node]
                if reached > ACCEPT:
                    found = node
                    break
            elif ACCEPT * theirs[node] < float(left[ids[node]]):
                found = node
                break
            else:
                left = lib.positive(left - q[b, node])
                left = left / left.sum()
        if found is None:
            if rule == "target_only":
                left = _like(p, np.array(p[row]))
                left[[ids[node] for node in below[row]]] = 0
            return path, left
        path.append(found)
        row = found + 1
    return path, None


def _traversal(lib: Library, p: Any, mine: list[float], theirs: list[float], q: Any, ids: list[int],
               below: list[list[int]]) -> tuple[list[int], Any]:  # fmt: skip
    """From the first leaf on; residuals are made as nodes are removed."""
    parent = {node + 1: row for row, nodes in enumerate(below) for node in nodes}
    waiting = [list(nodes) for nodes in below]
    chance, left = {0: 1.0}, {0: None}
    row = 0
    while True:
        if waiting[row]:
            node = waiting[row][0]
            above = chance[row] * mine[node] if left[row] is None else float(left[row][ids[node]])
            chance[node + 1], left[node + 1] = min(above / theirs[node], 1.0), None
            if above > 0:
                row = node + 1
                continue
        elif row == 0 or chance[row] > ACCEPT:
            path, at = [], row
            while at:
                path.append(at - 1)
                at = parent[at]
            return path[::-1], left[row]
        else:
            node, row = row - 1, parent[row]
        rest = p[row] * chance[row] if left[row] is None else left[row]
        rest = lib.positive(rest - q[node])
        mass = float(rest.sum())
        whole = mass + 1 - chance[row]
        left[row], chance[row] = rest / whole, mass / whole
        waiting[row].pop(0)


def layout(parents: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention mask [K + 1, K + 1], positions and padded paths of a tree, as Medusa's generate_medusa_buffers makes them."""
    k = len(parents)
    mask = np.eye(k + 1, dtype=bool)
    mask[:, 0] = True
    for node, up in enumerate(parents.tolist()):
        mask[node + 1] |= mask[up + 1]
        mask[node + 1, node + 1] = True
    depth = mask.sum(1) - 1
    leaves = np.setdiff1d(np.arange(k), parents)
    paths = np.full((len(leaves), depth.max() + 1), -1)
    for i, leaf in enumerate(leaves):
        own = np.flatnonzero(mask[leaf + 1])
        paths[i, : len(own)] = own
    return mask, depth, paths
