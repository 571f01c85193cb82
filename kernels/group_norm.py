"""Group normalisation, with SiLU behind it or not, forward and backward (Wu and He 2018).

    y = act(x_hat * weight_c + bias_c),  x_hat = (x - mean) * rstd,  mean and variance over the C/groups channels and all
    positions of a group;  act(z) = z * sigmoid(z) or z.

x (B, C, *) contiguous, or (B, C, H, W) in channels_last; weight, bias (C,). y has the type and the layout of x.

Least bytes, n = bytes of x: forward 2n (x in, y out), backward 3n (x and dy in, dx out), where one program can hold a
whole group, which is up to 8,192 elements with its sides rounded up to powers of two. A larger group is split over
several programs, so that few groups still fill the device, and each pass over it reads again: 3n and 5n. Beside that
only statistics move, a few numbers a group and channel. x is all that is saved for the backward pass: z is recomputed.
How a group is split follows from the device's processors, so the last digits of y are the same on one kind of device.
A group that one program can hold is never split, not even one of few, as at batch 1, while most processors have nothing
to do: it is at most 64 KB in and out, which a single processor moves in 1 to 2 us (argued, at 32 to 64 bytes a clock), and
a split adds two launches forward and five backward, each of which takes longer than that.

When not: on the CPU, and under torch.compile where neighbours could be fused into one plain pass. There are no derivatives
of derivatives and no forward-mode ones.
"""

import math

import torch
import torch.nn.functional as F

from . import (
    FLOATS,
    Spec,
    acc_type,
    accumulator,
    cdiv,
    dense,
    jit,
    launch,
    operator,
    power_of_2,
    processors,
    tl,
    triton,
    use_triton,
)

TILE = 8192  # elements that a program holds at once
# A call costs the CPU, launches left out, 1.7 times what one of the plain form costs it, and 2.3 times with the backward pass:
# 11 us against 6.5, 113 against 49 on an EPYC (Zen 4); of a split group 2.3 and 3.1 times (pytest tests/benchmarks
# --benchmark-only -k part_of_the_cpu). Launches come to that, some 15 us by triton, 4 by PyTorch (argued): 1 and 2 here, 4 and
# 9 there. So on small tensors, where the CPU decides, the plain form wins. The kernel can win where the plain form's time on
# the GPU, 5n bytes forward and 13n with backward, is longer than the kernel's on the CPU: at 1 TB/s from about 2^20 elements
# of float32 on, with the backward pass 2^21, and at 3 TB/s three times as many. In a network the work of other layers hides
# the CPU's part earlier, so LEAST, the elements from which "auto" takes the kernel, is the lowest of these.
LEAST = 1 << 20


def group_norm_silu_reference(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5,
                              silu: bool = True) -> torch.Tensor:
    g = x.reshape(len(x), groups, -1)
    mean = g.mean(2, keepdim=True)
    var = g.var(2, correction=0, keepdim=True)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    z = ((g - mean) / (var + eps).sqrt()).view(x.shape) * weight.view(shape) + bias.view(shape)
    return z * torch.sigmoid(z) if silu else z


def group_norm_silu_torch(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5,
                          silu: bool = True) -> torch.Tensor:
    """The fastest plain form: PyTorch's own group norm, then its SiLU.

    Types that differ meet in float32 (float64 for float64), as in the kernels; PyTorch itself takes few such pairs. On CUDA
    autocast computes it in float32. The result has the type of x all the same.
    """
    kinds = {weight.dtype, bias.dtype}
    by_pytorch = x.is_cpu and x.element_size() == 2 and kinds == {torch.float32}
    z = x
    if kinds != {x.dtype} and not by_pytorch:
        wide = accumulator(x)
        z = x.to(wide)
        weight = weight.to(wide)
        bias = bias.to(wide)
    y = torch.group_norm(z, groups, weight, bias, eps)  # which takes a group of one element too
    return (F.silu(y) if silu else y).to(x.dtype)


# ---- kernels: a tile is BLOCK_C channels by BLOCK_P positions of one image; only one of its two strides is not 1


@jit
def _tile(c0, p0, c_end, P, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """The tile that starts at channel c0 and position p0: its channels, its offsets in the image, its mask."""
    c = c0 + tl.arange(0, BLOCK_C)
    p = p0 + tl.arange(0, BLOCK_P)
    offsets = c[:, None].to(tl.int64) * stride_c + p[None, :].to(tl.int64) * stride_p  # [BLOCK_C, BLOCK_P]
    return c, offsets, (c[:, None] < c_end) & (p[None, :] < P)


@jit
def _grad_z(x_hat, dy, w, b, SILU: tl.constexpr):
    """dy taken back through the activation. x_hat, dy [BLOCK_C, BLOCK_P], w, b [BLOCK_C]."""
    if SILU:
        z = x_hat * w[:, None] + b[:, None]
        s = 1 / (1 + tl.exp(-z))
        dy = dy * s * (1 + z * (1 - s))
    return dy


@jit
def _group_fwd_kernel(X, W, Bias, Y, Mean, Rstd, C, P, stride_c, stride_p, groups, eps, SIZE: tl.constexpr,
                      SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program a group of SIZE channels: one read, one write."""
    pid = tl.program_id(0)
    image = (pid // groups).to(tl.int64) * C * P
    first = pid % groups * SIZE
    c, offsets, mask = _tile(first, 0, first + SIZE, P, stride_c, stride_p, BLOCK_C, BLOCK_P)
    x = tl.load(X + image + offsets, mask=mask, other=0.0).to(ACC)
    w = tl.load(W + c, mask=c < first + SIZE, other=0.0).to(ACC)
    b = tl.load(Bias + c, mask=c < first + SIZE, other=0.0).to(ACC)
    n = tl.cast(SIZE * P, ACC)
    mean = tl.sum(tl.sum(x, 1), 0) / n
    d = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(tl.sum(d * d, 1), 0) / n + eps)
    z = d * rstd * w[:, None] + b[:, None]
    if SILU:
        z = z / (1 + tl.exp(-z))
    tl.store(Y + image + offsets, z.to(Y.dtype.element_ty), mask=mask)
    tl.store(Mean + pid, mean)
    tl.store(Rstd + pid, rstd)


@jit
def _group_bwd_kernel(X, DY, W, Bias, Mean, Rstd, DX, DW, DB, C, P, stride_c, stride_p, groups, SIZE: tl.constexpr,
                      SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """A program a group: x and dy read once, dx written; DW and DB (B, C) are this image's share."""
    pid = tl.program_id(0)
    row = (pid // groups).to(tl.int64) * C
    first = pid % groups * SIZE
    c, offsets, mask = _tile(first, 0, first + SIZE, P, stride_c, stride_p, BLOCK_C, BLOCK_P)
    x = tl.load(X + row * P + offsets, mask=mask, other=0.0).to(ACC)
    dy = tl.load(DY + row * P + offsets, mask=mask, other=0.0).to(ACC)
    w = tl.load(W + c, mask=c < first + SIZE, other=0.0).to(ACC)
    b = tl.load(Bias + c, mask=c < first + SIZE, other=0.0).to(ACC)
    rstd = tl.load(Rstd + pid)
    x_hat = (x - tl.load(Mean + pid)) * rstd
    dz = _grad_z(x_hat, dy, w, b, SILU)  # 0 outside the mask, where dy is 0
    dw = tl.sum(dz * x_hat, 1)  # [BLOCK_C]
    db = tl.sum(dz, 1)
    n = tl.cast(SIZE * P, ACC)
    dx = rstd * (dz * w[:, None] - tl.sum(db * w, 0) / n - x_hat * (tl.sum(dw * w, 0) / n))
    tl.store(DX + row * P + offsets, dx.to(DX.dtype.element_ty), mask=mask)
    tl.store(DW + row + c, dw, mask=c < first + SIZE)
    tl.store(DB + row + c, db, mask=c < first + SIZE)


@jit
def _place(C, splits, BLOCK_C: tl.constexpr):
    """Where a program of the split kernels is: its image times C, its first channel, the number of its chunk."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(C, BLOCK_C)
    image = pid // splits // blocks
    return image.to(tl.int64) * C, pid // splits % blocks * BLOCK_C, pid % splits


@jit
def _of_channels(W, Bias, Mean, Rstd, row, c, C, groups, ACC: tl.constexpr):
    """The groups of channels c, and the numbers that belong to these: weight, bias, mean, 1 / standard deviation."""
    group = row // C * groups + c // (C // groups)
    w = tl.load(W + c, mask=c < C, other=0.0).to(ACC)
    b = tl.load(Bias + c, mask=c < C, other=0.0).to(ACC)
    mean = tl.load(Mean + group, mask=c < C, other=0.0)
    rstd = tl.load(Rstd + group, mask=c < C, other=0.0)
    return group, w, b, mean, rstd


@jit
def _split_moments_kernel(X, Means, M2s, C, P, stride_c, stride_p, splits, chunk,
                          ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Mean and sum of squared deviations of every channel over every chunk of positions, (B, C, splits), by Chan's rule."""
    row, c0, split = _place(C, splits, BLOCK_C)
    start = split * chunk
    end = tl.minimum(start + chunk, P)
    mean = tl.zeros([BLOCK_C], ACC)
    m2 = tl.zeros([BLOCK_C], ACC)
    for p0 in range(start, end, BLOCK_P):
        c, offsets, mask = _tile(c0, p0, C, end, stride_c, stride_p, BLOCK_C, BLOCK_P)
        x = tl.load(X + row * P + offsets, mask=mask, other=0.0).to(ACC)
        seen = (p0 - start).to(ACC)
        new = tl.minimum(end - p0, BLOCK_P).to(ACC)
        tile_mean = tl.sum(x, 1) / new
        d = tl.where(mask, x - tile_mean[:, None], 0.0)
        delta = tile_mean - mean
        mean += delta * (new / (seen + new))
        m2 += tl.sum(d * d, 1) + delta * delta * (seen * new / (seen + new))
    c = c0 + tl.arange(0, BLOCK_C)
    tl.store(Means + (row + c) * splits + split, mean, mask=c < C)
    tl.store(M2s + (row + c) * splits + split, m2, mask=c < C)


@jit
def _positions(i, size, P, splits, chunk, ACC: tl.constexpr):
    """How many positions the i-th of a group's size * splits partial sums is of."""
    left = P - i % splits * chunk
    return tl.where(i < size * splits, tl.minimum(left, chunk), 0).to(ACC)


@jit
def _split_combine_kernel(Means, M2s, Mean, Rstd, C, P, groups, splits, chunk, eps, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """A program a group: its mean and 1 / standard deviation, from those of its channels' chunks."""
    pid = tl.program_id(0)
    size = C // groups
    start = pid.to(tl.int64) * size * splits
    n = tl.cast(size * P, ACC)
    share = tl.zeros([BLOCK], ACC)
    for i0 in range(0, size * splits, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        mean = tl.load(Means + start + i, mask=i < size * splits, other=0.0)
        share += _positions(i, size, P, splits, chunk, ACC) * mean / n
    total = tl.sum(share, 0)
    m2 = tl.zeros([BLOCK], ACC)
    for i0 in range(0, size * splits, BLOCK):
        i = i0 + tl.arange(0, BLOCK)
        d = tl.load(Means + start + i, mask=i < size * splits, other=0.0) - total
        within = tl.load(M2s + start + i, mask=i < size * splits, other=0.0)
        m2 += within + _positions(i, size, P, splits, chunk, ACC) * d * d
    tl.store(Mean + pid, total)
    tl.store(Rstd + pid, 1 / tl.sqrt(tl.sum(m2, 0) / n + eps))


@jit
def _split_fwd_kernel(X, W, Bias, Mean, Rstd, Y, C, P, stride_c, stride_p, groups, splits, chunk,
                      SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    row, c0, split = _place(C, splits, BLOCK_C)
    end = tl.minimum((split + 1) * chunk, P)
    c = c0 + tl.arange(0, BLOCK_C)
    _, w, b, mean, rstd = _of_channels(W, Bias, Mean, Rstd, row, c, C, groups, ACC)
    for p0 in range(split * chunk, end, BLOCK_P):
        c, offsets, mask = _tile(c0, p0, C, end, stride_c, stride_p, BLOCK_C, BLOCK_P)
        x = tl.load(X + row * P + offsets, mask=mask, other=0.0).to(ACC)
        z = (x - mean[:, None]) * (rstd * w)[:, None] + b[:, None]
        if SILU:
            z = z / (1 + tl.exp(-z))
        tl.store(Y + row * P + offsets, z.to(Y.dtype.element_ty), mask=mask)


@jit
def _split_sums_kernel(X, DY, W, Bias, Mean, Rstd, DWs, DBs, C, P, stride_c, stride_p, groups, splits, chunk,
                       SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sums of dz * x_hat and of dz over every chunk of positions of every channel, (B, C, splits)."""
    row, c0, split = _place(C, splits, BLOCK_C)
    end = tl.minimum((split + 1) * chunk, P)
    c = c0 + tl.arange(0, BLOCK_C)
    _, w, b, mean, rstd = _of_channels(W, Bias, Mean, Rstd, row, c, C, groups, ACC)
    dw = tl.zeros([BLOCK_C], ACC)
    db = tl.zeros([BLOCK_C], ACC)
    for p0 in range(split * chunk, end, BLOCK_P):
        c, offsets, mask = _tile(c0, p0, C, end, stride_c, stride_p, BLOCK_C, BLOCK_P)
        x_hat = (tl.load(X + row * P + offsets, mask=mask, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
        dz = _grad_z(x_hat, tl.load(DY + row * P + offsets, mask=mask, other=0.0).to(ACC), w, b, SILU)
        dw += tl.sum(dz * x_hat, 1)
        db += tl.sum(dz, 1)
    c = c0 + tl.arange(0, BLOCK_C)
    tl.store(DWs + (row + c) * splits + split, dw, mask=c < C)
    tl.store(DBs + (row + c) * splits + split, db, mask=c < C)


@jit
def _split_bwd_kernel(X, DY, W, Bias, Mean, Rstd, GroupDW, GroupDB, DX, C, P, stride_c, stride_p, groups, splits, chunk,
                      SILU: tl.constexpr, ACC: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """dx, from the group's means of w dz x_hat and w dz, (B, groups)."""
    row, c0, split = _place(C, splits, BLOCK_C)
    end = tl.minimum((split + 1) * chunk, P)
    c = c0 + tl.arange(0, BLOCK_C)
    group, w, b, mean, rstd = _of_channels(W, Bias, Mean, Rstd, row, c, C, groups, ACC)
    dw = tl.load(GroupDW + group, mask=c < C, other=0.0)
    db = tl.load(GroupDB + group, mask=c < C, other=0.0)
    for p0 in range(split * chunk, end, BLOCK_P):
        c, offsets, mask = _tile(c0, p0, C, end, stride_c, stride_p, BLOCK_C, BLOCK_P)
        x_hat = (tl.load(X + row * P + offsets, mask=mask, other=0.0).to(ACC) - mean[:, None]) * rstd[:, None]
        dz = _grad_z(x_hat, tl.load(DY + row * P + offsets, mask=mask, other=0.0).to(ACC), w, b, SILU)
        dx = rstd[:, None] * (dz * w[:, None] - db[:, None] - x_hat * dw[:, None])
        tl.store(DX + row * P + offsets, dx.to(DX.dtype.element_ty), mask=mask)


# ---- operators


def _whole(C, P, groups):
    """The tile of a program that holds a whole group, channels by positions; None where a group is too large for one.

    The number of groups does not matter, nor that of processors: see the top of this file.
    """
    block_c = power_of_2(C // groups)
    block_p = power_of_2(P)
    return (block_c, block_p) if block_c * block_p <= TILE else None


def _split(B, C, P, last, wanted):
    """The tile of the split kernels, and the positions of a chunk, so that at least `wanted` programs start if possible."""
    if last:
        block_c = min(power_of_2(C), 128)
        block_p = TILE // 2 // block_c
    else:
        block_p = min(power_of_2(P), TILE // 2)
        block_c = min(power_of_2(C), TILE // 2 // block_p)
    chunk = 8 * block_p  # so that the partial sums of a chunk are a small share of what was read for them
    while B * cdiv(C, block_c) * cdiv(P, chunk) < wanted:
        if chunk > block_p:
            chunk //= 2
        elif last and block_c > 32:  # 32 channels side by side are still 64 bytes or more
            block_c //= 2
        elif not last and block_p > 512:
            block_p //= 2
            chunk = block_p
        else:
            break
    return block_c, block_p, chunk


def _num_warps(blocks):
    return min(max(blocks[0] * blocks[1] // 512, 1), 16)


def _constants(x, block_c, block_p):
    return {"ACC": acc_type(x), "BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": _num_warps((block_c, block_p))}


def _sizes(x, last):
    """C, P and the two strides of an image, as all kernels take them."""
    C = x.shape[1]
    P = x.numel() // (len(x) * C)
    return (C, P, 1, C) if last else (C, P, P, 1)


def _fake_fwd(x, groups, weight, bias, eps, silu):
    stats = x.new_empty(x.shape[0], groups, dtype=accumulator(x))
    return torch.empty_like(dense(x)[0]), stats, torch.empty_like(stats)


def _save(ctx, inputs, output):
    x, ctx.groups, weight, bias, _, ctx.silu = inputs
    ctx.set_materialize_grads(False)  # nothing asks for gradients of the statistics
    ctx.save_for_backward(x, weight, bias, *output[1:])


def _backward(ctx, dy, dmean, drstd):
    if dy is None:
        return None, None, None, None, None, None
    x, weight, bias, mean, rstd = ctx.saved_tensors
    dx, (dw, db) = _bwd(dy, x, ctx.groups, weight, bias, mean, rstd, ctx.silu)
    return dx, None, dw.to(weight.dtype), db.to(bias.dtype), None, None


@operator("group_norm_fwd", _fake_fwd, _save, _backward)
def _fwd(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float,
         silu: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, last = dense(x)
    weight = weight.contiguous()
    bias = bias.contiguous()
    B = len(x)
    C, P, *strides = _sizes(x, last)
    y = torch.empty_like(x)
    mean = x.new_empty(B, groups, dtype=accumulator(x))
    rstd = torch.empty_like(mean)
    if whole := _whole(C, P, groups):
        launch(_group_fwd_kernel, B * groups, x, weight, bias, y, mean, rstd, C, P, *strides, groups, eps,
               SIZE=C // groups, SILU=silu, **_constants(x, *whole))
        return y, mean, rstd
    *blocks, chunk = _split(B, C, P, last, 2 * processors(x.device))
    splits = cdiv(P, chunk)
    programs = B * cdiv(C, blocks[0]) * splits
    constants = _constants(x, *blocks)
    means = x.new_empty(B, C, splits, dtype=mean.dtype)
    m2s = torch.empty_like(means)
    launch(_split_moments_kernel, programs, x, means, m2s, C, P, *strides, splits, chunk, **constants)
    launch(_split_combine_kernel, B * groups, means, m2s, mean, rstd, C, P, groups, splits, chunk, eps,
           ACC=constants["ACC"], BLOCK=1024)
    launch(_split_fwd_kernel, programs, x, weight, bias, mean, rstd, y, C, P, *strides, groups, splits, chunk,
           SILU=silu, **constants)
    return y, mean, rstd


def _fake_bwd(dy, x, groups, weight, bias, mean, rstd, silu):
    return torch.empty_like(dense(x)[0]), mean.new_empty(2, x.shape[1])


@operator("group_norm_bwd", _fake_bwd)
def _bwd(dy: torch.Tensor, x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, mean: torch.Tensor,
         rstd: torch.Tensor, silu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and the gradients of weight and bias as (2, C), in the type of mean."""
    x, last = dense(x)
    dy = dy.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    inputs = (x, dy, weight.contiguous(), bias.contiguous(), mean, rstd)
    B = len(x)
    C, P, *strides = _sizes(x, last)
    dx = torch.empty_like(x)
    if whole := _whole(C, P, groups):
        sums = x.new_empty(2, B, C, dtype=mean.dtype)
        launch(_group_bwd_kernel, B * groups, *inputs, dx, *sums, C, P, *strides, groups,
               SIZE=C // groups, SILU=silu, **_constants(x, *whole))
    else:
        *blocks, chunk = _split(B, C, P, last, 2 * processors(x.device))
        splits = cdiv(P, chunk)
        programs = B * cdiv(C, blocks[0]) * splits
        constants = _constants(x, *blocks)
        parts = x.new_empty(2, B, C, splits, dtype=mean.dtype)
        launch(_split_sums_kernel, programs, *inputs, *parts, C, P, *strides, groups, splits, chunk, SILU=silu, **constants)
        sums = parts.sum(3)  # (2, B, C)
        means = (sums * weight.to(mean.dtype)).view(2, B, groups, -1).sum(3).div_(C // groups * P)
        launch(_split_bwd_kernel, programs, *inputs, *means, dx, C, P, *strides, groups, splits, chunk, SILU=silu, **constants)
    return dx, sums.sum(1)


def supports(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor) -> tuple[bool, str]:
    if x.dtype not in FLOATS:
        return False, f"x is {x.dtype}"
    if not weight.device == bias.device == x.device:
        return False, f"x is on {x.device}, weight on {weight.device}, bias on {bias.device}"
    if math.prod(x.shape[1:]) >= 2**31:  # offsets in a sample, and the size of a group, are int32
        return False, f"x {tuple(x.shape)} has 2^31 elements a sample, or more"
    return True, ""


def group_norm_silu(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5,
                    silu: bool = True, *, backend: str | None = None) -> torch.Tensor:
    """SiLU of the group norm of x; group_norm without SiLU. x (B, C, *) floating -> the same shape, type and layout
    (what the plain form makes on CUDA is contiguous, as of PyTorch's own group norm).

    groups divides C; weight, bias (C,), of any floating type; autocast changes no type. Differentiable once in x, weight and
    bias. backend: one of kernels.MODES, for this call. Raises ValueError for shapes that do not fit, and what use_triton
    raises.
    """
    if x.dim() < 2 or groups < 1 or x.shape[1] % groups or not weight.shape == bias.shape == x.shape[1:2]:
        raise ValueError(f"group_norm_silu: {groups} groups, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} "
                         f"do not fit x {tuple(x.shape)}")
    if use_triton("group_norm_silu", x, lambda: supports(x, groups, weight, bias), LEAST, backend=backend):
        return _fwd(x, groups, weight, bias, eps, silu)[0]
    return group_norm_silu_torch(x, groups, weight, bias, eps, silu)


def group_norm(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5, *,
               backend: str | None = None) -> torch.Tensor:
    """Group norm alone: group_norm_silu without its SiLU."""
    return group_norm_silu(x, groups, weight, bias, eps, silu=False, backend=backend)


def _spec(kernel, dtype, values, statistics, blocks, registers, channels_last=False, more=None):
    strides = {"stride_c": 1, "stride_p": "i32:16"} if channels_last else {"stride_c": "i32:16", "stride_p": 1}
    args = dict.fromkeys(values, f"*{dtype}") | dict.fromkeys(statistics, "*fp32") | strides
    args |= {"C": "i32:16", "P": "i32:16", "groups": "i32", "splits": "i32", "chunk": "i32:16", "eps": "fp32"}
    args |= {"SIZE": 8, "SILU": True, "ACC": tl.float32, "BLOCK_C": blocks[0], "BLOCK_P": blocks[1]} | (more or {})
    name = f"{dtype}, {'channels_last' if channels_last else 'contiguous'}, {blocks[0]} channels by {blocks[1]}"
    return Spec(kernel, name, args, num_warps=_num_warps(blocks), registers=registers, vector=blocks[1] > 1)


_STATS = ("W", "Bias", "Mean", "Rstd")
AOT_SPECS = [] if triton is None else [
    *(spec for t in ("fp32", "bf16") for spec in (
        _spec("_group_fwd_kernel", t, ("X", "Y"), _STATS, (8, 1024), 80),
        _spec("_group_bwd_kernel", t, ("X", "DY", "DX"), (*_STATS, "DW", "DB"), (8, 1024), 96),
        _spec("_group_fwd_kernel", t, ("X", "Y"), _STATS, (8, 256), 80, True),
        _spec("_group_bwd_kernel", t, ("X", "DY", "DX"), (*_STATS, "DW", "DB"), (8, 256), 96, True),
        _spec("_split_moments_kernel", t, ("X",), ("Means", "M2s"), (128, 32), 96, True),
        _spec("_split_fwd_kernel", t, ("X", "Y"), _STATS, (128, 32), 96, True),
        _spec("_split_sums_kernel", t, ("X", "DY"), (*_STATS, "DWs", "DBs"), (128, 32), 128, True),
        _spec("_split_bwd_kernel", t, ("X", "DY", "DX"), (*_STATS, "GroupDW", "GroupDB"), (128, 32), 128, True),
    )),
    *(_spec(kernel, "fp32", values, (*_STATS, "DW", "DB"), (8, 1), 40, more={"P": 1, "stride_c": 1})  # (B, C): P is a constant
      for kernel, values in (("_group_fwd_kernel", ("X", "Y")), ("_group_bwd_kernel", ("X", "DY", "DX")))),
    Spec("_split_combine_kernel", "fp32", dict.fromkeys(("Means", "M2s", "Mean", "Rstd"), "*fp32")
         | dict.fromkeys(("C", "P", "groups", "chunk"), "i32") | {"splits": "i32:16", "eps": "fp32"}
         | {"ACC": tl.float32, "BLOCK": 1024}, registers=64),
]


def _more():
    """Every other tile of a launch, in every type."""
    for t in ("fp32", "bf16", "fp16"):
        for blocks in ((32, 128), (32, 32), (64, 64), (64, 32), (128, 32)):
            yield _spec("_split_moments_kernel", t, ("X",), ("Means", "M2s"), blocks, 128, True)
            yield _spec("_split_fwd_kernel", t, ("X", "Y"), _STATS, blocks, 128, True)
            yield _spec("_split_sums_kernel", t, ("X", "DY"), (*_STATS, "DWs", "DBs"), blocks, 168, True)
            yield _spec("_split_bwd_kernel", t, ("X", "DY", "DX"), (*_STATS, "GroupDW", "GroupDB"), blocks, 168, True)
        for blocks in ((1, 4096), (4, 1024), (8, 512)):
            yield _spec("_split_sums_kernel", t, ("X", "DY"), (*_STATS, "DWs", "DBs"), blocks, 168)
            yield _spec("_split_bwd_kernel", t, ("X", "DY", "DX"), (*_STATS, "GroupDW", "GroupDB"), blocks, 168)


AOT_MORE = [] if triton is None else list(_more())
