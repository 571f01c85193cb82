"""Decoding: attention of one new position over a cache of keys and values, split over the cache (Dao 2023, Flash-Decoding).

    o = sum_{j < length} p_j v_j,  p = softmax_j(q . k_j / sqrt(head_dim))

q, o (B, n_head, 1, head_dim), k, v (B, n_head, T_max, head_dim), of which the first `length` positions are valid. Few heads
would leave most of a GPU idle, so a head's keys are shared out to several programs, each of which keeps the output and the
log-sum-exp of its share; a second kernel weighs them. Least bytes: `length` keys and values, once, and q and o; besides,
head_dim + 1 numbers a share are written and read. There is no backward pass: decoding is for sampling.

When not: for one head and a short cache any form is as fast; on the CPU PyTorch's own kernel is.
"""

import torch
import torch.nn.functional as F

from . import FLOATS, Spec, accumulator, jit, launching, tl, triton, use_triton

DECODE_CHUNK = 256  # least number of keys that are worth a program


def decode_attention_reference(q, k_cache, v_cache, length):
    s = q @ k_cache[:, :, :length].transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, n_head, 1, length)
    return torch.softmax(s, -1) @ v_cache[:, :, :length]


def decode_attention_torch(q, k_cache, v_cache, length):
    return F.scaled_dot_product_attention(q, k_cache[:, :, :length], v_cache[:, :, :length])


# ---- kernels: a head is image * n_head + head; scores are in units of log2; ACC is the type of Lse


@jit
def _at(X, head, n_head, stride_b, stride_h, t0, stride_t, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK: tl.constexpr):
    """Pointers to BLOCK rows of a head of X from t0 on, [BLOCK, BLOCK_D], and which of them are before `end` and HEAD_DIM."""
    X += (tl.cast(head // n_head, tl.int64) * stride_b + tl.cast(head % n_head, tl.int64) * stride_h
          + tl.cast(t0, tl.int64) * stride_t)
    t, d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_D)[None, :]
    return X + (t * stride_t + d), (t0 + t < end) & (d < HEAD_DIM)


@jit
def _load(X, head, n_head, stride_b, stride_h, t0, stride_t, end, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
          BLOCK: tl.constexpr):
    pointers, inside = _at(X, head, n_head, stride_b, stride_h, t0, stride_t, end, HEAD_DIM, BLOCK_D, BLOCK)
    return tl.load(pointers, mask=inside, other=0.0)


@jit
def _decode_kernel(Q, K, V, Out, Lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, n_head, length, chunk, splits,
                   HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """A program a chunk of a head's keys: its output and log-sum-exp."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    pid = tl.program_id(0)
    head, first = pid // splits, pid % splits * chunk
    last, d = tl.minimum(first + chunk, length), tl.arange(0, BLOCK_D)
    q = _load(Q, head, n_head, q_b, q_h, 0, q_t, 1, HEAD_DIM, BLOCK_D, 1).to(ACC) * (HEAD_DIM ** -0.5 * 1.4426950408889634)
    m, total, out = tl.full([1], float("-inf"), ACC), tl.zeros([1], ACC), tl.zeros([BLOCK_D], ACC)
    for j0 in range(first, last, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        k = _load(K, head, n_head, k_b, k_h, j0, k_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(ACC)
        v = _load(V, head, n_head, v_b, v_h, j0, v_t, last, HEAD_DIM, BLOCK_D, BLOCK).to(ACC)
        s = tl.where(j < last, tl.sum(k * q, 1), float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 0))
        p, alpha = tl.exp2(s - m_new), tl.exp2(m - m_new)
        total = total * alpha + tl.sum(p, 0)
        out = out * alpha + tl.sum(p[:, None] * v, 0)
        m = m_new
    total = tl.where(total > 0, total, 1.0)  # length 0
    tl.store(Lse + pid + tl.arange(0, 1), m + tl.log2(total))
    out = out / total
    tl.store(Out + pid.to(tl.int64) * HEAD_DIM + d, out.to(Out.dtype.element_ty), mask=d < HEAD_DIM)


@jit
def _decode_combine_kernel(Part, Lse, Out, splits, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr):
    """A program a head: the outputs of its chunks, none of them empty, by their shares of the sum."""
    head, n, d = tl.program_id(0), tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    lse = tl.load(Lse + head * splits + n, mask=n < splits, other=float("-inf"))
    share = tl.exp2(lse - tl.max(lse, 0))
    part = _load(Part, head, 1, splits * HEAD_DIM, 0, 0, HEAD_DIM, splits, HEAD_DIM, BLOCK_D, SPLITS)
    out = tl.sum((share / tl.sum(share, 0))[:, None] * part, 0)
    tl.store(Out + head.to(tl.int64) * HEAD_DIM + d, out.to(Out.dtype.element_ty), mask=d < HEAD_DIM)


# ---- operator


def _rows(*tensors):
    """The tensors, copied where their last dimension is not contiguous; the strides of their other three."""
    tensors = [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
    return *tensors, [s for x in tensors for s in x.stride()[:3]]


@torch.library.custom_op("m2::decode_attention", mutates_args=())
def _decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int) -> torch.Tensor:
    (q, k, v, strides), (B, n_head, _, head_dim) = _rows(q, k, v), q.shape
    heads, block_d = B * n_head, triton.next_power_of_2(head_dim)
    block = 4096 // block_d
    splits = max(1, min(length // DECODE_CHUNK, triton.cdiv(1024, heads), 32))
    chunk = max(1, triton.cdiv(triton.cdiv(length, splits), block)) * block
    splits = max(1, triton.cdiv(length, chunk))  # so that none is empty
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(heads, splits, dtype=accumulator(q))
    part = out if splits == 1 else q.new_empty(heads, splits, head_dim, dtype=lse.dtype)
    with launching(q):
        _decode_kernel[(heads * splits,)](q, k, v, part, lse, *strides, n_head, length, chunk, splits, HEAD_DIM=head_dim,
                                          BLOCK_D=block_d, BLOCK=block, num_stages=2)
        if splits > 1:
            _decode_combine_kernel[(heads,)](part, lse, out, splits, HEAD_DIM=head_dim, BLOCK_D=block_d,
                                             SPLITS=triton.next_power_of_2(splits))
    return out


@_decode.register_fake
def _(q, k, v, length):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def supports(q, k, v):
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return False, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    if not 16 <= q.shape[-1] <= 256 or not q.device == k.device == v.device:
        return False, f"head_dim {q.shape[-1]} is not in 16..256, or the tensors are on several devices"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return False, "decoding has no gradients in Triton: call it under torch.no_grad()"
    return True, ""


def decode_attention(q, k_cache, v_cache, length):
    """Attention of one new position over the first `length` of a cache, zeros for length 0; what lies behind is not read.

    q (B, n_head, 1, head_dim), k_cache and v_cache (B, n_head, T_max, head_dim), length 0..T_max -> the shape of q. Triton
    has no gradients for it: where they are asked for, mode "auto" takes the plain form and "triton" raises. Raises
    ValueError for shapes or a length that do not fit, and what use_triton raises.
    """
    if q.dim() != 4 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or not 0 <= length <= k_cache.shape[2] or (
            q.shape != (*k_cache.shape[:2], 1, k_cache.shape[3])):
        raise ValueError(f"decode_attention: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache "
                         f"{tuple(v_cache.shape)} and length {length} do not fit")
    if use_triton("decode_attention", k_cache[:, :, :length], lambda: supports(q, k_cache, v_cache), least=1 << 16):
        return _decode(q, k_cache, v_cache, length)
    return decode_attention_torch(q, k_cache, v_cache, length)


AOT_SPECS = [] if triton is None else [
    *(Spec("_decode_kernel", f"{t}, head_dim 64", dict.fromkeys("QKV", f"*{t}") | dict.fromkeys(("Out", "Lse"), "*fp32")
           | {f"{x}_{y}": "i32:16" for x in "qkv" for y in "bht"}
           | dict.fromkeys(("n_head", "length", "chunk", "splits"), "i32")
           | {"HEAD_DIM": 64, "BLOCK_D": 64, "BLOCK": 64}, num_stages=2, registers=128) for t in ("fp32", "bf16", "fp16")),
    Spec("_decode_combine_kernel", "bf16, head_dim 64", {"Part": "*fp32", "Lse": "*fp32", "Out": "*bf16", "splits": "i32",
         "HEAD_DIM": 64, "BLOCK_D": 64, "SPLITS": 32}, registers=40),
]
