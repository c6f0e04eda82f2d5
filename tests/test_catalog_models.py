"""The catalog: every model counts what its makers publish, rows have source and date, text resolves to models."""

import json
import re
from importlib.resources import files

import pytest

from assay.catalog import list_models, load_model, resolve_model
from assay.errors import FormatError
from assay.model import UnknownModelError

# Total parameters as published (Hugging Face's safetensors metadata or model cards; keras-hub presets for Phi-3 and
# Gemma-3-1B), then billions of total and active, expert share and KV KiB per token in bf16 as surveys print them.
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 8.03, 8.03, 0.0, 128),
    "llama-3.1-70b": (70_553_706_496, 70.55, 70.55, 0.0, 320),
    "llama-3.1-405b": (405_853_388_800, 405.85, 405.85, 0.0, 504),
    "mistral-large-2": (122_610_069_504, 122.6, 122.6, 0.0, 352),
    "phi-3-mini": (3_821_079_552, 3.82, 3.82, 0.0, 384),
    "mixtral-8x7b": (46_702_792_704, 46.7, 12.9, 0.966, 128),
    "mixtral-8x22b": (140_620_634_112, 140.6, 39.2, 0.962, 224),
    "qwen3-30b-a3b": (30_532_122_624, 30.5, 3.35, 0.950, 96),
    "deepseek-v3": (671_026_419_200, 671.0, 37.6, None, 68.6),
    "gpt-oss-120b": (116_829_156_672, 116.8, 5.7, 0.982, 72),
    "gpt-oss-20b": (20_914_757_184, 20.9, 4.2, 0.914, 48),
    "olmoe-1b-7b": (6_919_161_856, 6.92, 1.28, 0.931, 128),
    "gemma-3-270m": (268_098_176, 0.268, 0.268, 0.0, 18),
    "gemma-3-1b": (999_885_952, 1.000, 1.000, 0.0, 26),
    "gemma-3-27b": (None, 27.0, 27.0, 0.0, 496),
    "qwen2.5-vl-7b": (7_615_616_512, 7.6, 7.6, 0.0, 56),
}


@pytest.mark.parametrize("name", list_models())
def test_counts_what_is_published(name):
    params, total_b, active_b, share, kv_kib = PUBLISHED[name]
    spec = load_model(name)
    if params is not None:
        assert spec.num_params == params

    def shown(value: float, like: float) -> float:
        return round(value, len(str(like).partition(".")[2]))

    assert shown(spec.num_params / 1e9, total_b) == total_b
    assert shown(spec.active_params_per_token / 1e9, active_b) == active_b
    if share is not None:
        assert round(spec.expert_share, 3) == share
    assert shown(2 * spec.kv_elements_per_token / 1024, kv_kib) == kv_kib


def test_all_published_are_there():
    assert set(list_models()) == set(PUBLISHED)


def test_active_without_embedding_of_gpt_oss():
    # OpenAI's model card counts 5.13 and 3.61 billion active, the head in, the embedding out
    for name, billions in (("gpt-oss-120b", 5.13), ("gpt-oss-20b", 3.61)):
        spec = load_model(name)
        embedding = sum(m.num_params for m in spec.matrices if m.role == "embedding")
        assert round((spec.active_params_per_token - embedding) / 1e9, 2) == billions


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("gemma-3-270m", {512: 15, None: 3}),
        ("gemma-3-1b", {512: 22, None: 4}),
        ("gemma-3-27b", {1024: 52, None: 10}),
        ("gpt-oss-20b", {128: 12, None: 12}),
        ("gpt-oss-120b", {128: 18, None: 18}),
        ("mixtral-8x7b", {None: 32}),
    ],
)
def test_sliding_layers(name, windows):
    assert {a.window: a.num_layers for a in load_model(name).attention} == windows


def test_deepseek_shape():
    spec = load_model("deepseek-v3")
    assert spec.experts is not None
    assert (spec.experts.num_layers, spec.experts.num_shared, spec.experts.num_experts) == (58, 1, 256)
    assert spec.attention[0].kind == "mla"
    assert spec.attention[0].kv_elements_per_token == 512 + 64
    shapes = {m.name: (m.n, m.k, m.count) for m in spec.matrices}
    assert shapes["attn_q_b"] == (128 * 192, 1536, 61)
    assert shapes["attn_kv_b"] == (128 * 256, 512, 61)
    assert shapes["ffn_down"] == (7168, 18432, 3)
    assert shapes["shared_down"] == (7168, 2048, 58)


def test_rows_have_source_and_date():
    data = json.loads(files("assay.catalog").joinpath("models.json").read_text())
    assert (data["schema"], data["schema_version"]) == ("assay-models", 1)
    for row in data["models"]:
        assert len(row["source"]) > 20, row["name"]
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", row["date"]), row["name"]
        assert load_model(row["title"]).name == row["title"]
        for alias in row["aliases"]:
            assert load_model(alias) == load_model(row["name"])


@pytest.mark.parametrize("text", ["mixtral-8x7b", "Mixtral", "mistralai/Mixtral-8x7B-v0.1", "MIXTRAL_8x7B"])
def test_resolves_names(text):
    assert resolve_model(text) == load_model("mixtral-8x7b")


def test_unknown_name_suggests():
    with pytest.raises(
        UnknownModelError, match="unknown model 'mixtral-8x8b', and there is no such file; did you mean mi"
    ):
        resolve_model("mixtral-8x8b")


@pytest.mark.parametrize("text", ["", "/nowhere/x.gguf", "\0", "x" * 5000, "~nobody-here/x"])
def test_unknown_text(text):
    with pytest.raises(UnknownModelError):
        resolve_model(text)


def test_resolves_files_by_content(tmp_path, monkeypatch):
    row = next(r for r in json.loads(files("assay.catalog").joinpath("models.json").read_text())["models"]
               if r["name"] == "olmoe-1b-7b")  # fmt: skip
    folder = tmp_path / "OLMoE"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text("\n " + json.dumps(row["config"]))
    assert resolve_model(path).matrices == load_model("olmoe-1b-7b").matrices
    assert resolve_model(str(folder)).name == "OLMoE"
    monkeypatch.chdir(tmp_path)
    assert resolve_model("./OLMoE").name == "OLMoE"
    assert resolve_model("olmoe").name == "OLMoE-1B-7B-0924"  # the catalog comes first
    with pytest.raises(FormatError, match=r"folder with a config\.json"):
        resolve_model(tmp_path)
    (tmp_path / "junk.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError, match="starts with b'PK"):
        resolve_model(tmp_path / "junk.gguf")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(FormatError, match="starts with b''"):
        resolve_model(tmp_path / "empty")


def test_resolves_the_real_file(gemma_gguf):
    spec, twin = resolve_model(gemma_gguf), load_model("gemma-3-270m")
    assert spec.num_params == twin.num_params
    assert sorted((m.name, m.n, m.k, m.count, m.role) for m in spec.matrices) == sorted(
        (m.name, m.n, m.k, m.count, m.role) for m in twin.matrices
    )
    assert spec.attention == twin.attention
    assert spec.vector_params == twin.vector_params
