#!/usr/bin/env bash
# A pod of TPU VMs, as a queued resource: launch/tpu_pod.sh, on any machine with gcloud that stays on.
# Asked for again whenever it is taken away, and given back once the run is finished. Where this is stopped, the pod
# stays: start it again, or delete the queued resource.
# Needs an image of the Dockerfile (EXTRA=tpu), and a bucket in the pod's region that its service account may write to.
set -euo pipefail

NAME=tora
ZONE=us-west4-a
TPU=v5litepod-64
RUNTIME=v2-alpha-tpuv5-lite
IMAGE=us-west4-docker.pkg.dev/PROJECT/tora/tora_jax:tpu
CONFIG=configs/tora.py:stage=1
MESH=fsdp=16,seq=4 # the product is the number of chips
WEIGHTS=gs://BUCKET/runs/motion_vae/release
WORKDIR=gs://BUCKET/runs/dense
SOURCES="('gs://BUCKET/cached/dense',)"

TRAIN=(python train.py --distributed --config "$CONFIG" --config.mesh "$MESH" --weights "$WEIGHTS" --workdir "$WORKDIR"
  --config.data.sources "$SOURCES" --config.resume --config.restartable)

host() { # what each host does when it has booted; Docker starts the training again until its exit code is 0
  cat << END
#!/usr/bin/env bash
gcloud auth configure-docker -q ${IMAGE%%/*}
docker rm -f tora
docker run -d --name tora --privileged --net=host --restart=on-failure:100 --stop-timeout=120 $IMAGE $(printf '%q ' "${TRAIN[@]}")
END
}

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

finished() { gcloud storage ls "$WORKDIR/release/config.json" > /dev/null 2>&1; }

until finished; do
  case $(queue describe --format='value(state.state)' 2> /dev/null || echo NONE) in
    NONE) # what is wrong with the request is told, and it is made again
      queue create --node-id="$NAME" --accelerator-type="$TPU" --runtime-version="$RUNTIME" --spot \
        --metadata-from-file=startup-script=<(host) || true
      ;;
    SUSPENDED | FAILED) queue delete --force --quiet ;;
  esac
  sleep 60
done
queue delete --force --quiet
