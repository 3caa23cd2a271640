"""findings.py: statistics worked out by hand, verdicts with known answers, a finding at toy size, interrupted and killed."""
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
from conftest import ROOT, assert_refused, run, same
from model import load_checkpoint

GROUPS = ("ID", "OOD-edge", "OOD-hard", "past")


@pytest.mark.parametrize("estimates, mean, half", [
    ([(0.1, 0.1, 0.1), (0.2, 0.2, 0.2), (0.3, 0.3, 0.3)], 0.2, 4.303 * 0.1 / 3 ** 0.5),            # what differs between seeds
    ([(0.2, 0.14, 0.26)] * 3, 0.2, 0.06 / 3 ** 0.5),                                               # seeds that agree by luck
    ([(0.0, -0.196, 0.196), (0.4, 0.204, 0.596)], 0.2, 12.706 * 0.08 ** 0.5 / 2 ** 0.5),
    ([(0.3, 0.25, 0.35)], 0.3, 0.05),                                                              # one seed: over problems
    ([(0.1, 0.1, 0.1), (0.3, 0.3, 0.3)] * 10, 0.2, 2.228 * (0.2 / 19) ** 0.5 / 20 ** 0.5),         # the table ends at 11 seeds
])
def test_the_interval_over_seeds_is_that_of_t_and_not_less_than_problems_allow(estimates, mean, half):
    assert findings.over_seeds(estimates) == pytest.approx((mean, mean - half, mean + half))


def verdicts(n_seeds=3, half=0.035, **changes):
    """Of the four claims. changes: arm -> (group, "pass@k") -> mean over the seeds; all others are 0."""
    seeds = [{arm: {group: {k: (value + shift, value + shift - half, value + shift + half) for k in ("pass@1", "pass@64")
                            for value in [changes.get(arm, {}).get((group, k), 0.0)]} for group in GROUPS}
              for arm in ("id", "edge", "hard")} for shift in (0.0, 0.012, -0.012)[:n_seeds]]
    return findings.judge(findings.EDGE_CLAIMS, seeds, ["pass@1", "pass@64"])


EDGE, HARD, PAST = ("OOD-edge", "pass@64"), ("OOD-hard", "pass@64"), ("past", "pass@64")
PAPER = dict(edge={EDGE: 0.42, PAST: 0.2}, id={("ID", "pass@1"): 0.05, EDGE: -0.02}, hard={EDGE: -0.04})


@pytest.mark.parametrize("changes, expected", [
    (PAPER, "+ + + +"),
    (dict(), "- - + +"),                                                        # RL does nothing at all
    (PAPER | dict(id={EDGE: 0.42}), "- + - +"),                                 # other data does it as well
    (PAPER | dict(id={EDGE: 0.1}), "+ + - +"),                                  # it does less
    (PAPER | dict(id={EDGE: 0.395}), "? + - +"),                                # perhaps less
    (PAPER | dict(id={EDGE: 0.025}), "+ + ? +"),                                # perhaps more than nothing
    (PAPER | dict(id={("ID", "pass@1"): -0.1}), "+ + - +"),                     # it forgets its own range
    (PAPER | dict(id={HARD: 0.1}), "+ + - +"),
    (PAPER | dict(edge={EDGE: 0.025, PAST: 0.025}), "? ? + +"),
    (PAPER | dict(hard={("ID", "pass@1"): -0.3, HARD: -0.1}), "+ + + +"),       # it harms
    (PAPER | dict(hard={("OOD-hard", "pass@1"): 0.1}), "+ + + -"),
    (PAPER | dict(hard={HARD: 0.025}), "+ + + ?"),
    (PAPER | dict(half=0.8), "? ? ? ?"),                                        # too few problems
    (PAPER | dict(n_seeds=1), "+ + + +"),
])
def test_verdicts_on_numbers_with_known_answers(changes, expected):
    judged = verdicts(**changes)
    words = {"+": "reproduced", "-": "not reproduced", "?": "undecided"}
    assert [claim["verdict"] for claim in judged] == [words[sign] for sign in expected.split()], judged
    over = "over the problems of one seed" if changes.get("n_seeds") == 1 else "over seeds"
    assert all(claim["intervals"] == over and claim["evidence"] for claim in judged)


def test_an_evaluation_is_read(tmp_path):
    def estimate(value, half):
        return {"pass@4": value, "pass@4 interval": [value - half, value + half]}

    def checkpoint(values):
        return dict(groups={"OOD-edge": dict(verified=estimate(values[0], 0.1))},
                    ops={str(op): dict(verified=estimate(value, 0.03)) for op, value in zip((5, 6, 7), values)})

    models = {"a/base.pt": checkpoint((0.5, 0.2, 0.1)), "a/edge.pt": checkpoint((0.9, 0.6, 0.3))}
    models["a/edge.pt"]["against_first"] = {"OOD-edge": estimate(0.4, 0.05)}
    (tmp_path / "e.json").write_text(json.dumps(dict(checkpoints=models, settings=dict(k=[4]))))
    levels, changes, ks = findings.read_seed(tmp_path / "e.json", past=5)
    assert ks == ["pass@4"] and levels["base"] == {"OOD-edge": {"pass@4": (0.5, 0.4, 0.6)}} and [*changes] == ["edge"]
    assert changes["edge"]["OOD-edge"]["pass@4"] == pytest.approx((0.4, 0.35, 0.45))
    half = 0.03 * 2 ** 0.5
    assert changes["edge"]["past"]["pass@4"] == pytest.approx((0.3, 0.3 - half, 0.3 + half))  # op 6 and 7: +.4 and +.2


def test_a_dry_run_prints_the_commands_and_does_nothing(tmp_path):
    result = run(tmp_path, "tests/findings.py", "edge", "--preset", "tiny", "--seeds", "4-5", "--dry-run", "--jobs", 1)
    assert result.code == 0 and os.listdir(tmp_path) == [], result
    first, *commands = result.out.splitlines()
    minutes = findings.EDGE["tiny"]["minutes"]
    total = 2 * minutes["pretrain.py"] + 6 * minutes["grpo.py"] + 4 * minutes["evaluate.py"]
    assert "12 commands" in first and f"expected time: about {total} minutes" in first
    scripts = [os.path.basename(shlex.split(c)[2]) for c in commands]
    assert scripts == (["pretrain.py"] + ["grpo.py"] * 3 + ["evaluate.py"] * 2) * 2
    assert all(f"--seed {4 + n // 6}" in c and f"out/findings/edge/seed{4 + n // 6}/" in c for n, c in enumerate(commands))
    assert all("--resume" in c for c in commands if "evaluate" not in c)
    for bad in "0", "x", "5-4":
        assert_refused(run(tmp_path, "tests/findings.py", "edge", "--seeds", bad), "--seeds", bad)


QUICK = "edge --preset quick --seeds 1 --jobs 2".split()


def start(folder, *options):
    return subprocess.Popen([sys.executable, ROOT / "tests/findings.py", *QUICK, *options], cwd=folder, text=True,
                            start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(ready, process):
    began = time.time()
    while not ready():
        assert process.poll() is None and time.time() - began < 600, process.communicate()[0]
        time.sleep(0.01)


def test_a_finding_goes_on_after_an_interrupt_and_a_kill_and_repeats_nothing(tmp_path):
    seed = tmp_path / "out/quick/edge/seed0"

    process = start(tmp_path)  # Ctrl-C, which a terminal sends to all, in pre-training
    wait_for((seed / "base.pt").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    out = process.communicate(timeout=600)[0]
    assert process.returncode == 130 and "Traceback" not in out, out
    assert 0 < load_checkpoint(seed / "base.pt")["step"] < 200 and "continue with --resume" in (seed / "base.log").read_text()
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # nothing of it is left

    process = start(tmp_path, "--jobs", "1")  # killed in RL
    wait_for(lambda: len([*seed.glob("*.log")]) == 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=600)

    code, out, *_ = run(tmp_path, "tests/findings.py", *QUICK)
    assert code == 0, out
    assert "5 commands to run" in out and "1 finished" in out
    assert (seed / "base.log").read_text().count("$ ") == 2
    result = json.loads((tmp_path / "out/quick/edge.json").read_text())
    assert {claim["verdict"] for claim in result["claims"]} <= {"reproduced", "not reproduced", "undecided"}
    assert len(result["claims"]) == 4 and result["seeds"] == [0]
    assert all({*level} == {"base", "id", "edge", "hard"} for level in (t["levels"] for t in result["temperatures"].values()))
    report = (tmp_path / "out/quick/edge.md").read_text()
    assert all(claim["claim"] in report and claim["claim"] in out for claim in result["claims"]) and "(one seed)" in report
    assert "(pass@128)" in report  # the paper's row
    assert (tmp_path / "out/quick/edge.png").exists() or "needs matplotlib" in out

    for name in "base", "edge":  # as one undisturbed run of the command that was printed
        script, *options = shlex.split((seed / f"{name}.log").read_text().splitlines()[0])[3:]
        options[options.index("--out") + 1] = f"{name}.pt"
        assert run(tmp_path, os.path.basename(script), *options).code == 0
        assert same(load_checkpoint(tmp_path / f"{name}.pt")["model"], load_checkpoint(seed / f"{name}.pt")["model"])

    again = run(tmp_path, "tests/findings.py", *QUICK)
    assert again.code == 0 and "0 commands to run" in again.out, again
    assert json.loads((tmp_path / "out/quick/edge.json").read_text()) == result
    changed = run(tmp_path, "tests/findings.py", *QUICK, "--preset", "tiny", "--out", "out/quick")
    assert changed.code == 2, changed
    assert re.search(r"base\.pt was made with [a-z_]+ .*, not .*move .* away", changed.out, re.S), changed
