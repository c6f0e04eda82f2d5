"""AIConfigurator's tables: read into the same form, broken ones refused with the file, the column and the rows."""

import numpy as np
import pytest

from assay.errors import FormatError
from assay.importers import read_tables
from assay.importers.aiconfigurator import read_columns
from tables import columns

pa = pytest.importorskip("pyarrow")


def write(path, data):
    import pyarrow.parquet as pq

    pq.write_table(pa.table({k: list(v) for k, v in data.items()}), path)
    return path


def test_a_parquet_file_is_read_in_seconds_and_split_by_dtype_and_kernel(tmp_path):
    data = columns()
    data["gemm_dtype"][2:] = "int4_wo"
    data["kernel_source"][3] = "b"
    found = read_tables(write(tmp_path / "t.parquet", data))
    assert [(t.dtype, t.variant, len(t)) for t in found] == [
        ("bfloat16", "a", 2),
        ("int4_wo", "a", 1),
        ("int4_wo", "b", 1),
    ]
    np.testing.assert_allclose(found[0].time_s, data["latency"][:2] * 1e-3)
    np.testing.assert_array_equal(found[0].sizes["m"], [1, 2])
    np.testing.assert_array_equal(found[0].power_w, [100, 100])
    assert (found[0].op, found[0].system, found[0].source) == ("gemm", "NVIDIA H200", "VLLM 1.0")
    assert found[1].format.weight_bytes == pytest.approx(0.5 + 2 / 128)


@pytest.mark.parametrize("column", ["op_name", "gemm_dtype", "m", "n", "k", "latency"])
def test_a_missing_column_is_named(column):
    data = columns()
    del data[column]
    with pytest.raises(FormatError, match=rf"t\.parquet: {column}: expected this column"):
        read_columns(data, "t.parquet")


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0, 0.0])
@pytest.mark.parametrize("column", ["latency", "m"])
def test_impossible_numbers_are_refused_with_their_count(column, value):
    data = columns()
    data[column] = data[column].astype(float)
    data[column][1:3] = value
    with pytest.raises(FormatError, match=rf"t\.parquet: {column}: expected finite numbers.*2 bad of 4 rows"):
        read_columns(data, "t.parquet")


def test_texts_that_are_missing_or_numbers_that_are_texts_are_refused():
    data = columns()
    data["gemm_dtype"][1] = None
    with pytest.raises(FormatError, match="gemm_dtype: expected text, got nothing in 1 of 4 rows"):
        read_columns(data, "t")
    data = columns()
    data["n"] = np.array(["a"] * 4, dtype=object)
    with pytest.raises(FormatError, match="n: expected numbers"):
        read_columns(data, "t")


def test_an_unknown_dtype_is_flagged_and_an_unknown_op_refused():
    data = columns()
    data["gemm_dtype"][:] = "posit8"
    (table,) = read_columns(data, "t")
    assert table.notes == ("posit8: unknown number format, priced as 16 bits",)
    data["op_name"][:] = "softmax"
    with pytest.raises(FormatError, match=r"op_name: expected one of .*, got 'softmax'"):
        read_columns(data, "t")


def test_power_that_was_not_read_is_left_out_and_negative_power_refused():
    data = columns()
    data["power"][:] = 0.0
    assert read_columns(data, "t")[0].power_w is None
    data["power"][0] = -5.0
    with pytest.raises(FormatError, match="power: expected watts, got 1 negative of 4 rows"):
        read_columns(data, "t")


def moe_columns(distribution):
    rows = len(distribution)
    data = {k: v for k, v in columns(rows).items() if k not in ("m", "n", "k", "gemm_dtype")}
    data["op_name"][:] = "moe"
    return data | {
        "moe_dtype": np.array(["fp8"] * rows, dtype=object),
        "num_tokens": np.full(rows, 8),
        "hidden_size": np.full(rows, 64),
        "inter_size": np.full(rows, 32),
        "topk": np.full(rows, 2),
        "num_experts": np.full(rows, 16),
        "moe_tp_size": np.full(rows, 1),
        "moe_ep_size": np.full(rows, 4),
        "distribution": np.array(distribution, dtype=object),
    }


def test_expert_loads_become_exponents():
    (table,) = read_columns(moe_columns(["balanced", "power_law_1.01", "power_law_1.2", "uniform"]), "t")
    np.testing.assert_allclose(table.sizes["alpha"], [0, 1.01, 1.2, 0])
    np.testing.assert_array_equal(table.sizes["matrices"], 3)
    with pytest.raises(FormatError, match="distribution: expected balanced or power_law_EXPONENT, got 'zipf'"):
        read_columns(moe_columns(["zipf"]), "t")
    with pytest.raises(FormatError, match="topk: expected at most num_experts, got more in 1 of 1 rows"):
        read_columns(moe_columns(["balanced"]) | {"topk": np.array([17])}, "t")


@pytest.mark.parametrize(
    ("framework", "version", "matrices"),
    [
        ("VLLM", "0.22.0", 3),
        ("vLLM", "0.24.0", 2),
        ("SGLang", "0.5.10", 3),
        ("SGLang", "0.5.14.post1", 2),
        ("x", "9", 3),
    ],
)
def test_experts_without_a_gate_are_known_where_the_collector_measures_them_so(framework, version, matrices):
    data = moe_columns(["balanced"] * 4)
    shape = {"hidden_size": 2688, "inter_size": 1856, "topk": 6, "num_experts": 128}
    data |= {name: np.full(4, value) for name, value in shape.items()}
    data |= {
        name: np.array([text] * 4, dtype=object) for name, text in {"framework": framework, "version": version}.items()
    }
    data["hidden_size"] = np.array([2688, 2688, 2688, 4096])
    (table,) = read_columns(data, "t")
    np.testing.assert_array_equal(table.sizes["matrices"], [matrices] * 3 + [3])


def test_older_attention_tables_lack_windows():
    data = {k: v for k, v in columns().items() if k not in ("m", "n", "k", "gemm_dtype")}
    data["op_name"][:] = "generation_attention"
    for name, value in (("batch_size", 2), ("isl", 1), ("num_heads", 8), ("num_key_value_heads", 2), ("step", 7)):
        data[name] = np.full(4, value)
    data["attn_dtype"] = np.array(["bfloat16"] * 4, dtype=object)
    (table,) = read_columns(data, "t")
    np.testing.assert_array_equal(table.sizes["kv_len"], [8] * 4)  # the token's own entry is read too
    np.testing.assert_array_equal(table.sizes["window"], [0] * 4)


@pytest.mark.parametrize(
    "content", [b"", b"PAR1", b"PAR1" + bytes(64) + b"PAR1", b"\xff\xfe\x00", b"hello", b"{", b"[1, 2]"]
)
def test_files_that_are_nothing_we_know_are_refused_by_name(tmp_path, content):
    path = tmp_path / "broken"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="broken: "):
        read_tables(path)


def test_folders_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FormatError, match="expected a file, got a folder"):
        read_tables(tmp_path)
    with pytest.raises(FormatError, match="got nothing there"):
        read_tables(tmp_path / "none")
