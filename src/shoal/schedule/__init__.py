"""What runs next: pure decisions over plain values. No tensors, no clock, no randomness, no I/O."""
