"""minipeso: continual low-rank adaptation for generative recommenders (PESO, arXiv 2510.25093), from scratch."""
