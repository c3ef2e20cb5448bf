"""What the tests of the kernels share: backends, devices and dtypes. test_kernels.py is what pytest is given."""
import os
import sys

import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")     # read when triton is imported, so before kernels

import pytest  # noqa: E402

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {FP16: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}

needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA GPU")
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: Triton has no wheels for other systems")
interpreted = pytest.mark.skipif(CUDA, reason="needs a machine without a GPU: only there is Triton's interpreter on")


def path(backend, device, dtype, *marks):
    return pytest.param(backend, device, dtype, id=f"{backend}-{device}-{NAMES[dtype]}", marks=marks)


BACKENDS = [
    *[path("torch", "cpu", dtype) for dtype in (FP32, FP16, BF16)],
    *[path("triton", "cpu", dtype, interpreted, needs_triton) for dtype in (FP32, FP16)],
    *[path(backend, "cuda", dtype, needs_gpu) for backend in ("torch", "triton") for dtype in (FP32, FP16, BF16)],
]
every_backend = pytest.mark.parametrize("backend,device,dtype", BACKENDS)


@pytest.fixture(params=[FP64, BF16], ids=["default fp64", "default bf16"])
def default_dtype(request):
    """torch.set_default_dtype(torch.bfloat16) is how some build a model: it must not reach sums and logsumexps."""
    yield request.param
    torch.set_default_dtype(FP32)
