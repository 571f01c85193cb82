"""Bias and leaky ReLU in one pass, differentiable any number of times (as in StyleGAN2, Karras et al. 2020, appendix B).

    y = gain * leaky_relu(x + bias_c),  leaky_relu(z) = z where z > 0, slope * z elsewhere;  y = gain * factor * (x + bias_c)

x (B, C, *) contiguous, or (B, C, H, W) in channels_last; bias (C,) or None. y has the type and the layout of x. As gain is
positive and slope is not negative, the sign of y gives the factor, 1 or slope: y alone is kept for the backward passes.

    first derivative    dx = gain * factor * dy,  dbias = its sum over images and positions          (_bwd)
    derivative of that  ddy = gain * factor * (ddx + ddbias_c), nothing to y                         (_fwd again, with y's sign)

so that the losses that differentiate twice (R1, R2, WGAN-GP) get the true second derivative, zero but for the kinks,
from the same two operators: the derivative of each is the other.

Least bytes, n = bytes of x: forward 2n (x in, y out), backward 3n (dy and y in, dx out), second backward 3n (ddx and y in,
ddy out). Beside that move C numbers, and in the backward pass partial sums, a few a tile.

When not: on the CPU, and under torch.compile, which fuses this with its neighbours.
"""

import torch
import torch.nn.functional as F

from . import FLOATS, Spec, acc_type, accumulator, dense, jit, launch, operator, tl, triton, use_triton

TILE = 4096  # elements that a program holds at once
TILES = 4  # tiles that a program of the backward kernel goes through, for one partial sum a channel


def bias_act_reference(x, bias=None, slope=0.2, gain=2**0.5):
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
    return gain * torch.where(x > 0, x, slope * x)


def bias_act_torch(x, bias=None, slope=0.2, gain=2**0.5):
    """The fastest plain form: the gain, being positive, goes inside, where it costs no pass, and the rest is done in place."""
    if bias is None:
        return F.leaky_relu_(x * gain, slope)
    bias = (gain * bias).to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
    return F.leaky_relu_(torch.add(bias, x, alpha=gain), slope)


# ---- kernels: x is rows of images' positions, P to an image, by channels; a tile is BLOCK_C channels by BLOCK_R rows


@jit
def _tile(c0, r0, C, R, P, stride_c, stride_p, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Channels, offsets and mask of the tile that starts at channel c0 and row r0."""
    c, r = c0 + tl.arange(0, BLOCK_C), r0 + tl.arange(0, BLOCK_R)
    rows = (r // P).to(tl.int64) * P * C + (r % P).to(tl.int64) * stride_p
    return c, rows[None, :] + c[:, None].to(tl.int64) * stride_c, (c[:, None] < C) & (r[None, :] < R)


@jit
def _bias_act_fwd_kernel(X, Bias, Sign, Y, C, R, P, stride_c, stride_p, SLOPE: tl.constexpr, GAIN: tl.constexpr,
                         BIAS: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Y = gain * factor * (X + Bias); the factor by the sign of Sign where SIGN, else by that of X + Bias."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c, offsets, mask = _tile(pid % blocks * BLOCK_C, pid // blocks * BLOCK_R, C, R, P, stride_c, stride_p, BLOCK_C, BLOCK_R)
    x = tl.load(X + offsets, mask=mask, other=0.0).to(ACC)
    if BIAS:
        x += tl.load(Bias + c, mask=c < C, other=0.0).to(ACC)[:, None]
    sign = x
    if SIGN:
        sign = tl.load(Sign + offsets, mask=mask, other=0.0).to(ACC)
    y = GAIN * tl.where(sign > 0, x, SLOPE * x)
    tl.store(Y + offsets, y.to(Y.dtype.element_ty), mask=mask)


@jit
def _bias_act_bwd_kernel(DY, Sign, DX, DBs, C, R, P, stride_c, stride_p, SLOPE: tl.constexpr, GAIN: tl.constexpr,
                         TILES: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """DX = gain * factor * DY; DBs (chunks, C), its sums over the rows of this program's tiles."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    chunk, c0 = pid // blocks, pid % blocks * BLOCK_C
    db = tl.zeros([BLOCK_C], ACC)
    for i in range(TILES):
        c, offsets, mask = _tile(c0, (chunk * TILES + i) * BLOCK_R, C, R, P, stride_c, stride_p, BLOCK_C, BLOCK_R)
        dy = tl.load(DY + offsets, mask=mask, other=0.0).to(ACC)
        sign = tl.load(Sign + offsets, mask=mask, other=0.0).to(ACC)
        dx = GAIN * tl.where(sign > 0, dy, SLOPE * dy)
        tl.store(DX + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        db += tl.sum(dx, 1)
    if BIAS:
        c = c0 + tl.arange(0, BLOCK_C)
        tl.store(DBs + chunk.to(tl.int64) * C + c, db, mask=c < C)


# ---- operators


def _like(x, last):
    """x in the layout that goes with last."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _layout(x, last):
    """C, rows, rows of an image, strides; constants of a launch; programs along the rows and along the channels."""
    C, R = x.shape[1], x.numel() // x.shape[1]
    if last or R == len(x):  # rows are contiguous, and of all images alike
        P, strides = R, (1, C)
        block_c = min(triton.next_power_of_2(C), 128)
        block_r = min(triton.next_power_of_2(R), TILE // block_c)
    else:
        P = R // len(x)
        strides = P, 1
        block_r = min(triton.next_power_of_2(P), TILE // 4)
        block_c = min(triton.next_power_of_2(C), TILE // block_r)
        block_r = min(triton.next_power_of_2(R), TILE // block_c)
    constants = {"ACC": acc_type(x), "BLOCK_C": block_c, "BLOCK_R": block_r}
    constants["num_warps"] = 8
    return (C, R, P, *strides), constants, triton.cdiv(R, block_r), triton.cdiv(C, block_c)


def _fake_fwd(x, bias, sign, slope, gain):
    return torch.empty_like(_like(x, dense(x if sign is None else sign)[1]))


def _save_fwd(ctx, inputs, output):
    _, bias, sign, ctx.slope, ctx.gain = inputs
    ctx.bias = None if bias is None else bias.dtype
    ctx.save_for_backward(output if sign is None else sign)


def _backward_fwd(ctx, dy):
    dx, db = _bwd(dy, *ctx.saved_tensors, ctx.bias is not None, ctx.slope, ctx.gain)
    return dx, None if ctx.bias is None else db.to(ctx.bias), None, None, None


@operator("bias_act_fwd", _fake_fwd, _save_fwd, _backward_fwd)
def _fwd(x: torch.Tensor, bias: torch.Tensor | None, sign: torch.Tensor | None, slope: float, gain: float) -> torch.Tensor:
    """gain * factor * (x + bias), in the layout of sign where that is given, else of x."""
    last = dense(x if sign is None else sign)[1]
    x = _like(x, last)
    y = torch.empty_like(x)
    sizes, constants, rows, columns = _layout(x, last)
    constants |= {"SLOPE": slope, "GAIN": gain, "BIAS": bias is not None, "SIGN": sign is not None}
    bias = x if bias is None else bias.contiguous()  # a kernel does not read what a constant switches off
    sign = x if sign is None else _like(sign, last)
    launch(_bias_act_fwd_kernel, rows * columns, x, bias, sign, y, *sizes, **constants)
    return y


def _fake_bwd(dy, y, bias, slope, gain):
    return torch.empty_like(dense(y)[0]), y.new_empty(y.shape[1] if bias else 0, dtype=accumulator(y))


def _save_bwd(ctx, inputs, output):
    _, y, ctx.bias, ctx.slope, ctx.gain = inputs
    ctx.save_for_backward(y)


def _backward_bwd(ctx, ddx, ddb):
    y, = ctx.saved_tensors
    return _fwd(ddx, ddb if ctx.bias else None, y, ctx.slope, ctx.gain), None, None, None, None


@operator("bias_act_bwd", _fake_bwd, _save_bwd, _backward_bwd)
def _bwd(dy: torch.Tensor, y: torch.Tensor, bias: bool, slope: float, gain: float) -> tuple[torch.Tensor, torch.Tensor]:
    """dx and dbias, the latter in the type of accumulation, and empty where there is no bias."""
    y, last = dense(y)
    dy = _like(dy, last)
    dx = torch.empty_like(y)
    sizes, constants, rows, columns = _layout(y, last)
    chunks = triton.cdiv(rows, TILES)
    sums = y.new_empty(chunks, sizes[0] if bias else 0, dtype=accumulator(y))
    launch(_bias_act_bwd_kernel, chunks * columns, dy, y, dx, sums, *sizes, SLOPE=slope, GAIN=gain, TILES=TILES, BIAS=bias,
           **constants)
    return dx, sums.sum(0)


def supports(x, bias):
    if x.dtype not in FLOATS:
        return False, f"x is {x.dtype}"
    if bias is not None and bias.device != x.device:
        return False, f"x is on {x.device}, bias on {bias.device}"
    if x.numel() // max(x.shape[1], 1) >= 2**31 - TILE * TILES:
        return False, "x has more than 2^31 images times positions"
    return True, ""


def bias_act(x, bias=None, slope=0.2, gain=2**0.5):
    """gain * leaky_relu(x + bias), of x (B, C, *) floating and bias (C,) or None: the shape, type and layout of x.

    slope >= 0, and 0 for a ReLU; gain > 0, by default what keeps the second moment. Differentiable any number of times in
    x and bias. Raises ValueError for what does not fit, and what use_triton raises.
    """
    if x.dim() < 2 or bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias_act: bias {None if bias is None else tuple(bias.shape)} does not fit x {tuple(x.shape)}")
    if slope < 0 or gain <= 0:
        raise ValueError(f"bias_act: slope {slope} must not be negative, gain {gain} must be positive")
    if use_triton("bias_act", x, lambda: supports(x, bias), least=1 << 16, elementwise=True):
        return _fwd(x, bias, None, slope, gain)
    return bias_act_torch(x, bias, slope, gain)


def _spec(kernel, dtype, blocks, registers, channels_last=False, **more):
    strides = {"stride_c": 1, "stride_p": "i32:16"} if channels_last else {"stride_c": "i32:16", "stride_p": 1}
    args = dict.fromkeys(("X", "Y", "Sign", "DY", "DX"), f"*{dtype}") | {"Bias": "*fp32", "DBs": "*fp32"} | strides
    args |= dict.fromkeys(("C", "R", "P"), "i32:16") | {"SLOPE": 0.2, "GAIN": 2**0.5, "TILES": 4, "BIAS": True}
    args |= {"SIGN": False, "ACC": tl.float32, "BLOCK_C": blocks[0], "BLOCK_R": blocks[1]} | more
    name = f"{dtype}, {'channels_last' if channels_last else 'contiguous'}, {blocks[0]} by {blocks[1]}"
    return Spec(kernel, name + ", by the sign" * bool(more), args, num_warps=8, registers=registers)


AOT_SPECS = [] if triton is None else [spec for t in ("fp32", "bf16") for spec in (
    _spec("_bias_act_fwd_kernel", t, (4, 1024), 48),
    _spec("_bias_act_fwd_kernel", t, (128, 32), 48, True),
    _spec("_bias_act_fwd_kernel", t, (4, 1024), 48, SIGN=True),
    _spec("_bias_act_fwd_kernel", t, (128, 32), 48, True, SIGN=True),
    _spec("_bias_act_bwd_kernel", t, (4, 1024), 64),
    _spec("_bias_act_bwd_kernel", t, (64, 64), 72),
    _spec("_bias_act_bwd_kernel", t, (128, 32), 72, True),
)]
