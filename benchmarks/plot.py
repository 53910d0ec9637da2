"""Pictures of committed records: ``python -m benchmarks.plot [RESULTS ...] [--out DIR]``.

``eta.png``: time of the bare products over ours against the batch; ``memory.png``: peak memory against the batch. A
panel for every machine, op and phase, a colour for every method, a line style for every direction.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import records
from benchmarks.contender import PHASES, PRODUCT
from benchmarks.records import Record

RESULTS = Path(__file__).with_name("results")
BOUND_MIB = 256
"""The default of ``workspace_bytes``."""
DTYPE = "bfloat16"
STYLES = ("-", "--", ":")


def main(args: Sequence[str] | None = None) -> int:
    """Exit code 1 where there are no records to draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", nargs="*", type=Path, help=f"files of records, or folders of them; default: {RESULTS}"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--dtype", default=DTYPE, help="default: %(default)s")
    options = parser.parse_args(args)
    try:
        found = [record for path in options.results or [RESULTS] for record in load(path)]
    except (OSError, ValueError) as error:
        print(f"benchmarks.plot: {error}", file=sys.stderr)
        return 1
    chosen = [record for record in found if record.dtype == options.dtype and record.method != PRODUCT]
    pictures = {
        "eta.png": ("time of the bare products / time", lambda r: r.eta, 1.0, "linear"),
        "memory.png": ("peak memory beyond inputs, gradients, scores [MiB]", lambda r: r.peak_mib, BOUND_MIB, "symlog"),
    }
    drawn = 0
    for name, (label, value_of, line, scale) in pictures.items():
        shown = [record for record in chosen if value_of(record) is not None]
        if not shown:
            print(
                f"benchmarks.plot: no {name}: none of {len(found)} records has it in {options.dtype}", file=sys.stderr
            )
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        draw(shown, value_of, label, line, scale, options.out / name)
        print(f"written to {options.out / name}")
        drawn += 1
    return 0 if drawn == len(pictures) else 1


def load(path: Path) -> list[Record]:
    """Records of a file; of a folder those of every file below that holds some."""
    if not path.is_dir():
        return records.read(path)
    # A profile is JSON as well.
    return [
        record for file in sorted(path.rglob("*.json")) if file.name != "profile.json" for record in records.read(file)
    ]


def curves(
    shown: Sequence[Record], value_of: Callable[[Record], float | None]
) -> dict[tuple[str, str], dict[int, float]]:
    """(method, direction) -> batch -> value; of batches with as many images as captions."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for record in shown:
        value = value_of(record)
        if value is not None and record.I == record.C:
            found.setdefault((record.method, record.direction), {})[record.C] = value
    return {key: dict(sorted(points.items())) for key, points in found.items()}


def draw(
    shown: Sequence[Record],
    value_of: Callable[[Record], float | None],
    label: str,
    line: float,
    scale: str,
    path: Path,
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = list(dict.fromkeys((record.device, record.op) for record in shown))
    methods = list(dict.fromkeys(record.method for record in shown))
    directions = list(dict.fromkeys(record.direction for record in shown))
    figure, axes = pyplot.subplots(
        len(rows), len(PHASES), figsize=(6 * len(PHASES), 4 * len(rows)), squeeze=False, sharey="row"
    )
    for (device, op), row in zip(rows, axes, strict=True):
        for phase, panel in zip(PHASES, row, strict=True):
            here = [record for record in shown if (record.device, record.op, record.phase) == (device, op, phase)]
            for (method, direction), points in curves(here, value_of).items():
                panel.plot(
                    list(points),
                    list(points.values()),
                    marker="o",
                    markersize=4,
                    color=f"C{methods.index(method) % 10}",
                    linestyle=STYLES[directions.index(direction) % len(STYLES)],
                    label=f"{method} {direction}",
                )
            panel.axhline(line, color="0.6", linewidth=1)
            sizes = sorted({record.C for record in here if record.I == record.C})
            panel.set_xscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.set_yscale(scale)
            panel.set_ylim(bottom=0)
            panel.set_title(f"{op}, {phase}\n{device}", fontsize=9)
            panel.set_xlabel("images = captions")
            if here:
                panel.legend(fontsize=7)
        row[0].set_ylabel(label, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
