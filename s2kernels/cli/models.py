"""Models, tokenizers and adapters out of local folders or, what is no folder here, off the hub."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoTokenizer, ByT5Tokenizer, PreTrainedConfig

import s2kernels.peft  # noqa: F401 - makes S2FT known to PEFT
from s2kernels.adapter import PREFIX, TENSORS_NAME, read_files

_CAUSAL = (transformers.AutoModelForCausalLM, "causal language model")
# what an adapter's task_type says of the model, where that is another one
_KINDS = {
    "SEQ_CLS": (transformers.AutoModelForSequenceClassification, "sequence classifier"),
    "TOKEN_CLS": (transformers.AutoModelForTokenClassification, "token classifier"),
    "QUESTION_ANS": (transformers.AutoModelForQuestionAnswering, "question answering model"),
}
_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def is_hub_id(name: Path | str) -> bool:
    """Whether it may name something on the hub: no path here, and none by its looks."""
    path = Path(name)
    known = path.exists() or path.suffix in (".json", ".jsonl", ".csv", ".parquet", ".txt")
    return not known and bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)))


def load_model(
    path: Path | str,
    dtype: torch.dtype | str,
    task: str | None = None,
    provided: Collection[str] = (),
    **fields: Any,
) -> Any:
    """A causal language model, or what the `task` of an adapter says, of a folder or the hub.

    provided: names of tensors that the folder may lack, as an adapter will bring them. fields: what
    from_pretrained takes besides.

    Raises ValueError where there is no such model, or it lacks tensors, which transformers would
    draw at random.
    """
    local = not is_hub_id(path)
    if local and not Path(path, "config.json").is_file():
        raise ValueError(f"{path} is not the folder of a model: it has no config.json")
    kind, what = _KINDS.get(task or "", _CAUSAL)
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, local_files_only=local)
        model_type = config.get("model_type")
        # transformers' own message lists all types that it knows
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(f"{path}: transformers knows no model type {model_type!r}")
        if CONFIG_MAPPING[model_type] not in kind._model_mapping:  # type: ignore[operator]
            raise ValueError(f"{path}: transformers has no {what} of type {model_type!r}")
        model, report = kind.from_pretrained(
            path, dtype=dtype, local_files_only=local, output_loading_info=True, **fields
        )
    except (OSError, RuntimeError, AttributeError, SafetensorError) as error:
        text = " ".join(str(error).split())[:300]
        what = "holds no model that can be loaded" if local else "is no folder here, and the hub"
        raise ValueError(f"{path} {what}: {text}") from error
    if missing := sorted(set(report["missing_keys"]) - set(provided)):
        raise ValueError(
            f"{path} is no whole {what}: it lacks {_few(missing)}, which would be drawn at random"
        )
    return model


def _few(names: Collection[str]) -> str:
    """The first names of many."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name.removeprefix(PREFIX) for name in sorted(names)[:3]) + more


def device_of(name: str) -> str:
    """The device that --device names; ValueError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def length_of(model: Any, wanted: int | None) -> int:
    """How many tokens of an example are used; ValueError for more than the model has positions."""
    limit = getattr(model.config, "max_position_embeddings", None) or wanted or 512
    if wanted and wanted > limit:
        raise ValueError(f"--max-length {wanted}: the model has {limit} positions")
    return wanted or min(512, limit)


def base_of(adapter: Path, given: Path | str | None) -> Path | str:
    """The base that was given, or else the one that the adapter names."""
    base = given or read_files(adapter)[0].get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{adapter} does not name its base, which must be given")
    return base


def load_base(path: Path | str, dtype: torch.dtype | str, adapter: Path) -> Any:
    """The model in a folder that the adapter in another one is for; see `load_model`."""
    config, tensors = read_files(adapter)
    names = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    task, fields = config.get("task_type"), {}
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        heads = [tensor for name, tensor in names.items() if name.endswith(_HEADS)]
        if len(heads) == 1:
            fields["num_labels"] = len(heads[0])
    return load_model(path, dtype, task, names, **fields)


def load_tokenizer(name: str) -> Any:
    """The tokenizer in a folder; "bytes" is one token for each byte of UTF-8, 259 in all."""
    if name == "bytes":
        return ByT5Tokenizer(extra_ids=0)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=not is_hub_id(name))
    except (OSError, ValueError, KeyError) as error:
        text = "no tokenizer is in it; another one's is given by --tokenizer"
        if not Path(name).exists():
            hub = f", and the hub: {' '.join(str(error).split()):.200}" if is_hub_id(name) else ""
            text = f"there is no such folder{hub}"
        raise ValueError(f"{name}: {text}") from error


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
    if config.peft_type not in ("S2FT", "SPIEL"):
        return model
    with safe_open(path / TENSORS_NAME, "pt") as file:
        saved = set(file.keys())
    landed = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    # PEFT saves embeddings that were resized, and loads them into the base
    if lost := saved - landed - model.state_dict().keys():
        raise ValueError(f"{path} does not fit: the base has no place for its {_few(lost)}")
    if empty := landed - saved:
        raise ValueError(f"{path} does not fit: it lacks {_few(empty)}, which the base has")
    return model
