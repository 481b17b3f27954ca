"""What every script needs and no reader of the model must see: errors, files, chat format, progress, tables,
pictures, llama.cpp.

Here it is said once how a script refuses bad input, how a file reaches the disk whole, how a conversation
becomes token ids, and how llama.cpp is started in a process of its own. What it is not: anything about the
model, its training or its data. It imports none of the other files, so all of them may use it. Nothing to
run.

PyTorch is imported inside functions: the processes that measure memory (profile_device.py) use this file, and
must not carry PyTorch's 200 MB.

Sources: the chat format is Llama 3's; `llama.cpp` is used through the wheel `xllamacpp`.
"""
import argparse
import base64
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

# ----------------------------------------------------------------------------------------------------------
# Errors


class UserError(Exception):
    """An error the user can fix: `run_main` prints it as one line and exits with code 2."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main. Errors the user can fix become one line and exit code 2, Ctrl-C exit code 130."""
    for stream in (sys.stdout, sys.stderr):     # a terminal without UTF-8 shows ? for what it cannot print
        stream.reconfigure(errors="replace")
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:        # a full disk, a read-only folder: the system's words and the file's name
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


class Parser(argparse.ArgumentParser):
    """argparse, but what it refuses is one line, as everywhere, and its --help keeps a docstring's lines."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UserError(message)


def number(kind: type, least: float, most: float = 1e30) -> Callable:
    """For Parser's `type`: an int or float from `least` to `most`."""
    def read(text: str):
        value = kind(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most:g}")
        return value
    read.__name__ = "whole number" if kind is int else "number"
    return read

# ----------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_write(path: str | Path):
    """Yield a binary file that becomes `path` only when all of it is on the disk; after a failure nothing is
    left behind.

    Renaming within a folder is atomic, but only fsync makes the *content* arrive before the name does.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save turns a full disk into a RuntimeError about its zip file. What the system said is the
        # error's context.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from None
        raise


def read_json(path: str | Path):
    """What a JSON file says. Raises UserError if there is none or it is broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def load_dict(path: str | Path) -> dict:
    """A dict that torch.save wrote. Only tensors, numbers and strings are read, no code (weights_only).

    Raises UserError if the file is missing, empty, truncated or foreign.
    """
    import torch
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: `python train.py` makes one")
    try:
        mapped = sys.platform != "win32"        # there, a file that is mapped cannot be replaced
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception:               # torch raises half a dozen kinds, depending on where the damage is
        raise UserError(f"{path} is not readable (empty, truncated or foreign): delete it") from None


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint that train.py wrote, or a folder as the released models come. Raises UserError if it is
    none, or as load_dict does."""
    if Path(path).is_dir():
        from released import read_folder
        return read_folder(Path(path))
    checkpoint = load_dict(path)
    if checkpoint.get("format") != "mobilemoe/1":
        raise UserError(f"{path} is not a MobileMoE checkpoint: train.py writes those")
    return checkpoint

# ----------------------------------------------------------------------------------------------------------
# Text and conversations as token ids


def tokenizer_from_dict(entry: dict):
    """The tiktoken.Encoding that a checkpoint carries. `ranks` is the text of a tiktoken rank file."""
    import tiktoken
    pairs = (line.split() for line in entry["ranks"].splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    return tiktoken.Encoding(name=entry["name"], pat_str=entry["pattern"], mergeable_ranks=ranks,
                             special_tokens=entry["special_tokens"])


def encode(encoding, text: str) -> np.ndarray:
    """Plain text as token ids [tokens], uint32. Text that spells "<|eot_id|>" gets its characters, not the
    token.

    Raises UserError where tiktoken's regular expression gives up: about a million spaces in a row.
    """
    try:
        return encoding.encode_to_numpy(text, disallowed_special=())
    except ValueError as error:
        raise UserError(f"a text of {len(text):,} characters cannot be tokenized: {error}") from None


# Begin and end of a text, of a header, end of a turn: as Llama 3 names them, and as the released models do.
CHAT_NAMES = (
    ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ("<|begin_of_text|>", "<|end_of_text|>", "<|header_start|>", "<|header_end|>", "<|eot|>"))


def chat_names(encoding) -> tuple[str, ...]:
    """The five of CHAT_NAMES that this tokenizer has. Raises UserError if it has neither."""
    for names in CHAT_NAMES:
        if encoding.special_tokens_set.issuperset(names):
            return names
    raise UserError(f"the tokenizer {encoding.name} has no tokens for a chat, such as {', '.join(names)}")


def chat_parts(encoding, messages: list[dict]) -> Iterator[tuple[list[int], bool]]:
    """Llama 3's chat format in pieces: (ids, does the assistant say them?). Nobody says a header."""
    begin, _, header, header_end, turn_end = map(encoding.encode_single_token, chat_names(encoding))
    newlines = encode(encoding, "\n\n").tolist()
    yield [begin], False
    for message in messages:
        yield [header, *encode(encoding, message["role"]).tolist(), header_end, *newlines], False
        if "content" in message:
            yield [*encode(encoding, message["content"]).tolist(), turn_end], message["role"] == "assistant"


def encode_chat(encoding, messages: list[dict], reply: bool) -> list[int]:
    """A conversation as token ids. `reply` adds the header that invites the assistant to answer.

    The format's own tokens are placed by id and the words are encoded as ordinary text, so a user who types
    "<|eot_id|>" has typed ten characters and ended nothing.
    """
    invitation = [{"role": "assistant"}] if reply else []
    return [i for ids, _ in chat_parts(encoding, [*messages, *invitation]) for i in ids]


def encode_prompt(encoding, text: str, chat: bool) -> list[int]:
    """What a model is to continue: a question in a chat after sft and qat, a document's beginning before."""
    if chat:
        return encode_chat(encoding, [{"role": "user", "content": text}], reply=True)
    return [encoding.encode_single_token("<|begin_of_text|>"), *encode(encoding, text).tolist()]


def stop_tokens(encoding, vocab_size: int) -> tuple[int, ...]:
    """What ends an answer or a document, and ids without a token, as a vocabulary may have more room."""
    begin, end, *_, turn_end = map(encoding.encode_single_token, chat_names(encoding))
    return (begin, end, turn_end, *range(encoding.n_vocab, vocab_size))

# ----------------------------------------------------------------------------------------------------------
# What a person reads and looks at


class Progress:
    """`sft 41,200/58,113 tokens | loss 1.234 | 9,800 tokens/s | 0:02 left`: one line, live on a terminal,
    a line every ten seconds elsewhere."""

    def __init__(self, what: str, total: float, unit: str):
        self.what = what
        self.total = total
        self.unit = unit
        self.first = None           # (done, time) at the first report: before it, much was start-up
        self.printed = time.time()

    def show(self, done: float, note: str = "") -> None:
        """Report that `done` of the total are done. The line also appears at once when all are."""
        now = time.time()
        live = sys.stdout.isatty()
        last = done >= self.total
        self.first = self.first or (done, now)
        if not last and now - self.printed < (0.5 if live else 10):
            return
        self.printed = now
        rate = (done - self.first[0]) / max(now - self.first[1], 1e-9)
        parts = [f"{self.what} {done:,.0f}/{self.total:,.0f} {self.unit}"] + [note] * bool(note)
        if rate > 0:
            left = int((self.total - done) / rate)
            digits = 0 if rate >= 10 else 2
            parts += [f"{rate:,.{digits}f} {self.unit}/s", f"{left // 60}:{left % 60:02d} left"]
        line = " | ".join(parts)
        print(f"\r\033[K{line}" if live else line, end="" if live and not last else "\n", flush=True)


def markdown_table(heads: list, rows: list[list]) -> str:
    """A Markdown table, padded to be read as it is: first column to the left, the others, figures, right."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(2, *map(len, column)) for column in zip(heads, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = []
    for first, *others in (heads, rule, *rows):
        lines.append(" | ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    return "\n".join(f"| {line} |" for line in lines)


def new_figure(rows: int, columns: int, size: tuple[float, float]):
    """(figure, axes [rows, columns]) of matplotlib; raises UserError if that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib: `pip install matplotlib`") from None
    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure, path: str | Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, dpi=110, format="png")
    print(f"picture: {path}", flush=True)

# ----------------------------------------------------------------------------------------------------------
# Processes: memory kept in this one, llama.cpp in one of its own


def keep_memory() -> None:
    """Start this process again with glibc asked for 2 MB pages, and to keep what is freed. It listens only at
    the start.

    A step of training writes hundreds of buffers of megabytes. By default glibc hands the larger ones back to
    the system each time, and the next one comes back page by page: a step of S takes 29 s with 2 MB pages
    alone and 19 s with both (`PYTHONPATH=. python tests/step_of_S.py`). Who sets GLIBC_TUNABLES is obeyed.
    Price: torch is imported twice.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ("glibc.malloc.hugetlb=1:"
                                        "glibc.malloc.mmap_max=0:"      # no buffer is too large to be kept
                                        "glibc.malloc.trim_threshold=1099511627776")
        os.execv(sys.executable, sys.orig_argv)


def in_fresh_process(function: str, order: dict) -> tuple[dict, str]:
    """`module.function(order)` in a Python process of its own -> (its result, what the process logged).

    The order goes in and the result comes out as JSON through pipes, never through the command line. Raises
    UserError with the process' last words if it dies: llama.cpp may abort the process it is in, and must not
    take ours along.
    """
    module, name = function.rsplit(".", 1)
    code = f"import common, {module}; common.serve({module}.{name})"
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, input=json.dumps(order).encode(), capture_output=True, env=environment)
    log = child.stderr.decode(errors="replace")
    if child.returncode == -9:
        raise UserError(f"{order.get('path', name)}: the system killed the process; memory may be short")
    if child.returncode:
        lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no word from it"]
        said = [line for line in lines if " E " in line] or lines       # llama.cpp marks its errors so
        raise UserError(f"{name} failed with {order.get('path', 'its order')}: {said[-1][-200:]}")
    return json.loads(child.stdout), log


def serve(function: Callable[[dict], dict]) -> None:
    """The other end of in_fresh_process. llama.cpp logs to stdout or stderr as it likes, here to stderr."""
    order = json.load(sys.stdin)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    result = function(order)
    with answer:
        json.dump(result, answer)


def start_llama_cpp(path: str, n_ctx: int = 0, threads: int = 0, kv: str = "f16", **fields):
    """llama.cpp's server inside this process. n_ctx 0 is the model's own context; kv is "f32", "f16" or
    "int8".

    `fields` are further fields of llama.cpp's parameters, such as no_extra_bufts.
    """
    import xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = n_ctx
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.verbosity = 4                    # prints the buffers' sizes
    if threads:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    kind = {"f32": "F32", "f16": "F16", "int8": "Q8_0"}[kv]
    params.cache_type_k = params.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{kind}")
    if kv == "f32":                         # flash attention would round to F16 all the same
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    for name, value in fields.items():
        setattr(params, name, value)
    return xllamacpp.Server(params)


def post(server, route: str, **body) -> dict:
    """Ask the server over its local port, past any proxy that the surroundings name."""
    request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return json.load(direct.open(request))


def ask_llama_cpp(path: str | Path, **question) -> dict:
    """What unmodified llama.cpp, the runtime of the phone apps, makes of a .gguf file. Ask for one of

    chats=[messages, ...]      {"answers": [text, ...]}, sampled greedily, at most `max_tokens` (128) long
    prompts=[ids, ...]         {"logprobs": float32 [prompts, V]}: what may follow each prompt
    texts=[text, ...]          {"tokens": [ids, ...]} of plain text, without BOS
    template=messages          {"tokens": ids} of a conversation as the file's own chat template renders it

    and, beside it, for start_llama_cpp's kv and threads. Raises UserError without xllamacpp, or if llama.cpp
    fails.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UserError("llama.cpp is not here to be asked: `pip install xllamacpp` brings it as a wheel")
    answer, _ = in_fresh_process("common.answer_as_llama_cpp", {"path": str(path), **question})
    if "logprobs" in answer:
        rows = [np.frombuffer(base64.b64decode(row), np.float32) for row in answer["logprobs"]]
        answer["logprobs"] = np.stack(rows)                                # [prompts, V]
    return answer


def answer_as_llama_cpp(order: dict) -> dict:
    """The child's side of ask_llama_cpp."""
    longest = max(map(len, order.get("prompts", [])), default=-8)
    server = start_llama_cpp(order["path"], longest + 8, order.get("threads", 0), order.get("kv", "f16"))
    if "chats" in order:
        return {"answers": [chat_answer(server, messages, order) for messages in order["chats"]]}
    if "texts" in order:
        replies = [post(server, "/tokenize", content=text, parse_special=False) for text in order["texts"]]
        return {"tokens": [reply["tokens"] for reply in replies]}
    if "template" in order:
        text = post(server, "/apply-template", messages=order["template"])["prompt"]       # without BOS
        return {"tokens": post(server, "/tokenize", content=text, add_special=True)["tokens"]}
    # The server holds back a token that ends inside a character, and its probabilities with it. So the letter
    # a is always "chosen": a bias acts on the choice, the probabilities reported are those before it.
    letter = post(server, "/tokenize", content="a")["tokens"][-1]
    rows = []
    for prompt in order["prompts"]:         # one that extends the one before costs only its new tokens
        wish = {"n_predict": 1, "n_probs": 10**6, "temperature": -1, "logit_bias": [[letter, 1e6]]}
        reply = server.handle_completions({"prompt": prompt, "cache_prompt": True, **wish})
        tokens = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]         # all V of them
        row = np.empty(len(tokens), np.float32)
        row[[token["id"] for token in tokens]] = [token["logprob"] for token in tokens]
        rows.append(base64.b64encode(row.clip(min=-104)).decode())      # a probability of 0 comes as -3.4e38
    return {"logprobs": rows}


def chat_answer(server, messages: list[dict], order: dict) -> str:
    reply = server.handle_chat_completions({"messages": messages, "temperature": 0,
                                            "max_tokens": order.get("max_tokens", 128)})
    if "choices" not in reply:
        return f"(llama.cpp refuses: {reply.get('error', {}).get('message', reply)})"
    return reply["choices"][0]["message"]["content"]
