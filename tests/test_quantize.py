"""quantize.py against equation 6 by hand, the official gguf reader, and llama.cpp's rounding in NumPy."""
import copy
import dataclasses
import shutil

import numpy as np
import pytest
import torch

import quantize
from common import load_checkpoint
from mobilemoe import DENSE, PRESETS, MobileMoE, model_from_checkpoint
from quantize import attach, dequantize, fake_quant, int4_groups, int8_round_trip, master_state_dict

TEST = PRESETS["test"]
TOKENS = torch.randint(TEST.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))


def weights_of_all_sizes(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator) * 10 ** torch.randn(*shape[:-1], 1, generator=generator)


def test_equation_6_by_hand():
    weights = torch.zeros(2, 32)
    weights[0, :7] = torch.tensor([7.5, -7.5, 3.2, -3.7, 0.4, -0.6, 7.4])      # max |W| = 7.5, so s = 1
    weights[1] = 1e-9                                                          # too small for FP16: zero
    q, scale = int4_groups(weights, dim=1)
    assert scale.tolist() == [[1.0], [0.0]] and not q[1].any()
    assert q[0, :8].tolist() == [7, -8, 3, -4, 0, -1, 7, 0]                    # there is no 8 to round to
    q, scale = int4_groups(weights / 100, dim=1)                               # 0.01 is no FP16 number
    assert scale[0].item() == float(np.float16(0.01)) > 0.01
    assert q[0, :8].tolist() == [7, -7, 3, -4, 0, -1, 7, 0]                    # ... so -7.5 became -7.498


def test_integers_are_the_nearest_for_the_scale_that_the_file_stores():
    weights = weights_of_all_sizes(64, 96)
    q, scale = int4_groups(weights, dim=1)
    groups = weights.numpy().reshape(64, 3, 32)
    want_scale = (np.abs(groups).max(-1) * np.float32(2 / 15)).astype(np.float16)
    assert scale.dtype == torch.float16 and np.array_equal(scale.numpy(), want_scale)
    want = np.clip(np.round(groups / want_scale.astype(np.float32)[..., None]), -8, 7)
    assert q.dtype == torch.int8 and np.array_equal(q.numpy().reshape(64, 3, 32), want)


def test_groups_run_along_the_input_dimension():
    weights = torch.randn(64, 32, 96)
    for dim in (0, 1, 2, -1):
        q, scale = int4_groups(weights, dim)
        moved_q, moved_scale = int4_groups(weights.movedim(dim, -1), -1)
        assert torch.equal(q.movedim(dim, -1), moved_q) and torch.equal(scale.movedim(dim, -1), moved_scale)
        moved = dequantize(moved_q, moved_scale, -1)
        assert torch.equal(dequantize(q, scale, dim).movedim(dim, -1), moved)


def test_gradients_pass_straight_through():
    x = weights_of_all_sizes(4, 64).requires_grad_()
    grad = torch.randn(4, 64)
    for y in (fake_quant(x, 1), quantize.fake_quant_activation(x)):
        assert not torch.equal(y, x) and torch.equal(torch.autograd.grad(y, x, grad)[0], grad)


def test_int8_round_trip_is_llama_cpps():
    """quantize_row_q8_0 in ggml: d = max|x| / 127 is stored as FP16, q = round(x * (1 / d)) with d before."""
    x = weights_of_all_sizes(200, 96)
    blocks = x.numpy().reshape(-1, 32)
    d = (np.abs(blocks).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    exact = blocks * (np.float32(1) / d)
    want = np.round(exact) * d.astype(np.float16).astype(np.float32)
    # x / d and x * (1 / d) differ in the last bit: where that decides between two integers, either is right.
    tie = np.abs(exact - np.floor(exact) - 0.5) < 1e-4
    assert tie.mean() < 1e-3 and np.array_equal(int8_round_trip(x).numpy().reshape(-1, 32)[~tie], want[~tie])


def test_packed_blocks_are_read_back_by_the_official_reader_bit_for_bit():
    gguf = pytest.importorskip("gguf")
    weights = weights_of_all_sizes(50, 128)
    weights[3] = 0
    q, scale = int4_groups(weights, 1)
    for blocks, kind, want in ((quantize.pack_q4_0(q, scale), "Q4_0", dequantize(q, scale, 1)),
                               (quantize.pack_q8_0(weights), "Q8_0", int8_round_trip(weights))):
        read = gguf.quants.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[kind])
        assert np.array_equal(read, want.numpy())


@pytest.mark.parametrize("config", [TEST, dataclasses.replace(TEST, **DENSE)], ids=["moe", "dense"])
def test_attached_model_computes_with_the_rounded_weights(lively, monkeypatch, config):
    """... as if they had been put into it, once the rounding of activations is out of the picture."""
    model = lively(config)
    rounded = copy.deepcopy(model)
    for name, weight in rounded.state_dict().items():
        if "proj" in name or "embed_tokens" in name:        # not router, norms and bias
            weight.copy_(fake_quant(weight, 1))             # [out, in] and [E, in, out]: dim 1
    assert not torch.equal(attach(model)(TOKENS), rounded(TOKENS))
    monkeypatch.setattr(quantize, "fake_quant_activation", lambda x: x)
    assert torch.equal(model(TOKENS), rounded(TOKENS))


def test_every_matrix_gets_int8_inputs_in_the_type_it_multiplies_in(lively, monkeypatch):
    """A layer's: what q, k and v read, what o reads, gate and up, down; the experts' in and, group by group,
    middle. Then what the output layer reads: the final norm's output, FP32."""
    seen = []
    middles = []
    model = lively()
    model.compute_dtype = torch.bfloat16
    monkeypatch.setattr(quantize, "fake_quant_activation", lambda x: seen.append(x) or int8_round_trip(x))
    for block in model.model.layers:
        block.feed_forward.experts.swiglu.register_forward_hook(lambda *args: middles.append(args[2]))
    attach(model)(TOKENS)
    assert len(seen) == 5 * TEST.n_layers + 1 + len(middles) and len(middles) >= TEST.n_layers
    assert all(any(x is middle for x in seen) for middle in middles)
    assert {x.dtype for x in seen[:-1]} == {torch.bfloat16}


def test_router_and_what_it_reads_stay_exact(lively):
    model = lively()
    moe = model.model.layers[0].feed_forward
    x = torch.randn(1, 40, TEST.d_model)
    read = {}
    moe.router.register_forward_hook(lambda _, inputs, output: read.update(router=inputs[0], routing=output))
    moe(x, torch.float32, None)
    before = read["routing"]
    attach(model)
    moe.experts.register_forward_hook(lambda _, inputs, output: read.update(experts=inputs[0]))
    moe(x, torch.float32, None)
    assert torch.equal(read["router"], x[0]) and torch.equal(read["experts"], int8_round_trip(x[0]))
    assert all(torch.equal(a, b) for a, b in zip(before, read["routing"]))


def test_masters_are_saved_under_the_released_names(lively):
    """Not rounded weights: to round them again would change them."""
    model = lively()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masters = master_state_dict(attach(model))
    assert list(masters) == list(before) and all(torch.equal(masters[name], before[name]) for name in before)
    again = MobileMoE(TEST).eval()
    again.load_state_dict(masters)
    assert torch.equal(attach(again)(TOKENS), model(TOKENS))
    once = fake_quant(before["model.embed_tokens.weight"], 1)
    assert not torch.equal(fake_quant(once, 1), once)


def test_qat_trains_every_master(lively):
    """One step of gradient descent through the rounding lowers the loss of the rounded model."""
    model = attach(lively())
    model.compute_dtype = torch.bfloat16
    loss, _ = model(TOKENS, TOKENS.flip(0))
    loss.backward()
    for p in model.parameters():
        assert p.grad.isfinite().all() and p.grad.any() and p.grad.dtype == torch.float32
        p.data -= 0.02 * p.grad / p.grad.norm() * p.norm()
    assert model(TOKENS, TOKENS.flip(0))[0] < loss - 0.05


def test_report_compares_as_trained_with_ptq_and_qat(finished_run, tmp_path, call, refused):
    code, out, _ = call(quantize.main, finished_run / "sft.pt")
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines())
    checkpoint = load_checkpoint(finished_run / "sft.pt")
    assert code == 0 and head == ["held-out bits per byte", *checkpoint["heldout"]]
    # The QAT row is the QAT checkpoint as the phone computes it; in brackets the difference to the first row.
    trained = attach(model_from_checkpoint(load_checkpoint(finished_run / "qat.pt")))
    measured = list(quantize.heldout_bits_per_byte(trained, checkpoint).values())
    first, _, last = ([float(cell.split()[0]) for cell in row[1:]] for row in rows)
    assert last == pytest.approx(measured, abs=1e-4)
    assert float(rows[2][1].split("(")[1].rstrip(")")) == pytest.approx(last[0] - first[0], abs=2e-4)
    shutil.copy(finished_run / "sft.pt", tmp_path)          # without a qat.pt beside it
    assert "QAT" not in call(quantize.main, tmp_path / "sft.pt")[1]
    assert "sft.pt" in refused(quantize.main, finished_run / "qat.pt")
