"""The calibration run: complete, interrupted, resumed, set aside; on small points of every op."""

import dataclasses
import json
import os

import numpy as np
import pytest

from assay import machine, profile
from assay.errors import AssayError
from assay.measure import arena, clock, device, roofs, run, workloads
from assay.measure.points import Point


def gemm(m, n, k, threads, held_out=False, op="w4a8_gemm"):
    return Point(op, threads, {"m": m, "n": n, "k": k, "group_size": 32, "symmetric": True}, held_out)


def small_points():
    """Enough of every op for a fit, in milliseconds."""
    found = []
    for t in (1, 2):
        found += [gemm(m, n, 256, t) for m in (1, 2, 4, 8) for n in (64, 128, 256)]
        found += [gemm(m, 96, 512, t, True) for m in (1, 4)]
        found += [gemm(m, n, 256, t, op="w4a16_gemm") for m in (1, 4) for n in (64, 128)]
        for tokens in (1, 8, 32):
            for experts, top_k, held_out in ((8, 2, False), (64, 8, False), (32, 4, True)):
                params = {"tokens": tokens, "num_experts": experts, "top_k": top_k}
                found.append(Point("moe_route", t, params, held_out))
        for tokens, distinct in ((1, 2), (4, 6), (16, 8)):
            for hidden, held_out in ((64, False), (128, False), (96, True)):
                params = {
                    "tokens": tokens, "top_k": 2, "distinct_experts": distinct, "hidden_size": hidden,
                    "intermediate_size": 64, "group_size": 32, "symmetric": True,
                }  # fmt: skip
                found.append(Point("moe_experts", t, params, held_out))
        for rule in ("greedy", "rejection"):
            for vocab, held_out in ((1000, False), (4000, False), (2000, True)):
                for batch, drafts in ((1, 0), (1, 4), (2, 3)):
                    params = {"batch": batch, "num_draft": drafts, "vocab": vocab, "rule": rule}
                    found.append(Point("chain_verify", t, params, held_out))
    return found


def make_machine_small(monkeypatch):
    """A machine with a small cache, so that little data is rotated through, and to itself."""
    real = machine.describe
    monkeypatch.setattr(machine, "describe", lambda isa=(): dataclasses.replace(real(isa), l3_bytes=1 << 20))
    monkeypatch.setattr(arena, "MIN_BYTES", 32 << 20)
    monkeypatch.setattr(device, "TAKEN", 1.0)  # whatever else runs beside the tests


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    make_machine_small(monkeypatch)


def new_run(path, **options):
    options = {"budget_s": 2.0, "points": small_points(), **options}
    return run.Run(
        options.pop("mode", "quick"), options.pop("threads", [1, 2]), options.pop("seed", 0), path, **options
    )


def interrupt_after(calls):
    """Progress that is interrupted by Ctrl-C when the run has come to its `calls`-th point."""
    count = 0

    def progress(seconds, what):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt

    return progress


def nothing(seconds, what):
    pass


def test_a_run_writes_a_profile_that_loads(tmp_path):
    path = tmp_path / "deep" / "profile.json"
    told = []
    made = new_run(path, command=["assay", "calibrate"]).measure(lambda seconds, what: told.append(seconds))
    again = profile.load(path)
    assert again == made
    assert again.complete
    assert again.settings["mode"] == "quick"
    assert again.command == ["assay", "calibrate"]
    assert not run.partial_path(path).exists()
    assert list(path.parent.iterdir()) == [path], "no temporary file is left"
    points = {p.key: p for p in small_points()}
    assert {Point(s.op, s.threads, dict(s.params)).key for s in again.samples} == set(points)
    for sample in again.samples:
        point = points[Point(sample.op, sample.threads, dict(sample.params)).key]
        assert (sample.bytes, sample.ops, sample.held_out) == (point.bytes, point.ops, point.held_out)
        assert set(sample.roof_near) == {"dram_read", "int8_peak"}
        assert sample.time_s
    assert np.median([len(s.time_s) for s in again.samples]) >= 3, "a first call may last longer than its whole visit"
    assert {(r.name, r.threads) for r in again.roofs} == {(n, t) for n in profile.ROOF_UNITS for t in (1, 2)}
    assert set(again.fits) == {"w4a8_gemm", "w4a16_gemm", "moe_experts", "moe_route", "chain_verify"}
    assert again.accuracy["w4a8_gemm"]["n"] >= 4
    assert sum(told) >= again.settings["measured_s"], "progress counts the seconds that pass, checks and all"
    assert min(told) >= 0


def test_the_next_run_remembers_the_roofs_of_the_one_it_replaces(tmp_path):
    path = tmp_path / "p.json"
    points = [gemm(m, 64, 256, 1) for m in (1, 2)]
    first = new_run(path, threads=[1], points=points, budget_s=0.1).measure(nothing)
    assert first.settings["earlier"] == []
    second = new_run(path, threads=[1], points=points, budget_s=0.1).measure(nothing)
    (kept,) = second.settings["earlier"]
    assert kept["created_utc"] == first.created_utc
    assert kept["roofs"] == {f"{r.name}@{r.threads}": r.median for r in first.roofs}
    # What a disturbed run read is not kept; what it knew is.
    disturbed = dataclasses.replace(second, settings=second.settings | {"disturbed": True})
    profile.save(disturbed, path)
    assert new_run(path, threads=[1], points=points).collect(complete=False).settings["earlier"] == [kept]
    # Another machine's run says nothing of this one.
    profile.save(dataclasses.replace(second, machine=dataclasses.replace(second.machine, fingerprint="other")), path)
    assert new_run(path, threads=[1], points=points).collect(complete=False).settings["earlier"] == []
    path.write_text("broken")
    assert new_run(path, threads=[1], points=points).collect(complete=False).settings["earlier"] == []


def test_ctrl_c_keeps_the_points_and_the_next_run_goes_on(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(run.InterruptedRunError, match="interrupted: 7 points are kept") as stop:
        new_run(path).measure(interrupt_after(1 + 7))
    assert stop.value.points == 7
    assert not path.exists()
    kept = profile.load(run.partial_path(path))
    assert len(kept.samples) == 7
    assert not kept.complete

    second = new_run(path)
    assert second.resume().startswith("going on from 7 points measured earlier")
    made = second.measure(nothing)
    assert made.complete
    assert len(made.samples) == len(small_points())
    assert made.created_utc == kept.created_utc
    for old in kept.samples:
        new = next(s for s in made.samples if (s.op, s.threads, s.params) == (old.op, old.threads, old.params))
        assert new.time_s[: len(old.time_s)] == old.time_s, "earlier samples are kept, not measured again"
    for old in kept.roofs:
        assert made.roof(old.name, old.threads).samples[: len(old.samples)] == old.samples
    assert not run.partial_path(path).exists()


def test_a_resumed_run_measures_missing_points_first(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(run.InterruptedRunError):
        new_run(path).measure(interrupt_after(1 + 20))
    first = {s.op + str(s.params) + str(s.threads) for s in profile.load(run.partial_path(path)).samples}
    second = new_run(path)
    second.resume()
    with pytest.raises(run.InterruptedRunError):
        second.measure(interrupt_after(1 + 20))
    kept = profile.load(run.partial_path(path)).samples
    assert len(kept) == 40
    assert {s.op + str(s.params) + str(s.threads) for s in kept} > first


def test_ctrl_c_in_the_middle_of_a_call(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    visits = 0
    real = clock.Timer.visit

    def visit(self, *args, **options):
        nonlocal visits
        visits += 1
        if visits == 4:
            raise KeyboardInterrupt
        return real(self, *args, **options)

    monkeypatch.setattr(clock.Timer, "visit", visit)
    with pytest.raises(run.InterruptedRunError, match="3 points"):
        new_run(path).measure(nothing)
    assert len(profile.load(run.partial_path(path)).samples) == 3


def test_ctrl_c_before_the_first_point(tmp_path):
    path = tmp_path / "p.json"
    with pytest.raises(run.InterruptedRunError, match="0 points"):
        new_run(path).measure(interrupt_after(1))
    again = new_run(path)
    assert "0 points" in again.resume()


@pytest.mark.parametrize(
    ("options", "word"), [({"seed": 1}, "seed"), ({"mode": "full"}, "mode"), ({"threads": [1]}, "threads")]
)
def test_another_kind_of_run_sets_the_partial_file_aside(tmp_path, options, word):
    path = tmp_path / "p.json"
    with pytest.raises(run.InterruptedRunError):
        new_run(path).measure(interrupt_after(4))
    before = run.partial_path(path).read_text()
    note = new_run(path, **options).resume()
    assert word in note
    assert "set aside" in note
    assert not run.partial_path(path).exists()
    aside = [p for p in tmp_path.iterdir() if p.name.startswith("p.json.partial")]
    assert [p.read_text() for p in aside] == [before], "set aside, not thrown away"


def test_a_partial_file_of_another_machine_or_kernels_is_set_aside(tmp_path):
    path = tmp_path / "p.json"
    for key, change in (
        ("machine", lambda data: data["machine"].update(fingerprint="another")),
        ("kernels", lambda data: data["package"]["kernels"].update(int4_gemm="another")),
        ("version", lambda data: data["package"].update(assay="0.0.0")),
    ):
        with pytest.raises(run.InterruptedRunError):
            new_run(path).measure(interrupt_after(3))
        partial = run.partial_path(path)
        data = json.loads(partial.read_text())
        change(data)
        partial.write_text(json.dumps(data))
        assert key in new_run(path).resume()
        assert not partial.exists()


def test_a_corrupt_partial_file_is_set_aside(tmp_path):
    path = tmp_path / "p.json"
    run.partial_path(path).write_text('{"schema": "assay-prof')
    assert "set aside" in new_run(path).resume()
    assert not run.partial_path(path).exists()
    assert new_run(path).resume() is None


def test_a_failed_write_leaves_the_old_profile(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    new_run(path).measure(nothing)
    before = path.read_text()

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            new_run(path, seed=5).measure(nothing)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_it_is_saved_while_it_runs(tmp_path, monkeypatch):
    """A killed process loses at most the last seconds: the partial file is written on the way."""
    path = tmp_path / "p.json"
    saved = []
    real = profile.save

    def save(made, where):
        saved.append((len(made.samples), os.fspath(where)))
        real(made, where)

    monkeypatch.setattr(profile, "save", save)
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.2)
    new_run(path).measure(nothing)
    on_the_way = saved[:-1]
    assert on_the_way
    assert all(where == str(run.partial_path(path)) for _, where in on_the_way)
    assert saved[-1] == (len(small_points()), str(path))


def test_a_wrong_kernel_stops_it_with_an_error_that_names_the_point(tmp_path, monkeypatch):
    def zeros(a, w, out, **options):
        out[...] = 0

    monkeypatch.setattr(workloads.int4, "w4a8_gemm", zeros)
    with pytest.raises(AssayError, match=r"w4a8_gemm \(\w+\) gave a wrong answer at \d+x\d+-g32-m\d+-t\d"):
        new_run(tmp_path / "p.json").measure(nothing)
    assert not (tmp_path / "p.json").exists()


def test_two_threads_on_one_core_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(roofs.probe, "int8_peak", lambda threads, isa=None, **_: 1e11 * (1.0 if threads == 1 else 1.2))
    made = new_run(tmp_path / "p.json", budget_s=0.2).measure(nothing)
    assert "two threads reached 1.20 times" in made.settings["notes"][0]
    assert made.settings["disturbed"]
    monkeypatch.setattr(roofs.probe, "int8_peak", lambda threads, isa=None, **_: 1e11 * threads)
    made = new_run(tmp_path / "p.json", budget_s=0.2).measure(nothing)
    assert made.settings["notes"] == []


@pytest.mark.parametrize("tiles", [True, False])
def test_the_vector_peak_is_a_roof_of_its_own_only_beside_tiles(tmp_path, monkeypatch, tiles):
    chosen = roofs.info.kernel_versions() | {"probe": "amx" if tiles else "avx512vnni"}
    monkeypatch.setattr(roofs.info, "kernel_versions", lambda: chosen)
    peaks = {None: 7e12, "avx512vnni": 1e12}
    monkeypatch.setattr(roofs.probe, "int8_peak", lambda threads, isa=None, **_: peaks[isa] * threads)
    made = new_run(tmp_path / "p.json", budget_s=0.2).measure(nothing)
    assert made.roof("int8_peak", 2).median == 14e12
    found = made.roof("int8_vector_peak", 2)
    assert found is None if not tiles else found.median == 2e12


def test_order_is_seeded():
    def order(seed):
        return [s.point.label for s in new_run("unused", seed=seed)._series]

    assert order(3) == order(3)
    assert order(3) != order(4)
    assert sorted(order(3)) == sorted(order(4))


@pytest.mark.parametrize(
    ("threads", "counts"),
    [([1], [1]), ([1, 2], [1, 2]), ([1, 6], [1, 2, 4, 6]), ([1, 16], [1, 2, 4, 8, 16]), ([3], [1, 2, 3])],
)
def test_roofs_are_read_at_the_powers_of_two_as_well(threads, counts):
    assert roofs.thread_counts(threads) == counts


def test_a_full_run_goes_on_where_the_model_is_least_sure(tmp_path, monkeypatch):
    """Of two routers that may be added, one lies in the grid's range and one far outside; and a width lies between two."""
    extra = [gemm(6, 256, 256, 1), gemm(3, 256, 256, 2)]
    extra += [Point("moe_route", 1, {"tokens": 16, "num_experts": 16, "top_k": 4})]
    known = small_points()[0]
    monkeypatch.setattr(device, "candidates", lambda threads: [known, *extra])
    monkeypatch.setattr(run, "GRID_SHARE", 0.05)
    monkeypatch.setattr(run, "TARGET_DEVIATION", 0.0)
    made = new_run(tmp_path / "p.json", mode="full", budget_s=40.0).measure(nothing)
    keys = [Point(s.op, s.threads, dict(s.params)).key for s in made.samples]
    assert len(set(keys)) == len(keys), "nothing is measured twice"
    assert set(keys) == {p.key for p in small_points() + extra}
    assert made.settings["refinement"]["points"] == len(extra)
    assert made.settings["refinement"]["largest_deviation"] > 0
    assert not any(s.held_out for s, key in zip(made.samples, keys, strict=True) if key in {p.key for p in extra})


def test_a_full_run_that_is_sure_enough_stops_before_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "candidates", lambda threads: [gemm(6, 256, 256, 1)])
    monkeypatch.setattr(run, "GRID_SHARE", 0.05)
    monkeypatch.setattr(run, "TARGET_DEVIATION", 100.0)
    made = new_run(tmp_path / "p.json", mode="full", budget_s=40.0).measure(nothing)
    assert made.settings["refinement"]["points"] == 0
    assert len(made.samples) == len(small_points())
    assert made.settings["measured_s"] < 20


def test_added_points_survive_an_interruption(tmp_path, monkeypatch):
    path = tmp_path / "p.json"
    extra = [gemm(m, 256, 256, 1) for m in (3, 5, 6)]
    monkeypatch.setattr(device, "candidates", lambda threads: extra)
    monkeypatch.setattr(run, "GRID_SHARE", 0.05)
    monkeypatch.setattr(run, "TARGET_DEVIATION", 0.0)

    def at_the_second_added(seconds, what):
        if what == f"w4a8_gemm {extra[1].label}":
            raise KeyboardInterrupt

    with pytest.raises(run.InterruptedRunError):
        new_run(path, mode="full", budget_s=40.0).measure(at_the_second_added)
    kept = len(profile.load(run.partial_path(path)).samples)
    again = new_run(path, mode="full", budget_s=40.0)
    assert again.resume().startswith(f"going on from {kept} points")
    made = again.measure(nothing)
    assert {Point(s.op, s.threads, dict(s.params)).key for s in made.samples} >= {p.key for p in extra}


def test_points_that_memory_does_not_hold_are_left_out_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(arena, "memory_bytes", lambda key: 8 << 20)
    large = [gemm(1, 4096, 4096, 1), gemm(1, 4096, 4096, 2)]
    made = new_run(tmp_path / "p.json", points=[*small_points(), *large]).measure(nothing)
    assert len(made.samples) == len(small_points())
    assert made.settings["notes"][0] == "2 points were left out: they need more than an eighth of the free memory"
