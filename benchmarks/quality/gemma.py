"""Gemma 3 from a GGUF file, run by transformers, its linear layers replaceable; and the file's tokenizer."""

import heapq
from typing import Any

import numpy as np
import torch
from torch import nn

from assay.formats.gguf import GGUFFile

#: GGUF's names of a layer's matrices, and transformers'.
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NORMS = {
    "attn_norm": "input_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


class Linear(nn.Module):
    """x W^T in float32, the activations quantised on the way in as w4a8 does, where `activations` says so."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.activations: tuple[int, bool] | None = None
        self.gram: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.gram is not None:
            rows = x.reshape(-1, x.shape[-1])
            self.gram += (rows.T @ rows).double()
        if self.activations is not None:
            x = quantized(x, *self.activations)
        return nn.functional.linear(x, self.weight)


def quantized(x: torch.Tensor, group_size: int, power_of_two: bool) -> torch.Tensor:
    """What w4a8 makes of activations: `assay.reference.quantize_activations`, codes times scales.

    With `power_of_two` the scale is the least power of two that is no smaller.
    """
    groups = x.reshape(-1, x.shape[-1] // group_size, group_size)
    amax = groups.abs().amax(-1, keepdim=True)
    live = amax >= 1e-30
    if power_of_two:
        mantissa, exponent = torch.frexp(amax / 127)
        scale = torch.ldexp(torch.ones_like(amax), exponent - (mantissa == 0.5).int())
        codes = torch.round(groups / scale)
    else:
        scale = amax / 127
        codes = torch.round(groups * (127 / amax))
    return torch.where(live, codes * scale, 0.0).reshape(x.shape)


def prefer_fast_products() -> None:
    """Lets torch take oneDNN's float32 product where it is a float32 one: three times MKL's speed on AMD's CPUs.

    The setting permits bfloat16 too, so the result is checked, and the setting undone where it was not float32.
    """
    a, b = torch.randn(64, 640), torch.randn(256, 640)
    exact = a.double() @ b.double().T
    torch.set_float32_matmul_precision("medium")
    if ((a @ b.T - exact).std() / exact.std()).item() > 1e-6:
        torch.set_float32_matmul_precision("highest")


def load(file: GGUFFile) -> Any:
    """transformers' Gemma3ForCausalLM with the file's weights in float32, its layers' matrices as :class:`Linear`."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    meta = {name.removeprefix("gemma3."): value for name, value in file.metadata.items()}
    layers, head_dim = meta["block_count"], meta["attention.key_length"]
    config = Gemma3TextConfig(
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=meta["embedding_length"],
        intermediate_size=meta["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=meta["attention.head_count"],
        num_key_value_heads=meta["attention.head_count_kv"],
        head_dim=head_dim,
        query_pre_attn_scalar=head_dim,
        max_position_embeddings=meta["context_length"],
        rms_norm_eps=meta["attention.layer_norm_rms_epsilon"],
        sliding_window=meta["attention.sliding_window"],
        # Every sixth layer sees everything; the others a window, with a base that the file does not hold.
        layer_types=["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(layers)],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": meta["rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval().requires_grad_(False)

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(file.dequantize(name).reshape(file.tensors[name].shape))

    model.model.embed_tokens.weight.copy_(tensor("token_embd.weight"))
    model.model.norm.weight.copy_(tensor("output_norm.weight") - 1)  # GGUF holds 1 + weight, which transformers adds
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in _NORMS.items():
            layer.get_submodule(theirs).weight.copy_(tensor(f"blk.{i}.{ours}.weight") - 1)
        for ours, theirs in MATRICES.items():
            parent, _, name = theirs.partition(".")
            weight = tensor(f"blk.{i}.{ours}.weight")
            if weight.shape != layer.get_submodule(theirs).weight.shape:
                raise SystemExit(f"blk.{i}.{ours}.weight: unexpected shape {list(weight.shape)}")
            setattr(layer.get_submodule(parent), name, Linear(weight))
    return model


def linears(model: Any) -> dict[str, Linear]:
    """Its matrices by their name in the file."""
    return {
        f"blk.{i}.{ours}.weight": layer.get_submodule(theirs)
        for i, layer in enumerate(model.model.layers)
        for ours, theirs in MATRICES.items()
    }


def dither(model: Any, seed: int = 0) -> None:
    """Adds to every weight of the layers uniform noise as wide as a step of the grid on which its block of 32 lies.

    A file's 5-bit weights lie midway between 4-bit codes as often as on them, which float weights do not.
    """
    rng = np.random.default_rng(seed)
    for linear in linears(model).values():
        blocks = linear.weight.numpy().reshape(-1, 32)
        gaps = np.diff(np.sort(blocks, axis=1), axis=1)
        gaps[gaps < 1e-5 * np.abs(blocks).max(1, keepdims=True)] = np.inf  # equal values, but for rounding
        step = gaps.min(1, keepdims=True)
        noise = rng.uniform(-0.5, 0.5, blocks.shape).astype(np.float32)
        blocks += noise * np.where(np.isfinite(step), step, np.float32(0))


def token_losses(model: Any, tokens: torch.Tensor, chunk: int = 64) -> np.ndarray:
    """Negative log-likelihood in nats of tokens[1:], each given all before it: float64 [len(tokens) - 1]."""
    hidden = model.model(input_ids=tokens[None], use_cache=False).last_hidden_state[0, :-1]
    head = model.model.embed_tokens.weight
    wanted = tokens[1:]
    losses = torch.empty(len(wanted), dtype=torch.float64)
    logits = torch.empty(chunk, len(head))  # one buffer: fresh memory of this size costs as much as the product
    for at in range(0, len(wanted), chunk):
        part = slice(at, at + chunk)
        x = torch.mm(hidden[part], head.T, out=logits[: len(hidden[part])])
        right = x.gather(1, wanted[part, None])[:, 0]
        top = x.amax(1, keepdim=True)
        losses[part] = torch.log(x.sub_(top).exp_().sum(1).double()) + (top[:, 0] - right).double()
    return losses.numpy()


class Tokenizer:
    """SentencePiece BPE of the file: the adjacent pair that makes the piece of highest score is joined first."""

    def __init__(self, file: GGUFFile) -> None:
        pieces = file.metadata["tokenizer.ggml.tokens"].to_list()
        scores = file.metadata["tokenizer.ggml.scores"].to_numpy()
        kinds = file.metadata["tokenizer.ggml.token_type"].to_numpy()
        normal = np.flatnonzero(kinds == 1)
        self._ids = {pieces[i]: int(i) for i in normal}
        self._scores = scores
        self.newline = pieces.index("\n")
        self._byte = pieces.index("<0x00>")
        self.pieces = pieces
        self.bos = file.metadata["tokenizer.ggml.bos_token_id"]

    def encode(self, text: str) -> list[int]:
        """Tokens without BOS; each line end is a token of its own."""
        out: list[int] = []
        for i, line in enumerate(text.split("\n")):
            if i:
                out.append(self.newline)
            out += self._line(line.replace(" ", "\u2581"))
        return out

    def _line(self, line: str) -> list[int]:
        piece = list(line)
        left, right = list(range(-1, len(piece) - 1)), list(range(1, len(piece) + 1))
        heap: list[tuple[float, int, str]] = []

        def offer(a: int) -> None:
            if a >= 0 and right[a] < len(piece):
                both = piece[a] + piece[right[a]]
                found = self._ids.get(both)
                if found is not None:
                    heapq.heappush(heap, (-float(self._scores[found]), a, both))

        for a in range(len(piece)):
            offer(a)
        while heap:
            _, a, both = heapq.heappop(heap)
            b = right[a]
            if not piece[a] or b >= len(piece) or piece[a] + piece[b] != both:
                continue  # one of the two has been joined to something else
            piece[a], piece[b] = both, ""
            right[a] = right[b]
            if right[a] < len(piece):
                left[right[a]] = a
            offer(a)
            offer(left[a])
        out: list[int] = []
        for p in filter(None, piece):
            out += [self._ids[p]] if p in self._ids else [self._byte + b for b in p.encode()]
        return out

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.pieces[t] for t in tokens).replace("\u2581", " ")
