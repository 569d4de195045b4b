"""Peak memory read off a dump of buffers: ranges of use, shared places, other memories."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.tpu_buffers import HBM, ON_CHIP, covered, peak_bytes, until_buffers
from neocc.ir.errors import NeoccError

HLO = """HloModule jit_train_step, is_scheduled=true

%body (arg: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %arg = (s32[], f32[1024]{0}) parameter(0)
  %n = s32[] get-tuple-element(%arg), index=0
  %x = f32[1024]{0} get-tuple-element(%arg), index=1
  %inside = f32[4096]{0} broadcast(%x), dimensions={0}
  %next = f32[1024]{0} slice(%inside), slice={[0:1024]}
  ROOT %out = (s32[], f32[1024]{0}) tuple(%n, %next)
}

%condition (arg.1: (s32[], f32[1024])) -> pred[] {
  %arg.1 = (s32[], f32[1024]{0}) parameter(0)
  ROOT %less = pred[] constant(false)
}

ENTRY %main (p: f32[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %before = f32[2048]{0} broadcast(%p), dimensions={0}
  %start = f32[1024]{0} slice(%before), slice={[0:1024]}
  %zero = s32[] constant(0)
  %state = (s32[], f32[1024]{0}) tuple(%zero, %start)
  %loop = (s32[], f32[1024]{0}) while(%state), condition=%condition, body=%body
  ROOT %result = f32[1024]{0} get-tuple-element(%loop), index=1
}
"""
ASSIGNMENT = """BufferAssignment:
allocation 0: size 4096, parameter 0, shape |f32[1024]| at ShapeIndex {}:
 value: <0 p @0> (size=4096,offset=0): f32[1024]{0}
allocation 1: size 65536, preallocated-temp:
 value: <1 before @0> (size=8192,offset=0): f32[2048]{0}
 value: <2 start @0> (size=4096,offset=16384): f32[1024]{0}
 value: <3 inside @0> (size=16384,offset=0): f32[4096]{0}
 value: <4 next @0> (size=4096,offset=16384): f32[1024]{0}
 value: <5 prefetched @1> (size=32768,offset=0): f32[8192]{0}
"""
VALUES = """Used values:
<0 p @0>
 positions:
  p
 uses:
  before, operand 0
<1 before @0>
 positions:
  before
 uses:
  start, operand 0
<2 start @0>
 positions:
  start
  state {1}
  loop {1}
 uses:
  loop, operand 0 {1}
<3 inside @0>
 positions:
  inside
 uses:
  next, operand 0
<4 next @0>
 positions:
  next
  out {1}
<5 prefetched @1>
 positions:
  inside
"""


def dumped(folder: Path) -> Path:
    name = "module_0000.jit_train_step.after_optimizations"
    (folder / f"{name}-buffer-assignment.txt").write_text(ASSIGNMENT)
    (folder / f"{name}-buffer-assignment-values.txt").write_text(VALUES)
    (folder / f"{name}_after_buffer_assignment.txt").write_text(HLO)
    return folder


def test_the_peak_is_what_is_live_at_once_and_what_shares_a_place_counts_once(
    tmp_path: Path,
) -> None:
    # In the loop: the parameter, `inside`, and one place that `start` and `next` share. Not
    # `before`, which is dead, nor what lies in on-chip memory.
    assert peak_bytes(dumped(tmp_path), HLO) == 4096 + 16384 + 4096


def test_what_lies_on_chip_at_the_same_moment_is_counted_where_it_is_asked_for(
    tmp_path: Path,
) -> None:
    both = peak_bytes(dumped(tmp_path), HLO, (HBM, ON_CHIP))
    assert both == 4096 + 16384 + 4096 + 32768


def test_pieces_that_overlap_are_covered_once() -> None:
    assert covered(iter([(0, 10), (5, 10), (5, 2), (20, 1)])) == 16


def test_a_compile_is_left_when_its_buffers_are_there(tmp_path: Path) -> None:
    assert until_buffers(lambda: dumped(tmp_path), tmp_path, 10.0) == HLO


def test_a_compile_that_fails_says_why(tmp_path: Path) -> None:
    def fail() -> None:
        raise ValueError("RESOURCE_EXHAUSTED: 17.01G of 15.75G")

    with pytest.raises(NeoccError, match=r"17\.01G"):
        until_buffers(fail, tmp_path, 10.0)
