"""Other people's verification, where it is installed: the same answers where theirs are right, counter-examples where not.

What cannot be loaded here is skipped. vLLM's CPU kernels are compiled from a source that ASSAY_PEER_VLLM names, Medusa's code is
imported from one that is on PYTHONPATH. What peers do on GPUs alone is certified as a policy instead
(tests/test_speculation_certify.py).
"""

import ast
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import assay
import peers.vllm
from assay.speculation import policies
from assay.speculation.certify import certify
from assay.speculation.policies import excess, ratio, sampled_or
from assay.speculation.propose import NGramProposer
from assay.speculation.tree import DraftTree

# ---- transformers ------------------------------------------------------------------------------------------------------


class Transformers:
    """``_speculative_sampling`` under uniforms of one's own: its coins, and its draw by a cumulated sum."""

    def __init__(self, monkeypatch, **options):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        utils = pytest.importorskip("transformers.generation.utils", reason="transformers is not installed")
        self.sampling, self.options = utils._speculative_sampling, options
        missing = options.keys() - inspect.signature(self.sampling).parameters.keys()
        if missing:
            pytest.skip(f"this transformers has no {missing}")
        self.coins, self.last = None, None
        monkeypatch.setattr(
            self.torch, "rand_like", lambda x: self.torch.tensor(self.coins, dtype=x.dtype)[: x.numel()]
        )
        monkeypatch.setattr(self.torch, "multinomial", self.draw)

    def draw(self, weights, num_samples):
        """With the residual's uniform after a rejection, with the last token's otherwise."""
        w = weights[0].double().numpy()
        return self.torch.tensor([[int(np.searchsorted(np.cumsum(w), self.last * w.sum(), side="right"))]])

    def __call__(self, logits, draft, probs, uniforms):
        """Tokens of one request: logits [K + 1, V], draft [K], probs [K, V], uniforms [K + 2]."""
        k = len(draft)
        self.coins = uniforms[:k]
        # Whether anything will be rejected decides which uniform is used; the coins say so beforehand.
        p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
        p = p[np.arange(k), draft] / p[:k].sum(axis=1)
        q = probs[np.arange(k), draft]
        weight = self.options.get("assistant_ensemble_weight", 1.0)
        stands = (uniforms[:k] <= 1 - weight + weight * p / q).all()
        self.last = uniforms[k + 1] if stands else uniforms[k]
        t = self.torch.tensor
        with np.errstate(divide="ignore"):
            found, matches = self.sampling(
                t(draft[None].astype(np.int64)), t(np.log(probs)[None]), k, t(logits[None]), **self.options
            )
        return found[0].tolist(), int(matches)

    def verify(self, logits, ids, cu, probs, *, rule, parents, uniforms, backend):
        """In the shape of assay.verify, for :func:`certify`."""
        n, k = len(cu) - 1, int(cu[1])
        tokens, accepted = np.full((n, k + 1), -1, np.int32), np.zeros(n, np.int32)
        vocab = logits.shape[1]
        rows = (
            logits.reshape(n, k + 1, vocab),
            ids.reshape(n, k),
            probs.reshape(n, k, vocab),
            uniforms.reshape(n, k + 2),
        )
        for b, arguments in enumerate(zip(*rows, strict=True)):
            found, accepted[b] = self(*arguments)
            tokens[b, : len(found)] = found
        return assay.VerifyResult(
            output_token_ids=tokens, num_accepted=accepted, num_emitted=accepted + 1, status=np.zeros(n, np.int32),
            accept_index=None, logprobs=None, lossless=True, counters=None,
        )  # fmt: skip


def positive_models(seed):
    """Without tokens of no probability, where theirs computes 0 / 0."""
    target, draft = certify.__globals__["random_models"](3, seed)

    def mixed(model):
        return lambda prefix: [0.875 * w + 0.125 / 3 for w in model(prefix)]

    return {"target": mixed(target), "draft": mixed(draft)}


def test_transformers_gives_the_same_tokens(monkeypatch):
    theirs = Transformers(monkeypatch)
    rng = np.random.default_rng(0)
    accepted = set()
    for _ in range(120):
        k, vocab = int(rng.integers(1, 6)), int(rng.integers(2, 40))
        logits = (rng.standard_normal((k + 1, vocab)) * 1.5).astype(np.float32)
        p = np.exp(logits[:k]) / np.exp(logits[:k]).sum(axis=1, keepdims=True)
        q = (0.8 * p + 0.2 * rng.dirichlet(np.ones(vocab), k)).astype(np.float32)
        draft = np.array([rng.choice(vocab, p=row / row.sum()) for row in q.astype(float)], np.int32)
        u = rng.random(k + 2)
        tokens, matches = theirs(logits, draft, q, u)
        got = assay.verify(logits, draft, np.array([0, k], np.int32), q, rule="rejection", uniforms=u)
        assert got.output_token_ids[0, : got.num_emitted[0]].tolist() == tokens
        assert got.num_accepted[0] == matches
        accepted.add(matches)
    assert len(accepted) >= 5


def test_transformers_is_certified(monkeypatch):
    theirs = Transformers(monkeypatch)
    found = certify("rejection", verify=theirs.verify, backend="c", drafts=1, **positive_models(0))
    assert found.lossless, found


def test_transformers_ensemble_weight_is_shown_biased(monkeypatch):
    theirs = Transformers(monkeypatch, assistant_ensemble_weight=0.7)
    found = certify("rejection", verify=theirs.verify, backend="c", drafts=1, **positive_models(0))
    assert not found.lossless
    assert found.total_variation > 0.01


def test_transformers_accepts_an_impossible_token_when_its_coin_is_zero(monkeypatch):
    """``r <= p / q`` with r from [0, 1): a token of probability 0 stands. Here the comparison is strict and u above 0."""
    theirs = Transformers(monkeypatch)
    logits = np.array([[-np.inf, 0, 0], [0, 0, 0]], np.float32)
    q = np.full((1, 3), 1 / 3, np.float32)
    tokens, matches = theirs(logits, np.array([0]), q, np.array([0.0, 0.5, 0.5]))
    assert (tokens[0], matches) == (0, 1)
    got = assay.verify(
        logits, np.array([0], np.int32), np.array([0, 1], np.int32), q, uniforms=np.array([5e-324, 0.5, 0.5])
    )
    assert got.num_accepted[0] == 0
    assert got.output_token_ids[0, 0] in (1, 2)


# ---- Medusa --------------------------------------------------------------------------------------------------------------

SMALL_TREE = [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0, 0]]


def medusa():
    pytest.importorskip("torch", reason="torch is not installed")
    return pytest.importorskip("medusa.model.utils", reason="Medusa is not installed")


def test_medusa_buffers():
    theirs = medusa().generate_medusa_buffers(SMALL_TREE, device="cpu")
    tree = DraftTree.from_choices(SMALL_TREE)
    np.testing.assert_array_equal(theirs["medusa_attn_mask"][0, 0].numpy(), tree.layout.mask)
    np.testing.assert_array_equal(theirs["medusa_position_ids"].numpy(), tree.positions(0))
    np.testing.assert_array_equal(theirs["tree_indices"].numpy(), tree.tree_indices(medusa().TOPK))
    # The same paths; theirs from the last leaf to the first.
    np.testing.assert_array_equal(theirs["retrieve_indices"].numpy()[::-1], tree.layout.retrieve_indices)


@pytest.mark.parametrize("rule", ["greedy", "typical"])
def test_medusa_accepts_the_same_path(rule):
    theirs = medusa()
    import torch

    rng = np.random.default_rng(1)
    vocab, lengths = 12, set()
    for _ in range(200):
        shape = DraftTree.from_choices(SMALL_TREE)
        tree = shape.fill(1 + np.array([rng.permutation(vocab - 1)[:3] for _ in range(4)]))
        logits = (rng.standard_normal((len(tree) + 1, vocab)) * 1.5).astype(np.float32)
        logits[:, 0] = -30  # the token that pads their candidates
        paths = tree.layout.retrieve_indices
        ids = np.concatenate([[0], tree.tokens, [0]])
        best, length = theirs.evaluate_posterior(
            torch.tensor(logits[paths]), torch.tensor(ids[paths]), 0.0 if rule == "greedy" else 0.9,
            posterior_threshold=0.09, posterior_alpha=0.3,
        )  # fmt: skip
        got = assay.verify(
            logits, tree.tokens, np.array([0, len(tree)], np.int32), rule=rule, parents=tree.parents,
            temperature=0.9, seed=1, position=0, posterior_threshold=0.09, posterior_alpha=0.3,
        )  # fmt: skip
        want = (paths[int(best), 1 : int(length) + 1] - 1).tolist()
        assert got.accept_index[0, : got.num_accepted[0]].tolist() == want
        lengths.add(int(length))
    assert len(lengths) >= 3


def test_medusa_nucleus_is_shown_biased(monkeypatch):
    """Its own function, whose every draw is taken in every way: two paths through one node draw a target token each."""
    theirs = medusa()
    import torch

    draws = []

    def policy(draw, target, draft):
        p, q = target(()), draft(())
        children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:2]

        def multinomial(weights, count):
            draws.append(len(weights))
            return torch.tensor([[draw.choose(row.tolist())] for row in weights])

        monkeypatch.setattr(torch, "multinomial", multinomial)
        with np.errstate(divide="ignore"):
            row = np.log(np.array(p)).astype(np.float32)
        best, length = theirs.evaluate_posterior(
            torch.tensor(np.tile(row, (2, 2, 1))), torch.tensor([[0, c] for c in children]), 1.0, top_p=1.0,
            sampling="nucleus",
        )  # fmt: skip
        return (children[int(best)],) if int(length) else (draw.choose(p),)

    found = certify(policy, vocab=4)
    assert set(draws) == {2}
    assert not found.lossless
    assert found.total_variation > 0.02


def test_medusa_slow_typical_does_not_run():
    """``fast=False`` calls a function of five parameters with six."""
    theirs = medusa()
    import torch

    ids = torch.zeros((1, 2), dtype=torch.int64)
    with pytest.raises(TypeError, match="positional arguments"):
        theirs.evaluate_posterior(torch.zeros((1, 2, 4)), ids, 1.0, sampling="typical", fast=False)


# ---- vLLM ----------------------------------------------------------------------------------------------------------------


class Vllm:
    """Its ``rejection_sample`` on CPU, under uniforms of one's own and exponential noise of one's own."""

    def __init__(self, monkeypatch):
        self.torch = pytest.importorskip("torch", reason="torch is not installed")
        try:
            self.sample = peers.vllm.load().rejection_sample
        except ImportError as exc:
            pytest.skip(str(exc))
        self.u, self.noise = None, None
        monkeypatch.setattr(self.torch, "rand", lambda shape, **_: self.torch.tensor(self.u))
        monkeypatch.setattr(self.torch.Tensor, "exponential_", lambda q: q.copy_(self.torch.tensor(self.noise)))

    def __call__(self, logits, draft, probs, u, last, noise, temperature=1.0):
        """Tokens of one request: logits [K + 1, V], draft [K], probs [K, V] or None, u [K], noise [V]."""
        t, k = self.torch.tensor, len(draft)
        self.u, self.noise = u, np.broadcast_to(noise, (1, len(noise))).astype(np.float32)
        options = SimpleNamespace(
            all_greedy=temperature == 0, all_random=temperature > 0, temperature=t([temperature]), generators={}
        )
        out = self.sample(
            t(draft).int(), [k], k, t([k]).int(), None if probs is None else t(probs), t(logits[:k]),
            t([[last]]).int(), options,
        )  # fmt: skip
        return [x for x in out[0].tolist() if x >= 0]


def random_step(rng):
    """logits, draft, q and uniforms of one request."""
    k, vocab = int(rng.integers(1, 6)), int(rng.integers(2, 40))
    logits = (rng.standard_normal((k + 1, vocab)) * 1.5).astype(np.float32)
    p = np.exp(logits[:k]) / np.exp(logits[:k]).sum(axis=1, keepdims=True)
    q = (0.7 * p + 0.3 * rng.dirichlet(np.ones(vocab), k)).astype(np.float32)
    draft = np.array([rng.choice(vocab, p=row / row.sum()) for row in q.astype(float)], np.int32)
    return logits, draft, q, rng.random(k + 2)


def test_vllm_greedy_gives_the_same_tokens(monkeypatch):
    theirs, rng, lengths = Vllm(monkeypatch), np.random.default_rng(0), set()
    for _ in range(60):
        logits, draft, _, _ = random_step(rng)
        best = logits.argmax(axis=1)
        draft = np.where(rng.random(len(draft)) < 0.7, best[:-1], draft).astype(np.int32)
        tokens = theirs(logits, draft, None, None, best[-1], np.ones(logits.shape[1]), temperature=0.0)
        got = assay.verify(logits, draft, np.array([0, len(draft)], np.int32), rule="greedy")
        assert got.output_token_ids[0, : got.num_emitted[0]].tolist() == tokens
        lengths.add(len(tokens))
    assert len(lengths) >= 4


@pytest.mark.parametrize("certain", [False, True])
def test_vllm_accepts_the_same_and_recovers_from_the_same_law(monkeypatch, certain):
    """The accepted tokens are the same. The recovered one is the winner of a race of exponential clocks over (p - q)+: an
    exact race, by its closed form, over the residual that the kernels here draw from."""
    theirs, rng, recovered = Vllm(monkeypatch), np.random.default_rng(1), 0
    for _ in range(120):
        logits, draft, q, u = random_step(rng)
        k, vocab = len(draft), logits.shape[1]
        noise, last = rng.exponential(size=vocab), int(rng.integers(vocab))
        tokens = theirs(logits, draft, None if certain else q, u[:k], last, noise)
        got = assay.verify(
            logits, draft, np.array([0, k], np.int32), None if certain else q, rule="rejection", uniforms=u
        )
        n = int(got.num_accepted[0])
        assert tokens[:-1] == got.output_token_ids[0, :n].tolist()
        if n == k:
            assert tokens[-1] == last
            continue
        taken = np.eye(vocab)[draft[n]] if certain else q[n].astype(float)
        p = assay.reference.softmax(logits[n])
        left = np.where(np.arange(vocab) == draft[n], 0, p) if certain else np.maximum(p - taken, 0)
        times = np.where(left > 0, noise / np.where(left > 0, left, 1), np.inf)
        assert tokens[-1] == times.argmin()
        recovered += 1
    assert recovered > 30


def test_vllm_accepts_an_impossible_token_when_its_coin_rounds_to_zero(monkeypatch):
    """``p / q >= u`` with u rounded to float32: what is 0 there lets a token of probability 0 stand."""
    theirs = Vllm(monkeypatch)
    logits, draft = np.array([[-np.inf, 0, 0], [0, 0, 0]], np.float32), np.array([0], np.int32)
    q, u = np.full((1, 3), 1 / 3, np.float32), np.array([1e-60])
    assert theirs(logits, draft, q, u, 2, np.ones(3)) == [0, 2]
    got = assay.verify(logits, draft, np.array([0, 1], np.int32), q, uniforms=np.array([1e-60, 0.5, 0.5]))
    assert got.num_accepted[0] == 0
    assert got.output_token_ids[0, 0] in (1, 2)


def test_vllm_emits_token_zero_where_nothing_is_left(monkeypatch):
    """p = q but for rounding, and a coin above the ratio: all residuals are 0, and the race's winner is token 0, whose
    probability is 0. Here p takes the residual's place, and that is counted."""
    theirs = Vllm(monkeypatch)
    logits = np.array([[-np.inf, 0, 0], [0, 0, 0]], np.float32)
    q, u = np.array([[0, 0.50001, 0.50001]], np.float32), np.array([0.999999, 0.5, 0.5])
    assert theirs(logits, np.array([1], np.int32), q, u[:1], 2, np.ones(3)) == [0]
    got = assay.verify(logits, np.array([1], np.int32), np.array([0, 1], np.int32), q, uniforms=u)
    assert got.output_token_ids[0, 0] in (1, 2)
    assert got.counters[0, 3] == 1


def test_vllm_rejects_a_token_that_its_drafter_cannot_draw(monkeypatch):
    """q(x) = 0 < p(x): min(1, p/q) is 1; theirs takes the ratio as 0."""
    theirs = Vllm(monkeypatch)
    logits, draft = np.zeros((2, 3), np.float32), np.array([0], np.int32)
    q = np.array([[0, 0.5, 0.5]], np.float32)
    assert theirs(logits, draft, q, np.array([0.5]), 2, np.ones(3)) == [0]  # recovered, not accepted: nothing follows
    got = assay.verify(logits, draft, np.array([0, 1], np.int32), q, uniforms=np.array([0.5, 0.5, 0.5]))
    assert got.num_accepted[0] == 1


def test_vllm_looks_up_the_same_ngram():
    """Its own function: the longest n-gram's earliest place. It ends where the sequence does; here a repetition goes on."""
    folder = os.environ.get(peers.vllm.VARIABLE)
    if not folder:
        pytest.skip(f"{peers.vllm.VARIABLE} does not name vLLM's source")
    text = (Path(folder) / "vllm/v1/spec_decode/ngram_proposer.py").read_text(encoding="utf-8")
    own = next(
        x for x in ast.parse(text).body if getattr(x, "name", "") == "_find_longest_matched_ngram_and_propose_tokens"
    )
    own.decorator_list = []  # compiled or not, it is the same function
    namespace = {"np": np}
    exec(compile(ast.Module([own], []), "ngram_proposer.py", "exec"), namespace)
    rng, found, ended = np.random.default_rng(0), 0, 0
    for _ in range(600):
        tokens = rng.integers(0, rng.integers(1, 6), rng.integers(1, 40)).astype(np.int32)
        shortest = int(rng.integers(1, 4))
        longest, k = shortest + int(rng.integers(0, 4)), int(rng.integers(1, 7))
        theirs = namespace[own.name](tokens, shortest, longest, 10**6, k).tolist()
        proposer = NGramProposer(longest=longest, shortest=shortest, prefer="earliest")
        ours = proposer.propose(tokens, k).tree.tokens.tolist()
        assert ours[: len(theirs)] == theirs
        assert len(ours) == (k if theirs else 0)
        found, ended = found + bool(theirs), ended + (0 < len(theirs) < k)
    assert found > 100
    assert ended > 20


# ---- vLLM's practices, as policies ----------------------------------------------------------------------------------------


def vllm_without_draft_probs(draw, target, draft):
    """NO_DRAFT_PROBS: the draft's token was sampled, but is verified as if it were certain."""
    p, x = target(()), draw.choose(draft(()))
    if draw.accept(p[x]):
        return (x,)
    return (draw.choose([0 if v == x else p[v] for v in range(len(p))]),)


def vllm_recovers_from_the_whole_target(draw, target, draft):
    """What a residual that is not computed would do: the rejected position drawn from p."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    return (x,) if draw.accept(ratio(p[x], q[x])) else (draw.choose(p),)


def vllm_probability_one_in_block(draw, target, draft):
    """Block verification of sampled drafts with their probability taken as 1 and the draft's law in the residual."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    return (x,) if draw.accept(p[x]) else (sampled_or(draw, excess(p, q), p),)


def test_vllm_practices():
    """Taking sampled drafts as certain keeps the law and costs acceptance; the half-way mixtures are biased."""
    certain, rejection = certify(vllm_without_draft_probs), certify(policies.rejection(1))
    assert certain.lossless
    assert certain.expected_accepted < rejection.expected_accepted - 0.05
    for mistake in (vllm_recovers_from_the_whole_target, vllm_probability_one_in_block):
        found = certify(mistake)
        assert not found.lossless
        assert found.total_variation > 0.01
