"""Where drafts come from. Every proposer is bounded in time and memory, and none can change what is emitted."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..reference import sample, softmax, uniform
from .tree import DraftTree, top_scores

#: The domain of :func:`assay.ops.speculative.uniform` that verification leaves to drafters.
DOMAIN_DRAFT = 0


class Draft(NamedTuple):
    """Attributes
    ----------
    tree : DraftTree
        Perhaps of no nodes.
    probs : float32 [n, V] or None
        The distribution each node's token was sampled from, the same for siblings. None: nothing was sampled.
    """

    tree: DraftTree
    probs: np.ndarray | None = None


class Proposer(Protocol):
    """One request's source of drafts; it may keep state between calls, of that request alone."""

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        """A draft of what follows `tokens` (int32 [n], prompt and output so far), of at most `max_nodes` nodes."""
        ...


def no_draft() -> Draft:
    """A draft of no tokens: plain decoding's next step."""
    return Draft(DraftTree(np.empty(0, np.int32), np.empty(0, np.int32)))


def _checked(tokens: Any, max_nodes: int) -> np.ndarray:
    if max_nodes < 0:
        raise ValueError(f"max_nodes: expected 0 or more, got {max_nodes}")
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"tokens: expected integers [n], got {array.dtype} of {array.ndim} dimensions")
    return array.astype(np.int32, copy=False)


def _copied(tokens: np.ndarray, at: int, count: int) -> np.ndarray:
    """`count` tokens from place `at` on, going over into themselves behind the end, as a repetition would."""
    copied: np.ndarray = tokens[at + np.arange(count) % (len(tokens) - at)]
    return copied


class NGramProposer:
    """Prompt lookup: what followed the last tokens where they stood before (Saxena 2023).

    The longest n-gram of `longest` down to `shortest` tokens that ends the sequence and also stands earlier in it decides;
    its `branches` latest places give continuations, merged into a tree. A continuation that reaches the end of the sequence goes on
    as a repetition would.

    Parameters
    ----------
    window : int
        Only so many of the latest tokens are searched: a call costs at most ``window * longest`` comparisons.
    prefer : {"latest", "earliest"}
        Places to take where there are more than `branches`. vLLM's ngram proposer takes the earliest, with `longest` its
        prompt_lookup_max and `shortest` its prompt_lookup_min, and ends where the sequence does.
    """

    def __init__(
        self, *, longest: int = 4, shortest: int = 1, branches: int = 1, window: int = 8192, prefer: str = "latest"
    ) -> None:
        if not 1 <= shortest <= longest < window:
            raise ValueError(
                f"shortest, longest, window: expected 1 <= shortest <= longest < window, got {shortest}, {longest}, {window}"
            )
        if branches < 1:
            raise ValueError(f"branches: expected at least 1, got {branches}")
        if prefer not in ("latest", "earliest"):
            raise ValueError(f"prefer: expected latest or earliest, got {prefer!r}")
        self.longest, self.shortest, self.branches, self.window = longest, shortest, branches, window
        self.prefer = prefer

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        recent = _checked(tokens, max_nodes)[-self.window :]
        size = len(recent)
        if max_nodes == 0 or size <= self.shortest:
            return no_draft()
        # match[i]: the last n tokens also end at i - 1, for n growing.
        match = np.ones(size, bool)
        match[0] = False
        best: np.ndarray | None = None
        for n in range(1, min(self.longest, size - 1) + 1):
            match[n:] &= recent[:-n] == recent[-n]
            match[:n] = False
            ends = np.flatnonzero(match)
            if not len(ends):
                break
            if n >= self.shortest:
                best = ends
        if best is None:
            return no_draft()
        count = min(self.branches, len(best), max_nodes)
        places = (best[::-1] if self.prefer == "latest" else best)[:count].tolist()
        return Draft(DraftTree.from_sequences([_copied(recent, at, max_nodes // count).tolist() for at in places]))


class SuffixAutomatonProposer:
    """What followed the longest suffix that has stood before, found by an online suffix automaton (Blumer et al. 1985).

    Each new token costs amortised constant time however long the match is.

    Parameters
    ----------
    capacity : int
        Tokens remembered. Beyond it the automaton restarts from the latest ``capacity // 2``: at most ``2 capacity``
        states, and a restart costs constant time a token of the half that filled up.
    shortest : int
        Shorter matches propose nothing.
    """

    def __init__(self, *, capacity: int = 16384, shortest: int = 2) -> None:
        if capacity < 2 or shortest < 1:
            raise ValueError(f"capacity, shortest: expected at least 2 and 1, got {capacity}, {shortest}")
        self.capacity, self.shortest = capacity, shortest
        self._held = np.empty(0, np.int32)
        self._match = (0, -1)
        self._restart(0)

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        given = _checked(tokens, max_nodes)
        held = len(self._held)
        # What it holds must be where it was in the sequence; otherwise this is another sequence.
        known = np.array_equal(given[self._start : self._start + held], self._held)
        if not known or len(given) - self._start > self.capacity:
            self._restart(max(0, len(given) - self.capacity // 2))
            held = 0
        self._held = given[self._start :].copy()
        for token in self._held[held:].tolist():
            self._extend(token)
        length, end = self._match
        if max_nodes == 0 or length < self.shortest:
            return no_draft()
        return Draft(DraftTree.chain(_copied(self._held, end + 1, max_nodes)))

    def _restart(self, start: int) -> None:
        self._start, self._held, self._count = start, np.empty(0, np.int32), 0
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [-1]
        self._last, self._match = 0, (0, -1)

    def _state(self, following: dict[int, int], link: int, length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._end.append(end)
        return len(self._next) - 1

    def _extend(self, token: int) -> None:
        at = self._count
        self._count += 1
        new = self._state({}, 0, self._length[self._last] + 1, at)
        p = self._last
        while p >= 0 and token not in self._next[p]:
            self._next[p][token] = new
            p = self._link[p]
        if p >= 0:
            q = self._next[p][token]
            if self._length[q] == self._length[p] + 1:
                self._link[new] = q
            else:
                copy = self._state(dict(self._next[q]), self._link[q], self._length[p] + 1, self._end[q])
                while p >= 0 and self._next[p].get(token) == q:
                    self._next[p][token] = copy
                    p = self._link[p]
                self._link[q] = self._link[new] = copy
        self._last = new
        # The new state's suffix link is the longest suffix that stood before; the latest end noted there is told, then
        # replaced by this one.
        repeated = self._link[new]
        self._match = (self._length[repeated], self._end[repeated])
        self._end[repeated] = at if repeated else -1


class DraftModelProposer:
    """A chain from a draft model: any function from tokens to next-token logits.

    Parameters
    ----------
    logits
        int32 [n] tokens to logits [V] of the token after them.
    mode : {"greedy", "sample", "gumbel"}
        "sample": drawn with random numbers of the draft's own domain, and `probs` come with the draft (for rules
        that ask for them). "gumbel": with the noise that rule "gumbel" will use, for the most matches.
    seed : int
        The request's, for the last two.
    temperature : float
        Of the draft; above 0 unless greedy.
    """

    def __init__(
        self, logits: Callable[[np.ndarray], Any], *, mode: str = "greedy", seed: int = 0, temperature: float = 1.0
    ) -> None:
        if mode not in ("greedy", "sample", "gumbel"):
            raise ValueError(f"mode: expected one of greedy, sample, gumbel, got {mode!r}")
        if not temperature > 0:
            raise ValueError(f"temperature: expected above 0, got {temperature}")
        self.logits, self.mode, self.seed, self.temperature = logits, mode, seed, temperature

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        context = _checked(tokens, max_nodes)
        drafted: list[int] = []
        probs = []
        for _ in range(max_nodes):
            row = np.ascontiguousarray(self.logits(np.append(context, np.array(drafted, np.int32))), np.float32)
            position = len(context) + len(drafted)
            if self.mode == "gumbel":
                drafted.append(gumbel_token(row, self.seed, position, self.temperature))
                continue
            if self.mode == "greedy":
                drafted.append(int(row.argmax()))
                continue
            q = softmax(row, self.temperature).astype(np.float32)
            drafted.append(sample(q.astype(np.float64), uniform(self.seed, position, DOMAIN_DRAFT)))
            probs.append(q)
        return Draft(DraftTree.chain(drafted), np.array(probs, np.float32) if probs else None)


def gumbel_token(logits: np.ndarray, seed: int, position: int, temperature: float) -> int:
    """The token that rule "gumbel" would emit at this position, were these the target's logits."""
    from ..ops.speculative import sample as sample_rows

    found = sample_rows(logits[None], rule="gumbel", seed=seed, position=position, temperature=temperature)
    return int(found.output_token_ids[0, 0])


class SelfDraftProposer(DraftModelProposer):
    """The target's own first layers as the draft model (Draft & Verify, arXiv:2309.08168; LayerSkip, arXiv:2404.16710).

    Parameters
    ----------
    forward
        (int32 [n] tokens, number of layers) to logits [V]: the target, leaving after that many layers by its final
        norm and head.
    layers : int
    mode, seed, temperature
        As for :class:`DraftModelProposer`.
    """

    def __init__(
        self, forward: Callable[[np.ndarray, int], Any], layers: int, *, mode: str = "greedy", seed: int = 0,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        super().__init__(lambda tokens: forward(tokens, layers), mode=mode, seed=seed, temperature=temperature)


class TreeProposer:
    """EAGLE-2's dynamic tree from a draft model, see :func:`assay.speculation.tree.top_scores`.

    Parameters
    ----------
    log_probs
        A list of token sequences (int32 [n] each) to log-probabilities [len, V] of what follows each.
    depth, width
        Levels, and nodes expanded at each.
    """

    def __init__(self, log_probs: Callable[[list[np.ndarray]], Any], *, depth: int = 4, width: int = 4) -> None:
        self.log_probs, self.depth, self.width = log_probs, depth, width

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        context = _checked(tokens, max_nodes)
        if max_nodes == 0:
            return no_draft()

        def expand(paths: list[list[int]]) -> Any:
            return self.log_probs([np.append(context, np.array(path, np.int32)) for path in paths])

        return Draft(top_scores(expand, depth=self.depth, width=self.width, budget=max_nodes)[0])


class MedusaProposer:
    """Medusa heads over a tree shape: head i's candidates fill level i + 1 (arXiv:2401.10774).

    The loop shows it the hidden state that gave the last emitted token by calling `observe`.

    Parameters
    ----------
    heads : MedusaHeads
    shape : DraftTree
        For example ``DraftTree.from_choices(medusa_choices)``; its nodes in the order given, cut to the budget.
    """

    def __init__(self, heads: "Heads", shape: DraftTree) -> None:
        if len(shape) and int(shape.depth.max()) > heads.num_heads:
            raise ValueError(f"shape: expected at most {heads.num_heads} levels, one a head, got {shape.depth.max()}")
        self.heads, self.shape = heads, shape
        self._hidden: np.ndarray | None = None

    def observe(self, hidden: np.ndarray) -> None:
        self._hidden = np.asarray(hidden)

    def propose(self, tokens: np.ndarray, max_nodes: int) -> Draft:
        _checked(tokens, max_nodes)
        count = min(len(self.shape), max_nodes)
        if self._hidden is None or count == 0:
            return no_draft()
        assert self.shape.ranks is not None
        shape = DraftTree(self.shape.parents[:count], None, self.shape.ranks[:count])
        top = 1 + int(shape.ranks.max())  # type: ignore[union-attr]
        logits = self.heads.logits(self._hidden)
        if logits.shape[1] < top:
            raise ValueError(f"shape: expected ranks below the vocabulary of {logits.shape[1]}, got {top - 1}")
        candidates = np.argsort(-logits, axis=1, kind="stable")[:, :top]
        return Draft(shape.fill(candidates))


class Heads(Protocol):
    """What :class:`MedusaProposer` asks of heads."""

    @property
    def num_heads(self) -> int: ...

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """hidden [H] to float32 [num_heads, V]."""
        ...
