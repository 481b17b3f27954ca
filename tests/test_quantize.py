"""quantize.py against equation 6 by hand, the official gguf reader, and llama.cpp's rounding rewritten in NumPy."""
import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch

import quantize
from mobilemoe import PRESETS, KVCache, MobileMoE, load_checkpoint, model_from_checkpoint
from quantize import (
    attach,
    dequantize,
    fake_quant,
    fake_quant_activation,
    int4_groups,
    int8_round_trip,
    master_state_dict,
    pack_q4_0,
    pack_q8_0,
)

TEST = PRESETS["test"]
DENSE = dataclasses.replace(TEST, n_experts=1, granularity=1, shared_expert=False)


def rows(*shape, seed=0):
    """Weights of very different sizes, as rows of one matrix have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)


def tokens(*shape, seed=0):
    return torch.randint(TEST.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# The lattice


def test_equation_6_by_hand():
    weights = torch.zeros(1, 32)
    weights[0, :7] = torch.tensor([7.5, -7.5, 3.2, -3.7, 0.4, -0.6, 7.4])                  # max |W| = 7.5, so s = 1
    q, scale = int4_groups(weights, dim=1)
    assert scale.tolist() == [[1.0]]
    assert q[0, :8].tolist() == [7, -8, 3, -4, 0, -1, 7, 0]                                # 7.5 rounds to 8, and there is no 8
    assert dequantize(q, scale, 1)[0, :4].tolist() == [7, -8, 3, -4]
    q, scale = int4_groups(weights / 100, dim=1)                                           # 0.01 is no FP16 number
    assert scale.item() == float(np.float16(0.01)) > 0.01
    assert q[0, :8].tolist() == [7, -7, 3, -4, 0, -1, 7, 0]                                # ... so -7.5 has become -7.498


def test_scales_are_fp16_and_the_integers_are_chosen_for_the_rounded_scale():
    weights = rows(64, 96)
    q, scale = int4_groups(weights, dim=1)
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (torch.int8, torch.float16, (64, 96), (64, 3))
    groups = weights.numpy().reshape(64, 3, 32)
    want_scale = (np.abs(groups).max(-1) * np.float32(2 / 15)).astype(np.float16)
    assert np.array_equal(scale.numpy(), want_scale)
    want = np.clip(np.round(groups / want_scale.astype(np.float32)[..., None]), -8, 7)
    assert np.array_equal(q.numpy().reshape(64, 3, 32), want)
    assert (q.min(), q.max()) == (-8, 7)
    # Each weight moves to the nearest of the 16, half a step at most (one more for the missing +8).
    error = (dequantize(q, scale, 1) - weights).abs().reshape(64, 3, 32) / scale.float()[..., None]
    assert error[q.reshape(64, 3, 32) < 7].max() < 0.51 and error.max() < 0.51


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_groups_run_along_the_input_dimension(dim):
    weights = torch.randn(64, 32, 96)
    q, scale = int4_groups(weights, dim)
    moved_q, moved_scale = int4_groups(weights.movedim(dim, -1), -1)
    assert torch.equal(q.movedim(dim, -1), moved_q) and torch.equal(scale.movedim(dim, -1), moved_scale)
    assert torch.equal(dequantize(q, scale, dim).movedim(dim, -1), dequantize(moved_q, moved_scale, -1))


def test_zeros_and_numbers_too_small_for_fp16_become_zero():
    weights = torch.zeros(3, 32)
    weights[1] = 1e-9
    weights[2, 0] = 1.0                                                                    # an ordinary row beside them
    q, scale = int4_groups(weights, 1)
    assert not q[:2].any() and not scale[:2].any() and scale[2] > 0
    assert torch.equal(dequantize(q, scale, 1)[:2], torch.zeros(2, 32))
    assert torch.equal(int8_round_trip(torch.zeros(2, 64)), torch.zeros(2, 64))


def test_rounding_twice_is_not_rounding_once():
    """The largest weight, 7.5 s, becomes 7 s or -8 s and so another scale: masters, not rounded weights, must be saved."""
    once = fake_quant(rows(16, 64), 1)
    assert not torch.equal(fake_quant(once, 1), once)
    q, _ = int4_groups(rows(16, 64), 1)
    largest = rows(16, 64).reshape(-1, 32).abs().argmax(1, keepdim=True)
    assert set(q.reshape(-1, 32).gather(1, largest).flatten().tolist()) <= {7, -8, -7}     # -7: the scale was rounded up


def test_gradients_pass_straight_through():
    for function in (lambda x: fake_quant(x, 1), fake_quant_activation):
        x = rows(4, 64).requires_grad_()
        direction = torch.randn(4, 64)
        y = function(x)
        (y * direction).sum().backward()
        assert not torch.equal(y, x) and torch.equal(x.grad, direction)


def test_int8_round_trip_is_llama_cpps():
    """quantize_row_q8_0 in ggml: d = max|x| / 127 stored as FP16, q = round(x * (1 / d)) with the d before it was stored."""
    x = rows(200, 96)
    blocks = x.numpy().reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    exact = blocks * (np.float32(1) / d)
    want = np.round(exact) * d.astype(np.float16).astype(np.float32)
    got = int8_round_trip(x).numpy().reshape(-1, 32)
    # x / d and x * (1 / d) differ in the last bit: where that decides between two integers, either is right.
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert tie.mean() < 1e-3 and np.array_equal(got[~tie], want[~tie])
    assert np.all(np.abs(got - blocks) <= 0.51 * d + np.abs(blocks) * 1e-3)


def test_int8_round_trip_keeps_bf16():
    x = torch.randn(3, 5, 64, dtype=torch.bfloat16)
    assert int8_round_trip(x).dtype == torch.bfloat16
    assert torch.equal(int8_round_trip(x), int8_round_trip(x.float()).bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# Packing


def official(blocks: torch.Tensor, kind: str) -> np.ndarray:
    gguf = pytest.importorskip("gguf")
    return gguf.quants.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[kind])


def test_packed_q4_0_is_read_back_bit_for_bit_by_the_official_reader():
    weights = rows(50, 128)
    weights[3] = 0
    q, scale = int4_groups(weights, 1)
    blocks = pack_q4_0(q, scale)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (50, 4, 18))
    assert np.array_equal(official(blocks, "Q4_0"), dequantize(q, scale, 1).numpy())


def test_packed_q4_0_nibbles_by_hand():
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, 0], q[0, 1], q[0, 16], q[0, 31] = -8, 7, 3, -1
    block = pack_q4_0(q, torch.tensor([[1.0]]).half())[0, 0]
    assert block[:2].tolist() == [0x00, 0x3C]                                              # 1.0 in FP16, little-endian
    assert [hex(byte) for byte in block[2:].tolist()] == ["0xb0", "0x8f"] + ["0x88"] * 13 + ["0x78"]


def test_packed_q8_0_is_read_back_by_the_official_reader():
    weights = rows(50, 128)
    weights[3] = 0
    blocks = pack_q8_0(weights)
    assert (blocks.dtype, blocks.shape) == (torch.uint8, (50, 4, 34))
    assert np.array_equal(official(blocks, "Q8_0"), int8_round_trip(weights).numpy())


# ----------------------------------------------------------------------------------------------------------------------
# Attached to a model


QUANTISED = ("proj", "embed_tokens")        # by name: linears, experts, embedding; router, norms and bias are none of these


@pytest.mark.parametrize("config", [TEST, DENSE], ids=["moe", "dense"])
def test_attached_model_computes_with_the_rounded_weights(lively, config):
    """The same as putting the rounded weights into the model, once the activations' rounding is taken out of the picture."""
    model = lively(config)
    rounded = copy.deepcopy(model)
    for name, weight in rounded.state_dict().items():
        if any(part in name for part in QUANTISED):
            weight.copy_(fake_quant(weight, 1))                                            # [out, in] and [E, in, out]: dim 1
    attach(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "fake_quant_activation", lambda x: x)
        assert torch.equal(model(tokens(2, 16)), rounded(tokens(2, 16)))
    assert not torch.equal(model(tokens(2, 16)), rounded(tokens(2, 16)))


def test_every_matrix_gets_int8_inputs(lively, monkeypatch):
    """What is rounded in each layer: what q, k and v read, o, what gate and up read, down, the experts' in and, group by group,
    middle; then the output layer's input."""
    seen, middles, model = [], [], lively()
    monkeypatch.setattr(quantize, "fake_quant_activation", lambda x: seen.append(x) or int8_round_trip(x))
    for block in model.model.layers:
        block.feed_forward.experts.swiglu.register_forward_hook(lambda _, inputs, output: middles.append(output))
    attach(model)(tokens(1, 8))
    assert len(seen) == 5 * TEST.n_layers + 1 + len(middles) and len(middles) >= TEST.n_layers
    assert all(any(x is middle for x in seen) for middle in middles)


def test_router_and_what_it_reads_stay_exact(lively):
    """Fed with the same input, the first layer picks the same experts with the same scores, bit for bit."""
    model = lively()
    moe = model.model.layers[0].feed_forward
    x = torch.randn(1, 40, TEST.d_model)
    read = {}
    moe.router.register_forward_hook(lambda _, inputs, output: read.update(router=inputs[0], routing=output))
    moe(x, None)
    before = read["routing"]
    attach(model)
    moe.experts.register_forward_hook(lambda _, inputs, output: read.update(experts=inputs[0]))
    moe(x, None)
    assert torch.equal(read["router"], x[0]) and torch.equal(read["experts"], int8_round_trip(x[0]))
    assert all(torch.equal(a, b) for a, b in zip(before[:2], read["routing"][:2]))
    assert torch.equal(before[2].z_loss, read["routing"][2].z_loss)


def test_attach_adds_no_parameter_and_saves_the_same_names(lively):
    model = lively()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert master_state_dict(model).keys() == before.keys()
    count = len(list(model.parameters()))
    attach(model)
    masters = master_state_dict(model)
    assert list(masters) == list(before) and len(list(model.parameters())) == count
    assert all(torch.equal(masters[name], before[name]) for name in before)                # masters, not rounded weights
    again = MobileMoE(TEST).eval()
    again.load_state_dict(masters)
    assert torch.equal(attach(again)(tokens(1, 9)), model(tokens(1, 9)))


def test_qat_trains_every_master(lively):
    """One step of gradient descent through the rounding lowers the loss of the rounded model."""
    model, x, y = attach(lively()), tokens(4, 16), tokens(4, 16, seed=1)
    loss, _ = model(x, y)
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.02 * p.grad / p.grad.norm() * p.norm()
    assert model(x, y)[0] < loss - 0.05


def test_cached_decoding_is_the_full_forward_in_int4_too(lively):
    model, x = attach(lively()), tokens(1, 10)
    cache = KVCache(TEST, 1, 10)
    parts = [model(part, cache=cache) for part in x.split([6, 1, 1, 1, 1], dim=1)]
    full = model(x)
    # An activation near a rounding boundary may fall on its other side: compare the whole, not the worst.
    assert (torch.cat(parts, 1) - full).pow(2).mean().sqrt() < 0.02 * full.std()


# ----------------------------------------------------------------------------------------------------------------------
# python quantize.py


def test_report_compares_bf16_ptq_and_qat(finished_run, call):
    code, out, err = call(quantize.main, finished_run / "sft.pt")
    assert (code, err) == (0, "")
    header, rule, *lines = out.splitlines()
    checkpoint = load_checkpoint(finished_run / "sft.pt")
    assert header == "| held-out bits per byte | " + " | ".join(checkpoint["heldout"]) + " |"
    assert [line.split(" | ")[0] for line in lines] == [
        "| sft, BF16", "| sft, INT4 after training (PTQ)", "| qat, INT4 in training (QAT)"]
    values = [[float(cell.split()[0]) for cell in line.strip("| ").split(" | ")[1:]] for line in lines]
    changes = [[float(cell.split("(")[1].rstrip(") |")) for cell in line.split(" | ")[1:]] for line in lines]
    for row, change in zip(values, changes):
        assert change == pytest.approx([a - b for a, b in zip(row, values[0])], abs=2e-4)
    assert any(values[1][n] != values[0][n] for n in range(len(values[0])))
    # The QAT row is the QAT checkpoint as the phone computes it: INT4 weights, INT8 activations.
    trained = load_checkpoint(finished_run / "qat.pt")
    measured = quantize.heldout_bits_per_byte(attach(model_from_checkpoint(trained)), checkpoint)
    assert values[2] == pytest.approx(list(measured.values()), abs=1e-4)


def test_report_without_a_qat_checkpoint_has_two_rows(finished_run, tmp_path, call):
    shutil.copy(finished_run / "pretrain.pt", tmp_path)
    code, out, _ = call(quantize.main, tmp_path / "pretrain.pt")
    assert code == 0 and len(out.splitlines()) == 4 and "pretrain, BF16" in out and "QAT" not in out


def test_report_refuses_what_is_quantised_already(finished_run, refused):
    assert "sft.pt" in refused(quantize.main, finished_run / "qat.pt")
