"""
What midtrain.py promises: where it starts, which problems it takes and how many, and as test_pretrain.py has it, resuming
and one line for bad input.
"""
import json
import math
import os
import signal

import numpy as np
import pytest
import torch

import data
import midtrain as M
from conftest import (BROKEN, TINY, assert_compiled_where_there_is_bfloat16, assert_refused, checkpoint_with, checkpoint_without,
                      is_finite, metrics, put, run, same)
from model import load_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A checkpoint after five steps of pre-training on op 2-4."""
    folder = tmp_path_factory.mktemp("pretrain")
    result = run(folder, "pretrain.py", *TINY, *"--ops 2-4 --steps 5 --out init.pt".split())
    assert result.code == 0, result
    return folder / "init.pt"


def midtrain(cwd, init, *arguments, **more):
    small = "--device cpu --batch 8 --show 0 --out a.pt".split()
    return run(cwd, "midtrain.py", "--init", init, *small, *arguments, **more)


# ----------------------------------------------------------------------------------------------------------------------
# where it starts, and on what it trains

def weights(mix):
    """{op: probability} of a mixture."""
    mixture, of_op = data.parse_mixture(mix), {}
    for (_, op), weight in zip(mixture.cells, mixture.weights):
        of_op[op] = of_op.get(op, 0.0) + weight
    return {op: weight for op, weight in of_op.items() if weight}


@pytest.mark.parametrize("arguments, expected", [
    ("", {2: 0.2 / 3, 3: 0.2 / 3, 4: 0.2 / 3, 5: 0.4, 6: 0.4}),  # 20 % of op 2-4 and 80 % of OOD-edge, which is 5-6
    ("--id-share 0.5", {2: 0.5 / 3, 3: 0.5 / 3, 4: 0.5 / 3, 5: 0.25, 6: 0.25}), ("--id-share 0", {5: 0.5, 6: 0.5}),
    ("--id-share 1", {2: 1 / 3, 3: 1 / 3, 4: 1 / 3}), ("--ops 7", {2: 0.2 / 3, 3: 0.2 / 3, 4: 0.2 / 3, 7: 0.8}),
    ("--ops 4-5 --id-share 0.4", {2: 0.4 / 3, 3: 0.4 / 3, 4: 0.4 / 3 + 0.3, 5: 0.3}),
    ("--mix zoo:3:3,movie:9", {3: 0.75, 9: 0.25})])
def test_the_mixture(tmp_path, init, monkeypatch, arguments, expected):
    paths = ["--init", str(init), "--out", str(tmp_path / "a.pt")]
    monkeypatch.setattr("sys.argv", ["midtrain.py", *paths, *arguments.split()])
    _, args, *_ = M.arguments()
    assert weights(args.mix) == pytest.approx(expected)


def test_with_cuda_it_is_compiled_in_bfloat16_if_the_device_has_that(tmp_path, init, monkeypatch, pretend_cuda):
    paths = ["midtrain.py", "--init", str(init), "--out", str(tmp_path / "a.pt")]
    assert_compiled_where_there_is_bfloat16(M, paths, monkeypatch, pretend_cuda)


def test_it_starts_from_the_weights_of_its_init(tmp_path, init):
    result = midtrain(tmp_path, init, "--steps", 1, "--lr", 0)
    assert result.code == 0, result
    start, still = load_checkpoint(init), load_checkpoint(tmp_path / "a.pt")
    assert same(still["model"], start["model"]) and still["config"] == start["config"]
    assert weights(still["recipe"]["mix"]) == pytest.approx({2: 0.2 / 3, 3: 0.2 / 3, 4: 0.2 / 3, 5: 0.4, 6: 0.4})
    assert (still["stage"], still["step"], still["problems"]) == ("midtrain", 1, 8)
    assert still["id_ops"] == [2, 4]  # "in distribution" is what pre-training saw, whatever comes later
    assert still["recipe"]["preset"] == "tiny"


def problems_of(result, split="train"):
    return {row["problem"] + row["question"] + row["solution"]: row["op"]
            for arguments, row in result.calls[0]["data.make_row"] if arguments["split"] == split}


def test_the_world_of_its_init_goes_on(tmp_path):
    """Contexts, distractors and both knobs, unless told otherwise; and from it to the next stage."""
    world = "--mix zoo:2-3,school:2 --distractors 1 --late-distractors 1 --max-parents 2 --max-value 20".split()
    assert run(tmp_path, "pretrain.py", *TINY, *world, "--steps", 1).code == 0
    for script, more, expected in (("midtrain.py", "--batch 4 --show 0", (1.0, 2, 20)),
                                   ("grpo.py", "--out out/b.pt --prompts 2 --rollouts 2 --updates 1 --max-new 2 --eval-problems 2",
                                    (1.0, 2, 20)),
                                   ("grpo.py", "--out out/c.pt --max-parents 3 --distractors 0 --max-value 30 --prompts 2 "
                                    "--rollouts 2 --updates 1 --max-new 2 --eval-problems 2", (0.0, 3, 30))):
        result = run(tmp_path, script, "--device", "cpu", "--steps", 1, *more.split(), record=["data.make_row"])
        assert result.code == 0, result
        drawn = [arguments for arguments, _ in result.calls[0]["data.make_row"]]
        assert {(a["world"].distractors, a["world"].max_parents, a["world"].max_value) for a in drawn} == {expected}
        contexts = {context for a in drawn for (context, _), weight in zip(a["mixture"].cells, a["mixture"].weights) if weight}
        assert contexts == {"zoo", "school"} and {a["split"] for a in drawn} == {"train", "eval"}
    result = run(tmp_path, "evaluate.py", "out/b.pt", "--device", "cpu", "--n", 1, "--problems", 20, "--ops", 4)
    report = json.loads((tmp_path / "out/eval.json").read_text())
    assert {*report["checkpoints"]["out/b.pt"]["contexts"]} == {"zoo", "school"}
    assert [report["settings"][name] for name in ("distractors", "max_parents", "max_value")] == [1.0, 2, 20]


def test_its_problems_are_not_those_of_pretraining_over_again(tmp_path, init):
    """Same seed, same mixture, many problems: the same ops, and no problem twice."""
    ours = midtrain(tmp_path, init, *"--mix 2-4 --steps 10 --batch 16 --lr 0".split(), record=["data.make_row"])
    theirs = run(tmp_path, "pretrain.py", *TINY, *"--ops 2-4 --steps 10 --batch 16 --lr 0 --out p.pt".split(),
                 record=["data.make_row"])
    assert ours.code == theirs.code == 0
    ours, theirs = problems_of(ours), problems_of(theirs)
    assert len(ours) == len(theirs) == 160 and {*ours.values()} == {*theirs.values()} == {2, 3, 4}
    assert not ours.keys() & theirs.keys()


def test_wrong_steps_are_in_its_training_and_not_in_what_is_held_out(tmp_path, init):
    for name, share in (("a", 0), ("b", 1)):
        assert midtrain(tmp_path, init, "--steps", 1, "--lr", 0, "--wrong-steps", share, "--out", f"{name}.pt").code == 0
    (right,), (wrong,) = metrics(tmp_path / "a.jsonl"), metrics(tmp_path / "b.jsonl")
    assert right["loss"] != wrong["loss"] and right["val_loss"] == wrong["val_loss"]  # with lr 0, the model is the same
    assert load_checkpoint(tmp_path / "b.pt")["recipe"]["wrong_steps"] == 1


def test_the_loss_falls_and_the_learning_rate_has_a_warm_up_of_its_own(tmp_path, init):
    result = midtrain(tmp_path, init, *"--steps 20 --warmup 0.15 --lr 0.02 --min-lr 0.001 --log-every 1".split())
    assert result.code == 0, result
    rows = metrics(tmp_path / "a.jsonl")
    assert np.mean([row["loss"] for row in rows[-3:]]) < np.mean([row["loss"] for row in rows[:3]]) - 0.5
    rates = [row["lr"] for row in rows]
    assert rates[:3] == pytest.approx([0.02 / 3, 0.04 / 3, 0.02])
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0.001 <= rates[-1] < 0.002


@pytest.mark.parametrize("budget, share", [(10_000, 0.0), (50_000, 0.8)])
def test_a_budget_is_spent(tmp_path, init, budget, share):
    """(1 - b) T training tokens, to 3 %."""
    result = midtrain(tmp_path, init, *"--mix 2-4 --distractors 0 --batch 4 --budget".split(), budget, "--rl-share", share)
    assert result.code == 0, result
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["tokens"] == pytest.approx(10_000, rel=0.03)
    assert checkpoint["step"] == metrics(tmp_path / "a.jsonl")[-1]["step"] > 20


# ----------------------------------------------------------------------------------------------------------------------
# resuming

EIGHT = "--steps 8 --log-every 1 --save-every 2 --eval-every 3".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, init):
    folder = tmp_path_factory.mktemp("whole")
    assert midtrain(folder, init, *EIGHT).code == 0
    return folder


def assert_same_run(folder, whole):
    """Two runs ended alike, bit for bit, but for the time they took."""
    a, b = load_checkpoint(folder / "a.pt"), load_checkpoint(whole / "a.pt")
    assert len(b["optimizers"]) == 2 and all(o["state"] for o in b["optimizers"])
    for key in b.keys() - {"seconds", "run"}:
        assert same(a[key], b[key]), key
    rows, rows_whole = metrics(folder / "a.jsonl"), metrics(whole / "a.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row, row_whole in zip(rows, rows_whole):
        for key in row_whole.keys() - {"seconds", "tokens_per_s", "problems_per_s", "waiting"}:
            assert row[key] == row_whole[key], key


def test_a_run_killed_three_times_resumes_exactly_even_without_its_init(tmp_path, init, whole):
    moved = tmp_path / "init.pt"
    moved.write_bytes(init.read_bytes())
    assert midtrain(tmp_path, "init.pt", *EIGHT, send=(signal.SIGKILL, 1)).code == -signal.SIGKILL
    assert not (tmp_path / "a.pt").exists() and len(metrics(tmp_path / "a.jsonl")) == 2
    result = midtrain(tmp_path, "init.pt", *EIGHT, "--resume", send=(signal.SIGKILL, 3))
    assert result.code == -signal.SIGKILL and "step 0" in result.out
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 4 and metrics(tmp_path / "a.jsonl")[-1]["step"] == 6
    moved.unlink()
    result = midtrain(tmp_path, "init.pt", *EIGHT, "--resume", send=(signal.SIGINT, 1))
    assert result.code == 130 and "at step 4\n" in result.out and "--resume" in result.out
    result = midtrain(tmp_path, "init.pt", *EIGHT, "--resume")
    assert result.code == 0 and "resumed" in result.out
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    checkpoint["recipe"]["init"] = str(init)
    torch.save(checkpoint, tmp_path / "a.pt")
    assert_same_run(tmp_path, whole)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.jsonl.old", "a.pt"]  # .old: of the run that left no checkpoint


def test_resuming_takes_another_spelling_of_the_same_init(tmp_path, init, whole):
    for path, name in ((whole / "a.pt", "a.pt"), (whole / "a.jsonl", "a.jsonl"), (init, "here.pt")):
        (tmp_path / name).write_bytes(path.read_bytes())
    result = midtrain(tmp_path, "./here.pt", *EIGHT, "--resume")
    assert result.code == 0 and "at step 8" in result.out


def test_resuming_after_the_stage_before_was_run_again_is_refused(tmp_path, init, whole):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    checkpoint["recipe"]["init"] = "init.pt"
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    save_checkpoint(tmp_path / "init.pt", {**load_checkpoint(init), "run": "another"})
    assert_refused(midtrain(tmp_path, "init.pt", *EIGHT, "--resume"), "init.pt", "anew")


def test_resuming_with_other_arguments_is_refused(tmp_path, init, whole):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    for option, value in (("--lr", "0.1"), ("--batch", "16"), ("--mix", "zoo:2-4"), ("--seed", "1"), ("--init", "b.pt")):
        assert_refused(midtrain(tmp_path, init, *EIGHT, "--resume", option, value), option.strip("-"), value)
    assert_refused(midtrain(tmp_path, init, *EIGHT, "--resume", "--id-share", "0.5"), "mix")
    for name in ("a.pt", "a.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


BROKEN_HERE = BROKEN | {
    "another stage": checkpoint_with(stage="pretrain"),
    "without optimizers": checkpoint_without("optimizers"),
    "without recipe": checkpoint_without("recipe"),
    "other tokens": checkpoint_with(recipe={"preset": "tiny", "vocabulary": "another"}),
    "a new preset": checkpoint_with(recipe={"preset": "mini"}),
    "without ops": checkpoint_without("id_ops"),
}


@pytest.mark.parametrize("kind", BROKEN_HERE)
def test_resuming_a_broken_checkpoint_is_refused(tmp_path, init, whole, kind):
    path = tmp_path / "a.pt"
    put(BROKEN_HERE[kind](whole / "a.pt"), path)
    before = path.read_bytes()
    assert_refused(midtrain(tmp_path, init, *EIGHT, "--resume"), "a.pt")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# runs that explode, and bad input

@pytest.mark.parametrize("explode", ["--optimizer adamw --lr 1e6", "--optimizer muon --lr 100"])
def test_an_exploding_run_stops_and_keeps_the_last_good_checkpoint(tmp_path, init, explode):
    result = midtrain(tmp_path, init, *"--steps 8 --warmup 0.9 --log-every 1 --save-every 1".split(), *explode.split())
    assert result.code == 1 and "--lr" in result.out.splitlines()[-1] and "Traceback" not in result.err
    if (tmp_path / "a.pt").exists():
        assert is_finite(load_checkpoint(tmp_path / "a.pt"))
        assert metrics(tmp_path / "a.jsonl")[-1]["loss"] < 2 * math.log(640)


BAD = [  # arguments, words in the last line
    ("--id-share -0.1", "--id-share"), ("--id-share 1.1", "--id-share"), ("--id-share nan", "--id-share"),
    ("--ops 10-2", "10-2"), ("--ops 0-1", "0-1"), ("--ops 1-500", "1-500"), ("--ops x", "x"), ("--mix nonsense", "nonsense"),
    ("--ops 5:1,zoo:2", "5:1,zoo:2"), ("--mix zoo:2:0", "zero"), ("--ops 5 --mix zoo:2", "not both"),
    ("--budget 1e6", "--rl-share"), ("--rl-share 0.5", "--budget"), ("--budget 1e6 --rl-share 0.5 --steps 3", "--steps"),
    ("--budget 0 --rl-share 0.5", "--budget"), ("--budget 1e6 --rl-share 1", "--rl-share"),
    ("--budget 1e6 --rl-share -0.5", "--rl-share"), ("--budget nan --rl-share 0.5", "--budget"),
    ("--steps 0", "--steps"), ("--batch 0", "--batch"), ("--micro-tokens 0", "--micro-tokens"),
    ("--log-every 0", "--log-every"),
    ("--eval-every 0", "--eval-every"), ("--save-every 0", "--save-every"), ("--lr -1", "--lr"), ("--lr nan", "--lr"),
    ("--warmup 1", "--warmup"), ("--clip 0", "--clip"), ("--weight-decay -1", "--weight-decay"), ("--seed -1", "--seed"),
    ("--distractors 99", "distractors"), ("--preset nope", "nope"), ("--optimizer nope", "nope"), ("--device nope", "nope"),
    ("--nope", "--nope"), ("--init missing.pt", "missing.pt"), ("--init adirectory", "adirectory"),
    ("--init afile", "afile"), ("--out afile/a.pt", "afile"), ("--out adirectory", "adirectory"),
    ("--out a.jsonl", "a.jsonl"), ("--out INIT", "overwrite"),
]


@pytest.mark.parametrize("arguments, word", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, init, arguments, word):
    (tmp_path / "afile").write_text("keep me")
    (tmp_path / "adirectory").mkdir()
    (tmp_path / "init.pt").write_bytes(init.read_bytes())
    assert_refused(midtrain(tmp_path, "init.pt", *arguments.replace("INIT", str(tmp_path / "init.pt")).split()), word)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adirectory", "afile", "init.pt"]
    assert (tmp_path / "afile").read_text() == "keep me" and (tmp_path / "init.pt").read_bytes() == init.read_bytes()


@pytest.mark.parametrize("kind", [*BROKEN, "without ops", "without recipe", "other tokens", "a new preset"])
def test_a_broken_checkpoint_to_start_from_is_refused(tmp_path, init, kind):
    put(BROKEN_HERE[kind](init), tmp_path / "init.pt")
    why = {"other tokens": "tokens", "a new preset": "mini"}.get(kind, "")
    assert_refused(midtrain(tmp_path, "init.pt", "--steps", 1), "init.pt", why)
    assert os.listdir(tmp_path) == ["init.pt"]
