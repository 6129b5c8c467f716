"""Many trials, one answer: which depth and learning rate, at what cost."""
