"""Rational-quadratic splines, the couplings of neural spline flows (Durkan et al. 2019), and their log-determinant.

A spline has K bins over [-tail_bound, tail_bound] and is the identity outside. In a bin of width w, height h, slope
s = h / w and derivatives d0, d1 at its two knots, with xi in [0, 1] the place in its width, eta that in its height and
t = xi (1 - xi):

    eta = (s xi^2 + d0 t) / D,   y = y0 + h eta,    D = s + (d0 + d1 - 2 s) t                 (eq. 4)
    y'  = s^2 M / D^2,                              M = d1 xi^2 + 2 s t + d0 (1 - xi)^2       (eq. 5)

The inverse, xi of eta, solves the quadratic of eq. 6 to 8. With q = d0 (1 - eta) - d1 eta its discriminant is
q^2 + 4 s^2 eta (1 - eta): written so, nothing cancels. Gradients are in closed form; those of the inverse are those of the
forward direction at x with dy = -(dx - dl l') / y' and -dl, l = log y', by the implicit function theorem.

x (B, C, *) contiguous, or (B, C, H, W) in channels_last; params are read in the layout of x. They are (B, C * (3K - 1), *)
or (B, C, 3K - 1, *): K raw widths, K raw heights and K - 1 raw derivatives for a channel, then for the next. For x (B, D)
that is (B, D, 3K - 1), for images what a convolution puts out. reverse=True gives the inverse and its log_det.

Least bytes, n = bytes of x: forward (2K + 4)n, backward (2K + 4)n in and 3K n out, for of the derivatives only the bin's two
are asked for. But memory moves sectors of 32 bytes, and neighbours in a sector lie in different bins. With 8 bins, and x and
params from a normal distribution, 27 % of the derivatives are asked for; of their sectors 87 % move in images in float32,
97 % in bfloat16, and all in vectors: forward 24n (vectors 25n) move where 20n are asked for, backward 48n (49n) where it is
44n.
x and params are all that is saved for the backward pass. log_det is one partial sum a program, then a sum: no atomics.

When not: on the CPU.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import (
    FLOATS,
    Spec,
    acc_type,
    accumulator,
    cdiv,
    dense,
    first_derivative_only,
    jit,
    launch,
    operator,
    power_of_2,
    tl,
    triton,
    use_triton,
)

MIN = 1e-5  # the least width and height of a bin, as a share of 2 * tail_bound, and the least derivative
END = math.log(math.expm1(1 - MIN))  # the raw derivative that makes 1, as it is at both tails
FEW = 1 << 12  # elements of x up to which the plain form looks its bins up and has a shorter inverse, without gradients
CHUNK = 1 << 16  # elements of x that the plain form takes at once, so that what it computes of them stays in the cache
TILE = 512  # widths that a program holds at most, bins rounded up to a power of two; half as many in float64


def spline_coupling_reference(x: torch.Tensor, params: torch.Tensor, tail_bound: float = 3.0,
                              reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    p = params.unflatten(1, (x.shape[1], -1)).movedim(2, -1)  # [B, C, *, 3K - 1]
    K = (p.shape[-1] + 1) // 3
    B = tail_bound

    def knots(raw):  # K sizes to K + 1 knots from -B to B
        sizes = MIN + (1 - MIN * K) * torch.softmax(raw, -1)
        return F.pad(2 * B * sizes.cumsum(-1)[..., :-1] - B, (1, 0), value=-B).contiguous(), 2 * B * sizes

    def of_bin(a):
        return a.gather(-1, bins)

    xs, widths = knots(p[..., :K])
    ys, heights = knots(p[..., K:2 * K])
    d = F.pad(MIN + F.softplus(p[..., 2 * K:]), (1, 1), value=1.0)
    inside = (x >= -B) & (x <= B)
    z = torch.where(inside, x, 0.0).unsqueeze(-1)
    bins = torch.searchsorted((ys if reverse else xs).detach(), z.detach().contiguous(), right=True) - 1
    x0 = of_bin(xs)
    y0 = of_bin(ys)
    w = of_bin(widths)
    h = of_bin(heights)
    d0 = of_bin(d[..., :-1])
    d1 = of_bin(d[..., 1:])
    s = h / w
    if reverse:
        a = (z - y0) * (d0 + d1 - 2 * s) + h * (s - d0)  # eq. 6
        b = h * d0 - (z - y0) * (d0 + d1 - 2 * s)  # eq. 7
        c = -s * (z - y0)  # eq. 8
        xi = 2 * c / (-b - torch.sqrt(b * b - 4 * a * c))
        y = xi * w + x0
    else:
        xi = (z - x0) / w
        y = y0 + h * (s * xi**2 + d0 * xi * (1 - xi)) / (s + (d0 + d1 - 2 * s) * xi * (1 - xi))  # eq. 4
    slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2)
    slope = slope / (s + (d0 + d1 - 2 * s) * xi * (1 - xi)) ** 2  # eq. 5
    log_d = torch.where(inside, torch.log(slope).squeeze(-1), 0.0)
    return torch.where(inside, y.squeeze(-1), x), (-log_d if reverse else log_d).flatten(1).sum(1)


# ---- formulas of a bin, for tensors and, with jit, for kernels. Here and below places are shares of 2 * tail_bound, in
# [0, 1]: slopes and derivatives are the same there, and every bin is MIN + (1 - MIN * K) * p with p from a softmax.


def _eta_of_xi(xi, s, d0, d1):
    """eta (eq. 4), and D and M, of which the derivative is made (eq. 5)."""
    t = xi * (1 - xi)
    D = s * (1 - 2 * t) + (d0 + d1) * t
    M = d1 * xi * xi + 2 * s * t + d0 * (1 - xi) * (1 - xi)
    return (s * xi * xi + d0 * t) / D, D, M


def _log_slope_by_xi(xi, s, d0, d1, D, M):
    """The derivative of log y' by xi."""
    turn = 1 - 2 * xi
    return 2 * ((d1 * xi + s * turn - d0 * (1 - xi)) / M - (d0 + d1 - 2 * s) * turn / D)


def _by_bin(g_eta, g_l, xi, s, d0, d1, eta, D, M):
    """The gradient of g_eta * eta + g_l * log y' to s, d0 and d1, xi being fixed."""
    t = xi * (1 - xi)
    a = xi * xi
    b = (1 - xi) * (1 - xi)
    g_t = g_eta * t / D
    g_s = g_t / D * (d1 * a - d0 * b) + 2 * g_l * (1 / s + t / M - (1 - 2 * t) / D)
    g_d = 2 * g_l * t / D
    return g_s, g_t * (1 - eta) + g_l * b / M - g_d, g_l * a / M - g_t * eta - g_d


_eta_of_xi_jit = jit(_eta_of_xi)
_log_slope_by_xi_jit = jit(_log_slope_by_xi)
_by_bin_jit = jit(_by_bin)


# ---- plain PyTorch: x is (G, P), params (G, 3K - 1, P)


class _Bin(NamedTuple):
    """The bin of each place. [G, 2, P]: of width and height, or of the lower and the upper knot."""

    p: torch.Tensor  # the softmax's shares
    before: torch.Tensor  # sums of the shares before the bin
    raw: torch.Tensor  # raw derivatives
    index: torch.Tensor  # [G, P]


def _look_up(u, p, raw):
    """The bins of places u, shares p (G, 2, K, P), raw derivatives of all knots (G, K + 1, P). In few calls, for few places."""
    K = p.shape[2]
    before = F.pad(p.cumsum(2)[:, :, :-1], (0, 0, 1, 0))  # [G, 2, K, P]
    k = torch.arange(1, K, device=u.device, dtype=u.dtype)[:, None]
    starts = MIN * k + (1 - MIN * K) * before[:, 0, 1:]  # of widths: the inverse of few numbers is _invert_few
    index = (u[:, None] >= starts).sum(1, keepdim=True)  # [G, 1, P]
    both = index[:, None].expand(-1, 2, -1, -1)
    raw = raw.gather(1, torch.cat([index, index + 1], 1))
    return _Bin(p.gather(2, both)[:, :, 0], before.gather(2, both)[:, :, 0], raw, index[:, 0].to(u.dtype))


def _walk(u, p, raw, reverse):
    """The same, and for k = 1 to K - 1 whether the bin is k or a later one, 1 or 0, [G, P].

    A loop moves each place on to the next bin while it lies past its start: on the CPU blends of rows take a tenth of what
    torch.where, gather and comparisons along the bins do.
    """
    K = p.shape[2]
    own = p[:, :, 0]
    before = upto = torch.zeros_like(own)
    ends = raw[:, :2]
    index = torch.zeros_like(u)
    reached = []
    for k in range(1, K):
        upto = upto + p[:, :, k - 1]
        past = (u >= MIN * k + (1 - MIN * K) * upto[:, int(reverse)]).to(u.dtype)
        reached.append(past)
        index = index + past
        own = torch.lerp(own, p[:, :, k], past[:, None])
        before = torch.lerp(before, upto, past[:, None])
        ends = torch.lerp(ends, raw[:, k:k + 2], past[:, None])
    return _Bin(own, before, ends, index), reached


def _invert(eta, s, d0, d1):
    """xi of eta: eq. 6 to 8, in the form of the two that does not cancel."""
    q = d0 * (1 - eta) - d1 * eta
    c = 2 * s * eta
    rest = 2 * s * (1 - eta)
    r = (q * q + c * rest).sqrt_() + q.abs()
    return torch.where(q >= 0, c / (c + r), r / (r + rest))


class _Spline(torch.autograd.Function):
    """y and log y' of x (G, P) under params (G, 3K - 1, P), and the closed form of their gradients."""

    @staticmethod
    def forward(ctx, x, params, tail_bound, reverse):
        K = (params.shape[1] + 1) // 3
        inside = (x >= -tail_bound) & (x <= tail_bound)
        u = torch.where(inside, (x + tail_bound) / (2 * tail_bound), 0.5)
        p = params[:, :2 * K].unflatten(1, (2, K))
        p = (p - p.amax(2, keepdim=True)).exp_()
        p /= p.sum(2, keepdim=True)  # [G, 2, K, P]
        raw = F.pad(params[:, 2 * K:], (0, 0, 1, 1), value=END)  # [G, K + 1, P]
        reached = []
        if x.numel() <= FEW and not reverse and not any(ctx.needs_input_grad):
            bin = _look_up(u, p, raw)
        else:
            bin, reached = _walk(u, p, raw, reverse)
        sizes = MIN + (1 - MIN * K) * bin.p
        u0, v0 = (MIN * bin.index[:, None] + (1 - MIN * K) * bin.before).unbind(1)
        w, h = sizes.unbind(1)
        s = h / w
        d = MIN + F.softplus(bin.raw)
        if reverse:
            xi = _invert(((u - v0) / h).clamp_(0, 1), s, *d.unbind(1))
        else:
            xi = ((u - u0) / w).clamp_(0, 1)
        eta, D, M = _eta_of_xi(xi, s, *d.unbind(1))
        to = u0 + w * xi if reverse else v0 + h * eta
        log_d = torch.log((s / D) ** 2 * M)
        ctx.save_for_backward(inside, p, sizes, d, xi, eta, D, M, *bin[:3], *reached)
        ctx.tail_bound = tail_bound
        ctx.reverse = reverse
        return torch.where(inside, (2 * to - 1) * tail_bound, x), torch.where(inside, -log_d if reverse else log_d, 0.0)

    @staticmethod
    def backward(ctx, dy, dl):
        first_derivative_only()
        inside, p, sizes, d, *saved = ctx.saved_tensors
        xi, eta, D, M, *saved = saved
        own, before, raw, *reached = saved
        K = p.shape[2]
        w, h = sizes.unbind(1)
        d0, d1 = d.unbind(1)
        s = h / w
        slope = (s / D) ** 2 * M
        l_u = _log_slope_by_xi(xi, s, d0, d1, D, M) / w
        g_to = torch.where(inside, 2 * ctx.tail_bound * dy, 0.0)
        g_l = torch.where(inside, dl, 0.0)
        if ctx.reverse:
            g_from = (g_to - g_l * l_u) / slope
            g_starts = torch.stack([g_to, -g_from], 1)
            g_l = -g_l
        else:
            g_from = g_to * slope + g_l * l_u
            g_starts = torch.stack([-g_from, g_to], 1)
        g_s, g_d0, g_d1 = _by_bin(g_starts[:, 1] * h, g_l, xi, s, d0, d1, eta, D, M)
        g_raw0, g_raw1 = (torch.stack([g_d0, g_d1], 1) * torch.sigmoid(raw)).unbind(1)
        g_sizes = g_starts * torch.stack([xi, eta], 1) + torch.stack([-s * g_s, g_s], 1) / w[:, None]
        g_mean = g_starts * before + g_sizes * own  # over the softmax
        g_params = p.new_empty(len(p), 3 * K - 1, p.shape[3])
        g_p = g_params[:, :2 * K].unflatten(1, (2, K))
        reached = [torch.ones_like(xi), *reached, torch.zeros_like(xi)]
        for k in range(K):
            here = reached[k]  # 1 where k <= the bin
            after = reached[k + 1]  # 1 where k < the bin: its starts depend on k
            g = torch.lerp(g_sizes * here[:, None], g_starts, after[:, None]).sub_(g_mean)
            g_p[:, :, k] = g.mul_(p[:, :, k]).mul_(1 - MIN * K)
            if k < K - 1:
                g_params[:, 2 * K + k] = torch.lerp(g_raw1 * here, g_raw0 * (1 - reached[k + 2]), after)
        return torch.where(inside, g_from / (2 * ctx.tail_bound), dy), g_params, None, None


def _invert_few(y, params, tail_bound):
    """x and log dx/dy, (N,), of few numbers y (N,) under params (G, 3K - 1, P), N = G P, where no gradient is asked for.

    In few calls, as each costs more than its work. At the root of eq. 6 to 8 d eta / d xi = R / D, where R^2 is the
    discriminant: by the implicit function theorem, instead of eq. 5.
    """
    K = (params.shape[1] + 1) // 3
    params = params.movedim(1, 0).reshape(3 * K - 1, -1)  # [3K - 1, N]
    inside = y.abs() <= tail_bound  # [N], as all that follows
    v = torch.where(inside, y / (2 * tail_bound) + 0.5, 0.5)
    sizes = torch.softmax(params[:2 * K].view(2, K, -1), 1).mul_(1 - MIN * K).add_(MIN)  # [2, K, N]
    ends = sizes.cumsum(1)
    index = (ends[1, :-1] <= v).sum(0, keepdim=True)  # [1, N]
    both = index.expand(2, 1, -1)
    size = sizes.gather(1, both)
    (u0,), (v0,) = ends.gather(1, both).sub_(size)
    (w,), (h,) = size
    raw = F.pad(params[2 * K:], (0, 0, 1, 1), value=END)  # [K + 1, N]
    d0, d1 = F.softplus(raw.gather(0, torch.cat([index, index + 1]))).add_(MIN)
    s = h / w
    eta = ((v - v0) / h).clamp_(0, 1)
    left = 1 - eta
    q = d0 * left - d1 * eta
    c = 2 * s * eta
    rest = 2 * s * left
    R = torch.addcmul(q * q, c, rest).sqrt_()
    r = R + q.abs()
    xi = torch.where(q >= 0, c / (c + r), r / (r + rest))  # as in _invert
    t = xi * (1 - xi)
    D = s * (1 - 2 * t) + (d0 + d1) * t
    x = torch.where(inside, (2 * (u0 + w * xi) - 1) * tail_bound, y)
    return x, torch.where(inside, torch.log(D / (s * R)), 0.0)


def spline_coupling_torch(x: torch.Tensor, params: torch.Tensor, tail_bound: float = 3.0,
                          reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The fastest plain form: one pass over the bins each way, and the gradients in closed form."""
    acc = accumulator(x)
    G = len(x) * x.shape[1]
    P = math.prod(x.shape[2:])
    M = params.shape[1] // x.shape[1]
    if reverse and x.numel() <= FEW and not (torch.is_grad_enabled() and (x.requires_grad or params.requires_grad)):
        y, log_d = _invert_few(x.to(acc).flatten(), params.to(acc).reshape(G, M, P), tail_bound)
        return y.view(x.shape).to(x.dtype), log_d.view(len(x), -1).sum(1)
    whole = torch.compiler.is_compiling() or not x.is_cpu  # pieces are for a CPU's cache
    rows = max(G, 1) if whole else max(CHUNK // max(P, 1), 1)
    parts = []
    for z, p in zip(x.to(acc).reshape(G, P).split(rows), params.to(acc).reshape(G, M, P).split(rows), strict=True):
        if P < 16:  # long rows where there are few positions too
            z = z.reshape(1, -1)
            p = p.movedim(1, 0).reshape(1, M, -1).contiguous()
        parts.append(_Spline.apply(z, p, tail_bound, reverse))
    y, log_d = (torch.cat([a.flatten() for a in part]).view(x.shape) for part in zip(*parts, strict=True))
    return y.to(x.dtype), log_d.flatten(1).sum(1)


# ---- kernels: a program takes BLOCK elements of one sample of n, laid out (n / INNER, INNER) in memory: INNER elements stand
# between two parameters of the same element. Tiles over bins are [KP, BLOCK], K bins rounded up to a power of two.


@jit
def _places(X, i, n, BOUND: tl.constexpr, ACC: tl.constexpr):
    """x, whether it is within the bins, and its place in [0, 1]. [BLOCK]"""
    x = tl.load(X + i, mask=i < n, other=0.0).to(ACC)
    inside = (i < n) & (x >= -BOUND) & (x <= BOUND)
    return x, inside, tl.where(inside, (x + BOUND) / (2 * BOUND), 0.5)


@jit
def _softmax(Raw, mask, real, ACC: tl.constexpr):
    """The shares of all bins, a softmax over them; 0 in the rows that are not real. [KP, BLOCK]"""
    raw = tl.where(real, tl.load(Raw, mask=mask, other=0.0).to(ACC), float("-inf"))
    p = tl.exp(raw - tl.max(raw, 0)[None, :])
    return p / tl.sum(p, 0)[None, :]


@jit
def _search(u, p, k, MIN: tl.constexpr, K: tl.constexpr):
    """The bin in which u lies: the number of those that end at or before it, but at most K - 1. [BLOCK]"""
    ends = tl.cumsum(MIN + (1 - MIN * K) * p, 0)
    return tl.sum(((u[None, :] >= ends) & (k < K - 1)).to(tl.int32), 0)


@jit
def _gather(p, k, index, MIN: tl.constexpr, K: tl.constexpr):
    """Start and size of a bin. [BLOCK]"""
    before = tl.sum(tl.where(k < index[None, :], p, 0.0), 0)
    own = tl.sum(tl.where(k == index[None, :], p, 0.0), 0)
    return MIN * index.to(p.dtype) + (1 - MIN * K) * before, MIN + (1 - MIN * K) * own


@jit
def _derivative(Raw, mask, real, MIN: tl.constexpr, ACC: tl.constexpr):
    """The derivative at a knot and that by its parameter: 1 and 0 at the two knots that have none. [BLOCK]"""
    raw = tl.load(Raw, mask=mask & real, other=0.0).to(ACC)
    e = tl.exp(-tl.abs(raw))
    softplus = tl.maximum(raw, 0.0) + tl.log(1 + e)
    return tl.where(real, MIN + softplus, 1.0), tl.where(raw < 0, e, 1.0) / (1 + e)


@jit
def _xi_of_eta(eta, s, d0, d1):
    """The root of eq. 6 to 8, in the form of the two that does not cancel. [BLOCK]"""
    q = d0 * (1 - eta) - d1 * eta
    c = 2 * s * eta
    rest = 2 * s * (1 - eta)
    r = tl.sqrt(q * q + c * rest) + tl.abs(q)
    return tl.where(q >= 0, c, r) / tl.where(q >= 0, c + r, r + rest)


@jit
def _unit(a):
    """a within [0, 1]."""
    return tl.minimum(tl.maximum(a, 0.0), 1.0)


@jit
def _spline_fwd_kernel(X, Params, Y, Partial, n, INNER, BOUND: tl.constexpr, MIN: tl.constexpr, K: tl.constexpr,
                       KP: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Y, and in Partial this program's part of log_det."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK)
    row = (pid // tiles).to(tl.int64) * n
    i = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)[:, None]
    x, inside, u = _places(X + row, i, n, BOUND, ACC)
    Params += row * (3 * K - 1)
    first = i + i // INNER * ((3 * K - 2) * INNER)  # where the raw width of bin 0 is. [BLOCK]
    mask = (k < K) & (i < n)[None, :]
    at = first[None, :] + k * INNER
    pw = _softmax(Params + at, mask, k < K, ACC)
    ph = _softmax(Params + at + K * INNER, mask, k < K, ACC)
    index = _search(u, ph if REVERSE else pw, k, MIN, K)
    d0, _ = _derivative(Params + first + (2 * K - 1 + index) * INNER, i < n, index > 0, MIN, ACC)
    d1, _ = _derivative(Params + first + (2 * K + index) * INNER, i < n, index < K - 1, MIN, ACC)
    u0, w = _gather(pw, k, index, MIN, K)
    v0, h = _gather(ph, k, index, MIN, K)
    s = h / w
    xi = _xi_of_eta(_unit((u - v0) / h), s, d0, d1) if REVERSE else _unit((u - u0) / w)
    eta, D, M = _eta_of_xi_jit(xi, s, d0, d1)
    log_d = tl.log(s * s / (D * D) * M)
    y = u0 + w * xi if REVERSE else v0 + h * eta
    tl.store(Y + row + i, tl.where(inside, (2 * y - 1) * BOUND, x).to(Y.dtype.element_ty), mask=i < n)
    tl.store(Partial + pid, tl.sum(tl.where(inside, -log_d if REVERSE else log_d, 0.0), 0))


@jit
def _store_raw(DRaw, p, g, mask, MIN: tl.constexpr, K: tl.constexpr):
    """The gradient of raw sizes from g, that of the sizes, through their softmax. [KP, BLOCK]"""
    g = (1 - MIN * K) * p * (g - tl.sum(p * g, 0)[None, :])
    tl.store(DRaw, g.to(DRaw.dtype.element_ty), mask=mask)


@jit
def _spline_bwd_kernel(X, Params, DY, DL, DX, DParams, n, INNER, BOUND: tl.constexpr, MIN: tl.constexpr, K: tl.constexpr,
                       KP: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """DX and DParams: the bin again, as in the forward kernel, then its gradients."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(n, BLOCK)
    row = (pid // tiles).to(tl.int64) * n
    i = pid % tiles * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, KP)[:, None]
    x, inside, u = _places(X + row, i, n, BOUND, ACC)
    Params += row * (3 * K - 1)
    DParams += row * (3 * K - 1)
    first = i + i // INNER * ((3 * K - 2) * INNER)
    mask = (k < K) & (i < n)[None, :]
    at = first[None, :] + k * INNER
    pw = _softmax(Params + at, mask, k < K, ACC)
    ph = _softmax(Params + at + K * INNER, mask, k < K, ACC)
    index = _search(u, ph if REVERSE else pw, k, MIN, K)
    d0, d0_raw = _derivative(Params + first + (2 * K - 1 + index) * INNER, i < n, index > 0, MIN, ACC)
    d1, d1_raw = _derivative(Params + first + (2 * K + index) * INNER, i < n, index < K - 1, MIN, ACC)
    u0, w = _gather(pw, k, index, MIN, K)
    v0, h = _gather(ph, k, index, MIN, K)
    s = h / w
    xi = _xi_of_eta(_unit((u - v0) / h), s, d0, d1) if REVERSE else _unit((u - u0) / w)
    eta, D, M = _eta_of_xi_jit(xi, s, d0, d1)
    slope = s * s / (D * D) * M
    l_u = _log_slope_by_xi_jit(xi, s, d0, d1, D, M) / w

    dy = tl.load(DY + row + i, mask=i < n, other=0.0).to(ACC)
    g_to = tl.where(inside, 2 * BOUND * dy, 0.0)
    g_l = tl.where(inside, tl.load(DL + pid // tiles).to(ACC), 0.0)
    if REVERSE:
        g_from = (g_to - g_l * l_u) / slope
        g_u0 = g_to
        g_v0 = -g_from
        g_l = -g_l
    else:
        g_from = g_to * slope + g_l * l_u
        g_u0 = -g_from
        g_v0 = g_to
    tl.store(DX + row + i, tl.where(inside, g_from / (2 * BOUND), dy).to(DX.dtype.element_ty), mask=i < n)

    g_s, g_d0, g_d1 = _by_bin_jit(g_v0 * h, g_l, xi, s, d0, d1, eta, D, M)
    g_w = g_u0 * xi - g_s * s / w
    g_h = g_v0 * eta + g_s / w
    ahead = (index[None, :] - k).to(ACC)
    past = _unit(ahead)  # 1 before the bin, 0 elsewhere; numbers: as masks they would spill on gfx942
    own = tl.maximum(1 - tl.abs(ahead), 0.0)
    last = tl.maximum(1 - tl.abs(ahead - 1), 0.0)
    _store_raw(DParams + at, pw, past * g_u0[None, :] + own * g_w[None, :], mask, MIN, K)
    _store_raw(DParams + at + K * INNER, ph, past * g_v0[None, :] + own * g_h[None, :], mask, MIN, K)
    g = last * (g_d0 * d0_raw)[None, :] + own * (g_d1 * d1_raw)[None, :]
    tl.store(DParams + at + 2 * K * INNER, g.to(DParams.dtype.element_ty), mask=mask & (k < K - 1))


# ---- operators


def _like(a, last):
    """a in channels_last, or contiguous."""
    return a.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _tile(K, inner, acc):
    """K, KP, BLOCK and num_warps of a launch, such that no kernel spills (AOT_MORE compiles them)."""
    bins = power_of_2(K)
    tile = TILE * 4 // acc.itemsize
    warps = max(bins // 16, 1)  # sums over bins then stay within a warp, mostly within a thread
    if inner == 1:  # a thread then holds neighbouring bins, and more numbers beside them
        tile //= 2 if bins < 16 and acc.itemsize == 4 else 4
        warps = 1
    return {"K": K, "KP": bins, "BLOCK": max(tile // bins, 1), "num_warps": warps}


def _layout(x, last, params, bound, reverse):
    """n and INNER; constants of a launch; programs for a sample. x is dense, last: in channels_last."""
    C = x.shape[1]
    n = x.numel() // len(x)
    inner = 1 if last else n // C
    constants = _tile((params.shape[1] // C + 1) // 3, inner, accumulator(x))
    constants |= {"BOUND": bound, "MIN": MIN, "REVERSE": reverse, "ACC": acc_type(x)}
    return (n, inner), constants, cdiv(n, constants["BLOCK"])


def _fake_fwd(x, params, bound, reverse):
    return torch.empty_like(dense(x)[0]), x.new_empty(len(x), dtype=accumulator(x))


def _fake_bwd(dy, dl, x, params, bound, reverse):
    return torch.empty_like(dense(x)[0]), torch.empty_like(_like(params, dense(x)[1]))


def _save(ctx, inputs, output):
    x, params, ctx.bound, ctx.reverse = inputs
    ctx.save_for_backward(x, params)


def _backward(ctx, dy, dl):
    dx, dparams = _bwd(dy, dl, *ctx.saved_tensors, ctx.bound, ctx.reverse)
    return dx, dparams, None, None


@operator("spline_coupling_fwd", _fake_fwd, _save, _backward)
def _fwd(x: torch.Tensor, params: torch.Tensor, bound: float, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, last = dense(x)
    params = _like(params, last)
    sizes, constants, tiles = _layout(x, last, params, bound, reverse)
    y = torch.empty_like(x)
    partial = x.new_empty(len(x), tiles, dtype=accumulator(x))
    launch(_spline_fwd_kernel, len(x) * tiles, x, params, y, partial, *sizes, **constants)
    return y, partial.sum(1)


@operator("spline_coupling_bwd", _fake_bwd)
def _bwd(dy: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, params: torch.Tensor, bound: float,
         reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, last = dense(x)
    params = _like(params, last)
    sizes, constants, tiles = _layout(x, last, params, bound, reverse)
    dx = torch.empty_like(x)
    dparams = torch.empty_like(params)
    launch(_spline_bwd_kernel, len(x) * tiles, x, params, _like(dy, last), dl.contiguous(), dx, dparams, *sizes, **constants)
    return dx, dparams


def supports(x: torch.Tensor, params: torch.Tensor, bins: int) -> tuple[bool, str]:
    if not {x.dtype, params.dtype} <= set(FLOATS):
        return False, f"x is {x.dtype}, params are {params.dtype}"
    if params.device != x.device:
        return False, f"x is on {x.device}, params on {params.device}"
    if math.prod(params.shape[1:]) >= 2**31:  # offsets in a sample are int32
        return False, f"params {tuple(params.shape)} have 2^31 elements a sample, or more"
    return bins <= 64, f"{bins} bins, more than 64"


def spline_coupling(x: torch.Tensor, params: torch.Tensor, tail_bound: float = 3.0, reverse: bool = False, *,
                    backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, log_det) of a monotonic rational-quadratic spline. x (B, C, *) floating -> y the same, log_det (B,).

    params (B, C * (3K - 1), *) or (B, C, 3K - 1, *), floating, K >= 1 bins (at most 64 in the kernel): see the head of the
    file. x is only what is transformed: its network sees the rest. tail_bound > 0, in the units of x. log_det in float32
    (float64 for float64). Differentiable once in x and params, through both results. backend: one of kernels.MODES, instead
    of kernels.mode in this call. Raises ValueError for shapes that do not fit, and what use_triton raises.
    """
    C = x.shape[1] if x.dim() > 1 else 0
    flat = params
    if params.dim() == x.dim() + 1 and params.shape[1] == C:
        flat = params.flatten(1, 2)
    M = flat.shape[1] // C if C and flat.dim() == x.dim() else 0
    if M % 3 != 2 or M >= 3 / MIN or flat.shape != (len(x), C * M, *x.shape[2:]) or tail_bound <= 0:
        raise ValueError(f"spline_coupling: params {tuple(params.shape)} and tail_bound {tail_bound} do not fit "
                         f"x {tuple(x.shape)}: (B, C * (3K - 1), *) is needed")
    # of any size: with 8 bins the plain form launches 73 kernels, 298 with gradients, where this launches 2 and 3
    if use_triton("spline_coupling", x, lambda: supports(x, params, (M + 1) // 3), backend=backend):
        return _fwd(x, flat, float(tail_bound), reverse)
    return spline_coupling_torch(x, flat, tail_bound, reverse)


def _specs(kernel, dtype, K, inner, registers=255, ways=(False, True), vector=False):
    """A kernel in both directions, as _tile launches it. inner: 1 for vectors, or how triton takes the argument INNER."""
    acc = torch.float64 if dtype == "fp64" else torch.float32
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    for reverse in ways:
        args = dict.fromkeys(("X", "Y", "Params", "DY", "DX", "DParams"), f"*{dtype}")
        args |= dict.fromkeys(("Partial", "DL"), f"*{accumulate}") | {"BOUND": 3.0, "MIN": MIN, "REVERSE": reverse}
        args |= {"n": "i32:16" if inner == 1 else inner, "INNER": inner}
        args |= _tile(K, inner, acc) | {"ACC": tl.float64 if dtype == "fp64" else tl.float32}
        warps = args.pop("num_warps")
        where = {1: "vectors", "i32": "rows of any length", "i32:16": "rows of 16s"}[inner]
        yield Spec(kernel, f"{dtype}, {where}, {K} bins{', reverse' * reverse}", args, warps, None, registers, vector)


_FWD = "_spline_fwd_kernel"
_BWD = "_spline_bwd_kernel"
AOT_SPECS = [] if triton is None else [spec for t in ("fp32", "bf16") for specs in (
    _specs(_FWD, t, 8, "i32:16", 128, vector=True),
    _specs(_BWD, t, 8, "i32:16", 160, vector=True),
    _specs(_FWD, t, 8, 1, 128),  # the parameters of an element are 23 numbers in a row, that begin anywhere
    _specs(_BWD, t, 8, 1, 160),
) for spec in specs]
_SIZES = [(8, "i32")]  # bins, and how INNER is taken
_SIZES += [(K, inner) for K in (4, 16, 32, 64) for inner in (1, "i32", "i32:16")]
_SIZES += [(K, inner) for K in (5, 10, 20, 40) for inner in (1, "i32")]
AOT_MORE = [] if triton is None else [  # what a launch may choose besides, with fewer bins and up to 64
    *(spec for K, inner in _SIZES for t in ("fp32", "bf16") for kernel in (_FWD, _BWD) for spec in _specs(kernel, t, K, inner)),
    *(spec for t in ("fp16", "fp64") for inner in (1, "i32:16") for kernel in (_FWD, _BWD)
      for spec in _specs(kernel, t, 8, inner)),
]
