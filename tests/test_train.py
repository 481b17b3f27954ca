"""train.py: four stages, exact resuming, accumulation, damage and divergence survived, the schedule, Muon."""
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
from mobilemoe import PRESETS, MobileMoE, UserError, load_checkpoint, model_from_checkpoint
from quantize import attach, fake_quant, master_state_dict

ROOT = Path(train.__file__).parent
TEST = PRESETS["test"]
DENSE = dataclasses.replace(TEST, n_experts=1, granularity=1, shared_expert=False)


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


# ----------------------------------------------------------------------------------------------------------------------
# A finished run


def test_a_run_leaves_checkpoints_log_report_and_a_phone_file(finished_run):
    files = {"tokens.pt", "pretrain.pt", "midtrain.pt", "sft.pt", "qat.pt", "log.jsonl", "report.md", "mobilemoe.gguf"}
    assert files <= set(os.listdir(finished_run)) <= files | {"report.png"}                # no resume state, nothing half-made
    report = (finished_run / "report.md").read_text()
    for stage in train.STAGES:
        assert f"| {stage} | 0.00M |" in report and f"A sample after {stage}" in report
    for row in ("| `xz -9e` |", "| sft, as trained (BF16) |", "(PTQ) |", "(QAT) |", "mobilemoe.gguf"):
        assert row in report
    assert (finished_run / "mobilemoe.gguf").read_bytes()[:4] == b"GGUF"


def test_report_is_drawn(finished_run):
    pytest.importorskip("matplotlib")
    assert (finished_run / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_log_has_every_stage_to_its_last_step(finished_run):
    records = [json.loads(line) for line in (finished_run / "log.jsonl").read_text().splitlines()]
    last = {record["stage"]: record for record in records}
    assert list(last) == list(train.STAGES)
    for record in last.values():
        assert record["step"] == 8 and record["load"] >= 1 and 0 <= record["dropped"] < 1
        assert record["loss"] > 0 and record["bits_per_byte"] > 0 and record["tokens_per_s"] > 0


def test_checkpoints_load_without_unpickling_code_and_make_a_model(finished_run):
    for position, stage in enumerate(train.STAGES):
        checkpoint = torch.load(finished_run / f"{stage}.pt", weights_only=True)           # raises on anything but plain data
        assert (checkpoint["format"], checkpoint["stage"], checkpoint["step"]) == ("mobilemoe/1", stage, 8)
        assert checkpoint["quantized"] == (stage == "qat")
        assert [row["stage"] for row in checkpoint["history"]] == list(train.STAGES[:position + 1])
        assert checkpoint["config"]["max_context"] == checkpoint["context"] == (64 if stage == "pretrain" else 128)
        assert checkpoint["model"].keys() == MobileMoE(TEST).state_dict().keys()
        assert all(tensor.dtype == torch.float32 for tensor in checkpoint["model"].values())
        model_from_checkpoint(checkpoint)


def test_training_lowers_the_loss(finished_run):
    history = load_checkpoint(finished_run / "qat.pt")["history"]
    assert history[0]["loss"] < math.log(TEST.vocab_size) - 0.5                            # 6.24 nats: knowing nothing
    bits = [row["bits_per_byte"]["prose"] for row in history]
    assert bits[1] < bits[0] - 0.03 and bits[3] < bits[0] - 0.03


def test_balancing_moves_the_bias_in_pre_and_mid_training_and_then_freezes_it(finished_run):
    weights = [load_checkpoint(finished_run / f"{stage}.pt")["model"] for stage in train.STAGES]
    pretrain, midtrain, sft, qat = (
        {name: tensor for name, tensor in model.items() if "expert_bias" in name} for model in weights)
    assert all(bias.any() for bias in pretrain.values()) and not same_weights(pretrain, midtrain)
    assert same_weights(midtrain, sft) and same_weights(sft, qat)


def test_qat_checkpoint_holds_masters_not_rounded_weights(finished_run):
    weight = load_checkpoint(finished_run / "qat.pt")["model"]["model.layers.0.feed_forward.experts.down_proj"]
    assert not torch.equal(weight, fake_quant(weight, 1))


# ----------------------------------------------------------------------------------------------------------------------
# Stopped and resumed


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", ["pretrain", "qat"])
def test_a_resumed_stage_ends_with_the_same_weights(name, prepared, finished_run, tmp_path, monkeypatch):
    """pretrain: Muon's and AdamW's state and the moving expert_bias; qat: masters under the rounding."""
    stage = train.TEST[name]

    def run(save=None, resume=None):
        model = fresh_model()
        if name == "qat":
            model.load_state_dict(load_checkpoint(finished_run / "sft.pt")["model"])
        train.train_stage(model, name, stage, train.Batches(prepared, stage, 0), prepared, tmp_path, save=save, resume=resume)
        return master_state_dict(model)

    an_hour_a_step(monkeypatch)
    whole = run(save=lambda state: None)

    def save_and_stop(state):
        if state["step"] == 3:
            torch.save(state, tmp_path / "state.pt")
            raise Stopped
    with pytest.raises(Stopped):
        run(save=save_and_stop)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["step"] == 3 and not same_weights(state["model"], whole)
    assert same_weights(run(resume=state), whole)


def die_while_saving():
    """`python train.py ...` that is killed in the middle of writing its third save. Runs in a child process."""
    patch = pytest.MonkeyPatch()
    an_hour_a_step(patch)
    write, saves = train.write_resume_state, []

    def half_a_file(state, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def write_or_die(*arguments):
        saves.append(arguments)
        if len(saves) == 3:
            patch.setattr(torch, "save", half_a_file)
        write(*arguments)
    patch.setattr(train, "write_resume_state", write_or_die)
    train.main()


def test_a_killed_run_resumes_to_the_same_end(finished_run, text_folder, tmp_path, call):
    for name in ("tokens.pt", "pretrain.pt", "midtrain.pt", "sft.pt"):
        shutil.copy(finished_run / name, tmp_path)
    arguments = ["--preset", "test", "--data", text_folder, "--run", tmp_path, "--resume"]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    child = subprocess.run([sys.executable, "-c", "import test_train; test_train.die_while_saving()", *map(str, arguments)],
                           env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert [torch.load(tmp_path / name, weights_only=True)["step"] for name in ("resume.pt", "resume.old.pt")] == [2, 1]
    code, out, err = call(train.main, *arguments)
    assert (code, err) == (0, "")
    assert "qat: resuming after step 2" in out and "\nsft:" not in out                     # the finished stages are not redone
    ours, theirs = (load_checkpoint(run / "qat.pt") for run in (tmp_path, finished_run))
    assert same_weights(ours["model"], theirs["model"])
    assert ours["history"][-1]["bits_per_byte"] == theirs["history"][-1]["bits_per_byte"]
    assert (tmp_path / "mobilemoe.gguf").read_bytes() == (finished_run / "mobilemoe.gguf").read_bytes()
    assert set(os.listdir(tmp_path)) == set(os.listdir(finished_run))                      # nothing of the killed save is left


def train_in_a_fork(arguments: list) -> int:
    """`python train.py ...` that saves after every step, without the seconds that a new Python takes to start. -> pid"""
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


def wait_for_saves(path: Path, saves: int):
    """Return as soon as `path` has been replaced that many times."""
    def written():
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:                   # none yet, or moved aside a moment ago
            return None
    last, deadline = written(), time.time() + 120
    while saves:
        assert time.time() < deadline, "the run does not save"
        time.sleep(1e-4)
        if (now := written()) not in (last, None):
            last, saves = now, saves - 1


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(kills, finished_run, tmp_path, call, refused):
    steps = 5 * kills                               # enough that the run is not over before the last kill

    def arguments(name):
        (tmp_path / name).mkdir(exist_ok=True)
        shutil.copy(finished_run / "tokens.pt", tmp_path / name)
        return ["pretrain", "--preset", "test", "--run", tmp_path / name, "--tokens", steps * 256, "--resume"]
    start = time.time()
    assert os.waitpid(train_in_a_fork(arguments("whole")), 0)[1] == 0
    moments, a_step = random.Random(kills), (time.time() - start) / steps
    for kill in range(kills):
        child = train_in_a_fork(arguments("killed"))
        wait_for_saves(tmp_path / "killed" / "resume.pt", kill % 3)         # 0: while it starts, or resumes
        time.sleep(moments.uniform(0, a_step))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert "another --seed" in refused(train.main, *arguments("killed"), "--seed", 1)
    code, out, err = call(train.main, *arguments("killed"))
    assert (code, err) == (0, "") and "pretrain: resuming after step" in out
    whole, killed = (load_checkpoint(tmp_path / name / "pretrain.pt") for name in ("whole", "killed"))
    assert same_weights(whole["model"], killed["model"])
    for what in ("loss", "bits_per_byte", "sample"):
        assert whole["history"][0][what] == killed["history"][0][what]
    assert sorted(os.listdir(tmp_path / "killed")) == ["log.jsonl", "pretrain.pt", "tokens.pt"]


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"\x00" * len(data)],
                         ids=["empty", "truncated", "zeros"])
def test_a_damaged_save_falls_back_to_the_one_before(tmp_path, capsys, damage):
    for step in (1, 2, 3):
        train.write_resume_state(tmp_path, "sft", {"step": step, "model": {"weight": torch.randn(100)}})
    assert train.read_resume_state(tmp_path, "sft")["step"] == 3
    newest = tmp_path / "resume.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    capsys.readouterr()
    assert train.read_resume_state(tmp_path, "sft")["step"] == 2
    assert "resume.pt is damaged" in capsys.readouterr().err
    assert train.read_resume_state(tmp_path, "qat") is None                                # another stage's state is not ours
    train.write_resume_state(tmp_path, "sft", {"step": 4})
    newest.write_bytes(damage(newest.read_bytes()))                                        # the damaged save did not become
    assert train.read_resume_state(tmp_path, "sft")["step"] == 2                           # the older one
    (tmp_path / "resume.old.pt").write_bytes(b"")
    assert train.read_resume_state(tmp_path, "sft") is None


def test_one_stage_from_the_checkpoint_before_it(finished_run, tmp_path, call):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    code, out, err = call(train.main, "midtrain", "--run", tmp_path)                       # no --preset: the run knows
    assert (code, err) == (0, "")
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "midtrain.pt", "pretrain.pt", "tokens.pt"]
    assert same_weights(*(load_checkpoint(run / "midtrain.pt")["model"] for run in (tmp_path, finished_run)))
    code, out, err = call(train.main, "sft", "--run", tmp_path, "--tokens", 512)
    assert code == 0 and load_checkpoint(tmp_path / "sft.pt")["step"] == 2


def test_a_stopped_stage_cannot_be_resumed_to_an_earlier_end(prepared, tmp_path):
    stage, model = train.TEST["pretrain"], fresh_model()
    state = {"model": model.state_dict(), "optimizers": [], "step": 8, "seconds": 1.0, "skipped": 0}
    with pytest.raises(UserError, match="after step 8"):
        train.train_stage(model, "pretrain", stage, train.Batches(prepared, stage, 0), prepared, tmp_path, resume=state)


def test_the_dense_baseline_trains_by_the_same_path(finished_run, tmp_path, call):
    config, run = tmp_path / "dense.json", tmp_path / "run"
    config.write_text(json.dumps(dataclasses.asdict(DENSE)))
    run.mkdir()
    shutil.copy(finished_run / "tokens.pt", run)
    code, _, err = call(train.main, "pretrain", "--config", config, "--run", run)
    assert (code, err) == (0, "")
    checkpoint = load_checkpoint(run / "pretrain.pt")
    assert model_from_checkpoint(checkpoint).config.dense and "load" not in checkpoint["history"][0]
    assert checkpoint["history"][0]["loss"] < math.log(TEST.vocab_size) - 0.3
    assert "load" not in (run / "log.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------------------------
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
def test_accumulated_gradients_are_those_of_the_whole_batch(prepared, lively, monkeypatch, name, micro_rows):
    """sft: rows hold very different numbers of answer tokens. Dropless, for a part's capacity is not the whole's."""
    monkeypatch.setattr(train, "matmul_dtype", lambda device: torch.float32)
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
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5) and torch.equal(parts["load"], whole["load"])
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-3, atol=1e-5 * grad.abs().max().item())


@pytest.mark.parametrize("attached", [False, True], ids=["plain", "int4"])
def test_recomputed_activations_give_the_same_step(prepared, lively, attached):
    stage, results = train.TEST["midtrain"], []
    for recompute in (False, True):
        model = attach(lively()) if attached else lively()
        kept = []
        if recompute:
            train.recompute_activations(model)
        recorder = Recorder(model)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            result = train.train_step(model, [recorder], stage, train.Batches(prepared, stage, 0), 0, 8, 1)
        results.append((result["loss"], result["dropped"], result["load"], recorder.grads, sum(kept)))
    (loss, dropped, load, grads, kept), (loss2, dropped2, load2, grads2, kept2) = results
    assert (loss, dropped) == (loss2, dropped2) and torch.equal(load, load2) and same_weights(grads, grads2)
    assert kept2 < kept / 2


@pytest.mark.slow
def test_preset_S_takes_a_step_in_24_GB():
    """Two steps in a process of its own: the second finds the optimizer's state already there and needs the most."""
    available = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if available < 23e9:
        pytest.skip("needs 23 GB of free memory")
    script = Path(__file__).with_name("step_of_S.py")
    child = subprocess.run([sys.executable, script], env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert child.returncode == 0
    peak, loss, _ = map(float, child.stdout.split()[-3:])
    assert peak < 24 and math.isfinite(loss)


def test_gradients_are_clipped_to_norm_one(prepared, lively):
    model, stage = lively(), train.TEST["pretrain"]
    recorder = Recorder(model)
    train.train_step(model, [recorder], stage, train.Batches(prepared, stage, 0), 0, 8, 256)
    assert torch.stack([grad.norm() for grad in recorder.grads.values()]).norm() == pytest.approx(1, abs=1e-3)


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


def test_bad_steps_are_counted_and_five_in_a_row_stop_the_run(prepared, tmp_path, capsys):
    stage = train.TEST["pretrain"]

    def train_for(bad_steps):
        step = train.train_step
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", lambda *a: {**step(*a), "loss": math.nan if a[4] in bad_steps else 1.0})
            return train.train_stage(fresh_model(), "pretrain", stage, train.Batches(prepared, stage, 0), prepared, tmp_path)
    assert train_for({0, 1, 2, 3, 5, 6})["skipped"] == 6 and "| 6 steps skipped |" in capsys.readouterr().out
    assert train_for({})["skipped"] == 0 and "skipped" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"five steps in a row \(step 7\).*learning rate") as refusal:
        train_for({2, 3, 4, 5, 6})
    assert "\n" not in str(refusal.value)


def test_batches_mix_text_and_conversations_by_weight(prepared):
    stage = dataclasses.replace(train.TEST["sft"], mixture=dict(chat=75, prose=25))
    inputs, targets = train.Batches(prepared, stage, 0).batch(3, 8)
    assert inputs.shape == targets.shape == (8, stage.context) and inputs.dtype == targets.dtype == torch.int64
    chat = (targets == -100).float().mean(1) > 0.3                                         # most of a chat row is question
    assert chat.tolist() == [False] * 2 + [True] * 6
    again = train.Batches(prepared, stage, 0)
    assert torch.equal(again.batch(3, 8)[0], inputs) and not torch.equal(again.batch(4, 8)[0], inputs)
    assert not torch.equal(train.Batches(prepared, stage, 1).batch(3, 8)[0], inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Table, schedule, optimizers


def test_the_table_is_the_papers_for_the_papers_sizes():
    for preset in ("S", "M", "L"):
        assert train.stages_for(PRESETS[preset]) is train.PAPER
    stages = list(train.PAPER.values())
    assert [s.tokens for s in stages] == [6e12, 500e9, 126e9, 21e9]
    assert [s.context for s in stages] == [2048, 8192, 8192, 8192]
    assert [(s.peak_lr, s.decay) for s in stages] == [(4e-4, "cosine"), (4e-5, "linear"), (4e-6, "cosine"), (4e-6, "cosine")]
    assert [s.capacity for s in stages] == [1.5, 1.5, None, None]
    assert [s.bias_rate for s in stages] == [1e-3, 1e-3, 0, 0]
    for table in (train.PAPER, train.TINY):
        assert [s.int4 for s in table.values()] == [False, False, False, True] and tuple(table) == train.STAGES
        assert table["midtrain"].context > table["pretrain"].context
    assert train.stages_for(PRESETS["tiny"]) is train.TINY and train.stages_for(PRESETS["tiny-dense"]) is train.TINY


@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_schedule_warms_up_to_the_peak_and_ends_at_its_final_rate(decay, final):
    stage = dataclasses.replace(train.TINY["pretrain"], decay=decay, final_lr=final)
    factors = [train.lr_factor(stage, step, 1000) for step in range(1000)]
    assert factors[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])          # 2 % warm-up
    assert factors[19] == factors[20] == max(factors) == 1
    assert all(a >= b for a, b in zip(factors[20:], factors[21:]))
    assert factors[510] == pytest.approx((1 + final) / 2, abs=1e-3)                        # half-way down at half time
    assert factors[-1] == pytest.approx(final, abs=2e-3) and factors[-1] >= final
    assert train.lr_factor(stage, 0, 1) == 1                                               # a single step is taken in full


@pytest.mark.parametrize("shape", [(32, 96), (96, 32), (5, 48, 96), (5, 96, 48)])
def test_muon_makes_every_direction_equally_long(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    x = train.Muon.orthogonalise(g, torch.float32)
    values = torch.linalg.svdvals(x)
    assert x.shape == g.shape and 0.6 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(g, full_matrices=False)                                     # nearest orthogonal matrix: u v
    assert torch.nn.functional.cosine_similarity(x.flatten(), (u @ v).flatten(), dim=0) > 0.97


def test_muon_takes_a_stack_of_experts_as_matrices_each_for_itself():
    g = torch.randn(6, 64, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6)[:, None, None]
    together = train.Muon.orthogonalise(g, torch.float32)
    for one, alone in zip(together, g):
        torch.testing.assert_close(one, train.Muon.orthogonalise(alone, torch.float32), rtol=1e-4, atol=1e-5)


def test_muon_takes_gate_and_up_as_two_matrices():
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 3, 32, 64, generator=generator).unbind()

    def stepped(part, grad, paired):
        p = torch.nn.Parameter(part.clone())
        opt = train.Muon([dict(params=[p], paired=paired)], lr=0.1)
        for _ in range(2):
            p.grad = grad.clone()
            opt.step()
        return p.detach()
    both = stepped(start, gradient, paired=True)
    halves = [stepped(part, grad, paired=False) for part, grad in zip(start.chunk(2, -1), gradient.chunk(2, -1))]
    torch.testing.assert_close(both, torch.cat(halves, dim=-1), rtol=1e-3, atol=1e-3)      # BF16 where the hardware has it


@pytest.mark.parametrize("config", [TEST, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("attached", [False, True], ids=["plain", "int4"])
def test_every_weight_has_exactly_one_optimizer_and_norms_no_decay(config, attached):
    model = attach(fresh_model(config)) if attached else fresh_model(config)
    for table in (train.TEST, train.PAPER):
        opts = train.optimizers(model, table)
        owned = [id(p) for opt in opts for group in opt.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in model.parameters())
        vectors = {id(p) for name, p in model.named_parameters() if "norm" in name}
        for group in (group for opt in opts for group in opt.param_groups):
            decayed = group.get("weight_decay", 0) > 0
            assert not decayed or not vectors & {id(p) for p in group["params"]}
            assert group["share"] > 0
    assert [type(opt).__name__ for opt in train.optimizers(model, train.PAPER)] == ["AdamW"]
    muon = next(opt for opt in train.optimizers(model, train.TEST) if isinstance(opt, train.Muon))
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = [names[id(p)] for group in muon.param_groups for p in group["params"]]
    assert all("proj" in name for name in by_muon) and len(by_muon) == sum("proj" in name for name in names.values())


def test_shards_are_trained_on_from_the_disk_in_every_stage(finished_run, text_folder, tmp_path, call):
    ranks, shards, run = tmp_path / "ranks.tiktoken", tmp_path / "shards", tmp_path / "run"
    ranks.write_text(torch.load(finished_run / "tokens.pt", weights_only=True)["tokenizer"]["ranks"])
    for name in ("prose.txt", "maths.jsonl", "chat.jsonl"):
        data.tokenize_files([text_folder / name], name.split(".")[0], shards, ranks, workers=1)
    assert call(train.main, "--preset", "test", "--data", shards, "--run", run)[0] == 0
    history = load_checkpoint(run / "qat.pt")["history"]
    assert [row["stage"] for row in history] == list(train.STAGES)
    assert history[0]["loss"] < math.log(TEST.vocab_size) - 0.5
    assert not torch.load(run / "tokens.pt", weights_only=True)["train"]                   # nothing was copied into the run
