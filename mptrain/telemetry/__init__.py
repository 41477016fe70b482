"""What a run says about itself: the step ledger, counts of overflow and underflow, throughput and memory."""
