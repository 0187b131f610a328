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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from s2kernels.cli import options, texts
from s2kernels.cli.runs import as_arguments

# Where the function of each command is, and its options. It does what is quick, and raises for what
# does not fit; what takes long it may return as another function.
_COMMANDS: dict[str, tuple[str, options.Table]] = {
    "finetune": ("finetune", options.FINETUNE),
    "evaluate": ("evaluate", options.EVALUATE),
    "generate": ("serving", options.GENERATE),
    "serve": ("serving", options.SERVE),
    "inspect": ("describe", options.INSPECT),
    "merge": ("merging", options.MERGE),
    "export-lora": ("merging", options.EXPORT),
    "select": ("selecting", options.SELECT),
}
_EXTRAS = {"serve": ("starlette", "uvicorn"), "train": ("trl", "datasets", "accelerate", "yaml")}


class _Parser(argparse.ArgumentParser):
    """Errors in one line, --help as it is written in `texts`."""

    def __init__(self, **fields: Any) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=kind, allow_abbrev=False, **fields)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand; SystemExit with code 2 where something given does not fit."""
    parser = _parser()
    words = _with_config(list(sys.argv[1:] if argv is None else argv))
    args = parser.parse_args(words)
    args.given = {word.partition("=")[0] for word in words}
    with nullcontext() if args.command == "serve" else _quiet():
        with _told_in_a_line(args.parser, ValueError, OSError):
            module = import_module(f"s2kernels.cli.{_COMMANDS[args.command][0]}")
            work = getattr(module, args.command.replace("-", "_"))(args)
        with _told_in_a_line(args.parser):
            if work is not None:
                work()


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


@contextmanager
def _told_in_a_line(parser: _Parser, *kinds: type[Exception]) -> Iterator[None]:
    """End the process with one line for errors of these kinds, for missing packages and a full
    disk, of which safetensors and torch speak in their own ways, and for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        parser.exit(130, f"\n{str(interrupt) or 'interrupted'}\n")
    except Exception as error:
        text = str(error)
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "(os error 28)" in text or "unexpected pos" in text:
            parser.error(f"there is no space left on the disk: {text}")
        if kinds and isinstance(error, ModuleNotFoundError):
            extra = next((extra for extra, names in _EXTRAS.items() if error.name in names), "peft")
            parser.error(f"{error.name} is missing: pip install -e '.[{extra}]' in the clone")
        if not isinstance(error, kinds):
            raise
        parser.error(text)


def _with_config(argv: list[str]) -> list[str]:
    """The arguments, with those in the file of --config before them."""
    looking = _Parser(prog="s2kernels finetune", add_help=False)
    looking.add_argument("--config", type=Path)
    looking.add_argument("--method")
    found = looking.parse_known_args(argv)[0]
    if found.config is None:
        return argv
    with _told_in_a_line(looking, ValueError, OSError):
        return [argv[0], *as_arguments(found.config, argv[1:], found.method), *argv[1:]]


def _parser() -> _Parser:
    parser = _Parser(prog="s2kernels", description="Sparse fine-tuning of language models.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, table) in _COMMANDS.items():
        summary, _, text = texts.TEXTS[name].replace("%", "%%").partition("\n\n")
        description, _, examples = text.partition("\n\nexample")
        command = subparsers.add_parser(
            name, help=summary, description=description, epilog=f"example{examples}"
        )
        command.set_defaults(command=name, parser=command)
        options.add(command, table)
    return parser
