"""How models answer: here, behind an endpoint, by vLLM, side by side."""
