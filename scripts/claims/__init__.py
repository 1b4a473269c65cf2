"""Claims of the papers, re-run small: each (claim, method, setting, seed) is a cell that is computed once and kept."""
