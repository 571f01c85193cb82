"""After --benchmark-only: what a kernel engineer looks for, a line a case; with --kernels-csv PATH also as a file."""

import csv


def pytest_addoption(parser):
    parser.addoption("--kernels-csv", help="write the figures of the kernels' benchmarks to this file")


def table(rows):
    """Rows of extra_info -> lines of text: times, rates, speed-ups over the eager and the compiled plain form, memory."""
    median = {(r["op"], r["pass"], r["impl"]): r["p50_ms"] for r in rows}
    head = ("p20 ms", "p50 ms", "p80 ms", "GB/s", "% of peak", "TFLOP/s", "x eager", "x compiled", "peak MiB")
    lines = [f"{'operation, pass, implementation':90}" + "".join(f"{name:>12}" for name in head)]
    for r in sorted(rows, key=lambda r: (r["op"], r["pass"])):
        cells = [f"{r[key]:.4f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
        cells += [f"{r['gb_s']:.1f}", f"{r['percent_of_peak']:.1f}", f"{r['tflop_s']:.2f}" if "tflop_s" in r else "-"]
        for other in ("plain", "compiled"):
            base = median.get((r["op"], r["pass"], other))
            cells.append(f"{base / r['p50_ms']:.2f}" if base else "-")
        cells.append(f"{r['peak_mib']:.2f}")
        lines.append(f"{r['op']}, {r['pass']}, {r['impl']}"[:90].ljust(90) + "".join(f"{cell:>12}" for cell in cells))
    return lines


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [b.extra_info for b in session.benchmarks if "p50_ms" in b.extra_info] if session else []
    if rows:
        device = f"{rows[0]['device']}, torch {rows[0]['torch']}, triton {rows[0]['triton']}"
        terminalreporter.section(f"kernels on {device}: GB/s of the least bytes, peak that of a copy")
        for line in table(rows):
            terminalreporter.write_line(line)
        if path := config.getoption("--kernels-csv"):
            with open(path, "w", newline="") as f:
                writer = csv.DictWriter(f, sorted({key for row in rows for key in row}), restval="")
                writer.writeheader()
                writer.writerows(rows)
