"""INT4 weights and INT8 activations: the lattice, training on it, packing, and what INT4 costs.

The phone stores each weight in 4 bits and multiplies it with activations rounded to 8. Post-training
quantisation (PTQ) moves every weight of a finished model to the nearest of 16 values and hopes.
Quantisation-*aware* training (QAT, paper section 4) lets the forward pass see the phone's lattice while the
optimizer moves full-precision "master" weights behind it. So the model learns weights that are good *after*
rounding.

One lattice serves training, file and phone. A group is 32 weights along a matrix's input dimension. That is
the dimension a dot product runs along, so a whole group shares one scale inside the phone's integer loop:

    s = 2 max|W| / (2^4 - 1)        W_int4 = s * clamp(round(W / s), -8, 7)            (paper, equation 6)

and s is rounded to FP16 *here*, inside the fake quantiser, because FP16 is what the file stores. A group is
then the same 18 bytes as llama.cpp's Q4_0 block, and export_mobile.py only packs: nothing is ever rounded a
second time. Activations follow llama.cpp's Q8_0: blocks of 32 with scale max|x| / 127.

Everything is attached from outside, with torch.nn.utils.parametrize and hooks: mobilemoe.py has no branch
for QAT. What this file is not: a training loop (train.py) or a file format (export_mobile.py).

    python quantize.py runs/tiny/sft.pt     held-out bits per byte as trained, after PTQ, and after QAT if
                                            qat.pt stands beside it
"""
import argparse
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common import UserError, load_checkpoint, markdown_table, run_main, tokenizer_from_dict
from kernels import matmul_dtype
from mobilemoe import MLP, Attention, Experts, MobileMoE, bits_per_byte, model_from_checkpoint

GROUP = 32      # weights or activations that share one scale; fixed by the phone's block formats

# ----------------------------------------------------------------------------------------------------------
# The lattice


def int4_groups(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Equation 6. `dim` is the input dimension, a multiple of 32 long.

    -> q, int8 values -8..7 shaped like `weight`; scale, FP16, one for 32 weights: 32 times fewer along `dim`.
    """
    groups = weight.detach().float().unflatten(dim, (-1, GROUP))           # [..., dim/32, 32, ...]
    within = dim % weight.dim() + 1
    scale = (groups.abs().amax(within, keepdim=True) * (2 / 15)).half()    # [..., dim/32, 1, ...]
    # The integers are chosen for the *rounded* scale. Rounding the scale afterwards, when writing the file,
    # would shift all 32 weights by up to 0.05 %, and the file would not hold exactly what was trained.
    step = scale.float().masked_fill(scale == 0, 1)     # zeros (or what FP16 takes for zero) stay zeros
    q = (groups / step).round_().clamp_(-8, 7)
    return q.to(torch.int8).flatten(within - 1, within), scale.squeeze(within)


def dequantize(q: Tensor, scale: Tensor, dim: int) -> Tensor:
    """The FP32 weights that q and scale of int4_groups stand for."""
    within = dim % q.dim() + 1
    groups = q.unflatten(dim, (-1, GROUP)).float()                         # [..., dim/32, 32, ...]
    return (groups * scale.float().unsqueeze(within)).flatten(within - 1, within)


def int8_round_trip(x: Tensor) -> Tensor:
    """Activations as the phone sees them, in blocks of 32: [..., n] -> the same shape and dtype."""
    blocks = x.float().unflatten(-1, (-1, GROUP))                          # [..., n/32, 32]
    largest = blocks.abs().amax(-1, keepdim=True)                          # [..., n/32, 1]
    # To the letter as llama.cpp does it: multiply by 127 / max in FP32, but keep the scale in FP16.
    q = (blocks * (127 / largest.clamp_min(1e-30))).round_()
    return (q * (largest / 127).half().float()).flatten(-2).to(x.dtype)


class StraightThrough(torch.autograd.Function):
    """Forward a rounded tensor, backward as if it had not been rounded.

    The true gradient of round() is zero almost everywhere and would teach nothing. The common one-liner
    x + (rounded - x).detach() is *nearly* the rounded value; the phone's bits need exactly it.
    """

    @staticmethod
    def forward(ctx, x: Tensor, round_trip) -> Tensor:
        return round_trip(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def fake_quant(weight: Tensor, dim: int) -> Tensor:
    """The INT4 weights in FP32: what QAT computes with and what the exported file holds."""
    return StraightThrough.apply(weight, lambda w: dequantize(*int4_groups(w, dim), dim))


def fake_quant_activation(x: Tensor) -> Tensor:
    return StraightThrough.apply(x, int8_round_trip)

# ----------------------------------------------------------------------------------------------------------
# Attaching it to a model


class Int4Weight(nn.Module):
    """A parametrization: who reads the parameter gets its INT4 version, the optimizer has the master."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        return fake_quant(weight, self.dim)


def attach(model: MobileMoE) -> MobileMoE:
    """Make `model` compute as the phone does: INT4 matrices and embedding, INT8 inputs of each of them.

    Router, norms and expert_bias stay FP32, and so does the router's *input*: a choice of experts must not
    hinge on rounding. Activations are rounded where a matrix reads them, in the type that it multiplies in.
    """
    def round_input(module, inputs):
        return fake_quant_activation(inputs[0]), *inputs[1:]

    def round_output(module, inputs, output):
        return fake_quant_activation(output)

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | nn.Embedding):                   # [out, in], [V, D]
            parametrize.register_parametrization(module, "weight", Int4Weight(dim=1))
        elif isinstance(module, Experts):                                  # [E, D, 2F], [E, F, D]
            parametrize.register_parametrization(module, "gate_up_proj", Int4Weight(dim=1))
            parametrize.register_parametrization(module, "down_proj", Int4Weight(dim=1))
            module.swiglu.register_forward_hook(round_output)
        # One rounding serves q, k and v, and one serves gate and up: the same vector enters them.
        if isinstance(module, Attention | MLP | Experts) or name.endswith(("o_proj", "down_proj")):
            module.register_forward_pre_hook(round_input)
    # The output projection is the embedding, not a module of its own. It reads what the final norm puts out.
    model.model.norm.register_forward_hook(round_output)
    return model


def master_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """state_dict() under the released names, INT4 attached or not: the masters, never the rounded weights.

    Rounded weights must not be saved as masters. A group whose largest weight became 7 s instead of 7.5 s
    would get a smaller scale the next time it is quantised, and so on at every save.
    """
    return {re.sub(r"parametrizations\.(\w+)\.original", r"\1", name): tensor
            for name, tensor in model.state_dict().items()}

# ----------------------------------------------------------------------------------------------------------
# Packing to the phone's block formats


def pack_q4_0(q: Tensor, scale: Tensor) -> Tensor:
    """q [rows, in] int8 and scale [rows, in/32] FP16 -> Q4_0 blocks, uint8 [rows, in/32, 18].

    A block is the FP16 scale, then 16 bytes of nibbles = value + 8: element j in the low half of byte j and
    element j + 16 in its high half. (Not neighbours in one byte: SIMD code splits a register of bytes into
    two registers of 16 values.)
    """
    nibbles = (q + 8).to(torch.uint8).unflatten(-1, (-1, GROUP))           # [rows, in/32, 32]
    packed = nibbles[..., :16] | nibbles[..., 16:] << 4                    # [rows, in/32, 16]
    return torch.cat([scale.unsqueeze(-1).contiguous().view(torch.uint8), packed], dim=-1)


def unpack_int4(packed: Tensor) -> Tensor:
    """The released QAT models' bytes, uint8 [..., n/2] -> int8 -8..7 [..., n]: two's complement, low half
    first."""
    q = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)        # [..., n] 0..15
    return (q ^ 8).to(torch.int8) - 8


def pack_q5_0(weight: Tensor) -> Tensor:
    """weight [rows, in] -> Q5_0 blocks, uint8 [rows, in/32, 22]: FP16 scale, 32 fifth bits, 16 bytes of low
    halves.

    As ggml rounds: the largest weight of a block, whatever its sign, becomes -16 steps exactly.
    """
    blocks = weight.float().unflatten(-1, (-1, GROUP))                     # [rows, in/32, 32]
    scale = (blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -16).half()        # [rows, in/32, 1]
    step = scale.float().masked_fill(scale == 0, 1)
    q = (blocks / step + 16.5).floor().clamp(0, 31).to(torch.int64)
    fifth = (q >> 4 << torch.arange(GROUP)).sum(-1, keepdim=True).to(torch.int32)          # [rows, in/32, 1]
    nibbles = q.to(torch.uint8) & 15
    packed = nibbles[..., :16] | nibbles[..., 16:] << 4                    # [rows, in/32, 16]
    return torch.cat([scale.view(torch.uint8), fifth.view(torch.uint8), packed], dim=-1)


def pack_q8_0(weight: Tensor) -> Tensor:
    """weight [rows, in] -> Q8_0 blocks, uint8 [rows, in/32, 34]: FP16 scale = max|w| / 127, then 32 int8."""
    blocks = weight.float().unflatten(-1, (-1, GROUP))                     # [rows, in/32, 32]
    scale = blocks.abs().amax(-1, keepdim=True) / 127                      # [rows, in/32, 1]
    q = (blocks / scale.clamp_min(1e-30)).round().to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), q.view(torch.uint8)], dim=-1)

# ----------------------------------------------------------------------------------------------------------
# What INT4 costs, with and without training for it


def heldout_bits_per_byte(model: MobileMoE, checkpoint: dict) -> dict[str, float]:
    """Bits per byte of every domain's held-out text, which a checkpoint carries as token ids."""
    with parametrize.cached():      # round the weights once, not at every batch
        return {domain: bits_per_byte(model, held["ids"], held["bytes"], checkpoint["context"])
                for domain, held in checkpoint["heldout"].items()}


def comparison_table(results: dict[str, dict[str, float]]) -> str:
    """Results of heldout_bits_per_byte by name, as Markdown; in brackets the difference to the first."""
    first, *_ = results.values()
    rows = [[name, *(f"{bits[domain]:.4f} ({bits[domain] - first[domain]:+.4f})" for domain in first)]
            for name, bits in results.items()]
    return markdown_table(["held-out bits per byte", *first], rows)


def post_training_report(path: Path, folder: str | None = None) -> dict[str, dict[str, float]]:
    """What a checkpoint, the same after PTQ, and the qat.pt beside it (if any) make of the first one's
    held-out text, or that of a folder: {name: bits per byte by domain}. Raises UserError if the checkpoint is
    in INT4 already, or has no text."""
    checkpoint = load_checkpoint(path)
    if checkpoint["quantized"]:
        raise UserError(f"{path} is trained in INT4 already: give the checkpoint before it (sft.pt)")
    if folder:
        from data import folder_corpus, tokenize_heldout        # only here: a lattice needs no text
        encoding = tokenizer_from_dict(checkpoint["tokenizer"])
        checkpoint["heldout"] = tokenize_heldout(folder_corpus(folder), encoding)
    if not checkpoint["heldout"]:
        raise UserError(f"{path} brings no held-out text: give a folder of text by --data")
    model = model_from_checkpoint(checkpoint)
    model.compute_dtype = matmul_dtype(torch.device("cpu"))
    precision = "BF16" if model.compute_dtype == torch.bfloat16 else "FP32"
    results = {f"{path.stem}, {precision}": heldout_bits_per_byte(model, checkpoint)}
    model.compute_dtype = torch.float32     # INT4 in FP32 on its lattice, which is what the phone computes
    results[f"{path.stem}, rounded to INT4 (PTQ)"] = heldout_bits_per_byte(attach(model), checkpoint)
    trained = path.with_name("qat.pt")
    if trained.is_file():
        model = attach(model_from_checkpoint(load_checkpoint(trained)))
        results["qat, trained in INT4 (QAT)"] = heldout_bits_per_byte(model, checkpoint)
    return results


def main():
    parser = argparse.ArgumentParser(description="What INT4 costs: bits per byte of held-out text.")
    parser.add_argument("checkpoint", type=Path, help="one that is not yet in INT4, such as runs/tiny/sft.pt")
    parser.add_argument("--data", metavar="FOLDER", help="measure its text (a released model brings none)")
    args = parser.parse_args()
    print(comparison_table(post_training_report(args.checkpoint, args.data)))


if __name__ == "__main__":
    run_main(main)
