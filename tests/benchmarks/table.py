"""Tables of timings: the text behind a run, and that of docs/kernels.md: the cases marked `table`, timed here or in a file.

    python tests/benchmarks/table.py --write                   # some 10 minutes, then the page has it between two lines
    python tests/benchmarks/table.py docs/kernels-h100.csv     # prints what --kernels-csv has written elsewhere
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs/kernels.md"
MARKS = "<!-- timings: begin -->", "<!-- timings: end -->"
COLUMNS = ("reference", "plain", "compiled", "compiled reference")


def speed_ups(row, rows):
    """How many times as fast as the plain form in eager mode, and as the faster of the compiled forms; None: not timed."""
    medians = {r["impl"]: r["p50_ms"] for r in rows if (r["op"], r["pass"]) == (row["op"], row["pass"])}
    compiled = [ms for impl, ms in medians.items() if impl.startswith("compiled")]
    eager = medians["plain"] / row["p50_ms"] if "plain" in medians else None
    return eager, min(compiled) / row["p50_ms"] if compiled else None


def text(rows):
    """Lines of text: an operation and a pass, and under it a line for each implementation."""
    widths = {"": 22, "p20 ms": 10, "p50 ms": 10, "p80 ms": 10, "GB/s": 9, "% of peak": 10, "TFLOP/s": 9, "x eager": 9,
              "x compiled": 11, "peak MiB": 10}
    lines = ["".join(name.rjust(width) for name, width in widths.items())]
    passes = list(dict.fromkeys(r["pass"] for r in rows))
    rows = sorted(rows, key=lambda r: (r["op"], passes.index(r["pass"])))
    before = None
    for r in rows:
        if before != (r["op"], r["pass"]):
            before = r["op"], r["pass"]
            lines.append(f"{r['op']}, {r['pass']}")
        cells = [f"{r[key]:.4f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
        cells += [f"{r['gb_s']:.1f}", f"{r['percent_of_peak']:.1f}", f"{r['tflop_s']:.3f}" if "tflop_s" in r else "-"]
        cells += ["-" if ratio is None else f"{ratio:.2f}" for ratio in speed_ups(r, rows)]
        cells.append(f"{r['peak_mib']:.2f}")
        lines.append("".join(cell.rjust(width) for cell, width in zip((r["impl"], *cells), widths.values(), strict=True)))
    return lines


def write_csv(rows, path):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def measure(path):
    """Time the marked cases, forward and both passes, into a file."""
    command = [sys.executable, "-m", "pytest", HERE, "-n", "0", "--benchmark-only", "--benchmark-max-time", "0.5",
               "-m", "table", "-k", "not -backward]", "--kernels-csv", path]
    subprocess.run(command, check=True, cwd=HERE.parents[1], stdout=sys.stderr)  # where the table is printed it is alone


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows):
    """A line an operation: milliseconds of the kernel, or where none ran of the plain form, and how long the others take."""
    ms = {(r["op"], r["pass"], r["impl"]): float(r["p50_ms"]) for r in rows}
    found = list(dict.fromkeys(impl for _, _, impl in ms))
    passes = list(dict.fromkeys(p for _, p, _ in ms))
    base = "triton" if "triton" in found else "plain"
    columns = [impl for impl in COLUMNS if impl in found and impl != base]
    others = [impl for impl in found if impl not in (base, *columns)]
    lines = [f"Medians on {rows[0]['device']}, torch {rows[0]['torch']}: milliseconds, and how many times as long other forms"
             f" take. The numbers of a cell: {', '.join(passes)}.", "",
             f"| operation, shape | {base}, ms | {' | '.join(columns)} | another form |", "|---" * (3 + len(columns)) + "|"]
    faster = {impl: [] for impl in columns}
    for op in dict.fromkeys(op for op, _, impl in ms if impl == base):
        own = {p: ms[op, p, base] for p in passes if (op, p, base) in ms}
        name = op.replace(" torch.float32", "")
        cells = {}
        for impl in (*columns, *others):
            ratios = {p: ms[op, p, impl] / t for p, t in own.items() if (op, p, impl) in ms}
            cells[impl] = ", ".join(f"{ratios[p]:.2f}" if p in ratios else "-" for p in own) if ratios else ""
            won = [p for p in ratios if ratios[p] < 0.95]
            if impl in columns and won:
                faster[impl].append(f"{name} ({', '.join(won)})")
        another = "; ".join(f"{impl} {cells[impl]}" for impl in others if cells[impl])
        milliseconds = ", ".join(f"{t:.3f}" for t in own.values())
        lines.append(f"| {' | '.join([name, milliseconds, *(cells[impl] for impl in columns), another])} |")
    lines.append("")
    lines += [f"Faster by 5 % or more, {impl}: {'; '.join(places) or 'nowhere'}.\n" for impl, places in faster.items()]
    return "\n".join(lines).rstrip()


def unsteady(rows):
    """How many rows a busy machine has probably spoiled: in them the quantile 0.8 is above 1.5 times that of 0.2."""
    return sum(float(r["p80_ms"]) > 1.5 * float(r["p20_ms"]) for r in rows)


def write(markdown, page=PAGE):
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{markdown}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="figures that --kernels-csv has written; by default this machine is timed")
    parser.add_argument("--write", action="store_true", help="put the table into docs/kernels.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = args.file or Path(folder) / "timings.csv"
        if not args.file:
            measure(path)
        rows = read_csv(path)
    page = markdown(rows)
    print(f"{unsteady(rows)} of {len(rows)} times scatter by half or more: many mean a busy machine", file=sys.stderr)
    if args.write:
        write(page)
    else:
        print(page)


if __name__ == "__main__":
    main()
