"""Which channels an adapter trains: every strategy, scope and budget, through the PEFT host."""

import json
from dataclasses import asdict

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model, token_ids

from s2kernels.coupling import channels_of_heads
from s2kernels.peft import S2FTConfig, S2FTLinear, select_indices
from s2kernels.peft.s2ft.layer import S2FTLayer
from s2kernels.select import random_scores, random_units, ranked_units, scores

STRATEGIES = ("weight", "activation", "product", "gradient")
ATTENTION, FFN = "model.layers.{}.self_attn", "model.layers.{}.mlp"


def config(**fields):
    return S2FTConfig(**dict(heads=2, channels=10, seed=3, task_type="CAUSAL_LM") | fields)


def trained(model):
    """The channels of every target, in the original basis."""
    return {
        module.name: module.s2ft_index["default"].tolist()
        for module in model.modules()
        if isinstance(module, S2FTLinear)
    }


@pytest.mark.parametrize("largest", (True, False), ids=("large", "small"))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_scores_choose_and_an_adapter_needs_no_data_afterwards(strategy, largest, tmp_path):
    ids = token_ids()
    batches = [ids[:1], ids[1:]]
    model = tiny_model("llama")
    values = scores(model, strategy, batches, progress=False)
    chosen = select_indices(
        model, config(selection=strategy, largest=largest), batches, progress=False
    )
    want = {}
    for block in range(2):
        heads, channels = ATTENTION.format(block), FFN.format(block)
        counts = {heads: 2, channels: 10}
        units = ranked_units(values, counts, largest=largest)
        want[f"{heads}.o_proj"] = channels_of_heads(units[heads], 4).tolist()
        want[f"{channels}.down_proj"] = units[channels].tolist()
    assert chosen.indices == want

    model = get_peft_model(model, chosen)
    assert trained(model) == want
    with torch.no_grad():
        for name, delta in model.named_parameters():
            if "s2ft_delta" in name:
                delta.normal_()
    logits = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert trained(loaded) == want
    assert (loaded(ids).logits - logits).abs().max() < 1e-12


def test_weight_needs_no_data_and_the_others_say_what_they_need():
    chosen = select_indices(tiny_model("llama"), config(selection="weight"))
    model = get_peft_model(tiny_model("llama"), config(selection="weight"))
    assert trained(model) == chosen.indices
    for strategy in STRATEGIES[1:]:
        model = tiny_model("llama")
        with pytest.raises(ValueError, match="pass select_indices.model, config, batches."):
            get_peft_model(model, config(selection=strategy))
        assert not trained(model)
        with pytest.raises(ValueError, match="batches"):
            select_indices(model, config(selection=strategy))


@pytest.mark.parametrize("fields", (dict(selection="weight"), dict(scope="global")), ids=str)
def test_a_configuration_serves_several_models(fields):
    """What the first model has made of it does not decide for the second one, nor after a change
    of its fields.
    """
    reused = config(target_modules=None, **fields)
    before = asdict(reused)
    for changes in (dict(seed=3), dict(seed=4, channels=7, heads=3)):
        vars(reused).update(changes)
        for model_type in ("llama", "gpt2"):
            found = trained(get_peft_model(tiny_model(model_type), reused))
            fresh = config(target_modules=None, **fields | changes)
            assert found == trained(get_peft_model(tiny_model(model_type), fresh))
    assert asdict(reused) == before | changes


@pytest.mark.parametrize("strategy", ("random", "weight"))
def test_blocks_compete_for_a_global_budget(strategy, tmp_path):
    model = tiny_model("llama")
    if strategy == "weight":
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(100)
    chosen = config(selection=strategy, scope="global", target_modules=["down_proj"])
    model = get_peft_model(model, chosen)
    found = trained(model)
    assert sum(map(len, found.values())) == 20
    if strategy == "weight":  # the other block has none, and stays as it was
        assert list(found) == ["model.layers.1.mlp.down_proj"]
        assert type(model.base_model.model.model.layers[0].mlp.down_proj) is torch.nn.Linear
    else:
        assert get_again(chosen) == found
    logits = model(token_ids()).logits
    model.save_pretrained(tmp_path)
    base = tiny_model("llama")
    base.load_state_dict(model.unload().state_dict())
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert trained(loaded) == found
    assert (loaded(token_ids()).logits - logits).abs().max() < 1e-12


def get_again(chosen):
    return trained(get_peft_model(tiny_model("llama"), chosen))


def test_each_target_may_have_a_budget_of_its_own():
    pattern = {"v_proj": 1, r".*\.1\.mlp\.up_proj": 0.1}
    fields = dict(target_modules="all-linear", budget_pattern=pattern)
    found = trained(get_peft_model(tiny_model("llama"), config(**fields)))
    for block in range(2):
        heads, channels = ATTENTION.format(block), FFN.format(block)
        assert len(found[f"{heads}.q_proj"]) == len(found[f"{heads}.o_proj"]) == 2 * 4
        assert len(found[f"{heads}.v_proj"]) == 4
        assert len(found[f"{channels}.down_proj"]) == 10
        assert len(found[f"{channels}.up_proj"]) == (4 if block else 10)
        # coupled: one draw, of which the smaller budget takes a part
        assert found[f"{heads}.q_proj"] == found[f"{heads}.o_proj"]
        assert set(found[f"{channels}.up_proj"]) <= set(found[f"{channels}.down_proj"])
    with pytest.raises(ValueError, match=r"budget_pattern\['v_proj'\]: 9 wanted of 8"):
        get_peft_model(tiny_model("llama"), config(**fields | dict(budget_pattern={"v_proj": 9})))


@pytest.mark.parametrize(
    "fields", (dict(), dict(selection="weight"), dict(scope="global")), ids=str
)
def test_budgets_of_no_target_are_refused(fields):
    name = f"{FFN.format(1)}.down_proj"
    pattern = {"v_proj": 1, "down_prj": 2, "0.o_proj": 1, name: 3}
    model = tiny_model("llama")
    with pytest.raises(
        ValueError, match="must name targets of the adapter, got 0.o_proj, down_prj$"
    ):
        get_peft_model(
            model, config(target_modules=["v_proj", "down_proj"], budget_pattern=pattern, **fields)
        )
    assert not trained(model)
    model = get_peft_model(model, config(budget_pattern={name: 3}, **fields))
    budgets = {"model.layers.0.mlp.down_proj": 10, name: 3}
    assert sum(len(trained(model)[key]) for key in budgets) == 13


def test_a_target_outside_the_table_may_have_a_budget_of_its_own():
    fields = dict(target_modules=["lm_head"], layout="gather", budget_pattern={"lm_head": 5})
    found = trained(get_peft_model(tiny_model("llama"), config(**fields)))
    assert found == {"lm_head": random_units(3, "lm_head", 32, 5).tolist()}


@pytest.mark.parametrize("model_type", ("gpt2", "bert"))
def test_projections_of_one_name_in_attention_and_ffn_have_blocks_of_their_own(model_type):
    model = tiny_model(model_type, intermediate_size=192)
    chosen = select_indices(model, config(selection="weight", layout="block"), progress=False)
    found = {name: torch.tensor(index) for name, index in chosen.indices.items()}
    widths = {len(index) for index in found.values()}
    assert widths == {2 * 4, 64} and len(found) == 4  # two heads, one block of channels
    for index in found.values():
        if len(index) == 64:
            assert index[0] % 64 == 0 and (index.diff() == 1).all()


def test_a_budget_is_looked_at_before_the_calibration():
    def batches():
        raise AssertionError("the calibration has begun")
        yield

    wrong = config(selection="activation", heads=9)
    with pytest.raises(ValueError, match="heads: 9 wanted of 8"):
        select_indices(tiny_model("llama"), wrong, batches(), progress=False)


def test_targets_of_one_block_may_draw_apart():
    fields = dict(target_modules=["up_proj", "down_proj"], coupled=False)
    found = trained(get_peft_model(tiny_model("llama"), config(**fields)))
    for block in range(2):
        for leaf in ("up_proj", "down_proj"):
            name = f"{FFN.format(block)}.{leaf}"
            assert found[name] == random_units(3, name, 40, 10).tolist()
        assert found[f"{FFN.format(block)}.up_proj"] != found[f"{FFN.format(block)}.down_proj"]


@pytest.mark.parametrize(
    "fields", (dict(), dict(coupled=False, layout="gather"), dict(layout="block")), ids=str
)
@pytest.mark.parametrize("model_type", ("llama", "mixtral"))
def test_select_indices_answers_what_an_adapter_draws(model_type, fields):
    base = tiny_model(model_type, intermediate_size=192)
    fields = dict(target_modules=["q_proj", "down_proj", "o_proj"], seed=5) | fields
    chosen = select_indices(base, config(**fields))
    model = get_peft_model(base, config(**fields))
    assert len(chosen.indices) == 6
    assert chosen.indices == {
        module.name: module.s2ft_index["default"].tolist()
        for module in model.modules()
        if isinstance(module, S2FTLayer)
    }


def test_targets_may_compete_apart():
    """With coupled=False a global budget goes to other channels of each target."""
    fields = dict(target_modules=["up_proj", "down_proj"], scope="global", selection="random")
    found = trained(get_peft_model(tiny_model("llama"), config(coupled=False, **fields)))
    sizes = {f"{FFN.format(block)}.up_proj": 40 for block in range(2)}
    want = ranked_units(random_scores(3, sizes), dict.fromkeys(sizes, 10), scope="global")
    for name, units in want.items():
        assert found[name] == units.tolist()
        assert found[name] != found[name.replace("up", "down")]
    found = trained(get_peft_model(tiny_model("llama"), config(**fields)))
    for name in want:
        assert found[name] == found[name.replace("up", "down")]


def assert_runs(index, length):
    """Aligned runs of `length` neighbours, in each expert where there are any."""
    for part in torch.tensor(index).reshape(-1, length):
        assert part[0] % length == 0 and (part.diff() == 1).all()


@pytest.mark.parametrize("scope", ("layer", "global"))
@pytest.mark.parametrize("strategy", ("random", *STRATEGIES))
def test_channels_come_in_runs(strategy, scope, tmp_path):
    """Of 40 channels 10 are asked for: two runs of 8, one that ends at 40 among those to choose."""
    model = tiny_model("llama")
    fields = dict(selection=strategy, scope=scope, target_modules=["o_proj", "down_proj"])
    batches = None if strategy in ("random", "weight") else [token_ids()]
    chosen = select_indices(model, config(granularity=8, **fields), batches, progress=False)
    runs = {name: index for name, index in chosen.indices.items() if "mlp" in name}
    assert sum(map(len, runs.values())) == 2 * 16
    for index in runs.values():
        assert_runs(index, 8)
    single = select_indices(model, config(**fields), batches, progress=False)
    heads = [name for name in single.indices if "attn" in name]
    assert heads and all(chosen.indices[name] == single.indices[name] for name in heads)

    if (strategy, scope) == ("random", "layer"):
        want = {name: random_units(3, name, 40, 16, 8) for name in map(FFN.format, range(2))}
    else:  # the score of a run is the root of its sum of squares
        values = random_scores(3, {FFN.format(block): 40 for block in range(2)})
        if strategy != "random":
            values = scores(model, strategy, batches, progress=False)
        of_runs = {
            name: values[name].view(5, 8).square().sum(1).sqrt()
            for name in map(FFN.format, range(2))
        }
        best = ranked_units(of_runs, dict.fromkeys(of_runs, 2), scope=scope)
        want = {name: channels_of_heads(runs, 8) for name, runs in best.items()}
    assert runs == {f"{name}.down_proj": units.tolist() for name, units in want.items()}

    model = get_peft_model(model, chosen)
    assert trained(model) == chosen.indices
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert loaded.peft_config["default"].granularity == 8
    assert trained(loaded) == chosen.indices


@pytest.mark.parametrize("strategy", ("random", "weight"))
def test_channels_of_every_expert_come_in_runs(strategy):
    model = tiny_model("mixtral", intermediate_size=48, moe_intermediate_size=48)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    fields = dict(selection=strategy, target_modules=targets, channels=9, granularity=8)
    chosen = select_indices(model, config(**fields))
    assert len(chosen.indices) == 4
    for name, index in chosen.indices.items():
        num = 16 if "down" in name else 2 * 16  # of gate and of up
        assert all(len(expert) == num for expert in index)
        assert_runs(index, 8)
    get_peft_model(model, chosen)


def test_runs_where_budgets_and_sizes_are_no_multiples():
    """Rounded up, as far as there are whole runs: a shorter one at the end is never taken."""
    fields = dict(target_modules=["up_proj", "down_proj"], granularity=16)
    for channels, count in ((1, 16), (16, 16), (17, 32), (40, 32), (1.0, 32), (0.01, 16)):
        found = trained(get_peft_model(tiny_model("llama"), config(channels=channels, **fields)))
        for index in found.values():
            assert len(index) == count and max(index) < 32
            assert_runs(index, 16)
    pattern = dict(channels=17, budget_pattern={"up_proj": 1})
    found = trained(get_peft_model(tiny_model("llama"), config(**fields | pattern)))
    for block in range(2):
        up, down = (found[f"{FFN.format(block)}.{leaf}"] for leaf in ("up_proj", "down_proj"))
        assert len(up) == 16 and len(down) == 32 and set(up) < set(down)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="channels: blocks of 41 wanted, there are 40 in all"):
        get_peft_model(model, config(granularity=41))
    assert not trained(model)


def test_a_target_outside_the_table_has_runs():
    fields = dict(target_modules=["lm_head"], layout="gather", channels=5, granularity=4)
    found = trained(get_peft_model(tiny_model("llama"), config(**fields)))
    assert found == {"lm_head": random_units(3, "lm_head", 32, 8, 4).tolist()}


def test_what_granularity_may_be():
    for bad in (True, 16.0, "16", None):
        with pytest.raises(TypeError, match="granularity: a number of channels .int. wanted, got"):
            config(granularity=bad)
    for bad in (0, -16):
        with pytest.raises(ValueError, match=f"granularity must be at least 1 channel, got {bad}"):
            config(granularity=bad)
    with pytest.raises(ValueError, match="granularity=16 does not go with layout='block'.* 64"):
        config(granularity=16, layout="block")
    draws = [
        trained(get_peft_model(tiny_model("llama", intermediate_size=192), config(**fields)))
        for fields in (
            dict(layout="block"),
            dict(layout="block", granularity=64),
            dict(granularity=64),
        )
    ]
    assert draws[0] == draws[1] == draws[2]


def test_a_configuration_without_granularity_loads(tmp_path):
    """It selects as it did: adapters are older than the field."""
    model = get_peft_model(tiny_model("llama"), config())
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    assert fields.pop("granularity") == 1
    path.write_text(json.dumps(fields))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    assert loaded.peft_config["default"].granularity == 1
    assert trained(loaded) == trained(model)


def test_choices_that_would_decide_nothing_are_refused():
    with pytest.raises(ValueError, match="largest=False ranks by scores"):
        config(largest=False)
    with pytest.raises(ValueError, match="coupled=False .* got selection='weight'"):
        config(selection="weight", coupled=False)


def test_explicit_indices_decide():
    wanted = {"model.layers.1.mlp.down_proj": [39, 2, 7], "model.layers.0.self_attn.v_proj": [1]}
    fields = dict(indices=wanted, target_modules=["down_proj", "v_proj"])
    model = get_peft_model(tiny_model("llama"), config(**fields))
    assert trained(model) == wanted
    for bad, message in (
        ({"model.layers.1.mlp.down_proj": [40]}, r"layers\.1\.mlp\.down_proj: index must lie in"),
        ({"model.layers.1.mlp.down_proj": [1, 1]}, "down_proj: index must not repeat"),
        ({"model.layers.1.mlp.down_proj": []}, "down_proj: index must be non-empty"),
        ({"model.layers.1.mlp.down_proj": [1.5]}, "down_proj'. must be .* whole numbers.*float32"),
        ({"model.layers.1.mlp.down_proj": [True]}, "down_proj'. must be .* whole numbers.*bool"),
        ({"model.layers.1.mlp.down_proj": [2**40]}, "down_proj.* must be .*overflow"),
        ({"model.layers.7.mlp.down_proj": [1]}, "indices names .*layers.7.mlp.down_proj"),
    ):
        model = tiny_model("llama")
        with pytest.raises(ValueError, match=message):
            get_peft_model(model, config(**fields | dict(indices=bad)))
        assert not trained(model)


@pytest.mark.parametrize("mode", ("inplace", "additive"))
@pytest.mark.parametrize("layout", ("permute", "gather"))
def test_selections_that_differ_within_a_block_train_right(mode, layout):
    """One permutation cannot make both runs contiguous: the other target is gathered."""
    fields = dict(target_modules=["up_proj", "down_proj", "o_proj"], coupled=False)
    losses = []
    for chosen in (config(**fields, mode=mode, layout=layout), config(**fields, layout="gather")):
        model = get_peft_model(tiny_model("llama"), chosen).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        ids = token_ids()
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert max(abs(a - b) for a, b in zip(losses[:5], losses[5:], strict=True)) < 1e-10
