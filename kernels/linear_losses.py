"""What the losses over hidden states share: cross_entropy.py and distillation.py. The logits are never kept.

N rows (masked tokens, 8-16k), D hidden (256-768), V classes (64k-250k): V / D is 150 to 1,000 here, 8 to 64 where
public kernels are tuned. The work is 6NDV FLOPs: logits, dX and dW. The logits are N * V * 2 bytes: 4 GB at 8k x 250k.
Ways to do without them, by arithmetic (an H200: 790 TFLOP/s dense bfloat16, 4.3 TB/s of memory, 60 MB of L2):

  all logits kept     6NDV  + about 10 bytes of traffic a logit (2.3 ps, as much as the FLOPs at D = 384); gigabytes
  row chunks          6NDV  + the same traffic + all of dW read and written once a chunk; errors add up over chunks
  tile recompute     10NDV  no traffic, but each of dX and dW recomputes the logits
  vocabulary chunks   8NDV  logits twice, dX and dW once; each chunk of dW is one matmul, written once   <- built here

GPU (Triton and cuBLAS). Forward, per chunk of classes: one kernel computes a tile of logits and keeps of it one
logsumexp a row. Backward, per chunk: the same tile again, turned into dlogits = g * (softmax - onehot) in registers
and stored in 16 bits; then dW = dlogits^T x by one matmul in float32, and dX += dlogits W. Traffic: 2 bytes written
and 4 read a logit, under the matmuls. No atomics: same inputs, same bits. The chunk is bounded by bytes (256 MiB, so
the matmul for dW still fills 132 SMs), not by V / D; above 131,072 rows it has 1,024 columns and grows with them.

Predicted, NOT measured, ms for forward + backward on an H200 in bfloat16, from 430 TFLOP/s for the tiles and 620 for
cuBLAS, plus 16 bytes of memory for each weight:
                       D=384 V=64k   D=384 V=250k   D=768 V=64k   D=768 V=250k
  N =  8,192               3.3           12.7           6.5           25
  N = 16,384               6.4           25            13             50

Leads, in picoseconds a logit at D = 384 (256; 768), to be measured before any is built. This design: 1.8 for each of
the two tile sweeps + 2.5 for cuBLAS = 6.1 (4.0; 12.1). All logits kept and compiled: 3.7 of matmuls + 1.4 of traffic
that nothing hides = 5.1 (3.9; 8.8). So against that peer this one is expected to save memory (0.5 GB instead of 4 to
16), not time, unless:
  1. The tiles reach 600 TFLOP/s (as cuBLAS does): 5.0 (3.3; 9.9). A 128 x 128 tile has 64 FLOPs for a byte of L2: if L2
     gives about 5.5 TB/s (assumed), that alone is a ceiling near 350. 128 x 256 has 85 (470), an x that stays in shared
     memory while W streams by 128. `bench --tune` tries 128 x 256; if L2 binds, it shows there first.
     Of a tile's 3,072 clocks of wgmma at D = 384, exp takes 1,024 on the SFUs, and hides only under another program.
  2. Gradients in forward, rows by rows (512 MiB hold 4,194 rows of V = 64k, 1,073 of 250k): 6NDV, no sweep twice:
     5.2 (3.8; 9.5), plus 0.05 to 1.3 ms at N = 8k for adding up dW. Needs each row's gradient
     before backward, so a loss that is summed already: another contract than loss [N].
  3. Logits kept in bfloat16 for the chunks that fit 512 MiB: saves 7% at V = 64k, 2% at 250k. Not worth its lines.
  4. dX added by addmm instead of mm and add: 9 us a chunk at N = 8k, 1%.

CPU and other devices (plain PyTorch): at (330, 64k, 256) in bfloat16 on two cores a profile gave 40 ms of matmuls in
82 ms, and most of the rest was page faults of fresh memory (dW, the workspace). So logits are not recomputed while
their softmax fits 512 MiB, and backward makes no pass over them at all: see cross_entropy.py.
"""
from __future__ import annotations

import torch

from kernels.support import CHECK_VALUES, choose_backend, jit, table_of_device, tl

WORKSPACE_BYTES = 512 << 20      # most that the torch path keeps from forward for backward; beyond it, recompute
CHUNK_BYTES = 8 << 20            # torch path: float32 logits of one chunk, in L3; a row of them in L1
GPU_CHUNK_BYTES = 256 << 20      # triton path: dlogits of one chunk
RULED_OUT = -1e30                # a logit of -inf: weight 0, and finite, so 0 * it is 0


# ----------------------------------------------------------------------------------------------------------- arguments

def check_arguments(name, x, weight, bias, target, backend):
    """-> the backend to use and the dtype of its matmuls, or one clear ValueError."""
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or not len(weight):
        raise ValueError(f"{name}: x [N, D] and weight [V, D], V at least 1, do not fit: {list(x.shape)} and "
                         f"{list(weight.shape)}")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"{name}: x and weight must be floating point, not {x.dtype} and {weight.dtype}")
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_floating_point()):
        raise ValueError(f"{name}: bias must be [{len(weight)}] floating point, not {list(bias.shape)} {bias.dtype}")
    if target.shape != x.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"{name}: target must be [{len(x)}] int64, not {list(target.shape)} {target.dtype}")
    if any(t is not None and t.device != x.device for t in (weight, bias, target)):
        raise ValueError(f"{name}: x, weight, bias and target must be on one device; x is on {x.device}")
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
    backend = choose_backend(name, backend, x.device, dtype)
    if backend == "torch" and dtype == torch.float16:
        dtype = torch.float32      # this path scales rows down to 1e-20 and back: beyond float16, slow on CPUs anyway
    return backend, dtype


def keep_workspace(parts, x, weight, bias, dtype):
    """Keep the [N, V] workspace from forward only when a gradient will be asked for and it stays within bounds."""
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return needed and parts * len(x) * len(weight) * dtype.itemsize <= WORKSPACE_BYTES


def wide_dtype(dtype):
    """Softmax, sums and losses are float32; float64 stays itself (for gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_targets(target, vocabulary, ignore_index):
    """On the CPU always; on a GPU it would wait for the device, so only under UNIBERT_CHECK=1."""
    if target.is_cuda and not CHECK_VALUES:
        return
    bad = ((target < 0) | (target >= vocabulary)) & (target != ignore_index)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"target[{row}] = {int(target[row])} is neither a class in 0..{vocabulary - 1} nor "
                         f"ignore_index ({ignore_index})")


# -------------------------------------------------------------------------------------------- chunks of the vocabulary

def vocabulary_chunks(rows, vocabulary, backend, dtype):
    """[(number, first class, end)]. The width follows from the cache or the workspace, never from V / D; below 512
    columns (1,024 on a GPU) the matmuls get thin. Multiples of 128 keep pointers aligned."""
    if backend == "triton":
        width = max(1024, GPU_CHUNK_BYTES // (dtype.itemsize * max(rows, 1)))
    else:
        width = max(512, CHUNK_BYTES // (4 * max(rows, 1)))
    count = -(-vocabulary // width)
    width = -(-vocabulary // (128 * count)) * 128
    return [(i, start, min(start + width, vocabulary)) for i, start in enumerate(range(0, vocabulary, width))]


def empty_weight_gradients(weight, bias, need_weight):
    """A custom op returns tensors, so a gradient that nobody asked for is an empty one."""
    dw = torch.empty_like(weight) if need_weight else weight.new_empty(0)
    db = torch.empty_like(bias) if need_weight and bias is not None else weight.new_empty(0)
    return dw, db


class KeptRows:
    """The rows that count, and which of them have their target in which chunk."""

    def __init__(self, target, vocabulary, ignore_index, chunks):
        check_targets(target, vocabulary, ignore_index)
        self.kept = (target != ignore_index).nonzero().flatten()
        self.n, self.all = len(self.kept), len(self.kept) == len(target)
        self.target = self.pick(target)
        ordered, self.order = self.target.sort(stable=True)
        starts = torch.tensor([start for _, start, _ in chunks] + [vocabulary], device=target.device)
        self.first = torch.searchsorted(ordered, starts).tolist()

    def pick(self, values):
        return values if self.all else values[self.kept]

    def put_back(self, values, rows):
        return values if self.all else values.new_zeros(rows, *values.shape[1:]).index_copy_(0, self.kept, values)

    def targets_in(self, chunk, start):
        rows = self.order[self.first[chunk]:self.first[chunk + 1]]
        return rows, self.target[rows] - start


def softmax_in_place(logits, scale=None):
    """Softmax over one chunk, in place. -> its logsumexp [n]: max - log(probability of the max)."""
    if scale is not None:
        logits.mul_(scale)
    top = logits.amax(1)
    torch.softmax(logits, 1, out=logits)
    return top.sub_(logits.amax(1).log_())


def saved_chunk(saved, rows, n, start, end, part=0):
    """The chunk's n rows in the flat workspace of `rows * V` elements a part."""
    return saved[part][rows * start:rows * start + n * (end - start)].view(n, end - start)


def bias_of(bias, start, end, dtype):
    """A chunk of the bias. It may rule out classes by -inf, which becomes a finite number here: the largest logit of a
    tile or chunk that has no other class would be -inf, and -inf - -inf is NaN."""
    return None if bias is None else bias[start:end].to(dtype).clamp_min(RULED_OUT)


def add_bias(logits, bias, start, end):
    return logits if bias is None else logits.add_(bias_of(bias, start, end, logits.dtype))


# --------------------------------------------------------------------------------------------- Triton: tiles of logits
# One program = one tile of BM rows by BN columns of the chunk. Pointers are a 64-bit base for the tile and 32-bit
# offsets within it: N * V passes 2^31, and a tile of 64-bit offsets would take half the registers. Rows and columns
# of loads are clamped into range instead of masked; what lies outside is masked where it would count.

OUTSIDE = tl and tl.constexpr(RULED_OUT)     # a logit past the vocabulary's end
NEVER = tl and tl.constexpr(1e30)            # the logsumexp of a row that does not count: softmax 0


@jit
def tile(N, C, BM: tl.constexpr, BN: tl.constexpr):
    """-> number of row block and column block, rows and columns [BM], [BN] within the tile that exist."""
    row_blocks = tl.cdiv(N, BM)
    row_block, col_block = tl.program_id(0) % row_blocks, tl.program_id(0) // row_blocks
    return row_block, col_block, tl.arange(0, BM) < N - row_block * BM, tl.arange(0, BN) < C - col_block * BN


@jit
def tile_logits(x_ptr, w_ptr, b_ptr, row_block, col_block, N, C, D: tl.constexpr, HAS_BIAS: tl.constexpr,
                PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """x W^T + b of one tile [BM, BN], in float32; past the last row and column those are repeated."""
    rows = tl.minimum(tl.arange(0, BM), N - 1 - row_block * BM)
    cols = tl.minimum(tl.arange(0, BN), C - 1 - col_block * BN)
    k = tl.arange(0, BK)
    x_ptrs = x_ptr + row_block.to(tl.int64) * BM * D + rows[:, None] * D + k[None, :]
    w_ptrs = w_ptr + col_block.to(tl.int64) * BN * D + cols[:, None] * D + k[None, :]
    logits = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        if D % BK == 0:
            x, w = tl.load(x_ptrs + start), tl.load(w_ptrs + start)
        else:
            inside = (start + k < D)[None, :]
            x, w = tl.load(x_ptrs + start, inside, 0.0), tl.load(w_ptrs + start, inside, 0.0)
        logits = tl.dot(x, tl.trans(w), logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(b_ptr + col_block * BN + cols)[None, :].to(tl.float32)
    return logits


@jit
def target_column(target, first_class, col_block, C, ignore_index, BN: tl.constexpr):
    """-> the target's column in this tile [BM] int32, and whether it lies in this tile."""
    local = (target - first_class).to(tl.int32) - col_block * BN
    return local, (target != ignore_index) & (local >= 0) & (local < tl.minimum(BN, C - col_block * BN))


@jit
def tile_logsumexp(logits):
    """[BM, BN] -> [BM]."""
    top = tl.max(logits, 1)
    return top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))


@jit
def logits_keeping_target(x_ptr, w_ptr, b_ptr, target, target_logit_ptr, row, row_block, col_block, col_in, N, C,
                          first_class, ignore_index, D: tl.constexpr, HAS_BIAS: tl.constexpr,
                          PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """tile_logits, OUTSIDE past the vocabulary's end; the one tile that has a row's target stores target_logit [N]."""
    logits = tile_logits(x_ptr, w_ptr, b_ptr, row_block, col_block, N, C, D, HAS_BIAS, PRECISION, BM, BN, BK)
    local, here = target_column(target, first_class, col_block, C, ignore_index, BN)
    hit = tl.arange(0, BN)[None, :] == local[:, None]
    tl.store(target_logit_ptr + row, tl.sum(tl.where(hit, logits, 0.0), 1), here)
    return tl.where(col_in[None, :], logits, OUTSIDE)


@jit
def store_dlogits(d, out_ptr, db_ptr, row_block, col_block, row_in, col_in, out_stride, HAS_BIAS: tl.constexpr,
                  BM: tl.constexpr, BN: tl.constexpr):
    """A tile of dlogits into out [N, C], its sums over rows into db [row blocks, C]."""
    r, c = tl.arange(0, BM), tl.arange(0, BN)
    corner = out_ptr + row_block.to(tl.int64) * BM * out_stride + col_block * BN
    tl.store(corner + r[:, None] * out_stride + c[None, :], d.to(out_ptr.dtype.element_ty),
             row_in[:, None] & col_in[None, :])
    if HAS_BIAS:
        tl.store(db_ptr + row_block.to(tl.int64) * out_stride + col_block * BN + c, tl.sum(d, 0), col_in)


# ---------------------------------------------------------------------------------------------------- Triton: launches

# BM, BN, BK, warps, pipeline stages by (architecture, kernel) for 16-bit dtypes. Pinned, not tuned at run time, so
# that every rank and every run does the same arithmetic. D enters only where it is below BK. Chosen by compiling: no
# spills, and two programs an SM where registers and shared memory allow, so that one's softmax hides under the
# other's matmul. Architectures as in support.table_of.
CONFIGS = {
    (80, "ce_forward"): (128, 128, 64, 8, 3), (80, "ce_backward"): (128, 128, 64, 8, 3),
    (80, "distill_forward"): (128, 64, 64, 8, 3), (80, "distill_backward"): (128, 64, 64, 8, 3),
    (86, "ce_forward"): (64, 128, 32, 4, 3), (86, "ce_backward"): (64, 128, 32, 4, 3),
    (86, "distill_forward"): (128, 64, 32, 8, 3), (86, "distill_backward"): (128, 64, 32, 8, 3),
    (90, "ce_forward"): (128, 128, 64, 4, 3), (90, "ce_backward"): (128, 128, 64, 8, 3),
    (90, "distill_forward"): (64, 128, 64, 4, 3), (90, "distill_backward"): (64, 128, 64, 4, 3),
    (100, "ce_forward"): (128, 128, 64, 4, 3), (100, "ce_backward"): (128, 128, 64, 8, 3),
    (100, "distill_forward"): (128, 64, 64, 8, 3), (100, "distill_backward"): (128, 64, 64, 8, 3),
}
FLOAT32_CONFIGS = {"ce": (64, 64, 32, 4, 3), "distill": (64, 32, 32, 4, 3)}              # on every architecture
INTERPRETER_CONFIG = (16, 256, 32, 1, 1)


def launch_options(device, kernel, dtype, width):
    """-> (BM, BN), the keyword arguments of a launch. width: the smaller hidden size."""
    return pinned(table_of_device(device) if device.type == "cuda" else None, kernel, dtype, width)


def pinned(table, kernel, dtype, width):
    """launch_options for an architecture of CONFIGS, or for the interpreter (None)."""
    config = (INTERPRETER_CONFIG if table is None else
              FLOAT32_CONFIGS[kernel.split("_")[0]] if dtype == torch.float32 else CONFIGS[table, kernel])
    bm, bn, bk, warps, stages = config
    bk = min(bk, max(16, 1 << (width - 1).bit_length()))
    precision = "tf32x3" if dtype == torch.float32 else "tf32"       # three tf32 products make a float32 one
    return (bm, bn), dict(PRECISION=precision, BM=bm, BN=bn, BK=bk, num_warps=warps, num_stages=stages)


def grid(block, rows, columns):
    return (-(-rows // block[0]) * -(-columns // block[1]),)


def live_rows(x, target, ignore_index, dtype):
    """x in the matmuls' dtype; ignored rows are zeroed, since 0 * inf in the matmul for dW would still be NaN."""
    return torch.where((target != ignore_index)[:, None], x, 0).to(dtype).contiguous()


def weight_of(weight, start, end, dtype):
    """A chunk of a weight in the matmuls' dtype, so that the whole is never copied (V = 250k, D = 384: 192 MB)."""
    return weight[start:end].to(dtype).contiguous()


def matmul(a, b, out=None):
    """a @ b accumulated in float32, and written in float32 unless `out` has another dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        if out is None or out.dtype == torch.float32:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        # Not straight into 16 bits: cuBLAS may add the parts of a long product in the dtype that it writes.
        return out.copy_(torch.mm(a, b, out_dtype=torch.float32))
    product = a.float() @ b.float()
    return product if out is None else out.copy_(product)


def gradients_by_chunk(x, weight, bias, target, ignore_index, dtype, need_weight, block, fill):
    """Per chunk of the vocabulary: `fill` writes dlogits, then one matmul gives that part of dW, another adds to dX."""
    (rows, width), vocabulary = x.shape, len(weight)
    xs = live_rows(x, target, ignore_index, dtype)
    chunks = vocabulary_chunks(rows, vocabulary, "triton", dtype)
    widest = -(-(chunks[0][2] - chunks[0][1]) // 128) * 128
    dlogits = torch.empty(rows, widest, dtype=dtype, device=x.device)
    db_parts = torch.empty(-(-rows // block[0]), widest, dtype=torch.float32, device=x.device)
    dx = torch.zeros(rows, width, dtype=torch.float32, device=x.device)
    dw, db = empty_weight_gradients(weight, bias, need_weight)
    for _, start, end in chunks:
        w = weight_of(weight, start, end, dtype)
        fill(start, end, xs, w, bias_of(bias, start, end, torch.float32), dlogits, db_parts)
        chunk = dlogits[:, :end - start]
        dx += matmul(chunk, w)
        if need_weight:
            matmul(chunk.t(), xs, out=dw[start:end])
            if bias is not None:
                db[start:end] = db_parts[:, :end - start].sum(0)
    return dx.to(x.dtype), dw, db
