"""Post-training of Gemma 2, end to end, on Hugging Face TRL."""

import os

# Set before torch is imported. OpenMP threads that wait for each other spin, which makes every other process on
# the machine several times slower. The default spins far longer, and is no faster even on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
