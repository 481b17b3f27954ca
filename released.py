"""The released MobileMoE: read a Hugging Face folder as a checkpoint, and write our models as such a folder.

Meta released MobileMoE-S, -M and -L, each as Base, SFT and QAT. You accept the licence and download a folder:

    config.json             the shape, and what is computed between the weights
    *.safetensors           weights: 8 bytes of header length, a JSON header, then the numbers
    tokenizer.json          byte-level BPE, and the special tokens
    tokenizer_config.json   among others the chat template (or chat_template.jinja; Base has none)

common.load_checkpoint calls read_folder for a folder, so every script that takes a checkpoint takes one:

    python mobilemoe.py MobileMoE-S-SFT "Why is the sky blue?"
    python export_mobile.py MobileMoE-S-QAT --out S.gguf --experts q5_0
    python train.py sft --from MobileMoE-S-SFT --data chats --tokens 1e6 --batch 8192 --run runs/mine
    python export_mobile.py runs/tiny/sft.pt --out tiny-hf --format hf          the way back

Weights stay in their files, mapped into memory: one is read when it is asked for. What is not computed here
is refused by its name. Nothing in a folder is executed or unpickled; a chat template is text, rendered in
jinja2's sandbox. What it is not: a download, or a second model: mobilemoe.py computes what the folders mean.
"""
# Why can experts of a QAT folder not go to a phone exactly, in 4 bits? A scale serves 32 weights. For the
# experts the release lays these 32 along a matrix's *output*, while ggml's blocks, like all other matrices
# of the release, lie along its *input*, where a dot product runs. So 32 scales of the folder meet in one
# block, which has room for one. Reordering or scaling rows does not help. The weights are known exactly, but
# must be rounded again, along the input: Q4_0 as small as before, Q5_0 or Q8_0 nearer (`--experts`).
import dataclasses
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from common import UserError, atomic_write, chat_names, encode_chat, read_json, tokenizer_from_dict
from data import LLAMA3_PATTERN, tokenizer_to_dict
from export_mobile import byte_alphabet, chat_template, empty_state, vocabulary
from mobilemoe import Config, config_from_dict
from quantize import dequantize, int4_groups, unpack_int4

# ----------------------------------------------------------------------------------------------------------
# config.json

# What mobilemoe.py computes, in the words of config.json. Absent means the same, as transformers does not
# write its own defaults; only rope_scaling and quantization may be absent and mean "none".
COMPUTED = {
    "model_type": "mobilemoe", "hidden_act": "silu", "use_qk_norm": True, "tie_word_embeddings": True,
    "norm_topk_prob": True, "attention_bias": False, "attn_temperature_tuning": False,
    "interleave_moe_layer_step": 1, "no_rope_layers": 1, "layer_types": "full_attention",
    "rope_scaling": {"rope_type": "llama3", "factor": 16, "original_max_position_embeddings": 8192,
                     "low_freq_factor": 1, "high_freq_factor": 1},
    "quantization_config": "none",          # where other formats describe themselves
    "quantization": {"format": "mobilemoe-int4-g32", "group_size": 32, "embedding_group_size": 32,
                     "scale_dtype": "float16", "linear_group_axis": "in", "expert_group_axis": "out"}}
OF_EVERY_LAYER = ("no_rope_layers", "layer_types")      # lists; in the first, 1 means that RoPE is *on*
SIZES = {"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
         "num_key_value_heads": "n_kv_heads", "head_dim": "d_head", "num_experts_per_tok": "top_k",
         "vocab_size": "vocab_size", "max_position_embeddings": "max_context", "rms_norm_eps": "norm_eps",
         "rope_theta": "rope_theta", "routed_scaling_factor": "routed_scale"}


def is_computed(value, want) -> bool:
    """Is a value of config.json the one that mobilemoe.py computes?"""
    if isinstance(value, list):
        return all(is_computed(one, want) for one in value)
    if isinstance(value, dict) and isinstance(want, dict):
        return all(is_computed(value.get(name), part) for name, part in want.items())
    return value == want or str(value).startswith(f"{want} (")      # "in (last dim of [out, in])"


def read_config(path: Path) -> tuple[Config, dict]:
    """-> (our config, all of config.json). Raises UserError for what mobilemoe.py does not compute."""
    values = read_json(path)
    try:
        for name, want in COMPUTED.items():
            value = values.get(name)
            if value is not None and not is_computed(value, want):
                raise UserError(f"{path}: {name} is {value}; this model computes {want} only")
        sizes = {ours: values[theirs] for theirs, ours in SIZES.items()}
        # A shared expert is as wide as half of the g thin ones that would be active, and takes their place.
        width = values["intermediate_size"]
        half = values["intermediate_size_mlp"] // width
        n_experts = (values["num_local_experts"] + half) // (2 * half)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{path} is no config of a MobileMoE: {error!r}") from None
    sizes |= {"d_ff": 2 * half * width, "granularity": 2 * half, "n_experts": n_experts,
              "rope_scaling": bool(values.get("rope_scaling"))}
    return config_from_dict(sizes), values

# ----------------------------------------------------------------------------------------------------------
# *.safetensors

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}


def open_tensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a .safetensors file, mapped into memory, not read. Raises UserError if it is cut."""
    try:
        data = torch.from_numpy(np.memmap(path, np.uint8, "c"))     # "c": what is written stays in memory
        start = 8 + data[:8].view(torch.int64).item()
        header = json.loads(data[8:start].numpy().tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            numbers = data[start + first:start + end].view(DTYPES[entry["dtype"]])
            tensors[name] = numbers.view(entry["shape"])
        return tensors
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is cut off or foreign: {str(error).splitlines()[0]}") from None


class Weights(dict):
    """{our name: a tensor of our state_dict}, made of the folder's tensors each time that it is asked for.

    QAT keeps a matrix [..., n] as "qweight" uint8 [..., n/2], two numbers in a byte, and "scale" FP16
    [..., n/32]. The last dimension is the input of linears and embedding, [out, in], but the *output* of
    experts, [E, in, out]. Raises UserError for a tensor that is missing, foreign or of another shape.
    """

    def __init__(self, folder: Path, config: Config, int4: bool):
        stored = {}
        for path in sorted(folder.glob("*.safetensors")):
            stored |= open_tensors(path)
        wanted = {}                         # name in the folder: shape
        for name, tensor in empty_state(config).items():
            parts = {name: [*tensor.shape]}
            if int4 and is_matrix(name, tensor):
                *rest, n = tensor.shape
                parts = {re.sub("(weight|proj)$", "qweight", name): [*rest, n // 2],
                         re.sub("_proj$", "", name) + "_scale": [*rest, n // 32]}
            wanted |= parts
            self[name] = [stored.get(part) for part in parts]
        found = {name: [*tensor.shape] for name, tensor in stored.items()}
        for name in sorted(wanted.keys() | found.keys()):
            has, asks = found.get(name, "no such tensor"), wanted.get(name, "no such tensor")
            if has != asks:
                raise UserError(f"{folder}: {name}: the folder has {has}, its config.json asks for {asks}")

    def __getitem__(self, name: str) -> Tensor:
        q, *scale = super().__getitem__(name)
        return dequantize(unpack_int4(q), *scale, dim=-1) if scale else q

    def packed(self, name: str) -> Tensor | tuple[Tensor, Tensor]:
        """(q, scale) of a matrix whose groups lie along its input: they *are* Q4_0. Else the tensor."""
        q, *scale = super().__getitem__(name)
        return (unpack_int4(q), *scale) if scale and q.dim() == 2 else self[name]


def is_matrix(name: str, tensor: Tensor) -> bool:
    """Is this tensor of ours in 4 bits after QAT? All are but norms, routers and their biases."""
    return tensor.dim() > 1 and "router" not in name

# ----------------------------------------------------------------------------------------------------------
# tokenizer.json


def read_tokenizer(path: Path) -> tiktoken.Encoding:
    """tokenizer.json as tiktoken takes it: from merges to ranks, which are the ids.

    tiktoken joins *any* two neighbours that are a token together, the one of lowest id first. A list of
    merges says the same if it has every such pair, in the order of the tokens they make. Llama 3's does.
    Raises UserError for one that does not.
    """
    file = read_json(path)
    byte = {letter: byte for byte, letter in byte_alphabet().items()}
    try:
        special = {token["content"]: token["id"] for token in file["added_tokens"]}
        ids = {text: number for text, number in file["model"]["vocab"].items() if text not in special}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in file["model"]["merges"]]
        made = [ids[left + right] for left, right in merges]
        pairs = sum(text[:cut] in ids and text[cut:] in ids for text in ids for cut in range(1, len(text)))
        split = file["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        if split != LLAMA3_PATTERN or file["normalizer"] or made != sorted(made) or len(made) != pairs:
            raise UserError(f"{path}: neither tiktoken nor llama.cpp cuts text in this way")
        ranks = {bytes(map(byte.__getitem__, text)): number for text, number in ids.items()}
        encoding = tiktoken.Encoding(path.parent.name, pat_str=split, mergeable_ranks=ranks,
                                     special_tokens=special)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no tokenizer of a MobileMoE: {error!r}") from None
    chat_names(encoding)                    # refuses one without tokens for a chat
    return encoding

# ----------------------------------------------------------------------------------------------------------
# A folder as a whole


def read_folder(folder: Path) -> dict:
    """A folder as the checkpoint that every script takes. Raises UserError for what is damaged or foreign."""
    config, values = read_config(folder / "config.json")
    int4 = bool(values.get("quantization"))
    weights = Weights(folder, config, int4)
    encoding = read_tokenizer(folder / "tokenizer.json")
    file = folder / "chat_template.jinja"
    template = (file.read_text(encoding="utf-8", errors="replace") if file.is_file() else
                read_json(folder / "tokenizer_config.json").get("chat_template")) or ""
    if template:
        compare_template(folder, template, encoding)
    eos = values.get("eos_token_id") or []
    return {"format": "mobilemoe/1", "config": dataclasses.asdict(config), "model": weights,
            "stage": "qat" if int4 else "sft" if template else "midtrain",
            "quantized": False,             # or scripts would put our lattice on top of the folder's own
            "packed": weights.packed, "context": config.max_context, "tokenizer": tokenizer_to_dict(encoding),
            "chat_template": template, "eos": eos if isinstance(eos, list) else [eos],
            "heldout": {}, "sft_heldout": "[]", "history": []}


def render_chat(template: str, encoding, messages: list[dict], reply: bool) -> str:
    """What an app makes of a conversation by this template. It is foreign text: hence jinja2's sandbox."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)     # as transformers has it
    return jinja.from_string(template).render(messages=messages, bos_token=chat_names(encoding)[0],
                                              add_generation_prompt=reply)


def compare_template(folder: Path, template: str, encoding: tiktoken.Encoding):
    """Say so in a line if the folder's template, which apps use, is not what these scripts encode."""
    chat = [{"role": "user", "content": "How? "}, {"role": "assistant", "content": "So."},
            {"role": "user", "content": "Why?"}]
    for messages in (chat[:1], chat):
        try:
            text = render_chat(template, encoding, messages, reply=True)
        except Exception as error:          # a template may raise what it likes
            text = repr(error)
        if encoding.encode(text, allowed_special="all") != encode_chat(encoding, messages, reply=True):
            print(f"note: {folder}: its chat template makes {text!r} of a chat; these scripts encode it "
                  "otherwise", file=sys.stderr)
            return


def tokenizer_json(tokenizer: dict) -> dict:
    """The opposite of read_tokenizer: a checkpoint's tokenizer as `tokenizers` reads it."""
    text, merges = vocabulary(tokenizer_from_dict(tokenizer))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [{"id": i, "content": name, "special": True, **flags}
             for name, i in tokenizer["special_tokens"].items()]
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"version": "1.0", "added_tokens": added, "normalizer": None, "decoder": level,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(text)}, "merges": merges}}


def write_folder(checkpoint: dict, out: Path) -> str:
    """Write a checkpoint as a folder, in BF16 but for routers and biases, and return a line that says so.

    Weights of QAT go as QAT computed with them, as near as BF16 is. Raises UserError for a model that the
    format has no words for.
    """
    c = config_from_dict(checkpoint["config"])
    if not c.shared_expert:
        raise UserError("a MobileMoE folder has a shared expert beside the others; this model has none")
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out")

    def tensor(name: str) -> Tensor:
        weight = checkpoint["model"][name]
        on_lattice = checkpoint["quantized"] and is_matrix(name, weight)
        return dequantize(*int4_groups(weight, dim=1), dim=1) if on_lattice else weight

    encoding = tokenizer_from_dict(checkpoint["tokenizer"])
    begin, end, *_, turn = chat_names(encoding)
    config = {name: value for name, value in COMPUTED.items() if "quantization" not in name}
    config |= {name: [config[name]] * c.n_layers for name in OF_EVERY_LAYER}
    config |= {theirs: getattr(c, ours) for theirs, ours in SIZES.items()}
    config |= {"intermediate_size": c.expert_width, "intermediate_size_mlp": c.shared_width,
               "num_local_experts": c.n_routed, "num_experts_per_tok": c.active_routed,
               "rope_scaling": config["rope_scaling"] if c.rope_scaling else None,
               "architectures": ["MobileMoEForCausalLM"], "torch_dtype": "bfloat16",
               "eos_token_id": [*map(encoding.encode_single_token, (end, turn))]}
    words = {"bos_token": begin, "eos_token": end, "tokenizer_class": "PreTrainedTokenizerFast"}
    if checkpoint["stage"] in ("sft", "qat"):
        template = checkpoint.get("chat_template") or chat_template(encoding)
        words |= {"eos_token": turn, "chat_template": template}
    files = {"config.json": config, "tokenizer_config.json": words,
             "tokenizer.json": tokenizer_json(checkpoint["tokenizer"])}
    with tempfile.TemporaryDirectory(dir=out.absolute().parent) as scratch:     # all of the folder, or none
        made = Path(scratch, "folder")
        made.mkdir()
        write_tensors(empty_state(c), tensor, made / "model.safetensors")
        for name, values in files.items():
            with atomic_write(made / name) as file:
                file.write(json.dumps(values, indent=1).encode())
        made.rename(out)
    return f"{out}: {(out / 'model.safetensors').stat().st_size / 1e6:.1f} MB, BF16, as Hugging Face has it"


def write_tensors(shapes: dict[str, Tensor], tensor: Callable[[str], Tensor], path: Path):
    """One .safetensors file. `shapes` has the names, tensor(name) is asked for one after another."""
    header = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, entry in shapes.items():
        dtype = "F32" if "router" in name or "bias" in name else "BF16"     # (see mobilemoe.Router)
        start, end = end, end + entry.numel() * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": [*entry.shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(tensor(name).to(DTYPES[header[name]["dtype"]]).contiguous().view(torch.uint8).numpy())
