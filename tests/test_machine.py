"""What all scripts promise about the machine they run on: its cores, memory and compiler, streams that end, signals."""
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import model as M
from conftest import ROOT, TINY, assert_refused, metrics, run
from model import load_checkpoint

STAGES = ["pretrain.py", "midtrain.py", "grpo.py"]
RUN = [*TINY[:-1], *"1 --steps 2 --log-every 1 --out a.pt".split()]
EVALUATE = "a.pt --device cpu --n 2 --problems 1 --ops 2 --show 1 --json a.json".split()


def start(cwd, script, *arguments, redirect="", env=(), options=(), **more):
    """A script, started by a shell that redirects its streams. Signals are as in a terminal, however the tests were started."""
    return subprocess.Popen(["/bin/sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, *options, ROOT / script, *arguments],
                            cwd=cwd, text=True, env={**os.environ, **dict(env)}, preexec_fn=default_signals,
                            **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more})


def default_signals():
    for number in signal.SIGINT, signal.SIGHUP:
        signal.signal(number, signal.SIG_DFL)


def ended(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


# what `run` calls before a script: its streams are then ...


def ascii_only():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def closed():
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None


def without_reader():
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout, sys.stderr = (open(os.dup2(writer, fd), "w", encoding="utf-8") for fd in (1, 2))


def no_compiler():
    os.environ.update(PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=os.path.abspath("cache"))
    torch.compile = compile  # not as `run` replaces it


compile = torch.compile


# ----------------------------------------------------------------------------------------------------------------------
# cores, memory, compiler


@pytest.mark.parametrize("files, expected", [
    ({}, 8), ({"cpu.max": "max 100000\n"}, 8), ({"cpu.max": "150000 100000\n"}, 2), ({"cpu.max": "900000 100000\n"}, 8),
    ({"cpu.max": "5000 100000\n"}, 1), ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
    ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3)], ids=str)
def test_cores_are_those_of_the_affinity_and_the_quota(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert M.n_cores(tmp_path) == expected


@pytest.mark.parametrize("env, expected", [({}, 3), ({"OMP_NUM_THREADS": "6"}, 6)], ids=str)
def test_torch_starts_no_more_threads_than_there_are_cores(monkeypatch, env, expected):
    threads = [6]
    monkeypatch.setattr(M, "n_cores", lambda: 3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    M.set_up(type("Args", (), dict(device="cpu", dtype="float32", seed=0)))
    assert threads[-1] == expected


def allocate():
    torch.empty(2 ** 60)


def out_of_memory_on_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")


def out_of_memory_in_python():
    raise MemoryError


@pytest.mark.parametrize("main", [allocate, out_of_memory_on_cuda, out_of_memory_in_python])
def test_too_little_memory_is_one_line_that_says_what_to_do(main):
    with pytest.raises(SystemExit) as end:
        M.run_script(main)
    assert "\n" not in end.value.code and all(word in end.value.code for word in ("memory", "--micro-tokens", "--rows", "tiny"))


def fault():
    raise RuntimeError("a fault")


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a fault"):
        M.run_script(fault)


def test_without_a_compiler_compile_is_refused_before_old_files_are_moved(tmp_path):
    (tmp_path / "a.pt").write_text("keep me")
    assert_refused(run(tmp_path, "pretrain.py", *RUN, "--compile", before=no_compiler), "--compile")
    assert (tmp_path / "a.pt").read_text() == "keep me" and not (tmp_path / "a.jsonl").exists()


# ----------------------------------------------------------------------------------------------------------------------
# streams


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    result = run(folder, "pretrain.py", *RUN, "--dtype", "float32", before=ascii_only)
    assert result.code == 0, result
    return folder, result


def test_a_stream_that_is_not_utf8_shows_what_it_can(trained, tmp_path):
    """The tree of a problem has lines that ASCII lacks."""
    assert "?? " in trained[1].out
    code, out, err = ended(start(tmp_path, "data.py", "--ops", "6", env=dict(PYTHONIOENCODING="cp1252")))
    assert code == 0 and "?? " in out and "Define" in out, err


def test_the_first_line_says_what_was_chosen_and_how_to_choose(trained):
    first = trained[1].out.splitlines()[0]
    for words in "preset tiny", "float32 on cpu", " tokens a pass", "--preset", "--device", "--dtype", "--micro-tokens":
        assert words in first
    assert " ranks" not in first


@pytest.mark.parametrize("streams", [closed, without_reader])
def test_a_run_outlives_its_audience(trained, tmp_path, streams):
    """As with `2>&1 | head -1`. Its status is 0, so that `&&` goes on."""
    assert run(tmp_path, "pretrain.py", *RUN, before=streams).code == 0
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 2 and len(metrics(tmp_path / "a.jsonl")) == 2
    shutil.copy(trained[0] / "a.pt", tmp_path)
    assert run(tmp_path, "evaluate.py", *EVALUATE, before=streams).code == 0
    assert "checkpoints" in json.loads((tmp_path / "a.json").read_text())


@pytest.mark.parametrize("script", ["data.py", "verify.py"])
def test_filters_end_quietly_with_their_reader(tmp_path, script):
    arguments = ["--n", "2"] if script == "data.py" else ["rows.jsonl"]
    assert ended(start(tmp_path, "data.py", "--out", "rows.jsonl", redirect="2>&-"))[0] == 0
    reader, writer = os.pipe()
    os.close(reader)
    assert ended(start(tmp_path, script, *arguments, stdout=writer)) == (0, None, "")
    os.close(writer)
    assert ended(start(tmp_path, script, *arguments, redirect=">&-")) == (0, "", "")
    if os.path.exists("/dev/full"):
        code, _, err = ended(start(tmp_path, script, *arguments, redirect=">/dev/full"))
        assert code == 1 and len(err.splitlines()) == 1


# ----------------------------------------------------------------------------------------------------------------------
# signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_run_saves_though_its_reader_has_gone(tmp_path, number):
    """Ctrl-C ends the `tee` of `| tee log`, too; a terminal that is closed sends SIGHUP."""
    reader, writer = os.pipe()
    os.close(reader)
    process = start(tmp_path, "pretrain.py", *TINY, *"--steps 100000 --log-every 1 --eval-every 100000 --out a.pt".split(),
                    stdout=writer)
    os.close(writer)
    log = tmp_path / "a.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 130 and "roken" not in err and load_checkpoint(tmp_path / "a.pt")["step"] >= 1, err


def test_nohup_stays(tmp_path):
    (tmp_path / "a.py").write_text("import os, signal\nfrom model import noted_interrupts\n"
                                   "with noted_interrupts() as noted:\n    os.kill(os.getpid(), signal.SIGHUP)\nprint(len(noted))")
    done = subprocess.run(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", sys.executable, "a.py"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout == "0\n", done.stderr


@pytest.mark.parametrize("script", [*STAGES, "evaluate.py", "model.py", "data.py"])
def test_an_interrupt_during_the_imports_is_quiet(tmp_path, script):
    slow = tmp_path / ("tiktoken.py" if script == "data.py" else "torch.py")  # found before the real one
    slow.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    code, out, err = ended(start(tmp_path, script, env=dict(PYTHONPATH=str(tmp_path))))
    assert (code in (130, -signal.SIGINT), out, err) == (True, "", "")


def test_after_the_imports_an_interrupt_is_python_s_again():
    code = "import signal, model; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, preexec_fn=default_signals)
    assert done.stdout == "True\n", done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Python and torch


@pytest.mark.parametrize("script", [*STAGES, "evaluate.py", "model.py"])
def test_a_torch_that_is_too_old_is_refused_in_one_line(tmp_path, script):
    (tmp_path / "torch.py").write_text("__version__ = '2.2.2'\n")
    code, out, err = ended(start(tmp_path, script, "--help", env=dict(PYTHONPATH=str(tmp_path))))
    assert code == 1 and "2.2.2" in err and "requirements.txt" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("script", ["pretrain.py", "data.py", "verify.py"])
def test_python_without_docstrings_will_do(tmp_path, script):
    code, out, err = ended(start(tmp_path, script, "--help", options=["-OO"]))
    assert code == 0 and "--out" in out, err


def test_a_second_interrupt_ends_at_once_and_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with M.noted_interrupts() as noted:
        os.kill(os.getpid(), signal.SIGINT)
    assert len(noted) == 1 and [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    code = ("import os, signal, time, model\nwith model.noted_interrupts():\n    for _ in range(2):\n"
            "        os.kill(os.getpid(), signal.SIGINT)\n        time.sleep(1.2)\n    time.sleep(60)")
    began = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL, timeout=60).returncode == 130
    assert time.perf_counter() - began < 50


# ----------------------------------------------------------------------------------------------------------------------
# progress and clocks

def test_without_a_terminal_a_line_every_half_minute_says_how_far_a_run_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(M.time, "perf_counter", lambda: now[0])
    with M.progress_bar(start=0.2) as show_progress:
        for done in (0.3, 0.4, 0.5, 0.6, 0.8, 1.1):
            now[0] += 20
            show_progress(done, f"step {done}")
    lines = capsys.readouterr().err.splitlines()
    # after 40 s a fifth is done and three fifths are left; after 80 s two fifths are done and two are left
    assert [line for line in lines if "left" in line] == [
        " 40 %, about 2.0 minutes left, step 0.4", " 60 %, about 1.3 minutes left, step 0.6",
        "100 %, about 0.0 minutes left, step 1.1"]


def clock_set_back():
    moments = itertools.count(2e9, -3600)
    time.time = lambda: next(moments)


def test_a_clock_that_is_set_back_changes_no_time(tmp_path):
    result = run(tmp_path, "pretrain.py", *RUN, before=clock_set_back)
    assert result.code == 0 and "about -" not in result.out
    assert all(row["tokens_per_s"] > 0 and row["seconds"] >= 0 for row in metrics(tmp_path / "a.jsonl"))


def test_whatever_is_forgotten_how_often_the_first_run_is_still_there(tmp_path):
    first = run(tmp_path, "pretrain.py", *RUN)
    assert first.code == 0
    kept = (tmp_path / "a.pt").read_bytes()
    for suffix in ".old", ".old2":
        assert run(tmp_path, "pretrain.py", *RUN, "--seed", "1").code == 0
        assert (tmp_path / "a.pt.old").read_bytes() == kept and (tmp_path / f"a.jsonl{suffix}").exists()
