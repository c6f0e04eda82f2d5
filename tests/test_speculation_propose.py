"""Proposers: what they draft, that they are bounded, and Medusa heads in the published layout."""

import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import assay
from assay import reference
from assay.speculation import propose
from assay.speculation.medusa import MedusaHeads
from assay.speculation.propose import (
    DOMAIN_DRAFT,
    DraftModelProposer,
    MedusaProposer,
    NGramProposer,
    SelfDraftProposer,
    SuffixAutomatonProposer,
    TreeProposer,
)
from assay.speculation.tree import DraftTree


def drafted(proposer, tokens, max_nodes):
    return proposer.propose(np.array(tokens, np.int32), max_nodes).tree.tokens.tolist()


# ---- lookup ------------------------------------------------------------------------------------------------------------


def test_ngram_takes_the_longest_and_then_the_latest():
    history = [1, 2, 3, 9, 2, 3, 7, 8, 2, 3]
    assert drafted(NGramProposer(), history, 3) == [7, 8, 2]
    assert drafted(NGramProposer(), [*history[:-2], 1, 2, 3], 2) == [9, 2]
    assert drafted(NGramProposer(shortest=3), history, 3) == []
    assert drafted(NGramProposer(), [4, 5, 6], 3) == []
    assert drafted(NGramProposer(), [], 3) == []
    assert drafted(NGramProposer(), history, 0) == []
    assert drafted(NGramProposer(), [6, 6], 4) == [6, 6, 6, 6]  # a repetition goes on
    assert drafted(NGramProposer(), [1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2]


def test_ngram_branches_make_a_tree():
    history = [1, 2, 5, 6, 1, 2, 7, 8, 1, 2, 5, 9, 1, 2]
    tree = NGramProposer(branches=3).propose(np.array(history), 6).tree
    assert {tuple(tree.tokens[tree.path(i)].tolist()) for i in range(len(tree))} == {
        (5,), (5, 9), (7,), (7, 8), (5, 6)
    }  # fmt: skip
    tree.validate()


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 3), max_size=60), nodes=st.integers(0, 9), branches=st.integers(1, 4),
       window=st.integers(5, 40))  # fmt: skip
def test_ngram_drafts_what_stood_there(tokens, nodes, branches, window):
    draft = NGramProposer(branches=branches, window=window).propose(np.array(tokens, np.int32), nodes)
    assert len(draft.tree) <= nodes
    assert draft.probs is None
    draft.tree.validate()
    recent = tokens[-window:]
    best = max(
        (n for n in range(1, 5) for at in range(n, len(recent)) if recent[at - n : at] == recent[-n:]), default=0
    )
    if best and nodes:
        places = [at for at in range(best, len(recent)) if recent[at - best : at] == recent[-best:]]
        heads = {recent[at] for at in places}
        children = {int(draft.tree.tokens[c]) for c in draft.tree.children()}
        assert children
        assert children <= heads
        assert recent[places[-1]] in children
    else:
        assert len(draft.tree) == 0


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 2), max_size=70), steps=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_suffix_automaton_matches_the_longest_suffix(tokens, steps):
    """Fed in pieces; capacity is never reached here."""
    proposer = SuffixAutomatonProposer(shortest=1)
    end = 0
    for step in steps:
        end = min(end + step, len(tokens))
        now = tokens[:end]
        got = drafted(proposer, now, 4)
        earlier = [
            (n, at)
            for at in range(1, end)
            for n in range(1, at + 1)
            if now[at - n : at] == now[end - n : end] and n < end
        ]
        longest = max((n for n, _ in earlier), default=0)
        assert proposer._match[0] == longest
        if longest:
            assert len(got) == 4
            assert got[0] in {now[at] for n, at in earlier if n == longest}
        else:
            assert got == []


def test_suffix_automaton_is_bounded_and_restarts():
    rng = np.random.default_rng(0)
    proposer = SuffixAutomatonProposer(capacity=50, shortest=1)
    tokens = rng.integers(0, 4, 400).astype(np.int32)
    for end in range(0, 400, 3):
        proposer.propose(tokens[:end], 2)
        assert len(proposer._next) <= 2 * 50
        assert len(proposer._held) <= 50
    # Another sequence, and one that was cut back: it starts anew and still says what is right.
    assert drafted(proposer, [5, 6, 7, 5], 2) == [6, 7]
    assert drafted(proposer, [5, 6], 2) == []
    assert drafted(proposer, [5, 6, 5], 1) == [6]
    long = np.tile(np.array([8, 9, 10], np.int32), 100)
    assert drafted(proposer, long, 3) == [8, 9, 10]
    assert len(proposer._held) <= 50


def sequences(count):
    """Among them those that suffix automata and lookups find hard."""
    before, fibonacci = [0], [0, 1]
    while len(fibonacci) < count:
        before, fibonacci = fibonacci, fibonacci + before
    rng = np.random.default_rng(0)
    yield "one token", np.zeros(count, np.int32)
    yield "in turns", np.arange(count, dtype=np.int32) % 2
    yield "fibonacci", np.array(fibonacci[:count], np.int32)
    yield "random bits", rng.integers(0, 2, count).astype(np.int32)
    yield "all different", np.arange(count, dtype=np.int32)
    yield "ends anew", np.where(np.arange(count) % 97 == 96, np.arange(count), 0).astype(np.int32)


def steps_of(run):
    """Lines of the proposers' own code that a call runs: a clock that does not depend on the machine."""
    count = 0

    def trace(frame, event, _):
        nonlocal count
        if frame.f_code.co_filename != propose.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(("name", "tokens"), list(sequences(3000)))
def test_time_and_memory_are_bounded(name, tokens):
    """Whatever the sequence, and however long: an n-gram lookup takes as many steps of its own, each over its window; the automaton
    takes constant time a token on average, and no more than its capacity in one call; neither keeps more than its bound."""
    capacity, window = 200, 64
    lookup = NGramProposer(branches=2, window=window)
    automaton = SuffixAutomatonProposer(capacity=capacity, shortest=1)
    ends = [*range(1, 3000, 7), 3000]
    calls = [steps_of(lambda end=end: lookup.propose(tokens[:end], 4)) for end in ends]
    assert max(calls) <= 60
    assert vars(lookup).keys() == vars(NGramProposer()).keys()  # it keeps nothing of the sequence
    tracemalloc.start()
    grown, peaks = [], []
    for end in ends:
        grown.append(steps_of(lambda end=end: automaton.propose(tokens[:end], 4)))
        peaks.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert max(grown) <= 30 * capacity
    assert sum(grown) <= 90 * len(tokens)  # each token twice: half of them again after each restart
    assert len(automaton._next) <= 2 * capacity
    assert max(peaks) <= 1500 * capacity
    assert max(peaks[len(peaks) // 2 :]) <= 1.5 * max(peaks[: len(peaks) // 2])


# ---- models ------------------------------------------------------------------------------------------------------------


def toy_logits(tokens):
    return np.random.default_rng([11, *np.asarray(tokens)[-2:].tolist()]).standard_normal(12).astype(np.float32)


def test_draft_model_chains():
    context = np.array([3, 1], np.int32)
    greedy = DraftModelProposer(toy_logits).propose(context, 3)
    want = context.tolist()
    for _ in range(3):
        want.append(int(toy_logits(want).argmax()))
    assert greedy.tree.tokens.tolist() == want[2:]
    assert greedy.probs is None
    sampled = DraftModelProposer(toy_logits, mode="sample", seed=5, temperature=0.7).propose(context, 3)
    assert sampled.probs.shape == (3, 12)
    for i, token in enumerate(sampled.tree.tokens.tolist()):
        q = reference.softmax(toy_logits([*context, *sampled.tree.tokens[:i]]), 0.7)
        np.testing.assert_allclose(sampled.probs[i], q, atol=1e-7)
        assert token == reference.sample(sampled.probs[i].astype(float), reference.uniform(5, 2 + i, DOMAIN_DRAFT))
    again = DraftModelProposer(toy_logits, mode="sample", seed=5, temperature=0.7).propose(context, 3)
    np.testing.assert_array_equal(again.tree.tokens, sampled.tree.tokens)


def test_self_draft_asks_for_its_layers():
    asked = []
    proposer = SelfDraftProposer(lambda tokens, layers: asked.append(layers) or toy_logits(tokens), 2)
    assert drafted(proposer, [1, 2], 2) == drafted(DraftModelProposer(toy_logits), [1, 2], 2)
    assert asked == [2, 2]


def test_tree_proposer_keeps_the_budget():
    def log_probs(sequences):
        return [np.log(reference.softmax(toy_logits(s))) for s in sequences]

    draft = TreeProposer(log_probs, depth=3, width=3).propose(np.array([1, 2]), 7)
    assert len(draft.tree) == 7
    draft.tree.validate(max_depth=3)
    first = np.argsort(-toy_logits([1, 2]))[0]
    assert draft.tree.tokens[0] == first


# ---- Medusa --------------------------------------------------------------------------------------------------------------


def medusa_tensors(rng, heads=3, blocks=1, hidden=32, vocab=50):
    tensors = {}
    for i in range(heads):
        for j in range(blocks):
            tensors[f"{i}.{j}.linear.weight"] = rng.standard_normal((hidden, hidden)).astype(np.float32) / 6
            tensors[f"{i}.{j}.linear.bias"] = rng.standard_normal(hidden).astype(np.float32)
        tensors[f"{i}.{blocks}.weight"] = rng.standard_normal((vocab, hidden)).astype(np.float32) / 6
    return tensors


def expected_logits(tensors, hidden, heads, blocks):
    rows = []
    for i in range(heads):
        x = hidden.astype(np.float64)
        for j in range(blocks):
            y = tensors[f"{i}.{j}.linear.weight"] @ x + tensors[f"{i}.{j}.linear.bias"]
            x = x + y / (1 + np.exp(-y))
        rows.append(tensors[f"{i}.{blocks}.weight"] @ x)
    return np.array(rows)


@pytest.mark.parametrize("prefix", ["", "medusa_head.", "model.medusa_head."])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_medusa_heads_from_a_checkpoint(tmp_path, prefix, blocks):
    numpy_io = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    rng = np.random.default_rng(blocks)
    tensors = medusa_tensors(rng, blocks=blocks)
    others = {"model.layers.0.mlp.weight": np.zeros((2, 2), np.float32)} if prefix else {}
    numpy_io.save_file({prefix + k: v for k, v in tensors.items()} | others, tmp_path / "model.safetensors")
    heads = MedusaHeads.load(tmp_path / "model.safetensors")
    hidden = rng.standard_normal(32).astype(np.float32)
    want = expected_logits(tensors, hidden, 3, blocks)
    assert (heads.num_heads, heads.hidden_size, heads.vocab_size) == (3, 32, 50)
    np.testing.assert_allclose(heads.logits(hidden), want, atol=1e-4)
    quantized = MedusaHeads.load(tmp_path / "model.safetensors", quantize=True).logits(hidden)
    # INT4 of normal weights in groups of 32: about a tenth of the standard deviation of a logit.
    assert np.abs(quantized - want).max() < 0.6 * np.abs(want).max()
    assert np.corrcoef(quantized.ravel(), want.ravel())[0, 1] > 0.95


class Saved:
    """torch.save's archive without torch: the pickle is made of names alone, whatever stands behind them elsewhere."""

    def __init__(
        self, tensors, *, dtype="FloatStorage", compression=zipfile.ZIP_STORED, bytes_missing=0, root="archive"
    ):
        self.tensors, self.dtype, self.compression, self.missing, self.root = (
            tensors,
            dtype,
            compression,
            bytes_missing,
            root,
        )

    def write(self, path):
        """By pickle's own opcodes (protocol 2), as torch writes them."""
        entries, parts = {}, [b"\x80\x02ccollections\nOrderedDict\n)R("]

        def text(x):
            return b"X" + struct.pack("<I", len(x)) + x.encode()

        def number(x):
            return b"J" + struct.pack("<i", x)

        def shape(xs):
            return b"(" + b"".join(number(x) for x in xs) + b"t"

        for key, (name, values) in enumerate(self.tensors.items()):
            strides = [s // values.itemsize for s in values.strides]
            storage = b"(" + text("storage") + f"ctorch\n{self.dtype}\n".encode() + text(str(key)) + text("cpu")
            storage += number(values.size) + b"tQ"
            tensor = (
                b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(0) + shape(values.shape) + shape(strides)
            )
            parts.append(text(name) + tensor + b"\x89ccollections\nOrderedDict\n)RtR")
            raw = values.tobytes("A")
            entries[f"{self.root}/data/{key}"] = raw[: len(raw) - self.missing]
        entries = {f"{self.root}/data.pkl": b"".join(parts) + b"u.", f"{self.root}/byteorder": b"little"} | entries
        with zipfile.ZipFile(path, "w", self.compression) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)


def test_medusa_heads_of_a_torch_file(tmp_path):
    """The published ``medusa_lm_head.pt``: its folder, its names, also tensors stored by columns and in halves."""
    tensors = medusa_tensors(np.random.default_rng(3))
    hidden = np.ones(32, np.float32)
    want = MedusaHeads.from_tensors({tuple(k.split(".")): v for k, v in tensors.items()}, "test").logits(hidden)
    Saved({k: np.asfortranarray(v) for k, v in tensors.items()}).write(tmp_path / "medusa_lm_head.pt")
    np.testing.assert_array_equal(MedusaHeads.load(tmp_path).logits(hidden), want)
    half = {k: v.astype(np.float16) for k, v in tensors.items()}
    Saved(half, dtype="HalfStorage").write(tmp_path / "half.pt")
    bits = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in tensors.items()}
    Saved(bits, dtype="BFloat16Storage").write(tmp_path / "bf16.pt")
    for name, tolerance in (("half.pt", 0.02), ("bf16.pt", 0.2)):
        np.testing.assert_allclose(MedusaHeads.load(tmp_path / name).logits(hidden), want, atol=tolerance)


def test_medusa_heads_that_torch_saved(tmp_path):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensors = medusa_tensors(np.random.default_rng(4))
    heads = torch.nn.ModuleList()
    for i in range(3):
        block = torch.nn.Module()
        block.linear = torch.nn.Linear(32, 32)
        heads.append(torch.nn.Sequential(block, torch.nn.Linear(32, 50, bias=False)))
        for name, own in heads[i].state_dict().items():
            own.copy_(torch.tensor(tensors[f"{i}.{name}"]))
    torch.save(heads.state_dict(), tmp_path / "medusa_lm_head.pt")
    got = MedusaHeads.load(tmp_path)
    want = MedusaHeads.from_tensors({tuple(k.split(".")): v for k, v in tensors.items()}, "test")
    np.testing.assert_array_equal(got.logits(np.ones(32)), want.logits(np.ones(32)))
    torch.save(heads, tmp_path / "module.pt")  # a pickled module asks for its classes
    with pytest.raises(assay.FormatError, match=r"expected tensors of floats alone, got torch\."):
        MedusaHeads.load(tmp_path / "module.pt")


def test_torch_files_that_are_refused(tmp_path):
    tensors, path = medusa_tensors(np.random.default_rng(5), heads=1), tmp_path / "heads.pt"
    with pytest.raises(assay.FormatError, match=r"expected medusa_lm_head\.safetensors or medusa_lm_head\.pt"):
        MedusaHeads.load(tmp_path)
    for message, saved in (
        ("expected at most 1020 elements of storage, got one at 1023", Saved(tensors, bytes_missing=16)),
        ("expected an entry that is not compressed", Saved(tensors, compression=zipfile.ZIP_DEFLATED)),
        ("expected tensors of floats alone, got torch.LongStorage", Saved(tensors, dtype="LongStorage")),
        ("BufferError|multiple of element size", Saved(tensors, bytes_missing=1)),
    ):
        saved.write(path)
        with pytest.raises(assay.FormatError, match=message):
            MedusaHeads.load(path)
    for data in (b"", b"PK", b"\x80\x02}q\x00."):
        path.write_bytes(data)
        with pytest.raises(assay.FormatError, match=r"expected an archive of torch\.save"):
            MedusaHeads.load(path)

    def archive(pickled):
        with zipfile.ZipFile(path, "w") as written:
            written.writestr("archive/data.pkl", pickled)

    for message, pickled in (
        ("expected tensors of floats alone, got posix.system", b"cposix\nsystem\n(X\x04\x00\x00\x00truetR."),
        ("expected tensors of floats alone, got builtins.eval", pickle.dumps(eval)),
        ("expected a dictionary of tensors, got list", pickle.dumps([1])),
        ("expected a dictionary of tensors, got int as", pickle.dumps({"0.0.weight": 1})),
        ("expected storages of floats", b"(X\x01\x00\x00\x00atQ."),
        ("expected an archive of torch.save", b"garbage"),
        ("expected an archive of torch.save", b"ctorch._utils\n_rebuild_tensor_v2\n)R."),
    ):
        archive(pickled)
        with pytest.raises(assay.FormatError, match=message):
            MedusaHeads.load(path)


def test_medusa_half_precision_and_faults(tmp_path):
    numpy_io = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tensors = medusa_tensors(np.random.default_rng(0))
    path = tmp_path / "heads.safetensors"

    def load(changed):
        numpy_io.save_file(changed, path)
        return MedusaHeads.load(path)

    half = load({k: v.astype(np.float16) for k, v in tensors.items()})
    widened = {k: v.astype(np.float16).astype(np.float32) for k, v in tensors.items()}
    np.testing.assert_allclose(half.logits(np.ones(32)), expected_logits(widened, np.ones(32), 3, 1), atol=1e-4)
    faults = [
        (lambda t: t.pop("1.0.linear.bias"), "expected a tensor 1.0.linear.bias, which is missing"),
        (lambda t: t.pop("2.1.weight"), "expected a tensor 2.1.weight, which is missing"),
        (lambda t: t.update({"1.7.weight": np.zeros((2, 2), np.float32)}), "got also 1.7.weight"),
        (lambda t: t.update({"1.1.weight": np.zeros((50, 31), np.float32)}), r"outputs\[1\]: expected \[50, 32\]"),
        (lambda t: t.update({"1.0.linear.bias": np.zeros(31, np.float32)}), r"blocks\[1\]\[0\]: expected"),
        (lambda t: t.update({"0.1.weight": np.zeros((50, 32), np.int32)}), "expected F16, BF16 or F32, got I32"),
        (lambda t: (t.clear(), t.update({"other": np.zeros(1, np.float32)})), "heads 0, 1, ..., got none"),
    ]
    for change, message in faults:
        broken = dict(tensors)
        change(broken)
        with pytest.raises(assay.FormatError, match=message):
            load(broken)


def test_medusa_proposer_fills_its_shape():
    rng = np.random.default_rng(1)
    tensors = medusa_tensors(rng)
    heads = MedusaHeads.from_tensors({tuple(k.split(".")): v for k, v in tensors.items()}, "test")
    shape = DraftTree.from_choices([[0], [1], [0, 0], [0, 2], [0, 0, 0]])
    proposer = MedusaProposer(heads, shape)
    assert len(proposer.propose(np.array([1]), 5).tree) == 0  # nothing observed yet
    hidden = rng.standard_normal(32).astype(np.float32)
    proposer.observe(hidden)
    draft = proposer.propose(np.array([1]), 9)
    ranked = np.argsort(-heads.logits(hidden), axis=1, kind="stable")
    assert draft.tree.tokens.tolist() == [ranked[0, 0], ranked[0, 1], ranked[1, 0], ranked[1, 2], ranked[2, 0]]
    assert len(proposer.propose(np.array([1]), 3).tree) == 3
    with pytest.raises(ValueError, match="shape: expected at most 3 levels, one a head, got 4"):
        MedusaProposer(heads, DraftTree.from_choices([[0], [0, 0], [0, 0, 0], [0, 0, 0, 0]]))


def test_bad_arguments_say_got_and_wanted():
    for message, run in (
        ("shortest, longest, window: expected", lambda: NGramProposer(longest=2, shortest=3)),
        ("branches: expected at least 1, got 0", lambda: NGramProposer(branches=0)),
        ("prefer: expected latest or earliest, got 'first'", lambda: NGramProposer(prefer="first")),
        ("capacity, shortest: expected", lambda: SuffixAutomatonProposer(capacity=1)),
        (
            "mode: expected one of greedy, sample, gumbel, got 'beam'",
            lambda: DraftModelProposer(toy_logits, mode="beam"),
        ),
        ("temperature: expected above 0", lambda: DraftModelProposer(toy_logits, temperature=0)),
        ("layers: expected at least 1", lambda: SelfDraftProposer(lambda t, n: None, 0)),
        ("max_nodes: expected 0 or more, got -1", lambda: NGramProposer().propose(np.array([1]), -1)),
        ("tokens: expected integers", lambda: NGramProposer().propose(np.array([1.5]), 1)),
    ):
        with pytest.raises(ValueError, match=message):
            run()
