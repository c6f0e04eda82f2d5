"""What speculation yields: expected tokens per step for chains and trees, and the time per token that follows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


def _probabilities(acceptance: Sequence[float], name: str) -> list[float]:
    values = [float(a) for a in acceptance]
    for i, a in enumerate(values):
        if not 0.0 <= a <= 1.0:
            raise ValueError(f"{name}[{i}]: expected a probability, got {a}")
    return values


def chain_length(acceptance: Sequence[float]) -> float:
    """Expected tokens per step of a chain of drafts: ``1 + sum_i prod_{j<=i} a_j`` (the 1 is the bonus token).

    Parameters
    ----------
    acceptance
        P(draft i accepted | all before it accepted), one a position. Conditional acceptance differs by position
        and by drafter, so a vector is asked for; a single rate repeated is `chain_length_iid`.
    """
    total, alive = 1.0, 1.0
    for a in _probabilities(acceptance, "acceptance"):
        alive *= a
        total += alive
    return total


def chain_length_iid(acceptance: float, num_draft: int) -> float:
    """``(1 - a^(g+1)) / (1 - a)`` for g drafts accepted alike (Leviathan et al., arXiv 2211.17192)."""
    if num_draft < 0:
        raise ValueError(f"num_draft: expected at least 0, got {num_draft}")
    return chain_length([acceptance] * num_draft)


def tree_length(parents: Sequence[int], acceptance: Sequence[float]) -> float:
    """Expected tokens per step of a draft tree (SpecInfer, Medusa, Sequoia): ``1 + sum_v prod of a on the path to v``.

    Parameters
    ----------
    parents
        Parent of each node by index, -1 for a child of the root (the last accepted token). Parents come first.
    acceptance
        P(node accepted | its parent accepted). Siblings exclude each other, so theirs sum to at most 1.

    Raises
    ------
    ValueError
        Lengths differ, a parent that does not come before its child, siblings that sum to more than 1.
    """
    rates = _probabilities(acceptance, "acceptance")
    if len(parents) != len(rates):
        raise ValueError(f"acceptance: expected one value a node ({len(parents)}), got {len(rates)}")
    reached: list[float] = []
    siblings: dict[int, float] = {}
    for i, (parent, rate) in enumerate(zip(parents, rates, strict=True)):
        if not -1 <= parent < i:
            raise ValueError(f"parents[{i}]: expected -1 or a node before {i}, got {parent}")
        siblings[parent] = siblings.get(parent, 0.0) + rate
        if siblings[parent] > 1.0 + 1e-9:
            raise ValueError(
                f"acceptance: expected children of node {parent} to sum to at most 1, got {siblings[parent]}"
            )
        reached.append((1.0 if parent < 0 else reached[parent]) * rate)
    return 1.0 + sum(reached)


@dataclass(frozen=True)
class SpeculativeStep:
    """A speculative decode step: its time, what it yields, and time and speed per token of one request."""

    step_s: float
    tokens_per_step: float
    time_per_token_s: float
    tokens_per_s: float
    speedup: float


def speculative_step(
    *,
    draft_s: float,
    num_draft: int,
    verify_s: float,
    plain_step_s: float,
    tokens_per_step: float,
    batch: int = 1,
    fixed_s: float = 0.0,
) -> SpeculativeStep:
    """``t_token = (g t_draft + t_verify(B, w) + t_fixed) / tau`` and its goodput ``B tau / t_step``.

    Parameters
    ----------
    draft_s, verify_s, plain_step_s, fixed_s
        Seconds of one draft step, of the verification of ``num_draft + 1`` tokens a request, of a step without
        speculation, and of what speculation costs however many drafts there are (vLLM reports 6 to 22% of a step).
    tokens_per_step
        tau, from `chain_length` or `tree_length`: at least 1.
    """
    for name, value, low in (
        ("draft_s", draft_s, 0.0),
        ("verify_s", verify_s, 0.0),
        ("plain_step_s", plain_step_s, 0.0),
        ("fixed_s", fixed_s, 0.0),
        ("tokens_per_step", tokens_per_step, 1.0),
        ("batch", batch, 1),
        ("num_draft", num_draft, 0),
    ):
        if not math.isfinite(value) or value < low:
            raise ValueError(f"{name}: expected a finite number of at least {low:g}, got {value}")
    if verify_s == 0 or plain_step_s == 0:
        raise ValueError("verify_s, plain_step_s: expected seconds above 0, got 0")
    step_s = num_draft * draft_s + verify_s + fixed_s
    per_token = step_s / tokens_per_step
    return SpeculativeStep(
        step_s, tokens_per_step, per_token, batch * tokens_per_step / step_s, plain_step_s / per_token
    )


def best_num_draft(
    acceptance: Sequence[float], verify_s: Sequence[float], draft_s: float, fixed_s: float = 0.0
) -> tuple[int, float]:
    """The number of drafts with the least time per token, and that time in seconds.

    ``verify_s[g]`` is the step with g drafts (``verify_s[0]`` the plain step, which pays no fixed cost), so it has one
    value more than ``acceptance``. Measured widths belong here: kernels have cliffs that no smooth law shows.
    """
    if len(verify_s) != len(acceptance) + 1:
        raise ValueError(f"verify_s: expected {len(acceptance) + 1} times, got {len(verify_s)}")
    lengths = [chain_length(acceptance[:g]) for g in range(len(verify_s))]
    times = [(g * draft_s + verify_s[g] + (fixed_s if g else 0.0)) / lengths[g] for g in range(len(verify_s))]
    best = min(range(len(times)), key=times.__getitem__)
    return best, times[best]
