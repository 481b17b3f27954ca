"""Checkpoint -> one .gguf file that a phone runs with unmodified llama.cpp. Nothing is trained here.

    python export_mobile.py runs/tiny/qat.pt --out mobilemoe.gguf            4-bit weights, for the phone
    python export_mobile.py runs/tiny/sft.pt --out big.gguf --dtype f16      or f32, q8_0
    python export_mobile.py --preset S --out s.gguf                          random weights, a released shape
    python export_mobile.py runs/tiny/qat.pt --out x.gguf --ask "What is 2 + 3?"     and llama.cpp's answer

The file format is GGUF version 3, little-endian (github.com/ggml-org/ggml, docs/gguf.md):

    "GGUF"   uint32 version   uint64 number of tensors   uint64 number of key/value pairs
    key/value pairs    string key, uint32 type, value        architecture, sizes, vocabulary, chat template
    tensor infos       string name, uint32 n_dims, uint64 dims (innermost first), uint32 type, uint64 offset
    zeros up to a multiple of 32, then the tensors in that order, each padded to a multiple of 32

A string is a uint64 length and UTF-8 bytes. An array is the type of its elements, a uint64 length and the
elements. All that a runtime must know stands in front, so it can map the rest of the file into memory and
never copy a weight. Every offset follows from the config alone. So this script writes the header before it
has seen a weight; then it fetches, converts, writes and drops one tensor after another, and never holds the
model. Rows of weights are Q4_0 blocks, 32 weights in 18 bytes (see quantize.py).

Why may a MobileMoE call itself `glm4moe`? `general.architecture` does not name a family. It picks a compute
graph in llama.cpp, and GLM-4.5's graph is ours: grouped-query attention with a norm on q and k, a sigmoid
router, experts chosen by score + bias and weighted by the bare scores, normalised and scaled, plus a shared
expert. Four details need a translation:

- The graph rotates the pairs (i, i + d_head/2) of a head, we rotate (2i, 2i + 1). So the rows of q_proj and
  k_proj are reordered, evens first. A dot product does not notice when q and k are reordered alike; nor does
  the sum inside their norm.
- Our norm of q and k has no weight: the file gets ones.
- The graph always adds a shared expert: a model without one gets a narrow one of zeros.
- The released rope_scaling slows every pair that needs more than 8,192 tokens for a turn, 16 times, and keeps
  the rest. The graph has no such step, but it can rotate a part of each head (GLM does). The kept pairs turn
  exactly as trained; the slowed ones, which would turn by at most 0.04 radians in 1,000 tokens, stand still.
  This detail alone is an approximation, good to a few thousand tokens.

A dense model has no experts to offer that graph. It goes as `qwen3`: the same attention, one SwiGLU.
(`llama`, the obvious guess, has no norm on q and k.) Every llama.cpp since August 2025 has both graphs, and
so have the apps built on it.
"""
import dataclasses
import functools
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import (CHAT_NAMES, Parser, UserError, ask_llama_cpp, atomic_write, chat_names, load_checkpoint,
                    run_main, tokenizer_from_dict)
from data import LLAMA3_PATTERN, SPECIAL_TOKENS, make_tokenizer, tokenizer_to_dict
from mobilemoe import PRESETS, Config, MobileMoE, config_from_dict
from quantize import dequantize, int4_groups, pack_q4_0, pack_q5_0, pack_q8_0

ALIGNMENT = 32
F32, F16, Q4_0, Q5_0, Q8_0 = 0, 1, 2, 6, 8      # ggml's numbers for tensor types
DTYPES = {"f32": F32, "f16": F16, "q8_0": Q8_0, "q4_0": Q4_0}
EXPERTS = {"q4_0": Q4_0, "q5_0": Q5_0, "q8_0": Q8_0}
BLOCK = {F32: (1, 4), F16: (1, 2), Q8_0: (32, 34), Q5_0: (32, 22), Q4_0: (32, 18)}     # weights, bytes of one
# The largest weight of a type: the scale of a block is an F16.
LARGEST = {F32: 3.4e38, F16: 65504, Q8_0: 127 * 65504, Q5_0: 16 * 65504, Q4_0: 7.5 * 65504}
# general.file_type, "mostly this": a numbering of its own
FILE_TYPE = {F32: 0, F16: 1, Q8_0: 7, Q5_0: 8, Q4_0: 2}
ROPE_ORIGINAL_CONTEXT = 8192                    # of the released rope_scaling

# Llama 3's chat format in Jinja. It is common.encode_chat for every app that uses the file.
CHAT_TEMPLATE = ("{{ bos_token }}{% for message in messages %}"
                 "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
                 "{{ message['content'] + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
                 "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")

# ----------------------------------------------------------------------------------------------------------
# What goes into the file: tensors


class Entry(NamedTuple):
    """One tensor of the file: its name there, and how to make it from ours."""
    name: str
    shape: tuple[int, ...]                  # as in PyTorch, input dimension last: [out, in] or [E, out, in]
    kind: int                               # ggml type
    is_matrix: bool                         # one of the weights that quantize.attach quantises
    source: str | None                      # name in our state_dict; None: made from nothing
    convert: Callable[[Tensor], Tensor]


def tensor_plan(c: Config, kind: int, experts: int) -> list[Entry]:
    """Every tensor that llama.cpp will ask for, in file order, matrices as ggml type `kind`, those of routed
    experts as `experts`.

    Norms, router and bias stay F32: they are small, and a router off by a rounding picks another expert.
    """
    d, D, F = c.d_head, c.d_model, c.expert_width
    shared = c.shared_width or F            # the graph must have one: without our own, a narrow one of zeros
    turning = rotated_pairs(c)

    def same(w): return w
    def full_of(value, *shape): return lambda _: torch.full(shape, value)
    def columns(i, j): return lambda w: w[..., i:j].transpose(1, 2)        # [E, in, out] -> [E, out, in]

    def evens_first(w):                                                    # [heads*d, ...] -> rows reordered
        pairs = w.unflatten(0, (-1, d // 2, 2))                            # [heads, d/2, 2, ...]
        still = pairs[:, turning:].flatten(1, 2)
        return torch.cat([pairs[:, :turning, 0], pairs[:, :turning, 1], still], dim=1).flatten(0, 1)

    layer = [                                                              # shape in the file
        ("attn_norm.weight", "input_layernorm.weight", same),              # [D]
        ("attn_q.weight", "self_attn.q_proj.weight", evens_first),         # [H*d, D]
        ("attn_k.weight", "self_attn.k_proj.weight", evens_first),         # [K*d, D]
        ("attn_v.weight", "self_attn.v_proj.weight", same),                # [K*d, D]
        ("attn_output.weight", "self_attn.o_proj.weight", same),           # [D, H*d]
        ("attn_q_norm.weight", None, full_of(1.0, d)),                     # [d]
        ("attn_k_norm.weight", None, full_of(1.0, d))]                     # [d]
    if c.dense:
        layer.append(("ffn_norm.weight", "post_attention_layernorm.weight", same))     # [D]
    else:
        layer += [
            ("post_attention_norm.weight", "post_attention_layernorm.weight", same),   # [D]
            ("ffn_gate_inp.weight", "feed_forward.router.weight", same),               # [E, D]
            ("exp_probs_b.bias", "feed_forward.expert_bias", same),                    # [E]
            ("ffn_gate_exps.weight", "feed_forward.experts.gate_up_proj", columns(0, F)),    # [E, F, D]
            ("ffn_up_exps.weight", "feed_forward.experts.gate_up_proj", columns(F, 2*F)),    # [E, F, D]
            ("ffn_down_exps.weight", "feed_forward.experts.down_proj", columns(0, D))]       # [E, D, F]
    # Every token goes through a dense model's feed-forward as through a shared expert: only the names differ.
    ours, theirs = ("feed_forward", "") if c.dense else ("feed_forward.shared_expert", "_shexp")
    for part, shape in (("gate", (shared, D)), ("up", (shared, D)), ("down", (D, shared))):
        source = f"{ours}.{part}_proj.weight" if c.dense or c.shared_expert else None
        layer.append((f"ffn_{part}{theirs}.weight", source, same if source else full_of(0.0, *shape)))

    rows = [("token_embd.weight", "model.embed_tokens.weight", same)]      # [V, D] also the output layer
    rows += [(f"blk.{n}.{name}", source and f"model.layers.{n}.{source}", convert)
             for n in range(c.n_layers) for name, source, convert in layer]
    rows.append(("output_norm.weight", "model.norm.weight", same))         # [D]
    state = empty_state(c)
    plan = []
    for name, source, convert in rows:
        shape = tuple(convert(state.get(source)).shape)
        is_matrix = len(shape) > 1 and "ffn_gate_inp" not in name          # all but norms, biases and routers
        type_of = experts if "_exps" in name else kind if is_matrix else F32
        plan.append(Entry(name, shape, type_of, is_matrix, source, convert))
    return plan


def empty_state(config: Config) -> dict[str, Tensor]:
    """Names and shapes of our state_dict, without the memory."""
    with torch.device("meta"):
        return MobileMoE(config).state_dict()


def rotated_pairs(c: Config) -> int:
    """How many pairs of each head rotate in the file: all, or with rope_scaling those that are not slowed."""
    turns = [2 * math.pi * c.rope_theta ** (2 * pair / c.d_head) for pair in range(c.d_head // 2)]    # tokens
    return sum(not c.rope_scaling or turn <= ROPE_ORIGINAL_CONTEXT for turn in turns)

# ----------------------------------------------------------------------------------------------------------
# What goes into the file: key/value pairs


def model_metadata(c: Config, kind: int, experts: int) -> dict:
    """The keys that describe the model. llama.cpp lists them in gguf-py/gguf/constants.py."""
    pairs = rotated_pairs(c)
    keys = {
        "block_count": c.n_layers, "embedding_length": c.d_model, "feed_forward_length": c.d_ff,
        "context_length": min(c.max_context, ROPE_ORIGINAL_CONTEXT) if c.rope_scaling else c.max_context,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.n_heads, "attention.head_count_kv": c.n_kv_heads,
        "attention.key_length": c.d_head, "attention.value_length": c.d_head,
        "attention.layer_norm_rms_epsilon": float(c.norm_eps),
        "rope.dimension_count": 2 * pairs,
        # Pair i of n turns by base^(-i/n) per token: with fewer pairs, a smaller base keeps the frequencies.
        "rope.freq_base": float(c.rope_theta) ** (2 * pairs / c.d_head)}
    if not c.dense:
        keys |= {
            "expert_count": c.n_routed, "expert_used_count": c.active_routed, "leading_dense_block_count": 0,
            "expert_feed_forward_length": c.expert_width,
            "expert_shared_count": max(1, c.shared_width // c.expert_width),
            "expert_gating_func": 2, "expert_weights_norm": True,          # 2: sigmoid
            "expert_weights_scale": float(c.routed_scale)}
    graph = "qwen3" if c.dense else "glm4moe"
    size = f"{c.total_params() / 1e6:.0f}M" + ("" if c.dense else f"-A{c.active_params() / 1e6:.0f}M")
    return {"general.architecture": graph, "general.type": "model", "general.name": f"MobileMoE {size}",
            "general.size_label": size, "general.file_type": FILE_TYPE[kind],
            "mobilemoe.expert_file_type": FILE_TYPE[experts],              # (for profile_device.py)
            "general.quantization_version": 2, "general.alignment": ALIGNMENT,
            **{f"{graph}.{key}": value for key, value in keys.items()}}


def tokenizer_metadata(tokenizer: dict, vocab_size: int, template: str) -> dict:
    """A checkpoint's tokenizer entry as GGUF keys. No chat template: one for common.encode_chat's format.

    tiktoken keeps ranks: of all neighbours that together are a token it joins those of lowest rank. llama.cpp
    wants merges, "left right" in order of priority. So every split of a token into two tokens is a merge,
    even where training made the token from one of them only. That is exact for any ranks, and the published
    Llama 3 has it so (280,147 merges for 128,000 tokens).
    """
    encoding = tokenizer_from_dict(tokenizer)
    specials = tokenizer["special_tokens"]                                 # {name: id}
    text, merges = vocabulary(encoding)
    # Tokenizers come from data.py or released.py. llama.cpp knows this split by name, and no other.
    assert tokenizer["pattern"] == LLAMA3_PATTERN and encoding.max_token_value < vocab_size

    tokens = [*text, *(f"[UNUSED_{n}]" for n in range(len(text), vocab_size))]
    # Control tokens are never made from what a user types, and never shown.
    types = np.repeat([1, 5], [len(text), vocab_size - len(text)])         # normal, unused
    for name, i in specials.items():
        tokens[i] = name
        types[i] = 3                                                       # control
    begin, end, *_, turn_end = (specials[name] for name in chat_names(encoding))
    keys = {"model": "gpt2", "pre": "llama-bpe", "tokens": tokens, "token_type": types, "merges": merges,
            "add_bos_token": True, "bos_token_id": begin, "eos_token_id": end, "eot_token_id": turn_end}
    return {**{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
            "tokenizer.chat_template": template or chat_template(encoding)}


def chat_template(encoding) -> str:
    """CHAT_TEMPLATE with the names of this tokenizer."""
    text = CHAT_TEMPLATE
    for ours, theirs in zip(CHAT_NAMES[0], chat_names(encoding)):
        text = text.replace(ours, theirs)
    return text


def vocabulary(encoding) -> tuple[list[str], list[str]]:
    """(tokens, merges) of the ranks, in visible characters."""
    ranks = encoding._mergeable_ranks                                      # {bytes: id}
    letters = byte_alphabet()
    text = {token: "".join([letters[byte] for byte in token]) for token in sorted(ranks, key=ranks.get)}
    merges = [f"{text[token[:cut]]} {text[token[cut:]]}" for token in text for cut in range(1, len(token))
              if token[:cut] in text and token[cut:] in text]
    return [*text.values()], merges


def byte_alphabet() -> dict[int, str]:
    """Byte -> visible character, as in GPT-2: GGUF strings must be UTF-8, the bytes of one token need not be.

    Printable Latin-1 stands for itself, the other 68 bytes become U+0100 onwards: a space reads 'Ġ'.
    """
    letters = {byte: chr(byte) for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + n) for n, byte in enumerate(others)}

# ----------------------------------------------------------------------------------------------------------
# Writing the file


def export(config: Config, tensor: Callable[[str], Tensor], tokenizer: dict, path: str | Path,
           dtype: str = "q4_0", qat: bool = False, experts: str = "", template: str = "") -> str:
    """Write `path` and return a line that says what was written.

    `tensor(name)` gives one tensor of our state_dict in any dtype, or (q, scale) of a matrix that is on the
    lattice already. It is called in file order, and what it returns is dropped before the next call. `qat`:
    the weights are QAT's masters (see `encode`). `experts`: another type for routed experts. Raises UserError
    for what llama.cpp could not load; then no file is left.
    """
    if config.n_routed > 512:                   # it aborts above (above 1,024 of late)
        raise UserError(f"llama.cpp has room for 512 experts, not for {config.n_routed}")
    if config.dense and config.rope_scaling:
        raise UserError("llama.cpp's graph for a dense model cannot do rope_scaling: train without it")
    kinds = DTYPES[dtype], EXPERTS[experts] if experts else DTYPES[dtype]
    plan = tensor_plan(config, *kinds)
    metadata = model_metadata(config, *kinds) | tokenizer_metadata(tokenizer, config.vocab_size, template)
    # All this does is copy and round. On a busy machine, waiting for other threads costs four times the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with atomic_write(path) as file:
        file.write(gguf_header(metadata, plan))
        for entry in plan:
            weight = tensor(entry.source) if entry.source else None
            if isinstance(weight, tuple):       # on the lattice already
                file.write(pack_q4_0(*map(entry.convert, weight)).numpy())
            else:
                weight = entry.convert(weight)
                assert tuple(weight.shape) == entry.shape, entry.name
                # Two million weights at a time: temporaries stay small enough for the processor's cache.
                for rows in weight.split(max(1, 2**21 // math.prod(entry.shape[1:]))):
                    file.write(encode(rows, entry, snap=qat and entry.is_matrix))
            file.write(bytes(-file.tell() % ALIGNMENT))
    torch.set_num_threads(threads)
    bits = 8 * sum(map(entry_bytes, plan)) / sum(math.prod(entry.shape) for entry in plan)
    return (f"{path}: {Path(path).stat().st_size / 1e6:.1f} MB, {len(plan)} tensors for "
            f"{metadata['general.architecture']}, {bits:.2f} bits per weight")


def encode(weight: Tensor, entry: Entry, snap: bool) -> np.ndarray:
    """weight [..., in] of any dtype, a part of entry's tensor -> its bytes in the file.

    Q4_0 *is* the lattice of QAT: the integers that training computed with are packed, and nothing is rounded
    twice. `snap` moves QAT's masters onto that lattice before another type stores them. Raises UserError for
    weights that are not finite, or too large for FP16 where that is stored: a phone would answer nonsense.
    """
    rows = weight.reshape(-1, weight.shape[-1]).float().contiguous()       # [rows, in]
    if snap and entry.kind != Q4_0:
        rows = dequantize(*int4_groups(rows, dim=1), dim=1)
    largest = rows.abs().max().item()
    if not largest <= LARGEST[entry.kind]:                                 # NaN is not, either
        raise UserError(f"{entry.source} holds {largest:g}; the file can hold {LARGEST[entry.kind]:g}")
    if entry.kind == Q4_0:
        return pack_q4_0(*int4_groups(rows, dim=1)).numpy()
    if entry.kind in (Q5_0, Q8_0):
        return (pack_q5_0 if entry.kind == Q5_0 else pack_q8_0)(rows).numpy()
    return rows.numpy().astype(np.float16 if entry.kind == F16 else np.float32)


def gguf_header(metadata: dict, plan: list[Entry]) -> bytearray:
    """Everything in front of the weights. Offsets count from its end."""
    pairs = [gguf_string(key) + gguf_value(value) for key, value in metadata.items()]
    header = bytearray(b"GGUF" + struct.pack("<IQQ", 3, len(plan), len(pairs)) + b"".join(pairs))
    offset = 0
    for entry in plan:
        dims = entry.shape[::-1]            # ggml names the innermost dimension first: [in, out, E]
        header += gguf_string(entry.name)
        header += struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, entry.kind, offset)
        offset += -(-entry_bytes(entry) // ALIGNMENT) * ALIGNMENT
    return header + bytes(-len(header) % ALIGNMENT)


def gguf_value(value) -> bytes:
    """Type number and value. int is uint32, float is float32. A list holds strings, a NumPy array int32."""
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, 5, len(value)) + value.astype("<i4").tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(gguf_string, value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    number, layout = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack("<I" + layout, number, value)


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def entry_bytes(entry: Entry) -> int:
    """Size in the file, without padding."""
    weights, size = BLOCK[entry.kind]
    return math.prod(entry.shape) // weights * size

# ----------------------------------------------------------------------------------------------------------
# Where the weights come from


def export_checkpoint(checkpoint_path: str | Path, path: str | Path, dtype: str = "q4_0", experts="") -> str:
    """Export a checkpoint that train.py wrote, or a released model. Raises UserError if it is damaged."""
    checkpoint = load_checkpoint(checkpoint_path)       # memory-mapped: a tensor is read when it is fetched
    if Path(path).exists() and Path(path).samefile(checkpoint_path):
        raise UserError(f"{path} is the checkpoint itself: choose another --out")
    tensor = dtype == "q4_0" and checkpoint.get("packed") or checkpoint["model"].__getitem__
    return export(config_from_dict(checkpoint["config"]), tensor, checkpoint["tokenizer"], path, dtype,
                  checkpoint["quantized"], experts, checkpoint.get("chat_template", ""))


def export_preset(name: str, path: str | Path, dtype: str = "q4_0") -> str:
    """Export random weights of a preset's shape, right in size and speed before anything is trained, with a
    vocabulary without meaning: all bytes, pairs of bytes, then triples."""
    # 8192 is the paper's longest context. Runtimes refuse prompts longer than the file says.
    config = dataclasses.replace(PRESETS[name], max_context=8192)
    state = empty_state(config)

    @functools.lru_cache(maxsize=1)         # gate and up come out of one tensor, asked for twice in a row
    def tensor(name: str) -> Tensor:
        shape = state[name].shape
        if len(shape) == 1:
            return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator) * config.init_std

    words = (n.to_bytes(length, "big") for length in (1, 2, 3) for n in range(256 ** length))
    ranks = dict(zip(words, range(config.vocab_size - len(SPECIAL_TOKENS))))
    return export(config, tensor, tokenizer_to_dict(make_tokenizer(ranks, "placeholder")), path, dtype)


def main():
    parser = Parser(description="Write a model as one .gguf file for llama.cpp.")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("checkpoint", nargs="?", help="a .pt file that train.py wrote, or a released folder")
    model.add_argument("--preset", choices=PRESETS, help="random weights of a known shape instead")
    parser.add_argument("--out", required=True, help="the .gguf file to write")
    parser.add_argument("--dtype", choices=DTYPES, default="q4_0", help="of the matrices (%(default)s)")
    parser.add_argument("--experts", choices=EXPERTS, default="", help="another type for routed experts (for "
                        "the released S-QAT: q4_0 714 MB, q5_0 847 MB, q8_0 1,245 MB, ever nearer to it)")
    parser.add_argument("--format", choices=("gguf", "hf"), default="gguf", help="hf: write a folder as the "
                        "released models come, in BF16 (%(default)s)")
    parser.add_argument("--ask", metavar="QUESTION", action="append", help="for llama.cpp (may repeat)")
    args = parser.parse_args()
    if args.preset and (args.format == "hf" or args.experts):
        raise UserError("--format hf and --experts are for a checkpoint: leave --preset out")
    if args.format == "hf":
        from released import write_folder
        return print(write_folder(load_checkpoint(args.checkpoint), Path(args.out)))
    if args.preset:
        print(export_preset(args.preset, args.out, args.dtype))
    else:
        print(export_checkpoint(args.checkpoint, args.out, args.dtype, args.experts))
    if args.ask:
        chats = [[{"role": "user", "content": question}] for question in args.ask]
        for question, answer in zip(args.ask, ask_llama_cpp(args.out, chats=chats)["answers"]):
            print(f"Q: {question}\nA: {answer}")


if __name__ == "__main__":
    run_main(main)
