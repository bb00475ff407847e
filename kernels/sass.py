"""Reading NVIDIA machine code (SASS, as nvdisasm prints it): the main loop of a kernel and what it is made of."""

import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*(?:\.[A-Za-z0-9_]+)*)\s*([^;]*);"
)
_LABEL = re.compile(r"^(\.L_x?_?\d+):")
_PIPES = {
    "tensor": r"HMMA|IMMA|QMMA|OMMA|HGMMA|UTC.*MMA|DMMA",
    "shuffle": r"SHFL",
    "shared": r"LDS|LDSM|STS|STSM|ULDS",
    "global": r"LDG|LDGSTS|LD|LDC|LDCU|ULDC|STG|ST|RED|ATOM|UBLKCP",
    "local": r"LDL|STL",
    "fma": r"FFMA|FMUL|FADD|HFMA2|HMUL2|HADD2|IMAD|FFMA2|FMUL2|FADD2",
    "convert": r"F2FP|F2F|I2F|F2I|I2FP|FRND",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR",
    "control": r"BRA|EXIT|CALL|RET|BSSY|BSYNC|BAR|DEPBAR|LDGDEPBAR|WARPSYNC|MEMBAR|FENCE|SYNCS|WARPGROUP",
}
_PIPE_OF = {pipe: re.compile(rf"(?:{pattern})$") for pipe, pattern in _PIPES.items()}


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    target: int | None = None
    """where a branch goes"""
    conditional: bool = False

    @property
    def base(self) -> str:
        """The name without its modifiers: HMMA of HMMA.16816.F32.BF16."""
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        """Which unit of the processor it occupies; "alu" for what no other pattern takes."""
        return next((pipe for pipe, pattern in _PIPE_OF.items() if pattern.match(self.base)), "alu")


def parse(text: str) -> list[list[Instruction]]:
    """All instructions first, then what lies between a backward branch and its target, a list each."""
    lines, labels, pending = [], {}, []
    for line in text.splitlines():
        label = _LABEL.match(line.strip())
        found = _INSTRUCTION.match(line)
        if label:
            pending.append(label.group(1))
        elif found:
            address = int(found.group(1), 16)
            labels.update(dict.fromkeys(pending, address))
            pending = []
            lines.append((address, found.group(3), found.group(4), bool(found.group(2))))
    instructions = [
        Instruction(address, name, _target(arguments, labels) if name.startswith("BRA") else None, guarded)
        for address, name, arguments, guarded in lines
    ]
    spans = sorted({(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address})
    return [instructions, *([i for i in instructions if start <= i.address <= end] for start, end in spans)]


def _target(arguments: str, labels: dict[str, int]) -> int | None:
    by_label = re.search(r"`\((\.L[_x0-9]+)\)", arguments)
    if by_label:
        return labels.get(by_label.group(1))
    by_address = re.search(r"0x([0-9a-f]+)", arguments)
    return int(by_address.group(1), 16) if by_address else None


def main_loop(text: str, marker: str) -> list[Instruction]:
    """The shortest loop that holds a fair part of the `marker` instructions; everything where there is no loop.

    A part: the rest may lie in iterations peeled off, or in a span that is no loop but a jump back from cold code.
    """
    everything, *loops = parse(text)
    part = 0.4 * max((count(loop, marker) for loop in loops), default=0)
    candidates = [loop for loop in loops if count(loop, marker) >= part > 0] or [everything]
    return [i for i in min(candidates, key=len) if i.base != "NOP"]


def walk(text: str, marker: str) -> list[Instruction]:
    """The main loop as a warp goes through it whose lanes stay together.

    A branch to code for lanes apart (BRA.DIV), and any conditional one, falls through; an unconditional one forward
    is followed. So paths that main_loop holds and such a warp never takes are left out.
    """
    loop = main_loop(text, marker)
    passed, skip_to = [], 0
    for here in loop:
        if here.address < skip_to:
            continue
        passed.append(here)
        if here.name == "BRA" and not here.conditional and here.target is not None and here.target > here.address:
            skip_to = here.target
    return passed


def count(instructions: list[Instruction], base: str) -> int:
    return sum(i.base == base for i in instructions)


def pipes(instructions: list[Instruction]) -> Counter[str]:
    """How many instructions each unit gets."""
    return Counter(i.pipe for i in instructions)
