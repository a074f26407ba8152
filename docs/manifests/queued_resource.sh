#!/usr/bin/env bash
# RL of Ring-mini on the TPU VMs of one slice, requested through a queued resource.  docs/tpu.md explains each step.
#
#     docs/manifests/queued_resource.sh request    # ask for the slice, and wait until it is there
#     docs/manifests/queued_resource.sh install    # the same software and the same folder on every host
#     docs/manifests/queued_resource.sh start      # one process a host, started again until it is done
#     docs/manifests/queued_resource.sh log        # of process 0, as it comes; Ctrl-C leaves it running
#     docs/manifests/queued_resource.sh stop       # finish the step, save; `start` goes on from there
#     docs/manifests/queued_resource.sh release    # give the slice back
#
# Three places to edit.
set -euo pipefail

# 1: where.  FILESTORE is HOST:/SHARE of a share in the same network; all hosts see it as /runs.
PROJECT=my-project
ZONE=us-east5-a
FILESTORE=10.0.0.2:/share
REPOSITORY=https://example.com/ring-jax.git

# 2: the slice.  v5p-16 is 16 cores: 8 chips, on 2 hosts.
NAME=ring-mini
ACCELERATOR=v5p-16
RUNTIME=v2-alpha-tpuv5
SPOT=--spot # or empty

# 3: the run.  The product of the mesh is the number of chips.
COMMAND="python -m ring_jax.launch.train --config=configs/ring_mini.py --config.model.parallel.mesh.fsdp=8
  --config.init=/runs/checkpoints/Ring-mini-2.0 --config.tokenizer.path=/runs/checkpoints/Ring-mini-2.0
  --workdir=/runs/ring_mini --watchdog=3600"

on_all() { # a command on every host at once
  gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=all --command="$1"
}

case "${1:-}" in
  request)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --project="$PROJECT" --zone="$ZONE" \
      --accelerator-type="$ACCELERATOR" --runtime-version="$RUNTIME" $SPOT
    until gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" \
      --format="value(state.state)" | tee /dev/stderr | grep -q ACTIVE; do sleep 30; done
    ;;
  install)
    # libtpu is the TPU's driver here, and has to be the one that this jaxlib was made with.
    on_all "set -e
      sudo apt-get -q update && sudo apt-get -q install -y nfs-common python3.11-venv
      sudo mkdir -p /runs && (mountpoint -q /runs || sudo mount -o hard $FILESTORE /runs)
      [ -d ring-jax ] || git clone -q $REPOSITORY ring-jax
      cd ring-jax && git pull -q && python3.11 -m venv .venv
      .venv/bin/pip install -q -r requirements/train.txt -r requirements/tpu_compiler.txt
      .venv/bin/pip install -q --no-deps -r requirements/no_deps.txt
      .venv/bin/pip install -q --no-deps -e ."
    ;;
  start)
    # systemd is the supervisor: it starts the process again unless it is done (0), was told something wrong (2) or was
    # interrupted (130), and hands on SIGTERM when the machine is taken away; only the trainer itself is told, so that
    # it can still score the step.
    on_all "cd ring-jax && sudo systemctl reset-failed ring-jax 2>/dev/null; sudo systemd-run --unit=ring-jax \
      -p User=\$USER -p WorkingDirectory=\$PWD -p Environment=JAX_COMPILATION_CACHE_DIR=/runs/cache/jax \
      -p Restart=on-failure -p RestartSec=10 -p StartLimitIntervalSec=0 -p 'RestartPreventExitStatus=2 130' \
      -p KillMode=mixed -p TimeoutStopSec=1800 \$PWD/.venv/bin/$(echo $COMMAND)"
    ;;
  log)
    gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" --worker=0 \
      --command="journalctl --unit=ring-jax --follow --lines=100 --output=cat"
    ;;
  stop)
    on_all "sudo systemctl stop ring-jax"
    ;;
  release)
    gcloud compute tpus queued-resources delete "$NAME" --project="$PROJECT" --zone="$ZONE" --force
    ;;
  *)
    sed -n '2,11p' "$0" >&2
    exit 2
    ;;
esac
