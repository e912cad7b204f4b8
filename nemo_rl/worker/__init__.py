"""What runs in the pods of a job: the trainer's entry point, and the server of its files. Importing it loads nothing."""
