"""Checkpoints that survive anything: kill -9 at any moment, a full disk, flipped bytes.

A checkpoint is a folder `step-00001000/` with `state.pt` (tensors and plain numbers, read with weights_only=True)
and `manifest.json` (step, size and sha256 of state.pt). It is written under a hidden name, forced to the disk,
and only then renamed; so a folder with its final name is whole unless the disk itself failed, and the checksum
finds that. `latest` names the newest one, for people and scripts; resuming does not trust it but looks itself.
"""
from __future__ import annotations

import copy
import json
import os
import pathlib
import pickle
import shutil
import threading

import torch

from files import sha256_of, sync_folder, write_atomically
from launch import UserError


def to_cpu(value):
    """A copy on the CPU of nested dicts and lists of tensors, so that training may go on changing the originals."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {k: to_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_cpu(v) for v in value]
    return copy.copy(value)


class Checkpoints:
    """The checkpoints of one run folder. Keeps the newest `keep` and every `keep_every`-th step (0: none)."""

    def __init__(self, folder: os.PathLike | str, keep: int = 2, keep_every: int = 0, warn=print):
        self.folder, self.keep, self.keep_every, self.warn = pathlib.Path(folder), keep, keep_every, warn
        self.thread: threading.Thread | None = None
        self.failed = False  # the last one could not be written

    def steps(self) -> list[int]:
        names = os.listdir(self.folder) if self.folder.is_dir() else ()  # glob would take an unreadable folder for an empty one
        return sorted(int(n[5:]) for n in names if n.startswith("step-") and n[5:].isdigit())

    def path(self, step: int) -> pathlib.Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict) -> None:
        """Copy `state` now, write it in the background. Waits for the save before, if that is still going on."""
        self.wait()
        snapshot = to_cpu(state)
        self.thread = threading.Thread(target=self._write, args=(step, snapshot), name="checkpoint")
        self.thread.start()

    def wait(self) -> None:
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def _write(self, step: int, state: dict) -> None:
        hidden = self.folder / f".step-{step:08d}.tmp"
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir(parents=True)
            with open(hidden / "state.pt", "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            manifest = dict(step=step, size=(hidden / "state.pt").stat().st_size, sha256=sha256_of(hidden / "state.pt"))
            write_atomically(hidden / "manifest.json", [json.dumps(manifest).encode()])
            sync_folder(hidden)
            if self.path(step).exists():  # a run resumed from an older one reaches this step again
                shutil.rmtree(self.path(step))
            os.rename(hidden, self.path(step))
            sync_folder(self.folder)
            write_atomically(self.folder / "latest", [self.path(step).name.encode()])
            self._prune(step)
            self.failed = False
        except Exception as error:  # a full disk, mostly; whatever it is, this thread must not end as if all were well
            self.warn(f"warning: the checkpoint of step {step} could not be written ({error}); training goes on, "
                      f"the checkpoints before it are intact")
            shutil.rmtree(hidden, ignore_errors=True)
            self.failed = True

    def _prune(self, newest: int) -> None:
        """Later ones than `newest`, just written, are of before a resumption that passed over them: they do not count."""
        for step in [s for s in self.steps() if s <= newest][:-self.keep]:
            if not self.keep_every or step % self.keep_every:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def load_newest(self) -> tuple[int, dict] | None:
        """(step, state) of the newest whole checkpoint, or None where there is none. Says which it had to pass over, and why.

        Raises UserError where there are some and all had to be: to start anew would write over what may yet be mended.
        """
        steps = self.steps()
        for step in reversed(steps):
            path = self.path(step)
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                size = (path / "state.pt").stat().st_size
                if manifest["step"] != step:
                    raise ValueError(f"its manifest speaks of step {manifest['step']}")
                if size != manifest["size"]:
                    raise ValueError(f"state.pt has {size} bytes instead of {manifest['size']}")
                if sha256_of(path / "state.pt") != manifest["sha256"]:
                    raise ValueError("the sha256 of state.pt does not match")
                return step, torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            except (OSError, ValueError, KeyError, TypeError, RuntimeError, pickle.UnpicklingError) as error:
                self.warn(f"warning: {path} is passed over: {error}")
        if steps:
            raise UserError(f"none of the {len(steps)} checkpoints in {self.folder} can be read; nothing was changed. Mend what the "
                            f"warnings name, or start a new run with another --out")
        return None
