"""The exact law of what verification emits, by integrating over its uniform numbers instead of sampling them.

Given drafts, every decision depends on one uniform alone and is constant on few intervals of it. Their ends are found by
bisection through the kernel itself, uniform by uniform in the order in which the rule consumes them.
"""

import itertools

import numpy as np

import assay
from assay import reference

LEAST, MOST = 2.0**-60, 1 - 2.0**-53


class Tree:
    """A target and a draft model over a small vocabulary, whose distributions depend on the whole prefix."""

    def __init__(self, vocab, parents, *, seed=0, exact=False):
        self.vocab, self.parents = vocab, list(parents)
        self.k = len(self.parents)
        self.paths = []
        for j, parent in enumerate(self.parents):
            self.paths.append((*(self.paths[parent] if parent >= 0 else ()), j))
        self.depth = max((len(p) for p in self.paths), default=0)
        rng = np.random.default_rng([seed, vocab, self.k])
        prefixes = [x for n in range(self.depth + 1) for x in itertools.product(range(vocab), repeat=n)]
        self.logits = {x: (rng.standard_normal(vocab) * 1.5).astype(np.float32) for x in prefixes}
        self.q = {x: rng.dirichlet(np.full(vocab, 0.7)).astype(np.float32) for x in prefixes}
        self.logits[()][0] = -np.inf  # a token that the target never emits, likely drafted
        if exact:
            for q in self.q.values():  # float32 probabilities that sum to one exactly
                q[:] = np.round(q * 64) / 64
                q[q.argmax()] += 1 - q.sum()
        self.p = {x: reference.softmax(row) for x, row in self.logits.items()}

    def prefix(self, draft, node):
        return tuple(draft[j] for j in self.paths[node]) if node >= 0 else ()

    def drafts(self, *, replaced):
        """Every assignment of tokens to the nodes with its probability."""
        for draft in itertools.product(range(self.vocab), repeat=self.k):
            weight = 1.0
            for j, parent in enumerate(self.parents):
                q = self.q[self.prefix(draft, parent)].astype(float)
                if not replaced:
                    for older in range(j):
                        if self.parents[older] == parent:
                            q = np.where(np.arange(self.vocab) == draft[older], 0, q)
                weight *= q[draft[j]] / q.sum() if q.sum() > 0 else 0
            if weight > 0:
                yield draft, weight

    def target_law(self):
        law = {}
        for x in itertools.product(range(self.vocab), repeat=self.depth + 1):
            law[x] = float(np.prod([self.p[x[:i]][x[i]] for i in range(len(x))]))
        return law

    def order(self, rule, *, one_hot):
        """Slots of the uniforms as the rule consumes them: leaves first where there is a draft distribution."""
        if not one_hot and (rule == "block" or rule.startswith("traversal")):

            def below(node):
                found = [s for j in range(self.k) if self.parents[j] == node for s in below(j)]
                return found if node < 0 else [*found, node]

            return [*below(-1), self.k, self.k + 1]  # fmt: skip
        return list(range(self.k + 2))

    def run(self, drafts, uniforms, *, chain=False, one_hot=False, **how):
        """Outcomes of verify for many requests at once: drafts [n, K], uniforms [n, K + 2]."""
        n = len(drafts)
        rows = [self.logits[self.prefix(d, j)] for d in drafts for j in range(-1, self.k)]
        q = None
        if not one_hot:
            q = np.array([self.q[self.prefix(d, parent)] for d in drafts for parent in self.parents])
        result = assay.verify(
            np.array(rows), np.array(drafts, np.int32).reshape(-1), np.arange(n + 1, dtype=np.int32) * self.k, q,
            parents=None if chain else np.tile(np.array(self.parents, np.int32), n), uniforms=uniforms.reshape(-1), **how,
        )  # fmt: skip
        assert (result.status == 0).all()
        return result

    def outcomes(self, drafts, uniforms, **how):
        result = self.run(drafts, uniforms, **how)
        both = np.concatenate([result.output_token_ids, result.accept_index], axis=1)
        return [tuple(row) for row in both.tolist()]

    def integrate(self, drafts, *, bits, rule, one_hot=False, **how):
        """For each draft the law of its outcomes: dict of outcome to probability."""
        states = [(i, np.full(self.k + 2, 0.5), 1.0) for i in range(len(drafts))]
        how |= {"rule": rule, "one_hot": one_hot}
        for slot in self.order(rule, one_hot=one_hot):
            states = self._split(drafts, states, slot, bits, **how)
        laws = [{} for _ in drafts]
        found = self.outcomes([drafts[i] for i, _, _ in states], np.array([u for _, u, _ in states]), **how)
        for (i, _, weight), outcome in zip(states, found, strict=True):
            laws[i][outcome] = laws[i].get(outcome, 0.0) + weight
        return laws

    def _split(self, drafts, states, slot, bits, **how):
        def outcomes(points):
            if not points:
                return []
            u = np.array([states[s][1] for s, _ in points])
            u[:, slot] = [x for _, x in points]
            return self.outcomes([drafts[states[s][0]] for s, _ in points], u, **how)

        n = len(states)
        ends = outcomes([(s, x) for s in range(n) for x in (LEAST, MOST)])
        active = [(s, LEAST, MOST, ends[2 * s], ends[2 * s + 1]) for s in range(n) if ends[2 * s] != ends[2 * s + 1]]
        for _ in range(bits):
            middles = outcomes([(s, (low + high) / 2) for s, low, high, _, _ in active])
            halves = []
            for (s, low, high, a, b), m in zip(active, middles, strict=True):
                middle = (low + high) / 2
                halves += [(s, low, middle, a, m), (s, middle, high, m, b)]
            active = [x for x in halves if x[3] != x[4]]
        cuts = [[] for _ in states]
        for s, low, high, _, _ in active:
            cuts[s].append((low + high) / 2)
        pieces = []
        for (i, u, weight), own in zip(states, cuts, strict=True):
            bounds = [0.0, *sorted(own), 1.0]
            for low, high in itertools.pairwise(bounds):
                if high > low:
                    inner = u.copy()
                    inner[slot] = (low + high) / 2
                    pieces.append((i, inner, weight * (high - low)))
        return pieces

    def emitted(self, law):
        """The law of the first depth + 1 tokens: what is emitted, continued by the target itself."""
        total = {}
        for outcome, weight in law.items():
            head = tuple(t for t in outcome[: self.k + 1] if t >= 0)
            for tail in itertools.product(range(self.vocab), repeat=self.depth + 1 - len(head)):
                x = head + tail
                p = np.prod([self.p[x[:n]][x[n]] for n in range(len(head), self.depth + 1)])
                total[x] = total.get(x, 0.0) + weight * p
        return total

    def distance(self, *, bits, rule, replaced=True, one_hot=False, drafts=None, **how):
        """Total variation between what is emitted and the target; one-hot drafts: of the worst of `drafts`.

        Also the expected number of accepted drafts.
        """
        pairs = [(d, 1.0) for d in drafts] if drafts else list(self.drafts(replaced=replaced))
        laws = self.integrate([d for d, _ in pairs], bits=bits, rule=rule, one_hot=one_hot, **how)
        target = self.target_law()
        accepted = sum(
            w * weight * (sum(t >= 0 for t in outcome[: self.k + 1]) - 1)
            for (_, w), law in zip(pairs, laws, strict=True)
            for outcome, weight in law.items()
        )
        if one_hot:
            return max(_variation(self.emitted(law), target) for law in laws), accepted / len(laws)
        mixed = {}
        for (_, w), law in zip(pairs, laws, strict=True):
            for x, weight in self.emitted(law).items():
                mixed[x] = mixed.get(x, 0.0) + w * weight
        return _variation(mixed, target), accepted


def _variation(law, target):
    return 0.5 * sum(abs(law.get(x, 0.0) - target[x]) for x in target)
