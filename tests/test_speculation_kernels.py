"""The kernels themselves under enumerated uniforms: every lossless rule has the target's law, every lossy one has not."""

import inspect
from decimal import Decimal, localcontext

import numpy as np
import pytest

import assay
from assay import reference
from assay.jit._vexp import vexp
from assay.reference.philox import noise
from assay.speculation import policies
from assay.speculation.certify import certify, random_models
from assay.speculation.propose import DraftModelProposer
from assay.speculation.transport import acceptance
from variants import runnable_variants

OP = "spec_verify"
FORK = [-1, -1, 0]  # two children of the root, one grandchild
LOSSLESS = {
    "greedy chain": ("greedy", {}),
    "greedy tree": ("greedy", {"parents": FORK}),
    "sampled chain": ("sampled", {}),
    "sampled tree": ("sampled", {"parents": FORK}),
    "gumbel chain": ("gumbel", {}),
    "gumbel tree": ("gumbel", {"parents": FORK}),
    "rejection": ("rejection", {}),
    "rejection of certain drafts": ("rejection", {"one_hot": True}),
    "block": ("block", {}),
    "block of three": ("block", {"drafts": 3, "vocab": 2}),
    "block of certain drafts": ("block", {"one_hot": True}),
    "specinfer": ("specinfer", {"parents": FORK}),
    "specinfer of three siblings": ("specinfer", {"parents": [-1, -1, -1]}),
    "specinfer of certain drafts": ("specinfer", {"parents": FORK, "one_hot": True}),
    "specinfer without replacement": ("specinfer_without_replacement", {"parents": FORK}),
    "target only": ("target_only", {"parents": FORK}),
    "kseq of two": ("kseq", {"parents": [-1, -1], "vocab": 4}),
    "kseq of three": ("kseq", {"parents": [-1, -1, -1]}),
    "kseq tree": ("kseq", {"parents": FORK}),
    "traversal": ("traversal", {"parents": FORK}),
    "traversal of two branches": ("traversal", {"parents": [-1, -1, 0, 1], "vocab": 2}),
    "traversal of certain drafts": ("traversal", {"parents": FORK, "one_hot": True}),
    "traversal without replacement": ("traversal_without_replacement", {"parents": FORK}),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_c_kernels_have_the_target_law(variant, name):
    """Within 1e-6: float32 probabilities, a few 1e-7 each."""
    rule, how = LOSSLESS[name]
    found = certify(rule, backend="c", settings=2, isa=variant, **how)
    assert found.lossless, found
    assert "(tolerance 1e-06, as float32 rounds)" in str(found)


# The reference takes some 0.1 ms a request: one setting each.
@pytest.mark.parametrize("name", [n for n in LOSSLESS if not {"three", "certain"} & {*n.split()}])
def test_the_reference_has_the_target_law(name):
    rule, how = LOSSLESS[name]
    found = certify(rule, settings=1, **({"vocab": 2} | how if rule not in ("rejection", "kseq") else how))
    assert found.lossless, found
    assert found.tolerance == 1e-12


LOSSY = {
    "typical": ("typical", {}, 0.2),
    "target only, accumulated": ("target_only", {"threshold_acc": 0.9}, 0.02),
    "target only, single": ("target_only", {"threshold_single": 0.3}, 0.1),
}


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_rules_are_shown_biased_and_say_so(name):
    rule, how, least = LOSSY[name]
    found = certify(rule, backend="c", parents=FORK, settings=1, seed=2, **how)
    assert not found.lossless
    assert found.total_variation > least
    assert found.counter_example.draft_token_ids is not None
    rows = np.zeros((2, 4), np.float32)
    got = assay.verify(
        rows,
        np.array([1], np.int32),
        np.array([0, 1], np.int32),
        rule=rule,
        seed=1,
        position=0,
        parents=np.array([-1], np.int32),
        **how,
    )
    assert not got.lossless


def test_a_wrong_kernel_is_shown_biased():
    """Named rules are judged by what they emit: a kernel whose coins are lenient, one whose residual is p."""

    def lenient(*args, uniforms, **how):
        return assay.verify(*args, uniforms=uniforms**1.05, **how)

    def of_p(logits, ids, cu, probs, *, uniforms, **how):
        got = assay.verify(logits, ids, cu, probs, uniforms=uniforms, **how)
        k = int(cu[1])
        tokens = got.output_token_ids.copy()
        for b in np.flatnonzero(got.num_accepted < k):
            row = reference.softmax(logits[b * (k + 1) + got.num_accepted[b]])
            tokens[b, got.num_accepted[b]] = reference.sample(row, uniforms[b * (k + 2) + k])
        return got._replace(output_token_ids=tokens)

    for wrong in (lenient, of_p):
        found = certify("rejection", backend="c", verify=wrong, settings=2)
        assert not found.lossless
        assert found.total_variation > 1e-3


def test_kernels_accept_as_much_as_the_exact_rules():
    """The same settings as a policy in exact probabilities."""
    pairs = {
        "rejection": (policies.rejection(2), {}),
        "block": (policies.block(2), {}),
        "specinfer": (policies.multi_round([2]), {"parents": [-1, -1]}),
        "specinfer_without_replacement": (policies.multi_round([2], replacement=False), {"parents": [-1, -1]}),
        "kseq": (policies.k_seq(2), {"parents": [-1, -1]}),
        "traversal": (policies.traversal([-1, -1]), {"parents": [-1, -1]}),
        "traversal_without_replacement": (policies.traversal([-1, -1], replacement=False), {"parents": [-1, -1]}),
    }
    for rule, (policy, how) in pairs.items():
        got = certify(rule, backend="c", vocab=4, settings=2, **how).expected_accepted
        assert got == pytest.approx(certify(policy, vocab=4, settings=2).expected_accepted, abs=2e-5), rule


def test_what_cannot_be_certified_is_refused():
    for error, message, run in (
        (TypeError, "options: expected .* got temperature", lambda: certify("rejection", temperature=0.5)),
        (ValueError, r"vocab: expected vocab \*\* drafts of at most 20000", lambda: certify("rejection", drafts=40)),
        (ValueError, "rule: expected one of", lambda: certify("rejections")),
    ):
        with pytest.raises(error, match=message):
            run()


# ---- rule gumbel: that its keyed noise decides as given noise does, whose law is enumerated -----------------------------


@pytest.mark.parametrize("backend", ["c", "numba", "reference"])
def test_gumbel_by_its_own_noise_given(backend):
    """The uniforms of (seed, position, token) handed over: every choice is that of the seed, in the passes of every variant that
    rule out most tokens without a logarithm too."""
    rng = np.random.default_rng(2)
    isas = runnable_variants(OP) if backend == "c" else [None]
    for vocab in (3, 50, 2100) if backend == "c" else (3, 50):
        rows, parents = 4, np.array(FORK, np.int32)
        logits = (rng.standard_normal((rows, vocab)) * rng.choice([0.0, 0.5, 4.0])).astype(np.float32)
        logits[:, rng.random(vocab) < 0.1] = -np.inf
        logits[:, 1] = 0
        for seed in range(8):
            position = int(rng.integers(2**40))
            given = np.array([[noise(seed, position + d, v) for v in range(vocab)] for d in (0, 1, 1, 2)])
    with np.errstate(divide="ignore"):  # a logit of minus infinity
        best = [int(np.argmin(-np.log1p(-u) / np.exp(x.astype(float)))) for u, x in zip(given, logits, strict=True)]
        ids = np.array([best[0], (best[0] + 1) % vocab, best[1]], np.int32)
        args = (logits, ids, np.array([0, 3], np.int32))
        for isa in isas:
            how = {"rule": "gumbel", "parents": parents, "backend": backend, "isa": isa}
            keyed = assay.verify(*args, seed=seed, position=position, **how)
            of_given = assay.verify(*args, uniforms=given, **how)
            assert keyed.output_token_ids.tolist() == of_given.output_token_ids.tolist()
            assert keyed.num_accepted[0] >= 1


def toy_logits(tokens):
    return np.random.default_rng([11, *np.asarray(tokens)[-2:].tolist()]).standard_normal(12).astype(np.float32)


def test_gumbel_drafts_of_the_target_itself_are_always_accepted():
    context = np.array([3, 1], np.int32)
    draft = DraftModelProposer(toy_logits, mode="gumbel", seed=9, temperature=0.8).propose(context, 4)
    rows = np.array([toy_logits([*context, *draft.tree.tokens[:i]]) for i in range(5)])
    got = assay.verify(
        rows, draft.tree.tokens, np.array([0, 4], np.int32), rule="gumbel", seed=9, position=2, temperature=0.8
    )
    assert got.num_accepted[0] == 4


def clocks(seed, position, tokens):
    """-log(1 - u) of the kernels' uniforms, which are multiples of 2^-53, to 40 digits."""
    with localcontext(prec=40):
        return [-Decimal(1 - noise(seed, position, token)).ln() for token in tokens]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gumbel_decides_exactly_by_its_noise(variant, dtype):
    """The law without sampling. Of two tokens the first wins when its clock over its weight is the lesser, which for clocks
    of Exp(1) is with probability w0 / (w0 + w1): the law is exactly that of the weights when every choice is. For given
    noise, the last float at which the kernel takes the one and the next, at which it takes the other, lie on either side
    of equality, within the two roundings (2^-53 each) of log and quotient on either side."""
    keys = np.arange(200)
    pairs = [clocks(5, int(x), (0, 1)) for x in keys]
    logits = np.zeros((len(keys), 5), dtype)
    logits[:, 2:] = -np.inf

    def takes_first(d):
        logits[:, 0] = d
        return assay.sample(logits, seed=5, position=keys, rule="gumbel", isa=variant).output_token_ids[:, 0] == 0

    low, high = np.full(len(keys), -20.0, dtype), np.full(len(keys), 20.0, dtype)
    assert not takes_first(low).any()
    assert takes_first(high).all()
    while (np.nextafter(low, high) != high).any():
        middle = ((low.astype(np.float64) + high) / 2).astype(dtype)
        first = takes_first(middle)
        low, high = np.where(first, low, middle), np.where(first, middle, high)
    for (first, second), *ends in zip(pairs, low, high, strict=True):
        found = []
        for d in ends:
            weights = [Decimal(float(vexp(np.float32(x) - np.float32(max(d, 0))))) for x in (d, 0)]
            found.append(second * weights[0] / (first * weights[1]))
        assert found[0] <= 1 + Decimal(2) ** -51
        assert found[1] >= 1 - Decimal(2) ** -51


def test_gumbel_takes_the_earliest_clock(variant):
    """Of many tokens, by exact arithmetic on the kernels' own weights: what is ruled out without a logarithm never wins."""
    rng = np.random.default_rng(3)
    for vocab in (17, 60):
        logits = (rng.standard_normal((40, vocab)) * 2).astype(np.float32)
        got = assay.sample(logits, seed=9, position=np.arange(40), rule="gumbel", isa=variant).output_token_ids[:, 0]
        for row, (found, own) in enumerate(zip(got, logits, strict=True)):
            weights = [float(vexp(x - own.max())) for x in own]
            times = [t / Decimal(w) for t, w in zip(clocks(9, row, range(vocab)), weights, strict=True)]
            assert times[found] <= min(times) * (1 + Decimal(2) ** -51)


def test_gumbel_law_and_acceptance():
    """Its frequencies over 20000 keyed draws, and how often two distributions with one noise agree: the closed forms, within
    four standard errors."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6)), rng.dirichlet(np.ones(6))
    rows = 20000
    tokens = [
        assay.sample(
            np.tile(np.log(x).astype(np.float32), (rows, 1)), rule="gumbel", seed=7, position=np.arange(rows)
        ).output_token_ids[:, 0]
        for x in (p, q)
    ]
    shares = np.bincount(tokens[0], minlength=6) / rows
    assert (np.abs(shares - p) < 4 * np.sqrt(p * (1 - p) / rows)).all()
    want = acceptance("gumbel", p, q)
    assert abs((tokens[0] == tokens[1]).mean() - want) < 4 * np.sqrt(want * (1 - want) / rows)


def test_every_rule_of_verify_is_judged_here():
    """A new rule has to come with its proof."""
    text = inspect.getdoc(assay.verify)
    judged = {rule for rule, *_ in [*LOSSLESS.values(), *LOSSY.values()]}
    for rule in judged:
        assert rule in text
    with pytest.raises(ValueError, match="rule: expected one of") as caught:
        certify("rejections", **dict(zip(("target", "draft"), random_models(3, 0), strict=True)))
    listed = str(caught.value).split("expected one of ")[1].split(", got")[0]
    assert set(listed.split(", ")) == judged
