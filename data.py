"""
Synthetic reasoning problems whose every step can be checked, as text and as tokens.

A problem is a small graph of named quantities. KIND in PLACE is an *instance* ("adult fox in Maple Creek"): the text
has one sentence that says how it follows from others. TOTAL in PLACE is the sum over all kinds that the text mentions
for that place, and has no sentence of its own. The question asks for one quantity; the solution computes what is
needed for it, step by step. The format is that of GSM-Infinite (arXiv 2502.05252; zero context, medium, forward mode)
as used by arXiv 2512.07783:

    problem  = { sentence ". " }                                   in random order
    sentence = "The number of " KIND " in " PLACE " equals " value
    value    = INT | expr | INT " plus " expr | INT " times " expr
    expr     = ref | "the sum of " ref " and " ref | "the difference between " ref " and " ref
             | "the sum of " ref ", " { ref ", " } "and " ref      3 or 4 refs
    ref      = "the number of " KIND " in " PLACE | "the " TOTAL " in " PLACE
    question = "What is the " TOTAL " in " PLACE "?" | "How many " KIND " does " PLACE " have?"
    solution = { "Define " NAME " as " LETTER "; " { assign "; " } "so " assign ". " } "Answer: " INT "."

op, the difficulty, is the number of Define steps plus the number of operators written with letters.

Problem i of a mixture is a pure function of (seed, i): any worker can make it, in any order, and training resumes at i.
A hash of the reasoning chain decides whether a problem belongs to the train or the eval split (see `split_of_chain`).

    python data.py --ops 5 --n 1                             show a problem
    python data.py --ops 2-10 --n 1000 --out rows.jsonl      write rows in the public data set's format
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import random
import re
import sys
from bisect import bisect
from typing import NamedTuple

import numpy as np
import tiktoken

# ----------------------------------------------------------------------------------------------------------------------
# the three contexts: short name -> template of the public data, what a TOTAL is called, kinds, places

CONTEXTS = {
    "zoo": dict(
        template="crazy_zootopia", total="total number of adult animals",
        kinds=["adult racoon", "adult fox", "adult deer", "adult wolf", "adult bear", "adult owl", "adult blue jay",
               "adult eagle", "adult parrot", "adult crow"],
        places=["Hamilton Farm", "Jefferson Circus", "Maple Creek", "Cedar Valley", "Oakridge Riverside", "Pine Ridge",
                "Beverly Forest", "Bundle Ranch", "South Zoo", "Mayer Aquarium"]),
    "school": dict(
        template="teachers_in_school", total="total number of schools",
        kinds=["culinarian school", "regional medical school", "public highschool", "elementary school",
               "private middle school"],
        places=["Ruby Bay", "Clearwater Bay", "Riverton City", "Oakbridge City", "Shoreline City", "Evervale City",
                "Westhaven City", "Glenfield City", "Hawkesbury", "Brightford"]),
    "movie": dict(
        template="movie_festival_awards", total="total number of movies",
        kinds=["intense detective thriller", "solemn period drama", "calm road movie", "upbeat metropolis comedy",
               "futuristic sci-fi movie"],
        places=["Rêves de Belleville", "Festival de Saint-Rivage", "Festival de Clairmont", "Cinéma de Montreval",
                "Festival Lumière de Valmont", "Golden Banana Movie Festival", "Northwood Movie Festival",
                "Verdi Movie Festival", "West Sahara Movie Festival", "Taylor Movie Festival"]),
}
TEMPLATE_TO_CONTEXT = {c["template"]: name for name, c in CONTEXTS.items()}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

MIN_OP, MAX_OP = 2, 30  # past 30 the five places by five kinds of a problem get too crowded
MAX_VALUE = 1000
GRID = 5                # a problem uses at most 5 places and 5 kinds
TOTAL = GRID            # entity = place * (GRID + 1) + kind; the kind after the last stands for the place's TOTAL
EVAL_SHARE = 10         # one reasoning chain in ten is held out

# ----------------------------------------------------------------------------------------------------------------------
# the reasoning graph: who depends on whom, with exactly `op` operations

# Chosen so that the means of steps and depth follow the public data over op 2-20 (tests/test_data.py holds the table).
P_ASK_TOTAL = 0.8              # the question asks for a TOTAL
P_TOTAL = 0.54                 # a new parent is the TOTAL of a place rather than an instance
P_LEAF, P_LEAF_LATE = 0.02, 0.5  # a waiting node stays a leaf: while op is not yet spent, and afterwards
P_NEW_FIRST, P_NEW_MORE = 0.18, 0.1  # a parent is a new node rather than one that waits already
P_LITERAL = 0.72               # "INT plus expr" or "INT times expr" rather than "expr", where op allows it
P_NEWEST = 0.85                # expand the newest waiting node (makes the graph deep) rather than any
N_PARENTS = (1,) * 20 + (2,) * 58 + (3,) * 14 + (4,) * 8   # of an instance, in percent
N_CHILDREN = (1,) * 8 + (2,) * 52 + (3,) * 29 + (4,) * 11  # of a TOTAL
P_DIFFERENCE = 0.45, 0.08       # of two parents: with different values, and with equal ones (the result would be 0)
P_LEAF_DISTRACTOR = 0.45       # a distractor is a number alone
N_SHORT = 4                    # distractors from the fifth on are long sentences (why: see `distractor_law`)
LEAF_VALUES = (1,) * 3 + (2,) * 7 + (3,) * 7 + (4,) * 7    # of the public data: 1/8, 7/24, 7/24, 7/24


def sample_graph(rng, op, n_distractors):
    """Draw a graph whose cost is exactly `op` and which leaves room for `n_distractors` more instances.

    A node with k parents costs max(1, k), one more with a literal (a leaf 1, `c * p` 2, `a + b` 2, a TOTAL of k k).
    The graph grows backwards from the question. A new node is paid for at the lowest price it can end up with; what is
    left of `op` (`left`) is spent while waiting nodes are expanded, and the last one waiting may not become a leaf
    before all is spent. So the cost is exact by construction, whatever the dice say.

    Only waiting nodes can become parents, so the order of expansion is a reversed topological order. While a TOTAL
    waits, the instances of its place wait with it: it will sum them all, and nothing may come to its place afterwards.

    Returns {entity: (parents, has_literal)}, the question first, or None when the names ran out (rare).
    """
    rand = rng.random
    seen = [[] for _ in range(GRID)]  # place -> instances so far
    expanded = [False] * GRID         # place -> has an instance that was expanded
    total = [0] * GRID                # place -> its TOTAL is not there (0), waits (1), was expanded: place closed (2)
    graph, waiting = {}, []
    left = op
    room = GRID * GRID                # free names in places without a TOTAL

    def price(p):  # of a new instance in place p: itself, and one more child for a TOTAL that waits for it
        return 1 if not total[p] else 2 if seen[p] else 0  # the first child is paid for with the TOTAL

    def add_instance(p):
        nonlocal left, room
        left -= price(p)
        room -= not total[p]
        kinds = [p * (GRID + 1) + k for k in range(GRID) if p * (GRID + 1) + k not in seen[p]]
        entity = kinds[int(rand() * len(kinds))]
        seen[p].append(entity)
        waiting.append(entity)
        return entity

    def add_total(p):
        nonlocal left, room
        left -= len(seen[p]) or 2  # one for each child there is, or itself and its first child
        room -= GRID - len(seen[p])
        total[p] = 1
        waiting.append(p * (GRID + 1) + TOTAL)
        return waiting[-1]

    def add_parent(budget):  # a new node of at most that price, or None
        if rand() < P_TOTAL:
            spare = room - n_distractors - budget // 2  # closing a place takes its free names away
            places = [p for p in range(GRID) if not total[p] and not expanded[p] and GRID - len(seen[p]) <= spare
                      and (len(seen[p]) or 2) <= budget]
            if places:
                return add_total(places[int(rand() * len(places))])
        places = [p for p in range(GRID) if len(seen[p]) < GRID and price(p) <= budget
                  and (total[p] == 1 or (room > n_distractors and not total[p]))]
        return add_instance(places[int(rand() * len(places))]) if places else None

    p = int(rand() * GRID)
    add_total(p) if rand() < P_ASK_TOTAL else add_instance(p)
    while waiting:
        ready = [j for j, e in enumerate(waiting) if e % (GRID + 1) == TOTAL or total[e // (GRID + 1)] != 1]
        entity = waiting.pop(ready[-1] if rand() < P_NEWEST else ready[int(rand() * len(ready))])
        p, kind = divmod(entity, GRID + 1)
        if kind == TOTAL:
            want = N_CHILDREN[int(rand() * 100)]
            while not seen[p] or (len(seen[p]) < want and left >= 2):
                add_instance(p)
            total[p] = 2
            graph[entity] = (tuple(seen[p]), False)
            continue
        expanded[p] = True
        if not waiting and left == 0 or waiting and rand() < (P_LEAF if left else P_LEAF_LATE):
            graph[entity] = ((), False)
            continue
        candidates = waiting[:]
        parents = []
        for j in range(N_PARENTS[int(rand() * 100)]):
            edge = 1 if j else 0  # every parent past the first is one more operator
            if left < edge:
                break
            parent = None
            if not candidates or rand() < (P_NEW_MORE if j else P_NEW_FIRST):
                parent = add_parent(left - edge)
            else:
                parent = candidates.pop(int(rand() * len(candidates)))
            if parent is None:
                break
            parents.append(parent)
            left -= edge
        if not parents:
            if not candidates:
                return None
            parents = [candidates[-1]]
        literal = left > 0 and len(parents) <= 3 and rand() < P_LITERAL
        left -= literal
        graph[entity] = (tuple(parents), literal)
    return graph if left == 0 else None


def sample_values(rng, graph):
    """Choose literals and operators for a graph and compute every value.

    Done from the leaves up, so that each choice keeps the values in 0..1000 ("times" only where the product stays small,
    the larger parent first in a difference) and nothing has to be thrown away for it.

    Returns {entity: Rule} in the order of computation, or None when a sum grew past 1000 (rare).
    """
    rules = {}
    for entity in reversed(graph):
        parents, has_literal = graph[entity]
        rule = sample_rule(rng, rules, entity, parents, has_literal)
        if rule.value > MAX_VALUE:
            return None
        rules[entity] = rule
    return rules


def draw(rng, items, k):
    """k of the items in random order, without replacement (several times as fast as random.sample)."""
    rand, items, n = rng.random, list(items), len(items)
    for j in range(k):
        other = j + int(rand() * (n - j))
        items[j], items[other] = items[other], items[j]
    return items[:k]


class Rule(NamedTuple):
    """How one quantity follows from its parents: `literal` `literal_op` (sum or difference of `parents`)."""
    parents: tuple       # entities, in the order in which they are written
    difference: bool     # two parents are subtracted rather than added
    literal_op: str      # " + ", " * ", or "" when there is no literal; a leaf is a literal alone
    literal: int
    value: int


def sample_rule(rng, rules, entity, parents, has_literal):
    rand = rng.random
    if not parents:
        literal = LEAF_VALUES[int(rand() * 24)]
        return Rule((), False, "", literal, literal)
    is_total = entity % (GRID + 1) == TOTAL
    values = [rules[p].value for p in parents]
    difference = len(parents) == 2 and not is_total and rand() < P_DIFFERENCE[values[0] == values[1]]
    if difference and values[0] < values[1]:
        parents = parents[::-1]
    value = abs(values[0] - values[1]) if difference else sum(values)
    if not has_literal:
        return Rule(parents, difference, "", 0, value)
    if rand() < 0.5 and 4 * value <= MAX_VALUE:
        literal = 2 + int(rand() * 3)
        return Rule(parents, difference, " * ", literal, literal * value)
    literal = 1 + int(rand() * 4)
    return Rule(parents, difference, " + ", literal, literal + value)


def sample_distractors(rng, rules, n):
    """Draw `n` instances that the question does not need, each with a rule over what is there already.

    None goes to a place whose TOTAL somebody uses: the text would change that TOTAL. A distractor may use the TOTAL of
    a place not used so far, which closes the place. Later ones build on earlier ones only, so there are no circles.

    Returns {entity: Rule} of the distractors, in the order of computation, or None when the names ran out (rare).
    """
    rand = rng.random
    rules = dict(rules)
    n_needed = len(rules)
    closed = {e // (GRID + 1) for e in rules if e % (GRID + 1) == TOTAL}
    free = [p * (GRID + 1) + k for p in range(GRID) if p not in closed for k in range(GRID)
            if p * (GRID + 1) + k not in rules]

    def a_total(own_place):  # the TOTAL of a place, or None if it would leave too few names or is not there
        nonlocal free
        p = int(rand() * GRID)
        total = p * (GRID + 1) + TOTAL
        if total in rules:
            return total
        children = tuple(e for e in rules if e // (GRID + 1) == p)
        open_elsewhere = [f for f in free if f // (GRID + 1) != p]
        rule = sample_rule(rng, rules, total, children, False) if children else None
        if p == own_place or not rule or rule.value > MAX_VALUE or len(open_elsewhere) < n - j - 1:
            return None
        closed.add(p)
        free = open_elsewhere
        rules[total] = rule
        return total

    for j in range(n):
        if not free:
            return None
        entity = free.pop(int(rand() * len(free)))
        parents = []
        if rand() >= P_LEAF_DISTRACTOR or j >= N_SHORT:
            for _ in range(N_PARENTS[int(rand() * 100)] if j < N_SHORT else 6):
                if len(parents) == 4:
                    break
                known = list(rules)
                parent = a_total(entity // (GRID + 1)) if rand() < 0.15 else known[int(rand() * len(known))]
                if parent is not None and parent not in parents:
                    parents.append(parent)
        rule = sample_rule(rng, rules, entity, tuple(parents), 0 < len(parents) <= 3 and rand() < 0.4)
        rules[entity] = rule if rule.value <= MAX_VALUE else sample_rule(rng, rules, entity, (), False)
    return dict(itertools.islice(rules.items(), n_needed, None))


# ----------------------------------------------------------------------------------------------------------------------
# how many distractors: one law for every op, so that a longer chain is the only thing that a larger op changes

MAX_DISTRACTORS = 12  # what always fits beside the largest graphs


def distractor_law(mean):
    """Cumulative probabilities of 0..12 distractors with that mean, `--distractors`.

    A geometric law with a fat tail: one problem in sixteen has 8 to 12, long ones. The tail brings training texts of
    op 10 up to 260 tokens (the 99.9 % quantile), where op 20 has 282 in the mean: there the length of a text is new, too. More
    distractors would not fit beside the largest graphs, and the law is one for every op.
    Raises ValueError for a mean outside 0..10.
    """
    if not 0 <= mean <= 10:
        raise ValueError(f"the mean number of distractors must be in 0..10, got {mean:g}")
    ns = np.arange(MAX_DISTRACTORS + 1)
    tail = min(1 / 16, mean / 20)

    def law(ratio):
        geometric = ratio ** ns / np.sum(ratio ** ns)
        return (1 - tail) * geometric + tail * (ns >= 8) / np.sum(ns >= 8)

    low, high = 0.0, 1e3  # the mean grows with the ratio: bisect
    for _ in range(100):
        ratio = (low + high) / 2
        low, high = (ratio, high) if law(ratio) @ ns < mean else (low, ratio)
    return np.cumsum(law(ratio if mean else 0.0)).tolist()


# ----------------------------------------------------------------------------------------------------------------------
# the text

class Names(NamedTuple):
    """Ready-made strings of a context; rows are places, columns kinds, the last column the TOTAL."""
    name: list       # "adult fox in Maple Creek"
    reference: list  # "the number of adult fox in Maple Creek", "the total number of adult animals in Maple Creek"
    question: list   # "How many adult fox does Maple Creek have?"


def _names(context):
    kinds, places, total = context["kinds"], context["places"], context["total"]
    name = [[f"{k} in {p}" for k in kinds] + [f"{total} in {p}"] for p in places]
    return Names(name, [[f"the number of {n}" for n in row[:-1]] + [f"the {row[-1]}"] for row in name],
                 [[f"How many {k} does {p} have?" for k in kinds] + [f"What is the {total} in {p}?"] for p in places])


NAMES = {context: _names(c) for context, c in CONTEXTS.items()}


def value_text(rule, reference):
    """What stands behind "equals": `value` of the grammar above. reference: entity -> text."""
    refs = [reference[p] for p in rule.parents]
    if not refs:
        return str(rule.literal)
    if len(refs) == 1:
        expr = refs[0]
    elif len(refs) == 2:
        expr = f"{'the difference between' if rule.difference else 'the sum of'} {refs[0]} and {refs[1]}"
    else:
        expr = f"the sum of {', '.join(refs[:-1])}, and {refs[-1]}"
    if not rule.literal_op:
        return expr
    return f"{rule.literal} {'plus' if rule.literal_op == ' + ' else 'times'} {expr}"


def solution_text(rng, rules, order, name, op):
    """Write the Define steps of `order`, letters drawn without replacement; k parents are folded from the left."""
    letters = draw(rng, LETTERS, op)  # no node writes more letters than it costs
    letter_of, steps, j = {}, [], 0
    for entity in order:
        parents, difference, literal_op, literal, value = rules[entity]
        letter = letter_of[entity] = letters[j]
        j += 1
        head = f"Define {name[entity]} as {letter}; "
        if not parents:
            steps.append(f"{head}so {letter} = {literal}. ")
            continue
        left, left_value = letter_of[parents[0]], rules[parents[0]].value  # what has been folded so far
        if len(parents) == 1 and literal_op:
            head += f"{letters[j]} = {left} = {left_value}; "
            left = letters[j]
            j += 1
        for parent in parents[1:]:
            sign = " - " if difference else " + "
            b, b_value = letter_of[parent], rules[parent].value
            result = left_value - b_value if difference else left_value + b_value
            work = f" = {left}{sign}{b} = {left_value}{sign}{b_value} = {result}"
            if parent == parents[-1] and not literal_op:
                break
            head += f"{letters[j]}{work}; "
            left, left_value = letters[j], result
            j += 1
        if literal_op:
            work = f" = {literal}{literal_op}{left} = {literal}{literal_op}{left_value} = {value}"
        elif len(parents) == 1:
            work = f" = {left} = {value}"
        steps.append(f"{head}so {letter}{work}. ")
    return "".join(steps)


# ----------------------------------------------------------------------------------------------------------------------
# the held-out split

def split_of_chain(chain):
    """"eval" or "train": one reasoning chain in ten is held out, by a hash of the chain itself.

    `chain` is what the solution is about and nothing else: for each needed quantity "NAME = rule" (parents by name,
    those of a sum in alphabetical order; the literal; the operators), sorted, and the question. No letters, no order of
    sentences or steps, no distractors: a chain of the eval split cannot be drawn in training in any disguise.
    """
    digest = hashlib.blake2b(chain.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "little") % EVAL_SHARE == 0 else "train"


def chain_of(rules, name, question):
    lines = []
    for entity, (parents, difference, literal_op, literal, _) in rules.items():
        refs = [name[p] for p in parents]
        if not difference:
            refs.sort()
        lines.append(f"{name[entity]} = {literal or ''}{literal_op}{(' - ' if difference else ' + ').join(refs)}")
    lines.sort()
    return "\n".join(lines) + "\n" + question


# ----------------------------------------------------------------------------------------------------------------------
# mixtures: which context and op, how often

class Mixture(NamedTuple):
    spec: str        # as given
    cells: list      # [(context, op)]
    weights: list    # probability of each cell
    cumulative: list


def parse_ops(text):
    """"2-10" or "5" -> list of ops. Raises ValueError with a line for the user."""
    m = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text.strip())
    if not m:
        raise ValueError(f"op range {text!r} is not like 2-10 or 5")
    low, high = int(m[1]), int(m[2] or m[1])
    if not MIN_OP <= low <= high <= MAX_OP:
        raise ValueError(f"op range {text!r} must lie in {MIN_OP}-{MAX_OP}, smaller end first")
    return list(range(low, high + 1))


def parse_mixture(spec):
    """A mixture from its text, e.g. "zoo:2-20:0.99,school:2:0.01" or "2-10".

    Parts are [CONTEXT:]OPS[:WEIGHT], joined by commas; CONTEXT is zoo, school, movie or all (the default), OPS 2-10 or
    5. A weight (default 1) is shared evenly by the cells (context, op) of its part; weights are normalised.
    Raises ValueError with a line for the user.
    """
    cells, weights = [], []
    for part in spec.split(","):
        fields = part.strip().split(":")
        context = "all" if fields[0][:1].isdecimal() else fields.pop(0)
        if context not in (*CONTEXTS, "all") or not 1 <= len(fields) <= 2:
            raise ValueError(f"mixture part {part!r} is not [zoo|school|movie|all:]OPS[:WEIGHT], e.g. zoo:2-20:0.99")
        ops = parse_ops(fields[0])
        try:
            weight = float(fields[1]) if len(fields) == 2 else 1.0
        except ValueError:
            raise ValueError(f"weight {fields[1]!r} in mixture part {part!r} is not a number") from None
        if not 0 <= weight <= 1e9:
            raise ValueError(f"weight {fields[1]!r} in mixture part {part!r} must be a number from 0 to 1e9")
        group = [(c, op) for c in ([context] if context != "all" else CONTEXTS) for op in ops]
        cells += group
        weights += [weight / len(group)] * len(group)
    if sum(weights) <= 0:
        raise ValueError(f"the weights of mixture {spec!r} are all zero")
    weights = [w / sum(weights) for w in weights]
    return Mixture(spec, cells, weights, list(itertools.accumulate(weights)))


def mixture_of(ops, mix, default):
    """The mixture of the options --ops and --mix, of which at most one may be given."""
    if ops is not None and mix is not None:
        raise ValueError("give --ops or --mix, not both")
    if ops is not None:
        parse_ops(ops)
        mix = f"all:{ops}"
    return parse_mixture(default if mix is None else mix)


def stage_mixture(id_ops, default_id_share, mix=None, ops=None, id_share=None):
    """The mixture of a stage after pre-training on ops id_ops = [m, M]: `mix` or else, in all contexts, a share of `id_share`
    from m-M and the rest from `ops` (default: OOD-edge). Raises ValueError with a line for the user."""
    if mix is not None and (ops is not None or id_share is not None):
        raise ValueError("give --ops (and --id-share) or --mix, not both")
    if mix is None:
        if ops is None and id_ops[1] >= MAX_OP:
            raise ValueError(f"pre-training went up to op {MAX_OP}, the last: name the range with --ops or --mix")
        ops = ops or "{}-{}".format(*op_groups(id_ops)["OOD-edge"])
        parse_ops(ops)
        id_share = default_id_share if id_share is None else id_share
        mix = "all:{}-{}:{:g},all:{}:{:g}".format(*id_ops, id_share, ops, 1 - id_share)
    return parse_mixture(mix)


def reweighted(mixture, factors):
    """The mixture with the weight of each op times factors[op]."""
    weights = [w * factors.get(op, 0.0) for (_, op), w in zip(mixture.cells, mixture.weights)]
    weights = [w / sum(weights) for w in weights]
    return mixture._replace(weights=weights, cumulative=list(itertools.accumulate(weights)))


def op_groups(id_ops):
    """How ops are grouped after pre-training on ops id_ops = [m, M]: {name: (first op, last op)}.

    As in arXiv 2512.07783, where [2, 10] makes ID 2-10, OOD-edge 11-14 and OOD-hard 15-20: up to M, 1.4 M and 2 M.
    """
    m, M = id_ops
    edge = min(math.ceil(1.4 * M), MAX_OP)
    return {"ID": (m, M), "OOD-edge": (M + 1, edge), "OOD-hard": (edge + 1, min(2 * M, MAX_OP))}


# ----------------------------------------------------------------------------------------------------------------------
# problem i

def make_row(i, mixture, seed=0, split="train", law=distractor_law(2)):
    """Problem `i` of a mixture: a row of the public data set's format, a pure function of the arguments.

    Context, op and number of distractors are drawn once, the rest until names suffice, sums stay at or below 1000 (both
    nearly always at the first try) and the chain belongs to `split` (None: to any). law: see `distractor_law`.
    """
    rng = random.Random((seed << 64) + i)
    context, op = mixture.cells[min(bisect(mixture.cumulative, rng.random()), len(mixture.cells) - 1)]
    n_distractors = min(bisect(law, rng.random()), MAX_DISTRACTORS)
    c, names = CONTEXTS[context], NAMES[context]
    while True:
        graph = sample_graph(rng, op, n_distractors)
        rules = graph and sample_values(rng, graph)
        if not rules:
            continue
        places, kinds = draw(rng, range(len(c["places"])), GRID), draw(rng, range(len(c["kinds"])), GRID) + [-1]
        at = [(p, k) for p in places for k in kinds]  # entity -> place and kind of the context
        name = [names.name[p][k] for p, k in at]
        question_entity = next(iter(graph))
        p, k = at[question_entity]
        question = names.question[p][k]
        if split and split_of_chain(chain_of(rules, name, question)) != split:
            continue
        distractors = sample_distractors(rng, rules, n_distractors)
        if distractors is not None:
            break
    everything = {**rules, **distractors}
    reference = [names.reference[p][k] for p, k in at]
    sentences = [e for e in everything if e % (GRID + 1) != TOTAL]
    sentences = draw(rng, sentences, len(sentences))
    problem = "".join([f"The number of {name[e]} equals {value_text(everything[e], reference)}. " for e in sentences])

    # The steps go depth first from the question, parents as written, children of a TOTAL as the text mentions them: the
    # solution is a function of the text but for its letters, so a learner need not guess our order.
    rank = {e: j for j, e in enumerate(sentences)}
    order = []

    def visit(entity):
        rule = rules[entity]
        if entity % (GRID + 1) == TOTAL:
            rules[entity] = rule = Rule(tuple(sorted(rule.parents, key=rank.get)), False, "", 0, rule.value)
        for parent in rule.parents:
            if parent not in done:
                visit(parent)
        done.add(entity)
        order.append(entity)

    done = set()
    visit(question_entity)
    solution = solution_text(rng, rules, order, name, op) + f"Answer: {rules[question_entity].value}."
    return dict(problem=problem, question=question, solution=solution, op=op, id=f"{seed}-{i}", template=c["template"],
                mode="normalforward", length="zero_context", d=2)


def read_rows(path):
    """Rows of a JSONL file in the public format. Raises ValueError or OSError with a line for the user."""
    rows = []
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                prompt_text(row), row["solution"].split, row["template"].split, range(row["op"])
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{path} line {n} is not a row with problem, question, solution and op") from None
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# tokens

END = "<|endoftext|>"
TAGS = ["<question>", "</question>", "<solution>", "</solution>", "<answer>", "</answer>"]


def tokenizer():
    """The `tiktoken.Encoding`: a closed vocabulary built here, with nothing to train, ship or download.

    Tokens are the 256 bytes and the phrases that the problems are made of, each split off whole by the pattern (tiktoken
    looks a piece up before it tries to merge bytes). Everything else falls back to bytes, so any text round-trips.
    The name of a quantity, "adult fox in Maple Creek", is one token: a model that has to tie kind and place together
    first spends most of a short run on that. Digits are single tokens, the first one of a number with its space. Tags
    are special tokens, and no phrase starts or ends with the space beside a tag: the ids of a prompt are a prefix of the
    ids of the prompt plus its continuation.
    """
    phrases = [before + the for the in (" the number of", " the")
               for before in ("", " the sum of", " the difference between", ",", " and", ", and")]
    phrases += [start + phrase for start in (" ", ". ") for phrase in
                ("The number of", "What is the", "How many", "Define", "Answer:")]
    phrases += [" equals", " plus", " times", " as", "; so", " so", " ="]
    phrases += [" +", " -", " *"] + [f" {d}" for d in "0123456789"] + [f" {letter}" for letter in LETTERS]
    for c in CONTEXTS.values():
        phrases += [f" {kind}" for kind in c["kinds"]] + [f" does {place} have?" for place in c["places"]]
        phrases += [f" {name} in {place}" for name in [*c["kinds"], c["total"]] for place in c["places"]]
    pattern = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))  # the longest phrase wins
    tokens = [bytes([b]) for b in range(256)] + [p.encode() for p in phrases]
    n = len(tokens)
    return tiktoken.Encoding("nano-interplay", pat_str=pattern + r"|[\s\S]",
                             mergeable_ranks={t: i for i, t in enumerate(tokens)},
                             special_tokens={t: n + i for i, t in enumerate(TAGS + [END])})


def name_parts(enc):
    """{id of a name: ids of its parts}: of "KIND in PLACE" and of "TOTAL in PLACE" those that "How many KIND does PLACE have?"
    is made of, so KIND and PLACE, or PLACE alone. As one token, a name does not show that it has parts."""
    parts = {}
    for c in CONTEXTS.values():
        for place in c["places"]:
            where = enc.encode_single_token(f" does {place} have?")
            for kind in c["kinds"]:
                parts[enc.encode_single_token(f" {kind} in {place}")] = [enc.encode_single_token(f" {kind}"), where]
            parts[enc.encode_single_token(f" {c['total']} in {place}")] = [where]
    return parts


_enc = tokenizer()
VOCAB_SIZE = -(-_enc.n_vocab // 64) * 64  # 637, rounded up to a multiple of 64 so that matrix kernels run at full speed: 640
# what the ids mean, in short: a model trained with others reads and writes nonsense
VOCABULARY = hashlib.blake2b(b"\n".join(map(_enc.decode_single_token_bytes, range(_enc.n_vocab))), digest_size=4).hexdigest()


def prompt_text(row):
    """What the model is given, up to and including the tag that opens the solution."""
    return f"<question> {row['problem'].strip()} {row['question'].strip()} </question> <solution>"


def response_text(row):
    """What the model should write after the prompt, end-of-text included."""
    solution, _, answer = row["solution"].partition("Answer:")
    return f" {' '.join(solution.split())} </solution> <answer> {answer.strip().rstrip('.')} </answer>{END}"


def encode(enc, text):
    return enc.encode(text, allowed_special="all")


def decode(enc, ids):
    """Text of sampled ids. Those past the vocabulary (VOCAB_SIZE is rounded up) have none: a zero byte stands for each."""
    return enc.decode([i if i < enc.n_vocab else 0 for i in ids], errors="replace")


def encode_row(enc, row):
    """-> (ids, n_prompt): the whole training text as ids, and how many of them are the prompt."""
    ids = encode(enc, prompt_text(row) + response_text(row))
    return ids, ids.index(enc.encode_single_token("<solution>")) + 1


def mean_tokens(mixture, seed, law, n=2000):
    """Tokens of a problem that are read in training, in the mean."""
    enc = tokenizer()
    return np.mean([len(encode_row(enc, make_row(i, mixture, seed, law=law))[0]) - 1 for i in range(n)])


# ----------------------------------------------------------------------------------------------------------------------
# batches

IGNORE = -100  # target of positions without loss, as torch's cross_entropy has it


class TrainingSteps:
    """steps[s] -> the micro-batches of optimizer step s, so a run resumes at s and any worker can make any step.

    Step s trains on problems s * batch_size ... (s + 1) * batch_size - 1; rank r of `world` ranks takes every world-th
    of them. One problem is one row: padding on the right needs no mask under causal attention, and no row sees another.
    Rows are sorted by length and cut into micro-batches of at most `micro_tokens` tokens, padding included (one row may
    be longer). Their shapes are multiples of (4, 16): libraries prepare a kernel for each new shape and keep it. With
    packed=True, for torch.compile, problems are laid end to end instead, without padding and in few shapes: see `pack`.

    A micro-batch is (x, y), int64 arrays (rows, T): y[b, t] is the token after x[b, t], or IGNORE where there is no
    loss: on padding and, with loss="solution", on the prompt. late: (step, distractors), another mean from that step on.
    Works as a map-style data set of torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, end)).
    """

    def __init__(self, mixture, batch_size, seed=0, split="train", loss="all", distractors=2.0, micro_tokens=8192,
                 rank=0, world=1, packed=False, late=None):
        self.mixture, self.batch_size, self.seed, self.split = mixture, batch_size, seed, split
        self.loss, self.law, self.micro_tokens = loss, distractor_law(distractors), micro_tokens
        self.late_from, self.late_law = (late[0], distractor_law(late[1])) if late else (math.inf, None)
        self.rank, self.world, self.packed, self.enc = rank, world, packed, tokenizer()

    def __getitem__(self, step):
        first = step * self.batch_size
        law = self.law if step < self.late_from else self.late_law
        rows = [encode_row(self.enc, make_row(i, self.mixture, self.seed, self.split, law))
                for i in range(first + self.rank, first + self.batch_size, self.world)]
        return [arrays for _, arrays in micro_batches(rows, self.micro_tokens, self.loss, self.packed)]


def micro_batches(rows, micro_tokens, loss="all", packed=False):
    """Rows (ids, n_prompt, ...) -> [(list of rows, what `pad` or `pack` makes of them)]."""
    if packed:
        return [(batch, pack(batch, size, loss)) for batch, size in cut_to_pack(rows, micro_tokens)]
    return [(batch, pad(batch, loss)) for batch in cut(rows, micro_tokens)]


def cut(rows, micro_tokens):
    """Sort rows (ids, n_prompt, ...) by length and cut them into lists of at most `micro_tokens` tokens, with padding."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    batches, start = [], 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and math.prod(padded(end + 1 - start, len(rows[end][0]) - 1)) <= micro_tokens:
            end += 1
        batches.append(rows[start:end])
        start = end
    return batches


def pack_sizes(micro_tokens):
    """The sizes that `cut_to_pack` uses, apart from that of a row that is longer than all of them."""
    return [max(1, micro_tokens >> i) for i in range(4)]


def cut_to_pack(rows, micro_tokens):
    """Cut rows, in their order, into [(list of rows, size)] for `pack`. The size is micro_tokens; for the last ones, which would
    fill less than three quarters of it, a half, a quarter or an eighth."""
    lengths = [len(row[0]) - 1 for row in rows]
    batches, start, sizes = [], 0, pack_sizes(micro_tokens)
    while start < len(rows):
        left = sum(lengths[start:])
        size = next((size for size in sizes if left > 0.75 * size), sizes[-1])
        while size < lengths[start]:
            size *= 2
        end = start + 1
        while end < len(rows) and end - start < most_rows(size) and sum(lengths[start:end + 1]) <= size:
            end += 1
        batches.append((rows[start:end], size))
        start = end
    return batches


def most_rows(size):
    """Rows that `pack` has room for: an array of one length, whatever is in it, and each place in it costs a little."""
    return max(1, size // 48)


def pack(rows, size, loss="all"):
    """[(ids, n_prompt, ...)], end to end -> (x, y, cu_seqlens, max_seqlen), what a kernel for sequences of many lengths reads.

    x, y: (1, size), as in `TrainingSteps`. cu_seqlens: int32, where each sequence starts, in the end `size`, repeated.
    max_seqlen: an int, none is longer. What is left of the row is cut into sequences too: all tokens are of one.
    """
    x, y, ends = np.zeros((1, size), np.int64), np.full((1, size), IGNORE, np.int64), [0]
    max_seqlen = 512  # one of few numbers: torch.compile makes a program for each
    for ids, n_prompt, *_ in rows:
        first, start, end = n_prompt if loss == "solution" else 1, ends[-1], ends[-1] + len(ids) - 1
        x[0, start:end] = ids[:-1]
        y[0, start + first - 1:end] = ids[first:]
        ends.append(end)
        while max_seqlen < end - start:
            max_seqlen *= 2
    ends += range(ends[-1] + max_seqlen, size, max_seqlen)
    cu_seqlens = np.full(most_rows(size) + size // 512 + 2, size, np.int32)
    cu_seqlens[:len(ends)] = ends
    return x, y, cu_seqlens, max_seqlen


def padded(n_rows, T):
    return -(-n_rows // 4) * 4, -(-T // 16) * 16


def pad(rows, loss="all"):
    """[(ids, n_prompt, ...)] -> (x, y) as in `TrainingSteps`."""
    shape = padded(len(rows), max(len(row[0]) for row in rows) - 1)
    x = np.zeros(shape, np.int64)
    y = np.full(shape, IGNORE, np.int64)
    for b, (ids, n_prompt, *_) in enumerate(rows):
        first = n_prompt if loss == "solution" else 1  # the first token with a loss
        x[b, :len(ids) - 1] = ids[:-1]
        y[b, first - 1:len(ids) - 1] = ids[first:]
    return x, y


# ----------------------------------------------------------------------------------------------------------------------
# the command line

def show(row):
    """A problem for people: the text, the graph as a tree, the steps."""
    steps = re.findall(r"Define (.+?) as (\w); (.+?)\. ", row["solution"])
    letter_to_name, parents, value = {letter: name for name, letter, _ in steps}, {}, {}
    for name, letter, work in steps:
        used = re.findall(r"[A-Za-z]", re.sub(r"\bso\b", "", work))
        parents[name] = [letter_to_name[u] for u in dict.fromkeys(used) if u in letter_to_name and u != letter]
        value[name] = work.split()[-1]
    lines, seen = [], set()

    def tree(name, first, rest):
        known = name in seen
        seen.add(name)
        lines.append(f"{first}{name} = {value[name]}" + (" (see above)" if known and parents[name] else ""))
        for j, parent in enumerate([] if known else parents[name]):
            last = j == len(parents[name]) - 1
            tree(parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    tree(steps[-1][0], "", "")
    sentences = [s + "." for s in row["problem"].strip().rstrip(".").split(". ")]
    return "\n".join([f"problem {row['id']}: op {row['op']}, {len(steps)} steps, {row['template']}", "", *sentences, "",
                      row["question"], "", *lines, "", *row["solution"].replace(". ", ".\n").splitlines(), ""])


def main():
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=__doc__.split("\n\n", 1)[0].strip() + "\n\n" + __doc__[__doc__.index("    python"):])
    p.add_argument("--ops", help="op range, all contexts, uniform: 2-10 or 5 (default 2-10)")
    p.add_argument("--mix", help='mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20:0.99,school:2:0.01"')
    p.add_argument("--n", type=int, default=1, help="number of problems (default 1)")
    p.add_argument("--seed", type=int, default=0, help="problem i is a pure function of (seed, i) (default 0)")
    p.add_argument("--split", default="train", help="train or eval: no reasoning chain is in both (default train)")
    p.add_argument("--distractors", type=float, default=2.0,
                   help="mean number of sentences that the question does not need, 0 to 10 (default 2)")
    p.add_argument("--out", help="JSONL file to write; without it the problems are shown")
    args = p.parse_args()
    try:
        mixture = mixture_of(args.ops, args.mix, "2-10")
        law = distractor_law(args.distractors)
        if args.n < 1:
            raise ValueError(f"--n must be at least 1, got {args.n}")
        if args.seed < 0:
            raise ValueError(f"--seed must be at least 0, got {args.seed}")
        if args.split not in ("train", "eval"):
            raise ValueError(f"--split is train or eval, got {args.split!r}")
        rows = (make_row(i, mixture, args.seed, args.split, law) for i in range(args.n))
        if args.out is None:
            for row in rows:
                print(show(row))
            return
        if os.path.exists(args.out) and not os.path.isfile(args.out):
            raise ValueError(f"--out {args.out} is not a file")
        from tqdm import tqdm
        part = f"{os.path.realpath(args.out)}.{os.getpid()}.part"  # so that a file under its final name is always whole
        try:
            with open(part, "w", encoding="utf-8") as f:
                for row in tqdm(rows, total=args.n, unit=" problems", disable=None):
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
            os.replace(part, os.path.realpath(args.out))
        finally:
            if os.path.exists(part):
                os.remove(part)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        p.error(str(error))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # ... | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
