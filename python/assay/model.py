"""What a decoder-only transformer is made of: its matrices, its attention, its experts.

Pure data, no files. `assay.formats` fills it from a ``config.json`` or a GGUF file, `assay.catalog` from a name.

Conventions
-----------
- A `Matrix` is used once per token per layer, ``C[M,N] = A[M,K] @ W[N,K].T``. With role "expert" it is *one* expert's
  matrix; `Experts.num_experts` multiplies it.
- The head is always a `Matrix` of role "lm_head". A separate input embedding is a `Matrix` of role "embedding" (a
  look-up that reads one row per token); a tied one has no entry of its own, so that a sum over `matrices` counts
  memory once.
- Norms, biases and attention sinks are not matrices: `vector_params` counts them.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .errors import AssayError

__all__ = ["ROLES", "Attention", "Experts", "Matrix", "ModelSpec", "UnknownModelError", "Vision", "lookup", "slug"]

#: What a matrix is for.
ROLES = ("attention", "ffn", "expert", "shared_expert", "router", "embedding", "lm_head", "other")

# Far above any model that exists, low enough that products of three stay exact in 64-bit integers downstream.
_MAX_DIM = 1 << 24
_MAX_VOCAB = 1 << 28
_MAX_LAYERS = 1 << 16
_MAX_CONTEXT = 1 << 40


class UnknownModelError(AssayError, ValueError):
    """A name that is neither in the catalog nor a file."""


def _require(condition: bool, name: str, wanted: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {wanted}, got {got!r}")


def _require_int(name: str, value: object, low: int, high: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(good, name, f"an integer in {low}..{high}", value)


@dataclass(frozen=True)
class Matrix:
    """One kind of weight matrix.

    Attributes
    ----------
    name : str
        "attn_q", "ffn_gate", "expert_up", "lm_head", ...
    n, k : int
        ``C[M,N] = A[M,K] @ W[N,K].T``.
    count : int
        How many the model has (layers), not multiplied by the number of experts.
    role : str
        One of `ROLES`.
    stored : mapping or None
        For files: how many matrices (experts counted) are stored as each type, ``{"Q4_K": 17, "Q6_K": 1}``.
    stored_bytes : int or None
        For files: bytes of all these matrices (experts counted).
    """

    name: str
    n: int
    k: int
    count: int
    role: str
    stored: Mapping[str, int] | None = field(default=None, hash=False)
    stored_bytes: int | None = None

    @property
    def num_params(self) -> int:
        """Weights of `count` matrices; for role "expert" of one expert in each layer."""
        return self.n * self.k * self.count

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what came."""
        at = f"matrix {self.name}"
        _require(self.role in ROLES, f"{at}: role", f"one of {', '.join(ROLES)}", self.role)
        top = _MAX_VOCAB if self.role in ("embedding", "lm_head") else _MAX_DIM
        _require_int(f"{at}: n", self.n, 1, top)
        _require_int(f"{at}: k", self.k, 1, _MAX_DIM)
        _require_int(f"{at}: count", self.count, 1, _MAX_LAYERS)
        if self.stored_bytes is not None:
            _require(self.stored_bytes > 0, f"{at}: stored_bytes", "a positive integer", self.stored_bytes)


@dataclass(frozen=True)
class Attention:
    """One kind of attention layer.

    Attributes
    ----------
    window : int or None
        Tokens that a sliding-window layer keeps; None for all.
    kv_elements_per_token : int
        Elements of the KV cache per token and layer: ``num_kv_heads * (head_dim + v_head_dim)``, or for "mla" the
        latent and the rotary key, ``kv_lora_rank + rope_dim``.
    kind : str
        "gqa" (multi-head and multi-query included) or "mla".
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None
    kv_elements_per_token: int
    kind: str

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what came."""
        _require(self.kind in ("gqa", "mla"), "attention: kind", "gqa or mla", self.kind)
        _require_int("attention: num_layers", self.num_layers, 1, _MAX_LAYERS)
        for name in ("num_heads", "num_kv_heads", "head_dim", "v_head_dim", "kv_elements_per_token"):
            _require_int(f"attention: {name}", getattr(self, name), 1, _MAX_DIM)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads: expected a divisor of num_heads = {self.num_heads}, got {self.num_kv_heads}"
            )
        if self.window is not None:
            _require_int("attention: window", self.window, 1, _MAX_CONTEXT)


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers.

    Attributes
    ----------
    num_shared : int
        Shared experts per layer, always active; their matrices have role "shared_expert".
    hidden, intermediate : int
        Width in and within one routed expert.
    """

    num_experts: int
    experts_per_token: int
    num_layers: int
    num_shared: int
    hidden: int
    intermediate: int

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what came."""
        _require_int("num_experts", self.num_experts, 1, _MAX_LAYERS)
        _require_int("experts: num_layers", self.num_layers, 1, _MAX_LAYERS)
        _require_int("experts: num_shared", self.num_shared, 0, _MAX_LAYERS)
        _require_int("experts: hidden", self.hidden, 1, _MAX_DIM)
        _require_int("experts: intermediate", self.intermediate, 1, _MAX_DIM)
        good = 1 <= self.experts_per_token <= self.num_experts
        _require(good, "experts_per_token", f"1..num_experts = {self.num_experts}", self.experts_per_token)


@dataclass(frozen=True)
class Vision:
    """How a model sees: the tokens that pixels become, and the tower that makes them.

    Attributes
    ----------
    patch, merge
        Side of a patch in pixels; ``merge x merge`` patches become one token.
    tokens : int or None
        Tokens of every image, whatever its size (it is scaled to one); None where they follow from the size.
    temporal : int
        Frames of a video that are merged into one.
    params : int
        Weights of the tower.
    patches_per_token : int
        Patches behind a token where ``tokens`` is fixed.
    """

    patch: int
    merge: int
    tokens: int | None
    temporal: int
    params: int
    patches_per_token: int = 1

    def validate(self) -> None:
        """Raises ValueError naming the field, what was expected and what came."""
        for name in ("patch", "merge", "temporal", "patches_per_token"):
            _require_int(f"vision: {name}", getattr(self, name), 1, 1 << 16)
        if self.tokens is not None:
            _require_int("vision: tokens", self.tokens, 1, 1 << 20)
        _require_int("vision: params", self.params, 0, 1 << 50)


@dataclass(frozen=True)
class ModelSpec:
    """A model's shape.

    Attributes
    ----------
    source : str
        Where the numbers come from.
    attention : tuple of Attention
        One entry per kind of layer (sliding, global).
    tied_embedding : bool
        The head is the input embedding: stored once, and present once in `matrices`.
    vector_params : int
        Norms, biases, sinks outside the experts.
    expert_vector_params : int
        Biases of one expert over all expert layers.
    vector_bytes : int or None
        For files: bytes of everything that is not a matrix.
    vision : Vision or None
        For models that see; its weights are not among ``matrices``.
    """

    name: str
    source: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    matrices: tuple[Matrix, ...]
    attention: tuple[Attention, ...]
    experts: Experts | None
    tied_embedding: bool
    max_context: int | None
    vector_params: int = 0
    expert_vector_params: int = 0
    vector_bytes: int | None = None
    vision: Vision | None = None

    # ---- counts ----------------------------------------------------------------------------------------------

    def copies(self, matrix: Matrix) -> int:
        """How many of `matrix` are stored: layers, times the experts for role "expert"."""
        return matrix.count * (self.experts.num_experts if matrix.role == "expert" and self.experts else 1)

    @property
    def expert_params(self) -> int:
        """Parameters of all routed experts."""
        if self.experts is None:
            return 0
        one = sum(m.num_params for m in self.matrices if m.role == "expert") + self.expert_vector_params
        return one * self.experts.num_experts

    @property
    def num_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        rest = sum(m.num_params for m in self.matrices if m.role != "expert")
        return rest + self.vector_params + self.expert_params

    @property
    def active_params_per_token(self) -> int:
        """Parameters but those of the experts that a token does not visit.

        The usual way to count: the input embedding counts whole, although a token reads one row of it.
        """
        if self.experts is None:
            return self.num_params
        idle = self.experts.num_experts - self.experts.experts_per_token
        return self.num_params - self.expert_params // self.experts.num_experts * idle

    @property
    def expert_share(self) -> float:
        """Routed experts' share of all parameters, 0 for a dense model."""
        return self.expert_params / self.num_params

    @property
    def kv_elements_per_token(self) -> int:
        """KV-cache elements that one more token adds over all layers, windows not yet full."""
        return sum(a.num_layers * a.kv_elements_per_token for a in self.attention)

    @property
    def kv_elements_by_window(self) -> dict[int | None, int]:
        """`kv_elements_per_token` by kind of layer: the window's length, None for global layers."""
        found: dict[int | None, int] = {}
        for a in self.attention:
            found[a.window] = found.get(a.window, 0) + a.num_layers * a.kv_elements_per_token
        return found

    def kv_elements(self, context: int) -> int:
        """KV-cache elements of a sequence of `context` tokens, sliding windows capped."""
        _require_int("context", context, 0, _MAX_CONTEXT)
        return sum(
            a.num_layers * a.kv_elements_per_token * (context if a.window is None else min(context, a.window))
            for a in self.attention
        )

    def weight_bytes(self, bits: float | Mapping[str, float], vector_bits: float = 16.0) -> float:
        """Bytes of all weights.

        Parameters
        ----------
        bits
            Bits per weight, scales included (4.5 for INT4 with an f16 scale per 32), for all matrices or by role; a
            role that the mapping lacks takes its "default".
        vector_bits
            Bits per norm or bias element.
        """
        total = 0.0
        for m in self.matrices:
            if isinstance(bits, Mapping):
                if m.role not in bits and "default" not in bits:
                    raise ValueError(f"bits: expected an entry for role {m.role!r} or 'default', got {sorted(bits)}")
                each = bits[m.role] if m.role in bits else bits["default"]
            else:
                each = bits
            total += m.n * m.k * self.copies(m) * each / 8
        num_experts = self.experts.num_experts if self.experts else 0
        return total + (self.vector_params + self.expert_vector_params * num_experts) * vector_bits / 8

    @property
    def stored_weight_bytes(self) -> int | None:
        """Bytes of all weights as the file stores them; None when the model is not from a file."""
        sizes = [m.stored_bytes for m in self.matrices]
        if self.vector_bytes is None or None in sizes:
            return None
        return sum(s for s in sizes if s is not None) + self.vector_bytes

    # ---- checks ----------------------------------------------------------------------------------------------

    def validate(self) -> "ModelSpec":
        """Returns itself, or raises ValueError naming the field, what was expected and what came."""
        _require(bool(self.name), "name", "a non-empty string", self.name)
        _require_int("num_layers", self.num_layers, 1, _MAX_LAYERS)
        _require_int("hidden_size", self.hidden_size, 1, _MAX_DIM)
        _require_int("vocab_size", self.vocab_size, 1, _MAX_VOCAB)
        if self.max_context is not None:
            _require_int("max_context", self.max_context, 1, _MAX_CONTEXT)
        _require_int("vector_params", self.vector_params, 0, 1 << 62)
        _require_int("expert_vector_params", self.expert_vector_params, 0, 1 << 62)
        for m in self.matrices:
            m.validate()
            layered = m.role not in ("embedding", "lm_head", "other")
            _require(not layered or m.count <= self.num_layers, f"matrix {m.name}: count",
                     f"at most num_layers = {self.num_layers}", m.count)  # fmt: skip
        for a in self.attention:
            a.validate()
        if self.vision is not None:
            self.vision.validate()
        layers = sum(a.num_layers for a in self.attention)
        _require(layers == self.num_layers, "attention", f"{self.num_layers} layers in all", layers)
        heads = [m for m in self.matrices if m.role == "lm_head"]
        embeddings = sum(m.role == "embedding" for m in self.matrices)
        _require(len(heads) == 1, "matrices", "one lm_head", len(heads))
        _require(heads[0].n == self.vocab_size, "lm_head: n", f"vocab_size = {self.vocab_size}", heads[0].n)
        _require(heads[0].k == self.hidden_size, "lm_head: k", f"hidden_size = {self.hidden_size}", heads[0].k)
        wanted = 0 if self.tied_embedding else 1
        _require(embeddings == wanted, "matrices",
                 f"{wanted} of role embedding, as tied_embedding is {self.tied_embedding}", embeddings)  # fmt: skip
        expert_matrices = [m for m in self.matrices if m.role == "expert"]
        if self.experts is None:
            _require(not expert_matrices, "experts", "a description, as there are expert matrices", None)
        else:
            self.experts.validate()
            _require(bool(expert_matrices), "matrices", "expert matrices, as experts is given", 0)
            _require(self.experts.num_layers <= self.num_layers, "experts: num_layers",
                     f"at most num_layers = {self.num_layers}", self.experts.num_layers)  # fmt: skip
        return self


# ---- names ----------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """A name as the catalog spells it: lower case, no owner, "-" between words.

    ``"Org/Llama_3.1 8B"`` is ``"llama-3.1-8b"``.
    """
    last = text.strip().rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9.]+", "-", last.casefold()).strip("-")


def lookup(text: str, names: Mapping[str, str], what: str = "model", note: str = "") -> str:
    """The canonical name of `text` in `names` (slug of a name or alias -> canonical name).

    Raises
    ------
    UnknownModelError
        With the nearest names and the list of all.
    """
    found = names.get(slug(text))
    if found is not None:
        return found
    near = dict.fromkeys(names[n] for n in difflib.get_close_matches(slug(text), list(names), n=3, cutoff=0.6))
    hint = f"; did you mean {' or '.join(near)}" if near else ""
    shown = text if len(text) <= 100 else text[:100] + "..."
    known = ", ".join(dict.fromkeys(names.values()))
    raise UnknownModelError(f"unknown {what} {shown!r}{note}{hint}; known: {known}")
