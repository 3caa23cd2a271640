"""
Parses a written solution back into a graph and judges it: outcome, whether the answer is right; process, the share of needed
quantities with the right inputs and value; verified, both in full; strict, whether the text really proves it.

A solution defines nodes in steps, then states an answer in one of two forms:

    Define owl in South Zoo as a; so a = 4. Define fox in South Zoo as e; t = a = 4; so e = 3 + t = 3 + 4 = 7.
    Answer: 7.                              as the data set writes it
    </solution> <answer> 7 </answer>        as the model does

`parse` turns such a text into steps with parents, values and rules. `verify` compares a response with the gold solution
of its problem. Both accept any response at all, take linear time, and never raise because of one.

    python verify.py rows.jsonl                                     every row's own solution, which should be right
    python verify.py rows.jsonl --responses r.jsonl --out v.jsonl   score responses

    rows.jsonl   one JSON object a line with the gold "solution", as data.py writes them
    r.jsonl      {"row": 0, "response": "Define ... . </solution> <answer> 7 </answer>"}, row counted from 0
    v.jsonl      {"row", "outcome", "process", "verified", "strict", "errors"}, one line per response, in order

A response in a file may begin with the prompt of its row, "<question> problem question </question> <solution>".
On stdout goes one JSON object: how many responses were scored, how many of them are right by outcome, verified and
strict, the mean of process, and in how many responses each kind of error occurs:

    {"rows": 1000, "responses": 1000, "left_out": 0, "outcome": 1000, "process": 1.0, "verified": 1000, "strict": 1000, "errors": {}}

Left out are responses to problems of other modes than "normalforward" of the public data, which ask for an unknown in an equation:
their verdicts in v.jsonl are null.
"""
import argparse
import collections
import functools
import json
import os
import re
import string
import sys
from typing import NamedTuple, Optional

import numpy as np

# -----------------------------------------------------------------------------
# names of errors: every string in a verdict's `errors` is one of these, then ": " and a detail

MISSING, EXTRA = "missing node", "extra node"
PARENTS, VALUE, RULE = "wrong parents", "wrong value", "wrong operator or literal"
ARITHMETIC = "false arithmetic"        # an equality that does not hold
UNDEFINED = "undefined letter"         # not defined so far, or another step's intermediate
REDEFINED = "redefinition"             # a letter or a node defined a second time
UNUSED = "unused letter"               # an intermediate that nothing in its step uses
WRONG_ANSWER, NO_ANSWER, SEVERAL = "wrong answer", "no answer", "several answers"
UNPARSABLE, STRAY = "unparsable step", "stray text"

# One mistake gets one name: a difference from the gold step is not named where an error of the step itself causes it.
CAUSES = {error: {UNPARSABLE, UNDEFINED, UNUSED, RULE} for error in (PARENTS, RULE)} | {VALUE: {UNPARSABLE, ARITHMETIC}}

REWARDS = ("outcome", "process", "mixed", "verified", "strict")
FORWARD, NOT_FORWARD = "normalforward", "not a forward problem"  # modes of rows; there is no verdict on others than the first

# -----------------------------------------------------------------------------
# text -> graph

LETTERS = frozenset(string.ascii_letters)
LETTER = re.compile(r"\b[A-Za-z]\b")
# An integer has one spelling: no leading zeros, no -0. [0-9] because \d also matches the digits of other scripts. At most
# 18 digits, because the data needs 4, and int() is slow for very long numbers and then refuses them.
INT = "(?:0|-?[1-9][0-9]{0,17})"
LARGEST = 10 ** 18
OPERAND = f"(?:[A-Za-z]|{INT})"
EXPR = f"{OPERAND}(?: [-+*] {OPERAND})*"
ASSIGN = re.compile(f"(so )?([A-Za-z]) = ((?:{EXPR} = )*)({INT})")
# as the data set writes it: x = 5, x = a = 5 or x = a + b = 2 + 3 = 5, where a can also be a literal
PLAIN = re.compile(rf"(so )?([A-Za-z]) = "
                   rf"(?:([A-Za-z]) = |({OPERAND}) ([-+*]) ([A-Za-z]) = ({INT}) \5 ({INT}) = )?({INT})")

ENDS = ("Answer:", "</solution>", "<answer>")        # the first of these ends the steps
ENDING = re.compile(rf"(?:Answer: ?({INT}) ?\.(?: ?</solution>)?|</solution> ?<answer> ?({INT}) ?</answer>)"
                    r"(?: ?<\|endoftext\|>)*")
ANSWER = re.compile(rf"Answer:(?: ?({INT}) ?\.(?=[ <]|$))?|<answer>(?: ?({INT}) ?</answer>)?")

MAX_PARENTS, MAX_NAME = 16, 200        # a step beyond either limit is wrong anyway: they bound the time per step
UNCLEAR = "?"                          # the number of a letter that is unreadable or means two things: see `_assign`
UNKNOWN = frozenset([None])            # parents of an undefined letter, or too many: no node is named None
NOTHING = (None, None, UNKNOWN)        # what an undefined letter means
NO_RULE = ()                           # the rule of a value computed as in no problem


class Step(NamedTuple):
    """One "Define NAME as LETTER; ... so LETTER = ... ." and what is wrong with it by itself."""
    name: Optional[str]                 # None if it does not begin with "NAME as LETTER;"
    text: str
    letter: str = ""
    parents: frozenset = UNKNOWN        # names of the nodes whose letters it uses, directly or through intermediates
    value: Optional[int] = None         # the last integer written for its letter
    rule: Optional[tuple] = None        # how the value comes from the parents, see `_combine`; None if that is unknown
    errors: tuple = ()


class Trace(NamedTuple):
    """A parsed solution."""
    steps: list
    nodes: dict             # name -> its steps, in order; more than one if it is defined again
    answers: list           # one per stated answer, None for what is not an integer
    errors: list            # what is wrong outside the steps

    @property
    def answer(self):
        """The stated answer, None if there is none or several differ."""
        return self.answers[0] if len(set(self.answers)) == 1 else None


def parse(text):
    """Parse a solution, any text at all, into a Trace. Linear in len(text), never raises.

    Takes both forms of a solution, without its prompt: text before the first step is an error. Any white space counts
    as one space. The steps end where the first answer begins: nothing written later counts for them.
    """
    text = " ".join(text.split())
    end = min([i for i in map(text.find, ENDS) if i >= 0], default=len(text))
    before, *chunks = text[:end].split("Define ")
    answers, errors = _answers(text[end:])
    if before.strip():
        errors.append(f"{STRAY}: {_short(before)}")
    steps, nodes, env = [], {}, {}
    for chunk in chunks:
        step = _step(chunk.strip(), nodes, env)
        steps.append(step)
        if step.name is not None:
            nodes.setdefault(step.name, []).append(step)
    return Trace(steps, nodes, answers, errors)


def _answers(ending):
    """Parse what follows the steps -> (answers, errors)."""
    well_formed = ENDING.fullmatch(ending)
    if well_formed:
        return [int(well_formed[well_formed.lastindex])], []
    answers = [int(m[m.lastindex]) if m.lastindex else None for m in ANSWER.finditer(ending)]
    error = SEVERAL if len(answers) > 1 else NO_ANSWER if answers in ([], [None]) else STRAY
    return answers, [f"{error}: {_short(ending) or 'the text ends before it'}"]


def _step(text, nodes, env):
    """Parse the text after one "Define " -> Step.

    nodes holds the nodes defined so far, and env what each letter means so far: (number as written, rule, parents). The
    step adds its own letter to env. An intermediate counts only inside its step: afterwards its letter has no number, or
    means again what it meant before.
    """
    header, _, body = text.partition(";")
    name, _, letter = header.rpartition(" as ")
    if not 0 < len(name) <= MAX_NAME or letter not in LETTERS:
        return Step(None, text, errors=(f"{UNPARSABLE}: {_short(text)}",))
    errors = []
    if name in nodes:
        errors.append(f"{REDEFINED}: {name}")
    if letter in env:
        errors.append(f"{REDEFINED}: {name}, letter {letter}")
    if not body.endswith("."):
        errors.append(f"{UNPARSABLE}: {name}, no full stop at its end")
    itself, earlier = (None, None, ("+" + name,)), env.get(letter, NOTHING)
    # outside: letter of an intermediate -> what it means outside the step
    number, rule, parents, used, outside = UNCLEAR, None, set(), set(), {}
    assigns = body.removesuffix(".").split(";")
    for i, assign in enumerate(assigns, 1):
        assign, last = assign.strip(), i == len(assigns)
        so, x, n, letters, x_parents, x_rule, error = _plain(assign, env) or _assign(assign, env)
        parents |= x_parents
        used.update(letters)
        if (so is None) == last or last and x != letter:  # "so LETTER = ..." comes last, and nothing else has a "so"
            x_rule, error = None, UNPARSABLE
        if error:
            errors.append(f"{error}: {name}, {_short(assign)}")
        if x == letter:
            number, rule = n, x_rule
        if x in LETTERS and not (last and x == letter):  # an intermediate
            meaning = env.get(x)
            if error != UNPARSABLE and (meaning or x == letter):
                errors.append(f"{REDEFINED}: {name}, letter {x}")
            outside.setdefault(x, meaning)
            n = n if not meaning or meaning[0] is None else UNCLEAR
            env[x] = n, x_rule, x_parents if len(x_parents) <= MAX_PARENTS else UNKNOWN
    for x, meaning in outside.items():
        if not meaning and x != letter and x not in used and not any(e.startswith((UNPARSABLE, UNDEFINED)) for e in errors):
            errors.append(f"{UNUSED}: {name}, letter {x}")
        env[x] = meaning or (None, None, env[x][2])
    value = None if number == UNCLEAR else int(number)
    env[letter] = number if earlier[0] is None or earlier[1] == itself else UNCLEAR, itself, frozenset([name])
    return Step(name, text, letter, frozenset(parents), value, rule, tuple(errors))


def _plain(assign, env):
    """`_assign` in a third of the time for what is PLAIN and has no error, as nearly all is; None for the rest."""
    m = PLAIN.fullmatch(assign)
    if not m:
        return None
    so, x, copied, a, op, b, number_a, number_b, n = m.groups()
    if copied:
        number, rule, parents = env.get(copied, NOTHING)
        return (so, x, n, copied, parents, rule, None) if number == n else None
    if not op:                                           # a leaf
        return so, x, n, "", frozenset(), (None, int(n), ()), None
    known_a, rule_a, parents_a = env.get(a, NOTHING) if a in LETTERS else (a, (None, int(a), ()), frozenset())
    known_b, rule_b, parents_b = env.get(b, NOTHING)
    p, q = int(number_a), int(number_b)
    value = p + q if op == "+" else p - q if op == "-" else p * q
    if number_a != known_a or number_b != known_b or value != int(n):
        return None
    return so, x, n, (a, b), parents_a | parents_b, _combine(rule_a, op, rule_b), None


def _assign(assign, env):
    """Parse any assignment -> ("so " or None, letter, number, letters used, their parents, rule or None, error or None).

    An equation that uses an UNCLEAR letter is not judged: the error is named where the letter became unclear.
    """
    m = ASSIGN.fullmatch(assign)
    if m:
        so, x, sides, n = m.groups()
        letters = LETTERS.intersection(sides.split(" "))
    else:                                                # what can be made of it
        so, (x, *sides) = None, assign.removeprefix("so ").split(" = ")
        n = sides[-1] if sides and re.fullmatch(INT, sides[-1]) else UNCLEAR
        letters = set(LETTER.findall(assign, assign.find("=") + 1))
    numbers, _, parents = zip(*[env.get(y, NOTHING) for y in letters]) if letters else ((), (), ())
    rule, error = None, UNPARSABLE if not m else UNDEFINED if None in numbers else None
    if not error and UNCLEAR not in numbers:
        rule, error = _check(sides, n, env)
    return so, x, n, letters, frozenset().union(*parents), rule, error


def _check(sides, n, env):
    """Check an equation, its sides "e1 = e2 = ... = " and the number n at its end -> (rule, name of the first error or None).

    Every side must come to n. The side with the most letters gives the rule. Any other side must be n itself, or follow
    the same rule in letters (3 + t = 3 + L where t = L), or be such a side with numbers put for letters (3 + t = 3 + 5).
    So it may not be another expression that happens to have the same value: not 3 + t = 4 + 4, and not a + b = a + a.
    The terms of a sum and the factors of a product may change places.
    """
    values, rules, terms, letters = zip(*[_side(side.split(" "), env) for side in sides.removesuffix(" = ").split(" = ")])
    if any(value != int(n) for value in values):
        return next((r for r, l in zip(rules, letters) if l), rules[0]), ARITHMETIC
    rule, _ = max(zip(rules, letters), key=lambda side: len(side[1]))
    in_letters = {t: collections.Counter(l) for r, t, l in zip(rules, terms, letters) if r == rule}
    for r, t, l in zip(rules, terms, letters):
        is_result = t == ("+" + n,) and not l
        in_numbers = t in in_letters and not collections.Counter(l) - in_letters[t]
        if not (r == rule or is_result or in_numbers):
            return rule, RULE
    return rule, None


def _side(words, env):
    """Evaluate operands with operators between -> (value, None if it is too large, rule, terms, letters).

    terms are the numbers, each after its operator, sorted: both 5 - t and 5 - 2 have ("+5", "-2") if t = 2. letters are
    the pairs of operator and rule of those operands that are letters.
    """
    op, total, term = ("*", 0, 1) if "*" in words else ("+", 0, 0)
    rule, terms, letters = None, [], []
    for op, word in zip([op, *words[1::2]], words[::2]):
        number, its_rule, _ = env[word] if word in LETTERS else (word, (None, int(word), ()), None)
        rule = _combine(rule, op, its_rule) if terms else its_rule
        terms.append(op + number)
        if word in LETTERS:
            letters.append((op, its_rule))
        if op == "*":
            term *= int(number)
            if abs(term) > LARGEST:                      # before squares of squares get out of hand
                return None, NO_RULE, (), ()
        else:
            total, term = total + term, int(number) if op == "+" else -int(number)
    if "*" in words and len(words) > 3:                  # a problem multiplies by one literal, last
        rule = NO_RULE
    return total + term, rule, tuple(sorted(terms)), letters


def _combine(a, op, b):
    """Two rules and an operator -> a rule, (factor, literal, terms) or NO_RULE.

    A rule stands for factor * (literal + sum of terms), where factor and literal are None if there is none, and terms
    is a sorted tuple of "+name" and "-name". So letters, order and intermediates do not change the rule of a sum, while
    literals and repeated parents do, and nothing cancels. NO_RULE is for what no problem asks: two literals, a literal
    subtracted, a product of letters, a product inside a sum. The result is None if a or b is.
    """
    if not a or not b or a[0] is not None or b[0] is not None or a[1] is not None and b[1] is not None:
        return None if a is None or b is None else NO_RULE
    (_, m, terms), (_, n, terms_b) = a, b
    if op == "*":
        return NO_RULE if terms and terms_b else (n if terms else m, None, terms or terms_b)
    if op == "-" and n is not None or len(terms) + len(terms_b) > MAX_PARENTS:
        return NO_RULE
    if op == "-":
        terms_b = tuple([("-" if t[0] == "+" else "+") + t[1:] for t in terms_b])
    return None, n if m is None else m, tuple(sorted(terms + terms_b))


def _short(text, n=80):
    """At most n characters of the text, for a message."""
    return text if len(text) <= n else text[:n - 3] + "..."


# -----------------------------------------------------------------------------
# graph against graph

@functools.lru_cache(maxsize=4096)     # GRPO scores several responses per problem
def _gold(text):
    gold = parse(text)
    if not gold.nodes:
        raise ValueError(f"this gold solution defines no node: {_short(text)!r}")
    if gold.answer is None:
        raise ValueError(f"this gold solution has no answer: {_short(text)!r}")
    return gold


def verify(gold, response):
    """Compares a response with the gold solution of its problem, both texts -> a verdict, a dict:

    outcome   bool, the stated answer is the gold answer (as integers)
    process   float 0..1, the share of gold nodes that the response defines with the right parent set and value; a node
              defined several times counts if every definition is right (arXiv 2512.07783, ProcessAcc)
    verified  bool, outcome and process == 1 (the paper's metric, which tolerates extra nodes)
    strict    bool, verified, and the text proves it: true arithmetic, letters and nodes defined once and before use,
              each value from its parents by the gold operators and literals (+ and * commute), nothing extra, and one
              answer, which is the last node's value
    errors    list of "name of the error: detail", empty exactly when strict; a step's mistake has one name, not also those
              of its consequences in that step

    Raises ValueError if the gold solution has no node or no answer, and never because of the response.
    """
    gold, trace = _gold(gold), parse(response)
    process, judged = _compare(gold, trace)
    errors = [error for _, found in judged for error in found]
    outcome = trace.answer == gold.answer
    return {"outcome": outcome, "process": process, "verified": outcome and process == 1,
            "strict": not errors, "errors": list(dict.fromkeys(errors))}


def explain(gold, response):
    """The response step by step: a list of (text, ok, why), with entries for missing nodes and for the answer too.

    ok is by the strict standard; why names the errors, "" if ok. Raises ValueError as `verify` does.
    """
    _, judged = _compare(_gold(gold), parse(response))
    return [(text, not errors, "; ".join(errors)) for text, errors in judged]


def _compare(gold, trace):
    """Two traces -> (ProcessAcc, [(text, errors)]), the pairs being each step, each missing node and the answer."""
    wrong, judged = set(), []
    for step in trace.steps:
        errors = [*step.errors]
        if step.name in gold.nodes:
            goal = gold.nodes[step.name][-1]
            same_parents = step.parents == goal.parents
            same_value = step.value is not None and step.value == goal.value
            if not (same_parents and same_value):
                wrong.add(step.name)
            if step.rule is None:                        # not comparable: an error of this or an earlier step says why
                error = None
            elif not same_parents:
                error = PARENTS
            elif step.rule != goal.rule or not step.rule:
                error = RULE if step.parents or not step.rule else VALUE     # a leaf's literal is its value
            else:
                error = None if same_value else VALUE
            if error and not any(e.partition(":")[0] in CAUSES[error] for e in errors):
                errors.append(f"{error}: {step.name}")
        elif step.name is not None:
            errors.append(f"{EXTRA}: {step.name}")
        judged.append((f"Define {step.text}", errors))
    missing = [name for name in gold.nodes if name not in trace.nodes]
    judged += [(f"Define {name}", [f"{MISSING}: {name}"]) for name in missing]
    said, errors = trace.answer, trace.errors
    if said is not None and said != gold.answer:
        errors = [*errors, f"{WRONG_ANSWER}: {said}, not {gold.answer}"]
    elif said is not None and trace.steps and trace.steps[-1].value not in (said, None):
        errors = [*errors, f"{WRONG_ANSWER}: {said} is not the value of the last step"]
    judged.append((f"Answer: {'none' if said is None else said}", errors))
    return (len(gold.nodes) - len(missing) - len(wrong)) / len(gold.nodes), judged


def reward(verdict, kind, alpha=0.2):
    """The reward, 0..1, of a verdict of `verify`; kind is outcome, process, mixed, verified or strict.

    mixed is alpha * outcome + (1 - alpha) * process, as the paper has it (arXiv 2512.07783; alpha 0.2 and 0.5). The
    authors' code departs from that formula and gives 0 whenever the answer is wrong; here right steps always earn their
    part. Raises ValueError for another kind.
    """
    if kind not in REWARDS:
        raise ValueError(f"no reward is called {kind!r}: choose from {', '.join(REWARDS)}")
    if kind == "mixed":
        return alpha * verdict["outcome"] + (1 - alpha) * verdict["process"]
    return float(verdict[kind])


def interval(values, low=0, high=1, clip=True):
    """The 95 % interval, over problems, of the mean of values in low..high, one for each problem: (..., problems) -> (2, ...).

    The normal interval after one more problem at either end (Agresti and Coull 1998 add two). So it does not shrink to a point
    where all values are equal: none solved of 100 problems still allows for 3 %. It holds at 93 to 99 % in simulations of
    problems whose pass@k is from .01 to .99 in the mean. With low=-1, the values may be differences. clip: cut the
    interval off at low and high. Its width is right only without: near an end a part of it lies beyond.
    """
    values, n = np.asarray(values, float), np.shape(values)[-1] + 2
    mean = (values.sum(-1) + low + high) / n
    variance = ((values ** 2).sum(-1) + low ** 2 + high ** 2) / n - mean ** 2
    half = 1.96 * np.sqrt(variance / n)
    ends = np.array([mean - half, mean + half])
    return ends.clip(low, high) if clip else ends


# -----------------------------------------------------------------------------
# command line

def read_jsonl(path, *fields):
    """The objects of a file, one JSON object a line, each with text in the fields. Raises OSError, ValueError."""
    objects = []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig", "surrogatepass"))
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or not all(isinstance(row.get(field), str) for field in fields):
                raise ValueError(f"{path}, line {number}: this is not a JSON object with text in "
                                 + ", ".join(f'"{field}"' for field in fields))
            objects.append(row)
    if not objects:
        raise ValueError(f"{path} has no rows")
    return objects


def without_prompt(text, row):
    """The text, without the row's own prompt if it begins with that. White space does not matter."""
    if not isinstance(row.get("problem"), str) or not isinstance(row.get("question"), str):
        return text
    prompt = f"<question> {row['problem']} {row['question']} </question> <solution>"
    return " ".join(text.split()).removeprefix(" ".join(prompt.split()))


def write_whole(path, text):
    """Writes a file or, if that fails, leaves what was there. Raises OSError."""
    tmp = f"{path}.{os.getpid()}.tmp"
    try:
        with open(tmp, "w", encoding="utf-8") as f:
            f.write(text)
        os.replace(tmp, path)
    finally:
        if os.path.exists(tmp):
            os.remove(tmp)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", help="the problems")
    parser.add_argument("--responses", metavar="r.jsonl", help="what to score (default: each row's own solution)")
    parser.add_argument("--out", metavar="v.jsonl", help="where the verdicts go (default: nowhere)")
    parser.add_argument("--strict-rows", action="store_true", help="refuse, not leave out, rows that are not forward problems")
    args = parser.parse_args(argv)
    try:
        rows = read_jsonl(args.rows, "solution")
        responses = (read_jsonl(args.responses, "response") if args.responses is not None else
                     [{"row": i, "response": row["solution"]} for i, row in enumerate(rows)])
        for i, r in enumerate(responses, 1):
            if type(r.get("row")) is not int or not 0 <= r["row"] < len(rows):
                raise ValueError(f'{args.responses}, response {i}: its "row" must be from 0 to {len(rows) - 1}')
        if args.out is not None:                         # before the work, not after it
            out, inputs = os.path.realpath(args.out), [args.rows, args.responses or args.rows]
            if not os.path.isdir(os.path.dirname(out)) or os.path.exists(out) and not os.path.isfile(out):
                raise ValueError(f"--out {args.out}: no file can be written there")
            if out in map(os.path.realpath, inputs):
                raise ValueError(f"--out {args.out} would replace an input")
        others = [row.get("mode", FORWARD) != FORWARD for row in rows]
        if any(others) and (args.strict_rows or all(others[r["row"]] for r in responses)):
            raise ValueError(f"{args.rows} has {sum(others)} rows that are not forward problems, whose mode is {FORWARD}")
        verdicts = []
        for i, response in ((r["row"], r["response"]) for r in responses):
            if others[i]:  # of another kind: it has no verdict, and a line of its own in --out all the same
                verdicts.append({"row": i, **dict.fromkeys(("outcome", "process", "verified", "strict")), "errors": [NOT_FORWARD]})
                continue
            gold, response = (without_prompt(text, rows[i]) for text in (rows[i]["solution"], response))
            try:
                verdicts.append({"row": i, **verify(gold, response)})
            except ValueError as e:
                raise ValueError(f"{args.rows}, row {i}: {e}")
        if args.out is not None:
            write_whole(out, "".join(json.dumps(v) + "\n" for v in verdicts))
    except (OSError, ValueError) as e:
        parser.error(str(e))
    left_out = [v for v in verdicts if v["strict"] is None]
    verdicts = [v for v in verdicts if v["strict"] is not None]
    kinds = collections.Counter(kind for v in verdicts for kind in dict.fromkeys(e.split(":")[0] for e in v["errors"]))
    print(json.dumps({
        "rows": len(rows), "responses": len(verdicts), "left_out": len(left_out), "outcome": sum(v["outcome"] for v in verdicts),
        "process": sum(v["process"] for v in verdicts) / len(verdicts),
        "verified": sum(v["verified"] for v in verdicts), "strict": sum(v["strict"] for v in verdicts),
        "errors": dict(kinds.most_common())}))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)      # also where stdout is closed
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:             # the reader has gone, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(None if isinstance(error, BrokenPipeError) else str(error))
