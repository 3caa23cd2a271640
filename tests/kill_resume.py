"""
Kills each stage with SIGKILL at moments chosen at random, resumes it, and compares what comes out with an uninterrupted run.

    python tests/kill_resume.py                          five moments a stage, about a minute on two cores
    python tests/kill_resume.py --moments 20 --seed 7    more of them; the seed decides the moments

All runs use one thread. "identical" is bit for bit: the weights, the state of the optimizers, and every number in the
metrics but times and speeds. The exit status is 1 if anything differs.
"""
import argparse
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from conftest import metrics, run, same
from model import load_checkpoint

SIZE = "--n-layers 2 --width 64 --n-heads 2 --n-kv-heads 1 --mlp 128"
STAGES = {  # every one saves several times, in and out of step with its evaluations
    "pretrain": f"--preset tiny --device cpu {SIZE} --batch 16 --steps 30 --save-every 7 --eval-every 20 --log-every 1 "
                "--show 0",
    "midtrain": "--device cpu --batch 16 --steps 30 --save-every 7 --eval-every 20 --log-every 1 --show 0",
    # with noise, so that a model this raw gets rewards
    "grpo": "--device cpu --prompts 4 --rollouts 4 --steps 14 --save-every 3 --eval-every 8 --eval-problems 4 --max-new 64 "
            "--curriculum --reward process --reward-noise 0.3,0.3 --kl 0.05",
}
TIMES = {"seconds", "run", "tokens_per_s", "problems_per_s", "waiting", "rollout_s", "verify_s", "update_s"}


def final(folder, stage):
    """What must be the same: the checkpoint and the metrics, without times."""
    checkpoint = load_checkpoint(folder / f"out/{stage}.pt")
    rows = metrics(folder / f"out/{stage}.jsonl")
    return [{k: v for k, v in numbers.items() if k not in TIMES} for numbers in (checkpoint, *rows)]


def last_step(path):
    try:
        return metrics(path)[-1]["step"]
    except (OSError, ValueError, IndexError):  # none yet, or killed while it wrote the line
        return 0


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--moments", type=int, default=5, help="how often each stage is killed (default 5)")
    p.add_argument("--seed", type=int, help="of the moments (default: another one each time)")
    args = p.parse_args()
    if args.moments < 1:
        p.error("--moments must be at least 1")
    seed = random.randrange(10 ** 6) if args.seed is None else args.seed
    rng, differ = random.Random(seed), 0
    print(f"seed {seed}\n{'stage':<10}{'killed after':>13}{'of':>8}{'at step':>9}{'resumed at':>12}   identical", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        (whole / "out").mkdir(parents=True)
        run(whole, "verify.py", "--help")  # starts the server that the others are forked from
        for stage, arguments in STAGES.items():
            began = time.time()
            result = run(whole, f"{stage}.py", *arguments.split())
            duration = time.time() - began
            if result.code:
                sys.exit(f"{stage}.py failed:\n{result.out}{result.err}")
            expected = final(whole, stage)
            kills = 0
            while kills < args.moments:
                cwd, moment = killed / f"{stage}{time.time()}", rng.uniform(0, duration)
                (cwd / "out").mkdir(parents=True)
                for path in (whole / "out").glob("*.pt"):
                    if path.stem != stage:  # what it starts from
                        (cwd / "out" / path.name).write_bytes(path.read_bytes())
                if run(cwd, f"{stage}.py", *arguments.split(), kill_after=moment).code != -signal.SIGKILL:
                    continue  # it was faster this time, and there was nothing left to kill
                kills += 1
                at = last_step(cwd / f"out/{stage}.jsonl")
                saved = load_checkpoint(cwd / f"out/{stage}.pt")["step"] if (cwd / f"out/{stage}.pt").exists() else 0
                result = run(cwd, f"{stage}.py", *arguments.split(), "--resume")
                identical = result.code == 0 and same(final(cwd, stage), expected)
                differ += not identical
                print(f"{stage:<10}{moment:>11.2f} s{duration:>6.1f} s{at:>9}{saved:>12}   {'yes' if identical else 'NO'}",
                      flush=True)
                if result.code:
                    print(result.out + result.err)
    print("all are identical" if not differ else f"{differ} of {args.moments * len(STAGES)} differ")
    sys.exit(differ > 0)


if __name__ == "__main__":
    main()
