"""The nearest code of every vector, for vector quantisation (van den Oord et al. 2017, equations 1 and 2).

    k(z) = argmin_j |z - e_j|^2 = argmin_j (|e_j|^2 - 2 z . e_j),    z_q = e_k(z)

z (..., D), codebook e (K, D), of the same type or not. The N x K matrix of distances, N vectors in all, is never held.
|z|^2 is the same for all codes and left out. Distances are in float32 for every type but float64, which keeps its own.
Two of float16 or of bfloat16 are multiplied as they are, exactly. float32 is cut into three bfloat16 parts, 8 digits each,
and the six products that float32 could tell from none are added: as exact as float32, and on every matrix unit; tf32 keeps
11 digits and would pick wrong codes. So the code differs from the nearest only where that is nearer by no more than the
rounding of float32, a few times 2^-23 (|z| |e| + |e|^2). Of equal distances the lowest index wins. A distance that is not
finite never wins: codes with NaN or infinity are not used, vectors with either, or whose products overflow, get index 0.

Least bytes, z contiguous: forward z, z_q, 8N for the indices, and the codebook. The codebook is read again, from the cache,
for every 64 vectors (16 where there are few), then the N rows of it that were chosen; where a row is longer than BLOCK_D,
the vectors too, for every 64 codes. float32 is cut again there, whatever the sizes: of 189 instructions that a warp of sm_80
issues for 16 numbers of a row, 60 cut, while the 48 products among them keep its matrix unit busy for 384 cycles and hide
the rest. Parts written once would come with 12 bytes from the L2 cache for every 10 now, and with a pass of 10 bytes a
number. Where a program has 16 vectors it is 60 of 117 instructions beside 48 cycles of products, but then z is small, and the
launches that cut it beforehand would take longer. Backward: dz_q, 8N, and the codebook's gradient. A stable sort of
the indices by PyTorch comes before it, so that each code's rows are added up in order, without float atomics. A program adds
at most 256 of them, or the root of N; where a code has more, the sums of such runs are written and then added, in order, so
that a codebook of which one code is taken keeps as many programs busy.

When not: where one product with its N x K result is cheap, as with D of several hundred and few codes.
"""

import contextlib
import math

import torch
import torch.nn.functional as F

from . import FLOATS, INTERPRETING, Spec, acc_type, accumulator, cdiv, jit, launch, operator, power_of_2, tl, triton, use_triton

LEAST = 1 << 14  # elements of z from which "auto" takes the kernel: the plain form makes some ten calls, so a launch soon pays
LARGE = 1 << 14  # vectors from which on a program has 64 of them, below it 16, so that there are programs for a whole device
BLOCK_D = 16, 64  # elements of a row that a program holds at once: of float32 and float64, of half types
GROUP = 32  # plain form: codes of which the nearest is found first
CODES = 1024  # plain form: codes of a chunk
CHUNK = 256  # rows that a program adds up at most, where there are up to CHUNK^2; else a power of two of at least their root
BUFFER = {"cpu": 1 << 21}  # plain form: distances of a chunk, to stay in the cache; 1 << 24 on other devices


def nearest_code_reference(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds all distances. The gradients are those of nearest_code."""
    acc = accumulator(_wider(z, codebook))
    x = z.detach().reshape(-1, z.shape[-1]).to(acc)
    e = codebook.detach().to(acc)
    indices = (x.square().sum(1, keepdim=True) - 2 * x @ e.T + e.square().sum(1)).argmin(1)
    return codebook[indices].to(z.dtype).view(z.shape), indices.view(z.shape[:-1])


def nearest_code_torch(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fastest plain form: distances of a chunk of vectors and codes at a time, in a buffer that is used again."""
    indices = _search(z.reshape(-1, z.shape[-1]).detach(), codebook.detach())
    z_q = F.embedding(indices, codebook.to(accumulator(codebook))).to(z.dtype)  # so the gradient is summed in float32
    return z_q.view(z.shape), indices.view(z.shape[:-1])


def _wider(z, codebook):
    """Whichever of the two has the wider type: accumulator() of it is the type of the distances."""
    return z if z.element_size() > codebook.element_size() else codebook


@contextlib.contextmanager
def _exact(x):
    """Matrix products of float32 in float32, whatever autocast and the precision of matrix products are set to."""
    settings = [(m, m.fp32_precision) for m in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]
    settings = [(m, precision) for m, precision in settings if precision not in ("ieee", "none")]
    for m, _ in settings:
        m.fp32_precision = "ieee"
    try:
        with torch.autocast(x.device.type, enabled=False):
            yield
    finally:
        for m, precision in settings:
            m.fp32_precision = precision


def _fake_search(z, codebook):
    return z.new_empty(len(z), dtype=torch.int64)


@operator("nearest_code_search", _fake_search)  # an operator, so that no compiler unrolls its loops
def _search(z: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    N = len(z)
    K = len(codebook)
    acc = accumulator(_wider(z, codebook))
    inf = float("inf")
    cols = min(K + -K % GROUP, CODES)  # whole groups: the last is filled with codes at infinity
    rows = max(1, min(N, BUFFER.get(z.device.type, 1 << 24) // cols))
    buffer = z.new_empty(rows, cols, dtype=acc)
    every = torch.arange(rows, device=z.device)
    indices = z.new_zeros(N, dtype=torch.int64)
    best = z.new_full((N,), inf, dtype=acc)
    with _exact(z):
        for k0 in range(0, K, cols):
            e = codebook[k0:k0 + cols].to(acc)
            norm = e.square().sum(1)
            spare = cols - len(e)
            usable = norm.isfinite()
            e = F.pad(torch.where(usable[:, None], -2 * e, 0), (0, 0, 0, spare)).T
            norm = F.pad(norm.masked_fill(~usable, inf), (0, spare), value=inf)
            for n0 in range(0, N, rows):
                x = z[n0:n0 + rows].to(acc)
                d = torch.addmm(norm, x, e, out=buffer[:len(x)]).view(len(x), -1, GROUP)  # |e|^2 - 2 z . e
                group = d.amin(2).argmin(1)  # a minimum is several times faster than where it is, so that is for few
                value, within = d[every[:len(x)], group].min(1)
                nearer = value < best[n0:n0 + rows]
                indices[n0:n0 + rows] = torch.where(nearer, k0 + group * GROUP + within, indices[n0:n0 + rows])
                best[n0:n0 + rows] = torch.where(nearer, value, best[n0:n0 + rows])
    return indices.masked_fill_(best == -inf, 0)


# ---- kernels: operands are held in the type DOT, distances in ACC


@jit
def _split(x, DOT: tl.constexpr, OPERAND: tl.constexpr, PARTS: tl.constexpr):
    """x as the sum of parts of type DOT, each what the ones before it left over; of three, or x itself three times."""
    x0 = x.to(DOT)
    if PARTS == 1:
        return x0.to(OPERAND), x0.to(OPERAND), x0.to(OPERAND)
    rest = x.to(tl.float32) - x0.to(tl.float32)
    x1 = rest.to(DOT)
    x2 = (rest - x1.to(tl.float32)).to(DOT)
    return x0.to(OPERAND), x1.to(OPERAND), x2.to(OPERAND)


@jit
def _nearest_kernel(Z, E, Parts, Norm, ZQ, Indices, N, K, D: tl.constexpr, DOT: tl.constexpr, OPERAND: tl.constexpr,
                    ACC: tl.constexpr, PARTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """A program a block of vectors: their codes, and those codes' rows. Parts (PARTS, K, D)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    row = n[:, None].to(tl.int64) * D
    z = tl.load(Z + row + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0)  # [BLOCK_N, BLOCK_D]
    z0, z1, z2 = _split(z, DOT, OPERAND, PARTS)
    best = tl.full([BLOCK_N, BLOCK_K], float("inf"), ACC)  # of the codes seen so far in each column, the nearest
    start = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)  # and the first code of the block it was in
    for k0 in range(0, K, BLOCK_K):
        k = k0 + col
        dot = tl.zeros([BLOCK_N, BLOCK_K], ACC)
        for d0 in range(0, D, BLOCK_D):
            if D > BLOCK_D:
                mask = (n[:, None] < N) & (d0 + d[None, :] < D)
                z = tl.load(Z + row + d0 + d[None, :], mask=mask, other=0.0)
                z0, z1, z2 = _split(z, DOT, OPERAND, PARTS)
            mask = (k[None, :] < K) & (d0 + d[:, None] < D)
            for i in tl.static_range(PARTS):  # of three, the least first, and only products above the rounding of float32
                part = PARTS - 1 - i
                e = tl.load(Parts + (part * K + k[None, :]).to(tl.int64) * D + d0 + d[:, None], mask=mask, other=0.0)
                e = e.to(OPERAND)  # [BLOCK_D, BLOCK_K]
                if part + 2 < PARTS:
                    dot = tl.dot(z2, e, dot, input_precision="ieee", out_dtype=ACC)
                if part + 1 < PARTS:
                    dot = tl.dot(z1, e, dot, input_precision="ieee", out_dtype=ACC)
                dot = tl.dot(z0, e, dot, input_precision="ieee", out_dtype=ACC)
        distance = tl.load(Norm + k, mask=k < K, other=float("inf"))[None, :] - 2 * dot
        nearer = distance < best  # strictly: of equal ones the first stays
        best = tl.where(nearer, distance, best)
        start = tl.where(nearer, k0, start)
    nearest = tl.min(best, 1)  # [BLOCK_N]
    index = tl.min(tl.where(best == nearest[:, None], start + col[None, :], K), 1)
    index = tl.where(nearest > -float("inf"), index, 0).to(tl.int64)
    tl.store(Indices + n, index, mask=n < N)
    for d0 in range(0, D, BLOCK_D):
        mask = (n[:, None] < N) & (d0 + d[None, :] < D)
        z_q = tl.load(E + index[:, None] * D + d0 + d[None, :], mask=mask, other=0.0)
        tl.store(ZQ + row + d0 + d[None, :], z_q.to(ZQ.dtype.element_ty), mask=mask)


@jit
def _sum_kernel(X, Order, Codes, Starts, Sums, Parts, n_codes, chunk, D: tl.constexpr, ACC: tl.constexpr,
                BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sums of rows of X in the order Order, in which a code's rows are neighbours, Codes those codes; at most chunk rows each.

    First a program a code and block of its row: Sums (n_codes, D) of its first chunk rows. Then a program for every run of
    chunk rows but the first: Parts of those that come behind the first chunk rows of their code. They are of a single code,
    that of the first row: another one would have begun in this run.
    """
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    row = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    if row < n_codes:
        start = tl.load(Starts + row)
        end = tl.minimum(start + chunk, tl.load(Starts + row + 1))
        out = Sums + row * D
    else:
        run = row - n_codes
        first = (run + 1) * chunk
        code = tl.load(Codes + first)
        start = tl.maximum(first, tl.load(Starts + code, mask=code < n_codes, other=0) + chunk)
        end = tl.minimum(first + chunk, tl.load(Starts + code + 1, mask=code < n_codes, other=0))
        out = Parts + run * D
    total = tl.zeros([BLOCK_D], ACC)
    for i0 in range(start, end, BLOCK_N):
        i = i0 + tl.arange(0, BLOCK_N)
        n = tl.load(Order + i, mask=i < end, other=0)
        x = tl.load(X + n[:, None] * D + d[None, :], mask=(i[:, None] < end) & (d[None, :] < D), other=0.0).to(ACC)
        total += tl.sum(x, 0)
    tl.store(out + d, total, mask=d < D)


@jit
def _sum_parts_kernel(Starts, Sums, Parts, chunk, D: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
                      BLOCK_D: tl.constexpr):
    """A program a code and block of its row: to Sums, the Parts of that code, in their order."""
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    k = (tl.program_id(0) // blocks).to(tl.int64)
    d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    behind = tl.load(Starts + k) + chunk  # its first row that is not in Sums
    end = tl.load(Starts + k + 1)
    if behind < end:
        total = tl.zeros([BLOCK_D], ACC)
        last = (end - 1) // chunk
        for j0 in range(behind // chunk, last + 1, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            mask = (j[:, None] <= last) & (d[None, :] < D)
            total += tl.sum(tl.load(Parts + (j[:, None] - 1) * D + d[None, :], mask=mask, other=0.0), 0)
        sums = tl.load(Sums + k * D + d, mask=d < D, other=0.0)
        tl.store(Sums + k * D + d, sums + total, mask=d < D)


# ---- operators


def _dot_constants(acc, half):
    """How z and codes are multiplied: half, their common type, as it is; else float32 in three parts; float64 as it is."""
    dot = half or (tl.float64 if acc == tl.float64 else tl.bfloat16)
    operand = acc if INTERPRETING else dot  # the interpreter has no arithmetic in bfloat16
    return {"ACC": acc, "DOT": dot, "OPERAND": operand, "PARTS": 1 if half or acc == tl.float64 else 3}


def _blocks(N, D, half, amd):
    """Blocks of a program of _nearest_kernel, its warps and stages: the largest without spills on every target."""
    large = N >= LARGE
    warps = 4 if large != half else 8  # of float32 no more where there are 64 vectors: on sm_80 two would do the same products
    stages = 3 if half or large and not amd else 2
    return {"BLOCK_N": 64 if large else 16, "BLOCK_K": 64, "BLOCK_D": max(16, min(power_of_2(D), BLOCK_D[half])),
            "num_warps": warps, "num_stages": stages}


def _in_parts(e):
    """float32 as the sum of three bfloat16 parts, (3, K, D). No torch.stack: float16's autocast refuses it."""
    parts = e.new_empty(3, *e.shape, dtype=torch.bfloat16)
    rest = e
    for part in parts:
        part.copy_(rest)
        rest = rest - part
    return parts


def _fake_nearest(z, codebook):
    return z.new_empty(z.shape), _fake_search(z, codebook)


def _save_nearest(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.codes = inputs[1].shape[0]
    ctx.dtype = inputs[1].dtype


def _backward_nearest(ctx, dz_q, _):
    indices, = ctx.saved_tensors
    return None, _sum(dz_q, indices, ctx.codes)[0].to(ctx.dtype)


@operator("nearest_code", _fake_nearest, _save_nearest, _backward_nearest)
def _nearest(z: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    z = z.contiguous()
    codebook = codebook.contiguous()
    N, D = z.shape
    K = len(codebook)
    wider = _wider(z, codebook)
    half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(z.dtype) if z.dtype == codebook.dtype else None
    constants = _dot_constants(acc_type(wider), half) | _blocks(N, D, half is not None, torch.version.hip is not None)
    e = codebook.to(accumulator(wider))
    norm = e.square().sum(1)
    if constants["PARTS"] == 3:
        parts = _in_parts(e)
    else:
        parts = codebook if half else e
    z_q = torch.empty_like(z)
    indices = z.new_empty(N, dtype=torch.int64)
    launch(_nearest_kernel, cdiv(N, constants["BLOCK_N"]), z, codebook, parts, norm, z_q, indices, N, K, D=D,
           **constants)
    return z_q, indices


def _chunk(N):
    """The most rows of N that a program adds up: so many that it never has more such sums to add either."""
    return max(CHUNK, power_of_2(math.isqrt(max(N - 1, 0)) + 1))


def _fake_sum(x, indices, n_codes):
    return x.new_empty(n_codes, x.shape[1], dtype=accumulator(x)), indices.new_empty(n_codes + 1)


def _save_sum(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype


def _backward_sum(ctx, dsums, _):
    indices, = ctx.saved_tensors
    return dsums[indices].to(ctx.dtype), None, None


@operator("sum_by_code", _fake_sum, _save_sum, _backward_sum)
def _sum(x: torch.Tensor, indices: torch.Tensor, n_codes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums, and where each code's rows start among rows that are sorted by code, (n_codes + 1,)."""
    x = x.contiguous()
    N, D = x.shape
    codes, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(codes, torch.arange(n_codes + 1, device=x.device))
    sums = x.new_empty(n_codes, D, dtype=accumulator(x))
    chunk = _chunk(N)
    runs = max(cdiv(N, chunk) - 1, 0)
    parts = sums.new_empty(runs, D)
    block = min(power_of_2(D), 128)
    constants = {"D": D, "ACC": acc_type(x), "BLOCK_N": 32, "BLOCK_D": block}
    launch(_sum_kernel, (n_codes + runs) * cdiv(D, block), x, order, codes, starts, sums, parts, n_codes, chunk, **constants)
    if runs:
        launch(_sum_parts_kernel, n_codes * cdiv(D, block), starts, sums, parts, chunk, **constants)
    return sums, starts


def supports(z: torch.Tensor, codebook: torch.Tensor) -> tuple[bool, str]:
    for name, x in (("z", z), ("codebook", codebook)):
        if x.dtype not in FLOATS:
            return False, f"{name} is {x.dtype}"
    return z.device == codebook.device, f"z is on {z.device}, codebook on {codebook.device}"


def nearest_code(z: torch.Tensor, codebook: torch.Tensor, *,
                 backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The code nearest to each vector. z (..., D), codebook (K, D), floating -> (z_q, indices).

    z_q (..., D), in the type of z: codebook[indices], with that gather's gradient to the codebook and none to z, as the
    codebook and commitment losses want it, |sg(z) - z_q|^2 + beta |z - sg(z_q)|^2. The decoder wants straight_through(z, z_q).
    indices (...) int64 in [0, K), without a gradient. The codebook may be computed (SimVQ), or a buffer that averages of
    sum_and_count(z, indices, K) update (EMA).
    Ties, infinities and rounding: at the top of this file. backend: one of kernels.MODES, for this call. Raises ValueError
    for shapes that do not fit or an empty codebook, and what use_triton raises.
    """
    if z.dim() < 1 or codebook.dim() != 2 or z.shape[-1] != codebook.shape[1] or not codebook.numel():
        raise ValueError(f"nearest_code: codebook {tuple(codebook.shape)} does not fit z {tuple(z.shape)}")
    if not (z.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"nearest_code: z and codebook must be floating, not {z.dtype} and {codebook.dtype}")
    if use_triton("nearest_code", z, lambda: supports(z, codebook), LEAST, backend=backend):
        z_q, indices = _nearest(z.reshape(-1, z.shape[-1]).detach(), codebook)
        return z_q.view(z.shape), indices.view(z.shape[:-1])
    return nearest_code_torch(z, codebook)


def straight_through(z: torch.Tensor, z_q: torch.Tensor) -> torch.Tensor:
    """Exactly z_q, for finite z, with the gradient of z: passed on to z as it is, nothing to z_q. Both of one shape."""
    if z.shape != z_q.shape:
        raise ValueError(f"straight_through: z {tuple(z.shape)} and z_q {tuple(z_q.shape)} differ")
    return z_q.detach() + (z - z.detach())


def sum_by_code(x: torch.Tensor, indices: torch.Tensor, n_codes: int, *, backend: str | None = None) -> torch.Tensor:
    """The sum of the vectors that took each code. x (..., D), indices (...) int64 in [0, n_codes) -> (n_codes, D).

    In float32 for every type but float64; deterministic; differentiable in x. backend: as of nearest_code. Raises
    ValueError for shapes that do not fit, and what use_triton raises.
    """
    x, indices = _vectors("sum_by_code", x, indices)
    if use_triton("nearest_code", x, lambda: supports(x, x), LEAST, backend=backend):
        return _sum(x, indices, n_codes)[0]
    return _sum_torch(x, indices, n_codes)


def sum_and_count(x: torch.Tensor, indices: torch.Tensor, n_codes: int, *,
                  backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_by_code, and how many vectors took each code, (n_codes,) int64, exactly: what moving averages (EMA) want of a batch.

    On a GPU the counts come from the sort that the sums need, so a codebook of which one code is taken costs no more. Nothing
    waits for the device.
    """
    x, indices = _vectors("sum_and_count", x, indices)
    if use_triton("nearest_code", x, lambda: supports(x, x), LEAST, backend=backend):
        sums, starts = _sum(x, indices, n_codes)
        return sums, starts.diff()
    return _sum_torch(x, indices, n_codes), _count_torch(indices, n_codes)


def _vectors(name, x, indices):
    """x as (N, D) and indices as (N,)."""
    if x.dim() < 1 or x.shape[:-1] != indices.shape:
        raise ValueError(f"{name}: indices {tuple(indices.shape)} do not fit x {tuple(x.shape)}")
    return x.reshape(-1, x.shape[-1]), indices.reshape(-1)


def _sum_torch(x: torch.Tensor, indices: torch.Tensor, n_codes: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(x.to(accumulator(x)), indices, n_codes, -1, False)


def _count_torch(indices: torch.Tensor, n_codes: int) -> torch.Tensor:
    """Elsewhere than on the CPU by a sort: there ones would be added with atomics, of one code all at one address."""
    if indices.is_cpu:
        return indices.new_zeros(n_codes).index_add_(0, indices, torch.ones_like(indices))
    return torch.searchsorted(indices.sort()[0], torch.arange(n_codes + 1, device=indices.device)).diff()


def _spec(t, D, N, registers):
    args = dict.fromkeys(("Z", "E", "ZQ"), f"*{t}") | {"Parts": "*bf16" if t == "fp32" else f"*{t}", "Norm": "*fp32"}
    args |= {"Indices": "*i64", "N": "i32:16", "K": "i32:16", "D": D}
    args |= _dot_constants(tl.float32, {"fp32": None, "bf16": tl.bfloat16, "fp16": tl.float16}[t])
    args |= _blocks(N, D, t != "fp32", amd=False)
    hip = {"num_stages": _blocks(N, D, t != "fp32", amd=True)["num_stages"]}
    return Spec("_nearest_kernel", f"{t}, D {D}, {args['BLOCK_N']} vectors", args, args.pop("num_warps"),
                args.pop("num_stages"), registers, matrix=True, hip=hip)


def _sum_spec(kernel, dtype, D=64, registers=48, **more):
    args = dict.fromkeys(("Order", "Codes", "Starts"), "*i64") | dict.fromkeys(("Sums", "Parts"), "*fp32")
    args |= {"X": f"*{dtype}", "n_codes": "i32:16", "chunk": "i32:16", "D": D, "ACC": tl.float32, "BLOCK_N": 32}
    args |= {"BLOCK_D": min(power_of_2(D), 128)} | more
    return Spec(kernel, dtype + f", D {D}" * (D != 64), args, registers=registers)


AOT_SPECS = [] if triton is None else [
    _spec("fp32", 64, LARGE, 192),
    _spec("fp32", 64, 0, 104),
    _spec("fp32", 256, LARGE, 208),
    _spec("fp32", 256, 0, 104),
    _spec("bf16", 64, LARGE, 104),
    _spec("bf16", 64, 0, 72),
    _spec("bf16", 256, LARGE, 136),
    _spec("bf16", 256, 0, 104),
    _spec("fp16", 64, LARGE, 104),
    *(_sum_spec("_sum_kernel", t) for t in ("fp32", "bf16")),
    _sum_spec("_sum_parts_kernel", "fp32"),
]
AOT_MORE = [] if triton is None else [  # what a launch may choose besides
    *(_spec(t, D, N, 255) for t in ("fp32", "bf16", "fp16") for D in (16, 32, 128, 1024) for N in (LARGE, 0)),
    _spec("fp16", 64, 0, 255),
    *(_spec("fp16", 256, N, 255) for N in (LARGE, 0)),
    *(_sum_spec("_sum_kernel", t, D, 96, n_codes="i32") for t in ("fp32", "bf16", "fp16") for D in (32, 128, 256)),
    *(_sum_spec("_sum_parts_kernel", "fp32", D, 96) for D in (32, 128, 256)),
]
