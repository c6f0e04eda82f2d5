"""Comparisons with fake contenders: turns, rows, ties, means, and going on where a run stopped."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import bounds
import comparison
from assay.measure.arena import Ring
from assay.measure.clock import Timer
from comparison import Results, geometric_mean, losses_first, measure, row_of, summary
from peers import roofs
from peers.contender import Cell, Prepared, Weights, product
from peers.worker import Failed, Server, Worker

CELL = Cell.of("w4a8", 2, n=64, k=32, group_size=32, symmetric=True, m=1)
ROOFS = {"dram_read": 1e9, "int8_peak": 1e12}


class Fake:
    """A worker that answers from a list."""

    def __init__(self, name, log, times=(), prepared=(None, 0.001, 0.01)):
        self._name, self._log, self._times, self._prepared = name, log, list(times), prepared
        self._reply = None

    def start(self, method, *arguments):
        if method == "prepare":
            self._reply = self._prepared
        elif method == "roofs":
            self._reply = ROOFS
        else:
            self._reply = self._times.pop(0)
        self._log.append((self._name, method))

    def finish(self):
        if isinstance(self._reply, Exception):
            raise self._reply
        return self._reply

    def ask(self, method, *arguments):
        self.start(method, *arguments)
        return self.finish()


def run(passes=3, **workers):
    log = []
    made = {name: Fake(name, log, **given) for name, given in workers.items()}
    return measure(made, Fake("reader", log), CELL, passes), log


def row(ours, best, **others):
    found, _ = run(len(ours), assay={"times": ours}, best={"times": best}, **others)
    return row_of(CELL, found, lambda cell: {"dram_read": 1000.0, "int8_peak": 2e6})


def test_every_contender_has_a_turn_in_every_pass_and_another_one_begins():
    found, log = run(3, assay={"times": [1, 2, 3]}, a={"times": [4, 5, 6]}, b={"times": [5, 6, 5]})
    assert found.times == {"assay": [1, 2, 3], "a": [4, 5, 6], "b": [5, 6, 5]}
    turns = [name for name, method in log if method in ("visit", "roofs")]
    assert turns == ["reader", "assay", "a", "b", "reader", "a", "b", "assay", "reader", "b", "assay", "a"]


def test_a_wrong_answer_is_never_timed():
    found, log = run(
        2, assay={"times": [1, 1]}, liar={"prepared": (None, 0.5, 0.01)}, nan={"prepared": (None, float("nan"), 0.01)}
    )
    assert found.wrong["liar"] == (0.5, 0.01)
    assert set(found.wrong) == {"liar", "nan"}
    assert ("liar", "visit") not in log
    assert ("nan", "visit") not in log


def test_a_peer_of_long_calls_that_is_far_behind_is_not_visited_again():
    found, _ = run(
        3, assay={"times": [0.2] * 3}, best={"times": [1.0, 1.1, 1.0]}, near={"times": [1.4, 1.4, 1.6]}, far={"times": [1.6]},
        failed={"times": [Failed("its process ended with -9")]},
    )  # fmt: skip
    assert {name: len(taken) for name, taken in found.times.items()} == {"assay": 3, "best": 3, "near": 3, "far": 1}
    made = row_of(CELL, found, lambda cell: {"dram_read": 1000.0})
    assert (made["best_peer"], made["peers"]["far"]) == ("best", pytest.approx(1.6e6))
    found, _ = run(3, assay={"times": [1e-3] * 3}, best={"times": [0.01] * 3}, short={"times": [0.09] * 3})
    assert len(found.times["short"]) == 3


def test_a_few_passes_of_long_calls_are_enough():
    found, log = run(5, assay={"times": [0.2] * 3}, best={"times": [0.3] * 3})
    assert {name: len(taken) for name, taken in found.times.items()} == {"assay": 3, "best": 3}
    assert log.count(("reader", "roofs")) == 3
    found, _ = run(5, assay={"times": [0.05] * 5}, best={"times": [0.3] * 5})
    assert {name: len(taken) for name, taken in found.times.items()} == {"assay": 5, "best": 5}


def test_a_contender_that_fails_midway_is_listed_with_the_reason():
    found, _ = run(3, assay={"times": [1, 1, 1]}, dies={"times": [1, Failed("its process ended with -11")]})
    assert found.absent == {"dies": "its process ended with -11"}
    assert set(found.times) == {"assay"}


def test_a_row_compares_medians_with_the_best_peer():
    made = row([2e-6, 1e-6, 3e-6], [6e-6, 5e-6, 4e-6], slow={"times": [9e-6, 9e-6, 9e-6]})
    assert made["ours_us"] == pytest.approx(2)
    assert made["peers"] == pytest.approx({"best": 5, "slow": 9})
    assert (made["best_peer"], made["verdict"]) == ("best", "win")
    assert made["ratio"] == pytest.approx(2.5)
    assert (made["ratio_low"], made["ratio_high"]) == pytest.approx((4 / 3, 5))
    # 1000 bytes at 1 GB/s take 1 us, 2e6 operations at 1 Top/s take 2 us: compute binds, and ours took 2 us.
    assert made["bound"] == "compute"
    assert made["roof_pct"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("ours", "best", "verdict"),
    [([1, 1, 1], [2, 3, 2], "win"), ([1, 1, 1], [0.9, 1.5, 2], "tie"), ([1, 1, 1], [0.5, 0.9, 0.8], "loss"),
     ([1, 1, 1], [1, 1, 1], "tie")],
)  # fmt: skip
def test_passes_that_disagree_are_a_tie(ours, best, verdict):
    assert row(ours, best)["verdict"] == verdict


def test_without_peers_or_without_ours_there_is_no_ratio():
    alone, _ = run(1, assay={"times": [1e-6]})
    assert row_of(CELL, alone, lambda c: {"dram_read": 1.0})["ratio"] is None
    without, _ = run(1, assay={"prepared": ("does not exist yet", 0, 0)}, a={"times": [1e-6]})
    made = row_of(CELL, without, lambda c: {"dram_read": 1.0})
    assert (made["ours_us"], made["ratio"], made["best_us"]) == (None, None, pytest.approx(1))


def test_the_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert geometric_mean([]) is None


def test_the_summary_counts_by_class_and_losses_come_first():
    rows = [
        {"ratio": r, "verdict": v, "m": m, "roof_pct": 10.0 * m * r if r else None}
        for r, v, m in ((2.0, "win", 1), (0.5, "loss", 4), (1.0, "tie", 4), (None, None, 4))
    ]
    assert [r["ratio"] for r in losses_first(rows)] == [0.5, 1.0, 2.0, None]
    whole, wide = summary(rows, {"all": lambda r: True, "M = 4": lambda r: r["m"] == 4, "none": lambda r: False})
    assert (whole["cells"], whole["win"], whole["tie"], whole["loss"]) == (3, 1, 1, 1)
    assert whole["geometric_mean"] == pytest.approx(1)
    assert (wide["cells"], wide["least"], wide["median"], wide["roof_pct"]) == (2, 0.5, 0.75, 30)


def test_results_go_on_from_their_file(tmp_path):
    path = tmp_path / "rows.json"
    header = {"command": "gemm", "versions": {"a": "1"}}
    first = Results(path, header)
    assert not first.has(CELL)
    first.add(row([1.0], [2.0]))
    assert not list(tmp_path.glob("*.part"))
    again = Results(path, header)
    assert again.has(CELL)
    assert again.rows == json.loads(json.dumps(first.rows))
    assert not again.has(Cell.of("w4a8", 1, **dict(CELL.params)))


@pytest.mark.parametrize("change", [{"versions": {"a": "2"}}, {"command": "moe"}])
def test_results_of_another_comparison_are_not_gone_on_with(tmp_path, change):
    path = tmp_path / "rows.json"
    header = {"command": "gemm", "versions": {"a": "1"}}
    Results(path, header).add(row([1.0], [2.0]))
    with pytest.raises(ValueError, match="expected results of"):
        Results(path, {**header, **change})


@pytest.mark.parametrize("text", ["", "[]", "{}", "not json"])
def test_a_damaged_results_file_is_an_error(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"rows\.json"):
        Results(path, {"command": "gemm", "versions": {}})


def test_an_answer_with_a_nan_has_an_infinite_error():
    assert Prepared([], np.array([1.0, np.nan]), np.ones(2), 0.1).error() == float("inf")
    assert Prepared([], np.array([1.0, 1.1]), np.ones(2), 0.1).error() == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True)])
def test_a_rolled_copy_is_the_same_rows_later(bits, symmetric):
    w = Weights(8, 64, 32, symmetric, bits)
    np.testing.assert_array_equal(w.rolled(3).dequantized(), np.roll(w.dequantized(), 3, 0))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q8_0"])
def test_blocks_stand_for_the_weights(kind):
    from assay.formats.dequant import dequantize_rows
    from peers.ggml import BLOCKS

    w = Weights(4, 512, 32, kind != "Q4_K", 8 if kind == "Q8_0" else 4)
    got = dequantize_rows(BLOCKS[kind](w), kind).reshape(4, 512)
    if kind == "Q4_K":
        # Half a 63rd of the largest scale (0.02) fifteen times, half a 63rd of the largest min (0.3), and float16's rounding.
        assert np.abs(got - w.dequantized()).max() <= 15 * 0.02 / 126 + 0.3 / 126 + 0.6 * 2**-11
    else:
        np.testing.assert_array_equal(got, w.dequantized())


MOE = Cell.of(
    "moe", 1, layer="small", num_experts=5, top_k=2, hidden=64, intermediate=96, tokens=3, routing="correlated"
)


def test_a_layer_s_experts_are_copies_of_a_few_drawn_ones():
    from peers import experts

    made = experts.every_expert(MOE, lambda e: e)
    assert made == [0, 1, 2, 0, 1]
    codes = experts.stacked(MOE, (0, 1), "codes")
    assert codes.shape == (5, 192, 32)
    np.testing.assert_array_equal(codes[4, 96:], experts.matrix(MOE, 1, 1).codes)
    assert not (codes[0] == codes[1]).all()


def test_our_layer_answers_as_float64_and_rotates_through_its_copies(monkeypatch):
    from peers import experts

    monkeypatch.setattr(experts, "layers_needed", lambda cell, growth=1.0: 2)
    contender = experts.Assay()
    prepared = contender.prepare(MOE)
    assert prepared.error() <= prepared.tolerance
    assert len(prepared.calls) == 2 * experts.ROUTINGS
    assert contender.prepare(Cell.of("moe", 2, **dict(MOE.params))).error() <= prepared.tolerance


def test_a_layer_that_does_not_fit_in_memory_is_said_to():
    from peers import experts

    huge = Cell.of("moe", 1, **{**dict(MOE.params), "num_experts": 4096, "hidden": 2**20, "intermediate": 2**20})
    with pytest.raises(MemoryError, match=r"GB for the layer and the rest, .* are free"):
        experts.Assay().prepare(huge)


def test_a_worker_computes_checks_times_and_dies_cleanly():
    worker = Worker("peers.ours:Assay", (), 1)
    try:
        assert "assay" in worker.finish()
        reason, error, allowed = worker.ask(
            "prepare", Cell.of("w4a8", 1, n=32, k=64, group_size=32, symmetric=False, m=16)
        )
        assert reason is None
        assert 0 < error <= allowed
        assert worker.ask("visit", 0.0) > 0
        with pytest.raises(Failed, match="AttributeError"):
            worker.ask("nonsense")
    finally:
        worker.close()


def test_a_visit_makes_every_call_before_it_times_one():
    made: list[int] = []
    calls = [partial(made.append, i) for i in range(5)]
    server = Server("peers.ours:Assay", ())
    server._prepared, server._timer = Prepared(calls, np.ones(1), np.ones(1), 0.0), Timer(calls)
    server.visit(0.0)
    assert made[:5] == [0, 1, 2, 3, 4]
    assert made[5:10] == [0, 1, 2, 3, 4]  # at least three samples, after one that is not timed


def test_the_roof_of_memory_is_the_fastest_way_over_memory_that_was_just_touched(monkeypatch):
    ring, read = Ring(), []
    ring.data = np.repeat(np.arange(8, dtype=np.uint8), 64)
    monkeypatch.setattr(roofs, "SLICE_BYTES", 64)

    def bandwidth(part, threads, ahead=0):
        assert threads == 2
        read.append((int(part[0]), ahead))
        return {0: 10.0, 1024: 30.0, 2048: 20.0}[ahead]

    monkeypatch.setattr(roofs.probe, "read_bandwidth", bandwidth)
    ring.take(64)
    assert roofs.dram_read(ring, 2) == 30.0
    assert [at for at, _ in read[:8]] == [1, 2, 3, 4, 5, 6, 7, 0]
    assert [at for at, _ in read[8:]] == [(1 + i) % 8 for i in range(15)]  # what was read longest ago comes first


def test_a_contender_that_cannot_be_loaded_says_why():
    worker = Worker("peers.nothing:Nobody", (), 1)
    try:
        with pytest.raises(Failed, match=r"peers\.nothing"):
            worker.finish()
    finally:
        worker.close()


def test_the_checked_columns_are_the_products():
    a, w = np.ones((2, 3), np.float32), np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(product(a, w), [[3, 12], [3, 12]])
    assert comparison.OURS == "assay"


CONFIG = {"n": 128, "k": 64, "threads": 1, "group_size": 32, "symmetric": True}


def process(first):
    """What one process says of bounds: 4096 + 512 bytes in `first` seconds, 1.5 times that for two rows, 1.8 for three."""
    times = {"1": [first] * 3, "2": [1.5 * first] * 3, "3": [1.8 * first] * 3, "64": [1e-3] * 3}
    return {"times": times, "dram": {"a": [1e9, 5e9, 4e9], "b": [2e9] * 3}, "peak": {"64": [2e9] * 3}}


def test_bounds_are_medians_of_processes_against_the_best_probe():
    rows = {(r["bound"], r["m"]): r for r in bounds.rows_of(CONFIG, [process(t) for t in (2e-6, 1e-6, 4e-6)])}
    dram = rows["dram", 1]
    assert dram["value"] == pytest.approx((4096 + 512) / 2e-6 / 4e9)
    assert (dram["processes"], dram["met"]) == (3, False)
    assert (rows["step", 1]["value"], rows["step", 1]["met"]) == (pytest.approx(1.5), False)
    assert (rows["step", 2]["value"], rows["step", 2]["met"]) == (pytest.approx(1.2), True)
    assert rows["int8 peak", 64]["value"] == pytest.approx(2 * 64 * 128 * 64 / 1e-3 / 2e9)


def test_a_table_of_bounds_shows_the_missed_steps_and_the_times():
    shown = bounds.brief(bounds.rows_of(CONFIG, [process(2e-6)]))
    assert [row["bound"] for row in shown] == ["dram", "step 1 to 2", "step 2 to 3", "int8 peak", "us by M"]
    assert shown[-1]["detail"] == "1: 2, 2: 3, 64: 1000"


@pytest.mark.parametrize("arguments", [["gemm", "--kind", "odd"], ["gemm", "--op", "w2a2"], ["moe", "--layers", "x"],
                                       ["verify", "--rule", "x"], ["gemm", "--shapes", "1y2"], ["gemm", "--passes", "0"]])  # fmt: skip
def test_a_bad_option_is_named(arguments, monkeypatch, capsys):
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", *arguments])
    with pytest.raises(SystemExit):
        compare.parse()
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.parametrize("op", ["w4a8", "w8a8"])
def test_the_c_call_of_an_op_computes_the_same(op):
    import assay
    from peers.ours import c_call

    w = Weights(32, 64, 32, True, 4 if op == "w4a8" else 8)
    packed = assay.pack(w.codes, w.scales) if op == "w4a8" else assay.pack_int8(w.codes, w.scales)
    a, out = np.ones((3, 64), np.float32), np.zeros((3, 32), np.float32)
    call = c_call(op, lambda: getattr(assay, f"{op}_gemm")(a, packed, out))
    want = out.copy()
    assert want.any()
    out[:] = 0
    assert call() == 0
    np.testing.assert_array_equal(out, want)
