#!/bin/bash
# A pipeline as a Slurm job, submitted from the project's folder. Stages whose accelerate config has several machines
# run on that many nodes, the others on the first.
#
#   sbatch --nodes 2 recipes/submit.sh recipes/gemma-2-27b/pipeline.yaml
#   REQUEUE=1 sbatch ...    goes on in a new turn, as often as it takes, when the time limit comes near
#
# Options before the script's name (--partition, --account, --time, ...) take precedence over those below.
#SBATCH --job-name=gemma2-post
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Not on TERM, which scancel sends: what is cancelled must not come back.
trap 'out_of_time=yes; kill -TERM "$run"' USR1
.venv/bin/gemma2-post run "$@" &
run=$!
wait "$run"
status=$?
if [ -n "$out_of_time" ]; then
    wait "$run" # the first wait was cut short
    status=$?
    # 130: interrupted, neither done nor failed
    [ "$status" = 130 ] && [ -n "$REQUEUE" ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
