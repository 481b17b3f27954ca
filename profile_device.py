"""What a .gguf file costs on a device: seconds, tokens per second and bytes, each beside what theory allows.

    python profile_device.py mobilemoe.gguf                              on this computer
    python profile_device.py --preset S --versus mobilellm-pro           released shapes, random weights, the paper's duel
    python profile_device.py --preset S --adb --llama-bin build/bin      on the Android phone on the cable

Measured at each context: load time, time to first token, prefill and decode tokens per second, peak resident memory, every
measurement in a fresh process, two models in turns so that neither has the cool processor to itself. Then the memory that real
text and one repeated token touch: a mixture reads only the experts that a prompt asks for, and a dummy prompt asks for few.

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
import json
import math
import os
import re
import select
import shlex
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import timeit
import urllib.request
from pathlib import Path

if sys.argv[1:] != ["--child"]:         # PyTorch alone is 200 MB: a process that measures memory must not carry it
    import torch

    from data import embedded_corpus
    from export_mobile import BLOCK, Q4_0, export, export_preset, placeholder_tokenizer, state_shapes
    from mobilemoe import PRESETS, Config, UserError, atomic_write, run_main

UBATCH = 512                    # prompt tokens that llama.cpp takes through the layers together
DECODE = 128                     # tokens generated after each prompt
DUMMY = "one token repeated"
KV_BITS = {"f16": 16, "int8": 8.5}          # Q8_0 is 32 integers and an FP16 scale: equation 5's 8 bits are 8.5 in a file
BUDGET = 5e9                    # the paper's phone: what an app may take

# ----------------------------------------------------------------------------------------------------------------------
# Theory: everything follows from the keys and tensors that the file lists


class Model:
    """A .gguf file that export_mobile.py wrote, as far as theory needs it. Raises UserError if it is something else."""

    def __init__(self, path: Path):
        self.path, self.name = path, path.stem
        try:
            keys, tensors = read_header(path)
            get = {key.partition(".")[2]: value for key, value in keys.items()}.get
            self.d_model, self.layers, self.context = get("embedding_length"), get("block_count"), get("context_length")
            self.heads, self.kv_heads = get("attention.head_count"), get("attention.head_count_kv")
            self.d_head, self.vocab = get("attention.key_length"), get("vocab_size")
            experts, used = get("expert_count", 1), get("expert_used_count", 1)
            # Floats of feed-forward that a token needs at once: gate and up of A experts, and a mixture's A outputs.
            width = get("expert_feed_forward_length", get("feed_forward_length"))
            self.hidden = used * (2 * width + (self.d_model if experts > 1 else 0))
            count = {name: math.prod(dims) for name, dims, _ in tensors}
            size = {name: count[name] * BLOCK[kind][1] // BLOCK[kind][0] for name, _, kind in tensors}
            share = {name: used / experts if "_exps." in name else 1 for name in count}
            self.weight_bytes = sum(size.values())
            self.q4_bytes = sum(size[name] for name, _, kind in tensors if kind == Q4_0)   # what a runtime that repacks copies
            # Embeddings are looked up as stored, so their bytes stay beside the repacked copy, which the output layer reads.
            self.embedding_bytes = size["token_embd.weight"]
            self.decode_bytes = sum(share[name] * size[name] for name in size)      # A of E experts, everything else once
            self.prompt_params = sum(share[name] * count[name] for name in count if name != "token_embd.weight")
        except (struct.error, KeyError, UnicodeDecodeError, ValueError, TypeError):
            raise UserError(f"{path} is not a .gguf file that export_mobile.py wrote, or not all of it") from None

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


def read_header(path: Path) -> tuple[dict, list[tuple[str, tuple[int, ...], int]]]:
    """Key/value pairs (arrays are skipped) and (name, dimensions, type) of every tensor; export_mobile.py has the format."""
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    with open(path, "rb") as file:
        def take(layout: str) -> tuple:
            return struct.unpack("<" + layout, file.read(struct.calcsize("<" + layout)))

        def string() -> str:
            return file.read(take("Q")[0]).decode()

        def value(kind: int):
            if kind == 8:
                return string()
            if kind != 9:
                return take(scalars[kind])[0]
            inner, length = take("IQ")
            for _ in range(length if inner == 8 else 1):        # strings one by one, numbers all at once
                file.seek(take("Q")[0] if inner == 8 else length * struct.calcsize(scalars[inner]), os.SEEK_CUR)

        if file.read(4) != b"GGUF":
            raise ValueError
        _, n_tensors, n_keys = take("IQQ")
        keys = {string(): value(take("I")[0]) for _ in range(n_keys)}
        tensors = [(string(), take(f"{take('I')[0]}Q"), take("IQ")[0]) for _ in range(n_tensors)]
    return keys, tensors

# ----------------------------------------------------------------------------------------------------------------------
# The child: one process, one measurement


def child():
    """Answer the order on stdin with JSON on stdout; llama.cpp's log goes to stderr, whatever it prefers."""
    order = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = {"ceilings": ceilings, "tokenize": tokenize, "measure": measure}[order["do"]](order)
    with answer:
        json.dump(result, answer)


def ceilings(order: dict) -> dict:
    """What this device can do at best: bytes read per second, INT8 and FP32 operations per second (best of 5)."""
    import torch
    torch.set_num_threads(order["threads"])

    def best(work) -> float:
        return min(timeit.repeat(work, number=1, repeat=6)[1:])         # the first one allocates and builds kernels
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
    return {"ids": ids, "texts": {name: post(server, "/detokenize", tokens=tokens)["content"] for name, tokens in ids.items()}}


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
    arrivals, replies = [], []

    def arrived(chunk: dict):
        arrivals.append(time.perf_counter())
        replies.append(chunk)
    asked = time.perf_counter()
    server.handle_completions({"prompt": order["prompt"], "n_predict": order["decode"], "temperature": 0, "stream": True,
                               "cache_prompt": False, "logit_bias": [[letter, 1e4] for letter in letters]}, arrived)
    for problem in (chunk["error"] for chunk in replies if "error" in chunk):
        raise RuntimeError(problem["message"])
    timings = next(chunk["timings"] for chunk in replies if "timings" in chunk)
    return {"load_s": loaded - start, "ttft_s": arrivals[0] - asked, "decode_s": arrivals[-1] - arrivals[0],
            "prompt_n": timings["prompt_n"], "steps": timings["predicted_n"] - 1,       # the first token comes with the prompt
            "llama_prompt_s": timings["prompt_ms"] / 1e3, "llama_decode_s": timings["predicted_ms"] / 1e3,
            "runtime": runtime, "peak": memory_now("VmHWM"),
            "mapped": sum(size for *_, size in mapped_file(order["path"])) if sys.platform == "linux" else None}

# ----------------------------------------------------------------------------------------------------------------------
# This computer


class Desk:
    """llama.cpp in child processes of this script."""

    def __init__(self, args):
        try:
            self.runtime = f"xllamacpp {importlib.metadata.version('xllamacpp')}"
        except importlib.metadata.PackageNotFoundError:
            raise UserError("measuring needs llama.cpp: pip install xllamacpp") from None
        self.args = args
        self.threads = args.threads or (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
        info = Path("/proc/cpuinfo")
        processor = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
        self.name = f"{processor[1] if processor else os.uname().machine}, {self.threads} threads"

    def ask(self, do: str, **order) -> dict:
        """One order to one fresh child, which is gone when this returns, whatever happens."""
        order = {"do": do, "threads": self.threads, "kv": self.args.kv, "repack": self.args.repack, "mmap": self.args.mmap,
                 "touch": False} | order
        with subprocess.Popen([sys.executable, __file__, "--child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, text=True, errors="replace") as process:
            try:
                out, log = process.communicate(json.dumps(order))
            finally:
                process.kill()
        if process.returncode == -signal.SIGKILL:
            raise UserError(f"{order.get('path', do)}: the system killed the measuring process, most likely for lack of memory")
        if process.returncode:
            lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no word from it"]
            said = [line for line in lines if " E " in line] or lines           # llama.cpp marks its errors so
            raise UserError(f"llama.cpp failed with {order.get('path', do)}: {said[-1][-200:]}")
        return json.loads(out) | (buffers(log) if do == "measure" else {})

    def ceilings(self) -> dict:
        return self.ask("ceilings")

    def prompts(self, model: Model, texts: dict[str, str], length: int) -> dict:
        return self.ask("tokenize", path=str(model.path), n_ctx=256, texts=texts, length=length, repack=False)

    def measure(self, model: Model, tokens: int, prompts: dict) -> dict:
        prompt = next(iter(prompts["ids"].values()))[:tokens]
        answer = self.ask("measure", path=str(model.path), n_ctx=len(prompt) + DECODE, prompt=prompt, decode=DECODE)
        if self.args.mmap and answer["mapped"] is not None:
            answer["weights"] = answer["mapped"]        # the log names the file's whole size, resident or not
        return answer

    def touched(self, model: Model, prompt: list[int]) -> float:
        """Bytes of the file that a prompt makes resident: mapped, not repacked."""
        return self.ask("measure", path=str(model.path), n_ctx=len(prompt) + 8, prompt=prompt, decode=1, mmap=True,
                        repack=False, touch=True)["mapped"]


def buffers(log: str) -> dict[str, float]:
    """Bytes of the buffers that llama.cpp's log lists, by part of the memory."""
    parts = {"weights": "CPU(?:_Mapped)? model", "repacked copy": "REPACK model", "KV cache": "KV",
             "compute buffers": "(?:compute|output)"}
    return {part: 2**20 * sum(map(float, re.findall(rf"{pattern} buffer size\s*=\s*([\d.]+) MiB", log)))
            for part, pattern in parts.items()}

# ----------------------------------------------------------------------------------------------------------------------
# A phone

BENCH = "llama-completion"
PHONE_FOLDER = "/data/local/tmp/mobilemoe-profile"      # the one place where adb may write *and* execute
TERMUX = "/data/data/com.termux/files/usr"              # only `run-as com.termux` may enter
PATIENCE = 30                   # seconds without a word after which a phone counts as gone
# Ends what runs on the phone (its number is in `pid`, how to end it in `kill`) and removes all we put there.
CLEAN = f"[ -f {PHONE_FOLDER}/pid ] && $(cat {PHONE_FOLDER}/kill) $(cat {PHONE_FOLDER}/pid) 2>/dev/null; rm -rf {PHONE_FOLDER}"


def adb(*command: str, extra: float = 0) -> tuple[int | None, str]:
    """Run one adb command -> (exit code, output); the code is None after PATIENCE + `extra` seconds without a word."""
    with subprocess.Popen(["adb", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            said = b""
            while select.select([process.stdout], [], [], PATIENCE + extra)[0]:
                if not (piece := os.read(process.stdout.fileno(), 2**16)):
                    return process.wait(), said.decode(errors="replace")
                said += piece
            return None, ""
        finally:
            process.kill()


class Phone:
    """llama-completion on an Android phone, through adb."""

    def __init__(self, args):
        self.args, self.serial, self.runtime, self.pushed = args, choose_phone(args.serial), BENCH, {}
        listing = self.shell('cd /sys/devices/system/cpu; for c in cpu[0-9]*; do '
                             'echo "${c#cpu} $(cat $c/cpufreq/cpuinfo_max_freq 2>/dev/null || echo 0)"; done')
        speed = {int(core): int(hertz) for core, hertz in re.findall(r"^(\d+) (\d+)\s*$", listing, re.M)}
        faster = [core for core in speed if speed[core] > min(speed.values())] if args.cores == "big" else []
        self.cores = faster or sorted(speed)            # where all are alike, all are big
        self.threads = args.threads or len(self.cores)
        product = self.shell("getprop ro.product.model").strip()
        self.name = f"{product}, {self.threads} threads on cores {', '.join(map(str, self.cores))}"

    def ask(self, *command: str, doing: str, extra: float = 0) -> str:
        """One adb command's output. Raises UserError: the phone went away, it is full, or what it said."""
        code, said = adb("-s", self.serial, *command, extra=extra)
        if code == 0:
            return said
        if code is None or adb("-s", self.serial, "get-state")[1].strip() != "device":
            raise UserError(f"phone {self.serial} dropped off while {doing}: check the cable and run this again")
        if "No space left" in said:
            raise UserError(f"phone {self.serial} has no space left while {doing}: free some")
        lines = [line.strip() for line in said.splitlines() if line.strip() and "VmHWM" not in line] or [f"exit code {code}"]
        raise UserError(f"phone {self.serial} failed while {doing}: {lines[-1][-200:]}")

    def shell(self, command: str, doing: str = "preparing") -> str:
        return self.ask("shell", command, doing=doing)

    @contextlib.contextmanager
    def connected(self):
        """A folder on the phone while this lasts; afterwards nothing of ours is there, in memory or on disk."""
        guard = None
        try:
            self.shell(f"{CLEAN}; mkdir -p {PHONE_FOLDER} && chmod 755 {PHONE_FOLDER}")
            # The guard is a shell on the phone that keeps talking. When the cable is pulled or this script dies, its next
            # word finds nobody: it ends llama.cpp and removes the folder. Nothing on this side could, once the cable is out.
            guard = subprocess.Popen(
                ["adb", "-s", self.serial, "shell", f"trap '{CLEAN}; exit' PIPE HUP TERM INT; "
                 f"while [ -d {PHONE_FOLDER} ]; do echo here || {{ {CLEAN}; exit; }}; sleep 1; done"],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            self.find_binary()
            yield self
        finally:
            adb("-s", self.serial, "shell", CLEAN)       # and if it cannot hear us any more, the guard does it
            if guard:
                guard.kill()
                guard.wait()

    def find_binary(self):
        """Push --llama-bin, or find what Termux has installed."""
        self.prefix, self.binary, self.libraries = "", f"{PHONE_FOLDER}/{BENCH}", PHONE_FOLDER
        if self.args.llama_bin:
            source = Path(self.args.llama_bin)
            if not (source / BENCH).is_file():
                raise UserError(f"--llama-bin {source}: there is no {BENCH} in it")
            for file in [source / BENCH, *sorted(source.glob("*.so*"))]:
                self.push(file)
        elif "yes" in self.shell(f"run-as com.termux test -x {TERMUX}/bin/{BENCH} && echo yes || true"):
            self.prefix, self.binary, self.libraries = "run-as com.termux ", f"{TERMUX}/bin/{BENCH}", f"{TERMUX}/lib"
        else:
            raise UserError(f"no {BENCH} on the phone: name a folder with one for Android (--llama-bin DIR), "
                            "or `pkg install llama-cpp` in Termux")

    def push(self, file: Path):
        """Copy a file into the phone's folder, once. adb says nothing until it has: a second per megabyte is a bad cable."""
        if self.pushed.get(file.name) != file:
            target = f"{PHONE_FOLDER}/{file.name}"
            self.ask("push", str(file), target, doing=f"receiving {file.name}", extra=file.stat().st_size / 1e6)
            self.shell(f"chmod 755 {shlex.quote(target)}")
            self.pushed[file.name] = file

    def run(self, model: Model, text: str, n_ctx: int, decode: int) -> dict:
        """One process on the phone: llama.cpp's own times, and the peak memory that /proc showed until it ended."""
        self.push(model.path)
        with tempfile.TemporaryDirectory() as folder:
            prompt = Path(folder) / "prompt.txt"
            prompt.write_text(text)
            self.push(prompt)
        options = ["-m", f"{PHONE_FOLDER}/{model.path.name}", "-f", f"{PHONE_FOLDER}/prompt.txt", "-c", n_ctx, "-n", decode,
                   "-t", self.threads, "-ub", UBATCH, "--temp", 0, "--ignore-eos", "--no-escape", "-no-cnv", "-ngl", 0,
                   "-lv", 4] + (["-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"] if self.args.kv == "int8" else [])
        options += ["--no-repack"] * (not self.args.repack) + ["--no-mmap"] * (not self.args.mmap)
        mask = sum(1 << core for core in self.cores)
        command = f"{self.prefix}taskset {mask:x} {self.binary} {shlex.join(map(str, options))}"
        # `run-as` and `taskset` become the program they start: $! is its number. The high-water mark only grows, so the last
        # look counts, a tenth of a second before the end at worst. A process that has ended has none: grep fails.
        log = self.shell(f"cd {PHONE_FOLDER}; export LD_LIBRARY_PATH={self.libraries}; echo '{self.prefix}kill -9' > kill; "
                         f"{command} </dev/null 2>&1 & pid=$!; echo $pid > pid; "
                         f"while {self.prefix}grep VmHWM /proc/$pid/status 2>/dev/null; do sleep 0.1; done; "
                         "wait $pid; code=$?; rm -f pid; exit $code", doing=f"running {model.name}")
        try:
            (load, _), (prompt, prompt_n), (decode, steps) = (
                re.findall(pattern + r" time =\s*([\d.]+) ms(?:\s*/\s*(\d+))?", log)[-1]
                for pattern in ("load", "prompt eval", "(?<!prompt )eval"))
            peak = 1024 * max(map(int, re.findall(r"VmHWM:\s+(\d+) kB", log)))
        except (IndexError, ValueError):
            raise UserError(f"phone {self.serial}: {BENCH} ended without its timings; try it by hand: {command}") from None
        prompt_s, decode_s = float(prompt) / 1e3, float(decode) / 1e3
        return {"load_s": float(load) / 1e3, "ttft_s": prompt_s, "decode_s": decode_s, "prompt_n": int(prompt_n),
                "steps": int(steps), "llama_prompt_s": prompt_s, "llama_decode_s": decode_s, "runtime": 0, "peak": peak,
                **buffers(log)}

    def ceilings(self) -> dict:
        """Nothing on a phone measures matrix products, but llama.cpp multiplies: a file that is almost one matrix does."""
        rates = {}
        for dtype, rate in (("q4_0", "int8"), ("f32", "fp32")):
            model = probe_file(Path(self.args.out), dtype)
            answer = self.run(model, "a" * 500, 1024, 16)
            rates[rate] = model.prompt_flops(answer["prompt_n"]) * answer["prompt_n"] / answer["ttft_s"]
        return rates | {"bandwidth": model.decode_bytes * answer["steps"] / answer["decode_s"]}    # of F32: no cache holds it

    def prompts(self, model: Model, texts: dict[str, str], length: int) -> dict:
        return Desk(self.args).prompts(model, texts, length)

    def measure(self, model: Model, tokens: int, prompts: dict) -> dict:
        text = next(iter(prompts["texts"].values()))
        text = text[:len(text) * tokens // len(next(iter(prompts["ids"].values())))]    # about: the answer says how many
        return self.run(model, text, min(model.context, tokens * 9 // 8 + DECODE), DECODE)


def probe_file(folder: Path, dtype: str) -> Model:
    """28M weights, nearly all of them in one feed-forward: what runs it fast multiplies fast."""
    config = Config(d_model=1024, n_layers=1, n_heads=16, n_kv_heads=4, d_ff=8192, vocab_size=512, max_context=2048,
                    n_experts=1, granularity=1, shared_expert=False)
    path, shapes = folder / f"probe-{dtype}.gguf", state_shapes(config)
    if not path.exists():
        export(config, lambda key: torch.ones(shapes[key]), placeholder_tokenizer(config.vocab_size), path, dtype)
    return Model(path)


def choose_phone(serial: str | None) -> str:
    if not shutil.which("adb"):
        raise UserError("no adb on this computer: install Android's platform-tools (`apt install adb`)")
    code, said = adb("devices")
    if code != 0:
        raise UserError(f"adb devices failed: {(said.strip() or 'no answer').splitlines()[-1]}")
    phones = dict(re.findall(r"^(\S+)\t(\w+)", said, re.M))
    if not phones:
        raise UserError("no phone: connect one by cable and allow USB debugging in its developer options")
    if not serial and len(phones) > 1:
        raise UserError(f"more than one phone ({', '.join(phones)}): choose with --serial")
    serial = serial or next(iter(phones))
    if serial not in phones:
        raise UserError(f"no phone {serial}: adb sees {', '.join(phones)}")
    if phones[serial] != "device":
        raise UserError(f"phone {serial} is {phones[serial]}: unlock it and allow USB debugging")
    return serial

# ----------------------------------------------------------------------------------------------------------------------
# The run: files, prompts, repeats


def open_model(what: str, folder: Path) -> Model:
    """A .gguf file, or a preset: random weights in that shape, written once, a tensor at a time; speed asks no more."""
    if what in PRESETS:
        path = folder / f"{what}.gguf"
        if not path.exists():
            print(export_preset(what, path))
        return Model(path)
    if not Path(what).is_file():
        raise UserError(f"no file {what}, and no preset of that name ({', '.join(PRESETS)})")
    return Model(Path(what))


def profile(device, models: list[Model], contexts: list[int], args) -> dict:
    """All measurements. The models take turns within each repeat: what slows the device slows both."""
    ceiling = device.ceilings()
    # The beginning of each domain of the embedded corpus, ASCII only so that cutting it cuts no character.
    texts = {domain: "\n".join(documents)[:16 * max(contexts)].encode("ascii", "ignore").decode()[:8 * max(contexts)]
             for domain, documents in embedded_corpus().train.items()}
    prompts = {model.name: device.prompts(model, texts, max(contexts)) for model in models}
    answers = {(model.name, context): [] for model in models for context in contexts}
    jobs = [(context, model) for _ in range(args.repeats) for context in contexts for model in models]
    start, done = time.perf_counter(), 0
    for number, (context, model) in enumerate(jobs, 1):
        tokens = min(context, model.context - DECODE - 1)       # 8k on a file of 8k: the reply needs room, too
        answers[model.name, context].append(answer := device.measure(model, tokens, prompts[model.name]))
        done += context
        left = (time.perf_counter() - start) * (sum(context for context, _ in jobs) / done - 1)
        print(f"{number:3} of {len(jobs)}: {model.name}, {tokens} tokens: prefill {answer['prompt_n'] / answer['ttft_s']:.1f}, "
              f"decode {answer['steps'] / answer['decode_s']:.1f} tok/s; {left / 60:.1f} min left", file=sys.stderr)
    rows = [summarise(model, context, answers[model.name, context], ceiling, args) for model in models for context in contexts]
    touched = []
    for model in models if not args.adb and sys.platform == "linux" else []:
        ids = {domain: tokens[:min(contexts)] for domain, tokens in prompts[model.name]["ids"].items()}
        for domain, prompt in (ids | {DUMMY: min(contexts) * next(iter(ids.values()))[:1]}).items():
            touched.append({"model": model.name, "prompt": domain, "tokens": len(prompt),
                            "bytes": device.touched(model, prompt)})
    return {"device": device.name, "runtime": device.runtime, "ceilings": ceiling, "command": shlex.join(sys.argv),
            "options": {"kv": args.kv, "repack": args.repack, "mmap": args.mmap, "decode": DECODE, "repeats": args.repeats},
            "models": [{"name": model.name, "file_bytes": model.path.stat().st_size, "decode_bytes": model.decode_bytes,
                        "prompt_flops_512": model.prompt_flops(512)} for model in models], "rows": rows, "touched": touched}


def summarise(model: Model, context: int, answers: list[dict], ceiling: dict, args) -> dict:
    """Medians, spread ((largest - smallest) / median), ceilings, and memory part by part, from the repeats of one cell."""
    first = answers[0]
    window = first["prompt_n"] + DECODE
    values = {"load_s": [a["load_s"] for a in answers], "ttft_s": [a["ttft_s"] for a in answers],
              "prefill": [a["prompt_n"] / a["ttft_s"] for a in answers],
              "decode": [a["steps"] / a["decode_s"] for a in answers], "peak": [a["peak"] for a in answers]}
    row = {"model": model.name, "context": context, "prompt_tokens": first["prompt_n"], "repeats": answers,
           **{name: statistics.median(found) for name, found in values.items()},
           "spread": {name: (max(found) - min(found)) / statistics.median(found) for name, found in values.items()},
           "decode_bytes": model.decode_bytes + model.kv_bytes(window, args.kv),
           "prompt_flops": model.prompt_flops(first["prompt_n"]),
           "predicted": model.memory(window, args.kv, args.repack, args.mmap, first["runtime"]),
           "measured": {part: first[part] for part in ("weights", "repacked copy", "KV cache", "compute buffers")},
           "clocks": [max(abs(a[ours] / a[theirs] - 1) for a in answers)
                      for ours, theirs in (("ttft_s", "llama_prompt_s"), ("decode_s", "llama_decode_s"))]}
    row["measured"]["runtime and vocabulary"] = row["peak"] - sum(row["measured"].values())
    return row | {"decode_ceiling": ceiling["bandwidth"] / row["decode_bytes"],
                  "prefill_ceiling": ceiling["int8"] / row["prompt_flops"]}

# ----------------------------------------------------------------------------------------------------------------------
# What a person reads: tables, and two pictures


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |"
                     for line in lines)


def report(result: dict) -> str:
    """The measurements as Markdown tables, every figure with its ceiling."""
    top, options, rows = result["ceilings"], result["options"], result["rows"]
    parts = [f"{result['device']}, {result['runtime']}; KV cache {options['kv']}, weights "
             f"{'' if options['repack'] else 'not '}repacked, {'' if options['mmap'] else 'not '}mmapped\n"
             f"medians of {options['repeats']}, in brackets (max - min) / median\n"
             f"ceilings measured in this run: {top['bandwidth'] / 1e9:.1f} GB/s read, {top['int8'] / 1e9:.0f} GOP/s INT8, "
             f"{top['fp32'] / 1e9:.0f} GFLOP/s FP32"]

    def rate(row: dict, name: str) -> list[str]:
        return [f"{row[name]:.1f} ({100 * row['spread'][name]:.0f} %)", f"{100 * row[name] / row[name + '_ceiling']:.0f} %"]
    parts.append(table(
        ["model", "prompt", "load s", "first token s", "prefill tok/s", "of ceiling", "GFLOP/token", "decode tok/s",
         "of ceiling", "MB/token"],
        [[row["model"], str(row["prompt_tokens"]), f"{row['load_s']:.2f}", f"{row['ttft_s']:.2f}", *rate(row, "prefill"),
          f"{row['prompt_flops'] / 1e9:.2f}", *rate(row, "decode"), f"{row['decode_bytes'] / 1e6:.0f}"] for row in rows]))
    names = list(dict.fromkeys(row["model"] for row in rows))
    if len(names) == 2:
        pairs = zip(*([row for row in rows if row["model"] == name] for name in names))
        parts.append(table([" / ".join(names), "prefill", "decode", "first token s", "peak memory"],
                           [[f"{mine['prompt_tokens']} tokens",
                             *(f"{mine[key] / other[key]:.2f}x" for key in ("prefill", "decode", "ttft_s", "peak"))]
                            for mine, other in pairs]))
    keys, cells = list(rows[0]["predicted"]), []
    for row in rows:
        pairs = [*((row["predicted"][key], row["measured"][key]) for key in keys),
                 (sum(row["predicted"].values()), row["peak"])]
        cells.append([row["model"], str(row["prompt_tokens"]), *(f"{ours / 1e6:.0f} / {its / 1e6:.0f}" for ours, its in pairs),
                      f"{100 * (pairs[-1][0] / pairs[-1][1] - 1):+.0f} %"])
    parts += ["Peak memory in MB, predicted / measured:", table(["model", "prompt", *keys, "peak", "off by"], cells)]
    if result["touched"]:
        dummy = {t["model"]: t["bytes"] for t in result["touched"] if t["prompt"] == DUMMY}
        parts += [f"Weights touched by a prompt (file mapped, not repacked), and against {DUMMY}:",
                  table(["model", "prompt", "tokens", "MB", "ratio"],
                        [[t["model"], t["prompt"], str(t["tokens"]), f"{t['bytes'] / 1e6:.1f}",
                          f"{t['bytes'] / dummy[t['model']]:.2f}x"] for t in result["touched"]])]
    if result["runtime"] != BENCH:
        first, decode = (100 * max(clocks) for clocks in zip(*(row["clocks"] for row in rows)))
        parts.append(f"Our clock and llama.cpp's timings of the same requests differ by at most {first:.1f} % (first token) "
                     f"and {decode:.1f} % (decode).")
    return "\n\n".join(parts)


def draw(result: dict, base: Path):
    """BASE-speed.png: tokens per second against context. BASE-memory.png: what fills the memory, against 5 GB."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = result["rows"]
    ticks = sorted({row["context"] for row in rows})
    speed, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, what in zip(axes, ("prefill", "decode")):
        for name, color in zip(dict.fromkeys(row["model"] for row in rows), ("tab:blue", "tab:orange")):
            mine = [row for row in rows if row["model"] == name]
            axis.plot([r["context"] for r in mine], [r[what + "_ceiling"] for r in mine], ":", color=color,
                      label=f"{name}: ceiling")
            axis.plot([r["context"] for r in mine], [r[what] for r in mine], "o-", color=color, label=name)
            for r in mine:
                axis.annotate(f"{r[what]:.3g}", (r["context"], r[what]), (0, -15), textcoords="offset points", ha="center")
        axis.set(xscale="log", yscale="log", xlabel="tokens of context", title=f"{what}, tokens per second")
        axis.set_xticks(ticks, map(str, ticks))
        axis.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.margins(0.08, 0.12)
        axis.grid(alpha=0.3)
    speed.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    memory, axis = plt.subplots(figsize=(4 + 0.9 * len(rows), 4.5), layout="constrained")
    places, bottom = range(len(rows)), [0.0] * len(rows)
    for part in rows[0]["measured"]:
        heights = [max(0, row["measured"][part]) / 1e9 for row in rows]
        axis.bar(places, heights, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights)]
    axis.plot(places, [sum(row["predicted"].values()) / 1e9 for row in rows], "k_", ms=22, label="predicted")
    axis.axhline(BUDGET / 1e9, color="black", ls=":", label="a phone's 5 GB")
    axis.set_xticks(places, [f"{row['model']}\n{row['context']}" for row in rows], fontsize="small")
    axis.set(ylabel="GB", title="peak resident memory, by tokens of context")
    memory.legend(loc="outside right upper", reverse=True)
    for figure, name in ((speed, "speed"), (memory, "memory")):
        with atomic_write(f"{base}-{name}.png") as file:
            figure.savefig(file, dpi=110, format="png")
        plt.close(figure)

# ----------------------------------------------------------------------------------------------------------------------
# Command line


def read_arguments():
    parser = argparse.ArgumentParser(description="Measure speed and memory of a .gguf file on this computer or a phone.")
    parser.add_argument("model", nargs="?", help="a .gguf file that export_mobile.py wrote")
    parser.add_argument("--preset", choices=PRESETS, metavar="NAME",
                        help=f"random weights of a known shape instead: {', '.join(PRESETS)}; the file is kept in --out")
    parser.add_argument("--versus", metavar="NAME", help="a second preset or .gguf, measured in turns with the first")
    parser.add_argument("--contexts", type=int, nargs="+", metavar="N",
                        help="prompt lengths in tokens (512 1024 2048 4096, as far as the file allows)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="(one for each core; on a phone, for each of --cores)")
    parser.add_argument("--kv", choices=KV_BITS, default="f16", help="type of the KV cache (%(default)s); int8 is the paper's")
    parser.add_argument("--no-repack", dest="repack", action="store_false",
                        help="use the weights as stored: slower, but no second copy in memory")
    parser.add_argument("--no-mmap", dest="mmap", action="store_false", help="read the file into memory instead of mapping it")
    parser.add_argument("--out", default="runs/profile", help="folder for .json, pictures, files of presets (%(default)s)")
    phone = parser.add_argument_group("on an Android phone")
    phone.add_argument("--adb", action="store_true", help="measure on the phone that adb reaches")
    phone.add_argument("--serial", help="which phone, if there are several (adb devices lists them)")
    phone.add_argument("--cores", choices=("big", "all"), default="big", help="big: faster than the slowest (%(default)s)")
    phone.add_argument("--llama-bin", metavar="DIR",
                       help=f"folder with an Android {BENCH} and its libraries, to push (default: what the phone has)")
    args = parser.parse_args()
    if bool(args.model) == bool(args.preset):
        raise UserError("name either a .gguf file or a --preset")
    if args.repeats < 1 or args.threads < 0:
        raise UserError("--repeats must be at least 1, --threads not negative")
    if not args.adb and (args.serial or args.llama_bin):
        raise UserError("--serial and --llama-bin are about a phone: add --adb")
    return args


def main():
    args = read_arguments()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    device = Phone(args) if args.adb else Desk(args)            # before a gigabyte is written: is there a device?
    models = [open_model(what, out) for what in (args.model or args.preset, args.versus) if what]
    if len(models) == 2 and models[0].name == models[1].name:
        raise UserError(f"--versus {args.versus}: that is the same name as the first model's")
    limit = min(model.context for model in models)
    contexts = args.contexts or [context for context in (512, 1024, 2048, 4096) if context <= limit] or [limit]
    if not 32 <= min(contexts) <= max(contexts) <= limit:
        raise UserError(f"--contexts {min(contexts)} to {max(contexts)}: these files allow 32 to {limit} tokens")
    with device.connected() if args.adb else contextlib.nullcontext():
        result = profile(device, models, contexts, args)
    print(report(result))
    base = out / "-vs-".join([model.name for model in models] + ["phone"] * args.adb)
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
