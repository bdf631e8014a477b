"""Pure mathematics: functions of arrays. Imports jax alone."""
