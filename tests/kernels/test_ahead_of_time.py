"""Every kernel compiled for eight architectures without a GPU: no spills, vector loads, matrix instructions, small enough.

The usual variants always; with M2_ALL_VARIANTS=1 in the environment every variant that a launch can choose, some half an hour.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import kernel_report


@pytest.fixture(scope="module")
def report():
    """In a process of its own, where triton compiles: in this one its interpreter may be at work."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    more = ["--all"] if os.environ.get("M2_ALL_VARIANTS") else []
    done = subprocess.run([sys.executable, ROOT / "tools/kernel_report.py", "--json", *more], capture_output=True, text=True,
                          env=env)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("target", kernel_report.TARGETS)
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
        for target in kernel_report.TARGETS:
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


def test_the_page_has_the_table(report):
    """docs/kernels-compiled.md lists the kernels that there are."""
    if os.environ.get("M2_ALL_VARIANTS"):
        pytest.skip("the page has the usual variants")
    page = (ROOT / "docs/kernels-compiled.md").read_text()
    before, table = page.split(kernel_report.MARKS[0])
    for row in report:
        assert f"| `{row['file']}.{row['kernel']}` | {row['variant']} |" in table


def test_the_cache_is_of_the_source(tmp_path, monkeypatch):
    """The same is not compiled twice; a changed source, variant, target or part that a file imports is compiled anew."""
    import kernels.bias_act as module

    for name in ("bias_act", "attention", "decode_attention", "__init__"):
        (tmp_path / "kernels").mkdir(exist_ok=True)
        (tmp_path / "kernels" / f"{name}.py").write_text((ROOT / "kernels" / f"{name}.py").read_text())
    compiled = []
    monkeypatch.setattr(kernel_report, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_report, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(kernel_report, "compile_spec", lambda *args: (compiled.append(args), {"row": len(compiled)})[1])
    first = kernel_report.compile_one("bias_act", 0, "sm_80")
    assert kernel_report.compile_one("bias_act", 0, "sm_80") == first == {"row": 1} and len(compiled) == 1
    kernel_report.compile_one("bias_act", 1, "sm_80")
    kernel_report.compile_one("bias_act", 0, "sm_90")
    assert len(compiled) == 3
    for name in ("bias_act", "__init__"):
        with open(tmp_path / "kernels" / f"{name}.py", "a") as f:
            f.write("# changed\n")
        assert kernel_report.compile_one("bias_act", 0, "sm_80") != first
    assert len(compiled) == 5
    spec = module.AOT_SPECS[0]
    before = kernel_report.key("attention", spec, "sm_80")
    with open(tmp_path / "kernels" / "decode_attention.py", "a") as f:
        f.write("# changed\n")
    assert kernel_report.key("attention", spec, "sm_80") != before  # which imports from it
    for path in (tmp_path / "cache").iterdir():
        path.write_text("{")  # cut short
    assert kernel_report.compile_one("bias_act", 0, "sm_80") and len(compiled) == 6
