"""Ask llama.cpp what it makes of a .gguf file: log-probabilities, token ids, chat prompts.

Every question gets a fresh process: a file that llama.cpp cannot load may abort the process it is in, and nothing it keeps
(threads, caches, an HTTP port) leaks into the next test. The library is `pip install xllamacpp`. Questions travel as JSON on
stdin, answers in an .npz file, because llama.cpp writes its log wherever it likes.

Each prompt yields the log-probabilities of the whole vocabulary for the next token, from the arithmetic of a phone's decoding.
A prompt that extends the one before costs one new token, the rest is in the KV cache: about ten milliseconds at V = 4096, most
of it JSON.
"""
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np


def logprobs(path, prompts: list[list[int]], f32_cache: bool = False) -> np.ndarray:
    """What may follow each prompt: log-probabilities [len(prompts), V], float32.

    `f32_cache` keeps keys and values in F32, to compare closely; apps use the default, F16.
    """
    return ask(path, prompts=[list(map(int, prompt)) for prompt in prompts], f32_cache=f32_cache)["logprobs"]


def position_logprobs(path, ids, first: int, count: int, f32_cache: bool = False) -> np.ndarray:
    """llama.cpp's predictions at positions first ... first + count - 1 of one text: [count, V].

    Row i is what may follow ids[: first + i + 1], as log_softmax(model(ids))[first + i] in PyTorch. The server takes prompts
    of at most context_length - 1 tokens, since the answer must fit as well.
    """
    return logprobs(path, [ids[:end] for end in range(first + 1, first + count + 1)], f32_cache)


def tokenize(path, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts: no BOS is added, and the names of special tokens are text like any other."""
    return json.loads(str(ask(path, texts=texts)["tokens"]))


def chat_tokens(path, messages: list[dict]) -> list[int]:
    """Token ids of a conversation as apps send it: rendered with the file's own template, up to the assistant's turn."""
    return json.loads(str(ask(path, messages=messages)["chat"]))


def ask(path, **question) -> dict:
    """Put a question to llama.cpp in a child process. Raises RuntimeError with the end of its log if it dies."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.npz"
        question = json.dumps({"path": str(path), "answer": str(answer), **question})
        child = subprocess.run([sys.executable, __file__], input=question, capture_output=True, text=True, errors="replace")
        if child.returncode:
            raise RuntimeError(f"llama.cpp and {path}: exit code {child.returncode}\n{(child.stdout + child.stderr)[-2000:]}")
        return dict(np.load(answer))


def reply_to(question: dict) -> dict:
    """The child's side of `ask`."""
    import xllamacpp

    prompts = question.get("prompts", [])
    params = xllamacpp.CommonParams()
    params.model.path = question["path"]
    params.n_ctx, params.n_parallel, params.warmup = max(map(len, prompts), default=0) + 8, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    if question.get("f32_cache"):
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED     # it rounds to F16
    server = xllamacpp.Server(params)

    def post(route: str, **body) -> dict:
        request = urllib.request.Request(server.listening_address + route, json.dumps(body).encode())
        return json.load(urllib.request.urlopen(request))

    # The server holds back a token that ends inside a character, and its probabilities with it. So the letter a is always
    # "chosen": a bias acts on the choice, the probabilities that are reported are those before it.
    letter = post("/tokenize", content="a")["tokens"][-1]

    def predict(prompt: list[int]) -> np.ndarray:
        reply = server.handle_completions({"prompt": prompt, "n_predict": 1, "n_probs": 10**6, "cache_prompt": True,
                                           "temperature": -1, "logit_bias": [[letter, 1e6]]})
        likeliest_first = reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]             # all V of them
        row = np.empty(len(likeliest_first), np.float32)
        row[[token["id"] for token in likeliest_first]] = [token["logprob"] for token in likeliest_first]
        return row.clip(min=-104)                       # a probability below float32's smallest comes as -3.4e38

    if prompts:
        return {"logprobs": np.stack([predict(prompt) for prompt in prompts])}
    if "texts" in question:
        ids = [post("/tokenize", content=text, add_special=False, parse_special=False)["tokens"] for text in question["texts"]]
        return {"tokens": json.dumps(ids)}
    prompt = post("/apply-template", messages=question["messages"])["prompt"]           # without BOS, which tokenising adds
    return {"chat": json.dumps(post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"])}


if __name__ == "__main__":
    question = json.load(sys.stdin)
    np.savez(question["answer"], **reply_to(question))
