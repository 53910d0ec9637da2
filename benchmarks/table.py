"""Records as a table to read at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.records import Record

Cell = Callable[[Record], str]


def title(record: Record) -> str:
    return (
        f"{record.op}  {record.case}  {record.direction}  {record.phase}\n"
        f"I={record.I} C={record.C} R={record.R} N={record.N} D={record.D}  "
        f"{record.flops / 1e9:.4g} GFLOP  {record.device}"
    )


def render(records: Sequence[Record]) -> str:
    """One phase of one case: a line a method, columns without any number left out.

    ``x compile`` is the best compiled time in the dtype over the line's own, from the medians.
    """
    compiled = {
        dtype: min((r.median_ms for r in records if r.dtype == dtype and r.method.startswith("compile")), default=None)
        for dtype in {r.dtype for r in records}
    }

    def versus_compile(record: Record) -> str:
        best = compiled[record.dtype]
        return "" if best is None else _number(best / record.median_ms)

    columns: list[tuple[str, Cell]] = [
        ("method", lambda r: r.method),
        ("dtype", lambda r: r.dtype),
        ("ms", lambda r: _number(r.median_ms)),
        ("p20", lambda r: _number(r.p20_ms)),
        ("p80", lambda r: _number(r.p80_ms)),
        ("TFLOP/s", lambda r: _number(r.tflops)),
        ("rho", lambda r: _number(r.rho)),
        ("eta", lambda r: _number(r.eta)),
        ("x loop", lambda r: _number(r.speedup_vs_loop)),
        ("x compile", versus_compile),
        ("saved MiB", lambda r: _number(r.saved_mib)),
        ("peak MiB", lambda r: _number(r.peak_mib)),
    ]
    lines = [[heading for heading, _ in columns], *([cell(record) for _, cell in columns] for record in records)]
    shown = [n for n in range(len(columns)) if any(line[n] for line in lines[1:])]
    widths = [max(len(line[n]) for line in lines) for n in shown]
    return "\n".join(
        "  ".join(
            line[n].ljust(width) if n < 2 else line[n].rjust(width) for n, width in zip(shown, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _number(value: float | None) -> str:
    """Three digits that count, never an exponent."""
    if value is None:
        return ""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 0.01 else f"{value:.3f}"
