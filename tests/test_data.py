"""
What data.py promises, checked against truth that does not come from data.py.

The first part is a solver: it reads the text of a problem by the grammar alone, solves it, and audits a solution line
by line. It takes nothing from data.py, and the rows of the public generator (`gold`) show that it is right.
"""
import collections
import functools
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import coverage as C
import data

ROOT = Path(data.__file__).resolve().parent

# ----------------------------------------------------------------------------------------------------------------------
# the solver: text -> rules -> values

TOTALS = {"crazy_zootopia": "total number of adult animals", "teachers_in_school": "total number of schools",
          "movie_festival_awards": "total number of movies"}
WORD = r"(?!(?:and|in|the|number|does|have|equals)\b)[\w-]+"
KIND = PLACE = rf"{WORD}(?: {WORD})*"


class Rule(NamedTuple):
    form: str        # leaf, copy, sum, difference
    literal_op: str  # "plus", "times" or ""
    literal: int     # of a leaf, or beside literal_op; 0 when there is none
    refs: tuple      # names of the parents, in the order written


class Problem(NamedTuple):
    rules: dict      # name -> Rule, in the order of the sentences; then the TOTALs mentioned
    instances: list  # names that have a sentence
    question: str    # name


def place(name):
    return name.split(" in ")[1]


def is_total(name):
    return name.startswith("total number of ")


def read_reference(text, total):
    m = re.fullmatch(rf"the (?:number of ({KIND})|({total})) in ({PLACE})", text)
    assert m, f"not a reference: {text}"
    return f"{m[1] or m[2]} in {m[3]}"


def read_value(text, total):
    if re.fullmatch(r"\d+", text):
        return Rule("leaf", "", int(text), ())
    literal, literal_op, text = re.fullmatch(r"(?:(\d+) (plus|times) )?(.+)", text).groups()
    if m := re.fullmatch(r"the difference between (.+) and (.+)", text):
        form, refs = "difference", m.groups()
    elif m := re.fullmatch(r"the sum of ([^,]+) and ([^,]+)", text):
        form, refs = "sum", m.groups()
    elif m := re.fullmatch(r"the sum of ([^,]+(?:, [^,]+){1,2}), and ([^,]+)", text):
        form, refs = "sum", (*m[1].split(", "), m[2])
    else:
        form, refs = "copy", (text,)
    return Rule(form, literal_op or "", int(literal or 0), tuple([read_reference(ref, total) for ref in refs]))


def read_problem(row):
    """Read `problem` and `question` by the grammar; anything else is an AssertionError."""
    total, rules = TOTALS[row["template"]], {}
    assert row["problem"].endswith(". ")
    for sentence in row["problem"][:-2].split(". "):
        m = re.fullmatch(rf"The number of ({KIND} in {PLACE}) equals (.+)", sentence)
        assert m, f"not a sentence: {sentence}"
        assert m[1] not in rules, f"two sentences about {m[1]}"
        rules[m[1]] = read_value(m[2], total)
    m = re.fullmatch(rf"What is the ({total} in {PLACE})\?|How many ({KIND}) does ({PLACE}) have\?", row["question"])
    assert m, f"not a question: {row['question']}"
    question = m[1] or f"{m[2]} in {m[3]}"
    instances = list(rules)
    mentioned = dict.fromkeys([*rules, question, *(ref for rule in rules.values() for ref in rule.refs)])
    for name in filter(is_total, mentioned):  # a TOTAL is the sum over all kinds mentioned for its place
        kinds = [n for n in mentioned if place(n) == place(name) and not is_total(n)]
        rules[name] = Rule("sum" if len(kinds) > 1 else "copy", "", 0, tuple(kinds))
    return Problem(rules, instances, question)


def solve(problem, name, values, path=()):
    """The value of `name`; `values` gathers all that it takes, depth first, parents before children."""
    if name not in values:
        assert name not in path, f"a circle through {name}"
        assert name in problem.rules, f"no sentence about {name}"
        rule = problem.rules[name]
        parents = [solve(problem, ref, values, (*path, name)) for ref in rule.refs]
        assert parents or rule.form == "leaf", f"no kinds for {name}"
        value = parents[0] - parents[1] if rule.form == "difference" else sum(parents)
        values[name] = (rule.literal * value if rule.literal_op == "times" else rule.literal + value)
    return values[name]


def needed(row):
    """-> (Problem, {name: value} of what the question needs, parents first)"""
    problem, values = read_problem(row), {}
    solve(problem, problem.question, values)
    return problem, values


def depth(problem, name):
    return 1 + max([depth(problem, ref) for ref in problem.rules[name].refs], default=0)


# ----------------------------------------------------------------------------------------------------------------------
# the solver: solution -> the rules it claims, with every line checked

ASSIGN = re.compile(r"(?P<to>[A-Za-z])(?: = (?:(?P<left>[A-Za-z]|\d+) (?P<op>[-+*]) )?(?P<right>[A-Za-z]))?"
                    r"(?: = (?P<l>-?\d+) (?P<o>[-+*]) (?P<r>-?\d+))? = (?P<value>-?\d+)")


def count_op(solution):
    """op from the text alone: Define steps, and operators that have a letter on their right."""
    return len(re.findall(r"\bDefine ", solution)) + len(re.findall(r" [-+*] [A-Za-z] =", solution))


def combine(m, terms):
    """The Rule that the right side of an assignment stands for, over nodes: intermediate letters are put in."""
    if not m["right"]:
        return Rule("leaf", "", int(m["value"]), ())
    right = terms[m["right"]][0]
    assert right.form in ("copy", "sum", "difference") and not right.literal_op
    if not m["op"]:
        return right
    if m["left"].isdigit():
        return right._replace(literal_op={"+": "plus", "*": "times"}[m["op"]], literal=int(m["left"]))
    left = terms[m["left"]][0]
    assert right.form == "copy" and left.form in (("copy", "sum") if m["op"] == "+" else ("copy",)), "not a plain fold"
    return Rule("sum" if m["op"] == "+" else "difference", "", 0, left.refs + right.refs)


def read_solution(solution):
    """-> ({name: (Rule, value)} in the order defined, the answer). Every letter, number and order is checked."""
    body, _, answer = solution.partition("Answer: ")
    assert re.fullmatch(r"\d+\.", answer), f"not an answer: {answer}"
    defined, nodes, letters = {}, {}, set()  # nodes: letter -> (Rule: a copy of the node, value)
    assert body.startswith("Define ") and body.endswith(". ")
    for step in body[len("Define "):-len(". ")].split(". Define "):
        head, *work = step.split("; ")
        name, letter = re.fullmatch(r"(.+) as ([A-Za-z])", head).groups()
        assert name not in defined, f"{name} is defined twice"
        assert work[-1].startswith("so ")
        terms = dict(nodes)  # what this step may use: nodes of earlier steps, and its own intermediates
        for j, assign in enumerate([*work[:-1], work[-1][len("so "):]]):
            m = ASSIGN.fullmatch(assign)
            assert m, f"not an assignment: {assign}"
            assert m["to"] not in letters, f"letter {m['to']} is used again"
            assert (m["to"] == letter) == (j == len(work) - 1), f"{assign} in the step of {letter}"
            letters.add(m["to"])
            used = [s for s in (m["left"], m["right"]) if s and s.isalpha()]
            assert all(s in terms for s in used), f"{assign} uses an unknown letter"
            assert bool(m["op"]) == bool(m["o"])
            value = int(m["value"])
            if m["op"]:
                l, r = (terms[s][1] if s.isalpha() else int(s) for s in (m["left"], m["right"]))
                result = {"+": l + r, "-": l - r, "*": l * r}[m["op"]]
                assert (m["o"], int(m["l"]), int(m["r"]), value) == (m["op"], l, r, result), f"wrong numbers: {assign}"
            elif m["right"]:
                assert value == terms[m["right"]][1], f"wrong number: {assign}"
            terms[m["to"]] = combine(m, terms), value
        defined[name] = terms[letter]
        nodes[letter] = Rule("copy", "", 0, (name,)), value
    return defined, int(answer[:-1])


def same_rule(total):
    """Rules as compared between text and solution: the kinds of a TOTAL come in no particular order."""
    return lambda rule: rule._replace(refs=tuple(sorted(rule.refs))) if total else rule


def audit(row):
    """The solution of a row proves its answer from its text, with what is needed and nothing else."""
    problem, values = needed(row)
    defined, answer = read_solution(row["solution"])
    assert answer == values[problem.question]
    assert set(defined) == set(values), "the steps are not the needed quantities"
    assert list(defined)[-1] == problem.question
    for name, (rule, value) in defined.items():
        form = same_rule(is_total(name))
        assert form(rule) == form(problem.rules[name]), f"{name}: text and solution differ"
        assert value == values[name]
    assert count_op(row["solution"]) == row["op"]
    return problem, values


def test_the_solver_agrees_with_every_public_row(gold):
    assert {(row["template"], row["op"]) for row in gold} == {(t, op) for t in TOTALS for op in range(2, 21)}
    for row in gold:
        audit(row)


ROW = dict(template="teachers_in_school", op=5, question="What is the total number of schools in Ruby Bay?",
           problem="The number of public highschool in Ruby Bay equals 2 times the number of elementary school in Ruby "
                   "Bay. "
                   "The number of elementary school in Ruby Bay equals 3. ",
           solution="Define elementary school in Ruby Bay as a; so a = 3. "
                    "Define public highschool in Ruby Bay as b; c = a = 3; so b = 2 * c = 2 * 3 = 6. "
                    "Define total number of schools in Ruby Bay as d; so d = b + a = 6 + 3 = 9. Answer: 9.")


@pytest.mark.parametrize("field, old, new", [
    ("problem", "equals 3", "equals the number of public highschool in Ruby Bay"),  # a circle
    ("problem", "equals 3", "equals the total number of schools in Ruby Bay"),      # a circle through the TOTAL
    ("problem", "The number of elementary school in Ruby Bay equals 3. ", ""),      # a quantity without a sentence
    ("problem", "equals 3. ", "equals 3. The number of public highschool in Ruby Bay equals 1. "),  # a second sentence
    ("problem", "equals 3. ", "equals 3. The number of culinarian school in Ruby Bay equals 1. "),  # one more in the TOTAL
    ("problem", "equals 3", "equals 4"),
    ("problem", "2 times", "2 plus"),
    ("problem", "2 times the", "2 times  the"),
    ("question", "What is the total number of schools in", "How many schools does"),
    ("solution", "so a = 3", "so a = 4"),
    ("solution", "2 * c = 2 * 3 = 6", "2 * c = 2 * 3 = 7"),
    ("solution", "2 * c = 2 * 3 = 6", "3 + c = 3 + 3 = 6"),
    ("solution", "c = a = 3; so b = 2 * c", "a = a = 3; so b = 2 * a"),             # a letter used again
    ("solution", "d = b + a = 6 + 3", "d = b + c = 6 + 3"),                         # an intermediate of another step
    ("solution", "d = b + a = 6 + 3 = 9", "d = b = 9"),
    ("solution", "Answer: 9", "Answer: 8"),
    ("solution", "Define elementary school in Ruby Bay as a; so a = 3. ", ""),
    ("op", 5, 4),
])
def test_the_solver_rejects(field, old, new):
    audit(ROW)
    broken = {**ROW, field: ROW[field].replace(old, new) if field != "op" else new}
    assert broken[field] != ROW[field]
    with pytest.raises(AssertionError):
        audit(broken)


# ----------------------------------------------------------------------------------------------------------------------
# what is generated

@functools.cache
def rows(spec, n, seed=0, split="train", *world):
    """world: arguments of data.World, the mean number of distractors first."""
    mixture, world = data.parse_mixture(spec), data.World(*world)
    return [data.make_row(i, mixture, seed, split, world) for i in range(n)]


@functools.cache
def rows_per_op():
    return {op: rows(str(op), 100, seed=op) for op in range(2, 21)}


@functools.cache
def audited_per_op():
    """op -> [(row, Problem, needed values)]"""
    return {op: [(row, *audit(row)) for row in some] for op, some in rows_per_op().items()}


def all_audited():
    return [entry for some in audited_per_op().values() for entry in some]


def test_op_is_exact():
    for op, some in rows_per_op().items():
        assert [count_op(row["solution"]) for row in some] == [row["op"] for row in some] == [op] * 100


@pytest.mark.parametrize("spec, n, split, mean", [
    ("2-20", 400, "train", 2), ("2-20", 200, "eval", 2), ("2-20", 100, "train", 0), ("2-20", 200, "train", 10),
    ("21-30", 60, "eval", 10)])
def test_every_row_is_well_posed(spec, n, split, mean):
    """Distractors too: each has a value in 0..1000, and so has every TOTAL that they use."""
    for row in rows(spec, n, 1, split, mean):
        problem, values = audit(row)
        for name in problem.rules:
            solve(problem, name, values)
        assert all(0 <= value <= 1000 for value in values.values())
        assert set(values) == set(problem.rules)


WORLDS = [(max_parents, max_value) for max_parents in (2, 3, 4) for max_value in (10, 20, 1000)]


@pytest.mark.parametrize("max_parents, max_value", WORLDS)
@pytest.mark.parametrize("spec, n, split, mean", [
    ("2-14", 50, "train", 1), ("15-30", 15, "eval", 1), ("2-20", 20, "train", 10)])
def test_a_world_keeps_to_its_limits(spec, n, split, mean, max_parents, max_value):
    """For needed quantities, for distractors and for the TOTALs that they use, and for every number written."""
    for row in rows(spec, n, 2, split, mean, max_parents, max_value):
        problem, values = audit(row)
        assert split_of(chain(row)) == split
        for name in problem.rules:
            solve(problem, name, values)
        assert all(0 <= value <= max_value for value in values.values())
        assert max(map(int, re.findall(r"\d+", row["solution"]))) <= max_value
        assert max(len(rule.refs) for rule in problem.rules.values()) <= max_parents


@pytest.mark.parametrize("max_parents, max_value", [(2, 20), (2, 1000), (3, 100), (4, 50)])
def test_a_world_reaches_its_limits(max_parents, max_value):
    """Each number of parents occurs, with and without a literal, and so do large values."""
    forms, largest = set(), 0
    for row in rows("5-14", 250, 3, "train", 2, max_parents, max_value):
        problem, values = needed(row)
        largest = max(largest, *values.values())
        forms |= {(is_total(name), len(rule.refs), rule.literal_op) for name, rule in problem.rules.items()}
    assert largest >= 0.9 * min(max_value, 100)
    assert forms == {(False, 0, ""), *((True, n, "") for n in range(1, max_parents + 1)), *(
        (False, n, literal) for n in range(1, max_parents + 1) for literal in ("", "plus", "times") if n < 4 or not literal)}


@pytest.mark.parametrize("max_parents", [2, 3, 4])
def test_numbers_of_parents_keep_their_ratios_in_a_smaller_world(max_parents):
    world = data.World(2, max_parents)
    for drawn, percent in (world.n_parents, {1: 20, 2: 58, 3: 14, 4: 8}), (world.n_children, {1: 8, 2: 52, 3: 29, 4: 11}):
        assert collections.Counter(drawn) == {n: percent[n] for n in range(1, max_parents + 1)}


@pytest.mark.parametrize("world", [(2, 1), (2, 5), (2, 0), (2, 2.5), (2, 4, 9), (2, 4, 1001), (2, 4, -1), (2, 4, float("nan")),
                                   (-1,), (11,), (float("nan"),)])
def test_world_rejects(world):
    with pytest.raises(ValueError) as error:
        data.World(*world)
    assert "\n" not in str(error.value) and len(str(error.value)) > 15


def test_distractors_do_not_change_what_is_needed():
    """Not even where names are scarce: the same chain, so the same values, names and question, for every mean."""
    for spec, n, world in (("2-20", 80, ()), ("21-30", 20, ()), ("8-20", 40, (2, 20))):
        for split in ("train", "eval"):
            few, *others = (rows(spec, n, 8, split, mean, *world) for mean in (0, 2, 10))
            for some in others:
                assert [chain(row) for row in some] == [chain(row) for row in few]
                assert sum(map(n_distractors, some)) > sum(map(n_distractors, few)) == 0


def test_the_text_keeps_to_the_grammar():
    """`read_problem` took every text already; here are the ranges, and that each form occurs."""
    literals, forms, asked = collections.defaultdict(set), collections.Counter(), collections.Counter()
    for _, problem, _ in all_audited():
        places, kinds = ({f(name) for name in problem.instances} for f in (place, lambda name: name.split(" in ")[0]))
        assert len(places | {place(problem.question)}) <= 5 and len(kinds) <= 5
        asked[is_total(problem.question)] += 1
        for name in problem.instances:
            rule = problem.rules[name]
            assert len(rule.refs) == len(set(rule.refs)) and name not in rule.refs
            literals[rule.literal_op or rule.form == "leaf"].add(rule.literal)
            forms[rule.form, len(rule.refs), bool(rule.literal_op)] += 1
    assert literals == {True: {1, 2, 3, 4}, "plus": {1, 2, 3, 4}, "times": {2, 3, 4}, False: {0}}
    assert set(forms) == {("leaf", 0, False), ("sum", 4, False)} | {
        (form, n, literal) for literal in (False, True) for form, n in
        (("copy", 1), ("sum", 2), ("difference", 2), ("sum", 3))}
    assert min(asked.values()) > 0.1 * sum(asked.values())


def test_leaves_have_the_law_of_the_public_data():
    leaves = collections.Counter(rule.literal for _, problem, values in all_audited()
                                 for name, rule in problem.rules.items() if name in values and rule.form == "leaf")
    n = sum(leaves.values())
    for value, share in {1: 1 / 8, 2: 7 / 24, 3: 7 / 24, 4: 7 / 24}.items():
        assert abs(leaves[value] / n - share) < 4 * (share * (1 - share) / n) ** 0.5


def test_names_are_those_of_the_public_rows(gold):
    def names(some):
        found = collections.defaultdict(set)
        for row in some:
            for kind, where in re.findall(r"The number of (.+?) in (.+?) equals", row["problem"]):
                found[row["template"]] |= {("kind", kind), ("place", where)}
        return found

    ours = names(row for row, _, _ in all_audited())
    assert ours == names(gold)
    assert sorted(len(group) for group in ours.values()) == [15, 15, 20]


def rewritten(problem, values):
    """The solution that the text determines: depth first from the question, parents as written, folded from the left.
    Letters are numbers in braces, in the order in which they first appear on the left of an assignment."""
    letters, of_node, text = itertools.count(), {}, ""
    for name in values:
        rule, me = problem.rules[name], f"{{{next(letters)}}}"
        work = []  # the right sides of the assignments; <0> is the letter of the first one
        if rule.form == "leaf":
            work.append(f"{rule.literal}")
        else:
            sign = {"difference": "-"}.get(rule.form, "+")
            first, *others = rule.refs
            left, value = of_node[first], values[first]
            if not others:
                work.append(f"{left} = {value}")
            for ref in others:
                result = value + values[ref] if sign == "+" else value - values[ref]
                if work:
                    left = f"<{len(work) - 1}>"
                work.append(f"{left} {sign} {of_node[ref]} = {value} {sign} {values[ref]} = {result}")
                value = result
            if rule.literal_op:
                by = f"{rule.literal} {'+' if rule.literal_op == 'plus' else '*'}"
                work.append(f"{by} <{len(work) - 1}> = {by} {value} = {values[name]}")
        temporary = [f"{{{next(letters)}}}" for _ in work[1:]]
        lines = [f"{to} = {right}" for to, right in zip([*temporary, me], work)]
        steps = "; ".join([*lines[:-1], f"so {lines[-1]}"])
        steps = re.sub(r"<(\d+)>", lambda m: temporary[int(m[1])], steps)
        text += f"Define {name} as {me}; {steps}. "
        of_node[name] = me
    return text + f"Answer: {values[problem.question]}."


def test_the_text_determines_the_solution_but_for_its_letters():
    """A learner need not guess our order of steps, operands or folds."""
    for row, problem, values in all_audited():
        template = rewritten(problem, values)
        letters = dict(zip(re.findall(r"\{\d+\}", template),
                           re.findall(r"(?<=as )[A-Za-z](?=;)|\b[A-Za-z](?= [=*+-])", row["solution"])))
        assert re.sub(r"\{\d+\}", lambda m: letters[m[0]], template) == row["solution"]
        assert len(set(letters.values())) == len(letters)


# ----------------------------------------------------------------------------------------------------------------------
# statistics

@pytest.mark.parametrize("op, steps, deep", [(2, 2.0, 2.0), (5, 3.2, 3.2), (8, 4.9, 4.3), (10, 5.7, 5.1), (14, 7.7, 6.6),
                                             (20, 10.0, 8.1)])
def test_shape_is_that_of_the_public_data(op, steps, deep):
    shapes = [(len(values), depth(problem, problem.question)) for _, problem, values in audited_per_op()[op]]
    mean_steps, mean_depth = np.mean(shapes, axis=0)
    assert mean_steps == pytest.approx(steps, rel=0.15)
    assert mean_depth == pytest.approx(deep, rel=0.15)


def n_distractors(row):
    return row["problem"].count(" equals ") - len(re.findall(r"Define (?!total )", row["solution"]))


@pytest.mark.parametrize("mean", [0, 0.5, 1, 2, 5, 10])
def test_distractor_law_has_its_mean(mean):
    p = np.diff([0, *data.distractor_law(mean)])
    assert p.min() >= 0 and p.sum() == pytest.approx(1)
    assert p @ np.arange(len(p)) == pytest.approx(mean, abs=1e-6)


def chi_square_is_small(counts, probabilities):
    """False where counts do not follow the probabilities: beyond five standard deviations of the statistic."""
    n, p = sum(counts), np.asarray(probabilities)
    assert sum(np.asarray(counts)[p == 0]) == 0
    counts, p = np.asarray(counts)[p > 0], p[p > 0]
    return np.sum((counts - n * p) ** 2 / (n * p)) < len(p) + 5 * (2 * len(p)) ** 0.5


@pytest.mark.parametrize("op", [2, 5, 10, 15, 20])
@pytest.mark.parametrize("mean, n", [(0, 50), (2, 600), (10, 300)])
def test_one_law_of_distractors_for_every_op(op, mean, n):
    law = np.diff([0, *data.distractor_law(mean)])
    counts = collections.Counter(n_distractors(row) for row in rows(str(op), n, 100 + op, "train", mean))
    assert set(counts) <= set(range(len(law)))
    assert chi_square_is_small([counts[k] for k in range(len(law))], law)
    if mean == 2:
        assert not chi_square_is_small([counts[k] for k in range(len(law))], np.diff([0, *data.distractor_law(3)]))


def test_letters_are_drawn_evenly():
    solutions = "".join(row["solution"] for row, _, _ in all_audited())
    counts = collections.Counter(re.findall(r" as (\w);", solutions))
    assert len(counts) == 52 and chi_square_is_small(list(counts.values()), [1 / 52] * 52)


def test_the_order_of_the_sentences_says_nothing():
    """Neither what depends on what, nor which sentences are needed."""
    before, halves = [], []
    for _, problem, values in all_audited():
        at = {name: j for j, name in enumerate(problem.instances)}
        before += [at[ref] < at[name] for name in at for ref in problem.rules[name].refs if ref in at]
        halves += [(2 * j < len(at) - 1) == (name in values) for name, j in at.items()
                   if 2 * j != len(at) - 1 and any(other not in values for other in at)]
    for coin in (before, halves):
        assert abs(np.mean(coin) - 0.5) < 5 * 0.5 / len(coin) ** 0.5


# ----------------------------------------------------------------------------------------------------------------------
# coverage

def test_features_of_a_row():
    """By hand: 3; 2 times that; the TOTAL of both."""
    leaf, copy, total = (False, 0), (False, 1), (True, 2)
    assert C.features(ROW) == {(*leaf, "", False), (*copy, "*", False), (*total, "", False), 1,
                                  (leaf, copy), (leaf, total), (copy, total)}
    difference = "Define a in B as a; so a = 9. Define c in B as b; so b = 3 + a = 3 + 9 = 12. " \
                 "Define d in B as c; e = b - a = 12 - 9 = 3; so c = 4 + e = 4 + 3 = 7. Answer: 7."
    assert C.features({"solution": difference}) == {
        (*leaf, "", False), (*copy, "+", False), (False, 2, "+", True), 1, 2,
        (leaf, copy), (leaf, (False, 2)), (copy, (False, 2))}


def features(row):
    """The same from the text of the problem, with the solver."""
    problem, values = needed(row)
    shape = {name: (is_total(name), len(problem.rules[name].refs)) for name in values}
    found = {len(str(value)) for value in values.values()}
    for name in values:
        form, literal_op, _, refs = problem.rules[name]
        found.add((*shape[name], {"plus": "+", "times": "*"}.get(literal_op, ""), form == "difference"))
        found |= {(shape[ref], shape[name]) for ref in refs}
    return found


def test_coverage_is_the_share_of_problems_without_new_features():
    known = set.union(*map(features, rows("zoo:2-5", 150, 0, "train", 1, 3, 50)))
    world, mixture = data.World(1, 3, 50), data.parse_mixture("zoo:2-5")
    shares = [np.mean([features(row) <= known for row in rows(spec, 150, 0, "eval", 1, 3, 50)]) for spec in ("6", "zoo:7-9")]
    assert 0 < shares[1] < shares[0] < 1
    assert C.coverage(mixture, 6, world, n=150) == shares[0]
    assert C.coverage(mixture, data.parse_mixture("zoo:7-9"), world, n=150) == shares[1]


# ----------------------------------------------------------------------------------------------------------------------
# the held-out split

def chain(row):
    """What the solution is about, rebuilt from the text: "NAME = rule" of what is needed, sorted, and the question."""
    problem, values = needed(row)
    lines = []
    for name in values:
        rule = problem.rules[name]
        refs = rule.refs if rule.form == "difference" else sorted(rule.refs)
        literal = {"plus": f"{rule.literal} + ", "times": f"{rule.literal} * "}.get(rule.literal_op, rule.literal or "")
        lines.append(f"{name} = {literal}{(' - ' if rule.form == 'difference' else ' + ').join(refs)}")
    return "\n".join([*sorted(lines), row["question"]])


def split_of(text):
    return "train" if int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") % 10 else "eval"


@pytest.mark.parametrize("op, n", [(2, 1200), (3, 400), (4, 400)])
def test_no_chain_is_in_both_splits(op, n):
    """At op 2 chains repeat all the time, so a leak would show: each split repeats its own."""
    chains = {split: [chain(row) for seed in (0, 1) for row in rows(str(op), k, seed, split, mean)]
              for split, k, mean in (("train", n, 2), ("eval", n // 3, 1))}
    train, held_out = set(chains["train"]), set(chains["eval"])
    assert not train & held_out
    if op == 2:
        assert len(train) < 0.7 * len(chains["train"]) and len(held_out) < 0.7 * len(chains["eval"])
        assert len(train & {chain(row) for row in rows("2", n, 7)}) > 100  # other problems, the same chains


def test_split_is_the_documented_hash_of_the_chain():
    for split in ("train", "eval"):
        assert {split_of(chain(row)) for row in rows("2-20", 200, 3, split)} == {split}
    mixed = collections.Counter(split_of(chain(row)) for row in rows("5-20", 1000, 3, None))
    assert abs(mixed["eval"] - 100) < 4 * 90 ** 0.5


def test_split_of_chain_is_that_hash(gold):
    chains = [chain(row) for row in gold]
    assert [data.split_of_chain(c) for c in chains] == [split_of(c) for c in chains]
    assert 0 < sum(split_of(c) == "eval" for c in chains) < 0.25 * len(chains)


# ----------------------------------------------------------------------------------------------------------------------
# problem i is a pure function

PURE = """
import sys, json; sys.path.insert(0, {root!r})
import data
mixture = data.parse_mixture({spec!r})
print(json.dumps([data.make_row(i, mixture, 5, "eval") for i in {indices}]))
"""


def test_problem_i_is_a_pure_function_of_seed_and_i():
    spec = "zoo:2-20:0.9,school:2:0.1"
    in_order = rows(spec, 60, 5, "eval")
    indices = random.Random(0).sample(range(60), 60)
    mixture = data.parse_mixture(spec)
    random.seed(1), np.random.seed(1)
    assert [data.make_row(i, mixture, 5, "eval") for i in indices] == [in_order[i] for i in indices]
    for hash_seed in ("1", "2"):
        script = PURE.format(root=str(ROOT), spec=spec, indices=indices)
        out = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True,
                             capture_output=True).stdout
        assert json.loads(out) == [in_order[i] for i in indices]


def test_seeds_and_indices_give_different_problems():
    texts = [row["problem"] for seed in (0, 1, 2 ** 40) for row in rows("8-20", 200, seed)]
    assert len(set(texts)) == len(texts)
    assert len({row["id"] for seed in (0, 1, 2 ** 40) for row in rows("8-20", 200, seed)}) == 600


# ----------------------------------------------------------------------------------------------------------------------
# mixtures

SHORT = {"crazy_zootopia": "zoo", "teachers_in_school": "school", "movie_festival_awards": "movie"}


@pytest.mark.parametrize("spec, cells", [
    ("2-4", {(c, op): 1 / 9 for c in SHORT.values() for op in (2, 3, 4)}),
    ("zoo:2-4:0.9,school:2:0.1", {("zoo", 2): .3, ("zoo", 3): .3, ("zoo", 4): .3, ("school", 2): .1}),
    ("all:2-4:0.2,all:5-7:0.3,all:8-10:0.5",
     {(c, op): (.2, .3, .5)[(op - 2) // 3] / 9 for c in SHORT.values() for op in range(2, 11)}),
    ("zoo:3:6, movie:3 ,zoo:3:1", {("zoo", 3): 7 / 8, ("movie", 3): 1 / 8}),
    ("zoo:2:1,school:2:0", {("zoo", 2): 1}),
    ("school:2:0,zoo:2:5e-3", {("zoo", 2): 1}),
    ("school:20", {("school", 20): 1}),
])
def test_mixture_gives_each_cell_its_weight(spec, cells):
    counts = collections.Counter((SHORT[row["template"]], row["op"]) for row in rows(spec, 1000, 11))
    assert set(counts) <= set(cells)
    assert chi_square_is_small([counts[cell] for cell in cells], list(cells.values()))


@pytest.mark.parametrize("spec", [
    "", ",", "2-4,", "zoo", "zoo:", ":5", "zoo:5:", "zoo:5:1:2", "lake:5", "Zoo:5", "zoo:5:x", "zoo:5:-1", "zoo:5:nan",
    "zoo:5:inf", "zoo:5:0", "zoo:5:0,movie:3:0", "zoo:10-2", "zoo:0-1", "1-500", "2..4", "2-", "-2", "5.5", "²", "٣", "zoo:1",
    "2-31"])
def test_mixture_rejects(spec):
    with pytest.raises(ValueError) as error:
        data.parse_mixture(spec)
    assert "\n" not in str(error.value) and len(str(error.value)) > 15


def test_the_range_of_each_context_is_of_what_has_a_weight():
    mixture = data.parse_mixture("zoo:3-4:0.9,school:2:0.1,zoo:7,zoo:20:0,movie:2:0")
    assert data.op_ranges(mixture) == {"zoo": [3, 7], "school": [2, 2]}


@pytest.mark.parametrize("text, ops", [("5", [5]), ("2-4", [2, 3, 4]), (" 7-7 ", [7]), ("30", [30])])
def test_parse_ops(text, ops):
    assert data.parse_ops(text) == ops


@pytest.mark.parametrize("text", ["", "x", "4-2", "0-1", "1", "31", "1-500", "2-4-6", "+5", "2,3", "9" * 20])
def test_parse_ops_rejects(text):
    with pytest.raises(ValueError):
        data.parse_ops(text)


@pytest.mark.parametrize("mean", [-0.1, 10.5, float("nan"), float("inf")])
def test_distractor_law_rejects(mean):
    with pytest.raises(ValueError):
        data.distractor_law(mean)


# ----------------------------------------------------------------------------------------------------------------------
# tokens

ENC = data.tokenizer()
TAGS = ["<question>", "</question>", "<solution>", "</solution>", "<answer>", "</answer>", "<|endoftext|>"]


def whole_text(row):
    return data.prompt_text(row) + data.response_text(row)


def training_texts():
    return [whole_text(row) for row, _, _ in all_audited()[::4]]


def ids_of(text):
    return data.encode(ENC, text)


def test_any_text_round_trips():
    rng = random.Random(0)
    pieces = [*"0123456789 \n\t.,;=+-*?aZéê\0\x7f\u2028\U0001f98a", *TAGS, "the number of", "The number of", "Maple Creek",
              " in ", ", and", ". Define", "Rêves de Belleville", " does ", "<", ">", "</", "e\u0301"]
    code_points = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    texts = ["", " ", *map(chr, range(0x800)), "".join(map(chr, range(0x2fff))),
             *["".join(rng.choices(pieces, k=rng.randrange(40))) for _ in range(500)],
             *["".join(map(chr, rng.choices(code_points, k=rng.randrange(40)))) for _ in range(500)]]
    for text in texts:
        ids = ids_of(text)
        assert ENC.decode(ids) == text
        assert all(0 <= i < ENC.n_vocab for i in ids)


def test_any_ids_have_a_text():
    """A fresh model samples bytes that are no UTF-8, and ids between the vocabulary and VOCAB_SIZE."""
    ids = ids_of("Rêves de Belleville = 12")
    assert data.decode(ENC, ids) == "Rêves de Belleville = 12"
    beyond = [*range(ENC.n_vocab, data.VOCAB_SIZE)]
    assert data.decode(ENC, [*ids, *beyond]) == "Rêves de Belleville = 12" + "\0" * len(beyond)  # they do not vanish
    assert isinstance(data.decode(ENC, random.Random(0).choices(range(data.VOCAB_SIZE), k=5000)), str)


def test_problems_round_trip(gold):
    for text in [*map(whole_text, gold), *training_texts()]:
        assert ENC.decode(ids_of(text)) == text


def test_digits_are_single_tokens():
    for number in ("0", "7", "10", "999", "1000", "123456789"):
        for before in ("", " ", "= ", "+ -", "<answer> "):
            ids = ids_of(before + number)
            assert [ENC.decode([i]).strip() for i in ids[-len(number):]] == list(number)


def test_names_tags_and_letters_are_single_tokens():
    used = {c for row, problem, _ in all_audited() for c in problem.rules}
    totals = {f"{c['total']} in {where}" for c in data.CONTEXTS.values() for where in c["places"]}
    names = {f"{kind} in {where}" for c in data.CONTEXTS.values() for kind in c["kinds"] for where in c["places"]}
    assert used <= names | totals and len(names) == 200 and len(totals) == 30
    singles = [f" {word}" for word in [*names, *totals, *string.ascii_letters]] + TAGS
    singles += [f" {name.split(' in ')[0]}" for name in names] + [f" does {place(name)} have?" for name in names]
    assert [text for text in singles if len(ids_of(text)) != 1] == []


def test_vocabulary_fits_the_model():
    assert ENC.n_vocab <= data.VOCAB_SIZE and data.VOCAB_SIZE % 64 == 0


def cuts(text):
    """Positions around tags: before the space in front of a tag, right before the tag, right after it."""
    for m in re.finditer("|".join(map(re.escape, TAGS)), text):
        yield from {m.start(), m.start() - (text[:m.start()][-1:] == " "), m.end()}


def test_ids_of_a_prefix_are_a_prefix_of_the_ids(gold):
    """Masking and sampling split the text at a tag: that must never change how it is cut into tokens."""
    for text in [*map(whole_text, gold), *training_texts()]:
        ids = ids_of(text)
        positions = list(cuts(text))
        assert len(positions) >= 7 + 6
        for position in positions:
            assert ids_of(text[:position]) == ids[:len(ids_of(text[:position]))]


def test_no_generated_text_falls_back_to_bytes():
    """But for a few signs: dots, commas, semicolons, spaces and further digits are bytes, names and phrases never."""
    singles = {ENC.decode_single_token_bytes(i) for text in training_texts() for i in ids_of(text) if i < 256}
    assert singles <= {bytes([b]) for b in b" .;?0123456789"}


def test_texts_are_short_in_tokens(gold):
    def mean(low, high):
        return np.mean([len(ids_of(whole_text(row))) for row in gold if low <= row["op"] <= high])

    assert mean(2, 10) <= 160 and mean(11, 14) <= 250


def test_training_text(gold):
    """<question> P Q </question> <solution> S </solution> <answer> N </answer> end-of-text, with single spaces."""
    for row in [*gold, *(row for row, _, _ in all_audited()[::4])]:
        body, answer = row["solution"].split("Answer: ")
        assert whole_text(row) == (f"<question> {row['problem']}{row['question']} </question> <solution> {body}"
                                   f"</solution> <answer> {answer[:-1]} </answer><|endoftext|>")
        assert not re.search(r"\s\s|[^\S ]", whole_text(row))
        assert data.prompt_text(row).endswith(" <solution>")


def test_the_parts_of_a_name_are_the_tokens_of_its_question():
    found = data.name_parts(ENC)
    for name, parts in found.items():
        what, place = ENC.decode([name]).split(" in ", 1)
        if not what.startswith(" total"):
            assert ENC.encode(f". How many{what} does {place} have?")[1:] == parts
        assert ENC.decode(parts[-1:]) == f" does {place} have?" and len(parts) == 2 - what.startswith(" total")
    assert len(found) == 10 * 11 + 10 * 6 + 10 * 6


# ----------------------------------------------------------------------------------------------------------------------
# batches

def test_encode_row_knows_where_the_prompt_ends():
    for row in rows("2-20", 100):
        ids, n_prompt = data.encode_row(ENC, row)
        assert ENC.decode(ids) == whole_text(row)
        assert ENC.decode(ids[:n_prompt]) == data.prompt_text(row)
        assert ids[-1] == ENC.encode_single_token("<|endoftext|>")


def unpacked(x, y, sequences, *_):
    """The sequences of a micro-batch, as [(x, y)] with one row each. sequences: blocks [(n, T), ...] or cu_seqlens."""
    if isinstance(sequences, list):
        sequences = np.cumsum([0] + [T for n, T in sequences for _ in range(n)])
    return [(x[:, a:b], y[:, a:b]) for a, b in zip(sequences, sequences[1:]) if (y[:, a:b] != -100).any()]


@pytest.mark.parametrize("loss", ["all", "solution"])
def test_targets_are_the_next_tokens(loss):
    """Padding has no loss."""
    encoded = [data.encode_row(ENC, row) for row in rows("2-20", 18)]
    batches = data.micro_batches(encoded, 900, loss)
    assert sorted(row for batch, _ in batches for row in batch) == sorted(encoded)
    for batch, (x, y, blocks) in batches:
        assert x.dtype == y.dtype == np.int64 and x.shape == y.shape == (1, sum(n * T for n, T in blocks))
        apart = unpacked(x, y, blocks)
        assert len(apart) == len(batch)
        for (ids, n_prompt), (inputs, targets) in zip(batch, apart):
            masked = n_prompt - 1 if loss == "solution" else 0
            expected = [-100] * masked + ids[1 + masked:]
            assert inputs[0, :len(expected)].tolist() == ids[:-1]
            assert targets[0].tolist() == expected + [-100] * (targets.size - len(expected))
            assert expected[-1] == ENC.encode_single_token("<|endoftext|>")
        assert (x >= 0).all() and (x < ENC.n_vocab).all()


def rows_of(batches):
    """What a step trains on, whatever the micro-batches and the padding: the token rows, sorted."""
    found = []
    for x, y in (row for batch in batches for row in unpacked(*batch)):
        n = 1 + np.flatnonzero(y[0] != -100)[-1]
        found.append([*x[0, :n].tolist(), int(y[0, n - 1])])
    return sorted(found)


def same(a, b):
    return len(a) == len(b) and all(np.array_equal(i, j) for pair in zip(a, b) for i, j in zip(*pair))


MIXTURE = data.parse_mixture("2-20")


def test_a_step_trains_on_its_problems():
    world = data.World(3, 2, 20)
    steps = data.TrainingSteps(MIXTURE, batch_size=24, seed=4, world=world)
    expected = [data.encode_row(ENC, data.make_row(i, MIXTURE, 4, "train", world))[0] for i in range(5 * 24, 6 * 24)]
    assert rows_of(steps[5]) == sorted(expected)


def test_late_steps_have_another_mixture_and_world():
    phases = [(data.parse_mixture("2-4"), data.World(0, 3, 50)), (data.parse_mixture("5-8"), data.World(6, 3, 50))]
    both = data.TrainingSteps(phases[0][0], batch_size=24, world=phases[0][1], late=(3, *phases[1]))
    early, late = (data.TrainingSteps(mixture, batch_size=24, world=world) for mixture, world in phases)
    assert same(both[2], early[2]) and same(both[3], late[3]) and not same(early[3], late[3])


@pytest.mark.parametrize("batch_size, n_ranks", [(24, 2), (25, 3), (8, 8)])
def test_the_ranks_share_a_step(batch_size, n_ranks):
    whole = data.TrainingSteps(MIXTURE, batch_size)[3]
    parts = [data.TrainingSteps(MIXTURE, batch_size, rank=rank, n_ranks=n_ranks)[3] for rank in range(n_ranks)]
    assert rows_of([batch for part in parts for batch in part]) == rows_of(whole)
    sizes = [len(rows_of(part)) for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("at_a_time", [1, 2, 8])
@pytest.mark.parametrize("micro_tokens", [1, 700, 3000, 10 ** 6])
def test_micro_batches_are_bounded_and_as_many_as_the_cores_can_share(micro_tokens, at_a_time):
    batches = data.TrainingSteps(MIXTURE, batch_size=40, micro_tokens=micro_tokens, at_a_time=at_a_time)[0]
    for x, y, blocks in batches:
        assert x.size < micro_tokens + max(T for _, T in blocks) + 64
    assert rows_of(batches) == rows_of(data.TrainingSteps(MIXTURE, batch_size=40)[0])
    if micro_tokens > 1:
        assert len(batches) % at_a_time == 0
        sizes = [x.size for x, *_ in batches]
        assert max(sizes) - min(sizes) < 2 * max(T for *_, blocks in batches for _, T in blocks)  # so that no core waits long


def test_micro_batches_are_filled_well():
    """Rows of like length come together, with little padding."""
    batches = data.TrainingSteps(MIXTURE, batch_size=300, micro_tokens=4096)[0]
    real = [rows_of([batch]) for batch in batches]
    assert sum(x.size for x, *_ in batches) < 1.1 * sum(len(ids) for some in real for ids in some)
    assert len(batches) == -(-sum(x.size for x, *_ in batches) // 4096)
    for some, following in zip(real, real[1:]):
        assert max(map(len, some)) <= min(map(len, following))


@pytest.mark.parametrize("loss", ["all", "solution"])
@pytest.mark.parametrize("micro_tokens", [1, 2048, 16384])
def test_packed_micro_batches_hold_the_same_rows_in_few_shapes(micro_tokens, loss):
    steps, shapes = data.TrainingSteps(MIXTURE, batch_size=150, loss=loss, micro_tokens=micro_tokens, packed=True), set()
    for s in range(3):
        batches = steps[s]
        assert len(rows_of(batches)) == 150
        assert rows_of(batches) == rows_of(data.TrainingSteps(MIXTURE, batch_size=150)[s])
        apart = data.TrainingSteps(MIXTURE, batch_size=150, loss=loss)[s]
        assert sum((y != -100).sum() for _, y, *_ in batches) == sum((y != -100).sum() for _, y, _ in apart)
        for x, y, cu_seqlens, max_seqlen in batches:
            assert x.shape == y.shape == (1, x.size) and cu_seqlens.dtype == np.int32
            assert cu_seqlens[0] == 0 and cu_seqlens[-1] == x.size  # every token is of a sequence, padding too
            assert 0 <= np.diff(cu_seqlens).min() and np.diff(cu_seqlens).max() <= max_seqlen
            shapes.add((x.size, len(cu_seqlens), max_seqlen))
    sizes = {size for size, *_ in shapes}
    assert len({size_and_length[:2] for size_and_length in shapes}) == len(sizes)  # one goes with the other
    if micro_tokens > 1:
        assert sizes <= {*data.pack_sizes(micro_tokens)} and {max_seqlen for *_, max_seqlen in shapes} == {512}


def test_packed_micro_batches_are_filled_well():
    for spec, distractors in ("2-10", 2), ("11-14", 2), ("15-20", 6), ("2", 2):
        steps = data.TrainingSteps(data.parse_mixture(spec), 1000, world=data.World(distractors), micro_tokens=16384,
                                   packed=True)
        batches = steps[0]
        assert sum((x != 0).sum() for x, *_ in batches) > 0.95 * sum(x.size for x, *_ in batches)


def test_a_row_longer_than_a_micro_batch_is_packed_whole():
    rows = [([7] * 1500, 3), ([8] * 10, 3), ([9] * 700, 3)]
    (first, (x, y, cu_seqlens, max_seqlen)), *others = data.micro_batches(rows, 512, packed=True)
    assert first == rows[:2] and x.shape == (1, 2048) and max_seqlen == 2048 and cu_seqlens[:4].tolist() == [0, 1499, 1508, 2048]
    assert [(batch, arrays[0].shape) for batch, arrays in others] == [(rows[2:], (1, 1024))]


def test_a_step_can_be_sent_to_workers_of_every_kind():
    """Where they are not forked (Windows, Macs, Python 3.14), all that a worker needs is pickled."""
    model, steps = pytest.importorskip("model"), data.TrainingSteps(MIXTURE, batch_size=8)
    batches, counts = pickle.loads(pickle.dumps(model.collate))(pickle.loads(pickle.dumps(steps))[3])
    assert same([(x.numpy(), y.numpy(), blocks) for x, y, blocks in batches], steps[3]) and counts[0] > 0


def test_later_stages_take_each_context_as_pretraining_saw_it():
    recipe = dict(mix="zoo:2-4,school:2")
    init = dict(id_ops=[2, 4], id_ranges={"zoo": [2, 4], "school": [2, 2]}, recipe=recipe)
    assert data.stage_mixture(init, 0.2).spec == "zoo:2-4:0.2,school:2-2:0.2,zoo:5-6:0.8,school:3-3:0.8"
    assert data.stage_mixture(init, 0.2, ops="5-6").spec == "zoo:2-4:0.2,school:2-2:0.2,zoo:5-6:0.8,school:5-6:0.8"
    old = dict(id_ops=[2, 4], recipe=recipe)
    assert data.stage_mixture(old, 0.2).spec == "zoo:2-4:0.2,school:2-4:0.2,zoo:5-6:0.8,school:5-6:0.8"
    everywhere = dict(id_ops=[2, 5], id_ranges=dict.fromkeys(data.CONTEXTS, [2, 5]), recipe=recipe)
    assert data.stage_mixture(everywhere, 0.2).spec == "all:2-5:0.2,all:6-7:0.8"


def test_step_s_is_a_pure_function():
    steps = data.TrainingSteps(MIXTURE, batch_size=16, seed=2, loss="solution")
    first = steps[7]
    steps[0], steps[8]
    assert same(steps[7], first)
    assert same(data.TrainingSteps(MIXTURE, batch_size=16, seed=2, loss="solution")[7], first)
    assert not same(data.TrainingSteps(MIXTURE, batch_size=16, seed=3, loss="solution")[7], first)


def test_training_never_sees_the_eval_split():
    """With one context at op 2 the steps repeat many chains: none of them is one of the eval split."""
    def bare(solution):
        return re.sub(r"\b[A-Za-z]\b", "x", solution)

    steps = data.TrainingSteps(data.parse_mixture("school:2"), batch_size=64)
    texts = [ENC.decode(ids) for s in range(10) for ids in rows_of(steps[s])]
    trained = {bare(text.split("<solution> ")[1].split("</solution>")[0]) for text in texts}
    held_out = {bare(row["solution"].split("Answer")[0]) for row in rows("school:2", 300, 0, "eval")}
    assert len(trained) < 0.7 * len(texts) and len(held_out) < 0.5 * 300
    assert not trained & held_out


def test_steps_of_the_eval_split():
    steps = data.TrainingSteps(MIXTURE, batch_size=12, seed=4, split="eval")
    assert rows_of(steps[2]) == sorted(data.encode_row(ENC, row)[0] for row in rows("2-20", 36, 4, "eval")[24:])


def test_steps_work_with_a_data_loader():
    loader = pytest.importorskip("torch").utils.data.DataLoader
    steps = data.TrainingSteps(MIXTURE, batch_size=8)
    for s, batches in zip(range(3, 5), loader(steps, batch_size=None, sampler=range(3, 5))):
        assert same([(x.numpy(), y.numpy(), blocks) for x, y, blocks in batches], steps[s])


# ----------------------------------------------------------------------------------------------------------------------
# rows on disk

# ----------------------------------------------------------------------------------------------------------------------
# the command line

FIELDS = {"problem", "question", "solution", "op", "id", "template", "mode", "length", "d"}


def run(cwd, *args):
    return subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, args)], cwd=cwd, capture_output=True,
                          encoding="utf-8", timeout=60)


def written(cwd, *args):
    done = run(cwd, *args, "--out", "rows.jsonl")
    assert (done.returncode, done.stdout) == (0, "") and os.listdir(cwd) == ["rows.jsonl"]
    with open(cwd / "rows.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_rows_have_the_public_fields(tmp_path, gold):
    made = written(tmp_path, "--ops", "2-10", "--n", 100)
    assert len(made) == 100
    for row in made:
        assert set(row) == FIELDS == set(gold[0])
        assert {key: type(value) for key, value in row.items()} == {key: type(value) for key, value in gold[0].items()}
        assert (row["mode"], row["length"], row["d"]) == ("normalforward", "zero_context", 2)
        audit(row)
    assert {row["op"] for row in made} == set(range(2, 11)) and {row["template"] for row in made} == set(TOTALS)
    assert len({row["id"] for row in made}) == 100


def test_row_i_does_not_depend_on_n(tmp_path):
    many = written(tmp_path, "--ops", "2-10", "--n", 30)
    defaults = ("--seed", 0, "--split", "train", "--distractors", 2)
    assert written(tmp_path, "--ops", "2-10", "--n", 12, *defaults) == many[:12]
    assert many == rows("2-10", 30)
    assert written(tmp_path, "--ops", "2-10", "--n", 12, "--seed", 1) != many[:12]


@pytest.mark.parametrize("split", ["train", "eval"])
def test_no_distractors_in_either_split(tmp_path, split):
    made = written(tmp_path, "--ops", "2-12", "--n", 60, "--split", split, "--distractors", 0)
    assert {n_distractors(row) for row in made} == {0}
    assert {split_of(chain(row)) for row in made} == {split}


def test_the_world_on_the_command_line(tmp_path):
    options = ["--distractors", 1, "--max-parents", 2, "--max-value", 20]
    assert written(tmp_path, "--ops", "5-12", "--n", 30, *options) == rows("5-12", 30, 0, "train", 1, 2, 20)


def test_mix_on_the_command_line(tmp_path):
    made = written(tmp_path, "--mix", "zoo:2-20:0.99,school:2:0.01", "--n", 40, "--split", "eval")
    assert made == rows("zoo:2-20:0.99,school:2:0.01", 40, 0, "eval")


def test_show_prints_the_problem(tmp_path):
    done = run(tmp_path, "--ops", 7, "--n", 2, "--seed", 3)
    assert done.returncode == 0 and os.listdir(tmp_path) == []
    for row in rows("7", 2, 3):
        problem, values = needed(row)
        for sentence in row["problem"].strip().split(". "):
            assert sentence.rstrip(".") + ".\n" in done.stdout
        assert row["question"] in done.stdout
        for name, value in values.items():
            assert f"{name} = {value}" in done.stdout
        assert row["solution"].replace(". ", ".\n") in done.stdout


def test_styles_are_for_terminals_that_want_them(monkeypatch):
    assert data.styled("text", "red") == "text"  # no terminal
    monkeypatch.setattr(data.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert data.styled("text", "red") == "\033[31mtext\033[0m" and data.styled("text", "") == "text"
    shown = data.show(data.make_row(0, data.parse_mixture("zoo:4"), 0, "train", data.World(6)))
    dim = re.findall("\033\\[2mThe number of (.+?) equals", shown)
    needed = re.findall("Define (.+?) as", shown)
    assert dim and not {*dim} & {*needed}
    assert {*re.findall("^The number of (.+?) equals", shown, re.M)} <= {*needed}
    monkeypatch.setenv("NO_COLOR", "1")
    assert data.styled("text", "red") == "text"


def test_an_existing_file_is_replaced_whole(tmp_path):
    (tmp_path / "rows.jsonl").write_text("old\n" * 1000)
    assert len(written(tmp_path, "--n", 3)) == 3


BAD = [
    (["--ops", "10-2"], "10-2"), (["--ops", "0-1"], "0-1"), (["--ops", "1-500"], "1-500"),
    (["--mix", "zoo:2-4:x"], "'x'"), (["--mix", "lake:2"], "lake"), (["--mix", "zoo:2:0"], "zero"),
    (["--ops", "2", "--mix", "zoo:2"], "not both"), (["--n", "0"], "--n"), (["--n", "many"], "many"),
    (["--seed", "-1"], "--seed"), (["--split", "test"], "test"), (["--distractors", "-1"], "-1"),
    (["--distractors", "nan"], "nan"), (["--max-parents", "1"], "got 1"), (["--max-parents", "5"], "got 5"),
    (["--max-parents", "two"], "two"), (["--max-value", "9"], "got 9"), (["--max-value", "1001"], "got 1001"),
    (["--max-value", "2.5"], "2.5"), (["--out", "no/such/folder/rows.jsonl"], "no/such/folder"),
    (["--out", "."], "."), (["--frobnicate"], "--frobnicate"),
]


@pytest.mark.parametrize("args, says", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_gets_one_line(tmp_path, args, says):
    old = tmp_path / "rows.jsonl"
    old.write_text("keep me")
    done = run(tmp_path, *([] if "--out" in args else ["--out", "rows.jsonl"]), *args)
    *usage, last = done.stderr.rstrip("\n").split("\n")
    assert done.returncode == 2 and done.stdout == ""
    assert says in last and "error: " in last and "Traceback" not in done.stderr
    assert all(line.startswith(("usage:", " ")) for line in usage)
    assert old.read_text() == "keep me" and os.listdir(tmp_path) == ["rows.jsonl"]


# ----------------------------------------------------------------------------------------------------------------------
# odd input

@pytest.mark.parametrize("option", ["--ops", "--mix"])
def test_an_empty_choice_is_bad_input(tmp_path, option):
    assert run(tmp_path, option, "", "--out", "rows.jsonl").returncode == 2
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ops", ["5:3", "2-4,zoo:5"])
def test_ops_is_a_range_and_nothing_else(tmp_path, ops):
    assert run(tmp_path, "--ops", ops, "--out", "rows.jsonl").returncode == 2


def test_a_closed_pipe_is_no_error(tmp_path):
    """As in `python data.py --n 1000 | head`."""
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), "--n", "1000"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert b"error" not in process.stderr.read()
    process.stderr.close()
    assert process.wait(30) != 2


def test_huge_weights_are_weights_or_rejected():
    try:
        mixture = data.parse_mixture("zoo:5:1e308,movie:5:1e308")
    except ValueError:
        return
    assert mixture.weights == pytest.approx([0.5, 0.5])


def test_out_follows_a_link(tmp_path):
    (tmp_path / "real.jsonl").write_text("old")
    (tmp_path / "rows.jsonl").symlink_to("real.jsonl")
    assert run(tmp_path, "--n", 2, "--out", "rows.jsonl").returncode == 0
    assert (tmp_path / "rows.jsonl").is_symlink() and (tmp_path / "real.jsonl").read_text().count("\n") == 2


def test_without_a_terminal_a_line_every_half_minute_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    clock = itertools.count(0, 20)  # a look at it takes twenty seconds
    monkeypatch.setattr(data, "time", SimpleNamespace(perf_counter=lambda: next(clock)), raising=False)
    data.write_rows([{}] * 4, 4, tmp_path / "rows.jsonl")
    assert capsys.readouterr().err.splitlines() == [" 50 %, about 1.0 minutes left", "100 %, about 0.0 minutes left"]


def test_out_touches_no_other_file(tmp_path):
    (tmp_path / "rows.jsonl.part").write_text("keep me")
    run(tmp_path, "--n", 2, "--out", "rows.jsonl")
    assert (tmp_path / "rows.jsonl.part").read_text() == "keep me"


def test_training_lengths_come_near_those_of_op_20():
    """The tail of the distractor law is for this: the longest op 10 texts are nearly as long as the mean op 20 text."""
    short, long = (np.array([len(data.encode_row(ENC, row)[0]) for row in rows(spec, n, 21)])
                   for spec, n in (("10", 800), ("20", 100)))
    assert np.quantile(short, 0.99) > 0.8 * long.mean()


@pytest.mark.parametrize("spec, world", [("all:2-20", data.World()), ("zoo:2-12", data.World(0.5, 2, 20))])
def test_a_wrong_step_is_one_mistake_and_the_rest_follows_from_it(spec, world):
    def recomputed(text):
        """Letters with what they are by the solution's own rules, from the values as written before, and what is written."""
        written, found = {}, []
        for letter, work in re.findall(r"([A-Za-z]) = ([^;.]+)", text.partition("Answer:")[0]):
            *rules, value = work.split(" = ")
            by_rule = eval(rules[0], {}, written) if rules else None  # noqa: S307  letters of a problem that we made
            if len(rules) == 2:
                assert rules[1] == re.sub("[A-Za-z]", lambda m: str(written[m[0]]), rules[0])
            written[letter] = int(value)
            found.append((letter, by_rule, int(value)))
        return found

    mixture, places, rights = data.parse_mixture(spec), set(), 0
    for i in range(200):
        row = data.make_row(i, mixture, world=world)
        wrong = data.with_wrong_step(row, world.max_value)
        assert wrong == data.with_wrong_step(row, world.max_value)
        assert {**wrong, "solution": None} == {**row, "solution": None}
        before, after = recomputed(row["solution"]), recomputed(wrong["solution"])
        assert [letter for letter, _, _ in before] == [letter for letter, _, _ in after]
        mistakes = [j for j, (was, now) in enumerate(zip(before, after)) if now[2] != (was[2] if now[1] is None else now[1])]
        assert len(mistakes) == 1
        j, = mistakes
        right = before[j][2] if after[j][1] is None else after[j][1]
        assert 1 <= abs(after[j][2] - right) <= 3 and all(0 <= value <= world.max_value for _, _, value in after)
        assert wrong["solution"].endswith(f"Answer: {after[-1][2]}.")
        places.add(j)
        rights += after[-1][2] == before[-1][2]
    assert {0, 1, 2, 3} <= places and rights < 20


def test_the_share_of_wrong_steps_in_training():
    mixture, enc = data.parse_mixture("zoo:4"), data.tokenizer()

    def texts(share):
        steps = data.TrainingSteps(mixture, 400, wrong_steps=share)
        return [data.decode(enc, data.encode_row(enc, steps.row(i, mixture, data.World()))[0]) for i in range(400)]

    none, some, every = texts(0.0), texts(0.3), texts(1.0)
    assert sum(a != b for a, b in zip(none, every)) == 400
    assert 90 < sum(a != b for a, b in zip(none, some)) < 150
    assert all(b in (a, c) for a, b, c in zip(none, some, every))
    with_mistakes = data.TrainingSteps(mixture, 4, wrong_steps=1.0)[0]
    assert any((a[0] != b[0]).any() for a, b in zip(with_mistakes, data.TrainingSteps(mixture, 4)[0]))
