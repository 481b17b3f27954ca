"""Muon, the optimizer of short runs: momentum whose update is made orthogonal.

A few directions dominate the gradient of a matrix. Muon (Jordan 2024) replaces the momentum by the nearest
orthogonal matrix, so that every direction moves equally far at every step. What it is not: for embedding,
router and norms, which keep AdamW (train.optimizers).

torch.optim.Muon takes single matrices only. Here a stack of experts [E, in, out] is E matrices, made
orthogonal in one batch. Nothing to run.
"""
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels import matmul_dtype


def orthogonal(g: Tensor) -> Tensor:
    """[..., rows, cols] -> the nearest (semi-)orthogonal matrices, by five Newton-Schulz iterations."""
    x = (g / (g.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(matmul_dtype(g.device))
    x = x.reshape(-1, *g.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x                             # the small Gram matrix is the cheap one
    for _ in range(5):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return (x.mT if tall else x).reshape(g.shape).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Each group says how many matrices lie "side_by_side" in its tensors, two (gate and up) or one, and that
    they move "every" so many batches.

    An expert sees only A of E tokens. So experts gather momentum from every batch, but move on every fourth
    only, four times as far: nearly as good (1.689 against 1.678 bits) in 71 s, not 80 (docs/experiments.md).
    """

    def __init__(self, groups: list[dict], d_model: int, momentum: float = 0.95):
        super().__init__(groups, dict(lr=0.0, momentum=momentum, d_model=d_model, batches=0))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["batches"] += 1
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                if group["batches"] % group["every"]:
                    continue
                g = p.grad.lerp(momentum, group["momentum"])               # Nesterov
                # FSDP cuts along dimension 0. That leaves a stack of experts whole matrices: each rank does
                # its own. A single matrix loses rows, and all rows together decide: gather it, keep our part.
                single = g.dim() == 2
                parts = (whole(g) if single else local(g)).chunk(group["side_by_side"], dim=-1)
                update = torch.cat([orthogonal(part) for part in parts], dim=-1)
                # An orthogonal matrix has smaller entries the longer it is: scale by its length over its
                # width. But experts are slices of a dense feed-forward, whose weights must move as far as
                # there, however thin the slice: over d_model (4.34 against 4.38 nats, docs/experiments.md).
                shape = parts[0].shape[-2:]
                scale = (max(shape) / (min(shape) if single else group["d_model"])) ** 0.5
                local(p).add_(part_of(update, p) if single else update, alpha=-group["lr"] * scale)

# ----------------------------------------------------------------------------------------------------------
# A tensor in parts on many ranks (FSDP2), or in one piece on one


def whole(x: Tensor) -> Tensor:
    """The full tensor from its parts on all ranks, which must all ask for it; any other tensor as it is."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """This rank's part, sharing memory; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def part_of(x: Tensor, p: Tensor) -> Tensor:
    """Of an `x` that every rank has, the part that this rank keeps of `p`."""
    if not isinstance(p, DTensor):
        return x
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None).to_local()
