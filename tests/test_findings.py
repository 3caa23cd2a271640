"""findings.py: statistics worked out by hand, verdicts with known answers, a finding at toy size, interrupted and killed."""
import collections
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import findings
from conftest import NO_CUDA, ROOT, assert_refused, run, same
from model import load_checkpoint
from verify import interval

@pytest.mark.parametrize("estimates, mean, half", [
    ([(0.1, 0.1, 0.1), (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)], 0.2, 4.303 * 0.1 / 3 ** 0.5),            # what differs between seeds
    ([(0.2, 0.14, 0.26)] * 3, 0.2, 0.06 / 3 ** 0.5),                                               # seeds that agree by luck
    ([(0.0, -0.196, 0.196), (0.4, 0.204, 0.596)], 0.2, 12.706 * 0.08 ** 0.5 / 2 ** 0.5),
    ([(0.3, 0.25, 0.35)], 0.3, 0.05),                                                              # one seed: over problems
    ([(0.1, 0.1, 0.1), (0.3, 0.3, 0.3)] * 10, 0.2, 2.228 * (0.2 / 19) ** 0.5 / 20 ** 0.5),         # the table ends at 11 seeds
])
def test_the_interval_over_seeds_is_that_of_t_and_not_less_than_problems_allow(estimates, mean, half):
    assert findings.over_seeds(estimates) == pytest.approx((mean, mean - half, mean + half))


def judged(claims, numbers, n_seeds=3, half=0.035, before="base"):
    """The claims on made-up numbers: model -> (region, measure) -> mean over the seeds; all others are 0."""
    def estimates(weights, region, measure):
        value = sum(w * numbers.get(model, {}).get((region, measure), 0.0) for model, w in weights.items())
        shifts, size = (0.0, 0.012, -0.012)[:n_seeds], half * max(1, len({*weights} - {"base"})) ** 0.5
        return [(value + shift, value + shift - size, value + shift + size) for shift in shifts]

    return findings.judge(claims, estimates, collections.defaultdict(lambda: before), "pass@64", 0.05)


WORDS = {"+": "reproduced", "-": "not reproduced", "?": "undecided"}
EDGE, HARD, PAST = ("OOD-edge", "pass@64"), ("OOD-hard", "pass@64"), ("past", "pass@64")
PAPER = dict(edge={EDGE: 0.42, PAST: 0.2}, id={("ID", "pass@1"): 0.05, EDGE: -0.02}, hard={EDGE: -0.04})


@pytest.mark.parametrize("numbers, expected", [
    (PAPER, "+ + + +"),
    (dict(), "- - + +"),                                                        # RL does nothing at all
    (PAPER | dict(id={EDGE: 0.42}), "- + - +"),                                 # other data does it as well
    (PAPER | dict(id={EDGE: 0.1}), "+ + - +"),                                  # it does less
    (PAPER | dict(id={EDGE: 0.395}), "? + - +"),                                # perhaps less
    (PAPER | dict(id={EDGE: 0.025}), "+ + ? +"),                                # perhaps more than nothing
    (PAPER | dict(id={("ID", "pass@1"): -0.1}), "+ + - +"),                     # it forgets its own range
    (PAPER | dict(id={("ID", "pass@64"): 0.1}), "+ + - +"),                     # it adds ability in it
    (PAPER | dict(id={("OOD-edge", "pass@1"): 0.1}), "+ + - +"),
    (PAPER | dict(id={HARD: 0.1}), "+ + - +"),
    (PAPER | dict(edge={EDGE: 0.025, PAST: 0.025}), "? ? + +"),
    (PAPER | dict(hard={("ID", "pass@1"): -0.3, HARD: -0.1}), "+ + + +"),       # it harms
    (PAPER | dict(hard={("OOD-hard", "pass@1"): 0.1}), "+ + + -"),
    (PAPER | dict(hard={HARD: 0.025}), "+ + + ?"),
    (PAPER | dict(half=0.8), "? ? ? ?"),                                        # too few problems
    (PAPER | dict(n_seeds=1), "+ + + +"),
])
def test_verdicts_on_numbers_with_known_answers(numbers, expected):
    options = {name: numbers[name] for name in ("half", "n_seeds") if name in numbers}
    claims = judged(findings.EDGE_CLAIMS, {model: of for model, of in numbers.items() if model not in options}, **options)
    assert [claim["verdict"] for claim in claims] == [WORDS[sign] for sign in expected.split()], claims
    over = "over the problems of one seed" if numbers.get("n_seeds") == 1 else "over seeds"
    assert all(claim["intervals"] == over and claim["evidence"] for claim in claims)


def at(region, measure, **numbers):
    """{model: {(region, measure): number}}, with _ for the spaces and p for the points of the names."""
    return {re.sub(r"(?<=\d)p(?=\d)", ".", name.replace("_", " ")): {(region, measure): number} for name, number in numbers.items()}


@pytest.mark.parametrize("claims, numbers, expected", [
    ("SEEDING", at("school, higher ops", "pass@64", **{"rl_0p01": 0.6, "rl_0p1": 0.7, "rl_0p001": 0.1}), "+ +"),
    ("SEEDING", at("school, higher ops", "pass@64", **{"rl_0p01": 0.0, "rl_0p1": 0.7, "rl_0p001": 0.3}), "- -"),
    ("SEEDING", at("school, higher ops", "pass@64", **{"rl_0p01": 0.6, "rl_0p1": 0.025, "rl_0p001": 0.575}), "? ?"),
    # the first claim, at the edge; the others are at OOD-hard, where all are alike
    ("BUDGET", at("OOD-edge", "pass@1", small_0p2=0.5, large_0p2=0.5,
                  **{f"{size}_{share}": 0.4 for size in ("small", "large") for share in ("0", "0p5", "0p8", "1")}), "+ - - -"),
    ("BUDGET", at("OOD-edge", "pass@1", small_0p2=0.5, large_0p2=0.5, large_0=0.6), "- - - -"),
    ("BUDGET", at("OOD-hard", "pass@1", small_0p8=0.3, large_0p8=0.3, small_0p2=0.1, large_0p2=0.1), "- + - -"),
    ("BUDGET", at("OOD-hard", "pass@64", small_0p5=0.3, large_0p5=0.3, small_1=0.1, large_1=0.1), "- - + -"),
    ("BUDGET", at("OOD-hard", "pass@64", small_0p5=0.3, large_0p5=0.3, small_1=0.1, large_1=0.4), "- - + +"),
    ("BUDGET", at("OOD-hard", "pass@64", small_0p5=0.3, large_0p5=0.3, small_1=0.275, large_1=0.275), "- - ? -"),
    ("REWARD", {"outcome": {("all", "hacked"): 0.3, ("all", "pass@1"): -0.1}}, "+ +"),
    ("REWARD", {"outcome": {("all", "hacked"): 0.3}, "strict": {("all", "hacked"): 0.4, ("all", "pass@1"): -0.2}}, "- -"),
    ("QUESTION", at("OOD-edge", "pass@1", curriculum=0.5, uniform=0.3, static=0.4, negatives=0.4, positives=0.2, right=0.6,
                    wrong=0.4), "+ + + + - -"),
    ("QUESTION", at("OOD-edge", "pass@64", static=0.5, early=0.2, early_base=0.1), "- - - - + -"),
    ("QUESTION", {"small 0.8": {("OOD-edge", "pass@1"): 0.5}, "smaller 0.2": {("OOD-edge", "pass@1"): 0.2}}, "- - - - - +")])
def test_verdicts_of_the_other_findings(claims, numbers, expected):
    finding = next(f for f in findings.FINDINGS.values() if f["claims"] is getattr(findings, f"{claims}_CLAIMS"))
    assert {*numbers} <= {*finding["settings"]("tiny")["models"]}
    judgement = judged(finding["claims"], numbers)
    assert [claim["verdict"] for claim in judgement] == [WORDS[sign] for sign in expected.split()], judgement


def test_an_evaluation_is_read_and_grouped_anew(tmp_path):
    ops, right = [5, 5, 6, 7], {"a/base.pt": [0, 4, 1, 0], "b/edge.pt": [4, 4, 2, 3]}
    file = dict(settings=dict(n=4, k=[1, 4]),
                checkpoints={"a/base.pt": dict(ops={"5": dict(baseline=0.5), "6": dict(baseline=0.25)})},
                by_problem={path: dict(op=ops, verified=counts, hacked=[4 - c for c in counts]) for path, counts in right.items()})
    (tmp_path / "e.json").write_text(json.dumps(file))
    evaluation = findings.read_evaluation(tmp_path / "e.json", ["base", "edge"])
    assert evaluation.ks == [1, 4] and evaluation.baseline == {5: 0.5, 6: 0.25}
    for weights, region, measure, values, ends in (
            ({"base": 1}, "5-6", "pass@1", [0, 1, 0.25], (0, 1)), ({"edge": 1}, "5-7", "pass@4", [1, 1, 1, 1], (0, 1)),
            ({"edge": 1, "base": -1}, "5-7", "pass@4", [1, 0, 0, 1], (-1, 1)), ({"edge": 1}, "6", "hacked", [0.5], (0, 1)),
            ({"edge": 2, "base": -1}, "7", "pass@1", [1.5], (-1, 2))):
        mean, low, high = findings.estimate(evaluation, weights, region, measure)
        assert mean == pytest.approx(sum(values) / len(values))
        assert (low, high) == pytest.approx(tuple(interval(values, *ends, clip=False)))


@pytest.mark.parametrize("finding", findings.FINDINGS)
@pytest.mark.parametrize("preset", findings.RL)
def test_the_commands_of_a_finding_are_those_of_the_stages(finding, preset, tmp_path, monkeypatch):
    """Every option exists, every checkpoint that is read is one that is made, and what is compared is evaluated together."""
    settings = findings.FINDINGS[finding]["settings"](preset)
    models, before = settings["models"], findings.against(settings["models"])
    jobs = findings.jobs_of(settings, "out", finding, 7)
    assert len({job.out for job in jobs}) == len(jobs)
    files = findings.checkpoints(models, "out", finding, 7)
    made = {job.out for job in jobs} | {files[name] for name in models if models[name].kept}
    for job in jobs:
        script, *options = job.command
        assert {*job.needs} <= made and (f"--seed {7}") in " ".join(options)
        help_text = HELP[script] if script in HELP else HELP.setdefault(script, run(tmp_path, script, "--help").out)
        assert all(f"{option} " in help_text or f"{option}\n" in help_text for option in options if option.startswith("--"))
        assert all(path in made for path in options if path.endswith(".pt"))
    assert all(models[model].label and models[base].label for model, base in before.items())
    assert {name for name, how in models.items() if how.label and how.init and not how.kept} == {*before}

    def estimates(weights, region, measure):
        assert region in settings["regions"] and all(models[name].label for name in weights)
        return [(0.0, -0.1, 0.1)]

    findings.judge(findings.FINDINGS[finding]["claims"], estimates, before, "pass@64", 0.05)


HELP = {}


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path):
    result = run(tmp_path, "tests/findings.py", "edge", "--preset", "tiny", "--seeds", "4-5", "--dry-run", "--jobs", 1)
    assert result.code == 0 and os.listdir(tmp_path) == [], result
    first, *commands = result.out.splitlines()
    minutes = sum(job.minutes for job in findings.jobs_of(findings.edge("tiny"), "out", "edge", 4))
    assert "12 commands" in first and f"expected time: about {2 * minutes:.0f} minutes" in first
    scripts = [os.path.basename(shlex.split(c)[2]) for c in commands]
    assert scripts == (["pretrain.py"] + ["grpo.py"] * 3 + ["evaluate.py"] * 2) * 2
    assert all(f"--seed {4 + n // 6}" in c and f"/seed{4 + n // 6}" in c for n, c in enumerate(commands))
    assert all("--resume" in c for c in commands if "evaluate" not in c)
    for bad in "0", "x", "5-4", "4-5-9":
        assert_refused(run(tmp_path, "tests/findings.py", "edge", "--seeds", bad), "--seeds", bad)


def assert_reported(out, finding, text):
    """All claims have a verdict, and files and screen say the same."""
    result, report = json.loads((out / f"{finding}.json").read_text()), (out / f"{finding}.md").read_text()
    words = ("does not hold", "undecided", "holds") if result["finding"] == "questions" else WORDS.values()
    assert {claim["verdict"] for claim in result["claims"]} <= {*words}
    assert all(f"{claim['claim']}: **{claim['verdict']}** (one seed)" in report for claim in result["claims"])
    option = re.search(r"--seeds (\S+)`", report)[1]
    assert findings.seeds(option) == result["seeds"]
    assert report.strip() in text and "| --- |" in report.replace("---  ", "---").replace("  ", "")
    assert (out / f"{finding}.png").exists() or "needs matplotlib" in text
    assert len(result["claims"]) == len(findings.FINDINGS[finding]["claims"])


QUICK = "edge --preset quick --seeds 1 --jobs 2".split()


def start(folder, *options):
    return subprocess.Popen([sys.executable, ROOT / "tests/findings.py", *QUICK, *options], cwd=folder, text=True,
                            env=os.environ | NO_CUDA, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(ready, process):
    began = time.time()
    while not ready():
        assert process.poll() is None and time.time() - began < 600, process.communicate()[0]
        time.sleep(0.01)


def test_a_finding_goes_on_after_an_interrupt_and_a_kill_and_repeats_nothing(tmp_path):
    out = tmp_path / "out/findings-quick"
    seed = out / "edge/seed0"
    base = out / "base/seed0.pt"

    process = start(tmp_path)  # Ctrl-C, which a terminal sends to all, in pre-training
    wait_for(base.exists, process)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=600)[0]
    assert process.returncode == 130 and "Traceback" not in text, text
    assert 0 < load_checkpoint(base)["step"] < 200 and "continue with --resume" in (out / "base/seed0.log").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left

    process = start(tmp_path, "--jobs", "1")  # killed in RL
    wait_for(lambda: [*seed.glob("*.log")], process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)

    code, text, *_ = run(tmp_path, "tests/findings.py", *QUICK)
    assert code == 0, text
    assert "5 commands to run" in text and "1 finished" in text
    assert (out / "base/seed0.log").read_text().count("$ ") == 2
    result = json.loads((out / "edge.json").read_text())
    assert len(result["claims"]) == 4 and result["seeds"] == [0] and [*result["numbers"]] == ["1.0", "0.7"]
    assert all({*of_region} == {"base", "id", "edge", "hard"} for of_t in result["numbers"].values() for of_region in of_t.values())
    assert all(known > 0 for name, (known,) in result["minutes"].items() if name in ("id", "hard"))  # those not interrupted
    assert result["minutes"]["base"] == [None]
    assert_reported(out, "edge", text)
    assert re.search(r"paper, pass@1 +\| pass@128", (out / "edge.md").read_text())

    for path in base, seed / "edge.pt":  # as one undisturbed run of the command that was printed
        script, *options = shlex.split(path.with_suffix(".log").read_text().splitlines()[0])[3:]
        options[options.index("--out") + 1] = f"{path.stem}.pt"
        assert run(tmp_path, os.path.basename(script), *options).code == 0
        assert same(load_checkpoint(tmp_path / f"{path.stem}.pt")["model"], load_checkpoint(path)["model"])

    again = run(tmp_path, "tests/findings.py", *QUICK)
    assert again.code == 0 and "0 commands to run" in again.out, again
    assert json.loads((out / "edge.json").read_text()) == result
    changed = run(tmp_path, "tests/findings.py", *QUICK, "--preset", "tiny", "--out", "out/findings-quick")
    assert changed.code == 2, changed
    assert re.search(r"seed0\.pt was made with [a-z_]+ .*, not .*move .* away", changed.out, re.S), changed


def test_every_other_finding_at_toy_size(tmp_path):
    """They share the base."""
    out = tmp_path / "out/findings-quick"
    for finding in "seeding", "budget", "reward", "questions":
        code, text, *_ = run(tmp_path, "tests/findings.py", finding, *QUICK[1:])
        assert code == 0, text
        assert_reported(out, finding, text)
    assert (out / "base/seed0.log").read_text().count("$ ") == 1
    spent = json.loads((out / "budget.json").read_text())["million_tokens_counted_and_spent"]
    assert all(0 < real <= counted for model, (counted, real) in spent.items() if model != "base")


def test_two_at_a_time_to_one_folder_are_refused(tmp_path):
    (tmp_path / "out/findings-quick").mkdir(parents=True)
    with open(tmp_path / "out/findings-quick/lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(run(tmp_path, "tests/findings.py", *QUICK), "another findings.py")


def test_a_finished_base_without_its_kept_checkpoint_is_pointed_out(tmp_path):
    out = tmp_path / "out/findings-quick"
    assert run(tmp_path, "pretrain.py", *shlex.split(findings.base("quick").command)[1:], "--seed", 0, "--out",
               "out/findings-quick/base/seed0.pt").code == 0
    (out / "base/seed0-150.pt").rename(out / "elsewhere.pt")
    result = run(tmp_path, "tests/findings.py", "questions", *QUICK[1:4], "1", "--jobs", 1)
    assert result.code == 1 and "seed0-150.pt: move it away" in result.out + result.err, result


def test_the_rows_of_a_figure_have_names():
    figure, axes = pytest.importorskip("matplotlib.pyplot").subplots(1, 2, sharey=True)
    level = dict(mean=0.5, interval=[0.4, 0.6], seeds=[0.5])
    numbers = {region: {model: {k: dict(level=level) for k in ("pass@1", "pass@16")} for model in "ab"} for region in ("ID", "hard")}
    findings.plot_arms(axes, numbers, dict(a="first", b="second"), dict(a="pretrain", b="grpo"), ["pass@1", "pass@16"])
    figure.canvas.draw()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["first", "second"]


@pytest.mark.parametrize("content", ["[]", '{"out/findings-quick/base/seed0.pt": 1}', "{", '{"a": {"script": "x.py"}}'])
def test_a_broken_list_of_what_is_finished_is_none(tmp_path, content):
    (tmp_path / "out/findings-quick").mkdir(parents=True)
    (tmp_path / "out/findings-quick/jobs.json").write_text(content)
    result = run(tmp_path, "tests/findings.py", *QUICK, "--dry-run")
    assert result.code == 0 and "6 commands to run" in result.out and "not known" in result.out, result
