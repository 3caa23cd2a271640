"""
Evaluation: pass@k over held-out problems, for the right answer and for the right reasoning, checkpoints side by side.

    python evaluate.py                                   out/pretrain.pt, out/midtrain.pt, out/grpo.pt, those that exist
    python evaluate.py out/pretrain.pt --show 3          and sampled solutions beside the gold ones, right and wrong marked
    python evaluate.py A.pt B.pt --plot out/eval.png     compare, and draw (needs matplotlib)
    python evaluate.py --curves out/curves.png           how they were trained: losses, rewards, groups of RL
    python evaluate.py A.pt --data rows.jsonl            on rows of a file instead of fresh problems
    python evaluate.py FOLDER --id-ops 2-10              a Hugging Face folder of a Qwen2, with its own tokenizer
    torchrun --nproc_per_node=8 evaluate.py A.pt         on several GPUs

Three verdicts, each stricter than the one before (verify.py): outcome, the answer is right; verified, every step the
answer needs is there with the right inputs and value (the paper's metric); strict, the text really proves it.

Ops are grouped by the range m-M of pre-training (of the first checkpoint's) as in arXiv 2512.07783, where it is 2-10: ID m to
M, OOD-edge up to 1.4 M, rounded up (11-14), OOD-hard above (15-20). The edge of a checkpoint, for grpo.py --ops edge, are the
ops that are surely hard, and surely possible, for it: the interval of verified pass@1 ends below .5, that of pass@(largest k)
begins above .05. [low high] is a 95 % interval over problems: it says nothing of other seeds of training. "no reasoning" is
the outcome without any: the most frequent answer for every problem or, if that is better, the last number of the problem.

Signs are what the intervals allow to say about a checkpoint and the one that it was made from: sharpening only (pass@1 up, pass@k
not), ability added (pass@k up), reward hacking (more right answers by wrong reasoning), no seed (a context whose names are
hardly ever written), off the edge (hardly any group of RL had a gradient).

A folder that is not of ours ends its texts at its end tokens and at </answer>; what it writes after that is ignored.
"""
import argparse
import collections
import importlib.util
import itertools
import json
import math
import os
import re
from functools import partial
from typing import Callable, NamedTuple, Optional

from model import (add_world_options, at_least, check_outputs, check_trained, choose_device, gather, n_ranks, one_line_errors,
                   progress_bar, rank, read_hf, read_trained, run_script, sample, say, set_up, take_world)
from verify import FORWARD, explain, interval, parse, read_jsonl, verify, write_whole
import data
import numpy as np
import torch  # after model.py, which sets how its threads wait

VERDICTS = ("outcome", "verified", "strict")
ANOTHERS = "another's"  # in place of the stage of a folder that is not of ours
FIGURES = (".png", ".pdf", ".svg")
OF_RL = {*"groups held_out approx_kl kl entropy length truncated reward outcome process verified strict hacked".split()}
MARGIN = 0.05  # of pass@k and other shares: `signs` takes a rise that is surely smaller for none
CHAIN = ("out/pretrain.pt", "out/midtrain.pt", "out/grpo.pt")
COLORS = dict(pretrain="black", midtrain="tab:blue", grpo="tab:orange")  # of a stage, in every figure
MORE_COLORS = ("tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:red")

# ----------------------------------------------------------------------------------------------------------------------
# the numbers


def pass_at_k(n, c, k):
    """Unbiased estimate of the chance that at least one of k samples is right, from c right ones of n.

    1 - C(n - c, k) / C(n, k), of arXiv 2107.03374 (equation 1). n, c, k: integers or integer arrays, k <= n.
    """
    n, c = np.broadcast_arrays(n, c)
    miss = np.ones(n.shape)  # the chance that k draws without replacement are all wrong
    for i in range(k):
        miss = miss * np.clip(n - c - i, 0, None) / (n - i)
    return 1 - miss


def estimates(ks, values, parts=(), **bounds):
    """{"pass@1": mean, "pass@1 interval": [low, high], ...}; values: k -> a value for each problem. bounds: see `interval`.

    parts: [(weight, numbers of problems)], see `in_parts`. Then it is the weighted mean over them. The distances to the ends of
    their intervals, weighted, add up as squares, since the parts have no problem in common.
    """
    out = {}
    for k in ks:
        of_k = np.asarray(values(k), float)
        mean, (low, high) = of_k.mean(), interval(of_k, **bounds)
        if parts:
            ends = [(weight, of_k[part].mean(), *interval(of_k[part], **bounds)) for weight, part in parts]
            mean = sum(weight * m for weight, m, _, _ in ends)
            low = mean - math.sqrt(sum((weight * (m - below)) ** 2 for weight, m, below, _ in ends))
            high = mean + math.sqrt(sum((weight * (above - m)) ** 2 for weight, m, _, above in ends))
        out |= {f"pass@{k}": float(mean), f"pass@{k} interval": [float(low), float(high)]}
    return out


def group_of(op, id_ops):
    """ID, OOD-edge or OOD-hard, from the op and the range [m, M] that pre-training saw of the context of the problem.

    "below" are ops smaller than m, and "unseen" are all of a context that pre-training did not see, whose id_ops is None. So
    after zoo:2-4,school:2 school op 3 is OOD-edge while zoo op 3 is ID: no table calls ID what was not in the training data.
    How far a context gets that was seen at op 2 only is best read op by op, with --context school.
    """
    if id_ops is None:
        return "unseen"
    beyond = "below" if op < id_ops[0] else "OOD-hard"
    return next((name for name, (low, high) in data.op_groups(id_ops).items() if low <= op <= high), beyond)


def in_parts(records, args):
    """[(weight, numbers of the records)] for --weights: the ops of ID, m to M, in as many parts as there are weights, from easy to
    hard; as in arXiv 2512.07783, where op 2-4, 5-7, 8-10 have .2, .3, .5. Empty without weights, if these are not the records
    of ID, and for a context without some of the parts."""
    if not args.weights or not all(r["group"] == "ID" for r in records):
        return []
    ops = np.array_split(range(args.id_ops[0], args.id_ops[1] + 1), len(args.weights))
    parts = [(weight, [i for i, r in enumerate(records) if r["op"] in some]) for weight, some in zip(args.weights, ops)]
    return parts if all(part for _, part in parts) else []


# ----------------------------------------------------------------------------------------------------------------------
# sampling and verifying


class Reader(NamedTuple):
    """How a model reads and writes."""
    encode: Callable            # text -> tokens
    decode: Callable            # tokens -> text
    stops: list                 # tokens that end a sample
    ends: list                  # the token at the end of a gold solution, none if there is no such token
    vocab_size: int
    positions: Optional[int]    # the longest text that it was made for, in tokens; None: any
    foreign: bool = False       # what it writes behind </answer> is cut off


def evaluate(model, reader, problem_rows, args, device, precision, progress=None):
    """Sample n solutions for every problem and verify them.

    Returns a list of records, one for each problem of this rank: op, i (its number among those of its op), context, group,
    distractors (how many), answer, last_is_answer (whether the last number of the problem is the answer), right ({verdict: how
    many of n}), errors ({name of an error: in how many samples}), hacked (right answer, wrong process), truncated, named (in how
    many samples a needed quantity is defined at all), the row, the text of the first sample and, with --samples, all texts with
    their verdicts; with --loss, the mean loss of the gold solution, in nats a token.
    """
    buffers, records = {}, []
    generator = torch.Generator(device).manual_seed(args.seed + rank())
    for op, rows in problem_rows.items():
        rows = rows[rank()::n_ranks()]
        if not rows:
            continue
        prompts = [reader.encode(data.prompt_text(row)) for row in rows]
        solutions = [reader.encode(data.response_text(row).removesuffix(data.END)) + reader.ends for row in rows]
        max_new = max(map(len, solutions)) * 3 // 2 + 16
        if reader.positions:
            max_new = min(max_new, reader.positions - max(map(len, prompts)))
        with precision:
            tokens, _ = sample(model, prompts, reader.stops, args.n, max_new=max_new, temperature=args.temperature,
                               generator=generator, rows=args.rows, progress=progress, buffers=buffers)
            losses = losses_of(model, prompts, solutions, device) if args.loss else [None] * len(rows)
        for j, row in enumerate(rows):
            mine = tokens[j * args.n:(j + 1) * args.n]
            texts = [reader.decode(ids) for ids in mine]
            if reader.foreign:
                texts = ["".join(text.partition("</answer>")[:2]) for text in texts]
            verdicts, names = [verify(row["solution"], text) for text in texts], parse(row["solution"]).nodes
            errors = collections.Counter(name for v in verdicts for name in {e.split(":")[0] for e in v["errors"]})
            needed = row["solution"].count("Define ") - row["solution"].count("Define total ")
            context, answer = context_of(row), parse(row["solution"]).answer
            records.append(dict(
                op=op, i=rank() + j * n_ranks(), context=context, group=group_of(op, args.id_ranges.get(context)),
                distractors=row["problem"].count(" equals ") - needed, errors=errors, answer=answer,
                last_is_answer=re.findall("[0-9]+", row["problem"])[-1:] == [str(answer)],
                right={name: sum(verdict[name] for verdict in verdicts) for name in VERDICTS},
                hacked=sum(v["outcome"] and not v["verified"] for v in verdicts),
                named=sum(any(f"Define {name} as " in text for name in names) for text in texts),
                truncated=sum(not {*reader.stops} & {*ids} and not (reader.foreign and "</answer>" in text)
                              for ids, text in zip(mine, texts)), row=row, text=texts[0], loss=losses[j],
                samples=[*zip(texts, verdicts)] if args.samples else []))
    return records


def context_of(row):
    return data.TEMPLATE_TO_CONTEXT.get(row["template"], row["template"])


@torch.no_grad()
def losses_of(model, prompts, solutions, device):
    """The mean loss of each solution after its prompt, lists of tokens, in nats a token."""
    losses, batch = [], max(1, min(64, 2 ** 27 // (model.config.vocab_size * max(map(len, solutions)))))  # 0.5 GiB of logits
    for first in range(0, len(prompts), batch):
        pairs = [*zip(prompts[first:first + batch], solutions[first:first + batch])]
        T = max(len(prompt) + len(solution) for prompt, solution in pairs) - 1
        x = torch.tensor([[*prompt, *solution[:-1]] + [0] * (T + 1 - len(prompt) - len(solution)) for prompt, solution in pairs])
        where = [i * T + len(prompt) - 1 + t for i, (prompt, solution) in enumerate(pairs) for t in range(len(solution))]
        targets = [token for _, solution in pairs for token in solution]
        logprobs, _ = model.logprobs(x.to(device), torch.tensor(where, device=device), torch.tensor(targets, device=device))
        losses += [-float(part.mean()) for part in logprobs.split([len(solution) for _, solution in pairs])]
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# what the counts say: levels, changes, signs


def summarize(records, args):
    """Numbers of one checkpoint, as they go into the JSON file."""
    def numbers(chosen, parts=()):
        right = {v: [r["right"][v] for r in chosen] for v in VERDICTS}
        named = [r["named"] / args.n for r in chosen]
        errors, samples = sum((r["errors"] for r in chosen), collections.Counter()), len(chosen) * args.n
        (_, most_frequent), = collections.Counter(r["answer"] for r in chosen).most_common(1)
        loss = dict(loss=float(np.mean([r["loss"] for r in chosen]))) if args.loss else {}
        return {v: estimates(args.k, lambda k: pass_at_k(args.n, right[v], k), parts) for v in VERDICTS} | loss | dict(
            baseline=max(most_frequent, sum(r["last_is_answer"] for r in chosen)) / len(chosen),
            named=float(np.mean(named)), **{"named interval": interval(named).tolist()},
            hacked=sum(r["hacked"] for r in chosen) / max(1, sum(right["outcome"])),
            truncated=sum(r["truncated"] for r in chosen) / samples,
            errors={name: errors[name] / samples for name in sorted(errors)})

    def by(key, chosen=records):
        return {name: numbers([r for r in chosen if key(r) == name]) for name in sorted({key(r) for r in chosen})}

    def by_group(chosen):
        of = {name: [r for r in chosen if r["group"] == name] for name in sorted({r["group"] for r in chosen})}
        return {name: numbers(of_group, in_parts(of_group, args)) for name, of_group in of.items()}

    def few_or_many(r):
        return "0-1" if r["distractors"] < 2 else "2-4" if r["distractors"] < 5 else "5-12"

    summary = numbers(records) | dict(
        groups=by_group(records), ops={str(op): v for op, v in by(lambda r: r["op"]).items()},
        contexts={c: by_group([r for r in records if r["context"] == c]) for c in sorted({r["context"] for r in records})},
        distractors={g: by(few_or_many, [r for r in records if r["group"] == g]) for g in sorted({r["group"] for r in records})})
    first, last = f"pass@{args.k[0]} interval", f"pass@{args.k[-1]} interval"
    edge = [int(op) for op, v in summary["ops"].items() if v["verified"][first][1] < 0.5 and v["verified"][last][0] > 0.05]
    return summary | dict(edge=[min(edge), max(edge)] if edge else None)


def by_problem(records):
    """The counts behind the numbers, for who wants to group them anew: lists with an entry for each problem, the same problems for
    every checkpoint. Its op and context, and how many of its n samples are right by each verdict, hacked, cut off, named."""
    names = ("op", "context", "hacked", "truncated", "named", *["loss"] * (records[0]["loss"] is not None))
    return {name: [r[name] for r in records] for name in names} | {
        verdict: [r["right"][verdict] for r in records] for verdict in VERDICTS}


def differences(records, others, args):
    """How much better `records` are than `others` on the same problems, in verified pass@k: {group: estimates}; and how much
    larger the share of samples with the right answer by wrong reasoning is, "hacked".

    The interval is over the differences problem by problem, which is narrower than it would be without the pairing.
    """
    out = {}
    for name in sorted({r["group"] for r in records}):
        mine, theirs = ([r for r in rs if r["group"] == name] for rs in (records, others))
        right, theirs_right = ([r["right"]["verified"] for r in rs] for rs in (mine, theirs))
        hacked = np.subtract(*[[r["hacked"] / args.n for r in rs] for rs in (mine, theirs)])
        out[name] = estimates(args.k, lambda k: pass_at_k(args.n, right, k) - pass_at_k(args.n, theirs_right, k),
                              in_parts(mine, args), low=-1) | {
            "hacked": float(hacked.mean()), "hacked interval": interval(hacked, low=-1).tolist()}
    return out


def signs(result, ks, changes=None, metrics=()):
    """What the intervals allow to say about a checkpoint, sentences. Where they allow nothing, there is none.

    result: its numbers as in the JSON file. ks: of pass@k. changes: what `differences` found against the checkpoint that it was
    made from. metrics: the rows that grpo.py logged.

    sharpening only   pass@(smallest k) rises, and a rise of pass@(largest k) by MARGIN is ruled out
    ability added     pass@(largest k) rises
    reward hacking    after RL, samples with the right answer by wrong reasoning are more
    no seed           of the samples in a context, surely fewer than MARGIN define any quantity that is needed
    off the edge      fewer than a tenth of the groups of RL had a gradient
    """
    first, last, found = f"pass@{ks[0]}", f"pass@{ks[-1]}", []
    for group, change in (changes or {}).items():
        def rise(name):
            return "{:+.3f} [{:+.3f} {:+.3f}]".format(change[name], *change[f"{name} interval"])

        if first != last and change[f"{last} interval"][0] > 0:
            found.append(f"{group}: ability added, {last} {rise(last)}")
        elif first != last and change[f"{first} interval"][0] > 0 and change[f"{last} interval"][1] < MARGIN:
            found.append(f"{group}: sharpening only, {first} {rise(first)}, {last} {rise(last)}")
        if result["stage"] == "grpo" and change["hacked interval"][0] > 0:
            found.append(f"{group}: reward hacking, samples with the right answer by wrong reasoning {rise('hacked')}")
    for context, groups in result["contexts"].items():
        if all(numbers["named interval"][1] < MARGIN for numbers in groups.values()):
            share = max(numbers["named"] for numbers in groups.values())
            found.append(f"{context}: no seed, at most {share:.1%} of the samples define any quantity that is needed")
    groups = [of_op for row in metrics for of_op in row["groups"].values()]
    total = sum(of_op["groups"] for of_op in groups)
    if total:
        gradient, wrong, right = (sum(of_op[name] * of_op["groups"] for of_op in groups) / total
                                  for name in ("gradient", "all_wrong", "all_right"))
        if gradient < 0.1:
            found.append(f"RL was off the edge: {gradient:.1%} of its groups had a gradient, {wrong:.1%} were all wrong, "
                         f"{right:.1%} all right")
    return found


def made_from(checkpoint, loaded):
    """The path of that of the loaded checkpoints which this one was made from, or else of the first, unless this is the first
    or one of the two is ours and the other is not."""
    run, (first, its_checkpoint, *_) = checkpoint["recipe"].get("init_run"), loaded[0]
    found = [path for path, other, *_ in loaded if run and other.get("run") == run]
    strangers = (checkpoint.get("stage") == ANOTHERS) != (its_checkpoint.get("stage") == ANOTHERS)
    return found[0] if found else None if checkpoint is its_checkpoint or strangers else first


def another_init(checkpoint, loaded):
    """The path of that of the loaded checkpoints which lies where this one was made from, but is of another run; else None."""
    init, run = (checkpoint["recipe"].get(name) for name in ("init", "init_run"))
    return next((path for path, other, *_ in loaded if init and run and os.path.realpath(path) == os.path.realpath(init)
                 and other.get("run", init) != run), None)


# ----------------------------------------------------------------------------------------------------------------------
# what is printed


def table(results, args):
    """Text table, a line an op and a group. One checkpoint: verified at every k, strict and outcome at the least. Several: least
    and most k, and all but `verified` for groups only."""
    ks, some = [f"pass@{k}" for k in args.k], next(iter(results.values()))

    def short(x, sign=""):
        return re.sub(r"^([+-]?)0\.", r"\1.", f"{x:{sign}.3f}")

    def cell(numbers, k, sign=""):
        return "{} [{} {}]".format(*(short(x, sign) for x in (numbers[k], *numbers[f"{k} interval"])))

    def line(title, cells):
        return f"{title:<10}" + "".join(f" {c:>20}" for c in cells)

    if len(results) == 1:
        columns, loss = [("verified", k) for k in ks] + [("strict", ks[0]), ("outcome", ks[0])], ["loss"] * args.loss
        lines = [line("", [verdict for verdict, _ in columns] + ["no reasoning", *loss]), line("", [k for _, k in columns])]
        for section, title in (("ops", "op "), ("groups", "")):
            lines += ["", *(line(title + key, [cell(v[verdict], k) for verdict, k in columns] + [short(v["baseline"])]
                                 + [short(v[name]) for name in loss]) for key, v in some[section].items())]
        return "\n".join(lines)
    ks = list(dict.fromkeys((ks[0], ks[-1])))
    width = 21 * len(ks)
    lines = [" " * 10 + "".join(f"{name[2 - width:]:>{width}}" for name in results), line("", ks * len(results))]
    no_reasoning = ", ".join(f"{group} {short(v['baseline'])}" for group, v in some["groups"].items())
    for verdict, section, title in (("verified", "ops", "op "), ("verified", "groups", ""), ("strict", "groups", ""),
                                    ("outcome", "groups", "")):
        lines += ["", verdict + f" (no reasoning: {no_reasoning})" * (verdict == "outcome")]
        lines += [line(title + key, [cell(r[section][key][verdict], k) for r in results.values() for k in ks])
                  for key in some[section]]
    for section, title in (("ops", "op "), ("groups", "")) if args.loss else ():
        mixed = len({r["stage"] == ANOTHERS for r in results.values()}) > 1
        lines += ["", "loss of the gold solutions, nats a token" + " (their tokens differ: compare down a column only)" * mixed]
        lines += [line(title + key, [short(r[section][key]["loss"]) if k == ks[0] else "" for r in results.values() for k in ks])
                  for key in some[section]]
    for key, title in (("against_first", "the first"), ("against_previous", "the one before")):
        if any(key in r for r in results.values()):
            lines += ["", f"verified, change against {title}"]
            lines += [line(group, [cell(r[key][group], k, "+") if key in r else "" for r in results.values() for k in ks])
                      for group in some["groups"]]
    return "\n".join(lines)


def report(results, args):
    """Print what the table does not say: of each checkpoint the edge, the effect of distractors, what went wrong, and the signs."""
    first = f"pass@{args.k[0]}"
    for path, r in results.items():
        bins = sorted({b for by_number in r["distractors"].values() for b in by_number})
        if r["init_of_another_run"]:
            say(f"warning: {path} was made from another run of {r['init_of_another_run']} than the one shown here")
        say(f"{path}\n  edge (verified {first} surely below 0.5, pass@{args.k[-1]} surely above 0.05): "
            + (f"op {r['edge'][0]}-{r['edge'][1]}" if r["edge"] else "none")
            + f"\n  verified {first} with {', '.join(bins)} distractors: " + "; ".join(f"{group} " + " ".join(
                f"{by_number[b]['verified'][first]:.2f}" if b in by_number else "-" for b in bins)
                for group, by_number in r["distractors"].items()))
        for group, numbers in r["groups"].items():
            common = sorted(numbers["errors"].items(), key=lambda e: -e[1])[:4]
            say(f"  {group}: right answer by wrong reasoning, {numbers['hacked']:.1%} of the right answers; cut off, "
                f"{numbers['truncated']:.1%}; most frequent errors: "
                + (", ".join(f"{name} {part:.0%}" for name, part in common) or "none"))
        rl = [row for row in read_metrics(path) if "groups" in row]
        found = signs(r, args.k, r.get("against_init"), rl)
        if found:
            say(f"  signs, against {r['init_here']}:" if "init_here" in r else "  signs:")
        for sentence in found:
            say(f"    {sentence}")


def show(all_records, count):
    """Print sampled solutions of some problems, ops spread evenly: beside each step the gold one, and what is wrong.

    all_records: {checkpoint: records}, of the same problems."""
    problems = next(iter(all_records.values()))
    for j in np.linspace(0, len(problems) - 1, min(count, len(problems))).astype(int):
        row = problems[j]["row"]
        gold = {name: steps[0].text for name, steps in parse(row["solution"]).nodes.items()}
        say(f"\n--- {problems[j]['context']}, {data.show(row, solution=False)}")
        for path, records in all_records.items():
            lines = [(True, path, "gold", "", "")]
            for step, right, why in explain(row["solution"], records[j]["text"]):
                name, _, work = step.removeprefix("Define ").partition(" as ")
                if step.startswith("Answer: "):
                    name, work, its_gold = "answer", step.removeprefix("Answer: "), str(problems[j]["answer"])
                else:
                    work, its_gold = ((text.partition("; ")[2] or text).replace("so ", "").rstrip(". ")
                                      for text in (work, gold.get(name, "")))
                lines.append((right, work or "-", its_gold or "-", name, f"  <- {why.replace(f': {name}', '')}" if why else ""))
            width = [max(len(line[column]) for line in lines) for column in (1, 2)]
            for i, (right, work, its_gold, name, why) in enumerate(lines):
                mark = "     " if i == 0 else data.styled("right", "green") if right else data.styled("WRONG", "red")
                say(f"  {mark}  {work:{width[0]}}  {its_gold:{width[1]}}  {name}{why}".rstrip())
            say()


# ----------------------------------------------------------------------------------------------------------------------
# files and figures


def write_samples(path, all_records):
    """A line of JSON a sample. gen_solution_answer, op, id, __idx and template are what the scorer of arXiv 2512.07783 reads."""
    lines = [json.dumps(dict(checkpoint=checkpoint, op=r["op"], context=r["context"], group=r["group"], id=r["row"].get("id"),
                             __idx=r["i"], template=r["row"]["template"], sample_rank=j, problem=r["row"]["problem"],
                             question=r["row"]["question"], solution=r["row"]["solution"], gen_solution_answer=text, **verdict))
             for checkpoint, records in all_records.items() for r in records for j, (text, verdict) in enumerate(r["samples"])]
    write_whole(path, "\n".join(lines) + "\n")


def metrics_of(path):
    return path.removesuffix(".pt") + ".jsonl"


def read_metrics(path):
    """The rows that a stage logged beside this checkpoint; none if they cannot be read."""
    try:
        with open(metrics_of(path), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.endswith("\n")]  # the last one may be half written
        return rows if all("step" in row for row in rows) else []
    except (OSError, ValueError, TypeError):
        return []


def pyplot():
    import matplotlib
    matplotlib.use("Agg")  # no window
    import matplotlib.pyplot
    return matplotlib.pyplot


def plot(results, args):
    """Draw verified pass@(smallest k) and pass@(largest k) over op, and pass@k over k for each group: with "sharpening only" a
    curve over k turns, with "ability added" it moves up as a whole. Bands are intervals over problems (over op, those of the
    smallest k)."""
    plt, ks = pyplot(), [f"pass@{k}" for k in args.k]
    groups = [*next(iter(results.values()))["groups"]] if ks[1:] else []
    width, rows = max(1, len(groups)), ["op", *["loss"] * args.loss, *["k"] * bool(groups)]
    figure, axes = plt.subplot_mosaic([groups if row == "k" else [row] * width for row in rows], layout="constrained",
                                      figsize=(9, 1 + 3 * len(rows)), height_ratios=[4 if row == "op" else 3 for row in rows])
    free = iter(MORE_COLORS * len(results))
    colors = {}  # of a stage the first checkpoint has its color
    for path, result in results.items():
        own = COLORS.get(result["stage"])
        colors[path] = next(free) if own is None or own in colors.values() else own

    def draw(ax, x, numbers, names, band=True, **style):
        """numbers: for each x its {"pass@k": ..., "pass@k interval": ...}; names: which pass@k, for each x."""
        ax.plot(x, [v[k] for v, k in zip(numbers, names)], markersize=4, linewidth=1.6, **style)
        if band:
            ends = zip(*[v[f"{k} interval"] for v, k in zip(numbers, names)])
            ax.fill_between(x, *ends, color=style["color"], alpha=0.12, linewidth=0)
        ax.grid(axis="y", alpha=0.3)
        ax.set_ylim(-0.03, 1.03)

    for path, result in results.items():
        ops = [int(op) for op in result["ops"]]
        numbers, color = [v["verified"] for v in result["ops"].values()], colors[path]
        draw(axes["op"], ops, numbers, [ks[0]] * len(ops), color=color, marker="o", label=path.removesuffix(".pt"))
        if ks[1:]:
            draw(axes["op"], ops, numbers, [ks[-1]] * len(ops), color=color, marker="s", linestyle="--", band=False)
        if args.loss:
            losses = [v["loss"] for v in result["ops"].values()]
            axes["loss"].plot(ops, losses, color=color, marker="o", markersize=4, linewidth=1.6)
            axes["loss"].set(xlabel="op", ylabel="loss, nats a token", xlim=(ops[0] - 0.5, ops[-1] + 0.5), xticks=ops)
        for group in groups:
            draw(axes[group], args.k, [result["groups"][group]["verified"]] * len(ks), ks, color=color, marker="o")
    ranges = [args.id_ranges.get(context) for context in result["contexts"]]
    for group, color in (("below", "0.95"), ("ID", "1.0"), ("OOD-edge", "0.95"), ("OOD-hard", "0.88")):
        inside = [op for op in ops if {group_of(op, id_ops) for id_ops in ranges} == {group}]  # in every context
        if inside:
            axes["op"].axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=color, zorder=0)
            axes["op"].text(inside[0] - 0.45, 1.04, group, va="bottom")
    axes["op"].set(xlabel="op", ylabel="verified", xlim=(ops[0] - 0.5, ops[-1] + 0.5), xticks=ops)
    axes["op"].legend(title=f"solid {ks[0]}, dashed {ks[-1]}" if ks[1:] else ks[0], loc="upper right",
                      labelcolor="linecolor", framealpha=0.9)
    for group in groups:
        axes[group].set(title=group, xlabel="k", xscale="log", ylabel="verified pass@k" if group == groups[0] else None)
        axes[group].set_xticks(args.k, args.k)
        axes[group].minorticks_off()
    figure.savefig(args.plot, dpi=150)


def plot_curves(runs, path):
    """Draw what the stages logged, {checkpoint: rows of metrics}. A point is a mean over 2 or 4 % of the run."""
    plt = pyplot()
    ops = {name: sorted({op for row in rows for op in row.get("groups", ())}, key=int) for name, rows in runs.items()}
    n_rows = math.ceil(sum(6 + len(of_run) if of_run else 1 for of_run in ops.values()) / 4)
    figure, panels = plt.subplots(n_rows, 4, figsize=(10, 2.1 * n_rows), layout="constrained", squeeze=False)
    panels = iter(panels.flat)

    def means(rows, value, points=50):
        """([step], [value]), with the rows where the value is None left out."""
        rows = [row for row in rows if value(row) is not None]
        parts = np.array_split(np.arange(len(rows)), min(points, len(rows))) if rows else []
        return tuple([np.mean([of(rows[i]) for i in part]) for part in parts] for of in (lambda row: row["step"], value))

    def lines(title, rows, colors, **values):
        ax = next(panels)
        for (label, value), color in zip(values.items(), colors):
            ax.plot(*means(rows, value), color=color, linewidth=1.4, label=label.replace("_", " "))
        ax.set_title(title, fontsize=9)
        if len(values) > 2:  # room above the lines for the names
            low, high = ax.get_ylim()
            ax.set_ylim(low, high + 0.5 * (high - low))
        if len(values) > 1:
            ax.legend(fontsize=7, framealpha=0.6, handlelength=1, **dict(loc="upper center", ncols=2) if len(values) > 2 else {})

    for checkpoint, rows in runs.items():
        name = os.path.basename(checkpoint).removesuffix(".pt")
        if not ops[checkpoint]:
            lines(f"{name}: loss, nats a token", rows, ("0.6", COLORS["midtrain" if "mid" in name else "pretrain"]),
                  of_the_step=lambda row: row["loss"], held_out=lambda row: row["val_loss"])
            continue
        parts = ("process", "outcome", "verified", "strict", "hacked", "reward")
        lines(f"{name}: reward and parts", rows, (*MORE_COLORS[:5], COLORS["grpo"]),
              **{part: lambda row, part=part: row[part] for part in parts})
        groups = [key for key in rows[0]["held_out"] if not key.endswith("interval")]
        lines("verified, held out", rows, ("black", COLORS["grpo"], *MORE_COLORS),
              **{group: lambda row, group=group: row["held_out"][group] for group in groups})
        lines("entropy, nats a token", rows, [COLORS["grpo"]], entropy=lambda row: row["entropy"])
        lines("KL, nats a token", rows, ("black", COLORS["grpo"]), to_the_reference=lambda row: row["kl"],
              in_a_step=lambda row: row["approx_kl"])
        lines("length, tokens", rows, [COLORS["grpo"]], length=lambda row: row["length"])
        lines("share cut off", rows, [COLORS["grpo"]], truncated=lambda row: row["truncated"])
        for op in ops[checkpoint]:
            ax, drawn = next(panels), [row for row in rows if op in row["groups"]]
            kinds = dict(all_wrong="0.7", mixed=COLORS["grpo"], all_right="tab:green")
            steps, of_all = means(drawn, lambda row: row["groups"][op]["groups"], 25)
            of_kinds = [means(drawn, lambda row: row["groups"][op][kind] * row["groups"][op]["groups"], 25)[1] for kind in kinds]
            ax.stackplot(steps, *np.divide(of_kinds, of_all), colors=kinds.values(), alpha=0.8,
                         labels=[kind.replace("_", " ") for kind in kinds])
            ax.set(ylim=(0, 1), xlim=(rows[0]["step"], rows[-1]["step"]))
            ax.set_title(f"groups of op {op}", fontsize=9)
            if op == ops[checkpoint][0]:
                ax.legend(fontsize=7, framealpha=0.8, loc="lower right")
    for ax in panels:
        ax.remove()
    for ax in figure.axes:
        ax.tick_params(labelsize=7)
    figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# settings, checkpoints, problems


def integers(text):
    """An argparse type: a list such as 1,8,128, sorted."""
    return sorted({at_least(1)(k) for k in text.split(",")})


def shares(text):
    """An argparse type: 0.2,0.3,0.5, which add up to 1."""
    found = [at_least(0.0)(share) for share in text.split(",")]
    if not math.isclose(sum(found), 1, abs_tol=1e-6):
        raise argparse.ArgumentTypeError(f"must add up to 1, got {text}")
    return found


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [CKPT ...] [options]    (--help lists them)")
    p.add_argument("checkpoints", nargs="*", metavar="CKPT", help=f"default: those of {', '.join(CHAIN)} that exist")
    p.add_argument("--ops", help="op range (default: 2 to twice the largest op of pre-training)")
    p.add_argument("--context", choices=[*data.CONTEXTS, "all"], help="of the problems (default: that of the first checkpoint)")
    p.add_argument("--id-ops", help="what a folder of another project was pre-trained on, e.g. 2-10 (all contexts)")
    p.add_argument("--data", help="take the problems from this JSONL file of rows")
    p.add_argument("--strict-rows", action="store_true", help="refuse, not leave out, rows of --data that are not forward")
    p.add_argument("--weights", type=shares, help="shares of easy, ..., hard ops in means of ID, e.g. 0.2,0.3,0.5")
    p.add_argument("--n", type=at_least(1), help="samples a problem (128, on a CPU 16); for --n torchrun needs -- before evaluate.py")
    p.add_argument("--k", type=integers, help="k of pass@k (default 1,8,128, on a CPU 1,4,16)")
    p.add_argument("--problems", type=at_least(1), help="problems per op (default 200, on a CPU 100)")
    p.add_argument("--temperature", type=at_least(0.0), default=0.7, help="of sampling, as in the paper (default 0.7); 0: greedy")
    add_world_options(p.add_argument_group("world of the problems (default: that of the first checkpoint)"))
    p.add_argument("--seed", type=at_least(0), default=0, help="of the problems and of the sampling (default 0)")
    p.add_argument("--json", default="out/eval.json", help="where to write the numbers (default out/eval.json)")
    p.add_argument("--plot", metavar="PNG", help="draw pass@k over op, and over k (needs matplotlib)")
    p.add_argument("--curves", metavar="PNG", help="draw the metrics beside the checkpoints, and evaluate nothing")
    p.add_argument("--show", type=at_least(0), default=0, metavar="N", help="print N sampled solutions beside the gold ones")
    p.add_argument("--samples", metavar="JSONL", help="write every sample with its problem and verdicts (2 KB each)")
    p.add_argument("--loss", action="store_true", help="also the loss of the gold solutions, in nats a token")
    p.add_argument("--rows", type=at_least(1), help="samples that run at a time, at most (default 6144, on a CPU 512)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.set_defaults(dtype=None, compile=False)
    args = p.parse_args()
    with one_line_errors(p):
        complete(args)
    return args


def complete(args):
    """Fill in defaults, read checkpoints and problems. Raises ValueError or OSError with a line for the user."""
    choose_device(args)
    on_gpu = args.device.startswith("cuda")
    for name, gpu, cpu in (("n", 128, 16), ("problems", 200, 100), ("rows", 6144, 512)):
        setattr(args, name, getattr(args, name) or (gpu if on_gpu else cpu))
    args.k = args.k or [k for k in ((1, 8, 128) if on_gpu else (1, 4, 16)) if k <= args.n]
    if args.k[-1] > args.n:
        raise ValueError(f"pass@{args.k[-1]} needs 1 <= k <= n, but --n is {args.n}")
    args.checkpoints = list(dict.fromkeys(args.checkpoints)) or [c for c in CHAIN if os.path.exists(c)]
    if not args.checkpoints:
        raise ValueError("there is no checkpoint in out/: run python pretrain.py first, or name one")
    for name, kinds in dict(json=[".json"], samples=[".jsonl"], plot=FIGURES, curves=FIGURES).items():
        path = getattr(args, name)
        if path is not None and not path.endswith(tuple(kinds)):  # a checkpoint, say
            raise ValueError(f"--{name} {path} must end in {' or '.join(kinds)}")
    inputs = [*args.checkpoints, *map(metrics_of, args.checkpoints), *filter(None, [args.data])]
    also = [f"--{name}" for name in ("plot", "samples", "show", "loss", "data", "weights") if getattr(args, name)]
    if args.curves and also:
        raise ValueError(f"--curves evaluates nothing: it takes no {', '.join(also)}")
    if args.strict_rows and not args.data:
        raise ValueError("--strict-rows is for the rows of --data")
    if args.curves:
        if not importlib.util.find_spec("matplotlib"):
            raise ValueError("--curves needs matplotlib (pip install matplotlib)")
        check_outputs(args.curves, inputs=inputs)
        args.runs = {path: read_metrics(path) for path in args.checkpoints}
        for path, rows in args.runs.items():
            if not rows or not all(row.keys() >= (OF_RL if "groups" in rows[0] else {"loss", "val_loss"}) for row in rows):
                raise ValueError(f"there are no metrics of a stage, as it is now, in {metrics_of(path)}")
        return
    args.loaded = [(path, *read(path, args.id_ops)) for path in args.checkpoints]
    if args.id_ops and not any(reader.foreign for *_, reader in args.loaded):
        raise ValueError("--id-ops is for folders of other projects: ours say what they were pre-trained on")
    args.id_ops = args.loaded[0][1]["id_ops"]
    args.id_ranges = data.seen_ops(args.loaded[0][1])
    if not args.data:
        take_world(args, args.loaded[0][1]["recipe"], data.World())
    elif any(getattr(args, name) is not None for name in ("distractors", "max_parents", "max_value")):
        raise ValueError("--distractors, --max-parents and --max-value are for fresh problems, not for the rows of --data")
    args.context = args.context or ("all" if len(args.id_ranges) == len(data.CONTEXTS) else ",".join(args.id_ranges))
    args.notes = []  # what to say before the work
    args.problem_rows = problems_of(args)
    for path, _, _, reader in args.loaded:
        check_texts(path, reader, args.problem_rows)
    of_id = [dict(op=op, group="ID") for op, rows in args.problem_rows.items() for row in rows
             if group_of(op, args.id_ranges.get(context_of(row))) == "ID"]
    if args.weights and not in_parts(of_id, args):
        raise ValueError(f"--weights has {len(args.weights)} shares, but ID, op {{}}-{{}}, is not all here".format(*args.id_ops))
    check_outputs(args.json, *filter(None, [args.plot, args.samples]), inputs=inputs)


def read(path, id_ops):
    """A checkpoint or a Hugging Face folder -> (checkpoint, model, Reader). Raises ValueError with a line for the user."""
    if not os.path.isdir(path):
        checkpoint, model = read_trained(path, data.VOCABULARY)
        enc, end = data.tokenizer(), [data.tokenizer().encode_single_token(data.END)]
        reader = Reader(partial(data.encode, enc), partial(data.decode, enc), end, end, model.config.vocab_size, None)
        return checkpoint, model, reader
    folder = read_hf(path)
    size, after_answer = folder.model.config.vocab_size, folder.tokenizer.token_to_id("</answer>")

    def encode(text):
        return folder.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(ids):  # what is no token of the tokenizer is no text either
        runs = itertools.groupby(ids, key=lambda i: folder.tokenizer.id_to_token(i) is not None)
        return "".join(folder.tokenizer.decode([*run], skip_special_tokens=False) if known else "\ufffd" for known, run in runs)

    if folder.ours and folder.ends:
        check_trained(folder.ours, path, data.VOCABULARY)
        return folder.ours, folder.model, Reader(encode, decode, folder.ends, folder.ends[:1], size, folder.positions)
    if id_ops is None:
        raise ValueError(f"{path} does not say what it was pre-trained on: give --id-ops, for instance --id-ops 2-10")
    ops, stops = data.parse_ops(id_ops), [*folder.ends, *[after_answer] * (after_answer is not None)]
    if not stops:
        raise ValueError(f"{path} has no end of text: neither an eos_token_id nor a token </answer>")
    id_ops = [ops[0], ops[-1]]
    checkpoint = dict(stage=ANOTHERS, id_ops=id_ops, id_ranges=dict.fromkeys(data.CONTEXTS, id_ops), recipe={})
    return checkpoint, folder.model, Reader(encode, decode, stops, folder.ends[:1], size, folder.positions, True)


def check_texts(path, reader, problem_rows):
    """Raises ValueError with a line for the user if the model of a folder cannot read a problem."""
    for op, rows in problem_rows.items() if reader.positions else ():
        for row in rows:
            ids, solution = reader.encode(data.prompt_text(row)), reader.encode(data.response_text(row).removesuffix(data.END))
            if len(ids) >= reader.positions:
                raise ValueError(f"{path} reads at most {reader.positions} tokens, but a prompt of op {op} has {len(ids)}: "
                                 "lower --ops")
            if max(ids + solution) >= reader.vocab_size:
                raise ValueError(f"{path}: its tokenizer makes token {max(ids + solution)}, but the model has {reader.vocab_size}")


def problems_of(args):
    """{op: rows} of --data, or fresh ones of the eval split. Raises ValueError with a line for the user."""
    if not args.data:
        world = data.World(args.distractors, args.max_parents, args.max_value)
        ops = data.parse_ops(args.ops or f"2-{min(2 * args.id_ops[1], data.MAX_OP)}")
        mixtures = {op: data.parse_mixture(data.in_contexts(dict.fromkeys(args.context.split(","), op))) for op in ops}
        # each op has numbers i of its own: the same i would mean the same context and number of distractors at every op
        return {op: [data.make_row(op * 10 ** 6 + i, mixtures[op], args.seed, "eval", world) for i in range(args.problems)]
                for op in ops}
    whole = read_jsonl(args.data, "problem", "question", "solution", "template")
    forward = [r for r in whole if r.get("mode", FORWARD) == FORWARD]
    rows = [r for r in forward if args.context == "all" or context_of(r) in args.context.split(",")]
    if len(forward) < len(whole) and (args.strict_rows or not forward):
        raise ValueError(f"{args.data} has {len(whole) - len(forward)} rows that are not forward problems (mode {FORWARD})")
    chosen = set(map(id, rows))
    for n, row in enumerate(whole, 1):
        try:
            if type(row.get("op")) is not int or row["op"] < 1:  # true is an int, too
                raise ValueError('its "op" is not an integer above 0')
            if id(row) in chosen:
                verify(row["solution"], "")
                if "Answer:" not in row["solution"] or not data.steps_of(row):
                    raise ValueError("its solution is not in the form of the public data: Define ... . Answer: N.")
        except ValueError as error:
            raise ValueError(f"{args.data} row {n}: {error}") from None
    ops = {r["op"] for r in rows} & set(data.parse_ops(args.ops)) if args.ops else {r["op"] for r in rows}
    if not ops:
        raise ValueError(f"{args.data} has no rows with op {args.ops or 'of any size'}, context {args.context}")
    problem_rows = {op: [r for r in rows if r["op"] == op][:args.problems] for op in sorted(ops)}
    few = [f"op {op} {len(of_op)}" for op, of_op in problem_rows.items() if len(of_op) < args.problems]
    for n, what in ((len(whole) - len(forward), "that are not forward problems"),
                    (len(forward) - len(rows), f"of other contexts than {args.context}")):
        args.notes += [f"{args.data}: {n} of {len(whole)} rows are left out, {what}"] * (n > 0)
    args.notes += [f"{args.data}: fewer rows than --problems {args.problems}: {', '.join(few)}"] * bool(few)
    return problem_rows


# ----------------------------------------------------------------------------------------------------------------------


def main():
    args = arguments()
    if args.curves:
        if rank() == 0:
            plot_curves(args.runs, args.curves)
        return say(f"figure: {args.curves}")
    device, precision = set_up(args)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        say("--plot needs matplotlib (pip install matplotlib): there will be no figure")
        args.plot = None
    if args.weights:
        args.notes.append(f"the verdicts on ID are weighted, {', '.join(map(str, args.weights))} from easy to hard; what else is "
                          "said of it is not")
    for note in args.notes:
        say(note)
    n_problems = sum(map(len, args.problem_rows.values()))
    which, world = (f"problems of {args.data}", "") if args.data else ("held-out problems", (
        f", mean of {args.distractors:g} distractors, at most {args.max_parents} parents, values to {args.max_value}"))
    say(f"{n_problems} {which}, op {min(args.problem_rows)}-{max(args.problem_rows)}, {args.n} samples each at temperature "
        f"{args.temperature:g}{world}, on {args.device}")
    results, all_records = {}, {}
    for path, checkpoint, model, reader in args.loaded:
        done = []

        def progress(finished):
            done.extend(finished)
            show_progress(len(done) * n_ranks() / (n_problems * args.n), path)

        with progress_bar() as show_progress:
            records = evaluate(model.to(device), reader, args.problem_rows, args, device, precision, progress)
        records = sorted(gather(records), key=lambda r: (r["op"], r["i"]))
        results[path] = summarize(records, args) | {name: checkpoint.get(name) for name in ("stage", "step", "problems", "run")}
        results[path]["init_of_another_run"] = another_init(checkpoint, args.loaded)
        if all_records:
            results[path]["against_first"] = differences(records, all_records[args.checkpoints[0]], args)
        if len(all_records) > 1:
            results[path]["against_previous"] = differences(records, [*all_records.values()][-1], args)
        all_records[path] = records
    for path, checkpoint, *_ in args.loaded:  # at the end, because they may be named in any order
        before = made_from(checkpoint, args.loaded)
        if before:
            results[path] |= dict(init_here=before, against_init=differences(all_records[path], all_records[before], args))
    if rank():
        return

    settings = {name: getattr(args, name) for name in ("n", "k", "problems", "temperature", "distractors", "max_parents",
                                                       "max_value", "seed", "context", "data", "id_ops", "id_ranges", "weights")}
    text = json.dumps({"checkpoints": results, "settings": settings}, indent=1).removesuffix("\n}")
    counts = json.dumps({path: by_problem(records) for path, records in all_records.items()})  # long, so on a line
    try:  # first, since whoever reads what is printed may go away
        write_whole(os.path.realpath(args.json), f'{text},\n "by_problem": {counts}\n}}\n')
    finally:  # if it cannot be written, this is all that is left
        show(all_records, args.show)
        say("\n" + table(results, args) + "\n\n[low high]: 95 % interval over problems\n")
        report(results, args)
    say(f"numbers: {args.json}")
    if args.samples:
        write_samples(os.path.realpath(args.samples), all_records)
        say(f"samples: {args.samples}")
    if args.plot:
        plot(results, args)
        say(f"figure: {args.plot}")


if __name__ == "__main__":
    run_script(main)
