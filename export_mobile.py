"""Checkpoint -> one .gguf file that a phone runs with unmodified llama.cpp. Nothing is trained or generated here.

    python export_mobile.py runs/tiny/qat.pt --out mobilemoe.gguf               4-bit weights, for the phone
    python export_mobile.py runs/tiny/sft.pt --out big.gguf --dtype f16         or f32, q8_0
    python export_mobile.py --preset S --out s.gguf                             random weights of a released shape
    python export_mobile.py runs/tiny/qat.pt --out x.gguf --ask "What is 2 + 3?"     and llama.cpp's answer from that file

The file format (GGUF version 3, little-endian; specified in github.com/ggml-org/ggml, docs/gguf.md):

    "GGUF"   uint32 version   uint64 number of tensors   uint64 number of key/value pairs
    key/value pairs    string key, uint32 type, value        architecture, sizes, vocabulary, chat template
    tensor infos       string name, uint32 n_dims, uint64 dims (innermost first), uint32 type, uint64 offset
    zeros up to a multiple of 32, then the tensors in that order, each padded to a multiple of 32

A string is a uint64 length and UTF-8 bytes; an array is the type of its elements, a uint64 length and the elements. What a
runtime must know stands in front, so it can map the rest of the file into memory and never copy a weight. It also means that
every offset follows from the config alone: this script writes the header before it has seen a weight, then fetches, converts,
writes and drops one tensor after another. Rows of weights are Q4_0 blocks, 32 weights in 18 bytes (see quantize.py).

Why a MobileMoE may call itself `glm4moe`: `general.architecture` does not name a family, it picks a compute graph in
llama.cpp, and GLM-4.5's graph is ours. GQA with a norm on q and k, a sigmoid router, selection by score + bias, weights from
the bare scores, normalised and scaled, plus a shared expert. Four details need translation:

- It rotates pairs (i, i + 32) of a head, we rotate (2i, 2i + 1): the rows of q_proj and k_proj are reordered, evens first.
  A dot product does not notice when q and k are reordered alike, nor does the sum inside their norm.
- Our norm of q and k has no weight: the file gets ones.
- It always adds a shared expert: a config without one gets a narrow one of zeros.
- The released rope_scaling stretches wavelengths above 8,192 tokens by 16 and keeps the rest. The graph has no such step,
  but it can rotate a part of each head (GLM does): the kept pairs turn exactly as trained; the stretched ones, which would
  turn by at most 0.04 radians in 1,000 tokens, stand still. This alone is an approximation, good to a few thousand tokens.

A dense model has no experts to offer that graph; it goes as `qwen3`, the same attention with one SwiGLU. (`llama`, the obvious
guess, has no norm on q and k.) Every llama.cpp since August 2025 has both, so the apps built on it do.
"""
import argparse
import base64
import dataclasses
import functools
import itertools
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import LLAMA3_PATTERN, SPECIAL_TOKENS, make_tokenizer, tokenizer_to_dict
from mobilemoe import PRESETS, Config, MobileMoE, UserError, atomic_write, config_from_dict, load_checkpoint, run_main
from quantize import dequantize, int4_groups, pack_q4_0, pack_q8_0

ALIGNMENT = 32
F32, F16, Q4_0, Q8_0 = 0, 1, 2, 8               # ggml's numbers for tensor types
DTYPES = {"f32": F32, "f16": F16, "q8_0": Q8_0, "q4_0": Q4_0}
BLOCK = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), Q4_0: (32, 18)}          # weights in a block, its bytes
FILE_TYPE = {F32: 0, F16: 1, Q8_0: 7, Q4_0: 2}  # general.file_type, "mostly this": a numbering of its own
NORMAL, CONTROL, UNUSED = 1, 3, 5               # tokenizer.ggml.token_type
MAX_EXPERTS = 512                               # llama.cpp aborts above: 512 since September 2025, 1,024 of late
ROPE_ORIGINAL_CONTEXT = 8192                    # of the released rope_scaling

# Llama-3's chat format in Jinja: mobilemoe.encode_chat as the runtime does it, for every app that uses the file.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

# ----------------------------------------------------------------------------------------------------------------------
# What goes into the file: tensors


class Entry(NamedTuple):
    """One tensor of the file: its name there, and how to make it from ours."""
    name: str
    shape: tuple[int, ...]                  # as in PyTorch, input dimension last: [out, in] or [E, out, in]
    kind: int                               # ggml type
    matrix: bool                            # one of the weights that quantize.attach quantises
    source: str | None                      # key in our state_dict; None: made from nothing
    convert: Callable[[Tensor], Tensor]


def tensor_plan(config: Config, kind: int) -> list[Entry]:
    """Every tensor that llama.cpp will ask for, in file order, matrices as `kind`.

    Norms, router and bias stay F32 whatever the kind: they are small, and a router off by a rounding picks another expert.
    """
    c, d = config, config.d_head
    D, F, E, S = c.d_model, c.expert_width, c.n_routed, file_shared_width(c)
    turning = rotated_pairs(c)

    def same(w): return w
    def ones(_): return torch.ones(d)
    def zeros(shape): return lambda _: torch.zeros(shape)
    def gate(w): return w[..., :F].transpose(1, 2)                       # [E, D, 2F] -> [E, F, D]
    def up(w): return w[..., F:].transpose(1, 2)                         # [E, D, 2F] -> [E, F, D]
    def down(w): return w.transpose(1, 2)                                # [E, F, D] -> [E, D, F]

    def evens_first(w):                                                  # [heads*d, D] -> the same, rows reordered
        pairs = w.reshape(-1, d // 2, 2, D)                              # [heads, d/2, 2, D]
        even, odd, still = pairs[:, :turning, 0], pairs[:, :turning, 1], pairs[:, turning:].flatten(1, 2)
        return torch.cat([even, odd, still], dim=1).reshape(-1, D)

    MATRIX, KEEP = True, False
    layer = [
        ("attn_norm.weight", (D,), KEEP, "input_layernorm.weight", same),
        ("attn_q.weight", (c.n_heads * d, D), MATRIX, "self_attn.q_proj.weight", evens_first),
        ("attn_k.weight", (c.n_kv_heads * d, D), MATRIX, "self_attn.k_proj.weight", evens_first),
        ("attn_v.weight", (c.n_kv_heads * d, D), MATRIX, "self_attn.v_proj.weight", same),
        ("attn_output.weight", (D, c.n_heads * d), MATRIX, "self_attn.o_proj.weight", same),
        ("attn_q_norm.weight", (d,), KEEP, None, ones),
        ("attn_k_norm.weight", (d,), KEEP, None, ones)]
    if c.dense:
        layer += [
            ("ffn_norm.weight", (D,), KEEP, "post_attention_layernorm.weight", same),
            ("ffn_gate.weight", (c.d_ff, D), MATRIX, "feed_forward.gate_proj.weight", same),
            ("ffn_up.weight", (c.d_ff, D), MATRIX, "feed_forward.up_proj.weight", same),
            ("ffn_down.weight", (D, c.d_ff), MATRIX, "feed_forward.down_proj.weight", same)]
    else:
        layer += [
            ("post_attention_norm.weight", (D,), KEEP, "post_attention_layernorm.weight", same),
            ("ffn_gate_inp.weight", (E, D), KEEP, "feed_forward.router.weight", same),
            ("exp_probs_b.bias", (E,), KEEP, "feed_forward.expert_bias", same),
            ("ffn_gate_exps.weight", (E, F, D), MATRIX, "feed_forward.experts.gate_up_proj", gate),
            ("ffn_up_exps.weight", (E, F, D), MATRIX, "feed_forward.experts.gate_up_proj", up),
            ("ffn_down_exps.weight", (E, D, F), MATRIX, "feed_forward.experts.down_proj", down)]
        for part, shape in (("gate", (S, D)), ("up", (S, D)), ("down", (D, S))):
            source = f"feed_forward.shared_expert.{part}_proj.weight" if c.shared_expert else None
            layer.append((f"ffn_{part}_shexp.weight", shape, MATRIX, source, same if source else zeros(shape)))

    def entry(name, shape, matrix, source, convert):
        return Entry(name, shape, kind if matrix else F32, matrix, source, convert)
    return [entry("token_embd.weight", (c.vocab_size, D), MATRIX, "model.embed_tokens.weight", same),   # output layer, too
            *(entry(f"blk.{n}.{name}", shape, matrix, source and f"model.layers.{n}.{source}", convert)
              for n in range(c.n_layers) for name, shape, matrix, source, convert in layer),
            entry("output_norm.weight", (D,), KEEP, "model.norm.weight", same)]


def file_shared_width(config: Config) -> int:
    """Width of the shared expert in the file: ours, or that of the narrowest one the graph can have, made of zeros."""
    return config.shared_width or config.expert_width


def rotated_pairs(config: Config) -> int:
    """How many pairs of each head rotate in the file: all, but under rope_scaling only those that are not stretched."""
    wavelengths = [2 * math.pi * config.rope_theta ** (2 * pair / config.d_head) for pair in range(config.d_head // 2)]
    return sum(not config.rope_scaling or wavelength <= ROPE_ORIGINAL_CONTEXT for wavelength in wavelengths)

# ----------------------------------------------------------------------------------------------------------------------
# What goes into the file: key/value pairs


def model_metadata(config: Config, kind: int) -> dict:
    """The keys that describe the model; llama.cpp lists them in gguf-py/gguf/constants.py."""
    c, pairs = config, rotated_pairs(config)
    arch, context = "qwen3" if c.dense else "glm4moe", c.max_context
    total, active = f"{c.total_params() / 1e6:.0f}M", f"{c.active_params() / 1e6:.0f}M"
    keys = {
        "block_count": c.n_layers, "embedding_length": c.d_model, "feed_forward_length": c.d_ff,
        "context_length": min(context, ROPE_ORIGINAL_CONTEXT) if c.rope_scaling else context, "vocab_size": c.vocab_size,
        "attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.d_head, "attention.value_length": c.d_head,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        # Pair i of n turns by base^(-i/n) per token: with fewer pairs, a smaller base keeps the frequencies of the rest.
        "rope.dimension_count": 2 * pairs, "rope.freq_base": float(c.rope_theta) ** (2 * pairs / c.d_head)}
    if not c.dense:
        keys |= {
            "expert_count": c.n_routed, "expert_used_count": c.active_routed, "leading_dense_block_count": 0,
            "expert_feed_forward_length": c.expert_width, "expert_shared_count": file_shared_width(c) // c.expert_width,
            "expert_gating_func": 2, "expert_weights_norm": True, "expert_weights_scale": float(c.routed_scale)}  # 2: sigmoid
    size = total if c.dense else f"{total}-A{active}"
    return {"general.architecture": arch, "general.type": "model", "general.name": f"MobileMoE {size}",
            "general.size_label": size, "general.file_type": FILE_TYPE[kind], "general.quantization_version": 2,
            "general.alignment": ALIGNMENT, **{f"{arch}.{key}": value for key, value in keys.items()}}


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """Byte -> printable character, as in GPT-2: GGUF strings must be UTF-8, the bytes of one token need not be.

    Printable Latin-1 stands for itself, the other 68 bytes become U+0100 onwards: a space reads 'Ġ'.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def tokenizer_metadata(tokenizer: dict, vocab_size: int) -> dict:
    """A checkpoint's tokenizer entry as GGUF keys. Raises UserError where llama.cpp could not give tiktoken's ids.

    tiktoken keeps ranks: of all neighbours that together are a token it joins those of lowest rank. llama.cpp wants merges,
    "left right" in order of priority. So every split of a token into two tokens is a merge, also where training made it
    from one of them only; that is exact for any ranks, and what the published Llama-3 does (280,147 merges, 128,000 tokens).
    """
    name, specials = tokenizer["name"], tokenizer["special_tokens"]
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, tokenizer["ranks"].splitlines())}
    if tokenizer["pattern"] != LLAMA3_PATTERN:
        raise UserError(f"tokenizer {name!r} does not split text as Llama-3's does, and llama.cpp knows it by no name")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"tokenizer {name!r} is not byte-level: it has no token for byte {missing[0]}; train it on all 256")
    if missing := [special for special in SPECIAL_TOKENS if special not in specials]:
        raise UserError(f"tokenizer {name!r} has no {missing[0]}, which the chat format needs")
    ids = [*ranks.values(), *specials.values()]
    if len(set(ids)) < len(ids) or max(ids) >= vocab_size:
        raise UserError(f"tokenizer {name!r}: {len(ids)} ids up to {max(ids)} do not fit the vocabulary of {vocab_size}")

    letters = byte_alphabet()
    text = {token: "".join([letters[byte] for byte in token]) for token in sorted(ranks, key=ranks.get)}
    tokens, types = [f"[UNUSED_{n}]" for n in range(vocab_size)], np.full(vocab_size, UNUSED)
    for token, rank in ranks.items():
        tokens[rank], types[rank] = text[token], NORMAL
    for token, rank in specials.items():
        tokens[rank], types[rank] = token, CONTROL      # never made from what a user types, never shown
    merges = [f"{text[token[:cut]]} {text[token[cut:]]}" for token in text for cut in range(1, len(token))
              if token[:cut] in text and token[cut:] in text]
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.bos_token_id": specials["<|begin_of_text|>"],
            "tokenizer.ggml.eos_token_id": specials["<|end_of_text|>"],
            "tokenizer.ggml.eot_token_id": specials["<|eot_id|>"], "tokenizer.chat_template": CHAT_TEMPLATE}


def placeholder_tokenizer(vocab_size: int) -> dict:
    """A well-formed byte-level vocabulary that means nothing, for weights that mean nothing: all bytes, pairs, then triples."""
    words = (bytes(word) for length in (1, 2, 3) for word in itertools.product(range(256), repeat=length))
    ranks = {word: rank for rank, word in enumerate(itertools.islice(words, vocab_size - len(SPECIAL_TOKENS)))}
    return tokenizer_to_dict(make_tokenizer(ranks, "placeholder"))

# ----------------------------------------------------------------------------------------------------------------------
# Writing


def gguf_string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def gguf_value(value) -> bytes:
    """Type number and value. int is uint32, float is float32; arrays: a list is of strings, a NumPy array of int32."""
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, 5, len(value)) + value.astype("<i4").tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    number, layout = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack("<I" + layout, number, value)


def padding(size: int) -> bytes:
    return bytes(-size % ALIGNMENT)


def entry_bytes(entry: Entry) -> int:
    weights, size = BLOCK[entry.kind]
    return math.prod(entry.shape) // weights * size


def gguf_header(metadata: dict, entries: list[Entry]) -> bytes:
    """Everything in front of the weights. Offsets count from its end."""
    parts, offset = [b"GGUF", struct.pack("<IQQ", 3, len(entries), len(metadata))], 0
    parts += [gguf_string(key) + gguf_value(value) for key, value in metadata.items()]
    for entry in entries:
        dims = entry.shape[::-1]                # ggml names the innermost dimension first: [in, out, E]
        parts.append(gguf_string(entry.name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, offset))
        offset += entry_bytes(entry)
        offset += len(padding(offset))
    header = b"".join(parts)
    return header + padding(len(header))


def encode(weight: Tensor, kind: int, snap: bool) -> np.ndarray:
    """weight [..., in] of any dtype -> its bytes in the file.

    `snap` moves the masters of a QAT model onto the INT4 lattice they were trained for before another type stores them. Q4_0
    *is* that lattice: there the integers that QAT computed with are packed, and nothing is rounded twice.
    """
    rows = weight.reshape(-1, weight.shape[-1]).float().contiguous()                                     # [rows, in]
    if kind == Q4_0:
        return pack_q4_0(*int4_groups(rows, dim=1)).numpy()
    if snap:
        rows = dequantize(*int4_groups(rows, dim=1), dim=1)
    return pack_q8_0(rows).numpy() if kind == Q8_0 else rows.numpy().astype(np.float16 if kind == F16 else np.float32)


def state_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in our state_dict, without their memory."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in MobileMoE(config).state_dict().items()}


def write_tensors(file, config: Config, entries: list[Entry], tensor: Callable[[str], np.ndarray | Tensor], qat: bool):
    shapes = state_shapes(config)
    fetch = functools.lru_cache(maxsize=1)(tensor)      # gate and up come out of one tensor, asked for twice in a row
    for entry in entries:
        try:
            weight = torch.as_tensor(fetch(entry.source)) if entry.source else None
        except KeyError:
            raise UserError(f"the checkpoint has no tensor {entry.source}") from None
        if weight is not None and tuple(weight.shape) != shapes[entry.source]:
            raise UserError(f"{entry.source} is {list(weight.shape)}, but the config says {list(shapes[entry.source])}")
        # Two million weights at a time: temporaries stay small enough for the processor's cache.
        for part in entry.convert(weight).split(max(1, 2**21 // math.prod(entry.shape[1:]))):
            file.write(encode(part, entry.kind, snap=qat and entry.matrix))
        file.write(padding(entry_bytes(entry)))


def export(config: Config, tensor: Callable[[str], np.ndarray | Tensor], tokenizer: dict, path: str | Path,
           dtype: str = "q4_0", qat: bool = False) -> str:
    """Write `path` and return a line that says what was written.

    `tensor(name)` gives one tensor of our state_dict in any dtype. It is called in file order and what it returns is dropped
    before the next but one, so memory never holds the model. `qat`: the weights are masters (see `encode`). Raises UserError
    for anything llama.cpp could not load, and then leaves no file.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: one of {', '.join(DTYPES)}")
    if not config.dense and config.n_routed > MAX_EXPERTS:
        raise UserError(f"llama.cpp has room for {MAX_EXPERTS} experts, not {config.n_routed}: use a smaller granularity")
    if config.dense and config.rope_scaling:
        raise UserError("llama.cpp's graph for a dense model cannot do rope_scaling: export one trained without")
    entries = tensor_plan(config, DTYPES[dtype])
    metadata = model_metadata(config, DTYPES[dtype]) | tokenizer_metadata(tokenizer, config.vocab_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)        # all this does is copy and round: waiting for other threads costs more than they bring
    try:
        with atomic_write(path) as file:
            file.write(gguf_header(metadata, entries))
            write_tensors(file, config, entries, tensor, qat)
    finally:
        torch.set_num_threads(threads)
    weights, size = sum(math.prod(entry.shape) for entry in entries), sum(map(entry_bytes, entries))
    return (f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, {len(entries)} tensors for {metadata['general.architecture']}, "
            f"{8 * size / weights:.2f} bits per weight")


def export_checkpoint(checkpoint_path: str | Path, path: str | Path, dtype: str = "q4_0") -> str:
    """Export a checkpoint that train.py wrote. Raises UserError if it is missing, damaged or incomplete."""
    checkpoint = load_checkpoint(checkpoint_path)       # memory-mapped: a tensor is read when it is fetched
    return export(config_from_dict(checkpoint["config"]), checkpoint["model"].__getitem__, checkpoint["tokenizer"], path,
                  dtype, checkpoint["quantized"])


def export_preset(name: str, path: str | Path, dtype: str = "q4_0") -> str:
    """Export random weights of a preset's shape: right in size, memory and speed before anything is trained."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: one of {', '.join(PRESETS)}")
    config = dataclasses.replace(PRESETS[name], max_context=8192)       # the paper's longest; runtimes refuse longer prompts
    shapes = state_shapes(config)

    def tensor(key: str) -> Tensor:
        if len(shapes[key]) == 1:
            return torch.zeros(shapes[key]) if key.endswith("bias") else torch.ones(shapes[key])
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        return torch.randn(shapes[key], generator=generator) * config.init_std
    return export(config, tensor, placeholder_tokenizer(config.vocab_size), path, dtype)


def ask(path: str | Path, questions: list[str]) -> list[str]:
    """What unmodified llama.cpp, the runtime of the phone apps, makes of the file: its answers, sampled greedily."""
    try:
        import xllamacpp
    except ImportError:
        raise UserError("llama.cpp is not here to be asked: `pip install xllamacpp` brings it as a wheel") from None
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = str(path), 512, 1, -1
    server = xllamacpp.Server(params)
    replies = [server.handle_chat_completions({"messages": [{"role": "user", "content": question}], "max_tokens": 128,
                                               "temperature": 0}) for question in questions]
    return [reply["choices"][0]["message"]["content"] for reply in replies]


def main():
    parser = argparse.ArgumentParser(description="Write a model as one .gguf file for llama.cpp.")
    parser.add_argument("checkpoint", nargs="?", help="a .pt file that train.py wrote")
    parser.add_argument("--preset", help=f"random weights of a known shape instead: {', '.join(PRESETS)}")
    parser.add_argument("--out", required=True, help="the .gguf file to write")
    parser.add_argument("--dtype", default="q4_0", help=f"of the matrices: {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--ask", metavar="QUESTION", action="append", help="let llama.cpp answer from the file (may repeat)")
    args = parser.parse_args()
    if bool(args.checkpoint) == bool(args.preset):
        raise UserError("name either a checkpoint or a --preset")
    print(export_preset(args.preset, args.out, args.dtype) if args.preset
          else export_checkpoint(args.checkpoint, args.out, args.dtype))
    for question, answer in zip(args.ask or [], ask(args.out, args.ask) if args.ask else []):
        print(f"Q: {question}\nA: {answer}")


if __name__ == "__main__":
    run_main(main)
