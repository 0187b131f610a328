"""Models, tokenizers and adapters out of local folders; nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

import s2kernels.peft  # noqa: F401 - makes S2FT known to PEFT


def load_model(path: Path, dtype: torch.dtype | str) -> Any:
    """The causal language model in a local folder. Raises ValueError where there is none."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not the folder of a model: it has no config.json")
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no model that can be loaded: {error}") from error


def random_model(config: str, dtype: torch.dtype, seed: int) -> Any:
    """A model of random weights; `config` is a file, or the JSON itself."""
    text = config if config.lstrip().startswith("{") else Path(config).read_text("utf-8")
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {config}: not JSON: {error}") from None
    if not isinstance(fields, dict) or "model_type" not in fields:
        raise ValueError(f"--config {config}: an object with 'model_type' wanted")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype)


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder; "bytes" is one token for each byte of UTF-8, 259 in all."""
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer in {name}: give one by --tokenizer") from error


def with_adapter(model: Any, path: Path, **fields: Any) -> PeftModel:
    """The model with the adapter, S2FT or other, in a local folder; `fields` change its config."""
    config = PeftConfig.from_pretrained(str(path))
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        return PeftModel.from_pretrained(model, str(path), config=config)
    except RuntimeError as error:  # torch's, of shapes that do not fit
        raise ValueError(f"{path} does not fit the base: {error}") from error
