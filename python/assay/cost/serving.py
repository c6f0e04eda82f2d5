"""A server in steady state: how many requests it holds at an arrival rate, how fast they go, and when it is full.

Each step carries a token (or a verification) of every running request, and the share of prompts that replaces the
requests that finish. With B running, tau tokens a step and o tokens an answer, ``B tau / o`` requests finish in a step and
so many prompts of ``s (1 - h)`` new tokens ride along: the step's time is that of the mixture, one pass over the weights
for both. Requests finish at ``g(B) = B tau / (o t(B))``, and at an arrival rate of lambda the batch is where
``g(B) = lambda`` (Little's law: ``B = lambda o t(B) / tau``).
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from assay.cost.cases import Case, Group, run_pass
from assay.cost.draws import Draws, Part
from assay.cost.roofline import FloatArray

#: Above this utilisation a mean waiting time says nothing: it grows as 1 / (1 - rho), and a capacity that is 10% off
#: (published simulators were 22% off) puts it anywhere.
REFUSED, FLAGGED = 0.9, 0.7
MAX_RATE_PER_S = 1e9  # beyond any server: a slip of the pen
GRID = 24  # batches at which a step is priced; between them its time is interpolated in log


@dataclass(frozen=True)
class Steady:
    """A server at an arrival rate. Arrays are by draw, element 0 the estimate.

    Attributes
    ----------
    most
        Requests that it can hold: the batch asked for, or what memory allows.
    capacity_per_s
        Requests a second that it can finish at most, at that batch.
    utilisation
        Arrivals over capacity; at 1 and above no steady state exists, and the rest is what the full server does.
    running
        Requests at once in steady state.
    tpot_s, ttft_s
        Time per output token while decoding; time to the first token without waiting.
    wait_s
        Mean time in the queue; None where the utilisation is `REFUSED` or more: ``why_no_wait`` says so.
    prompt_share
        Share of the steps' time that prompts take.
    watts
        Mean, idle time in; None where the machine's watts are unknown.
    """

    case: Case
    rate_per_s: float
    most: int
    capacity_per_s: FloatArray
    utilisation: FloatArray
    running: FloatArray
    tpot_s: FloatArray
    ttft_s: FloatArray
    wait_s: FloatArray | None
    why_no_wait: str
    prompt_share: FloatArray
    watts: FloatArray | None

    @property
    def saturated(self) -> bool:
        """More arrives than can be finished."""
        return bool(self.utilisation[0] >= 1.0)

    @property
    def requests_per_s(self) -> FloatArray:
        """Finished: what arrives, or the capacity."""
        return np.minimum(self.rate_per_s, self.capacity_per_s)

    @property
    def tokens_per_s(self) -> FloatArray:
        """Output tokens a second."""
        return self.requests_per_s * self.case.mean_osl


def mixed_step(case: Case, requests: float, draws: Draws) -> tuple[Part, Part, FloatArray]:
    """A step of steady state, the same step without its prompts, and the tokens that it yields a request.

    Prompts ride along as whole requests' worth of new tokens: ``requests tau / o`` of them a step on average, in chunks
    over their mean past.
    """
    spec, past = case.speculation, case.isl + case.mean_osl / 2.0
    one = np.ones(draws.count + 1)
    tokens = one if spec is None else spec.tokens_per_step(draws)
    width = 1 if spec is None else spec.width
    new = max(1, round(case.isl * (1.0 - case.prefix_hit)))
    # The estimate's yield sets the share: a draw's own would need another pass over the grid for each.
    prompts = requests * float(tokens[0]) / case.mean_osl
    decode = Group(requests, width, past, requests * width)
    # A prompt of p tokens looks back on what is cached and, in chunks, on half of itself.
    prompt = Group(prompts, new, float(case.isl - new), prompts)
    alone = run_pass(case, [decode], draws)
    both = run_pass(case, [decode, prompt], draws)
    if spec is not None:
        plain = run_pass(case, [Group(requests, 1, past, requests)], draws)
        drafts = plain.times(spec.draft_passes * spec.draft + spec.fixed)
        alone, both = alone + drafts, both + drafts
    return both, alone, tokens


def queue_wait_s(utilisation: FloatArray, servers: float, service_s: FloatArray, variation: float = 1.0) -> FloatArray:
    """Mean wait of a queue before ``servers`` places (Sakasegawa 1977; Poisson arrivals, exponential service at 1).

    ``S / m * rho^(sqrt(2 (m + 1)) - 1) / (1 - rho) * (1 + cv^2) / 2``; S the stay in a place, cv its variation.
    """
    rho = np.minimum(utilisation, 1.0 - 1e-12)
    power = math.sqrt(2.0 * (servers + 1.0)) - 1.0
    return np.asarray(service_s / servers * rho**power / (1.0 - rho) * (1.0 + variation * variation) / 2.0)


def steady(case: Case, rate_per_s: float, draws: Draws | None = None) -> Steady:
    """The server of a case (its ``batch`` the most requests at once) at so many requests a second.

    Raises
    ------
    ValueError
        A rate that is no finite number above 0, a static batch, or a model that does not fit.
    """
    draws = draws or Draws()
    if not 0 < rate_per_s <= MAX_RATE_PER_S:
        raise ValueError(f"rate_per_s: expected above 0 and at most {MAX_RATE_PER_S:g}, got {rate_per_s}")
    if not case.continuous:
        raise ValueError("continuous: expected continuous batching, got a static batch")
    if case.room == 0:
        have, need = case.machine.memory_bytes or 0.0, replace(case, batch=1).memory_needed
        raise ValueError(
            f"{case.model.name} on {case.machine.name}: expected room for weights and one request, got {have / 1e9:.4g} GB for "
            f"{need / 1e9:.4g} GB: {math.ceil(need / have)} of them hold it"
        )
    most = case.running
    grid = np.unique(np.concatenate([np.geomspace(min(0.05, most / 2), most, GRID), [min(1.0, float(most))]]))
    priced = [mixed_step(case, float(b), draws) for b in grid]
    time = np.stack([both.time_s for both, _, _ in priced], axis=1)  # [draws, grid]
    share = np.stack([1.0 - alone.time_s / both.time_s for both, alone, _ in priced], axis=1)
    tokens = priced[0][2]
    finished = grid * tokens[:, None] / (case.mean_osl * time)
    # Numerically monotone: more requests never finish fewer a second (products' times grow less than linearly).
    finished = np.maximum.accumulate(finished, axis=1)
    capacity = finished[:, -1]
    rho = rate_per_s / capacity
    log_grid = np.log(grid)
    running = np.empty(rho.size)
    step, prompt = np.empty(rho.size), np.empty(rho.size)
    for i in range(rho.size):
        wanted = min(rate_per_s, float(capacity[i]))
        if wanted <= finished[i, 0]:  # an almost idle server: its step is that of the smallest batch
            at = log_grid[0]
            running[i] = wanted / finished[i, 0] * grid[0]
        else:
            at = float(np.interp(math.log(wanted), np.log(finished[i]), log_grid))
            running[i] = math.exp(at)
        step[i] = math.exp(float(np.interp(at, log_grid, np.log(time[i]))))
        prompt[i] = float(np.interp(at, log_grid, share[i]))
    tpot = step / tokens
    ttft = _first_token(case, float(running[0]), draws)
    wait, why = None, ""
    if rho[0] >= 1.0:
        why = f"no steady state: {rate_per_s:.4g} requests arrive a second, {capacity[0]:.4g} can be finished"
    elif rho[0] >= REFUSED:
        why = f"refused: at {rho[0]:.0%} of capacity a waiting time is a matter of the last percent of capacity"
    else:
        wait = queue_wait_s(np.minimum(rho, REFUSED), most, case.mean_osl * tpot + ttft)
        wait = np.where(wait < 1e-6, 0.0, wait)  # less than a microsecond is none
    return Steady(
        case=case,
        rate_per_s=rate_per_s,
        most=most,
        capacity_per_s=capacity,
        utilisation=rho,
        running=running,
        tpot_s=tpot,
        ttft_s=ttft,
        wait_s=wait,
        why_no_wait=why,
        prompt_share=prompt,
        watts=_mean_watts(case, priced[-1][0], np.minimum(1.0, rho), draws),
    )


def _first_token(case: Case, running: float, draws: Draws) -> FloatArray:
    """Steps of a prompt's chunks, each beside the running requests."""
    spec, past = case.speculation, case.isl + case.mean_osl / 2.0
    width = 1 if spec is None else spec.width
    new = max(1, round(case.isl * (1.0 - case.prefix_hit)))
    chunk = case.machine.chunk(case.weights, new)
    count = math.ceil(new / chunk)
    decode = Group(running, width, past, running * width)
    return run_pass(case, [decode, Group(1, round(new / count), case.isl / 2.0, 1)], draws).times(float(count)).time_s


def _mean_watts(case: Case, busiest: Part, busy: FloatArray, draws: Draws) -> FloatArray | None:
    """Watts between idle and those of the full server, by utilisation."""
    full = case.machine.power(busiest, draws)
    if full is None:
        return None
    nothing = Part(busiest.time_s, 0.0 * busiest.time_s, 0.0 * busiest.time_s, busiest.time_s)
    idle = case.machine.power(nothing, draws)
    assert idle is not None
    return np.asarray(idle + (full - idle) * busy)
