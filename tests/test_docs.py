"""
README.md and docs/ say what is true: their commands parse, the files and options they name exist, their tables are those in
assets/, and README stays short.
"""
import argparse
import importlib
import json
import re
import shlex
import signal
import statistics
import sys
from pathlib import Path

import pytest

import data
import findings
from conftest import ROOT

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
SCRIPTS = ["data.py", "model.py", "verify.py", "pretrain.py", "midtrain.py", "grpo.py", "evaluate.py", "tests/findings.py",
           "tests/coverage.py", "tests/kill_resume.py"]


def commands(text):
    """Every python and torchrun command of a page, from its code blocks (also comments in them) and its inline code."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"^    .*", text, re.M)
    found = [part for block in blocks for line in block.splitlines() for part in re.split(r"&&|#", line)]
    found += [part for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```|^    .*", "", text, flags=re.M | re.S))
              for part in re.split(r"&&|#", " ".join(code.split()))]
    return list(dict.fromkeys(c for c in map(str.strip, found) if re.match(r"(OMP_NUM_THREADS=1 )?(python|torchrun) ", c)))


COMMANDS = [(page, command) for page, text in TEXTS.items() for command in commands(text)]


class Parsed(Exception):
    pass


def parsed(monkeypatch, script, arguments):
    """What the script's own parser makes of the arguments: (parser, namespace). A refusal is exit status 2."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(parser, *args):
        raise Parsed(parser, parse_args(parser, *args))

    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    module, handler = importlib.import_module(Path(script).stem), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch, pytest.raises(Parsed) as caught:
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        try:
            (getattr(module, "arguments", None) or module.main)()
        finally:
            signal.signal(signal.SIGTERM, handler)
    return caught.value.args


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 40 and {page for page, _ in COMMANDS} == {*PAGES}
    assert ("README.md", "python pretrain.py") in COMMANDS and ("README.md", "python data.py --mix zoo:6 --seed 1") in COMMANDS


@pytest.mark.parametrize("page, command", COMMANDS, ids=[f"{page}: {command}" for page, command in COMMANDS])
def test_a_command_parses(monkeypatch, page, command):
    words = shlex.split(command.removeprefix("OMP_NUM_THREADS=1 "))
    if words[0] == "torchrun":
        assert re.fullmatch(r"--nproc_per_node=\d+", words.pop(1))
    script, *arguments = words[1:]
    if script == "-m":
        assert arguments[0] in ("pytest", "venv")
    elif script == "tests/bench.py":
        source = (ROOT / script).read_text(encoding="utf-8")
        assert all(f"def bench_{name}(" in source or f"def {name}(" in source for name in arguments)
    else:
        assert script in SCRIPTS
        if arguments != ["--help"]:
            parsed(monkeypatch, script, arguments)


def test_an_option_that_does_not_exist_is_found(monkeypatch):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "pretrain.py", ["--nope"])


def test_options_and_files_that_are_named_exist(monkeypatch):
    needed = {"data.py": [], "verify.py": ["rows.jsonl"], "model.py": ["a.pt", "--to-hf", "d"], "tests/findings.py": ["edge"]}
    options = {option for script in SCRIPTS for action in parsed(monkeypatch, script, needed.get(script, []))[0]._actions
               for option in action.option_strings} | {"--nproc_per_node", "--local-dir"}  # of torchrun and hf
    for page, text in TEXTS.items():
        assert not {*re.findall(r"(?<![\w-])--[a-z][\w-]*", text)} - options, page
        linked = [path for path in re.findall(r"\]\(([^)]+)\)", text) if not path.startswith("http")]
        assert all((ROOT / page).parent.joinpath(path.partition("#")[0]).exists() for path in linked), page
        named = re.findall(r"`((?:\w+/)*\w+\.(?:py|md|txt)|assets/[\w.]+)`", text)
        assert all((ROOT / path).exists() or (ROOT / "tests" / path).exists() for path in named), (page, named)


def test_readme_is_short():
    words = README.split()
    assert len(words) <= 1800
    assert max(map(len, README.splitlines())) <= 120
    assert "](assets/edge.png)" in " ".join(words[:200])
    assert "total number of adult animals in Oakridge Riverside = 6" in " ".join(words[:600])


def test_the_problem_in_readme_is_the_one_that_its_command_shows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", "data.py --mix zoo:6 --seed 1".split())
    data.main()
    text = " ".join(README.split())
    for paragraph in capsys.readouterr().out.strip().split("\n\n")[1:]:
        assert " ".join(paragraph.split()) in text


def short(x):
    return f"{x:.3f}".replace("0.", ".")


def test_the_table_of_the_story():
    seeds = json.loads((ROOT / "assets/story.json").read_text())["seeds"]
    for group in "ID", "OOD-edge", "OOD-hard":
        cells = []
        for stage in ("pretrain", "midtrain", "grpo"):
            for k in ("pass@1", "pass@16"):
                values = [of_seed[stage]["groups"][group]["verified"][k][0] for of_seed in seeds.values()]
                spread = "{} ({}-{})".format(*map(short, (statistics.mean(values), min(values), max(values))))
                cells.append(spread if max(values) else "0")
        assert f"|{group}|{'|'.join(cells)}|" in README
    changes = [of_seed["grpo"]["against_previous"]["OOD-edge"] for of_seed in seeds.values()]
    for k in "pass@1", "pass@16":
        assert "{}, {} and {}".format(*(short(abs(change[k])) for change in changes)) in " ".join(README.split())


RESULTS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "assets").glob("*.json") if path.stem in findings.FINDINGS}


@pytest.mark.parametrize("name", RESULTS)
def test_the_tables_and_verdicts_of_a_finding(name):
    result, page = RESULTS[name], " ".join(TEXTS["docs/findings.md"].split())
    finding, labels = findings.FINDINGS[name], {model: how["label"] for model, how in result["models"].items() if how["label"]}
    of_table = [*result["numbers"].values()][-1]
    ks = [k for k in next(iter(next(iter(of_table.values())).values())) if k.startswith("pass@")]
    table = findings.table(of_table, labels, [ks[0], ks[-1], *finding["measures"]], finding["paper"])
    assert " ".join(table.split()) in page
    for claim in result["claims"]:
        assert f"{claim['claim']}: **{claim['verdict']}**. {'; '.join(claim['evidence'])}." in page
    assert f"tests/findings.py {name} " in page and result["machine"] in page


def test_what_is_said_of_a_finding_in_readme():
    """Each number of its line is one of the results. The open questions have no number there."""
    for name, result in RESULTS.items():
        lines = [part for part in re.split(r"\n(?=\d\. |\n)", README) if f"tests/findings.py {name}`" in part]
        known = {short(abs(x)) for x in numbers_in(result["numbers"])}
        ours = [" ".join(line.split()).partition("Here: ")[2] for line in lines if line[0].isdigit()]
        assert lines and all({*re.findall(r"\.\d{3}", line)} <= known and re.findall(r"\.\d{3}", line) for line in ours)
        assert len(ours) == (name != "questions")


def numbers_in(tree):
    if isinstance(tree, float):
        return [tree]
    return [x for part in (tree.values() if isinstance(tree, dict) else tree or ()) for x in numbers_in(part)]
