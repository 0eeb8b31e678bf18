"""Which rows of a mixture models should not learn from: a module for each rule; rows in parts on disk."""
