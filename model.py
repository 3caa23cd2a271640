"""
The transformer: a Qwen2-style decoder (RMSNorm, rotary positions, grouped-query attention with q/k/v bias, SwiGLU, tied
embeddings), batched sampling with a key-value cache, and checkpoints.

Parameters have the names and layouts of Hugging Face's Qwen2ForCausalLM without its leading "model.", so a model moves
there and back by renaming (`to_hf`, `from_hf`), and `python model.py CKPT --to-hf DIR` writes one that
`AutoModelForCausalLM.from_pretrained(DIR)` loads.

Letters in shape comments: B rows, T tokens, C width, H heads, G key-value heads, D width of a head.
"""
import argparse
import os
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import nn

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

    def forward(self, x, cos, sin, attend):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.n_heads, self.head_dim).transpose(1, 2)     # (B, H, T, D)
        k = self.k_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        v = self.v_proj(x).view(B, T, self.n_kv_heads, self.head_dim).transpose(1, 2)  # (B, G, T, D)
        y = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)                        # (B, H, T, D)
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

    def forward(self, x, cos, sin, attend):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
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

    def hidden(self, ids, positions=None, attend=None):
        """ids (B, T) -> what the head reads, (B, T, C).

        positions: (B, T), default 0 ... T - 1. attend: one attention function a layer, default causal attention.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        cos, sin = rotary_tables(positions[:, None], self.layers[0].self_attn.head_dim, self.config.rope_theta)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, attend[i] if attend else causal_attention)
        return self.norm(x)

    def head(self, hidden):
        """Logits over the vocabulary."""
        return F.linear(hidden, self.embed_tokens.weight)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, vocabulary) of the token that follows each."""
        return self.head(self.hidden(ids))

    def loss(self, x, y, reduction="sum"):
        """Cross-entropy in nats of targets y (B, T) given x (B, T); positions with y = -100 do not count."""
        hidden, y = self.hidden(x).flatten(0, 1), y.flatten()
        if not hidden.is_cuda:  # no logits where there is no loss; on CUDA the selection would wait for the device
            where = (y != -100).nonzero()[:, 0]
            hidden, y = hidden.index_select(0, filled_up(where)), F.pad(y[where], (0, -len(where) % 128), value=-100)
        return F.cross_entropy(self.head(hidden).float(), y, reduction=reduction)

    def logprobs(self, x, where, targets, temperature=1.0):
        """Log-probabilities (N,) of targets (N,), in nats, and the entropy (N,) of what each was drawn from (no gradient).

        targets[i] follows position where[i] of x (B, T), counted row by row. temperature: as it was when they were sampled.
        """
        hidden = self.hidden(x).flatten(0, 1).index_select(0, filled_up(where))
        logprobs = (self.head(hidden)[:len(where)].float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, targets[:, None])[:, 0], entropy

    def n_params(self):
        return sum(p.numel() for p in self.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# sampling


class Cache:
    """Keys and values of P prompts and of the n rows that continue each of them.

    Each prompt is kept once and its n rows read it together: one matrix product for all of them. The continuations have
    all the same length, so they need neither a mask nor a scatter. Letters: S slots for generated tokens, R = H / G.
    """

    def __init__(self, config, lengths, n):
        self.lengths, self.n, self.t = lengths, n, 0  # tokens a prompt (P,), rows a prompt, generated tokens so far
        self.prompt = [None] * config.n_layers        # (k, v), each (P, G, Tp, D)
        self.generated = [None] * config.n_layers     # (k, v), each (P, G, n, S, D)
        self.bias = None                              # (P, 1, 1, Tp): 0 on the prompt, -inf on its padding

    def prefill(self, layer):
        def attend(q, k, v):
            self.prompt[layer] = (k.to(v.dtype), v)
            return causal_attention(q, k, v)
        return attend

    def start(self):
        """Get ready to generate, after `prefill` has seen the prompts."""
        P, G, T, D = self.prompt[0][0].shape
        padding = torch.arange(T, device=self.lengths.device) >= self.lengths[:, None]
        self.bias = torch.zeros(P, 1, 1, T, device=self.lengths.device).masked_fill(padding[:, None, None], -torch.inf)
        self.generated = [tuple(x.new_empty(P, G, self.n, 0, D) for x in kv) for kv in self.prompt]

    def grow(self, slots=64):
        self.generated = [tuple(F.pad(x, (0, 0, 0, slots)) for x in kv) for kv in self.generated]

    def decode(self, layer):
        def attend(q, k, v):
            B, H, _, D = q.shape
            pk, pv = self.prompt[layer]
            gk, gv = self.generated[layer]
            P, G, T, _ = pk.shape
            n, R, t = self.n, H // G, self.t + 1
            gk[:, :, :, self.t] = k.view(P, n, G, D).transpose(1, 2)
            gv[:, :, :, self.t] = v.view(P, n, G, D).transpose(1, 2)
            q = (q.to(pk.dtype) * D ** -0.5).view(P, n, G, R, D).transpose(1, 2)                         # (P, G, n, R, D)
            on_prompt = q.reshape(P, G, n * R, D) @ pk.transpose(-1, -2) + self.bias                     # (P, G, n*R, T)
            on_generated = q @ gk[:, :, :, :t].transpose(-1, -2)                                         # (P, G, n, R, t)
            weights = torch.cat((on_prompt.view(P, G, n, R, T), on_generated), -1).float().softmax(-1).to(pv.dtype)
            y = (weights[..., :T].reshape(P, G, n * R, T) @ pv).view(P, G, n, R, D) + weights[..., T:] @ gv[:, :, :, :t]
            return y.transpose(1, 2).reshape(B, H, 1, D)
        return attend

    def keep(self, prompts, rows):
        """Keep these prompts (P',) and of each these rows (P', n')."""
        self.lengths, self.bias, self.n = self.lengths[prompts], self.bias[prompts], rows.shape[1]
        self.prompt = [tuple(x[prompts] for x in kv) for kv in self.prompt]
        self.generated = [tuple(x[prompts[:, None], :, rows].transpose(1, 2) for x in kv) for kv in self.generated]


@torch.no_grad()
def sample(model, prompts, stop, n=1, max_new=256, temperature=1.0, generator=None, rows=1024, progress=None):
    """Continue each prompt n times, until the token `stop` or for `max_new` tokens.

    prompts: lists of token ids. temperature 0 takes the most likely token. rows: how many rows run at a time.
    progress: called with the number of finished rows now and then. generator: torch.Generator on the model's device.

    Returns lists in the order of the prompts, n rows a prompt: tokens (with `stop`, if it came) and, as a float32 tensor
    of the same length, their log-probabilities under the sampling temperature (under temperature 1 when it is 0).
    """
    tokens, logprobs = [None] * (len(prompts) * n), [None] * (len(prompts) * n)
    order = sorted(range(len(prompts)), key=lambda p: len(prompts[p]))  # alike lengths together: little padding
    per_batch = max(1, rows // n)
    for first in range(0, len(order), per_batch):
        batch = order[first:first + per_batch]
        out_tokens, out_logprobs, lengths = _sample_batch(
            model, [prompts[p] for p in batch], stop, n, max_new, temperature, generator)
        for j, p in enumerate(batch):
            for i in range(n):
                row = j * n + i
                tokens[p * n + i] = out_tokens[row, :lengths[row]].tolist()
                logprobs[p * n + i] = out_logprobs[row, :lengths[row]]
        if progress:
            progress(len(batch) * n)
    return tokens, logprobs


def _sample_batch(model, prompts, stop, n, max_new, temperature, generator):
    device = model.embed_tokens.weight.device
    P = len(prompts)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.zeros(P, max(len(p) for p in prompts), dtype=torch.long, device=device)
    for p, prompt in enumerate(prompts):
        ids[p, :len(prompt)] = torch.tensor(prompt, device=device)
    cache = Cache(model.config, lengths, n)
    layers = range(model.config.n_layers)
    hidden = model.hidden(ids, attend=[cache.prefill(i) for i in layers])  # padding on the right: no row sees any
    hidden = hidden[torch.arange(P, device=device), lengths - 1].repeat_interleave(n, 0)
    cache.start()
    attend = [cache.decode(i) for i in layers]

    out_tokens = torch.full((P * n, max_new), stop, device=device)
    out_logprobs = torch.zeros(P * n, max_new, device=device)
    out_lengths = torch.full((P * n,), max_new, device=device)
    alive = torch.ones(P, n, dtype=torch.bool, device=device)
    row_of = torch.arange(P * n, device=device).view(P, n)  # where the rows that still run belong in the output
    for t in range(max_new):
        logits = model.head(hidden).float()
        if temperature == 0:
            logprobs = logits.log_softmax(-1)
            token = logits.argmax(-1)
        else:
            logprobs = (logits / temperature).log_softmax(-1)
            # argmax of p / exponential noise is a draw from p, and needs no synchronisation with the host
            noise = torch.empty_like(logprobs).exponential_(generator=generator)
            token = (logprobs.exp() / noise).argmax(-1)
        rows = row_of.flatten()
        out_tokens[rows, t] = torch.where(alive.flatten(), token, out_tokens[rows, t])
        out_logprobs[rows, t] = torch.where(alive.flatten(), logprobs.gather(-1, token[:, None])[:, 0],
                                            out_logprobs[rows, t])
        ended = alive & (token == stop).view_as(alive)
        out_lengths[rows] = torch.where(ended.flatten(), t + 1, out_lengths[rows])
        alive = alive & ~ended
        if t % 8 == 7:  # drop finished prompts and rows; not at each step, since looking waits for the device
            per_prompt = alive.sum(1)
            if not per_prompt.any():
                break
            if int((per_prompt > 0).sum() * per_prompt.max()) <= 0.8 * alive.numel():
                prompts_left = per_prompt.nonzero()[:, 0]
                alive_first = alive[prompts_left].sort(dim=1, descending=True, stable=True).indices
                rows_left = alive_first[:, :int(per_prompt.max())]
                cache.keep(prompts_left, rows_left)
                token = token.view_as(alive)[prompts_left].gather(1, rows_left).flatten()
                row_of, alive = row_of[prompts_left].gather(1, rows_left), alive[prompts_left].gather(1, rows_left)
        if cache.t == cache.generated[0][0].shape[3]:
            cache.grow()
        positions = (cache.lengths + t).repeat_interleave(cache.n)[:, None]
        hidden = model.hidden(token[:, None], positions, attend)[:, 0]
        cache.t += 1
    return out_tokens, out_logprobs, out_lengths.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# checkpoints: plain dicts of tensors, numbers and strings


def save_checkpoint(path, checkpoint):
    """Write a checkpoint so that the file under that name is at any moment a whole one, the old or the new."""
    part = f"{path}.part"
    with open(part, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def load_checkpoint(path):
    """Read a checkpoint of ours; nothing in it is executed. Raises ValueError with a line for the user."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: train one first, or name another") from None
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
