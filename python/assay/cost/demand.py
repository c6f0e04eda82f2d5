"""What a query or a task asks for, in tokens: text, images, video, hidden reasoning, loops of an agent; as distributions.

Two kinds of spread are kept apart: tasks differ from each other (`Spread`, 5th to 95th percentile over tasks), and prices are
not known exactly (draws). A mean over tasks is what a month costs; the percentiles are what one task may.
"""

import math
from dataclasses import dataclass

import numpy as np

from assay.cost.roofline import FloatArray
from assay.model import Vision

Z95 = 1.6448536269514722


@dataclass(frozen=True)
class Spread:
    """A quantity that differs from task to task: log-normal, ``low`` and ``high`` its 5th and 95th percentile."""

    low: float
    high: float

    def __post_init__(self) -> None:
        """Refuses what is no range of a non-negative quantity."""
        if not 0 <= self.low <= self.high < math.inf or (self.low == 0) != (self.high == 0):
            raise ValueError(f"range: expected 0 < low <= high, or 0, got {self.low}..{self.high}")

    @property
    def sigma(self) -> float:
        """Standard deviation of the log."""
        return 0.0 if self.low == self.high else math.log(self.high / self.low) / (2.0 * Z95)

    @property
    def median(self) -> float:
        """Half of the tasks take less."""
        return math.sqrt(self.low * self.high)

    @property
    def mean(self) -> float:
        """``median exp(sigma^2 / 2)``: above the median, for a few long tasks weigh."""
        return self.median * math.exp(self.sigma**2 / 2.0)

    def at(self, z: FloatArray) -> FloatArray:
        """Values at standard normal scores."""
        return np.asarray(self.median * np.exp(self.sigma * z))


def exactly(value: float) -> Spread:
    """The same for every task."""
    return Spread(value, value)


def image_tokens(vision: Vision, width: int, height: int) -> int:
    """Tokens that one image becomes: a fixed number, or one for each ``patch x merge`` square of pixels.

    Raises
    ------
    ValueError
        An image smaller than one such square, or larger than 65536 a side.
    """
    if not (1 <= width <= 65536 and 1 <= height <= 65536):
        raise ValueError(f"image: expected sides of 1 to 65536 pixels, got {width} x {height}")
    if vision.tokens is not None:
        return vision.tokens
    side = vision.patch * vision.merge
    columns, rows = width // side, height // side
    if not columns * rows:
        raise ValueError(f"image: expected at least {side} x {side} pixels, got {width} x {height}")
    return columns * rows


def video_tokens(vision: Vision, seconds: float, fps: float, width: int, height: int) -> int:
    """Tokens of a clip sampled at ``fps``: frames, ``temporal`` of them merged, times the tokens of an image."""
    if not (0 < seconds <= 1e6 and 0 < fps <= 1000):
        raise ValueError(f"video: expected seconds and frames a second above 0, got {seconds} s at {fps}")
    frames = max(1, math.ceil(seconds * fps / vision.temporal))
    return frames * image_tokens(vision, width, height)


def encoder_flops(vision: Vision, tokens: int) -> float:
    """Operations of the vision tower for so many tokens: two a weight for each of its patches."""
    return 2.0 * vision.params * tokens * (vision.merge**2 if vision.tokens is None else vision.patches_per_token)


@dataclass(frozen=True)
class Task:
    """What one task asks of a model.

    Attributes
    ----------
    prompt
        Tokens of the first prompt, images and video in.
    answer
        Visible tokens out of each call.
    hidden
        Reasoning tokens out of each call, that nobody reads.
    calls
        Calls of the model in a task: 1 for a query, 10 to 20 for an agent, 100 and more for an autonomous one.
    returned
        Tokens that a tool's answer adds to the context after each call.
    prefix_hit
        Share of what earlier calls put into the context that is found in a cache.
    keeps_hidden
        Whether hidden tokens stay in the context of later calls.
    """

    prompt: Spread
    answer: Spread
    hidden: Spread = Spread(0.0, 0.0)
    calls: Spread = Spread(1.0, 1.0)
    returned: Spread = Spread(0.0, 0.0)
    prefix_hit: float = 0.0
    keeps_hidden: bool = False

    def __post_init__(self) -> None:
        """Refuses tasks that ask for nothing."""
        if self.prompt.low < 1 or self.answer.high + self.hidden.high < 1 or self.calls.low < 1:
            raise ValueError(
                f"task: expected at least one token in, one out and one call, got {self.prompt.low:g} in, "
                f"{self.answer.high + self.hidden.high:g} out and {self.calls.low:g} calls"
            )
        if not 0 <= self.prefix_hit <= 1:
            raise ValueError(f"prefix_hit: expected a share, got {self.prefix_hit}")


@dataclass(frozen=True)
class Demand:
    """Tokens of tasks, one element a sampled task: new and cached ones in, and out; and the longest context."""

    new_in: FloatArray
    cached_in: FloatArray
    out: FloatArray
    longest: FloatArray


def demand(task: Task, count: int = 4096, seed: int = 0) -> Demand:
    """Tokens of ``count`` tasks.

    With n calls, a first prompt of s and g tokens more in the context after each call, the prompts are
    ``n s + g n (n - 1) / 2`` tokens in all: quadratic in the calls, unless a cache holds what was there before.
    """
    rng = np.random.default_rng([seed, 20])
    z = rng.standard_normal((5, count))
    prompt, answer, hidden = task.prompt.at(z[0]), task.answer.at(z[1]), task.hidden.at(z[2])
    calls = np.maximum(1.0, np.rint(task.calls.at(z[3])))
    grows = answer + task.returned.at(z[4]) + (hidden if task.keeps_hidden else 0.0)
    again = prompt * (calls - 1.0) + grows * np.maximum(0.0, (calls - 1.0) * (calls - 2.0) / 2.0)
    fresh = prompt + grows * (calls - 1.0)  # each call adds its own growth, new to the cache
    return Demand(
        new_in=fresh + (1.0 - task.prefix_hit) * again,
        cached_in=task.prefix_hit * again,
        out=calls * (answer + hidden),
        longest=prompt + grows * calls + hidden,
    )


@dataclass(frozen=True)
class TaskCost:
    """Dollars of a task: the mean over tasks by draw, and what tasks range over at the estimate (5th, 50th, 95th)."""

    mean_usd: FloatArray
    tasks_usd: tuple[float, float, float]
    mean_in: float
    mean_out: float


def task_cost(
    tokens: Demand, usd_per_million_in: FloatArray, usd_per_million_out: FloatArray, cached: float = 0.0
) -> TaskCost:
    """Prices of tokens times the tokens of tasks; ``cached``: price of a cached token as a share of a new one's."""
    if not 0 <= cached <= 1:
        raise ValueError(f"cached: expected a share of the price of a new token, got {cached}")
    paid_in = tokens.new_in + cached * tokens.cached_in
    mean = (paid_in.mean() * usd_per_million_in + tokens.out.mean() * usd_per_million_out) / 1e6
    each = (paid_in * usd_per_million_in[0] + tokens.out * usd_per_million_out[0]) / 1e6
    low, middle, high = (float(v) for v in np.percentile(each, [5.0, 50.0, 95.0]))
    return TaskCost(
        np.asarray(mean),
        (low, middle, high),
        float((tokens.new_in + tokens.cached_in).mean()),
        float(tokens.out.mean()),
    )
