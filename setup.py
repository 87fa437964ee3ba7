# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled part of cofire: one CPU library per instruction set, and the host module.

Environment:
    COFIRE_BUILD=0       install without compiled kernels; every operator then runs its reference
    COFIRE_VARIANTS=...  the CPU libraries to build, e.g. "default,avx2", or "all". Default: this CPU's best, and "default",
                         which this CPU then has for comparison only, so that it is compiled with -O1, in half the time
    MAX_JOBS=n           compilers at a time (default: by cores and memory)
    CXX                  the C++ compiler
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
WINDOWS = sys.platform == "win32"

#: at::vec picks its instruction set by both spellings of the capability.
INSTRUCTION_SETS = {
    "default": (["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"], []),
    "avx2": (["-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"], ["-mavx2", "-mfma", "-mf16c"]),
    "avx512": (
        ["-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
    ),
}


def variants(capability: str) -> list[str]:
    """The libraries to build, for a CPU with the instruction set ``capability``."""
    known = list(INSTRUCTION_SETS) if X86 else ["default"]
    chosen = os.environ.get("COFIRE_VARIANTS", "")
    if not chosen:
        return [name for name in known if name in ("default", capability)]
    if chosen == "all":
        return known
    names = chosen.split(",")
    unknown = sorted(set(names) - set(INSTRUCTION_SETS))
    if unknown:
        every = ", ".join(INSTRUCTION_SETS)
        sys.exit(f"setup.py: COFIRE_VARIANTS must be 'all' or among {every}, got {', '.join(unknown)}")
    return names


def compiler() -> str:
    """The compiler's own first line of --version; stops with a sentence when there is none."""
    command = shlex.split(os.environ.get("CXX", "cl" if WINDOWS else "c++"))
    if shutil.which(command[0]) is None:
        sys.exit(
            f"setup.py: no C++ compiler ({command[0]}) was found. Install one (g++ or clang++), or set COFIRE_BUILD=0 "
            "to install cofire without compiled kernels."
        )
    if WINDOWS:
        return "msvc"
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def extensions() -> list[Extension]:
    try:
        import torch
        from torch.utils.cpp_extension import CppExtension
    except ImportError:
        sys.exit(
            "setup.py: cofire is built against the torch that is installed, and none was found. Install torch, then "
            "use `pip install --no-build-isolation .`, or set COFIRE_BUILD=0 to install without compiled kernels."
        )
    capability = torch.backends.cpu.get_cpu_capability().lower()
    names = variants(capability)
    sources = [os.path.relpath(p, ROOT) for p in sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    headers = [os.path.relpath(p, ROOT) for p in sorted((ROOT / "csrc").rglob("*.h"))]
    common = ["/O2", "/std:c++20", "/openmp"] if WINDOWS else ["-O3", "-std=c++20", "-g0", "-fvisibility=hidden"]
    # Apple's compiler ships no OpenMP: there the kernels are serial, and `cofire info` says so.
    openmp = ["-fopenmp"] if sys.platform.startswith("linux") else []

    def effort(name: str) -> list[str]:
        spare = name == "default" and capability in names[1:] and not os.environ.get("COFIRE_VARIANTS")
        return ["-O1"] if spare and not WINDOWS else []

    facts = {
        "COFIRE_TORCH_VERSION": torch.__version__,
        "COFIRE_COMPILER": compiler(),
        "COFIRE_VARIANTS": ",".join(names),
    }
    host = Extension(
        "cofire._host",
        ["csrc/host.cpp"],
        include_dirs=[str(Path(torch.__file__).parent / "include"), "csrc"],
        define_macros=[(name, f'"{value}"') for name, value in facts.items()],
        extra_compile_args=common + openmp,
        extra_link_args=openmp,
        language="c++",
        depends=headers,
    )
    # On Windows torch does not export what it needs.
    call = CppExtension(
        "cofire._call", ["csrc/call.cpp"], extra_compile_args={"cxx": [*common, *openmp]}, depends=headers
    )
    return [host, *([] if WINDOWS else [call])] + [
        CppExtension(
            f"cofire._cpu_{name}",
            sources,
            include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc" / "cpu")],
            extra_compile_args={"cxx": [*common, *openmp, *INSTRUCTION_SETS[name][0], *flags(name), *effort(name)]},
            extra_link_args=openmp,
            depends=headers,
        )
        for name in names
    ]


def flags(name: str) -> list[str]:
    if WINDOWS:
        return [] if name == "default" else [f"/arch:{name.upper()}"]
    return INSTRUCTION_SETS[name][1]


def jobs() -> int:
    """One compiler needs about 1.5 GB."""
    cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return cores
    return max(1, min(cores, int(memory / 1.5e9)))


class BuildPython(build_py):
    """Carries what run time reads from outside the packages: the CUDA sources, for NVRTC."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "cofire_kernels" / "cuda"
            target.mkdir(parents=True, exist_ok=True)
            for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
                self.copy_file(str(source), str(target / source.name))


def arguments() -> dict[str, object]:
    if os.environ.get("COFIRE_BUILD") == "0":
        return {"cmdclass": {"build_py": BuildPython}}
    modules = extensions()
    import torch
    from torch.utils.cpp_extension import BuildExtension

    os.environ.setdefault("MAX_JOBS", str(jobs()))

    class BuildNative(BuildExtension):  # type: ignore[misc]
        """Each library has object files of its own, and a precompiled header: the same sources, other flags."""

        def build_extensions(self) -> None:
            if not WINDOWS:
                for finish in [self.precompile(ext) for ext in self.extensions if "_cpu_" in ext.name]:
                    finish()
            super().build_extensions()

        def precompile(self, extension: Extension) -> Callable[[], object]:
            """Begins to compile ``precompiled.h``, unless it is fresh; the sources of ``extension`` then start with it.

            A compiler that finds no precompiled form reads the header itself, so nothing here can fail a build.
            """
            folder = Path(self.build_temp).resolve() / extension.name
            folder.mkdir(parents=True, exist_ok=True)
            header, result = folder / "precompiled.h", folder / "precompiled.h.gch"
            used, made_by, partial = (folder / f"precompiled.{end}" for end in ("d", "command", "part"))
            arguments = extension.extra_compile_args["cxx"]
            command = [
                *shlex.split(os.environ.get("CXX", "c++")),
                *self.compiler.compiler_so[1:],
                *(f"-I{path}" for path in [*extension.include_dirs, *self.include_dirs]),
                *arguments,
                *("-x", "c++-header", str(header), "-MD", "-MF", str(used), "-o", str(partial)),
            ]
            arguments += ["-include", str(header)]
            stamp = "\n".join([torch.__version__, compiler(), *command])
            if result.exists() and made_by.exists() and made_by.read_text() == stamp:
                read = (Path(name) for name in used.read_text().partition(":")[2].split() if name != "\\")
                if all(file.exists() and file.stat().st_mtime < result.stat().st_mtime for file in read):
                    return lambda: None
            result.unlink(missing_ok=True)
            header.write_text('#include "cpu/precompiled.h"\n')
            process = subprocess.Popen(command)

            def finish() -> None:
                if process.wait() == 0:
                    made_by.write_text(stamp)
                    partial.replace(result)

            return finish

        def build_extension(self, extension: Extension) -> None:
            shared, self.build_temp = self.build_temp, os.path.join(self.build_temp, extension.name)
            try:
                super().build_extension(extension)
            finally:
                self.build_temp = shared

    return {"ext_modules": modules, "cmdclass": {"build_py": BuildPython, "build_ext": BuildNative}}


setup(**arguments())
