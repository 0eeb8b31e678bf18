"""Rules on what is trained on, as pure functions on text."""
