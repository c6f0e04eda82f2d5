"""Dollars: what tokens, queries and machines cost, rented by the hour or owned."""

import math
from dataclasses import dataclass

import numpy as np

from assay.cost.draws import Draws
from assay.cost.roofline import FloatArray


def _positive(value: float, name: str) -> float:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}: expected a finite number above 0, got {value}")
    return value


def usd_per_million_tokens(
    usd_per_hour: float, tokens_per_s: float, *, num_devices: int = 1, utilisation: float = 1.0
) -> float:
    """``10^6 n price / (3600 X U)``.

    Parameters
    ----------
    usd_per_hour
        Price of one device, US dollars an hour; 0 for one that is free.
    tokens_per_s
        Throughput X of all devices together while they are busy.
    utilisation
        U, the share of paid time that is busy: 1 gives the cost of use, the measured share the cost of allocation.

    Raises
    ------
    ValueError
        A negative or non-finite price, no throughput, a utilisation outside (0, 1].
    """
    if not math.isfinite(usd_per_hour) or usd_per_hour < 0:
        raise ValueError(f"usd_per_hour: expected a finite number of at least 0, got {usd_per_hour}")
    if num_devices < 1:
        raise ValueError(f"num_devices: expected at least 1, got {num_devices}")
    _positive(tokens_per_s, "tokens_per_s")
    if _positive(utilisation, "utilisation") > 1:
        raise ValueError(f"utilisation: expected above 0 and at most 1, got {utilisation}")
    return 1e6 * num_devices * usd_per_hour / (3600.0 * tokens_per_s * utilisation)


def served_tokens_per_s(batch: int, osl: int, prefill_s: float, tpot_s: float) -> float:
    """Output tokens a second when a batch of requests is prefilled one after another, then decoded together.

    ``B o / (B t_prefill + o t_step)``: the prefill of one request (``prefill_s``) is paid once a request, a decode
    step (``tpot_s``) once for the whole batch.
    """
    if batch < 1 or osl < 1:
        raise ValueError(f"batch, osl: expected at least 1, got {batch}, {osl}")
    if not math.isfinite(prefill_s) or prefill_s < 0:
        raise ValueError(f"prefill_s: expected a finite number of at least 0, got {prefill_s}")
    return batch * osl / (batch * prefill_s + osl * _positive(tpot_s, "tpot_s"))


def critical_batch(ops_per_s: float, bytes_per_s: float, bytes_per_weight: float) -> float:
    """The batch at which reading a weight takes as long as multiplying by it: ``F bytes_per_weight / (2 BW)``."""
    return (
        _positive(ops_per_s, "ops_per_s")
        * _positive(bytes_per_weight, "bytes_per_weight")
        / (2.0 * _positive(bytes_per_s, "bytes_per_s"))
    )


#: Above, a number is a slip of the pen: the dearest cluster is some 1e11 dollars, and no grid has taken 10 dollars a kWh for long.
MAX_PURCHASE_USD, MAX_USD_PER_HOUR, MAX_USD_PER_KWH, MAX_PUE = 1e12, 1e6, 100.0, 10.0


@dataclass(frozen=True)
class Owned:
    """A machine that is bought: what an hour of it costs.

    Attributes
    ----------
    usd
        Price (low, middle, high), host and network in.
    years
        Over which it is written off.
    usd_per_kwh
        Price of electricity (low, middle, high).
    pue
        Power of the data centre over that of its machines (low, middle, high); 1.1 to 1.5 is the range of published ones.
    host
        Watts of host and network for each watt of the device.
    """

    usd: tuple[float, float, float]
    years: float = 4.0
    usd_per_kwh: tuple[float, float, float] = (0.06, 0.10, 0.20)
    pue: tuple[float, float, float] = (1.1, 1.25, 1.5)
    host: float = 0.3

    def __post_init__(self) -> None:
        """Refuses what is no price."""
        for name, most in (("usd", MAX_PURCHASE_USD), ("usd_per_kwh", MAX_USD_PER_KWH), ("pue", MAX_PUE)):
            low, middle, high = getattr(self, name)
            if not 0 < low <= middle <= high <= most:
                raise ValueError(f"{name}: expected 0 < low <= middle <= high <= {most:g}, got {getattr(self, name)}")
        if self.pue[0] < 1:
            raise ValueError(f"pue: expected at least 1, got {self.pue[0]}")
        if not 0.1 <= self.years <= 100:
            raise ValueError(f"years: expected 0.1 to 100, got {self.years}")
        if not 0 <= self.host <= 10:
            raise ValueError(f"host: expected 0 to 10 watts for each of the device, got {self.host}")

    def usd_per_hour(self, watts: FloatArray, draws: Draws) -> FloatArray:
        """Write-off of an hour, idle ones in, and its electricity at so many watts of the device."""
        capital = draws.between("purchase", *self.usd) / (self.years * 8760.0)
        power = watts / 1000.0 * (1.0 + self.host) * draws.between("pue", *self.pue)
        return np.asarray(capital + power * draws.between("kwh", *self.usd_per_kwh))


def rent(low: float, high: float, draws: Draws) -> FloatArray:
    """Dollars an hour from a dated range, by draw: its geometric middle, the ends its 90% interval."""
    if not 0 <= low <= high <= MAX_USD_PER_HOUR:
        raise ValueError(f"usd_per_hour: expected 0 <= low <= high <= {MAX_USD_PER_HOUR:g}, got {low} and {high}")
    if high == 0:
        return np.zeros(draws.count + 1)
    return draws.between("price", _positive(low, "usd_per_hour"), math.sqrt(low * high), high)


@dataclass(frozen=True)
class TokenCost:
    """Dollars of a million tokens in (new ones, not cached) and out, and of a request. Arrays by draw."""

    usd_per_million_in: FloatArray
    usd_per_million_out: FloatArray
    usd_per_request: FloatArray


def token_cost(
    usd_per_hour: FloatArray, requests_per_s: FloatArray, prompt_share: FloatArray, new_in: float, out: float
) -> TokenCost:
    """What a machine's hour costs, given to tokens in and out by the share of its time that each takes.

    Parameters
    ----------
    requests_per_s
        At capacity, the cost of use; at the rate that arrives, the cost of allocation: idle time is paid too.
    prompt_share
        Share of the busy time that prompts take.
    new_in, out
        Tokens of a request: new ones of its prompt, and of its answer.
    """
    request = usd_per_hour / 3600.0 / requests_per_s
    return TokenCost(
        1e6 * request * prompt_share / _positive(new_in, "new_in"),
        1e6 * request * (1.0 - prompt_share) / _positive(out, "out"),
        request,
    )


def break_even_queries(usd_per_month: float, usd_per_query: float) -> float:
    """Queries a month at which a subscription pays for what it costs."""
    return _positive(usd_per_month, "usd_per_month") / _positive(usd_per_query, "usd_per_query")


def affordable_usd(usd_per_month: float, queries: float) -> float:
    """What a query may cost so that a subscriber who asks so many a month costs no more than he pays."""
    return _positive(usd_per_month, "usd_per_month") / _positive(queries, "queries")


def distilled_usd(teacher: FloatArray, student: FloatArray, handed_over: float = 0.0) -> FloatArray:
    """Dollars a query of a student that hands a share of the questions on to its teacher, after trying."""
    if not 0 <= handed_over <= 1:
        raise ValueError(f"handed_over: expected a share, got {handed_over}")
    return np.asarray(student + handed_over * teacher)
