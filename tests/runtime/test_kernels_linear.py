"""satchel:Linear and satchel:TableLinear against numpy in float64."""

import dataclasses

import numpy as np
import pytest
from support.kernels import Product, equal_in_all_sets, needs_kernels, operator_session
from support.native_ops import TableLinear

pytestmark = needs_kernels

TOLERANCE = 2e-6
"""Of the largest number; a code of the activations that falls the other way would be 1e-4 or more."""

FINE_TOLERANCE = 2e-5
"""The same of values of 16 bits, of which some codes fall the other way. Rounding to 8 bits costs 5e-3."""

PRODUCTS = [
    Product(96, 64),
    Product(96, 64, epsilon=1e-5),
    Product(96, 64, epsilon=1e-5, optional="g"),
    Product(96, 64, optional="br"),
    Product(30, 50, optional="b"),
    Product(96, 64, hadamard=32),
    Product(40, 48, hadamard=8, epsilon=1e-6, optional="g"),
    Product(256, 16, hadamard=256),
    Product(36, 16, hadamard=2),
    Product(64, 2 * 48, gate="silu"),
    Product(40, 2 * 21, gate="gelu", optional="b"),
    Product(40, 2 * 37, gate="gelu_tanh", optional="br"),
    Product(40, 2 * 16, gate="relu"),
    Product(128, 50, block=64),
    Product(128, 50, block=32, optional="z"),
    Product(128, 50, bits=4, block=64, optional="b"),
    Product(96, 2 * 50, bits=4, block=16, gate="silu", hadamard=32, optional="zr"),
    Product(192, 33, bits=4, block=8, epsilon=1e-5, optional="zg"),
    Product(64, 2 * 16, block=16, gate="silu"),
    Product(128, 50, bits=4, block=64, optional="b", half_scales=True),
    Product(96, 2 * 37, bits=8, block=32, gate="silu", optional="zr", half_scales=True),
]
ROWS = (2, 7, 99, 200)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("rows", ROWS)
def test_a_prompt_is_what_numpy_says(product: Product, rows: int) -> None:
    feeds = product.feeds(rows, seed=rows)
    close(product.session(0, feeds).run(None, feeds)[0], product.expected(0, feeds))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 60])
def test_single_tokens_are_what_numpy_says(product: Product, rows: int) -> None:
    """With one scale for the row it is quantized to 16 bits."""
    feeds = product.feeds(rows, seed=rows, single=True)
    tolerance = TOLERANCE if product.block else FINE_TOLERANCE
    close(product.session(0, feeds).run(None, feeds)[0], product.expected(0, feeds), tolerance)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_all_instruction_sets_give_the_same_bits(product: Product) -> None:
    for rows, single in ((13, False), (1, True), (5, True)):
        feeds = product.feeds(rows, seed=rows, single=single)
        equal_in_all_sets(lambda feeds=feeds: product.session(0, feeds).run(None, feeds))


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_a_token_of_a_prompt_and_a_row_of_a_batch_get_what_they_get_alone(product: Product) -> None:
    prompt, batch = product.feeds(101, seed=3), product.feeds(19, seed=3, single=True)
    for feeds, parts in (
        (prompt, [np.s_[:, row : row + 2] for row in (0, 5, 99)]),
        (batch, [np.s_[row : row + 1] for row in (0, 5, 18)]),
    ):
        together = product.session(0, feeds).run(None, feeds)[0]
        alone = product.session(0, feeds, threads=1)
        for part in parts:
            found = alone.run(None, {name: value[part] for name, value in feeds.items()})[0]
            np.testing.assert_array_equal(found, together[part])


@pytest.mark.parametrize("rows", [1, 9])
def test_what_nothing_reads_changes_nothing_else(rows: int) -> None:
    product = Product(64, 320)
    feeds = product.feeds(rows, seed=rows, single=True)
    unread = product.attributes | {"unread": 64, "unread_end": 192}
    session = operator_session("Linear", unread, product.names, feeds, product.constants(0))
    found, whole = session.run(None, feeds)[0], product.session(0, feeds).run(None, feeds)[0]
    for part in (np.s_[..., :64], np.s_[..., 192:]):
        np.testing.assert_array_equal(found[part], whole[part])
    assert not np.array_equal(found, whole)


def test_two_dimensions_are_enough() -> None:
    product = Product(32, 16, optional="r")
    whole = product.feeds(6, seed=1)
    feeds = {name: value[0] for name, value in whole.items()}
    found = product.session(0, feeds).run(None, feeds)[0]
    np.testing.assert_array_equal(found, product.session(0, whole).run(None, whole)[0][0])


@pytest.mark.parametrize(
    "product", [Product(64, 32), Product(64, 32, block=32), Product(64, 32, epsilon=1e-5)], ids=str
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("single", [False, True])
def test_what_is_not_finite_stays_so(product: Product, value: float, single: bool) -> None:
    feeds = product.feeds(3, seed=1, single=single)
    feeds["x"].reshape(3, 64)[1, 40] = value
    found = product.session(0, feeds).run(None, feeds)[0].reshape(3, 32)
    assert not np.isfinite(found[1]).any()
    assert np.isfinite(found[[0, 2]]).all()


@pytest.mark.parametrize("rows", [0, 2])
def test_zeros_stay_zeros_and_no_rows_give_none(rows: int) -> None:
    feeds = {"x": np.zeros((rows, 64), np.float32)}
    np.testing.assert_array_equal(Product(64, 32).session(0, feeds).run(None, feeds)[0], np.zeros((rows, 32)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (1, 3, 63)}, "input width"),
        ({"r": (1, 2, 32)}, "residual"),
        ({"codes": (2, 1023)}, "weight"),
        ({"codes": (1, 1024)}, "weight"),
        ({"scales": (2, 1, 15)}, "weight"),
        ({"b": (31,)}, "weight"),
        ({"g": (63,)}, "weight"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, tuple[int, ...]], message: str) -> None:
    product = Product(64, 32, epsilon=1e-5, optional="brg")
    feeds = {**product.feeds(3, seed=1), **product.constants(0)}
    feeds |= {name: np.zeros(shape, feeds[name].dtype) for name, shape in changed.items()}
    session = operator_session("Linear", product.attributes, product.names, feeds, {})
    with pytest.raises(Exception, match=message):
        session.run(None, feeds)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 5}, {"bits": 4}, {"inputs": 0}, {"outputs": -1}, {"block": 12}, {"block": 48}, {"hadamard": 24},
        {"hadamard": 128}, {"gate": "swish"}, {"gate": "a name that is far too long to be one of a gate"},
        {"outputs": 33, "gate": "silu"}, {"epsilon": -1.0}, {"epsilon": float("nan")},
        {"inputs": (1 << 17) + 4}, {"inputs": 1 << 18, "block": 1 << 17}, {"gate": "silu", "unread_end": 16},
    ],
    ids=str,
)  # fmt: skip
def test_attributes_that_do_not_go_together_are_refused(changes: dict[str, float]) -> None:
    product = Product(64, 32)
    feeds = product.feeds(1, seed=1)
    with pytest.raises(Exception, match=r"satchel:Linear: .*attributes"):
        operator_session("Linear", product.attributes | changes, product.names, feeds, product.constants(0))


def test_a_type_that_is_not_taken_is_refused() -> None:
    product = Product(64, 32)
    feeds = {name: value.astype(np.float64) for name, value in product.feeds(1, seed=1).items()}
    with pytest.raises(Exception, match="Type"):
        product.session(0, feeds)


@pytest.mark.parametrize(("product", "dtype"), [(Product(64, 32), np.float16), (Product(64, 32, block=32), np.int32)])
def test_scales_of_another_type_are_refused(product: Product, dtype: type) -> None:
    feeds = {**product.feeds(3, seed=1), **product.constants(0)}
    feeds["scales"] = feeds["scales"].astype(dtype)
    session = operator_session("Linear", product.attributes, product.names, feeds, {})
    with pytest.raises(Exception, match="weight"):
        session.run(None, feeds)


@dataclasses.dataclass(frozen=True)
class Table:
    inputs: int
    outputs: int
    block: int

    @property
    def attributes(self) -> dict[str, int]:
        return dataclasses.asdict(self)

    def constants(self) -> dict[str, np.ndarray]:
        rng, blocks = np.random.default_rng(4), self.inputs // self.block
        return {
            "codes": rng.integers(0, 256, (self.outputs, blocks, self.block), np.uint8),
            "scales": rng.uniform(0.001, 0.011, (self.outputs, blocks)).astype(np.float32),
        }


TABLES = [
    Table(64, 300, 64),
    Table(576, 1000, 64),
    Table(96, 40, 32),
    Table(48, 40, 16),
    Table(256, 513, 128),
    Table(80, 7, 16),
]


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 6, 9, 99])
def test_a_table_is_multiplied_as_numpy_says(table: Table, rows: int) -> None:
    constants = table.constants()
    feeds = {"x": np.random.default_rng(rows).standard_normal((rows, 1, table.inputs)).astype(np.float32)}
    session = operator_session("TableLinear", table.attributes, ["x", "codes", "scales"], feeds, constants)
    found = session.run(None, feeds)[0]
    close(found, TableLinear._run(None, feeds["x"], **constants, **table.attributes)[0])  # type: ignore[arg-type]
    for row in range(rows):
        np.testing.assert_array_equal(session.run(None, {"x": feeds["x"][row : row + 1]})[0], found[row : row + 1])


@pytest.mark.parametrize("table", TABLES, ids=str)
@pytest.mark.parametrize("rows", [3, 9])
def test_all_instruction_sets_give_the_same_bits_of_a_table(table: Table, rows: int) -> None:
    feeds = {"x": np.random.default_rng(6).standard_normal((rows, 1, table.inputs)).astype(np.float32)}
    names = ["x", "codes", "scales"]
    equal_in_all_sets(
        lambda: operator_session("TableLinear", table.attributes, names, feeds, table.constants()).run(None, feeds)
    )


@pytest.mark.parametrize(("name", "shape"), [("codes", (300, 2, 32)), ("scales", (299, 1)), ("x", (1, 65))])
def test_tables_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    table = TABLES[0]
    feeds = {"x": np.zeros((1, 64), np.float32), **table.constants()}
    feeds[name] = np.zeros(shape, feeds[name].dtype)
    session = operator_session("TableLinear", table.attributes, ["x", "codes", "scales"], feeds, {})
    with pytest.raises(Exception, match="attribute"):
        session.run(None, feeds)


@pytest.mark.parametrize(
    "changes", [{"block": 24}, {"block": 8}, {"block": 128}, {"inputs": 0}, {"outputs": 0}], ids=str
)
def test_attributes_of_a_table_that_do_not_go_together_are_refused(changes: dict[str, int]) -> None:
    table, feeds = TABLES[0], {"x": np.zeros((1, 64), np.float32)}
    with pytest.raises(Exception, match=r"satchel:TableLinear: .*attributes"):
        operator_session("TableLinear", table.attributes | changes, ["x", "codes", "scales"], feeds, table.constants())


@pytest.mark.parametrize(("rows", "value"), [((1, 2), -1), ((2, 1), -1), ((2, 1), -128 / 32512), ((2, 1), 128 / 32512)])
def test_sums_are_exact_at_the_largest_number_of_inputs(rows: tuple[int, int], value: float) -> None:
    """Among them those of the lower halves of values of 16 bits, which are -128 at the least."""
    inputs = (1 << 17) - 4  # 128 * 128 * inputs is just below 2^31
    x = np.full((*rows, inputs), value, np.float32)
    x[..., 0] = -1
    constants = {"codes": np.zeros((1, inputs * 16), np.uint8), "scales": np.full((1, 1, 16), 1 / 1024, np.float32)}
    attributes = {"inputs": inputs, "outputs": 16, "bits": 8}
    session = operator_session("Linear", attributes, ["x", "codes", "scales"], {"x": x}, constants)
    wanted = -x.astype(np.float64).sum(-1, keepdims=True) * 128 / 1024
    np.testing.assert_allclose(session.run(None, {"x": x})[0], np.broadcast_to(wanted, (*rows, 16)), rtol=1e-6)
    equal_in_all_sets(lambda: session.run(None, {"x": x}))
