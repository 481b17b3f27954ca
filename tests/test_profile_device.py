"""profile_device.py against the paper's formulas, llama.cpp itself, and a stand-in for adb.

The stand-in is no phone: a script called adb that runs commands on this computer, in a folder that plays
/data/local/tmp. Its llama-completion asks xllamacpp for real and prints the timings as llama-completion does.
They show that commands, parsing, errors and cleaning up work; figures of a phone come from the test marked
`phone`, which needs one on a cable.
"""
import dataclasses
import json
import os
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import profile_device
from export_mobile import Q4_0, export_preset, gguf_header, model_metadata
from mobilemoe import PRESETS
from profile_device import FOLDER, Model, main

pytest.importorskip("xllamacpp")
QUICK = ("--contexts", "64", "--repeats", "1", "--threads", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with a small mixture and its dense twin."""
    folder = tmp_path_factory.mktemp("gguf")
    for name in ("tiny", "tiny-dense"):
        export_preset(name, folder / f"{name}.gguf")
    return folder


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch):
    """The embedded corpus takes ten seconds to collect."""
    text = "\n".join(pydoc_data.topics.topics.values())
    corpus = SimpleNamespace(train={"prose": [text[:40000]], "maths": [str(list(range(9000)))]})
    monkeypatch.setattr(data, "embedded_corpus", lambda: corpus)

# ----------------------------------------------------------------------------------------------------------
# Theory


@pytest.mark.parametrize("name", ["tiny", "tiny-dense"])
def test_theory_follows_the_papers_formulas(name, files):
    model, config = Model(files / f"{name}.gguf"), PRESETS[name]
    assert model.config.total_params() == config.total_params()            # read back from the file
    assert model.weight_bytes == pytest.approx(config.int4_bytes(), rel=0.01)
    assert model.kv_bytes(512, "f16") == config.kv_bytes(512, bits=16)
    assert model.kv_bytes(512, "int8") == config.kv_bytes(512) * 34 / 32   # 32 integers and an FP16 scale
    # Everything that is not expert is read whole, of the experts 4 in 60.
    expert = config.n_layers * 3 * config.d_model * config.expert_width * 18 / 32
    idle = config.n_routed - config.active_routed
    assert model.decode_bytes == pytest.approx(model.weight_bytes - idle * expert)
    body = config.active_params() - config.vocab_size * config.d_model
    attention = 4 * config.n_layers * config.n_heads * config.d_head * 256 / 2
    assert model.prompt_flops(256) == 2 * body + attention


@pytest.mark.parametrize("name", PRESETS)
def test_a_header_says_all_that_theory_needs(name, tmp_path):
    for config in (PRESETS[name], dataclasses.replace(PRESETS[name], shared_expert=False, top_k=1)):
        (tmp_path / "x.gguf").write_bytes(gguf_header(model_metadata(config, Q4_0, Q4_0), []))
        model = Model(tmp_path / "x.gguf")
        found = model.config
        assert model.q4_bytes and found.active_params() == config.active_params()
        assert found.total_params() == config.total_params() and found.max_context == config.max_context


def test_memory_accounts_for_repacking_and_mmap(files):
    model = Model(files / "tiny.gguf")
    stored, repacked, read = (
        sum(model.memory(512, SimpleNamespace(kv="f16", repack=repack, mmap=mmap)).values())
        for repack, mmap in ((False, True), (True, True), (True, False)))
    assert repacked - stored == model.q4_bytes
    assert repacked - read == model.q4_bytes - model.embedding_bytes

# ----------------------------------------------------------------------------------------------------------
# This computer


def test_two_models_in_one_run(files, tmp_path, call):
    one, two = files / "tiny.gguf", files / "tiny-dense.gguf"
    code, out, err = call(main, one, "--versus", two, *QUICK, "--out", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "tiny-vs-tiny-dense.json").read_text())
    assert [(row["model"], row["tokens"]) for row in result["rows"]] == [("tiny", 64), ("tiny-dense", 64)]
    for row in result["rows"]:
        assert row["load"] > 0 and row["first token"] > 0 and row["decode"] > 0
        # What theory says about the file is exact; llama.cpp's log rounds to 0.01 MiB.
        for part in ("repacked copy", "KV cache"):
            assert row["measured"][part] == pytest.approx(row["predicted"][part], abs=2e4)
        assert row["measured"]["weights"] == pytest.approx(row["predicted"]["weights"], rel=0.05)
        assert sum(row["measured"].values()) == pytest.approx(row["peak"])
        assert row["peak"] < 150e6                      # the process carries no PyTorch
        assert row["prefill"] < row["ceiling"]["prefill"]
    assert min(result["ceilings"].values()) > 1e8
    if sys.platform == "linux":
        touched = {(model, prompt): size for model, prompt, _, size in result["touched"]}
        real, dummy = touched["tiny", "prose"], touched["tiny", "one token repeated"]
        dense = touched["tiny-dense", "prose"], touched["tiny-dense", "one token repeated"]
        assert 1.1 * dummy < real <= Model(one).weight_bytes * 1.05
        assert dense[0] == pytest.approx(dense[1], rel=0.05)
    assert "tiny / tiny-dense" in out and "Memory in MB" in out and "nan" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"tiny-vs-tiny-dense{end}" for end in ("-memory.png", "-speed.png", ".json")]


def test_options_reach_the_runtime(files, tmp_path, call):
    options = ("--kv", "int8", "--no-repack", "--no-mmap", "--out", tmp_path)
    assert call(main, files / "tiny.gguf", *QUICK, *options)[0] == 0
    row = json.loads((tmp_path / "tiny.json").read_text())["rows"][0]
    assert row["measured"]["repacked copy"] == 0 == row["mapped"]
    assert row["measured"]["KV cache"] == pytest.approx(PRESETS["tiny"].kv_bytes(256) * 34 / 32, abs=2e4)
    assert row["measured"]["weights"] == pytest.approx(row["predicted"]["weights"], rel=0.05)


@pytest.mark.parametrize("arguments, says", [
    ((), "required"), (("x", "--preset", "S"), "not allowed"), (("x", "--repeats", "0"), "--repeats"),
    (("--preset", "XXL"), "'S', 'M'"), (("3.gguf",), "3.gguf"), (("100000.gguf",), "100000.gguf")])
def test_wrong_arguments_and_files_get_one_line(arguments, says, files, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    for size in (3, 100_000):
        Path(f"{size}.gguf").write_bytes((files / "tiny.gguf").read_bytes()[:size])
    assert says in refused(main, *QUICK, *arguments)

# ----------------------------------------------------------------------------------------------------------
# A phone that is none

STAND_IN = {
    "adb": r"""
import os, subprocess, sys
root, phones, args = os.environ["STAND_IN_ROOT"], os.environ["STAND_IN_PHONES"].split(), sys.argv[1:]
if args[0] == "-s":
    phones = [phone for phone in phones if phone == args[1]]
    args = args[2:]
if len(phones) != 1:
    sys.exit("adb: more than one device/emulator" if phones else "adb: no devices/emulators found")
places = {"/data/local/tmp": root, "/data/data/com.termux/files/usr": root + "-termux"}
def there(text):
    for place, here in places.items():
        text = text.replace(place, here)
    return text
if args[0] == "push":
    sys.exit(subprocess.run(["cp", *args[1:-1], there(args[-1])]).returncode)
sys.exit(subprocess.run(["sh", "-c", there(args[1])], stderr=subprocess.STDOUT).returncode)
""",
    "llama-completion": r"""
import sys, time
import common
given = dict(zip(sys.argv[1:], sys.argv[2:]))
start = time.perf_counter()
kv = "int8" if "-ctk" in given else "f16"
server = common.start_llama_cpp(given["-m"], int(given["-c"]), int(given["-t"]), kv)
load = 1e3 * (time.perf_counter() - start)
t = server.handle_completions({"prompt": open(given["-f"]).read(), "n_predict": int(given["-n"]),
                               "ignore_eos": True})["timings"]
print(f"common_perf_print:        load time = {load:10.2f} ms", file=sys.stderr)
for name, n, ms in (("prompt eval time", t["prompt_n"], t["prompt_ms"]),
                    ("       eval time", t["predicted_n"] - 1, t["predicted_ms"])):
    print(f"common_perf_print: {name} = {ms:10.2f} ms / {n:5d} tokens (and so on)", file=sys.stderr)
""",
    "getprop": "print('stand-in')",
    "run-as": "import os, sys; os.execvp(sys.argv[2], sys.argv[2:])"}


@pytest.fixture
def phone(tmp_path, monkeypatch) -> Path:
    """The folder that plays /data/local/tmp on the one phone that the stand-in adb sees."""
    if os.name == "nt":
        pytest.skip("the stand-in is a shell script")
    root, termux = tmp_path / "phone", tmp_path / "phone-termux" / "bin"
    root.mkdir()
    termux.mkdir(parents=True)
    for name, code in STAND_IN.items():
        path = (termux if name == "llama-completion" else tmp_path) / name
        path.write_text(f"#!{sys.executable}\n{code}")
        path.chmod(0o755)
    monkeypatch.setenv("STAND_IN_ROOT", str(root))
    monkeypatch.setenv("STAND_IN_PHONES", "one")
    monkeypatch.setenv("PYTHONPATH", str(Path(profile_device.__file__).parent))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return root


@pytest.mark.parametrize("llama_bin", [True, False], ids=["pushed", "Termux"])
def test_stand_in_phone_is_profiled_and_clean_afterwards(phone, llama_bin, files, tmp_path, call):
    where = ("--llama-bin", tmp_path / "phone-termux" / "bin") if llama_bin else ()
    options = ("--adb", *where, *QUICK, "--kv", "int8", "--out", tmp_path)
    code, out, err = call(main, files / "tiny.gguf", *options)
    assert code == 0, err
    result = json.loads((tmp_path / "tiny-vs-phone.json").read_text())
    row = result["rows"][0]
    assert 32 <= row["tokens"] <= 72                    # its tokens may differ where text was cut
    assert row["prefill"] > 0 < row["decode"] and row["peak"] > 3e7
    assert row["measured"]["KV cache"] == pytest.approx(PRESETS["tiny"].kv_bytes(256) * 34 / 32, abs=2e4)
    assert result["device"] == "stand-in, 1 threads" and "nan%" in out
    assert not list(phone.iterdir())


@pytest.mark.parametrize("phones, more, says", [
    ("", (), "no devices"), ("one two", (), "by --serial"), ("one", ("--serial", "three"), "no devices"),
    ("one", ("--llama-bin", "/nowhere"), "/nowhere"), ("one", ("--llama-bin", "broken"), "invalid")])
def test_phone_troubles_get_one_line(phone, phones, more, says, files, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("STAND_IN_PHONES", phones)
    monkeypatch.chdir(tmp_path)
    Path("broken").mkdir()
    Path("broken/llama-completion").write_text("#!/bin/sh\necho 'error: invalid argument' >&2\nexit 1\n")
    assert says in refused(main, files / "tiny.gguf", "--adb", *QUICK, *more)
    assert not list(phone.iterdir())


def test_no_adb(tmp_path, monkeypatch, refused):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no adb" in refused(main, "x.gguf", "--adb", "--out", tmp_path)

# ----------------------------------------------------------------------------------------------------------
# The real things


@pytest.mark.slow
def test_released_shapes_keep_their_promises(tmp_path, call):
    """The paper's duel at 512 tokens: S 2.5x in prefill, 2.2x in decoding; memory within 15 %."""
    duel = ("--preset", "S", "--versus", "mobilellm-pro", "--contexts", "512")
    assert call(main, *duel, "--out", tmp_path)[0] == 0
    small, dense = json.loads((tmp_path / "S-vs-mobilellm-pro.json").read_text())["rows"]
    assert small["prefill"] > 2.5 * dense["prefill"] and small["decode"] > 2.2 * dense["decode"]
    assert sum(small["predicted"].values()) == pytest.approx(small["peak"], rel=0.15)


@pytest.mark.phone
def test_a_real_phone(files, tmp_path, call):
    listing = shutil.which("adb") and subprocess.check_output(["adb", "devices"], text=True)
    serials = re.findall(r"^(\S+)\tdevice$", listing or "", re.M)
    if not serials:
        pytest.skip("adb devices shows no phone")
    here = ["--llama-bin", os.environ["LLAMA_BIN"]] if "LLAMA_BIN" in os.environ else []
    options = ("--adb", "--serial", serials[0], *here, "--contexts", "128", "--out", tmp_path)
    code, _, err = call(main, files / "tiny.gguf", *options)
    assert code == 0, err
    row = json.loads((tmp_path / "tiny-vs-phone.json").read_text())["rows"][0]
    assert row["prefill"] > row["decode"] > 1 and row["peak"] > 1e7
    left = subprocess.run(["adb", "-s", serials[0], "shell", f"ls -d {FOLDER}"], capture_output=True)
    assert left.returncode != 0
