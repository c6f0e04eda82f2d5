"""Proof that a way to speculate is lossless, or a counter-example: laws by enumeration, not by sampling."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np

from ..reference import softmax
from ..reference.verification import kseq_residual
from .enumerate import Draw, enumerate_law, uniform_law
from .exact import exact_models
from .policies import Model, Policy, draw_siblings
from .race import race_emissions

#: Rules of :func:`assay.verify` whose siblings are drawn without replacement.
_WITHOUT_REPLACEMENT = ("specinfer_without_replacement", "traversal_without_replacement")
#: Rules that read no draft distribution: each draft by itself must be lossless.
_ANY_DRAFT = ("greedy", "sampled", "gumbel", "target_only", "typical")
#: Arguments of :func:`assay.verify` that leave the target as it is.
_OPTIONS = {"isa", "num_threads", "posterior_threshold", "posterior_alpha", "threshold_single", "threshold_acc"}


@dataclass(frozen=True)
class CounterExample:
    """The emitted sequence whose probability is farthest off.

    Attributes
    ----------
    setting : int
        Which of the target and draft pairs.
    draft_token_ids : tuple of int or None
        The draft at fault, where a rule must be lossless whatever is drafted.
    tokens : tuple of int
    emitted, wanted : float
        Its probability under the policy and under the target.
    """

    setting: int
    draft_token_ids: tuple[int, ...] | None
    tokens: tuple[int, ...]
    emitted: float
    wanted: float


@dataclass(frozen=True)
class Certificate:
    """What :func:`certify` found.

    Attributes
    ----------
    name : str
    lossless : bool
        Whether `total_variation` is within `tolerance`, for every setting.
    total_variation : float
        Between the law of what is emitted and the target's, the largest over the settings.
    expected_accepted : float
        Accepted draft tokens, the mean over the settings; of a function, the tokens that it emits but for the last.
    tolerance : float
    settings : int
        Pairs of target and draft models that were tried.
    outcomes : int
        Ways that the random choices can go, all settings together.
    counter_example : CounterExample or None
        None where lossless.
    arithmetic : str
        What the tolerance is for: empty, or that of a float32 kernel, which rounds on arbitrary logits and not on `exact` ones.
    """

    name: str
    lossless: bool
    total_variation: float
    expected_accepted: float
    tolerance: float
    settings: int
    outcomes: int
    counter_example: CounterExample | None
    arithmetic: str = ""

    def __str__(self) -> str:
        verdict = "lossless" if self.lossless else "BIASED"
        tolerance = f"tolerance {self.tolerance:.0e}" + (f", {self.arithmetic}" if self.arithmetic else "")
        text = (
            f"{self.name}: {verdict}, total variation {self.total_variation:.2e} ({tolerance}), "
            f"{self.expected_accepted:.4f} tokens accepted, {self.outcomes} outcomes of {self.settings} settings"
        )
        if self.counter_example:
            c = self.counter_example
            drafted = "" if c.draft_token_ids is None else f" of draft {c.draft_token_ids}"
            text += f"\n  counter-example: tokens {c.tokens}{drafted} with probability {c.emitted:.6f}, target {c.wanted:.6f}"
        return text


def certify(
    policy: Policy | str, *, vocab: int = 3, drafts: int = 2, parents: Sequence[int] | None = None, settings: int = 3,
    seed: int = 0, exact: bool = False, target: Model | None = None, draft: Model | None = None, one_hot: bool = False,
    backend: str = "reference", tolerance: float | None = None, verify: Callable[..., Any] | None = None,
    **options: Any,
) -> Certificate:  # fmt: skip
    """Enumerates the law of what a policy emits, and compares it with the target's own.

    What a step emits is continued by the target itself, so that the law of one step decides: a policy whose every step is
    lossless is lossless. Sequences are as long as the longest emission.

    Parameters
    ----------
    policy : callable or str
        A function ``policy(draw, target, draft) -> tokens`` in exact probabilities (see
        :mod:`assay.speculation.policies`): every random choice goes through ``draw.choose(weights)`` or
        ``draw.accept(probability)``, and it emits at least one token. Or the name of a rule of :func:`assay.verify`, whose
        kernel is then run under enumerated uniforms.
    vocab : int
        Small: the work grows like vocab ** (drafts + 1).
    drafts, parents
        Of a named rule: the length of a chain, or the parents of a tree.
    settings, seed : int
        So many random pairs of models, with tokens of no probability and a sure draft among them.
    exact : bool
        Of a function: probabilities as fractions; then a lossless policy of rational arithmetic has a total variation of
        exactly 0. Of a named rule: settings on which float32 loses nothing (:mod:`assay.speculation.exact`), compared with
        the law by which :func:`assay.sample` draws from the same logits by the same backend, found in the same way.
    target, draft : callable, optional
        One setting of your own: prefix (tuple of tokens) to `vocab` probabilities.
    one_hot : bool
        Of a named rule: the drafts are certain. Then, as for rules that read no draft distribution, each draft by
        itself must be lossless, and the worst one counts.
    backend : {"reference", "c", "numba"}
        Of a named rule.
    tolerance : float, optional
        Default: 1e-12, for the float32 kernels of a named rule 1e-6 unless `exact`.
    verify : callable, optional
        Of a named rule: called in place of :func:`assay.verify`, with its arguments.
    options
        Of a named rule: its thresholds, ``isa`` and ``num_threads``, passed to :func:`assay.verify`.

    Returns
    -------
    Certificate

    Raises
    ------
    ValueError
        Too large to enumerate; a policy that emits nothing or tokens outside the vocabulary.
    """
    if vocab < 2 or settings < 1:
        raise ValueError(f"vocab, settings: expected at least 2 and 1, got {vocab} and {settings}")
    if (target is None) != (draft is None):
        raise ValueError("target, draft: expected both or neither")
    if target is not None and draft is not None:
        pairs = [(target, draft)]
    elif exact and isinstance(policy, str):
        tree = range(-1, drafts - 1) if parents is None else parents
        pairs = [exact_models(policy, vocab, tree, [seed, i]) for i in range(settings)]
    else:
        pairs = [random_models(vocab, [seed, i], exact=exact) for i in range(settings)]
    if tolerance is None:
        tolerance = 1e-6 if isinstance(policy, str) and backend != "reference" and not exact else 1e-12
    named: _Rule | None = None
    if isinstance(policy, str):
        named = _Rule(policy, vocab, drafts, parents, one_hot, backend, exact, options, verify)
    tally = _Tally(vocab)
    for i, (p, q) in enumerate(pairs):
        if named is not None:
            named.add(tally, i, p, q)
        elif not isinstance(policy, str):
            law, runs = enumerate_law(partial(_emission, policy, p, q, vocab))
            tally.add(i, None, [(tokens, len(tokens) - 1, weight) for tokens, weight in law.items()], p)
            tally.outcomes += runs
    arithmetic = ""
    if isinstance(policy, str) and backend != "reference":
        arithmetic = "where float32 rounds nothing" if exact else "as float32 rounds"
    name = policy if isinstance(policy, str) else getattr(policy, "__qualname__", type(policy).__name__)
    name = name.split(".<locals>")[0]
    lossless = tally.worst <= tolerance
    return Certificate(
        name, bool(lossless), float(tally.worst), tally.accepted / len(pairs), tolerance, len(pairs), tally.outcomes,
        None if lossless else tally.example, arithmetic,
    )  # fmt: skip


def random_models(vocab: int, seed: Any, *, exact: bool = False) -> tuple[Model, Model]:
    """A target and a draft model whose probabilities depend on the whole prefix; made as they are asked for.

    After the empty prefix the target never emits token 0, which the draft likes; after (1,) the draft is sure of the
    last token. Probabilities are multiples of 2^-10, so that float32 holds them exactly.
    """

    def table(which: int) -> Model:
        rows: dict[tuple[int, ...], list[Any]] = {}

        def model(prefix: tuple[int, ...]) -> list[Any]:
            if prefix not in rows:
                rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), which, len(prefix), *prefix])
                counts = 1 + rng.multinomial(1024 - vocab, rng.dirichlet(np.full(vocab, 0.7)))
                if which == 0 and prefix == ():
                    counts[1], counts[0] = counts[1] + counts[0], 0
                if which == 1 and prefix == (1,):
                    counts[:] = 1024 * np.eye(vocab, dtype=np.int64)[-1]
                rows[prefix] = [Fraction(int(c), 1024) if exact else int(c) / 1024 for c in counts]
            return rows[prefix]

        return model

    return table(0), table(1)


def _emission(policy: Policy, target: Model, draft: Model, vocab: int, draw: Draw) -> tuple[int, ...]:
    tokens = tuple(int(x) for x in policy(draw, target, draft))
    if not tokens or not all(0 <= x < vocab for x in tokens):
        raise ValueError(f"policy: expected at least one token, all within 0..{vocab - 1}, got {tokens}")
    return tokens


#: (tokens, accepted drafts, probability)
_Emission = tuple[tuple[int, ...], int, Any]


@dataclass
class _Tally:
    """The worst distance so far, over settings and, where each must be lossless, over drafts."""

    vocab: int
    worst: Any = -1
    accepted: float = 0.0
    outcomes: int = 0
    example: CounterExample | None = None
    laws: dict[tuple[int, int], dict[tuple[int, ...], Any]] = field(default_factory=dict)

    def add(
        self,
        setting: int,
        drafted: tuple[int, ...] | None,
        emissions: list[_Emission],
        target: Model,
        share: float = 1.0,
    ) -> None:
        """One law. `share`: of the setting's expected acceptance, where it has a law for each draft."""
        length = max(len(tokens) for tokens, _, _ in emissions)
        if self.vocab**length > 200_000:
            raise ValueError(f"vocab: expected vocab ** {length} emitted sequences of at most 200000, got {self.vocab}")
        weights: dict[tuple[int, ...], Any] = {}
        for tokens, accepted, weight in emissions:
            weights[tokens] = weights.get(tokens, 0) + weight
            self.accepted += float(weight) * accepted * share
        wanted = self._target_law(setting, length, target)
        tail: dict[int, dict[tuple[int, ...], Any]] = {}
        emitted = dict.fromkeys(wanted, 0)
        for tokens, weight in weights.items():
            rest = tail.setdefault(length - len(tokens), {})
            for end in itertools.product(range(self.vocab), repeat=length - len(tokens)):
                x = tokens + end
                if x not in rest:
                    rest[x] = _probability(target, x, len(tokens))
                emitted[x] += weight * rest[x]
        distance = sum(abs(emitted[x] - wanted[x]) for x in wanted) / 2
        if distance > self.worst:
            self.worst = distance
            x = max(wanted, key=lambda x: abs(emitted[x] - wanted[x]))
            self.example = CounterExample(setting, drafted, x, float(emitted[x]), float(wanted[x]))

    def _target_law(self, setting: int, length: int, target: Model) -> dict[tuple[int, ...], Any]:
        if (setting, length) not in self.laws:
            sequences = itertools.product(range(self.vocab), repeat=length)
            self.laws[setting, length] = {x: _probability(target, x, 0) for x in sequences}
        return self.laws[setting, length]


def _probability(model: Model, x: tuple[int, ...], given: int) -> Any:
    """Of the tokens of x after the first `given`, given those."""
    value: Any = 1
    for i in range(given, len(x)):
        value *= model(x[:i])[x[i]]
    return value


class _Rule:
    """A rule of :func:`assay.verify`, run on every draft under enumerated uniforms."""

    def __init__(
        self, rule: str, vocab: int, drafts: int, parents: Sequence[int] | None, one_hot: bool, backend: str,
        exact: bool, options: dict[str, Any], verify: Callable[..., Any] | None,
    ) -> None:  # fmt: skip
        if set(options) - _OPTIONS:
            unknown = sorted(set(options) - _OPTIONS)[0]
            raise TypeError(f"options: expected {', '.join(sorted(_OPTIONS))}, got {unknown}")
        self.rule, self.vocab, self.backend, self.options = rule, vocab, backend, options
        self.exact, self.bits = exact, 50 if backend == "reference" or exact else 34
        self.tree = parents is not None
        self.parents = list(range(-1, drafts - 1)) if parents is None else [int(x) for x in parents]
        self.one_hot = one_hot
        self.each = one_hot or rule in _ANY_DRAFT
        if vocab ** len(self.parents) > 20_000:
            raise ValueError(f"vocab: expected vocab ** drafts of at most 20000, got {vocab} ** {len(self.parents)}")
        if verify is None:
            from ..ops.speculative import verify as kernel

            verify = kernel
        self.verify = verify

    def prefixes(self, tokens: Sequence[int]) -> list[tuple[int, ...]]:
        """Of the root and each node: the drafted tokens up to and with it."""
        found: list[tuple[int, ...]] = [()]
        for parent, token in zip(self.parents, tokens, strict=True):
            found.append((*found[parent + 1], int(token)))
        return found

    def drafted(self, draft: Model) -> dict[tuple[int, ...], Any]:
        """Every draft and its probability; 1 for each where each must be lossless by itself. -1: no token was left."""
        if self.each:
            every = itertools.product(range(self.vocab), repeat=len(self.parents))
            if self.rule != "target_only":
                return dict.fromkeys(every, 1.0)
            return {x: 1.0 for x in every if len(set(zip(self.parents, x, strict=True))) == len(x)}
        law, _ = enumerate_law(lambda draw: self._draw(draw, draft))
        return law

    def _draw(self, draw: Draw, draft: Model) -> tuple[int, ...]:
        tokens = [-1] * len(self.parents)
        paths: dict[int, tuple[int, ...] | None] = {-1: ()}
        for node in range(-1, len(self.parents)):
            children = [i for i, parent in enumerate(self.parents) if parent == node]
            path = paths[node]
            drawn: list[int] = []
            if path is not None and children:
                replacement = self.rule not in _WITHOUT_REPLACEMENT
                drawn = draw_siblings(draw, draft(path), len(children), replacement=replacement)
            for child, token in itertools.zip_longest(children, drawn):
                paths[child] = None if token is None or path is None else (*path, token)
                tokens[child] = -1 if token is None else token
        return tuple(tokens)

    def add(self, tally: _Tally, setting: int, target: Model, draft: Model) -> None:
        draft = _of_float32(draft)
        law = self.drafted(draft)
        drafts = list(law)
        logits, probs = self._tables(drafts, target, draft)
        if self.rule == "greedy":
            target = _argmax_of(_of_logits(target))
        else:
            target = self._of_samples(target) if self.exact else _of_logits(target)
        k = len(self.parents)

        def run(owner: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
            n = len(owner)
            ids = np.array(drafts, np.int32).reshape(len(drafts), k)[owner].reshape(-1)
            found = self.verify(
                logits[owner].reshape(-1, self.vocab), ids, np.arange(n + 1, dtype=np.int32) * k,
                None if probs is None else probs[owner].reshape(-1, self.vocab), rule=self.rule,
                parents=np.tile(np.array(self.parents, np.int32), n) if self.tree else None,
                uniforms=uniforms.reshape(-1, *uniforms.shape[2:]), backend=self.backend, **self.options,
            )  # fmt: skip
            if (found.status != 0).any():
                raise ValueError(f"{self.rule}: expected status 0, got {int(found.status[found.status != 0][0])}")
            return np.concatenate([found.num_accepted[:, None], found.output_token_ids], axis=1)

        cuts = [self._cuts(x, target, draft) for x in drafts] if self.rule == "kseq" and self.bits == 50 else None
        if self.rule == "gumbel":
            laws, boxes = race_emissions(run, drafts, self.parents, self.vocab)
        else:
            laws, boxes = uniform_law(run, len(drafts), k + 2, bits=self.bits, cuts=cuts)
        tally.outcomes += boxes
        emissions = [[(tuple(t for t in out[1:] if t >= 0), out[0], v) for out, v in laws[j].items()]
                     for j in range(len(drafts))]  # fmt: skip
        if self.each:
            for x, outcomes in zip(drafts, emissions, strict=True):
                tally.add(setting, x, outcomes, target, 1 / len(drafts))
            return
        whole = [(t, n, v * float(law[x])) for x, part in zip(drafts, emissions, strict=True) for t, n, v in part]
        tally.add(setting, None, whole, target)

    def _tables(
        self, drafts: list[tuple[int, ...]], target: Model, draft: Model
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Of each draft: the target's logits [K + 1, V] and the draft's probabilities [K, V]."""
        k = len(self.parents)
        logits = np.empty((len(drafts), k + 1, self.vocab), np.float32)
        probs = np.zeros((len(drafts), k, self.vocab), np.float32)
        for j, tokens in enumerate(drafts):
            for row, prefix in enumerate(self.prefixes(tokens)):
                if min(prefix, default=0) < 0:
                    logits[j, row] = 0  # absent: never read
                    continue
                logits[j, row] = _logits(target(prefix))
                for child in (i for i, parent in enumerate(self.parents) if parent == row - 1):
                    probs[j, child] = [float(w) for w in draft(prefix)]
        return logits, None if self.each else probs

    def _of_samples(self, model: Model) -> Model:
        """The law of plain sampling after every prefix, found through its own uniform."""
        from ..ops.speculative import sample

        depth = max(len(x) for x in self.prefixes([0] * len(self.parents)))
        prefixes = [x for n in range(depth + 1) for x in itertools.product(range(self.vocab), repeat=n)]
        logits = np.array([_logits(model(x)) for x in prefixes])
        options = {name: self.options[name] for name in ("isa", "num_threads") if name in self.options}

        def run(owner: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
            both = np.repeat(uniforms, 2)  # the second is for a residual, which there is none of
            return sample(logits[owner], uniforms=both, backend=self.backend, **options).output_token_ids

        laws, _ = uniform_law(run, len(prefixes), 1, bits=self.bits)
        rows = {x: [law.get((v,), 0.0) for v in range(self.vocab)] for x, law in zip(prefixes, laws, strict=True)}
        return rows.__getitem__

    def _cuts(self, tokens: Sequence[int], target: Model, draft: Model) -> list[tuple[int, float]]:
        """K-SEQ draws its residual from p, or from a rest that little of p is mixed with: where those meet, at every node."""
        found = []
        for node, prefix in enumerate(self.prefixes(tokens)):
            count = self.parents.count(node - 1)
            if count:
                p, q = np.array(target(prefix), float), np.array(draft(prefix), float)
                of_p, rest, gamma = kseq_residual(p, q, count)
                total = of_p + gamma * rest.sum()
                if of_p > 2.0**-44 * total:  # not rounding alone
                    found.append((len(self.parents), of_p / total))
        return found


def _logits(p: Sequence[Any]) -> np.ndarray:
    """Relative to the largest, so that powers of two become multiples of one logarithm."""
    w = np.array([float(x) for x in p])
    with np.errstate(divide="ignore"):
        return np.log(w / w.max()).astype(np.float32)


def _of_logits(model: Model) -> Model:
    """What a kernel sees of a model: the softmax of float32 logits."""

    def rounded(prefix: tuple[int, ...]) -> list[float]:
        return [float(w) for w in softmax(_logits(model(prefix)))]

    return rounded


def _of_float32(model: Model) -> Model:
    def rounded(prefix: tuple[int, ...]) -> list[float]:
        return [float(np.float32(w)) for w in model(prefix)]

    return rounded


def _argmax_of(model: Model) -> Model:
    def argmax(prefix: tuple[int, ...]) -> list[float]:
        p = list(model(prefix))
        return [float(v == p.index(max(p))) for v in range(len(p))]

    return argmax
