"""Post-training of Gemma 2, end to end, on Hugging Face TRL."""
