"""A whole decode loop: with speculation it emits exactly the tokens of the loop without, bit for bit.

A small transformer of this package's ops (INT4 matrices, dense and routed to experts) runs ragged batches whose requests
join, leave and are preempted, by every kind of proposer, chains and trees, greedy and with seeded sampling.
"""

import numpy as np
import pytest

from assay.engine.decode import DecodeLoop, Request
from assay.engine.transformer import Transformer, TransformerConfig, step_rows
from assay.reference import softmax
from assay.speculation.medusa import MedusaHeads
from assay.speculation.propose import (
    Draft,
    DraftModelProposer,
    MedusaProposer,
    NGramProposer,
    SelfDraftProposer,
    SuffixAutomatonProposer,
    TreeProposer,
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


class DraftModel:
    """A model apart, of the target's first layer, which computes anew only what it has not been fed before."""

    def __init__(self, target):
        self.model = Transformer(target.config, target.embedding, target.layers[:1], target.norm, target.head, 1)
        self.cache = self.model.new_cache(num_blocks=64, block_size=4)
        self.table = self.cache.reserve(256)
        self.fed = np.empty(0, np.int32)

    def __call__(self, tokens):
        count = min(len(self.fed), len(tokens) - 1)
        same = int((np.cumprod(self.fed[:count] == tokens[:count])).sum())
        new = tokens[same:]
        slots, visible = step_rows(self.cache, self.table, same, np.tri(len(new), dtype=np.uint8))
        hidden = self.model.forward(self.cache, new, same + np.arange(len(new)), slots, visible)
        self.fed = np.array(tokens)
        return self.model.logits(hidden)[-1]


def requests(temperature, count=10, longest=60):
    """Ragged prompts and lengths; some stop early."""
    rng = np.random.default_rng(7)
    made = []
    for i in range(count):
        prompt = rng.integers(0, VOCAB, rng.integers(1, 14)).tolist()
        stops = rng.integers(0, VOCAB, 2).tolist() if i % 3 == 0 else []
        made.append(Request(prompt, int(rng.integers(1, longest)), temperature, seed=1000 + i, stop_token_ids=stops))
    made[4].temperature = 0.0  # greedy beside sampled
    return made


@pytest.fixture(scope="module")
def plain(model):
    """Each request alone, token by token: what speculation has to repeat."""
    found = {}

    def outputs(rule, temperature, **how):
        key = (rule, temperature, *how.values())
        if key not in found:
            alone = requests(temperature, **how)
            for r in alone:
                DecodeLoop(model, max_batch=1, rule=rule, num_threads=1).run([r])
            found[key] = alone
        return found[key]

    return outputs


def fitted_heads(model, known, count=3):
    """Heads that remember some of what these requests will say: least squares from hidden states to the tokens behind."""
    states, after = [], []
    for r in known:
        tokens = r.tokens
        cache = model.new_cache(num_blocks=64, block_size=4)
        slots, visible = step_rows(cache, cache.reserve(len(tokens)), 0, np.tri(len(tokens), dtype=np.uint8))
        hidden = model.forward(cache, tokens, np.arange(len(tokens)), slots, visible)
        states.append(hidden[: len(tokens) - count - 1])
        after += [tokens[i + 2 : i + 2 + count] for i in range(len(tokens) - count - 1)]
    x, y = np.concatenate(states), np.eye(VOCAB)[np.array(after)]
    outputs = [np.linalg.lstsq(x, y[:, i], rcond=None)[0].T.astype(np.float32) for i in range(count)]
    return MedusaHeads([[]] * count, outputs)


KINDS = (
    "n-gram",
    "n-gram trees",
    "suffix automaton",
    "self-draft",
    "draft model",
    "eagle trees",
    "medusa",
    "random trees",
)


def proposer(kind, loop, r, known, heads):
    """One request's own."""
    mode = "greedy" if r.temperature == 0 else "gumbel"
    how = {"mode": mode, "seed": r.seed, "temperature": r.temperature or 1.0}
    if kind == "n-gram":
        return NGramProposer()
    if kind == "n-gram trees":
        return NGramProposer(branches=3, longest=2)
    if kind == "suffix automaton":
        return SuffixAutomatonProposer(capacity=32, shortest=1)
    if kind == "self-draft":
        return SelfDraftProposer(lambda tokens, layers: loop.early_logits(r, tokens, layers), 1, **how)
    if kind == "draft model":
        return DraftModelProposer(DraftModel(loop.model), **how)
    if kind == "eagle trees":
        draft = DraftModel(loop.model)
        return TreeProposer(lambda paths: [np.log(softmax(draft(x))) for x in paths], depth=2, width=2)
    if kind == "medusa":
        return MedusaProposer(heads, DraftTree.from_choices([[0], [1], [2], [0, 0], [1, 0], [0, 0, 0]]))
    assert kind == "random trees"
    return RandomTrees(r.seed, [*known.prompt, *known.output])


def run(model, plain, kind, rule, temperature, *, preempt=0, sizes=None, **how):
    """Requests join while others run, leave when they end, and lose their cache now and then: each emits what it emits alone."""
    alone = plain(rule, temperature, **(sizes or {}))
    usual = {"num_threads": 1, "max_batch": 4, "max_nodes": 6, "num_blocks": 40, "block_size": 5}
    loop = DecodeLoop(model, rule=rule, **usual | how)
    asked = requests(temperature, **(sizes or {}))
    heads = fitted_heads(model, alone)
    for i, (r, known) in enumerate(zip(asked, alone, strict=True)):
        own = (*KINDS, "none")[i % (len(KINDS) + 1)] if kind == "mixed" else kind
        r.proposer = None if own == "none" else proposer(own, loop, r, known, heads)
    half = len(asked) // 2
    for r in asked[:half]:
        loop.submit(r)
    waiting, rng, preempted, steps = asked[half:], np.random.default_rng(3), 0, 0
    while loop.step() or waiting:
        steps += 1
        if waiting and steps % 3 == 0:
            loop.submit(waiting.pop(0))
        running = [x.request for x in loop._running]
        if running and rng.random() < preempt:
            loop.preempt(running[int(rng.integers(len(running)))])
            preempted += 1
    for want, got in zip(alone, asked, strict=True):
        assert got.output == want.output
        assert got.status == 0
    assert loop.cache.free_blocks == loop.cache.num_blocks
    assert preempted >= 5 * (preempt > 0)
    return asked


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rule", "temperature"), [("greedy", 0.0), ("gumbel", 0.3), ("sampled", 0.3)])
def test_speculation_emits_the_same_tokens(model, plain, kind, rule, temperature):
    """Accepted drafts and rejected ones, by every proposer."""
    asked = run(model, plain, kind, rule, temperature, preempt=0.1)
    drafted, accepted = sum(r.num_drafted for r in asked), sum(r.num_accepted for r in asked)
    assert accepted >= 5
    assert drafted - accepted > 50
    assert sum(r.num_steps for r in asked) < sum(len(r.output) for r in asked) - 4


def test_a_long_run_of_every_proposer_side_by_side(model, plain):
    """Some thousands of tokens of requests that speculate each in its own way, or not at all, by two threads."""
    sizes = {"count": 36, "longest": 120}
    asked = run(
        model, plain, "mixed", "gumbel", 0.3, sizes=sizes, preempt=0.05, max_batch=6, num_blocks=90, num_threads=2
    )
    assert sum(len(r.output) for r in asked) > 1500
    assert sum(r.num_accepted for r in asked) > 300


def test_a_preempted_request_waits_first_and_only_what_runs_can_be_preempted(model):
    loop = DecodeLoop(model, max_batch=1, num_threads=1)
    first, second = Request([1, 2], 6, 0.5, seed=1), Request([3], 2)
    for r in (first, second):
        loop.submit(r)
    loop.step()
    loop.preempt(first)
    for r in (first, second):
        with pytest.raises(ValueError, match="request: expected one that runs"):
            loop.preempt(r)
    loop.step()
    assert (len(first.output), len(second.output)) == (2, 0)
    loop.run()
    with pytest.raises(ValueError, match="request: expected one that runs"):
        loop.preempt(second)


def test_ragged_batches_without_drafts(model, plain):
    asked = run(model, plain, "none", "gumbel", 0.8, max_batch=3, max_nodes=0, preempt=0.2)
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
