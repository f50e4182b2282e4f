"""Generative recommenders: likelihoods of sessions of items. Histories to sessions, by semantic ids."""
