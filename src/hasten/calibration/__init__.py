"""Learns a schedule for a model: which steps to compute, and how to fill the others.

Stages: record full runs, search the steps to compute on inner products of their velocities, fit the
weights in closed loop, and check the result on held-back prompts.
"""
