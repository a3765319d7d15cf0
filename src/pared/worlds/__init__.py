"""Data that anyone can have anywhere, and readers for users' own."""
