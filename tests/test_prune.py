"""hub/prune.py: heads and neurons that go, what the fit of the rest is worth, and where pruned models can go."""
import dataclasses

import pytest
import torch
from click.testing import CliRunner

import train
from data import prepare, train_tokenizer
from hub import checkpoints, export, prune
from inference import embed, load
from unibert import UniBERT, UniBERTConfig, load_model, save_model

TEXTS = ["the fox and the dog jump over a river", "лиса и собака прыгают через реку", "der Fuchs und der Hund springen",
         "0 1 2 3 4 5 6 7", "many more words are wanted here, or no vocabulary is learnt", "и ещё немного слов, чтобы хватило"]
VOCAB = 330


def model_of(block, **changes):
    """Every parameter away from its initial value."""
    torch.manual_seed(0)
    model = UniBERT(UniBERTConfig(**{**dict(vocab_size=VOCAB, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=48,
                                            max_length=40, block=block), **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.08) * torch.randn_like(parameter))
    return model.eval()


def batch(tokens=3000, length=20):
    torch.manual_seed(1)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    return torch.randint(5, VOCAB, (int(ends[-1]),)), ends, length


def error(small, model, *inputs):
    """Squared difference of the last states, over their variance, on another batch."""
    torch.manual_seed(2)
    tokens = torch.randint(5, VOCAB, (1000,))
    ends = torch.arange(0, 1001, 20, dtype=torch.int32)
    with torch.no_grad():
        ours, theirs = (m.encode(tokens, ends, 20) for m in (small, model))
    return ((ours - theirs).square().sum() / (theirs - theirs.mean(0)).square().sum()).item()


@pytest.mark.parametrize("block", ["modern", "post"])
def test_nothing_pruned_is_the_model(block):
    model = model_of(block)
    small = prune.prune(model, 4, 48, *batch())
    assert small.config == dataclasses.replace(model.config, head_size=16)
    assert error(small, model) < 1e-5


@pytest.mark.parametrize("block", ["modern", "post"])
def test_what_is_there_twice_goes_first_and_costs_nothing(block):
    """Heads 2 and 3 and the second half of the neurons repeat the others: without them the function is the same."""
    model = model_of(block)
    with torch.no_grad():
        for layer in model.blocks:
            for tensor in (layer.qkv.weight, layer.qkv.bias):
                if tensor is not None:
                    parts = tensor.unflatten(0, (3, 4, 16))
                    parts[:, 2:] = parts[:, :2]
            for tensor in (layer.up.weight, layer.up.bias):
                if tensor is not None:
                    halves = tensor.unflatten(0, (-1, 2, 24))
                    halves[:, 1] = halves[:, 0]
    small = prune.prune(model, 2, 24, *batch())
    assert sum(p.numel() for p in small.blocks.parameters()) < 0.6 * sum(p.numel() for p in model.blocks.parameters())
    assert error(small, model) < 1e-4


@pytest.mark.parametrize("block", ["modern", "post"])
def test_choice_and_fit_both_help(block, monkeypatch):
    model = model_of(block)
    fitted = error(prune.prune(model, 2, 24, *batch()), model)
    with monkeypatch.context() as patch:              # the first heads and neurons instead of the best
        patch.setattr(prune.Fit, "choose_heads", lambda self, count, head_dim: list(range(count)))
        patch.setattr(prune.Fit, "choose_neurons", lambda self, count: torch.arange(count))
        first = error(prune.prune(model, 2, 24, *batch()), model)
        # the columns of the old output matrices, as they were
        old = iter([m for layer in model.blocks for m in (layer.out, layer.down)])
        patch.setattr(prune.Fit, "solve", lambda self, kept: (lambda m: (m.weight[:, kept], 0 if m.bias is None else m.bias))(next(old)))
        cut = error(prune.prune(model, 2, 24, *batch()), model)
    assert fitted < 0.95 * first < 0.9 * cut, (fitted, first, cut)


def test_states_that_share_a_vector_are_fitted_with_it():
    """A modern layer has no bias to put the means of a centred fit into."""
    model = model_of("modern")
    with torch.no_grad():
        model.embedding.weight += 2 * model.embedding.weight.std() * torch.randn(64)
    assert error(prune.prune(model, 2, 24, *batch()), model) < 0.1


@pytest.mark.parametrize("block", ["modern", "post"])
def test_layers_that_do_nothing_can_go(block):
    """The second layer adds nothing, so a model of the first and the third is the same one."""
    model = model_of(block)
    with torch.no_grad():
        layer = model.blocks[1]
        for part in (layer.out, layer.down):
            for parameter in part.parameters():
                parameter.zero_()
        if block == "post":                               # a norm of what has just been normalised, with the same scale
            for first, second in ((model.blocks[0].mlp_norm, layer.attention_norm), (layer.attention_norm, layer.mlp_norm)):
                for norm in (first, second):
                    norm.weight.fill_(1.0)
                    norm.bias.zero_()
    small = prune.prune(model, 4, 48, *batch(), layers=[0, 2])
    # post: the fit aims at the state behind the norm, which took each token's own scale
    assert len(small.blocks) == 2 and error(small, model) < dict(modern=1e-4, post=2e-3)[block]


def test_neurons_as_brute_force_finds_them():
    """The one whose loss costs least, found by all refits."""
    torch.manual_seed(0)
    columns, missing = torch.randn(500, 9), torch.randn(500, 7)
    missing += columns @ torch.randn(9, 7)
    weight = torch.rand(7)
    fit = prune.Fit(columns, missing, weight)
    rests = [fit.rest(torch.tensor([k for k in range(9) if k != j])) for j in range(9)]
    gone = rests.index(min(rests))
    assert sorted(fit.choose_neurons(8).tolist()) == [k for k in range(9) if k != gone]


@pytest.mark.parametrize("block", ["modern", "post"])
def test_healing_brings_the_states_nearer(block, monkeypatch):
    """On text that it has not seen, in every layer; and only the layers are changed."""
    monkeypatch.setattr(prune, "HEAL_BATCH", 500)
    model = model_of(block)
    small = prune.prune(model, 2, 24, *batch(), layers=[0, 2])
    before, start, said = {k: v.clone() for k, v in small.state_dict().items()}, error(small, model), []
    prune.heal(model, small, [0, 2], prune.healing_batches(*batch(6000)[:2]), steps=60, lr=3e-3, say=said.append)
    assert error(small, model) < 0.8 * start, (error(small, model), start)
    first, last = ([float(word.rstrip("%")) for word in line.split(": ")[1].split()] for line in (said[0], said[-1]))
    assert len(first) == 2 and all(b < a for a, b in zip(first, last)) and "60/60" in said[-1], said
    changed = {k.split(".")[0] for k, v in small.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"blocks"}


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [0, 1]])
def test_a_layer_aims_at_where_those_dropped_behind_it_ended(layers, monkeypatch):
    """Layers that are copied and not fitted are off by what is missing behind them, and by nothing where nothing is."""
    monkeypatch.setattr(prune, "HEAL_BATCH", 500)
    model, said = model_of("post"), []
    prune.heal(model, checkpoints.student_from_layers(model, layers), layers, prune.healing_batches(*batch()[:2]), steps=1, say=said.append)
    off = [float(word.rstrip("%")) for word in said[0].split(": ")[1].split()]
    whole = {0: layers[1] == 1, 1: layers == [0, 1, 2], 2: True}
    assert all((error < 0.1) == whole[i] for i, error in enumerate(off)) and len(off) == len(layers), said


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder, its data, and the model pruned by the command."""
    home = tmp_path_factory.mktemp("prune")
    (home / "tokenizer.model").write_bytes(train_tokenizer([f"{text} {i}" for i in range(40) for text in TEXTS], VOCAB))
    (home / "text").mkdir()
    for code, text in zip(("en", "ru", "de"), TEXTS):
        (home / "text" / f"{code}.txt").write_text("\n\n".join(f"{text} {i * i}" for i in range(80)), encoding="utf-8")
    prepare(home / "text", home / "data", tokenizer=home / "tokenizer.model")
    for block in ("post", "modern"):
        save_model(model_of(block), home / block, home / "tokenizer.model")
    done = CliRunner().invoke(prune.prune_command, [str(home / "post"), str(home / "small"), "--data", str(home / "text"),
                                                    "--heads", "3", "--intermediate-size", "20", "--tokens", "2000"])
    assert done.exit_code == 0 and done.output.count("layer ") == 3 and "instead of 0.07 M" in done.output, done.output
    return home


def test_command(folders):
    small, tokenizer = load(folders / "small")
    assert (small.config.num_heads, small.config.head_size, small.config.intermediate_size) == (3, 16, 20)
    assert (folders / "small" / "tokenizer.model").read_bytes() == (folders / "tokenizer.model").read_bytes()
    vectors = embed(small, tokenizer, TEXTS, normalize=True)
    assert (vectors * embed(*load(folders / "post"), TEXTS, normalize=True)).sum(1).min() > 0.5


@pytest.mark.parametrize("arguments, words", [
    (["--heads", "5", "--intermediate-size", "20"], "heads 5: the model's layers have 4"),
    (["--heads", "2", "--intermediate-size", "49"], "intermediate size 49: the model's layers have 48"),
    (["--heads", "2", "--intermediate-size", "20", "--layers", "0,3"], "must be ascending numbers, the first 0, up to 2"),
    (["--heads", "2", "--intermediate-size", "20", "--layers", "0,x"], "it must be numbers of layers"),
    (["--heads", "2", "--intermediate-size", "20", "--tokens", "50"], "tokens of text are too few to fit 48 neurons"),
    (["--heads", "2", "--intermediate-size", "20", "--steps", "1", "--heal-tokens", "900"], "tokens of text are too few for --steps")])
def test_what_is_refused(folders, tmp_path, arguments, words):
    done = CliRunner().invoke(prune.prune_command, [str(folders / "post"), str(tmp_path / "x"), "--data", str(folders / "data"), *arguments])
    assert done.exit_code == 2 and words in done.output and not (tmp_path / "x").exists(), done.output
    assert "not fitted" not in done.output               # before minutes are spent on it


def test_languages_weigh_alike(folders):
    tokens, ends, longest = prune.calibration(folders / "data", load(folders / "post")[1], 900, 16)
    assert 900 <= len(tokens) <= 960 and longest <= 16 and len(ends) > 50


@pytest.mark.parametrize("block", ["post", "modern"])
def test_export_gives_the_pruned_heads_back_as_zeros(folders, tmp_path, block):
    small = prune.prune(load_model(folders / block), 3, 20, *batch())
    save_model(small, tmp_path / "small", folders / "tokenizer.model")
    export.export_checkpoint(tmp_path / "small", tmp_path / "out")
    again, *_ = checkpoints.import_checkpoint(tmp_path / "out")
    assert again.config.num_heads == 4 and again.config.head_dim == 16
    assert error(again, small) < 1e-10


def run(*arguments):
    return CliRunner().invoke(train.main, ["--device", "cpu", "--dtype", "float32", "--steps", "2", "--tokens-per-batch", "2048",
                                           "--max-length", "32", "--kd-weight", "0", *map(str, arguments)])


def test_training_goes_on_from_a_pruned_model(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "keep_freed_memory", lambda: None)  # of this process
    done = run("--data", folders / "data", "--out", tmp_path / "r", "--init", folders / "small", "--optimizer", "adamw", "--lr", "1e-9")
    assert done.exit_code == 0, done.output
    trained, start = load_model(tmp_path / "r" / "final"), load_model(folders / "small")
    assert trained.config == start.config and error(trained, start) < 1e-6
    for options, words in ((["--init-from-teacher", "0"], "give one"), (["--max-length", "64"], "use --max-length 40 or less")):
        done = run("--data", folders / "data", "--out", tmp_path / "x", "--init", folders / "small", *options)
        assert done.exit_code == 2 and words in done.output, done.output
    (tmp_path / "other.model").write_bytes(train_tokenizer([f"{text} {i}" for i in range(40) for text in TEXTS], VOCAB - 2))
    prepare(folders / "text", tmp_path / "other", tokenizer=tmp_path / "other.model")
    done = run("--data", tmp_path / "other", "--out", tmp_path / "x", "--init", folders / "small")
    assert done.exit_code == 2 and "has another tokenizer" in done.output, done.output
