"""What a newcomer meets: the two commands, pins that fit the ranges, a README that names what there is."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def pins(name):
  lines = (ROOT / "requirements" / name).read_text().splitlines()
  return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def canonical(name):
  return re.sub(r"[-_.]+", "-", name).lower()


def test_ci_runs_the_readme_s_test_command_and_nothing_else():
  script = [
    line for line in (ROOT / ".ci/run").read_text().splitlines() if line and not line.startswith(("#", "set", "cd"))
  ]
  assert script == ["make test"]
  for target in re.findall(r"`?make ([a-z]+)", README):
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), f"README names make {target}"


def test_pins_satisfy_the_ranges_of_the_package_and_are_what_is_installed():
  files = ("vllm.txt", "train.txt", "test.txt", "no_deps.txt")
  pinned = {canonical(name): version for file in files for name, version in pins(file).items()}
  ranges = [Requirement(text) for text in importlib.metadata.requires("ring-jax")]
  assert {extra for r in ranges for extra in re.findall(r'extra == "(\w+)"', str(r.marker))} == {
    "gpu", "parity", "serve", "test", "tpu",
  }  # fmt: skip
  for requirement in ranges:
    name = canonical(requirement.name)
    assert name in pinned, f"{name} is required but not pinned"
    assert requirement.specifier.contains(pinned[name]), f"{name}=={pinned[name]} is outside of {requirement.specifier}"
  shared = pins("vllm.txt").keys() & (pins("train.txt") | pins("test.txt")).keys()
  assert not shared, f"pinned twice: {shared}"
  assert pins("gpu.txt") == {"jax[cuda12]": pins("train.txt")["jax"]}
  for name, version in pinned.items():
    assert importlib.metadata.version(name).split("+")[0] == version, f"{name}: not the pinned version"


def test_the_tpu_compiler_is_of_the_version_that_this_jax_names():
  (pinned,) = pins("tpu_compiler.txt").items()
  wanted = [Requirement(text) for text in importlib.metadata.requires("jax") if text.startswith("libtpu")]
  assert pinned[0] == "libtpu" and wanted and all(one.specifier.contains(pinned[1]) for one in wanted)
  assert (pathlib.Path(sys.prefix) / "tpu_compiler" / f"libtpu-{pinned[1]}.dist-info").is_dir()
  assert f"libtpu=={pinned[1]}" in (ROOT / "sharding/topology.py").read_text()


def test_readme_names_every_command_and_every_chapter():
  for path in (ROOT / "ring_jax/launch").glob("*.py"):
    if path.stem not in ("__init__", "app"):
      assert f"ring_jax.launch.{path.stem}" in README, f"README does not name {path.stem}"
  for path in (ROOT / "docs").glob("*.md"):
    assert f"docs/{path.name}" in README, f"README does not name {path.name}"
  for target in re.findall(r"\]\(([\w/.]+)\)", README):
    assert (ROOT / target).exists(), f"README links to {target}"


def test_every_command_has_help_with_an_example():
  for path in (ROOT / "ring_jax/launch").glob("*.py"):
    if path.stem not in ("__init__", "app"):
      done = subprocess.run(
        [sys.executable, "-m", f"ring_jax.launch.{path.stem}", "--help"], cwd=ROOT, capture_output=True, text=True
      )
      assert done.returncode == 0 and f"python -m ring_jax.launch.{path.stem} --" in done.stdout, done.stderr


def test_the_package_installs_all_houses():
  import configs, kernels, parity, ring_jax, rollout, sharding  # noqa: E401, I001

  for house in (configs, kernels, parity, ring_jax, rollout, sharding):
    assert pathlib.Path(house.__file__).is_relative_to(ROOT) and house.__doc__
  assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
