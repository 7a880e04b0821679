"""Pickles read without executing anything: a small interpreter of pickle's opcodes that knows a closed list of names.

Python's own unpickler calls whatever a pickle names. Here a name is looked up in a table of functions of ours, which
build plain values; any other name ends the reading with an error that says which. Nothing is imported, no attribute is
looked up, no method of a value is called. Length claims are checked against the stream, and what a few bytes can be
made to cost is bounded (`MAX_OPCODES`, and a budget for what the functions build).
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from diffmem.errors import InputError

# A snapshot of a network with hundreds of layers takes about 10⁵; beyond this a stream is not one.
MAX_OPCODES = 5_000_000

_MARK = object()


class Refused(Exception):
    """The pickle wants something that is not on the list; the message says what."""


class Damaged(Exception):
    """The stream is not a whole, well-formed pickle; the message says how."""


@dataclass(eq=False)
class Record:
    """An object of which only its class's name and its attributes are kept."""

    class_name: str
    state: Any = None


@dataclass(frozen=True)
class Name:
    """A name on the list: `build(*args)` makes the value that calling or instantiating it stands for."""

    name: str
    build: Callable[..., Any] | None = None


class Budget:
    """How many bytes and items names may still build: a few times the file (storages pass through twice)."""

    def __init__(self, file_size: int):
        self.left = 4 * file_size

    def charge(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Refused("a stream that expands to several times its own size")


def plain_names(budget: Budget) -> dict[tuple[str, str], Name]:
    """The names that stand for plain containers and numbers."""

    def items(values: Any, kinds: tuple[type, ...]) -> Any:
        if not isinstance(values, kinds):
            raise Damaged(f"a container built from {type(values).__name__}")
        budget.charge(len(values))
        return values

    def ordered_dict(pairs: Any = ()) -> dict:
        return dict(items(pairs, (list, tuple, dict)))

    def encode(text: str, encoding: str) -> bytes:
        if not isinstance(text, str) or encoding != "latin1":
            raise Refused(f"_codecs.encode to {encoding!r}")
        budget.charge(len(text))
        return text.encode("latin1")

    def dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
        if not isinstance(code, str) or code not in (
            "b1",
            "i1",
            "i2",
            "i4",
            "i8",
            "u1",
            "u2",
            "u4",
            "u8",
            "f2",
            "f4",
            "f8",
        ):
            raise Refused(f"numpy.dtype {code!r}")
        return np.dtype("<" + code)

    def scalar(kind: np.dtype, data: bytes) -> Any:
        if not isinstance(kind, np.dtype) or not isinstance(data, bytes) or len(data) != kind.itemsize:
            raise Damaged("a numpy scalar whose bytes do not fit its dtype")
        return np.frombuffer(data, kind)[0].item()

    def reconstructor(kind: Any, base: Any, state: Any) -> Any:
        if not isinstance(kind, Name) or kind.build is None:
            raise Refused(f"an instance of {kind!r}")
        return kind.build() if state is None else kind.build(state)

    table: dict[tuple[str, str], Name] = {}

    def add(build: Callable[..., Any] | None, *spellings: str) -> None:
        for spelling in spellings:
            module, _, name = spelling.rpartition(".")
            table[module, name] = Name(spelling, build)

    add(ordered_dict, "collections.OrderedDict", "builtins.dict", "__builtin__.dict")
    add(lambda values=(): set(items(values, (list, tuple))), "builtins.set", "__builtin__.set")
    add(lambda values=(): list(items(values, (list, tuple))), "builtins.list", "__builtin__.list")
    add(lambda values=(): tuple(items(values, (list, tuple))), "builtins.tuple", "__builtin__.tuple")
    add(None, "builtins.object", "__builtin__.object")
    add(reconstructor, "copyreg._reconstructor", "copy_reg._reconstructor")
    add(encode, "_codecs.encode")
    add(dtype, "numpy.dtype")
    add(scalar, "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return table


def read_pickle(
    stream: BinaryIO, names: dict[tuple[str, str], Name], persistent: Callable[[Any], Any] | None = None
) -> Any:
    """The value of the one pickle at the stream's position, which is left behind its end.

    `names` lists every name the pickle may mention, by (module, name); `persistent` builds what a persistent id stands
    for. Raises Refused for any other name or way to make an object, Damaged where the stream is cut short or
    malformed.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                values = stack[index + 1 :]
                del stack[index:]
                return values
        raise Damaged("a mark is missing")

    def top(kinds: type | tuple[type, ...], operation: str) -> Any:
        if not isinstance(stack[-1], kinds):
            raise Damaged(f"{operation} on a {type(stack[-1]).__name__}")
        return stack[-1]

    def name(module: Any, attribute: Any) -> Name:
        if (module, attribute) not in names:
            raise Refused(f"{module}.{attribute}")
        return names[module, attribute]

    def construct(kind: Any, args: Any, kwargs: Any = None) -> Any:
        if not isinstance(kind, Name) or kind.build is None:
            raise Refused(f"a call of {kind.name if isinstance(kind, Name) else type(kind).__name__}")
        if not isinstance(args, tuple) or kwargs:
            raise Damaged(f"odd arguments for {kind.name}")
        return kind.build(*args)

    def pair_up(target: dict, values: list[Any]) -> None:
        if len(values) % 2:
            raise Damaged("a dictionary with a key and no value")
        target.update(zip(values[::2], values[1::2], strict=True))

    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES:
                raise Refused(f"a stream of more than {MAX_OPCODES} operations")
            operation = opcode.name
            if operation in ("PROTO", "FRAME"):
                continue
            if operation == "STOP":
                if len(stack) != 1 or stack[0] is _MARK:
                    raise Damaged(f"{len(stack)} values or marks where one value was expected")
                return stack[0]
            if operation in _CONSTANTS:
                stack.append(_CONSTANTS[operation])
            elif operation in _LITERALS:
                stack.append(argument)
            elif operation == "MARK":
                stack.append(_MARK)
            elif operation == "POP":
                stack.pop()
            elif operation == "POP_MARK":
                since_mark()
            elif operation == "DUP":
                stack.append(stack[-1])
            elif operation in _EMPTY:
                stack.append(_EMPTY[operation]())
            elif operation == "APPEND":
                value = stack.pop()
                top(list, operation).append(value)
            elif operation == "APPENDS":
                values = since_mark()
                top(list, operation).extend(values)
            elif operation == "LIST":
                stack.append(since_mark())
            elif operation == "TUPLE":
                stack.append(tuple(since_mark()))
            elif operation in ("TUPLE1", "TUPLE2", "TUPLE3"):
                size = int(operation[-1])
                if len(stack) < size:
                    raise Damaged("a tuple of missing values")
                values = tuple(stack[-size:])
                stack[-size:] = [values]
            elif operation in ("SETITEM", "SETITEMS"):
                values = since_mark() if operation == "SETITEMS" else [stack.pop(-2), stack.pop()]
                pair_up(top(dict, operation), values)
            elif operation == "DICT":
                values = since_mark()
                stack.append({})
                pair_up(stack[-1], values)
            elif operation == "ADDITEMS":
                values = since_mark()
                top(set, operation).update(values)
            elif operation == "FROZENSET":
                stack.append(frozenset(since_mark()))
            elif operation == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif operation in ("GET", "BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif operation == "GLOBAL":
                stack.append(name(*argument.split(" ", 1)))
            elif operation == "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(name(module, attribute))
            elif operation in ("REDUCE", "NEWOBJ"):
                args = stack.pop()
                stack.append(construct(stack.pop(), args))
            elif operation == "NEWOBJ_EX":
                kwargs, args = stack.pop(), stack.pop()
                stack.append(construct(stack.pop(), args, kwargs))
            elif operation == "BUILD":
                state = stack.pop()
                _set_state(stack[-1], state)
            elif operation == "BINPERSID" and persistent is not None:
                stack.append(persistent(stack.pop()))
            else:
                raise Refused(f"the operation {operation}")
            if stack and stack[-1] is _MARK and operation != "MARK":
                raise Damaged(f"{operation} leaves a mark on top")
    except (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise Damaged(" ".join(str(error).split()) or type(error).__name__) from None
    raise Damaged("it ends before its STOP")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTES = ("BINBYTES", "SHORT_BINBYTES", "BINBYTES8")
_LITERALS = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))


def _set_state(value: Any, state: Any) -> None:
    """BUILD: a record keeps its attributes; a dict's (`_metadata`) and a dtype's (byte order) are not needed."""
    if isinstance(value, Record):
        value.state = state
    elif isinstance(value, np.dtype):
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise Refused(f"a numpy.dtype of state {state!r}")
    elif not isinstance(value, dict):
        raise Refused(f"attributes for a {type(value).__name__}")


def input_error(path: object, error: Refused | Damaged) -> InputError:
    """The one line for people."""
    if isinstance(error, Refused):
        return InputError(
            f"{path}: refused, because it holds {error}; a snapshot may hold tensors and plain containers only, "
            "and nothing of it was executed"
        )
    return InputError(f"{path}: not a whole snapshot ({error}); fetch or export it again")
