"""
Coverage: does a mixture hold all that the problems of other ops consist of? If not, a model that fails there may lack kinds of steps,
and RL has nothing to compose.

    python tests/coverage.py                                         each preset of pretrain.py, from its last op on
    python tests/coverage.py --mix zoo:2-8 --max-parents 2 --max-value 20 --distractors 1
"""
import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import run_script  # noqa: E402
import data  # noqa: E402


def features(row):
    """What a solution consists of: kinds of steps, edges, and the numbers of digits of the values.

    The number of steps is not among them: the length of the chain is what may be new.
    """
    shape, found = {}, set()
    for name, letter, parents, work in data.steps_of(row):
        literal_op = re.search(r"\d ([+*]) [A-Za-z]", work)
        shape[letter] = (name.startswith("total "), len(parents))
        found |= {(*shape[letter], literal_op[1] if literal_op else "", " - " in work), len(work.split()[-1]),
                  *[(shape[p], shape[letter]) for p in parents]}
    return found


def coverage(mixture, other, world=data.World(), n=2000):
    """The share of problems of `other`, a mixture or an op, that hold nothing new for a model trained on `mixture`.

    That is, all their `features` occur in n training problems. If the share is small, a model fails for want of kinds of
    steps, not because the chain is longer.
    """
    other = other if isinstance(other, data.Mixture) else data.parse_mixture(str(other))
    known = set().union(*[features(data.make_row(i, mixture, world=world)) for i in range(n)])
    return sum(features(data.make_row(i, other, split="eval", world=world)) <= known for i in range(n)) / n


def report(mix, world):
    mixture = data.parse_mixture(mix)
    contexts, last = sorted({context for context, _ in mixture.cells}), max(op for _, op in mixture.cells)
    for op in range(last, min(2 * last, data.MAX_OP) + 1):
        other = data.parse_mixture(",".join(f"{context}:{op}" for context in contexts))
        print(f"  op {op}: {coverage(mixture, other, world):.3f}", flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--mix", help="mixture of pre-training (default: those of the presets)")
    p.add_argument("--distractors", type=float, default=2.0)
    p.add_argument("--max-parents", type=int, default=4)
    p.add_argument("--max-value", type=int, default=data.MAX_VALUE)
    args = p.parse_args()
    try:
        if args.mix:
            print(f"share of problems without new kinds of steps after {args.mix}")
            return report(args.mix, data.World(args.distractors, args.max_parents, args.max_value))
    except ValueError as error:
        p.error(str(error))
    import pretrain
    for name in "tiny", "100m":  # the other sizes have the world of 100m
        preset = pretrain.PRESETS[name]
        print(f"share of problems without new kinds of steps after {preset['late_mix']}, the late phase of preset {name}")
        report(preset["late_mix"], data.World(preset["late_distractors"], preset["max_parents"], preset["max_value"]))


if __name__ == "__main__":
    run_script(main)
