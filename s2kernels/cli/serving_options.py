"""The options of `s2kernels serve` and `s2kernels generate`."""

import argparse
from pathlib import Path

GENERATE = """\
Continue prompts with several adapters side by side, and with the base.

One prompt is given by --prompt; of a file by --prompts, every line is one, or of a file that ends
in .jsonl the "prompt" of every line.
"""

GENERATE_EXAMPLES = """\
example:
  s2kernels generate --model models/llama --adapter math=adapters/math \\
      --adapter code=adapters/code --prompt 'Two and two make'
"""

SERVE = """\
Serve a model and any number of S2FT adapters over HTTP, as OpenAI's API does.

All adapters share one copy of the model, and one batch. "model" in a request is the name of an
adapter, or of the base.

  GET    /v1/models                the base and the adapters
  POST   /v1/completions           as OpenAI's: prompt, max_tokens, temperature, top_p, stop, stream
  POST   /v1/chat/completions      the same, with messages; needs a tokenizer with a chat template
  POST   /v1/adapters              {"name": ..., "path": ...} loads an adapter from a folder here
  DELETE /v1/adapters/NAME         unloads it
  GET    /health

Whoever reaches the port may use all of it; it is bound to this machine unless --host says
otherwise. Ctrl-C ends it when the answers that run are done, after 10 seconds at the latest.
"""

SERVE_EXAMPLES = """\
example:
  s2kernels serve --model models/llama --adapter math=adapters/math
  curl -s localhost:8000/v1/completions -H 'Content-Type: application/json' \\
      -d '{"model": "math", "prompt": "Two and two make", "temperature": 0}'
"""


def named_folder(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise ValueError
    return name, Path(path)


def count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 2:
        raise ValueError
    return value


def port(text: str) -> int:
    value = int(text)
    if not 0 <= value < 2**16:
        raise ValueError
    return value


# what argparse calls them in its messages
named_folder.__name__ = "NAME=DIR"
temperature.__name__ = "number from 0 to 2"
port.__name__ = "port"


def add_generate(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    given = command.add_mutually_exclusive_group(required=True)
    given.add_argument("--prompt", metavar="TEXT")
    given.add_argument("--prompts", type=Path, metavar="FILE")
    command.add_argument(
        "--max-new-tokens", type=count, default=64, metavar="N", help="default %(default)s"
    )
    command.add_argument(
        "--temperature",
        type=temperature,
        default=0.0,
        metavar="T",
        help="0, the default, is greedy",
    )
    command.add_argument("--seed", type=int, default=0, help="of what is drawn; default 0")
    command.add_argument("--no-base", action="store_true", help="adapters alone")
    command.add_argument("--json", action="store_true", help="a line of JSON for each prompt")


def add_serve(command: argparse.ArgumentParser) -> None:
    _add_model(command)
    command.add_argument("--host", default="127.0.0.1", help="default %(default)s")
    command.add_argument(
        "--port", type=port, default=8000, help="0 is any that is free; default %(default)s"
    )
    command.add_argument(
        "--name", help="of the base in requests; default: the name of the model's folder"
    )
    command.add_argument(
        "--cache-tokens",
        type=count,
        metavar="N",
        help="of all running requests together; default 16384 on a CPU, what fits on a GPU",
    )


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="the base")
    command.add_argument(
        "--adapter",
        type=named_folder,
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="an S2FT adapter of it; may be given many times",
    )
    command.add_argument("--tokenizer", metavar="DIR", help="folder, or 'bytes'; default: the base")
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the model; auto, the default, is that of its files",
    )
    command.add_argument(
        "--pool-mib",
        type=count,
        default=1024,
        metavar="N",
        help="device memory for adapters in use; default %(default)s",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
