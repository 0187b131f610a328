"""Models, tokenizers and adapters out of local folders; nothing is downloaded."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    ByT5Tokenizer,
)

import s2kernels.peft  # noqa: F401 - makes S2FT known to PEFT
from s2kernels.adapter import PREFIX, TENSORS_NAME, read_files

_CAUSAL = (AutoModelForCausalLM, "causal language model")
# what an adapter's task_type says of the model, where that is another one
_KINDS = {
    "SEQ_CLS": (AutoModelForSequenceClassification, "sequence classifier"),
    "TOKEN_CLS": (AutoModelForTokenClassification, "token classifier"),
    "QUESTION_ANS": (AutoModelForQuestionAnswering, "question answering model"),
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def load_model(
    path: Path,
    dtype: torch.dtype | str,
    task: str | None = None,
    provided: Collection[str] = (),
    **fields: Any,
) -> Any:
    """The model in a local folder: a causal language model, or what the `task` of an adapter says.

    provided: names of tensors that the folder may lack, as an adapter will bring them. fields: what
    the model's configuration is to have in the place of its own.

    Raises ValueError where there is no such model, or it lacks tensors, which transformers would
    draw at random.
    """
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is not the folder of a model: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        model_type = config.get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path / 'config.json'} is damaged: {error}") from None
    kind, what = _KINDS.get(task or "", _CAUSAL)
    try:
        model, report = kind.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, **fields
        )
    except ValueError:
        _check_type(model_type, kind, what, path)
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{path} holds no model that can be loaded: {error}") from error
    if missing := sorted(set(report["missing_keys"]) - set(provided)):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{path} is no whole {what}: it lacks {', '.join(missing[:3])}{more}, which would be "
            "drawn at random"
        )
    return model


def load_base(path: Path, dtype: torch.dtype | str, adapter: Path) -> Any:
    """The model in a folder that the adapter in another one is for; see `load_model`."""
    config, tensors = read_files(adapter)
    names = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    task, fields = config.get("task_type"), {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [tensor for name, tensor in names.items() if name.endswith(_HEADS)]
        if len(heads) == 1:
            fields["num_labels"] = len(heads[0])
    return load_model(path, dtype, task, names, **fields)


def _check_type(model_type: Any, kind: Any, what: str, where: Any) -> None:
    """Raises ValueError unless transformers has such a model; its own message lists all it has."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"{where}: transformers knows no model type {model_type!r}")
    if CONFIG_MAPPING[model_type] not in kind._model_mapping:
        raise ValueError(f"{where}: transformers has no {what} of type {model_type!r}")


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
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields), dtype=dtype)
        except ValueError:
            _check_type(fields["model_type"], *_CAUSAL, "--config")
            raise


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder; "bytes" is one token for each byte of UTF-8, 259 in all."""
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer in {name}: give one by --tokenizer") from error


def with_adapter(model: Any, path: Path, **fields: Any) -> PeftModel:
    """The model with the adapter, S2FT or other, in a local folder; `fields` change its config.

    Raises ValueError for one that does not fit: each of its tensors lands in the model, and those
    that the model has for it are all there.
    """
    config = PeftConfig.from_pretrained(str(path))
    for name, value in fields.items():
        setattr(config, name, value)
    try:
        model = PeftModel.from_pretrained(model, str(path), config=config)
    except KeyError as error:  # PEFT's, of modules_to_save
        raise ValueError(f"{path} is damaged or incomplete: it lacks {error}") from error
    except (RuntimeError, SafetensorError) as error:  # torch's, of shapes that do not fit
        raise ValueError(f"{path} does not fit the base: {error}") from error
    if config.peft_type in ("S2FT", "SPIEL"):
        _check_landed(model, path)
    return model


def _check_landed(model: PeftModel, path: Path) -> None:
    with safe_open(path / TENSORS_NAME, "pt") as file:
        saved = set(file.keys())
    landed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # PEFT saves embeddings that were resized, and loads them into the base
    lost = saved - landed - model.state_dict().keys()
    for names, fault in (
        (lost, "has no place for its"),
        (landed - saved, "has places for what it lacks:"),
    ):
        if names:
            shown = ", ".join(name.removeprefix(PREFIX) for name in sorted(names)[:3])
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path} does not fit: the base {fault} {shown}{more}")
