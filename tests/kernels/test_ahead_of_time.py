"""Every kernel compiled without a GPU: no spills, vector loads, matrix instructions, small enough.

The usual variants for three architectures always. With M2_ALL_VARIANTS=1 in the environment for all eight, and those of
AOT_MORE too: allow it an hour on two cores.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import kernel_report

USUAL = ["sm_86", "sm_90", "gfx1100"]  # the least shared memory, products of a whole warp group, and another maker
TARGETS = list(kernel_report.TARGETS) if os.environ.get("M2_ALL_VARIANTS") else USUAL


@pytest.fixture(scope="module")
def report():
    """In a process of its own, where triton compiles: in this one its interpreter may be at work."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    more = ["--all"] if os.environ.get("M2_ALL_VARIANTS") else []
    command = [sys.executable, ROOT / "tools/kernel_report.py", "--json", "--targets", *TARGETS, *more]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("file", kernel_report.files())
def test_what_was_compiled(report, file, target):
    rows = [r for r in report if (r["file"], r["target"]) == (file, target)]
    assert rows
    assert not [(r["kernel"], r["variant"], r["problems"]) for r in rows if r["problems"]]


@pytest.mark.parametrize("file", kernel_report.files())
def test_every_kernel_has_a_specification(report, file):
    """A kernel is what is launched with a grid; what it calls is compiled with it."""
    source = (ROOT / "kernels" / f"{file}.py").read_text()
    names = {line.split("(")[0].removeprefix("def ") for line in source.splitlines() if line.startswith("def _")}
    kernels = {name for name in names if name.endswith("_kernel")}
    assert kernels and kernels == {r["kernel"] for r in report if r["file"] == file}


def test_matrix_instructions_where_they_are_the_point(report):
    for file in {"attention", "masked_conv", "vector_quantize"} & set(kernel_report.files()):
        for target in TARGETS:
            assert any(r["matrix"] for r in report if (r["file"], r["target"]) == (file, target))


def test_the_report_sees_what_is_wrong():
    """The checks themselves: a limit of one register, and matrix instructions where there are none."""
    code = ("import sys; sys.path[:0] = [{root!r}, {tools!r}]; import kernel_report, kernels.group_norm as m; "
            "spec = m.AOT_SPECS[0]._replace(registers=1, matrix=True); "
            "print(kernel_report.compile_spec('group_norm', spec, 'sm_80')['problems'])")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", code.format(root=str(ROOT), tools=str(ROOT / "tools"))], capture_output=True,
                         text=True, env=env).stdout
    assert "registers, 1 expected" in out and "no matrix instructions" in out


def test_launches_have_the_options_that_the_report_compiles_with():
    """kernels.OPTIONS, all of them: what the report says of registers holds for what runs."""
    code = """
import sys
sys.path[:0] = [{root!r}, {tools!r}]
import torch, triton, kernels, kernel_report
import kernels.bias_act as module
def seen(*args, **options):
    raise SystemExit([options.get("options", options)[key] for key in kernels.OPTIONS])
class Kernel:
    def __getitem__(self, grid):
        return seen
def asked(call, *args):
    try:
        call(*args)
    except SystemExit as e:
        return e.code
triton.compile = seen
for kernels.OPTIONS in (dict(kernels.OPTIONS), {{"enable_fp_fusion": False, "sanitize_overflow": True}}):
    print(list(kernels.OPTIONS.values()) == asked(kernels.launch, Kernel(), 1, torch.ones(1))
          == asked(kernel_report.compile_spec, "bias_act", module.AOT_SPECS[0], "sm_80"))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = code.format(root=str(ROOT), tools=str(ROOT / "tools"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_every_launch_is_by_the_one_function_that_gives_them():
    """No kernel is started with brackets of its own."""
    for file in kernel_report.files():
        source = (ROOT / "kernels" / f"{file}.py").read_text()
        assert "launch(_" in source and not re.search(r"_kernel\[", source), file


def test_the_page_has_the_table(report):
    """docs/kernels-compiled.md lists the kernels that there are."""
    if os.environ.get("M2_ALL_VARIANTS"):
        pytest.skip("the page has the usual variants")
    page = (ROOT / "docs/kernels-compiled.md").read_text()
    before, table = page.split(kernel_report.MARKS[0])
    for row in report:
        assert f"| `{row['file']}.{row['kernel']}` | {row['variant']} |" in table


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What is compiled, where kernels/ is a copy that a test may change and the cache is empty."""
    (tmp_path / "kernels").mkdir()
    for path in (ROOT / "kernels").glob("*.py"):
        (tmp_path / "kernels" / path.name).write_text(path.read_text())
    calls = []

    def compile_spec(file, spec, target):
        calls.append((file, spec.name, target))
        return {"row": len(calls)}

    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_report, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(kernel_report, "compile_spec", compile_spec)
    return calls


def test_what_is_cached_is_not_compiled_again(compiled):
    first = kernel_report.compile_one("bias_act", 0, "sm_80")
    assert kernel_report.compile_one("bias_act", 0, "sm_80") == first == {"row": 1}
    others = [("bias_act", 1, "sm_80"), ("bias_act", 0, "sm_90"), ("group_norm", 0, "sm_80")]
    assert [kernel_report.compile_one(*job)["row"] for job in others] == [2, 3, 4]
    assert kernel_report.compile_one("bias_act", 0, "sm_80") == first and len(compiled) == 4


@pytest.mark.parametrize("changed", ["attention", "decode_attention", "__init__"])
def test_a_change_of_the_source_misses_the_cache(compiled, tmp_path, changed):
    """Of the file, of one that it imports from, or of the package: attention imports from decode_attention."""
    kernel_report.compile_one("attention", 0, "sm_80")
    kernel_report.compile_one("bias_act", 0, "sm_80")
    with open(tmp_path / "kernels" / f"{changed}.py", "a") as file:
        file.write("# changed\n")
    assert kernel_report.compile_one("attention", 0, "sm_80") == {"row": 3}
    kernel_report.compile_one("bias_act", 0, "sm_80")
    assert len(compiled) == (4 if changed == "__init__" else 3)  # of which bias_act imports the package alone


def test_a_change_of_the_variant_or_of_triton_misses_the_cache(monkeypatch):
    import triton

    spec = kernel_report.variants("bias_act")[0]
    changed = [spec, spec._replace(num_warps=2), spec._replace(registers=1), spec._replace(args=spec.args | {"TILES": 1})]
    keys = {kernel_report.key("bias_act", s, "sm_80") for s in changed}
    monkeypatch.setattr(triton, "__version__", "0")
    assert len(keys | {kernel_report.key("bias_act", spec, "sm_80")}) == 5


def test_a_file_of_the_cache_that_was_cut_short_is_written_again(compiled, tmp_path):
    kernel_report.compile_one("bias_act", 0, "sm_80")
    for path in (tmp_path / "cache").iterdir():
        path.write_text('{"row"')
    assert kernel_report.compile_one("bias_act", 0, "sm_80") == kernel_report.compile_one("bias_act", 0, "sm_80") == {"row": 2}


def test_old_files_of_the_cache_go(compiled, tmp_path, monkeypatch):
    """Those of sources of a month ago. One that another report takes away meanwhile does not matter."""
    old, new, gone = (tmp_path / "cache" / name for name in ("old", "new", "gone"))
    old.parent.mkdir()
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    gone.symlink_to("nowhere")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # build takes it away
    monkeypatch.setattr(sys, "path", [*sys.path])  # and adds to this
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", lambda n: contextlib.nullcontext(SimpleNamespace(map=map)))
    assert len(kernel_report.build("bias_act", ["sm_80"])) == len(kernel_report.variants("bias_act"))
    assert not old.exists() and new.exists()


def test_further_variants_are_compiled_where_they_are_asked_for(monkeypatch):
    """AOT_MORE, which a file need not have, behind AOT_SPECS."""
    import kernels.bias_act as module

    more = [module.AOT_SPECS[0]._replace(name="another")]
    monkeypatch.delattr(module, "AOT_MORE", raising=False)
    assert kernel_report.variants("bias_act", more=True) == module.AOT_SPECS
    monkeypatch.setattr(module, "AOT_MORE", more, raising=False)
    assert kernel_report.variants("bias_act") == module.AOT_SPECS
    assert kernel_report.variants("bias_act", more=True) == [*module.AOT_SPECS, *more]
