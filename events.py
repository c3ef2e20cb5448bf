"""What a run says of itself: metrics.jsonl, a line on the terminal, event files for TensorBoard, a profile.

A record is a dict with `step` and either the measurements of that step or, under `validation`, those of held-out text.
"""
from __future__ import annotations

import json
import math
import os
import pathlib
import resource
from contextlib import suppress

import click
import torch

from files import write_atomically
from launch import UserError
from options import TrainConfig


def as_json(value):
    """A measurement for the log: floats to six digits, and null for one that is not finite, which JSON cannot say."""
    if isinstance(value, dict):
        return {name: as_json(part) for name, part in value.items()}
    return (round(value, 6) if math.isfinite(value) else None) if isinstance(value, float) else value


class Log:
    """The log of the run in `folder`, whose steps are of `step_tokens` tokens. One process of a run has it."""

    def __init__(self, folder: pathlib.Path, config: TrainConfig, step_tokens: int):
        self.folder, self.config, self.step_tokens, self.events = folder, config, step_tokens, None
        self.warned = False

    def __call__(self, record: dict) -> None:
        """One object a line into metrics.jsonl, one line for people on the terminal. A full disk does not end the run."""
        if record.get("validation") == {}:  # nothing to keep
            return click.echo(f"step {record['step']:6d}  no held-out text")
        try:
            self.write(record)
        except OSError as error:
            if not self.warned:
                click.echo(f"warning: the log in {self.folder} cannot be written ({error}); training goes on, lines will be missing",
                           err=True)
            self.warned = True
        click.echo(self.line(record))

    def write(self, record: dict) -> None:
        path = self.folder / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "a") as file:
                file.write(json.dumps(as_json(record)) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(path, size)  # half a line would spoil the next one
            raise
        if self.config.tensorboard:
            self.events = self.events or Events(self.folder, record["step"])
            self.events.add(record)

    def line(self, record: dict) -> str:
        if "validation" in record:
            return f"step {record['step']:6d}  validation mlm {record['validation']['mlm_loss']:.3f}"
        line = f"step {record['step']:6d}/{self.config.steps}  loss {record['loss']:.3f}"
        line += "".join(f"  {name.removesuffix('_loss')} {value:.3f}" for name, value in record.items()
                        if name.endswith("_loss") and name != "adv_loss")  # MLM, and what is learnt from a teacher
        if "adv_loss" in record:
            line += (f"  adv {record['adv_loss']:.3f} (names {record['discriminator_accuracy']:.1%} of languages, "
                     f"chance {record['chance']:.1%})")
        line += f"  {record['tokens_per_second']:,.0f} tok/s"
        if "mfu" in record:
            line += f"  mfu {record['mfu']:.1%}"
        line += f"  {record['peak_memory_gib']:.1f} GiB"
        if record["skipped_steps"]:
            line += f"  skipped {record['skipped_steps']}"
        left = (self.config.steps - record["step"]) * self.step_tokens / record["tokens_per_second"]
        hours, minutes, seconds = int(left // 3600), int(left // 60), int(left % 60)
        return line + (f"  {hours}h{minutes % 60:02d}m left" if hours else f"  {minutes}m{seconds:02d}s left")

    def rewind(self, step: int) -> None:
        """Drop what a run that was stopped or killed logged after `step`, the checkpoint to go on from, and a line cut off in the
        middle. So that the validation of that step is neither lost nor made twice, it is dropped, too, and made again."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        kept, again = [], step % self.config.eval_every == 0 or step == self.config.steps
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
                if record["step"] < step or record["step"] == step and not (again and "validation" in record):
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                pass
        write_atomically(path, [line.encode() for line in kept])


# ------------------------------------------------------------------------------------------------- TensorBoard

class Events:
    """One event file in `folder`. Of earlier ones there, what they say of `first_step` and later is hidden: it is from
    before a crash, and those steps are done again.

    Raises UserError where tensorboard is not installed.
    """

    def __init__(self, folder: os.PathLike | str, first_step: int):
        self.writer = summary_writer()(str(folder), purge_step=first_step)

    def add(self, record: dict) -> None:
        """A dict in the record becomes a group, as in validation/languages/ro."""
        for name, value in scalars(record):
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()


def summary_writer():
    """The class of torch that writes event files."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: tensorboard is not installed. Install it (pip install tensorboard), or leave the "
                        "option out: metrics.jsonl in the run folder has the same numbers") from None
    return SummaryWriter


def scalars(record: dict, group: str = ""):
    """Yields (name, number) of a nested record."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{group}{name}/")
        elif isinstance(value, (int, float)):
            yield group + name, value


# -------------------------------------------------------------------------------------------- memory and time

def peak_memory(device: torch.device) -> float:
    """GiB that torch held at most on the GPU, or this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def profiler(folder: pathlib.Path, device: torch.device) -> torch.profiler.profile:
    """A context that profiles the fifth to the seventh step, then writes a Chrome trace and prints a table."""
    def ready(profile):
        profile.export_chrome_trace(str(folder / "trace.json"))
        by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        click.echo(profile.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=60))
        click.echo(f"trace of three steps: {folder / 'trace.json'}")
    return torch.profiler.profile(schedule=torch.profiler.schedule(wait=3, warmup=1, active=3, repeat=1), on_trace_ready=ready)
