"""
The transformer: a Qwen2-style decoder (RMSNorm, rotary positions, grouped-query attention with q/k/v bias, SwiGLU, tied
embeddings), batched sampling with a key-value cache, and checkpoints.

Parameters have the names and layouts of Hugging Face's Qwen2ForCausalLM without its leading "model.", so a model moves
there and back by renaming (`to_hf`, `from_hf`), and `python model.py CKPT --to-hf DIR` writes one that
`AutoModelForCausalLM.from_pretrained(DIR)` loads.

Letters in shape comments: B rows, T tokens, C width, H heads, G key-value heads, D width of a head.
"""
import argparse
import importlib.util
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from multiprocessing import parent_process

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

# torch prefers cuDNN's attention on Hopper devices, which plans anew for every shape; flash attention takes any
torch.backends.cuda.enable_cudnn_sdp(False)

# ----------------------------------------------------------------------------------------------------------------------
# the model


@dataclass
class Config:
    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    mlp: int                 # width inside the MLP
    vocab_size: int = 640    # data.VOCAB_SIZE
    rope_theta: float = 1e6
    eps: float = 1e-6
    init_std: float = 0.02
    look_back: int = 0       # layers in which some heads start out looking at the tokens just before (see `look_back`)


CONFIGS = {
    "tiny": Config(n_layers=4, width=128, n_heads=4, n_kv_heads=2, mlp=384, rope_theta=1e4, init_std=0.05, look_back=2),
    "100m": Config(n_layers=12, width=768, n_heads=12, n_kv_heads=2, mlp=3072),  # arXiv 2512.07783, its model
}


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return RMSNormCPU.apply(x, self.weight, self.eps)


class RMSNormCPU(torch.autograd.Function):
    """F.rms_norm with its gradient written out, and one rounding under autocast: on a CPU, torch runs it and its backward pass
    as a chain of small operations. Whole training steps are 1.02 to 1.06 times as fast (two cores, `tests/bench.py norm`)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight)
        out = normed * weight
        # rounded once here, and not in each of the matrix products that read it
        return out.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else out

    @staticmethod
    def backward(ctx, grad):
        normed, rstd, weight = ctx.saved_tensors
        grad = grad.to(normed.dtype)
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        shared = (grad * normed).mean(-1, keepdim=True)
        return torch.addcmul(grad, normed, shared, value=-1) * rstd, grad_weight, None


def rotary_tables(positions, dim, theta):
    """For integer positions (..., T) the cosine and the sine, negative in the first half, both (..., T, dim) in float32.

    (RoFormer, arXiv 2104.09864)
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()  # the two halves of a head rotate together, as in Qwen2
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Apply rotary positions to x (B, H, T, D); the result has the precision of cos and sin."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = config.n_heads, config.n_kv_heads, config.width // config.n_heads
        self.q_proj = nn.Linear(config.width, self.n_heads * self.head_dim)
        self.k_proj = nn.Linear(config.width, self.n_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(config.width, self.n_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(self.n_heads * self.head_dim, config.width, bias=False)

    def forward(self, x, cos, sin, attend, *sequences):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)     # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, *sequences)            # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)

    def forward(self, x, cos, sin, attend, *sequences):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, *sequences)
        return x + self.mlp(self.post_attention_layernorm(x))


def causal_attention(q, k, v):
    """Every token sees itself and those before it; q (B, H, T, D), k and v (B, G, T, D) with G dividing H."""
    # no mask is built: the fused kernels know "causal"; query heads that share a key-value head are neighbours
    if q.device.type == "cpu":  # there the backward pass in bfloat16 takes ten times as long as in float32
        with torch.autocast("cpu", enabled=False):
            q, k, v = q.float(), k.float(), v.float()
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    q, k = q.to(v.dtype), k.to(v.dtype)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def packed_attention(q, k, v, cu_seqlens, max_seqlen):
    """`causal_attention` where a row (B = 1) is several sequences end to end, see data.pack: a token sees its own only."""
    T, gqa = q.shape[2], q.shape[1] != k.shape[1]
    if q.is_cuda:  # the fused kernel, for bfloat16: it skips what is not of the same sequence
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))                # (T, H, D), twice (T, G, D)
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), enable_gqa=gqa)
        return y.transpose(0, 1)[None]
    sequence = sequence_of(cu_seqlens, T)  # elsewhere a mask, which is slow and good for comparison
    sees = (sequence[:, None] == sequence).tril()
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), sees, enable_gqa=gqa)


def sequence_of(cu_seqlens, T):
    """Which sequence each of T tokens belongs to."""
    return torch.searchsorted(cu_seqlens, torch.arange(T, device=cu_seqlens.device, dtype=torch.int32), right=True) - 1


def filled_up(where):
    """Indices (N,) with zeros appended up to a multiple of 128: libraries prepare, and keep, a kernel for every new size."""
    return F.pad(where, (0, -len(where) % 128))


@torch.no_grad()
def look_back(attention, theta, scale=4.5):
    """Let the query heads that share the first key-value head start out looking 1, 2, ... tokens back.

    Copying from the context needs a head that knows the token before each (arXiv 2209.11895); found by chance, that takes
    a small model a good part of a short run. Query and key biases alone make one, as rotary positions turn them with the
    distance. Only the start differs: the model stays a Qwen2 and training may change it all.
    """
    H, G, D = attention.n_heads, attention.n_kv_heads, attention.head_dim
    bias = torch.zeros(1, H // G, 1, D)
    bias[..., :D // 2] = scale
    back = -torch.arange(1.0, H // G + 1)[None, :, None]  # (1, R, 1): turned back by so many positions
    attention.k_proj.bias[:D] = bias[0, 0, 0]
    attention.q_proj.bias[:H // G * D] = rotate(bias, *rotary_tables(back, D, theta)).flatten()


class Transformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)  # also the output head
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.width, config.eps)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in self.layers[:config.look_back]:
            look_back(layer.self_attn, config.rope_theta)

    def hidden(self, ids, *sequences, attend=None):
        """ids (B, T) -> what the head reads, (B, T, C).

        sequences: cu_seqlens and max_seqlen, if the one row of ids is several sequences end to end (data.pack). attend: one
        attention function a layer, instead of causal attention.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        if sequences:
            cu_seqlens = sequences[0]
            positions = positions - cu_seqlens.index_select(0, sequence_of(cu_seqlens, len(positions)))
        cos, sin = rotary_tables(positions, self.layers[0].self_attn.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):  # a layer may be compiled, for training and not for each `attend`
            x = layer.forward(x, cos, sin, attend[i]) if attend else \
                layer(x, cos, sin, packed_attention if sequences else causal_attention, *sequences)
        return self.norm(x)

    def head(self, hidden):
        """Logits over the vocabulary."""
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocabulary) of the token that follows each."""
        return self.head(self.hidden(ids))

    def loss(self, x, y, *sequences, reduction="sum"):
        """Cross-entropy in nats of targets y (B, T) given x (B, T); positions with y = -100 do not count. sequences: see `hidden`."""
        hidden, y = self.hidden(x, *sequences).flatten(0, 1), y.flatten()
        if not hidden.is_cuda:  # no logits where there is no loss; on CUDA the selection would wait for the device
            where = (y != -100).nonzero()[:, 0]
            hidden, y = hidden.index_select(0, filled_up(where)), F.pad(y[where], (0, -len(where) % 128), value=-100)
        return F.cross_entropy(self.head(hidden).float(), y, reduction=reduction)

    def logprobs(self, x, where, targets, temperature=1.0, *sequences):
        """Log-probabilities (N,) of targets (N,), in nats, and the entropy (N,) of what each was drawn from (no gradient).

        targets[i] follows position where[i] of x (B, T), counted row by row. temperature: as it was when they were sampled.
        sequences: see `hidden`.
        """
        hidden = self.hidden(x, *sequences).flatten(0, 1).index_select(0, filled_up(where))
        logprobs = (self.head(hidden)[:len(where)].float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    def n_params(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Of a training step (2 operations a parameter forward, 4 backward) on rows of T tokens, with causal attention."""
        c = self.config
        return 6 * self.n_params() + 6 * c.n_layers * c.width * T  # a token attends to T / 2 others in the mean


def peak_flops(device):
    """Peak of bfloat16 matrix products without sparsity, operations/s, as the makers state it; 0 where not known."""
    peaks = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
             "RTX 4090": 165e12}
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((peak for part, peak in peaks.items() if part in name), 0)


# ----------------------------------------------------------------------------------------------------------------------
# sampling


class Decoder:
    """Writes the continuations of P prompts, n rows each, one token a row and step. `sample` drives it.

    Each prompt is kept once and its n rows read it together: one matrix product for all of them. The continuations have
    all the same length, so they need no scatter. What a step does is mostly small operations, so there are few of them:
    the weights are laid out for it (see `__init__`), and on CUDA a step is captured once for each shape and replayed.
    A captured step reads and writes the same addresses for ever. So there all that it touches lies in `buffers`, a dict that
    outlives the decoder, and shapes are rounded up to few: the next rollouts, with new weights, find their graphs there.
    Further letters: T tokens of the longest prompt, S slots for generated tokens, R = H / G.
    """

    static = None  # whether to work like this; None: on CUDA. The tests set it

    def __init__(self, model, prompts, n, temperature, generator=None, buffers=None):
        """Reads the prompts (lists of ids) and draws the first token of each row."""
        c, device = model.config, model.embed_tokens.weight.device
        self.G, self.R, self.D = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.width // c.n_heads
        self.n, self.temperature, self.eps, self.theta = n, temperature, c.eps, c.rope_theta
        self.kind = device.type
        self.static = self.kind == "cuda" if Decoder.static is None else Decoder.static
        self.buffers = {} if buffers is None else buffers
        self.graphs = self.buffers.setdefault("graphs", {})
        self.dtype = torch.get_autocast_dtype(self.kind) if torch.is_autocast_enabled(self.kind) else torch.float32
        self.lengths = self.to_static("lengths", torch.tensor([len(p) for p in prompts], device=device))  # (P,)
        P, T = len(prompts), max(map(len, prompts))
        T += -T % 32 if self.static else 0
        ids = torch.zeros(P, T, dtype=torch.long)
        for p, prompt in enumerate(prompts):
            ids[p, :len(prompt)] = torch.tensor(prompt)

        self.prompt_kv = [None] * c.n_layers  # keys and values of the prompts, each (P * G, T, D)

        def keep_kv(layer):
            def attend(q, k, v):
                self.prompt_kv[layer] = self.to_static_kv("prompt", layer, (
                    x.to(self.dtype).reshape(P * self.G, T, self.D) for x in (k, v)))
                return causal_attention(q, k, v)
            return attend

        hidden = model.hidden(ids.to(device), attend=[keep_kv(i) for i in range(c.n_layers)])
        hidden = hidden[torch.arange(P, device=device), self.lengths - 1]  # padding is on the right: no token sees any
        padding = torch.arange(T, device=device) >= self.lengths[:, None]
        self.bias = torch.zeros(P, 1, T, dtype=self.dtype, device=device).masked_fill(padding[:, None], -torch.inf)
        self.bias = self.to_static("bias", self.bias.repeat_interleave(self.G, 0))  # (P * G, 1, T): -inf on padding
        self.generated_kv = [tuple(x.new_empty(P * self.G * n, 0, self.D) for x in kv) for kv in self.prompt_kv]
        self.filled = 0  # tokens a row in `generated_kv`
        self.slot = self.to_static("slot", torch.zeros(1, dtype=torch.long, device=device))  # the same, on the device

        # q, k, v and gate, up side by side; the norm's weight before them and the scale of the attention folded in
        self.weights = []
        for i, layer in enumerate(model.layers):
            a, m = layer.self_attn, layer.mlp
            qkv = torch.cat((a.q_proj.weight * self.D ** -0.5, a.k_proj.weight, a.v_proj.weight))
            qkv_bias = torch.cat((a.q_proj.bias * self.D ** -0.5, a.k_proj.bias, a.v_proj.bias))
            gate_up = torch.cat((m.gate_proj.weight, m.up_proj.weight)) * layer.post_attention_layernorm.weight
            weights = qkv * layer.input_layernorm.weight, a.o_proj.weight, gate_up, m.down_proj.weight
            self.weights.append((self.to_static(f"bias of {i}", qkv_bias.to(self.dtype)), *(
                self.to_static(f"weights {j} of {i}", w.to(self.dtype)).T for j, w in enumerate(weights))))
        self.embedding = self.to_static("embedding", model.embed_tokens.weight.detach())
        self.head = self.to_static("head", (self.embedding * model.norm.weight).to(self.dtype)).T

        self.uniform = self.to_static("uniform", torch.rand(P * n, generator=generator, device=device))
        token, logprob = self.draw(model.head(hidden).repeat_interleave(n, 0))
        self.token, self.logprob = self.to_static("token", token), self.to_static("logprob", logprob)  # (B,), what a step writes

    def to_static(self, name, x):
        """x; on CUDA a copy of it in `buffers`, under the same name always at the same address."""
        if not self.static:
            return x
        if name not in self.buffers or self.buffers[name].numel() < x.numel():
            self.buffers[name] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
            self.graphs.clear()  # they would still use the old address
            self.buffers.pop("pool", None)
        return self.buffers[name][:x.numel()].view(x.shape).copy_(x)

    def to_static_kv(self, what, layer, kv):
        return tuple(self.to_static(f"{what} {name} of {layer}", x) for name, x in zip(("keys", "values"), kv))

    def draw(self, logits):
        """Logits (B, vocabulary) -> tokens (B,) and their log-probabilities (B,)."""
        logprobs = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature == 0:
            token = logprobs.argmax(-1, keepdim=True)
        else:  # where a uniform number falls among the summed probabilities
            cumulative = logprobs.exp().cumsum(-1)
            token = torch.searchsorted(cumulative, self.uniform[:, None] * cumulative[:, -1:], right=True)
            token = token.clamp_max(logits.shape[-1] - 1)  # rounding
        return token[:, 0], logprobs.gather(-1, token)[:, 0]

    def rms_norm(self, x):  # its weight is in the matrix that follows
        return F.rms_norm(x, x.shape[-1:], None, self.eps).to(self.dtype)

    def decode_step(self):
        """The step itself: from self.token to the next one, all in place, nothing that waits for the device."""
        G, R, D, n = self.G, self.R, self.D, self.n
        B, S = len(self.token), self.generated_kv[0][0].shape[1]
        P, T, H = B // n, self.bias.shape[2], G * R
        positions = (self.lengths + self.slot).repeat_interleave(n)
        cos, sin = self.cos[positions], self.sin[positions]                                       # (B, 1, D)
        empty = torch.zeros(S, dtype=self.dtype, device=self.slot.device)
        empty.masked_fill_(torch.arange(S, device=self.slot.device) > self.slot, -torch.inf)
        x = self.embedding[self.token]
        layers = zip(self.weights, self.prompt_kv, self.generated_kv)
        for (qkv_bias, qkv, o, gate_up, down), (pk, pv), (gk, gv) in layers:
            y = torch.addmm(qkv_bias, self.rms_norm(x), qkv)                                      # (B, (H + 2 G) D)
            qk = rotate(y[:, :(H + G) * D].view(B, H + G, D), cos, sin).to(self.dtype)
            for cache, new in (gk, qk[:, H:]), (gv, y[:, (H + G) * D:]):
                cache.view(P, G, n, S, D).index_copy_(3, self.slot, new.view(P, n, G, 1, D).transpose(1, 2))
            q = qk[:, :H].view(P, n, G, R, D).transpose(1, 2).reshape(P * G, n * R, D)
            on_prompt = torch.baddbmm(self.bias, q, pk.mT)                                        # (P G, n R, T)
            on_generated = torch.bmm(q.view(P * G * n, R, D), gk.mT) + empty                      # (P G n, R, S)
            weights = torch.cat((on_prompt, on_generated.view(P * G, n * R, S)), -1).softmax(-1)
            y = torch.bmm(weights[..., :T], pv).view(P, G, n, R * D) + \
                torch.bmm(weights[..., T:].reshape(P * G * n, R, S), gv).view(P, G, n, R * D)
            x = x + y.transpose(1, 2).reshape(B, H * D) @ o
            gate, up = (self.rms_norm(x) @ gate_up).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ down
        token, logprob = self.draw(self.rms_norm(x) @ self.head)
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        self.slot += 1

    def step(self, uniform):
        """Write the next token of each row; uniform (B,) in [0, 1) decides which."""
        self.uniform.copy_(uniform)
        S = self.generated_kv[0][0].shape[1]
        if self.filled == S:
            S += 128 if self.static else 32
            self.generated_kv = [self.to_static_kv("generated", i, (F.pad(x, (0, 0, 0, S - self.filled)) for x in kv))
                                 for i, kv in enumerate(self.generated_kv)]
            positions = torch.arange(self.bias.shape[2] + S, device=self.slot.device)[:, None]
            cos, sin = rotary_tables(positions, self.D, self.theta)
            self.cos, self.sin = self.to_static("cos", cos), self.to_static("sin", sin)
        if self.kind == "cuda":
            self.replay()
        else:
            self.decode_step()
        self.filled += 1

    def replay(self):
        """`decode_step` as a CUDA graph. The first of a shape is a plain one, to warm up the libraries; the second is captured."""
        shape = len(self.lengths), self.n, self.bias.shape[2], self.generated_kv[0][0].shape[1], self.temperature
        if shape not in self.graphs:
            self.decode_step()
            self.graphs[shape] = None
            return
        if self.graphs[shape] is None:
            self.graphs[shape] = torch.cuda.CUDAGraph()
            if "pool" not in self.buffers:  # one for all graphs: none leaves anything in it
                self.buffers["pool"] = torch.cuda.graph_pool_handle()
            with torch.cuda.device(self.token.device), torch.cuda.graph(self.graphs[shape], pool=self.buffers["pool"]):
                self.decode_step()
        self.graphs[shape].replay()

    def select(self, prompts, rows):
        """Keep these prompts (P',) and of each these rows (P', n')."""
        P, n, G = len(self.lengths), self.n, self.G
        self.token, self.logprob = (self.to_static(name, x.view(P, n)[prompts].gather(1, rows).flatten())
                                    for name, x in (("token", self.token), ("logprob", self.logprob)))
        self.uniform = self.to_static("uniform", torch.empty_like(self.logprob))
        self.bias = self.to_static("bias", self.bias.unflatten(0, (P, G))[prompts].flatten(0, 1))
        self.prompt_kv = [self.to_static_kv("prompt", i, (x.unflatten(0, (P, G))[prompts].flatten(0, 1) for x in kv))
                          for i, kv in enumerate(self.prompt_kv)]
        self.generated_kv = [self.to_static_kv("generated", i, (
            x.unflatten(0, (P, G, n))[prompts[:, None], :, rows].transpose(1, 2).flatten(0, 2) for x in kv))
                             for i, kv in enumerate(self.generated_kv)]
        self.lengths, self.n = self.to_static("lengths", self.lengths[prompts]), rows.shape[1]


@torch.no_grad()
def sample(model, prompts, stop, n=1, max_new=256, temperature=1.0, generator=None, rows=1024, progress=None, buffers=None):
    """Continue each prompt n times, until the token `stop` or for `max_new` tokens.

    prompts: lists of token ids. temperature 0 takes the most likely token. rows: how many rows run at a time.
    progress: called now and then with the rows that are finished, [(index of the row, tokens)]. generator: torch.Generator on
    the model's device. buffers: a dict, {} at first, that keeps memory and captured steps for later calls with the same model;
    only on CUDA is anything put there.

    Returns lists in the order of the prompts, n rows a prompt: tokens (with `stop`, if it came) and, as a float32 tensor
    on the CPU, their log-probabilities under the sampling temperature (under temperature 1 when it is 0).
    """
    tokens, logprobs = [None] * (len(prompts) * n), [None] * (len(prompts) * n)
    # alike lengths together: little padding; on CUDA the longest first, since graphs are lost when memory has to grow
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]), reverse=model.embed_tokens.weight.is_cuda)
    per_batch = max(1, rows // n)
    buffers = {} if buffers is None else buffers
    for first in range(0, len(order), per_batch):
        batch = order[first:first + per_batch]
        out_tokens, out_logprobs, lengths = (x.cpu() for x in _sample_batch(
            model, [prompts[p] for p in batch], stop, n, max_new, temperature, generator, buffers))
        rows_of_batch = [p * n + i for p in batch for i in range(n)]
        for row, ids, scores, length in zip(rows_of_batch, out_tokens.numpy(), out_logprobs, lengths.tolist()):
            tokens[row], logprobs[row] = ids[:length].tolist(), scores[:length]
        if progress:
            progress([(row, tokens[row]) for row in rows_of_batch])
    return tokens, logprobs


def _sample_batch(model, prompts, stop, n, max_new, temperature, generator, buffers):
    """`sample` for rows that run at the same time: tokens (rows, max_new), log-probabilities, and how many of each count."""
    decoder = Decoder(model, prompts, n, temperature, generator, buffers)
    kind, device = decoder.kind, decoder.token.device
    # every so many steps rows that have ended are dropped, if no more than this share would stay: each time costs a copy of the
    # caches, on CUDA a wait and another graph as well
    look, full_enough = (8, 0.8) if kind == "cpu" else (16, 0.5)
    out_tokens = torch.full((len(prompts) * n, max_new), stop, device=device)
    out_logprobs = torch.zeros(len(prompts) * n, max_new, device=device)
    alive = torch.ones(len(prompts), n, dtype=torch.bool, device=device)
    row_of = torch.arange(len(prompts) * n, device=device).view(len(prompts), n)  # where the rows belong in the output
    with torch.autocast(kind, enabled=False):  # the decoder chooses its precisions itself
        for t in range(0, max_new, look):
            uniform = torch.rand(look, alive.numel(), generator=generator, device=device)
            written = [(decoder.token.clone(), decoder.logprob.clone())]
            for i in range(1, min(look, max_new - t)):
                decoder.step(uniform[i])
                written.append((decoder.token.clone(), decoder.logprob.clone()))
            tokens, logprobs = (torch.stack(x, dim=1) for x in zip(*written))
            out_tokens[row_of.flatten(), t:t + look], out_logprobs[row_of.flatten(), t:t + look] = tokens, logprobs
            # drop finished prompts and rows; not at each step, since looking waits for the device
            alive &= (tokens != stop).all(1).view_as(alive)
            per_prompt = alive.sum(1)
            n_prompts, n_rows = int((per_prompt > 0).sum()), int(per_prompt.max())
            if t + look >= max_new or not n_prompts:
                break
            if decoder.static:  # few shapes: a half, a quarter, ... of the prompts, some of which may have ended, and all rows
                halvings = int(math.log2(len(alive) / n_prompts))
                n_prompts, n_rows = len(alive) >> halvings, alive.shape[1]
            if n_prompts * n_rows <= full_enough * alive.numel():
                prompts_left = (per_prompt > 0).sort(descending=True, stable=True).indices[:n_prompts]
                alive_first = alive[prompts_left].sort(dim=1, descending=True, stable=True).indices
                rows_left = alive_first[:, :n_rows]
                decoder.select(prompts_left, rows_left)
                row_of, alive = (x[prompts_left].gather(1, rows_left) for x in (row_of, alive))
                uniform = uniform[:, :alive.numel()]
            decoder.step(uniform[0])
    stopped = out_tokens == stop  # a row that has ended writes on until it is dropped
    lengths = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, max_new)
    return out_tokens, out_logprobs, lengths


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: plain dicts of tensors, numbers and strings


def save_checkpoint(path, checkpoint):
    """Write a checkpoint so that the file under that name is at any moment a whole one, the old or the new. Raises OSError."""
    path = os.path.realpath(path)  # a link stays one
    part = f"{path}.part"
    try:
        with open(part, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch turns some of the one into the other
        if os.path.exists(part):
            os.remove(part)
        raise OSError(f"{path} could not be written (is the disk full?); nothing was changed there: {error}") from None


def load_checkpoint(path):
    """Read a checkpoint of ours; nothing in it is executed. Raises ValueError with a line for the user."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: train one first, or name another") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception:  # whatever a reader of pickles can stumble over in a file that is none of ours
        raise ValueError(f"{path} is not a whole checkpoint of plain tensors and numbers (cut off, or foreign)") from None
    if not isinstance(checkpoint, dict) or not {"stage", "config", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project")
    return checkpoint


def build_model(checkpoint, path="the checkpoint"):
    """The model of a checkpoint, with its weights, in eval mode. Raises ValueError with a line for the user."""
    config, state = checkpoint["config"], checkpoint["model"]
    try:
        if set(config) != {f.name for f in fields(Config)}:
            raise ValueError("unknown configuration")
        c = Config(**config)
        sizes = (c.n_layers, c.width, c.n_heads, c.n_kv_heads, c.mlp, c.vocab_size)
        if not (all(type(n) is int and n > 0 for n in sizes) and c.width % (2 * c.n_heads) == 0
                and c.n_heads % c.n_kv_heads == 0 and len(state) == 12 * c.n_layers + 2
                and all(type(x) in (int, float) for x in (c.rope_theta, c.eps, c.init_std, c.look_back))):
            raise ValueError("sizes do not fit")
        with torch.device("meta"):  # no memory is taken before the sizes are known to fit
            model = Transformer(c)
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in model.state_dict().items()}:
            raise ValueError("weights do not fit")
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
    except (ValueError, RuntimeError, TypeError, AttributeError, ZeroDivisionError, OverflowError):
        raise ValueError(f"{path} does not hold a model of this project") from None
    return model.requires_grad_(True).eval()


# ----------------------------------------------------------------------------------------------------------------------
# to and from Hugging Face's Qwen2


def to_hf(model):
    """-> (keyword arguments of transformers.Qwen2Config, state dict of Qwen2ForCausalLM). Names gain "model."."""
    c = model.config
    config = dict(vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.n_layers,
                  num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.eps,
                  rope_theta=c.rope_theta, initializer_range=c.init_std, tie_word_embeddings=True,
                  max_position_embeddings=2048, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return config, state | {"lm_head.weight": model.embed_tokens.weight}


def from_hf(config, state):
    """A model from a transformers.Qwen2Config (tied embeddings) and the state dict of its Qwen2ForCausalLM."""
    theta = getattr(config, "rope_theta", None) or config.rope_parameters["rope_theta"]
    model = Transformer(Config(n_layers=config.num_hidden_layers, width=config.hidden_size,
                               n_heads=config.num_attention_heads, n_kv_heads=config.num_key_value_heads,
                               mlp=config.intermediate_size, vocab_size=config.vocab_size, rope_theta=theta,
                               eps=config.rms_norm_eps, init_std=config.initializer_range))
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k != "lm_head.weight"})
    return model


def main():
    p = argparse.ArgumentParser(description="Write a checkpoint as a folder that transformers reads (AutoModelForCausalLM).")
    p.add_argument("checkpoint", help="e.g. out/pretrain.pt")
    p.add_argument("--to-hf", metavar="DIR", required=True, help="folder to write")
    args = p.parse_args()
    if not importlib.util.find_spec("transformers"):
        p.error("this needs transformers: pip install transformers")
    if os.path.exists(args.to_hf) and not os.path.isdir(args.to_hf):
        p.error(f"--to-hf {args.to_hf} is there already, and is no folder")
    with one_line_errors(p):
        config, state = to_hf(build_model(load_checkpoint(args.checkpoint), args.checkpoint))
        from transformers import Qwen2Config, Qwen2ForCausalLM
        model = Qwen2ForCausalLM(Qwen2Config(**config))
        model.load_state_dict(state)
        model.save_pretrained(args.to_hf)
    print(f"wrote {args.to_hf}; the tokenizer is data.tokenizer()")


# ----------------------------------------------------------------------------------------------------------------------
# What every stage needs around its algorithm, and no reader comes for: arguments, device and precision, ranks, optimizers,
# the files of a run, interrupts, progress.


def at_least(low, up_to=2 ** 62):
    """An argparse type: a number from `low` to `up_to`, an int if `low` is one. argparse refuses all else in one line."""
    def number(text):
        value = type(low)(text)
        if not low <= value <= up_to:  # nan, too
            high = f"and at most {up_to:g}" if up_to < 2 ** 62 else "and not huge"
            raise argparse.ArgumentTypeError(f"must be at least {low:g} {high}, got {text}")
        return value
    return number


def stage_parser(doc, presets, out):
    """The argument parser of a stage, with the options that every stage has. The stage adds its own."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [options]    (--help lists them)")
    p.add_argument("--preset", choices=presets, help="settings for a size of model (default: that of --init, or by the device)")
    p.add_argument("--out", default=out, help=f"checkpoint to write (default {out}); metrics go beside it, as .jsonl")
    p.add_argument("--resume", action="store_true", help="continue from --out; the result is that of one long run")
    p.add_argument("--seed", type=at_least(0), default=0, help="of all that is random (default 0)")
    g = p.add_argument_group("optimizer and problems (defaults from the preset)")
    g.add_argument("--steps", type=at_least(1), help="optimizer steps; in grpo.py, rollout batches")
    g.add_argument("--lr", type=at_least(0.0), help="learning rate after the warm-up")
    g.add_argument("--min-lr", type=at_least(0.0), help="learning rate at the end")
    g.add_argument("--weight-decay", type=at_least(0.0))
    g.add_argument("--clip", type=at_least(1e-6), default=1.0, dest="grad_clip", help="largest norm of the gradient (default 1)")
    g.add_argument("--distractors", type=at_least(0.0), help="mean number of sentences that the question does not need, up to 10")
    g = p.add_argument_group("running (defaults from the preset)")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="of matrix products (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: with CUDA and bfloat16)")
    g.add_argument("--micro-tokens", type=at_least(1), help="tokens in one forward pass; gradients of several add up")
    g.add_argument("--workers", type=at_least(0), help="processes that make problems; in grpo.py, that verify solutions")
    g.add_argument("--log-every", type=at_least(1), help="steps between rows of metrics")
    g.add_argument("--eval-every", type=at_least(1), help="steps between evaluations on held-out problems")
    g.add_argument("--save-every", type=at_least(1), help="steps between checkpoints")
    return p


def add_prediction_options(p):
    """The options of next-token prediction, in pretrain.py and midtrain.py."""
    g = p.add_argument_group("next-token prediction (defaults from the preset)")
    g.add_argument("--loss", choices=["all", "solution"], default="all", help="tokens with a loss: all (default), or the solution's")
    g.add_argument("--batch", type=at_least(1), help="problems per step, over all ranks")
    g.add_argument("--warmup", type=at_least(0.0, up_to=0.99), help="share of the steps over which the learning rate rises")
    g.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the layers, adamw for the rest")
    g.add_argument("--momentum", type=at_least(0.0, up_to=0.99), help="of muon")
    g.add_argument("--show", type=at_least(0), default=2, help="held-out problems to print at the end (default 2)")


def add_start_options(p, init, rl_share):
    """The options of a stage that goes on from a checkpoint, in midtrain.py and grpo.py: where it starts, on what, how long."""
    g = p.add_argument_group("start, problems and compute")
    g.add_argument("--init", default=init, help=f"checkpoint to start from (default {init})")
    g.add_argument("--ops", help='op range, in grpo.py also "edge": that of evaluate.py (default: OOD-edge, see evaluate.py)')
    g.add_argument("--id-share", type=at_least(0.0, up_to=1), help="share of problems from the range of pre-training")
    g.add_argument("--mix", help='instead of these two a mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20,school:2-20"')
    g.add_argument("--budget", type=at_least(1e-6), metavar="T", help="tokens of mid-training and RL, instead of --steps")
    g.add_argument("--rl-share", type=rl_share, metavar="B", help="share of the budget for RL, see grpo.RL_COST")


@contextmanager
def one_line_errors(parser):
    """Turns what is wrong with the input into argparse's one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(str(error).splitlines()[0])


def fast_bfloat16(device):
    """Whether the device has matrix products in bfloat16 that are faster than those in float32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def choose_device(args):
    """Fills in --device, --dtype and --compile where they were not given. Raises an error if there is no such device."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.empty(0, device=args.device)
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if fast_bfloat16(args.device) else "float32")
    if args.compile is None:
        args.compile = cuda and args.dtype == "bfloat16"
    if args.compile and cuda and args.dtype != "bfloat16":
        raise ValueError("--compile needs --dtype bfloat16 on CUDA: attention within packed problems has no float32 kernel")


def fill_from_preset(args, preset):
    """Gives each setting that was not set by an option its value from the preset."""
    if not args.device.startswith("cuda"):  # memory: with the 100m model 32768 tokens a pass take 18 GB, 4096 take 6
        preset = preset | dict(micro_tokens=min(4096, preset["micro_tokens"]))
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def set_up(args):
    """Joins the ranks, if torchrun started several, and seeds torch. Returns this rank's device and the autocast context in which
    its model computes."""
    device = args.device
    if n_ranks() > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return device, torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


# Ranks: the processes of one run. torchrun tells each its number by environment variables. In a single process all of these
# do nothing.

def rank():
    return int(os.environ.get("RANK", 0))


def n_ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*text):
    """Print, once and not on every rank, and above a bar of `Progress`."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, text)))
        sys.stdout.flush()


def sum_over_ranks(tensor):
    """Add up a tensor over the ranks, in place, and return it."""
    if n_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients_over_ranks(model):
    if n_ranks() > 1:
        parameters = list(model.parameters())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        summed = sum_over_ranks(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(parameters, summed.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)


def gather(items):
    """The lists of all ranks, joined."""
    if n_ranks() == 1:
        return items
    parts = [None] * n_ranks()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def any_rank(flag, device):
    """Whether the flag is set on any rank. With several ranks this waits for the device."""
    return bool(flag) if n_ranks() == 1 else bool(sum_over_ranks(torch.tensor(float(bool(flag)), device=device)))


# Training

def make_optimizers(model, lr, weight_decay, muon_momentum=None):
    """[AdamW] for all parameters or, with muon_momentum, [AdamW, Muon]: Muon for the matrices of the layers.

    Biases and the weights of norms have no weight decay. Muon's steps are scaled so that one learning rate and weight decay suit
    both (arXiv 2502.16982).
    """
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    decay = [model.embed_tokens.weight] + (matrices if muon_momentum is None else [])
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.AdamW([dict(params=decay), dict(params=no_decay, weight_decay=0.0)], lr=lr, betas=(0.9, 0.95),
                                    weight_decay=weight_decay, fused=True)]
    if muon_momentum is not None:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, momentum=muon_momentum,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def compile_layers(*models):
    """torch.compile, one layer at a time: all layers share a program for each shape, and packing has few shapes (data.pack)."""
    torch._dynamo.config.recompile_limit = 64
    for model in models:
        for layer in model.layers:
            layer.compile(dynamic=False)


def to_device(batch, device):
    """Arrays and tensors of a batch to the device; numbers stay as they are. On CUDA nothing waits for the copy."""
    def move(a):
        if isinstance(a, int):
            return a
        a = torch.as_tensor(a)
        if torch.device(device).type == "cuda" and not a.is_pinned():
            a = a.pin_memory()
        return a.to(device, non_blocking=True)
    return [move(a) for a in batch]


def step_batches(steps, first, last, n_workers, device):
    """An iterator over steps first ... last - 1 of data.TrainingSteps. Worker processes make them ahead of time.

    A step is its micro-batches, as tensors, and a tensor with the numbers of targets and of tokens in them.
    """
    def collate(micro_batches):
        counts = torch.tensor([[(y != -100).sum(), (x != 0).sum()] for x, y, *_ in micro_batches] or [[0, 0]]).sum(0)
        return [[a if isinstance(a, int) else torch.as_tensor(a) for a in batch] for batch in micro_batches], counts

    return iter(torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first, last), num_workers=n_workers, collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda", worker_init_fn=become_worker,
        generator=torch.Generator()))  # a private generator, so that it does not advance the global one


def become_worker(*_):
    """What a worker process does first: it leaves signals to the run itself, which then saves, and ends with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


@torch.no_grad()
def mean_loss(model, micro_batches, counts, device, precision):
    """The mean loss of a step of `step_batches`, in nats for each target token."""
    with precision:
        return sum(float(model.loss(*to_device(batch, device))) for batch in micro_batches) / max(1, int(counts[0]))


def say_expected_time(run, probes, n_steps):
    """Time run(probe) for some steps of the run, and print how long n_steps like them will take."""
    say("measuring how long a step takes")
    for _ in range(2):  # the first pass warms up
        began = time.perf_counter()
        for probe in probes:
            run(probe)
    took = (time.perf_counter() - began) / len(probes)
    # 1.2: for making the problems, the optimizers, held-out losses and checkpoints
    say(f"expected time: about {took * n_steps * 1.2 / 60:.1f} minutes")


# The files of a run

# settings that do not affect the result, so that a resumed run may change them
NO_MATTER = set("resume out metrics ops id_share eval_json device compile workers log_every eval_every eval_problems "
                "save_every show".split())


def check_outputs(*paths, inputs=()):
    """Raises ValueError or OSError if a file cannot be written: better now than after the work. Makes the folders."""
    for path in paths:
        if path.endswith("/") or os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path} is no name for a file")
        if os.path.realpath(path) in map(os.path.realpath, inputs):
            raise ValueError(f"writing {path} would overwrite an input")
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        probe = f"{path}.{os.getpid()}.part"
        open(probe, "ab").close()
        os.remove(probe)


def check_run_files(args, inputs=()):
    """`check_outputs` for a stage: the checkpoint --out and, beside it, the metrics, whose name this sets."""
    if args.out.endswith(".jsonl"):
        raise ValueError(f"--out {args.out} is the checkpoint: a name in .jsonl is for the metrics")
    args.metrics = args.out.removesuffix(".pt") + ".jsonl"
    check_outputs(args.out, args.metrics, inputs=inputs)


def read_trained(path, vocabulary):
    """A checkpoint of a stage and its model. Raises ValueError with a line for the user."""
    checkpoint = load_checkpoint(path)
    model, recipe, id_ops = build_model(checkpoint, path), checkpoint.get("recipe"), checkpoint.get("id_ops")
    numbers = [checkpoint.get("step"), checkpoint.get("problems"), *(id_ops if isinstance(id_ops, list) else [None])]
    if not (isinstance(recipe, dict) and isinstance(recipe.get("preset"), str) and len(numbers) == 4
            and all(type(n) is int for n in numbers)):
        raise ValueError(f"{path} does not say how it was trained: it is not a whole checkpoint of a stage")
    if recipe.get("vocabulary", vocabulary) != vocabulary:
        raise ValueError(f"{path} was trained with other tokens: data.py has changed since, so train anew")
    return checkpoint, model


def read_start(args, presets, vocabulary):
    """What midtrain.py and grpo.py start from: the checkpoint --init or, if --resume has something to continue, --out.

    Sets args.preset, if it was not given, and args.init_run, the id of the run that made --init. Returns the checkpoint and its
    model. Raises ValueError with a line for the user.
    """
    if (args.budget is None) != (args.rl_share is None) or args.budget is not None and args.steps is not None:
        raise ValueError("--budget and --rl-share go together, and instead of --steps")
    path = args.out if args.resume and os.path.exists(args.out) else args.init
    start, model = read_trained(path, vocabulary)
    recipe = start["recipe"]
    args.preset = args.preset or recipe["preset"]
    if args.preset not in presets:
        raise ValueError(f"{path} has preset {args.preset}, which is not in PRESETS here: add it, or give --preset")
    if path == args.init or os.path.exists(args.init):
        args.init_run = (start if path == args.init else load_checkpoint(args.init)).get("run")
    elif args.init == recipe.get("init"):  # it was moved away, and is not needed
        args.init_run = recipe.get("init_run")
    else:
        raise ValueError(f"there is no checkpoint {args.init}, and {args.out} was made from {recipe.get('init')}")
    return start, model


def measured_edge(path, checkpoint):
    """The op range that evaluate.py named as the edge of this checkpoint. Raises ValueError with a line for the user."""
    try:
        with open(path, encoding="utf-8") as f:
            edge = json.load(f)["checkpoints"][checkpoint]["edge"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--ops edge needs {checkpoint} in {path}: run python evaluate.py {checkpoint}") from None
    if edge is None:
        raise ValueError(f"{path} names no edge for {checkpoint}: no op has low pass@1 and some pass@k; give --ops")
    return "{}-{}".format(*edge)


def open_run(parser, args, stage, state, **parts):
    """Start a run or, with --resume, continue that of --out.

    state: numbers of a run at its start, {"step": 0, ...}; those of the checkpoint replace them. parts: what has a
    load_state_dict, or a list of such, by its name in the checkpoint. Returns the recipe: the settings that affect the result.
    --resume refuses a mismatch. Without --resume, old files are kept as .old.
    """
    state["run"] = uuid.uuid4().hex  # tells a run from another to the same file
    recipe = {k: v for k, v in vars(args).items() if k not in NO_MATTER} | {"world": n_ranks()}
    if args.resume and os.path.exists(args.out):
        with one_line_errors(parser):
            checkpoint = load_checkpoint(args.out)
            if checkpoint["stage"] != stage:
                raise ValueError(f"{args.out} is a checkpoint of {checkpoint['stage']}, not of {stage}")
            made_with = checkpoint.get("recipe", {})
            if made_with.get("init_run") != recipe.get("init_run"):
                raise ValueError(f"{args.out} was not made from this {args.init}: it is another checkpoint, or was trained anew "
                                 "since. Start afresh without --resume")
            for key, value in recipe.items():
                if key != "init" and made_with.get(key) != value:
                    raise ValueError(f"{args.out} was made with {key} {made_with.get(key)}, not {value}: resume with the same "
                                     "arguments, or start afresh without --resume")
            try:
                for name, part in parts.items():
                    pairs = zip(part, checkpoint[name], strict=True) if isinstance(part, list) else [(part, checkpoint[name])]
                    for module, its_state in pairs:
                        module.load_state_dict(its_state)
                state.update({name: checkpoint[name] for name in state})
                torch.set_rng_state(checkpoint["rng"])
            except Exception:  # a part is missing or is not what it should be
                raise ValueError(f"{args.out} is not a whole checkpoint of {stage}: start afresh without --resume") from None
        say(f"resumed {args.out} at step {state['step']}")
    elif args.resume:
        say(f"there is no {args.out} yet: starting at step 0")
    if rank() == 0:
        keep_metrics(args.metrics, state["step"]) if args.resume else set_aside(args.out, args.metrics)
    return recipe


def set_aside(*paths):
    """Rename files that a new run would overwrite to .old, or .old2, .old3, ... where there are such already."""
    there = [path for path in paths if os.path.exists(path)]
    suffixes = (".old" + (str(n) if n > 1 else "") for n in itertools.count(1))
    suffix = next(s for s in suffixes if not any(os.path.exists(path + s) for path in paths))
    for path in there:
        os.replace(path, path + suffix)
        say(f"{path} was there: it is {path}{suffix} now (--resume would have continued it; to go back, rename it)")


def keep_metrics(path, step):
    """Leave only the rows up to `step` in a JSONL file. A killed run wrote some past its last checkpoint, perhaps a part of one,
    and the resumed run writes them again."""
    kept = []
    if step and os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for row in f.read().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    kept += [row + "\n"] if json.loads(row)["step"] <= step else []
    path = os.path.realpath(path)  # a link stays one
    with open(f"{path}.part", "w", encoding="utf-8") as f:
        f.writelines(kept)
    os.replace(f"{path}.part", path)


def write_metrics(path, row):
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


# Interrupts and progress

@contextmanager
def noted_interrupts():
    """Within it, Ctrl-C and SIGTERM only add to the list that it yields, so that the run can save and end. A second Ctrl-C ends
    at once."""
    noted = []

    def note(number, _):
        if number == signal.SIGINT and noted and time.perf_counter() - noted[0] > 1:  # a launcher may pass on the first one
            raise KeyboardInterrupt
        noted.append(time.perf_counter())
        with suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving; Ctrl-C again ends at once\n" if rank() == 0 else b"")

    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Progress:
    """How far a run is, from 0 to 1, and the time left: a bar on a terminal, elsewhere a line every half minute."""

    def __init__(self, done=0.0):
        self.began, self.start, self.said = time.perf_counter(), done, time.perf_counter()
        self.bar = tqdm(total=1.0, initial=done, disable=None if rank() == 0 else True, smoothing=0.05,
                        bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}")

    def update(self, done, text=""):
        now = time.perf_counter()
        if not self.bar.disable:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(min(done, 1.0) - self.bar.n)
        elif rank() == 0 and now - self.said > 30:
            left = (now - self.began) * (1 - done) / max(done - self.start, 1e-9)
            print(f"{100 * done:3.0f} %, about {left / 60:.1f} minutes left, {text}", file=sys.stderr, flush=True)
            self.said = now

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()


def give_up(args, step, losses):
    """End a run whose model is broken: it must not replace a good checkpoint."""
    say(f"stopped at step {step}: {losses}; try a smaller --lr. {args.out} holds the last good checkpoint, if one was written.")
    sys.exit(1)


def end_if(interrupted, what_now):
    """End a run that was interrupted, after it has saved, with status 130, so that a shell stops `a && b`, too."""
    if interrupted:
        say(f"interrupted: {what_now}")
        sys.exit(130)


def run_script(main):
    """main() as a command. An interrupt before the first step ends with 130: there is nothing to save, and `a && b` must stop. An
    error of the system, such as a full disk, ends with one line."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))
    if n_ranks() > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
