"""The paper's theory by numbers: closed forms against descent, bounds against their proofs."""

import json

import pytest
import torch

from bench.learning import __main__ as learning
from bench.learning import theory


@pytest.mark.parametrize("seed", range(3))
def test_no_rows_that_are_trained_do_better_than_the_closed_form(seed):
    """Its residual has no part that the rows could still express: the gradient is 0."""
    p = theory.draw(seed, shift=6, rows=5)
    residual = (p.target_in - theory.s2ft(p)) @ p.root @ p.root
    gradient = (p.up.T @ residual @ p.down.T)[p.rows]
    assert gradient.abs().max() < 1e-8 * p.target_in.abs().max()


def test_lora_of_full_rank_reaches_the_target_and_less_does_not():
    p = theory.draw(0, shift=4, rows=8)
    before = p.risk(p.target_in, p.pre)
    assert p.risk(p.target_in, theory.lora(p, 4)) < 1e-12 * before
    assert p.risk(p.target_in, theory.lora(p, 3)) > 1e-4 * before
    assert p.risk(p.target_in, theory.lora(p, 0)) == pytest.approx(before, rel=1e-12)


@pytest.mark.slow
def test_gradient_descent_comes_to_the_closed_forms():
    for found in theory.descent(seeds=1):
        assert found["descent"] == pytest.approx(found["closed form"], rel=1e-3)
        assert found["descent"] >= found["closed form"] * (1 - 1e-9)


@pytest.mark.parametrize(("rank", "shift", "holds"), [(2, 8, False), (8, 8, True), (6, 4, True)])
def test_loras_bound_needs_a_rank_that_is_no_smaller_than_that_of_the_shift(rank, shift, holds):
    found = theory.bounds(rank, shift, seeds=12)
    assert (found["broken"]["lora lower bound"] == 0) == holds
    assert found["broken"]["s2ft 1 + 3 eps^2"] == found["broken"]["s2ft 1 + eps^2"] == 0
    assert found["equation off by"] < 1e-7


def test_all_rows_learn_the_target_and_end_where_lora_does():
    p = theory.draw(1, shift=3, rows=theory.WIDTH)
    shift = p.risk(p.target_out, p.target_in)
    assert p.risk(p.target_out, theory.s2ft(p)) == pytest.approx(shift, rel=1e-6)
    assert p.risk(p.target_out, theory.lora(p, 3)) == pytest.approx(shift, rel=1e-6)


@pytest.mark.parametrize("activation", theory.ACTIVATIONS)
def test_a_layer_with_an_activation_learns_and_is_bounded_as_reported(activation):
    found = theory.nonlinear(activation, seed=0, steps=80)
    assert found["lora in"] < 0.1  # r exceeds the rank of the shift
    assert 0.2 < found["s2ft in"] < 0.95  # the rows can express a part of it
    assert found["s2ft out"] <= 1 + found["eps^2"]
    assert found["lora out"] == pytest.approx(found["shift"], rel=0.15)


def test_the_command_writes_what_it_computes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(theory, "study", lambda: {"bounds": [], "descent": [], "nonlinear": []})
    assert learning.main(["theory", "--results", str(tmp_path)]) == 0
    document = json.loads((tmp_path / "theory.json").read_text())
    assert document["machine_info"]["torch"] == torch.__version__
    assert "theory.json" in capsys.readouterr().out
