"""
Stage 3, reinforcement learning: GRPO (arXiv 2402.03300) from a checkpoint, with rewards that check the reasoning.

    python grpo.py                                      from out/midtrain.pt, on OOD-edge (op 11-14 after 2-10) and, with
                                                        the preset tiny, 20 % from the range of pre-training
    python grpo.py --init out/pretrain.pt --ops edge    without mid-training, on the edge that evaluate.py measured
    python grpo.py --reward outcome                     only the answer counts; also process, mixed --alpha 0.2, strict
    python grpo.py --budget 5e6 --rl-share 0.2          20 % of a budget in training tokens; midtrain.py takes the rest
    python grpo.py --curriculum                         follow the edge: draw the ops that have a gradient
    python grpo.py --resume                             continue where it stopped
    torchrun --nproc_per_node=8 grpo.py ...             on several GPUs, or with 2 on two cores

A step: sample a group of G solutions o_1 ... o_G for each of P prompts q, verify them, and update the model a few times,
each time on a part of the prompts, towards larger

    J = 1/N sum_q sum_i sum_t  ( min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i)  -  beta KL )

    ratio = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)        pi_old: the model that sampled, at the sampling temperature
    A_i   = (r_i - mean(r)) / std(r)                             over the group; --advantage mean leaves out the division
    KL    = pi_ref / pi - log(pi_ref / pi) - 1                   k3: never negative, right in the mean; pi_ref: --init
    N     = tokens of all solutions of the update, end-of-text included, over all micro-batches and ranks

Writes a checkpoint to --out and metrics, one JSON row a step, beside it (out/grpo.jsonl). Ctrl-C saves.
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from multiprocessing import get_context, parent_process

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import build_model, keep_metrics, load_checkpoint, sample, save_checkpoint
from verify import REWARDS, reward, verify

# Settings that suit a model; each can be set on the command line.
PRESETS = {
    # without problems from the range of pre-training a small model soon forgets it; without KL it needs no reference, and
    # groups without a gradient cost nothing; without a falling learning rate (2e-4 all through) the edge won .03, not .08 (seed 0)
    "tiny": dict(id_share=0.2, steps=250, prompts=64, rollouts=8, updates=2, lr=3e-4, min_lr=0.0, kl=0.0, warmup=5,
                 weight_decay=0.0, clip=1.0, max_new=192, micro_tokens=2048, rows=512, eval_every=25, eval_problems=64,
                 save_every=25, workers=0),
    # arXiv 2512.07783: 200 steps of 1024 prompts, 6 rollouts each, 4 updates
    "100m": dict(id_share=0.0, steps=200, prompts=1024, rollouts=6, updates=4, lr=1e-6, min_lr=1e-6, kl=1e-3, warmup=0,
                 weight_decay=0.1, clip=1.0, max_new=1024, micro_tokens=32768, rows=3072, eval_every=20, eval_problems=256,
                 save_every=20, workers=8),
}
SEED = 2_000_000   # added to --seed: problems of its own, not those of the stages before over again
RL_COST = 5 / 3    # of a token of RL in training tokens: 2 for the rollout, 2 for the reference, 6 for the update, against 6;
                   # the paper's price, for --kl 0 too, which has no reference and so needs less
FLOOR = 0.1        # --curriculum: the least share of groups with a gradient that an op is credited with
MEMORY = 0.9       # --curriculum: what a step leaves of what was known about an op before

# ----------------------------------------------------------------------------------------------------------------------
# the formula


def group_advantages(rewards, kind="std"):
    """Rewards (P, G) -> advantages (P, G): how much better each solution is than its group's mean.

    kind "std" divides by the group's standard deviation (GRPO, arXiv 2402.03300); "mean" does not (Dr. GRPO, arXiv
    2503.20783). A group whose rewards are all equal has advantage 0 throughout.
    """
    differ = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)  # rounding makes no advantage
    centered = (rewards - rewards.mean(dim=1, keepdim=True)) * differ
    return centered if kind == "mean" else centered / (rewards.std(dim=1, keepdim=True) + 1e-6)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, n_tokens, clip_ratio=0.2, kl_coef=1e-3):
    """-J of the formula above, for the tokens of one micro-batch.

    logprobs, old_logprobs, ref_logprobs, advantages: (N,), a value for each token of the solutions (an advantage is that
    of the token's solution). ref_logprobs may be None where kl_coef is 0. n_tokens: tokens of the whole update.
    Returns the loss and a dict of sums over the tokens, for the log: kl, approx_kl (k3 of pi_old against pi), clipped.
    """
    logratio = logprobs - old_logprobs
    ratio = logratio.exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)
    kl = torch.zeros_like(logprobs)
    if kl_coef:
        ref_logratio = ref_logprobs - logprobs
        kl = ref_logratio.exp() - ref_logratio - 1
    loss = -(surrogate - kl_coef * kl).sum() / n_tokens
    with torch.no_grad():  # a token is clipped where the minimum takes the constant, so that its gradient is 0
        clipped = (ratio > 1 + clip_ratio) & (advantages > 0) | (ratio < 1 - clip_ratio) & (advantages < 0)
        sums = dict(kl=kl.sum(), approx_kl=(ratio - logratio - 1).sum(), clipped=clipped.sum())
    return loss, sums


def misjudged(verdict):
    """The verdict of a verifier that takes the right process for wrong and the wrong for right; the answer stays."""
    return verdict | dict(process=1 - verdict["process"], verified=verdict["outcome"] and not verdict["verified"],
                          strict=verdict["outcome"] and not verdict["strict"])


def verdicts(pairs):
    """[(gold solution, response)] -> verdicts; what a worker does."""
    return [verify(gold, response) for gold, response in pairs]


def as_worker():
    """Makes a process a worker: signals to the group are for the run itself, which then saves; a worker ends with the run."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [options]    (--help lists them)")
    p.add_argument("--init", default="out/midtrain.pt", help="checkpoint to start from; the reference (default out/midtrain.pt)")
    p.add_argument("--preset", choices=PRESETS, help="settings (default: the preset that --init was trained with)")
    p.add_argument("--out", default="out/grpo.pt", help="checkpoint to write (default out/grpo.pt)")
    p.add_argument("--resume", action="store_true", help="continue from --out; the result is that of one long run")
    p.add_argument("--seed", type=int, default=0, help="of the problem stream and of the sampling (default 0)")
    g = p.add_argument_group("problems")
    g.add_argument("--ops", help='op range (default: OOD-edge, up to 1.4 times the largest op of pre-training), or "edge": the '
                   "range that evaluate.py named")
    g.add_argument("--eval-json", default="out/eval.json", help="where --ops edge finds it (default out/eval.json)")
    g.add_argument("--id-share", type=float, help="share from the range of pre-training (default from the preset)")
    g.add_argument("--mix", help='instead of these two a mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20,school:2-20"')
    g.add_argument("--distractors", type=float, default=2.0, help="mean number of unneeded sentences (default 2)")
    g.add_argument("--curriculum", action="store_true", help="draw each op by the share of its groups that had a gradient "
                   "lately; without --ops, from all ops up to OOD-hard")
    g = p.add_argument_group("reward and loss")
    g.add_argument("--reward", choices=REWARDS, default="strict", help="outcome: the answer; process: share of right "
                   "steps; mixed: alpha * outcome + (1 - alpha) * process; strict: answer and whole process (default)")
    g.add_argument("--alpha", type=float, default=0.2, help="of --reward mixed (default 0.2)")
    g.add_argument("--reward-noise", type=float, default=0.0, metavar="P",
                   help="with this probability the process is misjudged (default 0)")
    g.add_argument("--advantage", choices=["std", "mean"], default="std",
                   help="divide by the group's standard deviation, or not (default std)")
    g.add_argument("--clip-ratio", type=float, default=0.2, help="eps (default 0.2)")
    g.add_argument("--kl", type=float, help="beta (default from the preset: 100m 0.001, tiny 0, which needs no reference)")
    g.add_argument("--temperature", type=float, default=1.0, help="of sampling, and so of every probability (default 1)")
    g = p.add_argument_group("compute (defaults from the preset)")
    g.add_argument("--steps", type=int, help="rollout batches")
    g.add_argument("--budget", type=float, metavar="T", help="tokens of mid-training and RL together, instead of --steps")
    g.add_argument("--rl-share", type=float, metavar="B", help="share of the budget taken here; a token of RL (prompt and "
                   "solution of each rollout) costs 5/3 training tokens")
    g.add_argument("--prompts", type=int, help="P, prompts a step, over all ranks")
    g.add_argument("--rollouts", type=int, help="G, solutions a prompt")
    g.add_argument("--updates", type=int, help="optimizer steps a rollout batch, each on its own part of the prompts")
    g.add_argument("--lr", type=float, help="learning rate (AdamW) after the warm-up")
    g.add_argument("--min-lr", type=float, help="learning rate at the end of the straight line from --lr (100m: constant)")
    g.add_argument("--warmup", type=int, help="steps over which the learning rate rises")
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--clip", type=float, help="largest norm of the gradient")
    g.add_argument("--max-new", type=int, help="tokens after which a solution is cut off")
    g.add_argument("--micro-tokens", type=int, help="tokens per forward pass of an update; gradients add up")
    g.add_argument("--rows", type=int, help="solutions that are sampled at a time")
    g.add_argument("--workers", type=int, help="processes that verify solutions while others are sampled; 0: after sampling")
    g = p.add_argument_group("running")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="of matrix products (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="pack solutions end to end, without padding, and "
                   "torch.compile the layers for the updates (default: with CUDA and bfloat16)")
    g.add_argument("--log-every", type=int, default=1, help="steps between rows of metrics (default 1)")
    g.add_argument("--eval-every", type=int, help="steps between evaluations on held-out problems")
    g.add_argument("--eval-problems", type=int, help="problems of such an evaluation, for ID and for OOD-edge each")
    g.add_argument("--save-every", type=int, help="steps between checkpoints")
    args = p.parse_args()

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cuda = args.device.startswith("cuda")
    if args.dtype is None:
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if args.compile is None:
        args.compile = cuda and args.dtype == "bfloat16"
    try:
        if (args.budget is None) != (args.rl_share is None) or args.budget is not None and args.steps is not None:
            raise ValueError("--budget and --rl-share go together, and instead of --steps")
        source = args.out if args.resume and os.path.exists(args.out) else args.init
        args.start = load_checkpoint(source)
        args.model, args.id_ops = build_model(args.start, source), args.start.get("id_ops")
        if not (isinstance(args.id_ops, list) and len(args.id_ops) == 2):
            raise KeyError("id_ops")
        groups = data.op_groups(args.id_ops)
        args.preset = args.preset or args.start["recipe"]["preset"]
        if args.preset not in PRESETS:
            raise ValueError(f"{source} has preset {args.preset}, and grpo.PRESETS has not: add it, or give --preset")
        args.vocabulary = data.VOCABULARY
        if args.start["recipe"].get("vocabulary", args.vocabulary) != args.vocabulary:
            raise ValueError(f"{source} was trained with other tokens: data.py has changed since, so train anew")
        settings = PRESETS[args.preset]
        if source == args.init:  # what tells one training of it from another: after a new one, nothing is to be resumed
            args.init_seconds = args.start.get("seconds")
        elif os.path.exists(args.init):
            args.init_seconds = load_checkpoint(args.init).get("seconds")
        else:
            args.init_seconds = args.start["recipe"].get("init_seconds")
        if args.micro_tokens is None and not cuda:  # as in pretrain.py: memory
            args.micro_tokens = min(4096, settings["micro_tokens"])
        for name, value in settings.items():
            if getattr(args, name) is None and name != "id_share":
                setattr(args, name, value)
        if args.ops == "edge":
            if source == args.init:
                args.ops = measured_edge(args.eval_json, args.init)
            elif "edge" not in args.start["recipe"]:
                raise ValueError(f"{args.out} was not made with --ops edge: resume with the same arguments")
            else:  # a resumed run keeps it, whatever was evaluated since
                args.ops = args.start["recipe"]["edge"]
            args.edge = args.ops
        if args.mix is None:
            if args.curriculum and args.id_share is not None:
                raise ValueError("--curriculum decides by itself how often each op comes: it takes no --id-share")
            args.id_share = settings["id_share"] if args.id_share is None else args.id_share
            if not 0 <= args.id_share <= 1:
                raise ValueError(f"--id-share must be from 0 to 1, got {args.id_share}")
            if args.curriculum:
                args.ops = args.ops or "{}-{}".format(args.id_ops[0], groups["OOD-hard"][1])
            elif args.ops is None and args.id_ops[1] >= data.MAX_OP:
                raise ValueError(f"{source} was trained up to op {data.MAX_OP}, the last: name the range with --ops or --mix")
            args.ops = args.ops or "{}-{}".format(*groups["OOD-edge"])
            data.parse_ops(args.ops)
            args.mix = args.ops if args.curriculum else \
                "all:{}-{}:{:g},all:{}:{:g}".format(*args.id_ops, args.id_share, args.ops, 1 - args.id_share)
        elif args.ops is not None or args.id_share is not None:
            raise ValueError("give --ops (and --id-share) or --mix, not both")
        args.mixture = data.parse_mixture(args.mix)
        args.law = data.distractor_law(args.distractors)
        torch.empty(0, device=args.device)
        if args.compile and cuda and args.dtype != "bfloat16":
            raise ValueError("--compile needs --dtype bfloat16 on CUDA: attention within packed problems has no float32 kernel")
        for name in ("steps prompts rollouts updates max_new micro_tokens rows log_every eval_every eval_problems "
                     "save_every").split():
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        for name in "seed lr min_lr warmup weight_decay kl workers".split():
            if not 0 <= getattr(args, name) < 2 ** 40:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and not huge, got {getattr(args, name)}")
        for name in "alpha reward_noise".split():
            if not 0 <= getattr(args, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} must be from 0 to 1, got {getattr(args, name)}")
        for name in "clip clip_ratio temperature".split():
            if not 0 < getattr(args, name) < 1e6:
                raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
        if args.rollouts < 2:
            raise ValueError("--rollouts must be at least 2: a solution is judged against the others of its group")
        world = int(os.environ.get("WORLD_SIZE", 1))
        if args.prompts % world:
            raise ValueError("--prompts must be a multiple of the number of ranks")
        if args.updates > args.prompts // world:
            raise ValueError(f"{args.prompts // world} prompts (a rank) are too few for {args.updates} updates")
        if args.budget is not None and not (0 < args.budget < 1e15 and 0 < args.rl_share <= 1):
            raise ValueError("--budget is above 0 and --rl-share above 0, up to 1, where there is RL")
        args.metrics = args.out.removesuffix(".pt") + ".jsonl"
        folders = [path for path in (args.out, args.metrics) if os.path.exists(path) and not os.path.isfile(path)]
        if args.out.endswith(("/", ".jsonl")) or folders:
            raise ValueError(f"--out {args.out} must name a file, and not one in .jsonl, which is for the metrics")
        if os.path.realpath(args.init) in map(os.path.realpath, (args.out, f"{args.out}.old")):
            raise ValueError(f"--out {args.out} would overwrite the checkpoint to start from")
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        probe = f"{args.out}.{os.getpid()}.part"  # better to fail now than at the first checkpoint
        open(probe, "ab").close()
        os.remove(probe)
    except (KeyError, TypeError):
        p.error(f"{source} does not say how it was trained: it is not a whole checkpoint of a stage")
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        p.error(str(error).splitlines()[0])
    return p, args


def measured_edge(path, checkpoint):
    """The op range that evaluate.py named as the edge of this checkpoint. Raises ValueError with a line for the user."""
    try:
        with open(path, encoding="utf-8") as f:
            edge = json.load(f)["checkpoints"][checkpoint]["edge"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--ops edge needs an evaluation of {checkpoint} in {path}: "
                         f"run python evaluate.py {checkpoint}") from None
    if edge is None:
        raise ValueError(f"{path} names no edge for {checkpoint}: no op has low pass@1 and some pass@k; give --ops")
    return f"{edge[0]}-{edge[1]}"


def main():
    parser, args = arguments()

    # ------------------------------------------------------------------------------------------------------------------
    # device, ranks (torchrun sets the variables), precision
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = args.device
    if world > 1:
        if device == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    master = rank == 0
    torch.set_float32_matmul_precision("high")
    kind = torch.device(device).type
    precision = torch.autocast(kind, torch.bfloat16) if args.dtype == "bfloat16" else nullcontext()

    def say(*text):
        if master:
            print(*text, flush=True)

    # ------------------------------------------------------------------------------------------------------------------
    # the policy (of --init or of a run to resume), the reference, the optimizer
    model = args.model.to(device).train()
    reference = copy.deepcopy(model).requires_grad_(False) if args.kl else None
    matrices = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices), dict(params=[p for p in model.parameters() if p.ndim < 2], weight_decay=0.0)], lr=args.lr,
        betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    ops = sorted({op for (_, op), weight in zip(args.mixture.cells, args.mixture.weights) if weight > 0})
    learnable = {op: 1.0 for op in ops}  # --curriculum: share of an op's groups that had a gradient lately

    # what the result depends on: a resumed run must have the same
    recipe = {k: v for k, v in vars(args).items() if k not in ("start model resume out metrics ops eval_json id_share "
              "mixture law device workers compile log_every eval_every eval_problems save_every").split()} | {"world": world}
    start, tokens_seen, seconds, val = 0, 0, 0.0, None
    if args.resume and os.path.exists(args.out):
        try:
            checkpoint = args.start
            if checkpoint["stage"] != "grpo":
                raise ValueError(f"{args.out} is a checkpoint of {checkpoint['stage']}, not of grpo")
            if checkpoint["recipe"].get("init_seconds") != args.init_seconds:
                raise ValueError(f"{args.init} was trained anew after {args.out} was made from it: start afresh without --resume")
            for key, value in recipe.items():
                if checkpoint["recipe"].get(key) != value:
                    raise ValueError(f"{args.out} was made with {key} {checkpoint['recipe'].get(key)}, not {value}: "
                                     "resume with the same arguments, or start afresh without --resume")
            optimizer.load_state_dict(checkpoint["optimizer"])
            if reference:
                reference.load_state_dict(checkpoint["reference"])
            learnable = dict(zip(ops, checkpoint["learnable"]))
            start, tokens_seen, seconds, val = (checkpoint[k] for k in ("step", "tokens", "seconds", "held_out"))
        except ValueError as error:
            parser.error(str(error))
        except Exception:  # a part is missing or is not what it should be
            parser.error(f"{args.out} is not a whole checkpoint of grpo: start afresh without --resume")
        say(f"resumed {args.out} at step {start}")
    elif args.resume:
        say(f"there is no {args.out} yet: starting at step 0")
    if master and args.resume:
        keep_metrics(args.metrics, start)
    elif master:  # who forgets --resume loses nothing
        for path in filter(os.path.exists, (args.out, args.metrics)):
            os.replace(path, f"{path}.old")
            say(f"{path} was there: it is {path}.old now (--resume would have continued it; to go back, rename it)")

    if args.compile:  # one layer at a time, as in pretrain.py; sampling has its own steps
        torch._dynamo.config.recompile_limit = 64
        for layer in [*model.layers, *(reference.layers if reference else [])]:
            layer.compile(dynamic=False)

    enc = data.tokenizer()
    stop_token = enc.encode_single_token(data.END)
    generator, buffers = torch.Generator(device), {}  # where sampling keeps its memory and CUDA graphs from step to step
    allowance = args.budget * args.rl_share / RL_COST if args.budget is not None else math.inf

    def finished(step):
        return tokens_seen >= allowance if args.budget is not None else step >= args.steps

    def mine(first, count, mixture, split):
        """This rank's part of problems first ... first + count - 1."""
        return [data.make_row(i, mixture, SEED + args.seed, split, args.law)
                for i in range(first + rank, first + count, world)]

    def gathered(objects):
        """The lists of all ranks, joined."""
        if world == 1:
            return objects
        parts = [None] * world
        dist.all_gather_object(parts, objects)
        return [o for part in parts for o in part]

    eval_rows = {name: mine(0, args.eval_problems, data.parse_mixture(f"{low}-{high}"), "eval")
                 for name, (low, high) in data.op_groups(args.id_ops).items() if name != "OOD-hard" and low <= high}

    def held_out():
        """Verified pass@1 on held-out problems at evaluate.py's temperature, 4 samples each: {"ID": x, "OOD-edge": y}."""
        right = {}
        for name, rows in eval_rows.items():
            generator.manual_seed(rank)
            with precision:
                tokens, _ = sample(model, [data.encode(enc, data.prompt_text(row)) for row in rows], stop_token, 4,
                                   args.max_new, temperature=0.7, generator=generator, rows=args.rows, buffers=buffers)
            right[name] = float(np.mean(gathered([verify(rows[j // 4]["solution"], data.decode(enc, ids))["verified"]
                                                  for j, ids in enumerate(tokens)])))
        return right

    def to_device(a):
        """An array or a tensor as a tensor there, a number as it is. On CUDA nothing waits for the copy."""
        if isinstance(a, int):
            return a
        a = torch.as_tensor(a)
        return (a.pin_memory() if kind == "cuda" else a).to(device, non_blocking=True)

    @torch.no_grad()
    def gold_loss():
        """Cross-entropy of the held-out gold solutions, nats a token: a broken model must not replace a good checkpoint."""
        losses = []
        if eval_rows["ID"]:  # a rank may have none
            batches = [arrays for _, arrays in data.micro_batches([data.encode_row(enc, row) for row in eval_rows["ID"][:16]],
                                                                  args.micro_tokens, "solution", args.compile)]
            with precision:
                losses = [sum(float(model.loss(*map(to_device, arrays))) for arrays in batches)
                          / sum((y != data.IGNORE).sum() for _, y, *_ in batches)]
        return float(np.mean(gathered(losses)))

    def close():
        bar.close()
        if workers:  # left to the interpreter's end, the pool may be torn down twice at once (a race in CPython 3.11)
            workers.shutdown()

    def give_up(step, why):
        close()
        say(f"stopped at step {step}: {why}; try a smaller --lr. {args.out} holds the last good checkpoint, if one was "
            "written.")
        sys.exit(1)

    def shares(values):
        return ", ".join(f"{name} {value:.3f}" for name, value in values.items())

    def checkpoint(step):
        return dict(stage="grpo", config=asdict(model.config), model=model.state_dict(), step=step, tokens=tokens_seen,
                    problems=step * args.prompts, seconds=seconds + time.time() - began, recipe=recipe, id_ops=args.id_ops,
                    held_out=val, optimizer=optimizer.state_dict(), reference=reference and reference.state_dict(),
                    learnable=[learnable[op] for op in ops])

    say(f"{args.init}: {model.n_params() / 1e6:.2f}M parameters; mixture {args.mix}"
        + (", curriculum; " if args.curriculum else "; ")
        + (f"{args.steps} steps" if args.budget is None else f"{allowance:.3g} tokens of RL")
        + f" of {args.prompts} prompts x {args.rollouts} rollouts, {args.updates} updates each; reward {args.reward}; learning "
        f"rate {args.lr:g}; {args.dtype} on {device}" + (f", {world} ranks" if world > 1 else "") +
        f", {torch.get_num_threads()} threads")
    workers = args.workers and ProcessPoolExecutor(args.workers, get_context("spawn"), as_worker)
    interrupted = []

    def interrupt(*_):
        interrupted.append(1)
        with suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving\n" if master else b"")

    handlers = {sig: signal.signal(sig, interrupt) for sig in (signal.SIGINT, signal.SIGTERM)}
    began = time.time()
    if val is None:
        val = held_out()
        say("held out before RL, verified:", shares(val))
    if args.budget is None:
        bar = tqdm(total=args.steps, initial=start, unit="step", disable=None if master else True, smoothing=0.1)
    else:
        bar = tqdm(total=round(allowance), initial=round(tokens_seen), unit="token", unit_scale=True,
                   disable=None if master else True, smoothing=0.1)

    step = start
    while not finished(step):
        step_began = time.time()

        # --------------------------------------------------------------------------------------------------------------
        # rollouts: a group of solutions for each prompt. All chance of a step comes from (seed, step, rank), so there is
        # no state of a random number generator to lose between a kill and --resume
        mixture = args.mixture
        if args.curriculum:
            mixture = data.reweighted(mixture, {op: max(FLOOR, share) for op, share in learnable.items()})
        rows = mine(step * args.prompts, args.prompts, mixture, "train")
        prompts = [data.encode(enc, data.prompt_text(row)) for row in rows]
        generator.manual_seed(((SEED + args.seed) * 1_000_003 + step) * world + rank)
        jobs = []  # (indices of some solutions, what becomes their verdicts)

        def judge(solutions):
            """Verify solutions [(index, ids)]: in a worker, while others are sampled, or here."""
            for part in (solutions[i:i + 64] for i in range(0, len(solutions), 64)):
                pairs = [(rows[j // args.rollouts]["solution"], data.decode(enc, ids)) for j, ids in part]
                jobs.append(([j for j, _ in part], workers.submit(verdicts, pairs) if workers else verdicts(pairs)))

        with precision:
            tokens, old_logprobs = sample(model, prompts, stop_token, args.rollouts, args.max_new, args.temperature,
                                          generator, args.rows, progress=judge if workers else None, buffers=buffers)
        rollout_seconds = time.time() - step_began

        # --------------------------------------------------------------------------------------------------------------
        # rewards r_i and advantages A_i
        if not workers:
            judge(list(enumerate(tokens)))
        judged = dict(v for indices, job in jobs for v in zip(indices, job.result() if workers else job))
        judged = [judged[j] for j in range(len(tokens))]
        noise = np.random.default_rng((args.seed, step, rank)).random(len(judged)) < args.reward_noise
        rewards = torch.tensor([reward(misjudged(v) if wrong else v, args.reward, args.alpha)
                                for v, wrong in zip(judged, noise)])
        advantages = group_advantages(rewards.view(-1, args.rollouts), args.advantage).flatten()
        rollouts = [(prompts[j // args.rollouts] + ids, len(prompts[j // args.rollouts]), old_logprobs[j], advantages[j])
                    for j, ids in enumerate(tokens)]
        verify_seconds = time.time() - step_began - rollout_seconds

        # --------------------------------------------------------------------------------------------------------------
        # updates: each solution is used once
        progress = step / args.steps if args.budget is None else tokens_seen / allowance
        lr = (args.lr + (args.min_lr - args.lr) * progress) * min(1, (step + 1) / max(1, args.warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {name: torch.zeros((), device=device)
                for name in ("loss", "kl", "approx_kl", "clipped", "entropy", "mismatch", "sampled", "tokens")}
        grad_norms = []
        for update in range(args.updates):
            first, last = (u * len(rows) // args.updates * args.rollouts for u in (update, update + 1))
            part = rollouts[first:last]
            n_tokens = torch.tensor(float(sum(len(ids) - n_prompt for ids, n_prompt, *_ in part)), device=device)
            if world > 1:
                dist.all_reduce(n_tokens)
            if not args.kl:  # a group whose rewards are all equal has no gradient; with KL, that of KL alone
                part = [r for r in part if r[3] != 0]
            for batch, (x, y, *sequences) in data.micro_batches(part, args.micro_tokens, "solution", args.compile):
                where = np.flatnonzero(y != data.IGNORE)  # the tokens of the solutions, row by row
                lengths = torch.tensor([len(ids) - n_prompt for ids, n_prompt, *_ in batch])
                x, where, targets, old, A, *sequences = map(to_device, (
                    x, where, y.flatten()[where], torch.cat([old for _, _, old, _ in batch]),
                    torch.stack([a for *_, a in batch]).repeat_interleave(lengths), *sequences))
                with precision:
                    logprobs, entropy = model.logprobs(x, where, targets, args.temperature, *sequences)
                    with torch.no_grad():
                        ref = reference.logprobs(x, where, targets, args.temperature, *sequences)[0] if args.kl else None
                loss, token_sums = grpo_loss(logprobs, old, ref, A, n_tokens, args.clip_ratio, args.kl)
                loss.backward()
                with torch.no_grad():
                    for name, value in token_sums.items():
                        sums[name] += value
                    sums["loss"] += loss / args.updates
                    sums["entropy"] += entropy.sum()
                    sums["tokens"] += len(old)
                    if update == 0:  # nothing has changed since sampling: the engine and `forward` should agree
                        sums["mismatch"] += (logprobs - old).abs().sum()
                        sums["sampled"] += len(old)
            for p in model.parameters():
                if p.grad is None:  # no group of this part has a gradient
                    p.grad = torch.zeros_like(p)
            if world > 1:
                flat = torch.cat([p.grad.flatten() for p in model.parameters()])
                dist.all_reduce(flat)
                for p, g in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
                    p.grad.copy_(g.view_as(p))
            grad_norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)))
            if not math.isfinite(grad_norms[-1]):
                give_up(step + 1, "the gradient is not finite")
            if grad_norms[-1]:  # else Adam would go on in its old direction, for nothing that was learnt
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if world > 1:
            flat = torch.stack(list(sums.values()))
            dist.all_reduce(flat)
            sums = dict(zip(sums, flat))
        update_seconds = time.time() - step_began - rollout_seconds - verify_seconds

        # --------------------------------------------------------------------------------------------------------------
        # what was learnt from, per op: groups without a right solution, with some, with only right ones
        step += 1
        records = gathered([dict(op=rows[j // args.rollouts]["op"], reward=float(r),
                                 right=reward(v, args.reward, args.alpha) > 1 - 1e-6,  # whatever the noise says
                                 outcome=v["outcome"], process=v["process"], verified=v["verified"], strict=v["strict"],
                                 length=len(ids), truncated=ids[-1] != stop_token,
                                 read=len(prompts[j // args.rollouts]) + len(ids))
                            for j, (r, v, ids) in enumerate(zip(rewards, judged, tokens))])
        tokens_seen += sum(r["read"] for r in records)
        groups = {}
        for j in range(0, len(records), args.rollouts):
            group = [r["reward"] for r in records[j:j + args.rollouts]]
            right = [r["right"] for r in records[j:j + args.rollouts]]
            g = groups.setdefault(records[j]["op"],
                                  dict(groups=0, all_wrong=0, mixed=0, all_right=0, gradient=0, reward=0.0))
            g["groups"] += 1
            g["all_wrong" if not any(right) else "all_right" if all(right) else "mixed"] += 1
            g["gradient"] += max(group) > min(group)
            g["reward"] += sum(group) / len(group)
        for op, g in groups.items():
            learnable[op] = MEMORY * learnable[op] + (1 - MEMORY) * g["gradient"] / g["groups"]

        stop = bool(interrupted)
        if world > 1:  # one rank's signal stops them all
            flag = torch.tensor(float(stop), device=device)
            dist.all_reduce(flag)
            stop = bool(flag)
        end = finished(step)
        report, save = step % args.eval_every == 0 or end, step % args.save_every == 0 or end or stop
        if (report or save) and not gold_loss() < 2 * math.log(model.config.vocab_size):  # twice the loss of guessing
            give_up(step, "the model finds held-out solutions far less likely than by guessing")
        if report:
            val = held_out()
        if master and (step % args.log_every == 0 or end):
            def mean(name):
                return sum(r[name] for r in records) / len(records)
            n = float(sums["tokens"]) or 1.0
            row = dict(
                step=step, loss=float(sums["loss"]), reward=mean("reward"), outcome=mean("outcome"), process=mean("process"),
                verified=mean("verified"), strict=mean("strict"),
                hacked=sum(r["outcome"] and not r["verified"] for r in records) / len(records),
                groups={str(op): {k: v / g["groups"] if k != "groups" else v for k, v in g.items()}
                        for op, g in sorted(groups.items())},
                kl=float(sums["kl"]) / n, approx_kl=float(sums["approx_kl"]) / n, clip_frac=float(sums["clipped"]) / n,
                entropy=float(sums["entropy"]) / n, mismatch=float(sums["mismatch"]) / (float(sums["sampled"]) or 1.0),
                grad_norm=sum(grad_norms) / len(grad_norms), lr=lr, length=mean("length"), truncated=mean("truncated"),
                held_out=val, problems=step * args.prompts, tokens=tokens_seen, training_tokens=round(tokens_seen * RL_COST),
                tokens_per_s=round(mean("length") * len(records) / rollout_seconds), rollout_s=round(rollout_seconds, 3),
                verify_s=round(verify_seconds, 3), update_s=round(update_seconds, 3),
                seconds=round(seconds + time.time() - began, 2))
            with open(args.metrics, "a") as f:
                f.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"reward {row['reward']:.3f}, verified {row['verified']:.3f}, held out {shares(val)}")
        if master and save:
            save_checkpoint(args.out, checkpoint(step))
        bar.update(1 if args.budget is None else sum(r["read"] for r in records))
        if step == start + (2 if args.compile or workers else 1) and not end:  # the first step compiles, or starts workers
            left = args.steps - step if args.budget is None else (allowance - tokens_seen) / sum(r["read"] for r in records)
            say(f"expected time: about {(time.time() - step_began) * left / 60:.1f} minutes")
        if stop and not end:
            close()
            say(f"interrupted: saved {args.out} at step {step}; continue with --resume")
            sys.exit(130)
    close()
    say(f"{args.out}: {step} steps, {step * args.prompts} prompts, {tokens_seen} tokens of RL (worth {tokens_seen * RL_COST:.3g} "
        f"training tokens), {(seconds + time.time() - began) / 60:.1f} minutes; held out, verified: {shares(val)}")
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if interrupted:  # in the last step: nothing is left to resume, but what comes after this script is not wanted
        sys.exit(130)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step: nothing to save
        sys.exit(130)
    except OSError as error:  # a full disk, say
        sys.exit(f"{error}")
