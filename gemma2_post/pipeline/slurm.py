"""One `accelerate launch` over several machines, inside a Slurm allocation.

The pipeline, on one machine, starts it through `srun`, which runs this module once on each; it adds what is known only
there and becomes `accelerate launch`. All machines see the project's folder, and its .venv, under the same path.
"""

import os
import subprocess
import sys

from gemma2_post.stage.errors import UserError


def srun(num_machines: int) -> list[str]:
    """The command to which the arguments of `accelerate launch` are appended.

    When one machine fails, it ends all, which would wait for that one up to the time limit of a collective; its exit
    status may then be that of those it has ended.

    Raises:
        UserError: outside Slurm, or in an allocation that is too small.
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
    # A task would be bound to one core, which all processes of its machine then share; and a job submitted with
    # --export=NONE would hand that down.
    command += ["--kill-on-bad-exit=1", "--cpu-bind=none", "--export=ALL"]
    return [*command, sys.executable, "-m", "gemma2_post.pipeline.slurm"]


def main() -> None:
    """Replaces this process, so that signals and the exit status are those of `accelerate launch`.

    The flags take precedence over the config's keys. The node id counts the nodes of the step, not of the job, which
    may have more; the first of the same list is the machine of rank 0.
    """
    nodes = ["scontrol", "show", "hostnames", os.environ["SLURM_STEP_NODELIST"]]
    first, *_ = subprocess.run(nodes, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--machine_rank", os.environ["SLURM_NODEID"], "--main_process_ip", first]
    command += ["--main_process_port", str(port(int(os.environ["SLURM_JOB_ID"]), int(os.environ["SLURM_STEP_ID"])))]
    os.execv(sys.executable, [*command, *sys.argv[1:]])


def port(job: int, step: int) -> int:
    """The same on every machine, another one for any other step of jobs that run at the same time.

    Below 32768, where Linux begins to give ports to outgoing connections.
    """
    return 20000 + (101 * job + step) % 12000


if __name__ == "__main__":
    main()
