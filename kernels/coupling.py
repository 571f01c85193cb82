"""Affine coupling layers of normalizing flows (Dinh et al. 2017), with their log-determinant. Splines are in spline.py.

    y = x * exp(log_s) + shift,   log_s = s_max * tanh(raw / s_max),   log_det = sum of log_s

and reverse=True gives the inverse and its log_det, (y - shift) * exp(-log_s) and the negative sum. This is RealNVP's tanh,
scaled so that the slope at 0 is 1: raw = 0 is the identity, and a scale in exp(-s_max, s_max) keeps both directions finite
for every raw. (Glow's sigmoid(raw + 2) only shrinks, towards 0, where the inverse overflows.) The network that makes params
must not see what is transformed: leading channels pass unchanged (a split), or what a mask keeps.

x (B, C, *) contiguous, or (B, C, H, W) in channels_last; params are read in the layout of x: raw log-scales, then shifts,
for the transformed channels, or for all with a mask.

Least bytes, n = bytes of x, r = bytes of its transformed part (n with a mask, which is read beside it, the same for all
samples): forward 2n + 2r (x, params in, y out), backward 2n + 4r (x, raw, dy in, dx, dparams out), and r more in reverse.
x and params are all that is saved for the backward pass. log_det is one partial sum a program, then a sum: no atomics.

When not: on the CPU, and under torch.compile, which fuses this with its neighbours.
"""

import math

import torch

from . import FLOATS, Spec, acc_type, accumulator, cdiv, dense, jit, launch, operator, tl, triton, use_triton
from .spline import MIN, spline_coupling, spline_coupling_reference, spline_coupling_torch  # noqa: F401  both kinds from here

BLOCK = 1024  # elements of a program
SMALL = 128  # elements of a program where a sample has no more
LEAST = 1 << 14  # elements of x from which "auto" takes the kernel: below, bytes cost little beside the CPU's time, which is
# about the same. Measured on a CPU with nothing launched: 19 us a call, 82 with gradients, and argued: 10 us more a launch.
# The plain form's 7 operations, 17 with gradients, take 22 and 176 us on small tensors there, and a launch each on a GPU.


def affine_coupling_reference(x: torch.Tensor, params: torch.Tensor, mask_or_split: torch.Tensor | int, reverse: bool = False,
                              s_max: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    raw, shift = params.chunk(2, 1)
    log_s = s_max * torch.tanh(raw / s_max)
    if isinstance(mask_or_split, int):
        kept, x = x.tensor_split([mask_or_split], 1)
    else:
        kept = x[:, :0]
        log_s = log_s * (mask_or_split == 0)
        shift = shift * (mask_or_split == 0)
    y = (x - shift) * torch.exp(-log_s) if reverse else x * torch.exp(log_s) + shift
    log_det = log_s.flatten(1).sum(1)
    return torch.cat([kept, y], 1), -log_det if reverse else log_det


def affine_coupling_torch(x: torch.Tensor, params: torch.Tensor, mask_or_split: torch.Tensor | int, reverse: bool = False,
                          s_max: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """The fastest plain form: the reference, computed in float32 where x is a half type."""
    acc = accumulator(x)
    y, log_det = affine_coupling_reference(x.to(acc), params.to(acc), mask_or_split, reverse, s_max)
    return y.to(x.dtype), log_det


# ---- kernels: a program takes BLOCK elements of one sample of n, which lies in memory as rows of ROW elements. The last MOVED
# of a row are transformed, by 2 * MOVED parameters: their raw log-scales, then their shifts. One row where x is contiguous,
# a row a position in channels_last. With a mask all of a row has parameters.


@jit
def _places(i, n, ROW, MOVED, ONE_ROW: tl.constexpr):
    """Where the raw log-scales of elements i are, and which elements move, that is have them. [BLOCK]"""
    if ONE_ROW:
        place = i - (ROW - MOVED)
        at = place
    else:
        place = i % ROW - (ROW - MOVED)
        at = i // ROW * (2 * MOVED) + place
    return at, (i < n) & (place >= 0)


@jit
def _log_scale(raw, S_MAX: tl.constexpr):
    """log_s, and tanh(raw / S_MAX) for its derivative. [BLOCK]"""
    e = tl.exp(-2 * tl.abs(raw) / S_MAX)
    tanh = tl.where(raw < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return S_MAX * tanh, tanh


@jit
def _affine_fwd_kernel(X, Params, Mask, Y, Partial, n, ROW, MOVED, S_MAX: tl.constexpr, MASKED: tl.constexpr,
                       ONE_ROW: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Y, and in Partial this program's part of log_det."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK)
    sample = (pid // tiles).to(tl.int64)
    i = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        MOVED = ROW
    at, moves = _places(i, n, ROW, MOVED, ONE_ROW)
    Params += sample * (n // ROW) * (2 * MOVED)
    log_s, _ = _log_scale(tl.load(Params + at, mask=moves, other=0.0).to(ACC), S_MAX)
    shift = tl.load(Params + at + MOVED, mask=moves, other=0.0).to(ACC)
    if MASKED:
        kept = tl.load(Mask + i, mask=i < n, other=1) != 0
        log_s = tl.where(kept, 0.0, log_s)
        shift = tl.where(kept, 0.0, shift)
    x = tl.load(X + sample * n + i, mask=i < n, other=0.0).to(ACC)
    if REVERSE:
        log_s = -log_s
        y = (x - shift) * tl.exp(log_s)
    else:
        y = x * tl.exp(log_s) + shift
    tl.store(Y + sample * n + i, y.to(Y.dtype.element_ty), mask=i < n)
    tl.store(Partial + pid, tl.sum(log_s, 0))


@jit
def _affine_bwd_kernel(X, Params, Mask, DY, DL, DX, DParams, n, ROW, MOVED, S_MAX: tl.constexpr, MASKED: tl.constexpr,
                       ONE_ROW: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """DX and DParams."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK)
    sample = (pid // tiles).to(tl.int64)
    i = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        MOVED = ROW
    at, moves = _places(i, n, ROW, MOVED, ONE_ROW)
    Params += sample * (n // ROW) * (2 * MOVED)
    DParams += sample * (n // ROW) * (2 * MOVED)
    log_s, tanh = _log_scale(tl.load(Params + at, mask=moves, other=0.0).to(ACC), S_MAX)
    live = moves
    if MASKED:
        live = moves & (tl.load(Mask + i, mask=i < n, other=1) == 0)
        log_s = tl.where(live, log_s, 0.0)
    x = tl.load(X + sample * n + i, mask=moves, other=0.0).to(ACC)
    dy = tl.load(DY + sample * n + i, mask=i < n, other=0.0).to(ACC)
    dl = tl.load(DL + sample).to(ACC)
    if REVERSE:
        dx = dy * tl.exp(-log_s)
        shift = tl.load(Params + at + MOVED, mask=moves, other=0.0).to(ACC)
        d_shift = -dx
        d_log_s = -dx * (x - shift) - dl
    else:
        dx = dy * tl.exp(log_s)
        d_shift = dy
        d_log_s = dx * x + dl
    tl.store(DX + sample * n + i, dx.to(DX.dtype.element_ty), mask=i < n)
    d_raw = tl.where(live, d_log_s * (1 - tanh * tanh), 0.0)
    tl.store(DParams + at, d_raw.to(DParams.dtype.element_ty), mask=moves)
    d_shift = tl.where(live, d_shift, 0.0)
    tl.store(DParams + at + MOVED, d_shift.to(DParams.dtype.element_ty), mask=moves)


# ---- operators


def _like(a, last):
    """a in channels_last, or contiguous."""
    return a.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _layout(x, last, mask, split, s_max, reverse):
    """A mask of x's layout; n, ROW and MOVED; constants of a launch; programs for a sample. x is dense, last: in
    channels_last."""
    n = x.numel() // len(x)
    inner = 1 if last else n // x.shape[1]  # elements of a row for each channel
    if mask is not None:
        mask = mask.expand(x.shape[1:]).movedim(0, -1 if last else 0).contiguous()
    block = BLOCK if n > SMALL else min(SMALL, BLOCK)
    constants = {"S_MAX": s_max, "MASKED": mask is not None, "ONE_ROW": not last, "REVERSE": reverse}
    constants |= {"ACC": acc_type(x), "BLOCK": block}
    return mask, (n, x.shape[1] * inner, (x.shape[1] - split) * inner), constants, cdiv(n, block)


def _fake_fwd(x, params, mask, split, s_max, reverse):
    return torch.empty_like(dense(x)[0]), x.new_empty(len(x), dtype=accumulator(x))


def _fake_bwd(dy, dl, x, params, mask, split, s_max, reverse):
    return torch.empty_like(dense(x)[0]), torch.empty_like(_like(params, dense(x)[1]))


def _save(ctx, inputs, output):
    x, params, mask, *ctx.rest = inputs
    ctx.save_for_backward(x, params, mask)


def _backward(ctx, dy, dl):
    dx, dparams = _bwd(dy, dl, *ctx.saved_tensors, *ctx.rest)
    return dx, dparams, None, None, None, None


@operator("affine_coupling_fwd", _fake_fwd, _save, _backward)
def _fwd(x: torch.Tensor, params: torch.Tensor, mask: torch.Tensor | None, split: int, s_max: float,
         reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, last = dense(x)
    params = _like(params, last)
    mask, sizes, constants, tiles = _layout(x, last, mask, split, s_max, reverse)
    y = torch.empty_like(x)
    partial = x.new_empty(len(x), tiles, dtype=accumulator(x))
    launch(_affine_fwd_kernel, len(x) * tiles, x, params, mask, y, partial, *sizes, **constants)
    return y, partial.sum(1)


@operator("affine_coupling_bwd", _fake_bwd)
def _bwd(dy: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, params: torch.Tensor, mask: torch.Tensor | None, split: int,
         s_max: float, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, last = dense(x)
    params = _like(params, last)
    mask, sizes, constants, tiles = _layout(x, last, mask, split, s_max, reverse)
    dy = _like(dy, last)
    dx = torch.empty_like(x)
    dparams = torch.empty_like(params)
    launch(_affine_bwd_kernel, len(x) * tiles, x, params, mask, dy, dl.contiguous(), dx, dparams, *sizes, **constants)
    return dx, dparams


def supports(x: torch.Tensor, params: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[bool, str]:
    if not {x.dtype, params.dtype} <= set(FLOATS):
        return False, f"x is {x.dtype}, params are {params.dtype}"
    if params.device != x.device or (mask is not None and mask.device != x.device):
        return False, f"x is on {x.device}, params or the mask elsewhere"
    if max(math.prod(x.shape[1:]), math.prod(params.shape[1:])) >= 2**31 - BLOCK:  # offsets in a sample are int32
        return False, f"x {tuple(x.shape)} or params {tuple(params.shape)} have some 2^31 elements a sample, or more"
    return True, ""


def affine_coupling(x: torch.Tensor, params: torch.Tensor, mask_or_split: torch.Tensor | int, reverse: bool = False,
                    s_max: float = 2.0, *, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, log_det) of an affine coupling layer. x (B, C, *) floating -> y the same shape, type and layout, log_det (B,).

    mask_or_split: a number of leading channels, 0 to C, that pass unchanged, with params (B, 2 (C - split), *); or a mask
    that broadcasts to x.shape[1:], nonzero where x passes unchanged, with params (B, 2C, *). params: floating, raw
    log-scales of any size, then shifts. s_max > 0 bounds |log_s|. log_det in float32 (float64 for float64). Differentiable
    once in x and params, through both results. backend: one of kernels.MODES, instead of kernels.mode in this call.
    Raises ValueError for shapes that do not fit, and what use_triton raises.
    """
    if isinstance(mask_or_split, int):
        mask = None
        split = mask_or_split
    else:
        mask = mask_or_split
        split = 0
    fits = x.dim() > 1 and 0 <= split <= x.shape[1] and params.shape == (len(x), 2 * (x.shape[1] - split), *x.shape[2:])
    if mask is not None:
        fits &= mask.dim() < x.dim() and all(a in (1, b) for a, b in zip(mask.shape[::-1], x.shape[::-1], strict=False))
    if not fits or s_max <= 0:
        kept = f"split {split}" if mask is None else f"mask {tuple(mask.shape)}"
        raise ValueError(f"affine_coupling: params {tuple(params.shape)}, {kept}, s_max {s_max} do not fit x {tuple(x.shape)}")
    if use_triton("affine_coupling", x, lambda: supports(x, params, mask), LEAST, elementwise=True, backend=backend):
        return _fwd(x, params, mask, split, float(s_max), reverse)
    return affine_coupling_torch(x, params, mask_or_split, reverse, s_max)


def _specs(name, sizes, registers=(255, 255), vector=True, types=("fp32", "bf16")):
    """The forward and the backward kernel, in both directions and each type."""
    for kernel, most in zip(("_affine_fwd_kernel", "_affine_bwd_kernel"), registers, strict=True):
        for dtype in types:
            accumulate = "fp64" if dtype == "fp64" else "fp32"
            for reverse in (False, True):
                args = dict.fromkeys(("X", "Y", "Params", "DY", "DX", "DParams"), f"*{dtype}")
                args |= {"Partial": f"*{accumulate}", "DL": f"*{accumulate}", "S_MAX": 2.0, "REVERSE": reverse}
                args |= {"ACC": tl.float64 if dtype == "fp64" else tl.float32}
                args |= {"Mask": None, "MASKED": False, "ONE_ROW": True, "BLOCK": 1024}
                args |= dict.fromkeys(("n", "ROW", "MOVED"), "i32:16") | sizes
                yield Spec(kernel, f"{dtype}, {name}{', reverse' * reverse}", args, registers=most, vector=vector)


AOT_SPECS = [] if triton is None else [
    *_specs("split", {}, (48, 48)),
    *_specs("mask", {"Mask": "*i1", "MASKED": True}, (48, 56)),
]
_ODD = dict.fromkeys(("n", "ROW", "MOVED"), "i32")  # numbers that 16 does not divide: no vector loads
AOT_MORE = [] if triton is None else [  # what a launch may choose besides
    *_specs("split", {}, types=("fp16", "fp64")),
    *_specs("split, rows of any length", _ODD, vector=False),
    *_specs("split, small", {"BLOCK": 128}, vector=False),
    *_specs("split, channels_last", _ODD | {"n": "i32:16", "ONE_ROW": False}, vector=False),
    *_specs("split, channels_last, rows of 16s", {"ONE_ROW": False}, vector=False),
    *_specs("mask of float32", {"Mask": "*fp32", "MASKED": True}),
    *_specs("mask of int64", {"Mask": "*i64", "MASKED": True}),
    *_specs("mask, channels_last", _ODD | {"n": "i32:16", "Mask": "*i1", "MASKED": True, "ONE_ROW": False}, vector=False),
]
