"""The device model and its scores: the true law of an invented device is found again, off the points it saw."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from assay.catalog import find_device, list_devices
from assay.catalog.lint import check_device
from assay.cli import main
from assay.cost import kriging
from assay.cost.device import Device, fit_device, timer_step, transferred, unknown_device
from assay.cost.energy import fit_power
from assay.cost.validation import kernel_classes, plans, score, summary
from assay.cost.workload import distinct_experts, work_of
from assay.errors import FormatError
from assay.tables import KernelTable
from tables import BYTES_PER_S, OPS_PER_S, columns, gemm_table, gemm_time

H200 = Device("h200", 4.8e12, 989e12, 132)
TABLE = gemm_table()
MODEL = fit_device(TABLE, H200)


def calls(m, n, k):
    m, n, k = (np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in (m, n, k))
    m, n, k = np.broadcast_arrays(m, n, k)
    sizes = {"m": m.copy(), "n": n.copy(), "k": k.copy()}
    return KernelTable("gemm", "bfloat16", "NVIDIA H200", "test 1", "gemm", sizes, np.ones(m.shape))


def test_unseen_shapes_are_predicted_within_a_few_percent():
    rng = np.random.default_rng(3)
    n, k = (np.round(np.exp(rng.uniform(np.log(400), np.log(12000), 60)) / 64) * 64 for _ in range(2))
    for m in (1, 16, 64, 256, 4096):
        asked = calls(np.full(60, m), n, k)
        error = MODEL.predict(asked).time_s / gemm_time(asked.sizes["m"], n, k) - 1
        assert np.median(np.abs(error)) < 0.05, m


def test_the_law_is_physical_and_extrapolates():
    assert MODEL.law.bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.15)
    assert MODEL.law.ops_per_s == pytest.approx(OPS_PER_S, rel=0.15)
    far = calls(1, 65536 * 4, 65536)
    prediction = MODEL.predict(far)
    assert prediction.outside.all()
    assert prediction.time_s == pytest.approx(gemm_time(1.0, 65536.0 * 4, 65536.0), rel=0.15)
    near = MODEL.predict(calls(16, 4096, 4096))
    assert not near.outside.any()
    assert (near.high_s / near.low_s < prediction.high_s / prediction.low_s).all()


def test_predictions_do_not_depend_on_their_company():
    rng = np.random.default_rng(0)
    asked = calls(*(np.ceil(np.exp(rng.uniform(0, np.log(high), 150))) for high in (4096, 16384, 16384)))
    together = MODEL.predict(asked)
    alone = [MODEL.predict(asked.take(np.array([i]))) for i in range(150)]
    # Sums over 128 neighbours are rounded in single precision, in an order that a matrix product may choose: 128 eps each.
    np.testing.assert_allclose(together.time_s, [p.time_s[0] for p in alone], rtol=2e-5)
    np.testing.assert_allclose(together.high_s, [p.high_s[0] for p in alone], rtol=1e-3)


@pytest.mark.parametrize("hold_out", ["shapes", "points"])
def test_scores_beat_the_roofline_and_intervals_cover(hold_out):
    ((_, parts, why),) = score([TABLE], lambda _: H200, hold_out=hold_out, yardstick=False)
    assert why == ""
    row = summary(parts)[0]
    assert row["regime"] == "all"
    assert row["median_ape"] < 0.03 < row["baseline_median_ape"]
    assert abs(row["bias"]) < 0.01
    assert 0.8 < row["coverage"] <= 1.0
    assert sum(r["n"] for r in summary(parts) if r["regime"] != "all") == row["n"]


def table_of_few_shapes(seed):
    """Seven shapes, each off the law by a cause of its own that no coordinate tells: 8% in standard deviation."""
    rng = np.random.default_rng(seed)
    n, k = (np.round(np.exp(rng.uniform(np.log(512), np.log(12000), 7)) / 64) * 64 for _ in range(2))
    own = 0.08 * rng.standard_normal(7)
    m, i = np.tile([1.0, 2, 3, 4, 6, 8, 12, 16, 32, 64], 7), np.repeat(np.arange(7), 10)
    time_s = gemm_time(m, n[i], k[i]) * np.exp(own[i] + 0.02 * rng.standard_normal(70))
    return KernelTable("gemm", "bfloat16", "x", "test 1", "gemm", {"m": m, "n": n[i], "k": k[i]}, time_s)


def test_intervals_of_a_small_table_are_not_set_on_points_that_chose_the_scales():
    coverage = []
    for seed in range(3):
        ((_, parts, _),) = score([table_of_few_shapes(seed)], unknown_device, yardstick=False, seed=seed)
        coverage.append(summary(parts)[0]["coverage"])
    assert np.mean(coverage) > 0.76


def test_held_out_shapes_are_whole():
    ((_, parts, _),) = score([TABLE], lambda _: H200, hold_out="shapes", yardstick=False)
    shapes = {(a, b) for p in parts for a, b in zip(p.table.sizes["n"], p.table.sizes["k"], strict=True)}
    for a, b in shapes:
        whole = ((TABLE.sizes["n"] == a) & (TABLE.sizes["k"] == b)).sum()
        assert sum(((p.table.sizes["n"] == a) & (p.table.sizes["k"] == b)).sum() for p in parts) == whole


def test_the_regressor_is_scored_beside():
    pytest.importorskip("sklearn")
    ((_, parts, _),) = score([TABLE], lambda _: H200)
    assert 0 < summary(parts)[0]["regressor_median_ape"] < 1


def test_a_device_known_by_its_datasheet_gets_wide_intervals():
    slow = Device("half", 2.4e12, 494.5e12, 132)
    there = replace(TABLE, system="half", time_s=2 * TABLE.time_s)
    sheets = {"NVIDIA H200": H200, "half": slow}
    results = list(score([TABLE, there], sheets.__getitem__, hold_out="systems"))
    rows = summary([p for _, parts, _ in results for p in parts])
    assert {r["system"] for r in rows} == set(sheets)
    for row in rows:
        if row["regime"] == "compute":
            assert row["median_ape"] < 0.1  # the overhead of a call does not shrink with the device
        if row["regime"] == "all":
            assert row["coverage"] > 0.95
    with pytest.raises(ValueError, match="expected two with datasheets"):
        transferred(MODEL, unknown_device("x"), 2.0)


def test_systems_without_a_second_one_are_said_not_to_be_scored():
    ((_, parts, why),) = score([TABLE], lambda _: H200, hold_out="systems")
    assert not parts
    assert why == "no other system has gemm bfloat16"
    ((_, parts, why),) = score([TABLE], unknown_device, hold_out="systems")
    assert why == "no datasheet of NVIDIA H200"


def test_power_is_found_again():
    table = gemm_table(power=True)
    model = fit_device(table, H200)
    power = fit_power(table, model)
    energy = power.predict(table)
    assert np.median(np.abs(energy.power_w / table.power_w - 1)) < 0.02
    joules = table.power_w * table.time_s
    assert np.median(np.abs(energy.joules / joules - 1)) < 0.03
    assert np.mean((energy.low_j <= joules) & (joules <= energy.high_j)) > 0.85
    assert power.idle_w == pytest.approx(120, rel=0.1)
    with pytest.raises(ValueError, match="a table without them"):
        fit_power(TABLE, MODEL)


def test_small_variants_are_fitted_together():
    rows = np.arange(len(TABLE))
    cuts = (("a", 0, 300), ("b", 300, 330), ("c", 330, 365))
    parts = [replace(TABLE.take((rows >= low) & (rows < high)), variant=name) for name, low, high in cuts]
    assert [(t.variant, len(t)) for t in kernel_classes(parts)] == [("a", 300), ("b + c", 65)]


def test_a_few_points_are_an_error_and_not_a_guess():
    few = TABLE.take(np.arange(19))
    with pytest.raises(ValueError, match="expected at least 20 of gemm bfloat16, got 19"):
        fit_device(few, H200)
    ((_, parts, why),) = score([few], lambda _: H200)
    assert not parts
    assert "too few" in why


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_s": np.zeros(2)}, "time_s: expected finite values above 0, got 0 and the like in 2 of 2 rows"),
        ({"op": "conv"}, "op: expected one of"),
        ({"power_w": np.array([1.0, np.nan])}, "power_w: expected finite values above 0"),
        ({"power_w": np.array([1.0])}, r"power_w: expected shape \(2,\)"),
    ],
)
def test_tables_check_their_values(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TABLE.take(np.arange(2)), **change)


def test_kriging_returns_its_points_and_grows_unsure_away_from_them():
    x = np.linspace(0, 1, 60)[:, None]
    field = kriging.Kriging(x, np.sin(6 * x[:, 0]), np.zeros(60), np.array([2.0]), 1e-9)
    mean, variance = field.predict(x)
    np.testing.assert_allclose(mean, np.sin(6 * x[:, 0]), atol=1e-5)
    between, far = field.predict(np.array([[0.505], [9.0]]))[1]
    assert variance.max() < 1e-5 < between < far


def ordinary_kriging(field, x):
    """Cressie 1993, equations 3.2.12 to 3.2.15, over all points, in double precision."""

    def covariance(a, b):
        return np.exp(-np.linalg.norm((a[:, None] - b[None]) * field.scale, axis=2))

    inside = covariance(field.features, field.features)
    inside[np.diag_indices(len(inside))] = 1.0 + field.nugget + field.noise
    inverse, to_query = np.linalg.inv(inside), covariance(x, field.features)
    mean = (inverse @ field.residual).sum() / inverse.sum()
    predicted = mean + to_query @ inverse @ (field.residual - mean)
    lagrange = (1.0 - to_query @ inverse.sum(axis=1)) ** 2 / inverse.sum()
    return predicted, 1.0 - np.einsum("ij,jk,ik->i", to_query, inverse, to_query) + lagrange + field.nugget


def invented_field(points, nugget=0.004):
    rng = np.random.default_rng(points)
    x = rng.uniform(0, 3, (points, 4))
    x[:, 3] = np.round(x[:, 3])
    y = np.sin(x[:, 0]) + 0.3 * x[:, 1] * x[:, 2] + 0.2 * x[:, 3]
    return kriging.Kriging(x, y, rng.uniform(0, 0.1, points), np.array([0.7, 0.4, 0.0, 0.5]), nugget)


@pytest.mark.parametrize("points", [1, 2, 24, 25, 100, 128])
def test_kriging_of_few_points_is_the_textbooks(points):
    field = invented_field(points)
    x = np.random.default_rng(7).uniform(-1, 5, (300, 4))
    mean, variance = ordinary_kriging(field, x)
    found, spread = field.predict(x)
    np.testing.assert_allclose(found, mean, atol=1e-4)
    np.testing.assert_allclose(spread, variance, atol=1e-4)
    assert (spread >= field.nugget).all()


def test_neighbourhoods_stand_in_for_all_points():
    field = invented_field(1500)
    x = np.random.default_rng(8).uniform(0, 3, (400, 4))
    x[:, 3] = np.round(x[:, 3])
    mean, variance = ordinary_kriging(field, x)
    found, spread = field.predict(x)
    sure = np.sqrt(variance)
    assert np.median(np.abs(found - mean) / sure) < 0.03
    assert np.quantile(np.abs(found - mean) / sure, 0.99) < 0.3
    assert (np.abs(np.log(spread / variance)) < 0.1).mean() > 0.98


def test_points_that_agree_in_every_coordinate_are_one_cell():
    x = np.concatenate([np.zeros((200, 2)), np.ones((1, 2))])
    field = kriging.Kriging(x, np.concatenate([np.full(200, 0.5), [0.1]]), np.zeros(201), np.ones(2), 0.01)
    mean, variance = field.predict(np.array([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0]]))
    assert mean[0] == pytest.approx(0.5, abs=1e-3)
    assert mean[1] == pytest.approx(0.1, abs=0.05)
    assert np.isfinite(variance).all()
    assert variance[2] > 1.0


def test_a_disturbed_point_does_not_move_its_neighbours():
    x = np.linspace(0, 1, 60)[:, None]
    values = np.sin(6 * x[:, 0])
    spoiled = values.copy()
    spoiled[30] += 0.7  # a call that took twice as long
    asked = np.array([[(x[30, 0] + x[31, 0]) / 2]])
    true = np.sin(6 * asked[0, 0])
    off = {}
    for caution in (np.inf, 2.0):
        field = kriging.Kriging(x, spoiled, np.zeros(60), np.array([2.0]), 0.01, sigma=0.1, caution=caution)
        off[caution] = abs(field.predict(asked)[0][0] - true)
    assert off[2.0] < 0.02 < off[np.inf]
    # Without such a point, caution changes nothing.
    clean = kriging.Kriging(x, values, np.zeros(60), np.array([2.0]), 0.01, sigma=0.1)
    bold, careful = clean.predict(asked)[0], replace(clean, caution=2.0).predict(asked)[0]
    np.testing.assert_allclose(bold, careful, atol=0.002)


def test_leave_one_out_residuals_are_those_of_kriging_without_the_point():
    rng = np.random.default_rng(0)
    x, values = rng.uniform(0, 1, (12, 2)), rng.normal(size=12)
    covariance = kriging._covariance(x[None], np.zeros((1, 12)), 0.1)
    left, precision = kriging._left_out(covariance, values[None])
    for i in range(12):
        rest = np.arange(12) != i
        field = kriging.Kriging(x[rest], values[rest], np.zeros(11), np.ones(2), 0.1)
        mean, variance = field.from_points(np.arange(11)[None], x[i][None])
        assert left[0, i] == pytest.approx(values[i] - mean[0], abs=1e-9)
        assert 1 / precision[0, i] == pytest.approx(variance[0], rel=1e-9)


def test_ungated_experts_read_two_matrices_of_three():
    gated, plain = (KernelTable("moe", "bfloat16", "a", "test 1", "x", moe(matrices=n), np.ones(1)) for n in (3, 2))
    assert work_of(plain, 132).ops[0] == pytest.approx(work_of(gated, 132).ops[0] * 2 / 3)
    weights = 2 * 2 * 64 * 32 * 2.0  # two experts touched, two matrices each, bf16
    rows = 2.0 * 2 * (2 * 64 + 2 * 32)  # in and out of each matrix
    assert work_of(plain, 132).bytes[0] == pytest.approx(weights + rows)


def test_scales_switch_off_what_does_not_matter():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (600, 2))
    found = kriging.fit(
        x,
        np.sin(5 * x[:, 0]),
        group=np.arange(600),
        scale=np.ones(2),
        noise=np.zeros(600),
        rng=np.random.default_rng(1),
    )
    assert found.scale[1] < 0.5 * found.scale[0]


def test_a_coarse_clock_is_noticed():
    times = np.round(gemm_table(noise=0).time_s / 1.024e-6) * 1.024e-6
    coarse = np.concatenate([times[times < 4e-4]] * 12)
    assert timer_step(coarse) == pytest.approx(1.024e-6, rel=0.01)
    assert timer_step(TABLE.time_s) == 0.0


def moe(**sizes):
    base = {"tokens": 1, "hidden": 64, "inter": 32, "top_k": 2, "num_experts": 16, "tp": 1, "ep": 1, "alpha": 0,
            "matrices": 3} | sizes  # fmt: skip
    arrays = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, dtype=np.float64)) for v in base.values()))
    return dict(zip(base, (a.copy() for a in arrays), strict=True))


def test_experts_touched_stay_within_their_bounds():
    tokens = np.array([1, 2, 8, 64, 4096])
    for alpha in (0, 1.01, 1.2):
        for ep in (1, 4):
            touched = distinct_experts(moe(tokens=tokens, alpha=alpha, ep=ep))
            assert (np.diff(touched) >= -1e-12).all()
            assert (touched <= np.minimum(16 / ep, np.maximum(tokens * 2 / ep, 1)) + 1e-9).all()
    assert distinct_experts(moe(tokens=4, alpha=1.2))[0] < distinct_experts(moe(tokens=4))[0]


def test_causal_windows_count_the_pairs_that_are_seen():
    def pairs(isl, past, window):
        return sum(min(past + i, window or past + i) for i in range(1, isl + 1))

    for isl, past, window in ((1, 0, 0), (7, 0, 0), (7, 5, 0), (7, 0, 3), (7, 5, 3), (7, 5, 8), (7, 5, 100)):
        sizes = {"batch": 1, "isl": isl, "past": past, "heads": 1, "kv_heads": 1, "head_dim": 1, "window": window}
        arrays = {k: np.array([float(v)]) for k, v in sizes.items()}
        table = KernelTable("context_attention", "bfloat16", "x", "y", "z", arrays, np.ones(1))
        assert work_of(table, 1).ops[0] == 4 * pairs(isl, past, window), (isl, past, window)


def test_the_hardware_catalog_is_sane():
    for row in list_devices():
        assert check_device(row) == [], row["name"]
    assert find_device("NVIDIA A100-SXM4-80GB")["name"] == "a100-80gb-sxm"
    assert find_device("NVIDIA H100 80GB HBM3")["name"] == "h100-sxm"
    for other in ("NVIDIA GB200", "NVIDIA A1000", "NVIDIA H20", "Radeon"):
        assert find_device(other) is None, other


def write_table(path, rows=400):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    table = gemm_table(sides=7)
    head = {
        k: v[0]
        for k, v in columns(1).items()
        if k in ("framework", "version", "device", "op_name", "kernel_source", "gemm_dtype")
    }
    rows = len(table)
    data = {k: [v] * rows for k, v in head.items()} | {k: v.tolist() for k, v in table.sizes.items()}
    pq.write_table(pa.table(data | {"latency": (table.time_s * 1e3).tolist()}), path)
    return path


def test_the_command_prints_rows_a_verdict_and_the_next_command(tmp_path, capsys):
    path = write_table(tmp_path / "t.parquet")
    assert main(["validate", str(path), "--no-regressor"]) == 0
    out = capsys.readouterr().out
    assert "median error" in out
    assert "worst median error" in out
    assert "Next: assay validate" in out
    assert main(["validate", str(path), "--no-regressor", "--hold-out", "points", "-o", "json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["schema"] == "assay-validation"
    assert {"op", "dtype", "regime", "n", "median_ape", "p90_ape", "bias", "coverage", "baseline_median_ape"} <= set(
        data["rows"][0]
    )
    assert main(["validate", str(path), "--no-regressor", "--hold-out", "all", "-o", "md"]) == 0
    out = capsys.readouterr().out
    assert "Held out: shapes" in out
    assert "Held out: systems" not in out  # one system has no other to be predicted from


def test_all_holds_out_what_each_op_is_judged_by():
    twin = replace(TABLE, system="other")
    experts = KernelTable("moe", "bfloat16", "a", "test 1", "x", moe(), np.ones(1))
    assert plans([TABLE], "all") == [("shapes", [TABLE])]
    found = plans([TABLE, twin, experts], "all")
    assert [(what, [t.op for t in some]) for what, some in found] == [
        ("shapes", ["gemm", "gemm"]),
        ("points", ["moe"]),
        ("models", ["moe"]),
        ("systems", ["gemm", "gemm"]),
    ]
    assert plans([TABLE], "points") == [("points", [TABLE])]


def test_the_command_refuses_what_it_cannot_read(tmp_path, capsys):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1 not really")
    assert main(["validate", str(path)]) == 2
    assert "x.parquet: expected a Parquet file" in capsys.readouterr().err


def test_real_tables_reach_their_targets():
    """Median errors on held-out shapes of whatever tables are there; the project ships none."""
    folder = os.environ.get("ASSAY_VALIDATION_TABLES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("no folder of tables in ASSAY_VALIDATION_TABLES")
    from assay.importers import read_tables

    found = []
    for path in sorted(Path(folder).glob("*.generation_attention.*.parquet")):
        try:
            found += read_tables(path)
        except FormatError as error:  # a table of another tool's, with its reason
            print(error)
    if not found:
        pytest.skip(f"no *.generation_attention.*.parquet in {folder}")
    smallest = min(kernel_classes(found), key=len)
    device = find_device(smallest.system)
    sheet = (
        Device(device["name"], device["memory_bytes_per_s"], device["ops_per_s"], device["multiprocessors"])
        if device
        else unknown_device(smallest.system)
    )
    ((_, parts, why),) = score([smallest], lambda _: sheet, yardstick=False)
    assert parts, why
    row = summary(parts)[0]
    assert row["median_ape"] < 0.03
    assert row["median_ape"] < row["baseline_median_ape"]
    assert 0.8 < row["coverage"] < 0.98
