"""What a plan would cost on a machine, without running it."""
