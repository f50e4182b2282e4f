"""Policies small enough to enumerate: tables of logits whose every expectation is an exact sum."""
