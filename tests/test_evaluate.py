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
import types
from contextlib import nullcontext
from fractions import Fraction

import numpy as np
import pytest
import torch

import data
import evaluate
from conftest import BROKEN, TINY, assert_refused, checkpoint_with, put, run, run_ranks
from evaluate import group_of, interval, pass_at_k
from model import load_checkpoint, save_checkpoint

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


def test_interval_is_the_normal_one_over_problems():
    mean, half = interval([0, 1, 1, 0])  # variance 4 * 0.25 / 3, of the mean a quarter of that
    assert (mean, half) == pytest.approx((0.5, 1.96 * math.sqrt(1 / 12)))
    mean, half = interval([0.1, 0.2, 0.6])
    assert (mean, half) == pytest.approx((0.3, 1.96 * math.sqrt((0.04 + 0.01 + 0.09) / 2 / 3)))
    assert interval([0.5] * 10) == (0.5, 0.0)
    assert interval([1]) == (1, None)  # one problem says nothing about others


def test_an_interval_counts_what_is_not_independent_once():
    values = [0.1, 0.2, 0.6, 0.9]
    assert interval(values, [7, 3, 5, 4]) == pytest.approx(interval(values))
    assert interval([*values, *values], [0, 1, 2, 3, 0, 1, 2, 3]) == pytest.approx(interval(values))  # nothing was added
    # two clusters whose sums of differences from the mean of 0.5 are 0.6 and -0.6: variance 2 * 0.72, of the sum
    assert interval([1, 0.6, 0.4, 0], [0, 0, 1, 1]) == pytest.approx((0.5, 1.96 * math.sqrt(1.44) / 4))


def test_groups_of_ops():
    names = {op: group_of(op, [2, 10]) for op in range(2, 21)}
    assert [op for op in names if names[op] == "ID"] == list(range(2, 11))
    assert [op for op in names if names[op] == "OOD-edge"] == [11, 12, 13, 14]
    assert [op for op in names if names[op] == "OOD-hard"] == list(range(15, 21))
    assert [group_of(op, [4, 5]) for op in range(2, 9)] == ["below"] * 2 + ["ID"] * 2 + ["OOD-edge"] * 2 + ["OOD-hard"]
    assert [group_of(op, [2, 4]) for op in range(2, 9)] == ["ID"] * 3 + ["OOD-edge"] * 2 + ["OOD-hard"] * 2


# ----------------------------------------------------------------------------------------------------------------------
# a model whose answers are known

ENC = data.tokenizer()
STOP = ENC.encode_single_token(data.END)


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
    args = types.SimpleNamespace(n=4, k=[1, 2, 4], id_ops=[2, 10], device="cpu", seed=0, temperature=0.7, rows=8)
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
        assert stop == STOP and n == 4 and max(map(len, tokens)) <= max_new
        return tokens, [torch.zeros(len(t)) for t in tokens]

    monkeypatch.setattr(evaluate, "sample", sample)
    return types.SimpleNamespace(args=args, problems=problems, calls=calls, answers=answers)


def counts(verdict, ops):
    """Right samples of each problem, from PLAN and VERDICTS."""
    return [sum(VERDICTS[kind][verdict] for kind in kinds) for op in ops for kinds in PLAN[op]]


def assert_numbers(numbers, ops):
    """pass@k of all three verdicts, by brute force, with intervals."""
    assert list(numbers) == ["outcome", "verified", "strict"]
    for j, verdict in enumerate(numbers):
        for k in (1, 2, 4):
            values = [np.mean([any(s) for s in itertools.combinations([True] * c + [False] * (4 - c), k)])
                      for c in counts(j, ops)]
            off = np.subtract(values, np.mean(values)).reshape(-1, 3).sum(0)  # problem i of one op goes with i of another
            half = 1.96 * math.sqrt((off ** 2).sum() * 3 / 2) / len(values)
            assert numbers[verdict][f"pass@{k}"] == pytest.approx(np.mean(values)), (verdict, k)
            assert numbers[verdict][f"pass@{k} +-"] == pytest.approx(half), (verdict, k)


def test_the_report_on_known_answers(known):
    records = evaluate.evaluate(None, known.problems, known.args, "cpu", nullcontext())
    assert [r["op"] for r in records] == [op for op in PLAN for _ in range(3)]
    assert [r["right"]["verified"] for r in records] == counts(1, PLAN)
    assert [r["row"] for r in records] == [row for rows in known.problems.values() for row in rows]
    assert all(r["distractors"] == 0 for r in records)
    assert [r["text"] for r in records] == [known.answers[data.prompt_text(r["row"])][0] for r in records]

    summary = evaluate.summarize(records, known.args)
    assert list(summary["ops"]) == ["3", "12", "13", "17"]
    for op, numbers in summary["ops"].items():
        assert_numbers(numbers, [int(op)])
    assert list(summary["groups"]) == ["ID", "OOD-edge", "OOD-hard"]
    for group, ops in (("ID", [3]), ("OOD-edge", [12, 13]), ("OOD-hard", [17])):
        assert_numbers(summary["groups"][group], ops)
    assert summary["contexts"] == {"zoo": summary["groups"]}
    assert summary["distractors"] == {group: {"0-1": numbers} for group, numbers in summary["groups"].items()}

    written = collections.Counter(kind for plan in PLAN.values() for kinds in plan for kind in kinds)
    samples, answered = sum(written.values()), sum(written[k] * VERDICTS[k][0] for k in written)
    assert samples == 48
    assert summary["hacked"] == pytest.approx(written[lucky] / answered)
    assert summary["truncated"] == pytest.approx(written[cut_off] / samples)
    assert summary["errors"]["extra node"] == pytest.approx(written[with_extra_step] / samples)
    assert summary["errors"]["wrong answer"] == pytest.approx(written[wrong_answer] / samples)
    assert summary["errors"]["undefined letter"] >= written[lucky] / samples
    assert summary["edge"] == [12, 13]  # op 3 is not hard, op 17 not possible


def test_where_nothing_is_possible_there_is_no_edge(known):
    for ops, edge in (([17], None), ([3], None), ([3, 13, 17], [13, 13])):
        records = evaluate.evaluate(None, {op: known.problems[op] for op in ops}, known.args, "cpu", nullcontext())
        assert evaluate.summarize(records, known.args)["edge"] == edge


def test_ranks_share_the_problems_and_draw_differently(known, monkeypatch):
    def of_rank(known, rank, n_ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(n_ranks))
        return evaluate.evaluate(None, known.problems, known.args, "cpu", nullcontext())

    whole = evaluate.evaluate(None, known.problems, known.args, "cpu", nullcontext())
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
    records = evaluate.evaluate(None, {3: rows}, known.args, "cpu", nullcontext())
    for record, row in zip(records, rows):
        instances = re.findall(r"The number of (.+?) equals", row["problem"])
        needed = re.findall(r"Define (.+?) as", row["solution"])
        assert record["distractors"] == len(set(instances) - set(needed)) and record["context"] == "school"
    per_group = evaluate.summarize(records, known.args)["distractors"]["ID"]
    assert list(per_group) == ["0-1", "2-4", "5-12"]


def test_show_marks_steps(known, capsys):
    records = evaluate.evaluate(None, {op: known.problems[op][:1] for op in PLAN}, known.args, "cpu", nullcontext())  # first samples:
    evaluate.show(records, 4)                                                                   # right, right, cut, lucky
    parts = capsys.readouterr().out.split("\n--- ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["zoo, op 3", "zoo, op 12", "zoo, op 13", "zoo, op 17"]
    for part, record, marks in zip(parts, records, ("right", "right", "both", "both")):
        assert record["row"]["question"] in part
        found = re.findall(r"^  (right|WRONG)  (Define|Answer)", part, re.M)
        assert found[-1][1] == "Answer"
        assert {mark for mark, _ in found} == ({"right"} if marks == "right" else {"right", "WRONG"})
        if marks == "right":
            assert len(found) == record["row"]["solution"].count("Define") + 1 and "<-" not in part
    assert re.search(r"WRONG  Answer: none +<- no answer", parts[2])
    assert re.search(r"WRONG  Define .+<- .*missing node", parts[3])
    evaluate.show(records, 99)
    assert capsys.readouterr().out.count("\n--- ") == 4


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
    assert report["settings"] == {"n": 4, "k": [1, 4], "problems": 2, "temperature": 1.0, "distractors": 2.0,
                                  "max_parents": 4, "max_value": 1000, "seed": 0,
                                  "context": "all", "data": None, "id_ops": [2, 4]}
    result, = report["checkpoints"].values()
    assert list(report["checkpoints"]) == ["a.pt"]
    assert (result["stage"], result["step"], result["problems"]) == ("pretrain", 2, 16)
    assert list(result["groups"]) == ["ID", "OOD-edge"] and list(result["ops"]) == ["3", "4", "5"]
    assert set(result["contexts"]) <= set(data.CONTEXTS) and result["contexts"]
    for numbers in [*result["groups"].values(), *result["ops"].values()]:
        for verdict in ("outcome", "verified", "strict"):
            assert list(numbers[verdict]) == ["pass@1", "pass@1 +-", "pass@4", "pass@4 +-"]
            assert 0 <= numbers[verdict]["pass@1"] <= numbers[verdict]["pass@4"] <= 1
    assert result["errors"]  # it cannot be right yet

    assert out.startswith("6 held-out problems, op 3-5, 4 samples each")
    lines = [line.split() for line in out.splitlines()]
    assert ["verified", "verified", "outcome", "strict"] in lines and ["pass@1", "pass@4", "pass@1", "pass@1"] in lines
    for title, numbers in [*((f"op {op}", v) for op, v in result["ops"].items()), *result["groups"].items()]:
        cells = next(line for line in out.splitlines() if line.startswith(title + " "))
        assert re.findall(r"(\d\.\d{3})", cells) == [f"{numbers[v][k]:.3f}" for v, k in (
            ("verified", "pass@1"), ("verified", "pass@4"), ("outcome", "pass@1"), ("strict", "pass@1"))]
    assert out.count("\n--- ") == 6 and "  WRONG  " in out  # --show
    for op, i in itertools.product((3, 4, 5), (0, 1)):
        assert data.make_row(i, data.parse_mixture(str(op)), split="eval")["problem"].strip() in out
    assert "edge" in out and "cut off" in out


def test_a_seed_repeats_the_numbers_and_another_does_not(trained):
    a, again, other = (evaluated(trained, "a.pt", *SHORT, "--show", 9, "--seed", seed) for seed in (3, 3, 4))
    assert a == again
    assert a[0].split("\n--- ")[1:7] != other[0].split("\n--- ")[1:7]  # other problems and samples


def test_checkpoints_side_by_side(trained):
    out, report = evaluated(trained, "a.pt", "b.pt", *SHORT)
    assert list(report["checkpoints"]) == ["a.pt", "b.pt"]
    assert [result["step"] for result in report["checkpoints"].values()] == [2, 3]
    lines = [line.split() for line in out.splitlines()]
    assert ["a.pt", "b.pt"] in lines and ["pass@1", "pass@4", "pass@1", "pass@4"] in lines
    for name in "ab":  # the company makes no difference
        alone = evaluated(trained, f"{name}.pt", *SHORT)[1]["checkpoints"][f"{name}.pt"]
        beside = report["checkpoints"][f"{name}.pt"]
        assert alone == {key: beside[key] for key in alone}
        assert {*beside} - {*alone} == ({"against_first"} if name == "b" else set())


def test_rows_of_a_file(trained):
    rows = [data.make_row(i, data.parse_mixture("movie:2"), 5) for i in range(3)]
    rows += [data.make_row(i, data.parse_mixture("zoo:9"), 5) for i in range(4)]
    (trained / "rows.jsonl").write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--show", 9)
    assert out.startswith("7 problems of rows.jsonl, op 2-9")
    result = report["checkpoints"]["a.pt"]
    assert list(result["ops"]) == ["2", "9"] and list(result["contexts"]) == ["movie", "zoo"]
    assert all(row["question"] in out for row in rows)
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--ops", "9-12", "--problems", 3)
    assert out.startswith("3 problems of rows.jsonl, op 9-9")
    out, report = evaluated(trained, "a.pt", "--data", "rows.jsonl", "--n", 2, "--k", 2, "--context", "movie")
    assert out.startswith("3 problems of rows.jsonl, op 2-2") and list(report["checkpoints"]["a.pt"]["contexts"]) == ["movie"]


def test_without_arguments_it_reads_what_the_stages_wrote(trained, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("pretrain", "grpo"):
        (tmp_path / f"out/{name}.pt").write_bytes((trained / "a.pt").read_bytes())
    out, report = evaluated(tmp_path, "--n", 1, "--problems", 1, json_file=None)
    assert list(report["checkpoints"]) == ["out/pretrain.pt", "out/grpo.pt"]
    result = report["checkpoints"]["out/grpo.pt"]
    assert list(result["ops"]) == ["2", "3", "4", "5", "6", "7", "8"]  # to twice the largest op of pre-training
    assert list(result["groups"]) == ["ID", "OOD-edge", "OOD-hard"] and report["settings"]["k"] == [1]
    assert result["ops"]["2"]["strict"]["pass@1 +-"] is None  # one problem has no interval


def test_the_plot(trained):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    evaluated(trained, "a.pt", "b.pt", *SHORT, "--plot", "plots/p.png")
    assert (trained / "plots/p.png").read_bytes().startswith(b"\x89PNG")


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
    ("a.pt --data rows.jsonl --json rows.jsonl", "overwrite"), ("a.pt --json a.pt", "overwrite"), ("a.pt --json=", "file"), ("tokens.pt", "tokens"), ("a.pt --nope", "--nope"),
]


@pytest.fixture(scope="module")
def bad_folder(trained, tmp_path_factory):
    """A folder with what BAD speaks of."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "folder").mkdir()
    (folder / "a.pt").write_bytes((trained / "a.pt").read_bytes())
    (folder / "cut.pt").write_bytes((trained / "a.pt").read_bytes()[:-500])
    row = data.make_row(0, data.parse_mixture("zoo:2"))
    for name, content in {
            "text.pt": "hello\n", "empty.jsonl": "", "rows.jsonl": json.dumps(row), "other.jsonl": '{"text": "a"}\n',
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
