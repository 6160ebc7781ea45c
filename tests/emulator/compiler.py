"""From the text of a .cu file to a shared library that runs on the CPU.

Read emulator.h first (what is put in front of the text) and launcher.py afterwards (what is done with the
library). Libraries are kept in a cache directory under a name that is a hash of everything that went in.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
INCLUDE = HERE / "include"
SANITIZE = os.environ.get("EMULATOR_SANITIZE", "0") != "0"
KEEP_DAYS = 7  # libraries that nobody used for so long are removed from the cache,
KEEP_HOURS = 1  # and after this time those of the same kernels from an earlier text of their source


class CompileError(Exception):
    """The .cu file is no valid program; the message is the compiler's, with file and line."""


def cache_directory():
    """Where compiled kernels stay: $HANDMADE_CACHE/emulator, otherwise .cache beside this file."""
    parent = os.environ.get("HANDMADE_CACHE")
    directory = Path(parent) / "emulator" if parent else HERE / ".cache"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@functools.cache
def compiler():
    """The command of a C++17 compiler, as a list: $CXX, g++, clang++, c++, or the ziglang wheel's."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in ("g++", "clang++", "c++"):
        if shutil.which(name):
            return [name]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "c++"]
    raise CompileError(
        "no C++ compiler: install g++ or clang++, or `pip install ziglang`, or set CXX to the command of one"
    )


@functools.cache
def compiler_version():
    """The first lines of `c++ --version`: part of the cache key, and tells gcc from clang."""
    try:
        done = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CompileError(f"the C++ compiler {shlex.join(compiler())} does not run: {error}") from None
    return done.stdout


def sanitizer_environment():
    """What must be set before Python starts, if its libraries are compiled with -fsanitize=address."""
    names = ["libclang_rt.asan-x86_64.so"] if "clang" in compiler_version() else ["libasan.so", "libubsan.so"]
    paths = [_output([*compiler(), f"-print-file-name={name}"]).strip() for name in names]
    options = "detect_leaks=0:detect_stack_use_after_return=0:handle_segv=0:handle_sigbus=0:handle_sigfpe=0"
    return {"LD_PRELOAD": ":".join(paths), "ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}


@functools.cache
def flags(races=False):
    """The options for every kernel; what makes errors loud comes last.

    With -O1 a kernel compiles in three quarters of the time of -O2, and runs 1.15 times as long. On a fresh
    machine the tests spend five times as long compiling as running.
    """
    clang = "clang" in compiler_version()
    common = [
        "-std=c++17",
        "-O1",
        "-g1",
        "-gdwarf-4",
        "-fPIC",
        "-fvisibility=hidden",
        "-fno-exceptions",
        "-fno-rtti",
    ]
    common += ["-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
    common += ["-fno-strict-aliasing", "-fwrapv", "-fno-threadsafe-statics", "-fno-stack-protector"]
    common += ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-unused", "-Wno-sign-compare"]
    if not clang:
        common += ["-fno-gnu-unique", "-fcf-protection=none", "-fno-ipa-icf"]
    if races:  # the calls that this inserts go to the end of emulator.h, not to libtsan
        common += ["-fsanitize=thread", "-DEMULATOR_RACES"]
    if SANITIZE:
        return [
            *common,
            "-fsanitize=address,undefined",
            "-fno-sanitize=vptr,signed-integer-overflow",
            "-fno-sanitize-recover=undefined",
        ]
    # One trapping instruction per check and no library: the handler in runtime.cpp makes an error of it.
    common += ["-fsanitize=alignment,bounds,integer-divide-by-zero,shift"]
    return common + (["-fsanitize-trap=all"] if clang else ["-fsanitize-undefined-trap-on-error"])


def _output(command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def _run(command, what):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(
            f"{what} does not compile:\n{done.stderr.strip()}\n(command: {shlex.join(command)})"
        )


def _build(sources, name, what, extra=(), races=False, link=(), kernels=()):
    """Compile {file name: text}, the first one being the program, into a library; return its path.

    Nothing happens if the cache has it. A library is written beside its place and renamed, so that several
    processes can do this at once. It is named after the source, a hash of kernels and options, and a hash of
    everything.
    """
    options = [*flags(races), *extra]
    words = [compiler_version(), *compiler(), *options, *link, *sources, *sources.values()]
    variant = f"{name}-{_hash([*options, *link, *kernels], 8)}"
    target = cache_directory() / f"{variant}-{_hash([*words, _headers(), _machine()], 20)}.so"
    if target.exists():
        os.utime(target)
        return target
    with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary:
        for file, text in sources.items():
            (Path(temporary) / file).write_text(text)
        program, result, library = (
            str(Path(temporary) / file) for file in (next(iter(sources)), "program.o", "library.so")
        )
        include = ["-I", temporary, "-I", str(INCLUDE)]
        if kernels:
            include += _parsed_headers(races)
        _run([*compiler(), *options, *include, "-x", "c++", "-c", program, "-o", result], what)
        link = [*link, "-fsanitize=address,undefined"] if SANITIZE else link
        _run([*compiler(), *link, "-shared", result, "-o", library, "-lm"], what)
        os.replace(library, target)
    _prune(target.parent, variant)
    return target


def _parsed_headers(races):
    """Options that bring the emulator's headers already parsed. A small kernel takes half of the time then.

    For gcc alone, which wants them as headers.h.gch beside headers.h, and parsed with the same flags.
    """
    if "clang" in compiler_version():
        return []
    words = [compiler_version(), *compiler(), *flags(races), _headers(), _machine()]
    header = cache_directory() / f"headers-{_hash(words, 20)}.h"
    parsed = header.with_suffix(".h.gch")
    if parsed.exists():
        os.utime(parsed)
        return ["-include", str(header)]
    header.write_text('#include "cuda_bf16.h"\n')  # which includes emulator.h
    with tempfile.TemporaryDirectory(dir=cache_directory()) as temporary:
        result = str(Path(temporary) / "headers.h.gch")
        command = [*compiler(), *flags(races), "-I", str(INCLUDE), "-x", "c++-header", str(header)]
        _run([*command, "-o", result], "the emulator")
        os.replace(result, parsed)
    return ["-include", str(header)]


def _hash(words, length):
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:length]


def _prune(directory, variant):
    """Remove what has not been used for KEEP_DAYS days, and of this variant for KEEP_HOURS hours."""
    for path in [*directory.glob("*.so"), *directory.glob("*.h.gch")]:
        hours = KEEP_HOURS if path.name.startswith(f"{variant}-") else KEEP_DAYS * 24
        with contextlib.suppress(OSError):  # another process may have removed it
            if time.time() - path.stat().st_mtime > hours * 3600:
                path.unlink()


@functools.cache
def _machine():
    """What -march=native means here: a cache may travel to another machine."""
    with contextlib.suppress(OSError):
        found = re.findall(
            r"^(?:flags|Features|model name)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        return platform.machine() + "".join(sorted(set(found)))
    return platform.machine()


@functools.cache
def _headers():
    return "".join(path.read_text() for path in sorted(INCLUDE.iterdir()))


ATTRIBUTE = r"(?:(?:__align__|alignas)\s*\([^()]*\)\s*)?"


def _translate(text):
    """What C++ and the emulator's headers cannot say themselves. Line numbers stay.

    `extern __shared__ T name[]`, which is no C++, becomes a pointer to the dynamic shared memory of the block
    that the thread belongs to.
    """
    if match := re.search(r"^.*\b(asm|__asm__)\b\s*(volatile)?\s*\(.*$", text, re.MULTILINE):
        raise CompileError(
            "inline assembly belongs in ptx.cuh and ptx_hopper.cuh, of which the emulator has its own: "
            + match[0].strip()
        )
    bare = re.sub(r"//[^\n]*", "", text)
    for before, name in re.findall(r"(\w+)\s+(?:const\s+)?TensorMap\s+(\w+)\s*[,)]", bare):
        if before != "__grid_constant__":
            raise CompileError(
                f"the parameter {name} must be a `const __grid_constant__ TensorMap`, or a reference"
            )
    pattern = rf"\bextern\s+__shared__\s+{ATTRIBUTE}([\w:]+(?:\s+[\w:]+)*?)\s+{ATTRIBUTE}(\w+)\s*\[\s*\]"
    text = re.sub(pattern, r"\1* const \2 = (\1*)emulator::dynamic_shared", text)
    if match := re.search(r"^.*\bextern\s+__shared__\b.*$", text, re.MULTILINE):
        raise CompileError(
            f"write it as extern __shared__ __align__(16) unsigned char name[]: {match[0].strip()}"
        )
    return text


def _collect(text, directories, found):
    """Add to `found` the translated text of every file that `text` includes and include/ does not have."""
    for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE):
        if name in found or (INCLUDE / name).exists():
            continue
        for directory in directories:
            path = Path(directory) / name
            if path.exists():
                inner = path.read_text()
                found[name] = f'#line 1 "{path}"\n{_translate(inner)}'
                _collect(inner, directories, found)
                break


def _origin(code, directories):
    """For error messages: the path of the .cu file whose text this is, if an include directory has it."""
    for directory in directories:
        for path in sorted(Path(directory).glob("*.cu")):
            if path.read_text() == code:
                return str(path)
    return "kernel.cu"


PARENTHESES = r"\((?:[^()]|\([^()]*\))*\)"


def _kernels(code, before=""):
    """[(what stands between __global__ and the name of a kernel, its name)] for the kernels of a text."""
    bare = re.sub(r"//[^\n]*|/\*.*?\*/", " ", code, flags=re.DOTALL)
    words = rf"(?:(?:__launch_bounds__|__cluster_dims__)\s*{PARENTHESES}\s*)*"
    return re.findall(rf"{before}__global__\s+({words}void\s+{words})(\w+)\s*\(", bare)


def kernel_names(code, plain=True):
    """The names of all kernels of a text; with `plain`, of the extern "C" ones, which are no templates."""
    return [name for _, name in _kernels(code, r'extern\s+"C"\s+' if plain else "")]


def cluster_sizes(code):
    """{name: blocks in a cluster} of the kernels with __cluster_dims__, which must be numbers: (2, 1, 1)."""
    sizes = {}
    for words, name in _kernels(code):
        if match := re.search(rf"__cluster_dims__\s*({PARENTHESES})", words):
            numbers = re.fullmatch(r"\(\s*([1-8])\s*(?:,\s*1\s*){0,2}\)", match[1])
            if not numbers:
                raise CompileError(f"{name}: __cluster_dims__{match[1]} is not of the form (2, 1, 1)")
            sizes[name] = int(numbers[1])
    return sizes


def compile_module(code, options=(), names=(), capability=90):
    """Compile `code` for the kernels `names`; -D and -I count among the options. Returns the path."""
    options = [option.strip() for option in options]
    if re.search(r'#\s*include\s*"(ptx_)?hopper.cuh"', code) and not any(
        "_90a" in option for option in options
    ):
        raise CompileError("a kernel for Hopper needs the option -arch=sm_90a")
    directories, macros = [], [f"-D__CUDA_ARCH__={capability}0"]
    words = iter(options)
    for word in words:
        for flag, long in (("-I", "--include-path="), ("-D", "--define-macro=")):
            if word.startswith(long) or word.startswith(flag):
                value = word[len(long) :] if word.startswith(long) else word[len(flag) :]
                value = value.strip() or next(words)
                directories.append(value) if flag == "-I" else macros.append(f"-D{value}")
    origin = _origin(code, directories)
    glue = ",\n".join(f"emulator::describe({name})" for name in names)
    program = (
        f'#include "emulator.h"\n#include "cuda_bf16.h"\n#line 1 "{origin}"\n{_translate(code)}\n'
        '#line 1 "the list of kernels that were asked for"\n'
        'extern "C" __attribute__((visibility("default"))) emulator::Kernel emulator_kernels[] = {\n'
        f"{glue}}};\n"
    )
    sources = {"program.cpp": program}
    _collect(code, directories, sources)
    races = os.environ.get("EMULATOR_RACES", "0") != "0"
    return _build(sources, Path(origin).stem, Path(origin).name, macros, races, kernels=names)


def compile_runtime():
    """Compile runtime.cpp. Once it is loaded, whoever opens libcuda.so.1 gets it: it makes tensor maps."""
    sources = {"runtime.cpp": (HERE / "runtime.cpp").read_text()}
    return _build(sources, "runtime", "runtime.cpp", link=["-Wl,-soname,libcuda.so.1"])


def open_library(path, instance=0):
    """Load a library; instance 1, 2, ... is a copy of it with variables of its own."""
    if instance:
        copy = path.with_suffix(f".{instance}.so")
        if not copy.exists():
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as temporary:
                temporary.write(path.read_bytes())
            os.chmod(temporary.name, 0o755)
            os.replace(temporary.name, copy)
        path = copy
    return ctypes.CDLL(str(path))


def symbols(path, functions=False):
    """{name: (address in the file, bytes)} of a library's variables, or functions: its symbol table."""
    data = path.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise CompileError(f"{path} is not a 64-bit ELF library: the emulator runs on Linux only")
    (offset,) = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(count)]
    found = {}
    for section in sections:
        if section[1] != 2:  # SHT_SYMTAB
            continue
        names = sections[section[6]][4]
        for at in range(section[4], section[4] + section[5], 24):
            name, info, _, _, value, length = struct.unpack_from("<IBBHQQ", data, at)
            if info & 15 == (2 if functions else 1) and length:  # STT_FUNC, STT_OBJECT
                found[data[names + name : data.index(b"\0", names + name)].decode()] = (value, length)
    if not found:
        raise CompileError(f"{path} has no symbol table: was it stripped by the linker?")
    return found


def source_line(path, offset):
    """'file:line' of an instruction of a library, if the machine has addr2line; otherwise ''."""
    tool = shutil.which("addr2line") or shutil.which("llvm-symbolizer")
    if not tool:
        return ""
    command = [tool, "-i", "-e", str(path), hex(offset)]
    lines = _output(command).splitlines()
    places = [re.sub(r" \(discriminator.*\)", "", line) for line in lines if re.search(r":\d+", line)]
    ours = [place for place in places if not place.startswith(str(INCLUDE))]
    return " <- ".join(place.rpartition("/")[2] for place in ours or places)
