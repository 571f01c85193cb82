"""kernels.mode, kernels.report() and an import on machines that have no triton."""

import importlib
import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import DEVICE

import kernels
import kernels.decode_attention
from kernels.attention import attention
from kernels.group_norm import group_norm_silu
from kernels.masked_conv import gated_masked_conv2d, masked_conv2d

ROOT = Path(__file__).resolve().parents[2]
INPUTS = torch.randn(2, 4, 3, 3, device=DEVICE), 2, torch.ones(4, device=DEVICE), torch.zeros(4, device=DEVICE)


def python(code, **env):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "M2_KERNELS")} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


def test_auto_falls_back_and_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "auto")
    kernels.fallbacks.clear()
    group_norm_silu(*INPUTS)
    group_norm_silu(*INPUTS)
    line = next(line for line in kernels.report().splitlines() if line.startswith("group_norm_silu"))
    assert "torch" in line and "fell back 2 x" in line
    assert len(kernels.report().splitlines()) == len(kernels.OPS)


def test_auto_leaves_to_the_library_what_the_report_says(monkeypatch):
    """As on a machine with a GPU: no kernel for masked convolutions and attention without a bias, one for all else."""
    monkeypatch.setattr(kernels, "mode", "auto")
    monkeypatch.setattr(kernels, "INTERPRETING", False)
    monkeypatch.setattr(kernels, "available", lambda device=None: (True, "triton 1 on a GPU"))
    for op in ("masked_conv2d", "gated_masked_conv2d", "attention"):
        monkeypatch.setattr(importlib.import_module(f"kernels.{kernels.OPS[op]}"), "_fwd", None)
        assert not kernels.use_triton(op, INPUTS[0], lambda: (True, ""), library=True)
    masked_conv2d(INPUTS[0], torch.ones(2, 4, 3, 3))
    gated_masked_conv2d(INPUTS[0], torch.ones(2, 4, 3, 3))
    attention(*torch.randn(3, 1, 1, 4, 16))
    attention(*torch.randn(3, 4, 8, 64, 32), mask="strict")
    attention(*torch.randn(3, 1, 1, 4, 16), torch.zeros(1, 3, 3))  # too small for a launch
    with pytest.raises(TypeError):  # _fwd is None
        attention(*torch.randn(3, 4, 8, 64, 32), torch.zeros(8, 15, 15))
    kernels.decode_attention.decode_attention(*torch.randn(3, 0, 2, 1, 16), 1)  # nothing to launch for
    runs = {line.split()[0]: line for line in kernels.report().splitlines()}
    for op, line in runs.items():
        assert line.split()[1] == ("torch" if op in ("masked_conv2d", "gated_masked_conv2d") else "triton")
        assert ("PyTorch's own" in line) == (op in kernels.LIBRARY)


def test_torch_mode_never_runs_a_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    assert not kernels.use_triton("group_norm_silu", INPUTS[0], lambda: (True, ""))
    assert "kernels.mode is 'torch'" in kernels.report()


def test_unknown_mode(monkeypatch):
    monkeypatch.setattr(kernels, "mode", "cuda")
    with pytest.raises(ValueError, match="must be one of auto, torch, triton"):
        group_norm_silu(*INPUTS)


def test_triton_mode_says_why_it_cannot():
    """Wrong types anywhere; and, where there is no GPU and no interpreter, the machine."""
    with pytest.raises(RuntimeError, match="group_norm_silu: kernels.mode is 'triton', but x is torch.int32"):
        group_norm_silu(INPUTS[0].int(), *INPUTS[1:])
    if not torch.cuda.is_available():
        code = "import torch; from kernels.group_norm import group_norm_silu as g; g(torch.ones(1, 2), 1, *torch.ones(2, 2))"
        done = python(code, M2_KERNELS="triton")
        assert done.returncode and "but no CUDA device: tensors on cpu" in done.stderr


@pytest.mark.parametrize("mode", ["auto", "triton"])
def test_without_triton(mode):
    """macOS and Windows: all files import, auto computes, triton gives the reason, the report too."""
    files = [p.stem for p in (ROOT / "kernels").glob("*.py") if p.stem != "__init__"]
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels\n"
            + "".join(f"import kernels.{f}\nassert getattr(kernels.{f}, 'AOT_SPECS', []) == []\n" for f in files)
            + "print(kernels.report())\nprint(kernels.group_norm.group_norm_silu(torch.ones(1, 2), 1, *torch.ones(2, 2)))")
    done = python(code, M2_KERNELS=mode)
    assert "triton is not installed" in done.stdout, done.stderr
    if mode == "auto":
        assert done.returncode == 0 and "tensor" in done.stdout
    else:
        assert "RuntimeError: group_norm_silu: kernels.mode is 'triton', but triton is not installed" in done.stderr


@pytest.mark.parametrize("file", sorted({"__init__", "modules", *kernels.OPS.values()}))
def test_what_others_call_has_type_hints(file):
    """Every parameter and result of the operations, their references and plain forms, and what says what runs."""
    module = importlib.import_module("kernels" if file == "__init__" else f"kernels.{file}")
    if file == "__init__":
        functions = [module.available, module.choose, module.report, module.processors, module.use_triton]
    elif file == "modules":
        functions = [getattr(module, name).forward for name in module.__all__]
    else:
        functions = [getattr(module, name) for name, f in vars(module).items() if inspect.isfunction(f)
                     and f.__module__ == module.__name__ and (name[0] != "_" or name.endswith(("_torch", "_reference")))]
        assert module.supports in functions and len(functions) >= 4
    for function in functions:
        function = inspect.unwrap(function)
        signature = inspect.signature(function)
        bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
        assert not bare and signature.return_annotation is not signature.empty, function.__qualname__


def test_the_report_names_every_operation():
    for op, file in kernels.OPS.items():
        assert f"def {op}(" in (ROOT / "kernels" / f"{file}.py").read_text()


@pytest.mark.skipif(kernels.INTERPRETING or not torch.cuda.is_available(), reason="the interpreter runs here already")
def test_in_the_interpreter_as_well():
    """Where there is a GPU these tests run on it; here they run once more in the interpreter."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", Path(__file__).parent], cwd=ROOT,
                          env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    x = torch.randn(2, 4, 3, 3, device="cuda:1")
    y = group_norm_silu(x, 2, torch.ones(4, device="cuda:1"), torch.zeros(4, device="cuda:1"))
    assert y.device == x.device and y.isfinite().all()


def test_samples_too_large_for_offsets_in_int32():
    """Such a call is left to PyTorch in auto, and refused in triton: never silent garbage. Nothing is allocated here."""
    one, huge = torch.zeros(1), 2**31
    for name, inputs in {
        "group_norm": (one.expand(1, 2, huge // 2), 1, one.expand(2), one.expand(2)),
        "coupling": (one.expand(1, 2), one.expand(1, huge)),
        "logistic_mixture": (one.expand(1, 1, huge // 4, 2), one.expand(1, 3, huge // 4, 2)),
        "masked_conv": (one.expand(1, 1, huge // 4, 4), one.expand(1, 1, 3, 3), None),
        "bias_act": (one.expand(huge, 1), one),
    }.items():
        fits, why = importlib.import_module(f"kernels.{name}").supports(*inputs)
        assert not fits and "2^3" in why, name


@pytest.mark.parametrize("mode", kernels.MODES)
def test_choose_sets_the_mode_where_it_can_run(mode, monkeypatch):
    monkeypatch.setattr(kernels, "mode", "auto")
    monkeypatch.setattr(kernels, "available", lambda kind: (kind == "cuda", "no CUDA device"))
    kernels.choose(mode, "cuda")
    assert kernels.mode == mode


@pytest.mark.parametrize("mode, words", [("triton", ["'triton'", "no CUDA device"]),
                                         ("cutlass", ["cutlass", "auto, torch or triton"])])
def test_choose_refuses_what_cannot_run(mode, words, monkeypatch):
    monkeypatch.setattr(kernels, "mode", "torch")
    monkeypatch.setattr(kernels, "available", lambda kind: (False, "no CUDA device"))
    with pytest.raises(RuntimeError) as e:
        kernels.choose(mode, "cpu")
    assert all(word in str(e.value) for word in words) and kernels.mode == "torch"


def test_importing_does_not_import_the_compiler():
    """It takes more than a second; a compiled function takes the answer of available() as a constant all the same."""
    done = python("import sys, kernels.attention, kernels.group_norm; print('torch._dynamo' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    compiled = torch.compile(lambda x: x + kernels.available("cpu")[0], backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), float(kernels.available("cpu")[0])))


@pytest.fixture
def products(monkeypatch):
    """The setting of float32 products, as PyTorch has it at first; put back at the end."""
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    kernels.fast_products.cache_clear()
    yield settings
    settings.fp32_precision = before
    kernels.fast_products.cache_clear()


def test_products_of_float32_stay_exact(products):
    """Whichever library multiplies after `choose`: the error is that of float32, not a thousandth of the values."""
    kernels.choose(kernels.mode, "cpu")
    a = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    b = torch.randn(500, 200, generator=torch.Generator().manual_seed(1))
    error = ((a @ b).double() - a.double() @ b.double()).abs().max()
    assert error < 1e-4 * (a.abs().double() @ b.abs().double()).max()
    assert error < 3e-4


def test_a_cpu_that_rounds_keeps_its_setting(products, monkeypatch):
    """Where a product that may be rounded is rounded, as CPUs with units for bfloat16 do, it may not be."""
    plain = torch.Tensor.__matmul__

    def rounded(a, b):
        if a.dtype == torch.float32 and products.fp32_precision == "bf16":
            return plain(a.bfloat16().double(), b.bfloat16().double()).float()
        return plain(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    kernels.choose(kernels.mode, "cpu")
    assert products.fp32_precision == "ieee"


def test_a_cpu_without_avx512_keeps_its_setting(products, monkeypatch):
    """There MKL multiplies, whatever the setting, and PyTorch's attention is the faster one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    kernels.choose(kernels.mode, "cpu")
    assert products.fp32_precision == "ieee" and not kernels.by_onednn()


def test_only_a_cpu_needs_them(products, monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda device=None: (True, ""))
    kernels.choose(kernels.mode, "cuda")
    assert products.fp32_precision == "ieee"


def test_no_setting_in_an_older_pytorch(products, monkeypatch):
    monkeypatch.setattr(torch.backends, "mkldnn", SimpleNamespace(is_available=lambda: True))
    kernels.choose(kernels.mode, "cpu")
    with kernels.by_mkl():
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).sum() == 8


def test_a_block_by_mkl(products):
    """It undoes the setting, and puts it back after an error too; a setting of the user's own stays."""
    for before in ("bf16", "tf32", "ieee"):
        products.fp32_precision = before
        with pytest.raises(KeyError), kernels.by_mkl():
            assert products.fp32_precision == ("ieee" if before == "bf16" else before)
            raise KeyError
        assert products.fp32_precision == before
