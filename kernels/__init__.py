"""UniBERT's kernels: one operation a file, and this file is the only dispatch.

    attention(q, k, v, cu_seqlens, max_seqlen)                    fused attention over packed sequences
    linear_cross_entropy(x, weight, bias, target)                 MLM loss straight from hidden states
    linear_distillation(x, weight, bias, target, teacher_...)     MLM loss and distillation in one sweep

Every operation takes backend = "auto" | "triton" | "torch" | "reference":
"triton" is the GPU kernel (it also runs on the CPU under TRITON_INTERPRET=1, slowly, for tests),
"torch" the fast path of plain PyTorch with bounded memory, "reference" the formula as one would write it
on a blackboard; "auto" is triton on NVIDIA's cards from sm_80 on and torch elsewhere.
"""
from kernels.attention import attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.distillation import linear_distillation

__all__ = ["attention", "linear_cross_entropy", "linear_distillation"]
