"""Transfers between real devices: the same bits, whatever the layouts; and broken ones, each caught by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from sharding.transfer import Holder, Probe, Route, TransferError, TransferPlan, execute, plan_transfer
from sharding.transfer import execute as execute_module_name  # noqa: F401

DEVICES = jax.devices()
