#!/bin/bash
# Runs a pipeline as a Slurm job; submit it from the project's folder. Stages whose accelerate config has several
# machines run on that many nodes, the others on the first one.
#
#   sbatch --nodes 2 recipes/submit.sh recipes/gemma-2-27b/pipeline.yaml
#   REQUEUE=1 sbatch ...    requeues the job shortly before its time limit, until the pipeline is finished
#
# Options before the script's name (--partition, --account, --time, ...) override those below.
#SBATCH --job-name=gemma2-post
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append

# Not on TERM, which scancel sends: a canceled job must not be requeued.
trap 'out_of_time=yes; kill -TERM "$run"' USR1
.venv/bin/gemma2-post run "$@" &
run=$!
wait "$run"
status=$?
if [ -n "$out_of_time" ]; then
    wait "$run" # the signal interrupted the first wait
    status=$?
    # 130: interrupted, neither done nor failed
    [ "$status" = 130 ] && [ -n "$REQUEUE" ] && scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
