"""Number formats that weights and caches are priced in: bits, the arithmetic of their products, formats by role."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from assay.model import ROLES

#: Bits a weight takes with its scales, and the arithmetic of its products. INT4 and INT8: a float16 scale for each 32
#: weights; MXFP4 one 8-bit scale for 32 (OCP Microscaling v1.0), NVFP4 one for 16.
WEIGHTS: Mapping[str, tuple[float, str]] = {
    "bf16": (16.0, "bf16"),
    "fp8": (8.0, "fp8"),
    "int8": (8.5, "int8"),
    "w4a16": (4.5, "bf16"),
    "w4a8": (4.5, "int8"),
    "mxfp4": (4.25, "fp4"),
    "nvfp4": (4.5, "fp4"),
}
ALIASES = {"int4": "w4a8"}  # what the package's INT4 products are unless one asks for 16-bit activations
#: Bytes of an element of the cache; int8 with a float16 scale for each 32.
KV_BYTES: Mapping[str, float] = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0625}
#: The calibrated product of a format on a CPU; it has float16 scales in groups of `GROUP`.
KERNEL: Mapping[str, str] = {"w4a8": "w4a8_gemm", "w4a16": "w4a16_gemm", "int8": "w8a8_gemm"}
GROUP = 32
#: A router decides which experts run: it stays in bf16 at every precision, as all published quantised mixtures keep it.
#: An input embedding of its own is read one row a token, so that quantising it would gain nothing but memory.
BF16_ROLES = ("router", "embedding")
FILE = "file"  # as a model file stores each matrix


def check_kv(kv: str) -> None:
    """Raise ValueError unless ``kv`` is a format of the cache."""
    if kv not in KV_BYTES:
        raise ValueError(f"kv: expected one of {', '.join(KV_BYTES)}, got {kv!r}")


@dataclass(frozen=True)
class Formats:
    """Weight format of all matrices (`WEIGHTS`, or `FILE`), and of roles that differ: ``(("lm_head", "bf16"),)``.

    Routers and input embeddings stay in bf16 unless named.

    Raises
    ------
    ValueError
        A format or role that is not known; roles beside `FILE`.
    """

    weights: str
    by_role: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuses unknown names."""
        for role, fmt in (("weights", self.weights), *self.by_role):
            if fmt not in WEIGHTS and (role, fmt) != ("weights", FILE):
                known = (*WEIGHTS, *ALIASES) if role != "weights" else (*WEIGHTS, *ALIASES, FILE)
                raise ValueError(f"{role}: expected one of {', '.join(known)}, got {fmt!r}")
            if role not in ("weights", *ROLES):
                raise ValueError(f"weights: expected roles of {', '.join(ROLES)}, got {role!r}")
        if self.weights == FILE and self.by_role:
            raise ValueError(f"weights: expected no roles beside {FILE!r}, got {self.by_role[0][0]!r}")

    def of(self, role: str) -> str:
        """Weight format of this role."""
        named = dict(self.by_role).get(role)
        return named or ("bf16" if role in BF16_ROLES and self.weights != FILE else self.weights)


@lru_cache(maxsize=256)
def parse(text: str) -> Formats:
    """ "w4a16", or "w4a16,lm_head=bf16,attention=fp8": the format of all weights and those of roles.

    Raises
    ------
    ValueError
        A format or role that is not known, or a second format without a role.
    """
    first, *rest = [part.strip() for part in text.split(",")]
    named = []
    for part in rest:
        role, equals, fmt = part.partition("=")
        if not equals:
            raise ValueError(f"weights: expected ROLE=FORMAT after the first, got {part!r}")
        named.append((role, ALIASES.get(fmt, fmt)))
    return Formats(ALIASES.get(first, first), tuple(named))
