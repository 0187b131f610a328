"""What a rank holds, for S2FT beside full fine-tuning and LoRA, from 7B to 405B."""

from pathlib import Path

import matplotlib.pyplot as plt

from plots import bars, style

# Parts of a bar: where the number is in an entry, and how it is drawn.
PARTS = {
    "weights": style.PARTS["weights"],
    "optimizer": style.PARTS["optimizer"],
    "gradients": style.PARTS["gradients"],
    "activations": style.PARTS["saved"],
}
COLUMNS = [
    *("model", "GPUs", "method", "trained, M", "weights, MiB", "gradients", "optimizer"),
    *("activations, GiB", "checkpointed", "all-gathers", "GiB", "reduce-scatters", "GiB"),
    "step, s",
]


def draw(document: dict, folder: Path) -> list[Path]:
    """A panel for each model and number of GPUs."""
    models = by_model(document)
    count = sum(map(len, models.values()))
    fig, panels = plt.subplots(
        len(models), 1, figsize=(style.WIDTH, 0.9 + 0.24 * count + 0.42 * len(models)),
        height_ratios=[len(of_model) for of_model in models.values()], squeeze=False,
    )  # fmt: skip
    for axes, ((model, gpus), entries) in zip(panels[:, 0], models.items(), strict=True):
        bars.names(axes, [entry["params"]["method"] for entry in entries])
        for place, entry in enumerate(entries):
            left = 0.0
            for part, look in PARTS.items():
                size = held(entry)[part] / 2**30
                axes.barh(place, size, bars.HEIGHT, left=left, **look.bar)
                left += size
            bars.note(axes, place, bars.digits(left))
        bars.scale(axes, "")
        axes.set_title(f"{model} on {gpus} GPUs", loc="left", weight="bold")
    panels[-1, 0].set_xlabel("GiB of one rank, activations with checkpointing", fontsize=8)
    style.legend(fig, bars.patches(PARTS.values()), columns=4, bottom=0.25)
    size = next(iter(models.values()))[0]["params"]
    caption = (
        f"Counted without a GPU, not measured: FSDP2, {size['sequences']} x {size['tokens']} "
        f"tokens a rank. {style.machine(document)}."
    )
    return [style.save(fig, folder / "plan.svg", caption)]


def rows(document: dict) -> list[list[str]]:
    """The names of the columns, then a row for each plan."""
    return [COLUMNS, *map(_row, document["benchmarks"])]


def by_model(document: dict) -> dict[tuple[str, int], list[dict]]:
    found: dict[tuple[str, int], list[dict]] = {}
    for entry in document["benchmarks"]:
        params = entry["params"]
        found.setdefault((params["model"], params["gpus"]), []).append(entry)
    return found


def held(entry: dict) -> dict[str, int]:
    """Bytes by part."""
    return entry["extra_info"] | {
        "activations": entry["extra_info"]["checkpointed"]["activations"],
    }


def _row(entry: dict) -> list[str]:
    params, found = entry["params"], entry["extra_info"]
    plain, checkpointed = found["plain"], found["checkpointed"]
    times = found["seconds"]["checkpointed"].values()
    return [
        *(params["model"], str(params["gpus"]), params["method"]),
        f"{found['trained'] / 1e6:,.1f}",
        *(f"{found[part] / 2**20:,.0f}" for part in ("weights", "gradients", "optimizer")),
        *(f"{step['activations'] / 2**30:.2f}" for step in (plain, checkpointed)),
        *(str(plain["gathers"]), f"{plain['gathered'] / 2**30:,.1f}"),
        *(str(plain["scatters"]), f"{plain['scattered'] / 2**30:,.2f}"),
        f"{max(times):.2f} to {sum(times):.2f}",
    ]
