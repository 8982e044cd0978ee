"""What a compiled program costs and why: counted from its graphs, so that nothing has to run."""
