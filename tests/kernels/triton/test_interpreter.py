"""The interpreter's products: an element's bits come from its own row and column, whatever lies beside them."""

import numpy as np
import pytest
from interp_shim import added_in_order


@pytest.mark.parametrize("batch", [(), (2,)])
def test_an_element_depends_on_its_row_and_column_alone(batch):
    draw = np.random.default_rng(0)
    a, b, c = (draw.standard_normal((*batch, *shape), np.float32) for shape in ((5, 33), (33, 7), (5, 7)))
    before = c.copy()
    whole = added_in_order(a, b, c)
    assert np.array_equal(c, before), "what is added to is left as it was"
    for i in range(5):
        for j in range(7):
            alone = added_in_order(a[..., i : i + 1, :], b[..., j : j + 1], c[..., i : i + 1, j : j + 1])
            assert np.array_equal(alone, whole[..., i : i + 1, j : j + 1])
    exact = np.matmul(a.astype(np.float64), b.astype(np.float64)) + c
    assert np.abs(whole - exact).max() < 1e-5
