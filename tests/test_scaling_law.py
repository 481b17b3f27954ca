"""scaling_law.py: the law and its reduced forms, recovery of the published one, budgets, runs files, a sweep for real."""
import dataclasses
import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import scaling_law
import train
from mobilemoe import PRESETS, UserError, config_from_dict
from scaling_law import PUBLISHED, Budget, Results, base, chinchilla, fit_law, law, plan, read_runs, rmse, saturated, wanted

S_BUDGET = ("--memory", "0.9GB", "--inference-gflops", "0.6")

# ----------------------------------------------------------------------------------------------------------------------
# The law


def test_the_published_coefficients_give_the_published_curve():
    curve = law(0.3, 500, np.array([1, 2, 4, 8, 16, 32]))
    np.testing.assert_allclose(curve, [2.391, 2.356, 2.345, 2.346, 2.350, 2.355], atol=0.0006)


def test_effective_experts_start_at_one_rise_and_stay_bounded():
    experts = saturated(np.array([1, 2, 4, 8, 16, 32, 1e3, 1e9]))
    assert experts[0] == 1
    assert (np.diff(experts) > 0).all() and experts[-1] < 32
    assert (experts[1:] < [2, 4, 8, 16, 32, 1e3, 1e9]).all()


@pytest.mark.parametrize("E", [1, 2, 8, 32])
def test_with_E_fixed_the_law_is_chinchillas(E):
    N, D = np.meshgrid([0.001, 0.3, 0.9, 7], [0.001, 100, 500, 6000])
    k = chinchilla(E)
    np.testing.assert_allclose(k["A"] * N ** k["alpha"] + k["B"] * D ** k["beta"] + k["c"], law(N, D, E), rtol=1e-14)
    assert E > 1 or k == {name: PUBLISHED[name] for name in k}             # ln 1 = 0: a dense model has the plain coefficients


def test_the_law_is_the_joint_moe_law():
    """Ludziejewski et al., written out in logarithms with their E-hat: 1 / E-hat = 1 / (E - 1 + 1 / (1/Es - 1/Em)) + 1 / Em."""
    a, delta, alpha, gamma, b, omega, beta, zeta, c = PUBLISHED.values()
    for N, D, E in itertools.product((0.3, 0.9), (100, 500), (1, 3, 32)):
        hat = (E - 1 + 32 / 31) * 32 / (E - 1 + 32 / 31 + 32)
        active = math.exp(math.log(a) + delta * math.log(hat) + (alpha + gamma * math.log(hat)) * math.log(N))
        tokens = math.exp(math.log(b) + omega * math.log(hat) + (beta + zeta * math.log(hat)) * math.log(D))
        assert law(N, D, E) == pytest.approx(active + tokens + c, rel=1e-14)


# ----------------------------------------------------------------------------------------------------------------------
# The fit


@pytest.fixture(scope="module")
def papers_grid():
    """-> 72 points to fit and 18 held out, [4, n]: the published law on the paper's grid with noise of the paper's RMSE."""
    grid = np.array(list(itertools.product((0.3, 0.5, 0.9), (100, 200, 300, 400, 500), (1, 2, 4, 8, 16, 32)))).T
    rng = np.random.default_rng(1)
    points = np.vstack([grid, law(*grid) + rng.normal(0, 0.0076, grid.shape[1])])[:, rng.permutation(grid.shape[1])]
    return points[:, :72], points[:, 72:]


def test_the_published_law_is_recovered_from_noisy_losses(papers_grid):
    points, heldout = papers_grid
    assert rmse(*heldout, fit_law(*points, starts=4)) <= 0.01


@pytest.mark.parametrize("term", [("omega", "zeta"), ("alpha", "gamma"), ("beta", "zeta")])
def test_without_a_term_of_the_law_recovery_fails(papers_grid, term):
    points, heldout = papers_grid
    assert rmse(*heldout, fit_law(*points, without=term, starts=4)) > 0.01


def test_one_run_gone_wrong_does_not_bend_the_law(papers_grid):
    points, heldout = papers_grid
    spoilt = points.copy()
    spoilt[3, 0] += 2
    assert rmse(*heldout, fit_law(*spoilt, starts=4)) <= 0.01


# ----------------------------------------------------------------------------------------------------------------------
# plan


def test_E_8_lies_in_a_flat_valley_that_moves_when_extrapolated():
    assert abs(law(0.3, 500, 4) - law(0.3, 500, 8)) < 0.001
    assert min((1, 2, 4, 8, 16, 32), key=lambda E: law(0.3, 6000, E)) == 2


@pytest.mark.parametrize("name", "SML")
def test_the_released_shapes_lie_on_the_frontier(name):
    shape = PRESETS[name]
    budget = Budget(math.inf, 8192, 500e9)
    own = Budget(budget.bytes(shape), 8192, 500e9, shape.inference_flops_per_token())
    assert 0 <= own.loss(shape) - own.loss(plan(own)[0]) < 0.01


def test_equation_5_counts_half_a_byte_per_weight_and_a_byte_per_key_and_value():
    assert Budget(5e9, 8192, 5e11).bytes(PRESETS["S"]) == PRESETS["S"].total_params() / 2 + 2 * 8192 * 20 * 4 * 64


def test_a_plan_stays_within_every_budget_and_says_what_equation_1_does_not_know(call):
    code, out, _ = call(scaling_law.main, "plan", *S_BUDGET, "--train-flops", "8e20")
    assert code == 0 and "come from the paper's sweeps, not from equation 1" in out
    assert "fixed active size" in out and "fixed memory" in out and "EXTRAPOLATED" not in out
    config, _ = plan(Budget(0.9e9, 8192, 500e9, 0.6e9, 8e20))
    assert config.total_params() / 2 + config.kv_bytes(8192) <= 0.9e9
    assert 2 * config.active_params() <= 0.6e9 and 6 * config.active_params() * 500e9 <= 8e20
    assert 36 <= config.d_model / config.n_layers <= 44 and config.d_ff == 4 * config.d_model and config.n_kv_heads == 4


def test_beyond_what_was_fitted_a_plan_says_that_it_extrapolates(call):
    assert "EXTRAPOLATED: the law was fitted to 100 to 500B" in call(scaling_law.main, "plan", "--tokens", "6T")[1]
    assert "EXTRAPOLATED: within this budget" in call(scaling_law.main, "plan", "--memory", "100MB")[1]
    assert "(extrapolated)" in call(scaling_law.main, "plan")[1]            # 5 GB of dense model


def test_a_plans_config_is_one_that_train_accepts(call, monkeypatch, tmp_path):
    out = tmp_path / "phone.json"
    assert call(scaling_law.main, "plan", *S_BUDGET, "--out", out)[0] == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(out)])
    assert train.read_arguments().config == config_from_dict(json.loads(out.read_text())) == plan(
        Budget(0.9e9, 8192, 500e9, 0.6e9))[0]


@pytest.mark.parametrize("arguments, words", [
    (("--memory", "5"), "such as 5GB"), (("--memory", "5gb"), "such as 5GB"), (("--memory", "0GB"), "above 0"),
    (("--memory=-5GB",), "above 0"), (("--memory", "nanGB"), "above 0"), (("--memory", "40MB"), "the smallest needs 0.0"),
    (("--tokens", "500"), "such as 5B"), (("--tokens", "500GB"), "such as 5B"), (("--tokens", "1e400B"), "above 0"),
    (("--context", "8k"), "context"), (("--context", "0"), "context"), (("--context", "0.5"), "context"),
    (("--inference-gflops", "0.6GB"), "GFLOPs"), (("--inference-gflops", "0"), "GFLOPs"),
    (("--inference-gflops", "0.01"), "GFLOPs per token and"), (("--train-flops", "1e10"), "training FLOPs")])
def test_a_bad_budget_costs_one_line(refused, arguments, words):
    assert words in refused(scaling_law.main, "plan", *arguments)


def test_a_plan_that_cannot_be_written_costs_one_line(refused, tmp_path):
    assert "no folder" in refused(scaling_law.main, "plan", "--out", tmp_path / "missing" / "phone.json")


# ----------------------------------------------------------------------------------------------------------------------
# A runs file


def finished(run, nats: float) -> dict:
    config = run.config()
    return {"id": run.id, **dataclasses.asdict(run), "active": config.active_params(), "total": config.total_params(),
            "nats": nats, "bits_per_byte": nats / 2, "seconds": 60.0 + run.g, "load": 1.5, "dropped": 0.0}


@pytest.fixture
def runs_file(tmp_path) -> Path:
    """A finished sweep in which E = 8, g = 8 and a shared expert are best, with seed noise of 0.003."""
    losses, rng = {}, np.random.default_rng(0)

    def loss(run):
        best = 0.1 * math.log2(run.E) * (run.E <= 8) + 0.28 * (run.E == 16) + 0.2 * (run.E == 32)
        nats = 3.5 + 400 / run.tokens ** 0.5 - best + 0.02 * abs(math.log2(run.g / 8)) - 0.05 * run.shared
        return round(nats - 0.2 * (run.size == "large") + float(rng.normal(0, 0.003)), 5)
    while new := [run for run in wanted(losses, 2 ** 20) if run.id not in losses]:
        losses |= {run.id: loss(run) for run in new}
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(finished(run, losses[run.id])) + "\n" for run in wanted(losses, 2 ** 20)))
    return path


def test_a_fit_reports_findings_coefficients_and_a_picture(call, runs_file, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(scaling_law, "fit_law", functools.partial(fit_law, starts=2))
    monkeypatch.setattr(scaling_law, "bootstrap", functools.partial(scaling_law.bootstrap, times=3))
    code, out, err = call(scaling_law.main, "fit", runs_file)
    assert (code, err) == (0, "")
    assert out.count("Holds.") == 4                                         # E at both sizes, g, shared
    assert "best is E = 8, ahead of dense by 0.3" in out and "| zeta |" in out
    assert runs_file.with_name("law.png").read_bytes().startswith(b"\x89PNG")


def test_noise_is_the_pooled_spread_of_seeds_and_sets_what_counts_as_a_difference(runs_file):
    results = Results(read_runs(runs_file), runs_file)
    assert 0.001 < results.noise < 0.006
    a, b = base("small", 1, 2 ** 20), base("small", 8, 2 ** 20)             # three seeds each
    assert results.gain(a, b)[1] == pytest.approx(2 * results.noise * math.sqrt(2 / 3))
    assert results.gain(a, b)[0] == pytest.approx(results.mean(a) - results.mean(b))


@pytest.mark.parametrize("broken", ['{"id": "small', "{}", "[]", '{"nats": NaN}', "\xff"])
def test_a_broken_line_is_named(refused, runs_file, broken):
    lines = runs_file.read_text().splitlines()
    runs_file.write_text("\n".join([*lines[:6], broken, *lines[6:]]) + "\n", "latin-1")
    assert "line 7 is not a finished run" in refused(scaling_law.main, "fit", runs_file)


def test_a_loss_that_is_no_number_is_named(refused, runs_file):
    lines = runs_file.read_text().splitlines()
    runs_file.write_text("\n".join([*lines[:2], json.dumps(json.loads(lines[2]) | {"nats": math.nan})]))
    assert "line 3 is" in refused(scaling_law.main, "fit", runs_file)


def test_too_few_points_or_no_second_seed_cost_one_line(refused, runs_file, tmp_path):
    lines = runs_file.read_text().splitlines()
    runs_file.write_text("\n".join(lines[:11]))
    assert "too few points for nine coefficients: 6 over 1 sizes" in refused(scaling_law.main, "fit", runs_file)
    runs_file.write_text("\n".join(line for line in lines if json.loads(line)["seed"] == 0))
    assert "two seeds" in refused(scaling_law.main, "fit", runs_file)
    runs_file.write_text("")
    assert "too few points" in refused(scaling_law.main, "fit", runs_file)
    assert "no runs at" in refused(scaling_law.main, "fit", tmp_path / "missing.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# The sweep


def test_the_grid_is_the_papers_and_follows_the_results():
    top, losses = 2 ** 20, {}
    first = wanted(losses, top)
    assert {(run.size, run.E, run.tokens) for run in first} == {("small", E, top) for E in (1, 2, 4, 8, 16, 32)} | set(
        itertools.product(("small", "large"), (1, 2, 8, 32), (top // 2, top // 4)))
    small = [base("small", E, 2 ** 20) for E in (1, 2, 4, 8, 16, 32)]
    losses |= {run.id: 3.0 + 0.1 * abs(run.E - 16) for run in small}
    second = [run for run in wanted(losses, top) if run not in first]
    assert {(run.E, run.g, run.shared) for run in second if not run.seed} == {
        *((16, g, False) for g in (1, 2, 8, 16)), (16, 8, True)}
    assert {(run.E, run.g, run.seed) for run in second if run.seed} == {(1, 1, 1), (1, 1, 2), (16, 4, 1), (16, 4, 2)}
    losses |= {run.id: 3.0 + 0.01 * (run.g != 8) + (run.g == 1) for run in second}
    more = {(run.E, run.g, run.shared) for run in wanted(losses, top) if run.seed == 1}
    assert more == {(1, 1, False), *((16, g, False) for g in (2, 4, 8, 16)), (16, 8, True)}


@pytest.mark.parametrize("E, g, shared", [(1, 1, False), (32, 4, False), (8, 16, False), (8, 8, True)])
def test_active_parameters_are_equal_but_for_the_router(E, g, shared):
    dense, mixture = (scaling_law.Run("small", *axes, 4096).config() for axes in ((1, 1, False), (E, g, shared)))
    router = 0 if E == 1 else mixture.n_layers * mixture.n_routed * (mixture.d_model + 1)
    assert mixture.active_params() - router == dense.active_params()


MINIATURE = """
import sys
sys.argv[1:] = ["sweep", "--minutes", "5", "--workers", "1", "--run", sys.argv[1]]
import scaling_law as law
law.EXPERTS, law.GRANULARITIES, law.SEEDS, law.PARTS = (1, 2), (4,), (0,), (1,)
law.VOCABULARY, law.SHARED_G, law.LIKELY_E = 512, 4, 2
law.SIZES = {"small": dict(d_model=64, n_layers=1, n_heads=1, n_kv_heads=1, d_ff=128)}
law.STAGE = law.dataclasses.replace(law.STAGE, context=32, batch=64)
if __name__ == "__main__":
    law.run_main(law.main)
"""


def test_a_sweep_trains_for_real_and_resumes_after_a_kill(finished_run, tmp_path):
    shutil.copy(finished_run / "tokens.pt", tmp_path)
    (tmp_path / "grid.json").write_text('{"top": 512, "pace": 0.01}')       # as if decided already: eight steps a run
    script, path = tmp_path / "miniature.py", tmp_path / "runs.jsonl"
    script.write_text(MINIATURE)
    environment = os.environ | {"PYTHONPATH": str(Path(scaling_law.__file__).parent)}
    command = [sys.executable, str(script), str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while not path.exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(path, "a") as file:
        file.write('{"id": "small-E2')                                      # and it was just writing the next line
    done = path.read_text().splitlines()[0]
    second = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert second.returncode == 0, second.stderr + (tmp_path / "sweep.log").read_text()
    lines = path.read_text().splitlines()
    assert lines[0] == done and len({json.loads(line)["id"] for line in lines}) == len(lines) == 3      # dense, E = 2, shared
    assert all(1 < json.loads(line)["nats"] < 8 for line in lines)
    third = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "0 runs, 3 more are there" in third.stdout and path.read_text().splitlines() == lines


def test_the_minutes_decide_the_grid_once(monkeypatch, tmp_path):
    def yardstick(*arguments):
        return {"seconds": 1.5 * scaling_law.YARDSTICK}                     # a machine half as fast again
    monkeypatch.setattr(scaling_law, "train_stage", yardstick)
    monkeypatch.setattr(scaling_law, "Batches", lambda *arguments: None)
    with pytest.raises(UserError, match="too short for the grid, here at least"):
        scaling_law.decide_grid(tmp_path, 5, 2, {})
    assert not any(tmp_path.iterdir())
    top, pace = scaling_law.decide_grid(tmp_path, 50, 2, {})
    unit = 4 * scaling_law.STAGE.batch
    minutes = [sum(scaling_law.estimate(run, pace) for run in scaling_law.expected(n)) / 2 / 60 for n in (top, top + unit)]
    assert pace == 1.5 and minutes[0] <= 0.9 * 50 < minutes[1] and top % unit == 0
    assert scaling_law.decide_grid(tmp_path, 20, 1, {}) == (top, pace)      # kept: runs of other lengths would not compare


def test_minutes_that_cannot_be_kept_are_refused(refused, tmp_path):
    for minutes in (0, 61, math.nan):
        assert "between 0 and 60" in refused(scaling_law.main, "sweep", "--minutes", minutes, "--run", tmp_path)


def test_an_unfinished_sweep_names_the_run_that_is_missing(runs_file):
    records = [record for record in read_runs(runs_file) if record["E"] != 32]
    with pytest.raises(UserError, match="E32-g4.* let the sweep finish"):
        scaling_law.findings(Results(records, runs_file))
