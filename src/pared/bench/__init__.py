"""Measuring: cost, time, memory and quality, each with its uncertainty."""
