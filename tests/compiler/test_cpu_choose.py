"""The chosen experts are those of a stable sort, whatever the scores are."""

import numpy as np
import pytest
import tvm

from relaxlm.compiler.kernels.cpu_choose import choose_kernel
from tests.compiler.test_cpu_matmul import build, native_unit
from tests.models.test_moe import run_choose


@pytest.mark.parametrize(("experts", "each"), [(60, 4), (96, 8), (7, 7)])
def test_the_largest_are_chosen_the_first_among_equals(experts: int, each: int) -> None:
    kernel = build({"f": choose_kernel(experts, each, native_unit())})["f"]
    rng = np.random.default_rng(0)
    scores = rng.integers(-9, 9, (300, experts)).astype(np.float32)
    scores[::2, ::5] = -np.inf
    # Of these rows, one has NaN somewhere, one everywhere.
    scores = np.concatenate([scores, scores[:2]])
    scores[-2, 3], scores[-1] = np.nan, np.nan
    values = tvm.runtime.tensor(np.zeros((len(scores), each), np.float32))
    chosen = tvm.runtime.tensor(np.full((len(scores), each), -1, np.int32))
    for n in (1, len(scores)):  # on one thread, and on all
        parts = (values, chosen)
        views = [tvm.runtime.tensor(part.numpy()[:n]) for part in parts]
        kernel(tvm.runtime.tensor(scores[:n]), *views)
        found, places = (view.numpy() for view in views)
        plain = min(n, 300)
        expected = np.argsort(-scores[:plain], axis=1, kind="stable")[:, :each]
        np.testing.assert_array_equal(places[:plain], expected)
        np.testing.assert_array_equal(
            found[:plain], np.take_along_axis(scores[:plain], expected, 1)
        )
        assert ((places >= 0) & (places < experts)).all()  # NaN must not become an address
    if each < experts:
        assert 3 not in places[-2]
        # What other targets run says the same, NaN included.
        theirs, at = run_choose(scores, each)
        np.testing.assert_array_equal(places, at)
        np.testing.assert_array_equal(found, theirs)
