"""Reading and writing profiles: what is refused, and with which words."""

import copy
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay.cost.stored import summarise
from assay.errors import ProfileError
from assay.profile import (
    MAX_PROFILE_BYTES,
    Profile,
    Roof,
    Sample,
    compatible,
    default_profile_path,
    from_pytest_benchmark,
    load,
    save,
    spread_of,
)
from synthetic import synthetic_profile

GOOD = synthetic_profile(held_out=False, threads=(1,)).to_json()
GOOD["samples"] = GOOD["samples"][:4] + GOOD["samples"][-4:]  # copied by every test


def changed(path, value):
    data = copy.deepcopy(GOOD)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def test_round_trip(tmp_path):
    profile = synthetic_profile()
    profile.fits, profile.accuracy = summarise(profile)
    save(profile, tmp_path / "p.json")
    again = load(tmp_path / "p.json")
    assert again == profile
    assert again.to_json() == profile.to_json()


def test_saving_makes_folders_replaces_whole_and_leaves_no_temporary_file(tmp_path):
    target = tmp_path / "new" / "p.json"
    save(synthetic_profile(seed=1), target)
    save(synthetic_profile(seed=2), target)
    assert load(target).seed == 2
    assert [p.name for p in target.parent.iterdir()] == ["p.json"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0])
def test_a_bad_time_is_not_written(tmp_path, bad):
    profile = synthetic_profile(threads=(1,))
    save(profile, tmp_path / "p.json")
    before = (tmp_path / "p.json").read_bytes()
    s = profile.samples[3]
    profile.samples[3] = Sample(s.op, s.variant, s.threads, s.params, s.bytes, s.ops, (bad,), bad, 0.0)
    with pytest.raises(ProfileError):
        save(profile, tmp_path / "p.json")
    assert (tmp_path / "p.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema",), "other", r"\$\.schema: expected 'assay-profile', got 'other'"),
        (("schema_version",), 2, r"schema_version 2 is newer than this assay understands \(1\); upgrade assay"),
        (("schema_version",), 0, r"\$\.schema_version: expected an integer of at least 1, got 0"),
        (("schema_version",), True, r"\$\.schema_version"),
        (
            ("samples", 3, "time_s", 0),
            -1.0,
            r"\$\.samples\[3\]\.time_s\[0\]: expected a finite number above 0, got -1\.0",
        ),
        (("samples", 3, "time_s", 0), math.nan, r"\$\.samples\[3\]\.time_s\[0\]: expected a finite number"),
        (("samples", 3, "time_s"), [], r"\$\.samples\[3\]\.time_s: expected at least one number"),
        (("samples", 3, "median_s"), 1e9, r"\$\.samples\[3\]\.median_s: expected a median between"),
        (("samples", 3, "threads"), "2", r"\$\.samples\[3\]\.threads: expected an integer of at least 1, got '2'"),
        (("samples", 3, "threads"), True, r"\$\.samples\[3\]\.threads"),
        (("samples", 3, "bytes"), 10**400, r"\$\.samples\[3\]\.bytes: .* too large"),
        (("samples", 3, "held_out"), 1, r"\$\.samples\[3\]\.held_out: expected true or false, got 1"),
        (("samples", 3, "extra"), 1, r"\$\.samples\[3\]\.extra: expected only"),
        (("samples", 3, "params", "group_size"), 48, r"\$\.samples\[3\]\.params\.group_size: expected -1"),
        (("samples", 3, "params", "m"), 0, r"\$\.samples\[3\]\.params\.m"),
        (("samples", 3, "roof_near"), {"dram_read": -2}, r"\$\.samples\[3\]\.roof_near\.dram_read"),
        (("samples", -1, "params", "rule"), "best", r"params\.rule: expected greedy or rejection, got 'best'"),
        (("roofs", 0, "unit"), "GB/s", r"\$\.roofs\[0\]\.unit: expected bytes_per_s, got 'GB/s'"),
        (("roofs", 1), GOOD["roofs"][0], r"\$\.roofs\[1\]: .* twice"),
        (("machine",), [], r"\$\.machine: expected an object, got \[\]"),
        (("machine", "cores"), 0, r"\$\.machine\.cores"),
        (("machine", "caches"), {}, r"\$\.machine\.caches\.l1d_bytes: .*missing"),
        (
            ("settings", "mode"),
            "slow",
            r"\$\.settings\.mode: expected quick or full or imported or published, got 'slow'",
        ),
        (("fits",), {"w4a8_gemm": {"x": [math.inf]}}, r"\$\.fits\.w4a8_gemm\.x\[0\]: expected a finite number"),
        (("accuracy",), {"w4a8_gemm": {}}, r"\$\.accuracy\.w4a8_gemm\.n: .*missing"),
        (("command",), "assay", r"\$\.command: expected a list"),
        (("surprise",), 1, r"\$\.surprise: expected only"),
    ],
)
def test_refusals_name_place_got_and_wanted(path, value, words):
    with pytest.raises(ProfileError, match=words):
        Profile.from_json(changed(path, value))


@pytest.mark.parametrize("key", [k for k in GOOD if not k.startswith("schema")])
def test_every_key_is_needed(key):
    data = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(ProfileError, match=rf"\$\.{key}: .*missing"):
        Profile.from_json(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "expected JSON"),
        (b'{"schema": ', "expected JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"schema": NaN}', "finite numbers only, got NaN"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "expected JSON"),
        (b"\xff\xfe", "UTF-8"),
        (b"[]", "expected an object"),
    ],
)
def test_corrupt_files(tmp_path, text, words):
    path = tmp_path / "p.json"
    path.write_bytes(text)
    with pytest.raises(ProfileError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


def test_infinity_by_overflow_is_refused(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(GOOD).replace('"mode": "full"', '"mode": "full", "y": 1e999'))
    with pytest.raises(ProfileError, match=r"\$\.settings\.y: expected a finite number"):
        load(path)


def test_a_file_too_large_is_refused_unread(tmp_path):
    path = tmp_path / "p.json"
    with path.open("wb") as file:
        file.truncate(MAX_PROFILE_BYTES + 1)
    with pytest.raises(ProfileError, match="at most"):
        load(path)


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ProfileError, match="cannot be read"):
            load(path)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_no_json_value_breaks_validation(value):
    for path in (("machine",), ("samples", 0), ("samples", 0, "params"), ("roofs", 0), ("settings",), ("accuracy",)):
        try:
            taken = Profile.from_json(changed(path, value))
        except ProfileError as exc:  # refused by name; any other exception fails the test
            assert "$" in str(exc)  # noqa: PT017 - most values are refused, a few are taken
        else:
            assert Profile.from_json(taken.to_json()).to_json() == taken.to_json()


def test_of_takes_median_and_spread():
    roof = Roof.of("dram_read", 2, [1.0, 2.0, 3.0, 4.0, 100.0])
    assert (roof.median, roof.unit, roof.spread) == (3.0, "bytes_per_s", 2.0 / 3.0)
    assert spread_of([5.0]) == 0.0
    with pytest.raises(ValueError, match="unit"):
        Roof.of("l9_read", 1, [1.0])
    with pytest.raises(ValueError, match="time_s"):
        Sample.of("moe_route", "avx2", 1, {}, moved_bytes=1, ops=1, time_s=[])


def test_compatible():
    profile = synthetic_profile(threads=(1,))
    assert compatible(profile, "synthetic") is None
    warning = compatible(profile, "other")
    assert warning is not None
    assert "synthetic" in warning
    assert "other" in warning


def test_default_path():
    assert default_profile_path({"ASSAY_PROFILE": "/a/b.json", "XDG_CACHE_HOME": "/c"}) == Path("/a/b.json")
    assert default_profile_path({"XDG_CACHE_HOME": "/c"}) == Path("/c/assay/profile.json")
    assert default_profile_path({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache/assay/profile.json"
    assert default_profile_path({}) == Path.home() / ".cache/assay/profile.json"


# ---- pytest-benchmark ----

EXTRA = {
    "op": "w4a8_gemm", "variant": "avx2", "threads": 2, "bytes": 1e6, "ops": 2e6,
    "params": {"m": 1, "n": 1024, "k": 1024, "group_size": 32, "symmetric": True},
}  # fmt: skip


def benchmark_file(tmp_path, *benches, **top):
    path = tmp_path / "bench.json"
    info = {"cpu": {"brand_raw": "Some CPU", "count": 4}, "system": "Linux", "python_version": "3.11"}
    path.write_text(json.dumps({"machine_info": info, "datetime": "2026-11-23", "benchmarks": list(benches)} | top))
    return path


def bench(extra, times=(1e-3, 1.2e-3, 1.1e-3)):
    return {"name": "test_x", "extra_info": extra, "stats": {"data": list(times), "median": 1.1e-3}}


def test_import(tmp_path):
    roof = {"roof": "dram_read", "threads": 2, "unit": "bytes_per_s", "work": 2e7}
    near = EXTRA | {"held_out": True, "roof_near": {"dram_read": 1.9e10}}
    profile = from_pytest_benchmark(benchmark_file(tmp_path, bench(EXTRA), bench(near), bench(roof), bench({})))
    assert [s.held_out for s in profile.samples] == [False, True]
    assert profile.samples[0].time_s == (1e-3, 1.2e-3, 1.1e-3)
    assert profile.samples[0].median_s == 1.1e-3
    assert profile.samples[1].roof_near == {"dram_read": 1.9e10}
    assert profile.roofs[0].median == pytest.approx(2e7 / 1.1e-3)
    assert profile.machine.cpu == "Some CPU"
    assert profile.machine.memory_bytes is None
    assert profile.settings == {"mode": "imported", "threads": [2]}
    save(profile, tmp_path / "p.json")
    assert load(tmp_path / "p.json") == profile


def test_import_takes_our_machine_block(tmp_path):
    machine = GOOD["machine"]
    info = {"assay": {"machine": machine, "package": GOOD["package"]}}
    profile = from_pytest_benchmark(benchmark_file(tmp_path, bench(EXTRA), machine_info=info))
    assert profile.machine.fingerprint == machine["fingerprint"]
    assert profile.package == GOOD["package"]


@pytest.mark.parametrize(
    ("benches", "words"),
    [
        ([], "got none"),
        ([bench({})], "got none"),
        ([bench({k: v for k, v in EXTRA.items() if k != "bytes"})], r"benchmarks\[0\]\.extra_info\.bytes: .*missing"),
        ([bench(EXTRA, ())], r"stats\.data: expected at least one number"),
        ([bench(EXTRA, (-1.0,))], r"stats\.data\[0\]"),
        ([{"name": "x", "extra_info": EXTRA, "stats": {"median": 1.0}}], r"stats\.data: .*missing"),
        ([7], r"benchmarks\[0\]: expected an object"),
        ([bench({"roof": "dram_read", "threads": 1, "unit": "bytes_per_s", "work": 0})], r"extra_info\.work"),
    ],
)
def test_import_refusals(tmp_path, benches, words):
    with pytest.raises(ProfileError, match=words):
        from_pytest_benchmark(benchmark_file(tmp_path, *benches))


def test_import_of_something_else(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"benchmarks": 3}')
    with pytest.raises(ProfileError, match="pytest-benchmark"):
        from_pytest_benchmark(path)
