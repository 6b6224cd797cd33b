"""python -m analysis COMMAND ...   (--help lists the commands)"""

import argparse
import sys
from pathlib import Path

from analysis import UserError

SOURCES_FROM = Path("runs/quickstart")  # the bytes beside sources, where nothing else is said
FORMATS = ("text", "markdown", "latex", "csv")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="python -m analysis", description="What it costs, by the book and by the meter."
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    table = commands.add_parser("table", help="the analytic cost table: formulas, or values of one configuration")
    table.add_argument("--format", choices=FORMATS, default="text")
    table.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="model=llama3_8b seq_len=65536 world_size=8 ...: values and crossovers instead of formulas",
    )

    report = commands.add_parser("report", help="runs/NAME/report/: one page, pictures, results.csv with the formulas")
    report.add_argument("folder", type=Path, metavar="runs/NAME")

    sources = commands.add_parser("sources", help="strategies side by side, with the bytes that each line sent")
    sources.add_argument("strategies", nargs="*", metavar="STRATEGY", help="default: all of them")
    sources.add_argument(
        "--run",
        type=Path,
        metavar="runs/NAME",
        help=f"the sweep whose comm.csv gives the bytes; default: {SOURCES_FROM}, if it is there",
    )
    sources.add_argument(
        "--out", type=Path, metavar="FILE", help="default: runs/sources/STRATEGY-STRATEGY.html, or all.html"
    )

    exchanges = commands.add_parser("exchanges", help="who sends what to whom in a block, as one picture")
    exchanges.add_argument("strategies", nargs="+", metavar="STRATEGY")
    exchanges.add_argument(
        "--run", type=Path, metavar="runs/NAME", help="of exchanges=true; default: runs/reference/exchanges"
    )
    exchanges.add_argument("--out", type=Path, metavar="FILE.svg", default=Path("runs/exchanges.svg"))

    compare = commands.add_parser("compare", help="two sweeps of the same configurations: faster, slower, bigger")
    compare.add_argument("a", type=Path, metavar="runs/A")
    compare.add_argument("b", type=Path, metavar="runs/B")

    columns = commands.add_parser("columns", help="every column of results.csv: its unit and its meaning")
    columns.add_argument("--format", choices=FORMATS, default="text")

    reference = commands.add_parser("reference", help="all keys and all columns: docs/keys.md and docs/columns.md")
    reference.add_argument("--out", type=Path, metavar="FOLDER", default=Path("docs"), help="default: docs")

    calibrate = commands.add_parser("calibrate", help="a cluster's file from what sweep=calibrate measured on it")
    calibrate.add_argument("folder", type=Path, metavar="runs/calibrate")
    calibrate.add_argument("--out", type=Path, metavar="FILE.yaml", help="default: cluster.yaml in the folder")
    validate = commands.add_parser("validate", help="predicted step times judged by measured ones")
    validate.add_argument(
        "sources",
        nargs="*",
        metavar="published|runs/mesh2",
        default=["published"],
        help="published: analysis/data/steps.csv | a sweep of real rows",
    )
    validate.add_argument("--calibration", type=Path, metavar="runs/calibrate", default=Path("runs/calibrate"))
    validate.add_argument("--out", type=Path, metavar="PAGE.md", help="also as a page, with a picture beside it")
    timeline = commands.add_parser("timeline", help="one block of predicted steps, drawn from their traces")
    timeline.add_argument("folder", type=Path, metavar="runs/NAME")
    published = commands.add_parser(
        "published", help="published memory figures beside ours, simulated where they are not yet"
    )
    published.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        default=Path("docs/published_memory.md"),
        help="default: docs/published_memory.md",
    )
    advise = commands.add_parser(
        "advise",
        help="which strategy on which mesh: everything legal, priced and weighed",
        description="Prices every legal strategy, mesh, zero_stage, recompute, placement and ring.layout on a "
        "cluster's clock, and says which are fastest of what fits, and why the others are not. Keys are those of "
        "python -m bench; what is given stays as it is.",
    )
    advise.add_argument(
        "overrides",
        nargs="+",
        metavar="key=value",
        help="model=llama3_8b cluster=h100 world_size=64 seq_len=131072 batch_size=4 ...",
    )
    advise.add_argument("--verify", type=int, default=0, metavar="N", help="simulate the best N, and show both")
    advise.add_argument(
        "--out", type=Path, metavar="FOLDER", default=Path("runs/advise"), help="page, map, csv; default: runs/advise"
    )
    literature = commands.add_parser("literature", help="the methods found since 2024: docs/literature.md")
    literature.add_argument(
        "folder",
        type=Path,
        nargs="?",
        default=Path("runs/reference/literature"),
        help="of sweep=literature; default: runs/reference/literature",
    )
    dynamic = commands.add_parser(
        "dynamic", help="packed documents: a ring for each, as wide as it is long, beside one ring for all"
    )
    dynamic.add_argument(
        "overrides",
        nargs="+",
        metavar="key=value",
        help="model=llama3_8b documents=histogram world_size=64 seq_len=524288 cluster=h100 ...",
    )
    return main


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if something could not be read, or does not agree with what it is held against."""
    text, problems = answer(arguments)
    print(text)
    for problem in problems:
        print(f"analysis: {problem}", file=sys.stderr)
    return 1 if problems else 0


def answer(arguments: argparse.Namespace) -> tuple[object, list[str]]:
    """What a command prints, and the problems that it found."""
    if arguments.command == "table":
        from analysis import table

        return table.printed(arguments.format, arguments.overrides)
    if arguments.command == "columns":
        from analysis import columns

        return columns.printed(arguments.format), []
    if arguments.command == "exchanges":
        from analysis import exchanges, reading

        sweep = reading.load(arguments.run) if arguments.run else None
        return exchanges.write(arguments.strategies, sweep, arguments.out), []
    if arguments.command == "reference":
        from analysis import reference

        return reference.write(arguments.out), []
    if arguments.command == "compare":
        from analysis import compare

        return compare.printed(arguments.a, arguments.b)
    if arguments.command == "calibrate":
        from analysis import calibrate

        return calibrate.printed(arguments.folder, arguments.out), []
    if arguments.command == "validate":
        from analysis import validate

        return validate.printed(arguments.sources, arguments.calibration, arguments.out), []
    if arguments.command == "timeline":
        from analysis import timeline

        return timeline.printed(arguments.folder), []
    if arguments.command == "advise":
        from analysis import advise

        return advise.printed(arguments.overrides, arguments.out, arguments.verify)
    if arguments.command == "dynamic":
        from analysis import dynamic

        return dynamic.printed(arguments.overrides), []
    if arguments.command == "literature":
        from analysis import literature

        return literature.printed(arguments.folder), []
    if arguments.command == "published":
        from analysis import published

        return published.write(arguments.out), []
    if arguments.command == "report":
        from analysis import report

        return arguments.folder / "report" / "index.html", report.write(arguments.folder)
    from analysis import reading, sources

    measured = arguments.run or (SOURCES_FROM if any(SOURCES_FROM.glob("*/comm.csv")) else None)
    out = arguments.out or Path("runs/sources", f"{'-'.join(arguments.strategies) or 'all'}.html")
    return sources.write(arguments.strategies, reading.load(measured) if measured else None, out), []


if __name__ == "__main__":
    try:
        sys.exit(run(parser().parse_args()))
    except UserError as error:
        sys.exit(f"analysis: {error}")
