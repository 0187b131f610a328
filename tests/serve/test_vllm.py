"""The plugin in a real vLLM on the CPU: `make test-vllm` runs this in an environment that has it.

Tokens are compared with those of PEFT, one adapter at a time.
"""

import os
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="make test-vllm makes an environment with it")

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}

import torch
import vllm
from peft import LoraConfig, PeftModel, get_peft_model
from saved_adapters import edit_config
from served_models import DIMS, random_slices
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager

import s2kernels.peft  # noqa: F401 - PEFT reads our adapters then
from s2kernels import vllm as plugin
from s2kernels.adapter import Slice, write_adapter
from s2kernels.vllm import native

SLOTS, CHANNELS, TOKENS = 3, 400, 10
NARROW = ("o_proj", "down_proj")
GREEDY = dict(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """With the base model in it, six S2FT adapters, and three LoRAs."""
    path = tmp_path_factory.mktemp("vllm")
    model.save_pretrained(path / "base")
    for seed in range(6):
        targets = list(DIMS) if seed % 2 else NARROW
        save(path / f"s{seed}", random_slices(model, seed, targets, most=25))
    for seed in range(SLOTS):
        base = LlamaForCausalLM.from_pretrained(path / "base")
        lora = get_peft_model(base, LoraConfig(r=4, target_modules=["o_proj", "q_proj"]))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        lora.save_pretrained(path / f"l{seed}")
    return path


@pytest.fixture(scope="module")
def engine(folder):
    return LLM(
        str(folder / "base"),
        skip_tokenizer_init=True,
        dtype="float32",
        enable_lora=True,
        max_loras=SLOTS,
        max_cpu_loras=SLOTS + 1,
        max_lora_rank=8,
        max_model_len=64,
        max_num_seqs=8,
        additional_config={native.SETTING: CHANNELS},
    )


@pytest.fixture(scope="module")
def manager(engine):
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    return runner.model_runner.lora_manager._adapter_manager


@pytest.fixture(scope="module")
def expected(folder):
    """(name, prompt) -> the tokens of PEFT, alone and without a cache of other requests."""
    found: dict = {}

    def tokens(name, prompt):
        key = name, tuple(prompt)
        if key not in found:
            answerer = LlamaForCausalLM.from_pretrained(folder / "base").eval()
            if name is not None:
                answerer = PeftModel.from_pretrained(answerer, folder / name).eval()
            ids = torch.tensor([prompt])
            found[key] = answerer.generate(input_ids=ids, **GREEDY)[0, len(prompt) :].tolist()
        return found[key]

    return tokens


def save(path, slices):
    write_adapter(path, slices, {"task_type": "CAUSAL_LM"})


def request(folder, name, **fields):
    number = 1 + int(name[1:]) + (100 if name[0] == "l" else 0)
    return LoRARequest(name, number, str(folder / name), **fields)


def prompts(num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 30, (num,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


def answers(engine, folder, names, texts):
    outputs = engine.generate(
        [{"prompt_token_ids": text} for text in texts],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False),
        lora_request=[None if name is None else request(folder, name) for name in names],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def check(engine, folder, expected, names, seed=0):
    texts = prompts(len(names), seed)
    wanted = [expected(name, text) for name, text in zip(names, texts, strict=True)]
    assert answers(engine, folder, names, texts) == wanted
    return texts, wanted


def test_every_row_of_a_batch_has_its_adapter_or_the_base(engine, folder, expected):
    """All slots are in use; two rows share an adapter; one adapter trains seven projections."""
    names = ["s0", None, "s1", "s3", "s1", None]
    texts, wanted = check(engine, folder, expected, names)
    base = [expected(None, text) for text in texts]
    same = [a == b for a, b in zip(wanted, base, strict=True)]
    assert same == [name is None for name in names]  # or the test would not see an adapter


def test_more_adapters_than_slots_take_turns(engine, folder, expected):
    check(engine, folder, expected, ["s4", "s0", "s5", "s1", "s2", "s3", None, "s0"], seed=1)


def test_a_mixed_batch_has_loras_too(engine, folder, expected):
    check(engine, folder, expected, ["l0", "s1", "s0", "l0", "s1"], seed=2)


def test_loras_alone_are_as_without_the_plugin(engine, folder, expected):
    check(engine, folder, expected, ["l0", "l1", "l2", "l1"], seed=3)


def test_s2ft_adapters_come_into_slots_that_loras_had(engine, folder, expected):
    check(engine, folder, expected, ["l2", "l1", "l0"], seed=4)
    check(engine, folder, expected, ["s2", "s1", "s0"], seed=5)
    check(engine, folder, expected, ["l1", "s0", "l0"], seed=6)


def test_an_adapter_is_replaced_in_place(engine, folder, expected, manager):
    check(engine, folder, expected, ["s2"], seed=7)
    other = LoRARequest("s2", request(folder, "s2").lora_int_id, str(folder / "s5"))
    other.load_inplace = True
    engine.llm_engine.add_lora(other)
    other.load_inplace = False
    text = prompts(1, seed=8)[0]
    output = engine.generate(
        {"prompt_token_ids": text},
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False),
        lora_request=other,
        use_tqdm=False,
    )
    assert list(output[0].outputs[0].token_ids) == expected("s5", text)
    engine.llm_engine.remove_lora(other.lora_int_id)


def test_what_is_removed_is_forgotten(engine, folder, manager):
    store = manager.s2ft._store
    engine.llm_engine.add_lora(request(folder, "s0"))
    assert store.names()
    remove_all(engine)
    assert store.names() == []
    engine.llm_engine.add_lora(request(folder, "s1"))  # slots are followed from here
    held = len(manager.list_adapters()[request(folder, "s1").lora_int_id].adapter.rows)
    assert store.pool.num_free == store.pool.num_rows - held


def test_slots_hold_rows_and_no_padding(engine, manager):
    pool = manager.s2ft._store.pool.rows
    assert pool.shape == (SLOTS * CHANNELS, 128)


def test_without_the_setting_slots_are_as_large_as_those_of_loras(engine, folder, manager):
    """The memory is taken with the first S2FT adapter, not before."""
    config = engine.llm_engine.vllm_config
    names = ("parallel_config", "compilation_config", "model_config")
    fields = {name: getattr(config, name) for name in names}
    adapters = native.NativeAdapters(manager, SimpleNamespace(**fields, additional_config={}))
    assert adapters._store is None
    assert len(adapters.load(1, str(folder / "s0")).adapter.rows)
    of_loras = SLOTS * native._bytes_of_a_slot(manager)
    row = 128 * 4
    assert of_loras - SLOTS * row < adapters._store.pool.rows.nbytes <= of_loras


def remove_all(engine):
    for lora_id in list(engine.llm_engine.list_loras()):
        engine.llm_engine.remove_lora(lora_id)


def refused(engine, folder, slices, match):
    save(folder / "s9", slices)
    before = engine.llm_engine.list_loras()
    with pytest.raises(ValueError, match=match):
        engine.llm_engine.add_lora(request(folder, "s9"))
    assert engine.llm_engine.list_loras() == before


def one(name, dim, index, shape):
    return {name: Slice(dim, torch.tensor(index, dtype=torch.int32), torch.ones(shape))}


def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(engine, folder, expected):
    layer = "model.layers.0"
    refused(engine, folder, one(f"{layer}.mlp.no", "in", [0], (128, 1)), "no linear layer")
    refused(engine, folder, one(f"{layer}.mlp.down_proj", "in", [256], (128, 1)), "index must lie")
    refused(engine, folder, one(f"{layer}.mlp.up_proj", "out", [256], (1, 128)), "index must lie")
    refused(engine, folder, one(f"{layer}.mlp.up_proj", "in", [0], (256, 1)), "part of gate_up")
    refused(engine, folder, one(f"{layer}.mlp.down_proj", "in", [0], (64, 1)), "delta must fit")
    wide = {
        f"{layer}.mlp.down_proj": Slice("in", torch.arange(256).int(), torch.ones(128, 256)),
        f"{layer}.mlp.up_proj": Slice("out", torch.arange(256).int(), torch.ones(256, 128)),
    }
    refused(engine, folder, wide, f"512 channels.*'{{\"{native.SETTING}\": 512}}'")
    check(engine, folder, expected, ["s0", None], seed=9)


def test_a_damaged_adapter_is_refused(engine, folder):
    save(folder / "s8", one("model.layers.0.mlp.down_proj", "in", [0], (128, 1)))
    (folder / "s8" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged"):
        engine.llm_engine.add_lora(request(folder, "s8"))


def test_what_is_neither_is_left_to_vllm(engine, folder):
    save(folder / "s7", one("model.layers.0.mlp.down_proj", "in", [0], (128, 1)))
    edit_config(folder / "s7", peft_type="IA3")
    with pytest.raises(ValueError, match="Missing required configuration fields"):
        engine.llm_engine.add_lora(request(folder, "s7"))


def test_an_untested_vllm_refuses_s2ft_adapters_alone(engine, folder, monkeypatch):
    """One of the seams is gone, so that the plugin cannot do its work."""
    from vllm.lora.model_manager import LoRAModelManager

    assert plugin.missing_seams() == []
    monkeypatch.delattr(LoRAModelManager, "set_adapter_mapping")
    monkeypatch.setattr(
        WorkerLoRAManager, "_load_adapter", WorkerLoRAManager._load_adapter.__wrapped__
    )
    assert [path for _, path in plugin.missing_seams()] == ["LoRAModelManager.set_adapter_mapping"]
    plugin.register()
    remove_all(engine)
    with pytest.raises(ValueError, match=f"in vLLM {plugin.TESTED}.*no vllm.lora.model_manager"):
        engine.llm_engine.add_lora(request(folder, "s0"))
    assert engine.llm_engine.add_lora(request(folder, "l0"))


def test_a_vllm_without_any_seam_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(plugin, "SEAMS", (("vllm.no_such_module", "A.b"),))
    with caplog.at_level("WARNING", logger=plugin.logger.name):
        plugin.register()
    assert plugin.TESTED in caplog.text and "vllm.no_such_module.A.b" in caplog.text


def test_to_register_twice_changes_nothing():
    before = WorkerLoRAManager._load_adapter
    plugin.register()
    assert WorkerLoRAManager._load_adapter is before
    assert vllm.__version__ == plugin.TESTED


def setup(**changes):
    """A manager and a configuration of which everything is supported but `changes`."""
    fields = dict(
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        use_ubatching=False,
        mode=CompilationMode.NONE,
        cudagraph_mode=CUDAGraphMode.NONE,
        fully_sharded_loras=False,
        supports_mm=False,
        device=torch.device("cpu"),
    )
    found = SimpleNamespace(**fields | changes)
    found.lora_config = found
    return found, SimpleNamespace(parallel_config=found, compilation_config=found)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(tensor_parallel_size=2), "tensor or pipeline"),
        (dict(pipeline_parallel_size=2), "tensor or pipeline"),
        (dict(use_ubatching=True), "--enable-dbo"),
        (dict(fully_sharded_loras=True), "--fully-sharded-loras"),
        (dict(supports_mm=True), "multimodal"),
        (dict(mode=CompilationMode.VLLM_COMPILE), "--enforce-eager"),
        (
            dict(device=torch.device("cuda"), cudagraph_mode=CUDAGraphMode.PIECEWISE),
            "--enforce-eager",
        ),
    ],
)
def test_what_is_not_supported_is_said(changes, match):
    assert native._obstacle(*setup()) is None
    assert match in native._obstacle(*setup(**changes))


def test_an_unsupported_setup_refuses_s2ft_adapters_alone(engine, folder, manager, monkeypatch):
    monkeypatch.setattr(manager.s2ft, "_obstacle", "why")
    remove_all(engine)
    with pytest.raises(ValueError, match="cannot be served here: why"):
        engine.llm_engine.add_lora(request(folder, "s4"))
    assert engine.llm_engine.add_lora(request(folder, "l1"))


@pytest.mark.parametrize("value", [0, -1, "many", 2.5, True])
def test_the_setting_must_be_a_number_of_channels(value):
    with pytest.raises(ValueError, match=f"{native.SETTING} in --additional-config"):
        native._setting(SimpleNamespace(additional_config={native.SETTING: value}))
