"""Triton kernels compiled for GPUs that are not available: which launches an op makes, and what each compiled kernel
uses.

Launches are recorded from the op's own host code on "meta" tensors, so that what is compiled is what would run.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from benchmarks.cuda_resources import MULTIPROCESSORS, blocks_per_multiprocessor

ARCHITECTURES = (80, 90, 100)
_TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.int8: "*i8", torch.uint8: "*u8",
}  # fmt: skip
_OPTIONS = ("num_warps", "num_stages")
OMISSIBLE = ("SILU", "ADAPTIVE", "ADDED", "SCALE_ROWS", "SCALE_ROW")  # named where they are off
PARAMETERS = ("weight", "scale", "added")  # whose dtype is named where it is not float32


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: its arguments by name, and the options of the compilation."""

    kernel: Any
    arguments: dict[str, Any] = field(hash=False)
    options: dict[str, int] = field(hash=False)
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__.strip("_")

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are compiled in."""
        return {
            name: value
            for name, value in self.arguments.items()
            if self.kernel.params[self.kernel.arg_names.index(name)].is_constexpr
        }

    @property
    def configuration(self) -> str:
        """What decides the compiled code, in one line: the dtype of the first tensor, constants and options; then what
        a kernel leaves out (SiLU, scale and shift, the added embedding), parameters that are not float32, and whether
        addresses are not multiples of 16 bytes.
        """
        constants = self.constants
        parts = {name: value for name, value in constants.items() if name not in OMISSIBLE} | self.options
        parts |= {name: False for name in OMISSIBLE if constants.get(name) is False}
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}
        parts |= {name: dtypes[name] for name in PARAMETERS if dtypes.get(name, "float32") != "float32"}
        if not all(map(is_aligned, tensors.values())):
            parts["aligned"] = False
        text = " ".join(f"{name.lower()}={int(value) if isinstance(value, bool) else value}"
                        for name, value in parts.items())  # fmt: skip
        return f"{next(iter(dtypes.values()))} {text}"


def is_aligned(value: torch.Tensor) -> bool:
    """Whether its first element lies on a multiple of 16 bytes, its memory doing so."""
    return value.storage_offset() * value.element_size() % 16 == 0


def _width(suffix: str) -> int:
    """Bytes of a PTX access, from its suffix: ".v4.b32" is 16."""
    count, bits = re.fullmatch(r"(?:\.v(\d))?\.b(\d+)", suffix).groups()
    return int(count or 1) * int(bits) // 8


@contextmanager
def recorded(module: ModuleType) -> Iterator[list[Launch]]:
    """Collects the launches that `module`'s host code would make, instead of making them."""
    launches: list[Launch] = []

    def record(kernel, grid, *positional, **named):
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        arguments = {**dict(zip(kernel.arg_names, positional, strict=False)), **named}
        launches.append(Launch(kernel, arguments, options, grid))

    with mock.patch.object(module, "launch", record):
        yield launches


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one architecture; sizes in bytes, registers per thread."""

    launch: Launch
    architecture: int
    ttir: str
    ptx: str
    cubin: bytes
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int

    @property
    def warps(self) -> int:
        return self.launch.options.get("num_warps", 4)

    @property
    def blocks_per_multiprocessor(self) -> int:
        return blocks_per_multiprocessor(self.architecture, self.registers, self.shared_bytes, self.warps)

    @property
    def occupancy(self) -> float:
        """Resident warps over the most that a multiprocessor holds."""
        return round(self.blocks_per_multiprocessor * self.warps / MULTIPROCESSORS[self.architecture].warps, 3)

    @property
    def instructions(self) -> int:
        """How many the machine's code has, of 16 bytes each, those that fill it up included."""
        return code_bytes(self.cubin) // 16

    @property
    def matrix_instructions(self) -> int:
        """Of the tensor cores: mma (HMMA), wgmma (HGMMA), tcgen05 (UTCHMMA)."""
        if "mma" not in self.ptx:  # saves most of the time
            return 0
        code = _tool("nvdisasm", "-c", cubin=self.cubin)
        names = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE)
        return sum(bool(re.match(r"[HIQ]G?MMA|UTC\w*MMA", name)) for name in names)

    def map_bytes(self) -> tuple[int, int]:
        """Bytes that all threads of a program load, but for loads marked evict_last, and store: the count of
        instructions times their width, so a loop's are counted once."""
        loads, stores = self.loads_by_width.items(), self.stores_by_width.items()
        return tuple(32 * self.warps * sum(width * count for width, count in found) for found in (loads, stores))

    @property
    def loads_by_width(self) -> dict[int, int]:
        """How many of a thread's load instructions move how many bytes each, but for loads marked evict_last;
        asynchronous copies to shared memory included."""
        found = re.findall(r"ld\.global(?!\S*evict_last)\S*?((?:\.v\d)?\.b\d+) ", self.ptx)
        return dict(sorted(Counter([*map(_width, found), *self._asynchronous_widths]).items(), reverse=True))

    @property
    def stores_by_width(self) -> dict[int, int]:
        """The same of its stores."""
        found = re.findall(r"st\.global\S*?((?:\.v\d)?\.b\d+) ", self.ptx)
        return dict(sorted(Counter(map(_width, found)).items(), reverse=True))

    @property
    def asynchronous_copies(self) -> int:
        """How many loads go to shared memory while the thread goes on: the loops that a pipeline was made of."""
        return len(self._asynchronous_widths)

    @property
    def _asynchronous_widths(self) -> list[int]:
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", self.ptx)
        return [int(width, 0) for width in copies]


def bytes_by_depth(ttir: str, operation: str) -> tuple[int, ...]:
    """Bytes that one program's `operation`s ("load", "store") move: outside of loops, in one round of a loop, in one
    round of a loop inside of it, from Triton's IR, where a loop's body stands once."""
    depth, ends, found = 0, [], {0: 0}
    for line in ttir.splitlines():
        indent = len(line) - len(line.lstrip())
        if " scf.for " in line or line.lstrip().startswith("scf.for "):
            ends.append(indent)
        elif ends and indent == ends[-1] and line.lstrip().startswith("}"):
            ends.pop()
        depth = len(ends)
        if f"tt.{operation} " in line:
            sizes, bits = re.search(r" : (?:tensor<((?:\d+x)+))?!tt\.ptr<[a-z]+(\d+)>", line).groups()
            count = math.prod(map(int, sizes[:-1].split("x"))) if sizes else 1
            found[depth] = found.get(depth, 0) + count * int(bits) // 8
    return tuple(found.get(each, 0) for each in range(max(found) + 1))


def _compilation(launch: Launch) -> tuple[Any, dict[str, Any]]:
    """Triton's source and options of what the JIT would compile for `launch`: integers 1 compiled in, pointers and
    multiples of 16 known as such."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        kind = _argument_type(value, launch.kernel.params[index].is_constexpr)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif is_aligned(value) if isinstance(value, torch.Tensor) else isinstance(value, int) and value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    # Said, because its default is about to change; fused multiply-adds round less.
    options = {**launch.options, "enable_fp_fusion": True}
    return ASTSource(launch.kernel, signature, constants, attributes), options


def ttir_of(launch: Launch) -> str:
    """Triton's IR of `launch`, which no architecture has touched yet."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    source, options = _compilation(launch)
    target = GPUTarget("cuda", ARCHITECTURES[0], 32)
    backend = make_backend(target)
    parsed = backend.parse_options(options)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    stages: dict[str, Any] = {}
    backend.add_stages(stages, parsed, source.language)
    return str(stages["ttir"](source.make_ir(target, parsed, functions, modules, context), {}))


PROGRAMS = ("tt.get_program_id", "tt.get_num_programs")
COUNTERS = ("scf.for",)


def narrow_products(ttir: str, roots: tuple[str, ...]) -> list[str]:
    """The 32-bit products of something without bound that reach an address, one line of Triton's IR each.

    Without bound is what comes from `roots`: PROGRAMS, the numbers of this program and of all, until a remainder makes
    them small; or COUNTERS, those of loops. Their products with a stride or a size may pass 2^31. Products of other
    things, places inside of one image, are below it, since the ops refuse larger images.
    """
    unbounded: set[str] = set()
    overflowing: dict[str, str] = {}  # value: the product in it
    found = []
    for line in ttir.splitlines():
        left, equals, right = line.partition(" = ")
        results = set(re.findall(r"%\w+", left)) if equals else set()
        operands = set(re.findall(r"%\w+", right if equals else line))
        if "scf.for" in line:  # names the counter, and the values that go from round to round
            counter, *carried = re.findall(r"(%\w+) = (%\w+)", line.split("scf.for", 1)[1])
            unbounded |= {counter[0]} if "scf.for" in roots else set()
            unbounded |= {name for name, start in carried if start in unbounded}
            overflowing |= {name: overflowing[start] for name, start in carried if start in overflowing}
            continue
        reached = [overflowing[name] for name in operands if name in overflowing]
        if "tt.addptr" in line:
            found += reached
        if any(root in line for root in roots) or ("arith.rem" not in line and operands & unbounded):
            unbounded |= results
            if re.search(r"arith\.(muli|shli) .*: (i32|tensor<[\dx]+xi32>)", line):
                reached = [line.strip()]
        overflowing |= dict.fromkeys(results, reached[0]) if reached else {}
    return found


def code_bytes(cubin: bytes) -> int:
    """Size of the sections .text.* of a 64-bit ELF file."""
    table, (entry, count, names) = struct.unpack_from("<Q", cubin, 0x28)[0], struct.unpack_from("<3H", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + index * entry) for index in range(count)]
    strings = headers[names][4]
    return sum(size for name, _, _, _, _, size in headers if cubin.startswith(b".text.", strings + name))


def compile_launch(launch: Launch, architecture: int) -> Compiled:
    """Compiles what the JIT would for `launch`."""
    import triton
    from triton.backends.compiler import GPUTarget

    source, options = _compilation(launch)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    cubin = compiled.asm["cubin"]
    usage = _tool("cuobjdump", "--dump-resource-usage", cubin=cubin)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    return Compiled(
        launch=launch,
        architecture=architecture,
        ttir=compiled.asm["ttir"],
        ptx=compiled.asm["ptx"],
        cubin=cubin,
        registers=registers,
        stack_bytes=stack,
        spill_bytes=local,
        shared_bytes=compiled.metadata.shared,
    )


def _argument_type(value: Any, constant: bool) -> str:
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _tool(name: str, *options: str, cubin: bytes) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(path), *options, file.name], capture_output=True, text=True, check=True).stdout


def source_digest(kernel) -> str:
    """Of a kernel's source, wherever in its file it stands, with all that it calls, and of Triton's version: what is
    compiled changes only with these."""
    import triton

    parts, waiting = {}, [kernel]
    while waiting:
        function = waiting.pop()
        parts[function.__name__] = function.src
        for name in {node.id for node in ast.walk(ast.parse(function.src)) if isinstance(node, ast.Name)}:
            value = function.fn.__globals__.get(name)
            if isinstance(value, triton.JITFunction) and value.__name__ not in parts:
                waiting.append(value)
            elif isinstance(value, int | float | str):
                parts[name] = repr(value)
    return hashlib.sha256(f"{triton.__version__} {sorted(parts.items())}".encode()).hexdigest()[:12]
