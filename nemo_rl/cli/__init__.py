"""The command line `nemo-rl`."""
