"""What happens to a job, one policy per file; `decide` asks them in plan."""
