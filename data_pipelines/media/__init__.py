"""Frames of videos and pictures: decoded, sampled, transformed, written."""
