"""The command lines: bad input gets one line and exit code 2, no traceback, nothing half-written; talking."""
import contextlib
import gzip
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import export_mobile
import mobilemoe
import quantize
import train
from common import load_checkpoint

ROOT = Path(train.__file__).parent


def listing(folder) -> dict[str, bytes]:
    """Every file below a folder with its content: hidden and temporary ones too."""
    return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@contextlib.contextmanager
def disk_with_room_for(size: int):
    """The system refuses to let any file grow beyond `size` bytes, in this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

# ----------------------------------------------------------------------------------------------------------
# Checkpoints


class Bomb:
    """Unpickled, it leaves a file behind: what a stranger's checkpoint could do if it might run code."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


DAMAGED = {
    "missing": lambda good, path: None,
    "empty": lambda good, path: path.touch(),
    "half": lambda good, path: path.write_bytes(good.read_bytes()[:good.stat().st_size // 2]),
    "text": lambda good, path: path.write_text("not a checkpoint\n"),
    "pickle": lambda good, path: path.write_bytes(pickle.dumps({"format": "mobilemoe/1"})),
    "code": lambda good, path: torch.save({"format": "mobilemoe/1", "model": Bomb()}, path),
    "tensor": lambda good, path: torch.save(torch.zeros(3), path),
    "foreign": lambda good, path: torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 3}, path),
    "tokens": lambda good, path: shutil.copy(good.with_name("tokens.pt"), path),
}


@pytest.mark.parametrize("main, more", [
    (mobilemoe.main, ["Hello"]), (quantize.main, []), (export_mobile.main, ["--out", "out.gguf"])])
@pytest.mark.parametrize("damage", DAMAGED)
def test_bad_checkpoints_get_one_line(main, more, damage, finished_run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    DAMAGED[damage](finished_run / "sft.pt", bad)
    before = listing(tmp_path)
    assert "bad.pt" in refused(main, bad, *more)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("name, arguments", [("pretrain.pt", ["midtrain"]), ("tokens.pt", ["midtrain"])])
def test_a_stage_does_not_start_from_damaged_files(name, arguments, finished_run, tmp_path, refused):
    for copied in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / copied, tmp_path)
    os.truncate(tmp_path / name, 1000)
    before = listing(tmp_path)
    assert name in refused(train.main, *arguments, "--run", tmp_path)
    assert listing(tmp_path) == before

# ----------------------------------------------------------------------------------------------------------
# Data, names and numbers

FOLDERS = {
    "missing": (None, b"", "no folder"),
    "other files": ("a.pdf", b"text", "two documents"),
    "empty text": ("a.txt", b" \n", "two documents"),
    "broken JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "a.jsonl, line 3: broken JSON"),
    "no text in JSON": ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2"),
    "cut gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.gz"),
    "not UTF-8": ("a.txt", b"caf\xe9", "a.txt"),
    "no conversations": ("a.txt", b"\n\n".join(b"Text %d. " % n * 500 for n in range(9)), "no conversations"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_bad_data_gets_one_line_before_anything_is_trained(what, tmp_path, refused):
    name, content, says = FOLDERS[what]
    if name:
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / name).write_bytes(content)
    arguments = ["--preset", "test", "--data", tmp_path / "data", "--run", tmp_path / "run"]
    assert says in refused(train.main, *arguments)
    assert not list((tmp_path / "run").glob("*train.pt"))


@pytest.mark.parametrize("arguments, says", [
    (["posttrain"], "posttrain"), (["--preset", "XXL"], "XXL"), (["--config", "none.json"], "none.json"),
    (["--config", "broken.json"], "broken.json"), (["--config", "number.json"], "not a JSON object"),
    (["--config", "unknown.json"], "n_expert"), (["--config", "impossible.json"], "d_model = 63"),
    (["--tokens", "1000"], "--tokens"), (["pretrain", "--tokens", "nan"], "--tokens"),
    (["--tokenizer", "missing.model"], "missing.model"), (["--preset", "S"], "--tokenizer"),
    (["--device", "abacus"], "abacus"), (["--seed", "-1"], "--seed"), (["--micro-rows", "0"], "--micro-rows"),
    (["sft", "--run", "elsewhere"], "elsewhere/midtrain.pt")])
def test_what_train_is_asked_for_must_exist(arguments, says, text_folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("number.json").write_text("5")
    Path("unknown.json").write_text('{"n_expert": 8}')
    impossible = {"d_model": 63, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 256}
    Path("impossible.json").write_text(json.dumps(impossible))
    if not {"--preset", "--config"} & set(arguments):
        arguments = ["--preset", "test", *arguments]
    assert says in refused(train.main, "--data", text_folder, *arguments)
    assert not list(tmp_path.rglob("*train.pt")) and not list(tmp_path.rglob("*.part"))


def test_a_run_is_not_overwritten(finished_run, text_folder, refused):
    before = listing(finished_run)
    line = refused(train.main, "--preset", "test", "--data", text_folder, "--run", finished_run)
    assert "already holds a run" in line and "--resume" in line
    assert listing(finished_run) == before

# ----------------------------------------------------------------------------------------------------------
# A full disk


def test_disk_full_while_writing_tokens(text_folder, tmp_path, refused):
    run = tmp_path / "run"
    with disk_with_room_for(10_000):
        assert "tokens.pt" in refused(train.main, "--preset", "test", "--data", text_folder, "--run", run)
    assert not listing(run)


def test_disk_full_while_writing_a_checkpoint_keeps_the_older_one(finished_run, tmp_path, refused):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    (tmp_path / "midtrain.pt").write_bytes(b"older")
    with disk_with_room_for(200_000):
        assert "midtrain.pt" in refused(train.main, "midtrain", "--run", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "midtrain.pt", "pretrain.pt", "tokens.pt"]
    assert (tmp_path / "midtrain.pt").read_bytes() == b"older"


def test_atomic_write_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), common.atomic_write(path) as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
        1 / 0                                                   # noqa: B018
    assert listing(tmp_path) == {str(path): b"old"}
    with common.atomic_write(path) as file:
        file.write(b"new")
    assert listing(tmp_path) == {str(path): b"new"}


def test_a_table_is_markdown_and_lines_up():
    assert common.markdown_table(["what", "n"], [["a", 1], ["longer", 23]]).splitlines() == [
        "| what   |  n |", "| ------ | -: |", "| a      |  1 |", "| longer | 23 |"]

# ----------------------------------------------------------------------------------------------------------
# python mobilemoe.py CHECKPOINT "prompt"


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_checkpoint_talks_and_a_seed_decides_what_it_says(stage, finished_run, call):
    def say(*options) -> str:
        arguments = finished_run / f"{stage}.pt", "What is", "--tokens", 30
        code, out, err = call(mobilemoe.main, *arguments, *options)
        assert (code, err) == (0, "")
        return out
    said = say()
    assert said.startswith("What is") == (stage in ("pretrain", "midtrain"))      # text goes on
    assert say() == said != say("--seed", 1)
    assert say("--temperature", 0) == say("--temperature", 0, "--seed", 1)


@pytest.mark.parametrize("option, value", [
    ("--temperature", "nan"), ("--temperature", "-1"), ("--tokens", "-1")])
def test_impossible_sampling_is_refused(option, value, finished_run, refused):
    assert option in refused(mobilemoe.main, finished_run / "sft.pt", "Hello", option, value)


@pytest.mark.parametrize("prompt", ["", "<|eot_id|>", "naïve 👍 \U0001f9ff", "a" * 500])
def test_any_prompt_will_do(prompt, finished_run, call):
    for stage in ("pretrain", "sft"):
        assert call(mobilemoe.main, finished_run / f"{stage}.pt", prompt, "--tokens", 3)[::2] == (0, "")


def test_as_typed_in_a_shell(finished_run, call):
    """The same in a real process: output, exit code, one line."""
    arguments = [finished_run / "sft.pt", "What is 3 + 7?", "--tokens", "12"]
    done = subprocess.run([sys.executable, ROOT / "mobilemoe.py", *arguments], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(errors="replace") == call(mobilemoe.main, *arguments)[1]
    arguments[0] = finished_run / "none.pt"
    done = subprocess.run([sys.executable, ROOT / "mobilemoe.py", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no checkpoint") and load_checkpoint(finished_run / "sft.pt")
