"""verify.py: what each verdict accepts and rejects, one family at a time by hand and over the public gold rows."""
import itertools
import json
import os
import pathlib
import random
import re
import string
import subprocess
import sys
import time
from collections import Counter

import pytest

import verify as V

ROOT = pathlib.Path(__file__).resolve().parent.parent
LETTERS = string.ascii_letters

# every shape of rule: leaf, copy, literal + copy, difference, literal + negative difference, literal * sum, sum of five
STEPS = {
    "owl": "Define owl as L; so L = 5. ",
    "fox": "Define fox as P; so P = 2. ",
    "wolf": "Define wolf as W; t = L = 5; so W = 3 + t = 3 + 5 = 8. ",
    "crow": "Define crow as C; so C = L - P = 5 - 2 = 3. ",
    "deer": "Define deer as D; d = P - L = 2 - 5 = -3; so D = 4 + d = 4 + -3 = 1. ",
    "hawk": "Define hawk as H; u = P + C = 2 + 3 = 5; so H = 2 * u = 2 * 5 = 10. ",
    "lion": "Define lion as J; so J = P = 2. ",
    "total": "Define total as T; a = W + C = 8 + 3 = 11; b = a + D = 11 + 1 = 12; e = b + H = 12 + 10 = 22; "
             "so T = e + J = 22 + 2 = 24. ",
}
BODY = "".join(STEPS.values())
GOLD = BODY + "Answer: 24."
MODEL = BODY + "</solution> <answer> 24 </answer>"


def edit(*pairs, text=GOLD):
    for old, new in pairs:
        assert text.count(old) == 1, f"{old!r} is there {text.count(old)} times"
        text = text.replace(old, new)
    return text


def step(name, assigns):
    """GOLD with another way to a node."""
    return edit((STEPS[name].split("; ", 1)[1], assigns + ". "))


def kinds(verdict):
    return {error.split(":")[0] for error in verdict["errors"]}


def assert_strict(response, gold=GOLD):
    assert V.verify(gold, response) == {"outcome": True, "process": 1.0, "verified": True, "strict": True, "errors": []}


# -----------------------------------------------------------------------------
# the parser

def test_parse_gives_the_graph():
    trace = V.parse(GOLD)
    assert [step.name for step in trace.steps] == list(STEPS)
    assert trace.answers == [24] and trace.answer == 24 and trace.errors == []
    got = {name: (s.letter, set(s.parents), s.value, s.errors) for name, (s,) in trace.nodes.items()}
    assert got == {
        "owl": ("L", set(), 5, ()), "fox": ("P", set(), 2, ()), "wolf": ("W", {"owl"}, 8, ()),
        "crow": ("C", {"owl", "fox"}, 3, ()), "deer": ("D", {"owl", "fox"}, 1, ()), "hawk": ("H", {"fox", "crow"}, 10, ()),
        "lion": ("J", {"fox"}, 2, ()), "total": ("T", {"wolf", "crow", "deer", "hawk", "lion"}, 24, ())}


def test_parse_of_nothing():
    assert V.parse("") == ([], {}, [], ["no answer: the text ends before it"])


def test_steps_after_the_answer_do_not_count():
    assert V.verify(GOLD, "Answer: 24. " + BODY)["process"] == 0


# -----------------------------------------------------------------------------
# strict accepts

ACCEPTED = {
    "itself": GOLD,
    "the model's form": MODEL,
    "leading space": " " + MODEL,
    "end of text": MODEL + "<|endoftext|>",
    "spaced end of text": MODEL + " <|endoftext|>",
    "padding": MODEL + "<|endoftext|>" * 3,
    "data form, then end of text": GOLD + "<|endoftext|>",
    "data form, closed": GOLD + " </solution>",
    "other letters": re.sub(r"\b[A-Za-z]\b", lambda m: m[0].swapcase(), GOLD),
    "swapped operands of +": edit(("3 + t = 3 + 5", "t + 3 = 5 + 3"), ("W + C = 8 + 3", "C + W = 3 + 8")),
    "swapped operands of *": edit(("2 * u = 2 * 5", "u * 2 = 5 * 2")),
    "swapped in one side only": edit(("W + C = 8 + 3", "C + W = 8 + 3")),
    "another order of folding": edit(("a = W + C = 8 + 3 = 11; b = a + D = 11 + 1 = 12; e = b + H = 12 + 10 = 22; so T = e + J = 22 + 2",
                                      "a = J + C = 2 + 3 = 5; b = H + D = 10 + 1 = 11; e = b + a = 11 + 5 = 16; so T = W + e = 8 + 16")),
    "literal folded in first": step("deer", "d = 4 + P = 4 + 2 = 6; so D = d - L = 6 - 5 = 1"),
    "skipped intermediate letter": step("wolf", "so W = 3 + L = 3 + 5 = 8"),
    "skipped intermediates of a sum": edit((STEPS["total"], "Define total as T; so T = W + C + D + H + J = 8 + 3 + 1 + 10 + 2 = 24. ")),
    "skipped intermediate of a difference": step("deer", "so D = 4 + P - L = 4 + 2 - 5 = 1"),
    "one intermediate more": step("lion", "j = P = 2; so J = j = 2"),
    "skipped substitution": re.sub(r" = -?\d+ [-+*] -?\d+ = ", " = ", GOLD),
    "half a substitution": edit(("= 8 + 3 =", "= 8 + C =")),
    "result twice": edit(("= 8 + 3 = 11", "= 8 + 3 = 11 = 11")),
    "result of a copy twice": step("lion", "so J = P = 2 = 2"),
    "result of a leaf twice": step("owl", "so L = 5 = 5"),
    "result first": step("crow", "so C = 3 = L - P = 5 - 2 = 3"),
    "result between": step("crow", "so C = L - P = 3 = 5 - 2 = 3"),
    "result before a copied letter": step("lion", "so J = 2 = P = 2"),
    "numbers before letters": step("crow", "so C = 5 - 2 = L - P = 3"),
    "numbers before letters, product": step("hawk", "u = P + C = 2 + 3 = 5; so H = 2 * 5 = u * 2 = 10"),
    "half a substitution before the letters": edit(("W + C = 8 + 3 =", "W + 3 = W + C =")),
    "a side twice": edit(("W + C = 8 + 3 =", "W + C = C + W = 8 + 3 = 3 + 8 =")),
    "letter of a letter": edit(("3 + t = 3 + 5", "3 + t = 3 + L = 3 + 5")),
    "letter of a letter, the other way": edit(("3 + t = 3 + 5", "3 + L = t + 3 = 3 + 5")),
    "letter of a letter of a letter": step("wolf", "t = L = 5; i = t = 5; so W = 3 + i = 3 + t = 3 + L = 3 + 5 = 8"),
    "letter of a sum": edit(("so D = 4 + d = 4 + -3 =", "so D = 4 + d = 4 + P - L = 4 + 2 - 5 = 4 + -3 =")),
    "another letter between": step("lion", "z = P = 2; so J = P = z = 2"),
    "newlines between steps": GOLD.replace(". ", ".\n\n"),
    "newlines everywhere": GOLD.replace(" ", "\n"),
    "white space": "\t " + GOLD.replace("; ", ";  \r\n") + " \n",
    "topological order": "".join(STEPS[n] for n in ("fox", "lion", "owl", "deer", "crow", "hawk", "wolf", "total")) + "Answer: 24.",
}


@pytest.mark.parametrize("response", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_strict_accepts(response):
    assert_strict(response)


def test_gold_is_accepted_in_every_form_too():
    forms = [GOLD, MODEL, " " + MODEL + "<|endoftext|>"]
    for gold, response in itertools.product([*forms, "<question> q </question> <solution> " + MODEL], forms):
        assert_strict(response, gold)


# -----------------------------------------------------------------------------
# strict rejects: response, its kinds of error (one for one mistake), outcome, wrong nodes of the eight

LAST = "so T = e + J = 22 + 2 = 24. "
REJECTED = {
    # wrong reasoning
    "false substitution": (edit(("W + C = 8 + 3 =", "W + C = 40 + 50 =")), {V.ARITHMETIC}, True, 0),
    "false last equality": (step("lion", "so J = P = 3"), {V.ARITHMETIC}, True, 1),
    "false copy": (step("wolf", "t = L = 99; so W = 3 + t = 3 + 99 = 8"), {V.ARITHMETIC}, True, 0),
    "changed literal": (edit(("so W = 3 + t = 3 + 5 =", "so W = 9 + t = 9 + 5 =")), {V.ARITHMETIC, V.RULE}, True, 0),
    "changed literal, true": (edit(("so W = 3 + t = 3 + 5 = 8", "so W = 9 + t = 9 + 5 = 14")), {V.RULE, V.ARITHMETIC}, True, 1),
    "changed leaf": (step("owl", "so L = 6"), {V.VALUE, V.ARITHMETIC}, True, 1),
    "product for sum": (edit(("W + C = 8 + 3 = 11", "W * C = 8 * 3 = 11")), {V.ARITHMETIC, V.RULE}, True, 0),
    "reversed difference": (edit(("so C = L - P = 5 - 2", "so C = P - L = 2 - 5")), {V.ARITHMETIC, V.RULE}, True, 0),
    "reversed difference, true": (step("crow", "so C = P - L = 2 - 5 = -3"), {V.RULE, V.ARITHMETIC}, True, 1),
    "letters without arithmetic": (step("crow", "so C = L P = 3"), {V.UNPARSABLE}, True, 0),
    "a letter and a number": (step("crow", "so C = L - P 3"), {V.UNPARSABLE}, True, 1),
    "nothing but letters": (step("lion", "so J = P"), {V.UNPARSABLE}, True, 1),
    "number for a parent": (step("lion", "so J = 2"), {V.PARENTS}, True, 1),
    "numbers for parents": (step("wolf", "so W = 3 + 5 = 8"), {V.PARENTS}, True, 1),
    "other parent of the same value": (edit(("e + J = 22 + 2", "e + P = 22 + 2")), {V.PARENTS}, True, 1),
    "not a substitution": (edit(("so W = 3 + t = 3 + 5 = 8", "so W = 3 + t = 4 + 4 = 8")), {V.RULE}, True, 0),
    "not a substitution, before the letters": (edit(("so W = 3 + t = 3 + 5 = 8", "so W = 4 + 4 = 3 + t = 8")), {V.RULE}, True, 0),
    "numbers swapped in a difference": (step("deer", "d = P - L = 2 - 5 = -3; so D = 4 + d = -3 - -4 = 1"), {V.RULE}, True, 0),
    "a letter of the same value": (edit(("e + J = 22 + 2", "e + J = e + P = 22 + 2")), {V.RULE}, True, 1),
    "letters of two halves": (edit(("W + C = 8 + 3 =", "W + 3 = 8 + C =")), {V.RULE}, True, 0),
    "a letter for a literal": (step("wolf", "t = L = 5; i = 3; so W = 3 + t = i + t = 3 + 5 = 7"), {V.ARITHMETIC}, True, 1),
    "result in the middle, false": (edit(("= 8 + 3 = 11", "= 8 + 3 = 12 = 11")), {V.ARITHMETIC}, True, 0),
    "product of a sum without brackets": (edit(("so H = 2 * u = 2 * 5", "so H = 2 * u = 2 * P + C = 2 * 5")), {V.ARITHMETIC}, True, 0),
    "worked out bit by bit": (edit(("so D = 4 + d = 4 + -3 = 1", "so D = 4 + d = 4 + -3 = 2 + -1 = 1")), {V.RULE}, True, 0),
    # letters
    "undefined letter": (edit(("e + J = 22 + 2", "e + z = 22 + 2")), {V.UNDEFINED}, True, 1),
    "letter used before its step": (STEPS["lion"] + GOLD.replace(STEPS["lion"], ""), {V.UNDEFINED}, True, 1),
    "letter used before its value": (edit(("Define owl as L; so L = 5. ", ""), (STEPS["wolf"], "Define owl as L; q = L = 5; so L = 5. " + STEPS["wolf"])),
                                     {V.UNDEFINED}, True, 1),
    "node made from itself": (step("lion", "so J = J = 2"), {V.UNDEFINED}, True, 1),
    "intermediate made from itself": (edit(("t = L = 5", "t = t = 5")), {V.UNDEFINED}, True, 1),
    "letter of two nodes": (edit(("Define lion as J; so J = P", "Define lion as H; so H = P"), ("e + J", "e + H")),
                            {V.REDEFINED}, True, 1),
    "intermediate takes a node's letter": (step("hawk", "W = P + C = 2 + 3 = 5; so H = 2 * W = 2 * 5 = 10"),
                                           {V.REDEFINED}, True, 0),
    "node takes an intermediate's letter": (edit(("Define hawk as H; u = P + C = 2 + 3 = 5; so H = 2 * u", "Define hawk as t; u = P + C = 2 + 3 = 5; so t = 2 * u"),
                                                 ("b + H", "b + t")), {V.REDEFINED}, True, 0),
    "own letter for an intermediate": (step("wolf", "W = L = 5; so W = 3 + W = 3 + 5 = 8"), {V.REDEFINED}, True, 0),
    "own letter for an unused intermediate": (step("wolf", "W = L = 5; so W = 3 + L = 3 + 5 = 8"), {V.REDEFINED}, True, 0),
    "letter of two intermediates": (step("hawk", "t = P + C = 2 + 3 = 5; so H = 2 * t = 2 * 5 = 10"), {V.REDEFINED}, True, 0),
    "letter of two intermediates of a step": (edit(("b = a + D = 11 + 1 = 12; e = b + H", "a = a + D = 11 + 1 = 12; e = a + H")),
                                              {V.REDEFINED}, True, 0),
    "intermediate that is only quoted as a number": (edit(("so W = 3 + t = 3 + 5", "so W = 3 + 5")), {V.UNUSED}, True, 0),
    "undefined letter for an intermediate": (edit(("so W = 3 + t =", "so W = 3 + z =")), {V.UNDEFINED}, True, 1),
    "unused intermediate": (step("lion", "z = P = 2; so J = P = 2"), {V.UNUSED}, True, 0),
    "unused intermediate of another node": (step("lion", "z = W = 8; so J = P = 2"), {V.UNUSED}, True, 1),
    "another step's intermediate": (edit(("u = P + C = 2 + 3 = 5", "u = P + C = 2 + 3 = 5; p = P = 2"), ("so J = P = 2", "so J = p = 2")),
                                    {V.UNDEFINED, V.UNUSED}, True, 0),
    "value in another step": (edit(("so J = P = 2. ", ". "), ("e + J = 22 + 2 = 24", "e + J = 22 + 2 = 24; so J = P = 2")),
                              {V.UNPARSABLE}, True, 2),
    "value in the next step": (edit(("Define fox as P; so P = 2. ", "Define fox as P; . "), ("t = L = 5", "P = 2; t = L = 5")),
                               {V.UNPARSABLE, V.REDEFINED}, True, 1),
    "letter without a value": (edit(("Define lion as J; so J = P = 2. ", "Define lion as J. ")),
                               {V.MISSING, V.UNPARSABLE, V.UNDEFINED}, True, 2),
    "no assignment": (step("lion", ""), {V.UNPARSABLE}, True, 1),
    "two letters": (GOLD.replace("J", "JJ"), {V.UNPARSABLE, V.MISSING}, True, 2),
    "a letter of another alphabet": (GOLD.replace("J", "Ж"), {V.UNPARSABLE, V.MISSING}, True, 2),
    # nodes
    "node defined twice": (edit((STEPS["lion"], STEPS["lion"] * 2)), {V.REDEFINED}, True, 0),
    "node defined twice, once wrong": (edit((STEPS["lion"], STEPS["lion"] + "Define lion as i; so i = P = 3. ")),
                                       {V.REDEFINED, V.ARITHMETIC}, True, 1),
    "node defined twice, first wrong": (edit((STEPS["lion"], "Define lion as i; so i = P = 3. " + STEPS["lion"])),
                                        {V.REDEFINED, V.ARITHMETIC}, True, 1),
    "value given twice": (step("lion", "so J = P = 2; so J = P = 2"), {V.UNPARSABLE}, True, 0),
    "value given twice, last wrong": (step("lion", "so J = P = 2; so J = 3"), {V.UNPARSABLE, V.ARITHMETIC}, True, 1),
    "a right but unneeded node": (edit((STEPS["lion"], STEPS["lion"] + "Define bear as i; so i = P = 2. ")), {V.EXTRA}, True, 0),
    "an unneeded last node": (edit((LAST, LAST + "Define bear as i; so i = T = 24. ")), {V.EXTRA}, True, 0),
    "missing leaf": (edit((STEPS["owl"], "")), {V.MISSING, V.UNDEFINED}, True, 4),
    "missing last node": (edit((STEPS["total"], "")), {V.MISSING, V.WRONG_ANSWER}, True, 1),
    "another name": (edit(("Define lion", "Define tiger")), {V.MISSING, V.EXTRA, V.PARENTS}, True, 2),
    "no steps": ("Answer: 24.", {V.MISSING}, True, 8),
    "not in order": (edit((STEPS["total"], ""), (STEPS["lion"], STEPS["total"] + STEPS["lion"])),
                     {V.UNDEFINED, V.WRONG_ANSWER}, True, 1),
    # numbers
    "= 3 or 7": (step("lion", "so J = P = 2 or 7"), {V.UNPARSABLE}, True, 1),
    "= 7 or 3": (step("lion", "so J = P = 7 or 2"), {V.UNPARSABLE}, True, 1),
    "= 2.5": (edit(("so J = P = 2. ", "so J = P = 2.5. ")), {V.UNPARSABLE}, True, 1),
    "= 02": (edit(("so J = P = 2. ", "so J = P = 02. ")), {V.UNPARSABLE}, True, 1),
    "leaf = 005": (edit(("so L = 5. ", "so L = 005. ")), {V.UNPARSABLE}, True, 1),
    "leading zero in a side": (edit(("= 8 + 3 =", "= 08 + 3 =")), {V.UNPARSABLE}, True, 0),
    "leading zero of a literal": (edit(("so W = 3 + t", "so W = 03 + t")), {V.UNPARSABLE}, True, 0),
    "leading zero after a minus": (edit(("4 + -3 =", "4 + -03 =")), {V.UNPARSABLE}, True, 0),
    "plus sign": (edit(("so J = P = 2. ", "so J = P = +2. ")), {V.UNPARSABLE}, True, 1),
    "value in words": (step("lion", "so J = P = two"), {V.UNPARSABLE}, True, 1),
    "digits of another script": (step("lion", "so J = P = \u0662"), {V.UNPARSABLE}, True, 1),
    "brackets": (step("lion", "so J = (P) = 2"), {V.UNPARSABLE}, True, 0),
    "double minus": (step("lion", "so J = P = --2"), {V.UNPARSABLE}, True, 1),
    # text that is no step
    "text between steps": (edit((STEPS["lion"], STEPS["lion"] + "Well. ")), {V.UNPARSABLE}, True, 1),
    "text before the steps": ("Let us see. " + GOLD, {V.STRAY}, True, 0),
    "text before the solution": ("Let us see. <solution> " + MODEL, {V.STRAY}, True, 0),
    "text after the steps": (edit((LAST, LAST + "So we are done. ")), {V.UNPARSABLE}, True, 1),
    "text inside a step": (step("lion", "hm; so J = P = 2"), {V.UNPARSABLE}, True, 0),
    "empty step": (edit((STEPS["lion"], STEPS["lion"] + "Define ")), {V.UNPARSABLE}, True, 0),
    "no full stop": (edit(("so J = P = 2. ", "so J = P = 2 ")), {V.UNPARSABLE}, True, 0),
    "no so": (step("lion", "J = P = 2"), {V.UNPARSABLE}, True, 0),
    "a so too many": (edit(("t = L = 5", "so t = L = 5")), {V.UNPARSABLE}, True, 0),
    "scratchpad between tags of a prompt": ("<question> L is 5, P is 2 </question> <solution> " + MODEL, {V.STRAY}, True, 0),
    "prompt": ("<question> The number of owl equals 5. What is the total? </question> <solution> " + MODEL, {V.STRAY}, True, 0),
    "solution tag": ("<solution> " + MODEL, {V.STRAY}, True, 0),
    "end of text before the steps": ("<|endoftext|> " + MODEL, {V.STRAY}, True, 0),
    "a solution in the prompt": ("<question> " + MODEL + " </question> <solution> " + MODEL, {V.STRAY, V.SEVERAL}, True, 0),
    "two prompts": ("<question> q </question> hm <solution> " + MODEL, {V.STRAY}, True, 0),
    # the answer
    "wrong answer": (edit(("Answer: 24", "Answer: 23")), {V.WRONG_ANSWER}, False, 0),
    "wrong last value": (edit(("22 + 2 = 24", "22 + 2 = 23")), {V.ARITHMETIC, V.WRONG_ANSWER}, True, 1),
    "no answer": (BODY, {V.NO_ANSWER}, False, 0),
    "closed without answer": (BODY + "</solution>", {V.NO_ANSWER}, False, 0),
    "empty answer": (BODY + "</solution> <answer> </answer>", {V.NO_ANSWER}, False, 0),
    "unclosed answer": (BODY + "</solution> <answer> 24", {V.NO_ANSWER}, False, 0),
    "unclosed answer in the data form": (BODY + "Answer: 24", {V.NO_ANSWER}, False, 0),
    "answer 24 or 3": (BODY + "</solution> <answer> 24 or 3 </answer>", {V.NO_ANSWER}, False, 0),
    "answer 3 or 24": (BODY + "</solution> <answer> 3 or 24 </answer>", {V.NO_ANSWER}, False, 0),
    "answer 24 or 3, data form": (BODY + "Answer: 24 or 3.", {V.NO_ANSWER}, False, 0),
    "answer 24.5": (BODY + "</solution> <answer> 24.5 </answer>", {V.NO_ANSWER}, False, 0),
    "answer 24.5, data form": (BODY + "Answer: 24.5.", {V.NO_ANSWER}, False, 0),
    "answer 24.0": (BODY + "Answer: 24.0.", {V.NO_ANSWER}, False, 0),
    "answer -24": (BODY + "Answer: -24.", {V.WRONG_ANSWER}, False, 0),
    "answer 024": (BODY + "</solution> <answer> 024 </answer>", {V.NO_ANSWER}, False, 0),
    "answer 024, data form": (BODY + "Answer: 024.", {V.NO_ANSWER}, False, 0),
    "answer +24": (BODY + "Answer: +24.", {V.NO_ANSWER}, False, 0),
    "answer 2 4": (BODY + "</solution> <answer> 2 4 </answer>", {V.NO_ANSWER}, False, 0),
    "answer of 10,000 digits": (BODY + f"</solution> <answer> {'24' * 5000} </answer>", {V.NO_ANSWER}, False, 0),
    "answer in other digits": (BODY + "</solution> <answer> \u0662\u0664 </answer>", {V.NO_ANSWER}, False, 0),
    "two answers": (MODEL + " <answer> 3 </answer>", {V.SEVERAL}, False, 0),
    "two answers, the last right": (BODY + "</solution> <answer> 3 </answer> <answer> 24 </answer>", {V.SEVERAL}, False, 0),
    "two answers, one unreadable": (MODEL + " <answer> or 3", {V.SEVERAL}, False, 0),
    "the answer twice": (GOLD + " Answer: 24.", {V.SEVERAL}, True, 0),
    "the answer in both forms": (GOLD + " </solution> <answer> 24 </answer>", {V.SEVERAL}, True, 0),
    "text after the answer": (GOLD + " I hope so.", {V.STRAY}, True, 0),
    "text after the answer tag": (MODEL + " so", {V.STRAY}, True, 0),
    "steps after the answer": (GOLD + " " + STEPS["lion"], {V.STRAY}, True, 0),
    "text after the end of text": (MODEL + "<|endoftext|> more", {V.STRAY}, True, 0),
    "text before the answer": (BODY + "</solution> hence <answer> 24 </answer>", {V.STRAY}, True, 0),
    "unclosed solution": (BODY + "<answer> 24 </answer>", {V.STRAY}, True, 0),
}


@pytest.mark.parametrize("response, must, outcome, wrong", REJECTED.values(), ids=REJECTED.keys())
def test_strict_rejects(response, must, outcome, wrong):
    verdict = V.verify(GOLD, response)
    assert not verdict["strict"] and kinds(verdict) == must, verdict["errors"]
    assert verdict["outcome"] == outcome
    assert verdict["process"] == (8 - wrong) / 8
    assert verdict["verified"] == (outcome and wrong == 0)


# (the gold way, other ways with the right parents and the right value), after x = 2, y = 2, z = 0, w = 5
OTHER_RULES = [
    ("t = a = 2; so r = 2 * t = 2 * 2 = 4", ["so r = 2 + a = 2 + 2 = 4", "so r = a + a = 2 + 2 = 4", "so r = a * a = 2 * 2 = 4",
                                             "t = a = 2; so r = t + t = 2 + 2 = 4", "t = 2; so r = t + a = 2 + 2 = 4",
                                             "t = a + a = 2 + 2 = 4; so r = t = 4", "so r = 1 * 2 * a = 1 * 2 * 2 = 4",
                                             "so r = 2 * a + 0 = 2 * 2 + 0 = 4", "so r = 1 + 1 + a = 1 + 1 + 2 = 4"]),
    ("t = a = 2; so r = 2 + t = 2 + 2 = 4", ["so r = 2 * a = 2 * 2 = 4", "so r = a * 2 = 2 * 2 = 4", "so r = a + a = 2 + 2 = 4",
                                             "so r = 1 + 1 + a = 1 + 1 + 2 = 4", "t = 1 + a = 1 + 2 = 3; so r = 1 + t = 1 + 3 = 4",
                                             "so r = 6 - a = 6 - 2 = 4", "so r = a - -2 = 2 - -2 = 4"]),
    ("t = c + b = 0 + 2 = 2; so r = 2 * t = 2 * 2 = 4", ["so r = c + b * 2 = 0 + 2 * 2 = 4"]),
    ("so r = a - c = 2 - 0 = 2", ["so r = a + c = 2 + 0 = 2", "so r = c + a = 0 + 2 = 2", "so r = a + c + c = 2 + 0 + 0 = 2",
                                  "so r = a - c - c = 2 - 0 - 0 = 2"]),
    ("so r = a + c = 2 + 0 = 2", ["so r = a - c = 2 - 0 = 2", "so r = a * c + 2 = 2 * 0 + 2 = 2"]),
    ("so r = a - b = 2 - 2 = 0", ["so r = b - a = 2 - 2 = 0"]),
    ("so r = a + b = 2 + 2 = 4", ["so r = a * b = 2 * 2 = 4", "so r = 2 + a + b - 2 = 2 + 2 + 2 - 2 = 4"]),
    ("so r = c = 0", ["so r = 2 * c = 2 * 0 = 0", "so r = 0 + c = 0 + 0 = 0", "so r = 0 - c = 0 - 0 = 0", "so r = c - c = 0 - 0 = 0",
                      "so r = c * c = 0 * 0 = 0", "so r = 1 * c = 1 * 0 = 0"]),
    ("t = d - a = 5 - 2 = 3; so r = 3 + t = 3 + 3 = 6", ["so r = 2 * d - 2 * a = 2 * 5 - 2 * 2 = 6", "t = d - a = 5 - 2 = 3; so r = 2 * t = 2 * 3 = 6",
                                                         "t = a - 3 = 2 - 3 = -1; so r = d - t = 5 - -1 = 6",
                                                         "t = a + 3 = 2 + 3 = 5; so r = d + t - 4 = 5 + 5 - 4 = 6"]),
    ("so r = 4", ["so r = 2 + 2 = 4", "so r = 2 * 2 = 4", "so r = 5 - 1 = 4"]),
]
BEFORE = "Define x as a; so a = 2. Define y as b; so b = 2. Define z as c; so c = 0. Define w as d; so d = 5. Define v as r; "


@pytest.mark.parametrize("gold, other", [(gold, other) for gold, others in OTHER_RULES for other in others])
def test_strict_rejects_another_rule_of_the_same_value(gold, other):
    ending = f". Answer: {gold.split()[-1]}."
    assert_strict(BEFORE + gold + ending, BEFORE + gold + ending)
    verdict = V.verify(BEFORE + gold + ending, BEFORE + other + ending)
    assert verdict["verified"] and not verdict["strict"] and kinds(verdict) == {V.RULE}


def test_zero_has_one_spelling():
    gold = BEFORE + "so r = c = 0. Answer: 0."
    assert_strict(gold, gold)
    assert_strict(gold.replace("Answer: 0.", "</solution> <answer> 0 </answer>"), gold)
    for zero in ("-0", "00", "+0", "-00", "0.0", "٠"):
        for text in (f"so c = {zero}", f"= c = {zero}"):
            verdict = V.verify(gold, gold.replace(text.replace(zero, "0"), text))
            assert verdict["outcome"] and not verdict["verified"] and not verdict["strict"] and V.UNPARSABLE in kinds(verdict)
        for ending in (f"Answer: {zero}.", f"</solution> <answer> {zero} </answer>"):
            verdict = V.verify(gold, gold.replace("Answer: 0.", ending))
            assert not verdict["outcome"] and not verdict["strict"] and kinds(verdict) == {V.NO_ANSWER}


# (a step, other ways to write it that hide or mix up what the value is made of), after x = 2, y = 2, z = 0, w = 5
MIXED_UP = [
    ("so r = a + b = 2 + 2 = 4", ["so r = a + b = a + a = 2 + 2 = 4", "so r = a + b = 2 + 2 = b + b = 4", "so r = a + a = a + b = 4",
                                  "so r = a + b = 2 + a = 4 + c = 4", "so r = a + b = a * b = 4", "so r = a + b = 2 * 2 = 4",
                                  "so r = a + b = 4 + 0 = 4", "so r = a + b = 2 + 2 = 1 + 3 = 4", "so r = a + 2 = 2 + b = 4"]),
    ("so r = a - b = 2 - 2 = 0", ["so r = a - b = b - a = 0", "so r = a - b = a - a = 0", "so r = a - b = 2 - 2 = b - b = 0",
                                  "so r = 2 - b = a - 2 = 0"]),
    ("so r = d - a = 5 - 2 = 3", ["so r = d - a = d - b = 5 - 2 = 3", "so r = d - a = 5 + -2 = 3", "so r = d - a = -2 - -5 = 3"]),
    ("t = a = 2; so r = 2 * t = 2 * 2 = 4", ["t = a = 2; so r = 2 * t = t * t = 2 * 2 = 4", "t = a = 2; so r = 2 * t = a * t = 4",
                                             "t = a = 2; so r = 2 * t = 2 + 2 = 4", "t = a = 2; so r = 2 * t = 2 * b = 4"]),
    ("t = a = 2; so r = 2 + t = 2 + 2 = 4", ["t = a = 2; so r = 2 + t = a + t = 4", "t = a = 2; so r = 2 + t = a + 2 = t + a = 4",
                                             "t = a = 2; so r = 2 + t = b + 2 = 4"]),
    ("so r = c = 0", ["so r = c = 0 + 0 = 0", "so r = c = c + c = 0", "so r = c = a - b = 0"]),
    ("so r = 4", ["so r = 4 = 2 + 2 = 4", "so r = 4 = a + b = 4", "so r = 4 = 4 * 1 = 4"]),
]


@pytest.mark.parametrize("gold, other", [(gold, other) for gold, others in MIXED_UP for other in others])
def test_strict_rejects_sides_that_only_have_the_same_value(gold, other):
    ending = f". Answer: {gold.split()[-1]}."
    assert_strict(BEFORE + gold + ending, BEFORE + gold + ending)
    verdict = V.verify(BEFORE + gold + ending, BEFORE + other + ending)
    assert verdict["outcome"] and not verdict["strict"] and kinds(verdict) <= {V.RULE, V.PARENTS}


# -----------------------------------------------------------------------------
# equations, against an oracle that lists every right way to write a side

def ways(product, terms, options):
    """All texts of a side: the terms (sign, operand) in any order, each operand written in any of its ways."""
    texts = set()
    for order in itertools.permutations(terms):
        if order[0][0] == "+":
            for operands in itertools.product(*(options[x] for _, x in order)):
                signs = ["", *(" * " if product else f" {sign} " for sign, _ in order[1:])]
                texts.add("".join(s + x for s, x in zip(signs, operands)))
    return texts


def test_equations_agree_with_an_oracle():
    rng = random.Random(0)
    same = Counter()
    for _ in range(6000):
        value = {x: rng.randint(0, 3) for x in "abc"} | {"2": 2, "3": 3}
        product, terms, rule = rng.choice([
            (False, "+a +b", "a + b"), (False, "+a -b", "a - b"), (False, "+a +b +c", "a + b + c"), (False, "+a", "a"),
            (False, "+2 +t", "t = a"), (True, "+3 +t", "t = a"), (False, "+2 +a -b", "a - b"), (False, "+3 +a +b", "a + b")])
        terms = [tuple(term) for term in terms.split()]
        parents = sorted(set(rule) & set("abc"))
        before = "".join(f"Define node {x} as {x}; so {x} = {value[x]}. " for x in parents) + "Define r as r; "
        if "t" in rule:                                  # a copy, so that each of t and a can stand for the other
            value["t"] = value["a"]
            before += f"t = a = {value['t']}; "
        letters = {x: "at" if "t" in rule and x in "at" else x for x in "abct23"}
        either = {x: [*letters[x], str(value.get(x))] for x in letters}
        in_letters, right = ways(product, terms, letters), ways(product, terms, either)
        total = 1 if product else 0
        for sign, x in terms:
            total = total * value[x] if product else total + int(sign + "1") * value[x]
        sides = []
        for _ in range(rng.randint(1, 4)):
            words = rng.choice(sorted(rng.choice([in_letters, right, right, {str(total)}]))).split()
            if rng.random() < 0.15:
                words[rng.randrange(len(words))] = rng.choice("abct123+-*")
            sides.append(" ".join(words))
        expected = (all(side in right or side == str(total) for side in sides) and any(side in in_letters for side in sides)
                    and ("t" not in rule or any("t" in side for side in sides)))
        gold_side = sorted(in_letters)[0] if "t" not in rule else f"{terms[0][1]} {'*' if product else '+'} t"
        gold = f"{before}so r = {gold_side} = {total}. Answer: {total}."
        response = f"{before}so r = {' = '.join(sides)} = {total}. Answer: {total}."
        verdict = V.verify(gold, response)
        assert verdict["strict"] == expected, (gold, response, verdict)
        same[expected] += 1
    assert min(same[True], same[False]) > 1500


# -----------------------------------------------------------------------------
# the rules, against an oracle that knows no canonical form: it puts numbers in

def value_of(tree, point):
    if isinstance(tree, tuple):
        x, y = value_of(tree[1], point), value_of(tree[2], point)
        return x + y if tree[0] == "+" else x - y if tree[0] == "-" else x * y
    return point[tree]


def leaves(tree):
    return leaves(tree[1]) + leaves(tree[2]) if isinstance(tree, tuple) else [tree]


def subtracts_literal(tree):
    return isinstance(tree, tuple) and (tree[0] == "-" and "lit" in leaves(tree[2]) or any(map(subtracts_literal, tree[1:])))


def written(tree, point):
    """A step for node r, an intermediate for every inner operation."""
    letters, assigns = iter("klmnopq"), []

    def walk(t, letter):
        if isinstance(t, tuple):
            left, right = (walk(x, next(letters)) if isinstance(x, tuple) else x for x in t[1:])
            number = {x: value_of(y, point) for x, y in zip((left, right), t[1:])}
            shown = [str(point["lit"]) if x == "lit" else x for x in (left, right)]
            assigns.append(f"{letter} = {shown[0]} {t[0]} {shown[1]} = {number[left]} {t[0]} {number[right]} = {value_of(t, point)}")
        else:
            assigns.append(f"{letter} = {t} = {point[t]}" if t != "lit" else f"{letter} = {point[t]}")
        return letter
    walk(tree, "r")
    assigns[-1] = "so " + assigns[-1]
    return f"Define r as r; {'; '.join(assigns)}. Answer: {value_of(tree, point)}."


def test_rules_agree_with_an_oracle():
    rng = random.Random(0)
    same = Counter()
    for _ in range(6000):
        parents = list("abcd"[:rng.randint(1, 4)])
        gold = "a" if len(parents) == 1 else (rng.choice("+-"), "a", "b") if len(parents) == 2 else ("+", ("+", "a", "b"), "c")
        gold = ("+", gold, "d") if len(parents) == 4 else gold
        literal = rng.choice(["", "+", "*"]) if len(parents) < 4 else ""
        gold = (literal, "lit", gold) if literal else gold
        pieces = leaves(gold)
        if rng.random() < 0.1:
            pieces[rng.randrange(len(pieces))] = rng.choice(pieces)      # one twice, another not at all
        if rng.random() < 0.1:
            pieces.append(rng.choice(pieces))
        while len(pieces) > 1:                                           # any tree over the pieces
            x, y = (pieces.pop(rng.randrange(len(pieces))) for _ in range(2))
            pieces.append((rng.choice("++++-*"), x, y))
        point = {x: rng.randint(0, 4) for x in "abcd"} | {"lit": rng.randint(1, 4)}
        before = "".join(f"Define node {x} as {x}; so {x} = {point[x]}. " for x in parents)
        response = pieces[0]
        points = [{x: rng.randint(10, 10 ** 6) for x in ("a", "b", "c", "d", "lit")} for _ in range(3)]
        expected = (sorted(leaves(response)) == sorted(leaves(gold)) and not subtracts_literal(response)
                    and all(value_of(response, p) == value_of(gold, p) for p in points))
        verdict = V.verify(before + written(gold, point), before + written(response, point))
        assert verdict["strict"] == expected, (written(gold, point), written(response, point), verdict)
        same[expected] += 1
    assert min(same[True], same[False]) > 1500


# -----------------------------------------------------------------------------
# the public rows

LETTER = re.compile(r"\b[A-Za-z]\b")
SUM = re.compile(r"\w = (\w) \+ (\w) = (-?\d+) \+ (-?\d+) = -?\d+")


def split_steps(solution):
    steps, answer = solution.rsplit("Answer: ", 1)
    return re.findall(r"Define .*?\. ", steps), "Answer: " + answer


def reletter(solution, rng):
    new = dict(zip(string.ascii_letters, rng.sample(string.ascii_letters, 52)))
    return LETTER.sub(lambda m: new[m[0]], solution)


def commute(solution, rng):
    return re.sub(r"(\w) ([+*]) (\w) = (-?\d+) [+*] (-?\d+) =", r"\3 \2 \1 = \5 \2 \4 =", solution)


def skip_substitution(solution, rng):
    return re.sub(r" = -?\d+ [-+*] -?\d+ = ", " = ", solution)


def skip_copies(solution, rng):
    return re.sub(r"(\w) = (\w) = -?\d+; so (\w) = (\d+) ([+*]) \1 ", r"so \3 = \4 \5 \2 ", solution)


def rewrite_sums(solution, write):
    """Gives the terms of every step that is one plain sum to `write`: letter, [(operand, number), ...] -> assignments."""
    steps, answer = split_steps(solution)
    for i, step in enumerate(steps):
        head, *assigns = step.removesuffix(". ").split("; ")
        found = [SUM.fullmatch(a.removeprefix("so ")) for a in assigns]
        if all(found) and not any(m[1].isdigit() for m in found):
            terms = [(found[0][1], int(found[0][3]))] + [(m[2], int(m[4])) for m in found]
            steps[i] = f"{head}; {write(head[-1], terms, [a[0] for a in assigns[:-1]])}. "
    return "".join(steps) + answer


def flatten(solution, rng):
    return rewrite_sums(solution, lambda letter, terms, _: f"so {letter} = {' + '.join(x for x, _ in terms)} = "
                        f"{' + '.join(str(n) for _, n in terms)} = {sum(n for _, n in terms)}")


def refold(solution, rng):
    def write(letter, terms, letters):
        terms, letters, assigns = rng.sample(terms, len(terms)), [*letters, letter], []
        for x in letters:                                # any two, until one is left
            (a, m), (b, n) = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
            assigns.append(f"{x} = {a} + {b} = {m} + {n} = {m + n}")
            terms.append((x, m + n))
        return "; ".join([*assigns[:-1], "so " + assigns[-1]])
    return rewrite_sums(solution, write)


def reorder(solution, rng):
    steps, answer = split_steps(solution)
    done, order = set(), []
    while steps:
        ready = [s for s in steps if set(LETTER.findall(s)) - set(re.findall(r"; (?:so )?(\w) = ", s)) <= done]
        order.append(rng.choice(ready))
        done.add(order[-1].split(";")[0][-1])
        steps.remove(order[-1])
    return "".join(order) + answer


def newlines(solution, rng):
    return solution.replace(". ", ".\n").replace("; ", ";\n  ")


def model_form(solution, rng):
    return re.sub(r"Answer: (\d+)\.", r"</solution> <answer> \1 </answer>", " " + solution) + "<|endoftext|>"


def everything(solution, rng):
    for f in (skip_copies, refold, reorder, commute, reletter, newlines, model_form):
        solution = f(solution, rng)
    return solution


SAME = [reletter, commute, skip_substitution, skip_copies, flatten, refold, reorder, newlines, model_form, everything]


def test_every_public_solution_is_right(gold):
    for row in gold:
        assert_strict(row["solution"], row["solution"])
        assert_strict(model_form(row["solution"], None), row["solution"])


def test_nothing_may_stand_before_a_public_solution(gold):
    rng = random.Random(6)
    for row in gold:
        words = rng.sample((row["problem"] + row["solution"]).replace("Define", "").replace("Answer", "").split(), 8)
        for before in (f"<question> {' '.join(words)} </question> <solution>", f"{row['problem']}{row['question']}", words[0]):
            verdict = V.verify(row["solution"], before + model_form(row["solution"], None))
            assert verdict["verified"] and not verdict["strict"] and kinds(verdict) == {V.STRAY}


@pytest.mark.parametrize("change", SAME, ids=lambda f: f.__name__)
def test_every_public_solution_stays_right(gold, change):
    rng, changed = random.Random(1), 0
    for row in gold:
        response = change(row["solution"], rng)
        assert_strict(response, row["solution"])
        changed += response != row["solution"]
    assert changed > len(gold) / 4


def test_no_public_solution_survives_one_wrong_character(gold):
    """No substitution or deletion of a character leaves a solution right, but for white space."""
    rng, alphabet = random.Random(2), string.ascii_letters + string.digits * 4 + "+-*=;.<>" * 4
    for row in gold:
        solution = row["solution"]
        for _ in range(12):
            i = rng.choice([i for i in range(rng.randrange(30), len(solution), 30) if solution[i] != " "])
            new = rng.choice(alphabet.replace(solution[i], "") + "\u0663")
            for response in (solution[:i] + new + solution[i + 1:], solution[:i] + solution[i + 1:]):
                verdict = V.verify(solution, response)
                assert not verdict["strict"] and verdict["errors"], response


def test_no_public_solution_survives_a_changed_number_or_letter(gold):
    """As above, on the marks that matter most: a letter, number or operator becomes another that the text has."""
    rng = random.Random(3)
    for row in gold:
        solution = row["solution"]
        marks = list(re.finditer(r"\b(?:([A-Za-z])|(\d+))\b|(?<= )[-+*](?= )", solution))
        for m in rng.sample(marks, 4):
            extra = {1: "Q", 2: "1", None: "-"}[m.lastindex]
            for new in {extra, *(o[0] for o in marks if o.lastindex == m.lastindex)} - {m[0]}:
                response = solution[:m.start()] + new + solution[m.end():]
                assert not V.verify(solution, response)["strict"], response


def test_no_public_solution_survives_a_number_that_is_no_integer(gold):
    rng = random.Random(8)
    for row in gold:
        solution = row["solution"]
        *numbers, answer = re.finditer(r"\d+", solution)
        for m in [rng.choice(numbers), answer]:
            for sign in ("0", "00", "-0", "+"):
                verdict = V.verify(solution, solution[:m.start()] + sign + solution[m.start():])
                assert not verdict["strict"] and verdict["outcome"] == (solution[m.end():] != ".")


def test_a_reused_letter_has_one_name(gold):
    """Any letter of a solution becomes one that appears before it, wherever it stands."""
    rng = random.Random(7)
    for row in gold:
        letters = list(dict.fromkeys(LETTER.findall(row["solution"])))
        for _ in range(3 if len(letters) > 1 else 0):
            i, j = sorted(rng.sample(range(len(letters)), 2))
            response = re.sub(rf"\b{letters[j]}\b", letters[i], row["solution"])
            verdict = V.verify(row["solution"], response)
            assert not verdict["strict"] and verdict["outcome"] and kinds(verdict) == {V.REDEFINED}, (response, verdict)


def test_one_mistake_in_a_public_solution_has_one_name(gold):
    """Changes to the last equation, which no later step depends on."""
    changes = {"x = x y = 3": V.UNPARSABLE, "or": V.UNPARSABLE, "unused": V.UNUSED, "arithmetic": V.ARITHMETIC, "undefined": V.UNDEFINED,
               "parents": V.PARENTS, "literal": V.RULE}
    seen = Counter()
    for row in gold:
        steps, answer = split_steps(row["solution"])
        head, _, last = steps[-1].rpartition("so ")
        letter, *sides, n = last.strip(" .").split(" = ")
        unused = next(x for x in LETTERS if x not in LETTER.findall(row["solution"]))
        node = steps[0].split(";")[0][-1]
        for change, name in changes.items():
            new = [letter, *sides, n]
            if change == "x = x y = 3":
                new[1:-1] = [f"{letter} {node}"]
            elif change == "or":
                new[-1] += " or 3"
            elif change == "unused":
                new[0] = f"{unused} = {node} = {re.search(r'; so . = (.*?)[.]', steps[0])[1]}; so {letter}"
            elif change == "arithmetic":
                new[-1] = str(int(n) + 1)
            elif change == "undefined":
                new[1] = LETTER.sub(unused, new[1], count=1)
            elif change == "parents":
                new[1:-1] = []
            else:
                new[1:-1] = [f"1 + {sides[0]}" if sides else "1 + 1"]
                new[-1] = str(int(n) + 1) if sides else "2"
            if change in ("undefined", "unused", "parents") and not sides or change == "parents" and head.count(";") > 1:
                continue
            so = "" if change == "unused" else "so "
            verdict = V.verify(row["solution"], "".join(steps[:-1]) + head + so + " = ".join(new) + ". " + f"Answer: {new[-1].split()[0]}.")
            assert kinds(verdict) - {V.WRONG_ANSWER} == {name}, (change, new, verdict)
            seen[change] += 1
    assert min(seen[change] for change in changes) > len(gold) / 4


def test_public_solutions_with_a_step_too_few_too_many_or_out_of_place(gold):
    rng = random.Random(4)
    for row in gold:
        steps, answer = split_steps(row["solution"])
        i = rng.randrange(len(steps))
        without = V.verify(row["solution"], "".join(steps[:i] + steps[i + 1:]) + answer)
        assert not without["verified"] and without["process"] < 1 and V.MISSING in kinds(without)
        twice = V.verify(row["solution"], "".join(steps[:i + 1] + steps[i:]) + answer)
        assert twice["verified"] and not twice["strict"] and V.REDEFINED in kinds(twice)
        backwards = V.verify(row["solution"], "".join(steps[::-1]) + answer)
        assert not backwards["strict"] and V.UNDEFINED in kinds(backwards)
        more = V.verify(row["solution"], "".join(steps) + "Define zebra as Q; so Q = 3. " + answer)
        assert more["verified"] and not more["strict"] and V.EXTRA in kinds(more)
        other = V.verify(row["solution"], "".join(steps) + "Answer: 1234.")
        assert other == {"outcome": False, "process": 1.0, "verified": False, "strict": False,
                         "errors": [f"{V.WRONG_ANSWER}: 1234, not {answer.split()[1][:-1]}"]}


# -----------------------------------------------------------------------------
# any text

NAMES = {V.MISSING, V.EXTRA, V.PARENTS, V.VALUE, V.RULE, V.ARITHMETIC, V.UNDEFINED, V.REDEFINED, V.UNUSED,
         V.WRONG_ANSWER, V.NO_ANSWER, V.SEVERAL, V.UNPARSABLE, V.STRAY}


def test_any_text_gets_a_verdict():
    rng = random.Random(5)
    pieces = (re.findall(r"\w+|\W", MODEL) + ["Define ", " as ", "; ", ". ", "so ", " = ", "Answer: ", "<answer>", "</answer>", "<solution>",
              "</solution>", "<|endoftext|>", "<question>", "</question>", "\ud800", "\udfff", "\0", "\u0664", "９", "é", "\n", "-", "9" * 30])
    seen = set()
    for i in range(4000):
        if i % 4 == 0:
            text = "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x110000)])) for _ in range(rng.randrange(60)))
        elif i % 4 == 1:
            text = "".join(rng.choices(pieces, k=rng.randrange(80)))
        else:                                            # the gold text with a part cut out, doubled or moved
            a, b, c = sorted(rng.sample(range(len(MODEL)), 3))
            text = rng.choice([MODEL[:a] + MODEL[b:], MODEL[:b] + MODEL[a:], MODEL[:a] + MODEL[b:c] + MODEL[a:b] + MODEL[c:],
                               MODEL[:a] + rng.choice(pieces) + MODEL[a:]])
        verdict = V.verify(GOLD, text)
        assert verdict["strict"] == (not verdict["errors"]) and kinds(verdict) <= NAMES
        assert verdict["verified"] == (verdict["outcome"] and verdict["process"] == 1) and 0 <= verdict["process"] <= 1
        assert verdict["verified"] or not verdict["strict"]
        assert verdict["strict"] == all(ok for _, ok, _ in V.explain(GOLD, text))
        if verdict["strict"]:                            # then only white space or sides between the first and the last were touched
            bare = [re.sub(r"(=[^=;.]+)(=[^=;.]+)+(?==)", r"\1", "".join(t.split())) for t in (text, MODEL)]
            assert bare[0] == bare[1]
        seen |= kinds(verdict)
    assert seen == NAMES


# Each family makes a text of about n characters that some way of writing a parser takes n * n time for.
HEAD = "Define owl as L; so L = 5. Define fox as P; "
FAMILIES = {
    "define": lambda n: "Define " * (n // 7),
    "headers": lambda n: "Define x as L; " * (n // 15),
    "a = a = a": lambda n: HEAD + "so P = " + "L = " * (n // 4) + "5.",
    "sides that fail at the end": lambda n: HEAD + "so P = " + "5 = " * (n // 4) + "z.",
    "long first side": lambda n: HEAD + "so P = " + "L + " * (n // 8) + "L = " + "L = " * (n // 8) + "5.",
    "product": lambda n: HEAD + "so P = " + "L * " * (n // 4) + "L = 5.",
    "doubling": lambda n: HEAD + "".join(f"{LETTERS[i + 1]} = {LETTERS[i]} + {LETTERS[i]} = 4; " for i in range(40)) * (n // 700),
    "squaring": lambda n: HEAD + "".join(f"Define n{i} as {LETTERS[i % 40]}; so {LETTERS[i % 40]} = {LETTERS[(i - 1) % 40]} * "
                                         f"{LETTERS[(i - 1) % 40]} = {9 ** (i % 18)}. " for i in range(n // 45)),
    "growing parents": lambda n: "".join(f"Define n{i} as a; t = t + a = 1; so a = t = 1. " for i in range(n // 45)),
    "steps": lambda n: "".join(f"Define n{i} as a; so a = 1. " for i in range(n // 28)),
    "long names": lambda n: (f"Define {'x' * (n // 4)}a as L; so L = 1. Define {'x' * (n // 4)}b as M; so M = 1. "
                             + "Define q as z; so z = L - M = 0. " * (n // 70)),
    "many sides": lambda n: HEAD + "so P = " + "L + L = L + 5 = 5 + 5 = " * (n // 24) + "10.",
    "sides of growing length": lambda n: HEAD + "so P = " + "".join("L + " * i + "L = " for i in range(int((n / 2) ** 0.5))) + "5.",
    "garbage in a step": lambda n: f"Define {'x' * (n // 2)} as L; " + "a b; " * (n // 10),
    "digits": lambda n: HEAD + f"so P = {'7' * n}. Answer: {'7' * n}.",
    "answers": lambda n: GOLD + "Answer: 24. <answer> 24 " * (n // 24),
    "tags": lambda n: "<question> </question> <solution> " * (n // 34),
    "ends of text": lambda n: MODEL + "<|endoftext|> " * (n // 14) + "x",
    "spaces": lambda n: GOLD + " " * n + "x",
    "letters": lambda n: HEAD + "so P = " + "L " * (n // 2) + "= 7.",
    "surrogates": lambda n: HEAD + "\ud800" * n,
}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_time_is_linear(family):
    """Eight times the text takes about eight times as long; quadratic would be sixty-four."""
    def seconds(text):
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            verdict = V.verify(GOLD, text)
            best = min(best, time.process_time() - start)
            assert verdict["errors"] and max(map(len, verdict["errors"])) < 400
        return best
    assert seconds(family(64000)) < 28 * seconds(family(8000)) + 0.02


def test_numbers_without_end_cost_nothing():
    nines = "9" * 18
    start = time.process_time()
    for assigns in (f"so L = {'9' * 10000}.", f"so L = -{'9' * 10000}.", f"so L = {nines}{f' * {nines}' * 150000} = 5."):
        verdict = V.verify(GOLD, f"Define owl as L; {assigns} Answer: {'9' * 10000}.")
        assert not verdict["outcome"] and verdict["process"] <= 1 / 8
    assert time.process_time() - start < 4


# -----------------------------------------------------------------------------
# the rest of the interface

def test_gold_without_nodes_or_answer():
    for gold in ("", "Answer: 7.", "nothing", GOLD + " <answer> 3 </answer>", BODY):
        with pytest.raises(ValueError, match="gold solution"):
            V.verify(gold, GOLD)
        with pytest.raises(ValueError, match="gold solution"):
            V.explain(gold, GOLD)


def test_process_counts_nodes():
    half = "".join(list(STEPS.values())[:4]) + "Answer: 24."
    assert V.verify(GOLD, half) == {
        "outcome": True, "process": 0.5, "verified": False, "strict": False,
        "errors": [f"missing node: {name}" for name in ("deer", "hawk", "lion", "total")]
        + ["wrong answer: 24 is not the value of the last step"]}
    assert V.verify(GOLD, "")["process"] == 0


def test_verified_tolerates_extra_nodes():
    more = "Define bear as i; so i = 3. " + BODY + "Define bee as o; so o = i + L = 3 + 5 = 8. Answer: 24."
    verdict = V.verify(GOLD, more)
    assert verdict["verified"] and not verdict["strict"]
    assert verdict["errors"] == ["extra node: bear", "extra node: bee", "wrong answer: 24 is not the value of the last step"]


def test_reward():
    right = V.verify(GOLD, GOLD)
    assert [V.reward(right, kind) for kind in V.REWARDS] == [1, 1, 1, 1, 1]
    lucky = V.verify(GOLD, "Answer: 24.")
    assert [V.reward(lucky, kind) for kind in V.REWARDS] == [1, 0, 0.2, 0, 0]
    unlucky = V.verify(GOLD, BODY + "Answer: 23.")       # the authors' code gives this one nothing
    assert [V.reward(unlucky, kind) for kind in V.REWARDS] == [0, 1, 0.8, 0, 0]
    half = {"outcome": True, "process": 0.5, "verified": False, "strict": False, "errors": []}
    assert V.reward(half, "mixed") == pytest.approx(0.2 + 0.8 * 0.5)
    assert V.reward(half, "mixed", alpha=0.5) == pytest.approx(0.75)
    assert V.reward(half, "mixed", alpha=0) == 0.5 and V.reward(half, "mixed", alpha=1) == 1
    assert all(type(V.reward(right, kind)) is float for kind in V.REWARDS)
    with pytest.raises(ValueError, match="outcome, process, mixed, verified, strict"):
        V.reward(right, "errors")


def test_explain_marks_each_step():
    assert V.explain(GOLD, MODEL) == [(step.strip(), True, "") for step in STEPS.values()] + [("Answer: 24", True, "")]
    response = edit(("W + C = 8 + 3 =", "W + C = 40 + 50 ="), (STEPS["lion"], "Define bear as J; so J = P = 2. "), ("Answer: 24", "Answer: 23"))
    lines = V.explain(GOLD, response)
    assert [ok for _, ok, _ in lines] == [True] * 6 + [False] * 4
    assert lines[6] == ("Define bear as J; so J = P = 2.", False, "extra node: bear")
    assert lines[7][2] == "false arithmetic: total, a = W + C = 40 + 50 = 11; wrong parents: total"
    assert lines[8] == ("Define lion", False, "missing node: lion")
    assert lines[9] == ("Answer: 23", False, "wrong answer: 23, not 24")
    assert V.explain(GOLD, "hm")[-1] == ("Answer: none", False, "no answer: the text ends before it; stray text: hm")


# -----------------------------------------------------------------------------
# command line

def run(*args, cwd):
    return subprocess.run([sys.executable, str(ROOT / "verify.py"), *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=60)


@pytest.fixture
def rows(tmp_path):
    small = BEFORE + "so r = a - c = 2 - 0 = 2. Answer: 2."
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"problem": "é", "solution": s}, ensure_ascii=False) + "\n" for s in (GOLD, small)),
                                         encoding="utf-8")
    return tmp_path


def test_self_check(rows):
    done = run("rows.jsonl", cwd=rows)
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout) == {"rows": 2, "responses": 2, "left_out": 0, "outcome": 2, "process": 1.0, "verified": 2, "strict": 2,
                                       "errors": {}}
    assert os.listdir(rows) == ["rows.jsonl"]


def test_responses(rows):
    responses = [{"row": 1, "response": "Answer: 2."}, {"row": 0, "response": MODEL}, {"row": 0, "response": "\ud800 \U0001f600"},
                 {"row": 0, "response": "Define \udfff as L; so L = 5. Answer: 24."}, {"row": 0, "response": ""}]
    (rows / "r.jsonl").write_text("\n".join(map(json.dumps, responses)))
    (rows / "v.jsonl").write_text("an old file")
    done = run("rows.jsonl", "--responses", "r.jsonl", "--out", "v.jsonl", cwd=rows)
    assert done.returncode == 0 and done.stderr == ""
    verdicts = [json.loads(line) for line in (rows / "v.jsonl").read_text(encoding="ascii").splitlines()]
    golds = [json.loads(line)["solution"] for line in (rows / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert verdicts == [{"row": r["row"], **V.verify(golds[r["row"]], r["response"])} for r in responses]
    assert list(verdicts[0]) == ["row", "outcome", "process", "verified", "strict", "errors"]
    assert "extra node: \udfff" in verdicts[3]["errors"]
    summary = json.loads(done.stdout)
    assert {k: summary[k] for k in ("rows", "responses", "outcome", "process", "verified", "strict")} == {
        "rows": 2, "responses": 5, "outcome": 3, "process": 0.2, "verified": 1, "strict": 1}
    assert summary["errors"] == {"missing node": 4, "no answer": 2, "stray text": 1, "extra node": 1, "wrong answer": 1}
    assert sorted(os.listdir(rows)) == ["r.jsonl", "rows.jsonl", "v.jsonl"]
    assert run("rows.jsonl", "--responses", "r.jsonl", cwd=rows).stdout == done.stdout


def test_rows_of_other_modes_have_no_verdict(rows):
    """They are counted, and their lines in --out are null, so that responses and verdicts still pair up."""
    good, _ = [json.loads(line) for line in (rows / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    mixed = [good, {**good, "mode": "forwardreverse", "solution": "?"}, {**good, "mode": "normalforward"}]
    (rows / "mixed.jsonl").write_bytes("\ufeff".encode() + "\r\n".join(map(json.dumps, mixed)).encode())
    done = run("mixed.jsonl", "--out", "v.jsonl", cwd=rows)
    assert json.loads(done.stdout) == {"rows": 3, "responses": 2, "left_out": 1, "outcome": 2, "process": 1.0, "verified": 2, "strict": 2,
                                       "errors": {}}
    verdicts = [json.loads(line) for line in (rows / "v.jsonl").read_text().splitlines()]
    assert [v["strict"] for v in verdicts] == [True, None, True] and verdicts[1] == {
        "row": 1, "outcome": None, "process": None, "verified": None, "strict": None, "errors": ["not a forward problem"]}
    for path, options in (("mixed.jsonl", ["--strict-rows"]), ("others.jsonl", [])):
        (rows / "others.jsonl").write_text(json.dumps(mixed[1]))
        refused = run(path, *options, "--out", "w.jsonl", cwd=rows)
        assert refused.returncode == 2 and "1 rows that are not forward problems" in refused.stderr.splitlines()[-1]
        assert not (rows / "w.jsonl").exists()
    (rows / "utf16.jsonl").write_bytes(json.dumps(good).encode("utf-16"))
    assert run("utf16.jsonl", cwd=rows).returncode == 2


def test_a_response_in_a_file_may_begin_with_the_prompt_of_its_row(tmp_path):
    row = {"problem": "The number of owl equals 5. ", "question": "How many <b> in\nall?"}
    prompt = "<question> The number of owl equals 5. How many <b> in all? </question> <solution>"
    rows = [{**row, "solution": f"{prompt} {GOLD}"}, {"solution": GOLD}, {"problem": 5, "question": "q", "solution": GOLD},
            {**row, "solution": GOLD}]
    responses = [(i, text) for i in range(4) for text in (
        MODEL, prompt + " " + MODEL, "\n" + prompt.replace(" ", " \n ") + MODEL, prompt + prompt + MODEL, "<solution>" + MODEL,
        prompt.replace("5", "6") + MODEL, "<question> 5 q </question> <solution> " + MODEL, prompt)]
    for name, objects in ("rows.jsonl", rows), ("r.jsonl", [{"row": i, "response": text} for i, text in responses]):
        (tmp_path / name).write_text("\n".join(map(json.dumps, objects)))
    assert json.loads(run("rows.jsonl", cwd=tmp_path).stdout)["strict"] == 4
    assert run("rows.jsonl", "--responses", "r.jsonl", "--out", "v.jsonl", cwd=tmp_path).returncode == 0
    verdicts = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    right = [(v["row"], j % 8) for j, v in enumerate(verdicts) if v["strict"]]
    assert right == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0), (3, 1), (3, 2)]
    assert {error.split(":")[0] for v in verdicts[3:7] for error in v["errors"]} == {V.STRAY}


BAD_INPUT = {
    "no file": (["nothing.jsonl"], None, None, "nothing.jsonl"),
    "no responses file": (["rows.jsonl", "--responses", "nothing.jsonl"], None, None, "nothing.jsonl"),
    "a directory": (["."], None, None, "'.'"),
    "not JSON": (["x.jsonl"], "hello", None, "x.jsonl, line 1"),
    "not JSON further down": (["x.jsonl"], json.dumps({"solution": GOLD}) + "\n\n{", None, "x.jsonl, line 3"),
    "not UTF-8": (["x.jsonl"], b"\xff\xfe\xfa\n", None, "x.jsonl, line 1"),
    "not objects": (["x.jsonl"], "[1, 2]", None, "x.jsonl, line 1"),
    "a number beyond measure": (["x.jsonl"], "1" * 5000, None, "x.jsonl, line 1"),
    "a number, null": (["x.jsonl"], "7\nnull", None, "x.jsonl, line 1"),
    "nested beyond measure": (["x.jsonl"], "[" * 100000, None, "x.jsonl, line 1"),
    "no solution": (["x.jsonl"], '{"problem": "x"}', None, '"solution"'),
    "solution is no text": (["x.jsonl"], '{"solution": 7}', None, '"solution"'),
    "empty": (["x.jsonl"], "", None, "no rows"),
    "blank": (["x.jsonl"], "\n \n", None, "no rows"),
    "gold without nodes": (["x.jsonl"], json.dumps({"solution": GOLD}) + '\n{"solution": "Answer: 7."}', None, "row 1"),
    "row too large": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": 2, "response": ""}', "response 1"),
    "row negative": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": -1, "response": ""}', "response 1"),
    "row no integer": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": 1.0, "response": ""}', "response 1"),
    "row text": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": "1", "response": ""}', "response 1"),
    "row bool": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": true, "response": ""}', "response 1"),
    "row missing": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"response": ""}', "response 1"),
    "response no text": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": 0, "response": null}', "r.jsonl, line 1"),
    "response missing": (["rows.jsonl", "--responses", "r.jsonl"], None, '{"row": 0}', "r.jsonl, line 1"),
    "responses empty": (["rows.jsonl", "--responses", "r.jsonl"], None, "", "r.jsonl"),
    "out in no directory": (["rows.jsonl", "--out", "no/v.jsonl"], None, None, "no/v.jsonl"),
    "out is a directory": (["rows.jsonl", "--out", "."], None, None, "--out ."),
    "out is no file": (["rows.jsonl", "--out", os.devnull], None, None, os.devnull),
    "out is the input": (["rows.jsonl", "--out", "rows.jsonl"], None, None, "input"),
    "unknown option": (["rows.jsonl", "--bogus"], None, None, "--bogus"),
}


@pytest.mark.parametrize("args, x, r, says", BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_gets_one_line_and_status_2(rows, args, x, r, says):
    for name, content in (("x.jsonl", x), ("r.jsonl", r)):
        if content is not None:
            (rows / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if "--out" not in args:
        args = [*args, "--out", "v.jsonl"]
    before = {name: (rows / name).read_bytes() for name in os.listdir(rows)}
    done = run(*args, cwd=rows)
    assert done.returncode == 2 and done.stdout == ""
    *usage, last = done.stderr.splitlines()
    assert says in last and last.startswith("verify.py: error: ") and "Traceback" not in done.stderr
    assert usage[0].startswith("usage: ") and len(usage) <= 3
    assert {name: (rows / name).read_bytes() for name in os.listdir(rows)} == before


def test_help_teaches(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("solution", "response", "outcome", "strict", "process", "python verify.py rows.jsonl"):
        assert word in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["rows.jsonl"]])
def test_a_reader_that_has_gone(rows, args):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([sys.executable, str(ROOT / "verify.py"), *args], cwd=rows, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
