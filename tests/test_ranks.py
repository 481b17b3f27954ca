"""train.py under torchrun: two processes (gloo, FSDP2) train one process' model, and read its files."""
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import an_hour_a_step, fresh_model

import muon
import train
from common import load_checkpoint, load_dict
from quantize import master_state_dict

ROOT, HERE = Path(train.__file__).parent, Path(__file__).parent
STEPS = 50


def torchrun(*command) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    return subprocess.run([*launcher, *command], env=env, capture_output=True, text=True, timeout=300)


def train_and_save(folder: Path, name: str, resume: str = "") -> None:
    """A stage on however many ranks there are, in FP32, two rows at a time: NAME.pt, NAME/resume.pt."""
    stage = dataclasses.replace(train.TEST["qat" if "qat" in name else "pretrain"], context=64)
    stage = dataclasses.replace(stage, tokens=(8 if "qat" in name else STEPS) * stage.batch)
    state = load_dict(folder / resume / "resume.pt") if resume else None
    model, prepared = fresh_model(), load_dict(folder / "tokens.pt")
    (folder / name).mkdir(exist_ok=True)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for module in (train, muon):                # BF16 would make small differences large ones
            patch.setattr(module, "matmul_dtype", lambda device: torch.float32)
        an_hour_a_step(patch, only=STEPS // 2 - 1)
        step = train.train_step
        patch.setattr(train, "train_step", lambda *a: results.append(step(*a)) or results[-1])
        train.train_stage(model, stage, train.Batches(prepared, stage, 0), prepared, folder / name,
                          {"stage": "pretrain", "micro_rows": 2}, state)
    weights = {key: muon.whole(tensor).cpu() for key, tensor in master_state_dict(model).items()}
    if train.RANK == 0:
        torch.save({"losses": [result["loss"] for result in results], "weights": weights,
                    "load": results[0]["load"]}, folder / f"{name}.pt")


def run_as_rank(folder: str) -> None:
    """What each of two processes does in the first test."""
    train.join_ranks("cpu")
    for name, resume in (("two", ""), ("one, then two", "one"), ("two, qat", "")):
        train_and_save(Path(folder), name, resume)
    train.dist.destroy_process_group()


def test_two_ranks_follow_one_and_each_resumes_the_other(run_with, tmp_path):
    run_with("tokens")
    train_and_save(tmp_path, "one")
    (tmp_path / "rank.py").write_text(f"import test_ranks; test_ranks.run_as_rank({str(tmp_path)!r})")
    done = torchrun(tmp_path / "rank.py")
    assert done.returncode == 0, done.stderr
    train_and_save(tmp_path, "two, then one", "two")
    train_and_save(tmp_path, "one, qat")
    names = ("one", "two", "one, then two", "two, then one", "one, qat", "two, qat")
    one, two, one_two, two_one, one_qat, two_qat = (load_dict(tmp_path / f"{name}.pt") for name in names)
    assert len(one["losses"]) == len(two["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 1
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-3)
    for resumed in (one_two, two_one):
        assert resumed["losses"] == pytest.approx(one["losses"][STEPS // 2:], abs=1e-3)
    assert torch.equal(two["load"], one["load"])            # tokens of the whole batch, not of half of it
    torch.testing.assert_close(two["weights"], one["weights"], rtol=0, atol=2e-3)
    # A sum in another order differs by 1e-7, but may round a weight to the next of 16 values.
    assert two_qat["losses"][:3] == pytest.approx(one_qat["losses"][:3], abs=1e-4)
    assert two_qat["losses"] == pytest.approx(one_qat["losses"], abs=1e-2)


def test_a_whole_run_under_torchrun_ends_as_one_process_would(finished_run, text_folder, tmp_path, call):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--preset", "test", "--data", text_folder, "--device", "cpu", "--micro-rows", "1", "--run"]
    assert call(train.main, *options, one)[::2] == (0, "")
    done = torchrun(ROOT / "train.py", *map(str, options), two)
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(two)) == set(os.listdir(finished_run))
    assert done.stdout.count("\nsft: ") == 1                # rank 0 alone speaks
    assert "2 processes, 1 rows at a time" in done.stdout
    ours, theirs = (load_checkpoint(folder / "qat.pt") for folder in (two, one))
    assert ours["model"].keys() == theirs["model"].keys() and ours["config"] == theirs["config"]
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        assert mine["bits_per_byte"] == pytest.approx(other["bits_per_byte"], rel=0.01)


def test_ranks_that_cannot_share_the_rows_evenly_say_so(run_with):
    done = torchrun(ROOT / "train.py", "pretrain", "--preset", "test", "--run", run_with("tokens"),
                    "--device", "cpu", "--micro-rows", "4")
    assert done.returncode and "error: 4 rows, 4 at a time, " in done.stderr
