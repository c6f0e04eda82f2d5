"""Residuals where p and q nearly agree, where little is left, and at the end of float32's range.

(p - q)+ is taken of float32 probabilities, not of logarithms. Its relative error is without bound where p and q agree; the law of
what is emitted is not the worse for it. Let P be the kernel's p, which sums to S, and let q, which sums to Q, be what was
handed over; the draft is drawn from q / Q, and stands with probability min(1, P/q). With M the sum of min(P, q), the residual sums
to S - M, and

    emitted = min(P, q) / Q + (1 - M / Q) (P - q)+ / (S - M),

which differs from P by at most |1 - S| / 2 + |1 - Q| in total variation, whatever S - M is: a draft is rejected as often as
there is something left. So the distance from the target is that of P itself, and of two sums from 1:

    TV <= |P - p| / 2 + |1 - S| / 2 + |1 - Q|.

P - q is exact in float32 where P and q are within a factor of two (Sterbenz). By logarithms, log p + log1p(-exp(log q - log p)),
the same difference is taken of numbers with an absolute error of 2^-24 |log p| each.
"""

from decimal import Decimal, localcontext

import numpy as np
import pytest

import assay
from assay.jit._vexp import vexp

OP = "spec_verify"
F = np.float32
EMPTY_RESIDUALS = 3


def softmax(logits):
    """To 40 digits."""
    with localcontext(prec=40):
        weights = [Decimal(float(x)).exp() if x > -np.inf else Decimal(0) for x in logits - logits.max()]
        total = sum(weights)
        return [w / total for w in weights]


def rounded(p):
    return np.array([float(x) for x in p]).astype(F)


def near_equal(rng, vocab):
    """q is the target but for a few units in the last place."""
    logits = (rng.standard_normal(vocab) * 2).astype(F)
    q = rounded(softmax(logits))
    return logits, (q.view(np.int32) + rng.integers(-4, 5, vocab, dtype=np.int32)).view(F)


def little_left(rng, vocab):
    """So little that all of it is of the order of rounding, or some thousand times that, moved to the least likely token."""
    logits = (rng.standard_normal(vocab) * 3).astype(F)
    q = rounded(softmax(logits)).astype(float)
    some = min(10.0 ** rng.uniform(-8, -4), q[logits.argmin()])
    q[logits.argmax()] += some
    q[logits.argmin()] -= some
    return logits, q.astype(F)


def far_apart(rng, vocab):
    """Logits over more than exp can tell in float32, q with numbers below its normal ones."""
    logits = np.where(rng.random(vocab) < 0.4, -rng.uniform(80, 110, vocab), rng.standard_normal(vocab)).astype(F)
    q = rng.dirichlet(np.ones(vocab))
    q[rng.random(vocab) < 0.4] *= 10.0 ** -rng.uniform(36, 44)
    return logits, (q / q.sum()).astype(F)


def tails_alone(rng, vocab):
    """The draft covers all but the tail of the target: what is left are its small probabilities."""
    logits = (-np.arange(vocab) * rng.uniform(0.5, 3)).astype(F)
    q = rounded(softmax(logits)).astype(float)
    cut = int(rng.integers(1, vocab))
    q[cut:] = 0
    return logits, (q / q.sum()).astype(F)


FAMILIES = {f.__name__: f for f in (near_equal, little_left, far_apart, tails_alone)}


def emitted_law(logits, q, **how):
    """The kernel's law of the first token: its thresholds, each to the last bit of its uniform."""
    vocab = len(logits)

    def run(drafts, coins, draws):
        n = len(drafts)
        u = np.stack([coins, draws, np.full(n, 0.5)], axis=1).reshape(-1)
        rows = np.broadcast_to(logits, (2 * n, vocab))
        got = assay.verify(np.ascontiguousarray(rows), drafts.astype(np.int32), np.arange(n + 1, dtype=np.int32),
                           np.ascontiguousarray(np.broadcast_to(q, (n, vocab))), uniforms=u, **how)  # fmt: skip
        assert (got.status == 0).all()
        return got

    def threshold(count, holds):
        """The uniforms up to which something holds."""
        low, high = np.full(count, 0.0), np.full(count, 1.0)
        for _ in range(60):
            middle = np.clip((low + high) / 2, 1e-300, 1 - 2.0**-53)
            below = holds(middle)
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return high

    every = np.arange(vocab)
    stands = threshold(vocab, lambda u: run(every, u, np.full(vocab, 0.5)).num_accepted == 1)
    stands[stands > 1 - 2.0**-52] = 1
    law = q.astype(float) / q.astype(float).sum() * stands
    rejected = 1 - law.sum()
    draft = int(stands.argmin())
    if stands[draft] < 1:
        coin = np.full(vocab, np.nextafter(1, 0))
        upto = threshold(
            vocab, lambda u: run(np.full(vocab, draft), coin, u).output_token_ids[:, 0] <= every
        )  # tokens are drawn in ascending order
        upto[-1] = 1
        law = law + rejected * np.diff(upto, prepend=0)
    return law


def by_logarithms(logits, q):
    """The law with ratio and residual of log-probabilities in float32, everything else exact."""
    z = (logits - logits.max()).astype(F)
    log_p = z - F(np.log(np.exp(z.astype(float)).sum()))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore", under="ignore"):
        log_q = np.log(q).astype(F)
        stands = np.where(q > 0, np.minimum(1, np.exp((log_p - log_q).astype(F)).astype(float)), 1)
        left = np.where(log_p > log_q, np.exp(log_p + np.log1p(-np.exp(log_q - log_p))), F(0)).astype(float)
    law = q.astype(float) / q.astype(float).sum() * stands
    if not left.sum() > 0:
        left = np.exp(log_p.astype(float))
    return law + (1 - law.sum()) * left / left.sum()


def distance(law, p):
    return float(sum(abs(Decimal(float(a)) - b) for a, b in zip(law, p, strict=True)) / 2)


def bound(logits, q, p):
    """The docstring's, of the kernel's own P."""
    e = np.array([vexp(x) for x in (logits - logits.max()).astype(F)])
    mine = (e * F(1.0 / float(e.sum(dtype=np.float64)))).astype(float)
    # One sum differs from the kernel's by at most the rounding of its lanes and of their folding, of 2^-24 each.
    sums = (len(logits) / 16 + 5) * 2.0**-24
    return distance(mine, p) + sums + abs(1 - mine.sum()) / 2 + sums / 2 + abs(1 - float(q.astype(float).sum()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_law_is_as_near_as_its_probabilities(variant, name):
    """Total variation from 40 digits, within the bound that the residual's size does not enter."""
    rng, worst = np.random.default_rng(len(name)), [0.0, 0.0]
    for vocab in (2, 3, 5, 8, 17, 17, 40, 40):
        for _ in range(3):
            logits, q = FAMILIES[name](rng, vocab)
            p = softmax(logits)
            found = distance(emitted_law(logits, q, isa=variant), p)
            assert found <= bound(logits, q, p) + 2.0**-50
            worst = [max(worst[0], found), max(worst[1], distance(by_logarithms(logits, q), p))]
    print(f"{name}: by probabilities {worst[0]:.1e}, by logarithms {worst[1]:.1e}")
    assert worst[0] < 3e-7
    assert worst[0] < worst[1] + 2.0**-23  # logarithms would gain no more than a rounding of p


def test_blocks_of_the_vocabulary_add_up():
    """As many terms as sums of float32 have here: two blocks."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(2100) * 2).astype(F)
    p = softmax(logits)
    q = (rounded(p) * rng.uniform(1 - 1e-5, 1 + 1e-5, 2100)).astype(F)
    found = distance(emitted_law(logits, q), p)
    assert found <= bound(logits, q, p)
    assert found < 1e-6


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_what_rounding_alone_leaves_is_of_the_target(backend):
    """Nothing is left, or one token's last bit: what is emitted has a probability, and it is counted where p took over."""
    rng, empty = np.random.default_rng(1), 0
    for _ in range(200):
        logits, q = near_equal(rng, 6)
        logits[5] = -np.inf
        q = rounded(softmax(logits))
        q = (q.view(np.int32) + rng.integers(0, 3, 6, dtype=np.int32) * (q > 0)).view(F)
        got = assay.verify(np.stack([logits] * 2), np.array([int(rng.integers(5))], np.int32), np.array([0, 1], np.int32),
                           q[None], uniforms=np.array([1 - 2.0**-53, rng.random(), 0.5]), backend=backend)  # fmt: skip
        assert got.status[0] == 0
        assert got.output_token_ids[0, 0] < 5
        empty += int(got.counters[0, EMPTY_RESIDUALS])
    assert 20 < empty < 200
