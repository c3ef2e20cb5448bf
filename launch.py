"""Processes: who this one is, how to start one a GPU, and how a command ends."""
from __future__ import annotations

import ctypes
import logging
import os
import pathlib
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

import click
import torch
import torch.distributed as dist


class UserError(click.ClickException):
    """Bad input: one line, exit code 2."""
    exit_code = 2


@dataclass
class World:
    """This process among all of them."""
    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def join(cls, device: str) -> World:
        """Connect to the others if torchrun, or `launch`, has started this process."""
        if "LOCAL_RANK" not in os.environ:
            return cls()
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        return cls(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def say(self, text: str = "") -> None:
        if self.rank == 0:
            click.echo(text)


def default_dtype(device: str | torch.device) -> torch.dtype:
    """bfloat16 where `device` multiplies it faster than float32 (a GPU: from sm_80 on), else float32."""
    device = torch.device(device)
    if device.type == "cuda":
        fast = torch.cuda.get_device_properties(device).major >= 8
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if fast else torch.float32


def average_in_bfloat16(world_size, bucket):
    """DDP's hook for gradients that travel in 16 bits: a dist.GradBucket -> a future of its averaged tensor.

    PyTorch's own refuses gloo, so it could not be tested on a CPU. No annotations: DDP takes them as types, not as text.
    """
    small = bucket.buffer().div(world_size).bfloat16()
    return dist.all_reduce(small, async_op=True).get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def keep_freed_memory() -> None:
    """Let glibc keep large freed blocks, as CUDA's caching allocator does.

    By default it returns each tensor of a few MB to the system when it is freed, and a training step on the CPU
    then spends a good part of its time on page faults, to get the same memory zeroed again. Nothing elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # not glibc
    m_mmap_max, m_trim_threshold = -4, -1
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # never


def end_of_rank(error: Exception) -> None:
    """Turn an error of one rank into its exit. Called in an `except` block.

    Bad input fails on all ranks of a machine alike, and the first there says it; another one speaks where it is alone. A lost
    connection means that another rank died, and the launcher says which. What the system refused (OSError) is said in one line,
    exit code 1. Anything else is raised again.
    """
    if isinstance(error, (ValueError, click.ClickException)):
        if os.environ.get("LOCAL_RANK", "0") != "0":
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # by then the launcher has ended this process, unless it is the only one that failed
            click.echo(f"Error: rank {os.environ['RANK']}: {error}", err=True)
            raise SystemExit(2) from None
        raise error if isinstance(error, click.ClickException) else UserError(str(error)) from error
    if isinstance(error, OSError):  # a full disk, most likely: nothing that a traceback would explain better
        raise click.ClickException(str(error)) from error
    if dist.is_initialized() and any(word in str(error) for word in ("gloo", "NCCL", "Connection closed", "TCPStore")):
        raise SystemExit(3) from None
    raise error


def leave_group() -> None:
    """Called in a `finally` block: disconnect, and if all went well end this process here and now.

    Threads of gloo that still hold finished work need the interpreter's lock to free its tensors; if the interpreter
    is being torn down by then, they abort the process (seen here, and in PyTorch's issue 179291). All files are closed.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    error = sys.exception()
    if error is None or isinstance(error, SystemExit) and not error.code:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


STOPPED = "UNIBERT_STOPPED"  # names the file in which rank 0 tells `launch` that it has saved and stopped


def tell_stopped() -> None:
    if STOPPED in os.environ:
        pathlib.Path(os.environ[STOPPED]).write_text("saved")


def launch(program: str, nproc: int, arguments: list[str]) -> int:
    """Run `program` in `nproc` processes of this machine through torch's elastic launcher; returns the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)  # said in one line below
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    # Seconds to finish the step and save after a signal was passed on. Torch's own 30 are few for a large model.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "3600")
    with tempfile.TemporaryDirectory() as folder:  # torch's log folder, which it would leave behind
        config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=nproc, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                              run_id=str(os.getpid()), max_restarts=0, logs_specs=DefaultLogsSpecs(log_dir=folder))
        stopped = pathlib.Path(folder, "stopped")  # how the processes ended, the launcher does not say after a signal
        os.environ[STOPPED] = str(stopped)
        try:
            elastic_launch(config, sys.executable)("-u", os.path.abspath(program), *arguments)
        except SignalException as error:
            if not stopped.exists():
                click.echo(f"Error: stopped by {error.sigval.name}, and nothing was saved after it. Go on with --resume", err=True)
                return 1
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode == 2:
                return 2
            how = f"by {failure.signal_name()}" if failure.exitcode < 0 else f"with exit code {failure.exitcode}"
            click.echo(f"Error: the process of rank {rank} ended {how}; all others were stopped. Go on with --resume", err=True)
            return 1
    return 0
