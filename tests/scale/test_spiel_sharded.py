"""SpIEL beyond one process: static entries train under FSDP2, replacing them is refused."""

import pytest
import torch
from sharded_models import adapted, distance, shard, train, values
from torch.distributed.fsdp import FullyShardedDataParallel

from s2kernels.peft import SpIELTuner, make_optimizer


def _aged(rank):
    model = shard(adapted("spiel"))
    losses = train(model, 5, rank, 2, make_optimizer(model, 1e-2))
    return losses, values(model)


def test_aged_adamw_trains_sharded_deltas_as_on_one_process(ranks):
    model = adapted("spiel")
    losses = train(model, optimizer=make_optimizer(model, 1e-2))
    for got, deltas in ranks.run(_aged):
        assert max(abs(a - b) for a, b in zip(got, losses, strict=True)) < 2e-6
        assert distance(values(model), deltas) < 1e-5


def _refused(rank):
    model = shard(adapted("spiel", selection="momentum_approximation"))
    with pytest.raises(ValueError, match="SM3 cannot train the delta"):
        train(model, 1, rank, 2, make_optimizer(model, 1e-2))
    model = shard(adapted("spiel"))
    with pytest.raises(ValueError, match="entries cannot be replaced"):
        SpIELTuner(model, make_optimizer(model, 1e-2), 100)
    model = FullyShardedDataParallel(
        adapted("spiel"), use_orig_params=True, device_id=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="entries cannot be replaced"):
        SpIELTuner(model.module, make_optimizer(model.module, 1e-2), 100)


def test_what_needs_all_of_a_delta_is_refused(ranks):
    ranks.run(_refused)
