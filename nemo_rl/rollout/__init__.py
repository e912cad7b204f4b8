"""Token generation with log-probabilities, by our own cached decode loop over the model being trained."""
