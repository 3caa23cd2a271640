"""
Evaluation: pass@k over held-out problems, for the right answer and for the right reasoning, checkpoints side by side.

    python evaluate.py                                   out/pretrain.pt, out/midtrain.pt, out/grpo.pt, those that exist
    python evaluate.py out/pretrain.pt --show 3          and sampled solutions, each step marked right or wrong and why
    python evaluate.py A.pt B.pt --plot out/eval.png     compare, and draw (needs matplotlib)
    python evaluate.py A.pt --data rows.jsonl            on rows of a file instead of fresh problems
    torchrun --nproc_per_node=8 evaluate.py A.pt         on several GPUs

Three verdicts, each stricter than the one before (verify.py): outcome, the answer is right; verified, every step the
answer needs is there with the right inputs and value (the paper's metric); strict, the text really proves it.

Ops are grouped by the range m-M of pre-training (of the first checkpoint's) as in arXiv 2512.07783, where it is 2-10: ID m to M,
OOD-edge up to 1.4 M (11-14), OOD-hard above (15-20); "below" are those under m. "+-" is half of a 95 % confidence interval
over problems.
"""
import argparse
import collections
import importlib.util
import json
import math
import os

from model import (add_world_options, at_least, check_outputs, choose_device, gather, n_ranks, one_line_errors, progress_bar,
                   rank, read_trained, run_script, sample, say, set_up, take_world)
from verify import explain, verify
import data
import numpy as np
import torch  # after model.py, which sets how its threads wait

VERDICTS = ("outcome", "verified", "strict")
CHAIN = ("out/pretrain.pt", "out/midtrain.pt", "out/grpo.pt")


def pass_at_k(n, c, k):
    """Unbiased estimate of the chance that at least one of k samples is right, from c right ones of n.

    1 - C(n - c, k) / C(n, k), of arXiv 2107.03374 (equation 1). n, c, k: integers or integer arrays, k <= n.
    """
    n, c = np.broadcast_arrays(n, c)
    miss = np.ones(n.shape)  # the chance that k draws without replacement are all wrong
    for i in range(k):
        miss = miss * np.clip(n - c - i, 0, None) / (n - i)
    return 1 - miss


def interval(values, clusters=None):
    """Mean of per-problem values and half the width of its 95 % confidence interval over problems (normal); None for one.

    clusters: a number for each problem; those with the same one are not taken for independent of each other. Problem i has
    the same context and number of distractors at every op, so an interval over several ops needs them.
    """
    values = np.asarray(values, float)
    _, cluster = np.unique(range(len(values)) if clusters is None else clusters, return_inverse=True)
    sums = np.bincount(cluster, values - values.mean())
    half = 1.96 * math.sqrt(sums @ sums * len(sums) / (len(sums) - 1)) / len(values) if len(sums) > 1 else None
    return float(values.mean()), half


def estimates(ks, values, records):
    """{"pass@1": mean, "pass@1 +-": half an interval, ...}; values: k -> a value for each of the records."""
    out = {}
    for k in ks:
        out[f"pass@{k}"], out[f"pass@{k} +-"] = interval(values(k), [r["i"] for r in records])
    return out


def group_of(op, id_ops):
    """ID, OOD-edge or OOD-hard, from the op and the range [m, M] of pre-training; "below" for ops smaller than m."""
    beyond = "below" if op < id_ops[0] else "OOD-hard"
    return next((name for name, (low, high) in data.op_groups(id_ops).items() if low <= op <= high), beyond)


def integers(text):
    """An argparse type: a list such as 1,8,128, sorted."""
    return sorted({at_least(1)(k) for k in text.split(",")})


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="%(prog)s [CKPT ...] [options]    (--help lists them)")
    p.add_argument("checkpoints", nargs="*", metavar="CKPT", help=f"default: those of {', '.join(CHAIN)} that exist")
    p.add_argument("--ops", help="op range (default: 2 to twice the largest op of pre-training)")
    p.add_argument("--context", choices=[*data.CONTEXTS, "all"], help="of the problems (default: that of the first checkpoint)")
    p.add_argument("--data", help="take the problems from this JSONL file of rows")
    p.add_argument("--n", type=at_least(1), help="samples per problem (default 128, on a CPU 16)")
    p.add_argument("--k", type=integers, help="k of pass@k (default 1,8,128, on a CPU 1,4,16)")
    p.add_argument("--problems", type=at_least(1), help="problems per op (default 200, on a CPU 100)")
    p.add_argument("--temperature", type=at_least(0.0), default=0.7, help="of sampling, as in the paper (default 0.7); 0: greedy")
    add_world_options(p.add_argument_group("world of the problems (default: that of the first checkpoint)"))
    p.add_argument("--seed", type=at_least(0), default=0, help="of the problems and of the sampling (default 0)")
    p.add_argument("--json", default="out/eval.json", help="where to write the numbers (default out/eval.json)")
    p.add_argument("--plot", metavar="PNG", help="draw pass@1 and pass@k over op (needs matplotlib)")
    p.add_argument("--show", type=at_least(0), default=0, metavar="N", help="print N sampled solutions, each step marked")
    p.add_argument("--rows", type=at_least(1), help="samples that run at a time (default 6144, on a CPU 512)")
    p.add_argument("--device", help="cuda, cpu, ... (default: cuda if there is one)")
    p.set_defaults(dtype=None, compile=False)
    args = p.parse_args()
    with one_line_errors(p):
        choose_device(args)
        on_gpu = args.device.startswith("cuda")
        for name, gpu, cpu in (("n", 128, 16), ("problems", 200, 100), ("rows", 6144, 512)):
            setattr(args, name, getattr(args, name) or (gpu if on_gpu else cpu))
        args.k = args.k or [k for k in ((1, 8, 128) if on_gpu else (1, 4, 16)) if k <= args.n]
        if args.k[-1] > args.n:
            raise ValueError(f"pass@{args.k[-1]} needs 1 <= k <= n, but --n is {args.n}")
        args.checkpoints = args.checkpoints or [c for c in CHAIN if os.path.exists(c)]
        if not args.checkpoints:
            raise ValueError("there is no checkpoint in out/: run python pretrain.py first, or name one")
        args.loaded = [(path, *read_trained(path, data.VOCABULARY)) for path in args.checkpoints]
        args.id_ops = args.loaded[0][1]["id_ops"]
        take_world(args, args.loaded[0][1]["recipe"], data.World())
        args.context = args.context or ",".join(data.contexts_of(args.loaded[0][1]["recipe"].get("mix", "2-10")))
        args.problem_rows = problems_of(args)
        if args.plot and not args.plot.endswith((".png", ".pdf", ".svg")):
            raise ValueError(f"--plot {args.plot} must end in .png, .pdf or .svg")
        check_outputs(args.json, *filter(None, [args.plot]), inputs=[*args.checkpoints, *filter(None, [args.data])])
    return args


def problems_of(args):
    """{op: rows} of --data, or fresh ones of the eval split. Raises ValueError with a line for the user."""
    if not args.data:
        world = data.World(args.distractors, args.max_parents, args.max_value)
        ops = data.parse_ops(args.ops or f"2-{min(2 * args.id_ops[1], data.MAX_OP)}")
        mixtures = {op: data.parse_mixture(data.in_contexts(args.context.split(","), op)) for op in ops}
        return {op: [data.make_row(i, mixtures[op], args.seed, "eval", world) for i in range(args.problems)] for op in ops}
    rows = [r for r in data.read_rows(args.data)
            if args.context == "all" or data.TEMPLATE_TO_CONTEXT.get(r["template"], r["template"]) in args.context.split(",")]
    for n, row in enumerate(rows, 1):
        try:
            verify(row["solution"], "")
        except ValueError as error:
            raise ValueError(f"{args.data} row {n}: {error}") from None
    ops = {r["op"] for r in rows} & set(data.parse_ops(args.ops)) if args.ops else {r["op"] for r in rows}
    if not ops:
        raise ValueError(f"{args.data} has no rows with op {args.ops or 'of any size'}, context {args.context}")
    return {op: [r for r in rows if r["op"] == op][:args.problems] for op in sorted(ops)}


def evaluate(model, problem_rows, args, device, precision, progress=None):
    """Sample n solutions for every problem and verify them.

    Returns a list of records, one for each problem of this rank: op, i (its number among those of its op), context, distractors
    (how many), right ({verdict: how many of n}), errors ({name of an error: in how many samples}), hacked (right answer, wrong
    process), truncated, and the text of the first sample.
    """
    enc, buffers, records = data.tokenizer(), {}, []
    stop = enc.encode_single_token(data.END)
    generator = torch.Generator(device).manual_seed(args.seed + rank())
    for op, rows in problem_rows.items():
        rows = rows[rank()::n_ranks()]
        if not rows:
            continue
        encoded = [data.encode_row(enc, row) for row in rows]
        longest = max(len(ids) - n_prompt for ids, n_prompt in encoded)
        with precision:
            tokens, _ = sample(model, [ids[:n_prompt] for ids, n_prompt in encoded], stop, args.n,
                               max_new=longest * 3 // 2 + 16, temperature=args.temperature, generator=generator,
                               rows=args.rows, progress=progress, buffers=buffers)
        for j, row in enumerate(rows):
            mine = tokens[j * args.n:(j + 1) * args.n]
            texts = [data.decode(enc, ids) for ids in mine]
            verdicts = [verify(row["solution"], text) for text in texts]
            errors = collections.Counter(name for v in verdicts for name in {e.split(":")[0] for e in v["errors"]})
            needed = row["solution"].count("Define ") - row["solution"].count("Define total ")
            records.append(dict(
                op=op, i=rank() + j * n_ranks(), context=data.TEMPLATE_TO_CONTEXT.get(row["template"], row["template"]),
                distractors=row["problem"].count(" equals ") - needed, errors=errors,
                right={name: sum(verdict[name] for verdict in verdicts) for name in VERDICTS},
                hacked=sum(v["outcome"] and not v["verified"] for v in verdicts),
                truncated=sum(stop not in ids for ids in mine), row=row, text=texts[0]))
    return records


def summarize(records, args):
    """Numbers of one checkpoint, as they go into the JSON file."""
    def numbers(chosen):
        return {v: estimates(args.k, lambda k: pass_at_k(args.n, [r["right"][v] for r in chosen], k), chosen)
                for v in VERDICTS}

    def by(key, chosen=records):
        return {name: numbers([r for r in chosen if key(r) == name]) for name in dict.fromkeys(map(key, chosen))}

    def group(r):
        return group_of(r["op"], args.id_ops)

    def few_or_many(r):
        return "0-1" if r["distractors"] < 2 else "2-4" if r["distractors"] < 5 else "5-12"

    samples = len(records) * args.n
    summary = dict(groups=by(group), ops={str(op): v for op, v in by(lambda r: r["op"]).items()},
                   contexts={c: by(group, [r for r in records if r["context"] == c])
                             for c in sorted({r["context"] for r in records})},
                   # problem i has the same number of distractors at every op, so each bin of a group has the same mix of ops
                   distractors={g: dict(sorted(by(few_or_many, [r for r in records if group(r) == g]).items()))
                                for g in dict.fromkeys(map(group, records))},
                   hacked=sum(r["hacked"] for r in records) / max(1, sum(r["right"]["outcome"] for r in records)),
                   truncated=sum(r["truncated"] for r in records) / samples,
                   errors={name: sum(r["errors"].get(name, 0) for r in records) / samples
                           for name in sorted({e for r in records for e in r["errors"]})})
    first, last = f"pass@{args.k[0]}", f"pass@{args.k[-1]}"
    edge = [int(op) for op, v in summary["ops"].items() if v["verified"][first] < 0.5 and v["verified"][last] >= 0.05]
    summary["edge"] = [min(edge), max(edge)] if edge else None
    return summary


def differences(records, others, args):
    """How much better `records` are than `others` on the same problems: {group: {"pass@1": mean, "pass@1 +-": half}}.

    Of verified pass@k. The interval is over the differences problem by problem, which is narrower than it would be
    without the pairing.
    """
    out = {}
    for name in dict.fromkeys(group_of(r["op"], args.id_ops) for r in records):
        mine, theirs = ([r for r in rs if group_of(r["op"], args.id_ops) == name] for rs in (records, others))
        out[name] = estimates(args.k, lambda k: np.subtract(*(
            pass_at_k(args.n, [r["right"]["verified"] for r in rs], k) for rs in (mine, theirs))), mine)
    return out


def table(results, args):
    """Text table, a line an op and a group. One checkpoint: every pass@k and verdict; several: verified, least and most k."""
    ks = [f"pass@{k}" for k in args.k]
    if len(results) == 1:
        columns = [("verified", k) for k in ks] + [("outcome", ks[0]), ("strict", ks[0])]
    else:
        columns = [("verified", k) for k in dict.fromkeys((ks[0], ks[-1]))]
    width = 14

    def cell(numbers, k, form=".3f"):
        half = numbers[f"{k} +-"]
        return f"{numbers[k]:{form}}" + (f" +-{half:.2f}" if half is not None else " " * 7)

    def line(title, cells):
        return f"{title:<10}" + "".join(f"{c:>{width}}" for c in cells)

    lines = []
    if len(results) > 1:
        lines += [line("", [name[-width * len(columns) + 2:].rjust(width * len(columns)) for name in results])]
    lines += [line("", [v for v, _ in columns] * len(results)), line("", [k for _, k in columns] * len(results))]
    some = next(iter(results.values()))
    for section, title in (("ops", "op "), ("groups", "")):
        lines.append("")
        for key in some[section]:
            lines.append(line(title + key, [cell(r[section][key][v], k) for r in results.values() for v, k in columns]))
    for key, title in (("against_first", "change against the first"), ("against_previous", "change against the one before")):
        if any(key in r for r in results.values()):
            lines += ["", title]
            for group in some["groups"]:
                lines.append(line(group, [cell(r[key][group], k, "+.3f") if key in r else ""
                                          for r in results.values() for _, k in columns]))
    return "\n".join(lines)


def show(records, count):
    """Print sampled solutions, ops spread evenly, each step marked and, where it is wrong, why."""
    for j in np.linspace(0, len(records) - 1, min(count, len(records))).astype(int):
        row, text = records[j]["row"], records[j]["text"]
        say(f"\n--- {records[j]['context']}, op {row['op']}\n{row['problem'].strip()} {row['question']}\n")
        for step, right, why in explain(row["solution"], text):
            say(f"  {'right' if right else 'WRONG'}  {step}" + (f"   <- {why}" if why else ""))


def plot(results, args):
    """Draw pass@(smallest k) and pass@(largest k) of `verified` over op, a colour a checkpoint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 4.5), constrained_layout=True)
    low, high = f"pass@{args.k[0]}", f"pass@{args.k[-1]}"
    for (name, result), color in zip(results.items(), plt.cm.tab10.colors * 9):
        ops = [int(op) for op in result["ops"]]
        for k, style in dict.fromkeys(((low, "-o"), (high, "--s"))):
            values = [result["ops"][str(op)]["verified"] for op in ops]
            mean, half = [v[k] for v in values], [v[f"{k} +-"] or 0 for v in values]
            axes.errorbar(ops, mean, half, fmt=style, color=color, capsize=2, markersize=4, linewidth=1.5,
                          label=f"{name}: {k}")
    ops = [int(op) for op in next(iter(results.values()))["ops"]]
    for group, color in (("below", "0.95"), ("ID", "1.0"), ("OOD-edge", "0.95"), ("OOD-hard", "0.88")):
        inside = [op for op in ops if group_of(op, args.id_ops) == group]
        if inside:
            axes.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=color, zorder=0)
            axes.text(inside[0] - 0.45, 1.02, group, va="bottom", fontsize=9)
    axes.set(xlabel="op", ylabel="verified", ylim=(-0.02, 1.1), xlim=(ops[0] - 0.5, ops[-1] + 0.5), xticks=ops)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(args.plot, dpi=150)


def report(results, args):
    """Print what the table does not say: for each checkpoint its edge, the effect of distractors, and what went wrong."""
    first = f"pass@{args.k[0]}"
    for path, r in results.items():
        bins = sorted({b for by_number in r["distractors"].values() for b in by_number})
        common = sorted(r["errors"].items(), key=lambda e: -e[1])[:4]
        say(f"{path}\n  edge (verified {first} below 0.5, pass@{args.k[-1]} at least 0.05): "
              + (f"op {r['edge'][0]}-{r['edge'][1]}" if r["edge"] else "none")
              + f"\n  verified {first} with {', '.join(bins)} distractors: " + "; ".join(f"{group} " + " ".join(
                  f"{by_number[b]['verified'][first]:.2f}" if b in by_number else "-" for b in bins)
                  for group, by_number in r["distractors"].items())
              + f"\n  right answer by wrong reasoning: {100 * r['hacked']:.1f} % of the right answers; cut off: "
              f"{100 * r['truncated']:.1f} %\n  most frequent errors, in % of the samples: "
              + (", ".join(f"{name} {100 * part:.0f}" for name, part in common) or "none"))


def main():
    args = arguments()
    device, precision = set_up(args)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        say("--plot needs matplotlib (pip install matplotlib): there will be no figure")
        args.plot = None
    n_problems = sum(map(len, args.problem_rows.values()))
    say(f"{n_problems} {f'problems of {args.data}' if args.data else 'held-out problems'}, op {min(args.problem_rows)}-"
        f"{max(args.problem_rows)}, {args.n} samples each at temperature {args.temperature:g}, mean of {args.distractors:g} "
        f"distractors, at most {args.max_parents} parents, values to {args.max_value}, on {args.device}")
    results, all_records = {}, []
    for path, checkpoint, model in args.loaded:
        done = []

        def progress(finished):
            done.extend(finished)
            show_progress(len(done) * n_ranks() / (n_problems * args.n), path)

        with progress_bar() as show_progress:
            records = evaluate(model.to(device), args.problem_rows, args, device, precision, progress)
        records = sorted(gather(records), key=lambda r: r["op"])
        results[path] = summarize(records, args) | {name: checkpoint.get(name) for name in ("stage", "step", "problems", "run")}
        if all_records:
            results[path]["against_first"] = differences(records, all_records[0], args)
        if len(all_records) > 1:
            results[path]["against_previous"] = differences(records, all_records[-1], args)
        all_records.append(records)
        if rank() == 0 and args.show:
            say(f"\n{path}")
            show(records, args.show)
    if rank():
        return

    settings = {name: getattr(args, name) for name in ("n", "k", "problems", "temperature", "distractors", "max_parents",
                                                       "max_value", "seed", "context", "data", "id_ops")}
    json_file = os.path.realpath(args.json)
    with open(f"{json_file}.part", "w", encoding="utf-8") as f:
        json.dump({"checkpoints": results, "settings": settings}, f, indent=1)
    os.replace(f"{json_file}.part", json_file)
    say("\n" + table(results, args) + "\n")
    report(results, args)
    say(f"numbers: {args.json}")
    if args.plot:
        plot(results, args)
        say(f"figure: {args.plot}")


if __name__ == "__main__":
    run_script(main)
