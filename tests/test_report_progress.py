"""Progress: a bar on a terminal, silence or a line now and then elsewhere."""

import io
import re

import pytest

from assay.report.progress import Progress, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_silent_when_not_a_terminal():
    out = io.StringIO()
    with Progress(10, "work", stream=out) as bar:
        bar.advance(5)
    assert out.getvalue() == ""


def test_lines_every_five_seconds_when_asked():
    out, clock = io.StringIO(), Clock()
    with Progress(20, "work", show=True, stream=out, clock=clock) as bar:
        for _ in range(10):
            clock.now += 2
            bar.advance(1, "a point")
    lines = out.getvalue().splitlines()
    assert lines == [
        "work: 15%, 6 s done, 34 s left, a point",
        "work: 30%, 12 s done, 28 s left, a point",
        "work: 45%, 18 s done, 22 s left, a point",
    ]


def test_bar_on_a_terminal():
    out = Terminal()
    with Progress(10, "work", stream=out) as bar:
        for _ in range(12):  # more than was expected: stays at 100%
            bar.advance(1, "x")
    text = out.getvalue()
    assert "work:" in text
    assert "left" in text
    assert max(int(p) for p in re.findall(r"(\d+)%", text)) <= 100


def test_no_bar_when_refused():
    out = Terminal()
    with Progress(10, "work", show=False, stream=out) as bar:
        bar.advance(10)
    assert out.getvalue() == ""


def test_no_work_at_all():
    clock, out = Clock(), io.StringIO()
    with Progress(0, "work", show=True, stream=out, clock=clock) as bar:
        clock.now = 9
        bar.advance(0)
    assert out.getvalue() == "work: 100%, 9 s done, 0 s left\n"


def test_track_yields_everything_and_wants_a_weight_each():
    out = io.StringIO()
    assert list(track("abc", [1, 2, 3], "work", stream=out)) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="zip"):
        list(track("abc", [1, 2], "work", stream=out))
