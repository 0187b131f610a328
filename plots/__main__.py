"""python -m plots [--results DIR] [--out DIR] [--pages README.md ... [--check]]"""

import argparse
from pathlib import Path

from plots import draw_all, tables

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m plots", description="Draws every figure from the results."
    )
    results, figures = ROOT / "bench" / "results", ROOT / "plots" / "figures"
    parser.add_argument("--results", type=Path, default=results, help="default bench/results")
    parser.add_argument("--out", type=Path, default=figures, help="default plots/figures")
    pages = "also write the tables of these pages"
    parser.add_argument("--pages", type=Path, nargs="+", default=[], help=pages)
    check = "write nothing; fail if a table of --pages is not that of the results"
    parser.add_argument("--check", action="store_true", help=check)
    args = parser.parse_args(argv)
    if args.check and not args.pages:
        parser.error("--check needs --pages")
    texts = {page: tables.update(page, args.results) for page in args.pages}
    stale = [str(page) for page, text in texts.items() if text != page.read_text()]
    if args.check:
        if stale:
            parser.error(f"tables are not those of the results: {', '.join(stale)}: make plots")
        return 0
    figures = draw_all(args.results, args.out)
    for figure in figures:
        print(figure)
    if not figures:
        parser.error(f"no results to draw in {args.results}")
    for page, text in texts.items():
        page.write_text(text)
        print(page)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
