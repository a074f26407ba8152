"""The manifests start what there is: commands, flags and files exist, and the numbers in one place fit the others."""

import math
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
import yaml

from configs import loading
from configs.status import ExitStatus

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / "docs/manifests"
PATHWAYS_NAMES = {
  "tpu-v5p-slice": "tpuv5",
  "tpu-v5-lite-podslice": "tpuv5e",
  "tpu-v6e-slice": "tpuv6e",
  "tpu7x": "tpu7x",
}


def help_of(module):
  done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
  return done.stdout


@pytest.fixture(scope="module")
def train_help():
  return help_of("ring_jax.launch.train")


def check_command(words, chips, help_text):
  """The command is `launch.train`, knows every flag, and its config is valid and made for so many chips."""
  assert pathlib.Path(words[0]).name == "python" and words[1:3] == ["-m", "ring_jax.launch.train"]
  given = dict(re.fullmatch(r"--([\w.]+)=(.+)", word).groups() for word in words[3:])
  for name in given:
    if not name.startswith("config."):
      assert f"--{name}:" in help_text or f"--[no]{name}:" in help_text, f"no flag --{name}"
  overrides = {name.removeprefix("config."): value for name, value in given.items() if name.startswith("config.")}
  config = loading.override(loading.load(ROOT / given["config"]), overrides)
  assert config.model.parallel.mesh.num_devices == chips
  # What all hosts share lies on the volume that they share.
  assert all(path.startswith("/runs/") for path in (given["workdir"], config.init, config.tokenizer.path))


def job_specs(name):
  document = yaml.safe_load((FOLDER / name).read_text())
  assert (document["apiVersion"], document["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  return document, {
    job["name"]: (job["replicas"], job["template"]["spec"]) for job in document["spec"]["replicatedJobs"]
  }


def slice_chips(spec):
  """Chips of a slice; every host has its share."""
  pod = spec["template"]["spec"]
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  each = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert spec["parallelism"] == spec["completions"] == chips // each and chips % each == 0
  return chips


def check_policy(document, spec):
  """A mistake ends the job set, anything else starts it again; SIGTERM leaves time to save."""
  (rule,) = document["spec"]["failurePolicy"]["rules"]
  assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
  (stop,) = spec["podFailurePolicy"]["rules"]
  assert stop["action"] == "FailJob" and stop["onExitCodes"]["values"] == [int(ExitStatus.USER_ERROR)]
  pod = spec["template"]["spec"]
  assert stop["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
  assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never") and pod["terminationGracePeriodSeconds"] > 600


def check_volume(spec):
  claim = yaml.safe_load((FOLDER / "storage.yaml").read_text())
  pod = spec["template"]["spec"]
  (mount,), (volume,) = pod["containers"][0]["volumeMounts"], pod["volumes"]
  assert mount["mountPath"] == "/runs" and mount["name"] == volume["name"]
  assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
  assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_job_set(train_help):
  document, jobs = job_specs("jobset.yaml")
  replicas, spec = jobs["slice"]
  container = spec["template"]["spec"]["containers"][0]
  check_command(container["command"], replicas * slice_chips(spec), train_help)
  check_policy(document, spec)
  check_volume(spec)
  assert 8482 in [port["containerPort"] for port in container["ports"]]  # where JAX puts process 0 on TPU slices


def test_job_set_with_pathways(train_help):
  document, jobs = job_specs("jobset_pathways.yaml")
  (heads, head), (slices, workers) = jobs["head"], jobs["workers"]
  pod = head["template"]["spec"]
  container = pod["containers"][0]
  assert heads == head["completions"] == 1  # one process sees all devices
  check_command(container["command"], slices * slice_chips(workers), train_help)
  check_policy(document, head)
  check_volume(head)
  environment = {variable["name"]: variable.get("value") for variable in container["env"]}
  proxy, manager = pod["initContainers"]
  (port,) = [port["containerPort"] for port in proxy["ports"]]
  assert environment["JAX_PLATFORMS"] == "proxy" and environment["JAX_BACKEND_TARGET"].endswith(f":{port}")
  selector = workers["template"]["spec"]["nodeSelector"]
  kind = PATHWAYS_NAMES[selector["cloud.google.com/gke-tpu-accelerator"]]
  topology = selector["cloud.google.com/gke-tpu-topology"]
  assert {f"--instance_type={kind}:{topology}", f"--instance_count={slices}"} < set(manager["args"])
  scratch = {word for one in (proxy, manager, *workers["template"]["spec"]["containers"]) for word in one["args"]}
  assert len([word for word in scratch if word.startswith("--gcs_scratch_location=")]) == 1
  assert len([word for word in scratch if word.startswith("--resource_manager_address=")]) == 1


def test_queued_resource(train_help):
  """The script is run with a gcloud that prints what it is asked, since there is no project to ask."""
  script = (FOLDER / "queued_resource.sh").read_text()
  told = 'gcloud() { printf "%s\\n" "$@"; [ "$3" != queued-resources ] || echo ACTIVE; }\n'
  steps = re.findall(r"^  (\w+)\)$", script, re.MULTILINE)
  assert steps == re.findall(r"queued_resource\.sh (\w+)", script)  # what its head explains
  printed = {}
  for step in steps:
    edited = script.replace("set -euo pipefail\n", f"set -euo pipefail\n{told}")
    done = subprocess.run(
      ["bash", "-c", edited, "queued_resource.sh", step], capture_output=True, text=True, check=True
    )
    printed[step] = done.stdout
  cores = int(re.search(r"--accelerator-type=v5p-(\d+)", printed["request"])[1])
  command = re.search(r"--command=(.*)", printed["start"], re.DOTALL)[1]
  check_command(shlex.split(command[command.index("$PWD/.venv") :]), cores // 2, train_help)
  assert "RestartPreventExitStatus=2 130" in command and "TimeoutStopSec=" in command
  for name in re.findall(r"requirements/\w+\.txt", printed["install"]):
    assert (ROOT / name).is_file()


def test_image():
  text = (FOLDER / "Dockerfile").read_text()
  for name in re.findall(r"requirements/\w+\.txt", text):
    assert (ROOT / name).is_file()
  assert "docs/manifests/Dockerfile" in text


def test_the_chapter_names_what_there_is():
  chapter = (ROOT / "docs/tpu.md").read_text()
  for path in FOLDER.iterdir():
    assert f"manifests/{path.name}" in chapter, path
  for module in set(re.findall(r"python -m (ring_jax\.launch\.\w+)", chapter)):
    text = help_of(module)
    for line in re.findall(rf"python -m {module}((?:[^\n]|\\\n)*)", chapter):
      for name in re.findall(r"--(\w+)[= ]", line):
        assert f"--{name}:" in text or f"--[no]{name}:" in text, f"{module} has no --{name}"
  for status in ExitStatus:
    assert f"| {int(status)} |" in chapter, status
