"""Budgets, choices, scores, and the exact allocator."""
