"""What a compiled program does, read off its text (XLA's HLO): kernels, collectives, bytes moved;
and the floating-point operations of the program that was traced.
"""

import collections
import functools
import math
import re
from typing import Any, NamedTuple

from jax.extend.core import jaxprs_in_params

COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that start no kernel: they name memory, or wait for what was started.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "domain"),
    *("partition-id", "replica-id", "opt-barrier", "add-dependency"),
}
CALLS = ("call", "async-start")  # their kernels are those of the computation that they name


class Instruction(NamedTuple):
    """One line of a computation."""

    opcode: str
    size: int  # bytes of its result
    operands: tuple[str, ...]
    line: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute such as ``body`` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.line)
        return found[1] if found else None

    @property
    def number(self) -> int | None:
        """The value of an integer constant, or the index of a ``get-tuple-element``; else None."""
        found = re.search(r" constant\((-?\d+)\)| get-tuple-element\(.*index=(\d+)", self.line)
        return int(found[1] or found[2]) if found else None


class Work(NamedTuple):
    """What a program does once, on one device."""

    kernels: float
    bytes: float
    collectives: collections.Counter[str]
    in_loop: float = 0.0  # kernels of one turn of the longest loop that ends by what it computes
    unknown: int = 0  # loops whose turns nobody knows: they are counted as one turn

    def __add__(self, other: Any) -> "Work":
        return Work(
            self.kernels + other.kernels,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            max(self.in_loop, other.in_loop),
            self.unknown + other.unknown,
        )

    def times(self, count: int) -> "Work":
        """The same ``count`` times."""
        collectives = collections.Counter({k: count * n for k, n in self.collectives.items()})
        return self._replace(
            kernels=count * self.kernels, bytes=count * self.bytes, collectives=collectives
        )


NOTHING = Work(0.0, 0.0, collections.Counter())


def work(text: str, turns: int | None) -> Work:
    """What a program's text says it does.

    Args:
        text: ``compiled.as_text()``.
        turns: of a loop that ends by what it computes: a sampler's, at most a token each. None: the
            program has no such loop.
    """
    computations, entry = _parsed(text)

    @functools.cache
    def of(name: str) -> Work:
        table = computations[name]
        return sum(
            (_of_instruction(x, table, computations, turns, of) for x in table.values()), NOTHING
        )

    return of(entry)


def _of_instruction(
    instruction: Instruction, table: Any, computations: Any, turns: int | None, of: Any
) -> Work:
    opcode = instruction.opcode
    if opcode == "while":
        body = of(instruction.called("body"))
        counted = _turns(instruction, table, computations)
        if counted is not None:
            return body.times(counted)
        if turns is None:
            return body._replace(unknown=body.unknown + 1)
        return body.times(turns)._replace(in_loop=body.kernels)
    if opcode == "conditional":
        names = re.search(r"branch_computations=\{([^}]*)\}", instruction.line)
        keys = ("true_computation", "false_computation")
        if names:
            branches = names[1].replace("%", "").split(", ")
        else:
            branches = [name for key in keys if (name := instruction.called(key))]
        works = [of(name) for name in branches]
        return max(works, key=lambda work: work.bytes)
    if opcode in CALLS:
        name = instruction.called("to_apply") or instruction.called("calls")
        return of(name) if name else NOTHING
    if opcode in FREE or opcode.endswith(("-done", "-update")):
        return NOTHING
    name = opcode.removesuffix("-start")
    collectives = collections.Counter({name: 1} if name in COLLECTIVES else {})
    return Work(1.0, _traffic(instruction, table, computations), collectives)


def _turns(loop: Instruction, table: Any, computations: Any) -> int | None:
    """How often a loop runs: as XLA:GPU and XLA:CPU say, or, since XLA:TPU does not, by the counter
    that its condition compares with a constant. None: it ends by what it computes.
    """
    known = TRIPS.search(loop.line)
    if known:
        return int(known[1])
    condition = computations[loop.called("condition")]
    body = computations[loop.called("body")]
    *_, compare = condition.values()
    if compare.opcode != "compare":
        return None
    if "direction=LT" not in compare.line:
        return None
    counter = _source(compare.operands[0], condition)
    limit = _source(compare.operands[1], condition)
    if counter.opcode != "get-tuple-element":
        return None
    if limit.opcode != "constant":
        return None
    *_, result = body.values()
    start = _part(table[loop.operands[0]], counter.number, table)
    raised = _part(result, counter.number, body)
    if start is None or start.opcode != "constant":
        return None
    if raised is None or raised.opcode != "add":
        return None
    before = _source(raised.operands[0], body)
    step = _source(raised.operands[1], body)
    if before.number != counter.number:
        return None
    if step.opcode != "constant":
        return None
    last = limit.number
    first = start.number
    width = step.number
    if last is None or first is None or width is None:
        return None
    return math.ceil((last - first) / width)


def _part(instruction: Instruction, index: Any, table: Any) -> Instruction | None:
    """What stands at an index of a tuple; None if the instruction makes no tuple."""
    if instruction.opcode != "tuple":
        return None
    return _source(instruction.operands[index], table)


def _source(name: str, table: Any) -> Instruction:
    """The instruction of a name, or what it copies."""
    instruction: Instruction = table[name]
    while instruction.opcode == "copy":
        instruction = table[instruction.operands[0]]
    return instruction


def _traffic(instruction: Instruction, table: Any, computations: Any) -> float:
    """Bytes that a kernel reads and writes: its operands and its result, but of an operand that is
    sliced, gathered from or updated in place no more than that part.
    """
    read = sum(table[name].size for name in instruction.operands if name in table)
    fused = computations.get(instruction.called("calls"))
    inside = {"": instruction} if fused is None else fused
    names = table if fused is None else fused
    moved = float(read + instruction.size)
    for inner in inside.values():
        sizes = [names[name].size if name in names else 0 for name in inner.operands]
        if inner.opcode in ("dynamic-slice", "gather") and _is_parameter(inner, names, fused):
            moved -= sizes[0] - inner.size
        if inner.opcode == "dynamic-update-slice":
            untouched = inner.size - sizes[1]
            moved -= inner.size + untouched
    return max(moved, float(instruction.size if fused is None else 0))


def _is_parameter(instruction: Instruction, names: Any, fused: Any) -> bool:
    """Whether the first operand is an array in memory and not a value inside the kernel."""
    first = names.get(instruction.operands[0]) if instruction.operands else None
    return first is not None and (fused is None or first.opcode == "parameter")


def _parsed(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """{computation: {name: instruction}}, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    table: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        header = COMPUTATION.match(line)
        if header:
            table = computations[header[1]] = {}
            entry = header[1] if line.startswith("ENTRY") else entry
        elif " = " in line and line.startswith(" "):
            name, _, rest = line.partition(" = ")
            table[name.split()[-1].removeprefix("%")] = _instruction(rest)
    return computations, entry


def _instruction(text: str) -> Instruction:
    """The instruction behind ``name =``: its type, opcode, operands in parentheses, attributes."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode, _, _ = text[end:].strip().partition("(")
    start = text.index("(", end)
    operands = re.findall(r"%([\w.\-]+)", text[start : _closing(text, start)])
    return Instruction(opcode, _size(text[:end]), tuple(operands), text)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _size(text: str) -> int:
    """Bytes of a type, of a tuple's parts together."""
    size = 0.0
    for dtype, shape in SHAPE.findall(text):
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        size += bits / 8 * math.prod(int(n) for n in shape.split(",") if n)
    return int(size)


def custom_calls(text: str) -> dict[str, int]:
    """{name: how many} of the calls of kernels that are not XLA's own."""
    return dict(collections.Counter(re.findall(r'custom_call_target="([^"]+)"', text)))


def flops(jaxpr: Any, turns: int) -> float:
    """Floating-point operations of the matrix products of a traced program, on all devices.

    Args:
        jaxpr: of ``jax.make_jaxpr``.
        turns: as in ``work``.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        parameters = equation.params
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        parts = [flops(part, turns) for part in jaxprs_in_params(parameters)]
        if equation.primitive.name == "cond":
            total += max(parts)
        else:
            total += _repeated(equation, turns) * sum(parts)
    return total


def _repeated(equation: Any, turns: int) -> int:
    """How often the jaxprs inside an equation run, over all devices."""
    name = equation.primitive.name
    parameters = equation.params
    if name == "scan":
        return int(parameters["length"])
    if name == "shard_map":
        return math.prod(parameters["mesh"].shape[axis] for axis in parameters["newly_manual_axes"])
    return turns if name == "while" else 1
