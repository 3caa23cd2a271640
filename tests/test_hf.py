"""
Hugging Face folders: ours, out and back, and those of others, with a tokenizer of their own.

It needs transformers, with what it brings (safetensors, tokenizers).
"""
import json
import random

import pytest
import torch

import data
import model as M
from conftest import TINY, assert_refused, run
from evaluate import VERDICTS
from model import Config, Transformer, load_checkpoint, sample

transformers = pytest.importorskip("transformers", reason="needs transformers")
tokenizers = pytest.importorskip("tokenizers", reason="needs tokenizers")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs safetensors")

ENC = data.tokenizer()
SHORT = "--n 4 --k 1,4 --problems 2 --ops 2-4".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a checkpoint a.pt, barely trained on op 2-3, and hf/, made from it."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(folder, "pretrain.py", *TINY, "--ops", "2-3", "--steps", 30, "--out", "a.pt").code == 0
    result = run(folder, "model.py", "a.pt", "--to-hf", "hf")
    assert result.code == 0, result
    return folder


# ----------------------------------------------------------------------------------------------------------------------
# ours

def rows_and_texts():
    """Texts of 1,000 rows, and 1,000 texts of random pieces: phrases, cut phrases, any characters, tags."""
    mixture, rng = data.parse_mixture("2-20"), random.Random(0)
    for i in range(1000):
        row = data.make_row(i, mixture, world=data.World(2 + 4 * (i % 2)))
        yield data.prompt_text(row) + data.response_text(row)
    phrases = [ENC.decode_single_token_bytes(i).decode(errors="ignore") for i in range(ENC.n_vocab)]
    for _ in range(1000):
        yield "".join(rng.choice((rng.choice(phrases), rng.choice(phrases)[:rng.randrange(9)],
                                  chr(rng.choice((rng.randrange(128), rng.randrange(0x800), rng.randrange(0x10000, 0x110000))))))
                      for _ in range(rng.randrange(40)))


def test_the_tokenizer_gives_the_same_ids_and_texts(trained):
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    for text in rows_and_texts():
        ids = data.encode(ENC, text)
        assert tokenizer(text)["input_ids"] == ids, text
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == ENC.encode_single_token(data.END) and len(tokenizer) == ENC.n_vocab


def test_logits_and_greedy_text_are_the_same(trained):
    ours = M.build_model(load_checkpoint(trained / "a.pt"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained / "hf", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "hf")
    mixture, stop = data.parse_mixture("2-4"), ENC.encode_single_token(data.END)
    for i in range(5):
        prompt = data.encode(ENC, data.prompt_text(data.make_row(i, mixture)))
        ids = torch.tensor([prompt])
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, ours(ids), rtol=0, atol=1e-4)
        (mine,), _ = sample(ours, [prompt], stop, max_new=40, temperature=0)
        text = theirs.generate(**tokenizer(ENC.decode(prompt), return_tensors="pt"), do_sample=False, max_new_tokens=40)[0]
        assert text[len(prompt):].tolist() == mine


def test_a_folder_has_the_table_of_its_checkpoint(trained):
    (ours, file), (theirs, other_file) = (
        (result.out, json.loads((trained / "e.json").read_text()))
        for path in ("a.pt", "hf") for result in [run(trained, "evaluate.py", path, *SHORT, "--loss", "--seed", 5, "--json", "e.json")])
    assert ours.replace("a.pt", "hf") == theirs
    assert file["checkpoints"]["a.pt"] == other_file["checkpoints"]["hf"] and file["by_problem"]["a.pt"] == other_file["by_problem"]["hf"]


def test_a_folder_becomes_a_checkpoint_again(trained):
    assert run(trained, "model.py", "hf", "--from-hf", "back.pt").code == 0
    before, after = load_checkpoint(trained / "a.pt"), load_checkpoint(trained / "back.pt")
    assert all(torch.equal(after["model"][name], tensor) for name, tensor in before["model"].items())
    assert {name: before[name] for name in after if name != "model"} == {name: x for name, x in after.items() if name != "model"}
    result = run(trained, "midtrain.py", "--init", "back.pt", "--steps", 1, "--batch", 8, "--show", 0, "--out", "mid.pt")
    assert result.code == 0, result


# ----------------------------------------------------------------------------------------------------------------------
# another's

TAGS = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", *data.TAGS]


def write_folder(folder, model, tokenizer, ends=3, **changes):
    folder.mkdir()
    config, state = M.to_hf(model)
    config |= dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], eos_token_id=ends, hidden_act="silu", torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config | changes))
    (folder / "generation_config.json").write_text(json.dumps(dict(eos_token_id=ends)))
    tokenizer.save(str(folder / "tokenizer.json"))
    state = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items() if name != "lm_head.weight"}
    safetensors_torch.save_file(state, folder / "model.safetensors")


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level BPE such as that of arXiv 2512.07783, trained on some rows: tags are special tokens, [EOS] is 3, and the last
    token is one that the model has not."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    rows = [data.make_row(i, data.parse_mixture("2-6")) for i in range(200)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=600, special_tokens=TAGS, show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([data.prompt_text(row) + data.response_text(row).removesuffix(data.END) for row in rows], trainer)
    tokenizer.add_special_tokens(["<special_token_4>"])
    assert tokenizer.get_vocab_size() == 601 and tokenizer.encode("[EOS]").ids == [3]
    return tokenizer


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, byte_level):
    """A folder in the authors' format, with random weights: 600 tokens, tied, bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("foreign")
    write_folder(folder / "theirs", Transformer(Config(n_layers=2, width=32, n_heads=2, n_kv_heads=1, mlp=64, vocab_size=600)), byte_level)
    return folder


def test_a_folder_of_another_is_scored_with_its_own_tokenizer(foreign, byte_level):
    result = run(foreign, "evaluate.py", "theirs", "--id-ops", "2-3", *SHORT, "--distractors", 0, "--samples", "s.jsonl", "--loss")
    assert result.code == 0, result
    report = json.loads((foreign / "out/eval.json").read_text())["checkpoints"]["theirs"]
    assert {*report["groups"]} == {"ID", "OOD-edge"} and report["groups"]["ID"]["verified"]["pass@4"] == 0
    assert report["loss"] > 5
    lines = [json.loads(line) for line in (foreign / "s.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2 * 4
    assert all({"gen_solution_answer", "op", "id", "__idx", "template", "errors"} <= {*line} for line in lines)


def test_the_loss_is_that_of_transformers(tmp_path, byte_level):
    """With weights so large that the loss of a token is that of this token after these, and far from the log of 600."""
    torch.manual_seed(1)
    config = Config(n_layers=2, width=32, n_heads=2, n_kv_heads=1, mlp=64, vocab_size=600, init_std=0.4)
    write_folder(tmp_path / "theirs", Transformer(config), byte_level)
    run(tmp_path, "evaluate.py", "theirs", "--id-ops", "2-3", *SHORT, "--loss", "--context", "zoo", "--json", "l.json")
    found = json.loads((tmp_path / "l.json").read_text())["by_problem"]["theirs"]["loss"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32)
    expected, shifted = [], []
    for op in (2, 3, 4):
        for i in range(2):
            row = data.make_row(op * 10 ** 6 + i, data.parse_mixture(f"zoo:{op}"), 0, "eval", data.World())
            prompt, solution = (byte_level.encode(text).ids for text in (
                data.prompt_text(row), data.response_text(row).replace(data.END, "[EOS]")))
            ids = torch.tensor([prompt + solution])
            labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
            with torch.no_grad():
                expected.append(float(theirs(ids, labels=labels).loss))
                shifted.append(float(theirs(ids, labels=labels.roll(1)).loss))
    assert found == pytest.approx(expected, rel=0.02)  # ours in bfloat16, where that is fast
    assert sum(abs(a - b) for a, b in zip(expected, found)) < sum(abs(a - b) for a, b in zip(expected, shifted)) / 5


def writer(pieces):
    """A model that writes token b after token a for each pair of neighbours in a list of tokens, whatever came before: embeddings
    are one-hot, there is no attention, and the MLP of the one layer leads from each token to the next."""
    n = max(pieces) + 1
    model = Transformer(Config(n_layers=1, width=n + n % 2, n_heads=1, n_kv_heads=1, mlp=n, vocab_size=n, init_std=0.0))
    mlp = model.layers[0].mlp
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.eye(n, model.config.width))
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
            weight.copy_(torch.eye(n, model.config.width))
        for a, b in zip(pieces, pieces[1:]):
            mlp.down_proj.weight[b, a] = 10.0
            mlp.down_proj.weight[a, a] = -10.0
        model.norm.weight.fill_(20.0)
    return model


@pytest.mark.parametrize("one_token", [True, False], ids=["stop", "cut"])
def test_it_stops_at_the_answer_or_cuts_behind_it(tmp_path, one_token):
    """The model writes the right solution of the one row and goes on behind it. Where </answer> is a token, it stops there."""
    row = data.make_row(0, data.parse_mixture("zoo:2"), world=data.World(0))
    solution, _, answer = row["solution"].partition("Answer: ")
    pieces = [f" {solution.strip()} ", "</solution>", " \t", "<answer>", f" {answer.strip('. ')} ",
              *(["</answer>"] if one_token else ["</ans", "wer>"]), " and more", "[EOS]"]
    special = [tag for tag in TAGS if one_token or tag != "</answer>"]
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = [to_bytes.pre_tokenize_str(piece)[0][0] for piece in pieces if piece not in special]
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *alphabet, *dict.fromkeys(words)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], ignore_merges=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = to_bytes, tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    ids = [tokenizer.token_to_id("<solution>")] + [tokenizer.token_to_id(piece if piece in special else to_bytes.pre_tokenize_str(
        piece)[0][0]) for piece in pieces]
    write_folder(tmp_path / "theirs", writer([*ids, len(vocab) - 1]), tokenizer)
    (tmp_path / "row.jsonl").write_text(json.dumps(row))
    result = run(tmp_path, "evaluate.py", "theirs", "--id-ops", "2-3", "--data", "row.jsonl", "--n", 2, "--k", 1, "--samples", "s.jsonl")
    assert result.code == 0, result
    report = json.loads((tmp_path / "out/eval.json").read_text())["checkpoints"]["theirs"]
    assert [report[verdict]["pass@1"] for verdict in VERDICTS] == [1, 1, 1] and report["truncated"] == 0
    text = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])["gen_solution_answer"]
    assert text.endswith("</answer>") and "more" not in text and text.startswith(" Define")


def changed(foreign, tmp_path, **changes):
    """A copy of the folder with another config.json; None takes a key away."""
    folder = tmp_path / "bad"
    folder.mkdir()
    for path in (foreign / "theirs").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: x for name, x in config.items() if x is not None}))
    return folder


def assert_folder_refused(tmp_path, *words):
    before = sorted(tmp_path.rglob("*"))
    assert_refused(run(tmp_path, "evaluate.py", "bad", "--id-ops", "2-3", *SHORT), *words)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("changes, word", [
    (dict(model_type="llama"), "model_type is llama"), (dict(model_type=None), "model_type is None"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings is False"), (dict(hidden_act="gelu"), "hidden_act is gelu"),
    (dict(use_sliding_window=True), "use_sliding_window"), (dict(rope_scaling={"type": "yarn"}), "yarn"), (dict(head_dim=99), "head_dim"),
    (dict(max_position_embeddings=60), "reads at most 60 tokens"), (dict(vocab_size=601), "does not hold a model"),
    (dict(hidden_size=None), "does not describe"), (dict(num_attention_heads="two"), "does not describe"),
    (dict(num_hidden_layers=3), "does not hold a model"), (dict(eos_token_id="end"), "does not describe"),
    (dict(eos_token_id=[3, 5000]), "no token of the model")], ids=str)
def test_a_folder_that_does_not_fit_is_refused(foreign, tmp_path, changes, word):
    folder = changed(foreign, tmp_path, **changes)
    if "eos_token_id" in changes:
        (folder / "generation_config.json").unlink()
    assert_folder_refused(tmp_path, word)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[1]"], ids=str)
def test_a_missing_or_broken_file_is_refused(foreign, tmp_path, name, content):
    folder = changed(foreign, tmp_path)
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    assert_folder_refused(tmp_path, "bad")


def test_an_index_that_leads_elsewhere_is_refused(foreign, tmp_path):
    folder = changed(foreign, tmp_path)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map={"a": "../theirs/model.safetensors"})))
    assert_folder_refused(tmp_path, "../theirs")


def test_sharded_weights_are_read(foreign, tmp_path):
    folder = changed(foreign, tmp_path)
    state = safetensors_torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in {*names.values()}:
        safetensors_torch.save_file({name: state[name] for name in names if names[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=names)))
    assert all(torch.equal(a, b) for a, b in zip(M.read_hf(folder).model.parameters(), M.read_hf(foreign / "theirs").model.parameters()))


def test_another_output_head_is_refused(foreign, tmp_path):
    folder = changed(foreign, tmp_path)
    state = safetensors_torch.load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    safetensors_torch.save_file(state, folder / "model.safetensors")
    assert_folder_refused(tmp_path, "output head")


def test_tokens_that_the_model_has_not_are_refused(foreign, tmp_path):
    folder = changed(foreign, tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = next(token for token in tokenizer["added_tokens"] if token["content"] == "<question>")
    last = next(token for token in tokenizer["added_tokens"] if token["id"] == 600)
    tokenizer["model"]["vocab"]["<question>"], special["id"], last["id"] = 600, 600, special["id"]
    tokenizer["added_tokens"].sort(key=lambda token: token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert_folder_refused(tmp_path, "token 600", "has 600")


def test_what_it_was_trained_on_must_be_said(foreign):
    assert_refused(run(foreign, "evaluate.py", "theirs", *SHORT), "--id-ops")


def test_truncation_and_padding_of_a_tokenizer_are_not_for_prompts(foreign, tmp_path):
    folder = changed(foreign, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain = tokenizer.encode("a long text " * 30).ids
    tokenizer.enable_truncation(20)
    tokenizer.enable_padding(length=500)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert M.read_hf(folder).tokenizer.encode("a long text " * 30).ids == plain


def test_ours_and_anothers_side_by_side(foreign, trained):
    """There are no signs of one against the other, which are strangers, and losses of other tokens are not called comparable."""
    result = run(trained, "evaluate.py", "a.pt", foreign / "theirs", "--id-ops", "2-3", *SHORT, "--loss", "--json", "both.json")
    assert result.code == 0, result
    file = json.loads((trained / "both.json").read_text())["checkpoints"]
    assert "init_here" not in file[str(foreign / "theirs")] and "compare down a column only" in result.out


# ----------------------------------------------------------------------------------------------------------------------
# nothing is lost

def test_a_folder_that_is_there_is_kept(trained, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    assert_refused(run(tmp_path, "model.py", trained / "a.pt", "--to-hf", "mine"), "no folder that --to-hf wrote")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    for _ in range(2):  # but ours is written again
        assert run(tmp_path, "model.py", trained / "a.pt", "--to-hf", "hf").code == 0
    weights = (tmp_path / "hf/model.safetensors").read_bytes()
    assert_refused(run(tmp_path, "model.py", "hf", "--from-hf", "hf/model.safetensors"), "already")
    assert_refused(run(tmp_path, "evaluate.py", "hf", *SHORT, "--json", "hf/config.json"), "overwrite an input")
    assert (tmp_path / "hf/model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("content", ['{"a": 1}', "[1]", "{", '{"stage": "pretrain", "recipe": {"preset": "tiny", "vocabulary": "another"}}'])
def test_a_folder_of_ours_that_is_not_whole_is_no_checkpoint(trained, tmp_path, content):
    (tmp_path / "hf").mkdir()
    for path in (trained / "hf").iterdir():
        (tmp_path / "hf" / path.name).write_bytes(path.read_bytes())
    (tmp_path / "hf/nano_interplay.json").write_text(content)
    for command in (["model.py", "hf", "--from-hf", "out/x.pt"], ["evaluate.py", "hf", *SHORT]):
        assert_refused(run(tmp_path, *command), "hf")
    assert not (tmp_path / "out").exists()


def test_what_is_no_folder_or_no_checkpoint_is_refused(foreign, trained, tmp_path):
    assert_refused(run(tmp_path, "model.py", trained / "a.pt", "--from-hf", "x.pt"), "no folder")
    assert_refused(run(foreign, "model.py", "theirs", "--from-hf", "x.pt"), "no folder of ours")
    checkpoint = load_checkpoint(trained / "a.pt")
    checkpoint["recipe"]["vocabulary"] = "another"
    torch.save(checkpoint, tmp_path / "other.pt")
    assert_refused(run(tmp_path, "model.py", "other.pt", "--to-hf", "hf"), "other tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"] and not (foreign / "x.pt").exists()
