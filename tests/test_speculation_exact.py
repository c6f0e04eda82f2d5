"""The kernels where float32 loses nothing: every lossless rule within 1e-12 of the law of plain sampling."""

from fractions import Fraction

import numpy as np
import pytest

import assay
from assay.ops.speculative import RULES
from assay.reference.verification import kseq_rho
from assay.speculation.certify import certify
from assay.speculation.exact import exact_models
from assay.speculation.race import race_law

OP = "spec_verify"
FORK, TRIPLE = [-1, -1, 0], [-1, -1, -1]
CASES = {
    "greedy tree": ("greedy", {"parents": FORK}),
    "sampled chain": ("sampled", {}),
    "sampled tree": ("sampled", {"parents": FORK}),
    "gumbel chain": ("gumbel", {}),
    "gumbel tree": ("gumbel", {"parents": FORK}),
    "gumbel, five tokens": ("gumbel", {"drafts": 1, "vocab": 5}),
    "rejection": ("rejection", {"vocab": 4}),
    "rejection of three": ("rejection", {"drafts": 3, "vocab": 2}),
    "rejection of certain drafts": ("rejection", {"one_hot": True}),
    "block": ("block", {"vocab": 4}),
    "block of three": ("block", {"drafts": 3}),
    "specinfer": ("specinfer", {"parents": FORK}),
    "specinfer of three siblings": ("specinfer", {"parents": TRIPLE}),
    "specinfer of certain drafts": ("specinfer", {"parents": FORK, "one_hot": True}),
    "specinfer without replacement": ("specinfer_without_replacement", {"parents": FORK}),
    "specinfer without replacement, four tokens": ("specinfer_without_replacement", {"parents": [-1, -1], "vocab": 4}),
    "target only": ("target_only", {"parents": FORK}),
    "kseq": ("kseq", {"parents": TRIPLE}),
    "kseq, four tokens": ("kseq", {"parents": TRIPLE, "vocab": 4}),
    "kseq tree": ("kseq", {"parents": [*TRIPLE, 0]}),
    "traversal": ("traversal", {"parents": FORK}),
    "traversal of two branches": ("traversal", {"parents": [-1, -1, 0, 1]}),
    "traversal without replacement": ("traversal_without_replacement", {"parents": FORK}),
}


@pytest.mark.parametrize("name", CASES)
def test_c_kernels_have_exactly_the_law_of_plain_sampling(variant, name):
    rule, how = CASES[name]
    found = certify(rule, backend="c", exact=True, settings=4, isa=variant, **how)
    assert found.tolerance == 1e-12
    assert "(tolerance 1e-12, where float32 rounds nothing)" in str(found)
    assert found.lossless, found
    assert 0 < found.expected_accepted < len(how.get("parents", range(how.get("drafts", 2))))


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_the_twin_and_the_reference_have_it_too(backend):
    for name in ("rejection", "block", "specinfer", "kseq", "traversal", "traversal without replacement"):
        rule, how = CASES[name]
        found = certify(rule, backend=backend, exact=True, **how | {"vocab": 3})
        assert found.lossless, found
        assert found.tolerance == 1e-12
    found = certify("gumbel", backend=backend, exact=True, drafts=1, settings=1)
    assert found.lossless, found


def test_a_race_that_is_none_is_refused():
    def last_but_one(row, u):
        """The second to ring."""
        return np.argsort(-np.log1p(-u), axis=1)[:, 1]

    with pytest.raises(ValueError, match="winner: expected a race"):
        race_law(last_but_one, 1, 3)


def test_every_lossless_rule_is_here():
    assert {rule for rule, _ in CASES.values()} == {*RULES} - {"typical"}


def test_plain_sampling_has_exactly_the_probabilities(variant):
    """Powers of two: the cumulated ones are the ends of the intervals of the uniform, to the last bit."""
    for row in (
        [0.5, 0.25, 0.125, 0.125],
        [0.125, 0, 0.5, 0.25, 0.125],
        [0.25] * 4,
        [2.0**-12, *2.0 ** -np.arange(12.0, 0, -1)],
    ):
        p = np.array(row)
        with np.errstate(divide="ignore"):
            logits = np.log(p / p.max()).astype(np.float32)
        ends = np.cumsum(p)[:-1]
        for u in (ends, np.nextafter(ends, 0)):
            found = assay.sample(np.tile(logits, (len(u), 1)), uniforms=np.repeat(u, 2), isa=variant)
            got = found.output_token_ids[:, 0]
            assert got.tolist() == [int(np.flatnonzero(np.cumsum(p) > x)[0]) for x in u]


def test_an_error_of_one_in_a_billion_is_seen():
    def lenient(*args, uniforms, **how):
        return assay.verify(*args, uniforms=uniforms * (1 - 1e-9), **how)

    for rule in ("rejection", "block", "traversal", "kseq", "gumbel"):
        how = CASES[rule if rule in CASES else f"{rule} tree"][1]
        found = certify(rule, backend="c", exact=True, verify=lenient, **how)
        assert not found.lossless
        assert 1e-12 < found.total_variation < 1e-8


def test_exact_models_are_what_they_say():
    for seed in range(5):
        target, draft = exact_models("traversal", 3, FORK, [seed])
        for prefix in ((), (0,), (1,), (2,), (0, 1)):
            for row in (target(prefix), draft(prefix)):
                assert sum(row) == 1
                assert all(isinstance(w, Fraction) for w in row)
            assert all(w.numerator & (w.numerator - 1) == 0 for w in target(prefix))
        target, draft = exact_models("kseq", 4, TRIPLE, [seed])
        assert kseq_rho(np.array(target(()), float), np.array(draft(()), float), 3) == 2
    with pytest.raises(ValueError, match=r"parents: expected all nodes to have one of \(1, 3, 5\) children"):
        exact_models("kseq", 3, [-1, -1], [0])
    with pytest.raises(ValueError, match="vocab, parents: expected rows that are exact"):
        exact_models("traversal", 1, FORK, [0])
