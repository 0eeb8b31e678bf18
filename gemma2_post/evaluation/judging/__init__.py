"""Judges: what they are asked, what their replies say, and what they are worth."""
