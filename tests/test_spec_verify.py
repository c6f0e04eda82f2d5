"""Chain verification: exact laws by enumeration, every variant token for token, and the edge cases of real batches."""

import itertools

import numpy as np
import pytest

import assay
from assay import reference
from assay.errors import RowError
from assay.ops.speculative import uniform
from assay.reference import verification
from bf16 import BFloat16

OP = "spec_verify"

OK, NAN, EMPTY, INF, BAD_ID = range(5)
INTS = ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "counters")


def case(batch, vocab, most_drafts=4, *, dense=True, seed=0, dtype="float32"):
    """A ragged batch: arguments of verify_chain, drafts sampled from distributions near the target's."""
    rng = np.random.default_rng([seed, batch, vocab, most_drafts])
    counts = rng.integers(0, most_drafts + 1, batch)
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    drafts = int(cu[-1])
    logits = (rng.standard_normal((drafts + batch, vocab)) * 3).astype(dtype)
    rows = np.concatenate([cu[b] + b + np.arange(counts[b]) for b in range(batch)] or [[]]).astype(int)
    p = np.array([reference.softmax(logits[r]) for r in rows]).reshape(drafts, vocab)
    q = (0.7 * p + 0.3 * rng.dirichlet(np.full(vocab, 0.5), drafts).reshape(drafts, vocab)).astype(np.float32)
    ids = np.array([reference.sample(q[i], rng.random()) for i in range(drafts)], np.int32)
    return {
        "target_logits": logits,
        "draft_token_ids": ids,
        "cu_num_draft_tokens": cu,
        "draft_probs": q if dense else None,
        "seed": rng.integers(0, 2**64, batch, dtype=np.uint64),
        "position": rng.integers(0, 2**40, batch),
    }


def assert_same(got, want, context=""):
    for name, a, b in zip(got._fields, got, want, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=f"{name} {context}")


# ---- the law, exactly ------------------------------------------------------------------------------------------------


class Chain:
    """A target and a draft model over a small vocabulary: distributions that depend on the whole prefix."""

    def __init__(self, vocab, drafts, seed=0, one_hot=False):
        self.vocab, self.drafts, self.one_hot = vocab, drafts, one_hot
        rng = np.random.default_rng([seed, vocab, drafts])
        prefixes = [x for n in range(drafts + 1) for x in itertools.product(range(vocab), repeat=n)]
        self.logits = {x: (rng.standard_normal(vocab) * 1.5).astype(np.float32) for x in prefixes}
        self.q = {x: rng.dirichlet(np.full(vocab, 0.7)).astype(np.float32) for x in prefixes}
        self.logits[()][0] = -np.inf  # a token that the target never emits, likely drafted
        self.q[(1,)][:] = np.eye(vocab, dtype=np.float32)[-1]  # a draft model sure of itself
        self.p = {x: reference.softmax(row) for x, row in self.logits.items()}

    def target_law(self):
        law = {}
        for x in itertools.product(range(self.vocab), repeat=self.drafts + 1):
            law[x] = np.prod([self.p[x[:i]][x[i]] for i in range(len(x))])
        return law

    def run(self, drafts, uniforms, **how):
        """verify_chain on many requests at once: drafts [n, K], uniforms [n, K + 2]."""
        n, k = drafts.shape
        rows = [self.logits[tuple(d[:i])] for d in drafts.tolist() for i in range(k + 1)]
        q = None if self.one_hot else np.array([self.q[tuple(d[:i])] for d in drafts.tolist() for i in range(k)])
        return assay.verify_chain(
            np.array(rows), drafts.reshape(-1).astype(np.int32), np.arange(n + 1, dtype=np.int32) * k, q,
            uniforms=uniforms.reshape(-1), **how,
        )  # fmt: skip

    def thresholds(self, bits, **how):
        """The kernel's own decision points, found by bisection on the uniform that each depends on.

        Given a draft, whether token i is accepted depends on one uniform and is monotone in it, and so is the token
        that a resampling or the last row gives: the emitted law is the lengths of these intervals, no sampling error.
        """
        k, v = self.drafts, self.vocab
        drafts = list(itertools.product(range(v), repeat=k))
        keys = [(d, "accept", i, 0) for d in drafts for i in range(k)]
        keys += [(d, "residual", i, t) for d in drafts for i in range(k) for t in range(v - 1)]
        keys += [(d, "bonus", k, t) for d in drafts for t in range(v - 1)]
        low, high = np.zeros(len(keys)), np.ones(len(keys))
        x = np.array([key[0] for key in keys]).reshape(len(keys), k)
        u = np.full((len(keys), k + 2), 2.0**-60)  # accepted wherever that can be
        for j, (_, kind, i, _) in enumerate(keys):
            if kind == "residual":
                u[j, i] = 1 - 2.0**-53  # rejected wherever that can be
        column = np.array([{"accept": i, "residual": k, "bonus": k + 1}[kind] for _, kind, i, _ in keys])
        for _ in range(bits):
            middle = (low + high) / 2
            u[np.arange(len(keys)), column] = middle
            got = self.run(x, u, **how)
            for j, (_, kind, i, token) in enumerate(keys):
                below = got.num_accepted[j] > i if kind == "accept" else got.output_token_ids[j, i] <= token
                low[j], high[j] = (middle[j], high[j]) if below else (low[j], middle[j])
        return dict(zip(keys, (low + high) / 2, strict=True))

    def emitted_law(self, found):
        """Of the first K + 1 tokens: what verification emits, continued by the target itself.

        One-hot drafts have one law for each draft; then the one farthest from the target is returned.
        """
        k, v = self.drafts, self.vocab
        target = self.target_law()
        laws = {}
        for d in itertools.product(range(v), repeat=k):
            law = laws.setdefault(d if self.one_hot else (), dict.fromkeys(target, 0.0))
            drafted = [self.q[d[:i]].astype(float) for i in range(k)]
            weight = 1.0 if self.one_hot else np.prod([q[x] / q.sum() for q, x in zip(drafted, d, strict=True)])
            for i in range(k + 1):
                kind = "residual" if i < k else "bonus"
                cuts = np.array([0.0, *(found[d, kind, i, t] for t in range(v - 1)), 1.0])
                refused = 1 - found[d, "accept", i, 0] if i < k else 1.0
                for token, share in enumerate(np.diff(cuts)):
                    head = (*d[:i], token)
                    for tail in itertools.product(range(v), repeat=k - i):
                        x = head + tail
                        law[x] += weight * refused * share * np.prod([self.p[x[:n]][x[n]] for n in range(i + 1, k + 1)])
                weight *= 1 - refused if i < k else 0
        return max(laws.values(), key=lambda law: distance(law, target))


def distance(law, target):
    """Total variation distance."""
    return 0.5 * sum(abs(law[x] - target[x]) for x in target)


SMALL = [(3, 3, False), (4, 2, False), (5, 1, False), (3, 2, True), (4, 1, True)]


@pytest.mark.parametrize(("vocab", "drafts", "one_hot"), SMALL)
def test_kernels_emit_exactly_the_target_law(variant, vocab, drafts, one_hot):
    """TV <= 1e-6: float32 probabilities (a few 1e-7 each) and bisection to 2^-34."""
    chain = Chain(vocab, drafts, one_hot=one_hot)
    found = chain.thresholds(34, isa=variant)
    assert distance(chain.emitted_law(found), chain.target_law()) <= 1e-6


@pytest.mark.parametrize(("vocab", "drafts", "one_hot"), [(3, 2, False), (4, 1, False), (3, 2, True)])
def test_reference_emits_exactly_the_target_law(vocab, drafts, one_hot):
    chain = Chain(vocab, drafts, one_hot=one_hot)
    for q in chain.q.values():  # float32 probabilities that sum to one exactly, as 1e-12 asks of q
        q[:] = np.round(q * 1024) / 1024
        q[q.argmax()] += 1 - q.sum()
    found = chain.thresholds(50, backend="reference")
    assert distance(chain.emitted_law(found), chain.target_law()) <= 1e-12


@pytest.mark.parametrize(
    ("name", "mistake"),
    [
        ("resample", lambda p, q, u: reference.sample(p, u)),
        ("resample", lambda p, q, u: reference.sample(np.abs(p - q), u)),
        ("accepts", lambda p, q, u: u < p),
        ("accepts", lambda p, q, u: u * q < 1.05 * p),
    ],
    ids=["residual not subtracted", "absolute difference", "draft probability ignored", "lenient"],
)
def test_the_law_test_sees_a_wrong_rule(monkeypatch, name, mistake):
    monkeypatch.setattr(verification, name, mistake)
    chain = Chain(3, 2)
    found = chain.thresholds(20, backend="reference")
    assert distance(chain.emitted_law(found), chain.target_law()) > 1e-3


def test_decisions_depend_on_their_own_uniform_alone(variant):
    """What the enumeration rests on: random uniforms give the tokens that the thresholds foretell."""
    chain = Chain(4, 2)
    found = chain.thresholds(34, isa=variant)
    rng = np.random.default_rng(0)
    drafts, u = rng.integers(0, 4, (3000, 2)), rng.random((3000, 4))
    got = chain.run(drafts, u, isa=variant)
    for j, d in enumerate(map(tuple, drafts.tolist())):
        i = next((i for i in range(2) if u[j, i] >= found[d, "accept", i, 0]), 2)
        kind, column = ("residual", 2) if i < 2 else ("bonus", 3)
        token = sum(u[j, column] >= found[d, kind, i, t] for t in range(3))
        assert got.num_accepted[j] == i
        assert got.output_token_ids[j].tolist() == [*d[:i], token] + [-1] * (2 - i)


# ---- variants, twins, reference ---------------------------------------------------------------------------------------

# Vocabularies about one block of 2048, one vector of 16, and several blocks.
VOCABS = [1, 2, 5, 15, 16, 17, 31, 33, 100, 2047, 2048, 2049, 2064, 4097, 9000]


@pytest.mark.parametrize("rule", ["rejection", "greedy"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "one-hot"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_variant_equals_portable_c_and_the_reference(variant, vocab, dense, rule):
    args = case(24, vocab, dense=dense)
    temperature = np.tile(np.array([1.0, 0.0, 0.6, 2.5], np.float32), 6)
    got = assay.verify_chain(**args, temperature=temperature, rule=rule, isa=variant)
    assert_same(got, assay.verify_chain(**args, temperature=temperature, rule=rule, isa="scalar"))
    assert_same(got, assay.verify_chain(**args, temperature=temperature, rule=rule, backend="reference"))
    assert (got.status == OK).all()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "one-hot"])
@pytest.mark.parametrize("vocab", [1, 5, 100, 2048, 2049, 9000])
def test_numba_twin_gives_the_same_tokens(vocab, dense):
    args = case(40, vocab, dense=dense)
    temperature = np.tile(np.array([1.0, 0.0, 0.6, 2.5], np.float32), 10)
    args["target_logits"][3::17, vocab // 2] = np.nan
    args["target_logits"][4::17] = -np.inf
    args["target_logits"][5::17, -1] = np.inf
    for rule in ("rejection", "greedy"):
        want = assay.verify_chain(**args, temperature=temperature, rule=rule)
        assert_same(assay.verify_chain(**args, temperature=temperature, rule=rule, backend="numba"), want)
    assert len(set(want.status.tolist())) > 1
    u = np.random.default_rng(0).uniform(0.01, 0.99, len(args["draft_token_ids"]) + 80)
    want = assay.verify_chain(**args, uniforms=u)
    assert_same(assay.verify_chain(**args, uniforms=u, backend="numba"), want)
    assert_same(assay.verify_chain(**args, uniforms=u, backend="reference"), want)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("vocab", VOCABS)
def test_emulated_avx512_equals_portable_c(emulate_verify, vocab, dtype):
    runs = []
    for dense in (True, False):
        args = case(24, vocab, dense=dense, dtype="float16" if dtype == "float16" else "float32")
        args["target_logits"][3::17, vocab // 2] = np.nan
        args["target_logits"][4::17] = -np.inf
        if dense and vocab > 20:
            args["draft_probs"][1::7, 19] = np.nan
        if dtype == "bfloat16":
            args["target_logits"] = BFloat16(args["target_logits"])
        runs += [(args, rule, t) for rule in ("rejection", "greedy") for t in (1.0, 0.3)]
    want = [assay.verify_chain(**a, rule=rule, temperature=t, isa="scalar") for a, rule, t in runs]
    emulate_verify()
    for (args, rule, t), expected in zip(runs, want, strict=True):
        got = assay.verify_chain(**args, rule=rule, temperature=t, isa="avx512vnni")
        assert_same(got, expected, f"{rule} {t}")


def test_half_precision_logits_are_widened_exactly(variant):
    for vocab in (7, 50, 3000):
        half = case(30, vocab, dtype="float16")
        single = half | {"target_logits": half["target_logits"].astype(np.float32)}
        assert_same(assay.verify_chain(**half, isa=variant), assay.verify_chain(**single, isa=variant))


def test_bfloat16_logits_are_widened_exactly(variant):
    for vocab in (7, 50, 3000):
        args = case(30, vocab)
        half = BFloat16(args["target_logits"])
        single = args | {"target_logits": half.widened()}
        for rule in ("rejection", "greedy"):
            got = assay.verify_chain(**args | {"target_logits": half}, rule=rule, isa=variant)
            assert_same(got, assay.verify_chain(**single, rule=rule, isa=variant))


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "one-hot"])
@pytest.mark.parametrize("vocab", [300, 70000])
def test_a_request_has_the_same_output_in_any_batch(variant, vocab, dense):
    """Alone, in any order, on any number of threads: shared out by request (12 of them) or by vocabulary (1 and 2)."""
    args = case(12, vocab, dense=dense)
    cu = args["cu_num_draft_tokens"]

    def subset(chosen):
        counts = [cu[b + 1] - cu[b] for b in chosen]
        drafts = np.concatenate([np.arange(cu[b], cu[b + 1]) for b in chosen]).astype(int)
        rows = np.concatenate([np.arange(cu[b] + b, cu[b + 1] + b + 1) for b in chosen])
        return {
            "target_logits": args["target_logits"][rows],
            "draft_token_ids": args["draft_token_ids"][drafts],
            "cu_num_draft_tokens": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            "draft_probs": args["draft_probs"][drafts] if dense else None,
            "seed": args["seed"][chosen],
            "position": args["position"][chosen],
        }

    temperature = np.where(np.arange(12) % 4 == 3, 0, 0.8).astype(np.float32)
    whole = assay.verify_chain(**args, temperature=temperature, isa=variant, num_threads=1)
    width = whole.output_token_ids.shape[1]
    for chosen in ([4], [7], [3, 0], [11, 2, 5], list(range(11, -1, -1))):
        for threads in (1, 2, 3):
            part = subset(chosen)
            got = assay.verify_chain(**part, temperature=temperature[chosen], isa=variant, num_threads=threads)
            padding = ((0, 0), (0, width - got.output_token_ids.shape[1]))
            padded = np.pad(got.output_token_ids, padding, constant_values=-1)
            np.testing.assert_array_equal(padded, whole.output_token_ids[chosen])
            np.testing.assert_array_equal(got.num_accepted, whole.num_accepted[chosen])


# ---- random numbers --------------------------------------------------------------------------------------------------

# Random123's known answers (kat_vectors, philox4x32 10): counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    assert reference.philox4x32(counter, key) == words
    position = int(np.array(counter[0] | counter[1] << 32, np.uint64).astype(np.int64))
    seed = key[0] | key[1] << 32
    want = (((words[1] << 32 | words[0]) >> 12) + 0.5) / 2**52
    assert uniform(seed, position, counter[2], counter[3]) == want
    assert reference.uniform(seed, position, counter[2], counter[3]) == want


def test_uniforms_are_inside_the_open_interval_and_apart():
    values = {uniform(s, p, d) for s in range(8) for p in range(-4, 40) for d in (1, 2, 3)}
    assert len(values) == 8 * 44 * 3
    assert min(values) > 0
    assert max(values) < 1
    assert ((2**52 - 1) + 0.5) * 2.0**-52 < 1  # the largest that can occur


def test_exp_is_accurate_and_the_same_in_c():
    """Relative error of vexp over its whole range; and through routing, the bits of C's."""
    from assay.jit._vexp import vexp

    x = -np.concatenate([np.linspace(0, 87, 40001), np.geomspace(1e-30, 1, 2000)]).astype(np.float32)
    e = np.array([vexp(v) for v in x], np.float64)
    assert np.abs(e / np.exp(x.astype(np.float64)) - 1).max() < 1.7e-7
    assert vexp(np.float32(0)) == 1
    assert vexp(np.float32(-np.inf)) == vexp(np.float32(-87.1)) == 0
    pairs = np.stack([np.zeros_like(x), x], axis=1)
    got = assay.moe_route(pairs, 2).topk_weights[:, 1]
    weight = e.astype(np.float32)
    np.testing.assert_array_equal(got, weight / (np.float32(1) + weight))


# ---- edge cases ------------------------------------------------------------------------------------------------------


def one(logits, drafts, **more):
    """One request."""
    logits = np.asarray(logits, np.float32)
    drafts = np.asarray(drafts, np.int32)
    return assay.verify_chain(logits, drafts, np.array([0, len(drafts)], np.int32), **more)


def tokens(result):
    return result.output_token_ids[0].tolist()


def test_greedy_takes_the_first_of_equals_and_stops_at_the_first_mismatch(variant):
    rows = np.zeros((4, 3000), np.float32)
    rows[0, [2500, 2900]] = 5
    rows[1, [7, 2048]] = 1
    rows[2, 11] = 1
    rows[3, 13] = 1
    for drafts, want in (([2500, 7, 11], [2500, 7, 11, 13]), ([2500, 8, 11], [2500, 7, -1, -1]),
                         ([2900, 7, 11], [2500, -1, -1, -1]), ([2500, 7, -1], [2500, 7, 11, -1]),
                         ([-1, 7, 11], [2500, -1, -1, -1])):  # fmt: skip
        got = one(rows, drafts, rule="greedy", isa=variant)
        assert tokens(got) == want
        assert got.num_accepted[0] == sum(t >= 0 for t in want) - 1
        assert tokens(one(rows, drafts, temperature=0.0, isa=variant)) == want  # rejection at temperature 0


def test_a_token_of_no_probability_is_never_accepted_and_never_emitted(variant):
    rows = np.array([[-np.inf, 0, -np.inf], [0, 0, 0]])
    q = np.array([[0.5, 0, 0.5]], np.float32)
    for u in (2.0**-53, 0.5, 1 - 2.0**-53):
        for drafts, probs in (([0], q), ([2], None)):
            got = one(rows, drafts, draft_probs=probs, uniforms=np.array([u, u, u]), isa=variant)
            assert tokens(got)[0] == 1
            assert got.num_accepted[0] == 0


def test_a_draft_of_no_draft_probability(variant):
    """q(x) = 0 < p(x) is accepted; both 0 is rejected."""
    rows = np.array([[0, 0, -np.inf], [0, 0, 5]])
    q = np.array([[1, 0, 0]], np.float32)
    u = np.full(3, 0.999)
    assert one(rows, [1], draft_probs=q, uniforms=u, isa=variant).num_accepted[0] == 1
    got = one(rows, [2], draft_probs=q, uniforms=u, isa=variant)
    assert got.num_accepted[0] == 0
    assert tokens(got)[0] == 1  # (p - q)+ holds token 1 alone


def test_no_residual_falls_back_to_the_target(variant):
    """q so large that nothing of p is left over: a token of p, not a fixed one."""
    rows = np.log(np.array([[0.5, 0.2, 0.3], [1, 1, 1]]))
    q = np.full((1, 3), 4, np.float32)
    for u, want in ((0.1, 0), (0.6, 1), (0.9, 2)):
        assert tokens(one(rows, [2], draft_probs=q, uniforms=np.array([0.99, u, 0.5]), isa=variant))[0] == want
    certain = np.array([[0, -200, -200], [0, 0, 0]])
    got = one(certain, [1], uniforms=np.array([0.5, 0.5, 0.5]), isa=variant)
    assert tokens(got)[0] == 0


def test_cdf_overrun_gives_the_last_possible_token(variant):
    """The uniform nearest to 1, masked tokens at the end, and vocabularies whose float sums round."""
    for vocab in (20, 2100, 6000):
        rows = np.random.default_rng(vocab).standard_normal((1, vocab)).astype(np.float32)
        rows[0, -7:] = -np.inf
        assert tokens(one(rows, [], uniforms=np.array([0.5, 1 - 2.0**-53]), isa=variant)) == [vocab - 8]
        assert tokens(one(rows, [], uniforms=np.array([0.5, 2.0**-53]), isa=variant)) == [0]


@pytest.mark.parametrize(("bad", "status"), [(np.nan, NAN), (np.inf, INF)])
@pytest.mark.parametrize("vocab", [3, 40, 5000])
def test_a_poisoned_row_matters_only_where_it_is_reached(variant, vocab, bad, status):
    rows = np.zeros((3, vocab), np.float32)
    rows[:, 1] = 50
    for at in range(3):
        for where in (0, vocab - 1):
            poisoned = rows.copy()
            poisoned[at, where] = bad
            for rule in ("greedy", "rejection"):
                u = np.full(4, 0.5)
                got = one(poisoned, [1, 1], rule=rule, uniforms=u, isa=variant)
                assert got.status[0] == status
                assert tokens(got) == [-1, -1, -1]
                assert got.num_accepted[0] == 0
                early = one(poisoned, [1, 2 if at == 2 else 1], rule=rule, uniforms=u, isa=variant)
                if at == 2:  # rejected before it
                    assert early.status[0] == OK
                    assert tokens(early) == [1, 1, -1]


def test_a_masked_row_is_empty(variant):
    rows = np.full((1, 2050), -np.inf)
    for rule in ("greedy", "rejection"):
        got = one(rows, [], rule=rule, uniforms=np.array([0.5, 0.5]), isa=variant)
        assert got.status[0] == EMPTY
        assert tokens(got) == [-1]
    rows[0, 2049] = -3e38
    assert tokens(one(rows, [], uniforms=np.array([0.5, 0.5]), isa=variant)) == [2049]


@pytest.mark.parametrize("bad", [np.nan, -0.1, np.inf])
def test_bad_draft_probabilities(variant, bad):
    """At the draft token always, elsewhere when the residual reads them."""
    rows = np.zeros((2, 40))
    for at in (5, 6, 39):
        q = np.full((1, 40), 1 / 40, np.float32)
        q[0, at] = bad
        if at != 5:
            q[0, 5] = 1
        got = one(rows, [5], draft_probs=q, uniforms=np.array([0.99, 0.5, 0.5]), isa=variant)
        assert got.status[0] == NAN
        assert tokens(got) == [-1, -1]


@pytest.mark.parametrize("big", [40, 2**31 - 1, 2**40])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "one-hot"])
def test_a_draft_beyond_the_vocabulary_is_rejected(variant, big, dense):
    rows = np.zeros((4, 40), np.float32)
    rows[0, 3] = 60
    q = np.full((3, 40), 1 / 40, np.float32) if dense else None
    for rule in ("greedy", "sampled", "rejection", "block"):
        ids = np.array([3, big, 3], np.int64)
        got = assay.verify(rows, ids, np.array([0, 3], np.int32), q, rule=rule, uniforms=np.full(5, 0.5), isa=variant)
        assert got.status[0] == OK
        assert got.num_accepted[0] == 1
        assert tokens(got)[0] == 3
        assert 0 <= tokens(got)[1] < 40
        assert tokens(got)[2:] == [-1, -1]


@pytest.mark.parametrize("bad", [-2, -(2**40)])
def test_a_draft_below_the_vocabulary(variant, bad):
    rows = np.zeros((6, 40), np.float32)
    ids = np.array([3, bad, 3, 3], np.int64)
    cu = np.array([0, 3, 4], np.int32)
    got = assay.verify_chain(rows, ids, cu, rule="greedy", isa=variant)
    np.testing.assert_array_equal(got.status, [BAD_ID, OK])
    np.testing.assert_array_equal(got.output_token_ids, [[-1] * 4, [0, -1, -1, -1]])
    np.testing.assert_array_equal(got.num_accepted, 0)
    ids[0] = -1  # what lies behind the end of a draft is nobody's
    np.testing.assert_array_equal(assay.verify_chain(rows, ids, cu, rule="greedy", isa=variant).status, OK)


def test_empty_batches_and_no_drafts(variant):
    none = np.empty(0, np.int32)
    got = assay.verify_chain(np.empty((0, 50), np.float32), none, np.zeros(1, np.int32), rule="greedy", isa=variant)
    assert got.output_token_ids.shape == (0, 1)
    assert got.status.shape == (0,)
    args = case(20, 50, 0)
    got = assay.verify_chain(**args, isa=variant)
    np.testing.assert_array_equal(got.num_accepted, 0)
    for b in range(20):
        u = uniform(int(args["seed"][b]), int(args["position"][b]), 3)
        want = reference.sample(reference.softmax(args["target_logits"][b]), u)
        assert got.output_token_ids[b].tolist() == [want]


def test_extreme_temperatures_and_logits(variant):
    rows = np.array([[3e38, -3e38, 0, 3e38]])
    for t in (1e-45, 1e-30, 1.0, 1e30, 3e38):
        for u in (0.2, 0.8):
            got = one(rows, [], temperature=t, uniforms=np.array([0.5, u]), isa=variant)
            assert got.status[0] == OK
            assert tokens(got)[0] in ({0, 3} if t < 1e30 else {0, 1, 2, 3})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("vocab", [1, 15, 17, 2049])
def test_reads_nothing_beyond_the_arrays(variant, guarded, vocab, dtype):
    args = case(9, vocab, dtype=dtype)
    want = assay.verify_chain(**args, isa=variant)
    for name in ("target_logits", "draft_token_ids", "cu_num_draft_tokens", "draft_probs"):
        args[name] = guarded(args[name])
    assert_same(assay.verify_chain(**args, isa=variant), want)
    assert_same(assay.verify_chain(**args, rule="greedy", isa=variant),
                assay.verify_chain(**args, rule="greedy", isa="scalar"))  # fmt: skip


def test_rows_after_a_rejection_are_not_read(variant):
    """Their memory may even be missing: here it is not readable."""
    import ctypes
    import mmap

    page = mmap.PAGESIZE
    vocab = page // 4
    memory = mmap.mmap(-1, 4 * page)
    rows = np.frombuffer(memory, np.float32).reshape(4, vocab)
    rows[:, 3] = 20
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(start + 2 * page), ctypes.c_size_t(2 * page), 0) == 0
    try:
        for rule in ("greedy", "rejection"):
            got = one(rows, [3, 4, 3], rule=rule, uniforms=np.full(5, 0.5), isa=variant)
            assert tokens(got) == [3, 3, -1, -1]
    finally:
        libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(4 * page), mmap.PROT_READ | mmap.PROT_WRITE)


def test_out_and_strided_logits(variant):
    args = case(6, 40)
    want = assay.verify_chain(**args, isa=variant)
    wide = np.zeros((len(args["target_logits"]), 77), np.float32)
    wide[:, 5:45] = args["target_logits"]
    out = want._replace(**{n: np.full_like(getattr(want, n), 9) for n in INTS})
    got = assay.verify_chain(**args | {"target_logits": wide[:, 5:45]}, out=out, isa=variant)
    for name in INTS:
        assert getattr(got, name) is getattr(out, name)
    assert_same(got, want)
    room = np.full((6, want.output_token_ids.shape[1] + 4), 9, np.int32)
    assay.verify_chain(**args, out=(room[:, :-4], None, None, None, None, None), isa=variant)
    np.testing.assert_array_equal(room[:, :-4], want.output_token_ids)
    assert (room[:, -4:] == 9).all()


def test_scalars_stand_for_every_request():
    args = case(5, 30)
    want = assay.verify_chain(**args | {"seed": np.full(5, 7, np.uint64), "position": np.full(5, 3)}, temperature=0.5)
    got = assay.verify_chain(**args | {"seed": 7, "position": 3}, temperature=np.full(5, 0.5, np.float32))
    assert_same(got, want)


def test_bad_arguments_say_got_and_wanted():
    args = case(3, 20, 4)
    n = len(args["draft_token_ids"])
    cu = args["cu_num_draft_tokens"]

    def call(**changes):
        return lambda: assay.verify_chain(**args | changes)

    cases = [
        (TypeError, "target_logits: expected float32", call(target_logits=args["target_logits"].astype(float))),
        (ValueError, rf"target_logits: expected sum\(K_b \+ 1\) = {n + 3} rows, got {n + 2}",
         call(target_logits=args["target_logits"][1:])),
        (ValueError, r"target_logits: expected \[sum\(K_b \+ 1\), V\] with 1 <= V",
         call(target_logits=args["target_logits"][:, :0])),
        (ValueError, rf"draft_token_ids: expected \[sum K_b\] = \[{n}\], got \[{n - 1}\]",
         call(draft_token_ids=args["draft_token_ids"][1:])),
        (TypeError, "draft_token_ids: expected int32 or int64, got float32",
         call(draft_token_ids=np.zeros(n, np.float32))),
        (ValueError, "cu_num_draft_tokens: expected to start at 0, got 1", call(cu_num_draft_tokens=cu + 1)),
        (ValueError, "cu_num_draft_tokens: expected not to decrease, got 2 then 1 at index 2",
         call(cu_num_draft_tokens=np.array([0, 2, 1, n], np.int32))),
        (ValueError, "cu_num_draft_tokens: expected .* got none", call(cu_num_draft_tokens=np.empty(0, np.int32))),
        (ValueError, rf"draft_probs: expected \[sum K_b, V\] = \[{n}, 20\], got \[{n}, 19\]",
         call(draft_probs=args["draft_probs"][:, 1:].copy())),
        (ValueError, "draft_probs: expected C order", call(draft_probs=args["draft_probs"][:, ::-1])),
        (ValueError, "temperature: expected finite values of 0 or more, got -1.0", call(temperature=-1.0)),
        (ValueError, "temperature: expected finite values of 0 or more, got nan", call(temperature=float("nan"))),
        (ValueError, r"temperature: expected one number or \[B\] = \[3\], got \[2\]",
         call(temperature=np.ones(2, np.float32))),
        (ValueError, "seed: expected one for each request", call(seed=None)),
        (ValueError, "position: expected one for each request", call(position=None)),
        (ValueError, "seed: expected an integer in 0..18446744073709551615, got -1", call(seed=-1)),
        (ValueError, "rule: expected one of greedy, sampled, .*, got 'lucky'", call(rule="lucky")),
        (ValueError, rf"uniforms: expected \[sum K_b \+ 2 B\] = \[{n + 6}\]", call(uniforms=np.full(n, 0.5))),
        (ValueError, r"uniforms: expected values inside \(0, 1\), got 1.0", call(uniforms=np.ones(n + 6))),
        (ValueError, "output_token_ids: expected shape", call(out=(np.empty((3, 1), np.int32), *[None] * 5))),
        (TypeError, "out: expected", call(out=np.empty(3, np.int32))),
        (ValueError, "backend: expected one of", call(backend="cuda")),
        (ValueError, "isa: only backend 'c'", call(isa="scalar", backend="numba")),
        (assay.UnsupportedError, "isa='neon' is not available", call(isa="neon")),
    ]  # fmt: skip
    for error, message, run in cases:
        with pytest.raises(error, match=message):
            run()


@pytest.mark.parametrize("given_out", [False, True])
def test_bad_rows_raise_when_asked_to(given_out):
    logits = np.zeros((3, 5), np.float32)
    logits[1, 2] = np.nan
    none, cu = np.empty(0, np.int32), np.zeros(4, np.int32)
    options = {"rule": "greedy", "temperature": 0.0}
    kept = assay.verify(logits, none, cu, **options)
    assert kept.status.tolist() == [0, 1, 0]
    assert kept.num_emitted.tolist() == [1, 0, 1]
    with pytest.raises(RowError, match=r"request 1: a NaN .*status 1, 1 of 3 requests"):
        assay.verify(logits, none, cu, on_status="raise", out=kept if given_out else None, **options)
    logits[1, 2] = 0
    assert not assay.verify(logits, none, cu, on_status="raise", **options).status.any()
    with pytest.raises(ValueError, match="on_status: expected return or raise"):
        assay.verify(logits, none, cu, on_status="abort", **options)
