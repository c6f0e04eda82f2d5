"""ModelSpec: what it counts, what it refuses, and how names are found."""

from dataclasses import replace

import pytest

from assay.model import Attention, Experts, Matrix, ModelSpec, UnknownModelError, lookup, slug


def tiny(**changes) -> ModelSpec:
    spec = ModelSpec(
        name="tiny",
        source="test",
        num_layers=3,
        hidden_size=8,
        vocab_size=50,
        matrices=(
            Matrix("attn_q", 8, 8, 3, "attention"),
            Matrix("attn_output", 8, 8, 3, "attention"),
            Matrix("router", 4, 8, 3, "router"),
            Matrix("expert_up", 16, 8, 3, "expert"),
            Matrix("expert_down", 8, 16, 3, "expert"),
            Matrix("token_embd", 50, 8, 1, "embedding"),
            Matrix("lm_head", 50, 8, 1, "lm_head"),
        ),
        attention=(
            Attention(2, 4, 2, 2, 2, 10, 8, "gqa"),
            Attention(1, 4, 2, 2, 2, None, 8, "gqa"),
        ),
        experts=Experts(4, 2, 3, 0, 8, 16),
        tied_embedding=False,
        max_context=128,
        vector_params=7,
        expert_vector_params=5,
    )
    return replace(spec, **changes)


def test_counts_by_hand():
    s = tiny().validate()
    one_expert = 3 * (16 * 8 + 8 * 16) + 5
    dense = 3 * (64 + 64 + 32) + 2 * 400 + 7
    assert s.expert_params == 4 * one_expert
    assert s.num_params == dense + 4 * one_expert
    assert s.active_params_per_token == dense + 2 * one_expert
    assert s.expert_share == 4 * one_expert / (dense + 4 * one_expert)
    assert [s.copies(m) for m in s.matrices] == [3, 3, 3, 12, 12, 1, 1]


def test_kv_elements_and_windows():
    s = tiny()
    assert s.kv_elements_per_token == 24
    assert s.kv_elements_by_window == {10: 16, None: 8}
    assert s.kv_elements(4) == 4 * 24
    assert s.kv_elements(100) == 10 * 16 + 100 * 8
    assert s.kv_elements(0) == 0
    with pytest.raises(ValueError, match="context: expected an integer"):
        s.kv_elements(-1)


def test_weight_bytes_by_role():
    s = tiny()
    experts, head = 4 * 3 * 256, 400
    rest = s.num_params - 7 - 20 - experts - head
    assert s.weight_bytes(16) == 2 * s.num_params
    assert s.weight_bytes({"expert": 4, "lm_head": 8, "default": 16}, vector_bits=32) == pytest.approx(
        experts / 2 + head + 2 * rest + 4 * 27
    )
    with pytest.raises(ValueError, match="bits: expected an entry for role 'attention'"):
        s.weight_bytes({"expert": 4})
    assert s.stored_weight_bytes is None


def test_tied_embedding_counts_once():
    s = tiny()
    tied = replace(s, tied_embedding=True, matrices=tuple(m for m in s.matrices if m.role != "embedding"))
    assert tied.validate().num_params == s.num_params - 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 0}, "num_layers: expected an integer in 1..65536, got 0"),
        ({"hidden_size": -1}, "hidden_size: expected an integer"),
        ({"hidden_size": 8.0}, "hidden_size: expected an integer"),
        ({"vocab_size": 0}, "vocab_size: expected an integer"),
        ({"vocab_size": 51}, "lm_head: n: expected vocab_size = 51, got 50"),
        ({"hidden_size": 9}, "lm_head: k: expected hidden_size = 9, got 8"),
        ({"max_context": 0}, "max_context"),
        ({"name": ""}, "name: expected a non-empty string"),
        ({"attention": ()}, "attention: expected 3 layers in all, got 0"),
        ({"attention": (Attention(3, 4, 3, 2, 2, None, 8, "gqa"),)}, "num_kv_heads: expected a divisor of num_heads = 4"),
        ({"attention": (Attention(3, 4, 2, 2, 2, None, 8, "?"),)}, "kind: expected gqa or mla"),
        ({"attention": (Attention(3, 4, 2, 2, 2, 0, 8, "gqa"),)}, "window"),
        ({"experts": Experts(4, 5, 3, 0, 8, 16)}, "experts_per_token: expected 1..num_experts = 4, got 5"),
        ({"experts": Experts(4, 0, 3, 0, 8, 16)}, "experts_per_token"),
        ({"experts": Experts(4, 2, 4, 0, 8, 16)}, "experts: num_layers"),
        ({"experts": None}, "experts: expected a description"),
        ({"tied_embedding": True}, "0 of role embedding"),
        ({"matrices": (Matrix("lm_head", 50, 8, 1, "lm_head"),), "tied_embedding": True}, "expert matrices"),
        ({"matrices": ()}, "one lm_head"),
        ({"matrices": (Matrix("x", 0, 8, 1, "ffn"),)}, "matrix x: n"),
        ({"matrices": (Matrix("x", 8, True, 1, "ffn"),)}, "matrix x: k"),
        ({"matrices": (Matrix("x", 8, 8, 4, "ffn"),)}, "matrix x: count"),
        ({"matrices": (Matrix("x", 8, 8, 1, "head"),)}, "matrix x: role"),
        ({"vector_params": -1}, "vector_params"),
    ],
)  # fmt: skip
def test_refuses(changes, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace("?", r"\?")):
        tiny(**changes).validate()


def test_slug():
    assert slug("meta-llama/Llama_3.1 8B") == "llama-3.1-8b"
    assert slug("  Mixtral-8x7B ") == "mixtral-8x7b"


def test_lookup():
    names = {"mixtral-8x7b": "mixtral-8x7b", "mixtral": "mixtral-8x7b", "olmoe": "olmoe-1b-7b"}
    assert lookup("mistralai/Mixtral", names) == "mixtral-8x7b"
    with pytest.raises(
        UnknownModelError, match="unknown model 'mixtrl'; did you mean mixtral-8x7b; known: mixtral-8x7b, "
    ):
        lookup("mixtrl", names)
    with pytest.raises(UnknownModelError) as caught:
        lookup("q" * 10_000, names)
    assert "did you mean" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_hashable_and_frozen():
    assert hash(Matrix("a", 1, 1, 1, "ffn", {"Q4_K": 1}, 5)) == hash(Matrix("a", 1, 1, 1, "ffn", {"Q4_K": 1}, 5))
    with pytest.raises(AttributeError):
        tiny().name = "other"
