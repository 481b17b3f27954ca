"""mobilemoe.py against naive loops, closed formulas and transformers' Glm4Moe."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mobilemoe
from mobilemoe import (
    PRESETS,
    Config,
    KVCache,
    LinearCrossEntropy,
    MobileMoE,
    MoE,
    Normalise,
    Router,
    Routing,
    UserError,
    attend,
    config_from_dict,
    generate,
    lay_out,
    rope_rotations,
    rotate,
)

TEST = PRESETS["test"]
DENSE = dataclasses.replace(TEST, n_experts=1, granularity=1, shared_expert=False)
BARE = dataclasses.replace(TEST, shared_expert=False)           # 16 routed, top 4, nothing beside them


def tokens(*shape, seed=0):
    return torch.randint(TEST.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# Config: sizes, costs, and what cannot be


@pytest.mark.parametrize("preset, active, total", [
    ("S", 272e6, 1.26e9), ("M", 528e6, 2.82e9), ("L", 922e6, 5.33e9), ("mobilellm-pro", 1.08e9, 1.08e9)])
def test_released_sizes(preset, active, total):
    assert PRESETS[preset].active_params() == pytest.approx(active, rel=0.005)
    assert PRESETS[preset].total_params() == pytest.approx(total, rel=0.005)


@pytest.mark.parametrize("config", [*PRESETS.values(), BARE, DENSE])
def test_counts_are_those_of_the_module(config):
    with torch.device("meta"):                                  # shapes without memory: preset L would not fit otherwise
        state = MobileMoE(config).state_dict()
    assert config.total_params() == sum(weight.numel() for weight in state.values())
    idle = 1 - config.active_routed / config.n_routed
    stacked = sum(weight.numel() for name, weight in state.items() if ".experts." in name)
    assert config.active_params() == config.total_params() - round(idle * stacked)
    fp32 = sum(weight.numel() for name, weight in state.items() if any(part in name for part in ("norm", "router", "bias")))
    assert config.int4_bytes() == (config.total_params() - fp32) / 32 * 18 + 4 * fp32


def test_costs_of_preset_s():
    s = PRESETS["S"]
    assert s.int4_bytes() == pytest.approx(713.9e6, rel=1e-3)
    assert s.kv_bytes(4096) == 2 * 4096 * 20 * 4 * 64           # keys and values, one byte each
    assert s.kv_bytes(4096, bits=16) == 2 * s.kv_bytes(4096)
    assert (s.train_flops_per_token(), s.inference_flops_per_token()) == (6 * s.active_params(), 2 * s.active_params())


def test_granularity_and_shared_expert_change_no_size():
    """They change what a token can combine, not what it costs; only the router is a little wider or narrower."""
    def without_router(config):
        return config.total_params() - (config.d_model + 1) * config.n_routed * config.n_layers * (not config.dense)
    for variant in (dict(granularity=2), dict(granularity=8), dict(shared_expert=False)):
        assert without_router(dataclasses.replace(TEST, **variant)) == without_router(TEST)
    assert (DENSE.dense, TEST.dense, BARE.dense) == (True, False, False)


@pytest.mark.parametrize("change, says", [
    (dict(granularity=6), "granularity 6"), (dict(d_model=72), "d_model = 72"), (dict(d_ff=64), "expert width"),
    (dict(n_heads=3, n_kv_heads=2), "3 query heads"), (dict(top_k=15), "15 active"), (dict(top_k=-1), "top_k"),
    (dict(granularity=1), "shared expert"), (dict(n_layers=0), "n_layers"), (dict(d_model=64.0), "d_model"),
    (dict(n_heads=1, n_kv_heads=1, d_head=48), "n_heads"), (dict(n_heads=32, n_kv_heads=32, d_head=33), "d_head = 33"),
    (dict(vocab_size=-5), "vocab_size")])
def test_impossible_configs_are_refused_in_one_line(change, says):
    with pytest.raises(UserError, match=says) as refusal:
        dataclasses.replace(TEST, **change)
    assert "\n" not in str(refusal.value)


def test_config_from_dict_names_what_is_wrong():
    values = dataclasses.asdict(TEST)
    assert config_from_dict(json.loads(json.dumps(values))) == TEST
    with pytest.raises(UserError, match="experts_n"):
        config_from_dict({**values, "experts_n": 3})
    with pytest.raises(UserError, match="d_ff"):
        config_from_dict({name: value for name, value in values.items() if name != "d_ff"})


def released_names(c: Config) -> dict[str, tuple[int, ...]]:
    """The released checkpoints' tensors and shapes, written out by hand."""
    D, q, kv, E, width, S = c.d_model, c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_routed, c.expert_width, c.shared_width
    layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,),
             "self_attn.q_proj.weight": (q, D), "self_attn.k_proj.weight": (kv, D), "self_attn.v_proj.weight": (kv, D),
             "self_attn.o_proj.weight": (D, q)}
    if c.dense:
        layer |= {"feed_forward.gate_proj.weight": (c.d_ff, D), "feed_forward.up_proj.weight": (c.d_ff, D),
                  "feed_forward.down_proj.weight": (D, c.d_ff)}
    else:
        layer |= {"feed_forward.router.weight": (E, D), "feed_forward.expert_bias": (E,),
                  "feed_forward.experts.gate_up_proj": (E, D, 2 * width), "feed_forward.experts.down_proj": (E, width, D)}
    if S:
        layer |= {f"feed_forward.shared_expert.{part}_proj.weight": (S, D) for part in ("gate", "up")}
        layer["feed_forward.shared_expert.down_proj.weight"] = (D, S)
    return {"model.embed_tokens.weight": (c.vocab_size, D), "model.norm.weight": (D,),
            **{f"model.layers.{n}.{name}": shape for n in range(c.n_layers) for name, shape in layer.items()}}


@pytest.mark.parametrize("config", [TEST, BARE, DENSE], ids=["moe", "no shared expert", "dense"])
def test_weights_have_the_released_names_and_shapes(config):
    assert {name: tuple(weight.shape) for name, weight in MobileMoE(config).state_dict().items()} == released_names(config)


def test_zero_init_outputs_starts_as_the_identity():
    """Every block adds nothing at first, so what comes out is the normalised embedding."""
    model = MobileMoE(dataclasses.replace(TEST, zero_init_outputs=True))
    x = tokens(2, 9)
    embedding = model.model.embed_tokens.weight
    torch.testing.assert_close(model(x), F.rms_norm(embedding[x], (TEST.d_model,), eps=TEST.norm_eps) @ embedding.T)


# ----------------------------------------------------------------------------------------------------------------------
# The expert layer against a loop over experts


def naive_moe(moe: MoE, x, capacity_factor):
    """The definition, one expert after the other. x [N, D] -> y [N, D], fraction of routes dropped."""
    c, (N, _) = moe.router.config, x.shape
    scores = torch.sigmoid(x @ moe.router.weight.T)                                        # [N, E]
    chosen = (scores + moe.expert_bias).argsort(dim=-1, descending=True)[:, :c.active_routed]
    capacity = N if capacity_factor is None else math.ceil(capacity_factor * N * c.active_routed / c.n_routed)
    y, dropped = torch.zeros_like(x), 0
    for e in range(c.n_routed):
        routed = [n for n in range(N) if e in chosen[n]]                                   # in the order of the tokens
        dropped += len(routed[capacity:])
        for n in routed[:capacity]:
            weight = c.routed_scale * scores[n, e] / scores[n, chosen[n]].sum()            # dropped or not, all share the sum
            gate, up = (x[n] @ moe.experts.gate_up_proj[e]).chunk(2)
            y[n] = y[n] + weight * ((gate * gate.sigmoid() * up) @ moe.experts.down_proj[e])
    if moe.shared_expert is not None:
        s = moe.shared_expert
        gate, up = x @ s.gate_proj.weight.T, x @ s.up_proj.weight.T
        y = y + (gate * gate.sigmoid() * up) @ s.down_proj.weight.T
    return y, dropped / (N * c.active_routed)


@pytest.fixture(params=["cpu", "gpu"])
def layout(request, monkeypatch):
    """The experts' rows laid out as for a CPU, and as for a GPU (grouped_mm), which a CPU can compute as well."""
    if request.param == "gpu":
        monkeypatch.setattr(mobilemoe, "lay_out", lambda *args: lay_out(*args[:-1], on_cpu=False))
        torch.use_deterministic_algorithms(True)        # unwritten memory holds NaN: whoever reads it is found out
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("capacity_factor", [None, 1.5, 0.6], ids=["dropless", "capacity 1.5", "capacity 0.6"])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 150])
@pytest.mark.parametrize("config", [TEST, BARE], ids=["shared", "bare"])
@pytest.mark.usefixtures("layout")
def test_expert_layer_is_the_naive_loop_in_values_and_gradients(lively, config, n, capacity_factor):
    moe = lively(config).model.layers[0].feed_forward
    x, direction = torch.randn(2, n, config.d_model, generator=torch.Generator().manual_seed(n)).unbind()
    results = []
    for function in (moe, naive_moe):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        if function is moe:
            y, routing = moe(leaf[None], capacity_factor)                                  # [1, N, D]
            y, dropped = y[0], routing.dropped.item()
        else:
            y, dropped = naive_moe(moe, leaf, capacity_factor)
        (y * direction).sum().backward()
        results.append((y, dropped, {"input": leaf.grad, **{name: p.grad for name, p in moe.named_parameters()}}))
    (y, dropped, grads), (want_y, want_dropped, want_grads) = results
    torch.testing.assert_close(y, want_y, rtol=1e-4, atol=1e-5)
    assert dropped == pytest.approx(want_dropped, abs=1e-6)
    if n == 150:                                                # enough tokens for some expert to overflow
        assert (dropped > 0) == (capacity_factor is not None)
    for name, grad in grads.items():
        scale = want_grads[name].abs().max().item()
        assert scale > 0, f"no gradient reaches {name}"
        torch.testing.assert_close(grad, want_grads[name], rtol=1e-4, atol=2e-5 * scale)


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("capacity_factor", [None, 1.5], ids=["dropless", "capacity 1.5"])
def test_every_expert_may_be_busy_with_every_token(lively, capacity_factor):
    """As many active experts as there are: the buffer must have room for N rows of each, in whole units."""
    everyone = dataclasses.replace(TEST, n_experts=1, granularity=4)
    moe, x = lively(everyone).model.layers[0].feed_forward, torch.randn(100, TEST.d_model)
    assert everyone.active_routed == everyone.n_routed
    y, routing = moe(x[None], capacity_factor)
    assert torch.allclose(y[0], naive_moe(moe, x, None)[0], atol=1e-5) and routing.dropped == 0


def test_dropless_loses_nothing_even_if_all_tokens_want_the_same_expert(lively):
    moe = lively().model.layers[0].feed_forward
    x = torch.randn(1, 1, TEST.d_model).expand(1, 200, -1)                                 # 200 times the same token
    y, routing = moe(x, None)
    assert routing.dropped == 0
    assert routing.load.max() == 200 and routing.load.sum() == 200 * TEST.active_routed
    torch.testing.assert_close(y, y[:, :1].expand_as(y))
    y, routing = moe(x, 1.5)                                                               # ceil(1.5 * 200 * 2 / 14) = 43 stay
    assert routing.dropped == pytest.approx(1 - 43 / 200) and routing.load.max() == 200    # load counts before the drop
    torch.testing.assert_close(y[:, 43:], moe.shared_expert(x[:, 43:]))


def test_a_batch_is_routed_as_one(lively):
    """[B, T] is one pool of B*T tokens: the same rows in any shape give the same result."""
    moe, x = lively().model.layers[0].feed_forward, torch.randn(4, 10, TEST.d_model)
    for factor in (None, 1.0):
        torch.testing.assert_close(moe(x, factor)[0], moe(x.view(1, 40, -1), factor)[0].view_as(x))


# ----------------------------------------------------------------------------------------------------------------------
# Router


@pytest.fixture
def router(lively) -> Router:
    return lively().model.layers[0].feed_forward.router


def test_bias_changes_who_is_chosen_but_not_how_much_they_count(router):
    x, bias = torch.randn(300, TEST.d_model), torch.zeros(TEST.n_routed)
    scores = torch.sigmoid(x @ router.weight.T)
    bias[3], bias[5] = 5.0, -5.0                                # everybody gets expert 3, nobody expert 5
    weights, experts, routing = router(x, bias)
    assert routing.load[3] == 300 and routing.load[5] == 0
    assert 0 < router(x, torch.zeros(TEST.n_routed))[2].load[5] < 300
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, TEST.routed_scale * chosen / chosen.sum(1, keepdim=True))
    torch.testing.assert_close(weights.sum(1), torch.full((300,), TEST.routed_scale))
    # The same bias for all is no preference.
    assert torch.equal(router(x, torch.full_like(bias, 0.25))[1], router(x, torch.zeros_like(bias))[1])


def test_load_counts_every_route(router):
    _, experts, routing = router(torch.randn(97, TEST.d_model), torch.zeros(TEST.n_routed))
    assert routing.load.tolist() == np.bincount(experts.flatten(), minlength=TEST.n_routed).tolist()


def test_z_loss_and_switch_loss_are_their_formulas(router):
    x = torch.randn(50, TEST.d_model)
    _, experts, routing = router(x, torch.zeros(TEST.n_routed))
    logits = (x @ router.weight.T).detach().double().numpy()                               # [N, E]
    assert routing.z_loss.item() == pytest.approx((np.log(np.exp(logits).sum(1)) ** 2).mean(), rel=1e-5)
    scores = 1 / (1 + np.exp(-logits))
    P = (scores / scores.sum(1, keepdims=True)).mean(0)
    f = np.bincount(experts.flatten(), minlength=TEST.n_routed) / experts.numel()
    assert routing.balance_loss.item() == pytest.approx(TEST.n_routed * (f * P).sum(), rel=1e-5)
    for loss in (routing.z_loss, routing.balance_loss):
        assert torch.autograd.grad(loss, router.weight, retain_graph=True)[0].abs().max() > 0


def test_perfectly_even_routing_has_a_switch_loss_of_one(router):
    torch.nn.init.zeros_(router.weight)                         # all scores 1/2
    assert router(torch.randn(10, TEST.d_model), torch.zeros(TEST.n_routed))[2].balance_loss.item() == pytest.approx(1)


def test_router_is_fp32_under_autocast(lively):
    model = lively()
    moe = model.model.layers[1].feed_forward
    x, seen = torch.randn(64, TEST.d_model), []
    plain = moe.router(x, moe.expert_bias)
    moe.router.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        cast = moe.router(x, moe.expert_bias)
        model(tokens(2, 8))
        assert moe.experts(x, *plain[:2], None)[0].dtype == torch.bfloat16                 # autocast is really on
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], cast[:2])) and cast[0].dtype == torch.float32
    assert seen == [torch.float32] * 2                          # what reaches it has not been through BF16 either


def test_expert_bias_steps_towards_an_even_load():
    model = MobileMoE(TEST)
    load = torch.full((TEST.n_layers, TEST.n_routed), 10.0)
    load[0, 0], load[0, 1] = 20, 0                              # mean stays 10
    model.update_expert_bias(load, 1e-3)
    first, second = (block.feed_forward.expert_bias for block in model.model.layers)
    assert first.tolist() == pytest.approx([-1e-3, 1e-3] + [0] * (TEST.n_routed - 2)) and not second.any()
    assert all("expert_bias" not in name for name, _ in model.named_parameters())          # no optimizer may touch it


def test_expert_bias_evens_out_a_skewed_router(lively):
    model = lively(dataclasses.replace(TEST, n_layers=1))
    moe = model.model.layers[0].feed_forward
    x = torch.randn(1000, TEST.d_model) + 0.3 * moe.router.weight[:3].sum(0)   # all lean towards three experts

    def imbalance():
        load = moe.router(x, moe.expert_bias)[2].load
        return load, (load.max() / load.mean()).item()
    assert imbalance()[1] > 2.5
    for step in range(300):
        model.update_expert_bias(imbalance()[0][None], 1e-2 * (1 - step / 300))
    assert imbalance()[1] < 1.2


# ----------------------------------------------------------------------------------------------------------------------
# Attention: positions and cache


def test_normalising_by_hand_is_pytorchs_rms_norm():
    x, grad = (torch.randn(3, 5, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    results = Normalise.apply(leaves[0], 1e-2), F.rms_norm(leaves[1], (24,), eps=1e-2)
    torch.autograd.backward(results, (grad, grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_rope_turns_interleaved_pairs():
    rotations = rope_rotations(TEST, torch.tensor([0, 5]))                                 # [2, d_head/2]
    for pair in (0, 1, TEST.d_head // 2 - 1):
        x = torch.zeros(1, 2, 1, TEST.d_head)
        x[..., 2 * pair], x[..., 2 * pair + 1] = 3.0, 4.0
        y = rotate(x, rotations)[0, :, 0]                                                  # [2, d_head]
        assert torch.equal(y[0], x[0, 0, 0])                                               # position 0 does not turn
        angle = 5 * TEST.rope_theta ** (-2 * pair / TEST.d_head)
        turned = [3 * math.cos(angle) - 4 * math.sin(angle), 3 * math.sin(angle) + 4 * math.cos(angle)]
        assert y[1, 2 * pair:2 * pair + 2].tolist() == pytest.approx(turned, abs=1e-5)
        assert y[1].count_nonzero() == 2


def test_rope_scaling_is_a_step_at_8192():
    position = torch.tensor([1])
    plain = rope_rotations(PRESETS["S"], position).angle()[0]                              # radians per token
    scaled = rope_rotations(dataclasses.replace(PRESETS["S"], rope_scaling=True), position).angle()[0]
    slowed = 2 * math.pi / plain > 8192
    assert 0 < slowed.sum() < len(slowed)
    torch.testing.assert_close(scaled, torch.where(slowed, plain / 16, plain))


@pytest.mark.parametrize("T, S", [(1, 1), (1, 300), (64, 64), (65, 65), (300, 300), (150, 300)])
@pytest.mark.parametrize("H, K", [(3, 1), (4, 2), (2, 2)])
def test_attention_in_blocks_is_that_of_pytorch(T, S, H, K):
    """Values and gradients, for one block of queries and several, with and without tokens seen before."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(2, heads, n, 16) for heads, n in ((H, T), (K, S), (K, S), (T, H)))
    mask, results = torch.ones(T, S, dtype=torch.bool).tril(S - T), []

    def pytorchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    for function in (attend, pytorchs):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = function(*leaves)                                                              # [B, T, H, d_head]
        y.backward(grad)
        results.append([y, *(x.grad for x in leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    low = attend(*(x.bfloat16() for x in (q, k, v)))
    torch.testing.assert_close(low.float(), results[1][0], rtol=0, atol=0.05)


@pytest.mark.parametrize("config", [TEST, DENSE], ids=["moe", "dense"])
@pytest.mark.parametrize("chunks", [[20], [1] * 20, [7, 1, 5, 1, 6]], ids=["prefill", "token by token", "chunked"])
def test_cached_decoding_is_the_full_forward(lively, config, chunks):
    model, x = lively(config), tokens(3, 20)
    cache = KVCache(config, 3, 24)
    parts = [model(part, cache=cache) for part in x.split(chunks, dim=1)]
    assert cache.length == 20
    torch.testing.assert_close(torch.cat(parts, dim=1), model(x), rtol=1e-4, atol=1e-4)


def test_no_position_sees_a_later_one(lively):
    model, x = lively(), tokens(1, 12)
    changed = x.clone()
    changed[0, 8] = (x[0, 8] + 1) % TEST.vocab_size
    difference = (model(x) - model(changed)).abs().amax(-1)[0]                             # [T]
    assert difference[:8].max() < 1e-5 and difference[8:].min() > 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# The whole model against transformers


@pytest.mark.parametrize("config", [TEST, dataclasses.replace(TEST, n_heads=4, n_kv_heads=2, routed_scale=1.0, top_k=3)],
                         ids=["preset", "other sizes"])
def test_logits_are_those_of_transformers_glm4moe(lively, config):
    transformers = pytest.importorskip("transformers")
    c, model = config, lively(config)
    glm = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.d_model, intermediate_size=c.d_ff, num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.d_head, attention_bias=False,
        use_qk_norm=True, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta, partial_rotary_factor=1.0,
        moe_intermediate_size=c.expert_width, n_routed_experts=c.n_routed, num_experts_per_tok=c.active_routed,
        n_shared_experts=c.shared_width // c.expert_width, routed_scaling_factor=c.routed_scale, norm_topk_prob=True,
        n_group=1, topk_group=1, first_k_dense_replace=0, num_mtp_layers=0, tie_word_embeddings=True)).eval()

    def evens_first(weight):                                    # it rotates (i, i + d_head/2) where we rotate (2i, 2i + 1)
        return weight.unflatten(0, (-1, c.d_head // 2, 2)).transpose(1, 2).flatten(0, 2)
    renamed = {}
    for name, weight in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = evens_first(weight)
        if ".experts." in name:
            weight = weight.transpose(1, 2)                     # [E, in, out] -> [E, out, in]
        name = name.replace("feed_forward.router", "mlp.gate").replace("feed_forward.shared_expert", "mlp.shared_experts")
        name = name.replace("feed_forward.expert_bias", "mlp.gate.e_score_correction_bias").replace("feed_forward", "mlp")
        renamed[name] = weight
    for n in range(c.n_layers):
        renamed |= {f"model.layers.{n}.self_attn.{q}_norm.weight": torch.ones(c.d_head) for q in "qk"}
    renamed["lm_head.weight"] = renamed["model.embed_tokens.weight"]
    glm.load_state_dict(renamed)                                # strict: neither side has a tensor the other lacks
    x = tokens(2, 64)
    with torch.no_grad():
        ours, theirs = model(x), glm(x).logits
    assert ours.std() > 0.5                                     # or 1e-4 would mean little
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Loss


def test_linear_cross_entropy_is_the_plain_one():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 32, generator=generator, requires_grad=True)                      # more rows than two chunks
    weight = torch.randn(77, 32, generator=generator, requires_grad=True)
    targets = torch.randint(77, (300,), generator=generator)
    targets[::3] = -100
    targets[128:256] = -100                                     # a whole chunk without loss
    loss = LinearCrossEntropy.apply(x, weight, targets, True, 128)
    want = F.cross_entropy(F.linear(x, weight), targets)
    torch.testing.assert_close(loss, want)
    got_grads, want_grads = (torch.autograd.grad(3 * value, (x, weight)) for value in (loss, want))
    for got, want_grad in zip(got_grads, want_grads):
        torch.testing.assert_close(got, want_grad, rtol=1e-4, atol=1e-6)
    assert LinearCrossEntropy.apply(x, weight, targets, False, 128) == loss                # measuring costs no gradients
    assert LinearCrossEntropy.apply(x, weight, torch.full_like(targets, -100), True) == 0
    sure = torch.eye(2) * 1000                                  # as sure as can be, and wrong: finite
    assert LinearCrossEntropy.apply(sure, torch.eye(2), torch.tensor([1, 0]), True).item() == pytest.approx(87.5, abs=0.01)


def test_model_loss_is_the_cross_entropy_of_its_logits(lively):
    model, x, y = lively(), tokens(2, 16), tokens(2, 16, seed=1)
    y[0, :5] = -100
    loss, routing = model(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(model(x).flatten(0, 1), y.flatten()))
    assert isinstance(routing, Routing) and routing.load.shape == (TEST.n_layers, TEST.n_routed)
    assert routing.load.sum(1).tolist() == [32 * TEST.active_routed] * TEST.n_layers
    assert lively(DENSE)(x, y)[1] is None


# ----------------------------------------------------------------------------------------------------------------------
# Generation


class Fixed:
    """Stands in for a model: the same four probabilities whatever came before."""
    PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])

    def __init__(self):
        self.config = TEST
        self.model = torch.nn.Module()
        self.model.embed_tokens = torch.nn.Embedding(4, 1)

    def __call__(self, tokens, cache):
        return self.PROBABILITIES.log().expand(1, tokens.shape[1], 4)


def test_greedy_is_the_chain_of_argmaxes(lively):
    model, prompt = lively(), tokens(5).tolist()
    want = list(prompt)
    for _ in range(12):
        want.append(int(model(torch.tensor([want]))[0, -1].argmax()))                      # no cache here
    assert generate(model, prompt, 12, temperature=0) == want[5:]
    for options in (dict(top_k=1), dict(top_p=1e-6), dict(top_p=0.0), dict(temperature=1e-4)):
        assert generate(model, prompt, 12, **{"temperature": 1.0, **options}) == want[5:], options


def test_a_seed_decides_the_sample(lively):
    model, prompt = lively(), [1, 2, 3]
    samples = [tuple(generate(model, prompt, 20, temperature=2.0, seed=seed)) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("options, possible", [
    (dict(), {0, 1, 2, 3}), (dict(top_k=2), {1, 3}), (dict(top_p=0.75), {1, 3}), (dict(top_p=0.85), {1, 2, 3}),
    (dict(top_p=0.85, top_k=2), {1, 3})])
def test_top_k_and_top_p_keep_the_likeliest(options, possible):
    """top_p keeps the smallest set that reaches the mass: 0.5 + 0.3 for 0.75, one more for 0.85."""
    drawn = generate(Fixed(), [0], 400, temperature=1.0, **options)
    assert set(drawn) == possible
    mass = Fixed.PROBABILITIES[list(possible)].sum().item()
    assert drawn.count(1) / 400 == pytest.approx(0.5 / mass, abs=0.08)                     # what is left keeps its proportions


def test_temperature_sharpens_and_flattens():
    share = [generate(Fixed(), [0], 400, temperature=t).count(1) / 400 for t in (0.5, 1.0, 10.0)]
    assert share == pytest.approx([0.25 / 0.365, 0.5, 0.27], abs=0.08)


def test_stop_tokens_end_a_text_and_are_not_part_of_it(lively):
    model, prompt = lively(), [1, 2, 3]
    free = generate(model, prompt, 20, temperature=0)
    end = free[6]
    assert generate(model, prompt, 20, temperature=0, stop=(end,)) == free[:free.index(end)]


def test_tokens_stream_as_they_are_made(lively):
    seen, lengths = [], []

    def on_token(token):
        seen.append(token)
        lengths.append(len(seen))
        if len(seen) == 4:
            raise KeyboardInterrupt                             # a reader who has had enough: the first four were there
    with pytest.raises(KeyboardInterrupt):
        generate(lively(), [1, 2], 10, temperature=0, on_token=on_token)
    assert seen == generate(lively(), [1, 2], 10, temperature=0)[:4]


def test_generation_needs_a_beginning(lively):
    with pytest.raises(UserError, match="empty prompt"):
        generate(lively(), [], 5)
    assert generate(lively(), [1], 0) == []
