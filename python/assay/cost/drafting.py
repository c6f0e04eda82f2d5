"""How drafts are proposed and verified, and how sure their acceptance is: chains, trees, blocks, measured lengths."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from assay.cost.draws import Z90, Draws
from assay.cost.roofline import FloatArray

Triple = tuple[float, float, float]
MOST_DRAFTS = 4095


def _check_rates(rates: Sequence[Triple], name: str) -> None:
    for low, middle, high in rates:
        if not 0 <= low <= middle <= high <= 1:
            raise ValueError(f"{name}: expected 0 <= low <= middle <= high <= 1, got {(low, middle, high)}")


@dataclass(frozen=True)
class Speculation:
    """Drafts that are verified ``width - 1`` at a time.

    Attributes
    ----------
    branches
        Children of each node by depth: all 1 is a chain. Not used where ``parents`` is given.
    accept
        (low, middle, high) of P(draft accepted | all before it accepted): one for every depth, or a tuple of them by
        depth. Depths beyond the last one take the last.
    length
        Measured accepted length a step (low, middle, high), the bonus token in, instead of all laws here.
    draft, fixed
        Time of one draft pass and of a verification's bookkeeping, as shares of a plain step of the same case.
    parents
        A tree of any form: the parent of each node by index, -1 for a child of the root, parents first.
    ranks
        Acceptance of the r-th candidate at a place as a share of the first's; by default ``(1 - a)^r``: each candidate
        is as good as the first where the ones before it failed.
    passes
        Draft passes of a verification: one a depth by default (a draft model, EAGLE), 1 for heads that propose all
        depths at once (Medusa, block drafters).
    block
        Verified as one block (Sun et al., arXiv 2403.10444) and not token by token: chains only.
    """

    branches: tuple[int, ...] = (1,)
    accept: Triple | tuple[Triple, ...] = (0.7, 0.7, 0.7)
    length: Triple | None = None
    draft: float = 0.05
    fixed: float = 0.0
    parents: tuple[int, ...] = ()
    ranks: tuple[float, ...] = ()
    passes: int | None = None
    block: bool = False

    def __post_init__(self) -> None:
        """Refuses impossible trees and rates."""
        if self.parents:
            if any(not -1 <= parent < i for i, parent in enumerate(self.parents)):
                raise ValueError("parents: expected -1 or a node before, for each node, got a later one")
        elif not 1 <= len(self.branches) <= 64 or any(not 1 <= b <= 64 for b in self.branches):
            raise ValueError(f"branches: expected 1 to 64 depths of 1 to 64 children, got {self.branches}")
        if self.width - 1 > MOST_DRAFTS:
            raise ValueError(f"branches: expected at most {MOST_DRAFTS} drafts, got {self.width - 1}")
        _check_rates(self.rates, "accept")
        if self.length is not None:
            low, middle, high = self.length
            if not 1 <= low <= middle <= high <= self.depth + 1:
                raise ValueError(f"length: expected 1 to {self.depth + 1} tokens a step (depth + 1), got {self.length}")
        for name, value in (("draft", self.draft), ("fixed", self.fixed)):
            if not 0 <= value <= 100:
                raise ValueError(f"{name}: expected a share of a plain step from 0 to 100, got {value}")
        if self.passes is not None and not 0 <= self.passes <= self.depth:
            raise ValueError(f"passes: expected 0 to the depth of {self.depth}, got {self.passes}")
        if self.block and not self.chain:
            raise ValueError("block: expected a chain, got a tree")
        if any(not 0 <= r <= 1 for r in self.ranks):
            raise ValueError(f"ranks: expected shares from 0 to 1, got {self.ranks}")

    @property
    def rates(self) -> tuple[Triple, ...]:
        """Acceptance by depth: at least one."""
        first = self.accept[0]
        if isinstance(first, tuple):
            return tuple(self.accept)  # type: ignore[arg-type]
        return (self.accept,)  # type: ignore[return-value]

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node of ``parents``: 1 for a child of the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(1 if parent < 0 else found[parent] + 1)
        return tuple(found)

    @property
    def depth(self) -> int:
        """The most drafts that can be accepted."""
        return max(self.depths) if self.parents else len(self.branches)

    @property
    def chain(self) -> bool:
        """One candidate at each depth."""
        return len(self.parents) == self.depth if self.parents else set(self.branches) == {1}

    @property
    def width(self) -> int:
        """Tokens verified at once: all drafts and the last accepted token."""
        if self.parents:
            return 1 + len(self.parents)
        return 1 + sum(math.prod(self.branches[: d + 1]) for d in range(len(self.branches)))

    @property
    def draft_passes(self) -> int:
        """Passes of the drafter for one verification."""
        return self.depth if self.passes is None else self.passes

    @property
    def name(self) -> str:
        """ "k=4", "tree=4-2-1", "tree of 12", with "block" where it is."""
        if self.chain:
            return f"k={self.depth}" + (" block" if self.block else "")
        return f"tree of {len(self.parents)}" if self.parents else "tree=" + "-".join(map(str, self.branches))

    def acceptance(self, draws: Draws) -> list[FloatArray]:
        """P(accepted | all before) of the first candidate at each depth, by draw: one cause for all depths."""
        z = draws.normal("acceptance") / Z90
        rates = self.rates + self.rates[-1:] * self.depth
        return [
            np.clip(middle + np.where(z > 0, z * (high - middle), z * (middle - low)), 0.0, 1.0)
            for low, middle, high in rates[: self.depth]
        ]

    def _share(self, rank: int, accept: FloatArray) -> FloatArray:
        if not self.ranks:
            return np.asarray((1.0 - accept) ** rank)
        share = self.ranks[rank] if rank < len(self.ranks) else 0.0
        before = sum(self.ranks[:rank])
        # What earlier siblings took is gone: all of them together accept at most once.
        return np.clip(np.minimum(share, 1.0 / np.maximum(accept, 1e-12) - before), 0.0, None)

    def tokens_per_step(self, draws: Draws) -> FloatArray:
        """``1 + sum_v prod of acceptance on the path to v``; the block law, or the measured length, where so asked."""
        if self.length is not None:
            low, middle, high = self.length
            z = draws.normal("acceptance") / Z90
            value = middle + np.where(z > 0, z * (high - middle), z * (middle - low))
            return np.clip(value, 1.0, self.depth + 1.0)
        accept = self.acceptance(draws)
        if self.block:
            rates = np.stack(accept, axis=1)
            return np.array([block_length(row) for row in rates])
        total = np.ones(draws.count + 1)
        if self.parents:
            reached: list[FloatArray] = []
            children: dict[int, int] = {}
            for parent, depth in zip(self.parents, self.depths, strict=True):
                rank = children.get(parent, 0)
                children[parent] = rank + 1
                rate = accept[depth - 1]
                here = rate * self._share(rank, rate)
                reached.append(here if parent < 0 else reached[parent] * here)
            return np.asarray(total + np.sum(reached, axis=0))
        alive = np.ones(draws.count + 1)
        for children_here, rate in zip(self.branches, accept, strict=True):
            some = np.sum([rate * self._share(r, rate) for r in range(children_here)], axis=0)
            alive = alive * np.minimum(1.0, some)
            total = total + alive
        return total


def block_length(accept: Sequence[float] | FloatArray) -> float:
    """Expected tokens a step of block verification, of drafts whose acceptance token by token is known.

    ``1 + sum_i E[h_i]``, ``h_i = min(1, h_(i-1) r_i)``, r the ratio of target to draft probability of the draft (Sun et
    al., arXiv 2403.10444). Only ``a_i = E[min(1, r_i)]`` is known; r is taken as log-normal with ``E[r] = 1`` (which a
    ratio of two distributions has), so ``a = 2 Phi(-sigma / 2)``. Not less than token by token, and equal for one draft.
    """
    rates = [float(a) for a in accept]
    if any(not 0 <= a <= 1 for a in rates):
        raise ValueError(f"accept: expected probabilities, got {rates}")
    step = 0.02
    grid = np.arange(-40.0, step / 2, step)  # log h; the last point is h = 1
    weight: FloatArray = np.zeros(grid.size)
    weight[-1] = 1.0
    total = 1.0
    for a in rates:
        if a <= 1e-9:
            break
        sigma = -2.0 * _normal_quantile(a / 2.0)
        if sigma > 1e-6:
            reach = math.ceil((8.0 * sigma + sigma * sigma) / step)
            at = np.arange(-reach, reach + 1) * step
            edges = (np.arange(-reach, reach + 2) - 0.5) * step
            cdf = np.array([0.5 * math.erfc(-(e + sigma * sigma / 2.0) / (sigma * math.sqrt(2.0))) for e in edges])
            moved: FloatArray = np.convolve(weight, np.diff(cdf))
            where = grid[0] + at[0] + step * np.arange(moved.size)
            index = np.clip(np.rint((where - grid[0]) / step).astype(int), 0, grid.size - 1)
            weight = np.asarray(np.bincount(index, moved, grid.size), dtype=np.float64)
        total += float(np.sum(weight * np.exp(grid)))
    return total


def _normal_quantile(p: float) -> float:
    """Of the standard normal, p from 0 to 0.5 (Newton on erfc from Hastings' start, to rounding)."""
    if p >= 0.5:
        return 0.0
    t = math.sqrt(-2.0 * math.log(p))
    x = -(t - (2.515517 + 0.802853 * t + 0.010328 * t * t) / (1 + 1.432788 * t + 0.189269 * t * t + 0.001308 * t**3))
    for _ in range(3):
        error = 0.5 * math.erfc(-x / math.sqrt(2.0)) - p
        x -= error * math.sqrt(2.0 * math.pi) * math.exp(x * x / 2.0)
    return x


# ---- from measured lengths -------------------------------------------------------------------------------------


def conditional_acceptance(lengths: Mapping[int, float]) -> tuple[float, ...]:
    """P(draft i accepted | all before), from mean accepted lengths at 1..n drafts: ratios of successive gains.

    Raises
    ------
    ValueError
        Not 1..n drafts, a length below 1, or the first draft gains nothing or more than a token.
    """
    count = len(lengths)
    if sorted(lengths) != list(range(1, count + 1)) or not count:
        raise ValueError(f"lengths: expected one for each of 1..n drafts, got {sorted(lengths)}")
    reach = np.diff([1.0, *(float(lengths[k]) for k in range(1, count + 1))])
    if not 0 < reach[0] <= 1:
        raise ValueError(f"lengths[1]: expected above 1 and at most 2, got {lengths[1]}")
    # Noise may make a longer chain look worse, or a deeper draft likelier than the one before it.
    reach = np.minimum.accumulate(np.maximum(reach, 1e-6))
    return (float(reach[0]), *(float(b / a) for a, b in itertools.pairwise(reach)))


#: How far one measured acceptance is off, one way: a published length is of one run, and lengths at neighbouring numbers of
#: drafts, each a run of its own, go up and down by 1 to 3%.
MEASURED_WITHIN = 0.02


def extrapolated(known: Sequence[float], depth: int, within: float = MEASURED_WITHIN) -> tuple[Triple, ...]:
    """Acceptance by depth, beyond what was measured too: (low, middle, high), the measured ones give or take ``within``.

    Published drafters disagree on the tail: heads trained for a few positions decay on, deep ones stay level or recover.
    The middle lies half way between the last measured acceptance and its decay going on as between the first and the
    last measured one; the low end decays twice as fast, the high end recovers as fast as it decayed, to the first one.
    """
    rates = [float(a) for a in known]
    if not rates or any(not 0 <= a <= 1 for a in rates):
        raise ValueError(f"known: expected probabilities, got {list(known)}")
    if depth < 1:
        raise ValueError(f"depth: expected at least 1, got {depth}")

    def about(low: float, middle: float, high: float) -> Triple:
        return max(0.0, low - within), middle, min(1.0, high + within)

    found = [about(a, a, a) for a in rates[:depth]]
    decay = 1.0
    if len(rates) > 1 and rates[0] > 0:
        decay = min(1.0, (rates[-1] / rates[0]) ** (1.0 / (len(rates) - 1)))
    for i in range(len(found), depth):
        beyond = i - len(rates) + 1
        high = min(max(rates[0], rates[-1]), rates[-1] / max(decay, 1e-3) ** beyond)
        found.append(about(rates[-1] * decay ** (2 * beyond), rates[-1] * (1.0 + decay**beyond) / 2.0, high))
    return tuple(found)
