"""
The transformer, sampling from it, and checkpoints.

The model is a Qwen2-style decoder (arXiv 2407.10671): RMSNorm, rotary positions, grouped-query attention with q/k/v bias,
SwiGLU, tied embeddings. Parameters have the names and layouts of Hugging Face's Qwen2ForCausalLM without its leading
"model.". So a model moves there and back by renaming (`to_hf`, `from_hf`), and `python model.py CKPT --to-hf DIR` writes one
that `AutoModelForCausalLM.from_pretrained(DIR)` loads.

Letters in shape comments: B rows, T tokens, C width, H heads, KV key-value heads, D width of a head.
"""
import argparse
import functools
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import threading
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass
from multiprocessing import parent_process
from typing import NamedTuple, Optional

# A thread that waits for others soon sleeps. By default it spins for long, and beside other processes the threads starve one
# another. OpenMP reads this when torch is imported, so scripts import model.py before torch. A value of the user's own stays.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Ctrl-C during these imports, which take seconds, ends a script without a traceback. Workers leave it to the run (become_worker).
interruptible = (threading.current_thread() is threading.main_thread()
                 and signal.getsignal(signal.SIGINT) is signal.default_int_handler)
if interruptible:
    signal.signal(signal.SIGINT, signal.SIG_IGN if parent_process() else signal.SIG_DFL)

import torch

if sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    sys.exit(f"this needs Python 3.11 to 3.14 and the packages of requirements.txt (pip install -r requirements.txt), "
             f"but here are Python {sys.version.split()[0]} and torch {torch.__version__}")

import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from tqdm import tqdm

if interruptible:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On Hopper GPUs torch prefers cuDNN's attention, which plans anew for every shape. Flash attention takes any shape.
torch.backends.cuda.enable_cudnn_sdp(False)
# torch 2.11 takes fewer KV heads than heads without being told; later versions want to be told.
VARLEN_OPTIONS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

# ----------------------------------------------------------------------------------------------------------------------
# the model


@dataclass
class Config:
    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    mlp: int                 # hidden width of the MLP
    vocab_size: int = 640    # data.VOCAB_SIZE
    rope_theta: float = 1e6
    eps: float = 1e-6
    init_std: float = 0.02
    look_back: int = 0       # number of layers in which some heads start out attending to the tokens just before


CONFIGS = {
    "tiny": Config(n_layers=4, width=128, n_heads=4, n_kv_heads=2, mlp=384, rope_theta=1e4, init_std=0.05, look_back=2),
    # the model of arXiv 2512.07783 and, for larger and smaller ones, its proportions
    "10m": Config(n_layers=6, width=384, n_heads=6, n_kv_heads=1, mlp=1536),
    "100m": Config(n_layers=12, width=768, n_heads=12, n_kv_heads=2, mlp=3072),
    "400m": Config(n_layers=18, width=1280, n_heads=20, n_kv_heads=4, mlp=5120),
    "1b": Config(n_layers=24, width=1792, n_heads=28, n_kv_heads=4, mlp=7168),
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def rotary_tables(positions, dim, theta):
    """Integer positions (..., T) -> cosines and sines (..., T, dim) for `rotate`, float32 (RoFormer, arXiv 2104.09864).

    The sine is negative in the first half of dim.
    """
    frequencies = theta ** (-torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
    angles = positions[..., None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()  # as in Qwen2, entry i of a head rotates with entry i + dim / 2
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Apply rotary positions to x (..., D). The result has the precision of cos and sin."""
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), dim=-1), sin)


class Attention(nn.Module):
    """Grouped-query attention: H / KV neighbouring query heads share a key-value head (arXiv 2305.13245)."""

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
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, KV, T, D)
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v, *sequences)            # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                        # (B, T, C)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

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


def causal_attention(q, k, v, mask=None):
    """Attention of every token to itself and the tokens before it: q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D).

    mask: (T, T), True where a query (row) may attend to a key (column), instead. Without it none is built: the fused kernels
    know "causal".
    """
    options = dict(attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1])
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, **options)
    with torch.autocast("cpu", enabled=False):  # on a CPU the backward pass in bfloat16 takes ten times as long as in float32
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)


def packed_attention(q, k, v, cu_seqlens, max_seqlen):
    """`causal_attention` inside each of several sequences laid end to end in one row (B = 1), see data.pack.

    cu_seqlens: where each sequence begins, and where the last one ends. max_seqlen: length of the longest.
    """
    if q.is_cuda:  # a fused kernel, in bfloat16, that skips pairs of tokens from different sequences
        q, k, v = (x[0].transpose(0, 1).to(v.dtype) for x in (q, k, v))                # (T, H, D), (T, KV, D), (T, KV, D)
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **VARLEN_OPTIONS)
        return y.transpose(0, 1)[None]                                                 # (1, H, T, D)
    sequence = sequence_of(cu_seqlens, q.shape[2])
    return causal_attention(q, k, v, (sequence[:, None] == sequence).tril())  # slow; the tests compare with it


def block_attention(q, k, v, blocks):
    """`causal_attention` inside each of several sequences laid end to end in one row (B = 1): blocks of n sequences of T tokens
    each, see data.in_blocks."""
    sizes = [n * T for n, T in blocks]
    y = []
    for (n, T), *qkv in zip(blocks, q.split(sizes, 2), k.split(sizes, 2), v.split(sizes, 2)):
        out = causal_attention(*(a[0].unflatten(1, (n, T)).transpose(0, 1) for a in qkv))  # (n, H, T, D)
        y.append(out.transpose(1, 2).flatten(0, 1))                                        # (n T, H, D)
    return torch.cat(y).transpose(0, 1)[None]                                              # (1, H, T, D)


def sequence_of(cu_seqlens, T):
    """The index of the sequence that each of T tokens belongs to, (T,)."""
    return torch.searchsorted(cu_seqlens, torch.arange(T, device=cu_seqlens.device, dtype=torch.int32), right=True) - 1


def filled_up(where):
    """Indices (N,) with zeros appended up to a multiple of 128: libraries prepare, and keep, a kernel for every new size."""
    return F.pad(where, (0, -len(where) % 128))


@torch.no_grad()
def look_back(attention, theta, scale=4.5):
    """Let the query heads that share the first key-value head start out attending 1, 2, ... tokens back.

    Copying from the context needs a head that knows the token before each (arXiv 2209.11895). A small model spends a good
    part of a short run on finding one by chance. Query and key biases alone make one, since rotary positions turn them by
    the distance. Only the start differs: the model stays a Qwen2, and training may change all of it.
    """
    heads, D = attention.n_heads // attention.n_kv_heads, attention.head_dim
    bias = scale * (torch.arange(D) < D // 2)  # (D,)
    attention.k_proj.bias[:D] = bias
    attention.q_proj.bias[:heads * D] = rotate(bias, *rotary_tables(-torch.arange(1.0, heads + 1), D, theta)).flatten()


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

        sequences: if the one row of ids is several sequences end to end, either blocks (see `block_attention`), or cu_seqlens and
        max_seqlen (see `packed_attention`).
        attend: a function (q, k, v) to use in every layer instead of causal attention.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        if len(sequences) == 2:  # each sequence counts from 0
            positions = positions - sequences[0].index_select(0, sequence_of(sequences[0], len(positions)))
        elif sequences:
            positions = torch.cat([positions[:T].repeat(n) for n, T in sequences[0]])
        cos, sin = rotary_tables(positions, self.layers[0].self_attn.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        attention = attend or (causal_attention, block_attention, packed_attention)[len(sequences)]
        for layer in self.layers:  # `forward` avoids a compiled layer, which would be compiled again for each `attend`
            x = (layer.forward if attend else layer)(x, cos, sin, attention, *sequences)
        return self.norm(x)

    def head(self, hidden):
        """What `hidden` returns (..., C) -> logits (..., vocabulary)."""
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocabulary) of the next token at each position."""
        return self.head(self.hidden(ids))

    def loss(self, x, y, *sequences, reduction="sum"):
        """Cross-entropy in nats of targets y (B, T) given x (B, T), a scalar. Targets of -100 do not count.

        reduction: "sum" over the targets or "mean". sequences: see `hidden`.
        """
        hidden, y = self.hidden(x, *sequences).flatten(0, 1), y.flatten()              # (B T, C), (B T,)
        if not hidden.is_cuda:  # compute logits only where there is a target; on CUDA the selection would wait for the device
            where = (y != -100).nonzero()[:, 0]
            hidden, y = hidden.index_select(0, filled_up(where)), F.pad(y[where], (0, -len(where) % 128), value=-100)
        return F.cross_entropy(self.head(hidden).float(), y, reduction=reduction)

    def logprobs(self, x, where, targets, temperature=1.0, *sequences):
        """Log-probabilities (N,) of targets (N,) and entropies (N,) of their distributions, without gradient, both in nats.

        targets[i] follows position where[i] of x (B, T), counted row by row. temperature: the one they were sampled at.
        sequences: see `hidden`.
        """
        hidden = self.hidden(x, *sequences).flatten(0, 1).index_select(0, filled_up(where))  # (N', C), N' >= N
        logprobs = (self.head(hidden)[:len(where)].float() / temperature).log_softmax(-1)  # (N, vocabulary)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    def n_params(self):
        """Number of parameters; the embedding, which is also the head, counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T):
        """Operations of a training step per token of rows of T tokens (arXiv 2204.02311, appendix B, with causal attention).

        6 a parameter (2 forward, 4 backward); and a token attends to T / 2 others in the mean.
        """
        return 6 * self.n_params() + 6 * self.config.n_layers * self.config.width * T


def peak_flops(device):
    """Peak of bfloat16 matrix products without sparsity, operations/s, as the makers state it; 0 where not known."""
    peaks = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
             "RTX 4090": 165e12}
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else ""
    return next((peak for part, peak in peaks.items() if part in name), 0)


# ----------------------------------------------------------------------------------------------------------------------
# sampling: `sample_naive` and `Decoder.decode_step` say what is computed. The rest makes it fast, `GraphDecoder` on CUDA


def draw(logits, temperature, uniform):
    """Draw one token a row: logits (B, vocabulary), uniform (B,) in [0, 1) -> tokens (B,), log-probabilities (B,) in nats.

    The uniform number picks the token by inverse transform sampling. Temperature 0 takes the most likely token instead, and
    scores it at temperature 1.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        token = logprobs.argmax(-1, keepdim=True)
    else:  # where the cumulative probability passes the uniform number
        cumulative = logprobs.exp().cumsum(-1)
        token = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        token = token.clamp_max(logits.shape[-1] - 1)  # rounding could lead past the last token
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


@torch.no_grad()
def sample_naive(model, prompts, stop, n=1, max_new=256, temperature=1.0, generator=None):
    """`sample` without a cache: the model reads the whole text again for every token. Slow; the tests compare with it.

    Arguments (stop is one token) and results are those of `sample`, up to rounding. It spends random numbers in another order. So
    for one seed only greedy tokens are the same; at other temperatures only their distribution is.
    """
    tokens, logprobs = [], []
    for prompt in (prompt for prompt in prompts for _ in range(n)):
        mine, scores = [], []
        while len(mine) < max_new and stop not in mine:
            logits = model(torch.tensor([[*prompt, *mine]], device=model.embed_tokens.weight.device))[:, -1]  # (1, vocabulary)
            token, logprob = draw(logits, temperature, torch.rand(1, generator=generator, device=logits.device))
            mine.append(int(token))
            scores.append(float(logprob))
        tokens.append(mine)
        logprobs.append(torch.tensor(scores))
    return tokens, logprobs


class Decoder:
    """Continues P prompts, n rows each, by one token a row and step. `sample` drives it.

    `decode_step` is `Transformer.forward` for one new token a row, with the keys and values of the earlier tokens from a
    cache. The rest of the class makes it fast: a prompt is cached once for its n rows, weights lie side by side, and rows
    that have ended are dropped.

    Further letters: B = P n rows, T tokens of the longest prompt, S slots for generated tokens in the cache.
    """

    # every check_every tokens, drop the rows that have ended if at most this share would stay: dropping copies the caches
    check_every, shrink_below = 8, 0.8
    # T is rounded up to a multiple of prompt_multiple, and S grows by grow_by when all slots are full
    prompt_multiple, grow_by = 1, 32

    def __init__(self, model, prompts, n, temperature, generator=None, buffers=None):
        """Read the prompts (lists of ids) and draw the first token of each row. buffers: see GraphDecoder.

        Matrix products and caches have the precision of autocast if it is on. The residual stream stays float32.
        """
        self.config, self.n, self.temperature, self.buffers = model.config, n, temperature, buffers
        device = model.embed_tokens.weight.device
        self.dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        self.lay_out_weights(model)
        logits = model.head(self.read_prompts(model, prompts)).repeat_interleave(n, 0)     # (B, vocabulary)
        uniform = torch.rand(len(logits), generator=generator, device=device)
        # (B,) each; row is the index of a row among all rows, which stays when others are dropped
        self.token, self.logprob, self.uniform, self.row = self.place("rows", (
            *draw(logits, temperature, uniform), uniform, torch.arange(len(logits), device=device)))

    # one decoding step

    def decode_step(self):
        """Replace `token` (B,), the last token of each row, by the next one, and `logprob` (B,) by its log-probability.

        It works in place and never waits for the device, so that a CUDA graph can replay it.
        """
        H, KV, D = self.config.n_heads, self.config.n_kv_heads, self.config.width // self.config.n_heads
        positions = (self.lengths + self.slot).repeat_interleave(self.n)                   # (B,)
        cos, sin = self.cos[positions], self.sin[positions]                                # (B, 1, D)
        self.generated_mask.index_fill_(0, self.slot, 0.0)  # the slot of this token is in use from now on
        x = self.embedding[self.token]                                                     # (B, C)
        for (qkv_bias, qkv, o, gate_up, down), prompt_kv, generated_kv in zip(self.weights, self.prompt_kv, self.generated_kv):
            y = torch.addmm(qkv_bias, self.rms_norm(x), qkv).view(-1, H + 2 * KV, D)       # q, k and v of each row
            qk = rotate(y[:, :H + KV], cos, sin).to(self.dtype)                            # (B, H + KV, D)
            y = self.attend(qk[:, :H], qk[:, H:], y[:, H + KV:], prompt_kv, generated_kv)  # (B, H D)
            x = x + y @ o
            gate, up = (self.rms_norm(x) @ gate_up).chunk(2, dim=-1)                       # (B, width of the MLP) each
            x = x + (F.silu(gate) * up) @ down
        token, logprob = draw(self.rms_norm(x) @ self.head_weight, self.temperature, self.uniform)
        self.token.copy_(token)
        self.logprob.copy_(logprob)
        self.slot += 1

    def rms_norm(self, x):
        """RMSNorm without its weight, which is folded into the matrix that follows."""
        return F.rms_norm(x, x.shape[-1:], None, self.config.eps).to(self.dtype)

    def step(self, uniform):
        """Write the next token of each row; uniform (B,) in [0, 1) decides which."""
        self.uniform.copy_(uniform)
        if self.filled == len(self.generated_mask):
            self.grow()
        self.decode_step()
        self.filled += 1

    # what makes it fast

    def attend(self, q, k, v, prompt_kv, generated_kv):
        """Attention of each row's new token: q (B, H, D), k and v (B, KV, D) -> (B, H D). Adds k and v to the cache.

        A prompt's keys and values are stored once, and its n rows read them in one matrix product (arXiv 2402.05099,
        2403.08845). A second product reads what each row generated. One softmax spans both.
        """
        P, KV, T, D = prompt_kv[0].shape
        n, per_kv = self.n, q.shape[1] // KV  # per_kv query heads share a key-value head
        for cache, new in zip(generated_kv, (k, v)):
            cache.index_copy_(3, self.slot, new.view(P, n, KV, 1, D).transpose(1, 2))      # (P, KV, n, 1, D)
        q = q.view(P, n, KV, per_kv, D).transpose(1, 2).contiguous()                       # (P, KV, n, per_kv, D)
        on_prompt = torch.baddbmm(self.prompt_mask.flatten(0, 1), q.view(P * KV, n * per_kv, D),
                                  prompt_kv[0].flatten(0, 1).mT).view(P, KV, n, per_kv, T)  # the mask is added
        on_generated = q @ generated_kv[0].mT + self.generated_mask                        # (P, KV, n, per_kv, S)
        weights = torch.cat((on_prompt, on_generated), dim=-1).softmax(-1)                 # (P, KV, n, per_kv, T + S)
        y = (weights[..., :T].flatten(2, 3) @ prompt_kv[1]).view_as(q) + weights[..., T:] @ generated_kv[1]  # shaped as q
        return y.transpose(1, 2).reshape(P * n, -1)                                        # (B, H D)

    def lay_out_weights(self, model):
        """Put q, k, v side by side, and gate, up: fewer, larger matrix products. Fold norm weights and attention scale in."""
        def fuse(layer):
            a, m, scale = layer.self_attn, layer.mlp, layer.self_attn.head_dim ** -0.5
            qkv_bias = torch.cat((a.q_proj.bias * scale, a.k_proj.bias, a.v_proj.bias))
            qkv = torch.cat((a.q_proj.weight * scale, a.k_proj.weight, a.v_proj.weight)) * layer.input_layernorm.weight
            gate_up = torch.cat((m.gate_proj.weight, m.up_proj.weight)) * layer.post_attention_layernorm.weight
            return [w.to(self.dtype) for w in (qkv_bias, qkv, a.o_proj.weight, gate_up, m.down_proj.weight)]

        # transposed, for x @ weight
        self.weights = [[bias, *(w.T for w in matrices)] for bias, *matrices in self.place("weights", map(fuse, model.layers))]
        self.embedding = self.place("embedding", model.embed_tokens.weight.detach())
        self.head_weight = self.place("head_weight", (self.embedding * model.norm.weight).to(self.dtype)).T

    def read_prompts(self, model, prompts):
        """Start the cache with the prompts. Returns what the head reads at the last token of each, (P, C)."""
        device, T = self.embedding.device, max(map(len, prompts))
        T += -T % self.prompt_multiple
        ids = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=device)  # (P, T)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)         # (P,)
        self.prompt_kv = []  # a layer: keys and values, (P, KV, T, D) each

        def cache_and_attend(q, k, v):  # the layers call it one after the other
            self.prompt_kv += [self.place(f"prompt_kv {len(self.prompt_kv)}", (x.to(self.dtype).contiguous() for x in (k, v)))]
            return causal_attention(q, k, v)

        hidden = model.hidden(ids, attend=cache_and_attend)                                # (P, T, C)
        padding = torch.arange(T, device=device) >= lengths[:, None, None, None]           # (P, 1, 1, T)
        mask = torch.where(padding, -torch.inf, 0.0).to(self.dtype).repeat(1, self.config.n_kv_heads, 1, 1)  # (P, KV, 1, T)
        self.lengths, self.prompt_mask = self.place("prompts", (lengths, mask))
        # no slots at first, see `grow`. All rows grow by a token a step, so a step writes the same slot of each
        self.generated_kv = [[x[:, :, None, :0].repeat(1, 1, self.n, 1, 1) for x in kv] for kv in self.prompt_kv]
        self.generated_mask = mask.new_empty(0)
        # how many slots are full, which is also the slot of the next token: on the host, and on the device
        self.filled, self.slot = 0, self.place("slot", torch.zeros(1, dtype=torch.long, device=device))
        return hidden[torch.arange(len(prompts), device=device), lengths - 1]  # no token attends to the padding on its right

    def grow(self):
        """Add slots to keys and values (P, KV, n, S, D) and to the mask (S,), -inf on empty slots; extend the rotary tables."""
        self.generated_kv = self.place("generated_kv", (
            (F.pad(x, (0, 0, 0, self.grow_by)) for x in kv) for kv in self.generated_kv))
        self.generated_mask = self.place("generated_mask", F.pad(self.generated_mask, (0, self.grow_by), value=-torch.inf))
        T, D = self.prompt_kv[0][0].shape[2:]
        positions = torch.arange(T + len(self.generated_mask), device=self.slot.device)[:, None]
        self.cos, self.sin = self.place("rotary", rotary_tables(positions, D, self.config.rope_theta))

    def drop_ended(self, alive):
        """Drop rows that have ended, if few enough stay. alive (P, n): whether each row goes on."""
        n_prompts, n_rows = self.shape_to_keep(alive)
        if n_prompts * n_rows > self.shrink_below * alive.numel():
            return
        # those that go on come first, so the first n_prompts and n_rows hold them all
        prompts = alive.any(1).sort(descending=True, stable=True).indices[:n_prompts]      # (P',)
        rows = alive[prompts].sort(dim=1, descending=True, stable=True).indices[:, :n_rows]  # (P', n')
        at, self.n = (prompts[:, None], rows), n_rows
        self.token, self.logprob, self.uniform, self.row = self.place("rows", (
            x.view_as(alive)[at].flatten() for x in (self.token, self.logprob, self.uniform, self.row)))
        self.lengths, self.prompt_mask = self.place("prompts", (x[prompts] for x in (self.lengths, self.prompt_mask)))
        self.prompt_kv = self.place("prompt_kv", ((x[prompts] for x in kv) for kv in self.prompt_kv))
        self.generated_kv = self.place("generated_kv", (
            (x.transpose(1, 2)[at].transpose(1, 2).contiguous() for x in kv) for kv in self.generated_kv))

    def shape_to_keep(self, alive):
        """How many prompts, and how many rows of each, must stay to keep every row that is alive (P, n)."""
        return int(alive.any(1).sum()), int(alive.sum(1).max())

    def place(self, name, x):
        """Return x, a tensor or nested iterables of them, with lists for the iterables. See GraphDecoder for the name."""
        return x if isinstance(x, torch.Tensor) else [self.place(f"{name} {i}", part) for i, part in enumerate(x)]


@torch.no_grad()
def sample(model, prompts, stop, n=1, max_new=256, temperature=1.0, generator=None, rows=1024, progress=None, buffers=None):
    """Continue each prompt n times, until the token `stop` or for `max_new` tokens (at least 1).

    prompts: lists of token ids, none empty. stop: a token, or a list of tokens of which any ends a row. temperature: 0 takes the
    most likely token. generator: a torch.Generator on the model's device. rows: how many rows run at a time, at most. progress: a
    function that is called after each such batch with [(index of the row, its tokens)]. buffers: a dict, {} at first, that keeps
    CUDA graphs and their memory for later calls with models of the same sizes and precision. On a CPU it stays empty.

    Returns two lists in the order of the prompts, n rows a prompt: the tokens of each row (with `stop`, if it came) and
    their log-probabilities in nats at the sampling temperature (at temperature 1 if that is 0), a float32 tensor on the CPU.
    """
    results, per_batch, per_prompt = {}, max(1, rows // n), min(n, rows)
    buffers = {} if buffers is None else buffers
    # similar lengths together need little padding; on CUDA the longest first, since graphs are lost when memory has to grow
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]), reverse=model.embed_tokens.weight.is_cuda)
    for first, start in itertools.product(range(0, len(order), per_batch), range(0, n, per_prompt)):
        batch, some = order[first:first + per_batch], range(start, min(start + per_prompt, n))
        rows_of_batch = [p * n + i for p in batch for i in some]
        results.update(zip(rows_of_batch, _sample_batch(
            model, [prompts[p] for p in batch], stop, len(some), max_new, temperature, generator, buffers)))
        if progress:
            progress([(row, results[row][0]) for row in rows_of_batch])
    return [results[row][0] for row in sorted(results)], [results[row][1] for row in sorted(results)]


def _sample_batch(model, prompts, stop, n, max_new, temperature, generator, buffers):
    """`sample` for rows that run at the same time: [(tokens, log-probabilities)], n rows a prompt."""
    device = model.embed_tokens.weight.device
    decoder = (GraphDecoder if device.type == "cuda" else Decoder)(model, prompts, n, temperature, generator, buffers)
    stops = [stop] if isinstance(stop, int) else stop
    out_tokens = torch.full((len(decoder.row), max_new), stops[0], device=device)

    def no_stop(tokens):
        return torch.stack([tokens != stop for stop in stops]).all(0)

    out_logprobs = torch.zeros(len(decoder.row), max_new, device=device)
    with torch.autocast(device.type, enabled=False):  # the decoder chooses its precisions itself
        for t in range(max_new):
            check = t % decoder.check_every == 0  # whether rows have ended: seldom, since this waits for the device
            if t > 0 and check:
                alive = no_stop(out_tokens[decoder.row, :t]).all(1)
                if not alive.any():
                    break
                decoder.drop_ended(alive.view(-1, decoder.n))
            if t > 0:
                decoder.step(uniform[t % decoder.check_every, :len(decoder.row)])
            if check:
                uniform = torch.rand(decoder.check_every, len(decoder.row), generator=generator, device=device)
            out_tokens[decoder.row, t], out_logprobs[decoder.row, t] = decoder.token, decoder.logprob
    # a row that has ended writes on until it is dropped
    lengths = (no_stop(out_tokens).cumprod(1).sum(1) + 1).clamp_max(max_new).tolist()
    return [(ids[:length].tolist(), scores[:length])
            for ids, scores, length in zip(out_tokens.cpu().numpy(), out_logprobs.cpu(), lengths)]


class GraphDecoder(Decoder):
    """A Decoder whose step is a CUDA graph: one launch instead of hundreds of small kernels.

    A CUDA graph replays fixed addresses; every tensor it touches lives in `buffers`. That dict outlives the decoder: later
    decoders copy their weights there and reuse the graphs. A graph also has fixed shapes, so shapes are rounded up to few.
    """

    check_every, shrink_below = 16, 0.5  # rarer than in Decoder: a check waits for the device, and a new shape needs a graph
    prompt_multiple, grow_by = 32, 128

    def place(self, name, x):
        """Copy x into `buffers`. A name keeps its address until it needs more memory."""
        if not isinstance(x, torch.Tensor):
            return super().place(name, x)
        if name not in self.buffers or self.buffers[name].numel() < x.numel():
            self.buffers[name] = torch.empty(x.numel(), dtype=x.dtype, device=x.device)
            self.buffers["graphs"] = {}  # the graphs so far use the old address
        return self.buffers[name][:x.numel()].view(x.shape).copy_(x)

    def shape_to_keep(self, alive):
        """As in Decoder, but in few shapes: 1/2, 1/4, ... of the prompts, some of which may have ended, with all their rows."""
        return len(alive) >> int(math.log2(len(alive) / super().shape_to_keep(alive)[0])), alive.shape[1]

    def decode_step(self):
        """Run the first step of a shape plainly, to warm up the libraries. Capture the second, and replay it ever after."""
        graphs, shape = self.buffers["graphs"], (self.generated_kv[0][0].shape, self.prompt_mask.shape[-1], self.temperature)
        if shape not in graphs:
            graphs[shape] = None
            return super().decode_step()
        if graphs[shape] is None:
            graphs[shape] = torch.cuda.CUDAGraph()
            pool = graphs.setdefault("pool", torch.cuda.graph_pool_handle())  # shared: no graph leaves anything in it
            with torch.cuda.device(self.token.device), torch.cuda.graph(graphs[shape], pool=pool):
                super().decode_step()
        graphs[shape].replay()


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
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): train a checkpoint first, or name another") from None
    except Exception:  # whatever a reader of pickles can stumble over in a file that is none of ours
        raise ValueError(f"{path} is not a whole checkpoint of plain tensors and numbers (cut off, or foreign)") from None
    if not isinstance(checkpoint, dict) or not {"stage", "config", "model"} <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of this project")
    return checkpoint


def build_model(checkpoint, path="the checkpoint"):
    """The model of a checkpoint, with its weights, in eval mode. Raises ValueError with a line for the user."""
    config, state = checkpoint["config"], checkpoint["model"]
    try:
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
# to and from Hugging Face folders of a Qwen2: config.json, generation_config.json, model.safetensors, tokenizer.json, ...

OURS = "nano_interplay.json"  # of a folder of ours: what else a checkpoint holds, so that a folder can be one again


def to_hf(model, end=None):
    """-> (keyword arguments of transformers.Qwen2Config, state dict of Qwen2ForCausalLM). Names gain "model.".

    end: the token that ends a text."""
    c = model.config
    config = dict(vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp, num_hidden_layers=c.n_layers,
                  num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, rms_norm_eps=c.eps,
                  rope_theta=c.rope_theta, initializer_range=c.init_std, tie_word_embeddings=True,
                  max_position_embeddings=2048, bos_token_id=None, eos_token_id=end, pad_token_id=end)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    return config, state | {"lm_head.weight": model.embed_tokens.weight}


def from_hf(config, state, path="the folder"):
    """A model from config.json of a Qwen2 with tied embeddings, a dict, and the state dict of its Qwen2ForCausalLM.

    Raises ValueError with a line for the user."""
    rope, heads = config.get("rope_parameters") or config.get("rope_scaling") or {}, config.get("num_attention_heads")
    for name, value, ours in (
            ("model_type", config.get("model_type"), "qwen2"), ("hidden_act", config.get("hidden_act", "silu"), "silu"),
            ("tie_word_embeddings", config.get("tie_word_embeddings", False), True),
            ("use_sliding_window", bool(config.get("use_sliding_window")), False),
            ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default")):
        if value != ours:
            raise ValueError(f"{path}: {name} is {value}, but only Qwen2 with {name} {ours} can be read")
    if config.get("head_dim", config["hidden_size"] // heads) != config["hidden_size"] // heads:
        raise ValueError(f"{path}: head_dim is not hidden_size / num_attention_heads")
    config = Config(n_layers=config["num_hidden_layers"], width=config["hidden_size"], n_heads=heads,
                    n_kv_heads=config.get("num_key_value_heads", heads), mlp=config["intermediate_size"],
                    vocab_size=config["vocab_size"], rope_theta=rope.get("rope_theta", config.get("rope_theta", 1e4)),
                    eps=config.get("rms_norm_eps", 1e-6), init_std=config.get("initializer_range", 0.02))
    state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    head = state.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, state.get("embed_tokens.weight", head[:0])):
        raise ValueError(f"{path}: the output head is not the embedding, though tie_word_embeddings says so")
    return build_model(dict(config=asdict(config), model=state), path)


class Folder(NamedTuple):
    """A Hugging Face folder that was read."""
    model: Transformer
    tokenizer: object        # a tokenizers.Tokenizer
    ends: list               # tokens that end a text
    positions: int           # the longest text that the model was made for, in tokens
    ours: Optional[dict]     # of a folder of ours: the checkpoint but for weights and optimizer


def read_hf(folder):
    """Read a Hugging Face folder, ours or another's. Nothing in it is executed. Raises ValueError with a line for the user."""
    if not (importlib.util.find_spec("safetensors") and importlib.util.find_spec("tokenizers")):
        raise ValueError(f"to read the folder {folder}, install transformers: pip install transformers")
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    def read_json(name):
        try:
            with open(os.path.join(folder, name), encoding="utf-8") as f:
                found = json.load(f)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{folder}/{name} is not a JSON object")
        return found

    if not os.path.isdir(folder):
        raise ValueError(f"{folder} is no folder")
    config, index = read_json("config.json"), read_json("model.safetensors.index.json")
    generation, ours = read_json("generation_config.json"), read_json(OURS)
    for name in "config.json", "tokenizer.json":
        if not os.path.isfile(os.path.join(folder, name)):
            raise ValueError(f"{folder} has no {name}: it is not a Hugging Face folder of a model with its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception:  # a plain one
        raise ValueError(f"{folder}/tokenizer.json cannot be read") from None
    tokenizer.no_truncation(), tokenizer.no_padding()  # which a file may ask for
    try:
        one_file, state = os.path.isfile(os.path.join(folder, "model.safetensors")), {}
        for name in ["model.safetensors"] if one_file or not index else sorted({*index["weight_map"].values()}):
            if os.path.basename(name) != name or not os.path.isfile(os.path.join(folder, name)):
                raise ValueError(f"{folder} has no {name}")
            state |= load_file(os.path.join(folder, name))
        model = from_hf(config, state, folder)
        ends = config.get("eos_token_id") if generation.get("eos_token_id") is None else generation["eos_token_id"]
        ends = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
        positions = config.get("max_position_embeddings", 2 ** 31)
        if not all(type(n) is int for n in (*ends, positions)):
            raise TypeError
    except SafetensorError:
        raise ValueError(f"{folder}: the weights are cut off, or are no safetensors") from None
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{folder}/config.json does not describe a Qwen2") from None
    if not all(0 <= end < model.config.vocab_size for end in ends):
        raise ValueError(f"{folder}: an end of text, {ends}, is no token of the model, which has {model.config.vocab_size}")
    return Folder(model, tokenizer, ends, positions, ours or None)


CARD = """---
license: mit
library_name: transformers
---
A Qwen2 of {params:.2f}M parameters, trained by nano-interplay (a re-implementation of arXiv 2512.07783): stage {stage},
step {step}, {problems} problems, op {low} to {high} in pre-training.

The prompt is `<question> PROBLEM QUESTION </question> <solution>`, see data.py. Recipe:

```json
{recipe}
```
"""


def write_hf(path, folder):
    """Write a checkpoint of a stage as a Hugging Face folder. Raises ValueError, OSError."""
    import data  # here alone: for the tokens
    from transformers import Qwen2Config, Qwen2ForCausalLM
    checkpoint, model = read_trained(path, data.VOCABULARY)
    ours = {name: checkpoint[name] for name in "stage config id_ops id_ranges recipe run step problems tokens".split()
            if name in checkpoint}
    config, state = to_hf(model, data.tokenizer().encode_single_token(data.END))
    theirs = Qwen2ForCausalLM(Qwen2Config(**config))
    theirs.load_state_dict(state)
    theirs.save_pretrained(folder)
    card = CARD.format(params=model.n_params() / 1e6, stage=ours["stage"], step=ours["step"], problems=ours["problems"],
                       low=ours["id_ops"][0], high=ours["id_ops"][1], recipe=json.dumps(ours["recipe"], indent=1))
    for name, content in {"tokenizer.json": data.hf_tokenizer(), "tokenizer_config.json": data.hf_tokenizer_config(), OURS: ours,
                          "README.md": card}.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(content if content is card else json.dumps(content, ensure_ascii=False, indent=1))


def main():
    p = argparse.ArgumentParser(usage="%(prog)s CKPT --to-hf DIR | DIR --from-hf CKPT", description=(
        "Write a checkpoint as a Hugging Face folder, which AutoModelForCausalLM, AutoTokenizer and evaluate.py read; or such a "
        "folder as a checkpoint. For example: model.py out/grpo.pt --to-hf out/hf"))
    p.add_argument("source", help="a checkpoint, e.g. out/pretrain.pt, or a folder that --to-hf wrote")
    way = p.add_mutually_exclusive_group(required=True)
    way.add_argument("--to-hf", metavar="DIR", help="folder to write, for transformers: weights, config, tokenizer, model card")
    way.add_argument("--from-hf", metavar="CKPT", help="checkpoint to write, for evaluate.py and as --init of a stage")
    args = p.parse_args()
    with one_line_errors(p):
        if args.from_hf is not None:
            import data  # for the fingerprint of its tokens
            folder = read_hf(args.source)
            if folder.ours is None:
                raise ValueError(f"{args.source} is no folder of ours, it lacks {OURS}: evaluate.py can score it as it is")
            check_trained(folder.ours, args.source, data.VOCABULARY)
            checkpoint = folder.ours | dict(model=folder.model.state_dict())
            build_model(checkpoint | dict(config=checkpoint.get("config", {})), args.source)  # its config may be another
            if os.path.exists(args.from_hf):
                raise ValueError(f"{args.from_hf} is there already: move it away, or give another name")
            check_outputs(args.from_hf)
            save_checkpoint(args.from_hf, checkpoint)
            say(f"wrote {args.from_hf}")
        else:
            if not importlib.util.find_spec("transformers"):
                raise ValueError("this needs transformers: pip install transformers")
            if os.path.exists(args.to_hf) and not (os.path.isdir(args.to_hf) and (
                    not os.listdir(args.to_hf) or os.path.exists(os.path.join(args.to_hf, OURS)))):
                raise ValueError(f"--to-hf {args.to_hf} is there already, and is no folder that --to-hf wrote")
            write_hf(args.source, args.to_hf)
            say(f"wrote {args.to_hf}; AutoModelForCausalLM and AutoTokenizer read it, and evaluate.py")


# ----------------------------------------------------------------------------------------------------------------------
# What every stage needs around its algorithm: arguments, device and precision, ranks, optimizers, the files of a run,
# interrupts, progress. A reader of the model can stop here.


def at_least(low, up_to=2 ** 62):
    """An argparse type: a number from `low` to `up_to`, an int if `low` is one. argparse refuses all else in one line."""
    def number(text):
        value = type(low)(text)
        if not low <= value <= up_to:  # nan, too
            high = f"and at most {up_to:g}" if up_to < 2 ** 62 else "and not huge"
            raise argparse.ArgumentTypeError(f"must be at least {low:g} {high}, got {text}")
        return value
    return number


def stage_parser(doc, presets, out, log_every=5):
    """The argument parser of a stage, with the options that every stage has. The stage adds its own."""
    settings = [f"preset {name}: " + ", ".join(f"{key} {value}" for key, value in presets[name].items()) for name in ("tiny", "100m")]
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [options]    (--help lists them)",
                                epilog="\n".join(textwrap.fill(text, 100, subsequent_indent="    ") for text in settings))
    p.add_argument("--preset", choices=presets, help="settings for a size of model (default: that of --init, or by the device)")
    p.add_argument("--out", default=out, help=f"checkpoint to write (default {out}); metrics go beside it, as .jsonl")
    p.add_argument("--resume", action="store_true", help="continue from --out; the result is that of one long run")
    p.add_argument("--seed", type=at_least(0, up_to=2 ** 31), default=0, help="random seed (default 0)")
    g = p.add_argument_group("optimizer and problems (defaults from the preset, see the end)")
    g.add_argument("--steps", type=at_least(1), help="steps; a step of grpo.py is a batch of rollouts and its updates")
    g.add_argument("--lr", type=at_least(0.0), help="learning rate after the warm-up")
    g.add_argument("--min-lr", type=at_least(0.0), help="learning rate at the end, at most --lr")
    g.add_argument("--weight-decay", type=at_least(0.0), help="of the optimizer, times the learning rate")
    g.add_argument("--clip", type=at_least(1e-6), default=1.0, dest="grad_clip", help="largest norm of the gradient (default 1)")
    add_world_options(g)
    g = p.add_argument_group("running (defaults from the preset)")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="of matrix products (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: with CUDA and bfloat16)")
    g.add_argument("--micro-tokens", type=at_least(1), help="tokens in one forward pass (by memory); gradients of several add up")
    g.add_argument("--workers", type=at_least(0), help="processes that make problems; in grpo.py, that verify solutions")
    g.add_argument("--log-every", type=at_least(1), default=log_every, help=f"steps between rows of metrics ({log_every})")
    g.add_argument("--eval-every", type=at_least(1), help="steps between evaluations on held-out problems")
    g.add_argument("--save-every", type=at_least(1), help="steps between checkpoints")
    return p


def add_world_options(p):
    """The settings of the generator (data.World)."""
    p.add_argument("--distractors", type=at_least(0.0), help="mean number of sentences that the question does not need, up to 10")
    p.add_argument("--max-parents", type=at_least(2), help="largest number of parents of a quantity, 2 to 4")
    p.add_argument("--max-value", type=at_least(1), help="largest value of a quantity, 10 to 1000")


def take_world(args, recipe, world):
    """Settings of the generator that were not given become those of the recipe, or of `world` if the recipe has none."""
    for name, default in asdict(world).items():
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name, default))


def add_prediction_options(p):
    """The options of next-token prediction, in pretrain.py and midtrain.py."""
    g = p.add_argument_group("next-token prediction (defaults from the preset)")
    g.add_argument("--loss", choices=["all", "solution"], default="all", help="tokens with a loss (default all)")
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
    g.add_argument("--rl-share", type=rl_share, metavar="B", help="share of the budget for RL, of which a token counts 5/3")


@contextmanager
def one_line_errors(parser):
    """Turns what is wrong with the input into argparse's one line and exit status 2."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        parser.error(first_line(error))


def first_line(error):
    return (str(error).strip() or repr(error)).splitlines()[0]


def choose_device(args):
    """Fills in device, dtype (bfloat16 where its matrix products are fast) and compile. Raises ValueError for a device that
    cannot compute and for a --compile that does not work."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and n_ranks() > 1:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        if args.device.startswith("cuda:"):
            torch.cuda.set_device(args.device)
        square = torch.ones(8, 8, device=args.device)
        float((square @ square).sum())  # an old GPU may be there for torch, and have no kernels
    except Exception as error:
        raise ValueError(f"--device {args.device} cannot compute here ({first_line(error)}): --device cpu can") from None
    cuda = args.device.startswith("cuda")
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
    args.dtype = args.dtype or ("bfloat16" if fast else "float32")
    asked_for = args.compile
    if args.compile is None:
        args.compile = cuda and args.dtype == "bfloat16"
    if args.compile and cuda and args.dtype != "bfloat16":
        raise ValueError("--compile needs --dtype bfloat16 on CUDA: attention within packed problems has no float32 kernel")
    if args.compile:
        try:  # it needs a C++ compiler, on CUDA Triton too
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=args.device))
        except Exception as error:
            why = f"torch.compile does not work here ({first_line(error)})"
            if asked_for:
                raise ValueError(f"{why}: go without --compile") from None
            say(f"{why}: going on without")
            args.compile = False


# Bytes that a token of the 100m model keeps for the backward pass. Counted with 32,768 tokens: 19 GiB in bfloat16, 25 in float32
BYTES_PER_TOKEN = {"bfloat16": 19 * 2 ** 30 // 32_768, "float32": 25 * 2 ** 30 // 32_768}


def tokens_that_fit(tokens, free, dtype, config):
    """`tokens` a pass or, if they take more than half of so many free bytes, a half of them, a quarter, ... The other half is for
    weights, gradients, optimizer and, in GRPO, what sampling keeps."""
    while tokens > 1024 and tokens * BYTES_PER_TOKEN[dtype] * relative_depth_and_width(config) > free / 2:
        tokens //= 2
    return tokens


def relative_depth_and_width(config):
    """Layers times width, with those of the 100m model as 1: what a token keeps for the backward pass grows with it."""
    return config.n_layers * config.width / (12 * 768)


def presets_of(settings):
    """{size of model: {name: value}} from the settings of a stage, {name: (value for tiny, value for 100m)}.

    The other sizes have those of 100m with learning rates that go with 1 / width, as muP (arXiv 2203.03466, table 8) has it for
    the matrices of hidden layers and Adam. No model of them was trained.
    """
    tiny, of_100m = ({name: values[i] for name, values in settings.items()} for i in (0, 1))
    sizes = {size: of_100m | {name: float(f"{of_100m[name] * 768 / config.width:.2g}") for name in ("lr", "min_lr")}
             for size, config in CONFIGS.items()}
    return sizes | {"tiny": tiny, "100m": of_100m}


def n_cores(cgroup="/sys/fs/cgroup"):
    """How many cores this process may use: by its affinity, and by the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in ["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]:  # of cgroup v2 and v1: microseconds
        with suppress(OSError, ValueError):  # no quota: no file, "max" or -1
            quota, period = (int(n) for name in files for n in open(f"{cgroup}/{name}", encoding="utf-8").read().split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def fill_from_preset(args, preset, config):
    """Gives each setting that was not set by an option its value from the preset, as far as the device and the cores allow.

    config: of the model, for the tokens of a pass."""
    if args.device.startswith("cuda"):
        tokens = tokens_that_fit(preset["micro_tokens"], torch.cuda.mem_get_info(args.device)[0], args.dtype, config)
    else:  # memory: with the 100m model 32768 tokens take 18 GB, 4096 take 6, and `n_at_a_time` passes run at a time
        tokens = 6144 // min(8, n_cores(), torch.get_num_threads()) / max(1, relative_depth_and_width(config))
        tokens = min(max(512, int(tokens)), preset["micro_tokens"])
    preset = preset | dict(micro_tokens=tokens, workers=min(preset["workers"], n_cores()))
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.min_lr = min(args.min_lr, args.lr)  # a small --lr does not rise to the preset's min_lr


def set_up(args):
    """Joins the ranks, if torchrun started several, and seeds torch. Returns this rank's device and the autocast context in which
    its model computes."""
    if n_ranks() > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if n_cores() < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:  # torch knows of no quota
        torch.set_num_threads(n_cores())
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    return args.device, torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16",
                                       cache_enabled=False)  # the cache is one for all threads, and a pass uses a weight once


def how_it_runs(args):
    """For the first line of a run: what was chosen for the machine, and how to choose otherwise."""
    return (f"{args.dtype} on {args.device}, {f'{n_ranks()} ranks, ' if n_ranks() > 1 else ''}threads: {torch.get_num_threads()}, "
            f"{args.micro_tokens} tokens a pass (to change it: --preset, --dtype, --device, --micro-tokens)")


# Ranks: the processes of one run. torchrun tells each its number by environment variables. In a single process all of these
# do nothing.

def rank():
    return int(os.environ.get("RANK", 0))


def n_ranks():
    return int(os.environ.get("WORLD_SIZE", 1))


def say(*text):
    """Print, once and not on every rank, and above a `progress_bar`."""
    if rank() == 0:
        write(sys.stdout, " ".join(map(str, text)) + "\n")


def write(stream, text=""):
    """Write to stdout or stderr, all the way. When nobody listens any more, a run goes on, and what it says goes nowhere."""
    try:
        tqdm.write(text, file=stream, end="")
        stream.flush()
    except OSError:
        with suppress(OSError):  # no file: a notebook's stream
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


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

def make_optimizers(model, lr, weight_decay, muon_momentum=None, precision=torch.bfloat16, betas=(0.9, 0.95)):
    """[AdamW] for all parameters or, with muon_momentum, [AdamW, Muon]: Muon for the matrices of the layers.

    Biases and the weights of norms have no weight decay. Muon's steps are scaled so that one learning rate and weight decay suit
    both (arXiv 2502.16982).
    """
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    decay = [model.embed_tokens.weight] + (matrices if muon_momentum is None else [])
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.AdamW([dict(params=decay), dict(params=no_decay, weight_decay=0.0)], lr=lr, betas=betas,
                                    weight_decay=weight_decay, fused=True)]
    if muon_momentum is not None:
        optimizers.append(Muon(matrices, lr, weight_decay, muon_momentum, precision))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Steps along the momentum's nearest orthogonal matrix, so that all directions of a matrix learn equally fast (Jordan 2024,
    https://kellerjordan.github.io/posts/muon). torch.optim.Muon computes in bfloat16 on every CPU; without instructions for it
    that takes longer than the model. Here matrices of one shape also go through one product.
    """

    def __init__(self, matrices, lr, weight_decay, momentum, precision=torch.bfloat16):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.precision = precision

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for (rows, columns), ps in by_shape.items():
                gradients = [p.grad for p in ps]
                for p in ps:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                momenta = [self.state[p]["momentum"] for p in ps]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                updates = torch.stack(torch._foreach_lerp(gradients, momenta, group["momentum"]))  # Nesterov's
                torch._foreach_mul_(ps, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(ps, orthogonal(updates, self.precision).unbind(),
                                    alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5)  # the size of AdamW's steps


def orthogonal(X, precision, a=3.4445, b=-4.7750, c=2.0315):
    """Matrices (n, rows, columns) with about the same singular vectors and all singular values in 0.7 ... 1.2: five steps of a
    Newton-Schulz iteration, whose coefficients are Jordan's."""
    if X.shape[-2] > X.shape[-1]:
        return orthogonal(X.mT, precision, a, b, c).mT
    dtype, X = X.dtype, (X / X.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)).to(precision)
    for _ in range(5):
        gram = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), X, beta=a)
    return X.to(dtype)


def compile_layers(*models):
    """torch.compile, one layer at a time: all layers share a program for each shape, and packing has few shapes (data.pack)."""
    torch._dynamo.config.recompile_limit = 64
    for layer in (layer for model in models for layer in model.layers):
        layer.compile(dynamic=False)


def is_compiled(model):
    """Whether `compile_layers` has been there."""
    return model.layers[0]._compiled_call_impl is not None


def to_device(batch, device):
    """Arrays and tensors of a batch to the device; numbers and blocks stay. On CUDA nothing waits for the copy."""
    batch = [a if isinstance(a, (int, list)) else torch.as_tensor(a) for a in batch]
    if torch.device(device).type == "cuda":
        batch = [a if isinstance(a, (int, list)) or a.is_pinned() else a.pin_memory() for a in batch]
    return [a if isinstance(a, (int, list)) else a.to(device, non_blocking=True) for a in batch]


def step_batches(steps, first, last, n_workers, device):
    """An iterator over steps first ... last - 1 of data.TrainingSteps. Worker processes make them ahead of time.

    A step is its micro-batches, as tensors, and a tensor with the numbers of targets and of tokens in them.
    """
    return iter(torch.utils.data.DataLoader(
        steps, batch_size=None, sampler=range(first, last), num_workers=n_workers, collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda", worker_init_fn=become_worker,
        generator=torch.Generator()))  # a private generator, so that it does not advance the global one


def collate(micro_batches):
    """What a worker makes of a step of data.TrainingSteps."""
    counts = torch.tensor([[(y != -100).sum(), (x != 0).sum()] for x, y, *_ in micro_batches] or [[0, 0]]).sum(0)
    return [[a if isinstance(a, (int, list)) else torch.as_tensor(a) for a in batch] for batch in micro_batches], counts


def become_worker(*_):
    """What a worker process does first: it leaves signals to the run itself, which then saves, and ends with the run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def n_at_a_time(device):
    """How many micro-batches run at a time: on a CPU one a core, up to 8. Several threads for each would win less, since the
    operations of a small model are short."""
    return min(8, torch.get_num_threads()) if device == "cpu" else 1


@functools.cache
def pool_of(n, threads_each):
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(threads_each,))


def side_by_side(f, items):
    """[f(item) for item in items], each in a thread of its own that has its share of the cores."""
    n_threads = torch.get_num_threads()
    threads_each = max(1, n_threads // len(items))
    torch.set_num_threads(threads_each)  # MKL has one number for all threads
    try:
        return list(pool_of(len(items), threads_each).map(f, items))
    finally:
        torch.set_num_threads(n_threads)


def add_gradients(model, loss_of, micro_batches, device, precision):
    """Add to the parameters' .grad the gradient of loss_of(batch)[0] for each micro-batch. Returns a list of loss_of(batch)[1].

    On a CPU `n_at_a_time` run at a time. The sum is in the order of the micro-batches, so a run can be repeated bit for bit.
    """
    # several threads must not compile at the same time
    parameters, n, others = list(model.parameters()), 1 if is_compiled(model) else n_at_a_time(device), []

    def gradients_of(batch):
        with copy(precision):  # a copy, because it remembers what to go back to in its thread
            loss, other = loss_of(batch)
        return torch.autograd.grad(loss, parameters), other

    for i in range(0, len(micro_batches), n):
        batches = micro_batches[i:i + n]
        for gradients, other in side_by_side(gradients_of, batches) if len(batches) > 1 else map(gradients_of, batches):
            if parameters[0].grad is None:
                for p, gradient in zip(parameters, gradients):
                    p.grad = gradient
            else:
                torch._foreach_add_([p.grad for p in parameters], gradients)
            others.append(other)
    return others


def accumulate(model, micro_batches, counts, device, precision):
    """Add up the gradient of the mean loss for each target token, over the micro-batches of a step and over the ranks.

    micro_batches, counts: a step of `step_batches`. Returns the loss in nats and the tokens that all ranks read. Both are on the
    device: nothing here waits for it.
    """
    n_targets, n_tokens = sum_over_ranks(counts.to(device, non_blocking=True, copy=True))

    def loss_of(batch):
        loss = model.loss(*to_device(batch, device)) / n_targets
        return loss, loss.detach()

    losses = add_gradients(model, loss_of, micro_batches, device, precision)
    sum_gradients_over_ranks(model)
    return sum_over_ranks(sum(losses, torch.zeros((), device=device))), n_tokens


def mean_loss(model, micro_batches, counts, device, precision):
    """The mean loss of a step of `step_batches`, in nats for each target token."""
    with precision, torch.set_grad_enabled(is_compiled(model)):  # a pass without gradients would be compiled anew
        return sum(model.loss(*to_device(batch, device)).item() for batch in micro_batches) / max(1, int(counts[0]))


def amounts_and_speeds(model, batch, device, step, tokens, row_before, waited):
    """For the metrics: problems and tokens so far, and speeds since the row before. row_before: (time, step, tokens). waited: the
    seconds of waiting for data since then."""
    then, step_then, tokens_then = row_before
    took, peak = time.perf_counter() - then, n_ranks() * peak_flops(device)
    row = dict(problems=step * batch, tokens=tokens, tokens_per_s=round((tokens - tokens_then) / took),
               problems_per_s=round((step - step_then) * batch / took, 1), waiting=round(waited / took, 4))
    per_token = model.flops_per_token(tokens / row["problems"])
    return row | (dict(mfu=round(row["tokens_per_s"] * per_token / peak, 4)) if peak else {})


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

# what --resume does not compare: it changes rounding, the random numbers of another device, or what is logged; or it is resolved
# into `mix` already (ops, id_share, eval_json)
MAY_CHANGE = set("resume out metrics ops id_share eval_json device compile micro_tokens workers log_every eval_every "
                "eval_problems save_every keep_every show".split())


def check_outputs(*paths, inputs=()):
    """Raises ValueError or OSError if a file cannot be written: better now than after the work. Makes the folders."""
    for path in paths:
        if not path or path.endswith("/") or os.path.exists(path) and not os.path.isfile(path):
            raise ValueError(f"{path!r} is no name for a file")
        if any(f"{os.path.realpath(path)}/".startswith(f"{os.path.realpath(of)}/") for of in inputs):  # it, or in a folder
            raise ValueError(f"writing {path} would overwrite an input")
        os.makedirs(os.path.dirname(os.path.realpath(path)), exist_ok=True)
        probe = f"{os.path.realpath(path)}.{os.getpid()}.part"
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
    model = build_model(checkpoint, path)
    check_trained(checkpoint, path, vocabulary)
    return checkpoint, model


def check_trained(checkpoint, path, vocabulary):
    """Raises ValueError with a line for the user if it does not say how it was trained, or was trained with other tokens."""
    recipe, id_ops = checkpoint.get("recipe"), checkpoint.get("id_ops")
    numbers = [checkpoint.get("step"), checkpoint.get("problems"), *(id_ops if isinstance(id_ops, list) else [None])]
    if not (isinstance(recipe, dict) and isinstance(recipe.get("preset"), str) and len(numbers) == 4
            and all(type(n) is int for n in numbers)):
        raise ValueError(f"{path} does not say how it was trained: it is not a whole checkpoint of a stage")
    if recipe.get("vocabulary", vocabulary) != vocabulary:
        raise ValueError(f"{path} was trained with other tokens: data.py has changed since, so train anew")


def read_start(args, presets, vocabulary):
    """What midtrain.py and grpo.py start from: the checkpoint --init or, if --resume has something to continue, --out.

    Sets args.preset, if it was not given, and args.init_run, the run and step that made --init. Returns the checkpoint and its
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
        args.init_run = (start if path == args.init else load_checkpoint(args.init)).get("run", args.init)
    elif args.init == recipe.get("init"):  # it was moved away, and is not needed
        args.init_run = recipe.get("init_run")
    else:
        raise ValueError(f"there is no checkpoint {args.init}, and {args.out} was made from {recipe.get('init')}")
    return start, model


def read_edge(path, checkpoint, run):
    """The op range that evaluate.py named as the edge of this checkpoint, of the run of that id. Raises ValueError."""
    try:
        with open(path, encoding="utf-8") as f:
            edge, *others = [c["edge"] for c in json.load(f)["checkpoints"].values() if c.get("run") == run]
            if any(other != edge for other in others):  # the same may be there twice, as a folder, too
                raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"--ops edge needs {checkpoint}, as it is now, in {path}: run python evaluate.py {checkpoint}") from None
    if edge is None:
        raise ValueError(f"{path} names no edge for {checkpoint}: no op has surely low pass@1 and some pass@k; give --ops, or "
                         "evaluate more --problems")
    return "{}-{}".format(*edge)


def open_run(parser, args, stage, state, **parts):
    """Start a run or, with --resume, continue that of --out.

    state: numbers of a run at its start, {"step": 0, ...}; those of the checkpoint replace them. parts: what has a
    load_state_dict, or a list of such, by its name in the checkpoint. Returns the recipe: the settings that affect the result.
    --resume refuses a mismatch. Without --resume, old files are kept as .old.
    """
    state["run"] = uuid.uuid4().hex  # tells a run from another to the same file; a checkpoint appends its step
    recipe = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE} | {"ranks": n_ranks()}
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
                state["run"] = state["run"].split("-")[0]
                torch.set_rng_state(checkpoint["rng"])
            except Exception:  # a part is missing or is not what it should be
                raise ValueError(f"{args.out} is not a whole checkpoint of {stage}: start afresh without --resume") from None
    if any(gather([rank() == 0 and not lock(args.metrics)])):
        parser.error(f"another run is writing {args.metrics}: give this one another --out")
    if args.resume:
        say(f"resumed {args.out} at step {state['step']}" if state["step"] else
            f"there is no {args.out} yet: starting at step 0")
    if rank() == 0:
        truncate_metrics(args.metrics, state["step"]) if state["step"] else set_aside(args.out, args.metrics)
    return recipe


def lock(path):
    """Keep other processes from locking this file until this one ends, however it ends. False if one of them has it already."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # it stays open, since closing it would end the lock
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.register_at_fork(after_in_child=lambda: os.close(file))  # workers may outlive a killed run for a moment
    except BlockingIOError:
        return False
    except (ImportError, OSError):  # Windows and some network drives have no such locks
        pass
    return True


def set_aside(checkpoint, metrics):
    """Keep what a new run would overwrite as .old, or .old2, .old3, ... where there are such already. A link stays a link: its
    target is set aside. The metrics are copied, because the file itself is locked."""
    paths = [os.path.realpath(path) if os.path.islink(path) else path for path in (metrics, checkpoint)]
    suffixes = (".old" + (str(n) if n > 1 else "") for n in itertools.count(1))
    suffix = next(s for s in suffixes if not any(os.path.exists(path + s) for path in paths))
    for path, keep in zip(paths, (shutil.copyfile, os.replace)):
        if os.path.exists(path) and os.path.getsize(path):
            keep(path, path + suffix)
            say(f"{path} was there: it is {path}{suffix} now (--resume would have continued it; to go back, rename it)")
    os.truncate(metrics, 0)


def truncate_metrics(path, step):
    """Cut a JSONL file off behind its last row up to `step`. A killed run wrote some past its last checkpoint, perhaps a part
    of one, and the resumed run writes them again."""
    with open(path, "rb+") as f:
        end = 0
        for line in f:
            with suppress(ValueError, KeyError, TypeError):
                end = f.tell() if line.endswith(b"\n") and json.loads(line)["step"] <= step else end
        f.truncate(end)


def write_metrics(path, row):
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")


# Interrupts and progress

@contextmanager
def noted_interrupts():
    """Within it, Ctrl-C, SIGTERM and the end of the terminal only add to the list that it yields, so that the run can save and
    end. A second Ctrl-C ends at once."""
    noted, hangup = [], getattr(signal, "SIGHUP", None)  # Windows has none

    def note(number, _):
        if number == signal.SIGINT and noted and time.perf_counter() - noted[0] > 1:  # a launcher may pass on the first one
            os._exit(130)
        noted.append(time.perf_counter())
        with suppress(OSError):
            text = b"\nfinishing the step, then saving; Ctrl-C again ends at once\n" if rank() == 0 else b""
            os.write(sys.stderr.fileno(), text)

    numbers = [signal.SIGINT, signal.SIGTERM] + [hangup] * (hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL)
    handlers = {number: signal.signal(number, note) for number in numbers}  # nohup ignores SIGHUP, and that stays
    try:
        yield noted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def progress_bar(start=0.0):
    """Shows how far a run is and how much time is left: a bar on a terminal, elsewhere a line every half minute.

    start: the share that is done already, 0 to 1. Yields update(done, text).
    """
    began = said = time.perf_counter()

    def update(done, text):
        nonlocal said
        done = min(done, 1.0)  # the last step may go past a budget
        bar.set_postfix_str(text, refresh=False)
        bar.update(done - bar.n)
        if bar.disable and rank() == 0 and time.perf_counter() - said > 30:
            said = time.perf_counter()
            left = (said - began) * (1 - done) / (done - start)
            write(sys.stderr, f"{100 * done:3.0f} %, about {left / 60:.1f} minutes left, {text}\n")

    with tqdm(total=1.0, initial=start, disable=None if rank() == 0 else True, smoothing=0.05,
              bar_format="{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}") as bar:
        yield update


def give_up(args, step, reason):
    """End a run whose model is broken: it must not replace a good checkpoint."""
    say(f"stopped at step {step}: {reason}; try a smaller --lr. {args.out} holds the last good checkpoint, if one was written.")
    sys.exit(1)


def exit_if_interrupted(interrupted, what_now):
    """End a run that was interrupted, after it has saved, with status 130, so that a shell stops `a && b`, too."""
    if interrupted:
        say(f"interrupted: {what_now}")
        sys.exit(130)


def run_script(main):
    """main() as a command. An interrupt before the first step ends with 130: there is nothing to save, and `a && b` must stop. An
    error of the system, such as a full disk or too little memory, ends with one line."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w", encoding="utf-8") for s in (sys.stdout, sys.stderr))  # closed: 2>&-
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="replace")  # what its encoding lacks becomes "?"
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        sys.exit(str(error))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|ALLOC_FAILED|DefaultCPUAllocator", str(error)):
            raise
        sys.exit("out of memory: training takes less with a smaller --micro-tokens, sampling (grpo.py, evaluate.py) with smaller "
                 "--rows, and all with a smaller model, such as that of --preset tiny")
    finally:
        write(sys.stdout), write(sys.stderr)  # now, since the interpreter would complain
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
