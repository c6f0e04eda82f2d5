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
            sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 done, 2 bad input, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else argv
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
        print(f"assay {args.command}: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"assay {args.command}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
