"""llama.cpp's outputs, our profile and pytest-benchmark's: the same points and runs from each."""

import json

import numpy as np
import pytest

from assay.errors import FormatError
from assay.importers import read_tables
from assay.importers.text import read_runs
from assay.profile import save
from synthetic import synthetic_profile

PERF = """Backend 1/2: CUDA0
  Device description: NVIDIA L40S
  MUL_MAT(type_a=q4_0,type_b=f32,m=4096,n=1,k=14336,bs=[1,1],nr=[1,1],per=[0,1,2,3],v=0): \x1b[1;32m852 runs -  1173.71 us/run - 117.44 MFLOP/run - \x1b[1;34m100.06 GFLOPS\x1b[0m
  MUL_MAT(type_a=f16,type_b=f32,m=16,n=8,k=256,bs=[1,1],nr=[2,1],per=[0,1,2,3],v=0):   100 runs -    55.00 us/run - 117.44 MFLOP/run
  ADD(type=f32,ne=[1,2,3,4],nr=[1,1,1,1]):   100 runs -    5.00 us/run -   1 kB/run -  1 GB/s
"""
ROW = {
    "model_type": "llama 7B Q4_0",
    "backends": "CUDA",
    "gpu_info": "NVIDIA L40S",
    "n_threads": 8,
    "n_prompt": 512,
    "n_gen": 0,
    "n_depth": 128,
    "avg_ns": 250_000_000,
    "stddev_ns": 1_000_000,
    "avg_ts": 2048.0,
}


def as_csv(row):
    return ",".join(row) + "\n" + ",".join(f'"{v}"' for v in row.values()) + "\n"


def as_sql(row):
    names = ", ".join(row)
    values = ", ".join(f"'{v}'" for v in row.values())
    fields = ",\n".join(f"  {name} TEXT" for name in row)
    return f"CREATE TABLE IF NOT EXISTS llama_bench (\n{fields}\n);\n\nINSERT INTO llama_bench ({names}) VALUES ({values});\n"


def test_backend_ops_becomes_products_of_their_n_rows(tmp_path):
    path = tmp_path / "perf.txt"
    path.write_text(PERF)
    q4, f16 = sorted(read_tables(path), key=lambda t: t.dtype, reverse=True)
    assert (q4.dtype, q4.system) == ("int4_wo", "NVIDIA L40S")
    assert {k: v.tolist() for k, v in q4.sizes.items()} == {"m": [1], "n": [4096], "k": [14336]}
    np.testing.assert_allclose(q4.time_s, [1173.71e-6])
    assert f16.dtype == "float16"


def test_a_broken_perf_line_is_named(tmp_path):
    path = tmp_path / "perf.txt"
    path.write_text(PERF.replace("m=4096", "m=-4"))
    with pytest.raises(FormatError, match="line 3: expected sizes and a time above 0"):
        read_tables(path)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW]),
        json.dumps(ROW) + "\n",
        as_csv(ROW),
        as_sql(ROW),
        "| model | size | params | backend | threads | test | t/s |\n| --- | --- | --- | --- | --- | --- | ---: |\n"
        "| llama 7B Q4_0 | 3.56 GiB | 6.74 B | CUDA | 8 | pp512 @ d128 | 2048.00 ± 8.19 |\n\nbuild: 1 (2)\n",
    ],
    ids=["json", "jsonl", "csv", "sql", "md"],
)
def test_llama_bench_says_the_same_in_every_format(tmp_path, text):
    path = tmp_path / "bench"
    path.write_text(text)
    (run,) = read_runs(path)
    assert (run.model, run.backend, run.threads) == ("llama 7B Q4_0", "CUDA", 8)
    assert (run.prompt, run.generated, run.depth) == (512, 0, 128)
    assert run.seconds == pytest.approx(0.25)
    assert run.tokens_per_s == pytest.approx(2048)
    assert run.deviation_s == pytest.approx(0.001, rel=0.01)
    with pytest.raises(FormatError, match="whole runs"):
        read_tables(path)


@pytest.mark.parametrize("change", [{"avg_ns": 0}, {"avg_ts": -1}, {"avg_ts": "nan"}, {"n_prompt": 0}, {"avg_ns": "x"}])
def test_impossible_runs_are_refused(tmp_path, change):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([ROW | change]))
    with pytest.raises(FormatError, match=r"bench\.json: row 0: expected"):
        read_runs(path)


def test_sql_of_another_kind_is_never_run(tmp_path):
    path = tmp_path / "bench.sql"
    path.write_text(as_sql(ROW) + f"ATTACH DATABASE '{tmp_path / 'x.db'}' AS x;\nCREATE TABLE x.y (z);\n")
    assert len(read_runs(path)) == 1
    assert not (tmp_path / "x.db").exists()


def test_a_profile_gives_its_products(tmp_path):
    path = tmp_path / "p.json"
    profile = synthetic_profile()
    save(profile, path)
    tables = read_tables(path)
    products = [s for s in profile.samples if s.op.endswith("_gemm")]
    assert sum(len(t) for t in tables) == len(products)
    assert {t.system for t in tables} == {profile.machine.cpu}
