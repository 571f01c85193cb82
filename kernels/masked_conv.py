"""Masked convolution in raster order, alone or with the tanh x sigmoid gate behind it, forward and backward.

    y[b, n, i, j] = bias_n + sum over live taps (u, v) and channels c of weight[n, c, u, v] * x[b, c, i+u-kh//2, j+v-kw//2]
    gated:  (p, q) = the halves of y's 2N channels + cond,  out = tanh(p) * sigmoid(q)

Masks A and B: Pixel Recurrent Neural Networks, van den Oord, Kalchbrenner and Kavukcuoglu 2016. Gate and condition: Conditional
Image Generation with PixelCNN Decoders, van den Oord et al. 2016, eq. 2 and 4. kh and kw are odd, the stride is 1, zeros are
around the image. Every mask keeps the first `taps` of the kh*kw taps in raster order, so one number tells it:

    "A"           rows above, and pixels to the left in the own row: kh*kw // 2. A 1 x k kernel is a horizontal stack.
    "B"           those and the pixel itself: kh*kw // 2 + 1
    "vertical A"  rows above, no own row, a vertical stack's first layer: (kh // 2) * kw
    "vertical B"  rows above and all of the own row, its later layers, whose features are shifted: (kh // 2 + 1) * kw

Plain form: the kernel cropped to its live rows, exact, with (k+1) / 2k of the work: 6/9 at k = 3, where 4/9 or 5/9 are live.

Least bytes, x and y standing for theirs, of the kernels; weights and cond beside them are small or read once:
    forward    x + y;   gated, for gradients, x + 3y: p and q are saved, in the type of x, as that is the convolution again
    backward   dx: dy + dx;   dweight: x + dy;   gated, before those: 5y, p, q and out's gradient in, theirs out (2y)
The kernels are implicit matrix products over live taps. By design they ask again for what caches hold: an x tile (dy for dx)
once a live tap and block of output channels, weights once a block of pixels, dweight's tiles once a block of the other side
and, for dy, live tap. dweight sums chunks of pixels apart, then those. All are in channels_last; the contiguous is copied.

When not: libraries' convolutions on the live rows are taken to be faster, also on CUDA, until timed: mode "auto" runs the
plain form, mode "triton" these kernels. Fewer than 16 input channels waste the matrix unit. float32 is multiplied exactly
("ieee", so without matrix units on NVIDIA), never as tf32: likelihoods are compared to hundredths of a bit. The plain form
multiplies as torch.backends.cudnn says, on recent cards by default in tf32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import FLOATS, INTERPRETING, Spec, acc_type, accumulator, autocast, cdiv, jit, launch, operator, tl, triton, use_triton

BLOCKS = {  # bytes of an element: pixels, output channels (half where gated), input channels; larger ones spill somewhere
    2: (128, 64, 32),
    4: (64, 32, 16),
    8: (16, 16, 16),
}
UNALIGNED = {  # where 16 does not divide both channels: loads element by element take more registers
    2: (64, 32, 16),
    4: (32, 32, 16),
    8: (16, 16, 16),
}
SMALL = 2**16  # plain form, on a CPU without AVX-512: so few elements of x make a product faster than a convolution
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # of such CPUs a Zen 5 was timed: convolutions win
CHUNK = 512  # dweight: the fewest pixels that are summed apart,
MAX_CHUNKS = 64  # and the most such sums
ELEMENTS = 1024  # that a program of the gate's backward kernel takes
MASKS = ("A", "B", "vertical A", "vertical B")


def _taps(kh, kw, mask_type):
    """How many taps a mask keeps, the first in raster order."""
    above = kh // 2 * kw
    return {"A": kh * kw // 2, "B": kh * kw // 2 + 1, "vertical A": above, "vertical B": above + kw}[mask_type]


def masked_conv2d_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                            mask_type: str = "B") -> torch.Tensor:
    kh, kw = weight.shape[2:]
    mask = torch.arange(kh * kw, device=x.device).view(kh, kw) < _taps(kh, kw, mask_type)
    return F.conv2d(x, weight * mask, bias, padding=(kh // 2, kw // 2))


def gated_masked_conv2d_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                                  cond: torch.Tensor | None = None, mask_type: str = "B") -> torch.Tensor:
    y = masked_conv2d_reference(x, weight, bias, mask_type)
    if cond is not None:
        y = y + (cond[:, :, None, None] if cond.dim() == 2 else cond)
    p, q = y.chunk(2, dim=1)
    return torch.tanh(p) * torch.sigmoid(q)


def masked_conv2d_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                        mask_type: str = "B") -> torch.Tensor:
    """The fastest plain form: the kernel's live rows, the last of them masked; of a one-row kernel the live taps alone."""
    kh, kw = weight.shape[2:]
    taps = _taps(kh, kw, mask_type)
    rows = -(-taps // kw)
    columns = min(taps, kw)
    live = weight[:, :, :rows, :columns]
    if taps < rows * columns:
        live = live * (torch.arange(rows * columns, device=x.device).view(rows, columns) < taps)
    if columns < kw:
        return _one_row(x, live, bias, kw // 2)
    if kh > 1:  # zeros above alone; those at the sides are the convolution's
        B, C, H, W = x.shape
        zeros = _empty(x[:, :, :1].expand(B, C, kh // 2, W), C, _last(x)).zero_()
        x = torch.cat([zeros, x[:, :, :H + rows - 1 - kh // 2]], 2)
    return F.conv2d(x, live, bias, padding=(0, kw // 2))


def _one_row(x, live, bias, left):
    """A horizontal stack's convolution: the taps of one row, the first of them `left` pixels to the left."""
    taps = live.shape[3]
    if _last(x) and x.is_cpu and x.numel() <= SMALL and not AVX512:  # taps side by side
        W = x.shape[3]
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, 0))  # (B, H, left + W, C)
        seen = torch.cat([padded[:, :, v:v + W] for v in range(taps)], 3)
        return F.linear(seen, live.permute(0, 3, 2, 1).flatten(1), bias).permute(0, 3, 1, 2)
    return F.conv2d(F.pad(x, (left, taps - 1 - left)), live, bias)  # zeros to the left alone


def gated_masked_conv2d_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None,
                              cond: torch.Tensor | None = None, mask_type: str = "B") -> torch.Tensor:
    y = masked_conv2d_torch(x, weight, bias, mask_type)
    if cond is not None:
        y += cond[:, :, None, None] if cond.dim() == 2 else cond  # in place: no gradient needs what y was
    p, q = y.chunk(2, dim=1)
    return torch.tanh(p) * torch.sigmoid(q)


# ---- kernels: channels_last; pixels m run over all images, M = B*H*W. What a product multiplies has C channels, or N of a
# gradient's; UPCAST is for the interpreter, which has no arithmetic in half types.


@jit
def _tile(N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The pixels [BLOCK_M] and the channels [BLOCK_N] that this program puts out."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    m = pid // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    return m, n


@jit
def _load_pixels(X, m, c, C, M, H, W, di, dj):
    """x at pixels m moved by (di, dj), channels c, 0 outside the image: [len(m), len(c)]."""
    i = m // W % H + di
    j = m % W + dj
    inside = (m < M) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    offsets = (m + di * W + dj).to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(X + offsets, mask=inside[:, None] & (c[None, :] < C), other=0.0)


@jit
def _load_weights(Weight, tap, c, n, C, N, row):
    """A tap's weights from channels c to channels n, which stand in rows of `row` numbers: [len(c), len(n)]."""
    offsets = (tap * C + c)[:, None] * row + n[None, :]
    return tl.load(Weight + offsets, mask=(c[:, None] < C) & (n[None, :] < N), other=0.0)


@jit
def _add_product(total, a, b, ACC: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        a = a.to(ACC)
        b = b.to(ACC)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=ACC)


@jit
def _convolve(X, Weight, m, n, M, H, W, C, N, taps, SIGN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
              UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum over live taps and C channels at pixels m and channels n: [BLOCK_M, BLOCK_N]. Weight (taps, C, N). SIGN 1:
    taps where they are; -1: on the other side, the transposed convolution."""
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    steps = tl.cdiv(C, BLOCK_K)
    for step in range(taps * steps):
        tap = step // steps
        c = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        di = SIGN * (tap // KW - KH // 2)
        dj = SIGN * (tap % KW - KW // 2)
        x = _load_pixels(X, m, c, C, M, H, W, di, dj)  # [BLOCK_M, BLOCK_K]
        w = _load_weights(Weight, tap, c, n, C, N, N)  # [BLOCK_K, BLOCK_N]
        total = _add_product(total, x, w, ACC, UPCAST)
    return total


@jit
def _store_pixels(Y, m, n, M, N, y):
    """y [len(m), len(n)] to the channels n of pixels m."""
    to = Y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, y.to(Y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@jit
def _conv_fwd_kernel(X, Weight, Bias, Y, M, H, W, C, N, taps, KH: tl.constexpr, KW: tl.constexpr, BIAS: tl.constexpr,
                     ACC: tl.constexpr, UPCAST: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Y (M, N) of X (M, C). Weight (taps, C, N)."""
    m, n = _tile(N, BLOCK_M, BLOCK_N)
    y = _convolve(X, Weight, m, n, M, H, W, C, N, taps, 1, KH, KW, ACC, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    if BIAS:
        y += tl.load(Bias + n, mask=n < N, other=0.0).to(ACC)[None, :]
    _store_pixels(Y, m, n, M, N, y)


@jit
def _conv_dx_kernel(DY, Weight, DX, M, H, W, C, N, taps, KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
                    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """DX (M, C) of DY (M, N): what a tap took from a pixel goes back there. Weight (taps, N, C)."""
    m, c = _tile(C, BLOCK_M, BLOCK_N)
    dx = _convolve(DY, Weight, m, c, M, H, W, N, C, taps, -1, KH, KW, ACC, UPCAST, BLOCK_M, BLOCK_N, BLOCK_K)
    _store_pixels(DX, m, c, M, C, dx)


@jit
def _conv_dweight_kernel(X, DY, Sums, M, H, W, C, N, taps, chunk, KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
                         UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums (chunks, taps, C, N): a program adds up a chunk of pixels of one tap, for BLOCK_K of x's channels and BLOCK_N of
    dy's."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = blocks_n * tl.cdiv(C, BLOCK_K)
    n = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c = pid % blocks // blocks_n * BLOCK_K + tl.arange(0, BLOCK_K)
    tap = pid // blocks % taps
    part = pid // blocks // taps
    end = tl.minimum((part + 1) * chunk, M)
    total = tl.zeros([BLOCK_K, BLOCK_N], ACC)
    for m0 in range(part * chunk, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x = _load_pixels(X, m, c, C, end, H, W, tap // KW - KH // 2, tap % KW - KW // 2)  # [BLOCK_M, BLOCK_K]
        dy = _load_pixels(DY, m, n, N, end, H, W, 0, 0)  # [BLOCK_M, BLOCK_N]
        total = _add_product(total, tl.trans(x), dy, ACC, UPCAST)
    to = Sums + (part.to(tl.int64) * taps + tap) * C * N + c[:, None] * N + n[None, :]
    tl.store(to, total, mask=(c[:, None] < C) & (n[None, :] < N))


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _tanh(x):
    return 2 * _sigmoid(2 * x) - 1


@jit
def _gated_conv_fwd_kernel(X, Weight, Bias, Cond, Out, PQ, M, H, W, C, N, taps, cond_b, cond_p, KH: tl.constexpr,
                           KW: tl.constexpr, BIAS: tl.constexpr, COND: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr,
                           UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Out (M, N) = tanh(p) * sigmoid(q) of X (M, C); PQ (M, 2N), p beside q, where KEEP. Weight (taps, C, 2N). cond_b and
    cond_p are the strides of Cond over images and over pixels."""
    m, n = _tile(N, BLOCK_M, BLOCK_N)
    p = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    q = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    steps = tl.cdiv(C, BLOCK_K)
    for step in range(taps * steps):
        tap = step // steps
        c = step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _load_pixels(X, m, c, C, M, H, W, tap // KW - KH // 2, tap % KW - KW // 2)  # [BLOCK_M, BLOCK_K]
        w = _load_weights(Weight, tap, c, n, C, N, 2 * N)  # [BLOCK_K, BLOCK_N]
        p = _add_product(p, x, w, ACC, UPCAST)
        w = _load_weights(Weight + N, tap, c, n, C, N, 2 * N)
        q = _add_product(q, x, w, ACC, UPCAST)
    if BIAS:
        p += tl.load(Bias + n, mask=n < N, other=0.0).to(ACC)[None, :]
        q += tl.load(Bias + N + n, mask=n < N, other=0.0).to(ACC)[None, :]
    row = m.to(tl.int64)[:, None]
    mask = (m[:, None] < M) & (n[None, :] < N)
    if COND:
        cond = Cond + row // (H * W) * cond_b + row % (H * W) * cond_p + n[None, :]
        p += tl.load(cond, mask=mask, other=0.0).to(ACC)
        q += tl.load(cond + N, mask=mask, other=0.0).to(ACC)
    if KEEP:
        pq = PQ + row * 2 * N + n[None, :]
        tl.store(pq, p.to(PQ.dtype.element_ty), mask=mask)
        tl.store(pq + N, q.to(PQ.dtype.element_ty), mask=mask)
    _store_pixels(Out, m, n, M, N, _tanh(p) / (1 + tl.exp(-q)))  # tanh * sigmoid with a division less


@jit
def _gate_bwd_kernel(DOut, PQ, DPQ, size, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of p and q from that of out, element by element; a pixel's N of p are followed by its N of q."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = e < size
    at = e + e // N * N
    d = tl.load(DOut + e, mask=mask, other=0.0).to(ACC)
    t = _tanh(tl.load(PQ + at, mask=mask, other=0.0).to(ACC))
    s = _sigmoid(tl.load(PQ + at + N, mask=mask, other=0.0).to(ACC))
    tl.store(DPQ + at, (d * s * (1 - t * t)).to(DPQ.dtype.element_ty), mask=mask)
    tl.store(DPQ + at + N, (d * t * s * (1 - s)).to(DPQ.dtype.element_ty), mask=mask)


# ---- operators


def _last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _to_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x, channels, last=True):
    """Empty, with the type and sizes of x, but so many channels; channels_last or contiguous."""
    return torch.empty((len(x), channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)


def _as(x, y):
    """y, which is in channels_last, in the layout of x."""
    return y if _last(x) else y.contiguous()


def _live(weight, taps, *order):
    """The live taps of a weight (N, C, kh, kw) as a matrix a tap: order (2, 1, 0) gives (taps, C, N)."""
    return weight.flatten(2)[:, :, :taps].permute(order).contiguous()


def _pixels(x):
    """M, H and W of the kernels."""
    B, _, H, W = x.shape
    return B * H * W, H, W


def _block(size, most):
    """The power of two from size on, at most `most`, at least the 16 of a side of what tl.dot multiplies."""
    return max(min(1 << (size - 1).bit_length(), most), 16)


def _largest(size, C, N):
    """The most that a program takes of pixels and channels, for elements of so many bytes."""
    return (UNALIGNED if C % 16 or N % 16 else BLOCKS)[size]


def _blocks(x, C, N, gated=False):
    """Programs and blocks of a product with x that takes C channels to N."""
    block_m, block_n, block_k = _largest(x.element_size(), C, N)
    block_n = _block(N, block_n // 2 if gated else block_n)
    programs = cdiv(_pixels(x)[0], block_m) * cdiv(N, block_n)
    return programs, {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": _block(C, block_k)}


def _constants(x, weight):
    kh, kw = weight.shape[2:]
    return {"KH": kh, "KW": kw, "ACC": acc_type(x), "UPCAST": INTERPRETING, "num_stages": 3}  # 2 spill on AMD


def _fake_dx(dy, x, weight, taps):
    return _empty(x, x.shape[1], _last(x))


@operator("masked_conv_dx", _fake_dx)
def _dx(dy: Tensor, x: Tensor, weight: Tensor, taps: int) -> Tensor:
    N, C = weight.shape[:2]
    dx = _empty(x, C)
    programs, blocks = _blocks(dy, N, C)
    launch(_conv_dx_kernel, programs, _to_last(dy), _live(weight, taps, 2, 0, 1), dx, *_pixels(x), C, N, taps,
           **blocks, **_constants(x, weight))
    return _as(x, dx)


def _fake_dweight(dy, x, weight, taps):
    return weight.new_empty(weight.shape)


@operator("masked_conv_dweight", _fake_dweight)
def _dweight(dy: Tensor, x: Tensor, weight: Tensor, taps: int) -> Tensor:
    N, C = weight.shape[:2]
    M, H, W = _pixels(x)
    side = _largest(x.element_size(), C, N)[1]
    blocks = {"BLOCK_M": max(side // 2, 16), "BLOCK_N": _block(N, side), "BLOCK_K": _block(C, side)}
    chunk = max(CHUNK, cdiv(M, MAX_CHUNKS))
    chunk = cdiv(chunk, blocks["BLOCK_M"]) * blocks["BLOCK_M"]
    chunks = cdiv(M, chunk)
    sums = x.new_empty(chunks, taps, C, N, dtype=accumulator(x))
    programs = chunks * taps * cdiv(C, blocks["BLOCK_K"]) * cdiv(N, blocks["BLOCK_N"])
    launch(_conv_dweight_kernel, programs, _to_last(x), _to_last(dy), sums, M, H, W, C, N, taps, chunk,
           **blocks, **_constants(x, weight))
    dweight = weight.new_zeros(N, C, weight[0, 0].numel())  # dead taps stay 0
    dweight[:, :, :taps] = sums.sum(0).permute(2, 1, 0)
    return dweight.view(weight.shape)


def _gradients(ctx, dy, x, weight):
    """Those of x, weight and bias that are asked for, from that of the convolution."""
    of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
    dy = _to_last(dy)
    return (_dx(dy, x, weight, ctx.taps) if of_x else None,
            _dweight(dy, x, weight, ctx.taps) if of_weight else None,
            dy.sum((0, 2, 3)) if of_bias else None)


def _fake_fwd(x, weight, bias, taps):
    return _empty(x, len(weight), _last(x))


def _save(ctx, inputs, output):
    x, weight, _, ctx.taps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    return *_gradients(ctx, dy, *ctx.saved_tensors), None


@operator("masked_conv_fwd", _fake_fwd, _save, _backward)
def _fwd(x: Tensor, weight: Tensor, bias: Tensor | None, taps: int) -> Tensor:
    N, C = weight.shape[:2]
    y = _empty(x, N)
    programs, blocks = _blocks(x, C, N)
    live = _live(weight, taps, 2, 1, 0)
    launch(_conv_fwd_kernel, programs, _to_last(x), live, live if bias is None else bias.contiguous(), y, *_pixels(x), C, N,
           taps, BIAS=bias is not None, **blocks, **_constants(x, weight))
    return _as(x, y)


def _fake_gate_bwd(dout, pq):
    return torch.empty_like(_to_last(pq))


@operator("gate_bwd", _fake_gate_bwd)
def _gate_bwd(dout: Tensor, pq: Tensor) -> Tensor:
    dout = _to_last(dout)
    pq = _to_last(pq)  # hooks may save it in another layout
    dpq = torch.empty_like(pq)
    launch(_gate_bwd_kernel, cdiv(dout.numel(), ELEMENTS), dout, pq, dpq, dout.numel(), dout.shape[1], ACC=acc_type(pq),
           BLOCK=ELEMENTS)
    return dpq


def _fake_gated_fwd(x, weight, bias, cond, taps, keep):
    return _empty(x, len(weight) // 2, _last(x)), _empty(x, len(weight)) if keep else x.new_empty(0)


def _gated_save(ctx, inputs, output):
    x, weight, _, cond, ctx.taps, _ = inputs
    _, pq = output
    ctx.cond = None if cond is None else cond.shape
    ctx.save_for_backward(x, weight, pq)
    ctx.mark_non_differentiable(pq)
    ctx.set_materialize_grads(False)  # of pq, which nobody is given


def _gated_backward(ctx, dout, _):
    if dout is None:
        return (None,) * 6
    x, weight, pq = ctx.saved_tensors
    dpq = _gate_bwd(dout, pq)
    dcond = None
    if ctx.cond is not None:
        dcond = dpq if ctx.cond == dpq.shape else dpq.sum((2, 3)).view(ctx.cond)
    return *_gradients(ctx, dpq, x, weight), dcond, None, None


def _condition(cond, x):
    """cond as the kernel reads it, and its strides over images and over pixels."""
    if cond.shape[2:] == x.shape[2:]:
        return _to_last(cond), cond[0].numel(), cond.shape[1]
    return cond.contiguous(), cond.shape[1], 0  # one vector for all pixels of an image


@operator("gated_masked_conv_fwd", _fake_gated_fwd, _gated_save, _gated_backward)
def _gated_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, cond: Tensor | None, taps: int,
               keep: bool) -> tuple[Tensor, Tensor]:
    """out, and p beside q for the backward pass, empty without keep."""
    N = len(weight) // 2
    C = weight.shape[1]
    out = _empty(x, N)
    pq = _empty(x, 2 * N) if keep else x.new_empty(0)
    programs, blocks = _blocks(x, C, N, gated=True)
    live = _live(weight, taps, 2, 1, 0)
    given = {"BIAS": bias is not None, "COND": cond is not None, "KEEP": keep}
    bias = live if bias is None else bias.contiguous()  # a kernel does not touch what a constant switches off
    cond, *strides = (live, 0, 0) if cond is None else _condition(cond, x)
    launch(_gated_conv_fwd_kernel, programs, _to_last(x), live, bias, cond, out, pq, *_pixels(x), C, N, taps, *strides,
           **given, **blocks, **_constants(x, weight))
    return _as(x, out), pq


def supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
             cond: torch.Tensor | None = None) -> tuple[bool, str]:
    if x.dtype not in FLOATS:
        return False, f"x is {x.dtype}"
    for name, a in {"weight": weight, "bias": bias, "cond": cond}.items():
        if a is not None and (a.dtype != x.dtype or a.device != x.device):
            return False, f"x is {x.dtype} on {x.device}, {name} {a.dtype} on {a.device}"
    B, C, H, W = x.shape
    if weight.numel() >= 2**31:
        return False, f"weight {tuple(weight.shape)} has 2^31 elements or more"
    if H * W * max(B, C, len(weight)) >= 2**30:  # offsets in an image, and numbers of pixels, are int32
        return False, f"x {tuple(x.shape)} has 2^30 pixels or more, or 2^30 elements an image"
    return True, ""


def live_taps(op: str, kernel_size: tuple[int, int], mask_type: str) -> int:
    """How many taps of a kernel of that size a mask keeps; ValueError, in the name of op, where there is no such mask."""
    kh, kw = kernel_size
    if mask_type not in MASKS:
        raise ValueError(f"{op}: mask_type {mask_type!r} must be one of {', '.join(MASKS)}")
    if kh % 2 == 0 or kw % 2 == 0 or not _taps(kh, kw, mask_type):
        raise ValueError(f"{op}: a {kh} x {kw} kernel needs odd sides and, for mask_type {mask_type!r}, a live tap")
    return _taps(kh, kw, mask_type)


def _check(op, x, weight, bias, mask_type):
    fits = x.dim() == weight.dim() == 4 and weight.shape[1] == x.shape[1]
    if not fits or bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} "
                         f"do not fit x {tuple(x.shape)}")
    return live_taps(op, weight.shape[2:], mask_type)


def masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, mask_type: str = "B", *,
                  backend: str | None = None) -> Tensor:
    """Convolution in which a pixel sees only those before it in raster order. x (B, C, H, W) floating, weight
    (N, C, kh, kw) with odd kh and kw, bias (N,) or None -> (B, N, H, W), with the type and layout of x; under autocast with
    autocast's type.

    mask_type: "A" without the pixel itself, "B" with it, "vertical A" and "vertical B" as in the file's first lines.
    backend: one of kernels.MODES, instead of kernels.mode. Differentiable once in x, weight and bias; dead taps have
    gradient 0. Van den Oord et al. 2016 (Pixel RNN).
    Raises ValueError for shapes that do not fit or a mask without a live tap, and what use_triton raises.
    """
    taps = _check("masked_conv2d", x, weight, bias, mask_type)
    x, weight, bias = autocast(x, weight, bias)
    if use_triton("masked_conv2d", x, lambda: supports(x, weight, bias), library=True, backend=backend):
        return _fwd(x, weight, bias, taps)
    return masked_conv2d_torch(x, weight, bias, mask_type)


def gated_masked_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, cond: Tensor | None = None,
                        mask_type: str = "B", *, backend: str | None = None) -> Tensor:
    """tanh(p) * sigmoid(q), where p and q are the halves of the 2N channels of masked_conv2d(x, weight, bias) + cond.

    x (B, C, H, W) floating, weight (2N, C, kh, kw), bias (2N,) or None; cond (B, 2N), (B, 2N, 1, 1), (B, 2N, H, W) or None
    -> (B, N, H, W) in (-1, 1), with the type and layout of x. mask_type, backend, autocast, gradients (cond has one too)
    and errors as for masked_conv2d. Van den Oord et al. 2016 (Conditional PixelCNN), eq. 2 and 4.
    """
    taps = _check("gated_masked_conv2d", x, weight, bias, mask_type)
    wide = (len(x), len(weight))
    if len(weight) % 2 or cond is not None and cond.shape not in (wide, (*wide, 1, 1), (*wide, *x.shape[2:])):
        raise ValueError(f"gated_masked_conv2d: weight {tuple(weight.shape)} and cond "
                         f"{None if cond is None else tuple(cond.shape)} do not fit x {tuple(x.shape)}")
    x, weight, bias, cond = autocast(x, weight, bias, cond)
    if use_triton("gated_masked_conv2d", x, lambda: supports(x, weight, bias, cond), library=True, backend=backend):
        keep = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, weight, bias, cond))
        return _gated_fwd(x, weight, bias, cond, taps, keep)[0]
    return gated_masked_conv2d_torch(x, weight, bias, cond, mask_type)


def _spec(kernel, dtype, registers=255, k=(3, 3), C=64, N=64, **more):
    """A launch's variant of a kernel, for C and N channels; as in a launch, these bound the blocks."""
    args = dict.fromkeys(("X", "Weight", "Bias", "Cond", "Y", "Out", "PQ", "DX", "DY", "DOut", "DPQ"), f"*{dtype}")
    args |= {"Sums": "*fp64" if dtype == "fp64" else "*fp32"} | dict.fromkeys(("M", "cond_b", "chunk", "size"), "i32:16")
    args |= dict.fromkeys(("H", "W", "taps"), "i32") | {"C": _integer(C), "N": _integer(N), "cond_p": "i32:16"}
    args |= {"KH": k[0], "KW": k[1], "BIAS": True, "COND": True, "KEEP": True, "UPCAST": False, "BLOCK": ELEMENTS}
    args |= {"ACC": tl.float64 if dtype == "fp64" else tl.float32}
    m, n, c = _largest({"fp64": 8, "fp32": 4}.get(dtype, 2), C, N)
    if kernel == "_conv_dweight_kernel":
        m = max(n // 2, 16)
        c = n
    if kernel == "_gated_conv_fwd_kernel":
        n = n // 2
    sides = (N, C) if kernel == "_conv_dx_kernel" else (C, N)  # channels in and out
    args |= {"BLOCK_M": m, "BLOCK_N": _block(sides[1], n), "BLOCK_K": _block(sides[0], c)} | more
    matrix = dtype in ("fp16", "bf16") and kernel != "_gate_bwd_kernel"  # float32 with "ieee" precision: none on NVIDIA
    sizes = f"{N} channels" if kernel == "_gate_bwd_kernel" else f"{k[0]}x{k[1]}, {C} to {N}"
    name = ", ".join([dtype, sizes, *(f"no {key.lower()}" for key, value in more.items() if not value)])
    return Spec(kernel, name, args, num_stages=3, registers=registers, matrix=matrix,
                vector=C % 16 == N % 16 == 0 and C * N > 256)


def _integer(size):
    """The type of a size as a launch has it."""
    return "i32" if size % 16 else "i32:16"


_PRODUCTS = ("_conv_fwd_kernel", "_gated_conv_fwd_kernel", "_conv_dx_kernel", "_conv_dweight_kernel")
AOT_SPECS = []
AOT_MORE = []  # what else a launch can choose
if triton is not None:
    for t, wide in (("fp32", 80), ("bf16", 176)):
        AOT_SPECS += [_spec(kernel, t, wide) for kernel in _PRODUCTS[:3]]
        AOT_SPECS += [_spec("_conv_dweight_kernel", t, 112), _spec("_gate_bwd_kernel", t, 48)]
    AOT_SPECS += [_spec("_gated_conv_fwd_kernel", "fp16", 176)]
    AOT_MORE += [_spec(kernel, "fp64") for kernel in (*_PRODUCTS, "_gate_bwd_kernel")]
    for t in ("fp32", "bf16", "fp16"):
        AOT_MORE += [_spec(kernel, t, k=k) for kernel in _PRODUCTS for k in ((1, 3), (7, 7))]
        AOT_MORE += [_spec(kernel, t, C=C, N=N) for kernel in _PRODUCTS for C, N in ((16, 16), (16, 64), (3, 64), (3, 100))]
        AOT_MORE += [_spec("_conv_fwd_kernel", t, BIAS=False), _spec("_gate_bwd_kernel", t, N=100)]
        AOT_MORE += [_spec("_gated_conv_fwd_kernel", t, **{key: False}) for key in ("BIAS", "COND", "KEEP")]
