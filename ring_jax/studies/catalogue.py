"""The studies by name."""

from collections.abc import Mapping

from ring_jax.studies.c3po import C3PO
from ring_jax.studies.mismatch import Mismatch
from ring_jax.studies.placement import PlacementStudy
from ring_jax.studies.router_replay import RouterReplay
from ring_jax.studies.scale import Scale
from ring_jax.studies.stability import Stability
from ring_jax.studies.study import Study

STUDIES: Mapping[str, Study] = {
  study.name: study for study in (Mismatch(), Stability(), RouterReplay(), C3PO(), PlacementStudy(), Scale())
}
