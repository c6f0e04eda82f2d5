"""The page and the pictures: self-contained, honest about misses, safe against hostile text."""

import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from assay.cli import main
from assay.cost.stored import summarise
from assay.errors import UnsupportedError
from assay.measure import summary
from assay.profile import save
from assay.report import plot
from assay.report.html import Section, page
from assay.report.table import Column
from synthetic import synthetic_profile


@pytest.fixture(scope="module")
def made():
    """A profile one of whose held-out points is three times slower than the law says."""
    profile = synthetic_profile()
    i = next(i for i, s in enumerate(profile.samples) if s.held_out and s.op == "w4a8_gemm")
    slow = profile.samples[i]
    profile.samples[i] = replace(slow, time_s=tuple(3 * t for t in slow.time_s), median_s=3 * slow.median_s)
    profile.machine = replace(profile.machine, cpu="<script>alert(1)</script> & Co.")
    profile.fits, profile.accuracy = summarise(profile)
    profile.complete = True
    return profile


@pytest.fixture(scope="module")
def path(made, tmp_path_factory):
    where = tmp_path_factory.mktemp("profile") / "p.json"
    save(made, where)
    return where


class Tags(HTMLParser):
    """Tags with their attributes; every opened one is closed in order."""

    VOID = ("meta", "br", "img", "link", "path", "use", "image")

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def text(path, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert main(["report", "--profile", str(path), "-o", str(out)]) == 0
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


def test_a_page_needs_nothing_from_elsewhere_and_no_script(text):
    tags = Tags()
    tags.feed(text)
    assert not tags.open
    names = {tag for tag, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "image"}
    for tag, attrs in tags.seen:
        for key in ("href", "src", "xlink:href"):
            assert attrs.get(key, "#").startswith("#"), (tag, attrs)
        assert not any(key.startswith("on") for key in attrs)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    ids = [attrs["id"] for _, attrs in tags.seen if "id" in attrs]
    links = {attrs["href"][1:] for tag, attrs in tags.seen if tag == "a"}
    assert links <= set(ids)


def test_text_from_a_profile_stays_text(text):
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; Co." in text


def test_a_page_shows_the_miss_and_every_claim(text, made):
    missed = [row for row in summary.point_rows(made) if row["held_out"] and row["error"] and abs(row["error"]) > 0.1]
    assert missed
    assert all(row["label"] in text for row in missed)
    assert '<tr class="bad">' in text
    held_out = sum(s.held_out for s in made.samples)
    assert f"{len(missed)} of {held_out} held-out points are missed by more than 10.0%" in text
    for number in range(1, 39):
        assert f">C{number:02d}</td>" in text
    for title in (
        "Roofs and kernels",
        "How wrong it may be",
        "Do the gains multiply?",
        "Claims, recomputed",
        "The machine",
    ):
        assert f"<h2>{title}</h2>" in text


@pytest.mark.parametrize("kind", ["roofline", "accuracy", "errors", "widths", "speedups", "interactions"])
@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_every_picture_is_written_by_its_name(kind, suffix, path, tmp_path, capsys):
    out = tmp_path / f"{kind}.{suffix}"
    words = ["--hardware", "h200-sxm"] if kind in ("speedups", "interactions") else ["--profile", str(path)]
    assert main(["plot", kind, "-o", str(out), *words]) == 0
    assert str(out) in capsys.readouterr().out
    data = out.read_bytes()
    if suffix == "png":
        assert data.startswith(b"\x89PNG")
    else:
        assert ET.fromstring(data).tag.endswith("svg")
    assert list(tmp_path.iterdir()) == [out]


def test_the_same_rows_give_the_same_picture(made):
    rows = [row for row in summary.point_rows(made) if row["predicted_s"]]
    assert plot.svg(plot.accuracy(rows)) == plot.svg(plot.accuracy(rows))


def test_pictures_leave_matplotlib_as_it_was(made):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot.svg(plot.errors([row for row in summary.point_rows(made) if row["predicted_s"]]))
    assert dict(matplotlib.rcParams) == before


def test_bad_requests_say_what_was_wanted(path, tmp_path, capsys, monkeypatch):
    assert main(["plot", "roofline", "--profile", str(path), "-o", str(tmp_path / "a.gif")]) == 2
    assert "expected a file name that ends in .svg, .png or .pdf, got 'a.gif'" in capsys.readouterr().err
    assert main(["plot", "widths", "--profile", str(path), "--threads", "7"]) == 2
    assert "--threads: expected one of 1, 2, got 7" in capsys.readouterr().err
    assert main(["report", "--profile", str(tmp_path / "none.json"), "-o", str(tmp_path / "r.html")]) == 2
    assert not list(tmp_path.glob("r.html*"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"pictures need matplotlib: pip install 'assay\[plot\]'"):
        plot.errors([])


def test_point_rows_hold_the_predictions_of_the_profile(made):
    rows = summary.point_rows(made)
    assert len(rows) == len(made.samples)
    for row, sample in zip(rows, made.samples, strict=True):
        assert row["measured_s"] == sample.median_s
        assert row["error"] == pytest.approx(row["predicted_s"] / sample.median_s - 1)
    worst = max((row for row in rows if row["held_out"]), key=lambda row: abs(row["error"]))
    assert worst["error"] == pytest.approx(-2 / 3, abs=0.1)
    assert not worst["inside"]


def test_a_table_of_a_page_marks_rows_and_escapes_cells():
    section = Section("A & B").table([{"x": "<b>"}, {"x": None}], [Column("x", "x>y", align="right")], {1: "bad"})
    shown = page("t", "v", [section], "f")
    assert "<h2>A &amp; B</h2>" in shown
    assert '<td class="short right">&lt;b&gt;</td>' in shown
    assert '<tr class="bad"><td class="short right">-</td></tr>' in shown
    assert '<th class="right">x&gt;y</th>' in shown
