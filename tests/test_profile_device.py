"""profile_device.py against llama.cpp itself, and against a stand-in for adb.

`stand_in_adb` is no phone: a script called adb that runs what it is asked to run on this computer, in a folder that plays
/data/local/tmp, with adb's exit codes and messages. `stand_in_llama_completion` is no llama-completion either: it asks
xllamacpp for real and prints its timings as llama-completion does. What they can show is that commands, parsing, errors and
cleaning up work; figures of a phone come from the test marked `phone`, which needs one on a cable.
"""
import json
import os
import pydoc_data.topics
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import profile_device
from export_mobile import export_preset
from mobilemoe import PRESETS
from profile_device import PHONE_FOLDER, Desk, Model, Phone, main

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
    monkeypatch.setattr(profile_device, "embedded_corpus", lambda: corpus)

# ----------------------------------------------------------------------------------------------------------------------
# Theory


@pytest.mark.parametrize("name", ["tiny", "tiny-dense"])
def test_theory_follows_the_papers_formulas(name, files):
    model, config = Model(files / f"{name}.gguf"), PRESETS[name]
    assert model.weight_bytes == pytest.approx(config.int4_bytes(), rel=0.01)
    assert model.kv_bytes(512, "f16") == config.kv_bytes(512, bits=16)
    assert model.kv_bytes(512, "int8") == config.kv_bytes(512) * 34 / 32            # 32 integers and an FP16 scale
    # Everything that is not expert is read whole, of the experts 4 in 60.
    experts = config.n_layers * 3 * config.d_model * config.expert_width * 18 / 32
    idle = 0 if config.dense else experts * (config.n_routed - config.active_routed)
    assert model.decode_bytes == pytest.approx(model.weight_bytes - idle)
    body = config.active_params() - config.vocab_size * config.d_model
    attention = 4 * config.n_layers * config.n_heads * config.d_head * 256 / 2
    assert model.prompt_flops(256) == pytest.approx(2 * body + attention, rel=0.01)


def test_memory_accounts_for_repacking_and_mmap(files):
    model = Model(files / "tiny.gguf")
    stored, repacked, read = (sum(model.memory(512, "f16", *choice, 0).values())
                              for choice in ((False, True), (True, True), (True, False)))
    assert repacked - stored == model.q4_bytes
    assert repacked - read == model.q4_bytes - model.embedding_bytes

# ----------------------------------------------------------------------------------------------------------------------
# This computer


def test_two_models_in_one_run(files, tmp_path, call):
    code, out, err = call(main, files / "tiny.gguf", "--versus", files / "tiny-dense.gguf", *QUICK, "--out", tmp_path)
    assert code == 0, err
    result = json.loads((tmp_path / "tiny-vs-tiny-dense.json").read_text())
    rows = result["rows"]
    assert [(row["model"], row["context"], row["prompt_tokens"]) for row in rows] == [("tiny", 64, 64), ("tiny-dense", 64, 64)]
    for row in rows:
        assert row["load_s"] > 0 and row["ttft_s"] > 0 and row["decode"] > 0
        measured, predicted = row["measured"], row["predicted"]
        # What the theory says about the file is exact; llama.cpp's log rounds to 0.01 MiB.
        assert measured["repacked copy"] == pytest.approx(predicted["repacked copy"], abs=2e4)
        assert measured["KV cache"] == pytest.approx(predicted["KV cache"], abs=2e4)
        assert measured["weights"] == pytest.approx(predicted["weights"], rel=0.05)
        assert sum(measured.values()) == pytest.approx(row["peak"])
        assert row["peak"] < 150e6                      # the child carries no PyTorch
        assert row["prefill"] < row["prefill_ceiling"]
    assert min(result["ceilings"].values()) > 1e8
    touched = {(t["model"], t["prompt"]): t["bytes"] for t in result["touched"]}
    real, dummy = touched["tiny", "prose"], touched["tiny", "one token repeated"]
    assert 1.1 * dummy < real <= Model(files / "tiny.gguf").weight_bytes * 1.05
    dense = touched["tiny-dense", "prose"], touched["tiny-dense", "one token repeated"]
    assert dense[0] == pytest.approx(dense[1], rel=0.05)
    assert "tiny / tiny-dense" in out and "Peak memory" in out
    assert {path.name for path in tmp_path.iterdir()} == {
        f"tiny-vs-tiny-dense{end}" for end in (".json", "-speed.png", "-memory.png")}
    assert (tmp_path / "tiny-vs-tiny-dense-speed.png").read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_runtime(files, tmp_path, call):
    code, _, err = call(main, files / "tiny.gguf", *QUICK, "--kv", "int8", "--no-repack", "--no-mmap", "--out", tmp_path)
    assert code == 0, err
    row = json.loads((tmp_path / "tiny.json").read_text())["rows"][0]
    assert row["measured"]["repacked copy"] == 0
    assert row["measured"]["KV cache"] == pytest.approx(row["predicted"]["KV cache"], abs=2e4)
    assert row["predicted"]["KV cache"] == PRESETS["tiny"].kv_bytes(256) * 34 / 32
    assert row["measured"]["weights"] == pytest.approx(row["predicted"]["weights"], rel=0.05)


def test_timings_agree_with_llama_cpps_own(files):
    desk = Desk(SimpleNamespace(threads=1, kv="f16", repack=True, mmap=True))
    answer = desk.measure(Model(files / "tiny.gguf"), 500, {"ids": {"any": list(range(300, 900))}})
    assert (answer["prompt_n"], answer["steps"]) == (500, profile_device.DECODE - 1)         # the first comes with the prompt
    assert answer["ttft_s"] == pytest.approx(answer["llama_prompt_s"], rel=0.1, abs=0.02)
    assert answer["decode_s"] == pytest.approx(answer["llama_decode_s"], rel=0.1, abs=0.02)


def test_a_preset_is_written_once(tmp_path, monkeypatch):
    model = profile_device.open_model("test", tmp_path)
    monkeypatch.setattr(profile_device, "export_preset", None)
    assert vars(profile_device.open_model("test", tmp_path)) == vars(model)


@pytest.mark.parametrize("arguments, says", [
    ((), "name either"),
    (("x.gguf", "--preset", "S"), "name either"),
    (("missing.gguf",), "no file missing.gguf"),
    (("{tiny}", "--contexts", "512", "9000"), "32 to 8192"),
    (("{tiny}", "--repeats", "0"), "--repeats"),
    (("{tiny}", "--serial", "x"), "--adb"),
    (("{tiny}", "--versus", "{tiny}"), "same name"),
])
def test_wrong_arguments_get_one_line(arguments, says, files, tmp_path, refused):
    arguments = [text.replace("{tiny}", str(files / "tiny.gguf")) for text in arguments]
    assert says in refused(main, *arguments, "--out", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 2000, 10**6])
def test_damaged_files_get_one_line(keep, files, tmp_path, refused):
    path = tmp_path / "damaged.gguf"
    path.write_bytes((files / "tiny.gguf").read_bytes()[:keep])
    assert "damaged.gguf" in refused(main, path, *QUICK, "--out", tmp_path)


def test_without_the_runtime_the_pip_line_is_given(files, tmp_path, monkeypatch, refused):
    def missing(name):
        raise profile_device.importlib.metadata.PackageNotFoundError
    monkeypatch.setattr(profile_device.importlib.metadata, "version", missing)
    assert "pip install xllamacpp" in refused(main, files / "tiny.gguf", "--out", tmp_path)


def processes_with(text: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and text in (entry / "cmdline").read_text():
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def obey_ctrl_c():
    signal.signal(signal.SIGINT, signal.SIG_DFL)        # a shell's background job ignores it, and so do its children


def test_ctrl_c_ends_the_children(tmp_path):
    script = tmp_path / "profile_device.py"             # a name of its own, to tell its children from others'
    script.symlink_to(Path(profile_device.__file__))
    (tmp_path / "run.py").write_text(
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(profile_device.__file__).parent)!r}]\n"
        "import types, profile_device as p\n"
        "p.embedded_corpus = lambda: types.SimpleNamespace(train={'prose': ['some words ' * 9000]})\np.run_main(p.main)\n")
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", "--preset", "tiny", "--contexts", "8192", "--repeats",
                                "99", "--threads", "1", "--out", tmp_path], stderr=subprocess.PIPE, start_new_session=True,
                               preexec_fn=obey_ctrl_c)
    for _ in range(300):
        if processes_with(f"{script}\0--child"):
            break
        time.sleep(0.1)
    else:
        process.kill()
        pytest.fail("no child was started")
    os.kill(process.pid, signal.SIGINT)                 # the parent alone: it must end its child by itself
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err.decode().rstrip().endswith("stopped")
    assert not processes_with(f"{script}\0--child")
    assert not list(tmp_path.rglob("*.part"))

# ----------------------------------------------------------------------------------------------------------------------
# A phone that is none

STAND_IN_ADB = r'''#!{python}
"""stand_in_adb: what adb does for profile_device.py, done on this computer. /data/local/tmp is a folder here."""
import json, os, subprocess, sys, time
phone, state = {phone!r}, json.load(open({state!r}))
def fail(text):
    sys.exit(print(text, file=sys.stderr) or 1)
def cable_is_out():
    if os.path.exists({gone!r}) and open({gone!r}).read() == "silent":
        time.sleep(600)                                 # the phone froze: adb waits for it
    return os.path.exists({gone!r})
args = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(json.dumps(args) + "\n")
if args == ["devices"]:
    print("List of devices attached")
    for serial, condition in state["phones"].items():
        print(serial + "\t" + condition)
    print()
    sys.exit()
assert args.pop(0) == "-s"
serial, command = args.pop(0), args.pop(0)
if cable_is_out() or state["phones"].get(serial) != "device":
    fail(f"adb: device '{{serial}}' not found")
if command == "get-state":
    print("device")
elif command == "push":
    source, target = args
    if state.get("full"):
        fail(f"adb: error: failed to copy '{{source}}' to '{{target}}': remote couldn't create file: No space left on device")
    sys.exit(subprocess.run(["cp", source, target.replace("/data/local/tmp", phone)]).returncode)
elif command == "shell":
    text = " ".join(args).replace("/data/local/tmp", phone).replace("/sys/devices/system/cpu", {cpus!r})
    # Its own session and a pipe in between, as adbd has: a shell on the phone hears only that nobody listens any more.
    child = subprocess.Popen(["sh", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             stdin=subprocess.DEVNULL, start_new_session=True,
                             env=os.environ | {{"PATH": {path!r} + ":" + os.environ["PATH"]}})
    for line in child.stdout:
        if cable_is_out():
            fail("adb: device offline")
        sys.stdout.buffer.write(line)
        sys.stdout.flush()
    sys.exit(child.wait())
else:
    fail("stand_in_adb: unknown command " + command)
'''

STAND_IN_LLAMA_COMPLETION = r'''#!{python}
"""stand_in_llama_completion: llama-completion's options and its log, the work done by xllamacpp."""
import sys, time
import xllamacpp
given = dict(zip(sys.argv[1:], sys.argv[2:]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = given["-m"], int(given["-c"]), 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(given["-t"])
params.no_extra_bufts, params.verbosity = "--no-repack" in sys.argv, int(given["-lv"])
if "-ctk" in given:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
start = time.perf_counter()
server = xllamacpp.Server(params)
load = 1e3 * (time.perf_counter() - start)
{extra}
t = server.handle_completions({{"prompt": open(given["-f"]).read(), "n_predict": int(given["-n"]), "temperature": 0,
                               "ignore_eos": True}})["timings"]
print(f"common_perf_print:        load time = {{load:10.2f}} ms", file=sys.stderr)
for name, n, ms, unit in (("prompt eval time", t["prompt_n"], t["prompt_ms"], "tokens"),
                          ("       eval time", t["predicted_n"] - 1, t["predicted_ms"], "runs  ")):
    print(f"common_perf_print: {{name}} = {{ms:10.2f}} ms / {{n:5d}} {{unit}} ({{ms / n:8.2f}} ms per token, "
          f"{{1e3 * n / ms:8.2f}} tokens per second)", file=sys.stderr)
'''


class StandIn:
    """A folder that plays a phone, and the means to hurt it."""

    cpus = "/sys/devices/system/cpu"

    def __init__(self, tmp_path: Path, monkeypatch):
        self.root, self.here = tmp_path / "phone", tmp_path / "bin"
        self.gone, self.log, self.android = tmp_path / "gone", tmp_path / "log", tmp_path / "android"
        self.state, self.path = tmp_path / "state.json", tmp_path / "on_the_phone"
        for folder in (self.root, self.here, self.android, self.path):
            folder.mkdir()
        self.phones(one="device")
        self.script(self.here / "adb", STAND_IN_ADB)
        self.script(self.android / "llama-completion", STAND_IN_LLAMA_COMPLETION, extra="")
        self.script(self.path / "getprop", "#!/bin/sh\necho stand-in\n")
        monkeypatch.setenv("PATH", f"{self.here}:{os.environ['PATH']}")

    def script(self, path: Path, text: str, extra: str = ""):
        if "{python}" in text:
            text = text.format(python=sys.executable, phone=str(self.root), state=str(self.state), gone=str(self.gone),
                               log=str(self.log), path=str(self.path), cpus=str(self.cpus), extra=extra)
        path.write_text(text)
        path.chmod(0o755)

    def phones(self, full: bool = False, **phones):
        self.state.write_text(json.dumps({"phones": phones, "full": full}))

    def left_behind(self) -> list:
        """Files in the phone's folder and processes that work there, after giving the guard its second."""
        for _ in range(60):
            left = [*self.root.iterdir(), *processes_with(str(self.root))]
            if not left:
                break
            time.sleep(0.1)
        return left


@pytest.fixture
def stand_in_adb(tmp_path, monkeypatch):
    stand_in = StandIn(tmp_path, monkeypatch)
    yield stand_in
    for pid in processes_with(str(stand_in.root)):      # a failed test must not leave its guard behind
        os.kill(pid, signal.SIGKILL)


def on_phone(stand_in, files, *more) -> tuple:
    return (main, files / "tiny.gguf", "--adb", "--llama-bin", stand_in.android, *QUICK, "--cores", "all",
            "--out", files / "out", *more)               # one folder for all: the probe files in it have 130 MB


def test_stand_in_adb_runs_the_whole_profile_and_is_clean_afterwards(stand_in_adb, files, call):
    code, out, err = call(*on_phone(stand_in_adb, files, "--kv", "int8"))
    assert code == 0, err
    result = json.loads((files / "out" / "tiny-vs-phone.json").read_text())
    row = result["rows"][0]
    assert 32 <= row["prompt_tokens"] <= 72                     # text may join into tokens a little otherwise than it was cut
    assert row["repeats"][0]["steps"] == profile_device.DECODE - 1 and row["peak"] > 3e7
    assert row["measured"]["KV cache"] == pytest.approx(PRESETS["tiny"].kv_bytes(256) * 34 / 32, abs=2e4)
    assert min(result["ceilings"].values()) > 1e8 and result["device"].startswith("stand-in, 1 threads")
    assert not stand_in_adb.left_behind()
    calls = [json.loads(line) for line in stand_in_adb.log.read_text().splitlines()]
    assert all(call[:2] == ["-s", "one"] for call in calls if call != ["devices"])
    pushed = [Path(call[-1]) for call in calls if "push" in call]
    assert all(path.parent == Path(PHONE_FOLDER) for path in pushed)
    assert sum(path.name == "tiny.gguf" for path in pushed) == 1            # a gigabyte travels once
    assert "tiny" in out


def test_stand_in_adb_finds_the_binary_of_termux(stand_in_adb):
    stand_in_adb.script(stand_in_adb.path / "run-as", '#!/bin/sh\n[ "$1" = com.termux ] && [ "$2" = test ]\n')
    phone = Phone(SimpleNamespace(serial=None, cores="big", threads=0, llama_bin=None))
    with phone.connected():
        assert phone.prefix == "run-as com.termux " and phone.binary.startswith("/data/data/com.termux/")
    assert not stand_in_adb.left_behind()


def test_stand_in_adb_big_cores_are_those_faster_than_the_slowest(stand_in_adb, tmp_path):
    for core, hertz in enumerate((1800, 1800, 2800, 3300)):
        (tmp_path / f"cpu{core}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "cpufreq" / "cpuinfo_max_freq").write_text(f"{hertz}\n")
    stand_in_adb.cpus = tmp_path
    stand_in_adb.script(stand_in_adb.here / "adb", STAND_IN_ADB)
    for cores, threads, expected in (("big", 0, ([2, 3], 2)), ("all", 0, ([0, 1, 2, 3], 4)), ("big", 1, ([2, 3], 1))):
        phone = Phone(SimpleNamespace(serial=None, cores=cores, threads=threads))
        assert (phone.cores, phone.threads) == expected


@pytest.mark.parametrize("phones, more, says", [
    ({}, (), "no phone"),
    ({"one": "unauthorized"}, (), "one is unauthorized"),
    ({"one": "offline"}, (), "one is offline"),
    ({"one": "device", "two": "device"}, (), "choose with --serial"),
    ({"one": "device"}, ("--serial", "three"), "no phone three"),
    ({"one": "device"}, ("--llama-bin", "/nowhere"), "/nowhere"),
    ({"one": "device", "full": True}, (), "no space"),
])
def test_stand_in_adb_troubles_get_one_line(phones, more, says, stand_in_adb, files, refused):
    stand_in_adb.phones(**phones)
    assert says in refused(*on_phone(stand_in_adb, files, *more))
    assert not stand_in_adb.left_behind()


def test_no_adb(files, tmp_path, monkeypatch, refused):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no adb" in refused(main, files / "tiny.gguf", "--adb", *QUICK, "--out", tmp_path)


def test_stand_in_adb_a_phone_without_llama_cpp(stand_in_adb, files, refused):
    arguments = [word for word in on_phone(stand_in_adb, files) if word not in ("--llama-bin", stand_in_adb.android)]
    assert "Termux" in refused(*arguments)
    assert not stand_in_adb.left_behind()


def test_stand_in_adb_a_binary_that_fails(stand_in_adb, files, refused):
    stand_in_adb.script(stand_in_adb.android / "llama-completion", "#!/bin/sh\necho 'error: invalid argument' >&2\nexit 1\n")
    assert "invalid argument" in refused(*on_phone(stand_in_adb, files))
    assert not stand_in_adb.left_behind()


def test_stand_in_adb_phone_drops_off_in_the_middle(stand_in_adb, files, refused):
    # llama.cpp itself pulls the cable, and would work on for a minute.
    stand_in_adb.script(stand_in_adb.android / "llama-completion", STAND_IN_LLAMA_COMPLETION,
                        extra=f"open({str(stand_in_adb.gone)!r}, 'w').close(); time.sleep(60)")
    assert "phone one dropped off while running" in refused(*on_phone(stand_in_adb, files))
    assert not stand_in_adb.left_behind()               # although no further command could reach it


def test_stand_in_adb_phone_that_falls_silent_is_given_up(stand_in_adb, files, refused, monkeypatch):
    monkeypatch.setattr(profile_device, "PATIENCE", 3)
    stand_in_adb.script(stand_in_adb.android / "llama-completion", STAND_IN_LLAMA_COMPLETION,
                        extra=f"open({str(stand_in_adb.gone)!r}, 'w').write('silent'); time.sleep(60)")
    assert "phone one dropped off while running" in refused(*on_phone(stand_in_adb, files))
    assert not stand_in_adb.left_behind()


def test_stand_in_adb_ctrl_c_leaves_nothing(stand_in_adb, files):
    stand_in_adb.script(stand_in_adb.android / "llama-completion", STAND_IN_LLAMA_COMPLETION, extra="time.sleep(60)")
    process = subprocess.Popen([sys.executable, profile_device.__file__, *map(str, on_phone(stand_in_adb, files)[1:])],
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=obey_ctrl_c)
    for _ in range(400):
        if processes_with(f"{stand_in_adb.root}/mobilemoe-profile/llama-completion\0"):
            break
        time.sleep(0.1)
    else:
        process.kill()
        pytest.fail("llama-completion was not started")
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert not stand_in_adb.left_behind()

# ----------------------------------------------------------------------------------------------------------------------
# The real things


@pytest.mark.slow
def test_released_shapes_keep_their_promises(tmp_path, call):
    """The paper's duel at 512 tokens: S at least 2.5x in prefill and 2.2x in decoding; memory within 15 %; clocks agree."""
    runs = []
    for _ in range(2):
        code, _, err = call(main, "--preset", "S", "--versus", "mobilellm-pro", "--contexts", "512", "--out",
                            tmp_path)
        assert code == 0, err
        runs.append(json.loads((tmp_path / "S-vs-mobilellm-pro.json").read_text())["rows"])
    small, dense = runs[0]
    assert small["prefill"] > 2.5 * dense["prefill"] and small["decode"] > 2.2 * dense["decode"]
    assert sum(small["predicted"].values()) == pytest.approx(small["peak"], rel=0.15)
    assert max(small["clocks"]) < 0.05 and max(dense["clocks"]) < 0.05
    for one, two in zip(*runs):
        assert one["prefill"] == pytest.approx(two["prefill"], rel=0.1)
        assert one["decode"] == pytest.approx(two["decode"], rel=0.1)


@pytest.mark.phone
def test_a_real_phone(files, tmp_path, call):
    listing = subprocess.run(["adb", "devices"], capture_output=True, text=True).stdout if shutil.which("adb") else ""
    serials = re.findall(r"^(\S+)\tdevice$", listing, re.M)
    if not serials:
        pytest.skip("adb devices shows no phone")
    folder = ["--llama-bin", os.environ["LLAMA_BIN"]] if "LLAMA_BIN" in os.environ else []
    code, _, err = call(main, files / "tiny.gguf", "--adb", "--serial", serials[0], *folder, "--contexts", "128",
                        "--out", tmp_path)
    assert code == 0, err
    row = json.loads((tmp_path / "tiny-vs-phone.json").read_text())["rows"][0]
    assert row["prefill"] > row["decode"] > 1 and row["peak"] > 1e7
    left = subprocess.run(["adb", "-s", serials[0], "shell", f"ls -d {PHONE_FOLDER}"], capture_output=True)
    assert left.returncode != 0
