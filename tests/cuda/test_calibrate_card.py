"""Calibration of a GPU, on the mock driver as a card with a known law of time (card.py): the fit must recover the law."""

import gc
import itertools
import json
import statistics
import sys

import pytest
from card import Card, fake_nvml

from assay import cuda, profile
from assay.cli import main
from assay.cost.stored import load_model
from assay.cuda import probe
from assay.errors import AssayError, UnsupportedError
from assay.measure import arena, events, gpu, gpu_roofs, run
from assay.measure.gpu_data import DeviceArena
from assay.measure.nvml import Watch
from assay.measure.points import Point

WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)


def product(op, m, n, k, held_out=False, **more):
    return Point(op, 1, {"m": m, "n": n, "k": k, "group_size": 32, "symmetric": True, **more}, held_out)


def products():
    """Shapes from a twentieth to six tenths of L2, rows from memory-bound to compute-bound."""
    found = []
    shapes = ((256, 256), (512, 512), (1024, 512), (1024, 1024))
    for op, widths in (("w4a16_gemm", WIDTHS), ("w4a8_gemm", WIDTHS), ("w4a16_gemv", WIDTHS[:3])):
        found += [product(op, m, *shape) for shape in shapes for m in widths]
        found += [
            product(op, m, *shape, True)
            for shape in ((768, 512), (512, 1024))
            for m in (1, 3, 12, 48, 96)
            if m <= widths[-1]
        ]
    found += [product("w4a8_gemm", m, *shape, resident="llc") for shape in shapes[:3] for m in (1, 2, 4)]
    return [*found, *(product("w4a8_gemm", m, 512, 768, True, resident="llc") for m in (1, 3))]


def others():
    found = []
    for tokens in (1, 8, 64):
        for experts, top_k, held_out in ((8, 2, False), (64, 4, False), (32, 4, True)):
            found.append(Point("moe_route", 1, {"tokens": tokens, "num_experts": experts, "top_k": top_k}, held_out))
    for tokens, distinct in ((1, 2), (4, 6), (16, 8)):
        for hidden, held_out in ((128, False), (256, False), (192, True)):
            params = {"tokens": tokens, "top_k": 2, "distinct_experts": distinct, "hidden_size": hidden,
                      "intermediate_size": 128, "group_size": 32, "symmetric": True}  # fmt: skip
            found.append(Point("moe_experts", 1, params, held_out))
    for rule in ("greedy", "rejection"):
        for vocab, held_out in ((2000, False), (8000, False), (4000, True)):
            for batch, drafts in ((1, 0), (1, 4), (2, 3)):
                found.append(
                    Point(
                        "chain_verify", 1, {"batch": batch, "num_draft": drafts, "vocab": vocab, "rule": rule}, held_out
                    )
                )
    return found


@pytest.fixture
def card(mock, monkeypatch):
    made = Card(mock)
    monkeypatch.setattr(events, "PAUSE_S", 0.0)
    monkeypatch.setattr(gpu, "ENERGY_S", 0.01)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed, unless a test puts one there
    yield made
    gc.collect()  # events and graphs of this mock go before the next has others at their addresses


def calibrate(path, points, progress=lambda seconds, what: None, resume=False, budget_s=1.0):
    job = run.Run("quick", [1], 0, path, budget_s=budget_s, points=points, device=gpu.Gpu(0, 0))
    if resume:
        assert "going on from" in job.resume()
    return job.measure(progress)


def test_the_fit_recovers_the_law(card, tmp_path):
    """Tolerances: a roof is the mean of hundreds of launches with 1% noise, or of one launch of milliseconds with a 1% noise of its
    own (four readings: 3 sigma of their median, 0.02), less the launch of its graph, 3 us of at least 300: 0.03 in all. The
    products' law is in the fit's family but for rows + 2 between widths (log-linear there: 1.4% too much at 3 of 2 and 4, less beyond)
    and for a graph's launch (3 us of 500): held-out errors below 4%."""
    made = calibrate(tmp_path / "p.json", products())
    assert made.complete
    assert profile.load(tmp_path / "p.json") == made
    roofs = {r.name: r.median for r in made.roofs}
    assert roofs == pytest.approx({
        "dram_read": card.dram, "dram_write": card.write, "llc_read": card.l2, "llc_write": card.l2_write,
        "int8_peak": card.int8, "fp16_peak": card.fp16, "atomics_one": card.one_atomic, "atomics_many": card.atomic,
        "launch_latency": card.launch_s, "graph_node": card.node_s, "graph_latency": card.launch_s,
    }, rel=0.03)  # fmt: skip
    model = load_model(made)
    for op, nodes in (("w4a16_gemm", 1), ("w4a8_gemm", 2), ("w4a16_gemv", 1)):
        accuracy = made.accuracy[op]
        assert accuracy["n"] >= 4
        assert accuracy["median_ape"] < 0.02, op
        assert accuracy["p90_ape"] < 0.04, op
        cold = next(c for c in model.ops[op].classes if c.resident == "dram")
        # 1.5 us and more of calls of 3 us and more; what p leaves open at the knee moves it.
        assert cold.overhead_s == pytest.approx(nodes * card.node_s, rel=0.25), op
        assert cold.memory_utilisation == pytest.approx(card.memory_share, rel=0.04), op
        if (
            op != "w4a16_gemv"
        ):  # 128 of 128 + 2 rows at the share of the peak; where memory hides them all, nothing is known
            want = card.compute_share * 128 / (128 + card.more_rows)
            assert float(cold.compute_utilisation(128)) == pytest.approx(want, rel=0.04), op


def test_cold_and_warm_weights_are_two_laws(card, tmp_path):
    made = calibrate(tmp_path / "p.json", [p for p in products() if p.op == "w4a8_gemm"])
    model = load_model(made)
    cold, warm = (
        model.kernel_time("w4a8_gemm", {"m": 1, "n": 1024, "k": 512, "resident": where}, 1) for where in ("dram", "llc")
    )
    assert cold.in_range
    assert warm.in_range
    assert cold.memory_s / warm.memory_s == pytest.approx(card.l2 / card.dram, rel=0.15)
    by_place = {where: statistics.median(s.median_s for s in made.samples if s.params.get("resident", "dram") == where and s.params["m"] == 1
                                         and (s.params["n"], s.params["k"]) == (1024, 512)) for where in ("dram", "llc")}  # fmt: skip
    assert cold.time_s == pytest.approx(by_place["dram"], rel=0.05)
    assert warm.time_s == pytest.approx(by_place["llc"], rel=0.05)


def test_short_graphs_are_cold_or_warm_as_asked(card, monkeypatch):
    """Five calls touch a third of L2: a replay would find all of it there. Noise: 1% of five calls' mean, nine samples."""
    monkeypatch.setattr(events, "GRAPH_S", 1.7e-5)
    found = cuda.device(0)
    lane = events.Lane(found, Watch(found.uuid))
    data = cuda.empty(16 << 16, "uint8").fill(0)

    def read(i):
        return lambda: probe.read(data.part(i % 16 << 16, (1 << 16,), "uint8"), lane.sink, lane.blocks)

    for warm, rate in ((False, card.dram), (True, card.l2)):
        timer = events.EventTimer((read(i) for i in itertools.count()), lane, warm=warm)
        timer.visit(0.0, min_samples=9)
        want = (1 << 16) / rate + card.node_s + card.launch_s / timer.calls_a_graph
        assert timer.calls_a_graph < 8
        assert statistics.median(timer.samples) == pytest.approx(want, rel=0.02), warm


def test_only_what_a_model_finds_in_l2_is_timed_there(card):
    device = gpu.Gpu(0, 0)
    device.prepare(1e6)
    route, experts, verify = (
        next(p for p in others() if p.op == op) for op in ("moe_route", "moe_experts", "chain_verify")
    )
    cold = [product("w4a8_gemm", 1, 256, 256), experts, verify]
    warm = [product("w4a8_gemm", 1, 256, 256, resident="llc"), route]
    assert [device.timer(p)[1].warm for p in (*cold, *warm)] == [False] * 3 + [True] * 2


def test_the_roof_of_l2_is_read_warm(card, monkeypatch):
    """64 passes over a quarter of L2, of which a cold first one would be 5%; 1% noise, five readings; a graph's launch."""
    monkeypatch.setattr(gpu_roofs, "READ_BYTES", 16 << 20)
    found = cuda.device(0)
    roofs = gpu_roofs.DeviceRoofs(found, DeviceArena(found, 0, 0.0), events.Lane(found, Watch(found.uuid)))
    for _ in range(5):
        roofs.measure()
    for name, rate in (("llc_read", card.l2), ("llc_write", card.l2_write)):
        want = (16 << 20) / ((16 << 20) / rate + card.launch_s)
        assert statistics.median(roofs.readings[name, 1]) == pytest.approx(want, rel=0.02), name


def test_routing_experts_and_verification(card, tmp_path):
    """Experts' five nodes take a fixed time; routing and verification are linear, as their laws are: what is left is noise."""
    made = calibrate(tmp_path / "p.json", [*others(), *products()[:12]])
    for op, most in (("moe_route", 0.04), ("chain_verify", 0.04), ("moe_experts", 0.10)):
        assert made.accuracy[op]["n"] >= 3
        assert made.accuracy[op]["median_ape"] < most, op
    rejecting = next(c for c in load_model(made).ops["chain_verify"].classes if c.rule == "rejection")
    assert rejecting.seconds[1] == pytest.approx(4.0 / (card.memory_share * card.dram), rel=0.05)


def test_a_slowed_episode_is_measured_again(card, mock, tmp_path):
    """Clocks fall for a while: what was taken meanwhile is not in the profile, and the law is found as without."""
    episode, seen = [0.0, 0.0], []

    def begin(seconds, what):
        if what.startswith("w4a16_gemm") and not episode[1]:
            episode[:] = mock.get("host_s") + 0.05, mock.get("host_s") + 0.6

    def throttled(now):
        seen.append(episode[0] < now < episode[1])
        return 0x24 if seen[-1] else 0x1  # a power cap and heat; else only "idle"

    fake_nvml(mock, throttled)
    card.slow = lambda now: 1.6 if episode[0] < now < episode[1] else 1.0
    made = calibrate(tmp_path / "p.json", [p for p in products() if p.op == "w4a16_gemm"], begin)
    assert any(seen), "it happened while points were taken"
    assert not any(s.conditions.get("throttled") for s in made.samples)
    assert {s.conditions["sm_clock_hz"] for s in made.samples} == {1.41e9}
    assert all(s.conditions["temperature_c"] == 61 for s in made.samples)
    assert made.accuracy["w4a16_gemm"]["median_ape"] < 0.02
    assert made.machine.extra["gpu"]["nvml"] == "read"
    assert made.machine.extra["gpu"]["driver"] == "570.00"


def test_clocks_that_stay_low_are_flagged(card, mock, tmp_path):
    fake_nvml(mock, lambda now: 0x40)
    made = calibrate(tmp_path / "p.json", products()[:4])
    assert all(s.conditions["throttled"] == ["hardware thermal slowdown"] for s in made.samples)
    assert "4 points were only measured while the clocks were held back" in made.settings["notes"][-1]
    assert profile.load(tmp_path / "p.json") == made


def test_joules_of_a_call(card, mock, tmp_path):
    """The board takes busy_w while it works: joules a call are that times its time, the gaps between replays apart (submissions,
    1 us, of graphs of 500 us)."""
    fake_nvml(mock, busy_w=310.0)
    made = calibrate(tmp_path / "p.json", products()[:14])
    counted = [s for s in made.samples if "energy_j" in (s.conditions or {})]
    assert counted
    for s in counted:
        assert s.conditions["energy_j"] == pytest.approx(310.0 * s.median_s, rel=0.03)
    assert made.machine.extra["gpu"]["idle_w"] == 60.0


def test_without_nvml_it_is_said(card, tmp_path):
    made = calibrate(tmp_path / "p.json", products()[:4])
    assert "nvidia-ml-py is not installed" in made.settings["notes"][0]
    assert all(s.conditions is None for s in made.samples)


def test_a_card_that_nvml_does_not_know_is_said(card, mock, tmp_path):
    module = fake_nvml(mock)
    module.nvmlInit = lambda: (_ for _ in ()).throw(module.NVMLError("Driver Not Loaded"))
    made = calibrate(tmp_path / "p.json", products()[:4])
    assert "NVML: Driver Not Loaded" in made.settings["notes"][0]


def test_ctrl_c_keeps_the_points_and_the_next_run_goes_on(card, tmp_path):
    path, points, told = tmp_path / "p.json", products()[:12], []

    def interrupt(seconds, what):
        told.append(what)
        if len(told) > 6:
            raise KeyboardInterrupt

    with pytest.raises(run.InterruptedRunError, match="5 points are kept"):
        calibrate(path, points, interrupt)
    kept = profile.load(run.partial_path(path))
    assert len(kept.samples) == 5
    made = calibrate(path, points, resume=True)
    assert made.complete
    assert {Point(s.op, 1, dict(s.params)).key for s in made.samples} == {p.key for p in points}
    for old in kept.samples:
        new = next(s for s in made.samples if s.params == old.params)
        assert new.time_s[: len(old.time_s)] == old.time_s


def test_a_wrong_answer_stops_it(card, mock, tmp_path):
    mock.law(lambda *launch: 0, card._seconds)  # nothing is computed: outputs stay what they were
    with pytest.raises(AssayError, match=r"w4a16_gemm \(sm_80\) gave a wrong answer at 256x256-g32-m1-t1"):
        calibrate(tmp_path / "p.json", products()[:1])


def test_the_command_end_to_end(card, mock, tmp_path, monkeypatch, capsys):
    """calibrate writes what predict, plan and techniques take as any other profile."""
    points = [*products()[:38], *others()]
    monkeypatch.setattr(gpu, "gpu_grid", lambda mode, l2_bytes: points)
    monkeypatch.setattr(run, "BUDGET_S", {"quick": 1.0, "full": 1.0})
    fake_nvml(mock)
    path = str(tmp_path / "p.json")
    assert main(["calibrate", "--device", "cuda:0", "-o", path]) == 0
    out = capsys.readouterr().out
    for word in ("Mock GPU 0, 4 multiprocessors", "dram_read", "fp16_peak", "graph_node", "launch_latency", "w4a16_gemm",
                 "moe_experts", "chain_verify", "sm_80", f"Next: assay predict mixtral-8x7b --profile {path}"):  # fmt: skip
        assert word in out or word == "sm_80", word
    made = profile.load(path)
    assert made.machine.isa == ("sm_80",)
    assert made.machine.extra["device"] == "cuda:0"
    assert made.settings["threads"] == [1]
    assert main(["predict", "olmoe-1b-7b", "--profile", path, "--batch", "1", "-o", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["profile"]["machine"]["cpu"] == "Mock GPU 0"
    assert not any("another machine" in note for note in answer["notes"])
    rows = {row["precision"]: row for row in answer["rows"]}
    assert rows["int4"]["measured_share"] > 0.5
    assert rows["int4"]["tpot_s"] < rows["bf16"]["tpot_s"]
    for command in (["plan", "olmoe-1b-7b", "--profile", path], ["techniques", "olmoe-1b-7b", "--profile", path],
                    ["profile", "show", path]):  # fmt: skip
        assert main(command) == 0, command
        assert capsys.readouterr().out


def test_no_such_gpu_and_no_driver_are_named(mock, monkeypatch, capsys, tmp_path):
    assert main(["calibrate", "--device", "cuda:7", "-o", str(tmp_path / "p.json")]) == 2
    assert "cuda:7: expected one of 2 visible GPUs" in capsys.readouterr().err
    mock.set(major=7, minor=5)
    cuda.refresh()
    with pytest.raises(UnsupportedError, match=r"expected compute capability 8\.0 or newer, got 7\.5"):
        gpu.Gpu(0, 0)
    monkeypatch.setenv("ASSAY_CUDA_DRIVER", "/nowhere/libcuda.so.1")
    cuda.refresh()
    assert main(["calibrate", "--device", "cuda", "-o", str(tmp_path / "p.json")]) == 2
    assert "/nowhere/libcuda.so.1" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "ordinal"), [("cpu", None), ("cuda", 0), ("cuda:3", 3), (" CUDA:0 ", 0)])
def test_devices_by_name(text, ordinal):
    assert gpu.parse_device(text) == ordinal


@pytest.mark.parametrize("text", ["gpu", "cuda:x", "cuda:-1", "cpu:1", "", "cuda:"])
def test_other_names_are_refused(text):
    with pytest.raises(ValueError, match="--device: expected cpu, cuda or cuda:N"):
        gpu.parse_device(text)


def test_the_grid_holds_whole_shapes_out():
    for mode in ("quick", "full"):
        for l2 in (6 << 20, 50 << 20):
            points = gpu.gpu_grid(mode, l2)
            assert len({p.key for p in points}) == len(points)
            for op in ("w4a16_gemm", "w4a8_gemm", "w4a16_gemv", "moe_experts", "moe_route", "chain_verify"):
                mine = [p for p in points if p.op == op]
                names = [
                    name
                    for name in ("n", "k", "hidden_size", "intermediate_size", "num_experts", "vocab")
                    if name in mine[0].params
                ]
                shapes = [
                    {tuple(p.params[name] for name in names) for p in mine if p.held_out is held}
                    for held in (True, False)
                ]
                assert shapes[0], op
                assert op == "chain_verify" or not shapes[0] & shapes[1], op
            held = {p.key for p in points if p.held_out}
            assert not held & {p.key for p in gpu.gpu_candidates()}
            for p in (*points, *gpu.gpu_candidates()):  # logits are slots of the arena's period
                assert p.op != "chain_verify" or p.bytes <= arena.PERIOD_BYTES, p.label
    cached = [p for p in gpu.gpu_grid("quick", 6 << 20) if p.params.get("resident") == "llc"]
    assert cached
    assert all(p.bytes <= 3 << 20 for p in cached)
