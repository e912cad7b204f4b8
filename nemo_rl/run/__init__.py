"""What a run is on disk and between processes: directory, checkpoints, metrics, signals, ranks."""
