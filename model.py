"""
The transformer, sampling from it, and checkpoints.

The model is a Qwen2-style decoder (arXiv 2407.10671): RMSNorm, rotary positions, grouped-query attention with q/k/v bias,
SwiGLU, tied embeddings. Parameters have the names and layouts of Hugging Face's Qwen2ForCausalLM without its leading
"model.". So a model moves there and back by renaming (`to_hf`, `from_hf`), and `python model.py CKPT --to-hf DIR` writes one
that `AutoModelForCausalLM.from_pretrained(DIR)` loads.

Letters in shape comments: B rows, T tokens, C width, H heads, KV key-value heads, D width of a head.
"""
import argparse
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn

# On Hopper GPUs torch prefers cuDNN's attention, which plans anew for every shape. Flash attention takes any shape.
torch.backends.cuda.enable_cudnn_sdp(False)

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
    "100m": Config(n_layers=12, width=768, n_heads=12, n_kv_heads=2, mlp=3072),  # the model of arXiv 2512.07783
}


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        if x.is_cuda:
            return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)
        return RMSNormCPU.apply(x, self.weight, self.eps)


class RMSNormCPU(torch.autograd.Function):
    """F.rms_norm for a CPU, with its gradient written out.

    On a CPU, torch runs F.rms_norm and its backward pass as a chain of small operations. Written out, whole training steps
    are 1.02 to 1.06 times as fast (two cores, `tests/bench.py norm`).
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, weight)
        out = normed * weight
        # under autocast, round once here instead of in each matrix product that reads the result
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
        y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0),
                        enable_gqa=q.shape[1] != k.shape[1])
        return y.transpose(0, 1)[None]                                                 # (1, H, T, D)
    sequence = sequence_of(cu_seqlens, q.shape[2])
    return causal_attention(q, k, v, (sequence[:, None] == sequence).tril())  # slow; the tests compare with it


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

        sequences: cu_seqlens and max_seqlen, if the one row of ids is several sequences end to end (see `packed_attention`).
        attend: a function (q, k, v) to use in every layer instead of causal attention.
        """
        positions = torch.arange(ids.shape[1], device=ids.device)
        if sequences:  # each sequence counts from 0
            positions = positions - sequences[0].index_select(0, sequence_of(sequences[0], len(positions)))
        cos, sin = rotary_tables(positions, self.layers[0].self_attn.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        attention = attend or (packed_attention if sequences else causal_attention)
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


def peak_flops(device_name):
    """Peak of dense bfloat16 matrix products in operations/s, from the makers' data sheets; None for other devices."""
    peaks = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
             "RTX 4090": 165e12}
    return next((peak for name, peak in peaks.items() if name in device_name), None)


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

    Arguments and results are those of `sample`, up to rounding. It spends random numbers in another order. So for one seed
    only greedy tokens are the same; at other temperatures only their distribution is.
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

    prompts: lists of token ids, none empty. temperature: 0 takes the most likely token. generator: a torch.Generator on the
    model's device. rows: how many rows run at a time. progress: a function that is called after each such batch with
    [(index of the row, its tokens)]. buffers: a dict, {} at first, that keeps CUDA graphs and their memory for later calls
    with models of the same sizes and precision. On a CPU it stays empty.

    Returns two lists in the order of the prompts, n rows a prompt: the tokens of each row (with `stop`, if it came) and
    their log-probabilities in nats at the sampling temperature (at temperature 1 if that is 0), a float32 tensor on the CPU.
    """
    results, per_batch = {}, max(1, rows // n)
    buffers = {} if buffers is None else buffers
    # similar lengths together need little padding; on CUDA the longest first, since graphs are lost when memory has to grow
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]), reverse=model.embed_tokens.weight.is_cuda)
    for first in range(0, len(order), per_batch):
        batch = order[first:first + per_batch]
        rows_of_batch = [p * n + i for p in batch for i in range(n)]
        results.update(zip(rows_of_batch, _sample_batch(
            model, [prompts[p] for p in batch], stop, n, max_new, temperature, generator, buffers)))
        if progress:
            progress([(row, results[row][0]) for row in rows_of_batch])
    return [results[row][0] for row in sorted(results)], [results[row][1] for row in sorted(results)]


def _sample_batch(model, prompts, stop, n, max_new, temperature, generator, buffers):
    """`sample` for rows that run at the same time: [(tokens, log-probabilities)], n rows a prompt."""
    device = model.embed_tokens.weight.device
    decoder = (GraphDecoder if device.type == "cuda" else Decoder)(model, prompts, n, temperature, generator, buffers)
    out_tokens = torch.full((len(decoder.row), max_new), stop, device=device)
    out_logprobs = torch.zeros(len(decoder.row), max_new, device=device)
    with torch.autocast(device.type, enabled=False):  # the decoder chooses its precisions itself
        for t in range(max_new):
            check = t % decoder.check_every == 0  # whether rows have ended: seldom, since this waits for the device
            if t > 0 and check:
                alive = (out_tokens[decoder.row, :t] != stop).all(1)
                if not alive.any():
                    break
                decoder.drop_ended(alive.view(-1, decoder.n))
            if t > 0:
                decoder.step(uniform[t % decoder.check_every, :len(decoder.row)])
            if check:
                uniform = torch.rand(decoder.check_every, len(decoder.row), generator=generator, device=device)
            out_tokens[decoder.row, t], out_logprobs[decoder.row, t] = decoder.token, decoder.logprob
    # a row that has ended writes on until it is dropped
    lengths = ((out_tokens != stop).cumprod(1).sum(1) + 1).clamp_max(max_new).tolist()
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


def keep_metrics(path, step):
    """Leave only the rows up to `step` in a JSONL file: a killed run wrote some past its last checkpoint, or a part of one, and
    the resumed run writes them again."""
    kept = []
    if step and os.path.exists(path):
        with open(path, errors="replace") as f:
            for row in f.read().splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    kept += [row + "\n"] if json.loads(row)["step"] <= step else []
    with open(f"{path}.part", "w") as f:
        f.writelines(kept)
    os.replace(f"{path}.part", path)


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
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        p.error("this needs transformers: pip install transformers")
    if os.path.exists(args.to_hf) and not os.path.isdir(args.to_hf):
        p.error(f"--to-hf {args.to_hf} is there already, and is no folder")
    try:
        config, state = to_hf(build_model(load_checkpoint(args.checkpoint), args.checkpoint))
        model = Qwen2ForCausalLM(Qwen2Config(**config))
        model.load_state_dict(state)
        model.save_pretrained(args.to_hf)
    except (ValueError, OSError) as error:
        p.error(str(error))
    print(f"wrote {args.to_hf}; the tokenizer is data.tokenizer()")


if __name__ == "__main__":
    main()
