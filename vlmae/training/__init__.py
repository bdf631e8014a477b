"""Objectives, the step, the loop, and the tools that only they need."""
