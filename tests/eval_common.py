"""What test_eval.py and test_eval_reports.py share: a tiny model with random weights, the atlas as data, the command."""
import pytest
import torch
from click.testing import CliRunner

import atlas
from data import load_tokenizer, train_tokenizer
from eval import run
from eval.__main__ import main
from unibert import UniBERT, UniBERTConfig, load_model, save_model

LANGUAGES = ("en", "ro", "ru", "zh", "ar", "fi")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """folder/eval: the atlas in six languages; folder/model: a tiny model with random weights."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("atlas")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atlas, "languages", lambda: LANGUAGES)              # six of them are enough, and quicker
        atlas.write(folder)
    lines = [line for code in LANGUAGES for line in (folder / f"text/{code}.txt").read_text().split("\n")[:300]]
    (folder / "tokenizer.model").write_bytes(train_tokenizer((line for line in lines if line), 1500))
    torch.manual_seed(0)
    model = UniBERT(UniBERTConfig(vocab_size=1500, hidden_size=64, num_layers=2, num_heads=2, intermediate_size=128,
                                  max_length=128))
    save_model(model, folder / "model", folder / "tokenizer.model")
    return folder


@pytest.fixture
def model(folder):
    return load_model(folder / "model")


@pytest.fixture(scope="session")
def tokenizer(folder):
    return load_tokenizer(folder / "tokenizer.model")


def examples(folder, module, task, split="train", count=None, language="en"):
    return module.load(folder / "eval" / task / "atlas")[language][split][:count]


def each_trains(patch, epochs):
    for head in run.HEADS.values():
        patch.setattr(head, "epochs", epochs)


def command(*arguments, jobs=1):
    """jobs: one, because other processes would take seconds to start."""
    return CliRunner().invoke(main, [*map(str, arguments), *(["--jobs", str(jobs)] if arguments[0] == "run" else [])])
