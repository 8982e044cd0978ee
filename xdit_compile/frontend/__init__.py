"""Any module's forward as a `Program`: tracing on fake tensors, repeated blocks once, values that models read."""
