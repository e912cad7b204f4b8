"""Rollouts by the trainer's own processes: a decode loop over transformers' modules."""
