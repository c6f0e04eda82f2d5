"""Our kernels against their bounds.

python benchmarks/compare.py bounds [--shapes 4096x4096,...] [--m 1,64] [--threads 1,2] [--group 32,128] [--kind sym,asym]
                                    [--processes 5] [--passes 5] [-o table|md|csv|json]
"""

import argparse
import sys
from itertools import product

import bounds

#: N x K of Llama-3-8B and Mixtral, Gemma-3-270M, Qwen3-30B-A3B's experts.
SHAPES = "4096x4096,14336x4096,4096x14336,1024x4096,2048x640,262144x640,768x2048,2048x768"


def integers(text: str) -> list[int]:
    """ "1,2" as [1, 2]."""
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    """ "4096x4096,768x2048" as [(4096, 4096), (768, 2048)]."""
    pairs = [part.split("x") for part in text.split(",")]
    return [(int(n), int(k)) for n, k in pairs]


def kinds(text: str) -> list[bool]:
    """ "sym,asym" as [True, False]."""
    return [{"sym": True, "asym": False}[part] for part in text.split(",")]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--threads", type=integers, default=[1, 2])
    common.add_argument("--passes", type=int, default=5)
    common.add_argument("-o", "--output", choices=("table", "md", "csv", "json"), default="table")
    weights = argparse.ArgumentParser(add_help=False)
    weights.add_argument("--shapes", type=shapes, default=SHAPES, help="N x K, as 4096x4096,1024x4096")
    weights.add_argument("--m", type=integers, help="rows of activations, as 1,2,4")
    weights.add_argument("--group", type=integers, default=[32, 128])
    weights.add_argument("--kind", type=kinds, default="sym,asym")
    one = commands.add_parser("bounds", parents=[common, weights], help="our w4a8 kernel against its bounds")
    one.add_argument("--processes", type=int, default=5)
    return parser.parse_args()


def main() -> int:
    """Runs the command."""
    args = parse()
    configs = [
        {"n": n, "k": k, "threads": threads, "group_size": group, "symmetric": symmetric}
        for (n, k), group, symmetric, threads in product(args.shapes, args.group, args.kind, args.threads)
    ]
    return bounds.run(args, configs)


if __name__ == "__main__":
    sys.exit(main())
