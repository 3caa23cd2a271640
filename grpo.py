"""
Stage 3, reinforcement learning: GRPO (arXiv 2402.03300) from a checkpoint, with rewards that check the reasoning.

    python grpo.py                                      from out/midtrain.pt, on OOD-edge (op 11-14 after 2-10) and, with
                                                        the preset tiny, 20 % from the range of pre-training
    python grpo.py --init out/pretrain.pt --ops edge    without mid-training, on ops that are hard but not impossible for it;
                                                        python evaluate.py out/pretrain.pt finds them first
    python grpo.py --reward outcome                     the answer alone earns the reward (others: below)
    python grpo.py --budget 5e6 --rl-share 0.2          20 % of a budget in training tokens; midtrain.py takes the rest
    python grpo.py --curriculum                         prefer ops that have groups with a gradient
    python grpo.py --resume                             continue where it stopped
    torchrun --nproc_per_node=8 grpo.py ...             on several GPUs (a CPU's cores all work anyway)

op, the difficulty of a problem, is the number of Define steps of its solution plus that of the operators between letters.

A step: sample a group of G solutions o_1 ... o_G for each of P prompts q, verify them, and update the model a few times,
each time on a part of the prompts, towards larger

    J = 1/N sum_q sum_i sum_t  ( min(ratio A_i, clip(ratio, 1 - eps, 1 + eps) A_i)  -  beta KL )

    ratio = pi(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)        pi_old: the model that sampled, at the sampling temperature
    A_i   = (r_i - mean(r)) / (std(r) + 1e-6)                    over the group (std with G - 1); --advantage mean does not divide
    KL    = pi_ref / pi - log(pi_ref / pi) - 1                   k3: never negative, unbiased if pi sampled; pi_ref: of --init
    N     = tokens of all solutions of the update, end-of-text included, over all micro-batches and ranks

The reward r_i, 0 to 1, is what --reward says: outcome, whether the answer is right; process, the share of right steps; mixed,
alpha * outcome + (1 - alpha) * process; verified, whether the answer and all needed steps are right; strict, whether the whole
solution is. --reward-noise FP,FN takes a share FP of wrong reasonings for right and a share FN of right ones for wrong; it never
touches the judgement of the answer. A group has a gradient if its rewards differ. --curriculum draws an op in proportion to the
share of its groups that had one lately; without --ops, from all ops up to OOD-hard.

Every token of an update weighs the same, as in DAPO (arXiv 2503.14476); the GRPO paper averages over each solution first.
Writes a checkpoint to --out and metrics, one JSON row a step, beside it (out/grpo.jsonl). Ctrl-C saves.
"""
import argparse
import copy
import math
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from model import (add_gradients, add_start_options, any_rank, at_least, become_worker, check_run_files, choose_device,
                   compile_layers, exit_if_interrupted, fill_from_preset, gather, give_up, how_it_runs, make_optimizers,
                   mean_loss, n_at_a_time, n_ranks, noted_interrupts, one_line_errors, open_run, presets_of, progress_bar,
                   rank, read_edge, read_start, run_script, sample, save_checkpoint, say, set_up, stage_parser,
                   step_batches, sum_gradients_over_ranks, sum_over_ranks, take_world, to_device, write_metrics)
from verify import REWARDS, interval, reward, verify
import data
import numpy as np
import torch  # after model.py, which sets how its threads wait

# ----------------------------------------------------------------------------------------------------------------------
# the formula


def group_advantages(rewards, scale="std"):
    """Rewards (P, G) -> advantages (P, G): how much better each solution is than the mean of its group.

    scale "std" divides by the group's standard deviation (GRPO, arXiv 2402.03300); "mean" does not (Dr. GRPO, arXiv 2503.20783).
    Equal rewards give exactly 0.
    """
    differ = rewards.amax(dim=1, keepdim=True) > rewards.amin(dim=1, keepdim=True)  # or the rounding of a mean is an advantage
    centered = (rewards - rewards.mean(dim=1, keepdim=True)) * differ
    return centered if scale == "mean" else centered / (rewards.std(dim=1, keepdim=True) + 1e-6)


def grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, n_tokens, clip_ratio=0.2, kl_coef=1e-3):
    """-J of the formula above, for the tokens of one micro-batch.

    logprobs, old_logprobs, ref_logprobs, advantages: (M,), a value a token; a token has the advantage of its solution.
    ref_logprobs may be None if kl_coef is 0. n_tokens: N. clip_ratio: eps. kl_coef: beta. In the mean over samples of pi, k3 is
    KL(pi, pi_ref), but its gradient is that of KL(pi_ref, pi).
    Returns the loss and, for the log, a dict of sums over the tokens: kl, approx_kl (k3 of pi_old against pi), clipped.
    """
    logratio = logprobs - old_logprobs
    ratio = logratio.clamp(max=20).exp()  # one token must not make an infinite loss, here and below
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages)
    kl = torch.zeros_like(logprobs)
    if kl_coef:
        ref_logratio = ref_logprobs - logprobs
        kl = ref_logratio.clamp(max=10).exp() - ref_logratio - 1
    loss = -(surrogate - kl_coef * kl).sum() / n_tokens
    with torch.no_grad():  # a token is clipped where the minimum takes the constant, so that its gradient is 0
        clipped = (ratio > 1 + clip_ratio) & (advantages > 0) | (ratio < 1 - clip_ratio) & (advantages < 0)
        sums = dict(kl=kl.sum(), approx_kl=(ratio - logratio - 1).sum(), clipped=clipped.sum())
    return loss, sums


# ----------------------------------------------------------------------------------------------------------------------
# the parts of a step, in their order

SEED = 2_000_000   # added to --seed, so that the problems are not those of the stages before over again
RL_COST = 5 / 3    # training tokens that a token of RL costs, as in the paper. Operations per parameter: rollout 2, reference 2,
                   # update 6, together 10; a training token costs 6. A budget counts 10/6 always. `spent_tokens` of the log counts
                   # what is done: no reference with --kl 0, and then no update of a solution without an advantage either
FLOOR = 0.1        # --curriculum: the smallest factor of an op, so that every op is still drawn sometimes
MEMORY = 0.9       # --curriculum: decay per step of the moving average `learnable`


class Rollout(NamedTuple):
    """A sampled solution, as an update needs it. The first two fields make it a row of data.micro_batches."""
    ids: list                    # prompt and solution
    n_prompt: int                # tokens of the prompt
    old_logprobs: torch.Tensor   # (tokens of the solution,), under the model that sampled it
    advantage: torch.Tensor      # ()


def solution_limit(mixture, id_ops, world):
    """Tokens after which a solution is cut off, as in evaluate.py: half as many again as the longest right one has, and 16.

    That is the longest of 200 problems with the largest op, in the mixture or held out. Smaller ops have shorter solutions.
    """
    ops = [op for (_, op), weight in zip(mixture.cells, mixture.weights) if weight > 0]
    hardest = data.parse_mixture(str(max(*ops, data.op_groups(id_ops)["OOD-edge"][1])))
    rows = [data.encode_row(data.tokenizer(), data.make_row(i, hardest, SEED, "train", world)) for i in range(200)]
    return max(len(ids) - n_prompt for ids, n_prompt in rows) * 3 // 2 + 16


def held_out_mixtures(mixture, init):
    """{"ID": mixture, "OOD-edge": mixture} of what to evaluate on, in the contexts of `mixture` that pre-training saw."""
    ranges = data.seen_ops(init)
    ranges = {context: ranges[context] for context in data.op_ranges(mixture) if context in ranges} or ranges
    return {name: data.parse_mixture(data.in_group(ranges, name))
            for name, (low, high) in data.op_groups(init["id_ops"]).items() if name != "OOD-hard" and low <= high}


def draw_problems(first, count, mixture, split, seed, world):
    """This rank's part of problems first ... first + count - 1."""
    return [data.make_row(i, mixture, SEED + seed, split, world) for i in range(first + rank(), first + count, n_ranks())]


def judge(rows, solutions, map_fn):
    """Verdicts of `verify` on the sampled solutions, lists of ids, as many for each row. map_fn: map, or that of a pool."""
    enc, n = data.tokenizer(), len(solutions) // max(1, len(rows))  # a rank may have no row
    golds = [rows[j // n]["solution"] for j in range(len(solutions))]
    return list(map_fn(verify, golds, [data.decode(enc, ids) for ids in solutions]))


def misjudged(verdict, false_positive, false_negative, chance, kind):
    """The verdict as a noisy judge of the reasoning gives it. The reasoning is right if all needed steps are or, for the reward
    `strict`, if the whole solution is. chance, in 0..1, decides whether this one is misjudged. The answer is judged as it is."""
    right = verdict["strict"] if kind == "strict" else verdict["process"] == 1
    if chance >= (false_negative if right else false_positive):
        return verdict
    return verdict | dict(process=float(not right), verified=verdict["outcome"] and not right,
                          strict=verdict["outcome"] and not right)


def give_rewards(verdicts, step, args):
    """The rewards of the verdicts, (P G,), with --reward-noise."""
    chances = np.random.default_rng((args.seed, step, rank())).random(len(verdicts))
    return torch.tensor([reward(misjudged(v, *args.reward_noise, chance, args.reward), args.reward, args.alpha)
                         for v, chance in zip(verdicts, chances)])


def update(model, reference, optimizer, rollouts, args, device, precision, sums, fresh):
    """One optimizer step on all rollouts of some prompts. Returns the norm of the gradient.

    Adds to `sums`: sums over the tokens that it trains on, and the mean loss of the updates. fresh: it is the first update of a
    step, where pi is pi_old. So approx_kl and clipped would be rounding, and are left out. `mismatch` measures this rounding:
    the mean difference of log-probabilities between the sampling engine and `forward`.
    """
    n_tokens = sum_over_ranks(torch.tensor(float(sum(len(r.old_logprobs) for r in rollouts)), device=device))
    if not args.kl:  # without KL, advantage 0 is gradient 0, so skip these; they still count in N
        rollouts = [r for r in rollouts if r.advantage != 0]

    def loss_of(micro_batch):
        batch, (x, y, *sequences) = micro_batch
        where = np.flatnonzero(y != data.IGNORE)  # the tokens of the solutions, row by row
        lengths = torch.tensor([len(r.old_logprobs) for r in batch])
        x, where, targets, old_logprobs, advantages, *sequences = to_device((
            x, where, y.flatten()[where], torch.cat([r.old_logprobs for r in batch]),
            torch.stack([r.advantage for r in batch]).repeat_interleave(lengths), *sequences), device)
        logprobs, entropy = model.logprobs(x, where, targets, args.temperature, *sequences)
        with torch.no_grad():
            ref_logprobs = reference.logprobs(x, where, targets, args.temperature, *sequences)[0] if args.kl else None
        loss, token_sums = grpo_loss(logprobs, old_logprobs, ref_logprobs, advantages, n_tokens, args.clip_ratio, args.kl)
        token_sums |= dict(loss=loss.detach() / args.updates, entropy=entropy.sum(), tokens=len(where))
        if fresh:
            mismatch = (logprobs.detach() - old_logprobs).abs().sum()
            token_sums |= dict(approx_kl=0, clipped=0, mismatch=mismatch, fresh_tokens=len(where))
        return loss, token_sums

    micro_batches = data.micro_batches(rollouts, args.micro_tokens, "solution", args.compile, n_at_a_time(device))
    for token_sums in add_gradients(model, loss_of, micro_batches, device, precision):
        for name, value in token_sums.items():
            sums[name] += value
    sum_gradients_over_ranks(model)
    grad_norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip))
    if 0 < grad_norm < math.inf:  # without a gradient Adam would still go on in its old direction
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def all_updates(model, reference, optimizer, rollouts, args, device, precision):
    """The updates of a step, each on its own part of the prompts, so that every solution is used once. Returns sums and norms."""
    sums = {name: torch.zeros((), device=device) for name in
            ("loss", "kl", "approx_kl", "clipped", "entropy", "tokens", "mismatch", "fresh_tokens")}
    bounds = [len(rollouts) // args.rollouts * u // args.updates * args.rollouts for u in range(args.updates + 1)]
    return sums, [update(model, reference, optimizer, rollouts[bounds[u]:bounds[u + 1]], args, device, precision, sums, u == 0)
                  for u in range(args.updates)]


# ----------------------------------------------------------------------------------------------------------------------
# the run


def main():
    parser, args, init, model = arguments()
    device, precision = set_up(args)
    mixture, id_ops = data.parse_mixture(args.mix), init["id_ops"]
    ops = sorted({op for (_, op), weight in zip(mixture.cells, mixture.weights) if weight > 0})
    world = data.World(args.distractors, args.max_parents, args.max_value)
    allowance = args.budget and args.budget * args.rl_share / RL_COST  # tokens of RL

    model.to(device).train()
    reference = copy.deepcopy(model).requires_grad_(False) if args.kl else None
    optimizer, = make_optimizers(model, args.lr, args.weight_decay, betas=args.betas)
    state = dict(step=0, tokens=0, spent=0.0, seconds=0.0, held_out=None, learnable=[1.0] * len(ops))
    # with --resume, `model` has the trained weights already; open_run loads the counters of `state`, the optimizer and the
    # reference, which has the weights of --init
    recipe = open_run(parser, args, "grpo", state, model=model, optimizer=optimizer, **{"reference": reference} if args.kl else {})
    first_step, began = state["step"], time.perf_counter() - state["seconds"]  # as if it had never stopped
    learnable = dict(zip(ops, state["learnable"]))  # op -> moving average of the share of its groups with a gradient

    enc, buffers = data.tokenizer(), {}  # buffers: where sampling keeps its memory and CUDA graphs from step to step
    end_of_text, generator = enc.encode_single_token(data.END), torch.Generator(device)
    mixtures = held_out_mixtures(mixture, init)
    eval_rows = {name: draw_problems(0, args.eval_problems, mixtures[name], "eval", args.seed, world) for name in mixtures}
    held_out_batch = next(step_batches(data.TrainingSteps(  # to notice a broken model
        mixtures["ID"], 16, SEED + args.seed, "eval", "solution", world, args.micro_tokens, rank(), n_ranks(), args.compile),
        0, 1, 0, device))

    def sample_solutions(rows, n, temperature, seed):
        """n solutions for each problem: the prompts, and the ids and log-probabilities of the solutions. The generator is seeded
        at every call, so a resumed run samples the same."""
        prompts = [data.encode(enc, data.prompt_text(row)) for row in rows]
        with precision:
            return prompts, *sample(model, prompts, end_of_text, n, args.max_new, temperature, generator.manual_seed(seed),
                                    args.rows, buffers=buffers)

    def held_out():
        """Verified pass@1 on held-out problems at evaluate.py's temperature, 4 samples each, as `estimates` gives it."""
        verdicts = {name: judge(rows, sample_solutions(rows, 4, 0.7, rank())[1], map_fn) for name, rows in eval_rows.items()}
        return estimates(verdicts, 4)

    def progress():
        """From 0 to 1: the share of the steps, or of the tokens of the budget, that is done."""
        return state["step"] / args.steps if args.budget is None else state["tokens"] / allowance

    def save():
        state["learnable"] = [learnable[op] for op in ops]
        if rank() == 0:
            save_checkpoint(args.out, dict(
                stage="grpo", config=asdict(model.config), id_ops=id_ops, id_ranges=init.get("id_ranges"), recipe=recipe,
                problems=state["step"] * args.prompts, model=model.state_dict(), optimizer=optimizer.state_dict(),
                reference=reference and reference.state_dict(), rng=torch.get_rng_state(),
                **state | dict(run=f"{state['run']}-{state['step']}")))

    say(f"grpo from {args.init}, preset {args.preset}: {model.n_params() / 1e6:.2f}M parameters; mixture {args.mix}"
        f"{', curriculum' * args.curriculum}, {world}; {allowance or args.steps:.6g} {'tokens' if allowance else 'steps'}, a step "
        f"{args.prompts} prompts x {args.rollouts} rollouts, {args.updates} updates; reward {args.reward}, learning rate "
        f"{args.lr:g}; {how_it_runs(args)}")
    if args.compile:  # for the updates; sampling has its own steps
        compile_layers(*filter(None, (model, reference)))
    pool = ProcessPoolExecutor(args.workers, get_context("spawn"), become_worker) if args.workers else nullcontext()
    map_fn = partial(pool.map, chunksize=64) if args.workers else map

    # pool is closed here and not by the end of the interpreter, which may tear it down twice at once (a race in CPython 3.11)
    with noted_interrupts() as interrupted, progress_bar(progress()) as show_progress, pool:
        if state["held_out"] is None:
            state["held_out"] = held_out()
            say("held out before RL, verified:", as_text(state["held_out"]))
        while progress() < 1:
            step, t_start, progress_before = state["step"], time.perf_counter(), progress()

            # rollouts: a group of solutions for each prompt. All randomness is seeded by (seed, step, rank)
            factors = {op: max(FLOOR, share) for op, share in learnable.items()}
            current = data.reweighted(mixture, factors) if args.curriculum else mixture
            rows = draw_problems(step * args.prompts, args.prompts, current, "train", args.seed, world)
            seed = ((SEED + args.seed) * 1_000_003 + step) * n_ranks() + rank()
            prompts, solutions, old_logprobs = sample_solutions(rows, args.rollouts, args.temperature, seed)
            t_sampled = time.perf_counter()

            # rewards r_i and advantages A_i
            verdicts = judge(rows, solutions, map_fn)
            rewards = give_rewards(verdicts, step, args)
            advantages = group_advantages(rewards.view(-1, args.rollouts), args.advantage).flatten()
            prompts = [prompt for prompt in prompts for _ in range(args.rollouts)]
            rollouts = [Rollout(p + ids, len(p), old, A) for p, ids, old, A in zip(prompts, solutions, old_logprobs, advantages)]
            t_judged = time.perf_counter()

            # updates
            lr = (args.lr + (args.min_lr - args.lr) * progress_before) * min(1, (step + 1) / max(1, args.warmup))
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums, grad_norms = all_updates(model, reference, optimizer, rollouts, args, device, precision)
            t_updated = time.perf_counter()

            # what there was to learn from, op by op
            records = describe(rows, rollouts, verdicts, rewards, args)
            groups = count_groups(records, args.rollouts)
            for op, group in groups.items():
                learnable[op] = MEMORY * learnable[op] + (1 - MEMORY) * group["gradient"]
            state["step"], state["tokens"] = step + 1, state["tokens"] + sum(r["tokens"] for r in records)
            state["spent"] += sum(r["tokens"] * (2 + r["updated"] * (8 if args.kl else 6)) / 6 for r in records)

            # look, log, save
            done, end, stop = step + 1, progress() >= 1, any_rank(interrupted, device)
            report, save_now = done % args.eval_every == 0 or end, done % args.save_every == 0 or end or stop
            limit = 2 * math.log(model.config.vocab_size)  # twice the loss of guessing; nan is not below it
            held_out_loss = mean_loss(model, *held_out_batch, device, precision) if report or save_now else 0.0
            if not all(map(math.isfinite, grad_norms)) or any_rank(not held_out_loss < limit, device):
                give_up(args, done, "the gradient is not finite, or held-out solutions are far less likely than by guessing")
            if report:
                state["held_out"] = held_out()
            state["seconds"] = time.perf_counter() - began
            if done % args.log_every == 0 or end:
                row = dict(step=done, problems=done * args.prompts, lr=lr, **means(records, sums, grad_norms),
                           groups=groups, held_out=state["held_out"], tokens=state["tokens"],
                           training_tokens=round(state["tokens"] * RL_COST), spent_tokens=round(state["spent"]),
                           rollout_s=round(t_sampled - t_start, 3), verify_s=round(t_judged - t_sampled, 3),
                           update_s=round(t_updated - t_judged, 3), seconds=round(state["seconds"], 2))
                row["tokens_per_s"] = round(row["length"] * len(records) / (t_sampled - t_start))
                write_metrics(args.metrics, row)
                show_progress(progress(), f"step {done}, reward {row['reward']:.3f}, verified {row['verified']:.3f}, held out "
                           f"{as_text(state['held_out'])}, {row['tokens_per_s']} tokens/s")
            if save_now:
                save()
            # the first step may compile and start workers
            if done == first_step + (2 if args.compile or args.workers else 1) and not end:
                took = (time.perf_counter() - t_start) / (progress() - progress_before) * (1 - progress())
                say(f"expected time: about {took / 60:.1f} minutes")
            exit_if_interrupted(stop and not end, f"saved {args.out} at step {done}; continue with --resume")
    say(f"{args.out}: {state['step']} steps, {state['step'] * args.prompts} prompts, {state['tokens']} tokens of RL (worth "
        f"{state['tokens'] * RL_COST:.3g} training tokens), {state['seconds'] / 60:.1f} minutes; held out, verified: "
        f"{as_text(state['held_out'])}")
    exit_if_interrupted(interrupted, "in the last step, so nothing is left to do")


# ----------------------------------------------------------------------------------------------------------------------
# what is logged


def describe(rows, rollouts, verdicts, rewards, args):
    """A record for each rollout of all ranks, group by group: for the log, the curriculum and the count of tokens."""
    end_of_text = data.tokenizer().encode_single_token(data.END)
    return gather([dict(
        op=rows[j // args.rollouts]["op"], reward=float(rewards[j]),
        right=reward(v, args.reward, args.alpha) > 1 - 1e-6,  # whatever the noise says
        outcome=v["outcome"], process=v["process"], verified=v["verified"], strict=v["strict"],
        tokens=len(r.ids), length=len(r.ids) - r.n_prompt, truncated=r.ids[-1] != end_of_text,
        updated=bool(args.kl or r.advantage != 0))
        for j, (r, v) in enumerate(zip(rollouts, verdicts))])


def count_groups(records, n):
    """For each op the number of its groups, shares of them and their mean reward, from records in groups of n. all_wrong: no
    solution deserves reward 1. all_right: all do. mixed: some do. gradient: the rewards, with the noise, differ."""
    counts = {}
    for group in (records[j:j + n] for j in range(0, len(records), n)):
        rewards, right = [r["reward"] for r in group], [r["right"] for r in group]
        c = counts.setdefault(group[0]["op"], dict(groups=0, all_wrong=0, mixed=0, all_right=0, gradient=0, reward=0.0))
        c["groups"] += 1
        c["all_wrong" if not any(right) else "all_right" if all(right) else "mixed"] += 1
        c["gradient"] += max(rewards) > min(rewards)
        c["reward"] += sum(rewards) / n
    return {op: {k: v / c["groups"] if k != "groups" else v for k, v in c.items()} for op, c in sorted(counts.items())}


def means(records, sums, grad_norms):
    """Means over the rollouts of a step and over the tokens that its updates trained on (with --kl 0, those with a gradient).
    approx_kl and clip_frac: over those of the updates after the first; None if there are none."""
    def mean(name):
        return sum(r[name] for r in records) / len(records)

    sums = dict(zip(sums, sum_over_ranks(torch.stack(list(sums.values()))).tolist()))
    n, n_fresh, n_later = sums["tokens"] or 1.0, sums["fresh_tokens"] or 1.0, sums["tokens"] - sums["fresh_tokens"]
    return {name: mean(name) for name in ("reward", "outcome", "process", "verified", "strict", "length", "truncated")} | dict(
        hacked=sum(r["outcome"] and not r["verified"] for r in records) / len(records), loss=sums["loss"], kl=sums["kl"] / n,
        approx_kl=sums["approx_kl"] / n_later if n_later else None, clip_frac=sums["clipped"] / n_later if n_later else None,
        entropy=sums["entropy"] / n, mismatch=sums["mismatch"] / n_fresh, grad_norm=sum(grad_norms) / len(grad_norms))


def estimates(verdicts, n):
    """{group: n verdicts for each problem of this rank} -> verified pass@1, {"ID": mean, "ID interval": [low, high], ...}."""
    found = {}
    for name, of_group in verdicts.items():
        values = np.reshape(gather([v["verified"] for v in of_group]), (-1, n)).mean(1)
        found |= {name: float(values.mean()), f"{name} interval": interval(values).tolist()}
    return found


def as_text(held_out):
    return ", ".join("{} {:.3f} [{:.3f} {:.3f}]".format(name, held_out[name], *held_out[f"{name} interval"])
                     for name in held_out if f"{name} interval" in held_out) + " (over problems)"


# ----------------------------------------------------------------------------------------------------------------------
# settings: a preset is what suits a size of model. Each but the betas can be changed on the command line

SETTINGS = dict(  # name=(tiny, 100m). tiny: ten minutes on two CPU cores; 100m: arXiv 2512.07783
    id_share=(0.2, 0.0),      # tiny: without problems from the range of pre-training a small model soon forgets it
    steps=(250, 200),
    prompts=(64, 1024),
    rollouts=(8, 6),
    updates=(2, 4),
    lr=(3e-4, 1e-6),
    min_lr=(0.0, 1e-6),
    warmup=(5, 0),
    weight_decay=(0.0, 0.01),
    betas=((0.9, 0.95), (0.9, 0.999)),  # of AdamW
    kl=(0.0, 1e-3),           # without KL no reference is needed, and groups without a gradient cost nothing
    rows=(512, 3072),
    micro_tokens=(2048, 32_768),
    workers=(0, 8),
    eval_every=(25, 20),
    eval_problems=(64, 256),
    save_every=(25, 20))
PRESETS = presets_of(SETTINGS)  # also 10m, 400m, 1b


def noise(text):
    """An argparse type: 0.1,0.2 -> [0.1, 0.2]."""
    shares = [at_least(0.0, up_to=1)(share) for share in text.split(",")]
    if len(shares) != 2:
        raise argparse.ArgumentTypeError(f"must be two shares, FP,FN, got {text}")
    return shares


def arguments():
    p = stage_parser(__doc__, PRESETS, out="out/grpo.pt", log_every=1)
    add_start_options(p, init="out/midtrain.pt", rl_share=at_least(1e-6, up_to=1))
    g = p.add_argument_group("which problems")
    g.add_argument("--eval-json", default="out/eval.json", help="what evaluate.py wrote, for --ops edge (default out/eval.json)")
    g.add_argument("--curriculum", action="store_true", help="prefer ops with gradients, see above")
    g = p.add_argument_group("reward and loss")
    g.add_argument("--reward", choices=REWARDS, default="strict", help="see above (default strict)")
    g.add_argument("--alpha", type=at_least(0.0, up_to=1), default=0.2, help="share of outcome in --reward mixed (default 0.2)")
    g.add_argument("--reward-noise", type=noise, default=[0.0, 0.0], metavar="FP,FN", help="shares of wrong judgements, see above")
    g.add_argument("--advantage", choices=["std", "mean"], default="std", help="see above (default std)")
    g.add_argument("--clip-ratio", type=at_least(1e-6), default=0.2, help="eps of the formula (default 0.2)")
    g.add_argument("--kl", type=at_least(0.0), help="beta, weight of the KL to --init; 0 needs no reference model")
    g.add_argument("--temperature", type=at_least(1e-6), default=1.0, help="of sampling and of the loss (default 1)")
    g = p.add_argument_group("compute (defaults from the preset)")
    g.add_argument("--prompts", type=at_least(1), help="P, prompts a step, over all ranks")
    g.add_argument("--rollouts", type=at_least(2), help="G, solutions a prompt: each is judged against the others of its group")
    g.add_argument("--updates", type=at_least(1), help="optimizer steps per rollout batch, each on its own part of the prompts")
    g.add_argument("--warmup", type=at_least(0), help="steps over which the learning rate rises")
    g.add_argument("--max-new", type=at_least(1), help="tokens after which a solution is cut off (default: from the problems)")
    g.add_argument("--rows", type=at_least(1), help="solutions that are sampled at a time")
    g.add_argument("--eval-problems", type=at_least(1), help="held-out problems, for ID and for OOD-edge each")
    args = p.parse_args()
    with one_line_errors(p):
        choose_device(args)
        init, model = read_start(args, PRESETS, data.VOCABULARY)
        args.vocabulary = data.VOCABULARY
        if args.ops == "edge":  # a resumed run keeps it, whatever was evaluated since
            resumed = init.get("run", args.init) != args.init_run
            args.ops = args.edge = init["recipe"].get("edge") if resumed else read_edge(args.eval_json, args.init, args.init_run)
        if args.reward == "outcome" and any(args.reward_noise):
            raise ValueError("--reward-noise misjudges the reasoning, which --reward outcome does not look at")
        if args.curriculum and args.id_share is not None:
            raise ValueError("--curriculum decides by itself how often each op comes: it takes no --id-share")
        if args.curriculum and args.mix is None:
            ops = args.ops or "{}-{}".format(init["id_ops"][0], data.op_groups(init["id_ops"])["OOD-hard"][1])
            args.mix, args.ops = data.in_contexts(dict.fromkeys(data.seen_ops(init), ops)), None
        args.mix = data.stage_mixture(init, PRESETS[args.preset]["id_share"], args.mix, args.ops, args.id_share).spec
        fill_from_preset(args, PRESETS[args.preset], model.config)
        take_world(args, init["recipe"], data.World())
        world = data.World(args.distractors, args.max_parents, args.max_value)  # refuses what is not possible
        args.max_new = args.max_new or solution_limit(data.parse_mixture(args.mix), init["id_ops"], world)
        if args.prompts % n_ranks() or args.updates > args.prompts // n_ranks():
            raise ValueError("--prompts must be a multiple of the number of ranks, and not too few for --updates on each rank")
        check_run_files(args, inputs=[args.init])
    return p, args, init, model


if __name__ == "__main__":
    run_script(main)
