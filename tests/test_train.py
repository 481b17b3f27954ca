"""train.py: four stages, exact resuming, accumulation, divergence survived, the schedule, Muon."""
import dataclasses
import itertools
import json
import math
import os
import random
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
from common import UserError, load_checkpoint, load_dict
from mobilemoe import DENSE, PRESETS, MobileMoE, model_from_checkpoint
from muon import Muon, orthogonal
from quantize import attach, master_state_dict

TEST = PRESETS["test"]
BEGUN = {"stage": "pretrain", "micro_rows": 4}


@pytest.fixture(scope="module")
def prepared(finished_run) -> dict:
    return load_dict(finished_run / "tokens.pt")


def fresh_model(config=TEST) -> MobileMoE:
    torch.manual_seed(0)
    return MobileMoE(config)


def same_weights(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rounded(experts: torch.Tensor) -> bool:
    """[E, in, out]: do 32 weights that share a scale take no more than the 16 values of INT4?"""
    return len(experts[0, :32, 0].unique()) <= 16


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
    last = {line["stage"]: line for line in map(json.loads, open(finished_run / "log.jsonl"))}
    assert list(last) == list(train.STAGES)
    for line in last.values():
        assert line["step"] == 8 and line["load"] >= 1 and 0 <= line["dropped"] < 1 < line["bits_per_byte"]


def test_checkpoints_are_plain_data_and_make_a_model(finished_run):
    for stage in train.STAGES:
        checkpoint = torch.load(finished_run / f"{stage}.pt", weights_only=True)   # raises on anything else
        assert (checkpoint["format"], checkpoint["stage"]) == ("mobilemoe/1", stage)
        assert checkpoint["quantized"] == (stage == "qat")
        context = 64 if stage == "pretrain" else 128
        assert checkpoint["config"]["max_context"] == checkpoint["context"] == context
        assert checkpoint["model"].keys() == MobileMoE(TEST).state_dict().keys()
        assert all(tensor.dtype == torch.float32 for tensor in checkpoint["model"].values())
        model_from_checkpoint(checkpoint)


def test_what_the_stages_do_to_the_model(finished_run):
    """All lower the loss; balancing moves the bias until SFT freezes it; QAT's masters are not rounded."""
    models = [load_checkpoint(finished_run / f"{stage}.pt") for stage in train.STAGES]
    rows = {row["stage"]: row for row in models[-1]["history"]}
    assert rows["pretrain"]["loss"] < math.log(TEST.vocab_size) - 0.5       # 6.24 nats: knowing nothing
    bits = [rows[stage]["bits_per_byte"]["prose"] for stage in train.STAGES]
    assert bits[1] < bits[0] - 0.03 and bits[3] < bits[0] - 0.03
    biases = [{name: x for name, x in model["model"].items() if "expert_bias" in name} for model in models]
    pretrain, midtrain, sft, qat = biases
    assert all(bias.any() for bias in pretrain.values()) and not same_weights(pretrain, midtrain)
    assert same_weights(midtrain, sft) and same_weights(sft, qat)
    assert not rounded(models[-1]["model"]["model.layers.0.feed_forward.experts.down_proj"])

# ----------------------------------------------------------------------------------------------------------
# Stopped and resumed, one stage alone, other shapes, other data


def train_in_a_fork(arguments: list, fatal_save: int = 0) -> int:
    """`python train.py ...` in a child that saves after every step, and is killed amid the n-th save."""
    if not hasattr(os, "fork"):
        pytest.skip("Windows has no fork")
    if child := os.fork():
        return child
    save, saves = torch.save, itertools.count(1)

    def save_or_die(state, file):
        if next(saves) == fatal_save:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, file)
    try:
        torch.save = save_or_die
        an_hour_a_step(pytest.MonkeyPatch())
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = ["train.py", *map(str, arguments)]
        train.main()
        os._exit(0)
    finally:
        os._exit(1)


def check_same_end(run: Path, finished_run: Path) -> None:
    ours, theirs = (load_checkpoint(folder / "qat.pt") for folder in (run, finished_run))
    assert same_weights(ours["model"], theirs["model"])
    for mine, other in zip(ours["history"], theirs["history"], strict=True):
        for what in ("stage", "tokens", "loss", "bits_per_byte", "sample"):
            assert mine.get(what) == other.get(what)
    assert (run / "mobilemoe.gguf").read_bytes() == (finished_run / "mobilemoe.gguf").read_bytes()
    assert set(os.listdir(run)) == set(os.listdir(finished_run))            # nothing half-made is left


def test_a_run_killed_in_every_stage_ends_as_if_it_had_not_been(finished_run, run_with, call, refused):
    run = run_with("tokens")
    arguments = ["--preset", "test", "--run", run, "--resume"]
    # Each start but the first makes five saves of the stage before, and its checkpoint, then dies in its own.
    for stage, fatal_save in zip(train.STAGES, (3, 9, 9, 9)):
        assert os.waitpid(train_in_a_fork(arguments, fatal_save), 0)[1] == signal.SIGKILL
        state = load_dict(run / "resume.pt")
        assert (state["stage"], state["step"]) == (stage, 2)
    assert "another --seed" in refused(train.main, *arguments, "--seed", 1)
    assert "another --tokens" in refused(train.main, "qat", *arguments, "--tokens", 999)
    code, out, err = call(train.main, *arguments)
    assert (code, err) == (0, "") and "qat: resuming after step 2" in out and "\nsft: " not in out
    check_same_end(run, finished_run)


@pytest.mark.slow
def test_a_run_killed_at_random_ends_as_if_it_had_not_been(finished_run, run_with, call):
    arguments = ["--preset", "test", "--run", run_with("tokens"), "--resume"]
    moments = random.Random(0)
    for _ in range(20):
        child = train_in_a_fork(arguments)
        time.sleep(moments.uniform(0.05, 0.4))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert call(train.main, *arguments)[::2] == (0, "")
    check_same_end(arguments[3], finished_run)


def test_one_stage_from_the_checkpoint_before_it(finished_run, run_with, call, monkeypatch):
    run = run_with("tokens", "pretrain")
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TEST, vocab_size=300))     # too small a default
    assert call(train.main, "midtrain", "--run", run)[::2] == (0, "")       # no --preset: the run knows
    assert sorted(os.listdir(run)) == ["log.jsonl", "midtrain.pt", "pretrain.pt", "tokens.pt"]
    assert same_weights(*(load_checkpoint(folder / "midtrain.pt")["model"] for folder in (run, finished_run)))


def test_the_dense_baseline_trains_by_the_same_path(run_with, call):
    run = run_with("tokens")
    (run / "dense.json").write_text(json.dumps(dataclasses.asdict(TEST) | DENSE))
    assert call(train.main, "pretrain", "--config", run / "dense.json", "--run", run)[::2] == (0, "")
    checkpoint = load_checkpoint(run / "pretrain.pt")
    assert model_from_checkpoint(checkpoint).config.dense and "load" not in checkpoint["history"][1]
    assert checkpoint["history"][1]["loss"] < math.log(TEST.vocab_size) - 0.3


def test_shards_are_trained_on_from_the_disk_in_every_stage(prepared, text_folder, tmp_path, call):
    ranks, shards, run = tmp_path / "ranks.tiktoken", tmp_path / "shards", tmp_path / "run"
    ranks.write_text(prepared["tokenizer"]["ranks"])
    for name in ("prose.txt", "maths.jsonl", "chat.jsonl"):
        data.tokenize_files([text_folder / name], name.split(".")[0], shards, ranks, workers=1)
    assert call(train.main, "--preset", "test", "--data", shards, "--run", run)[::2] == (0, "")
    rows = {row["stage"]: row for row in load_checkpoint(run / "qat.pt")["history"]}
    assert set(train.STAGES) < set(rows) and rows["pretrain"]["loss"] < math.log(TEST.vocab_size) - 0.5



def test_shards_may_move_with_the_run_or_be_given_again(finished_run, text_folder, tmp_path, call, refused):
    (tmp_path / "ranks").write_text(load_dict(finished_run / "tokens.pt")["tokenizer"]["ranks"])
    data.tokenize_files([text_folder / "prose.txt"], "prose", tmp_path / "old/shards", tmp_path / "ranks")
    start = [train.main, "pretrain", "--preset", "test", "--run"]
    assert call(*start, tmp_path / "old/run", "--data", f"{tmp_path}/old/shards/")[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    assert call(*start, tmp_path / "new/run")[0] == 0
    (tmp_path / "new/shards").rename(tmp_path / "alone")
    assert "mobilemoe.tiktoken" in refused(*start, tmp_path / "new/run")
    assert call(*start, tmp_path / "new/run", "--data", tmp_path / "alone")[0] == 0


def test_stages_after_one_that_was_trained_again_do_not_count(finished_run, run_with, call):
    run = run_with("tokens", *train.STAGES)
    assert train.finished_stages(run) == list(train.STAGES)
    code, out, _ = call(train.main, "midtrain", "--run", run, "--seed", 1)
    assert code == 0 and "still holds sft, qat of before: --resume" in out
    assert train.finished_stages(run) == ["pretrain", "midtrain"]
    with open(run / "log.jsonl", "a") as log:
        log.write('{"stage": "sft", "st')                   # killed while writing
    assert call(train.main, "--preset", "test", "--run", run, "--resume")[0] == 0
    assert train.finished_stages(run) == list(train.STAGES) and (run / "report.png").exists()
    assert not same_weights(*(load_checkpoint(folder / "qat.pt")["model"] for folder in (run, finished_run)))


def test_a_long_question_is_shortened_and_that_is_said(finished_run):
    encoding = train.tokenizer_from_dict(load_checkpoint(finished_run / "qat.pt")["tokenizer"])
    assert train.beginning("What?", encoding, 128) == "What?"
    short = train.beginning("\0 wide world 👍" * 10_000, encoding, 128)
    assert short.endswith(" [shortened]") and len(encoding.encode(short)) < 70

# ----------------------------------------------------------------------------------------------------------
# One step


@pytest.mark.parametrize("micro_rows", [1, 3])
@pytest.mark.parametrize("name", ["midtrain", "sft"])
def test_accumulated_gradients_are_those_of_the_whole_batch(prepared, lively, name, micro_rows):
    """sft: rows hold very different numbers of answer tokens. Dropless: capacity is counted per part."""
    stage = dataclasses.replace(train.TEST[name], batch=1024, capacity=None, bias_rate=0, peak_lr=100)
    batches, results = train.Batches(prepared, stage, 0), []
    for rows in (8, micro_rows):
        model, before = (lively(dataclasses.replace(TEST, z_loss=0.0)) for _ in range(2))
        plain = torch.optim.SGD([dict(params=model.parameters(), share=1.0)])       # moves by rate x gradient
        result = train.train_step(model, [plain], stage, batches, 0, 100, rows)
        moved = torch.nn.utils.parameters_to_vector(model.parameters())
        moved -= torch.nn.utils.parameters_to_vector(before.parameters())
        results.append((result, moved.detach()))
    (whole, want), (parts, got) = results
    answers = (batches.batch(0, 8)[1] != -100).sum(1)
    assert name == "midtrain" or answers.min() < answers.max() / 2
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert torch.equal(parts["load"], whole["load"])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert got.norm().item() == pytest.approx(100 / 2, rel=1e-3)   # clipped to 1; first of 2 warm-up steps


@pytest.mark.parametrize("name", ["pretrain", "qat"])
def test_recomputed_activations_train_the_same_weights_in_less_memory(prepared, tmp_path, name):
    stage = dataclasses.replace(train.TEST[name], tokens=512)
    batches, ends = train.Batches(prepared, stage, 0), []
    for less_memory in (False, True):
        model, kept = fresh_model(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
            train.train_stage(model, stage, batches, prepared, tmp_path, BEGUN, less_memory=less_memory)
        ends.append((master_state_dict(model), sum(kept)))
        assert rounded(model.model.layers[0].feed_forward.experts.down_proj) == stage.int4
    (plain, kept), (again, kept_again) = ends
    assert same_weights(plain, again) and kept_again < kept / 2


@pytest.mark.slow
def test_preset_S_takes_a_step_in_24_GB():
    """Two steps in a process of its own: the second finds the optimizer's state and needs the most memory."""
    if not (memory := Path("/proc/meminfo")).exists():
        pytest.skip("only Linux tells how much memory a process took")
    if int(memory.read_text().split("MemAvailable:")[1].split()[0]) * 1024 < 23e9:
        pytest.skip("needs 23 GB of free memory")
    script, root = Path(__file__).with_name("step_of_S.py"), str(Path(train.__file__).parent)
    out = subprocess.check_output([sys.executable, script], env={**os.environ, "PYTHONPATH": root})
    peak, loss, _ = map(float, out.split()[-3:])
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
    with pytest.raises(UserError, match="^the loss is not a number any more.*peak_lr.*$"):
        train.train_stage(fresh_model(), stage, train.Batches(prepared, stage, 0), prepared, tmp_path, BEGUN)


def test_batches_mix_text_and_conversations_by_weight(prepared):
    stage = dataclasses.replace(train.TEST["sft"], mixture=dict(chat=75, prose=25))
    batches = train.Batches(prepared, stage, 0)
    inputs, targets = batches.batch(3, 8)
    assert inputs.shape == targets.shape == (8, stage.context)
    chat = (targets == -100).float().mean(1) > 0.3                          # most of a chat row is question
    assert chat.tolist() == [False] * 2 + [True] * 6
    for seed, step, same in ((0, 3, True), (0, 4, False), (1, 3, False)):
        assert torch.equal(train.Batches(prepared, stage, seed).batch(step, 8)[0], inputs) == same

# ----------------------------------------------------------------------------------------------------------
# Table, schedule, optimizers


def test_the_table_is_the_papers_for_the_papers_sizes():
    assert all(train.stages_for(PRESETS[preset]) is train.PAPER for preset in "SML")
    assert all(train.stages_for(PRESETS[preset]) is train.TINY for preset in ("tiny", "tiny-dense"))
    columns = ("tokens", "context", "peak_lr", "decay", "capacity", "bias_rate", "int4")
    assert [tuple(getattr(stage, column) for column in columns) for stage in train.PAPER.values()] == [
        (6e12, 2048, 4e-4, "cosine", 1.5, 1e-3, False), (500e9, 8192, 4e-5, "linear", 1.5, 1e-3, False),
        (126e9, 8192, 4e-6, "cosine", None, 0, False), (21e9, 8192, 4e-6, "cosine", None, 0, True)]
    assert tuple(train.PAPER) == tuple(train.TINY) == train.STAGES


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
        opt = Muon([dict(params=[p], side_by_side=side_by_side, every=1, lr=0.1)], d_model)
        p.grad = grad.clone()
        opt.step()
        return p.detach()
    both = stepped(start, gradient, 2)
    halves = [stepped(*pair, 1) for pair in zip(start.chunk(2, -1), gradient.chunk(2, -1))]
    torch.testing.assert_close(both, torch.cat(halves, dim=-1), rtol=1e-3, atol=1e-3)
    moved, further = (stepped(start, gradient, 2, d) - start for d in (32, 8))
    torch.testing.assert_close(further, 2 * moved, rtol=1e-3, atol=1e-5)    # sqrt(32 / 8)


def test_muon_moves_experts_every_fourth_batch_by_all_they_have_seen():
    gradients = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    p = torch.nn.Parameter(torch.zeros(3, 32, 32))
    opt = Muon([dict(params=[p], side_by_side=1, every=4, lr=0.1)], 32)
    momentum = torch.zeros(3, 32, 32)
    for batch, gradient in enumerate(gradients, 1):
        before = p.detach().clone()
        p.grad = gradient.clone()
        opt.step()
        momentum.lerp_(gradient, 0.05)
        moved = orthogonal(gradient.lerp(momentum, 0.95)) * 0.1 if batch % 4 == 0 else torch.zeros(3, 32, 32)
        torch.testing.assert_close(before - p.detach(), moved, rtol=1e-4, atol=1e-5)


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
    for group in muon.param_groups:
        assert {1 + ("gate_up" in names[id(p)]) for p in group["params"]} == {group["side_by_side"]}
    assert sorted(by_muon) == sorted(name for name in names.values() if "proj" in name)
