"""Which rows of a mixture models should not learn from, and why: one module for each rule, pure functions."""
