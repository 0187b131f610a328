"""python -m plots [--results DIR] [--out DIR]"""

import argparse
from pathlib import Path

from plots import draw_all

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
    args = parser.parse_args(argv)
    figures = draw_all(args.results, args.out)
    for figure in figures:
        print(figure)
    if not figures:
        parser.error(f"no results to draw in {args.results}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
