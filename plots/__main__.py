"""python -m plots [--results DIR] [--out DIR] [--readme README.md [--check]]"""

import argparse
from pathlib import Path

from plots import draw_all, readme

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m plots", description="Redraws every figure from the results."
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=ROOT / "bench" / "results",
        help="folder of <device>/<suite>.json; default bench/results",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "plots" / "figures",
        help="folder of the figures; default plots/figures",
    )
    parser.add_argument(
        "--readme", type=Path, help="also make the tables of this page anew: README.md"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="draw and write nothing; fail if the tables of --readme are not those of the results",
    )
    args = parser.parse_args(argv)
    page = None if args.readme is None else readme.update(args.readme, args.results)
    if args.check:
        if args.readme is None:
            parser.error("--check needs --readme")
        if page != args.readme.read_text():
            parser.error(f"the tables of {args.readme} are not those of the results: make plots")
        return 0
    figures = draw_all(args.results, args.out)
    for figure in figures:
        print(figure)
    if not figures:
        parser.error(f"no results to draw in {args.results}")
    if page is not None:
        args.readme.write_text(page)
        print(args.readme)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
