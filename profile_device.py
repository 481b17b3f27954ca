"""What a .gguf file costs on a device: seconds, tokens per second and bytes, each beside what theory allows.

    python profile_device.py mobilemoe.gguf                              on this computer
    python profile_device.py --preset S --versus mobilellm-pro           the paper's duel, with random weights
    python profile_device.py --preset S --adb --llama-bin build/bin      on the Android phone on the cable

It measures, at each context: load time, time to the first token, prefill and decode in tokens per second, and
peak memory. Every measurement has a process of its own. Two models take turns, so that neither has the cool
processor to itself. Then it measures how much of the weights real text touches, and one repeated token: a
mixture reads only the experts that a prompt asks for, and a dummy prompt asks for few.

Theory is short. A decoded token reads every active weight and the whole KV cache once, so memory bandwidth /
bytes is the ceiling of decoding. A prompt token is multiplied with every active weight, and hundreds of
tokens share one reading, so INT8 rate / FLOPs is the ceiling of prefill. Memory is the paper's equation 5
(weights and KV cache) and the runtime's repacked copy of the weights; everything else is work buffers, the
vocabulary, the runtime itself. The distance between a ceiling and a measurement is what an engineer can still
win.

What it is not: a test of the answers (lab/evaluate.py), or of ExecuTorch, which the paper measured. The
runtime is llama.cpp: the wheel `xllamacpp` on this computer, its program llama-completion on the phone.
"""
# What imports PyTorch is imported inside functions. A process that measures memory imports this file for
# `measure`, and PyTorch's 200 MB would be in every figure.
import contextlib
import ctypes
import json
import re
import shutil
import statistics
import subprocess
import timeit
from pathlib import Path

import common
from common import Parser, UserError, markdown_table, new_figure, number, run_main, save_figure

DECODE = 128                    # tokens generated after each prompt
KV_BITS = {"f16": 16, "int8": 8.5}          # int8 is llama.cpp's Q8_0: 32 integers and an FP16 scale
# The parts of the memory that theory predicts, and what llama.cpp's log calls them.
PARTS = {"weights": "CPU(?:_Mapped)? model", "repacked copy": "REPACK model", "KV cache": "KV"}

# ----------------------------------------------------------------------------------------------------------
# Theory


class Model:
    """A .gguf file that export_mobile.py wrote, and what theory says about it. Raises UserError for others.

    `what` may be a preset: random weights in that shape, written into `folder` once. Speed asks for no more.
    """

    def __init__(self, what: str | Path, folder: str = ""):
        from export_mobile import FILE_TYPE, PRESETS, Q4_0, Config, entry_bytes, export_preset, tensor_plan
        self.path = Path(folder, f"{what}.gguf") if what in PRESETS else Path(what)
        self.name = self.path.stem
        if what in PRESETS and not self.path.exists():
            print(export_preset(what, self.path), flush=True)
        try:                # the way back of export_mobile.model_metadata; RoPE and the like cost nothing
            with open(self.path, "rb") as file:
                # The sizes stand in front. Each is a ".", the rest of its key, 4 for uint32, and the number.
                found = re.findall(rb"\.([a-z_.]+)\x04\0\0\0(....)", file.read(4096), re.DOTALL)
            key = {name.decode(): int.from_bytes(value, "little") for name, value in found}
            d_ff, E = key["feed_forward_length"], key.get("expert_count", 1)
            g = d_ff // key.get("expert_feed_forward_length", d_ff)
            self.config = Config(           # of n_experts * g experts, a shared one takes the place of g/2
                n_experts=-(-E // g), shared_expert=E % g > 0, granularity=g, d_ff=d_ff,
                top_k=key.get("expert_used_count", 1), d_model=key["embedding_length"],
                n_layers=key["block_count"], n_heads=key["attention.head_count"],
                n_kv_heads=key["attention.head_count_kv"], d_head=key["attention.key_length"],
                vocab_size=key["vocab_size"], max_context=key["context_length"])
            kinds = {number: kind for kind, number in FILE_TYPE.items()}
            kinds = kinds[key["file_type"]], kinds[key["expert_file_type"]]    # of matrices and experts
        except (KeyError, OSError):
            raise UserError(f"{what} is neither a file by export_mobile.py nor one of {[*PRESETS]}") from None
        plan = tensor_plan(self.config, *kinds)
        size = {entry.name: entry_bytes(entry) for entry in plan}
        self.weight_bytes = sum(size.values())
        # A runtime that repacks copies the Q4_0 matrices into an order that suits the processor. It looks
        # embeddings up as they are stored, and multiplies with the copy of the same matrix at the output.
        self.q4_bytes = sum(size[entry.name] for entry in plan if entry.kind == Q4_0)
        self.embedding_bytes = size["token_embd.weight"]
        idle = 1 - self.config.active_routed / self.config.n_routed
        self.decode_bytes = self.weight_bytes - idle * sum(size[name] for name in size if "_exps." in name)

    def kv_bytes(self, tokens: int, kv: str) -> float:
        """Equation 5's second term. llama.cpp allocates keys and values in steps of 256 tokens."""
        return self.config.kv_bytes(-(-tokens // 256) * 256, KV_BITS[kv])

    def prompt_flops(self, tokens: int) -> float:
        """Per prompt token: a multiply and an add per active weight, and attention to half of the prompt."""
        c = self.config
        multiplied = c.active_params() - c.vocab_size * c.d_model          # only the last token needs logits
        return 2 * multiplied + 4 * c.n_layers * c.n_heads * c.d_head * tokens / 2

    def memory(self, tokens: int, args) -> dict[str, float]:
        """Predicted bytes by part for `tokens` of context: equation 5, and the copy."""
        copy = self.q4_bytes if args.repack else 0
        # What is mapped stays mapped. What is read and copied is dropped, except for the embedding.
        dropped = copy - self.embedding_bytes if copy and not args.mmap else 0
        return dict(zip(PARTS, (self.weight_bytes - dropped, copy, self.kv_bytes(tokens, args.kv))))


def ceilings(threads: int) -> dict[str, float]:
    """The best of this computer: bytes read per second, and INT8 operations per second in a matrix product.

    Measured by PyTorch, not by llama.cpp: a ceiling must not depend on the runtime that is held against it.
    """
    import torch
    torch.set_num_threads(threads)
    big = torch.ones(2**26)                                                # 268 MB: no cache holds it
    small = torch.ones(2048, 2048, dtype=torch.int8)
    works = (big.sum, lambda: torch._int_mm(small[:512], small))
    reading, multiplying = (min(timeit.repeat(work, number=1, repeat=6)) for work in works)        # seconds
    return {"bandwidth": 4 * len(big) / reading, "int8": 2 * 512 * 2048 * 2048 / multiplying}

# ----------------------------------------------------------------------------------------------------------
# One measurement, in a process of its own


def proc(name: str) -> str:
    """What Linux' /proc tells about this computer or this process; nothing on other systems."""
    path = Path("/proc", name)
    return path.read_text() if path.exists() else ""


def measure(order: dict) -> dict:
    """Load a file, read a prompt, generate. -> times by llama.cpp's clock, bytes by the system's count."""
    from xllamacpp import llama_load_mode
    start = timeit.default_timer()
    server = common.start_llama_cpp(
        order["path"], len(order["prompt"]) + order["decode"] + 1, order["threads"], order["kv"],
        load_mode=getattr(llama_load_mode, "LLAMA_LOAD_MODE_" + ("MMAP" if order["mmap"] else "NONE")),
        no_extra_bufts=not order["repack"], warmup=not order["touch"],     # a warm-up reads every expert
        fit_params=False, cache_ram_mib=0, n_ctx_checkpoints=0)            # no memory for later requests
    load_ms = 1e3 * (timeit.default_timer() - start)
    # Loading has touched the whole file. Let go of every page: what is there afterwards, the prompt has used.
    # (The kernel fetches 64 KB around each page that is asked for. An expert's matrix is larger.)
    for first, end, _ in mapped_file(order["path"]) if order["touch"] else []:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), 4)     # MADV_DONTNEED
    # Each token is drawn (temperature 1). The likeliest token of random weights is the one before: that would
    # be a dummy text again, one token repeated, and the same experts.
    times = server.handle_completions({
        "prompt": order["prompt"], "n_predict": order["decode"], "cache_prompt": False,
        "temperature": 1, "seed": 0, "ignore_eos": True})["timings"]
    return {"load_ms": load_ms, "prompt_ms": times["prompt_ms"], "prompt_n": times["prompt_n"],
            # The first token comes with the prompt.
            "decode_ms": times["predicted_ms"], "decode_n": times["predicted_n"] - 1,
            "status": proc("self/status"), "mapped": sum(size for *_, size in mapped_file(order["path"]))}


def mapped_file(path: str) -> list[tuple[int, int, int]]:
    """(start, end, resident bytes) of every mapping of the file in this process; nothing without Linux."""
    pattern = rf"^(\w+)-(\w+) .*{re.escape(str(Path(path).resolve()))}\n(?:.*\n)*?Rss:\s+(\d+)"
    found = re.findall(pattern, proc("self/smaps"), re.MULTILINE)
    return [(int(start, 16), int(end, 16), 1024 * int(kilobytes)) for start, end, kilobytes in found]


def figures(log: str, load_ms, prompt_ms, prompt_n, decode_ms, decode_n, status, mapped=0) -> dict:
    """A measurement as a reader wants it: seconds, tokens per second, and bytes by part of the memory.

    `status` has what Linux and Android say of a process, among it VmHWM, the most memory it ever had. Where
    there is no such thing (macOS, Windows), the peak is the sum of the parts in llama.cpp's log.
    """
    peak_kb = max(map(int, re.findall(r"VmHWM:\s+(\d+) kB", status)), default=0)
    parts = {part: 2**20 * sum(map(float, re.findall(rf"{name} buffer size\s*=\s*([\d.]+) MiB", log)))
             for part, name in PARTS.items()}
    parts["weights"] = mapped or parts["weights"]       # of a mapped file, the log has the size
    return {"tokens": int(prompt_n), "load": load_ms / 1e3, "first token": prompt_ms / 1e3,
            "prefill": 1e3 * prompt_n / prompt_ms, "decode": 1e3 * decode_n / decode_ms,
            "peak": 1024 * peak_kb or sum(parts.values()), "mapped": mapped, **parts}

# ----------------------------------------------------------------------------------------------------------
# Two devices


class Computer:
    """llama.cpp in processes of this computer. It gets a prompt as token ids, a phone gets the same text."""

    def __init__(self, args):
        self.args = args
        self.name = (re.findall(r"model name\s*: (.*)", proc("cpuinfo")) or ["this computer"])[0]

    def measure(self, model: Model, prompt: list[int], text: str, **more) -> dict:
        order = vars(self.args) | dict(path=str(model.path), prompt=prompt, decode=DECODE, touch=False) | more
        # A fresh process: the highest memory of one measurement must not hide that of the next.
        answer, log = common.in_fresh_process("profile_device.measure", order)
        return figures(log, **answer)


PROGRAM = "llama-completion"
FOLDER = "/data/local/tmp/mobilemoe-profile"            # on the phone: where adb may write *and* execute
TERMUX = "/data/data/com.termux/files/usr"              # only `run-as com.termux` may enter


class Phone:
    """llama-completion on an Android phone, through adb: push model and prompt, run, read the log."""

    def __init__(self, args):
        if not shutil.which("adb"):
            raise UserError("no adb on this computer: install Android's platform-tools (`apt install adb`)")
        self.args = args
        # adb says itself that it sees no phone, or several, or one that does not allow USB debugging.
        hint = " (connect one, or choose by --serial)"
        self.name = self.adb("shell", "getprop ro.product.model", hint=hint).strip()

    def adb(self, *command: str, hint: str = "", send: str = "") -> str:
        """The output of one adb command. Raises UserError with its last line if the command fails."""
        serial = ["-s", self.args.serial] if self.args.serial else []
        done = subprocess.run(["adb", *serial, *command], input=send, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, text=True, errors="replace")
        if done.returncode:
            lines = [line for line in done.stdout.splitlines() if line.strip() and "VmHWM" not in line]
            raise UserError(f"phone: {(lines or ['no word from it'])[-1].strip()}{hint}")
        return done.stdout

    @contextlib.contextmanager
    def ready(self, models: list[Model]):
        """As long as this lasts, the models are in a folder on the phone, and there is a llama.cpp to run."""
        here = self.args.llama_bin
        self.run_as = "" if here else "run-as com.termux"
        self.program = f"{FOLDER}/{PROGRAM}" if here else f"{TERMUX}/bin/{PROGRAM}"
        try:
            self.adb("shell", f"mkdir -p {FOLDER}")
            if here:
                self.adb("push", f"{here}/{PROGRAM}", *map(str, Path(here).glob("*.so*")), FOLDER)
            hint = " (give one by --llama-bin, or `pkg install llama-cpp` in Termux)"
            self.adb("shell", f"{self.run_as} ls {self.program}", hint=hint)
            self.adb("push", *(str(model.path) for model in models), FOLDER)
            yield
        finally:
            with contextlib.suppress(UserError):        # the phone may be gone
                self.adb("shell", f"rm -rf {FOLDER}")

    def measure(self, model: Model, prompt: list[int], text: str) -> dict:
        """`text` is `prompt`, but for a token or two: the result says how many the phone found."""
        self.adb("shell", f"cat > {FOLDER}/prompt; chmod -R 755 {FOLDER}", send=text)
        context = min(model.config.max_context, len(prompt) * 9 // 8 + DECODE)
        command = (f"{self.run_as} {self.program} -m '{FOLDER}/{model.path.name}' -f {FOLDER}/prompt "
                   f"-n {DECODE} -c {context} -t {self.args.threads} --temp 1 --seed 0 --ignore-eos -ngl 0 "
                   "-lv 4 --no-escape -no-cnv" + " -ctk q8_0 -ctv q8_0 -fa on" * (self.args.kv == "int8")
                   + " --no-repack" * (not self.args.repack) + " --no-mmap" * (not self.args.mmap))
        # `run-as` becomes the program it starts, so $! is its number. The most memory it ever had only grows:
        # the last look counts, a tenth of a second before the end at worst.
        look = f"while {self.run_as} grep VmHWM /proc/$pid/status 2>/dev/null; do sleep 0.1; done"
        log = self.adb("shell", f"export LD_LIBRARY_PATH={FOLDER}:{TERMUX}/lib; {command} </dev/null 2>&1 & "
                       f"pid=$!; {look}; wait $pid")
        times = re.search(r"load time =\s*([\d.]+).*prompt eval time =\s*([\d.]+) ms /\s*(\d+)"
                          r".* eval time =\s*([\d.]+) ms /\s*(\d+)", log, re.DOTALL)
        if not times:
            raise UserError(f"phone: {PROGRAM} ended without its timings; try it by hand: {command}")
        return figures(log, *map(float, times.groups()), status=log)

# ----------------------------------------------------------------------------------------------------------
# The run


def profile(device: Computer | Phone, models: list[Model], args) -> dict:
    """All measurements. The models take turns within each repeat: what slows the device slows both.

    Prose is the prompt, except for the last ones, which compare what domains touch.
    """
    from data import embedded_corpus
    # The beginning of each domain of the embedded corpus; ASCII only, so that cutting it cuts no character.
    texts = {domain: "\n".join(documents).encode("ascii", "ignore").decode()[:8 * max(args.contexts)]
             for domain, documents in embedded_corpus().train.items()}
    ids = {model: common.ask_llama_cpp(model.path, texts=[*texts.values()])["tokens"] for model in models}
    # Nothing measures the ceilings of a phone. "nan" stands for "not known" there.
    top = {"bandwidth": float("nan"), "int8": float("nan")} if args.adb else ceilings(args.threads)
    answers = {(model, context): [] for model in models for context in args.contexts}
    jobs = [(context, model) for _ in range(args.repeats) for context in args.contexts for model in models]
    progress = common.Progress("profile", len(jobs), "measurements")
    for done, (context, model) in enumerate(jobs, 1):
        prompt = ids[model][0][:context]
        text = texts["prose"][:len(texts["prose"]) * len(prompt) // len(ids[model][0])]
        answer = device.measure(model, prompt, text)
        answers[model, context].append(answer)
        progress.show(done, f"{model.name}: {answer['prefill']:.1f} and {answer['decode']:.1f} tokens/s")
    touched = []
    short = args.contexts[0]
    for model in models if not args.adb and proc("self/smaps") else []:
        for domain, prompt in [*zip(texts, ids[model]), ("one token repeated", ids[model][0][:1] * short)]:
            answer = device.measure(model, prompt[:short], "", decode=1, mmap=True, repack=False, touch=True)
            touched.append([model.name, domain, answer["tokens"], answer["mapped"]])
    return {"device": f"{device.name}, {args.threads} threads", "options": vars(args), "ceilings": top,
            "touched": touched, "rows": [summarise(*at, found, top, args) for at, found in answers.items()]}


def summarise(model: Model, context: int, answers: list[dict], top: dict, args) -> dict:
    """Medians of the repeats, their spread ((largest - smallest) / median), and what theory says."""
    row = {key: statistics.median(answer[key] for answer in answers) for key in answers[0]}
    row |= {"model": model.name, "context": context, "tokens": answers[0]["tokens"], "repeats": answers}
    row["spread"] = {what: (max(a[what] for a in answers) - min(a[what] for a in answers)) / row[what]
                     for what in ("prefill", "decode")}
    window = row["tokens"] + DECODE
    row |= {"predicted": model.memory(window, args), "prompt_flops": model.prompt_flops(row["tokens"]),
            "decode_bytes": model.decode_bytes + model.kv_bytes(window, args.kv)}
    row["ceiling"] = {"prefill": top["int8"] / row["prompt_flops"],
                      "decode": top["bandwidth"] / row["decode_bytes"]}
    row["measured"] = {part: row[part] for part in PARTS}
    row["measured"]["everything else"] = row["peak"] - sum(row["measured"].values())
    return row

# ----------------------------------------------------------------------------------------------------------
# What a person reads: tables, and two pictures


def report(result: dict) -> str:
    """The measurements as Markdown tables, every figure with its ceiling."""
    rows, top = result["rows"], result["ceilings"]

    def rate(row: dict, what: str) -> list[str]:
        return [f"{row[what]:.1f} ({row['spread'][what]:.0%})", f"{row[what] / row['ceiling'][what]:.0%}"]
    parts = [
        f"{result['device']}. Medians of {result['options']['repeats']}, in brackets (max - min) / median.\n"
        f"Ceilings: {top['bandwidth'] / 1e9:.1f} GB/s read, {top['int8'] / 1e9:.0f} GOP/s INT8.",
        markdown_table(
            ["model", "prompt", "load s", "first token s", "prefill tok/s", "of ceiling", "GFLOP/token",
             "decode tok/s", "of ceiling", "MB/token"],
            [[row["model"], row["tokens"], f"{row['load']:.2f}", f"{row['first token']:.2f}",
              *rate(row, "prefill"), f"{row['prompt_flops'] / 1e9:.3g}",
              *rate(row, "decode"), f"{row['decode_bytes'] / 1e6:.3g}"] for row in rows])]
    if result["options"]["versus"]:
        keys = ["prefill", "decode", "first token", "peak"]
        duel = [[one["tokens"], *(f"{one[key] / two[key]:.2f}x" for key in keys)]
                for one, two in zip(rows, rows[len(rows) // 2:])]
        parts.append(markdown_table([f"{rows[0]['model']} / {rows[-1]['model']}", *keys], duel))
    parts += ["Memory in MB, predicted / measured:", markdown_table(
        ["model", "prompt", *rows[0]["measured"], "peak"],
        [[row["model"], row["tokens"],
          *(f"{row['predicted'][part] / 1e6:.0f} / {row['measured'][part] / 1e6:.0f}" for part in PARTS),
          f"{row['measured']['everything else'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}"] for row in rows])]
    if result["touched"]:
        cells = [[*names, f"{size / 1e6:.1f}"] for *names, size in result["touched"]]
        parts += ["Weights that a prompt touches (file mapped, not repacked):",
                  markdown_table(["model", "prompt", "tokens", "MB"], cells)]
    return "\n\n".join(parts)


def draw(rows: list[dict], base: str) -> None:
    """BASE-speed.png: tokens per second, ceilings dotted. BASE-memory.png: what fills the memory."""
    figure, [axes] = new_figure(1, 2, (11, 4.5))
    contexts = sorted({row["context"] for row in rows})
    for axis, what in zip(axes, ("prefill", "decode")):
        for name, color in zip(dict.fromkeys(row["model"] for row in rows), ("tab:blue", "tab:orange")):
            mine = [row for row in rows if row["model"] == name]
            axis.plot(contexts, [row[what] for row in mine], "o-", color=color, label=name)
            axis.plot(contexts, [row["ceiling"][what] for row in mine], ":", color=color)
        axis.set(yscale="log", xlabel="tokens of context", title=f"{what}, tokens/s (dotted: ceiling)")
        axis.legend()
    save_figure(figure, f"{base}-speed.png")

    figure, [[axis]] = new_figure(1, 1, (4 + 0.9 * len(rows), 4.5))
    names = [f"{row['model']}\n{row['context']}" for row in rows]
    for n, part in enumerate(rows[0]["measured"]):
        bottom = [sum([*row["measured"].values()][:n]) / 1e9 for row in rows]
        axis.bar(names, [row["measured"][part] / 1e9 for row in rows], bottom=bottom, label=part)
    axis.plot(names, [sum(row["predicted"].values()) / 1e9 for row in rows], "k_", ms=22, label="predicted")
    axis.axhline(5, color="black", ls=":", label="the paper's phone: 5 GB for an app")
    axis.set(ylabel="GB", title="peak memory, by tokens of context")
    figure.legend(loc="outside right upper", reverse=True)
    save_figure(figure, f"{base}-memory.png")

# ----------------------------------------------------------------------------------------------------------
# Command line


def main():
    import torch
    parser = Parser(description="Measure speed and memory of a .gguf file.")
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?", help="a .gguf file that export_mobile.py wrote")
    which.add_argument("--preset", metavar="NAME", help="random weights of a shape (S, M, ...), in --out")
    add("--versus", metavar="NAME", help="a second preset or file, measured in turns with the first")
    add("--contexts", type=number(int, 1), nargs="+", default=[512, 1024, 2048, 4096], help="(512 to 4096)")
    add("--repeats", type=number(int, 1), default=3, help="of every measurement (%(default)s)")
    add("--threads", type=number(int, 0), default=0, help="(one for each core; on a phone, 4)")
    add("--kv", choices=KV_BITS, default="f16", help="KV cache (%(default)s); int8 is the paper's")
    add("--no-repack", dest="repack", action="store_false", help="slower, but no second copy of the weights")
    add("--no-mmap", dest="mmap", action="store_false", help="read the file instead of mapping it")
    add("--out", default="runs/profile", help="folder for .json, pictures, presets (%(default)s)")
    add("--adb", action="store_true", help="measure on the Android phone that adb reaches")
    add("--serial", help="which phone, if there are several (`adb devices` lists them)")
    add("--llama-bin", metavar="DIR", help=f"folder with an Android {PROGRAM} (default: what Termux has)")
    args = parser.parse_args()
    # Of a phone's cores, all but about four are slow, to save its battery.
    args.threads = args.threads or (4 if args.adb else torch.get_num_threads())
    Path(args.out).mkdir(parents=True, exist_ok=True)
    device = Phone(args) if args.adb else Computer(args)        # before a gigabyte is written: is there one?
    models = [Model(what, args.out) for what in (args.model or args.preset, args.versus) if what]
    # The file says how long a context may be. A prompt leaves room in it for what is generated.
    limit = min(model.config.max_context for model in models)
    args.contexts = sorted({min(context, max(limit - DECODE - 1, limit // 2)) for context in args.contexts})
    with device.ready(models) if args.adb else contextlib.nullcontext():
        result = profile(device, models, args)
    print(report(result))
    base = args.out + "/" + "-vs-".join([model.name for model in models] + ["phone"] * args.adb)
    with common.atomic_write(f"{base}.json") as file:
        file.write(json.dumps(result, indent=1).encode())
    print(f"written: {base}.json")
    draw(result["rows"], base)


if __name__ == "__main__":
    run_main(main)
