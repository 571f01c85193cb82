"""decode_attention, one share of the cache and several."""

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, TOLERANCE, assert_near, compilations, nbytes, traffic
from torch._dynamo.testing import CompileCounter

import kernels
from kernels import decode_attention as module
from kernels.attention import attention
from kernels.decode_attention import decode_attention, decode_attention_reference, decode_attention_torch


def cache(T=300, head_dim=16, n_head=2, dtype=torch.float32, n_head_kv=None):
    sizes = (n_head, 1), (n_head_kv or n_head, T), (n_head_kv or n_head, T)
    q, k, v = (torch.randn(2, *size, head_dim, device=DEVICE).to(dtype) for size in sizes)
    return q, k, v


def lengths(length):
    """A length as it may be given: a number, and one element on the device."""
    return [length, *(torch.tensor(x, dtype=kind, device=DEVICE) for x in (length, [length])
                      for kind in (torch.int32, torch.int64))]


@pytest.mark.parametrize("n_head, n_head_kv, dtype", [(1, 1, torch.float32), (4, 2, torch.float32), (3, 1, torch.float16)])
@pytest.mark.parametrize("chunk", [256, 64])
@pytest.mark.parametrize("length", [0, 1, 49, 256, 300])
def test_decode(length, chunk, n_head, n_head_kv, dtype, monkeypatch):
    """One share and several, of which the last are empty at times; keys of a head's own, and shared, of both kernels."""
    monkeypatch.setattr(module, "DECODE_CHUNK", chunk)
    q, k, v = cache(300, 64, n_head, dtype, n_head_kv)
    k[:, :, length:] = float("nan")  # not yet written
    v[:, :, length:] = float("nan")
    want = decode_attention_reference(q.double(), k.double(), v.double(), length, 0.2)
    for given in lengths(length)[:2]:  # all of them give the same bits, below
        assert_near(decode_attention(q, k, v, given, scale=0.2), want, TOLERANCE[dtype])
        assert_near(decode_attention_torch(q, k, v, given, 0.2), want, TOLERANCE[dtype])


def test_a_length_on_the_device_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", 64)
    for n_head, dtype in ((1, torch.float32), (4, torch.float16)):
        q, k, v = cache(300, 64, n_head, dtype, 1)
        for length in (1, 130, 300):
            first, *rest = (decode_attention(q, k, v, given) for given in lengths(length))
            assert all(torch.equal(first, y) for y in rest)


def test_a_length_on_the_device_beyond_the_cache():
    """Counts as the nearest inside: nothing outside is read."""
    q, k, v = cache(40)
    for length, inside in ((-3, 0), (41, 40), (2**31 - 1, 40)):
        given = torch.tensor(length, device=DEVICE)
        for y in (decode_attention(q, k, v, given), decode_attention_torch(q, k, v, given)):
            assert_near(y, decode_attention_reference(q, k, v, inside), 2e-5)


@pytest.mark.parametrize("size, dtype", [((2,), torch.int64), ((1,), torch.float32), ((), torch.int16)])
def test_a_length_that_is_none(size, dtype):
    with pytest.raises(ValueError, match="must be one int32 or int64"):
        decode_attention(*cache(5), torch.ones(size, dtype=dtype, device=DEVICE))


def test_what_is_launched_does_not_follow_from_the_length(monkeypatch):
    """So that a captured loop stays right: the same launches, on the same tensor that holds the length."""
    monkeypatch.setattr(module, "DECODE_CHUNK", 64)
    launches = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, n, *args, **constants: (
        launches.append((kernel, n, [a for a in args if not isinstance(a, torch.Tensor)], str(constants))),
        launch(kernel, n, *args, **constants)))
    q, k, v = cache(300, 64, 2, torch.float16, 1)
    for length in (0, 5, 300):
        decode_attention(q, k, v, torch.tensor(length, device=DEVICE))
    assert len(launches) == 6 and launches[:2] == launches[2:4] == launches[4:]


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_loop_in_a_cuda_graph():
    q, k, v = cache(1024, 64, 4)
    length = torch.ones((), dtype=torch.int64, device=DEVICE)
    decode_attention(q, k, v, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(q, k, v, length)
    for n in (1, 300, 1024):
        length.fill_(n)
        graph.replay()
        assert_near(y, decode_attention_reference(q.double(), k.double(), v.double(), n), 2e-5)


@pytest.mark.parametrize("n_head_kv", [1, 4])
def test_few_compilations(n_head_kv, monkeypatch):
    """Of every length of a loop, given either way, and of ten sizes of the cache; the kernels do not run here."""
    monkeypatch.setattr(module, "launch", lambda *args, **constants: None)
    with compilations(module, monkeypatch) as of_lengths:
        x = cache(900, 32, 4, torch.float16, n_head_kv)
        for length in range(1, 901):
            decode_attention(*x, length)
            decode_attention(*x, torch.tensor(length, device=DEVICE))
    with compilations(module, monkeypatch) as of_caches:
        for T in (49, 64, 100, 196, 256, 400, 576, 784, 1024, 4096):
            decode_attention(*cache(T, 32, 4, torch.float16, n_head_kv), torch.tensor(7, device=DEVICE))
    for keys in (of_lengths, of_caches):
        names = [name for name, _ in keys]
        assert names and all(names.count(name) <= 4 for name in names), names


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("types", ["fff", "hff", "fhh", "bhf", "ddd"])
@pytest.mark.parametrize("n_head", [1, 4])
def test_autocast(n_head, types, kind):
    """The result has the type that the plain form gives it, and is near float64's, of one head a head of keys and of four."""
    names = {"f": torch.float32, "h": torch.float16, "b": torch.bfloat16, "d": torch.float64}
    q, k, v = (x.to(names[name]) for x, name in zip(cache(70, 32, n_head, torch.float32, 1), types, strict=True))
    want = decode_attention_reference(q.double(), k.double(), v.double(), 60)
    for given in lengths(60)[:2]:
        for mode in ("torch", "triton"):
            with torch.autocast(DEVICE, kind):
                y = decode_attention(q, k, v, given, backend=mode)
            assert y.dtype == (torch.float64 if types == "ddd" else kind)
            assert_near(y, want, 1e-6 if types == "ddd" else TOLERANCE[torch.bfloat16])


def test_types_that_differ_need_autocast():
    q, k, v = cache(9)
    for mode in ("torch", "triton"):
        with pytest.raises(RuntimeError):
            decode_attention(q, k.bfloat16(), v.bfloat16(), 5, backend=mode)


def test_the_backend_of_a_call(monkeypatch):
    launches = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *args, **constants: launches.append(args[0]) or launch(*args, **constants))
    x = cache(9)
    for mode, backend, count in (("triton", "torch", 0), ("torch", "triton", 1), ("torch", None, 0), ("triton", None, 1)):
        monkeypatch.setattr(kernels, "mode", mode)
        launches.clear()
        assert_near(decode_attention(*x, 7, backend=backend), decode_attention_reference(*x, 7), 1e-5)
        assert len(launches) == count
    with pytest.raises(ValueError, match="must be one of auto, torch, triton"):
        decode_attention(*x, 7, backend="cuda")


@pytest.mark.parametrize("n_head", [1, 2])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-11)])
def test_decode_types(dtype, tolerance, n_head, monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", 32)
    q, k, v = cache(100, 80, n_head, dtype, 1)
    want = decode_attention_reference(q.double(), k.double(), v.double(), 100, 0.3)
    y = decode_attention(q, k, v, 100, scale=0.3)
    assert y.dtype == dtype
    assert_near(y, want, tolerance)


def test_decode_of_an_empty_cache():
    q, k, v = cache(5)
    for f in (decode_attention, decode_attention_torch):
        y = f(q, k * float("nan"), v * float("nan"), 0)
        assert y.shape == q.shape and (y == 0).all()


def test_decode_of_strided_caches_and_huge_scores():
    """A cache that lies (B, T, n_head, head_dim), a q from a permuted layer, scores of some thousands."""
    q, k, v = cache(60)
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    q = q.transpose(-1, -2).contiguous().transpose(-1, -2) * 3000
    assert_near(decode_attention(q, k, v, 60), decode_attention_reference(q.double(), k.double(), v.double(), 60), 1e-3)
    k = torch.randn(2, 2, 16, 60, device=DEVICE).transpose(2, 3)
    assert_near(decode_attention(q, k, v, 9), decode_attention_reference(q.double(), k.double(), v.double(), 9), 1e-3)


def test_decode_is_the_last_row_of_causal():
    q, k, v = torch.randn(3, 1, 2, 20, 16, device=DEVICE)
    assert_near(decode_attention(q[:, :, -1:], k, v, 20), attention(q, k, v, "causal")[:, :, -1:], 1e-5)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_reference_is_pytorchs(scale):
    q, k, v = (x.double() for x in cache(9, 16, 4, torch.float32, 2))
    want = F.scaled_dot_product_attention(q, k[:, :, :7], v[:, :, :7], scale=scale, enable_gqa=True)
    torch.testing.assert_close(decode_attention_reference(q, k, v, 7, scale), want)


def test_decode_says_that_it_has_no_gradients(monkeypatch):
    q, k, v = cache(5)
    q.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradients"):
        decode_attention(q, k, v, 5)
    with torch.no_grad():
        assert not decode_attention(q, k, v, 5).requires_grad
    monkeypatch.setattr(kernels, "mode", "auto")
    for length in (0, 5):
        (gradient,) = torch.autograd.grad(decode_attention(q, k, v, length).sum(), q)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("length", [-1, 6])
def test_decode_of_what_does_not_fit(length):
    q, k, v = cache(5)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q, k, v, length)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(k, k, v, 3)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(q[:1], k, v, 3)
    with pytest.raises(ValueError, match="do not fit"):
        decode_attention(torch.zeros(2, 3, 1, 16, device=DEVICE), k, v, 3)
    with pytest.raises(RuntimeError, match="more than 32"):
        decode_attention(torch.zeros(2, 66, 1, 16, device=DEVICE), k, v, 3)


@pytest.mark.parametrize("n_head, dtype", [(1, torch.float32), (2, torch.float16)])
def test_decode_as_a_custom_operator(n_head, dtype, monkeypatch):
    monkeypatch.setattr(module, "DECODE_CHUNK", 256)
    q, k, v = cache(600, 32, n_head, dtype, 1)
    length = torch.tensor(600, device=DEVICE)
    torch.library.opcheck(module._decode.operator, (q, k, v, None, 600, 0.2))
    torch.library.opcheck(module._decode.operator, (q, k, v, length, 600, 0.2))
    assert torch.equal(module._decode(q, k, v, None, 600, 0.2), module._decode(q, k, v, None, 600, 0.2))


def test_decode_compiles():
    """Whole, of a length on the device too, which no step waits for; the next length takes the same code."""
    q, k, v = cache(40, 32, 2)
    torch.compiler.reset()
    for mode in kernels.MODES:
        frames = CompileCounter()
        step = torch.compile(lambda q, k, v, n, mode=mode: decode_attention(q * 2, k, v, n, backend=mode).sin(),
                             fullgraph=True, backend=frames)
        for n in (3, 40):
            length = torch.tensor(n, device=DEVICE)
            torch.testing.assert_close(step(q, k, v, length), decode_attention(q * 2, k, v, n).sin())
        assert frames.frame_count == 1
        torch.testing.assert_close(step(q, k, v, 7), decode_attention(q * 2, k, v, 7).sin())


@pytest.mark.skipif(not kernels.INTERPRETING, reason="bytes are counted in the interpreter")
@pytest.mark.parametrize("n_head, dtype", [(1, torch.float32), (4, torch.float16)])
@pytest.mark.parametrize("length", [200, 1024])
def test_decode_bytes(length, n_head, dtype):
    """Keys and values once, for all heads that share them; q once a share, whose result is written and read."""
    q, k, v = cache(1024, 64, n_head, dtype, 1)
    with traffic() as moved:
        module._decode(q, k, v, None, length, 0.125)
    least = nbytes(k[:, :, :length], v[:, :, :length], q, q)
    shares = 4
    assert moved.total == least + (shares - 1) * nbytes(q) + 2 * n_head * shares * (64 + 1) * 4 * 2
    assert n_head > 1 or moved.total <= 1.03 * least


def test_the_size_from_which_the_kernel_is_taken(monkeypatch):
    """In mode "auto" a length on the device asks for it at any size."""
    asked = []
    monkeypatch.setattr(module, "use_triton", lambda *rest, least, backend: asked.append(least))
    for given in lengths(3):
        decode_attention(*cache(5), given)
    assert asked == [module.LEAST, 0, 0, 0, 0]


@pytest.mark.skipif(DEVICE != "cpu", reason="the CPU's libraries")
def test_on_a_cpu_it_goes_by_mkl(monkeypatch):
    """Where float32 products go by oneDNN, which is slow for one position; the setting is put back."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    seen = []

    def watched(*args, plain=F.scaled_dot_product_attention, **options):
        seen.append(settings.fp32_precision)
        return plain(*args, **options)

    monkeypatch.setattr(module.F, "scaled_dot_product_attention", watched)
    try:
        settings.fp32_precision = "bf16"
        decode_attention_torch(*cache(), 40)
        assert seen == ["ieee"] and settings.fp32_precision == "bf16"
    finally:
        settings.fp32_precision = before
