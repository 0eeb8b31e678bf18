"""Post-training of Gemma 2, end to end, on Hugging Face TRL."""

import os

# Before torch is imported: threads that wait for the others of their loop spin, which makes any other process on the
# machine cost a multiple of what it computes; the default spins far longer, and is no faster on a machine of its own.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
