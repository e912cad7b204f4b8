"""Pure tensor functions of the objectives; paper and equation in each docstring."""
