"""Tuning: a model for another domain or job, at the cost of few weights."""
