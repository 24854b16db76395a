"""The benchmark of the loop runs, and speaks as all benchmarks do; what it measures is not for a test."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_times_every_loop_and_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the benchmark sets another where none is set
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # other tests go on in this process
    bench_train = importlib.import_module("bench_train")
    for name, few in (("KNOWN", 1), ("WARM", 1), ("ROUNDS_AT_LEAST", 2)):
        monkeypatch.setattr(bench_train, name, few)
    try:
        bench_train.make_inputs(tmp_path)
        bench_train.measure_overhead(tmp_path, 0, [1])
    finally:
        for name in set(sys.modules) - known:
            if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
                del sys.modules[name]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [line["name"] for line in lines]
    assert sum("÷ bare" in name for name in names) == 2
    assert sum("÷ diffusers" in name for name in names) == (2 if importlib.util.find_spec("accelerate") else 0)
    parts = [line for line in lines if line["name"].startswith("beside bare: ")]
    assert len(parts) == 6 and all(line["value"] > 0 for line in parts)
    assert all(set(line) >= {"value", "unit", "target", "better", "peer", "ratio", "machine"} for line in lines)
