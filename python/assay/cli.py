"""The ``assay`` command. Each subcommand lives in a module of :mod:`assay.commands`, imported only when it is chosen."""

import argparse
import os
import sys
from importlib import import_module

COMMANDS = {
    "doctor": "what is here: machine, kernel variants, threads, libraries, GPU",
    "calibrate": "measure this machine with the real kernels and write a profile",
    "predict": "price a model on a calibrated machine",
    "plan": "plan a server: what it holds, how fast it answers, what tokens and tasks cost",
    "video": "price generated video by steps, frames and size",
    "techniques": "what techniques gain, alone and together, and how much they get in each other's way",
    "claims": "recompute claims about the cost of inference, each with its arithmetic and a verdict",
    "inspect": "what a model file holds, and what INT4 would cost it in accuracy",
    "convert": "write a checkpoint again: ready to be packed, or in another format",
    "profile": "import and show calibration profiles",
    "report": "one page: verdict, roofs, accuracy with its misses, techniques, claims, machine",
    "plot": "one picture of a profile or of what techniques bring",
    "validate": "score the cost model on measured tables, on points it never saw",
}

EXAMPLES = {
    "doctor": "assay doctor --json",
    "calibrate": "assay calibrate --quick",
    "predict": "assay predict mixtral-8x7b --precision int4 --batch 1,8 --usd-per-hour 0.10",
    "plan": "assay plan llama-3.1-8b --hardware h200-sxm --rate 1,4 --weights w4a16",
    "video": "assay video cogvideox-5b --hardware h100-sxm --steps 25",
    "techniques": "assay techniques mixtral-8x7b --with moe,int4,spec:k=4 --largest 2",
    "claims": "assay claims C10 C11",
    "inspect": "assay inspect model.gguf --error",
    "convert": "assay convert model.gguf -o packed.safetensors",
    "profile": "assay profile import bench.json -o profile.json",
    "report": "assay report -o report.html",
    "plot": "assay plot roofline -o roofline.svg",
    "validate": "assay validate gemm_perf.parquet --hold-out models",
}


class _Version(argparse.Action):
    """Prints the version; looked up only when asked for, for package metadata is slow to read."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import assay

        print(f"assay {assay.__version__}")
        parser.exit()


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="assay", description="Kernels for cheap LLM inference, and a calibrated model of what they cost."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        if name == chosen:
            module = import_module(f"assay.commands.{name}")
            module.add_arguments(sub)
            sub.formatter_class = argparse.RawDescriptionHelpFormatter  # examples stay whole, to be copied
            sub.epilog = f"{sub.epilog}\n\n" if sub.epilog else ""
            sub.epilog += f"example: {EXAMPLES[name]}"
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    try:
        return _run(argv)
    except KeyboardInterrupt:
        print(f"assay {' '.join(argv[:1])}: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    parser = _parser(argv)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    from .errors import AssayError

    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (AssayError, ValueError, TypeError, OSError) as exc:
        if isinstance(exc, BrokenPipeError):  # the reader of our output has left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        if os.environ.get("ASSAY_DEBUG"):
            raise
        what = str(exc)
        if isinstance(exc, OSError) and exc.filename is not None and exc.strerror:
            what = f"{exc.filename}: {exc.strerror}"
        print(f"assay {args.command}: {what}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
