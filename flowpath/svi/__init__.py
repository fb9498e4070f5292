"""Flows inside Pyro: guides, ELBOs and compiled stochastic variational inference."""
