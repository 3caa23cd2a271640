"""
The findings of arXiv 2512.07783, each as an experiment that ends with a verdict.

    python tests/findings.py edge                    with three seeds, 0, 1 and 2
    python tests/findings.py edge --dry-run          the commands and the expected time; runs nothing
    python tests/findings.py edge --seeds 4-6        other seeds; also 4,6
    python tests/findings.py edge --preset quick     a few steps of everything, two minutes, to see that it works: its verdicts
                                                     mean nothing

    edge    RL from the pre-trained base, as many steps each on problems of its own range, of the edge just past it, and on
            problems that are too hard. Where does RL add ability?

It runs the command lines of the stages, which it prints, several at a time on a CPU, and ends with a table, a figure and a
sentence a claim: --out has NAME.json, NAME.md and NAME.png, and in a folder NAME the checkpoints, evaluations and logs. Ctrl-C
saves; the same command goes on where it stopped, and does not repeat what is finished.

Statistics. The numbers are verified pass@k. A change is the difference between a model and its own base on the same problems.
Every seed has its own models and its own problems, so the variance of a change over seeds holds what differs between runs and
what differs between problems, and the interval "over seeds" is the plain t interval, mean +- t s / sqrt(n) with n - 1 degrees
of freedom. But it is never taken narrower than evaluate.py's intervals over problems make that of the mean: few seeds may
agree by luck. (So it covers the truth in at least 95 % of the cases, whatever the two variances are.) With one seed the
interval is the one over problems, and the verdict says so. A number rises if its interval lies above 0, does not if its
interval lies below MARGIN; if neither, the verdict is "undecided". A claim with several comparisons is not corrected for
their number. Two models of one seed are compared as if their changes were independent; they are on the same problems, so the
interval is rather too wide than too narrow.
"""
import argparse
import hashlib
import importlib.util
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import CONFIGS, at_least, check_outputs, load_checkpoint, n_cores, one_line_errors, run_script, say  # noqa: E402
import torch  # noqa: E402  after model.py, which sets how its threads wait

MARGIN = 0.05  # of pass@k: smaller rises are not what the paper means (at the edge it has .34 at k = 1 and .42 at k = 128)
TEMPERATURES = ("1.0", "0.7")  # of the evaluations. The claims are judged at the last, which is the paper's
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 97.5 %, 1 to 10 degrees of freedom


class Job(NamedTuple):
    out: str        # the file that it makes
    command: tuple  # a script and its options
    needs: tuple    # the checkpoints that it reads


# ----------------------------------------------------------------------------------------------------------------------
# the findings

# pretrain, grpo, evaluate: options. arms: the ops of RL, by name of checkpoint. minutes: of a job with one thread, until
# one was measured here
EDGE = {
    "tiny": dict(pretrain="--preset tiny", grpo="--id-share 0.2 --steps 220", arms=dict(id="5-8", edge="9-11", hard="14-16"),
                 evaluate="--n 64 --k 1,4,16,64 --problems 64",
                 minutes={"pretrain.py": 20, "grpo.py": 12, "evaluate.py": 12}),
    # the paper's
    "100m": dict(pretrain="--preset 100m", grpo="--id-share 0", arms=dict(id="7-10", edge="11-14", hard="17-20"),
                 evaluate="--n 128 --k 1,8,128 --problems 200", minutes={}),
    "quick": dict(pretrain="--preset tiny --ops 2-4 --n-layers 1 --width 32 --n-heads 2 --n-kv-heads 1 --mlp 64 --batch 8 "
                           "--steps 200 --save-every 20 --show 0",
                  grpo="--id-share 0.2 --steps 3 --prompts 2 --rollouts 2 --updates 1 --max-new 16 --eval-problems 1",
                  arms=dict(id="3-4", edge="5", hard="8"), evaluate="--n 4 --k 1,4 --problems 2",
                  minutes={"pretrain.py": 0.2, "grpo.py": 0.2, "evaluate.py": 0.2}),
}


def edge_jobs(folder, seed, settings):
    """The commands of one seed."""
    base = f"{folder}/base.pt"
    arms = {f"{folder}/{arm}.pt": ops for arm, ops in settings["arms"].items()}
    same = ("--seed", str(seed))
    return [
        Job(base, ("pretrain.py", *settings["pretrain"].split(), *same, "--out", base, "--resume"), ()),
        *[Job(out, ("grpo.py", "--init", base, "--ops", ops, *settings["grpo"].split(), *same, "--out", out, "--resume"),
              (base,)) for out, ops in arms.items()],
        *[Job(out, ("evaluate.py", base, *arms, *settings["evaluate"].split(), "--temperature", t, *same, "--json", out),
              (base, *arms)) for t in TEMPERATURES for out in [f"{folder}/eval-{t}.json"]]]


# Each claim gets the function rises(arm, group, k, than, sign) of `judge`: 1 for yes, -1 for no, 0 for undecided. So "not" is a
# minus, "and" is min, "or" is max
EDGE_CLAIMS = {
    "With data from the edge RL adds ability there (pass@k of the largest k), with other data none or less": lambda rises: min(
        rises("edge", "OOD-edge"),
        *[max(-rises(arm, "OOD-edge"), rises("edge", "OOD-edge", than=arm)) for arm in ("id", "hard")]),
    "That ability reaches past the range of the RL data": lambda rises: rises("edge", "past"),
    "With data from the base's own range only pass@1 of that range rises, if anything": lambda rises: min(
        -rises("id", "ID", "pass@1", sign=-1), -rises("id", "OOD-edge"), -rises("id", "OOD-hard")),
    # not pass@1 of ID, which the share of ID that all arms have may raise
    "Data that is too hard changes nothing or harms": lambda rises: min(
        -rises("hard", group, k) for group, k in (("ID", None), ("OOD-edge", None), ("OOD-edge", "pass@1"), ("OOD-hard", None),
                                                  ("OOD-hard", "pass@1"))),
}

FINDINGS = {"edge": dict(
    settings=EDGE, jobs=edge_jobs, claims=EDGE_CLAIMS,
    title="RL adds ability at the edge of competence",
    paper={  # group, arm -> k -> verified pass@k, read off its figures. It weights ID by difficulty, we count every op the same
        ("ID", "base"): {1: .831, 128: .993}, ("ID", "edge"): {1: .826, 128: .982},
        ("OOD-edge", "base"): {1: .17, 8: .31, 128: .44}, ("OOD-edge", "id"): {1: .22, 8: .34, 128: .42},
        ("OOD-edge", "edge"): {1: .51, 8: .71, 128: .86}, ("OOD-edge", "hard"): {1: .185, 8: .31, 128: .40}})}


# ----------------------------------------------------------------------------------------------------------------------
# statistics. An estimate is (value, low, high) with a 95 % interval


def estimate(numbers, k):
    """That of "pass@k" in the JSON of evaluate.py."""
    return numbers[k], *numbers[f"{k} interval"]


def difference(a, b):
    half = math.hypot(a[2] - a[1], b[2] - b[1]) / 2
    return a[0] - b[0], a[0] - b[0] - half, a[0] - b[0] + half


def over_seeds(estimates):
    """The mean over seeds and its interval, see above."""
    if len(estimates) == 1:
        return estimates[0]
    values, n = [value for value, _, _ in estimates], len(estimates)
    of_seeds = T[min(n - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(n)
    of_problems = math.sqrt(statistics.mean(((high - low) / 2) ** 2 for _, low, high in estimates) / n)
    half = max(of_seeds, of_problems)
    return statistics.mean(values), statistics.mean(values) - half, statistics.mean(values) + half


def judge(claims, changes, ks):
    """Sentences, verdicts and the numbers they rest on. changes: of each seed, arm -> group -> "pass@k" -> estimate."""
    judged = []
    for sentence, claim in claims.items():
        evidence = []

        def rises(arm, group, k=None, than=None, sign=1):
            """Whether the change of an arm, or its lead over that of the arm `than`, is above 0; with sign -1, below."""
            k = k or ks[-1]
            mean, low, high = over_seeds([difference(seed[arm][group][k], seed[than][group][k]) if than
                                          else seed[arm][group][k] for seed in changes])
            who = f"{arm} minus {than}" if than else arm
            evidence.append(f"{who}, {group} {k}: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            low, high = (low, high) if sign > 0 else (-high, -low)
            return 1 if low > 0 else -1 if high < MARGIN else 0

        verdict = {1: "reproduced", 0: "undecided", -1: "not reproduced"}[claim(rises)]
        judged.append(dict(claim=sentence, verdict=verdict, intervals="over seeds" if len(changes) > 1 else
                           "over the problems of one seed", evidence=evidence))
    return judged


# ----------------------------------------------------------------------------------------------------------------------
# running the commands


def fingerprint(job):
    """Tells whether a finished job would do the same again: its command, defaults, checkpoints. None if a file is missing."""
    try:
        runs = [load_checkpoint(path).get("run") for path in (*job.needs, job.out) if path.endswith(".pt")]
    except ValueError:
        return None
    presets = getattr(importlib.import_module(job.command[0].removesuffix(".py")), "PRESETS", None)
    text = str([job.command, presets, CONFIGS, runs])
    return hashlib.sha256(text.encode()).hexdigest() if os.path.exists(job.out) else None


def tail(log, count):
    with open(log, encoding="utf-8", errors="replace") as f:
        return "\n".join([line for line in f.read().splitlines() if line.strip()][-count:])


def run_jobs(to_run, limit, prefix, finish):
    """Run jobs side by side, at most `limit`, each after those that make what it needs; finish(job, minutes) after each.

    A job that fails, or Ctrl-C, interrupts the others, which save.
    """
    waiting, running, said = list(to_run), {}, time.time()
    environment = os.environ | dict(word.split("=") for word in prefix)
    try:
        while waiting or running:
            to_come = {job.out for job in (*waiting, *running)}
            for job in [job for job in waiting if not to_come & {*job.needs}][:limit - len(running)]:
                log, began = os.path.splitext(job.out)[0] + ".log", None if os.path.exists(job.out) else time.time()
                os.makedirs(os.path.dirname(log), exist_ok=True)
                say("start:", shown(job, prefix))
                with open(log, "a", encoding="utf-8") as f:
                    f.write(f"$ {shown(job, prefix)}\n")
                    f.flush()
                    process = subprocess.Popen([sys.executable, ROOT / job.command[0], *job.command[1:]], env=environment,
                                               stdout=f, stderr=f, stdin=subprocess.DEVNULL)
                waiting.remove(job)
                running[job] = process, log, began
            time.sleep(0.1)
            for job, (process, log, began) in [*running.items()]:
                if process.poll() is not None:
                    del running[job]
                    if process.returncode:
                        say(f"failed, status {process.returncode}: {shown(job, prefix)}\n{log} ends with\n\n{tail(log, 15)}\n")
                        if os.path.exists(job.out):
                            say(f"if its settings changed, move {job.out} away, and it will be made anew")
                        sys.exit(max(1, process.returncode))
                    finish(job, began and (time.time() - began) / 60)
            if time.time() - said > 30:
                said = time.time()
                for job, (_, log, _) in running.items():
                    say(f"  {job.out}: {tail(log, 1)}")
    finally:
        if running:
            say("waiting for", *[job.out for job in running], "to save")
        for process, _, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _, _ in running.values():
            process.wait()


def shown(job, prefix):
    """The command as a reader can give it."""
    script = os.path.relpath(ROOT / job.command[0])
    return " ".join([*prefix, "python", shlex.join([script, *job.command[1:]])])


# ----------------------------------------------------------------------------------------------------------------------
# results


def read_seed(path, past):
    """The evaluation of one seed: levels and changes against the base, arm -> group -> "pass@k" -> estimate.

    The changes have one more group, "past": the mean over the ops above `past`, the RL data's own. Its intervals over problems
    take the ops for fully dependent and the two models for independent, so they are too wide rather than too narrow.
    """
    with open(path, encoding="utf-8") as f:
        file = json.load(f)
    models = {Path(name).stem: numbers for name, numbers in file["checkpoints"].items()}
    ks = [f"pass@{k}" for k in file["settings"]["k"]]
    levels = {arm: {group: {k: estimate(v["verified"], k) for k in ks} for group, v in m["groups"].items()}
              for arm, m in models.items()}
    changes = {arm: {group: {k: estimate(v, k) for k in ks} for group, v in m["against_first"].items()}
               for arm, m in models.items() if "against_first" in m}
    for arm in changes:
        by_op = {k: [difference(*[estimate(models[name]["ops"][op]["verified"], k) for name in (arm, "base")])
                     for op in models["base"]["ops"] if int(op) > past] for k in ks}
        changes[arm]["past"] = {k: tuple(map(statistics.mean, zip(*estimates))) for k, estimates in by_op.items()}
    return levels, changes, ks


def summarize(seeds, least):
    """The estimates of all seeds as they go into the JSON file. least: the smallest possible value."""
    def numbers(estimates):
        mean, low, high = over_seeds(estimates)
        return dict(mean=mean, interval=[max(least, low), min(1.0, high)], seeds=[value for value, _, _ in estimates])

    return {arm: {group: {k: numbers([seed[arm][group][k] for seed in seeds]) for k in ks} for group, ks in groups.items()}
            for arm, groups in seeds[0].items()}


def table(result, labels, paper):
    """A Markdown table of the levels and changes at one temperature, with the paper's numbers beside them."""
    def cells(numbers, form):
        seeds = " ".join(f"{value:{form}}" for value in numbers["seeds"])
        return [f"{numbers['mean']:{form}} [" + ", ".join(f"{end:{form}}" for end in numbers["interval"]) + "]", seeds]

    rows = [["group", "model", "pass@k", "mean [interval]", "seeds", "change [interval]", "seeds", "paper"]]
    for group in [*result["levels"]["base"], "past"]:
        for arm, label in labels.items():
            level, change = (result[kind].get(arm, {}).get(group, {}) for kind in ("levels", "changes"))  # either may be empty
            theirs = paper.get((group, arm), {})
            for k in level or change:
                same, last = int(k.removeprefix("pass@")), k == [*(level or change)][-1]
                beside = same if same in theirs or not (theirs and last) else max(theirs)
                rows.append([group, label, k, *(cells(level[k], ".3f") if level else ["", ""]),
                             *(cells(change[k], "+.3f") if change else ["", ""]),
                             f"{theirs[beside]:.3f}" + f" (pass@{beside})" * (beside != same) if beside in theirs else ""])
    rows.insert(1, ["---"] * len(rows[0]))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def plot(levels, labels, title, path):
    """Pass@k over k, a panel a group of problems, a line a model: the mean over the seeds, and a band from worst to best."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    groups = [*levels["base"]]
    figure, axes = plt.subplots(1, len(groups), figsize=(4 * len(groups), 3.8), sharey=True, squeeze=False,
                                constrained_layout=True)
    for ax, group in zip(axes[0], groups):
        for arm, color in zip(labels, ["black", *plt.cm.tab10.colors]):
            numbers = {int(k.removeprefix("pass@")): v for k, v in levels[arm][group].items()}
            worst, mean, best = zip(*[(min(v["seeds"]), v["mean"], max(v["seeds"])) for v in numbers.values()])
            ax.plot([*numbers], mean, "--o" if arm == "base" else "-o", color=color, markersize=4, label=labels[arm])
            ax.fill_between([*numbers], worst, best, color=color, alpha=0.15)
        ax.set_xscale("log")
        ax.set_xticks([*numbers], [*numbers])
        ax.minorticks_off()
        ax.set(title=group, xlabel="k", ylim=(-0.02, 1.02))
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("verified pass@k")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def report(args, finding, settings, folder):
    """Table, claims and figure: on the screen and in the files."""
    labels = {"base": "base", **{arm: f"{arm}: RL on op {ops}" for arm, ops in settings["arms"].items()}}
    past = int(settings["arms"]["edge"].split("-")[-1])
    results = {}
    for t in TEMPERATURES:
        levels, changes, (ks, *_) = zip(*[read_seed(f"{folder}/seed{seed}/eval-{t}.json", past) for seed in args.seeds])
        results[t] = dict(levels=summarize(levels, 0.0), changes=summarize(changes, -1.0))
    claims = judge(finding["claims"], changes, ks)
    path = f"{args.out}/{args.finding}"
    with open(f"{path}.json", "w", encoding="utf-8") as f:
        json.dump(dict(finding=args.finding, preset=args.preset, seeds=args.seeds, settings=settings, margin=MARGIN,
                       claims=claims, temperatures=results,
                       paper={" ".join(key): row for key, row in finding["paper"].items()}), f, indent=1)
    judged_at = f"temperature {TEMPERATURES[-1]}"
    lines = [f"# {finding['title']}",
             f"Verified pass@k, preset {args.preset}, seeds {', '.join(map(str, args.seeds))}; 95 % intervals "
             f"{claims[0]['intervals']}. \"past\": the ops above {past}, where the RL data at the edge ends. Claims are judged "
             f"at {judged_at}."]
    for t, result in results.items():
        lines += [f"Temperature {t}:", table(result, labels, finding["paper"] if t == TEMPERATURES[-1] else {})]
    lines += [f"- {c['claim']}: **{c['verdict']}**{' (one seed)' * (len(args.seeds) == 1)}. {'; '.join(c['evidence'])}."
              for c in claims]
    if importlib.util.find_spec("matplotlib"):
        plot(results[TEMPERATURES[-1]]["levels"], labels, f"{finding['title']} ({args.preset}, {judged_at}, bands: all seeds)",
             f"{path}.png")
        lines.append(f"![verified pass@k over k]({args.finding}.png)")
    else:
        say("there is no figure: it needs matplotlib (pip install matplotlib)")
    Path(f"{path}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    say("\n" + "\n\n".join(lines))


# ----------------------------------------------------------------------------------------------------------------------


def seeds(text):
    """An argparse type: 3 -> [0, 1, 2], 4-6 -> [4, 5, 6], 4,6 -> [4, 6]."""
    ends = [[int(end) for end in part.split("-")] for part in (f"0-{int(text) - 1}" if text.isdecimal() else text).split(",")]
    found = sorted({seed for end in ends for seed in range(end[0], end[-1] + 1)})
    if not found:
        raise ValueError
    return found


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("finding", choices=FINDINGS)
    p.add_argument("--seeds", type=seeds, default="3", help="how many, or which: 3, 4-6, 4,6 (default 3: 0, 1 and 2)")
    p.add_argument("--preset", choices=EDGE, default="100m" if cuda else "tiny", help="default: tiny, with CUDA 100m")
    p.add_argument("--out", help="folder (default out/findings, of the preset quick out/quick)")
    p.add_argument("--jobs", type=at_least(1), help="how many commands at a time at most (default: one a core, with CUDA one)")
    p.add_argument("--dry-run", action="store_true", help="print the commands and the expected time, run nothing")
    args = p.parse_args()
    args.out = args.out or ("out/quick" if args.preset == "quick" else "out/findings")
    finding, folder = FINDINGS[args.finding], f"{args.out}/{args.finding}"
    settings = finding["settings"][args.preset]
    limit, prefix = (1, []) if cuda else (min(args.jobs or n_cores(), n_cores()), ["OMP_NUM_THREADS=1"])

    # done: of each finished job, by its file, the fingerprint and the minutes (null if it was resumed on the way)
    done_file = Path(folder, "jobs.json")
    try:
        done = json.loads(done_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it is broken: the stages themselves know what is finished
        done = {}
    jobs = [job for seed in args.seeds for job in finding["jobs"](f"{folder}/seed{seed}", seed, settings)]
    to_run = [job for job in jobs if job.out not in done or done[job.out]["fingerprint"] != fingerprint(job)]
    minutes = dict(settings["minutes"])
    for script in {d["script"] for d in done.values() if d["minutes"]}:
        minutes[script] = statistics.mean([d["minutes"] for d in done.values() if d["script"] == script and d["minutes"]])

    def chain(job):
        """Minutes of the job and of the longest chain of jobs that wait for it. The longest starts first."""
        return minutes.get(job.command[0], 1) + max((chain(other) for other in to_run if job.out in other.needs), default=0)

    to_run.sort(key=chain, reverse=True)
    known = all(job.command[0] in minutes for job in to_run)
    ends, cores = {}, [0] * limit  # when each job and, so far, each core is done
    for job in to_run:
        cores.sort()
        cores[0] = ends[job.out] = minutes.get(job.command[0], 0) + max(cores[0], *[ends.get(path, 0) for path in job.needs], 0)
    say(f"{args.finding}, preset {args.preset}, seeds {args.seeds}: {len(to_run)} commands to run, {limit} at a time, "
        f"{len(jobs) - len(to_run)} finished; expected time: "
        + (f"about {max(cores):.0f} minutes" if known else "not known; each log says that of its command"))
    if args.dry_run:
        for job in jobs:
            say(shown(job, prefix) + ("" if job in to_run else "   # finished"))
        return

    with one_line_errors(p):
        check_outputs(str(done_file), *[f"{folder}.{kind}" for kind in ("json", "md", "png")])

    def finish(job, took):
        done[job.out] = dict(script=job.command[0], fingerprint=fingerprint(job), minutes=took)
        Path(f"{done_file}.part").write_text(json.dumps(done, indent=1), encoding="utf-8")
        os.replace(f"{done_file}.part", done_file)
        say(f"done: {job.out}" + (f", {took:.1f} minutes" if took else ""))

    run_jobs(to_run, limit, prefix, finish)
    report(args, finding, settings, folder)


if __name__ == "__main__":
    run_script(main)
