"""The four commands in a row, at toy size: without paths each reads what the one before wrote."""
import json
import os

from conftest import TINY, metrics, run
from model import load_checkpoint


def test_the_four_commands_in_a_row(tmp_path):
    grpo = "--device cpu --prompts 2 --rollouts 2 --updates 1 --max-new 16 --eval-problems 1"
    for script, arguments in (("pretrain.py", [*TINY, "--steps", 4]),
                              ("midtrain.py", "--device cpu --batch 8 --show 0 --steps 3".split()),
                              ("grpo.py", [*grpo.split(), "--steps", 2])):
        result = run(tmp_path, script, *arguments)
        assert result.code == 0, result
    names = ["pretrain", "midtrain", "grpo"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(f"{name}.{kind}" for name in names for kind in ("jsonl", "pt"))
    checkpoints = [load_checkpoint(tmp_path / f"out/{name}.pt") for name in names]
    assert [c["stage"] for c in checkpoints] == names and [c["step"] for c in checkpoints] == [4, 3, 2]
    assert [c["id_ops"] for c in checkpoints] == [[2, 8]] * 3 and len({str(c["config"]) for c in checkpoints}) == 1
    assert [c["id_ranges"] for c in checkpoints] == [{"zoo": [2, 8]}] * 3
    assert all("loss" in row for name in names for row in metrics(tmp_path / f"out/{name}.jsonl"))

    result = run(tmp_path, "evaluate.py", "--device", "cpu", "--n", 2, "--problems", 1)  # no checkpoint is named
    assert result.code == 0, result
    paths = [f"out/{name}.pt" for name in names]
    found = json.loads((tmp_path / "out/eval.json").read_text())["checkpoints"]
    assert [*found] == paths and [found[path]["stage"] for path in paths] == names
    assert all({*found[path]["groups"]} == {"ID", "OOD-edge", "OOD-hard"} for path in paths)
    table = result.out.split("OOD-hard")[0]
    assert all(name in table for name in names)

    os.remove(tmp_path / "out/midtrain.pt")  # it compares those that exist
    result = run(tmp_path, "evaluate.py", "--device", "cpu", "--n", 1, "--problems", 1, "--ops", "2")
    assert result.code == 0, result
    assert [*json.loads((tmp_path / "out/eval.json").read_text())["checkpoints"]] == ["out/pretrain.pt", "out/grpo.pt"]
