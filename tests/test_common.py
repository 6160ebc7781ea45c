"""Files and runs that are whole or not there, whatever happens while they are written: an exception, a full
disk, kill -9. And what is fetched is verified."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import script

import common
import hub
from common import UserError
from kernels import threads

ROOT = Path(common.__file__).parent


def fail_at(monkeypatch, nth):
    """The nth flush to the disk from now on finds it full."""
    fsync, calls = os.fsync, iter(range(1, 1000))

    def flush(handle):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Whole files


def test_write_whole_writes_and_overwrites(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    for content in (b"one", b"", bytes(100_000)):
        common.write_whole(path, content)
        assert path.read_bytes() == content
        assert names(path.parent) == ["file"]


def test_write_whole_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    common.write_whole(path, b"old")
    fail_at(monkeypatch, 1)
    with pytest.raises(OSError):
        common.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]
    with pytest.raises(TypeError):
        common.write_whole(path, "text")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_write_whole_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *pair: (order.append("replace"), replace(*pair)))
    common.write_whole(tmp_path / "file", b"content")
    assert order[:2] == ["fsync", "replace"]


def test_whole_directory_appears_at_the_end(tmp_path):
    with common.whole_directory(tmp_path / "place") as beside:
        (beside / "file").write_text("content")
        assert not (tmp_path / "place").exists()
    assert names(tmp_path) == ["place"] and (tmp_path / "place" / "file").read_text() == "content"
    with common.whole_directory(tmp_path / "place") as beside:  # once more: the new one takes its place
        (beside / "other").write_text("more")
        assert names(tmp_path / "place") == ["file"]
    assert names(tmp_path) == ["place"] and names(tmp_path / "place") == ["other"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whole_directory_vanishes_when_its_block_fails(tmp_path, error):
    (tmp_path / "place").mkdir()
    (tmp_path / "place" / "old").touch()
    with pytest.raises(error), common.whole_directory(tmp_path / "place") as beside:
        (beside / "file").touch()
        raise error
    assert names(tmp_path) == ["place"] and names(tmp_path / "place") == ["old"]


@pytest.mark.parametrize("nth", [1, 2])
def test_whole_directory_vanishes_when_the_disk_is_full(tmp_path, monkeypatch, nth):
    fail_at(monkeypatch, nth)
    with pytest.raises(OSError), common.whole_directory(tmp_path / "place") as beside:
        (beside / "file").touch()
    assert names(tmp_path) == []


def test_whole_directory_sweeps_up_after_a_killed_process(tmp_path):
    for name in (".place.123.part", ".place.456.part", ".places.123.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    with common.whole_directory(tmp_path / "place"):
        pass
    assert names(tmp_path) == [".places.123.part", "place"]  # that one is another's


def test_a_place_that_is_replaced_is_at_no_moment_half_there(tmp_path, monkeypatch):
    """Whatever call of the system is the last before a power cut: the directory is old, new or not there."""
    place = tmp_path / "place"
    with common.whole_directory(place) as beside:
        (beside / "a").write_text("old"), (beside / "b").write_text("old")
    rmtree = common.shutil.rmtree

    def careful(directory, **settings):
        assert directory != place, "taken apart while it has its name"
        rmtree(directory, **settings)

    monkeypatch.setattr(common.shutil, "rmtree", careful)
    with common.whole_directory(place) as beside:
        (beside / "a").write_text("new"), (beside / "b").write_text("new")
    assert (place / "a").read_text() == (place / "b").read_text() == "new"


def test_sha256_reads_in_blocks(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert hub.sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert hub.sha256(tmp_path / "file") == hashlib.sha256(bytes(3 << 20)).hexdigest()


def test_the_cache_can_be_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("HANDMADE_CACHE", raising=False)
    assert hub.cache() == ROOT / "cache"
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path))
    assert hub.cache() == tmp_path


ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def pip(monkeypatch, content=None, stderr="", error=None):
    """Instead of pip: it brings a file with `content`, or fails. Returns the list of what it was asked."""
    asked = []

    def run(command, **_):
        asked.append([str(word) for word in command])
        if error:
            raise error
        if content is not None:
            got = Path(command[command.index("--dest") + 1])
            got.mkdir()
            (got / "package.whl").write_bytes(content)
        return SimpleNamespace(returncode=content is None, stderr=stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_fetch_asks_pip_once_and_verifies_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path / "cache"))
    asked = pip(monkeypatch, b"abc")
    for _ in range(2):
        path = hub.fetch("name==1.0", ABC)
        assert path.read_bytes() == b"abc"
    assert len(asked) == 1 and asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    path.write_bytes(b"ab")  # damaged: it comes again
    assert hub.fetch("name==1.0", ABC).read_bytes() == b"abc" and len(asked) == 2
    assert names(tmp_path / "cache") == ["name==1.0"]


@pytest.mark.parametrize(
    "trouble, words",
    [
        (dict(stderr="...\nTHESE PACKAGES DO NOT MATCH THE HASHES\n..."), "sha256 differs"),
        (
            dict(stderr="tried\nERROR: No matching distribution found\n"),
            "No matching distribution found; check",
        ),
        (dict(stderr=""), "pip failed; check"),
        (dict(error=subprocess.TimeoutExpired("pip", 120)), "check the network"),
    ],
)
def test_a_failed_fetch_is_one_clear_line_and_leaves_nothing(tmp_path, monkeypatch, trouble, words):
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path / "cache"))
    pip(monkeypatch, **trouble)
    with pytest.raises(UserError) as raised:
        hub.fetch("name==1.0", ABC)
    assert words in str(raised.value) and "name==1.0" in str(raised.value) and "\n" not in str(raised.value)
    assert names(tmp_path / "cache") == []


def test_progress_says_how_far_how_fast_and_how_long_still(capsys, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(common.time, "monotonic", clock.read)
    with_total, without = (
        common.Progress("reading", 2000, form=common.size),
        common.Progress("asking", unit=" x"),
    )
    for clock.seconds in (4.0, 8.0, 10.0):  # a plain line after five seconds, and not at once another
        with_total.add(400)
        without.add(400)
    with_total.done()
    assert capsys.readouterr().err.splitlines() == [
        "reading: 800 B of 2 kB, 100 B/s, 12s left", "asking: 800, 100 x/s", "reading: 1.2 kB in 10s"
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Runs


def model_of(loss, norm, clock):
    """What Run asks of a model and an optimizer: the results of the last step, and what time it is."""
    ops = SimpleNamespace(
        now=clock.read,
        elapsed=lambda start, end: end - start,
        read_later=lambda array: lambda: array,
    )
    config = SimpleNamespace(n_params=lambda: 0)
    saves = lambda d: (d / "config.json").touch()
    model = SimpleNamespace(ops=ops, exact=np.float32, config=config, save_pretrained=saves)
    load_and_save = dict(load=lambda path: None, collect=lambda: None, save=lambda path: None)
    return model, SimpleNamespace(loss=loss, norm=norm, **load_and_save)


class Clock:
    seconds = 0.0

    def read(self):
        return self.seconds


def run_of(place, steps=10, checkpoint=None, clock=None, **flags):
    """A Run that has begun, of a model whose loss is run.loss[0] and whose norm is run.norm[0]."""
    settings = dict(out=place, outlier_z=0.0, save_every=0, keep=2, lr=1e-3, steps=steps)
    run = common.Run("train.py", Namespace(**{**settings, **flags, "out": str(place)}), checkpoint)
    run.loss, run.norm = np.zeros(1, np.float32), np.zeros(1, np.float32)
    model, optimizer = model_of(run.loss, run.norm, clock or Clock())
    world = SimpleNamespace(size=1, rank=0, stop=0, catch_signals=lambda: None)
    run.begin(world, model, optimizer, SimpleNamespace(save=lambda place: None), steps)
    return run


def test_the_log_is_valid_json_whatever_the_numbers(tmp_path):
    run = run_of(tmp_path / "run")
    run.log("step", step=1, loss=math.nan, norm=math.inf, lr=1e-3, skipped=True, text='é "\n', z=-math.inf)
    run.log("eval", step=1, loss=0.5)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    start, one, two = (json.loads(line, parse_constant=refuse) for line in lines)
    assert start["event"] == "start" and start["flags"]["lr"] == 1e-3
    assert one == {"event": "step", "step": 1, "loss": None, "norm": None, "lr": 1e-3, "skipped": True,
                   "text": 'é "\n', "z": None}  # fmt: skip
    assert [start, one, two] == common.read_log(tmp_path / "run")


def checkpoint_of(run, step, **state):
    """A checkpoint with nothing but its state."""
    place = run / f"step_{step:06d}"
    place.mkdir(parents=True)
    (place / "config.json").touch()
    (place / "state.json").write_text(json.dumps({"step": step, **state}))
    return place


def test_the_log_forgets_what_will_come_again_and_mends_a_cut_line(tmp_path):
    """What came after the checkpoint is done again; an evaluation at its step is not."""
    events = [{"event": "step", "step": step, "loss": 1.0} for step in range(1, 6)]
    events.insert(3, {"event": "checkpoint", "step": 3})
    events.insert(4, {"event": "eval", "step": 3, "loss": 9.0})
    lines = "".join(json.dumps(event) + "\n" for event in events)
    checkpoint = checkpoint_of(tmp_path, 3)
    (tmp_path / "log.jsonl").write_text(lines + '{"event": "st')
    run = run_of(tmp_path, checkpoint=checkpoint)
    run.log("step", step=4, loss=2.0)
    kept = common.read_log(tmp_path)
    assert [(e["event"], e["step"]) for e in kept] == [("step", 1), ("step", 2), ("step", 3),
        ("checkpoint", 3), ("eval", 3), ("start", 3), ("step", 4)]  # fmt: skip
    assert kept[-1]["loss"] == 2.0
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_a_log_with_strange_lines_can_be_read(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "step", "step": 1}\n\n\0\0\0\n\xff\xfe{}\n{"eve')
    assert [event["step"] for event in common.read_log(tmp_path)] == [1]
    run_of(tmp_path, checkpoint=checkpoint_of(tmp_path, 5))
    with pytest.raises(UserError, match=r"missing has no log\.jsonl"):
        common.read_log(tmp_path / "missing")


def test_each_line_of_the_log_is_written_at_once(tmp_path):
    run = run_of(tmp_path / "run")
    run.log("sample", step=1, text="word " * 10_000)
    assert len(common.read_log(tmp_path / "run")) == 2


def test_a_run_sweeps_up_after_a_killed_process(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 2)
    for name in (".step_000003.77.part", ".step_000999.77.before.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / ".log.jsonl.77.part").touch()
    run_of(tmp_path, checkpoint=checkpoint)
    assert names(tmp_path) == ["lock", "log.jsonl", "step_000002"]


def test_a_run_is_one_process_s_at_a_time(tmp_path):
    run = run_of(tmp_path / "run")
    with pytest.raises(UserError, match="another process is training"):
        run_of(tmp_path / "run")
    checkpoint = checkpoint_of(tmp_path / "run", 3)
    with pytest.raises(UserError, match="another process is training"):
        run_of(tmp_path / "run", checkpoint=checkpoint)
    run.lock.close()
    with pytest.raises(UserError, match="exists; go on with --resume"):
        run_of(tmp_path / "run")
    run_of(tmp_path / "run", checkpoint=checkpoint)
    with pytest.raises(UserError, match="has all its 3 steps; give more --steps"):
        run_of(tmp_path / "run", steps=3, checkpoint=checkpoint)


def test_a_run_starts_where_its_checkpoint_is_and_saves_when_it_is_due(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 3, skipped=2)
    run = run_of(tmp_path, steps=10, checkpoint=checkpoint, save_every=4, keep=9)
    steps = []
    for step in run.steps():
        steps.append(step)
        run.save_if_due(step + 1)  # earlier than usual, and then no second time
        assert (tmp_path / f"step_{step + 1:06d}").exists() == (step + 1 in (4, 8, 10))
    assert steps == [3, 4, 5, 6, 7, 8, 9]
    assert [e["step"] for e in common.read_log(tmp_path) if e["event"] == "checkpoint"] == [4, 8, 10]
    assert [d.name for d in common.checkpoints(tmp_path)] == [
        "step_000003", "step_000004", "step_000008", "step_000010"]  # fmt: skip
    assert [common.read_state(d).get("skipped") for d in common.checkpoints(tmp_path)] == [2, 2, 2, 2]
    for every, due in ((0, []), (1, [7, 8, 9, 10]), (4, [8, 10]), (99, [10])):
        assert [done for done in (7, 8, 9, 10) if run.is_due(done, every)] == due


def test_a_stop_is_a_checkpoint_and_an_exit_status_except_after_the_last_step(tmp_path, capsys):
    for signal_number, last in ((2, 4), (15, 5)):
        run = run_of(tmp_path / str(signal_number), steps=6)
        with pytest.raises(SystemExit) as ended:
            for step in run.steps():
                run.world.stop = signal_number if step >= last - 1 else 0
        assert ended.value.code == 128 + signal_number
        assert common.newest_checkpoint(run.directory).name == f"step_00000{last}"
        command = f"python train.py --out {run.directory} --resume"
        assert capsys.readouterr().err == f"stopped after step {last}; go on with: {command}\n"
    run = run_of(tmp_path / "last", steps=6)
    for step in run.steps():
        run.world.stop = 2 if step == 5 else 0
    assert common.newest_checkpoint(run.directory).name == "step_000006"


def losses_with_steps(n, seed=0):
    return [[step, float(value)] for step, value in enumerate(np.random.default_rng(seed).normal(5, 0.1, n))]


def test_limits_are_standard_deviations_above_the_steps_before_the_last(tmp_path):
    run = run_of(tmp_path / "run", outlier_z=7.0)
    run.losses, run.norms = losses_with_steps(300), losses_with_steps(300, seed=1)
    for step, first, last in ((300, 171, 298), (301, 172, 299), (200, 71, 198), (34, 0, 32), (33, 0, 31)):
        expected = []
        for pairs in (run.norms, run.losses):  # the norm's limit comes first
            values = [value for _, value in pairs[first : last + 1]]
            expected.append(np.float32(np.mean(values) + 7 * np.std(values)))
        assert list(run.limits(step)) == pytest.approx(expected, rel=1e-6), step
        assert all(limit == np.float32(limit) for limit in run.limits(step)), "no number of the device"
    assert list(run.limits(32)) == [math.inf, math.inf]  # 31 values say too little
    assert list(run.limits(300, since=268)) == [math.inf, math.inf]
    values = [value for _, value in run.losses[267:299]]
    assert run.limits(300, since=267)[1] == pytest.approx(np.mean(values) + 7 * np.std(values), rel=1e-6)
    run.losses = [[step, 1.0] for step in range(100)]
    assert run.limits(100)[1] == np.float32(1.0 + 7e-6)  # a constant past has no deviation to divide by
    off = run_of(tmp_path / "off", outlier_z=0.0)
    off.losses = losses_with_steps(300)
    assert list(off.limits(300)) == [math.inf, math.inf]


def take(run, step, loss, norm=1.0):
    """A step of the loop with this loss and norm."""
    run.step_began, run.began = run.model.ops.now(), 0.0
    run.loss[0], run.norm[0] = loss, norm
    run.report(step, 1e-3)
    run.flush()
    return common.read_log(run.directory)[-1]


def test_a_step_at_its_limit_is_taken_and_one_above_is_not(tmp_path):
    run = run_of(tmp_path / "run", steps=99, outlier_z=2.0)
    run.losses, run.norms = losses_with_steps(40), losses_with_steps(40, seed=1)
    norm_limit, loss_limit = run.limits(40)
    above = lambda value: float(np.nextafter(np.float32(value), np.float32(math.inf)))
    for values in ((above(loss_limit), 5.0), (5.0, above(norm_limit)), (math.nan, 5.0), (5.0, math.inf)):
        assert take(run, 40, *values)["skipped"] and run.losses[-1][0] == run.norms[-1][0] == 39
    assert run.skipped == run.skipped_in_a_row == 4
    taken = take(run, 40, loss_limit, norm_limit)
    assert not taken["skipped"] and taken["loss_z"] == pytest.approx(2.0, abs=1e-4)
    assert run.losses[-1] == [40, loss_limit] and run.norms[-1] == [40, norm_limit]
    assert run.skipped == 4 and run.skipped_in_a_row == 0
    assert not take(run, 41, -1e9)["skipped"]  # far below is good news
    for step in range(42, 400):
        take(run, step, 5.0, 5.0)
    assert len(run.losses) == len(run.norms) == 129  # 128 to compare with, and the last, which is too young


def test_ten_skipped_steps_in_a_row_end_the_run_and_nine_do_not(tmp_path):
    run = run_of(tmp_path / "run", steps=99)
    for step in range(9):
        take(run, step, math.nan)
    take(run, 9, 1.0)
    for step in range(10, 19):
        take(run, step, math.nan)
    with pytest.raises(UserError, match=r"10 steps in a row .* last nan and 1; .* Lower --lr and --resume"):
        take(run, 19, math.nan)
    assert run.skipped == 19


def test_losses_and_norms_come_back_with_their_steps(tmp_path):
    checkpoint = checkpoint_of(tmp_path, 51, losses=[[48, 2.0], [50, 3.5]], norms=[[50, 1.0]])
    run = run_of(tmp_path, steps=99, checkpoint=checkpoint)
    assert run.losses == [[48, 2.0], [50, 3.5]] and run.norms == [[50, 1.0]]


def test_a_line_says_how_far_how_fast_and_how_long_still(tmp_path, capsys, monkeypatch):
    """Half a second a step, of which the device needs 0.4; the line of a step comes with the next one."""
    clock = Clock()
    monkeypatch.setattr(common.time, "monotonic", lambda: 100 + clock.seconds * 1.25)
    run = run_of(tmp_path, steps=10, checkpoint=checkpoint_of(tmp_path, 4), clock=clock)
    run.flops_per_token, run.peak, run.peak_is = 50.0, 20_000.0, "MFU"
    lines = []
    for step in run.steps():
        clock.seconds += 0.4
        run.loss[0], run.norm[0] = 2.5, 1.25
        run.report(step, 1e-3, tokens=80, shown="reward 1", reward=1.0)
        run.loss = run.optimizer.loss = np.zeros(1, np.float32)  # a report has read it by now
        run.norm = run.optimizer.norm = np.zeros(1, np.float32)
        lines.append(capsys.readouterr().err)
        if step == 6:
            break
    run.flush()
    lines.append(capsys.readouterr().err)
    same = "reward 1 | loss 2.5000 | norm 1.2500 | lr 1.00e-03 | 400 ms | 200 tok/s | 50% MFU"
    assert lines == ["", f"step 5/10 | {same} | 2.5s left\n", f"step 6/10 | {same} | 2.0s left\n",
                     f"step 7/10 | {same} | 1.5s left\n"]  # fmt: skip
    step = common.read_log(tmp_path)[-1]
    assert step == dict(event="step", step=7, lr=1e-3, seconds=pytest.approx(0.4), loss=2.5, norm=1.25,
                        skipped=False, speed=pytest.approx(200), utilization=pytest.approx(0.5),
                        reward=1.0)  # fmt: skip


def test_a_step_without_an_update_has_neither_loss_nor_norm(tmp_path, capsys):
    run = run_of(tmp_path / "run")
    run.step_began, run.began = 0.0, 0.0
    run.report(0, 1e-3, updated=False)
    run.say("text that stays")
    line, text = capsys.readouterr().err.splitlines()
    assert line.startswith("step 1/10 | lr 1.00e-03 | ") and text == "text that stays"
    event = common.read_log(run.directory)[-1]
    assert "loss" not in event and "norm" not in event and "skipped" not in event


def test_checkpoints_are_found_in_order_and_others_are_not(tmp_path):
    for name in (
        "step_000900",
        "step_000010",
        "step_1000000",
        "step_999999",
        "step_x",
        "other",
        ".step_000011.5.part",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / "step_000950").mkdir()  # without a config.json
    assert [d.name for d in common.checkpoints(tmp_path)] == [
        "step_000010",
        "step_000900",
        "step_999999",
        "step_1000000",
    ]
    assert common.newest_checkpoint(tmp_path).name == "step_1000000"
    assert common.newest_checkpoint(tmp_path / "step_000010").name == "step_000010"
    assert common.checkpoints(tmp_path / "missing") == []
    for place in (tmp_path / "step_000950", tmp_path / "missing"):
        with pytest.raises(UserError, match="is no checkpoint and has none"):
            common.newest_checkpoint(place)


@pytest.mark.parametrize("content", [None, b"", b'{"step": ', b"\xff", b"[1]"])
def test_a_state_that_cannot_be_read_is_a_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json is missing or damaged; delete"):
        common.read_state(tmp_path)


KILLED = """
import os, random, shutil, signal, sys, time, traceback
from argparse import Namespace
from pathlib import Path
import numpy as np
import common, gpt2
from distributed import World
from tokenizer import Tokenizer

run, tokenizer = Path(sys.argv[1]), Tokenizer.bytes()
model = gpt2.GPT2(gpt2.GPT2Config(2, 2, 32, 16, tokenizer.vocab_size))
optimizer = gpt2.AdamW(model)


def begin():
    # As a new process does: what was left half-written is gone.
    found = common.checkpoints(run)
    if not found:
        shutil.rmtree(run, ignore_errors=True)
    flags = Namespace(out=str(run), outlier_z=0.0, steps=10**6)
    begun = common.Run("train.py", flags, found[-1] if found else None)
    begun.begin(World(0, 1), model, optimizer, tokenizer, 10**6)
    return begun


def save_for_ever():
    begun = begin()
    step = begun.start
    while True:
        step += 1
        optimizer.steps.fill(step)
        for array in (model.flat_params, optimizer.m, optimizer.v):
            array.fill(step)
        begun.log("step", step=step, loss=1 / step)
        common.save_checkpoint(run, step, model, tokenizer, optimizer, keep=2, losses=[[step, 0.5]] * 100)


def check():
    for place in common.checkpoints(run):
        step = int(place.name[5:])
        loaded = gpt2.GPT2.from_pretrained(place)
        moments = gpt2.AdamW(loaded)
        moments.load(place / "optimizer.safetensors")
        Tokenizer.load(place)
        assert all((array == step).all() for array in loaded.params.values())
        assert (moments.m == step).all() and (moments.v == step).all() and moments.steps == step
        assert common.read_state(place) == {"step": step, "losses": [[step, 0.5]] * 100}
    log = common.read_log(run) if (run / "log.jsonl").exists() else []
    steps = [event["step"] for event in log if event["event"] == "step"]
    assert steps == list(range(1, len(steps) + 1)), steps
    newest = int(common.checkpoints(run)[-1].name[5:]) if common.checkpoints(run) else 0
    assert newest <= len(steps)
    return newest


rng, reached = random.Random(0), [0]
began = time.perf_counter()
common.save_checkpoint(run, 1, model, tokenizer, optimizer, keep=2)
one_save = time.perf_counter() - began
shutil.rmtree(run)
while len(reached) <= 25 or reached[-1] < 10 and len(reached) <= 250:
    child = os.fork()
    if child == 0:
        try:
            save_for_ever()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    time.sleep(rng.uniform(1, 4) * one_save)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
    reached.append(check())
    assert reached[-1] >= reached[-2], "a checkpoint was lost"
part = lambda: sum(path.name.endswith(".part") for path in run.iterdir())
left = part()
begin()
print(reached[-1], left, part(), check())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_kill_9_while_saving_never_costs_the_newest_checkpoint(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    reached, left_over, left_at_the_end, newest = map(int, done.stdout.split())
    assert reached >= 10, "the kills came so soon that nothing was tested"
    assert left_at_the_end == 0, f"of {left_over} half-written things some stay for ever"
    assert newest == reached


def test_save_checkpoint_keeps_the_newest(tmp_path):
    saves = SimpleNamespace(save_pretrained=lambda d: (d / "config.json").touch(), save=lambda path: None)
    save = lambda step, keep: common.save_checkpoint(tmp_path, step, saves, saves, saves, keep, word="kept")
    assert [save(step, 3).name for step in (1, 2, 3, 4, 5)][-1] == "step_000005"
    assert names(tmp_path) == ["step_000003", "step_000004", "step_000005"]
    assert common.read_state(tmp_path / "step_000004") == {"step": 4, "word": "kept"}
    save(6, 1)
    assert names(tmp_path) == ["step_000006"]
    assert script.tree(tmp_path / "step_000006")["config.json"] == b""


def test_out_of_memory_is_one_line():
    done = script.run(lambda argv: np.empty(1 << 62, np.uint8))
    assert script.refused(done, "not enough memory", "ask for less at once")
    assert script.refused(script.run(lambda argv: (_ for _ in ()).throw(MemoryError)), "not enough memory")


def test_bytes_that_are_no_text_end_no_script(tmp_path):
    code = "import common; common.run(lambda: print(common.printable(input()), 'größer \u20ac \\x1b'))"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    for encoding in ("latin-1", "ascii", "utf-8"):
        environment["PYTHONIOENCODING"] = encoding
        done = subprocess.run(
            [sys.executable, "-c", code], input=b"caf\xe9 \xff\x1b]0;x\n", capture_output=True, cwd=ROOT,
            env=environment, check=False,
        )  # fmt: skip
        assert done.returncode == 0 and not done.stderr, (encoding, done)
        assert b"\x1b]" not in done.stdout


INTERRUPTED = """
import os, signal, subprocess, sys, threading
import common
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
thread = threading.Thread(target=sys.stdin.read, daemon=True)  # it blocks no signal
thread.start()
child = [sys.executable, "-c", "import os; os.kill(os.getpid(), 2); print('the child lives', flush=True)"]
try:
    with common.ctrl_c_waits():
        if sys.argv[1] == "to the thread":
            signal.pthread_kill(thread.ident, signal.SIGINT)
        elif sys.argv[1] == "to the process":
            os.kill(os.getpid(), signal.SIGINT)
        subprocess.run(child)
        print("the block ends", flush=True)
    print("nothing came")
except KeyboardInterrupt:
    print("interrupted")
    print(*signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


@pytest.mark.parametrize("sent", ["to the process", "to the thread", "not at all"])
def test_ctrl_c_waits_until_all_processes_are_started(sent):
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, sent],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [line.strip() for line in process.stdout]
    end = ["nothing came"] if sent == "not at all" else ["interrupted", ""]
    assert lines == ["the child lives", "the block ends", *end]
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def test_free_memory_is_what_a_container_leaves(tmp_path, monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 1000000 kB\n",
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/memory.max": "max\n",
        "/sys/fs/cgroup/a/memory.max": "250000\n",
        "/sys/fs/cgroup/a/memory.current": "200000\n",
        "/sys/fs/cgroup/a/memory.stat": "anon 5\ninactive_file 30000\n",
    }
    monkeypatch.setattr(threads, "text_of", lambda path: files.get(str(path), ""))
    assert threads.free_memory() == 80000
    files["/sys/fs/cgroup/a/memory.max"] = "max\n"
    assert threads.free_memory() == 1024000000
    files |= {"/proc/self/cgroup": "7:cpu:/x\n4:memory:/x\n"}
    files |= {"/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "5000\n"}
    files |= {"/sys/fs/cgroup/memory/x/memory.usage_in_bytes": "9000\n"}
    assert threads.free_memory() == 0
    files.clear()
    assert threads.free_memory() is None
