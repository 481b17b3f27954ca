"""lab/bench.py: contenders compute what they are compared with, every step trains, all figures come out, and
a race is a race by the clock."""
import dataclasses
import json
import re

import pytest
import torch

import train
from common import load_dict, new_figure
from lab import bench
from mobilemoe import DENSE, PRESETS, MobileMoE

TEST = dataclasses.replace(PRESETS["test"], z_loss=0.0)         # transformers has no such term
SMALL = ("--preset", "test", "--batch", "2", "--context", "48", "--rounds", "1")


@pytest.fixture
def model() -> MobileMoE:
    torch.manual_seed(0)
    model = MobileMoE(TEST)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)           # a wrong expert would be heard
    return model


@pytest.fixture
def batch():
    return torch.randint(TEST.vocab_size, (2, 2, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("twin", ["naive", "eager", "batched_mm", "grouped_mm"])
def test_contenders_of_the_same_model_have_its_loss_and_gradients(model, batch, twin):
    other = bench.naive_twin(model) if twin == "naive" else bench.Glm(model, twin, torch.float32)
    losses = [net(*batch)[0] for net in (model, other)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)
    norms = []
    for net, loss in zip((model, other), losses):
        loss.backward()
        experts = [p.grad.norm() for name, p in net.named_parameters() if ".experts." in name]
        norms.append(torch.stack(experts).sort().values)
    assert norms[0].min() > 0
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-3, atol=1e-6)


def test_a_timed_step_moves_every_parameter(model, batch):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    bench.training(model, [batch], bench.CAPACITY)()
    for name, p in model.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, before[name]), name
        assert p.grad is None                                   # or the next step would add to it


def test_a_run_prints_every_row_and_ratio_and_writes_nothing(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(bench.main, *SMALL)
    assert code == 0, err
    for row in ("drop-and-pad", "dropless, QAT", "dense, equal active size", "naive loop over experts",
                "transformers grouped_mm", "causal_attention", "rms_norm", "F.cross_entropy",
                "drop-and-pad / transformers' best", "drop-and-pad / dense", "time of a QAT step / plain"):
        assert re.search(rf"^{re.escape(row)} +[\d.,]+", out, re.M), row
    assert not list(tmp_path.iterdir())


def test_without_transformers_the_rest_is_measured(model, monkeypatch, capsys):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.glm_contenders(model) == {} and "pip install transformers" in capsys.readouterr().out


def test_impossible_sizes_are_refused(refused):
    assert "--rounds" in refused(bench.main, *SMALL, "--rounds", "0")
    assert "--minutes" in refused(bench.main, "race", "--minutes", "0")
    if not torch.cuda.is_available():
        assert "--device" in refused(bench.main, *SMALL, "--device", "cuda")


def test_ratios_are_taken_within_a_round():
    """A computer that was three times slower in one round, for both, changes nothing."""
    assert bench.ratio({"ours": [1.0, 3.0, 1.1], "theirs": [2.0, 6.0, 2.2]}, "ours", "theirs") == 2


def test_a_race_gives_both_the_same_seconds_and_prints_by_how_much_who_is_ahead(run_with, capsys):
    out = run_with("tokens")
    twin = dataclasses.replace(PRESETS["test"], **DENSE, top_k=0)
    bench.race({"mixture": PRESETS["test"], "twin": twin}, 0.04, 0, out)
    mixture, twin = json.loads((out / "race.json").read_text())["curves"].values()
    for curve in (mixture, twin):
        assert len(curve) == 24 and 2.4 <= curve[-1]["seconds"] < 3
        assert curve[-1]["bits_per_byte"]["prose"] < curve[0]["bits_per_byte"]["prose"]
    said = capsys.readouterr().out
    for domain, bits in mixture[-1]["bits_per_byte"].items():
        assert f"({bits - twin[-1]['bits_per_byte'][domain]:+.4f})" in said
    assert (out / "race.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("speed", [1e3, 1e6])
def test_the_rate_ends_with_the_clock_even_if_the_warm_up_was_wrong(run_with, monkeypatch, speed):
    factors = []

    def spy(model, opts, stage, batches, step, steps, micro_rows):
        factors.append(train.lr_factor(stage, step, steps))
        train.train_step(model, opts, stage, batches, step, steps, micro_rows)
    monkeypatch.setattr(bench, "train_step", spy)
    prepared = load_dict(run_with("tokens") / "tokens.pt")
    next(bench.train_by_clock("", PRESETS["test"], prepared, 0, 1.0, 0.02, speed, glances=1))
    assert max(factors) > 0.8 and factors[-1] < 0.1


def test_the_crossing_is_where_two_curves_meet():
    a, b = ([{"seconds": 10 * i, "bits_per_byte": {"prose": y}} for i, y in enumerate(line)]
            for line in ((4, 2, 1.5), (3, 2.5, 2.2)))
    _, [[axis]] = new_figure(1, 1, (4, 3))
    assert bench.draw(axis, "seconds", {"a": a, "b": b}) == [pytest.approx(20 / 3, abs=0.02)]
    assert bench.draw(axis, "seconds", {"b": b, "b again": b}) == []
