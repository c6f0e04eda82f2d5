"""What tasks ask for in tokens, and generated video: laws, ranges and published runs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.catalog import find_device, list_videos, load_model
from assay.cost.demand import Spread, Task, demand, encoder_flops, exactly, image_tokens, task_cost, video_tokens
from assay.cost.diffusion import clip, usd_per_second, video_model
from assay.cost.draws import Draws, interval
from assay.cost.machines import datasheet
from assay.model import Vision

QWEN, GEMMA = load_model("qwen2.5-vl-7b").vision, load_model("gemma-3-27b").vision
VIDEOS = {row["name"]: row for row in list_videos()}

# ---- pixels -------------------------------------------------------------------------------------------------


def test_image_tokens():
    assert image_tokens(QWEN, 448, 448) == 256
    assert image_tokens(QWEN, 896, 896) == 1024
    assert image_tokens(GEMMA, 4000, 300) == 256
    assert image_tokens(Vision(14, 1, 576, 1, 0), 1, 1) == 576


def test_video_tokens():
    # 10 s at 24 frames a second, two frames merged: 120 times 256.
    assert video_tokens(QWEN, 10, 24, 448, 448) == 120 * 256
    assert video_tokens(GEMMA, 10, 24, 448, 448) == 240 * 256


def test_a_tower_is_two_operations_a_weight_and_patch():
    assert encoder_flops(QWEN, 10) == pytest.approx(2 * QWEN.params * 40)
    assert encoder_flops(GEMMA, 256) == pytest.approx(2 * GEMMA.params * 4096)


@pytest.mark.parametrize(
    "call",
    [lambda: image_tokens(QWEN, 10, 10), lambda: image_tokens(QWEN, 0, 448), lambda: video_tokens(QWEN, 0, 24, 448, 448),
     lambda: video_tokens(QWEN, 10, math.nan, 448, 448)],
)  # fmt: skip
def test_impossible_pixels(call):
    with pytest.raises(ValueError, match="expected"):
        call()


# ---- tasks --------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 500), st.integers(0, 5000), st.integers(1, 40), st.integers(0, 1000))
def test_a_loop_is_its_sum(prompt, answer, hidden, calls, returned):
    """Call i reads the prompt and all that i calls before it said and got: added up one by one."""
    task = Task(exactly(prompt), exactly(answer), exactly(hidden), exactly(calls), exactly(returned))
    found = demand(task, 3)
    context, tokens_in, tokens_out = prompt, 0, 0
    for _ in range(calls):
        tokens_in += context
        tokens_out += answer + hidden
        context += answer + returned
    assert found.new_in + found.cached_in == pytest.approx(np.full(3, tokens_in))
    assert found.out == pytest.approx(np.full(3, tokens_out))
    cached = demand(Task(exactly(prompt), exactly(answer), exactly(hidden), exactly(calls), exactly(returned), 1.0), 3)
    # With all of the past cached, every token is read once.
    assert cached.new_in == pytest.approx(np.full(3, prompt + (calls - 1) * (answer + returned)))


def test_agents_are_quadratic_without_a_cache():
    few, many = (
        demand(Task(exactly(1000), exactly(500), calls=exactly(n), returned=exactly(500)), 1) for n in (10, 100)
    )
    assert many.new_in[0] / few.new_in[0] > 50


def test_spread():
    spread = Spread(1000.0, 10000.0)
    z = np.random.default_rng(0).standard_normal(200_000)
    values = spread.at(z)
    assert np.percentile(values, [5, 95]) == pytest.approx([1000, 10000], rel=0.03)
    assert values.mean() == pytest.approx(spread.mean, rel=0.02)
    assert spread.mean > spread.median
    assert exactly(0.0).at(z).max() == 0


def test_cost_of_a_task_has_two_spreads():
    draws = Draws(64)
    tokens = demand(Task(exactly(500), exactly(200), Spread(1000, 30000)))
    price = draws.between("price", 1e-6, 2e-6, 4e-6) * 1e6
    cost = task_cost(tokens, price, 5 * price)
    assert cost.tasks_usd[0] < cost.tasks_usd[1] < cost.tasks_usd[2]
    assert cost.mean_usd[0] > cost.tasks_usd[1]  # a few long ones weigh
    middle, low, high = interval(cost.mean_usd)
    assert low < middle < high
    assert cost.mean_out == pytest.approx(float(tokens.out.mean()))


@pytest.mark.parametrize(
    "make",
    [lambda: Spread(2.0, 1.0), lambda: Spread(0.0, 1.0), lambda: Spread(-1.0, 1.0), lambda: Spread(1.0, math.inf),
     lambda: Task(exactly(0), exactly(1)), lambda: Task(exactly(1), exactly(0)), lambda: Task(exactly(1), exactly(1), calls=exactly(0.5)),
     lambda: Task(exactly(1), exactly(1), prefix_hit=1.5),
     lambda: task_cost(demand(Task(exactly(1), exactly(1)), 1), np.ones(1), np.ones(1), cached=2.0)],
)  # fmt: skip
def test_impossible_tasks(make):
    with pytest.raises(ValueError, match="expected"):
        make()


# ---- generated video ------------------------------------------------------------------------------------------


def test_tokens_of_a_clip():
    """CogVideoX: 49 frames of 720 x 480 are 13 x 30 x 45 tokens and 226 of the prompt."""
    assert video_model(VIDEOS["cogvideox-5b"]).tokens(49, 720, 480) == 13 * 30 * 45 + 226
    # HunyuanVideo: 33 latent frames of 1280 x 720.
    assert video_model(VIDEOS["hunyuanvideo"]).tokens(129, 1280, 720) == 33 * 45 * 80 + 256


@pytest.mark.parametrize(
    ("name", "device", "seconds"),
    [(name, m["device"], m["seconds"]) for name, row in VIDEOS.items() for m in row["measured"]],
)
def test_published_clips(name, device, seconds):
    """Whole clips as their makers timed them lie in the interval, from 45 s to 32 minutes."""
    _, low, high = interval(clip(video_model(VIDEOS[name]), datasheet(find_device(device))).time_s)
    assert low * 0.93 <= seconds <= high * 1.07


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(sorted(VIDEOS)), st.integers(1, 60), st.integers(9, 97), st.sampled_from([256, 512, 1024]))
def test_work_grows_with_steps_frames_and_size(name, steps, frames, side):
    model, machine, none = video_model(VIDEOS[name]), datasheet(find_device("h200-sxm")), Draws(0)

    def work(**change):
        return clip(
            model, machine, none, **({"steps": steps, "frames": frames, "width": side, "height": side} | change)
        ).time_s[0]

    base = work()
    assert work(steps=2 * steps) == pytest.approx(2 * base)
    # The prompt's tokens and a last odd frame stay, so small clips grow less than twice; attention makes large ones more.
    assert work(frames=2 * frames) > base
    assert work(width=2 * side) > base
    assert work(frames=160, width=2048) > 2.0 * work(frames=160, width=1024)


def test_dollars_of_a_second():
    made = clip(video_model(VIDEOS["cogvideox-5b"]), datasheet(find_device("h100-sxm")), Draws(0))
    assert usd_per_second(made, np.array([3600.0]))[0] == pytest.approx(made.time_s[0] * 8 / 49)


@pytest.mark.parametrize("change", [{"steps": 20000}, {"frames": 0, "width": 8}, {"width": 8}, {"weights": "int3"}])
def test_impossible_clips(change):
    with pytest.raises(ValueError, match="expected"):
        clip(video_model(VIDEOS["cogvideox-5b"]), datasheet(find_device("h100-sxm")), **change)
    with pytest.raises(ValueError, match="room"):
        clip(video_model(VIDEOS["hunyuanvideo"]), datasheet(find_device("tpu-v5e")))
