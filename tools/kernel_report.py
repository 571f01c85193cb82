"""Compile every kernel ahead of time, without a GPU, and say what came out: registers, spills, shared memory, instructions.

    python tools/kernel_report.py                       # the table, as Markdown
    python tools/kernel_report.py --write               # into docs/kernels-compiled.md, between its two marker lines
    python tools/kernel_report.py --json --only coupling --targets sm_90 gfx942
    python tools/kernel_report.py --all                 # those of AOT_MORE too: allow it an hour

Exits with 1 where a kernel spills, passes its limits, or lacks the loads or matrix instructions that its AOT_SPECS ask for.
What was compiled is kept in a cache, by the sources, the variant, the target and triton's version.
"""

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARKS = "<!-- kernel_report: begin -->", "<!-- kernel_report: end -->"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2-kernel-report"
TARGETS = {  # name: (backend, architecture, threads of a warp, bytes of shared memory a block may have)
    "sm_80": ("cuda", 80, 32, 166912),  # A100
    "sm_86": ("cuda", 86, 32, 101376),  # GeForce 30
    "sm_89": ("cuda", 89, 32, 101376),  # GeForce 40
    "sm_90": ("cuda", 90, 32, 232448),  # H100
    "sm_100": ("cuda", 100, 32, 232448),  # B200
    "sm_120": ("cuda", 120, 32, 101376),  # GeForce 50
    "gfx942": ("hip", "gfx942", 64, 65536),  # MI300
    "gfx1100": ("hip", "gfx1100", 32, 65536),  # Radeon 7000
}
VECTOR = {
    "cuda": r"ld\.global\S*\.v[248]\.|ld\.global\S*\.b64|cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x(?:8|10)\b",
    "hip": r"(?:global|buffer)_load_(?:dwordx[24]|b64|b128)",
}
MATRIX = {"cuda": r"tcgen05\.mma|wgmma\.mma_async|mma\.sync", "hip": r"v_mfma|v_wmma"}


def files():
    """The names of the files that define kernels."""
    return sorted(p.stem for p in (ROOT / "kernels").glob("*.py") if re.search(r"^def _\w+_kernel\(", p.read_text(), re.M))


def resources(backend, asm):
    """(registers a thread, bytes of local memory or registers spilled)."""
    if backend == "hip":
        vgprs, *spills = (int(re.search(rf"\.{key}:\s*(\d+)", asm["amdgcn"])[1])
                          for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"))
        return vgprs, sum(spills)
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(asm["cubin"])
        f.flush()
        text = subprocess.run([tool, "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def variants(file, more=False):
    """The variants of a file's kernels: the usual ones, or these and every other that a launch can choose."""
    module = importlib.import_module(f"kernels.{file}")
    return [*module.AOT_SPECS, *(getattr(module, "AOT_MORE", ()) if more else ())]


def sources(name, found=()):
    """Names of the files that a file of kernels/ is made of: itself, and what it imports from there, in turn."""
    found = (*found, name)
    for part in re.findall(r"^from \.(\w*) import", (ROOT / "kernels" / f"{name}.py").read_text(), re.M):
        if (part or "__init__") not in found:
            found = sources(part or "__init__", found)
    return found


def key(file, spec, target):
    """A name in the cache for what the result of a compilation depends on."""
    import triton

    texts = [(ROOT / "kernels" / f"{name}.py").read_text() for name in sorted(sources(file))]
    what = [*texts, Path(__file__).read_text(), repr(spec), target, triton.__version__]
    return hashlib.sha256("\0".join(what).encode()).hexdigest()


def compile_one(file, index, target):
    """One row of the report, a kernel's variant on a target: from the cache where it was compiled before."""
    spec = variants(file, more=True)[index]
    kept = CACHE / f"{key(file, spec, target)}.json"
    with contextlib.suppress(OSError, ValueError):  # not there, or cut short
        return json.loads(kept.read_text())
    row = compile_spec(file, spec, target)
    with contextlib.suppress(OSError):  # a folder that cannot be written
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(row))
        part.replace(kept)
    return row


def compile_spec(file, spec, target):
    """A row, compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import kernels

    module = importlib.import_module(f"kernels.{file}")
    backend, arch, warp, shared_limit = TARGETS[target]
    own = (spec.hip if backend == "hip" else {}) | spec.own.get(target, {})
    options = {key: own[key] for key in ("num_warps", "num_stages") if key in own}
    spec = spec._replace(args={key: own.get(key, a) for key, a in spec.args.items()}, **options)
    fn = getattr(module, spec.kernel)
    args = {name: spec.args[name] for name in fn.arg_names}
    signature = {name: a.split(":")[0] if isinstance(a, str) else "constexpr" for name, a in args.items()}
    constants = {name: a for name, a in args.items() if not isinstance(a, str)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(args.values())
               if isinstance(a, str) and (a[0] == "*" or a.endswith(":16"))}
    start = time.perf_counter()
    out = triton.compile(ASTSource(fn, signature=signature, constexprs=constants, attrs=aligned),
                         target=GPUTarget(backend, arch, warp),
                         options=kernels.OPTIONS | {"num_warps": spec.num_warps}
                         | ({"num_stages": spec.num_stages} if spec.num_stages else {}))
    text = out.asm["amdgcn" if backend == "hip" else "ptx"]
    registers, spilled = resources(backend, out.asm)
    matrix = sorted(set(re.findall(MATRIX[backend], text)))
    vector = bool(re.search(VECTOR[backend], text))
    limits = {
        f"spills {spilled}": spilled > 0,
        f"{registers} registers, {spec.registers} expected": backend == "cuda" and registers > spec.registers,
        f"{out.metadata.shared} bytes of shared memory, the limit is {shared_limit}": out.metadata.shared > shared_limit,
        "no vector loads": spec.vector and not vector,
        "no matrix instructions": spec.matrix and not matrix,
    }
    return {"file": file, "kernel": spec.kernel, "variant": spec.name, "target": target, "registers": registers,
            "spilled": spilled, "shared": out.metadata.shared, "vector": vector, "matrix": matrix,
            "seconds": round(time.perf_counter() - start, 2), "problems": [what for what, wrong in limits.items() if wrong]}


def build(only=None, targets=TARGETS, more=False):
    """Every row, two processes at a time."""
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
    sys.path.insert(0, str(ROOT))
    jobs = [(file, i, target) for file in files() if only in (None, file) for i, spec in enumerate(variants(file, more))
            for target in targets if spec.own.get(target, {}) is not None]
    for kept in CACHE.glob("*"):  # of sources of a month ago
        with contextlib.suppress(OSError):  # another report may just have renamed it
            if kept.stat().st_mtime < time.time() - 30 * 24 * 3600:
                kept.unlink()
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(compile_one, *zip(*jobs, strict=True)))


def table(rows, targets=TARGETS):
    """A row a variant, a column a target: registers, bytes of shared memory, matrix instructions."""
    import triton

    lines = [f"Compiled with triton {triton.__version__}. A cell: registers a thread / bytes of shared memory a block"
             " / matrix instructions." + " None spills, and all have vector loads where a contiguous row is read."
             * (not any(r["problems"] for r in rows)), "",
             f"| kernel | variant | {' | '.join(targets)} |", "|---" * (2 + len(targets)) + "|"]
    cells = {}
    for r in rows:
        cells.setdefault((f"{r['file']}.{r['kernel']}", r["variant"]), {})[r["target"]] = " / ".join(
            [str(r["registers"]), f"{r['shared']:,}", *r["matrix"], *(f"**{p}**" for p in r["problems"])])
    for (kernel, variant), row in cells.items():
        lines.append(f"| `{kernel}` | {variant} | {' | '.join(row.get(t, '') for t in targets)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--only", choices=files(), help="one file's kernels")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="some of the architectures")
    parser.add_argument("--all", action="store_true", help="the variants of AOT_MORE too, not only the usual ones")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels-compiled.md")
    args = parser.parse_args()
    if args.write and (args.only or args.json or args.all or args.targets != list(TARGETS)):
        parser.error("--write writes the table of the usual variants: it takes neither --only, --json, --targets nor --all")
    rows = build(args.only, args.targets, args.all)
    if args.json:
        print(json.dumps(rows))
    elif args.write:
        page = ROOT / "docs/kernels-compiled.md"
        before, rest = page.read_text().split(MARKS[0])
        page.write_text(f"{before}{MARKS[0]}\n{table(rows)}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    else:
        print(table(rows, args.targets))
    wrong = [f"{r['file']}.{r['kernel']} ({r['variant']}, {r['target']}): {p}" for r in rows for p in r["problems"]]
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
