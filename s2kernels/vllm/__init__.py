"""The plugin of vLLM that serves folders of S2FT adapters as they are.

vLLM finds it by the entry point `vllm.general_plugins`. Adapters are named, loaded and requested
like LoRAs (`--enable-lora`, `--lora-modules`, `/v1/load_lora_adapter`, `LoRARequest`), and LoRAs
may be served beside them. What it does is written in `s2kernels.vllm.native`; here it is put where
vLLM has no interface for it: into methods of the classes that manage LoRAs.
"""

import importlib
import json
import logging
import os
from functools import wraps
from typing import Any

from s2kernels.adapter import CONFIG_NAME

TESTED = "0.32.0"  # versions of vLLM, in words
# Below vLLM's own logger, which prints to the server's log.
logger = logging.getLogger("vllm.s2kernels")

# Everything private of vLLM that the plugin is built on, apart from arguments and what they hold.
SEAMS = (
    ("vllm.lora.worker_manager", "WorkerLoRAManager._load_adapter"),
    ("vllm.lora.model_manager", "LoRAModelManager.__init__"),
    ("vllm.lora.model_manager", "LoRAModelManager.activate_adapter"),
    ("vllm.lora.model_manager", "LoRAModelManager.set_adapter_mapping"),
    ("vllm.lora.model_manager", "LoRAModelManager._create_merged_loras_inplace"),
    ("vllm.lora.layers.base_linear", "BaseLinearLayerWithLoRA._apply_lora_to_output"),
    ("vllm.lora.lora_model", "LoRAModel.clone"),
    ("vllm.lora.utils", "get_adapter_absolute_path"),
)


def register() -> None:
    """What vLLM calls in each of its processes, maybe more than once."""
    missing = missing_seams()
    if not missing:
        _install()
    elif SEAMS[0] not in missing:
        _refuse(missing)
    else:
        logger.warning(_untested(missing))


def missing_seams() -> list[tuple[str, str]]:
    """Those of `SEAMS` that the installed vLLM does not have."""
    return [seam for seam in SEAMS if not _exists(*seam)]


def _exists(module: str, path: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        return False
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def _untested(missing: list[tuple[str, str]]) -> str:
    import vllm

    names = ", ".join(f"{module}.{path}" for module, path in missing)
    return (
        f"s2kernels serves S2FT adapters in vLLM {TESTED}, and this is {vllm.__version__}, which "
        f"has no {names}: install vllm=={TESTED}, or serve the LoRA that `s2kernels export-lora "
        "--format vllm` makes of the adapter"
    )


def _is_s2ft(lora_path: str) -> bool:
    """Whether the folder, local or of a hub, has the configuration of an S2FT adapter."""
    from vllm.lora.utils import get_adapter_absolute_path

    try:
        with open(os.path.join(get_adapter_absolute_path(lora_path), CONFIG_NAME)) as file:
            config = json.load(file)
    except (OSError, ValueError):
        return False  # vLLM says what is wrong with it
    return isinstance(config, dict) and config.get("peft_type") == "S2FT"


def _wrap(owner: type, name: str, make: Any) -> None:
    """Put make(original) in the place of a method, once."""
    original = getattr(owner, name)
    if not hasattr(original, "s2kernels"):
        wrapper: Any = wraps(original)(make(original))
        wrapper.s2kernels = True
        setattr(owner, name, wrapper)


def _refuse(missing: list[tuple[str, str]]) -> None:
    """Have S2FT adapters, and only them, be refused with the reason."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    message = _untested(missing)

    def make(original: Any) -> Any:
        def load_adapter(self: Any, lora_request: Any) -> Any:
            if _is_s2ft(lora_request.lora_path):
                raise ValueError(message)
            return original(self, lora_request)

        return load_adapter

    _wrap(WorkerLoRAManager, "_load_adapter", make)


def _install() -> None:
    import vllm
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager

    from s2kernels.vllm.native import NativeAdapters, NativeModel

    if vllm.__version__ != TESTED:
        logger.warning(
            "s2kernels was tested with vLLM %s, and this is %s", TESTED, vllm.__version__
        )

    def making(original: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            self.s2ft = NativeAdapters(self, kwargs["vllm_config"])

        return init

    def loading(original: Any) -> Any:
        def load_adapter(self: Any, lora_request: Any) -> Any:
            if not _is_s2ft(lora_request.lora_path):
                return original(self, lora_request)
            path = get_adapter_absolute_path(lora_request.lora_path)
            return self._adapter_manager.s2ft.load(lora_request.lora_int_id, path)

        return load_adapter

    def merging(original: Any) -> Any:
        def merge(self: Any, lora_model: Any) -> None:
            if not isinstance(lora_model, NativeModel):
                original(self, lora_model)

        return merge

    def activating(original: Any) -> Any:
        def activate(self: Any, lora_id: int) -> bool:
            has_changed = original(self, lora_id)
            if has_changed:
                self.s2ft.follow_slots()
            return has_changed

        return activate

    def mapping(original: Any) -> Any:
        def set_mapping(self: Any, mapping: Any) -> None:
            original(self, mapping)
            self.s2ft.plan(mapping.index_mapping)

        return set_mapping

    _wrap(WorkerLoRAManager, "_load_adapter", loading)
    _wrap(LoRAModelManager, "__init__", making)
    _wrap(LoRAModelManager, "activate_adapter", activating)
    _wrap(LoRAModelManager, "set_adapter_mapping", mapping)
    _wrap(LoRAModelManager, "_create_merged_loras_inplace", merging)
