"""Decoding: attention of one new position over a cache of keys and values, split over the cache (Dao 2023, Flash-Decoding).

    o = sum_{j < length} p_j v_j,  p = softmax_j(scale q . k_j),  scale = 1 / sqrt(head_dim) where none is given

q, o (B, n_head, 1, head_dim), k, v (B, n_head_kv, T_max, head_dim), of which the first `length` positions are valid. Heads of
q share those of k and v in groups of n_head / n_head_kv, in order (Ainslie et al. 2023). Few heads would leave most of a GPU
idle, so the keys of a head are shared out to several programs, each of which keeps the output and the log-sum-exp of its
share; a second kernel weighs them. Least bytes: `length` keys and values, once, and q and o; besides, head_dim + 1 numbers
a share are written and read. A group reads its keys once in half types, whose products go to matrix units; in float32 each
of its heads reads them again, from L2. There is no backward pass: decoding is for sampling.

The length is a number, or a tensor on the device: then one CUDA graph serves every step of a loop. What is launched follows
from T_max alone, and the programs share out what length they find.

When not: for one head and a short cache any form is as fast; on the CPU PyTorch's own kernel is.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F

from . import (
    FLOATS,
    INTERPRETING,
    Spec,
    accumulator,
    autocast,
    by_mkl,
    cdiv,
    jit,
    launch,
    operator,
    power_of_2,
    tl,
    triton,
    use_triton,
)

DECODE_CHUNK = 256  # least number of keys that are worth a program
MOST_SPLITS = 32  # shares of a head's keys
# A call costs the CPU 16 us and two launches (about 10 us each, argued) against 12 us and one of PyTorch's own kernel (measured
# with launches left out): more by what one block a head takes to read a few MB. Of a length on the device the plain form costs
# 45 us and two copies of the cache, so there the kernel is taken at any size.
LEAST = 1 << 20  # elements of k_cache from which "auto" takes the kernel


def decode_attention_reference(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, length: int | torch.Tensor,
                               scale: float | None = None) -> torch.Tensor:
    group = q.shape[1] // k_cache.shape[1]
    k = k_cache[:, :, :int(length)].repeat_interleave(group, 1)
    v = v_cache[:, :, :int(length)].repeat_interleave(group, 1)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, n_head, 1, length)
    return torch.softmax(s, -1) @ v


def decode_attention_torch(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, length: int | torch.Tensor,
                           scale: float | None = None) -> torch.Tensor:
    """PyTorch's kernel on the valid part of the cache; of a length on the device, on all of it, with the rest set to 0."""
    grouped = q.shape[1] != k_cache.shape[1]
    if not isinstance(length, torch.Tensor):
        k = k_cache[:, :, :length]
        v = v_cache[:, :, :length]
        with contextlib.nullcontext() if q.device.type != "cpu" or torch.compiler.is_compiling() else by_mkl():
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    j = torch.arange(k_cache.shape[2], device=q.device)
    behind = (j >= length)[:, None]
    k = k_cache.masked_fill(behind, 0)
    v = v_cache.masked_fill(behind, 0)
    seen = (j < length) | (j == 0)  # of length 0, the first, whose value is 0 here
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None], scale=scale, enable_gqa=grouped)


# ---- kernels: scores are in units of log2; ACC, in which sums are kept, is the type of Lse


@jit
def _head(X, image, head, stride_b, stride_h):
    """A pointer to a head of an image of X."""
    return X + tl.cast(image, tl.int64) * stride_b + tl.cast(head, tl.int64) * stride_h


@jit
def _at(X, t0, stride_t, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to BLOCK rows of a head X from t0 on, [BLOCK, BLOCK_D], and which of them are before `end` and HEAD_DIM."""
    t = tl.arange(0, BLOCK)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    X += tl.cast(t0, tl.int64) * stride_t
    return X + (t * stride_t + d), (t0 + t < end) & (d < HEAD_DIM)


@jit
def _load(X, t0, stride_t, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    pointers, inside = _at(X, t0, stride_t, end, HEAD_DIM, BLOCK_D, BLOCK)
    return tl.load(pointers, mask=inside, other=0.0)


@jit
def _store(x, X, t0, stride_t, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    pointers, inside = _at(X, t0, stride_t, end, HEAD_DIM, BLOCK_D, BLOCK)
    tl.store(pointers, x.to(X.dtype.element_ty), mask=inside)


@jit
def _log2_scale(scale, ACC: tl.constexpr):
    """What takes q . k to scores in units of log2."""
    return tl.cast(scale, ACC) * 1.4426950408889634


@jit
def _share(Length, length, split, splits, BLOCK: tl.constexpr, ON_DEVICE: tl.constexpr):
    """The first key of a share, and where it ends: whole blocks, so that the last shares may be empty."""
    if ON_DEVICE:
        length = tl.minimum(tl.maximum(tl.load(Length), 0), length).to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, splits), BLOCK) * BLOCK
    first = split * chunk
    return first, tl.minimum(first + chunk, length)


@jit
def _finite(m):
    """A largest score that can be subtracted: 0 where there is none yet."""
    return tl.where(m == float("-inf"), 0.0, m)


@jit
def _decode_kernel(Q, K, V, Length, Out, Lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, n_head, group, heads,
                   length, ON_DEVICE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """A program a share of a head's keys: its output and log-sum-exp. Out (heads, splits, head_dim), Lse (heads, splits)."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    pid = tl.program_id(0)
    splits = tl.num_programs(0) // heads
    image = pid // splits // n_head
    head = pid // splits % n_head
    first, last = _share(Length, length, pid % splits, splits, BLOCK, ON_DEVICE)
    K = _head(K, image, head // group, k_b, k_h)
    V = _head(V, image, head // group, v_b, v_h)
    q = _load(_head(Q, image, head, q_b, q_h), 0, q_t, 1, HEAD_DIM, BLOCK_D, 1).to(ACC) * _log2_scale(scale, ACC)
    m = tl.full([1], float("-inf"), ACC)
    total = tl.zeros([1], ACC)
    out = tl.zeros([BLOCK_D], ACC)
    for j0 in range(first, last, BLOCK):
        k = _load(K, j0, k_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(ACC)  # [BLOCK, BLOCK_D]
        v = _load(V, j0, v_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(ACC)
        s = tl.where(j0 + tl.arange(0, BLOCK) < last, tl.sum(k * q, 1), float("-inf"))  # [BLOCK]
        m_new = tl.maximum(m, tl.max(s, 0))
        p = tl.exp2(s - m_new)
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 0)
        out = out * alpha + tl.sum(p[:, None] * v, 0)
        m = m_new
    total = tl.where(total > 0, total, 1.0)  # an empty share
    d = tl.arange(0, BLOCK_D)
    tl.store(Lse + pid + tl.arange(0, 1), m + tl.log2(total))
    tl.store(Out + pid.to(tl.int64) * HEAD_DIM + d, (out / total).to(Out.dtype.element_ty), mask=d < HEAD_DIM)


@jit
def _decode_grouped_kernel(Q, K, V, Length, Out, Lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, n_head, group,
                           heads, length, ON_DEVICE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                           BLOCK: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr):
    """As _decode_kernel, for the ROWS or fewer heads of q that share keys, which are read once; n_head and heads count keys'.

    Out (B * n_head, splits, head_dim), Lse (B * n_head, splits). The heads of q are the rows of a product, q_h apart.
    """
    ACC: tl.constexpr = Lse.dtype.element_ty
    pid = tl.program_id(0)
    splits = tl.num_programs(0) // heads
    split = pid % splits
    image = pid // splits // n_head
    head = pid // splits % n_head
    first, last = _share(Length, length, split, splits, BLOCK, ON_DEVICE)
    K = _head(K, image, head, k_b, k_h)
    V = _head(V, image, head, v_b, v_h)
    q = _load(_head(Q, image, head * group, q_b, q_h), 0, q_h, group, HEAD_DIM, BLOCK_D, ROWS).to(DOT)  # [ROWS, BLOCK_D]
    m = tl.full([ROWS], float("-inf"), ACC)
    total = tl.zeros([ROWS], ACC)
    out = tl.zeros([ROWS, BLOCK_D], ACC)
    for j0 in range(first, last, BLOCK):
        k = _load(K, j0, k_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)  # [BLOCK, BLOCK_D]
        v = _load(V, j0, v_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * _log2_scale(scale, ACC)  # [ROWS, BLOCK]
        s = tl.where((j0 + tl.arange(0, BLOCK) < last)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 1)
        out = tl.dot(p.to(DOT), v, out * alpha[:, None], input_precision="ieee")
        m = m_new
    total = tl.where(total > 0, total, 1.0)  # an empty share
    row = tl.arange(0, ROWS)
    first_head = (pid // splits * group).to(tl.int64)
    tl.store(Lse + (first_head + row) * splits + split, m + tl.log2(total), mask=row < group)
    Out += (first_head * splits + split) * HEAD_DIM
    _store(out / total[:, None], Out, 0, splits * HEAD_DIM, group, HEAD_DIM, BLOCK_D, ROWS)


@jit
def _decode_combine_kernel(Part, Lse, Out, splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """A program a head: the outputs of its shares, weighed by their parts of the sum; an empty one weighs nothing."""
    head = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, SPLITS)
    d = tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + head * splits + n, mask=n < splits, other=float("-inf"))
    weight = tl.exp2(lse - _finite(tl.max(lse, 0)))
    total = tl.sum(weight, 0)
    part = _load(Part + head * splits * HEAD_DIM, 0, HEAD_DIM, splits, HEAD_DIM, BLOCK_D, SPLITS)  # [SPLITS, BLOCK_D]
    out = tl.sum((weight / tl.where(total > 0, total, 1.0))[:, None] * part, 0)
    tl.store(Out + head * HEAD_DIM + d, out.to(Out.dtype.element_ty), mask=d < HEAD_DIM)


# ---- operator


def _rows(*tensors):
    """The tensors, copied where their last dimension is not contiguous; the strides of their other three."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return *tensors, [s for x in tensors for s in x.stride()[:3]]


def scaled(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """q and scale as a kernel takes them: its numbers have float32's digits, so float64 is multiplied beforehand."""
    return (q * scale, 1.0) if q.dtype == torch.float64 else (q, scale)


@functools.lru_cache
def _kind(kind, index):
    if kind != "cuda":
        return "sm_80"
    if torch.version.hip:
        return "gfx9" if torch.cuda.get_device_properties(index).gcnArchName.startswith("gfx9") else "gfx11"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(index)[0], "sm_80")  # 8.x and 12.x: 99 KB


def gpu_kind(device: torch.device) -> str:
    """The kind of GPU, by its matrix instructions and the shared memory that a block may have; "sm_80" where there is none."""
    return _kind(device.type, device.index)


gpu_kind._dynamo_marked_constant = True  # as available in __init__.py


def dot_type(dtype: torch.dtype) -> "tl.dtype":
    """The type in which products of a type are taken, as the kernels name it; the interpreter has no bfloat16."""
    half = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETING else tl.bfloat16}
    return half.get(dtype, tl.float64 if dtype == torch.float64 else tl.float32)


def _fake(q, k, v, length, T, scale):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@operator("decode_attention", _fake)
def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor | None, T: int,
            scale: float) -> torch.Tensor:
    """Over the first T positions of the cache, or, of length on the device, the fewer that it says."""
    B, n_head, _, head_dim = q.shape
    n_head_kv = k.shape[1]
    group = n_head // n_head_kv
    once = group > 1 and q.element_size() == 2 and gpu_kind(q.device) != "gfx11"  # whether a program serves a group
    q, k, v, strides = _rows(q, k, v)
    block_d = power_of_2(head_dim)
    heads = B * (n_head_kv if once else n_head)
    splits = max(1, min(k.shape[2] // DECODE_CHUNK, cdiv(1024, heads), MOST_SPLITS))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(B * n_head, splits, dtype=accumulator(q))
    part = out if splits == 1 else q.new_empty(B * n_head, splits, head_dim, dtype=lse.dtype)
    args = q, k, v, q if length is None else length, part, lse, *strides, scale, heads // B, group, heads, T
    constants = {"ON_DEVICE": length is not None, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
    if once:
        constants |= {"DOT": dot_type(q.dtype)} | _grouped_blocks(block_d, group)
        launch(_decode_grouped_kernel, heads * splits, *args, **constants)
    else:
        launch(_decode_kernel, heads * splits, *args, BLOCK=4096 // block_d, num_stages=2, **constants)
    if splits > 1:
        launch(_decode_combine_kernel, B * n_head, part, lse, out, splits, HEAD_DIM=head_dim, BLOCK_D=block_d,
               SPLITS=MOST_SPLITS)
    return out


def _grouped_blocks(block_d, group):
    """Constants of the kernel for shared keys: a product has at least 16 rows, and its tiles stay in registers."""
    block = max(32, min(64, 8192 // block_d))
    return {"ROWS": max(16, power_of_2(group)), "BLOCK": block, "num_warps": 4, "num_stages": 2}


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[bool, str]:
    kinds = {q.dtype, k.dtype, v.dtype}
    mixed = len(kinds) > 1 and (torch.float64 in kinds or not torch.is_autocast_enabled(q.device.type))
    if not kinds <= {*FLOATS} or mixed:
        return False, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not 16 <= q.shape[-1] <= 256 or not q.device == k.device == v.device:
        return False, f"head_dim {q.shape[-1]} is not in 16..256, or the tensors are on several devices"
    if q.shape[1] > 32 * k.shape[1]:
        return False, f"{q.shape[1]} heads of q share {k.shape[1]} of k: more than 32 each"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False, "decoding has no gradients in Triton: call it under torch.no_grad()"
    return True, ""


def decode_attention(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, length: int | torch.Tensor, *,
                     scale: float | None = None, backend: str | None = None) -> torch.Tensor:
    """Attention of one new position over the first `length` of a cache, zeros for length 0; what lies behind is not used.

    q (B, n_head, 1, head_dim), k_cache and v_cache (B, n_head_kv, T_max, head_dim), any strides, n_head_kv a divisor of
    n_head, its heads shared in order -> the shape and type of q. length: 0..T_max; or a tensor of one element, int32 or
    int64, on the device of q: nothing waits for it, so the call can be part of a CUDA graph, and values outside 0..T_max
    count as the nearest inside. scale: of q . k, by default 1/sqrt(head_dim). backend: one of kernels.MODES, for this call.
    Under autocast the result is of its type; the caches are read as they are. Triton has no gradients for it: where they
    are asked for, mode "auto" takes the plain form and "triton" raises. Raises ValueError for shapes or a length that do
    not fit, and what use_triton raises.
    """
    shapes = f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}"
    fit = q.dim() == k_cache.dim() == 4 and k_cache.shape == v_cache.shape and q.shape[2] == 1
    if not fit or q.shape[0] != k_cache.shape[0] or q.shape[3] != k_cache.shape[3] or q.shape[1] % max(k_cache.shape[1], 1):
        raise ValueError(f"decode_attention: {shapes} do not fit")
    on_device = isinstance(length, torch.Tensor)
    if on_device and (length.numel() != 1 or length.dtype not in (torch.int32, torch.int64) or length.device != q.device):
        raise ValueError(f"decode_attention: length {tuple(length.shape)} {length.dtype} on {length.device} must be one int32 "
                         f"or int64 on {q.device}")
    if not on_device and not 0 <= length <= k_cache.shape[2]:
        raise ValueError(f"decode_attention: {shapes} and length {length} do not fit")
    used = k_cache if on_device else k_cache[:, :, :length]
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if use_triton("decode_attention", used, lambda: supports(q, k_cache, v_cache), least=0 if on_device else LEAST,
                  backend=backend):
        q, scale = scaled(*autocast(q), scale)
        return _decode(q, k_cache, v_cache, length if on_device else None, k_cache.shape[2] if on_device else length, scale)
    return decode_attention_torch(q, k_cache, v_cache, length, scale)


def _spec(kernel, dtype, head_dim=64, registers=128, **more):
    block_d = power_of_2(head_dim)
    args = dict.fromkeys("QKV", f"*{dtype}") | dict.fromkeys(("Part", "Lse"), "*fp32")
    args |= {"Length": "*i64", "Out": f"*{dtype}" if "combine" in kernel else "*fp32", "scale": "fp32"}
    args |= dict.fromkeys(("n_head", "heads", "length", "group", "splits"), "i32")
    args |= {"ON_DEVICE": True, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "SPLITS": MOST_SPLITS, "BLOCK": 4096 // block_d}
    warps = {"num_stages": None if "combine" in kernel else 2}
    if "grouped" in kernel:
        dot = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
        args |= {"DOT": dot} | _grouped_blocks(block_d, more.pop("group", 4))
        warps = {key: args.pop(key) for key in ("num_warps", "num_stages")}
    args = {x: (args | more).get(x, "i32:16") for x in globals()[kernel].arg_names}  # strides are multiples of 16
    grouped = "grouped" in kernel
    return Spec(kernel, f"{dtype}, head_dim {head_dim}" + f", {args.get('ROWS')} rows" * grouped, args, **warps,
                registers=registers, matrix=grouped, own={"gfx1100": None} if grouped else {})


AOT_SPECS = [] if triton is None else [
    *(_spec("_decode_kernel", t) for t in ("fp32", "bf16", "fp16")),
    _spec("_decode_grouped_kernel", "bf16"),
    _spec("_decode_combine_kernel", "bf16", registers=40),
]
AOT_MORE = [] if triton is None else [spec for d in (16, 40, 128, 256) for spec in (
    _spec("_decode_kernel", "fp32", d, 255),
    _spec("_decode_kernel", "bf16", d, 255),
    _spec("_decode_grouped_kernel", "bf16", d, 255, group=4),
    _spec("_decode_grouped_kernel", "bf16", d, 255, group=32),
    _spec("_decode_combine_kernel", "fp32", d, 255),
    _spec("_decode_combine_kernel", "bf16", d, 255),
)]
