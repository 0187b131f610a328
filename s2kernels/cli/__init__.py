"""The command line: s2kernels COMMAND, of finetune, evaluate, generate, serve and others.

What a user gives is looked at before anything long begins. What does not fit is told in one line on
stderr, with exit code 2, as is a full disk; another exception out of the training itself keeps its
traceback.
"""

import argparse
import errno
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from s2kernels.cli import commands, options, texts
from s2kernels.cli.runs import OWN, as_arguments


class _Parser(argparse.ArgumentParser):
    """Errors in one line, --help as it is written in `texts`."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **fields)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; SystemExit with code 2 where something given does not fit."""
    parser = _parser()
    args = parser.parse_args(_with_config(list(sys.argv[1:] if argv is None else argv), parser))
    with nullcontext() if args.prepare is commands.serve else _quiet():
        _run(args)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what libraries tell their developers away from results and the progress bar."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _run(args: argparse.Namespace) -> None:
    try:
        work = args.prepare(args)
    except ModuleNotFoundError as error:
        extras = {"serve": ("starlette", "uvicorn"), "train": ("trl", "datasets", "accelerate")}
        extra = next((extra for extra, names in extras.items() if error.name in names), "peft")
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


def _with_config(argv: list[str], parser: _Parser) -> list[str]:
    """The arguments, with those of the file of --config before them."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    given.add_argument("--config", type=Path)
    if argv[:1] != ["finetune"] or not any(word.startswith("--config") for word in argv):
        return argv
    try:
        found, rest = given.parse_known_args(argv[1:])
        return [argv[0], *(as_arguments(found.config, rest) if found.config else ()), *rest]
    except (argparse.ArgumentError, ValueError, OSError) as error:
        parser.error(str(error))


def _stop_if_full(args: argparse.Namespace, error: BaseException) -> None:
    """Stop where a file could not be written; safetensors and torch say so in their own ways."""
    text = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "(os error 28)" in text or "unexpected pos" in text:
        args.parser.error(f"there is no space left on the disk: {text}")


def _parser() -> _Parser:
    parser = _Parser(prog="s2kernels", description="Sparse fine-tuning of language models.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def new(name: str, prepare: Callable, table: options.Table = ()) -> _Parser:
        summary, description, examples = texts.TEXTS[name]
        command: _Parser = subparsers.add_parser(
            name, help=summary, description=description.replace("%", "%%"), epilog=examples
        )
        command.set_defaults(prepare=prepare, parser=command)
        options.add(command, table)
        return command

    _finetune(new("finetune", commands.finetune))
    new("evaluate", commands.evaluate, options.EVALUATE)
    command = new("generate", commands.generate, options.GENERATE)
    options.add(command.add_mutually_exclusive_group(required=True), options.PROMPTS)
    new("serve", commands.serve, options.SERVE)
    command = new("inspect", commands.inspect, (("--json", None, False, "as JSON"),))
    command.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    for name, prepare, table in (
        ("merge", commands.merge, options.MERGE),
        ("export-lora", commands.export_lora, options.EXPORT),
    ):
        command = new(name, prepare, table)
        command.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    new("select", commands.select, options.SELECT)
    return parser


def _finetune(command: _Parser) -> None:
    group = command.add_argument_group("model and data")
    model = group.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="DIR", help="the base: a folder, or an id on the hub")
    model.add_argument(
        "--model-config",
        metavar="JSON",
        help="a random model, for trials, of this configuration: a file or the JSON itself",
    )
    options.add(group, options.DATA)
    options.add(command.add_argument_group("method"), options.METHOD)
    options.add(command.add_argument_group("S2FT"), options.S2FT)
    options.add(command.add_argument_group("other methods"), options.OTHERS)
    group = command.add_argument_group("training")
    for table in (options.LENGTH, options.QUANTIZED):
        options.add(group.add_mutually_exclusive_group(), table)
    options.add(group, options.TRAINING)
    # not given is not the same as the default: --selection and other methods go with none of these
    own = [name for names in OWN.values() for name in names]
    defaults = {name: command.get_default(name) for name in own}
    command.set_defaults(**dict.fromkeys(own), defaults=defaults)
