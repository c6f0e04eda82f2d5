"""A transformer made of this package's ops, each of whose rows has the same bits in any batch.

Matrices are INT4 (:func:`assay.w4a8_gemm`, whose rows do not depend on the batch). The rest is numpy, one row at a time,
so that no vector boundary and no reduction order depends on what else is computed with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.int4 import PackedInt4, pack, w4a8_gemm
from ..ops.moe import moe_route
from ..ops.quantize import quantize_int4
from .cache import PagedCache


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a decoder-only transformer with RMSNorm, rotary positions, grouped queries and SwiGLU.

    `num_experts` 0 is a dense model; otherwise each layer routes a token to `top_k` experts.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_positions: int = 4096
    num_experts: int = 0
    top_k: int = 2
    group_size: int = 32
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads or self.head_dim % 2:
            raise ValueError(
                "num_heads, head_dim: expected a multiple of num_kv_heads and an even size, got "
                f"{self.num_heads} of {self.num_kv_heads} and {self.head_dim}"
            )
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: expected 1..num_experts = 1..{self.num_experts}, got {self.top_k}")


@dataclass(frozen=True)
class _Mlp:
    gate_up: PackedInt4  # [2 I, H], gate first
    down: PackedInt4  # [H, I]


@dataclass(frozen=True)
class _Layer:
    attention_norm: np.ndarray
    qkv: PackedInt4
    output: PackedInt4
    mlp_norm: np.ndarray
    router: PackedInt4 | None
    experts: list[_Mlp]  # one for a dense model


class Transformer:
    """A model and its forward pass over rows of many requests at once."""

    def __init__(
        self, config: TransformerConfig, embedding: np.ndarray, layers: Sequence[_Layer], norm: np.ndarray,
        head: PackedInt4, num_threads: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.embedding, self.layers, self.norm, self.head = config, embedding, list(layers), norm, head
        self.num_threads = num_threads
        half = config.head_dim // 2
        angles = np.arange(config.max_positions)[:, None] * config.rope_theta ** (-np.arange(half) / half)
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    @classmethod
    def random(cls, config: TransformerConfig, seed: int, num_threads: int | None = None) -> "Transformer":
        """Normal weights of variance 1 / K, rounded to INT4."""
        rng = np.random.default_rng(seed)
        c = config

        def matrix(n: int, k: int) -> PackedInt4:
            w = (rng.standard_normal((n, k)) / np.sqrt(k)).astype(np.float32)
            return pack(*quantize_int4(w, c.group_size))

        layers = []
        for _ in range(c.num_layers):
            mlps = [
                _Mlp(matrix(2 * c.intermediate_size, c.hidden_size), matrix(c.hidden_size, c.intermediate_size))
                for _ in range(max(c.num_experts, 1))
            ]
            layers.append(
                _Layer(
                    np.ones(c.hidden_size, np.float32),
                    matrix((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.hidden_size),
                    matrix(c.hidden_size, c.num_heads * c.head_dim),
                    np.ones(c.hidden_size, np.float32),
                    matrix(c.num_experts, c.hidden_size) if c.num_experts else None,
                    mlps,
                )
            )
        embedding = rng.standard_normal((c.vocab_size, c.hidden_size)).astype(np.float32)
        norm = np.ones(c.hidden_size, np.float32)
        return cls(c, embedding, layers, norm, matrix(c.vocab_size, c.hidden_size), num_threads)

    def new_cache(self, *, num_blocks: int, block_size: int = 16) -> PagedCache:
        c = self.config
        return PagedCache(c.num_layers, c.num_kv_heads, c.head_dim, num_blocks=num_blocks, block_size=block_size)

    def forward(
        self, cache: PagedCache, tokens: np.ndarray, positions: np.ndarray, slots: np.ndarray,
        visible: Sequence[np.ndarray], *, num_layers: int | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Hidden states float32 [R, H] after the final norm; :meth:`logits` of them.

        Parameters
        ----------
        tokens, positions, slots : int [R]
            Of each row; its key and value are written to its slot.
        visible : sequence of int [...]
            The slots that each row attends to, in the order of the sequence, its own among them. Slots of other rows of this
            call are fine.
        num_layers : int, optional
            Leave after so many layers.
        """
        x = self.embedding[tokens]
        for index, layer in enumerate(self.layers[:num_layers]):
            x = x + self._attention(index, layer, x, cache, positions, slots, visible)
            normed = self._norm(x, layer.mlp_norm)
            x = x + (self._mlp(layer.experts[0], normed) if layer.router is None else self._experts(layer, normed))
        return self._norm(x, self.norm)

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """float32 [R, V]."""
        return self._matmul(hidden, self.head)

    def _matmul(self, x: np.ndarray, w: PackedInt4) -> np.ndarray:
        product: np.ndarray = w4a8_gemm(np.ascontiguousarray(x), w, num_threads=self.num_threads)
        return product

    def _norm(self, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for row, result in zip(x, out, strict=True):
            mean = np.add.reduce(row * row) / np.float32(len(row))
            result[:] = row / np.sqrt(mean + np.float32(self.config.norm_eps)) * weight
        return out

    def _rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        """Rotary embedding of [heads, head_dim], halves as pairs."""
        half = x.shape[1] // 2
        a, b = x[:, :half], x[:, half:]
        cos, sin = self._cos[position], self._sin[position]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    def _attention(
        self, index: int, layer: _Layer, x: np.ndarray, cache: PagedCache, positions: np.ndarray, slots: np.ndarray,
        visible: Sequence[np.ndarray],
    ) -> np.ndarray:  # fmt: skip
        c = self.config
        qkv = self._matmul(self._norm(x, layer.attention_norm), layer.qkv).reshape(len(x), -1, c.head_dim)
        kv_end = c.num_heads + c.num_kv_heads
        keys, values = cache.keys[index], cache.values[index]
        queries = []
        for row, position, slot in zip(qkv, positions.tolist(), slots.tolist(), strict=True):
            rotated = self._rotate(row[:kv_end], position)
            queries.append(rotated[: c.num_heads])
            keys[slot] = rotated[c.num_heads :]
            values[slot] = row[kv_end:]
        out = np.empty((len(x), c.num_heads * c.head_dim), np.float32)
        scale = np.float32(c.head_dim**-0.5)
        group = c.num_heads // c.num_kv_heads
        for query, seen, result in zip(queries, visible, out, strict=True):
            # [kv head, query of its group, position, dimension], summed over the last and then over positions
            grouped = query.reshape(c.num_kv_heads, group, 1, c.head_dim)
            k = np.ascontiguousarray(keys[seen].transpose(1, 0, 2))[:, None]
            v = np.ascontiguousarray(values[seen].transpose(1, 2, 0))[:, None]
            scores = (grouped * k).sum(axis=-1) * scale
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            result[:] = (weights[:, :, None, :] * v).sum(axis=-1).reshape(-1)
        return self._matmul(out, layer.output)

    def _mlp(self, mlp: _Mlp, x: np.ndarray) -> np.ndarray:
        both = self._matmul(x, mlp.gate_up)
        size = self.config.intermediate_size
        inner = np.empty((len(x), size), np.float32)
        for row, result in zip(both, inner, strict=True):
            result[:] = row[:size] / (np.float32(1) + np.exp(-row[:size])) * row[size:]
        return self._matmul(inner, mlp.down)

    def _experts(self, layer: _Layer, x: np.ndarray) -> np.ndarray:
        assert layer.router is not None
        weights, ids, _ = moe_route(self._matmul(x, layer.router), self.config.top_k)
        parts = np.zeros((len(x), self.config.top_k, x.shape[1]), np.float32)
        for expert in np.unique(ids).tolist():
            rows, places = np.nonzero(ids == expert)
            parts[rows, places] = self._mlp(layer.experts[expert], x[rows])
        out = np.zeros_like(x)
        for k in range(self.config.top_k):  # in this order for every row
            out += weights[:, k : k + 1] * parts[:, k]
        return out


def step_rows(cache: PagedCache, table: np.ndarray, context: int, mask: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Slots of a step's rows behind `context` cached tokens, and the slots that each row sees by the tree's mask."""
    slots = cache.slots(table, np.arange(context + len(mask)))
    before, own = slots[:context], slots[context:]
    return own, [np.concatenate([before, own[row.astype(bool)]]) for row in mask]
