"""Train UniBERT: masked language modelling, a language adversary, and distillation from a teacher.

    python train.py                                             # the embedded atlas: teacher, student, final table
    python train.py --ablate --out DIR                          # MLM, + adversary, + distillation, all: 15 minutes
    python train.py --data DIR --out RUN --preset small --teacher TEACHER --steps 100000
    python train.py --out RUN --resume                          # go on after a stop or a crash
    torchrun --nnodes 2 --nproc-per-node 8 train.py ...         # several machines; on one, every GPU is taken

In reading order: optimisers and schedule, one training run, the command line. The options are in options.py, the losses
are summed in objective.py. A step's batch and masks are functions of (seed, step, row), so resuming and another number of
processes or micro-batches see the same global batches. Dropout, where it is used, depends on (seed, step, process,
micro-batch).
"""
from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import time
from contextlib import nullcontext

# OpenMP threads that wait may spin shortly, then sleep. On idle cores nothing changes; where cores are shared, spinning
# threads keep each other from working. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import click
import numpy as np
import torch
from torch import nn

from checkpoint import Checkpoints
from data import (IGNORE, BatchConfig, Corpus, PackedBatch, Prefetcher, load_tokenizer, manifest_digest, packed_batch, prepare,
                  sampling_probabilities, slot_probabilities)
from events import Log, peak_memory, profiler, summary_writer
from files import write_atomically
from hub.checkpoints import student_from_layers, trim_model
from hub.reread import Reread, load_start, load_teacher
from launch import (UserError, World, average_in_bfloat16, default_dtype, end_of_rank, keep_freed_memory, launch, leave_group,
                    tell_stopped)
from objective import Objective, batch_counts
from options import (ATLAS_LANGUAGES, ATLAS_RECIPE, ATLAS_VOCABULARY, DISTILLATION, WITHOUT_TEACHER, TrainConfig, claimed,
                     not_as_asked, rows_of, same_data, settle, write_settings)
from plan import PEAK_FLOPS, flops_per_token, plan
from unibert import LanguageDiscriminator, UniBERT, UniBERTConfig, language_directions, load_model, save_model
from validation import evaluate, final_table, unigram_loss


# --------------------------------------------------------------------------------------- optimisers, schedule

class _InFloat32(torch.overrides.TorchFunctionMode):
    """While active, `tensor.bfloat16()` gives a float32 copy (a copy, because Muon goes on in place)."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """torch's Muon, which orthogonalises in bfloat16; in float32 where the device is slow at bfloat16.

    On a CPU that emulates bfloat16 the orthogonalisation would take nearly all of a small model's step.
    """

    @torch.no_grad()
    def step(self, closure=None):
        device = self.param_groups[0]["params"][0].device
        with _InFloat32() if default_dtype(device) == torch.float32 else nullcontext():
            return super().step(closure)


def make_optimizers(objective: Objective, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The layers' matrices by --optimizer (Muon or AdamW), all the rest by AdamW.

    No weight decay on norms, biases and embeddings. The discriminator has its own learning rate, which does not follow the schedule.
    """
    matrices, plain = [], []
    for name, p in objective.model.named_parameters():
        (matrices if p.ndim == 2 and "embedding" not in name else plain).append(p)
    if objective.projection is not None:
        plain += objective.projection.parameters()
    groups = [dict(params=plain, lr=config.lr, weight_decay=0.0)]
    optimizers = []
    if config.optimizer == "muon":
        # Updates as large as AdamW's, so that one learning rate serves both.
        optimizers.append(Muon(matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"))
    else:
        groups.append(dict(params=matrices, lr=config.lr, weight_decay=config.weight_decay))
    if objective.discriminator is not None:
        groups.append(dict(params=list(objective.discriminator.parameters()), lr=config.adv_lr, weight_decay=0.0, follows=False))
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def schedule(step: int, config: TrainConfig) -> float:
    """Factor on the learning rate at `step` (0-based): linear warm-up, then wsd, linear or cosine to zero."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return (step + 1) / warm
    left = (config.steps - step) / max(1, config.steps - warm)
    if config.schedule == "linear":
        return left
    if config.schedule == "cosine":
        return 0.5 - 0.5 * math.cos(math.pi * left)
    return min(1.0, (config.steps - step) / max(1, round(config.decay * config.steps)))


def adversary_strength(step: int, config: TrainConfig) -> float:
    """Ganin's ramp: lambda grows from 0 to adv_weight, so that the discriminator learns before it is obeyed."""
    return config.adv_weight * (2 / (1 + math.exp(-10 * step / config.steps)) - 1)


# -------------------------------------------------------------------------------------------------- one run

TEXTS_OF_A_LANGUAGE = 64     # whose mean vector stands for it; 170 bring the teacher 0.2 points more (examples/tried.md)


class Run:
    """Training of one model in one folder."""

    def __init__(self, config: TrainConfig, corpus: Corpus, out: pathlib.Path, world: World,
                 teacher: UniBERT | None = None, reread: Reread | None = None, top: pathlib.Path | None = None):
        self.config, self.corpus, self.out, self.world = config, corpus, out, world
        self.top = top or out  # what --out was: a teacher that is trained first has a folder inside
        self.held_out = Corpus(corpus.folder, "validation", verify=False)
        cuda = config.device == "cuda"
        self.device = torch.device(f"cuda:{world.local_rank}" if cuda else "cpu")
        self.autocast = (torch.autocast(self.device.type, torch.bfloat16) if config.dtype == "bfloat16"
                         else nullcontext())
        self.rows, row = rows_of(config.tokens_per_batch, config.max_length)
        self.batch_config = BatchConfig(row_tokens=row, max_length=config.max_length, mask_rate=config.mask_rate,
                                        whole_word=config.whole_word, vocab_size=corpus.vocab_size)
        if self.rows % world.size:
            raise UserError(f"--tokens-per-batch {config.tokens_per_batch} makes {self.rows} rows of {row} tokens, which "
                            f"{world.size} processes cannot share evenly; use a multiple of {row * world.size}")
        self.probabilities = sampling_probabilities(corpus.tokens_per_language, config.alpha,
                                                    config.steps * self.rows * row, config.max_epochs)
        torch.manual_seed(config.seed)
        model = self.fresh_model(teacher, reread)
        if not config.distils:
            teacher = None  # it only gave its layers
        teacher = teacher.to(self.device).eval().requires_grad_(False) if teacher is not None else None
        prior = (self.probabilities if config.adv_level == "token" else
                 slot_probabilities(corpus, self.probabilities, self.batch_config))
        self.prior_entropy = -sum(p * math.log(p) for p in prior.tolist() if p)
        self.objective = Objective(model, config, torch.from_numpy(prior), teacher, reread).to(self.device)
        self.model = self.objective.model
        self.model.checkpoint_activations = config.checkpoint_activations
        self.optimizers = make_optimizers(self.objective, config)
        reads = teacher.config if teacher and not config.teacher_cache else None  # a cached vector is no work; the first epoch's is left out
        self.flops = sum(flops_per_token(model.config, config.mask_rate, config.max_length / 2, reads, config.adv_weight > 0,
                                         head=bool(config.mlm_weight or config.kd_weight), teacher_head=config.kd_weight > 0).values())
        name = torch.cuda.get_device_name(self.device) if cuda else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)
        self.checkpoints = Checkpoints(out / "checkpoints", config.keep, config.keep_every,
                                       warn=lambda text: click.echo(text, err=True))
        self.step, self.tokens_seen, self.skipped, self.skipped_in_a_row = 0, 0, 0, 0
        self.adv_loss = 0.0  # the discriminator's on the last global batch
        self.stop_asked, self.stopping = 0.0, False  # when this process got a signal; all ranks know of one
        self.log = Log(out, config, self.rows * row) if world.rank == 0 else lambda record: None

    def fresh_model(self, teacher: UniBERT | None, reread: Reread | None) -> UniBERT:
        """The model before its first step: that of --init, layers of the teacher, or --preset drawn at random."""
        config, corpus = self.config, self.corpus
        start = teacher if config.init_from_teacher else None
        if config.init:
            start = load_start(config.init, corpus, config.max_length)
            model = student_from_layers(start, list(range(start.config.num_layers)), config.dropout)
        elif config.init_from_teacher:
            model = student_from_layers(teacher if reread is None else trim_model(teacher, reread.rows()),
                                        [int(n) for n in config.init_from_teacher.split(",")], config.dropout)
        else:
            model = UniBERT(UniBERTConfig.preset(config.preset, block=config.block, vocab_size=corpus.vocab_size,
                                                 n_languages=len(corpus.languages), max_length=config.max_length,
                                                 dropout=config.dropout))
        if start is None or not start.config.mlm_head:
            # Start from the language-blind unigram model instead of learning it in the first steps.
            model.decoder_bias.data.copy_(torch.from_numpy(self.token_shares()).log())
        return model

    # ---- batches

    def token_shares(self) -> np.ndarray:
        """How often each piece occurs in the batches' mixture of languages (plus one) [V] float64, sum 1."""
        shares = np.zeros(self.corpus.vocab_size)
        for language, p in zip(self.corpus.languages, self.probabilities):
            tokens = self.corpus.tokens(language)[:1_000_000]
            if p and len(tokens):
                shares += p * np.bincount(tokens, minlength=len(shares)) / len(tokens)
        shares += 1 / max(1, self.corpus.tokens_per_language.sum())
        return shares / shares.sum()

    def micro_batches(self, step: int) -> list[PackedBatch]:
        """This process's share of the global batch of `step`, in micro-batches."""
        share = self.rows // self.world.size
        first, (size, _) = self.world.rank * share, self.micro_batch_rows()
        batches = [packed_batch(self.corpus, self.probabilities, self.batch_config, self.config.seed, step,
                                range(first + i, first + i + size)) for i in range(0, share, size)]
        return [b.pin_memory() for b in batches] if self.device.type == "cuda" else batches

    def micro_batch_rows(self) -> tuple[int, int]:
        """Rows of a micro-batch, all alike, so that nothing recompiles; and how many --micro-batch-tokens would hold."""
        share = self.rows // self.world.size
        most = max(1, min(share, self.config.micro_batch_tokens // self.batch_config.row_tokens))
        return next(size for size in range(most, 0, -1) if share % size == 0), most

    def study_teacher(self) -> None:
        """What is to be known of the teacher's vectors before the first step: where its languages lie (--kd-neutral), and texts to
        compare with (--kd-anchors). It comes from the first texts of training: the same in all processes and after a resume,
        which a queue of recent ones would not be."""
        config, objective = self.config, self.objective
        if objective.teacher is None:
            return

        def read(probabilities: np.ndarray, count: int) -> torch.Tensor:
            """The first `count` texts of such a mixture of languages -> [count, H'] fp32."""
            vectors, number = [], 0
            while sum(map(len, vectors)) < count:
                step, row = divmod(number, self.rows)
                batch = packed_batch(self.corpus, probabilities, self.batch_config, config.seed, step, range(row, row + 1)).to(self.device)
                with self.autocast:
                    vectors.append(objective.teacher_vectors(batch)[batch.languages != IGNORE])
                number += 1
            return torch.cat(vectors)[:count].float()

        if config.kd_neutral:
            known = np.flatnonzero(self.probabilities)
            self.world.say(f"the teacher reads {TEXTS_OF_A_LANGUAGE} texts of each of {len(known)} languages")
            one = np.eye(len(self.probabilities))
            means = torch.stack([read(one[language], TEXTS_OF_A_LANGUAGE).mean(0) for language in known])
            objective.centre, objective.directions = means.mean(0), language_directions(means, config.kd_neutral)
        if config.kd_anchors:
            self.world.say(f"the teacher reads {config.kd_anchors:,} texts to compare with")
            objective.anchors = read(self.probabilities, config.kd_anchors)

    def loader_speed(self) -> float:
        """Tokens a second that this process can load, alone, on one core."""
        start = time.perf_counter()
        for step in range(3):
            self.micro_batches(step)
        return 3 * self.rows // self.world.size * self.batch_config.row_tokens / (time.perf_counter() - start)

    # ---- one optimiser step

    def train_step(self, batches: list[PackedBatch], module: nn.Module) -> dict[str, float]:
        """One global batch. Returns its measurements; the model is unchanged if the loss was not finite."""
        config, world = self.config, self.world
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                # The discriminator must keep up to the end; with its own rate decayed the encoder ran away from it.
                group["lr"] = group["peak_lr"] * (schedule(self.step, config) if group.get("follows", True) else 1.0)
        strength = self.strength()
        strength_on_device = torch.tensor(strength, device=self.device)
        # One vector for all ranks: counts, and whether one of them was asked to stop.
        shared = np.append(batch_counts(batches, len(self.corpus.languages), config.adv_level), float(self.stop_asked > 0))
        shared = world.sum(torch.from_numpy(shared).float().to(self.device))
        counts, sums = shared[:3], torch.zeros(len(Objective.PARTS), device=self.device)
        if config.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # gradients of the last step are not looked at any more
        for i, batch in enumerate(batches):
            if config.dropout:
                torch.manual_seed(hash((config.seed, self.step, world.rank, i)) & 0x7FFFFFFF)
            last = i == len(batches) - 1
            with nullcontext() if last or world.size == 1 else module.no_sync():
                with self.autocast:
                    part = module(batch.to(self.device, non_blocking=True), strength_on_device)
                    # DDP averages gradients over ranks; the counts are global, so undo that.
                    loss = self.objective.loss(part, counts) * world.size
                loss.backward()
            sums += part.detach()
        world.sum(sums)
        modules = self.model, self.objective.projection, self.objective.discriminator  # a projection may be without parameters
        groups = [parameters for m in modules if m is not None and (parameters := list(m.parameters()))]
        norms = [nn.utils.get_total_norm([p.grad for p in ps if p.grad is not None]) for ps in groups]
        results = sums, shared, self.objective.loss(sums, counts).detach()[None], torch.stack(norms)
        # One copy for all, so that the host waits for the device once a step.
        copied = torch.cat(results).cpu()
        finite = bool(copied.isfinite().all())
        if finite:
            for parameters, norm in zip(groups, norms):
                nn.utils.clip_grads_with_norm_(parameters, config.clip, norm)
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sums, shared, (loss,), norms = (values.tolist() for values in copied.split([len(values) for values in results]))
        return self.count_step(sums, shared, loss, norms, finite, strength)

    def strength(self) -> float:
        """The adversary's lambda at this step: the ramp, lowered as the discriminator's last loss nears the prior's entropy.

        From a discriminator that knows no more than the prior there is nothing left to hide. The encoder then waits until
        the discriminator has caught up; without this the two chase each other and the reversed loss grows without end.
        """
        strength = adversary_strength(self.step, self.config)
        if self.prior_entropy:
            strength *= LanguageDiscriminator.pressure(torch.tensor(self.adv_loss / self.prior_entropy)).item()
        return strength

    def count_step(self, sums: list, shared: list, loss: float, norms: list, finite: bool, strength: float) -> dict[str, float]:
        """Advance step, tokens_seen and the other counters past the step just made -> its record."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        part, *per_language, stop = dict(zip(Objective.PARTS, sums)), *shared[3:]
        masked, tokens, sequences = (max(1.0, count) for count in shared[:3])
        units = sequences if self.config.adv_level == "sequence" else tokens
        record = dict(step=self.step + 1, loss=loss)
        if self.config.mlm_weight or self.config.kd_weight:  # else nobody computed it
            record["mlm_loss"] = part["mlm"] / masked
        if self.objective.discriminator is not None:
            self.adv_loss = part["adv"] / units if finite else self.adv_loss
            record |= {"adv_loss": part["adv"] / units, "discriminator_accuracy": part["correct"] / units,
                       "chance": max(per_language) / units, "lambda": strength}
        record |= self.objective.teacher_terms(part, masked, tokens, sequences)
        self.stopping, self.tokens_seen = stop > 0, self.tokens_seen + int(tokens)
        record |= dict(lr=self.config.lr * schedule(self.step, self.config), grad_norm=norms[0], tokens_seen=self.tokens_seen,
                       skipped_steps=self.skipped)
        self.step += 1
        return record

    # ---- the loop

    def on_signal(self, number, frame) -> None:
        """First signal: finish the step, save, stop. Second one: leave at once."""
        # Ctrl-C reaches a process of torchrun twice, from the terminal and from the launcher.
        patience = 3 if "LOCAL_RANK" in os.environ else 0
        if self.stop_asked and time.monotonic() - self.stop_asked > patience:
            os._exit(128 + number)
        self.stop_asked = self.stop_asked or time.monotonic()

    def train(self) -> dict:
        """Train from self.step to the end; returns the last step's measurements."""
        config, world = self.config, self.world
        module = self.objective
        if config.compile:
            # A batch's shapes never change, so that the step can be replayed as it was recorded.
            module = torch.compile(module, fullgraph=True, dynamic=False, mode="reduce-overhead" if config.cuda_graphs else None)
        if world.size > 1:
            # Only through predictions of tokens does every weight get a gradient. (static_graph=True would find the others
            # at no cost, but does not go with no_sync: it takes the first micro-batch for the whole step.)
            module = nn.parallel.DistributedDataParallel(
                module, device_ids=[world.local_rank] if self.device.type == "cuda" else None, gradient_as_bucket_view=True,
                broadcast_buffers=False, find_unused_parameters=not (config.mlm_weight or config.kd_weight))
            if config.reduce_dtype == "bfloat16":
                module.register_comm_hook(world.size, average_in_bfloat16)
        if config.profile and config.steps - self.step < 7:
            world.say("--profile: it looks at the fifth to the seventh step from here, there are fewer; nothing will be written")
        if 0 < self.step < config.steps and self.step % config.eval_every == 0:  # resumed: see Log.rewind
            self.log(dict(step=self.step, validation=evaluate(self)))
        self.objective.train()
        record, clock, since = {}, time.perf_counter(), self.tokens_seen
        with profiler(self.out, self.device) if config.profile and world.rank == 0 else nullcontext() as profile:
            for batches in Prefetcher(self.micro_batches, range(self.step, config.steps)):
                record = self.train_step(batches, module)
                last = self.step == config.steps
                if profile is not None:
                    profile.step()
                if self.step % config.log_every == 0 or self.step == 1 or last:
                    now = time.perf_counter()
                    record |= dict(tokens_per_second=(self.tokens_seen - since) / (now - clock), peak_memory_gib=peak_memory(self.device))
                    if self.peak:
                        record["mfu"] = record["tokens_per_second"] * self.flops / self.peak / world.size
                    self.log(record)
                    clock, since = now, self.tokens_seen
                if self.skipped_in_a_row == 10:
                    before = self.out / "before-nan"
                    if world.rank == 0:
                        save_model(self.model, before, self.corpus.tokenizer_path)
                    raise UserError(f"the loss was not finite for 10 steps in a row, up to step {self.step}; the weights from before "
                                    f"them are in {before}. Start a new run with --init {before} and a lower --lr or --adv-weight")
                if self.step % config.save_every == 0 or last or self.stopping:
                    self.save()
                if self.stopping and not last:
                    self.stop()
                if self.step % config.eval_every == 0 and not last:
                    paused = time.perf_counter()
                    self.log(dict(step=self.step, validation=evaluate(self)))
                    clock += time.perf_counter() - paused
        if config.compile:
            world.say(f"torch.compile: {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs in all; more than one a "
                      f"form of the step would mean that something recompiled")
        self.checkpoints.wait()
        return record

    # ---- saving

    def stop(self) -> None:
        self.checkpoints.wait()
        if self.checkpoints.failed:  # only rank 0 saves
            click.echo(f"Error: stopped after step {self.step}, which could not be saved. When that is mended, --resume goes on "
                       f"from the checkpoint before it", err=True)
            raise SystemExit(1)
        self.world.say(f"stopped after step {self.step}; go on with: python train.py --out {self.top} --resume")
        if self.world.rank == 0:
            tell_stopped()
        raise SystemExit(0)

    def save(self) -> None:
        if self.world.rank == 0:
            self.checkpoints.save(self.step, dict(
                objective=self.objective.state_dict(), optimizers=[o.state_dict() for o in self.optimizers],
                step=self.step, tokens_seen=self.tokens_seen, skipped=self.skipped, adv_loss=self.adv_loss))
            if self.objective.remembered is not None:                # of several processes the first one's
                try:
                    self.objective.remembered.write()
                except OSError as error:                             # a cache is not worth the run
                    click.echo(f"--teacher-cache-file: {error.strerror}; training goes on without writing it", err=True)

    def resume(self, finished: bool = False) -> None:
        """Take up the newest whole checkpoint, if there is one. Every rank reads it itself. A finished run needs none."""
        found = None if finished else self.checkpoints.load_newest()
        self.step = self.config.steps if finished else 0
        if found is not None:
            path, state = self.checkpoints.path(found[0]), found[1]
            try:
                self.objective.load_state_dict(state["objective"])
                for optimizer, saved in zip(self.optimizers, state["optimizers"]):
                    optimizer.load_state_dict(saved)
                self.step, self.tokens_seen, self.skipped = state["step"], state["tokens_seen"], state["skipped"]
                self.adv_loss = state["adv_loss"]
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                why = f"it lacks {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[-1].strip()
                raise UserError(f"{path} is not of this run ({why}): an earlier version of train.py made it, or other options. "
                                f"Start a new run with another --out") from None
            if self.step > self.config.steps:
                raise UserError(f"{path} is beyond the {self.config.steps} steps that were asked for; go on with --extend and "
                                f"--steps above {self.step}, or start a new run with another --out")
            self.world.say(f"resumed {self.out} at step {self.step}")
        elif not finished and (self.out / "metrics.jsonl").exists():
            self.world.say(f"{self.out} has no checkpoint yet: it starts again at step 0")
        every = self.world.sum(torch.tensor(self.step, dtype=torch.float64, device=self.device))
        if every != self.world.size * self.step:
            raise UserError(f"process {self.world.rank} found the checkpoint of step {self.step} in {self.out}, others found another; "
                            f"all machines must see one folder. Start again with --resume when they do")
        if self.world.rank == 0 and not finished:  # killed before its first checkpoint, a run may have logged steps all the same
            self.log.rewind(self.step)


# ------------------------------------------------------------------------------------------------- command line

def train_stage(config: TrainConfig, corpus: Corpus, out: pathlib.Path, world: World, title: str,
                teacher: UniBERT | None = None, reread: Reread | None = None, top: pathlib.Path | None = None) -> UniBERT:
    """Train, or go on training, one model in `out`; returns it, evaluated and saved in out/final."""
    out.mkdir(parents=True, exist_ok=True)
    run = Run(config, corpus, out, world, teacher, reread, top)
    finished = out / "finished"  # written last; of an extended run it says that the shorter one was
    done = finished.is_file() and finished.read_text() == str(config.steps)
    if not done:
        run.study_teacher()
    run.resume(done)
    if done:
        world.say(f"{title}: finished before, in {out / 'final'}")
        return load_model(out / "final")
    if world.rank == 0:
        write_atomically(out / "config.json", [json.dumps(dataclasses.asdict(config), indent=1).encode()])
    encoder = sum(p.numel() for p in run.model.parameters()) - run.model.embedding.weight.numel()
    origin = config.init or (f"layers {config.init_from_teacher} of the teacher" if config.init_from_teacher else config.preset)
    world.say(f"{title}: {origin}, {encoder / 1e6:.2f} M parameters + {run.model.embedding.weight.numel() / 1e6:.2f} M "
              f"embeddings, {len(corpus.languages)} languages, {config.steps} steps of {run.rows * run.batch_config.row_tokens:,} "
              f"tokens, {config.dtype} on {world.size} x {config.device}")
    size, room = run.micro_batch_rows()
    if 2 * size < room:
        row = run.batch_config.row_tokens
        world.say(f"--tokens-per-batch: {run.rows // world.size} rows a process divide into micro-batches of {size} alone, where {room} "
                  f"would fit; {max(1, run.rows // (room * world.size)) * room * world.size * row:,} tokens would be faster")
    before = evaluate(run) if run.objective.predictions_of_teacher and run.step == 0 else None
    handlers = {number: signal.signal(number, run.on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    start, known = time.perf_counter(), run.tokens_seen
    last = run.train()
    speed = (run.tokens_seen - known) / (time.perf_counter() - start)
    for number, handler in handlers.items():  # all is saved: what follows may be stopped at once, and is done again by --resume
        signal.signal(number, handler or signal.SIG_DFL)
    if world.sum(torch.tensor(run.stop_asked, device=run.device)) > 0:  # in the last step, when no other looked for it
        run.stop()
    scores = evaluate(run) | ({"before": before} if before else {})
    run.log(dict(step=run.step, validation=scores))
    if world.rank == 0:
        baseline = unigram_loss(run)
        world.say("\n" + final_table(run, scores, baseline, last, speed) + "\n")
        save_model(run.model, out / "final", corpus.tokenizer_path)
        write_atomically(finished, [str(run.step).encode()])
    return run.model.eval()


def atlas_corpus(folder: pathlib.Path) -> None:
    """Write the embedded corpus and prepare it, unless `folder` already holds it."""
    if (folder / "manifest.json").is_file():
        return
    import atlas
    atlas.write(folder.parent / "atlas", codes=ATLAS_LANGUAGES)
    prepare(folder.parent / "atlas" / "text", folder, vocab_size=ATLAS_VOCABULARY, validation_share=0.04)


def train_all(settings: dict, out: pathlib.Path) -> None:
    """Both stages in this process, which is one of all that torchrun started, or the only one."""
    cuda = torch.cuda.is_available() if settings["device"] == "auto" else settings["device"] == "cuda"
    if cuda and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA device; use --device cpu")
    if settings["dtype"] == "auto":
        settings["dtype"] = str(default_dtype("cuda" if cuda else "cpu")).removeprefix("torch.")
    config = TrainConfig(**{f.name: settings[f.name] for f in dataclasses.fields(TrainConfig)} |
                         {"device": "cuda" if cuda else "cpu"})
    if config.cuda_graphs and not (cuda and config.compile):
        raise UserError("--cuda-graphs needs a CUDA device and --compile")
    if not cuda:
        keep_freed_memory()
    world = World.join(config.device)
    if cuda:
        torch.cuda.set_device(world.local_rank)
        torch.set_float32_matmul_precision("high")
    world.barrier()  # all have looked whether the folder is free (settle): now rank 0 may write there
    with claimed(out, settings) if world.rank == 0 else nullcontext():
        train_stages(config, settings, out, world)


def train_stages(config: TrainConfig, settings: dict, out: pathlib.Path, world: World) -> None:
    """The corpus, the teacher where one is wanted, the model, and what it has learnt."""
    data = pathlib.Path(settings["data"]) if settings["data"] else out / "data"
    if world.rank == 0 and not settings["data"]:
        atlas_corpus(data)
    world.barrier()
    try:
        corpus = Corpus(data)
    except (ValueError, OSError) as error:
        raise UserError(f"{error}") from None
    same_data(settings, out, data, manifest_digest(corpus.manifest))
    if world.rank == 0:
        write_settings(out, settings)
    for line in not_as_asked(config):
        world.say(line)
    teacher = reread = None
    if settings["teacher"] and (config.distils or config.init_from_teacher):
        teacher, reread = load_teacher(settings["teacher"], corpus, config)
    elif settings["teacher"]:
        world.say("--teacher is not used: every distillation weight is 0")
    elif config.distils and config.teacher_steps:
        first = dataclasses.replace(config, preset=config.teacher_preset, steps=config.teacher_steps, mlm_weight=1.0,
                                    adv_weight=0.0, init="", init_from_teacher="", **WITHOUT_TEACHER)
        teacher = train_stage(first, corpus, out / "teacher", world, "teacher", top=out)
    elif config.distils:
        world.say("no --teacher and no --teacher-steps: training without distillation")
    if config.init_from_teacher and teacher is None:
        raise UserError("--init-from-teacher needs --teacher, or --teacher-steps and a distillation weight above 0")
    if not config.mlm_weight and teacher is None:
        raise UserError("nothing to learn from: --mlm-weight is 0 and there is no teacher to distil from")
    model = train_stage(config, corpus, out, world, "student" if teacher else "model", teacher, reread)
    if world.rank == 0 and not settings["data"] and config.max_length >= ATLAS_RECIPE["max_length"]:  # its questions must fit
        from atlas.showcase import showcase
        for line in showcase(model.cpu(), load_tokenizer(corpus.tokenizer_path), Corpus(data, "validation")):
            world.say(line)
    world.say(f"try: python unibert.py fill-mask --model {out / 'final'} \"... [MASK] ...\"")


def paper_plan(options: dict, gpus: int, gpu: str, tokens: float | None, vocab_size: int, mfu: float) -> str:
    """What --plan prints: the cost of the run that `options` describe (plan.py)."""
    try:
        config = TrainConfig(**{f.name: options[f.name] for f in dataclasses.fields(TrainConfig)})
        shape = dict(block=config.block, vocab_size=vocab_size, max_length=config.max_length)
        return plan(UniBERTConfig.preset(config.preset, **shape),
                    UniBERTConfig.preset(config.teacher_preset, **shape) if config.distils else None,
                    gpus=gpus, gpu=gpu, tokens=config.steps * config.tokens_per_batch if tokens is None else tokens,
                    tokens_per_batch=config.tokens_per_batch, micro_batch_tokens=config.micro_batch_tokens,
                    mask_rate=config.mask_rate, mfu=mfu, discriminator=config.adv_weight > 0)
    except ValueError as error:
        raise UserError(str(error)) from None


@click.command(context_settings=dict(help_option_names=["-h", "--help"], show_default=True, max_content_width=110))
@click.option("--data", type=click.Path(file_okay=False), help="A folder made by data.py prepare. [default: the atlas]")
@click.option("--out", type=click.Path(file_okay=False), help="The run folder. [default: runs/atlas, -2, ...]")
@click.option("--teacher", type=click.Path(file_okay=False), help="A model folder to distil from.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out from its newest whole checkpoint.")
@click.option("--extend", is_flag=True, help="With --resume: allow more --steps than the run was started with.")
@click.option("--ablate", is_flag=True, help="On the atlas: MLM, + adversary, + distillation and all of it, compared on "
              "four tasks (eval/ablate.py).")
@click.option("--plan", "on_paper", is_flag=True, help="Only say what the run would cost on --gpus of kind --gpu.")
@click.option("--gpus", default=8, type=click.IntRange(1), help="For --plan.")
@click.option("--gpu", default="H200", type=click.Choice(list(PEAK_FLOPS)), help="For --plan.")
@click.option("--tokens", type=float, help="For --plan: tokens to train on. [default: steps x tokens-per-batch]")
@click.option("--vocab-size", default=64000, type=click.IntRange(6), help="For --plan.")
@click.option("--mfu", default=0.4, type=click.FloatRange(0.01, 1), help="For --plan: share of the GPU's peak that is reached.")
@click.option("--nproc", type=click.IntRange(1), help="Processes on this machine. [default: one a visible GPU]")
@click.pass_context
def main(ctx, out, resume, extend, nproc, ablate, on_paper, gpus, gpu, tokens, vocab_size, mfu, **options):
    """Train a UniBERT. Without options: the embedded atlas, first a teacher, then the student, in a few minutes.

    The defaults below are those for --data; the atlas has a small recipe of its own (ATLAS_RECIPE in options.py).
    """
    if on_paper:
        if options["data"]:
            raise UserError("--plan reads no --data; give --vocab-size, which `data.py inspect` tells")
        return click.echo(paper_plan(options, gpus, gpu, tokens, vocab_size, mfu))
    if options["tensorboard"]:
        summary_writer()                                             # known now, not after the corpus is made
    given = {n for n in options if ctx.get_parameter_source(n) == click.core.ParameterSource.COMMANDLINE}
    if ablate:
        from eval.ablate import ablate as ladder
        try:
            return click.echo(ladder({n: options[n] for n in given}, out or "runs/ablation", say=click.echo))
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from None
    if out is None:
        if resume:
            raise UserError("--resume needs --out, the folder of the run to go on with")
        out, number = pathlib.Path("runs/atlas"), 1
        while (out / "run.json").exists():
            number += 1
            out = pathlib.Path(f"runs/atlas-{number}")
    settings = settle(options, given, pathlib.Path(out), resume, extend)
    asked = [f"--{name.replace('_', '-')}" for name in DISTILLATION if name in given and options[name]]
    if asked and not settings["teacher"] and not settings["teacher_steps"]:
        raise UserError(f"{asked[0]} needs a teacher: give --teacher DIR, or --teacher-steps N to train one first")
    if nproc is None:
        nproc = max(1, torch.cuda.device_count() if settings["device"] != "cpu" else 1)
        if not settings["data"]:  # the atlas makes few rows: as many processes as can share them evenly
            rows, _ = rows_of(settings["tokens_per_batch"], settings["max_length"])
            nproc = max(n for n in range(1, nproc + 1) if rows % n == 0)
    if nproc > 1 and "LOCAL_RANK" not in os.environ:
        arguments = sys.argv[1:] + ([] if ctx.get_parameter_source("out") == click.core.ParameterSource.COMMANDLINE
                                    else ["--out", str(out)])
        sys.exit(launch(__file__, nproc, arguments))
    try:
        train_all(settings, pathlib.Path(out))
    except (ValueError, click.ClickException, RuntimeError, OSError) as error:
        end_of_rank(error)
    finally:
        leave_group()


for field in dataclasses.fields(TrainConfig):  # each field is an option of the command
    name, choices = "--" + field.name.replace("_", "-"), field.metadata["choices"]
    kind = dict(is_flag=True) if isinstance(field.default, bool) else dict(type=click.Choice(choices) if choices else type(field.default))
    main = click.option(name, default=field.default, help=field.metadata["help"], **kind)(main)

if __name__ == "__main__":
    main()
