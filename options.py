"""A run's options: what they are, what they may be, and who has the run folder.

`config.json` in a run folder keeps a TrainConfig, `run.json` what the command was given.
"""
from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import pathlib
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import click

from batches import MIN_SEQUENCE
from files import write_atomically
from launch import UserError

# The weights of what is learnt from a teacher: token by token (with another tokenizer: hub/reread.py), and text by text.
TOKEN_DISTILLATION = ("kd_weight", "kd_hidden_weight", "kd_relation_weight")
DISTILLATION = (*TOKEN_DISTILLATION, "kd_sentence_weight", "kd_similarity_weight")
# kd_anchors and kd_neutral are refused without kd_sentence_weight or kd_similarity_weight.
WITHOUT_TEACHER = dict.fromkeys(DISTILLATION, 0.0) | {"kd_anchors": 0, "kd_neutral": 0}


def option(default, text: str, choices: tuple[str, ...] = ()):
    """A field of TrainConfig that is also a command-line option with this help."""
    return dataclasses.field(default=default, metadata=dict(help=text, choices=choices))


@dataclass
class TrainConfig:
    """Every option that shapes a run; `config.json` in the run folder keeps it. Defaults suit a GPU and real data."""
    # what to train
    preset: str = option("small", "Size of the model.", ("tiny", "xsmall", "small", "base"))
    block: str = option("modern", "Form of a layer (unibert.py).", ("modern", "post"))
    steps: int = option(20000, "Optimiser steps.")
    tokens_per_batch: int = option(65536, "Tokens a step, over all processes and micro-batches.")
    micro_batch_tokens: int = option(65536, "At most so many tokens in one forward pass.")
    max_length: int = option(512, "Tokens of a sequence, <s> and </s> included.")
    seed: int = option(0, "Another seed, another run; the same seed, the same bits (CPU).")
    # the objective
    mlm_weight: float = option(1.0, "Masked language modelling.")
    adv_weight: float = option(0.1, "The adversary's lambda at the end of its ramp; 0: no adversary.")
    kd_weight: float = option(1.0, "KL to the teacher's predictions at masked positions, times T^2.")
    kd_hidden_weight: float = option(0.0, "Last hidden states, through a projection.")
    kd_relation_weight: float = option(0.0, "MiniLMv2 relations of the last layers.")
    kd_sentence_weight: float = option(0.0, "Cosine distance of mean-pooled sentence vectors; for teachers without MLM head.")
    kd_similarity_weight: float = option(0.0, "KL between a sentence's similarities to the others of its row and the anchors.")
    kd_anchors: int = option(0, "Texts whose vectors, by the teacher, each sentence is compared with besides its row's.")
    kd_neutral: int = option(0, "Directions in which languages differ most, to be taken out of the teacher's sentence vectors.")
    kd_similarity_temperature: float = option(0.05, "Temperature of these similarities.")
    teacher_prefix: str = option("", "Put before each text that the teacher reads; e5 models want 'query: '.")
    kd_temperature: float = option(2.0, "Temperature T of distillation.")
    adv_layer: int = option(0, "Layer whose output the discriminator sees; 0: the middle one.")
    adv_level: str = option("token", "It sees tokens or mean-pooled sequences.", ("token", "sequence"))
    adv_lr: float = option(1e-3, "The discriminator's learning rate.")
    mask_rate: float = option(0.15, "Share of tokens to predict.")
    whole_word: bool = option(False, "Mask whole words.")
    dropout: float = option(0.0, "Dropout on embeddings and residual branches.")
    init: str = option("", "Start from this model folder (imported, pruned, of another run); --preset is not used.")
    init_from_teacher: str = option("", "Start from these layers of the teacher, as in 2,5,8,11 (from 0); --preset is not used.")
    teacher_preset: str = option("base", "Size of the teacher of --teacher-steps.", ("tiny", "xsmall", "small", "base"))
    teacher_steps: int = option(0, "Without --teacher: first train one for so many steps, by MLM alone.")
    # languages
    alpha: float = option(0.3, "A language's share is its token count to this power; 0 with --max-epochs is UniMax.")
    max_epochs: float = option(20.0, "No language is read more often than this.")
    # optimisation
    optimizer: str = option("muon", "muon: the layers' matrices by Muon, the rest by AdamW.", ("adamw", "muon"))
    lr: float = option(5e-3, "Peak learning rate.")
    weight_decay: float = option(0.01, "On matrices only.")
    schedule: str = option("wsd", "Learning rate after the warm-up.", ("wsd", "linear", "cosine"))
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises.")
    decay: float = option(0.2, "wsd: share of the steps in which it falls.")
    clip: float = option(1.0, "Largest gradient norm.")
    dtype: str = option("auto", "Of matrix products; auto: bfloat16 where the device is fast at it.",
                        ("auto", "float32", "bfloat16"))
    reduce_dtype: str = option("float32", "Of gradients on their way between processes; bfloat16 is half the traffic.",
                               ("float32", "bfloat16"))
    # how it runs: nothing from here on changes what is learnt, but for rounding
    device: str = option("auto", "auto: CUDA where there is any.", ("auto", "cpu", "cuda"))
    log_every: int = option(50, "Steps between lines of the log.")
    eval_every: int = option(1000, "Steps between validations.")
    eval_tokens: int = option(16384, "Validation tokens of each language.")
    save_every: int = option(1000, "Steps between checkpoints.")
    compile: bool = option(False, "torch.compile the step: no Python between kernels.")
    cuda_graphs: bool = option(False, "With --compile, replay the step as CUDA graphs: no launches left to wait for.")
    teacher_cache: int = option(0, "With sentence distillation alone, keep so many of the teacher's vectors: it reads a text once, "
                                   "not once an epoch. A resumed run then agrees to rounding, not to the bit.")
    teacher_cache_file: str = option("", "Begin with the vectors in this file, if it is there, and leave all of them in it at each "
                                         "checkpoint: the next student's teacher reads nothing twice.")
    checkpoint_activations: bool = option(False, "Keep only each layer's input and compute the rest again: less memory, a third more work.")
    profile: bool = option(False, "Profile steps 5 to 7: OUT/trace.json and the ten dearest operations.")
    tensorboard: bool = option(False, "Also write event files into the run folder, if tensorboard is installed.")
    keep: int = option(2, "Newest checkpoints to keep.")
    keep_every: int = option(0, "Also keep every checkpoint whose step is a multiple of this; 0: none.")

    def __post_init__(self):
        for name in ("steps", "tokens_per_batch", "micro_batch_tokens", "lr", "adv_lr", "kd_temperature", "clip",
                     "kd_similarity_temperature", "max_epochs", "log_every", "eval_every", "eval_tokens", "save_every", "keep"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be a number above 0")
        for name in ("mlm_weight", "adv_weight", "adv_layer", "alpha", "weight_decay", "teacher_steps", "keep_every",
                     "teacher_cache", "kd_anchors", "kd_neutral", *DISTILLATION):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be 0 or more")
        for name in ("mask_rate", "dropout", "warmup", "decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 0 and below 1")
        if not 0 <= self.seed < 2 ** 63:
            raise ValueError(f"--seed is {self.seed}; it must be at least 0 and below 2^63")
        if self.max_length < MIN_SEQUENCE or self.max_length > 1024 and self.max_length % MIN_SEQUENCE:
            raise ValueError(f"--max-length is {self.max_length}; it must be at least {MIN_SEQUENCE}, and above 1024 a multiple of that")
        if self.teacher_cache and (self.compile or self.distils_tokens):
            raise ValueError("--teacher-cache keeps sentence vectors: it goes with --kd-weight 0, --kd-sentence-weight or "
                             "--kd-similarity-weight, and without --compile")
        if self.kd_anchors and not self.kd_similarity_weight:
            raise ValueError("--kd-anchors are what --kd-similarity-weight compares a sentence with; give that, too")
        if self.kd_neutral and not (self.kd_sentence_weight or self.kd_similarity_weight):
            raise ValueError("--kd-neutral changes sentence vectors; it goes with --kd-sentence-weight or --kd-similarity-weight")
        if self.teacher_cache_file and not self.teacher_cache:
            raise ValueError("--teacher-cache-file keeps what --teacher-cache remembers; give that, too")
        if not all(part.strip().isdigit() for part in self.init_from_teacher.split(",") if self.init_from_teacher):
            raise ValueError(f"--init-from-teacher is {self.init_from_teacher!r}; it must be numbers of layers, as in 2,5,8,11")
        if self.init and self.init_from_teacher:
            raise ValueError("--init and --init-from-teacher are two ways to start; give one")

    @property
    def distils(self) -> bool:
        """Whether anything is learnt from a teacher."""
        return any(getattr(self, name) for name in DISTILLATION)

    @property
    def distils_tokens(self) -> bool:
        """Whether the teacher is compared token by token."""
        return any(getattr(self, name) for name in TOKEN_DISTILLATION)


def rows_of(tokens_per_batch: int, max_length: int) -> tuple[int, int]:
    """A global batch's rows, which processes share, and the tokens of each."""
    row = max(1024, max_length)
    return max(1, tokens_per_batch // row), row


def not_as_asked(config: TrainConfig):
    """Yields a line for each number of tokens that is not a number of rows."""
    rows, row = rows_of(config.tokens_per_batch, config.max_length)
    if rows * row != config.tokens_per_batch:
        yield f"--tokens-per-batch {config.tokens_per_batch:,}: it will be {rows * row:,}, whole rows of {row:,}"
    if config.micro_batch_tokens < row:
        yield f"--micro-batch-tokens {config.micro_batch_tokens:,}: it will be {row:,}, one row"


RUNS_THE_SAME = ("micro_batch_tokens", "device", "log_every", "eval_every", "eval_tokens", "save_every", "compile",
                 "cuda_graphs", "teacher_cache", "teacher_cache_file", "checkpoint_activations", "profile", "tensorboard", "keep", "keep_every")

# What `python train.py` does when no --data is given: two minutes on two CPU cores.
ATLAS_RECIPE = dict(preset="tiny", steps=300, tokens_per_batch=4096, micro_batch_tokens=2048, max_length=64, optimizer="muon",
                    lr=1e-2, adv_weight=0.1, teacher_preset="tiny", teacher_steps=400, log_every=50, eval_every=10 ** 9,
                    save_every=100, eval_tokens=4096, mask_rate=0.3)
ATLAS_VOCABULARY = 8000
# 15 of its 39 languages, in eight scripts: so few minutes are enough to read them five times, but not to read all.
ATLAS_LANGUAGES = ("ar", "de", "el", "en", "es", "fr", "hi", "it", "ko", "nl", "pt", "ro", "ru", "th", "zh")


def settle(options: dict, given: set[str], out: pathlib.Path, resume: bool, extend: bool) -> dict:
    """The run's settings: what was given, over those of the run to resume, over the atlas recipe, over defaults."""
    if extend and not resume:
        raise UserError("--extend goes with --resume: it lets a run go on for more --steps")
    if extend and "steps" not in given:
        raise UserError("--extend needs --steps, how many there shall be in all")
    if resume:
        path = out / "run.json"
        if not path.is_file():
            raise UserError(f"{out} holds no run to resume")
        try:
            saved = json.loads(path.read_text())
            names = {f.name for f in dataclasses.fields(TrainConfig)} & saved.keys()  # an option may be younger than the run
            TrainConfig(**{n: saved[n] for n in names | {"steps"}})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"{path} does not hold the options of a run ({type(error).__name__}: {error}); it is damaged") from None
        if options["dtype"] == "auto":  # run.json says what it was
            given = given - {"dtype"}
        free = [n for n in RUNS_THE_SAME if n != "micro_batch_tokens" or not saved.get("dropout")]  # each draws its own dropout
        changed = [f"--{n.replace('_', '-')} (was {saved[n]}, now {options[n]})" for n in sorted(given & saved.keys())
                   if options[n] != saved[n] and n not in free and not (extend and n == "steps")]
        if changed:
            raise UserError(f"this would not be the run in {out} any more: {', '.join(changed)}. Leave these options as they "
                            f"were, start a new run with another --out, or give --extend if only --steps grows")
        if extend and options["steps"] < saved["steps"]:
            raise UserError(f"--extend means more steps than the {saved['steps']} of the run in {out}, not {options['steps']}")
        return options | saved | {n: options[n] for n in given & saved.keys()}  # a run of before an option was there goes on
    if (out / "run.json").exists():
        raise UserError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    return options | ({} if options["data"] else {k: v for k, v in ATLAS_RECIPE.items() if k not in given})


def write_settings(out: pathlib.Path, settings: dict) -> None:
    write_atomically(out / "run.json", [json.dumps(settings, indent=1).encode()])


def same_data(settings: dict, out: pathlib.Path, data: pathlib.Path, sha256: str) -> None:
    """Put the data's manifest_digest into the run's settings. UserError if they hold another: the run began with other data."""
    if settings.setdefault("data_sha256", sha256) != sha256:  # a run of before this was kept goes on
        onwards = f" with --init {out / 'final'}" if (out / "final").is_dir() else ""
        raise UserError(f"{data} is not what it was when the run in {out} began (prepare --append or --overwrite); bring it back, "
                        f"or start a new run{onwards} and another --out")


@contextmanager
def claimed(out: pathlib.Path, settings: dict):
    """The run folder, locked against other processes, with the settings in run.json. A start that is refused, or stopped by
    Ctrl-C, before its first step leaves no run behind: the same --out is free for the next try."""
    fresh = not (out / "run.json").exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}); choose another") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"another process is training in {out}; choose another --out") from None
    write_settings(out, settings)
    try:
        yield
    except (ValueError, OSError, click.ClickException, KeyboardInterrupt):
        if fresh and not any((folder / "metrics.jsonl").exists() for folder in (out, out / "teacher")):
            for name in ("run.json", "config.json", ".lock"):
                (out / name).unlink(missing_ok=True)
            with suppress(OSError):  # the atlas stays for the next try
                out.rmdir()
        raise
