"""What this machine is: GPU, driver, versions, and what else is installed.

python -m bench.gpu.machine [--json FILE]
"""

import importlib.util
import platform
import shutil
import subprocess
from importlib.metadata import version

import torch

from bench.gpu.common import arguments, save

TOOLS = ("nvcc", "compute-sanitizer", "ncu", "nvidia-smi")
MODULES = ("vllm", "transformers", "compressed_tensors", "pytest")
ASKED = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu,utilization.gpu"


def main() -> None:
    """Print it."""
    options = arguments(__doc__).parse_args()
    about = torch.cuda.get_device_properties(0)
    found: dict[str, object] = {
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
        "l2_mib": round(about.L2_cache_size / 2**20, 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "python": platform.python_version(),
        "tools": [name for name in TOOLS if shutil.which(name)],
        "modules": [name for name in MODULES if importlib.util.find_spec(name)],
    }
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu=driver_version,{ASKED}", "--format=csv"]
        said = subprocess.run(command, capture_output=True, text=True, check=False)
        found["nvidia_smi"] = (said.stdout or said.stderr).splitlines()
    for name, value in found.items():
        print(f"{name:16} {value}")
    save(options.json, found)


if __name__ == "__main__":
    main()
