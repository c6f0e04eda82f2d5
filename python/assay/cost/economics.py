"""Dollars: what a token costs on a machine rented by the hour."""

import math


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
