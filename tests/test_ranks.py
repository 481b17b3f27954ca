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
from common import load_checkpoint
from quantize import master_state_dict

ROOT, HERE = Path(train.__file__).parent, Path(__file__).parent
STEPS = 50


def torchrun(*command) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    command = [*launcher, *map(str, command)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def train_and_save(folder: Path, name: str, resume=None) -> None:
    """A stage on however many ranks there are, in FP32, two rows at a time: NAME.pt, NAME/resume.pt."""
    patch = pytest.MonkeyPatch()
    for module in (train, muon):                    # BF16 would make small differences large ones
        patch.setattr(module, "matmul_dtype", lambda device: torch.float32)
    an_hour_a_step(patch, only=STEPS // 2 - 1)
    step, results = train.train_step, []

    def record(*arguments):
        results.append(step(*arguments))
        return results[-1]
    patch.setattr(train, "train_step", record)
    stage = dataclasses.replace(train.TEST["qat" if "qat" in name else "pretrain"], context=64)
    stage = dataclasses.replace(stage, tokens=(8 if "qat" in name else STEPS) * stage.batch)
    model, prepared = fresh_model(), torch.load(folder / "tokens.pt", weights_only=True)
    (folder / name).mkdir(exist_ok=True)
    train.train_stage(model, stage, train.Batches(prepared, stage, 0), prepared, folder / name,
                      {"stage": "pretrain", "micro_rows": 2}, resume)
    weights = {key: muon.whole(tensor).cpu() for key, tensor in master_state_dict(model).items()}
    patch.undo()
    if train.RANK == 0:
        torch.save({"losses": [result["loss"] for result in results], "weights": weights,
                    "load": results[0]["load"]}, folder / f"{name}.pt")


def resume_state(folder: Path, name: str) -> dict:
    return torch.load(folder / name / "resume.pt", weights_only=True)


def run_as_rank(folder: str) -> None:
    """What each of two processes does in the first test."""
    torch.set_num_threads(1)
    folder = Path(folder)
    train.join_ranks("cpu")
    train_and_save(folder, "two")
    train_and_save(folder, "one, then two", resume_state(folder, "one"))
    train_and_save(folder, "two, qat")
    train.dist.destroy_process_group()


def test_two_ranks_follow_one_and_each_resumes_the_other(finished_run, tmp_path):
    (tmp_path / "tokens.pt").symlink_to(finished_run / "tokens.pt")
    train_and_save(tmp_path, "one")
    (tmp_path / "rank.py").write_text(f"import test_ranks; test_ranks.run_as_rank({str(tmp_path)!r})")
    done = torchrun(tmp_path / "rank.py")
    assert done.returncode == 0, done.stderr
    train_and_save(tmp_path, "two, then one", resume_state(tmp_path, "two"))
    train_and_save(tmp_path, "one, qat")
    names = ("one", "two", "one, then two", "two, then one", "one, qat", "two, qat")
    one, two, one_two, two_one, one_qat, two_qat = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in names)
    assert len(one["losses"]) == len(two["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 1
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert one_two["losses"] == pytest.approx(one["losses"][STEPS // 2:], abs=1e-3)
    assert two_one["losses"] == pytest.approx(one["losses"][STEPS // 2:], abs=1e-3)
    assert torch.equal(two["load"], one["load"])            # tokens of the whole batch, not of half of it
    assert two["weights"].keys() == one["weights"].keys()
    for name, weight in two["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=2e-3)
    # A sum in another order differs by 1e-7, but may round a weight to the next of 16 values.
    assert two_qat["losses"][:3] == pytest.approx(one_qat["losses"][:3], abs=1e-4)
    assert two_qat["losses"] == pytest.approx(one_qat["losses"], abs=1e-2)


def test_a_whole_run_under_torchrun_ends_as_one_process_would(finished_run, text_folder, tmp_path):
    run = tmp_path / "run"
    done = torchrun(ROOT / "train.py", "--preset", "test", "--data", text_folder, "--run", run,
                    "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(run)) == set(os.listdir(finished_run))
    assert done.stdout.count("\nsft: ") == 1                # rank 0 alone speaks
    assert len((run / "log.jsonl").read_text()) > 100
    ours, theirs = (load_checkpoint(folder / "qat.pt") for folder in (run, finished_run))
    assert ours["model"].keys() == theirs["model"].keys() and ours["config"] == theirs["config"]
    for mine, other in zip(ours["history"], theirs["history"]):
        for domain, bits in other["bits_per_byte"].items():
            assert mine["bits_per_byte"][domain] == pytest.approx(bits, rel=0.02)


def test_ranks_that_cannot_share_the_rows_evenly_say_so(finished_run, tmp_path):
    (tmp_path / "tokens.pt").symlink_to(finished_run / "tokens.pt")
    done = torchrun(ROOT / "train.py", "pretrain", "--preset", "test", "--run", tmp_path, "--device", "cpu",
                    "--micro-rows", 4)
    assert done.returncode and "error: 4 rows, 4 at a time, do not make as many parts for 2" in done.stderr
