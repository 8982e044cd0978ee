"""Results that arrive later: tensors that record what is done with them until somebody needs a number."""
