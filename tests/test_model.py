"""
What model.py promises: the formulas of the transformer, sampling that agrees with them, and checkpoints that cannot hurt.

The truth is `reference`: the same formulas in float64, one row and one head at a time, with nothing fused or cached.
"""
import itertools
import math
import os
import pickle
import random
from contextlib import nullcontext
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model as M
from model import CONFIGS, Config, Transformer, build_model, load_checkpoint, sample, sample_naive, save_checkpoint

SMALL = dict(n_layers=2, width=32, n_heads=4, n_kv_heads=2, mlp=48, vocab_size=24, rope_theta=100.0)


def make_model(seed=0, **changes):
    """A random model in which every parameter matters, biases and norms too."""
    torch.manual_seed(seed)
    model = Transformer(Config(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.2 * torch.randn_like(p) + ("norm" in name))
    return model.eval()


def random_ids(*shape, seed=1, vocab=SMALL["vocab_size"]):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------------
# the forward pass

def reference(model, ids):
    """Logits (T, vocabulary) of one row of ids (T,), in float64."""
    c, w = model.config, {name: p.detach().double() for name, p in model.state_dict().items()}
    D, T = c.width // c.n_heads, len(ids)
    turn = torch.arange(T)[:, None] * c.rope_theta ** (-2 * torch.arange(D // 2).double() / D)  # (T, D / 2) angles

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c.eps).sqrt() * w[name + ".weight"]

    def rotary(x):  # entries i and i + D / 2 are one complex number
        z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * torch.polar(torch.ones_like(turn), turn)
        return torch.cat((z.real, z.imag), 1)

    x = w["embed_tokens.weight"][ids]
    for layer in range(c.n_layers):
        at = f"layers.{layer}."

        def linear(x, name):
            return x @ w[f"{at}{name}.weight"].T + w.get(f"{at}{name}.bias", 0)

        def of_head(name, j):
            return linear(h, name)[:, j * D:(j + 1) * D]

        h, heads = norm(x, at + "input_layernorm"), []
        for j in range(c.n_heads):
            shared = j // (c.n_heads // c.n_kv_heads)
            q, k, v = rotary(of_head("self_attn.q_proj", j)), rotary(of_head("self_attn.k_proj", shared)), \
                of_head("self_attn.v_proj", shared)
            scores = q @ k.T / math.sqrt(D)
            for t in range(T):
                scores[t, t + 1:] = -math.inf
            heads.append(scores.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, 1), "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm")
        gate = linear(h, "mlp.gate_proj")
        x = x + linear(gate / (1 + torch.exp(-gate)) * linear(h, "mlp.up_proj"), "mlp.down_proj")
    return norm(x, "norm") @ w["embed_tokens.weight"].T


@pytest.mark.parametrize("heads", [(4, 2), (4, 1), (4, 4), (1, 1)], ids=str)
def test_forward_is_the_formulas(heads):
    model, ids = make_model(n_heads=heads[0], n_kv_heads=heads[1]), random_ids(3, 40)
    torch.testing.assert_close(model(ids), torch.stack([reference(model, row) for row in ids]).float(),
                               rtol=1e-5, atol=1e-5)


def test_no_token_sees_a_later_one():
    model, ids = make_model(), random_ids(1, 20)
    before = model(ids)
    for t in (0, 7, 19):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % SMALL["vocab_size"]
        after = model(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-6)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-4  # and every later one does see it


def test_padding_on_the_right_changes_nothing():
    model, rows = make_model(), [random_ids(1, T, seed=T) for T in (5, 12, 30)]
    padded = torch.cat([torch.cat((row, torch.full((1, 30 - row.shape[1]), 3)), 1) for row in rows])
    for logits, row in zip(model(padded), rows):
        torch.testing.assert_close(logits[:row.shape[1]], model(row)[0], rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_surprise_of_the_targets():
    model, x, y = make_model(), random_ids(3, 11), random_ids(3, 11, seed=2)
    y[0, :6] = y[1, 3:] = y[2, 5] = -100
    surprises = [-float(reference(model, x[b])[t].log_softmax(-1)[y[b, t]])
                 for b in range(3) for t in range(11) if y[b, t] != -100]
    assert len(surprises) == 5 + 3 + 10
    assert model.loss(x, y).item() == pytest.approx(sum(surprises), rel=1e-5)
    assert model.loss(x, y, reduction="mean").item() == pytest.approx(sum(surprises) / len(surprises), rel=1e-5)


def test_micro_batches_have_the_gradient_of_the_batch():
    model, x, y = make_model(), random_ids(6, 9), random_ids(6, 9, seed=2)
    y[:2, :7] = -100  # unequal numbers of targets

    def gradient(*parts):
        model.zero_grad()
        for part in parts:
            model.loss(x[part], y[part]).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(slice(None))
    torch.testing.assert_close(gradient(slice(0, 1), slice(1, 4), slice(4, 6)), whole, rtol=1e-4, atol=1e-5)
    assert whole.abs().max() > 0.1


def test_the_100m_preset_is_the_model_of_the_paper():
    c = CONFIGS["100m"]
    assert (c.n_layers, c.width, c.n_heads, c.n_kv_heads, c.mlp, c.rope_theta, c.eps, c.init_std) == \
        (12, 768, 12, 2, 3072, 1e6, 1e-6, 0.02)
    with torch.device("meta"):
        layer = 768 * (768 + 128 + 128) + (768 + 128 + 128) + 768 * 768 + 3 * 768 * 3072 + 2 * 768
        assert Transformer(c).n_params() == 640 * 768 + 12 * layer + 768
    assert all(c.vocab_size == data.VOCAB_SIZE for c in CONFIGS.values())


@pytest.mark.parametrize("size, layers, width, millions", [("10m", 6, 384, 12.9), ("400m", 18, 1280, 425.6), ("1b", 24, 1792, 1102.3)])
def test_the_other_sizes_have_the_proportions_of_the_paper(size, layers, width, millions):
    import grpo, midtrain, pretrain  # noqa: E401
    c = CONFIGS[size]
    assert (c.n_layers, c.width, c.width // c.n_heads, c.mlp) == (layers, width, 64, 4 * width) and 5 <= c.n_heads / c.n_kv_heads <= 7
    with torch.device("meta"):  # no memory is taken
        assert Transformer(c).n_params() / 1e6 == pytest.approx(millions, abs=0.1)
    for stage in pretrain, midtrain, grpo:
        preset, of_100m = stage.PRESETS[size], stage.PRESETS["100m"]
        assert [*stage.PRESETS] == [*CONFIGS]
        assert {name for name in preset if preset[name] != of_100m[name]} == {"lr", "min_lr"}
        assert preset["lr"] == pytest.approx(of_100m["lr"] * 768 / width, rel=0.05)


def test_the_tokens_of_a_pass_fit_the_memory_and_the_size():
    fit = {size: M.tokens_that_fit(32_768, 78 * 2 ** 30, "bfloat16", CONFIGS[size]) for size in CONFIGS}
    assert fit == {"tiny": 32_768, "10m": 32_768, "100m": 32_768, "400m": 16_384, "1b": 8_192}
    assert M.tokens_that_fit(32_768, 20 * 2 ** 30, "bfloat16", CONFIGS["100m"]) == 16_384
    assert M.tokens_that_fit(32_768, 0, "float32", CONFIGS["1b"]) == 1024  # it may still not fit, but no pass is shorter


def test_heads_that_look_back_start_out_looking_back():
    c = replace(CONFIGS["tiny"], n_heads=6, n_kv_heads=2, width=6 * 32, n_layers=2, look_back=1)
    torch.manual_seed(0)
    model, ids, attention = Transformer(c), random_ids(2, 25), []

    def attend(q, k, v):
        scores = q @ k.repeat_interleave(3, 1).transpose(-1, -2) / math.sqrt(32)
        attention.append(scores.masked_fill(torch.ones(25, 25).triu(1).bool(), -math.inf).softmax(-1))
        return attention[-1] @ v.repeat_interleave(3, 1)

    with torch.no_grad():
        model.hidden(ids, attend=attend)
    def mean_weight(layer, head, back):
        return float(attention[layer][:, head].diagonal(-back, 1, 2).mean())

    for layer, head in itertools.product((0, 1), range(6)):
        if layer == 0 and head < 3:  # those of the first key-value head look 1, 2 and 3 tokens back
            assert mean_weight(layer, head, head + 1) > 0.5
        else:
            assert max(mean_weight(layer, head, back) for back in range(12)) < 0.3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees_with_the_cpu():
    model, ids = make_model(), random_ids(2, 30)
    y = random_ids(2, 30, seed=2)
    y[0, 4:] = -100
    logits, loss = model(ids), model.loss(ids, y)
    model.cuda()
    torch.testing.assert_close(model(ids.cuda()).cpu(), logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.loss(ids.cuda(), y.cuda()).cpu(), loss, rtol=1e-4, atol=1e-4)
    tokens, logprobs = sample(model, [[1, 2, 3], [4]], stop=0, n=3, max_new=20, generator=torch.Generator("cuda"))
    assert_scored_as_by_forward(model.cpu(), [[1, 2, 3], [4]], tokens, logprobs, 3, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_captured_steps_write_what_plain_steps_write(precision, monkeypatch):
    model, buffers = biased_model(-1.0).cuda(), {}
    up_proj = model.layers[0].mlp.up_proj.weight
    versions = up_proj.detach().clone(), 1.1 * up_proj.detach()

    def write(version):
        with torch.no_grad():
            up_proj.copy_(version)
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            return sample(model, PROMPTS, STOP, n=7, max_new=300, generator=torch.Generator("cuda").manual_seed(0), buffers=buffers)

    captured = [write(version) for version in versions]  # the second time with the graphs of the first
    assert any(isinstance(graph, torch.cuda.CUDAGraph) for graph in buffers["graphs"].values())
    monkeypatch.setattr(M.GraphDecoder, "decode_step", M.Decoder.decode_step)
    for version, (tokens, logprobs) in zip(versions, captured):
        plain_tokens, plain_logprobs = write(version)
        assert tokens == plain_tokens and max(map(len, tokens)) > 128  # the cache has grown
        for a, b in zip(logprobs, plain_logprobs):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert captured[0][0] != captured[1][0]


def packed_ids(lengths, size, pad=5):
    """Random sequences of these lengths, and the same end to end: [(x, y)] and (x, y, cu_seqlens, max_seqlen)."""
    rows = [(random_ids(n + 1, seed=n).tolist(), 1) for n in lengths]
    apart = [(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])) for ids, _ in rows]
    x, y, cu_seqlens, max_seqlen = data.pack(rows, size)
    x[y == -100] = pad
    return apart, (torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(cu_seqlens), max_seqlen)


def test_packed_sequences_are_computed_as_if_apart():
    model = make_model()
    apart, (x, y, *sequences) = packed_ids((1, 30, 7, 64, 2), 288)
    hidden = model.hidden(x, *sequences)
    torch.testing.assert_close(hidden[:, :104], torch.cat([model.hidden(row) for row, _ in apart], dim=1), rtol=0, atol=1e-5)
    assert hidden.isfinite().all()

    def gradient(losses):
        model.zero_grad()
        total = sum(losses)
        total.backward()
        return total.detach(), [p.grad for p in model.parameters()]

    torch.testing.assert_close(gradient([model.loss(x, y, *sequences)]), gradient(model.loss(*row) for row in apart),
                               rtol=1e-4, atol=1e-4)
    where = torch.tensor([3, 40, 103])
    logprobs, entropy = model.logprobs(x, where, y[0, where], 0.7, *sequences)
    expected = [model.logprobs(row, torch.tensor([t]), targets[0, [t]], 0.7)
                for (row, targets), t in ((apart[1], 2), (apart[3], 2), (apart[4], 1))]
    torch.testing.assert_close((logprobs, entropy), tuple(torch.cat(values) for values in zip(*expected)), rtol=0, atol=1e-5)


def test_sequences_in_blocks_are_computed_as_if_apart():
    """Their log-probabilities and gradients, padding between them or not."""
    model, rows = make_model(), [(random_ids(n + 1, seed=n).tolist(), 1) for n in (3, 15, 16, 17, 30, 32, 64)]
    x, y, blocks = data.in_blocks(rows)
    assert blocks == [(3, 16), (3, 32), (1, 64), (1, 48)]
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    apart = [(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]])) for ids, _ in rows]
    gradients = [torch.autograd.grad(loss, list(model.parameters())) for loss in
                 (model.loss(x, y, blocks), sum(model.loss(*row) for row in apart))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    where = (y[0] != -100).nonzero()[:, 0]
    logprobs, _ = model.logprobs(x, where, y[0, where], 0.7, blocks)
    expected = [model.logprobs(row, torch.arange(row.shape[1]), targets[0], 0.7)[0] for row, targets in apart]
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=1e-5)


def test_gradients_side_by_side_are_those_of_the_plain_loop():
    """Up to rounding, and bit for bit those of another time with as many threads."""
    rows = [(random_ids(n + 1, seed=n).tolist(), 1) for n in range(5, 45)]
    batches = [[torch.as_tensor(a) for a in arrays[:2]] + [arrays[2]] for _, arrays in data.micro_batches(rows, 200)]
    counts, precision = torch.tensor([sum(int((y != -100).sum()) for _, y, _ in batches), 1]), torch.autocast("cpu", enabled=False)
    model, threads, found = make_model(), torch.get_num_threads(), []
    loss = sum(model.loss(*batch) for batch in batches) / counts[0]
    expected = torch.autograd.grad(loss, list(model.parameters()))
    try:
        for n in (1, 2, 2, 3, 3):
            torch.set_num_threads(n)
            model.zero_grad()
            its_loss, _ = M.accumulate(model, batches, counts, "cpu", precision)
            assert torch.get_num_threads() == n
            found.append([its_loss] + [p.grad for p in model.parameters()])
            assert all(p.grad.stride() == p.stride() for p in model.parameters())  # the fused optimizer takes that for granted
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for i in (1, 3) for a, b in zip(found[i], found[i + 1]))
    for its in found:
        torch.testing.assert_close(its, [loss.detach(), *expected], rtol=1e-4, atol=1e-5)


def test_an_error_in_a_thread_ends_the_step():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ZeroDivisionError):
            M.add_gradients(make_model(), lambda batch: 1 / 0, [0, 1, 2], "cpu", torch.autocast("cpu", enabled=False))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(3, 16, 32), (2, 16, 40), (2, 40, 16)])
def test_muon_makes_matrices_nearly_orthogonal(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = M.orthogonal(X, torch.float32)
    u, _, v = torch.linalg.svd(X, full_matrices=False)
    values = torch.diagonal(u.mT @ found @ v.mT, dim1=-2, dim2=-1)
    assert found.shape == X.shape and 0.5 < values.min() and values.max() < 1.3   # the same singular vectors, other values
    torch.testing.assert_close(u @ torch.diag_embed(values) @ v, found, rtol=0, atol=1e-3)


def test_muon_steps_as_torch_does():
    """torch.optim.Muon always computes in bfloat16; so does ours here."""
    ours, theirs = make_model(), make_model()
    matrices = [[p for p in m.layers.parameters() if p.ndim == 2] for m in (ours, theirs)]
    optimizers = [M.Muon(matrices[0], 0.02, 0.1, 0.8), torch.optim.Muon(matrices[1], lr=0.02, weight_decay=0.1, momentum=0.8,
                                                                         adjust_lr_fn="match_rms_adamw")]
    for step in range(3):
        for p, q in zip(*matrices):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        [optimizer.step() for optimizer in optimizers]
    for p, q, start in zip(*matrices, [p for p in make_model().layers.parameters() if p.ndim == 2]):
        assert (p - q).norm() < 0.02 * (p - start).norm()  # bfloat16 has steps of 0.004


def test_muon_has_the_precision_of_the_model():
    products = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.extend(a.dtype for a in args if "mm" in str(function) and isinstance(a, torch.Tensor))
            return function(*args, **(kwargs or {}))

    for precision in torch.float32, torch.bfloat16:
        model = make_model()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        _, muon = M.make_optimizers(model, 1e-3, 0.1, 0.8, precision)
        with Watch():
            muon.step()
        assert set(products) == {precision}
        products.clear()


def test_packed_sequences_do_not_see_each_other_nor_the_padding():
    model = make_model()
    _, (x, _, *sequences) = packed_ids((20, 30, 7), 192)
    before, other = model.hidden(x, *sequences), x.clone()
    other[0, 20:50] = (x[0, 20:50] + 1) % SMALL["vocab_size"]
    other[0, 57:] = 9
    after = model.hidden(other, *sequences)
    mine = [*range(20), *range(50, 57)]
    assert torch.equal(after[:, mine], before[:, mine]) and not torch.equal(after, before)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch built for CUDA, no device")
def test_packed_training_on_cuda_mixes_no_devices_and_the_kernel_takes_its_arguments():
    """Tensors that have a device, a type and a shape and no numbers; the kernel itself is not run."""
    arrays = data.pack([([3] * 50, 1)] * 4, 1024)
    model = Transformer(replace(CONFIGS["100m"], n_layers=1))
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        for module in model.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    module._parameters[name] = torch.empty(p.shape, dtype=torch.bfloat16)
        x, y, cu_seqlens = (torch.empty(a.shape, dtype=torch.int32 if a.dtype == np.int32 else torch.long) for a in arrays[:3])
        loss = model.loss(x, y, cu_seqlens, arrays[3])
        assert loss.device.type == "cuda" and loss.shape == ()
        with pytest.raises(RuntimeError):
            model.loss(x, y, cu_seqlens.cpu(), arrays[3])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_packed_and_compiled_losses_and_gradients_are_the_plain_ones():
    model = make_model(width=128, n_heads=2, n_kv_heads=1).cuda()
    apart, (x, y, cu_seqlens, max_seqlen) = packed_ids((1, 300, 7, 64, 2, 500), 1024)

    def run(losses):
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            total = sum(losses())
        total.backward()
        return total.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    plain, gradient = run(lambda: [model.loss(x.cuda(), y.cuda()) for x, y in apart])
    for compiled in False, True:
        if compiled:  # as pretrain.py does
            for layer in model.layers:
                layer.compile(dynamic=False)
        packed, packed_gradient = run(lambda: [model.loss(x.cuda(), y.cuda(), cu_seqlens.cuda(), max_seqlen)])
        torch.testing.assert_close(packed, plain, rtol=1e-2, atol=0)
        assert packed_gradient.isfinite().all()
        assert torch.cosine_similarity(packed_gradient, gradient, dim=0) > 0.99


def test_layers_are_compiled_once_for_each_shape_and_not_for_sampling():
    model, programs = make_model(), []
    batches = [packed_ids(lengths, size)[1] for lengths, size in (
        ((9, 30), 192), ((90,), 384), ((40, 7, 2), 192), ((128, 200), 384))]

    def losses():
        model.zero_grad()
        losses = [model.loss(*batch) for batch in batches]
        torch.stack(losses).sum().backward()
        return [*losses, *(p.grad for p in model.parameters())]

    plain = losses()
    torch._dynamo.reset()

    def backend(program, inputs):
        programs.append(program)
        return program.forward

    for layer in model.layers:
        layer.compile(dynamic=False, backend=backend)
    torch.testing.assert_close(losses(), plain, rtol=1e-4, atol=1e-4)
    assert len(programs) == 2
    held_out = M.mean_loss(model, batches, [1], "cpu", nullcontext())
    assert held_out == pytest.approx(float(sum(plain[:len(batches)])), rel=1e-5)
    assert len(programs) == 2  # a held-out loss uses the programs of training
    tokens, logprobs = sample(model, [[1, 2, 3], [4]], stop=0, n=3, max_new=20, generator=torch.Generator().manual_seed(0))
    assert_scored_as_by_forward(make_model(), [[1, 2, 3], [4]], tokens, logprobs, 3, 1.0)
    assert len(programs) == 2


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face

def test_hugging_face_model_has_the_same_logits_and_comes_back_whole():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model, ids = make_model(), random_ids(2, 50)
    config, state = M.to_hf(model)
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).eval()
    theirs.load_state_dict(state, strict=True)
    torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=1e-4)
    back = M.from_hf(theirs.config.to_dict(), theirs.state_dict())
    assert back.config == model.config
    assert_same_weights(back, model)


# ----------------------------------------------------------------------------------------------------------------------
# sampling

PROMPTS = [[5, 1, 9], [7], [2, 2, 8, 1, 4, 4, 3, 20, 11, 6], [3, 4], [9, 9, 9, 1], [12, 5, 13, 2, 10, 17]]
STOP = 0


def biased_model(bias, seed=0, **changes):
    """A model that favours (bias above 0) or shuns STOP, so that rows end soon, or never."""
    model = make_model(seed, **changes)
    with torch.no_grad():  # the last number of the residual stream is always 1; the head sees it, scaled by the norm
        model.embed_tokens.weight[:, -1] = 1.0
        for layer in model.layers:
            layer.self_attn.o_proj.weight[-1] = layer.mlp.down_proj.weight[-1] = 0.0
        model.norm.weight[-1] = 1.0
        model.embed_tokens.weight[STOP, -1] += bias
    return model


def assert_scored_as_by_forward(model, prompts, tokens, logprobs, n, temperature):
    """Each row's log-probabilities are those of `forward` on the whole row (with temperature 0: at temperature 1)."""
    assert len(tokens) == len(logprobs) == len(prompts) * n
    for row, (mine, scores) in enumerate(zip(tokens, logprobs)):
        prompt = prompts[row // n]
        assert scores.dtype == torch.float32 and scores.shape == (len(mine),)
        logits = model(torch.tensor([prompt + mine]))[0, len(prompt) - 1:-1]
        expected = (logits / (temperature or 1)).log_softmax(-1)[range(len(mine)), mine]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


def assert_stops_well(tokens, max_new):
    """STOP ends a row, comes nowhere else, and rows without it are as long as they may be."""
    for mine in tokens:
        assert STOP not in mine[:-1]
        assert mine[-1] == STOP or len(mine) == max_new


@pytest.mark.parametrize("rows", [1, 7, 1024])
@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.5])
def test_sampled_rows_are_scored_as_by_forward(temperature, rows):
    model, done = biased_model(1.0), []
    tokens, logprobs = sample(model, PROMPTS, STOP, n=3, max_new=20, temperature=temperature, rows=rows,
                              generator=torch.Generator().manual_seed(0), progress=done.append)
    assert_scored_as_by_forward(model, PROMPTS, tokens, logprobs, 3, temperature)
    assert_stops_well(tokens, 20)
    assert len(done) == {1: 18, 7: 3, 1024: 1}[rows] and max(map(len, done)) <= rows  # no more rows run at a time
    assert sorted(itertools.chain(*done)) == list(enumerate(tokens))


@pytest.mark.parametrize("bias, max_new, prompts", [(-30.0, 140, PROMPTS[:3]), (1.0, 40, PROMPTS)], ids=["never stops", "stops"])
def test_greedy_is_the_naive_loop(bias, max_new, prompts):
    model = biased_model(bias)  # where it never stops, 140 tokens make the cache grow several times
    tokens, logprobs = sample(model, prompts, STOP, n=2, max_new=max_new, temperature=0)
    naive_tokens, naive_logprobs = sample_naive(model, prompts, STOP, n=2, max_new=max_new, temperature=0)
    assert tokens == naive_tokens
    for mine, naive in zip(logprobs, naive_logprobs, strict=True):
        torch.testing.assert_close(mine, naive, rtol=0, atol=1e-4)
    assert len({tuple(mine) for mine in tokens}) >= len(prompts) - 1  # prompts do matter


def test_the_naive_loop_is_scored_as_by_forward():
    model = biased_model(1.0)
    tokens, logprobs = sample_naive(model, PROMPTS, STOP, n=3, max_new=20, temperature=0.7,
                                    generator=torch.Generator().manual_seed(0))
    assert_scored_as_by_forward(model, PROMPTS, tokens, logprobs, 3, 0.7)
    assert_stops_well(tokens, 20)
    assert len({tuple(mine) for mine in tokens}) > len(PROMPTS)


def test_rows_longer_than_the_cache_at_first():
    model = biased_model(-30.0)
    tokens, logprobs = sample(model, PROMPTS[:2], STOP, n=2, max_new=140, generator=torch.Generator().manual_seed(0))
    assert [len(mine) for mine in tokens] == [140] * 4
    assert_scored_as_by_forward(model, PROMPTS[:2], tokens, logprobs, 2, 1.0)


def test_rows_that_end_at_different_times_are_dropped_and_the_others_go_on(monkeypatch):
    sizes, drop_ended = [], M.Decoder.drop_ended

    def counted(decoder, alive):
        drop_ended(decoder, alive)
        sizes.append((alive.shape, (len(decoder.lengths), decoder.n)))

    monkeypatch.setattr(M.Decoder, "drop_ended", counted)
    model = biased_model(1.8)
    tokens, logprobs = sample(model, PROMPTS, STOP, n=7, max_new=90, generator=torch.Generator().manual_seed(0))
    assert any(b[0] < a[0] for a, b in sizes) and any(b[1] < a[1] for a, b in sizes)  # prompts and rows were dropped
    assert max(map(len, tokens)) > 24 and len(set(map(len, tokens))) > 10
    assert_scored_as_by_forward(model, PROMPTS, tokens, logprobs, 7, 1.0)
    assert_stops_well(tokens, 90)


def test_what_a_captured_step_needs(monkeypatch):
    """On CUDA a step of a shape is captured once and replayed in later calls, when the model has other weights: all that it
    reads and writes must lie where it lay. Here without CUDA: the addresses, and that the samples stay right."""
    at, changed, decode_step = {}, set(), M.Decoder.decode_step

    def tensors(x):
        return [x] if isinstance(x, torch.Tensor) else [t for part in x for t in tensors(part)] if type(x) in (list, tuple) else []

    def watched(decoder):
        graphs, shape = buffers["graphs"], (decoder.generated_kv[0][0].shape, decoder.prompt_mask.shape[-1])
        addresses = {name: [t.data_ptr() for t in tensors(value)] for name, value in vars(decoder).items() if tensors(value)}
        if shape not in graphs:  # emptied where memory had to move
            at.pop(shape, None)
        changed.update([shape] if at.setdefault(shape, addresses) != addresses else [])
        graphs[shape] = "captured"
        decode_step(decoder)

    monkeypatch.setattr(M.GraphDecoder, "decode_step", watched)
    monkeypatch.setattr(M, "Decoder", M.GraphDecoder)  # which `sample` takes on a CPU
    buffers, shapes = {}, []
    for seed in range(3):
        model = biased_model(1.0, seed)
        for n, max_new, prompts in (7, 200, PROMPTS), (3, 20, PROMPTS[:4]):
            tokens, logprobs = sample(model, prompts, STOP, n=n, max_new=max_new, rows=28, buffers=buffers,
                                      generator=torch.Generator().manual_seed(seed))
            assert_scored_as_by_forward(model, prompts, tokens, logprobs, n, 1.0)
            assert_stops_well(tokens, max_new)
        shapes.append(set(buffers["graphs"]))
    assert not changed
    assert shapes[0] and shapes[1] <= shapes[2] and len(shapes[2]) <= 10  # nothing is captured over and over


def test_a_step_never_waits_for_the_device(monkeypatch):
    """The meta device has shapes and no numbers: what reads one back, or mixes devices, raises."""
    moved = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            if len({t.device for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}) > 1:
                moved.append(f)
            return out

    monkeypatch.setattr(M.GraphDecoder, "decode_step", M.Decoder.decode_step)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
    monkeypatch.setattr(torch, "rand", lambda *size, generator, device: torch.empty(*size, device=device))
    decoder = M.GraphDecoder(make_model().to("meta"), PROMPTS[:2], 3, 1.0, buffers={})
    with Watch():
        decoder.step(torch.empty(6, device="meta"))
        decoder.step(torch.empty(6, device="meta"))
    assert not moved and decoder.token.shape == (6,) and decoder.generated_kv[0][0].dtype == torch.bfloat16
    with Watch(), pytest.raises(RuntimeError):
        decoder.token.sum().item()  # as said


@pytest.mark.parametrize("max_new", [1, 7, 8, 9, 16, 17])  # finished rows are looked for at every eighth token
def test_a_row_may_end_at_the_last_moment(max_new):
    model = biased_model(1.5)
    tokens, logprobs = sample(model, PROMPTS, STOP, n=20, max_new=max_new, generator=torch.Generator().manual_seed(3))
    assert_stops_well(tokens, max_new)
    assert any(mine[-1] != STOP for mine in tokens) and any(mine[-1] == STOP for mine in tokens)
    assert_scored_as_by_forward(model, PROMPTS, tokens, logprobs, 20, 1.0)


def test_a_seed_repeats_a_sample():
    model = biased_model(0.0)

    def draw(seed):
        return sample(model, PROMPTS, STOP, n=2, max_new=12, generator=torch.Generator().manual_seed(seed))

    (tokens, logprobs), (again, logprobs_again) = draw(1), draw(1)
    assert tokens == again and all(map(torch.equal, logprobs, logprobs_again))
    assert draw(2)[0] != tokens


def test_any_of_several_tokens_ends_a_row():
    """With one more stop a row is the same, cut behind the first of them."""
    model = make_model()
    (whole,), _ = sample(model, [PROMPTS[0]], STOP, max_new=30, temperature=0)
    other = whole[len(whole) // 2]
    (tokens,), (logprobs,) = sample(model, [PROMPTS[0]], [STOP, other], max_new=30, temperature=0)
    assert tokens == whole[:whole.index(other) + 1] and len(logprobs) == len(tokens)
    tokens, _ = sample(model, PROMPTS, [STOP, 1, 2, 3], n=20, max_new=30, generator=torch.Generator().manual_seed(0))
    assert all(len(row) == 30 or row[-1] in (STOP, 1, 2, 3) for row in tokens)
    assert not any({STOP, 1, 2, 3} & {*row[:-1]} for row in tokens) and len({*map(len, tokens)}) > 3



@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
def test_samples_have_the_distribution_of_the_model(temperature):
    """Chi-square over the first two tokens: the first comes from the prompt, the second from the cache."""
    n, vocab, prompt = 20_000, 6, [5, 1, 3]
    model = biased_model(0.0, vocab_size=vocab)
    with torch.no_grad():
        model.norm.weight *= 0.5  # all tokens have a chance
    tokens, _ = sample(model, [prompt], STOP, n=n, max_new=2, temperature=temperature, rows=n,
                       generator=torch.Generator().manual_seed(0))

    def p(ids):
        return (reference(model, torch.tensor(ids))[-1] / temperature).softmax(-1).tolist()

    expected = {(STOP,): n * p(prompt)[STOP]}
    for a in range(1, vocab):
        expected |= {(a, b): n * p(prompt)[a] * p(prompt + [a])[b] for b in range(vocab)}
    seen = dict.fromkeys(expected, 0)
    for mine in tokens:
        seen[tuple(mine)] += 1
    rare = [cell for cell in expected if expected[cell] < 8]
    cells = [(seen[cell], expected[cell]) for cell in expected if cell not in rare]
    cells.append((sum(seen[cell] for cell in rare), sum(expected[cell] for cell in rare) + 1e-3))
    chi2, df = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    assert df >= 8 and chi2 < df + 5 * math.sqrt(2 * df), cells


def test_sampling_in_bfloat16_stays_close_to_forward():
    model = biased_model(0.5)
    with torch.autocast("cpu", torch.bfloat16):
        tokens, logprobs = sample(model, PROMPTS, STOP, n=2, max_new=30, generator=torch.Generator().manual_seed(0))
    for row, (mine, scores) in enumerate(zip(tokens, logprobs)):
        prompt = PROMPTS[row // 2]
        exact = reference(model, torch.tensor(prompt + mine))
        exact = exact.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(mine) - 1), mine]
        assert (scores - exact).abs().mean() < 0.1


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints

def checkpoint_of(model, **more):
    return dict(stage="test", config=asdict(model.config), model=model.state_dict(), step=3, **more)


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_refused(path):
    """A ValueError of one line that names the file, from reading it or from building its model; nothing else."""
    with pytest.raises(ValueError) as caught:
        build_model(load_checkpoint(path), path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_comes_back_exactly(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path / "a.pt", checkpoint_of(model, lr=0.1, recipe={"ops": [2, 4]}, rng=torch.get_rng_state()))
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert (checkpoint["step"], checkpoint["lr"], checkpoint["recipe"]) == (3, 0.1, {"ops": [2, 4]})
    assert torch.equal(checkpoint["rng"], torch.get_rng_state())
    back = build_model(checkpoint)
    assert back.config == model.config
    assert_same_weights(back, model)
    ids = random_ids(2, 9)
    assert torch.equal(back(ids), model(ids))
    back.loss(ids, ids).backward()  # it can be trained further
    assert all(p.grad is not None for p in back.parameters())


def test_a_failed_save_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path, model = tmp_path / "a.pt", make_model()
    save_checkpoint(path, checkpoint_of(model))
    before = path.read_bytes()

    def fails(checkpoint, f):
        f.write(before[:len(before) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, checkpoint_of(make_model(seed=1)))
    assert path.read_bytes() == before
    monkeypatch.undo()
    save_checkpoint(path, checkpoint_of(make_model(seed=2)))  # and what it left behind is not in the way
    assert_same_weights(build_model(load_checkpoint(path)), make_model(seed=2))
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old-format"])
def test_a_checkpoint_cut_off_anywhere_is_refused(tmp_path, zipped):
    path = tmp_path / "a.pt"
    torch.save(checkpoint_of(make_model(n_layers=1)), path, _use_new_zipfile_serialization=zipped)
    build_model(load_checkpoint(path))
    whole = path.read_bytes()
    lengths = {*range(0, 60), *range(0, len(whole), len(whole) // 60), *range(len(whole) - 30, len(whole))}
    for length in sorted(lengths):
        path.write_bytes(whole[:length])
        assert_refused(path)


def test_a_checkpoint_with_flipped_bytes_is_refused_or_read(tmp_path):
    """Never another error. Flips go where the structure is, not the weights."""
    path, rng = tmp_path / "a.pt", random.Random(0)
    for zipped in (True, False):
        torch.save(checkpoint_of(make_model(n_layers=1)), path, _use_new_zipfile_serialization=zipped)
        whole = path.read_bytes()
        for _ in range(100):
            flipped = bytearray(whole)
            flipped[rng.randrange(3000)] = rng.randrange(256)
            path.write_bytes(flipped)
            try:
                build_model(load_checkpoint(path), path)
            except ValueError as error:
                assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"not a checkpoint\n", pickle.dumps({"stage": "test"}),
                                     pickle.dumps([1] * 1000), b"PK\x03\x04" + b"\0" * 60], ids=range(6))
def test_foreign_files_are_refused(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    assert_refused(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"stage": "test"}, {"stage": "test", "model": {}},
                                     {"model_state": {}, "epoch": 3}, torch.zeros(3), "text", None], ids=str)
def test_foreign_checkpoints_are_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt")


def test_a_whole_pickled_model_is_refused(tmp_path):
    torch.save(make_model(), tmp_path / "a.pt")
    assert_refused(tmp_path / "a.pt")


def test_a_path_without_a_file_is_refused(tmp_path):
    assert_refused(tmp_path / "missing.pt")
    assert_refused(tmp_path)  # a directory


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo ran > '{self.marker}'",)


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path, marker = tmp_path / "a.pt", tmp_path / "marker"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # the payload works where it is let
    marker.unlink()
    checkpoint = checkpoint_of(make_model(), more=Payload(marker))
    torch.save(checkpoint, path)
    assert_refused(path)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=False)
    assert_refused(path)
    path.write_bytes(pickle.dumps(Payload(marker)))
    assert_refused(path)
    assert not marker.exists()


WRONG_CONFIGS = [
    *itertools.product(["n_layers"], [10 ** 9, 100, 3, 0, -1, 2.0, None, "2", [2]]),
    *itertools.product(["width"], [0, -32, 10 ** 7, 10 ** 12, 10 ** 30, "32"]),
    *itertools.product(["n_heads"], [0, -4, "4"]), *itertools.product(["n_kv_heads"], [0, 1, 4, -1]),
    ("mlp", 10 ** 15), ("vocab_size", 10 ** 12), ("vocab_size", -1),
]


@pytest.mark.parametrize("key, value", WRONG_CONFIGS, ids=str)
def test_sizes_that_do_not_fit_the_weights_are_refused_without_taking_memory(tmp_path, monkeypatch, key, value):
    checkpoint, path = checkpoint_of(make_model()), tmp_path / "a.pt"
    checkpoint["config"][key] = value
    save_checkpoint(path, checkpoint)
    init = Transformer.__init__

    def on_meta(self, config):
        assert torch.empty(0).is_meta, "the model is built for real before its sizes are checked"
        init(self, config)

    monkeypatch.setattr(Transformer, "__init__", on_meta)
    assert_refused(path)


# the weights fit these, but no forward pass does
@pytest.mark.parametrize("changes", [dict(n_layers=0), dict(n_heads=32, n_kv_heads=32), dict(n_heads=4, n_kv_heads=3),
                                     dict(eps="x"), dict(rope_theta=None), dict(rope_theta="x")], ids=str)
def test_a_configuration_that_cannot_run_is_refused(tmp_path, changes):
    sizes = {k: v for k, v in changes.items() if isinstance(v, int)}
    checkpoint = checkpoint_of(Transformer(Config(**{**SMALL, **sizes})))
    checkpoint["config"] |= changes
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    assert_refused(tmp_path / "a.pt")


def renamed(state):
    return {"x." + name: tensor for name, tensor in state.items()}


def without_one(state):
    return dict(list(state.items())[1:])


def with_one_more(state):
    return {**state, "layers.0.extra": torch.zeros(3)}


def transposed(state):
    return {**state, "layers.0.mlp.up_proj.weight": state["layers.0.mlp.up_proj.weight"].T}


def with_numbers(state):
    return {name: 1.0 for name in state}


def as_list(state):
    return list(state.values())


@pytest.mark.parametrize("change", [renamed, without_one, with_one_more, transposed, with_numbers, as_list, len])
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    checkpoint = checkpoint_of(make_model())
    save_checkpoint(tmp_path / "a.pt", {**checkpoint, "model": change(checkpoint["model"])})
    assert_refused(tmp_path / "a.pt")


def test_a_small_file_cannot_claim_much_memory(tmp_path):
    """A tensor of stride 0 is large on paper only: its shape must be refused before it is copied or converted."""
    checkpoint, path = checkpoint_of(make_model()), tmp_path / "a.pt"
    checkpoint["model"]["norm.weight"] = torch.zeros(1, dtype=torch.float16).expand(2 ** 46)  # 256 TiB as float32
    save_checkpoint(path, checkpoint)
    assert path.stat().st_size < 10 ** 6
    converted = []
    loaded = load_checkpoint(path)
    wide = loaded["model"]["norm.weight"]
    assert wide.shape == (2 ** 46,)
    with watch(converted):
        with pytest.raises(ValueError):
            build_model(loaded, path)
    assert not converted, f"tried to make tensors of {converted} bytes"


class watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the sizes of conversions of more than a gigabyte, and does not let them happen."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and not args[0].is_meta and args[0].numel() > 2 ** 28:
            self.sizes.append(4 * args[0].numel())
            raise RuntimeError("not enough memory")
        return func(*args, **(kwargs or {}))
