"""What partitioners of this field have got wrong, each by name."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pytest

from neocc.ir.builder import (
    Graph,
    Tensor,
    concat,
    dot,
    einsum,
    exp,
    gather,
    random,
    repeat,
    tanh,
    update,
)
from neocc.ir.errors import IRError, NeoccError
from neocc.ir.mesh import Layout, Mesh, Partial
from neocc.ir.ops import OPS, Context
from neocc.ir.program import Op, Program, Value
from neocc.ir.types import Dim, TensorType
from neocc.lower.jax import lower
from neocc.nn import cross_entropy, dropout, layer_norm, softmax
from neocc.optim import global_norm
from neocc.passes.autodiff import differentiate
from neocc.passes.layout.algebra import (
    Assignment,
    Boundary,
    Strategy,
    Through,
    layouts,
    op_layouts,
    strategies,
)
from neocc.passes.pad import pad_inputs, pad_program, unpad_outputs
from neocc.passes.partition import Partitioned, apply, simulate, verify_partitioned
from tests.numpy_executor import run_numpy
from tests.passes.partition.checking import check
from tests.random_assignments import Choose, random_assignment, seeded
from tests.random_programs import assert_close

Inputs = Mapping[str, np.ndarray]
MESHES = tuple(Mesh.parse(m) for m in ("4", "2x2", "2x4", "2x2x2"))
WHOLE = Layout((None,))


def uneven(*shape: int) -> np.ndarray:
    """Terms of mixed sign and very different size: an error in one cannot hide in the others."""
    rng = np.random.default_rng(len(shape))
    return rng.standard_normal(shape) * 3.0 ** rng.integers(-3, 4, shape)


def integers(*shape: int) -> np.ndarray:
    """Whole numbers as floats: their sums are exact in any order."""
    return np.random.default_rng(7).integers(-9, 10, shape).astype(np.float64)


def preferring(*dims: str) -> Choose:
    """Cuts ``dims[i]`` on mesh axis i wherever that is legal, and nothing else."""

    def choose(options: Sequence) -> object:
        if isinstance(options[0], bool):
            return False

        def score(option) -> tuple[int, int]:
            right = sum(a == d for a, d in zip(option.axes, dims, strict=True))
            return right, -sum(a is not None for a in option.axes)

        return max(options, key=score)

    return choose


def check_all(program: Program, inputs: Inputs, seeds: int = 6) -> None:
    for mesh, seed in itertools.product(MESHES, range(seeds)):
        check(program, mesh, random_assignment(program, mesh, seeded(seed)), inputs)


def cut(program: Program, mesh: str, *dims: str, inputs: Inputs) -> Partitioned:
    """The program with ``dims[i]`` cut on axis i wherever that is legal, checked."""
    m = Mesh.parse(mesh)
    return check(program, m, random_assignment(program, m, preferring(*dims)), inputs)


def moves(partitioned: Partitioned) -> list[tuple[str, str]]:
    """Kind and reduction or axis of each collective that communicates, in order."""
    return [
        (op.kind, op.attrs.get("reduction", op.attrs["axis"]))
        for op, _ in partitioned.collectives()
        if op.kind != "local_slice"
    ]


def check_padded(program: Program, sizes: dict[str, int], inputs: Inputs, *dims: str) -> None:
    """Padded, poisoned with NaN, cut along ``dims`` and at random: the same valid numbers."""
    padded, grown = pad_program(program, sizes)
    assert {p.dim for p in grown} >= set(sizes)
    poisoned = {
        n: np.pad(
            x,
            [
                (0, d.size - s)
                for d, s in zip(padded.input_value(n).type.dims, x.shape, strict=True)
            ],
            constant_values=np.nan if x.dtype.kind == "f" else 0,
        )
        if x.ndim
        else x
        for n, x in inputs.items()
    }
    expected = run_numpy(program, inputs)
    mesh = Mesh.parse("x".join(["4"] * len(dims)))
    choices = [preferring(*dims), *(seeded(s) for s in range(6))]
    for choose in choices:
        partitioned = apply(padded, mesh, random_assignment(padded, mesh, choose))
        verify_partitioned(partitioned, padded)
        outputs = unpad_outputs(program, simulate(partitioned, poisoned))
        for name, array in expected.items():
            assert_close(outputs[name], array)
    assert set(pad_inputs(padded, inputs)) == set(inputs)


# 1


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_case_01_a_dim_that_does_not_divide_down_to_devices_with_no_element(size: int) -> None:
    """On 4 devices, sizes 1 and 5 leave some with padding alone."""
    rows, embd, out = Dim("rows", size), Dim("embd", size), Dim("out", 4)
    g = Graph("odd")
    x, w = g.data("x", (rows, embd), "f64"), g.parameter("w", (embd, out), "f64")
    y = tanh(dot(x, w, "embd"))
    program = g.build({"y": y, "total": (y * y).sum("rows", "out")})
    padded = {"rows": 8, "embd": 8}
    inputs = {"x": uneven(size, size), "w": uneven(size, 4)}
    check_padded(program, padded, inputs, "rows", "embd")
    check_padded(program, padded, inputs, "embd", "rows")


# 2


def test_case_02_mean_max_and_softmax_over_a_padded_dim() -> None:
    rows, classes = Dim("rows", 5), Dim("classes", 6)
    g = Graph("padded")
    x = g.data("x", (rows, classes), "f64")
    program = g.build(
        {
            "mean": x.mean("rows"),
            "max": x.max("classes"),
            "min": x.reduce("min", "rows"),
            "softmax": softmax(x, "classes"),
        }
    )
    # All negative: padding of zeros would win the maximum.
    inputs = {"x": -np.abs(uneven(5, 6)) - 1}
    check_padded(program, {"rows": 8, "classes": 8}, inputs, "rows", "classes")
    check_padded(program, {"classes": 8}, inputs, "classes")


# 3


def test_case_03_sharded_softmax_combines_maxima_by_max_and_sums_by_sum() -> None:
    rows, classes = Dim("rows", 3), Dim("classes", 8)
    g = Graph("softmax")
    program = g.build({"y": softmax(g.data("x", (rows, classes), "f64"), "classes")})
    inputs = {"x": uneven(3, 8) * 40}
    partitioned = cut(program, "4", "classes", inputs=inputs)
    assert moves(partitioned) == [("all_reduce", "max"), ("all_reduce", "sum")]
    assert moves(cut(program, "2x4", "rows", "classes", inputs=inputs)) == moves(partitioned)


# 4


@pytest.mark.parametrize("kind", ["exp", "tanh", "abs", "rsqrt", "maximum", "mul", "cast", "max"])
def test_case_04_no_non_linear_op_takes_a_partial_sum(kind: str) -> None:
    a = Dim("a", 4)
    v, s = Value(TensorType((a,), "f64")), Value(TensorType((), "f64"))
    op = {
        "maximum": Op("maximum", (v, v), (Value(v.type),)),
        "mul": Op("mul", (v, v), (Value(v.type),)),
        "cast": Op("cast", (v,), (Value(TensorType((a,), "i32")),), {"dtype": "i32"}),
        "max": Op("reduce", (v,), (s,), {"op": "max", "dims": ("a",)}),
    }.get(kind, Op(kind, (v,), (Value(v.type),)))
    for strategy in strategies(op, Mesh.parse("4")):
        wanted, _ = op_layouts(op, strategy)
        partial = [bool(layout.partial_axes) for layout in wanted]
        assert sum(partial) <= (kind == "mul"), f"{strategy}: product of two partial sums"


def test_case_04_a_norm_of_a_partial_sum_waits_for_the_reduction() -> None:
    rows, inner, embd = Dim("rows", 2), Dim("inner", 8), Dim("embd", 4)
    g = Graph("norm")
    x, w = g.data("x", (rows, inner), "f64"), g.parameter("w", (inner, embd), "f64")
    y = dot(x, w, "inner")
    squares = (y * y).sum("embd")
    program = g.build({"y": y * (1.0 / squares), "tanh": tanh(y)})
    inputs = {"x": uneven(2, 8), "w": uneven(8, 4)}
    assert moves(cut(program, "4", "inner", inputs=inputs))[0] == ("all_reduce", "sum")
    check_all(program, inputs)


# 5


def test_case_05_a_bias_and_a_residual_are_added_to_a_sum_once() -> None:
    rows, inner, embd = Dim("rows", 4), Dim("inner", 8), Dim("embd", 4)
    g = Graph("bias")
    x, w = g.data("x", (rows, inner), "f64"), g.parameter("w", (inner, embd), "f64")
    bias, res = g.parameter("b", (embd,), "f64"), g.data("res", (rows, embd), "f64")
    y = dot(x, w, "inner")
    program = g.build({"bias": y + bias, "res": res + y, "less": y - bias})
    inputs = {"x": integers(4, 8), "w": integers(8, 4), "b": integers(4), "res": integers(4, 4)}
    cut(program, "4", "inner", inputs=inputs)
    check_all(program, inputs)
    add = next(op for op in program.body.ops if op.kind == "add")
    for strategy in strategies(add, Mesh.parse("4")):
        left, right = op_layouts(add, strategy)[0]
        assert left.partial_axes == right.partial_axes, "a whole value added to a partial one"


# 6


def test_case_06_a_row_is_written_by_the_device_that_has_it_and_out_of_range_by_none(
    x64: None,
) -> None:
    """The end of a key/value cache, and beyond, on a cut dim: simulated, and as XLA runs it."""
    slot, rows = Dim("slot", 8), Dim("rows", 4)
    g = Graph("cache")
    cache, new = g.state("cache", (rows, slot), "f64"), g.data("new", (rows,), "f64")
    at = g.data("at", ())
    written = update(cache, new, at, slot)
    program = g.build({"cache": written, "total": written.sum("slot")})
    values = {"cache": uneven(4, 8), "new": uneven(4) + 100}
    for dims in (("slot", "slot"), ("slot", "rows"), ("rows", "slot")):
        partitioned = cut(program, "2x2", *dims, inputs={**values, "at": np.int32(7)})
        (op,) = (op for op in partitioned.program.body.ops if op.kind == "update")
        assert op.attrs["strategy"].axes == dims
        lowered = lower(partitioned)
        for start in (-9, -1, 0, 3, 4, 7, 8, 2**31 - 1):
            inputs = {**values, "at": np.int32(start)}
            expected = values["cache"].copy()
            if 0 <= start < 8:
                expected[:, start] = values["new"]
            np.testing.assert_array_equal(simulate(partitioned, inputs)["cache"], expected)
            np.testing.assert_array_equal(lowered(inputs)["cache"], expected)
    check_padded(program, {"slot": 12, "rows": 8}, {**values, "at": np.int32(7)}, "slot")


# 7


def test_case_07_gradient_of_a_cut_embedding_with_repeated_ids_and_a_cut_sequence() -> None:
    batch, seq, vocab, embd = Dim("batch", 2), Dim("seq", 8), Dim("vocab", 8), Dim("embd", 4)
    g = Graph("embedding")
    ids, w = g.data("ids", (batch, seq)), g.data("w", (batch, seq, embd), "f64")
    table = g.parameter("table", (vocab, embd), "f64")
    loss = (gather(table, ids, "vocab") * w).sum("batch", "seq", "embd")
    program = differentiate(g.build({"loss": loss}))
    repeated = np.array([[5, 5, 0, 7, 5, 0, 5, 1], [5, 7, 7, 7, 0, 0, 5, 5]], np.int32)
    inputs = {"ids": repeated, "w": integers(2, 8, 4), "table": integers(8, 4)}
    right = np.zeros((8, 4))
    np.add.at(right, repeated, inputs["w"])
    for dims in (("vocab", "seq"), ("seq", "vocab"), ("seq", "batch"), ("vocab", "embd")):
        mesh = Mesh.parse("2x2")
        assignment = random_assignment(program, mesh, preferring(*dims))
        partitioned = check(program, mesh, assignment, inputs)
        np.testing.assert_array_equal(simulate(partitioned, inputs)["d_table"], right)
    check_all(program, inputs)


# 8


def test_case_08_a_contraction_whose_operands_are_cut_by_the_axes_in_any_way() -> None:
    """Every pair of operand layouts times every strategy, on a mesh of unequal axes."""
    mesh = Mesh.parse("2x3")
    i, k, j = Dim("i", 6), Dim("k", 6), Dim("j", 6)
    g = Graph("dot")
    x, y = g.data("x", (i, k), "f64"), g.data("y", (k, j), "f64")
    program = g.build({"z": dot(x, y, "k")})
    (op,) = program.body.ops
    inputs = {"x": integers(6, 6), "y": integers(6, 6)[::-1].copy()}
    right = inputs["x"] @ inputs["y"]
    steps = [s for s in strategies(op, mesh) if not any(isinstance(c, Through) for c in s.axes)]
    tried = 0
    for step, a, b in itertools.product(steps, layouts(x.type, mesh), layouts(y.type, mesh)):
        if "k" not in step.axes or not {"k"} & (a.dims | b.dims):
            continue
        boundary = Boundary((a, b), (Layout(("j", "i")),))
        partitioned = apply(program, mesh, Assignment({op: step}, {program.body: boundary}))
        np.testing.assert_array_equal(simulate(partitioned, inputs)["z"], right)
        tried += 1
    assert tried > 200


# 9


@pytest.mark.parametrize("size", [4, 0])
def test_case_09_concat_shift_and_pad_at_one_element_a_shard_and_at_none(size: int) -> None:
    a, b = Dim("a", size), Dim("b", 4)
    g = Graph("edges")
    x, y = g.data("x", (a, b), "f64"), g.data("y", (a, b), "f64")
    long = concat([x, y], ["a", "a"], Dim("long", 2 * size))
    program = g.build(
        {
            "long": long,
            "one": x.shift("a", 1),
            "back": y.shift("a", -2),
            "padded": x.pad("a", 1, Dim("wide", size + 4), 5.0),
            "sum": long.shift("long", 3).cumsum("long") * 2.0,
            "max": x.max("a"),
        }
    )
    inputs = {"x": uneven(size, 4), "y": uneven(size, 4) - 1}
    for mesh, dims in (("4", ("a",)), ("4", ("long",)), ("2x2", ("a", "a")), ("2x2", ("b", "a"))):
        cut(program, mesh, *dims, inputs=inputs)
    check_all(program, inputs)


# 10


def test_case_10_random_numbers_do_not_change_with_the_shards() -> None:
    rows, columns = Dim("rows", 8), Dim("columns", 16)
    g = Graph("noise")
    seed, x = g.data("seed", (), "u32"), g.data("x", (rows, columns), "f64")
    noise = random(seed, (rows, columns), 3, "normal", "f64")
    program = g.build({"noise": noise, "x": dropout(x, 0.5, seed, 4)})
    inputs = {"seed": np.uint32(11), "x": uneven(8, 16)}
    right = run_numpy(program, inputs)
    assert len(np.unique(right["noise"])) == 128
    for mesh in (*MESHES, Mesh.parse("8x16")):
        for choose in (preferring(*["rows", "columns", "columns"][: len(mesh)]), seeded(1)):
            partitioned = apply(program, mesh, random_assignment(program, mesh, choose))
            found = simulate(partitioned, inputs)
            for name in right:  # to the last bit
                np.testing.assert_array_equal(found[name], right[name])


def test_case_10_dropout_is_the_same_in_forward_and_recomputation() -> None:
    def step(recompute: bool) -> Program:
        layers, rows = Dim("layers", 3), Dim("rows", 32)
        g = Graph("dropped")
        seed, x = g.data("seed", (), "u32"), g.data("x", (rows,), "f64")
        w = g.parameter("w", (layers, rows), "f64")
        salts = g.data("salts", (layers,), "u32")

        def body(x: Tensor, s: dict[str, Tensor]) -> Tensor:
            return dropout(tanh(x * s["w"]), 0.25, seed + s["salts"], 9)

        y = repeat(layers, body, x, {"w": w, "salts": salts}, recompute)
        return differentiate(g.build({"loss": (y * y).sum("rows"), "y": y}))

    inputs = {
        "seed": np.uint32(5),
        "x": uneven(32),
        "w": uneven(3, 32),
        "salts": np.arange(3, dtype=np.uint32),
    }
    right = run_numpy(step(False), inputs)
    assert 0 < np.count_nonzero(right["y"]) < 32
    for recompute in (False, True):
        program = step(recompute)
        check_all(program, inputs, seeds=3)
        np.testing.assert_array_equal(run_numpy(program, inputs)["d_w"], right["d_w"])


# 11


def test_case_11_a_mean_over_tokens_with_unequal_and_zero_valid_ones() -> None:
    """Once over the batch, and once summed over microbatches of which one has none."""
    micro, batch, seq, vocab = Dim("micro", 3), Dim("batch", 4), Dim("seq", 4), Dim("vocab", 8)
    g = Graph("tokens")
    logits = g.parameter("logits", (micro, batch, seq, vocab), "f64")
    labels, valid = g.data("labels", (micro, batch, seq)), g.data("valid", (micro, batch, seq))
    weight = valid.cast("f64")
    token = cross_entropy(logits, labels, vocab) * weight
    at_once = token.sum("micro", "batch", "seq") / weight.sum("micro", "batch", "seq")
    zero = g.constant(0.0, "f64")

    def body(total: list[Tensor], s: dict[str, Tensor]) -> list[Tensor]:
        loss = cross_entropy(s["logits"], s["labels"], vocab) * s["weight"]
        return [total[0] + loss.sum("batch", "seq"), total[1] + s["weight"].sum("batch", "seq")]

    stacked = {"logits": logits, "labels": labels, "weight": weight}
    total, count = repeat(micro, body, [zero, zero], stacked)
    program = differentiate(g.build({"loss": at_once, "micro": total / count}))
    mask = np.zeros((3, 4, 4), np.int32)
    mask[0, 0] = 1  # one shard of the batch has 4 tokens, the next 1, the others none
    mask[0, 1, 2] = mask[2, 3, 0] = 1
    rng = np.random.default_rng(0)
    inputs = {
        "logits": uneven(3, 4, 4, 8),
        "labels": rng.integers(0, 8, (3, 4, 4)).astype(np.int32),
        "valid": mask,
    }
    x = inputs["logits"]
    nll = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    nll = nll - np.take_along_axis(x, inputs["labels"][..., None], -1)[..., 0]
    right = nll[mask == 1].mean()
    for dims in (("batch", "seq"), ("seq", "batch"), ("batch", "vocab")):
        found = simulate(cut(program, "2x2", *dims, inputs=inputs), inputs)
        assert_close(found["loss"], right)
        assert_close(found["micro"], right)
    check_all(program, inputs, seeds=2)


# 12


def test_case_12_a_replicated_weight_whose_gradient_is_partial() -> None:
    """Layer norm with the sequence cut: each device sees its own tokens' gradients alone."""
    seq, embd = Dim("seq", 8), Dim("embd", 4)
    g = Graph("norm")
    x, w = g.data("x", (seq, embd), "f64"), g.data("w", (seq, embd), "f64")
    gain, bias = g.parameter("gain", (embd,), "f64"), g.parameter("bias", (embd,), "f64")
    y = layer_norm(x, gain, bias, embd)
    step = differentiate(g.build({"loss": (y * y * w).sum("seq", "embd")}))
    inputs = {"x": uneven(8, 4), "w": uneven(8, 4), "gain": uneven(4), "bias": uneven(4)}
    partitioned = cut(step, "4", "seq", inputs=inputs)
    assert moves(partitioned) == [("all_reduce", "sum")] * 3  # the loss and both gradients
    check_all(step, inputs, seeds=3)


# 13


def test_case_13_the_global_norm_counts_each_element_once() -> None:
    a, b = Dim("a", 8), Dim("b", 8)
    g = Graph("norm")
    tensors = {
        "both": g.parameter("both", (a, b), "f64"),
        "rows": g.parameter("rows", (a,), "f64"),
        "whole": g.parameter("whole", (), "f64"),
    }
    program = g.build({"norm": global_norm(list(tensors.values()))})
    inputs = {"both": integers(8, 8), "rows": integers(8), "whole": np.float64(-4)}
    right = np.sqrt(sum((x * x).sum() for x in inputs.values()))
    for mesh in MESHES:
        for choose in (preferring(*["a", "b", "a"][: len(mesh)]), *map(seeded, range(8))):
            partitioned = apply(program, mesh, random_assignment(program, mesh, choose))
            assert simulate(partitioned, inputs)["norm"] == right


# 14


def state_program() -> Program:
    a, b = Dim("a", 8), Dim("b", 8)
    g = Graph("state")
    p, m = g.parameter("p", (a, b), "f32"), g.state("m", (a, b), "f32")
    # Outputs in another order than the inputs, of one shape, one of them no input at all.
    return g.build({"m": m + 1.0, "both": p - m, "p": p * 2.0})


def test_case_14_donated_buffers_keep_their_names_in_any_order() -> None:
    program, mesh = state_program(), Mesh.parse("2x4")
    inputs = {"p": uneven(8, 8).astype(np.float32), "m": uneven(8, 8).astype(np.float32) + 1}
    right = run_numpy(program, inputs)
    for seed in range(3):
        lowered = lower(apply(program, mesh, random_assignment(program, mesh, seeded(seed))))
        arrays = {
            n: jax.device_put(inputs[n], s)
            for n, s in zip(("p", "m"), lowered.in_shardings, strict=True)
        }
        outputs = lowered(arrays)
        assert list(outputs) == ["m", "both", "p"]
        for name, array in right.items():
            np.testing.assert_array_equal(outputs[name], array)
        assert arrays["p"].is_deleted() and arrays["m"].is_deleted()
        again = lowered({"p": outputs["p"], "m": outputs["m"]})
        np.testing.assert_array_equal(again["p"], right["p"] * 2)


def test_case_14_one_array_given_for_two_donated_inputs_is_refused() -> None:
    program, mesh = state_program(), Mesh.parse("4")
    partitioned = apply(program, mesh, random_assignment(program, mesh, preferring("a")))
    lowered = lower(partitioned)
    same = jax.device_put(np.ones((8, 8), np.float32), lowered.in_shardings[0])
    with pytest.raises(IRError, match="'p' and 'm' are one array"):
        lowered({"p": same, "m": same})
    assert not same.is_deleted()


def test_case_14_an_output_laid_out_unlike_the_input_it_replaces_is_refused() -> None:
    program, mesh = state_program(), Mesh.parse("4")
    assignment = random_assignment(program, mesh, preferring("a"))
    boundary = assignment.boundaries[program.body]
    other = (Layout(("b",)), *boundary.outputs[1:])
    assignment.boundaries[program.body] = Boundary(boundary.args, other)
    with pytest.raises(NeoccError, match="output 'm'"):
        verify_partitioned(apply(program, mesh, assignment))


# 15


@pytest.mark.parametrize("axis", range(3))
def test_case_15_a_collective_runs_over_its_own_axis_alone(axis: int) -> None:
    """A sum cut on one axis of three, a gather on the next: other groups would mix others'
    blocks in, which all differ."""
    mesh = Mesh.parse("2x2x2")
    a, b, c = Dim("a", 8), Dim("b", 8), Dim("c", 8)
    g = Graph("groups")
    x = g.data("x", (a, b, c), "f64")
    program = g.build({"sum": x.sum("b"), "x": x * 1.0})
    order = ["a", "b", "c"]
    dims = tuple(order[(i - axis + 1) % 3] for i in range(3))
    inputs = {"x": integers(8, 8, 8)}
    assignment = random_assignment(program, mesh, preferring(*dims))
    partitioned = check(program, mesh, assignment, inputs)
    assert moves(partitioned) == [("all_reduce", "sum")]
    reduce = next(op for op, _ in partitioned.collectives())
    assert reduce.attrs["axis"] == mesh.names[axis]
    found = lower_and_run(partitioned, inputs)
    np.testing.assert_array_equal(found["sum"], inputs["x"].sum(1))


def lower_and_run(partitioned: Partitioned, inputs: Inputs) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        return {n: np.asarray(x) for n, x in lower(partitioned)(inputs).items()}


def test_case_15_fewer_key_value_heads_than_the_axis() -> None:
    """Two key heads, eight query heads, an axis of four: the keys stay whole."""
    groups, share, head, seq = Dim("groups", 2), Dim("share", 4), Dim("head", 2), Dim("seq", 4)
    heads = Dim("heads", 8)
    g = Graph("grouped")
    q = g.data("q", (seq, heads, head), "f64")
    k = g.data("k", (seq, groups, head), "f64").rename(seq="memory")
    scores = einsum(q.split("heads", groups, share), k, ("groups", "share", "seq", "memory"))
    mixed = einsum(softmax(scores, "memory"), k, ("seq", "groups", "share", "head"))
    program = g.build({"y": mixed.merge("groups", "share", "all")})
    inputs = {"q": uneven(4, 8, 2), "k": uneven(4, 2, 2)}
    partitioned = cut(program, "4", "heads", inputs=inputs)
    assert partitioned.program.input_value("k").type.layout == WHOLE
    cut(program, "4", "share", inputs=inputs)
    cut(program, "2x4", "groups", "share", inputs=inputs)
    check_all(program, inputs)


def test_case_15_split_and_merge_of_a_cut_dim() -> None:
    major, minor, whole = Dim("major", 4), Dim("minor", 4), Dim("whole", 16)
    g = Graph("reshape")
    x = g.data("x", (whole,), "f64")
    parts = x.split("whole", major, minor)
    swapped = parts.merge("minor", "major", "swapped")
    program = g.build({"parts": parts, "swapped": swapped, "back": swapped * 2.0})
    inputs = {"x": integers(16)}
    found = simulate(cut(program, "2x2", "whole", "whole", inputs=inputs), inputs)
    np.testing.assert_array_equal(found["swapped"], inputs["x"].reshape(4, 4).T.reshape(-1))
    for dims in (("major", "major"), ("minor", "major"), ("whole", "minor"), ("swapped", "minor")):
        cut(program, "2x2", *dims, inputs=inputs)
    check_all(program, inputs)


def test_case_15_tied_embeddings_get_both_gradients() -> None:
    seq, vocab, embd = Dim("seq", 4), Dim("vocab", 8), Dim("embd", 4)
    g = Graph("tied")
    ids, wte = g.data("ids", (seq,)), g.parameter("wte", (vocab, embd), "f64")
    logits = dot(tanh(gather(wte, ids, "vocab")), wte, "embd")
    loss = cross_entropy(logits, ids, vocab).mean("seq")
    program = differentiate(g.build({"loss": loss}))
    inputs = {"ids": np.array([3, 3, 7, 0], np.int32), "wte": uneven(8, 4)}
    for dims in (("vocab", "seq"), ("seq", "embd"), ("vocab", "embd"), ("vocab", "vocab")):
        cut(program, "2x2", *dims, inputs=inputs)
    check_all(program, inputs, seeds=3)


def test_case_15_random_numbers_beyond_two_to_the_31_elements() -> None:
    """Blocks at the far corner of a tensor of 2**36 elements, against a smaller view of it."""
    big = (Dim("a", 2**18), Dim("b", 2**18))
    seed = Value(TensorType((), "u32"))
    attrs = {"dims": big, "salt": 1, "distribution": "uniform", "dtype": "f64"}
    op = Op("random", (seed,), (Value(TensorType(big, "f64")),), attrs)

    def block(a: int, b: int, size: int) -> np.ndarray:
        at = {"a": a, "b": b}
        ctx = Context(np, 0, lambda name, _: (size, np.int32(at[name])))
        return OPS["random"].evaluate(op, [np.uint32(3)], ctx)[0]

    corner = 2**18 - 8
    whole = block(corner, corner, 8)
    halves = [[block(corner + i, corner + j, 4) for j in (0, 4)] for i in (0, 4)]
    np.testing.assert_array_equal(np.block(halves), whole)
    # Rows 2**14 apart are 2**32 elements apart: 32-bit offsets would repeat them.
    seen = [block(i * 2**14, 0, 8) for i in range(4)] + [whole]
    assert len(np.unique(np.stack(seen))) == 5 * 64


def test_case_15_a_maximum_is_never_scattered_as_a_sum() -> None:
    """Moves out of a partial maximum reduce it whole; only a sum has a reduce-scatter."""
    from neocc.passes.layout.algebra import moves as layout_moves

    t, mesh = TensorType((Dim("a", 8),), "f64"), Mesh.parse("4")
    kinds = [m.kind for m in layout_moves(Layout((Partial("max"),)), t, mesh)]
    assert kinds == ["all_reduce"]
    rows, classes = Dim("rows", 8), Dim("classes", 8)
    g = Graph("max")
    program = g.build({"y": exp(g.data("x", (rows, classes), "f64").max("classes"))})
    (top, last) = program.body.ops
    boundary = Boundary((Layout(("classes",)),), (Layout(("rows",)),))
    steps = {top: Strategy(("classes",)), last: Strategy(("rows",))}
    partitioned = check(
        program, mesh, Assignment(steps, {program.body: boundary}), {"x": -(uneven(8, 8) ** 2)}
    )
    assert [op.kind for op, _ in partitioned.collectives()] == ["all_reduce", "local_slice"]
