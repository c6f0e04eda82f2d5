"""Expert layers: the data of a cell, ours, and a PyTorch loop. ggml's and ONNX Runtime's are beside their GEMMs, kt-kernel's in kt.

All compute down(silu(gate(x)) * up(x)), weighted and summed, on the same INT4 weights of group 32; gpt-oss's shape too is
given this activation, so that every peer can take part.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

import assay
from assay import machine
from assay.ops._gemm import aligned_empty

from .contender import Cell, Prepared, WeightCache, Weights

GROUP = 32
TOLERANCE = 0.03
#: Kinds of :func:`routing_logits`.
TRAFFIC = ["uniform", "power", "correlated"]
#: Token count up to which calls rotate through more memory than the caches hold, and through how many routings.
DECODE_TOKENS, ROUTINGS = 16, 8
#: Times the last-level cache that decoding rotates through, and bytes that are enough.
ROTATED_CACHES, ROTATED_BYTES = 8.25, 1.25e9
#: Experts of a layer that are drawn: the others are copies, at places of their own in memory, so that a layer is soon made.
DRAWN = 3
#: Memory that is left to the rest of the machine.
SPARE_BYTES = 1.5e9


def matrix(cell: Cell, expert: int, part: int) -> Weights:
    """Of an expert, its gate (0), up (1) or down (2)."""
    n, k = (cell.hidden, cell.intermediate) if part == 2 else (cell.intermediate, cell.hidden)
    return Weights(n, k, GROUP, True, 4, seed=(expert % DRAWN, part))


def every_expert(cell: Cell, make: Callable[[int], Any]) -> list[Any]:
    """What `make` makes of each expert, in order; it is called for the drawn ones."""
    made = [make(expert) for expert in range(min(DRAWN, cell.num_experts))]
    return [made[expert % DRAWN] for expert in range(cell.num_experts)]


def stacked(cell: Cell, parts: tuple[int, ...], what: str) -> np.ndarray:
    """[E, rows, ...]: `what` ("codes", "scales") of these parts of every expert, one below the other."""
    return np.stack(
        every_expert(cell, lambda e: np.concatenate([getattr(matrix(cell, e, part), what) for part in parts]))
    )


def layer_bytes(cell: Cell) -> float:
    """Of all experts' weights as a file holds them."""
    return cell.num_experts * 3 * cell.hidden * cell.intermediate * (0.5 + 2 / GROUP)


def layers_needed(cell: Cell, growth: float = 1.0) -> int:
    """Copies of the layer that a decoding loop rotates through, when it is held in `growth` times its bytes."""
    if cell.tokens > DECODE_TOKENS:
        return 1
    rotated = min(ROTATED_CACHES * machine.describe().last_level_cache_bytes, ROTATED_BYTES)
    return max(1, int(-(-rotated // (growth * layer_bytes(cell)))))


def tokens_of(cell: Cell) -> np.ndarray:
    """float32 [T, H]; the first token is the same in every cell of a layer."""
    first = np.random.default_rng(cell.hidden).standard_normal((1, cell.hidden), dtype=np.float32)
    rest = np.random.default_rng([cell.hidden, cell.tokens]).standard_normal(
        (cell.tokens - 1, cell.hidden), dtype=np.float32
    )
    return np.concatenate([first, rest])


def routing_logits(cell: Cell, which: int) -> np.ndarray:
    """float32 [T, E] whose top-k are the routing: Gumbel noise draws without replacement.

    ``uniform``: every expert as likely. ``power``: probabilities fall as rank^-1.2. ``correlated``: a token's logits are
    0.9 of the last token's and noise. The first token of the first routing is the same in all of them.
    """
    rng = np.random.default_rng([cell.num_experts, which])
    noise = rng.gumbel(size=(cell.tokens, cell.num_experts))
    if cell.routing == "power":
        rank = np.random.default_rng(cell.num_experts).permutation(cell.num_experts) + 1.0
        noise[1 if which == 0 else 0 :] += -1.2 * np.log(rank)
    elif cell.routing == "correlated":
        for t in range(1, cell.tokens):
            noise[t] = 0.9 * noise[t - 1] + (1 - 0.9**2) ** 0.5 * noise[t]
    return noise.astype(np.float32)


def route(logits: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [T, k], weights float32 [T, k]): softmax over the chosen."""
    ids = np.argsort(-logits, 1, kind="stable")[:, :top_k].astype(np.int32)
    kept = np.take_along_axis(logits, ids.astype(np.int64), 1)
    p = np.exp(kept - kept.max(1, keepdims=True))
    return ids, (p / p.sum(1, keepdims=True)).astype(np.float32)


def routings(cell: Cell) -> Iterator[np.ndarray]:
    """The routings that calls rotate through."""
    for which in range(ROUTINGS if cell.tokens <= DECODE_TOKENS else 1):
        yield routing_logits(cell, which)


def distinct_experts(cell: Cell) -> float:
    """Experts that a call touches, on average over the routings."""
    return float(np.mean([len(np.unique(route(logits, cell.top_k)[0])) for logits in routings(cell)]))


def first_token(cell: Cell, dequantized: Any) -> np.ndarray:
    """float64 [H]: the layer's output of the first token of the first routing; `dequantized(expert, part)` gives weights."""
    x = tokens_of(cell)[0].astype(np.float64)
    ids, weights = route(routing_logits(cell, 0)[:1], cell.top_k)
    out = np.zeros(cell.hidden)
    for e, weight in zip(ids[0], weights[0], strict=True):
        gate, up = (dequantized(e, part) @ x for part in (0, 1))
        out += weight * (dequantized(e, 2) @ (gate / (1 + np.exp(-gate)) * up))
    return out


class Experts:
    """What contenders share: layers kept from cell to cell, and the reference computed once a layer.

    Attributes
    ----------
    growth : float
        Bytes in which the contender holds a layer, over those of a file.
    """

    growth = 1.0

    def __init__(self) -> None:
        self._cache = WeightCache()

    def refuses(self, cell: Cell) -> str | None:
        return None

    def _key(self, cell: Cell) -> tuple[Any, ...]:
        """What cells must have alike to be of one layer."""
        return cell.num_experts, cell.hidden, cell.intermediate

    def _layers(self, cell: Cell) -> tuple[list[Any], np.ndarray]:
        """The copies of the layer that the cell rotates through, as the contender keeps them, and the first token's answer.

        Raises
        ------
        MemoryError
            They do not fit in what is free.
        """
        held, needed = self._cache.get(self._key(cell), lambda: {"layers": []}), layers_needed(cell, self.growth)
        if len(held["layers"]) < needed:
            wanted = (needed - len(held["layers"])) * self.growth * layer_bytes(cell) + SPARE_BYTES
            free = machine.memory_bytes("MemAvailable") or wanted
            if free < wanted:
                raise MemoryError(f"wants {wanted / 1e9:.1f} GB for the layer and the rest, {free / 1e9:.1f} are free")
            held["layers"] += self._make(cell, needed - len(held["layers"]))
        if "want" not in held:
            held["want"] = first_token(cell, partial(self._dequantized, cell))
        return held["layers"][:needed], held["want"]

    def _dequantized(self, cell: Cell, expert: int, part: int) -> np.ndarray:
        return matrix(cell, expert, part).dequantized()

    def _make(self, cell: Cell, count: int) -> list[Any]:
        """That many copies of the layer."""
        raise NotImplementedError


class Assay(Experts):
    """assay.moe_experts"""

    name = "assay"

    def versions(self) -> dict[str, str]:
        return {"assay": assay.__version__}

    def _make(self, cell: Cell, count: int) -> list[Any]:
        up, down = (0, 1), (2,)
        drawn = Cell.of("moe", 1, **{**dict(cell.params), "num_experts": min(DRAWN, cell.num_experts)})
        packed = assay.pack_experts(
            *(stacked(drawn, parts, what) for parts in (up, down) for what in ("codes", "scales"))
        )
        shape = assay.ExpertsShape(cell.num_experts, cell.hidden, cell.intermediate)
        which = np.arange(cell.num_experts) % DRAWN

        def placed(one: np.ndarray) -> np.ndarray:
            every = aligned_empty(cell.num_experts * one.shape[1]).reshape(cell.num_experts, -1)
            return np.take(one, which, 0, out=every, mode="clip")

        return [
            assay.PackedExperts(shape, placed(packed.gate_up), packed.gate_up_format, None, placed(packed.down),
                                packed.down_format, None)
            for _ in range(count)
        ]  # fmt: skip

    def prepare(self, cell: Cell) -> Prepared:
        layers, want = self._layers(cell)
        x, out = tokens_of(cell), np.empty((cell.tokens, cell.hidden), np.float32)
        routed = [route(logits, cell.top_k) for logits in routings(cell)]
        calls = [
            partial(assay.moe_experts, x, ids, weights, layer, out, num_threads=cell.threads)
            for ids, weights in routed
            for layer in layers
        ]
        calls[0]()
        return Prepared(calls, out[0].astype(np.float64), want, TOLERANCE)


class Torch(Experts):
    """A loop over the experts, each product by aten::_weight_int4pack_mm_for_cpu."""

    name = "torch int4pack loop"
    growth = (0.5 + 4 / GROUP) / (0.5 + 2 / GROUP)  # scales and zeros

    def __init__(self) -> None:
        super().__init__()
        from .torch import Int4Pack

        self._int4 = Int4Pack()
        self._torch = self._int4.torch

    def versions(self) -> dict[str, str]:
        return self._int4.versions()

    def _make(self, cell: Cell, count: int) -> list[Any]:
        packed = every_expert(cell, lambda e: [self._int4.pack(matrix(cell, e, part)) for part in range(3)])
        return [[[tuple(t.clone() for t in part) for part in expert] for expert in packed] for _ in range(count)]

    def _forward(self, x: Any, logits: Any, layer: Any, cell: Cell) -> Any:
        torch = self._torch
        multiply = partial(self._int4.multiply, group_size=GROUP)
        with torch.inference_mode():
            kept, ids = logits.topk(cell.top_k, dim=-1)
            weights = kept.softmax(-1)
            out = torch.zeros_like(x)
            for e in ids.unique().tolist():
                token, slot = (ids == e).nonzero(as_tuple=True)
                gate, up, down = layer[e]
                rows = x[token]
                hidden = torch.nn.functional.silu(multiply(rows, gate)) * multiply(rows, up)
                out.index_add_(0, token, multiply(hidden, down) * weights[token, slot, None].to(x.dtype))
            return out

    def prepare(self, cell: Cell) -> Prepared:
        torch = self._torch
        torch.set_num_threads(cell.threads)
        layers, want = self._layers(cell)
        x = torch.from_numpy(tokens_of(cell)).to(torch.bfloat16)
        calls = [
            partial(self._forward, x, torch.from_numpy(logits), layer, cell)
            for logits in routings(cell)
            for layer in layers
        ]
        got = calls[0]()[0].float().numpy().astype(np.float64)
        return Prepared(calls, got, want, TOLERANCE)
