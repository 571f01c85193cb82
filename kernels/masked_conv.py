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

from . import FLOATS, INTERPRETING, Spec, acc_type, accumulator, autocast, jit, launching, tl, triton, use_triton

BLOCKS = {2: (128, 64, 32), 4: (64, 32, 16)}  # bytes of an element: pixels, output channels (half where gated), input channels
SMALL = 2**16  # plain form, on a CPU without AVX-512: so few elements of x make a product faster than a convolution
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # of such CPUs a Zen 5 was timed: convolutions win
CHUNK, MAX_CHUNKS = 512, 64  # dweight: the fewest pixels to sum apart, the most sums
MASKS = ("A", "B", "vertical A", "vertical B")


def _taps(kh, kw, mask_type):
    return (kh * kw // 2, kh * kw // 2 + 1, kh // 2 * kw, (kh // 2 + 1) * kw)[MASKS.index(mask_type)]


def masked_conv2d_reference(x, weight, bias=None, mask_type="B"):
    kh, kw = weight.shape[2:]
    mask = torch.arange(kh * kw, device=x.device).view(kh, kw) < _taps(kh, kw, mask_type)
    return F.conv2d(x, weight * mask, bias, padding=(kh // 2, kw // 2))


def gated_masked_conv2d_reference(x, weight, bias=None, cond=None, mask_type="B"):
    y = masked_conv2d_reference(x, weight, bias, mask_type)
    if cond is not None:
        y = y + (cond[:, :, None, None] if cond.dim() == 2 else cond)
    p, q = y.chunk(2, dim=1)
    return torch.tanh(p) * torch.sigmoid(q)


def masked_conv2d_torch(x, weight, bias=None, mask_type="B"):
    """The fastest plain form: the kernel's live rows, the last of them masked; of a one-row kernel the live taps alone."""
    (B, C, H, W), (kh, kw) = x.shape, weight.shape[2:]
    taps, up, left = _taps(kh, kw, mask_type), kh // 2, kw // 2
    rows, columns = -(-taps // kw), min(taps, kw)
    live = weight[:, :, :rows, :columns]
    if taps < rows * columns:
        live = live * (torch.arange(rows * columns, device=x.device).view(rows, columns) < taps)
    if columns < kw and _last(x) and x.is_cpu and x.numel() <= SMALL and not AVX512:  # one row: taps side by side
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, left, 0))  # (B, H, left + W, C)
        seen = torch.cat([padded[:, :, v:v + W] for v in range(taps)], 3)
        return F.linear(seen, live.permute(0, 3, 2, 1).flatten(1), bias).permute(0, 3, 1, 2)
    if columns < kw:  # zeros to its left alone
        return F.conv2d(F.pad(x, (left, columns - 1 - left)), live, bias)
    if up:  # zeros above alone; those at the sides are the convolution's
        zeros = _empty(x[:, :, :1].expand(B, C, up, W), C, _last(x)).zero_()
        x = torch.cat([zeros, x[:, :, :H + rows - 1 - up]], 2)
    return F.conv2d(x, live, bias, padding=(0, left))


def gated_masked_conv2d_torch(x, weight, bias=None, cond=None, mask_type="B"):
    y = masked_conv2d_torch(x, weight, bias, mask_type)
    if cond is not None:
        y += cond[:, :, None, None] if cond.dim() == 2 else cond  # in place: no gradient needs what y was
    p, q = y.chunk(2, dim=1)
    return torch.tanh(p) * torch.sigmoid(q)


# ---- kernels: channels_last; pixels m run over all images, M = B*H*W


@jit
def _load_pixels(X, m, c, C, M, H, W, di, dj):
    """x at pixels m moved by (di, dj), channels c: [len(m), len(c)], 0 outside the image."""
    i, j = m // W % H + di, m % W + dj
    inside = (m < M) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    offsets = (m + di * W + dj).to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(X + offsets, mask=inside[:, None] & (c[None, :] < C), other=0.0)


@jit
def _conv_kernel(X, Weight, Bias, Cond, Y, PQ, M, H, W, C, N, taps, cond_b, cond_p, KH: tl.constexpr, KW: tl.constexpr,
                 MIRROR: tl.constexpr, BIAS: tl.constexpr, COND: tl.constexpr, GATE: tl.constexpr, KEEP: tl.constexpr,
                 ACC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_M pixels by BLOCK_N of the N channels of Y. Weight (taps, C, N), or (taps, C, 2N) with GATE; KEEP fills PQ
    too. MIRROR takes the taps to the other side: the transposed convolution, for dx."""
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK_N)
    m, n = pid // blocks * BLOCK_M + tl.arange(0, BLOCK_M), pid % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    steps, wide = tl.cdiv(C, BLOCK_K), N * 2 if GATE else N
    a, b = tl.zeros([BLOCK_M, BLOCK_N], ACC), tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in range(taps * steps):
        tap, c = step // steps, step % steps * BLOCK_K + tl.arange(0, BLOCK_K)
        di, dj = tap // KW - KH // 2, tap % KW - KW // 2
        if MIRROR:
            di, dj = -di, -dj
        x = _load_pixels(X, m, c, C, M, H, W, di, dj)
        w_offsets, w_mask = (tap * C + c)[:, None] * wide + n[None, :], (c[:, None] < C) & (n[None, :] < N)
        w = tl.load(Weight + w_offsets, mask=w_mask, other=0.0)
        x, w = x.to(ACC) if UPCAST else x, w.to(ACC) if UPCAST else w
        a = tl.dot(x, w, a, input_precision="ieee", out_dtype=ACC)
        if GATE:
            w = tl.load(Weight + N + w_offsets, mask=w_mask, other=0.0)
            b = tl.dot(x, w.to(ACC) if UPCAST else w, b, input_precision="ieee", out_dtype=ACC)
    if BIAS:
        a += tl.load(Bias + n, mask=n < N, other=0.0).to(ACC)[None, :]
        if GATE:
            b += tl.load(Bias + N + n, mask=n < N, other=0.0).to(ACC)[None, :]
    row, mask = m.to(tl.int64)[:, None], (m[:, None] < M) & (n[None, :] < N)
    if GATE:
        if COND:
            cond = Cond + row // (H * W) * cond_b + row % (H * W) * cond_p + n[None, :]
            a += tl.load(cond, mask=mask, other=0.0).to(ACC)
            b += tl.load(cond + N, mask=mask, other=0.0).to(ACC)
        if KEEP:
            pq = PQ + row * wide + n[None, :]
            tl.store(pq, a.to(PQ.dtype.element_ty), mask=mask)
            tl.store(pq + N, b.to(PQ.dtype.element_ty), mask=mask)
        a = (2 / (1 + tl.exp(-2 * a)) - 1) / (1 + tl.exp(-b))
    tl.store(Y + row * N + n[None, :], a.to(Y.dtype.element_ty), mask=mask)


@jit
def _dweight_kernel(X, DY, Sums, M, H, W, C, N, taps, chunk, KH: tl.constexpr, KW: tl.constexpr, ACC: tl.constexpr,
                    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sums (chunks, taps, C, N): a chunk of pixels of one tap, BLOCK_K of x's channels and BLOCK_N of dy's."""
    pid, blocks_n, blocks_c = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_K)
    n, c = pid % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N), pid // blocks_n % blocks_c * BLOCK_K + tl.arange(0, BLOCK_K)
    tap, part = pid // blocks_n // blocks_c % taps, pid // blocks_n // blocks_c // taps
    end = tl.minimum((part + 1) * chunk, M)
    total = tl.zeros([BLOCK_K, BLOCK_N], ACC)
    for m0 in range(part * chunk, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        x = _load_pixels(X, m, c, C, end, H, W, tap // KW - KH // 2, tap % KW - KW // 2)
        dy = _load_pixels(DY, m, n, N, end, H, W, 0, 0)
        x, dy = x.to(ACC) if UPCAST else x, dy.to(ACC) if UPCAST else dy
        total = tl.dot(tl.trans(x), dy, total, input_precision="ieee", out_dtype=ACC)
    offsets = (part.to(tl.int64) * taps + tap) * C * N + c[:, None] * N + n[None, :]
    tl.store(Sums + offsets, total, mask=(c[:, None] < C) & (n[None, :] < N))


@jit
def _gate_bwd_kernel(DOut, PQ, DPQ, size, N, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of p and q from that of out, element by element; a pixel's N of p are followed by its N of q."""
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = e + e // N * N
    d = tl.load(DOut + e, mask=e < size, other=0.0).to(ACC)
    t = 2 / (1 + tl.exp(-2 * tl.load(PQ + at, mask=e < size, other=0.0).to(ACC))) - 1
    s = 1 / (1 + tl.exp(-tl.load(PQ + at + N, mask=e < size, other=0.0).to(ACC)))
    tl.store(DPQ + at, (d * s * (1 - t * t)).to(DPQ.dtype.element_ty), mask=e < size)
    tl.store(DPQ + at + N, (d * t * s * (1 - s)).to(DPQ.dtype.element_ty), mask=e < size)


# ---- operators


def _last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _to_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x, channels, last=True):
    """Empty, with the type and sizes of x, but so many channels; channels_last or contiguous."""
    return torch.empty((len(x), channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)


def _as(x, y):  # y, in channels_last, in the layout of x
    return y if _last(x) else y.contiguous()


def _block(size, most):
    return max(min(triton.next_power_of_2(size), most), 16)  # what tl.dot multiplies has sides of at least 16


def _constants(x, weight):
    acc = acc_type(x)
    return {"KH": weight.shape[2], "KW": weight.shape[3], "UPCAST": INTERPRETING, "ACC": acc, "num_stages": 3}  # 2 spill on AMD


def _conv(x, weight, live, bias, cond, y, pq=None, gate=False, mirror=False):
    """Launch _conv_kernel. live (taps, C, N): the live taps of weight. All images are channels_last."""
    (B, C, H, W), N, strides = x.shape, y.shape[1], (0, 0)
    if cond is not None:
        whole = cond.dim() == 4 and cond.shape[2:] == x.shape[2:]
        cond, strides = _to_last(cond) if whole else cond.contiguous(), (cond.shape[1] * (H * W if whole else 1), 2 * N * whole)
    block_m, block_n, block_k = BLOCKS[min(x.element_size(), 4)]
    block_n = _block(N, block_n // 2 if gate else block_n)
    with launching(x):
        _conv_kernel[(triton.cdiv(B * H * W, block_m) * triton.cdiv(N, block_n),)](
            x, live, live if bias is None else bias.contiguous(), live if cond is None else cond, y, y if pq is None else pq,
            B * H * W, H, W, C, N, len(live), *strides, MIRROR=mirror, BIAS=bias is not None, COND=cond is not None, GATE=gate,
            KEEP=pq is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=_block(C, block_k), **_constants(x, weight))


def _live(weight, taps, *order):
    """The live taps of a weight (N, C, kh, kw) as a matrix a tap: order (2, 1, 0) gives (taps, C, N)."""
    return weight.flatten(2)[:, :, :taps].permute(order).contiguous()


@torch.library.custom_op("m2::masked_conv_fwd", mutates_args=())
def _fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, taps: int) -> torch.Tensor:
    y = _empty(x, len(weight))
    _conv(_to_last(x), weight, _live(weight, taps, 2, 1, 0), bias, None, y)
    return _as(x, y)


@_fwd.register_fake
def _(x, weight, bias, taps):
    return _empty(x, len(weight), _last(x))


@torch.library.custom_op("m2::gated_masked_conv_fwd", mutates_args=())
def _gated_fwd(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, cond: torch.Tensor | None,
               taps: int, keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, pq = _empty(x, len(weight) // 2), _empty(x, len(weight)) if keep else None
    _conv(_to_last(x), weight, _live(weight, taps, 2, 1, 0), bias, cond, out, pq, gate=True)
    return _as(x, out), pq if keep else x.new_empty(0)


@_gated_fwd.register_fake
def _(x, weight, bias, cond, taps, keep):
    return _empty(x, len(weight) // 2, _last(x)), _empty(x, len(weight)) if keep else x.new_empty(0)


@torch.library.custom_op("m2::gate_bwd", mutates_args=())
def _gate_bwd(dout: torch.Tensor, pq: torch.Tensor) -> torch.Tensor:
    dout, pq = _to_last(dout), _to_last(pq)  # hooks may save it in another layout
    dpq = torch.empty_like(pq)
    with launching(pq):
        _gate_bwd_kernel[(triton.cdiv(dout.numel(), 1024),)](dout, pq, dpq, dout.numel(), dout.shape[1], BLOCK=1024,
                                                             ACC=_constants(pq, pq)["ACC"])
    return dpq


@_gate_bwd.register_fake
def _(dout, pq):
    return torch.empty_like(pq)


@torch.library.custom_op("m2::masked_conv_dx", mutates_args=())
def _dx(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, taps: int) -> torch.Tensor:
    dx = _empty(x, x.shape[1])
    _conv(_to_last(dy), weight, _live(weight, taps, 2, 0, 1), None, None, dx, mirror=True)
    return _as(x, dx)


@_dx.register_fake
def _(dy, x, weight, taps):
    return _empty(x, x.shape[1], _last(x))


@torch.library.custom_op("m2::masked_conv_dweight", mutates_args=())
def _dweight(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, taps: int) -> torch.Tensor:
    (B, C, H, W), (N, _, kh, kw), side = x.shape, weight.shape, BLOCKS[min(x.element_size(), 4)][1]
    M, block_m, block_n, block_c = B * H * W, max(side // 2, 16), _block(N, side), _block(C, side)
    chunk = block_m * triton.cdiv(max(CHUNK, triton.cdiv(M, MAX_CHUNKS)), block_m)
    chunks = triton.cdiv(M, chunk)
    sums = x.new_empty(chunks, taps, C, N, dtype=accumulator(x))
    with launching(x):
        _dweight_kernel[(chunks * taps * triton.cdiv(C, block_c) * triton.cdiv(N, block_n),)](
            _to_last(x), _to_last(dy), sums, M, H, W, C, N, taps, chunk, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_c,
            **_constants(x, weight))
    dweight = weight.new_zeros(N, C, kh * kw)  # dead taps stay 0
    dweight[:, :, :taps] = sums.sum(0).permute(2, 1, 0)
    return dweight.view(N, C, kh, kw)


@_dweight.register_fake
def _(dy, x, weight, taps):
    return weight.new_empty(weight.shape)


def _grads(need, dy, x, weight, taps):
    return (_dx(dy, x, weight, taps) if need[0] else None, _dweight(dy, x, weight, taps) if need[1] else None,
            dy.sum((0, 2, 3)) if need[2] else None)


def _save(ctx, inputs, output):
    x, weight, _, ctx.taps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, dy):
    return *_grads(ctx.needs_input_grad, dy, *ctx.saved_tensors, ctx.taps), None


def _gated_save(ctx, inputs, output):
    x, weight, _, cond, ctx.taps, _ = inputs
    ctx.cond = None if cond is None else cond.shape
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of pq, which nobody is given


def _gated_backward(ctx, dout, _):
    if dout is None:
        return (None,) * 6
    x, weight, pq = ctx.saved_tensors
    d = _gate_bwd(dout, pq)
    dcond = None if ctx.cond is None else d if ctx.cond == d.shape else d.sum((2, 3)).view(ctx.cond)
    return *_grads(ctx.needs_input_grad, d, x, weight, ctx.taps), dcond, None, None


_fwd.register_autograd(_backward, setup_context=_save)
_gated_fwd.register_autograd(_gated_backward, setup_context=_gated_save)


def supports(x, weight, bias, cond=None):
    if x.dtype not in FLOATS:
        return False, f"x is {x.dtype}"
    for name, a in {"weight": weight, "bias": bias, "cond": cond}.items():
        if a is not None and (a.dtype != x.dtype or a.device != x.device):
            return False, f"x is {x.dtype} on {x.device}, {name} {a.dtype} on {a.device}"
    B, C, H, W = x.shape
    if H * W * max(B, C, len(weight)) >= 2**30:  # offsets in an image, and numbers of pixels, are int32
        return False, f"x {tuple(x.shape)} has 2^30 pixels or more, or 2^30 elements an image"
    return True, ""


def _check(op, x, weight, bias, mask_type):
    if mask_type not in MASKS:
        raise ValueError(f"{op}: mask_type {mask_type!r} must be one of {', '.join(MASKS)}")
    fits = x.dim() == weight.dim() == 4 and weight.shape[1] == x.shape[1]
    if not fits or bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} "
                         f"do not fit x {tuple(x.shape)}")
    kh, kw = weight.shape[2:]
    if kh % 2 == 0 or kw % 2 == 0 or not _taps(kh, kw, mask_type):
        raise ValueError(f"{op}: a {kh} x {kw} kernel needs odd sides and, for mask_type {mask_type!r}, a live tap")
    return _taps(kh, kw, mask_type)


def masked_conv2d(x, weight, bias=None, mask_type="B"):
    """Convolution in which a pixel sees only those before it in raster order. x (B, C, H, W) floating, weight
    (N, C, kh, kw) with odd kh and kw, bias (N,) or None -> (B, N, H, W), with the type and layout of x.

    mask_type: "A" without the pixel itself, "B" with it, "vertical A" and "vertical B" as in the file's first lines.
    Differentiable once in x, weight and bias; dead taps have gradient 0. Van den Oord et al. 2016 (Pixel RNN).
    Raises ValueError for shapes that do not fit or a mask without a live tap, and what use_triton raises.
    """
    taps = _check("masked_conv2d", x, weight, bias, mask_type)
    x, weight, bias = autocast(x, weight, bias)
    if use_triton("masked_conv2d", x, lambda: supports(x, weight, bias), library=True):
        return _fwd(x, weight, bias, taps)
    return masked_conv2d_torch(x, weight, bias, mask_type)


def gated_masked_conv2d(x, weight, bias=None, cond=None, mask_type="B"):
    """tanh(p) * sigmoid(q), where p and q are the halves of the 2N channels of masked_conv2d(x, weight, bias) + cond.

    x (B, C, H, W) floating, weight (2N, C, kh, kw), bias (2N,) or None; cond (B, 2N), (B, 2N, 1, 1), (B, 2N, H, W) or None
    -> (B, N, H, W) in (-1, 1), with the type and layout of x. mask_type, gradients (cond has one too) and errors as for
    masked_conv2d. Van den Oord et al. 2016 (Conditional PixelCNN), eq. 2 and 4.
    """
    taps = _check("gated_masked_conv2d", x, weight, bias, mask_type)
    wide = (len(x), len(weight))
    if len(weight) % 2 or cond is not None and cond.shape not in (wide, (*wide, 1, 1), (*wide, *x.shape[2:])):
        raise ValueError(f"gated_masked_conv2d: weight {tuple(weight.shape)} and cond "
                         f"{None if cond is None else tuple(cond.shape)} do not fit x {tuple(x.shape)}")
    x, weight, bias, cond = autocast(x, weight, bias, cond)
    if use_triton("gated_masked_conv2d", x, lambda: supports(x, weight, bias, cond), library=True):
        keep = torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in (x, weight, bias, cond))
        return _gated_fwd(x, weight, bias, cond, taps, keep)[0]
    return gated_masked_conv2d_torch(x, weight, bias, cond, mask_type)


def _spec(kernel, dtype, tensors, registers, gate=False, mirror=False):
    args = dict.fromkeys(tensors, f"*{dtype}") | dict.fromkeys(("H", "W", "taps"), "i32") | {"Sums": "*fp32"}
    args |= dict.fromkeys(("M", "C", "N", "cond_b", "chunk", "size"), "i32:16") | {"cond_p": 0, "BLOCK": 1024}
    args |= {"KH": 3, "KW": 3, "MIRROR": mirror, "BIAS": not mirror, "COND": gate, "GATE": gate, "KEEP": gate}
    m, n, k = BLOCKS[4 if dtype == "fp32" else 2]
    m, n, k = (n // 2, n, n) if kernel == "_dweight_kernel" else (m, n // 2 if gate else n, k)
    args |= {"ACC": tl.float32, "UPCAST": False, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    matrix = dtype != "fp32" and kernel != "_gate_bwd_kernel"  # float32 with "ieee" precision: no matrix unit on NVIDIA
    name = ", ".join([dtype, *["gate"] * gate, *["dx"] * mirror])
    return Spec(kernel, name, args, num_stages=3, registers=registers, matrix=matrix)


_CONV = ("X", "Weight", "Bias", "Cond", "Y", "PQ")
AOT_SPECS = [] if triton is None else [
    _spec("_conv_kernel", "fp16", _CONV, 176, gate=True),
    *(spec for t, wide in (("fp32", 80), ("bf16", 176)) for spec in (
        _spec("_conv_kernel", t, _CONV, wide),
        _spec("_conv_kernel", t, _CONV, wide, mirror=True),
        _spec("_conv_kernel", t, _CONV, wide, gate=True),
        _spec("_dweight_kernel", t, ("X", "DY"), 112),
        _spec("_gate_bwd_kernel", t, ("DOut", "PQ", "DPQ"), 48),
    )),
]
