"""One way to time every kernel: reference, fastest plain PyTorch, both compiled, and Triton, on the same inputs.

On a CPU the wall clock is right. On a GPU CUDA events are: they stand around each call, no call waits for the device, and the
L2 cache is flushed before each (triton.testing.do_bench). Gradients are handed over dense, as a network hands them over.
"""

import statistics
import time
from functools import lru_cache

import pytest
import torch

import kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ("reference", "plain", "compiled", "compiled reference", "triton")
PASSES = ("forward", "backward", "forward+backward")
QUANTILES = (0.2, 0.5, 0.8)


@lru_cache(maxsize=1)
def bandwidth():
    """Bytes a second that the device's memory moves when a tensor of 256 MiB is copied: the peak of the percentages."""
    x = torch.empty(1 << 26, device=DEVICE)
    seconds = times(lambda: x.clone())[1]
    return 2 * x.numel() * x.element_size() / seconds


def synchronize():
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def times(call, repeats=20):
    """Seconds of a call, at the quantiles 0.2, 0.5 and 0.8: by CUDA events on a GPU, by the wall clock elsewhere."""
    if DEVICE == "cuda":
        from triton.testing import do_bench

        return [ms / 1000 for ms in do_bench(call, quantiles=list(QUANTILES))]
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return [cuts[1], cuts[4], cuts[7]]


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
    for a, b in zip(got, want, strict=True):
        if a is not None:
            atol = tolerance * b.double().abs().max().item()
            torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=atol)


def run(benchmark, group, impl, passes, forms, inputs, ideal, tolerance=1e-3, flops=None):
    """Time one implementation of a group, after checking it against the reference in the same run.

    forms: {"reference": f, "plain": f, "triton": f, ...}, each (*inputs) -> tensor or tuple whose floating tensors are
    differentiated. ideal: least bytes of the passes, {"forward": n, "backward": n}, or with a pass of one's own.
    flops: the same of floating point operations, where an operation is bound by these.
    """
    if impl == "triton" and DEVICE != "cuda":
        pytest.skip("needs a GPU: the interpreter is never timed")
    if impl == "compiled reference" and DEVICE != "cuda":
        pytest.skip("on a CPU the compiled form is that of the plain one")
    if benchmark.disabled and (impl.startswith("compiled") or passes == "backward"):
        pytest.skip("only where it is timed")
    benchmark.group = f"{group}, {passes}"
    source = {"compiled": "plain", "compiled reference": "reference"}.get(impl, impl)
    f = compiled(forms[source]) if impl.startswith("compiled") else forms[impl]

    def total(parts):
        return parts.get(passes, sum(parts[p] for p in ("forward", "backward") if p in parts))

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
        info = {"op": group, "pass": passes, "impl": impl, "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
                "triton": getattr(kernels.triton, "__version__", None),
                "first_call_s": round(first, 4), "ideal_bytes": total(ideal), "peak_mib": round(peak_bytes(call) / 2**20, 2)}
        p20, p50, p80 = times(call)
        info |= {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80}
        info |= {"gb_s": total(ideal) / p50 / 1e9, "percent_of_peak": 100 * total(ideal) / p50 / bandwidth()}
        if flops:
            info["tflop_s"] = total(flops) / p50 / 1e12
        benchmark.extra_info.update(info)

        def timed():
            call()
            synchronize()

        benchmark(timed)
    finally:
        kernels.mode = mode
