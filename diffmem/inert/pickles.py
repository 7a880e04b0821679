"""Pickles read without executing anything: a small interpreter of pickle's opcodes that knows a closed list of names.

Python's own unpickler calls whatever a pickle names. Here a name is looked up in a table of functions of ours, which
build plain values; any other name ends the reading with an error that says which. Nothing is imported, no attribute is
looked up, no method of a value is called. Values may nest and share as they like, because nothing here walks them: they
are never hashed (keys are text, whole numbers and bytes), compared, copied in depth or formatted. What a few bytes can
be made to cost is bounded by one `Budget`, shared by all pickles of a file: operations, and bytes of what is built.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.errors import InputError
from diffmem.inert.boundary import short

# A snapshot of a network with hundreds of layers takes about 10⁵; beyond this a file is not one.
MAX_OPERATIONS = 1_500_000
LONGEST_INTEGER = 255  # bytes
LONGEST_NAME = 1000  # bytes of a module's and an attribute's name, of a number in text
_SLACK = 2**24  # bytes that any file may build, however small it is
_VIEWED = 4096  # bytes from which a byte string stays a view of the file
_ITEM = 64  # bytes that an entry of a container costs, about

_MARK = object()


class Refused(Exception):
    """The pickle wants something that is not on the list; the message says what."""


class Damaged(Exception):
    """The stream is not a complete, well-formed pickle; the message says how."""


@dataclass(eq=False)
class Record:
    """An object of which only its class's name and its attributes are kept."""

    class_name: str
    state: Any = None


@dataclass(frozen=True, eq=False)
class Name:
    """A name on the list: `build(*args)` makes the value that calling or instantiating it stands for."""

    name: str
    build: Callable[..., Any] | None = None


class Budget:
    """How many operations the pickles of a file may take, and how many bytes may be built from it: a few times its
    size (storages pass through twice)."""

    def __init__(self, file_size: int) -> None:
        self.left = 4 * file_size + _SLACK
        self.operations = MAX_OPERATIONS

    def charge(self, amount: int) -> None:
        """Takes `amount` bytes; raises Refused where they are not left."""
        self.left -= amount
        if self.left < 0:
            raise Refused("a stream that expands to several times its own size")

    def charge_operations(self, count: int) -> None:
        """Takes `count` operations; raises Refused where they are not left."""
        self.operations -= count
        if self.operations < 0:
            raise Refused(f"a stream of more than {MAX_OPERATIONS} operations")


def plain_names(budget: Budget) -> dict[tuple[str, str], Name]:
    """The names that stand for plain containers and numbers."""

    def items(values: Any, kinds: tuple[type[Any], ...]) -> Any:
        if not isinstance(values, kinds):
            raise Damaged(f"a container built from {type(values).__name__}")
        budget.charge(_ITEM * len(values))
        return values

    def ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
        if isinstance(pairs, dict):
            return dict(items(pairs, (dict,)))
        pairs = items(pairs, (list, tuple))
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise Damaged("a dictionary not built from pairs")
        return {key_of(key): value for key, value in pairs}

    def encode(text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise Refused(f"_codecs.encode to {short(encoding)}")
        budget.charge(len(text))
        return text.encode("latin1")

    def dtype(code: Any, *_: Any) -> np.dtype:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or code not in _DTYPES:
            raise Refused(f"numpy.dtype {short(code)}")
        return np.dtype("<" + code)

    def scalar(kind: np.dtype, data: Any) -> Any:
        if not isinstance(kind, np.dtype) or not isinstance(data, bytes) or len(data) != kind.itemsize:
            raise Damaged("a NumPy scalar whose bytes do not match its dtype")
        return np.frombuffer(data, kind)[0].item()

    def reconstructor(kind: Any, base: Any, state: Any) -> Any:
        if not isinstance(kind, Name) or kind.build is None:
            raise Refused(f"an instance of {kind.name if isinstance(kind, Name) else short(kind)}")
        return kind.build() if state is None else kind.build(state)

    table: dict[tuple[str, str], Name] = {}

    def add(build: Callable[..., Any] | None, *spellings: str) -> None:
        for spelling in spellings:
            module, _, name = spelling.rpartition(".")
            table[module, name] = Name(spelling, build)

    add(ordered_dict, "collections.OrderedDict", "builtins.dict", "__builtin__.dict")
    add(
        lambda values=(): {key_of(value) for value in items(values, (list, tuple))},
        "builtins.set",
        "__builtin__.set",
    )
    add(lambda values=(): list(items(values, (list, tuple))), "builtins.list", "__builtin__.list")
    add(lambda values=(): tuple(items(values, (list, tuple))), "builtins.tuple", "__builtin__.tuple")
    add(None, "builtins.object", "__builtin__.object")
    add(reconstructor, "copyreg._reconstructor", "copy_reg._reconstructor")
    add(encode, "_codecs.encode")
    add(dtype, "numpy.dtype")
    add(scalar, "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return table


_DTYPES = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))


def key_of(value: Any) -> str | int | bytes:
    """`value`, which becomes a dictionary's key or a set's member: text, a whole number, or bytes.

    Their hashes cost what their length does, and do not collide at a forger's will (which those of huge numbers would).
    """
    if type(value) in (str, bytes) or (type(value) is int and -(2**60) < value < 2**60):
        return value
    raise Damaged(f"a key that is {short(value)}, neither text nor a whole number")


class Source:
    """The bytes of a file, read from the front; no claim of theirs costs more than what is there."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.position = data, 0

    def take(self, size: int) -> memoryview:
        """The next `size` bytes without a copy; raises Damaged where the file ends before."""
        content = self.data[self.position : self.position + size] if size >= 0 else self.data[:0]
        if len(content) != size:
            raise Damaged(f"{size} bytes are announced but {len(self.data) - self.position} remain")
        self.position += size
        return content

    def number(self, size: int, signed: bool = False) -> int:
        """The next `size` bytes as a little-endian number."""
        return int.from_bytes(self.take(size), "little", signed=signed)

    def line(self, longest: int = LONGEST_NAME) -> bytes:
        """The bytes up to the next end of a line, without it; raises Damaged where that is farther than `longest`."""
        step = 256
        while True:
            content = bytes(self.data[self.position : self.position + min(step, longest + 1)])
            end = content.find(b"\n")
            if end >= 0:
                self.position += end + 1
                return content[:end]
            if step > longest or len(content) < step:
                raise Damaged("an unterminated line")
            step *= 4


def read_pickle(
    source: Source,
    names: dict[tuple[str, str], Name],
    budget: Budget,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The value of the one pickle at the source's position, which is left behind its end.

    `names` lists every name the pickle may mention, by (module, name); `persistent` builds what a persistent id stands
    for. Long byte strings are views of the source. Raises Refused for any other name or way to make an object, and
    where the budget is spent; Damaged where the stream is cut short or malformed.
    """
    machine = _Machine(source, names, budget, persistent)
    try:
        return machine.run()
    except (Refused, Damaged, MemoryError):
        raise
    except Exception as error:
        # Not the exception's own words: some quote the value, which may nest without end.
        raise Damaged(f"an impossible operation ({type(error).__name__})") from None


class _Machine:
    """One pickle's stack, memo and operations."""

    def __init__(
        self,
        source: Source,
        names: dict[tuple[str, str], Name],
        budget: Budget,
        persistent: Callable[[Any], Any] | None,
    ):
        self.source, self.names, self.budget, self.persistent = source, names, budget, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        data, source, charge = self.source.data, self.source, self.budget.charge_operations
        stack, end = self.stack, len(self.source.data)
        while source.position < end:
            code = data[source.position]
            source.position += 1
            charge(1)
            if code == 0x2E:  # STOP
                if len(stack) != 1 or stack[0] is _MARK:
                    raise Damaged(f"{len(stack)} values or marks where one value was expected")
                return stack[0]
            operation = _OPERATIONS.get(code)
            if operation is None:
                if code in _KNOWN:
                    raise Refused(f"the operation {_KNOWN[code]}")
                raise Damaged(f"byte {code} is not a pickle opcode")
            operation(self)
            if stack and stack[-1] is _MARK and code != 0x28:
                raise Damaged("a mark is left on top")
        raise Damaged("it ends before its STOP")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Damaged("a mark where a value was expected")
        return value

    def top(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise Damaged(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} was expected")
        return self.stack[-1]

    def since_mark(self) -> list[Any]:
        stack = self.stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise Damaged("a mark is missing")

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise Damaged("an impossible memo index")
        if self.stack[-1] is _MARK:
            raise Damaged("a mark where a value was expected")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise Damaged("a memo index that was never set")
        self.stack.append(self.memo[index])

    def text(self, size: int, encoding: str = "utf-8") -> None:
        content = self.source.take(size)
        self.budget.charge(size)
        self.stack.append(str(content, encoding, "surrogatepass"))

    def byte_string(self, size: int) -> None:
        content = self.source.take(size)
        if size < _VIEWED:
            self.budget.charge(size)
            self.stack.append(bytes(content))
        else:
            self.stack.append(content)

    def integer(self, size: int) -> None:
        if not 0 <= size <= LONGEST_INTEGER:
            raise Damaged(f"a whole number of {size} bytes")
        self.stack.append(self.source.number(size, signed=True))

    def look_up(self, module: Any, attribute: Any) -> None:
        if type(module) is not str or type(attribute) is not str:
            raise Refused(f"{short(module)}.{short(attribute)}")
        name = self.names.get((module, attribute))
        if name is None:
            raise Refused(f"{module[:80]}.{attribute[:80]}")
        self.stack.append(name)

    def construct(self, kind: Any, args: Any) -> None:
        if not isinstance(kind, Name) or kind.build is None:
            raise Refused(f"a call of {kind.name if isinstance(kind, Name) else type(kind).__name__}")
        if not isinstance(args, tuple):
            raise Damaged(f"unexpected arguments for {kind.name}")
        self.stack.append(kind.build(*args))

    def set_items(self, target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise Damaged("a dictionary with a key and no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[key_of(key)] = value

    # Each operation below is named as in pickletools.

    def proto(self) -> None:
        if self.source.number(1) > 5:
            raise Damaged("an unknown version of pickle")

    def frame(self) -> None:
        if self.source.number(8) > len(self.source.data) - self.source.position:
            raise Damaged("a frame longer than the file")

    def int_(self) -> None:
        line = self.source.line()
        # Protocol 0 writes False and True as I00 and I01.
        self.stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else _number(line))

    def long_(self) -> None:
        self.stack.append(_number(self.source.line().removesuffix(b"L")))

    def float_(self) -> None:
        self.stack.append(float(self.source.line()))

    def string(self) -> None:
        line = self.source.line(max(LONGEST_NAME, self.budget.left))
        self.budget.charge(2 * len(line))
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise Damaged("a string without its quotes")
        self.stack.append(codecs.escape_decode(line[1:-1])[0].decode("latin1"))

    def unicode(self) -> None:
        line = self.source.line(max(LONGEST_NAME, self.budget.left))
        self.budget.charge(2 * len(line))
        self.stack.append(str(line, "raw-unicode-escape"))

    def append(self) -> None:
        value = self.pop()
        self.top(list).append(value)

    def appends(self) -> None:
        values = self.since_mark()
        self.top(list).extend(values)

    def tuple_(self, size: int) -> None:
        stack = self.stack
        if len(stack) < size or any(value is _MARK for value in stack[-size:]):
            raise Damaged("a tuple of missing values")
        stack[-size:] = [tuple(stack[-size:])]

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items(self.top(dict), [key, value])

    def set_items_since_mark(self) -> None:
        values = self.since_mark()
        self.set_items(self.top(dict), values)

    def dict_(self) -> None:
        target: dict[Any, Any] = {}
        values = self.since_mark()
        self.set_items(target, values)
        self.stack.append(target)

    def add_items(self) -> None:
        values = self.since_mark()
        self.top(set).update(map(key_of, values))

    def global_(self) -> None:
        module, attribute = str(self.source.line(), "utf-8"), str(self.source.line(), "utf-8")
        self.look_up(module, attribute)

    def stack_global(self) -> None:
        attribute, module = self.pop(), self.pop()
        self.look_up(module, attribute)

    def reduce(self) -> None:
        args, kind = self.pop(), self.pop()
        self.construct(kind, args)

    def newobj_ex(self) -> None:
        kwargs, args, kind = self.pop(), self.pop(), self.pop()
        if not isinstance(kwargs, dict) or kwargs:
            raise Damaged("an object built with named arguments")
        self.construct(kind, args)

    def build(self) -> None:
        """A record keeps its attributes; a dict's (`_metadata`) and a dtype's (byte order) are not needed."""
        state, value = self.pop(), self.stack[-1]
        if isinstance(value, Record):
            value.state = state
        elif isinstance(value, np.dtype):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise Refused(f"a numpy.dtype of state {short(state)}")
        elif not isinstance(value, dict):
            raise Refused(f"attributes for a {type(value).__name__}")

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise Refused("the operation BINPERSID")
        self.stack.append(self.persistent(self.pop()))


def _number(line: bytes) -> int:
    # int() knows other spellings (spaces, underscores), which no pickler writes; and is slow with many digits.
    if len(line) > 2 * LONGEST_INTEGER or not line.removeprefix(b"-").isdigit():
        raise Damaged("a malformed whole number")
    return int(line)


_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): operation
    for code, operation in {
        "\x80": _Machine.proto,
        "\x95": _Machine.frame,
        "N": lambda m: m.stack.append(None),
        "\x88": lambda m: m.stack.append(True),
        "\x89": lambda m: m.stack.append(False),
        "I": _Machine.int_,
        "J": lambda m: m.stack.append(m.source.number(4, signed=True)),
        "K": lambda m: m.stack.append(m.source.number(1)),
        "M": lambda m: m.stack.append(m.source.number(2)),
        "L": _Machine.long_,
        "\x8a": lambda m: m.integer(m.source.number(1)),
        "\x8b": lambda m: m.integer(m.source.number(4, signed=True)),
        "F": _Machine.float_,
        "G": lambda m: m.stack.append(struct.unpack(">d", m.source.take(8))[0]),
        "S": _Machine.string,
        "T": lambda m: m.text(m.source.number(4, signed=True), "latin1"),
        "U": lambda m: m.text(m.source.number(1), "latin1"),
        "V": _Machine.unicode,
        "X": lambda m: m.text(m.source.number(4)),
        "\x8c": lambda m: m.text(m.source.number(1)),
        "\x8d": lambda m: m.text(m.source.number(8)),
        "B": lambda m: m.byte_string(m.source.number(4)),
        "C": lambda m: m.byte_string(m.source.number(1)),
        "\x8e": lambda m: m.byte_string(m.source.number(8)),
        "(": lambda m: m.stack.append(_MARK),
        "0": lambda m: m.stack.pop(),
        "1": lambda m: m.since_mark(),
        "2": lambda m: m.stack.append(m.stack[-1]),
        "]": lambda m: m.stack.append([]),
        ")": lambda m: m.stack.append(()),
        "}": lambda m: m.stack.append({}),
        "\x8f": lambda m: m.stack.append(set()),
        "a": _Machine.append,
        "e": _Machine.appends,
        "l": lambda m: m.stack.append(m.since_mark()),
        "t": lambda m: m.stack.append(tuple(m.since_mark())),
        "\x85": lambda m: m.tuple_(1),
        "\x86": lambda m: m.tuple_(2),
        "\x87": lambda m: m.tuple_(3),
        "s": _Machine.set_item,
        "u": _Machine.set_items_since_mark,
        "d": _Machine.dict_,
        "\x90": _Machine.add_items,
        "\x91": lambda m: m.stack.append(frozenset(map(key_of, m.since_mark()))),
        "\x94": lambda m: m.put(len(m.memo)),
        "p": lambda m: m.put(_number(m.source.line())),
        "q": lambda m: m.put(m.source.number(1)),
        "r": lambda m: m.put(m.source.number(4)),
        "g": lambda m: m.get(_number(m.source.line())),
        "h": lambda m: m.get(m.source.number(1)),
        "j": lambda m: m.get(m.source.number(4)),
        "c": _Machine.global_,
        "\x93": _Machine.stack_global,
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,
        "\x92": _Machine.newobj_ex,
        "b": _Machine.build,
        "Q": _Machine.persistent_id,
    }.items()
}
# Operations of pickle that nothing here needs: they make objects in other ways, or hold what is not in the file.
_KNOWN = {
    ord(code): name
    for code, name in {
        "i": "INST",
        "o": "OBJ",
        "P": "PERSID",
        "\x82": "EXT1",
        "\x83": "EXT2",
        "\x84": "EXT4",
        "\x96": "BYTEARRAY8",
        "\x97": "NEXT_BUFFER",
        "\x98": "READONLY_BUFFER",
    }.items()
}


def input_error(
    path: object, error: Refused | Damaged, kind: str = "snapshot", advice: str = "download or export it again"
) -> InputError:
    """The one line for people: `kind` is what the file should be, `advice` the way out."""
    if isinstance(error, Refused):
        return InputError(
            f"{path}: refused, because it holds {error}; a {kind} may hold only tensors and plain containers, and "
            f"nothing in it was executed: {advice}"
        )
    return InputError(f"{path}: not a complete {kind} ({error}): {advice}")
