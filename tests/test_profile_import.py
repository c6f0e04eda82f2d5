"""``assay profile import``: files of several programs to one profile of a device, and what is priced from it."""

import json

import numpy as np
import pytest

from assay.catalog import load_model as catalog_model
from assay.cost import tabled
from assay.cost.device import fit_device
from assay.cost.stored import load_model
from assay.cost.transformer import step_cost
from assay.errors import FormatError, ProfileError
from assay.foreign import StoredTable
from assay.imported import datasheet_of, profile_of
from assay.profile import load, save
from synthetic import synthetic_profile
from tables import gemm_table, gemm_time

RUN = {
    "model_type": "llama 8B Q8_0", "backends": "CUDA", "gpu_info": "NVIDIA H200", "n_threads": 8, "n_prompt": 0, "n_gen": 128,
    "n_depth": 0, "avg_ns": 1_000_000_000, "stddev_ns": 1_000_000, "avg_ts": 128.0, "model_n_params": 8030261312,
    "model_size": 8.53e9,
}  # fmt: skip


def as_parquet(table, path):
    """An AIConfigurator file of an invented table."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    n = len(table)
    text = {"framework": "VLLM", "version": "1.0", "device": table.system, "op_name": "gemm", "kernel_source": "a",
            "gemm_dtype": table.dtype}  # fmt: skip
    columns = {name: [value] * n for name, value in text.items()}
    columns |= {name: values.astype(int) for name, values in table.sizes.items()} | {"latency": table.time_s * 1e3}
    pq.write_table(pa.table(columns), path)
    return path


def as_backend_ops(table, path, device="NVIDIA H200", kind="f16"):
    """Output of `test-backend-ops perf` of an invented table."""
    rows = zip(*(table.sizes[name].astype(int) for name in ("m", "n", "k")), table.time_s, strict=True)
    lines = [f"  MUL_MAT(type_a={kind},type_b=f32,m={n},n={m},k={k},bs=[1,1],nr=[1,1]): 10 runs - {t * 1e6} us/run -"
             for m, n, k, t in rows]  # fmt: skip
    path.write_text("\n".join(["Backend 1/1: CUDA0", f"  Device description: {device}", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A profile of products in text form (fp8 has none there) and of one whole run."""
    folder = tmp_path_factory.mktemp("imported")
    runs = folder / "bench.json"
    runs.write_text(json.dumps([RUN]))
    profile = profile_of([as_backend_ops(gemm_table(sides=5), folder / "perf.txt"), runs])
    save(profile, folder / "p.json")
    return folder / "p.json"


def test_a_stored_fit_predicts_as_the_fit_did(imported):
    (stored,) = load(imported).tables
    table, device = stored.table, datasheet_of("NVIDIA H200")
    fresh = fit_device(table, device).predict(table, few=True)
    kept = tabled.fit_from_json(stored.fit, table, "$").predict(table, few=True)
    np.testing.assert_allclose(kept.time_s, fresh.time_s, rtol=1e-12)
    np.testing.assert_allclose(kept.high_s, fresh.high_s, rtol=1e-12)
    assert stored.accuracy["n"] > 50
    assert stored.accuracy["median_ape"] < 0.05
    assert stored.accuracy["source"] == "held-out shapes"


def test_products_are_priced_by_the_table_and_the_rest_by_ceilings(imported):
    cost = load_model(load(imported))
    step = step_cost(catalog_model("llama-3.1-8b"), "bf16", 8, 500, cost, 1)
    for call in step.calls:
        assert (call.basis, call.op) == (
            ("roof", "attention") if call.op == "attention" else ("measured", "gemm float16")
        )
        assert call.low_s <= call.time_s <= call.high_s
        assert call.memory_s + call.compute_s + call.overhead_s == pytest.approx(call.time_s)
    down = next(c for c in step.calls if c.name == "ffn_down")
    assert down.time_s / down.count == pytest.approx(gemm_time(8, 4096, 14336), rel=0.1)
    assert any("outside the imported points" in note and "lm_head" in note for note in step.extrapolated)
    other = step_cost(catalog_model("llama-3.1-8b"), "fp8", 8, 500, cost, 1)
    assert {c.basis for c in other.calls} == {"roof"}


def attention_table(op, sizes, time_s, dtype="bfloat16"):
    from assay.tables import KernelTable

    grid = np.meshgrid(*sizes.values(), indexing="ij")
    columns = {name: values.ravel().astype(float) for name, values in zip(sizes, grid, strict=True)}
    return KernelTable(op, dtype, "NVIDIA H200", "test 1", "k", columns, time_s(columns))


def test_experts_and_attention_are_priced_by_their_tables():
    heads = {"heads": [32.0], "kv_heads": [4, 8], "head_dim": [128.0], "window": [0.0]}
    decode = attention_table(
        "generation_attention", {"batch": [1, 4, 16], "kv_len": [128, 512, 2048, 8192]} | heads,
        lambda s: 5e-6 + s["batch"] * s["kv_len"] * s["kv_heads"] * 512.0 / 3e12,
    )  # fmt: skip
    experts = attention_table(
        "moe",
        {"tokens": [1, 2, 4, 8, 16, 64, 256], "hidden": [2048, 4096], "inter": [7168, 14336], "top_k": [2], "num_experts": [8],
         "tp": [1], "ep": [1], "alpha": [0], "matrices": [3]},
        lambda s: 2e-5 + 6.0 * s["hidden"] * s["inter"] * np.minimum(8, 2 * s["tokens"]) / 3e12,
    )  # fmt: skip
    device = datasheet_of("NVIDIA H200")
    profile = synthetic_profile()
    profile.samples, profile.fits, profile.accuracy = [], {}, {}
    profile.tables = list(tabled.fit_tables([decode, experts], device))
    cost = load_model(profile)
    step = step_cost(catalog_model("mixtral-8x7b"), "bf16", 4, 511, cost, 2)
    found = {c.op: c for c in step.calls}
    layer = found["moe bfloat16"]
    assert layer.time_s / layer.count == pytest.approx(2e-5 + 6 * 4096 * 14336 * 8 / 3e12, rel=0.1)
    attention = found["generation_attention bfloat16"]
    assert attention.time_s / attention.count == pytest.approx(5e-6 + 4 * 512 * 8 * 512 / 3e12, rel=0.1)
    assert (layer.basis, attention.basis, found["bf16 products"].basis) == ("measured", "measured", "roof")
    # Latent attention is no kernel of these tables.
    latent = step_cost(catalog_model("deepseek-v3"), "bf16", 4, 511, cost, 2)
    assert all(c.basis == "roof" for c in latent.calls if c.name == "attention")


def test_the_commands_show_what_was_imported(imported, run):
    status, out, _ = run("profile", "show", imported, "-o", "json")
    summary = json.loads(out)
    assert status == 0
    assert [(t["op"], t["dtype"], t["fitted"]) for t in summary["tables"]] == [("gemm", "float16", True)]
    assert summary["runs"][0]["tokens_per_s"] == 128.0
    status, out, _ = run("profile", "show", imported)
    assert status == 0
    assert "llama 8B Q8_0" in out
    assert "float16" in out
    status, out, _ = run("predict", "llama-3.1-8b", "--profile", imported, "--precision", "bf16,int8", "-o", "json")
    assert status == 0
    answer = json.loads(out)
    (whole,) = answer["runs"]
    assert whole["precision"] == "int8"  # 8.5 bits a weight
    alone = [r for r in answer["rows"] if (r["precision"], r["batch"]) == ("int8", 1)]
    assert whole["predicted_tokens_per_s"] == pytest.approx(alone[0]["tokens_per_s"], rel=0.05)
    assert any("measured 128 tokens/s, predicted" in note for note in answer["notes"])
    assert any("priced on the published ceilings" in note for note in answer["notes"])
    assert (
        json.loads(run("predict", "llama-3.1-8b", "--profile", imported, "-o", "json")[1])["rows"][0]["precision"]
        == "bf16"
    )
    assert json.loads(run("predict", "gemma-3-1b", "--profile", imported, "-o", "json")[1])["runs"] == []


def test_plan_prices_its_products_by_the_table(imported):
    from assay.cost.draws import Draws
    from assay.cost.machines import Calibrated

    machine = Calibrated("h200", load_model(load(imported)), 1)
    one = np.ones(1)
    part = machine.product("bf16", one * 8, 4096, 14336, one, 2, Draws(0))
    assert part.time_s[0] == pytest.approx(2 * gemm_time(8, 4096, 14336), rel=0.1)
    # A pass that needs less than one row still runs the product.
    assert machine.product("bf16", one * 0.05, 4096, 14336, one, 1, Draws(0)).time_s[0] > 0


def test_every_format_at_once(tmp_path, run):
    parquet = as_parquet(gemm_table(sides=4, dtype="fp8"), tmp_path / "t.parquet")
    text = as_backend_ops(gemm_table(sides=4), tmp_path / "perf.txt", device="CUDA-like", kind="q4_0")
    runs = tmp_path / "bench.json"
    runs.write_text(json.dumps([RUN]))
    refused = run("profile", "import", parquet, text, runs, "-o", tmp_path / "p.json")
    assert refused[0] != 0
    assert not (tmp_path / "p.json").exists()
    status, out, err = run("profile", "import", parquet, text, runs, "--device", "h200-sxm", "-o", tmp_path / "p.json")
    assert (status, err) == (0, "")
    assert "NVIDIA H200" in out
    profile = load(tmp_path / "p.json")
    assert sorted(t.dtype for t in profile.tables) == ["fp8", "int4_wo"]
    assert len(profile.runs) == 1
    assert profile.settings["mode"] == "imported"
    # Imported again with more, what was there stays.
    more = as_backend_ops(gemm_table(sides=4, seed=1), tmp_path / "more.txt")
    again = profile_of([tmp_path / "p.json", more])
    assert sorted(t.dtype for t in again.tables) == ["float16", "fp8", "int4_wo"]
    assert again.runs == profile.runs


def test_runs_join_a_calibration_of_the_same_machine(tmp_path):
    own = synthetic_profile()
    save(own, tmp_path / "own.json")
    runs = tmp_path / "bench.json"
    runs.write_text(json.dumps([RUN | {"gpu_info": "", "cpu_info": own.machine.cpu}]))
    profile = profile_of([tmp_path / "own.json", runs])
    assert [r.device for r in profile.runs] == [own.machine.cpu]
    assert profile.samples == own.samples
    runs.write_text(json.dumps([RUN]))
    with pytest.raises(FormatError, match=r"device: expected .*, which the other files are of, got 'NVIDIA H200'"):
        profile_of([tmp_path / "own.json", runs])
    with pytest.raises(FormatError, match="expected one calibration or pytest-benchmark file, got a second"):
        profile_of([tmp_path / "own.json", tmp_path / "own.json"])


def test_a_device_that_nobody_knows_is_refused(tmp_path):
    text = as_backend_ops(gemm_table(sides=4), tmp_path / "perf.txt", device="Foo 9000")
    with pytest.raises(
        FormatError, match=r"device: expected one of .*h200-sxm.*, got 'Foo 9000'; `--device NAME` says"
    ):
        profile_of([text])
    with pytest.raises(FormatError, match=r"--device: expected one of .*, got 'foo'"):
        profile_of([text], "foo")
    other = as_backend_ops(gemm_table(sides=4), tmp_path / "other.txt", device="NVIDIA L40S")
    with pytest.raises(FormatError, match=r"device: expected NVIDIA H200 SXM, .*, got 'NVIDIA L40S'"):
        profile_of([text, other], "h200-sxm")


def test_few_points_are_kept_and_not_fitted(tmp_path):
    table = gemm_table(sides=2)
    few = table.take(np.arange(10))
    profile = profile_of([as_backend_ops(few, tmp_path / "perf.txt")])
    assert [(t.points, t.fit, t.accuracy) for t in profile.tables] == [(10, None, None)]
    step = step_cost(catalog_model("llama-3.1-8b"), "bf16", 1, 100, load_model(profile), 1)
    assert {c.basis for c in step.calls} == {"roof"}


@pytest.mark.parametrize("content", [b"\x00\xff", b"", b"hello\n", b"PAR1 and no more", b"[1, 2]", b"{}"])
def test_what_is_none_of_them_is_refused(tmp_path, content):
    if content.startswith(b"PAR1"):
        pytest.importorskip("pyarrow")
    path = tmp_path / "x"
    path.write_bytes(content)
    with pytest.raises((FormatError, ProfileError), match="expected"):
        profile_of([path])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(points=0), r"tables\[0\]\.points: expected an integer of at least 1"),
        (lambda t: t.update(points=7), r"tables\[0\]\.columns\.\w+: expected 56 bytes"),
        (lambda t: t["columns"].update(m="!"), r"tables\[0\]\.columns\.m: expected base64"),
        (lambda t: t["columns"].update(m="AAAA"), r"tables\[0\]\.columns\.m: expected base64"),
        (lambda t: t["columns"].pop("k"), r"tables\[0\]\.sizes: expected m, n, k"),
        (lambda t: t["columns"].pop("time_s"), r"tables\[0\]\.columns\.time_s"),
        (lambda t: t.update(op="sort"), r"tables\[0\]\.op: expected one of gemm"),
        (lambda t: t["fit"].update(p=0), r"tables\[0\]\.fit: .*p: expected a finite number above 0"),
        (lambda t: t["fit"].update(scale=[1.0]), r"tables\[0\]\.fit: .*scale: expected 22 finite numbers"),
        (lambda t: t["fit"].update(law=99), r"tables\[0\]\.fit: .*expected 1, got 99"),
        (lambda t: t["fit"].pop("score"), r"tables\[0\]\.fit: .*score"),
        (lambda t: t.update(extra=1), r"tables\[0\]\.extra: expected only"),
    ],
)
def test_broken_tables_are_refused(imported, tmp_path, change, words):
    data = json.loads(imported.read_text())
    change(data["tables"][0])
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))

    def use():
        profile = load(path)
        stored: StoredTable = profile.tables[0]
        tabled.fit_from_json(stored.fit, stored.table, stored.path)

    with pytest.raises(ProfileError, match=words):
        use()


@pytest.mark.parametrize(
    ("key", "value"), [("tokens_per_s", 0), ("threads", 0), ("generated", 0), ("seconds", "x"), ("more", 1)]
)
def test_broken_runs_are_refused(imported, tmp_path, key, value):
    data = json.loads(imported.read_text())
    data["runs"][0][key] = value
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ProfileError, match=r"\$\.runs\[0\]\.\w+: expected"):
        load(path)
