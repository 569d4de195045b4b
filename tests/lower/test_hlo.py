"""Facts read off HLO text. Fixtures are trimmed from real compiles; each names its source."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neocc.lower.hlo import axes_of, axes_of_pairs, read_hlo
from neocc.lower.hlo_flops import valid_positions
from neocc.lower.hlo_text import Array, HloError, arrays, parse_groups

FIXTURES = Path(__file__).parent / "fixtures"


def facts(name: str):
    return read_hlo((FIXTURES / name).read_text(encoding="utf-8"))


def test_a_tpu_program_gives_each_collective_its_axes_bytes_and_trips() -> None:
    hlo = facts("v5e_4x4_loop.hlo.txt")
    assert hlo.devices == 16
    found = Counter()
    for c in hlo.collectives:
        where = axes_of_pairs if c.kind == "collective-permute" else axes_of
        found[c.kind, c.written_as, where(c.groups, (4, 4)), c.operand_bytes, c.trip_count] += 1
    assert found == {
        ("all-gather", "all_gather", (1,), 256 * 128 * 2, 4): 1,
        ("all-gather", "all_gather", (0,), 128 * 512 * 2, 4): 2,
        # A small reduce-scatter along the minor dim: the compiler sums all and slices.
        ("all-reduce", "reduce_scatter", (1,), 256 * 512 * 2, 4): 1,
        ("all-to-all", "all_to_all", (0,), 256 * 128 * 2, 1): 1,
        ("collective-permute", "ppermute", (1,), 1024 * 32 * 2, 1): 1,
        ("all-reduce", "psum", (0, 1), 4, 1): 1,
        ("all-reduce", "pmax", (0, 1), 4 * 4, 1): 1,
        ("all-reduce", "psum", (1,), 8 * 128 * 4, 1): 1,
        ("all-reduce", "psum", (0,), 16 * 128 * 4, 1): 2,
    }
    gather = next(c for c in hlo.collectives if c.operand_shape == (256, 128))
    assert gather.result_shape == (256, 512) and gather.result_bytes == 256 * 512 * 2


def test_operands_that_the_compiler_combined_are_told_apart() -> None:
    combined = [
        c for c in facts("v5e_4x4_loop.hlo.txt").collectives if c.instruction == "all-reduce.1"
    ]
    assert [(c.operand_index, c.operand_count) for c in combined] == [(0, 2), (1, 2)]


def test_the_reduction_is_read_from_the_reducer() -> None:
    reductions = {
        c.written_as: c.reduction for c in facts("v5e_4x4_loop.hlo.txt").collectives if c.reduction
    }
    assert reductions == {"reduce_scatter": "add", "psum": "add", "pmax": "maximum"}


def test_flops_of_a_loop_are_exact_and_cycles_counted_per_trip() -> None:
    hlo = facts("v5e_4x4_loop.hlo.txt")
    product = 2 * 256 * 512 * 512
    assert hlo.flops == 4 * 2 * product
    assert [m.trip_count for m in hlo.matmuls] == [4, 4]
    assert list(hlo.flops_by_op_name.values()) == [4 * 2 * product]
    assert hlo.estimated_cycles == 69322
    assert [(loop.trip_count, loop.executions) for loop in hlo.loops] == [(4, 1)]


def test_a_fused_padded_scatter_is_one_reduce_scatter_and_a_permute_of_the_compiler() -> None:
    scatter, shift = facts("v5e_padded_scatter.hlo.txt").collectives
    assert (scatter.kind, scatter.fused, scatter.written_as) == (
        "reduce-scatter",
        True,
        "reduce_scatter",
    )
    assert (scatter.operand_shape, scatter.result_shape) == ((4096, 4096), (1024, 4096))
    assert scatter.result_bytes * 4 == scatter.operand_bytes == 4096 * 4096 * 2
    assert (shift.kind, shift.written_as) == ("collective-permute", None)


def test_collectives_on_sparse_cores_are_counted_and_their_cycles_are_not() -> None:
    hlo = facts("tpu7x_sparsecore.hlo.txt")
    assert Counter(c.kind for c in hlo.collectives if c.trip_count == 4) == {
        "all-gather": 3,
        "reduce-scatter": 1,
    }
    assert hlo.flops == 4 * 2 * (2 * 2048 * 4096 * 4096)
    assert hlo.estimated_cycles == 1785328  # the unknown ones are printed as 2^64 - 1


def test_the_cpu_form_reads_the_same() -> None:
    hlo = facts("cpu_2x2_loop.hlo.txt")
    assert hlo.flops == 3 * 2 * 8 * 16 * 16
    assert Counter((c.kind, c.trip_count) for c in hlo.collectives) == {
        ("all-gather", 3): 2,
        ("reduce-scatter", 3): 1,
        ("all-gather", 1): 1,
        ("all-reduce", 1): 2,
        ("all-to-all", 1): 1,
        ("collective-permute", 1): 1,
    }
    exchange = next(c for c in hlo.collectives if c.kind == "all-to-all")
    assert exchange.operand_bytes == 8 * 16 * 4  # printed as one operand per peer


NESTED = """HloModule nested, num_partitions=4

%add.r (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%step (p: s32[], q: s32[]) -> s32[] {
  %p = s32[] parameter(0)
  %q = s32[] parameter(1)
  ROOT %n = s32[] add(%p, %q)
}

%inner_body (t: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %t = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %two = s32[] constant(2)
  %i2 = s32[] fusion(%i, %two), kind=kLoop, calls=%step
  %x = f32[8]{0} get-tuple-element(%t), index=1
  %limit = s32[] get-tuple-element(%t), index=2
  %y = f32[8]{0} all-reduce(%x), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add.r
  ROOT %u = (s32[], f32[8]{0}, s32[]) tuple(%i2, %y, %limit)
}

%inner_cond (t.1: (s32[], f32[8], s32[])) -> pred[] {
  %t.1 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %i.1 = s32[] get-tuple-element(%t.1), index=0
  %limit.1 = s32[] get-tuple-element(%t.1), index=2
  ROOT %c.1 = pred[] compare(%limit.1, %i.1), direction=GE
}

%outer_body (o: (s32[], f32[8], s32[])) -> (s32[], f32[8], s32[]) {
  %o = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j = s32[] get-tuple-element(%o), index=0
  %x.2 = f32[8]{0} get-tuple-element(%o), index=1
  %seven = s32[] get-tuple-element(%o), index=2
  %one = s32[] constant(1)
  %start = s32[] copy(%one)
  %in = (s32[], f32[8]{0}, s32[]) tuple(%start, %x.2, %seven)
  %w = (s32[], f32[8]{0}, s32[]) while(%in), condition=%inner_cond, body=%inner_body
  %z = f32[8]{0} get-tuple-element(%w), index=1
  %j2 = s32[] subtract(%j, %one)
  ROOT %v = (s32[], f32[8]{0}, s32[]) tuple(%j2, %z, %seven)
}

%outer_cond (o.1: (s32[], f32[8], s32[])) -> pred[] {
  %o.1 = (s32[], f32[8]{0}, s32[]) parameter(0)
  %j.1 = s32[] get-tuple-element(%o.1), index=0
  %zero = s32[] constant(0)
  ROOT %c.2 = pred[] compare(%j.1, %zero), direction=GT
}

ENTRY %main (x0: f32[8]) -> f32[8] {
  %x0 = f32[8]{0} parameter(0)
  %three = s32[] constant(3)
  %seven.1 = s32[] constant(7)
  %init = (s32[], f32[8]{0}, s32[]) tuple(%three, %x0, %seven.1)
  %loop = (s32[], f32[8]{0}, s32[]) while(%init), condition=%outer_cond, body=%outer_body
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""


def test_trip_counts_are_worked_out_through_hoisted_constants_and_nesting() -> None:
    hlo = read_hlo(NESTED)  # outer: 3, 2, 1; inner: 1, 3, 5, 7
    assert {loop.instruction: (loop.trip_count, loop.executions) for loop in hlo.loops} == {
        "loop": (3, 1),
        "w": (4, 3),
    }
    (reduce,) = hlo.collectives
    assert reduce.trip_count == 12
    assert reduce.groups == ((0, 2), (1, 3)) and axes_of(reduce.groups, (2, 2)) == (0,)


def test_a_loop_that_cannot_be_counted_is_named() -> None:
    hlo = read_hlo(
        NESTED.replace("tuple(%three, %x0", "tuple(%rest, %x0").replace(
            "  %three = s32[] constant(3)", "  %rest = s32[] custom-call()"
        )
    )
    assert hlo.unknown_loops == ("loop",)
    assert hlo.collectives[0].trip_count == 4


def test_the_compilers_own_trip_count_is_believed() -> None:
    text = NESTED.replace(
        "body=%outer_body", 'body=%outer_body, backend_config={"known_trip_count":{"n":"5"}}'
    )
    assert read_hlo(text).collectives[0].trip_count == 20


def program(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return (
        f"HloModule m, num_partitions=4\n{more}\nENTRY %main (a: f32[4]) -> f32[] {{\n{body}\n}}\n"
    )


SUM = NESTED[NESTED.index("%add.r (") : NESTED.index("%step (")]


@pytest.mark.parametrize(
    ("start", "done", "kind", "operand", "result"),
    [
        (
            "%s = (f32[4]{0}, f32[16]{0}) all-gather-start(%a), replica_groups={}, dimensions={0}",
            "%d = f32[16]{0} all-gather-done(%s)",
            "all-gather",
            16,
            64,
        ),
        (
            "%s = f32[4]{0} all-reduce-start(%a), replica_groups={{0,1,2,3}}, to_apply=%add.r",
            "%d = f32[4]{0} all-reduce-done(%s)",
            "all-reduce",
            16,
            16,
        ),
        (
            "%s = ((f32[4]{0}), f32[1]{0}, u32[]) reduce-scatter-start(%a),"
            " replica_groups=[1,4]<=[4], dimensions={0}, to_apply=%add.r",
            "%d = f32[1]{0} reduce-scatter-done(%s)",
            "reduce-scatter",
            16,
            4,
        ),
        (
            "%s = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a),"
            " source_target_pairs={{0,1},{1,0}}",
            "%d = f32[4]{0} collective-permute-done(%s)",
            "collective-permute",
            16,
            16,
        ),
    ],
)
def test_an_asynchronous_pair_is_one_collective(start, done, kind, operand, result) -> None:
    text = program("%a = f32[4]{0} parameter(0)", start, f"ROOT {done}", more=SUM)
    (found,) = read_hlo(text).collectives
    assert (found.kind, found.operand_bytes, found.result_bytes) == (kind, operand, result)


def test_a_wrapped_asynchronous_call_is_counted_once() -> None:
    wrapped = (
        "\n%wrap (p: f32[4]) -> f32[16] {\n  %p = f32[4]{0} parameter(0)\n  ROOT %g = f32[16]{0}"
        " all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}\n}\n"
    )
    text = program(
        "%a = f32[4]{0} parameter(0)",
        "%s = ((f32[4]{0}), f32[16]{0}, u32[]) async-start(%a), calls=%wrap",
        "ROOT %d = f32[16]{0} async-done(%s), calls=%wrap",
        more=wrapped,
    )
    (found,) = read_hlo(text).collectives
    assert found.result_shape == (16,)


DOT = "f32[4,4]{{1,0}} dot({0}, {0}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}"
GATHER = "all-gather(%{}), replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
IN_FUSIONS = f"""
%begin (p: f32[4,4]) -> (f32[16,4]) {{
  %p = f32[4,4] parameter(0)
  %g1 = f32[16,4] {GATHER.format("p")}, frontend_attributes={{chain_id="7"}}
  ROOT %c1 = (f32[16,4]) custom-call(%g1), custom_call_target="AsyncCollectiveStart"
}}

%meanwhile (q: f32[4,4]) -> (f32[4,4], f32[16,4]) {{
  %q = f32[4,4] parameter(0)
  %g2 = f32[16,4] {GATHER.format("q")}, frontend_attributes={{chain_id="7"}}
  %m = {DOT.format("%q")}
  ROOT %t = (f32[4,4], f32[16,4]) tuple(%m, %g2)
}}

%finish (r: f32[4,4]) -> f32[16,4] {{
  %r = f32[4,4] parameter(0)
  %g3 = f32[16,4] {GATHER.format("r")}, frontend_attributes={{chain_id="7"}}
  ROOT %c3 = f32[16,4] custom-call(%r, %g3), custom_call_target="AsyncCollectiveDone"
}}
"""


@pytest.mark.parametrize("between", [0, 1, 2])
def test_products_between_the_start_and_the_end_of_a_transfer_are_told(between: int) -> None:
    start = "(f32[4,4], f32[4,4], u32[], u32[]) collective-permute-start(%a)"
    products = [f"%m{i} = " + DOT.format("%a") for i in range(3)]
    text = program(
        "%a = f32[4,4]{1,0} parameter(0)",
        products[0],
        f"%s = {start}, source_target_pairs={{{{0,1}}}}",
        *products[1 : 1 + between],
        "ROOT %d = f32[4,4]{1,0} collective-permute-done(%s)",
    )
    (found,) = read_hlo(text).collectives
    assert (found.start, found.end, found.beside) == ("s", "d", between * 2 * 4 * 4 * 4)


def test_a_gather_that_runs_inside_fusions_is_one_beside_their_products() -> None:
    fusion = "fusion(%a), kind=kCustom, calls="
    text = program(
        "%a = f32[4,4]{1,0} parameter(0)",
        f"%s = (f32[16,4]) {fusion}%begin",
        f"%f = (f32[4,4], f32[16,4]) {fusion}%meanwhile",
        f"ROOT %d = f32[16,4] {fusion}%finish",
        more=IN_FUSIONS,
    )
    (found,) = read_hlo(text).collectives
    assert (found.kind, found.start, found.end) == ("all-gather", "s", "d")
    assert found.beside == read_hlo(text).flops == 2 * 4 * 4 * 4


def test_a_collective_that_starts_and_ends_at_once_has_nothing_beside_it() -> None:
    found = facts("v5e_4x4_loop.hlo.txt").collectives
    gathers = [c for c in found if c.kind == "all-gather"]
    assert gathers and not any(c.start or c.end or c.beside for c in gathers)


def test_a_branch_counts_once_and_says_that_it_may_not_run() -> None:
    branch = (
        "\n%b{n} (p{n}: f32[4]) -> f32[16] {{\n  %p{n} = f32[4]{{0}} parameter(0)\n  ROOT %g{n} ="
        " f32[16]{{0}} all-gather(%p{n}), replica_groups={{}}, dimensions={{0}}\n}}\n"
    )
    text = program(
        "%a = f32[4]{0} parameter(0)",
        "%i = s32[] constant(0)",
        "ROOT %c = f32[16]{0} conditional(%i, %a, %a), branch_computations={%b0, %b1}",
        more=branch.format(n=0) + branch.format(n=1),
    )
    assert [c.conditional for c in read_hlo(text).collectives] == [True, True]


def test_a_collective_in_a_computation_called_in_an_unknown_way_is_an_error() -> None:
    hidden = (
        "\n%h (p: f32[4]) -> f32[4] {\n  %p = f32[4]{0} parameter(0)\n  ROOT %g = f32[4]{0}"
        " collective-permute(%p), source_target_pairs={{0,1}}\n}\n"
    )
    text = program(
        "%a = f32[4]{0} parameter(0)", "ROOT %z = f32[4]{0} novelty(%a), via=%h", more=hidden
    )
    with pytest.raises(HloError, match=r"'g' is in computation 'h'"):
        read_hlo(text)


def test_text_that_is_not_hlo_is_refused() -> None:
    with pytest.raises(HloError, match="not HLO text"):
        read_hlo("module @jit_f {\n}\n")


def test_a_library_product_on_gpu_is_counted() -> None:
    text = program(
        "%a = f32[8,32]{1,0} parameter(0)",
        "%b = f32[32,16]{1,0} parameter(1)",
        "ROOT %c = (f32[8,16]{1,0}, s8[64]{0}) custom-call(%a, %b),"
        ' custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
        '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}',
    )
    assert read_hlo(text).flops == 2 * 8 * 16 * 32


JOINED = """HloModule joined, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%rows (p: f32[8], q: f32[24]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  %q = f32[24]{0} parameter(1)
  ROOT %concatenate.1 = f32[32]{0} concatenate(%p, %q), dimensions={0}NAMED
}

ENTRY %main (x: f32[8], y: f32[4,6]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %y = f32[4,6]{1,0} parameter(1)
  %row = f32[24]{0} bitcast(%y)
  %joined = f32[32]{0} fusion(%x, %row), kind=kLoop, calls=%rows
  %start = f32[32]{0} all-reduce-start(%joined), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %done = f32[32]{0} all-reduce-done(%start)
}
"""


def test_sums_that_the_gpu_compiler_joined_to_one_row_are_told_apart() -> None:
    found = read_hlo(JOINED.replace("NAMED", "")).collectives
    assert [(c.operand_bytes, c.operand_index, c.operand_count) for c in found] == [
        (32, 0, 2),
        (96, 1, 2),
    ]
    # A program's own concatenation is one operand.
    own = JOINED.replace("NAMED", ', metadata={op_name="jit(f)/concatenate"}')
    assert [c.operand_bytes for c in read_hlo(own).collectives] == [128]


def test_a_batched_product_as_the_tpu_writes_it_counts_no_padding() -> None:
    # dot [6,128,64] x [6,64,256]: the batch of 6 becomes a spatial dim of a dilated window.
    text = program(
        "%a = bf16[6,128,64]{2,1,0} parameter(0)",
        "%b = bf16[6,64,256]{2,1,0} parameter(1)",
        "ROOT %c = bf16[6,128,256]{2,1,0} convolution(%a, %b),"
        " window={size=6 stride=5 pad=0_0 lhs_dilate=6}, dim_labels=0bf_0io->0bf",
    )
    assert read_hlo(text).flops == 2 * 6 * 128 * 64 * 256


small = st.integers(1, 6)


@given(small, small, small, small, st.integers(-3, 5), small, small)
def test_valid_positions_are_those_that_meet_an_element(
    n, out, window, stride, pad, ld, rd
) -> None:
    dilated = {i * ld for i in range(n)}
    met = sum(
        o * stride + k * rd - pad in dilated
        for o, k in itertools.product(range(out), range(window))
    )
    assert valid_positions(n, out, window, stride, pad, ld, rd) == met


meshes = st.lists(st.integers(2, 4), min_size=1, max_size=4).map(tuple)


def groups_over(ids: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    rest = [a for a in range(ids.ndim) if a not in axes]
    width = math.prod(ids.shape[a] for a in axes)
    return ids.transpose(*rest, *axes).reshape(-1, width)


@given(st.data(), meshes)
def test_axes_are_found_again_from_their_groups(data, sizes) -> None:
    axes = tuple(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1)))))
    order = data.draw(st.permutations(range(math.prod(sizes))))
    groups = groups_over(np.array(order).reshape(sizes), axes).tolist()
    shuffled = data.draw(st.permutations([tuple(data.draw(st.permutations(g))) for g in groups]))
    assert axes_of(tuple(shuffled), sizes, tuple(order)) == axes


@given(st.data(), st.lists(st.integers(2, 3), min_size=1, max_size=3).map(tuple))
def test_groups_are_explained_only_by_axes_that_give_just_them(data, sizes) -> None:
    count = math.prod(sizes)
    width = data.draw(st.sampled_from([n for n in range(1, count + 1) if count % n == 0]))
    ids = np.arange(count).reshape(sizes)
    every = [
        axes for n in range(len(sizes) + 1) for axes in itertools.combinations(range(len(sizes)), n)
    ]
    groups = groups_over(ids, data.draw(st.sampled_from(every)))
    if data.draw(st.booleans()):
        groups = np.array(data.draw(st.permutations(range(count)))).reshape(-1, width)
    as_sets = set(map(frozenset, groups.tolist()))
    explained = [
        axes for axes in every if set(map(frozenset, groups_over(ids, axes).tolist())) == as_sets
    ]
    found = axes_of(tuple(map(tuple, groups.tolist())), sizes)
    assert found == (explained[0] if explained else None)


@given(st.data(), meshes)
def test_the_iota_form_lists_the_groups_it_stands_for(data, sizes) -> None:
    axes = data.draw(st.permutations(range(len(sizes))))
    width = sizes[axes[-1]]
    count = math.prod(sizes)
    dims, order = ",".join(map(str, sizes)), ",".join(map(str, axes))
    explicit = np.arange(count).reshape(sizes).transpose(axes).reshape(-1, width).tolist()
    written = "{" + ",".join("{" + ",".join(map(str, g)) + "}" for g in explicit) + "}"
    iota = parse_groups(f"[{count // width},{width}]<=[{dims}]T({order})", count)
    assert iota == parse_groups(written, count)


def test_unknown_group_forms_are_refused() -> None:
    with pytest.raises(HloError, match="unknown form"):
        parse_groups("mesh['x'=2]{'x'}", 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bf16[256,128]{1,0:T(8,128)(2,1)S(1)}", [Array("bf16", (256, 128))]),
        (
            "(f32[]{:T(128)}, (s4[3]{0}, pred[2]))",
            [Array("f32", ()), Array("s4", (3,)), Array("pred", (2,))],
        ),
        ("f8e4m3fn[7,0]{1,0}", [Array("f8e4m3fn", (7, 0))]),
        ("token[]", [Array("token", ())]),
    ],
)
def test_shapes_are_read_without_their_layout(text, expected) -> None:
    assert list(arrays(text)) == expected


def test_bytes_of_narrow_types() -> None:
    assert [
        Array("s4", (3,)).nbytes,
        Array("f8e4m3fn", (5,)).nbytes,
        Array("pred", (2,)).nbytes,
    ] == [2, 5, 2]


COMBINED_SCATTER = """HloModule jit_f, is_scheduled=true, num_partitions=8

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="jit(f)/reduce_scatter"}
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p0: f32[200,640], p1: f32[48,1600]) -> (f32[32,640], f32[48,208]) {
  %p0 = f32[200,640]{1,0:T(8,128)} parameter(0)
  %zero = f32[] constant(0)
  %pad.1 = f32[256,640]{1,0:T(8,128)} pad(%p0, %zero), padding=0_56x0_0
  %p1 = f32[48,1600]{0,1:T(8,128)} parameter(1)
  %pad.2 = f32[48,1664]{0,1:T(8,128)} pad(%p1, %zero), padding=0_0x0_64
  %all-reduce.1 = (f32[256,640]{1,0:T(8,128)}, f32[48,1664]{0,1:T(8,128)}) all-reduce(%pad.1, %pad.2), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%region_0.1
  %get-tuple-element.1 = f32[256,640]{1,0:T(8,128)} get-tuple-element(%all-reduce.1), index=0
  %first = u32[] constant(0)
  %dynamic-slice.1 = f32[32,640]{1,0:T(8,128)} dynamic-slice(%get-tuple-element.1, %first, %first), dynamic_slice_sizes={32,640}
  %get-tuple-element.2 = f32[48,1664]{0,1:T(8,128)} get-tuple-element(%all-reduce.1), index=1
  %dynamic-slice.2 = f32[48,208]{0,1:T(8,128)} dynamic-slice(%get-tuple-element.2, %first, %first), dynamic_slice_sizes={48,208}
  ROOT %tuple.1 = (f32[32,640]{1,0:T(8,128)}, f32[48,208]{0,1:T(8,128)}) tuple(%dynamic-slice.1, %dynamic-slice.2)
}

ENTRY %main.1 (x: f32[200,640], y: f32[48,1600]) -> (f32[32,640], f32[48,208]) {
  %x = f32[200,640]{1,0:T(8,128)} parameter(0)
  %y = f32[48,1600]{0,1:T(8,128)} parameter(1)
  ROOT %fusion.1 = (f32[32,640]{1,0:T(8,128)}, f32[48,208]{0,1:T(8,128)}) fusion(%x, %y), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501  (cut from a step of gpt2-xl on v5e 8x8)


def test_a_fused_scatter_of_several_operands_is_as_many_combined() -> None:
    first, second = read_hlo(COMBINED_SCATTER).collectives
    assert {c.kind for c in (first, second)} == {"reduce-scatter"}
    assert (first.operand_shape, first.result_shape) == ((200, 640), (25, 640))
    assert (second.operand_shape, second.result_shape) == ((48, 1600), (48, 200))
    assert first.instruction == second.instruction == "fusion.1"
    assert (first.operand_count, second.operand_count) == (2, 2)


def test_what_follows_a_kernel_is_read_too() -> None:
    """A Pallas kernel's metadata is printed on lines of its own, the last one with braces first."""
    text = """HloModule m, num_partitions=4

ENTRY %main (p: f32[8,8]) -> f32[32,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %ring.3 = (f32[8,8]{1,0}, f32[2,2]{1,0}) custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"mesh_axes":"[\\"x\\"]"
}}, metadata={op_name="jit(f)/neocc.all_reduce.7/ring/pallas_call"}, \
backend_config={"custom_call_config":{"body":"TUzvUg=="}}
  %a = f32[8,8]{1,0} get-tuple-element(%ring.3), index=0
  ROOT %g = f32[32,8]{1,0} all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""
    found = read_hlo(text)
    (kernel,) = found.kernels
    assert (kernel.name, kernel.trip_count, kernel.body) == ("ring", 1, "TUzvUg==")
    assert (kernel.operand_bytes, kernel.result_bytes) == ((256,), (256, 16))
    assert kernel.op_name == "jit(f)/neocc.all_reduce.7/ring/pallas_call"
    assert [c.kind for c in found.collectives] == ["all-gather"]
