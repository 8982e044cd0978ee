"""What a parallel model would cost and whether it is right: explain, verify, timeline."""
