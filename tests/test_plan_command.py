"""``assay plan`` and ``assay video`` end to end."""

import csv
import io
import json
import re

import pytest

from answers import finite


def test_table(run):
    status, out, err = run("plan", "llama-3.1-8b", "--hardware", "h100-sxm", "--rate", "1,1000", "--explain")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Llama-3.1-8B on NVIDIA H100 SXM, 1000 tokens in, 300 out"
    assert "no steady state" in lines[1]
    assert sum(": capacity " in line for line in lines) == 3  # what moves the answer most
    assert lines[-1].startswith("Next: assay plan llama-3.1-8b")
    assert "InferenceX" in out  # where the price is from, and its date
    assert "2026-05" in out


def test_json_and_csv_agree(run):
    args = (
        "plan",
        "qwen3-30b-a3b",
        "--rate",
        "0.5,2",
        "--spec",
        "k=3:accept=0.8/0.7/0.6",
        "--weights",
        "w4a16,lm_head=bf16",
    )
    answer = json.loads(run(*args, "-o", "json")[1])
    assert answer["schema"] == "assay-plan"
    assert finite(answer)
    rows = list(csv.DictReader(io.StringIO(run(*args, "-o", "csv")[1])))
    for row, other in zip(answer["rows"], rows, strict=True):
        assert float(other["tpot_s"]) == row["tpot_s"]
        for name in ("utilisation", "running", "tpot_s", "tokens_per_s", "usd_per_million_out", "joules_per_token"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    one, two = answer["rows"]
    assert one["usd_per_request_paid"] > two["usd_per_request_paid"] > one["usd_per_request"]  # idle time is paid too


def test_a_task_of_reasoning_and_calls(run):
    plain = json.loads(run("plan", "llama-3.1-8b", "-o", "json")[1])["task"]
    args = ("plan", "llama-3.1-8b", "--hidden", "2000..20000", "--calls", "10..20", "--returned", "200..1000")
    agent = json.loads(run(*args, "--subscription", "20", "-o", "json")[1])["task"]
    assert plain["tasks_usd_p5"] == pytest.approx(plain["tasks_usd_p95"])
    assert agent["tasks_usd_p5"] < agent["tasks_usd_p50"] < agent["tasks_usd_p95"]
    assert agent["usd_per_task"] > 50 * plain["usd_per_task"]
    assert agent["tasks_a_month"] == pytest.approx(20 / agent["usd_per_task"])


def test_images_and_video_are_tokens(run):
    status, out, _ = run(
        "plan", "qwen2.5-vl-7b", "--images", "2", "--image-size", "448x448", "--video", "10", "--fps", "2"
    )
    assert status == 0
    assert "2 images of 448x448 are 512 tokens; 10 s of video at 2 frames a second are 2560 tokens." in out


def test_the_tower_is_paid(run):
    args = ("plan", "qwen2.5-vl-7b", "-o", "json")
    blind, seeing = (json.loads(run(*args, *more)[1])["task"] for more in ((), ("--images", "100")))
    assert blind["usd_of_vision"] == 0
    assert 0 < seeing["usd_of_vision"] < seeing["usd_per_task"]


def test_the_best_drafts_by_batch(run):
    args = ("plan", "llama-3.1-8b", "--spec", "best:accept=0.8/0.75/0.7:draft=0.03", "--rate", "1")
    found = json.loads(run(*args, "-o", "json")[1])["best_speculation"]
    assert [c["batch"] for c in found] == [1, 4, 16, 64, 256]
    assert found[0]["speedup"] > found[-1]["speedup"] >= 1
    assert found[0]["tokens_per_step"] >= found[-1]["tokens_per_step"]
    assert "Best drafts by batch: 1 at once: " in run(*args)[1]
    assert run("plan", "llama-3.1-8b", "--spec", "best:k=3")[0] == 2


def test_bought_and_rented(run):
    rented = json.loads(run("plan", "llama-3.1-8b", "--usd-per-hour", "2..2", "--rate", "4", "-o", "json")[1])["rows"][
        0
    ]
    owned = json.loads(
        run("plan", "llama-3.1-8b", "--buy", "35040..35040", "--kwh", "0.1..0.1", "--rate", "4", "-o", "json")[1]
    )
    bought = owned["rows"][0]
    # A dollar an hour of write-off and less than a dollar of electricity.
    assert 0.5 < bought["usd_per_request_paid"] / rented["usd_per_request_paid"] < 1.0


def test_profile(run, profile_path):
    args = (
        "plan",
        "llama-3.1-8b",
        "--profile",
        profile_path,
        "--weights",
        "w4a8",
        "--rate",
        "0.01",
        "--batch",
        "4",
    )
    status, out, _ = run(*args, "--isl", "64", "--osl", "16")
    assert status == 0
    assert "no calibrated kernel" in out  # attention is flagged
    assert "No price of this machine is known" in out
    priced = json.loads(
        run(*args, "--isl", "64", "--osl", "16", "--usd-per-hour", "1", "--watts", "100", "-o", "json")[1]
    )
    assert finite(priced)
    assert priced["rows"][0]["watts"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--rate", "0"), "rate"),
        (("--rate", "x"), "--rate"),
        (("--usd-per-hour", "-1"), "usd-per-hour"),
        (("--usd-per-hour", "1e9"), "usd-per-hour"),
        (("--usd-per-hour", "nan"), "usd-per-hour"),
        (("--usd-per-hour", "1", "--buy", "2"), "--buy"),
        (("--buy", "0"), "--buy"),
        (("--buy", "1", "--pue", "0.5..0.6"), "pue"),
        (("--buy", "1", "--years", "0"), "years"),
        (("--weights", "int3"), "weights"),
        (("--weights", "bf16,head=fp8"), "head"),
        (("--weights", "bf16,lm_head"), "ROLE=FORMAT"),
        (("--prefix-hit", "1"), "prefix_hit"),
        (("--skew", "-1"), "skew"),
        (("--spec", "k=0"), "1 to 64"),
        (("--spec", "zap=1"), "zap"),
        (("--hidden", "5..1"), "--hidden"),
        (("--calls", "0"), "task"),
        (("--images", "1"), "sees"),
        (("--batch", "0"), "batch"),
        (("--isl", "0"), "isl"),
        (("--hardware", "rtx-4090", "--weights", "bf16", "--isl", "4000000"), "room"),
        (("--hardware", "epyc-9654", "--devices", "2"), "link"),
        (("--hardware", "epyc-9654", "--profile", "x"), "--profile"),
        (("--seed", "-1"), "seed"),
        (("--subscription", "-5"), "usd_per_month"),
        (("--kwh", "1e9", "--buy", "30000"), "usd_per_kwh"),
        (("--buy", "1e30"), "usd: expected"),
        (("--buy", "3", "--years", "1e-9"), "years"),
        (("--buy", "3", "--pue", "50"), "pue"),
        (("--watts", "-4"), "--watts"),
        (("--watts", "400"), "--profile"),
        (("--rate", "1e300"), "rate_per_s"),
    ],
)
def test_bad_input_is_named(run, args, message):
    status, out, err = run("plan", "llama-3.1-8b", *args)
    assert (status, out) == (2, "")
    assert err.startswith("assay plan: ")
    assert message in err


def test_video(run):
    status, out, err = run("video")
    assert (status, err) == (0, "")
    assert "1904 s" in out
    rows = json.loads(run("video", "cogvideox-5b", "--steps", "25", "--hardware", "h100-sxm", "-o", "json")[1])["rows"]
    full = json.loads(run("video", "cogvideox-5b", "--hardware", "h100-sxm", "-o", "json")[1])["rows"]
    assert full[0]["time_s"] == pytest.approx(2 * rows[0]["time_s"])
    assert (full[0]["measured_s"], rows[0]["measured_s"]) == (90, None)
    assert finite(full)


def test_video_explained(run):
    status, out, _ = run("video", "cogvideox-2b", "--hardware", "h100-sxm", "--explain")
    assert status == 0
    assert "CogVideoX-2B on NVIDIA H100 SXM: memory " in out
    assert "What moves dollars a second most: " in out
    (row,) = json.loads(run("video", "cogvideox-2b", "--hardware", "h100-sxm", "--explain", "-o", "json")[1])["rows"]
    assert sum(row["terms"].values()) == pytest.approx(row["time_s"])
    causes = [i["input"] for i in row["inputs"]]
    assert sorted(causes) == ["memory", "price", "video compute"]
    swings = [max(i["at_low"], i["at_high"]) / min(i["at_low"], i["at_high"]) for i in row["inputs"]]
    assert swings == sorted(swings, reverse=True)
    free = run("video", "cogvideox-2b", "--hardware", "h100-sxm", "--explain", "--usd-per-hour", "0")
    assert (free[0], "What moves the time most: video compute" in free[1]) == (0, True)


def test_what_does_not_fit_says_how_many_would_hold_it(run):
    status, _, err = run("plan", "llama-3.1-8b", "--hardware", "groq-lpu", "--weights", "w4a16", "--rate", "0.05")
    assert status == 2
    count = re.search(r"(\d+) of them hold it", err)[1]
    fits, fewer = (
        run("plan", "llama-3.1-8b", "--hardware", "groq-lpu", "--weights", "w4a16", "--rate", "0.05", "--devices", n)[0]
        for n in (count, int(count) - 1)
    )
    assert (fits, fewer) == (0, 2)


def test_the_next_command_asks_for_the_same_machine(run):
    out = run("plan", "llama-3.1-8b", "--hardware", "a100-80gb-sxm", "--devices", "2", "--rate", "1")[1]
    assert out.splitlines()[-1] == "Next: assay plan llama-3.1-8b --hardware a100-80gb-sxm --devices 2 --explain"


@pytest.mark.parametrize(
    ("args", "message"),
    [(("sora",), "sora"), (("--hardware", "abacus"), "abacus"), (("--size", "x"), "--size"), (("--steps", "99999"), "steps"),
     (("--seed", "-1"), "seed"), (("--usd-per-hour", "2..1"), "usd-per-hour"), (("--size", "4x4"), "clip")],
)  # fmt: skip
def test_bad_video_is_named(run, args, message):
    status, out, err = run("video", *args)
    assert (status, out) == (2, "")
    assert message in err
