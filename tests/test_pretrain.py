"""What pretrain.py promises to somebody who runs it: files, losses, resuming, ranks, and one line for bad input."""
import functools
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import data
import pretrain as P
from conftest import (BROKEN, ROOT, TINY, assert_refused, checkpoint_with, checkpoint_without, end_with_workers,
                      is_finite, metrics, put, run, run_ranks, same)
from model import build_model, load_checkpoint


def pretrain(cwd, *arguments, **more):
    return run(cwd, "pretrain.py", *TINY, *arguments, **more)


# ----------------------------------------------------------------------------------------------------------------------
# what a run writes

def loss_by_hand(model, split, count, loss="all"):
    """Mean surprise, in nats, of the tokens of the first problems of a split, one problem at a time."""
    enc, total, n = data.tokenizer(), 0.0, 0
    mix, distractors = (P.PRESETS["tiny"][name] for name in ("mix", "distractors"))  # one step has no late phase
    for i in range(count):
        row = data.make_row(i, data.parse_mixture(mix), 0, split, data.World(distractors, 2, 20))
        prompt = len(data.encode(enc, data.prompt_text(row)))
        ids = torch.tensor(data.encode(enc, data.prompt_text(row) + data.response_text(row)))
        logp = model(ids[None])[0].detach().log_softmax(-1)
        first = prompt if loss == "solution" else 1
        total -= sum(logp[range(first - 1, len(ids) - 1), ids[first:]].tolist())
        n += len(ids) - first
    return total / n


def test_a_command_as_typed_writes_the_default_files(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "pretrain.py", *TINY[:-1], "1", "--steps", "7", "--log-every", "2"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "0.03M parameters" in done.stdout and "expected time" in done.stdout
    assert "--- held-out problem 0-0: op" in done.stdout and "--- sampled (temperature 0)\n" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["pretrain.jsonl", "pretrain.pt"]
    rows = metrics(tmp_path / "out/pretrain.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert [row["problems"] for row in rows] == [16, 32, 48, 56]
    assert all(0 < row["loss"] < 7 and row["grad_norm"] > 0 and row["tokens_per_s"] > 0 for row in rows)

    checkpoint = load_checkpoint(tmp_path / "out/pretrain.pt")
    assert (checkpoint["stage"], checkpoint["step"], checkpoint["problems"]) == ("pretrain", 7, 56)
    assert checkpoint["id_ops"] == [2, 8] and checkpoint["id_ranges"] == {"zoo": [2, 8]}
    assert checkpoint["config"]["width"] == 32 and checkpoint["config"]["n_layers"] == 1
    assert is_finite(checkpoint)


@pytest.mark.parametrize("loss", ["all", "solution"])
def test_the_losses_and_counts_are_those_computed_by_hand(tmp_path, loss):
    result = pretrain(tmp_path, "--loss", loss, "--steps", 1, "--lr", 0, "--dtype", "float32",
                      "--out", "a.pt")  # the learning rate 0 leaves the model as it was
    assert result.code == 0, result
    row, = metrics(tmp_path / "a.jsonl")
    model = build_model(load_checkpoint(tmp_path / "a.pt"))
    assert row["loss"] == pytest.approx(loss_by_hand(model, "train", 8, loss), rel=1e-4)
    assert row["val_loss"] == pytest.approx(loss_by_hand(model, "eval", 256, loss), rel=1e-4)
    enc, world = data.tokenizer(), data.World(P.PRESETS["tiny"]["distractors"], 2, 20)
    rows = [data.make_row(i, data.parse_mixture(P.PRESETS["tiny"]["mix"]), world=world) for i in range(8)]
    assert row["tokens"] == sum(len(data.encode_row(enc, r)[0]) - 1 for r in rows)


@pytest.mark.parametrize("optimizer, lr", [("adamw", "0.02"), ("muon", "0.02")])
def test_the_loss_falls(tmp_path, optimizer, lr):
    result = pretrain(tmp_path, "--optimizer", optimizer, "--steps", 40, "--log-every", 1, "--lr", lr, "--out", "a.pt")
    assert result.code == 0, result
    rows = metrics(tmp_path / "a.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(640), abs=0.3)  # at first all tokens are alike
    assert np.mean([row["loss"] for row in rows[-5:]]) < 3.5
    assert rows[-1]["val_loss"] < 3.5


def test_the_learning_rate_rises_and_falls(tmp_path):
    result = pretrain(tmp_path, "--steps", 12, "--warmup", 0.25, "--lr", 0.01, "--min-lr", 0.001, "--log-every", 1,
                      "--out", "a.pt")
    assert result.code == 0, result
    rates = [row["lr"] for row in metrics(tmp_path / "a.jsonl")]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    assert rates[2:] == pytest.approx(sorted(rates[2:], reverse=True)) and 0.001 <= rates[-1] < 0.002
    assert (rates[7] + rates[8]) / 2 == pytest.approx((0.01 + 0.001) / 2)  # half way down


def test_a_seed_repeats_a_run_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert pretrain(tmp_path, "--steps", 3, "--seed", seed, "--out", f"{name}.pt").code == 0
    a, b, c = (load_checkpoint(tmp_path / f"{name}.pt") for name in "abc")
    assert same(a["model"], b["model"]) and same(a["optimizers"], b["optimizers"])
    assert not any(torch.equal(a["model"][name], c["model"][name]) for name in a["model"])


@pytest.mark.parametrize("arguments", [["--micro-tokens", "300"], ["--micro-tokens", "100000"], ["--workers", "1"],
                                       ["--compile", "--micro-tokens", "400"], ["--compile", "--workers", "1"]], ids=" ".join)
def test_the_division_of_work_changes_nothing(tmp_path, whole_float32, arguments):
    result = pretrain(tmp_path, *FLOAT32, *arguments, "--out", "a.pt")
    assert result.code == 0, result
    assert_close_runs(tmp_path / "a", whole_float32)


TWO_THREADS = functools.partial(torch.set_num_threads, 2)


def test_two_cores_train_as_one(tmp_path, whole_float32):
    result = pretrain(tmp_path, *FLOAT32, "--out", "a.pt", before=TWO_THREADS)
    assert result.code == 0, result
    assert_close_runs(tmp_path / "a", whole_float32)


def test_on_two_cores_a_killed_run_resumes_exactly(tmp_path):
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert pretrain(folders[0], *TWELVE, before=TWO_THREADS).code == 0
    assert pretrain(folders[1], *TWELVE, send=(signal.SIGKILL, 2), before=TWO_THREADS).code == -signal.SIGKILL
    assert pretrain(folders[1], *TWELVE, "--resume", before=TWO_THREADS).code == 0
    assert_same_run(*folders)


FLOAT32 = "--steps 6 --log-every 1 --dtype float32".split()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    result = run_ranks(folder, "pretrain.py", *TINY, *FLOAT32, "--out", "a.pt")
    assert result.code == 0, result
    assert "2 ranks" in result.out and result.out.count("expected time") == 1
    return folder / "a"


@pytest.fixture(scope="module")
def whole_float32(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float32")
    assert pretrain(folder, *FLOAT32, "--out", "whole.pt").code == 0
    return folder / "whole"


def assert_close_runs(a, b):
    """The same losses and weights up to rounding; a, b: paths without suffix."""
    rows_a, rows_b = metrics(a.with_suffix(".jsonl")), metrics(b.with_suffix(".jsonl"))
    assert [r["step"] for r in rows_a] == [r["step"] for r in rows_b]
    assert [r["loss"] for r in rows_a] == pytest.approx([r["loss"] for r in rows_b], rel=1e-4)
    assert [r["grad_norm"] for r in rows_a] == pytest.approx([r["grad_norm"] for r in rows_b], rel=1e-3)
    assert rows_a[-1]["val_loss"] == pytest.approx(rows_b[-1]["val_loss"], rel=1e-4)
    state_a, state_b = (load_checkpoint(path.with_suffix(".pt"))["model"] for path in (a, b))
    for name in state_a:
        torch.testing.assert_close(state_a[name], state_b[name], rtol=0, atol=1e-3)


def test_two_ranks_train_as_one(two_ranks, whole_float32):
    assert_close_runs(two_ranks, whole_float32)


def test_two_ranks_count_tokens_as_one(two_ranks, whole_float32):
    counts = [[row["tokens"] for row in metrics(path.with_suffix(".jsonl"))] for path in (two_ranks, whole_float32)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("arguments, distractors", [
    ("", (0.5, 0.5)), ("--distractors 3", (3, 3)), ("--late-distractors 4", (0.5, 4)),
    ("--distractors 0 --late-distractors 1", (0, 1))])
def test_distractors_of_the_two_phases(tmp_path, monkeypatch, arguments, distractors):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--preset", "tiny", "--out", str(tmp_path / "a.pt"), *arguments.split()])
    _, args = P.arguments()
    assert (args.distractors, args.late_distractors) == distractors


@pytest.mark.parametrize("late_from, ops", [(0, [3, 3]), (0.5, [2, 3]), (1, [2, 2])])
def test_the_range_of_pretraining_is_that_of_the_phases_it_had(tmp_path, late_from, ops):
    result = pretrain(tmp_path, "--mix", "zoo:2", "--late-mix", "zoo:3", "--late-from", late_from, "--steps", 2, "--out", "a.pt")
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert result.code == 0 and checkpoint["id_ranges"] == {"zoo": ops}
    mix = {0: "zoo:3", 1: "zoo:2"}.get(late_from)
    if mix:  # and what it reports is of it
        alone = pretrain(tmp_path, "--mix", mix, "--steps", 2, "--out", "b.pt")
        assert alone.code == 0 and load_checkpoint(tmp_path / "b.pt")["val_loss"] == checkpoint["val_loss"]


@pytest.mark.parametrize("arguments, mixes", [
    ("", ("zoo:2-6", "zoo:2-6:0.3,zoo:7-8:0.7")), ("--ops 2-10", ("all:2-10",) * 2), ("--mix zoo:3", ("zoo:3",) * 2),
    ("--late-mix school:2", ("zoo:2-6", "school:2")), ("--ops 2 --late-mix school:3", ("all:2", "school:3"))])
def test_the_late_mixture_is_that_of_the_start_unless_told_otherwise(tmp_path, monkeypatch, arguments, mixes):
    monkeypatch.setattr("sys.argv", ["pretrain.py", "--preset", "tiny", "--out", str(tmp_path / "a.pt"), *arguments.split()])
    _, args = P.arguments()
    assert (args.mix, args.late_mix) == mixes


def test_the_name_of_a_quantity_starts_out_with_its_parts(tmp_path):
    start = []
    for parts in (0, 2):
        assert pretrain(tmp_path, "--steps", 1, "--lr", 0, "--name-parts", parts, "--out", "a.pt").code == 0
        start.append(load_checkpoint(tmp_path / "a.pt")["model"]["embed_tokens.weight"])
    without, with_parts = start
    names = data.name_parts(data.tokenizer())
    for name, parts in names.items():
        torch.testing.assert_close(with_parts[name], without[name] + 2 * without[parts].sum(0))
    others = [i for i in range(len(without)) if i not in names]
    assert torch.equal(with_parts[others], without[others])


# ----------------------------------------------------------------------------------------------------------------------
# resuming

TWELVE = "--steps 12 --log-every 1 --save-every 2 --eval-every 5 --out a.pt".split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with an uninterrupted run of twelve steps."""
    folder = tmp_path_factory.mktemp("whole")
    assert pretrain(folder, *TWELVE).code == 0
    return folder


@pytest.fixture(scope="module")
def killed_twice(tmp_path_factory):
    """A folder with the same run, which was killed and resumed twice."""
    folder = tmp_path_factory.mktemp("killed")
    assert pretrain(folder, *TWELVE, send=(signal.SIGKILL, 4)).code == -signal.SIGKILL
    assert load_checkpoint(folder / "a.pt")["step"] == 6 and metrics(folder / "a.jsonl")[-1]["step"] == 8
    with open(folder / "a.jsonl", "a") as f:
        f.write('{"step": 9, "los')  # killed in the middle of a line
    result = pretrain(folder, *TWELVE, "--resume", send=(signal.SIGKILL, 3))
    assert result.code == -signal.SIGKILL and "at step 6\n" in result.out
    assert load_checkpoint(folder / "a.pt")["step"] == 10
    result = pretrain(folder, *TWELVE, "--resume")
    assert result.code == 0 and "at step 10\n" in result.out
    return folder


def assert_same_run(folder, whole):
    """Two runs ended alike, bit for bit, but for the time they took."""
    a, b = load_checkpoint(folder / "a.pt"), load_checkpoint(whole / "a.pt")
    for key in b.keys() - {"seconds", "rng", "run"}:
        assert same(a[key], b[key]), key
    assert len(b["optimizers"]) == 2 and all(o["state"] for o in b["optimizers"])
    rows, rows_whole = metrics(folder / "a.jsonl"), metrics(whole / "a.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, row_whole in zip(rows, rows_whole):
        assert row.keys() == row_whole.keys()
        for key in ("loss", "lr", "grad_norm", "problems", "tokens"):
            assert row[key] == row_whole[key], key
    times = [row["seconds"] for row in rows]
    assert times == sorted(times)


def test_a_killed_run_resumes_exactly(killed_twice, whole):
    assert_same_run(killed_twice, whole)
    assert sorted(os.listdir(killed_twice)) == ["a.jsonl", "a.pt"]


def test_a_checkpoint_of_a_run_differs_from_a_later_one(tmp_path):
    """So that what was made from the earlier one, or measured of it, is not taken for the later one's."""
    runs = []
    for steps in 2, 4:
        assert pretrain(tmp_path, "--steps", 4, "--save-every", 2, "--out", "a.pt", "--resume",
                        send=(signal.SIGKILL, 2) if steps == 2 else None).code in (0, -signal.SIGKILL)
        runs.append(load_checkpoint(tmp_path / "a.pt")["run"])
    assert [run.split("-")[1] for run in runs] == ["2", "4"] and len({run.split("-")[0] for run in runs}) == 1


def test_a_resumed_run_has_the_same_random_state(killed_twice, whole):
    assert same(*(load_checkpoint(folder / "a.pt")["rng"] for folder in (killed_twice, whole)))


def test_a_resumed_run_still_knows_its_last_held_out_loss(killed_twice, whole):
    losses = [row["val_loss"] for row in metrics(whole / "a.jsonl")]
    assert len({*losses}) == 4 and losses[3] is None  # none, then after steps 5, 10 and 12
    assert [row["val_loss"] for row in metrics(killed_twice / "a.jsonl")] == losses


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, whole):
    assert pretrain(tmp_path, *TWELVE, send=(signal.SIGKILL, 1)).code == -signal.SIGKILL
    assert not (tmp_path / "a.pt").exists() and len(metrics(tmp_path / "a.jsonl")) == 2
    result = pretrain(tmp_path, *TWELVE, "--resume")
    assert result.code == 0 and "step 0" in result.out
    assert_same_run(tmp_path, whole)
    assert len(metrics(tmp_path / "a.jsonl.old")) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes_exactly(tmp_path, whole, number):
    result = pretrain(tmp_path, *TWELVE, send=(number, 2))
    assert result.code == 130 and "--resume" in result.out and "Traceback" not in result.err
    step = load_checkpoint(tmp_path / "a.pt")["step"]
    assert step in (4, 5)
    result = pretrain(tmp_path, *TWELVE, "--resume")
    assert result.code == 0 and f"at step {step}\n" in result.out
    assert_same_run(tmp_path, whole)


KEEP = [*TWELVE, "--keep-every", "5"]


def test_checkpoints_on_the_way_are_kept_and_can_be_started_from(tmp_path, whole):
    assert pretrain(tmp_path, *KEEP, send=(signal.SIGKILL, 7)).code == -signal.SIGKILL
    assert pretrain(tmp_path, *KEEP, "--resume").code == 0
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["a-10.pt", "a-5.pt", "a.pt"]
    kept, last = load_checkpoint(tmp_path / "a-5.pt"), load_checkpoint(tmp_path / "a.pt")
    assert (kept["step"], last["step"]) == (5, 12) and kept["run"] == last["run"].split("-")[0] + "-5"
    assert same(load_checkpoint(whole / "a.pt")["model"], last["model"])  # keeping changes nothing
    for name in ("a-5", "a"):
        result = run(tmp_path, "midtrain.py", "--init", f"{name}.pt", *"--device cpu --batch 8 --show 0 --steps 1".split(), "--out",
                     f"{name}-mid.pt")
        assert result.code == 0, result
    assert not same(*[load_checkpoint(tmp_path / f"{name}-mid.pt")["model"] for name in ("a-5", "a")])
    assert_refused(pretrain(tmp_path, *KEEP), "a-5.pt")  # of another run
    (tmp_path / "a.pt").rename(tmp_path / "b.pt")  # nothing to resume, so this would be another run, too
    assert_refused(pretrain(tmp_path, *KEEP, "--resume"), "a-5.pt")
    (tmp_path / "b.pt").rename(tmp_path / "a.pt")
    (tmp_path / "a-5.pt").unlink()
    (tmp_path / "a-5.pt").mkdir()
    assert_refused(pretrain(tmp_path, *KEEP, "--resume"), "a-5.pt")


def test_what_is_kept_before_the_late_phase_does_not_know_of_it(tmp_path):
    late = "--steps 6 --late-from 0.5 --keep-every 3 --out a.pt --mix zoo:2-3 --late-mix zoo:2-5".split()
    assert pretrain(tmp_path, *late).code == 0
    assert [load_checkpoint(tmp_path / f"a-{step}.pt")["id_ranges"] for step in (3, 6)] == [{"zoo": [2, 3]}, {"zoo": [2, 5]}]


def test_a_new_run_keeps_what_the_last_one_left(tmp_path, whole):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    result = pretrain(tmp_path, "--out", "a.pt", "--steps", 1, "--log-every", 1)
    assert result.code == 0 and "a.pt.old" in result.out and load_checkpoint(tmp_path / "a.pt")["step"] == 1
    for name in ("a.pt", "a.jsonl"):
        assert (tmp_path / f"{name}.old").read_bytes() == (whole / name).read_bytes()
    assert [row["step"] for row in metrics(tmp_path / "a.jsonl")] == [1]


def test_links_to_the_files_of_a_run_stay_links(tmp_path):
    """A first run, a second one, which sets the files of the first aside, and one that resumes the second."""
    (tmp_path / "far").mkdir()
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).symlink_to(f"far/{name}")
    for arguments in ([], [], ["--resume"]):
        result = pretrain(tmp_path, *"--out a.pt --steps 2 --log-every 1".split(), *arguments)
        assert result.code == 0, result
    assert sorted(os.listdir(tmp_path / "far")) == ["a.jsonl", "a.jsonl.old", "a.pt", "a.pt.old"]
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.pt", "far"]
    assert (tmp_path / "a.pt").is_symlink() and (tmp_path / "a.jsonl").is_symlink()
    assert [[row["step"] for row in metrics(tmp_path / "far" / name)] for name in ("a.jsonl", "a.jsonl.old")] == [[1, 2]] * 2


def test_a_second_run_to_the_same_files_is_refused_until_the_first_has_ended(tmp_path):
    """Two names of a checkpoint may share the metrics. A run has ended when it was killed, too."""
    endless = "--steps 100000 --log-every 1 --save-every 1 --workers 1 --out m.pt".split()
    first = subprocess.Popen([sys.executable, ROOT / "pretrain.py", *TINY, *endless], cwd=tmp_path, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "m.pt").exists() and first.poll() is None:
            time.sleep(0.05)
        for arguments, ranks in (["--out", "m.pt"], 1), (["--out", "m"], 2), (["--resume", *endless], 1):
            assert_refused(pretrain(tmp_path, "--steps", 1, *arguments, ranks=ranks), "another run", "m.jsonl")
        assert first.poll() is None and {*os.listdir(tmp_path)} <= {"m.pt", "m.pt.part", "m.jsonl"}
    finally:
        first.kill()
        first.wait()
    steps = [row["step"] for row in metrics(tmp_path / "m.jsonl")]
    assert steps == [*range(1, len(steps) + 1)] and len(steps) > 1
    result = pretrain(tmp_path, "--steps", 1, "--log-every", 1, "--out", "m.pt")
    assert result.code == 0 and len(metrics(tmp_path / "m.jsonl.old")) == len(steps), result


def test_outputs_of_alike_names_do_not_meet(tmp_path):
    for out in ("lr0.01", "lr0.02", "lr0.pt"):
        assert pretrain(tmp_path, "--out", out, "--steps", 1, "--log-every", 1).code == 0
    assert sorted(os.listdir(tmp_path)) == ["lr0.01", "lr0.01.jsonl", "lr0.02", "lr0.02.jsonl", "lr0.jsonl", "lr0.pt"]


def test_an_interrupt_in_the_last_step_leaves_nothing_to_resume(tmp_path):
    """It comes with the checkpoint of step 2 and is seen in step 3. What follows in the shell (&&) is not wanted."""
    result = pretrain(tmp_path, "--out", "a.pt", "--steps", 3, "--save-every", 1, send=(signal.SIGINT, 2))
    assert result.code == 130 and "--resume" not in result.out and load_checkpoint(tmp_path / "a.pt")["step"] == 3


def test_a_small_learning_rate_does_not_rise_to_the_end_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, ends in (("--lr 2e-5", (2e-5, 2e-5)), ("--lr 1e-3", (1e-3, 3e-5)), ("--lr 2e-5 --min-lr 1e-6", (2e-5, 1e-6))):
        monkeypatch.setattr(sys, "argv", f"pretrain.py --device cpu --preset 100m --warmup 0 {options}".split())
        _, args = P.arguments()
        rates = [P.learning_rate(step, args) for step in range(1, args.steps + 1, 500)]
        assert rates == sorted(rates, reverse=True) and P.learning_rate(args.steps, args) == pytest.approx(ends[1])
        assert rates[0] == pytest.approx(ends[0], rel=1e-3)


def test_with_cuda_no_option_is_needed(tmp_path, monkeypatch, pretend_cuda):
    """Only the choice is tested here: what a machine with CUDA would run without any option but the ops."""
    monkeypatch.chdir(tmp_path)
    pretend_cuda(bfloat16=True)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--ops", "2-10"])
    _, args = P.arguments()
    assert (args.device, args.preset, args.dtype, args.compile) == ("cuda", "100m", "bfloat16", True)
    assert args.n_layers == 12 and args.width == 768 and args.workers >= 1 and args.micro_tokens == 32_768
    pretend_cuda(bfloat16=False)  # a device before 2020 has no kernel for packed problems
    _, args = P.arguments()
    assert (args.preset, args.dtype, args.compile) == ("100m", "float32", False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--compile"])
    with pytest.raises(SystemExit, match="2"):
        P.arguments()
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--device", "cpu"])
    _, args = P.arguments()
    assert (args.preset, args.compile, args.workers) == ("tiny", False, 0)


def test_with_cuda_a_pass_is_as_large_as_the_memory_allows(tmp_path, monkeypatch, pretend_cuda):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    sizes = []
    for gib, bfloat16 in (40, True), (24, True), (15, False), (8, True), (1, False):
        pretend_cuda(bfloat16, gib)
        sizes.append(P.arguments()[1].micro_tokens)
    assert sizes == [32_768, 16_384, 8192, 4096, 1024]


def test_without_a_compiler_cuda_goes_on_uncompiled_and_says_so(tmp_path, monkeypatch, pretend_cuda, capsys):
    monkeypatch.chdir(tmp_path)
    pretend_cuda(bfloat16=True, compiles=False)
    monkeypatch.setattr(sys, "argv", ["pretrain.py"])
    _, args = P.arguments()
    assert (args.dtype, args.compile) == ("bfloat16", False)
    assert [line for line in capsys.readouterr().out.splitlines() if "torch.compile" in line and "no_compiler_here" in line]


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc, to see the workers")
@pytest.mark.parametrize("number, group", [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)])
def test_workers_leave_signals_to_the_run_and_end_with_it(tmp_path, number, group):
    """torchrun and `timeout` signal a whole group, and nobody can answer SIGKILL."""
    arguments = [*TINY, *"--steps 100000 --log-every 1 --eval-every 100000 --save-every 100000 --out a.pt --workers 2".split()]
    code, messages, n_workers, left = end_with_workers(tmp_path, "pretrain.py", arguments, number, group)
    assert n_workers == 2 and not left, messages
    if group:
        assert code == 130 and "Traceback" not in messages, messages
        assert load_checkpoint(tmp_path / "a.pt")["step"] >= 1


def test_resuming_a_finished_run_is_harmless(whole, tmp_path):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    result = pretrain(tmp_path, *TWELVE, "--resume")
    assert result.code == 0, result
    assert_same_run(tmp_path, whole)


def test_resuming_with_other_arguments_is_refused(whole, tmp_path):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    for option, value in (("--lr", "0.1"), ("--batch", "16"), ("--mix", "zoo:2-4"), ("--width", "64"), ("--seed", "1"),
                          ("--optimizer", "adamw")):
        assert_refused(pretrain(tmp_path, *TWELVE, "--resume", option, value), option.strip("-"), value)
    for name in ("a.pt", "a.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


BROKEN_HERE = BROKEN | {
    "another stage": checkpoint_with(stage="grpo"),
    "without optimizers": checkpoint_without("optimizers"),
    "without recipe": checkpoint_without("recipe"),
    "wrong optimizers": checkpoint_with(optimizers=[1, 2]),
    "wrong rng": checkpoint_with(rng="x"),
}


@pytest.mark.parametrize("kind", BROKEN_HERE)
def test_resuming_a_broken_checkpoint_is_refused(whole, tmp_path, kind):
    path = tmp_path / "a.pt"
    put(BROKEN_HERE[kind](whole / "a.pt"), path)
    before = path.read_bytes()
    assert_refused(pretrain(tmp_path, *TWELVE, "--resume"), "a.pt")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# runs that explode

EXPLODE = "--steps 12 --log-every 1 --save-every 1 --out a.pt".split()


@pytest.fixture(scope="module", params=["--optimizer adamw --lr 1e6", "--optimizer muon --lr 100"])
def exploded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exploded")
    return folder, pretrain(folder, *EXPLODE, *request.param.split())


def test_an_exploding_run_stops_and_says_why(exploded):
    folder, result = exploded
    assert result.code == 1 and "--lr" in result.out.splitlines()[-1] and "Traceback" not in result.err
    assert not (folder / "a.pt").exists() or is_finite(load_checkpoint(folder / "a.pt"))


def test_the_checkpoint_kept_is_from_before_the_explosion(exploded):
    folder, _ = exploded
    if not (folder / "a.pt").exists():
        pytest.skip("this run broke at its first step, before there was a good checkpoint")
    loss = loss_by_hand(build_model(load_checkpoint(folder / "a.pt")), "train", 8)
    assert loss < 2 * math.log(640)


def test_an_exploded_model_is_not_kept(tmp_path):
    result = pretrain(tmp_path, *"--steps 12 --lr 1e4 --warmup 0 --keep-every 3 --eval-every 100 --out a.pt".split())
    assert result.code != 0 and not [*tmp_path.glob("*.pt")], result


def test_a_model_that_died_is_no_success(tmp_path):
    """The weights are so large that they overflow: the loss is that of guessing, the gradient 0, the held-out loss NaN."""
    result = pretrain(tmp_path, *EXPLODE, "--steps", 3, "--optimizer", "muon", "--lr", "1e6")
    assert result.code == 1 and "--lr" in result.out.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# bad input

BAD = [  # arguments, words in the last line
    ("--ops 10-2", "10-2"), ("--ops 0-1", "0-1"), ("--ops 1-500", "1-500"), ("--ops x", "x"), ("--ops 2-", "2-"),
    ("--mix nonsense", "nonsense"), ("--mix zoo:2-4:x", "x"), ("--mix zoo:2-4:-1", "-1"), ("--mix zoo:2:0", "zero"),
    ("--ops 2-4 --mix zoo:2", "not both"), ("--mix=", "mixture"), ("--ops=", "2-10"), ("--late-mix=", "mixture"),
    ("--steps -1", "--steps"), ("--steps 0", "--steps"), ("--steps many", "--steps"), ("--batch 0", "--batch"),
    ("--micro-tokens 0", "--micro-tokens"), ("--log-every 0", "--log-every"), ("--save-every 0", "--save-every"),
    ("--preset nope", "nope"), ("--optimizer nope", "nope"), ("--loss nope", "nope"), ("--dtype nope", "nope"),
    ("--lr -1", "--lr"), ("--lr nan", "--lr"), ("--lr inf", "--lr"), ("--warmup 1", "--warmup"), ("--clip 0", "--clip"),
    ("--weight-decay -1", "--weight-decay"), ("--distractors 99", "distractors"), ("--distractors nan", "distractors"),
    ("--width 30", "--width"), ("--n-heads 3 --n-kv-heads 2 --width 36", "--n-heads"), ("--n-kv-heads 0", "--n-kv-heads"),
    ("--seed -1", "--seed"), ("--seed 99999999999999999999", "--seed"), ("--device nope", "nope"), ("--nope", "--nope"),
    ("--device meta", "--device cpu"), (f"--width {10 ** 9}", "--width"), (f"--n-layers {10 ** 9}", "--n-layers"),
    ("--out afile/a.pt", "afile"), ("--out adirectory", "adirectory"), ("--out adirectory/", "adirectory"),
    ("--out a.jsonl", "a.jsonl"),
]


@pytest.mark.parametrize("arguments, word", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, arguments, word):
    (tmp_path / "afile").write_text("keep me")
    (tmp_path / "adirectory").mkdir()
    assert_refused(pretrain(tmp_path, "--steps", 2, *arguments.split()), word)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "afile"]
    assert (tmp_path / "afile").read_text() == "keep me"


def test_a_batch_may_leave_a_rank_without_problems(tmp_path):
    losses = []
    for ranks in (1, 2):
        result = pretrain(tmp_path, *FLOAT32, "--batch", 1, "--out", f"{ranks}.pt", ranks=ranks)
        assert result.code == 0, result
        losses.append([row["loss"] for row in metrics(tmp_path / f"{ranks}.jsonl")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_cuda_where_there_is_none_is_refused(tmp_path):
    assert_refused(pretrain(tmp_path, "--steps", 2, "--device", "cuda"), "--device cuda cannot compute here")
