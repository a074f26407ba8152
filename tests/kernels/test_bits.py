"""bfloat16 by its bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels.bits import bits, values, widened

NUMBERS = [0.0, -0.0, 1.0, -3.390625, float("inf"), -float("inf"), 1e-40, 3e38]


@pytest.mark.parametrize("value", NUMBERS)
def test_widened_is_the_same_number(value):
  x = jnp.asarray([value], jnp.bfloat16)
  want = np.asarray(x).astype(np.float32).view(np.int32)
  for same in (x, bits(x)):
    np.testing.assert_array_equal(widened(same).view(jnp.int32), want)
  np.testing.assert_array_equal(bits(values(bits(x))), bits(x))


def test_other_types_are_left_alone():
  x = jnp.asarray([1.5], jnp.float32)
  assert widened(x) is x
