"""Coupling layers of normalizing flows: affine (Dinh et al. 2017) and rational-quadratic spline (Durkan et al. 2019).

Both give y and log |det dy/dx| of every sample, (B,), in one pass; reverse=True gives the inverse and its log_det. The
network that makes params must not see what is transformed.

affine   y = x * exp(log_s) + shift,  log_s = s_max * tanh(raw / s_max),  log_det = sum of log_s
         RealNVP's tanh, scaled so that the slope at 0 is 1: raw = 0 is the identity, and a scale in exp(-s_max, s_max) keeps
         both directions finite for every raw. (Glow's sigmoid(raw + 2) only shrinks, towards 0, where the inverse overflows.)
spline   K bins over [-tail_bound, tail_bound], identity outside. In a bin of width w, height h, slope delta = h / w and
         derivatives d0, d1 at its two knots, with theta in [0, 1] the place in the bin and t = theta (1 - theta):
           y  = y0 + h (delta theta^2 + d0 t) / D,    D = delta + (d0 + d1 - 2 delta) t                 (eq. 4)
           y' = delta^2 M / D^2,                      M = d1 theta^2 + 2 delta t + d0 (1 - theta)^2     (eq. 5)
         The inverse solves the quadratic of eq. 6-8. With eta = (y - y0) / h and u = d0 (1 - eta) - d1 eta its discriminant
         is u^2 + 4 delta^2 eta (1 - eta): written so, nothing cancels. Gradients are in closed form; those of the inverse
         are those of the forward direction at x with dy = -(dx - dl l') / y', by the implicit function theorem.

Layouts: x (B, C, *) contiguous, or (B, C, H, W) in channels_last; params are read in the layout of x. Those of a spline,
(B, C * (3K - 1), *) or (B, C, 3K - 1, *), hold K widths, K heights and K - 1 derivatives for a channel, then for the next:
for x (B, D) that is (B, D, 3K - 1), for images what a convolution puts out.

Least bytes, n = bytes of x, r = bytes of its transformed part (n with a mask, which adds 1 byte an element):
affine   forward 2n + 2r (x, params in, y out), backward 2n + 4r (x, raw, dy in, dx, dparams out), and r more in reverse
spline   forward (2K + 4)n: of the derivatives only the bin's two are asked for; backward (2K + 4)n in and 3K n out
x and params are all that is saved for the backward pass. log_det is one partial sum a program, then a sum: no atomics.

When not: on the CPU; affine under torch.compile, which fuses it with its neighbours.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import FLOATS, Spec, acc_type, accumulator, dense, jit, launching, tl, triton, use_triton

MIN = 1e-5  # the least width and height of a bin, as a share of 2 * tail_bound, and the least derivative
END = math.log(math.expm1(1 - MIN))  # what makes a derivative 1, as it is at both tails
BLOCK = 1024  # elements of an affine program
FEW = 1 << 12  # elements of x up to which the plain spline looks its bins up, where no gradient is asked for
CHUNK = 1 << 16  # elements of x that the plain spline takes at once, so that what it computes of them stays in the cache
TILE = 512  # widths that a spline program holds, bins rounded up to a power of two; half as many where INNER is 1


def affine_coupling_reference(x, params, mask_or_split, reverse=False, s_max=2.0):
    raw, shift = params.chunk(2, 1)
    log_s, kept = s_max * torch.tanh(raw / s_max), None
    if isinstance(mask_or_split, int):
        kept, x = x[:, :mask_or_split], x[:, mask_or_split:]
    else:
        log_s, shift = log_s * (mask_or_split == 0), shift * (mask_or_split == 0)
    y = (x - shift) * torch.exp(-log_s) if reverse else x * torch.exp(log_s) + shift
    return y if kept is None else torch.cat([kept, y], 1), (-log_s if reverse else log_s).flatten(1).sum(1)


def affine_coupling_torch(x, params, mask_or_split, reverse=False, s_max=2.0):
    """The fastest plain form: the reference, computed in float32 where x is a half type."""
    y, log_det = affine_coupling_reference(x.to(accumulator(x)), params.to(accumulator(x)), mask_or_split, reverse, s_max)
    return y.to(x.dtype), log_det


def spline_coupling_reference(x, params, tail_bound=3.0, reverse=False):
    p = params.unflatten(1, (x.shape[1], -1)).movedim(2, -1)  # [B, C, *, 3K - 1]
    K, B = (p.shape[-1] + 1) // 3, tail_bound

    def knots(raw):  # K sizes to K + 1 knots from -B to B
        sizes = MIN + (1 - MIN * K) * torch.softmax(raw, -1)
        return F.pad(2 * B * sizes.cumsum(-1)[..., :-1] - B, (1, 0), value=-B).contiguous(), 2 * B * sizes

    (xs, w), (ys, h), d = knots(p[..., :K]), knots(p[..., K:2 * K]), F.pad(MIN + F.softplus(p[..., 2 * K:]), (1, 1), value=1.0)
    inside = (x >= -B) & (x <= B)
    z = torch.where(inside, x, 0.0).unsqueeze(-1)
    bins = torch.searchsorted((ys if reverse else xs).detach(), z.detach().contiguous(), right=True) - 1
    x0, w, y0, h, d0, d1 = (a.gather(-1, bins) for a in (xs, w, ys, h, d[..., :-1], d[..., 1:]))
    delta, s = h / w, d0 + d1 - 2 * h / w
    if reverse:
        a, b, c = (z - y0) * s + h * (delta - d0), h * d0 - (z - y0) * s, -delta * (z - y0)
        theta = 2 * c / (-b - torch.sqrt(b * b - 4 * a * c))
        y = theta * w + x0
    else:
        theta = (z - x0) / w
        y = y0 + h * (delta * theta**2 + d0 * theta * (1 - theta)) / (delta + s * theta * (1 - theta))
    slope = delta**2 * (d1 * theta**2 + 2 * delta * theta * (1 - theta) + d0 * (1 - theta) ** 2)
    log_d = torch.where(inside, torch.log(slope / (delta + s * theta * (1 - theta)) ** 2).squeeze(-1), 0.0)
    return torch.where(inside, y.squeeze(-1), x), (-log_d if reverse else log_d).flatten(1).sum(1)


# ---- the spline in plain PyTorch. Here and in the kernels places are shares of 2 * tail_bound, in [0, 1]: delta and the
# derivatives are the same there, and every bin is MIN + (1 - MIN * K) * p with p from a softmax.


def _look_up(u, p, params, reverse):
    """What the loop of _Spline finds for places u (G, P), in a tenth of the calls, which is what few places cost."""
    K = p.shape[2]
    starts = F.pad(p.cumsum(2)[:, :, :-1], (0, 0, 1, 0))  # sums of the sizes before a bin
    k = torch.arange(1, K, device=u.device, dtype=u.dtype)[:, None]
    index = (u[:, None] >= MIN * k + (1 - MIN * K) * starts[:, int(reverse), 1:]).sum(1, keepdim=True)  # [G, 1, P]
    both, raw = index[:, None].expand(-1, 2, -1, -1), F.pad(params[:, 2 * K:], (0, 0, 1, 1), value=END)
    p_at, before = p.gather(2, both)[:, :, 0], starts.gather(2, both)[:, :, 0]
    return p_at, before, index[:, 0].to(u.dtype), raw.gather(1, index)[:, 0], raw.gather(1, index + 1)[:, 0]


class _Spline(torch.autograd.Function):
    """y and log y' of x (G, P) under params (G, 3K - 1, P), and the closed form of their gradients.

    A loop moves each place on to the next bin while it lies past its start: on the CPU blends of rows take a tenth of what
    torch.where, gather and comparisons along the bins do.
    """

    @staticmethod
    def forward(ctx, x, params, tail_bound, reverse):
        K, inside = (params.shape[1] + 1) // 3, (x >= -tail_bound) & (x <= tail_bound)
        scale = 1 - MIN * K
        u = torch.where(inside, (x + tail_bound) / (2 * tail_bound), 0.5)
        p = params[:, :2 * K].unflatten(1, (2, K))
        p = (p - p.amax(2, keepdim=True)).exp_()
        p /= p.sum(2, keepdim=True)  # [G, 2, K, P]
        if x.numel() <= FEW and not any(ctx.needs_input_grad):
            p_at, before, index, raw0, raw1, past = *_look_up(u, p, params, reverse), []
        else:
            raw = [torch.full_like(x, END), *params[:, 2 * K:].unbind(1), torch.full_like(x, END)]
            p_at, upto, before, index = p[:, :, 0], 0, torch.zeros_like(p[:, :, 0]), torch.zeros_like(x)
            raw0, raw1, past = raw[0], raw[1], []
            for k in range(1, K):
                upto = upto + p[:, :, k - 1]
                past.append((u >= MIN * k + scale * upto[:, int(reverse)]).to(x.dtype))  # [G, P], 1 where k <= the bin
                both, index = past[-1][:, None], index + past[-1]
                p_at, before = torch.lerp(p_at, p[:, :, k], both), torch.lerp(before, upto, both)
                raw0, raw1 = torch.lerp(raw0, raw[k], past[-1]), torch.lerp(raw1, raw[k + 1], past[-1])
        (w, h), (u0, v0) = (MIN + scale * p_at).unbind(1), (MIN * index[:, None] + scale * before).unbind(1)
        d0, d1, delta, theta = MIN + F.softplus(raw0), MIN + F.softplus(raw1), h / w, ((u - u0) / w).clamp(0, 1)
        if reverse:
            eta = ((u - v0) / h).clamp(0, 1)
            c, c_rest, q = 2 * delta * eta, 2 * delta * (1 - eta), d0 * (1 - eta) - d1 * eta
            r = (q * q + c * c_rest).sqrt_() + q.abs()
            theta = torch.where(q >= 0, c / (c + r), r / (r + c_rest))
        t, a, b = theta * (1 - theta), theta * theta, (1 - theta) ** 2
        D, M = delta * (1 - 2 * t) + (d0 + d1) * t, d1 * a + 2 * delta * t + d0 * b
        R, log_d = (delta * a + d0 * t) / D, torch.log((delta / D) ** 2 * M)
        at = u0 + w * theta if reverse else v0 + h * R
        ctx.save_for_backward(p, p_at, before, inside, raw0, raw1, theta, w, h, d0, d1, D, M, R, *past)
        ctx.tail_bound, ctx.reverse = tail_bound, reverse
        return torch.where(inside, (2 * at - 1) * tail_bound, x), torch.where(inside, -log_d if reverse else log_d, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dl):
        p, p_at, before, inside, raw0, raw1, theta, w, h, d0, d1, D, M, R, *past = ctx.saved_tensors
        K, side, delta, turn, t = p.shape[2], 2 * ctx.tail_bound, h / w, 1 - 2 * theta, theta * (1 - theta)
        a, b, slope = theta * theta, (1 - theta) ** 2, (delta / D) ** 2 * M
        l_theta = 2 * (d1 * theta + delta * turn - d0 * (1 - theta)) / M - 2 * (d0 + d1 - 2 * delta) * turn / D
        dv, dl = torch.where(inside, side * dy, 0.0), torch.where(inside, dl, 0.0)
        if ctx.reverse:
            dv, dl = (dl * l_theta / w - dv) / slope, -dl
        hv, dl_m, dl_d, g_u = dv * h * t / D, dl / M, 2 * dl / D, dv * slope + dl * l_theta / w
        g_delta = hv / D * (d1 * a - d0 * b) + 2 * dl / delta + 2 * t * dl_m - (1 - 2 * t) * dl_d
        g_raw0 = (hv * (1 - R) + b * dl_m - t * dl_d) * torch.sigmoid(raw0)
        g_raw1 = (a * dl_m - hv * R - t * dl_d) * torch.sigmoid(raw1)
        g_start = torch.stack([-g_u, dv], 1)  # of the bin's lower ends: all bins before it carry it
        g_size = torch.stack([-g_u * theta - g_delta * delta / w, dv * R + g_delta / w], 1)
        g_mean = g_start * before + g_size * p_at
        g_params = p.new_empty(len(p), 3 * K - 1, p.shape[3])
        g_p, past = g_params[:, :2 * K].unflatten(1, (2, K)), [torch.ones_like(theta), *past, torch.zeros_like(theta)]
        for k in range(K):
            here, after = past[k], past[k + 1]  # 1 where k <= the bin, and where k < the bin
            g = torch.lerp(g_size * here[:, None], g_start, after[:, None]).sub_(g_mean)
            g_p[:, :, k] = g.mul_(p[:, :, k]).mul_(1 - MIN * K)
            if k < K - 1:
                g_params[:, 2 * K + k] = torch.lerp(g_raw1 * here, g_raw0 * (1 - past[k + 2]), after)
        return torch.where(inside, (-dv if ctx.reverse else g_u) / side, dy), g_params, None, None


def spline_coupling_torch(x, params, tail_bound=3.0, reverse=False):
    """The fastest plain form: one pass over the bins each way, and the gradients in closed form."""
    acc, G, P, M, parts = accumulator(x), len(x) * x.shape[1], math.prod(x.shape[2:]), params.shape[1] // x.shape[1], []
    whole = torch.compiler.is_compiling() or not x.is_cpu  # pieces are for a CPU's cache
    rows = max(G, 1) if whole else max(CHUNK // max(P, 1), 1)
    for z, p in zip(x.to(acc).reshape(G, P).split(rows), params.to(acc).reshape(G, M, P).split(rows), strict=True):
        if P < 16:  # long rows where there are few positions too
            z, p = z.reshape(1, -1), p.movedim(1, 0).reshape(1, M, -1).contiguous()
        parts.append(_Spline.apply(z, p, tail_bound, reverse))
    y, log_d = (torch.cat([a.flatten() for a in part]).view(x.shape) for part in zip(*parts, strict=True))
    return y.to(x.dtype), log_d.flatten(1).sum(1)


# ---- kernels: a program takes BLOCK elements of one sample of n, laid out (n / INNER, INNER) in memory. Affine: INNER is a
# row that ends with what is transformed. Spline: INNER elements stand between two parameters of the same element.


@jit
def _affine(Params, Mask, i, s_max: tl.constexpr, n: tl.constexpr, INNER: tl.constexpr, KEPT: tl.constexpr,
            ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Where a block's raw are, which elements have them, and whether they count; tanh and log_s. All [BLOCK]."""
    at = (tl.program_id(0) // tl.cdiv(n, BLOCK)).to(tl.int64) * (n // INNER * (INNER - KEPT) * 2)
    at += i // INNER * (2 * (INNER - KEPT)) + i % INNER - KEPT
    has = (i < n) & (i % INNER >= KEPT)
    raw, live = tl.load(Params + at, mask=has, other=0.0).to(ACC), has
    if Mask is not None:
        live = has & (tl.load(Mask + i, mask=i < n, other=1) == 0)
    e = tl.exp(-2 * tl.abs(raw) / s_max)
    tanh = tl.where(raw < 0, -1.0, 1.0) * (1 - e) / (1 + e)
    return at, has, live, tanh, tl.where(live, s_max * tanh, 0.0)


@jit
def _affine_fwd_kernel(X, Params, Mask, Y, Partial, s_max: tl.constexpr, n: tl.constexpr, INNER: tl.constexpr,
                       KEPT: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK)
    i, row = pid % tiles * BLOCK + tl.arange(0, BLOCK), (pid // tiles).to(tl.int64) * n
    at, has, live, tanh, log_s = _affine(Params, Mask, i, s_max, n, INNER, KEPT, ACC, BLOCK)
    shift = tl.where(live, tl.load(Params + at + (INNER - KEPT), mask=has, other=0.0).to(ACC), 0.0)
    x, log_s = tl.load(X + row + i, mask=i < n, other=0.0).to(ACC), -log_s if REVERSE else log_s
    y = (x - shift) * tl.exp(log_s) if REVERSE else x * tl.exp(log_s) + shift
    tl.store(Y + row + i, y.to(Y.dtype.element_ty), mask=i < n)
    tl.store(Partial + pid, tl.sum(log_s, 0))


@jit
def _affine_bwd_kernel(X, Params, Mask, DY, DL, DX, DParams, s_max: tl.constexpr, n: tl.constexpr, INNER: tl.constexpr,
                       KEPT: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr):
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK)
    i, row = pid % tiles * BLOCK + tl.arange(0, BLOCK), (pid // tiles).to(tl.int64) * n
    at, has, live, tanh, log_s = _affine(Params, Mask, i, s_max, n, INNER, KEPT, ACC, BLOCK)
    x = tl.load(X + row + i, mask=has, other=0.0).to(ACC)
    dy, dl = tl.load(DY + row + i, mask=i < n, other=0.0).to(ACC), tl.load(DL + pid // tiles).to(ACC)
    if REVERSE:
        dx = dy * tl.exp(-log_s)
        x -= tl.load(Params + at + (INNER - KEPT), mask=has, other=0.0).to(ACC)
        d_shift, d_log_s = -dx, -dx * x - dl
    else:
        dx = dy * tl.exp(log_s)
        d_shift, d_log_s = dy, dx * x + dl
    d_raw, d_shift = tl.where(live, d_log_s * (1 - tanh * tanh), 0.0), tl.where(live, d_shift, 0.0)
    tl.store(DX + row + i, dx.to(DX.dtype.element_ty), mask=i < n)
    tl.store(DParams + at, d_raw.to(DParams.dtype.element_ty), mask=has)
    tl.store(DParams + at + (INNER - KEPT), d_shift.to(DParams.dtype.element_ty), mask=has)


@jit
def _softmax(Params, mask, real, ACC: tl.constexpr):
    """Softmax of every column of parameters, 0 in the rows that are not real. [KP, BLOCK]"""
    a = tl.where(real, tl.load(Params, mask=mask, other=0.0).to(ACC), float("-inf"))
    a = tl.exp(a - tl.max(a, 0)[None, :])
    return a / tl.sum(a, 0)[None, :]


@jit
def _derivative(Params, mask, real, MIN: tl.constexpr, ACC: tl.constexpr):
    """The derivative at a knot and that by its parameter: 1 and 0 at the two knots that have none. [BLOCK]"""
    raw = tl.load(Params, mask=mask & real, other=0.0).to(ACC)
    e = tl.exp(-tl.abs(raw))
    return tl.where(real, MIN + tl.maximum(raw, 0.0) + tl.log(1 + e), 1.0), tl.where(raw < 0, e, 1.0) / (1 + e)


@jit
def _spline(X, Params, i, tail_bound: tl.constexpr, MIN: tl.constexpr, n: tl.constexpr, INNER: tl.constexpr,
            K: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr):
    """What both directions of both passes need of a block of a sample: [BLOCK], but at, mask, k, pw, ph [KP, BLOCK]."""
    x = tl.load(X + i, mask=i < n, other=0.0).to(ACC)
    inside = (i < n) & (x >= -tail_bound) & (x <= tail_bound)
    u = tl.where(inside, (x + tail_bound) / (2 * tail_bound), 0.5)
    k, start = tl.arange(0, KP)[:, None], i // INNER * ((3 * K - 1) * INNER) + i % INNER
    at, mask = start[None, :] + k * INNER, (k < K) & (i < n)[None, :]
    pw, ph = _softmax(Params + at, mask, k < K, ACC), _softmax(Params + at + K * INNER, mask, k < K, ACC)
    ends = tl.cumsum(MIN + (1 - MIN * K) * (ph if REVERSE else pw), 0)
    index = tl.sum(((u[None, :] >= ends) & (k < K - 1)).to(tl.int32), 0)
    d0, s0 = _derivative(Params + start + (2 * K - 1 + index) * INNER, i < n, index > 0, MIN, ACC)
    d1, s1 = _derivative(Params + start + (2 * K + index) * INNER, i < n, index < K - 1, MIN, ACC)
    past, here = k < index[None, :], k == index[None, :]
    pw_past, pw_here = tl.sum(tl.where(past, pw, 0.0), 0), tl.sum(tl.where(here, pw, 0.0), 0)
    ph_past, ph_here = tl.sum(tl.where(past, ph, 0.0), 0), tl.sum(tl.where(here, ph, 0.0), 0)
    u0, w = MIN * index.to(ACC) + (1 - MIN * K) * pw_past, MIN + (1 - MIN * K) * pw_here
    v0, h = MIN * index.to(ACC) + (1 - MIN * K) * ph_past, MIN + (1 - MIN * K) * ph_here
    delta, theta = h / w, tl.minimum(tl.maximum((u - u0) / w, 0.0), 1.0)
    if REVERSE:
        eta = tl.minimum(tl.maximum((u - v0) / h, 0.0), 1.0)
        c, c_rest, q = 2 * delta * eta, 2 * delta * (1 - eta), d0 * (1 - eta) - d1 * eta
        r = tl.sqrt(q * q + c * c_rest) + tl.abs(q)
        theta = tl.where(q >= 0, c, r) / tl.where(q >= 0, c + r, r + c_rest)
    t, a, b = theta * (1 - theta), theta * theta, (1 - theta) * (1 - theta)
    D, M = delta * (1 - 2 * t) + (d0 + d1) * t, d1 * a + 2 * delta * t + d0 * b
    R = (delta * a + d0 * t) / D
    sums = (pw_past, pw_here, ph_past, ph_here)
    return x, inside, at, mask, k, index, pw, ph, sums, u0, w, v0, h, delta, d0, s0, d1, s1, theta, t, D, M, R


@jit
def _spline_fwd_kernel(X, Params, Y, Partial, tail_bound: tl.constexpr, MIN: tl.constexpr, n: tl.constexpr,
                       INNER: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
                       BLOCK: tl.constexpr):
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK)
    row, i = (pid // tiles).to(tl.int64) * n, pid % tiles * BLOCK + tl.arange(0, BLOCK)
    x, inside, at, mask, k, index, pw, ph, sums, u0, w, v0, h, delta, d0, s0, d1, s1, theta, t, D, M, R = _spline(
        X + row, Params + row * (3 * K - 1), i, tail_bound, MIN, n, INNER, K, KP, REVERSE, ACC)
    log_d = tl.log(delta * delta / (D * D) * M)
    y, log_d = u0 + w * theta if REVERSE else v0 + h * R, -log_d if REVERSE else log_d
    tl.store(Y + row + i, tl.where(inside, (2 * y - 1) * tail_bound, x).to(Y.dtype.element_ty), mask=i < n)
    tl.store(Partial + pid, tl.sum(tl.where(inside, log_d, 0.0), 0))


@jit
def _spline_bwd_kernel(X, Params, DY, DL, DX, DParams, tail_bound: tl.constexpr, MIN: tl.constexpr, n: tl.constexpr,
                       INNER: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, REVERSE: tl.constexpr, ACC: tl.constexpr,
                       BLOCK: tl.constexpr):
    pid, tiles = tl.program_id(0), tl.cdiv(n, BLOCK)
    row, i = (pid // tiles).to(tl.int64) * n, pid % tiles * BLOCK + tl.arange(0, BLOCK)
    x, inside, at, mask, k, index, pw, ph, sums, u0, w, v0, h, delta, d0, s0, d1, s1, theta, t, D, M, R = _spline(
        X + row, Params + row * (3 * K - 1), i, tail_bound, MIN, n, INNER, K, KP, REVERSE, ACC)
    dy, dl = tl.load(DY + row + i, mask=i < n, other=0.0).to(ACC), tl.load(DL + pid // tiles).to(ACC)
    dv, dl = tl.where(inside, 2 * tail_bound * dy, 0.0), tl.where(inside, dl, 0.0)
    a, b, turn, slope = theta * theta, (1 - theta) * (1 - theta), 1 - 2 * theta, delta * delta / (D * D) * M
    l_theta = 2 * (d1 * theta + delta * turn - d0 * (1 - theta)) / M - 2 * (d0 + d1 - 2 * delta) * turn / D
    if REVERSE:
        dv, dl = (dl * l_theta / w - dv) / slope, -dl
    g_u0 = -dv * slope - dl * l_theta / w
    dx = -dv if REVERSE else -g_u0
    tl.store(DX + row + i, tl.where(inside, dx / (2 * tail_bound), dy).to(DX.dtype.element_ty), mask=i < n)
    hv = dv * h * t / D
    g_delta = hv / D * (d1 * a - d0 * b) + dl * (2 / delta + 2 * t / M - 2 * (1 - 2 * t) / D)
    g_raw0, g_raw1 = (hv * (1 - R) + dl * (b / M - 2 * t / D)) * s0, (dl * (a / M - 2 * t / D) - hv * R) * s1
    g_w, g_h = g_u0 * theta - g_delta * delta / w, dv * R + g_delta / w
    to, ahead = DParams + row * (3 * K - 1) + at, (index[None, :] - k).to(ACC)
    past = tl.minimum(tl.maximum(ahead, 0.0), 1.0)  # 1 before the bin; numbers: as masks they would spill on gfx942
    here, last = tl.maximum(1 - tl.abs(ahead), 0.0), tl.maximum(1 - tl.abs(ahead - 1), 0.0)
    g = past * g_u0[None, :] + here * g_w[None, :] - (g_u0 * sums[0] + g_w * sums[1])[None, :]
    tl.store(to, ((1 - MIN * K) * pw * g).to(DParams.dtype.element_ty), mask=mask)
    g = past * dv[None, :] + here * g_h[None, :] - (dv * sums[2] + g_h * sums[3])[None, :]
    tl.store(to + K * INNER, ((1 - MIN * K) * ph * g).to(DParams.dtype.element_ty), mask=mask)
    g = last * g_raw0[None, :] + here * g_raw1[None, :]
    tl.store(to + 2 * K * INNER, g.to(DParams.dtype.element_ty), mask=mask & (k < K - 1))


# ---- operators: those of an affine coupling have a split (0 with a mask) and bound s_max; a spline's bound is tail_bound


def _as(a, x):
    """a in the layout that x has once it is dense."""
    return a.contiguous(memory_format=torch.channels_last if dense(x)[1] else torch.contiguous_format)


def _layout(x, params, mask, split, bound, reverse):
    """Dense x and params, the number of programs a sample, and the other arguments that all kernels take."""
    (x, last), params, C, n = dense(x), _as(params, x), x.shape[1], x[0].numel()
    acc = acc_type(x)
    if split is None:
        K, inner = (params.shape[1] // C + 1) // 3, 1 if last else n // C
        bins = triton.next_power_of_2(K)
        block = min(max(TILE // bins // (2 if inner == 1 else 1), 1), triton.next_power_of_2(n))
        more = {"tail_bound": bound, "MIN": MIN, "INNER": inner, "K": K, "KP": bins}
        more |= {"num_warps": 1}  # so that sums over bins stay within a warp
    else:
        if mask is not None:
            mask = (mask != 0).expand(x.shape[1:]).movedim(0, -1 if last else 0).to(torch.uint8).contiguous()
        inner, block = C if last else n, min(BLOCK, triton.next_power_of_2(n))
        more = {"s_max": bound, "INNER": inner, "KEPT": split * (inner // C), "Mask": mask}
    more |= {"X": x, "Params": params, "n": n, "BLOCK": block, "ACC": acc, "REVERSE": reverse}
    return x, params, triton.cdiv(n, block), more


@torch.library.custom_op("m2::coupling_fwd", mutates_args=())
def _fwd(x: torch.Tensor, params: torch.Tensor, mask: torch.Tensor | None, split: int | None, bound: float,
         reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, params, tiles, args = _layout(x, params, mask, split, bound, reverse)
    y, partial = torch.empty_like(x), x.new_empty(len(x), tiles, dtype=accumulator(x))
    with launching(x):
        (_spline_fwd_kernel if split is None else _affine_fwd_kernel)[(len(x) * tiles,)](Y=y, Partial=partial, **args)
    return y, partial.sum(1)


@torch.library.custom_op("m2::coupling_bwd", mutates_args=())
def _bwd(dy: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, params: torch.Tensor, mask: torch.Tensor | None,
         split: int | None, bound: float, reverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    dy, dl = _as(dy, x), dl.contiguous()
    x, params, tiles, args = _layout(x, params, mask, split, bound, reverse)
    args |= {"DY": dy, "DL": dl, "DX": torch.empty_like(x), "DParams": torch.empty_like(params)}
    with launching(x):
        (_spline_bwd_kernel if split is None else _affine_bwd_kernel)[(len(x) * tiles,)](**args)
    return args["DX"], args["DParams"]


def _save(ctx, inputs, output):
    x, params, mask, *ctx.rest = inputs
    ctx.save_for_backward(x, params, mask)


def _backward(ctx, dy, dl):
    return *_bwd(dy, dl, *ctx.saved_tensors, *ctx.rest), None, None, None, None


_fwd.register_fake(lambda x, *rest: (torch.empty_like(dense(x)[0]), x.new_empty(len(x), dtype=accumulator(x))))
_bwd.register_fake(lambda dy, dl, x, params, *rest: (torch.empty_like(dense(x)[0]), torch.empty_like(_as(params, x))))
_fwd.register_autograd(_backward, setup_context=_save)


def supports(x, params, mask=None, bins=1):
    if not {x.dtype, params.dtype} <= set(FLOATS):
        return False, f"x is {x.dtype}, params are {params.dtype}"
    if params.device != x.device or (mask is not None and mask.device != x.device):
        return False, f"x is on {x.device}, params or the mask elsewhere"
    if math.prod(params.shape[1:]) >= 2**31:  # offsets in a sample are int32
        return False, f"params {tuple(params.shape)} have 2^31 elements a sample, or more"
    return bins <= 64, f"{bins} bins, more than 64"


def affine_coupling(x, params, mask_or_split, reverse=False, s_max=2.0):
    """(y, log_det) of an affine coupling layer. x (B, C, *) floating -> y the same shape, type and layout, log_det (B,).

    mask_or_split: a number of leading channels, 0 to C, that pass unchanged, with params (B, 2 (C - split), *); or a mask
    that broadcasts to x.shape[1:], nonzero where x passes unchanged, with params (B, 2C, *). params: raw log-scales of any
    size, then shifts. s_max > 0 bounds |log_s|. log_det in float32 (float64 for float64). Differentiable once in x and
    params, through both results. Raises ValueError for shapes that do not fit, and what use_triton raises.
    """
    mask, split = (None, mask_or_split) if isinstance(mask_or_split, int) else (mask_or_split, 0)
    fits = x.dim() > 1 and 0 <= split <= x.shape[1] and params.shape == (len(x), 2 * (x.shape[1] - split), *x.shape[2:])
    if mask is not None:
        fits &= mask.dim() < x.dim() and all(a in (1, b) for a, b in zip(mask.shape[::-1], x.shape[::-1], strict=False))
    if not fits or s_max <= 0:
        kept = f"split {split}" if mask is None else f"mask {tuple(mask.shape)}"
        raise ValueError(f"affine_coupling: params {tuple(params.shape)}, {kept}, s_max {s_max} do not fit x {tuple(x.shape)}")
    if use_triton("affine_coupling", x, lambda: supports(x, params, mask), least=1 << 16, elementwise=True):
        return _fwd(x, params, mask, split, s_max, reverse)
    return affine_coupling_torch(x, params, mask_or_split, reverse, s_max)


def spline_coupling(x, params, tail_bound=3.0, reverse=False):
    """(y, log_det) of a monotonic rational-quadratic spline. x (B, C, *) floating -> y the same, log_det (B,).

    params (B, C * (3K - 1), *) or (B, C, 3K - 1, *), K >= 1 bins: see the head of the file. x is only what is transformed:
    its network sees the rest. tail_bound > 0, in the units of x. log_det in float32 (float64 for float64). Differentiable
    once in x and params, through both results. Raises ValueError for shapes that do not fit, and what use_triton raises.
    """
    C, flat = x.shape[1] if x.dim() > 1 else 0, params
    if params.dim() == x.dim() + 1 and params.shape[1] == C:
        flat = params.flatten(1, 2)
    M = flat.shape[1] // C if C and flat.dim() == x.dim() else 0
    if M % 3 != 2 or M >= 3 / MIN or flat.shape != (len(x), C * M, *x.shape[2:]) or tail_bound <= 0:
        raise ValueError(f"spline_coupling: params {tuple(params.shape)} and tail_bound {tail_bound} do not fit "
                         f"x {tuple(x.shape)}: (B, C * (3K - 1), *) is needed")
    if use_triton("spline_coupling", x, lambda: supports(x, params, bins=(M + 1) // 3), least=1 << 14):
        return _fwd(x, flat, None, None, tail_bound, reverse)
    return spline_coupling_torch(x, flat, tail_bound, reverse)


def _specs(kernels, name, sizes, registers, num_warps=4, vector=True):
    """A forward and a backward kernel in both directions and two types."""
    for kernel, most in zip(kernels, registers, strict=True):
        for dtype in ("fp32", "bf16"):
            for reverse in (False, True):
                args = dict.fromkeys(("X", "Y", "Params", "DY", "DX", "DParams"), f"*{dtype}") | {"Mask": None, "MIN": MIN}
                args |= {"Partial": "*fp32", "DL": "*fp32", "ACC": tl.float32, "tail_bound": 3.0, "s_max": 2.0}
                args |= {"REVERSE": reverse} | sizes
                yield Spec(kernel, f"{dtype}, {name}{', reverse' * reverse}", args, num_warps, 3, most, vector)


_AFFINE, _SPLINE = ("_affine_fwd_kernel", "_affine_bwd_kernel"), ("_spline_fwd_kernel", "_spline_bwd_kernel")
AOT_SPECS = [] if triton is None else [
    *_specs(_AFFINE, "8x14x14, split", {"n": 1568, "INNER": 1568, "KEPT": 784, "BLOCK": 1024}, (48, 48)),
    *_specs(_AFFINE, "mask", {"n": 784, "INNER": 784, "KEPT": 0, "BLOCK": 1024, "Mask": "*u8"}, (48, 48)),
    *_specs(_SPLINE, "4x14x14, 8 bins", {"n": 784, "INNER": 196, "K": 8, "KP": 8, "BLOCK": 64}, (128, 160), 1),
    # the parameters of an element of a vector are 23 numbers in a row, that begin anywhere
    *_specs(_SPLINE, "64, 8 bins", {"n": 64, "INNER": 1, "K": 8, "KP": 8, "BLOCK": 32}, (128, 160), 1, vector=False),
]
