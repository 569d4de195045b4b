"""What a collective product takes: the longer of product and permute in each step."""

from __future__ import annotations

import pytest

from neocc.cost.hardware import chip
from neocc.cost.model import CostModel
from neocc.cost.products import Product, gathered, scattered, step_seconds
from neocc.ir.builder import Graph, dot
from neocc.ir.mesh import Mesh
from neocc.ir.program import Op
from neocc.ir.types import Dim

MESH = Mesh.parse("8x16")


def product(rows: int, inner: int, columns: int) -> Op:
    g = Graph("one")
    x = g.data("x", (Dim("rows", rows), Dim("inner", inner)), "bf16")
    w = g.data("w", (Dim("inner", inner), Dim("columns", columns)), "bf16")
    program = g.build({"y": dot(x, w, "inner")})
    return next(op for op in program.body.walk() if op.kind == "einsum")


def whole(dim: str) -> int:
    return 1


@pytest.fixture
def cost() -> CostModel:
    return CostModel.of(chip("v5p"), MESH)


def test_a_large_product_hides_all_of_its_gather(cost: CostModel) -> None:
    op = product(16384, 12288, 12288)
    shard = 16384 * 12288 * 2 // 16
    found = gathered(cost, 1, shard, [Product(op, whole, "rows")])
    assert found.waiting == 0
    assert found.wires == pytest.approx(8 * step_seconds(cost, 1, shard, both=True), rel=0.01)
    assert 0 < found.working < 0.2 * 2 * 16384 * 12288**2 / 459e12


def test_a_small_product_waits_for_what_it_does_not_hide(cost: CostModel) -> None:
    op = product(16384, 12288, 128)
    shard = 16384 * 12288 * 2 // 16
    found = gathered(cost, 1, shard, [Product(op, whole, "rows")])
    alone = Product(op, whole, "rows").seconds(cost, 16, 16)
    # Its blocks take longer than their shares of the whole, and hide as much more.
    assert found.wires - 2 * alone < found.waiting < found.wires - 0.5 * alone


def test_two_products_hide_more_of_the_gather_that_they_share(cost: CostModel) -> None:
    shard = 16384 * 12288 * 2 // 16
    one = [Product(product(16384, 12288, 1024), whole, "rows")]
    assert gathered(cost, 1, shard, one * 2).waiting < gathered(cost, 1, shard, one).waiting


def test_putting_together_what_others_read_is_paid_for(cost: CostModel) -> None:
    op = product(16384, 12288, 12288)
    shard = 16384 * 12288 * 2 // 16
    alone, shared = (
        gathered(cost, 1, shard, [Product(op, whole, "rows")], others) for others in (False, True)
    )
    assert shared.working > alone.working and shared.waiting == alone.waiting


def test_a_scattered_product_waits_where_blocks_take_longer_than_products(cost: CostModel) -> None:
    block = 16384 * 12288 * 2 // 16
    wide, narrow = (
        scattered(cost, 1, block, [Product(product(16384, k, 12288), whole, "rows")])
        for k in (12288, 128)
    )
    assert wide.waiting == 0 < narrow.waiting <= narrow.wires


def test_where_permutes_are_run_at_once_all_is_waited_for() -> None:
    cost = CostModel.of(chip("v5e"), MESH)
    op = product(16384, 12288, 12288)
    found = gathered(cost, 1, 16384 * 12288 * 2 // 16, [Product(op, whole, "rows")])
    assert found.waiting == found.wires > 0


@pytest.mark.parametrize("size", [2, 3, 8])
def test_what_is_waited_for_is_part_of_what_is_sent(size: int) -> None:
    cost = CostModel.of(chip("v6e"), Mesh.parse(f"{size}x1"))
    op = product(size * 1024, 4096, 4096)
    for found in (
        gathered(cost, 0, 1024 * 4096 * 2, [Product(op, whole, "rows")]),
        scattered(cost, 0, 1024 * 4096 * 2, [Product(op, whole, "rows")]),
    ):
        assert 0 <= found.waiting <= found.wires
