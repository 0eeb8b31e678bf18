"""Set before huggingface_hub is imported, which reads it once: no test may reach for the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
