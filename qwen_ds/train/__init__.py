"""Training: set-up, loop, loss and adapter; rooms for the engine, for survival and observation."""
