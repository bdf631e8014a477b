"""Published weights as parameters, and the format of exported runs."""
