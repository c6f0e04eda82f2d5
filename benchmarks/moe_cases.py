"""Layers of real mixtures of experts, random weights of their shapes, and routings: even, skewed, and alike from token to token."""

import numpy as np

import assay
from assay.cost.experts import power_law_popularity
from assay.ops._gemm import aligned_empty

#: name: (E, k, H, I)
LAYERS = {
    "mixtral": (8, 2, 4096, 14336),
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "gpt-oss-20b": (32, 4, 2880, 2880),
}
GROUP = 32
#: Share of a token's noise that it has from its request: consecutive tokens choose alike.
LIKENESS = 0.55


def random_experts(layer: str, rng: np.random.Generator) -> assay.PackedExperts:
    """A layer's experts: one expert's random codes, at every expert's own place in memory."""
    experts, _, hidden, intermediate = LAYERS[layer]
    shape = assay.ExpertsShape(experts, hidden, intermediate)

    def stacked(n: int, k: int) -> np.ndarray:
        scales = np.full((n, k // GROUP), 0.3 / np.sqrt(k), np.float16)
        one = assay.pack(rng.integers(0, 256, (n, k // 2), dtype=np.uint8), scales).data
        every = aligned_empty(experts * one.nbytes).reshape(experts, one.nbytes)
        every[:] = one
        return every

    columns = -(-intermediate // 16) * 32
    up, down = stacked(columns, hidden), stacked(hidden, intermediate)
    return assay.PackedExperts(shape, up, (GROUP, True), None, down, (GROUP, True), None)


def router_logits(
    experts: int, top_k: int, batch: int, width: int, routing: str, rng: np.random.Generator
) -> np.ndarray:
    """Logits float32 [batch * width, E] of `batch` requests of `width` consecutive tokens each.

    uniform: Gumbel noise, so that the choice is a draw of k without replacement; power-law: around the logarithms of popularities
    rank^-1.2, in an order of its own; correlated: Gaussian noise, of which a request's tokens share LIKENESS.
    """
    shape = (batch, width, experts)
    if routing == "correlated":
        own = rng.standard_normal(shape)
        noise = np.sqrt(LIKENESS) * rng.standard_normal((batch, 1, experts)) + np.sqrt(1 - LIKENESS) * own
    else:
        noise = rng.gumbel(size=shape)
    if routing == "power-law":
        noise = noise + np.log(rng.permutation(power_law_popularity(experts, top_k, 1.2)))
    return noise.reshape(-1, experts).astype(np.float32)


ROUTINGS = ("uniform", "power-law", "correlated")
