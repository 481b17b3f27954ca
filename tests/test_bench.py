"""bench.py: the contenders compute what they are compared with, every step trains, and all figures come out."""
import dataclasses
import functools
import re

import pytest
import torch

import bench
from mobilemoe import PRESETS, MobileMoE

TEST = dataclasses.replace(PRESETS["test"], z_loss=0.0)         # transformers has no such term
SMALL = ("--preset", "test", "--batch", "2", "--context", "48", "--rounds", "1")


@pytest.fixture
def model() -> MobileMoE:
    torch.manual_seed(0)
    model = MobileMoE(TEST)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)           # loud enough that a wrong expert would be heard
    return model


@pytest.fixture
def batch():
    return torch.randint(TEST.vocab_size, (2, 2, 64), generator=torch.Generator().manual_seed(1)).unbind()


@pytest.mark.parametrize("twin", ["naive", "eager", "batched_mm", "grouped_mm"])
def test_contenders_of_the_same_model_have_its_loss_and_gradients(model, batch, twin):
    want = bench.our_loss(model, None, *batch)
    if twin == "naive":
        other = bench.naive_twin(model)
        got = bench.our_loss(other, None, *batch)
    else:
        pytest.importorskip("transformers")
        other = bench.glm_twin(model, twin)
        assert other.config._experts_implementation == twin
        got = bench.glm_loss(other, *batch)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
    grads = []
    for net, loss in ((model, want), (other, got)):
        loss.backward()
        grads.append(torch.stack([p.grad.norm() for name, p in net.named_parameters() if ".experts." in name]))
    assert grads[0].min() > 0
    torch.testing.assert_close(grads[1].sort().values, grads[0].sort().values, rtol=1e-3, atol=1e-6)


def test_the_loop_is_a_loop(model, batch, monkeypatch):
    monkeypatch.setattr(bench.Experts, "forward", None)         # the twin must not fall back on what it is compared with
    assert bench.our_loss(bench.naive_twin(model), None, *batch).isfinite()


@pytest.mark.parametrize("kind", ["adamw", "own"])
def test_a_timed_step_moves_every_parameter(model, batch, kind):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = (bench.own_step(model, (torch.stack(batch),)) if kind == "own"
            else bench.adamw_step(model, functools.partial(bench.our_loss, model, bench.CAPACITY), (torch.stack(batch),)))
    step()
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
        assert p.grad is None                                   # or the next step would add to it


def test_a_run_prints_every_row_and_ratio_and_writes_nothing(call, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    code, out, err = call(bench.main, *SMALL)
    assert code == 0, err
    for row in (bench.PADDED, bench.DROPLESS, bench.LOOP, bench.DENSE, bench.OWN, bench.QAT, "transformers", "generate()",
                "drop-and-pad / transformers' best", "drop-and-pad / dense", "time of a QAT step / plain",
                "LinearCrossEntropy", "F.linear_cross_entropy", "attend", "F.scaled_dot_product_attention"):
        assert f"\n{row}" in out or f" {row}" in out, row
    assert not list(tmp_path.iterdir())
    assert len(re.findall(r"aim: at (?:least|most)", out)) == 3 and len(re.findall(r"\d x as fast", out)) == 8


def test_without_transformers_the_rest_is_measured(call, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    code, out, _ = call(bench.main, *SMALL)
    assert code == 0 and "pip install transformers" in out and "drop-and-pad / dense" in out
    assert "transformers' best" not in out


@pytest.mark.parametrize("arguments", [("--rounds", "0"), ("--context", "16"), ("--batch", "-1")])
def test_impossible_sizes_are_refused(call, arguments):
    code, _, err = call(bench.main, *SMALL, *arguments)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1


def test_ratios_are_taken_within_a_round():
    """A computer that was three times slower in one round, for both, changes nothing."""
    seconds = {"ours": [1.0, 3.0, 1.1], "theirs": [2.0, 6.0, 2.2]}
    assert bench.ratio(seconds, "ours", "theirs") == pytest.approx(2)
