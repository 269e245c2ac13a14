"""Prompts with reference answers, from files and data sets."""
