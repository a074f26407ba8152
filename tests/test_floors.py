"""The houses and floors of the architecture: a file imports only from its own floor or below, and torch only in parity."""

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = {
  "configs": 0,
  "sharding": 1,
  "kernels": 1,
  "ring_jax.model": 2,
  "ring_jax.records": 2,
  "rollout": 3,
  "rollout.simulate": 6,  # a command
  "rollout.replay": 6,  # a command
  "rollout.timeline.__main__": 6,  # a command
  "ring_jax.rl": 3,
  "ring_jax.rewards": 3,
  "ring_jax.data": 3,
  "ring_jax.checkpoint": 3,
  "parity": 4,
  "parity.run": 6,  # a command
  "ring_jax.train": 4,
  "ring_jax.compiled": 4,
  "ring_jax.planning": 4,
  "ring_jax.studies": 5,
  "ring_jax.launch": 6,
}
CONTROL = (
  "rollout/scheduler.py",
  "rollout/events.py",
  "rollout/timeline/spans.py",
  *(f"rollout/simulator/{path.name}" for path in sorted((ROOT / "rollout/simulator").glob("*.py"))),
  "ring_jax/records.py",
  "configs/base.py",
  "configs/model.py",
  "configs/schema.py",
)  # without JAX
ARRAYS = ("jax", "flax", "optax", "orbax", "torch")


def house(module):
  """The longest known package that a dotted name lies in; None for what is not ours."""
  parts = module.split(".")
  return next((name for end in range(len(parts), 0, -1) if (name := ".".join(parts[:end])) in FLOORS), None)


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
      yield node.module
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources():
  for package in ("configs", "sharding", "kernels", "ring_jax", "rollout", "parity"):
    for path in sorted((ROOT / package).rglob("*.py")):
      module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
      if module != "ring_jax":
        yield path, module


def test_every_file_has_a_floor_and_imports_nothing_from_above():
  checked = 0
  for path, module in sources():
    assert house(module), f"{path}: stands on no floor"
    for name in imports(path):
      other = house(name)
      if other:
        checked += 1
        assert FLOORS[other] <= FLOORS[house(module)], f"{path} imports {name}, which is above it"
  assert checked > 100


def test_only_parity_imports_torch():
  for path, module in sources():
    if house(module) != "parity":
      assert not {"torch", "transformers", "vllm"} & {name.split(".")[0] for name in imports(path)}, path


def test_control_imports_no_arrays():
  for name in CONTROL:
    assert not set(ARRAYS) & {found.split(".")[0] for found in imports(ROOT / name)}, name


def test_files_fit_in_the_head():
  long = {str(path): lines for path, _ in sources() if (lines := path.read_text().count("\n")) > 560}
  assert not long, f"over about 500 lines: {long}"
