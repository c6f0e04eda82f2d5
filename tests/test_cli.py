"""The command itself: its help, its ends, and what it says of files that are not there."""

import shlex
import subprocess
import sys

import pytest

from assay import cli


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_help_ends_with_an_example_that_the_command_takes(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    example = cli.EXAMPLES[name]
    assert " ".join(capsys.readouterr().out.split()).endswith(f"example: {example}")
    words = shlex.split(example)
    assert words[:2] == ["assay", name]
    assert cli._parser(words[1:]).parse_args(words[1:]).command == name


@pytest.mark.parametrize("args", [("claims",), ("claims", "-o", "csv"), ("--version",)])
def test_closed_output_is_no_error(args):
    command = shlex.join([sys.executable, "-m", "assay.cli", *args])
    done = subprocess.run(["sh", "-c", f"{command} >&-"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_leaves_is_no_error():
    command = shlex.join([sys.executable, "-m", "assay.cli", "claims"])
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("38 claims: ")


def test_interrupted_before_the_command_is_chosen(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", interrupted)
    assert cli.main(["claims"]) == 130
    assert capsys.readouterr().err == "assay claims: interrupted\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("plot", "speedups", "-o", "/nowhere/x.svg"), "/nowhere/.x.svg.partial: No such file or directory"),
        (("inspect", "/nowhere/x.gguf"), "/nowhere/x.gguf: cannot be read: No such file or directory"),
        (("video", "--steps", "0"), "steps: expected 1 to 10000, got 0"),
        (("video", "--frames", "0"), "clip: expected at least 1 frame"),
        (("video", "--size", "0x0"), "clip: expected at least 1 frame"),
        (("plan", "llama-3.1-8b", "--prompt", "-5"), "--prompt: expected at least 0, got '-5'"),
        (("plan", "llama-3.1-8b", "--calls", "0"), "got 1000 in, 300 out and 0 calls"),
    ],
)
def test_bad_words_are_named(args, message, capsys):
    if args[0] == "plot":
        pytest.importorskip("matplotlib")
    assert cli.main(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
