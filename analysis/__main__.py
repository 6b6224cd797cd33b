"""python -m analysis table | report | sources | compare ...   (--help after each says more)"""

import argparse
import sys

from analysis import UserError


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m analysis", description="What it costs, by the book and by the meter."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="table|report|sources|compare")

    table = commands.add_parser("table", help="the analytic cost table: formulas, or values of one configuration")
    table.add_argument("--format", choices=("text", "markdown", "latex", "csv"), default="text")
    table.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="model=llama3_8b seq_len=65536 world_size=8 ...: values and crossovers instead of formulas",
    )
    return main


def run(arguments: argparse.Namespace) -> int:
    """The exit code."""
    from analysis.table import printed

    print(printed(arguments.format, arguments.overrides))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(parser().parse_args()))
    except UserError as error:
        sys.exit(f"analysis: {error}")
