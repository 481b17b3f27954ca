"""The command lines: bad input gets one line and exit code 2, no traceback, nothing half-written; talking."""
import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import common
import export_mobile
import mobilemoe
import quantize
import train

DAMAGED = {
    "missing": lambda good, path: None,
    "empty": lambda good, path: path.touch(),
    "half": lambda good, path: path.write_bytes(good[:len(good) // 2]),
    "code": lambda good, path: torch.save({"format": "mobilemoe/1", "model": os.getcwd}, path),
    "foreign": lambda good, path: torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 3}, path)}


@pytest.mark.parametrize("main, more", [
    (mobilemoe.main, ["Hello"]), (quantize.main, []), (export_mobile.main, ["--out", "out.gguf"])])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_bad_checkpoint_is_refused(main, more, damage, finished_run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    DAMAGED[damage]((finished_run / "sft.pt").read_bytes(), Path("bad.pt"))
    before = os.listdir()
    assert "bad.pt" in refused(main, "bad.pt", *more)
    assert os.listdir() == before


@pytest.mark.parametrize("name", ["tokens.pt", "pretrain.pt", "resume.pt"])
def test_a_stage_does_not_start_from_damaged_files(name, run_with, refused):
    run = run_with("tokens", "pretrain")
    (run / name).write_bytes((run / "pretrain.pt").read_bytes()[:1000])
    before = os.listdir(run)
    line = refused(train.main, "midtrain", "--run", run, "--resume")
    assert name in line and "delete it" in line and os.listdir(run) == before


def test_a_run_has_one_tokenizer_and_is_not_overwritten(run_with, text_folder, refused):
    run = run_with("tokens", "pretrain")
    line = refused(train.main, "--preset", "test", "--data", text_folder, "--run", run)
    assert "already holds a run" in line and "--resume" in line
    prepared = torch.load(run / "tokens.pt", weights_only=True)
    torch.save(prepared | {"tokenizer": prepared["tokenizer"] | {"name": "other"}}, run / "tokens.pt")
    assert "two tokenizers" in refused(train.main, "midtrain", "--run", run)


@pytest.mark.parametrize("arguments, says", [
    (["posttrain"], "posttrain"), (["--preset", "XXL"], "XXL"), (["--config", "none.json"], "none.json"),
    (["--config", "broken.json"], "broken.json"), (["--config", "number.json"], "not a JSON object"),
    (["--config", "unknown.json"], "n_expert"), (["--config", "impossible.json"], "d_model = 63"),
    (["--tokens", "1000"], "--tokens"), (["pretrain", "--tokens", "nan"], "--tokens"),
    (["pretrain", "--tokens", "few"], "invalid number value: 'few'"), (["--seed", "-1"], "--seed"),
    (["--micro-rows", "0"], "--micro-rows"), (["--device", "abacus"], "abacus"), (["--device", "mps"], "mps"),
    (["--tokenizer", "missing.model"], "missing.model"), (["--preset", "S"], "--tokenizer"),
    (["sft", "--run", "elsewhere"], "elsewhere/midtrain.pt"), (["--data", "none"], "none"),
    (["--data", "broken"], "a.jsonl, line 2"), (["--data", "silent"], "learn from: delete it and add ")])
def test_what_train_is_asked_for_must_exist(arguments, says, text_folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    impossible = {"d_model": 63, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 256}
    files = {"broken.json": "{", "number.json": "5", "unknown.json": '{"n_expert": 8}',
             "impossible.json": json.dumps(impossible), "broken/a.jsonl": '{"text": "a"}\n{"text": "b"\n',
             "silent/a.txt": "\n\n".join(f"Text {n}. " * 500 for n in range(9))}
    for name, text in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(text)
    preset = [] if {"--preset", "--config"} & set(arguments) else ["--preset", "test"]
    assert says in refused(train.main, *preset, "--data", text_folder, *arguments)
    assert not list(tmp_path.rglob("*train.pt")) and not Path("elsewhere").exists()


def test_a_launcher_that_is_not_torchrun_is_told_what_is_missing(refused, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)                  # as WORLD_SIZE=2 sets it
    assert "LOCAL_RANK, MASTER_ADDR, MASTER_PORT, RANK not: start" in refused(train.main, "--preset", "test")


@pytest.mark.parametrize("room, name", [(10_000, "tokens.pt"), (200_000, "pretrain.pt")])
def test_a_full_disk_leaves_nothing_half_written(room, name, tmp_path, text_folder, refused):
    """The system refuses to let any file grow beyond `room` bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        line = refused(train.main, "pretrain", "--preset", "test", "--data", text_folder, "--run", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert name in line and not (tmp_path / name).exists() and not list(tmp_path.glob(".*"))


def test_ctrl_c_is_one_word_and_leaves_the_older_file(run_with, call, monkeypatch):
    def stopped_halfway(state, file):
        file.write(b"half")
        raise KeyboardInterrupt
    run = run_with("tokens", "pretrain")
    before = (run / "pretrain.pt").read_bytes()
    monkeypatch.setattr(torch, "save", stopped_halfway)
    code, _, err = call(train.main, "pretrain", "--preset", "test", "--run", run)
    assert (code, err) == (130, "\nstopped\n")
    assert sorted(os.listdir(run)) == ["log.jsonl", "pretrain.pt", "tokens.pt"]
    assert (run / "pretrain.pt").read_bytes() == before


def test_a_table_is_markdown_and_lines_up():
    assert common.markdown_table(["what", "n"], [["a", 1], ["longer", 23]]).splitlines() == [
        "| what   |  n |", "| ------ | -: |", "| a      |  1 |", "| longer | 23 |"]


def test_progress_says_how_far_how_fast_and_how_long(monkeypatch, capsys):
    clock = iter([0, 1, 5, 11, 13])
    monkeypatch.setattr(common, "time", types.SimpleNamespace(time=lambda: next(clock)))
    progress = common.Progress("sft", 2000, "tokens")
    for done in (100, 500, 1100, 2000):                         # no terminal: a line every ten seconds
        progress.show(done, "loss 1.5")
    assert capsys.readouterr().out.splitlines() == [
        "sft 1,100/2,000 tokens | loss 1.5 | 100 tokens/s | 0:09 left",
        "sft 2,000/2,000 tokens | loss 1.5 | 158 tokens/s | 0:00 left"]


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_checkpoint_talks_and_a_seed_decides_what_it_says(stage, finished_run, call, refused):
    question = [mobilemoe.main, finished_run / f"{stage}.pt", "What is", "--tokens", 30]

    def say(*options) -> str:
        code, out, err = call(*question, *options)
        assert (code, err) == (0, "")
        return out
    said = say()
    assert said.startswith("What is") == (stage in ("pretrain", "midtrain"))      # text goes on
    assert say() == said
    assert say("--temperature", 2) != say("--temperature", 2, "--seed", 1)
    assert say("--temperature", 0) == say("--temperature", 0, "--seed", 1)
    assert "--temperature" in refused(*question, "--temperature", "nan")
    for prompt in ("", "<|eot_id|>", "naïve 👍 \U0001f9ff", "a" * 500):
        assert call(*question[:2], prompt, "--tokens", 3)[::2] == (0, "")


def test_a_chat_goes_on_until_an_empty_line(finished_run, call, refused, monkeypatch):
    lines = ["Hello", "What is 4 + 7? " * 30, "And then?", "", "unread"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = call(mobilemoe.main, finished_run / "sft.pt", "--tokens", 5)
    assert (code, err, out.count("> ")) == (0, "", 4) and sys.stdin.read() == "unread"
    assert "text to continue" in refused(mobilemoe.main, finished_run / "midtrain.pt")


def test_a_refusal_as_a_shell_sees_it(tmp_path):
    words = [sys.executable, mobilemoe.__file__, tmp_path / "none.pt", "Hello"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no checkpoint")
