"""The lossless rules as programs of exact probabilities, for :func:`assay.certify` and to start one's own from.

A policy is ``policy(draw, target, draft) -> tokens``: it drafts, decides and emits at least one token. ``target(prefix)``
and ``draft(prefix)`` are the next token's probabilities after a tuple of tokens; every random choice goes through `draw`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from .enumerate import Draw

#: Probabilities of the next token after a prefix.
Model = Callable[[tuple[int, ...]], Sequence[Any]]
Policy = Callable[[Draw, Model, Model], Sequence[int]]


def excess(p: Sequence[Any], q: Sequence[Any], scale: Any = 1) -> list[Any]:
    """(scale p - q)+, not normalised."""
    return [max(scale * a - b, 0) for a, b in zip(p, q, strict=True)]


def normalised(weights: Sequence[Any]) -> list[Any]:
    """Weights over their sum."""
    total = sum(weights)
    return [w / total for w in weights]


def without(q: Sequence[Any], taken: Sequence[int]) -> list[Any]:
    """q with the taken tokens at 0, normalised; all 0 where nothing is left."""
    left = [0 if x in taken else w for x, w in enumerate(q)]
    return normalised(left) if sum(left) > 0 else left


def sampled_or(draw: Draw, weights: Sequence[Any], otherwise: Sequence[Any]) -> int:
    """From weights; from `otherwise` where rounding left none of them."""
    return draw.choose(weights if sum(weights) > 0 else otherwise)


def draft_chain(draw: Draw, draft: Model, drafts: int) -> tuple[int, ...]:
    """So many tokens drawn from the draft model, each behind those before."""
    x: tuple[int, ...] = ()
    for _ in range(drafts):
        x += (draw.choose(draft(x)),)
    return x


def ratio(p: Any, q: Any) -> Any:
    """min(1, p / q), 1 where q is 0."""
    return p / q if p < q else 1


def rejection(drafts: int) -> Policy:
    """Chain rejection, token by token (Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318)."""

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        x = draft_chain(draw, draft, drafts)
        for i in range(drafts):
            p, q = target(x[:i]), draft(x[:i])
            if not draw.accept(ratio(p[x[i]], q[x[i]])):
                return (*x[:i], sampled_or(draw, excess(p, q), p))
        return (*x, draw.choose(target(x)))

    return policy


def block(drafts: int) -> Policy:
    """Block verification (Sun et al., arXiv:2403.10444): the longest prefix whose own coin accepts it stands."""

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        x = draft_chain(draw, draft, drafts)
        reach: list[Any] = [1]
        for i in range(drafts):
            p, q = target(x[:i])[x[i]], draft(x[:i])[x[i]]
            reach.append(min(reach[i] * p / q, 1))
        kept = 0
        for i in range(1, drafts + 1):
            if i == drafts:
                h = reach[i]
            else:
                z = sum(excess(target(x[:i]), draft(x[:i]), reach[i]))
                left = z + 1 - reach[i]
                h = z / left if left > 0 else 1
            if draw.accept(h):
                kept = i
        if kept == drafts:
            return (*x, draw.choose(target(x)))
        p, q = target(x[:kept]), draft(x[:kept])
        return (*x[:kept], sampled_or(draw, excess(p, q, reach[kept]), p))

    return policy


def multi_round(widths: Sequence[int], *, replacement: bool = True) -> Policy:
    """SpecInfer's multi-step rule on a tree of so many children a level (arXiv:2305.09781, Algorithm 2).

    Siblings are tried in the order they were drawn; without replacement as in Sequoia (arXiv:2402.12374).
    """

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        x: tuple[int, ...] = ()
        for width in widths:
            q = list(draft(x))
            drawn = draw_siblings(draw, q, width, replacement=replacement)
            p, accepted = list(target(x)), None
            for child in drawn:
                if draw.accept(ratio(p[child], q[child])):
                    accepted = child
                    break
                left = excess(p, q)
                p = normalised(left) if sum(left) > 0 else p
                q = q if replacement else without(q, [child])
            if accepted is None:
                return (*x, draw.choose(p))
            x += (accepted,)
        return (*x, draw.choose(target(x)))

    return policy


def draw_siblings(draw: Draw, q: Sequence[Any], width: int, *, replacement: bool) -> list[int]:
    """As many as there are, when drawn without replacement from few tokens."""
    drawn: list[int] = []
    for _ in range(width):
        left = q if replacement else without(q, drawn)
        if sum(left) > 0:
            drawn.append(draw.choose(left))
    return drawn


def target_only(widths: Sequence[int]) -> Policy:
    """EAGLE's and SGLang's rule for children that were not sampled: the likeliest ones of the draft at each level."""

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        x: tuple[int, ...] = ()
        for width in widths:
            q, p = draft(x), target(x)
            children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:width]
            others = [0 if v in children else p[v] for v in range(len(p))]
            picked = draw.choose([p[c] for c in children] + [sum(others)])
            if picked == len(children):
                return (*x, draw.choose(others))
            x += (children[picked],)
        return (*x, draw.choose(target(x)))

    return policy


def traversal(parents: Sequence[int], *, replacement: bool = True) -> Policy:
    """Traversal verification of a tree, from its leaves to its root (Weng et al., arXiv:2505.12398); of a chain: :func:`block`."""
    below = {node: [j for j, parent in enumerate(parents) if parent == node] for node in range(-1, len(parents))}

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        paths: dict[int, tuple[int, ...]] = {-1: ()}
        waiting: dict[int, list[int]] = {}
        for node in range(-1, len(parents)):
            if node in paths:
                drawn = draw_siblings(draw, draft(paths[node]), len(below[node]), replacement=replacement)
                waiting[node] = below[node][: len(drawn)]
                paths |= {child: (*paths[node], x) for child, x in zip(waiting[node], drawn, strict=True)}
        chance: dict[int, Any] = {-1: 1}
        left = {-1: list(target(()))}  # of each node's target, times the chance that the node stands
        q = {node: list(draft(path)) for node, path in paths.items()}
        node = -1
        while True:
            if waiting[node]:
                child = waiting[node][0]
                x = paths[child][-1]
                chance[child] = ratio(left[node][x], q[node][x])
                if chance[child] > 0:
                    node = child
                    left[node] = [chance[node] * w for w in target(paths[node])]
                    continue
            elif node < 0 or draw.accept(chance[node]):
                return (*paths[node], sampled_or(draw, left[node], target(paths[node])))
            else:
                child, node = node, parents[node]
            left[node] = excess(left[node], q[node])
            whole = sum(left[node]) + 1 - chance[node]
            if whole > 0:
                left[node] = [w / whole for w in left[node]]
            chance[node] = sum(left[node]) if whole > 0 else 1
            waiting[node].pop(0)
            if not replacement:
                q[node] = without(q[node], [paths[child][-1]])

    return policy


def matching(drafts: int) -> Policy:
    """A token drawn from the target; a draft that equals it stands (rules "sampled" and "gumbel")."""

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        x = draft_chain(draw, draft, drafts)
        for i in range(drafts):
            token = draw.choose(target(x[:i]))
            if token != x[i]:
                return (*x[:i], token)
        return (*x, draw.choose(target(x)))

    return policy


def k_seq(drafts: int, rho: Any = None) -> Policy:
    """K-SEQ of SpecTr (arXiv:2310.15141) on independent drafts of one token; `rho` by default the best one."""

    def policy(draw: Draw, target: Model, draft: Model) -> Sequence[int]:
        from .transport import kseq_rho

        p, q = target(()), draft(())
        r = kseq_rho(p, q, drafts) if rho is None else rho
        accepts = [min(b, a / r) for a, b in zip(p, q, strict=True)]
        beta = sum(accepts)
        for _ in range(drafts):
            x = draw.choose(q)
            if draw.accept(accepts[x] / q[x]):
                return (x, draw.choose(target((x,))))
        refused = (1 - beta) ** drafts
        share = (1 - refused) / beta if beta > 0 else 0
        return (sampled_or(draw, [max(a - c * share, 0) for a, c in zip(p, accepts, strict=True)], p),)

    return policy
