"""The helpers that read a compiled program find what they are meant to find."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.kernels.compiled import abstract, collectives, compile_for, devices_of, largest_buffer_elements, temp_bytes

HLO = """
  %all-reduce-start.1 = f32[64]{0:T(128)} all-reduce-start(%x), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  %all-reduce-done.1 = f32[64]{0:T(128)} all-reduce-done(%all-reduce-start.1)
  %all-reduce.7 = (f32[8,64]{1,0:T(8,128)}, f32[4]{0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  ROOT %all-gather.3 = bf16[256,64]{1,0:T(8,128)(2,1)} all-gather(%y), channel_id=3, dimensions={0}
  %fusion = s8[1048576]{0} fusion(%all-gather.3), kind=kLoop, calls=%computation
"""


def test_collectives_count_a_pair_once():
  assert collectives(HLO) == {"all-reduce": 2, "all-gather": 1}


def test_largest_buffer():
  assert largest_buffer_elements(HLO) == 256 * 64
  assert largest_buffer_elements(HLO, excluding=((256, 64),)) == 8 * 64
  assert largest_buffer_elements("no arrays") == 0


@pytest.mark.tpu
def test_a_program_for_one_device_and_one_for_four():
  def f(a, b):
    return jnp.tanh(a @ b) @ b

  square = abstract((1024, 1024), jnp.float32)
  program = compile_for("v5e", f, square, square)
  assert largest_buffer_elements(program.as_text()) == 1024 * 1024 and not collectives(program.as_text())
  assert 0 <= temp_bytes(program) <= 16 * 2**20

  mesh = Mesh(devices_of("v5p:2x2x1"), ("x",))
  rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
  spread = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=rows)
  gathered = jax.jit(lambda a: a * 2, out_shardings=whole).lower(spread).compile()
  assert collectives(gathered.as_text()) == {"all-gather": 1}
