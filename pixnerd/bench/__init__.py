"""A benchmark: what a step costs, by network, option and part, beside what the machine could do at best.

Fair by construction: the contestants share weights, batch and optimiser; they take turns in one process, and each
round begins with another of them.
"""
