"""Prompts and scored trees that survive a restart, and what grows the one into the other."""
