"""
Stage 2, mid-training: next-token prediction goes on from a checkpoint, on problems just past the range of its pre-training
(80 %) and on that range (20 %). The optimizer starts anew, with a warm-up and a cosine of its own.

    python midtrain.py                                  from out/pretrain.pt, on its OOD-edge (op 11-14 after 2-10)
    python midtrain.py --ops 11-14 --id-share 0.2       the same, said in full, after pre-training on op 2-10
    python midtrain.py --budget 5e6 --rl-share 0.2      80 % of a budget in training tokens; grpo.py takes the rest
    python midtrain.py --resume                         continue where it stopped
    torchrun --nproc_per_node=8 midtrain.py ...         on several GPUs (a CPU's cores all work anyway)

`diff pretrain.py midtrain.py` shows what mid-training is. Writes a checkpoint to --out and metrics, one JSON row every few
steps, beside it (out/midtrain.jsonl). Ctrl-C saves.
"""
import math
import time
from dataclasses import asdict

from model import (accumulate, add_prediction_options, amounts_and_speeds, any_rank, at_least, check_run_files, choose_device,
                   compile_layers, exit_if_interrupted, fill_from_preset, give_up, how_it_runs, make_optimizers, mean_loss,
                   n_at_a_time, n_ranks, noted_interrupts, one_line_errors, open_run, progress_bar, rank, run_script, sample,
                   save_checkpoint, say, say_expected_time, set_up, stage_parser, step_batches, write_metrics)
from model import add_start_options, presets_of, read_start, take_world
import data
import torch  # after model.py, which sets how its threads wait

# ----------------------------------------------------------------------------------------------------------------------
# settings: a preset is what suits a size of model (model.CONFIGS). Each can be changed on the command line

STAGE, SEED = "midtrain", 1_000_000  # added to --seed, so that the problems are not those of pre-training over again
SETTINGS = dict(  # name=(tiny, 100m). tiny: two minutes on two CPU cores; 100m: arXiv 2512.07783, up to 2.5B of its tokens
    id_share=(0.2, 0.2),
    steps=(400, 4900),
    batch=(64, 912),                 # 100m: 512k tokens of the paper's tokenizer, in which these problems have 560 each
    optimizer=("muon", "adamw"),
    momentum=(0.8, 0.95),
    lr=(4e-3, 1e-4),
    min_lr=(0.0, 3e-5),
    warmup=(0.15, 0.15),
    weight_decay=(0.1, 0.1),
    micro_tokens=(3072, 32_768),
    workers=(0, 4),
    eval_every=(50, 50),
    save_every=(100, 500))
PRESETS = presets_of(SETTINGS)  # also 10m, 400m, 1b


def arguments():
    p = stage_parser(__doc__, PRESETS, out="out/midtrain.pt")
    add_start_options(p, init="out/pretrain.pt", rl_share=at_least(0.0, up_to=0.99))
    add_prediction_options(p)
    p.add_argument("--wrong-steps", type=at_least(0.0, up_to=1), default=0.0, help="share of solutions with a mistake (default 0)")
    args = p.parse_args()
    with one_line_errors(p):
        choose_device(args)
        init, model = read_start(args, PRESETS, data.VOCABULARY)
        args.mix = data.stage_mixture(init, PRESETS[args.preset]["id_share"], args.mix, args.ops, args.id_share).spec
        args.vocabulary = data.VOCABULARY
        fill_from_preset(args, PRESETS[args.preset], model.config)
        take_world(args, init["recipe"], data.World())
        world = data.World(args.distractors, args.max_parents, args.max_value)
        check_run_files(args, inputs=[args.init])
        if args.budget is not None:
            tokens = data.mean_tokens(data.parse_mixture(args.mix), SEED + args.seed, world)
            args.steps = max(1, round(args.budget * (1 - args.rl_share) / (tokens * args.batch)))
    return p, args, init, model


# ----------------------------------------------------------------------------------------------------------------------
# the schedule and the run


def learning_rate(step, args):
    """A linear warm-up, then half a cosine down to min_lr."""
    warmup = max(1, round(args.warmup * args.steps))
    progress = max(0, step - warmup) / max(1, args.steps - warmup)
    cosine = args.min_lr + (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    return args.lr * (step + 1) / warmup if step < warmup else cosine


def main():
    parser, args, init, model = arguments()
    device, precision = set_up(args)
    mixture = data.parse_mixture(args.mix)
    id_ops, id_ranges = init["id_ops"], init.get("id_ranges")  # "in distribution" is what pre-training saw

    model.to(device).train()
    optimizers = make_optimizers(model, args.lr, args.weight_decay, args.momentum if args.optimizer == "muon" else None,
                                 getattr(torch, args.dtype))

    # step s trains on problems s * batch ... (s + 1) * batch - 1 of the stream
    world = data.World(args.distractors, args.max_parents, args.max_value)

    def stream(split, batch, **more):
        return data.TrainingSteps(mixture, batch, SEED + args.seed, split, args.loss, world, args.micro_tokens,
                                  packed=args.compile, at_a_time=n_at_a_time(device), **more)

    steps = stream("train", args.batch, rank=rank(), n_ranks=n_ranks(), wrong_steps=args.wrong_steps)
    held_out = next(step_batches(stream("eval", 256), 0, 1, 0, device))

    # with --resume, open_run loads the state and the parts from --out
    state = dict(step=0, tokens=0, seconds=0.0, val_loss=None)
    recipe = open_run(parser, args, STAGE, state, model=model, optimizers=optimizers)
    start, tokens, val_loss = state["step"], torch.tensor(state["tokens"], device=device), state["val_loss"]

    def save(step):
        if rank() == 0:
            save_checkpoint(args.out, dict(
                stage=STAGE, config=asdict(model.config), id_ops=id_ops, id_ranges=id_ranges, recipe=recipe, run=f"{state['run']}-{step}",
                step=step, problems=step * args.batch, tokens=int(tokens), seconds=time.perf_counter() - began,
                val_loss=val_loss, model=model.state_dict(), optimizers=[o.state_dict() for o in optimizers],
                rng=torch.get_rng_state()))

    say(f"{STAGE}, preset {args.preset}: {model.n_params() / 1e6:.2f}M parameters, {model.config.n_layers} layers of width "
        f"{model.config.width}; mixture {args.mix}, {world}; {args.steps} steps of {args.batch} problems; {args.optimizer}, "
        f"learning rate {args.lr:g}; {how_it_runs(args)}")
    if args.compile:
        compile_layers(model)
        for size in data.pack_sizes(args.micro_tokens):  # one program for each size, before the clock starts
            accumulate(model, [data.pack([], size)], torch.ones(2), device, precision)
    if start < args.steps:
        probes = [next(step_batches(steps, start, start + 1, 0, device))]
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
            save_now = done % args.save_every == 0 or last or stop
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
            if save_now:
                save(done)
            exit_if_interrupted(stop and not last, f"saved {args.out} at step {done}; continue with --resume")
    say(f"{args.out}: step {args.steps}, {args.steps * args.batch} problems, {(time.perf_counter() - began) / 60:.1f} minutes")
    exit_if_interrupted(interrupted, "in the last step, so nothing is left to do")
    show(model, mixture, world, args, precision)


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
