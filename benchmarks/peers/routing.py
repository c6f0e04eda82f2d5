"""Routing: softmax over the experts, top-k, renormalised; the logits lie in cache, as a layer leaves them."""

from functools import partial
from typing import Any

import numpy as np

import assay

from .contender import Cell, Prepared


def logits_of(cell: Cell) -> np.ndarray:
    """float32 [T, E]."""
    rng = np.random.default_rng([cell.tokens, cell.num_experts])
    return rng.standard_normal((cell.tokens, cell.num_experts), dtype=np.float32)


class _Router:
    """Calls of `_route`, (weights, ids) of each token."""

    def versions(self) -> dict[str, str]:
        return {}

    def refuses(self, cell: Cell) -> str | None:
        return None

    def _route(self, logits: Any, cell: Cell) -> tuple[Any, Any]:
        raise NotImplementedError

    def _given(self, logits: np.ndarray) -> Any:
        return logits

    def prepare(self, cell: Cell) -> Prepared:
        x = logits_of(cell)
        given = self._given(x)
        weights, ids = (np.asarray(part) for part in self._route(given, cell))
        got = np.zeros(x.shape)
        np.put_along_axis(got, ids.astype(np.int64), weights, 1)
        p = np.exp(x.astype(np.float64))
        kept = np.argsort(-p, 1)[:, : cell.top_k]
        want = np.zeros(x.shape)
        np.put_along_axis(want, kept, np.take_along_axis(p, kept, 1), 1)
        return Prepared([partial(self._route, given, cell)], got, want / want.sum(1, keepdims=True), 1e-5)


class Assay(_Router):
    """assay.moe_route"""

    name = "assay"

    def versions(self) -> dict[str, str]:
        return {"assay": assay.__version__}

    def _route(self, logits: Any, cell: Cell) -> tuple[Any, Any]:
        return assay.moe_route(logits, cell.top_k, num_threads=cell.threads)[:2]


class Numpy(_Router):
    """numpy: argpartition, then a sort of the kept."""

    name = "numpy"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def _route(self, logits: Any, cell: Cell) -> tuple[Any, Any]:
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        ids = np.argpartition(-p, cell.top_k - 1, 1)[:, : cell.top_k]
        weights = np.take_along_axis(p, ids, 1)
        order = np.argsort(-weights, 1)
        ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
        return weights / weights.sum(1, keepdims=True), ids


class Torch(_Router):
    """PyTorch, as transformers writes it."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__}

    def _given(self, logits: np.ndarray) -> Any:
        return self._torch.from_numpy(logits)

    def prepare(self, cell: Cell) -> Prepared:
        self._torch.set_num_threads(cell.threads)
        return super().prepare(cell)

    def _route(self, logits: Any, cell: Cell) -> tuple[Any, Any]:
        with self._torch.inference_mode():
            weights, ids = logits.softmax(-1).topk(cell.top_k, dim=-1)
            return weights / weights.sum(-1, keepdim=True), ids
