"""mobilemoe.py and kernels.py compute what they promise, by the word of others: PyTorch's own functions, the
loop over experts, closed formulas, and transformers' Glm4Moe with the same weights. The branch for GPUs is
held to the same, without a GPU."""
import contextlib
import copy
import dataclasses
import functools
import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import mobilemoe
import train
from common import UserError
from mobilemoe import PRESETS, MobileMoE, bits_per_byte, config_from_dict, generate
from quantize import attach

TEST = PRESETS["test"]                                      # 14 routed experts, top 2, beside a shared one
BARE = dataclasses.replace(TEST, shared_expert=False)       # 16 routed, top 4, nothing beside them
BUSY = dataclasses.replace(TEST, n_experts=1)               # 2 routed, top 2: all get every token
FP32, BF16 = torch.float32, torch.bfloat16
in_both_types = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["FP32", "BF16"])


class OnGPU(torch.Tensor):
    """A tensor in this computer's memory that says it is on a GPU, as does what is computed from it."""
    device = type("Device", (str,), {"type": "gpu"})("cpu")


@pytest.fixture(params=["cpu", "gpu"])
def on_device(request):
    """on_device(x): x itself, or x on that GPU. Memory that nobody wrote holds NaN, as it may on a real one:
    whoever reads it is found out."""
    torch.use_deterministic_algorithms(True)
    yield lambda x: x.as_subclass(OnGPU) if request.param == "gpu" else x
    torch.use_deterministic_algorithms(False)


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape, seed=0):
    return torch.randint(TEST.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got, want, dtype=FP32):
    """Within the rounding of dtype, against the largest entry, or 1 if that is larger."""
    error, scale = (got.float() - want).abs().max().item(), max(1, want.abs().max().item())
    assert error <= scale * {FP32: 1e-5, BF16: 3e-2}[dtype]


def assert_same(ours, theirs, *inputs, dtype=FP32):
    """Both functions give the same, and the same gradient of every input."""
    results = []
    for function in (ours, theirs):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        y = function(*leaves).float()
        y.backward(noise(*y.shape, seed=9))
        results.append([y, *(leaf.grad for leaf in leaves)])
    for got, want in zip(*results):
        assert_close(got, want, dtype)

# ----------------------------------------------------------------------------------------------------------
# Config: sizes, names, and what cannot be


@pytest.mark.parametrize("preset, active, total", [
    ("S", 272e6, 1.26e9), ("M", 528e6, 2.82e9), ("L", 922e6, 5.33e9), ("mobilellm-pro", 1.08e9, 1.08e9)])
def test_presets_have_the_papers_sizes_whatever_granularity_and_shared_expert(preset, active, total):
    for change in ({}, dict(granularity=2), dict(shared_expert=False)):
        config = dataclasses.replace(PRESETS[preset], **change)
        assert config.active_params() == pytest.approx(active, rel=0.005)
        assert config.total_params() == pytest.approx(total, rel=0.005)


def released_weights(c) -> dict[str, tuple[int, ...]]:
    """The released checkpoints' tensors and shapes, written out by hand."""
    D, q, kv, E, width = c.d_model, c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_routed, c.expert_width
    plain = c.d_ff if c.dense else c.shared_width
    mlp = {"gate_proj.weight": (plain, D), "up_proj.weight": (plain, D), "down_proj.weight": (D, plain)}
    if not c.dense:
        shared = {f"shared_expert.{name}": shape for name, shape in mlp.items() if c.shared_expert}
        mlp = {"router.weight": (E, D), "expert_bias": (E,), "experts.gate_up_proj": (E, D, 2 * width),
               "experts.down_proj": (E, width, D), **shared}
    layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
             "self_attn.q_proj.weight": (q, D), "self_attn.k_proj.weight": (kv, D),
             "self_attn.v_proj.weight": (kv, D), "self_attn.o_proj.weight": (D, q),
             **{f"feed_forward.{name}": shape for name, shape in mlp.items()}}
    return {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,),
            **{f"model.layers.{n}.{name}": shape for n in range(c.n_layers) for name, shape in layer.items()}}


@pytest.mark.parametrize("config", [*PRESETS.values(), BARE, BUSY])
def test_weights_have_the_released_names_and_the_counted_sizes(config):
    """One class for all: n_experts = granularity = 1 without a shared expert is a dense model."""
    with torch.device("meta"):                                  # shapes without memory
        shapes = {name: tuple(weight.shape) for name, weight in MobileMoE(config).state_dict().items()}
    assert shapes == released_weights(config)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(size.values())
    stacked = sum(n for name, n in size.items() if ".experts." in name)
    fp32 = sum(n for name, n in size.items() if any(part in name for part in ("norm", "router", "bias")))
    assert config.total_params() == total
    assert config.active_params() == total - stacked + stacked * config.active_routed // config.n_routed
    assert config.int4_bytes() == (total - fp32) / 32 * 18 + 4 * fp32
    keys = sum(shape[0] for name, shape in shapes.items() if "k_proj" in name)
    assert config.kv_bytes(10, bits=16) == 2 * config.kv_bytes(10) == 2 * 20 * keys
    assert config_from_dict(dataclasses.asdict(config)) == config


@pytest.mark.parametrize("change, says", [
    (dict(experts_n=3), "unknown field 'experts_n'"), (dict(d_ff=None), "d_ff is missing"),
    (dict(d_model=64.0), "d_model"), (dict(n_layers=0), "n_layers"), (dict(shared_expert=1), "shared_expert"),
    (dict(norm_eps=math.nan), "norm_eps"), (dict(top_k=15), "15 active"), (dict(d_head=33), "d_head = 33"),
    (dict(d_ff=64), "expert width"), (dict(d_model=72), "d_model = 72"), (dict(granularity=1), "shared")])
def test_an_impossible_config_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        config_from_dict({k: v for k, v in (dataclasses.asdict(TEST) | change).items() if v is not None})

# ----------------------------------------------------------------------------------------------------------
# Experts and router


@in_both_types
@pytest.mark.parametrize("capacity", [None, 1.5, 0.6])
@pytest.mark.parametrize("n", [1, 7, 64, 150])
@pytest.mark.parametrize("config", [TEST, BARE, BUSY], ids=["shared", "bare", "busy"])
def test_the_expert_layer_is_the_loop(lively, on_device, config, n, capacity, dtype):
    """One token leaves most experts idle, 150 overflow some."""
    moe = lively(config).model.layers[0].feed_forward
    loop = copy.deepcopy(moe)
    loop.experts.forward = functools.partial(mobilemoe.loop_over_experts, loop.experts)
    names, weights = zip(*moe.named_parameters())

    def output(moe, dtype):
        return lambda x, *weights: torch.func.functional_call(
            moe, dict(zip(names, weights)), (on_device(x), dtype, capacity))[0]
    assert_same(output(moe, dtype), output(loop, FP32), noise(1, n, 64), *weights, dtype=dtype)


def test_capacity_keeps_the_first_tokens_of_a_batch_and_dropless_keeps_all(lively):
    moe = lively().model.layers[0].feed_forward
    x = noise(TEST.d_model).expand(4, 50, -1)                   # 200 times the same token
    y, routing = moe(x, FP32, None)
    assert routing.dropped == 0 and routing.load.max() == 200
    assert_close(y, y[:1, :1].expand_as(y))
    y, routing = moe(x, FP32, 1.5)                              # ceil(1.5 * 200 * 2 / 14) = 43 stay
    assert routing.dropped == pytest.approx(1 - 43 / 200) and routing.load.max() == 200    # load counts all
    routed = (y - moe.shared_expert(x)).flatten(0, 1).abs().amax(1)         # [N]
    assert routed[:43].min() > 0.1 and routed[43:].max() < 1e-5


def test_bias_changes_who_is_chosen_but_not_how_much_they_count(lively):
    router, x, bias = lively().model.layers[0].feed_forward.router, noise(300, 64), torch.zeros(14)
    assert 0 < router(x, bias)[2][5] < 300
    bias[3], bias[5] = 5, -5                                    # everybody gets expert 3, nobody expert 5
    weights, experts, load, _ = router(x, bias)
    assert load[3] == 300 and load[5] == 0
    assert load.tolist() == np.bincount(experts.flatten(), minlength=14).tolist()
    chosen = torch.sigmoid(x @ router.weight.T).gather(1, experts)
    assert_close(weights, TEST.routed_scale * chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize("switch", ["z_loss", "balance_loss"])
def test_z_loss_and_switch_loss_are_their_formulas(lively, switch):
    router, x, bias = lively().model.layers[0].feed_forward.router, noise(50, 64), torch.zeros(14)
    router.config = dataclasses.replace(TEST, **{"z_loss": 0.0, "balance_loss": 0.0, switch: 0.5})
    _, experts, _, loss = router(x, bias)
    logits = (x @ router.weight.T).detach().double().numpy()    # [N, E]
    scores = 1 / (1 + np.exp(-logits))
    P = (scores / scores.sum(1, keepdims=True)).mean(0)
    f = np.bincount(experts.flatten(), minlength=14) / experts.numel()
    want = {"z_loss": (np.log(np.exp(logits).sum(1)) ** 2).mean(), "balance_loss": 14 * (f * P).sum()}
    assert loss.item() == pytest.approx(0.5 * want[switch], rel=1e-5)
    assert torch.autograd.grad(loss, router.weight)[0].abs().max() > 0


def test_router_and_residual_stream_are_fp32_whatever_compute_dtype(lively):
    model, seen = lively(), {}
    moe = model.model.layers[1].feed_forward
    for name, module in (("router", moe.router), ("experts", moe.experts), ("norm", model.model.norm)):
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    model.compute_dtype = BF16
    model(tokens(2, 8))
    assert {name: x.dtype for name, x in seen.items()} == {"router": FP32, "experts": BF16, "norm": FP32}
    assert not torch.equal(seen["router"], seen["router"].bfloat16())       # nor was it rounded on its way


def test_expert_bias_evens_out_a_skewed_router_in_fixed_steps(lively):
    model, imbalance = lively(dataclasses.replace(TEST, n_layers=1)), []
    moe = model.model.layers[0].feed_forward
    x = noise(1000, 64) + 0.3 * moe.router.weight[:3].sum(0)    # all lean towards three experts
    for _ in range(300):
        load = moe.router(x, moe.expert_bias)[2]
        imbalance.append(load.max() / load.mean())
        want = moe.expert_bias + 2e-3 * torch.sign(load.mean() - load)
        model.update_expert_bias(load[None], 2e-3)
        assert_close(moe.expert_bias, want)
    assert imbalance[0] > 2.5 and imbalance[-1] < 1.2
    assert "expert_bias" not in dict(moe.named_parameters())    # no optimizer may touch it

# ----------------------------------------------------------------------------------------------------------
# Norm, rotation, attention, loss, the whole model, and what it says


@in_both_types
def test_rms_norm_is_that_of_pytorch(dtype):
    assert_same(lambda x: kernels.rms_norm(x.to(dtype), 1e-2), lambda x: F.rms_norm(x, (32,), eps=1e-2),
                noise(3, 5, 32), dtype=dtype)


def test_rope_turns_interleaved_pairs_and_its_scaling_is_a_step_at_8192():
    c = dataclasses.replace(PRESETS["S"], rope_scaling=True)    # without: see Glm4Moe
    frequency = c.rope_theta ** (-np.arange(0, c.d_head, 2) / c.d_head)     # radians per token
    frequency = np.where(2 * np.pi / frequency > 8192, frequency / 16, frequency)
    positions, x = np.array([0, 1, 5, 2000]), noise(1, 1, 4, c.d_head)
    want = (x[..., ::2] + 1j * x[..., 1::2]).numpy() * np.exp(1j * positions[:, None] * frequency)
    y = mobilemoe.rotate(x, mobilemoe.rope_rotations(c, torch.from_numpy(positions)))
    np.testing.assert_allclose(y[..., ::2] + 1j * y[..., 1::2], want, atol=1e-3)


@in_both_types
@pytest.mark.parametrize("T, S", [(1, 1), (1, 300), (64, 64), (65, 65), (300, 300), (150, 300)])
@pytest.mark.parametrize("H, K", [(3, 1), (4, 2), (2, 2)])
def test_attention_is_that_of_pytorch(on_device, T, S, H, K, dtype):
    """For one block of queries and several, with and without tokens seen before."""
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    assert_same(lambda *qkv: kernels.causal_attention(*(on_device(x).to(dtype) for x in qkv)),
                lambda *qkv: F.scaled_dot_product_attention(*qkv, mask, enable_gqa=True),
                noise(2, H, T, 16), *noise(2, 2, K, S, 16, seed=1), dtype=dtype)


@in_both_types
@pytest.mark.parametrize("T", [9, 4, 1])
def test_attention_on_a_gpu_never_needs_the_kernel_that_writes_all_scores(monkeypatch, T, dtype):
    """FlashAttention (BF16, no mask) takes grouped heads. The kernel for the rest wants keys for each."""
    seen = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    q, k = (noise(1, heads, n, 16).to(dtype).as_subclass(OnGPU) for heads, n in ((6, T), (2, 9)))
    kernels.causal_attention(q, k, k)
    grouped = dtype == BF16 and T != 4                          # only chunks of a prompt need a mask
    assert seen.call_args.args[1].shape[1] == (2 if grouped else 6)
    assert seen.call_args.kwargs["enable_gqa"] == grouped


@pytest.mark.parametrize("capability, dtype", [((7, 5), FP32), ((8, 0), BF16), ((12, 0), BF16)])
def test_gpus_before_ampere_compute_in_fp32(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernels.matmul_dtype(torch.device("cuda:1")) == dtype


@pytest.mark.parametrize("config", [TEST, PRESETS["tiny-dense"]], ids=["moe", "dense"])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 5, 1, 6]], ids=["prefill", "one by one", "chunks"])
def test_cached_decoding_is_the_whole_pass(lively, on_device, config, chunks):
    model, x, cache = lively(config), tokens(3, 20), {}
    parts = [model(on_device(part), cache=cache) for part in x.split(chunks, dim=1)]
    assert_close(torch.cat(parts, dim=1), model(x))


@in_both_types
def test_linear_cross_entropy_is_the_plain_one(monkeypatch, dtype):
    monkeypatch.setattr(kernels, "CHUNK", 128)
    x, weight, targets = noise(300, 32), noise(77, 32, seed=1), tokens(300) % 77
    targets[::3] = -100                                         # no loss wanted
    targets[128:256] = -100                                     # nor in a whole chunk
    assert_same(lambda x, w: 100 * kernels.linear_cross_entropy(x.to(dtype), w, targets),
                lambda x, w: 100 * F.cross_entropy(x @ w.T, targets), x, weight, dtype=dtype)
    assert kernels.linear_cross_entropy(x, weight, torch.full_like(targets, -100)) == 0
    sure = kernels.linear_cross_entropy(torch.eye(2) * 1000, torch.eye(2), torch.tensor([1, 0]))
    assert sure.item() == pytest.approx(87.5, abs=0.01)         # as sure as can be, and wrong: finite


@pytest.mark.parametrize("config", [TEST, dataclasses.replace(TEST, n_heads=4, n_kv_heads=2, top_k=3)])
def test_the_whole_model_is_transformers_glm4moe(lively, config):
    """Logits, loss, and gradients at both ends of the model and in between."""
    pytest.importorskip("transformers")
    from lab.bench import glm_twin
    model, x, y = lively(config), tokens(2, 64), tokens(2, 64, seed=1)
    glm = glm_twin(model)
    theirs = glm(x, use_cache=False).logits
    assert theirs.std() > 0.5                                   # or 1e-4 would mean little
    torch.testing.assert_close(model(x), theirs, rtol=0, atol=1e-4)
    loss, want = 128 * model(x, y)[0], F.cross_entropy(theirs.flatten(0, 1), y.flatten(), reduction="sum")
    assert_close(loss, want)
    torch.autograd.backward([loss, want])
    block, twin = model.model.layers[0], glm.model.layers[0]
    assert_close(model.model.embed_tokens.weight.grad, glm.lm_head.weight.grad)
    assert_close(block.feed_forward.router.weight.grad, twin.mlp.gate.weight.grad)
    assert_close(block.feed_forward.experts.down_proj.grad.mT, twin.mlp.experts.down_proj.grad)


def test_bits_per_byte_counts_every_token_but_the_first_once(lively):
    model, ids = lively(), tokens(290)
    windows = [ids[start:start + 17] for start in range(0, 289, 16)]        # 18 of 16 targets, one of one
    nats = sum(F.cross_entropy(model(w[None, :-1])[0], w[1:], reduction="sum").item() for w in windows)
    bits = bits_per_byte(model, ids.tolist(), 123, context=16)              # 16 windows at a time
    assert bits == pytest.approx(nats / math.log(2) / 123, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_softmax_without_its_tail(lively, temperature):
    """Ids with less than a twentieth of the likeliest one's probability are never drawn (min-p)."""
    model, prompt = lively(dataclasses.replace(TEST, vocab_size=8)), [1, 2, 3]
    p = (model(torch.tensor([prompt]))[0, -1] / temperature).softmax(-1).detach().numpy()  # [V]
    drawn = [next(generate(model, prompt, 1, temperature=temperature, seed=seed)) for seed in range(500)]
    p[p < p.max() / 20] = 0
    assert np.bincount(drawn, minlength=8) / 500 == pytest.approx(p / p.sum(), abs=0.06)
    assert set(drawn) <= set(p.nonzero()[0])


def test_greedy_is_the_chain_of_argmaxes_and_a_stop_token_ends_it(lively):
    model, text, passes = lively(), tokens(5).tolist(), []
    for _ in range(12):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))       # no cache here
    prompt, answer, stop = text[:5], text[5:], text[11]
    for temperature in (0, 1e-4):
        assert list(generate(model, prompt, 12, temperature=temperature)) == answer
    assert list(generate(model, prompt, 12, temperature=0, stop=(stop,))) == answer[:answer.index(stop)]
    first, again, other = (list(generate(model, prompt, 12, temperature=2, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    model.register_forward_hook(lambda *_: passes.append(1))
    assert [i for _, i in zip(range(4), generate(model, prompt, 10**9, temperature=0))] == answer[:4]
    assert len(passes) == 4                                     # who stops reading pays for no more

# ----------------------------------------------------------------------------------------------------------
# The branch for GPUs never waits for one. (What it computes is tested above, wherever `on_device` stands.)


def train_and_decode_on_meta(config, capacity, int4):
    """Forward, backward, Muon, balancing and a cached answer, all without numbers. The meta device refuses to
    tell one, for which a GPU would have to be waited for; FakeTensorMode also refuses to mix devices."""
    for mode in (contextlib.nullcontext(), FakeTensorMode()):
        with mode, torch.device("meta"):
            model, x, cache = MobileMoE(config), torch.zeros(2, 48, dtype=torch.int64), {}
        with mode:
            model.compute_dtype = BF16
            model = attach(model) if int4 else model
            loss, routing = model(x, x, capacity_factor=capacity)
            (loss + routing.loss).backward()
            train.optimizers(model, train.TINY)[0].step()       # Muon; fused AdamW does not know this device
            model.update_expert_bias(routing.load, 1e-3)
            with torch.no_grad():
                logits = [model(part, cache=cache) for part in x.split([40, 1, 7], dim=1)]
            assert torch.cat(logits, dim=1).shape == (2, 48, config.vocab_size)


@pytest.mark.parametrize("int4", [False, True], ids=["plain", "INT4"])
@pytest.mark.parametrize("capacity", [None, 1.5])
@pytest.mark.parametrize("config", [TEST, PRESETS["tiny"], dataclasses.replace(PRESETS["S"], n_layers=2)])
def test_training_and_decoding_on_a_gpu_never_wait_for_it(monkeypatch, config, capacity, int4):
    monkeypatch.setattr(F, "grouped_mm", Mock(wraps=F.grouped_mm))
    train_and_decode_on_meta(config, capacity, int4)
    assert F.grouped_mm.call_count == 2 * config.n_layers * 4 * 2       # matmuls, layers, passes, modes


@pytest.mark.parametrize("fault", [
    torch.Tensor.tolist, torch.Tensor.cpu, lambda x: x.gather(1, torch.zeros_like(x, device="cpu"))])
def test_a_wait_or_a_tensor_elsewhere_would_be_found(monkeypatch, fault):
    place = kernels.place
    monkeypatch.setattr(kernels, "place", lambda experts, *rest: (fault(experts), place(experts, *rest))[1])
    with pytest.raises(RuntimeError):
        train_and_decode_on_meta(TEST, None, int4=False)
