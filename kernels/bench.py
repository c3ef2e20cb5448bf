"""Every kernel and the whole training step against their peers, in one table.

    python -m kernels.bench --quick                           # small shapes; on a CPU about 165 s of CPU time
    python -m kernels.bench --only losses --out losses.md     # attention, losses or step
    python -m kernels.bench --compile-only --arch sm_90       # no GPU needed: registers, spills, shared memory
    python -m kernels.bench --tune                            # on a GPU: better launch configurations, to paste
                                                              # (with --only attention or --only losses: a half)

How to read a table. A row is one implementation of one task, forward and backward (or a whole optimiser step).

  ms         median [20th and 80th percentile]. All rows of a table take turns in one loop, so that drift of the
             machine hits all. No row is timed before its result was compared with float64.
  TFLOP/s    useful work over time: padding and recomputation do not count, whoever does them.
  % peak     of a large plain matmul in the row's dtype, measured in this run; the title says how much that is.
  GB/s       the least traffic (inputs read once, results written once) over time. Far below what the memory can
             do, unless the task is bound by it.
  tokens/s   of a step, in its place: real tokens; padding does not count.
  extra MiB  the most memory held at any moment beyond the inputs, less the size of the results.
             GPU: the caching allocator's peak. CPU: the running sum of torch.profiler's memory events, which are
             all allocations of PyTorch's allocator; scratch space inside oneDNN and MKL is not seen.
  peak MiB   of a step, in its place: all that is held, with weights, gradients, AdamW's state and the batch.
  error      |x - truth| / |truth| in the Frobenius norm, truth in float64 from the same rounded inputs: first of
             the output (the loss of each row; the mean loss where a peer gives no more), then of the worst gradient.
             In bfloat16 all have some. Ours is WRONG, and the exit code 1, beyond three times the error of the
             yardstick in the same dtype, the row marked *.
  ours is    how many times as fast as this row ours is; in our own row, as the fastest peer.

On a CPU all rows run with glibc told to keep freed memory (launch.keep_freed_memory), as train.py does: without it
every one of them pays page faults for its large tensors. The bf16 steps are also timed before that, as a script of
its own would run a peer; the ratios to that are printed below the table.
On a GPU the L2 cache is overwritten before every run and CUDA events give the time, of kernels without the launches,
of a whole step with them; on a CPU nothing is flushed.
Peers that are not installed or need a GPU are named once and left out; a peer that fails is named with its message.
"""
from __future__ import annotations

import datetime
import importlib
import math
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")       # torch's profiler announces itself otherwise

import torch

from kernels import support
from kernels.configurations import SHARED_KIB, compile_all, tune
from kernels.peers import (Candidate, Problem, attention_problem, cross_entropy_problem, difference,
                           distillation_problem, draw_lengths, installed, missing_peers, size_of, step_problems)
from files import write_atomically
from launch import keep_freed_memory

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


# ------------------------------------------------------------------------------------------------- what is measured

@dataclass
class Row:
    candidate: Candidate
    errors: list[float]
    memory: float
    times: list[float]                                # milliseconds
    wrong: bool = False

    @property
    def ms(self) -> float:
        return float(np.median(self.times))


class Report:
    """Prints at once and keeps the lines for --out."""

    def __init__(self):
        self.lines, self.wrong = [], False

    def __call__(self, text: str = "") -> None:
        click.echo(text)
        self.lines += text.split("\n")

    def save(self, path: str) -> None:
        write_atomically(path, ["\n".join(self.lines + [""]).encode()])


class Clock:
    """Time and memory of one run on a device. launches: also the time in which a GPU waits for Python to launch the next
    kernel, which a whole step really takes; of a kernel it would be measured instead of the kernel."""

    def __init__(self, device: torch.device, launches: bool = False):
        self.device, self.launches = device, launches
        if device.type == "cuda":
            self.flush = torch.empty(4 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8,
                                     device=device)

    def __call__(self, run: Callable) -> float:
        """-> milliseconds."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - start)
        self.flush.zero_()
        if not self.launches:
            torch.cuda._sleep(2_000_000)              # cycles, about 1 ms: until Python has launched the run, or most of it
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def memory(self, run: Callable) -> tuple[tuple, int]:
        """-> what `run` returns, and the most bytes it held at any moment beyond those held before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            result = run()
            torch.cuda.synchronize()
            return result, torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            result = run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        return result, max(0, int(np.cumsum(sizes).max(initial=0)))


def measure(problem: Problem, clock: Clock, report: Report, seconds: float) -> list[Row]:
    """Check everyone, time those who are right, print the table. -> rows, in the order of the candidates."""
    rows, failures, estimates = [], [], []
    for c in problem.candidates:
        try:
            estimate = clock(c.run) if c.warm_up else math.inf
            start = time.perf_counter()
            result, memory = clock.memory(c.run)
            estimate = min(estimate, 1e3 * (time.perf_counter() - start))
            memory += c.resident() if c.resident else -size_of(result)
            errors = difference(c.unpack(c.check() if c.check else result), problem.truth) if c.comparable else []
        except Exception as error:                    # a peer that fails must not end the comparison
            if c.ours:
                raise
            failures.append(f"{c.name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:150]}")
            continue
        rows.append(Row(c, errors, memory, []))
        estimates.append(estimate)
    yardstick = next((row.errors for row in rows if row.candidate.yardstick), None)
    if yardstick is None and problem.in_parts:        # all logits of 16,384 x 250,037, twice, are too much for 80 GB
        yardstick = difference(problem.in_parts(), problem.truth)
        failures.append("the yardstick as a whole: ours is judged by its errors at 1,024 rows at a time")
    bound = yardstick and [3 * e for e in yardstick]
    for row in rows:
        if row.candidate.ours:
            row.wrong = not all(map(math.isfinite, row.errors)) or \
                bound is not None and any(e > b for e, b in zip(row.errors, bound))
            report.wrong |= row.wrong
    race([(row, e) for row, e in zip(rows, estimates) if not row.wrong], clock, seconds)
    print_table(problem, rows, clock, report)
    for failure in failures:
        report(f"failed: {failure}")
    if bound is None:
        report("no yardstick ran here: errors are shown, not judged")
    report()
    return rows


def race(rows: list[tuple[Row, float]], clock: Clock, seconds: float) -> None:
    """Take turns for about `seconds`, at least three rounds, several runs a turn for quick rows. Who took three times
    as long in the run before has had its run."""
    for row, estimate in rows:
        if estimate > 3e3 * seconds:
            row.times.append(estimate)
    rows = [(row, estimate) for row, estimate in rows if not row.times]
    slowest = max((estimate for _, estimate in rows), default=0)
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < 3 or (time.perf_counter() < end and rounds < 100):
        for row, estimate in rows:
            for _ in range(max(1, min(8, int(slowest / estimate)))):
                row.times.append(clock(row.candidate.run))
        rounds += 1


_peaks: dict = {}


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of a large square matmul, the ceiling for `% peak`: the best seen so far, as the machine may be shared."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    clock = Clock(device)
    now = 2 * n ** 3 / min(clock(lambda: a @ b) for _ in range(10)) * 1e3
    _peaks[dtype] = max(now, _peaks.get(dtype, 0.0))
    return _peaks[dtype]


def print_table(problem: Problem, rows: list[Row], clock: Clock, report: Report) -> None:
    peak = matmul_peak(problem.dtype, clock.device)
    ours = next(row for row in rows if row.candidate.ours)
    peers = [row.ms for row in rows if row.times and not row.candidate.ours]
    report(f"### {problem.title}, {NAMES[problem.dtype]} (peak {peak / 1e12:.3g} TFLOP/s)\n")
    memory = "peak MiB" if ours.candidate.resident else "extra MiB"
    report(f"| {'':38} | {'ms [p20 p80]':>25} | TFLOP/s | % peak | {'tokens/s' if problem.tokens else 'GB/s':>8} | "
           f"{memory:>9} | {'error':>15} | ours is |")
    report(f"|{'-' * 40}|{'-' * 26}:|{'-' * 8}:|{'-' * 7}:|{'-' * 9}:|{'-' * 10}:|{'-' * 16}:|{'-' * 8}:|")
    for row in rows:
        name = ("**ours**" + row.candidate.name.removeprefix("ours") if row.candidate.ours else
                row.candidate.name + " *" * row.candidate.yardstick)
        error = f"{row.errors[0]:.1e} {max(row.errors[1:]):.1e}" if row.errors else "not the same"
        if row.wrong:
            report(f"| {name:38} | {'WRONG':>25} | {'':7} | {'':6} | {'':8} | {'':>9} | {error:>15} | {'':7} |")
            continue
        low, high = np.percentile(row.times, [20, 80])
        span = f"{row.ms:.2f} [{low:.2f} {high:.2f}]" if len(row.times) > 1 else f"{row.ms:.0f} (one run)"
        rate = problem.flops / row.ms * 1e3
        moved = problem.tokens / row.ms * 1e3 if problem.tokens else problem.bytes / row.ms / 1e6
        ratio = (min(peers, default=math.nan) if row is ours else row.ms) / ours.ms if ours.times else math.nan
        report(f"| {name:38} | {span:>25} | {rate / 1e12:7.3g} | {100 * rate / peak:6.1f} | "
               f"{moved:8.{0 if moved >= 10 else 2}f} | {row.memory / 2 ** 20:9.0f} | {error:>15} | {ratio:6.2f}x |")


def compare_steps(tables: list[tuple[Problem, list[Row]]], untouched: list, report: Report) -> None:
    """Every dtype of ours against every dtype of the peer: tokens/s and peak memory. untouched: see time_untouched."""
    rows = [(NAMES[problem.dtype], row) for problem, rows in tables for row in rows if row.times]
    for ours_dtype, ours in rows:
        for dtype, row in rows:
            if ours.candidate.ours and not row.candidate.ours:
                report(f"- {ours.candidate.name} {ours_dtype} against {row.candidate.name} {dtype}: "
                       f"{row.ms / ours.ms:.1f}x the tokens/s, {ours.memory / row.memory:.2f} of the peak memory")
        if ours.candidate.ours:
            own = next((ms for c, ms in untouched if c is ours.candidate), None)
            for c, ms in untouched:
                if not c.ours:
                    report(f"- {ours.candidate.name} {ours_dtype} against {c.name} bf16, with glibc as it comes ({ms:.0f} ms): "
                           f"{ms / ours.ms:.1f}x the tokens/s" + (f"; both so ({own:.0f} ms): {ms / own:.1f}x" if own else ""))
    report()


def time_untouched(problems: list[Problem], clock: Clock) -> list[tuple[Candidate, float]]:
    """Each bf16 step, ours and theirs, with its ms while glibc still returns freed memory: median of three after one
    warm-up. (Not in fp32, whose peer takes seconds a step.)"""
    return [(c, float(np.median([clock(c.run) for _ in range(4)][1:])))
            for p in problems for c in p.candidates if p.dtype == torch.bfloat16]


def dearest_operators(candidate: Candidate, dtype: str, device: torch.device, report: Report, count=10) -> None:
    """Where one of our steps spends its time."""
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=kinds) as profile:
        candidate.run()
    name = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, name))
    total = sum(getattr(e, name) for e in events)
    report(f"Dearest operators of a step of {candidate.name} {dtype} ({total / 1e3:.0f} ms under the profiler):\n")
    for e in events[:count]:
        spent = getattr(e, name)
        report(f"- {100 * spent / total:5.1f}%  {spent / 1e3:8.2f} ms  {e.count:5} x  {e.key[:80]}")
    report()


# --------------------------------------------------------------------------------------------------------- the whole

def header(device: torch.device) -> str:
    version = {name: getattr(importlib.import_module(name), "__version__", "?")
               for name in ("torch", "triton", "transformers") if installed(name)}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        machine = (f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2 ** 30:.0f} GiB, "
                   f"{card.multi_processor_count} multiprocessors, L2 {card.L2_cache_size / 1e6:.0f} MB, "
                   f"CUDA {torch.version.cuda}")
    else:
        info = pathlib.Path("/proc/cpuinfo")
        found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
        machine = f"{found[1] if found else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return (f"{datetime.datetime.now():%Y-%m-%d %H:%M}, {machine}; {torch.get_num_threads()} threads, load average "
            f"{os.getloadavg()[0]:.1f}; Python {platform.python_version()}, "
            + ", ".join(f"{k} {v}" for k, v in version.items()))


def run_all(parts: list[str], quick: bool, device: torch.device, report: Report) -> None:
    """The shapes: small for --quick, those of the goals in the design otherwise."""
    clock, gpu = Clock(device), device.type == "cuda"
    problems, untouched = None, []
    if "step" in parts:
        sizes = [(4, 256, 8, draw_lengths(32, 16, 128))]
        if gpu:
            sizes = [(6, 384, 12, draw_lengths(128, 16, 512)), (12, 768, 12, draw_lengths(128, 16, 512))]
        sizes = sizes[:1] if quick else sizes
    report(header(device) + "\n")
    for line in missing_peers(device):
        report(line)
    report()
    if not gpu:
        if "step" in parts:
            problems = step_problems(*sizes[0][:3], 64_000, sizes[0][3], device, compiled=not quick)
            untouched = time_untouched(problems, clock)
        keep_freed_memory()  # as train.py does; from here on for every row, ours and theirs
    dtypes = (torch.bfloat16, torch.float32)
    seconds = 1.6 if quick else 6.0
    if "attention" in parts:
        shapes = [(draw_lengths(32, 16, 128), 8, 32)]
        if gpu:
            shapes = [(draw_lengths(256, 16, 512), 12, 32), (draw_lengths(256, 16, 512), 12, 64),
                      (draw_lengths(1024, 16, 128), 12, 32), (draw_lengths(32, 1024, 8192), 12, 64)]
        elif not quick:
            shapes.append((draw_lengths(64, 16, 512), 12, 32))
        for lengths, heads, head_dim in shapes[:1] if quick else shapes:
            for dtype in dtypes:
                measure(attention_problem(lengths, heads, head_dim, dtype, device), clock, report, seconds)
    if "losses" in parts:
        shapes = [(330, 64_000, 256, 384)] + [(2000, 120_000, 384, 768)] * (not quick)
        if gpu:
            shapes = [(8192, 64_000, 384, 768), (8192, 250_037, 384, 768), (16_384, 120_000, 256, 768),
                      (16_384, 250_037, 768, 1024)]
        for n, v, d, e in shapes[:1] if quick else shapes:
            for dtype in dtypes if not gpu else dtypes[:1]:
                measure(cross_entropy_problem(n, v, d, dtype, device, quick), clock, report, seconds)
                measure(distillation_problem(n, v, d, e, dtype, device, quick), clock, report, seconds)
    if "step" in parts:
        for layers, hidden, heads, lengths in sizes:
            problems = problems or step_problems(layers, hidden, heads, 64_000, lengths, device, compiled=True)
            tables = [(p, measure(p, Clock(device, launches=True), report, 6 * seconds)) for p in problems]
            compare_steps(tables, untouched, report)
            for problem in problems:
                dearest_operators(next(c for c in problem.candidates if c.ours), NAMES[problem.dtype], device, report)
            problems = tables = None                   # frees the models before the next size
    report(f"load average at the end {os.getloadavg()[0]:.1f}")
    if report.wrong:
        report("WRONG: a kernel of ours is outside its bound, see above")


# ----------------------------------------------------------------------------------------------------- command line

@click.command(context_settings=dict(help_option_names=["-h", "--help"], show_default=True))
@click.option("--quick", is_flag=True, help="Small shapes only.")
@click.option("--only", type=click.Choice(["attention", "losses", "step"]), help="This part alone.")
@click.option("--compile-only", is_flag=True, help="Compile every pinned configuration; needs no GPU.")
@click.option("--arch", default="sm_80,sm_86,sm_90,sm_100", help="With --compile-only: the architectures.")
@click.option("--tune", "tuning", is_flag=True, help="Time other launch configurations and print the table (GPU).")
@click.option("--out", type=click.Path(dir_okay=False), help="Also write what is printed to this file.")
def main(quick, only, compile_only, arch, tuning, out):
    """Compare the kernels and the training step with their peers."""
    if out and not os.access(pathlib.Path(out).absolute().parent, os.W_OK):
        raise click.UsageError(f"--out {out}: {pathlib.Path(out).parent} is not a folder that can be written to")
    if compile_only and (tuning or quick or only):
        raise click.UsageError("--compile-only goes with --arch and --out alone: it compiles everything, and times nothing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report, parts = Report(), [only] if only else ["attention", "losses", "step"]
    if compile_only:
        archs = [int(a.removeprefix("sm_")) if a.removeprefix("sm_").isdigit() else 0 for a in arch.split(",")]
        if not set(archs) <= SHARED_KIB.keys():
            raise click.UsageError(f"--arch {arch}: known are {', '.join(f'sm_{a}' for a in SHARED_KIB)}")
        if support.triton is None:
            raise click.UsageError("--compile-only needs the triton package, which is not installed")
        if support.INTERPRETED:
            raise click.UsageError("--compile-only compiles, but TRITON_INTERPRET is set; unset it")
        report.wrong = compile_all(archs, report)
    elif tuning:
        if device.type != "cuda":
            raise click.UsageError("--tune times kernels and needs a CUDA GPU")
        report(header(device) + "\n")
        tune(device, Clock(device), report, parts)
    else:
        run_all(parts, quick, device, report)
    if out:
        report.save(out)
    sys.exit(1 if report.wrong else 0)


if __name__ == "__main__":
    main()
