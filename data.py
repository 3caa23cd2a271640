"""
Synthetic reasoning problems whose every step can be checked: graphs, texts, tokens, batches.

A problem is a small graph of named quantities. KIND in PLACE is an *instance* ("adult fox in Maple Creek"): one sentence
of the text says how to compute it from other quantities. TOTAL in PLACE is the sum of all kinds that the text mentions for
that place. It has no sentence of its own. The question asks for one quantity, and the solution computes what this
quantity needs, one step at a time. The format is that of GSM-Infinite (arXiv 2502.05252; zero context, medium, forward
mode), as used by arXiv 2512.07783:

    problem  = { sentence ". " }                                   in random order
    sentence = "The number of " KIND " in " PLACE " equals " value
    value    = INT | expr | INT " plus " expr | INT " times " expr
    expr     = ref | "the sum of " ref " and " ref | "the difference between " ref " and " ref
             | "the sum of " ref ", " { ref ", " } "and " ref      3 or 4 refs
    ref      = "the number of " KIND " in " PLACE | "the " TOTAL " in " PLACE
    question = "What is the " TOTAL " in " PLACE "?" | "How many " KIND " does " PLACE " have?"
    solution = { "Define " NAME " as " LETTER "; " { assign "; " } "so " assign ". " } "Answer: " INT "."

op, the difficulty, is the number of Define steps plus the number of operators written with letters.

Problem i of a mixture is a pure function of (seed, i). So any worker can make any problem, and training can resume at any
i. A hash of the reasoning chain puts each problem into the train split or the eval split (`split_of_chain`). The number of
distractors, sentences that the question does not need, changes nothing of what problem i needs, only order and letters.

    python data.py --ops 5 --n 1                             show one problem
    python data.py --ops 2-10 --n 1000 --out rows.jsonl      write rows in the format of the public data
    python data.py --mix zoo:5 --max-parents 2 --max-value 20 --distractors 0.5    one of the world of the preset tiny
"""
import argparse
import functools
import hashlib
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
from bisect import bisect
from dataclasses import dataclass
from typing import NamedTuple

interruptible = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if interruptible:  # Ctrl-C during the imports ends it without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import tiktoken

# ----------------------------------------------------------------------------------------------------------------------
# the three contexts: short name -> template name of the public data, the word for a TOTAL, kinds, places

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

MIN_OP, MAX_OP = 2, 30  # larger problems run out of names
MAX_VALUE = 1000        # of the public data
MIN_MAX_VALUE = 10      # of World.max_value: below it, sums of many parents rarely fit
GRID = 5                # a problem has GRID places and GRID kinds
TOTAL = GRID            # the column of the TOTAL of a place, after those of the kinds
COLUMNS = GRID + 1      # entity = place * COLUMNS + column
EVAL_SHARE = 10         # one reasoning chain in EVAL_SHARE is held out

# ----------------------------------------------------------------------------------------------------------------------
# the world: the settings of the generator

# The probabilities bring the mean number of steps and the mean depth close to the public data for op 2-20. The table is
# in tests/test_data.py.
P_ASK_TOTAL = 0.8              # the question asks for a TOTAL
P_TOTAL = 0.54                 # a new parent is the TOTAL of a place, not an instance
P_LEAF, P_LEAF_LATE = 0.02, 0.5  # a waiting node becomes a leaf: while some of op is left, and when all is spent
P_NEW_FIRST, P_NEW_MORE = 0.18, 0.1  # a parent is a new node, not a waiting one: the first parent, and each further one
P_LITERAL = 0.72               # "INT plus expr" or "INT times expr" instead of "expr", if op allows it
P_NEWEST = 0.85                # expand the newest waiting node, which makes the graph deep, instead of a random one
N_PARENTS = (1,) * 20 + (2,) * 58 + (3,) * 14 + (4,) * 8   # of an instance, in percent
N_CHILDREN = (1,) * 8 + (2,) * 52 + (3,) * 29 + (4,) * 11  # of a TOTAL, in percent
P_DIFFERENCE = 0.45, 0.08       # subtract two parents instead of adding them: different values, equal values (result 0)
P_LEAF_DISTRACTOR = 0.45       # a distractor is a leaf
N_SHORT = 4                    # from the fifth on, distractors are long sentences (see `distractor_law`)
LEAF_VALUES = (1,) * 3 + (2,) * 7 + (3,) * 7 + (4,) * 7    # as in the public data
MAX_DISTRACTORS = 12           # every graph leaves names for so many


def distractor_law(mean):
    """Cumulative probabilities of 0..12 distractors with the given mean (`--distractors`).

    The law is the same for every op, so a larger op does not change how much is beside the point. It is geometric with a
    heavy tail: up to a sixteenth of the problems is spread evenly over 8 to 12 distractors, most of them long. (With those of
    the geometric part it is one problem in 13 if the mean is 2.) The tail brings training texts of op 10 up to 257 tokens
    (the 99.9 % quantile). That covers 84 % of the texts of op 17 and 2 % of those of op 20. Raises ValueError for a mean
    outside 0..10.
    """
    if not 0 <= mean <= 10:
        raise ValueError(f"the mean number of distractors must be in 0..10, got {mean:g}")
    ns = np.arange(MAX_DISTRACTORS + 1)
    tail = min(1 / 16, mean / 20)

    def probabilities(ratio):
        geometric = ratio ** ns / np.sum(ratio ** ns)
        return (1 - tail) * geometric + tail * (ns >= 8) / np.sum(ns >= 8)

    low, high = 0.0, 1e3  # the mean grows with the ratio, so bisect
    for _ in range(100):
        ratio = (low + high) / 2
        low, high = (ratio, high) if probabilities(ratio) @ ns < mean else (low, ratio)
    return np.cumsum(probabilities(ratio if mean else 0.0)).tolist()


@dataclass(frozen=True)
class World:
    """The settings of the generator. The defaults allow what the public data has; smaller numbers make a smaller world.

    Raises ValueError with one line for the user.
    """
    distractors: float = 2.0   # mean number of sentences that the question does not need
    max_parents: int = 4       # the largest number of parents of an instance, and of children of a TOTAL
    max_value: int = MAX_VALUE

    def __post_init__(self):
        if self.max_parents not in range(2, max(N_PARENTS) + 1):
            raise ValueError(f"the largest number of parents must be in 2..{max(N_PARENTS)}, got {self.max_parents}")
        if not MIN_MAX_VALUE <= self.max_value <= MAX_VALUE:
            raise ValueError(f"the largest value must be in {MIN_MAX_VALUE}..{MAX_VALUE}, got {self.max_value}")
        self.law  # raises ValueError for a bad mean

    @functools.cached_property
    def law(self):
        return distractor_law(self.distractors)

    @functools.cached_property
    def n_parents(self):
        return [n for n in N_PARENTS if n <= self.max_parents]

    @functools.cached_property
    def n_children(self):
        return [n for n in N_CHILDREN if n <= self.max_parents]


# ----------------------------------------------------------------------------------------------------------------------
# the reasoning graph: which quantity depends on which, with exactly `op` operations

def sample_graph(rng, op, world):
    """Draw a graph that costs exactly `op`.

    A node with k parents costs max(1, k), and a literal costs 1 more: a leaf 1, `c * p` 2, `a + b` 2, a TOTAL of k
    children k. The graph grows backwards from the question. A new node is paid for when it is added, at the lowest cost
    that it can have. Expanding a node spends more of the rest, `op_left`. The last waiting node becomes a leaf only
    when nothing is left, so the cost is exact by construction. If the names run out first, see `spend`.

    Only waiting nodes can become parents, so nodes are expanded in reverse topological order. A TOTAL is the sum of all
    instances of its place. So the instances of a place wait until its TOTAL is expanded, and then the place is closed.

    Every graph leaves names for MAX_DISTRACTORS more instances, so the graph does not depend on the number of distractors.

    Returns {entity: (parents, has_literal)}, the question first, or None if there is no way to spend all of op (rare).
    """
    rand = rng.random
    instances = [[] for _ in range(GRID)]  # place -> its instances so far
    expanded = [False] * GRID              # place -> one of its instances has been expanded
    total = [0] * GRID                     # place -> 0: it has no TOTAL, 1: its TOTAL waits, 2: its TOTAL has been expanded
    graph, waiting = {}, []
    op_left = op
    n_names = GRID * GRID - MAX_DISTRACTORS  # free names in places without a TOTAL, except for those of the distractors
    max_cost = min(world.max_parents, 3) + 1  # of an instance, with its literal

    def pick(items):
        return items[int(rand() * len(items))]

    def price(p):
        """Of a new instance in place p. A waiting TOTAL pays 1 for each child, for the first one in advance."""
        return 1 if not total[p] else 2 if instances[p] else 0

    def add_instance(p):
        nonlocal op_left, n_names
        op_left -= price(p)
        n_names -= not total[p]
        entity = pick([e for e in range(p * COLUMNS, p * COLUMNS + GRID) if e not in instances[p]])
        instances[p].append(entity)
        waiting.append(entity)
        return entity

    def add_total(p):
        nonlocal op_left, n_names
        op_left -= len(instances[p]) or 2  # 1 for each child, or 2 for the TOTAL with a first child
        n_names -= GRID - len(instances[p])
        total[p] = 1
        waiting.append(p * COLUMNS + TOTAL)
        return waiting[-1]

    def add_parent(max_price):
        """A new node, or None if there is none at that price."""
        if rand() < P_TOTAL:
            spare = n_names - max_price // max_cost  # the rest of op needs names, too
            places = [p for p in range(GRID) if not total[p] and not expanded[p] and GRID - len(instances[p]) <= spare
                      and (len(instances[p]) or 2) <= max_price and len(instances[p]) <= world.max_parents]
            if places:
                return add_total(pick(places))
        places = [p for p in range(GRID) if price(p) <= max_price
                  and (len(instances[p]) < world.max_parents if total[p] == 1
                       else not total[p] and n_names > 0 and len(instances[p]) < GRID)]
        return add_instance(pick(places)) if places else None

    p = int(rand() * GRID)
    add_total(p) if rand() < P_ASK_TOTAL and GRID <= n_names - (op - 2) // max_cost else add_instance(p)
    while waiting:
        ready = [j for j, e in enumerate(waiting) if e % COLUMNS == TOTAL or total[e // COLUMNS] != 1]
        entity = waiting.pop(ready[-1] if rand() < P_NEWEST else pick(ready))
        p, column = divmod(entity, COLUMNS)
        if column == TOTAL:
            n_children = pick(world.n_children)
            while not instances[p] or (len(instances[p]) < n_children and op_left >= 2):
                add_instance(p)
            total[p] = 2
            graph[entity] = (tuple(instances[p]), False)
            continue
        expanded[p] = True
        if not waiting and op_left == 0 or waiting and rand() < (P_LEAF if op_left else P_LEAF_LATE):
            graph[entity] = ((), False)
            continue
        candidates, parents = waiting[:], []
        for j in range(pick(world.n_parents)):
            cost = min(j, 1)  # each parent after the first is one more operator
            if op_left < cost:
                break
            is_new = not candidates or rand() < (P_NEW_MORE if j else P_NEW_FIRST)
            parent = add_parent(op_left - cost) if is_new else candidates.pop(int(rand() * len(candidates)))
            if parent is None:
                break
            parents.append(parent)
            op_left -= cost
        parents = parents or candidates[-1:]
        has_literal = op_left > 0 and 0 < len(parents) <= 3 and rand() < P_LITERAL
        op_left -= has_literal
        graph[entity] = (tuple(parents), has_literal)
    return graph if op_left == 0 or spend(rng, graph, op_left, world) == 0 else None


def spend(rng, graph, op_left, world):
    """Add parents and literals to a graph that ran out of names before op was spent. Returns what is still left."""
    order = list(graph)
    instances = [e for e in order if e % COLUMNS != TOTAL and graph[e][0]]
    for n_parents in range(2, world.max_parents + 1):
        for entity in draw(rng, instances, len(instances)):
            if not op_left:
                return 0
            parents, has_literal = graph[entity]
            later = [e for e in order[order.index(entity) + 1:] if e not in parents]  # so there are no circles
            if later and len(parents) < n_parents and len(parents) + has_literal <= 3:
                parents += (later[int(rng.random() * len(later))],)
                op_left -= 1
            if op_left and not has_literal and len(parents) <= 3:
                has_literal = True
                op_left -= 1
            graph[entity] = parents, has_literal
    return op_left


def sample_values(rng, graph, max_value):
    """Draw literals and operators, and compute all values.

    This goes from the leaves up, so each choice can keep its value in 0..max_value: "times" only if the product stays
    small, and the larger parent first in a difference. Sums may still get too large. Then it starts again, and prefers
    small values.

    Returns {entity: Rule} in the order of computation, or None if even the smallest values are too large (rare).
    """
    for p_small in 0, 0.5, 1:
        rules = {}
        for entity in reversed(graph):
            rules[entity] = rule = sample_rule(rng, rules, entity, *graph[entity], max_value, p_small)
            if rule.value > max_value:
                break
        else:
            return rules
    return None


def draw(rng, items, k):
    """k of the items in random order, without replacement (several times as fast as random.sample)."""
    rand, items, n = rng.random, list(items), len(items)
    for j in range(k):
        other = j + int(rand() * (n - j))
        items[j], items[other] = items[other], items[j]
    return items[:k]


class Rule(NamedTuple):
    """How to compute one quantity: literal, literal_op, then the sum or difference of the parents."""
    parents: tuple       # entities, in the order in which they are written
    difference: bool     # subtract the two parents instead of adding them
    literal_op: str      # " + ", " * ", or "" without a literal; a leaf is a literal alone
    literal: int
    value: int


def sample_rule(rng, rules, entity, parents, has_literal, max_value, p_small=0):
    """A rule for `entity`, with probability p_small the one with the smallest value. The value may exceed max_value."""
    rand = rng.random
    small = p_small and rand() < p_small
    if not parents:
        literal = 1 if small else LEAF_VALUES[int(rand() * 24)]
        return Rule((), False, "", literal, literal)
    values = [rules[p].value for p in parents]
    value = sum(values)
    difference = len(parents) == 2 and entity % COLUMNS != TOTAL and (
        small or value + has_literal > max_value or rand() < P_DIFFERENCE[values[0] == values[1]])
    if difference:
        value = abs(values[0] - values[1])
        if values[0] < values[1]:
            parents = parents[::-1]
    if not has_literal:
        return Rule(parents, difference, "", 0, value)
    times = value == 0 if small else rand() < 0.5 and 4 * value <= max_value
    most = 1 if small else 3 if times else min(4, max(1, max_value - value))
    literal = times + 1 + int(rand() * most)
    return Rule(parents, difference, " * " if times else " + ", literal, literal * value if times else literal + value)


def sample_distractors(rng, rules, n, world):
    """Draw `n` instances that the question does not need, each with a rule over the quantities before it.

    So there are no circles. A place with a TOTAL gets no new instance, because that would change the TOTAL. A distractor
    may introduce the TOTAL of another place, which closes that place.

    Returns {entity: Rule} of the distractors and their TOTALs, in the order of computation.
    """
    rand, rules, n_needed = rng.random, dict(rules), len(rules)
    closed = {e // COLUMNS for e in rules if e % COLUMNS == TOTAL}
    free = [e for e in range(GRID * COLUMNS) if e % COLUMNS != TOTAL and e // COLUMNS not in closed and e not in rules]

    def pick_total(own_place):
        """The TOTAL of a random place, or None if it has none and cannot get one."""
        nonlocal free
        p = int(rand() * GRID)
        total = p * COLUMNS + TOTAL
        if total in rules:
            return total
        children = tuple(e for e in rules if e // COLUMNS == p)
        value = sum(rules[e].value for e in children)
        free_elsewhere = [e for e in free if e // COLUMNS != p]
        if (p == own_place or not 1 <= len(children) <= world.max_parents or value > world.max_value
                or len(free_elsewhere) < n - j - 1):
            return None
        free = free_elsewhere
        rules[total] = Rule(children, False, "", 0, value)
        return total

    for j in range(n):
        entity = free.pop(int(rand() * len(free)))
        parents, n_tries = [], 0
        if rand() >= P_LEAF_DISTRACTOR or j >= N_SHORT:
            n_tries = world.n_parents[int(rand() * len(world.n_parents))] if j < N_SHORT else 6
        for _ in range(n_tries):
            if len(parents) == world.max_parents:
                break
            known = list(rules)
            parent = pick_total(entity // COLUMNS) if rand() < 0.15 else known[int(rand() * len(known))]
            if parent is not None and parent not in parents:
                parents.append(parent)
        has_literal = 0 < len(parents) <= 3 and rand() < 0.4
        rule = sample_rule(rng, rules, entity, tuple(parents), has_literal, world.max_value)
        rules[entity] = rule if rule.value <= world.max_value else sample_rule(rng, rules, entity, (), False, world.max_value)
    return dict(itertools.islice(rules.items(), n_needed, None))


# ----------------------------------------------------------------------------------------------------------------------
# the text

def _strings(context):
    """-> (names, references, questions), lists: for each place one string for each kind, then one for the TOTAL.

    For example "adult fox in Maple Creek", "the number of adult fox in Maple Creek", "How many adult fox does Maple Creek
    have?".
    """
    total = context["total"]
    pairs = [(what, place) for place in context["places"] for what in [*context["kinds"], total]]
    return ([f"{what} in {place}" for what, place in pairs],
            [f"the {'' if what == total else 'number of '}{what} in {place}" for what, place in pairs],
            [f"What is the {what} in {place}?" if what == total else f"How many {what} does {place} have?"
             for what, place in pairs])


STRINGS = {context: _strings(c) for context, c in CONTEXTS.items()}


def value_text(rule, reference):
    """What follows "equals": `value` in the grammar above. reference: entity -> text."""
    *others, last = [reference[p] for p in rule.parents] or [str(rule.literal)]
    if others:
        what = "the difference between" if rule.difference else "the sum of"
        last = f"{what} {', '.join(others)}{',' if len(others) > 1 else ''} and {last}"
    return last if not rule.literal_op else f"{rule.literal} {'plus' if rule.literal_op == ' + ' else 'times'} {last}"


def solution_text(rng, rules, order, name, op):
    """Write the Define steps in the given order. Letters are drawn without replacement."""
    letters = iter(draw(rng, LETTERS, op))  # no node writes more letters than it costs
    letter_of, steps = {}, []
    for entity in order:
        parents, difference, literal_op, literal, value = rules[entity]
        letter = letter_of[entity] = next(letters)
        head, sign, work = f"Define {name[entity]} as {letter}; ", " - " if difference else " + ", f" = {literal}"
        for j, parent in enumerate(parents):  # k parents are folded from the left; `a` is the result so far
            b, b_value = letter_of[parent], rules[parent].value
            if j == 0:
                a, a_value, work = b, b_value, f" = {b} = {b_value}"
                continue
            if j > 1:
                a = next(letters)
                head += f"{a}{work}; "
            result = a_value - b_value if difference else a_value + b_value
            work = f" = {a}{sign}{b} = {a_value}{sign}{b_value} = {result}"
            a_value = result
        if literal_op:
            a = next(letters)
            head += f"{a}{work}; "
            work = f" = {literal}{literal_op}{a} = {literal}{literal_op}{a_value} = {value}"
        steps.append(f"{head}so {letter}{work}. ")
    return "".join(steps)


# ----------------------------------------------------------------------------------------------------------------------
# the held-out split

def split_of_chain(chain):
    """"eval" or "train", by a hash of the reasoning chain: one chain in EVAL_SHARE is held out.

    `chain` has a line "NAME = rule" for each needed quantity, sorted, and the question. A rule is the literal, the
    operators, and the names of the parents, those of a sum in alphabetical order. The chain leaves out the letters, the
    order of sentences and steps, and the distractors. So a chain of the eval split never occurs in training in any form.
    """
    digest = hashlib.blake2b(chain.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "little") % EVAL_SHARE == 0 else "train"


def chain_of(rules, name, question):
    lines = []
    for entity, (parents, difference, literal_op, literal, _) in rules.items():
        refs = [name[p] for p in parents]
        expr = " - ".join(refs) if difference else " + ".join(sorted(refs))
        lines.append(f"{name[entity]} = {literal or ''}{literal_op}{expr}")
    return "\n".join([*sorted(lines), question])


# ----------------------------------------------------------------------------------------------------------------------
# mixtures: how often each context and op occurs

class Mixture(NamedTuple):
    spec: str         # the text of the mixture
    cells: list       # [(context, op)]
    weights: list     # the probability of each cell
    cumulative: list  # their cumulative sums


def parse_ops(text):
    """"2-10" or "5" -> list of ops. Raises ValueError with one line for the user."""
    m = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", text.strip())
    if not m:
        raise ValueError(f"op range {text!r} is not like 2-10 or 5")
    low, high = int(m[1]), int(m[2] or m[1])
    if not MIN_OP <= low <= high <= MAX_OP:
        raise ValueError(f"op range {text!r} must lie in {MIN_OP}-{MAX_OP}, smaller end first")
    return list(range(low, high + 1))


def parse_mixture(spec):
    """A mixture from its text, e.g. "zoo:2-20:0.99,school:2:0.01" or "2-10".

    The text is a list of parts [CONTEXT:]OPS[:WEIGHT], separated by commas. CONTEXT is zoo, school, movie or all (the
    default), OPS is like 2-10 or 5. The cells (context, op) of a part share its weight (default 1) evenly. The sum of all
    weights may be any positive number. Raises ValueError with one line for the user.
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
    return normalised(spec, cells, weights)


def normalised(spec, cells, weights):
    weights = [w / sum(weights) for w in weights]
    return Mixture(spec, cells, weights, list(itertools.accumulate(weights)))


def mixture_of(ops, mix, default):
    """The mixture that the options --ops and --mix ask for. At most one of them may be given."""
    if ops is not None and mix is not None:
        raise ValueError("give --ops or --mix, not both")
    if ops is not None:
        parse_ops(ops)
        mix = f"all:{ops}"
    return parse_mixture(default if mix is None else mix)


def in_contexts(ops, weight=1.0):
    """The text of a mixture, as in `parse_mixture`, from {context: op range}. Each context has this weight."""
    if len(ops) == len(CONTEXTS) and len({*ops.values()}) == 1:
        ops = dict(all=next(iter(ops.values())))
    return ",".join(f"{context}:{of_context}:{weight:g}" for context, of_context in ops.items())


def op_ranges(*mixtures):
    """{context: [smallest op, largest op]}, of the cells that have a weight in one of the mixtures."""
    cells = [cell for mixture in mixtures for cell, weight in zip(mixture.cells, mixture.weights) if weight > 0]
    ops = {context: [op for c, op in cells if c == context] for context, _ in cells}
    return {context: [min(ops[context]), max(ops[context])] for context in ops}


def seen_ops(init):
    """{context: [m, M]}, what pre-training saw of each context, from a checkpoint. In old ones all contexts have one range."""
    return init.get("id_ranges") or dict.fromkeys(op_ranges(parse_mixture(init["recipe"].get("mix", "2-10"))), init["id_ops"])


def in_group(ranges, name, weight=1.0):
    """The text of a mixture of a group of ops (`op_groups`), each context by its own range."""
    return in_contexts({context: "{}-{}".format(*op_groups(id_ops)[name]) for context, id_ops in ranges.items()}, weight)


def stage_mixture(init, default_id_share, mix=None, ops=None, id_share=None):
    """The mixture of a stage that starts from the checkpoint init: `mix` or else, in the contexts of init, a share of `id_share`
    from the ops that pre-training saw and the rest from `ops` (default: OOD-edge). Raises ValueError for the user."""
    if mix is not None and (ops is not None or id_share is not None):
        raise ValueError("give --ops (and --id-share) or --mix, not both")
    if mix is None:
        ranges, share = seen_ops(init), default_id_share if id_share is None else id_share
        parse_ops(ops or "{}-{}".format(*op_groups(init["id_ops"])["OOD-edge"]))  # if nothing is past the largest op, it says so
        new = in_contexts(dict.fromkeys(ranges, ops), 1 - share) if ops else in_group(ranges, "OOD-edge", 1 - share)
        mix = in_group(ranges, "ID", share) + "," + new
    return parse_mixture(mix)


def reweighted(mixture, factors):
    """The mixture with the weight of each op multiplied by factors[op], 0 if there is none."""
    weights = [w * factors.get(op, 0.0) for (_, op), w in zip(mixture.cells, mixture.weights)]
    return normalised(mixture.spec, mixture.cells, weights)


def op_groups(id_ops):
    """The groups of ops for a model pre-trained on ops id_ops = (m, M): {name: (first op, last op)}.

    The groups end at M, 1.4 M and 2 M. As in arXiv 2512.07783, (2, 10) gives ID 2-10, OOD-edge 11-14, OOD-hard 15-20.
    """
    m, M = id_ops
    edge = min(math.ceil(1.4 * M), MAX_OP)
    return {"ID": (m, M), "OOD-edge": (M + 1, edge), "OOD-hard": (edge + 1, min(2 * M, MAX_OP))}


# ----------------------------------------------------------------------------------------------------------------------
# problem i

def make_row(i, mixture, seed=0, split="train", world=World()):
    """Problem `i` of a mixture: a row in the format of the public data, a pure function of the arguments.

    Context, op and the number of distractors are drawn once. The needed part of the problem is drawn again until its
    chain belongs to `split` (None: to any). Distractors follow, so world.distractors does not change the needed part.
    """
    rng = random.Random((seed << 64) + i)
    context, op = mixture.cells[min(bisect(mixture.cumulative, rng.random()), len(mixture.cells) - 1)]
    n_distractors = min(bisect(world.law, rng.random()), MAX_DISTRACTORS)
    c, (names, references, questions) = CONTEXTS[context], STRINGS[context]
    n_kinds = len(c["kinds"])
    while True:
        graph = sample_graph(rng, op, world)
        rules = graph and sample_values(rng, graph, world.max_value)
        if not rules:
            continue
        places, kinds = draw(rng, range(len(c["places"])), GRID), draw(rng, range(n_kinds), GRID) + [n_kinds]
        index = [place * (n_kinds + 1) + kind for place in places for kind in kinds]  # entity -> index of its strings
        name = [names[x] for x in index]
        asked = next(iter(graph))
        question = questions[index[asked]]
        if not split or split_of_chain(chain_of(rules, name, question)) == split:
            break
    everything = {**rules, **sample_distractors(rng, rules, n_distractors, world)}
    reference = [references[x] for x in index]
    sentences = [e for e in everything if e % COLUMNS != TOTAL]
    sentences = draw(rng, sentences, len(sentences))
    problem = "".join([f"The number of {name[e]} equals {value_text(everything[e], reference)}. " for e in sentences])

    # Steps go depth first from the question, parents as written, children of a TOTAL as the text mentions them. So the text
    # determines the solution except for its letters, and a learner need not guess the order.
    rank = {e: j for j, e in enumerate(sentences)}
    order = {}  # the needed entities, parents before children

    def visit(entity):
        rule = rules[entity]
        if entity % COLUMNS == TOTAL:
            rules[entity] = rule = Rule(tuple(sorted(rule.parents, key=rank.get)), False, "", 0, rule.value)
        for parent in rule.parents:
            if parent not in order:
                visit(parent)
        order[entity] = True

    visit(asked)
    solution = solution_text(rng, rules, order, name, op) + f"Answer: {rules[asked].value}."
    return dict(problem=problem, question=question, solution=solution, op=op, id=f"{seed}-{i}", template=c["template"],
                mode="normalforward", length="zero_context", d=2)


# an assignment of a solution, with its rule and value: d = 7, d = b = 7 or d = b + c = 3 + 4 = 7
ASSIGNMENT = re.compile(r"([A-Za-z]) = (?:([A-Za-z]|\w+ [-+*] [A-Za-z]) = (?:\d+ [-+*] \d+ = )?)?(\d+)(?=[;.])")


def with_wrong_step(row, max_value=MAX_VALUE):
    """The row with one mistake in its solution: one value, of a random assignment, is 1 to 3 too small or too large. What follows
    is computed from it as it should be, so the answer is mostly wrong, too. A pure function of the row. No value becomes negative
    or larger than max_value, or as large as before if that was more."""
    rng, steps = random.Random(f"wrong step of {row['id']}"), row["solution"].partition("Answer:")[0]
    right = [int(value) for _, _, value in ASSIGNMENT.findall(steps)]
    largest = max(max_value, *right)
    while True:
        wrong, error = int(rng.random() * len(right)), (-3, -2, -1, 1, 2, 3)[int(rng.random() * 6)]
        values = {}  # letter -> value so far

        def assign(match):
            letter, rule, literal = match.groups()
            operands = [str(values.get(word, word)) for word in rule.split()] if rule else [literal]
            a, sign, b = operands if len(operands) == 3 else (operands[0], "+", 0)
            value = int(a) * int(b) if sign == "*" else int(a) + int(b) * (-1 if sign == "-" else 1)
            values[letter] = value = value + error * (len(values) == wrong)
            numbers = f"{' '.join(operands)} = " * (len(operands) == 3)
            return f"{letter} = " + (f"{rule} = " if rule else "") + f"{numbers}{value}"

        solution = ASSIGNMENT.sub(assign, steps)
        if min(values.values()) >= 0 and max(values.values()) <= largest:
            return row | dict(solution=f"{solution}Answer: {[*values.values()][-1]}.")


def steps_of(row):
    """The steps of a solution, parents first: [(name, letter, letters of the parents, work)]."""
    steps, letters = [], set()
    for name, letter, work in re.findall(r"Define (.+?) as (\w); (.+?)\. ", " ".join(row["solution"].split())):
        used = dict.fromkeys(re.findall(r"\b[A-Za-z]\b", work))
        steps.append((name, letter, [u for u in used if u in letters], work))
        letters.add(letter)
    return steps


# ----------------------------------------------------------------------------------------------------------------------
# tokens

END = "<|endoftext|>"
TAGS = ["<question>", "</question>", "<solution>", "</solution>", "<answer>", "</answer>"]


@functools.cache
def tokenizer():
    """The `tiktoken.Encoding`. Its vocabulary is closed and built here: nothing to train, ship or download.

    The tokens are the 256 bytes and the phrases that problems are made of. The pattern splits off each phrase as a whole,
    and tiktoken looks up a whole piece before it merges bytes. All other text falls back to bytes, so any text round-trips.
    The name of a quantity, "adult fox in Maple Creek", is one token. Otherwise a model must first learn to tie kind and
    place together, which takes most of a short run. Digits are single tokens. The first digit of a number includes the
    space before it. Tags are special tokens, and no phrase includes the space beside a tag. So the ids of a prompt are a
    prefix of the ids of the prompt with its continuation.
    """
    phrases = [before + the for the in (" the number of", " the")
               for before in ("", " the sum of", " the difference between", ",", " and", ", and")]
    phrases += [start + phrase for start in (" ", ". ") for phrase in
                ("The number of", "What is the", "How many", "Define", "Answer:")]
    phrases += [" equals", " plus", " times", " as", "; so", " so"]
    phrases += [f" {sign}" for sign in ["=", "+", "-", "*", *"0123456789", *LETTERS]]
    for c in CONTEXTS.values():
        phrases += [f" {kind}" for kind in c["kinds"]] + [f" does {place} have?" for place in c["places"]]
        phrases += [f" {name} in {place}" for name in [*c["kinds"], c["total"]] for place in c["places"]]
    pattern = "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))  # the longest phrase wins
    tokens = [bytes([b]) for b in range(256)] + [p.encode() for p in phrases]
    n = len(tokens)
    return tiktoken.Encoding("nano-interplay", pat_str=pattern + r"|[\s\S]",
                             mergeable_ranks={t: i for i, t in enumerate(tokens)},
                             special_tokens={t: n + i for i, t in enumerate(TAGS + [END])})


def hf_tokenizer():
    """`tokenizer` as the contents of a tokenizer.json of Hugging Face: the same ids for any text.

    A byte-level BPE without merges: the pattern splits off phrases and single characters, a phrase is looked up whole
    (`ignore_merges`), and a character that is no token falls back to its bytes. Bytes are written as in GPT-2.
    """
    enc = tokenizer()
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    letter = dict(zip(printable, map(chr, printable))) | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = {i: enc.decode_single_token_bytes(i) for i in range(enc.n_vocab)}
    special = {i: token.decode() for i, token in tokens.items() if token.decode(errors="replace") in (*TAGS, END)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | dict(special=True)
    byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None, decoder=byte_level,
        added_tokens=[dict(id=i, content=token, **flags) for i, token in special.items()],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=enc._pat_str), behavior="Isolated", invert=False), byte_level]),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                   fuse_unk=False, byte_fallback=False, ignore_merges=True, merges=[],
                   vocab={"".join(letter[b] for b in token): i for i, token in tokens.items() if i not in special}))


def hf_tokenizer_config():
    """The contents of the tokenizer_config.json beside it.

    AutoTokenizer of transformers 5 gives every qwen2 its Qwen2Tokenizer, which splits text by another pattern, unless there is an
    auto_map. This one names no code of ours and is not followed (that needs trust_remote_code): tokenizer.json is read.
    """
    return dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=END, pad_token=END, additional_special_tokens=TAGS,
                clean_up_tokenization_spaces=False, model_max_length=2048,
                auto_map={"AutoTokenizer": [None, "transformers.PreTrainedTokenizerFast"]})


def name_parts(enc):
    """{id of a name: ids of its parts}. The parts of "KIND in PLACE" are KIND and PLACE, that of "TOTAL in PLACE" is PLACE.

    A name is one token, so its id alone does not show what it has in common with other names. The parts are tokens of the
    question "How many KIND does PLACE have?".
    """
    parts = {}
    for c in CONTEXTS.values():
        for place in c["places"]:
            where = enc.encode_single_token(f" does {place} have?")
            for kind in c["kinds"]:
                parts[enc.encode_single_token(f" {kind} in {place}")] = [enc.encode_single_token(f" {kind}"), where]
            parts[enc.encode_single_token(f" {c['total']} in {place}")] = [where]
    return parts


_enc = tokenizer()
VOCAB_SIZE = -(-_enc.n_vocab // 64) * 64  # 637, rounded up to 640: matrix kernels are fastest with multiples of 64
# a fingerprint of the vocabulary: a checkpoint trained with another one is of no use
VOCABULARY = hashlib.blake2b(b"\n".join(map(_enc.decode_single_token_bytes, range(_enc.n_vocab))), digest_size=4).hexdigest()


def prompt_text(row):
    """The input of the model, up to and including the tag that opens the solution."""
    return f"<question> {row['problem'].strip()} {row['question'].strip()} </question> <solution>"


def response_text(row):
    """The output that the model should write after the prompt, including end-of-text."""
    solution, _, answer = row["solution"].partition("Answer:")
    return f" {' '.join(solution.split())} </solution> <answer> {answer.strip().rstrip('.')} </answer>{END}"


def encode(enc, text):
    return enc.encode(text, allowed_special="all")


def decode(enc, ids):
    """The text of sampled ids. An id between the vocabulary and VOCAB_SIZE has no text and becomes a zero byte."""
    return enc.decode([i if i < enc.n_vocab else 0 for i in ids], errors="replace")


def encode_row(enc, row):
    """-> (ids, n_prompt): the whole training text as ids, and the number of them that belong to the prompt."""
    ids = encode(enc, prompt_text(row) + response_text(row))
    return ids, ids.index(enc.encode_single_token("<solution>")) + 1


def mean_tokens(mixture, seed, world, n=2000):
    """Tokens of a problem that are read in training, in the mean."""
    enc = tokenizer()
    return np.mean([len(encode_row(enc, make_row(i, mixture, seed, world=world))[0]) - 1 for i in range(n)])


# ----------------------------------------------------------------------------------------------------------------------
# batches

IGNORE = -100  # the target at positions without loss, the default of torch's cross_entropy


class TrainingSteps:
    """steps[s] -> the micro-batches of optimizer step s. So a run can resume at s, and any worker can make any step.

    Step s trains on problems s * batch_size ... (s + 1) * batch_size - 1. Rank r of n_ranks takes every n_ranks-th of
    them. Problems are laid end to end in one row, and attention keeps them apart: in blocks of about equal length
    (`in_blocks`), in micro-batches of about `micro_tokens` tokens whose number, unless problems are few, is a multiple of
    `at_a_time`, so that as many cores have work; or with packed=True, for torch.compile, without padding and in few shapes (`pack`).

    A micro-batch is (x, y, ...), int64 arrays (1, tokens). y[0, t] is the token after x[0, t], or IGNORE where there is no
    loss: on padding and, with loss="solution", on the prompt. late = (step, mixture, world) are another mixture and world
    from that step on. A share wrong_steps of the solutions, drawn problem by problem, has a mistake (`with_wrong_step`).
    Works as a map-style data set of torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, end)).
    """

    def __init__(self, mixture, batch_size, seed=0, split="train", loss="all", world=World(), micro_tokens=8192,
                 rank=0, n_ranks=1, packed=False, at_a_time=1, late=None, wrong_steps=0.0):
        self.early, (self.late_from, *self.late) = (mixture, world), late or (math.inf,)
        self.batch_size, self.seed, self.split, self.loss, self.micro_tokens = batch_size, seed, split, loss, micro_tokens
        self.rank, self.n_ranks, self.packed, self.at_a_time, self.enc = rank, n_ranks, packed, at_a_time, tokenizer()
        self.wrong_steps = wrong_steps

    def row(self, i, mixture, world):
        row = make_row(i, mixture, self.seed, self.split, world)
        mistaken = self.wrong_steps and random.Random(row["id"]).random() < self.wrong_steps
        return with_wrong_step(row, world.max_value) if mistaken else row

    def __getitem__(self, step):
        first = step * self.batch_size
        mixture, world = self.early if step < self.late_from else self.late
        rows = [encode_row(self.enc, self.row(i, mixture, world))
                for i in range(first + self.rank, first + self.batch_size, self.n_ranks)]
        return [arrays for _, arrays in micro_batches(rows, self.micro_tokens, self.loss, self.packed, self.at_a_time)]


def micro_batches(rows, micro_tokens, loss="all", packed=False, at_a_time=1):
    """Rows (ids, n_prompt, ...) -> [(list of rows, what `in_blocks` or `pack` makes of them)]. See `TrainingSteps`."""
    if packed:
        return [(batch, pack(batch, size, loss)) for batch, size in cut_to_pack(rows, micro_tokens)]
    return [(batch, in_blocks(batch, loss)) for batch in cut(rows, micro_tokens, at_a_time)]


def block_length(row):
    return -(-(len(row[0]) - 1) // 16) * 16  # few lengths, so that several rows share one


def cut(rows, micro_tokens, at_a_time=1):
    """Sort rows (ids, n_prompt, ...) by length, and cut them into lists of about equal size: fewer than `micro_tokens` tokens
    and those of one row more. Unless rows are few or very unequal, their number is a multiple of at_a_time."""
    rows = sorted(rows, key=lambda row: len(row[0]))
    total = sum(map(block_length, rows))
    parts = -(-total // (micro_tokens * at_a_time)) * at_a_time
    batches, end = {}, 0
    for row in rows:
        end += block_length(row)
        batches.setdefault((end - 1) * parts // total, []).append(row)
    return list(batches.values())


def lay_out(rows, starts, size, loss):
    """[(ids, n_prompt, ...)], each from its start on in one row of `size` tokens -> (x, y) as in `TrainingSteps`."""
    x, y = np.zeros((1, size), np.int64), np.full((1, size), IGNORE, np.int64)
    for (ids, n_prompt, *_), start in zip(rows, starts):
        first, end = n_prompt if loss == "solution" else 1, start + len(ids) - 1
        x[0, start:end] = ids[:-1]
        y[0, start + first - 1:end] = ids[first:]
    return x, y


def in_blocks(rows, loss="all"):
    """[(ids, n_prompt, ...)], sorted by length -> (x, y, blocks), with x and y as in `TrainingSteps`.

    blocks: [(n, T), ...], the next n sequences take T tokens each, padding included. Attention then needs no mask. What is left
    of the row is a sequence, too: libraries prepare and keep a kernel for each new size, so sizes are multiples of 64.
    """
    lengths = [block_length(row) for row in rows]
    end, size = sum(lengths), -(-sum(lengths) // 64) * 64
    blocks = [(len([*equal]), T) for T, equal in itertools.groupby(lengths)]
    x, y = lay_out(rows, itertools.accumulate(lengths, initial=0), size, loss)
    return x, y, blocks + [(1, size - end)] * (size > end)


def pack_sizes(micro_tokens):
    """The sizes that `cut_to_pack` uses. A row that is longer than all of them gets a larger size."""
    return [max(1, micro_tokens >> i) for i in range(4)]


def cut_to_pack(rows, micro_tokens):
    """Cut rows, in the given order, into [(list of rows, size)] for `pack`.

    The size is micro_tokens. If the last rows would fill less than three quarters of it, it is a half, a quarter or an
    eighth of that.
    """
    lengths = [len(row[0]) - 1 for row in rows]
    batches, start, sizes = [], 0, pack_sizes(micro_tokens)
    while start < len(rows):
        tokens_left = sum(lengths[start:])
        size = next((size for size in sizes if tokens_left > 0.75 * size), sizes[-1])
        while size < lengths[start]:
            size *= 2
        end = start + 1
        while end < len(rows) and end - start < most_rows(size) and sum(lengths[start:end + 1]) <= size:
            end += 1
        batches.append((rows[start:end], size))
        start = end
    return batches


def most_rows(size):
    """The largest number of rows in one `pack`. It fixes the length of cu_seqlens, and each entry costs a little time."""
    return max(1, size // 48)


def pack(rows, size, loss="all"):
    """[(ids, n_prompt, ...)], laid end to end -> (x, y, cu_seqlens, max_seqlen) for attention kernels with variable lengths.

    x, y: (1, size), as in `TrainingSteps`. cu_seqlens: int32, the start of each sequence, then `size` up to a fixed length.
    max_seqlen: an int, no sequence is longer. The rest of the row is cut into sequences, too, so that each token has one.
    """
    lengths = [len(row[0]) - 1 for row in rows]
    ends = [*itertools.accumulate(lengths, initial=0)]
    x, y = lay_out(rows, ends, size, loss)
    max_seqlen = 512  # takes few values, because torch.compile makes a program for each
    while max_seqlen < max(lengths, default=0):
        max_seqlen *= 2
    ends += range(ends[-1] + max_seqlen, size, max_seqlen)
    cu_seqlens = np.full(most_rows(size) + size // 512 + 2, size, np.int32)
    cu_seqlens[:len(ends)] = ends
    return x, y, cu_seqlens, max_seqlen


# ----------------------------------------------------------------------------------------------------------------------
# the command line

STYLES = {"": "", "bold": "1", "dim": "2", "red": "31", "green": "32"}


def styled(text, style):
    """Text in a style of STYLES if stdout is a terminal, unless NO_COLOR is set (no-color.org)."""
    plain = not (style and sys.stdout and sys.stdout.isatty()) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[{STYLES[style]}m{text}\033[0m"


def show(row, solution=True):
    """A problem for human readers: the text, the graph as a tree, the steps.

    In a terminal the sentences that the question does not need are dim.
    """
    steps = steps_of(row)
    name_of = {letter: name for name, letter, _, _ in steps}
    parents = {name: [name_of[u] for u in used] for name, _, used, _ in steps}
    value = {name: work.split()[-1] for name, _, _, work in steps}
    graph, seen = [], set()

    def tree(name, first, rest):
        known = name in seen
        seen.add(name)
        graph.append(f"{first}{name} = {value[name]}" + (" (see above)" if known and parents[name] else ""))
        for j, parent in enumerate([] if known else parents[name]):
            last = j == len(parents[name]) - 1
            tree(parent, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))

    tree(steps[-1][0], "", "")
    text = [styled(s + ".", "" if s.removeprefix("The number of ").split(" equals ")[0] in parents else "dim")
            for s in row["problem"].strip().rstrip(".").split(". ")]
    return "\n".join([f"problem {row.get('id', '')}: op {row['op']}, {len(steps)} steps, {row['template']}", "", *text, "",
                      styled(row["question"], "bold"), "", *graph, "",
                      *(row["solution"].replace(". ", ".\n").splitlines() + [""] if solution else [])])


def write_rows(rows, n, path):
    from tqdm import tqdm
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"--out {path} is not a file")
    part = f"{os.path.realpath(path)}.{os.getpid()}.part"  # renamed at the end, so the file is always complete
    try:
        with open(part, "w", encoding="utf-8") as f:
            bar = tqdm(rows, total=n, unit=" problems", disable=None)
            began = said = time.perf_counter()
            for done, row in enumerate(bar, 1):
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
                if bar.disable and time.perf_counter() - said > 30:  # where there is no terminal, a line every half minute
                    said = time.perf_counter()
                    left = (said - began) * (n - done) / done
                    print(f"{100 * done / n:3.0f} %, about {left / 60:.1f} minutes left", file=sys.stderr, flush=True)
        os.replace(part, os.path.realpath(path))
    finally:
        if os.path.exists(part):
            os.remove(part)


def main():
    what, _, more = (__doc__ or "").partition("\n\n")  # python -OO drops it
    p = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter,
                                description=what.strip() + "\n\n" + more[more.find("    python"):])
    p.add_argument("--ops", help="range of op, all contexts with equal weight: 2-10 or 5 (default 2-10)")
    p.add_argument("--mix", help='mixture [CONTEXT:]OPS[:WEIGHT],... e.g. "zoo:2-20:0.99,school:2:0.01"')
    p.add_argument("--n", type=int, default=1, help="number of problems (default 1)")
    p.add_argument("--seed", type=int, default=0, help="problem i is a pure function of (seed, i) (default 0)")
    p.add_argument("--split", choices=["train", "eval"], default="train", help="no reasoning chain is in both (default train)")
    p.add_argument("--distractors", type=float, default=2.0, help="mean number of unneeded sentences, 0 to 10 (default 2)")
    p.add_argument("--max-parents", type=int, default=4, help="quantities that one is computed from, at most; 2 to 4 (default 4)")
    p.add_argument("--max-value", type=int, default=MAX_VALUE, help=f"largest value, {MIN_MAX_VALUE} to {MAX_VALUE} (default)")
    p.add_argument("--out", help="JSONL file to write; without it, print the problems")
    args = p.parse_args()
    try:
        if args.n < 1 or args.seed < 0:
            raise ValueError(f"--n must be at least 1 and --seed at least 0, got {args.n} and {args.seed}")
        mixture = mixture_of(args.ops, args.mix, "2-10")
        world = World(args.distractors, args.max_parents, args.max_value)
        rows = (make_row(i, mixture, args.seed, args.split, world) for i in range(args.n))
        if args.out is not None:
            write_rows(rows, args.n, args.out)
    except (ValueError, OSError) as error:
        p.error(str(error))
    if args.out is None:
        for row in rows:
            print(show(row))


if __name__ == "__main__":
    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # closed: 2>&-
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # what its encoding lacks, as the lines of a tree, becomes "?"
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # ... | head, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(None if isinstance(error, BrokenPipeError) else str(error))
