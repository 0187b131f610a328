"""The command line: s2kernels finetune | generate | serve | inspect | merge | export-lora | select.

What a user gives is looked at before anything long begins. What does not fit is told in one line on
stderr, with exit code 2, as is a full disk; another exception out of the training itself keeps its
traceback.
"""

import argparse
import errno
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from s2kernels.cli import commands, serving_options
from s2kernels.cli.runs import CHOICE

STRATEGIES = ("weight", "activation", "product", "gradient")

FINETUNE = """\
Train an S2FT adapter: a few attention heads and FFN channels of each block of a causal language
model. The base stays as it is.

DATA is a JSON list or JSON lines, and its fields say what it is:

  {"instruction": ..., "input": ..., "output": ...}    input may be absent or empty
      The model is shown Alpaca's prompt and learns the output alone, which ends with the end
      token. What is longer than --max-length is cut. The prompt:

        Below is an instruction that describes a task. Write a response that appropriately
        completes the request.\\n\\n### Instruction:\\n{instruction}\\n\\n### Response:\\n

      and with an input:

        Below is an instruction that describes a task, paired with an input that provides further
        context. Write a response that appropriately completes the request.\\n\\n
        ### Instruction:\\n{instruction}\\n\\n### Input:\\n{input}\\n\\n### Response:\\n

  {"text": ...}
      The model learns all of it; what is longer than --max-length is split.

OUTPUT gets the adapter and the tokenizer, metrics.json, loss.svg, and checkpoints to resume from.
"""

FINETUNE_EXAMPLES = """\
examples:
  s2kernels finetune --model models/llama --data train.json --output adapter \\
      --heads 2 --channels 0.02 --bf16 --epochs 3
  s2kernels finetune ... --strategy activation --smallest    first look at 1 % of the data, and
      train the heads and channels that are least active on it
  s2kernels finetune ... --output adapter --resume        go on after an interruption

  a trial without any download: a random model, saved in trial/base, and bytes as tokens
  s2kernels finetune --config '{"model_type": "llama", "hidden_size": 64, "vocab_size": 259,
      "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
      "initializer_range": 0.2}' --tokenizer bytes --data train.json --output trial --lr 0.01

One GPU is used; CUDA_VISIBLE_DEVICES chooses which.
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, --help as it is written here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; SystemExit with code 2 where something given does not fit."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        work = args.prepare(args)
    except ModuleNotFoundError as error:
        extra = "serve" if error.name in ("starlette", "uvicorn") else "peft"
        args.parser.error(f"{error.name} is missing: pip install -e '.[{extra}]' in the clone")
    except Exception as error:
        _stop_if_full(args, error)
        if not isinstance(error, (ValueError, OSError)):
            raise
        args.parser.error(str(error))
    if work is not None:
        try:
            work()
        except Exception as error:
            _stop_if_full(args, error)
            raise


def _stop_if_full(args: argparse.Namespace, error: BaseException) -> None:
    """Stop where a file could not be written; safetensors and torch say so in their own ways."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "(os error 28)" in text or "unexpected pos" in text:
        args.parser.error(f"there is no space left on the disk: {text}")


def _budget(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError
    return value


def _positive_share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise ValueError
    return value


def _amount(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise ValueError
    return value


def _steps(text: str) -> float:
    return 0.0 if float(text) == 0 else _amount(text)


# what argparse calls them in its messages
_budget.__name__ = "count or share"
_count.__name__ = "count"
_share.__name__ = "share below 1"
_positive_share.__name__ = "share above 0"
_amount.__name__ = _steps.__name__ = "positive number"


def _parser() -> _Parser:
    parser = _Parser(prog="s2kernels", description="Sparse fine-tuning of language models (S2FT).")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, prepare: Callable, summary: str, **texts: Any) -> _Parser:
        command: _Parser = subparsers.add_parser(name, help=summary, **texts)
        command.set_defaults(prepare=prepare, parser=command)
        return command

    command = add(
        "finetune",
        commands.finetune,
        "train an adapter",
        description=FINETUNE.replace("%", "%%"),
        epilog=FINETUNE_EXAMPLES,
    )
    _add_finetune(command)

    command = add(
        "generate",
        commands.generate,
        "continue prompts with several adapters",
        description=serving_options.GENERATE,
        epilog=serving_options.GENERATE_EXAMPLES,
    )
    serving_options.add_generate(command)

    command = add(
        "serve",
        commands.serve,
        "serve adapters over HTTP",
        description=serving_options.SERVE,
        epilog=serving_options.SERVE_EXAMPLES,
    )
    serving_options.add_serve(command)

    command = add(
        "inspect",
        commands.inspect,
        "show what an adapter trains",
        description="Show what an adapter, of S2FT or SpIEL, trains, layer by layer. 'lora rank' "
        "is the rank of the LoRA that equals the slice.",
        epilog="example:\n  s2kernels inspect adapter --json",
    )
    command.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    command.add_argument("--json", action="store_true", help="as JSON")

    command = add(
        "merge",
        commands.merge,
        "write base and adapter as one model",
        description="Write base + adapter, of S2FT or SpIEL, as a model of its own, with the "
        "tokenizer if there is one.",
        epilog="example:\n  s2kernels merge adapter --output merged --dtype bfloat16",
    )
    _add_adapter(command)
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the merged model; auto, the default, is that of the base",
    )
    command.add_argument(
        "--safe", action="store_true", help="refuse a merged weight that is not finite"
    )

    command = add(
        "export-lora",
        commands.export_lora,
        "write an adapter as a LoRA that equals it",
        description="Write an adapter as the LoRA that equals it, for whatever loads LoRA.",
        epilog="example:\n  s2kernels export-lora adapter --output lora --format vllm --check",
    )
    _add_adapter(command)
    command.add_argument(
        "--format", choices=("peft", "vllm", "sglang"), default="peft", help="who is to load it"
    )
    command.add_argument(
        "--rank", type=_count, help="a larger rank than the adapter needs, filled with zeros"
    )
    command.add_argument(
        "--check",
        action="store_true",
        help="load both with PEFT and print the largest difference in logits",
    )

    command = add(
        "select",
        commands.select,
        "rank heads and channels",
        description="Rank the heads and channels of a model, without training: what is selected "
        "goes into OUTPUT, a picture of all scores beside it if there is matplotlib.",
        epilog="example:\n  s2kernels select --model models/llama --data train.json "
        "--strategy product --output selection.json\n"
        "  s2kernels finetune --selection selection.json ...",
    )
    command.add_argument("--model", type=Path, required=True, metavar="DIR")
    command.add_argument(
        "--output", type=Path, required=True, metavar="FILE.json", help="a new file"
    )
    command.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="weight",
        help="norms of the weights, of the activations on DATA, their product, or of the "
        "gradients on DATA; default weight",
    )
    _add_ranking(command)
    _add_budgets(command)
    command.add_argument("--data", type=Path, metavar="FILE", help="as finetune takes it")
    command.add_argument("--tokenizer", metavar="DIR", help="folder, or 'bytes'")
    command.add_argument(
        "--examples", type=_count, default=128, metavar="N", help="of DATA; default 128"
    )
    command.add_argument(
        "--max-length", type=_count, default=512, metavar="TOKENS", help="default 512"
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return parser


def _add_budgets(command: argparse._ActionsContainer) -> None:
    for name, what, default in (
        ("heads", "query heads of each attention block", 0.05),
        ("channels", "channels of each FFN block, of a mixture those of each expert", 0.02),
    ):
        command.add_argument(
            f"--{name}",
            type=_budget,
            default=default,
            metavar="N",
            help=f"{what}: a count as in 2, or a share as in 0.02; default {default}",
        )
    command.add_argument(
        "--granularity",
        type=_count,
        default=1,
        metavar="N",
        help="channels are selected in aligned runs of N neighbours, and their count is rounded up "
        "to whole runs; 16 suits GPUs; default 1",
    )


def _add_ranking(command: argparse._ActionsContainer) -> None:
    command.add_argument("--smallest", action="store_true", help="take the smallest scores")
    command.add_argument(
        "--scope",
        choices=("layer", "global"),
        default="layer",
        help="whether the budget holds for each block or blocks compete; default layer",
    )


def _add_adapter(command: _Parser) -> None:
    command.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    command.add_argument(
        "--base",
        type=Path,
        metavar="DIR",
        help="the base model; default: the one the adapter names",
    )


def _add_finetune(command: _Parser) -> None:
    group = command.add_argument_group("model and data")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", type=Path, metavar="DIR", help="local folder of the base model")
    model.add_argument(
        "--config",
        metavar="JSON",
        help="a random model, for trials, of this configuration: a file or the JSON itself",
    )
    group.add_argument("--data", type=Path, required=True, metavar="FILE", help="see above")
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the tokenizer, or 'bytes': one token a byte, 259 in all; default: the "
        "model's",
    )
    group.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    group.add_argument(
        "--max-length", type=_count, metavar="TOKENS", help="default 512, or the model's limit"
    )
    group.add_argument(
        "--packing", action="store_true", help="join short examples to rows of --max-length"
    )
    group.add_argument(
        "--held-out",
        type=_share,
        default=0.05,
        metavar="SHARE",
        help="of the examples, kept from training to measure the loss on; default %(default)s",
    )

    group = command.add_argument_group("S2FT")
    _add_budgets(group)
    group.add_argument(
        "--targets",
        nargs="+",
        metavar="NAME",
        help="projections to train, of q_proj k_proj v_proj o_proj gate_proj up_proj down_proj, of "
        "experts gate_up_proj down_proj; default o_proj down_proj",
    )
    chosen = group.add_mutually_exclusive_group()
    chosen.add_argument(
        "--strategy",
        choices=("random", *STRATEGIES),
        default="random",
        help="what chooses heads and channels: a draw, or norms of the weights, of the activations "
        "on a share of the training data, their product, or of the gradients there; default random",
    )
    chosen.add_argument(
        "--selection",
        type=Path,
        metavar="JSON",
        help="heads and channels that `s2kernels select` chose; goes with none of --heads, "
        "--channels, --granularity, --strategy, --smallest, --scope, --calibration-share",
    )
    _add_ranking(group)
    group.add_argument(
        "--calibration-share",
        type=_positive_share,
        default=0.01,
        metavar="SHARE",
        help="of the training examples, for --strategy; default 0.01",
    )
    # not given is not the same as the default: --selection goes with none of them
    defaults = {name: command.get_default(name) for name in CHOICE}
    command.set_defaults(**dict.fromkeys(CHOICE), defaults=defaults)
    group.add_argument("--seed", type=int, default=0, help="of everything drawn; default 0")
    group.add_argument(
        "--mode",
        choices=("auto", "inplace", "additive"),
        default="auto",
        help="how a slice is applied; all give the same result",
    )
    group.add_argument(
        "--layout",
        choices=("auto", "permute", "block", "gather"),
        default="auto",
        help="where the trained channels lie; 'block' draws aligned runs of 64 channels, the "
        "others give the same result",
    )

    group = command.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=_amount, default=1.0, metavar="N", help="default 1")
    length.add_argument("--max-steps", type=_count, metavar="N", help="instead of --epochs")
    group.add_argument("--lr", type=_amount, default=2e-4, help="peak rate; default %(default)s")
    group.add_argument(
        "--warmup",
        type=_steps,
        default=0.0,
        metavar="N",
        help="steps, or a share of them if below 1, until the peak; then linearly to 0; default 0",
    )
    group.add_argument("--batch-size", type=_count, default=8, metavar="N", help="default 8")
    group.add_argument(
        "--accumulate", type=_count, default=1, metavar="N", help="batches a step; default 1"
    )
    group.add_argument(
        "--bf16", action="store_true", help="base in bf16 (else fp32); what is trained stays fp32"
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory, a second forward"
    )
    group.add_argument("--save-steps", type=_count, metavar="N", help="default: ten times in a run")
    group.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in --output"
    )
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
