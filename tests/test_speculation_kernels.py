"""The kernels themselves under enumerated uniforms: every lossless rule has the target's law, every lossy one has not."""

import inspect

import numpy as np
import pytest

import assay
from assay import reference
from assay.reference.philox import noise
from assay.speculation import policies
from assay.speculation.certify import certify, random_models
from assay.speculation.propose import DraftModelProposer
from assay.speculation.transport import acceptance

OP = "spec_verify"
FORK = [-1, -1, 0]  # two children of the root, one grandchild
LOSSLESS = {
    "greedy chain": ("greedy", {}),
    "greedy tree": ("greedy", {"parents": FORK}),
    "sampled chain": ("sampled", {}),
    "sampled tree": ("sampled", {"parents": FORK}),
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
    assert found.tolerance == 1e-6


# The reference takes some 0.1 ms a request: one setting each.
@pytest.mark.parametrize("name", [n for n in LOSSLESS if not {"three", "certain"} & {*n.split()} and n != "kseq tree"])
def test_the_reference_has_the_target_law(name):
    rule, how = LOSSLESS[name]
    found = certify(rule, settings=1, **({"vocab": 2} | how if rule not in ("rejection", "kseq") else how))
    assert found.lossless, found
    assert found.tolerance == (1e-6 if rule == "kseq" else 1e-12)


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
    }
    for rule, (policy, how) in pairs.items():
        got = certify(rule, backend="c", vocab=4, settings=2, **how).expected_accepted
        assert got == pytest.approx(certify(policy, vocab=4, settings=2).expected_accepted, abs=2e-5), rule


def test_what_cannot_be_certified_is_refused():
    for error, message, run in (
        (ValueError, "policy: expected a rule that uniforms decide", lambda: certify("gumbel")),
        (TypeError, "options: expected .* got temperature", lambda: certify("rejection", temperature=0.5)),
        (ValueError, r"vocab: expected vocab \*\* drafts of at most 20000", lambda: certify("rejection", drafts=40)),
        (ValueError, "rule: expected one of", lambda: certify("rejections")),
    ):
        with pytest.raises(error, match=message):
            run()


# ---- rule gumbel: keyed noise, no uniforms to enumerate ----------------------------------------------------------------


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


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gumbel_decides_exactly_by_its_noise(variant, dtype):
    """The law without sampling: for given noise, the kernel's choice between two tokens changes at one difference d of their
    logits, -log1p(-u0) / -log1p(-u1) = exp(d). For u uniform and independent that is below d with probability
    1 / (1 + exp(-d)), which is p; and the noise is uniform and independent as Philox is.

    The threshold is found by bisection through the kernel, within its exp's 1.7e-7 and the logits' own steps."""
    keys = np.arange(200)
    u = np.array([[noise(5, int(x), token) for token in (0, 1)] for x in keys])
    want = np.log(np.log1p(-u[:, 0]) / np.log1p(-u[:, 1]))
    logits = np.zeros((len(keys), 5), dtype)
    logits[:, 2:] = -np.inf

    def takes_first(d):
        logits[:, 0] = d
        return assay.sample(logits, seed=5, position=keys, rule="gumbel", isa=variant).output_token_ids[:, 0] == 0

    low, high = np.full(len(keys), -20.0, dtype), np.full(len(keys), 20.0, dtype)
    assert not takes_first(low).any()
    assert takes_first(high).all()
    for _ in range(60):
        middle = ((low.astype(np.float64) + high) / 2).astype(dtype)
        first = takes_first(middle)
        low, high = np.where(first, low, middle), np.where(first, middle, high)
    step = np.spacing(np.maximum(abs(low), abs(high)))
    assert (want >= low.astype(np.float64) - 4e-7 - step).all()
    assert (want <= high.astype(np.float64) + 4e-7 + step).all()
    assert (high.astype(np.float64) - low <= step + 1e-9).all()


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
    judged = {rule for rule, *_ in [*LOSSLESS.values(), *LOSSY.values()]} | {"gumbel"}
    for rule in judged:
        assert rule in text
    with pytest.raises(ValueError, match="rule: expected one of") as caught:
        certify("rejections", **dict(zip(("target", "draft"), random_models(3, 0), strict=True)))
    listed = str(caught.value).split("expected one of ")[1].split(", got")[0]
    assert set(listed.split(", ")) == judged
