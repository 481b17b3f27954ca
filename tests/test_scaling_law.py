"""lab/scaling_law.py: the law, recovery of the published one, budgets, the price of a mixture, a sweep."""
import dataclasses
import itertools
import json
import math

import numpy as np
import pytest

from lab import scaling_law
from lab.scaling_law import PUBLISHED, Budget, best_shapes, bytes_read, fit_law, law, saturated
from mobilemoe import DENSE, PRESETS, MobileMoE, config_from_dict

EXPERTS = np.array([1, 2, 4, 8, 16, 32])

# ----------------------------------------------------------------------------------------------------------
# The law


def test_the_published_coefficients_give_the_published_curve():
    published = [2.391, 2.356, 2.345, 2.346, 2.350, 2.355]
    np.testing.assert_allclose(law(0.3, 500, EXPERTS), published, atol=0.0006)


def test_effective_experts_start_at_one_rise_and_stay_bounded():
    experts = saturated(np.array([1, 2, 4, 8, 16, 32, 1e3, 1e9]))
    assert experts[0] == 1 and (np.diff(experts) > 0).all() and experts[-1] < 32
    assert (experts[1:] < [2, 4, 8, 16, 32, 1e3, 1e9]).all()


def test_without_experts_the_law_is_chinchillas():
    N, D = np.meshgrid([0.001, 0.3, 0.9, 7], [0.001, 100, 500, 6000])
    k = PUBLISHED
    chinchillas = k["A"] * N ** k["alpha"] + k["B"] * D ** k["beta"] + k["c"]
    np.testing.assert_allclose(chinchillas, law(N, D, 1), rtol=1e-14)


def test_the_law_is_the_joint_moe_law():
    """Ludziejewski et al. in logarithms, with their 1 / E-hat = 1 / (E - 1 + 1 / (1/Es - 1/Em)) + 1 / Em."""
    a, delta, alpha, gamma, b, omega, beta, zeta, c = PUBLISHED.values()
    for N, D, E in itertools.product((0.3, 0.9), (100, 500), (1, 3, 32)):
        hat = math.log((E - 1 + 32 / 31) * 32 / (E - 1 + 32 / 31 + 32))
        active = math.exp(math.log(a) + delta * hat + (alpha + gamma * hat) * math.log(N))
        tokens = math.exp(math.log(b) + omega * hat + (beta + zeta * hat) * math.log(D))
        assert law(N, D, E) == pytest.approx(active + tokens + c, rel=1e-14)

# ----------------------------------------------------------------------------------------------------------
# The fit


@pytest.fixture(scope="module")
def papers_grid():
    """72 points to fit and 18 held out, [4, n]: the published law on the paper's grid, with its noise."""
    grid = np.array(list(itertools.product((0.3, 0.5, 0.9), (100, 200, 300, 400, 500), EXPERTS))).T
    rng = np.random.default_rng(1)
    points = np.vstack([grid, law(*grid) + rng.normal(0, 0.0076, grid.shape[1])])
    points = points[:, rng.permutation(grid.shape[1])]
    return points[:, :72], points[:, 72:]


def rmse(points, k) -> float:
    return float(np.sqrt(np.mean((law(*points[:3], k) - points[3]) ** 2)))


def test_the_published_law_is_recovered_from_noisy_losses(papers_grid):
    points, heldout = papers_grid
    k, *resampled = fit_law(points, starts=4, resamples=5)
    assert rmse(heldout, k) <= 0.01
    assert len(resampled) == 5 and all(other != k for other in resampled)
    assert rmse(heldout, k | {"zeta": 0.0, "omega": 0.0}) > 0.01          # the bound can tell a wrong law


def test_one_run_gone_wrong_does_not_bend_the_law(papers_grid):
    points, heldout = papers_grid
    spoilt = points.copy()
    spoilt[3, 0] += 2
    assert rmse(heldout, fit_law(spoilt, starts=4)[0]) <= 0.01

# ----------------------------------------------------------------------------------------------------------
# plan


def test_E_8_lies_in_a_flat_valley_that_moves_when_extrapolated():
    assert abs(law(0.3, 500, 4) - law(0.3, 500, 8)) < 0.001
    assert min(EXPERTS, key=lambda E: law(0.3, 6000, E)) == 2


@pytest.mark.parametrize("name", "SML")
def test_the_released_shapes_lie_on_the_frontier(name):
    shape = PRESETS[name]
    memory = Budget(math.inf, 8192, 500e9).bytes(shape)
    own = Budget(memory, 8192, 500e9, 2 * shape.active_params())
    assert own.admits(shape) and 0 <= own.loss(shape) - own.loss(best_shapes(own)[0]) < 0.01


def test_a_plan_stays_within_every_budget_and_trains(call, tmp_path):
    out = tmp_path / "phone.json"
    code, said, err = call(scaling_law.main, "plan", "--memory", "0.9GB", "--inference-gflops", "0.6",
                           "--train-flops", "8e20", "--out", out)
    assert code == 0 and "come from the paper's sweeps" in said and "EXTRAPOLATED" not in said, err
    config = config_from_dict(json.loads(out.read_text()))
    assert config.int4_bytes() + config.kv_bytes(8192) <= 0.9e9
    assert 2 * config.active_params() <= 0.6e9 and 6 * config.active_params() * 500e9 <= 8e20
    assert 36 <= config.d_model / config.n_layers <= 44 and config.n_kv_heads == 4
    _, said, _ = call(scaling_law.main, "plan", "--tokens", "6T")
    assert "EXTRAPOLATED" in said


@pytest.mark.parametrize("arguments, word", [
    (("--memory", "5"), "unit"), (("--memory", "1MB"), "no model fits"), (("--context", "0"), "--context"),
    (("--inference-gflops", "many"), "--inference-gflops"), (("--out", "nowhere/x.json"), "no folder")])
def test_impossible_budgets_are_refused(refused, arguments, word):
    assert word in refused(scaling_law.main, "plan", *arguments)

# ----------------------------------------------------------------------------------------------------------
# sweep and fit


def test_the_list_of_runs_is_fixed_and_has_what_the_findings_need():
    runs = scaling_law.all_runs(4096 * 352)
    assert len(set(runs)) == len(runs) == 31 and runs == scaling_law.all_runs(4096 * 352)
    series = [run for run in runs if run.over_E]
    assert len(series) >= 12 and {run.E for run in series} == set(EXPERTS)
    assert len({run.size for run in series}) == 2 and len({run.tokens for run in series}) == 3


def test_a_phone_reads_the_active_part_of_every_weight():
    config = PRESETS["test"]
    size = 0
    for name, parameter in MobileMoE(config).state_dict().items():
        small = parameter.dim() < 2 or "router" in name                     # not quantised
        part = config.active_routed / config.n_routed if parameter.dim() == 3 else 1
        size += parameter.numel() * part * (4 if small else 18 / 32)
    assert bytes_read(config) == size < config.int4_bytes()
    dense = dataclasses.replace(config, **DENSE)
    assert bytes_read(dense) == dense.int4_bytes()


def test_the_price_of_a_mixture_is_read_off_between_its_runs():
    """Its loss falls by 1 with every doubling of the seconds, from 6 after one. So it is 5.5 after 2^0.5."""
    runs = scaling_law.all_runs(4096)
    nats = dict.fromkeys(runs, 9.0)
    seconds = dict.fromkeys(runs, 10.0)
    for n, tokens in enumerate((1024, 2048, 4096)):
        run = scaling_law.Run("small", 8, 4, tokens)
        nats[run], seconds[run] = 6 - n, 2 ** n
    large, small = scaling_law.Run("large", 1, 1, 2048), scaling_law.Run("small", 1, 1, 4096)
    nats[large], nats[small] = 5.5, 3.9                     # the mixture never gets to 3.9
    one_seed = [run for run in runs if not run.seed]
    first, second = scaling_law.price({run: nats[run] for run in one_seed}, seconds, 4096).splitlines()[1:]
    read = bytes_read(scaling_law.Run("small", 8, 4, 1).config())
    for line, dense, time in ((first, large, 2 ** 0.5 / 10), (second, small, math.inf)):
        assert f"dense {dense.size} after {dense.tokens:,} tokens" in line
        assert f"in {time:.2f} times" in line
        assert f"reads {read / bytes_read(dense.config()):.2f} times" in line


def test_a_finished_sweep_is_fitted_and_drawn_and_a_gap_in_it_is_named(call, refused, tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = []
    for run in scaling_law.all_runs(4096 * 352):
        nats = law(run.config().active_params() / 1e9, run.tokens / 1e9, run.E) + 0.001 * run.seed
        lines.append(json.dumps({**run._asdict(), "nats": float(nats), "tokens/s": 9000}))
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert "seed=2" in refused(scaling_law.main, "fit", path)
    path.write_text("\n".join(lines) + "\n")
    code, said, err = call(scaling_law.main, "fit", path)
    assert code == 0, err
    assert all(words in said for words in ("a mixture beats dense", "as good as dense", "RMSE"))
    for name in ("law.png", "cost.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    path.write_text('{"size": "small"}\n')
    assert "line 1" in refused(scaling_law.main, "fit", path)


@pytest.mark.slow
def test_a_shortened_sweep_trains_every_run_and_finished_ones_are_skipped(call, tmp_path, monkeypatch):
    runs = [scaling_law.Run("small", 1, 1, 4096), scaling_law.Run("small", 8, 8, 4096, shared=True)]
    monkeypatch.setattr(scaling_law, "all_runs", lambda top: runs)
    for expected in ("2 runs to train, 0 are there", "0 runs to train, 2 are there"):
        code, said, err = call(scaling_law.main, "sweep", "--run", tmp_path, "--tokens", "4096")
        assert code == 0 and expected in said, err
        records = scaling_law.read_runs(tmp_path / "runs.jsonl")
        assert set(records) == set(runs) and all(5 < nats < 8 for nats, _ in records.values())
