"""Reverse-mode differentiation of a block under construction.

A rule gives one operand's gradient from the result's, in as few dims as it likes to have: the
engine then sums the dims that the operand lacks and broadcasts those that the gradient lacks
(``align``), so that no rule speaks of broadcasting.

A ``repeat`` becomes two: the forward one, which now also returns what the backward one needs,
and the backward one, which runs the other way, computes a step again from its carried-in values
and then goes through it in reverse. Matrix products are returned and stacked instead of being
computed again, or both ways stand there as an ``either`` for the plan to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from neocc.ir.builder import Block, Graph, Tensor, close_repeat, cos, exp, log, select, sin
from neocc.ir.builder import gather as gather_rows
from neocc.ir.builder import scatter_add as add_rows
from neocc.ir.errors import IRError
from neocc.ir.ops import ATTENTION
from neocc.ir.ops.base import inverse
from neocc.ir.program import Op, Program, Region, Value
from neocc.ir.types import Dim, TensorType

Rule = Callable[[Op, Tensor, list[Tensor], Tensor], Tensor]  # op, gradient, operands, result


def gradients(loss: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a scalar by tensors of its block, in the order and of the types of ``wrt``.

    The ops are appended to the block, each at the source line of the op that it differentiates;
    a tensor that the loss does not depend on gets zeros. Where several elements attain a
    maximum or a minimum, they share its gradient equally. Casts between float dtypes pass
    gradients on in the operand's dtype; a matrix product's gradients are matrix products in
    its operands' dtype.

    Raises:
        IRError: the loss is no float scalar, or a tensor is not a float of the loss's block.
    """
    block = loss.block
    if loss.dims or not loss.type.is_float:
        raise IRError(
            f"gradients of {loss.value!r}: a loss is a float scalar; sum it over its dims"
        )
    for t in wrt:
        if t.block is not block:
            raise IRError(f"gradients by {t.value!r}, which lies in another block than the loss")
        if not t.type.is_float:
            raise IRError(f"gradients by {t.value!r}: only float tensors have gradients")
    cotangents = {loss.value: block.emit("constant", (), value=1.0, dtype=loss.dtype)}
    ops = list(block.ops)
    reverse(block, ops, dependents(ops, {t.value for t in wrt}), cotangents)
    return [found(cotangents, block, t.value) for t in wrt]


def differentiate(program: Program, loss: str = "loss", wrt: Sequence[str] = ()) -> Program:
    """``program`` with the gradient of its output ``loss`` by each input X of ``wrt`` (none
    named: every parameter) as one more output ``d_X``.

    Raises:
        IRError: as ``gradients``; or there is no such input or output.
    """
    graph = Graph(program.name)
    graph.inputs, graph.args = list(program.inputs), list(program.body.args)
    graph.ops = list(program.body.ops)
    names = list(wrt) or [i.name for i in program.inputs if i.role == "parameter"]
    for name, known in [
        (loss, program.outputs),
        *((n, [i.name for i in program.inputs]) for n in names),
    ]:
        if name not in known:
            raise IRError(f"program {program.name!r} has no {name!r}; it has {', '.join(known)}")
    by = [Tensor(graph, program.input_value(n)) for n in names]
    found = gradients(Tensor(graph, program.output_value(loss)), by)
    outputs = {
        n: Tensor(graph, v) for n, v in zip(program.outputs, program.body.outputs, strict=True)
    }
    return graph.build(outputs | {f"d_{n}": g for n, g in zip(names, found, strict=True)})


def reverse(
    block: Block, ops: Sequence[Op], active: set[Value], cotangents: dict[Value, Tensor]
) -> None:
    """Carries ``cotangents`` back through ``ops``, into those values that are ``active``."""
    for op in reversed(ops):
        wanted = [v in active for v in op.operands]
        if not any(wanted) or not any(r in cotangents for r in op.results):
            continue
        with block.at(op.loc):
            if op.kind == "repeat":
                grads = reverse_repeat(block, op, wanted, cotangents)
            elif op.kind in JOINT:
                grads = JOINT[op.kind](block, op, [cotangents.get(r) for r in op.results])
                grads = [g if w else None for g, w in zip(grads, wanted, strict=True)]
            else:
                grads = operand_gradients(block, op, wanted, cotangents[op.result])
            for v, g in zip(op.operands, grads, strict=True):
                if g is not None:
                    add_to(cotangents, v, g)


def found(cotangents: dict[Value, Tensor], block: Block, value: Value) -> Tensor:
    return cotangents[value] if value in cotangents else zeros(block, value.type)


def add_to(cotangents: dict[Value, Tensor], value: Value, g: Tensor) -> None:
    cotangents[value] = cotangents[value] + g if value in cotangents else g


def operand_gradients(
    block: Block, op: Op, wanted: Sequence[bool], g: Tensor
) -> list[Tensor | None]:
    rules = RULES.get(op.kind, ())
    if not isinstance(rules, tuple):
        rules = rules(op)
    operands = [Tensor(block, v) for v in op.operands]
    result = Tensor(block, op.result)
    return [
        align(rules[i](op, g, operands, result), x.type) if wanted[i] and i in passes(op) else None
        for i, x in enumerate(operands)
    ]


def align(g: Tensor, type: TensorType) -> Tensor:
    """``g`` summed over the dims that ``type`` lacks, and broadcast to those of ``type``."""
    g = g.sum(*(n for n in g.type.names if not type.has(n)))
    return g if g.dims == type.dims else g.broadcast(*type.dims)


def zeros(block: Block, type: TensorType) -> Tensor:
    zero = block.emit("constant", (), value=0, dtype=type.dtype)
    return zero.broadcast(*type.dims) if type.dims else zero


# Which operands a result's derivative flows to, and back.


def passes(op: Op) -> Iterable[int]:
    """Operands that the result depends on differentiably. Not for a repeat."""
    known = op.kind in RULES or op.kind in JOINT
    if not known or not any(r.type.is_float for r in op.results):
        return ()
    if op.kind == "either":
        return (0,)
    return [i for i, v in enumerate(op.operands) if v.type.is_float]


def dependents(ops: Iterable[Op], sources: set[Value]) -> set[Value]:
    """The sources and every value that depends on one differentiably."""
    active = set(sources)
    for op in ops:
        if op.kind == "repeat":
            active |= repeat_flow(op, active, forward=True)
        elif any(op.operands[i] in active for i in passes(op)):
            active.update(op.results)
    return active


def contributors(ops: Sequence[Op], targets: set[Value]) -> set[Value]:
    """The targets and every value that one depends on differentiably."""
    useful = set(targets)
    for op in reversed(ops):
        if op.kind == "repeat":
            useful |= repeat_flow(op, useful, forward=False)
        elif any(r in useful for r in op.results):
            useful.update(op.operands[i] for i in passes(op))
    return useful


def repeat_flow(op: Op, outside: set[Value], forward: bool) -> set[Value]:
    """Results that depend on operands in ``outside``; or, backward, operands that results in
    ``outside`` depend on. Carried values go round until nothing is added."""
    region, carries = op.regions[0], op.attrs["carries"]
    before = list(zip(op.operands, region.args, strict=True))
    after = list(zip(op.results, region.outputs, strict=True))
    ends = list(zip(region.args[:carries], region.outputs[:carries], strict=True))
    if forward:
        inside = {arg for v, arg in before if v in outside}
    else:
        inside = {out for r, out in after if r in outside}
    while True:
        if forward:
            inside = dependents(region.ops, inside)
            new = {arg for arg, out in ends if out in inside and arg.type.is_float} - inside
        else:
            inside = contributors(region.ops, inside)
            new = {out for arg, out in ends if arg in inside and out.type.is_float} - inside
        if not new:
            break
        inside |= new
    return {v for v, inner in (after if forward else before) if inner in inside}


# repeat


def keep_products(op: Op) -> bool:
    """Matrix products and embeddings cost much to compute again and little to keep."""
    return op.kind in ("einsum", "gather", "attention")


def reverse_repeat(
    block: Block, op: Op, wanted: Sequence[bool], cotangents: dict[Value, Tensor]
) -> list[Tensor | None]:
    """Appends the backward repeat, puts the forward one that feeds it in the place of ``op``,
    and returns the gradients of the wanted operands."""
    region, dim = op.regions[0], op.attrs["dim"]
    carries, stacked = op.attrs["carries"], op.attrs["stacked"]
    active, useful = active_and_useful(op, wanted, cotangents)
    args, outputs = region.args, region.outputs
    known = [r in cotangents for r in op.results]
    moved = [i for i in range(carries) if args[i] in active and (known[i] or args[i] in useful)]
    sliced = [i for i in range(carries, carries + stacked) if wanted[i] and args[i] in useful]
    shared = [i for i in range(carries + stacked, len(args)) if wanted[i] and args[i] in useful]

    inner = Block(block)
    inner.loc = op.loc
    flowing = [inner.add_arg(args[i].type) for i in moved]
    sums = [inner.add_arg(args[i].type) for i in shared]
    slices: dict[Value, Tensor] = {}  # argument of the backward region -> stacked operand

    def slice_of(operand: Tensor) -> Tensor:
        arg = inner.add_arg(operand.type.without([dim.name]), operand.value.name)
        slices[arg.value] = operand
        return arg

    # The step again, in the backward region.
    stacks = dict(zip(outputs[carries:], op.results[carries:], strict=True))
    saved = {v: stacks.get(v) or Value(stack_type(v, dim), v.name) for v in args[:carries]}
    env: dict[Value, Value] = {}
    for i, (arg, operand) in enumerate(zip(args, op.operands, strict=True)):
        outer = Tensor(block, saved[arg] if i < carries else operand)
        env[arg] = slice_of(outer).value if i < carries + stacked else inner.use(outer)
    inner.ops = [clone(o, env) for o in region.ops]
    clones = list(inner.ops)

    # Back through it.
    inside: dict[Value, Tensor] = {}
    for i, g in zip(moved, flowing, strict=True):
        add_to(inside, env[outputs[i]], g)
    for r, out in zip(op.results[carries:], outputs[carries:], strict=True):
        if r in cotangents and out in active:
            add_to(inside, env[out], slice_of(cotangents[r]))
    reverse(inner, clones, {env[v] for v in active if v in env}, inside)

    results = [found(inside, inner, env[args[i]]) for i in moved]
    results += [t + found(inside, inner, env[args[i]]) for i, t in zip(shared, sums, strict=True)]
    results += [found(inside, inner, env[args[i]]) for i in sliced]

    # What is kept takes the place of what would be computed again; then drop what is unused.
    instead: dict[Value, Value] = {}
    either: dict[Value, Op] = {}
    for o in region.ops:
        for i, v in enumerate(o.results):
            if not keep_products(o) or op.attrs["recompute"] is True:
                break
            if not v.type.has(dim.name):
                saved[v] = stacks.get(v) or Value(stack_type(v, dim), v.name)
                again, kept = env[v], slice_of(Tensor(block, saved[v])).value
                instead[again] = kept
                # Statistics beside a first result (attention's) are small, and always kept.
                if op.attrs["recompute"] is None and i == 0:
                    instead[again] = Value(v.type, v.name)
                    either[again] = Op("either", (kept, again), (instead[again],), loc=o.loc)
    values = [instead.get(t.value, t.value) for t in results]
    ops: list[Op] = []
    for o in inner.ops:
        o.operands = tuple(instead.get(v, v) for v in o.operands)
        ops += [o, *(either[v] for v in o.results if v in either)]
    inner.ops, used = live(ops, values)
    slices = {arg: t for arg, t in slices.items() if arg in used}
    inner.args = [*(t.value for t in (*flowing, *sums)), *slices]
    inner.captured = {o: v for o, v in inner.captured.items() if v in used}

    needed = {t.value for t in slices.values()}
    new = {v: s for v, s in saved.items() if s in needed and v not in stacks}
    extend_repeat(block, op, new)
    starts = [found(cotangents, block, op.results[i]) for i in moved]
    starts += [zeros(block, args[i].type) for i in shared]
    attrs = {
        **op.attrs,
        "carries": len(starts),
        "stacked": len(slices),
        "reverse": not op.attrs["reverse"],
    }
    grads = close_repeat(inner, [*starts, *slices.values()], values, attrs, op.loc)
    at = dict(zip([*moved, *shared, *sliced], grads, strict=True))
    return [
        align(at[i], v.type) if i in at and wanted[i] else None for i, v in enumerate(op.operands)
    ]


def active_and_useful(
    op: Op, wanted: Sequence[bool], cotangents: dict[Value, Tensor]
) -> tuple[set[Value], set[Value]]:
    """Values of the region that depend on a wanted operand, and those that a result with a
    cotangent depends on, in this step or in another."""
    region, carries = op.regions[0], op.attrs["carries"]
    later = repeat_flow(op, {v for v, w in zip(op.operands, wanted, strict=True) if w}, True)
    active = {a for a, w in zip(region.args, wanted, strict=True) if w}
    active |= {a for a, r in zip(region.args[:carries], op.results, strict=False) if r in later}
    known = {r for r in op.results if r in cotangents}
    targets = {out for r, out in zip(op.results, region.outputs, strict=True) if r in known}
    while True:
        useful = contributors(region.ops, targets)
        carried = zip(region.args[:carries], region.outputs[:carries], strict=True)
        new = {out for arg, out in carried if arg in useful} - targets
        if not new:
            return dependents(region.ops, active), useful
        targets |= new


def extend_repeat(block: Block, op: Op, extra: dict[Value, Value]) -> None:
    """Replaces ``op`` in its block by one that also returns ``extra``: inner value -> stack."""
    if not extra:
        return
    old = op.regions[0]
    region = Region(old.args, old.ops, (*old.outputs, *extra))
    results = (*op.results, *extra.values())
    new = Op("repeat", op.operands, results, op.attrs, (region,), op.loc)
    block.ops[next(i for i, o in enumerate(block.ops) if o is op)] = new


def stack_type(v: Value, dim: Dim) -> TensorType:
    return TensorType((dim, *v.type.dims), v.type.dtype)


def clone(op: Op, env: dict[Value, Value]) -> Op:
    """A copy over fresh values, regions too; ``env`` maps old values to new and is added to.

    Its products are marked ``recomputed``, so that model FLOPs can leave them out.
    """
    operands = [env[v] for v in op.operands]
    regions = []
    for r in op.regions:
        inside = {v: Value(v.type, v.name) for v in r.args}
        args = tuple(inside.values())
        ops = tuple(clone(o, inside) for o in r.ops)
        regions.append(Region(args, ops, tuple(inside[v] for v in r.outputs)))
    results = [Value(r.type, r.name) for r in op.results]
    env.update(zip(op.results, results, strict=True))
    products = op.kind == "einsum" or op.kind in ATTENTION
    attrs = {**op.attrs, "recomputed": True} if products else op.attrs
    return Op(op.kind, operands, results, attrs, regions, op.loc)


def live(ops: Sequence[Op], outputs: Iterable[Value]) -> tuple[list[Op], set[Value]]:
    """The ops that the outputs need, and every value that these and the outputs name."""
    used = set(outputs)
    kept_ops: list[Op] = []
    for op in reversed(ops):
        if any(r in used for r in op.results):
            used.update(op.operands)
            kept_ops.append(op)
    return kept_ops[::-1], used


# Rules: one per operand.


def larger_share(g: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The part of g that goes to the greater of two: x's."""
    return select(y < x, g, select(x.equals(y), g * 0.5, 0.0))


def reduce_rule(op: Op, g: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
    if op.attrs["op"] == "sum":
        return g
    best = x[0].equals(y).cast(g.dtype)
    return best * (g / best.sum(*op.attrs["dims"]))


def einsum_rule(op: Op, g: Tensor, x: list[Tensor], which: int) -> Tensor:
    """Products in the natural order: gradient times second, first times gradient. A dim that
    only this operand has was summed alone; ``align`` broadcasts along it."""
    target, other = x[which], x[1 - which]
    g = g.cast(target.dtype)
    out = tuple(n for n in target.type.names if g.type.has(n) or other.type.has(n))
    pair = (g, other) if which == 0 else (other, g)
    return g.block.emit("einsum", pair, out=out, dtype=target.dtype)


def pow_base(op: Op, g: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
    base, exponent = x
    less = select(exponent.equals(0.0), 1.0, exponent - 1.0)  # 0 * 0 ** -1 would be NaN
    return g * (exponent * base**less)


def pow_exponent(op: Op, g: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
    zero = x[0].equals(0.0)
    return g * (y * select(zero, 0.0, log(select(zero, 1.0, x[0]))))


def attention_gradients(
    block: Block, op: Op, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    dout, dlse = grads
    if dlse is not None or dout is None:
        raise IRError("the loss depends on attention's lse, which has no gradient; detach it")
    known = [Tensor(block, v) for v in (*op.operands, *op.results)]
    attrs = {k: v for k, v in op.attrs.items() if k != "recomputed"}
    return [*block.emit_all("attention_grad", [*known, dout], **attrs)]


def no_second_derivative(
    block: Block, op: Op, grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    raise IRError("fused attention has no second derivative; write it with einsum and softmax")


def no_update_gradient(op: Op) -> tuple[Rule, ...]:
    raise IRError("update has no gradient: it writes the cache of a model that is sampled", op.loc)


def concat_rules(op: Op) -> tuple[Rule, ...]:
    to = op.attrs["to"].name
    rules, start = [], 0
    for v, name in zip(op.operands, op.attrs["dims"], strict=True):
        part = v.type.dim(name)
        rules.append(lambda op, g, x, y, start=start, part=part: g.slice(to, start, part))
        start += part.size
    return tuple(rules)


def table_gradient(op: Op, g: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
    return add_rows(g, x[1], x[0].dim(op.attrs["dim"]))


def same(op: Op, g: Tensor, x: list[Tensor], y: Tensor) -> Tensor:
    return g


# Rules of ops whose operands' gradients are made together, from those of all results.
JOINT: dict[str, Callable[[Block, Op, Sequence[Tensor | None]], list[Tensor | None]]] = {
    "attention": attention_gradients,
    "attention_grad": no_second_derivative,
}
RULES: dict[str, tuple[Rule, ...] | Callable[[Op], tuple[Rule, ...]]] = {
    "add": (same, same),
    "sub": (same, lambda op, g, x, y: -g),
    "mul": (lambda op, g, x, y: g * x[1], lambda op, g, x, y: g * x[0]),
    "div": (lambda op, g, x, y: g / x[1], lambda op, g, x, y: -(g / x[1] * y)),
    "pow": (pow_base, pow_exponent),
    "maximum": (
        lambda op, g, x, y: larger_share(g, x[0], x[1]),
        lambda op, g, x, y: larger_share(g, x[1], x[0]),
    ),
    "minimum": (
        lambda op, g, x, y: larger_share(g, x[1], x[0]),
        lambda op, g, x, y: larger_share(g, x[0], x[1]),
    ),
    "select": (
        same,  # the condition: never asked for
        lambda op, g, x, y: select(x[0], g, 0.0),
        lambda op, g, x, y: select(x[0], 0.0, g),
    ),
    "neg": (lambda op, g, x, y: -g,),
    "exp": (lambda op, g, x, y: g * y,),
    "log": (lambda op, g, x, y: g / x[0],),
    "tanh": (lambda op, g, x, y: g * (1.0 - y * y),),
    "sqrt": (lambda op, g, x, y: g * 0.5 / y,),
    "rsqrt": (lambda op, g, x, y: g * -0.5 * (y * y * y),),
    "abs": (lambda op, g, x, y: select(x[0] < 0.0, -g, select(x[0].equals(0.0), 0.0, g)),),
    "sin": (lambda op, g, x, y: g * cos(x[0]),),
    "cos": (lambda op, g, x, y: -(g * sin(x[0])),),
    "erf": (lambda op, g, x, y: g * (2.0 / math.sqrt(math.pi)) * exp(-(x[0] * x[0])),),
    "cast": (lambda op, g, x, y: g.cast(x[0].dtype),),
    "einsum": (
        lambda op, g, x, y: einsum_rule(op, g, x, 0),
        lambda op, g, x, y: einsum_rule(op, g, x, 1),
    ),
    "reduce": (reduce_rule,),
    "broadcast": (same,),
    "either": (same,),
    "rename": (lambda op, g, x, y: g.rename(**{op.attrs["to"]: op.attrs["dim"]}),),
    "split": (
        lambda op, g, x, y: g.merge(
            op.attrs["into"][0].name, op.attrs["into"][1].name, op.attrs["dim"]
        ),
    ),
    "merge": (
        lambda op, g, x, y: g.split(op.attrs["to"], *(x[0].dim(n) for n in op.attrs["dims"])),
    ),
    "slice": (
        lambda op, g, x, y: g.pad(
            op.attrs["to"].name, op.attrs["start"], x[0].dim(op.attrs["dim"])
        ),
    ),
    "pad": (
        lambda op, g, x, y: g.slice(
            op.attrs["to"].name, op.attrs["before"], x[0].dim(op.attrs["dim"])
        ),
    ),
    "concat": concat_rules,
    "update": no_update_gradient,
    "shift": (lambda op, g, x, y: g.shift(op.attrs["dim"], -op.attrs["by"]),),
    "reorder": (lambda op, g, x, y: g.reorder(op.attrs["dim"], inverse(op.attrs["order"])),),
    "gather": (table_gradient,),
    "scatter_add": (lambda op, g, x, y: gather_rows(g, x[1], op.attrs["dim"]),),
    "cumsum": (lambda op, g, x, y: g.cumsum(op.attrs["dim"], not op.attrs["reverse"]),),
}
