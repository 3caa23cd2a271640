"""
Stage 2, mid-training: next-token prediction goes on from a checkpoint, on problems just past the range it was
pre-trained on (80 %) and on that range (20 %), with its own warm-up and schedule.

    python midtrain.py                                  from out/pretrain.pt, on its OOD-edge (op 11-14 after 2-10)
    python midtrain.py --ops 11-14 --id-share 0.2       the same, said in full
    python midtrain.py --budget 5e6 --rl-share 0.2      80 % of a budget in training tokens; grpo.py takes the rest
    python midtrain.py --resume                         continue where it stopped
    torchrun --nproc_per_node=8 midtrain.py ...         on several GPUs, or with 2 on two cores

Writes a checkpoint to --out and metrics, one JSON row every few steps, beside it (out/midtrain.jsonl). Ctrl-C saves.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import build_model, keep_metrics, load_checkpoint, peak_flops, sample, save_checkpoint

# Settings that suit a model; each can be set on the command line.
PRESETS = {
    "tiny": dict(steps=400, batch=64, lr=4e-3, min_lr=0.0, warmup=0.15, weight_decay=0.1, clip=1.0, optimizer="muon",
                 momentum=0.8, loss="all", distractors=4.0, micro_tokens=1536, save_every=100, workers=0),
    # arXiv 2512.07783: up to 2.5B of its tokens at 512k tokens a step, of which these problems have 560 each
    "100m": dict(steps=4900, batch=912, lr=1e-4, min_lr=3e-5, warmup=0.15, weight_decay=0.1, clip=1.0, optimizer="adamw",
                 momentum=0.95, loss="all", distractors=2.0, micro_tokens=32768, save_every=500, workers=4),
}

SEED = 1_000_000  # added to --seed: problems of its own, not those of pre-training over again


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [options]    (--help lists them)")
    p.add_argument("--init", default="out/pretrain.pt", help="checkpoint to start from (default out/pretrain.pt)")
    p.add_argument("--preset", choices=PRESETS, help="settings (default: the preset that --init was trained with)")
    p.add_argument("--out", default="out/midtrain.pt", help="checkpoint to write (default out/midtrain.pt)")
    p.add_argument("--resume", action="store_true", help="continue from --out; the result is that of one long run")
    p.add_argument("--seed", type=int, default=0, help="of the problem stream (default 0)")
    g = p.add_argument_group("data")
    g.add_argument("--ops", help="op range to learn (default: OOD-edge, up to 1.4 times the largest op of pre-training)")
    g.add_argument("--id-share", type=float, help="share from the range of pre-training (default 0.2)")
    g.add_argument("--mix", help='instead of these two a mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20,school:2-20"')
    g.add_argument("--distractors", type=float, help="mean number of unneeded sentences (default from the preset)")
    g.add_argument("--loss", choices=["all", "solution"], help="tokens with a loss: all, or what follows the prompt")
    g.add_argument("--workers", type=int, help="processes that make problems; 0: made in between")
    g = p.add_argument_group("compute")
    g.add_argument("--steps", type=int, help="optimizer steps (default from the preset)")
    g.add_argument("--budget", type=float, metavar="T", help="tokens of mid-training and RL together, instead of --steps")
    g.add_argument("--rl-share", type=float, metavar="B",
                   help="share of the budget left to grpo.py: (1 - B) T tokens are taken here")
    g = p.add_argument_group("optimization (defaults from the preset)")
    g.add_argument("--batch", type=int, help="problems per step, over all ranks")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--min-lr", type=float, help="learning rate at the end of the cosine")
    g.add_argument("--warmup", type=float, help="share of the steps over which the learning rate rises")
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--clip", type=float, help="largest norm of the gradient")
    g.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the layers, adamw for the rest")
    g.add_argument("--momentum", type=float, help="of muon")
    g.add_argument("--micro-tokens", type=int, help="tokens per forward pass; gradients add up over a step")
    g = p.add_argument_group("running")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="of matrix products (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="pack problems end to end, without padding, and "
                   "torch.compile the layers (default: with CUDA and bfloat16)")
    g.add_argument("--log-every", type=int, default=5, help="steps between rows of metrics (default 5)")
    g.add_argument("--eval-every", type=int, default=50, help="steps between held-out losses (default 50)")
    g.add_argument("--save-every", type=int, help="steps between checkpoints")
    g.add_argument("--show", type=int, default=2, help="held-out problems to print at the end (default 2)")
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
            raise ValueError(f"{source} has preset {args.preset}, and midtrain.PRESETS has not: add it, or give --preset")
        args.vocabulary = data.VOCABULARY
        if args.start["recipe"].get("vocabulary", args.vocabulary) != args.vocabulary:
            raise ValueError(f"{source} was trained with other tokens: data.py has changed since, so train anew")
        if source == args.init:  # what tells one training of it from another: after a new one, nothing is to be resumed
            args.init_seconds = args.start.get("seconds")
        elif os.path.exists(args.init):
            args.init_seconds = load_checkpoint(args.init).get("seconds")
        else:
            args.init_seconds = args.start["recipe"].get("init_seconds")
        if args.micro_tokens is None and not cuda:  # as in pretrain.py: memory
            args.micro_tokens = min(4096, PRESETS[args.preset]["micro_tokens"])
        for name, value in PRESETS[args.preset].items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.mix is None:
            args.id_share = 0.2 if args.id_share is None else args.id_share
            if not 0 <= args.id_share <= 1:
                raise ValueError(f"--id-share must be from 0 to 1, got {args.id_share}")
            if args.ops is None and args.id_ops[1] >= data.MAX_OP:
                raise ValueError(f"{source} was trained up to op {data.MAX_OP}, the last: name the range with --ops or --mix")
            edge = args.ops or "{}-{}".format(*groups["OOD-edge"])
            data.parse_ops(edge)
            args.mix = "all:{}-{}:{:g},all:{}:{:g}".format(*args.id_ops, args.id_share, edge, 1 - args.id_share)
        elif args.ops is not None or args.id_share is not None:
            raise ValueError("give --ops (and --id-share) or --mix, not both")
        args.mixture = data.parse_mixture(args.mix)
        law = data.distractor_law(args.distractors)
        torch.empty(0, device=args.device)
        if args.compile and cuda and args.dtype != "bfloat16":
            raise ValueError("--compile needs --dtype bfloat16 on CUDA: attention within packed problems has no float32 kernel")
        for name in "steps batch micro_tokens log_every eval_every save_every".split():
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        for name in "seed lr min_lr warmup weight_decay workers show momentum".split():
            if not 0 <= getattr(args, name) < 2 ** 62:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and not huge, got {getattr(args, name)}")
        if args.warmup >= 1 or args.momentum >= 1 or not args.clip > 0:
            raise ValueError("--warmup and --momentum are below 1; --clip is above 0")
        if args.budget is not None:
            if not 0 < args.budget < 1e15 or not 0 <= args.rl_share < 1:
                raise ValueError("--budget is above 0 and --rl-share at least 0 and below 1, where there is mid-training")
            enc = data.tokenizer()
            tokens = np.mean([len(data.encode_row(enc, data.make_row(i, args.mixture, SEED + args.seed, law=law))[0]) - 1
                              for i in range(2000)])
            args.steps = max(1, round(args.budget * (1 - args.rl_share) / (tokens * args.batch)))
        if args.batch < int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"--batch {args.batch} leaves ranks without problems: give each at least one")
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


def tensors(micro_batches):
    """Arrays of data.TrainingSteps -> tensors, and how many targets and tokens they have. Runs where the problems are made."""
    counts = [sum(int((y != data.IGNORE).sum()) for _, y, *_ in micro_batches),
              sum(int((x != 0).sum()) for x, *_ in micro_batches)]
    return [[torch.as_tensor(a) if isinstance(a, np.ndarray) else a for a in batch] for batch in micro_batches], \
        torch.tensor(counts)


def as_worker(number):
    """Makes a process a worker: signals to the group are for the run itself, which then saves."""
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


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
    # the model of --init or of a run to resume, and new optimizers
    torch.manual_seed(args.seed)
    model = args.model.to(device).train()
    config = model.config
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    decay = [model.embed_tokens.weight] + (matrices if args.optimizer == "adamw" else [])
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.AdamW([dict(params=decay), dict(params=no_decay, weight_decay=0.0)], lr=args.lr,
                                    betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    if args.optimizer == "muon":  # scaled so that one learning rate and weight decay suit both (arXiv 2502.16982)
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum,
                                           adjust_lr_fn="match_rms_adamw"))

    # what the result depends on: a resumed run must have the same
    recipe = {k: v for k, v in vars(args).items() if k not in ("start model resume out metrics ops id_share mixture device "
              "log_every eval_every save_every show workers compile").split()} | {"world": world}
    start, tokens_seen, seconds, val_loss = 0, 0, 0.0, None
    if args.resume and os.path.exists(args.out):
        try:
            checkpoint = args.start
            if checkpoint["stage"] != "midtrain":
                raise ValueError(f"{args.out} is a checkpoint of {checkpoint['stage']}, not of midtrain")
            if checkpoint["recipe"].get("init_seconds") != args.init_seconds:
                raise ValueError(f"{args.init} was trained anew after {args.out} was made from it: start afresh without --resume")
            for key, value in recipe.items():
                if checkpoint["recipe"].get(key) != value:
                    raise ValueError(f"{args.out} was made with {key} {checkpoint['recipe'].get(key)}, not {value}: "
                                     "resume with the same arguments, or start afresh without --resume")
            for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            torch.set_rng_state(checkpoint["rng"])
            start, tokens_seen, seconds, val_loss = (checkpoint[k] for k in ("step", "tokens", "seconds", "val_loss"))
        except ValueError as error:
            parser.error(str(error))
        except Exception:  # a part is missing or is not what it should be
            parser.error(f"{args.out} is not a whole checkpoint of midtrain: start afresh without --resume")
        say(f"resumed {args.out} at step {start} of {args.steps}")
    elif args.resume:
        say(f"there is no {args.out} yet: starting at step 0")
    if master and args.resume:
        keep_metrics(args.metrics, start)
    elif master:  # who forgets --resume loses nothing
        for path in filter(os.path.exists, (args.out, args.metrics)):
            os.replace(path, f"{path}.old")
            say(f"{path} was there: it is {path}.old now (--resume would have continued it; to go back, rename it)")

    # ------------------------------------------------------------------------------------------------------------------
    # data: step s trains on problems s * batch ... (s + 1) * batch - 1 of the stream
    def stream(split, batch, **more):
        return data.TrainingSteps(args.mixture, batch, SEED + args.seed, split, args.loss, args.distractors,
                                  args.micro_tokens, packed=args.compile, **more)

    train = stream("train", args.batch, rank=rank, world=world)
    loader = torch.utils.data.DataLoader(train, batch_size=None, sampler=range(start, args.steps),
                                         num_workers=args.workers, collate_fn=tensors, pin_memory=kind == "cuda",
                                         generator=torch.Generator(),  # its own: it must not draw from the run's
                                         worker_init_fn=as_worker)
    held_out, _ = tensors(stream("eval", 256)[0])

    if args.compile:  # one layer at a time: a single program a shape, for all layers, and there are few shapes (data.pack)
        torch._dynamo.config.recompile_limit = 64
        for layer in model.layers:
            layer.compile(dynamic=False)

    def to_device(batch):
        return [a.to(device, non_blocking=True) if torch.is_tensor(a) else a for a in batch]

    def accumulate(micro_batches, counts):
        """Add up the gradient of the mean loss per target token over micro-batches and ranks; returns that loss, and
        how many tokens the step read. Nothing here waits for the device."""
        count, n_tokens = counts = counts.to(device, non_blocking=True, copy=True)
        if world > 1:
            dist.all_reduce(counts)
        total = torch.zeros((), device=device)
        for batch in micro_batches:
            with precision:
                loss = model.loss(*to_device(batch)) / count
            loss.backward()
            total += loss.detach()
        if world > 1:
            flat = torch.cat([p.grad.flatten() for p in model.parameters()] + [total[None]])
            dist.all_reduce(flat)
            for p, g in zip(model.parameters(), flat[:-1].split([p.numel() for p in model.parameters()])):
                p.grad.copy_(g.view_as(p))
            total = flat[-1]
        return total, n_tokens

    @torch.no_grad()
    def held_out_loss():
        total = count = 0.0
        for batch in held_out:
            with precision:
                total += float(model.loss(*to_device(batch)))
            count += float((batch[1] != data.IGNORE).sum())
        return total / count

    def checkpoint(step):
        return dict(stage="midtrain", config=asdict(config), model=model.state_dict(), step=step, tokens=int(tokens_seen),
                    problems=step * args.batch, seconds=seconds + time.time() - began, recipe=recipe, id_ops=args.id_ops,
                    val_loss=val_loss,
                    optimizers=[o.state_dict() for o in optimizers], rng=torch.get_rng_state())

    # ------------------------------------------------------------------------------------------------------------------
    # say what will happen and how long it takes
    say(f"{args.init}: {model.n_params() / 1e6:.2f}M parameters, {config.n_layers} layers of width {config.width}; "
        f"mixture {args.mix}; {args.steps} steps of {args.batch} problems; {args.optimizer}, learning rate {args.lr:g}; "
        f"{args.dtype} on {device}" + (f", {world} ranks" if world > 1 else "") + f", {torch.get_num_threads()} threads")
    if start < args.steps:
        say("measuring how long a step takes")
        if args.compile:
            say("compiling for each size of micro-batch")
            for size in data.pack_sizes(args.micro_tokens):
                accumulate(tensors([data.pack([], size)])[0], torch.ones(2))
            held_out_loss()
        probe = tensors(train[start])
        for _ in range(2):  # the first pass warms up
            then = time.time()
            float(accumulate(*probe)[0])
            model.zero_grad(set_to_none=True)
            took = time.time() - then
        # 1.2: for making the problems, the optimizers, held-out losses and checkpoints
        say(f"expected time: about {took * (args.steps - start) * 1.2 / 60:.1f} minutes")

    # ------------------------------------------------------------------------------------------------------------------
    # train
    interrupted = []

    def interrupt(*_):
        interrupted.append(1)
        with suppress(OSError):
            os.write(2, b"\nfinishing the step, then saving\n" if master else b"")

    handlers = {sig: signal.signal(sig, interrupt) for sig in (signal.SIGINT, signal.SIGTERM)}
    began = logged = time.time()
    logged_step, logged_tokens, waited = start, tokens_seen, 0.0
    tokens_seen = torch.tensor(tokens_seen, device=device)  # counted there: reading it would wait for the device
    peak = world * (peak_flops(torch.cuda.get_device_name(device)) or 0) if kind == "cuda" else 0
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=None if master else True, smoothing=0.05)
    batches = iter(loader)
    for step in range(start, args.steps):
        then = time.time()
        batch = next(batches)
        waited += time.time() - then
        warmup = max(1, round(args.warmup * args.steps))
        progress = max(0, step - warmup) / max(1, args.steps - warmup)
        lr = args.lr * (step + 1) / warmup if step < warmup else \
            args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
        loss, n_tokens = accumulate(*batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        model.zero_grad(set_to_none=True)
        tokens_seen += n_tokens

        done = step + 1
        log, stop = done % args.log_every == 0, bool(interrupted)
        if world > 1 and log:  # one rank's signal stops them all, when they next look
            flag = torch.tensor(float(stop), device=device)
            dist.all_reduce(flag)
        if world > 1:
            stop = log and bool(flag)
        save = done % args.save_every == 0 or done == args.steps or stop
        report = done % args.eval_every == 0 or done == args.steps
        if report or save:  # before each save: a broken model must not replace a good one
            held_out_now = held_out_loss()
            val_loss = held_out_now if report else val_loss
        limit = 2 * math.log(config.vocab_size)  # twice the loss of guessing
        if (report or save) and not held_out_now < limit or (log or save) and not float(loss) < limit:
            bar.close()
            say(f"stopped at step {done}: the loss is {float(loss):.3g}, or that on held-out problems, and far worse than "
                f"guessing; try a smaller --lr. {args.out} holds the last good checkpoint, if one was written.")
            sys.exit(1)
        if master and (log or done == args.steps):
            now, tokens_now = time.time(), int(tokens_seen)
            row = dict(step=done, loss=float(loss), val_loss=val_loss, lr=lr, grad_norm=float(grad_norm),
                       problems=done * args.batch, tokens=tokens_now, seconds=round(seconds + now - began, 2),
                       tokens_per_s=round((tokens_now - logged_tokens) / (now - logged)),
                       problems_per_s=round((done - logged_step) * args.batch / (now - logged), 1),
                       waiting=round(waited / (now - logged), 4))
            if peak:
                per_token = model.flops_per_token(tokens_now / (done * args.batch))
                row["mfu"] = round(row["tokens_per_s"] * per_token / peak, 4)
            with open(args.metrics, "a") as f:
                f.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f}, held out {val_loss or math.nan:.3f}, "
                                f"{row['tokens_per_s']} tokens/s" + (f", MFU {row['mfu']:.2f}" if peak else ""))
            logged, logged_step, logged_tokens, waited = now, done, tokens_now, 0.0
        if master and save:
            save_checkpoint(args.out, checkpoint(done))
        bar.update()
        if stop and done < args.steps:
            bar.close()
            say(f"interrupted: saved {args.out} at step {done}; continue with --resume")
            sys.exit(130)
    bar.close()
    say(f"{args.out}: step {args.steps}, {args.steps * args.batch} problems, "
        f"{(seconds + time.time() - began) / 60:.1f} minutes of training")
    for sig, handler in handlers.items():
        signal.signal(sig, handler)
    if interrupted:  # in the last step: nothing is left to resume, but what comes after this script is not wanted
        sys.exit(130)

    # ------------------------------------------------------------------------------------------------------------------
    # what it writes on problems it cannot have seen
    if master and args.show:
        enc = train.enc
        rows = [data.make_row(i, args.mixture, SEED + args.seed, "eval", train.law) for i in range(args.show)]
        prompts = [data.encode(enc, data.prompt_text(row)) for row in rows]
        with precision:
            texts, _ = sample(model, prompts, enc.encode_single_token(data.END), max_new=512, temperature=0)
        for row, ids in zip(rows, texts):
            say(f"\n--- held-out problem, op {row['op']}, {row['template']}\n{row['problem']}{row['question']}"
                f"\n--- gold\n{data.response_text(row).strip()}\n--- sampled (temperature 0)\n{data.decode(enc, ids).strip()}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # before the first step: nothing to save
        sys.exit(130)
    except OSError as error:  # a full disk, say
        sys.exit(f"{error}")
