"""train.py under torchrun: two processes (gloo, FSDP2) train the same model as one, and read each other's files."""
import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import an_hour_a_step, fresh_model

import train
from mobilemoe import load_checkpoint
from quantize import master_state_dict

ROOT, HERE = Path(train.__file__).parent, Path(__file__).parent
STEPS = 50


def torchrun(*command) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)])}
    return subprocess.run([*launcher, *map(str, command)], env=env, capture_output=True, text=True, timeout=300)


def train_and_save(folder: Path, name: str, resume=None, recompute=False) -> None:
    """A stage on however many ranks there are, in FP32 and two rows at a time; writes name.pt: losses, weights, states."""
    patch = pytest.MonkeyPatch()
    patch.setattr(train, "matmul_dtype", lambda device: torch.float32)      # BF16 would make small differences large ones
    an_hour_a_step(patch, only=STEPS // 2 - 1)
    losses, step, saved = [], train.train_step, {}

    def record(*arguments):
        losses.append(step(*arguments))
        return losses[-1]
    patch.setattr(train, "train_step", record)
    stage = dataclasses.replace(train.TEST["qat" if "qat" in name else "pretrain"], context=64)
    stage = dataclasses.replace(stage, tokens=(8 if "qat" in name else STEPS) * stage.batch)
    model, prepared = fresh_model(), torch.load(folder / "tokens.pt", weights_only=True)
    summary = train.train_stage(model, "pretrain", stage, train.Batches(prepared, stage, 0), prepared, folder, micro_rows=2,
                                recompute=recompute, resume=resume, save=lambda state: saved.update(copy.deepcopy(state)))
    weights = train.gather(master_state_dict(model))
    patch.undo()
    if train.RANK == 0:
        torch.save({"losses": [result["loss"] for result in losses], "loads": [result["load"] for result in losses],
                    "weights": weights, "saved": saved, "summary": summary}, folder / f"{name}.pt")


def run_as_rank(folder: str) -> None:
    """What each of two processes does in the first test."""
    torch.set_num_threads(1)
    folder = Path(folder)
    train.join_ranks("cpu")
    train_and_save(folder, "two")
    train_and_save(folder, "one, then two", resume=torch.load(folder / "one.pt", weights_only=True)["saved"])
    train_and_save(folder, "two, qat", recompute=True)
    train.dist.destroy_process_group()


def test_two_ranks_follow_one_and_each_resumes_the_other(finished_run, tmp_path):
    (tmp_path / "tokens.pt").symlink_to(finished_run / "tokens.pt")
    train_and_save(tmp_path, "one")
    (tmp_path / "rank.py").write_text(f"import test_ranks; test_ranks.run_as_rank({str(tmp_path)!r})")
    done = torchrun(tmp_path / "rank.py")
    assert done.returncode == 0, done.stderr
    one, two, one_two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two", "one, then two"))
    train_and_save(tmp_path, "two, then one", resume=two["saved"])
    two_one = torch.load(tmp_path / "two, then one.pt", weights_only=True)
    assert len(one["losses"]) == len(two["losses"]) == STEPS and one["losses"][-1] < one["losses"][0] - 1
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-3)
    assert one_two["losses"] == pytest.approx(one["losses"][STEPS // 2:], abs=1e-3)
    assert two_one["losses"] == pytest.approx(one["losses"][STEPS // 2:], abs=1e-3)
    assert torch.equal(two["loads"][0], one["loads"][0])                   # tokens of the whole batch, not of half of it
    assert two["weights"].keys() == one["weights"].keys() == two["saved"]["model"].keys()
    for name, weight in two["weights"].items():
        torch.testing.assert_close(weight, one["weights"][name], rtol=0, atol=2e-3, msg=lambda text: f"{name}: {text}")
    train_and_save(tmp_path, "one, qat")
    one, two = (torch.load(tmp_path / f"{name}, qat.pt", weights_only=True) for name in ("one", "two"))
    # A sum in another order differs by 1e-7, but may round a weight to the next of 16 values: that is then a real difference.
    assert two["losses"][:3] == pytest.approx(one["losses"][:3], abs=1e-4)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-2)


def test_a_whole_run_under_torchrun_ends_as_one_process_would(finished_run, text_folder, tmp_path):
    run = tmp_path / "run"
    done = torchrun(ROOT / "train.py", "--preset", "test", "--data", text_folder, "--run", run, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(run)) == set(os.listdir(finished_run))
    assert done.stdout.count("sft: ") == done.stdout.count("sft 8/8") == 1                 # rank 0 alone speaks
    assert (run / "log.jsonl").read_text().count("\n") == (finished_run / "log.jsonl").read_text().count("\n")
    for stage in train.STAGES:
        ours, theirs = load_checkpoint(run / f"{stage}.pt"), load_checkpoint(finished_run / f"{stage}.pt")
        assert ours["model"].keys() == theirs["model"].keys() and ours["config"] == theirs["config"]
        for domain, bits in theirs["history"][-1]["bits_per_byte"].items():
            assert ours["history"][-1]["bits_per_byte"][domain] == pytest.approx(bits, rel=0.02)


def test_ranks_that_cannot_share_the_rows_evenly_say_so(finished_run, tmp_path):
    (tmp_path / "tokens.pt").symlink_to(finished_run / "tokens.pt")
    done = torchrun(ROOT / "train.py", "pretrain", "--preset", "test", "--run", tmp_path, "--device", "cpu", "--micro-rows", 4)
    assert done.returncode and "error: pretrain: 4 rows, 4 at a time, are not the same number of parts for 2" in done.stderr
