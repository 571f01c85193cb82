"""Attention over raster positions, forward and backward (Vaswani et al. 2017, in tiles as Dao 2023).

    o_i = sum_j p_ij v_j,  p_i = softmax_j(q_i . k_j / sqrt(head_dim) + b_ij)  over the j that i may see

q, k, v, o (B, n_head, T, head_dim). Position i sees every j, or j <= i ("causal"), or j < i ("strict": position 0 sees
nothing, its output and gradients are 0). b is 0, or a 2-D relative-position bias (n_head, 2H-1, 2W-1) of an image with
T = H*W: b_ij = bias[row_i - row_j + H-1, column_i - column_j + W-1], looked up and differentiated in the kernels, so that
nothing of T x T is ever stored. Beside o only the log-sum-exp of every row is kept.

Least bytes, n = bytes of q: forward 4n, backward 8n. By design each of the T / BLOCK tiles reads its counterparts again,
on a GPU from L2: forward moves (2 + 2 tiles) n, dq (4 + 2 tiles) n, dk and dv (4 + 2 tiles) n, with half as many tiles, rounded
up, under a causal mask; the bias gradient reads 4n for each of the H rows of the image and each tile of a row. With a bias
each pass besides reads an entry of the table for every score, from the table's few kilobytes in the L1 cache.

When not: without a mask and for "causal" PyTorch's own kernels are faster, and mode "auto" takes those; for one new position
over a cache there is decode_attention (decode_attention.py).
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import FLOATS, INTERPRETING, Spec, accumulator, jit, launching, tl, triton, use_triton
from .decode_attention import _at, _load, _rows, decode_attention  # noqa: F401

LAGS = {None: -1, "causal": 0, "strict": 1}  # mask: i sees j where i - j >= lag; -1: everywhere
TILE_BYTES = 8192  # of one tile of q, k or v, at most 64 rows and at least 16
DBIAS_PAIRS = 64  # pairs of tiles that a program of the bias gradient adds up, about, where programs can be spared
PLAIN_SCORES = 1 << 22  # scores that the plain form with a bias holds at once, or one row of the image


def attention_reference(q, k, v, mask=None, bias=None):
    i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # (B, n_head, T, T_k)
    if bias is not None:
        H, W = (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2
        s = s + bias[:, i // W - j // W + H - 1, i % W - j % W + W - 1]
    seen = (i - j >= LAGS[mask]) | (LAGS[mask] < 0)
    s = s.masked_fill(~seen & seen.any(1, keepdim=True), -float("inf"))  # a row that sees nothing stays finite,
    return (torch.softmax(s, -1) * seen) @ v  # and is 0 here


def attention_torch(q, k, v, mask=None, bias=None):
    """The fastest plain form: PyTorch's kernels; "strict" is "causal" with keys one earlier; a bias goes by image rows."""
    if bias is not None:
        return _attention_bias_torch(q, k, v, LAGS[mask], bias)
    if mask != "strict":
        return F.scaled_dot_product_attention(q, k, v, is_causal=mask == "causal")
    y = F.scaled_dot_product_attention(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True)
    return F.pad(y, (0, 0, 1, 0))[:, :, :q.shape[2]]


def _attention_bias_torch(q, k, v, lag, bias):
    """A few rows of the image at a time, recomputed in the backward pass: memory grows with T, not with its square."""
    (B, n_head, T, _), H, W = q.shape, (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2
    rows = max(1, min(H, PLAIN_SCORES // max(B * n_head * W * T, 1)))
    again = rows < H and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias))

    def part(q, k, v, bias, first, last):
        b = bias.flip(1, 2)[:, H - last:2 * H - 1 - first].unfold(1, H, 1).unfold(2, W, 1)  # (n_head, last-first, W, H, W),
        b = b.flip(1, 2).reshape(n_head, (last - first) * W, T)[:, :, :k.shape[2]]  # from the last query to the first
        if lag >= 0:
            i, j = torch.arange(first * W, last * W, device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
            b = b.masked_fill((i - j < lag) & (j > 0), -float("inf"))  # the first row stays finite, and is dropped below
        return F.scaled_dot_product_attention(q, k, v, attn_mask=b[None])

    y = []
    for first in range(0, H, rows):
        last = min(first + rows, H)
        end = last * W if lag >= 0 else T
        args = q[:, :, first * W:last * W], k[:, :, :end], v[:, :, :end], bias, first, last
        y.append(checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False) if again else part(*args))
    y = torch.cat(y, 2)
    return F.pad(y[:, :, 1:], (0, 0, 1, 0)) if lag == 1 else y


# ---- kernels: a head is image * n_head + head; scores are in units of log2; ACC is the type of Lse


@jit
def _packed(X, head, n_head, t0, T, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """As _at, for a result, which lies (B, T, n_head, head_dim)."""
    return _at(X, head, n_head, tl.cast(n_head * HEAD_DIM, tl.int64) * T, HEAD_DIM, t0, n_head * HEAD_DIM, T,
               HEAD_DIM, BLOCK_D, BLOCK)


@jit
def _dot(a, b, c, TF32: tl.constexpr):
    return tl.dot(a, b, c, input_precision="tf32" if TF32 else "ieee")


@jit
def _scores(qk, i, j, T, T_k, Table, H, W, head, n_head, LAG: tl.constexpr, BIAS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Scores from products q . k: scaled, biased, -inf where i does not see j. i and j broadcast to the shape of qk."""
    seen = (i < T) & (j < T_k)
    if LAG >= 0:
        seen = seen & (j + LAG <= i)
    s = qk * (HEAD_DIM ** -0.5 * 1.4426950408889634)
    if BIAS:
        middle = head % n_head * (2 * H - 1) * (2 * W - 1) + (H - 1) * (2 * W - 1) + W - 1
        offsets = (i + i // W * (W - 1)) - (j + j // W * (W - 1))  # a row down is 2W-1 further
        s += tl.load(Table + middle + offsets, mask=seen, other=0.0).to(qk.dtype) * 1.4426950408889634
    return tl.where(seen, s, float("-inf"))


@jit
def _attention_fwd_kernel(Q, K, V, Table, Out, Lse, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, n_head, T, T_k, H, W,
                          LAG: tl.constexpr, BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                          BLOCK: tl.constexpr, STEP: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """A program a tile of rows of a head: softmax online over tiles of keys."""
    ACC: tl.constexpr = Lse.dtype.element_ty
    blocks = tl.cdiv(T, BLOCK)
    head, i0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    i, end = i0 + tl.arange(0, BLOCK), T_k if LAG < 0 else tl.minimum(T_k, i0 + BLOCK - LAG)
    q = _load(Q, head, n_head, q_b, q_h, i0, q_t, T, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
    m, total, out = tl.full([BLOCK], float("-inf"), ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK, BLOCK_D], ACC)
    for j0 in range(0, end, STEP):
        j = j0 + tl.arange(0, STEP)
        k = _load(K, head, n_head, k_b, k_h, j0, k_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)
        v = _load(V, head, n_head, v_b, v_h, j0, v_t, T_k, HEAD_DIM, BLOCK_D, STEP).to(DOT)
        s = _scores(_dot(q, tl.trans(k), None, TF32), i[:, None], j[None, :], T, T_k, Table, H, W, head, n_head,
                    LAG, BIAS, HEAD_DIM)
        m_new = tl.maximum(m, tl.max(s, 1))
        base = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
        p, alpha = tl.exp2(s - base[:, None]), tl.exp2(m - base)
        total = total * alpha + tl.sum(p, 1)
        out = _dot(p.to(DOT), v, out * alpha[:, None], TF32)
        m = m_new
    total = tl.where(total > 0, total, 1.0)  # a row that sees nothing: zeros, and p = exp2(-inf - lse) is 0 in backward
    lse = tl.where(m == float("-inf"), 0.0, m + tl.log2(total))
    pointers, inside = _packed(Out, head, n_head, i0, T, HEAD_DIM, BLOCK_D, BLOCK)
    tl.store(pointers, (out / total[:, None]).to(Out.dtype.element_ty), mask=inside)
    tl.store(Lse + head.to(tl.int64) * T + i, lse, mask=i < T)


@jit
def _attention_bwd_kernel(A, A2, B, B2, Table, Out, Lse, Delta, DA, DA2, a_b, a_h, a_t, a2_b, a2_h, a2_t, b_b, b_h, b_t,
                          b2_b, b2_h, b2_t, n_head, T, T_k, H, W, KEYS: tl.constexpr, LAG: tl.constexpr, BIAS: tl.constexpr,
                          HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
                          DOT: tl.constexpr, TF32: tl.constexpr):
    """A program a tile of rows x = (q, do), against tiles y = (k, v), or with KEYS a tile x = (k, v) against y = (q, do).

    s = a_x b_y, dp = a2_x b2_y, ds = p (dp - delta); da_x = sum_y ds b_y is dq or dk, da2_x = sum_y p b2_y is dv.
    The first also writes Delta = sum over head_dim of out * do, which the second reads.
    """
    ACC: tl.constexpr = Lse.dtype.element_ty
    size, size_y = (T_k, T) if KEYS else (T, T_k)
    blocks = tl.cdiv(size, BLOCK)
    head, x0 = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    x, row = x0 + tl.arange(0, BLOCK), head.to(tl.int64) * T
    a = _load(A, head, n_head, a_b, a_h, x0, a_t, size, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
    a2 = _load(A2, head, n_head, a2_b, a2_h, x0, a2_t, size, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
    da, da2 = tl.zeros([BLOCK, BLOCK_D], ACC), tl.zeros([BLOCK, BLOCK_D], ACC)
    start, end = x0 if KEYS and LAG >= 0 else 0, tl.minimum(T_k, x0 + BLOCK - LAG) if LAG >= 0 and not KEYS else size_y
    if not KEYS:
        pointers, inside = _packed(Out, head, n_head, x0, T, HEAD_DIM, BLOCK_D, BLOCK)
        delta = tl.sum(tl.load(pointers, mask=inside, other=0.0).to(ACC) * a2.to(ACC), 1)[:, None]
        lse = tl.load(Lse + row + x, mask=x < T, other=0.0)[:, None]
        tl.store(Delta + row + x[:, None], delta, mask=x[:, None] < T)
    for y0 in range(start, end, STEP):
        y = y0 + tl.arange(0, STEP)
        b = _load(B, head, n_head, b_b, b_h, y0, b_t, size_y, HEAD_DIM, BLOCK_D, STEP).to(DOT)
        b2 = _load(B2, head, n_head, b2_b, b2_h, y0, b2_t, size_y, HEAD_DIM, BLOCK_D, STEP).to(DOT)
        i, j = x[:, None], y[None, :]
        if KEYS:
            i, j = y[None, :], x[:, None]
            lse = tl.load(Lse + row + i, mask=i < T, other=0.0)
            delta = tl.load(Delta + row + i, mask=i < T, other=0.0)
        s = _scores(_dot(a, tl.trans(b), None, TF32), i, j, T, T_k, Table, H, W, head, n_head, LAG, BIAS, HEAD_DIM)
        p = tl.exp2(s - lse)
        if KEYS:
            da2 = _dot(p.to(DOT), b2, da2, TF32)
        ds = p * (_dot(a2, tl.trans(b2), None, TF32) - delta)
        da = _dot(ds.to(DOT), b, da, TF32)
    pointers, inside = _packed(DA, head, n_head, x0, size, HEAD_DIM, BLOCK_D, BLOCK)
    tl.store(pointers, (da * HEAD_DIM ** -0.5).to(DA.dtype.element_ty), mask=inside)
    if KEYS:
        pointers, inside = _packed(DA2, head, n_head, x0, size, HEAD_DIM, BLOCK_D, BLOCK)
        tl.store(pointers, da2.to(DA2.dtype.element_ty), mask=inside)


@jit
def _attention_dbias_kernel(Q, DO, K, V, Table, Lse, Delta, DTable, q_b, q_h, q_t, do_b, do_h, do_t, k_b, k_h, k_t,
                            v_b, v_h, v_t, images, n_head, T, H, W, splits, LAG: tl.constexpr, HEAD_DIM: tl.constexpr,
                            BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr, TF32: tl.constexpr):
    """A program a difference of rows, a band of differences of columns, a head, and a share of all images and rows.

    A row of the image is cut into tiles of columns, and band = tile of the query - tile of the key. All pairs of tiles of
    a program have the same differences, so their ds are added up: DTable (splits, n_head, 2H-1, bands, BLOCK, BLOCK).
    """
    pid, cuts = tl.program_id(0), tl.cdiv(W, BLOCK)
    band, rest = pid % (2 * cuts - 1) - (cuts - 1), pid // (2 * cuts - 1)
    down, rest = rest % (2 * H - 1) - (H - 1), rest // (2 * H - 1)
    h, split = rest % n_head, rest // n_head
    rows, columns = H - tl.abs(down), cuts - tl.abs(band)
    pairs = images * rows * columns * (down >= 0 if LAG >= 0 else 1)
    x, dtable = tl.arange(0, BLOCK), tl.zeros([BLOCK, BLOCK], Lse.dtype.element_ty)
    for pair in range(pairs * split // splits, pairs * (split + 1) // splits):
        head = pair // (rows * columns) * n_head + h
        r, c = pair // columns % rows + tl.maximum(down, 0), pair % columns + tl.maximum(band, 0)
        i0, i_end, j0, j_end = r * W + c * BLOCK, (r + 1) * W, (r - down) * W + (c - band) * BLOCK, (r - down + 1) * W
        i, j = tl.where(i0 + x < i_end, i0 + x, T), tl.where(j0 + x < j_end, j0 + x, T)
        q = _load(Q, head, n_head, q_b, q_h, i0, q_t, i_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        k = _load(K, head, n_head, k_b, k_h, j0, k_t, j_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        v = _load(V, head, n_head, v_b, v_h, j0, v_t, j_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        do = _load(DO, head, n_head, do_b, do_h, i0, do_t, i_end, HEAD_DIM, BLOCK_D, BLOCK).to(DOT)
        lse = tl.load(Lse + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
        delta = tl.load(Delta + head.to(tl.int64) * T + i, mask=i < T, other=0.0)
        s = _scores(_dot(q, tl.trans(k), None, TF32), i[:, None], j[None, :], T, T, Table, H, W, head, n_head,
                    LAG, True, HEAD_DIM)
        dtable += tl.exp2(s - lse[:, None]) * (_dot(do, tl.trans(v), None, TF32) - delta[:, None])
    tl.store(DTable + pid.to(tl.int64) * BLOCK * BLOCK + x[:, None] * BLOCK + x[None, :], dtable)


# ---- operators


def _new(x):
    """Room for a result of the shape of x that lies (B, T, n_head, head_dim), as the layer behind attention reads it."""
    return torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _tiles(head_dim, element_size, forward, lag, bias, hip=torch.version.hip is not None):
    """Constants for tiles that stay in registers; on AMD smaller ones, and none is fetched ahead, which takes registers too:
    the float32 forward kernel with a bias and no mask would spill so everywhere."""
    block_d = triton.next_power_of_2(head_dim)
    block = max(16, min(64, TILE_BYTES // (1 + hip) // (block_d * element_size)))
    return {"HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK": block, "STEP": min(block, 16 if hip else 64 if forward else 32),
            "num_warps": 8 if element_size > 2 else 4,
            "num_stages": 1 if hip or forward and bias and lag < 0 and element_size > 2 else 2}


def _prepare(q, bias, lag, forward):
    """(bias or anything in its place, H, W), and the constants of the kernels."""
    own = {torch.float16: tl.float16, torch.bfloat16: tl.float32 if INTERPRETING else tl.bfloat16, torch.float32: tl.float32}
    tf32 = torch.version.hip is None and getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32"
    constants = {"LAG": lag, "DOT": own.get(q.dtype, tl.float64), "TF32": tf32}
    constants |= _tiles(q.shape[-1], q.element_size(), forward, lag, bias is not None)
    image = (q, 1, 1) if bias is None else (bias.contiguous(), (bias.shape[1] + 1) // 2, (bias.shape[2] + 1) // 2)
    return image, constants


@torch.library.custom_op("m2::attention_fwd", mutates_args=())
def _fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
         lag: int) -> tuple[torch.Tensor, torch.Tensor]:
    (q, k, v, strides), (B, n_head, T, _), ((table, H, W), constants) = _rows(q, k, v), q.shape, _prepare(q, bias, lag, True)
    out, lse = _new(q), q.new_empty(B, n_head, T, dtype=accumulator(q))
    with launching(q):
        _attention_fwd_kernel[(B * n_head * triton.cdiv(T, constants["BLOCK"]),)](
            q, k, v, table, out, lse, *strides, n_head, T, k.shape[2], H, W, BIAS=bias is not None, **constants)
    return out, lse


@_fwd.register_fake
def _(q, k, v, bias, lag):
    return _new(q), q.new_empty(q.shape[:3], dtype=accumulator(q))


@torch.library.custom_op("m2::attention_bwd", mutates_args=())
def _bwd(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None,
         out: torch.Tensor, lse: torch.Tensor, lag: int,
         dbias: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (q, do, k, v, strides), (B, n_head, T, _), T_k = _rows(q, do, k, v), q.shape, k.shape[2]
    out, lse = out.transpose(1, 2).contiguous().transpose(1, 2), lse.contiguous()  # hooks may save them in another layout
    (table, H, W), constants = _prepare(q, bias, lag, False)
    dq, dk, dv, delta, block, biased = _new(q), _new(k), _new(v), torch.empty_like(lse), constants["BLOCK"], bias is not None
    with launching(q):
        _attention_bwd_kernel[(B * n_head * triton.cdiv(T, block),)](
            q, do, k, v, table, out, lse, delta, dq, dq, *strides, n_head, T, T_k, H, W, KEYS=False, BIAS=biased, **constants)
        _attention_bwd_kernel[(B * n_head * triton.cdiv(T_k, block),)](
            k, v, q, do, table, out, lse, delta, dk, dv, *strides[6:], *strides[:6], n_head, T, T_k, H, W, KEYS=True,
            BIAS=biased, **constants)
        if not dbias:
            return dq, dk, dv, q.new_empty(0)
        block = min(constants.pop("STEP"), max(16, triton.next_power_of_2(W)))
        cuts = triton.cdiv(W, block)
        programs = n_head * (2 * H - 1) * (2 * cuts - 1)
        splits = max(1, min(triton.cdiv(B * H * cuts, DBIAS_PAIRS), 4096 // programs))
        part = q.new_empty(splits, n_head, 2 * H - 1, 2 * cuts - 1, block, block, dtype=lse.dtype)
        constants |= {"BLOCK": block, "num_warps": 4 if constants["BLOCK_D"] <= 64 else 8}
        _attention_dbias_kernel[(splits * programs,)](q, do, k, v, table, lse, delta, part, *strides, B, n_head, T, H, W,
                                                      splits, **constants)
    # along diagonals: reversed, and with rows one longer than 2 block - 2, equal i - j stand below each other
    part = F.pad(part.sum(0).flip(-1), (0, block)).flatten(-2)[..., :-block].unflatten(-1, (block, 2 * block - 1)).sum(-2)
    first, second = part[..., :block - 1], part[..., block - 1:]  # which is where the next band's first begins
    dbias = (F.pad(first, (1, 0, 0, 1)) + F.pad(second, (0, 0, 1, 0))).flatten(2)  # differences from -cuts * block on
    return dq, dk, dv, dbias[..., cuts * block - W + 1:cuts * block + W].to(bias.dtype).contiguous()


@_bwd.register_fake
def _(do, q, k, v, bias, out, lse, lag, dbias):
    return _new(q), _new(k), _new(v), bias.new_empty(bias.shape) if dbias else q.new_empty(0)


def _save(ctx, inputs, output):
    *tensors, ctx.lag = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do, dlse):
    need = ctx.needs_input_grad[3]
    *gradients, dbias = _bwd(do, *ctx.saved_tensors, ctx.lag, need)
    return *gradients, dbias if need else None, None


_fwd.register_autograd(_backward, setup_context=_save)


def supports(q, k, v, bias=None):
    tensors = [x for x in (q, k, v, bias) if x is not None]
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        return False, f"q is {q.dtype}, k {k.dtype}, v {v.dtype}"
    most = 128 if q.dtype == torch.float64 else 256  # what shared memory holds
    if not 16 <= q.shape[-1] <= most or any(x.device != q.device for x in tensors):
        return False, f"head_dim {q.shape[-1]} is not in 16..{most}, or the tensors are on several devices"
    return True, ""


def attention(q, k, v, mask=None, bias=None):
    """Attention of q over k and v at scale 1/sqrt(head_dim). q, k, v (B, n_head, T, head_dim), any strides -> that shape.

    mask: None, "causal" (position i sees j <= i), "strict" (j < i, row 0 is zeros), or a bias. bias: (n_head, 2H-1, 2W-1)
    with T = H*W, added to the scores by difference of rows and columns, beside any mask. k and v may have another T where
    there is neither. Differentiable once in q, k, v and bias. Raises ValueError for a mask or shapes that do not fit, and
    what use_triton raises.
    """
    mask, bias = (None, mask) if isinstance(mask, torch.Tensor) else (mask, bias)
    if mask not in LAGS:
        raise ValueError(f"attention: mask {mask!r} must be None, 'causal', 'strict' or a bias")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or (
            q.shape[2] != k.shape[2] and not mask is bias is None):
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit")
    if bias is not None and (bias.dim() != 3 or len(bias) != q.shape[1] or not bias.shape[1] % 2 == bias.shape[2] % 2 == 1
                             or (bias.shape[1] + 1) * (bias.shape[2] + 1) != 4 * q.shape[2]):
        raise ValueError(f"attention: bias {tuple(bias.shape)} must be (n_head, 2H-1, 2W-1), H*W = T, for q {tuple(q.shape)}")
    if use_triton("attention", q, lambda: supports(q, k, v, bias), least=1 << 16, library=bias is None and mask != "strict"):
        return _fwd(q, k, v, bias, LAGS[mask])[0]
    return attention_torch(q, k, v, mask, bias)


def _spec(kernel, dtype, registers, mask=None, **more):
    dot = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    nvidia, hip = (_tiles(64, dot.primitive_bitwidth // 8, "fwd" in kernel, LAGS[mask], more.get("BIAS"), hip)
                   for hip in (False, True))
    if "dbias" in kernel:
        nvidia, hip = (x | {"BLOCK": x["STEP"], "num_warps": 4} for x in (nvidia, hip))
    args = dict.fromkeys(("Q", "K", "V", "DO", "A", "A2", "B", "B2", "Out", "DA", "DA2"), f"*{dtype}")
    args |= dict.fromkeys(("Table", "Lse", "Delta", "DTable"), "*fp32")
    args |= dict.fromkeys(("n_head", "T", "T_k", "H", "W", "images", "splits"), "i32")
    args |= {"LAG": LAGS[mask], "DOT": dot, "TF32": False} | nvidia | more
    args = {x: args.get(x, "i32:16") for x in globals()[kernel].arg_names}  # strides are multiples of 16
    name = ", ".join([dtype, *filter(None, [mask, args.get("BIAS") and "bias", args.get("KEYS") and "keys",
                                          args["TF32"] and "tf32"])])
    # float32 products with all digits use no matrix unit on sm_80, and AMD has no tf32
    return Spec(kernel, name, args, nvidia["num_warps"], nvidia["num_stages"], registers, matrix=dtype != "fp32",
                hip=hip | {"TF32": False})


AOT_SPECS = [] if triton is None else [
    spec for t, fwd, rows, keys, dbias in (
        ("fp32", 112, 112, 136, 176), ("bf16", 240, 208, 255, 236), ("fp16", 240, 208, 255, 236))
    for spec in (
        *(spec for mask, bias in (("strict", False), ("causal", True), (None, True)) for spec in (
            _spec("_attention_fwd_kernel", t, fwd, mask, BIAS=bias),
            _spec("_attention_bwd_kernel", t, rows, mask, BIAS=bias, KEYS=False),
            _spec("_attention_bwd_kernel", t, keys, mask, BIAS=bias, KEYS=True))),
        _spec("_attention_dbias_kernel", t, dbias, "causal"),
    )
] + [_spec(kernel, "fp32", 255, "strict", BIAS=False, TF32=True, **keys) for kernel, keys in (
    ("_attention_fwd_kernel", {}), ("_attention_bwd_kernel", {"KEYS": False}), ("_attention_bwd_kernel", {"KEYS": True}))]
