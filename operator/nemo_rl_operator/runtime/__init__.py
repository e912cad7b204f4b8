"""What any operator needs and knows nothing of jobs' rules: cache, work queue, API client, resync, liveness, times."""
