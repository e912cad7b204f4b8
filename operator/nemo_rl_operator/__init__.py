"""The operator: runs RLTrainingJobs as Jobs, keeps them alive, and says in their status what happens."""
