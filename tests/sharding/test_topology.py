"""Topologies by name, and the TPU compiler behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.base import ConfigError
from sharding.hardware import CHIPS
from sharding.topology import Topology

SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


@pytest.mark.parametrize("name", ["v5p:4x4x4", "v5e:2x4", "2*v6e:16x16", "tpu7x:2x2x1"])
def test_a_name_reads_back(name):
  assert str(Topology.parse(name)) == name


def test_chips_and_devices_are_counted():
  assert Topology.parse("2*v5p:4x4x4").num_devices == 128
  assert (Topology.parse("tpu7x:2x2x1").num_chips, Topology.parse("tpu7x:2x2x1").num_devices) == (4, 8)


@pytest.mark.parametrize(
  "name, says",
  [("v5p-64", "expected CHIP:"), ("v9:2x2", "one of v5e"), ("v5e:2x2x2", "2 dimensions"), ("", "expected")],
)
def test_a_wrong_name_is_one_clear_error(name, says):
  with pytest.raises(ConfigError, match=says):
    Topology.parse(name)


@pytest.mark.tpu
def test_an_impossible_shape_is_one_clear_error():
  with pytest.raises(ConfigError, match="knows none such"):
    Topology.parse("v5p:3x5x7").devices()


@pytest.mark.tpu
@pytest.mark.parametrize("chip", CHIPS)
def test_the_table_says_what_the_compiler_knows(chip):
  """Kind, number of devices, and the memory that a program may use: one byte too much does not compile."""
  topology = Topology.parse(SMALLEST[chip])
  devices = topology.devices()
  assert len(devices) == topology.num_devices and devices[0].device_kind == CHIPS[chip].device_kind
  mesh = Mesh(np.array(devices[:1]), ("x",))

  def compile_with(num_bytes):
    argument = jax.ShapeDtypeStruct(
      (num_bytes // 2**20, 2**18), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    return jax.jit(lambda x: x[0, 0]).lower(argument).compile()

  compile_with(CHIPS[chip].hbm_bytes - 2**30)
  with pytest.raises(Exception, match=rf"exceeds available HBM|{CHIPS[chip].hbm_bytes / 2**30:.2f}G"):
    compile_with(CHIPS[chip].hbm_bytes + 2**28)
