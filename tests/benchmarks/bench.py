"""One way to time every kernel: reference, fastest plain PyTorch, both compiled, and Triton, on the same inputs.

On a CPU the wall clock is right. On a GPU CUDA events are: they stand around each call, no call waits for the device, and the
L2 cache is flushed before each (triton.testing.do_bench). Gradients are handed over dense, as a network hands them over.
"""

import re
import statistics
import time
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", "plain", "compiled", "compiled reference", "triton")
SOURCE = {"compiled": "plain", "compiled reference": "reference"}  # what is compiled
PASSES = ("forward", "backward", "forward+backward")


def cases(names, table):
    """A test's cases; those in table are marked, for tests/benchmarks/table.py."""
    assert set(table) <= set(names)
    return pytest.mark.parametrize("case", [pytest.param(n, marks=[pytest.mark.table] if n in table else []) for n in names])


@lru_cache(maxsize=1)
def device_name():
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{model[1] if model else 'CPU'} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads"


@lru_cache(maxsize=1)
def bandwidth():
    """Bytes a second that the device's memory moves when 256 MiB are copied: the peak that percentages refer to."""
    x = torch.ones(1 << 26, device=DEVICE)
    y = torch.zeros_like(x)
    return 2 * x.numel() * x.element_size() / times(lambda: y.copy_(x))[1]


def count(benchmark, n, few=2):
    """n images, vectors or rows of a batch; where nothing is timed a few are enough to see that a case works."""
    return min(n, few) if benchmark.disabled and DEVICE == "cpu" else n


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def quantiles(seconds):
    """The quantiles 0.2, 0.5 and 0.8 of some times."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return [cuts[1], cuts[4], cuts[7]]


def times(call, least=0.5):
    """Seconds of a call at the quantiles 0.2, 0.5 and 0.8, of at least 5 calls and so many seconds of them."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return [ms / 1000 for ms in do_bench(call, rep=int(1000 * least), quantiles=[0.2, 0.5, 0.8])]
    call()
    seconds = []
    end = time.perf_counter() + least
    while len(seconds) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return quantiles(seconds)


def peak_bytes(f):
    """The most bytes that f() holds at once beyond what was there before, as the allocator of the device counts them."""
    if DEVICE == "cuda":
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        f()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def compiled(f):
    """f compiled for the shapes that it sees next, and for these alone.

    Without the reset, dynamo would make the sizes of the second shape dynamic, and after eight shapes run f as it is.
    """
    torch.compiler.reset()
    return torch.compile(f, dynamic=False)


def tensors(out):
    """The floating tensors among what a form returns, or all where none is floating."""
    out = out if isinstance(out, tuple) else (out,)
    return [y for y in out if y.is_floating_point()] or list(out)


def leaves(inputs, passes):
    """The inputs, detached; floating ones ask for gradients unless the pass is the forward one alone."""
    return [x.detach().requires_grad_(passes != "forward") if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in inputs]


def prepare(f, inputs, passes):
    """() -> outputs or gradients of one pass of f. What a training has before that pass is made here, once."""
    inputs = leaves(inputs, passes)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    if passes == "forward":
        return lambda: tensors(f(*inputs))
    y = [a for a in tensors(f(*inputs)) if a.requires_grad]
    generator = torch.Generator(DEVICE).manual_seed(1)
    dy = [torch.randn(a.shape, generator=generator, dtype=a.dtype, device=DEVICE) for a in y]  # the same for all forms
    dy = [torch.empty_like(a).copy_(d) for a, d in zip(y, dy, strict=True)]  # dense, in the layout of the output
    if passes == "backward":
        return lambda: torch.autograd.grad(y, wanted, dy, allow_unused=True, retain_graph=True)
    return lambda: torch.autograd.grad([a for a in tensors(f(*inputs)) if a.requires_grad], wanted, dy, allow_unused=True)


def check(got, want, tolerance):
    """Outputs or gradients within a share of each other and of the largest."""
    for a, b in zip(got, want, strict=True):
        if a is not None:
            atol = tolerance * b.double().abs().max().item()
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=atol)


def total(parts, passes):
    """Bytes or operations of a pass: its own, or those of forward and backward together."""
    return parts[passes] if passes in parts else parts["forward"] + parts["backward"]


def run(benchmark, group, impl, passes, forms, inputs, ideal, tolerance=1e-3, flops=None):
    """Time one implementation of a group, after checking it against the reference in the same run.

    forms: {"reference": f, "plain": f, "triton": f, ...}, each (*inputs) -> tensor or tuple whose floating tensors are
    differentiated. ideal: least bytes of the passes, {"forward": n, "backward": n}, or with a pass of one's own.
    flops: floating point operations of the same passes, where an operation is bound by these.
    """
    if impl == "triton" and DEVICE != "cuda":
        pytest.skip("needs a GPU: the interpreter is never timed")
    if impl == "compiled reference" and DEVICE != "cuda":
        pytest.skip("only on a GPU: a CPU runs the plain form")
    if benchmark.disabled and (impl in SOURCE or passes == "backward"):
        pytest.skip("only where it is timed")
    benchmark.group = f"{group}, {passes}"
    f = compiled(forms[SOURCE[impl]]) if impl in SOURCE else forms[impl]
    mode = kernels.mode
    kernels.mode = "triton" if impl == "triton" else "torch"
    try:
        start = time.perf_counter()
        call = prepare(f, inputs, passes)
        got = call()
        synchronize()
        first = time.perf_counter() - start
        check(got, prepare(forms["reference"], inputs, passes)(), tolerance)
        del got
        if benchmark.disabled:
            benchmark(call)
            return
        info = {"op": group, "pass": passes, "impl": impl, "device": device_name(), "torch": torch.__version__,
                "triton": getattr(kernels.triton, "__version__", None), "first_call_s": round(first, 3),
                "ideal_bytes": total(ideal, passes), "peak_mib": round(peak_bytes(call) / 2**20, 2)}
        if DEVICE == "cuda":
            p20, p50, p80 = times(call)
            benchmark.pedantic(lambda: (call(), synchronize()), rounds=20)  # the wall clock: the CPU's part of a call with it
        else:
            benchmark(call)
            p20, p50, p80 = quantiles(benchmark.stats.stats.data)
        info |= {"p20_ms": round(1e3 * p20, 5), "p50_ms": round(1e3 * p50, 5), "p80_ms": round(1e3 * p80, 5)}
        rate = info["ideal_bytes"] / p50
        info |= {"gb_s": round(rate / 1e9, 2), "percent_of_peak": round(100 * rate / bandwidth(), 1)}
        if flops and total(flops, passes):
            info["tflop_s"] = round(total(flops, passes) / p50 / 1e12, 4)
        benchmark.extra_info.update(info)
    finally:
        kernels.mode = mode
