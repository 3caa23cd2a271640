"""
The findings of arXiv 2512.07783 and its open questions, each as an experiment that ends with verdicts.

    python tests/findings.py edge                    with three seeds, 0, 1 and 2
    python tests/findings.py edge --dry-run          the commands and the expected time; runs nothing
    python tests/findings.py edge --seeds 4-6        other seeds; also 4,6
    python tests/findings.py edge --preset quick     a few steps of everything, minutes, to see that it works: its verdicts mean
                                                     nothing

    edge        finding 1. RL from the pre-trained base, as many steps each on problems of its own range, of the edge just past
                it, and on problems that are too hard. Where does RL add ability?
    seeding     finding 2. Pre-training sees of a second context op 2 only, as 0 to 10 % of its problems. When does RL carry
                the higher ops over?
    budget      finding 3. A budget of training tokens, two sizes of it, shared between mid-training and RL. Which share is best?
    reward      finding 4. RL at the edge with six rewards. Which of them reduce right answers by wrong reasoning?
    questions   what the paper leaves open: a curriculum, a judge that errs, mistakes in mid-training, RL early in pre-training,
                the size of the model

It runs the command lines of the stages, which it prints, several at a time on a CPU, and ends with a table, a figure and a
verdict a claim: --out has NAME.json, NAME.md and NAME.png, and in folders the checkpoints, evaluations and logs. The base of a
seed is trained once for all findings but seeding, which has its own. Ctrl-C saves; the same command goes on where it stopped,
and does not repeat what is finished. Other seeds with the same --out replace NAME.json.

Statistics. The numbers are verified pass@k. A change is the difference between a model and the one it started from, problem by
problem. Every seed has its own models and its own problems, so the variance of a change over seeds holds what differs between
runs and what differs between problems, and the interval "over seeds" is the plain t interval, mean +- t s / sqrt(n) with n - 1
degrees of freedom. But it is never taken narrower than the intervals over problems make that of the mean: few seeds may agree
by luck. With one seed the interval is the one over problems, and the verdict says so. A number rises if its interval lies above
0, and does not if its interval lies below the `margin` of the finding, which is well below what the paper reports. So a claim of
the paper is "reproduced" or "not reproduced", one of ours, in `questions`, "holds" or "does not hold", and "undecided" if the
numbers do neither. A claim with several comparisons is not corrected for their number.
"""
import argparse
import datetime
import hashlib
import importlib.util
import json
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple, Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model import CONFIGS, at_least, check_outputs, load_checkpoint, lock, n_cores, one_line_errors, run_script, say  # noqa: E402
from evaluate import COLORS, pass_at_k  # noqa: E402
from verify import interval  # noqa: E402
import data  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402  after model.py, which sets how its threads wait

T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, 97.5 %, 1 to 10 degrees of freedom


class Model(NamedTuple):
    """A checkpoint of an experiment, and how it is made."""
    init: Optional[str]  # the model that it starts from
    command: str         # a stage and its options, but those for files and the seed
    minutes: float       # that it takes with one thread and the preset tiny, about
    label: str = ""      # in table and figure; without one it is not evaluated
    kept: int = 0        # if it is not made by a command, but kept by --keep-every at this step of init
    finding: str = ""    # that it belongs to, if several use it


class Job(NamedTuple):
    out: str             # the file that it makes
    command: tuple       # a script and its options
    needs: tuple         # the checkpoints that it reads
    minutes: float
    kept: tuple = ()     # other files that it makes


# ----------------------------------------------------------------------------------------------------------------------
# the findings: preset -> what makes up an experiment.
#     models     by their names
#     evaluate   options of an evaluation, by its name
#     tables     the evaluations that get a table each; claims are judged by the last
#     regions    parts of a table, by name: ops, and the evaluation that they are from if it is not that of the table
#     drawn      the regions in the figure

EARLY = {"tiny": 4500, "100m": 14_250, "quick": 150}  # three quarters of the steps of pre-training
QUICK = "--preset tiny --n-layers 1 --width 32 --n-heads 2 --n-kv-heads 1 --mlp 64 --batch 8 --save-every 20 --show 0"
PRETRAIN = {"tiny": "pretrain.py --preset tiny", "100m": "pretrain.py --preset 100m",
            "quick": f"pretrain.py {QUICK} --ops 2-4 --steps 200"}
MIDTRAIN = {"tiny": "midtrain.py", "100m": "midtrain.py", "quick": "midtrain.py --batch 8 --show 0"}
RL = {"tiny": "grpo.py", "100m": "grpo.py",
      "quick": "grpo.py --prompts 2 --rollouts 2 --updates 1 --max-new 16 --eval-problems 1"}
MANY = {"tiny": "--n 64 --k 1,4,16,64 --problems 64", "100m": "--n 128 --k 1,8,128 --problems 200",
        "quick": "--n 4 --k 1,4 --problems 2"}
FEWER = MANY | {"tiny": "--n 16 --k 1,4,16 --problems 96"}
GROUPS = {preset: {name: f"{low}-{high}" for name, (low, high) in data.op_groups(ops).items()}
          for preset, ops in {"tiny": (2, 8), "100m": (2, 10), "quick": (2, 4)}.items()}
AT_THE_EDGE = {"tiny": "--ops 9-11 --id-share 0.2", "100m": "--ops 11-14 --id-share 0", "quick": "--ops 5 --id-share 0.2"}


def base(preset):
    return Model(None, f"{PRETRAIN[preset]} --keep-every {EARLY[preset]}", 23, "base")


BUDGETS = {"tiny": ("5e6", "15e6"), "100m": ("3.2e8", "2.6e9"), "quick": ("2e3", "4e3")}
# 100m: the problems of 1.05B and 8.4B tokens of the paper, whose tokenizer needs 588 for a row of op 11-14, ours 181


def within_budget(preset, name, init, tokens, share, label, speed=1.25e6, finding="budget"):
    """The models that mid-training and RL make of init with a budget of training tokens: the last by this name, and the one in
    between. speed: tokens of mid-training a minute."""
    of_budget, minutes = f"--budget {tokens} --rl-share {share}", float(tokens) / speed
    mid = Model(init, f"{MIDTRAIN[preset]} {of_budget}", minutes * (1 - float(share)), finding=finding)
    rl = mid._replace(init=init if share == "1" else f"{name} mid", command=f"{RL[preset]} {of_budget}",
                      minutes=minutes * float(share) * 0.7, label=label)
    if share == "0":
        return {name: mid._replace(label=label)}
    return {name: rl} if share == "1" else {f"{name} mid": mid, name: rl}


def edge(preset):
    arms = dict(zip(("id", "edge", "hard"), {"tiny": ("5-8", "9-11", "14-16"), "100m": ("7-10", "11-14", "17-20"),
                                             "quick": ("3-4", "5", "8")}[preset]))
    options = {"tiny": "--id-share 0.2 --steps 220", "100m": "--id-share 0", "quick": "--id-share 0.2 --steps 3"}[preset]
    past = int(arms["edge"].split("-")[-1]) + 1
    return dict(
        models={"base": base(preset)} | {name: Model("base", f"{RL[preset]} --ops {ops} {options}", 11, f"RL on op {ops}")
                                         for name, ops in arms.items()},
        evaluate={t: f"{MANY[preset]} --temperature {t}" for t in ("1.0", "0.7")}, tables=("1.0", "0.7"), evaluate_minutes=1.4,
        regions=GROUPS[preset] | {"past": "{}-{}".format(past, GROUPS[preset]["OOD-hard"].split("-")[1])}, drawn=GROUPS[preset])


# Each claim gets the function rises(model, region, measure, than, sign) of `judge`: 1 for yes, -1 for no, 0 for undecided. So
# "not" is a minus, "and" is min, "or" is max
EDGE_CLAIMS = {
    "With data from the edge RL adds ability there (pass@k of the largest k), with other data none or less": lambda rises: min(
        rises("edge", "OOD-edge"),
        *[max(-rises(name, "OOD-edge"), rises("edge", "OOD-edge", than=name)) for name in ("id", "hard")]),
    "That ability reaches past the range of the RL data": lambda rises: rises("edge", "past"),
    "With data from the base's own range RL adds no ability anywhere, and lifts pass@1 in that range at most": lambda rises: min(
        -rises("id", "ID", "pass@1", sign=-1), -rises("id", "ID"), *[
            -rises("id", group, k) for group in ("OOD-edge", "OOD-hard") for k in ("pass@1", None)]),
    # not pass@1 of ID, which the share of ID that all arms have may raise
    "Data that is too hard changes nothing or harms": lambda rises: min(
        -rises("hard", group, k) for group, k in (("ID", None), ("OOD-edge", None), ("OOD-edge", "pass@1"), ("OOD-hard", None),
                                                  ("OOD-hard", "pass@1"))),
}

EXPOSURES = {"0": "0 %", "0.001": "0.1 %", "0.01": "1 %", "0.1": "10 %"}


def seeding(preset):
    pretrain, rl, ops = {"tiny": ("--preset tiny --steps 3000", " --steps 120", "2-6"), "100m": ("--preset 100m", "", "2-20"),
                         "quick": (f"{QUICK} --steps 20", " --steps 3", "2-4")}[preset]
    m, M = map(int, ops.split("-"))
    models = {}
    for share, percent in EXPOSURES.items():
        mix = f"zoo:{ops}:{1 - float(share):g}" + f",school:{m}:{share}" * (share != "0")
        models[f"base {share}"] = Model(None, f"pretrain.py {pretrain} --mix {mix}", 10, f"{percent}, base")
        models[f"rl {share}"] = Model(f"base {share}", f"{RL[preset]} --mix zoo:{ops}:0.5,school:{ops}:0.5{rl}", 4,
                                      f"{percent}, RL")
    one_op = {f"school op {op}": str(op) for op in (2, 3, 4, 5, 6, 10, 14, 20) if op <= M}
    return dict(models=models, tables=("school",), evaluate_minutes=0.2,
                evaluate={context: f"{FEWER[preset]} --context {context} --ops {ops}" for context in ("school", "zoo")},
                regions=one_op | {"school, higher ops": f"{m + 1}-{M}", "zoo": (ops, "zoo")},
                drawn=(f"school op {m}", "school, higher ops", "zoo"))


SEEDING_CLAIMS = {
    "From 1 % on RL carries the higher ops over": lambda rises: min(
        rises(f"rl {share}", "school, higher ops") for share in ("0.01", "0.1")),
    # not "at 0.1 % nothing": the paper has .32 at op 3, and ours are smaller ops
    "At 0 % RL carries nothing over, and at 0.1 % less than at 1 %": lambda rises: min(
        -rises("rl 0", "school, higher ops"), rises("rl 0.01", "school, higher ops", than="rl 0.001")),
}

SHARES = ("0", "0.2", "0.5", "0.8", "1")


def budget(preset):
    models = {"base": base(preset)}
    for size, tokens in zip(("small", "large"), BUDGETS[preset]):
        for share in SHARES:
            models |= within_budget(preset, f"{size} {share}", "base", tokens, share, f"{tokens} tokens, RL {float(share):.0%}")
    return dict(models=models, evaluate={"0.7": FEWER[preset]}, tables=("0.7",), evaluate_minutes=0.5, regions=GROUPS[preset],
                drawn=GROUPS[preset])


BUDGET_CLAIMS = {
    "A light share of RL (20 %) is best at the edge in pass@1": lambda rises: min(
        rises(f"{size} 0.2", "OOD-edge", "pass@1", than=f"{size} {share}") for size in ("small", "large") for share in SHARES
        if share != "0.2"),
    "A heavy share of RL (80 %) beats a light one at OOD-hard in pass@1": lambda rises: min(
        rises(f"{size} 0.8", "OOD-hard", "pass@1", than=f"{size} 0.2") for size in ("small", "large")),
    "With the smaller budget mid-training and RL, half and half, beat RL alone at OOD-hard in pass@k": lambda rises: rises(
        "small 0.5", "OOD-hard", than="small 1"),
    "With the larger budget RL alone gains on half and half (OOD-hard, pass@k)": lambda rises: rises(
        {"large 1": 1, "large 0.5": -1, "small 1": -1, "small 0.5": 1}, "OOD-hard"),
}

REWARDS = {"outcome": "outcome", "process": "process", "mixed 0.2": "mixed --alpha 0.2", "mixed 0.5": "mixed --alpha 0.5",
           "verified": "verified", "strict": "strict"}


def reward(preset):
    options = AT_THE_EDGE[preset] + {"tiny": " --steps 150", "100m": "", "quick": " --steps 3"}[preset]
    first, last = GROUPS[preset]["ID"].split("-")[0], GROUPS[preset]["OOD-hard"].split("-")[1]
    return dict(
        models={"base": base(preset)} | {name: Model("base", f"{RL[preset]} {options} --reward {reward}", 8, name)
                                         for name, reward in REWARDS.items()},
        evaluate={"0.7": FEWER[preset]}, tables=("0.7",), evaluate_minutes=0.5,
        regions=GROUPS[preset] | {"all": f"{first}-{last}"}, drawn=[*GROUPS[preset], "all"])


REWARD_CLAIMS = {
    "The reward for the answer alone has the most right answers by wrong reasoning": lambda rises: min(
        rises("outcome", "all", "hacked", than=name) for name in REWARDS if name != "outcome"),
    "The reward for the answer alone has the lowest verified pass@1": lambda rises: min(
        rises(name, "all", "pass@1", than="outcome") for name in REWARDS if name != "outcome"),
}


def questions(preset):
    steps = {"tiny": " --steps 60", "100m": "", "quick": " --steps 3"}[preset]
    rl, at_the_edge, mid = RL[preset] + steps, f"{RL[preset]}{steps} {AT_THE_EDGE[preset]}", MIDTRAIN[preset]
    everything = GROUPS[preset]["ID"].split("-")[0] + "-" + GROUPS[preset]["OOD-hard"].split("-")[1]
    tokens, smaller = BUDGETS[preset][0], {"tiny": "--n-layers 3 --width 96 --n-heads 3 --n-kv-heads 1 --mlp 288",
                       "100m": "--n-layers 6 --width 512 --n-heads 8 --mlp 2048", "quick": "--width 16 --steps 20"}[preset]
    models = {
        "base": base(preset), "early base": Model("base", "", 0, "base, 3/4 of its steps", kept=EARLY[preset]),
        "static": Model("base", at_the_edge, 4, "RL at the edge"),
        "early": Model("early base", at_the_edge, 4, "3/4, RL at the edge"),
        "curriculum": Model("base", f"{rl} --curriculum", 4, "curriculum"),
        "uniform": Model("base", f"{rl} --ops {everything} --id-share 0", 4, "same ops, evenly"),
        "positives": Model("base", f"{at_the_edge} --reward-noise 0.2,0", 4, "20 % false positives"),
        "negatives": Model("base", f"{at_the_edge} --reward-noise 0,0.2", 4, "20 % false negatives"),
        "right mid": Model("base", mid, 3, "mid-training"), "right": Model("right mid", rl, 4, "mid-training, RL"),
        "wrong mid": Model("base", f"{mid} --wrong-steps 0.2", 3, "20 % mistaken"),
        "wrong": Model("wrong mid", rl, 4, "20 % mistaken, RL"),
        "smaller": Model(None, f"{PRETRAIN[preset]} {smaller}", 9, "smaller base")}
    for share in ("0.2", "0.8"):
        label = f"{tokens} tokens, RL {float(share):.0%}"
        models |= within_budget(preset, f"small {share}", "base", tokens, share, label)  # of finding 3
        models |= within_budget(preset, f"smaller {share}", "smaller", tokens, share, f"smaller, {label}", 2.5e6, "questions")
    return dict(models=models, evaluate={"0.7": FEWER[preset]}, tables=("0.7",), evaluate_minutes=0.5, regions=GROUPS[preset],
                drawn=GROUPS[preset])


QUESTION_CLAIMS = {
    "A curriculum over all ops beats the same ops evenly (edge, pass@1)": lambda rises: rises(
        "curriculum", "OOD-edge", "pass@1", than="uniform"),
    "A curriculum over all ops beats RL on the edge alone (edge, pass@1)": lambda rises: rises(
        "curriculum", "OOD-edge", "pass@1", than="static"),
    "A judge with false negatives is better than one with false positives (edge, pass@1)": lambda rises: rises(
        "negatives", "OOD-edge", "pass@1", than="positives"),
    "Mistakes in mid-training still cost after RL (edge, pass@1)": lambda rises: rises(
        "right", "OOD-edge", "pass@1", than="wrong"),
    "RL gains more from the finished base than from three quarters of it (edge, pass@k)": lambda rises: rises(
        {"static": 1, "base": -1, "early": -1, "early base": 1}, "OOD-edge"),
    "A larger share of RL suits the larger model better than the smaller (edge, pass@1)": lambda rises: rises(
        {"small 0.8": 1, "small 0.2": -1, "smaller 0.8": -1, "smaller 0.2": 1}, "OOD-edge", "pass@1"),
}

# ----------------------------------------------------------------------------------------------------------------------
# statistics. An estimate is (value, low, high) with a 95 % interval


class Evaluation(NamedTuple):
    """What evaluate.py wrote, by the model's name: how many of n samples of each problem are right, and so on."""
    n: int
    ks: list
    counts: dict     # model -> {"op": array, "verified": array, ...}
    baseline: dict   # op -> share of right answers without reasoning


def read_evaluation(path, names):
    with open(path, encoding="utf-8") as f:
        file = json.load(f)
    counts = {name: {key: np.array(values) for key, values in of_model.items()}
              for name, of_model in zip(names, file["by_problem"].values(), strict=True)}
    baseline = {int(op): numbers["baseline"] for op, numbers in next(iter(file["checkpoints"].values()))["ops"].items()}
    return Evaluation(file["settings"]["n"], file["settings"]["k"], counts, baseline)


def estimate(evaluation, weights, ops, measure):
    """The weighted sum of models, {name: weight}, in a measure on some ops. So {"a": 1} is the level of a, {"a": 1, "b": -1} what
    a has more than b. measure: "pass@k", verified, or another count of evaluate.by_problem as a share of the samples."""
    total = 0.0
    for name, weight in weights.items():
        counts = evaluation.counts[name]
        chosen = np.isin(counts["op"], data.parse_ops(ops))
        values = (pass_at_k(evaluation.n, counts["verified"][chosen], int(measure[5:])) if measure.startswith("pass@")
                  else counts[measure][chosen] / evaluation.n)
        total = total + weight * values
    low, high = (sum(w for w in weights.values() if (w > 0) == positive) for positive in (False, True))
    return float(total.mean()), *interval(total, low, high, clip=False).tolist()


def over_seeds(estimates):
    """The mean over seeds and its interval, see above."""
    if len(estimates) == 1:
        return estimates[0]
    values, n = [value for value, _, _ in estimates], len(estimates)
    of_seeds = T[min(n - 1, len(T)) - 1] * statistics.stdev(values) / math.sqrt(n)
    of_problems = math.sqrt(statistics.mean(((high - low) / 2) ** 2 for _, low, high in estimates) / n)
    half = max(of_seeds, of_problems)
    return statistics.mean(values), statistics.mean(values) - half, statistics.mean(values) + half


# the words for -1, 0 and 1
OF_THE_PAPER, OURS = ("not reproduced", "undecided", "reproduced"), ("does not hold", "undecided", "holds")


def judge(claims, estimates, against, k, margin, verdicts=OF_THE_PAPER):
    """Sentences, verdicts and the numbers they rest on. estimates(weights, region, measure): a list with one of each seed.
    against: model -> the model whose change it is. k: the largest, as "pass@k"."""
    judged = []
    for sentence, claim in claims.items():
        evidence, n_seeds = [], set()

        def rises(model, region, measure=k, than=None, sign=1):
            """Whether a model's change or, with `than`, its lead over another, is above 0; with sign -1, below. model may be
            weights, too."""
            weights = model if isinstance(model, dict) else {model: 1, than or against[model]: -1}
            of_seeds = estimates(weights, region, measure or k)
            mean, low, high = over_seeds(of_seeds)
            n_seeds.add(len(of_seeds))
            who = " ".join(f"{'+-'[w < 0]} {name}" for name, w in weights.items()).removeprefix("+ ")
            least, most = (sum(w for w in weights.values() if (w > 0) == positive) for positive in (False, True))
            evidence.append(f"{who}, {region}, {measure or k}: {mean:+.3f} [{max(low, least):+.3f}, {min(high, most):+.3f}]")
            low, high = (low, high) if sign > 0 else (-high, -low)
            return 1 if low > 0 else -1 if high < margin else 0

        verdict = verdicts[claim(rises) + 1]  # this fills evidence and n_seeds
        judged.append(dict(claim=sentence, verdict=verdict, intervals="over the problems of one seed" if n_seeds == {1} else
                           "over seeds", evidence=evidence))
    return judged


# ----------------------------------------------------------------------------------------------------------------------
# running the commands


def checkpoints(models, out, name, seed):
    """{model: its file}. The base is that of all findings."""
    files = {}
    for model, how in models.items():
        own = f"{how.finding or name}/seed{seed}/{model.replace(' ', '_')}.pt"
        files[model] = f"{out}/" + (f"base/seed{seed}.pt" if model == "base" else own)
        if how.kept:
            files[model] = f"{files[how.init].removesuffix('.pt')}-{how.kept}.pt"
    return files


def jobs_of(settings, out, name, seed):
    """The commands of one seed."""
    models, files, jobs = settings["models"], checkpoints(settings["models"], out, name, seed), []
    for model, (init, command, minutes, _, kept_at, _) in models.items():
        if kept_at:
            continue
        script, *options = shlex.split(command)
        start = ["--init", files[init]] if init else []
        needs = [files[init]] if init else []
        if init and models[init].kept:  # it comes with that which keeps it
            needs.append(files[models[init].init])
        kept = [files[other] for other, how in models.items() if how.kept and how.init == model]
        jobs.append(Job(files[model], (script, *start, *options, "--seed", str(seed), "--out", files[model], "--resume"),
                        tuple(needs), minutes, tuple(kept)))
    evaluated = [files[model] for model, how in models.items() if how.label]
    needs = {job.out for job in jobs} & {*evaluated, *[files[how.init] for how in models.values() if how.kept]}
    for tag, options in settings["evaluate"].items():
        path = f"{out}/{name}/seed{seed}/eval-{tag}.json"
        jobs.append(Job(path, ("evaluate.py", *evaluated, *options.split(), "--seed", str(seed), "--json", path),
                        tuple(sorted(needs)), settings["evaluate_minutes"] * len(evaluated)))
    return jobs


def fingerprint(job, preset):
    """Tells whether a finished job would do the same again: its command, defaults, checkpoints. None if a file is not there."""
    try:
        runs = [load_checkpoint(path).get("run") for path in (*job.needs, job.out) if path.endswith(".pt")]
    except ValueError:
        return None
    stage, size = importlib.import_module(job.command[0].removesuffix(".py")), preset.replace("quick", "tiny")
    presets = getattr(stage, "PRESETS", {})
    text = str([job.command, presets.get(size), CONFIGS[size], runs])
    return hashlib.sha256(text.encode()).hexdigest() if all(map(os.path.exists, (job.out, *job.kept))) else None


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


def against(models):
    """{model: the model whose change it is}: the last one before it that is evaluated."""
    before = {}
    for model, how in models.items():
        init = how.init
        while init and not models[init].label:
            init = models[init].init
        if init and how.label and not how.kept:
            before[model] = init
    return before


def compute(models, files):
    """{model: (training tokens past pre-training as the paper counts them, as they were spent)}, in millions."""
    def last_row(model):
        with open(files[model].removesuffix(".pt") + ".jsonl", encoding="utf-8") as f:
            return json.loads(f.read().splitlines()[-1])

    found = {}
    for model, how in models.items():
        before = found.get(how.init, (0.0, 0.0))
        row = last_row(model) if how.init and not how.kept else dict(tokens=0)
        mine = [row.get(name, row["tokens"]) / 1e6 for name in ("training_tokens", "spent_tokens")]
        found[model] = tuple(a + b for a, b in zip(before, mine))
    return found


def table(numbers, labels, measures, paper):
    """A Markdown table: of each measure the mean over the seeds (and each seed) and, of pass@k, the change [interval].

    numbers: region -> model -> measure -> {"level": ..., "change": ...}; paper: (region, model) -> two cells.
    """
    def short(x, sign=""):
        return f"{x:{sign}.3f}".replace("0.", ".")

    def cells(measure, level, change):
        seeds = f" ({' '.join(map(short, level['seeds']))})" * (len(level["seeds"]) > 1)
        changed = "{} [{} {}]".format(*(short(x, "+") for x in (change["mean"], *change["interval"]))) if change else ""
        return [short(level["mean"]) + seeds, *[changed] * measure.startswith("pass@")]

    titles = [title for measure in measures for title in (measure, *["change"] * measure.startswith("pass@"))]
    rows = [["", "model", *titles, *["paper, pass@1", "pass@128"] * bool(paper)]]
    rows.append(["---"] * len(rows[0]))
    for region, models in numbers.items():
        rows += [[region, labels[model], *[cell for measure in measures for cell in cells(measure, **of_model[measure])],
                  *(paper.get((region, model), ("", "")) if paper else ())] for model, of_model in models.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows)


def plot_over_k(axes, numbers, labels, stages, ks):
    """Pass@k over k, a panel a region, a line a model: the mean over the seeds, and a band from worst to best."""
    for ax, region in zip(axes, numbers):
        for (model, label), color in zip(labels.items(), (COLORS["pretrain"], "tab:green", COLORS["grpo"], "tab:purple"),
                                           strict=True):
            levels = {int(k[5:]): numbers[region][model][k]["level"] for k in ks}
            worst, mean, best = zip(*[(min(v["seeds"]), v["mean"], max(v["seeds"])) for v in levels.values()])
            ax.plot([*levels], mean, "--o" if model == "base" else "-o", color=color, markersize=4, label=label)
            ax.fill_between([*levels], worst, best, color=color, alpha=0.15)
        ax.set_xscale("log")
        ax.set_xticks([*levels], [*levels])
        ax.minorticks_off()
        ax.set(title=region, xlabel="k", ylim=(-0.02, 1.02))
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("verified pass@k")
    axes[0].legend(fontsize=8)


def plot_arms(axes, numbers, labels, stages, ks):
    """A row a model in the color of its stage, a panel a region: pass@1 (filled) and pass@(largest k), the interval over seeds,
    and a dot a seed."""
    for ax, region in zip(axes, numbers):
        for k, fill, shift in ((ks[0], None, 0.15), (ks[-1], "white", -0.15)):
            for row, model in enumerate(labels):
                level, y, color = numbers[region][model][k]["level"], len(labels) - row + shift, COLORS[stages[model]]
                ax.plot(level["interval"], [y, y], color=color, linewidth=1.5, alpha=0.6, zorder=1)
                ax.plot(level["seeds"], [y] * len(level["seeds"]), ".", color=color, alpha=0.6, markersize=4, zorder=1)
                ax.plot(level["mean"], y, "o", color=color, markerfacecolor=fill, markersize=5, label=k if row == 0 else None)
        ax.set_yticks([len(labels) - row for row in range(len(labels))], labels.values())
        ax.set(title=region, xlabel="verified", xlim=(-0.02, 1.02))
        ax.grid(axis="x", alpha=0.3)
    axes[-1].legend(fontsize=8)


def machine():
    """Of the report: on what, and when."""
    name = platform.processor() or platform.machine()
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{n_cores()} cores of {name}, torch {torch.__version__.split('+')[0]}, {datetime.date.today()}"


def report(args, finding, settings, minutes):
    """Table, claims and figure: on the screen and in the files. minutes: of the jobs, by the file that they made."""
    models, tables = settings["models"], settings["tables"]
    labels = {model: how.label for model, how in models.items() if how.label}
    files = {seed: checkpoints(models, args.out, args.finding, seed) for seed in args.seeds}
    evaluations = {tag: [read_evaluation(f"{args.out}/{args.finding}/seed{seed}/eval-{tag}.json", labels) for seed in args.seeds]
                   for tag in settings["evaluate"]}
    ks = [f"pass@{k}" for k in evaluations[tables[-1]][0].ks]
    regions = {name: of if isinstance(of, tuple) else (of, None) for name, of in settings["regions"].items()}

    def estimates(weights, region, measure, tag=tables[-1]):
        ops, only = regions[region]
        return [estimate(evaluation, weights, ops, measure) for evaluation in evaluations[only or tag]]

    def numbers(weights, region, measure, tag):
        of_seeds = estimates(weights, region, measure, tag)
        mean, low, high = over_seeds(of_seeds)
        least = sum(w for w in weights.values() if w < 0)
        return dict(mean=mean, interval=[max(least, low), min(1.0, high)], seeds=[value for value, _, _ in of_seeds])

    before = against(models)
    results = {tag: {region: {model: {measure: dict(
        level=numbers({model: 1}, region, measure, tag),
        change=numbers({model: 1, before[model]: -1}, region, measure, tag) if model in before else None)
        for measure in [*ks, *finding["measures"]]} for model in labels} for region in regions} for tag in tables}
    claims = judge(finding["claims"], estimates, before, ks[-1], finding["margin"], finding["verdicts"])
    baseline = {region: statistics.mean(evaluation.baseline[op] for evaluation in evaluations[only or tables[-1]]
                                        for op in data.parse_ops(ops)) for region, (ops, only) in regions.items()}
    spent = [compute(models, of_seed) for of_seed in files.values()]
    spent = {model: [statistics.mean(values) for values in zip(*[of_seed[model] for of_seed in spent])] for model in labels}
    took = {model: [minutes.get(of_seed[model]) for of_seed in files.values()] for model, how in models.items() if how.command}

    path, where = f"{args.out}/{args.finding}", machine()
    with open(f"{path}.json", "w", encoding="utf-8") as f:
        json.dump(dict(finding=args.finding, preset=args.preset, seeds=args.seeds, machine=where, margin=finding["margin"],
                       models={model: how._asdict() for model, how in models.items()}, evaluate=settings["evaluate"],
                       regions=settings["regions"], claims=claims, numbers=results, no_reasoning=baseline,
                       million_tokens_counted_and_spent=spent, minutes=took), f, indent=1)
    known = {model: [m for m in of_model if m] for model, of_model in took.items()}
    lines = [f"# {finding['title']}",
             f"`python tests/findings.py {args.finding} --preset {args.preset} --seeds {as_option(args.seeds)}`, {where}. "
             f"Verified pass@k; 95 % intervals {claims[0]['intervals']}. A change is against the model that this one started from. "
             f"{finding['note']}".strip()]
    for tag, of_table in results.items():
        lines += [f"Evaluated with `{settings['evaluate'][tag]}`: mean over seeds (seeds), change [interval].",
                  table(of_table, labels, [ks[0], ks[-1], *finding["measures"]], finding["paper"] if tag == tables[-1] else {})]
    lines += [f"The paper: {finding['paper_says']}"]
    lines += ["Right answers without reasoning (the most frequent answer of an op, or the last number of the problem): "
              + ", ".join(f"{region} {share:.3f}" for region, share in baseline.items()) + "."]
    lines += ["Training tokens past pre-training, in millions, as the paper counts them / as they were spent: "
              + ", ".join(f"{labels[model]} {counted:.1f} / {real:.1f}" for model, (counted, real) in spent.items() if counted)
              + "."]
    lines += ["Minutes, " + ("in turn" if torch.cuda.is_available() else "one thread each") + ", mean of the runs that were not "
              "interrupted: " + ", ".join(f"{labels.get(model) or model} {statistics.mean(of_model):.1f}"
                                          for model, of_model in known.items() if of_model) + "."]
    lines += [f"- {c['claim']}: **{c['verdict']}**{' (one seed)' * (len(args.seeds) == 1)}. {'; '.join(c['evidence'])}."
              for c in claims]
    if importlib.util.find_spec("matplotlib"):
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        drawn = {region: of_region for region, of_region in results[tables[-1]].items() if region in settings["drawn"]}
        width, height = (3, 3.6) if finding["plot"] is plot_over_k else (3.4, 1.2 + 0.3 * len(labels))
        figure, axes = plt.subplots(1, len(drawn), figsize=(width * len(drawn), height), sharey=True, squeeze=False,
                                    constrained_layout=True)
        stages = {model: shlex.split(how.command or models[how.init].command)[0].removesuffix(".py")
                  for model, how in models.items() if how.label}
        finding["plot"](axes[0], drawn, labels, stages, ks)
        figure.suptitle(f"{finding['title']} ({args.preset}, seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))})")
        figure.savefig(f"{path}.png", dpi=150)
        lines.append(f"![{finding['title']}]({args.finding}.png)")
    else:
        say("there is no figure: it needs matplotlib (pip install matplotlib)")
    Path(f"{path}.md").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    say("\n" + "\n\n".join(lines))


FINDINGS = {
    "edge": dict(
        settings=edge, claims=EDGE_CLAIMS, margin=0.05, measures=(), plot=plot_over_k, verdicts=OF_THE_PAPER,
        title="RL adds ability at the edge of competence",
        note="\"past\": the ops past the RL data at the edge.",
        paper={  # region, model: pass@1, pass@128
            ("ID", "base"): (".831", ".993"), ("ID", "edge"): (".826", ".982"), ("OOD-edge", "base"): (".17", ".44"),
            ("OOD-edge", "id"): (".22", ".42"), ("OOD-edge", "edge"): (".51", ".86"), ("OOD-edge", "hard"): (".185", ".40")},
        paper_says="read off its figures; its ID weights 20/30/50 % by difficulty, ours counts every op the same."),
    "seeding": dict(
        settings=seeding, claims=SEEDING_CLAIMS, margin=0.05, measures=("outcome", "named"), plot=plot_arms,
        verdicts=OF_THE_PAPER, title="RL carries reasoning into a context that pre-training has seeded",
        note="\"outcome\" is the share of samples with the right answer, \"named\" of those that define a quantity that is needed.",
        paper={(f"school op {op}", f"rl {share}"): ("", pass_at_128) for share, of_share in {
            "0": ("0",) * 7, "0.001": ("1", ".32", ".08", ".02", "0", "0", "0"),
            "0.01": ("1", ".98", ".99", ".98", ".92", ".77", ".61"), "0.1": ("1", ".99", ".99", ".99", ".96", ".85", ".68")}.items()
            for op, pass_at_128 in zip((2, 3, 4, 6, 10, 14, 20), of_share)},
        paper_says="pass@128 read off its figures; it saw op 2-20 of the first context, and op 2 of the second."),
    "budget": dict(
        settings=budget, claims=BUDGET_CLAIMS, margin=0.02, measures=(), plot=plot_arms, verdicts=OF_THE_PAPER,
        title="A budget shared between mid-training and RL",
        note="A budget is in training tokens, and a token of RL counts 5/3. RL 0 % is mid-training on right solutions alone.",
        paper={}, paper_says="OOD-hard pass@128 by op 15-20: mid-training and RL .79 .47 .33 .13 .025 0, RL alone .63 .30 .14 .03 .005 "
        "0; light RL is best at the edge in pass@1 at every budget, heavy RL at OOD-hard in pass@1; from 8.4B tokens on RL alone is "
        "best at OOD-hard in pass@128."),
    "reward": dict(
        settings=reward, claims=REWARD_CLAIMS, margin=0.01, measures=("outcome", "hacked"), plot=plot_arms, verdicts=OF_THE_PAPER,
        title="Rewards for the process reduce right answers by wrong reasoning",
        note="\"outcome\" is the share of samples with the right answer, \"hacked\" of those with it by wrong reasoning.",
        paper={}, paper_says="RL on op 11-14, outcome alone: pass@1 .707 on op 2-14, .056 on 15-20; pass@128 .947, .232. Against it, "
        "mixed 0.2 +.047 +.043 -.000 +.045, mixed 0.5 +.046 +.034 -.001 +.030, strict +.052 +.041 +.003 +.026."),
    "questions": dict(
        settings=questions, claims=QUESTION_CLAIMS, margin=0.02, measures=(), plot=plot_arms, verdicts=OURS,
        title="Open questions",
        note="The base at 3/4 of its steps still has a high learning rate behind it, the finished one does not.",
        paper={}, paper_says="leaves these open."),
}

# ----------------------------------------------------------------------------------------------------------------------


def seeds(text):
    """An argparse type: 3 -> [0, 1, 2], 4-6 -> [4, 5, 6], 4,6 -> [4, 6]."""
    found = set()
    for part in (f"0-{int(text) - 1}" if text.isdecimal() else text).split(","):
        low, high = map(int, part.split("-") if "-" in part else (part, part))
        found |= {*range(low, high + 1)}
    if not found:
        raise ValueError
    return sorted(found)


def as_option(numbers):
    """What --seeds was, or could have been."""
    return f"{numbers[0]}-{numbers[0]}" if len(numbers) == 1 else ",".join(map(str, numbers))


def main():
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("finding", choices=FINDINGS)
    p.add_argument("--seeds", type=seeds, default="3", help="how many, or which: 3, 4-6, 4,6 (default 3: 0, 1 and 2)")
    p.add_argument("--preset", choices=RL, default="100m" if cuda else "tiny", help="default: tiny, with CUDA 100m")
    p.add_argument("--out", help="folder (default out/findings, of other presets than tiny out/findings-PRESET)")
    p.add_argument("--jobs", type=at_least(1), help="how many commands at a time, at most one a core and, with CUDA, one (default)")
    p.add_argument("--dry-run", action="store_true", help="print the commands and the expected time, run nothing")
    args = p.parse_args()
    args.out = args.out or ("out/findings" if args.preset == "tiny" else f"out/findings-{args.preset}")
    finding = FINDINGS[args.finding]
    settings = finding["settings"](args.preset)
    limit, prefix = (1, []) if cuda else (min(args.jobs or n_cores(), n_cores()), ["OMP_NUM_THREADS=1"])

    done_file = Path(args.out, "jobs.json")
    with one_line_errors(p):
        if not args.dry_run:
            check_outputs(str(done_file), *[f"{args.out}/{args.finding}.{kind}" for kind in ("json", "md", "png")])
            if not lock(f"{args.out}/lock"):
                raise ValueError(f"another findings.py is writing to {args.out}: wait for it, or give --out")
    # done: of each finished job, by its file, the fingerprint, the minutes (null if it was resumed on the way) and those expected
    try:
        done = json.loads(done_file.read_text(encoding="utf-8"))
        done = {out: d for out, d in done.items() if {*d} == {"script", "fingerprint", "minutes", "expected"}}
    except (OSError, ValueError, TypeError, AttributeError):  # none, or broken: the stages themselves know what is finished
        done = {}
    jobs = [job if args.preset == "tiny" else job._replace(minutes=0.0)  # not known
            for seed in args.seeds for job in jobs_of(settings, args.out, args.finding, seed)]
    to_run = [job for job in jobs if job.out not in done or done[job.out]["fingerprint"] != fingerprint(job, args.preset)]
    pace = {}  # script -> minutes on this machine for a minute expected
    for script in {job.command[0] for job in jobs}:
        timed = [d for d in done.values() if d["script"] == script and d["minutes"] and d["expected"]]
        pace[script] = sum(d["minutes"] for d in timed) / sum(d["expected"] for d in timed) if timed else 1.0

    def minutes(job):
        return job.minutes * pace[job.command[0]]

    def chain(job):
        """Minutes of the job and of the longest chain of jobs that wait for it. The longest starts first."""
        return minutes(job) + max((chain(other) for other in to_run if job.out in other.needs), default=0)

    to_run.sort(key=chain, reverse=True)
    ends, cores = {}, [0] * limit  # when each job and, so far, each core is done
    for job in to_run:
        cores.sort()
        cores[0] = ends[job.out] = minutes(job) + max(cores[0], *[ends.get(path, 0) for path in job.needs], 0)
    say(f"{args.finding}, preset {args.preset}, seeds {args.seeds}: {len(to_run)} commands to run, {limit} at a time, "
        f"{len(jobs) - len(to_run)} finished; expected time: "
        + (f"about {max(cores):.0f} minutes" if all(job.minutes for job in to_run) else
           "not known; each log says that of its command"))
    if args.dry_run:
        for job in jobs:
            say(shown(job, prefix) + ("" if job in to_run else "   # finished"))
        return

    def finish(job, took):
        missing = [path for path in job.kept if not os.path.exists(path)]
        if missing:
            sys.exit(f"{job.out} was made without keeping {missing[0]}: move it away, and it will be made anew")
        done[job.out] = dict(script=job.command[0], fingerprint=fingerprint(job, args.preset), minutes=took, expected=job.minutes)
        Path(f"{done_file}.part").write_text(json.dumps(done, indent=1), encoding="utf-8")
        os.replace(f"{done_file}.part", done_file)
        say(f"done: {job.out}" + (f", {took:.1f} minutes" if took else ""))

    run_jobs(to_run, limit, prefix, finish)
    report(args, finding, settings, {out: d["minutes"] for out, d in done.items()})


if __name__ == "__main__":
    run_script(main)
