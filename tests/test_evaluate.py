"""
What evaluate.py promises: estimators against brute force, and reports against a model whose answers are known.

The known model is a stand-in for `sample` that writes what the test tells it to: right solutions, right ones with a wrong
answer, right answers by wrong reasoning, and worse.
"""
import collections
import itertools
import json
import math
import os
import re
import resource
import subprocess
import sys
import types
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

import data
import evaluate
from conftest import BROKEN, NO_CUDA, ROOT, TINY, assert_refused, checkpoint_with, put, run, run_ranks
from evaluate import group_of, pass_at_k
from model import load_checkpoint, save_checkpoint
from verify import interval

# ----------------------------------------------------------------------------------------------------------------------
# estimators

def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_arrays_and_large_numbers():
    c = np.array([0, 1, 64, 127, 128])
    for k in (1, 8, 128):
        expected = [float(1 - Fraction(math.comb(128 - int(x), k), math.comb(128, k))) for x in c]
        assert pass_at_k(128, c, k) == pytest.approx(expected, rel=1e-9)
    assert pass_at_k(np.array([4, 2]), np.array([1, 2]), 2).tolist() == pytest.approx([0.5, 1.0])
    assert pass_at_k(128, c, 1) == pytest.approx(c / 128)


def test_an_interval_is_the_normal_one_with_one_more_problem_at_either_end():
    def by_hand(*values):
        half = 1.96 * math.sqrt(sum((v - np.mean(values)) ** 2 for v in values)) / len(values)
        return np.mean(values) - half, np.mean(values) + half

    for values in ([0, 1, 1, 0], [0.1, 0.2, 0.6], [0.5]):
        assert interval(values) == pytest.approx(by_hand(*values, 0, 1))
    assert interval([[0.1, 0.2], [0.3, 0.4]]).T.tolist() == [interval([0.1, 0.2]).tolist(), interval([0.3, 0.4]).tolist()]
    assert interval([0.0, -0.5, 0.25], low=-1) == pytest.approx(by_hand(0, -0.5, 0.25, -1, 1))
    low, high = interval([0] * 100)  # nothing was seen: the rule of three says at most 3 %
    whole = interval([0] * 100, clip=False)
    assert low == 0 > whole[0] and whole[1] == high and sum(whole) / 2 == pytest.approx(1 / 102)
    assert low == 0 and high == pytest.approx(0.03, abs=0.002)
    low, high = interval([0] * 100, low=-1)
    assert -low == high == pytest.approx(0.03, abs=0.004)


def simulated(rng, mean, spread, n, k, trials=1000):
    """Problems whose chances are Beta distributed, 16 samples each: pass@k of n of them, `trials` times, and the true one."""
    a, b = mean * spread, (1 - mean) * spread
    right = rng.binomial(16, rng.beta(a, b, (trials, n)))
    return pass_at_k(16, right, k), 1 - np.prod([(b + j) / (a + b + j) for j in range(k)])


def share_inside(ends, truth):
    return np.mean((ends[0] <= truth) & (truth <= ends[1]))


def test_intervals_hold_for_rare_and_for_common_success():
    rng, normal_fails = np.random.default_rng(0), 0
    for mean, spread, n, k in itertools.product((0.01, 0.05, 0.3, 0.5, 0.9, 0.99), (0.5, 3), (50, 200), (1, 16)):
        values, truth = simulated(rng, mean, spread, n, k)
        ends, error = interval(values), 1.96 * values.std(-1) / math.sqrt(n)
        assert share_inside(ends, truth) > 0.93, (mean, spread, n, k)
        assert np.mean(ends[1] - ends[0]) < 2 * (1.96 * values.mean(-1).std() + 2 / n), (mean, spread, n, k)
        normal_fails += share_inside([values.mean(-1) - error, values.mean(-1) + error], truth) < 0.9
    assert normal_fails > 10


def test_intervals_of_changes_hold():
    rng, normal_fails = np.random.default_rng(0), 0
    for (before, after), spread, n, k in itertools.product(
            ((0.001, 0.01), (0.01, 0.05), (0.3, 0.5), (0.9, 0.9), (0.99, 0.98)), (0.5, 3), (50, 200), (1, 16)):
        (a, truth_a), (b, truth_b) = (simulated(rng, mean, spread, n, k) for mean in (before, after))
        values, truth = b - a, truth_b - truth_a
        error = 1.96 * values.std(-1) / math.sqrt(n)
        assert share_inside(interval(values, low=-1), truth) > 0.93, (before, after, spread, n, k)
        normal_fails += share_inside([values.mean(-1) - error, values.mean(-1) + error], truth) < 0.9
    assert normal_fails > 3


def test_groups_of_ops():
    names = {op: group_of(op, [2, 10]) for op in range(2, 21)}
    assert [op for op in names if names[op] == "ID"] == list(range(2, 11))
    assert [op for op in names if names[op] == "OOD-edge"] == [11, 12, 13, 14]
    assert [op for op in names if names[op] == "OOD-hard"] == list(range(15, 21))
    assert [group_of(op, [4, 5]) for op in range(2, 9)] == ["below"] * 2 + ["ID"] * 2 + ["OOD-edge"] * 2 + ["OOD-hard"]
    assert [group_of(op, [2, 4]) for op in range(2, 9)] == ["ID"] * 3 + ["OOD-edge"] * 2 + ["OOD-hard"] * 2
    assert [group_of(op, None) for op in range(2, 9)] == ["unseen"] * 7


# ----------------------------------------------------------------------------------------------------------------------
# a model whose answers are known

ENC = data.tokenizer()
STOP = ENC.encode_single_token(data.END)
READER = evaluate.Reader(lambda text: data.encode(ENC, text), lambda ids: data.decode(ENC, ids), [STOP], [STOP], data.VOCAB_SIZE, None)


def right(row):
    return data.response_text(row)


def wrong_answer(row):
    """Right reasoning, then another answer."""
    answer = int(row["solution"].split("Answer: ")[1].rstrip("."))
    return right(row).replace(f"<answer> {answer} ", f"<answer> {answer + 1} ")


def lucky(row):
    """The right answer, but the first step is missing: its letter comes from nowhere."""
    return " Define" + right(row).split("Define", 2)[2]


def with_extra_step(row):
    """Everything that is needed, and a step that is not: verified, but not strict."""
    letter = next(x for x in data.LETTERS if not re.search(rf"\b{x}\b", row["solution"]))
    return f" Define visitors in Nowhere as {letter}; so {letter} = 3." + right(row)


def cut_off(row):
    return right(row)[:len(right(row)) // 2]


def nonsense(row):
    return "<solution> the the 7 é" + data.END


# what each is, by hand: outcome, verified, strict
VERDICTS = {right: (1, 1, 1), wrong_answer: (0, 0, 0), lucky: (1, 0, 0), with_extra_step: (1, 1, 0), cut_off: (0, 0, 0),
            nonsense: (0, 0, 0)}

# op -> what the model writes in four samples for each of the op's problems
PLAN = {
    3: [[right, right, right, wrong_answer], [right] * 4, [right, with_extra_step, right, right]],
    12: [[right, lucky, lucky, nonsense], [wrong_answer] * 4, [lucky, lucky, cut_off, with_extra_step]],
    13: [[cut_off] * 4, [right, nonsense, nonsense, cut_off], [nonsense] * 4],
    17: [[lucky, cut_off, nonsense, wrong_answer]] * 3,
}


@pytest.fixture
def known(monkeypatch):
    """Arguments and problems for `evaluate.evaluate`, with `sample` replaced; what it was called with is kept in `calls`."""
    args = types.SimpleNamespace(n=4, k=[1, 2, 4], id_ranges={"zoo": [2, 10], "school": [2, 2]}, device="cpu", seed=0,
                                 temperature=0.7, rows=8, samples=None, weights=None, loss=False)
    # plain enough that dropping the first step loses a step that is needed
    problems = {op: [data.make_row(i, data.parse_mixture(f"zoo:{op}"), 0, "eval", data.World(0))
                     for i in range(3)] for op in PLAN}
    answers = {}
    for op, plan in PLAN.items():
        for row, kinds in zip(problems[op], plan):
            answers[data.prompt_text(row)] = [kind(row) for kind in kinds]
    calls = []

    def sample(model, prompts, stop, n, max_new, temperature, generator, rows, progress=None, buffers=None):
        calls.append(types.SimpleNamespace(**locals()))
        tokens = [data.encode(ENC, text) for prompt in prompts for text in answers[ENC.decode(prompt)]]
        assert stop == [STOP] and n == 4 and max(map(len, tokens)) <= max_new
        return tokens, [torch.zeros(len(t)) for t in tokens]

    monkeypatch.setattr(evaluate, "sample", sample)
    return types.SimpleNamespace(args=args, problems=problems, calls=calls, answers=answers)


def counts(verdict, ops):
    """Right samples of each problem, from PLAN and VERDICTS."""
    return [sum(VERDICTS[kind][verdict] for kind in kinds) for op in ops for kinds in PLAN[op]]


def assert_numbers(numbers, ops):
    """pass@k of all three verdicts, by brute force, with intervals; and what went wrong."""
    for j, verdict in enumerate(("outcome", "verified", "strict")):
        for k in (1, 2, 4):
            values = [np.mean([any(s) for s in itertools.combinations([True] * c + [False] * (4 - c), k)])
                      for c in counts(j, ops)]
            assert numbers[verdict][f"pass@{k}"] == pytest.approx(np.mean(values)), (verdict, k)
            assert numbers[verdict][f"pass@{k} interval"] == pytest.approx(interval(values)), (verdict, k)
    written = collections.Counter(kind for op in ops for kinds in PLAN[op] for kind in kinds)
    samples, answered = sum(written.values()), sum(written[k] * VERDICTS[k][0] for k in written)
    assert samples == 12 * len(ops)
    assert numbers["hacked"] == pytest.approx(written[lucky] / answered)
    assert numbers["truncated"] == pytest.approx(written[cut_off] / samples)
    assert numbers["named"] == pytest.approx(1 - written[nonsense] / samples)
    low, high = numbers["named interval"]
    assert 0 <= low <= numbers["named"] <= high <= 1
    assert numbers["errors"].get("extra node", 0) == pytest.approx(written[with_extra_step] / samples)
    assert numbers["errors"].get("wrong answer", 0) == pytest.approx(written[wrong_answer] / samples)
    assert numbers["errors"].get("undefined letter", 0) >= written[lucky] / samples


def test_the_report_on_known_answers(known):
    records = evaluate.evaluate(None, READER, known.problems, known.args, "cpu", nullcontext())
    assert [r["op"] for r in records] == [op for op in PLAN for _ in range(3)]
    assert [r["right"]["verified"] for r in records] == counts(1, PLAN)
    assert [r["row"] for r in records] == [row for rows in known.problems.values() for row in rows]
    assert all(r["distractors"] == 0 for r in records)
    assert [r["text"] for r in records] == [known.answers[data.prompt_text(r["row"])][0] for r in records]

    summary = evaluate.summarize(records, known.args)
    assert_numbers(summary, PLAN)
    assert list(summary["ops"]) == ["3", "12", "13", "17"]
    for op, numbers in summary["ops"].items():
        assert_numbers(numbers, [int(op)])
    assert list(summary["groups"]) == ["ID", "OOD-edge", "OOD-hard"]
    for group, ops in (("ID", [3]), ("OOD-edge", [12, 13]), ("OOD-hard", [17])):
        assert_numbers(summary["groups"][group], ops)
    assert summary["contexts"] == {"zoo": summary["groups"]}
    by_problem = evaluate.by_problem(records)
    assert by_problem["op"] == [op for op in PLAN for _ in range(3)] and by_problem["context"] == ["zoo"] * 12
    assert [by_problem[verdict] for verdict in ("outcome", "verified", "strict")] == [counts(j, PLAN) for j in range(3)]
    for name, kind in (("hacked", lucky), ("truncated", cut_off)):
        assert by_problem[name] == [kinds.count(kind) for op in PLAN for kinds in PLAN[op]]
    assert by_problem["named"] == [4 - kinds.count(nonsense) for op in PLAN for kinds in PLAN[op]]
    assert summary["distractors"] == {group: {"0-1": numbers} for group, numbers in summary["groups"].items()}


def test_the_edge_is_what_is_surely_hard_and_surely_possible(known):
    for ops, edge in ((PLAN, [12, 13]), ([17], None), ([3], None), ([3, 13, 17], [13, 13])):
        records = evaluate.evaluate(None, READER, {op: known.problems[op] for op in ops}, known.args, "cpu", nullcontext())
        assert evaluate.summarize(records * 20, known.args)["edge"] == edge
        assert evaluate.summarize(records, known.args)["edge"] is None  # three problems say little


def recorded(rows, known, monkeypatch):
    """The summary for rows of op 3 whose solutions are empty."""
    monkeypatch.setattr(evaluate, "sample", lambda model, prompts, *args, **more: ([[STOP]] * 4 * len(prompts), None))
    return evaluate.summarize(evaluate.evaluate(None, READER, {3: rows}, known.args, "cpu", nullcontext()), known.args)


def test_no_reasoning_is_the_better_of_a_constant_answer_and_the_last_number(known, monkeypatch):
    def row(answer, last):
        return dict(problem=f"The number of adult owl in Pine Ridge equals 1. x equals {last}. ", question="?", op=3,
                    solution=f"Define adult owl in Pine Ridge as a; so a = {answer}. Answer: {answer}.",
                    template="crazy_zootopia")

    for pairs, best in (([(7, 1), (8, 8), (9, 9)], 2 / 3), ([(7, 1), (7, 2), (7, 3), (4, 4)], 3 / 4),
                        ([(5, 15), (6, 61)], 1 / 2)):
        summary = recorded([row(*pair) for pair in pairs], known, monkeypatch)
        assert summary["ops"]["3"]["baseline"] == summary["groups"]["ID"]["baseline"] == pytest.approx(best)


def test_a_problem_is_in_distribution_if_pretraining_saw_its_op_in_its_context(known, monkeypatch):
    rows = [data.make_row(0, data.parse_mixture(f"{context}:3"), 0, "eval") for context in data.CONTEXTS]
    summary = recorded(rows, known, monkeypatch)
    assert {context: [*groups] for context, groups in summary["contexts"].items()} == {
        "zoo": ["ID"], "school": ["OOD-edge"], "movie": ["unseen"]}
    assert [*summary["groups"]] == ["ID", "OOD-edge", "unseen"]


def test_problems_of_two_ops_have_nothing_in_common(known):
    args = types.SimpleNamespace(data=None, ops="3-6", context="all", problems=30, seed=0, distractors=2.0, max_parents=4,
                                 max_value=1000)
    problems = evaluate.problems_of(args)
    assert problems == evaluate.problems_of(args) and [*problems] == [3, 4, 5, 6]
    assert len({str([row["template"] for row in rows]) for rows in problems.values()}) == 4


def test_ranks_share_the_problems_and_draw_differently(known, monkeypatch):
    def of_rank(known, rank, n_ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
        return evaluate.evaluate(None, READER, known.problems, known.args, "cpu", nullcontext())

    whole = evaluate.evaluate(None, READER, known.problems, known.args, "cpu", nullcontext())
    parts = [of_rank(known, rank, 4) for rank in range(4)]
    assert [len(part) for part in parts] == [4, 4, 4, 0]

    def key(r):
        return r["op"], r["row"]["id"]

    assert sorted(map(key, itertools.chain(*parts))) == sorted(map(key, whole))
    assert {key(r): r["right"] for part in parts for r in part} == {key(r): r["right"] for r in whole}
    assert len({call.generator.initial_seed() for call in known.calls[-12:]}) == 3
    assert all(call.rows == 8 and call.temperature == 0.7 for call in known.calls)


def test_distractors_are_counted(known, monkeypatch):
    rows = [data.make_row(i, data.parse_mixture("school:3"), 0, "eval", data.World(4)) for i in range(20)]
    monkeypatch.setattr(evaluate, "sample", lambda model, prompts, *args, **more: ([[STOP]] * 4 * len(prompts), None))
    records = evaluate.evaluate(None, READER, {3: rows}, known.args, "cpu", nullcontext())
    for record, row in zip(records, rows):
        instances = re.findall(r"The number of (.+?) equals", row["problem"])
        needed = re.findall(r"Define (.+?) as", row["solution"])
        assert record["distractors"] == len(set(instances) - set(needed)) and record["context"] == "school"
    per_group = evaluate.summarize(records, known.args)["distractors"]["OOD-edge"]
    assert list(per_group) == ["0-1", "2-4", "5-12"]


def test_show_marks_steps_beside_the_gold_ones(known, capsys):
    records = evaluate.evaluate(None, READER, {op: known.problems[op][:1] for op in PLAN}, known.args, "cpu", nullcontext())
    evaluate.show({"a.pt": records}, 4)  # the first samples: right, right, cut, lucky
    parts = capsys.readouterr().out.split("\n--- ")[1:]
    assert [re.match(r"zoo, problem .*: op (\d+),", part)[1] for part in parts] == ["3", "12", "13", "17"]
    for part, record, kind in zip(parts, records, (right, right, cut_off, lucky)):
        row = record["row"]
        assert row["question"] in part
        found = re.findall(r"^  (right|WRONG)  (.*?)  +(.*?)  +(.*)", part, re.M)
        for mark, mine, gold, name in found[:-1]:
            step = re.search(rf"Define {re.escape(name.split('  <- ')[0])} as \w; (.*?)\. ", row["solution"])
            assert gold == (step[1].replace("so ", "") if step else "-")  # a name may be cut off
            assert mine == gold or mark == "WRONG"
        assert found[-1][2] == str(record["answer"]) and found[-1][3].startswith("answer")
        assert {mark for mark, *_ in found} == ({"right"} if kind is right else {"right", "WRONG"})
        if kind is right:
            assert len(found) == row["solution"].count("Define") + 1 and "<-" not in part
    assert re.search(r"WRONG  none +\d+ +answer  <- no answer", parts[2])
    assert re.search(r"WRONG  - .+<- missing node$", parts[3], re.M)
    evaluate.show({"a.pt": records, "b.pt": records}, 99)
    out = capsys.readouterr().out
    assert out.count("\n--- ") == 4 and out.count(" a.pt ") == out.count(" b.pt ") == 4
    evaluate.show({"a.pt": records}, 0)
    assert not capsys.readouterr().out


def test_samples_are_written_with_their_verdicts(known, tmp_path):
    known.args.samples = "s.jsonl"
    records = evaluate.evaluate(None, READER, known.problems, known.args, "cpu", nullcontext())
    evaluate.write_samples(tmp_path / "s.jsonl", {"a.pt": records, "b.pt": records[:1]})
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    kinds = [kind for op in PLAN for of_problem in PLAN[op] for kind in of_problem]
    assert len(lines) == len(kinds) + 4 and [line["checkpoint"] for line in lines] == ["a.pt"] * len(kinds) + ["b.pt"] * 4
    for line, kind in zip(lines, kinds):
        row = next(row for row in known.problems[line["op"]] if row["id"] == line["id"])
        assert (line["outcome"], line["verified"], line["strict"]) == VERDICTS[kind]
        assert line["gen_solution_answer"] == kind(row) and bool(line["errors"]) == (not line["strict"])
        assert [line[key] for key in ("problem", "question", "solution", "template")] == [
            row[key] for key in ("problem", "question", "solution", "template")]
    assert [line["sample_rank"] for line in lines[:5]] == [0, 1, 2, 3, 0]


def test_weights_are_for_the_thirds_of_id(known):
    """By hand: three ops of three problems each; the interval of a sum of independent parts."""
    known.problems = {op: known.problems[op] for op in (3, 12, 13)}
    known.args.weights, known.args.id_ranges, known.args.id_ops = [0.2, 0.3, 0.5], {"zoo": [3, 17]}, [3, 17]  # 3-7, 8-12, 13-17
    records = evaluate.evaluate(None, READER, known.problems, known.args, "cpu", nullcontext())
    numbers = evaluate.summarize(records, known.args)["groups"]["ID"]
    parts = [np.array(counts(1, [op])) / 4 for op in (3, 12, 13)]
    means, ends = [part.mean() for part in parts], [interval(part) for part in parts]
    expected = 0.2 * means[0] + 0.3 * means[1] + 0.5 * means[2]
    assert numbers["verified"]["pass@1"] == pytest.approx(expected) and expected != pytest.approx(np.mean(means))
    for i, sign in ((0, -1), (1, 1)):
        distance = sum((w * (mean - end[i])) ** 2 for w, mean, end in zip(known.args.weights, means, ends)) ** 0.5
        assert numbers["verified"]["pass@1 interval"][i] == pytest.approx(expected + sign * distance)
    change = evaluate.differences(records, records, known.args)["ID"]
    assert change["pass@1"] == 0 and change["pass@1 interval"][0] < 0 < change["pass@1 interval"][1]
    assert evaluate.in_parts(records, known.args) == [(0.2, [0, 1, 2]), (0.3, [3, 4, 5]), (0.5, [6, 7, 8])]
    assert evaluate.in_parts(records[:3], known.args) == evaluate.in_parts([{**records[0], "group": "OOD-edge"}], known.args) == []
    known.args.weights = None
    assert evaluate.in_parts(records, known.args) == []


# ----------------------------------------------------------------------------------------------------------------------
# signs, on made-up numbers

def change(first, last, hacked):
    """Three intervals, each with its middle as the value."""
    return {key: number for name, ends in (("pass@1", first), ("pass@16", last), ("hacked", hacked))
            for key, number in ((name, sum(ends) / 2), (f"{name} interval", [*ends]))}


UP, DOWN, NONE, WIDE = (0.02, 0.1), (-0.1, -0.02), (-0.03, 0.04), (-0.06, 0.08)  # WIDE: a rise of MARGIN is possible


@pytest.mark.parametrize("first, last, hacked, words", [
    (UP, NONE, NONE, ["sharpening only"]), (UP, DOWN, NONE, ["sharpening only"]), (UP, WIDE, NONE, []), (NONE, NONE, NONE, []),
    (DOWN, DOWN, DOWN, []), (WIDE, WIDE, WIDE, []), (UP, UP, NONE, ["ability added"]), (NONE, UP, NONE, ["ability added"]),
    (UP, UP, UP, ["ability added", "reward hacking"]), (NONE, NONE, UP, ["reward hacking"]),
    (UP, NONE, UP, ["sharpening only", "reward hacking"])])
def test_signs_of_a_change(first, last, hacked, words):
    changes = {"ID": change(NONE, NONE, NONE), "OOD-edge": change(first, last, hacked)}
    found = evaluate.signs(dict(stage="grpo", contexts={}), [1, 4, 16], changes)
    assert [sentence.split(",")[0] for sentence in found] == [f"OOD-edge: {word}" for word in words]
    if words and words[0] != "reward hacking":
        numbers = "{:+.3f} [{:+.3f} {:+.3f}]".format(sum(last) / 2, *last)
        assert f"pass@16 {numbers}" in found[0]
    found = evaluate.signs(dict(stage="midtrain", contexts={}), [1, 4, 16], changes)  # which has no reward
    assert [sentence.split(",")[0] for sentence in found] == [f"OOD-edge: {word}" for word in words if word != "reward hacking"]


@pytest.mark.parametrize("ends", [UP, (0.01, 0.04)])
def test_with_one_k_there_is_no_ability_to_tell_from_sharpening(ends):
    changes = {"ID": change(ends, ends, NONE)}
    assert evaluate.signs(dict(stage="grpo", contexts={}), [1], changes) == []


def test_a_change_is_against_what_a_checkpoint_was_made_from():
    loaded = [(path, dict(run=run, recipe=dict(init_run=init)), None) for path, run, init in
              (("base", "b-9", None), ("mid", "m-4", "b-9"), ("rl of base", "r-3", "b-9"), ("rl of mid", "s-3", "m-4"), ("other", "o", "x"))]
    assert [evaluate.made_from(checkpoint, loaded) for _, checkpoint, _ in loaded] == [None, "base", "base", "mid", "base"]
    assert [evaluate.made_from(checkpoint, loaded[::-1]) for _, checkpoint, _ in loaded] == ["other", "base", "base", "mid", None]


def test_checkpoints_may_be_named_in_any_order(trained):
    init = load_checkpoint(trained / "a.pt")
    put(checkpoint_with(recipe=init["recipe"] | dict(init="a.pt", init_run=init["run"]), run="x-1")(trained / "a.pt"), trained / "x.pt")
    for order in (["x.pt", "a.pt"], ["b.pt", "x.pt", "a.pt"]):
        _, report = evaluated(trained, *order, *SHORT)
        assert report["checkpoints"]["x.pt"]["init_here"] == "a.pt"


@pytest.mark.parametrize("groups, none", [
    ({"ID": (0.0, [0, 0.03]), "OOD-edge": (0.01, [0, 0.04])}, True), ({"ID": (0.0, [0, 0.06])}, False),  # too few problems to say
    ({"ID": (0.0, [0, 0.03]), "OOD-edge": (0.9, [0.85, 0.95])}, False)])
def test_signs_of_a_context_whose_names_are_never_written(groups, none):
    contexts = {"school": {name: dict(named=named, **{"named interval": ends}) for name, (named, ends) in groups.items()},
                "zoo": {"ID": dict(named=0.9, **{"named interval": [0.85, 0.95]})}}
    found = evaluate.signs(dict(stage="pretrain", contexts=contexts), [1, 16])
    assert [sentence.split(",")[0] for sentence in found] == ["school: no seed"] * none


def of_op(groups, gradient, wrong, right):
    return dict(groups=groups, gradient=gradient, all_wrong=wrong, all_right=right, mixed=1 - wrong - right, reward=0.0)


@pytest.mark.parametrize("rows, words", [
    ([{"9": of_op(10, 0.0, 1.0, 0.0)}, {"9": of_op(30, 0.1, 0.9, 0.0)}], "7.5% of its groups had a gradient, 92.5% were all wrong, 0.0%"),
    ([{"2": of_op(30, 0.0, 0.0, 1.0), "3": of_op(10, 0.2, 0.0, 0.8)}], "5.0% of its groups had a gradient, 0.0% were all wrong, 95.0%"),
    ([{"9": of_op(10, 0.0, 1.0, 0.0)}, {"9": of_op(30, 0.2, 0.8, 0.0)}], ""), ([], "")])
def test_signs_of_rl_off_the_edge(rows, words):
    found = evaluate.signs(dict(stage="grpo", contexts={}), [1, 16], metrics=[dict(groups=groups) for groups in rows])
    assert [words in sentence for sentence in found] == [True] * bool(words)


def test_metrics_are_those_beside_the_checkpoint(tmp_path):
    rows = [dict(step=1, groups={"9": of_op(10, 0.0, 1.0, 0.0)})]
    (tmp_path / "grpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "pretrain.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (tmp_path / "running.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    (tmp_path / "foreign.jsonl").write_text('{"problem": "..."}\n')
    (tmp_path / "broken.jsonl").write_text('{"step": 1, "gro\n')
    assert evaluate.read_metrics(str(tmp_path / "grpo.pt")) == rows
    assert all(evaluate.read_metrics(str(tmp_path / f"{name}.pt")) == [dict(step=1, loss=2.0)] for name in ("pretrain", "running"))
    assert [evaluate.read_metrics(str(tmp_path / f"{name}.pt")) for name in ("foreign", "broken", "none")] == [[], [], []]


# ----------------------------------------------------------------------------------------------------------------------
# the command

SHORT = "--n 4 --k 1,4 --problems 2 --ops 3-5 --temperature 1".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two checkpoints, each barely trained, on op 2-4."""
    folder = tmp_path_factory.mktemp("trained")
    for name, steps in (("a", 2), ("b", 3)):
        assert run(folder, "pretrain.py", *TINY, "--ops", "2-4", "--steps", steps, "--out", f"{name}.pt").code == 0
    return folder


def evaluated(folder, *arguments, json_file="e.json"):
    result = run(folder, "evaluate.py", *arguments, *(["--json", json_file] if json_file else []))
    assert result.code == 0, result
    return result.out, json.loads((folder / (json_file or "out/eval.json")).read_text())


def test_the_file_and_the_table(trained):
    (trained / "link.json").symlink_to("far.json")
    out, report = evaluated(trained, "a.pt", *SHORT, "--show", 9, json_file="link.json")
    assert (trained / "link.json").is_symlink() and (trained / "far.json").is_file()
    assert report["settings"] == {"n": 4, "k": [1, 4], "problems": 2, "temperature": 1.0, "distractors": 0.5,
                                  "max_parents": 2, "max_value": 20, "seed": 0, "weights": None,
                                  "context": "all", "data": None, "id_ops": [2, 4],
                                  "id_ranges": dict.fromkeys(data.CONTEXTS, [2, 4])}
    result, = report["checkpoints"].values()
    assert list(report["checkpoints"]) == ["a.pt"]
    assert (result["stage"], result["step"], result["problems"]) == ("pretrain", 2, 16)
    assert list(result["groups"]) == ["ID", "OOD-edge"] and list(result["ops"]) == ["3", "4", "5"]
    assert set(result["contexts"]) <= set(data.CONTEXTS) and result["contexts"]
    for numbers in [*result["groups"].values(), *result["ops"].values()]:
        for verdict in ("outcome", "verified", "strict"):
            assert list(numbers[verdict]) == ["pass@1", "pass@1 interval", "pass@4", "pass@4 interval"]
            for k in (1, 4):
                (low, high), mean = numbers[verdict][f"pass@{k} interval"], numbers[verdict][f"pass@{k}"]
                assert 0 <= low <= mean <= high <= 1 and high - low > 0.1
    assert result["errors"]  # it cannot be right yet

    assert out.startswith("6 held-out problems, op 3-5, 4 samples each")
    lines = [line.split() for line in out.splitlines()]
    assert ["verified", "verified", "strict", "outcome", "no", "reasoning"] in lines
    assert ["pass@1", "pass@4", "pass@1", "pass@1"] in lines
    for title, numbers in [*((f"op {op}", v) for op, v in result["ops"].items()), *result["groups"].items()]:
        cells = next(line for line in out.splitlines() if line.startswith(title + " "))
        expected = [x for v, k in (("verified", "pass@1"), ("verified", "pass@4"), ("strict", "pass@1"), ("outcome", "pass@1"))
                    for x in (numbers[v][k], *numbers[v][f"{k} interval"])] + [numbers["baseline"]]
        assert [float(x) for x in re.findall(r"\d?\.\d{3}", cells)] == pytest.approx(expected, abs=6e-4)
        assert re.fullmatch(r"[^.]+( +1?\.\d{3} \[1?\.\d{3} 1?\.\d{3}\]){4} +1?\.\d{3}", cells)
    assert out.count("\n--- ") == 6 and "  WRONG  " in out  # --show
    for op, i in itertools.product((3, 4, 5), (0, 1)):
        row = data.make_row(op * 10 ** 6 + i, data.parse_mixture(str(op)), split="eval", world=data.World(0.5, 2, 20))
        assert all(f"{sentence.strip('. ')}.\n" in out for sentence in row["problem"].split(". ") if sentence.strip())
    assert "edge" in out and "cut off" in out and "interval over problems" in out


def test_a_seed_repeats_the_numbers_and_another_does_not(trained):
    a, again, other = (evaluated(trained, "a.pt", *SHORT, "--show", 9, "--seed", seed) for seed in (3, 3, 4))
    assert a == again
    assert a[0].split("\n--- ")[1:7] != other[0].split("\n--- ")[1:7]  # other problems and samples


def test_checkpoints_side_by_side(trained):
    put(checkpoint_with()(trained / "b.pt"), trained / "c.pt")
    out, report = evaluated(trained, "a.pt", "b.pt", "c.pt", *SHORT)
    assert list(report["checkpoints"]) == ["a.pt", "b.pt", "c.pt"]
    assert [result["step"] for result in report["checkpoints"].values()] == [2, 3, 3]
    shown = out.split("interval over problems")[0].splitlines()[1:]
    lines = [line.split() for line in shown]
    assert max(map(len, shown)) < 140
    assert ["a.pt", "b.pt", "c.pt"] in lines and ["pass@1", "pass@4"] * 3 in lines
    for verdict in ("verified", "strict", "outcome"):
        title = next(j for j, line in enumerate(shown) if line.startswith(verdict))
        start = next(j for j in range(title, len(lines)) if lines[j][:1] == ["ID"])
        assert [re.findall(r"\d?\.\d{3}", line)[::3] for line in shown[start:start + 2]] == [
            [f"{r['groups'][g][verdict][k]:.3f}".replace("0.", ".") for r in report["checkpoints"].values()
             for k in ("pass@1", "pass@4")] for g in ("ID", "OOD-edge")]
    for name in "ab":  # the company makes no difference
        alone = evaluated(trained, f"{name}.pt", *SHORT)[1]["checkpoints"][f"{name}.pt"]
        beside = report["checkpoints"][f"{name}.pt"]
        assert alone == {key: beside[key] for key in alone}
        assert {*beside} - {*alone} == ({"against_first", "against_init", "init_here"} if name == "b" else set())
        assert report["by_problem"][name + ".pt"]["op"] == [3, 3, 4, 4, 5, 5]
    change = report["checkpoints"]["c.pt"]["against_previous"]["ID"]
    low, high = change["pass@1 interval"]
    assert change["pass@1"] == 0 and -high == low < -0.1  # a copy: no difference, of few problems


def test_a_checkpoint_made_from_another_run_of_the_one_beside_it_is_pointed_out(trained):
    run_of_a = load_checkpoint(trained / "a.pt")["run"]
    for name, init_run in (("new", run_of_a), ("old", "before a.pt was trained anew")):
        recipe = load_checkpoint(trained / "a.pt")["recipe"] | dict(init="./a.pt", init_run=init_run)
        put(checkpoint_with(recipe=recipe)(trained / "a.pt"), trained / f"{name}.pt")
    out, report = evaluated(trained, "a.pt", "new.pt", "old.pt", *SHORT)
    assert [r["init_of_another_run"] for r in report["checkpoints"].values()] == [None, None, "a.pt"]
    assert out.count("made from another run") == 1
    assert "warning: old.pt was made from another run of a.pt than the one shown here\n" in out
    out, report = evaluated(trained, "old.pt", *SHORT)  # nothing beside it
    assert "another run" not in out and report["checkpoints"]["old.pt"]["init_of_another_run"] is None


def test_groups_are_by_the_range_of_each_context_and_old_checkpoints_have_one_range(trained):
    checkpoint = load_checkpoint(trained / "a.pt")
    assert checkpoint["id_ranges"] == dict.fromkeys(data.CONTEXTS, [2, 4])
    for ranges, expected in (({"zoo": [2, 4], "school": [2, 2]}, [["ID"], ["OOD-edge"], ["unseen"]]), (None, [["ID"]] * 3)):
        save_checkpoint(trained / "x.pt", checkpoint | dict(id_ranges=ranges))
        _, report = evaluated(trained, "x.pt", *"--n 1 --ops 3 --problems 9 --context all".split())
        found = report["checkpoints"]["x.pt"]["contexts"]
        assert [[*found[context]] for context in ("zoo", "school", "movie")] == expected


def test_numbers_are_written_before_they_are_printed_and_printed_if_they_cannot_be_written(trained, tmp_path):
    def start(**more):
        command = [sys.executable, ROOT / "evaluate.py", trained / "a.pt", *SHORT, "--show", "9", "--json", "e.json"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ | NO_CUDA, stderr=subprocess.PIPE, text=True, **more)

    done = start(stdout=subprocess.PIPE, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)))
    assert done.returncode == 1 and "too large" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert "\nop 3 " in done.stdout and done.stdout.count("\n--- ") == 6 and "numbers: e.json" not in done.stdout
    assert os.listdir(tmp_path) == []
    read_end, write_end = os.pipe()
    os.close(read_end)  # nobody listens
    start(stdout=write_end)
    os.close(write_end)
    assert os.listdir(tmp_path) == ["e.json"] and "checkpoints" in json.loads((tmp_path / "e.json").read_text())


def test_rows_of_a_file(trained):
    rows = [data.make_row(i, data.parse_mixture("movie:2"), 5) for i in range(3)]
    rows += [data.make_row(i, data.parse_mixture("zoo:9"), 5) for i in range(4)]
    (trained / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--show", 9)
    assert "\n7 problems of rows.jsonl, op 2-9" in out
    result = report["checkpoints"]["a.pt"]
    assert list(result["ops"]) == ["2", "9"] and list(result["contexts"]) == ["movie", "zoo"]
    assert all(row["question"] in out for row in rows)
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--ops", "9-12", "--problems", 3)
    assert out.startswith("3 problems of rows.jsonl, op 9-9"), out
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--context", "movie")
    assert "\n3 problems of rows.jsonl, op 2-2" in out and list(report["checkpoints"]["a.pt"]["contexts"]) == ["movie"]


def test_rows_of_other_modes_are_left_out_or_refused(trained, tmp_path):
    forward = [data.make_row(i, data.parse_mixture("zoo:3")) for i in range(2)]
    other = {**forward[0], "mode": "forwardreverse", "solution": "no such steps"}
    for name, rows in (("mixed", [*forward, other]), ("others", [other, other]), ("old", [{**forward[0], "mode": "normalforward"}])):
        text = "\r\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{name}.jsonl").write_bytes("\ufeff".encode() + text.encode())  # as Windows writes it
    (tmp_path / "latin.jsonl").write_bytes(json.dumps({**forward[0], "question": "é"}, ensure_ascii=False).encode("latin-1"))
    (tmp_path / "utf16.jsonl").write_bytes(json.dumps(forward[0]).encode("utf-16"))

    def evaluate_rows(name, *options):
        return run(tmp_path, "evaluate.py", trained / "a.pt", *"--n 2 --k 2 --problems 3 --data".split(), f"{name}.jsonl", *options)

    result = evaluate_rows("mixed")
    assert result.code == 0 and "1 of 3 rows are left out, that are not forward problems" in result.out, result
    assert "fewer rows than --problems 3: op 3 2" in result.out and "2 problems of mixed.jsonl" in result.out
    assert_refused(evaluate_rows("mixed", "--strict-rows"), "1 rows that are not forward")
    assert_refused(evaluate_rows("others"), "2 rows that are not forward")
    assert evaluate_rows("old", "--strict-rows").code == 0
    assert_refused(evaluate_rows("latin"), "latin.jsonl, line 1")
    assert_refused(evaluate_rows("utf16"), "utf16.jsonl, line 1")


def test_rows_without_an_id_and_of_several_lines_are_shown(trained, tmp_path):
    row = data.make_row(0, data.parse_mixture("zoo:3"))
    del row["id"]
    row["solution"] = row["solution"].replace(". ", ".\n")
    other = data.make_row(1, data.parse_mixture("zoo:3"))
    (tmp_path / "rows.jsonl").write_text("\n\n".join(map(json.dumps, [other, row])))
    result = run(tmp_path, "evaluate.py", trained / "a.pt", *"--n 2 --k 2 --data rows.jsonl --show 9 --context zoo".split())
    assert result.code == 0 and result.out.count("\n--- ") == 2, result
    broken = {**row, "solution": "?"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{**other, "template": "teachers_in_school"}, broken])))
    assert_refused(run(tmp_path, "evaluate.py", trained / "a.pt", *"--n 2 --k 2 --data rows.jsonl --context zoo".split()), "row 2")


def test_without_arguments_it_reads_what_the_stages_wrote(trained, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("pretrain", "grpo"):
        (tmp_path / f"out/{name}.pt").write_bytes((trained / "a.pt").read_bytes())
    out, report = evaluated(tmp_path, "--n", 1, "--problems", 1, json_file=None)
    assert list(report["checkpoints"]) == ["out/pretrain.pt", "out/grpo.pt"]
    result = report["checkpoints"]["out/grpo.pt"]
    assert list(result["ops"]) == ["2", "3", "4", "5", "6", "7", "8"]  # to twice the largest op of pre-training
    assert list(result["groups"]) == ["ID", "OOD-edge", "OOD-hard"] and report["settings"]["k"] == [1]
    low, high = result["ops"]["2"]["strict"]["pass@1 interval"]
    assert high - low > 0.7  # one problem says next to nothing


def test_the_plot(trained):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    evaluated(trained, "a.pt", "b.pt", *SHORT, "--plot", "plots/p.png")
    assert (trained / "plots/p.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_shows_the_numbers(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    monkeypatch.setattr(evaluate, "pyplot", lambda: pyplot)

    def numbers(value):
        return dict(verified={f"pass@{k}": value + k / 100 for k in (1, 4)} | {
            f"pass@{k} interval": [value, value + 0.1] for k in (1, 4)})

    results = {path: dict(stage=stage, contexts={"zoo": {}}, groups={"ID": numbers(0.9), "OOD-edge": numbers(value)},
                          ops={"8": numbers(0.9), "9": numbers(value)})
               for path, stage, value in (("x/base.pt", "pretrain", 0.1), ("x/rl.pt", "grpo", 0.3), ("x/rl2.pt", "grpo", 0.5))}
    args = types.SimpleNamespace(k=[1, 4], id_ranges={"zoo": [2, 8]}, plot=str(tmp_path / "p.svg"), loss=False)
    evaluate.plot(results, args)
    axes = {ax.get_title(): ax for ax in pyplot.gcf().axes}
    over_op, over_k = axes[""].lines, axes["OOD-edge"].lines
    assert [[*line.get_xdata()] for line in over_op] == [[8, 9]] * 6 and [[*line.get_xdata()] for line in over_k] == [[1, 4]] * 3
    assert [[*line.get_ydata()] for line in over_k] == [pytest.approx([v + 0.01, v + 0.04]) for v in (0.1, 0.3, 0.5)]
    assert [[*line.get_ydata()] for line in over_op] == [
        pytest.approx([0.9 + k / 100, v + k / 100]) for v in (0.1, 0.3, 0.5) for k in (1, 4)]
    colors = [line.get_color() for line in over_k]
    assert colors[:2] == [evaluate.COLORS["pretrain"], evaluate.COLORS["grpo"]] and len(set(colors)) == 3
    assert [line.get_color() for line in over_op] == [color for color in colors for _ in (1, 4)]
    args.k = [4]
    evaluate.plot(results, args)
    assert len(pyplot.gcf().axes) == 1 and len(pyplot.gcf().axes[0].lines) == 3
    pyplot.close("all")


def test_the_curves_show_what_was_logged(monkeypatch, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="needs matplotlib")
    monkeypatch.setattr(evaluate, "pyplot", lambda: pyplot)
    training = [dict(step=step, loss=1 / step, val_loss=2 / step if step > 2 else None) for step in range(1, 5)]
    rl = [dict(step=step, groups={"9": of_op(10, 0.5, 1 - step / 2, step / 2), **({"10": of_op(2, 0, 1.0, 0)} if step == 2 else {})},
               held_out={"ID": 0.9, "ID interval": [0.8, 1.0]}, approx_kl=None if step == 1 else 0.1,
               **dict.fromkeys("reward outcome process verified strict hacked entropy kl length truncated".split(), step / 10))
          for step in (1, 2)]
    evaluate.plot_curves({"x/base.pt": training, "x/rl.pt": rl}, str(tmp_path / "c.png"))
    axes = {ax.get_title(): ax for ax in pyplot.gcf().axes}
    assert [*axes] == ["base: loss, nats a token", "rl: reward and parts", "verified, held out", "entropy, nats a token",
                       "KL, nats a token", "length, tokens", "share cut off", "groups of op 9", "groups of op 10"]
    loss, held_out = axes["base: loss, nats a token"].lines
    assert [*loss.get_ydata()] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert [[*held_out.get_xdata()], [*held_out.get_ydata()]] == [[3, 4], pytest.approx([2 / 3, 1 / 2])]
    assert all([*line.get_ydata()] == [0.1, 0.2] for line in axes["rl: reward and parts"].lines)
    assert [[*line.get_xdata()] for line in axes["KL, nats a token"].lines] == [[1, 2], [2]]
    wrong, mixed, all_right = [area.get_paths()[0].vertices for area in axes["groups of op 9"].collections]
    assert {(1.0, 0.5), (2.0, 0.0)} <= {(x, y) for x, y in wrong.tolist()}          # upper edges
    assert {(1.0, 1.0), (2.0, 1.0)} <= {(x, y) for x, y in all_right.tolist()}
    pyplot.close("all")


def test_curves_of_the_command(trained, tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    (tmp_path / "e.json").write_text("kept")
    result = run(tmp_path, "evaluate.py", trained / "a.pt", trained / "b.pt", "--curves", "c.png", "--json", "e.json")
    assert result.code == 0 and (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "e.json").read_text() == "kept"  # it evaluates nothing
    (tmp_path / "a.pt").write_bytes((trained / "a.pt").read_bytes())
    for content in None, '{"step": 1}\n', '{"step": 1, "groups": {}}\n':
        (tmp_path / "a.jsonl").write_text(content) if content else None
        assert_refused(run(tmp_path, "evaluate.py", "a.pt", "--curves", "d.png"), "a.jsonl")
    assert not (tmp_path / "d.png").exists()


def test_two_ranks_do_the_work_of_one(trained):
    arguments = ["a.pt", "b.pt", *SHORT[:-2], "--temperature", "0", "--show", "1"]  # 0: no chance between the two
    out, one = evaluated(trained, *arguments)
    result = run_ranks(trained, "evaluate.py", *arguments, "--json", "two.json")
    assert result.code == 0, result
    two = json.loads((trained / "two.json").read_text())
    assert result.out.count("6 held-out problems") == 1 and result.out.count("numbers: two.json") == 1
    for name in ("a.pt", "b.pt"):
        assert list(two["checkpoints"][name]) == list(one["checkpoints"][name])
        for key in ("ops", "groups", "contexts", "distractors", "truncated", "errors"):
            assert two["checkpoints"][name][key] == one["checkpoints"][name][key], key


# ----------------------------------------------------------------------------------------------------------------------
# bad input

BAD = [  # arguments, words in the last line
    ("missing.pt", "missing.pt"), ("a.pt missing.pt", "missing.pt"), ("folder", "folder"), ("text.pt", "text.pt"),
    ("cut.pt", "cut.pt"), ("a.pt --n 2 --k 4", "pass@4"), ("a.pt --k 0", "--k"), ("a.pt --k x", "x"),
    ("a.pt --k 1,,2", "1,,2"),
    ("a.pt --n 0", "--n"), ("a.pt --n -3", "--n"), ("a.pt --problems 0", "--problems"), ("a.pt --rows 0", "--rows"),
    ("a.pt --show -1", "--show"), ("a.pt --temperature -1", "--temperature"), ("a.pt --temperature nan", "--temperature"),
    ("a.pt --ops 10-2", "10-2"), ("a.pt --ops 0-1", "0-1"), ("a.pt --ops 1-500", "1-500"), ("a.pt --ops x", "x"),
    ("a.pt --context farm", "farm"), ("a.pt --distractors 99", "distractors"), ("a.pt --seed -1", "--seed"),
    ("a.pt --seed 99999999999999999999", "--seed"), ("a.pt --device nope", "nope"),
    ("a.pt --json text.pt/e.json", "text.pt"), ("a.pt --json folder", "folder"), ("a.pt --json folder/", "folder"),
    ("a.pt --plot text.pt/p.png", "text.pt"), ("a.pt --plot folder", "folder"),
    ("a.pt --data missing.jsonl", "missing.jsonl"), ("a.pt --data text.pt", "text.pt"),
    ("a.pt --data empty.jsonl", "empty.jsonl"),
    ("a.pt --data bytes.jsonl", "bytes.jsonl"), ("a.pt --data other.jsonl", "other.jsonl"),
    ("a.pt --data unsolved.jsonl", "unsolved.jsonl"), ("a.pt --data op.jsonl", "op.jsonl"),
    ("a.pt --data rows.jsonl --ops 7", "7"), ("a.pt --data rows.jsonl --context movie", "movie"),
    ("a.pt --data true.jsonl", "true.jsonl row 1"), ("a.pt --data negative.jsonl", "negative.jsonl row 1"),
    ("a.pt --data rows.jsonl --distractors 1", "for fresh problems"), ("a.pt --data number.jsonl", "line 1"),
    ("a.pt --data tagged.jsonl", "tagged.jsonl row 1"), ("a.pt --data glued.jsonl", "glued.jsonl row 1"),
    ("a.pt --data rows.json --json rows.json", "overwrite"), ("a.pt --json cut.pt", ".json"), ("a.pt --json=", ".json"),
    ("a.svg --plot a.svg", "overwrite"), ("tokens.pt", "tokens"), ("a.pt --nope", "--nope"),
    ("a.pt --samples a.jsonl", "overwrite"), ("a.pt --samples cut.pt", ".jsonl"), ("a.pt --curves cut.pt", ".png"),
    ("a.pt --data rows.jsonl --samples rows.jsonl", "overwrite"), ("a.pt --weights 0.5,0.6", "add up to 1"),
    ("a.pt --weights -0.5,1.5", "--weights"), ("a.pt --weights 0.5,0.5", "not all here"),
    ("a.pt --strict-rows", "--data"), ("a.pt --curves c.png --plot p.png --loss", "no --plot, --loss"), ("a.pt --id-ops 2-3", "folders of other"), ("folder", "folder"),
]


@pytest.fixture(scope="module")
def bad_folder(trained, tmp_path_factory):
    """A folder with what BAD speaks of."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    for name, source in (("a.pt", "a.pt"), ("a.svg", "a.pt"), ("a.jsonl", "a.jsonl")):
        (folder / name).write_bytes((trained / source).read_bytes())
    (folder / "cut.pt").write_bytes((trained / "a.pt").read_bytes()[:-500])
    row = data.make_row(0, data.parse_mixture("zoo:2"))
    for name, content in {
            "text.pt": "hello\n", "empty.jsonl": "", "rows.jsonl": json.dumps(row), "other.jsonl": '{"text": "a"}\n',
            "rows.json": json.dumps(row), "true.jsonl": json.dumps({**row, "op": True}),
            "number.jsonl": json.dumps({**row, "problem": 1}),
            "tagged.jsonl": json.dumps({**row, "solution": row["solution"].replace("Answer: ", "</solution> <answer> ")}),
            "glued.jsonl": json.dumps({**row, "solution": "Define owl in South Zoo as a; so a = 4 Answer: 4."}),
            "negative.jsonl": json.dumps({**row, "op": -2}),
            "unsolved.jsonl": json.dumps({**row, "solution": "I do not know."}),
            "op.jsonl": json.dumps({**row, "op": 2.5})}.items():
        (folder / name).write_text(content)
    put(checkpoint_with(recipe={"vocabulary": "another"})(folder / "a.pt"), folder / "tokens.pt")
    (folder / "bytes.jsonl").write_bytes(bytes(range(128, 256)))
    return folder


@pytest.mark.parametrize("arguments, word", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(bad_folder, arguments, word):
    before = sorted(path for path in bad_folder.rglob("*") if path.is_file())
    assert_refused(run(bad_folder, "evaluate.py", *"--n 4 --problems 1 --ops 2".split(), *arguments.split()), word)
    assert sorted(path for path in bad_folder.rglob("*") if path.is_file()) == before


def test_a_figure_of_no_known_format_is_refused(bad_folder):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    assert_refused(run(bad_folder, "evaluate.py", "a.pt", *SHORT, "--plot", "p.nope"), "nope")


def test_no_checkpoint_at_all_is_refused(tmp_path):
    assert_refused(run(tmp_path, "evaluate.py"), "pretrain.py")
    assert not list(tmp_path.rglob("*.json"))


# what evaluate.py needs of a checkpoint: the stage that wrote it does not matter, nor do optimizers
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_checkpoint_is_refused(trained, tmp_path, kind):
    put(BROKEN[kind](trained / "a.pt"), tmp_path / "x.pt")
    assert_refused(run(tmp_path, "evaluate.py", "x.pt", "--n", 1, "--problems", 1), "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("key, value", [("id_ops", None), ("id_ops", "x"), ("id_ops", [2]), ("step", None),
                                        ("problems", None)], ids=str)
def test_a_checkpoint_that_lacks_what_the_report_needs_is_refused(trained, tmp_path, key, value):
    checkpoint = load_checkpoint(trained / "a.pt")
    checkpoint[key] = value
    if value is None:
        del checkpoint[key]
    save_checkpoint(tmp_path / "x.pt", checkpoint)
    assert_refused(run(tmp_path, "evaluate.py", "x.pt", "--n", 1, "--problems", 1), "x.pt")
    assert os.listdir(tmp_path) == ["x.pt"]
