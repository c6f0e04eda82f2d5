"""Verification of drafted chains and trees: ours, numpy, PyTorch, vLLM's sampler.

Every draft is accepted, the costliest case for kernels that stop at the first rejection. The peers do what serving code
does: softmax of all rows, acceptance by u q(x) < p(x), then one draw from (p - q)+ or, after the last draft, from p.

A tree is binary below one child of the root; every first child is its parent's argmax, so that the path of the first children
stands. "tree" is greedy: the peers find the argmax of all rows at once and walk the tree over those. "build" is the same without the
work of a vocabulary, over two tokens whose logits the core has at hand, and makes the tree's attention mask, positions and paths
of its parents as well. The other rules' peers stand in peers/rules.py. "kseq" drafts siblings of one node. "sampled" drafts what
is drawn.
"""

from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import numpy as np

import assay
from assay import machine
from assay.ops.tree import tree_build

from . import rules
from .contender import Cell, Prepared
from .rules import ACCEPT, DELTA, EPSILON, LAST

#: Rules over a binary tree; those that read the drafts' law.
TREES = ("tree", "build", "typical", "target_only", "specinfer", "traversal")
WITH_LAW = ("rejection", "block", "specinfer", "traversal", "kseq")
GREEDY = ("greedy", "tree", "build")


def parents_of(rule: str, k: int) -> np.ndarray | None:
    """int32 [k] of a rule's drafts; None of a chain."""
    if rule in TREES:
        return tree_parents(k)
    return np.full(k, -1, np.int32) if rule == "kseq" else None


def path_of(rule: str, k: int) -> list[int]:
    """The drafts that stand."""
    if rule in TREES:
        return first_path(k)
    return [0] if rule == "kseq" else list(range(k))


def tree_parents(nodes: int) -> np.ndarray:
    """int32 [nodes]; -1 the root."""
    return ((np.arange(nodes) - 1) // 2).astype(np.int32)


def first_path(nodes: int) -> list[int]:
    """The nodes from the root down the first children."""
    path = [0]
    while 2 * path[-1] + 1 < nodes:
        path.append(2 * path[-1] + 1)
    return path


def walk(best: np.ndarray, drafts: np.ndarray) -> np.ndarray:
    """Tokens [B, path + 1] that stand of trees of `drafts` [B, K], by the argmax of every row [B, K + 1]; -1 after the end."""
    children: list[list[int]] = [[] for _ in range(drafts.shape[1] + 1)]
    for node, parent in enumerate(tree_parents(drafts.shape[1]).tolist()):
        children[parent + 1].append(node)
    out = np.full((len(best), len(first_path(drafts.shape[1])) + 1), -1)
    for b, (mine, ids) in enumerate(zip(best.tolist(), drafts.tolist(), strict=True)):
        row, depth = 0, 0
        while True:
            out[b, depth] = mine[row]
            row = next((child + 1 for child in children[row] if ids[child] == mine[row]), 0)
            if not row:
                break
            depth += 1
    return out


#: Logits that stand for those in the last-level cache: more than the other caches hold, so that each set is read from there.
CACHED_BYTES = 24 << 20


#: Sets of logits in a rotation, where they are so small that more would take long to prepare; and where they are to cost nothing.
MOST_SETS, FEW_SETS = 4096, 8


@lru_cache(maxsize=1)
def _pool(size: int) -> np.ndarray:
    """float32 [size] of normal noise: one for all cells, for it takes longer than they do."""
    return np.random.default_rng(7).standard_normal(size, dtype=np.float32)


def _rotation(where: str) -> int:
    """Elements to rotate through: more than the last-level cache, or what stands for what is in it."""
    return (CACHED_BYTES if where == "cache" else int(2.5 * machine.describe().last_level_cache_bytes)) // 4


def fits(rule: str, batch: int, k: int, vocab: int, where: str) -> bool:
    """Whether a cell's logits lie where they should, and with them drafts' distributions in this machine's memory."""
    elements = batch * (k + 1) * vocab
    if where == "cache":
        return 2 * elements <= _rotation("cache")
    return elements <= _rotation("memory") and 4 * elements * (2 if rule in WITH_LAW else 1) <= 1 << 30


class Drafts:
    """Logits, and drafts that all stand.

    Attributes
    ----------
    sets : list of (float32 [B, K + 1, V], int64 [B, K])
    q : float32 [B, K, V]
        The drafts' distribution: uniform.
    """

    def __init__(self, cell: Cell) -> None:
        size = cell.batch * (cell.k + 1) * cell.vocab
        sets = min(_rotation(cell.logits) // size, FEW_SETS if cell.rule == "build" else MOST_SETS)
        pool = _pool(_rotation("memory"))[: sets * size]
        rows = [part.reshape(cell.batch, cell.k + 1, cell.vocab) for part in pool.reshape(-1, size)]
        self.sets = [(r, self._drafts(r, cell)) for r in rows]
        drawn = cell.k if cell.rule in WITH_LAW else 0
        self.q = np.full((cell.batch, drawn, cell.vocab), 1 / cell.vocab, np.float32)

    @staticmethod
    def _drafts(rows: np.ndarray, cell: Cell) -> np.ndarray:
        if cell.rule == "sampled":
            flat = rows[:, : cell.k].reshape(-1, cell.vocab)
            drawn = assay.sample(flat, uniforms=np.full(2 * len(flat), LAST)).output_token_ids
            return drawn.reshape(cell.batch, cell.k).astype(np.int64)
        nodes, parents = np.arange(cell.k), parents_of(cell.rule, cell.k)
        if parents is None:
            return rows[:, : cell.k].argmax(-1)
        if cell.rule == "kseq":
            return (rows[:, :1].argmax(-1) + nodes) % cell.vocab
        return (rows.argmax(-1)[:, parents + 1] + ((nodes > 0) & (nodes % 2 == 0))) % cell.vocab

    def checked(self, tokens: np.ndarray, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """(got, want) of emitted tokens [B, path + 1]: the drafts; the last token too if greedy, else that there is one.

        Of "sampled", whose tokens each contender draws by random numbers of its own: that there is a first token.
        """
        rows, drafts = self.sets[0]
        path = path_of(cell.rule, cell.k)
        got = np.array(tokens, np.float64)[:, : len(path) + 1]
        if cell.rule == "sampled":
            return ((got[:, 0] >= 0) & (got[:, 0] < cell.vocab)).astype(float), np.ones(cell.batch)
        row = path[-1] + 1 if path else 0
        last = rows[:, row].argmax(-1) if cell.rule in GREEDY else np.ones(cell.batch)
        if cell.rule not in GREEDY:
            got[:, -1] = (got[:, -1] >= 0) & (got[:, -1] < cell.vocab)
        return got, np.concatenate([drafts[:, path], last[:, None]], 1).astype(np.float64)


class _Sampler:
    """Calls of `_verify` on every set."""

    def versions(self) -> dict[str, str]:
        return {}

    def refuses(self, cell: Cell) -> str | None:
        return None

    def _verify(self, cell: Cell, rows: Any, drafts: Any, q: Any) -> Any:
        """Tokens [B, K + 1] as emitted, -1 after the end."""
        raise NotImplementedError

    def _given(self, array: np.ndarray) -> Any:
        return array

    def prepare(self, cell: Cell) -> Prepared:
        data = Drafts(cell)
        q = self._given(data.q)
        sets = [(self._given(rows), self._given(drafts)) for rows, drafts in data.sets]
        tokens = np.asarray(self._verify(cell, *sets[0], q))
        got, want = data.checked(tokens, cell)
        calls = [partial(self._verify, cell, *s, q) for s in sets]
        return Prepared(calls, got, want, 0.0, warm=cell.logits == "cache")


class Assay(_Sampler):
    """assay.verify"""

    name = "assay"

    def versions(self) -> dict[str, str]:
        return {"assay": assay.__version__}

    def prepare(self, cell: Cell) -> Prepared:
        data = Drafts(cell)
        cu = np.arange(0, cell.batch * cell.k + 1, cell.k, dtype=np.int32)
        uniforms = np.full((cell.batch, cell.k + 2), LAST if cell.rule == "sampled" else ACCEPT)
        uniforms[:, cell.k :] = LAST
        options: dict[str, Any] = {"num_threads": cell.threads, "rule": cell.rule, "uniforms": uniforms.ravel()}
        parents = parents_of(cell.rule, cell.k)
        if parents is not None:
            options["parents"] = np.tile(parents, cell.batch)
        if cell.rule in GREEDY:
            options |= {"rule": "greedy", "temperature": 0.0, "uniforms": None}
        if cell.rule == "typical":
            options |= {"posterior_threshold": EPSILON, "posterior_alpha": DELTA}
        if cell.rule in WITH_LAW:
            options["draft_probs"] = data.q.reshape(-1, cell.vocab)
        calls = [
            partial(
                assay.verify, rows.reshape(-1, cell.vocab), drafts.astype(np.int32).ravel(), cu, **options
            )
            for rows, drafts in data.sets
        ]  # fmt: skip
        tokens = np.asarray(calls[0]().output_token_ids)
        if cell.rule == "build":
            calls = [partial(_build_and, call, parents) for call in calls]
        if cell.rule == "sampled" and (tokens[:, : cell.k] != data.sets[0][1]).any():
            raise ValueError("sampled: expected every draft to stand, got others")
        got, want = data.checked(tokens, cell)
        return Prepared(calls, got, want, 0.0, warm=cell.logits == "cache")


def _build_and(call: Any, parents: np.ndarray) -> Any:
    tree_build(parents)
    return call()


class Numpy(_Sampler):
    """numpy"""

    name = "numpy"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def _verify(self, cell: Cell, rows: Any, drafts: Any, q: Any) -> Any:
        if cell.rule == "build":
            rules.layout(tree_parents(cell.k))
        if cell.rule in ("tree", "build"):
            return walk(rows.argmax(-1), drafts)
        if cell.rule not in ("greedy", "rejection"):
            return rules.verify(rules.Numpy(), cell.rule, rows, drafts, q, parents_of(cell.rule, cell.k))
        batch, k = drafts.shape
        each = np.arange(batch)
        if cell.rule == "greedy":
            best = rows.argmax(-1)
            accepted = np.cumprod(best[:, :k] == drafts, 1).sum(1)
            last = best[each, accepted]
        else:
            p = np.exp(rows - rows.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            at = (each[:, None], np.arange(k)[None], drafts)
            accepted = np.cumprod(ACCEPT * q[at] < p[at], 1).sum(1)
            left = p[each, accepted]
            early = accepted < k
            left[early] = np.maximum(left[early] - q[each[early], accepted[early]], 0)
            sums = left.cumsum(-1)
            last = np.array([np.searchsorted(s, LAST * s[-1], side="right") for s in sums])
        out = np.where(np.arange(k)[None] < accepted[:, None], drafts, -1)
        out = np.concatenate([out, np.full((batch, 1), -1)], 1)
        out[each, accepted] = last
        return out


class Torch(_Sampler):
    """PyTorch.

    Parameters
    ----------
    draw : {"multinomial", "exponential"}
        torch.multinomial, or the argmax of p over exponential noise, as vLLM draws.
    """

    def __init__(self, draw: str) -> None:
        import torch

        self._torch, self._draw = torch, draw
        self.name = f"torch {draw}"

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__}

    def refuses(self, cell: Cell) -> str | None:
        return None if cell.rule == "rejection" or self._draw != "exponential" else "draws for rejection alone"

    def _given(self, array: np.ndarray) -> Any:
        return self._torch.from_numpy(array)

    def prepare(self, cell: Cell) -> Prepared:
        self._torch.set_num_threads(cell.threads)
        self._each = self._torch.arange(cell.batch)
        self._at = self._torch.arange(cell.k)
        return super().prepare(cell)

    def _verify(self, cell: Cell, rows: Any, drafts: Any, q: Any) -> Any:
        torch, each = self._torch, self._each
        with torch.inference_mode():
            if cell.rule == "build":
                rules.layout(tree_parents(cell.k))
            if cell.rule in ("tree", "build"):
                return walk(rows.argmax(-1).numpy(), drafts.numpy())
            if cell.rule not in ("greedy", "rejection"):
                return rules.verify(rules.Torch(torch), cell.rule, rows, drafts, q, parents_of(cell.rule, cell.k))
            k = drafts.shape[1]
            if cell.rule == "greedy":
                best = rows.argmax(-1)
                accepted = (best[:, :k] == drafts).cumprod(1).sum(1)
                last = best[each, accepted]
            else:
                p = rows.softmax(-1)
                mine = p[:, :k].gather(2, drafts[..., None])[..., 0]
                theirs = q.gather(2, drafts[..., None])[..., 0]
                accepted = (ACCEPT * theirs < mine).cumprod(1).sum(1)
                left = p[each, accepted]
                early = accepted < k
                if bool(early.any()):
                    left[early] = (left[early] - q[each[early], accepted[early]]).clamp_(min=0)
                if self._draw == "multinomial":
                    last = left.multinomial(1)[:, 0]
                else:
                    last = left.div_(torch.empty_like(left).exponential_()).argmax(-1)
            out = torch.where(self._at[None] < accepted[:, None], drafts, -1)
            out = torch.cat([out, torch.full((out.shape[0], 1), -1)], 1)
            out[each, accepted] = last
            return out


class Vllm(Torch):
    """vLLM's own rejection_sample with its own kernels for CPUs; the last token is drawn as its sampler draws it."""

    def __init__(self) -> None:
        super().__init__("exponential")
        from . import vllm

        found = vllm.load()
        self.name, self._version, self._sample = "vllm", found.version, found.rejection_sample

    def versions(self) -> dict[str, str]:
        return {"vllm": self._version}

    def refuses(self, cell: Cell) -> str | None:
        return None if cell.rule in ("greedy", "rejection") else "its sampler is greedy or rejects, chains alone"

    def _verify(self, cell: Cell, rows: Any, drafts: Any, q: Any) -> Any:
        torch, greedy = self._torch, cell.rule == "greedy"
        with torch.inference_mode():
            last = rows[:, -1] if greedy else rows[:, -1].softmax(-1)
            last = (last if greedy else last.div_(torch.empty_like(last).exponential_())).argmax(-1)
            options = SimpleNamespace(
                all_greedy=greedy, all_random=not greedy, temperature=torch.full((cell.batch,), 0.0 if greedy else 1.0),
                generators={},
            )  # fmt: skip
            ends = torch.arange(1, cell.batch + 1, dtype=torch.int32) * cell.k
            return self._sample(
                drafts.reshape(-1).int(), [cell.k] * cell.batch, cell.k, ends, None if greedy else q.flatten(0, 1),
                rows[:, :-1].reshape(-1, cell.vocab), last[:, None].int(), options,
            )  # fmt: skip
