"""Ablation of the household recipe: variants of it, trained and scored side by side from one table."""
