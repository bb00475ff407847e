"""build: compile the C kernels with the user's compiler, once, into a cache folder. Needs nothing but the standard
library, so that setup.py can do it at install.

The file's name is a hash of the sources, the compiler's version and the flags: another compiler or another source is
another file. It is linked in a folder of its own and renamed into place, so two processes may build at once.

Environment: CC names the compiler (cc, gcc or clang by default), QLORA_CACHE the cache folder
($XDG_CACHE_HOME/qlora-anatomy, or ~/.cache/qlora-anatomy, by default).
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=c11", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno")
AVX512 = ("-DISA_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
ISA_FLAGS = {
    "portable": (),
    "avx2": ("-DISA_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "avx512": AVX512,
    "avx512_bf16": (*AVX512, "-DISA_AVX512_BF16", "-mavx512bf16"),
}
OPENMP = ("-fopenmp",)
NEWEST = "avx512_bf16"  # which compilers and assemblers know since about 2020
OF_NEWEST = "#include <immintrin.h>\n__m512 f(__m512 a, __m512bh b) { return _mm512_dpbf16_ps(a, b, b); }\n"
SECONDS = 300


class BuildError(Exception):
    """Why there are no C kernels, in one line."""


def isas() -> tuple[str, ...]:
    """The instruction sets compiled on this kind of machine, the fastest last."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return tuple(ISA_FLAGS) if on_x86 else ("portable",)


def build() -> Path:
    """The shared library, from the cache or compiled now. Raises BuildError."""
    compiler = find_compiler()
    folder = cache_folder()
    library = folder / f"kernels-{source_key(compiler)}.so"
    if library.exists():
        return library
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            os.replace(_compile(compiler, Path(temporary)), library)
    except OSError as error:
        raise BuildError(f"the cache folder {folder} cannot be written: {error}") from None
    return library


def find_compiler() -> list[str]:
    """The command of the C compiler. Raises BuildError when there is none."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        if shutil.which(asked[0]) is None:
            raise BuildError(f"CC names the compiler {asked[0]!r}, which is not there")
        return asked
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("there is no C compiler (cc, gcc or clang): install one, or name it in the variable CC")


def cache_folder() -> Path:
    if os.environ.get("QLORA_CACHE"):
        return Path(os.environ["QLORA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qlora-anatomy"


def source_key(compiler: list[str]) -> str:
    """A hash of everything the library depends on."""
    version = _run([*compiler, "--version"], "tell its version")
    parts = [version, platform.machine(), shlex.join(compiler), repr((FLAGS, OPENMP, ISA_FLAGS, isas()))]
    sources = sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])
    parts += [f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: list[str], folder: Path) -> Path:
    """Compile in `folder`; without OpenMP, on one thread, where the compiler has none, and without the newest
    instruction set where it does not know that."""
    openmp = OPENMP if _has_openmp(compiler, folder) else ()
    objects = {isa: folder / f"{isa}.o" for isa in isas() if isa != NEWEST or _knows_newest(compiler, folder)}
    commands = [
        [*compiler, *FLAGS, *openmp, *ISA_FLAGS[isa], "-c", str(HERE / "kernels.c"), "-o", str(path)]
        for isa, path in objects.items()
    ]
    commands.append([*compiler, *FLAGS, "-c", str(HERE / "cpuid.c"), "-o", str(folder / "cpuid.o")])
    with ThreadPoolExecutor() as pool:  # the instruction sets side by side
        list(pool.map(lambda command: _run(command, "compile the kernels"), commands))
    library = folder / "kernels.so"
    inputs = [*map(str, objects.values()), str(folder / "cpuid.o")]
    _run([*compiler, "-shared", *openmp, *inputs, "-o", str(library), "-lm"], "link the kernels")
    return library


def _has_openmp(compiler: list[str], folder: Path) -> bool:
    source = "#include <omp.h>\nint threads(void) { return omp_get_max_threads(); }\n"
    return _compiles(compiler, source, OPENMP, folder)


def _knows_newest(compiler: list[str], folder: Path) -> bool:
    return _compiles(compiler, OF_NEWEST, ISA_FLAGS[NEWEST], folder)


def _compiles(compiler: list[str], source: str, flags: tuple[str, ...], folder: Path) -> bool:
    probe = folder / "probe.c"
    probe.write_text(source, encoding="utf-8")
    try:
        _run([*compiler, "-shared", "-fPIC", *flags, str(probe), "-o", str(folder / "probe.so")], "compile a line")
    except BuildError:
        return False
    return True


def _run(command: list[str], purpose: str) -> str:
    """What the command prints. Raises BuildError with the first line it complained in."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} could not {purpose}: {error}") from None
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        complaint = next((line for line in lines if "error" in line.lower()), lines[0])
        raise BuildError(f"{command[0]} could not {purpose}: {complaint.strip()}")
    return done.stdout
