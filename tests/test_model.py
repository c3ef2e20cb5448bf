"""The model, the adversary's gradients, distillation terms and model folders, against independent formulas."""
import dataclasses
import json
import math
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unibert
from data import IGNORE, pack_sequences
from files import read_safetensors, write_safetensors
from unibert import (GradientReversal, LanguageDiscriminator, UniBERT, UniBERTConfig, hidden_distillation, load_model,
                     mean_pool, positions_of, relation_distillation, save_model)


def small_model(block="modern", **changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48, max_length=16)
    return UniBERT(UniBERTConfig(**{**sizes, "block": block, **changes}))


def sequences(lengths, vocab_size=60, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, n).tolist() for n in lengths]


@pytest.mark.parametrize("block", ["modern", "post"])
def test_packing_changes_nothing(block):
    """A sequence gets the same states alone, among others, and beside empty segments."""
    model, texts = small_model(block).double(), sequences([5, 1, 16, 9])
    tokens, cu_seqlens, longest = pack_sequences(texts)
    empty = torch.cat([cu_seqlens[:3], cu_seqlens[2:3], cu_seqlens[3:], cu_seqlens[-1:]])
    together, with_empty = model.encode(tokens, cu_seqlens, longest), model.encode(tokens, empty, 16)
    alone = torch.cat([model.encode(*pack_sequences([text])) for text in texts])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    torch.testing.assert_close(with_empty, alone, rtol=0, atol=1e-12)


def test_positions_restart():
    segment, position = positions_of(torch.tensor([0, 2, 2, 5], dtype=torch.int32), 7)
    assert segment.tolist() == [0, 0, 2, 2, 2, 3, 3] and position.tolist() == [0, 1, 0, 1, 2, 0, 1]


def test_post_block_is_the_transformer_of_torch():
    """Our post block against torch's own encoder layer, with the same weights."""
    model = small_model("post").double().eval()
    block = model.blocks[0]
    for p in block.parameters():  # away from the initial zeros and ones
        nn.init.normal_(p, std=0.3)
    layer = nn.TransformerEncoderLayer(32, 2, 48, 0.0, F.gelu, 1e-5, batch_first=True).double().eval()
    layer.load_state_dict({
        "self_attn.in_proj_weight": block.qkv.weight, "self_attn.in_proj_bias": block.qkv.bias,
        "self_attn.out_proj.weight": block.out.weight, "self_attn.out_proj.bias": block.out.bias,
        "linear1.weight": block.up.weight, "linear1.bias": block.up.bias,
        "linear2.weight": block.down.weight, "linear2.bias": block.down.bias,
        "norm1.weight": block.attention_norm.weight, "norm1.bias": block.attention_norm.bias,
        "norm2.weight": block.mlp_norm.weight, "norm2.bias": block.mlp_norm.bias})
    x = torch.randn(11, 32, dtype=torch.float64)
    layout = unibert.Layout(torch.tensor([0, 11], dtype=torch.int32), 11)
    torch.testing.assert_close(block(x, layout), layer(x[None])[0], rtol=0, atol=1e-10)


def test_modern_block_by_hand():
    """The modern block written out once more, with complex numbers for the rotation."""
    model = small_model("modern").double()
    block, x = model.blocks[1], torch.randn(7, 32, dtype=torch.float64)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    cu_seqlens = torch.tensor([0, 7], dtype=torch.int32)
    cos, sin = unibert.rotary_table(torch.arange(7), 16, 10000.0)
    ours = block(x, unibert.Layout(cu_seqlens, 7, cos.double(), sin.double()))
    norm = lambda x, w: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * w
    q, k, v = (norm(x, block.attention_norm.weight) @ block.qkv.weight.T).view(7, 3, 2, 16).unbind(1)
    angle = torch.outer(torch.arange(7.0), 10000.0 ** (-torch.arange(0, 16, 2) / 16)).double()
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]
    turned = [torch.view_as_real(torch.complex(t[..., :8], t[..., 8:]) * turn).transpose(-1, -2).flatten(-2) for t in (q, k)]
    p = (torch.einsum("ihd,jhd->hij", *turned) / math.sqrt(16)).softmax(-1)
    y = x + torch.einsum("hij,jhd->ihd", p, v).reshape(7, 32) @ block.out.weight.T
    value, gate = (norm(y, block.mlp_norm.weight) @ block.up.weight.T).split(48, -1)
    wanted = y + (0.5 * value * (1 + torch.erf(value / math.sqrt(2))) * gate) @ block.down.weight.T
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-6)  # the tables are fp32


def test_mlm_loss_is_cross_entropy_of_logits():
    model = small_model()
    rows, targets = torch.randn(9, 32), torch.randint(0, 60, (9,))
    targets[3] = IGNORE
    wanted = F.cross_entropy(model.mlm_logits(rows), targets, reduction="none", ignore_index=IGNORE)
    torch.testing.assert_close(model.mlm_loss(rows, targets), wanted, rtol=1e-5, atol=1e-5)


def test_sequence_beyond_the_model_is_refused():
    with pytest.raises(ValueError, match="17 tokens are beyond the model's max_length 16"):
        small_model().encode(*pack_sequences(sequences([17])))


@pytest.mark.parametrize("changes", [dict(block="new"), dict(num_heads=5), dict(num_layers=0)])
def test_impossible_shapes_are_refused(changes):
    with pytest.raises(ValueError):
        UniBERTConfig(**changes)


# ------------------------------------------------------------------------------------------------- the adversary

def test_reversal_is_minus_lambda_times_the_gradient():
    """The encoder gets exactly -lambda times the plain gradient, not zero; the discriminator its own, unreversed."""
    model, strength = small_model().double(), 0.37
    discriminator = LanguageDiscriminator(32, 3).double()
    tokens, cu_seqlens, longest = pack_sequences(sequences([6, 9, 4]))
    languages = torch.tensor([0, 1, 2]).repeat_interleave(cu_seqlens.diff().long())
    encoder = [p for p in model.blocks[0].parameters()]
    prior = torch.full((3,), 1e-4, dtype=torch.float64)  # a bound far above the loss: nothing is capped here

    def gradients(loss):
        return (torch.autograd.grad(loss, encoder, retain_graph=True),
                torch.autograd.grad(loss, list(discriminator.parameters()), retain_graph=True))
    states = []
    model.encode(tokens, cu_seqlens, longest, states=states)
    reversed_loss, _ = discriminator.adversarial_loss(states[1], languages, strength, prior)
    plain_loss = F.cross_entropy(discriminator(states[1]), languages, reduction="none")
    (ours, ours_d), (plain, plain_d) = gradients(reversed_loss.sum()), gradients(plain_loss.sum())
    assert all(g.norm() > 1e-6 for g in plain)
    for a, b in zip(ours, plain):
        torch.testing.assert_close(a, -strength * b, rtol=1e-10, atol=1e-14)
    for a, b in zip(ours_d, plain_d):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_reversed_loss_is_capped_at_the_prior():
    """A row whose loss is above -log prior pushes the encoder no further; the discriminator still learns from it."""
    torch.manual_seed(0)
    discriminator = LanguageDiscriminator(8, 2)
    with torch.no_grad():
        discriminator.outer.weight.zero_()
        discriminator.outer.bias.copy_(torch.tensor([3.0, 0.0]))  # sure of language 0
        discriminator.outer.weight[0, 0] = 0.5
    features = torch.randn(2, 8, requires_grad=True)
    loss, correct = discriminator.adversarial_loss(features, torch.tensor([0, 1]), 1.0, torch.tensor([0.5, 0.5]))
    loss.sum().backward()
    assert loss[0] < math.log(2) < loss[1] and correct.tolist() == [True, False]
    assert features.grad[0].norm() > 0 and features.grad[1].norm() == 0
    assert discriminator.outer.bias.grad[1] < -0.5  # pulled towards language 1 by the capped row


def test_the_reversed_gradient_fades_in_a_line_towards_the_prior():
    """Full up to half of -log prior, nothing at it: no jump that a rounding could decide."""
    torch.manual_seed(0)
    discriminator, features = LanguageDiscriminator(8, 2), torch.randn(1, 8)
    loss = F.cross_entropy(discriminator(features), torch.tensor([0])).item()

    def gradient(share):                                  # of the prior's loss that the discriminator's loss is
        x = features.clone().requires_grad_()
        prior = torch.tensor([math.exp(-loss / share), 0.5])
        discriminator.adversarial_loss(x, torch.tensor([0]), 1.0, prior)[0].sum().backward()
        return x.grad
    torch.testing.assert_close(gradient(0.75), 0.5 * gradient(0.3), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(gradient(0.5 + 1e-5), gradient(0.5 - 1e-5), rtol=1e-4, atol=1e-9)
    assert gradient(0.999).norm() < 0.01 * gradient(0.3).norm() and gradient(1.01).norm() == 0


def test_the_only_language_has_nothing_to_hide():
    """A corpus of one language: -log prior is 0, and so is the loss; nothing may become 0 / 0."""
    discriminator, features = LanguageDiscriminator(8, 1), torch.randn(3, 8, requires_grad=True)
    loss, _ = discriminator.adversarial_loss(features, torch.tensor([0, 0, IGNORE]), 1.0, torch.ones(1))
    loss.sum().backward()
    assert not loss.any() and not features.grad.any()


def test_reversal_under_double_use_and_zero():
    x = torch.ones(3, 2, requires_grad=True)
    (GradientReversal.apply(x, torch.zeros(())) * 2 + x).sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 2))


def test_ignored_tokens_have_no_adversary():
    discriminator, features = LanguageDiscriminator(8, 2), torch.randn(4, 8, requires_grad=True)
    loss, correct = discriminator.adversarial_loss(features, torch.tensor([0, IGNORE, 1, IGNORE]), 1.0, torch.full((2,), 1e-4))
    loss.sum().backward()
    assert loss[1] == loss[3] == 0 and not correct[1] and features.grad[1].norm() == 0 and features.grad[0].norm() > 0


# ----------------------------------------------------------------------------------------------- distillation

def test_mean_pool():
    hidden, cu_seqlens = torch.randn(7, 4), torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    wanted = torch.stack([hidden[:3].mean(0), torch.zeros(4), hidden[3:].mean(0)])
    torch.testing.assert_close(mean_pool(hidden, cu_seqlens), wanted)


def test_hidden_distillation_sees_directions_only():
    x = torch.randn(5, 8)
    torch.testing.assert_close(hidden_distillation(3 * x + 2, x), torch.zeros(5), atol=1e-4, rtol=0)
    assert hidden_distillation(torch.randn(5, 8), x).min() > 0.1


def test_relation_distillation_by_loops():
    """Against the definition, sequence by sequence, head by head; widths differ; the tail has no relation."""
    torch.manual_seed(0)
    student, teacher = torch.randn(12, 3, 2, 8).double(), torch.randn(12, 3, 4, 6).double()
    cu_seqlens = torch.tensor([0, 4, 4, 5, 11], dtype=torch.int32)
    ours = relation_distillation(student, teacher, cu_seqlens, 6, 4)
    wanted = torch.zeros(12)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        for kind in range(3):
            for head in range(4):
                logs = []
                for x, d in ((student, 4), (teacher, 6)):
                    part = x[begin:end, kind].flatten(1)[:, head * d:head * d + d].float()
                    logs.append((part @ part.T / math.sqrt(d)).log_softmax(-1))
                wanted[begin:end] += (logs[1].exp() * (logs[1] - logs[0])).sum(-1) / 4
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    assert relation_distillation(teacher, teacher, cu_seqlens, 6, 4).abs().max() < 1e-6


# ----------------------------------------------------------------------------------------------- model folders

@pytest.mark.parametrize("block", ["modern", "post"])
def test_model_folder_round_trip(tmp_path, block):
    model = small_model(block).eval()
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    packed = pack_sequences(sequences([4, 7]))
    assert torch.equal(again.encode(*packed), model.encode(*packed))
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


def test_safetensors_is_the_real_format(tmp_path):
    theirs = pytest.importorskip("safetensors.torch", reason="the cross-check needs the safetensors package")
    tensors = {"a": torch.randn(3, 4), "b": torch.randn(5).bfloat16(), "c": torch.arange(6).view(2, 3), "d": torch.empty(0, 2)}
    write_safetensors(tensors, tmp_path / "ours")
    for name, tensor in theirs.load_file(tmp_path / "ours").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
    theirs.save_file(tensors, tmp_path / "theirs")
    for name, tensor in read_safetensors(tmp_path / "theirs").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype


def _header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])


@pytest.mark.parametrize("damage", ["cut", "offsets", "overlap", "shape", "dtype", "length", "json", "tail", "empty"])
def test_damaged_safetensors_are_refused(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    write_safetensors({"a": torch.randn(3, 4), "b": torch.randn(5)}, path)
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-3])
    elif damage == "offsets":
        _header(path, lambda h: h["b"].update(data_offsets=[48, 10 ** 9]))
    elif damage == "overlap":
        _header(path, lambda h: h["b"].update(data_offsets=[28, 48]))
    elif damage == "shape":
        _header(path, lambda h: h["a"].update(shape=[-3, -4]))
    elif damage == "dtype":
        _header(path, lambda h: h["a"].update(dtype="F99"))
    elif damage == "length":
        path.write_bytes(struct.pack("<Q", 2 ** 60) + data[8:])
    elif damage == "json":
        path.write_bytes(data[:8] + b"?" + data[9:])
    elif damage == "tail":
        path.write_bytes(data + b"12")
    else:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="x.safetensors: .+"):
        read_safetensors(path)


@pytest.mark.parametrize("header", [
    "[" * 200_000, *(json.dumps({"a": dict(dtype="F32", shape=shape, data_offsets=offsets)}) for shape, offsets in (
        ([0], [0]), ([0], [0, 0, 0]), ([0, 2 ** 70], [0, 0]), ([math.inf], [0, 0])))])
def test_a_header_made_to_confuse_is_refused(tmp_path, header):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
    with pytest.raises(ValueError, match="x.safetensors: .+"):
        read_safetensors(tmp_path / "x.safetensors")


def test_model_folder_faults_are_named(tmp_path):
    model = small_model()
    with pytest.raises(ValueError, match="has no config.json"):
        load_model(tmp_path)
    for fault, message in [(lambda t: t.pop("final_norm.weight"), "final_norm.weight is missing"),
                           (lambda t: t.update(extra=torch.ones(1)), "extra is not part of the model"),
                           (lambda t: t.update({"final_norm.weight": torch.ones(5)}), r"has shape \[5\]"),
                           (lambda t: t.update({k: v.long() for k, v in t.items()}), "is torch.int64")]:
        save_model(model, tmp_path / "m")
        tensors = dict(model.state_dict())
        fault(tensors)
        write_safetensors(tensors, tmp_path / "m" / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"hidden_size": 32, "colour": 1}')
    with pytest.raises(ValueError, match="colour"):
        load_model(tmp_path / "m")
    save_model(model, tmp_path / "m")
    for name, value, message in (
            *((name, value, "config.json is not a UniBERT's") for name, value in (
                ("num_layers", 4.0), ("num_layers", "4"), ("global_every", 0), ("dropout", "a"), ("dropout", 1), ("norm_eps", "x"),
                ("norm_eps", math.nan), ("rope_theta", None), ("local_rope_theta", []))),
            ("num_layers", 10 ** 8, "100,000,000 layers"), ("intermediate_size", 10 ** 12, "sizes that no tensor can have|has shape"),
            ("vocab_size", 10 ** 30, "sizes that no tensor can have")):
        (tmp_path / "m" / "config.json").write_text(json.dumps(dataclasses.asdict(model.config) | {name: value}))
        with pytest.raises(ValueError, match=message) as refusal:
            load_model(tmp_path / "m")
        assert "\n" not in str(refusal.value)
    (tmp_path / "m" / "config.json").write_text("[" * 200_000)
    with pytest.raises(ValueError, match="config.json is not a UniBERT's"):
        load_model(tmp_path / "m")
