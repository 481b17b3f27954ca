"""What a .gguf file costs on a device: seconds, tokens per second and bytes, each beside what theory allows.

    python profile_device.py mobilemoe.gguf                              on this computer
    python profile_device.py --preset S --versus mobilellm-pro           released shapes, random weights, the paper's duel
    python profile_device.py --preset S --adb --llama-bin build/bin      on the Android phone on the cable

Measured at each context: load time, time to first token, prefill and decode tokens per second, peak resident memory; medians
of several repeats and their spread, every measurement in a fresh process, the two models taking turns, so that neither has
the cool processor to itself. Then the memory that real text and one repeated token touch: a mixture reads only the experts
that the prompt asks for, so a benchmark with a dummy prompt flatters it (paper, section 5).

Theory is short. A decoded token reads every active weight and the whole KV cache once: memory bandwidth / bytes is the
ceiling of decoding. A prompt token multiplies with every active weight, and hundreds of tokens share one reading: INT8 rate /
FLOPs is the ceiling of prefill. Memory is equation 5 plus what the runtime adds: the repacked copy of the weights, work
buffers, itself. The distance between each ceiling and the measurement is what an engineer can still win.

What it is not: a test of the answers (evaluate.py), or of ExecuTorch, which the paper measured. The runtime is llama.cpp,
through `pip install xllamacpp` here, as the command-line program llama-completion on the phone.
"""
import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if sys.argv[1:] != ["--child"]:         # PyTorch alone is 200 MB: a process that measures memory must not carry it
    import torch

    from data import embedded_corpus
    from export_mobile import BLOCK, Q4_0, export, export_preset, placeholder_tokenizer, state_shapes
    from mobilemoe import PRESETS, Config, UserError, atomic_write, run_main

UBATCH = 512                    # prompt tokens that llama.cpp takes through the layers together
DUMMY = "one token repeated"
KV_BITS = {"f16": 16, "int8": 8.5}          # Q8_0 is 32 integers and an FP16 scale: equation 5's 8 bits are 8.5 in a file
BUDGET = 5e9                    # the paper's phone: what an app may take
PHONE_FOLDER = "/data/local/tmp/mobilemoe-profile"      # the one place where adb may write *and* execute
BENCH = "llama-completion"
# Ends what runs on the phone (its number is in `pid`, how to end it in `kill`) and removes all we put there.
CLEAN = f"[ -f {PHONE_FOLDER}/pid ] && $(cat {PHONE_FOLDER}/kill) $(cat {PHONE_FOLDER}/pid) 2>/dev/null; rm -rf {PHONE_FOLDER}"

# ----------------------------------------------------------------------------------------------------------------------
# Theory: everything follows from the tensors that the file lists


@dataclass(frozen=True)
class Model:
    name: str
    path: Path
    d_model: int
    layers: int
    heads: int
    kv_heads: int
    d_head: int
    context: int                # longest the file allows
    hidden: int                 # floats of feed-forward a token needs at once: A experts of gate + up, and their A outputs
    vocab: int
    weight_bytes: int           # as stored
    q4_bytes: int               # what a runtime that repacks will copy
    embedding_bytes: int        # looked up as stored, so it stays beside its repacked copy
    decode_bytes: float         # read for one token: A of E experts, everything else once
    prompt_params: float        # multiplied with by one prompt token: only the last one needs the output layer

    def kv_bytes(self, tokens: int, kv: str) -> float:
        """Equation 5's second term. llama.cpp allocates keys and values in steps of 256 tokens."""
        return 2 * -(-tokens // 256) * 256 * self.layers * self.kv_heads * self.d_head * KV_BITS[kv] / 8

    def prompt_flops(self, tokens: int) -> float:
        """Per prompt token, on average: a multiply and an add per weight, and attention to half of the prompt."""
        return 2 * self.prompt_params + 4 * self.layers * self.heads * self.d_head * tokens / 2

    def memory(self, tokens: int, kv: str, repack: bool, mmap: bool, runtime: float) -> dict[str, float]:
        """Predicted bytes by part for a context of `tokens`; `runtime` is the process before it loads anything."""
        batch = min(UBATCH, tokens)
        # Alive at once: residual stream, its norm, q and the attention's output, one feed-forward; F32. And the mask, F16.
        work = batch * 4 * (4 * self.d_model + self.hidden) + batch * tokens * 2 + 4 * self.vocab
        stored = self.weight_bytes if mmap or not repack else self.weight_bytes - self.q4_bytes + self.embedding_bytes
        return {"weights": stored, "repacked copy": self.q4_bytes if repack else 0,
                "KV cache": self.kv_bytes(tokens, kv), "compute buffers": work,
                # Token strings, their hash table and the merges: about 400 bytes for each word of the vocabulary.
                "runtime and vocabulary": runtime + 400 * self.vocab}


def read_model(path: Path, name: str) -> Model:
    """Read a GGUF header (export_mobile.py describes it). Raises UserError if this is none, or not one of ours."""
    try:
        with open(path, "rb") as file:
            keys, tensors = read_header(file)
        arch = keys["general.architecture"]
        get = {key.removeprefix(f"{arch}."): value for key, value in keys.items()}.get
        experts, used = get("expert_count", 1), get("expert_used_count", 1)
        width = get("expert_feed_forward_length", get("feed_forward_length"))
        sizes, active = {}, {}
        for tensor, dims, kind in tensors:
            weights, block = BLOCK[kind]
            count = 1
            for dim in dims:
                count *= dim
            sizes[tensor] = (count * block // weights, kind)
            share = used / experts if "_exps." in tensor else 1
            active[tensor] = (share * count, share * count * block / weights)
        embedding = "token_embd.weight"
        return Model(
            name=name, path=path, d_model=get("embedding_length"), layers=get("block_count"), heads=get("attention.head_count"),
            kv_heads=get("attention.head_count_kv"), d_head=get("attention.key_length"), context=get("context_length"),
            hidden=used * (2 * width + (get("embedding_length") if experts > 1 else 0)), vocab=get("vocab_size"),
            weight_bytes=sum(size for size, _ in sizes.values()),
            embedding_bytes=sizes[embedding][0], q4_bytes=sum(size for size, kind in sizes.values() if kind == Q4_0),
            decode_bytes=sum(size for _, size in active.values()),
            prompt_params=sum(count for tensor, (count, _) in active.items() if tensor != embedding))
    except (struct.error, KeyError, UnicodeDecodeError, ValueError, TypeError):
        raise UserError(f"{path} is not a .gguf file that export_mobile.py wrote, or not all of it") from None


def read_header(file) -> tuple[dict, list[tuple[str, tuple[int, ...], int]]]:
    """Key/value pairs (arrays are skipped) and (name, dimensions, type) of every tensor."""
    def take(layout: str) -> tuple:
        return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

    def string() -> str:
        return file.read(take("Q")[0]).decode()

    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def value(kind: int):
        if kind == 8:
            return string()
        if kind != 9:
            return take(scalars[kind])[0]
        inner, count = take("IQ")
        if inner == 8:
            for _ in range(count):
                file.seek(take("Q")[0], os.SEEK_CUR)
        else:
            file.seek(count * struct.calcsize(scalars[inner]), os.SEEK_CUR)

    if file.read(4) != b"GGUF":
        raise ValueError
    _, n_tensors, n_keys = take("IQQ")
    keys = {string(): value(take("I")[0]) for _ in range(n_keys)}
    tensors = []
    for _ in range(n_tensors):
        tensor, (n_dims,) = string(), take("I")
        tensors.append((tensor, take(f"{n_dims}Q"), take("IQ")[0]))
    return keys, tensors

# ----------------------------------------------------------------------------------------------------------------------
# The child: one process, one measurement


def child():
    """Answer the order on stdin with JSON on stdout; llama.cpp's log goes to stderr, whatever it prefers."""
    order = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if order["cores"]:
        os.sched_setaffinity(0, order["cores"])
    result = {"ceilings": ceilings, "tokenize": tokenize, "measure": measure}[order["do"]](order)
    with answer:
        json.dump(result, answer)


def ceilings(order: dict) -> dict:
    """What this device can do at best: bytes read per second, INT8 and FP32 operations per second (best of 5)."""
    import torch
    torch.set_num_threads(order["threads"])

    def best(work) -> float:
        times = []
        for _ in range(6):                          # the first one allocates and builds kernels
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return min(times[1:])
    big = torch.ones(2**26)                         # 268 MB: no cache holds it
    a, b = torch.ones(UBATCH, 2048), torch.ones(2048, 2048)
    a8, b8 = a.to(torch.int8), b.to(torch.int8)
    operations = 2 * UBATCH * 2048 * 2048
    return {"bandwidth": 4 * len(big) / best(big.sum), "int8": operations / best(lambda: torch._int_mm(a8, b8)),
            "fp32": operations / best(lambda: a @ b)}


def start_server(order: dict):
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = order["path"]
    params.n_ctx, params.n_parallel, params.n_ubatch = order["n_ctx"], 1, UBATCH
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    kind = xllamacpp.ggml_type.GGML_TYPE_Q8_0 if order["kv"] == "int8" else xllamacpp.ggml_type.GGML_TYPE_F16
    params.cache_type_k = params.cache_type_v = kind
    modes = xllamacpp.llama_load_mode
    params.load_mode = modes.LLAMA_LOAD_MODE_MMAP if order["mmap"] else modes.LLAMA_LOAD_MODE_NONE
    params.no_extra_bufts = not order["repack"]
    params.n_gpu_layers = 0
    params.warmup = not order["touch"]              # llama.cpp's warm-up reads every expert
    params.fit_params, params.cache_ram_mib, params.n_ctx_checkpoints = False, 0, 0     # memory that batch 1 has no use for
    params.verbosity = 4                            # prints the buffer sizes
    return xllamacpp.Server(params)


def post(server, route: str, **body) -> dict:
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    return json.load(urllib.request.urlopen(request))


def tokenize(order: dict) -> dict:
    """The first order["length"] token ids of each text in order["texts"], and these tokens as text again."""
    server = start_server(order)
    ids = {name: post(server, "/tokenize", content=text, add_special=False)["tokens"][:order["length"]]
           for name, text in order["texts"].items()}
    texts = {name: post(server, "/detokenize", tokens=tokens)["content"] for name, tokens in ids.items()}
    return {"ids": ids, "texts": texts}


def memory_now(field: str) -> int:
    """VmRSS (now) or VmHWM (highest so far) of this process in bytes. Only Linux tells the first."""
    if sys.platform == "linux":
        return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def mapped_file(path: str) -> list[tuple[int, int, int]]:
    """(start, end, resident bytes) of every mapping of the model file in this process (Linux)."""
    found = []
    for block in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]:
        if block.partition("\n")[0].endswith(os.path.realpath(path)):
            start, end = (int(edge, 16) for edge in block.split()[0].split("-"))
            found.append((start, end, 1024 * int(re.search(r"^Rss:\s+(\d+)", block, re.M)[1])))
    return found


def measure(order: dict) -> dict:
    """Load, prefill, decode. Seconds by our own clock and by llama.cpp's, bytes of memory."""
    import xllamacpp  # noqa: F401  the library's own pages belong to the runtime, not to the model
    runtime, start = memory_now("VmRSS"), time.perf_counter()
    server = start_server(order)
    loaded = time.perf_counter()
    if order["touch"]:
        # Loading maps the file and touches all of it in passing. Let go of every page: what is resident after the prompt is
        # what the prompt used. (The kernel fetches 64 KB around each page asked for; an expert matrix is larger than that.)
        libc = ctypes.CDLL(None)
        for first, end, _ in mapped_file(order["path"]):
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), 4)          # MADV_DONTNEED
    # The server holds back a token that ends inside a character, and random weights say such things all the time: our clock
    # would miss it. So only letters may be said; which one is the model's choice, or all would visit the same experts.
    letters = [post(server, "/tokenize", content=letter)["tokens"][-1] for letter in "abcdefghijklmnopqrstuvwxyz"]
    arrivals = []
    replies = []

    def arrived(chunk: dict):
        arrivals.append(time.perf_counter())
        replies.append(chunk)
    asked = time.perf_counter()
    server.handle_completions({"prompt": order["prompt"], "n_predict": order["decode"], "temperature": 0, "stream": True,
                               "cache_prompt": False, "logit_bias": [[letter, 1e4] for letter in letters]}, arrived)
    problem = next((chunk["error"] for chunk in replies if "error" in chunk), None)
    if problem:
        raise RuntimeError(problem["message"])
    timings = next(chunk["timings"] for chunk in replies if "timings" in chunk)
    steps = timings["predicted_n"] - 1              # the first token comes with the prompt
    result = {"load_s": loaded - start, "ttft_s": arrivals[0] - asked, "decode_s": arrivals[-1] - arrivals[0],
              "prompt_n": timings["prompt_n"], "steps": steps, "llama_prompt_s": timings["prompt_ms"] / 1e3,
              "llama_decode_s": timings["predicted_ms"] / 1e3, "runtime": runtime, "peak": memory_now("VmHWM")}
    if sys.platform == "linux":
        result["mapped"] = sum(resident for _, _, resident in mapped_file(order["path"]))
    return result

# ----------------------------------------------------------------------------------------------------------------------
# This computer


class Desk:
    """llama.cpp in child processes of this script."""

    def __init__(self, args):
        if not importlib.util.find_spec("xllamacpp"):
            raise UserError("measuring needs llama.cpp: pip install xllamacpp")
        available = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else list(range(os.cpu_count()))
        self.cores = parse_cores(args.cores, available, {}) if args.cores else []
        if self.cores and sys.platform != "linux":
            raise UserError("--cores works on Linux and on a phone only: leave it out")
        self.args, self.threads = args, args.threads or len(self.cores or available)
        self.name = f"{processor_name()}, {self.threads} threads"
        self.runtime = f"xllamacpp {importlib.metadata.version('xllamacpp')}"

    def ask(self, do: str, **order) -> dict:
        """One order to one fresh child, which is gone when this returns, whatever happens."""
        order |= {"do": do, "cores": self.cores, "threads": self.threads}
        process = subprocess.Popen([sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, errors="replace")
        try:
            out, log = process.communicate(json.dumps(order))
        finally:
            process.kill()
            process.wait()
        if process.returncode == -signal.SIGKILL:
            raise UserError(f"{order.get('path', do)}: the system killed the measuring process, most likely for lack of memory")
        if process.returncode:
            lines = [line.strip() for line in log.splitlines() if line.strip()]
            said = [line for line in lines if " E " in line] or lines or ["no word from it"]
            raise UserError(f"llama.cpp failed with {order.get('path', do)}: {said[-1][-200:]}")
        answer = json.loads(out)
        if do == "measure":
            answer |= buffers(log) | ({"weights": answer["mapped"]} if order["mmap"] and "mapped" in answer else {})
        return answer

    def order(self, model: Model, n_ctx: int, **changes) -> dict:
        a = self.args
        return {"path": str(model.path), "kv": a.kv, "repack": a.repack, "mmap": a.mmap, "touch": False,
                "n_ctx": n_ctx} | changes

    def ceilings(self) -> dict:
        return self.ask("ceilings")

    def prompts(self, model: Model, texts: dict[str, str], length: int) -> dict:
        return self.ask("tokenize", texts=texts, length=length, **self.order(model, 256, repack=False))

    def measure(self, model: Model, context: int, prompts: dict) -> dict:
        prompt = next(iter(prompts["ids"].values()))[:prompt_length(model, context, self.args)]
        return self.ask("measure", prompt=prompt, decode=self.args.decode, **self.order(model, len(prompt) + self.args.decode))

    def touched(self, model: Model, prompt: list[int]) -> float:
        """Bytes of the file that a prompt makes resident: mapped, not repacked."""
        order = self.order(model, len(prompt) + 8, mmap=True, repack=False, touch=True)
        return self.ask("measure", prompt=prompt, decode=1, **order)["mapped"]


def buffers(log: str) -> dict[str, float]:
    """Bytes of the buffers that llama.cpp's log lists, by part of the memory."""
    parts = {"weights": "CPU(?:_Mapped)? model", "repacked copy": "REPACK model", "KV cache": "KV",
             "compute buffers": "(?:compute|output)"}
    return {part: 2**20 * sum(map(float, re.findall(rf"{pattern} buffer size\s*=\s*([\d.]+) MiB", log)))
            for part, pattern in parts.items()}


def processor_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return os.uname().machine


def parse_cores(text: str, available: list[int], speed: dict[int, int]) -> list[int]:
    """"all", "big" (faster than the slowest ones), or "4-7" or "0,2,4"; raises UserError."""
    if text in ("all", "big"):
        faster = [core for core in available if speed.get(core, 0) > min(speed.values())] if text == "big" and speed else []
        return faster or available                      # where all are alike, all are big
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise UserError(f"--cores {text}: big, all, or numbers such as 4-7 or 0,2,4")
    chosen = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        chosen += range(int(first), int(last or first) + 1)
    if missing := [core for core in chosen if core not in available]:
        raise UserError(f"--cores {text}: there is no core {missing[0]}, there are {', '.join(map(str, available))}")
    return chosen

# ----------------------------------------------------------------------------------------------------------------------
# A phone


class Phone:
    """llama-completion on an Android phone, through adb. Use as a context: leaving it leaves nothing on the phone."""

    def __init__(self, args):
        self.args, self.files, self.guard, self.serial = args, {}, None, None
        if not shutil.which("adb"):
            raise UserError("no adb on this computer: install Android's platform-tools (`apt install adb`)")
        self.serial = choose_phone(args.serial)
        listing = self.shell('cd /sys/devices/system/cpu; for c in cpu[0-9]*; do '
                             'echo "${c#cpu} $(cat $c/cpufreq/cpuinfo_max_freq 2>/dev/null || echo 0)"; done')
        speed = {int(core): int(hertz) for core, hertz in map(str.split, listing.splitlines())}
        self.cores = parse_cores(args.cores or "big", sorted(speed), speed)
        self.threads = args.threads or len(self.cores)
        product = self.shell("getprop ro.product.model").strip()
        self.name = f"{product}, {self.threads} threads on cores {', '.join(map(str, self.cores))}"
        self.runtime = BENCH

    def __enter__(self):
        try:
            self.prepare()
        except BaseException:
            self.__exit__()
            raise
        return self

    def prepare(self):
        # The guard is a shell on the phone that keeps talking. When the cable is pulled or this script dies, its next word
        # finds nobody: it ends llama.cpp and removes the folder. Nothing on this side could, once the cable is out.
        self.shell(f"{CLEAN}; mkdir -p {PHONE_FOLDER} && chmod 755 {PHONE_FOLDER}")
        self.guard = subprocess.Popen(
            ["adb", "-s", self.serial, "shell", f"trap '{CLEAN}; exit' PIPE HUP TERM INT; "
             f"while [ -d {PHONE_FOLDER} ]; do echo here || {{ {CLEAN}; exit; }}; sleep 1; done"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.find_binary()

    def find_binary(self):
        """Push --llama-bin, or find what is installed: on the path, or inside Termux, which only `run-as` may enter."""
        self.run_as, folder = "", PHONE_FOLDER
        if self.args.llama_bin:
            source = Path(self.args.llama_bin)
            if not (source / BENCH).is_file():
                raise UserError(f"--llama-bin {source}: there is no {BENCH} in it")
            for file in [source / BENCH, *sorted(source.glob("*.so*"))]:
                self.push(file)
            self.shell(f"chmod 755 {PHONE_FOLDER}/{BENCH}")
            self.binary = f"{PHONE_FOLDER}/{BENCH}"
        elif found := self.shell(f"command -v {BENCH} || true").strip():
            self.binary, folder = found, str(Path(found).parent)
        else:
            termux = "/data/data/com.termux/files/usr"
            if "yes" not in self.shell(f"run-as com.termux test -x {termux}/bin/{BENCH} 2>/dev/null && echo yes || true"):
                raise UserError(f"no {BENCH} on the phone: name a folder with one for Android (--llama-bin DIR), "
                                "or `pkg install llama-cpp` in Termux")
            self.run_as, self.binary, folder = "run-as com.termux ", f"{termux}/bin/{BENCH}", f"{termux}/lib"
        self.libraries = folder

    def __exit__(self, *_):
        with contextlib.suppress(UserError):        # a phone that is gone cannot be cleaned; its guard does it
            self.shell(CLEAN)
        if self.guard:
            self.guard.terminate()
            self.guard.wait()

    def adb(self, *command: str, doing: str) -> str:
        """Run one adb command and return its output. Raises UserError: the phone went away, it is full, or what it said."""
        process = subprocess.Popen(["adb", "-s", self.serial, *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, errors="replace")
        try:
            out, err = process.communicate()
        finally:
            process.kill()
            process.wait()
        if process.returncode:
            state = subprocess.run(["adb", "-s", self.serial, "get-state"], capture_output=True, text=True)
            if state.stdout.strip() != "device":
                raise UserError(f"phone {self.serial} dropped off while {doing}: check the cable and run this again")
            if "No space left" in out + err:
                raise UserError(f"phone {self.serial} has no space left while {doing}: free some")
            said = [line for line in (err + out).splitlines() if line.strip()] or [f"exit code {process.returncode}"]
            raise UserError(f"phone {self.serial} failed while {doing}: {said[-1].strip()[-200:]}")
        return out

    def shell(self, command: str, doing: str = "preparing") -> str:
        return self.adb("shell", command, doing=doing)

    def push(self, file: Path):
        """Copy a file into the phone's folder, once. adb finds out about a full phone only when it is full: ask before."""
        if self.files.get(file.name) == file:
            return
        free = int(self.shell(f"df -k {PHONE_FOLDER} | tail -n 1").split()[3]) * 1024
        if (need := file.stat().st_size) > free:
            raise UserError(f"phone {self.serial} has no space: {free / 1e6:.0f} MB for {file.name} of {need / 1e6:.0f} MB")
        self.adb("push", str(file), f"{PHONE_FOLDER}/{file.name}", doing=f"receiving {file.name}")
        self.shell(f"chmod 644 {shlex.quote(f'{PHONE_FOLDER}/{file.name}')}")
        self.files[file.name] = file

    def run(self, model: Model, text: str, n_ctx: int, decode: int) -> dict:
        """One process on the phone: llama.cpp's own times, and the peak memory that /proc showed until it ended."""
        self.push(model.path)
        with tempfile.TemporaryDirectory() as folder:
            prompt = Path(folder) / "prompt.txt"
            prompt.write_text(text)
            self.files.pop("prompt.txt", None)
            self.push(prompt)
        a, mask = self.args, sum(1 << core for core in self.cores)
        arguments = ["-m", f"{PHONE_FOLDER}/{model.path.name}", "-f", f"{PHONE_FOLDER}/prompt.txt", "-c", n_ctx, "-n", decode,
                     "-t", self.threads, "-ub", UBATCH, "--temp", 0, "--ignore-eos", "--no-escape", "-no-cnv", "-ngl", 0,
                     "-lv", 4]
        if a.kv == "int8":
            arguments += ["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"]
        arguments += [] if a.repack else ["--no-repack"]
        arguments += [] if a.mmap else ["--no-mmap"]
        command = f"{self.run_as}taskset {mask:x} {self.binary} {shlex.join(map(str, arguments))}"
        # `run-as` and `taskset` become the program they start: $! is its number. The high-water mark only grows, so the last
        # look counts, a tenth of a second before the end at worst.
        script = (f"cd {PHONE_FOLDER}; export LD_LIBRARY_PATH={self.libraries}; echo '{self.run_as}kill -9' > kill; "
                  f"{command} </dev/null 2>&1 & pid=$!; echo $pid > pid; "
                  f"while kill -0 $pid 2>/dev/null || [ -d /proc/$pid ]; do "
                  f"{self.run_as}grep VmHWM /proc/$pid/status 2>/dev/null || break; sleep 0.1; done; "
                  "wait $pid; code=$?; rm -f pid; exit $code")
        log = self.shell(script, doing=f"running {model.name}")
        loads = re.findall(r"load time =\s*([\d.]+) ms", log)
        prefills = re.findall(r"prompt eval time =\s*([\d.]+) ms\s*/\s*(\d+) tokens", log)
        decodes = re.findall(r"(?<!prompt )eval time =\s*([\d.]+) ms\s*/\s*(\d+) runs", log)
        peaks = re.findall(r"VmHWM:\s+(\d+) kB", log)
        if not (loads and prefills and decodes and peaks):
            raise UserError(f"phone {self.serial}: {BENCH} ended without printing its timings; try it by hand: {command}")
        prompt_s, decode_s = float(prefills[-1][0]) / 1e3, float(decodes[-1][0]) / 1e3
        return {"load_s": float(loads[-1]) / 1e3, "ttft_s": prompt_s, "decode_s": decode_s,
                "prompt_n": int(prefills[-1][1]), "steps": int(decodes[-1][1]), "llama_prompt_s": prompt_s,
                "llama_decode_s": decode_s, "runtime": 0, "peak": 1024 * max(map(int, peaks)), **buffers(log)}

    def ceilings(self) -> dict:
        """Nothing on a phone measures matrix products, but llama.cpp multiplies: a file that is almost one matrix does."""
        rates = {}
        for dtype, rate in (("q4_0", "int8"), ("f32", "fp32")):
            model = probe_file(Path(self.args.cache), dtype)
            answer = self.run(model, "a" * 500, 1024, 16)
            rates[rate] = model.prompt_flops(answer["prompt_n"]) * answer["prompt_n"] / answer["ttft_s"]
        return rates | {"bandwidth": model.decode_bytes * answer["steps"] / answer["decode_s"]}    # of F32: no cache holds it

    def prompts(self, model: Model, texts: dict[str, str], length: int) -> dict:
        return Desk(argparse.Namespace(**vars(self.args) | {"cores": None, "threads": 1})).prompts(model, texts, length)

    def measure(self, model: Model, context: int, prompts: dict) -> dict:
        tokens = prompt_length(model, context, self.args)
        text = next(iter(prompts["texts"].values()))
        text = text[:len(text) * tokens // len(next(iter(prompts["ids"].values())))]    # about: the answer says how many
        return self.run(model, text, min(model.context, tokens * 9 // 8 + self.args.decode), self.args.decode)


def choose_phone(serial: str | None) -> str:
    listing = subprocess.run(["adb", "devices"], capture_output=True, text=True)
    if listing.returncode:
        raise UserError(f"adb devices failed: {(listing.stderr or listing.stdout).strip().splitlines()[-1]}")
    phones = dict(line.split("\t", 1) for line in listing.stdout.splitlines() if "\t" in line)
    if not phones:
        raise UserError("no phone: connect one by cable and allow USB debugging in its developer options")
    if not serial and len(phones) > 1:
        raise UserError(f"more than one phone ({', '.join(phones)}): choose with --serial")
    serial = serial or next(iter(phones))
    if serial not in phones:
        raise UserError(f"no phone {serial}: adb sees {', '.join(phones)}")
    if phones[serial] != "device":
        raise UserError(f"phone {serial} is {phones[serial].split(';')[0]}: unlock it and allow USB debugging")
    return serial

# ----------------------------------------------------------------------------------------------------------------------
# The run: files, prompts, repeats


def preset_file(name: str, cache: Path) -> Model:
    """A file of random weights in a released shape, written once, a tensor at a time. Speed does not depend on the values."""
    path = cache / f"{name}.gguf"
    if not path.exists():
        print(export_preset(name, path))
    return read_model(path, name)


def probe_file(cache: Path, dtype: str) -> Model:
    """28M weights, nearly all of them in one feed-forward: what runs it fast multiplies fast."""
    config = Config(d_model=1024, n_layers=1, n_heads=16, n_kv_heads=4, d_ff=8192, vocab_size=512, max_context=2048,
                    n_experts=1, granularity=1, shared_expert=False)
    path, shapes = cache / f"probe-{dtype}.gguf", state_shapes(config)
    if not path.exists():
        export(config, lambda key: torch.ones(shapes[key]), placeholder_tokenizer(config.vocab_size), path, dtype)
    return read_model(path, path.stem)


def open_model(what: str, cache: Path) -> Model:
    """A path or a preset's name -> Model."""
    if what in PRESETS:
        return preset_file(what, cache)
    if not Path(what).is_file():
        raise UserError(f"no file {what}, and no preset of that name ({', '.join(PRESETS)})")
    return read_model(Path(what), Path(what).stem)


def corpus_texts(characters: int) -> dict[str, str]:
    """The beginning of each domain of the embedded corpus, ASCII only so that cutting it cuts no character."""
    corpus = embedded_corpus().train
    return {domain: "\n".join(documents)[:2 * characters].encode("ascii", "ignore").decode()[:characters]
            for domain, documents in corpus.items()}


def prompt_length(model: Model, context: int, args) -> int:
    """`context` tokens, or what the file's own limit leaves beside the reply: 8k on a file of 8k."""
    return min(context, model.context - args.decode - 1)


def contexts_for(models: list[Model], text: str | None) -> list[int]:
    limit = min(model.context for model in models)
    if text is None:
        return [context for context in (512, 1024, 2048, 4096) if context <= limit] or [limit]
    try:
        contexts = [int(float(part[:-1]) * 1024 if part.endswith("k") else part) for part in text.lower().split(",")]
    except ValueError:
        contexts = [0]
    if min(contexts) < 32:
        raise UserError(f"--contexts {text}: numbers of at least 32 such as 512,1k,4096")
    if max(contexts) > limit:
        raise UserError(f"--contexts {text}: {models[0].name if models[0].context == limit else models[-1].name} "
                        f"allows at most {limit} tokens")
    return contexts


def summarise(model: Model, context: int, answers: list[dict], ceiling: dict, args) -> dict:
    """Medians, spread ((largest - smallest) / median), ceilings, and memory part by part, from the repeats of one cell."""
    tokens = answers[0]["prompt_n"]
    window = tokens + args.decode
    values = {"load_s": [a["load_s"] for a in answers], "ttft_s": [a["ttft_s"] for a in answers],
              "prefill": [a["prompt_n"] / a["ttft_s"] for a in answers],
              "decode": [a["steps"] / a["decode_s"] for a in answers],
              "peak": [a["peak"] for a in answers]}
    row = {"model": model.name, "context": context, "prompt_tokens": tokens, "repeats": answers,
           **{name: statistics.median(found) for name, found in values.items()},
           "spread": {name: (max(found) - min(found)) / statistics.median(found) for name, found in values.items()}}
    row["decode_bytes"] = model.decode_bytes + model.kv_bytes(window, args.kv)
    row["prompt_flops"] = model.prompt_flops(tokens)
    row["decode_ceiling"] = ceiling["bandwidth"] / row["decode_bytes"]
    row["prefill_ceiling"] = ceiling["int8"] / row["prompt_flops"]
    first = answers[0]
    row["predicted"] = model.memory(window, args.kv, args.repack, args.mmap, first["runtime"])
    row["measured"] = {part: first[part] for part in ("weights", "repacked copy", "KV cache", "compute buffers")}
    row["measured"]["runtime and vocabulary"] = row["peak"] - sum(row["measured"].values())
    row["clocks"] = max(abs(a["ttft_s"] / a["llama_prompt_s"] - 1) for a in answers), \
        max(abs(a["decode_s"] / a["llama_decode_s"] - 1) for a in answers)
    return row


def profile(device, models: list[Model], contexts: list[int], args) -> dict:
    """All measurements. The models take turns within each repeat: what slows the device slows both."""
    longest = max(contexts)
    ceiling = device.ceilings()
    texts = corpus_texts(8 * longest)
    prompts = {model.name: device.prompts(model, texts, longest) for model in models}
    answers = {(model.name, context): [] for model in models for context in contexts}
    for repeat in range(args.repeats):
        for context in contexts:
            for model in models:
                print(f"\rrepeat {repeat + 1} of {args.repeats}, context {context}, {model.name:20}", end="", file=sys.stderr)
                answers[model.name, context].append(device.measure(model, context, prompts[model.name]))
    rows = [summarise(model, context, answers[model.name, context], ceiling, args) for model in models for context in contexts]
    touched = []
    for model in models if isinstance(device, Desk) and sys.platform == "linux" else []:
        length = prompt_length(model, min(contexts), args)
        ids = {domain: tokens[:length] for domain, tokens in prompts[model.name]["ids"].items()}
        for domain, prompt in (ids | {DUMMY: [next(iter(ids.values()))[0]] * length}).items():
            print(f"\rmemory touched by {domain}, {model.name:20}", end="", file=sys.stderr)
            touched.append({"model": model.name, "prompt": domain, "tokens": length, "bytes": device.touched(model, prompt)})
    print("\r" + 60 * " " + "\r", end="", file=sys.stderr)
    return {"device": device.name, "runtime": device.runtime, "ceilings": ceiling, "command": shlex.join(sys.argv),
            "options": {key: getattr(args, key) for key in ("kv", "repack", "mmap", "decode")} | {"repeats": args.repeats},
            "models": [{"name": model.name, "file_bytes": model.path.stat().st_size, "decode_bytes": model.decode_bytes,
                        "prompt_flops_512": model.prompt_flops(512)} for model in models], "rows": rows, "touched": touched}

# ----------------------------------------------------------------------------------------------------------------------
# What a person reads: tables, and two pictures


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) if n == 0 else cell.rjust(width)
                                       for n, (cell, width) in enumerate(zip(line, widths))) + " |" for line in lines)


def report(result: dict) -> str:
    """The measurements as Markdown tables, every figure with its ceiling."""
    top, options, rows = result["ceilings"], result["options"], result["rows"]
    kind = f"weights {'' if options['repack'] else 'not '}repacked, {'' if options['mmap'] else 'not '}mmapped"
    parts = [f"{result['device']}, {result['runtime']}; KV cache {options['kv']}, {kind}",
             f"medians of {options['repeats']}, in brackets (max - min) / median",
             f"ceilings measured in this run: {top['bandwidth'] / 1e9:.1f} GB/s read, {top['int8'] / 1e9:.0f} GOP/s INT8, "
             f"{top['fp32'] / 1e9:.0f} GFLOP/s FP32", ""]

    def rate(row, name):
        return [f"{row[name]:.1f} ({100 * row['spread'][name]:.0f} %)", f"{100 * row[name] / row[name + '_ceiling']:.0f} %"]
    cells = [[row["model"], f"{row['prompt_tokens']}", f"{row['load_s']:.2f}", f"{row['ttft_s']:.2f}", *rate(row, "prefill"),
              f"{row['prompt_flops'] / 1e9:.2f}", *rate(row, "decode"), f"{row['decode_bytes'] / 1e6:.0f}"] for row in rows]
    parts.append(table(["model", "prompt", "load s", "first token s", "prefill tok/s", "of ceiling", "GFLOP/token",
                        "decode tok/s", "of ceiling", "MB/token"], cells))
    names = list(dict.fromkeys(row["model"] for row in rows))
    if len(names) == 2:
        mine, other = ([row for row in rows if row["model"] == name] for name in names)
        cells = [[f"{a['prompt_tokens']} tokens", *(f"{a[k] / b[k]:.2f}x" for k in ("prefill", "decode", "ttft_s", "peak"))]
                 for a, b in zip(mine, other)]
        parts += ["", table([f"{names[0]} / {names[1]}", "prefill", "decode", "first token s", "peak memory"], cells)]
    keys = list(rows[0]["predicted"])
    cells = []
    for row in rows:
        predicted, measured = row["predicted"], row["measured"]
        total = sum(predicted.values())
        cells.append([row["model"], f"{row['prompt_tokens']}",
                      *(f"{predicted[k] / 1e6:.0f} / {measured[k] / 1e6:.0f}" for k in keys),
                      f"{total / 1e6:.0f} / {row['peak'] / 1e6:.0f}", f"{100 * (total / row['peak'] - 1):+.0f} %"])
    parts += ["", "Peak memory in MB, predicted / measured:", "", table(["model", "prompt", *keys, "peak", "off by"], cells)]
    if result["touched"]:
        dummy = {t["model"]: t["bytes"] for t in result["touched"] if t["prompt"] == DUMMY}
        cells = [[t["model"], t["prompt"], f"{t['tokens']}", f"{t['bytes'] / 1e6:.1f}",
                  f"{t['bytes'] / dummy[t['model']]:.2f}x"] for t in result["touched"]]
        parts += ["", f"Weights touched by a prompt (file mapped, not repacked), and against {DUMMY}:", "",
                  table(["model", "prompt", "tokens", "MB", "ratio"], cells)]
    if result["runtime"] != BENCH:
        first, decode = (100 * max(row["clocks"][n] for row in rows) for n in (0, 1))
        parts += ["", f"Our clock and llama.cpp's timings of the same requests differ by at most {first:.1f} % (first token) "
                      f"and {decode:.1f} % (decode)."]
    return "\n".join(parts)


def draw(result: dict, base: Path):
    """BASE-speed.png: tokens per second against context. BASE-memory.png: what fills the memory, against 5 GB."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = result["rows"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, what in zip(axes, ("prefill", "decode")):
        for name, color in zip(names, ("tab:blue", "tab:orange")):
            mine = [row for row in rows if row["model"] == name]
            axis.plot([r["context"] for r in mine], [r[what] for r in mine], "o-", color=color, label=name)
            axis.plot([r["context"] for r in mine], [r[what + "_ceiling"] for r in mine], ":", color=color, label="its ceiling")
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=f"{what}, tokens per second")
        axis.set_xticks(ticks := sorted({row["context"] for row in rows}), [str(tick) for tick in ticks], minor=False)
        axis.minorticks_off()
        axis.legend()
        axis.grid(alpha=0.3)
    with atomic_write(f"{base}-speed.png") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    figure, axis = plt.subplots(figsize=(max(6, 1.2 * len(rows)), 4.5), layout="constrained")
    bottom = [0.0] * len(rows)
    for part in rows[0]["measured"]:
        heights = [max(0, row["measured"][part]) / 1e9 for row in rows]
        axis.bar(range(len(rows)), heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights)]
    axis.plot(range(len(rows)), [sum(row["predicted"].values()) / 1e9 for row in rows], "k_", ms=22, label="predicted")
    axis.axhline(BUDGET / 1e9, color="black", ls=":", label="a phone's 5 GB")
    axis.set_xticks(range(len(rows)), [f"{row['model']}\n{row['context']}" for row in rows])
    axis.set(ylabel="GB, peak resident")
    axis.legend()
    with atomic_write(f"{base}-memory.png") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def read_arguments():
    parser = argparse.ArgumentParser(description="Measure speed and memory of a .gguf file on this computer or a phone.")
    parser.add_argument("model", nargs="?", help="a .gguf file that export_mobile.py wrote")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME",
                        help=f"random weights of a known shape instead: {', '.join(PRESETS)}; the file is kept in --cache")
    parser.add_argument("--versus", metavar="NAME", help="a second preset or .gguf, measured in turns with the first")
    parser.add_argument("--contexts", metavar="LIST", help="prompt lengths in tokens (512,1k,2k,4k as far as the file allows)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (%(default)s)")
    parser.add_argument("--decode", type=int, default=32, help="tokens generated after the prompt (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="(one for each core chosen)")
    parser.add_argument("--cores", help="all, big, or numbers such as 4-7 (here all, on a phone big)")
    parser.add_argument("--kv", choices=KV_BITS, default="f16", help="type of the KV cache (%(default)s); int8 is the paper's")
    parser.add_argument("--no-repack", dest="repack", action="store_false",
                        help="use the weights as stored: slower, but no second copy in memory")
    parser.add_argument("--no-mmap", dest="mmap", action="store_false", help="read the file into memory instead of mapping it")
    parser.add_argument("--adb", action="store_true", help="measure on the Android phone that adb reaches")
    parser.add_argument("--serial", help="which phone, if there are several (adb devices lists them)")
    parser.add_argument("--llama-bin", metavar="DIR",
                        help=f"folder with an Android {BENCH} and its libraries, to push (default: what the phone has)")
    parser.add_argument("--out", default="runs/profile", help="folder for the .json and the pictures (%(default)s)")
    parser.add_argument("--cache", default="runs/profile", help="folder for files of presets (%(default)s)")
    args = parser.parse_args()
    if bool(args.model) == bool(args.preset):
        raise UserError("name either a .gguf file or a --preset")
    if args.repeats < 1 or args.decode < 2 or args.threads < 0:
        raise UserError("--repeats must be at least 1, --decode at least 2, --threads not negative")
    if not args.adb and (args.serial or args.llama_bin):
        raise UserError("--serial and --llama-bin are about a phone: add --adb")
    return args


def main():
    args = read_arguments()
    cache = Path(args.cache)
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        device = Phone(args) if args.adb else Desk(args)        # before a gigabyte is written: is there a device?
        models = [open_model(what, cache) for what in (args.model or args.preset, args.versus) if what]
        if len(models) == 2 and models[0].name == models[1].name:
            raise UserError(f"--versus {args.versus}: that is the same name as the first model's")
        contexts = contexts_for(models, args.contexts)
        if args.adb:
            stack.enter_context(device)
        result = profile(device, models, contexts, args)
    print(report(result))
    Path(args.out).mkdir(parents=True, exist_ok=True)
    base = Path(args.out) / "-vs-".join([model.name for model in models] + ["phone"] * args.adb)
    with atomic_write(f"{base}.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    try:
        draw(result, base)
        pictures = f", {base}-speed.png, {base}-memory.png"
    except ImportError:
        pictures = " (pip install matplotlib draws pictures, too)"
    print(f"\nwritten: {base}.json{pictures}")


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else run_main(main)
