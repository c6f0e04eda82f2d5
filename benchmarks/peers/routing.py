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
    """Calls of `_route`, (weights, ids) of each token, with as little around them as a layer has."""

    def versions(self) -> dict[str, str]:
        return {}

    def refuses(self, cell: Cell) -> str | None:
        return None

    def _route(self, logits: Any, top_k: int, num_threads: int) -> tuple[Any, ...]:
        """Weights, ids and what else there is."""
        raise NotImplementedError

    def _given(self, logits: np.ndarray) -> Any:
        return logits

    def prepare(self, cell: Cell) -> Prepared:
        x = logits_of(cell)
        call = partial(self._route, self._given(x), cell.top_k, num_threads=cell.threads)
        weights, ids = (np.asarray(part) for part in call()[:2])
        got = np.zeros(x.shape)
        np.put_along_axis(got, ids.astype(np.int64), weights, 1)
        p = np.exp(x.astype(np.float64))
        kept = np.argsort(-p, 1)[:, : cell.top_k]
        want = np.zeros(x.shape)
        np.put_along_axis(want, kept, np.take_along_axis(p, kept, 1), 1)
        return Prepared([call], got, want / want.sum(1, keepdims=True), 1e-5)


class Assay(_Router):
    """assay.moe_route"""

    name = "assay"

    def versions(self) -> dict[str, str]:
        return {"assay": assay.__version__}

    _route = staticmethod(assay.moe_route)


class Numpy(_Router):
    """numpy: argpartition, then a sort of the kept."""

    name = "numpy"

    def versions(self) -> dict[str, str]:
        return {"numpy": np.__version__}

    def _route(self, logits: Any, top_k: int, num_threads: int) -> tuple[Any, ...]:
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        ids = np.argpartition(-p, top_k - 1, 1)[:, :top_k]
        weights = np.take_along_axis(p, ids, 1)
        order = np.argsort(-weights, 1)
        ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
        return weights / weights.sum(1, keepdims=True), ids


class Torch(_Router):
    """PyTorch, as transformers writes it, all in inference mode: entering it takes a third of such a call."""

    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        torch.inference_mode().__enter__()

    def versions(self) -> dict[str, str]:
        return {"torch": self._torch.__version__}

    def _given(self, logits: np.ndarray) -> Any:
        return self._torch.from_numpy(logits)

    def prepare(self, cell: Cell) -> Prepared:
        self._torch.set_num_threads(cell.threads)
        return super().prepare(cell)

    def _route(self, logits: Any, top_k: int, num_threads: int) -> tuple[Any, ...]:
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids
