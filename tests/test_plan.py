"""The plan of a run: near what was measured, for every preset and card; and what --choose says."""

import itertools
import shutil
from types import SimpleNamespace

import card
import pytest
import script

import gpt2
import train
from extras import plan, plot

H100S = "8xNVIDIA H100 80GB HBM3"


@pytest.mark.parametrize("rows", [64, 32, 16])
def test_steps_are_predicted_within_15_percent(rows, capsys):
    """Of d12 on the H200. The plan is made of single kernels, and of attention in a step of 64 rows."""
    config = gpt2.GPT2Config()
    steps = {row[0]: float(row[1]) for row in plot.table("Training")}
    measured = steps[f"d12, {rows} × 1024"]
    predicted = plan.micro_batch_seconds(config, rows, 1024, "H200") + plan.update(config, "H200", 1, 0)[0]
    with capsys.disabled():
        print(f"\nd12, {rows} x 1024: {predicted * 1e3:.1f} ms predicted, {measured:.1f} ms measured")
    assert predicted * 1e3 == pytest.approx(measured, rel=0.15)


def test_the_plan_knows_the_settings_of_the_kernels():
    cuda = card.cuda()
    assert vars(plan.ON_GPU) == {name: getattr(cuda, name) for name in vars(plan.ON_GPU)}
    assert plan.CARDS.keys() == train.DATASHEETS.keys()


def shown(*flags):
    done = script.run(train.main, "--plan", *flags)
    assert done.status == 0 and done.err == "", done.err
    return done.out


def test_a_plan_has_memory_time_and_dollars_and_what_others_reached():
    out = shown("--model", "d12", "--gpus", "8xH100", "--dollars-per-hour", 20)
    lines = dict(line.split(None, 1) for line in out.splitlines() if not line.startswith(" "))
    assert lines["plan"].startswith("d12 on 8 x H100, bfloat16, micro-batches of 64 x 1024: 18,865 steps")
    assert "80 GB" in lines["memory"] and "gradients" in out and "moments" in out
    assert "871 MB that each sends" in out  # twice 7/8 of the gradients, in float32
    assert "at $20 an hour" in lines["run"]
    assert "3.27 to 3.29" in lines["published"] and "llm.c published 140 ms" in out
    assert "datasheet" in lines["note"]
    assert "note" not in shown("--model", "d12", "--gpus", "H200")
    assert "none has published" in shown("--model", "d12", "--gpus", "H200", "--lr", 1e-3)


def test_zero_and_hours_are_planned():
    flags = train.parse(["--model", "d48"])[0]
    whole, parts = (
        plan.predict(SimpleNamespace(**vars(flags) | {"zero": zero}), 8, "H100") for zero in (0, 1)
    )
    assert parts.memory["moments"] == whole.memory["moments"] / 8
    assert parts.memory["parameters"] == whole.memory["parameters"] / 3 * (1 + 2 / 8)  # bf16, float32
    assert parts.update < whole.update and parts.sent < whole.sent
    assert "4,07" in shown("--model", "d12", "--gpus", "1xH100", "--hours", 1).splitlines()[0]


def test_every_preset_and_card_has_a_plan_or_does_not_fit():
    assert script.refused(script.run(train.main, "--plan"), "plan --model d12")
    for model, name in itertools.product(("d12", "d24", "d36", "d48"), plan.CARDS):
        done = script.run(train.main, "--plan", "--model", model, "--gpus", f"8x{name}")
        assert done.status == 0 or script.refused(done, "are free"), done.err


@pytest.mark.parametrize("gpus", ["8", "H900", "0xH100", "x", "", "-1xH100"])
def test_bad_gpus_are_one_clear_line(gpus):
    done = script.run(train.main, "--plan", "--model", "d12", f"--gpus={gpus}")
    assert script.refused(done, "--gpus", "8xH100")


def test_gpus_that_do_not_divide_the_rows_are_refused():
    assert script.refused(script.run(train.main, "--plan", "--model", "d12", "--gpus", "3xH100"), "3 GPUs")


@pytest.mark.parametrize(
    "gpus, free, model, words",
    [
        (H100S, 10**12, "d12", ("hours on 8 x H100", "MODEL=tiny")),
        ("1xNVIDIA H100 80GB HBM3", 10**12, "d12", ("4.5 hours on 1 x H100",)),
        (H100S, 10**10, "tiny", ("25.2 GB of disk", "10 GB are free", "free some space")),
        ("1xTesla T4", 10**12, "tiny", ("hours on 1 x T4", "MODEL=d12")),
        ("1xA card of tomorrow", 10**12, "tiny", ("A card of tomorrow", "MODEL=d12")),
        (None, 10**12, "tiny", ("no NVIDIA GPU",)),
    ],
)
def test_a_preset_is_chosen_for_the_machine(monkeypatch, gpus, free, model, words):
    def here():
        if gpus is None:
            raise ImportError("no NVIDIA GPU was found")
        return gpus

    monkeypatch.setattr(plan, "gpus_here", here)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    done = script.run(train.main, "--choose")
    assert done.status == 0 and done.out == f"{model}\n"
    assert done.err.startswith(f"training {model}: ") and done.err.count("\n") == 1, done.err
    assert all(word in done.err for word in words), done.err
