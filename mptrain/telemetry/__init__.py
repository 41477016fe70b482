"""Facts of a run about itself: the step ledger, counts of overflow and underflow, throughput and memory."""
