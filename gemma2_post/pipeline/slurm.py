"""One `accelerate launch` over several machines, inside a Slurm allocation.

The pipeline runs on one machine and starts this module on each machine through `srun`; the module adds what is known
only there and becomes `accelerate launch`. All machines see the project's folder and its .venv under the same path.
"""

import os
import subprocess
import sys

from gemma2_post.stage.errors import UserError


def srun(num_machines: int) -> list[str]:
    """The command to which the arguments of `accelerate launch` are appended.

    When one machine fails, srun ends all others, which would otherwise wait for it until a collective times out; its
    exit status may then be that of a machine that it ended.

    Raises:
        UserError: There is no Slurm job, or its allocation is too small.
    """
    submit = f"submit it with sbatch --nodes {num_machines} recipes/submit.sh PIPELINE"
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(f"the accelerate config is for {num_machines} machines, and this is not a Slurm job; {submit}")
    num_nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
    if num_nodes < num_machines:
        raise UserError(
            f"the accelerate config is for {num_machines} machines, and the Slurm job has {num_nodes}; {submit}"
        )
    command = ["srun", f"--nodes={num_machines}", f"--ntasks={num_machines}", "--ntasks-per-node=1"]
    # By default, all processes of a machine would share one core, and inherit --export=NONE if the job was submitted
    # with that.
    command += ["--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL"]
    return [*command, sys.executable, "-m", "gemma2_post.pipeline.slurm"]


def main() -> None:
    """Replaces this process with `accelerate launch`, so that signals reach it and its exit status is returned.

    The flags override the config's keys. The node id counts the nodes of the step, not of the job, which may have
    more; the first node of the step has rank 0.
    """
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first, *_ = subprocess.run(nodes, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--machine_rank", os.environ["SLURM_NODEID"], "--main_process_ip", first]
    command += ["--main_process_port", str(port(int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])))]
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def port(job: int, step: int) -> int:
    """A port that is the same on every machine, and differs between steps of jobs that run at the same time.

    It is below 32768, where Linux's range of ports for outgoing connections begins.
    """
    return 20000 + (101 * job + step) % 12000


if __name__ == "__main__":
    main()
