"""Learn a schedule for one model: which steps to compute, and how to fill the others.

record full runs -> search the steps on inner products -> fit the weights in closed loop -> check on
prompts that nothing was fitted to.
"""
