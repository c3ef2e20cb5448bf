"""Others' checkpoints in, ours out: ids, weights and outputs against sentencepiece, transformers and hand-made files."""
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from click.testing import CliRunner

from hub import checkpoints, export
from data import clean, encode_text, load_tokenizer, pack_sequences, prepare, train_tokenizer
from inference import embed, load
from files import write_safetensors
from unibert import UniBERT, UniBERTConfig, load_model, save_model
from hub.vocabulary import (CONTROL, OURS, UNKNOWN, WORDPIECE_SPECIALS, SentencePieceModel, WordPiece, choose_pieces,
                        from_fairseq, is_ours, keep_pieces, load_vocabulary, read_fields, read_wordpiece)

SHARED = Path(os.environ.get("UNIBERT_SHARED", Path(__file__).resolve().parent.parent.parent / "shared"))
VOCAB = 460                 # pieces of the small tokenizer below
TEXTS = [*checkpoints.SENTENCES, "the fox and the dog and the cat", "une crème, deux crèmes", "лиса и собака", "  a\tb\u00a0c ",
         "e\u0301te\u0301 ﬁn ｱｲ", "zero\u200bwidth", "emoji 🦄 and 𐍈", ""]


def transformers():
    peer = pytest.importorskip("transformers", reason="compares with transformers, which is not installed")
    peer.logging.set_verbosity_error()
    return peer


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(train_tokenizer(checkpoints.SENTENCES * 3 + TEXTS, VOCAB))
    return path


def noisy(model):
    """Every parameter, norms and biases too, away from its initial value: a swap of two must show."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.08) * torch.randn_like(parameter))
    return model.eval()


def our_model(block, vocab_size=VOCAB, **changes):
    sizes = dict(vocab_size=vocab_size, hidden_size=64, num_layers=3, num_heads=4, intermediate_size=48, max_length=40)
    torch.manual_seed(0)
    return noisy(UniBERT(UniBERTConfig(**{**sizes, "block": block, **changes})))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------- SentencePiece

def as_fairseq(model):
    """Our layout -> XLM-R's file: <unk> <s> </s>, then the normal pieces."""
    specials = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    return SentencePieceModel(specials + model.pieces[5:], model.rest)


def test_sentencepiece_files_are_rewritten_without_loss(tokenizer_file, tmp_path):
    model = SentencePieceModel.read(tokenizer_file)
    reader = load_tokenizer(tokenizer_file)
    assert [text for text, _, _ in model.pieces] == [reader.id_to_piece(i) for i in range(len(reader))]
    (tmp_path / "again.model").write_bytes(model.to_bytes())
    again = load_tokenizer(tmp_path / "again.model")
    assert (again.bos_id(), again.pad_id(), again.eos_id(), again.unk_id()) == (0, 1, 2, 3)
    for text in TEXTS:
        assert again.encode(text) == reader.encode(text)
    # What is neither a piece nor about ids stays byte for byte, the normaliser's table above all.
    kept = [field for field in SentencePieceModel.read(tmp_path / "again.model").rest if field[0] != 2]
    assert kept == [field for field in model.rest if field[0] != 2] and any(len(value) > 100_000 for _, value in kept)
    # Others (transformers) take the size and the ids of <unk>, <s>, </s>, <pad> from the settings; left out there, they mean 0, 1, 2, -1.
    speaks_of_ids = (4, 40, 41, 42, 43)
    bare = [(number, b"".join(raw for inner, _, raw in read_fields(value) if inner not in speaks_of_ids) if number == 2 else value)
            for number, value in model.rest]
    (tmp_path / "bare.model").write_bytes(SentencePieceModel(model.pieces, bare).to_bytes())
    told = SentencePieceModel.read(tmp_path / "bare.model")
    assert [told.setting(2, field, None) for field in speaks_of_ids] == [VOCAB, 3, 0, 2, 1]


def test_xlmr_ids(tokenizer_file, tmp_path):
    """Segmentation as before, and row for row the id that XLM-R's rule (piece i >= 3 is id i + 1) gives."""
    theirs = as_fairseq(SentencePieceModel.read(tokenizer_file))
    (tmp_path / "x.model").write_bytes(theirs.to_bytes())
    original = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "x.model"))
    ours, rows = from_fairseq(SentencePieceModel.read(tmp_path / "x.model"), "x")
    assert is_ours(ours) and sorted(rows) == list(range(len(theirs.pieces) + 2)) and rows[4] == len(theirs.pieces) + 1
    (tmp_path / "ours.model").write_bytes(ours.to_bytes())
    tokenizer = load_tokenizer(tmp_path / "ours.model")
    for text in TEXTS:
        assert [rows[i] for i in tokenizer.encode(text)] == [i + 1 if i else 3 for i in original.encode(text)]


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"\x07" + b, lambda b: b"", lambda b: b"\xff" * 30])
def test_damaged_sentencepiece_file(tokenizer_file, tmp_path, damage):
    (tmp_path / "bad.model").write_bytes(damage(tokenizer_file.read_bytes()))
    with pytest.raises(ValueError, match="bad.model: cannot be read as a SentencePiece model"):
        SentencePieceModel.read(tmp_path / "bad.model")


def test_protobuf_fields():
    message = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1d\0\0\x80?"          # the encoding guide's 150, a string, a float
    assert [(n, v) for n, v, _ in read_fields(message)] == [(1, 150), (2, b"hi"), (3, b"\0\0\x80?")]
    assert b"".join(raw for _, _, raw in read_fields(message)) == message


# ----------------------------------------------------------------------------------------------------- WordPiece

PIECES = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "the", ",", "##a", "ecole",
          "école", "École", "東", "京", "a", "##b", "$", "[", "]", "mask", "σας", "σασ", "-", "’", "😀", "привет", "i", "e"]


def wordpiece_folder(folder, **config):
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **config}))
    return folder


def test_wordpiece_by_hand(tmp_path):
    tokenizer, rows = read_wordpiece(wordpiece_folder(tmp_path / "a"))
    pieces = [tokenizer.id_to_piece(i) for i in range(len(tokenizer))]
    assert pieces[:5] == WORDPIECE_SPECIALS and [PIECES[i] for i in rows] == pieces
    cut = lambda text: [pieces[i] for i in tokenizer.encode(text)]  # noqa: E731
    assert cut("Unaffable, THE") == ["un", "##aff", "##able", ",", "the"]
    assert cut("École東京the") == ["ecole", "東", "京", "the"]
    assert cut("unaffx " + "a" * 101) == ["[UNK]", "[UNK]"] and cut("a" * 100) == ["a"] + ["##a"] * 99
    assert cut("[MASK]") == ["[", "mask", "]"]                # a text cannot make a special token
    assert cut("t\u200bhe\x00 \ufffd\tΣΑΣ") == ["the", "σασ"]
    cased = read_wordpiece(wordpiece_folder(tmp_path / "b", do_lower_case=False, tokenize_chinese_chars=False))[0]
    assert [cased.id_to_piece(i) for i in cased.encode("École ecole 東京")] == ["École", "ecole", "[UNK]"]
    for name, data in tokenizer.files().items():
        (tmp_path / name).write_bytes(data)
    for config in ({"tokenizer_class": "BertJapaneseTokenizer"}, {"word_tokenizer_type": "mecab"}, {"tokenizer_class": "RoFormerTokenizer"}):
        with pytest.raises(ValueError, match=f"{config.get('tokenizer_class', 'BertTokenizer')} splits text in a way of its own"):
            read_wordpiece(wordpiece_folder(tmp_path / "c", **config))
    again = load_vocabulary(tmp_path)
    assert again.pieces == tokenizer.pieces and again.encode("Unaffable") == tokenizer.encode("Unaffable")


def test_wordpiece_offsets_point_into_the_text(tmp_path):
    tokenizer, _ = read_wordpiece(wordpiece_folder(tmp_path))
    text = "Unaffable,\u200b THE E\u0301cole東京 unaffx"
    found = tokenizer.EncodeAsOffsetMapping(text)
    assert found["ids"] == tokenizer.encode(text)
    assert [text[a:b] for a, b in found["offsets"]] == ["Un", "aff", "able", ",\u200b", "THE", "E\u0301cole", "東", "京", "unaffx"]


@pytest.mark.parametrize("config", [{}, {"do_lower_case": False}, {"do_lower_case": True, "strip_accents": False},
                                    {"do_lower_case": False, "strip_accents": True}, {"tokenize_chinese_chars": False}])
def test_wordpiece_equals_the_reference(tmp_path, config):
    """Real text of every language at hand, and nearly every character, against transformers' BertTokenizer."""
    transformers()
    from transformers import BertTokenizer
    lines = [line for path in sorted((SHARED / "data" / "text").glob("*.txt"))
             for line in path.read_text(encoding="utf-8").split("\n")[:12]] + TEXTS
    # A vocabulary from the text itself, so that most words are cut into several pieces: its characters and endings.
    found = sorted({c for line in lines for c in line + line.lower() + unicodedata.normalize("NFD", line.lower())
                    if not c.isspace()})
    endings = sorted({word[-3:].lower() for line in lines[::3] for word in line.split() if len(word) > 4})
    vocabulary = [*PIECES[:6], *found, *("##" + c for c in found), *("##" + e for e in endings if len(e) == 3)]
    vocabulary = list(dict.fromkeys(vocabulary))
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, rows = read_wordpiece(tmp_path)
    peer = BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, **config)
    # The peer's tables are partly of Unicode 8, so characters whose category has stood since 3.2 must agree; and it
    # gives one block of ideographs a wrong beginning.
    new = {i for i in range(0x30000) if unicodedata.category(chr(i)) in ("Cn", "Co") or
           unicodedata.category(chr(i)) != unicodedata.ucd_3_2_0.category(chr(i))} | set(range(0x2B820, 0x2B920))
    theirs = peer(lines, add_special_tokens=False)["input_ids"]
    for line, ids in zip(lines, theirs):
        assert [rows[i] for i in tokenizer.encode(line)] == ids, line
    single = [f"a{chr(i)}b" for i in range(0x30000) if not 0xD800 <= i < 0xE000 and i not in new]
    theirs = peer.backend_tokenizer
    assert len(single) > 90_000
    for text in single:
        words = [w for w, _ in theirs.pre_tokenizer.pre_tokenize_str(theirs.normalizer.normalize_str(text))]
        assert tokenizer.words(text) == words, f"U+{ord(text[1]):04X}"


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_a_folder_with_tokenizer_json_alone(tmp_path, tokenizer_file, kind):
    """As transformers 5 saves its tokenizers: the same ids as from the vocabulary's own file."""
    if kind == "unigram":
        model = SentencePieceModel.read(tokenizer_file)
        (tmp_path / "tokenizer.json").write_text(json.dumps(export.tokenizer_json(model)))
        again, rows = checkpoints.read_tokenizer(tmp_path)
        assert rows == list(range(VOCAB)) and again.pieces[5:] == model.pieces[5:]
        (tmp_path / "again.model").write_bytes(again.to_bytes())
        first, second = load_tokenizer(tokenizer_file), load_tokenizer(tmp_path / "again.model")
        texts = TEXTS
    else:
        transformers()
        from transformers import BertTokenizer
        first, rows = read_wordpiece(wordpiece_folder(tmp_path / "w", do_lower_case=False))
        BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, do_lower_case=False).save_pretrained(tmp_path)
        second, again = checkpoints.read_tokenizer(tmp_path)
        assert again == rows and second.pieces == first.pieces and not (tmp_path / "vocab.txt").exists()
        texts = ["École école unaffable", "THE the"]
    for text in texts:
        assert first.encode(text) == second.encode(text)


def test_bpe_leaves_the_ids_alone(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(normalizer=None, model=dict(type="BPE", vocab={}, merges=[],
                                                        continuing_subword_prefix=""))))
    assert checkpoints.read_tokenizer(tmp_path) is None


# -------------------------------------------------------------------------------------------------------- import

def write_checkpoint(folder, kind, layout="safetensors", tokenizer_file=None):
    """A small noisy checkpoint of transformers' own making, with XLM-R's vocabulary when there is a tokenizer."""
    peer = transformers()
    folder.mkdir(exist_ok=True)
    vocab_size = 120
    if tokenizer_file is not None:
        theirs = as_fairseq(SentencePieceModel.read(tokenizer_file))
        (folder / "sentencepiece.bpe.model").write_bytes(theirs.to_bytes())
        vocab_size = len(theirs.pieces) + 2 + 6                         # six rows that no piece points to
    sizes = dict(vocab_size=vocab_size, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48)
    config, cls = {
        "bert": lambda: (peer.BertConfig(**sizes, max_position_embeddings=70), peer.BertForMaskedLM),
        "encoder": lambda: (peer.BertConfig(**sizes, max_position_embeddings=70), peer.BertModel),
        "roberta": lambda: (peer.RobertaConfig(**sizes, max_position_embeddings=72, type_vocab_size=1),
                            peer.RobertaForMaskedLM),
        "xlm-roberta": lambda: (peer.XLMRobertaConfig(**sizes, max_position_embeddings=72, type_vocab_size=1,
                                                      bos_token_id=0, pad_token_id=1, eos_token_id=2),
                                peer.XLMRobertaForMaskedLM),
        "distilbert": lambda: (peer.DistilBertConfig(vocab_size=vocab_size, dim=64, n_layers=3, n_heads=4, hidden_dim=48,
                                                     max_position_embeddings=70), peer.DistilBertForMaskedLM),
        "modernbert": lambda: (peer.ModernBertConfig(**sizes, max_position_embeddings=200, local_attention=16,
                                                     pad_token_id=0), peer.ModernBertForMaskedLM),
    }[kind]()
    model = noisy(cls(config))
    if layout == "sharded":
        model.save_pretrained(folder, max_shard_size="40KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        model.save_pretrained(folder)
    if layout == "pickle":
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder


@pytest.mark.parametrize("kind,layout", [("bert", "safetensors"), ("bert", "pickle"), ("xlm-roberta", "sharded"),
                                         ("roberta", "safetensors"), ("distilbert", "safetensors"),
                                         ("modernbert", "safetensors"), ("encoder", "safetensors")])
def test_import_computes_what_transformers_computes(tmp_path, kind, layout):
    folder = write_checkpoint(tmp_path / "theirs", kind, layout)
    model, vocabulary, rows, told = checkpoints.import_checkpoint(folder)
    assert vocabulary is None and rows is None and any("cannot read text" in line for line in told)
    assert model.config.mlm_head == (kind != "encoder")
    found = checkpoints.compare(model, folder)
    assert max(found.values()) < 5e-5 and ("logits" in found) == (kind != "encoder"), found
    if kind == "modernbert":       # windows of 16: 8 to each side, so 9 tokens are the most that see each other
        assert model.config.max_length == 9 and model.config.global_every == 3
        assert any("local attention" in line for line in told)


def test_import_command_with_vocabulary_and_check(tmp_path, tokenizer_file):
    """XLM-R's rows are permuted with its pieces; --check sees equal outputs, and equal ids where transformers has protobuf; embed reads
    the result."""
    source = write_checkpoint(tmp_path / "theirs", "xlm-roberta", tokenizer_file=tokenizer_file)
    done = CliRunner().invoke(checkpoints.import_command, [str(source), str(tmp_path / "ours"), "--check"])
    assert done.exit_code == 0, done.output
    # The peer's own reading of SentencePiece files has no byte fallback, so one of our sentences may differ there.
    try:
        import google.protobuf  # noqa: F401
        checked = "token ids equal transformers'"
    except ImportError:
        checked = "token ids not compared"
    assert "6 embedding rows" in done.output and "largest difference" in done.output and checked in done.output
    model, tokenizer = load(tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert embed(model, tokenizer, TEXTS).isfinite().all()


def test_check_notices_a_wrong_weight(tmp_path):
    folder = write_checkpoint(tmp_path / "theirs", "bert")
    model = checkpoints.import_checkpoint(folder)[0]
    with torch.no_grad():
        model.blocks[1].qkv.weight[70, 3] += 0.5
    with pytest.raises(ValueError, match="differ from transformers"):
        checkpoints.check_import(model, folder, None, None)


def bert_folder(folder, change=lambda tensors, config: None):
    """A BERT checkpoint without transformers: our own export of a `post` model, then changed."""
    folder.mkdir(parents=True)
    model = our_model("post", vocab_size=50)
    tensors, config = export.their_tensors(model, "bert"), export.their_config(model, "bert")
    tensors["bert.pooler.dense.weight"] = torch.zeros(64, 64)           # known, not used
    change(tensors, config)
    write_safetensors(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_import_without_peers(tmp_path):
    folder = bert_folder(tmp_path / "a")
    model = checkpoints.import_checkpoint(folder)[0]
    assert same_state(state(model), state(our_model("post", vocab_size=50)))
    # TensorFlow's names of norms, 16-bit weights, and a constant in token type 0

    def old(tensors, config):
        for name in [n for n in tensors if "LayerNorm" in n]:
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name).half()
        tensors["bert.embeddings.token_type_embeddings.weight"][0] = 1.0
        tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    other = checkpoints.import_checkpoint(bert_folder(tmp_path / "b", old))[0]
    assert other.embedding_norm.weight.dtype == torch.float32
    torch.testing.assert_close(other.position_embedding.weight, model.position_embedding.weight + 1)
    torch.testing.assert_close(other.embedding_norm.bias, model.embedding_norm.bias, rtol=1e-3, atol=1e-3)


class Evil:
    def __reduce__(self):
        return os.system, ("echo run > evil.txt",)


def evil_pickle(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Evil()}, folder / "pytorch_model.bin")


def bare_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}, protocol=2))


def lying_header(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8:8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[8,', 1)
    (folder / "model.safetensors").write_bytes(data[:8] + header + data[8 + length:])


def bad_index(folder):
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))


def changed(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in (config | changes).items() if v is not None}))
    return change


def tensor(name, value):
    def change(folder):
        from files import read_safetensors
        tensors = read_safetensors(folder / "model.safetensors")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
        write_safetensors(tensors, folder / "model.safetensors")
    return change


def truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("damage,wanted", [
    (evil_pickle, r"asks for \S+\.system, which could run code"), (bare_pickle, "no plain file of tensors"), (lying_header, "the header gives"), (truncated, "do not fit"),
    (bad_index, "which is not in"),
    (lambda f: (f / "config.json").unlink(), "no config.json"), (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    (lambda f: (f / "vocab.txt").write_text("a\nb\n"), "has no \\[CLS\\]"),
    (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}'), "cannot be used"),
    (lambda f: (f / "vocab.txt").write_text("\n".join([*WORDPIECE_SPECIALS, *map(str, range(90))])), "embedding 50 rows"),
    (lambda f: (f / "sentencepiece.bpe.model").write_bytes(b"junk"), "SentencePiece"),
    (changed(model_type="gpt2"), "model_type is 'gpt2'"), (changed(hidden_act="relu"), "hidden_act is 'relu'"),
    (changed(hidden_size=None), "no hidden_size"), (changed(num_attention_heads=5), "num_heads 5"),
    (changed(model_type=["bert"]), "known are bert"),
    (changed(model_type=None, block="modern"), "a model folder of ours already"),
    (lambda f: [(f / name).write_text(text) for name, text in (("vocab.txt", "a"), ("tokenizer_config.json", "[]"))],
     "its vocabulary cannot be read"),
    (changed(num_attention_heads=16), "head"), (changed(vocab_size=60), "config.json asks"),
    (lambda f: (f / "config.json").write_text("[" * 200_000), "config.json: cannot be read"),
    (changed(num_hidden_layers=10 ** 8), "layers"),
    (lambda f: (f / "tokenizer.json").write_text("[" * 200_000), "tokenizer.json: cannot be used"),
    (changed(intermediate_size=10 ** 30), "no tensor can have"), (changed(vocab_size=float("inf")), "cannot convert float infinity"),
    (changed(num_hidden_layers=4), "is missing"), (changed(num_hidden_layers=2), "surplus"),
    (tensor("bert.encoder.layer.1.output.dense.bias", None), "layer.1.output.dense.bias is missing"),
    (tensor("classifier.weight", torch.zeros(2, 2)), "classifier.weight is surplus"),
    (tensor("bert.embeddings.LayerNorm.weight", torch.zeros(63)), r"asks for floats \[64\]"),
    (tensor("bert.embeddings.LayerNorm.weight", torch.zeros(64, dtype=torch.int64)), "int64"),
    (tensor("cls.predictions.decoder.weight", torch.zeros(50, 64)), "not tied"),
    (tensor("cls.predictions.bias", None), "missing"),
])
def test_refusals(tmp_path, monkeypatch, damage, wanted):
    """One line on standard error, exit code 2, nothing written, nothing run."""
    monkeypatch.chdir(tmp_path)
    folder = bert_folder(tmp_path / "theirs")
    damage(folder)
    done = CliRunner().invoke(checkpoints.import_command, [str(folder), str(tmp_path / "ours")])
    assert done.exit_code == 2 and done.exception.__class__ is SystemExit, (done.output, done.exception)
    assert len(done.output.strip().splitlines()) == 1, done.output
    assert re.search(wanted, done.output), done.output
    assert {p.name for p in tmp_path.iterdir()} == {"theirs"}


def test_only_folders_of_ours_are_replaced(tmp_path, tokenizer_file):
    """Not someone's files, not a downloaded checkpoint, not what a run has learnt, not the source, not the run that holds it.
    What import, trim or export wrote is, with a word."""
    theirs, other = bert_folder(tmp_path / "theirs"), bert_folder(tmp_path / "other")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    save_model(our_model("post"), tmp_path / "run" / "final", tokenizer_file)
    (tmp_path / "run" / "config.json").write_text(json.dumps(dict(block="post", steps=3)))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for command, source, target in ((checkpoints.import_command, theirs, tmp_path / "precious"),
                                    (checkpoints.import_command, theirs, other), (checkpoints.import_command, theirs, theirs),
                                    (checkpoints.import_command, theirs, tmp_path / "run" / "final"),
                                    (export.export_command, tmp_path / "run" / "final", tmp_path / "run" / "final"),
                                    (export.export_command, tmp_path / "run" / "final", tmp_path / "run")):
        done = CliRunner().invoke(command, [str(source), str(target)])
        assert done.exit_code == 2 and "choose another name" in done.output, done.output
    assert sorted(tmp_path.rglob("*")) == before
    for again in (False, True):
        for command, source, target in ((checkpoints.import_command, theirs, tmp_path / "ours"),
                                        (export.export_command, tmp_path / "run" / "final", tmp_path / "out")):
            done = CliRunner().invoke(command, [str(source), str(target)])
            assert done.exit_code == 0 and (f"{target} was there, and is replaced" in done.output) == again, done.output


def test_a_kill_while_a_folder_is_replaced_leaves_a_whole_one(tmp_path, monkeypatch):
    theirs, target = bert_folder(tmp_path / "theirs"), tmp_path / "ours"
    assert CliRunner().invoke(checkpoints.import_command, [str(theirs), str(target)]).exit_code == 0
    rmtree = checkpoints.shutil.rmtree

    def killed(folder, **options):
        monkeypatch.setattr(checkpoints.shutil, "rmtree", rmtree)
        (Path(folder) / "config.json").unlink()
        raise KeyboardInterrupt
    monkeypatch.setattr(checkpoints.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        with checkpoints.new_folder(target, theirs) as folder:
            save_model(our_model("post"), folder)
    assert load_model(target).config.block == "post"


@pytest.mark.parametrize("settings, wanted", [
    (dict(layer_types=["full_attention"]), "layer_types does not turn"), (dict(layer_types=5), "layer_types|iterable"),
    (dict(global_attn_every_n_layers=0), "global_attn_every_n_layers is 0"), (dict(rope_parameters=[1]), "get")])
def test_modernbert_settings_that_make_no_sense(tmp_path, settings, wanted):
    config = dict(model_type="modernbert", vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
                  intermediate_size=32, max_position_embeddings=64)
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=f"config.json: .*({wanted})"):
        checkpoints.read_config(tmp_path)


# -------------------------------------------------------------------------------------------------------- export

@pytest.fixture(params=["modern", "post", "encoder", "wordpiece"])
def ours(request, tmp_path, tokenizer_file):
    """A model folder of each kind."""
    folder = tmp_path / "run" / "final"
    if request.param == "wordpiece":
        vocabulary = read_wordpiece(wordpiece_folder(tmp_path / "w"))[0]
        save_model(our_model("post", vocab_size=len(vocabulary)), folder)
        checkpoints.save_vocabulary(vocabulary, folder)
    else:
        block = "modern" if request.param == "modern" else "post"
        save_model(our_model(block, mlm_head=request.param != "encoder", rope_theta=5000.0), folder, tokenizer_file)
    return folder


def formats(folder):
    """What --format may be for it: nothing, for the one that fits, and `bert` for every model of BERT's blocks."""
    return [None] if load_model(folder).config.block == "modern" else [None, "bert"]


def test_export_and_back(ours, tmp_path):
    """Bit for bit the same weights and the same vocabulary after export and import."""
    first, block = load_vocabulary(ours), load_model(ours).config.block
    best = "modernbert" if block == "modern" else "bert" if (ours / "vocab.txt").exists() else "xlm-roberta"
    for wanted in formats(ours):
        assert export.export_checkpoint(ours, tmp_path / "out", wanted) == (wanted or best)
        model, vocabulary, rows, _ = checkpoints.import_checkpoint(tmp_path / "out")
        assert same_state(state(model), state(load_model(ours)))
        assert rows == list(range(model.config.vocab_size)) and model.config.max_length == 40
        checkpoints.save_vocabulary(vocabulary, tmp_path)
        second = load_vocabulary(tmp_path)
        assert all(first.encode(text) == second.encode(text) for text in TEXTS)


def test_transformers_load_an_export(ours, tmp_path):
    peer = transformers()
    model, tokenizer = load(ours)
    for wanted in formats(ours):
        export.export_checkpoint(ours, tmp_path / "out", wanted)
        found = checkpoints.compare(model, tmp_path / "out", tokenizer)
        assert found["same_ids"] == found["sentences"]
        assert max(found[key] for key in ("hidden", "pooled", "logits") if key in found) < 1e-5, found
        auto = peer.AutoModelForMaskedLM if model.config.mlm_head else peer.AutoModel
        _, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not report["unexpected_keys"] and all("pooler" in key for key in report["missing_keys"])
    theirs = peer.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        assert theirs(clean(text))["input_ids"] == [0, *encode_text(tokenizer, text), 2], text
    if not (ours / "vocab.txt").exists():                  # the exported normaliser repeats data.clean
        for text in TEXTS:
            assert theirs(text)["input_ids"] == [0, *encode_text(tokenizer, text), 2], text
        masked = theirs("the <mask> dog")["input_ids"]
        assert masked.count(4) == 1 and theirs.mask_token_id == 4 and theirs.pad_token_id == 1
        assert theirs.decode(theirs("emoji 🦄 dog")["input_ids"], skip_special_tokens=True) == "emoji 🦄 dog"


def test_sentence_transformers_load_an_export(ours, tmp_path):
    package = pytest.importorskip("sentence_transformers", reason="loads the folder with sentence-transformers, which is "
                                  "not installed")
    export.export_checkpoint(ours, tmp_path / "out")
    theirs = package.SentenceTransformer(str(tmp_path / "out")).encode(checkpoints.SENTENCES)
    np.testing.assert_allclose(theirs, embed(*load(ours), checkpoints.SENTENCES).numpy(), rtol=0, atol=1e-5)


def test_sentence_transformers_files(ours, tmp_path):
    export.export_checkpoint(ours, tmp_path / "out")
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [m["type"].rsplit(".")[-1] for m in modules] == ["Transformer", "Pooling"]
    pooling = json.loads((tmp_path / "out" / modules[1]["path"] / "config.json").read_text())
    assert pooling["pooling_mode_mean_tokens"] and pooling["word_embedding_dimension"] == 64
    assert not any(v for k, v in pooling.items() if k.startswith("pooling_mode") and "mean_tokens" not in k)


def test_wrong_format_is_refused_in_one_line(tmp_path, tokenizer_file):
    for block, wanted, right in (("modern", "xlm-roberta", "use --format modernbert"),
                                 ("modern", "bert", "use --format modernbert"),
                                 ("post", "modernbert", "use --format xlm-roberta or bert")):
        save_model(our_model(block), tmp_path / block, tokenizer_file)
        done = CliRunner().invoke(export.export_command, [str(tmp_path / block), str(tmp_path / "out"), "--format", wanted])
        assert done.exit_code == 2 and right in done.output and len(done.output.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_model_card_states_what_the_run_recorded(tmp_path, tokenizer_file):
    run = tmp_path / "run"
    text = tmp_path / "text"
    text.mkdir()
    for code in ("en", "no"):
        (text / f"{code}.txt").write_text("\n\n".join(f"the fox {i} and the dog {i * 7} in the house" for i in range(40)))
    manifest = prepare(text, tmp_path / "data", tokenizer=tokenizer_file, validation_share=0.1)
    save_model(our_model("modern"), run / "final", tokenizer_file)
    (run / "config.json").write_text(json.dumps(dict(preset="tiny", steps=7, alpha=0.25)))
    (run / "run.json").write_text(json.dumps(dict(data=str(tmp_path / "data"))))
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [
        dict(step=3, validation=dict(mlm_loss=9.0, languages=dict(en=9.0, no=9.5))), dict(step=6, loss=1.0),
        dict(step=7, validation=dict(mlm_loss=5.4321, accuracy=0.25, languages=dict(en=5.125, no=5.5)))])))
    export.export_checkpoint(run / "final", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    tokens = manifest["languages"]["no"]["train"]["tokens"]
    for wanted in ('language: ["en", "no"]', f"| no | {tokens:,} | 5.500 |", "| steps | 7 |", "tokens^0.25",
                   "mlm_loss, on held-out documents: 5.4321", "accuracy"):
        assert wanted in card, wanted
    assert str(tmp_path) not in card
    save_model(our_model("modern"), tmp_path / "alone", tokenizer_file)
    export.export_checkpoint(tmp_path / "alone", tmp_path / "out2")
    assert (tmp_path / "out2" / "README.md").read_text().count("Not recorded") == 3


@pytest.mark.parametrize("block,every", [("modern", 1), ("modern", 2), ("post", 1)])
def test_what_onnx_gets_computes_the_same(block, every):
    model = our_model(block, global_every=every, rope_theta=777.0)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(5, VOCAB, n).tolist() for n in (4, 40, 1, 17)]
    ids, real = torch.full((4, 40), 1), torch.zeros(4, 40, dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        ids[i, :len(sequence)], real[i, :len(sequence)] = torch.tensor(sequence), 1
    with torch.no_grad():
        padded = export.PaddedEncoder(model)(ids, real)[real.bool()]
        torch.testing.assert_close(padded, model.encode(*pack_sequences(sequences)), rtol=0, atol=1e-5)


def test_onnx(tmp_path, tokenizer_file):
    save_model(our_model("modern"), tmp_path / "m", tokenizer_file)
    arguments = [str(tmp_path / "m"), str(tmp_path / "out"), "--format", "onnx"]
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        done = CliRunner().invoke(export.export_command, arguments)
        assert done.exit_code == 2 and "--format onnx needs the package onnx" in done.output
        assert len(done.output.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
        pytest.skip("the refusal is right; the export itself needs the packages onnx and onnxscript")
    assert CliRunner().invoke(export.export_command, arguments, catch_exceptions=False).exit_code == 0
    runtime = pytest.importorskip("onnxruntime", reason="runs model.onnx with onnxruntime, which is not installed")
    session = runtime.InferenceSession(tmp_path / "out" / "model.onnx")
    for batch, length in ((1, 5), (3, 40)):
        ids = np.random.default_rng(0).integers(5, VOCAB, (batch, length))
        found, = session.run(None, dict(input_ids=ids, attention_mask=np.ones_like(ids)))
        with torch.no_grad():
            wanted = load_model(tmp_path / "m").encode(*pack_sequences(ids.tolist())).view(batch, length, -1)
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------- trim

def write_texts(folder):
    folder.mkdir()
    (folder / "en.txt").write_text("\n\n".join(f"the fox and the dog jumps over {i}" for i in range(60)))
    (folder / "ru.txt").write_text("\n\n".join(f"лиса и собака перепрыгнула {i * i}" for i in range(60)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("prepared", [False, True])
def test_trim(tmp_path, tokenizer_file, prepared):
    """Kept pieces keep their vectors; the count of changed tokens is that of the dropped pieces; the size is right."""
    data = write_texts(tmp_path / "text")
    if prepared:
        prepare(data, tmp_path / "data", tokenizer=tokenizer_file)
        data = tmp_path / "data"
    save_model(our_model("post"), tmp_path / "m", tokenizer_file)
    done = CliRunner().invoke(checkpoints.trim_command, [str(tmp_path / "m"), str(tmp_path / "small"), "--data", str(data),
                                                 "--vocab-size", "340"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (model, tokenizer), (small, small_tokenizer) = load(tmp_path / "m"), load(tmp_path / "small")
    assert len(small_tokenizer) == small.config.vocab_size == 340
    counts = checkpoints.count_pieces(tokenizer, checkpoints.corpus_texts(data), VOCAB)
    kept = {small_tokenizer.id_to_piece(i) for i in range(340)}
    lost = sum(int(counts[i]) for i in range(VOCAB) if tokenizer.id_to_piece(i) not in kept)
    assert f" {lost:,} of the corpus's {counts.sum():,} tokens" in done.output
    saved = (VOCAB - 340) * 65
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters()) == saved
    whole = [text for text in checkpoints.corpus_texts(data)
             if all(tokenizer.id_to_piece(i) in kept for i in encode_text(tokenizer, text))]
    assert len(whole) > 20
    torch.testing.assert_close(embed(model, tokenizer, whole), embed(small, small_tokenizer, whole), rtol=0, atol=1e-6)
    for piece in ("<mask>", "<unk>", "<0x41>"):
        assert piece in kept


def test_trim_wordpiece():
    vocabulary = WordPiece(WORDPIECE_SPECIALS + ["the", "fox", "##es", "##e", "##s", "dog", "f", "##o", "##x"])
    counts = np.zeros(len(vocabulary), np.int64)
    np.add.at(counts, vocabulary.encode("the foxes the fox the"), 1)
    small = keep_pieces(vocabulary, choose_pieces(vocabulary, counts, 13))
    assert set(vocabulary.pieces) - set(small.pieces) == {"dog"}
    assert [small.id_to_piece(i) for i in small.encode("The foxes")] == ["the", "fox", "##es"] and small.encode("dog") == [3]
    # e stands in "the" and "##es", 4 times, f in "fox" twice: before any whole word that is as frequent
    small = keep_pieces(vocabulary, choose_pieces(vocabulary, counts, 7))
    assert set(small.pieces) == {*WORDPIECE_SPECIALS, "##e", "the"}


def test_trim_keeps_the_price_of_an_unknown_character(tokenizer_file):
    model = SentencePieceModel.read(tokenizer_file)
    lowest = min(score for _, score, kind in model.pieces if kind == 1)
    keep = choose_pieces(model, np.zeros(len(model.pieces), np.int64), 270)
    kept = keep_pieces(model, keep)
    assert is_ours(kept) and kept.pieces[:5] == OURS and min(s for _, s, k in kept.pieces if k == 1) == lowest
    for size in (100, VOCAB + 1):
        with pytest.raises(ValueError, match="must be from"):
            choose_pieces(model, np.zeros(len(model.pieces), np.int64), size)


def test_trim_with_a_prior_keeps_what_a_small_corpus_has_not_shown(tokenizer_file):
    """Of two pieces that were never seen the likelier one; but one that was seen often before one that is likely."""
    model = SentencePieceModel.read(tokenizer_file)
    words = [i for i, (text, _, kind) in enumerate(model.pieces) if kind == 1 and len(text.removeprefix("\u2581")) > 1]
    likely, unlikely, seen = (sorted(words, key=lambda i: -model.pieces[i][1])[k] for k in (0, -2, -3))
    counts = np.zeros(len(model.pieces), np.int64)
    counts[seen] = 10 ** 12
    order = [next(size for size in range(263, VOCAB + 1) if i in choose_pieces(model, counts, size, prior=True))
             for i in (seen, likely, unlikely)]
    assert order == sorted(order) and order[0] < order[1] < order[2]
    with pytest.raises(ValueError, match="WordPiece has none"):
        choose_pieces(WordPiece([*WORDPIECE_SPECIALS, "the"]), np.zeros(6, np.int64), 6, prior=True)


# ------------------------------------------------------------------------------------------- students from layers

@pytest.mark.parametrize("block", ["modern", "post"])
def test_student_from_all_layers_is_the_teacher(block):
    teacher = our_model(block)
    assert same_state(state(checkpoints.student_from_layers(teacher, [0, 1, 2])), state(teacher))


def test_student_from_layers():
    teacher = our_model("post", mlm_head=False)
    student = checkpoints.student_from_layers(teacher, [0, 2])
    assert student.config.num_layers == 2 and student.config.mlm_head
    assert torch.equal(student.blocks[1].qkv.weight, teacher.blocks[2].qkv.weight)
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    with torch.no_grad():
        student.embedding.weight.zero_()                                # copies: the teacher stays as it is
    assert teacher.embedding.weight.abs().sum() > 0
    for layers in ([2, 1], [3], [], [-1], [1, 1]):
        with pytest.raises(ValueError, match="the teacher's layers"):
            checkpoints.student_from_layers(teacher, layers)


def test_a_modern_student_without_the_first_layer():
    """Its first layer has no norm; on a stream whose norm that one would have kept, both compute the same."""
    teacher = our_model("modern")
    student = checkpoints.student_from_layers(teacher, [1, 2])
    x = torch.nn.functional.layer_norm(torch.randn(6, 64), (64,))
    torch.testing.assert_close(student.blocks[0].heads(x), teacher.blocks[1].heads(x), rtol=0, atol=1e-4)


# --------------------------------------------------------------------------------------------- the real checkpoint

def test_the_real_teacher(tmp_path):
    """multilingual-e5-small as make_teacher.py writes it: segmentation and vectors on real text of every language."""
    source = os.environ.get("UNIBERT_E5")
    if not source:
        pytest.skip("set UNIBERT_E5 to the folder that make_teacher.py wrote")
    if not (SHARED / "data" / "text").is_dir():
        pytest.skip("needs the texts in UNIBERT_SHARED/data/text")
    peer = transformers()
    model, vocabulary, rows, _ = checkpoints.import_checkpoint(source)
    checkpoints.save_vocabulary(vocabulary, tmp_path)
    tokenizer = load_vocabulary(tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(Path(source) / "sentencepiece.bpe.model"))
    lines = [line for path in sorted((SHARED / "data" / "text").glob("*.txt"))
             for line in path.read_text(encoding="utf-8").split("\n")[:100] if line]
    for line in lines:
        assert [rows[i] for i in tokenizer.encode(line)] == [i + 1 if i else 3 for i in original.encode(line)], line
    some = lines[::150]
    theirs = peer.AutoTokenizer.from_pretrained(source)(some, return_tensors="pt", padding=True, truncation=True,
                                                        max_length=512)
    with torch.no_grad():
        hidden = peer.AutoModel.from_pretrained(source, dtype=torch.float32)(**theirs).last_hidden_state
    real = theirs["attention_mask"][..., None]
    wanted = torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1))
    assert (embed(model, tokenizer, some, normalize=True) - wanted).abs().max() < 1e-4


def test_commands_are_wired():
    done = subprocess.run([sys.executable, "unibert.py", "import", "nowhere", "x"], capture_output=True, text=True,
                          cwd=Path(checkpoints.__file__).parent.parent)
    assert done.returncode == 2 and done.stderr.strip().splitlines() == [
        "Error: nowhere: has no config.json, so it is no checkpoint folder"]
