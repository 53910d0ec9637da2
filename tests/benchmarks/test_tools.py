"""Pictures, profiles and the sanitizer's programme: what stands beside the benchmark's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_helpers import CPU, OP, make, record

import itm_kernels
from benchmarks import machine, ops, plot, profile, records, sanitize, sweep
from benchmarks.contender import BOTH, FORWARD, PHASES
from benchmarks.measure import Call


def invented(**changes: Any) -> records.Record:
    return record(**{"op": OP, "dtype": "bfloat16", "device": "NVIDIA H200", "direction": "t2i", **changes})


def a_run() -> list[records.Record]:
    return [
        invented(method=method, phase=phase, I=size, C=size, eta=0.1 * n, peak_mib=size / 8)
        for n, method in enumerate(("product", "eager", "native"), start=1)
        for phase in PHASES
        for size in (1024, 128, 512)
    ]


def test_both_pictures_are_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records.write(a_run(), tmp_path / "h200" / "bench.json")
    (tmp_path / "h200" / "profile.json").write_text('[{"kernel": "no record"}]')
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "pictures")]) == 0
    told = capsys.readouterr().out
    for name in ("eta.png", "memory.png"):
        path = tmp_path / "pictures" / name
        assert f"written to {path}" in told
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000


def test_curves_go_by_batch() -> None:
    found = plot.curves([*a_run(), invented(method="native", I=8, C=16, eta=9.0)], lambda r: r.eta)
    assert found["native", "t2i"] == pytest.approx({128: 0.3, 512: 0.3, 1024: 0.3})
    assert list(found["native", "t2i"]) == [128, 512, 1024]
    assert set(found) == {(method, "t2i") for method in ("product", "eager", "native")}


def test_lines_and_panels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    kept = []
    monkeypatch.setattr(pyplot, "close", kept.append)
    shown = [r for r in a_run() if r.method != "product"]
    plot.draw(shown, lambda r: r.eta, "eta", 1.0, "linear", tmp_path / "eta.png")
    forward, both = kept[0].axes
    assert [axes.get_title().splitlines()[0] for axes in (forward, both)] == [f"{OP}, {phase}" for phase in PHASES]
    lines = {line.get_label(): list(line.get_ydata()) for line in forward.get_lines()}
    assert lines["native t2i"] == pytest.approx([0.3] * 3)
    assert lines["eager t2i"] == pytest.approx([0.2] * 3)
    monkeypatch.undo()
    pyplot.close(kept[0])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([], "no eta.png: none of 0 records has it"),
        ([invented(eta=None, rho=1.0)], "no eta.png: none of 1 records has it"),
        ([invented(dtype="float32", eta=0.5)], "none of 1 records has it in bfloat16"),
    ],
)
def test_without_records_nothing_is_drawn(
    found: list[records.Record], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(found, tmp_path / "bench.json")
    assert plot.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot.main([str(tmp_path / "none.json")]) == 1
    assert "none.json" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    assert plot.main([str(tmp_path)]) == 1
    assert "other.json: must hold a list of records" in capsys.readouterr().err


def test_a_profile_names_what_ran_the_longest_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "profile.json"
    args = ["--device", "cpu", "--case", "tiny", "--dtype", "float32", "--op", OP, "--json", str(path)]
    assert profile.main([*args, "--method", "eager", "--method", "product"]) == 0
    rows = json.loads(path.read_text())
    assert {(row["method"], row["phase"]) for row in rows} == {
        (method, phase) for method in ("eager", "product") for phase in PHASES
    }
    eager = [row for row in rows if (row["method"], row["phase"]) == ("eager", BOTH)]
    assert sum(row["share"] for row in eager) == pytest.approx(1)
    assert [row["total_us"] for row in eager] == sorted((row["total_us"] for row in eager), reverse=True)
    products = {row["kernel"]: row["calls"] for row in rows if (row["method"], row["phase"]) == ("product", FORWARD)}
    assert products["aten::mm"] == 1
    assert rows[0]["commit"] == machine.commit()
    assert "product  float32" in capsys.readouterr().out


def test_a_profile_of_nothing_fails(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    workload = ops.load(OP).workload(sanitize.CASES[0], "t2i", torch.float32, CPU)
    monkeypatch.setattr(type(workload), "contender", lambda *_: "not here")
    assert profile.main(["--device", "cpu", "--case", "tiny", "--op", OP]) == 1
    assert f"{OP}, native: left out: not here" in capsys.readouterr().out


def test_bare_calls_are_not_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("profiled")

    monkeypatch.setattr(profile, "kernels", refuse)
    args = ["--device", "cpu", "--case", "tiny", "--op", OP, "--method", "product", "--dtype", "float32"]
    assert profile.main([*args, "--bare"]) == 0


def test_the_sanitizer_sees_every_direction_phase_and_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make("native")  # skips where it is not built
    seen: list[str] = []
    right = sanitize.assert_parity
    monkeypatch.setattr(sanitize, "assert_parity", lambda who, *rest: (seen.append(who), right(who, *rest)))
    monkeypatch.setattr(sanitize.ops, "OPS", (OP,))
    assert sanitize.main(["--device", "cpu"]) == 0
    native = [who for who in seen if " native " in who]
    assert len(native) == len(set(native)) == 2 * 3 * 3 * 2  # cases, directions, dtypes, phases
    assert f"{len(seen)} calls, all right" in capsys.readouterr().out


def test_the_sanitizer_needs_something_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "KERNELS", ("triton",))
    monkeypatch.setattr("itm_kernels.backends.why_not", lambda *_: "not here")
    monkeypatch.setattr(ops.load(OP), "why_not", lambda *_: "not here")
    monkeypatch.setattr(sanitize.ops, "OPS", (OP,))
    assert sanitize.main(["--device", "cpu"]) == 1


def test_a_wrong_kernel_is_not_sanitized_away(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = type(ops.load(OP).workload(sanitize.CASES[0], "t2i", torch.float32, CPU))
    right = workload.contender

    def wrong(self: Any, method: str) -> Any:
        found = right(self, "eager")
        assert not isinstance(found, str)

        def off(call: Call) -> Call:
            return lambda: [output * 1.01 for output in call()]

        found.calls.update({phase: off(call) for phase, call in found.calls.items()})
        return found

    monkeypatch.setattr(workload, "contender", wrong)
    with pytest.raises(AssertionError, match="off by"):
        sanitize.main(["--device", "cpu"])


def test_a_sweep_compares_workspaces(capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    before = itm_kernels.cross_attention_scores.__kwdefaults__["workspace_bytes"]
    args = ["--device", "cpu", "--case", "tiny", "--seconds", "0.01", "--op", OP, "--method", "native"]
    make("native")  # skips where it is not built
    for mib in (1, 7):
        with sweep.workspace(OP, mib):
            seen.append(itm_kernels.cross_attention_scores.__kwdefaults__["workspace_bytes"])
    assert seen == [2**20, 7 * 2**20]
    assert sweep.main([*args, "--workspace-mib", "1", "--workspace-mib", "7"]) == 0
    told = capsys.readouterr().out
    assert told.count("native, 1 MiB\n") == told.count("native, 7 MiB\n") == len(PHASES)
    assert "share 1.000  product\n" in told
    assert itm_kernels.cross_attention_scores.__kwdefaults__["workspace_bytes"] == before


def test_a_sweep_lends_a_table_for_a_while(tmp_path: Path) -> None:
    configurations = pytest.importorskip("itm_kernels.triton.configurations")
    held = configurations.table(configurations.INTERPRETED).buckets
    before = {name: list(buckets) for name, buckets in held.items()}
    name = next(iter(held))
    mine = [{**bucket, "num_warps": 1} for bucket in held[name]]
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"kernels": {name: mine}}))
    with sweep.triton_table(path, CPU):
        assert configurations.table(configurations.INTERPRETED).buckets == {**before, name: mine}
    assert configurations.table(configurations.INTERPRETED).buckets == before


def test_a_sweep_of_nothing_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    workload = type(ops.load(OP).workload(sanitize.CASES[0], "t2i", torch.float32, CPU))
    right = workload.contender
    monkeypatch.setattr(
        workload, "contender", lambda self, name: right(self, name) if name == "product" else "not here"
    )
    assert sweep.main(["--device", "cpu", "--case", "tiny", "--op", OP]) == 1
    assert "native: left out: not here" in capsys.readouterr().out
