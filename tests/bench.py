"""
Benchmarks: ratios, measured side by side in one run, since machines and their moods differ.

    python tests/bench.py                 all (a few minutes on two cores)
    python tests/bench.py data verify     only these: data, verify, train, sample, grpo, cores,
                                          avx2 (an older CPU), busy (beside other processes),
                                          cost (of the whole recipe, with grpo)
    python tests/bench.py profile         what the time of training and of sampling goes to

Figures of the authors' public code are those of one core of another machine, so their ratio is a rough one. Where
`transformers` is installed (pip install transformers), training and sampling run against Hugging Face's Qwen2 of the
same shape, weights, data and precision, on this machine.
"""
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

root = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root))

import data  # noqa: E402
import pretrain  # noqa: E402
import model as ours  # noqa: E402
import verify  # noqa: E402
import torch  # noqa: E402  after model.py, which sets how its threads wait

AUTHORS_PROBLEMS_PER_S = {2: 372, 3: 99, 4: 1685, 5: 1259, 8: 791, 10: 258, 12: 179, 14: 220, 16: 114, 20: 154}
AUTHORS_REWARDS_PER_S = 5100  # the upper end of 4,600-5,100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = dict(device_type=DEVICE, dtype=torch.bfloat16)
PRESET = "tiny" if DEVICE == "cpu" else "100m"
CONFIG = ours.CONFIGS[PRESET]


def row(what, ours_, theirs=None, unit=""):
    ratio = f"{ours_ / theirs:8.1f}x" if theirs else ""
    print(f"{what:<44}{ours_:>12,.0f}{theirs or math.nan:>12,.0f}{ratio:>10}  {unit}", flush=True)


def rate(f, count, repeats=3):
    """Best rate of `repeats` runs of f, which does `count` things."""
    best = 0.0
    for _ in range(repeats):
        then = time.perf_counter()
        f()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = max(best, count / (time.perf_counter() - then))
    return best


def bench_data():
    ratios = {}
    for op, theirs in AUTHORS_PROBLEMS_PER_S.items():
        mixture = data.parse_mixture(str(op))
        mine = rate(lambda: [data.make_row(i, mixture) for i in range(1000)], 1000)
        ratios[op] = mine / theirs
        row(f"problems/s, one core, op {op}", mine, theirs, "theirs: the public generator, accepted problems")
    row("  ratio, geometric mean over 2, 5, 10, 14, 20",
        statistics.geometric_mean(ratios[op] for op in (2, 5, 10, 14, 20)))
    enc = data.tokenizer()
    rows = [data.make_row(i, data.parse_mixture("2-10")) for i in range(1000)]
    row("tokenized problems/s, one core, op 2-10", rate(lambda: [data.encode_row(enc, r) for r in rows], 1000))


def bench_verify():
    gold = root.parent / "shared" / "gold" / "forward.jsonl"
    rows = [json.loads(line) for line in open(gold, encoding="utf-8")] if gold.exists() else \
        [data.make_row(i, data.parse_mixture("2-20")) for i in range(300)]
    solutions = [r["solution"] for r in rows]

    def fresh():  # the gold solution parsed anew for every response
        for s in solutions:
            verify._gold.cache_clear()
            verify.verify(s, s)

    what = "public rows" if gold.exists() else "our rows of op 2-20"
    row(f"verifications/s, one core, {what}", rate(fresh, len(rows)), AUTHORS_REWARDS_PER_S, "theirs: full rewards/s")
    for s in solutions:
        verify.verify(s, s)
    row("  gold parsed once for several responses", rate(lambda: [verify.verify(s, s) for s in solutions], len(rows)),
        AUTHORS_REWARDS_PER_S)


def plain_batches(rows, micro_tokens):
    """(ids, n_prompt) -> [(x, y)] as one would first write it: rows of like length, padded, of at most micro_tokens tokens."""
    batches = []
    for row in sorted(rows, key=lambda row: len(row[0])):
        if not batches or (len(batches[-1]) + 1) * len(row[0]) > micro_tokens:
            batches.append([])
        batches[-1].append(row)
    pad = torch.nn.utils.rnn.pad_sequence
    return [(pad([torch.tensor(ids[:-1]) for ids, _ in rows], True),
             pad([torch.tensor(ids[1:]) for ids, _ in rows], True, padding_value=-100)) for rows in batches]


def training_step(optimizer="muon", dtype=torch.bfloat16, plain=False):
    """A function that trains for 8 steps on op 2-5, as pretrain.py would, and the number of tokens in them, without padding. plain:
    padded rows, several threads for each pass, and torch.optim.Muon instead."""
    torch.manual_seed(0)
    model, settings = ours.Transformer(CONFIG).to(DEVICE), dict(lr=1e-3, weight_decay=0.1)
    optimizers = ours.make_optimizers(model, muon_momentum=0.8 if optimizer == "muon" else None, precision=dtype, **settings)
    steps = data.TrainingSteps(data.parse_mixture("2-5"), 64, micro_tokens=3072, at_a_time=ours.n_at_a_time(DEVICE))
    batches = list(ours.step_batches(steps, 0, 8, 0, DEVICE))
    precision = torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16)
    if plain:
        optimizers[1:] = [torch.optim.Muon(optimizers[1].param_groups[0]["params"], momentum=0.8, adjust_lr_fn="match_rms_adamw",
                                           **settings)]
        rows = [[data.encode_row(steps.enc, data.make_row(i, steps.early[0])) for i in range(64 * s, 64 * s + 64)] for s in range(8)]
        batches = [(plain_batches(of_step, 1536), counts) for of_step, (_, counts) in zip(rows, batches)]

    def run():
        for micro_batches, counts in batches:
            if plain:
                for batch in micro_batches:
                    with precision:
                        loss = model.loss(*batch) / counts[0]
                    loss.backward()
            else:
                ours.accumulate(model, micro_batches, counts, DEVICE, precision)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
    return run, sum(int(counts[1]) for _, counts in batches)


def in_turns(*runs, count=1, rounds=4):
    """The best rate of each function, run in turns, so that a slow moment of the machine meets all."""
    [run() for run in runs]  # warm up
    best = [0.0] * len(runs)
    for _ in range(rounds):
        best = [max(was, rate(run, count, 1)) for was, run in zip(best, runs)]
    return best


def bench_cores():
    (mine, tokens), (plain, _) = training_step(), training_step(plain=True)
    row("training tokens/s, all cores", *in_turns(mine, plain, count=tokens), "theirs: padded rows, threads for each, torch's Muon")


def bench_avx2():
    """A training step with Muon against one with AdamW on a CPU without instructions for bfloat16, as most laptops are."""
    limited = dict(ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2")
    if any(os.environ.get(name) != value for name, value in limited.items()):
        subprocess.run([sys.executable, __file__, "avx2"], env=os.environ | limited)  # read when torch starts
        return
    (muon, tokens), (adamw, _) = (training_step(name, torch.float32) for name in ("muon", "adamw"))
    row("training tokens/s with Muon, AVX2 only", *in_turns(muon, adamw, count=tokens), "theirs: with AdamW")


def bench_busy():
    """evaluate.py beside as many busy processes as there are cores: with all its threads, and with one."""
    loop = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(loop) for _ in range(len(os.sched_getaffinity(0)))]
    try:
        with tempfile.TemporaryDirectory() as folder:
            untrained(folder, "pretrain")
            command = [sys.executable, root / "evaluate.py", *"init.pt --ops 2-10 --problems 20 --n 8 --k 1 --json a.json".split()]
            runs = [lambda env=env: subprocess.run(command, cwd=folder, env=os.environ | env, stdout=subprocess.DEVNULL, check=True)
                    for env in ({}, dict(OMP_NUM_THREADS="1"))]
            row("evaluations an hour, beside busy processes", *in_turns(*runs, count=3600, rounds=2), "theirs: one thread")
    finally:
        [process.kill() for process in busy]


def hf_model(model):
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        print("  (pip install transformers for the comparison with Hugging Face)")
        return None
    config, state = ours.to_hf(model)
    hf = Qwen2ForCausalLM(Qwen2Config(**config)).to(DEVICE)
    hf.load_state_dict(state)
    return hf


def training_steps(ops):
    """Four steps as the presets have them, few problems for a CPU and more for a GPU: ours, from `step_batches`; theirs, padded rows
    of like length. And how many tokens and problems there are in them."""
    few = dict(batch_size=64, micro_tokens=3072) if DEVICE == "cpu" else dict(batch_size=1152, micro_tokens=32768)
    steps = data.TrainingSteps(data.parse_mixture(ops), packed=DEVICE == "cuda", at_a_time=ours.n_at_a_time(DEVICE), **few)
    mine = list(ours.step_batches(steps, 0, 4, 0, DEVICE))
    n = few["batch_size"]
    rows = [[data.encode_row(steps.enc, data.make_row(i, steps.early[0])) for i in range(n * s, n * s + n)] for s in range(4)]
    theirs = [[[a.to(DEVICE) for a in batch] for batch in plain_batches(of_step, few["micro_tokens"])] for of_step in rows]
    return mine, theirs, sum(int(counts[1]) for _, counts in mine), 4 * n


def train(model, steps, gradients):
    """A function that trains on these steps. gradients(step): adds up the gradient of one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run():
        for step in steps:
            gradients(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    run()  # warm up
    return run


def our_training(model, steps):
    """As pretrain.py trains."""
    if DEVICE == "cuda":
        ours.compile_layers(model)
    return train(model, steps, lambda step: ours.accumulate(model, *step, DEVICE, torch.autocast(**PRECISION)))


def hf_training(model, steps):
    def gradients(step):
        for x, y in step:
            with torch.autocast(**PRECISION):
                loss = torch.nn.functional.cross_entropy(model(input_ids=x).logits.flatten(0, 1).float(), y.flatten()) / len(step)
            loss.backward()
    return train(model, steps, gradients)


def bench_train():
    torch.manual_seed(0)
    for ops in ("2-4", "2-10"):
        model = ours.Transformer(CONFIG).to(DEVICE)
        steps, hf_steps, tokens, problems = training_steps(ops)
        hf = hf_model(model)
        run = our_training(model, steps)
        hf_run = hf and hf_training(hf, hf_steps)
        mine, theirs = 0.0, 0.0
        for _ in range(3):  # in turns, so that a slow moment of the machine meets both
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            mine = max(mine, rate(run, tokens, 1))
            memory = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0
            theirs = max(theirs, rate(hf_run, tokens, 1)) if hf else 0.0
        row(f"training tokens/s, op {ops}, bf16", mine, theirs, "theirs: Qwen2ForCausalLM, same shape and problems")
        if DEVICE == "cuda":
            row("  GPU memory at most, with the weights of both, MB", memory / 1e6)
            if peak := ours.peak_flops(DEVICE):
                per_token = model.flops_per_token(tokens / problems)
                row("  share of the device's peak (MFU), %", 100 * mine * per_token / peak, 100 * theirs * per_token / peak)


def bench_sample():
    sample_batch(32, 8)
    sample_batch(64, 8)  # a step of GRPO with the preset tiny
    if DEVICE == "cuda":
        sample_batch(512, 6)


def our_sampling(model, n_prompts, n, new):
    """A function that continues each prompt n times by `new` tokens, and the prompts."""
    enc, buffers = data.tokenizer(), {}
    rows = [data.make_row(i, data.parse_mixture("2-10")) for i in range(n_prompts)]
    prompts = [data.encode(enc, data.prompt_text(r)) for r in rows]
    nowhere = CONFIG.vocab_size  # a stop token that never comes: both sides write the same number of tokens

    def run():
        with torch.autocast(**PRECISION):
            tokens, _ = ours.sample(model, prompts, nowhere, n=n, max_new=new, rows=3072, buffers=buffers)
        assert sum(map(len, tokens)) == n_prompts * n * new
    return run, prompts


@torch.no_grad()
def sample_batch(n_prompts, n, new=64):
    torch.manual_seed(0)
    model = ours.Transformer(CONFIG).to(DEVICE).eval()
    mine, prompts = our_sampling(model, n_prompts, n, new)
    count = n_prompts * n * new

    hf = hf_model(model)
    theirs = None
    if hf:
        hf.eval()
        hf.generation_config.pad_token_id = 0
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)

        def hf_generate():
            with torch.autocast(**PRECISION):
                out = hf.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0, temperature=1.0,
                                  num_return_sequences=n, max_new_tokens=new, min_new_tokens=new, use_cache=True)
            assert out.shape == (n_prompts * n, longest + new)
        theirs = rate(hf_generate, count, 2)
    row(f"sampled tokens/s, {n_prompts} prompts x {n}, op 2-10, bf16", rate(mine, count, 2), theirs,
        "theirs: transformers' generate, same weights and batch")


def bench_profile():
    torch.manual_seed(0)
    model = ours.Transformer(CONFIG).to(DEVICE)
    profiled("sampling, op 2-10", our_sampling(model, *((64, 8) if DEVICE == "cpu" else (512, 6)), 64)[0])
    profiled("training, op 2-10", our_training(model, training_steps("2-10")[0]))


def profiled(what, run):
    """Print which operations (on a CPU) or kernels the time of run() goes to."""
    for _ in range(2):  # to warm up, and to capture
        run()
    cuda = torch.profiler.DeviceType.CUDA
    began = time.perf_counter()
    with torch.profiler.profile() as profile:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
    wall, times = time.perf_counter() - began, {}
    for e in profile.events():
        if DEVICE == "cpu" or e.device_type == cuda:
            spent = e.self_cpu_time_total if DEVICE == "cpu" else e.time_range.elapsed_us()
            times[e.name] = times.get(e.name, 0) + spent / 1e6
    busy = sum(times.values())
    print(f"\n{what}: {busy:.2f} s of {wall:.2f} s in these, % of them")
    for name, spent in sorted(times.items(), key=lambda item: -item[1])[:20]:
        print(f"  {100 * spent / busy:5.1f}  {name[:110]}")


def stage(folder, script, settings):
    """Rows of metrics of a run with the preset."""
    run = subprocess.run([sys.executable, root / script, "--preset", PRESET, *settings.split(), "--out", "a.pt"], cwd=folder,
                         text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if run.returncode:
        sys.exit(run.stderr[-2000:])
    return [json.loads(line) for line in open(f"{folder}/a.jsonl")]


def untrained(folder, name):
    torch.manual_seed(0)
    ours.save_checkpoint(f"{folder}/init.pt", dict(
        stage=name, config=asdict(CONFIG), model=ours.Transformer(CONFIG).state_dict(), step=0, problems=0,
        recipe=dict(preset=PRESET, **{k: pretrain.PRESETS[PRESET][k] for k in ("mix", "distractors", "max_parents", "max_value")}),
        id_ops=[2, 8] if PRESET == "tiny" else [2, 10]))


def bench_grpo():
    """Whole steps of grpo.py with the settings of the preset, from random weights, which end no solution before --max-new 192.
    Noise makes the rewards of a group differ, so that there is something to learn."""
    with tempfile.TemporaryDirectory() as folder:
        untrained(folder, "midtrain")
        last = stage(folder, "grpo.py", "--init init.pt --max-new 192 --steps 3 --eval-every 9 --eval-problems 8 "
                     "--reward process --reward-noise 0.5,0.5")[-1]
        for name in ("rollout_s", "verify_s", "update_s"):
            row(f"GRPO step, preset {PRESET}, {name}, ms", 1000 * last[name])
        row(f"GRPO step, preset {PRESET}, sampled tokens/s", last["tokens_per_s"])
        return sum(last[name] for name in ("rollout_s", "verify_s", "update_s"))


def bench_cost():
    """Minutes of the three stages with the settings of the preset, from some steps of each."""
    import grpo
    import midtrain
    with tempfile.TemporaryDirectory() as folder:
        untrained(folder, "pretrain")
        for script, init in (pretrain, ""), (midtrain, "--init init.pt"):
            rows = stage(folder, f"{script.__name__}.py", f"{init} --steps 90 --log-every 10 --eval-every 1000 --show 0")
            # steps 21 to 80, about half of them with the longer texts of the late phase of pre-training. The last row's time
            # has the evaluation in it
            first, last = rows[1], rows[-2]
            problems_per_s = (last["problems"] - first["problems"]) / (last["seconds"] - first["seconds"])
            settings = script.PRESETS[PRESET]
            row(f"{script.__name__}.py, preset {PRESET}, minutes", settings["steps"] * settings["batch"] / problems_per_s / 60)
            if "mfu" in last:
                row("  MFU, %", 100 * last["mfu"])
                row("  waiting for problems, % of the time", 100 * last["waiting"])
    row(f"grpo.py, preset {PRESET}, minutes at most", grpo.PRESETS[PRESET]["steps"] * bench_grpo() / 60)


if __name__ == "__main__":
    names = sys.argv[1:] or ["data", "verify", "train", "sample", "cost"] + ["cores", "avx2", "busy"] * (DEVICE == "cpu")
    if not all(f"bench_{name}" in globals() for name in names):
        sys.exit(__doc__)
    torch.set_float32_matmul_precision("high")  # as the stages do
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{torch.cuda.get_device_name() if DEVICE == 'cuda' else os.uname().machine + ' CPU'}, model {CONFIG}\n")
    print(f"{'':<44}{'ours':>12}{'theirs':>12}{'ratio':>10}")
    for name in names:
        globals()[f"bench_{name}"]()
