"""What runs before the cut: preflight checks, measuring, probing, planning."""
