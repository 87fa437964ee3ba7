# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that need not be there, through its own launcher.

``python -m cofire_kernels.aot sm_90 gfx942 --dtypes bfloat16`` runs the calls of :mod:`cofire_kernels.cases`, for
every entry of ``configs/default.json``, on meta tensors. A driver that only names a target takes the place of the real
one and a launch becomes a compilation, so that what is compiled is what a user's call would compile: the same
signature, specialisation, tiles and options. One line of JSON per compiled kernel goes to standard output.

The process must not run the interpreter (``TRITON_INTERPRET``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

#: Bytes of shared memory that one thread block can have.
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
DTYPES = ("bfloat16", "float16", "float32")
#: Loads of 128 bits, into registers or into shared memory.
VECTOR_LOAD = re.compile(
    r"ld\.global[\w.:]*\.v(4\.[bfu]32|2\.[bfu]64|8\.[bfu]16)|cp\.async\.cg\.shared\.global [^;]*, 0x10\b"
)


def _target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


class _Driver:
    """What the runtime asks of a driver before it compiles. Launches are cached by device: each target is its own."""

    def __init__(self, target: str) -> None:
        self._target, self._device = _target(target), list(SHARED_MEMORY).index(target)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _compiling(target: str, into: list[Any]) -> Iterator[None]:
    """Launches compile for ``target`` and append what they compiled."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if not any(kernel is known for known in into):
            into.append(kernel)
        return kernel

    driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield
    finally:
        JITFunction.run = launch


def _spills_in_loops(sass: str) -> int:
    """How many accesses to the stack can be reached from themselves.

    A branch backwards alone is no loop: what is rarely run, as another wait for a barrier, stands behind the end of the
    program and jumps back.
    """
    code = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    place = {int(at, 16): index for index, (at, _) in enumerate(code)}
    following: list[list[int]] = []
    for index, (_, text) in enumerate(code):
        after = [index + 1] if index + 1 < len(code) else []
        jump = re.search(r"\bBRA\S*\s(?:.*, *)?0x([0-9a-f]+)", text)
        if jump is not None:
            always = re.fullmatch(r"BRA 0x[0-9a-f]+\s*", text) is not None
            after = [place[int(jump[1], 16)], *([] if always else after)]
        elif re.match(r"(EXIT|RET)\b", text):
            after = []
        following.append(after)

    def returns(start: int) -> bool:
        seen, waiting = set[int](), list(following[start])
        while waiting:
            now = waiting.pop()
            if now not in seen:
                seen.add(now)
                waiting += following[now]
        return start in seen

    return sum(returns(index) for index, (_, text) in enumerate(code) if re.search(r"\b(LDL|STL)\b", text))


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory by the disassembler that the triton wheel ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(what: str) -> str:
            return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout

        text = dump("--dump-resource-usage")
        found = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
        return found | {"LOOPS": _spills_in_loops(dump("--dump-sass")) if found["STACK"] else 0}


def _facts(kernel: Any) -> dict[str, Any]:
    metadata = kernel.metadata
    facts = {"kernel": metadata.name, "shared": metadata.shared, "num_warps": metadata.num_warps}
    names, constants = kernel.src.fn.arg_names, kernel.src.constants
    facts["constants"] = {names[path[0]]: value for path, value in constants.items() if isinstance(value, (int, str))}
    if "cubin" in kernel.asm:
        ptx = kernel.asm["ptx"]
        usage = _resources(kernel.asm["cubin"])
        facts |= {"registers": usage["REG"], "stack": usage["STACK"], "local": usage["LOCAL"]}
        facts["spills_in_loops"] = usage["LOOPS"]
        facts |= {"wgmma": "wgmma.mma_async" in ptx, "vector_loads": VECTOR_LOAD.search(ptx) is not None}
        facts |= {"asserts": "__assertfail" in ptx}
    else:
        # scalar registers spill into lanes of vector registers: only vector registers spill into memory
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
        facts |= {"spills": sum(map(int, spills))}
    return facts


def compile_entry(target: str, name: str, position: int, dtype: str) -> list[dict[str, Any]]:
    """Everything that one entry of the default configuration leads to, for one target and dtype."""
    from cofire_kernels.cases import CASES, Make
    from cofire_kernels.configs import entries

    entry = entries("default.json")[name][position]
    variant = {"target": target, "config": name, "entry": position, "dtype": dtype}
    kernels: list[Any] = []
    try:
        with _compiling(target, kernels):
            for call in CASES[name](Make(getattr(torch, dtype), torch.device("meta")), entry["key"]):
                call()
    except Exception as error:
        return [{**variant, "kernel": None, "error": f"{type(error).__name__}: {error}"[:2000]}]
    return [{**variant, **_facts(kernel)} for kernel in kernels]


def main() -> None:
    from cofire_kernels.configs import entries

    parser = argparse.ArgumentParser(prog="python -m cofire_kernels.aot")
    parser.add_argument("targets", nargs="*", default=list(SHARED_MEMORY), help=", ".join(SHARED_MEMORY))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--configs", nargs="+", help="names in default.json (default: all)")
    options = parser.parse_args()

    tasks = [
        (target, name, position, dtype)
        for target in options.targets
        for name, listed in entries("default.json").items()
        if options.configs is None or name in options.configs
        for position in range(len(listed))
        for dtype in options.dtypes
    ]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        for results in pool.map(compile_entry, *zip(*tasks, strict=True)):
            for facts in results:
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
