"""Editing and unlearning: one small file a method; the mask is a separate argument, so every method runs with every mask."""
