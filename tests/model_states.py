"""The weights of a base model under an adapter, and whether two states are the same to the bit."""

import torch


def base_state(model):
    """Copies of the base model's weights, under the names they have without an adapter."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): value.clone()
        for name, value in model.state_dict().items()
        if "s2ft_" not in name and "spiel_" not in name
    }


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name
