"""Where a fact is looked up: one file a method, each returning a tidy table of scores per component."""
