"""tests/bench_gpu.py under the emulator, so that its first run on a card is no rehearsal; and its report."""

import re
import subprocess
import sys
from pathlib import Path

import bench_gpu
import pytest

from console import UserError

HERE = Path(__file__).parent
CARD = {"card": "NVIDIA H100 80GB HBM3"}


def bench(*flags):
    command = [sys.executable, HERE / "bench_gpu.py", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_runs_in_the_emulator():
    done = bench("--emulator", "--only", "attention,bandwidth,decoding,training,curve")
    assert done.returncode == 0, done.stderr
    for line in ("| decode attention, 2 × 32 ", "| 2 × 32 |", "| 3    |", "| d12 ≥ 300,000 tok/s "):
        assert line in done.stdout
    for work in "attention backward", "layernorm backward", "encoder backward", "decode attention, 2 × 32":
        assert re.search(rf"\| {work} +\| +naive \|", done.stdout), work
    assert "failed" not in done.stdout + done.stderr


def test_wrong_flags_are_one_line():
    for flags in (["--only", "colour"], ["--write", "--emulator"]):
        with pytest.raises(UserError):
            bench_gpu.main(flags)


def test_without_a_gpu_says_so():
    found, why = bench_gpu.run([sys.executable, "-c", "print('{\"work\": 1}'); raise SystemExit('no')"], 60)
    assert (found, why) == ([{"work": 1}], "status 1: no")


def test_a_section_that_hangs_keeps_what_it_said():
    script = "import time; print('{\"work\": 1}', flush=True); time.sleep(60)"
    assert bench_gpu.run([sys.executable, "-c", script], 2) == ([{"work": 1}], "stopped after 2 s")


def test_report():
    """Rates, shares and verdicts of made-up measurements."""
    report = bench_gpu.Report(CARD, bench_gpu.D12)
    copied = dict(work="copy", seconds=1e-3, moved=3_000_000_000)
    cublas = [dict(work="cuBLAS", seconds=1e-3), dict(work="versions", versions="torch 2", n=4096)]
    assert "3000 GB/s" in report.add("ceilings", [copied], cublas)
    one = dict(rung="chosen", kernel="matmul_bf16<bf16, 128, 64>", moved=0, error=1e-3)
    rows = [
        one | dict(work="matmul fc", seconds=1e-3, flops=5e11),
        dict(work="x", rung="naive", failed="why"),
    ]
    text = report.add("matmul", rows, [dict(work="matmul fc", seconds=7e-4)])
    assert "chosen: 128 64" in text and "500.0 TFLOP/s" in text and " 51% |" in text
    rows = [one | dict(work="gelu", seconds=1e-3, flops=0, moved=2_400_000_000)]
    assert "80%" in report.add("bandwidth", rows, [])
    rows = [dict(work="training", batch=64, rate=4e5, flops_per_token=8.5e8)]
    assert "400,000" in report.add("training", rows, [])
    losses = [dict(work="curve", losses=[3.0, 2.0])], [dict(work="curve", losses=[3.0, 2.5])]
    assert "Apart by 0.2500" in report.add("curve", *losses)
    assert [verdict for *_, verdict in report.targets] == ["pass", "below", "pass"]
    report.failures.append("gelu: broken")
    whole = report.whole()
    assert whole.startswith("# Measured on a GPU") and "- gelu: broken" in whole and "H100" in whole
