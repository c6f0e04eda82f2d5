"""Verification of speculative drafts."""

import numpy as np

from .rows import ROW_BAD_ID, ROW_NAN, ROW_OK, row_status, softmax

DOMAIN_ACCEPT, DOMAIN_RESIDUAL, DOMAIN_BONUS = 1, 2, 3


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011; Random123): four random words of a counter and a key."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF)
        k = (k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF)
    return c


def uniform(seed: int, position: int, domain: int, node: int = 0) -> float:
    """A float64 in (0, 1): 52 random bits and a half, so that neither end is ever reached."""
    position &= 2**64 - 1
    words = philox4x32((position & 0xFFFFFFFF, position >> 32, domain, node), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[1] << 32 | words[0]) >> 12) * 2.0**-52 + 2.0**-53


def sample(weights: np.ndarray, u: float) -> int:
    """The first index whose cumulated weight exceeds u times the total; never one of weight 0."""
    cumulated = np.cumsum(weights)
    above = np.flatnonzero(cumulated > u * cumulated[-1])
    return int(above[0]) if len(above) else int(np.flatnonzero(weights)[-1])


def resample(p: np.ndarray, q: np.ndarray, u: float) -> int:
    """A token of (p - q)+, after a draft token was rejected; of p where that is all zero."""
    residual = np.maximum(p - q, 0)
    return sample(residual if residual.sum() > 0 else p, u)


def accepts(p: float, q: float, u: float) -> bool:
    """Strictly, so that p = 0 is never accepted and q = 0 < p always is."""
    return u * q < p


def verify_request(
    logits: np.ndarray, draft: np.ndarray, draft_probs: np.ndarray | None, temperature: float, uniforms: np.ndarray
) -> tuple[list[int], int]:
    """Tokens and status of one request: logits [K + 1, V], draft [K], draft_probs [K, V] or None (one-hot).

    uniforms [K + 2, K + 1]: row i accepts draft i, row K draws from the residual and row K + 1 from the last
    distribution; the column is the index of the token that is drawn. temperature 0 is greedy.
    """
    k, vocab = len(draft), logits.shape[1]
    ends = np.flatnonzero(draft == -1)
    length = int(ends[0]) if len(ends) else k
    if ((draft[:length] < 0) | (draft[:length] >= vocab)).any():
        return [], ROW_BAD_ID
    tokens: list[int] = []
    for i in range(length + 1):
        status = row_status(logits[i])
        if status:
            return [], status
        if temperature == 0:
            tokens.append(int(logits[i].argmax()))
            if i == length or tokens[i] != draft[i]:
                break
            continue
        p = softmax(logits[i], temperature)
        if i == length:
            tokens.append(sample(p, uniforms[k + 1, i]))
            break
        x = int(draft[i])
        q = np.eye(1, vocab, x)[0] if draft_probs is None else draft_probs[i].astype(np.float64)
        if not 0 <= q[x] < np.inf:
            return [], ROW_NAN
        if accepts(p[x], q[x], uniforms[i, i]):
            tokens.append(x)
            continue
        if not ((q >= 0) & (q < np.inf)).all():
            return [], ROW_NAN
        tokens.append(resample(p, q, uniforms[k, i]))
        break
    return tokens, ROW_OK


def verify_chain(
    logits: np.ndarray,
    draft_token_ids: np.ndarray,
    cu_num_draft_tokens: np.ndarray,
    draft_probs: np.ndarray | None,
    rule: str,
    temperature: np.ndarray,
    seed: np.ndarray,
    position: np.ndarray,
    uniforms: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output tokens int32 [B, max K + 1], accepted int32 [B], status int32 [B]: assay.h's rules, in float64."""
    cu = cu_num_draft_tokens.astype(np.int64)
    batch = len(cu) - 1
    out = np.full((batch, int(np.diff(cu).max(initial=0)) + 1), -1, np.int32)
    accepted = np.zeros(batch, np.int32)
    status = np.zeros(batch, np.int32)
    for b in range(batch):
        first, last = int(cu[b]), int(cu[b + 1])
        k = last - first
        if uniforms is not None:
            u = np.repeat(uniforms[first + 2 * b : last + 2 * b + 2, None], k + 1, axis=1)
        else:
            domains = [DOMAIN_ACCEPT] * k + [DOMAIN_RESIDUAL, DOMAIN_BONUS]
            at = [int(position[b]) + i for i in range(k + 1)]
            u = np.array([[uniform(int(seed[b]), p, domain) for p in at] for domain in domains])
        tokens, status[b] = verify_request(
            logits[first + b : last + b + 1],
            draft_token_ids[first:last],
            None if draft_probs is None else draft_probs[first:last],
            0.0 if rule == "greedy" else float(temperature[b]),
            u,
        )
        out[b, : len(tokens)] = tokens
        accepted[b] = max(len(tokens) - 1, 0)
    return out, accepted, status
