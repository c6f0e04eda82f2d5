"""Continuous decoding: requests join and leave a running batch, and each may speculate."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..ops.speculative import verify
from ..speculation.cache import accepted_rows, kv_moves
from ..speculation.propose import Draft, Proposer, no_draft
from .transformer import Transformer, step_rows

#: Rules whose output is, token for token, that of decoding without drafts.
BIT_IDENTICAL = ("greedy", "sampled", "gumbel")
_CHAIN_RULES = ("rejection", "block")


@dataclass(eq=False)
class Request:
    """One sequence to continue.

    Attributes
    ----------
    prompt : sequence of int
        At least one token.
    max_new_tokens : int
    temperature : float
        0 is greedy.
    seed : int
        The output is a function of the prompt, the temperature and the seed alone.
    stop_token_ids : sequence of int
        Generation ends with the first of them, which is emitted.
    proposer : Proposer, optional
        This request's own; without one it decodes token by token.
    output : list of int
        Grows as it runs.
    status : int
        0, or the row status of :func:`assay.verify` that ended it.
    num_steps, num_drafted, num_accepted : int
        Forward passes, drafted nodes and accepted ones.
    """

    prompt: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: Sequence[int] = ()
    proposer: Proposer | None = None
    output: list[int] = field(default_factory=list)
    status: int = 0
    num_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    @property
    def tokens(self) -> np.ndarray:
        """int32: prompt and output."""
        return np.array([*self.prompt, *self.output], np.int32)

    @property
    def finished(self) -> bool:
        stopped = bool(self.output) and self.output[-1] in self.stop_token_ids
        return bool(self.status) or stopped or len(self.output) >= self.max_new_tokens


@dataclass(eq=False)
class _Running:
    request: Request
    table: np.ndarray
    context: int  # tokens in the cache: all but the last one


class DecodeLoop:
    """Runs requests on a model, up to `max_batch` at a time, first come first served.

    Parameters
    ----------
    model : Transformer
    max_batch : int
    max_nodes : int
        Draft nodes of a request a step.
    num_blocks, block_size : int
        Of the key-value cache. A request is admitted when the blocks that it may come to need are free.
    rule : str
        Of :func:`assay.verify`. With "greedy", "sampled" and "gumbel" every request's tokens are those of decoding without
        drafts, whatever proposes and whatever else runs; other lossless rules keep their law.
    """

    def __init__(
        self, model: Transformer, *, max_batch: int = 8, max_nodes: int = 8, num_blocks: int = 256, block_size: int = 16,
        rule: str = "gumbel", num_threads: int | None = None,
    ) -> None:  # fmt: skip
        if max_batch < 1 or max_nodes < 0:
            raise ValueError(f"max_batch, max_nodes: expected at least 1 and 0, got {max_batch}, {max_nodes}")
        self.model, self.max_batch, self.max_nodes, self.rule = model, max_batch, max_nodes, rule
        self.num_threads = num_threads
        self.cache = model.new_cache(num_blocks=num_blocks, block_size=block_size)
        self._waiting: deque[Request] = deque()
        self._running: list[_Running] = []

    def submit(self, request: Request) -> None:
        """Puts a request in the queue; ValueError when it can never run."""
        vocab = self.model.config.vocab_size
        if not len(request.prompt) or not all(0 <= t < vocab for t in request.prompt):
            raise ValueError(f"prompt: expected at least one token, all within 0..{vocab - 1}")
        if request.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: expected at least 1, got {request.max_new_tokens}")
        longest = self._room(request)
        most = min(self.cache.num_blocks * self.cache.block_size, self.model.config.max_positions)
        if self.cache.blocks_for(longest) > self.cache.num_blocks or longest > self.model.config.max_positions:
            raise ValueError(f"max_new_tokens: expected at most {most} positions to be needed, got {longest}")
        self._waiting.append(request)

    def run(self, requests: Iterable[Request] = ()) -> None:
        """Submits these and steps until nothing runs or waits."""
        for request in requests:
            self.submit(request)
        while self.step():
            pass

    def step(self) -> bool:
        """Admits what fits, runs one forward pass and one verification. False: there was nothing to do."""
        self._admit()
        if not self._running:
            return False
        drafts = [self._draft(r) for r in self._running]
        tokens, positions, slots, visible = [], [], [], []
        for r, draft in zip(self._running, drafts, strict=True):
            tree = draft.tree
            own, seen = step_rows(self.cache, r.table, r.context, tree.layout.mask)
            tokens.append(np.concatenate([r.request.tokens[-1:], tree.tokens]))
            positions.append(tree.positions(r.context))
            slots.append(own)
            visible += seen
        hidden = self.model.forward(
            self.cache, np.concatenate(tokens), np.concatenate(positions), np.concatenate(slots), visible
        )
        self._accept(drafts, hidden)
        return True

    def preempt(self, request: Request) -> None:
        """Takes a running request's cache away; it waits first in the queue, and goes on with the same tokens when admitted again.

        Its keys and values are then computed anew, from prompt and output; ValueError when it does not run.
        """
        r = self._running_of(request)
        self._running.remove(r)
        self.cache.release(r.table)
        self._waiting.appendleft(request)

    def early_logits(self, request: Request, tokens: np.ndarray, num_layers: int) -> np.ndarray:
        """Logits [V] after the last of `tokens` by the first layers alone: the hook of a self-drafting proposer.

        Uses the request's own cache. To be called with `tokens` growing one at a time from the request's tokens on.
        """
        r = self._running_of(request)
        last = len(tokens) - 1
        if not 0 <= last - r.context <= self.max_nodes:
            raise ValueError(
                f"tokens: expected {r.context + 1}..{r.context + 1 + self.max_nodes} of them, got {last + 1}"
            )
        slots = self.cache.slots(r.table, np.arange(last + 1))
        hidden = self.model.forward(
            self.cache, tokens[-1:], np.array([last]), slots[-1:], [slots], num_layers=num_layers
        )
        row: np.ndarray = self.model.logits(hidden)[0]
        return row

    def _running_of(self, request: Request) -> _Running:
        for r in self._running:
            if r.request is request:
                return r
        raise ValueError("request: expected one that runs, got one that waits, has ended or was never submitted")

    def _room(self, request: Request) -> int:
        return len(request.prompt) + request.max_new_tokens + self.max_nodes + 1

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.max_batch:
            request = self._waiting[0]
            if self.cache.blocks_for(self._room(request)) > self.cache.free_blocks:
                return
            self._waiting.popleft()
            table = self.cache.reserve(self._room(request))
            known = request.tokens[:-1].astype(np.int64)  # of a preempted request, its output too
            context = len(known)
            if context:
                causal = np.tri(context, dtype=np.uint8)
                slots, visible = step_rows(self.cache, table, 0, causal)
                self.model.forward(self.cache, known, np.arange(context), slots, visible)
            self._running.append(_Running(request, table, context))

    def _draft(self, r: _Running) -> Draft:
        request = r.request
        # No deeper than what may still be emitted before the token that verification adds.
        left = request.max_new_tokens - len(request.output) - 1
        nodes = min(self.max_nodes, left)
        if request.proposer is None or nodes <= 0:
            return no_draft()
        draft = request.proposer.propose(request.tokens, nodes)
        if len(draft.tree) > nodes or draft.tree.tokens is None:
            raise ValueError(f"proposer: expected a tree of at most {nodes} nodes with tokens, got {len(draft.tree)}")
        if self.rule in _CHAIN_RULES and not np.array_equal(draft.tree.parents, np.arange(-1, len(draft.tree) - 1)):
            raise ValueError(f"proposer: expected a chain with rule={self.rule!r}, got a tree of several branches")
        tokens = draft.tree.tokens
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < self.model.config.vocab_size):
            raise ValueError(f"proposer: expected tokens within 0..{self.model.config.vocab_size - 1}")
        return draft

    def _accept(self, drafts: list[Draft], hidden: np.ndarray) -> None:
        running, requests = self._running, [r.request for r in self._running]
        counts = [len(d.tree) for d in drafts]
        cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        with_probs = any(d.probs is not None for d in drafts)
        result = verify(
            self.model.logits(hidden),
            np.concatenate([np.asarray(d.tree.tokens, np.int32) for d in drafts]),
            cu,
            self._probs(drafts) if with_probs else None,
            rule=self.rule,
            parents=None if self.rule in _CHAIN_RULES else np.concatenate([d.tree.parents for d in drafts]),
            temperature=np.array([r.temperature for r in requests], np.float32),
            seed=np.array([r.seed for r in requests], np.uint64),
            position=np.array([r.context + 1 for r in running], np.int64),
            stop_token_ids=[np.array(r.stop_token_ids, np.int64) for r in requests],
            max_emit=np.array([r.max_new_tokens - len(r.output) for r in requests], np.int32),
            num_threads=self.num_threads,
        )
        self._keep(result, cu, hidden, counts)
        for r in [r for r in self._running if r.request.finished]:
            self._running.remove(r)
            self.cache.release(r.table)

    def _probs(self, drafts: list[Draft]) -> np.ndarray:
        """Dense draft probabilities; a draft that was not sampled is certain."""
        rows = []
        for d in drafts:
            if d.probs is None:
                sure = np.zeros((len(d.tree), self.model.config.vocab_size), np.float32)
                sure[np.arange(len(d.tree)), d.tree.tokens] = 1
                rows.append(sure)
            else:
                rows.append(d.probs)
        return np.concatenate(rows)

    def _keep(self, result: Any, cu: np.ndarray, hidden: np.ndarray, counts: list[int]) -> None:
        """Takes the emitted tokens, and moves the accepted rows together in the cache."""
        running = self._running
        width = max(len(r.table) for r in running)
        tables = np.stack([np.pad(r.table, (0, width - len(r.table)), constant_values=-1) for r in running])
        moves = kv_moves(
            result.accept_index, cu, [r.context for r in running], block_table=tables, block_size=self.cache.block_size
        )
        self.cache.move(moves.source, moves.destination)
        rows, ends = accepted_rows(result.accept_index, cu)
        for b, r in enumerate(running):
            request = r.request
            request.status = int(result.status[b])
            request.num_steps += 1
            request.num_drafted += counts[b]
            request.num_accepted += int(result.num_accepted[b])
            request.output += result.output_token_ids[b, : result.num_emitted[b]].tolist()
            r.context = len(request.prompt) + len(request.output) - 1
            observe = getattr(request.proposer, "observe", None)
            if observe is not None:
                observe(hidden[rows[ends[b + 1] - 1]])
