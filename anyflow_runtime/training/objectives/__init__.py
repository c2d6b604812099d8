"""Losses and targets of AnyFlow, each from its paper, and the two objectives that put them together."""
