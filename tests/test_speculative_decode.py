"""A whole decode loop: with speculation it emits exactly the tokens of the loop without, bit for bit.

A small transformer of this package's ops (INT4 matrices, dense and routed to experts) runs ragged batches whose requests
join and leave, by every kind of proposer, chains and trees, greedy and with seeded sampling.
"""

import numpy as np
import pytest

from assay.engine.decode import DecodeLoop, Request
from assay.engine.transformer import Transformer, TransformerConfig, step_rows
from assay.speculation.medusa import MedusaHeads
from assay.speculation.propose import (
    Draft,
    DraftModelProposer,
    MedusaProposer,
    NGramProposer,
    SelfDraftProposer,
    SuffixAutomatonProposer,
)
from assay.speculation.tree import DraftTree

VOCAB = 96
SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
         "intermediate_size": 96, "max_positions": 256}  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request):
    experts = {"num_experts": 4, "top_k": 2} if request.param == "experts" else {}
    return Transformer.random(TransformerConfig(**SHAPE, **experts), seed=3, num_threads=1)


class RandomTrees:
    """Drafts that are often wrong: random trees, sometimes along what was emitted before for this request."""

    def __init__(self, seed, hint):
        self.rng, self.hint = np.random.default_rng(seed), hint

    def propose(self, tokens, max_nodes):
        n = int(self.rng.integers(0, max_nodes + 1))
        parents = np.array([self.rng.integers(-1, i) for i in range(n)], np.int32)
        tree = DraftTree(parents, self.rng.integers(0, VOCAB, n))
        right = tree.tokens.copy()
        for i in range(n):  # a node whose depth is known gets the right token half of the time
            at = len(tokens) + int(tree.depth[i]) - 1
            if at < len(self.hint) and self.rng.random() < 0.6:
                right[i] = self.hint[at]
        return Draft(tree.with_tokens(right).dedupe()[0])


def requests(temperature, count=10):
    """Ragged prompts and lengths; some stop early."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 14)).tolist()
        stops = rng.integers(0, VOCAB, 2).tolist() if i % 3 == 0 else []
        made.append(Request(prompt, int(rng.integers(1, 60)), temperature, seed=1000 + i, stop_token_ids=stops))
    made[4].temperature = 0.0  # greedy beside sampled
    return made


@pytest.fixture(scope="module")
def plain(model):
    """Each request alone, token by token: what speculation has to repeat."""
    found = {}

    def outputs(rule, temperature):
        if (rule, temperature) not in found:
            alone = requests(temperature)
            for r in alone:
                DecodeLoop(model, max_batch=1, rule=rule, num_threads=1).run([r])
            found[rule, temperature] = alone
        return found[rule, temperature]

    return outputs


def proposers(kind, loop, asked, alone):
    """Gives each request its own proposer."""
    rng = np.random.default_rng(5)
    heads = MedusaHeads([[]] * 3, [(rng.standard_normal((VOCAB, 64)) / 8).astype(np.float32) for _ in range(3)])
    for i, (r, known) in enumerate(zip(asked, alone, strict=True)):
        if kind == "lookup":
            r.proposer = (
                NGramProposer(branches=1 + i % 3) if i % 2 else SuffixAutomatonProposer(capacity=32, shortest=1)
            )
        elif kind == "self-draft":
            mode = "greedy" if r.temperature == 0 else "gumbel"

            def first_layer(tokens, layers, r=r):
                return loop.early_logits(r, tokens, layers)

            temperature = r.temperature or 1.0
            r.proposer = SelfDraftProposer(first_layer, 1, mode=mode, seed=r.seed, temperature=temperature)
        elif kind == "random trees":
            r.proposer = RandomTrees(i, [*known.prompt, *known.output])
        elif kind == "medusa":
            r.proposer = MedusaProposer(heads, DraftTree.from_choices([[0], [1], [0, 0], [1, 0], [0, 0, 0]]))
        elif kind == "mixed" and i % 4:
            kinds = ("lookup", "random trees", "self-draft")
            proposers(kinds[i % 4 - 1], loop, [r], [known])


def run(model, plain, kind, rule, temperature, **how):
    alone = plain(rule, temperature)
    loop = DecodeLoop(
        model, num_threads=1, **{"max_batch": 4, "max_nodes": 6, "num_blocks": 40, "block_size": 5, **how}, rule=rule
    )
    asked = requests(temperature)
    proposers(kind, loop, asked, alone)
    for r in asked[:6]:
        loop.submit(r)
    for _ in range(5):
        loop.step()
    loop.run(asked[6:])  # the rest joins while the first are running
    for want, got in zip(alone, asked, strict=True):
        assert got.output == want.output
        assert got.status == 0
    assert loop.cache.free_blocks == 40
    return asked


@pytest.mark.parametrize("kind", ["lookup", "self-draft", "random trees", "medusa", "mixed"])
@pytest.mark.parametrize(("rule", "temperature"), [("greedy", 0.0), ("gumbel", 0.8), ("sampled", 0.8)])
def test_speculation_emits_the_same_tokens(model, plain, kind, rule, temperature):
    asked = run(model, plain, kind, rule, temperature)
    assert sum(r.num_drafted for r in asked) > 50
    if kind in ("random trees", "mixed"):
        assert sum(r.num_accepted for r in asked) > 20
        assert sum(r.num_steps for r in asked) < sum(len(r.output) for r in asked) - 20


def test_ragged_batches_without_drafts(model, plain):
    asked = run(model, plain, "none", "gumbel", 0.8, max_batch=3, max_nodes=0)
    assert all(r.num_drafted == 0 for r in asked)


def test_a_row_has_the_same_bits_in_any_step(model):
    """One chain fed token by token, at once, and as a branch of a tree between other rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, 9)
    cache = model.new_cache(num_blocks=8, block_size=4)
    table = cache.reserve(20)

    def feed(ids, context, mask, positions):
        slots, visible = step_rows(cache, table, context, mask)
        return model.logits(model.forward(cache, ids, positions, slots, visible))

    single = [feed(tokens[i : i + 1], i, np.ones((1, 1), np.uint8), np.array([i]))[0] for i in range(9)]
    together = feed(tokens, 0, np.tri(9, dtype=np.uint8), np.arange(9))
    np.testing.assert_array_equal(together, single)
    feed(tokens[:4], 0, np.tri(4, dtype=np.uint8), np.arange(4))
    # Behind token 4 (the root): nodes 1, 4, 5 and 6 are tokens 5 to 8, the others lead elsewhere.
    tree = DraftTree([-1, -1, 0, 1, 1, 4, 5], [1, tokens[5], 2, 3, tokens[6], tokens[7], tokens[8]])
    rows = feed(np.concatenate([tokens[4:5], tree.tokens]), 4, tree.layout.mask, tree.positions(4))
    np.testing.assert_array_equal(rows[[0, 2, 5, 6, 7]], single[4:])


def test_lossless_rules_with_draft_probabilities_run(model):
    """Not the same tokens, but whole sequences; the law is certified elsewhere."""
    for rule in ("rejection", "block"):
        loop = DecodeLoop(model, max_nodes=3, rule=rule)
        asked = [Request([5, 6, 7], 12, 1.0, seed=i) for i in range(3)]
        for r in asked[:2]:
            r.proposer = DraftModelProposer(
                lambda tokens, loop=loop, r=r: loop.early_logits(r, tokens, 1), mode="sample", seed=r.seed
            )
        loop.run(asked)
        assert all(len(r.output) == 12 and r.status == 0 for r in asked)
        assert sum(r.num_accepted for r in asked) > 0


def test_bad_requests_are_refused(model):
    loop = DecodeLoop(model, num_blocks=4, block_size=4, max_nodes=2)
    for message, request in (
        ("prompt: expected at least one token", Request([], 4)),
        ("prompt: expected at least one token, all within 0..95", Request([96], 4)),
        ("max_new_tokens: expected at least 1, got 0", Request([1], 0)),
        ("max_new_tokens: expected at most 16 positions to be needed, got 24", Request([1], 20)),
    ):
        with pytest.raises(ValueError, match=message):
            loop.submit(request)

    class Wild:
        def propose(self, tokens, max_nodes):
            return Draft(DraftTree.chain([VOCAB]))

    class Forked:
        def propose(self, tokens, max_nodes):
            return Draft(DraftTree([-1, -1], [1, 2]))

    with pytest.raises(ValueError, match="proposer: expected a chain with rule='block'"):
        DecodeLoop(model, rule="block").run([Request([1], 4, proposer=Forked())])
    with pytest.raises(ValueError, match=r"proposer: expected tokens within 0\.\.95"):
        loop.run([Request([1], 4, proposer=Wild())])
