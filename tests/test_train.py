"""train.py: four stages, exact resuming, accumulation, divergence survived, the schedule, Muon."""
import dataclasses
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import data
import train
from common import UserError, load_checkpoint
from mobilemoe import DENSE, PRESETS, MobileMoE, model_from_checkpoint
from muon import Muon, orthogonal
from quantize import attach, fake_quant, master_state_dict

ROOT = Path(train.__file__).parent
TEST = PRESETS["test"]
BEGUN = {"stage": "pretrain", "micro_rows": 4}


@pytest.fixture(scope="module")
def prepared(finished_run) -> dict:
    return torch.load(finished_run / "tokens.pt", weights_only=True)


def fresh_model(config=TEST) -> MobileMoE:
    torch.manual_seed(0)
    return MobileMoE(config)


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def an_hour_a_step(patch: pytest.MonkeyPatch, only: int | None = None) -> None:
    """Put train.py on a clock by which every step, or only one, takes an hour: it then saves after each."""
    clock, step = types.SimpleNamespace(now=0.0), train.train_step

    def tick():
        clock.now += 0.001
        return clock.now

    def slow_step(*arguments):
        clock.now += 3600 if only in (None, arguments[4]) else 0
        return step(*arguments)
    patch.setattr(train, "time", types.SimpleNamespace(time=tick))
    patch.setattr(train, "train_step", slow_step)

# ----------------------------------------------------------------------------------------------------------
# A finished run


def test_a_run_leaves_checkpoints_log_report_and_a_phone_file(finished_run):
    files = {"tokens.pt", "pretrain.pt", "midtrain.pt", "sft.pt", "qat.pt", "log.jsonl", "report.md",
             "report.png", "mobilemoe.gguf"}
    assert set(os.listdir(finished_run)) == files           # no resume state, nothing half-made
    report = (finished_run / "report.md").read_text()
    stages = [f"| {stage} " for stage in train.STAGES]
    for row in ("| `xz -9e`", *stages, "(PTQ)", "mobilemoe.gguf", "Q: ", "A: "):
        assert row in report, row
    assert (finished_run / "mobilemoe.gguf").read_bytes()[:4] == b"GGUF"
    assert (finished_run / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_log_has_every_stage_to_its_last_step(finished_run):
    records = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    last = {record["stage"]: record for record in records}
    assert list(last) == list(train.STAGES)
    for record in last.values():
        assert record["step"] == 8 and record["load"] >= 1 and 0 <= record["dropped"] < 1
        assert record["loss"] > 0 and record["bits_per_byte"] > 0


def test_checkpoints_are_plain_data_and_make_a_model(finished_run):
    for stage in train.STAGES:
        checkpoint = torch.load(finished_run / f"{stage}.pt", weights_only=True)   # raises on anything else
        assert (checkpoint["format"], checkpoint["stage"]) == ("mobilemoe/1", stage)
        assert checkpoint["quantized"] == (stage == "qat") and checkpoint["history"][-1]["bits_per_byte"]
        context = 64 if stage == "pretrain" else 128
        assert checkpoint["config"]["max_context"] == checkpoint["context"] == context
        assert checkpoint["model"].keys() == MobileMoE(TEST).state_dict().keys()
        assert all(tensor.dtype == torch.float32 for tensor in checkpoint["model"].values())
        model_from_checkpoint(checkpoint)


def test_training_lowers_the_loss(finished_run):
    rows = {row["stage"]: row for row in load_checkpoint(finished_run / "qat.pt")["history"]}
    assert rows["pretrain"]["loss"] < math.log(TEST.vocab_size) - 0.5       # 6.24 nats: knowing nothing
    bits = [rows[stage]["bits_per_byte"]["prose"] for stage in train.STAGES]
    assert bits[1] < bits[0] - 0.03 and bits[3] < bits[0] - 0.03


def test_balancing_moves_the_bias_in_pre_and_mid_training_and_then_freezes_it(finished_run):
    weights = [load_checkpoint(finished_run / f"{stage}.pt")["model"] for stage in train.STAGES]
    biases = [{name: tensor for name, tensor in model.items() if "expert_bias" in name} for model in weights]
    pretrain, midtrain, sft, qat = biases
    assert all(bias.any() for bias in pretrain.values()) and not same_weights(pretrain, midtrain)
    assert same_weights(midtrain, sft) and same_weights(sft, qat)


def test_qat_checkpoint_holds_masters_not_rounded_weights(finished_run):
    weights = load_checkpoint(finished_run / "qat.pt")["model"]
    weight = weights["model.layers.0.feed_forward.experts.down_proj"]
    assert not torch.equal(weight, fake_quant(weight, 1))

# ----------------------------------------------------------------------------------------------------------
# Stopped and resumed


@pytest.mark.parametrize("name", ["pretrain", "qat"])
def test_a_resumed_stage_ends_with_the_same_weights(name, prepared, finished_run, tmp_path, monkeypatch):
    """pretrain: Muon's and AdamW's state and the moving expert_bias; qat: masters under the rounding."""
    stage = train.TEST[name]

    def run(resume=None):
        model = fresh_model()
        if name == "qat":
            model.load_state_dict(load_checkpoint(finished_run / "sft.pt")["model"])
        batches = train.Batches(prepared, stage, 0)
        train.train_stage(model, stage, batches, prepared, tmp_path, BEGUN, resume)
        return master_state_dict(model)
    an_hour_a_step(monkeypatch, only=2)
    whole = run()
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["step"] == 3 and state["micro_rows"] == 4
    assert same_weights(run(state), whole)


def die_while_saving():
    """`python train.py ...`, killed in the middle of writing its third save. Runs in a child process."""
    an_hour_a_step(pytest.MonkeyPatch())
    save, saves = torch.save, []

    def save_or_die(state, file):
        saves.append(state)
        if len(saves) == 3:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)
    torch.save = save_or_die
    train.main()


def test_a_run_killed_while_saving_resumes_to_the_same_end(finished_run, text_folder, tmp_path, call):
    for name in ("tokens.pt", "pretrain.pt", "midtrain.pt", "sft.pt"):
        shutil.copy(finished_run / name, tmp_path)
    arguments = ["--preset", "test", "--data", text_folder, "--run", tmp_path, "--resume"]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    code = "import test_train; test_train.die_while_saving()"
    child = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": path})
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert torch.load(tmp_path / "resume.pt", weights_only=True)["step"] == 2
    code, out, err = call(train.main, *arguments)
    assert (code, err) == (0, "")
    assert "qat: resuming after step 2" in out and "\nsft:" not in out      # finished stages are not redone
    ours, theirs = (load_checkpoint(run / "qat.pt") for run in (tmp_path, finished_run))
    assert same_weights(ours["model"], theirs["model"])
    assert ours["history"][-1]["bits_per_byte"] == theirs["history"][-1]["bits_per_byte"]
    assert (tmp_path / "mobilemoe.gguf").read_bytes() == (finished_run / "mobilemoe.gguf").read_bytes()


def train_in_a_fork(arguments: list) -> int:
    """`python train.py ...` that saves after every step, without the seconds a new Python takes to start."""
    if pid := os.fork():
        return pid
    try:
        an_hour_a_step(pytest.MonkeyPatch())
        sys.argv = ["train.py", *map(str, arguments)]
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        train.main()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_a_run_ends_as_if_it_had_not_been(kills, finished_run, tmp_path, call, refused):
    def arguments(name):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(finished_run / "tokens.pt", tmp_path / name)
        return ["pretrain", "--preset", "test", "--run", tmp_path / name, "--tokens", 40 * 256, "--resume"]
    start = time.time()
    assert os.waitpid(train_in_a_fork(arguments("whole")), 0)[1] == 0
    moments = random.Random(kills)
    seconds = time.time() - start
    for _ in range(kills):
        child = train_in_a_fork(arguments("killed"))
        time.sleep(moments.uniform(0.1, 0.5) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if (tmp_path / "killed" / "resume.pt").exists():
        assert "another --seed" in refused(train.main, *arguments("killed"), "--seed", 1)
        assert "another --tokens" in refused(train.main, *arguments("killed"), "--tokens", 999)
    code, _, err = call(train.main, *arguments("killed"))
    assert (code, err) == (0, "")
    whole, killed = (load_checkpoint(tmp_path / name / "pretrain.pt") for name in ("whole", "killed"))
    assert same_weights(whole["model"], killed["model"])
    for what in ("loss", "bits_per_byte", "sample"):
        assert whole["history"][1][what] == killed["history"][1][what]


@pytest.mark.parametrize("part", [0, 2], ids=["empty", "torn"])
def test_a_damaged_save_is_one_line_with_a_cure(finished_run, tmp_path, refused, part):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    good = (tmp_path / "pretrain.pt").read_bytes()
    (tmp_path / "resume.pt").write_bytes(good[:len(good) // part] if part else b"")
    error = refused(train.main, "midtrain", "--run", tmp_path, "--resume")
    assert "resume.pt" in error and "delete it" in error


def test_one_stage_from_the_checkpoint_before_it(finished_run, tmp_path, call):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    code, _, err = call(train.main, "midtrain", "--run", tmp_path)          # no --preset: the run knows
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "midtrain.pt", "pretrain.pt", "tokens.pt"]
    assert same_weights(*(load_checkpoint(run / "midtrain.pt")["model"] for run in (tmp_path, finished_run)))


def test_the_dense_baseline_trains_by_the_same_path(finished_run, tmp_path, call):
    config, run = tmp_path / "dense.json", tmp_path / "run"
    config.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(TEST, **DENSE))))
    run.mkdir()
    shutil.copy(finished_run / "tokens.pt", run)
    code, _, err = call(train.main, "pretrain", "--config", config, "--run", run)
    assert (code, err) == (0, "")
    checkpoint = load_checkpoint(run / "pretrain.pt")
    assert model_from_checkpoint(checkpoint).config.dense and "load" not in checkpoint["history"][1]
    assert checkpoint["history"][1]["loss"] < math.log(TEST.vocab_size) - 0.3


def test_shards_are_trained_on_from_the_disk_in_every_stage(finished_run, text_folder, tmp_path, call):
    ranks, shards, run = tmp_path / "ranks.tiktoken", tmp_path / "shards", tmp_path / "run"
    ranks.write_text(torch.load(finished_run / "tokens.pt", weights_only=True)["tokenizer"]["ranks"])
    for name in ("prose.txt", "maths.jsonl", "chat.jsonl"):
        data.tokenize_files([text_folder / name], name.split(".")[0], shards, ranks, workers=1)
    code, _, err = call(train.main, "--preset", "test", "--data", shards, "--run", run)
    assert (code, err) == (0, "")
    rows = {row["stage"]: row for row in load_checkpoint(run / "qat.pt")["history"]}
    assert set(train.STAGES) < set(rows) and rows["pretrain"]["loss"] < math.log(TEST.vocab_size) - 0.5

# ----------------------------------------------------------------------------------------------------------
# One step


class Recorder:
    """An optimizer that only looks: gradients as an optimizer would get them, after clipping."""

    def __init__(self, model):
        self.model, self.param_groups, self.grads = model, [{"share": 1.0}], {}

    def step(self):
        self.grads = {name: p.grad.clone() for name, p in self.model.named_parameters()}

    def zero_grad(self):
        self.model.zero_grad()


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize("name", ["midtrain", "sft"])
def test_accumulated_gradients_are_those_of_the_whole_batch(prepared, lively, name, micro_rows):
    """sft: rows hold very different numbers of answer tokens. Dropless: capacity is counted per part."""
    stage = dataclasses.replace(train.TEST[name], batch=1024, capacity=None)
    batches = train.Batches(prepared, stage, 0)
    results = []
    for rows in (8, micro_rows):
        model = lively(dataclasses.replace(TEST, z_loss=0.0))
        recorder = Recorder(model)
        results.append((train.train_step(model, [recorder], stage, batches, 0, 8, rows), recorder.grads))
    (whole, want), (parts, got) = results
    answers = (batches.batch(0, 8)[1] != -100).sum(1)
    assert name == "midtrain" or answers.min() < answers.max() / 2
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert torch.equal(parts["load"], whole["load"])
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())
    assert torch.stack([grad.norm() for grad in got.values()]).norm() < 1 + 1e-3           # clipped


@pytest.mark.parametrize("name", ["pretrain", "qat"])
def test_recomputed_activations_train_the_same_weights_in_less_memory(prepared, tmp_path, name):
    ends = []
    for less_memory in (False, True):
        model, kept = fresh_model(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            stage = dataclasses.replace(train.TEST[name], tokens=512)
            train.train_stage(model, stage, train.Batches(prepared, stage, 0), prepared, tmp_path, BEGUN,
                              less_memory=less_memory)
        ends.append((master_state_dict(model), sum(kept)))
    (plain, kept), (again, kept2) = ends
    assert same_weights(plain, again) and kept2 < kept / 2


@pytest.mark.slow
def test_preset_S_takes_a_step_in_24_GB():
    """Two steps in a process of its own: the second finds the optimizer's state and needs the most memory."""
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if available < 23e9:
        pytest.skip("needs 23 GB of free memory")
    script = Path(__file__).with_name("step_of_S.py")
    child = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=-1)
    assert child.returncode == 0
    peak, loss, _ = map(float, child.stdout.split()[-3:])
    assert peak < 24 and math.isfinite(loss)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_a_number_changes_nothing(prepared, lively, what):
    model, stage = lively(), train.TEST["pretrain"]
    batches, opts = train.Batches(prepared, stage, 0), train.optimizers(model, train.TEST)
    train.train_step(model, opts, stage, batches, 0, 8, 256)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if what == "loss":
        hook = model.model.norm.register_forward_hook(lambda _, inputs, output: output * math.nan)
    else:
        hook = model.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    train.train_step(model, opts, stage, batches, 1, 8, 256)
    assert same_weights(model.state_dict(), before)
    hook.remove()
    assert math.isfinite(train.train_step(model, opts, stage, batches, 2, 8, 256)["loss"])
    after = model.state_dict()
    assert not same_weights(after, before) and all(tensor.isfinite().all() for tensor in after.values())


def test_a_loss_that_stays_no_number_ends_the_run_in_one_line(prepared, tmp_path, monkeypatch):
    step, stage = train.train_step, train.TEST["pretrain"]
    monkeypatch.setattr(train, "train_step", lambda *a: {**step(*a), "loss": 1.0 if a[4] == 0 else math.nan})
    with pytest.raises(UserError, match="not a number any more.*peak_lr") as refusal:
        train.train_stage(fresh_model(), stage, train.Batches(prepared, stage, 0), prepared, tmp_path, BEGUN)
    assert "\n" not in str(refusal.value)


def test_batches_mix_text_and_conversations_by_weight(prepared):
    stage = dataclasses.replace(train.TEST["sft"], mixture=dict(chat=75, prose=25))
    inputs, targets = train.Batches(prepared, stage, 0).batch(3, 8)
    assert inputs.shape == targets.shape == (8, stage.context)
    assert inputs.dtype == targets.dtype == torch.int64
    chat = (targets == -100).float().mean(1) > 0.3                          # most of a chat row is question
    assert chat.tolist() == [False] * 2 + [True] * 6
    again = train.Batches(prepared, stage, 0)
    assert torch.equal(again.batch(3, 8)[0], inputs) and not torch.equal(again.batch(4, 8)[0], inputs)
    assert not torch.equal(train.Batches(prepared, stage, 1).batch(3, 8)[0], inputs)

# ----------------------------------------------------------------------------------------------------------
# Table, schedule, optimizers


def test_the_table_is_the_papers_for_the_papers_sizes():
    assert all(train.stages_for(PRESETS[preset]) is train.PAPER for preset in "SML")
    assert all(train.stages_for(PRESETS[preset]) is train.TINY for preset in ("tiny", "tiny-dense"))
    stages = list(train.PAPER.values())
    assert [s.tokens for s in stages] == [6e12, 500e9, 126e9, 21e9]
    assert [s.context for s in stages] == [2048, 8192, 8192, 8192]
    assert [s.peak_lr for s in stages] == [4e-4, 4e-5, 4e-6, 4e-6]
    assert [s.decay for s in stages] == ["cosine", "linear", "cosine", "cosine"]
    assert [s.capacity for s in stages] == [1.5, 1.5, None, None]
    assert [s.bias_rate for s in stages] == [1e-3, 1e-3, 0, 0]
    for table in (train.PAPER, train.TINY):
        assert tuple(table) == train.STAGES
        assert [s.int4 for s in table.values()] == [False, False, False, True]


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_warms_up_to_the_peak_and_ends_at_its_final_rate(decay, final):
    stage = dataclasses.replace(train.TINY["pretrain"], decay=decay, final_lr=final)
    factors = [train.lr_factor(stage, step, 1000) for step in range(1000)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])          # 2 % warm-up
    assert factors[19] == factors[20] == max(factors) == 1
    assert all(a >= b for a, b in zip(factors[20:], factors[21:]))
    assert factors[510] == pytest.approx((1 + final) / 2, abs=1e-3)         # half-way down at half time
    assert factors[-1] == pytest.approx(final, abs=2e-3) and factors[-1] >= final
    assert train.lr_factor(stage, 0, 1) == 1                                # a single step is taken in full


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (5, 48, 96), (5, 96, 48)])
def test_muon_makes_every_direction_equally_long_and_each_expert_for_itself(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    x = orthogonal(g)
    values = torch.linalg.svdvals(x)
    assert x.shape == g.shape and 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)                      # nearest orthogonal matrix: u v
    assert torch.nn.functional.cosine_similarity(x.flatten(), (u @ v).flatten(), dim=0) > 0.97
    if len(shape) == 3:
        loud = g * torch.logspace(-3, 3, 5)[:, None, None]
        torch.testing.assert_close(orthogonal(loud), x, rtol=0.1, atol=0.02)        # BF16, maybe


def test_muon_takes_gate_and_up_as_two_matrices_and_scales_experts_by_d_model():
    start, gradient = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)).unbind()

    def stepped(part, grad, side_by_side, d_model=32):
        p = torch.nn.Parameter(part.clone())
        opt = Muon([dict(params=[p], side_by_side=side_by_side, lr=0.1)], d_model)
        p.grad = grad.clone()
        opt.step()
        return p.detach()
    both = stepped(start, gradient, 2)
    halves = [stepped(*pair, 1) for pair in zip(start.chunk(2, -1), gradient.chunk(2, -1))]
    torch.testing.assert_close(both, torch.cat(halves, dim=-1), rtol=1e-3, atol=1e-3)
    moved, further = (stepped(start, gradient, 2, d) - start for d in (32, 8))
    torch.testing.assert_close(further, 2 * moved, rtol=1e-3, atol=1e-5)    # sqrt(32 / 8)


@pytest.mark.parametrize("dense", [{}, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("attached", [False, True], ids=["plain", "int4"])
def test_every_weight_has_exactly_one_optimizer_and_norms_no_decay(dense, attached):
    model = fresh_model(dataclasses.replace(TEST, **dense))
    model = attach(model) if attached else model
    names = {id(p): name for name, p in model.named_parameters()}
    for table in (train.TEST, train.PAPER):
        groups = [group for opt in train.optimizers(model, table) for group in opt.param_groups]
        assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
        for group in groups:
            norms = any("norm" in names[id(p)] for p in group["params"])
            assert group["share"] > 0 and not (norms and group.get("weight_decay", 0))
    assert [type(opt).__name__ for opt in train.optimizers(model, train.PAPER)] == ["AdamW"]
    muon = train.optimizers(model, train.TEST)[0]
    by_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert sorted(by_muon) == sorted(name for name in names.values() if "proj" in name)
