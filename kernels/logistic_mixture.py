"""Log-likelihood of 8-bit images under discretised mixtures of logistics, with its gradient (PixelCNN++, Salimans et al. 2017).

    p(x) = sum_m pi_m prod_c [sigmoid((x_c + 1/255 - mu_mc) / s_mc) - sigmoid((x_c - 1/255 - mu_mc) / s_mc)]      (eq. 2)

x on the scale from -1 to 1, where its 256 levels are 2/255 apart; the lower end of level 0 is -infinity and the upper
end of level 255 is infinity, so that p sums to 1 over the levels, exactly. With three channels green's means shift by
c0 red, blue's by c1 red + c2 green (eq. 3), and pi is shared by the channels. log_scales up to -7 count as -7.

x (B, C, H, W), C = 1 or 3, levels {0..255}; params (B, K, H, W), whose K = 3M or 10M channels are logits (M), means
(C, M), log_scales (C, M) and, where C = 3, coefficients before their tanh (3, M). The result (B, H, W) is in nats.

With h half a bin and z = x_c - mu, both over s, the difference is sinh h / (cosh z + cosh h): no cancellation, no
density in its place. An open bin is sigmoid(t), which is exp of half of (t - |t| - 2 log(1 + exp -|t|)): the formula of
a closed bin with h = 0, halved, so that one formula does for all.

Least bytes, n = bytes of params: forward n, and n more where a gradient is wanted, which is written with it; backward
2n; besides x, once, and 4 bytes a position each way. The saved gradient is all that the backward pass needs.

When not: with few positions, or with more than 64 mixtures. There is no second derivative and no gradient to x.
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
    first_derivative_only,
    jit,
    launch,
    operator,
    power_of_2,
    tl,
    triton,
    use_triton,
)

TILE = 512  # mixtures times positions that a program of the forward kernel has; a quarter in float64
CHUNK = 1 << 17  # mixtures times channels times positions that a thread of the plain form has at once, to stay in cache
LOG_HALF_BIN = -math.log(255)


def _split(params, C):
    """logits (B, M, ...), means and log_scales (B, C, M, ...), coefficients (B, 3, M, ...) or (B, 0, M, ...)."""
    logits, rest = params.tensor_split([params.shape[1] // (3 if C == 1 else 10)], 1)
    rest = rest.unflatten(1, (-1, logits.shape[1]))
    return logits, rest[:, :C], rest[:, C:2 * C], rest[:, 2 * C:]


def logistic_mixture_reference(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    params = params.to(accumulator(params))
    logits, means, log_scales, coefs = _split(params, x.shape[1])
    x = 2 * x[:, :, None].to(params.dtype) - 255  # (B, C, 1, H, W), in half bins, 1/255, and so exact
    means = 255 * means
    if x.shape[1] == 3:
        c = coefs.tanh()
        red, green, _ = x.unbind(1)
        means = means + torch.stack([0 * c[:, 0], c[:, 0] * red, c[:, 1] * red + c[:, 2] * green], 1)
    h = torch.exp(-log_scales.clamp(min=-7)) / 255
    upper = (x - means + 1) * h
    lower = (x - means - 1) * h
    log_p = F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-2 * h))
    log_p = torch.where(x == -255, F.logsigmoid(upper), torch.where(x == 255, F.logsigmoid(-lower), log_p))
    return torch.logsumexp(F.log_softmax(logits, 1) + log_p.sum(1), 1)


def _exp_normalise(logits):
    """log of the sum of exp over mixtures, (B, 1, P), and two terms whose quotient is the softmax."""
    top = logits.amax(1, keepdim=True)
    p = (logits - top).exp_()
    total = p.sum(1, keepdim=True)
    return top + total.log(), p, total


def _closed_form(x, params, grad=None):
    """The result (B, P) for x (B, C, P) and params (B, K, P); writes its gradient to grad, of params' shape. In few passes."""
    C = x.shape[1]
    one = params.new_ones(())
    logits, means, log_scales, coefs = _split(params, C)
    x = 2 * x[:, :, None].to(params.dtype) - 255  # (B, C, 1, P), in half bins
    edge = (x == -255).to(x.dtype) - (x == 255).to(x.dtype)  # 1 in the lowest bin, -1 in the highest
    inside = 1 - edge.abs()
    half = (1 + inside) / 2

    log_h = torch.sub(LOG_HALF_BIN, log_scales).clamp_(max=LOG_HALF_BIN + 7)
    h = log_h.exp()
    a = torch.sub(x + edge, means, alpha=255)
    if C == 3:
        c = (2 * coefs).sigmoid_().mul_(2).sub_(1)  # tanh, which takes twice as long
        a[:, 1].addcmul_(c[:, 0], x[:, 0], value=-1)
        a[:, 2].addcmul_(c[:, 1], x[:, 0], value=-1).addcmul_(c[:, 2], x[:, 1], value=-1)
    a *= h  # z; t or -t in an open bin
    minus_a = a.abs().neg_()
    e = minus_a.exp()
    h_in = (h * inside).clamp_(min=1e-30)
    w = h_in.expm1()
    v = w / (1 + w)
    sinh = w + v  # twice sinh h
    cosh = w.sub_(v).add_(2)  # twice cosh h
    d = torch.addcmul(one, e, e + cosh)  # twice (cosh z + cosh h) exp(-|z|)
    log_p = minus_a.addcmul_(edge, a).add_((sinh / h_in).div_(d).log_()).addcmul_(inside, log_h).mul_(half)
    joint, posterior, total = _exp_normalise(logits + log_p.sum(1))
    norm, prior, prior_total = _exp_normalise(logits)
    ll = (joint - norm).squeeze(1) - math.log(2) / 2 * edge.abs().sum((1, 2))  # open bins: sinh / h_in was 2, not 1

    if grad is not None:
        d_logits, d_means, d_log_scales, d_coefs = _split(grad, C)
        posterior /= total
        torch.sub(posterior, prior.div_(prior_total), out=d_logits)
        posterior = posterior[:, None]
        slope = torch.addcmul(one, e, e, value=-1).div_(d).copysign_(a)
        slope = torch.addcmul(edge / -2, slope, half)  # -d log_p / da
        e.mul_(sinh).div_(d)  # p of a closed bin
        a.mul_(slope).addcmul_(cosh.div_(sinh).sub_(e).mul_(h_in), inside, value=-1)  # d log_p / d log_scale
        torch.mul(a.mul_(log_h.lt_(LOG_HALF_BIN + 7)), posterior, out=d_log_scales)
        torch.mul(slope.mul_(h).mul_(posterior), 255, out=d_means)
        if C == 3:
            torch.mul(torch.addcmul(one, c, c, value=-1).mul_(x[:, [0, 0, 1]]), slope[:, [1, 2, 2]], out=d_coefs)
    return ll


class _Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, gradient):
        B, C, H, W = x.shape
        P = H * W
        acc = accumulator(params)
        x = x.reshape(B, C, P)
        flat = params.reshape(B, params.shape[1], P)
        ll = params.new_empty(B, P, dtype=acc)
        grad = torch.empty_like(flat) if gradient else None
        count = max(CHUNK * torch.get_num_threads() * 3 // flat.shape[1], 1) if x.device.type == "cpu" else B * P
        images = max(count // max(P, 1), 1)
        positions = max(min(count, P), 1)
        for b in range(0, B, images):
            for p in range(0, P, positions):
                part = slice(b, b + images), slice(None), slice(p, p + positions)
                ll[part[::2]] = _closed_form(x[part], flat[part].to(acc), grad[part] if gradient else None)
        if gradient:
            ctx.save_for_backward(grad.view(params.shape))
        return ll.view(B, H, W)

    @staticmethod
    def backward(ctx, dll):
        first_derivative_only()
        grad, = ctx.saved_tensors
        return None, (grad * dll[:, None]).to(grad.dtype), None


def logistic_mixture_torch(x: torch.Tensor, params: torch.Tensor) -> torch.Tensor:
    """The fastest plain form: the kernels' way, gradient in closed form with the forward, part by part on the CPU."""
    if torch.compiler.is_compiling():
        return logistic_mixture_reference(x, params)  # a compiler fuses that
    return _Plain.apply(x, params, params.requires_grad and torch.is_grad_enabled())


# ---- kernels: a program has all mixtures of BLOCK_P positions of one image


@jit
def _bin(x, edge, gap, log_scale):
    """Of one channel [BLOCK_M, BLOCK_P], gap being 255 (x - mean): log p, its derivatives to mean / 255 and log_scale."""
    inside = (1 - edge * edge)[None, :]
    edge = edge[None, :]
    half = 0.5 + 0.5 * inside
    log_h = -5.541263545158426 - tl.maximum(log_scale, -7.0)  # half a bin is 1/255, whose log is -5.54...
    h_any = tl.exp(log_h)
    a = (gap + edge) * h_any  # z; t or -t in an open bin
    e = tl.exp(-tl.abs(a))
    h = inside * h_any
    up = tl.exp(h)
    down = 1 / up
    h2 = h * h
    series = 1 + h2 / 6 * (1 + h2 / 20 * (1 + h2 / 42 * (1 + h2 / 72 * (1 + h2 / 110 * (1 + h2 / 156)))))
    ratio = tl.where(h < 0.5, series, (up - down) / (2 * tl.maximum(h, 0.5)))  # sinh(h) / h
    d = 1 + e * (e + up + down)  # 2 (cosh z + cosh h) exp(-|z|)
    log_p = half * (edge * a - tl.abs(a) + tl.log(ratio / d) + inside * (log_h + 0.6931471805599453))  # log 2
    slope = half * tl.where(a < 0, e * e - 1, 1 - e * e) / d - 0.5 * edge  # -d log_p / da
    d_log_scale = a * slope - inside * ((up + down) / (2 * ratio) - 2 * h2 * ratio * e / d)
    return log_p, slope * h_any, tl.where(log_scale > -7, d_log_scale, 0.0)


@jit
def _channel(X, c, p, P, ACC: tl.constexpr):
    """Channel c of an image at positions p: 255 x, and 1 where its bin is the lowest, -1 where it is the highest."""
    level = tl.load(X + c * P + p, mask=p < P, other=0).to(ACC)
    return 2 * level - 255, tl.where(level == 0, 1.0, tl.where(level == 255, -1.0, 0.0)).to(ACC)


@jit
def _load(rows, row, stride_c, mask, ACC: tl.constexpr):
    return tl.load(rows + row * stride_c, mask=mask, other=0.0).to(ACC)  # [BLOCK_M, BLOCK_P]


@jit
def _store(rows, row, stride_c, mask, value):
    tl.store(rows + row * stride_c, value.to(rows.dtype.element_ty), mask=mask)


@jit
def _tanh(v):
    return 1 - 2 / (1 + tl.exp(2 * v))


@jit
def _logistic_fwd_kernel(X, Params, LL, Grad, P, stride_c, stride_p, C: tl.constexpr, M: tl.constexpr,
                         GRADIENT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr):
    """LL, and in Grad, of Params' shape, its gradient where GRADIENT. M, which a model has once, is a constant: as an argument
    it costs registers where there are three channels."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(P, BLOCK_P)
    image = (pid // blocks).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    p = pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    X += image * C * P
    K = M * (3 if C == 1 else 10)
    offsets = image * K * P + m[:, None].to(tl.int64) * stride_c + p[None, :].to(tl.int64) * stride_p  # [BLOCK_M, BLOCK_P]
    mask = (m[:, None] < M) & (p[None, :] < P)
    rows = Params + offsets

    x0, edge = _channel(X, 0, p, P, ACC)
    gap = x0[None, :] - 255 * _load(rows, M, stride_c, mask, ACC)
    log_p, mean0, scale0 = _bin(x0, edge, gap, _load(rows, M + C * M, stride_c, mask, ACC))
    if C == 3:
        c0 = _tanh(_load(rows, 7 * M, stride_c, mask, ACC))
        c1 = _tanh(_load(rows, 8 * M, stride_c, mask, ACC))
        c2 = _tanh(_load(rows, 9 * M, stride_c, mask, ACC))
        x1, edge = _channel(X, 1, p, P, ACC)
        gap = x1[None, :] - 255 * _load(rows, 2 * M, stride_c, mask, ACC) - c0 * x0[None, :]
        log_p1, mean1, scale1 = _bin(x1, edge, gap, _load(rows, 5 * M, stride_c, mask, ACC))
        x2, edge = _channel(X, 2, p, P, ACC)
        gap = x2[None, :] - 255 * _load(rows, 3 * M, stride_c, mask, ACC) - c1 * x0[None, :] - c2 * x1[None, :]
        log_p2, mean2, scale2 = _bin(x2, edge, gap, _load(rows, 6 * M, stride_c, mask, ACC))
        log_p += log_p1 + log_p2

    logits = tl.where(m[:, None] < M, _load(rows, 0, stride_c, mask, ACC), -float("inf"))
    top = tl.max(logits, 0)  # [BLOCK_P]
    top_joint = tl.max(logits + log_p, 0)
    prior = tl.exp(logits - top[None, :])
    posterior = tl.exp(logits + log_p - top_joint[None, :])
    total = tl.sum(prior, 0)
    total_joint = tl.sum(posterior, 0)
    tl.store(LL + image * P + p, top_joint - top + tl.log(total_joint / total), mask=p < P)

    if GRADIENT:
        rows = Grad + offsets
        posterior = posterior / total_joint[None, :]
        _store(rows, 0, stride_c, mask, posterior - prior / total[None, :])
        _store(rows, M, stride_c, mask, posterior * mean0 * 255)
        _store(rows, M + C * M, stride_c, mask, posterior * scale0)
        if C == 3:
            mean1 = posterior * mean1
            mean2 = posterior * mean2
            _store(rows, 2 * M, stride_c, mask, mean1 * 255)
            _store(rows, 3 * M, stride_c, mask, mean2 * 255)
            _store(rows, 5 * M, stride_c, mask, posterior * scale1)
            _store(rows, 6 * M, stride_c, mask, posterior * scale2)
            _store(rows, 7 * M, stride_c, mask, mean1 * x0[None, :] * (1 - c0 * c0))
            _store(rows, 8 * M, stride_c, mask, mean2 * x0[None, :] * (1 - c1 * c1))
            _store(rows, 9 * M, stride_c, mask, mean2 * x1[None, :] * (1 - c2 * c2))


@jit
def _logistic_bwd_kernel(DLL, Grad, DParams, K, P, stride_c, stride_p, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr):
    """DParams = DLL * Grad."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(P, BLOCK_P)
    image = (pid // blocks).to(tl.int64)
    p = pid % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    dll = tl.load(DLL + image * P + p, mask=p < P, other=0.0)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offsets = image * K * P + k[:, None].to(tl.int64) * stride_c + p[None, :].to(tl.int64) * stride_p
        mask = (k[:, None] < K) & (p[None, :] < P)
        grad = tl.load(Grad + offsets, mask=mask, other=0.0).to(dll.dtype)
        tl.store(DParams + offsets, (grad * dll[None, :]).to(DParams.dtype.element_ty), mask=mask)


# ---- operators


def _dense(params):
    """params, copied where they are neither contiguous nor channels_last; positions of an image, strides of channels and of
    positions."""
    P = params.shape[2] * params.shape[3]
    if params.is_contiguous(memory_format=torch.channels_last) and not params.is_contiguous():
        return params, (P, 1, params.shape[1])
    return params.contiguous(), (P, P, 1)


def _mixtures(K, C):
    """M of K parameters a position."""
    return K // (3 if C == 1 else 10)


def _blocks(M, acc):
    """BLOCK_M and BLOCK_P of the forward kernel, such that it does not spill (AOT_MORE compiles it)."""
    block_m = power_of_2(M)
    tile = TILE // 4 if acc == torch.float64 else TILE
    return {"BLOCK_M": block_m, "BLOCK_P": max(tile // block_m, 1)}


def _fake_fwd(x, params, gradient):
    ll = params.new_empty(x[:, 0].shape, dtype=accumulator(params))
    return ll, torch.empty_like(_dense(params)[0]) if gradient else params.new_empty(0)


def _save(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)  # of the gradient, which nobody is given


def _backward(ctx, dll, _):
    return None, None if dll is None else _bwd(dll, *ctx.saved_tensors), None


@operator("logistic_mixture_fwd", _fake_fwd, _save, _backward)
def _fwd(x: torch.Tensor, params: torch.Tensor, gradient: bool) -> tuple[torch.Tensor, torch.Tensor]:
    B, C, H, W = x.shape
    params, sizes = _dense(params)
    M = _mixtures(params.shape[1], C)
    blocks = _blocks(M, accumulator(params))
    ll = params.new_empty(B, H, W, dtype=accumulator(params))
    grad = torch.empty_like(params) if gradient else params.new_empty(0)
    launch(_logistic_fwd_kernel, B * cdiv(H * W, blocks["BLOCK_P"]), x.contiguous(), params, ll, grad, *sizes, C=C, M=M,
           GRADIENT=gradient, ACC=acc_type(params), **blocks)
    return ll, grad


@operator("logistic_mixture_bwd", lambda dll, grad: torch.empty_like(_dense(grad)[0]))
def _bwd(dll: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    grad, sizes = _dense(grad)
    dparams = torch.empty_like(grad)
    launch(_logistic_bwd_kernel, len(grad) * cdiv(sizes[0], TILE // 16), dll.contiguous(), grad, dparams,
           grad.shape[1], *sizes, BLOCK_K=16, BLOCK_P=TILE // 16)
    return dparams


def supports(x: torch.Tensor, params: torch.Tensor) -> tuple[bool, str]:
    if params.dtype not in FLOATS:
        return False, f"params are {params.dtype}"
    if x.device != params.device:
        return False, f"x is on {x.device}, params on {params.device}"
    if math.prod(params.shape[1:]) >= 2**31:  # offsets in an image are int32
        return False, f"params {tuple(params.shape)} have 2^31 elements an image, or more"
    M = _mixtures(params.shape[1], x.shape[1])
    return M <= 64, f"{M} mixtures, more than 64"


def logistic_mixture(x: torch.Tensor, params: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Log-likelihood in nats, (B, H, W), of x (B, C, H, W) under the mixtures of params (B, 3M or 10M, H, W).

    x: levels {0..255}, uint8 or floating; C = 1 or 3; no gradient goes to it. params: floating, in the order that the top
    of this file gives; differentiable once. The result is float32, float64 where params are; its sum over H and W is the
    log-likelihood of an image. The kernel takes up to 64 mixtures. backend: one of kernels.MODES, instead of kernels.mode
    in this call. Raises ValueError for what does not fit, and what use_triton raises.
    """
    per = {1: 3, 3: 10}.get(x.shape[1], 0) if x.dim() == params.dim() == 4 else 0
    M = params.shape[1] // max(per, 1)
    if per * M == 0 or params.shape != (len(x), per * M, *x.shape[2:]):
        raise ValueError(f"logistic_mixture: params {tuple(params.shape)} do not fit x {tuple(x.shape)}: "
                         "(B, 3M, H, W) for one channel, (B, 10M, H, W) for three")
    if x.dtype != torch.uint8 and not x.is_floating_point() or not params.is_floating_point():
        raise ValueError(f"logistic_mixture: x {x.dtype} must be uint8 or floating, params {params.dtype} floating")
    x = x.detach()
    # of any size: the plain form launches 67 kernels, 97 with the gradient, where this launches 1 and 2
    if use_triton("logistic_mixture", params, lambda: supports(x, params), backend=backend):
        return _fwd(x, params, params.requires_grad and torch.is_grad_enabled())[0]
    return logistic_mixture_torch(x, params)


def _spec(kernel, dtype, registers=255, C=1, channels_last=False, vector=False, M=10, **more):
    accumulate = "fp64" if dtype == "fp64" else "fp32"
    args = {"X": "*u8"} | dict.fromkeys(("DLL", "LL"), f"*{accumulate}")
    args |= dict.fromkeys(("Params", "Grad", "DParams"), f"*{dtype}")
    args |= {"stride_c": 1, "stride_p": "i32"} if channels_last else {"stride_c": "i32:16", "stride_p": 1}
    args |= {"K": "i32", "M": M, "P": "i32:16", "C": C, "GRADIENT": True}
    args |= {"ACC": tl.float64 if dtype == "fp64" else tl.float32, "BLOCK_K": 16}
    args |= _blocks(M, torch.float64 if dtype == "fp64" else torch.float32) if "fwd" in kernel else {"BLOCK_P": TILE // 16}
    args |= more
    name = f"{dtype}, C = {C}, {'channels_last' if channels_last else 'contiguous'}"
    name += f", {M} mixtures" * (M != 10) + ", rows of any length" * ("P" in more) + ", no gradient" * ("GRADIENT" in more)
    return Spec(kernel, name, args, registers=registers, vector=vector)


_FWD = "_logistic_fwd_kernel"
_BWD = "_logistic_bwd_kernel"
AOT_SPECS = [] if triton is None else [spec for t, vector in (("fp32", True), ("bf16", False)) for spec in (
    # no vectors: in channels_last rows of 10 mixtures; of bf16 with gfx942's warps of 64, two elements a thread
    _spec(_FWD, t, 96, vector=vector),
    _spec(_FWD, t, 56, vector=vector, GRADIENT=False),
    _spec(_FWD, t, 96, channels_last=True),
    _spec(_FWD, t, 192, 3, vector=vector),
    _spec(_FWD, t, 192, 3, channels_last=True),
    _spec(_BWD, t, 48, vector=True),
    _spec(_BWD, t, 48, channels_last=True),
)]
AOT_MORE = [] if triton is None else [  # what a launch may choose besides, up to 64 mixtures
    *(_spec(_FWD, t, C=C, channels_last=last, M=M)
      for M in (1, 5, 32, 64) for C in (1, 3) for last in (False, True) for t in ("fp32", "bf16")),
    *(_spec(_FWD, t, C=3, channels_last=last) for last in (False, True) for t in ("fp16", "fp64")),
    *(_spec(_FWD, "fp64", C=3, M=64, channels_last=last) for last in (False, True)),
    *(_spec(_FWD, t, C=3, P="i32", stride_c="i32") for t in ("fp32", "bf16")),
    *(_spec(_FWD, t, C=3, GRADIENT=False) for t in ("fp32", "bf16")),
    *(_spec(_BWD, t, P="i32", stride_c="i32") for t in ("fp32", "bf16", "fp64")),
]
