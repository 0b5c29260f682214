"""Builds the native kernels: `python -m tucka_runtime.kernels.native.build`, with a C++ compiler, Python's
headers and torch at hand.

One shared library goes into `built/` beside the sources, for the CPU at hand; with `--all` one for each instruction set
that a machine of this kind may have, for images that move. deploy/install.sh and the Dockerfile run this after the
installation, for torch, whose headers and libraries it needs, is not there while a wheel is built.
"""

import argparse
import platform
import signal
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

from tucka_runtime.kernels.native.library import FOLDER, SOURCES, capabilities, path_of

AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c")
# By the names of library.capabilities: what torch's headers call it, and the flags that torch is built with itself, but
# for the products in bf16.
X86 = {
    "AVX512_BF16": ("AVX512", (*AVX512, "-mavx512bf16")),
    "AVX512": ("AVX512", AVX512),
    "AVX2": ("AVX2", ("-mavx2", "-mfma", "-mf16c")),
}


Flags = tuple[str, tuple[str, ...]]


def variants() -> dict[str, Flags]:
    """What is built here, the best first."""
    return {**(X86 if platform.machine() in ("x86_64", "AMD64") else {}), "DEFAULT": ("DEFAULT", ())}


def compile_command(flags: Flags, source: Path, target: Path) -> list[str]:
    name, own = flags
    return [
        cpp_extension.get_cxx_compiler(),
        "-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-DNDEBUG", "-fno-math-errno", "-fno-trapping-math", *own,
        f"-DCPU_CAPABILITY={name}",
        f"-DCPU_CAPABILITY_{name}",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *(f"-isystem{path}" for path in [*cpp_extension.include_paths(), sysconfig.get_path("include")]),
        f"-I{SOURCES}",
        "-c", str(source), "-o", str(target),
    ]  # fmt: skip


def link_command(compiled: Path, target: Path) -> list[str]:
    libraries = (f"-L{path}" for path in cpp_extension.library_paths())
    return [
        cpp_extension.get_cxx_compiler(), "-shared", str(compiled), *libraries,
        "-ltorch_python", "-ltorch_cpu", "-lc10", "-o", str(target),
    ]  # fmt: skip


def check_symbols(library: Path) -> None:
    """Raises RuntimeError where a library wants what none that is loaded has: no linker says so, for Python's own
    symbols are the interpreter's. One for a better CPU may end the process that loads it, once they are all found."""
    code = f"import ctypes, os, torch; ctypes.CDLL({str(library)!r}, os.RTLD_NOW)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
    if done.returncode not in (0, -signal.SIGILL):
        raise RuntimeError(f"the library cannot be loaded:\n{done.stderr}")


def build(capability: str, flags: Flags) -> None:
    """One library. All sources are one translation unit, for torch's headers take most of the time."""
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as scratch:
        unit, compiled, made = (Path(scratch) / name for name in ("all.cpp", "all.o", "library.so"))
        unit.write_text("".join(f'#include "{path.name}"\n' for path in sorted(SOURCES.glob("*.cpp"))), "utf-8")
        for command in (compile_command(flags, unit, compiled), link_command(compiled, made)):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"the compiler failed for {capability}:\n{done.stderr}")
        check_symbols(made)
        for old in FOLDER.glob(f"tucka-{capability.lower()}-*.so"):
            old.unlink()  # who has loaded it keeps it
        made.replace(path_of(capability))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tucka_runtime.kernels.native.build", description=__doc__)
    parser.add_argument("--all", action="store_true", help="for every instruction set, not for this CPU's alone")
    args = parser.parse_args()
    known = variants()
    own = next(name for name in capabilities() if name in known)
    wanted = known if args.all else {own: known[own]}
    missing = {name: flags for name, flags in wanted.items() if not path_of(name).is_file()}
    try:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(build, missing, missing.values()))
    except (OSError, RuntimeError) as e:
        print(f"The native kernels could not be built: {e}", file=sys.stderr)
        return 1
    print("native kernels are there for " + ", ".join(wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
