"""Attention over raster positions, forward and backward (Vaswani et al. 2017, in tiles as Dao 2023).

    o_i = sum_j p_ij v_j,  p_i = softmax_j(scale q_i . k_j + b_ij)  over the j that i may see,  scale = 1/sqrt(head_dim)

q, o (B, n_head, T, head_dim), k, v (B, n_head_kv, T, head_dim). Heads of q share those of k and v in groups of n_head /
n_head_kv, in order (Ainslie et al. 2023). Position i sees every j, or j <= i ("causal"), or j < i ("strict": position 0 sees
nothing, its output and gradients are 0). b is 0, or a 2-D relative-position bias (n_head, 2H-1, 2W-1) of an image with
T = H*W: b_ij = bias[row_i - row_j + H-1, column_i - column_j + W-1], looked up and differentiated in the kernels, so that
nothing of T x T is ever stored. Beside o only the log-sum-exp of every row is kept.

    ds_ij = p_ij (do_i . v_j - delta_i),  delta_i = do_i . o_i
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij do_i,  dbias = sums of ds over pairs

Least bytes, n = bytes of q: forward 4n, backward 8n. By design each of the T / BLOCK tiles reads its counterparts again,
on a GPU from L2: forward moves (2 + 2 tiles) n, dq (4 + 2 tiles) n, dk and dv (4 + 2 tiles) n, with half as many tiles, rounded
up, under a causal mask; the bias gradient reads 4n for each of the H rows of the image and each tile of a row. With a bias
each pass besides reads an entry of the table for every score, from the table's few kilobytes in the L1 cache. Where heads
share keys, dk and dv are written in float32 for every head of q, and then added up.

When not: without a bias PyTorch's own kernels are faster, and mode "auto" takes those; "strict" is their "causal" over keys
one earlier. With a bias the rival is torch.nn.attention.flex_attention, whose score_mod can look the table up when it is
compiled. For one new position over a cache there is decode_attention (decode_attention.py).
"""

import functools

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import FLOATS, Spec, accumulator, autocast, by_onednn, cdiv, jit, launch, operator, power_of_2, tl, triton, use_triton
from .decode_attention import _head, _load, _log2_scale, _rows, _store, dot_type, gpu_kind, scaled

SHORT = 256  # positions up to which plain products by oneDNN are faster than PyTorch's kernel
SCORES = 1 << 20  # scores that plain products have at once, 4 MB
LAGS = {None: -1, "causal": 0, "strict": 1}  # mask: i sees j where i - j >= lag; -1: everywhere
DBIAS_PAIRS = 64  # pairs of tiles that a program of the bias gradient adds up, about, where programs can be spared
PLAIN_SCORES = 1 << 22  # scores that the plain form with a bias holds at once, or one row of the image
FWD, DQ, DKV, DBIAS = range(4)  # the kernels, as TILES orders them
# A call with a bias costs the CPU 36 us and a launch (about 15 us, argued) against 22 us and five launches of the plain form
# (measured with launches left out), so that the T x T numbers that the plain form writes decide, from small images on.
LEAST = 1 << 16  # elements of q from which "auto" takes the kernels


def attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str | None = None,
                        bias: torch.Tensor | None = None, scale: float | None = None) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    i = torch.arange(q.shape[2], device=q.device)[:, None]
    j = torch.arange(k.shape[2], device=q.device)
    s = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)  # (B, n_head, T, T_k)
    if bias is not None:
        H = (bias.shape[1] + 1) // 2
        W = (bias.shape[2] + 1) // 2
        s = s + bias[:, i // W - j // W + H - 1, i % W - j % W + W - 1]
    seen = (i - j >= LAGS[mask]) | (LAGS[mask] < 0)
    s = s.masked_fill(~seen & seen.any(1, keepdim=True), -float("inf"))  # a row that sees nothing stays finite,
    return (torch.softmax(s, -1) * seen) @ v  # and is 0 here


def attention_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str | None = None,
                    bias: torch.Tensor | None = None, scale: float | None = None) -> torch.Tensor:
    """The fastest plain form: PyTorch's kernels; "strict" is "causal" with keys one earlier; a bias goes by image rows."""
    if bias is not None:
        return _attention_bias_torch(q, k, v, LAGS[mask], bias, scale)
    if mask != "strict":
        return _attention_torch(q, k, v, mask == "causal", scale)
    y = _attention_torch(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], True, scale)
    return F.pad(y, (0, 0, 1, 0))[:, :, :q.shape[2]]


def _attention_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float | None) -> torch.Tensor:
    """PyTorch's kernel. Its tiles are too small for oneDNN, so where that multiplies, few positions go by plain products."""
    grouped = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and by_onednn() and k.shape[2] <= SHORT and not grouped:
        return _products(q, k, v, causal, scale)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)


def _products(q, k, v, causal, scale):
    images = SCORES // max(1, q.shape[1] * q.shape[2] * k.shape[2]) + 1
    if len(q) > images:  # so many at once as the caches hold
        parts = zip(q.split(images), k.split(images), v.split(images), strict=True)
        return torch.cat([_products(*part, causal, scale) for part in parts])
    s = q * (q.shape[-1] ** -0.5 if scale is None else scale) @ k.mT  # (B, n_head, T, T_k)
    if causal:
        s = s + torch.full(s.shape[2:], -float("inf"), dtype=s.dtype).triu(1)
    return torch.softmax(s, -1) @ v


def _attention_bias_torch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lag: int, bias: torch.Tensor,
                          scale: float | None) -> torch.Tensor:
    """A few rows of the image at a time, recomputed in the backward pass: memory grows with T, not with its square."""
    B, n_head, T, _ = q.shape
    H = (bias.shape[1] + 1) // 2
    W = (bias.shape[2] + 1) // 2
    grouped = n_head != k.shape[1]
    rows = max(1, min(H, PLAIN_SCORES // max(B * n_head * W * T, 1)))
    again = rows < H and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))

    def part(q, k, v, bias, first, last):
        b = bias.flip(1, 2)[:, H - last:2 * H - 1 - first].unfold(1, H, 1).unfold(2, W, 1)  # (n_head, last-first, W, H, W),
        b = b.flip(1, 2).reshape(n_head, (last - first) * W, T)[:, :, :k.shape[2]]  # from the last query to the first
        if lag >= 0:
            i = torch.arange(first * W, last * W, device=q.device)[:, None]
            j = torch.arange(k.shape[2], device=q.device)
            b = b.masked_fill((i - j < lag) & (j > 0), -float("inf"))  # the first row stays finite, and is dropped below
        return F.scaled_dot_product_attention(q, k, v, attn_mask=b[None], scale=scale, enable_gqa=grouped)

    y = []
    for first in range(0, H, rows):
        last = min(first + rows, H)
        end = last * W if lag >= 0 else T
        args = q[:, :, first * W:last * W], k[:, :, :end], v[:, :, :end], bias, first, last
        y.append(checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False) if again else part(*args))
    y = torch.cat(y, 2)
    return F.pad(y[:, :, 1:], (0, 0, 1, 0)) if lag == 1 else y


# ---- kernels: scores are in units of log2; ACC, in which sums are kept, is the type of Lse. Tiles against which a program
# goes come in two loops, MASKED 0 and 1, as most are seen by all of its rows; without SPLIT all are masked, for the registers.


@jit
def _place(blocks, n_head):
    """Image, head and tile of a program."""
    pid = tl.program_id(0)
    return pid // blocks // n_head, pid // blocks % n_head, pid % blocks


@jit
def _packed(X, image, head, n_head, T, HEAD_DIM: tl.constexpr):
    """A pointer to a head of a result, which lies (B, T, n_head, head_dim)."""
    return _head(X, image, head, tl.cast(T, tl.int64) * n_head * HEAD_DIM, HEAD_DIM)


@jit
def _of_rows(X, image, head, n_head, T):
    """A pointer to a head of what has a number a row, (B, n_head, T)."""
    return _head(X, image, head, tl.cast(T, tl.int64) * n_head, T)


@jit
def _of_table(Table, head, H, W):
    """A pointer to a head of the table, at the bias of a position with itself."""
    return Table + (head * (2 * H - 1) + H - 1) * (2 * W - 1) + W - 1


@jit
def _dot(a, b, c, TF32: tl.constexpr):
    return tl.dot(a, b, c, input_precision="tf32" if TF32 else "ieee")


@jit
def _scores(qk, i, j, scale, Table, T, W, BIAS: tl.constexpr):
    """Scores from products q . k, with the bias where positions i and j, which broadcast to the shape of qk, have one."""
    s = qk * _log2_scale(scale, qk.dtype)
    if BIAS:
        i = tl.minimum(i, T - 1)  # what lies behind the end gets any bias
        j = tl.minimum(j, T - 1)
        offsets = (i + i // W * (W - 1)) - (j + j // W * (W - 1))  # a row down is 2W-1 further
        s += tl.load(Table + offsets).to(qk.dtype) * 1.4426950408889634
    return s


@jit
def _seen(s, i, j, T_k, LAG: tl.constexpr):
    """s where i sees j, else -inf."""
    seen = j < T_k
    if LAG >= 0:
        seen = seen & (j + LAG <= i)
    return tl.where(seen, s, float("-inf"))


@jit
def _keys(i0, T_k, LAG: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """For queries from i0 on: the end of the tiles of keys that need no mask, and of those that any of the queries sees."""
    inner = T_k
    end = T_k
    if LAG >= 0:
        inner = tl.minimum(T_k, i0 + 1 - LAG)
        end = tl.minimum(T_k, i0 + BLOCK - LAG)
    return inner // STEP * STEP if SPLIT else 0, end


@jit
def _queries(j0, T, LAG: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """For keys from j0 on: the first query that sees any of them, and the first of the tiles of queries that need no mask."""
    start = 0
    inner = 0
    if LAG >= 0:
        start = j0
        inner = tl.minimum(T, j0 + tl.cdiv(BLOCK - 1 + LAG, STEP) * STEP) if SPLIT else T
    return start, inner


@jit
def _attention_fwd_kernel(Q, K, V, Table, Out, Lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, scale, n_head, group,
                          T, T_k, H, W, LAG: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr,
                          BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr,
                          TF32: tl.constexpr):
    """A program a tile of queries of a head: softmax online over tiles of keys."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    blocks = tl.cdiv(T, BLOCK)
    image, head, tile = _place(blocks, n_head)
    i0 = (blocks - 1 - tile) * BLOCK  # under a causal mask the longest first
    i = i0 + tl.arange(0, BLOCK)
    K = _head(K, image, head // group, k_b, k_h)
    V = _head(V, image, head // group, v_b, v_h)
    Table = _of_table(Table, head, H, W)
    q = _load(_head(Q, image, head, q_b, q_h), i0, q_t, T, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)  # [BLOCK, BLOCK_D]
    m = tl.full([BLOCK], float("-inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    out = tl.zeros([BLOCK, BLOCK_D], ACC)
    inner, end = _keys(i0, T_k, LAG, SPLIT, BLOCK, STEP)
    for MASKED in tl.static_range(0 if SPLIT else 1, 2):
        for j0 in range(inner if MASKED else 0, end if MASKED else inner, STEP):
            j = j0 + tl.arange(0, STEP)
            k = _load(K, j0, k_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)  # [STEP, BLOCK_D]
            v = _load(V, j0, v_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)
            qk = _dot(q, tl.trans(k), None, TF32)  # [BLOCK, STEP]
            s = _scores(qk, i[:, None], j[None, :], scale, Table, T, W, BIAS)
            if MASKED:
                s = _seen(s, i[:, None], j[None, :], T_k, LAG)
            m_new = tl.maximum(m, tl.max(s, 1))
            base = m_new
            if MASKED:
                base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
            p = tl.exp2(s - base[:, None])
            alpha = tl.exp2(m - base)
            total = total * alpha + tl.sum(p, 1)
            out = _dot(p.to(DOT), v, out * alpha[:, None], TF32)
            m = m_new
    total = tl.where(total > 0, total, 1.0)  # a row that sees nothing: zeros, and p = exp2(-inf - lse) is 0 in backward
    lse = tl.where(m == float("-inf"), 0.0, m + tl.log2(total))
    _store(out / total[:, None], _packed(Out, image, head, n_head, T, HEAD_DIM), i0, n_head * HEAD_DIM, T,
           HEAD_DIM, BLOCK_D, BLOCK)
    tl.store(_of_rows(Lse, image, head, n_head, T) + i, lse, mask=i < T)


@jit
def _attention_dq_kernel(Q, K, V, DO, Table, Out, Lse, Delta, DQ, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                         do_b, do_h, do_t, scale, n_head, group, T, T_k, H, W, LAG: tl.constexpr, BIAS: tl.constexpr,
                         SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
                         STEP: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """A program a tile of queries of a head, over tiles of keys: dq = scale ds k; it also writes Delta (B, n_head, T)."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    blocks = tl.cdiv(T, BLOCK)
    image, head, tile = _place(blocks, n_head)
    i0 = (blocks - 1 - tile) * BLOCK
    i = i0 + tl.arange(0, BLOCK)
    K = _head(K, image, head // group, k_b, k_h)
    V = _head(V, image, head // group, v_b, v_h)
    Table = _of_table(Table, head, H, W)
    q = _load(_head(Q, image, head, q_b, q_h), i0, q_t, T, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)  # [BLOCK, BLOCK_D]
    do = _load(_head(DO, image, head, do_b, do_h), i0, do_t, T, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
    out = _load(_packed(Out, image, head, n_head, T, HEAD_DIM), i0, n_head * HEAD_DIM, T, HEAD_DIM, BLOCK_D, BLOCK)
    delta = tl.sum(out.to(ACC) * do.to(ACC), 1)  # [BLOCK]
    tl.store(_of_rows(Delta, image, head, n_head, T) + i, delta, mask=i < T)
    lse = tl.load(_of_rows(Lse, image, head, n_head, T) + i, mask=i < T, other=float("inf"))
    dq = tl.zeros([BLOCK, BLOCK_D], ACC)
    inner, end = _keys(i0, T_k, LAG, SPLIT, BLOCK, STEP)
    for MASKED in tl.static_range(0 if SPLIT else 1, 2):
        for j0 in range(inner if MASKED else 0, end if MASKED else inner, STEP):
            j = j0 + tl.arange(0, STEP)
            k = _load(K, j0, k_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)  # [STEP, BLOCK_D]
            v = _load(V, j0, v_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)
            qk = _dot(q, tl.trans(k), None, TF32)  # [BLOCK, STEP]
            s = _scores(qk, i[:, None], j[None, :], scale, Table, T, W, BIAS)
            if MASKED:
                s = _seen(s, i[:, None], j[None, :], T_k, LAG)
            p = tl.exp2(s - lse[:, None])
            ds = p * (_dot(do, tl.trans(v), None, TF32) - delta[:, None])
            dq = _dot(ds.to(DOT), k, dq, TF32)
    _store(dq * tl.cast(scale, ACC), _packed(DQ, image, head, n_head, T, HEAD_DIM), i0, n_head * HEAD_DIM, T,
           HEAD_DIM, BLOCK_D, BLOCK)


@jit
def _attention_dkv_kernel(Q, K, V, DO, Table, Lse, Delta, DK, DV, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                          do_b, do_h, do_t, scale, n_head, group, T, T_k, H, W, LAG: tl.constexpr, BIAS: tl.constexpr,
                          SPLIT: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
                          STEP: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """A program a tile of keys, for a head of q, over tiles of queries: dk = scale ds q, dv = p do, of that head alone."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    image, head, tile = _place(tl.cdiv(T_k, BLOCK), n_head)
    j0 = tile * BLOCK
    j = j0 + tl.arange(0, BLOCK)
    Q = _head(Q, image, head, q_b, q_h)
    DO = _head(DO, image, head, do_b, do_h)
    Lse = _of_rows(Lse, image, head, n_head, T)
    Delta = _of_rows(Delta, image, head, n_head, T)
    Table = _of_table(Table, head, H, W)
    k = _load(_head(K, image, head // group, k_b, k_h), j0, k_t, T_k, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)  # [BLOCK, BLOCK_D]
    v = _load(_head(V, image, head // group, v_b, v_h), j0, v_t, T_k, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
    dk = tl.zeros([BLOCK, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK, BLOCK_D], ACC)
    start, inner = _queries(j0, T, LAG, SPLIT, BLOCK, STEP)
    for MASKED in tl.static_range(0 if SPLIT or LAG < 0 else 1, 2 if LAG >= 0 else 1):
        for i0 in range(start if MASKED else inner, inner if MASKED else T, STEP):
            i = i0 + tl.arange(0, STEP)
            q = _load(Q, i0, q_t, T, HEAD_DIM, BLOCK_D, STEP).to(DOT)  # [STEP, BLOCK_D]
            do = _load(DO, i0, do_t, T, HEAD_DIM, BLOCK_D, STEP).to(DOT)
            lse = tl.load(Lse + i, mask=i < T, other=float("inf"))  # so that p is 0 behind the end
            delta = tl.load(Delta + i, mask=i < T, other=0.0)
            kq = _dot(k, tl.trans(q), None, TF32)  # [BLOCK, STEP]
            s = _scores(kq, i[None, :], j[:, None], scale, Table, T, W, BIAS)
            if MASKED:
                s = _seen(s, i[None, :], j[:, None], T_k, LAG)
            p = tl.exp2(s - lse[None, :])
            dv = _dot(p.to(DOT), do, dv, TF32)
            ds = p * (_dot(v, tl.trans(do), None, TF32) - delta[None, :])
            dk = _dot(ds.to(DOT), q, dk, TF32)
    _store(dk * tl.cast(scale, ACC), _packed(DK, image, head, n_head, T_k, HEAD_DIM), j0, n_head * HEAD_DIM, T_k,
           HEAD_DIM, BLOCK_D, BLOCK)
    _store(dv, _packed(DV, image, head, n_head, T_k, HEAD_DIM), j0, n_head * HEAD_DIM, T_k, HEAD_DIM, BLOCK_D, BLOCK)


@jit
def _attention_dbias_kernel(Q, K, V, DO, Table, Lse, Delta, DTable, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
                            do_b, do_h, do_t, scale, images, n_head, group, T, W, LAG: tl.constexpr,
                            HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr,
                            TF32: tl.constexpr):
    """A program a difference of rows, a band of differences of columns, a head, and a share of all images and rows.

    A row of the image is cut into tiles of columns, and band = tile of the query - tile of the key. All pairs of tiles of
    a program have the same differences, so their ds are added up: DTable (splits, n_head, 2H-1, bands, BLOCK, BLOCK).
    """
    H = T // W
    cuts = tl.cdiv(W, BLOCK)
    bands = 2 * cuts - 1
    pid = tl.program_id(0)
    splits = tl.num_programs(0) // (bands * (2 * H - 1) * n_head)
    band = pid % bands - (cuts - 1)
    down = pid // bands % (2 * H - 1) - (H - 1)
    head = pid // (bands * (2 * H - 1)) % n_head
    split = pid // (bands * (2 * H - 1) * n_head)
    rows = H - tl.abs(down)
    columns = cuts - tl.abs(band)
    pairs = images * rows * columns * (down >= 0 if LAG >= 0 else 1)
    Table = _of_table(Table, head, H, W)
    x = tl.arange(0, BLOCK)
    dtable = tl.zeros([BLOCK, BLOCK], Lse.dtype.element_ty)
    for pair in range(pairs * split // splits, pairs * (split + 1) // splits):
        image = pair // (rows * columns)
        row = pair // columns % rows + tl.maximum(down, 0)
        column = pair % columns + tl.maximum(band, 0)
        i0 = row * W + column * BLOCK
        j0 = (row - down) * W + (column - band) * BLOCK
        i_end = (row + 1) * W
        j_end = (row - down + 1) * W
        i = i0 + x
        j = j0 + x
        q = _load(_head(Q, image, head, q_b, q_h), i0, q_t, i_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)  # [BLOCK, BLOCK_D]
        k = _load(_head(K, image, head // group, k_b, k_h), j0, k_t, j_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        v = _load(_head(V, image, head // group, v_b, v_h), j0, v_t, j_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        do = _load(_head(DO, image, head, do_b, do_h), i0, do_t, i_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        lse = tl.load(_of_rows(Lse, image, head, n_head, T) + i, mask=i < i_end, other=float("inf"))
        delta = tl.load(_of_rows(Delta, image, head, n_head, T) + i, mask=i < i_end, other=0.0)
        s = _scores(_dot(q, tl.trans(k), None, TF32), i[:, None], j[None, :], scale, Table, T, W, True)  # [BLOCK, BLOCK]
        s = _seen(s, i[:, None], j[None, :], j_end, LAG)
        dtable += tl.exp2(s - lse[:, None]) * (_dot(do, tl.trans(v), None, TF32) - delta[:, None])
    tl.store(DTable + pid.to(tl.int64) * BLOCK * BLOCK + x[:, None] * BLOCK + x[None, :], dtable)


# ---- what a launch chooses


# Not timed: the largest tiles, 64 rows of queries (128 where matrix units are wgmma or tcgen05) by 32 to 64 keys, with which a
# block has room and no variant of AOT_SPECS and AOT_MORE spills; on AMD nothing is fetched ahead, which takes registers.
TILES = {  # (kind of GPU, bytes of an element, of a row): (BLOCK, STEP, num_warps, num_stages) forward, of dq, of dk and dv,
    # and of dbias without a STEP; "tf32" for that, where it differs
    ("sm_80", 2, 128): ((64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2), (32, 4, 2)),
    ("sm_80", 2, 256): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (16, 4, 2)),
    ("sm_80", 2, 512): ((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (16, 8, 2)),
    ("sm_80", 4, 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (32, 8, 2)),
    ("sm_80", 4, 512): ((16, 16, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2), (32, 8, 2)),
    ("sm_80", 4, 1024): ((16, 16, 4, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 8, 2)),
    ("sm_90", 2, 128): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (32, 4, 2)),
    ("sm_90", 2, 256): ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 4, 2)),
    ("sm_90", 4, 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 8, 2)),
    ("sm_100", 2, 128): ((128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 2), (32, 4, 2)),
    ("sm_100", 2, 256): ((128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2), (32, 4, 2)),
    ("tf32", 4, 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2), (32, 4, 2)),
    ("gfx9", 2, 128): ((64, 32, 4, 1), (64, 32, 4, 1), (64, 32, 4, 1), (16, 4, 1)),
    ("gfx9", 2, 256): ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (16, 4, 1)),
    ("gfx9", 2, 512): ((32, 16, 4, 1), (32, 16, 4, 1), (32, 16, 4, 1), (16, 4, 1)),
    ("gfx9", 4, 256): ((32, 32, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1), (16, 4, 1)),
    ("gfx9", 4, 512): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 4, 1)),
    ("gfx9", 4, 1024): ((16, 16, 8, 1), (16, 16, 4, 1), (16, 16, 4, 1), (16, 4, 1)),
    ("gfx11", 2, 128): ((64, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1), (32, 4, 1)),
    ("gfx11", 4, 256): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 4, 1)),
}
MOST = {"gfx11": 64}  # the largest head_dim; with 128 a tile would need more registers than there are


def _tiles(kernel, gpu, element_size, head_dim, tf32=False):
    """Constants of a kernel, FWD, DQ, DKV or DBIAS, for a kind of GPU."""
    block_d = power_of_2(head_dim)
    size = min(element_size, 4)
    row = max(64 * size, block_d * element_size)
    rows = TILES.get(("tf32", size, row)) if tf32 else None
    rows = rows or TILES.get((gpu, size, row)) or TILES["sm_80", size, row]  # others, and the longest rows, as the A100
    *blocks, num_warps, num_stages = rows[kernel]
    constants = {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK": blocks[0], "num_warps": num_warps, "num_stages": num_stages}
    if kernel == DBIAS:
        return constants
    return constants | {"STEP": blocks[1], "SPLIT": gpu != "gfx11"}


@functools.lru_cache
def _constants(kernel, gpu, dtype, head_dim, lag, tf32):
    return {"LAG": lag, "DOT": dot_type(dtype), "TF32": tf32} | _tiles(kernel, gpu, dtype.itemsize, head_dim, tf32)


def _chosen(kernel, q, lag):
    """The constants with which a kernel is launched: FWD, DQ, DKV or DBIAS."""
    tf32 = torch.version.hip is None and getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    return _constants(kernel, gpu_kind(q.device), q.dtype, q.shape[-1], lag, tf32)


# ---- operators


def _new(x):
    """Room for a result of the shape of x that lies (B, T, n_head, head_dim), as the layer behind attention reads it."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _room(k, n_head):
    """Room for the gradient of k; where heads of q share those of k, for one a head of q, in the type of accumulation."""
    B, n_head_kv, T, head_dim = k.shape
    if n_head == n_head_kv:
        return _new(k)
    return k.new_empty(B, T, n_head, head_dim, dtype=accumulator(k)).transpose(1, 2)


def _summed(dk, k):
    """The gradient of k, of what _room gave: the sum over the heads of q that share it."""
    if dk.shape == k.shape:
        return dk
    return dk.transpose(1, 2).unflatten(2, (k.shape[1], -1)).sum(3).to(k.dtype).transpose(1, 2)


def _image(q, bias):
    """The table of the bias, or anything in its place, and the height and width of the image."""
    if bias is None:
        return q, 1, 1
    return bias.contiguous(), (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2


def _sizes(q, k, scale, H, W):
    """The numbers that follow the strides of the first three kernels."""
    return scale, q.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], H, W


def _fake_fwd(q, k, v, bias, lag, scale):
    return _new(q), q.new_empty(q.shape[:3], dtype=accumulator(q))


def _save(ctx, inputs, output):
    *tensors, ctx.lag, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, dlse):
    q, k, v, bias, out, lse = ctx.saved_tensors
    need = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = _bwd(do, q, k, v, bias, out, lse, ctx.lag, ctx.scale, need)
    return dq, dk, dv, dbias if need else None, None, None


@operator("attention_fwd", _fake_fwd, _save, _backward)
def _fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, lag: int,
         scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp, (B, n_head, T), in units of log2."""
    B, n_head, T, _ = q.shape
    q, k, v, strides = _rows(q, k, v)
    table, H, W = _image(q, bias)
    constants = _chosen(FWD, q, lag)
    out = _new(q)
    lse = q.new_empty(B, n_head, T, dtype=accumulator(q))
    programs = B * n_head * cdiv(T, constants["BLOCK"])
    launch(_attention_fwd_kernel, programs, q, k, v, table, out, lse, *strides, *_sizes(q, k, scale, H, W),
           BIAS=bias is not None, **constants)
    return out, lse


def _fake_bwd(do, q, k, v, bias, out, lse, lag, scale, need_dbias):
    return _new(q), _new(k), _new(v), bias.new_empty(bias.shape) if need_dbias else q.new_empty(0)


@operator("attention_bwd", _fake_bwd)
def _bwd(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor,
         lse: torch.Tensor, lag: int, scale: float,
         need_dbias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv and dbias; the last is empty where it is not needed."""
    B, n_head, T, _ = q.shape
    q, k, v, do, strides = _rows(q, k, v, do)
    out = out.transpose(1, 2).contiguous().transpose(1, 2)  # hooks may save it in another layout
    lse = lse.contiguous()
    table, H, W = _image(q, bias)
    sizes = _sizes(q, k, scale, H, W)
    delta = torch.empty_like(lse)
    dq = _new(q)
    constants = _chosen(DQ, q, lag)
    programs = B * n_head * cdiv(T, constants["BLOCK"])
    launch(_attention_dq_kernel, programs, q, k, v, do, table, out, lse, delta, dq, *strides, *sizes, BIAS=bias is not None,
           **constants)
    dk = _room(k, n_head)
    dv = _room(v, n_head)
    constants = _chosen(DKV, q, lag)
    programs = B * n_head * cdiv(k.shape[2], constants["BLOCK"])
    launch(_attention_dkv_kernel, programs, q, k, v, do, table, lse, delta, dk, dv, *strides, *sizes, BIAS=bias is not None,
           **constants)
    dk = _summed(dk, k)
    dv = _summed(dv, v)
    if not need_dbias:
        return dq, dk, dv, q.new_empty(0)
    constants = _chosen(DBIAS, q, lag)
    block = min(constants["BLOCK"], max(16, power_of_2(W)))
    cuts = cdiv(W, block)
    programs = n_head * (2 * H - 1) * (2 * cuts - 1)
    splits = max(1, min(cdiv(B * H * cuts, DBIAS_PAIRS), 4096 // programs))
    part = q.new_empty(splits, n_head, 2 * H - 1, 2 * cuts - 1, block, block, dtype=lse.dtype)
    launch(_attention_dbias_kernel, splits * programs, q, k, v, do, table, lse, delta, part, *strides, scale, B, n_head,
           n_head // k.shape[1], T, W, **constants | {"BLOCK": block})
    return dq, dk, dv, _along_diagonals(part.sum(0), W).to(bias.dtype)


def _along_diagonals(part, W):
    """Sums of tiles (n_head, 2H-1, bands, BLOCK, BLOCK) over equal differences of columns: (n_head, 2H-1, 2W-1)."""
    block = part.shape[-1]
    cuts = (part.shape[2] + 1) // 2
    # reversed, and with rows one longer than 2 block - 2, equal i - j stand below each other
    part = F.pad(part.flip(-1), (0, block)).flatten(-2)[..., :-block].unflatten(-1, (block, 2 * block - 1)).sum(-2)
    first = part[..., :block - 1]
    second = part[..., block - 1:]  # which is where the next band's first begins
    dbias = (F.pad(first, (1, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))).flatten(2)  # differences from -cuts * block on
    return dbias[..., cuts * block - W + 1:cuts * block + W].contiguous()


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[bool, str]:
    """(whether the kernels take these arguments, the reason where they do not)."""
    tensors = [x for x in (q, k, v, bias) if x is not None]
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return False, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    most = MOST.get(gpu_kind(q.device), 256) // (2 if q.dtype == torch.float64 else 1)
    if not 16 <= q.shape[-1] <= most or any(x.device != q.device for x in tensors):
        return False, f"head_dim {q.shape[-1]} is not in 16..{most}, or the tensors are on several devices"
    return True, ""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: str | torch.Tensor | None = None,
              bias: torch.Tensor | None = None, *, scale: float | None = None, backend: str | None = None) -> torch.Tensor:
    """Attention of q over k and v. q (B, n_head, T, head_dim), k, v (B, n_head_kv, T, head_dim), any strides -> shape of q.

    n_head_kv divides n_head: heads of q share those of k and v in order. mask: None, "causal" (position i sees j <= i),
    "strict" (j < i, row 0 is zeros), or a bias. bias: (n_head, 2H-1, 2W-1) with T = H*W, added to the scores by difference
    of rows and columns, beside any mask. k and v may have another T where there is neither. scale: of q . k, by default
    1/sqrt(head_dim). backend: one of kernels.MODES, for this call. q, k and v have one type; under autocast they are taken
    in its type. Differentiable once in q, k, v and bias. Raises ValueError for a mask or shapes that do not fit, and what
    use_triton raises.
    """
    if isinstance(mask, torch.Tensor):
        bias = mask
        mask = None
    if mask not in LAGS:
        raise ValueError(f"attention: mask {mask!r} must be None, 'causal', 'strict' or a bias")
    fit = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fit or q.shape[1] % max(k.shape[1], 1) or q.shape[2] != k.shape[2] and not mask is bias is None:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if bias is not None and (bias.dim() != 3 or len(bias) != q.shape[1] or not bias.shape[1] % 2 == bias.shape[2] % 2 == 1
                             or (bias.shape[1] + 1) * (bias.shape[2] + 1) != 4 * q.shape[2]):
        raise ValueError(f"attention: bias {tuple(bias.shape)} must be (n_head, 2H-1, 2W-1), H*W = T, for q {tuple(q.shape)}")
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if use_triton("attention", q, lambda: supports(q, k, v, bias), least=LEAST, library=bias is None, backend=backend):
        q, scale = scaled(q, scale)
        return _fwd(q, k, v, bias, LAGS[mask], scale)[0]
    return attention_torch(q, k, v, mask, bias, scale)


KERNELS = "_attention_fwd_kernel", "_attention_dq_kernel", "_attention_dkv_kernel", "_attention_dbias_kernel"


def _spec(kernel, dtype, head_dim=64, mask=None, bias=True, tf32=False, registers=255):
    """A variant with what a launch would choose on each target."""
    size = {"fp32": 4, "bf16": 2, "fp16": 2}[dtype]
    constants = {}
    for target, gpu in {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "gfx9", "gfx1100": "gfx11"}.items():
        constants[target] = None
        if head_dim <= MOST.get(gpu, 256):
            here = tf32 and gpu[:2] == "sm"
            constants[target] = _tiles(kernel, gpu, size, head_dim, here) | {"TF32": here}
    args = dict.fromkeys(("Q", "K", "V", "DO", "Out", "DQ", "DK", "DV"), f"*{dtype}")
    args |= dict.fromkeys(("Table", "Lse", "Delta", "DTable"), "*fp32")
    args |= dict.fromkeys(("n_head", "T", "T_k", "H", "W", "images"), "i32") | {"scale": "fp32", "group": 1}
    args |= {"LAG": LAGS[mask], "BIAS": bias, "DOT": {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]}
    usual = constants.pop("sm_80")  # and sm_86, sm_89 and sm_120
    args |= usual
    name = ", ".join([dtype, f"head_dim {head_dim}", *filter(None, [mask, bias and kernel != DBIAS and "bias",
                                                                  tf32 and "tf32"])])
    few = 32 if kernel == DBIAS else 16  # so few numbers of a tile that gfx942's threads have one or two each
    # float32 products with all digits use no matrix unit on sm_80
    return Spec(KERNELS[kernel], name, {x: args.get(x, "i32:16") for x in globals()[KERNELS[kernel]].arg_names},  # strides
                usual["num_warps"], usual["num_stages"], registers, vector=head_dim > few, matrix=dtype != "fp32",
                own=constants)


def _passes(dtype, head_dim, mask, bias, **more):
    """A variant of each kernel."""
    kernels = (FWD, DQ, DKV, DBIAS) if bias else (FWD, DQ, DKV)
    return [_spec(kernel, dtype, head_dim, mask, bias, **more) for kernel in kernels]


AOT_SPECS = [] if triton is None else [
    *_passes("fp32", 64, "causal", True),
    *_passes("fp32", 64, "causal", True, tf32=True),
    *_passes("bf16", 64, "causal", True),
    *_passes("bf16", 64, "strict", False),
    *_passes("bf16", 128, "causal", True),
    _spec(FWD, "fp16", 64),
]
AOT_MORE = [] if triton is None else [  # what a launch may choose besides: one head_dim of each tile, and some between
    *(spec for dtype in ("fp32", "bf16") for spec in _passes(dtype, 64, None, True)),
    *(spec for dtype in ("fp32", "bf16") for head_dim in (16, 32, 40, 80, 96, 128, 256)
      for spec in _passes(dtype, head_dim, "causal", True) if spec not in AOT_SPECS),
    *(spec for dtype in ("fp32", "bf16") for head_dim in (64, 128) for spec in _passes(dtype, head_dim, "strict", True)),
    *(spec for head_dim in (16, 64, 128, 256) for spec in _passes("fp16", head_dim, "causal", True)),
    *(spec for head_dim in (128, 256) for spec in _passes("fp32", head_dim, "causal", True, tf32=True)),
]
