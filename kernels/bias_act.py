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

import functools

import torch
import torch.nn.functional as F

from . import FLOATS, Spec, accumulator, cdiv, dense, jit, launch, operator, power_of_2, tl, triton, use_triton

TILE = 4096  # elements that a program holds at once
LEAST = 1 << 16  # elements for "auto". A call costs the CPU 5 us and one launch, measured, the plain form 7 us and three
# launches: about the same. So this is where a kernel begins to fill a device, with 16 programs.
TILES = 4  # tiles that a program of the backward kernel goes through, for one partial sum a channel


def bias_act_reference(x: torch.Tensor, bias: torch.Tensor | None = None, slope: float = 0.2,
                       gain: float = 2**0.5) -> torch.Tensor:
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
    return gain * torch.where(x > 0, x, slope * x)


def bias_act_torch(x: torch.Tensor, bias: torch.Tensor | None = None, slope: float = 0.2, gain: float = 2**0.5) -> torch.Tensor:
    """The fastest plain form: the gain, being positive, goes inside, where it costs no pass, and the rest is done in place."""
    if bias is None:
        return F.leaky_relu_(x * gain, slope)
    bias = (gain * bias.to(accumulator(x))).to(x.dtype).view(-1, *(1,) * (x.dim() - 2))
    return F.leaky_relu_(torch.add(bias, x, alpha=gain), slope)


# ---- kernels: x is rows, that is positions of images, P to an image, by channels; a tile is BLOCK_C channels by BLOCK_R rows.
# LAST: the channels are contiguous, as in channels_last; then the rows of all images count as those of one.


@jit
def _tile(c0, r0, C, images, P, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """The tile that starts at channel c0 and row r0: channels, offset of its first image, offsets from there on, mask."""
    c = c0 + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R)
    mask = (c[:, None] < C) & (r[None, :] < images * P - r0)  # [BLOCK_C, BLOCK_R]
    if LAST:
        start = tl.cast(r0, tl.int64) * C
        offsets = r[None, :] * C + c[:, None]
    else:
        start = tl.cast(r0 // P, tl.int64) * P * C
        r += r0 % P
        rows = r // P * P * C + r % P
        offsets = rows[None, :] + c[:, None] * P
    return c, start, offsets, mask


@jit
def _bias_act_fwd_kernel(X, Bias, Sign, Y, C, images, P, SLOPE: tl.constexpr, GAIN: tl.constexpr,
                         BIAS: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """Y = gain * factor * (X + Bias); the factor by the sign of Sign where SIGN, else by that of X + Bias."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    c, start, offsets, mask = _tile(pid % blocks * BLOCK_C, pid // blocks * BLOCK_R, C, images, P, LAST, BLOCK_C, BLOCK_R)
    x = tl.load(X + start + offsets, mask=mask, other=0.0).to(ACC)
    if BIAS:
        x += tl.load(Bias + c, mask=c < C, other=0.0).to(ACC)[:, None]
    sign = x
    if SIGN:
        sign = tl.load(Sign + start + offsets, mask=mask, other=0.0).to(ACC)
    y = GAIN * tl.where(sign > 0, x, SLOPE * x)
    tl.store(Y + start + offsets, y.to(Y.dtype.element_ty), mask=mask)


@jit
def _bias_act_bwd_kernel(DY, Sign, DX, DBs, C, images, P, SLOPE: tl.constexpr, GAIN: tl.constexpr,
                         TILES: tl.constexpr, BIAS: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr,
                         BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr):
    """DX = gain * factor * DY; DBs (chunks, C), its sums over the rows of this program's tiles."""
    blocks = tl.cdiv(C, BLOCK_C)
    pid = tl.program_id(0)
    chunk = pid // blocks
    c0 = pid % blocks * BLOCK_C
    db = tl.zeros([BLOCK_C], ACC)
    for i in range(TILES):
        c, start, offsets, mask = _tile(c0, (chunk * TILES + i) * BLOCK_R, C, images, P, LAST, BLOCK_C, BLOCK_R)
        dy = tl.load(DY + start + offsets, mask=mask, other=0.0).to(ACC)
        sign = tl.load(Sign + start + offsets, mask=mask, other=0.0).to(ACC)
        dx = GAIN * tl.where(sign > 0, dy, SLOPE * dy)
        tl.store(DX + start + offsets, dx.to(DX.dtype.element_ty), mask=mask)
        db += tl.sum(dx, 1)
    if BIAS:
        c = c0 + tl.arange(0, BLOCK_C)
        tl.store(DBs + chunk.to(tl.int64) * C + c, db, mask=c < C)


# ---- operators


def _like(x, last):
    """x in the layout that goes with last."""
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _plan(shape, last, dtype, tile):
    """Of x of a shape, layout and type: C, images and P; constants of a launch; tiles along the rows, along the channels."""
    C = shape[1]
    rows = shape.numel() // C
    last = last or rows == shape[0]
    images, P = (1, rows) if last else (shape[0], rows // shape[0])
    most = 128 if last else 4 if P >= 512 else 32  # channels: where positions are contiguous, they are read in long runs
    block_c = min(power_of_2(C), most, tile)
    block_r = tile // block_c
    constants = {"ACC": tl.float64 if dtype == torch.float64 else tl.float32, "LAST": last}
    constants |= {"BLOCK_C": block_c, "BLOCK_R": block_r, "num_warps": 8}
    return (C, images, P), constants, cdiv(rows, block_r), cdiv(C, block_c)


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
    sizes, constants, rows, columns = _plan(x.shape, last, x.dtype, TILE)
    biases = x if bias is None else bias.contiguous()  # a kernel does not read what a constant switches off
    signs = x if sign is None else _like(sign, last)
    launch(_bias_act_fwd_kernel, rows * columns, x, biases, signs, y, *sizes, SLOPE=slope, GAIN=gain, BIAS=bias is not None,
           SIGN=sign is not None, **constants)
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
    sizes, constants, rows, columns = _plan(y.shape, last, y.dtype, TILE)
    chunks = cdiv(rows, TILES)
    sums = y.new_empty(chunks, sizes[0] if bias else 0, dtype=accumulator(y))
    launch(_bias_act_bwd_kernel, chunks * columns, dy, y, dx, sums, *sizes, SLOPE=slope, GAIN=gain, TILES=TILES, BIAS=bias,
           **constants)
    return dx, sums.sum(0)


def supports(x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[bool, str]:
    """Whether the kernels take these arguments, and the reason in words."""
    if x.dtype not in FLOATS:
        return False, f"x is {x.dtype}"
    if bias is not None and bias.device != x.device:
        return False, f"x is on {x.device}, bias on {bias.device}"
    C = x.shape[1]
    if x.numel() // max(C, 1) >= 2**31 - TILE * TILES:
        return False, "x has more than 2^31 images times positions"
    if x.numel() // max(len(x), 1) >= 2**31 - TILE * C:  # offsets from an image on are int32
        return False, f"x {tuple(x.shape)} has some 2^31 elements a sample, or more"
    return True, ""


def bias_act(x: torch.Tensor, bias: torch.Tensor | None = None, slope: float = 0.2, gain: float = 2**0.5, *,
             backend: str | None = None) -> torch.Tensor:
    """gain * leaky_relu(x + bias), of x (B, C, *) floating and bias (C,) or None: the shape, type and layout of x.

    slope >= 0, and 0 for a ReLU; gain > 0, by default what keeps the second moment. A bias of another type than x is fine.
    Differentiable any number of times in x and bias. backend: one of kernels.MODES, instead of kernels.mode in this call.
    Raises ValueError for what does not fit, and what use_triton raises.
    """
    if x.dim() < 2 or bias is not None and bias.shape != x.shape[1:2]:
        raise ValueError(f"bias_act: bias {None if bias is None else tuple(bias.shape)} does not fit x {tuple(x.shape)}")
    if slope < 0 or gain <= 0:
        raise ValueError(f"bias_act: slope {slope} must not be negative, gain {gain} must be positive")
    if use_triton("bias_act", x, lambda: supports(x, bias), least=LEAST, elementwise=True, backend=backend):
        return _fwd(x, bias, None, slope, gain)
    return bias_act_torch(x, bias, slope, gain)


def _spec(kernel, dtype, blocks, registers, last=False, **more):
    args = dict.fromkeys(("X", "Y", "Sign", "DY", "DX"), f"*{dtype}") | {"Bias": "*fp32", "DBs": "*fp32"}
    args |= dict.fromkeys(("C", "images", "P"), "i32:16") | {"SLOPE": 0.2, "GAIN": 2**0.5, "TILES": 4, "BIAS": True}
    args |= {"SIGN": False, "ACC": tl.float32, "LAST": last, "BLOCK_C": blocks[0], "BLOCK_R": blocks[1]}
    args |= {"images": 1} if last else {}
    name = f"{dtype}, {'channels_last' if last else 'contiguous'}, {blocks[0]} by {blocks[1]}"
    name += "".join(f", {key} {value}" for key, value in more.items() if key != "SIGN") + ", by the sign" * ("SIGN" in more)
    vector = last or more.get("P", "i32:16") == "i32:16"
    return Spec(kernel, name, args | more, num_warps=8, registers=registers, vector=vector)


AOT_SPECS = [] if triton is None else [spec for t in ("fp32", "bf16") for spec in (
    _spec("_bias_act_fwd_kernel", t, (4, 1024), 48),
    _spec("_bias_act_fwd_kernel", t, (128, 32), 48, True),
    _spec("_bias_act_fwd_kernel", t, (4, 1024), 48, SIGN=True),
    _spec("_bias_act_fwd_kernel", t, (128, 32), 48, True, SIGN=True),
    _spec("_bias_act_bwd_kernel", t, (4, 1024), 64),
    _spec("_bias_act_bwd_kernel", t, (32, 128), 72),
    _spec("_bias_act_bwd_kernel", t, (128, 32), 80, True),
)]


def _more():
    """Every other block that _plan chooses, without a bias, and image sizes and channels that 16 does not divide."""
    for t in ("fp32", "bf16", "fp16"):
        for blocks, last in (((1, 4096), False), ((32, 128), False), ((4, 1024), False), ((16, 256), True), ((128, 32), True)):
            for more in ({}, {"P": "i32", "images": "i32", "C": "i32"}):
                more = more if not last else {key: a for key, a in more.items() if key == "P"}
                yield _spec("_bias_act_fwd_kernel", t, blocks, 96, last, **more)
                yield _spec("_bias_act_bwd_kernel", t, blocks, 128, last, **more)
            yield _spec("_bias_act_fwd_kernel", t, blocks, 96, last, BIAS=False, Bias=None, SIGN=True)
            yield _spec("_bias_act_bwd_kernel", t, blocks, 96, last, BIAS=False)


AOT_MORE = [] if triton is None else list(_more())
