"""
Stage 1, pre-training: next-token prediction from scratch on synthetic reasoning problems.

    python pretrain.py                                  the main job, minutes on a laptop CPU (preset tiny)
    python pretrain.py --ops 2-10                       the paper's range of op, in all three contexts
    python pretrain.py --preset 100m                    the paper's model and recipe (the default with CUDA)
    python pretrain.py --resume                         continue where it stopped
    torchrun --nproc_per_node=8 pretrain.py ...         on several GPUs (a CPU's cores all work anyway)

op, the difficulty of a problem, is the number of Define steps of its solution plus that of the operators between letters.
Writes a checkpoint to --out and metrics, one JSON row every few steps, beside it (out/pretrain.jsonl). Ctrl-C saves.
"""
import math
import os
import time
from dataclasses import asdict

from model import (accumulate, add_prediction_options, amounts_and_speeds, any_rank, at_least, check_run_files, choose_device,
                   compile_layers, exit_if_interrupted, fill_from_preset, give_up, how_it_runs, make_optimizers, mean_loss,
                   n_at_a_time, n_ranks, noted_interrupts, one_line_errors, open_run, progress_bar, rank, run_script, sample,
                   save_checkpoint, say, say_expected_time, set_up, stage_parser, step_batches, write_metrics)
from model import CONFIGS, Config, Transformer, check_outputs, presets_of
import data
import torch  # after model.py, which sets how its threads wait

# ----------------------------------------------------------------------------------------------------------------------
# settings: a preset is what suits a size of model (model.CONFIGS). Each can be changed on the command line

STAGE, SEED = "pretrain", 0
SETTINGS = dict(  # name=(tiny, 100m). tiny: 14 minutes on two CPU cores; 100m: arXiv 2512.07783, 10B of its tokens
    mix=("zoo:2-6", "all:2-4:0.2,all:5-7:0.3,all:8-10:0.5"),  # 100m: easy, medium and hard problems
    late_mix=("zoo:2-6:0.3,zoo:7-8:0.7", "all:2-4:0.2,all:5-7:0.3,all:8-10:0.5"),  # tiny: first what is learnt fast
    late_from=(0.55, 0.55),          # share of the steps before the late phase
    distractors=(0.5, 2.0),
    late_distractors=(0.5, 2.0),
    max_parents=(2, 4),              # tiny: a world in which few kinds of steps make up problems of any size (tests/coverage.py)
    max_value=(20, 1000),
    steps=(6000, 19_000),
    batch=(64, 1152),                # 100m: 512k tokens of the paper's tokenizer; ours makes fewer
    optimizer=("muon", "adamw"),
    momentum=(0.8, 0.95),
    lr=(8e-3, 1e-4),
    min_lr=(0.0, 3e-5),
    warmup=(0.05, 0.05),
    weight_decay=(0.1, 0.1),
    name_parts=(0.5, 0.0),           # see `new_model`
    micro_tokens=(3072, 32_768),
    workers=(0, 4),
    eval_every=(100, 100),
    save_every=(200, 500))
PRESETS = presets_of(SETTINGS)  # also 10m, 400m, 1b
# options of the model, in model.Config and, name_parts, in `new_model`; and the least value of each
LEAST = dict(n_layers=1, width=1, n_heads=1, n_kv_heads=1, mlp=1, rope_theta=1.0, init_std=0.0, look_back=0, name_parts=0.0)


def arguments():
    p = stage_parser(__doc__, PRESETS, out="out/pretrain.pt")
    p.add_argument("--ops", help="range of op, all contexts with equal weight: 2-10 or 5")
    p.add_argument("--mix", help='instead of --ops a mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20:0.99,school:2:0.01"')
    p.add_argument("--late-mix", help="--mix of the late phase of the run (default: as before it)")
    p.add_argument("--late-distractors", type=at_least(0.0), help="--distractors of the late phase (default: as before it)")
    p.add_argument("--late-from", type=at_least(0.0, up_to=1.0), help="share of the steps before the late phase")
    add_prediction_options(p)
    p.add_argument("--keep-every", type=at_least(1), metavar="N", help="also keep the checkpoint of every N steps, as OUT-STEP.pt")
    g = p.add_argument_group("model (defaults from the preset)", "n-layers, width, n-heads, n-kv-heads; mlp: its hidden width; "
                             "rope-theta: base of the rotary frequencies; init-std: of the weights at the start; look-back: layers "
                             "in which some heads start out attending to the tokens just before; name-parts: how much of the "
                             "embeddings of its kind and place that of a name starts with")
    for name, low in LEAST.items():
        g.add_argument("--" + name.replace("_", "-"), type=at_least(low))
    args = p.parse_args()
    with one_line_errors(p):
        choose_device(args)
        args.preset = args.preset or ("100m" if args.device.startswith("cuda") else "tiny")
        if args.ops is not None or args.mix is not None:
            args.mix = data.mixture_of(args.ops, args.mix, None).spec
        args.late_mix = args.mix if args.late_mix is None else data.parse_mixture(args.late_mix).spec
        args.late_distractors = args.distractors if args.late_distractors is None else args.late_distractors
        args.vocab_size, args.vocabulary = data.VOCAB_SIZE, data.VOCABULARY
        shape = asdict(CONFIGS[args.preset])
        shape |= {name: getattr(args, name) for name in shape if getattr(args, name, None) is not None}
        fill_from_preset(args, PRESETS[args.preset] | shape, Config(**shape))
        [data.World(mean, args.max_parents, args.max_value) for mean in (args.distractors, args.late_distractors)]  # may refuse
        if args.width % (2 * args.n_heads) or args.n_heads % args.n_kv_heads:
            raise ValueError("--width must be a multiple of 2 * --n-heads, --n-heads a multiple of --n-kv-heads")
        if args.n_layers * args.width * (args.width + args.mlp) > 10 ** 11:
            raise ValueError("--n-layers, --width and --mlp make a model of more than 100 billion parameters")
        check_run_files(args)
        for path in [kept(args, step) for step in range(args.keep_every, args.steps + 1, args.keep_every)] if args.keep_every else ():
            check_outputs(path)
            if os.path.exists(path) and not (args.resume and os.path.exists(args.out)):
                raise ValueError(f"--keep-every would write {path}, which exists: move it away")
    return p, args


def kept(args, step):
    """Where --keep-every keeps the checkpoint of this step."""
    return f"{args.out.removesuffix('.pt')}-{step}.pt"


# ----------------------------------------------------------------------------------------------------------------------
# model


def new_model(args):
    """A model with random weights. The embedding of a name, which is one token, starts near those of its kind and its place."""
    model = Transformer(Config(**{name: getattr(args, name) for name in asdict(CONFIGS[args.preset])}))
    embeddings = model.embed_tokens.weight.data
    for name, parts in data.name_parts(data.tokenizer()).items():
        embeddings[name] += args.name_parts * embeddings[parts].sum(0)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# the schedule and the run


def learning_rate(step, args):
    """A linear warm-up, then half a cosine down to min_lr."""
    warmup = max(1, round(args.warmup * args.steps))
    progress = max(0, step - warmup) / max(1, args.steps - warmup)
    cosine = args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    return args.lr * (step + 1) / warmup if step < warmup else cosine


def main():
    parser, args = arguments()
    device, precision = set_up(args)
    mixtures = [data.parse_mixture(spec) for spec in (args.mix, args.late_mix)]
    worlds = [data.World(mean, args.max_parents, args.max_value) for mean in (args.distractors, args.late_distractors)]
    late_from = round(args.late_from * args.steps)  # the step

    def seen(step):
        """What is "in distribution" (ID) for the later stages and evaluate.py: {context: its range so far}."""
        return data.op_ranges(*mixtures[:1] * (late_from > 0), *mixtures[1:] * (late_from < step))

    model = new_model(args).to(device)
    optimizers = make_optimizers(model, args.lr, args.weight_decay, args.momentum if args.optimizer == "muon" else None,
                                 getattr(torch, args.dtype))

    # step s trains on problems s * batch ... (s + 1) * batch - 1 of the stream; held out are others, of the last phase
    last_phase = int(late_from < args.steps)

    def stream(phase, split, batch, **more):
        return data.TrainingSteps(mixtures[phase], batch, SEED + args.seed, split, args.loss, worlds[phase], args.micro_tokens,
                                  packed=args.compile, at_a_time=n_at_a_time(device), **more)

    steps = stream(0, "train", args.batch, rank=rank(), n_ranks=n_ranks(),
                   late=(late_from, mixtures[1], worlds[1]))
    held_out = next(step_batches(stream(last_phase, "eval", 256), 0, 1, 0, device))

    # with --resume, open_run loads the state and the parts from --out
    state = dict(step=0, tokens=0, seconds=0.0, val_loss=None)
    recipe = open_run(parser, args, STAGE, state, model=model, optimizers=optimizers)
    start, tokens, val_loss = state["step"], torch.tensor(state["tokens"], device=device), state["val_loss"]

    def save(step, path):
        if rank() == 0:
            id_ranges = seen(step)
            id_ops = [min(m for m, _ in id_ranges.values()), max(M for _, M in id_ranges.values())]
            save_checkpoint(path, dict(
                stage=STAGE, config=asdict(model.config), id_ops=id_ops, id_ranges=id_ranges, recipe=recipe, run=f"{state['run']}-{step}",
                step=step, problems=step * args.batch, tokens=int(tokens), seconds=time.perf_counter() - began,
                val_loss=val_loss, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                rng=torch.get_rng_state()))

    say(f"{STAGE}, preset {args.preset}: {model.n_params() / 1e6:.2f}M parameters, {model.config.n_layers} layers of width "
        f"{model.config.width}; mixture {args.mix}, {worlds[0]}, from {args.late_from:.0%} of the steps on {args.late_mix}, "
        f"{args.late_distractors:g} distractors; {args.steps} steps of {args.batch} problems; {args.optimizer}, "
        f"learning rate {args.lr:g}; {how_it_runs(args)}")
    if args.compile:
        compile_layers(model)
        for size in data.pack_sizes(args.micro_tokens):  # one program for each size, before the clock starts
            accumulate(model, [data.pack([], size)], torch.ones(2), device, precision)
    if start < args.steps:
        middle, last = (start + args.steps) // 2, args.steps - 1  # texts may get longer on the way
        probes = [next(step_batches(steps, s, s + 1, 0, device)) for s in (start, middle, last)]
        say_expected_time(lambda probe: float(accumulate(model, *probe, device, precision)[0]), probes, args.steps - start)
        model.zero_grad(set_to_none=True)

    batches, waited = step_batches(steps, start, args.steps, args.workers, device), 0.0
    row_before = time.perf_counter(), start, state["tokens"]
    began = time.perf_counter() - state["seconds"]  # as if it had never stopped
    with noted_interrupts() as interrupted, progress_bar(start / args.steps) as show_progress:
        for step in range(start, args.steps):
            then = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - then
            loss, n_tokens = accumulate(model, *batch, device, precision)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
            lr = learning_rate(step, args)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            model.zero_grad(set_to_none=True)
            tokens += n_tokens

            # the step is done: look, log, save
            done = step + 1
            last = done == args.steps
            log, report = done % args.log_every == 0 or last, done % args.eval_every == 0 or last
            stop = (n_ranks() == 1 or log) and any_rank(interrupted, device)  # asking the other ranks waits for the device
            keep = args.keep_every and done % args.keep_every == 0
            save_now = done % args.save_every == 0 or keep or last or stop
            held_out_now = mean_loss(model, *held_out, device, precision) if report or save_now else 0.0
            limit = 2 * math.log(model.config.vocab_size)  # twice the loss of guessing; nan is not below it
            if not held_out_now < limit or (log or save_now) and not float(loss) < limit:
                give_up(args, done, f"the loss is {float(loss):.3g}, held out {held_out_now:.3g}: far worse than guessing")
            val_loss = held_out_now if report else val_loss
            if log:
                row = dict(step=done, loss=float(loss), val_loss=val_loss, lr=lr, grad_norm=float(grad_norm),
                           seconds=round(time.perf_counter() - began, 2),
                           **amounts_and_speeds(model, args.batch, device, done, int(tokens), row_before, waited))
                row_before, waited = (time.perf_counter(), done, row["tokens"]), 0.0
                write_metrics(args.metrics, row)
                known = f"held out {val_loss:.3f}, " if val_loss is not None else ""
                show_progress(done / args.steps, f"step {done}, loss {row['loss']:.3f}, {known}{row['tokens_per_s']} tokens/s"
                              + (f", MFU {row['mfu']:.2f}" if "mfu" in row else ""))
            if keep:
                save(done, kept(args, done))
            if save_now:
                save(done, args.out)
            exit_if_interrupted(stop and not last, f"saved {args.out} at step {done}; continue with --resume")
    say(f"{args.out}: step {args.steps}, {args.steps * args.batch} problems, {(time.perf_counter() - began) / 60:.1f} minutes")
    exit_if_interrupted(interrupted, "in the last step, so nothing is left to do")
    show(model, mixtures[last_phase], worlds[last_phase], args, precision)


def show(model, mixture, world, args, precision):
    """Print what the model writes on problems that it cannot have seen."""
    enc = data.tokenizer()
    rows = [data.make_row(i, mixture, SEED + args.seed, "eval", world) for i in range(args.show)]
    with precision:
        texts, _ = sample(model, [data.encode(enc, data.prompt_text(row)) for row in rows], enc.encode_single_token(data.END),
                          max_new=512, temperature=0)
    for row, ids in zip(rows, texts):
        say(f"\n--- held-out {data.show(row)}--- sampled (temperature 0)\n{data.decode(enc, ids).strip()}")


if __name__ == "__main__":
    run_script(main)
