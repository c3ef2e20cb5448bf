"""What the kernel files share: Triton or its absence, the card, the choice of a backend, how an operator runs."""
import contextlib
import os

import torch

try:
    import triton
    import triton.language as tl
    INTERPRETED = triton.knobs.runtime.interpret         # TRITON_INTERPRET=1 as of import, when kernels are made
except ImportError:                                      # no wheel for this system: the other backends remain
    triton = tl = None
    INTERPRETED = False

CHECK_VALUES = os.environ.get("UNIBERT_CHECK", "0") == "1"   # look at values on a GPU too, which waits for the device


def jit(fn, **options):
    """triton.jit; where Triton is missing (it has none for macOS and Windows) the function stays as it is."""
    return fn if triton is None else triton.jit(fn, **options)


def table_of(arch: int) -> int:
    """80, 86, 90 or 100: whose pinned launch configurations sm_{arch} takes. 86 has about 100 KiB of shared memory a
    block, like 8.9 and 12.x, and stands for whatever is not known here."""
    return {8: 80 if arch == 80 else 86, 9: 90, 10: 100}.get(arch // 10, 86)


def table_of_device(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return table_of(10 * major + minor)


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels are for this device: NVIDIA's cards from sm_80 on. ROCm's devices call themselves cuda, too.
    torch.compile traces through this; of what tells a card's age it knows the properties alone."""
    return (triton is not None and device.type == "cuda" and torch.version.hip is None
            and torch.cuda.get_device_properties(device).major >= 8)


def choose_backend(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """"triton", "torch" or "reference" for an operation on tensors of this device and dtype. Raises ValueError."""
    if backend not in ("auto", "triton", "torch", "reference"):
        raise ValueError(f'{name}: backend must be "auto", "triton", "torch" or "reference", not {backend!r}')
    if backend == "auto":
        return "triton" if dtype != torch.float64 and has_kernels(device) else "torch"
    if backend == "triton":
        if triton is None:
            raise ValueError(f"{name}: the triton backend needs the triton package, which is not installed")
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"{name}: the triton backend takes float16, bfloat16 and float32, not {dtype}")
        if device.type != "cuda" and not INTERPRETED:
            raise ValueError(f"{name}: the triton backend needs a GPU, not tensors on {device}; use backend='torch', "
                             f"or set TRITON_INTERPRET=1 to run the kernels slowly on the CPU")
        if INTERPRETED and dtype == torch.bfloat16:
            raise ValueError(f"{name}: Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16")
    return backend


@contextlib.contextmanager
def running_on(x: torch.Tensor):
    """The body of an operator: launch on x's device, in the dtypes that are written. Autocast stays on inside
    operators, and would turn float32 scores and sums into bfloat16 ones."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        yield
