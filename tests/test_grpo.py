"""
What grpo.py promises: the terms of its formula against numbers by hand, whole steps against a naive loop over solutions and
tokens, a bandit that it must solve, and to somebody who runs it files, budgets, resuming, ranks and one line for bad input.
"""
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data
import grpo as G
from conftest import (BROKEN, ROOT, assert_compiled_where_there_is_bfloat16, assert_refused, checkpoint_with,
                      checkpoint_without, end_with_workers, is_finite, metrics, pad, put, run, same)
from grpo import group_advantages, grpo_loss, misjudged
from model import Config, Transformer, build_model, load_checkpoint, sample, save_checkpoint
from verify import interval, reward, verify

ENC = data.tokenizer()
STOP = ENC.encode_single_token(data.END)
MIX = "zoo:2"  # without distractors: a leaf and its total, or a leaf and its copy


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models here are so small that a second thread only gets in the way of the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def problem(i, mix=MIX, split="train"):
    """Problem i of the stream of a run with --mix and --distractors 0."""
    return data.make_row(i, data.parse_mixture(mix), G.SEED, split, data.World(0))


def save_init(path, model, id_ops):
    save_checkpoint(path, dict(stage="pretrain", config=asdict(model.config), model=model.state_dict(), step=1, problems=1,
                               recipe={"preset": "tiny"}, id_ops=id_ops, run="first"))
    return path


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    """A checkpoint that half knows a few problems by heart, the first eight and the first held-out ones of the runs below:
    some of its solutions are right and some are not."""
    torch.manual_seed(0)
    model = Transformer(Config(1, 32, 2, 1, 64, rope_theta=1e4, init_std=0.2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    rows = [problem(i) for i in range(8)] + [problem(i, mix, "eval") for mix in ("zoo:2", "zoo:3") for i in (0, 1)]
    x, y = map(torch.from_numpy, pad([data.encode_row(ENC, row) for row in rows], loss="solution"))
    loss = torch.tensor(math.inf)
    while loss > 0.07:  # after about 35 steps
        loss = model.loss(x, y, reduction="mean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return save_init(tmp_path_factory.mktemp("init") / "init.pt", model, [2, 2])


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    torch.manual_seed(0)
    model = Transformer(Config(1, 32, 2, 1, 64, init_std=0.05))
    return save_init(tmp_path_factory.mktemp("untrained") / "init.pt", model, [2, 3])


def grpo(cwd, init, *arguments, **more):
    """A small run; later arguments replace these."""
    small = f"--device cpu --dtype float32 --mix {MIX} --distractors 0 --prompts 4 --rollouts 4 --updates 2 --max-new 40 " \
            "--eval-problems 1 --micro-tokens 256 --out a.pt"
    if {"--ops", "--mix", "--curriculum"} & {*arguments}:
        small = small.replace(f"--mix {MIX} ", "")
    return run(cwd, "grpo.py", "--init", init, *small.split(), *arguments, **more)


# ----------------------------------------------------------------------------------------------------------------------
# the terms of the formula

def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 1], [0.2, 0.4, 0.6, 0.8]])
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / (0.5 + 1e-6)  # unbiased: variances 4 / 4 / 3 and 1 / 4
    c = 0.1 / (math.sqrt(0.2 / 3) + 1e-6)
    expected = torch.tensor([[a, -a, -a, a], [-b / 4, -b / 4, -b / 4, 3 * b / 4], [-3 * c, -c, c, 3 * c]])
    torch.testing.assert_close(group_advantages(rewards), expected, rtol=1e-6, atol=1e-7)
    expected = torch.tensor([[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [-0.3, -0.1, 0.1, 0.3]])
    torch.testing.assert_close(group_advantages(rewards, "mean"), expected, rtol=1e-6, atol=1e-7)


def test_a_small_difference_is_divided_by_a_standard_deviation_that_is_never_0():
    high, low = group_advantages(torch.tensor([[2e-6, 0.0]]))[0].tolist()
    assert (high, low) == pytest.approx((1 / (math.sqrt(2) + 1), -1 / (math.sqrt(2) + 1)), rel=1e-4)


@pytest.mark.parametrize("kind", ["std", "mean"])
def test_equal_rewards_have_advantage_0_exactly(kind):
    for value in (0.0, 1.0, 0.2, 0.7, 1 / 3):  # six times 0.2 has a mean beside 0.2 in float32
        for n in (2, 3, 6, 8, 1000):
            rewards = torch.full((2, n), value)
            rewards[1, 0] += 0.1  # of another group
            advantages = group_advantages(rewards, kind)
            assert torch.equal(advantages[0], torch.zeros(n)) and advantages[1, 0] > 0 > advantages[1, 1]


# advantage, ratio, min(ratio * A, clip(ratio, 0.8, 1.2) * A), its derivative by the log-probability, whether it is clipped
CASES = [(2.0, 1.5, 2.4, 0.0, True), (2.0, 0.5, 1.0, 1.0, False), (2.0, 1.1, 2.2, 2.2, False), (2.0, 0.9, 1.8, 1.8, False),
         (-2.0, 1.5, -3.0, -3.0, False), (-2.0, 0.5, -1.6, 0.0, True), (-2.0, 1.1, -2.2, -2.2, False),
         (-2.0, 0.9, -1.8, -1.8, False), (0.0, 1.5, 0.0, 0.0, False), (0.0, 0.5, 0.0, 0.0, False)]


def loss_and_gradient(logprobs, old, ref, advantages, *args, **kwargs):
    logprobs = torch.as_tensor(logprobs, dtype=torch.float64).requires_grad_()
    loss, sums = grpo_loss(logprobs, *[None if x is None else torch.as_tensor(x, dtype=torch.float64)
                                       for x in (old, ref, advantages)], *args, **kwargs)
    return loss.item(), torch.autograd.grad(loss, logprobs)[0], {k: float(v) for k, v in sums.items()}


@pytest.mark.parametrize("advantage, ratio, surrogate, slope, clipped", CASES)
def test_clipping_by_hand(advantage, ratio, surrogate, slope, clipped):
    old = math.log(0.3)
    loss, gradient, sums = loss_and_gradient([old + math.log(ratio)], [old], None, [advantage], 5, 0.2, 0.0)
    assert loss == pytest.approx(-surrogate / 5)
    assert gradient.item() == pytest.approx(-slope / 5)
    assert sums["clipped"] == clipped and sums["kl"] == 0
    assert sums["approx_kl"] == pytest.approx(ratio - 1 - math.log(ratio))  # of sampling policy against the new one


def test_the_clip_range_is_an_argument():
    for clip_ratio, slope in ((0.6, -1.5), (0.4, 0.0)):
        _, gradient, _ = loss_and_gradient([math.log(1.5)], [0.0], None, [1.0], 1, clip_ratio, 0.0)
        assert gradient.item() == pytest.approx(slope)


def test_tokens_add_up_and_are_divided_by_those_of_the_whole_update():
    A, ratio, surrogate, slope, clipped = map(np.array, zip(*CASES))
    loss, gradient, sums = loss_and_gradient(np.log(ratio), np.zeros(10), None, A, 40, 0.2, 0.0)
    assert loss == pytest.approx(-surrogate.sum() / 40)
    assert gradient.tolist() == pytest.approx((-slope / 40).tolist())
    assert sums["clipped"] == clipped.sum() == 2
    assert sums["approx_kl"] == pytest.approx((ratio - 1 - np.log(ratio)).sum())


def test_kl_by_hand():
    """One token with probability 1/2 here and 1/4 in the reference: k3 is 1/2 - log(1/2) - 1, its slope 1 - 1/2."""
    p, ref = math.log(0.5), math.log(0.25)
    loss, gradient, sums = loss_and_gradient([p], [p], [ref], [0.0], 4, 0.2, 0.3)
    assert sums["kl"] == pytest.approx(0.5 + math.log(2) - 1)
    assert loss == pytest.approx(0.3 * (0.5 + math.log(2) - 1) / 4)
    assert gradient.item() == pytest.approx(0.3 * 0.5 / 4)
    loss, gradient, _ = loss_and_gradient([p], [p], [ref], [2.0], 4, 0.2, 0.3)  # and beside an advantage
    assert loss == pytest.approx((-2.0 + 0.3 * (0.5 + math.log(2) - 1)) / 4)
    assert gradient.item() == pytest.approx((-2.0 + 0.3 * 0.5) / 4)


def test_kl_is_never_negative_and_0_only_where_the_two_agree():
    logprobs = torch.linspace(-20, 0, 401)
    for ref in (-20.0, -3.0, -0.1, 0.0):
        for p in logprobs:
            kl = float(grpo_loss(p[None], p[None], torch.tensor([ref]), torch.zeros(1), 1)[1]["kl"])
            assert kl >= 0 and (kl > 1e-5) == (abs(float(p) - ref) > 1e-2), (p, ref)


@pytest.mark.parametrize("p, old, ref", [(-1e4, 0.0, 0.0), (0.0, -1e4, -1e4), (0.0, -1e4, 0.0), (-1e4, -1e4, 0.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_one_impossible_token_makes_nothing_infinite(p, old, ref, advantage):
    p = torch.tensor([p, -1.0], requires_grad=True)  # float32, as in a run
    loss, sums = grpo_loss(p, torch.tensor([old, -1.0]), torch.tensor([ref, -1.0]), torch.tensor([advantage, 1.0]), 2, 0.2, 1e-3)
    loss.backward()
    assert loss.isfinite() and p.grad.isfinite().all() and all(value.isfinite() for value in sums.values())


def test_kl_has_the_gradient_of_the_reversed_kl_in_the_mean():
    """Over all five outcomes, weighted by pi: sum of pi * d k3 / d log pi, against the gradient of KL(pi_ref, pi)."""
    g = torch.Generator().manual_seed(1)
    theta = torch.randn(5, generator=g).double().requires_grad_()
    ref = torch.randn(5, generator=g).double().log_softmax(-1)
    logp = theta.log_softmax(-1)
    k3 = [grpo_loss(logp[[a]], logp[[a]].detach(), ref[[a]], torch.zeros(1).double(), 1, 0.2, 1.0)[0] for a in range(5)]
    mean = sum(float(logp[a].detach().exp()) * torch.autograd.grad(k3[a], theta, retain_graph=True)[0] for a in range(5))
    reverse = (ref.exp() * (ref - theta.log_softmax(-1))).sum()
    torch.testing.assert_close(mean, torch.autograd.grad(reverse, theta)[0])


def test_kl_is_right_in_the_mean():
    """Drawn from pi, k3 has the mean KL(pi || pi_ref), a sum over the five outcomes; within four standard errors."""
    g, n = torch.Generator().manual_seed(0), 40_000
    for _ in range(3):
        pi, ref = (torch.randn(5, generator=g).double().log_softmax(-1) for _ in range(2))
        drawn = torch.multinomial(pi.exp(), n, replacement=True, generator=g)
        k3 = torch.stack([grpo_loss(pi[[a]], pi[[a]], ref[[a]], torch.zeros(1), 1)[1]["kl"] for a in range(5)])[drawn]
        exact = float((pi.exp() * (pi - ref)).sum())
        assert exact > 0.1 and abs(float(k3.mean()) - exact) < 4 * float(k3.std()) / math.sqrt(n)


def random_tokens(n=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs, old, ref = (-3 * torch.rand(n, generator=g).double() for _ in range(3))
    return logprobs, old, ref, torch.randn(n, generator=g).double()


def test_held_out_problems_are_those_that_pretraining_saw_of_each_context():
    init = dict(id_ops=[2, 4], id_ranges={"zoo": [2, 4], "school": [2, 2]}, recipe={})
    for mix, expected in (("zoo:5,school:3,movie:2", ("zoo:2-4:1,school:2-2:1", "zoo:5-6:1,school:3-3:1")),
                          ("school:3", ("school:2-2:1", "school:3-3:1")), ("movie:2", ("zoo:2-4:1,school:2-2:1",) * 1)):
        found = G.held_out_mixtures(data.parse_mixture(mix), init)
        assert [*found] == ["ID", "OOD-edge"] and tuple(m.spec for m in found.values())[:len(expected)] == expected


def test_micro_batches_change_nothing():
    tokens = random_tokens()
    loss, gradient, sums = loss_and_gradient(*tokens, 60, 0.2, 0.1)
    parts = [loss_and_gradient(*[x[a:b] for x in tokens], 60, 0.2, 0.1) for a, b in ((0, 1), (1, 18), (18, 60))]
    assert sum(part[0] for part in parts) == pytest.approx(loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)
    assert {k: sum(part[2][k] for part in parts) for k in sums} == pytest.approx(sums)


def test_groups_of_equal_rewards_have_the_gradient_of_kl_alone():
    logprobs, old, ref, _ = random_tokens()
    advantages = group_advantages(torch.full((10, 6), 0.2)).flatten()
    _, gradient, _ = loss_and_gradient(logprobs, old, ref, advantages, 60, 0.2, 0.0)
    assert not gradient.any()
    _, gradient, _ = loss_and_gradient(logprobs, old, ref, advantages, 60, 0.2, 0.1)
    torch.testing.assert_close(gradient, 0.1 * (1 - (ref - logprobs).exp()) / 60)


def test_without_kl_no_reference_is_needed():
    logprobs, old, ref, A = random_tokens()
    losses = [loss_and_gradient(logprobs, old, reference, A, 60, kl_coef=0)[0] for reference in (None, ref)]
    assert losses[0] == losses[1]


# ----------------------------------------------------------------------------------------------------------------------
# log-probabilities: of the right tokens, at the temperature of sampling

SMALL = dict(n_layers=2, width=32, n_heads=4, n_kv_heads=2, mlp=48, vocab_size=24, rope_theta=100.0)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(Config(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + ("norm" in name))
    return model.eval()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_by_hand(temperature):
    model = make_model()
    x = torch.randint(24, (3, 9), generator=torch.Generator().manual_seed(1))
    where, targets = torch.tensor([0, 8, 9, 15, 26]), torch.tensor([3, 0, 23, 7, 7])
    logprobs, entropy = model.logprobs(x, where, targets, temperature)
    for i, (row, t) in enumerate([(0, 0), (0, 8), (1, 0), (1, 6), (2, 8)]):
        p = torch.softmax(model(x)[row, t].detach().double() / temperature, -1)
        assert logprobs[i].item() == pytest.approx(math.log(p[targets[i]]), abs=1e-5)
        assert entropy[i].item() == pytest.approx(-sum(q * math.log(q) for q in p.tolist()), abs=1e-5)
    assert logprobs.requires_grad and not entropy.requires_grad


def solution_tokens(pairs):
    """As a step of grpo.py has it, from [(ids, n_prompt)]: x, the positions and the targets."""
    x, y = pad(pairs, loss="solution")
    where = np.flatnonzero(y != data.IGNORE)
    return [torch.from_numpy(a) for a in (x, where, y.flatten()[where])]


def test_the_tokens_with_a_loss_are_the_sampled_ones_with_end_of_text_in_order():
    sampled = [([5, 6, 7], [8, 9, STOP]), ([4], [STOP]), ([1, 2], [3, 3, 3, 3, 3]), ([9] * 20, [7, STOP])]  # one is cut off
    x, where, targets = solution_tokens([(prompt + ids, len(prompt)) for prompt, ids in sampled])
    assert targets.tolist() == [token for _, ids in sampled for token in ids]
    expected = [(row, len(prompt) - 1 + t) for row, (prompt, ids) in enumerate(sampled) for t in range(len(ids))]
    assert len(where) == len(expected)
    for at, (row, t) in zip(where.tolist(), expected):
        assert divmod(at, x.shape[1]) == (row, t)
        prompt, ids = sampled[row]
        assert x[row, :t + 1].tolist() == (prompt + ids)[:t + 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_and_updates_give_a_token_the_same_log_probability(temperature):
    model, prompts, end = make_model(), [[5, 1, 9], [7], [2, 2, 8, 1, 4, 4, 3]], 3
    tokens, old = sample(model, prompts, end, 8, 12, temperature, torch.Generator().manual_seed(0))
    assert 0 < sum(ids[-1] == end for ids in tokens) < 24  # some end, others are cut off
    pairs = [(prompts[j // 8] + ids, len(prompts[j // 8])) for j, ids in enumerate(tokens)]
    logprobs, _ = model.logprobs(*solution_tokens(pairs), temperature)
    torch.testing.assert_close(logprobs, torch.cat(old), rtol=0, atol=1e-5)
    other, _ = model.logprobs(*solution_tokens(pairs), 1.7 - temperature)
    assert (other - torch.cat(old)).abs().mean() > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# rewards

def verdict(outcome, process, strict):
    return dict(outcome=outcome, process=process, verified=outcome and process == 1, strict=strict, errors=[])


def test_rewards_by_hand():
    table = [  # verdict; outcome, process, mixed at 0.2 and at 0.5, verified, strict; and the same if the reasoning is misjudged
        (verdict(True, 1.0, True), (1, 1, 1, 1, 1, 1), (1, 0, 0.2, 0.5, 0, 0)),
        (verdict(True, 1.0, False), (1, 1, 1, 1, 1, 0), (1, 0, 0.2, 0.5, 0, 1)),
        (verdict(True, 0.25, False), (1, 0.25, 0.4, 0.625, 0, 0), (1, 1, 1, 1, 1, 1)),
        (verdict(False, 1.0, False), (0, 1, 0.8, 0.5, 0, 0), (0, 0, 0, 0, 0, 0)),
        (verdict(False, 0.75, False), (0, 0.75, 0.6, 0.375, 0, 0), (0, 1, 0.8, 0.5, 0, 0)),
        (verdict(False, 0.0, False), (0, 0, 0, 0, 0, 0), (0, 1, 0.8, 0.5, 0, 0)),
    ]
    kinds = [("outcome", 0.2), ("process", 0.2), ("mixed", 0.2), ("mixed", 0.5), ("verified", 0.2), ("strict", 0.2)]
    for v, right, wrong in table:
        before = dict(v)
        assert [reward(v, *kind) for kind in kinds] == pytest.approx(right)
        assert [reward(misjudged(v, 1, 1, 0.99, kind[0]), *kind) for kind in kinds] == pytest.approx(wrong)
        assert v == before


def test_wrong_and_right_reasoning_are_misjudged_apart():
    right, unproven, wrong = verdict(True, 1.0, True), verdict(True, 1.0, False), verdict(True, 0.5, False)
    for kind, rights, wrongs in (("process", [right, unproven], [wrong]), ("strict", [right], [unproven, wrong])):
        for v in wrongs:  # a false positive with probability 0.3
            assert reward(misjudged(v, 0.3, 0, 0.29, kind), kind) == 1
            assert misjudged(v, 0.3, 1, 0.31, kind) == v
        for v in rights:  # a false negative with probability 0.2
            assert reward(misjudged(v, 0, 0.2, 0.19, kind), kind) == 0
            assert misjudged(v, 1, 0.2, 0.21, kind) == v


@pytest.mark.parametrize("kind, noise, expected", [
    ("outcome", "0,0", lambda r: r["outcome"]), ("process", "0,0", lambda r: r["process"]),
    ("verified", "0,0", lambda r: r["verified"]), ("strict", "0,0", lambda r: r["strict"]),
    ("mixed", "0,0", lambda r: 0.3 * r["outcome"] + 0.7 * r["process"]),
    ("strict", "1,0", lambda r: r["outcome"]), ("strict", "0,1", lambda r: 0),
    ("strict", "1,1", lambda r: r["outcome"] - r["strict"])])
def test_a_run_learns_from_the_reward_that_was_asked_for(tmp_path, init, kind, noise, expected):
    result = grpo(tmp_path, init, "--steps", 1, "--reward", kind, "--alpha", 0.3, "--reward-noise", noise,
                  "--prompts", 8)
    assert result.code == 0, result
    row, = metrics(tmp_path / "a.jsonl")
    assert len({0, 1, row["outcome"], row["process"], row["strict"]}) == 5  # or the test could not tell them apart
    assert row["reward"] == pytest.approx(expected(row), abs=1e-6)


def test_noise_strikes_each_solution_by_itself(tmp_path, untrained):
    """Nothing that an untrained model writes is right: the reward is the share of solutions that were misjudged."""
    result = grpo(tmp_path, untrained, *"--steps 2 --reward process --reward-noise 0.3,0.1 --prompts 32 --rollouts 8".split(),
                  "--max-new", 2)
    assert result.code == 0, result
    rows = metrics(tmp_path / "a.jsonl")
    for row in rows:
        assert row["process"] == 0 and abs(row["reward"] - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 256)
        assert row["groups"]["2"]["gradient"] > 0.8  # within groups
        assert row["groups"]["2"]["all_wrong"] == 1  # what the noise says does not make anything right
    assert rows[0]["reward"] != rows[1]["reward"]


# ----------------------------------------------------------------------------------------------------------------------
# whole steps against a naive loop

SETTINGS = dict(lr=3e-3, min_lr=1e-3, temperature=0.9, clip_ratio=0.02, kl=0.2, alpha=0.25, weight_decay=0.1, clip=0.5,
                rollouts=4, updates=2)
TRACED = ["--reward", "mixed", "--steps", 2, "--warmup", 2,
          *[part for name, value in SETTINGS.items() for part in ("--" + name.replace("_", "-"), value)]]


def rollouts_of(calls):
    """The calls of `sample` that were for training, not for held-out problems: [{prompts, model, ..., tokens, logprobs}]."""
    return [arguments | dict(tokens=tokens, logprobs=logprobs) for arguments, (tokens, logprobs) in calls["model.sample"]
            if arguments["temperature"] == SETTINGS["temperature"]]


def solutions_of(rollouts, rows, advantages=True):
    """[(prompt, ids, old log-probabilities, verdict, reward, advantage)] in groups, one group a row."""
    groups, n = [], SETTINGS["rollouts"]
    for p, row in enumerate(rows):
        prompt, group = data.encode(ENC, data.prompt_text(row)), []
        assert prompt == rollouts["prompts"][p]
        for ids, old in list(zip(rollouts["tokens"], rollouts["logprobs"]))[p * n:(p + 1) * n]:
            v = verify(row["solution"], data.decode(ENC, ids))
            group.append([prompt, ids, old.double(), v, 0.25 * v["outcome"] + 0.75 * v["process"]])
        rewards = [r for *_, r in group]
        mean = sum(rewards) / n
        std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (n - 1))
        groups.append([(*solution, (solution[4] - mean) / (std + 1e-6)) for solution in group])
    return groups


def by_hand(init, steps):
    """GRPO as its formula reads. steps: of each step and rank the groups of `solutions_of`. -> model, numbers a step."""
    s = SETTINGS
    model, reference = build_model(load_checkpoint(init)), build_model(load_checkpoint(init))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=s["weight_decay"]),
                                   dict(params=vectors, weight_decay=0.0)], betas=(0.9, 0.95))
    numbers = []
    for step, ranks in enumerate(steps):
        sums = dict(loss=0.0, kl=0.0, approx_kl=0.0, clip_frac=0.0, entropy=0.0, tokens=0, later_tokens=0, grad_norm=0.0)
        for update in range(s["updates"]):
            terms = []
            for groups in ranks:
                part = groups[update * len(groups) // s["updates"]:(update + 1) * len(groups) // s["updates"]]
                for prompt, ids, old, _, _, A in (solution for group in part for solution in group):
                    x = torch.tensor([prompt + ids])
                    p = (model(x)[0].double() / s["temperature"]).log_softmax(-1)
                    q = (reference(x)[0].detach().double() / s["temperature"]).log_softmax(-1)
                    for t, token in enumerate(ids):
                        at = len(prompt) - 1 + t  # the position whose prediction it is
                        ratio = (p[at, token] - old[t]).exp()
                        low, high = 1 - s["clip_ratio"], 1 + s["clip_ratio"]
                        d = q[at, token] - p[at, token]
                        kl = d.exp() - d - 1
                        terms.append(min(ratio * A, min(max(ratio, low), high) * A) - s["kl"] * kl)
                        sums["kl"] += kl.item()
                        if update:  # in the first one, the ratio is 1
                            sums["approx_kl"] += (ratio - ratio.log() - 1).item()
                            sums["clip_frac"] += bool(ratio > high and A > 0 or ratio < low and A < 0)
                            sums["later_tokens"] += 1
                        sums["entropy"] -= (p[at].exp() * p[at]).sum().item()
            loss = -sum(terms) / len(terms)
            loss.backward()
            norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
            for p in model.parameters():
                p.grad *= min(1, s["clip"] / norm)
            for group in optimizer.param_groups:
                group["lr"] = (1.5e-3, 2e-3)[step]  # from 3e-3 towards 1e-3, half way after one of two steps; a warm-up of two
            optimizer.step()
            optimizer.zero_grad()
            sums["loss"] += loss.item() / s["updates"]
            sums["grad_norm"] += norm / s["updates"]
            sums["tokens"] += len(terms)
        means = {k: sums[k] / sums["tokens"] for k in ("kl", "entropy")}
        means |= {k: sums[k] / sums["later_tokens"] for k in ("approx_kl", "clip_frac")}
        numbers.append(means | dict(loss=sums["loss"], grad_norm=sums["grad_norm"]))
    return model, numbers


def assert_close_weights(a, b, lr=SETTINGS["lr"]):
    """Up to rounding. AdamW divides by a gradient's size: where it is next to 0, rounding decides the sign of a step."""
    far = [float((a[name] - b[name]).abs().max()) for name in b]
    mean = sum(float((a[name] - b[name]).abs().sum()) for name in b) / sum(w.numel() for w in b.values())
    assert a.keys() == b.keys() and max(far) < 0.05 * lr and mean < 1e-3 * lr, (max(far), mean)


@pytest.fixture(scope="module")
def traced(tmp_path_factory, init):
    """A run of two steps of five problems, with what it sampled and what it trained on."""
    folder = tmp_path_factory.mktemp("traced")
    result = grpo(folder, init, *TRACED, "--prompts", 5, "--eval-problems", 2, record=["model.sample", "data.in_blocks"])
    assert result.code == 0, result
    return folder, result.calls[0]


@pytest.fixture(scope="module")
def groups(traced):
    return [solutions_of(rollouts, [problem(i) for i in range(5 * step, 5 * step + 5)])
            for step, rollouts in enumerate(rollouts_of(traced[1]))]


def test_every_step_has_problems_and_noise_of_its_own(traced, groups):
    rollouts = rollouts_of(traced[1])
    assert len(rollouts) == 2 and all(r["n"] == 4 and r["max_new"] == 40 for r in rollouts)  # `groups` compares the prompts
    assert not torch.equal(rollouts[0]["generator"], rollouts[1]["generator"])


def test_rollouts_are_scored_as_by_forward(traced, groups):
    for rollouts, of_step in zip(rollouts_of(traced[1]), groups):
        for prompt, ids, old, *_ in (solution for group in of_step for solution in group):
            logits = rollouts["model"](torch.tensor([prompt + ids]))[0, len(prompt) - 1:-1].detach()
            expected = (logits / SETTINGS["temperature"]).log_softmax(-1)[range(len(ids)), ids]
            torch.testing.assert_close(old.float(), expected, rtol=0, atol=1e-5)
    assert max(row["mismatch"] for row in metrics(traced[0] / "a.jsonl")) < 1e-5


def rollout_batches(calls):
    """The rows of each micro-batch; what else is laid out are gold solutions, without log-probabilities and advantages."""
    return [arguments["rows"] for arguments, _ in calls["data.in_blocks"] if len(arguments["rows"][0]) == 4]


def test_an_update_trains_on_its_prompts_and_each_solution_once(traced, groups):
    batches = [[(ids, n_prompt) for ids, n_prompt, *_ in rows] for rows in rollout_batches(traced[1])]
    assert len(batches) > 4 and all(arguments["loss"] == "solution" for arguments, _ in traced[1]["data.in_blocks"])
    trained = [row for batch in batches for row in batch]
    for of_step in groups:
        for part in (of_step[:2], of_step[2:]):
            expected = [(prompt + ids, len(prompt)) for group in part for prompt, ids, *_ in group]
            assert sorted(trained[:len(expected)]) == sorted(expected)
            trained = trained[len(expected):]
    assert not trained


def test_two_steps_are_those_of_the_formula(traced, groups, init):
    model, numbers = by_hand(init, [[of_step] for of_step in groups])
    checkpoint = load_checkpoint(traced[0] / "a.pt")
    assert_close_weights(checkpoint["model"], model.state_dict())
    start = load_checkpoint(init)["model"]
    assert max(float((start[name] - checkpoint["model"][name]).abs().max()) for name in start) > SETTINGS["lr"]
    assert same(checkpoint["reference"], start)
    for row, expected in zip(metrics(traced[0] / "a.jsonl"), numbers):
        for name in ("loss", "kl", "approx_kl", "clip_frac", "entropy", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name
        assert expected["clip_frac"] > 0.005 and expected["kl"] > 1e-4 and expected["grad_norm"] > SETTINGS["clip"]


def test_the_metrics_are_those_computed_by_hand(traced, groups):
    tokens = 0
    for j, (row, of_step) in enumerate(zip(metrics(traced[0] / "a.jsonl"), groups)):
        solutions = [solution for group in of_step for solution in group]
        for name in ("outcome", "process", "verified", "strict"):
            assert row[name] == pytest.approx(np.mean([v[name] for _, _, _, v, *_ in solutions])), name
        assert row["hacked"] == pytest.approx(np.mean([v["outcome"] and not v["verified"] for _, _, _, v, *_ in solutions]))
        assert row["reward"] == pytest.approx(np.mean([r for *_, r, _ in solutions]))
        assert row["length"] == pytest.approx(np.mean([len(ids) for _, ids, *_ in solutions]))
        assert row["truncated"] == pytest.approx(np.mean([STOP not in ids for _, ids, *_ in solutions]))
        of_op, = row["groups"].values()
        assert [*row["groups"]] == ["2"] and of_op["groups"] == 5 and of_op["reward"] == pytest.approx(row["reward"])
        rewards = [[r for *_, r, _ in group] for group in of_step]
        assert of_op["all_right"] == np.mean([min(r) == 1 for r in rewards])
        assert of_op["all_wrong"] == np.mean([max(r) < 1 for r in rewards])
        assert of_op["mixed"] == pytest.approx(1 - of_op["all_right"] - of_op["all_wrong"])
        assert of_op["gradient"] == np.mean([max(r) > min(r) for r in rewards])
        tokens += sum(len(prompt) + len(ids) for prompt, ids, *_ in solutions)
        assert row["tokens"] == tokens and row["training_tokens"] == row["spent_tokens"] == round(tokens * 5 / 3)
        assert (row["step"], row["problems"], row["lr"]) == (j + 1, 5 * j + 5, pytest.approx([1.5e-3, 2e-3][j]))
    assert any(0 < len({r for *_, r, _ in group}) - 1 for group in groups[0])  # there was something to learn


def test_what_is_not_done_is_not_counted_as_spent(tmp_path, untrained):
    """Nothing that an untrained model writes is right, so false positives decide which groups have a gradient."""
    for false_positives in (0, 0.5, 1):
        result = grpo(tmp_path, untrained, *"--steps 1 --reward process --kl 0 --prompts 16 --rollouts 2 --max-new 2".split(),
                      "--reward-noise", f"{false_positives},0")
        assert result.code == 0, result
        row, = metrics(tmp_path / "a.jsonl")
        share = row["groups"]["2"]["gradient"]  # prompts are of about equal length
        assert 0.2 < share < 0.8 if false_positives == 0.5 else share == 0
        assert row["spent_tokens"] / row["tokens"] == pytest.approx((2 + 6 * share) / 6, rel=0.05)


def test_the_held_out_shares_are_those_computed_by_hand(traced):
    """Four samples at temperature 0.7 for two problems of op 2 (ID) and two of op 3 (OOD-edge), before and after."""
    calls = [(a, tokens) for a, (tokens, _) in traced[1]["model.sample"] if a["temperature"] == 0.7]
    assert len(calls) == 4 and all(len(a["prompts"]) == 2 and a["n"] == 4 for a, _ in calls)
    shares = []  # of the samples of each problem, for each call
    for (arguments, tokens), mix in zip(calls, ("zoo:2", "zoo:3") * 2):
        rows = [problem(i, mix, "eval") for i in (0, 1)]
        assert arguments["prompts"] == [data.encode(ENC, data.prompt_text(row)) for row in rows]
        right = [verify(rows[j // 4]["solution"], data.decode(ENC, ids))["verified"] for j, ids in enumerate(tokens)]
        shares.append([np.mean(right[:4]), np.mean(right[4:])])
    assert len({*map(sum, shares)}) > 1
    before, after = metrics(traced[0] / "a.jsonl")  # evaluated at the end only
    for row, (in_range, at_edge) in (before, shares[:2]), (after, shares[2:]):
        assert row["held_out"] == {"ID": np.mean(in_range), "ID interval": interval(in_range).tolist(),
                                   "OOD-edge": np.mean(at_edge), "OOD-edge interval": interval(at_edge).tolist()}
    assert load_checkpoint(traced[0] / "a.pt")["held_out"] == after["held_out"]


def test_a_step_makes_what_was_rewarded_more_likely(traced, groups):
    before, after = (r["model"] for r in rollouts_of(traced[1]))
    gain = 0.0
    for prompt, ids, _, _, _, A in (solution for group in groups[0] for solution in group):
        tokens = torch.tensor([prompt + ids]), torch.arange(len(prompt) - 1, len(prompt) + len(ids) - 1), torch.tensor(ids)
        gain += A * float((after.logprobs(*tokens)[0] - before.logprobs(*tokens)[0]).detach().mean())
    assert gain > 0.1


@pytest.mark.parametrize("micro_tokens", [1, 100_000])
def test_micro_batches_of_a_run_change_nothing(tmp_path, traced, init, micro_tokens):
    result = grpo(tmp_path, init, *TRACED, "--prompts", 5, "--micro-tokens", micro_tokens, record=["data.in_blocks"])
    assert result.code == 0, result
    sizes = [len(rows) for rows in rollout_batches(result.calls[0])]
    assert sizes == ([1] * 40 if micro_tokens == 1 else [8, 12, 8, 12])
    assert_same_steps(tmp_path, traced[0])


def assert_same_steps(folder, expected):
    assert_close_weights(*(load_checkpoint(f / "a.pt")["model"] for f in (folder, expected)))
    for row, row_expected in zip(metrics(folder / "a.jsonl"), metrics(expected / "a.jsonl"), strict=True):
        for name in ("loss", "grad_norm", "kl", "approx_kl", "clip_frac", "entropy", "reward"):
            assert row[name] == pytest.approx(row_expected[name], rel=1e-3, abs=1e-6), name


def test_packed_and_compiled_updates_change_nothing(tmp_path, traced, init):
    result = grpo(tmp_path, init, *TRACED, "--prompts", 5, "--compile", "--micro-tokens", 2048, record=["data.pack", "data.in_blocks"])
    assert result.code == 0, result
    assert len(result.calls[0]["data.pack"]) >= 4 and not result.calls[0]["data.in_blocks"]
    assert_same_steps(tmp_path, traced[0])


def test_without_kl_groups_of_equal_rewards_are_left_out(tmp_path, init):
    """And the loss is still divided by the tokens of all solutions: leaving them out changes no gradient."""
    rows = {}
    for kl in ("0", "1e-9"):
        result = grpo(tmp_path, init, *TRACED, "--steps", 1, "--warmup", 0, "--updates", 1, "--kl", kl, "--prompts", 12,
                      "--rollouts", 2, "--reward", "outcome", record=["data.in_blocks"])
        assert result.code == 0, result
        rows[kl] = metrics(tmp_path / "a.jsonl")[0] | {"rows": sum(map(len, rollout_batches(result.calls[0])))}
    assert rows["1e-9"]["rows"] == 24 and rows["0"]["rows"] == 24 * rows["0"]["groups"]["2"]["gradient"] < 24
    assert rows["0"]["grad_norm"] == pytest.approx(rows["1e-9"]["grad_norm"], rel=1e-4)
    assert all(row["approx_kl"] is row["clip_frac"] is None for row in rows.values())  # one update: nothing has moved before it


def test_without_a_reward_and_kl_nothing_changes(tmp_path, untrained):
    result = grpo(tmp_path, untrained, *"--steps 2 --kl 0 --max-new 4 --lr 0.01".split())
    assert result.code == 0, result
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert same(checkpoint["model"], load_checkpoint(untrained)["model"]) and checkpoint["reference"] is None


def test_an_update_without_a_gradient_does_not_go_on_in_the_old_direction(tmp_path, init, untrained):
    """Adam would, from the moments of the updates before; so would its weight decay."""
    arguments = "--steps 2 --kl 0 --lr 0.01 --weight-decay 0.1 --warmup 0 --save-every 1 --reward outcome".split()
    assert grpo(tmp_path, init, *arguments, send=(signal.SIGKILL, 2)).code == -signal.SIGKILL
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert metrics(tmp_path / "a.jsonl")[0]["grad_norm"] > 0 and checkpoint["optimizer"]["state"]
    checkpoint["model"] = load_checkpoint(untrained)["model"]  # of the same shape, and nothing it writes is right
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    result = grpo(tmp_path, init, *arguments, "--resume")
    assert result.code == 0 and metrics(tmp_path / "a.jsonl")[1]["grad_norm"] == 0, result
    assert same(load_checkpoint(tmp_path / "a.pt")["model"], checkpoint["model"])


def test_the_advantage_can_leave_out_the_division(tmp_path, init):
    """With two solutions a group, one right and one wrong, "std" gives advantages of 0.707, "mean" of 0.5."""
    norms = {}
    for kind in ("std", "mean"):
        result = grpo(tmp_path, init, *"--steps 1 --updates 1 --rollouts 2 --prompts 8 --kl 0 --reward outcome".split(),
                      "--advantage", kind)
        assert result.code == 0, result
        norms[kind] = metrics(tmp_path / "a.jsonl")[0]["grad_norm"]
    assert norms["std"] / norms["mean"] == pytest.approx(math.sqrt(2), rel=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# it learns

def test_a_bandit_is_solved():
    """Eight words, one of them the end; after prompt k the right text is "k + 1, end". Chance has one in 64 right."""
    torch.manual_seed(0)
    model, generator = make_model(n_layers=1, vocab_size=8), torch.Generator().manual_seed(0)
    reference = make_model(n_layers=1, vocab_size=8)
    optimizer, prompts, means = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0), [[1], [2], [3]], []
    with torch.no_grad():
        for m in (model, reference):
            m.norm.weight *= 0.3  # near chance
    for _ in range(60):
        tokens, old = sample(model, prompts, 0, 64, 3, 1.0, generator)
        rewards = torch.tensor([[0.5 * (ids[0] == k + 1) + 0.5 * (ids == [k + 1, 0]) for ids in tokens[64 * j:64 * j + 64]]
                                for j, (k,) in enumerate(prompts)])
        means.append(float(rewards.mean()))
        A, pairs = group_advantages(rewards).flatten(), [(prompts[j // 64] + ids, 1) for j, ids in enumerate(tokens)]
        where = solution_tokens(pairs)
        for _ in range(2):
            logprobs, _ = model.logprobs(*where)
            with torch.no_grad():
                ref, _ = reference.logprobs(*where)
            of_token = A.repeat_interleave(torch.tensor([len(ids) for ids in tokens]))
            grpo_loss(logprobs, torch.cat(old), ref, of_token, len(of_token), 0.2, 1e-3)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
    assert means[0] < 0.2 and np.mean(means[-5:]) > 0.95, means


# ----------------------------------------------------------------------------------------------------------------------
# which problems

def weights(mixture):
    return dict(zip(mixture.cells, mixture.weights))


def test_reweighted_multiplies_the_weight_of_an_op():
    mixture = data.parse_mixture("zoo:2-3:0.6,school:3:0.4")
    changed = weights(data.reweighted(mixture, {2: 0.1, 3: 1.0}))  # 0.03, 0.3, 0.4 of 0.73
    assert changed == pytest.approx({("zoo", 2): 3 / 73, ("zoo", 3): 30 / 73, ("school", 3): 40 / 73})
    again = data.reweighted(mixture, {2: 1.0, 3: 1.0})
    assert weights(again) == pytest.approx(weights(mixture)) and again.cumulative[-1] == pytest.approx(1)
    counts = {2: 0, 3: 0}
    for i in range(400):
        counts[data.make_row(i, data.reweighted(mixture, {2: 0.1, 3: 1.0}))["op"]] += 1
    assert abs(counts[2] / 400 - 3 / 73) < 4 * math.sqrt(3 / 73 / 400)


def assert_follows_the_curriculum(calls, rows):
    """The factors of the ops, at each step, are those of a memory of 0.9 and a floor of 0.1, from the logged shares."""
    share = {op: 1.0 for op in calls[0][0]["factors"]}
    assert len(calls) == len(rows)
    for (arguments, _), row in zip(calls, rows):
        assert arguments["factors"] == pytest.approx({op: max(0.1, x) for op, x in share.items()})
        for op, group in row["groups"].items():
            share[int(op)] = 0.9 * share[int(op)] + 0.1 * group["gradient"]
    return share


def test_the_curriculum_forgets_ops_without_a_gradient_down_to_a_floor(tmp_path, untrained):
    """All rewards are 0. By default it draws from everything up to OOD-hard: op 2-6 after 2-3."""
    result = grpo(tmp_path, untrained, *"--curriculum --steps 40 --prompts 5 --rollouts 2 --max-new 2".split(),
                  "--eval-every", 50, record=["data.reweighted", "data.make_row"])
    assert result.code == 0, result
    drawn = [arguments["mixture"] for arguments, _ in result.calls[0]["data.make_row"] if arguments["split"] == "train"]
    assert drawn == [mixture for _, mixture in result.calls[0]["data.reweighted"] for _ in range(5)]
    calls, checkpoint = result.calls[0]["data.reweighted"], load_checkpoint(tmp_path / "a.pt")
    share = assert_follows_the_curriculum(calls, metrics(tmp_path / "a.jsonl"))
    assert [*share] == [2, 3, 4, 5, 6] and shares_of(checkpoint) == pytest.approx({op: 0.2 for op in range(2, 7)})
    assert checkpoint["learnable"] == pytest.approx([*share.values()]) and max(share.values()) < 0.2
    assert 0.1 in calls[-1][0]["factors"].values()  # the floor was reached


def shares_of(checkpoint):
    """{op: probability} of the mixture of a checkpoint."""
    shares = {}
    for (_, op), weight in weights(data.parse_mixture(checkpoint["recipe"]["mix"])).items():
        shares[op] = shares.get(op, 0.0) + weight
    return {op: share for op, share in shares.items() if share}


def test_by_default_problems_are_of_the_edge_and_some_of_the_range_of_pretraining(tmp_path, untrained):
    result = run(tmp_path, "grpo.py", "--init", untrained, "--out", "a.pt",
                 *"--device cpu --steps 1 --prompts 4 --max-new 2".split())
    assert result.code == 0, result
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert shares_of(checkpoint) == pytest.approx({2: 0.1, 3: 0.1, 4: 0.4, 5: 0.4}) and checkpoint["id_ops"] == [2, 3]
    assert {*metrics(tmp_path / "a.jsonl")[0]["groups"]} <= {"2", "3", "4", "5"}
    assert (checkpoint["stage"], checkpoint["step"], checkpoint["problems"]) == ("grpo", 1, 4)
    assert (checkpoint["recipe"]["preset"], checkpoint["recipe"]["reward"]) == ("tiny", "strict") and is_finite(checkpoint)


@pytest.mark.parametrize("arguments, expected", [
    ("--id-share 0", {4: 0.5, 5: 0.5}), ("--ops 5 --id-share 0.4", {2: 0.2, 3: 0.2, 5: 0.6}),
    ("--mix zoo:2:3,movie:9", {2: 0.75, 9: 0.25}), ("--curriculum --ops 4-5", {4: 0.5, 5: 0.5})])
def test_the_mixture(tmp_path, untrained, monkeypatch, arguments, expected):
    paths = ["--init", str(untrained), "--out", str(tmp_path / "a.pt")]
    monkeypatch.setattr("sys.argv", ["grpo.py", *paths, *arguments.split()])
    _, args, *_ = G.arguments()
    assert shares_of({"recipe": {"mix": args.mix}}) == pytest.approx(expected)


@pytest.mark.parametrize("arguments, op", [  # the largest op, of the mixture or of the held-out problems (op 4-5 after 2-3)
    ("--ops 20", 20), ("--mix zoo:2:0.999,movie:18:0.001 --curriculum", 18), ("--ops 2", 5)])
def test_solutions_have_room_for_the_largest_op(tmp_path, untrained, monkeypatch, arguments, op):
    argv = ["grpo.py", "--init", str(untrained), "--out", str(tmp_path / "a.pt"), *arguments.split()]
    limits = []
    for more in ([], [], ["--max-new", "40"]):
        monkeypatch.setattr("sys.argv", argv + more)
        limits.append(G.arguments()[1].max_new)
    ids = [data.encode_row(ENC, data.make_row(i, data.parse_mixture(str(op)), 1, "train", data.World(2.0))) for i in range(100)]
    longest = max(len(row) - n_prompt for row, n_prompt in ids)
    assert 1.2 * longest < limits[0] < 2 * longest + 16 and limits[1:] == [limits[0], 40]


@pytest.mark.parametrize("preset, betas", [("tiny", (0.9, 0.95)), ("100m", (0.9, 0.999))])
def test_adam_has_the_betas_of_the_preset(tmp_path, untrained, preset, betas):
    result = grpo(tmp_path, untrained, *"--steps 1 --max-new 2 --workers 0 --preset".split(), preset)
    assert result.code == 0, result
    assert {group["betas"] for group in load_checkpoint(tmp_path / "a.pt")["optimizer"]["param_groups"]} == {betas}


def test_with_cuda_updates_are_compiled_in_bfloat16_if_the_device_has_that(tmp_path, untrained, monkeypatch, pretend_cuda):
    paths = ["grpo.py", "--init", str(untrained), "--out", str(tmp_path / "a.pt")]
    assert_compiled_where_there_is_bfloat16(G, paths, monkeypatch, pretend_cuda)


def test_the_edge_that_was_measured_and_a_resumed_run_keeps_it(tmp_path, untrained):
    def measure(edge):
        found = {"by/another/name.pt": {"edge": edge, "run": "first"}, "other.pt": {"edge": [2, 2], "run": "second"}}
        (tmp_path / "e.json").write_text(json.dumps({"checkpoints": found}))

    arguments = "--ops edge --id-share 0 --eval-json e.json --steps 3 --save-every 1 --max-new 2".split()
    measure([3, 6])
    assert grpo(tmp_path, untrained, *arguments, send=(signal.SIGKILL, 2)).code == -signal.SIGKILL
    assert shares_of(load_checkpoint(tmp_path / "a.pt")) == pytest.approx({op: 0.25 for op in range(3, 7)})
    measure([4, 4])
    result = grpo(tmp_path, untrained, *arguments, "--resume")
    assert result.code == 0, result
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    assert checkpoint["step"] == 3 and shares_of(checkpoint) == pytest.approx({op: 0.25 for op in range(3, 7)})


@pytest.mark.parametrize("content, words", [
    (None, ["e.json", "evaluate.py"]), ("nonsense", ["e.json", "evaluate.py"]), ("[1]", ["e.json", "evaluate.py"]),
    ('{"checkpoints": {"other.pt": {"edge": [3, 4]}}}', ["init.pt", "e.json", "evaluate.py"]),
    ('{"checkpoints": {"INIT": {"groups": {}, "run": "first"}}}', ["init.pt", "evaluate.py"]),
    ('{"checkpoints": {"INIT": {"edge": [3, 4], "run": "before it was trained anew"}}}', ["init.pt", "evaluate.py"]),
    ('{"checkpoints": {"INIT": {"edge": null, "run": "first"}}}', ["edge", "--ops"])], ids=str)
def test_an_edge_that_was_not_measured_is_refused(tmp_path, untrained, content, words):
    if content is not None:
        (tmp_path / "e.json").write_text(content.replace("INIT", str(untrained)))
    assert_refused(grpo(tmp_path, untrained, *"--ops edge --eval-json e.json --steps 1".split()), *words)
    assert {*os.listdir(tmp_path)} <= {"e.json"}


def test_a_budget_ends_the_run(tmp_path, untrained):
    """30 % of 8,000 training tokens are 1,440 of RL. A step reads about 12 + 4 tokens, 16 times."""
    result = grpo(tmp_path, untrained, *"--budget 8e3 --rl-share 0.3 --max-new 4".split())
    assert result.code == 0, result
    rows = metrics(tmp_path / "a.jsonl")
    assert len(rows) > 2 and rows[-1]["tokens"] * 5 / 3 >= 2400 > rows[-2]["tokens"] * 5 / 3
    steps = np.diff([0] + [row["tokens"] for row in rows])
    for first, step in zip(range(0, 100, 4), steps):  # four prompts, four times each, and no end-of-text in four tokens
        prompts = sum(len(data.encode(ENC, data.prompt_text(problem(i)))) for i in range(first, first + 4))
        assert 4 * prompts + 16 <= step <= 4 * prompts + 64
    assert [row["training_tokens"] for row in rows] == [round(row["tokens"] * 5 / 3) for row in rows]
    assert load_checkpoint(tmp_path / "a.pt")["step"] == len(rows)
    before = (tmp_path / "a.jsonl").read_text()
    result = grpo(tmp_path, untrained, *"--budget 8e3 --rl-share 0.3 --max-new 4 --resume".split())
    assert result.code == 0 and (tmp_path / "a.jsonl").read_text() == before  # nothing is left to spend


def test_bfloat16_runs_and_says_how_far_sampling_is_from_training(tmp_path, init):
    result = grpo(tmp_path, init, "--dtype", "bfloat16", "--kl", 0.1, "--steps", 1)
    assert result.code == 0 and 0 < metrics(tmp_path / "a.jsonl")[0]["mismatch"] < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# resuming: with noise, two ops, a curriculum, KL and a warm-up, all of which have a state to lose

SIX = "--mix zoo:2-3 --curriculum --reward mixed --reward-noise 0.1,0.2 --kl 0.05 --lr 3e-3 --min-lr 1e-3 --warmup 4 --steps 6 " \
      "--save-every 2 --eval-every 3 --eval-problems 2".split()
TIMES = {"seconds", "rollout_s", "verify_s", "update_s", "tokens_per_s"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, init):
    """A folder with an uninterrupted run of six steps."""
    folder = tmp_path_factory.mktemp("whole")
    result = grpo(folder, init, *SIX, record=["data.reweighted"])
    assert result.code == 0, result
    rows = metrics(folder / "a.jsonl")
    share = assert_follows_the_curriculum(result.calls[0]["data.reweighted"], rows)
    assert load_checkpoint(folder / "a.pt")["learnable"] == pytest.approx([*share.values()]) and share[2] != share[3]
    assert len({row["reward"] for row in rows}) > 3 and rows[-1]["kl"] > 0
    assert len({str(row["held_out"]) for row in rows}) == 3  # before, after steps 3 and 6
    return folder


def assert_same_run(folder, whole):
    """Two runs ended alike, bit for bit, but for the time they took."""
    a, b = load_checkpoint(folder / "a.pt"), load_checkpoint(whole / "a.pt")
    assert a.keys() == b.keys() and b["optimizer"]["state"]
    for key in b.keys() - {"seconds", "run"}:
        assert same(a[key], b[key]), key
    rows, rows_whole = metrics(folder / "a.jsonl"), metrics(whole / "a.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows_whole) + 1))
    for row, row_whole in zip(rows, rows_whole):
        assert row.keys() == row_whole.keys() > TIMES
        for key in row.keys() - TIMES:
            assert row[key] == row_whole[key], key
    times = [row["seconds"] for row in rows]
    assert times == sorted(times)


def test_a_killed_run_resumes_exactly(tmp_path, init, whole):
    assert grpo(tmp_path, init, *SIX, send=(signal.SIGKILL, 2)).code == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 2 and metrics(tmp_path / "a.jsonl")[-1]["step"] == 4
    with open(tmp_path / "a.jsonl", "a") as f:
        f.write('{"step": 2, "groups": {"2": {"groups": 4}')  # killed in the middle of a line
    result = grpo(tmp_path, init, *SIX, "--resume", send=(signal.SIGKILL, 2))
    assert result.code == -signal.SIGKILL and "at step 2" in result.out
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 4
    result = grpo(tmp_path, init, *SIX, "--resume")
    assert result.code == 0 and "at step 4" in result.out
    assert_same_run(tmp_path, whole)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "a.pt"]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, init, whole):
    assert grpo(tmp_path, init, *SIX, send=(signal.SIGKILL, 1)).code == -signal.SIGKILL
    assert not (tmp_path / "a.pt").exists()
    result = grpo(tmp_path, init, *SIX, "--resume")
    assert result.code == 0 and "step 0" in result.out
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_saves_and_resumes_exactly_even_without_its_init(tmp_path, init, whole, number):
    moved = tmp_path / "init.pt"
    moved.write_bytes(init.read_bytes())
    result = grpo(tmp_path, "init.pt", *SIX, send=(number, 1))
    assert result.code == 130 and "--resume" in result.out and "Traceback" not in result.err
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 3
    moved.unlink()  # the reference is in the checkpoint
    result = grpo(tmp_path, "init.pt", *SIX, "--resume")
    assert result.code == 0 and "at step 3" in result.out
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    checkpoint["recipe"]["init"] = str(init)
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    assert_same_run(tmp_path, whole)


def copy(whole, tmp_path):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())


def test_resuming_a_finished_run_is_harmless(tmp_path, init, whole):
    copy(whole, tmp_path)
    assert grpo(tmp_path, init, *SIX, "--resume").code == 0
    assert_same_run(tmp_path, whole)


def test_resuming_after_the_stage_before_was_run_again_is_refused(tmp_path, init, whole):
    for name in ("a.pt", "a.jsonl"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    checkpoint = load_checkpoint(tmp_path / "a.pt")
    checkpoint["recipe"]["init"] = "init.pt"
    save_checkpoint(tmp_path / "a.pt", checkpoint)
    save_checkpoint(tmp_path / "init.pt", {**load_checkpoint(init), "run": "another"})
    assert_refused(grpo(tmp_path, "init.pt", *SIX, "--resume"), "init.pt", "anew")


def test_resuming_with_other_arguments_is_refused(tmp_path, init, whole):
    copy(whole, tmp_path)
    for option, value in (("--lr", "0.1"), ("--reward", "strict"), ("--prompts", "8"), ("--seed", "1"), ("--kl", "0.5"),
                          ("--temperature", "0.5"), ("--init", "other.pt"), ("--mix", "zoo:2"), ("--alpha", "0.9")):
        assert_refused(grpo(tmp_path, init, *SIX, "--resume", option, value), option.strip("-"), value)
    for name in ("a.pt", "a.jsonl"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


BROKEN_HERE = BROKEN | {
    "another stage": checkpoint_with(stage="midtrain"),
    "without optimizer": checkpoint_without("optimizer"),
    "without reference": checkpoint_without("reference"),
    "without recipe": checkpoint_without("recipe"),
    "other tokens": checkpoint_with(recipe={"preset": "tiny", "vocabulary": "another"}),
    "a new preset": checkpoint_with(recipe={"preset": "mini"}),
    "without ops": checkpoint_without("id_ops"),
    "wrong optimizer": checkpoint_with(optimizer=[1, 2]),
    "wrong reference": checkpoint_with(reference={"x": torch.zeros(3)}),
}


@pytest.mark.parametrize("kind", BROKEN_HERE)
def test_resuming_a_broken_checkpoint_is_refused(tmp_path, init, whole, kind):
    path = tmp_path / "a.pt"
    put(BROKEN_HERE[kind](whole / "a.pt"), path)
    before = path.read_bytes()
    assert_refused(grpo(tmp_path, init, *SIX, "--resume"), "a.pt")
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.pt"]


def test_workers_judge_as_the_run_itself(tmp_path, init):
    """As typed in a shell: workers start from the script itself."""
    runs = []
    for workers in "02":
        done = subprocess.run([sys.executable, ROOT / "grpo.py", "--init", init, "--out", f"{workers}.pt", *SIX, "--steps", "2",
                               *f"--device cpu --dtype float32 --prompts 4 --rollouts 4 --max-new 40 --workers {workers}".split()],
                              cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        runs.append([{k: v for k, v in row.items() if k not in TIMES} for row in metrics(tmp_path / f"{workers}.jsonl")])
    assert runs[0] == runs[1] and len(runs[0]) == 2


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs /proc, to see the workers")
@pytest.mark.parametrize("number, group", [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGKILL, False)])
def test_workers_leave_signals_to_the_run_and_end_with_it(tmp_path, init, number, group):
    """torchrun and `timeout` signal a whole group, and nobody can answer SIGKILL."""
    arguments = ["--init", init, *"--out a.pt --mix zoo:2-3 --steps 100000 --device cpu --dtype float32 --prompts 4 --rollouts 4 "
                 "--max-new 20 --eval-problems 2 --save-every 100000 --workers 2".split()]
    code, messages, n_workers, left = end_with_workers(tmp_path, "grpo.py", arguments, number, group)
    assert n_workers and not left, messages  # they are started when they are needed
    if group:
        assert code == 130 and "Traceback" not in messages, messages
        assert load_checkpoint(tmp_path / "a.pt")["step"] >= 1


# ----------------------------------------------------------------------------------------------------------------------
# two ranks

RANKS = [*TRACED, "--prompts", 6, "--save-every", 1]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, init):
    folder = tmp_path_factory.mktemp("ranks")
    result = grpo(folder, init, *RANKS, ranks=2, record=["model.sample"])
    assert result.code == 0, result
    assert "2 ranks" in result.out and result.out.count("held out before") == 1
    assert sorted(os.listdir(folder)) == ["a.jsonl", "a.pt"]
    return folder, [rollouts_of(calls) for calls in result.calls]


def test_two_ranks_are_one_step_of_the_formula_over_the_solutions_of_both(two_ranks, init):
    folder, rollouts = two_ranks
    steps = [[solutions_of(rollouts[rank][step], [problem(i) for i in range(6 * step + rank, 6 * step + 6, 2)])
              for rank in (0, 1)] for step in (0, 1)]
    model, numbers = by_hand(init, steps)
    checkpoint = load_checkpoint(folder / "a.pt")
    assert_close_weights(checkpoint["model"], model.state_dict())
    tokens = 0
    for row, expected, ranks in zip(metrics(folder / "a.jsonl"), numbers, steps):
        for name in ("loss", "kl", "approx_kl", "clip_frac", "entropy", "grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=2e-3, abs=1e-6), name
        solutions = [solution for groups in ranks for group in groups for solution in group]
        tokens += sum(len(prompt) + len(ids) for prompt, ids, *_ in solutions)
        assert row["tokens"] == tokens and len(solutions) == 24
        assert row["reward"] == pytest.approx(np.mean([r for *_, r, _ in solutions]))
    noise = [r["generator"] for of_rank in rollouts for r in of_rank]
    assert not any(torch.equal(a, b) for j, a in enumerate(noise) for b in noise[:j])


def test_two_ranks_resume_exactly(tmp_path, two_ranks, init):
    assert grpo(tmp_path, init, *RANKS, ranks=2, send=(signal.SIGKILL, 2)).code == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "a.pt")["step"] == 1
    assert_refused(grpo(tmp_path, init, *RANKS, "--resume"), "ranks")
    result = grpo(tmp_path, init, *RANKS, "--resume", ranks=2)
    assert result.code == 0 and "at step 1" in result.out
    assert_same_run(tmp_path, two_ranks[0])


# ----------------------------------------------------------------------------------------------------------------------
# runs that explode, and bad input

@pytest.mark.parametrize("kl, lr", [("0.1", "1e11"), ("0", "1e11"), ("0", "1e3")])
def test_an_exploding_run_stops_and_says_why(tmp_path, init, kl, lr):
    result = grpo(tmp_path, init, *"--steps 6 --save-every 1 --reward mixed --kl".split(), kl, "--lr", lr)
    assert result.code == 1 and "--lr" in result.out.splitlines()[-1] and "Traceback" not in result.err
    assert not (tmp_path / "a.pt").exists() or is_finite(load_checkpoint(tmp_path / "a.pt"))


BAD = [  # arguments, words in the last line
    ("--rollouts 1", "--rollouts"), ("--rollouts 0", "--rollouts"), ("--prompts 0", "--prompts"),
    ("--updates 0", "--updates"),
    ("--updates 5", "too few"), ("--steps 0", "--steps"), ("--steps x", "--steps"), ("--max-new 0", "--max-new"),
    ("--micro-tokens 0", "--micro-tokens"), ("--rows 0", "--rows"), ("--log-every 0", "--log-every"),
    ("--eval-every 0", "--eval-every"), ("--eval-problems 0", "--eval-problems"), ("--save-every 0", "--save-every"),
    ("--reward foo", "foo"), ("--alpha 2", "--alpha"), ("--alpha -0.1", "--alpha"), ("--alpha nan", "--alpha"),
    ("--id-share 0.2 --curriculum", "--curriculum"), ("--id-share -0.1 --ops 3", "--id-share"), ("--id-share nan --ops 3", "--id-share"),
    ("--reward-noise 0.1", "--reward-noise"), ("--reward-noise -1,0", "--reward-noise"), ("--advantage foo", "foo"),
    ("--reward outcome --reward-noise 0.1,0.1", "--reward-noise"), ("--reward-noise 0,1.5", "--reward-noise"), ("--reward-noise 0,0,0", "--reward-noise"),
    ("--clip-ratio 0", "--clip-ratio"), ("--kl -1", "--kl"), ("--kl nan", "--kl"), ("--temperature 0", "--temperature"),
    ("--temperature -1", "--temperature"), ("--temperature inf", "--temperature"), ("--lr -1", "--lr"), ("--lr inf", "--lr"),
    ("--clip 0", "--clip"), ("--warmup -1", "--warmup"), ("--weight-decay -1", "--weight-decay"), ("--seed -1", "--seed"),
    ("--budget 1e6", "--rl-share"), ("--rl-share 0.5", "--budget"), ("--budget 1e6 --rl-share 0.5 --steps 3", "--steps"),
    ("--budget 0 --rl-share 0.5", "--budget"), ("--budget 1e6 --rl-share 0", "--rl-share"),
    ("--budget 1e6 --rl-share 1.5", "--rl-share"), ("--budget nan --rl-share 0.5", "--budget"),
    ("--ops 10-2", "10-2"), ("--ops 0-1", "0-1"), ("--ops x", "x"), ("--ops 2 --mix zoo:2", "not both"),
    ("--mix nonsense", "nonsense"), ("--mix zoo:2:0", "zero"), ("--distractors 99", "distractors"),
    ("--preset nope", "nope"),
    ("--dtype nope", "nope"), ("--device nope", "nope"), ("--nope", "--nope"), ("--init missing.pt", "missing.pt"),
    ("--init adirectory", "adirectory"), ("--init afile", "afile"), ("--out afile/a.pt", "afile"),
    ("--out adirectory", "adirectory"), ("--out a.jsonl", "a.jsonl"), ("--out INIT", "overwrite"),
]


@pytest.mark.parametrize("arguments, word", BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(tmp_path, init, arguments, word):
    (tmp_path / "afile").write_text("keep me")
    (tmp_path / "adirectory").mkdir()
    (tmp_path / "init.pt").write_bytes(init.read_bytes())
    assert_refused(grpo(tmp_path, "init.pt", *arguments.replace("INIT", str(tmp_path / "init.pt")).split()), word)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["adirectory", "afile", "init.pt"]
    assert (tmp_path / "afile").read_text() == "keep me" and (tmp_path / "init.pt").read_bytes() == init.read_bytes()


@pytest.mark.parametrize("kind", [*BROKEN, "without ops", "without recipe", "other tokens", "a new preset"])
def test_a_broken_checkpoint_to_start_from_is_refused(tmp_path, init, kind):
    put(BROKEN_HERE[kind](init), tmp_path / "init.pt")
    why = {"other tokens": "tokens", "a new preset": "mini"}.get(kind, "")
    assert_refused(grpo(tmp_path, "init.pt", "--steps", 1), "init.pt", why)
    assert os.listdir(tmp_path) == ["init.pt"]


def test_prompts_that_the_ranks_cannot_share_evenly_are_refused(tmp_path, init):
    result = grpo(tmp_path, init, "--prompts", 3, ranks=2)
    assert_refused(result, "--prompts", "ranks")
    assert os.listdir(tmp_path) == []
