"""Training: set-up, loop, loss and adapter; the engine, what survives and what is observed have rooms of their own."""
