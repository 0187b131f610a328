"""Tables as Markdown has them."""


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, rule, *rows])
