"""Figures of a program compiled for TPUs, from its text: estimated cycles, collectives, and what is copied.

The text is optimized HLO (`jax.stages.Compiled.as_text`). Its operations carry the compiler's own estimate of their
cycles, and where they come from: a path of the scopes of the source ("jit(speculate)/while/body/target/dot_general").
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute", "ragged-all-to-all")
GROUPS = ("all-gather-start", "collective-permute-start")  # whose result holds what goes in beside what comes out
MOVING = {"copy", "copy-start", "transpose", "concatenate", "pad", "slice", "dynamic-slice", "convert"}
SAME = {"bitcast", "reshape", "copy-done", "optimization-barrier"}  # the same array, or as good as that
# What a fusion has that only moves its operands.
PASSING = MOVING | SAME | {"parameter", "constant", "tuple", "get-tuple-element"}
BITS = {"pred": 8, "bf16": 16, "token": 0}
WRITE_BACK = "write-back"
FAST = "S(1)"  # of a layout: in the chip's vector memory
UNKNOWN = 2**62  # cycles
SMALLEST = 2**20  # bytes of an array whose copy is worth a line
PARTS = re.compile(r"([a-z]+\d*\w*)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One operation of a computation."""

    name: str
    result: str  # its shape or shapes, with layouts
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes and metadata

    def called(self, attribute: str) -> tuple[str, ...]:
        """The computations that an attribute names, such as body=%name or branch_computations={%a, %b}."""
        found = re.search(rf"\b{attribute}=(?:%?([\w.-]+)|\{{([^}}]*)\}})", self.rest)
        if found is None:
            return ()
        return (found[1],) if found[1] else tuple(name.strip().lstrip("%") for name in found[2].split(","))

    @property
    def origin(self) -> str:
        """Its path of scopes; of a parameter the path of the argument, such as "params.target.embed"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it has none, UNKNOWN or more where it says that it knows none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.rest)
        return int(found[1]) if found else None

    @property
    def index(self) -> int:
        """Of a parameter, or of what is taken from a tuple."""
        found = re.search(r"\bindex=(\d+)", self.rest)
        return int(found[1]) if found else int(self.operands[0])


class Program(NamedTuple):
    """A program's computations by name."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


class Move(NamedTuple):
    """An array of the program's arguments that is copied, whole or in part."""

    argument: str  # its path, such as "params.target.layers[0].q"
    opcode: str  # WRITE_BACK where it comes from the vector memory as it went there, with something written into it
    bytes: int
    looped: bool  # in a loop, and not once a dispatch
    name: str  # of the operation


class Cost(NamedTuple):
    """What one run of a computation costs; loops whose turns neither they nor their counters say count once."""

    cycles: Counter[str]  # estimated, by phase
    collectives: Counter[str]  # by kind
    collective_bytes: Counter[str]  # of their results on one device, by kind
    unknown: int  # operations of which the compiler estimates nothing: kernels, and grouped products


class Figures(NamedTuple):
    """What a program's text says."""

    loop: Cost  # one turn of the loop that takes longest, or all of the program
    around: Cost  # the rest of a dispatch
    moves: tuple[Move, ...]


def parse_program(text: str) -> Program:
    """The computations of a program's text."""
    found: dict[str, tuple[Instruction, ...]] = {}
    entry, name, inside = "", "", []
    for line in text.splitlines():
        if line.startswith("}"):
            found[name] = tuple(inside)
        elif line.startswith((" ", "\t")):
            instruction = _parse_instruction(line)
            if instruction is not None:
                inside.append(instruction)
        elif line.endswith("{") and not line.startswith("HloModule"):
            heading = re.match(r"(ENTRY )?%?([\w.-]+)", line)
            assert heading is not None
            name, inside = heading[2], []
            entry = name if heading[1] else entry
    return Program(found, entry)


def _parse_instruction(line: str) -> Instruction | None:
    begin = re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)
    if begin is None:
        return None
    at = begin.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    opcode = re.compile(r"\s*([\w-]+)\(").match(line, end)
    if opcode is None:
        return None
    close = _closing(line, opcode.end() - 1)
    inner = line[opcode.end() : close]
    operands = re.findall(r"%([\w.-]+)", inner) or [part.strip() for part in inner.split(",") if part.strip()]
    return Instruction(begin[1], line[at:end], opcode[1], tuple(operands), line[close + 1 :])


def _closing(text: str, at: int) -> int:
    """Where the parenthesis that opens at `at` closes."""
    depth = 0
    for place in range(at, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def array_bytes(shapes: str) -> list[int]:
    """The bytes of each array of a result, such as "(bf16[8,128]{1,0}, u32[])"."""
    return [
        math.prod(int(n) for n in sizes.split(",") if n) * _bits(kind) // 8 for kind, sizes in PARTS.findall(shapes)
    ]


def _bits(kind: str) -> int:
    if kind in BITS:
        return BITS[kind]
    width = re.search(r"\d+", kind)
    return int(width[0]) if width else 0


def read_figures(text: str, phases: Iterable[str], looped: bool = True) -> Figures:
    """What the text of a program says.

    Args:
        phases: the named scopes that are told apart; what is in none is "other".
        looped: the program is a loop of which one turn is of interest; else all of it is.
    """
    program = parse_program(text)
    reader = _Reader(program, tuple(phases))
    entry = program.computations[program.entry]
    loops = [instruction for instruction in entry if looped and instruction.opcode == "while"]
    whole = reader.cost(program.entry)
    if not loops:
        return Figures(whole, _nothing(), reader.moves())
    turns = [_sum(reader.cost(name) for name in (*x.called("body"), *x.called("condition"))) for x in loops]
    largest = max(turns, key=lambda turn: turn.cycles.total())
    around = Cost(
        whole.cycles - largest.cycles,
        whole.collectives - largest.collectives,
        whole.collective_bytes - largest.collective_bytes,
        whole.unknown - largest.unknown,
    )
    return Figures(largest, around, reader.moves())


def _nothing() -> Cost:
    return Cost(Counter(), Counter(), Counter(), 0)


def _sum(costs: Iterable[Cost], times: int = 1) -> Cost:
    total = _nothing()
    for cost in costs:
        for mine, other in zip(total[:3], cost[:3], strict=True):
            mine.update({name: value * times for name, value in other.items()})
        total = total._replace(unknown=total.unknown + cost.unknown * times)
    return total


class _Reader:
    """Goes through a program's computations."""

    def __init__(self, program: Program, phases: tuple[str, ...]):
        self._program = program
        self._phases = phases
        self._costs: dict[str, Cost] = {}

    def cost(self, computation: str) -> Cost:
        """Of one run of a computation with all that it calls."""
        if computation not in self._costs:
            costs = map(self._instruction_cost, self._program.computations.get(computation, ()))
            self._costs[computation] = _sum(costs)
        return self._costs[computation]

    def _instruction_cost(self, x: Instruction) -> Cost:
        if x.opcode == "while":
            names = (*x.called("body"), *x.called("condition"))
            return _sum(map(self.cost, names), self._turns(x))
        if x.opcode == "conditional":
            names = x.called("branch_computations") or (*x.called("true_computation"), *x.called("false_computation"))
            return max(map(self.cost, names), key=lambda cost: cost.cycles.total(), default=_nothing())
        cost = _nothing()
        kind = x.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = array_bytes(x.result)
            cost.collectives[kind] += 1
            cost.collective_bytes[kind] += max(sizes) if x.opcode in GROUPS else sum(sizes)
        inner = _sum(map(self.cost, (*x.called("calls"), *(x.called("to_apply") if x.opcode == "call" else ()))))
        if x.opcode == "fusion":  # its own estimate is of all that is in it
            inner = inner._replace(cycles=Counter(), unknown=0)
        kernel = x.opcode == "custom-call" and "tpu_custom_call" in x.rest
        cycles = UNKNOWN if kernel and not x.cycles else x.cycles or 0
        if 0 < cycles < UNKNOWN:
            cost.cycles[self._phase(x)] += cycles
        return _sum((cost._replace(unknown=int(cycles >= UNKNOWN)), inner))

    def _turns(self, loop: Instruction) -> int:
        """How often a loop runs, as it says itself, or as its counter ends; 1 where neither is known."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        inside = [y for name in loop.called("condition") for y in self._program.computations.get(name, ())]
        constants = {y.name: y.operands[0] for y in inside if y.opcode == "constant" and y.operands}
        last = inside[-1] if inside else None
        if last and last.opcode == "compare" and "direction=LT" in last.rest:
            end = constants.get(last.operands[1], "")
            return int(end) if end.isdigit() else 1
        return 1

    def _phase(self, x: Instruction) -> str:
        """The phase that an operation belongs to: by its own scopes, or by those of most of what is fused in it."""
        own = self._named(x.origin)
        if own:
            return own
        inside = (y for name in x.called("calls") for y in self._program.computations.get(name, ()))
        found = Counter(filter(None, (self._named(y.origin) for y in inside)))
        return found.most_common(1)[0][0] if found else "other"

    def _named(self, path: str) -> str:
        return next((part for part in path.split("/") if part in self._phases), "")

    def moves(self) -> tuple[Move, ...]:
        """The copies of arguments in the program, of SMALLEST bytes and more."""
        return tuple(self._moves(self._program.entry, {}, False))

    def _moves(self, computation: str, given: dict[int, dict[int, str]], looped: bool) -> Iterator[Move]:
        """Those of a computation.

        Args:
            given: of each parameter that is a tuple, which argument each of its parts holds.
        """
        holds: dict[str, str] = {}  # an operation's name: the argument whose values it has
        tuples: dict[str, dict[int, str]] = defaultdict(dict)
        shapes: dict[str, str] = {}
        for x in self._program.computations.get(computation, ()):
            shapes[x.name] = x.result
            sources = [holds[name] for name in x.operands if name in holds]
            if x.opcode == "parameter":
                if given:
                    tuples[x.name] = given.get(x.index, {})
                elif x.origin:
                    holds[x.name] = x.origin
            elif x.opcode in ("tuple", "while"):
                if x.opcode == "tuple":
                    tuples[x.name] = {at: holds[name] for at, name in enumerate(x.operands) if name in holds}
                else:
                    tuples[x.name] = tuples[x.operands[0]]
                    for name in x.called("body"):
                        yield from self._moves(name, {0: tuples[x.operands[0]]}, True)
            elif x.opcode == "conditional":
                names = x.called("branch_computations") or (
                    *x.called("true_computation"),
                    *x.called("false_computation"),
                )
                for name, operand in zip(names, x.operands[1:], strict=False):
                    yield from self._moves(name, {0: tuples[operand]}, looped)
            elif x.opcode == "get-tuple-element":
                if x.index in tuples[x.operands[0]]:
                    holds[x.name] = tuples[x.operands[0]][x.index]
            elif sources and x.opcode in SAME:
                holds[x.name] = sources[0]
            elif sources and self._is_update(x):
                # The operand that is written to has the result's own shape.
                written = next((name for name in x.operands if shapes.get(name) == x.result and name in holds), None)
                if written:
                    holds[x.name] = holds[written]
            elif sources and (x.opcode in MOVING or self._only_moves(x)):
                holds[x.name] = sources[0]
                size = max(array_bytes(x.result), default=0)
                opcode = _kind_of_copy(x, shapes)
                if size >= SMALLEST and opcode:
                    yield Move(sources[0], opcode, size, looped, x.name)
            elif sources and x.opcode.removesuffix("-start") in COLLECTIVES:
                size = max(array_bytes(x.result), default=0)
                if size >= SMALLEST:
                    yield Move(sources[0], x.opcode, size, looped, x.name)

    def _only_moves(self, x: Instruction) -> bool:
        """Whether a fusion computes nothing."""
        if x.opcode != "fusion":
            return False
        inside = [y.opcode for name in x.called("calls") for y in self._program.computations.get(name, ())]
        return bool(inside) and set(inside) <= PASSING and bool(MOVING & set(inside))

    def _is_update(self, x: Instruction) -> bool:
        """Whether an operation writes into one of its operands."""
        if x.opcode != "fusion":
            return x.opcode in ("dynamic-update-slice", "scatter")
        inside = [y.opcode for name in x.called("calls") for y in self._program.computations.get(name, ())]
        return bool({"dynamic-update-slice", "scatter"} & set(inside))


def _kind_of_copy(x: Instruction, shapes: dict[str, str]) -> str:
    """An operation's kind of copy: its opcode, or WRITE_BACK; empty for one into the vector memory in the same layout.

    There the array is only read early, whole or a part of it.
    """
    if x.opcode not in ("copy", "copy-start", "slice", "dynamic-slice"):
        return x.opcode
    layouts = re.findall(r"\{[^{}]*\}", x.result)
    sources = re.findall(r"\{[^{}]*\}", shapes.get(x.operands[0], "")) or layouts[1:2]
    if not layouts or not sources or layouts[0].replace(FAST, "") != sources[0].replace(FAST, ""):
        return x.opcode
    if FAST in layouts[0]:
        return ""
    return WRITE_BACK if FAST in sources[0] else x.opcode
