"""What every implementation of attention must do: a class of tests, subclassed for each of them."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxdistill.kernels import attention

from tests.kernels import attention_cases as cases

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class AttentionTests:
    """Output, log-sum-exp and the gradients of all operands through both, against float64.

    how: the arguments of `attention` that name the implementation and its blocks.
    size: of `cases.SIZES`, and the start of the names of the others this implementation is held to.
    by_default: the types all cases run in by default; a compilation takes a second, so the rest is
        slow.
    """

    how: ClassVar[dict[str, Any]]
    size: ClassVar[str] = "small"
    by_default: ClassVar[tuple[str, ...]] = ("float32",)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        def slow_unless(condition: bool) -> Any:
            return () if condition else pytest.mark.slow

        names = metafunc.fixturenames
        if "dtype" in names:
            metafunc.parametrize(
                "dtype",
                [
                    pytest.param(x, id=name, marks=slow_unless(name in self.by_default))
                    for name, x in DTYPES.items()
                ],
            )
        if "one_case" in names:
            metafunc.parametrize(
                "one_case",
                [pytest.param(x, marks=slow_unless(x == "everything")) for x in cases.NAMES],
            )
        if "size" in names:
            sizes = [x for x in cases.SIZES if x.startswith(f"{self.size}_")]
            metafunc.parametrize("size", sizes)

    def run(self, arrays: cases.Arrays, by_row: dict, **options: Any) -> tuple:
        return cases.in_place("jit", options | self.how)(arrays, by_row)

    def arrays(self, name: str = "causal", std: float = 1.0) -> cases.Arrays:
        return cases.make(cases.case_of(name, self.size), jnp.float32, std)

    @pytest.mark.parametrize("case", cases.NAMES)
    def test_against_float64(self, dtype: jnp.dtype, case: str) -> None:
        cases.check(case, dtype, size=self.size, **self.how)

    def test_rows_on_four_devices(self, one_case: str) -> None:
        cases.check(one_case, jnp.float32, "shard_map", size=self.size, **self.how)

    def test_sizes_of_whole_blocks_and_one_more_and_primes(self, size: str) -> None:
        cases.check("everything", jnp.float32, size=size, **self.how)

    @pytest.mark.slow
    @pytest.mark.parametrize("case", cases.NAMES)
    def test_all_cases_at_all_sizes(self, dtype: jnp.dtype, case: str, size: str) -> None:
        cases.check(case, dtype, size=size, **self.how)

    @pytest.mark.parametrize("std", [0.01, 30.0])
    def test_small_and_large_scores(self, std: float) -> None:
        cases.check("window", jnp.float32, std=std, size=self.size, **self.how)

    def test_extreme_scores_are_finite(self) -> None:
        """float32 scores of 1e5 have errors of 1e-2: exact is only which one is the largest."""
        results = self.run(self.arrays("window", 3e4), {}, window=7)
        assert all(np.isfinite(x).all() for x in results)

    def test_extreme_scores_pick_one_key(self) -> None:
        """Scores of +-1e4 amid smaller ones: the output is one value, to the last digit."""
        keys = np.zeros((1, 200, 1, 8), np.float32)
        keys[0, 130], keys[0, 190] = 1e4 / 8, -1e4 / 8
        values = np.random.default_rng(0).normal(size=keys.shape).astype(np.float32)
        options: dict[str, Any] = {"causal": False, "with_log_sum_exp": True, "scale": 1.0}
        output, sums = attention(np.ones_like(keys), keys, values, **options, **self.how)
        np.testing.assert_array_equal(output[0, :, 0], np.broadcast_to(values[0, 130], (200, 8)))
        np.testing.assert_array_equal(sums, np.full((1, 200, 1), 1e4, np.float32))

    def test_a_row_that_sees_nothing_is_zero_without_gradient(self) -> None:
        arrays = self.arrays()
        length = arrays.query.shape[1]
        lengths = np.array([length, 0, 1, length])
        output, log_sum_exp, *gradients = self.run(arrays, {"lengths": lengths})
        np.testing.assert_array_equal(output[1], 0)
        np.testing.assert_array_equal(log_sum_exp[1], -np.inf)
        for gradient in gradients:
            assert np.isfinite(gradient).all()
            np.testing.assert_array_equal(gradient[1], 0)
        assert np.isfinite(np.asarray(log_sum_exp)[[0, 2, 3]]).all()

    def test_packed_equals_unpacked(self) -> None:
        """Three sequences in one row, their ids in any order, or each in a row of its own."""
        rng = np.random.default_rng(3)
        segments = np.repeat([5, 1, 3], 12)[None]
        shapes = ((1, 36, 4, 8), (1, 36, 2, 8), (1, 36, 2, 8), (1, 36, 4, 8), (1, 36, 4))
        packed = cases.Arrays(*(rng.normal(size=x).astype(np.float32) for x in shapes))
        unpacked = cases.Arrays(*(x.reshape(3, 12, *x.shape[2:]) for x in packed))
        together = self.run(packed, {"segment_ids": segments})
        for one, other in zip(together, self.run(unpacked, {}), strict=True):
            np.testing.assert_allclose(one.reshape(other.shape), other, atol=2e-6)

    def test_slots_past_the_length_are_never_looked_at(self) -> None:
        """Huge numbers there reach no value and no gradient; their own gradient is zero."""
        arrays = self.arrays()
        length = arrays.query.shape[1]
        lengths = np.array([length, 20, 1, 30])
        past = np.arange(length)[None, :] >= lengths[:, None]
        filled = arrays._replace(key=arrays.key.copy(), value=arrays.value.copy())
        filled.key[past] = 1e30
        filled.value[past] = 1e30
        clean, dirty = (self.run(x, {"lengths": lengths}) for x in (arrays, filled))
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        for gradient in dirty[3:]:
            np.testing.assert_array_equal(gradient[past], 0)
