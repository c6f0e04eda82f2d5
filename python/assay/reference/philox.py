"""Random numbers: Philox4x32-10, keyed by what a number is for."""

DOMAIN_DRAFT, DOMAIN_ACCEPT, DOMAIN_RESIDUAL, DOMAIN_BONUS, DOMAIN_NOISE = range(5)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011; Random123): four random words of a counter and a key."""
    c, k = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = (b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF)
        k = (k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF)
    return c


def _pair(seed: int, position: int, domain: int, node: int) -> tuple[float, float]:
    position &= 2**64 - 1
    words = philox4x32((position & 0xFFFFFFFF, position >> 32, domain, node), (seed & 0xFFFFFFFF, seed >> 32))
    low, high = words[1] << 32 | words[0], words[3] << 32 | words[2]
    return (low >> 12) * 2.0**-52 + 2.0**-53, (high >> 12) * 2.0**-52 + 2.0**-53


def uniform(seed: int, position: int, domain: int, node: int = 0) -> float:
    """A float64 in (0, 1): 52 random bits and a half, so that neither end is ever reached."""
    return _pair(seed, position, domain, node)[0]


def noise(seed: int, position: int, token: int) -> float:
    """A token's uniform number in the exponential race of keyed Gumbel sampling."""
    return _pair(seed, position, DOMAIN_NOISE, token // 2)[token % 2]
