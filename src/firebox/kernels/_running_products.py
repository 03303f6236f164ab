"""Machine code of Hopper (SASS) that writes registers while a running wgmma still reads them.

    overwritten(sass) → ["HGMMA.64x64x16.F32.BF16 R24, R100, …; then IMAD.U32 R100, …", …]

A wgmma runs on when its instruction has been issued, and its first operand may be registers: nothing may
write these until the code has waited for it. ptxas of CUDA 12.8 and 12.9 keeps to that within a stretch of
code, not from a loop's end to its beginning (kernels/_wgmma.py; that of 13.4 does;
https://github.com/triton-lang/triton/issues/9433). So each loop is read twice over, in the order in which it
stands: what is left running at its end meets its beginning. A branch forward counts as not taken.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_FRAGMENT = 4  # registers of a wgmma's first operand
_LINE = re.compile(r"^\s*(?:/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?(\S.*?)\s*;|(\.L_\w+):)", re.MULTILINE)
_BRANCH = re.compile(r"^BRA\S*\s.*?(?:`\((\.L_\w+)\)|0x([0-9a-f]+))$")
_PRODUCT = re.compile(r"^[HQI]GMMA\S*\s+R\d+,\s*(?:R(\d+),\s*)?gdesc")
_WAIT = re.compile(r"^WARPGROUP\.DEPBAR\S*\s+gsb0,\s*0x([0-9a-f]+)")
_RESULT = re.compile(r"^(\S+)\s+(?:!?U?P[\dT],\s*)*R(\d+)\b")
# instructions that write none, or no register but a uniform one or a predicate
_READS_FIRST = re.compile(
    r"^(?:ST|RED|LDGSTS|R2UR|[IFHD]SETP|FCHK|BAR|SYNCS|UTMA|WARPSYNC|CCTL|CALL|RET|BRX|JMX)"
)


@dataclass(frozen=True)
class _Product:
    text: str
    registers: frozenset[int]
    ends_group: bool


def overwritten(sass: str) -> list[str]:
    """Each running product whose operand is written, with the first instruction that does."""
    code, loops = _read(sass)
    found: dict[str, str] = {}
    for first, last in loops:
        body = code[first : last + 1]
        running = _run(body, [], {})  # the first time round nothing comes from before
        _run(body, running, found)
    return [f"{product}; then {text}" for product, text in found.items()]


def _read(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """The instructions, and the loops among them: the places of their first and of their branch back."""
    code: list[str] = []
    places: dict[str, int] = {}  # of labels, and of addresses where branches name those
    for address, text, label in _LINE.findall(sass):
        if label:
            places[label] = len(code)
        else:
            places[address.lstrip("0")] = len(code)
            code.append(text)
    loops = []
    for last, text in enumerate(code):
        branch = _BRANCH.match(text)
        first = places.get(branch[1] or branch[2].lstrip("0")) if branch else None
        if first is not None and first < last:
            loops.append((first, last))
    return code, loops


def _run(body: Sequence[str], running: list[_Product], found: dict[str, str]) -> list[_Product]:
    """The products that are left running when `body` follows `running`."""
    running = list(running)
    for text in body:
        product, wait = _PRODUCT.match(text), _WAIT.match(text)
        if product:
            first = int(product[1]) if product[1] else 0
            registers = range(first, first + _FRAGMENT) if product[1] else ()
            running.append(_Product(text, frozenset(registers), "gsb0" in text))
        elif wait:
            running = _left(running, int(wait[1], 16))
        else:
            written = _written(text)
            for each in running:
                if not each.registers.isdisjoint(written):
                    found.setdefault(each.text, text)
    return running


def _left(running: Sequence[_Product], groups: int) -> list[_Product]:
    """Those of the last `groups` groups, and those of no group yet."""
    ends = [place for place, each in enumerate(running) if each.ends_group]
    if len(ends) <= groups:
        return list(running)
    return list(running[ends[len(ends) - groups - 1] + 1 :])


def _written(text: str) -> range:
    """The registers that an instruction writes."""
    result = _RESULT.match(text)
    if result is None or _READS_FIRST.match(text):
        return range(0)
    name, first = result[1], int(result[2])
    return range(first, first + _width(name))


def _width(name: str) -> int:
    """How many registers an instruction writes, from its name."""
    if name.startswith("LDSM"):
        return int(name[-1]) if name[-1] in "24" else 1
    if name.startswith("LD"):
        return 4 if ".128" in name else 2 if ".64" in name else 1
    if re.match(r"[HIQO]MMA", name):
        return 4
    return 2 if ".WIDE" in name or re.match(r"D(ADD|MUL|FMA)|CS2R$", name) else 1
