"""What a kernel's PTX tells about its reads of global memory: how wide each is, and how many wait for one another."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

FUSED = Path(__file__).parents[1] / "fused"

INSTRUCTION = re.compile(r"\s*\{?\s*(?:@!?(%p\d+)\s+)?([a-z][\w.:]*)\s*([^/]*)")
"""Guard, operation, operands."""
REGISTER = re.compile(r"%(?:rd|rs|r|p|fd|f)\d+")
FIRST_OPERAND = re.compile(r"\{[^}]*\}|[^,]+")
NO_RESULT = ("st.", "bra", "bar", "red", "cp.async", "fence", "membar")
IN_ORDER = ("ld.", "st.", "bra", "bar", "red", "atom", "cp.async.c")
"""What no compiler moves past one another; arithmetic goes where its operands are there."""
TURNS = 4


def accesses(text: str) -> dict[str, dict[int, int]]:
    """Accesses of global memory by pointer, then by width. The line of the source that each is of stands before it."""
    # Where the file lies is not believed: what is cached may have been compiled from another checkout of the source.
    files = re.findall(r'\.file\s+(\d+) "[^"]*/([^"/]+)"', text)
    lines = {
        (number, str(line)): text
        for number, name in files
        if (path := FUSED / name).is_file()
        for line, text in enumerate(path.read_text().splitlines(), 1)
    }
    found: dict[str, Counter[int]] = {}
    name = ""
    for instruction in text.splitlines():
        if place := re.match(r"\s*\.loc\s+(\d+) (\d+) (\d+)", instruction):
            source = lines.get((place[1], place[2]), "")
            pointer = re.match(r"tl\.(?:load|store|atomic_add)\((\w+)", source[int(place[3]) - 1 :])
            name = pointer[1] if pointer else name
        elif plain := re.search(r"\b(?:ld|st)\.global(?:\.[a-z0-9_:]+)*?(?:\.v([248]))?\.[bsuf](\d+)", instruction):
            found.setdefault(name, Counter())[int(plain[2]) // 8 * int(plain[1] or 1)] += 1
        elif copied := re.search(r"cp\.async\.c[ag]\.shared\.global [^;]*?, (0x[0-9a-f]+|\d+)", instruction):
            found.setdefault(name, Counter())[int(copied[1], 0)] += 1
    return {name: dict(sorted(widths.items())) for name, widths in found.items()}


def latencies(text: str) -> int | None:
    """How many times one turn of the kernel's outermost loop waits for global memory, all reads taking equally long.

    The loop's instructions are gone through in the order in which they stand, all branches taken, time after time,
    until what a turn reads for the next is seen. Memory operations, barriers and branches start in order, each when its
    operands are there; whatever was started with a wait for memory in between took one latency more. Reads that start
    together cost one. None where there is no loop.
    """
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    jumps = [
        (labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"\bbra\S*\s+(\$L\w+);", line))
    ]
    loops = [(begin, end) for begin, end in jumps if begin < end]
    if not loops:
        return None
    begin, end = max(loops, key=lambda loop: loop[1] - loop[0])
    ends = _turns(lines[begin : end + 1])
    return ends[-1] - ends[-2]


def path(text: str) -> int:
    """How many times a program waits for global memory from its start to its end, by the same count, all branches taken
    and every loop gone through once."""
    return _turns(text.splitlines())[0]


def _turns(body: Sequence[str]) -> list[int]:
    """The time at the end of each of so many turns of a loop, in latencies."""
    ready: dict[str, int] = {}
    groups: list[int] = []
    now = copied = 0
    ends = []
    for _ in range(TURNS):
        for line in body:
            found = INSTRUCTION.match(line)
            if not found or not found[2]:
                continue
            guard, op, operands = found.groups()
            first = FIRST_OPERAND.match(operands)
            at = first.end() if first and not op.startswith(NO_RESULT) else 0
            there = max((ready.get(r, 0) for r in [guard, *REGISTER.findall(operands[at:])]), default=0)
            if op.startswith(IN_ORDER):
                now = max(now, there)
            if op.startswith("cp.async.commit"):
                groups.append(copied)
            elif op.startswith("cp.async.wait_group"):
                now = max([now, *groups[: len(groups) - int(operands.strip(" ;"))]])
            elif op.startswith("cp.async.c"):
                copied = now + 1
            elif op.startswith(("ld.global", "atom")):
                there = now + 1
            elif op.startswith("ld."):
                there = now
            ready.update((r, there) for r in REGISTER.findall(operands[:at]))
        ends.append(now)
    return ends
