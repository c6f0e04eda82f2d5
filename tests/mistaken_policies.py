"""Ways to speculate that look right and are not lossless, as policies of :func:`assay.certify`; and the right way of some."""

import numpy as np

from assay.speculation.policies import draft_chain, draw_siblings, excess, normalised, ratio, sampled_or, without


def siblings_sorted_after_sampling(draw, target, draft):
    """Drawn without replacement, then tried by descending probability."""
    p, q = list(target(())), list(draft(()))
    drawn = sorted(draw_siblings(draw, q, 2, replacement=False), key=lambda x: (-draft(())[x], x))
    for x in drawn:
        if draw.accept(ratio(p[x], q[x])):
            return (x,)
        p, q = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p, without(q, [x])
    return (draw.choose(p),)


def draft_law_not_renewed(draw, target, draft):
    """Drawn without replacement, verified as if with it."""
    p, q = list(target(())), draft(())
    for x in draw_siblings(draw, q, 2, replacement=False):
        if draw.accept(ratio(p[x], q[x])):
            return (x,)
        p = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p
    return (draw.choose(p),)


def target_only_with(threshold_single=1.0, threshold_acc=1.0):
    """SGLang's kernel: a child is taken when coin <= cumulated / threshold_acc, or its own p >= threshold_single."""

    def policy(draw, target, draft):
        p, q = list(target(())), draft(())
        children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:2]
        before, passed = 0.0, 1.0  # the coin is known to lie above `before`
        for c in children:
            cumulated = sum(p[x] for x in children[: children.index(c) + 1])
            reach = 1.0 if p[c] >= threshold_single else min(cumulated / threshold_acc, 1.0)
            if passed <= 0 or draw.accept(max(reach - before, 0) / passed):
                return (c,)
            before = max(before, reach)
            passed = 1 - before
        left = [0 if v in children else p[v] for v in range(len(p))]
        return (sampled_or(draw, left, p),)

    return policy


def dropped_for_its_own_probability(draw, target, draft):
    """The draft ends before a token that its own model gave little (p_min), which had been sampled."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if q[x] < 0.4:
        return (draw.choose(p),)
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (sampled_or(draw, excess(p, q), p),)


def stops_after_an_unsure_token(draw, target, draft):
    """The right way: the unsure token is kept and verified, the draft ends behind it (a stopping time)."""
    x = ()
    while len(x) < 3:
        x += (draw.choose(draft(x)),)
        if draft(x[:-1])[x[-1]] < 0.4:
            break
    for i in range(len(x)):
        p, q = target(x[:i]), draft(x[:i])
        if not draw.accept(ratio(p[x[i]], q[x[i]])):
            return (*x[:i], sampled_or(draw, excess(p, q), p))
    return (*x, draw.choose(target(x)))


def unfiltered_draft_law(draw, target, draft):
    """Sampled from the draft's two best tokens, verified with all its probabilities."""
    p, q = target(()), draft(())
    best = sorted(range(len(q)), key=lambda v: -q[v])[:2]
    x = draw.choose([q[v] if v in best else 0 for v in range(len(q))])
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (sampled_or(draw, excess(p, q), p),)


def own_target_draw_per_path(draw, target, draft):
    """Medusa's nucleus rule: each path through a shared node draws its own target token; what matched is kept."""
    q = draft(())
    children = sorted(range(len(q)), key=lambda v: (-q[v], v))[:2]
    matched = [c for c in children if draw.choose(target(())) == c]
    return (matched[0],) if matched else (draw.choose(target(())),)


def one_target_draw_per_node(draw, target, draft):
    """The same with one draw for the node: sample and match."""
    return (draw.choose(target(())),)


def residual_by_place(draw, target, draft):
    """llama.cpp's example: lists of the tokens that survive filtering, subtracted entry by entry."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    mine = [v for v in range(len(p)) if p[v] > 0]
    theirs = [v for v in range(len(q)) if q[v] > 0]
    left = [max(p[v] - (q[theirs[i]] if i < len(theirs) else 0), 0) for i, v in enumerate(mine)]
    return (mine[draw.choose(left)] if sum(left) > 0 else draw.choose(p),)


def draft_noise_in_the_residual(draw, target, draft):
    """One uniform draws the draft token and, after its rejection, the other token."""
    p, q = target(()), draft(())
    left = normalised(excess(p, q)) if sum(excess(p, q)) > 0 else p
    cuts = sorted({0.0, 1.0, *np.cumsum(q[:-1]), *np.cumsum(left[:-1])})
    at = draw.choose(np.diff(cuts).tolist())
    u = (cuts[at] + cuts[at + 1]) / 2
    x = int(np.searchsorted(np.cumsum(q[:-1]), u))
    if draw.accept(ratio(p[x], q[x])):
        return (x,)
    return (int(np.searchsorted(np.cumsum(left[:-1]), u)),)


def block_up_to_the_first_failure(draw, target, draft):
    """vllm-ascend's reading of block verification: the prefix ends at the first coin that fails, not after the last that
    holds."""
    x, reach, kept = draft_chain(draw, draft, 2), 1.0, 0
    kept_reach = 1.0
    for i in (1, 2):
        reach = min(reach * target(x[: i - 1])[x[i - 1]] / draft(x[: i - 1])[x[i - 1]], 1)
        z = sum(excess(target(x[:i]), draft(x[:i]), reach))
        h = reach if i == 2 else (z / (z + 1 - reach) if z + 1 - reach > 0 else 1)
        if not draw.accept(h):
            break
        kept, kept_reach = i, reach
    p = target(x[:kept])
    if kept == 2:
        return (*x, draw.choose(p))
    return (*x[:kept], sampled_or(draw, excess(p, draft(x[:kept]), kept_reach), p))


def mismatch_drawn_anew(draw, target, draft):
    """Sample and match, but the token that did not match is thrown away and another one drawn."""
    x, p = draw.choose(draft(())), target(())
    return (x,) if draw.choose(p) == x else (draw.choose(p),)


def typical(draw, target, draft, epsilon=0.09, delta=0.3):
    p, x = np.array(target(())), draw.choose(draft(()))
    entropy = -sum(a * np.log(a) for a in p if a > 0)
    return (x,) if p[x] > min(epsilon, delta * np.exp(-entropy)) else (draw.choose(p.tolist()),)


def target_not_renewed_between_siblings(draw, target, draft):
    """llama.cpp's example: a sibling is tried by the target's probability as it was before the others were rejected."""
    p, q = list(target(())), draft(())
    left = p
    for x in draw_siblings(draw, q, 2, replacement=True):
        if draw.accept(ratio(p[x], q[x])):
            return (x,)
        left = normalised(excess(left, q)) if sum(excess(left, q)) > 0 else left
    return (draw.choose(left),)


def equal_siblings_counted_twice(draw, target, draft):
    """Target-only on siblings that were drawn: the probability of a token drawn twice is added twice."""
    p, q = target(()), draft(())
    drawn = draw_siblings(draw, q, 2, replacement=True)
    reach, before = 0, 0
    for x in drawn:
        reach = min(reach + p[x], 1)
        if before < 1 and draw.accept((reach - before) / (1 - before)):
            return (x,)
        before = reach
    return (sampled_or(draw, [0 if v in drawn else p[v] for v in range(len(p))], p),)


def greedy_whatever_the_temperature(draw, target, draft):
    """A back end without a kernel for sampling: the argmax is compared and emitted."""
    p = list(target(()))
    return (p.index(max(p)),)


def constant_threshold(draw, target, draft, threshold=0.3):
    """TensorRT-LLM's option: accepted when the target's probability is above a constant."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    return (x,) if p[x] > threshold else (sampled_or(draw, excess(p, q), p),)


def synthetic_rate(draw, target, draft, rate=0.7):
    """vLLM's option for benchmarks: accepted at a given rate, whatever the probabilities."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    return (x,) if draw.accept(rate) else (sampled_or(draw, excess(p, q), p),)


def last_token_of_another_law(draw, target, draft):
    """The token behind the last draft goes through other processors than the rows before it: here a top-2 of its own."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if not draw.accept(ratio(p[x], q[x])):
        return (sampled_or(draw, excess(p, q), p),)
    end = list(target((x,)))
    kept = sorted(range(len(end)), key=lambda v: -end[v])[:2]
    return (x, draw.choose([w if v in kept else 0 for v, w in enumerate(end)]))


def processors_blind_to_drafts(draw, target, draft):
    """Penalties that count only what is committed: every row is processed as the first one is."""
    p, q = target(()), draft(())
    x = draw.choose(q)
    if not draw.accept(ratio(p[x], q[x])):
        return (sampled_or(draw, excess(p, q), p),)
    return (x, draw.choose(p))


MISTAKES = {
    siblings_sorted_after_sampling: 0.02,
    draft_law_not_renewed: 0.01,
    target_only_with(threshold_acc=0.9): 0.01,
    target_only_with(threshold_single=0.3): 0.1,
    dropped_for_its_own_probability: 0.01,
    unfiltered_draft_law: 0.01,
    own_target_draw_per_path: 0.02,
    residual_by_place: 0.1,
    draft_noise_in_the_residual: 0.02,
    block_up_to_the_first_failure: 0.005,
    mismatch_drawn_anew: 0.02,
    typical: 0.1,
    target_not_renewed_between_siblings: 0.01,
    equal_siblings_counted_twice: 0.01,
    greedy_whatever_the_temperature: 0.1,
    constant_threshold: 0.05,
    synthetic_rate: 0.1,
    last_token_of_another_law: 0.01,
    processors_blind_to_drafts: 0.1,
}
