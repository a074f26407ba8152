"""Group advantages: the definition, and the groups that say nothing."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from configs.schema import Advantage, ConfigError
from ring_jax.rl.advantages import group_advantages, has_signal


def test_grpo_by_hand():
  # group 7: rewards 1, 0, 0, 1 (mean .5, std .5); group 3: 3, 0, 0 (mean 1, std sqrt 2)
  got = group_advantages([1, 3, 0, 0, 0, 1, 0], [7, 3, 7, 3, 7, 7, 3], Advantage.GRPO)
  np.testing.assert_allclose(got, [1, 2**0.5, -1, -(0.5**0.5), -1, 1, -(0.5**0.5)], rtol=1e-6)
  assert got.dtype == np.float32


def test_mean_only():
  np.testing.assert_allclose(
    group_advantages([1, 0, 0, 1, 5], [0, 0, 0, 0, 1], Advantage.MEAN_ONLY), [0.5, -0.5, -0.5, 0.5, 0]
  )


@pytest.mark.parametrize("kind", list(Advantage))
@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1e30, -7.7])
def test_degenerate_groups_are_exactly_zero(kind, reward):
  """All equal (also where their mean rounds to another number), or a single answer."""
  rewards, groups = [reward] * 7 + [reward], [0] * 7 + [1]
  assert not np.any(group_advantages(rewards, groups, kind))
  assert not np.any(has_signal(rewards, groups))


@hypothesis.given(
  st.lists(st.tuples(st.floats(-100, 100, width=16), st.integers(0, 4)), max_size=40), st.sampled_from(list(Advantage))
)
def test_properties(rollouts, kind):
  """Mean 0 in every group; standard deviation 1 under GRPO; the order of rewards kept; signal where it is not zero."""
  rewards, groups = np.array([r for r, _ in rollouts]), np.array([g for _, g in rollouts])
  got = group_advantages(rewards, groups, kind)
  assert got.shape == rewards.shape and np.isfinite(got).all()
  np.testing.assert_array_equal(has_signal(rewards, groups), [np.ptp(rewards[groups == g]) > 0 for g in groups])
  for g in set(groups):
    mine = got[groups == g].astype(np.float64)
    assert abs(mine.mean()) < 1e-5 * max(1, np.abs(mine).max())
    assert np.all(np.diff(mine[np.argsort(rewards[groups == g])]) >= 0)
    if kind is Advantage.GRPO and np.any(mine):
      assert abs(mine.std() - 1) < 1e-5


def test_errors():
  with pytest.raises(ConfigError, match="2 rewards but 1 groups"):
    group_advantages([1, 2], [0], Advantage.GRPO)
  with pytest.raises(ConfigError, match="reward 1 is nan"):
    group_advantages([1, np.nan], [0, 0], Advantage.GRPO)
  assert group_advantages([], [], Advantage.GRPO).shape == (0,)
