"""The cost of a compiled program on one chip, read from its optimized HLO: FLOPs of products, bytes to and from the
chip's memory, and bytes sent to other chips. A loop counts as often as it runs; the compiler's own `cost_analysis`
counts the body of a scan once.

    cost = read(compiled.as_text())      # .flops .hbm_bytes .collectives["all-gather"].wire

These are counted:
* FLOPs of dots, of convolutions (the form of products on a TPU; without padding) and of Splash attention (the blocks on
  and below the diagonal). All other FLOPs are negligible.
* The bytes of the operands and results of each instruction; for a fusion that reads or writes a slice, only the slice.
  Arrays in the chip's scratch memory (S(1) in the text) and padding to tiles are not counted.
* The bytes that a chip sends in each collective by the usual ring: (n-1)/n of the gathered array, and twice that for an
  all-reduce.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

SIZES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16, "token": 0, "opaque": 0}
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id", "iota",
    "copy-done", "async-done", "async-update", "opt-barrier", "domain", "all-gather-done", "all-reduce-done",
    "collective-permute-done", "slice-done", "dynamic-slice-done",
}  # fmt: skip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
SAME_VALUE = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape", "broadcast"}
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}  # products [T, T] x C of each kernel


class HLOError(ValueError):
    """A text is not an optimized HLO module."""


class Array(NamedTuple):
    """An array in an instruction's type. ``in_hbm``: its layout keeps it in the chip's main memory."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.shape) * _itemsize(self.dtype)

    @property
    def moved(self) -> float:
        return self.bytes if self.in_hbm else 0.0


class Instruction(NamedTuple):
    name: str
    arrays: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    inside: str  # the text in the parentheses: a constant's value, a parameter's number
    attributes: str

    def called(self, attribute: str) -> str | None:
        found = re.search(rf"{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    @functools.cached_property
    def parameters(self) -> dict[int, str]:
        return {int(i.inside): i.name for i in self.instructions.values() if i.op == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions.values():
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users


class Traffic(NamedTuple):
    """The collectives of one kind: how many run, and the bytes that a chip sends in all of them."""

    count: float = 0.0
    wire: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one call on one chip. ``unknown_loops``: loops counted once, because their number of turns is not in
    the text."""

    flops: float = 0.0
    hbm_bytes: float = 0.0
    collectives: Mapping[str, Traffic] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0

    @property
    def wire_bytes(self) -> float:
        return sum(traffic.wire for traffic in self.collectives.values())

    def __add__(self, other: "Cost") -> "Cost":
        kinds = dict.fromkeys([*self.collectives, *other.collectives])
        zero = Traffic()
        both = {kind: (self.collectives.get(kind, zero), other.collectives.get(kind, zero)) for kind in kinds}
        return Cost(
            self.flops + other.flops,
            self.hbm_bytes + other.hbm_bytes,
            {kind: Traffic(a.count + b.count, a.wire + b.wire) for kind, (a, b) in both.items()},
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, n: float) -> "Cost":
        scaled = {kind: Traffic(n * t.count, n * t.wire) for kind, t in self.collectives.items()}
        return Cost(n * self.flops, n * self.hbm_bytes, scaled, self.unknown_loops)


def read(text: str) -> Cost:
    """The cost of the module ``text`` (``jax.stages.Compiled.as_text()``) on one chip. A loop whose number of turns
    depends on data counts once, so a program of decode steps costs as much as one step.

    Raises: HLOError.
    """
    module = Module(text)
    return module.sum(module.computations[module.entry])


# ------------------------------------------------------------------------------------------------------------- parsing

_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


def _itemsize(dtype: str) -> float:
    if dtype in SIZES:
        return SIZES[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for dtype, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(n) for n in re.findall(r"\d+", dims))
        found.append(Array(dtype, shape, space is None or space[1] == "0"))
    return tuple(found)


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        if text[place] == "(":
            depth += 1
        elif text[place] == ")":
            depth -= 1
            if depth == 0:
                return place
    raise HLOError(f"a parenthesis is not closed in {text[:120]!r}; give the whole text of a compiled program")


def _instruction(line: str, found: re.Match[str]) -> Instruction:
    start = found.end()
    type_end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", type_end)
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing]
    op = line[type_end:opening].strip()
    operands = () if op in ("constant", "parameter") else tuple(_NAME.findall(inside))
    return Instruction(found[2], _arrays(line[start:type_end]), op, operands, inside, line[closing + 1 :])


# --------------------------------------------------------------------------------------------------------------- costs


class Module:
    """An optimized HLO module."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        partitions = re.search(r"num_partitions=(\d+)", text[:100_000])
        self.partitions = int(partitions[1]) if partitions else 1
        current: Computation | None = None
        for line in text.splitlines():
            if head := _HEAD.match(line):
                current = self.computations[head[2]] = Computation(head[2])
                self.entry = head[2] if head[1] else self.entry
            elif line == "}" or line.startswith("}, execution_thread"):  # not "}}, ...", a line of a kernel's metadata
                current = None
            elif current is not None and (found := _START.match(line)):
                instruction = _instruction(line, found)
                current.instructions[instruction.name] = instruction
                current.root = instruction.name if found[1] else current.root
        if not self.entry:
            raise HLOError("the text has no ENTRY; give the text of a compiled program")
        self.costs: dict[str, Cost] = {}  # of computations, by name

    def sum(self, computation: Computation) -> Cost:
        """The cost of all instructions of a computation."""
        total = Cost()
        for instruction in computation.instructions.values():
            total += self._cost(computation, instruction)
        return total

    def _inner(self, name: str) -> Cost:
        if name not in self.costs:
            self.costs[name] = self.sum(self.computations[name])
        return self.costs[name]

    def _cost(self, computation: Computation, i: Instruction) -> Cost:
        if i.op in FREE:
            return Cost()
        if i.op == "while":
            return self._loop(computation, i)
        if i.op in ("call", "async-start"):
            return self._inner(i.called("to_apply" if "to_apply=" in i.attributes else "calls") or "")
        if i.op == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
            names = _NAME.findall(branches[1]) if branches else re.findall(r"_computation=%?([\w.\-]+)", i.attributes)
            return max((self._inner(name) for name in names), key=lambda cost: (cost.flops, cost.hbm_bytes))
        kind = i.op.removesuffix("-start")
        if kind in COLLECTIVES:
            return Cost(0.0, self._operands(computation, i) + _moved(i), {kind: self._traffic(computation, i, kind)})
        if i.op == "fusion":
            called = self.computations[i.called("calls") or ""]
            inside = self._inner(called.name)
            scattered = "all-reduce-scatter" in called.name  # it sends half as much as the all-reduce inside it
            collectives = {k: t._replace(wire=t.wire / (1 + scattered)) for k, t in inside.collectives.items()}
            return Cost(inside.flops, self._fusion_bytes(computation, i, called), collectives)
        return Cost(self._flops(computation, i), self._bytes(computation, i))

    # ---- loops

    def _loop(self, computation: Computation, i: Instruction) -> Cost:
        body, condition = (self.computations[i.called(name) or ""] for name in ("body", "condition"))
        n = self.turns(computation, i, body, condition)
        inside = self._inner(body.name) + self._inner(condition.name)
        if n is None:
            return dataclasses.replace(inside, unknown_loops=inside.unknown_loops + 1)
        return inside.times(n)

    def turns(self, outer: Computation, i: Instruction, body: Computation, condition: Computation) -> int | None:
        """The number of turns of a loop that counts up or down to a constant by a constant step; else None."""
        if known := re.search(r'known_trip_count":\{"n":"(\d+)"', i.attributes):
            return int(known[1])
        root = condition.instructions[condition.root]
        if root.op == "fusion":
            called = self.computations[root.called("calls") or ""]
            inner = called.instructions[called.root]
            arguments = {name: root.operands[number] for number, name in called.parameters.items()}
            sides = [arguments.get(name, name) for name in inner.operands]
            homes = [condition if name in arguments else called for name in inner.operands]
            root = inner
        else:
            sides, homes = list(root.operands), [condition, condition]
        direction = re.search(r"direction=(\w+)", root.attributes)
        if root.op != "compare" or direction is None:
            return None
        start = self._value(outer, i.operands[0], {})
        if not isinstance(start, dict):
            return None
        after = self._value(body, body.root, {0: start})
        values = []
        for state in (start, after if isinstance(after, dict) else {}):
            values.append([self._value(c, name, {0: state}) for name, c in zip(sides, homes, strict=True)])
        (a0, b0), (a1, b1) = values
        if direction[1] in ("GT", "GE"):
            a0, b0, a1, b1 = b0, a0, b1, a1
        if not all(type(x) is int for x in (a0, b0, a1)) or b1 not in (b0, None) or a1 <= a0:
            return None
        inclusive = direction[1] in ("LE", "GE")
        return max(0, -(-(b0 + inclusive - a0) // (a1 - a0))) if direction[1] != "EQ" else None

    def _value(self, computation: Computation, name: str, parameters: Mapping[int, Any]) -> Any:
        """The integer that follows from constants and ``parameters``, or a dict of them for a tuple; else None."""
        i = computation.instructions[name]

        def operand(k: int) -> Any:
            return self._value(computation, i.operands[k], parameters)

        match i.op:
            case "constant":
                return int(i.inside) if re.fullmatch(r"-?\d+", i.inside) else None
            case "parameter":
                return parameters.get(int(i.inside))
            case "tuple":
                values = {number: operand(number) for number in range(len(i.operands))}
                return {number: value for number, value in values.items() if value is not None}
            case "get-tuple-element":
                inside, index = operand(0), re.search(r"index=(\d+)", i.attributes)
                return inside.get(int(index[1])) if isinstance(inside, dict) and index else None
            case "add" | "subtract" | "multiply":
                a, b = operand(0), operand(1)
                if type(a) is not int or type(b) is not int:
                    return None
                return a + b if i.op == "add" else a - b if i.op == "subtract" else a * b
            case "fusion" if len(i.arrays) == 1 and not i.arrays[0].shape:
                called = self.computations[i.called("calls") or ""]
                return self._value(called, called.root, {k: operand(k) for k in range(len(i.operands))})
        return operand(0) if i.op in SAME_VALUE and i.operands else None

    # ---- memory

    def _operands(self, computation: Computation, i: Instruction) -> float:
        return sum(_moved(computation.instructions[name]) for name in dict.fromkeys(i.operands))

    def _bytes(self, computation: Computation, i: Instruction) -> float:
        operands = [computation.instructions[name] for name in i.operands]
        match i.op:
            case "dynamic-slice" | "slice" | "gather" | "dynamic-slice-start" | "slice-start":
                return _moved(operands[0]._replace(arrays=i.arrays[-1:])) + _moved(i)
            case "dynamic-update-slice":
                return 2 * _moved(operands[1])
            case "scatter":
                return 2 * _moved(operands[-1]) + _moved(operands[1])
            case "copy-start":
                return _moved(operands[0]) + i.arrays[0].moved
            case "custom-call" if "AllocateBuffer" in i.attributes:
                return 0.0
        return self._operands(computation, i) + _moved(i)

    def _fusion_bytes(self, computation: Computation, i: Instruction, called: Computation) -> float:
        operands = [computation.instructions[name] for name in i.operands]
        total = 0.0
        for number, operand in enumerate(operands):
            if (name := called.parameters.get(number)) is not None and (moved := _moved(operand)):
                total += min(moved, self._read(called, name))
        roots = called.instructions[called.root]
        outputs = roots.operands if roots.op == "tuple" else (roots.name,)
        for array, name in zip(i.arrays, outputs, strict=False):
            total += min(array.moved, self._written(called, name)) if array.in_hbm else 0.0
        return total

    def _read(self, computation: Computation, name: str) -> float:
        """Bytes of its parameter ``name`` that a fused computation reads."""
        total = 0.0
        for user in computation.users.get(name, []):
            first = user.operands[0] == name
            match user.op:
                case "dynamic-slice" | "slice" | "gather" if first:
                    total += sum(array.bytes for array in user.arrays)
                case "dynamic-update-slice" | "scatter" if first:
                    continue  # written in place
                case "bitcast" | "get-tuple-element" | "reshape" | "convert" | "copy" | "transpose":
                    total += self._read(computation, user.name) if user.name != computation.root else math.inf
                case "fusion":
                    called = self.computations[user.called("calls") or ""]
                    for number, operand in enumerate(user.operands):
                        if operand == name and number in called.parameters:
                            total += self._read(called, called.parameters[number])
                case _:
                    return math.inf
        return total

    def _written(self, computation: Computation, name: str) -> float:
        i = computation.instructions[name]
        while i.op in ("bitcast", "copy", "convert", "reshape") and i.operands:
            i = computation.instructions[i.operands[0]]
        if i.op == "dynamic-update-slice":
            return 2 * sum(array.bytes for array in computation.instructions[i.operands[1]].arrays)
        if i.op == "fusion" and len(i.arrays) == 1:
            called = self.computations[i.called("calls") or ""]
            return self._written(called, called.root)
        return math.inf

    # ---- products

    def _flops(self, computation: Computation, i: Instruction) -> float:
        operands = [computation.instructions[name] for name in i.operands]
        if i.op == "dot":
            contracting = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
            lhs = operands[0].arrays[0].shape
            inner = [lhs[int(d)] for d in contracting[1].split(",") if d] if contracting else []
            return 2.0 * math.prod(i.arrays[0].shape) * math.prod(inner)
        if i.op == "convolution":
            lhs, kernel = (operand.arrays[0].shape for operand in operands[:2])
            return _convolution(lhs, kernel, i.arrays[0].shape, i.attributes)
        if i.op == "custom-call" and "tpu_custom_call" in i.attributes:
            products = next((n for name, n in SPLASH.items() if name in i.name), 0)
            arrays = [array for operand in operands for array in operand.arrays]
            blocks = next((a.shape for a in arrays if a.dtype in ("s8", "s32") and len(a.shape) == 3), (1, 1, 1))
            query = next((a.shape for a in arrays if a.dtype in ("bf16", "f32") and len(a.shape) >= 3), None)
            if products and query:
                *rows, T, C = query
                return products * 2.0 * math.prod(rows) * T * T * C * (blocks[1] + 1) / (2 * blocks[1])
        return 0.0

    # ---- interconnect

    def _traffic(self, computation: Computation, i: Instruction, kind: str) -> Traffic:
        size = sum(array.bytes for name in i.operands for array in computation.instructions[name].arrays)
        if kind == "collective-permute":
            pairs = re.findall(r"\{(\d+),(\d+)\}", i.attributes)
            return Traffic(1.0, size if any(a != b for a, b in pairs) else 0.0)
        n = group_size(i.attributes, self.partitions)
        share = (n - 1) / n
        return Traffic(1.0, {"all-gather": size * (n - 1), "all-reduce": 2 * size * share}.get(kind, size * share))


def _moved(i: Instruction) -> float:
    return sum(array.moved for array in i.arrays)


def group_size(attributes: str, everyone: int = 1) -> int:
    """The number of chips in a collective, from any notation of its replica groups; ``everyone`` if they are empty.

    Raises: HLOError.
    """
    if "replica_groups={}" in attributes:
        return everyone
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([\w.]+)'=(\d+)", named[1])}
        parts = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(counted[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return len(listed[1].split(","))
    raise HLOError(f"no replica groups in {attributes[:200]!r}; this notation of HLO is new, add it here")


def _convolution(lhs: tuple[int, ...], kernel: tuple[int, ...], out: tuple[int, ...], attributes: str) -> float:
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise HLOError(
            f"a convolution has no dim_labels: {attributes[:200]!r}; this notation of HLO is new, add it here"
        )
    window = dict(re.findall(r"(\w+)=(\S+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    lhs_sizes, kernel_sizes, out_sizes = (
        dict(zip(names, shape, strict=True)) for names, shape in zip(labels.groups(), (lhs, kernel, out), strict=True)
    )
    spatial = sorted(label for label in out_sizes if label.isdigit())

    def numbers(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    dilations = numbers("lhs_dilate", "1"), numbers("rhs_dilate", "1")
    settings = zip(numbers("stride", "1"), numbers("pad", "0_0"), *dilations, strict=True)
    products = 2.0 * out_sizes["b"] * out_sizes["f"] * kernel_sizes["i"]
    for label, (stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, settings, strict=True):
        sizes = lhs_sizes[label], kernel_sizes[label], out_sizes[label]
        products *= _meetings(*sizes, int(stride), int(pad.split("_")[0]), int(lhs_dilate), int(rhs_dilate))
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return products / (int(groups[1]) if groups else 1)


@functools.cache
def _meetings(inputs: int, kernel: int, outputs: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """The number of pairs of an output and a kernel position that meet an input instead of padding."""
    total = 0
    at_k = np.arange(kernel) * rhs_dilate - low
    for output in range(outputs):
        places = output * stride + at_k
        total += int(((places >= 0) & (places <= (inputs - 1) * lhs_dilate) & (places % lhs_dilate == 0)).sum())
    return total
