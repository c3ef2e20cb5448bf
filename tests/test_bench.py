"""The benchmark itself: that it judges before it times, measures memory rightly, and gives every peer the same task."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kernel_common import interpreted, needs_triton
from kernels import bench, configurations
from kernels.configurations import fastest, fault_of
from kernels.peers import (Candidate, Problem, attention_problem, cross_entropy_problem, difference,
                           distillation_problem, draw_lengths, step_problems)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


class Silent(bench.Report):
    def __call__(self, text=""):
        self.lines += text.split("\n")


@pytest.fixture(autouse=True)
def small_ceiling(monkeypatch):
    """The matmul that sets `% peak` would take longer than all the rest here."""
    monkeypatch.setattr(bench, "matmul_peak", lambda dtype, device: 1e12)


def matmul_problem(ours):
    a, b = torch.randn(64, 32), torch.randn(32, 48)
    truth = a.double() @ b.double()
    candidates = [Candidate("ours", lambda: ours(a, b), ours=True),
                  Candidate("matmul", lambda: (a @ b, a @ b), yardstick=True),
                  Candidate("broken", lambda: 1 / 0)]
    return Problem("a product", torch.float32, 2.0 * 64 * 32 * 48, 0.0, (truth, truth), candidates)


def test_a_right_kernel_is_timed_and_a_failing_peer_is_named():
    report = Silent()
    ours, peer = bench.measure(matmul_problem(lambda a, b: (a @ b, a @ b)), bench.Clock(CPU), report, 0.3)
    assert len(ours.times) >= 3 and len(peer.times) >= 3 and not report.wrong
    assert any("failed: broken: ZeroDivisionError" in line for line in report.lines)


@pytest.mark.parametrize("spoil", [lambda x: x * 1.001, lambda x: x * float("nan")])
def test_a_wrong_kernel_is_called_wrong_and_never_timed(spoil):
    report = Silent()
    ours, peer = bench.measure(matmul_problem(lambda a, b: (a @ b, spoil(a @ b))), bench.Clock(CPU), report, 0.3)
    assert report.wrong and ours.times == [] and peer.times
    assert any("**ours**" in line and "WRONG" in line for line in report.lines)


@pytest.mark.parametrize("make", [
    lambda n: cross_entropy_problem(n, 300, 16, torch.bfloat16, CPU, quick=True),
    lambda n: distillation_problem(n, 300, 16, 24, torch.bfloat16, CPU, quick=True)],
    ids=["cross-entropy", "distillation"])
def test_a_yardstick_without_memory_is_computed_in_parts(make, monkeypatch):
    """All logits of the largest shape do not fit a card of 80 GB; ours is judged there all the same, and no more mildly."""
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")
    for spoilt in (False, True):
        problem = make(1100)                          # two parts
        problem.candidates = [c for c in problem.candidates if c.ours or c.yardstick]
        ours, plain = problem.candidates
        parts, whole = (difference(result, problem.truth) for result in (problem.in_parts(), plain.run()))
        assert all(0.5 * b < a < 1.2 * b for a, b in zip(parts, whole, strict=True)), (parts, whole)
        plain.run = fails
        if spoilt:
            run = ours.run
            ours.run = lambda: tuple(1.1 * t for t in run())
        report = Silent()
        bench.measure(problem, bench.Clock(CPU), report, 0.05)
        assert report.wrong == spoilt and any("1,024 rows at a time" in line for line in report.lines)


def test_memory_is_the_peak_and_not_the_sum():
    def run():
        for _ in range(3):
            scratch = torch.ones(1 << 20)             # 4 MiB at a time
        return scratch[:1].clone(),
    _, memory = bench.Clock(CPU).memory(run)
    # Each new block exists before the old one is let go: two at a time.
    assert 8 << 20 <= memory < (8 << 20) + 4096


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [
    lambda dtype: attention_problem(draw_lengths(6, 1, 30), 2, 16, dtype, CPU),
    lambda dtype: cross_entropy_problem(20, 500, 16, dtype, CPU, quick=True),
    lambda dtype: distillation_problem(20, 500, 16, 24, dtype, CPU, quick=True)],
    ids=["attention", "cross-entropy", "distillation"])
def test_every_peer_computes_the_same_thing(make, dtype):
    problem = make(dtype)
    for candidate in problem.candidates:
        if "compile" in candidate.name:               # the same function as eager, and seconds to compile
            continue
        errors = difference(candidate.unpack(candidate.run()), problem.truth)
        assert max(errors) < (1e-5 if dtype == torch.float32 else 0.03), candidate.name


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the peer: pip install transformers")
def test_the_step_of_the_peer_is_ours_with_the_same_weights():
    """Same weights, same sequences: loss and all gradients agree, packed or padded."""
    problem, _ = step_problems(2, 32, 2, 300, draw_lengths(10, 3, 20), CPU, compiled=False)
    ours, bert = problem.candidates
    assert ours.ours and bert.yardstick
    for candidate in (ours, bert):
        assert max(difference(candidate.check(), problem.truth)) < 1e-5, candidate.name
    report = Silent()
    rows = bench.measure(problem, bench.Clock(CPU), report, 0.05)
    assert not report.wrong and len(rows) == 2
    parameters = sum(p.numel() for p in _model().parameters()) * 4
    assert all(row.memory > 4 * parameters for row in rows)      # weights, gradients and AdamW's two moments


def test_a_compiled_step_is_checked_as_it_is_timed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda loss, **options: lambda *arguments: 1.1 * loss(*arguments))
    _, problem = step_problems(2, 32, 2, 300, draw_lengths(10, 3, 20), CPU, compiled=True)
    compiled, plain = (max(difference(c.check(), problem.truth)) for c in problem.candidates if c.ours)
    assert compiled > 0.09 and plain < 0.03


def _model():
    from unibert import UniBERT, UniBERTConfig
    return UniBERT(UniBERTConfig(vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=128,
                                 block="post"))


def test_tuning_takes_the_fastest_that_is_right():
    state = {}
    milliseconds = {(1,): 10.0, (2,): 5.0, (3,): 1.0, (4,): 2.0, (5,): 4.9}

    def run():
        if state["pinned"] == (3,):
            raise RuntimeError("out of shared memory")
        return torch.full((4,), 2.0 if state["pinned"] == (4,) else 1.0),
    def choose(candidates):
        return fastest((1,), candidates, lambda c: state.update(pinned=c), run, lambda _: milliseconds[state["pinned"]], 3)
    assert choose([(1,), (2,), (3,), (4,), (5,)]) == (5,) == state["pinned"]
    milliseconds[(2,)] = milliseconds[(5,)] = 9.9      # under 2%: noise is no reason to change what is pinned
    assert choose([(2,), (5,)]) == (1,) == state["pinned"]


@needs_triton
@interpreted
def test_tuning_runs_what_it_would_time(monkeypatch):
    """Every kernel once, in the interpreter, with a candidate pinned; and the lines to paste are rows of the tables."""
    def first(pinned, candidates, pin, run, clock, repeats):
        pin(candidates[-1])
        assert all(t.isfinite().all() for t in run())
    attention_file, losses = configurations.attention_file, configurations.linear_losses
    for file in (attention_file, losses):
        monkeypatch.setattr(file, "CONFIGS", dict(file.CONFIGS))
    monkeypatch.setattr(configurations, "fastest", first)
    report = Silent()
    configurations.tune(CPU, bench.Clock(CPU), report, ["attention", "losses"])
    rows = eval("{" + "\n".join(line for line in report.lines if line.startswith("    (")) + "}")
    assert len(rows) == 6 and rows.items() <= (attention_file.CONFIGS | losses.CONFIGS).items()


def test_faults():
    assert fault_of(90, 8, 0) == "SPILLS"
    assert fault_of(80, 0, 164 * 1024) == "TOO LARGE"
    assert fault_of(90, 0, 227 * 1024) == "" == fault_of(100, 0, 0, 512)
    assert fault_of(100, 0, 0, 513) == "TOO LARGE"                    # Triton refuses to load it


@needs_triton
def test_one_configuration_of_each_kind_compiles_for_hopper():
    code = ("from kernels.configurations import compile_share\n"
            "for kind in ('attention', 'losses'): print(compile_share(kind, 90, 0, 1000))")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True)
    rows = [eval(line)[0] for line in done.stdout.splitlines()]
    assert len(rows) == 2, done.stderr[-2000:]
    for name, registers, spill, shared, columns, unit in rows:
        assert 16 < registers <= 255 and fault_of(90, spill, shared, columns) == "" and unit == "wgmma", name


@pytest.mark.parametrize("arguments, message", [
    (["--compile-only", "--arch", "sm_9"], "known are sm_80"),
    (["--out", "nowhere/at/all.md"], "is not a folder that can be written to"),
    (["--compile-only", "--tune"], "goes with --arch and --out alone"),
    (["--only", "everything"], "is not one of")])
def test_bad_arguments_get_one_line(arguments, message):
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code == 2 and message in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU: with one, --tune would tune")
def test_what_needs_a_gpu_says_so():
    result = CliRunner().invoke(bench.main, ["--tune"])
    assert result.exit_code == 2 and "needs a CUDA GPU" in result.output
    done = subprocess.run(["bash", "kernels/gpu_check.sh"], cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 2 and "no CUDA GPU" in done.stderr
