"""The command lines: bad input gets one line and exit code 2, no traceback, nothing half-written; talking to checkpoints."""
import contextlib
import gzip
import os
import pickle
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import an_hour_a_step

import export_mobile
import mobilemoe
import quantize
import train
from mobilemoe import PRESETS, load_checkpoint

ROOT = Path(train.__file__).parent
MAINS = [pytest.param(module.main, id=module.__name__) for module in (mobilemoe, quantize, export_mobile)]


def arguments_for(main, checkpoint, folder) -> list:
    """What else each script wants beside a checkpoint."""
    rest = {"mobilemoe": ["Hello"], "quantize": [], "export_mobile": ["--out", folder / "out.gguf"]}
    return [checkpoint, *rest[main.__module__]]


def listing(folder) -> dict[str, bytes]:
    """Every file below a folder with its content: hidden and temporary ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in Path(folder).rglob("*")}


@contextlib.contextmanager
def disk_with_room_for(size: int):
    """The system refuses to let any file grow beyond `size` bytes, in this process and its children."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


class Bomb:
    """Unpickled, it leaves a file behind: what a checkpoint from a stranger could do if it were allowed to run code."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


DAMAGED = {
    "missing": lambda good, path: None,
    "folder": lambda good, path: path.mkdir(),
    "empty": lambda good, path: path.touch(),
    "half": lambda good, path: path.write_bytes(good.read_bytes()[:good.stat().st_size // 2]),
    "without its end": lambda good, path: path.write_bytes(good.read_bytes()[:-100]),
    "text": lambda good, path: path.write_text("not a checkpoint\n"),
    "pickle": lambda good, path: path.write_bytes(pickle.dumps({"format": "mobilemoe/1"})),
    "code": lambda good, path: torch.save({"format": "mobilemoe/1", "model": Bomb()}, path),
    "tensor": lambda good, path: torch.save(torch.zeros(3), path),
    "other": lambda good, path: torch.save({"model": {"weight": torch.zeros(3)}, "epoch": 3}, path),
    "tokens": lambda good, path: shutil.copy(good.with_name("tokens.pt"), path),
    "bare": lambda good, path: torch.save({"format": "mobilemoe/1"}, path),
}


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("damage", DAMAGED)
def test_bad_checkpoints_get_one_line(main, damage, finished_run, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.pt"
    DAMAGED[damage](finished_run / "sft.pt", bad)
    before = listing(tmp_path)
    assert "bad.pt" in refused(main, *arguments_for(main, bad, tmp_path))
    assert listing(tmp_path) == before


@pytest.mark.parametrize("main", MAINS)
@pytest.mark.parametrize("damage, says", [
    ("lost", "model.norm.weight"), ("shape", "model.norm.weight"), ("config", "d_model = 63")])
def test_a_checkpoint_that_contradicts_itself_gets_one_line(main, damage, says, finished_run, tmp_path, refused):
    checkpoint = load_checkpoint(finished_run / "sft.pt")
    checkpoint = {**checkpoint, "model": dict(checkpoint["model"]), "config": dict(checkpoint["config"])}
    if damage == "lost":
        del checkpoint["model"]["model.norm.weight"]
    elif damage == "shape":
        checkpoint["model"]["model.norm.weight"] = torch.ones(3)
    else:
        checkpoint["config"]["d_model"] = 63
    torch.save(checkpoint, tmp_path / "bad.pt")
    assert says in refused(main, *arguments_for(main, tmp_path / "bad.pt", tmp_path))
    assert os.listdir(tmp_path) == ["bad.pt"]


def test_a_stage_does_not_start_from_a_damaged_checkpoint(finished_run, tmp_path, refused):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    os.truncate(tmp_path / "pretrain.pt", 1000)
    before = listing(tmp_path)
    assert "pretrain.pt" in refused(train.main, "midtrain", "--run", tmp_path)
    assert listing(tmp_path) == before


def test_damaged_tokens_get_one_line(finished_run, tmp_path, refused):
    shutil.copy(finished_run / "tokens.pt", tmp_path)
    os.truncate(tmp_path / "tokens.pt", 1000)
    assert "tokens.pt" in refused(train.main, "pretrain", "--preset", "test", "--run", tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Data


FOLDERS = {
    "missing": (lambda folder: None, "no folder"),
    "empty": (lambda folder: folder.mkdir(), "too little text"),
    "other files": (lambda folder: (folder / "a.pdf").write_text("text"), "too little text"),
    "empty text": (lambda folder: (folder / "a.txt").write_text(" \n"), "too little text"),
    "broken JSON": (lambda folder: (folder / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n'), "a.jsonl, line 3: brok"),
    "no text in JSON": (lambda folder: (folder / "a.jsonl").write_text('{"text": "a"}\n{"txt": "b"}\n'), "a.jsonl, line 2"),
    "broken JSON in gzip": (lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n[1')), "line 2"),
    "cut gzip": (lambda folder: (folder / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9]), "a.jsonl.gz"),
    "not UTF-8": (lambda folder: (folder / "a.txt").write_bytes(b"caf\xe9"), "a.txt"),
    "unreadable": (lambda folder: (folder / "a.txt").symlink_to("nowhere"), "a.txt"),
    "a file": (lambda folder: (folder.rmdir(), folder.write_text("text")), "no folder"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_bad_data_gets_one_line_and_leaves_no_run(what, tmp_path, refused):
    folder, run = tmp_path / "data", tmp_path / "run"
    make, says = FOLDERS[what]
    if what not in ("missing", "empty"):
        folder.mkdir()
    make(folder)
    line = refused(train.main, "--preset", "test", "--data", folder, "--run", run)
    assert says in line and str(folder) in line
    assert not run.exists()


def test_data_without_conversations_is_refused_before_training_and_can_be_mended(tmp_path, refused, call):
    """Not after pre- and mid-training; and once conversations are there, the next attempt sees them."""
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(f'{{"text": "This is text number {n}, and not the last."}}\n' for n in range(30)))
    arguments = ["--preset", "test", "--data", folder, "--run", run]
    assert "conversations" in refused(train.main, *arguments)
    assert not list(run.glob("*train.pt"))
    with open(folder / "a.jsonl", "a") as file:
        for n in range(9):
            file.write(f'{{"messages": [{{"role": "user", "content": "{n}?"}}, {{"role": "assistant", "content": "{n}!"}}]}}\n')
    code, _, err = call(train.main, *arguments)
    assert (code, err) == (0, "")


# ----------------------------------------------------------------------------------------------------------------------
# Names and numbers


@pytest.mark.parametrize("arguments, says", [
    (["posttrain"], "unknown stage 'posttrain'"),
    (["--preset", "XXL"], "unknown preset 'XXL'"),
    (["--config", "missing.json"], "missing.json"),
    (["--config", "broken.json"], "broken.json"),
    (["--config", "number.json"], "number.json"),
    (["--config", "unknown.json"], "n_expert"),
    (["--config", "impossible.json"], "d_model = 63"),
    (["--tokens", "1000"], "--tokens"),
    (["pretrain", "--tokens", "nan"], "--tokens"),
    (["pretrain", "--tokens", "inf"], "--tokens"),
    (["--tokenizer", "missing.model"], "missing.model"),
    (["--preset", "S"], "--tokenizer"),
    (["--device", "abacus"], "abacus"),
    (["--seed", "-1"], "--seed"),
    (["--micro-rows", "-1"], "--micro-rows"),
    *((["--run", "elsewhere", stage], f"elsewhere/{before}.pt") for before, stage in zip(train.STAGES, train.STAGES[1:]))])
def test_what_train_is_asked_for_must_exist(arguments, says, text_folder, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    Path("broken.json").write_text("{")
    Path("number.json").write_text("5")
    Path("unknown.json").write_text('{"n_expert": 8}')
    Path("impossible.json").write_text('{"d_model": 63, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 256}')
    before = listing(tmp_path)
    if not {"--preset", "--config"} & set(arguments):
        arguments = ["--preset", "test", *arguments]
    assert says in refused(train.main, "--data", text_folder, *arguments)
    assert listing(tmp_path) == before


def test_a_run_is_not_overwritten(finished_run, text_folder, refused):
    before = listing(finished_run)
    line = refused(train.main, "--preset", "test", "--data", text_folder, "--run", finished_run)
    assert "already holds a run" in line and "--resume" in line
    assert listing(finished_run) == before


def test_a_run_cannot_be_where_a_file_is(tmp_path, text_folder, refused):
    (tmp_path / "file").touch()
    assert "file" in refused(train.main, "--preset", "test", "--data", text_folder, "--run", tmp_path / "file")


# ----------------------------------------------------------------------------------------------------------------------
# A full disk


def test_disk_full_while_writing_tokens(text_folder, tmp_path, refused):
    run = tmp_path / "run"
    with disk_with_room_for(10_000):
        assert "tokens.pt" in refused(train.main, "--preset", "test", "--data", text_folder, "--run", run)
    assert not run.exists() or not listing(run)


def test_disk_full_while_writing_a_checkpoint(finished_run, tmp_path, refused):
    for name in ("tokens.pt", "pretrain.pt"):
        shutil.copy(finished_run / name, tmp_path)
    (tmp_path / "midtrain.pt").write_bytes(b"older")
    with disk_with_room_for(200_000):
        assert "midtrain.pt" in refused(train.main, "midtrain", "--run", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "midtrain.pt", "pretrain.pt", "tokens.pt"]
    assert (tmp_path / "midtrain.pt").read_bytes() == b"older"


def test_disk_full_while_saving_keeps_both_saves_before(finished_run, tmp_path, monkeypatch, refused):
    shutil.copy(finished_run / "tokens.pt", tmp_path)
    an_hour_a_step(monkeypatch)                                 # a save after each
    write, saves = train.write_resume_state, []

    def write_until_full(*arguments):
        saves.append(arguments)
        with disk_with_room_for(10_000) if len(saves) == 3 else contextlib.nullcontext():
            write(*arguments)
    monkeypatch.setattr(train, "write_resume_state", write_until_full)
    assert "resume.pt" in refused(train.main, "pretrain", "--preset", "test", "--run", tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["resume.old.pt", "resume.pt", "tokens.pt"]
    assert [torch.load(tmp_path / name, weights_only=True)["step"] for name in ("resume.pt", "resume.old.pt")] == [2, 1]


def test_disk_full_at_the_very_end(finished_run, tmp_path, capfd, monkeypatch):
    """The export is a process of its own: what it has to say is the one line."""
    for name in ("tokens.pt", *(f"{stage}.pt" for stage in train.STAGES)):
        shutil.copy(finished_run / name, tmp_path)
    before = listing(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "test", "--run", str(tmp_path), "--resume"])
    with pytest.raises(SystemExit) as stopped, disk_with_room_for(100_000):
        mobilemoe.run_main(train.main)
    err = capfd.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and "mobilemoe.gguf" in err, err
    assert listing(tmp_path) == before


def test_atomic_write_keeps_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), mobilemoe.atomic_write(path) as file:
        file.write(b"new" * 100_000)
        assert path.read_bytes() == b"old"
        1 / 0                                                   # noqa: B018
    assert listing(tmp_path) == {"x": b"old"}
    with mobilemoe.atomic_write(path) as file:
        file.write(b"new")
    assert listing(tmp_path) == {"x": b"new"}


def test_files_are_as_readable_as_the_user_wants_new_files_to_be(tmp_path):
    mask = os.umask(0o022)
    try:
        with mobilemoe.atomic_write(tmp_path / "x") as file:
            file.write(b"for all to read")
    finally:
        os.umask(mask)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


# ----------------------------------------------------------------------------------------------------------------------
# python mobilemoe.py CHECKPOINT "prompt"


@pytest.mark.parametrize("stage", train.STAGES)
def test_a_checkpoint_talks_and_a_seed_decides_what_it_says(stage, finished_run, call):
    path = finished_run / f"{stage}.pt"
    code, said, err = call(mobilemoe.main, path, "What is", "--tokens", 30)
    assert (code, err) == (0, "")
    assert said.startswith("What is") == (stage in ("pretrain", "midtrain"))          # text goes on, questions are answered
    assert len(said.strip()) > len("What is")
    assert call(mobilemoe.main, path, "What is", "--tokens", 30)[1] == said
    assert call(mobilemoe.main, path, "What is", "--tokens", 30, "--seed", 1)[1] != said
    greedy = [call(mobilemoe.main, path, "What is", "--tokens", 30, "--temperature", 0, "--seed", seed)[1] for seed in (0, 1)]
    assert greedy[0] == greedy[1]


@pytest.mark.parametrize("option, value", [
    ("--temperature", "nan"), ("--temperature", "-1"), ("--top-p", "1.5"), ("--top-k", "-1"), ("--tokens", "-1")])
def test_impossible_sampling_is_refused(option, value, finished_run, refused):
    assert option in refused(mobilemoe.main, finished_run / "sft.pt", "Hello", option, value)


@pytest.mark.parametrize("prompt", ["", "<|eot_id|>", "naïve 👍 \U0001f9ff", "a" * 500])
def test_any_prompt_will_do(prompt, finished_run, call):
    for stage in ("pretrain", "sft"):
        assert call(mobilemoe.main, finished_run / f"{stage}.pt", prompt, "--tokens", 3)[::2] == (0, "")


def test_ids_that_no_token_has_are_never_said(tmp_path, call):
    """So short a text gives fewer tokens than the model has room for, and so short a training does not rule the rest out."""
    folder, run = tmp_path / "data", tmp_path / "run"
    folder.mkdir()
    (folder / "a.txt").write_text("\n\n".join("One short text that says very little." for n in range(400)))
    code, _, err = call(train.main, "pretrain", "--preset", "test", "--data", folder, "--run", run, "--tokens", 256)
    assert (code, err) == (0, "")
    assert mobilemoe.tokenizer_from_dict(load_checkpoint(run / "pretrain.pt")["tokenizer"]).n_vocab < PRESETS["test"].vocab_size
    for seed in range(5):
        assert call(mobilemoe.main, run / "pretrain.pt", "One", "--seed", seed, "--temperature", 2)[::2] == (0, "")


def test_as_typed_in_a_shell(finished_run, call):
    """The same in a real process: output, exit code, one line."""
    arguments = [finished_run / "sft.pt", "What is 3 + 7?", "--tokens", "12"]
    done = subprocess.run([sys.executable, ROOT / "mobilemoe.py", *arguments], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode(errors="replace") == call(mobilemoe.main, *arguments)[1]
    arguments[0] = finished_run / "none.pt"
    done = subprocess.run([sys.executable, ROOT / "mobilemoe.py", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: no checkpoint")
