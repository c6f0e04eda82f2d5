"""Random calls of the whole interface of verification, bad data and bad arguments among them.

What every call must give: a documented exception that does not depend on the backend, or tokens of the vocabulary, and the same
of every variant and twin. Longer than as a test: ``python tests/test_spec_verify_fuzz.py SECONDS [SEED]``.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

import assay
from assay.ops.speculative import RULES, Ragged, SparseProbs
from bf16 import BFloat16
from variants import runnable_variants

CHAINS = ("rejection", "block")
INTS = ("output_token_ids", "num_accepted", "num_emitted", "status", "accept_index", "counters")
REFUSALS = (ValueError, TypeError)
BAD_TREE = 5  # the last status
FAR = [-(2**63), -(2**31), -7, -2, 2**31 - 1, 2**31, 2**62]


PENALTIES = {"logit_bias", "repetition_penalty", "frequency_penalty", "presence_penalty"}
GENTLE = {"rule", "seed", "position", "uniforms", "parents", "draft_probs", "draft_to_target", "stop_token_ids", "max_emit",
          "temperature"}  # fmt: skip


class Case:
    """One call, all of it by a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.rule = str(rng.choice(RULES))
        self.vocab = int(
            rng.choice(
                [1, 2, 3, 5, 17, 64, 300, 2047, 2049, 4500], p=[0.05, 0.1, 0.1, 0.15, 0.2, 0.2, 0.1, 0.03, 0.04, 0.03]
            )
        )
        self.batch = int(rng.integers(0, 6))
        most = int(rng.choice([0, 1, 3, 6, 12]))
        self.counts = rng.integers(0, most + 1, self.batch)
        self.cu = np.concatenate([[0], np.cumsum(self.counts)])
        self.drafts = int(self.cu[-1])
        self.rows = self.drafts + self.batch
        self.bad = rng.random() < 0.4  # whether data may be bad; arguments are broken apart from it
        self.options = {"rule": self.rule}
        self.values = self.logits()
        self.trees()
        self.law()
        self.processors()
        self.rest()

    def chance(self, p):
        return self.rng.random() < p

    def logits(self):
        rng, shape = self.rng, (self.rows, self.vocab)
        scale = float(rng.choice([0, 0.3, 2, 8, 60, 1e4]))
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        if self.chance(0.2):
            values = np.round(values)  # ties
        if self.chance(0.3):
            values[rng.random(shape) < 0.3] = -np.inf
        if self.bad and self.rows:
            for _ in range(int(rng.integers(0, 3))):
                row = int(rng.integers(self.rows))
                what = rng.choice([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42])
                values[row, rng.random(self.vocab) < rng.choice([0.02, 1.0])] = what
        return values

    def given_logits(self):
        """In one of the dtypes and strides that are taken."""
        kind = self.rng.integers(5)
        with np.errstate(over="ignore", invalid="ignore"):
            if kind == 0:
                return self.values.astype(np.float16)
        if kind == 1:
            return BFloat16(self.values)
        if kind == 2:
            wide = np.full((self.rows, self.vocab + int(self.rng.integers(1, 40))), np.nan, np.float32)
            wide[:, : self.vocab] = self.values
            return wide[:, : self.vocab]
        return self.values

    def ids(self, shape):
        rng = self.rng
        found = rng.integers(0, self.vocab, shape)
        if self.rows and self.vocab > 1 and self.chance(0.6) and found.ndim == 1:
            best = np.nan_to_num(self.values, nan=-1, posinf=9, neginf=-9).argmax(axis=1)
            near = best[rng.integers(0, self.rows, shape)]
            found = np.where(rng.random(shape) < 0.6, near, found)
        if self.chance(0.2):
            found = np.where(rng.random(shape) < 0.2, -1, found)
        if self.bad and self.chance(0.5):
            found = np.where(rng.random(shape) < 0.15, rng.choice([self.vocab, self.vocab + 3, *FAR], shape), found)
        return found

    def trees(self):
        rng = self.rng
        self.draft_ids = self.ids(self.drafts)
        if self.chance(0.5):
            with np.errstate(invalid="ignore"):
                self.draft_ids = np.clip(self.draft_ids, -(2**31), 2**31 - 1).astype(np.int32)
        self.parents = np.concatenate(
            [[rng.integers(-1, j) if j else -1 for j in range(k)] for k in self.counts] or [[]]
        )
        if self.rule in CHAINS or self.chance(0.2):
            self.parents = np.concatenate([np.arange(-1, k - 1) for k in self.counts] or [[]])
        elif self.bad and self.chance(0.4):  # cycles, missing parents, other requests' nodes
            wrong = rng.choice([-9, -2, 0, 1, 5, 99, 2**31 - 1], self.drafts)
            self.parents = np.where(rng.random(self.drafts) < 0.2, wrong, self.parents)
        if self.rule not in CHAINS and self.chance(0.8):
            self.options["parents"] = self.parents.astype(rng.choice(["int32", "int64"]))

    def law(self):
        rng = self.rng
        kind = rng.choice(["none", "dense", "sparse"])
        if self.rule == "kseq" and kind == "none":
            kind = "dense"
        self.vocab_draft = self.vocab
        if self.chance(0.1):
            self.vocab_draft = int(rng.integers(1, self.vocab + 1))
            self.options["draft_to_target"] = rng.permutation(self.vocab)[: self.vocab_draft]
        if kind == "none":
            return
        q = rng.dirichlet(np.full(self.vocab_draft, rng.choice([0.1, 1.0, 30.0])), self.drafts).astype(np.float32)
        q = np.nan_to_num(q.reshape(self.drafts, self.vocab_draft))
        if self.bad and self.chance(0.4):
            where = rng.random(q.shape) < 0.1
            q[where] = rng.choice([np.nan, np.inf, -1.0, 0.0, 1e-42, 5.0, 3e38], q.shape)[where]
        if kind == "dense":
            self.options["draft_probs"] = q
            return
        k = int(rng.integers(0, min(self.vocab_draft, 9) + 1))
        ids = np.array([rng.permutation(self.vocab_draft)[:k] for _ in range(self.drafts)], np.int64).reshape(
            self.drafts, k
        )
        probs = np.take_along_axis(q, ids, 1)
        if self.chance(0.4):
            ids = np.where(rng.random(ids.shape) < 0.3, rng.choice([-1, 0, self.vocab + 5], ids.shape), ids)
        self.options["draft_probs"] = SparseProbs(ids, probs)

    def some_ids(self, most=6):
        return self.rng.integers(0, self.vocab, self.rng.integers(0, most))

    def processors(self):
        rng, batch, o = self.rng, self.batch, self.options

        def pick(*values, dtype=np.float32):
            return (
                rng.choice(np.array(values, dtype), batch)
                if self.chance(0.7)
                else values[int(rng.integers(len(values)))]
            )

        choices = {
            "temperature": lambda: pick(0.0, 1e-30, 0.3, 1.0, 1.7, 1e30), "top_k": lambda: pick(0, 1, 2, 40, dtype=np.int64),
            "top_p": lambda: pick(1.0, 0.9, 0.3, 1e-9), "min_p": lambda: pick(0.0, 0.02, 1.0),
            "typical_p": lambda: pick(1.0, 0.9, 0.2), "repetition_penalty": lambda: pick(1.0, 1.4, 0.3, 1e30),
            "frequency_penalty": lambda: pick(0.0, 0.3, -3e38), "presence_penalty": lambda: pick(0.0, -0.3, 3e38),
            "prompt_token_ids": lambda: [self.some_ids() for _ in range(batch)],
            "generated_token_ids": lambda: [self.some_ids() for _ in range(batch)],
            "logit_bias": lambda: [{int(v): float(rng.choice([-np.inf, -3, 0, 3, 1e38])) for v in self.some_ids(4)}
                                   for _ in range(batch)],
            "banned_token_ids": lambda: self.some_ids(3), "stop_token_ids": self.stops,
            "max_emit": lambda: pick(0, 1, 2, 100, dtype=np.int32),
            "allowed_token_ids": lambda: [self.some_ids(9) if self.chance(0.7) else None for _ in range(batch)],
            "bitmask": lambda: rng.integers(0, 2**32, (batch if self.chance(0.5) else self.rows, -(-self.vocab // 32)),
                                            dtype=np.uint64).astype(np.uint32) | np.uint32(1 + self.chance(0.7)),
            "threshold_acc": lambda: float(rng.choice([1.0, 0.7])), "threshold_single": lambda: float(rng.choice([1.0, 0.2])),
            "posterior_alpha": lambda: float(rng.choice([0.0, 0.3, 5.0])), "return_logprobs": lambda: True,
        }  # fmt: skip
        busy = rng.choice([0.0, 0.08, 0.5])
        for name, make in choices.items():
            if self.chance(busy):
                o[name] = make()

    def stops(self):
        if self.chance(0.5):
            return self.some_ids()
        if self.chance(0.5):
            parts = [self.some_ids() for _ in range(self.batch)]
            ids = np.concatenate(parts) if parts else np.empty(0, np.int64)
            return Ragged(ids, np.concatenate([[0], np.cumsum([len(x) for x in parts])]).astype(np.int32))
        return [self.some_ids() for _ in range(self.batch)]

    def rest(self):
        rng, o = self.rng, self.options
        if self.rule not in ("gumbel", "greedy") and self.chance(0.4):
            o["uniforms"] = np.clip(rng.random(self.drafts + 2 * self.batch), 1e-300, 1 - 2.0**-53)
        elif self.rule == "gumbel" and self.chance(0.4):
            o["uniforms"] = np.clip(rng.random((self.rows, self.vocab)), 1e-300, 1 - 2.0**-53)
        else:
            o["seed"] = rng.integers(0, 2**64, self.batch, dtype=np.uint64)
            o["position"] = rng.integers(-(2**40), 2**62, self.batch)

    def break_argument(self):
        """One argument replaced by something that no one should pass."""
        rng = self.rng
        junk = [None, "x", -1, 3.5, np.nan, np.empty(0), np.zeros((2, 2, 2)), np.full(self.batch, -3), np.array("a"), [[]], {},
                np.zeros(self.batch + 1, np.float32), np.zeros((self.drafts, 3), np.float32), True, 10**30, b"", object()]  # fmt: skip
        name = rng.choice(
            [
                *self.options,
                "seed",
                "position",
                "uniforms",
                "top_k",
                "max_emit",
                "bitmask",
                "num_threads",
                "draft_probs",
            ]
        )
        self.options[str(name)] = junk[int(rng.integers(len(junk)))]

    def call(self, logits, **how):
        return assay.verify(logits, self.draft_ids, self.cu, **self.options | how)


def possible(case, got):
    """What holds of any answer, checked from the values alone."""
    ids = np.asarray(case.draft_ids, np.int64)
    if "draft_to_target" in case.options:
        table = case.options["draft_to_target"]
        known = (ids >= 0) & (ids < len(table))
        ids = np.where(known, table[np.clip(ids, 0, len(table) - 1)], np.where(ids >= 0, 2**40, ids))
    most = case.options.get("max_emit")
    most = np.full(case.batch, 2**31 if most is None else most)
    for b in range(case.batch):
        k, tokens, path = int(case.counts[b]), got.output_token_ids[b], got.accept_index[b]
        accepted, emitted = int(got.num_accepted[b]), int(got.num_emitted[b])
        assert (tokens[emitted:] == -1).all()
        assert (path[accepted:] == -1).all()
        if got.status[b]:
            assert 1 <= got.status[b] <= BAD_TREE
            assert accepted == emitted == 0
            continue
        assert 0 <= emitted <= min(accepted + 1, most[b])
        assert emitted >= min(1, most[b])
        assert ((tokens[:emitted] >= 0) & (tokens[:emitted] < case.vocab)).all()
        own = path[:accepted]
        assert ((own >= 0) & (own < k)).all()
        chained = "parents" not in case.options
        parents = np.arange(-1, k - 1) if chained else np.asarray(case.options["parents"])[case.cu[b] : case.cu[b + 1]]
        assert [int(parents[j]) for j in own] == [-1, *own.tolist()][:accepted]
        assert (ids[case.cu[b] : case.cu[b + 1]][own][:emitted] == tokens[: min(accepted, emitted)]).all()
        row = case.cu[b] + b + np.concatenate([[0], own + 1])[:emitted]
        assert (case.values[row, tokens[:emitted]] > -np.inf).all()


def same(got, want, what):
    for name in INTS:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{what}: {name}")
    if want.logprobs is not None:
        np.testing.assert_array_equal(got.logprobs, want.logprobs, err_msg=f"{what}: logprobs")


@dataclass(frozen=True)
class Refused:
    kind: str
    text: str


def outcome(case, logits, **how):
    """A result, or the refusal's type and text."""
    try:
        return case.call(logits, **how)
    except REFUSALS as exc:
        return Refused(type(exc).__name__, str(exc))


def against_the_reference(case, logits, got):
    """The reference computes in float64: its tokens differ where a uniform lies within float32's rounding of a threshold,
    not in general. Filters and extreme values may lie there by construction, and what float32 takes for a probability of 0
    is none in float64: those are left to the twin."""
    t = np.asarray(case.options.get("temperature", 1.0), float)
    values = case.values[np.isfinite(case.values)]
    coldest = t[t > 0].min(initial=1.0)
    if values.size and float(values.max()) - float(values.min()) > 80 * coldest:
        return "beyond float32"
    if (case.rule == "gumbel" and case.vocab > 64) or PENALTIES & {*case.options}:  # they may overflow
        return "skipped"
    gentle = not case.bad and {*case.options} <= GENTLE
    names = INTS[:5] if gentle else ("status",)

    def differ(a, b):
        return any((getattr(a, name) != getattr(b, name)).any() for name in names)

    if not differ(got, outcome(case, logits, backend="reference")):
        return "equal" if gentle else "status"
    again = 0
    for shift in range(12):  # other random numbers: not again
        case.options.pop("uniforms", None)
        case.options["seed"], case.options["position"] = np.arange(case.batch) + 10 * shift, 5
        again += differ(*(outcome(case, logits, backend=backend) for backend in ("c", "reference")))
    assert again <= 2, f"{again} of 12 differ from the reference"
    return "within rounding"


def check(seed, variants):
    """One random call. Returns what it came to."""
    case = Case(seed)
    logits = case.given_logits()
    case.values = logits.widened() if isinstance(logits, BFloat16) else np.asarray(logits).astype(np.float32)
    broken = case.chance(0.15)
    if broken:
        case.break_argument()
    first = outcome(case, logits, isa=variants[0], num_threads=1)
    if isinstance(first, Refused):
        assert broken, first
        for backend in ("numba", "reference"):
            assert outcome(case, logits, backend=backend, num_threads=1) == first
        return f"refused: {first.kind}"
    if not broken:
        possible(case, first)
    for isa in variants[1:]:
        same(outcome(case, logits, isa=isa, num_threads=int(case.rng.integers(1, 4))), first, isa)
    same(outcome(case, logits, backend="numba"), first, "numba")
    return "broken, taken" if broken else "reference " + against_the_reference(case, logits, first)


@pytest.mark.filterwarnings("ignore:.*encountered in scalar:RuntimeWarning")  # of the twin: infinite penalties
@pytest.mark.parametrize("part", range(4))
def test_random_calls(part):
    variants = runnable_variants("spec_verify")
    found = Counter()
    for seed in range(150 * part, 150 * (part + 1)):
        try:
            found[check(seed, variants)] += 1
        except BaseException as exc:
            exc.add_note(f"seed {seed}")
            raise
    assert found["reference equal"] >= 10
    assert found["reference status"] >= 10
    assert sum(n for what, n in found.items() if what.startswith("refused")) >= 5


if __name__ == "__main__":
    ends, seed, seen = time.monotonic() + float(sys.argv[1]), int((sys.argv + ["1000000"])[2]), Counter()
    while time.monotonic() < ends:
        try:
            seen[check(seed, runnable_variants("spec_verify"))] += 1
        except AssertionError as exc:
            print(f"seed {seed}: {exc}", flush=True)
            seen["FAILED"] += 1
        seed += 1
    print(sum(seen.values()), "calls:", dict(seen))
    sys.exit(min(seen["FAILED"], 1))
