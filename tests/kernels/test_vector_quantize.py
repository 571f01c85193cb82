"""nearest_code, straight_through, sum_by_code, sum_and_count: which code, ties, types, gradients; no N x K matrix is read."""

import pytest
import torch
from harness import (
    DEVICE,
    GRADIENTS,
    agree,
    assert_near,
    compilations,
    compiles,
    deterministic,
    gradcheck,
    leaves,
    nbytes,
    opcheck,
    traffic,
)

import kernels
from kernels import vector_quantize as module
from kernels.vector_quantize import (
    nearest_code,
    nearest_code_reference,
    nearest_code_torch,
    straight_through,
    sum_and_count,
    sum_by_code,
)

SHAPES = [(1, 1, 1), (37, 5, 7), (20, 33, 70), (65, 16, 130)]  # N, D, K
FORMS = {"triton": nearest_code, "plain": nearest_code_torch, "reference": nearest_code_reference}


@pytest.fixture
def large(monkeypatch):
    """The kernel's larger blocks, and the plain form's chunks so small that there are many."""
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(module, "CODES", 32)
    monkeypatch.setattr(module, "BUFFER", {"cpu": 32 * 9})


def inputs(N, D, K):
    return torch.randn(N, D, device=DEVICE), torch.randn(K, D, device=DEVICE)


def quantise(form=nearest_code):
    """What a decoder and the losses see of an implementation: both outputs, so that z and the codebook get gradients."""
    def f(z, codebook):
        z_q = form(z, codebook)[0]
        return straight_through(z, z_q), z_q
    return f


def brute_force(z, codebook):
    """Distances in float64 as they are defined, (N, K)."""
    return (z.double().reshape(-1, 1, z.shape[-1]) - codebook.double()).square().sum(2)


def assert_nearest(outputs, z, codebook):
    z_q, indices = outputs
    assert z_q.dtype == z.dtype and z_q.shape == z.shape and indices.dtype == torch.int64
    want = brute_force(z, codebook).argmin(1).view(z.shape[:-1])
    assert torch.equal(indices, want)
    if z.dtype == codebook.dtype or not kernels.INTERPRETING:
        assert torch.equal(z_q, codebook[want].to(z.dtype))
    torch.testing.assert_close(z_q, codebook[want].to(z.dtype), rtol=2**-7, atol=0)  # the interpreter cuts digits off


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_nearest_code(form, shape):
    z, codebook = inputs(*shape)
    assert_nearest(FORMS[form](z, codebook), z, codebook)


def test_the_reference_of_another_library():
    from scipy.spatial.distance import cdist

    z, codebook = inputs(50, 6, 20)
    want = torch.from_numpy(cdist(z.cpu().numpy(), codebook.cpu().numpy()).argmin(1)).to(DEVICE)
    assert torch.equal(nearest_code_reference(z, codebook)[1], want) and torch.equal(nearest_code(z, codebook)[1], want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("types", ["fp16", "bf16", "float64", "bf16 and fp32", "fp32 and bf16", "fp16 and bf16",
                                   "fp16 and float64"])
def test_the_nearest_code_in_other_types(large, form, types):
    names = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "float64": torch.float64}
    types = [names[t] for t in types.split(" and ")]
    z, codebook = (x.to(t) for x, t in zip(inputs(37, 20, 70), (types * 2)[:2], strict=True))
    assert_nearest(FORMS[form](z, codebook), z, codebook)


def test_bfloat16_has_the_codes_of_its_float32_copy():
    z, codebook = (x.bfloat16() for x in inputs(64, 32, 70))
    for half, single in zip(nearest_code(z, codebook), nearest_code(z.float(), codebook.float()), strict=True):
        assert torch.equal(half.float(), single.float())


@pytest.mark.parametrize("form", FORMS)
def test_what_tf32_and_bfloat16_do_not_tell_apart(form):
    """Numbers that differ in their last digits, in the codes and then in the vector; products of fewer digits fail.

    The reference, which adds |z|^2, has fewer digits left.
    """
    def digits(x, n):
        return x.view(torch.int32).bitwise_and(-1 << (24 - n)).view(torch.float32)

    order = torch.randperm(70, device=DEVICE)
    length = 1 + 2**-9 + order.float() * 2**-(15 if form == "reference" else 22)
    z, codebook = torch.full((1, 1), 4.0, device=DEVICE), length[:, None]
    assert FORMS[form](z, codebook)[1].tolist() == [order.argmax().item()] == brute_force(z, codebook).argmin(1).tolist()
    z2, codebook2 = length[None, :], 4 * torch.eye(70, device=DEVICE)
    assert FORMS[form](z2, codebook2)[1].tolist() == [order.argmax().item()] == brute_force(z2, codebook2).argmin(1).tolist()
    for n in (8, 11):
        assert (codebook.square().sum(1) - 2 * z @ digits(codebook, n).T).argmin() != order.argmax()
        assert (codebook2.square().sum(1) - 2 * digits(z2, n) @ codebook2.T).argmin() != order.argmax()


@pytest.mark.parametrize("form", FORMS)
def test_of_equal_codes_the_first(large, form):
    z, codebook = inputs(40, 7, 5)
    copies = codebook[torch.arange(90, device=DEVICE) % 5]
    z_q, indices = FORMS[form](z, copies)
    assert torch.equal(indices, brute_force(z, codebook).argmin(1))
    assert torch.equal(z_q, codebook[indices]) and indices.max() < 5
    assert FORMS[form](z, torch.ones_like(copies))[1].sum() == 0


@pytest.mark.filterwarnings("ignore:invalid value")  # of the interpreter's arithmetic
@pytest.mark.parametrize("form", ["triton", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_never_wins(large, form, dtype):
    z, codebook = (x.to(dtype) for x in inputs(12, 9, 70))
    codebook[[0, 3, 40]] = torch.tensor([[float("nan")], [float("inf")], [-float("inf")]], device=DEVICE, dtype=dtype)
    codebook[5, 2], codebook[6, 0] = float("nan"), 1e30  # whose square overflows
    z[0], z[1, 4], z[2], z[3, 8], z[4, 0] = 0, float("nan"), float("inf"), -float("inf"), float("inf")
    usable = torch.ones(70, dtype=torch.bool, device=DEVICE)
    usable[[0, 3, 5, 6, 40]] = False
    want = brute_force(z, codebook).masked_fill(~usable, float("inf")).argmin(1)
    want[1:5] = 0
    z_q, indices = FORMS[form](z, codebook)
    assert torch.equal(indices, want)
    assert FORMS[form](z, torch.full_like(codebook, float("nan")))[1].sum() == 0
    finite = torch.randn(64, 9, device=DEVICE).to(dtype)
    finite[0, 0], finite[0, 8] = -1, 1  # so that its products with those infinities are not the lowest
    want = brute_force(z, finite).argmin(1)
    want[1:5] = 0
    assert torch.equal(FORMS[form](z, finite)[1], want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_small_and_large_numbers(form, scale):
    z, codebook = (x * scale for x in inputs(20, 16, 7))
    assert_nearest(FORMS[form](z, codebook), z, codebook)


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_images_and_slices(form):
    """z (B, H, W, C) as it comes from a (B, C, H, W) network, every other code of a codebook, one vector alone."""
    z = torch.randn(2, 6, 3, 4, device=DEVICE).permute(0, 2, 3, 1)
    codebook = torch.randn(12, 40, device=DEVICE)[::2, ::2][:, 3:9]
    assert not z.is_contiguous() and not codebook.is_contiguous()
    for x in (z, z[:, ::2], z[0, 1, 2]):
        assert_nearest(FORMS[form](x, codebook), x, codebook)
    agree(quantise(FORMS[form]), quantise(nearest_code_reference), (z, codebook))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_values_and_gradients(shape):
    agree(quantise(), quantise(nearest_code_reference), inputs(*shape))


def test_values_and_gradients_of_large_blocks(large):
    agree(quantise(), quantise(nearest_code_reference), inputs(70, 33, 20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types(dtype):
    agree(quantise(), quantise(nearest_code_reference), inputs(*SHAPES[1]), dtype)
    agree(quantise(nearest_code_torch), quantise(nearest_code_reference), inputs(*SHAPES[1]), dtype)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradients_of_any_stride(gradient):
    agree(quantise(), quantise(nearest_code_reference), inputs(*SHAPES[1]), gradient=gradient)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    """Of z_q, index_add to the codebook and none to z; of straight_through, the identity to z and none to the codebook."""
    z, codebook = leaves(inputs(37, 6, 5))
    z_q, indices = FORMS[form](z, codebook)
    assert not indices.requires_grad
    dy = torch.randn_like(z)
    dz, dcodebook = torch.autograd.grad(z_q, (z, codebook), dy, retain_graph=True, allow_unused=True)
    assert dz is None
    torch.testing.assert_close(dcodebook, torch.zeros_like(codebook).index_add(0, indices, dy))
    y = straight_through(z, z_q)
    dz, dcodebook = torch.autograd.grad(y, (z, codebook), dy, allow_unused=True)
    assert torch.equal(y, z_q) and torch.equal(dz, dy) and dcodebook is None


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_a_bfloat16_codebook_gathers_its_gradient_in_float32(form):
    """Of 768 vectors with gradient 1 each; added up in bfloat16 it would stop at 256."""
    z, codebook = torch.zeros(768, 1, device=DEVICE).bfloat16(), torch.ones(1, 1, device=DEVICE).bfloat16().requires_grad_()
    FORMS[form](z, codebook)[0].sum().backward()
    assert codebook.grad.item() == 768


def test_a_second_derivative():
    """The gradient to the codebook is linear in that of z_q, and differentiable in it."""
    z, codebook = inputs(3, 2, 2)
    codebook = codebook.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda c: nearest_code(z.double(), c)[0].square(), (codebook,))


def test_losses_of_a_vector_quantiser():
    """The codebook loss moves codes only, the commitment loss vectors only, to the mean of the vectors of each code."""
    z, codebook = leaves(inputs(50, 4, 3))
    z_q, indices = nearest_code(z, codebook)
    ((z.detach() - z_q).square().sum() / 2 + 0.25 * (z - z_q.detach()).square().sum() / 2).backward()
    torch.testing.assert_close(z.grad, 0.25 * (z - z_q).detach())
    counts = torch.bincount(indices, minlength=3)
    step = codebook.detach() - codebook.grad / counts[:, None]
    torch.testing.assert_close(step, torch.stack([z.detach()[indices == k].mean(0) for k in range(3)]))
    torch.testing.assert_close(step, sum_by_code(z.detach(), indices, 3) / counts[:, None])


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_sum_by_code(mode, monkeypatch):
    monkeypatch.setattr(kernels, "mode", mode)
    x, indices = torch.randn(5, 9, 3, device=DEVICE).transpose(0, 1), torch.randint(0, 4, (9, 5), device=DEVICE)
    want = torch.zeros(6, 3, device=DEVICE).index_add(0, indices.reshape(-1), x.reshape(-1, 3))
    torch.testing.assert_close(sum_by_code(x, indices, 6), want)
    assert sum_by_code(x.bfloat16(), indices, 6).dtype == torch.float32
    assert torch.equal(sum_by_code(x[:0], indices[:0], 6), torch.zeros_like(want))


TAKEN = {  # codes taken of 20 by N vectors
    "one": lambda N: torch.full((N,), 7),
    "the last": lambda N: torch.full((N,), 19),
    "two, of which one seldom": lambda N: torch.where(torch.arange(N) % 50 == 3, 2, 11),
    "few": lambda N: torch.tensor([0, 3, 4, 19])[torch.randint(0, 4, (N,))],
    "all": lambda N: torch.randint(0, 20, (N,)),
}


@pytest.mark.parametrize("taken", TAKEN)
@pytest.mark.parametrize("chunk", [4, 64])
@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_sums_and_counts_of_a_collapsed_codebook(mode, chunk, taken, monkeypatch):
    """Against one-hot products in float64; counts exactly; however a code's rows fall into chunks; the same bits twice."""
    monkeypatch.setattr(kernels, "mode", mode)
    monkeypatch.setattr(module, "CHUNK", chunk)
    for N in (1, 63, 64, 65, 250):
        x = torch.randn(N, 5, device=DEVICE)
        indices = TAKEN[taken](N).to(DEVICE)
        one_hot = torch.nn.functional.one_hot(indices, 20)
        sums, counts = sum_and_count(x, indices, 20)
        assert_near(sums, one_hot.double().T @ x.double(), 1e-6)
        assert counts.dtype == torch.int64 and torch.equal(counts, one_hot.sum(0))
        assert torch.equal(sums, sum_by_code(x, indices, 20)) and torch.equal(sums, sum_and_count(x, indices, 20)[0])


def test_counts_of_other_devices(monkeypatch):
    """Where the plain form is not on the CPU it counts by a sort."""
    indices = torch.randint(0, 6, (40,), device=DEVICE)
    want = torch.bincount(indices.cpu(), minlength=9)
    assert torch.equal(module._count_torch(indices, 9).cpu(), want)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert torch.equal(module._count_torch(indices, 9).cpu(), want)


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("taken", ["one", "all"])
@pytest.mark.parametrize("N, chunk", [(600, 64), (5000, 64), (600, 256)])
def test_no_program_adds_more_than_a_chunk(N, chunk, taken, monkeypatch):
    """Of rows, and then of sums of rows, also where all vectors took one code; together they read each row once."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    assert (most := module._chunk(N)) >= chunk and most**2 >= N and (most == chunk or most**2 < 4 * N)
    launches = []
    launch = module.launch

    def counted(*args, **constants):
        with traffic() as moved:
            launch(*args, **constants)
        launches.append(moved)

    monkeypatch.setattr(module, "launch", counted)
    x = torch.randn(N, 3, device=DEVICE)
    indices = TAKEN[taken](N)
    sums, _ = sum_and_count(x, indices, 20)
    assert_near(sums, torch.zeros(20, 3).double().index_add_(0, indices, x.double()), 1e-6)
    row = 3 * 4  # bytes
    other = 5 * 8  # of starts, a code, and sums so far
    assert launches[0].most <= most * (row + 8) + other and N * (row + 8) <= launches[0].read
    assert len(launches) == (2 if N > most else 1) and all(moved.most <= most * row + other for moved in launches[1:])


@pytest.mark.parametrize("form", FORMS)
def test_nothing_in_nothing_out(form):
    z, codebook = leaves(inputs(0, 4, 3))
    z_q, indices = FORMS[form](z, codebook)
    assert z_q.shape == (0, 4) and indices.shape == (0,)
    (z_q.sum() + straight_through(z, z_q).sum()).backward()
    assert z.grad.shape == (0, 4) and torch.equal(codebook.grad, torch.zeros_like(codebook))


@pytest.mark.parametrize("z, codebook", [((4, 3), (5, 2)), ((4, 3), (3,)), ((), (5, 1)), ((4, 3), (0, 3)), ((4, 0), (5, 0))])
def test_shapes_that_do_not_fit(z, codebook):
    with pytest.raises(ValueError, match="does not fit"):
        nearest_code(torch.zeros(z), torch.zeros(codebook))


def test_other_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match="floating"):
        nearest_code(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(5, 3))
    with pytest.raises(ValueError, match="differ"):
        straight_through(torch.zeros(4, 3), torch.zeros(4, 1))
    with pytest.raises(ValueError, match="do not fit"):
        sum_by_code(torch.zeros(4, 3), torch.zeros(3, dtype=torch.int64), 5)


def test_gradcheck():
    z, codebook = inputs(7, 3, 4)
    gradcheck(lambda c: nearest_code(z.double(), c)[0], (codebook,))


def test_as_a_custom_operator():
    z, codebook = inputs(20, 5, 7)
    opcheck(module._nearest.operator, (z, codebook))
    opcheck(module._search.operator, (z, codebook))
    opcheck(module._sum.operator, (z, torch.randint(0, 3, (20,), device=DEVICE), 3))


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_compiles(form):
    compiles(quantise(FORMS[form]), inputs(20, 5, 7))


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_deterministic(form):
    deterministic(quantise(FORMS[form]), inputs(50, 5, 4))


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limit, block", [(1 << 14, 16), (0, 64)])
def test_bytes(dtype, limit, block, monkeypatch):
    monkeypatch.setattr(module, "LARGE", limit)
    z, codebook = (x.to(dtype) for x in inputs(256, 16, 128))
    norms, parts = 4 * len(codebook), 1.5 if dtype == torch.float32 else 1  # three bfloat16 for a float32
    with traffic() as moved:
        z_q, indices = module._nearest(z, codebook)
    least = nbytes(z, z_q, indices) + 256 // block * (parts * nbytes(codebook) + norms) + nbytes(z_q)  # by design; chosen rows
    assert least <= moved.total <= 1.05 * least
    with traffic() as moved:
        sums, _ = module._sum(z, indices, 8)  # few codes, and none used past them
    starts = 2 * 8 * 8
    least = nbytes(z[indices < 8], indices[indices < 8], sums) + starts
    assert least <= moved.total <= 1.05 * least


def test_the_vectors_are_read_again_where_rows_are_long():
    """Once and once more for every 64 codes."""
    if not kernels.INTERPRETING:
        pytest.skip("bytes are counted in the interpreter")
    z, codebook = inputs(16, 32, 128)
    with traffic() as moved:
        z_q, indices = module._nearest(z, codebook)
    least = 2 * nbytes(z) + nbytes(z_q, indices) + 1.5 * nbytes(codebook) + 4 * 128 + nbytes(z_q)
    assert least <= moved.total <= least + nbytes(z) * 16 // 32  # what the first block of each row was read for


@pytest.mark.parametrize("form", ["triton", "plain"])
def test_precision_settings_and_autocast_change_nothing(form, monkeypatch):
    z, codebook = inputs(20, 16, 7)
    want, seen, addmm, cuda = FORMS[form](z, codebook), [], torch.addmm, torch.backends.cuda.matmul
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: (seen.append(cuda.fp32_precision), addmm(*a, **k))[1])
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(DEVICE, torch.bfloat16):
            got = FORMS[form](z, codebook)
        assert torch.get_float32_matmul_precision() == "medium" and set(seen) <= {"ieee"} and (form == "triton") == (not seen)
    finally:
        torch.set_float32_matmul_precision("highest")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_the_plain_form_is_the_reference(large):
    agree(quantise(nearest_code_torch), quantise(nearest_code_reference), inputs(65, 9, 130))
    agree(quantise(nearest_code_torch), quantise(nearest_code_reference), inputs(65, 9, 130), torch.float64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("mode", ["torch", "triton"])
def test_backend_stands_in_for_the_mode(mode, backend, monkeypatch):
    launched = []
    launch = module.launch

    def counted(kernel, *args, **more):
        launched.append(kernel)
        launch(kernel, *args, **more)

    monkeypatch.setattr(module, "launch", counted)
    monkeypatch.setattr(kernels, "mode", mode)
    z, codebook = torch.randn(20, 5, device=DEVICE), torch.randn(7, 5, device=DEVICE)
    z_q, indices = nearest_code(z, codebook, backend=backend)
    sums = sum_by_code(z, indices, 7, backend=backend)
    assert len(launched) == (2 if backend == "triton" else 0)
    torch.testing.assert_close(sums, torch.zeros(7, 5, device=DEVICE).index_add_(0, indices, z))
    torch.testing.assert_close(z_q, codebook[indices])


def test_few_compilations_for_many_sizes(monkeypatch):
    with compilations(module, monkeypatch) as keys:
        for n in range(10, 110, 10):
            nearest_code(torch.randn(n, 8, device=DEVICE), torch.randn(16 + n, 8, device=DEVICE))
    assert len(keys) <= 4, keys
