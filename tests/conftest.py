"""
Puts the project root on the import path, reads the rows of the public generator where they are at hand, and starts scripts.

`run` starts a script as `python SCRIPT ARGUMENTS` does: a process of its own, with its own working directory, streams and
exit status. It is forked from a server that has imported torch already, which saves two seconds a run.
"""
import importlib
import inspect
import json
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLD = ROOT.parent / "shared" / "gold" / "forward.jsonl"
sys.path.insert(0, str(ROOT))
os.environ["COLUMNS"] = "80"  # what is printed must not depend on the terminal
import data  # noqa: E402
NO_CUDA = {"CUDA_VISIBLE_DEVICES": ""}  # scripts choose other settings where there is a GPU, and the tests are of those for a CPU
TINY = "--preset tiny --device cpu --n-layers 1 --width 32 --n-heads 2 --n-kv-heads 1 --mlp 64 --batch 8 --show 0".split()
SERVER = multiprocessing.get_context("forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn")
SERVER.set_forkserver_preload(["pytest", "tiktoken", "torch", "torch._dynamo", "torch.distributed", "tqdm"])


@pytest.fixture(scope="session")
def gold():
    """285 rows made by the public generator: op 2-20, three templates."""
    if not GOLD.exists():
        pytest.skip(f"the public rows are not here: no {GOLD.name} in {GOLD.parent.name}/ beside the project")
    with open(GOLD, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# ----------------------------------------------------------------------------------------------------------------------
# scripts in processes of their own


class Result(NamedTuple):
    code: int
    out: str
    err: str
    calls: list = ()  # of each rank, what `record` asked for: {name: [(arguments, result)]}


def run(cwd, script, *arguments, send=None, kill_after=None, ranks=1, record=(), before=None):
    """Run a script to its end.

    send: (signal, n), which it gets when it is about to put its n-th checkpoint in place. kill_after: seconds until it is
    killed. ranks: how many processes, with the variables that torchrun sets; the result is that of rank 0, which `send`
    goes to. record: functions of our modules, as "module.function", whose calls to note. before: a function that its process
    calls first.
    """
    port, processes, arguments = free_port(), [], [str(a) for a in arguments]
    for rank in range(ranks):
        env = dict(NO_CUDA)
        if ranks > 1:
            env |= dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        process = SERVER.Process(target=_in_child, args=(cwd, ROOT / script, arguments, rank, env, record,
                                                         send if rank == 0 else None, before))
        process.start()
        processes.append(process)
    if kill_after is not None:
        processes[0].join(kill_after)
        processes[0].kill()
    for process in processes:
        process.join(600)
        if processes[0].exitcode is not None and processes[0].exitcode < 0:  # killed: torchrun would end the others too
            for other in processes:
                other.kill()
            process.join()
        if process.is_alive():
            for other in processes:
                other.kill()
            pytest.fail(f"{script} {arguments} hangs")
    texts, calls = [], []
    for rank in range(ranks):
        for name in ("stdout", "stderr"):
            path = cwd / f".{name}{rank}"
            texts.append(path.read_text("utf-8", errors="replace") if path.exists() else "")
            path.unlink(missing_ok=True)
        path = cwd / f".calls{rank}"
        if path.exists():
            calls.append(pickle.loads(path.read_bytes()))
            path.unlink()
    return Result(processes[0].exitcode, texts[0], texts[1], calls)


def _in_child(cwd, script, arguments, rank, env, record, send, before):
    os.chdir(cwd)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f".{name}{rank}", os.O_WRONLY | os.O_CREAT), fd)
    os.environ.update({name: str(value) for name, value in env.items()})
    replace, saves = os.replace, []

    def replace_after_signal(*args):
        if args[1].endswith(".pt"):
            saves.append(args)
            if len(saves) == send[1]:
                os.kill(os.getpid(), send[0])
        replace(*args)

    if send:
        os.replace = replace_after_signal
    calls = {name: [] for name in record}
    for name in record:
        _note_calls(*name.split("."), calls[name])
    multiprocessing.set_start_method(None, force=True)  # of processes that the script starts: Python's default again
    torch.set_num_threads(1)
    compile = torch.compile  # --compile traces, and keeps torch's own kernels: no wait for a C++ compiler
    torch.compile = lambda function, **options: compile(function, backend="eager", **options)
    sys.argv = [str(script), *arguments]
    if before:
        before()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        if record:
            Path(f".calls{rank}").write_bytes(pickle.dumps(calls))


def plain(x):
    """A list of named tuples as one of tuples: the classes of a script that runs as __main__ cannot be pickled."""
    return [tuple(item) if isinstance(item, tuple) else item for item in x] if type(x) is list else x


def _note_calls(module, name, calls):
    """Replace a function of a module by one that also puts its arguments, as they were before, and its result in a list."""
    module = importlib.import_module(module)
    function = getattr(module, name)

    def noting(*args, **kwargs):
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        before = pickle.dumps({k: v.get_state() if isinstance(v, torch.Generator) else plain(v)
                               for k, v in bound.arguments.items() if not callable(v) or isinstance(v, torch.nn.Module)})
        result = function(*args, **kwargs)
        calls.append((pickle.loads(before), result))
        return result

    setattr(module, name, noting)


def end_with_workers(cwd, script, arguments, number, group):
    """Start a script that has --workers, as a shell does; when it has logged a row, signal it, or the whole group.

    Returns its exit status, its messages, how many workers it had, and which of them are still there ten seconds later.
    """
    process = subprocess.Popen([sys.executable, ROOT / script, *map(str, arguments)], cwd=cwd, start_new_session=True, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log, began = cwd / "a.jsonl", time.time()
    while not (log.exists() and log.stat().st_size) and process.poll() is None and time.time() - began < 120:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    (os.killpg if group else os.kill)(process.pid, number)
    messages, n_workers, began = process.communicate(timeout=120)[1], len(workers), time.time()
    while workers and time.time() - began < 10:
        workers = [pid for pid in workers if os.path.exists(f"/proc/{pid}")]
        time.sleep(0.05)
    return process.returncode, messages, n_workers, workers


@pytest.fixture
def pretend_cuda(monkeypatch):
    """pretend_cuda(bfloat16, gib=80, compiles=True): while a script reads its arguments, it finds a device with CUDA, one that has
    bfloat16 or not, with so much memory free, and where torch.compile works or not."""
    def pretend(bfloat16, gib=80, compiles=True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (gib * 2 ** 30, gib * 2 ** 30))
        monkeypatch.setattr(torch, "ones", lambda *size, device=None, **more: ones(*size, **more))  # it tries the device with them
        monkeypatch.setattr(torch, "compile", lambda function: function if compiles else function.no_compiler_here)

    ones = torch.ones
    return pretend


def assert_compiled_where_there_is_bfloat16(stage, argv, monkeypatch, pretend_cuda):
    """What a stage chooses with CUDA: compiled in bfloat16 if the device has that, neither if not, and then --compile is refused."""
    for bfloat16, expected in (True, ("cuda", "bfloat16", True)), (False, ("cuda", "float32", False)):
        pretend_cuda(bfloat16)
        monkeypatch.setattr("sys.argv", argv)
        _, args, *_ = stage.arguments()
        assert (args.device, args.dtype, args.compile) == expected
    monkeypatch.setattr("sys.argv", [*argv, "--compile"])
    with pytest.raises(SystemExit, match="2"):
        stage.arguments()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(cwd, script, *arguments):
    """torchrun with two processes. Without "--" it may take the --n of the script for an option of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "--",
               ROOT / script]
    done = subprocess.run([*command, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    return Result(done.returncode, done.stdout, done.stderr)


def assert_refused(result, *words):
    """Exit status 2 and a last line that says what is wrong, with these words in it."""
    assert result.code == 2, result
    assert "Traceback" not in result.err + result.out
    last = result.err.strip().splitlines()[-1]
    assert all(word in last for word in words), last


# ----------------------------------------------------------------------------------------------------------------------
# what they write


def metrics(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def same(a, b):
    """Nested dicts and lists with tensors, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return a == b


def is_finite(checkpoint):
    return all(tensor.isfinite().all() for tensor in checkpoint["model"].values())


class Payload:
    def __reduce__(self):
        return os.system, ("echo ran > marker",)


def checkpoint_without(key):
    def content(whole):
        checkpoint = torch.load(whole, weights_only=True)
        del checkpoint[key]
        return checkpoint
    return content


def checkpoint_with(**changes):
    return lambda whole: {**torch.load(whole, weights_only=True), **changes}


# what may lie where a checkpoint should: no stage can read any of it
BROKEN = {
    "cut off": lambda whole: whole.read_bytes()[:-1000],
    "empty": lambda whole: b"",
    "text": lambda whole: b"hello\n",
    "foreign pickle": lambda whole: pickle.dumps({"model": [1, 2, 3]}),
    "code": lambda whole: pickle.dumps(Payload()),
    "another project's": lambda whole: {"epoch": 3, "state_dict": {"w": torch.zeros(3)}},
    "without weights": checkpoint_with(model={}),
}


def put(content, path):
    """Write the bytes, or save the checkpoint, that a function like those of BROKEN made."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)


def pad(rows, loss="all"):
    """[(ids, n_prompt, ...)] -> x, y of one row each, padded on the right: the plain form of what the scripts lay end to end."""
    T = max(len(row[0]) for row in rows) - 1
    x, y = np.zeros((len(rows), T), np.int64), np.full((len(rows), T), data.IGNORE, np.int64)
    for b, (ids, n_prompt, *_) in enumerate(rows):
        first = n_prompt if loss == "solution" else 1
        x[b, :len(ids) - 1] = ids[:-1]
        y[b, first - 1:len(ids) - 1] = ids[first:]
    return x, y
