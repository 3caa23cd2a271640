"""
Stage 1, pre-training: next-token prediction from scratch on synthetic reasoning problems.

    python pretrain.py                                  the main job, minutes on a laptop CPU (preset tiny)
    python pretrain.py --ops 2-10                       the paper's op range
    python pretrain.py --preset 100m                    the paper's model and recipe (the default with CUDA)
    python pretrain.py --resume                         continue where it stopped
    torchrun --nproc_per_node=8 pretrain.py ...         on several GPUs, or with 2 on two cores

Writes a checkpoint to --out and metrics, one JSON row every few steps, beside it (out/pretrain.jsonl). Ctrl-C saves.
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from model import CONFIGS, Transformer, build_model, keep_metrics, load_checkpoint, peak_flops, sample, save_checkpoint

# A preset is a model (model.CONFIGS) and the settings that suit it. Each can be set on the command line.
PRESETS = {
    # chosen by measurement for ten minutes on two CPU cores. With op 2-5 evenly all of them came out worse. To find the right
    # sentence among many is learnt last, so there are many then
    "tiny": dict(mix="all:2-4:0.9,all:5:0.1", steps=3580, batch=64, lr=8e-3, min_lr=0.0, warmup=0.05, weight_decay=0.1,
                 clip=1.0, optimizer="muon", momentum=0.8, name_parts=0.5, loss="all", distractors=2.0, late_distractors=5.0,
                 micro_tokens=1536, save_every=200, workers=0),
    # arXiv 2512.07783: 10B of its tokens, about 22M problems, at 512k tokens a step; mixture 20 / 30 / 50 % by difficulty
    "100m": dict(mix="all:2-4:0.2,all:5-7:0.3,all:8-10:0.5", steps=19_000, batch=1152, lr=1e-4, min_lr=3e-5, warmup=0.05,
                 weight_decay=0.1, clip=1.0, optimizer="adamw", momentum=0.95, name_parts=0.0, loss="all",
                 distractors=2.0, late_distractors=2.0, micro_tokens=32768, save_every=500, workers=4),
}
MODEL = dict(n_layers="layers", width="width", n_heads="query heads", n_kv_heads="key-value heads",
             mlp="width inside the MLP", rope_theta="base of the rotary periods", init_std="spread of new weights",
             look_back="layers in which some heads start out looking at the tokens just before")


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [options]    (--help lists them)")
    p.add_argument("--preset", choices=PRESETS, help="model and settings (default: 100m with CUDA, else tiny)")
    p.add_argument("--out", default="out/pretrain.pt", help="checkpoint to write (default out/pretrain.pt)")
    p.add_argument("--resume", action="store_true", help="continue from --out; the result is that of one long run")
    p.add_argument("--seed", type=int, default=0, help="of the weights and of the problem stream (default 0)")
    g = p.add_argument_group("data")
    g.add_argument("--ops", help="op range, all contexts, uniform: 2-10 or 5")
    g.add_argument("--mix", help='mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20:0.99,school:2:0.01"')
    g.add_argument("--distractors", type=float, help="mean number of unneeded sentences (default 2)")
    g.add_argument("--late-distractors", type=float, help="the same in the last third of the steps (default: as --distractors, or "
                   "from the preset)")
    g.add_argument("--loss", choices=["all", "solution"], help="tokens with a loss: all, or what follows the prompt")
    g.add_argument("--workers", type=int, help="processes that make problems; 0: made in between")
    g = p.add_argument_group("optimization (defaults from the preset)")
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch", type=int, help="problems per step, over all ranks")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--min-lr", type=float, help="learning rate at the end of the cosine")
    g.add_argument("--warmup", type=float, help="share of the steps over which the learning rate rises")
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--clip", type=float, help="largest norm of the gradient")
    g.add_argument("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the layers, adamw for the rest")
    g.add_argument("--momentum", type=float, help="of muon")
    g.add_argument("--micro-tokens", type=int, help="tokens per forward pass; gradients add up over a step")
    g = p.add_argument_group("model (defaults from the preset)")
    for name, what in MODEL.items():
        g.add_argument("--" + name.replace("_", "-"), type=float if name in ("rope_theta", "init_std") else int, help=what)
    g.add_argument("--name-parts", type=float, help='how much the embeddings of kind and place add to that of a name, "adult '
                   'fox in Maple Creek", at the start')
    g = p.add_argument_group("running")
    g.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    g.add_argument("--dtype", choices=["bfloat16", "float32"], help="of matrix products (default: bfloat16 where it is fast)")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, help="pack problems end to end, without padding, and "
                   "torch.compile the layers (default: with CUDA and bfloat16)")
    g.add_argument("--log-every", type=int, default=5, help="steps between rows of metrics (default 5)")
    g.add_argument("--eval-every", type=int, default=100, help="steps between held-out losses (default 100)")
    g.add_argument("--save-every", type=int, help="steps between checkpoints")
    g.add_argument("--show", type=int, default=2, help="held-out problems to print at the end (default 2)")
    args = p.parse_args()

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.preset = args.preset or ("100m" if args.device.startswith("cuda") else "tiny")
    args.mixture = (args.ops, args.mix)  # the preset's only where neither is given
    if args.late_distractors is None:
        args.late_distractors = args.distractors
    args.vocabulary = data.VOCABULARY
    cuda = args.device.startswith("cuda")
    if args.micro_tokens is None and not cuda:  # with the large model 32768 take 18 GB, 4096 take 6
        args.micro_tokens = min(4096, PRESETS[args.preset]["micro_tokens"])
    for name, value in {**PRESETS[args.preset], **asdict(CONFIGS[args.preset])}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if args.dtype is None:
        fast = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else torch.cpu._is_avx512_bf16_supported()
        args.dtype = "bfloat16" if fast else "float32"
    if args.compile is None:
        args.compile = cuda and args.dtype == "bfloat16"
    try:
        args.mixture = data.mixture_of(*args.mixture, PRESETS[args.preset]["mix"])
        args.mix = args.mixture.spec
        data.distractor_law(args.distractors), data.distractor_law(args.late_distractors)
        torch.empty(0, device=args.device)
        if args.compile and cuda and args.dtype != "bfloat16":
            raise ValueError("--compile needs --dtype bfloat16 on CUDA: attention within packed problems has no float32 kernel")
        for name in "steps batch micro_tokens n_layers width n_heads n_kv_heads mlp log_every eval_every save_every".split():
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
        for name in "seed lr min_lr warmup weight_decay workers show init_std look_back name_parts momentum".split():
            if not 0 <= getattr(args, name) < 2 ** 62:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and not huge, got {getattr(args, name)}")
        if args.width % (2 * args.n_heads) or args.n_heads % args.n_kv_heads:
            raise ValueError("--width must be a multiple of 2 * n_heads, --n-heads a multiple of --n-kv-heads")
        if args.warmup >= 1 or args.momentum >= 1 or not args.clip > 0 or not args.rope_theta > 0:
            raise ValueError("--warmup and --momentum are below 1; --clip and --rope-theta are above 0")
        if args.batch < int(os.environ.get("WORLD_SIZE", 1)):
            raise ValueError(f"--batch {args.batch} leaves ranks without problems: give each at least one")
        args.metrics = args.out.removesuffix(".pt") + ".jsonl"
        folders = [path for path in (args.out, args.metrics) if os.path.exists(path) and not os.path.isfile(path)]
        if args.out.endswith(("/", ".jsonl")) or folders:
            raise ValueError(f"--out {args.out} must name a file, and not one in .jsonl, which is for the metrics")
        os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
        probe = f"{args.out}.{os.getpid()}.part"  # better to fail now than at the first checkpoint
        open(probe, "ab").close()
        os.remove(probe)
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
    # model and optimizers, new or resumed
    torch.manual_seed(args.seed)
    config = replace(CONFIGS[args.preset], vocab_size=data.VOCAB_SIZE, **{name: getattr(args, name) for name in MODEL})
    model = Transformer(config)
    embeddings = model.embed_tokens.weight.data  # names are single tokens: let them show their parts (data.name_parts)
    for name, parts in data.name_parts(data.tokenizer()).items():
        embeddings[name] += args.name_parts * embeddings[parts].sum(0)
    model.to(device)
    matrices = [p for p in model.layers.parameters() if p.ndim == 2]
    decay = [model.embed_tokens.weight] + (matrices if args.optimizer == "adamw" else [])
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.AdamW([dict(params=decay), dict(params=no_decay, weight_decay=0.0)], lr=args.lr,
                                    betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)]
    if args.optimizer == "muon":  # scaled so that one learning rate and weight decay suit both (arXiv 2502.16982)
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum,
                                           adjust_lr_fn="match_rms_adamw"))

    # what the result depends on: a resumed run must have the same
    recipe = {k: v for k, v in vars(args).items() if k not in ("resume out metrics ops mixture device log_every eval_every "
              "save_every show workers compile").split()} | {"world": world}
    trained_ops = [op for (_, op), weight in zip(args.mixture.cells, args.mixture.weights) if weight > 0]
    id_ops = [min(trained_ops), max(trained_ops)]  # "in distribution", for evaluate.py
    start, tokens_seen, seconds, val_loss = 0, 0, 0.0, None
    if args.resume and os.path.exists(args.out):
        try:
            checkpoint = load_checkpoint(args.out)
            if checkpoint["stage"] != "pretrain":
                raise ValueError(f"{args.out} is a checkpoint of {checkpoint['stage']}, not of pretrain")
            for key, value in recipe.items():
                if checkpoint["recipe"].get(key) != value:
                    raise ValueError(f"{args.out} was made with {key} {checkpoint['recipe'].get(key)}, not {value}: "
                                     "resume with the same arguments, or start afresh without --resume")
            model.load_state_dict(build_model(checkpoint, args.out).state_dict())
            for optimizer, state in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(state)
            torch.set_rng_state(checkpoint["rng"])
            start, tokens_seen, seconds, val_loss = (checkpoint[k] for k in ("step", "tokens", "seconds", "val_loss"))
        except ValueError as error:
            parser.error(str(error))
        except Exception:  # a part is missing or is not what it should be
            parser.error(f"{args.out} is not a whole checkpoint of pretrain: start afresh without --resume")
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
        return data.TrainingSteps(args.mixture, batch, args.seed, split, args.loss, args.distractors,
                                  args.micro_tokens, packed=args.compile, **more)

    train = stream("train", args.batch, rank=rank, world=world, late=(args.steps * 2 // 3, args.late_distractors))
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
        return dict(stage="pretrain", config=asdict(config), model=model.state_dict(), step=step, tokens=int(tokens_seen),
                    problems=step * args.batch, seconds=seconds + time.time() - began, recipe=recipe, id_ops=id_ops,
                    val_loss=val_loss,
                    optimizers=[o.state_dict() for o in optimizers], rng=torch.get_rng_state())

    # ------------------------------------------------------------------------------------------------------------------
    # say what will happen and how long it takes
    say(f"{args.preset}: {model.n_params() / 1e6:.2f}M parameters, {config.n_layers} layers of width {config.width}; "
        f"mixture {args.mix}; {args.steps} steps of {args.batch} problems; {args.optimizer}, learning rate {args.lr:g}; "
        f"{args.dtype} on {device}" + (f", {world} ranks" if world > 1 else "") + f", {torch.get_num_threads()} threads")
    if start < args.steps:
        say("measuring how long a step takes")
        if args.compile:
            say("compiling for each size of micro-batch")
            for size in data.pack_sizes(args.micro_tokens):
                accumulate(tensors([data.pack([], size)])[0], torch.ones(2))
            held_out_loss()
        probes, took = [tensors(train[step]) for step in (start, args.steps - 1)], {}  # the last third may be longer
        for _ in range(2):  # the first pass warms up
            for i, probe in enumerate(probes):
                then = time.time()
                float(accumulate(*probe)[0])
                took[i] = time.time() - then
        model.zero_grad(set_to_none=True)
        # 1.2: for making the problems, the optimizers, held-out losses and checkpoints
        say(f"expected time: about {(2 * took[0] + took[1]) / 3 * (args.steps - start) * 1.2 / 60:.1f} minutes")

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
        rows = [data.make_row(i, args.mixture, args.seed, "eval", train.law) for i in range(args.show)]
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
