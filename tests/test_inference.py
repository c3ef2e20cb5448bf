"""fill-mask, sentence vectors and similarity: against formulas worked out here, in flat memory, and from the shell."""
import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from hub import checkpoints
import inference
from data import BOS, EOS, MASK, encode_text, pack_sequences, train_tokenizer
from inference import embed, embed_stream, encode_masked, fill_mask, load
from unibert import UniBERT, UniBERTConfig, save_model
from hub.vocabulary import WORDPIECE_SPECIALS, WordPiece

REPO = Path(__file__).resolve().parent.parent
SENTENCES = ["the fox", "", "la volpe e il cane corrono insieme nella grande foresta", "собака", "x " * 200, "the fox",
             "e\u0301t\u00e9 \u200b  spaces", "the dog sleeps"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    text = [*checkpoints.SENTENCES, *SENTENCES] * 3
    (folder / "tokenizer.model").write_bytes(train_tokenizer(text, 460))
    torch.manual_seed(0)
    model = UniBERT(UniBERTConfig(vocab_size=460, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
                                  max_length=48))
    torch.nn.init.normal_(model.embedding.weight)             # so that sentences differ clearly
    save_model(model, folder)
    return folder


def one_by_one(model, tokenizer, sentence):
    """The mean over the tokens of one sentence alone, <s> and </s> among them."""
    ids = [BOS, *encode_text(tokenizer, sentence)[:model.config.max_length - 2], EOS]
    with torch.no_grad():
        return model.encode(*pack_sequences([ids])).mean(0)


def test_embed_is_the_mean_over_each_sentences_own_tokens(folder):
    model, tokenizer = load(folder)
    wanted = torch.stack([one_by_one(model, tokenizer, s) for s in SENTENCES])
    for budget in (1, 60, 4096):                               # any cut into batches, the order of the input
        found = embed(model, tokenizer, SENTENCES, tokens_per_batch=budget)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and not torch.allclose(found[0], found[7], atol=1e-2)
    normal = embed(model, tokenizer, SENTENCES, normalize=True)
    torch.testing.assert_close(normal, wanted / wanted.norm(dim=1, keepdim=True), rtol=0, atol=1e-5)
    prefixed = embed(model, tokenizer, ["fox"], prefix="the ")
    torch.testing.assert_close(prefixed[0], wanted[0], rtol=0, atol=1e-5)
    assert embed(model, tokenizer, []).shape == (0, 64)
    torch.nn.Linear(64, 2)(normal).sum().backward()             # a classifier can be trained on them


def test_stream_is_embed_line_by_line(folder, monkeypatch):
    model, tokenizer = load(folder)
    monkeypatch.setattr(inference, "WINDOW", 3)
    done, target = [], io.BytesIO()
    source = "\n".join(SENTENCES).replace("\n\n", "\r\n\n").encode()            # no line end at the end; one \r\n
    assert embed_stream(model, tokenizer, io.BytesIO(source), target, done.append) == len(SENTENCES)
    target.seek(0)
    np.testing.assert_allclose(np.load(target), embed(model, tokenizer, SENTENCES).numpy(), rtol=0, atol=1e-6)
    assert done == [-8, 3, 3, 2]
    assert embed_stream(model, tokenizer, io.BytesIO(b"ok\nbad \xff byte\n"), io.BytesIO()) == 2
    assert embed_stream(model, tokenizer, io.BytesIO(), empty := io.BytesIO()) == 0
    assert np.load(io.BytesIO(empty.getvalue())).shape == (0, 64)


def test_a_stream_takes_flat_memory(folder, monkeypatch):
    """Ten times the lines, the same peak: neither lines nor vectors are held (vectors of 40,000 would be 10 MB)."""
    model, tokenizer = load(folder)
    monkeypatch.setattr(inference, "WINDOW", 1000)
    monkeypatch.setattr(inference, "embed", lambda model, tokenizer, lines: torch.zeros(len(lines), 64))

    def lines(count):
        for i in range(count):
            yield b"%d a line of some length, made as it is read\n" % i

    peaks = []
    for count in (4000, 40_000):
        with open(os.devnull, "wb") as sink:
            tracemalloc.start()
            assert embed_stream(model, tokenizer, lines(count), sink) == count
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0] + 200_000, peaks


def test_fill_mask_against_the_whole_softmax(folder):
    model, tokenizer = load(folder)
    text = "the [MASK] and the[MASK] fox [MASK]"
    ids = encode_masked(tokenizer, text)
    assert ids.count(MASK) == 3 and ids[0] == BOS and ids[-1] == EOS
    answers = fill_mask(model, tokenizer, text, top=4)
    with torch.no_grad():
        logits = model.mlm_logits(model.encode(*pack_sequences([ids])))[torch.tensor(ids) == MASK]
    logits[:, :5] = -torch.inf
    for row, answer in zip(logits.softmax(-1), answers, strict=True):
        values = row.sort(descending=True).values[:4]
        torch.testing.assert_close(torch.tensor([p for _, p in answer]), values, rtol=1e-4, atol=1e-7)
        assert [piece for piece, _ in answer][0] == (tokenizer.id_to_piece(int(row.argmax())).replace("\u2581", " ").strip()
                                                    or "\u2581")
    assert len(fill_mask(model, tokenizer, "[MASK]", top=10_000)[0]) == 455
    with pytest.raises(ValueError, match=r"no \[MASK\]"):
        fill_mask(model, tokenizer, "nothing")


def test_what_follows_a_mask_has_a_space_only_where_the_text_has_one(folder):
    """The pieces around a mask are those of the whole word, wherever a piece's end may fall."""
    _, tokenizer = load(folder)
    for before, after in (("the fox", "es"), ("qu", "ick"), ("", "s are"), ("fox ", "!"), ("fox", ", and"), ("fox", " and")):
        ids = encode_masked(tokenizer, f"{before}[MASK]{after}")
        rest = ids[ids.index(MASK) + 1:-1]
        assert tokenizer.decode(tokenizer.encode("x") + rest) == "x" + after, (before, after)
        assert (tokenizer.id_to_piece(rest[0])[0] == "\u2581") == after.startswith(" ")


def test_a_wordpiece_model_fills_masks_and_embeds(tmp_path):
    vocabulary = WordPiece(WORDPIECE_SPECIALS + ["the", "fox", "##es", "run"])
    torch.manual_seed(0)
    save_model(UniBERT(UniBERTConfig(vocab_size=9, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)), tmp_path)
    checkpoints.save_vocabulary(vocabulary, tmp_path)
    model, tokenizer = load(tmp_path)
    assert encode_masked(tokenizer, "The [MASK] run") == [0, 5, 4, 8, 2]
    assert {piece for piece, _ in fill_mask(model, tokenizer, "The [MASK] run")[0]} == {"the", "fox", "##es", "run"}
    torch.testing.assert_close(embed(model, tokenizer, ["THE foxes"])[0], one_by_one(model, tokenizer, "the foxes"))


def shell(*arguments, text=""):
    return subprocess.run([sys.executable, "unibert.py", *map(str, arguments)], cwd=REPO, input=text.encode(errors="surrogateescape"),
                          capture_output=True)


def test_from_the_shell(folder, tmp_path):
    done = shell("embed", "--model", folder, "--normalize", "--prefix", "the ", text="fox\ndog\n")
    assert done.returncode == 0 and not done.stderr, done.stderr
    vectors = np.load(io.BytesIO(done.stdout))
    with open("/dev/full", "wb") as full:
        failed = subprocess.run([sys.executable, "unibert.py", "embed", "--model", str(folder)], cwd=REPO, input=b"caf\xe9\n",
                                stdout=full, stderr=subprocess.PIPE)
    assert failed.returncode == 2 and b"No space left" in failed.stderr and failed.stderr.count(b"\n") == 1, failed.stderr
    damaged = shell("embed", "--model", folder, text="caf\udce9\n")
    assert damaged.returncode == 0 and b"1 of 1 lines held invalid UTF-8" in damaged.stderr, damaged.stderr
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    answer = CliRunner().invoke(inference.fill_mask_command, ["--model", str(folder), "--json", "--top", "2", "a [MASK] [MASK]"])
    found = json.loads(answer.output)
    assert found["text"] == "a [MASK] [MASK]" and [len(m) for m in found["masks"]] == [2, 2]
    assert found["masks"][0][0]["probability"] >= found["masks"][0][1]["probability"] > 0
    answer = CliRunner().invoke(inference.similarity_command, ["--model", str(folder), "--prefix", "the ", "fox", "dog", "fox"])
    scores = [line.split() for line in answer.output.splitlines()]
    assert scores[0] == ["1.0000", "fox"] and scores[1][1] == "dog"
    assert float(scores[1][0]) == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-4)


def test_using_a_model_does_not_import_the_compiler(folder):
    """torch._dynamo takes a second, half of the time of a fill-mask: no operator, and no draw on the meta device."""
    script = ("import sys, inference\nmodel, tokenizer = inference.load(sys.argv[1])\ninference.fill_mask(model, tokenizer, '[MASK]')\n"
              "inference.embed(model, tokenizer, ['fox'])\nprint('torch._dynamo' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=REPO, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stdout + done.stderr


@pytest.mark.parametrize("arguments,wanted", [
    (["no [MASK", "--model", "FOLDER"], "no [MASK]"), (["[MASK]", "--model", "NONE"], "not a model folder"),
    (["[MASK] " * 60, "--model", "FOLDER"], "beyond the model's max_length"),
    (["[MASK]", "--model", "ENCODER"], "without a masked-language-model head"),
    (["[MASK] caf\udce9", "--model", "FOLDER"], "not UTF-8 text"), (["[MASK]", "--model", "MUTE"], "cannot read text"), (["[MASK]", "--model", "OTHER"], "pieces, the model 461"),
])
def test_bad_input_gets_one_line(folder, tmp_path, arguments, wanted):
    sizes = dict(hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    save_model(UniBERT(UniBERTConfig(460, **sizes, mlm_head=False)), tmp_path / "ENCODER", folder / "tokenizer.model")
    save_model(UniBERT(UniBERTConfig(460, **sizes)), tmp_path / "MUTE")
    save_model(UniBERT(UniBERTConfig(461, **sizes)), tmp_path / "OTHER", folder / "tokenizer.model")
    places = dict(FOLDER=folder, **{name: tmp_path / name for name in ("NONE", "ENCODER", "MUTE", "OTHER")})
    done = CliRunner().invoke(inference.fill_mask_command, [str(places.get(a, a)) for a in arguments])
    assert done.exit_code == 2 and wanted in done.output and sum("Error" in line for line in done.output.splitlines()) == 1, done.output
