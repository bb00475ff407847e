"""Claims of the papers, tried on a laptop: each file is one command, one page in docs/experiments, one figure."""
